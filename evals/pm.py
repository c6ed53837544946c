"""Scoring completions and measuring how well the scores agree with the data: accuracy, its standard error, null rulers,
calibration (Sections 2 to 4 of the paper)."""
import math

import numpy as np
import torch
from tqdm import tqdm

from data.packing import RowFormat, make_row, pack, packed_lengths

SCORES = ("reward", "mean", "sum")


def completion_scores(model, hidden, row, how):
    """One score per completion (K,) of a packed row with hidden states (T, d_model); for rewards those at the completions'
    ends, (K, d_model), do.

    how: "reward", the value head at <eoc>; "mean" or "sum", the log-prob per token or in all of the completion's tokens
    given its context, in nats. <eoc> is not counted there: a plain language model has never seen it.
    """
    if how == "reward":
        return model.rewards(hidden)
    _, losses = model.token_losses(hidden[row.source], row.tokens[row.target])
    total = torch.zeros(len(row.ends), dtype=losses.dtype, device=losses.device).index_add_(0, row.predicted, -losses)
    return total / (row.ends - row.starts).clamp(min=1) if how == "mean" else total


@torch.no_grad()
def score_all(model, data, examples, how, ctx, tokenizer, at_once, device, instead=None, prefix=None, progress=None, eoc=True):
    """Scores of all completions of the given comparisons: a list with one array (completions,) per example.

    how: one of SCORES, or a function as completion_scores (model, hidden, row) -> (K,). Longest rows come first. instead:
    token ids in place of every context, such as <eot>, a null ruler; a completion of several comparisons is then read once.
    prefix: a cache of the prompt that stands before all. eoc: whether completions end with <eoc>, as the model was trained;
    log-probs are read with it.
    """
    if instead is not None:
        texts = [data.segments(i)[1:] for i in examples]
        distinct = {ids.tobytes(): ids for row in texts for ids in row}  # each completion, by its bytes
        alone = Texts([[instead, ids] for ids in distinct.values()])
        scores = score_all(model, alone, np.arange(len(distinct)), how, ctx, tokenizer, at_once, device, prefix=prefix, progress=progress, eoc=eoc)
        found = dict(zip(distinct, np.concatenate(scores)))
        return [np.array([found[ids.tobytes()] for ids in row]) for row in texts]
    scores = [None] * len(examples)
    row_format = RowFormat(ctx, tokenizer, eoc)
    lengths = packed_lengths(data, examples, row_format)
    for numbers in tqdm(pack(lengths, at_once), desc=progress, unit="row", disable=None if progress else True, leave=False):
        row = make_row(data, examples[numbers], row_format, predict=None if how == "reward" else "all").to(device)
        hidden = model(row.tokens, row.layout, prefix, only_ends=how == "reward")
        values = how(model, hidden, row) if callable(how) else completion_scores(model, hidden, row, how)
        values = values.cpu().double().numpy()
        owner = row.owner.cpu().numpy()
        for j, number in enumerate(numbers):
            scores[number] = values[owner == j]
    return scores


class Texts:
    """[context, completion] token ids as a data set of comparisons of one completion each, as score_all reads it."""

    def __init__(self, parts):
        self.parts = parts

    def segments(self, i):
        return self.parts[i]

    def scores(self, i):
        return np.zeros(1)

    def lengths(self, i):
        return np.array([len(part) for part in self.parts[i]])


def pairs_of(truth):
    """All (better, worse) completions of one comparison by the data's scores (n,): two index arrays."""
    return np.nonzero(truth[:, None] > truth)


def margins(truths, scores):
    """(margin, weight, comparison), each (P,): score of the better minus that of the worse completion for every pair with
    different true scores. A comparison's weights sum to 1, so that each comparison counts once."""
    rows = []
    for i, (truth, score) in enumerate(zip(truths, scores)):
        better, worse = pairs_of(truth)
        rows.append(np.stack([score[better] - score[worse], np.full(len(better), 1 / max(1, len(better))), np.full(len(better), i)]))
    margin, weight, comparison = np.concatenate(rows, 1) if rows else np.zeros((3, 0))
    return margin, weight, comparison.astype(int)


def right(margin):
    """1 where the better completion has the higher score, a half for a tie, else 0."""
    return (margin > 0) + 0.5 * (margin == 0)


def mean_and_error(values, weights, groups):
    """Weighted mean and its standard error by group (clusters): values, weights, groups (P,). NaN error for one group."""
    mean = np.average(values, weights=weights)
    _, cluster = np.unique(groups, return_inverse=True)
    sums = np.bincount(cluster, weights * (values - mean))
    g = len(sums)
    return float(mean), float(np.sqrt((sums**2).sum() * g / (g - 1)) / weights.sum()) if g > 1 else math.nan


def figure(key, mean, error):
    """A mean and its standard error under their names in an evaluation's JSON line, which has no NaN."""
    return {key: mean, f"{key}_se": None if math.isnan(error) else error}


def calibration(margin, weight, bins=10):
    """How well P(A > B) = sigmoid(r_A - r_B) is calibrated: (Brier score, expected calibration error, reliability table).

    The Brier score is the mean of (1 - P(better > worse))^2: 0 is perfect, 0.25 is what always saying 0.5 gives. The
    table has a row per bin of the predicted winner's probability: (from, to, pairs, mean probability, accuracy).
    """
    p_better = 1 / (1 + np.exp(-np.clip(margin, -500, 500)))
    brier = np.average((1 - p_better) ** 2, weights=weight)
    confidence, hit = np.maximum(p_better, 1 - p_better), right(margin)
    edges = np.linspace(0.5, 1, bins + 1)
    which = np.clip(np.searchsorted(edges, confidence, "right") - 1, 0, bins - 1)
    table, error = [], 0.0
    for b in range(bins):
        inside = which == b
        if inside.any():
            w = weight[inside]
            mean_confidence, accuracy = np.average(confidence[inside], weights=w), np.average(hit[inside], weights=w)
            table.append((float(edges[b]), float(edges[b + 1]), int(inside.sum()), float(mean_confidence), float(accuracy)))
            error += w.sum() * abs(mean_confidence - accuracy)
    return float(brier), float(error / weight.sum()), table


def by_margin(margin, weight, parts=4):
    """Accuracy in quarters of |margin|, smallest first: rows (from, to, pairs, accuracy)."""
    order = np.argsort(np.abs(margin), kind="stable")
    return [(float(abs(margin[part[0]])), float(abs(margin[part[-1]])), len(part), float(np.average(right(margin[part]), weights=weight[part])))
            for part in np.array_split(order, parts) if len(part)]
