"""From the items that runs wrote to findings: paired differences with 95 % intervals, verdicts, bars.

An arm of a comparison is a list of runs, one for each seed, or, where it was run on several sets, {set: such a list}.
"""
import math
from dataclasses import dataclass

import numpy as np

from data.errors import InputError
from evals import choices, pm


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


# ---------------------------------------------------------------------------------------------------------------------
# A run's items -> {item: (value, group)}


def hits(rule, category=None, hit=choices.hit):
    """A function run -> {item: (1 where the best-scored choice is the right one, group)}, of multiple-choice runs."""
    right = lambda item: hit(np.array(item["scores"]), np.array(item[rule]))
    return lambda run: {item["item"]: (right(item), item["group"]) for item in run.items() if category in (None, item.get("category"))}


def pairs_right(run, key=None):
    """{comparison: (share of its pairs ranked right, group)} of an `evaluate.py pm` run."""
    values = {}
    for item in run.items():
        margin, weight, _ = pm.margins([np.array(item["scores"])], [np.array(item[key or run.figures["score"]])])
        values[item["where"]] = (float((weight * pm.right(margin)).sum()), item["group"])
    return values


# ---------------------------------------------------------------------------------------------------------------------
# Differences and their intervals


def by_set(arm):
    """An arm as {set: runs}; the name of its only set is ""."""
    return arm if isinstance(arm, dict) else {"": arm}


def valued(arm, values=pairs_right):
    """The same arm with values(run) in each run's place."""
    return {name: [values(run) for run in runs] for name, runs in by_set(arm).items()}


def difference(first, second):
    """(effect, low, high) in points: second minus first, two valued arms; of several sets the mean. The 95 % interval joins the one
    over test groups (of differences averaged over seeds) with Student's over seeds, as the two are independent."""
    by_seed, errors = [], []
    for name in first:
        pairs = list(zip(first[name], second[name]))
        items = sorted(set.intersection(*(set(part) for pair in pairs for part in pair)))
        if not items:
            raise InputError("no item is common to the runs that a claim compares")
        d = 100 * np.array([[b[i][0] - a[i][0] for i in items] for a, b in pairs])
        groups = np.array([str(pairs[0][0][i][1]) for i in items])
        by_seed.append(d.mean(1))
        errors.append(pm.mean_and_error(d.mean(0), np.ones(len(items)), groups)[1])
    by_seed = np.mean(by_seed, 0)
    error = math.sqrt(np.nansum(np.square(errors))) / len(errors)  # sets are independent; one group alone has no error
    half = math.hypot(1.96 * error, over_seeds_half(by_seed) if len(by_seed) > 1 else 0.0)
    return by_seed.mean(), by_seed.mean() - half, by_seed.mean() + half


def over_seeds(values, scale=1.0):
    """(mean, low, high) of one number a seed; the 95 % interval is Student's, infinite where all are equal: then one model served all seeds,
    and nothing is known of others."""
    values = scale * np.array(values, float)
    half = over_seeds_half(values) if np.ptp(values) else math.inf
    return values.mean(), values.mean() - half, values.mean() + half


def over_seeds_half(values):
    """Half of Student's 95 % interval of the mean of one number a seed; infinite for one seed."""
    t = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78, 6: 2.57, 7: 2.45, 8: 2.36, 9: 2.31, 10: 2.26}.get(len(values), 2.2)
    return t * values.std(ddof=1) / math.sqrt(len(values)) if len(values) > 1 else math.inf


def above(what, effect, low, high, unit="points", over="groups and seeds"):
    """A Finding on the claim that the effect is above 0."""
    return Finding(what, effect, low, high, "holds" if low > 0 else "does not hold" if high < 0 else "cannot tell", unit, over)


def equal(what, effect, low, high, within=3.0, over="groups and seeds"):
    """A Finding on the claim that there is no effect to speak of: it holds where the interval lies within some points of 0, whether
    or not it contains 0, and does not where it contains no 0."""
    verdict = "holds" if -within < low and high < within else "does not hold" if low > 0 or high < 0 else "cannot tell"
    return Finding(what, effect, low, high, verdict, over=over)


def compared(what, first, second, verdict=above):
    """Findings on second minus first, two valued arms: of all sets together, then, if there are several, of each."""
    together = f"{what}, mean of {len(first)} sets" if len(first) > 1 else what
    return [verdict(together, *difference(first, second))] + [
        verdict(f"{what}, {name}", *difference({name: first[name]}, {name: second[name]})) for name in first if len(first) > 1]


# ---------------------------------------------------------------------------------------------------------------------
# Means and pictures


def spread(values):
    """(mean, standard deviation) of one number a seed."""
    return np.mean(values), np.std(values, ddof=1) if len(values) > 1 else 0.0


def mean_of(arm, key):
    """(mean, standard deviation) over seeds of a figure, in %; of several sets the mean."""
    return spread(100 * np.mean([[run.figures[key] for run in runs] for runs in by_set(arm).values()], 0))


def bars(named, label):
    """A function that draws named groups of (mean, sd) as bars: {series: {group: (mean, sd)}}."""
    def draw(ax):
        width = 0.8 / len(named)
        for n, (series, values) in enumerate(named.items()):
            x = np.arange(len(values)) + n * width - 0.4 + width / 2
            mean, sd = zip(*values.values())
            ax.bar(x, mean, width * 0.95, yerr=sd, capsize=3, label=series, color=str(0.8 - 0.5 * n / max(1, len(named) - 1)), edgecolor="black",
                   hatch=("", "//", "..", "xx", "\\\\")[n % 5])
        groups = list(values)
        ax.set_xticks(np.arange(len(groups)), groups, rotation=30 if sum(map(len, groups)) > 60 else 0)
        ax.set_ylabel(label)
        if len(named) > 1:
            legend_above(ax)
    return draw


def curves(named, at, along, label):
    """A function that draws {series: [(mean, sd) at each of `at`]} as lines along a logarithmic axis."""
    def draw(ax):
        for n, (series, values) in enumerate(named.items()):
            mean, sd = zip(*values)
            ax.errorbar(at, mean, sd, capsize=3, label=series, **line_style(n))
        log_axis(ax, at, along)
        ax.set_ylabel(label)
        legend_above(ax)
    return draw


def line_style(n):
    """Mark, dashes and grey of the n-th line of a figure."""
    return {"fmt": ("o-", "s--", "^:", "d-.")[n % 4], "color": str(0.15 * (n % 4))}


def legend_above(ax, **more):
    """The legend where it hides nothing."""
    ax.legend(**more, frameon=False, loc="lower center", bbox_to_anchor=(0.5, 1), ncols=2)


def log_axis(ax, at, along):
    """Mark the measured places, and no others, on a logarithmic axis."""
    ax.set(xscale="log", xlabel=along)
    ax.set_xticks(at, [f"{x / 1e6:.2g}M" if x >= 5e4 else f"{x:,}" for x in at])
    ax.minorticks_off()


def set_bars(arms, label, key="accuracy", rulers=()):
    """Bars of {arm: its runs}: one for each arm, or, of arms on several sets, one for each arm and set. rulers: figures of the last
    arm's runs that are drawn beside."""
    sets = list(by_set(next(iter(arms.values()))))
    if len(sets) == 1:
        last = list(arms.values())[-1]
        return bars({"": {name: mean_of(arm, key) for name, arm in arms.items()} | {name.replace("_", " "): mean_of(last, name) for name in rulers}}, label)
    named = {name: {one: mean_of(runs, key) for one, runs in arm.items()} for name, arm in arms.items()}
    named |= {name.replace("_", " "): {one: mean_of(runs, name) for one, runs in list(arms.values())[-1].items()} for name in rulers}
    return bars(named, label)
