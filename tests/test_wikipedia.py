"""Wikipedia's exports become comparisons of restored and reverted passages: what counts as a revert, what is left out, broken XML."""
import argparse
import bz2
import gzip
import lzma
import random
import sys
from xml.sax.saxutils import escape

import pytest
import zstandard
from conftest import run, run_well

from data.sources import wikipedia
from data.comparisons import load_comparisons, parse
from data.sources.count import Count
from data.errors import InputError
from data.tokenizer import get_tokenizer

HEAD = '<mediawiki xmlns="http://www.mediawiki.org/xml/export-0.11/" version="0.11" xml:lang="en">\n  <siteinfo>\n    <sitename>W</sitename>\n  </siteinfo>\n'
TEXT = "'''Bread''' is food. It is baked from flour and water.\n\n== History ==\nBread is old. The first loaves were flat.\n\nIt is eaten everywhere."
VANDAL = TEXT.replace("The first loaves were flat.", "The first loaves were made by aliens.")


def revision(who, text, extra=""):
    who = f"<ip>{who}</ip>" if who[0].isdigit() else f"<username>{escape(who)}</username>\n        <id>5</id>"
    return (f"    <revision>\n      <id>1</id>\n      <timestamp>2001-01-21T02:12:21Z</timestamp>\n      <contributor>\n        {who}\n      </contributor>\n"
            f"      <comment>an edit</comment>\n{extra}      <model>wikitext</model>\n      <text bytes=\"{len(text.encode())}\" xml:space=\"preserve\">{escape(text)}</text>\n"
            "      <sha1>abc</sha1>\n    </revision>\n")


def page(*revisions, title="Bread", ns="0", header=""):
    """Revisions are (contributor, text) or XML."""
    body = "".join(r if isinstance(r, str) else revision(*r) for r in revisions)
    return f"  <page>\n    <title>{escape(title)}</title>\n    <ns>{ns}</ns>\n    <id>7</id>\n{header}{body}  </page>\n"


REVERTED = page(("Ann", TEXT), ("1.2.3.4", VANDAL), ("Bob", TEXT))


def convert(folder, content, *flags, max_bad=0.0, name="history.xml"):
    """(comparisons, count) of an export of the given pages, or of raw bytes."""
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else f"{HEAD}{content}</mediawiki>\n".encode())
    parser = argparse.ArgumentParser()
    wikipedia.add_flags(parser)
    count = Count(max_bad)
    found = list(wikipedia.records([path], parser.parse_args([str(flag) for flag in flags]), count))
    for record in found:
        parse(record, "comparison")
    return found, count


def sides(folder, good, bad):
    """What becomes of one reverted change: (text before, good passage, bad passage)."""
    found, count = convert(folder, page(("Ann", good), ("1.2.3.4", bad), ("Bob", good)))
    return (found[0]["context"].removeprefix("Bread\n\n"), *found[0]["completions"]) if found else dict(count.dropped)


# ---------------------------------------------------------------------------------------------------------------------
# Which edits were reverted


def test_a_reverted_edit_is_the_bad_side(tmp_path):
    found, count = convert(tmp_path, REVERTED)
    assert found == [{"context": "Bread\n\n" + TEXT[:TEXT.index(" The first")], "completions": [" The first loaves were flat.", " The first loaves were made by aliens."],
                      "scores": [1, 0], "group": "Bread"}]
    assert count.total == 3 and not count.dropped and not count.n_bad


def test_a_run_of_one_contributors_edits_is_one_bad_side(tmp_path):
    worse = VANDAL.replace("everywhere", "nowhere")
    found, _ = convert(tmp_path, page(("Ann", TEXT), ("1.2.3.4", VANDAL), ("1.2.3.4", worse), ("Bob", TEXT)))
    assert found[0]["completions"][1].endswith("aliens.\n\nIt is eaten nowhere.")
    found, count = convert(tmp_path, page(("Ann", TEXT), ("1.2.3.4", VANDAL), ("5.6.7.8", worse), ("Bob", TEXT)))
    assert not found and count.dropped == {"reverts: of several contributors' edits": 1}


def test_undoing_oneself_is_no_judgement(tmp_path):
    found, count = convert(tmp_path, page(("Ann", TEXT), ("1.2.3.4", VANDAL), ("1.2.3.4", TEXT)))
    assert not found and count.dropped == {"reverts: of one's own edit": 1}


def test_a_revert_that_is_undone_does_not_count(tmp_path):
    war = [("Ann", TEXT), ("1.2.3.4", VANDAL), ("Bob", TEXT), ("1.2.3.4", VANDAL)]
    found, count = convert(tmp_path, page(*war))
    assert [r["completions"][0] for r in found] == [" The first loaves were made by aliens."] and count.dropped == {"reverts undone within --window": 1}
    found, count = convert(tmp_path, page(*war, ("Bob", TEXT)))
    assert [r["completions"][0] for r in found] == [" The first loaves were flat."] and count.dropped == {"reverts undone within --window": 2}


def test_the_window_is_counted_in_revisions(tmp_path):
    def history(edits):
        return page(("Ann", TEXT), *(("1.2.3.4", f"{VANDAL} {i}") for i in range(edits)), ("Bob", TEXT))
    assert len(convert(tmp_path, history(14))[0]) == 1 and not convert(tmp_path, history(15))[0]
    assert len(convert(tmp_path, history(1), "--window", 2)[0]) == 1 and not convert(tmp_path, history(2), "--window", 2)[0]


def test_revisions_without_a_change_are_passed_over(tmp_path):
    history = page(("Ann", TEXT), ("Protector", TEXT), ("1.2.3.4", VANDAL), ("Mover", VANDAL), ("Bob", TEXT), ("Protector", TEXT))
    found, count = convert(tmp_path, history, "--window", 2)
    assert len(found) == 1 and not count.dropped


def test_pages_do_not_mix_and_only_articles_count(tmp_path):
    halves = page(("Ann", TEXT), ("1.2.3.4", VANDAL), title="One") + page(("Bob", TEXT), title="Two")
    assert not convert(tmp_path, halves)[0]
    content = REVERTED.replace("<ns>0", "<ns>1") + REVERTED.replace("    <id>7", '    <redirect title="Loaf" />\n    <id>7') + page(
        ("Ann", TEXT), ("1.2.3.4", VANDAL), ("Bob", TEXT), title="Salt & <Pepper>")
    found, count = convert(tmp_path, content)
    assert [r["group"] for r in found] == ["Salt & <Pepper>"] and found[0]["context"].startswith("Salt & <Pepper>\n\n'''Bread")
    assert count.dropped == {"pages outside namespace 0": 1, "pages that are redirects now": 1} and count.total == 9


def test_hidden_texts_and_names(tmp_path):
    nobody = revision("Ann", VANDAL).replace("<contributor>", '<contributor deleted="deleted" />\n<x>').replace("</contributor>", "</x>")
    assert len(convert(tmp_path, page(("Ann", TEXT), nobody, ("Bob", TEXT)))[0]) == 1
    assert not convert(tmp_path, page(("Ann", TEXT), nobody, nobody.replace("aliens", "dogs"), ("Bob", TEXT)))[0]
    for size in ("", ' bytes="9"'):
        gone = f'<revision>\n<contributor deleted="deleted" />\n<text{size} deleted="deleted" />\n</revision>\n'
        found, count = convert(tmp_path, page(("Ann", TEXT), gone, gone, ("Bob", TEXT)))
        assert not found and count.dropped == {"reverts: of several contributors' edits": 1}
        found, count = convert(tmp_path, page(("Ann", TEXT), gone, ("Bob", TEXT)))
        assert not found and count.dropped == {"reverts: the reverted text is hidden": 1}
        assert not convert(tmp_path, page(gone, ("1.2.3.4", VANDAL), gone))[1].dropped  # two hidden texts are not the same one
    outline = '<revision>\n<contributor><username>A</username></contributor>\n<text bytes="9" id="5" />\n</revision>\n'
    found, count = convert(tmp_path, page(outline, ("1.2.3.4", VANDAL), outline))
    assert not found and not count.n_bad and not count.dropped  # an export of outlines has no texts; they are not all empty


# ---------------------------------------------------------------------------------------------------------------------
# What is compared


def test_a_change_is_taken_in_whole_sentences_or_lines(tmp_path):
    assert sides(tmp_path, "One. Two. Three.", "One. TWO! Three.") == ("One.", " Two.", " TWO!")
    assert sides(tmp_path, "It costs 3.50 euros. B.", "It costs 3.70 euros. B.") == ("", "It costs 3.50 euros.", "It costs 3.70 euros.")
    assert sides(tmp_path, 'He said "no." She left. B.', 'He said "no." She cried. B.') == ('He said "no."', " She left.", " She cried.")
    assert sides(tmp_path, "* a\n* b\n* c", "* a\n* x\n* c") == ("* a\n", "* b", "* x")
    assert sides(tmp_path, "== A ==\ntext", "== A ==\nhi text") == ("== A ==\n", "text", "hi text")
    assert sides(tmp_path, "gut", "schlecht") == ("", "gut", "schlecht")


def test_an_insertion_or_deletion_takes_in_what_is_beside_it(tmp_path):
    assert sides(tmp_path, "A.\nB.", "A.\nX.\nB.") == ("A.\n", "B.", "X.\nB.")
    assert sides(tmp_path, "One. Two. Three. Four.", "One. Three. Four.") == ("One.", " Two. Three.", " Three.")
    assert sides(tmp_path, "One. Two.", "One. Two. X.") == ("One.", " Two.", " Two. X.")
    assert sides(tmp_path, "A.\nB.\n", "A.\nB.\nX.\n") == ("A.\n", "B.", "B.\nX.")
    assert sides(tmp_path, "A.\n\nB.", "A.") == ("", "A.\n\nB.", "A.")
    assert sides(tmp_path, "A.", "") == {"reverts: a side is empty": 1}
    assert sides(tmp_path, "A. B.", "A.  B.") == {"reverts: the texts differ in blanks only": 1}


def test_any_change_leaves_what_is_around_it(tmp_path):
    """Random texts: the parts around the passages are the same, the passages differ, and they join to the texts."""
    rng = random.Random(0)
    for _ in range(3000):
        good, bad = ("".join(rng.choices('ab. \n!"', k=rng.randint(0, 12))) for _ in range(2))
        start, good_end, bad_end = wikipedia.changed(good, bad)
        assert 0 <= start <= min(good_end, bad_end) and good[:start] == bad[:start] and good[good_end:] == bad[bad_end:]
        assert good == bad or good[start:good_end] != bad[start:bad_end]
        if good.strip() and bad.strip():
            assert good[start:good_end].strip() and bad[start:bad_end].strip(), (good, bad)


def test_the_context_is_the_text_before_the_change(tmp_path):
    assert convert(tmp_path, REVERTED, "--context_chars", 12)[0][0]["context"] == "Bread\n\nread is old."
    assert convert(tmp_path, REVERTED, "--context_chars", 0)[0][0]["context"] == "Bread\n\n"


def test_long_passages_and_blanked_pages_are_left_out(tmp_path):
    assert convert(tmp_path, REVERTED, "--max_chars", 37)[1].dropped == {"reverts: a passage is longer than --max_chars": 1}
    assert len(convert(tmp_path, REVERTED, "--max_chars", 38)[0]) == 1
    blanked = page(("Ann", TEXT), ("1.2.3.4", "hi"), ("Bob", TEXT))
    assert convert(tmp_path, blanked, "--max_chars", 100)[1].dropped == {"reverts: of a blanked page": 1}
    assert convert(tmp_path, blanked)[0][0]["completions"] == [TEXT, "hi"]  # a short page


def test_texts_with_special_tokens_are_left_out(tmp_path):
    for good, bad in ((TEXT, VANDAL.replace("aliens", "<eoc>")), (TEXT.replace("Bread is old", "<eot>"), VANDAL.replace("Bread is old", "<eot>"))):
        found, count = convert(tmp_path, page(("Ann", good), ("1.2.3.4", bad), ("Bob", good)))
        assert not found and count.dropped.total() == 1


def test_markup_stays_or_is_taken_out(tmp_path, monkeypatch):
    good, bad = "'''Bread''' is [[food|a food]]. Old.", "'''Bread''' is [[poo]]. Old."
    history = page(("Ann", good), ("1.2.3.4", bad), ("Bob", good))
    assert convert(tmp_path, history)[0][0]["completions"] == ["'''Bread''' is [[food|a food]].", "'''Bread''' is [[poo]]."]
    monkeypatch.setitem(sys.modules, "mwparserfromhell", None)
    with pytest.raises(InputError, match="pip install mwparserfromhell"):
        convert(tmp_path, history, "--plain")
    monkeypatch.undo()
    pytest.importorskip("mwparserfromhell")
    assert convert(tmp_path, history, "--plain")[0][0]["completions"] == ["Bread is a food.", "Bread is poo."]
    found, count = convert(tmp_path, page(("Ann", "'''a'''"), ("1.2.3.4", "''a''"), ("Bob", "'''a'''")), "--plain")
    assert not found and count.dropped.total() == 1


# ---------------------------------------------------------------------------------------------------------------------
# Broken and hostile exports


BROKEN = {  # what is put between two good pages, the words of the answer
    "bad markup": (REVERTED.replace("an edit", "an <edit", 1), "not well-formed XML"),
    "not UTF-8": (REVERTED.replace("an edit", "\udcff", 1), "not well-formed XML"),
    "a control character": (REVERTED.replace("an edit", "\x00", 1), "not well-formed XML"),
    "no text": (REVERTED.replace("<text ", "<words ", 1).replace("</text>", "</words>", 1), "a revision without <text>"),
    "an entity": (REVERTED.replace("an edit", "&lol9;", 1), "not well-formed XML"),
    "a document type": (REVERTED.replace("an edit", '<!DOCTYPE a [<!ENTITY b "bb">]>', 1), "not well-formed XML"),
    "a revision without end": (REVERTED.replace("    </revision>\n", "", 1), "this revision has no end"),
    "a revision without beginning": (REVERTED.replace("    <revision>\n", "", 1), "the end of a revision without its beginning"),
    "a page without end": (REVERTED.replace("  </page>\n", ""), "this history has no end"),
    "a page without title": (REVERTED.replace("<title>Bread</title>", ""), "a page without <title> or <ns>"),
    "a page without namespace": (REVERTED.replace("<ns>0</ns>", ""), "a page without <title> or <ns>"),
    "a revision outside": (revision("Ann", TEXT), "a revision outside a page"),
    "deep nesting": (REVERTED.replace("an edit", "<a>" * 100_000, 1), "not well-formed XML"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_what_is_broken_is_counted_and_the_rest_is_read(tmp_path, case):
    content, words = BROKEN[case]
    before, after = (page(("Ann", TEXT), ("1.2.3.4", VANDAL), ("Bob", TEXT), title=t) for t in ("Before", "After"))
    whole = f"{HEAD}{before}{content}{after}</mediawiki>\n".encode("utf-8", "surrogateescape")
    found, count = convert(tmp_path, whole, max_bad=1)
    assert [r["group"] for r in found if r["group"] != "Bread"] == ["Before", "After"]
    assert count.n_bad == 1 and words in count.places[0] and count.places[0].startswith(f"{tmp_path / 'history.xml'}:")
    assert "<revision>" not in content or len(found) == 2 or case == "a page without end"


def test_the_line_of_broken_xml_is_named(tmp_path):
    content = HEAD + REVERTED + REVERTED.replace("an edit", "an <edit", 1)
    line = content[:content.index("an <edit")].count("\n") + 1
    _, count = convert(tmp_path, content.encode() + b"</mediawiki>", max_bad=1)
    assert f"not well-formed XML in line {line} (page 'Bread')" in count.places[0]


def test_nothing_is_said_across_a_broken_revision(tmp_path):
    broken = revision("1.2.3.4", VANDAL).replace("an edit", "<")
    found, count = convert(tmp_path, page(("Ann", TEXT), broken, ("1.2.3.4", VANDAL), ("Bob", TEXT)), max_bad=1)
    assert not found and count.n_bad == 1 and not count.dropped


def test_entities_are_not_expanded(tmp_path):
    laughs = '<?xml version="1.0"?>\n<!DOCTYPE lolz [\n<!ENTITY lol "lol">\n' + "".join(
        f'<!ENTITY lol{i} "{f"&lol{i - 1 or str()};" * 10}">\n' for i in range(1, 10)) + "]>\n"
    found, count = convert(tmp_path, (laughs + HEAD + REVERTED.replace("an edit", "&lol9;", 1) + "</mediawiki>").encode(), max_bad=1)
    assert not found and count.n_bad == 1 and "not well-formed" in count.places[0]


def test_a_huge_revision_is_left_out_unread(tmp_path, monkeypatch):
    monkeypatch.setattr(wikipedia, "MAX_BYTES", 4000)
    huge = page(("Ann", "line\n" * 2000), ("Bob", TEXT), ("1.2.3.4", VANDAL), ("Bob", TEXT + "!"), title="Huge")
    found, count = convert(tmp_path, huge + REVERTED + page(("Ann", TEXT), header="x\n" * 3000), max_bad=1)
    assert [r["group"] for r in found] == ["Bread"] and count.n_bad == 2
    assert "a revision of 0 MB (page 'Huge')" in count.places[0] and "a page of" in count.places[1]


def test_runs_of_signs_take_no_time(tmp_path):
    signs = ["!" * 300_000, '."' * 150_000, "." + ")" * 300_000, " " * 300_000, "\n" * 300_000]
    assert not convert(tmp_path, page(*((name, TEXT + text + "x") for text in signs for name in ("Ann", "Bob")), *(
        r for text in signs for r in (("Ann", TEXT), ("1.2.3.4", text + "x"), ("Bob", TEXT)))))[0]


def test_a_cut_plain_file(tmp_path):
    whole = (HEAD + REVERTED + REVERTED).encode()
    found, count = convert(tmp_path, whole[:-200], max_bad=1)
    assert len(found) == 1 and count.n_bad == 1 and "the file ends within this revision" in count.places[0]


@pytest.mark.parametrize("content", [b"", b"\n\n", b"{}\n", b'<?xml version="1.0"?>\n<posts>\n</posts>\n', bytes(range(256)) * 20])
def test_what_is_no_export_is_refused(tmp_path, content):
    with pytest.raises(InputError, match="history.xml: no <page>"):
        convert(tmp_path, content)


@pytest.mark.parametrize("suffix, pack", [(".bz2", bz2.compress), (".bz2", lambda c: bz2.compress(c[:500]) + bz2.compress(c[500:])), (".gz", gzip.compress),
                                          (".xz", lzma.compress), (".zst", zstandard.compress)])
def test_every_packing_is_read_and_a_cut_one_refused(tmp_path, suffix, pack):
    packed = pack((HEAD + REVERTED + "</mediawiki>").encode())
    assert len(convert(tmp_path, packed, name=f"h.xml{suffix}")[0]) == 1
    with pytest.raises(InputError, match=f"h.xml{suffix}:[0-9]+: the compressed file is damaged"):
        convert(tmp_path, packed[:-20], name=f"h.xml{suffix}")


def test_7z_is_read_without_unpacking_to_disk(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "py7zr", None)
    with pytest.raises(InputError, match="pip install py7zr"):
        convert(tmp_path, b"7z", name="h.xml.7z")
    monkeypatch.undo()
    py7zr = pytest.importorskip("py7zr")
    with py7zr.SevenZipFile(tmp_path / "made.7z", "w") as archive:
        archive.writestr(HEAD + REVERTED * 2000 + "</mediawiki>", "history.xml")
    packed = (tmp_path / "made.7z").read_bytes()
    assert len(convert(tmp_path, packed, name="h.xml.7z")[0]) == 2000
    for damaged in (packed[:-20], packed[:len(packed) // 2], b"7z\xbc\xaf\x27\x1c" + bytes(100), b"", b"text", packed[:200] + bytes(200) + packed[400:]):
        with pytest.raises(InputError, match=r"h.xml.7z:[0-9]+: the archive is damaged or cut"):
            convert(tmp_path, damaged, name="h.xml.7z")
    assert {p.name for p in tmp_path.iterdir()} == {"made.7z", "h.xml.7z"}


@pytest.mark.parametrize("flags", [("--window", 1), ("--max_chars", 0), ("--context_chars", -1)])
def test_flags_that_admit_no_comparison_are_refused(tmp_path, flags):
    with pytest.raises(InputError, match=f"{flags[0]} {flags[1]}"):
        convert(tmp_path, REVERTED, *flags)


def test_the_command_writes_comparisons_that_load(tmp_path):
    raw, out = tmp_path / "history.xml.bz2", tmp_path / "out.jsonl"
    pages = "".join(page(("Ann", TEXT), ("1.2.3.4", VANDAL.replace("aliens", f"Ünïcode 🍞 {i}")), ("Bob", TEXT), title=f"Page {i}") for i in range(20))
    raw.write_bytes(bz2.compress((HEAD + pages + page(("Ann", TEXT), ns=4) + "</mediawiki>").encode()))
    printed = run_well("data/prepare.py", "wikipedia", "--raw", raw, "--out", out)
    assert "20 comparisons of 61 records read" in printed and "left out: 1 pages outside namespace 0" in printed
    tokenizer = get_tokenizer("bytes")
    data = load_comparisons([out], tokenizer)
    assert len(data) == 20 and data.counts["groups"] == 20 and data.scores(3).tolist() == [1, 0]
    context, good, bad = map(tokenizer.decode, data.segments(3))
    assert context.startswith("Page 3\n\n'''Bread") and (good, bad) == (" The first loaves were flat.", " The first loaves were made by Ünïcode 🍞 3.")


def test_the_command_refuses_another_kind_of_file_and_leaves_nothing(tmp_path):
    (tmp_path / "Posts.xml").write_text("<posts>\n</posts>\n")
    done = run("data/prepare.py", "wikipedia", "--raw", tmp_path / "Posts.xml", "--out", tmp_path / "out.jsonl")
    assert done.returncode == 2 and "no <page> on a line" in done.stderr and len(done.stderr.splitlines()) == 1
    assert [p.name for p in tmp_path.iterdir()] == ["Posts.xml"]
