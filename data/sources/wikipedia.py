"""Wikipedia: edits that were reverted, against the text restored (the paper, Section 6: the reverted edit is the bad side).
Reads MediaWiki's XML exports with full history (pages-meta-history): .bz2, .7z (with py7zr) or packed like any other file.

A revision whose text equals an earlier one's, at most --window before, reverts the edits in between. They must be one
contributor's, and another's than the reverter. The lines or sentences that changed are the completions, what stands before
them is the context; what the paper took as context is unknown.

An export is read line by line and each <revision> parsed by itself: memory stays small, a broken revision costs itself only,
and a document type with its entities is never read.
"""
import contextlib
import os
import re
import threading
from collections import deque
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple
from xml.etree import ElementTree

from data.errors import InputError
from data.files import read_lines
from data.text import find_special

MAX_BYTES = 2**24  # of one revision; MediaWiki admits 2 MB of text, and escaping makes it more
TAGS = (b"<page>", b"</page>", b"<revision>", b"</revision>")  # each has a line to itself; in a text < is written &lt;
SENTENCE_END = r"[.!?][\"')\]]*"
WITHIN = re.compile(rf"{SENTENCE_END}(?=\s)")
END = re.compile(rf"{SENTENCE_END}(?=\s|\Z)|(?=\n)|\Z")  # of a sentence or a line
NEXT = re.compile(rf"\s*(?=\S).*?(?:{END.pattern})")


def add_flags(parser):
    parser.add_argument("--window", type=int, default=15, help="revisions back in which a restored text is looked for (default: 15)")
    parser.add_argument("--context_chars", type=int, default=2000, help="characters before the change that are its context (default: 2000)")
    parser.add_argument("--max_chars", type=int, default=2000, help="characters of the longest completion (default: 2000)")
    parser.add_argument("--plain", action="store_true", help="take wiki markup out (needs mwparserfromhell); without it, it stays")


class Revision(NamedTuple):
    contributor: str | None  # name or address; None where it is hidden
    text: str | None  # None where it is hidden or not in the export


def records(paths, args, count):
    """Comparisons of full-history exports `paths`: the context is the page's title and the text before the change, the
    completions are the passage [as restored, as reverted], the scores [1, 0], the group is the title.

    A revert that is undone within the window is left out: the text that stays is the good one. Raises InputError for a
    damaged compressed file, for one without pages, and for --plain without mwparserfromhell.
    """
    if args.window < 2 or args.max_chars < 1 or args.context_chars < 0:
        raise InputError(f"--window {args.window} --max_chars {args.max_chars} --context_chars {args.context_chars}: "
                         "give at least 2, 1 and 0")
    to_plain = _stripper() if args.plain else str
    for path in paths:
        before = deque(maxlen=args.window)
        waiting = deque()  # (revisions of this page until it is sure, text that was undone, comparison)
        n = 0
        for title, revision in _revisions(path, args, count):
            if revision is None:
                yield from (comparison for _, _, comparison in waiting)
                waiting.clear()
                before.clear()
                continue
            if before and revision.text is not None and revision.text == before[-1].text:
                continue  # a move or protection: the text is the same
            n += 1
            if any(revision.text == undone for _, undone, _ in waiting):
                waiting = deque(w for w in waiting if w[1] != revision.text)
                count.drop("reverts undone within --window")
            while waiting and waiting[0][0] < n:
                yield waiting.popleft()[2]
            edits = _reverted(before, revision)
            if edits:
                comparison, why = _comparison(title, edits, revision, args, to_plain)
                if why:
                    count.drop(f"reverts: {why}")
                else:
                    waiting.append((n + args.window, edits[-1].text, comparison))
            before.append(revision)


def _reverted(before, revision):
    """The edits between `revision` and the last one before it with the same text; none where there is no such one."""
    if revision.text is not None:
        for i in range(len(before) - 2, -1, -1):
            if before[i].text == revision.text:
                return list(before)[i + 1:]
    return []


def _comparison(title, edits, revision, args, to_plain):
    """(comparison, None), or (None, why this revert makes none)."""
    who = {edit.contributor for edit in edits}
    if len(who) > 1 or None in who and len(edits) > 1:
        return None, "of several contributors' edits"
    if revision.contributor is not None and revision.contributor in who:
        return None, "of one's own edit"
    if edits[-1].text is None:
        return None, "the reverted text is hidden"
    if len(edits[-1].text) < len(revision.text) / 10 and len(revision.text) > args.max_chars:
        return None, "of a blanked page"
    good, bad = to_plain(revision.text), to_plain(edits[-1].text)
    start, good_end, bad_end = changed(good, bad)
    context = f"{title}\n\n{good[max(0, start - args.context_chars):start]}"
    completions = [good[start:good_end].rstrip(), bad[start:bad_end].rstrip()]
    if completions[0].strip() == completions[1].strip():
        return None, "the texts differ in blanks only" + args.plain * ", or in markup"
    if not all(completions):
        return None, "a side is empty"
    if max(map(len, completions)) > args.max_chars:
        return None, "a passage is longer than --max_chars"
    if any(map(find_special, (context, *completions))):
        return None, "with <eot> or <eoc>, special tokens"
    return {"context": context, "completions": completions, "scores": [1, 0], "group": title}, None


def changed(good, bad):
    """Where two texts differ, in whole sentences or lines: (start, end in good, end in bad) in characters.

    Where that leaves a side blank, a sentence or line from around the change, the same on both sides, is taken in.
    """
    prefix = _shared(good, bad)
    suffix = _shared(good[prefix:][::-1], bad[prefix:][::-1])
    start = _sentence_start(good, prefix)
    rest = good[len(good) - suffix:]
    sides = [good[start:len(good) - suffix], bad[start:len(bad) - suffix]]
    if not all(map(str.strip, sides)):
        more = NEXT.match(rest)
        if more:
            suffix -= more.end()
        else:
            start = _sentence_start(good, len(good[:start].rstrip()))
    elif not all(side.endswith("\n") or re.search(SENTENCE_END + r"\Z", side[-20:]) and rest[:1].isspace() for side in sides):
        suffix -= END.search(rest).end()
    return start, len(good) - suffix, len(bad) - suffix


def _shared(a, b):
    """Number of leading characters that are the same. By halving: texts are long and mostly the same."""
    low, high = 0, min(len(a), len(b))
    while low < high:
        middle = (low + high + 1) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


def _sentence_start(text, position):
    """Where the sentence or line begins that `position` lies in; the blank before a sentence belongs to it."""
    start = text.rfind("\n", 0, position) + 1
    return max((end.end() for end in WITHIN.finditer(text, start, position)), default=start)


def _stripper():
    try:
        import mwparserfromhell
    except ImportError:
        raise InputError("--plain needs one more package: pip install mwparserfromhell") from None
    return lambda text: mwparserfromhell.parse(text).strip_code()


# ---------------------------------------------------------------------------------------------------------------------
# Reading exports


def _revisions(path, args, count):
    """Yield (title, Revision) of an export's articles in order, and (title, None) wherever a history begins: with a page, and
    after a broken revision, since nothing can be said across it; and at the end."""
    title = None  # of the page that is being read; None where it is left out
    inside = ""  # "page": before its first revision; "revision"; "history": between two
    part, size, first, pages = [], 0, 0, 0  # the lines read of it, their bytes, where it begins

    def broken(number, why):
        count.bad(f"{path}:{number}", f"{why} (page {title!r})" if title else why)

    for number, line in _lines(path, getattr(args, "progress", None)):
        tag = line.strip() if line.endswith(b">") else b""
        if tag not in TAGS:
            size += len(line) + 1
            if size <= MAX_BYTES and (inside == "page" or inside == "revision" and title):
                part.append(line)
            continue
        if inside == "revision" and tag != b"</revision>" or inside and tag == b"<page>":
            broken(first, f"this {inside} has no end")
            yield title, None
        if tag == b"<page>":
            pages += 1
            title, inside = None, "page"
        elif tag == b"<revision>":
            count.total += 1
            try:
                if not inside:
                    raise ValueError("a revision outside a page")
                if inside == "page":
                    title = _title(_parse(b"page", part, size, first), count)
                    yield title, None
            except ValueError as error:
                broken(number, error)
            inside = inside and "revision"
        elif tag == b"</revision>":
            try:
                if inside == "page" or inside == "history":
                    raise ValueError("the end of a revision without its beginning")
                if title:
                    yield title, _revision(_parse(b"revision", part, size, first))
            except ValueError as error:
                broken(first, error)
                yield title, None
            inside = inside and "history"
        else:
            title, inside = None, ""
        part, size, first = [], 0, number
    if not pages:
        raise InputError(f"{path}: no <page> on a line of its own; is this a MediaWiki export, pages-meta-history?")
    if inside:
        broken(first, f"the file ends within this {inside}")
    yield None, None


def _parse(name, lines, size, first):
    """An element from the lines between its tags. ValueError says why it is none."""
    if size > MAX_BYTES:
        raise ValueError(f"a {name.decode()} of {size >> 20} MB")
    try:
        return ElementTree.fromstring(b"<%s>\n%s\n</%s>" % (name, b"\n".join(lines), name))
    except ElementTree.ParseError as error:
        raise ValueError(f"not well-formed XML in line {first + error.position[0] - 1}") from None


def _title(page, count):
    """The title of an article, None for pages that are left out."""
    title = page.findtext("title")
    if not title or page.findtext("ns") is None:
        raise ValueError("a page without <title> or <ns>")
    if page.findtext("ns").strip() != "0":
        count.drop("pages outside namespace 0")
    elif page.find("redirect") is not None:
        count.drop("pages that are redirects now")
    else:
        return title
    return None


def _revision(element):
    text = element.find("text")
    if text is None:
        raise ValueError("a revision without <text>")
    content = text.text or ""
    hidden = "deleted" in text.attrib or not content and text.get("bytes", "0") != "0"  # the latter in exports of outlines
    contributor = element.find("contributor")
    names = [] if contributor is None else [contributor.findtext("username"), contributor.findtext("ip")]
    return Revision(next(filter(None, names), None), None if hidden else content)


def _lines(path, progress):
    """As read_lines, also for .7z: a thread unpacks it into a pipe, as an export unpacked takes a hundred times the room."""
    if Path(path).suffix != ".7z":
        yield from read_lines(path, progress)
        return
    try:
        import py7zr
    except ImportError:
        raise InputError(f"{path}: reading .7z needs one more package: pip install py7zr") from None
    reading, writing = os.pipe()
    failures = []

    def unpack():
        with contextlib.suppress(BrokenPipeError), contextlib.ExitStack() as files:  # the former: the reader has given up
            files.callback(os.close, writing)
            try:
                with py7zr.SevenZipFile(path) as archive:  # it writes pieces of up to 128 MB
                    archive.extractall(factory=SimpleNamespace(create=lambda name: files.enter_context(open(os.dup(writing), "wb"))))
            except Exception as error:
                failures.append(error)

    thread = threading.Thread(target=unpack, daemon=True)
    thread.start()
    number = 0
    with open(reading, "rb") as file:
        for number, line in enumerate(file, 1):
            yield number, line.rstrip(b"\r\n")
    thread.join()
    if failures:
        raise InputError(f"{path}:{number + 1}: the archive is damaged or cut ({failures[0]}); fetch it again")
    if progress is not None:
        progress.update(os.path.getsize(path))
