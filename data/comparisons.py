"""Comparisons, the one record of this project: a context, its completions and their scores.

    {"context": "…", "completions": ["…", "…"], "scores": [2, 0], "group": "…"}      higher scores are better

`{"prompt", "chosen", "rejected"}` and `{"chosen", "rejected"}` (HH-RLHF: two whole dialogues) are read as they are. The
group (a question, article, topic; where none is given the context, or without one the completions) is what splits and
standard errors go by.
"""
import hashlib
import os
from collections import Counter
from dataclasses import dataclass

import numpy as np
from tqdm import tqdm

from data.errors import InputError
from data.files import build_once, content_key, read_records
from data.text import find_special

VERSION = 2  # of the cached form; a change of it makes the caches anew
FORMS = '{"context", "completions", "scores"}, {"prompt", "chosen", "rejected"} or {"chosen", "rejected"}'


def parse(record, where):
    """One JSON object of any of the three forms -> (context, completions, scores, group).

    `where` ("file:line") begins the message of the InputError raised for a missing key, a wrong type, a score that is
    not a number, no completions, or numbers of completions and scores that differ.
    """
    if "completions" in record:
        context, completions, scores = (_field(record, key, where) for key in ("context", "completions", "scores"))
        if not isinstance(completions, list) or not completions or not all(isinstance(c, str) for c in completions):
            raise InputError(f'{where}: "completions" must be a list of at least one text')
        if not isinstance(scores, list) or len(scores) != len(completions):
            raise InputError(f'{where}: "scores" must be a list of one number per completion ({len(completions)})')
        for score in scores:
            if isinstance(score, bool) or not isinstance(score, (int, float)) or not abs(score) < 1e300:
                raise InputError(f'{where}: a score must be a finite number, found {str(score)[:40]}')
    else:
        chosen, rejected = (_field(record, key, where) for key in ("chosen", "rejected"))
        if not isinstance(chosen, str) or not isinstance(rejected, str):
            raise InputError(f'{where}: "chosen" and "rejected" must be texts')
        context = record.get("prompt")
        if context is None:
            context, chosen, rejected = split_dialogues(chosen, rejected)
        completions, scores = [chosen, rejected], [1, 0]
    if not isinstance(context, str):
        raise InputError(f'{where}: the context must be a text, found {type(context).__name__}')
    group = record.get("group")
    if group is None:
        group = context or sorted(completions)  # of a file without contexts, not all is one group
    return context, completions, scores, group if isinstance(group, str) else repr(group)


def _field(record, key, where):
    if key not in record:
        raise InputError(f'{where}: no "{key}" (expected {FORMS}, found {", ".join(map(repr, record)) or "nothing"})')
    return record[key]


def split_dialogues(chosen, rejected):
    """HH-RLHF: two dialogues -> the text both share up to an Assistant's turn, and where each goes on from there.

    Usually that turn is the last one; where the dialogues part earlier, the completions hold the later turns as well.
    """
    shared = os.path.commonprefix([chosen, rejected])
    turn = "\n\nAssistant:"
    cut = shared.rfind(turn)
    cut = cut + len(turn) if cut >= 0 else 0
    return chosen[:cut], chosen[cut:], rejected[cut:]


def hash64(text):
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")


@dataclass
class Comparisons:
    """A tokenised data set in memory-mapped arrays. Comparison i is segments first[i] (context) to first[i + 1] - 1."""
    tokens: np.ndarray  # all segments end to end
    offsets: np.ndarray  # (S + 1,) where each segment begins in `tokens`
    chars: np.ndarray  # (S,) characters in each segment's text
    segment_scores: np.ndarray  # (S,) each completion's score; 0 for contexts
    first: np.ndarray  # (C + 1,)
    groups: np.ndarray  # (C,) 64-bit hashes
    lines: np.ndarray  # (C, 2) number of the file, number of the line
    files: list  # names of the files
    counts: dict  # what was found while reading

    def __len__(self):
        return len(self.groups)

    def segments(self, i):
        """[context, completion, completion, …] as arrays of token ids, without specials."""
        a, b = int(self.first[i]), int(self.first[i + 1])
        cuts = self.offsets[a:b + 1]
        whole = self.tokens[cuts[0]:cuts[-1]]
        return np.split(whole, (cuts[1:-1] - cuts[0]).astype(np.int64))

    def scores(self, i):
        return np.asarray(self.segment_scores[self.first[i] + 1:self.first[i + 1]])

    def lengths(self, i):
        """Tokens of [context, completion, …] without reading them."""
        return np.diff(self.offsets[self.first[i]:self.first[i + 1] + 1]).astype(np.int64)

    def where(self, i):
        file, line = self.lines[i]
        return f"{self.files[file]}:{line}"

    def held_out(self, fraction):
        """(C,) True for comparisons of held-out groups. A group's side depends on its own hash alone, so it is the same
        in every file and order, and a smaller fraction's groups are among a larger one's."""
        return np.asarray(self.groups) < np.uint64(min(int(fraction * 2**64), 2**64 - 1))

    def fits(self, ctx):
        """(C,) True where the longest completion, its <eoc> and one token of context fit in ctx tokens."""
        sizes = np.diff(np.asarray(self.offsets))
        sizes[np.asarray(self.first[:-1])] = 0  # contexts can be cut
        return np.maximum.reduceat(sizes, np.asarray(self.first[:-1])) + 2 <= ctx

    def differ(self):
        """(C,) True where not all scores are equal: there is something to rank."""
        contexts = np.asarray(self.first[:-1])
        high, low = np.array(self.segment_scores), np.array(self.segment_scores)
        high[contexts], low[contexts] = -np.inf, np.inf
        return np.maximum.reduceat(high, contexts) > np.minimum.reduceat(low, contexts)

    def packed_lengths(self, examples, chosen, ctx, eoc=True, control=()):
        """Tokens each example takes in a row; see packing.make_row."""
        copies, marks, longest = max(1, len(control)), sum(map(len, control)), max(map(len, control), default=0)
        total = []
        for i, keep in zip(examples, chosen):
            context, *completions = self.lengths(i).tolist()
            room = ctx - max(completions) - 1 - longest
            keep = range(len(completions)) if keep is None else keep
            ends = sum(eoc or not completions[k] + longest for k in keep)
            total.append(max(1, min(context, room)) + copies * (sum(completions[k] for k in keep) + ends) + marks * len(keep))
        return total


DTYPES = {"offsets": np.int64, "chars": np.int32, "segment_scores": np.float64, "first": np.int64,
          "groups": np.uint64, "lines": np.int64}

COUNTS = ("comparisons", "completions", "groups", "empty", "identical", "duplicate")


def load_comparisons(files, tokenizer, quiet=False):
    """Read, check and tokenise comparison files; cached by content and tokenizer, so the second time is instant.

    Memory does not grow with the files. What was found (empty completions, equal completions in a comparison, repeated
    comparisons) is counted and printed, not dropped. Raises InputError naming file and line; also for files without any
    comparison and for texts that contain a special token.
    """
    name = f"comparisons-{content_key(files, tokenizer.key, VERSION)}"
    folder = build_once(name, lambda folder: _build(folder, files, tokenizer))
    data = {key: np.memmap(folder / key, dtype=dtype, mode="r") for key, dtype in DTYPES.items()}
    data["lines"] = data["lines"].reshape(-1, 2)
    path = folder / "tokens"
    tokens = np.memmap(path, dtype=tokenizer.dtype, mode="r") if path.stat().st_size else np.zeros(0, tokenizer.dtype)
    counts = dict(zip(COUNTS, np.fromfile(folder / "counts", np.int64).tolist()))
    if not quiet:
        print(f"{', '.join(map(str, files))}: {counts['comparisons']:,} comparisons, {counts['completions']:,} completions, "
              f"{counts['groups']:,} groups, {len(tokens):,} tokens; {counts['empty']} empty completions, "
              f"{counts['identical']} comparisons with equal completions, {counts['duplicate']} repeated comparisons "
              "(counted, kept)", flush=True)
    return Comparisons(tokens=tokens, files=list(map(str, files)), counts=counts, **data)


def _build(folder, files, tokenizer):
    out = {key: open(folder / key, "wb") for key in ("tokens", "keys", *DTYPES)}
    counts = Counter()

    def write(key, values):
        out[key].write(np.asarray(values, DTYPES.get(key, np.uint64)).tobytes())

    def texts(progress):
        segment = 0
        for file_number, path in enumerate(files):
            before = counts["comparisons"]
            for line, record in read_records(path, progress):
                where = f"{path}:{line}"
                context, completions, scores, group = parse(record, where)
                for special in filter(None, map(find_special, (context, *completions))):
                    raise InputError(f"{where}: the text holds {special}, a special token; write it differently there")
                counts["comparisons"] += 1
                counts["completions"] += len(completions)
                counts["empty"] += sum(not c.strip() for c in completions)
                counts["identical"] += len(set(completions)) < len(completions)
                write("keys", [hash64(repr((context, completions, scores)))])
                write("groups", [hash64(group)])
                write("lines", [file_number, line])
                write("chars", [len(context), *map(len, completions)])
                write("segment_scores", [0, *scores])
                write("first", [segment])
                segment += 1 + len(completions)
                yield from (context, *completions)
            if counts["comparisons"] == before:
                raise InputError(f"{path}: no comparisons in this file (expected lines of {FORMS})")
        write("first", [segment])

    offset = 0
    write("offsets", [0])
    with tqdm(total=sum(map(os.path.getsize, files)), desc="tokenizing", unit="B", unit_scale=True, disable=None) as progress:
        for ids in tokenizer.encode_many(texts(progress)):
            out["tokens"].write(np.asarray(ids, tokenizer.dtype).tobytes())
            offset += len(ids)
            write("offsets", [offset])
    for file in out.values():
        file.close()
    counts["groups"] = len(np.unique(np.fromfile(folder / "groups", np.uint64)))
    counts["duplicate"] = counts["comparisons"] - len(np.unique(np.fromfile(folder / "keys", np.uint64)))
    os.remove(folder / "keys")
    np.array([counts[k] for k in COUNTS], np.int64).tofile(folder / "counts")
