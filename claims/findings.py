"""The claims' statistics: means and paired differences with 95 % intervals, and the verdicts that these give.

An arm is {set: [the run of each seed]}, with one set called "" where there are no sets. Its values are the
same with {item: (value, group)} in each run's place. A finding says what one difference means, and an outcome
has all findings of a claim.
"""
import math
import re
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from claims.scales import size_label
from data.errors import InputError
from evals import choices, elo, pm

RESAMPLED = 1000  # times, in a bootstrap
SCALES = {"points": 100}  # what values are multiplied with for a unit, if not 1
# Student's 97.5 % quantile for the mean of n numbers
STUDENT = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78, 6: 2.57, 7: 2.45, 8: 2.36, 9: 2.31, 10: 2.26}


# ------------------------------------------------------------------------------------------------------------
# Values of items


def pairs_right(run, key=None):
    """{comparison: (the share of its pairs that is ranked right, group)} of an `evaluate.py pm` run, by the
    scores called key, or by those that the model is scored by."""
    found = {}
    for item in run.items():
        scores = np.array(item[key or run.figures["score"]])
        margin, weight, _ = pm.margins([np.array(item["scores"])], [scores])
        found[item["where"]] = float((weight * pm.right(margin)).sum()), item["group"]
    return found


def without_context(run):
    return pairs_right(run, "no_context")


def figure_of(key):
    """A score that is one of a run's figures."""
    return lambda run: {"": (run.figures[key], "")}


def choice_right(rule, category=None, hit=choices.hit):
    """A score of multiple-choice runs: 1 where the best choice by the rule is the right one. "longest" is the
    ruler that takes the longest choice."""
    def scores(item):
        return np.array(list(map(len, item["completions"])) if rule == "longest" else item[rule])
    return lambda run: {item["item"]: (hit(np.array(item["scores"]), scores(item)), item["group"])
                        for item in run.items() if category in (None, item.get("category"))}


def values(arms, score=pairs_right):
    """Arms, in any nest of dicts, with score(run) -> {item: (value, group)} in each run's place."""
    if isinstance(arms, dict):
        return {name: values(part, score) for name, part in arms.items()}
    return [score(run) for run in arms]


def minus(first, second):
    """Values minus others of the same form, item by item."""
    if isinstance(first, dict):
        return {name: minus(part, second[name]) for name, part in first.items()}
    return [paired(*both) for both in zip(first, second)]


def paired(first, second):
    common = {item: (value - second[item][0], group) for item, (value, group) in first.items()
              if item in second}
    if not common:
        raise InputError("no item is common to the runs that a claim compares")
    return common


# ------------------------------------------------------------------------------------------------------------
# Means with their intervals


class Estimate(NamedTuple):
    """A mean with its 95 % interval, what the interval is over, and what data it comes from."""
    effect: float
    low: float
    high: float
    over: str = "groups and seeds"
    data: str = ""


def student(n):
    """Student's 97.5 % quantile for the mean of n numbers. Above ten it is a series in 1 / (n - 1), right to
    0.01, which begins with the normal distribution's 1.96."""
    return STUDENT.get(n) or 1.96 + 2.372 / (n - 1) + 2.823 / (n - 1) ** 2


def mean(arm_values, scale=100, baseline=0.0):
    """The Estimate of how far the mean of an arm's values over items, seeds and sets is above the baseline,
    times the scale: 100 gives points.

    Seeds that gave the same values are one model, scored several times, and count once."""
    by_seed = list(zip(*arm_values.values()))  # for each seed the items of every set
    by_seed = [row for number, row in enumerate(by_seed) if row not in by_seed[:number]]
    errors, n_items, n_groups = [], 0, []
    for seeds in zip(*by_seed):
        rows = [(scale * value, 1 / len(items), group) for items in seeds for value, group in items.values()]
        value, weight, group = map(np.array, zip(*rows))
        errors.append(pm.mean_and_error(value, weight, group)[1])
        n_items += len(seeds[0])
        n_groups.append(len(set(group)))
    means = np.array([np.mean([item_mean(items) for items in row]) for row in by_seed])
    return joined(scale * (means - baseline), errors, n_items, n_groups)


def item_mean(items):
    return np.mean([value for value, _ in items.values()])


def seed_means(arm_values, scale=100):
    """The mean over items and sets of each seed."""
    return [scale * np.mean([item_mean(items) for items in row]) for row in zip(*arm_values.values())]


def joined(by_seed, errors, n_items, n_groups):
    """The Estimate of the mean of one number for each seed, given each set's standard error by group and its
    number of groups.

    The half-widths over groups and over seeds, both Student's, are joined like those of independent things.
    With a single seed, or without groups, the interval is over the other alone. If one of several sets has a
    single group, nothing tells how far its groups differ, and there is no interval."""
    n_seeds, halves = len(by_seed), {}
    if max(n_groups) > 1:
        half = [student(n) * error if n > 1 else math.inf for n, error in zip(n_groups, errors)]
        halves["groups"] = math.hypot(*half) / len(half)  # of a mean of independent sets
    if n_seeds > 1:
        halves["seeds"] = student(n_seeds) * np.std(by_seed, ddof=1) / math.sqrt(n_seeds)
    middle, half = np.mean(by_seed), math.hypot(*halves.values()) if halves else math.inf
    data = f"{n_items:,} items in {sum(n_groups):,} groups, " if max(n_groups) > 1 else ""
    data += f"{n_seeds} seed{'s' * (n_seeds > 1)}"
    return Estimate(middle, middle - half, middle + half, " and ".join(halves), data)


def over_seeds(numbers, scale=1):
    """The Estimate of the mean of one number for each seed, which has no items."""
    return mean({"": [{"": (float(number), "")} for number in numbers]}, scale)


def gain_over_members(ensemble, members):
    """The Estimate of how much more often an ensemble is right than its members on average, over groups, as
    there is one ensemble. ensemble, members: the values of its run, and of a run for each member."""
    average = {}
    for name, seeds in members.items():
        average[name] = [{item: (np.mean([items[item][0] for items in seeds]), group)
                          for item, (_, group) in seeds[0].items()}]
    return mean(minus(ensemble, average))


def resample(n):
    """How often each of n groups is drawn in each resampling: (RESAMPLED, n)."""
    return np.random.default_rng(0).multinomial(n, np.full(n, 1 / n), RESAMPLED)


def overconfidence(arm):
    """The Estimate of how much less often preference models are right where they give a probability of 75 %,
    in points; below 0 they are right more often. The interval over groups is a bootstrap's."""
    by_set, errors, n_items, n_groups = [], [], 0, []
    for runs in arm.values():
        by_seed, resampled = zip(*map(surplus_at_75, runs))
        by_set.append(by_seed)
        errors.append(np.mean(resampled, axis=0).std())
        n_items += runs[0].figures["n"]
        n_groups.append(runs[0].figures["groups"])
    return joined(np.mean(by_set, axis=0), errors, n_items, n_groups)


def surplus_at_75(run):
    """(75 minus how often the model is right there, in %; the same in each resampling of the groups).

    It follows from the slope b with which sigmoid(b * margin) fits best how often the better completion
    wins; 1 is calibrated. In a resampling the slope is one Newton step away."""
    items = run.items()
    scores = ([np.array(item[key]) for item in items] for key in ("scores", "reward"))
    margin, weight, comparison = pm.margins(*scores)
    group = np.unique([items[i]["group"] for i in comparison], return_inverse=True)[1]
    slope = 1.0
    for _ in range(50):
        p = 1 / (1 + np.exp(-np.clip(slope * margin, -500, 500)))
        gradient = np.bincount(group, weight * margin * (1 - p))
        curvature = np.bincount(group, weight * margin**2 * p * (1 - p)) + 1e-12
        slope += np.clip(gradient.sum() / curvature.sum(), -1, 1)
    draws = resample(len(gradient))
    slopes = np.append(slope, slope + (draws @ gradient) / (draws @ curvature))
    surplus = 75 - 100 / (1 + 3 ** -np.clip(slopes, -50, 50))
    return surplus[0], surplus[1:]


def elo_difference(runs, first, second):
    """The Estimate of a player's Elo minus another's; the interval over contexts is a bootstrap's."""
    by_seed, resampled = [], []
    for run in runs:
        games = [(game["model_a"], game["model_b"], game["winner"]) for game in run.items()]
        names, wins = elo.wins_by_context(games, [game["context"] for game in run.items()])
        counts = np.concatenate([np.ones((1, len(wins))), resample(len(wins))])
        elos = elo.fit(np.tensordot(counts, wins, 1))
        difference = elos[:, names.index(first)] - elos[:, names.index(second)]
        by_seed.append(difference[0])
        resampled.append(difference[1:])
    return joined(by_seed, [np.mean(resampled, axis=0).std()], len(wins), [len(wins)])


def beyond_rulers(runs):
    """The Estimate of how much more often preference models are right than the better one of "longer wins"
    and "shorter wins" on the same comparisons."""
    figures = [run.figures for run in runs]
    ruler = max(("longer_wins", "shorter_wins"), key=lambda name: sum(seed[name] for seed in figures))
    gains = [100 * (seed["accuracy"] - seed[ruler]) for seed in figures]
    errors = [100 * math.hypot(seed["accuracy_se"], seed[f"{ruler}_se"]) for seed in figures]
    return joined(gains, [np.mean(errors)], figures[0]["n"], [figures[0]["groups"]])


# ------------------------------------------------------------------------------------------------------------
# Findings


@dataclass
class Finding:
    """What was compared, the difference with its 95 % interval, and what that says. within: what counts as
    none."""
    what: str
    effect: float
    low: float
    high: float
    over: str
    data: str
    verdict: str
    unit: str = "points"
    within: float = 0.0


def finding(what, sign, estimate, unit="points", within=3.0):
    """The Finding that a difference is above 0 (sign >), is about 0 (=) or is not above 0 (<=).

    For "=" and "<=" a difference of up to `within` counts as none. So "about 0" holds if the whole interval is
    within that of 0, whether or not 0 is in it, and does not hold if the whole interval is beyond. "Not above
    0" is alike."""
    low, high = estimate.low, estimate.high
    holds = {">": low > 0, "=": -within < low and high < within, "<=": high < within}[sign]
    fails = {">": high < 0, "=": low > within or high < -within, "<=": low > within}[sign]
    verdict = "holds" if holds else "does not hold" if fails else "cannot tell"
    return Finding(what, *estimate, verdict, unit, 0.0 if sign == ">" else within)


def compared(sentence, arms, chance=0.5, prefix="", unit="points", within=3.0):
    """The Findings on a sentence about {arm: values}, such as "distilled = prompted", "prompted > plain",
    "small <= large", "prompted > chance" or "prompted > 0": on the mean of the sets and, where there are
    several, on each of them."""
    first, sign, second = re.split(" (>|=|<=) ", sentence)
    gains, baseline = arms[first], {"chance": chance, "0": 0.0}.get(second)
    if baseline is None:
        gains, baseline = minus(arms[first], arms[second]), 0.0
    what, n = f"{prefix}{first}" + f" minus {second}" * (second != "0"), len(gains)
    parts = {f"{what}, mean of {n} sets" if n > 1 else what: gains}
    if n > 1:
        parts |= {f"{what}, {name}": {name: seeds} for name, seeds in gains.items()}
    return [finding(what, sign, mean(part, SCALES.get(unit, 1), baseline), unit, within)
            for what, part in parts.items()]


# ------------------------------------------------------------------------------------------------------------
# Outcomes


@dataclass
class Panel:
    """What figures.py draws: {series: {place along the x axis: a number for each seed}}, the name of the y
    axis, where chance lies on it, the name of the x axis, and whether lines join the points of a series."""
    series: dict
    label: str
    chance: float = None
    along: str = ""
    lines: bool = True


def panel(arms, label, chance=None, scale=100):
    """The Panel of {arm: values}: arms side by side, or as a series each where they have several sets."""
    if len(next(iter(arms.values()))) > 1:
        series = {name: {one: seed_means({"": seeds}, scale) for one, seeds in sets.items()}
                  for name, sets in arms.items()}
    else:
        series = {"": {name: seed_means(sets, scale) for name, sets in arms.items()}}
    return Panel(series, label, chance, lines=False)


def curves(arms, label, chance=None, along="", place=str, scale=100):
    """The Panel of {arm: {place: values}}, as means of the sets."""
    series = {name: {place(x): seed_means(sets, scale) for x, sets in by_place.items()}
              for name, by_place in arms.items()}
    return Panel(series, label, chance, along)


@dataclass
class Outcome:
    """What a claim found.

    parts: Findings on all that its sentence says. premises: Findings without which the parts tell nothing.
    beside: others worth seeing. panels: {title: Panel}. untested: a part of the sentence that these runs say
    nothing of, so that they cannot tell that it holds. explanation: why it does not hold or cannot be told at
    this scale, and what would decide."""
    parts: list
    premises: list
    beside: list
    panels: dict
    untested: str = ""
    explanation: str = ""
    png: bytes = b""

    @property
    def verdict(self):
        verdicts = {part.verdict for part in self.parts}
        if any(premise.verdict != "holds" for premise in self.premises):
            return "cannot tell"
        if "does not hold" in verdicts:
            return "does not hold"
        return "holds" if verdicts == {"holds"} and not self.untested else "cannot tell"


def outcome(arms, figure, parts, premises=(), beside=(), chance=0.5, **options):
    """The Outcome of sentences about {arm: values}, see `compared`; a Finding may stand in a sentence's
    place. figure: {title: Panel}, or what the y axis of the arms' panel is called.

    Findings on single sets stand beside it. But if a sentence says that there is no difference, or none above
    0, each set is a part, as in the mean of opposite differences they cancel."""
    scale = SCALES.get(options.get("unit", "points"), 1)
    if isinstance(figure, str):
        figure = {"": panel(arms, figure, None if chance is None else scale * chance, scale)}
    result = Outcome([], [], [], figure)
    for sentences, findings in ((parts, result.parts), (premises, result.premises), (beside, result.beside)):
        for sentence in sentences:
            if isinstance(sentence, Finding):
                findings.append(sentence)
                continue
            main, *sets = compared(sentence, arms, chance, **options)
            findings.append(main)
            (result.beside if " > " in sentence else findings).extend(sets)
    return result


def at_size(arms, size):
    """{arm: its part at this size} of {arm: {size: …}}."""
    return {name: by_size[size] for name, by_size in arms.items()}


def sizes_figure(arms, label, chance=50, scale=100):
    """{title: Panel} of {arm: {size: values}}: the means of the sets by size and, where there are several,
    each set at the largest size."""
    *_, by_size = arms.values()
    *_, large = by_size
    means = curves(arms, label, chance, place=size_label, scale=scale)
    if len(by_size[large]) == 1:
        return {"": means}
    sets = panel(at_size(arms, large), label, chance, scale)
    return {"mean of the sets": means, f"each set, {size_label(large)}": sets}


def growing(arms, figure, sentence, premises):
    """The Outcome of a sentence "first > second" about {arm: {size: values}}, the smallest size first: it
    holds if that is so at the largest size, and more so than at the smallest. figure: as of `outcome`."""
    first, second = (arms[name] for name in sentence.split(" > "))
    *others, large = first
    figure = sizes_figure(arms, figure) if isinstance(figure, str) else figure
    result = outcome(at_size(arms, large), figure, [sentence], premises, prefix=f"{size_label(large)}: ")
    for size in others:
        result.beside += compared(sentence, at_size(arms, size), prefix=f"{size_label(size)}: ")
    if others:
        gains, small = minus(first, second), others[0]
        what = f"{size_label(large)}: the same, more than at {size_label(small)} by"
        result.parts.append(finding(what, ">", mean(minus(gains[large], gains[small]))))
    else:
        result.untested = "that it is more for larger models, as there is one size"
    return result
