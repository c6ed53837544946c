"""A claim's figure: its panels in the upper part, and below them the differences that decide, with their 95 %
intervals. Shapes and places tell things apart, so that a figure also reads in grey and at half its size."""
import io
import math
import textwrap

import matplotlib
import numpy as np

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402  (after the choice of a backend that needs no screen)

MARKS, GREYS, LINES = "os^Dvp", ("0", "0.45", "0.25", "0.6"), ("-", "--", ":", "-.")


def picture(outcome):
    """The figure of an Outcome as a PNG."""
    findings = [*outcome.parts, *outcome.premises, *outcome.beside]
    units = list(dict.fromkeys(finding.unit for finding in findings))
    heights, n = (3.2, 0.6 * len(units) + 0.3 * len(findings)), len(outcome.panels)
    figure = plt.figure(figsize=(max(7.2, 2.3 * n), sum(heights)), dpi=130, layout="constrained")
    upper, lower = figure.subfigures(2, 1, height_ratios=heights)
    for ax, (title, panel) in zip(upper.subplots(1, n, squeeze=False)[0], outcome.panels.items()):
        draw_panel(ax, panel)
        ax.set_title(title, fontsize="medium")
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


def draw_panel(ax, panel):
    """Means over seeds as points, with bars of one standard deviation over seeds to either side."""
    places = list(dict.fromkeys(place for by_place in panel.series.values() for place in by_place))
    for n, (name, by_place) in enumerate(panel.series.items()):
        x = [places.index(place) + 0.1 * (n - (len(panel.series) - 1) / 2) for place in by_place]
        mean = np.array([np.mean(seeds) for seeds in by_place.values()])
        sd = np.array([np.std(seeds, ddof=1) if len(seeds) > 1 else 0.0 for seeds in by_place.values()])
        bars = (np.minimum(sd, mean), np.minimum(sd, 100 - mean)) if "%" in panel.label else sd
        grey, line = GREYS[n % len(GREYS)], LINES[n % len(LINES)] if panel.lines else ""
        ax.errorbar(x, mean, bars, label=name, capsize=3, color=grey, marker=MARKS[n % len(MARKS)],
                    markerfacecolor="white" if n % 2 else grey, linestyle=line)
    if panel.chance is not None:
        name = "chance" if panel.chance else None
        ax.axhline(panel.chance, color="0.6", linestyle=(0, (1, 2)), zorder=0, label=name)
    turn = 30 if len("".join(places)) > 45 else 0
    ax.set_xticks(range(len(places)), places, rotation=turn, ha="right" if turn else "center")
    low, high = ax.get_ylim()
    room = max(0, (4 if "%" in panel.label else 0.1) - (high - low)) / 2  # noise must not fill a picture
    ax.set(xlim=(-0.5, len(places) - 0.5), ylim=(low - room, high + room), ylabel=panel.label,
           xlabel=panel.along)
    ax.spines[["top", "right"]].set_visible(False)


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
