"""Claims of the paper's Section 2: prompts, context distillation, and what they cost.

A claim is a function of a scale (scales.py). It yields the runs that it needs, and when these are done it
returns an Outcome. The first paragraph of its docstring names the paper's section and says what the paper
found.
"""
import numpy as np

from claims.findings import (
    Panel, at_size, beyond_rulers, choice_right, compared, curves, elo_difference, finding, growing, outcome,
    sizes_figure, values)
from claims.scales import size_label
from data import toy
from evals import choices

HHH = "HHH answers right, %"


def prompt_helps(lab):
    """Section 2: a prompt of helpful, honest and harmless conversations improves a language model's choice
    of answers, and the more so the larger the model."""
    arms = {"plain": lab.by_size(lambda one: one.hhh(one.lm())),
            "prompted": lab.by_size(lambda one: one.hhh(one.lm(), prompted=True))}
    yield arms
    items = arms["plain"][lab.size][""][0].items()
    categories = sorted({item["category"] for item in items if item.get("category")})
    by_category = {name: values(arms, choice_right("mean", name)) for name in (None, *categories)}
    panels = {name or "all": sizes_figure(right, HHH)[""] for name, right in by_category.items()}
    result = growing(by_category.pop(None), panels, "prompted > plain", ["prompted > chance"])
    for name, right in (by_category | {"by mutual information": values(arms, choice_right("mi"))}).items():
        result.beside += compared("prompted > plain", at_size(right, lab.size),
                                  prefix=f"{size_label(lab.size)}, {name}: ")
    return result


def distilled_equals_prompted(lab):
    """Section 2: a model distilled from its prompted self does about as well without the prompt;
    finetuning on the prompt's text does less."""
    arms = {"plain": lab.arm(lambda one: one.hhh(one.lm())),
            "prompted": lab.arm(lambda one: one.hhh(one.lm(), prompted=True)),
            "distilled": lab.arm(lambda one: one.hhh(one.distilled())),
            "finetuned on it": lab.arm(
                lambda one: one.hhh(one.finetuned_on(one.prompt_text()), "--ctx", one.ctx))}
    yield arms
    return outcome(values(arms, choice_right("mean")), HHH,
                   ["distilled = prompted", "distilled > finetuned on it"],
                   premises=["prompted > plain"], beside=["distilled > plain"])


def toxicity_falls(lab):
    """Section 2: the prompt, and distilling it, lower the toxicity of what the model writes."""
    def toxicity(one, model, prompted=False):
        return one.sampled("toxicity", model, 150, "--data", one.data(one.contexts), "--prompts", 150,
                           *one.toxicity_scorer(), n=4, prompted=prompted)
    arms = {"plain": lab.arm(lambda one: toxicity(one, one.lm())),
            "prompted": lab.arm(lambda one: toxicity(one, one.lm(), prompted=True)),
            "distilled": lab.arm(lambda one: toxicity(one, one.distilled()))}
    yield arms

    def by_prompt(run):
        return {item["prompt"]: (np.mean(item["toxicity"]), item["prompt"]) for item in run.items()}
    return outcome(values(arms, by_prompt), "mean toxicity, %", ["plain > prompted", "plain > distilled"],
                   chance=None)


def elo_ranks(lab):
    """Section 2: judged in games, prompted and distilled models are rated above the plain one."""
    def draw(one, model, prompted=False):
        return one.sampled("sample", model, 300, "--data", one.data(one.contexts), "--contexts", 300,
                           "--temperature", 1, prompted=prompted)

    def play(one):
        players = {"plain": draw(one, one.lm()), "prompted": draw(one, one.lm(), prompted=True),
                   "distilled": draw(one, one.distilled())}
        return one.run("evaluate.py", "elo", "--judge", one.pm(one.judged), "--names", *players,
                       "--samples", *players.values(), seconds=max(10, one.seconds(600 * one.tokens, 2)))
    games = lab.arm(play)[""]
    judges = lab.arm(lambda one: one.accuracy(one.pm(one.judged), one.judged, no_context=True))[""]
    yield games, judges
    better, players = ("prompted", "distilled"), [run.figures["players"] for run in games]
    elo = {name: [seed[name]["elo"] - seed["plain"]["elo"] for seed in players] for name in better}
    return outcome(
        {}, {"": Panel({"": elo}, "Elo above plain", chance=0, lines=False)},
        [finding(f"{name} minus plain", ">", elo_difference(games, name, "plain"), "Elo") for name in better],
        premises=[finding("the judge minus the better of the length rulers", ">", beyond_rulers(judges))])


def truthfulqa_needs_mutual_information(lab):
    """Section 2: on questions with popular falsehoods mutual information is a better score than the raw
    log-prob, by which larger models are right less often; by mutual information they are right more often."""
    runs = lab.by_size(lambda one: one.evaluate("truthfulqa", one.lm(), "--data", one.data("truthfulqa")))
    yield runs
    rules = {"sum log-prob": "sum", "mean log-prob": "mean", "mutual information": "mi", "longest": "longest"}
    right = {name: values(runs, choice_right(rule, hit=choices.first_choice)) for name, rule in rules.items()}
    chance = runs[lab.size][""][0].figures["chance"]["MC1"]
    result = outcome(at_size(right, lab.size), sizes_figure(right, "TruthfulQA, MC1, %", 100 * chance),
                     ["mutual information > sum log-prob"],
                     premises=["mutual information > chance", "mutual information > longest"],
                     chance=chance, prefix=f"{size_label(lab.size)}: ")
    if len(lab.sizes) == 1:
        result.untested = "what becomes of both with size, as there is one size"
        return result
    small, large = size_label(lab.sizes[0]), size_label(lab.size)
    for rule, first, second in (("sum log-prob", small, large), ("mutual information", large, small)):
        by_size = {small: right[rule][lab.sizes[0]], large: right[rule][lab.size]}
        result.parts += compared(f"{first} > {second}", by_size, prefix=f"{rule}: ")
    return result


def prior_not_finetuning(lab):
    """Section 2: having read 1 … 63 a model goes on with 64; finetuned on 1 … 63 it expects them again,
    from 1."""
    def question(name, context, completions):
        record = {"context": context, "completions": completions, "scores": [1, 0], "group": "count"}
        return "--data", lab.file(f"count-{name}.jsonl", [record])
    count = toy.count_from(1, 63)
    after = question("after", count + ",", [" 64, 65, 66, 67", " 1, 2, 3, 4"])
    alone = question("alone", "", ["64, 65, 66, 67", "1, 2, 3, 4"])
    arms = {"untouched": lab.arm(lambda one: one.evaluate("choice", one.lm(), *alone)),
            "prompted": lab.arm(lambda one: one.evaluate("choice", one.lm(), *after, "--ctx", 400)),
            "finetuned": lab.arm(lambda one: one.evaluate("choice", one.finetuned_on(count), *alone))}
    yield arms

    def margin(run):
        return {"": (np.subtract(*run.items()[0]["mean"]), "")}
    return outcome(values(arms, margin), "log P(64, …) - log P(1, …)",
                   ["prompted > 0", "untouched > finetuned", "prompted > finetuned"],
                   premises=["prompted > untouched"], chance=0, unit="nats a token")


def tax(arms, figure, learned, unit="points", within=3.0):
    """The Outcome of a claim that a prompt costs the smallest model something and the largest nothing, of
    {arm: {size: values}}. learned: the premise that the largest has something to lose."""
    *others, large = arms["plain"]
    small = [*others, large][0]
    result = outcome(at_size(arms, small), figure, ["plain > prompted"], [learned],
                     prefix=f"{size_label(small)}: ", unit=unit)
    if others:
        result.parts += compared("plain <= prompted", at_size(arms, large),
                                 prefix=f"{size_label(large)}: ", unit=unit, within=within)
    else:
        result.untested = "that larger models lose nothing, as there is one size"
    return result


def alignment_tax(lab):
    """Section 2: behind the prompt small models are worse at telling a text's last word; large ones are
    not.

    On the toy world the smaller model loses about as much as the 0.1 nats that count as nothing, and not in
    every world. A few more worlds, or a still smaller model, would decide.
    """
    arms = {"plain": lab.by_size(lambda one: one.last_words(one.lm())),
            "prompted": lab.by_size(lambda one: one.last_words(one.lm(), prompted=True))}
    yield arms

    def score(key):
        return lambda run: {item["item"]: (float(item[key]), item["group"]) for item in run.items()}
    right, log_prob = values(arms, score("right")), values(arms, score("log_prob"))
    learned = compared("plain > 0", at_size(right, lab.size), prefix=f"{size_label(lab.size)}, words right: ")
    panels = {"accuracy": curves(right, "last words told right, %", place=size_label),
              "log-prob": curves(log_prob, "nats a word", place=size_label, scale=1)}
    result = tax(log_prob, panels, *learned, unit="nats", within=0.1)
    for size in lab.sizes:
        result.beside += compared("plain > prompted", at_size(right, size),
                                  prefix=f"{size_label(size)}, words right: ")
    return result


def code_tax(lab):
    """Section 2: behind a prompt of dialogues small models write fewer programs that pass their tests
    (MBPP, pass@1); large ones do not."""
    def passing(one, *flags):
        return one.evaluate("mbpp", one.lm(), "--data", one.data("mbpp"), "--problems", 30, "--n", 4,
                            "--k", 1, "--max_new", 120, "--seed", one.seed, *flags,
                            seconds=one.sampling_seconds(30, 4, 120))
    arms = {"plain": lab.by_size(passing),
            "prompted": lab.by_size(lambda one: passing(one, "--prompt", "code", *one.prompt[2:]))}
    yield arms

    def passed(run):
        return {item["id"]: (item["passed"] / item["n"], item["id"]) for item in run.items()}
    rates = values(arms, passed)
    learned = compared("plain > 0", at_size(rates, lab.size), prefix=f"{size_label(lab.size)}: ")
    return tax(rates, sizes_figure(rates, "MBPP, pass@1, %", chance=None), *learned)
