"""Wikipedia: edits that were reverted, against the text that was restored (Section 4 of the paper).

Reads MediaWiki's XML exports with the full history (pages-meta-history): .bz2, .7z (needs py7zr), plain, or
compressed otherwise.

A revision reverts the edits before it if its text equals that of an earlier revision, at most --window
before. The edits must be one contributor's, and another contributor's than the revert. The lines or
sentences that changed are the completions, and what stands before them is the context; what the paper took
as the context is not known.

An export is read line by line, and each <revision> is parsed by itself. So memory stays small, a broken
revision does not harm others, and a document type, with the entities it may define, is never read.
"""
import bisect
import re
from collections import deque
from typing import NamedTuple
from xml.etree import ElementTree

from data.errors import InputError
from data.sources.archive import read_lines
from data.sources.count import LeftOut
from data.text import find_special

MAX_BYTES = 2**24  # of one revision; MediaWiki allows 2 MB of text, and escapes make it longer
TAGS = (b"<page>", b"</page>", b"<revision>", b"</revision>")  # each is alone on its line; in texts < is &lt;
SENTENCE_END = r"[.!?][\"')\]]*"
SENTENCE_BREAK = re.compile(rf"{SENTENCE_END}(?=\s)")
END_OF_SENTENCE_OR_LINE = re.compile(rf"{SENTENCE_END}(?=\s|\Z)|(?=\n)|\Z")
NEXT_SENTENCE_OR_LINE = re.compile(rf"\s*(?=\S).*?(?:{END_OF_SENTENCE_OR_LINE.pattern})")


def add_flags(parser):
    add = parser.add_argument
    add("--window", type=int, default=15,
        help="how many revisions back a restored text is looked for (default: %(default)s)")
    add("--context_chars", type=int, default=2000,
        help="characters before the change that are its context (default: %(default)s)")
    add("--max_chars", type=int, default=2000,
        help="characters of the longest completion that is kept (default: %(default)s)")
    add("--plain", action="store_true", help="remove wiki markup (needs mwparserfromhell)")


class Revision(NamedTuple):
    contributor: str | None  # name or address; None if it is hidden
    text: str | None  # None if it is hidden, or not in the export


class Revert(NamedTuple):
    """A revert that counts unless it is undone soon."""
    last_chance: int  # the number of the last revision of the page that may undo it
    undone_text: str
    comparison: dict


def records(paths, args, count):
    """Yield the comparisons of exports with full history. The context is the page's title and the text
    before the change, the completions are the passage [as restored, as reverted], the scores are [1, 0],
    and the group is the title. A revert that is undone within the window is left out, since the text that
    stays is the good one. So is one by which somebody restores text of his own that had been reverted.

    Raises InputError for a damaged compressed file, for a file without pages, and for --plain without
    mwparserfromhell.
    """
    if args.window < 2 or args.max_chars < 1 or args.context_chars < 0:
        raise InputError(f"--window {args.window} --max_chars {args.max_chars} --context_chars "
                         f"{args.context_chars}: give at least 2, 1 and 0")
    to_plain = _markup_remover() if args.plain else str
    for path in paths:
        yield from _comparisons(path, args, count, to_plain)


def _markup_remover():
    try:
        import mwparserfromhell
    except ImportError:
        raise InputError("--plain needs one more package: pip install mwparserfromhell") from None
    return lambda text: mwparserfromhell.parse(text).strip_code()


# ---------------------------------------------------------------------------------------------------------
# Finding reverts


def _comparisons(path, args, count, to_plain):
    before = deque(maxlen=args.window)  # the revisions before this one
    waiting = deque()  # reverts that may still be undone
    number = 0
    for title, revision in _revisions(path, count):
        if revision is None:  # another history begins
            yield from (revert.comparison for revert in waiting)
            waiting.clear()
            before.clear()
            continue
        if before and revision.text is not None and revision.text == before[-1].text:
            continue  # only the page's name or protection changed
        number += 1
        if any(revert.undone_text == revision.text for revert in waiting):
            waiting = deque(revert for revert in waiting if revert.undone_text != revision.text)
            count.drop("reverts undone within --window")
        while waiting and waiting[0].last_chance < number:
            yield waiting.popleft().comparison
        if edits := _reverted_edits(before, revision):
            try:
                if _is_counter_revert(before, revision):
                    raise LeftOut("of a revert, by who wrote the text before it")
                comparison = _comparison(title, edits, revision, args, to_plain)
                waiting.append(Revert(number + args.window, edits[-1].text, comparison))
            except LeftOut as reason:
                count.drop(f"reverts: {reason}")
        before.append(revision)


def _reverted_edits(before, revision):
    """The edits since the last revision with the same text; none if there is no such revision."""
    edits = []
    for earlier in reversed(before):
        if edits and earlier.text is not None and earlier.text == revision.text:
            return edits[::-1]
        edits.append(earlier)
    return []


def _is_counter_revert(before, revision):
    """True if somebody restores text of his own that another one had reverted, as vandals do."""
    author = next(earlier.contributor for earlier in before if earlier.text == revision.text)
    if author is None or author != revision.contributor:
        return False
    return bool(_reverted_edits(list(before)[:-1], before[-1]))


def _comparison(title, edits, revision, args, to_plain):
    """The comparison of the text that `revision` restored with the last of the edits that it reverted. Raises
    LeftOut if there is nothing to learn from it."""
    contributors = {edit.contributor for edit in edits}
    restored, reverted = revision.text, edits[-1].text
    if len(contributors) > 1 or None in contributors and len(edits) > 1:
        raise LeftOut("of several contributors' edits")
    if revision.contributor is not None and revision.contributor in contributors:
        raise LeftOut("of one's own edit")
    if reverted is None:
        raise LeftOut("the reverted text is hidden")
    if len(reverted) < len(restored) / 10 and len(restored) > args.max_chars:
        raise LeftOut("of a blanked page")
    good, bad = to_plain(restored), to_plain(reverted)
    start, good_end, bad_end = changed(good, bad)
    context = f"{title}\n\n{good[max(0, start - args.context_chars):start]}"
    completions = [good[start:good_end].rstrip(), bad[start:bad_end].rstrip()]
    if completions[0].strip() == completions[1].strip():
        raise LeftOut(f"the texts differ in blanks only{', or in markup' if args.plain else ''}")
    if not all(completions):
        raise LeftOut("a side is empty")
    if max(map(len, completions)) > args.max_chars:
        raise LeftOut("a passage is longer than --max_chars")
    if any(map(find_special, (context, *completions))):
        raise LeftOut("with <eot> or <eoc>, special tokens")
    return {"context": context, "completions": completions, "scores": [1, 0], "group": title}


# ---------------------------------------------------------------------------------------------------------
# What changed


def changed(good, bad):
    """Where two texts differ, in whole sentences or lines: (start in both, end in good, end in bad), in
    characters.

    If that leaves one side blank, a sentence or line beside the change, the same in both texts, is taken in.
    """
    prefix = _shared_length(good, bad)
    suffix = _shared_length(good[prefix:][::-1], bad[prefix:][::-1])
    start = _sentence_start(good, prefix)
    rest = good[len(good) - suffix:]  # what follows the change
    sides = [good[start:len(good) - suffix], bad[start:len(bad) - suffix]]
    if not all(map(str.strip, sides)):
        if following := NEXT_SENTENCE_OR_LINE.match(rest):
            suffix -= following.end()
        else:
            start = _sentence_start(good, len(good[:start].rstrip()))
    elif not all(_ends_sentence_or_line(side, rest) for side in sides):
        suffix -= END_OF_SENTENCE_OR_LINE.search(rest).end()
    return start, len(good) - suffix, len(bad) - suffix


def _shared_length(a, b):
    """The number of leading characters that are the same, found by halving because texts are long."""
    indexes = range(min(len(a), len(b)))
    return bisect.bisect_left(indexes, True, key=lambda i: not a.startswith(b[:i + 1]))


def _sentence_start(text, position):
    """Where the sentence or line around `position` begins. The blank before a sentence belongs to it."""
    line_start = text.rfind("\n", 0, position) + 1
    breaks = [found.end() for found in SENTENCE_BREAK.finditer(text, line_start, position)]
    return breaks[-1] if breaks else line_start


def _ends_sentence_or_line(text, rest):
    """Whether `text` ends with a sentence or line, if `rest` follows it."""
    ends_sentence = re.search(SENTENCE_END + r"\Z", text[-20:]) and rest[:1].isspace()
    return text.endswith("\n") or bool(ends_sentence)


# ---------------------------------------------------------------------------------------------------------
# Reading exports


def _parts(path, count):
    """Yield (tag, its line number, the lines since the tag before, that tag's line number) for the TAGS of an
    export, and last for the end of the file, with the tag None. The lines are None if they are too many."""
    lines, size, start, number = [], 0, 0, 0
    for number, line in read_lines(path, count.progress):
        tag = line.strip() if line.endswith(b">") else b""
        if tag in TAGS:
            yield tag, number, lines, start
            lines, size, start = [], 0, number
            continue
        size += len(line) + 1
        if size > MAX_BYTES:
            lines = None
        else:
            lines.append(line)
    yield None, number, lines, start


def _parse(name, lines, start):
    """The XML element <name> with these lines. Raises ValueError if they are too many or not XML."""
    if lines is None:
        raise ValueError(f"a {name} of more than {MAX_BYTES >> 20} MB")
    try:
        return ElementTree.fromstringlist([f"<{name}>\n", b"\n".join(lines), f"</{name}>"])
    except ElementTree.ParseError as error:
        raise ValueError(f"not well-formed XML in line {start + error.position[0] - 1}") from None


def _revisions(path, count):
    """Yield (title, Revision) for the revisions of an export's articles, and (title, None) where a history
    begins: with each page; after a broken revision, since nothing can be said across it; and at the end."""
    title = None  # of the article that is being read; None in pages that are left out
    inside = ""  # "page", before the page's first revision; "revision"; "history", between two revisions
    n_pages = 0

    def broken(line_number, problem):
        count.bad(f"{path}:{line_number}", f"{problem} (page {title!r})" if title else str(problem))

    for tag, number, lines, start in _parts(path, count):
        if tag and (inside == "revision" and tag != b"</revision>" or inside and tag == b"<page>"):
            broken(start, f"this {inside} has no end")
            yield title, None
        if tag == b"<page>":
            n_pages += 1
            title, inside = None, "page"
        elif tag == b"<revision>":
            count.total += 1
            try:
                if not inside:
                    raise ValueError("a revision outside a page")
                if inside == "page":
                    title = _title(_parse("page", lines, start), count)
                    yield title, None
            except ValueError as error:
                broken(number, error)
            inside = inside and "revision"
        elif tag == b"</revision>":
            try:
                if inside in ("page", "history"):
                    raise ValueError("the end of a revision without its beginning")
                if title:
                    yield title, _revision(_parse("revision", lines, start))
            except ValueError as error:
                broken(start, error)
                yield title, None
            inside = inside and "history"
        elif tag == b"</page>":
            title, inside = None, ""
    if not n_pages:
        raise InputError(f"{path}: no <page> on a line of its own; is this a MediaWiki export, "
                         "pages-meta-history?")
    if inside:
        broken(start, f"the file ends within this {inside}")
    yield None, None


def _title(page, count):
    """The title of an article, or None for a page that is left out."""
    title, namespace = page.findtext("title"), page.findtext("ns")
    if not title or namespace is None:
        raise ValueError("a page without <title> or <ns>")
    if namespace.strip() != "0":
        count.drop("pages outside namespace 0")
        return None
    if page.find("redirect") is not None:
        count.drop("pages that are redirects now")
        return None
    return title


def _revision(element):
    text = element.find("text")
    if text is None:
        raise ValueError("a revision without <text>")
    content = text.text or ""
    is_missing = not content and text.get("bytes", "0") != "0"  # in exports of outlines
    is_hidden = "deleted" in text.attrib
    contributor = element.find("contributor")
    names = [] if contributor is None else [contributor.findtext("username"), contributor.findtext("ip")]
    return Revision(next(filter(None, names), None), None if is_hidden or is_missing else content)
