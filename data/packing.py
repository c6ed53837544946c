"""Rows: which examples a step takes, how whole comparisons are packed into rows, and what a row holds.

Everything is a pure function of (seed, step, example), so a run resumes with one integer, and one rank or eight see the
same batches.
"""
import bisect
import functools
from dataclasses import dataclass

import numpy as np
import torch

from model import Layout


@functools.lru_cache(maxsize=2)  # made once an epoch, not once a step
def epoch_order(n, seed, epoch):
    """A permutation of n examples, pure in (seed, epoch)."""
    return np.random.default_rng([seed, epoch]).permutation(n)


def step_examples(n, batch, seed, step):
    """The examples of one optimizer step, counted from 0: (epoch, their numbers in 0..n-1).

    An epoch's last batch is smaller where `batch` does not divide n: every example comes once an epoch.
    """
    per_epoch = -(-n // batch)
    epoch, i = divmod(step, per_epoch)
    return epoch, epoch_order(n, seed, epoch)[i * batch:(i + 1) * batch]


def pack(lengths, capacity):
    """Best-fit decreasing: lists of positions in `lengths`, each list's lengths summing to at most `capacity` tokens.

    What is longer than a row by itself gets a row of its own. Longest rows come first, so running out of memory happens
    at once or not at all.
    """
    rows, free = [], []  # free: sorted (room left, row number) of the rows begun
    for i in np.argsort(-np.asarray(lengths), kind="stable").tolist():
        at = bisect.bisect_left(free, (lengths[i], -1))
        room, row = free.pop(at) if at < len(free) else (max(capacity, lengths[i]), len(rows))
        if row == len(rows):
            rows.append([])
        rows[row].append(i)
        bisect.insort(free, (room - lengths[i], row))
    return rows


def balance(lengths, ranks):
    """Share examples among ranks so that each has about the same number of tokens: one list of positions per rank."""
    shares, load = [[] for _ in range(ranks)], [0] * ranks
    for i in np.argsort(-np.asarray(lengths), kind="stable").tolist():
        rank = load.index(min(load))
        shares[rank].append(i)
        load[rank] += lengths[i]
    return shares


@dataclass
class Row:
    """Whole comparisons end to end, without padding: [context][completion 1 <eoc>][completion 2 <eoc>]…"""
    tokens: torch.Tensor  # (T,)
    layout: Layout
    examples: np.ndarray  # (C,) which comparison of the data set each is
    owner: torch.Tensor  # (K,) which of the row's comparisons each completion belongs to, 0..C-1
    which: np.ndarray  # (K,) which completion of its comparison it is; K counts a completion once for each control token
    scores: torch.Tensor  # (K,) the data's score of each completion
    best: torch.Tensor  # (K,) True for each comparison's first completion of the highest score
    starts: torch.Tensor  # (K,) where each completion's first token lies
    ends: torch.Tensor  # (K,) where its <eoc>, or without one its last token, lies: the reward is read here

    def to(self, device):
        moved = {k: v.to(device, non_blocking=True) for k, v in vars(self).items() if isinstance(v, torch.Tensor)}
        return Row(**{**vars(self), **moved})

    def at_ends(self, hidden):
        """Hidden states at the completions' ends, (K, d), of all tokens' (T, d); of themselves if that is what they are."""
        return hidden if len(hidden) == len(self.ends) else hidden[self.ends]

    def completion_tokens(self):
        """Where next tokens are predicted, for every completion's tokens and its <eoc>, in row order.

        Returns (source (M,), target (M,), completion (M,)): hidden[source] predicts tokens[target] of that completion.
        A completion's first token is predicted from its context's last, so `source` is not simply target - 1.
        """
        layout, sizes = self.layout, self.ends - self.starts + 1
        target = (layout.segment != layout.parent).nonzero().squeeze(1).to(self.tokens.device)
        source = target - 1
        context_last = [layout.starts[p + 1] - 1 for i, p in enumerate(layout.parents) if p != i]
        source[sizes.cumsum(0) - sizes] = torch.tensor(context_last, device=source.device)
        return source, target, torch.arange(len(sizes), device=source.device).repeat_interleave(sizes)


def make_row(comparisons, examples, chosen, ctx, tokenizer, eoc=True, control=()):
    """Lay out comparisons (a data set with `.segments(i)` and `.scores(i)`) in one row.

    chosen: for each example the completions to lay out (numbers), or None for all. Contexts are cut on the left so that
    context and longest completion fit in `ctx` tokens. An empty context is <eot>, as at the beginning of a document, so
    that a completion's first token is predicted from something.
    Without `eoc` a completion ends with its own last token (an empty one is <eoc> all the same). control: arrays of token ids;
    every completion is laid out once behind each of them, one after the other (binarised rows: GOOD, BAD).
    """
    parts, lengths, parents, owner, which, scores, best = [], [], [], [], [], [], []
    for c, (example, keep) in enumerate(zip(examples, chosen)):
        context, *completions = comparisons.segments(example)
        keep = range(len(completions)) if keep is None else keep
        room = ctx - max(len(x) for x in completions) - 1 - max(map(len, control), default=0)
        context = context[max(0, len(context) - room):]
        if not len(context):
            context = [tokenizer.eot]
        parent = len(lengths)
        parts.append(context)
        lengths.append(len(context))
        parents.append(parent)
        for k in keep:
            for mark in control or ((),):
                end = [tokenizer.eoc] if eoc or not len(mark) + len(completions[k]) else []
                parts += [mark, completions[k], end]
                lengths.append(sum(map(len, parts[-3:])))
                parents.append(parent)
                owner.append(c)
                which.append(k)
        scores.append(comparisons.scores(example)[list(keep)].repeat(max(1, len(control))))
        best.append(np.arange(len(scores[-1])) == scores[-1].argmax())
    layout = Layout(lengths, parents)
    spans = [(layout.starts[i], layout.starts[i + 1] - 1) for i, p in enumerate(parents) if p != i]
    starts, ends = torch.tensor(spans).T
    return Row(torch.from_numpy(np.concatenate(parts).astype(np.int64)), layout, np.asarray(examples),
               torch.tensor(owner), np.asarray(which), torch.from_numpy(np.concatenate(scores)),
               torch.from_numpy(np.concatenate(best)), starts, ends)
