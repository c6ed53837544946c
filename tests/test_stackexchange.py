"""Stack Exchange dumps: scores, HTML to text, broken rows, and the command as a whole."""
import json
import lzma
import multiprocessing
import os
import time
from collections import Counter
from pathlib import Path
from xml.etree import ElementTree
from xml.sax.saxutils import quoteattr

import pytest
from conftest import DATA, Running, convert, run, run_well

from data.comparisons import load_comparisons
from data.errors import InputError
from data.sources import stackexchange
from data.sources.html_text import to_text
from data.sources.stackexchange import score_of
from data.tokenizer import get_tokenizer

SITES = DATA / "stackexchange"
COMMAND = ("data/prepare.py", "stackexchange")


def row(**attributes):
    fields = " ".join(f"{name}={quoteattr(str(value))}" for name, value in attributes.items())
    return f"  <row {fields} />\n"


def question(number, accepted=None, body="<p>What?</p>", title="A question"):
    more = {"AcceptedAnswerId": accepted} if accepted else {}
    return row(Id=number, PostTypeId=1, **more, Score=3, Body=body, Title=title, Tags="<a>")


def answer(number, parent, votes, body=None):
    return row(Id=number, PostTypeId=2, ParentId=parent, Score=votes, Body=body or f"<p>Answer {number}.</p>")


HEAD, TAIL = '<?xml version="1.0" encoding="utf-8"?>\n<posts>\n', "</posts>\n"
GOOD = question(1) + answer(2, 1, 5) + answer(3, 1, 0)
CONTEXT = "\n\nHuman: A question\n\nWhat?\n\nAssistant:"


def dump(folder, *rows):
    """The Posts.xml of the site "cooking" with these rows, given as text or bytes."""
    path = folder / "cooking" / "Posts.xml"
    path.parent.mkdir(exist_ok=True)
    rows = [rows if isinstance(rows, bytes) else rows.encode() for rows in (HEAD, *rows, TAIL)]
    path.write_bytes(b"".join(rows))
    return path


def read(path, *flags):
    """(records, Count) of one dump, in this process."""
    return convert(stackexchange, [path], "--workers", 1, *flags, max_bad=1)


# ---------------------------------------------------------------------------------------------------------
# Scores, and bringing questions and answers together


@pytest.mark.parametrize("votes, accepted, score", [
    (0, False, 0), (1, False, 1), (2, False, 2), (4, False, 2), (5, False, 3), (1000, False, 10),
    (0, True, 1), (7, True, 4), (-1, False, -1), (-500, False, -1), (-3, True, 0)])
def test_the_papers_score(votes, accepted, score):
    assert score_of(votes, accepted) == score


def test_answers_come_to_their_question_wherever_they_stand(tmp_path):
    n = 1 + stackexchange.BUCKETS  # in the same bucket as question 1
    path = dump(tmp_path, answer(30, 1, -2), answer(1001, n, 4), question(1, accepted=20), question(n),
                answer(20, 1, 1), answer(1002, n, 0))
    records, _ = read(path)
    assert records == [
        {"context": CONTEXT, "completions": [" Answer 20.", " Answer 30."], "scores": [2, -1],
         "group": "cooking/1"},
        {"context": CONTEXT, "completions": [" Answer 1001.", " Answer 1002."], "scores": [2, 0],
         "group": f"cooking/{n}"}]


def test_what_cannot_be_compared_is_left_out_and_counted(tmp_path):
    path = dump(
        tmp_path, GOOD, question(10), answer(11, 10, 3), question(20), answer(21, 20, 5), answer(22, 20, 6),
        answer(31, 30, 1), row(Id=40, PostTypeId=5, Score=0, Body="<p>a wiki</p>"), GOOD,
        question(50), answer(51, 50, 9, "<p>say <code>&lt;eot&gt;</code></p>"), answer(52, 50, 1),
        answer(53, 50, 9), question(60), answer(61, 60, 9, '<p><img src="x"></p>'), answer(62, 60, 1),
        question(70, title="<eoc>"), answer(71, 70, 9), answer(72, 70, 1))
    records, count = read(path)
    assert [(r["group"], r["scores"]) for r in records] == [("cooking/1", [3, 0]), ("cooking/50", [1, 3])]
    assert count.dropped == {
        "questions with fewer than two answers": 1, "questions whose answers all have the same score": 1,
        "answers whose question is not in the file": 1, "posts of other kinds (wikis, tags, elections)": 1,
        "posts repeated": 3, "answers that hold <eot> or <eoc>": 1, "answers without text (pictures only)": 1,
        "questions with nothing to compare after that": 1, "questions that hold <eot> or <eoc>": 1}
    assert not count.n_bad


def test_dialogues_have_the_best_answer(tmp_path):
    path = dump(tmp_path, question(1, accepted=3), answer(2, 1, 4), answer(3, 1, 3), answer(4, 1, 5),
                question(10), answer(11, 10, 0), question(20), answer(21, 20, 1))
    out = tmp_path / "out.jsonl"
    printed = run_well(*COMMAND, "--dialogue", "--raw", path, "--out", out, "--workers", 1)
    assert [json.loads(line) for line in out.read_text().splitlines()] == [
        {"text": f"{CONTEXT.strip()} Answer {number}."} for number in (4, 21)]
    assert "2 texts of 8 records" in printed
    assert "left out: 1 questions without an answer of positive score" in printed


# ---------------------------------------------------------------------------------------------------------
# HTML to text


@pytest.mark.parametrize("html, text", [
    ("<p>One\ntwo  <b>b</b>o<i>ld</i></p>\n\n<p>three</p>\n", "One two bold\n\nthree"),
    ("<p>a &lt;tag&gt; &amp;amp; caf&eacute;&nbsp;&#128512;😀</p>", "a <tag> &amp; café 😀😀"),
    ("<pre class=\"x\"><code>def f(x):\n    if x &lt; 3:\n\n        return\n</code></pre>",
     "```\ndef f(x):\n    if x < 3:\n\n        return\n```"),
    ("<pre><code>a ``` b\n</code></pre>", "````\na ``` b\n````"),
    ("<p>use <code>x  = 1</code>, <code>a`b</code></p>", "use `x = 1`, `` a`b ``"),
    ("<p>t</p><ul><li>one</li>\n<li>two<ul><li>sub</li></ul></li><li><p>three</p><p>more</p></li></ul>"
     "<p>u</p>",
     "t\n\n- one\n- two\n  - sub\n- three\n\n  more\n\nu"),
    ("<ol start='9'><li>nine</li><li>ten<pre><code>c\n d</code></pre></li></ol>",
     "9. nine\n10. ten\n\n    ```\n    c\n     d\n    ```"),
    ("<blockquote><p>q</p><p>r<br>s</p></blockquote>a", "> q\n\n> r\n> s\n\na"),
    ('<p>see <a href="http://x">the link</a><img src="p" alt="enter image description here"></p>',
     "see the link"),
    ("10<sup>6</sup> H<sub>2</sub>O", "10^6 H2O"),
    ("<table><tr><th>a</th><th>b</th></tr><tr><td>1</td><td>2</td></tr></table>", "a | b\n1 | 2"),
    ("<h1>Head</h1>text<hr>more<script>no()</script><!-- no -->", "Head\n\ntext\n\nmore"),
    ("<p>open <i>it<p>next</div></ul> 5 < 6 & on", "open it\n\nnext 5 < 6 & on"),
    ("", ""), ("<!-- only -->", ""), ("a&#1;\x00b", "a�b")])
def test_html_becomes_text(html, text):
    assert to_text(html) == text


@pytest.mark.parametrize("html", ["<blockquote>x" * 10**5, "<ul><li>x" * 10**5, "<p>" * 10**5 + "x",
                                  "<i><b>x</i></b>" * 3 * 10**4, "<pre>" + "`" * 10**6, "<" * 10**6])
def test_hostile_html_takes_no_long_time_and_little_room(html):
    start = time.process_time()
    assert len(to_text(html)) < 60 * len(html)
    assert time.process_time() - start < 60  # what is quadratic takes many minutes


# ---------------------------------------------------------------------------------------------------------
# Broken files

BROKEN = {  # a row, and words of the answer
    "cut row": (answer(5, 1, 3)[:-8] + "\n", "not a whole <row"),
    "quote within": ('<row Id="5" PostTypeId="2" ParentId="1" Score="3" Body="a"b" />\n', "not a whole <row"),
    "no kind": (b'<row Id="5" Score="3" Body="a" />\n', "without PostTypeId; is this a Posts.xml?"),
    "no id": (row(PostTypeId=2, ParentId=1, Score=3, Body="a"), "without Id"),
    "no votes": (row(Id=5, PostTypeId=2, ParentId=1, Body="a"), "without Score"),
    "no body": (row(Id=5, PostTypeId=2, ParentId=1, Score=3), "without Body"),
    "no title": (row(Id=5, PostTypeId=1, Score=3, Body="a"), "without Title"),
    "no parent": (row(Id=5, PostTypeId=2, Score=3, Body="a"), "without ParentId"),
    "id no number": (answer("five", 1, 3), "Id 'five' is not a number"),
    "absurd id": (answer("9" * 5000, 1, 3), "Id '999"),
    "absurd votes": (answer(5, 1, 10**18), "Score '1000000000000000000' is not a number"),
    "answers itself": (answer(5, 5, 1), "answers itself"),
    "not UTF-8": (answer(5, 1, 3, "<p>caf\xe9</p>").encode("latin-1"), "can't decode byte 0xe9"),
    "other text": (b"PK\x03\x04 what is this\n", "not a whole <row"),
    "a definition": (b'<!DOCTYPE posts [<!ENTITY a "aaaa">]>\n', "not a whole <row"),
    "long line": (answer(5, 1, 3, "x" * (stackexchange.LONGEST_ROW + 10)), "a line of more than"),
}


@pytest.mark.parametrize("line, words", BROKEN.values(), ids=BROKEN)
def test_a_broken_row_is_counted_with_its_line_and_the_others_are_read(tmp_path, line, words):
    path = dump(tmp_path, question(1), line, answer(2, 1, 5), answer(3, 1, 0))
    records, count = read(path)
    assert records[0]["completions"] == [" Answer 2.", " Answer 3."]
    assert (count.n_bad, count.total) == (1, 4)
    assert count.places[0].startswith(f"{path}:4: ") and words in count.places[0]


def test_entities_are_not_expanded_and_control_characters_go(tmp_path):
    odd = b'<row Id="2" PostTypeId="2" ParentId="1" Score="4" ' \
          b'Body="&bomb; &amp;lt;p&gt; a\x08b&#x1;\x00 &#233;" />\n'
    records, _ = read(dump(tmp_path, question(1), odd, answer(3, 1, 0)))
    assert records[0]["completions"][0] == " &bomb; <p> ab é"


def test_a_dump_that_ends_early_is_broken_where_it_ends(tmp_path):
    path = dump(tmp_path, GOOD)
    path.write_bytes(path.read_bytes()[:-len(TAIL)])
    records, count = read(path)
    assert len(records) == 1 and count.places == [f"{path}:5: the file ends without </posts>: it was cut"]


def test_a_cut_compressed_dump_is_refused(tmp_path):
    rows = [question(i) + answer(i + 1, i, 5) + answer(i + 2, i, i) for i in range(1, 3000, 3)]
    plain = dump(tmp_path, *rows)
    packed = plain.with_suffix(".xml.xz")
    packed.write_bytes(lzma.compress(plain.read_bytes()))
    assert read(packed)[0] == read(plain)[0] != []
    packed.write_bytes(packed.read_bytes()[:-200])
    with pytest.raises(InputError, match="Posts.xml.xz:[0-9]+: the compressed file is damaged or cut"):
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
    for names, found in ((["Badges.xml", "Posts.xml", "Votes.xml"], 1), (["Badges.xml"], 0)):
        with py7zr.SevenZipFile(path, "w") as archive:
            for name in names:
                archive.writestr("<posts>\n</posts>\n", name) if name != "Posts.xml" else archive.write(
                    dump(tmp_path, GOOD), name)
        if found:
            assert [record["group"] for record in read(path)[0]] == ["cooking.stackexchange.com/1"]
        else:
            with pytest.raises(InputError, match=f"{path}: no Posts.xml in this archive"):
                read(path)


@pytest.mark.parametrize("head, words", [
    (HEAD.replace("utf-8", "koi8-r").encode(), "encoding is koi8-r"), (HEAD.encode("utf-16"), "UTF-16")])
def test_other_encodings_are_refused(tmp_path, head, words):
    path = dump(tmp_path, GOOD)
    path.write_bytes(head + GOOD.encode())
    with pytest.raises(InputError, match=words):
        read(path)


# ---------------------------------------------------------------------------------------------------------
# The command


def many(n):
    for i in range(1, 3 * n, 3):
        good, bad = f"<p>{'good ' * (i % 50)}</p>", "<p>bad</p>"
        yield question(i) + answer(i + 1, i, 5, good) + answer(i + 2, i, -1, bad)


def test_the_result_does_not_depend_on_the_number_of_processes(tmp_path):
    path = dump(tmp_path, *many(8000))
    results = []
    for workers in (1, 2):
        run_well(*COMMAND, "--raw", path, "--out", tmp_path / "out.jsonl", "--workers", workers)
        results.append((tmp_path / "out.jsonl").read_bytes())
    assert results[0] == results[1] and results[0].count(b"\n") == 8000 - 8000 // 50


def fork():
    """Start processes as a script does that runs from the command line; those of the tests start
    otherwise."""
    multiprocessing.set_start_method("fork", force=True)


def test_a_killed_run_leaves_no_output_and_no_process(tmp_path):
    path, out = dump(tmp_path, *many(10000)), tmp_path / "out.jsonl"
    running = Running(*COMMAND, "--raw", path, "--out", out, "--workers", 2, before=fork)
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
    run_well(*COMMAND, "--raw", path, "--out", out, "--workers", 1)
    assert [p.name for p in sorted(tmp_path.iterdir())] == ["cooking", "out.jsonl"]


def test_too_many_broken_rows_end_the_run(tmp_path):
    path, out = dump(tmp_path, GOOD, "<row broken\n"), tmp_path / "out.jsonl"
    done = run(*COMMAND, "--raw", path, "--out", out, "--workers", 1)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
    assert f"{path}:6: not a whole <row" in done.stderr and "1 of 4 records are broken" in done.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["cooking"]
    printed = run_well(*COMMAND, "--raw", path, "--out", out, "--max_bad", 0.25, "--workers", 1)
    assert f"{path}:6" in printed and out.exists()


@pytest.mark.skipif(not SITES.exists(), reason="no published files here")
def test_the_published_dumps(tmp_path):
    """The numbers of questions are those that an XML parser finds, and longer answers win more often, as is
    known of these six sites."""
    paths, out = sorted(SITES.glob("*/Posts.xml.xz")), tmp_path / "out.jsonl.zst"
    printed = run_well(*COMMAND, "--raw", *paths, "--out", out, before=fork)
    n_questions, scores = 0, Counter()
    for path in paths:
        posts = [element.attrib for element in ElementTree.parse(lzma.open(path)).getroot()]
        questions = {post["Id"]: post for post in posts if post["PostTypeId"] == "1"}
        n_questions += len(questions)
        for post in posts:
            is_answer = post["PostTypeId"] == "2" and post["ParentId"] in questions
            if is_answer and post["Body"].strip() not in ("", "<p></p>"):
                accepted = questions[post["ParentId"]].get("AcceptedAnswerId") == post["Id"]
                scores[f"{path.parent.name}/{post['ParentId']}", score_of(int(post["Score"]), accepted)] += 1
    assert n_questions == 3395 and "of 10,742 records" in printed and "broken" not in printed
    data = load_comparisons([out], get_tokenizer("bytes"), quiet=True)
    n_scores = Counter(group for group, _ in scores)
    assert len(data) == data.counts["groups"] == sum(n > 1 for n in n_scores.values()) == 1545
    longer = []
    for i in range(len(data)):
        answers = list(zip(data.scores(i), data.chars[data.first[i] + 1:data.first[i + 1]]))
        longer += [(a > b) + 0.5 * (a == b) for s, a in answers for t, b in answers if s > t]
    assert len(longer) == 9102 and abs(sum(longer) / len(longer) - 0.604) < 0.002
