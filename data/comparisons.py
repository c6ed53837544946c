"""Comparisons, the one record of this project: a context, its completions and their scores.

    {"context": "…", "completions": ["…", "…"], "scores": [2, 0], "group": "…"}      higher scores are better

Files of `{"prompt", "chosen", "rejected"}` and of `{"chosen", "rejected"}` (HH-RLHF: two whole dialogues) are
read as they are.

The group says which comparisons belong together: those about one question, one article or one topic. A whole
group is either trained on or held out, and standard errors are computed over groups. A record without a group
has its context as its group; a dialogue of chosen and rejected has the text before the first reply, because
several records may come from one dialogue. If the context is empty too, its completions are its group.
"""
import contextlib
import hashlib
import itertools
import os
from collections import Counter
from dataclasses import dataclass

import numpy as np
from tqdm import tqdm

from data.errors import InputError
from data.files import build_once, content_key, read_records
from data.text import refuse_special

VERSION = 5  # of the cached arrays; raise it when they change, so that old caches are not read
FORMS = '{"context", "completions", "scores"}, {"prompt", "chosen", "rejected"} or {"chosen", "rejected"}'
TURN = "\n\nAssistant:"  # of a dialogue
BATCH = 4096  # comparisons that are tokenised together, and so held in memory


def parse(record, where):
    """Read one JSON object of any of the three forms. Returns (context, completions, scores, group).

    `where` ("file:line") begins the message of the InputError, which is raised for a missing key, a wrong
    type, a score that is not a number, an empty list of completions, and different numbers of completions and
    scores.
    """
    beginning = ""
    if "completions" in record:
        context, completions = _field(record, "context", where), _field(record, "completions", where)
        scores = _field(record, "scores", where)
        is_list = isinstance(completions, list) and len(completions) > 0
        if not is_list or not all(isinstance(completion, str) for completion in completions):
            raise InputError(f'{where}: "completions" must be a list of at least one text')
        if not isinstance(scores, list) or len(scores) != len(completions):
            raise InputError(f'{where}: "scores" must be a list of one number per completion '
                             f'({len(completions)})')
        for score in scores:
            if isinstance(score, bool) or not isinstance(score, (int, float)) or not abs(score) < 1e300:
                raise InputError(f'{where}: a score must be a finite number, found {str(score)[:40]}')
    else:
        chosen, rejected = (_field(record, key, where) for key in ("chosen", "rejected"))
        if not isinstance(chosen, str) or not isinstance(rejected, str):
            raise InputError(f'{where}: "chosen" and "rejected" must be texts; data.prepare pairs makes texts '
                             "of lists of chat messages")
        context = record.get("prompt")
        if context is None:
            context, chosen, rejected = split_dialogues(chosen, rejected)
        if isinstance(context, str) and TURN in context:
            beginning = context[:context.find(TURN) + len(TURN)]
        completions, scores = [chosen, rejected], [1, 0]
    if not isinstance(context, str):
        raise InputError(f'{where}: the context must be a text, found {type(context).__name__}')
    group = record.get("group")
    if group is None:
        group = beginning or context or sorted(completions)
    if not isinstance(group, str):
        group = repr(group)
    return context, completions, scores, group


def _field(record, key, where):
    if key not in record:
        found = ", ".join(map(repr, record)) or "nothing"
        raise InputError(f'{where}: no "{key}" (expected {FORMS}, found {found})')
    return record[key]


def split_dialogues(chosen, rejected):
    """Split two dialogues of HH-RLHF into (context, completion, completion).

    The context is what both share, up to the beginning of an Assistant's turn. Usually that is the last turn.
    Where the dialogues part earlier, the completions hold the later turns as well.
    """
    shared = os.path.commonprefix([chosen, rejected])
    cut = shared.rfind(TURN)
    cut = cut + len(TURN) if cut >= 0 else 0
    return chosen[:cut], chosen[cut:], rejected[cut:]


def pairs(scores):
    """All pairs of completions of one comparison that have different scores.

    scores: (n,). Returns (better, worse), two arrays (P,) of completion numbers; each pair stands there once.
    """
    scores = np.asarray(scores)
    is_better = scores[:, None] > scores[None, :]  # (n, n): at [i, j] whether completion i is better than j
    return np.nonzero(is_better)


def hash64(text):
    """A whole number from 0 to 2**64 - 1 that is as good as random, and always the same for the same text."""
    # JSON can hold halves of surrogate pairs, which plain UTF-8 refuses.
    digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "little")


@dataclass
class Comparisons:
    """A tokenised data set in memory-mapped arrays: C comparisons of S segments in all. A segment is a
    context or a completion.

    Comparison i consists of the segments from first[i] (its context) up to, not including, first[i + 1].
    Segment s consists of tokens[offsets[s]:offsets[s + 1]].
    """
    tokens: np.ndarray  # all segments end to end
    offsets: np.ndarray  # (S + 1,) where each segment begins in `tokens`
    chars: np.ndarray  # (S,) characters in each segment's text, for the ruler "longer wins"
    segment_scores: np.ndarray  # (S,) each completion's score; 0 for contexts
    first: np.ndarray  # (C + 1,) number of each comparison's first segment
    groups: np.ndarray  # (C,) 64-bit hashes of the groups' names
    lines: np.ndarray  # (C, 2) number of the file and number of the line
    files: list  # names of the files
    counts: dict  # what was found while reading

    def __len__(self):
        return len(self.groups)

    def segments(self, i):
        """Token ids of comparison i: [context, completion, completion, …], arrays without special tokens."""
        bounds = self.offsets[self.first[i]:self.first[i + 1] + 1]
        return [self.tokens[begin:end] for begin, end in zip(bounds, bounds[1:])]

    def lengths(self, i):
        """Numbers of tokens of [context, completion, completion, …], (1 + completions,)."""
        return np.diff(self.offsets[self.first[i]:self.first[i + 1] + 1])

    def scores(self, i):
        """The scores of comparison i's completions."""
        return np.asarray(self.segment_scores[self.first[i] + 1:self.first[i + 1]])

    def where(self, i):
        """The place that comparison i was read from, "file:line"."""
        file, line = self.lines[i]
        return f"{self.files[file]}:{line}"

    def held_out(self, fraction):
        """(C,) True for comparisons of held-out groups. A group's side depends on its own hash alone, so it
        is the same in every file and order, and a smaller fraction's groups are among a larger one's."""
        # The hashes lie evenly between 0 and 2**64, so about this fraction of them lies below the limit.
        limit = min(int(fraction * 2**64), 2**64 - 1)
        return np.asarray(self.groups) < np.uint64(limit)

    def longest(self):
        """(C,) tokens of each comparison's longest completion."""
        return self._over_completions(np.maximum, np.diff(self.offsets))

    def fits(self, ctx):
        """(C,) True where the longest completion, <eoc> and one token of context fit in ctx tokens. A place
        is kept for <eoc> even where none is written, as with --no_eoc and in language models: so all of them
        see the same comparisons, cut at the same places."""
        return self.longest() + 2 <= ctx

    def is_cut(self, ctx):
        """(C,) True where the context has to be cut on the left, so that it, the longest completion and the
        place for <eoc> fit in ctx tokens."""
        context_tokens = np.diff(self.offsets)[self.first[:-1]]
        return context_tokens + self.longest() + 1 > ctx

    def differ(self):
        """(C,) True where not all scores are equal, so that there is something to rank."""
        scores = np.asarray(self.segment_scores)
        return self._over_completions(np.maximum, scores) > self._over_completions(np.minimum, scores)

    def _over_completions(self, function, values):
        """Reduce the values (S,) of each comparison's completions by a function such as np.maximum: (C,)."""
        contexts = np.asarray(self.first[:-1])
        of_completions = np.delete(values, contexts)
        # i contexts stand before comparison i and are deleted, so its completions begin at first[i] - i now.
        # reduceat takes the places where the parts begin, and reduces each part.
        return function.reduceat(of_completions, contexts - np.arange(len(self)))


DTYPES = {"offsets": np.int64, "chars": np.int32, "segment_scores": np.float64, "first": np.int64,
          "groups": np.uint64, "lines": np.int64}

COUNTS = ("comparisons", "completions", "groups", "empty", "identical", "duplicate")


def load_comparisons(files, tokenizer, quiet=False):
    """Read, check and tokenise comparison files. Returns Comparisons.

    The result is cached under the files' content and the tokenizer, so the second time is instant. Memory
    does not grow with the files. Empty completions, equal completions in a comparison and repeated
    comparisons are counted and printed, and kept. Raises InputError with file and line; also for a file
    without any comparison and for a text that contains a special token.
    """
    name = f"comparisons-{content_key(files, tokenizer.key, VERSION)}"
    folder = build_once(name, lambda folder: _build(folder, files, tokenizer))
    data = {key: np.memmap(folder / key, dtype=dtype, mode="r") for key, dtype in DTYPES.items()}
    data["lines"] = data["lines"].reshape(-1, 2)
    if (folder / "tokens").stat().st_size:
        tokens = np.memmap(folder / "tokens", dtype=tokenizer.dtype, mode="r")
    else:  # an empty file cannot be mapped
        tokens = np.zeros(0, tokenizer.dtype)
    counts = dict(zip(COUNTS, np.fromfile(folder / "counts", np.int64).tolist()))
    if not quiet:
        print(f"{', '.join(map(str, files))}: {counts['comparisons']:,} comparisons, "
              f"{counts['completions']:,} completions, {counts['groups']:,} groups, "
              f"{len(tokens):,} tokens; {counts['empty']} empty completions, "
              f"{counts['identical']} comparisons with equal completions, {counts['duplicate']} "
              "repeated comparisons (counted, kept)", flush=True)
    return Comparisons(tokens=tokens, files=list(map(str, files)), counts=counts, **data)


def _build(folder, files, tokenizer):
    """Write the arrays of a data set into `folder`, each into a file of its own."""
    counts, offset, segment = Counter(), 0, 0
    with contextlib.ExitStack() as stack:
        # "hashes", of whole comparisons, only serves to count the duplicates, and is removed then.
        out = {key: stack.enter_context(open(folder / key, "wb")) for key in ("tokens", "hashes", *DTYPES)}

        def write(key, values):
            out[key].write(np.asarray(values, (DTYPES | {"hashes": np.uint64})[key]).tobytes())

        write("offsets", [0])
        write("first", [0])
        size = sum(map(os.path.getsize, files))
        progress = tqdm(total=size, desc="tokenizing", unit="B", unit_scale=True, disable=None)
        stack.enter_context(progress)
        records = _read(files, counts, progress)
        while batch := list(itertools.islice(records, BATCH)):
            for file_number, line, context, completions, scores, group in batch:
                segment += 1 + len(completions)
                write("first", [segment])
                write("hashes", [hash64(repr((context, completions, scores)))])
                write("groups", [hash64(group)])
                write("lines", [file_number, line])
                write("chars", [len(context), *map(len, completions)])
                write("segment_scores", [0, *scores])
            texts = (text for _, _, context, completions, *_ in batch
                     for text in tokenizer.parts(context, completions))
            for ids in tokenizer.encode_many(texts):
                out["tokens"].write(np.asarray(ids, tokenizer.dtype).tobytes())
                offset += len(ids)
                write("offsets", [offset])
    counts["groups"] = len(np.unique(np.fromfile(folder / "groups", np.uint64)))
    counts["duplicate"] = counts["comparisons"] - len(np.unique(np.fromfile(folder / "hashes", np.uint64)))
    os.remove(folder / "hashes")
    np.array([counts[k] for k in COUNTS], np.int64).tofile(folder / "counts")


def _read(files, counts, progress):
    """Yield (file number, line, context, completions, scores, group) for all comparisons, and count what is
    found in them."""
    for file_number, path in enumerate(files):
        before = counts["comparisons"]
        for line, record in read_records(path, progress):
            where = f"{path}:{line}"
            context, completions, scores, group = parse(record, where)
            refuse_special(where, context, *completions)
            counts["comparisons"] += 1
            counts["completions"] += len(completions)
            counts["empty"] += sum(not c.strip() for c in completions)
            counts["identical"] += len(set(completions)) < len(completions)
            yield file_number, line, context, completions, scores, group
        if counts["comparisons"] == before:
            raise InputError(f"{path}: no comparisons in this file (expected lines of {FORMS})")
