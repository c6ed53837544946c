"""Reddit: replies to the same post or comment, ranked by their votes (Section 4 of the paper).

Reads Pushshift's dumps: one JSON object a line, submissions (RS_…) and comments (RC_…), in any number of
files and in any order. The comparisons and their order do not depend on it, except that of a repeated
record the last one counts.

What the paper filtered is not known, so the filters are our choice. Replies are compared only if they were
posted within --max_age_gap of the first one, because early replies collect more votes. Deleted texts, bots,
moderators and threads for adults are left out.
"""
import re
import zlib
from collections import defaultdict
from typing import NamedTuple

from data.errors import InputError
from data.sources.buckets import gather
from data.sources.count import LeftOut, converted_records
from data.text import find_special

BUCKETS = 64
# What stands in place of a text: [deleted], [removed], [ Removed by Reddit ], [deleted by user] …
DELETED = re.compile(r"\[ ?(deleted|removed)\b[^\]]{0,80}\]", re.IGNORECASE)


def add_flags(parser):
    add = parser.add_argument
    add("--min_score", type=int, default=2, help="votes that the best reply must have (default: %(default)s)")
    add("--min_difference", type=int, default=1,
        help="least difference in votes between the best and the worst reply (default: %(default)s)")
    add("--max_age_gap", type=float, default=24,
        help="hours after the first reply within which others are compared with it (default: %(default)s)")
    add("--max_replies", type=int, default=8,
        help="most completions of a comparison; of more replies, an even selection from best to worst "
             "(default: %(default)s)")
    add("--max_depth", type=int, default=4, help="most comments above a reply (default: %(default)s)")
    add("--nsfw", action="store_true", help="keep threads that are marked as over 18")


class Item(NamedTuple):
    """A submission or a comment."""
    submission: str  # id of the submission it belongs to
    name: str  # Reddit's own name for it: t3_ and an id for submissions, t1_ and an id for comments
    parent: str | None  # name of what it replies to; None for a submission
    text: str
    score: float  # votes
    time: float  # when it was posted, in seconds
    author_unfit: bool  # a bot or a moderator
    nsfw: bool
    is_hidden: bool  # its score is a placeholder, as it was not shown yet


def records(paths, args, count):
    """Yield the comparisons of Pushshift's files. The context is the thread above as a dialogue
    (`context_of`), the completions are the replies, best first, the scores their votes; the group is the
    submission's id.

    Raises InputError for a damaged compressed file and for flags that admit no comparison.
    """
    if args.max_replies < 2 or not args.max_age_gap > 0:
        raise InputError(f"--max_replies {args.max_replies} --max_age_gap {args.max_age_gap}: give 2 or more "
                         "replies, and hours above 0")

    def number(item):
        return zlib.crc32(item.submission.encode())

    items = converted_records(paths, count, _parse)
    for bucket in gather(items, number, BUCKETS, args.out):
        yield from _comparisons(bucket, args, count)


# ---------------------------------------------------------------------------------------------------------
# Reading records


def _parse(record):
    """The Item of one line's JSON. Raises ValueError or KeyError if the record is broken."""
    if "title" in record:
        submission, parent = _string(record, "id"), None
        name, text = "t3_" + submission, _submission_text(record)
    elif "body" in record:
        name, parent = "t1_" + _string(record, "id"), _string(record, "parent_id")
        link, text = _string(record, "link_id"), _text(record, "body")
        if not parent.startswith(("t1_", "t3_")) or not link.startswith("t3_"):
            raise ValueError('"parent_id" must be t1_… or t3_… and "link_id" t3_…, '
                             f"found {parent[:20]!r} and {link[:20]!r}")
        submission = link.removeprefix("t3_")
    else:
        raise ValueError('neither a submission (with "title") nor a comment (with "body")')
    author = str(record.get("author")).lower()
    is_bot = author == "automoderator" or author.endswith("bot")
    by_moderator = record.get("distinguished") or parent and record.get("stickied")
    return Item(submission, name, parent, text, _number(record, "score"), _number(record, "created_utc"),
                is_bot or bool(by_moderator), bool(record.get("over_18")), bool(record.get("score_hidden")))


def _submission_text(record):
    """Title and text; or only "[deleted]" and the like, if one of them is that."""
    text = _text(record, "selftext") if record.get("selftext") else ""  # a link has no text
    title = _text(record, "title")
    gone = next(filter(DELETED.fullmatch, (text, title)), None)
    return gone or f"{title}\n\n{text}".strip()


def _string(record, key):
    value = record[key]
    if not isinstance(value, str):
        raise ValueError(f'"{key}" must be a text, found {str(value)[:40]!r}')
    return value


def _text(record, key):
    """Markdown as its author wrote it: the dumps escape <, > and &, and editors add zero-width blanks."""
    text = _string(record, key).replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&")
    return text.replace("&#x200B;", "").replace("\r\n", "\n").strip()


def _number(record, key):
    """A finite number. Some dumps have numbers as strings."""
    value = record[key]
    number = int(value) if isinstance(value, str) else value
    if isinstance(number, bool) or not isinstance(number, (int, float)) or not abs(number) < 2**53:
        raise ValueError(f'"{key}" must be a number, found {str(value)[:40]!r}')
    return number


# ---------------------------------------------------------------------------------------------------------
# Making comparisons


def _comparisons(items, args, count):
    """The comparisons of whole threads, in the order of the ids of submission and parent."""
    latest = {}  # name: item
    for item in items:
        if item.name in latest:
            count.drop("records repeated (the last one counts)")
        latest[item.name] = item
    siblings = defaultdict(list)  # replies to the same parent
    for item in latest.values():
        if item.parent:
            siblings[item.submission, item.parent].append(item)
    for (submission, parent), replies in sorted(siblings.items()):
        if len(replies) < 2:
            count.drop("replies without a sibling")
            continue
        try:
            thread = _thread(latest, submission, parent, args)
            ranked = _rank(replies, args, count)
        except LeftOut as reason:
            count.drop(f"comparisons: {reason}")
            continue
        yield {"context": context_of([item.text for item in thread]),
               "completions": [" " + item.text for item in ranked],
               "scores": [item.score for item in ranked], "group": submission}


def _thread(items, submission, parent, args):
    """[submission, comment, …, parent]. Raises LeftOut if there is nothing to learn from below them."""
    thread = []
    while parent:
        item = items.get(parent)
        if not item or item.submission != submission:
            raise LeftOut("a text above is not in the files")
        if reason := _unfit(item):
            raise LeftOut(f"a text above is {reason}")
        if len(thread) > args.max_depth:
            raise LeftOut("deeper than --max_depth")
        thread.append(item)
        parent = item.parent
    if thread[-1].nsfw and not args.nsfw:
        raise LeftOut("for adults (--nsfw keeps them)")
    return thread[::-1]


def _unfit(item):
    """Why an item's text is not to be learned from, or None."""
    if not item.text or DELETED.fullmatch(item.text):
        return "deleted or removed"
    if item.author_unfit:
        return "by a bot or moderator"
    if special := find_special(item.text):
        return f"with {special}, a special token"
    return None


def _rank(replies, args, count):
    """The replies to compare, best first. Raises LeftOut if too few are left or their scores are too near."""
    fit = []
    for item in replies:
        if reason := _unfit(item) or ("with a hidden score" if item.is_hidden else None):
            count.drop(f"replies: {reason}")
        else:
            fit.append(item)
    latest_time = min((item.time for item in fit), default=0) + 3600 * args.max_age_gap
    by_text = {}
    for item in sorted(fit, key=lambda item: (-item.score, item.time, item.name)):
        if item.time > latest_time:
            count.drop("replies: later than --max_age_gap")
        elif item.text in by_text:
            count.drop("replies: the same text as a better sibling's")
        else:
            by_text[item.text] = item
    ranked = list(by_text.values())
    if len(ranked) < 2:
        raise LeftOut("fewer than two replies left")
    if ranked[0].score < args.min_score:
        raise LeftOut("best reply below --min_score")
    if ranked[0].score - ranked[-1].score < max(args.min_difference, 1):
        raise LeftOut("scores nearer than --min_difference")
    n, n_kept = len(ranked), args.max_replies
    if n <= n_kept:
        return ranked
    count.drop("replies: more than --max_replies", n - n_kept)
    return [ranked[i * (n - 1) // (n_kept - 1)] for i in range(n_kept)]


def context_of(texts):
    """The texts of [submission, comment, …, parent] as a dialogue in which the Assistant has the next turn,
    which is the reply. So the parent is the Human's turn, its parent the Assistant's, and so on upwards. The
    Human begins: where the submission would be the Assistant's turn, it is joined to the first comment.
    """
    if len(texts) % 2 == 0:
        texts = [f"{texts[0]}\n\n{texts[1]}", *texts[2:]]
    speakers = ("Human", "Assistant")
    turns = [f"\n\n{speakers[i % 2]}: {text}" for i, text in enumerate(texts)]
    return "".join(turns) + "\n\nAssistant:"
