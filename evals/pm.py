"""Scores of completions, and how well they agree with the data: accuracy and its standard error, calibration
(Sections 2 to 4 of the paper)."""
import math

import numpy as np
import torch
from tqdm import tqdm

from data.comparisons import Comparisons, pairs
from data.errors import InputError
from data.packing import make_row, pack, packed_lengths

RULES = ("reward", "mean", "sum")  # how a completion is scored, see completion_scores


# ------------------------------------------------------------------------------------------------------------
# Scores


def completion_scores(model, hidden, row, rule):
    """The scores (K,) of the completions of a packed row.

    rule: "reward", what the value head says at a completion's end; `hidden` (K, d_model) are the states at
    the ends. "mean" or "sum": the log-prob of the completion's tokens given its context, in nats, per token
    or in total; `hidden` (T, d_model) are the states of all tokens. <eoc> is not counted, as a plain language
    model has never seen it.
    """
    if rule == "reward":
        return model.rewards(hidden)
    targets = row.tokens.index_select(0, row.target)
    _, losses = model.token_losses(hidden.index_select(0, row.source), targets)
    total = torch.zeros(len(row.ends), dtype=losses.dtype, device=losses.device)
    total.index_add_(0, row.predicted, -losses)
    return total / (row.ends - row.starts).clamp(min=1) if rule == "mean" else total


@torch.no_grad()
def score_all(model, data, examples, rule, row_format, micro_tokens, context_ids=None, prefix=None,
              progress=None):
    """The scores of all completions of the comparisons numbered `examples`: a list of arrays (completions,).

    rule: one of RULES, or a function like completion_scores of (model, hidden, row). context_ids: token ids
    in place of every context, to score completions by themselves; a completion of several comparisons is then
    computed once. prefix: a cache that has read the prompt. progress: words for a progress bar. Longest rows
    come first, and only a completion that is longer than `micro_tokens` makes a longer row. Raises InputError
    if a score is not a finite number.
    """
    if context_ids is not None:
        data, positions = _distinct_completions(data, examples, context_ids)
        examples = np.arange(len(data))
    device = model.unembedding.device
    scores = [None] * len(examples)
    parts = list(_parts(data, examples, row_format, micro_tokens))
    part_numbers, part_completions = zip(*parts)
    lengths = packed_lengths(data, examples[list(part_numbers)], row_format, part_completions)
    rows = pack(lengths, micro_tokens)
    for in_row in tqdm(rows, desc=progress, unit="row", disable=None if progress else True, leave=False):
        numbers, kept = zip(*[parts[i] for i in in_row])
        row = make_row(data, examples[list(numbers)], row_format, kept, None if rule == "reward" else "all")
        row = row.to(device)
        hidden = model(row.tokens, row.layout, prefix, only_ends=rule == "reward")
        values = rule(model, hidden, row) if callable(rule) else completion_scores(model, hidden, row, rule)
        values = values.cpu().double().numpy()  # 64 bits on the CPU only: not every device has them
        ends = np.cumsum(list(map(len, kept)))
        for number, keep, part in zip(numbers, kept, np.split(values, ends[:-1])):
            if not np.isfinite(part).all():
                raise InputError(f"{data.where(examples[number])}: the model gives a score that is not a "
                                 "finite number; its weights may be damaged")
            if scores[number] is None:
                scores[number] = np.zeros((len(data.lengths(examples[number])) - 1, *part.shape[1:]))
            scores[number][keep] = part
    if context_ids is not None:
        scores = np.concatenate(scores)
        return [scores[numbers] for numbers in positions]
    return scores


def _parts(data, examples, row_format, micro_tokens):
    """Yield (number in `examples`, numbers of completions) for each comparison. One that is longer than
    `micro_tokens` comes in parts, each with its context, as completions do not see each other."""
    lengths = packed_lengths(data, examples, row_format)
    for number, (example, length) in enumerate(zip(examples, lengths)):
        completions = list(range(len(data.lengths(example)) - 1))
        if length <= micro_tokens:
            yield number, completions
            continue
        context, *with_context = packed_lengths(
            data, [example] * (1 + len(completions)), row_format, [[], *([k] for k in completions)])
        alone = [tokens - context for tokens in with_context]
        for part in pack(alone, micro_tokens - context):
            yield number, sorted(part)


def _distinct_completions(data, examples, context_ids):
    """(Comparisons with each different completion of the examples once, behind this context; for each example
    the numbers of its completions there)."""
    numbers = {}  # of each completion, by the bytes of its token ids
    positions = [[numbers.setdefault(ids.tobytes(), len(numbers)) for ids in data.segments(i)[1:]]
                 for i in examples]
    texts = [[context_ids, np.frombuffer(ids, data.tokens.dtype)] for ids in numbers]
    return tokenised_comparisons(texts), positions


def tokenised_comparisons(texts, files=("text",), lines=None):
    """Comparisons without scores, of token ids [[context, completion, completion, …], …]. files, lines (C,
    2): where they come from, for messages."""
    segments = [np.asarray(ids, np.int64) for comparison in texts for ids in comparison]
    if lines is None:
        lines = [(0, number) for number in range(1, 1 + len(texts))]
    nothing = np.zeros(len(segments))
    return Comparisons(
        tokens=np.concatenate(segments), offsets=np.cumsum([0, *map(len, segments)]), chars=nothing,
        segment_scores=nothing, first=np.cumsum([0, *map(len, texts)]), groups=np.arange(len(texts)),
        lines=np.array(lines), files=files, counts={})


def examples_to_score(data, ctx, wanted, to_rank=False):
    """The numbers of the comparisons to score: those marked in `wanted` (C,) that fit in `ctx` tokens and, if
    they are to be ranked, whose scores are not all equal.

    Says how many are left out, and how many contexts are cut. Raises InputError if none is left.
    """
    fits, differ = data.fits(ctx), data.differ() | (not to_rank)
    usable = wanted & fits & differ
    if (wanted & ~usable).any():
        print(f"left out: {(wanted & ~fits).sum()} comparisons with a completion longer than --ctx {ctx}, "
              f"{(wanted & fits & ~differ).sum()} whose scores are all equal")
    if not usable.any():
        raise InputError(f"{data.files[0]}: no comparison is left to score")
    if n_cut := (usable & data.is_cut(ctx)).sum():
        print(f"{n_cut} of {usable.sum()} contexts are cut on the left to fit in --ctx {ctx}")
    return np.flatnonzero(usable)


# ------------------------------------------------------------------------------------------------------------
# How well scores agree with the data


def margins(true_scores, scores):
    """All pairs of completions of different true score: (margin, weight, comparison), each (P,).

    true_scores, scores: for each comparison an array (completions,). A margin is the better completion's
    score minus the worse one's. The weights of a comparison's pairs sum to 1, so that each comparison counts
    once.
    """
    parts = [np.zeros((3, 0))]
    for number, (truth, score) in enumerate(zip(true_scores, scores)):
        better, worse = pairs(truth)
        n = len(better)
        parts.append([score[better] - score[worse], np.full(n, 1 / max(1, n)), np.full(n, number)])
    margin, weight, comparison = np.concatenate(parts, axis=1)
    return margin, weight, comparison.astype(int)


def right(margin):
    """1 where the better completion has the higher score, a half for a tie, else 0."""
    return (margin > 0) + 0.5 * (margin == 0)


def mean_and_error(values, weights, groups):
    """The weighted mean and its standard error, taken over groups: values, weights, groups (P,).

    The values of one group may hang together, so a group counts as one observation. One group alone has no
    error: NaN.
    """
    mean = np.average(values, weights=weights)
    _, group_numbers = np.unique(groups, return_inverse=True)
    sums = np.bincount(group_numbers, weights * (values - mean))
    n = len(sums)
    error = math.sqrt((sums ** 2).sum() * n / (n - 1)) / weights.sum() if n > 1 else math.nan
    return float(mean), float(error)


def figure(key, mean, error):
    """A mean and its standard error as they stand in an evaluation's JSON line, which has no NaN."""
    return {key: mean, f"{key}_se": None if math.isnan(error) else error}


def calibration(margin, weight, bins=10):
    """How well P(A > B) = sigmoid(r_A - r_B) is calibrated: (Brier score, expected calibration error, table).

    The Brier score is the mean of (1 - P(better > worse))^2: 0 is perfect, and always saying 50 % gives 0.25.
    The table has a row for each bin of the predicted winner's probability: (from, to, pairs, mean
    probability, accuracy).
    """
    p_better = 1 / (1 + np.exp(-np.clip(margin, -500, 500)))
    brier = np.average((1 - p_better) ** 2, weights=weight)
    confidence = np.maximum(p_better, 1 - p_better)
    edges = np.linspace(0.5, 1, bins + 1)
    bin_numbers = np.clip(np.searchsorted(edges, confidence, "right") - 1, 0, bins - 1)
    table, error = [], 0.0
    for b in np.unique(bin_numbers):
        inside = bin_numbers == b
        mean_confidence = np.average(confidence[inside], weights=weight[inside])
        accuracy = np.average(right(margin[inside]), weights=weight[inside])
        error += weight[inside].sum() / weight.sum() * abs(mean_confidence - accuracy)
        table.append((float(edges[b]), float(edges[b + 1]), int(inside.sum()), float(mean_confidence),
                      float(accuracy)))
    return float(brier), float(error), table


def by_margin(margin, weight, parts=4):
    """Accuracy in quarters of |margin|, the smallest first: rows (from, to, pairs, accuracy)."""
    table = []
    order = np.argsort(np.abs(margin), kind="stable")
    for part in np.array_split(order, min(parts, len(order))):
        accuracy = np.average(right(margin[part]), weights=weight[part])
        low, high = np.abs(margin[part[[0, -1]]]).tolist()
        table.append((low, high, len(part), float(accuracy)))
    return table
