"""Text for language modelling: reading documents, a cached stream of their tokens, and the order of its
windows."""
import collections
import hashlib
import itertools
import json
import os
import shutil
from dataclasses import dataclass

import numpy as np
from tqdm import tqdm

from data.errors import InputError
from data.files import PACKED, build_once, content_key, decode, parse_json, read_lines, write_file

EOT, EOC = "<eot>", "<eoc>"  # ends a document; ends a completion (the paper's end-of-context token)
PIECE = 2**20  # characters: a .txt file is one document of any size, and is read in pieces of about this size
VERSION = 2  # of the caches below; raise it when their content changes
SIDES = ("train", "held_out")


@dataclass
class Text:
    """Documents as one stream of tokens. Each document is followed by <eot>."""
    tokens: np.ndarray  # (n,) of the tokenizer's dtype, read-only and memory-mapped
    n_docs: int  # whole or in part
    n_bytes: int  # of their text in UTF-8
    by_document: bool = True  # whole documents are held out; else the end of the stream, as there are too few


def find_special(text):
    """The first of "<eot>" and "<eoc>" that the text holds, or None. The text would seem to end there."""
    return next((special for special in (EOT, EOC) if special in text), None)


def refuse_special(where, *texts):
    """Raise InputError, which begins with `where`, if one of the texts holds a special token."""
    if special := next(filter(None, map(find_special, texts)), None):
        raise InputError(f"{where}: the text holds {special}, a special token; write it differently there, "
                         f"for example {special[:-1]} >")


# ------------------------------------------------------------------------------------------------------------
# Reading


def read_texts(files, progress=None):
    """Yield (path, line number, text) for the documents of JSON-lines files ({"text": …}) and of .txt
    files.

    A .txt file is one document, in pieces of about 1 MB. A document may be empty. Raises InputError with
    file and line: not UTF-8, not JSON, no "text", a "text" that is not a string, a special token in the
    text; and for a file without documents. `progress`: as for read_lines.
    """
    for path, number, text, _ in read_pieces(files, progress):
        yield path, number, text


def read_pieces(files, progress=None):
    """As read_texts, with a fourth item: whether the document ends with this piece."""
    for path in files:
        is_plain = str(path).endswith(tuple(".txt" + packed for packed in PACKED))
        pieces = _txt_pieces(path, progress) if is_plain else _json_texts(path, progress)
        number = 0
        for number, text, ends in pieces:
            if is_plain and (special := find_special(text)):
                number += text.count("\n", 0, text.index(special))
            refuse_special(f"{path}:{number}", text)
            yield path, number, text, ends
        if number == 0:
            raise InputError(f"{path}: no documents in this file")


def _json_texts(path, progress):
    for number, line in read_lines(path, progress):
        if not line.strip():
            continue
        record = parse_json(path, number, line)
        if "text" not in record:
            raise InputError(f'{path}:{number}: no "text" in this record (its keys: '
                             f'{", ".join(record)[:80]}); text for language modelling is lines of '
                             '{"text": "…"}, or .txt files')
        if not isinstance(record["text"], str):
            raise InputError(f'{path}:{number}: "text" must be a string, found {str(record["text"])[:40]!r}')
        yield number, record["text"], True


def _txt_pieces(path, progress):
    """A piece ends only before a line end that visible text follows. A cut there changes no token: a word
    never includes the line end before it, and the last of several blanks is always a word of its own."""
    lines, size, first = [], 0, 1
    for number, line in read_lines(path, progress):
        line = decode(line, f"{path}:{number}")
        if size > PIECE and line and not line[0].isspace():
            yield first, "\n".join(lines), False
            lines, size, first = [""], 0, number - 1  # "": the line end before this line
        lines.append(line)
        size += len(line) + 1
    if lines:
        yield first, "\n".join(lines), True


# ------------------------------------------------------------------------------------------------------------
# The stream of tokens


def load_text(files, tokenizer, held_out=0.01):
    """(training Text, held-out Text) of the documents in `files`. They are cached by the files' content.

    About the fraction `held_out` of the documents is held out. Its own text (a .txt file's first piece)
    decides where a document goes, so neither the order nor other documents matter, and copies go to the
    same side. If no document is on one of the sides, the last part of the stream is held out instead.
    Prints what was built. Raises InputError as read_texts does, and if all documents are empty.
    """
    if not 0 < held_out < 1:
        raise InputError(f"the part of the text to hold out must lie between 0 and 1, found {held_out}")
    files = list(files)
    name = f"text-{content_key(files, 'text', tokenizer.key, held_out, VERSION)}"
    folder = build_once(name, lambda folder: _build(folder, files, tokenizer, held_out))
    meta = json.loads((folder / "meta.json").read_text())
    tokens = {side: np.memmap(folder / f"{side}.bin", tokenizer.dtype, "r") for side in SIDES}
    return tuple(Text(tokens[side], **meta[side]) for side in SIDES)


def _build(folder, files, tokenizer, held_out):
    """Write train.bin, held_out.bin and meta.json. Only a few texts at a time are in memory."""
    counts = collections.Counter()
    eot = np.array([tokenizer.eot], tokenizer.dtype)
    train, held = (folder / f"{side}.bin" for side in SIDES)
    on_disk = sum(map(os.path.getsize, files))
    with tqdm(total=on_disk, desc="tokenizing", unit="B", unit_scale=True, disable=None) as progress, \
            open(train, "wb") as train_file, open(held, "wb") as held_file:
        if progress.disable:  # not on a terminal
            print(f"tokenizing {on_disk / 1e6:.1f} MB of files", flush=True)
        pieces, same_pieces = itertools.tee(_pieces_by_side(files, held_out, counts, progress))
        all_ids = tokenizer.encode_many(text for text, _, _ in pieces)
        for ids, (_, side, ends) in zip(all_ids, same_pieces):
            file = train_file if side == "train" else held_file
            file.write(ids)
            if ends:
                file.write(eot)
    if not (train.stat().st_size or held.stat().st_size):
        raise InputError(f"{files[0]}: all {counts['empty']} documents here and in the other files are "
                         "empty; give text")
    by_document = train.stat().st_size and held.stat().st_size
    if not by_document:
        _hold_out_the_end(train, held, held_out, eot.itemsize)

    meta = {side: _count(folder / f"{side}.bin", tokenizer) | {"by_document": bool(by_document)}
            for side in SIDES}
    write_file(folder / "meta.json", json.dumps(meta))
    n_docs, n_bytes = (sum(meta[side][key] for side in SIDES) for key in ("n_docs", "n_bytes"))
    n_held = held.stat().st_size // eot.itemsize
    n_tokens = n_held + train.stat().st_size // eot.itemsize
    note = "" if by_document else " (the end of the text, as there are too few documents to choose from)"
    print(f"text: {n_docs:,} documents, {n_tokens:,} tokens, {n_bytes / n_tokens:.2f} bytes/token; "
          f"{counts['empty']:,} empty documents skipped; "
          f"held out: {meta['held_out']['n_docs']:,} documents, {n_held:,} tokens{note}", flush=True)


def _pieces_by_side(files, held_out, counts, progress):
    """Yield (text, side, whether the document ends with it) for the pieces of all documents but empty ones,
    which are counted."""
    begins = True
    for _, _, text, ends in read_pieces(files, progress):
        if begins and ends and not text.strip():
            counts["empty"] += 1
            continue
        if begins:
            digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
            side = "held_out" if int.from_bytes(digest) < held_out * 2**64 else "train"
        yield text, side, ends
        begins = ends


def _hold_out_the_end(train, held, held_out, itemsize):
    """One of the two files has all tokens. Make it the training stream, and move its last part to the
    other."""
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
    with open(path, "rb") as file:  # not mapped, as mapped pages would count as this process's memory
        while len(ids := np.fromfile(file, tokenizer.dtype, 2**20)):
            n_docs += int((ids == tokenizer.eot).sum())
            n_bytes += tokenizer.count_bytes(ids)
            last = ids[-1]
    return {"n_docs": n_docs + int(last != tokenizer.eot), "n_bytes": n_bytes}


def lm_windows(text, ctx, seed, epoch):
    """Where an epoch's training windows start, in the order of training: (n,) int64, with the same n every
    epoch.

    A window that starts at s has the inputs tokens[s : s + ctx] and the targets tokens[s + 1 : s + ctx +
    1]. Windows follow one another from a random offset in [0, ctx). If the last one would pass the end, it
    is moved back to end there. So fewer than ctx tokens, at the two ends of the stream, are left out.
    Depends on (seed, epoch) alone. Raises InputError if the stream is shorter than a window.
    """
    n_tokens = len(text.tokens)
    if n_tokens < ctx + 1:
        raise InputError(f"the text has {n_tokens} tokens, fewer than one window of {ctx} + 1; "
                         "give a smaller --ctx or more text")
    random = np.random.default_rng((seed, epoch))
    starts = random.integers(ctx) + ctx * np.arange((n_tokens - 1) // ctx)
    return random.permutation(np.minimum(starts, n_tokens - ctx - 1))
