"""HTML to text in the manner of Markdown, in time and room that no input makes more than linear."""
import re

from lxml import etree

CONTROLS = bytes(set(range(32)) - set(b"\t\n\r"))
MARKS = 20  # items and quotes in one another that are marked as such; no honest post has more
BLOCKS = frozenset("p div h1 h2 h3 h4 h5 h6 ul ol li dl dt dd blockquote pre table tr hr details summary section".split())


class _Text:
    """Receives what libxml2 finds in the HTML and writes it down as text in the manner of Markdown."""

    def __init__(self):
        self.begin()

    def begin(self):
        self.out = []  # finished blocks and what separates them
        self.line = []  # pieces of the block under way; a line end there is a <br>
        self.marks = []  # of open items and quotes: [what the next line begins with, what further lines begin with]
        self.lists = []  # the number of the next item in each open list; None where they are not numbered
        self.code = None  # where in `line` inline code began
        self.pre = False
        self.close_up = False  # no blank line before the next block: items of a list, rows of a table
        self.silent = 0  # inside of <script> or <style>

    def start(self, tag, attributes):
        if tag in ("script", "style"):
            self.silent += 1
        elif tag == "br":
            self.line.append("\n")
        elif self.pre:
            pass
        elif tag == "code":
            self.code = len(self.line)
        elif tag == "sup":
            self.line.append("^" if self.line and not self.line[-1][-1:].isspace() else "")  # 10^6, not 106
        elif tag in ("td", "th"):
            self.line.append(" | " if self.line else "")
        elif tag in BLOCKS:
            self.flush()
            if tag == "pre":
                self.pre = True
            elif tag == "blockquote":
                self.marks.append(["> ", "> "])
            elif tag in ("ul", "ol"):
                first = attributes.get("start", "1")
                self.lists.append(None if tag == "ul" else int(first) if first.isdecimal() and len(first) < 9 else 1)
                self.close_up = len(self.lists) > 1
            elif tag == "li":
                number = self.lists[-1] if self.lists else None
                if number is not None:
                    self.lists[-1] += 1
                mark = "- " if number is None else f"{number}. "
                self.marks.append([mark, " " * len(mark)])

    def end(self, tag):
        if tag in ("script", "style"):
            self.silent -= 1
        elif self.pre:
            if tag == "pre":
                text = "".join(self.line).strip("\n")
                fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
                self.line, self.pre = [], False
                if text.strip():
                    self.emit([fence, *text.split("\n"), fence])
        elif tag == "code" and self.code is not None:
            text = "".join(self.line[self.code:])
            around = ("`", "`") if "`" not in text else ("`` ", " ``")
            self.line[self.code:] = [text.join(around)] if text.strip() else []
            self.code = None
        elif tag in BLOCKS:
            self.flush()
            if tag in ("li", "blockquote") and self.marks:
                self.marks.pop()
            elif tag in ("ul", "ol") and self.lists:
                self.lists.pop()
            self.close_up = tag in ("li", "tr")

    def data(self, text):
        if not self.silent:
            self.line.append(text if self.pre else text.replace("\n", " "))

    def flush(self):
        """The block under way is complete: white space shrinks to single blanks."""
        lines = [" ".join(line.split()) for line in "".join(self.line).strip().split("\n")]
        self.line, self.code = [], None
        if any(lines):
            self.emit(lines)

    def emit(self, lines):
        if self.out:
            self.out.append("\n" if self.close_up else "\n\n")
        self.close_up = False
        marks = self.marks[:MARKS]
        begin = "".join(first for first, _ in marks)
        for mark in marks:
            mark[0] = mark[1]
        further = "".join(rest for _, rest in marks)
        self.out.append("\n".join((prefix + line) if line else prefix.rstrip()
                                  for prefix, line in zip((begin, *[further] * (len(lines) - 1)), lines)))

    def close(self):
        if self.pre:
            self.end("pre")
        self.flush()
        return "".join(self.out)


_target = _Text()
_parser = etree.HTMLParser(target=_target, huge_tree=True)


def to_text(body):
    """HTML -> text: paragraphs apart by blank lines, ``` around blocks of code and ` around inline code, "- ", "1. " and "> "
    before items and quotes, links as their text, no pictures."""
    if not body.strip():
        return ""
    _target.begin()
    try:
        return re.sub(f"[{CONTROLS.decode()}]", "", etree.fromstring(body, _parser)).strip()
    except etree.XMLSyntaxError:  # nothing but comments
        return ""
