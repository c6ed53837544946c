"""Text for language modelling: reading documents, a cached stream of tokens, and the order of its windows."""
import collections
import dataclasses
import hashlib
import json
import os
import shutil

import numpy as np
from tqdm import tqdm

from data.errors import InputError
from data.files import PACKED, build_once, content_key, parse_json, read_lines, write_file

EOT, EOC = "<eot>", "<eoc>"  # ends a document; ends a comparison's completion (the paper's end-of-context token)
PIECE = 2**20  # characters: a .txt file is one document, however large, so it is read in pieces of about this size
VERSION = 1  # of the caches below: raise it when their content changes
SIDES = ("train", "held_out")


@dataclasses.dataclass
class Text:
    """Documents as one stream of tokens, each followed by <eot>."""
    tokens: np.ndarray  # (n,) of the tokenizer's dtype, memory-mapped from the cache and not writable
    n_docs: int  # documents, whole or in part
    n_bytes: int  # of their text in UTF-8


def valid_unicode(text):
    """`text` with half surrogate pairs, which JSON can smuggle in and UTF-8 cannot hold, replaced by U+FFFD."""
    try:
        text.encode()
        return text
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def find_special(text):
    """The first of "<eot>", "<eoc>" that stands in `text`, or None. In text they would read as a document's end."""
    return next((special for special in (EOT, EOC) if special in text), None)


def read_texts(files, progress=None):
    """Yield (path, line number, text) for the documents of JSON-lines files ({"text": …}) and of .txt files.

    A .txt file is one document, given in pieces of about 1 MB that join to the whole. A document may be empty. Raises
    InputError with file and line: not UTF-8, not JSON, no "text", a "text" that is not a string, a special token in
    the text; and for a file that holds no document. `progress`: as for read_lines.
    """
    for path, number, text, _ in read_pieces(files, progress):
        yield path, number, text


def read_pieces(files, progress=None):
    """As read_texts, with a fourth item: whether the document ends with this piece."""
    for path in files:
        is_plain = str(path).endswith(tuple(".txt" + packed for packed in PACKED))
        number = 0
        for number, text, ends in (_txt_pieces if is_plain else _json_texts)(path, progress):
            if special := find_special(text):
                if is_plain:
                    number += text.count("\n", 0, text.index(special))
                raise InputError(f"{path}:{number}: the text holds {special}, a special token; write it differently "
                                 f"there, for example {special[:-1]} >")
            yield path, number, text, ends
        if number == 0:
            raise InputError(f"{path}: no documents in this file")


def _json_texts(path, progress):
    for number, line in read_lines(path, progress):
        if not line.strip():
            continue
        record = parse_json(path, number, line)
        if "text" not in record:
            raise InputError(f'{path}:{number}: no "text" in this record (its keys: {", ".join(record)[:80]}); text '
                             'for language modelling is lines of {"text": "…"}, or .txt files')
        if not isinstance(record["text"], str):
            raise InputError(f'{path}:{number}: "text" must be a string, found {str(record["text"])[:40]!r}')
        yield number, valid_unicode(record["text"]), True


def _txt_pieces(path, progress):
    """Cut only before a line end that visible text follows: there a cut changes no token, as the split pattern never
    joins a line end to what comes after it, and gives the last of several blanks a token of its own."""
    lines, size, first = [], 0, 1
    for number, line in read_lines(path, progress):
        try:
            line = line.decode("utf-8")
        except UnicodeDecodeError as error:
            raise InputError(f"{path}:{number}: not UTF-8 text ({error.reason} at byte {error.start}); "
                             "is this a text file?") from None
        if size > PIECE and line and not line[0].isspace():
            yield first, "\n".join(lines), False
            lines, size, first = [""], 0, number - 1  # the empty line keeps the line end before this one
        lines.append(line)
        size += len(line) + 1
    if lines:
        yield first, "\n".join(lines), True


def load_text(files, tokenizer, held_out=0.01):
    """(training Text, held-out Text) of the documents in `files`, from the cache or, once, built into it.

    About the fraction `held_out` of the documents is held out. A document's own text (a .txt file's first piece)
    decides, so its side depends neither on the order nor on the other documents, and its copies go where it goes.
    Where that leaves a side empty, the stream's last part is held out instead. Prints what was built. Raises
    InputError as read_texts does, and where all documents are empty.
    """
    if not 0 < held_out < 1:
        raise InputError(f"the part of the text to hold out must lie between 0 and 1, found {held_out}")
    files = list(files)
    folder = build_once(f"text-{content_key(files, 'text', tokenizer.key, held_out, VERSION)}",
                        lambda folder: _build(folder, files, tokenizer, held_out))
    meta = json.loads((folder / "meta.json").read_text())
    return tuple(Text(np.memmap(folder / f"{side}.bin", tokenizer.dtype, "r"), **meta[side]) for side in SIDES)


def lm_windows(text, ctx, seed, epoch):
    """Where the training windows of an epoch start, in the order of training: (n,) int64, n the same in every epoch.

    A window starting at s has inputs tokens[s : s + ctx] and targets tokens[s + 1 : s + ctx + 1]. They follow one
    another from a random offset in [0, ctx); where the last would pass the end it is moved back to end there, so that
    every epoch has as many. Fewer than ctx tokens, at the stream's two ends, are left out. A pure function of (seed,
    epoch). Raises InputError if the stream is shorter than one window.
    """
    n_tokens = len(text.tokens)
    if n_tokens < ctx + 1:
        raise InputError(f"the text has {n_tokens} tokens, fewer than one window of {ctx} + 1; "
                         "give a smaller --ctx or more text")
    random = np.random.default_rng((seed, epoch))
    starts = random.integers(ctx) + ctx * np.arange((n_tokens - 1) // ctx)
    return random.permutation(np.minimum(starts, n_tokens - ctx - 1))


def _build(folder, files, tokenizer, held_out):
    """Write train.bin, held_out.bin and meta.json; only what is under way is in memory."""
    n_empty = 0
    under_way = collections.deque()  # for each piece being encoded: its side, and whether its document ends with it

    def texts(progress):
        nonlocal n_empty
        begins = True
        for _, _, text, ends in read_pieces(files, progress):
            if begins and ends and (not text or text.isspace()):
                n_empty += 1
                continue
            if begins:
                side = _side(text, held_out)
            under_way.append((side, ends))
            begins = ends
            yield text

    on_disk = sum(map(os.path.getsize, files))
    eot = np.array([tokenizer.eot], tokenizer.dtype)
    train, held = (folder / f"{side}.bin" for side in SIDES)
    with tqdm(total=on_disk, desc="tokenizing", unit="B", unit_scale=True, disable=None) as progress, \
            open(train, "wb") as train_file, open(held, "wb") as held_file:
        if progress.disable:  # not on a terminal
            print(f"tokenizing {on_disk / 1e6:.1f} MB of files", flush=True)
        for ids in tokenizer.encode_many(texts(progress)):
            side, ends = under_way.popleft()
            file = train_file if side == "train" else held_file
            file.write(ids)
            if ends:
                file.write(eot)
    if not (train.stat().st_size or held.stat().st_size):
        raise InputError(f"{files[0]}: all {n_empty} documents here and in the other files are empty; give text")
    by_document = train.stat().st_size and held.stat().st_size
    if not by_document:
        _hold_out_the_end(train, held, held_out, eot.itemsize)

    meta = {side: _count(folder / f"{side}.bin", tokenizer) for side in SIDES}
    write_file(folder / "meta.json", json.dumps(meta))
    n_tokens, n_held = sum(map(os.path.getsize, (train, held))) // eot.itemsize, held.stat().st_size // eot.itemsize
    n_docs, n_bytes = (sum(meta[side][count] for side in SIDES) for count in ("n_docs", "n_bytes"))
    end = "" if by_document else " (the end of the text, as there are too few documents to choose from)"
    print(f"text: {n_docs:,} documents, {n_tokens:,} tokens, {n_bytes / n_tokens:.2f} bytes/token; {n_empty:,} empty "
          f"documents skipped; held out: {meta['held_out']['n_docs']:,} documents, {n_held:,} tokens{end}",
          flush=True)


def _side(text, held_out):
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return "held_out" if int.from_bytes(digest) < held_out * 2**64 else "train"


def _hold_out_the_end(train, held, held_out, itemsize):
    """One of the two files has all tokens: make it the training stream, and move its last part to the other."""
    if train.stat().st_size == 0:
        os.replace(held, train)
    n_tokens = train.stat().st_size // itemsize
    n_train = n_tokens - max(1, round(n_tokens * held_out))
    with open(train, "r+b") as train_file, open(held, "wb") as held_file:
        train_file.seek(n_train * itemsize)
        shutil.copyfileobj(train_file, held_file)
        train_file.truncate(n_train * itemsize)


def _count(path, tokenizer):
    n_docs = n_bytes = 0
    with open(path, "rb") as file:  # read, not mapped: mapped pages would count as this process's memory
        while len(ids := np.fromfile(file, tokenizer.dtype, 2**20)):
            n_docs += int((ids == tokenizer.eot).sum())
            n_bytes += tokenizer.count_bytes(ids)
            last = ids[-1]
    return {"n_docs": n_docs + int(last != tokenizer.eot), "n_bytes": n_bytes}
