"""Claims of the paper's Section 3: preference models against imitation, and what they are good for.
prompting.py says how a claim is written."""
import numpy as np

from claims.figures import calibration_panels, mean_of, points, size_panels, spread, value_panel
from claims.findings import (
    above, at_size, compared, equal, gain_over_members, growing, outcome, over_seeds, overconfidence,
    pairs_right, values)
from claims.scales import size_label
from data.errors import InputError
from evals import choices

RIGHT = "held-out comparisons right, %"
RULERS = ("no_context", "longer_wins")


def against_imitation(lab, names):
    """{arm: {size: arm}} of imitation and of preference models, on the held-out comparisons of sets."""
    if not names:
        raise InputError("the sets that it compares are not among --sets")
    return {"imitation": lab.by_size(lambda one, name: one.accuracy(one.imitation(name), name), names),
            "preference model": ranked_models(lab, names)}


def ranked_models(lab, names):
    return lab.by_size(lambda one, name: one.accuracy(one.pm(name), name, no_context=True), names)


def uses_context(lab, arms):
    """The premise that preference models of the main size have learned something: they need the context."""
    runs = arms["preference model"][lab.size]
    alone = values(runs, lambda run: pairs_right(run, "no_context"))
    return compared("preference model > the same without context",
                    {"preference model": values(runs), "the same without context": alone},
                    prefix=f"{size_label(lab.size)}: ")[0]


def add_kinds(lab, arms, sentence, result, findings):
    """Where kinds of questions are known, add the Findings of a sentence on each of them, and a panel."""
    kinds, by_kind = lab.kinds(), {}
    if not kinds:
        return result

    def only(kind, items):
        return {item: value for item, value in items.items() if kinds.get(value[1]) == kind}
    for name, sets in at_size(values(arms), lab.size).items():
        (seeds,) = sets.values()
        by_kind[name] = {kind: [only(kind, items) for items in seeds] for kind in sorted({*kinds.values()})}
    findings += compared(sentence, by_kind, prefix=f"{size_label(lab.size)}: ")[1:]
    panel = value_panel(by_kind, RIGHT, 50)
    result.figure = {"all kinds": result.figure[""], f"each kind, {size_label(lab.size)}": panel}
    return result


def ranked_beats_imitation(lab):
    """Section 3.2: on ranked data a preference model is right more often than imitation, and the more so the
    larger the model."""
    arms = against_imitation(lab, lab.ranked)
    yield arms
    sentence = "preference model > imitation"
    result = growing(values(arms), size_panels(arms, "accuracy", RIGHT, 50, RULERS), sentence,
                     premises=[uses_context(lab, arms)])
    return add_kinds(lab, arms, sentence, result, result.beside)


def binary_equals_imitation(lab):
    """Section 3.3: on binary data a preference model is right about as often as imitation."""
    arms = against_imitation(lab, lab.binary)
    yield arms
    sentence, right = "preference model = imitation", values(arms)
    result = outcome(at_size(right, lab.size), size_panels(arms, "accuracy", RIGHT, 50, RULERS), [sentence],
                     premises=[uses_context(lab, arms)], prefix=f"{size_label(lab.size)}: ")
    for size in lab.sizes[:-1]:
        result.beside += compared(sentence, at_size(right, size), prefix=f"{size_label(size)}: ")
    return add_kinds(lab, arms, sentence, result, result.parts)


def calibration(lab):
    """Section 2.1: the probability sigmoid(r_A - r_B) that a preference model gives is how often A is
    better."""
    runs = ranked_models(lab, lab.ranked)[lab.size]
    yield runs
    too_sure = equal("where it gives 75 %, too sure by", overconfidence(runs))
    return outcome({"preference model": values(runs)}, calibration_panels(runs), [too_sure],
                   premises=["preference model > chance"])


def accuracy_at_k(lab):
    """Section 3.3: the best of k samples by a preference model's score is right more often than the best by
    imitation's log-prob."""
    learned, samples = lab.candidates

    def choose(one, model):
        return one.evaluate("rerank", model, "--data", one.data(samples))
    ranked = lab.arm(lambda one: choose(one, one.pm(learned)))
    imitation = lab.arm(lambda one: choose(one, one.imitation(learned)))
    yield ranked, imitation

    def right(item, key):
        """Whether the best sample by a score is right; how many are, without one."""
        marks = np.array(item["right"])
        return choices.hit(marks, np.array(item[key])) if key else marks.mean()

    def by(arm, key):
        return values(arm, lambda run: {
            item["where"]: (right(item, key), item["group"]) for item in run.items()})
    chosen = {"best by a preference model": by(ranked, "reward"), "best by imitation": by(imitation, "mean"),
              "a random one": by(ranked, None)}
    ks = [k for k in lab.ks if f"accuracy@{k}_reward" in ranked[""][0].figures]
    series = {name: {k: mean_of(arm, f"accuracy@{k}_{key}") for k in ks} for name, arm, key in (
        ("best by a preference model", ranked, "reward"), ("best by imitation", imitation, "mean_log-prob"),
        ("a random one", ranked, "chance"), ("best possible", ranked, "best_possible"))}
    return outcome(chosen, {"": points(series, "chosen samples right, %", along="k, samples to choose from")},
                   ["best by a preference model > best by imitation"],
                   premises=["best by a preference model > a random one"])


def ensembles(lab):
    """Appendix: ensembles of preference models are right more often than one of them."""
    n = len(lab.seeds)
    if n < 2:
        raise InputError("ensembles needs at least two --seeds")
    lm, lab = lab.lm(), lab.changed(world=0)  # the members judge the same comparisons; their seeds differ
    models = lab.arm(lambda one, name: one.pm(name, init=lm), lab.ranked)
    single = lab.arm(lambda one, name: one.accuracy(one.pm(name, init=lm), name, no_context=True), lab.ranked)
    together = {name: [lab.accuracy(first, name, "--ensemble", *others)]
                for name, (first, *others) in models.items()}
    yield single, together

    def gain(key):
        return gain_over_members(values(together, lambda run: pairs_right(run, key)), values(single))
    series = {"one": mean_of(single, "accuracy"), f"mean of {n}": mean_of(together, f"mean_of_{n}"),
              f"least of {n}": mean_of(together, f"least_of_{n}")}
    return outcome({"one": values(single)}, {"": points({"": series}, RIGHT, 50, lines=False)},
                   [above(f"mean of {n} minus one", gain(f"mean_of_{n}"))], premises=["one > chance"],
                   beside=[above(f"least of {n} minus one", gain(f"least_of_{n}"))])


def scaling(lab):
    """Sections 2 to 4: larger models are better language models and better preference models."""
    small, large = lab.sizes[0], lab.sizes[-1]
    if small == large:
        raise InputError("scaling needs at least two --sizes")
    models, ranked = lab.by_size(lambda one: one.lm()), ranked_models(lab, lab.ranked)
    yield models, ranked
    loss = {size: np.array([run.figures["loss"] for run in arm[""]]) for size, arm in models.items()}
    series = {size_label(size): spread(seeds) for size, seeds in loss.items()}
    panels = {"language model": points({"": series}, "loss, nats a token"), **size_panels({"preference model": ranked}, "accuracy", RIGHT, 50)}
    lower = over_seeds(loss[small] - loss[large])
    small, large = size_label(small), size_label(large)
    return outcome({size_label(size): values(arm) for size, arm in ranked.items()}, panels,
                   [f"{large} > {small}", above(f"loss: {small} minus {large}", lower, "nats a token")],
                   premises=[f"{large} > chance"], prefix="preference model: ")
