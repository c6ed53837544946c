"""Claims of the paper's Section 3: preference models against imitation, and what they are good for.
prompting.py says how a claim is written."""
import numpy as np

from claims.findings import (
    Panel, at_size, compared, curves, figure_of, finding, gain_over_members, growing, outcome, overconfidence,
    pairs_right, panel, sizes_figure, values, without_context)
from claims.scales import size_label
from data.errors import InputError

RIGHT = "held-out comparisons right, %"


def ranked_models(lab, names):
    """{size: the arm of preference models on the held-out comparisons of sets}."""
    return lab.by_size(lambda one, name: one.accuracy(one.pm(name), name, no_context=True), names)


def against_imitation(lab, names):
    """{arm: {size: arm}} of imitation and of preference models, on the held-out comparisons of sets."""
    if not names:
        raise InputError("the sets that it compares are not among --sets")
    imitation = lab.by_size(lambda one, name: one.accuracy(one.imitation(name), name), names)
    return {"imitation": imitation, "preference model": ranked_models(lab, names)}


def with_rulers(lab, arms):
    """The values of arms, beside those of two rulers: the same preference models without the contexts, which is
    chance for a set that has none; and that the longer completion wins."""
    models = arms["preference model"]
    no_context = values(models, without_context)
    for sets in no_context.values():
        for name in sets:
            if not lab.has_contexts(name):
                sets[name] = [{item: (0.5, group) for item, (_, group) in items.items()}
                              for items in sets[name]]
    return values(arms) | {"no context": no_context, "longer wins": values(models, figure_of("longer_wins"))}


def add_kinds(lab, right, sentence, result, findings):
    """Where kinds of questions are known, add the Findings of a sentence on each of them, and a Panel."""
    kinds = lab.kinds()
    if not kinds:
        return result

    def only(kind, items):
        return {item: value for item, value in items.items() if kinds.get(value[1]) == kind}
    by_kind, label = {}, size_label(lab.size)
    for name in ("imitation", "preference model"):
        (seeds,) = right[name][lab.size].values()
        by_kind[name] = {kind: [only(kind, items) for items in seeds] for kind in sorted({*kinds.values()})}
    findings += compared(sentence, by_kind, prefix=f"{label}: ")[1:]
    result.panels = {"all kinds": result.panels[""], f"each kind, {label}": panel(by_kind, RIGHT, 50)}
    return result


def ranked_beats_imitation(lab):
    """Section 3: on ranked data a preference model is right more often than imitation, and the more so the
    larger the model.

    On the toy world the larger models' difference is plain, but from world to world the smaller ones'
    differs by more than theirs is ahead. About ten worlds would decide.
    """
    arms = against_imitation(lab, lab.ranked)
    yield arms
    right, sentence = with_rulers(lab, arms), "preference model > imitation"
    result = growing(right, RIGHT, sentence, premises=["preference model > no context"])
    return add_kinds(lab, right, sentence, result, result.beside)


def binary_equals_imitation(lab):
    """Section 3: on binary data a preference model is right about as often as imitation.

    On the toy world the mean hides what the kinds of questions show: lists, which can be checked against the
    question, are told better by a reward, and facts rather by imitation, which learns from every word of an
    answer. Models that know the facts before they see comparisons would decide whether the paper's equality is
    more than such a sum.
    """
    arms = against_imitation(lab, lab.binary)
    yield arms
    right, sentence = with_rulers(lab, arms), "preference model = imitation"
    result = outcome(at_size(right, lab.size), sizes_figure(right, RIGHT), [sentence],
                     premises=["preference model > no context"], prefix=f"{size_label(lab.size)}: ")
    for size in lab.sizes[:-1]:
        result.beside += compared(sentence, at_size(right, size), prefix=f"{size_label(size)}: ")
    return add_kinds(lab, right, sentence, result, result.parts)


def calibration(lab):
    """Section 3: the probability sigmoid(r_A - r_B) that a preference model gives is how often A is
    better.

    On the toy world what is off is less than 3 points, which count as calibrated, but the interval reaches
    further. Some thirty worlds would decide.
    """
    arm = ranked_models(lab, lab.ranked)[lab.size]
    yield arm
    given, right, pairs = {}, {}, {}
    for name, runs in arm.items():
        rows = [row for run in runs for row in run.figures["reliability"]]
        for low, _, n, probability, accuracy in sorted(rows):
            place, label = f"{100 * low:.0f}", name or "how often right"
            given.setdefault(place, []).append(100 * probability)
            right.setdefault(label, {}).setdefault(place, []).append(100 * accuracy)
            pairs.setdefault(label, {}).setdefault(place, []).append(n)
    along = "probability given, from … %"
    panels = {"": Panel({"as given": given, **right}, "right, %", along=along),
              " ": Panel(pairs, "pairs", along=along)}
    # Each set is a part, too, as the mean of a model that says too much and of one that says too little is 0.
    what, sets = "75 % minus how often it is right where it says so", arm if len(arm) > 1 else {}
    parts = {what: arm} | {f"{what}, {name}": {name: runs} for name, runs in sets.items()}
    return outcome(
        {"preference model": values(arm)}, panels,
        [finding(name, "=", overconfidence(part)) for name, part in parts.items()],
        premises=["preference model > chance"])


def accuracy_at_k(lab):
    """Section 3: the best of k samples by a preference model's score is right more often than the best by
    imitation's log-prob.

    On the toy world the samples are those of the imitation model itself, so its log-prob finds the answer
    that it gives most often, without the slips of sampling, while the preference model has learned from other
    texts and is hardly better than a random choice. Preference models that learn from comparisons of such
    samples would decide.
    """
    def choose(one, model):
        return one.evaluate("rerank", model, "--data", one.candidates(), "--k", *lab.ks)
    ranked = lab.arm(lambda one: choose(one, one.pm(one.chosen_for)))
    imitation = lab.arm(lambda one: choose(one, one.imitation(one.chosen_for)))
    yield ranked, imitation

    def right(item, key):
        """Whether the best sample by a score is right; without a score, what part of the samples is. Where no
        sample is right, both are 0."""
        marks, scores = np.array(item["right"]), np.array(item[key] if key else [0] * len(item["right"]))
        return marks[scores == scores.max()].mean()

    def by(arm, key):
        return values(arm, lambda run: {
            item["where"]: (right(item, key), item["group"]) for item in run.items()})
    chosen = {"by a preference model": by(ranked, "reward"), "by imitation": by(imitation, "mean"),
              "at random": by(ranked, None)}
    ks = [k for k in lab.ks if f"accuracy@{k}_reward" in ranked[""][0].figures]
    drawn = {name: {k: values(arm, figure_of(f"accuracy@{k}_{key}")) for k in ks} for name, arm, key in (
        ("by a preference model", ranked, "reward"), ("by imitation", imitation, "mean_log-prob"),
        ("at random", ranked, "chance"), ("best possible", ranked, "best_possible"))}
    return outcome(chosen, {"": curves(drawn, "chosen samples right, %", along="k, samples to choose from")},
                   ["by a preference model > by imitation"], premises=["by a preference model > at random"],
                   prefix="best of all samples: ")


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
    right = {"one": values(single)}
    for kind in ("mean", "least"):
        right[f"{kind} of {n}"] = values(together, lambda run: pairs_right(run, f"{kind}_of_{n}"))
    gains = [finding(f"{name} minus one", ">", gain_over_members(right[name], right["one"]))
             for name in (f"mean of {n}", f"least of {n}")]
    return outcome(right, RIGHT, gains[:1], premises=["one > chance"], beside=gains[1:])


def scaling(lab):
    """Sections 2 to 4: larger models are better language models and better preference models."""
    small, large = size_label(lab.sizes[0]), size_label(lab.sizes[-1])
    if small == large:
        raise InputError("scaling needs at least two --sizes")
    models, ranked = lab.by_size(lambda one: one.lm()), ranked_models(lab, lab.ranked)
    yield models, ranked
    right = {size_label(size): values(arm) for size, arm in ranked.items()}
    loss = {size_label(size): values(arm, figure_of("loss")) for size, arm in models.items()}
    losses = compared(f"{small} > {large}", loss, prefix="language model's loss: ", unit="nats a token")
    panels = {"language model": curves({"": loss}, "loss, nats a token", scale=1),
              "preference model": curves({"": right}, RIGHT, 50)}
    return outcome(right, panels, [f"{large} > {small}", *losses], premises=[f"{large} > chance"],
                   prefix="preference model: ")
