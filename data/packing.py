"""Rows: which examples a step takes, how comparisons are packed into rows, and what a row holds.

A row holds comparisons end to end, without padding:

    [context][completion 1 <eoc>][completion 2 <eoc>] [context][completion 1 <eoc>] …

Everything here is a pure function of (seed, step, example), and everything is made on the CPU, so that a
device only has to multiply matrices. A run therefore resumes with one integer, and one rank or eight see the
same batches.
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
    """At most `most` of the numbers from 0 to n - 1, evenly spread."""
    return range(0, n, max(1, -(-n // most)))


def pack(lengths, capacity):
    """Share items of these lengths among rows of at most `capacity` tokens, by best-fit decreasing.

    Returns the rows, lists of item numbers (places in `lengths`). An item longer than `capacity` has a row to
    itself. The longest items come first, so the first row needs the most memory.
    """
    rows = []
    free = []  # (tokens still free, row number) of each row that was begun, sorted
    for item in np.argsort(-np.asarray(lengths), kind="stable").tolist():
        fullest = bisect.bisect_left(free, (lengths[item], 0))  # of the rows with enough room
        if fullest < len(free):
            room, row = free.pop(fullest)
        else:
            room, row = max(capacity, lengths[item]), len(rows)
            rows.append([])
        rows[row].append(item)
        bisect.insort(free, (room - lengths[item], row))
    return rows


def balance(lengths, ranks):
    """Share items among ranks so that each has about the same number of tokens: a list of item numbers for
    each."""
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

    lengths: tokens of each segment, in row order. parents: for each segment the number of its context; a
    context is its own parent, and stands directly before its completions. A token sees the tokens before it
    in its own segment and its whole context. It never sees a sibling. Its position goes on from its context's
    end, as if the context and this completion stood there alone.
    """

    def __init__(self, lengths, parents):
        self.lengths, self.parents = list(map(int, lengths)), list(map(int, parents))
        self.starts = np.cumsum([0, *self.lengths]).tolist()  # of each segment, and the row's end
        self.completions = [i for i, parent in enumerate(self.parents) if parent != i]  # segment numbers
        self.ends = torch.tensor([self.starts[i + 1] - 1 for i in self.completions])  # (K,) their last tokens
        first_position = [0 if parent == i else self.lengths[parent] for i, parent in enumerate(self.parents)]
        to_position = np.array(first_position) - self.starts[:-1]  # what to add to a place in the row
        self.positions = torch.arange(self.starts[-1]) + self._each_token(to_position)  # (T,)
        self.segment = self._each_token(np.arange(len(self.lengths)))  # (T,) which segment a token is in
        self.context = self._each_token(self.parents)  # (T,) which segment is its context
        self._tables = {}

    def _each_token(self, values):
        """One value for each segment -> one for each of its tokens, (T,)."""
        return torch.from_numpy(np.repeat(values, self.lengths))

    def sees(self, query, key):
        """True where the token at place `query` sees the token at place `key`, in the shape the two broadcast
        to."""
        related = (self.segment[key] == self.segment[query]) | (self.segment[key] == self.context[query])
        return related & (key <= query)

    def visible(self, only_ends=False):
        """(T, T) bool: which tokens (columns) each token (row) sees. With only_ends the rows are `ends`: (K,
        T)."""
        places = torch.arange(self.starts[-1])
        queries = self.ends if only_ends else places
        return self.sees(queries[:, None], places)

    def table(self, name, build):
        """What `build()` returned the first time it was asked for under this name: all layers use one table.
        """
        if name not in self._tables:
            self._tables[name] = build()
        return self._tables[name]


# ------------------------------------------------------------------------------------------------------------
# Comparisons in a row


@dataclass(frozen=True)
class RowFormat:
    """How comparisons are written into rows.

    ctx: tokens that a context and one completion have room for. tokenizer: its `eot` and `eoc` are used. eoc:
    each completion ends with <eoc>, where its reward is read; without, it is read at the completion's last
    token. control: token ids of control texts; every completion then stands there once behind each of them.
    """
    ctx: int
    tokenizer: object
    eoc: bool = True
    control: tuple = ()

    @property
    def copies(self):
        """The token ids to set before each copy of a completion: those of each control text, or nothing,
        once."""
        return self.control or ((),)

    def context_room(self, lengths):
        """Tokens that a context may have, given the lengths [context, completion, …] of a comparison.

        The longest completion counts even if it is not laid out. So a comparison's context is the same
        whichever of its completions a step takes, and the same as in evaluation.
        """
        return self.comparison_room - max(lengths[1:]) - 1

    @property
    def comparison_room(self):
        """Tokens that are left of ctx beside the longest control text."""
        return self.ctx - max(map(len, self.control), default=0)

    def end_of(self, length):
        """The tokens that follow a completion of this length. An empty one needs a token to read its reward
        at."""
        return [self.tokenizer.eoc] if self.eoc or length == 0 else []


class TensorBatch:
    """A batch whose tensors move together, as a single tensor would with the methods of these names."""

    def to(self, device, non_blocking=False):
        return self._each(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self):
        """The same in memory that a GPU can copy from while the program goes on."""
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

    T tokens, C comparisons, K completions (with control texts a completion counts once for each), P pairs, M
    predicted tokens. The last group of fields is None until `predicting` fills it.
    """
    tokens: torch.Tensor  # (T,)
    layout: Layout
    examples: np.ndarray  # (C,) number of each comparison in the data set

    owner: torch.Tensor  # (K,) which of the row's comparisons each completion belongs to, 0 to C - 1
    completion: np.ndarray  # (K,) which completion of its comparison it is
    scores: torch.Tensor  # (K,) the data's score of each completion, fp32
    best: np.ndarray  # (K,) True for each comparison's first completion of the highest score
    starts: torch.Tensor  # (K,) place of each completion's first token
    ends: torch.Tensor  # (K,) place of its last one, <eoc> if it has one: the reward is read here

    better: torch.Tensor  # (P,) of each pair the completion that should have the higher reward, 0 to K - 1
    worse: torch.Tensor  # (P,) and the other one
    pair_weight: torch.Tensor  # (P,) the weights of a comparison's pairs sum to 1

    source: torch.Tensor | None = None  # (M,) place of the hidden state that a token is predicted from
    target: torch.Tensor | None = None  # (M,) place of this token
    predicted: torch.Tensor | None = None  # (M,) the completion that it belongs to, 0 to K - 1
    token_weight: torch.Tensor | None = None  # (M,) factor of its loss; None: 1

    def predicting(self, which):
        """The same row with the tokens that a language-model loss predicts (`source`, `target`, `predicted`).

        which: "best": each comparison's best completion and the <eoc> behind it. "all": all completions,
        without <eoc>, which a plain language model has never seen.
        """
        source, target, predicted = [], [], []
        for k, segment in enumerate(self.layout.completions):
            begin, end = int(self.starts[k]), int(self.ends[k]) + (which == "best")
            if (which == "best" and not self.best[k]) or begin == end:
                continue
            places = np.arange(begin, end)
            target.append(places)
            # The first token is predicted from the context's last one, which need not be the one before it.
            context_end = self.layout.starts[self.layout.parents[segment] + 1] - 1
            source.append(np.concatenate([[context_end], places[:-1]]))
            predicted.append(np.full(len(places), k))
        fields = {"source": source, "target": target, "predicted": predicted}
        empty = np.zeros(0, np.int64)
        arrays = {name: np.concatenate([empty, *parts]) for name, parts in fields.items()}
        return replace(self, **{name: torch.from_numpy(array) for name, array in arrays.items()})


def packed_lengths(data, examples, row_format, kept=None):
    """How many tokens each example takes in a row: a list of numbers. `kept` as for make_row."""
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
    """(C,) how many tokens each comparison of a data set takes in a row with all of its completions."""
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

    kept: for each example the numbers of the completions to lay out, or None for all of them. A context that
    is too long is cut on the left. An empty context becomes <eot>, as at the beginning of a document, so that
    a completion's first token is predicted from something. predict: which tokens to predict, see
    Row.predicting.
    """
    parts, lengths, parents = [], [], []  # of segments
    owner, completion, scores, best = [], [], [], []  # of completions
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
                completion.append(k)
                scores.append(kept_scores[i])
                best.append(i == kept_scores.argmax() and copy == 0)

    layout = Layout(lengths, parents)
    better, worse, pair_weight = (np.concatenate(x) for x in zip(*row_pairs))
    tokens = np.concatenate(parts).astype(np.int64)
    row = Row(
        tokens=torch.from_numpy(tokens), layout=layout, examples=np.asarray(examples),
        owner=torch.tensor(owner), completion=np.asarray(completion), best=np.asarray(best),
        scores=torch.tensor(np.asarray(scores), dtype=torch.float32),
        starts=torch.tensor([layout.starts[i] for i in layout.completions]), ends=layout.ends,
        better=torch.from_numpy(better), worse=torch.from_numpy(worse),
        pair_weight=torch.from_numpy(pair_weight).float())
    return row.predicting(predict) if predict else row


def _pairs_in_row(scores, first, binarised):
    """The pairs (better, worse, weight) of a comparison whose completions begin at number `first` of the row.

    Binarised, each completion stands there twice, as GOOD and then as BAD, and each ranked pair A > B gives
    the two independent pairs GOOD:A > BAD:A and BAD:B > GOOD:B (Section 4.3).
    """
    better, worse = pairs(scores)
    if binarised:
        good, bad = first + 2 * np.arange(len(scores)), first + 2 * np.arange(len(scores)) + 1
        better, worse = np.concatenate([good[better], bad[worse]]), np.concatenate([bad[better], good[worse]])
    else:
        better, worse = first + better, first + worse
    return better, worse, np.full(len(better), 1 / max(1, len(better)))
