"""Stack Exchange: the answers to a question, ranked by their votes (Section 4 of the paper).

Reads Posts.xml of the public dumps, one <row …/> a line, site by site: plain, .7z (needs py7zr), .xz, .bz2,
.gz or .zst. The answers to a question lie anywhere in the file, so all posts are first brought together on
disk by question. Then several processes turn their HTML into text. Memory does not grow with the file, and
neither the comparisons nor their order depend on the number of processes.
"""
import html
import math
import multiprocessing
import os
import re
import threading
from collections import Counter, deque
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from types import SimpleNamespace
from typing import NamedTuple

from data.errors import InputError
from data.sources.archive import read_lines
from data.sources.buckets import gather
from data.sources.count import LeftOut
from data.sources.html_text import CONTROLS, to_text
from data.text import find_special

URLS = {"stackexchange": {"*.7z": "https://archive.org/download/stackexchange/{name}"}}
BUCKETS = 128
LONGEST_ROW = 2**22  # bytes; the sites allow 30,000 characters a post
ENDS = (b"</posts>", b"<posts />", b"<posts/>")
ENCODING = re.compile(rb"""<\?xml[^>]*encoding=["']([^"']*)""")
ROW = re.compile(rb"""<row(?:\s+[A-Za-z]+=(?:"[^"]*"|'[^']*'))+\s*/>""")
ATTRIBUTE = re.compile(r"""\s([A-Za-z]+)=(?:"([^"]*)"|'([^']*)')""", re.ASCII)
ESCAPES = {"&lt;": "<", "&gt;": ">", "&quot;": '"', "&apos;": "'", "&#xA;": "\n", "&#10;": "\n"}


def add_flags(parser):
    parser.add_argument("--dialogue", action="store_true",
        help='write {"text"} instead of comparisons: each question and its best answer as a dialogue')
    has_affinity = hasattr(os, "sched_getaffinity")  # not on macOS
    parser.add_argument("--workers", type=int,
        default=len(os.sched_getaffinity(0)) if has_affinity else os.cpu_count(),
        help="processes that turn HTML into text (default: one for each core)")


class Post(NamedTuple):
    """A question or an answer."""
    question: int  # id of the question that it is or answers
    id: int
    votes: int
    accepted: int  # of a question: the id of the answer that its author accepted, or 0
    title: str  # title and body are HTML, escaped as in the XML; an answer has no title
    body: str


def records(paths, args, count):
    """Yield a comparison for each question that has answers of different scores; or, with args.dialogue,
    {"text"} for each question that has an answer of positive score. The group is site/question, where the
    site is the name of the folder that holds Posts.xml, or the name of the .7z archive.

    Raises InputError for a damaged or cut compressed file, and for one that is not UTF-8.
    """
    if args.workers < 1:
        raise InputError(f"--workers {args.workers}: give at least one")
    for path in paths:
        site = path.stem if path.suffix == ".7z" else path.resolve().parent.name
        work = ((bucket, site, args.dialogue) for bucket in _buckets(path, args, count))
        for kept, dropped in _map_in_order(_convert, work, args.workers):
            for reason, n in dropped.items():
                count.drop(reason, n)
            yield from kept


def _buckets(path, args, count):
    """Yield lists of Posts. All posts about a question are in one list."""
    first_half = second_half = None
    if count.progress is not None:  # reading the file is half of the work
        first_half = SimpleNamespace(update=lambda n: count.progress.update(n / 2))
        second_half = lambda: count.progress.update(path.stat().st_size / 2 / BUCKETS)
    posts = _posts(path, count, first_half)
    yield from gather(posts, lambda post: post.question, BUCKETS, args.out, second_half)


# ---------------------------------------------------------------------------------------------------------
# Reading posts


def _posts(path, count, progress):
    """Yield the Posts of a dump."""
    number, ended = 0, False
    for number, line in read_lines(path, progress, member="Posts.xml"):
        where = f"{path}:{number}"
        row = line.strip()
        if number == 1:
            if row.startswith((b"\xff\xfe", b"\xfe\xff")):
                raise InputError(f"{where}: this is UTF-16 text; convert it to UTF-8")
            row = row.removeprefix(b"\xef\xbb\xbf")  # the byte order mark of UTF-8
        if (encoding := ENCODING.match(row)) and encoding[1].lower() not in (b"utf-8", b"us-ascii"):
            name = encoding[1][:40].decode(errors="replace")
            raise InputError(f"{where}: the encoding is {name}; convert the file to UTF-8")
        ended = ended or row in ENDS
        if row in (b"", b"<posts>", *ENDS) or row.startswith(b"<?xml"):
            continue
        count.total += 1
        try:
            post = _parse(row)
        except ValueError as error:
            count.bad(where, str(error))
            continue
        if post:
            yield post
        else:
            count.drop("posts of other kinds (wikis, tags, elections)")
    if not ended:
        count.bad(f"{path}:{max(1, number)}", "the file ends without </posts>: it was cut")


def _parse(row):
    """The Post of a row's bytes, or None if the row is neither a question nor an answer. Raises ValueError
    if it is broken. Regular expressions are four times as fast here as an XML parser, and expand no
    entities."""
    if len(row) >= LONGEST_ROW:
        raise ValueError(f"a line of more than {LONGEST_ROW:,} bytes")
    if not ROW.fullmatch(row):
        raise ValueError("not a whole <row …/> on one line")
    fields = {name: double or single for name, double, single in ATTRIBUTE.findall(row.decode())}
    try:
        if fields["PostTypeId"] not in ("1", "2"):
            return None
        is_question = fields["PostTypeId"] == "1"
        number = _number(fields, "Id", 1, 2**60)
        votes = _number(fields, "Score", -10**7, 10**7)
        if is_question:
            accepted = _number(fields, "AcceptedAnswerId", 1, 2**60) if "AcceptedAnswerId" in fields else 0
            return Post(number, number, votes, accepted, fields["Title"], fields["Body"])
        question = _number(fields, "ParentId", 1, 2**60)
        if question == number:
            raise ValueError(f"post {number} answers itself")
        return Post(question, number, votes, 0, "", fields["Body"])
    except KeyError as error:
        raise ValueError(f"a row without {error.args[0]}; is this a Posts.xml?") from None


def _number(fields, name, low, high):
    text = fields[name]
    if not re.fullmatch("-?[0-9]{1,19}", text) or not low <= int(text) <= high:
        raise ValueError(f"{name} {text[:30]!r} is not a number from {low} to {high}")
    return int(text)


# ---------------------------------------------------------------------------------------------------------
# Making records, in several processes


def _map_in_order(function, items, workers):
    """function(item) for each item, in order. Processes work a few items ahead of what has been taken."""
    if workers == 1:
        yield from map(function, items)
        return
    try:
        with ProcessPoolExecutor(workers, initializer=_end_with_parent) as pool:
            results = deque()
            for item in items:
                results.append(pool.submit(function, item))
                if len(results) > workers:
                    yield results.popleft().result()
            for result in results:
                yield result.result()
    except BrokenProcessPool:
        raise InputError("a worker process was killed, perhaps because memory ran out; try fewer "
                         "--workers") from None


def _end_with_parent():
    """Let this process end when its parent does, because a killed parent cannot end it."""
    def wait():
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def _convert(work):
    """The records of (bucket, site, dialogue), and a Counter of what was left out."""
    bucket, site, dialogue = work
    kept, dropped = [], Counter()
    threads = {}  # id of a question: {id of the question or an answer: Post}
    for post in bucket:
        thread = threads.setdefault(post.question, {})
        if post.id in thread:
            dropped["posts repeated"] += 1
        thread.setdefault(post.id, post)
    for number, thread in sorted(threads.items()):
        question = thread.pop(number, None)
        if not question:
            dropped["answers whose question is not in the file"] += len(thread)
            continue
        try:
            answers = _answers(question, thread, dialogue)
            kept.append(_record(question, answers, f"{site}/{number}", dialogue, dropped))
        except LeftOut as reason:
            dropped[str(reason)] += 1
    return kept, dropped


def _answers(question, posts, dialogue):
    """[(score, answer), …] in the order of their ids, or the best one only. Raises LeftOut where there is
    nothing to compare."""
    answers = [(score_of(posts[id].votes, id == question.accepted), posts[id]) for id in sorted(posts)]
    if dialogue:
        answers.sort(key=lambda answer: (-answer[0], -answer[1].votes))
        if not answers or answers[0][0] <= 0:
            raise LeftOut("questions without an answer of positive score")
        return answers[:1]
    if len(answers) < 2:
        raise LeftOut("questions with fewer than two answers")
    if len({score for score, _ in answers}) == 1:
        raise LeftOut("questions whose answers all have the same score")
    return answers


def score_of(votes, accepted):
    """The paper's score of an answer (Section 4): log2(1 + upvotes), rounded; plus 1 if it was accepted,
    minus 1 if its votes are negative. A dump has only the difference of upvotes and downvotes, so `votes` is
    this difference, and where it is positive it takes the place of the upvotes."""
    return round(math.log2(1 + max(votes, 0))) + accepted - (votes < 0)


def _record(question, answers, group, dialogue, dropped):
    """The record of a question. Raises LeftOut if there is none; counts unusable answers in `dropped`."""
    title = " ".join(attribute_text(question.title).split())
    asked = "\n\n".join(filter(None, (title, to_text(attribute_text(question.body)))))
    if reason := _unusable(asked):
        raise LeftOut(f"questions {reason}")
    completions, scores = [], []
    for score, answer in answers:
        text = to_text(attribute_text(answer.body))
        if reason := _unusable(text):
            dropped[f"answers {reason}"] += 1
        else:
            completions.append(" " + text)
            scores.append(score)
    if dialogue and completions:
        return {"text": f"Human: {asked}\n\nAssistant:{completions[0]}"}
    if len(set(scores)) < 2:
        raise LeftOut("questions with nothing to compare after that")
    return {"context": f"\n\nHuman: {asked}\n\nAssistant:", "completions": completions, "scores": scores,
            "group": group}


def _unusable(text):
    if not text:
        return "without text (pictures only)"
    return "that hold <eot> or <eoc>" if find_special(text) else None


def attribute_text(value):
    """The text of an XML attribute. Numbers and XML's own five entities are resolved, but none that a file
    defines, because those can make a small file enormous."""
    text = value.encode().translate(None, CONTROLS).decode()
    for escape, letter in ESCAPES.items():
        text = text.replace(escape, letter)
    return html.unescape(text) if "&#" in text else text.replace("&amp;", "&")
