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


@functools.lru_cache(maxsize=2)  # made once an epoch, not at every step
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


def pack_for_rank(lengths, capacity, rank, ranks):
    """The rows of one rank, lists of item numbers: its share of the items by `balance`, in rows by `pack`."""
    mine = balance(lengths, ranks)[rank]
    return [[mine[j] for j in row] for row in pack([lengths[i] for i in mine], capacity)]


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
        # A token's place counts from the row's start. Its position, which the model goes by, counts from its
        # context's start: it is the place plus a shift that all tokens of a segment share.
        shift = np.array(first_position) - self.starts[:-1]
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
        """What attention works out from a layout, such as which keys each block of queries sees: the result of
        `build()`, which is called once for each name, as all layers use the same table."""
        if name not in self._tables:
            self._tables[name] = build()
        return self._tables[name]


# ------------------------------------------------------------------------------------------------------------
# Comparisons in a row


@dataclass(frozen=True)
class RowFormat:
    """How comparisons are written into rows.

    ctx: the most tokens that a context and one completion may take together.
    tokenizer: its special tokens `eot` and `eoc` are used.
    eoc: end each completion with <eoc>, where its reward is read. Otherwise it is read at the last token.
    control: token ids of the control texts GOOD and BAD, for binarised training (Section 4): each
        completion is then laid out twice, once behind each. None: once, as it is.
    """
    ctx: int
    tokenizer: object
    eoc: bool = True
    control: tuple | None = None

    @property
    def beginnings(self):
        """What stands before the copies of a completion: the control texts, or nothing before a single copy."""
        return self.control or ((),)

    @property
    def comparison_room(self):
        """Tokens of ctx that the longest control text leaves."""
        return self.ctx - max(map(len, self.beginnings))

    def context_room(self, longest):
        """How many tokens of context fit, if a comparison's longest completion has `longest` tokens.

        The longest one counts even where --max_completions leaves it out, and a place for <eoc> even where
        none is written. So a context is always cut at the same place, in training and in evaluation.
        """
        return self.comparison_room - longest - 1

    def end_of(self, length):
        """The tokens to set behind a completion of this length. An empty completion always gets <eoc>, as its
        reward needs a token to be read at."""
        return [self.tokenizer.eoc] if self.eoc or length == 0 else []


class TensorBatch:
    """A batch that moves between devices as one tensor does: `to` and `pin_memory` return a copy of it in
    which every attribute that is a tensor was moved. A layout stays on the CPU; the model moves what it needs
    of it."""

    def to(self, device, non_blocking=False):
        return self._map_tensors(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self):
        """In memory that a GPU can read while the program goes on."""
        return self._map_tensors(torch.Tensor.pin_memory)

    def _map_tensors(self, function):
        moved = copy.copy(self)
        for name, value in vars(self).items():
            if isinstance(value, torch.Tensor):
                setattr(moved, name, function(value))
        return moved


@dataclass
class Row(TensorBatch):
    """Comparisons end to end, and all that their losses need besides hidden states.

    It has T tokens, C comparisons, K completions (each copy behind a control text is one), P pairs, and M
    predicted tokens. The last group of fields is for language-model losses: `predicting` fills in
    the first three of them, and train_pm.py the weight, where tokens do not count alike.
    """
    tokens: torch.Tensor  # (T,)
    layout: Layout
    examples: np.ndarray  # (C,) number of each comparison in the data set

    owner: torch.Tensor  # (K,) the comparison of the row that each completion belongs to, 0 to C - 1
    scores: torch.Tensor  # (K,) its score in the data, fp32
    best: np.ndarray  # (K,) True for a comparison's first completion of the highest score, in its first copy
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

        which: "best" predicts the best completion of each comparison, to its last token, which is <eoc> if
        the row has it. A control text belongs to its completion, so it is predicted, too. "all" is for a row
        with <eoc>: it predicts all completions without it, as a plain language model has never seen it.

        A completion's first token is predicted at its context's end, which may lie before its siblings:

            place              0   1    2   3   4       5   6
            row               [H   i]  [a   b   <eoc>] [c   <eoc>]
            target, for "all"           2   3           5
            source                      1   2           1
        """
        source, target, predicted = [], [], []
        for k, segment in enumerate(self.layout.completions):
            if which == "best" and not self.best[k]:
                continue
            last = int(self.ends[k])
            places = np.arange(int(self.starts[k]), last + 1 if which == "best" else last)
            context_end = self.layout.starts[self.layout.parents[segment] + 1] - 1
            target.append(places)
            source.append(np.concatenate([[context_end], places])[:len(places)])
            predicted.append(np.full(len(places), k))
        fields = {"source": source, "target": target, "predicted": predicted}
        empty = np.zeros(0, np.int64)  # for a row that predicts nothing
        arrays = {name: np.concatenate([empty, *parts]) for name, parts in fields.items()}
        return replace(self, **{name: torch.from_numpy(array) for name, array in arrays.items()})


def packed_lengths(data, examples, row_format, kept=None):
    """How many tokens make_row takes for each of these examples: a list of numbers. kept: as for make_row."""
    totals = []
    for example, keep in zip(examples, kept or [None] * len(examples)):
        lengths = data.lengths(example).tolist()
        keep = range(len(lengths) - 1) if keep is None else keep
        total = max(1, min(lengths[0], row_format.context_room(max(lengths[1:]))))  # <eot> if it is empty
        for k in keep:
            for beginning in row_format.beginnings:
                length = len(beginning) + lengths[1 + k]
                total += length + len(row_format.end_of(length))
        totals.append(total)
    return totals


def whole_lengths(data, row_format):
    """(C,) how many tokens each comparison of a data set takes with all of its completions: packed_lengths
    for whole data sets, by arrays instead of one by one. Without row_format.eoc it ignores that an empty
    completion gets an <eoc> even then: it only serves to say how long rows are, where one token is nothing."""
    sizes, contexts = np.diff(data.offsets), np.asarray(data.first[:-1])  # of segments; their numbers
    n_completions = np.diff(data.first) - 1
    in_completions = np.add.reduceat(sizes, contexts) - sizes[contexts]  # all of a comparison but its context
    in_context = np.clip(sizes[contexts], 1, row_format.context_room(data.longest()))
    n_copies, in_controls = len(row_format.beginnings), sum(map(len, row_format.beginnings))
    ends = n_copies * n_completions if row_format.eoc else 0
    return in_context + n_copies * in_completions + in_controls * n_completions + ends


def make_row(data, examples, row_format, kept=None, predict=None):
    """Write comparisons of a data set (with `.segments(i)`, `.lengths(i)` and `.scores(i)`) into one Row.

    kept: for each example the numbers of the completions to lay out, or None for all of them.
    predict: which tokens to predict, as for Row.predicting, or None for no language-model loss.

    A context that is too long is cut on the left; data/selection.py counts and reports these. An empty
    context becomes <eot>, as at a document's beginning, so that there is something to predict a completion's
    first token from.
    """
    segments, parents = [], []  # token ids of each segment, and the number of its context
    owner, scores, best = [], [], []  # of completions
    row_pairs = []  # of comparisons
    for c, (example, keep) in enumerate(zip(examples, kept or [None] * len(examples))):
        context, *completions = data.segments(example)
        keep = range(len(completions)) if keep is None else keep
        kept_scores = data.scores(example)[list(keep)]
        row_pairs.append(_pairs_in_row(kept_scores, len(owner), is_binarised=row_format.control is not None))

        room = row_format.context_room(max(map(len, completions)))
        context = context[max(0, len(context) - room):] if len(context) else [row_format.tokenizer.eot]
        parent = len(segments)
        segments.append(context)
        parents.append(parent)
        for i, k in enumerate(keep):
            for n_copy, beginning in enumerate(row_format.beginnings):
                end = row_format.end_of(len(beginning) + len(completions[k]))
                segments.append(np.concatenate([beginning, completions[k], end]))
                parents.append(parent)
                owner.append(c)
                scores.append(kept_scores[i])
                best.append(i == kept_scores.argmax() and n_copy == 0)

    layout = Layout(map(len, segments), parents)
    better, worse, pair_weight = (np.concatenate(x) for x in zip(*row_pairs))
    row = Row(
        tokens=torch.from_numpy(np.concatenate(segments).astype(np.int64)), layout=layout,
        examples=np.asarray(examples),
        owner=torch.tensor(owner), best=np.asarray(best),
        scores=torch.tensor(np.asarray(scores), dtype=torch.float32),
        starts=torch.tensor([layout.starts[i] for i in layout.completions]), ends=layout.ends,
        better=torch.from_numpy(better), worse=torch.from_numpy(worse),
        pair_weight=torch.from_numpy(pair_weight).float())
    return row.predicting(predict) if predict else row


def _pairs_in_row(scores, first, is_binarised):
    """(better, worse, weight) of a comparison's pairs. `first`: the number of its first completion in the
    row.

    Binarised, each completion is there twice, as GOOD and right behind it as BAD. Each ranked pair A > B then
    gives two independent pairs, GOOD:A > BAD:A and BAD:B > GOOD:B (Section 4).
    """
    better, worse = pairs(scores)
    if is_binarised:
        good, bad = first + 2 * np.arange(len(scores)), first + 2 * np.arange(len(scores)) + 1
        better, worse = np.concatenate([good[better], bad[worse]]), np.concatenate([bad[better], good[worse]])
    else:
        better, worse = first + better, first + worse
    return better, worse, np.full(len(better), 1 / max(1, len(better)))
