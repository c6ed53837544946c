"""Rows: which examples a step takes, how comparisons are packed into rows, and what a row holds.

A row holds comparisons end to end, without padding:

    [context][completion 1 <eoc>][completion 2 <eoc>] [context][completion 1 <eoc>] …

Everything here is a pure function of (seed, step, example). So a run resumes with one integer, and one rank
or eight see the same batches. And everything is made on the CPU, one step ahead, so that a GPU never has to
wait.
"""
import bisect
import copy
import functools
from dataclasses import dataclass, replace

import numpy as np
import torch

from data.comparisons import pairs


# ------------------------------------------------------------------------------------------------------------
# Which examples


@functools.lru_cache(maxsize=2)  # so that it is made once an epoch, and not once a step
def epoch_order(n, seed, epoch):
    """A permutation of n examples, which depends on (seed, epoch) alone."""
    return np.random.default_rng([seed, epoch]).permutation(n)


def step_examples(n, batch, seed, step):
    """The examples of one optimizer step, counted from 0: (epoch, their numbers from 0 to n - 1).

    Every example comes once an epoch. Where `batch` does not divide n, an epoch's last batch is smaller.
    """
    steps_per_epoch = -(-n // batch)  # rounded up
    epoch, i = divmod(step, steps_per_epoch)
    return epoch, epoch_order(n, seed, epoch)[i * batch:(i + 1) * batch]


def spread(n, most):
    """At most `most` of the numbers from 0 to n - 1, spread evenly."""
    return range(0, n, max(1, -(-n // most)))


def pack(lengths, capacity):
    """Share items of these lengths among rows of at most `capacity` tokens (best-fit decreasing).

    The longest items are placed first, each into the fullest row that still has room for it. Returns the
    rows, lists of item numbers (0 to len(lengths) - 1). An item longer than `capacity` has a row to itself.
    The first row holds the longest item, so if memory runs out, it does so at once.
    """
    rows = []
    free = []  # (tokens still free, row number) of each row so far, sorted
    for item in np.argsort(-np.asarray(lengths), kind="stable").tolist():
        fullest = bisect.bisect_left(free, (lengths[item], 0))  # place in `free` of the fullest that has room
        if fullest < len(free):
            room, row = free.pop(fullest)
        else:
            room, row = max(capacity, lengths[item]), len(rows)
            rows.append([])
        rows[row].append(item)
        bisect.insort(free, (room - lengths[item], row))
    return rows


def balance(lengths, ranks):
    """Share items among ranks so that all have about the same number of tokens. Returns each rank's item
    numbers."""
    shares, load = [[] for _ in range(ranks)], [0] * ranks
    for item in np.argsort(-np.asarray(lengths), kind="stable").tolist():
        rank = load.index(min(load))
        shares[rank].append(item)
        load[rank] += lengths[item]
    return shares


# ------------------------------------------------------------------------------------------------------------
# Where things lie in a row


class Layout:
    """Where the segments of a row lie. A segment is a context or a completion (with its <eoc>).

    lengths: tokens of each segment, in row order. parents: for each segment the number of its context. A
    context is its own parent, and stands directly before its completions.

    A token sees its whole context, and the tokens before it in its own segment. It never sees a sibling. A
    completion's positions start where its context's end, as if the two stood alone.
    """

    def __init__(self, lengths, parents):
        self.lengths, self.parents = list(map(int, lengths)), list(map(int, parents))
        self.starts = np.cumsum([0, *self.lengths]).tolist()  # each segment's first place, and the row's end
        self.completions = [i for i, parent in enumerate(self.parents) if parent != i]  # segment numbers
        self.ends = torch.tensor([self.starts[i + 1] - 1 for i in self.completions])  # (K,) their last places
        first_position = [0 if parent == i else self.lengths[parent] for i, parent in enumerate(self.parents)]
        shift = np.array(first_position) - self.starts[:-1]  # from a token's place in the row to its position
        self.positions = torch.arange(self.starts[-1]) + self._each_token(shift)  # (T,)
        self.segment = self._each_token(np.arange(len(self.lengths)))  # (T,) which segment a token is in
        self.context = self._each_token(self.parents)  # (T,) which segment is its context
        self._tables = {}

    def _each_token(self, values):
        """One value for each segment -> one for each of its tokens, (T,)."""
        return torch.from_numpy(np.repeat(values, self.lengths))

    def sees(self, query, key):
        """True where the token at place `query` sees the token at place `key`; the two are broadcast."""
        related = (self.segment[key] == self.segment[query]) | (self.segment[key] == self.context[query])
        return related & (key <= query)

    def visible(self, only_ends=False):
        """(T, T) bool: which tokens (columns) each token (row) sees. With only_ends (K, T), for `ends` alone.
        """
        places = torch.arange(self.starts[-1])
        queries = self.ends if only_ends else places
        return self.sees(queries[:, None], places)

    def table(self, name, build):
        """The result of `build()`, which is called once for each name, as all layers use the same table."""
        if name not in self._tables:
            self._tables[name] = build()
        return self._tables[name]


# ------------------------------------------------------------------------------------------------------------
# Comparisons in a row


@dataclass(frozen=True)
class RowFormat:
    """How comparisons are written into rows.

    ctx: tokens that a context and one completion have room for.
    tokenizer: its special tokens `eot` and `eoc` are used.
    eoc: end each completion with <eoc>, where its reward is read. Otherwise it is read at the last token.
    control: token ids of control texts. Every completion is then laid out once behind each of them.
    """
    ctx: int
    tokenizer: object
    eoc: bool = True
    control: tuple = ()

    @property
    def copies(self):
        """What stands before each copy of a completion: the control texts, or for a single copy nothing."""
        return self.control or ((),)

    def context_room(self, lengths):
        """How many tokens of context fit, given the lengths [context, completion, …] of a comparison.

        The longest completion counts even when a step does not lay it out. So the context is cut at the same
        place whichever completions a step takes, and as in evaluation.
        """
        return self.comparison_room - max(lengths[1:]) - 1

    @property
    def comparison_room(self):
        """Tokens of ctx that the longest control text leaves."""
        return self.ctx - max(map(len, self.control), default=0)

    def end_of(self, length):
        """The tokens to set behind a completion of this length. An empty one always needs one, to read its
        reward at."""
        return [self.tokenizer.eoc] if self.eoc or length == 0 else []


class TensorBatch:
    """A batch whose tensors move together: `to` and `pin_memory` do what they do for one tensor."""

    def to(self, device, non_blocking=False):
        return self._each(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self):
        """A copy in memory that a GPU can read while the program goes on."""
        return self._each(torch.Tensor.pin_memory)

    def _each(self, function):
        moved = copy.copy(self)
        for name, value in vars(self).items():
            if isinstance(value, torch.Tensor):
                setattr(moved, name, function(value))
        return moved


@dataclass
class Row(TensorBatch):
    """Comparisons end to end, and all that their losses need besides hidden states.

    It has T tokens, C comparisons, K completions (each copy behind a control text is one), P pairs, and M
    predicted tokens. The last group of fields is None until `predicting` fills it in.
    """
    tokens: torch.Tensor  # (T,)
    layout: Layout
    examples: np.ndarray  # (C,) number of each comparison in the data set

    owner: torch.Tensor  # (K,) the comparison of the row that each completion belongs to, 0 to C - 1
    scores: torch.Tensor  # (K,) its score in the data, fp32
    best: np.ndarray  # (K,) True for the first completion of the highest score in each comparison
    starts: torch.Tensor  # (K,) place of its first token
    ends: torch.Tensor  # (K,) place of its last token, usually <eoc>: the reward is read here

    better: torch.Tensor  # (P,) the completion of each pair that should have the higher reward, 0 to K - 1
    worse: torch.Tensor  # (P,) the other completion of the pair
    pair_weight: torch.Tensor  # (P,) the weights of a comparison's pairs sum to 1

    source: torch.Tensor | None = None  # (M,) place of the hidden state that predicts each predicted token
    target: torch.Tensor | None = None  # (M,) place of that token
    predicted: torch.Tensor | None = None  # (M,) the completion that the token belongs to, 0 to K - 1
    token_weight: torch.Tensor | None = None  # (M,) factor of its loss, or None for 1

    def predicting(self, which):
        """The same row with `source`, `target` and `predicted`, for a language-model loss.

        which: "best" predicts the best completion of each comparison and its <eoc>; "all" predicts all
        completions, without <eoc>, which a plain language model has never seen.
        """
        source, target, predicted = [], [], []
        for k, segment in enumerate(self.layout.completions):
            begin, end = int(self.starts[k]), int(self.ends[k]) + (which == "best")
            if (which == "best" and not self.best[k]) or begin == end:
                continue
            places = np.arange(begin, end)
            target.append(places)
            # A completion's first token is predicted at its context's end, which may lie before its siblings.
            context_end = self.layout.starts[self.layout.parents[segment] + 1] - 1
            source.append(np.concatenate([[context_end], places[:-1]]))
            predicted.append(np.full(len(places), k))
        fields = {"source": source, "target": target, "predicted": predicted}
        empty = np.zeros(0, np.int64)
        arrays = {name: np.concatenate([empty, *parts]) for name, parts in fields.items()}
        return replace(self, **{name: torch.from_numpy(array) for name, array in arrays.items()})


def packed_lengths(data, examples, row_format, kept=None):
    """How many tokens make_row takes for each of these examples: a list of numbers."""
    totals = []
    for i, example in enumerate(examples):
        lengths = data.lengths(example).tolist()
        keep = range(len(lengths) - 1) if kept is None or kept[i] is None else kept[i]
        total = max(1, min(lengths[0], row_format.context_room(lengths)))
        for k in keep:
            for mark in row_format.copies:
                length = len(mark) + lengths[1 + k]
                total += length + len(row_format.end_of(length))
        totals.append(total)
    return totals


def whole_lengths(data, row_format):
    """(C,) how many tokens each comparison of a data set takes with all of its completions: packed_lengths
    for whole data sets, by arrays instead of one by one."""
    sizes, contexts = np.diff(data.offsets), np.asarray(data.first[:-1])
    n_completions = np.diff(data.first) - 1
    in_completions = np.add.reduceat(sizes, contexts) - sizes[contexts]
    context_room = row_format.comparison_room - data.longest() - 1
    n_copies, marks = len(row_format.copies), sum(map(len, row_format.control))
    ends = n_copies * n_completions if row_format.eoc else 0
    in_context = np.clip(sizes[contexts], 1, context_room)
    return in_context + n_copies * in_completions + marks * n_completions + ends


def make_row(data, examples, row_format, kept=None, predict=None):
    """Write comparisons of a data set (with `.segments(i)`, `.lengths(i)` and `.scores(i)`) into one Row.

    kept: for each example the numbers of the completions to lay out, or None for all of them.
    predict: which tokens to predict, as for Row.predicting, or None for no language-model loss.

    A context that is too long is cut on the left. An empty context becomes <eot>, as at a document's
    beginning, so that there is something to predict a completion's first token from.
    """
    parts, lengths, parents = [], [], []  # of segments
    owner, scores, best = [], [], []  # of completions
    row_pairs = []  # of comparisons
    for c, example in enumerate(examples):
        context, *completions = data.segments(example)
        keep = range(len(completions)) if kept is None or kept[c] is None else kept[c]
        kept_scores = data.scores(example)[list(keep)]
        row_pairs.append(_pairs_in_row(kept_scores, len(owner), bool(row_format.control)))

        room = row_format.context_room(data.lengths(example))
        context = context[max(0, len(context) - room):] if len(context) else [row_format.tokenizer.eot]
        parent = len(lengths)
        parts.append(context)
        lengths.append(len(context))
        parents.append(parent)
        for i, k in enumerate(keep):
            for copy, mark in enumerate(row_format.copies):
                end = row_format.end_of(len(mark) + len(completions[k]))
                parts += [mark, completions[k], end]
                lengths.append(len(mark) + len(completions[k]) + len(end))
                parents.append(parent)
                owner.append(c)
                scores.append(kept_scores[i])
                best.append(i == kept_scores.argmax() and copy == 0)

    layout = Layout(lengths, parents)
    better, worse, pair_weight = (np.concatenate(x) for x in zip(*row_pairs))
    tokens = np.concatenate(parts).astype(np.int64)
    row = Row(
        tokens=torch.from_numpy(tokens), layout=layout, examples=np.asarray(examples),
        owner=torch.tensor(owner), best=np.asarray(best),
        scores=torch.tensor(np.asarray(scores), dtype=torch.float32),
        starts=torch.tensor([layout.starts[i] for i in layout.completions]), ends=layout.ends,
        better=torch.from_numpy(better), worse=torch.from_numpy(worse),
        pair_weight=torch.from_numpy(pair_weight).float())
    return row.predicting(predict) if predict else row


def _pairs_in_row(scores, first, binarised):
    """(better, worse, weight) of a comparison's pairs. `first`: the number of its first completion in the
    row.

    Binarised, each completion is there twice, as GOOD and right behind it as BAD. Each ranked pair A > B then
    gives two independent pairs, GOOD:A > BAD:A and BAD:B > GOOD:B (Section 4.3).
    """
    better, worse = pairs(scores)
    if binarised:
        good, bad = first + 2 * np.arange(len(scores)), first + 2 * np.arange(len(scores)) + 1
        better, worse = np.concatenate([good[better], bad[worse]]), np.concatenate([bad[better], good[worse]])
    else:
        better, worse = first + better, first + worse
    return better, worse, np.full(len(better), 1 / max(1, len(better)))
