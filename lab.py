"""Every claim of the paper is one command: runs the scripts it needs, compares, draws, and reports what came out.

  python lab.py toy                                       all claims on the embedded toy world, on a CPU
  python lab.py toy prompt-helps ranked-beats-imitation   some of them
  python lab.py small --data DIR core                     the first five on published sets, hours on a CPU
  python lab.py gpu --data DIR --sizes 13m 197m           larger models on a GPU
  python lab.py toy --dry_run                             what would be run

Runs are kept under OUT/runs by their flags, data and code: finished ones are reused, interrupted ones go on. The report is
OUT/SCALE/report.html and report.md; every run's command, seconds and figures stand in runs.jsonl. A verdict is *holds*, *does
not hold* or *cannot tell*, from a 95 % interval over test groups and seeds. Exit code 1 if a claim's runs failed.

Claims:
"""
import argparse
import itertools
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

import plan
from data import toy
from data.toy import synthetic
from data.errors import InputError, run_main
from data.files import build_once, content_key, write_file
from evals import choices
from claims.findings import above, bars, compared, curves, equal, hits, legend_above, line_style, log_axis, mean_of, over_seeds, pairs_right, set_bars, spread, valued
from model import SIZES
from claims.report import picture, write_report
from claims.runs import Run, cores, execute, needed
from claims.scales import BINARY, RANKED, Gpu, Small, Toy, paper_plan

# ---------------------------------------------------------------------------------------------------------------------
# The claims. Each is a function of a scale (scales.py). It yields the runs it needs and, when they are done, returns (findings, the
# first being the claim's own; a function that draws its figure). The first line of its docstring: the paper's section, and
# what it says. Findings and figures are made by findings.py.


def by_size(lab, make):
    """{size: make(size, seed) for all seeds}, the main size first."""
    return {size: lab.by_seed(lambda seed: make(size, seed)) for size in reversed(lab.sizes)}


def size_curves(lab, arms, label, key="accuracy", rulers=()):
    """Accuracy against size, as the paper draws it: {arm: {size: runs}}; bars where there is one size. rulers: as of set_bars."""
    if len(lab.sizes) == 1:
        return set_bars({name: arm[lab.size] for name, arm in arms.items()}, label, key, rulers)
    last = list(arms.values())[-1]
    keyed = [(name, arm, key) for name, arm in arms.items()] + [(name.replace("_", " "), last, name) for name in rulers]
    return curves({name: [mean_of(arm[size], own) for size in lab.sizes] for name, arm, own in keyed}, *size_axis(lab), label)


def size_axis(lab):
    return [12 * SIZES[size][0] * SIZES[size][1] ** 2 for size in lab.sizes], "12 n_layer d_model², parameters"


def prompt_helps(lab):
    """Section 2.2: a prompt of helpful, honest and harmless conversations improves a language model's choice of answers."""
    plain = by_size(lab, lambda size, s: lab.hhh(lab.lm(size, s), size=size))
    prompted = by_size(lab, lambda size, s: lab.hhh(lab.lm(size, s), prompted=True, size=size))
    yield plain, prompted
    findings = [finding for size in plain for rule, name in (("mean", "mean log-prob"), ("mi", "mutual information"))
                for finding in compared(f"{size}, by {name}", valued(plain[size], hits(rule)), valued(prompted[size], hits(rule)))]
    return findings, size_curves(lab, {"plain": plain, "prompted": prompted}, "HHH accuracy by mean log-prob, %", "accuracy_mean")


def distilled_equals_prompted(lab):
    """Section 2.3: a model distilled from its prompted self does about as well without the prompt; finetuning on the prompt's text does less."""
    arms = {"plain": lab.by_seed(lambda s: lab.hhh(lab.lm(lab.size, s))), "prompted": lab.by_seed(lambda s: lab.hhh(lab.lm(lab.size, s), prompted=True)),
            "distilled": lab.by_seed(lambda s: lab.hhh(lab.distilled(s))), "finetuned on it": lab.by_seed(lambda s: lab.hhh(lab.finetuned_on(lab.prompt_text, s)))}
    yield arms
    plain, prompted, distilled, tuned = (valued(arm, hits("mean")) for arm in arms.values())
    findings = [*compared("distilled minus prompted", prompted, distilled, equal), *compared("distilled minus plain", plain, distilled),
                *compared("distilled minus finetuned on the prompt", tuned, distilled)]
    return findings, set_bars(arms, "HHH accuracy by mean log-prob, %", "accuracy_mean")


def against_imitation(lab, names):
    """{arm: {size: {set: runs}}}: imitation, and preference models by rewards."""
    if not names:
        raise InputError("the sets that it compares are not among --sets")
    make = lambda size, name, s, *flags: lab.accuracy(lab.pm(name, s, *flags, size=size), name, size=size, no_context=not flags)  # the imitation has flags; its bar has no such ruler
    return {arm: {size: {name: lab.by_seed(lambda s: make(size, name, s, *flags)) for name in names} for size in reversed(lab.sizes)}
            for arm, flags in (("imitation", ("--objective", "imitation")), ("preference model", ()))}


def imitation_findings(lab, arms, label, verdict):
    imitation, ranked = arms.values()
    findings = [finding for size in ranked for finding in compared(f"{size}: preference model minus imitation", valued(imitation[size]), valued(ranked[size]), verdict)]
    alone = valued(ranked[lab.size], lambda run: pairs_right(run, "no_context"))
    learned = compared(f"{lab.size}: preference model minus the same without the context", alone, valued(ranked[lab.size]))
    if verdict is equal and learned[0].verdict != "holds":  # two arms that have learned nothing are equal too: that tells nothing
        findings = [replace(finding, verdict="cannot tell") if finding.verdict == "holds" else finding for finding in findings]
    return findings + learned, size_curves(lab, arms, label, rulers=("no_context", "longer_wins"))


def ranked_beats_imitation(lab):
    """Section 3.2: on ranked data a preference model beats imitation by far, and scales better."""
    arms = against_imitation(lab, lab.ranked)
    yield arms
    return imitation_findings(lab, arms, "accuracy on held-out ranked comparisons, %", above)


def calibration(lab):
    """Section 2.1: the probability sigmoid(r_A - r_B) that a preference model gives is how often A is better."""
    runs = against_imitation(lab, lab.ranked)["preference model"][lab.size]
    yield runs
    table = lambda run: run.figures["reliability"]
    given_and_right = lambda rows: np.average([row[3:] for row in rows], weights=[row[2] for row in rows], axis=0)  # of so many pairs
    surplus = [100 * np.mean([np.subtract(*given_and_right(table(own[seed]))) for own in runs.values()]) for seed in lab.seeds]

    def draw(ax):
        for n, (name, own) in enumerate(runs.items()):
            rows = [row for run in own for row in table(run)]
            points = np.array([given_and_right([row for row in rows if row[0] == low]) for low in sorted({row[0] for row in rows})])
            ax.errorbar(*(100 * points.T), label=name, **line_style(n))
        ax.plot([50, 100], [50, 100], color="0.7", label="perfect")
        ax.set(xlabel="mean probability given to the likelier one, %", ylabel="how often it is the better one, %")
        ax.legend(frameon=False)
    return [equal("mean probability given minus accuracy", *over_seeds(surplus), over="seeds")], draw


def binary_equals_imitation(lab):
    """Section 3.3: on binary data a preference model does about as well as imitation."""
    arms = against_imitation(lab, lab.binary)
    yield arms
    return imitation_findings(lab, arms, "accuracy on held-out binary comparisons, %", equal)


def transferred(lab, pre_trained=None, *flags, n=None, names=None, size=None):
    """{set: runs} of what is right after finetuning on few comparisons from pre_trained(seed), or from the language model."""
    return {name: lab.by_seed(lambda s: lab.accuracy(lab.tuned(name, s, *flags, init=pre_trained and pre_trained(s), n=n, size=size), name, size=size))
            for name in names or lab.targets}


def transfer_findings(lab, what, arms):
    """Findings on the last arm minus the first, and the figure."""
    first, *_, last = map(valued, arms.values())
    return compared(f"{what}, at {lab.few} comparisons", first, last), set_bars(arms, f"held-out accuracy after {lab.few} comparisons, %")


def pre_trained(lab, *flags, **more):
    return lambda seed: lab.pre_trained(seed, *flags, **more)


def pmp_sample_efficiency(lab):
    """Section 4.2: preference-model pre-training raises accuracy at 500 comparisons, more so for large models."""
    arms = {"without pre-training": {size: transferred(lab, size=size) for size in reversed(lab.sizes)},
            "with it": {size: transferred(lab, pre_trained(lab, size=size), size=size) for size in reversed(lab.sizes)}}
    yield arms
    without, with_it = arms.values()
    findings = [finding for size in without for finding in
                compared(f"{size}: with minus without pre-training, at {lab.few} comparisons", valued(without[size]), valued(with_it[size]))]
    return findings, size_curves(lab, arms, f"held-out accuracy after {lab.few} comparisons, %")


def pmp_curve(lab):
    """Section 4.2: pre-training is worth many comparisons where there are few, less where there are 5,000."""
    arms = {"none": {n: transferred(lab, n=n, names=lab.large) for n in lab.amounts},
            "Mix": {n: transferred(lab, pre_trained(lab), n=n, names=lab.large) for n in lab.amounts}}
    yield arms
    findings = [finding for n in lab.amounts for finding in compared(f"at {n:,} comparisons: with minus without", valued(arms["none"][n]), valued(arms["Mix"][n]))]
    return findings, curves({f"pre-training: {name}": [mean_of(arm[n], "accuracy") for n in lab.amounts] for name, arm in arms.items()},
                            lab.amounts, "comparisons of finetuning", "held-out accuracy, %")


def pmp_by_source(lab):
    """Section 4.2: each source helps at 500 comparisons, and their Mix is about as good as any."""
    arms = {"none": transferred(lab)} | {name: transferred(lab, pre_trained(lab, sources=[name])) for name in lab.sources}
    arms["Mix"] = transferred(lab, pre_trained(lab))
    yield arms
    none = valued(arms["none"])
    return ([finding for name in ("Mix", *lab.sources) for finding in compared(f"{name} minus none", none, valued(arms[name]))],
            set_bars(arms, f"held-out accuracy after {lab.few} comparisons, %"))


def binary_pmp_transfers_better(lab):
    """Section 4.3: binarised pre-training transfers better than ranked."""
    ranked = [flag for flag in lab.pmp if flag != "--binarise"]
    arms = {"none": transferred(lab)} | {name: transferred(lab, lambda s: lab.pre_trained(s, pmp=(*ranked, *flags))) for name, flags in (("ranked", ()), ("binarised", ("--binarise",)))}
    yield arms
    none, ranked, binarised = map(valued, arms.values())
    return ([*compared(f"binarised minus ranked pre-training, at {lab.few} comparisons", ranked, binarised), *compared("ranked minus none", none, ranked),
             *compared("binarised minus none", none, binarised)], set_bars(arms, f"held-out accuracy after {lab.few} comparisons, %"))


def lm_loss_helps_pmp(lab):
    """Appendix: the language-model loss on the good side in pre-training improves transfer."""
    arms = {"without": transferred(lab, pre_trained(lab, "--lm_weight", 0)), "with LM loss": transferred(lab, pre_trained(lab))}
    yield arms
    return transfer_findings(lab, "with minus without LM loss in pre-training", arms)


def end_of_context_helps(lab):
    """Section 4.1: an end-of-context token, where the reward is read, improves preference models."""
    arms = {"last token": transferred(lab, pre_trained(lab, "--no_eoc"), "--no_eoc"), "<eoc>": transferred(lab, pre_trained(lab))}
    yield arms
    return transfer_findings(lab, "read at <eoc> minus read at the last token", arms)


def human_vs_model_pairs(lab):
    """Section 4.4: pre-training on human against model-written text transfers better than human against human."""
    contexts, pairs = lab.model_written
    source, same = lab.public("stackexchange"), (*lab.pmp, "--pairs", pairs, "--pairs_per_group", 1)

    def model_written(seed):
        imitation = lab.train_pm(lab.size, lab.lm(lab.size, seed), seed, "--objective", "imitation", "--data", source, "--pairs", contexts, held_out=0.05, comparisons=contexts)
        return lab.run("-m data.prepare human-vs-model", "--raw", source, "--model", imitation, "--contexts", contexts, "--max_new", lab.max_new, "--seed", seed,
                       seconds=0.002 * contexts * lab.max_new)
    on_model_written = lambda seed: lab.train_pm(lab.size, lab.lm(lab.size, seed), seed, "--data", model_written(seed), "--lm_weight", 1, *same,
                                                 held_out=0.05, comparisons=2 * pairs)
    arms = {"human-human": transferred(lab, pre_trained(lab, *same, pmp=(), sources=["stackexchange"])), "human-model": transferred(lab, on_model_written)}
    yield arms
    return transfer_findings(lab, f"human against model minus human against human, {pairs:,} pairs each", arms)


def accuracy_at_k(lab):
    """Section 3.3: the best of k samples by a preference model's score is right more often, with k, than by imitation's log-prob."""
    name, samples = lab.candidates()
    ranked, imitation = (lab.by_seed(lambda s: lab.evaluate("rerank", lab.pm(name, s, *flags), "--data", samples)) for flags in ((), ("--objective", "imitation")))
    yield ranked, imitation
    ks = [k for k in lab.ks if f"accuracy@{k}_reward" in ranked[0].figures]

    def best(score):
        """Of a run: whether the best by `score` of all samples is right; without a score how many are."""
        return lambda run: {item["where"]: (choices.hit(np.array(item["right"]), np.array(item[score])) if score else np.mean(item["right"]), item["group"])
                            for item in run.items()}

    def draw(ax):
        for runs, name, style in ((ranked, "reward", "o-"), (imitation, "mean_log-prob", "s--"), (ranked, "chance", ":"), (ranked, "best_possible", "-.")):
            mean, sd = zip(*(mean_of(runs, f"accuracy@{k}_{name}") for k in ks))
            ax.errorbar(ks, mean, sd, fmt=style, color="black", capsize=3, label={"reward": "preference model", "mean_log-prob": "imitation"}.get(name, name.replace("_", " ")))
        log_axis(ax, ks, "k, samples to choose from")
        ax.set_ylabel("accuracy@k, %")
        ax.legend(frameon=False)
    return [*compared("best of all samples: preference model minus imitation", valued(imitation, best("mean")), valued(ranked, best("reward"))),
            *compared("preference model: best of all samples minus one of them", valued(ranked, best(None)), valued(ranked, best("reward")))], draw


def ensembles(lab):
    """Appendix: ensembles of preference models give small gains."""
    if len(lab.seeds) < 2:
        raise InputError("ensembles needs at least two --seeds")
    members = {name: lab.by_seed(lambda s: lab.pm(name, s)) for name in lab.ranked}
    runs = {name: [lab.accuracy(member, name, "--ensemble", *(m for m in own if m is not member)) for member in own] for name, own in members.items()}
    yield runs
    both = [f"{kind}_of_{len(lab.seeds)}" for kind in ("mean", "least")]
    findings = [finding for name in both for finding in compared(f"{name.replace('_', ' ')} minus one of them", valued(runs), valued(runs, lambda run: pairs_right(run, name)))]
    return findings, bars({"": {"one": mean_of(runs, "accuracy")} | {name.replace("_", " "): mean_of(runs, name) for name in both}}, "held-out accuracy, %")


def toxicity_falls(lab):
    """Section 2.2: the prompt, and distilling it, lower the toxicity of what the model writes."""
    toxic = lambda model, s, prompted=False: lab.sampled("toxicity", model, 150, "--data", lab.contexts(), "--prompts", 150, *lab.toxicity_scorer(s), "--seed", s,
                                                         n=4, prompted=prompted)
    arms = {"plain": lab.by_seed(lambda s: toxic(lab.lm(lab.size, s), s)), "prompted": lab.by_seed(lambda s: toxic(lab.lm(lab.size, s), s, True)),
            "distilled": lab.by_seed(lambda s: toxic(lab.distilled(s), s))}
    yield arms
    plain, *others = (valued(arm, lambda run: {item["prompt"]: (np.mean(item["toxicity"]), item["prompt"]) for item in run.items()}) for arm in arms.values())
    return ([finding for name, other in zip(("prompted", "distilled"), others) for finding in compared(f"plain minus {name}", other, plain)],
            set_bars(arms, "mean toxicity, %", "mean"))


def elo_ranks(lab):
    """Section 2.2: judged in games, prompted and distilled models are rated above the plain one."""
    def games(s):
        draw = lambda model, prompted=False: lab.sampled("sample", model, 300, "--data", lab.contexts(), "--contexts", 300, "--temperature", 1, "--seed", s, prompted=prompted)
        players = {"plain": draw(lab.lm(lab.size, s)), "prompted": draw(lab.lm(lab.size, s), True), "distilled": draw(lab.distilled(s))}
        return lab.run("evaluate.py", "elo", "--judge", lab.judge(s), "--names", *players, "--samples", *players.values(), seconds=10)
    runs = lab.by_seed(games)
    yield runs
    elo = {name: [run.figures["players"][name]["elo"] for run in runs] for name in ("plain", "prompted", "distilled")}
    return ([above(f"{name} minus plain", *over_seeds(np.subtract(elo[name], elo["plain"])), unit="Elo", over="seeds") for name in ("prompted", "distilled")],
            bars({"": {name: spread(values) for name, values in elo.items()}}, "Elo, judged by a preference model"))


def truthfulqa_needs_mutual_information(lab):
    """Section 2.2: on questions with popular falsehoods mutual information is a better score than the raw log-prob."""
    runs = by_size(lab, lambda size, s: lab.falsehoods(lab.lm(size, s), size=size))
    yield runs
    rules = {"sum": "sum log-prob", "mean": "mean log-prob", "mi": "mutual information"}
    findings = [finding for size in runs for finding in compared(f"{size}: mutual information minus sum", *(valued(runs[size], lab.right(rule)) for rule in ("sum", "mi")))]
    by_rule, label = {name: [mean_of(runs[size], lab.right_key.format(rule)) for size in lab.sizes] for rule, name in rules.items()}, "questions with popular falsehoods, %"
    return findings, bars({"": {name: values[0] for name, values in by_rule.items()}}, label) if len(lab.sizes) == 1 else curves(by_rule, *size_axis(lab), label)


def prior_not_finetuning(lab):
    """Section 2.3: having read 1 … 63 a model goes on with 64; finetuned on 1 … 63 it expects them again, from 1."""
    question = lambda name, context, ways: lab.file(f"count-{name}.jsonl", [{"context": context, "completions": ways, "scores": [1, 0], "group": "count"}])
    after, alone = question("after", toy.count_from(1, 63) + ",", [" 64, 65, 66, 67", " 1, 2, 3, 4"]), question("alone", "", ["64, 65, 66, 67", "1, 2, 3, 4"])
    choice = lambda model, file, *flags: lab.evaluate("choice", model, "--data", file, *flags)
    arms = {"untouched": lab.by_seed(lambda s: choice(lab.lm(lab.size, s), alone)),
            "prompted with 1 … 63": lab.by_seed(lambda s: choice(lab.lm(lab.size, s), after, "--ctx", 400)),
            "finetuned on 1 … 63": lab.by_seed(lambda s: choice(lab.finetuned_on(toy.toy_folder() / "count.txt", s), alone))}
    yield arms
    untouched, prompted, tuned = margins = [[np.subtract(*run.items()[0]["mean"]) for run in runs] for runs in arms.values()]
    nats = {"unit": "nats a token", "over": "seeds"}
    findings = [above("expecting 64, 65 … rather than 1, 2 …: prompted minus finetuned", *over_seeds(np.subtract(prompted, tuned)), **nats),
                above("prompted minus untouched", *over_seeds(np.subtract(prompted, untouched)), **nats),
                above("untouched minus finetuned", *over_seeds(np.subtract(untouched, tuned)), **nats)]
    return findings, bars({"": {name: spread(values) for name, values in zip(arms, margins)}}, "log P(64, 65, …) - log P(1, 2, …), nats a token")


def alignment_tax(lab):
    """Section 2.2: behind the prompt small models lose some accuracy at telling a text's last word; large ones do not."""
    make = lambda prompted: by_size(lab, lambda size, s: lab.last_words(lab.lm(size, s), prompted=prompted, size=size))
    plain, prompted = make(False), make(True)
    yield plain, prompted
    right = lambda run: {item["item"]: (item["right"], item["group"]) for item in run.items()}
    findings = [finding for size in lab.sizes for finding in compared(f"{size}: accuracy lost behind the prompt", valued(prompted[size], right), valued(plain[size], right))]
    return findings, size_curves(lab, {"plain": plain, "prompted": prompted}, "last words told right, %")


def code_tax(lab):
    """Section 2.2: behind a prompt of dialogues small models write fewer programs that pass their tests (MBPP, pass@1); large ones do not."""
    passing = lambda s, *flags: lab.evaluate("mbpp", lab.lm(lab.size, s), "--data", *lab.find("mbpp/mbpp.jsonl*"), "--problems", 30, "--n", 4, "--k", 1, "--max_new", 120,
                                             "--seed", s, *flags, tokens=10**6)
    plain, prompted = lab.by_seed(passing), lab.by_seed(lambda s: passing(s, "--prompt", "code", *lab.prompt[2:]))
    yield plain, prompted
    passed = lambda run: {item["id"]: (item["passed"] / item["n"], item["id"]) for item in run.items()}
    return (compared("pass@1 lost behind the prompt", valued(prompted, passed), valued(plain, passed)), set_bars({"plain": plain, "prompted": prompted}, "MBPP, pass@1, %", "pass@1"))


def scaling(lab):
    """Sections 2 to 4: larger models are better language models and better preference models."""
    small, large = lab.sizes[0], lab.sizes[-1]
    if small == large:
        raise InputError("scaling needs at least two --sizes")
    models, ranked = by_size(lab, lab.lm), against_imitation(lab, lab.ranked)["preference model"]
    yield models, ranked
    loss = {size: [run.figures["loss"] for run in runs] for size, runs in models.items()}
    findings = [*compared(f"preference model: {large} minus {small}", valued(ranked[small]), valued(ranked[large])),
                above(f"language model's loss: {small} minus {large}", *over_seeds(np.subtract(loss[small], loss[large])), unit="nats a token", over="seeds")]

    def draw(ax):
        n, along = size_axis(lab)
        mean, sd = zip(*(mean_of(ranked[size], "accuracy") for size in lab.sizes))
        ax.errorbar(n, mean, sd, fmt="o-", color="black", capsize=3, label="preference model, accuracy")
        log_axis(ax, n, along)
        ax.set_ylabel("held-out accuracy, %")
        other = ax.twinx()
        other.errorbar(n, [np.mean(loss[size]) for size in lab.sizes], fmt="s--", color="0.5", label="language model, loss")
        other.set_ylabel("held-out loss, nats a token")
        legend_above(ax, handles=[*ax.get_legend_handles_labels()[0], *other.get_legend_handles_labels()[0]])
    return findings, draw


def synthetic_transfer(lab):
    """Appendix: on synthetic data a ranking learned in pre-training has to be unlearned where the order changes; a binarised one less."""
    small, orders = ("--ctx", 64, "--dtype", "fp32", "--lm_weight", 0, "--held_out", 0.02), ("same", "shuffled", "reversed")

    def arm(seed, order, *flags):
        folder = build_once(f"synthetic-{seed}-{content_key([synthetic.__file__])}", lambda folder: synthetic.write(folder, seed))
        if flags != ("none",):
            init = ("--init", lab.run("train_pm.py", "--size", "test", "--tokenizer", "bytes", "--stage", "pmp", "--data", folder / "pmp.jsonl", "--batch", 64,
                                      "--lr", 0.003, "--seed", seed, *small, *flags, seconds=12))
        else:
            init = ("--size", "test", "--tokenizer", "bytes")
        model = lab.run("train_pm.py", *init, "--data", folder / f"finetune-{order}.jsonl", "--lr", 0.0003, "--epochs", 4, "--seed", seed, *small, seconds=3)
        return lab.evaluate("pm", model, "--data", folder / f"test-{order}.jsonl", "--dtype", "fp32")
    arms = {name: {order: lab.by_seed(lambda s: arm(s, order, *flags)) for order in orders}
            for name, flags in (("none", ("none",)), ("ranked", ()), ("binarised", ("--binarise",)))}
    yield arms
    accuracy = lambda name, order: [run.figures["accuracy"] for run in arms[name][order]]  # each seed has data of its own
    findings = [above(f"{order} order: binarised minus ranked pre-training", *over_seeds(np.subtract(accuracy("binarised", order), accuracy("ranked", order)), 100), over="seeds")
                for order in ("reversed", "shuffled", "same")]
    return findings, bars({name: {order: mean_of(runs, "accuracy") for order, runs in arm.items()} for name, arm in arms.items()},
                          "accuracy after 200 pairs of an order, %")


CLAIMS = {f.__name__.replace("_", "-"): f for f in (
    prompt_helps, distilled_equals_prompted, ranked_beats_imitation, binary_equals_imitation, pmp_sample_efficiency,  # the core
    calibration, alignment_tax, code_tax, prior_not_finetuning, pmp_curve, pmp_by_source, binary_pmp_transfers_better, lm_loss_helps_pmp, end_of_context_helps, human_vs_model_pairs,
    accuracy_at_k, ensembles, toxicity_falls, elo_ranks, truthfulqa_needs_mutual_information, scaling, synthetic_transfer)}
CORE = list(CLAIMS)[:5]
ELSEWHERE = {Toy: {"code-tax"}, Small: {"synthetic-transfer"}, Gpu: {"synthetic-transfer"}}  # the toy world has no programs; its synthetic data need no other scale


def parse_args():
    shown = __doc__ + "\n".join(f"  {name:<38}{f.__doc__.splitlines()[0]}" for name, f in CLAIMS.items())
    parser = argparse.ArgumentParser(description=shown, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scale", choices=("toy", "small", "gpu", "paper"), help="toy: the embedded world, 0.1M and 0.8M parameters, a CPU; small: published sets, 0.8M and 5M, "
                        "hours on a CPU; gpu: the same, 13M to 810M, a GPU; paper: print the commands for 13m to 52b with GPUs, memory and hours, and run nothing")
    parser.add_argument("claims", nargs="*", metavar="CLAIM", help="claims to test, or core for the first five (default: all)")
    parser.add_argument("--out", default="out/lab", help="folder of runs and reports (default: %(default)s)")
    parser.add_argument("--seeds", type=plan.positive(int), default=3, help="seeds, 0 and up, of every run (default: %(default)s)")
    parser.add_argument("--sizes", nargs="+", choices=SIZES, metavar="SIZE", help="model sizes, the main one last, as model.py names them (default: the scale's)")
    parser.add_argument("--data", metavar="DIR", help="for small and gpu: folder of the published files")
    parser.add_argument("--lm", metavar="DIR", help="for small and gpu: a language model to start from, instead of training one of each size on DIR/text")
    parser.add_argument("--sets", nargs="+", choices=RANKED + BINARY, default=RANKED + BINARY, metavar="SET", help=f"for small and gpu: the sets to finetune on, of {', '.join(RANKED + BINARY)} (default: all)")
    parser.add_argument("--jobs", type=plan.positive(int), help="runs at a time (default: one for each GPU or core)")
    parser.add_argument("--launch", default="", metavar="COMMAND", help='how to start a script, such as "torchrun --nproc_per_node 8", or a template such as "srun --gpus 1 {command}"')
    parser.add_argument("--dry_run", action="store_true", help="list the runs with their estimated time, and run nothing")
    args = parser.parse_intermixed_args()
    args.given = [word for word in sys.argv[1:] if word not in (args.scale, *args.claims)]
    if args.scale == "paper":
        return args, None, {}
    scale = {"toy": Toy, "small": Small, "gpu": Gpu}[args.scale]
    there = {name: claim for name, claim in CLAIMS.items() if name not in ELSEWHERE[scale]}
    args.claims = [name for claim in args.claims or there for name in (CORE if claim == "core" else [claim])]
    unknown = [name for name in args.claims if name not in there]
    if unknown:
        raise InputError(f"no claim {unknown[0]!r} at this scale; there are {', '.join(there)}, and core for the first five")
    args.sizes = args.sizes or list(scale.default_sizes)
    return args, scale, there


def main():
    args, scale, there = parse_args()
    if args.scale == "paper":
        return paper_plan()
    lab, gpus = scale(args), torch.cuda.device_count()
    claims, runs, results = {name: there[name](lab) for name in args.claims}, {}, {}
    for name, claim in claims.items():
        try:
            runs[name] = list(all_runs(next(claim)))
        except InputError as error:  # what it needs is not there; the others can go on
            runs[name], results[name] = [], (None, str(error))
    everything = needed(itertools.chain(*runs.values()))
    todo = [run for run in everything if not run.done]
    jobs = args.jobs or (1 if args.launch else gpus or cores())
    print(f"{len(everything)} runs, {len(todo)} of them still to do, {jobs} at a time: "
          f"about {sum(run.seconds for run in todo) / jobs / 60:.0f} minutes", flush=True)
    for name, (_, why) in results.items():
        print(f"{name} cannot be tested: {why}")
    if args.dry_run:
        for run in everything:
            print(f"  {'done' if run.done else f'{run.seconds:3.0f} s'}  python {' '.join(run.command())}")
        return
    failed = execute(everything, jobs, args.launch, gpus)
    for name, claim in claims.items():
        if name in results:
            continue
        bad = [run for run in needed(runs[name]) if run.key in failed]
        results[name] = (None, failed[bad[0].key]) if bad else concluded(claim)
    folder = Path(args.out) / args.scale
    write_file(folder / "runs.jsonl", "".join((run.folder / "done.json").read_text() + "\n" for run in everything if run.done))
    write_report(folder, args, {name: (there[name].__doc__.splitlines()[0], *results[name]) for name in claims})
    if any(findings is None for findings, _ in results.values()):
        sys.exit(1)


def all_runs(nest):
    """The runs in nested lists, tuples and dicts."""
    if isinstance(nest, Run):
        yield nest
    else:
        for part in nest.values() if isinstance(nest, dict) else nest:
            yield from all_runs(part)


def concluded(claim):
    """(findings, picture) of a claim whose runs are done; (None, why) where it fails, which must not cost the other claims."""
    try:
        next(claim)
    except StopIteration as done:
        findings, draw = done.value
        return findings, picture(draw)
    except (InputError, KeyError, ValueError, IndexError, OSError) as error:
        return None, f"{type(error).__name__}: {error}"
    raise AssertionError("a claim yields once")


if __name__ == "__main__":
    run_main(main)
