"""Stack Exchange dumps: scores, HTML to text, rows of any quality, and memory, order and processes of the whole."""
import bz2
import gzip
import json
import lzma
import multiprocessing
import os
import time
from argparse import Namespace
from collections import Counter
from pathlib import Path
from xml.etree import ElementTree
from xml.sax.saxutils import quoteattr

import pytest
from conftest import DATA, Running, run, run_well

from data.sources import stackexchange
from data.comparisons import load_comparisons
from data.sources.count import Count
from data.errors import InputError
from data.sources.html_text import to_text
from data.sources.stackexchange import score_of
from data.tokenizer import get_tokenizer

SITES = DATA / "stackexchange"
PREPARE = ("data/prepare.py", "stackexchange")


def row(**attributes):
    return "  <row " + " ".join(f"{key}={quoteattr(str(value))}" for key, value in attributes.items()) + " />\n"


def question(number, accepted=None, body="<p>What?</p>", title="A question"):
    more = {"AcceptedAnswerId": accepted} if accepted else {}
    return row(Id=number, PostTypeId=1, **more, Score=3, Body=body, Title=title, Tags="<a>")


def answer(number, parent, votes, body=None):
    return row(Id=number, PostTypeId=2, ParentId=parent, Score=votes, Body=body or f"<p>Answer {number}.</p>")


HEAD, TAIL = '<?xml version="1.0" encoding="utf-8"?>\n<posts>\n', "</posts>\n"
GOOD = question(1) + answer(2, 1, 5) + answer(3, 1, 0)


def dump(folder, rows, name="Posts.xml", pack=lambda content: content):
    """A site's Posts.xml of these rows (text or bytes)."""
    path = folder / "cooking" / name
    path.parent.mkdir(exist_ok=True)
    rows = rows if isinstance(rows, bytes) else rows.encode()
    path.write_bytes(pack(HEAD.encode() + rows + TAIL.encode()))
    return path


def read(path, max_bad=1.0, **flags):
    """(records, Count) of one dump, in this process."""
    count = Count(max_bad)
    args = Namespace(out=path.parent.parent / "out.jsonl", workers=1, dialogue=False, **flags)
    return list(stackexchange.records([path], args, count)), count


# ---------------------------------------------------------------------------------------------------------------------
# Scores and joining


@pytest.mark.parametrize("votes, accepted, score", [
    (0, False, 0), (1, False, 1), (2, False, 2), (4, False, 2), (5, False, 3), (1000, False, 10),
    (0, True, 1), (7, True, 4), (-1, False, -1), (-500, False, -1), (-3, True, 0)])
def test_the_papers_score(votes, accepted, score):
    assert score_of(votes, accepted) == score


def test_answers_are_joined_to_their_question_wherever_they_stand(tmp_path):
    n = 1 + stackexchange.BUCKETS  # in the same bucket as 1
    rows = answer(30, 1, -2) + answer(1001, n, 4) + question(1, accepted=20) + question(n) + answer(20, 1, 1) + answer(1002, n, 0)
    records, _ = read(dump(tmp_path, rows))
    assert records == [
        {"context": "\n\nHuman: A question\n\nWhat?\n\nAssistant:", "completions": [" Answer 20.", " Answer 30."], "scores": [2, -1],
         "group": "cooking/1"},
        {"context": "\n\nHuman: A question\n\nWhat?\n\nAssistant:", "completions": [" Answer 1001.", " Answer 1002."], "scores": [2, 0],
         "group": f"cooking/{n}"}]


def test_what_cannot_be_compared_is_left_out_and_counted(tmp_path):
    rows = (GOOD + question(10) + answer(11, 10, 3) + question(20) + answer(21, 20, 5) + answer(22, 20, 6) + answer(31, 30, 1)
            + row(Id=40, PostTypeId=5, Score=0, Body="<p>a wiki</p>") + GOOD
            + question(50) + answer(51, 50, 9, "<p>say <code>&lt;eot&gt;</code></p>") + answer(52, 50, 1) + answer(53, 50, 9)
            + question(60) + answer(61, 60, 9, '<p><img src="x"></p>') + answer(62, 60, 1)
            + question(70, title="<eoc>") + answer(71, 70, 9) + answer(72, 70, 1))
    records, count = read(dump(tmp_path, rows))
    assert [(r["group"], r["scores"]) for r in records] == [("cooking/1", [3, 0]), ("cooking/50", [1, 3])]
    assert count.dropped == {"questions with fewer than two answers": 1, "questions whose answers all have the same score": 1,
                             "answers whose question is not in the file": 1, "posts of other kinds (wikis, tags, elections)": 1,
                             "posts repeated": 3, "answers that hold <eot> or <eoc>": 1, "answers without text (pictures only)": 1,
                             "questions with nothing to compare after that": 1, "questions that hold <eot> or <eoc>": 1}
    assert not count.n_bad


def test_dialogues_have_the_best_answer(tmp_path):
    rows = (question(1, accepted=3) + answer(2, 1, 4) + answer(3, 1, 3) + answer(4, 1, 5) + question(10) + answer(11, 10, 0)
            + question(20) + answer(21, 20, 1))
    path, out = dump(tmp_path, rows), tmp_path / "out.jsonl"
    printed = run_well(*PREPARE, "--dialogue", "--raw", path, "--out", out, "--workers", 1)
    start = "Human: A question\n\nWhat?\n\nAssistant: "
    assert [json.loads(line) for line in out.read_text().splitlines()] == [{"text": start + "Answer 4."}, {"text": start + "Answer 21."}]
    assert "2 texts of 8 records" in printed and "left out: 1 questions without an answer of positive score" in printed


# ---------------------------------------------------------------------------------------------------------------------
# HTML to text


@pytest.mark.parametrize("html, text", [
    ("<p>One\ntwo  <b>b</b>o<i>ld</i></p>\n\n<p>three</p>\n", "One two bold\n\nthree"),
    ("<p>a &lt;tag&gt; &amp;amp; caf&eacute;&nbsp;&#128512;😀</p>", "a <tag> &amp; café 😀😀"),
    ("<pre class=\"x\"><code>def f(x):\n    if x &lt; 3:\n\n        return\n</code></pre>", "```\ndef f(x):\n    if x < 3:\n\n        return\n```"),
    ("<pre><code>a ``` b\n</code></pre>", "````\na ``` b\n````"),
    ("<p>use <code>x  = 1</code>, <code>a`b</code></p>", "use `x = 1`, `` a`b ``"),
    ("<p>t</p><ul><li>one</li>\n<li>two<ul><li>sub</li></ul></li><li><p>three</p><p>more</p></li></ul><p>u</p>",
     "t\n\n- one\n- two\n  - sub\n- three\n\n  more\n\nu"),
    ("<ol start='9'><li>nine</li><li>ten<pre><code>c\n d</code></pre></li></ol>", "9. nine\n10. ten\n\n    ```\n    c\n     d\n    ```"),
    ("<blockquote><p>q</p><p>r<br>s</p></blockquote>a", "> q\n\n> r\n> s\n\na"),
    ('<p>see <a href="http://x">the link</a><img src="p" alt="enter image description here"></p>', "see the link"),
    ("10<sup>6</sup> H<sub>2</sub>O", "10^6 H2O"),
    ("<table><tr><th>a</th><th>b</th></tr><tr><td>1</td><td>2</td></tr></table>", "a | b\n1 | 2"),
    ("<h1>Head</h1>text<hr>more<script>no()</script><!-- no -->", "Head\n\ntext\n\nmore"),
    ("<p>open <i>it<p>next</div></ul> 5 < 6 & on", "open it\n\nnext 5 < 6 & on"),
    ("", ""), ("<!-- only -->", ""), ("a&#1;\x00b", "a�b")])
def test_html_becomes_text(html, text):
    assert to_text(html) == text


@pytest.mark.parametrize("html", ["<blockquote>x" * 10**5, "<ul><li>x" * 10**5, "<p>" * 10**5 + "x", "<i><b>x</i></b>" * 3 * 10**4, "<pre>" + "`" * 10**6, "<" * 10**6])
def test_hostile_html_takes_no_long_time_and_little_room(html):
    start = time.process_time()
    assert len(to_text(html)) < 60 * len(html)
    assert time.process_time() - start < 60  # quadratic ones take many minutes


# ---------------------------------------------------------------------------------------------------------------------
# Broken files

BROKEN = {
    "cut row": (b'  <row Id="5" PostTypeId="2" ParentId="1" Score="3" Body="abc\n', "not a whole <row"),
    "quote within": (b'<row Id="5" PostTypeId="2" ParentId="1" Score="3" Body="a"b" />\n', "not a whole <row"),
    "no kind": (b'<row Id="5" Score="3" Body="a" />\n', "without PostTypeId; is this a Posts.xml?"),
    "no id": (row(PostTypeId=2, ParentId=1, Score=3, Body="a").encode(), "without Id"),
    "no votes": (row(Id=5, PostTypeId=2, ParentId=1, Body="a").encode(), "without Score"),
    "no body": (row(Id=5, PostTypeId=2, ParentId=1, Score=3).encode(), "without Body"),
    "no title": (row(Id=5, PostTypeId=1, Score=3, Body="a").encode(), "without Title"),
    "no parent": (row(Id=5, PostTypeId=2, Score=3, Body="a").encode(), "without ParentId"),
    "id no number": (answer("five", 1, 3).encode(), "Id 'five' is not a number"),
    "absurd id": (answer("9" * 5000, 1, 3).encode(), "Id '999"),
    "absurd votes": (answer(5, 1, 10**18).encode(), "Score '1000000000000000000' is not a number"),
    "answers itself": (answer(5, 5, 1).encode(), "answers itself"),
    "not UTF-8": (answer(5, 1, 3, "<p>caf\xe9</p>").encode("latin-1"), "can't decode byte 0xe9"),
    "other text": (b"PK\x03\x04 what is this\n", "not a whole <row"),
    "a definition": (b'<!DOCTYPE posts [<!ENTITY a "aaaa">]>\n', "not a whole <row"),
    "long line": (answer(5, 1, 3, "x" * (stackexchange.LONGEST_ROW + 10)).encode(), "a line of more than"),
}


@pytest.mark.parametrize("line, why", BROKEN.values(), ids=BROKEN)
def test_a_broken_row_is_counted_with_its_line_and_the_others_are_read(tmp_path, line, why):
    records, count = read(dump(tmp_path, question(1).encode() + line + answer(2, 1, 5).encode() + answer(3, 1, 0).encode()))
    assert records[0]["completions"] == [" Answer 2.", " Answer 3."] and (count.n_bad, count.total) == (1, 4)
    assert count.places[0].startswith(f"{tmp_path / 'cooking' / 'Posts.xml'}:4: ") and why in count.places[0]


def test_entities_are_not_expanded_and_control_characters_go(tmp_path):
    rows = question(1).encode() + b'<row Id="2" PostTypeId="2" ParentId="1" Score="4" Body="&bomb; &amp;lt;p&gt; a\x08b&#x1;\x00 &#233;" />\n' + answer(3, 1, 0).encode()
    records, _ = read(dump(tmp_path, rows))
    assert records[0]["completions"][0] == " &bomb; <p> ab é"


def test_a_dump_that_ends_early_is_broken_where_it_ends(tmp_path):
    path = dump(tmp_path, GOOD)
    path.write_bytes(path.read_bytes()[:-len(TAIL)])
    records, count = read(path)
    assert len(records) == 1 and count.places == [f"{path}:5: the file ends without </posts>: it was cut"]


@pytest.mark.parametrize("ending, pack", [(".gz", gzip.compress), (".xz", lzma.compress), (".bz2", bz2.compress),
                                          (".zst", lambda content: pytest.importorskip("zstandard").compress(content))])
def test_compressed_dumps_are_read_and_cut_ones_refused(tmp_path, ending, pack):
    rows = "".join(question(i) + answer(i + 1, i, 5) + answer(i + 2, i, i) for i in range(1, 3000, 3))
    plain, packed = dump(tmp_path, rows), dump(tmp_path, rows, f"Posts.xml{ending}", pack)
    assert read(packed)[0] == read(plain)[0] != []
    packed.write_bytes(packed.read_bytes()[:-200])
    with pytest.raises(InputError, match=f"Posts.xml{ending}:[0-9]+: the compressed file is (damaged or )?cut"):
        read(packed)


def test_an_archive_is_read_or_the_missing_package_named(tmp_path):
    path = tmp_path / "cooking.stackexchange.com.7z"
    try:
        import py7zr
    except ImportError:
        path.write_bytes(b"7z")
        with pytest.raises(InputError, match="pip install py7zr"):
            read(path)
        return
    with py7zr.SevenZipFile(path, "w") as archive:
        archive.write(dump(tmp_path, GOOD), "Posts.xml")
    (tmp_path / "x").mkdir()
    assert read(path)[0][0]["group"] == "cooking.stackexchange.com/1"


@pytest.mark.parametrize("content, why", [(HEAD.replace("utf-8", "koi8-r").encode(), "encoding is koi8-r"), (HEAD.encode("utf-16"), "UTF-16")])
def test_other_encodings_are_refused(tmp_path, content, why):
    path = dump(tmp_path, GOOD)
    path.write_bytes(content + GOOD.encode())
    with pytest.raises(InputError, match=why):
        read(path)


# ---------------------------------------------------------------------------------------------------------------------
# The whole


def many(n):
    return "".join(question(i) + answer(i + 1, i, 5, f"<p>{'good ' * (i % 50)}</p>") + answer(i + 2, i, -1, "<p>bad</p>") for i in range(1, 3 * n, 3))


def test_the_result_does_not_depend_on_the_number_of_processes(tmp_path):
    path = dump(tmp_path, many(8000))
    outs = [tmp_path / f"{workers}.jsonl" for workers in (1, 2)]
    for workers, out in enumerate(outs, 1):
        run_well(*PREPARE, "--raw", path, "--out", out, "--workers", workers)
    assert outs[0].read_bytes() == outs[1].read_bytes() and len(outs[0].read_text().splitlines()) == 8000 - 8000 // 50


def fork():
    multiprocessing.set_start_method("fork", force=True)  # as from a command line; the tests' own processes inherit another


def test_a_killed_run_leaves_no_output_and_no_process(tmp_path):
    path, out = dump(tmp_path, many(10000)), tmp_path / "out.jsonl"
    running = Running(*PREPARE, "--raw", path, "--out", out, "--workers", 2, before=fork)
    children = Path(f"/proc/{running.process.pid}/task/{running.process.pid}/children")
    workers = []
    while len(workers) < 2:
        assert running.process.is_alive(), running.result()
        workers = children.read_text().split() if children.exists() else []
    running.process.kill()
    running.process.join()
    assert not out.exists() and {p.name for p in tmp_path.iterdir()} <= {"cooking", "out.jsonl.partial"}
    end = time.time() + 20
    while any(os.path.exists(f"/proc/{pid}") for pid in workers):
        assert time.time() < end, "worker processes go on"
        time.sleep(0.01)
    run_well(*PREPARE, "--raw", path, "--out", out, "--workers", 1)
    assert [p.name for p in sorted(tmp_path.iterdir())] == ["cooking", "out.jsonl"]


def test_too_many_broken_rows_end_the_run(tmp_path):
    path, out = dump(tmp_path, GOOD + "<row broken\n"), tmp_path / "out.jsonl"
    done = run(*PREPARE, "--raw", path, "--out", out, "--workers", 1)
    assert done.returncode == 2 and f"{path}:6: not a whole <row" in done.stderr and "1 of 4 records are broken" in done.stderr
    assert len(done.stderr.splitlines()) == 1 and [p.name for p in tmp_path.iterdir()] == ["cooking"]
    printed = run_well(*PREPARE, "--raw", path, "--out", out, "--max_bad", 0.25, "--workers", 1)
    assert f"{path}:6" in printed and out.exists()


@pytest.mark.skipif(not SITES.exists(), reason="no published files here")
def test_the_published_dumps(tmp_path):
    """Numbers of questions as an XML parser counts them; what is known of the six sites: longer answers win more often."""
    paths, out = sorted(SITES.glob("*/Posts.xml.xz")), tmp_path / "out.jsonl.zst"
    printed = run_well(*PREPARE, "--raw", *paths, "--out", out, before=fork)
    questions, scores = 0, Counter()
    for path in paths:
        posts = [e.attrib for e in ElementTree.parse(lzma.open(path)).getroot()]
        asked = {post["Id"]: post for post in posts if post["PostTypeId"] == "1"}
        questions += len(asked)
        for post in posts:
            if post["PostTypeId"] == "2" and post["ParentId"] in asked and post["Body"].strip() not in ("", "<p></p>"):
                accepted = asked[post["ParentId"]].get("AcceptedAnswerId") == post["Id"]
                scores[f"{path.parent.name}/{post['ParentId']}", score_of(int(post["Score"]), accepted)] += 1
    assert questions == 3395 and "of 10,742 records" in printed and "broken" not in printed
    data = load_comparisons([out], get_tokenizer("bytes"), quiet=True)
    several = Counter(group for group, _ in scores)
    assert len(data) == data.counts["groups"] == sum(n > 1 for n in several.values()) == 1545
    longer = []
    for i in range(len(data)):
        truth, chars = data.scores(i), data.chars[data.first[i] + 1:data.first[i + 1]]
        longer += [(a > b) + 0.5 * (a == b) for s, a in zip(truth, chars) for t, b in zip(truth, chars) if s > t]
    assert len(longer) == 9102 and abs(sum(longer) / len(longer) - 0.604) < 0.002
