"""Wikipedia's exports become comparisons of restored and reverted passages: which reverts count, what is
compared, and what becomes of broken XML."""
import bz2
import random
import sys
from xml.sax.saxutils import escape

import pytest
from conftest import convert, run_well

from data.comparisons import load_comparisons
from data.errors import InputError
from data.sources import wikipedia
from data.tokenizer import get_tokenizer

HEAD = ('<mediawiki xmlns="http://www.mediawiki.org/xml/export-0.11/" version="0.11" xml:lang="en">\n'
        "  <siteinfo>\n    <sitename>W</sitename>\n  </siteinfo>\n")
TEXT = ("'''Bread''' is food. It is baked from flour and water.\n\n== History ==\nBread is old. The first "
        "loaves were flat.\n\nIt is eaten everywhere.")
VANDAL = TEXT.replace("The first loaves were flat.", "The first loaves were made by aliens.")
VANDALISM = "1.2.3.4", VANDAL


def revision(who, text):
    who = f"<ip>{who}</ip>" if who[0].isdigit() else f"<username>{escape(who)}</username>\n        <id>5</id>"
    return f"""    <revision>
      <id>1</id>
      <timestamp>2001-01-21T02:12:21Z</timestamp>
      <contributor>
        {who}
      </contributor>
      <comment>an edit</comment>
      <model>wikitext</model>
      <text bytes="{len(text.encode())}" xml:space="preserve">{escape(text)}</text>
      <sha1>abc</sha1>
    </revision>
"""


def page(*revisions, title="Bread", ns="0", header=""):
    """A page of revisions, each (contributor, text) or XML."""
    body = "".join(r if isinstance(r, str) else revision(*r) for r in revisions)
    return (f"  <page>\n    <title>{escape(title)}</title>\n    <ns>{ns}</ns>\n    <id>7</id>\n"
            f"{header}{body}  </page>\n")


REVERTED = page(("Ann", TEXT), VANDALISM, ("Bob", TEXT))


def read(folder, content, *flags, max_bad=0.0, name="history.xml"):
    """(comparisons, Count) of an export with these pages, or of these bytes."""
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else f"{HEAD}{content}</mediawiki>\n".encode())
    return convert(wikipedia, [path], *flags, max_bad=max_bad)


def left_out(folder, content, *flags):
    """What is counted as left out; nothing may be kept."""
    found, count = read(folder, content, *flags)
    assert not found
    return count.dropped


def sides(folder, good, bad):
    """What becomes of one reverted change: (text before it, good passage, bad passage), or what was left
    out."""
    found, count = read(folder, page(("Ann", good), ("1.2.3.4", bad), ("Bob", good)))
    if not found:
        return dict(count.dropped)
    return found[0]["context"].removeprefix("Bread\n\n"), *found[0]["completions"]


# ---------------------------------------------------------------------------------------------------------
# Which edits were reverted


def test_a_reverted_edit_is_the_bad_side(tmp_path):
    found, count = read(tmp_path, REVERTED)
    good, bad = " The first loaves were flat.", " The first loaves were made by aliens."
    assert found == [{"context": "Bread\n\n" + TEXT[:TEXT.index(" The first")], "completions": [good, bad],
                      "scores": [1, 0], "group": "Bread"}]
    assert count.total == 3 and not count.dropped and not count.n_bad


def test_a_run_of_one_contributors_edits_is_one_bad_side(tmp_path):
    worse = VANDAL.replace("everywhere", "nowhere")
    found, _ = read(tmp_path, page(("Ann", TEXT), VANDALISM, ("1.2.3.4", worse), ("Bob", TEXT)))
    assert found[0]["completions"][1].endswith("aliens.\n\nIt is eaten nowhere.")
    several = page(("Ann", TEXT), VANDALISM, ("5.6.7.8", worse), ("Bob", TEXT))
    assert left_out(tmp_path, several) == {"reverts: of several contributors' edits": 1}


def test_undoing_oneself_is_no_judgement(tmp_path):
    content = page(("Ann", TEXT), VANDALISM, ("1.2.3.4", TEXT))
    assert left_out(tmp_path, content) == {"reverts: of one's own edit": 1}


def test_a_revert_that_is_undone_does_not_count(tmp_path):
    war = [("Ann", TEXT), VANDALISM, ("Bob", TEXT), ("5.6.7.8", VANDAL)]
    found, count = read(tmp_path, page(*war))
    assert [r["completions"][0] for r in found] == [" The first loaves were made by aliens."]
    assert count.dropped == {"reverts undone within --window": 1}
    found, count = read(tmp_path, page(*war, ("Bob", TEXT)))
    assert [r["completions"][0] for r in found] == [" The first loaves were flat."]
    assert count.dropped == {"reverts undone within --window": 2}


def test_a_vandal_who_restores_his_own_text_is_no_judge(tmp_path):
    """Neither where the page ends so, nor where the next editor mends it by hand; a third person's revert counts."""
    war = ("Ann", TEXT), VANDALISM, ("Bob", TEXT), VANDALISM
    for after in ((), (("Eve", TEXT + " And more."), *[("Ann", f"{TEXT} {i}") for i in range(30)])):
        dropped = left_out(tmp_path, page(*war, *after))
        assert dropped["reverts: of a revert, by who wrote the text before it"] == 1
    found, _ = read(tmp_path, page(*war, ("Eve", TEXT)))
    assert [record["completions"][0] for record in found] == [" The first loaves were flat."]


def test_the_window_is_counted_in_revisions(tmp_path):
    def n_found(n_edits, *flags):
        edits = [("1.2.3.4", f"{VANDAL} {i}") for i in range(n_edits)]
        return len(read(tmp_path, page(("Ann", TEXT), *edits, ("Bob", TEXT)), *flags)[0])

    assert n_found(14) == 1 and n_found(15) == 0
    assert n_found(1, "--window", 2) == 1 and n_found(2, "--window", 2) == 0


def test_revisions_without_a_change_are_passed_over(tmp_path):
    history = page(("Ann", TEXT), ("Protector", TEXT), VANDALISM, ("Mover", VANDAL), ("Bob", TEXT),
                   ("Protector", TEXT))
    found, count = read(tmp_path, history, "--window", 2)
    assert len(found) == 1 and not count.dropped


def test_pages_do_not_mix_and_only_articles_count(tmp_path):
    halves = page(("Ann", TEXT), VANDALISM, title="One") + page(("Bob", TEXT), title="Two")
    assert not left_out(tmp_path, halves)
    talk = REVERTED.replace("<ns>0", "<ns>1")
    redirect = REVERTED.replace("    <id>7", '    <redirect title="Loaf" />\n    <id>7')
    article = page(("Ann", TEXT), VANDALISM, ("Bob", TEXT), title="Salt & <Pepper>")
    found, count = read(tmp_path, talk + redirect + article)
    assert [r["group"] for r in found] == ["Salt & <Pepper>"]
    assert found[0]["context"].startswith("Salt & <Pepper>\n\n'''Bread")
    assert count.dropped == {"pages outside namespace 0": 1, "pages that are redirects now": 1}
    assert count.total == 9


def test_hidden_texts_and_names(tmp_path):
    hidden = '<contributor deleted="deleted" />\n'
    nobody = revision(*VANDALISM).replace("<contributor>", f"{hidden}<x>").replace("</contributor>", "</x>")
    assert len(read(tmp_path, page(("Ann", TEXT), nobody, ("Bob", TEXT)))[0]) == 1
    two = page(("Ann", TEXT), nobody, nobody.replace("aliens", "dogs"), ("Bob", TEXT))
    assert not read(tmp_path, two)[0]
    for size in ("", ' bytes="9"'):
        gone = f'<revision>\n{hidden}<text{size} deleted="deleted" />\n</revision>\n'
        assert left_out(tmp_path, page(("Ann", TEXT), gone, gone, ("Bob", TEXT))) == {
            "reverts: of several contributors' edits": 1}
        assert left_out(tmp_path, page(("Ann", TEXT), gone, ("Bob", TEXT))) == {
            "reverts: the reverted text is hidden": 1}
        assert not left_out(tmp_path, page(gone, VANDALISM, gone))  # two hidden texts are not the same one
    outline = ("<revision>\n<contributor><username>A</username></contributor>\n"
               '<text bytes="9" id="5" />\n</revision>\n')
    assert not left_out(tmp_path, page(outline, VANDALISM, outline))  # texts are missing, which is not empty


# ---------------------------------------------------------------------------------------------------------
# What is compared


@pytest.mark.parametrize("good, bad, expected", [
    ("One. Two. Three.", "One. TWO! Three.", ("One.", " Two.", " TWO!")),
    ("It costs 3.50 €. B.", "It costs 3.70 €. B.", ("", "It costs 3.50 €.", "It costs 3.70 €.")),
    ('He: "no." She left. B.', 'He: "no." She cried. B.', ('He: "no."', " She left.", " She cried.")),
    ("* a\n* b\n* c", "* a\n* x\n* c", ("* a\n", "* b", "* x")),
    ("== A ==\ntext", "== A ==\nhi text", ("== A ==\n", "text", "hi text")),
    ("gut", "schlecht", ("", "gut", "schlecht")),
    # insertions and deletions take in what is beside them
    ("A.\nB.", "A.\nX.\nB.", ("A.\n", "B.", "X.\nB.")),
    ("One. Two. Three. Four.", "One. Three. Four.", ("One.", " Two. Three.", " Three.")),
    ("One. Two.", "One. Two. X.", ("One.", " Two.", " Two. X.")),
    ("A.\nB.\n", "A.\nB.\nX.\n", ("A.\n", "B.", "B.\nX.")),
    ("A.\n\nB.", "A.", ("", "A.\n\nB.", "A.")),
    ("A.", "", {"reverts: a side is empty": 1}),
    ("A. B.", "A.  B.", {"reverts: the texts differ in blanks only": 1}),
])
def test_a_change_is_taken_in_whole_sentences_or_lines(tmp_path, good, bad, expected):
    assert sides(tmp_path, good, bad) == expected


def test_any_change_leaves_what_is_around_it():
    """Of random texts, the parts around the passages are the same, and the passages differ."""
    rng = random.Random(0)
    for _ in range(3000):
        good, bad = ("".join(rng.choices('ab. \n!"', k=rng.randint(0, 12))) for _ in range(2))
        start, good_end, bad_end = wikipedia.changed(good, bad)
        assert 0 <= start <= min(good_end, bad_end)
        assert good[:start] == bad[:start] and good[good_end:] == bad[bad_end:]
        assert good == bad or good[start:good_end] != bad[start:bad_end]
        if good.strip() and bad.strip():
            assert good[start:good_end].strip() and bad[start:bad_end].strip(), (good, bad)


def test_the_context_is_the_text_before_the_change(tmp_path):
    for n, context in ((12, "Bread\n\nread is old."), (0, "Bread\n\n")):
        assert read(tmp_path, REVERTED, "--context_chars", n)[0][0]["context"] == context


def test_long_passages_and_blanked_pages_are_left_out(tmp_path):
    too_long = {"reverts: a passage is longer than --max_chars": 1}
    assert left_out(tmp_path, REVERTED, "--max_chars", 37) == too_long
    assert len(read(tmp_path, REVERTED, "--max_chars", 38)[0]) == 1
    blanked = page(("Ann", TEXT), ("1.2.3.4", "hi"), ("Bob", TEXT))
    assert left_out(tmp_path, blanked, "--max_chars", 100) == {"reverts: of a blanked page": 1}
    assert read(tmp_path, blanked)[0][0]["completions"] == [TEXT, "hi"]  # a short page


def test_texts_with_special_tokens_are_left_out(tmp_path):
    both = TEXT.replace("Bread is old", "<eot>"), VANDAL.replace("Bread is old", "<eot>")
    for good, bad in ((TEXT, VANDAL.replace("aliens", "<eoc>")), both):
        assert left_out(tmp_path, page(("Ann", good), ("1.2.3.4", bad), ("Bob", good))).total() == 1


def test_markup_stays_or_is_removed(tmp_path, monkeypatch):
    good, bad = "'''Bread''' is [[food|a food]]. Old.", "'''Bread''' is [[poo]]. Old."
    history = page(("Ann", good), ("1.2.3.4", bad), ("Bob", good))
    assert sides(tmp_path, good, bad)[1:] == ("'''Bread''' is [[food|a food]].", "'''Bread''' is [[poo]].")
    monkeypatch.setitem(sys.modules, "mwparserfromhell", None)
    with pytest.raises(InputError, match="pip install mwparserfromhell"):
        read(tmp_path, history, "--plain")
    monkeypatch.undo()
    pytest.importorskip("mwparserfromhell")
    assert read(tmp_path, history, "--plain")[0][0]["completions"] == ["Bread is a food.", "Bread is poo."]
    only_markup = page(("Ann", "'''a'''"), ("1.2.3.4", "''a''"), ("Bob", "'''a'''"))
    assert left_out(tmp_path, only_markup, "--plain").total() == 1


# ---------------------------------------------------------------------------------------------------------
# Broken and hostile exports


BROKEN = {  # what is put between two good pages, and words of the answer
    "bad markup": (REVERTED.replace("an edit", "an <edit", 1), "not well-formed XML"),
    "not UTF-8": (REVERTED.replace("an edit", "\udcff", 1), "not well-formed XML"),
    "a control character": (REVERTED.replace("an edit", "\x00", 1), "not well-formed XML"),
    "no text": (REVERTED.replace("<text ", "<words ", 1).replace("</text>", "</words>", 1),
                "a revision without <text>"),
    "an entity": (REVERTED.replace("an edit", "&lol9;", 1), "not well-formed XML"),
    "a document type": (REVERTED.replace("an edit", '<!DOCTYPE a [<!ENTITY b "bb">]>', 1),
                        "not well-formed XML"),
    "a revision without end": (REVERTED.replace("    </revision>\n", "", 1), "this revision has no end"),
    "a revision without beginning": (REVERTED.replace("    <revision>\n", "", 1),
                                     "the end of a revision without its beginning"),
    "a page without end": (REVERTED.replace("  </page>\n", ""), "this history has no end"),
    "a page without title": (REVERTED.replace("<title>Bread</title>", ""), "a page without <title> or <ns>"),
    "a page without namespace": (REVERTED.replace("<ns>0</ns>", ""), "a page without <title> or <ns>"),
    "a revision outside": (revision("Ann", TEXT), "a revision outside a page"),
    "deep nesting": (REVERTED.replace("an edit", "<a>" * 100_000, 1), "not well-formed XML"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_what_is_broken_is_counted_and_the_rest_is_read(tmp_path, case):
    broken, words = BROKEN[case]
    before, after = (REVERTED.replace("<title>Bread", f"<title>{title}") for title in ("Before", "After"))
    content = f"{HEAD}{before}{broken}{after}</mediawiki>\n".encode("utf-8", "surrogateescape")
    found, count = read(tmp_path, content, max_bad=1)
    assert [r["group"] for r in found if r["group"] != "Bread"] == ["Before", "After"]
    assert count.n_bad == 1 and words in count.places[0]
    assert count.places[0].startswith(f"{tmp_path / 'history.xml'}:")
    assert "<revision>" not in broken or len(found) == 2 or case == "a page without end"


def test_the_line_of_broken_xml_is_named(tmp_path):
    content = HEAD + REVERTED + REVERTED.replace("an edit", "an <edit", 1)
    line = content[:content.index("an <edit")].count("\n") + 1
    _, count = read(tmp_path, content.encode() + b"</mediawiki>", max_bad=1)
    assert f"not well-formed XML in line {line} (page 'Bread')" in count.places[0]


def test_nothing_is_said_across_a_broken_revision(tmp_path):
    broken = revision(*VANDALISM).replace("an edit", "<")
    found, count = read(tmp_path, page(("Ann", TEXT), broken, VANDALISM, ("Bob", TEXT)), max_bad=1)
    assert not found and count.n_bad == 1 and not count.dropped


def test_entities_are_not_expanded(tmp_path):
    entities = ['<!ENTITY lol0 "lol">']
    entities += [f'<!ENTITY lol{i} "{f"&lol{i - 1};" * 10}">' for i in range(1, 10)]
    document_type = '<?xml version="1.0"?>\n<!DOCTYPE lolz [\n' + "\n".join(entities) + "\n]>\n"
    content = document_type + HEAD + REVERTED.replace("an edit", "&lol9;", 1) + "</mediawiki>"
    found, count = read(tmp_path, content.encode(), max_bad=1)
    assert not found and count.n_bad == 1 and "not well-formed" in count.places[0]


def test_a_huge_revision_is_left_out_unread(tmp_path, monkeypatch):
    monkeypatch.setattr(wikipedia, "MAX_BYTES", 4000)
    huge = page(("Ann", "line\n" * 2000), ("Bob", TEXT), VANDALISM, ("Bob", TEXT + "!"), title="Huge")
    huge_header = page(("Ann", TEXT), header="x\n" * 3000)
    found, count = read(tmp_path, huge + REVERTED + huge_header, max_bad=1)
    assert [r["group"] for r in found] == ["Bread"] and count.n_bad == 2
    assert "a revision of more than 0 MB (page 'Huge')" in count.places[0]
    assert "a page of more than" in count.places[1]


def test_runs_of_signs_take_no_time(tmp_path):
    signs = ["!" * 300_000, '."' * 150_000, "." + ")" * 300_000, " " * 300_000, "\n" * 300_000]
    edits = [(name, TEXT + text + "x") for text in signs for name in ("Ann", "Bob")]
    reverts = [r for text in signs for r in (("Ann", TEXT), ("1.2.3.4", text + "x"), ("Bob", TEXT))]
    assert not read(tmp_path, page(*edits, *reverts))[0]


def test_a_cut_plain_file(tmp_path):
    found, count = read(tmp_path, (HEAD + REVERTED + REVERTED).encode()[:-200], max_bad=1)
    assert len(found) == 1 and count.n_bad == 1
    assert "the file ends within this revision" in count.places[0]


@pytest.mark.parametrize("content", [b"", b"\n\n", b"{}\n", b'<?xml version="1.0"?>\n<posts>\n</posts>\n',
                                     bytes(range(256)) * 20])
def test_what_is_no_export_is_refused(tmp_path, content):
    with pytest.raises(InputError, match="history.xml: no <page>"):
        read(tmp_path, content)


def test_7z_is_read_without_unpacking_to_disk(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "py7zr", None)
    with pytest.raises(InputError, match="pip install py7zr"):
        read(tmp_path, b"7z", name="h.xml.7z")
    monkeypatch.undo()
    py7zr = pytest.importorskip("py7zr")
    with py7zr.SevenZipFile(tmp_path / "made.7z", "w") as archive:
        archive.writestr(HEAD + REVERTED * 2000 + "</mediawiki>", "history.xml")
    packed = (tmp_path / "made.7z").read_bytes()
    assert len(read(tmp_path, packed, name="h.xml.7z")[0]) == 2000
    for damaged in (packed[:-20], packed[:len(packed) // 2], b"7z\xbc\xaf\x27\x1c" + bytes(100), b"", b"text",
                    packed[:200] + bytes(200) + packed[400:]):
        with pytest.raises(InputError, match=r"h.xml.7z:[0-9]+: the compressed file is damaged or cut"):
            read(tmp_path, damaged, name="h.xml.7z")
    assert {p.name for p in tmp_path.iterdir()} == {"made.7z", "h.xml.7z"}


@pytest.mark.parametrize("flags", [("--window", 1), ("--max_chars", 0), ("--context_chars", -1)])
def test_flags_that_admit_no_comparison_are_refused(tmp_path, flags):
    with pytest.raises(InputError, match=f"{flags[0]} {flags[1]}"):
        read(tmp_path, REVERTED, *flags)


# ---------------------------------------------------------------------------------------------------------
# The command


def test_the_command_writes_comparisons_that_load(tmp_path):
    raw, out = tmp_path / "history.xml.bz2", tmp_path / "out.jsonl"
    pages = [page(("Ann", TEXT), ("1.2.3.4", VANDAL.replace("aliens", f"Ünïcode 🍞 {i}")), ("Bob", TEXT),
                  title=f"Page {i}") for i in range(20)]
    content = "".join([HEAD, *pages, page(("Ann", TEXT), ns=4), "</mediawiki>"]).encode()
    raw.write_bytes(bz2.compress(content[:500]) + bz2.compress(content[500:]))
    printed = run_well("data/prepare.py", "wikipedia", "--raw", raw, "--out", out)
    assert "20 comparisons of 61 records read" in printed
    assert "left out: 1 pages outside namespace 0" in printed
    tokenizer = get_tokenizer("bytes")
    data = load_comparisons([out], tokenizer)
    assert len(data) == 20 and data.counts["groups"] == 20 and data.scores(3).tolist() == [1, 0]
    context, good, bad = map(tokenizer.decode, data.segments(3))
    assert context.startswith("Page 3\n\n'''Bread") and good == " The first loaves were flat."
    assert bad == " The first loaves were made by Ünïcode 🍞 3."
