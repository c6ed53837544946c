"""HTML to text in the manner of Markdown. Time and room grow no more than linearly, whatever the input is."""
import re

from lxml import etree

CONTROLS = bytes(set(range(32)) - set(b"\t\n\r"))  # control characters other than white space
DECLARATION = re.compile(r"\s*<\?xml[^>]*\?>")
MAX_MARKS = 20  # items and quotes inside one another that are marked as such; no honest post has more
BLOCKS = frozenset("p div h1 h2 h3 h4 h5 h6 ul ol li dl dt dd blockquote pre table tr hr details summary "
                   "section".split())


def to_text(body):
    """HTML as text: blank lines between paragraphs, ``` around blocks of code and ` around inline code,
    "- ", "1. " and "> " before items and quotes, links as their text, no pictures."""
    body = DECLARATION.sub("", body, count=1)  # lxml does not take one from a text
    if not body.strip():
        return ""
    _writer.begin()
    try:
        text = etree.fromstring(body, _parser)
    except etree.XMLSyntaxError:  # nothing but comments
        return ""
    return re.sub(f"[{CONTROLS.decode()}]", "", text).strip()


class _Writer:
    """Writes down as text what libxml2 finds. The parser calls start, data and end, and at last close."""

    def begin(self):
        self.out = []  # finished blocks and what separates them
        self.line = []  # pieces of the current block; a line end among them is a <br>
        self.marks = []  # of open items and quotes: [prefix of the next line, prefix of further lines]
        self.lists = []  # the number of the next item in each open list, or None in a list without numbers
        self.code_start = None  # where in `line` inline code began
        self.in_pre = False
        self.no_blank_line = False  # before the next block: it is an item of a list or a row of a table
        self.hidden = 0  # how many <script> and <style> are open

    def start(self, tag, attributes):
        if tag in ("script", "style"):
            self.hidden += 1
        elif tag == "br":
            self.line.append("\n")
        elif self.in_pre:
            pass
        elif tag == "code":
            self.code_start = len(self.line)
        elif tag == "sup":  # 10^6, not 106
            self.line.append("^" if self.line and not self.line[-1][-1:].isspace() else "")
        elif tag in ("td", "th"):
            self.line.append(" | " if self.line else "")
        elif tag in BLOCKS:
            self.finish_block()
            self.start_block(tag, attributes)

    def start_block(self, tag, attributes):
        if tag == "pre":
            self.in_pre = True
        elif tag == "blockquote":
            self.marks.append(["> ", "> "])
        elif tag in ("ul", "ol"):
            first = attributes.get("start", "1")
            first = int(first) if first.isdecimal() and len(first) < 9 else 1
            self.lists.append(first if tag == "ol" else None)
            self.no_blank_line = len(self.lists) > 1
        elif tag == "li":
            mark = "- "
            if self.lists and self.lists[-1] is not None:
                mark = f"{self.lists[-1]}. "
                self.lists[-1] += 1
            self.marks.append([mark, " " * len(mark)])

    def end(self, tag):
        if tag in ("script", "style"):
            self.hidden -= 1
        elif self.in_pre:
            if tag == "pre":
                self.finish_pre()
        elif tag == "code" and self.code_start is not None:
            self.finish_code()
        elif tag in BLOCKS:
            self.finish_block()
            if tag in ("li", "blockquote") and self.marks:
                self.marks.pop()
            elif tag in ("ul", "ol") and self.lists:
                self.lists.pop()
            self.no_blank_line = tag in ("li", "tr")

    def data(self, text):
        if not self.hidden:
            self.line.append(text if self.in_pre else text.replace("\n", " "))

    def close(self):
        if self.in_pre:
            self.finish_pre()
        self.finish_block()
        return "".join(self.out)

    def finish_pre(self):
        text = "".join(self.line).strip("\n")
        longest = max(map(len, re.findall("`+", text)), default=0)
        fence = "`" * max(3, longest + 1)
        self.line, self.in_pre = [], False
        if text.strip():
            self.write([fence, *text.split("\n"), fence])

    def finish_code(self):
        text = "".join(self.line[self.code_start:])
        marked = f"`` {text} ``" if "`" in text else f"`{text}`"
        self.line[self.code_start:] = [marked] if text.strip() else []
        self.code_start = None

    def finish_block(self):
        """Write the current block. Runs of white space become single blanks."""
        lines = [" ".join(line.split()) for line in "".join(self.line).strip().split("\n")]
        self.line, self.code_start = [], None
        if any(lines):
            self.write(lines)

    def write(self, lines):
        if self.out:
            self.out.append("\n" if self.no_blank_line else "\n\n")
        self.no_blank_line = False
        marks = self.marks[:MAX_MARKS]
        first_prefix = "".join(first for first, _ in marks)
        for mark in marks:
            mark[0] = mark[1]
        further_prefix = "".join(further for _, further in marks)
        prefixes = [first_prefix] + [further_prefix] * (len(lines) - 1)
        self.out.append("\n".join(prefix + line if line else prefix.rstrip()
                                  for prefix, line in zip(prefixes, lines)))


_writer = _Writer()
_parser = etree.HTMLParser(target=_writer, huge_tree=True)  # making one takes longer than reading a text
