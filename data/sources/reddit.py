"""Reddit: replies to the same post or comment, ranked by their votes (the paper, Section 6: the higher-voted against the
lower-voted). Reads Pushshift's dumps: one JSON object a line, submissions (RS_…) and comments (RC_…), in any files and order.

The paper's filters are unknown; these are our choice. Early replies collect more votes, so replies are compared only if posted
within --max_age_gap of the first one; deleted texts, bots and moderators are left out, and threads for adults.

A thread's parts lie anywhere in files larger than memory, so they are first dealt into buckets on disk by submission, then
read bucket by bucket. What comes out, and its order, does not depend on the order of the files (but for repeated records, of
which the last one counts).
"""
import contextlib
import json
import os
import tempfile
import zlib
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

from data.errors import InputError
from data.files import read_lines
from data.text import find_special, valid_unicode

BUCKETS = 64
BUCKET_BYTES = 2**25  # read into memory at once, where it takes about four times as much; a larger bucket is dealt out again
LEVELS = 3  # how often at most: by then a bucket is a few threads
GONE = ("", "[deleted]", "[removed]")


def add_flags(parser):
    parser.add_argument("--min_score", type=int, default=2, help="votes the best reply must have (default: 2)")
    parser.add_argument("--min_difference", type=int, default=1, help="votes between the best and the worst reply, at least (default: 1)")
    parser.add_argument("--max_age_gap", type=float, default=24, help="hours after the first reply in which others still count (default: 24)")
    parser.add_argument("--max_replies", type=int, default=8, help="completions of a comparison; of more, some evenly from best to worst (default: 8)")
    parser.add_argument("--max_depth", type=int, default=4, help="comments above a reply, at most (default: 4)")
    parser.add_argument("--nsfw", action="store_true", help="keep threads marked as over 18")


class Item(NamedTuple):
    """A submission or comment."""
    submission: str  # its id
    name: str  # with Reddit's prefix: t3_ for submissions, t1_ for comments
    parent: str | None  # likewise; None for a submission
    text: str
    score: float
    time: float  # in seconds
    author_unfit: bool  # a bot or moderator
    nsfw: bool


def records(paths, args, count):
    """Comparisons of Pushshift's ndjson `paths`: see `context_of` for the context; the completions are the replies, best first,
    the scores their votes, the group the submission's id.

    Temporary files of about half the unpacked input lie beside args.out, or in $TMPDIR, meanwhile. Raises InputError for a damaged
    compressed file and for flags that admit no comparison.
    """
    if args.max_replies < 2 or not args.max_age_gap > 0:
        raise InputError(f"--max_replies {args.max_replies} --max_age_gap {args.max_age_gap}: give 2 or more replies, and hours above 0")
    place = Path(os.environ.get("TMPDIR") or Path(args.out).parent)
    place.mkdir(parents=True, exist_ok=True)
    for bucket in _buckets(_items(paths, args, count), place):
        yield from _comparisons(bucket, args, count)


def _items(paths, args, count):
    for path in paths:
        for number, line in read_lines(path, getattr(args, "progress", None)):
            if not line.strip():
                continue
            count.total += 1
            try:
                item = _item(json.loads(line))
            except KeyError as error:
                count.bad(f"{path}:{number}", f"no {error}")
            except (ValueError, RecursionError) as error:
                count.bad(f"{path}:{number}", str(error))
            else:
                yield item


def _item(record):
    """One line's object -> Item. ValueError or KeyError says what is wrong with it."""
    if not isinstance(record, dict):
        raise ValueError(f"expected a JSON object like {{…}}, found {str(record)[:40]!r}")
    if "title" in record:
        submission, parent = _string(record, "id"), None
        name = "t3_" + submission
        text = _text(record, "selftext") if record.get("selftext") else ""
        if text not in GONE[1:]:
            text = f"{_text(record, 'title')}\n\n{text}".strip()
    elif "body" in record:
        name, parent, link, text = "t1_" + _string(record, "id"), _string(record, "parent_id"), _string(record, "link_id"), _text(record, "body")
        if not parent.startswith(("t1_", "t3_")) or not link.startswith("t3_"):
            raise ValueError(f'"parent_id" must be t1_… or t3_… and "link_id" t3_…, found {parent[:20]!r} and {link[:20]!r}')
        submission = link[3:]
    else:
        raise ValueError('neither a submission (with "title") nor a comment (with "body")')
    author = str(record.get("author")).lower()
    unfit = author == "automoderator" or author.endswith("bot") or bool(record.get("distinguished") or parent and record.get("stickied"))
    return Item(submission, name, parent, text, _number(record, "score"), _number(record, "created_utc"), unfit, bool(record.get("over_18")))


def _string(record, key):
    value = record[key]
    if not isinstance(value, str):
        raise ValueError(f'"{key}" must be a text, found {str(value)[:40]!r}')
    return valid_unicode(value)


def _text(record, key):
    """Markdown as its author wrote it: the dumps escape <, > and &. The editor's zero-width blanks go."""
    text = _string(record, key).replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&")
    return text.replace("&#x200B;", "").replace("\r\n", "\n").strip()


def _number(record, key):
    """A finite number; some dumps write numbers as strings."""
    value = record[key]
    number = int(value) if isinstance(value, str) else value
    if isinstance(number, bool) or not isinstance(number, (int, float)) or not abs(number) < 2**53:
        raise ValueError(f'"{key}" must be a number, found {str(value)[:40]!r}')
    return number


def _buckets(items, place, level=0):
    """Yield lists of items that fit in memory. A submission's items are all in one list, in the order of `items`."""
    with contextlib.ExitStack() as stack:
        files = [stack.enter_context(tempfile.TemporaryFile("w+", dir=place)) for _ in range(BUCKETS)]  # gone at exit, even if killed
        for item in items:
            files[zlib.crc32(item.submission.encode()) // BUCKETS**level % BUCKETS].write(json.dumps(item) + "\n")
        for file in files:
            size = file.tell()
            file.seek(0)
            rest = (Item(*json.loads(line)) for line in file)
            if size > BUCKET_BYTES and level + 1 < LEVELS:
                yield from _buckets(rest, place, level + 1)
            else:
                yield list(rest)
            file.close()


def _comparisons(items, args, count):
    """The comparisons of one bucket."""
    latest = {}
    for item in items:
        if item.name in latest:
            count.drop("records repeated (the last one counts)")
        latest[item.name] = item
    replies = defaultdict(list)
    for item in latest.values():
        if item.parent:
            replies[item.submission, item.parent].append(item)
    for (submission, parent), siblings in sorted(replies.items()):
        if len(siblings) < 2:
            count.drop("replies without a sibling")
            continue
        chain, why = _chain(latest, submission, parent, args)
        if not why:
            kept, why = _pick(siblings, args, count)
        if why:
            count.drop(f"comparisons: {why}")
        else:
            yield {"context": context_of([item.text for item in chain]), "completions": [" " + item.text for item in kept],
                   "scores": [item.score for item in kept], "group": submission}


def _chain(items, submission, parent, args):
    """([submission, comment, …, parent], None), or (None, why there is none to learn from)."""
    chain = []
    while parent:
        item = items.get(parent)
        if not item or item.submission != submission:
            return None, "a text above is not in the files"
        if why := _unfit(item):
            return None, f"a text above is {why}"
        if len(chain) > args.max_depth:
            return None, "deeper than --max_depth"
        chain.append(item)
        parent = item.parent
    if chain[-1].nsfw and not args.nsfw:
        return None, "for adults (--nsfw keeps them)"
    return chain[::-1], None


def _unfit(item):
    if item.text in GONE:
        return "deleted or removed"
    if item.author_unfit:
        return "by a bot or moderator"
    if special := find_special(item.text):
        return f"with {special}, a special token"
    return None


def _pick(siblings, args, count):
    """(the replies to compare, best first, None), or (None, why there is nothing to compare).

    Those that are fit, in time, and not a repetition; at most --max_replies.
    """
    fit = []
    for item in siblings:
        if why := _unfit(item):
            count.drop(f"replies: {why}")
        else:
            fit.append(item)
    first = min((item.time for item in fit), default=0)
    texts = {}
    for item in sorted(fit, key=lambda item: (-item.score, item.time, item.name)):
        if item.time > first + 3600 * args.max_age_gap:
            count.drop("replies: later than --max_age_gap")
        elif item.text in texts:
            count.drop("replies: the same text as a better sibling's")
        else:
            texts[item.text] = item
    ranked = list(texts.values())
    n, keep = len(ranked), args.max_replies
    if n < 2:
        return None, "fewer than two replies left"
    if ranked[0].score < args.min_score:
        return None, "best reply below --min_score"
    if ranked[0].score - ranked[-1].score < max(args.min_difference, 1):
        return None, "scores nearer than --min_difference"
    for _ in range(n - keep):
        count.drop("replies: more than --max_replies")
    return ranked if n <= keep else [ranked[i * (n - 1) // (keep - 1)] for i in range(keep)], None


def context_of(texts):
    """[submission, comment, …, parent] as a dialogue whose next turn, the reply's, is the Assistant's.

    So the parent is the Human's, its parent the Assistant's, and so on up. The Human begins: where the first comment's turn
    would be the Human's too, it joins the submission's.
    """
    if len(texts) % 2 == 0:
        texts = [f"{texts[0]}\n\n{texts[1]}", *texts[2:]]
    return "".join(f"\n\n{('Human', 'Assistant')[i % 2]}: {text}" for i, text in enumerate(texts)) + "\n\nAssistant:"
