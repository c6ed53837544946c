"""A claim's figure: its arms in the upper part, and below them the differences that decide, with their 95 %
intervals.

Shapes and places tell things apart, so that a figure also reads in grey and at half its size. The upper part
is {title of a panel: a function that draws on its axes}. """
import io
import math
import textwrap

import matplotlib
import numpy as np

from claims.findings import item_mean
from claims.scales import size_label

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402  (after the choice of a backend that needs no screen)

MARKS, GREYS, LINES = "os^Dvp", ("0", "0.45", "0.25", "0.6"), ("-", "--", ":", "-.")


def spread(numbers):
    """(mean, standard deviation) of one number for each seed."""
    return np.mean(numbers), np.std(numbers, ddof=1) if len(numbers) > 1 else 0.0


def mean_of(arm, key, scale=100):
    """The `spread` over seeds of a figure of an arm's runs, averaged over its sets; in % by default."""
    return spread(scale * np.mean([[run.figures[key] for run in runs] for runs in arm.values()], axis=0))


def each_set(arm, key):
    """{set: the same of this set}."""
    return {name: mean_of({name: runs}, key) for name, runs in arm.items()}


def points(series, label, chance=None, along="", lines=True):
    """A panel of {series: {place along the x axis: (mean, sd)}}. lines: join the points of a series."""
    def draw(ax):
        places = list(dict.fromkeys(place for found in series.values() for place in found))
        for n, (name, found) in enumerate(series.items()):
            x = [places.index(place) + 0.1 * (n - (len(series) - 1) / 2) for place in found]
            mean, sd = np.array(list(found.values())).T
            bars = (np.minimum(sd, mean), np.minimum(sd, 100 - mean)) if "%" in label else sd
            grey = GREYS[n % len(GREYS)]
            style = {"marker": MARKS[n % len(MARKS)], "linestyle": LINES[n % len(LINES)] if lines else ""}
            ax.errorbar(x, mean, bars, label=name, capsize=3, color=grey,
                        markerfacecolor="white" if n % 2 else grey, **style)
        if chance is not None:
            name = "chance" if chance else None
            ax.axhline(chance, color="0.6", linestyle=(0, (1, 2)), zorder=0, label=name)
        turn = 30 if len("".join(map(str, places))) > 45 else 0
        ax.set_xticks(range(len(places)), places, rotation=turn, ha="right" if turn else "center")
        low, high = ax.get_ylim()
        room = max(0, (4 if "%" in label else 0.1) - (high - low)) / 2  # noise must not fill a picture
        ax.set(xlim=(-0.5, len(places) - 0.5), ylim=(low - room, high + room), ylabel=label, xlabel=along)
    return draw


def arm_panel(arms, key, label, chance=None):
    """The panel of arms at one size: side by side, or as a series each where they have several sets."""
    if len(next(iter(arms.values()))) > 1:
        series = {name: each_set(arm, key) for name, arm in arms.items()}
    else:
        series = {"": {name: mean_of(arm, key) for name, arm in arms.items()}}
    return {"": points(series, label, chance, lines=False)}


def size_panels(arms, key, label, chance=None, rulers=(), scale=100):
    """The panels of {arm: {size: arm}}: the mean of the sets by size and, where there are several, each set
    at the largest size. rulers: figures of the last arm's runs that are drawn like arms."""
    *_, last = arms.values()
    drawn = [(name, by_size, key) for name, by_size in arms.items()]
    drawn += [(ruler.replace("_", " "), last, ruler) for ruler in rulers]
    series = {name: {size_label(size): mean_of(arm, figure, scale) for size, arm in by_size.items()}
              for name, by_size, figure in drawn}
    *_, main = last
    if len(last[main]) == 1:
        return {"": points(series, label, chance)}
    sets = {name: each_set(by_size[main], figure) for name, by_size, figure in drawn}
    return {"mean of the sets": points(series, label, chance),
            f"each set, {size_label(main)}": points(sets, label, chance, lines=False)}


def value_panel(arms, label, chance=None):
    """The panel of {arm: {set: values}}, in %."""
    series = {arm: {name: spread([100 * item_mean(items) for items in seeds]) for name, seeds in sets.items()}
              for arm, sets in arms.items()}
    return points(series, label, chance, lines=False)


def calibration_panels(arm):
    """How often preference models are right by the probability that they give, and the pairs behind that."""
    series, pairs = {"as given": {}}, {}
    for name, runs in arm.items():
        bins = {}
        for low, high, *row in (row for run in runs for row in run.figures["reliability"]):
            bins.setdefault(f"{100 * low:.0f}", []).append(row)
        bins = {place: np.array(rows).T for place, rows in sorted(bins.items())}
        label = name or "how often right"
        series[label] = {place: spread(100 * right) for place, (_, _, right) in bins.items()}
        series["as given"] |= {place: (100 * given.mean(), 0) for place, (_, given, _) in bins.items()}
        pairs[label] = {place: spread(n) for place, (n, _, _) in bins.items()}
    along = "probability given, from … %"
    return {"": points(series, "right, %", along=along), " ": points(pairs, "pairs", along=along)}


def picture(outcome):
    """The figure of an Outcome as a PNG."""
    findings = [*outcome.parts, *outcome.premises, *outcome.beside]
    units = list(dict.fromkeys(finding.unit for finding in findings))
    heights, n = (3.2, 0.6 * len(units) + 0.3 * len(findings)), len(outcome.figure)
    figure = plt.figure(figsize=(max(7.2, 2.3 * n), sum(heights)), dpi=130, layout="constrained")
    upper, lower = figure.subfigures(2, 1, height_ratios=heights)
    for ax, (title, draw) in zip(upper.subplots(1, n, squeeze=False)[0], outcome.figure.items()):
        draw(ax)
        ax.set_title(title, fontsize="medium")
        ax.spines[["top", "right"]].set_visible(False)
    if len({ax.get_ylabel() for ax in upper.axes}) == 1:  # panels of one quantity have one axis
        low, high = zip(*(ax.get_ylim() for ax in upper.axes))
        for ax in upper.axes:
            ax.set_ylim(min(low), max(high))
            ax.label_outer()
    handles, labels = upper.axes[0].get_legend_handles_labels()
    if any(labels):
        upper.legend(handles, labels, loc="outside upper center", ncols=3, frameon=False)
    ratios = [1 + sum(finding.unit == unit for finding in findings) for unit in units]
    for ax, unit in zip(lower.subplots(len(units), 1, squeeze=False, height_ratios=ratios)[:, 0], units):
        draw_differences(ax, [finding for finding in findings if finding.unit == unit], outcome.parts)
        ax.set_xlabel(f"difference in {unit}, with its 95 % interval")
    file = io.BytesIO()
    figure.savefig(file, format="png", metadata={"Software": None})
    plt.close(figure)
    return file.getvalue()


def draw_differences(ax, findings, parts):
    """Findings below each other with their verdicts. Points are full for parts of the claim and hollow for
    others; a grey stripe is what counts as no difference."""
    rows = range(len(findings))
    for y, finding in enumerate(findings):
        half = 0 if math.isinf(finding.low) else finding.high - finding.effect
        ax.barh(y, 2 * finding.within, 0.6, left=-finding.within, color="0.87", zorder=0)
        ax.errorbar(finding.effect, y, xerr=half, marker="o", color="0", capsize=3,
                    markerfacecolor="0" if finding in parts else "white")
    ax.axvline(0, color="0.6", linewidth=0.8, zorder=0)
    ax.set_yticks(rows, [textwrap.fill(finding.what, 56) for finding in findings], fontsize="small")
    ax.set_ylim(len(findings) - 0.5, -0.5)
    verdicts = ax.secondary_yaxis("right")
    verdicts.set_yticks(rows, [finding.verdict for finding in findings], fontsize="small")
    for axis in (ax, verdicts):
        axis.tick_params(axis="y", length=0)
        axis.spines[["left", "right"]].set_visible(False)
    ax.spines["top"].set_visible(False)
