"""Every claim of the paper is one command: runs the scripts it needs, compares, draws, and reports what came out.

  python lab.py toy                                       all claims on the embedded toy world, on a CPU
  python lab.py toy prompt-helps ranked-beats-imitation   some of them
  python lab.py small --data DIR                          published sets, a 5M-parameter model, hours on a CPU
  python lab.py toy --dry_run                             what would be run

Runs are kept under OUT/runs by their flags, data and code: finished ones are reused, interrupted ones go on. The report is
OUT/SCALE/report.html and report.md; every run's command, seconds and figures stand in runs.jsonl. A verdict is *holds*, *does not hold* or *cannot tell*, from a 95 % interval over test groups
and seeds. Exit code 1 if a claim's runs failed.

Claims:
"""
import argparse
import itertools
import json
import math
import os
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

import trainer
from data import synthetic, toy, toy_sources
from data.errors import InputError, run_main
from data.files import build_once, content_key, write_file
from evals import choices, pm
from report import picture, write_report
from runner import Run, execute, needed


@dataclass
class Finding:
    """One comparison: what, the difference with its 95 % interval, in `unit`, what that says, and what the interval is over."""
    what: str
    effect: float
    low: float
    high: float
    verdict: str
    unit: str = "points"
    over: str = "groups and seeds"


class Lab:
    """The runs of a scale, each declared by the flags it needs and executed later."""

    def __init__(self, args):
        self.folder, self.seeds, self.sizes = Path(args.out).resolve() / "runs", range(args.seeds), args.sizes
        self.size = self.sizes[-1]
        self.toy = toy.toy_folder()

    def run(self, script, *flags, seconds):
        return Run(self.folder, script, *flags, seconds=seconds)

    def file(self, name, records):
        """A data file of the lab's own."""
        path = self.folder.parent / "data" / name
        write_file(path, "".join(json.dumps(r) + "\n" for r in records))
        return path

    def lm(self, size, seed):
        return self.run("train_lm.py", "--size", size, "--seed", seed, "--data", self.toy / "lm.jsonl", seconds=120 if size != "test" else 45)

    def pm(self, init, seed, *flags, data="ranked.jsonl", seconds=20):
        """A preference model or an imitation. All arms of all claims learn at the paper's PMP rate, a tenth of the language model's: at
        a hundredth, its finetuning rate, a few hundred small steps teach nothing."""
        path = data if isinstance(data, (Path, Run)) else self.toy / data
        return self.run("train_pm.py", "--init", init, "--seed", seed, "--data", path, "--lr", self.rate(init), "--held_out", 0.3,
                        "--eval_every", 10**6, *flags, seconds=seconds)

    def rate(self, init):
        """A tenth of the rate of the language model that `init` comes from."""
        while "--size" not in init.flags:
            init = init.flags[init.flags.index("--init") + 1]
        return f"{3e-4 * (128 / trainer.SIZES[init.flags[init.flags.index('--size') + 1]][1]) ** 0.5:.3g}"

    def distilled(self, seed):
        return self.run("distill.py", "--init", self.lm(self.size, seed), "--seed", seed, "--prompt", self.toy / "prompt.txt",
                        "--data", self.toy / "lm.jsonl", "--dialogue", self.toy / "dialogue.jsonl", "--sequences", 4096, seconds=25)

    def finetuned_on(self, name, seed):
        """The language model finetuned on one short text, thirty steps."""
        return self.run("train_lm.py", "--init", self.lm(self.size, seed), "--seed", seed, "--data", self.toy / name, "--ctx", 64, "--batch", 512, "--steps", 30, "--held_out", 0.02,
                        "--lr", self.rate(self.lm(self.size, seed)), "--schedule", "linear", seconds=5)

    def evaluate(self, benchmark, model, *flags, prompted=False, seconds=4):
        return self.run(f"evaluate.py", benchmark, "--model", model, *(("--prompt", self.toy / "prompt.txt") if prompted else ()), *flags, seconds=seconds)

    def hhh(self, model, prompted=False):
        return self.evaluate("hhh", model, "--data", self.toy / "hhh.jsonl", prompted=prompted)

    def accuracy(self, model, data="ranked.jsonl", *flags):
        return self.evaluate("pm", model, "--data", self.toy / data, "--split", "auto", *flags)

    def by_seed(self, make):
        return [make(seed) for seed in self.seeds]


# ---------------------------------------------------------------------------------------------------------------------
# From items to findings


def hits(run, rule, category=None):
    """{item: (1 where the best-scored choice is the right one, group)} of a multiple-choice run."""
    right = lambda item: choices.hit(np.array(item["scores"]), np.array(item[rule]))
    return {item["item"]: (right(item), item["group"]) for item in run.items() if category in (None, item.get("category"))}


def pairs_right(run, key=None):
    """{comparison: (share of its pairs ranked right, group)} of an `evaluate.py pm` run."""
    values = {}
    for item in run.items():
        margin, weight, _ = pm.margins([np.array(item["scores"])], [np.array(item[key or run.figures["score"]])])
        values[item["where"]] = (float((weight * pm.right(margin)).sum()), item["group"])
    return values


def difference(first, second, scale=100.0):
    """(effect, low, high): second minus first, each a list over seeds of {item: (value, group)}. The 95 % interval joins the one over
    test groups (of differences averaged over seeds) with Student's over seeds, as the two are independent."""
    items = sorted(set.intersection(*(set(x) for x in [*first, *second])))
    if not items:
        raise InputError("no item is common to the runs that a claim compares")
    d = scale * np.array([[b[i][0] - a[i][0] for i in items] for a, b in zip(first, second)])
    groups = np.array([str(first[0][i][1]) for i in items])
    effect, error = pm.mean_and_error(d.mean(0), np.ones(len(items)), groups)
    half = math.hypot(0 if math.isnan(error) else 1.96 * error, over_seeds_half(d.mean(1)) if len(d) > 1 else 0.0)
    return effect, effect - half, effect + half


def over_seeds(values, scale=1.0):
    """(mean, low, high) of one number a seed; the 95 % interval is Student's."""
    values = scale * np.array(values, float)
    half = over_seeds_half(values)
    return values.mean(), values.mean() - half, values.mean() + half


def over_seeds_half(values):
    """Half of Student's 95 % interval of the mean of one number a seed; infinite for one seed."""
    t = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78, 6: 2.57, 7: 2.45, 8: 2.36, 9: 2.31, 10: 2.26}.get(len(values), 2.2)
    return t * values.std(ddof=1) / math.sqrt(len(values)) if len(values) > 1 else math.inf


def above(what, effect, low, high, unit="points", over="groups and seeds"):
    """A Finding on the claim that the effect is above 0."""
    return Finding(what, effect, low, high, "holds" if low > 0 else "does not hold" if high < 0 else "cannot tell", unit, over)


def equal(what, effect, low, high, within=3.0):
    """A Finding on the claim that the effect is 0 within some points."""
    outside = low > within or high < -within
    return Finding(what, effect, low, high, "holds" if -within < low and high < within else "does not hold" if outside else "cannot tell")


def mean_of(runs, key):
    """(mean, standard deviation) over seeds of a figure, in %."""
    values = 100 * np.array([run.figures[key] for run in runs])
    return values.mean(), values.std(ddof=1) if len(values) > 1 else 0.0


def bars(named, label):
    """A function that draws named groups of (mean, sd) as bars: {series: {group: (mean, sd)}}."""
    def draw(ax):
        width = 0.8 / len(named)
        for n, (series, values) in enumerate(named.items()):
            x = np.arange(len(values)) + n * width - 0.4 + width / 2
            mean, sd = zip(*values.values())
            ax.bar(x, mean, width * 0.95, yerr=sd, capsize=3, label=series, color=str(0.25 + 0.55 * n / max(1, len(named) - 1)), edgecolor="black",
                   hatch=("", "//", "..", "xx", "\\\\")[n % 5])
        ax.set_xticks(np.arange(len(values)), list(values))
        ax.set_ylabel(label)
        if len(named) > 1:
            ax.legend(frameon=False, loc="lower center", bbox_to_anchor=(0.5, 1), ncols=2)
    return draw


# ---------------------------------------------------------------------------------------------------------------------
# The claims. Each yields the runs it needs and, when they are done, returns (findings, the first being the claim's own; a function
# that draws its figure). The first line of its docstring: the paper's section, and what it says.


def prompt_helps(lab):
    """Section 2.2: a prompt of helpful, honest and harmless conversations improves a language model's choice of answers."""
    plain = {size: lab.by_seed(lambda s: lab.hhh(lab.lm(size, s))) for size in lab.sizes}
    prompted = {size: lab.by_seed(lambda s: lab.hhh(lab.lm(size, s), prompted=True)) for size in lab.sizes}
    yield plain, prompted
    by = lambda size, rule: difference(*([hits(run, rule) for run in runs[size]] for runs in (plain, prompted)))
    findings = [above(f"{size}, by {name}", *by(size, rule)) for size in reversed(lab.sizes) for rule, name in
                (("mean", "mean log-prob"), ("mi", "mutual information"))]
    return findings, bars({name: {size: mean_of(runs[size], "accuracy_mean") for size in lab.sizes} for name, runs in (("plain", plain), ("prompted", prompted))},
                          "HHH accuracy by mean log-prob, %")


def distilled_equals_prompted(lab):
    """Section 2.3: a model distilled from its prompted self does about as well without the prompt; finetuning on the prompt's text does less."""
    arms = {"plain": lab.by_seed(lambda s: lab.hhh(lab.lm(lab.size, s))), "prompted": lab.by_seed(lambda s: lab.hhh(lab.lm(lab.size, s), prompted=True)),
            "distilled": lab.by_seed(lambda s: lab.hhh(lab.distilled(s))), "finetuned on it": lab.by_seed(lambda s: lab.hhh(lab.finetuned_on("prompt.txt", s)))}
    yield arms
    values = {name: [hits(run, "mean") for run in runs] for name, runs in arms.items()}
    findings = [equal("distilled minus prompted", *difference(values["prompted"], values["distilled"])),
                above("distilled minus plain", *difference(values["plain"], values["distilled"])),
                above("distilled minus finetuned on the prompt", *difference(values["finetuned on it"], values["distilled"]))]
    return findings, bars({"HHH": {name: mean_of(runs, "accuracy_mean") for name, runs in arms.items()}}, "HHH accuracy by mean log-prob, %")


def alignment_tax(lab):
    """Section 2.2: behind the prompt small models lose some accuracy at telling a text's last word; large ones do not."""
    make = lambda prompted: {size: lab.by_seed(lambda s: lab.evaluate("lambada", lab.lm(size, s), "--data", lab.toy / "lambada.jsonl", prompted=prompted)) for size in lab.sizes}
    plain, prompted = make(False), make(True)
    yield plain, prompted
    values = lambda runs: [{item["item"]: (item["right"], item["group"]) for item in run.items()} for run in runs]
    findings = [above(f"{size}: accuracy lost behind the prompt", *difference(values(prompted[size]), values(plain[size]))) for size in lab.sizes]
    return findings, bars({name: {size: mean_of(runs[size], "accuracy") for size in lab.sizes} for name, runs in (("plain", plain), ("prompted", prompted))},
                          "last words told right, %")


def prior_not_finetuning(lab):
    """Section 2.3: having read 1 … 63 a model goes on with 64; finetuned on 1 … 63 it expects them again, from 1."""
    question = lambda name, context, ways: lab.file(f"count-{name}.jsonl", [{"context": context, "completions": ways, "scores": [1, 0], "group": "count"}])
    after, alone = question("after", toy.count_from(1, 63) + ",", [" 64, 65, 66, 67", " 1, 2, 3, 4"]), question("alone", "", ["64, 65, 66, 67", "1, 2, 3, 4"])
    arms = {"untouched": lab.by_seed(lambda s: lab.evaluate("choice", lab.lm(lab.size, s), "--data", alone)),
            "prompted with 1 … 63": lab.by_seed(lambda s: lab.evaluate("choice", lab.lm(lab.size, s), "--data", after, "--ctx", 400)),
            "finetuned on 1 … 63": lab.by_seed(lambda s: lab.evaluate("choice", lab.finetuned_on("count.txt", s), "--data", alone))}
    yield arms
    untouched, prompted, tuned = margins = [[np.subtract(*run.items()[0]["mean"]) for run in runs] for runs in arms.values()]
    nats = {"unit": "nats a token", "over": "seeds"}
    findings = [above("expecting 64, 65 … rather than 1, 2 …: prompted minus finetuned", *over_seeds(np.subtract(prompted, tuned)), **nats),
                above("prompted minus untouched", *over_seeds(np.subtract(prompted, untouched)), **nats),
                above("untouched minus finetuned", *over_seeds(np.subtract(untouched, tuned)), **nats)]
    spread = lambda values: (np.mean(values), np.std(values, ddof=1) if len(values) > 1 else 0)
    return findings, bars({"": {name: spread(values) for name, values in zip(arms, margins)}}, "log P(64, 65, …) - log P(1, 2, …), nats a token")


def against_imitation(lab, data, sizes):
    """Runs of ranked preference models and of imitation on a toy file, by size: (ranked, imitation)."""
    make = lambda *flags: {size: lab.by_seed(lambda s: lab.accuracy(lab.pm(lab.lm(size, s), s, *flags, data=data), data)) for size in sizes}
    return make(), make("--objective", "imitation")


def imitation_findings(make_finding, ranked, imitation, label):
    values = lambda runs: [pairs_right(run) for run in runs]
    findings = [make_finding(f"{size}: preference model minus imitation", *difference(values(imitation[size]), values(ranked[size]))) for size in reversed(list(ranked))]
    figure = {name: {size: mean_of(runs[size], "accuracy") for size in runs} for name, runs in (("imitation", imitation), ("preference model", ranked))}
    rulers = {name: {size: mean_of(ranked[size], name) for size in ranked} for name in ("no_context", "longer_wins")}
    return findings, bars(figure | {name.replace("_", " "): values for name, values in rulers.items()}, label)


def ranked_beats_imitation(lab):
    """Section 3.2: on ranked data a preference model beats imitation by far, and scales better."""
    runs = against_imitation(lab, "ranked.jsonl", lab.sizes)
    yield runs
    return imitation_findings(above, *runs, "accuracy on held-out ranked comparisons, %")


def binary_equals_imitation(lab):
    """Section 3.3: on binary data a preference model does about as well as imitation."""
    runs = against_imitation(lab, "binary.jsonl", [lab.size])
    yield runs
    return imitation_findings(equal, *runs, "accuracy on held-out binary comparisons, %")


SOURCES = ("stackexchange", "reddit", "wikipedia")


def pre_trained(lab, seed, *flags, sources=SOURCES):
    """A preference model pre-trained on public-like data, one epoch (Section 4)."""
    files = [toy_sources.prepared(name) for name in sources]
    init = lab.lm(lab.size, seed)
    lm_weight = () if "--lm_weight" in flags else ("--lm_weight", 1)
    return lab.run("train_pm.py", "--init", init, "--seed", seed, "--data", *files, "--lr", lab.rate(init), "--batch", 32, "--held_out", 0.05,
                   "--eval_every", 10**6, *(() if "--pairs" in flags else ("--sizes", *(2500 for _ in files))), *lm_weight, *flags, seconds=16 * len(sources))


def finetuned(lab, init, seed, n, *flags):
    """Held-out accuracy after finetuning on n comparisons, 8 a step: with the paper's 32 the 16 steps that 500 come to teach nothing."""
    return lab.accuracy(lab.pm(init, seed, "--pairs", n, "--batch", 8, *flags, seconds=5 + n / 120))


def transfer(lab, first, second, n=500, flags=((), ())):
    """Runs finetuned on n comparisons from two kinds of pre-trained model, functions of the seed, and then (findings' values, figure)."""
    return [lab.by_seed(lambda s: finetuned(lab, make(s), s, n, *own)) for make, own in zip((first, second), flags)]


def transfer_findings(what, arms, n=500):
    first, second = ([pairs_right(run) for run in runs] for runs in arms.values())
    figure = bars({"": {name: mean_of(runs, "accuracy") for name, runs in arms.items()}}, f"held-out accuracy after {n} comparisons, %")
    return [above(what, *difference(first, second))], figure


def pmp_sample_efficiency(lab):
    """Section 4.2: preference-model pre-training raises accuracy at 500 comparisons."""
    return (yield from efficiency(lab, (500,)))


def pmp_curve(lab):
    """Section 4.2: pre-training is worth many comparisons where there are few, less where there are 5,000."""
    return (yield from efficiency(lab, (100, 500, 1500, 5000)))


def efficiency(lab, amounts):
    arms = {"none": {n: lab.by_seed(lambda s: finetuned(lab, lab.lm(lab.size, s), s, n)) for n in amounts},
            "Mix": {n: lab.by_seed(lambda s: finetuned(lab, pre_trained(lab, s, "--binarise"), s, n)) for n in amounts}}
    yield arms
    values = {name: {n: [pairs_right(run) for run in arm[n]] for n in amounts} for name, arm in arms.items()}
    findings = [above(f"at {n:,} comparisons: with minus without", *difference(values["none"][n], values["Mix"][n])) for n in amounts]
    return findings, bars({f"pre-training: {name}": {f"{n:,}": mean_of(arm[n], "accuracy") for n in amounts} for name, arm in arms.items()},
                          "held-out accuracy after so many comparisons, %")


def pmp_by_source(lab):
    """Section 4.2: each source helps at 500 comparisons, and their Mix is about as good as any."""
    arms = {"none": lab.by_seed(lambda s: finetuned(lab, lab.lm(lab.size, s), s, 500))}
    arms |= {name: lab.by_seed(lambda s: finetuned(lab, pre_trained(lab, s, "--binarise", sources=(name,)), s, 500)) for name in SOURCES}
    arms["Mix"] = lab.by_seed(lambda s: finetuned(lab, pre_trained(lab, s, "--binarise"), s, 500))
    yield arms
    values = {name: [pairs_right(run) for run in runs] for name, runs in arms.items()}
    return ([above(f"{name} minus none", *difference(values["none"], values[name])) for name in ("Mix", *SOURCES)],
            bars({"": {name: mean_of(runs, "accuracy") for name, runs in arms.items()}}, "held-out accuracy after 500 comparisons, %"))


def binary_pmp_transfers_better(lab):
    """Section 4.3: binarised pre-training transfers better than ranked."""
    arms = dict(zip(("ranked", "binarised"), transfer(lab, lambda s: pre_trained(lab, s), lambda s: pre_trained(lab, s, "--binarise"))))
    yield arms
    return transfer_findings("binarised minus ranked pre-training, at 500 comparisons", arms)


def lm_loss_helps_pmp(lab):
    """Appendix: the language-model loss on the good side in pre-training improves transfer."""
    arms = dict(zip(("without", "with LM loss"), transfer(lab, lambda s: pre_trained(lab, s, "--binarise", "--lm_weight", 0), lambda s: pre_trained(lab, s, "--binarise"))))
    yield arms
    return transfer_findings("with minus without LM loss in pre-training, at 500 comparisons", arms)


def end_of_context_helps(lab):
    """Section 4.1: an end-of-context token, where the reward is read, improves preference models."""
    arms = dict(zip(("last token", "<eoc>"), transfer(lab, lambda s: pre_trained(lab, s, "--binarise", "--no_eoc"), lambda s: pre_trained(lab, s, "--binarise"),
                                                      flags=(("--no_eoc",), ()))))
    yield arms
    return transfer_findings("read at <eoc> minus read at the last token, at 500 comparisons", arms)


def human_vs_model_pairs(lab):
    """Section 4.4: pre-training on human against model-written text transfers better than human against human."""
    source, same = toy_sources.prepared("stackexchange"), ("--pairs", 2000, "--pairs_per_group", 1)

    def model_written(seed):
        imitation = lab.pm(lab.lm(lab.size, seed), seed, "--objective", "imitation", data=source)
        return lab.run("-m data.prepare human-vs-model", "--raw", source, "--model", imitation, "--contexts", 3000, "--max_new", 40, "--seed", seed, seconds=90)

    def on_model_written(seed):
        init = lab.lm(lab.size, seed)
        return lab.run("train_pm.py", "--init", init, "--seed", seed, "--data", model_written(seed), "--lr", lab.rate(init), "--batch", 32, "--held_out", 0.05,
                       "--eval_every", 10**6, "--lm_weight", 1, "--binarise", *same, seconds=30)
    arms = dict(zip(("human-human", "human-model"), transfer(lab, lambda s: pre_trained(lab, s, "--binarise", *same, sources=SOURCES[:1]), on_model_written)))
    yield arms
    return transfer_findings("human against model minus human against human, 2,000 pairs each, at 500 comparisons", arms)


def accuracy_at_k(lab):
    """Section 3.3: the best of k samples by a preference model's score is right more often, with k, than by imitation's log-prob."""
    make = lambda *flags: lab.by_seed(lambda s: lab.evaluate("rerank", lab.pm(lab.lm(lab.size, s), s, *flags, data="binary.jsonl"), "--data", lab.toy / "samples.jsonl"))
    ranked, imitation = make(), make("--objective", "imitation")
    yield ranked, imitation
    ks = (1, 2, 4, 8, 16)
    at = lambda runs, k, name: [run.figures[f"accuracy@{k}_{name}"] for run in runs]
    best = lambda runs, name: [{item["where"]: (choices.hit(np.array(item["right"]), np.array(item[name])) if name else np.mean(item["right"]), item["group"])
                                for item in run.items()} for run in runs]
    effect, gain = difference(best(imitation, "mean"), best(ranked, "reward")), difference(best(ranked, None), best(ranked, "reward"))

    def draw(ax):
        for runs, name, style in ((ranked, "reward", "o-"), (imitation, "mean_log-prob", "s--"), (ranked, "chance", "k:"), (ranked, "best_possible", "k-.")):
            mean = [100 * np.mean(at(runs, k, name)) for k in ks]
            ax.errorbar(ks, mean, [100 * np.std(at(runs, k, name)) for k in ks], fmt=style, color="black", capsize=3,
                        label={"reward": "preference model", "mean_log-prob": "imitation"}.get(name, name.replace("_", " ")))
        ax.set(xscale="log", xlabel="k, samples to choose from", ylabel="accuracy@k, %")
        ax.set_xticks(ks, ks)
        ax.legend(frameon=False)
    return [above("accuracy@16: preference model minus imitation", *effect), above("preference model: accuracy@16 minus accuracy@1", *gain)], draw


def ensembles(lab):
    """Appendix: ensembles of preference models give small gains."""
    members = lab.by_seed(lambda s: lab.pm(lab.lm(lab.size, s), s))
    if len(members) < 2:
        raise InputError("ensembles needs at least two --seeds")
    runs = [lab.accuracy(members[s], "ranked.jsonl", "--ensemble", *(m for m in members if m is not members[s])) for s in lab.seeds]
    yield runs
    names = (f"mean_of_{len(members)}", f"least_of_{len(members)}")
    findings = [above(f"{name.replace('_', ' ')} minus one of them", *difference([pairs_right(run) for run in runs], [pairs_right(runs[0], name)] * len(runs)))
                for name in names]
    return findings, bars({"": {"one": mean_of(runs, "accuracy"), **{name.replace("_", " "): (100 * runs[0].figures[name], 0) for name in names}}}, "held-out accuracy, %")


def toxicity_falls(lab):
    """Section 2.2: the prompt, and distilling it, lower the toxicity of what the model writes."""
    def toxic(model, seed, prompted=False):
        scorer = lab.pm(lab.lm(lab.size, seed), seed, "--objective", "binary", data="manners.jsonl", seconds=20)
        return lab.evaluate("toxicity", model, "--data", lab.toy / "hhh.jsonl", "--prompts", 150, "--n", 4, "--max_new", 40, "--scorer", scorer, "--seed", seed,
                            prompted=prompted, seconds=40)
    arms = {"plain": lab.by_seed(lambda s: toxic(lab.lm(lab.size, s), s)), "prompted": lab.by_seed(lambda s: toxic(lab.lm(lab.size, s), s, True)),
            "distilled": lab.by_seed(lambda s: toxic(lab.distilled(s), s))}
    yield arms
    values = {name: [{item["prompt"]: (np.mean(item["toxicity"]), item["prompt"]) for item in run.items()} for run in runs] for name, runs in arms.items()}
    return ([above(f"plain minus {name}", *difference(values[name], values["plain"])) for name in ("prompted", "distilled")],
            bars({"": {name: mean_of(runs, "mean") for name, runs in arms.items()}}, "mean toxicity (probability of rudeness), %"))


def elo_ranks(lab):
    """Section 2.2: judged in games, prompted and distilled models are rated above the plain one."""
    def games(seed):
        judge = lab.pm(lab.lm(lab.size, seed), seed)
        draw = lambda model, prompted=False: lab.evaluate("sample", model, "--data", lab.toy / "hhh.jsonl", "--contexts", 300, "--max_new", 40, "--temperature", 1, "--seed", seed,
                                                          prompted=prompted, seconds=40)
        players = {"plain": draw(lab.lm(lab.size, seed)), "prompted": draw(lab.lm(lab.size, seed), True), "distilled": draw(lab.distilled(seed))}
        return players, lab.run("evaluate.py", "elo", "--judge", judge, "--names", *players, "--samples", *players.values(), seconds=10)
    runs = [run for _, run in lab.by_seed(games)]
    yield runs
    elo = {name: [run.figures["players"][name]["elo"] for run in runs] for name in ("plain", "prompted", "distilled")}
    spread = lambda values: (np.mean(values), np.std(values, ddof=1) if len(values) > 1 else 0)
    return ([above(f"{name} minus plain", *over_seeds(np.subtract(elo[name], elo["plain"])), unit="Elo", over="seeds") for name in ("prompted", "distilled")],
            bars({"": {name: spread(values) for name, values in elo.items()}}, "Elo, judged by a preference model"))


def truthfulqa_needs_mutual_information(lab):
    """Section 2.2: on questions with popular falsehoods mutual information is a better score than the raw log-prob."""
    runs = {size: lab.by_seed(lambda s: lab.hhh(lab.lm(size, s))) for size in lab.sizes}
    yield runs
    rules = {"sum": "sum log-prob", "mean": "mean log-prob", "mi": "mutual information"}
    values = {(size, rule): [hits(run, rule, "honest") for run in runs[size]] for size in lab.sizes for rule in rules}
    findings = [above(f"{size}, honest items: mutual information minus sum", *difference(values[size, "sum"], values[size, "mi"])) for size in reversed(lab.sizes)]
    return findings, bars({name: {size: mean_of(runs[size], f"accuracy_{rule}_honest") for size in lab.sizes} for rule, name in rules.items()}, "honest items, accuracy, %")


def scaling(lab):
    """Sections 2 to 4: larger models are better language models and better preference models."""
    models = {size: lab.by_seed(lambda s: lab.lm(size, s)) for size in lab.sizes}
    ranked, _ = against_imitation(lab, "ranked.jsonl", lab.sizes)
    yield models, ranked
    small, large = lab.sizes[0], lab.sizes[-1]
    findings = [above(f"preference model: {large} minus {small}", *difference(*([pairs_right(run) for run in ranked[size]] for size in (small, large)))),
                above(f"language model's loss: {small} minus {large}", *over_seeds([a.figures["loss"] - b.figures["loss"] for a, b in zip(models[small], models[large])]),
                      unit="nats a token", over="seeds")]

    def draw(ax):
        n = [12 * trainer.SIZES[size][0] * trainer.SIZES[size][1] ** 2 for size in lab.sizes]
        mean, sd = zip(*(mean_of(ranked[size], "accuracy") for size in lab.sizes))
        ax.errorbar(n, mean, sd, fmt="o-", color="black", capsize=3, label="preference model, accuracy")
        ax.set(xscale="log", xlabel="12 n_layer d_model², parameters", ylabel="held-out accuracy, %")
        other = ax.twinx()
        other.errorbar(n, [np.mean([run.figures["loss"] for run in models[size]]) for size in lab.sizes], fmt="s--", color="0.5", label="language model, loss")
        other.set_ylabel("held-out loss, nats a token")
        ax.legend(handles=[*ax.get_legend_handles_labels()[0], *other.get_legend_handles_labels()[0]], frameon=False, loc="center right")
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
        return lab.evaluate("pm", model, "--data", folder / f"test-{order}.jsonl", "--dtype", "fp32", seconds=3)
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
    alignment_tax, prior_not_finetuning, pmp_curve, pmp_by_source, binary_pmp_transfers_better, lm_loss_helps_pmp, end_of_context_helps, human_vs_model_pairs,
    accuracy_at_k, ensembles, toxicity_falls, elo_ranks, truthfulqa_needs_mutual_information, scaling, synthetic_transfer)}
CORE = list(CLAIMS)[:5]


# ---------------------------------------------------------------------------------------------------------------------
# The small scale: published sets, a language model of 5m parameters

SETS = {  # name: (how to prepare it, file under --data)
    "hellaswag": ("hellaswag", "hellaswag/hellaswag_val.jsonl.xz"), "utilitarianism": ("utilitarianism", "ethics/utilitarianism/util_train.csv"),
    "deontology": ("ethics --set deontology", "ethics/deontology/deontology_train.csv"), "justice": ("ethics --set justice", "ethics/justice/justice_train.csv"),
    "virtue": ("ethics --set virtue", "ethics/virtue/virtue_train.csv"), "commonsense": ("ethics --set commonsense", "ethics/commonsense/cm_test.csv"),
    "summaries": ("summarize", "summarize-from-feedback/newsroom_comparisons.jsonl.xz"), "hh": ("hh", "hh-rlhf/harmless-base/test.jsonl.gz")}
PUBLIC = (("pairs", "alpaca-eval/pairs.jsonl.xz", 1000), ("pairs", "ukp-convarg/pairs.jsonl.xz", 1500))  # and all of Stack Exchange there is, at most 1,000


class Small(Lab):
    def __init__(self, args):
        super().__init__(args)
        self.data, self.sets, self.given = Path(args.data).resolve(), args.sets, args.lm and Path(args.lm).resolve()
        self.size, args.sizes = "5m", ["5m"]

    def prepared(self, how, *paths):
        name, *flags = how.split()
        return self.run(f"-m data.prepare {name}", *flags, "--raw", *paths, seconds=10)

    def lm(self, size, seed):
        """One language model for all seeds: it alone takes most of an hour."""
        return self.given or self.run("train_lm.py", "--data", self.data / "text", "--tokenizer", "bpe:8192", "--size", "5m", "--ctx", 512, "--steps", 1500,
                                                            seconds=2800)

    def rate(self, init):
        return f"{3e-4 * 0.5 ** 0.5:.3g}"

    def tuned(self, init, seed, name, *flags):
        """Held-out accuracy on a set after finetuning on 500 comparisons of it."""
        how, path = SETS[name]
        data = self.prepared(how, self.data / path)
        model = self.pm(init, seed, "--ctx", 512, "--pairs", 500, *flags, data=data, seconds=40)
        return self.evaluate("pm", model, "--data", data, seconds=20)


def small_ranked_beats_imitation(lab):
    """Section 3.2: on ranked data a preference model beats imitation, here at 500 comparisons."""
    init = lab.lm("5m", 0)
    arms = {objective: {name: lab.by_seed(lambda s: lab.tuned(init, s, name, "--objective", objective)) for name in lab.sets} for objective in ("imitation", "ranked")}
    yield arms
    return small_findings(arms, "ranked minus imitation")


def small_pmp_sample_efficiency(lab):
    """Section 4.2: preference-model pre-training on public data raises accuracy at 500 comparisons."""
    init, sites = lab.lm("5m", 0), sorted((lab.data / "stackexchange").glob("*/Posts.xml*"))
    files = [lab.prepared("stackexchange", *sites), *(lab.prepared(how, lab.data / path) for how, path, _ in PUBLIC)]

    def pre_trained(seed):
        return lab.run("train_pm.py", "--init", init, "--seed", seed, "--data", *files, "--sizes", 1000, *(n for *_, n in PUBLIC), "--stage", "pmp", "--binarise", "--batch", 64,
                       "--lr", lab.rate(init), "--ctx", 512, "--pairs_per_group", 1, "--held_out", 0.05, "--eval_every", 10**6, seconds=500)
    arms = {"none": {name: lab.by_seed(lambda s: lab.tuned(init, s, name)) for name in lab.sets},
            "pre-trained": {name: lab.by_seed(lambda s: lab.tuned(pre_trained(s), s, name)) for name in lab.sets}}
    yield arms
    return small_findings(arms, "with minus without pre-training")


def small_findings(arms, what):
    """Findings on the mean over the sets, then on each set."""
    (_, first), (_, second) = arms.items()
    values = {name: [[pairs_right(run) for run in runs[name]] for runs in (first, second)] for name in first}
    gains = [np.mean([b.figures["accuracy"] - a.figures["accuracy"] for a, b in zip(first_runs, second_runs)]) for first_runs, second_runs in
             zip(zip(*first.values()), zip(*second.values()))]
    findings = [above(f"{what}, mean of {len(first)} sets", *over_seeds(gains, 100), over="seeds")] + [above(f"{what}, {name}", *difference(*values[name])) for name in first]
    rulers = {"longer wins": {name: mean_of(runs, "longer_wins") for name, runs in first.items()}}
    return findings, bars({arm: {name: mean_of(runs, "accuracy") for name, runs in sets.items()} for arm, sets in arms.items()} | rulers,
                          "held-out accuracy after 500 comparisons, %")


def small_code_tax(lab):
    """Section 2.2: behind a prompt of dialogues small models write fewer programs that pass their tests (MBPP, pass@1); large ones do not."""
    def passing(seed, *flags):
        return lab.evaluate("mbpp", lab.lm("5m", 0), "--data", lab.data / "mbpp" / "mbpp.jsonl", "--problems", 30, "--n", 4, "--k", 1, "--max_new", 120, "--seed", seed,
                            *flags, seconds=60)
    plain, prompted = lab.by_seed(passing), lab.by_seed(lambda s: passing(s, "--prompt", "code", "--prompt_tokens", 250))
    yield plain, prompted
    values = lambda runs: [{item["id"]: (item["passed"] / item["n"], item["id"]) for item in run.items()} for run in runs]
    return ([above("pass@1 lost behind the prompt", *difference(values(prompted), values(plain)))],
            bars({"": {"plain": mean_of(plain, "pass@1"), "prompted": mean_of(prompted, "pass@1")}}, "MBPP, pass@1, %"))


SMALL_CLAIMS = {"ranked-beats-imitation": small_ranked_beats_imitation, "pmp-sample-efficiency": small_pmp_sample_efficiency, "code-tax": small_code_tax}


# ---------------------------------------------------------------------------------------------------------------------
# The paper's own scale: commands and what they would take


GPU_BYTES, GPU_FLOPS, UTILISATION = 80e9, 989e12, 0.4  # an H100's memory and bf16 peak; the part of it that training is assumed to reach
STAGES = (  # name, tokens, command; tokens: 400B for the LM; pairs of 500 tokens for PMP, of 300 for finetuning; 350M for distillation
    ("language model", 400e9, "train_lm.py --data texts/ --tokenizer bpe:65536 --size {size} --ctx 8192 --batch 1048576 --out out/{size}/lm"),
    ("distillation", 350e6, "distill.py --init out/{size}/lm --prompt hhh --data texts/ --dialogue stackexchange.jsonl --sequences 170000 --out out/{size}/distilled"),
    ("PMP on the Mix", 8.3e6 * 500, "train_pm.py --init out/{size}/lm --stage pmp --binarise --data stackexchange.jsonl reddit.jsonl wikipedia.jsonl --out out/{size}/pmp"),
    ("finetuning", 4e4 * 300, "train_pm.py --init out/{size}/pmp --stage finetune --data hh/ --out out/{size}/pm"))


def paper_plan():
    """Print what each stage of the paper would take at its seven sizes; run nothing."""
    print(f"Assumed: GPUs of {GPU_BYTES / 1e9:.0f} GB and {GPU_FLOPS / 1e12:.0f} TFLOP/s in bf16, {UTILISATION:.0%} of that reached; 6 FLOPs a parameter and token; 16 bytes a "
          "parameter\nfor weights, gradients and optimizer, and half a GPU for activations. This project is data parallel: each GPU holds the whole model. Where that\n"
          "does not fit, the number of GPUs is what sharding the state, which is not here, would need at least.\n")
    for size in ("13m", "42m", "197m", "810m", "2.7b", "13b", "52b"):
        n_layer, d_model, _ = trainer.SIZES[size]
        n = 12 * n_layer * d_model**2 + 65536 * d_model
        least = math.ceil(16 * n / (GPU_BYTES / 2))
        gpus = max(8, 8 * math.ceil(least / 8))
        print(f"{size}: {n / 1e9:.3f}B parameters with embeddings, {16 * n / 1e9:,.1f} GB of state" + ("" if least == 1 else f"; does not fit one GPU: needs sharding over {least} or more"))
        for name, tokens, command in STAGES:
            hours = 6 * n * tokens / (gpus * GPU_FLOPS * UTILISATION) / 3600
            print(f"  {name:<16}{tokens / 1e6:>10,.0f}M tokens {hours:>12,.1f} h on {gpus} GPUs   torchrun --nproc_per_node 8 {command.format(size=size)}")


def parse_args():
    shown = __doc__ + "\n".join(f"  {name:<38}{f.__doc__.splitlines()[0]}" for name, f in CLAIMS.items())
    parser = argparse.ArgumentParser(description=shown, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scale", choices=("toy", "small", "paper"), help="toy: the embedded world, 0.1M and 0.8M parameters; small: published sets and "
                        "5M parameters, hours on two cores, for ranked-beats-imitation, pmp-sample-efficiency and code-tax; paper: print the commands for 13m to 52b with GPUs, "
                        "memory and hours, and run nothing")
    parser.add_argument("claims", nargs="*", metavar="CLAIM", help="claims to test, or core for the first five (default: all)")
    parser.add_argument("--out", default="out/lab", help="folder of runs and reports (default: %(default)s)")
    parser.add_argument("--seeds", type=trainer.positive(int), default=3, help="seeds, 0 and up, of every run (default: %(default)s)")
    parser.add_argument("--sizes", nargs="+", choices=trainer.SIZES, default=["test", "0.8m"], help="model sizes, the main one last (default: test 0.8m)")
    parser.add_argument("--data", metavar="DIR", help="for small: folder of the published files")
    parser.add_argument("--lm", metavar="DIR", help="for small: a language model to start from, instead of training one on DIR/text for most of an hour")
    parser.add_argument("--sets", nargs="+", choices=SETS, default=list(SETS), help="for small: the sets to finetune on (default: all)")
    parser.add_argument("--jobs", type=trainer.positive(int), help="runs at a time (default: one for each GPU or core)")
    parser.add_argument("--launch", default="", metavar="COMMAND", help='how to start a script, such as "torchrun --nproc_per_node 8", or a template such as "srun --gpus 1 {command}"')
    parser.add_argument("--dry_run", action="store_true", help="list the runs with their estimated time, and run nothing")
    args = parser.parse_args()
    args.given = sys.argv[next((i for i, word in enumerate(sys.argv) if word.startswith("--")), len(sys.argv)):]
    there = SMALL_CLAIMS if args.scale == "small" else CLAIMS
    args.claims = [name for claim in args.claims or there for name in (CORE if claim == "core" else [claim])]
    unknown = [name for name in args.claims if name not in there]
    if unknown:
        raise InputError(f"no claim {unknown[0]!r} at this scale; there are {', '.join(there)}{', and core for the first five' if there is CLAIMS else ''}")
    if args.scale == "small" and not (args.data and Path(args.data).is_dir()):
        raise InputError("small needs --data DIR, the folder of the published files")
    return args, there


def main():
    args, there = parse_args()
    if args.scale == "paper":
        return paper_plan()
    lab, gpus = (Small if args.scale == "small" else Lab)(args), torch.cuda.device_count()
    claims, runs, results = {name: there[name](lab) for name in args.claims}, {}, {}
    for name, claim in claims.items():
        try:
            runs[name] = list(all_runs(next(claim)))
        except InputError as error:  # what it needs is not there; the others can go on
            runs[name], results[name] = [], (None, str(error))
    todo = [run for run in needed(itertools.chain(*runs.values())) if not run.done]
    jobs = args.jobs or (1 if args.launch else gpus or os.cpu_count())
    print(f"{len(needed(itertools.chain(*runs.values())))} runs, {len(todo)} of them still to do, {jobs} at a time: "
          f"about {sum(run.seconds for run in todo) / jobs / 60:.0f} minutes on two cores", flush=True)
    if args.dry_run:
        for run in needed(itertools.chain(*runs.values())):
            print(f"  {'done' if run.done else f'{run.seconds:3.0f} s'}  python {' '.join(run.command())}")
        return
    failed = execute(itertools.chain(*runs.values()), jobs, args.launch, gpus)
    for name, claim in claims.items():
        if name in results:
            continue
        bad = [run for run in needed(runs[name]) if run.key in failed]
        results[name] = (None, failed[bad[0].key]) if bad else concluded(claim)
    folder = Path(args.out) / args.scale
    write_file(folder / "runs.jsonl", "".join((run.folder / "done.json").read_text() + "\n" for run in needed(itertools.chain(*runs.values())) if run.done))
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
