"""Stack Exchange: the answers to one question, ranked by their votes (the paper, Section 6). Reads the public dump's Posts.xml,
one <row …/> a line; site by site, plain, .7z (needs py7zr), .xz, .bz2, .gz or .zst.

A question's answers lie anywhere in files larger than memory. So rows are first dealt by question into buckets on disk, which
needs about as much room there as the unpacked file; then each bucket's questions are put together and turned into text by several
processes. Memory does not grow with the file, and neither the records nor their order depend on the number of processes.
"""
import contextlib
import html
import io
import lzma
import math
import multiprocessing
import os
import re
import struct
import tempfile
import threading
import zlib
from array import array
from collections import Counter, deque
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import numpy as np

from data.errors import InputError
from data.files import unpacker
from data.sources.html_text import CONTROLS, to_text
from data.text import find_special

URLS = {"stackexchange": {"*.7z": ("https://archive.org/download/stackexchange/{name}", None, None)}}
BUCKETS = 128  # files open at a time; the largest site has 60M posts, whose index takes 64 bytes a post of one bucket
LONGEST_ROW, LONGEST_THREAD = 2**22, 2**24  # bytes; the sites admit 30,000 characters a post
BATCH = 2**20  # bytes of posts sent to a process at once
ENDS = (b"</posts>", b"<posts />", b"<posts/>")
ATTRIBUTE = re.compile(rb"""\s([A-Za-z]+)=(?:"([^"]*)"|'([^']*)')""")
ROW = re.compile(rb"""<row(?:\s+[A-Za-z]+=(?:"[^"]*"|'[^']*'))+\s*/>""")
HEAD = struct.Struct("<7q")  # of a post in a bucket: question, post, votes, accepted answer, line, bytes of title, of body


def add_flags(parser):
    parser.add_argument("--dialogue", action="store_true", help='instead of comparisons write {"text"}: the question and its best answer as a dialogue')
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
                        help="processes that turn HTML into text (default: one a core)")


def records(paths, args, count):
    """One comparison per question with two answers or more of different scores, or with args.dialogue one {"text"} per question
    that has an answer of positive score. Group: site/question, the site being the name of the folder (of a .7z, its own).

    Raises InputError for a damaged or cut compressed file and one that is not UTF-8.
    """
    if args.workers < 1:
        raise InputError(f"--workers {args.workers}: give at least one")
    place = Path(os.environ.get("TMPDIR") or args.out.parent)
    place.mkdir(parents=True, exist_ok=True)
    progress = getattr(args, "progress", None)
    for path in paths:
        site = path.resolve().parent.name if path.suffix != ".7z" else path.stem
        with contextlib.ExitStack() as stack:
            buckets = [stack.enter_context(tempfile.TemporaryFile(dir=place)) for _ in range(BUCKETS)]  # gone at exit, even if killed
            _deal(path, place, count, buckets, progress)
            threads = (thread for bucket in buckets for thread in _threads(bucket, args, count, progress, path.stat().st_size / 2 / BUCKETS))
            for kept, dropped in _in_processes(args.workers, _batches(threads, site, args.dialogue)):
                for why, n in dropped.items():
                    count.drop(why, n)
                yield from kept


# ---------------------------------------------------------------------------------------------------------------------
# First pass: rows into buckets


def _deal(path, place, count, buckets, progress):
    """Write the questions and answers of a dump into the buckets of their questions."""
    number, ended = 0, False
    for number, line in _lines(path, place, progress):
        where = f"{path}:{number}"
        if number == 1 and (line or b"").startswith((b"\xff\xfe", b"\xfe\xff")):
            raise InputError(f"{where}: UTF-16 text; convert it to UTF-8")
        row = (line or b"").strip() if number > 1 else (line or b"").strip().removeprefix(b"\xef\xbb\xbf")
        if encoding := re.match(rb"""<\?xml[^>]*encoding=["']([^"']*)""", row):
            if encoding[1].lower() not in (b"utf-8", b"us-ascii"):
                raise InputError(f"{where}: the encoding is {encoding[1][:40].decode(errors='replace')}; convert the file to UTF-8")
        ended = ended or row in ENDS
        if line is not None and (row in (b"", b"<posts>", *ENDS) or row.startswith(b"<?xml")):
            continue
        count.total += 1
        try:
            if line is None:
                raise ValueError(f"a line of more than {LONGEST_ROW:,} bytes")
            post = _parse(row)
        except ValueError as error:
            count.bad(where, str(error))
            continue
        if post is None:
            count.drop("posts of other kinds (wikis, tags, elections)")
            continue
        numbers, title, body = post
        bucket = buckets[numbers[0] % BUCKETS]
        bucket.write(HEAD.pack(*numbers, number, len(title), len(body)) + title + body)
    if not ended and path.suffix == ".zst":  # its reader does not tell a cut stream from one that ends
        raise InputError(f"{path}:{number + 1}: the compressed file is cut, or the dump in it: no </posts> at its end; fetch it again")
    if not ended:
        count.bad(f"{path}:{max(1, number)}", "the file ends without </posts>: it was cut")


def _parse(row):
    """A row's bytes -> ((question, post, votes, accepted answer or 0), title, body), title and body still as they stand there;
    None for other kinds of posts. No XML parser: it would expand entities, and a regex is four times as fast.

    Raises ValueError that says what is wrong."""
    if not ROW.fullmatch(row):
        raise ValueError("not a whole <row …/> on one line")
    if not row.isascii():
        row.decode()
    fields = {name: double or single for name, double, single in ATTRIBUTE.findall(row)}
    try:
        kind = fields[b"PostTypeId"]
        if kind not in (b"1", b"2"):
            return None
        post = _number(fields, b"Id", 1, 2**60)
        votes = _number(fields, b"Score", -10**7, 10**7)
        if kind == b"1":
            accepted = _number(fields, b"AcceptedAnswerId", 1, 2**60) if b"AcceptedAnswerId" in fields else 0
            return (post, post, votes, accepted), fields[b"Title"], fields[b"Body"]
        question = _number(fields, b"ParentId", 1, 2**60)
        if question == post:
            raise ValueError(f"post {post} answers itself")
        return (question, post, votes, 0), b"", fields[b"Body"]
    except KeyError as error:
        raise ValueError(f"a row without {error.args[0].decode()}; is this a Posts.xml?") from None


def _number(fields, name, low, high):
    text = fields[name]
    if not re.fullmatch(rb"-?[0-9]{1,19}", text) or not low <= int(text) <= high:
        raise ValueError(f"{name.decode()} {text[:30].decode(errors='replace')!r} is not a number from {low} to {high}")
    return int(text)


def _lines(path, place, progress):
    """Yield (number from 1, line), the line None where it is longer than LONGEST_ROW. Memory stays small for any content.

    `progress` is moved on by half of the file's bytes."""
    number = 0
    try:
        with open(path, "rb") as packed, contextlib.ExitStack() as stack:
            if path.suffix == ".7z":
                source = stack.enter_context(_from_7z(path, place))
            else:
                source = stack.enter_context(unpacker(path, lambda file, mode: file)(packed, "rb"))
            file, done = io.BufferedReader(source, 2**20), 0
            while line := file.readline(LONGEST_ROW):
                number += 1
                whole = line.endswith(b"\n") or len(line) < LONGEST_ROW
                yield number, line if whole else None
                while not whole:
                    rest = file.readline(LONGEST_ROW)
                    whole = rest.endswith(b"\n") or not rest
                if progress is not None and packed.tell() > done:
                    progress.update((packed.tell() - done) / 2)
                    done = packed.tell()
    except (EOFError, zlib.error, lzma.LZMAError) as error:
        raise InputError(f"{path}:{number + 1}: the compressed file is damaged or cut ({error}); fetch it again") from None
    except Exception as error:
        if type(error).__name__ in ("ZstdError", "Bad7zFile") or isinstance(error, OSError) and error.errno is None:  # from gzip, bz2
            raise InputError(f"{path}:{number + 1}: the compressed file is damaged or cut ({error}); fetch it again") from None
        raise


def _from_7z(path, place):
    """Posts.xml of an archive, unpacked to disk; the file is gone once closed."""
    try:
        import py7zr
    except ImportError:
        raise InputError(f"{path}: reading .7z needs one more package: pip install py7zr; or unpack it and name its Posts.xml") from None
    with tempfile.TemporaryDirectory(dir=place) as folder:
        with py7zr.SevenZipFile(path) as archive:
            if "Posts.xml" not in archive.getnames():
                raise InputError(f"{path}: no Posts.xml in this archive")
            archive.extract(folder, ["Posts.xml"])
        return open(Path(folder) / "Posts.xml", "rb")


# ---------------------------------------------------------------------------------------------------------------------
# Second pass: a bucket's posts into questions with their answers, by process into text


def _threads(bucket, args, count, progress, share):
    """Yield (question, [(score, title, body), …]) of a bucket in the order of their numbers: the question, then the answers
    that are to be compared, or with args.dialogue the best one. Bodies are read for these only."""
    index = array("q")
    bucket.flush()
    end = bucket.seek(0, os.SEEK_END)
    place = bucket.seek(0)
    while place < end:
        head = HEAD.unpack(bucket.read(HEAD.size))
        place += HEAD.size
        index.extend((*head, place))
        place = bucket.seek(head[5] + head[6], os.SEEK_CUR)
    posts = np.frombuffer(index, np.int64).reshape(-1, HEAD.size // 8 + 1)
    posts = posts[np.lexsort((posts[:, 4], posts[:, 1], posts[:, 0]))]
    cuts = np.flatnonzero(np.diff(posts[:, 0], prepend=-1, append=-1)) if len(posts) else []
    for start, stop in zip(cuts[:-1], cuts[1:]):
        unique = {post[1]: post for post in reversed(posts[start:stop].tolist())}  # of repeated posts the first one
        if stop - start > len(unique):
            count.drop("posts repeated", int(stop - start) - len(unique))
        number = int(posts[start, 0])
        question = unique.pop(number, None)
        answers = [(score_of(post[2], post[1] == question[3]), *post) for post in sorted(unique.values())] if question else []
        if question is None:
            count.drop("answers whose question is not in the file", len(unique))
            continue
        if args.dialogue:
            answers = sorted(answers, key=lambda answer: (-answer[0], -answer[3], answer[2]))[:1]
            why = "questions without an answer of positive score" if not answers or answers[0][0] <= 0 else None
        else:
            why = "questions with fewer than two answers" if len(answers) < 2 else \
                "questions whose answers all have the same score" if len({answer[0] for answer in answers}) == 1 else None
        if not why and sum(post[-3] + post[-2] for post in (question, *answers)) > LONGEST_THREAD:
            why = f"questions with more than {LONGEST_THREAD:,} bytes of answers"
        if why:
            count.drop(why)
            continue
        thread = []
        for score, *_, title, body, place in ((0, *question), *answers):
            bucket.seek(place)
            thread.append((score, bucket.read(title), bucket.read(body)))
        yield number, thread
    if progress is not None:
        progress.update(share)


def score_of(votes, accepted):
    """The paper's score of an answer, Section 6. The dump has votes up less votes down, which stand for both here."""
    return round(math.log2(1 + max(votes, 0))) + accepted - (votes < 0)


def _batches(threads, site, dialogue):
    batch, size = [], 0
    for thread in threads:
        batch.append(thread)
        size += sum(len(title) + len(body) for _, title, body in thread[1])
        if size > BATCH:
            yield batch, site, dialogue
            batch, size = [], 0
    if batch:
        yield batch, site, dialogue


def _in_processes(workers, batches):
    """_convert(batch) for each batch, in order, a few ahead of what is taken."""
    if workers == 1:
        yield from map(_convert, batches)
        return
    try:
        with ProcessPoolExecutor(workers, initializer=_end_with_parent) as pool:
            waiting = deque()
            for batch in batches:
                waiting.append(pool.submit(_convert, batch))
                if len(waiting) > 2 * workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
    except BrokenProcessPool:
        raise InputError("a worker process was killed, perhaps for want of memory; try fewer --workers") from None


def _end_with_parent():
    """A killed parent cannot stop its processes: they see to it themselves."""
    threading.Thread(target=lambda: (multiprocessing.parent_process().join(), os._exit(1)), daemon=True).start()


def _convert(work):
    """(threads, site, dialogue) -> (records, Counter of what was left out)."""
    threads, site, dialogue = work
    kept, dropped = [], Counter()
    for number, ((_, title, body), *answers) in threads:
        question = "\n\n".join(filter(None, (" ".join(attribute_text(title).split()), to_text(attribute_text(body)))))
        if not question or find_special(question):
            dropped["questions that hold <eot> or <eoc>" if question else "questions without text"] += 1
            continue
        completions, scores = [], []
        for score, _, body in answers:
            answer = to_text(attribute_text(body))
            if not answer or find_special(answer):
                dropped["answers that hold <eot> or <eoc>" if answer else "answers without text (pictures only)"] += 1
                continue
            completions.append(" " + answer)
            scores.append(score)
        if dialogue and completions:
            kept.append({"text": f"Human: {question}\n\nAssistant:{completions[0]}"})
        elif len(set(scores)) > 1:
            kept.append({"context": f"\n\nHuman: {question}\n\nAssistant:", "completions": completions, "scores": scores,
                         "group": f"{site}/{number}"})
        else:
            dropped["questions with nothing to compare after that"] += 1
    return kept, dropped


def attribute_text(value):
    """The text of an attribute's bytes. Only the predefined entities and numbers are resolved, none that a file may define."""
    text = value.translate(None, CONTROLS).decode()
    text = text.replace("&lt;", "<").replace("&gt;", ">").replace("&quot;", '"').replace("&apos;", "'").replace("&#xA;", "\n").replace("&#10;", "\n")
    return html.unescape(text) if "&#" in text else text.replace("&amp;", "&")
