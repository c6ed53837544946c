"""Comparisons: the three forms of a record, what is counted while reading, the cache, and splits by group."""
import bz2
import gzip
import json
import lzma
import random

import numpy as np
import pytest
from conftest import DATA, make_comparisons, write_jsonl

from data.comparisons import load_comparisons, parse, split_dialogues
from data.errors import InputError
from data.tokenizer import get_tokenizer

BYTES = get_tokenizer("bytes")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("HHH_LAB_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def load(tmp_path, records, name="file.jsonl"):
    return load_comparisons([write_jsonl(tmp_path / name, records)], BYTES, quiet=True)


def texts(data, i):
    """(context, completions, scores) of comparison i, as text again."""
    context, *completions = (BYTES.decode(ids) for ids in data.segments(i))
    return context, completions, data.scores(i).tolist()


# ---------------------------------------------------------------------------------------------------------------------
# Reading


def test_the_three_forms():
    assert parse({"context": "C", "completions": ["a", "b"], "scores": [2, -0.5], "group": "g"}, "f:1") == (
        "C", ["a", "b"], [2, -0.5], "g")
    assert parse({"prompt": "P", "chosen": " a", "rejected": " b", "model": "m"}, "f:1") == ("P", [" a", " b"], [1, 0], "P")
    assert parse({"chosen": "\n\nHuman: Q\n\nAssistant: a", "rejected": "\n\nHuman: Q\n\nAssistant: b"}, "f:1") == (
        "\n\nHuman: Q\n\nAssistant:", [" a", " b"], [1, 0], "\n\nHuman: Q\n\nAssistant:")


def test_a_group_may_be_a_number_or_left_out():
    group = lambda **more: parse({"context": "C", "completions": ["a"], "scores": [1], **more}, "f:1")[3]
    assert group(group=7) == group(group=7) != group(group=8)
    assert group() == group(group=None) == group(group="C")


def test_without_context_and_group_a_comparison_is_a_group_by_itself(tmp_path):
    """Or else a file of such comparisons would be held out whole or not at all."""
    records = [{"chosen": f"good {i}", "rejected": f"bad {i}"} for i in range(200)]
    data = load(tmp_path, records + [{"chosen": "bad 3", "rejected": "good 3"}])
    assert data.counts["groups"] == 200  # the same two texts the other way round are not another
    assert 20 < data.held_out(0.25).sum() < 80


@pytest.mark.parametrize("turns, chosen, rejected, expected", [
    ("the last turn", "\n\nHuman: Q\n\nAssistant: yes", "\n\nHuman: Q\n\nAssistant: no", ("\n\nHuman: Q\n\nAssistant:", " yes", " no")),
    ("after equal words", "\n\nHuman: Q\n\nAssistant: I do", "\n\nHuman: Q\n\nAssistant: I don't",
     ("\n\nHuman: Q\n\nAssistant:", " I do", " I don't")),
    ("an empty answer", "\n\nHuman: Q\n\nAssistant: yes", "\n\nHuman: Q\n\nAssistant:", ("\n\nHuman: Q\n\nAssistant:", " yes", "")),
    ("equal", "\n\nHuman: Q\n\nAssistant: a", "\n\nHuman: Q\n\nAssistant: a", ("\n\nHuman: Q\n\nAssistant:", " a", " a")),
    ("parting at an earlier turn", "\n\nHuman: Q\n\nAssistant: a\n\nHuman: R\n\nAssistant: b", "\n\nHuman: Q\n\nAssistant: c\n\nHuman: S\n\nAssistant: d",
     ("\n\nHuman: Q\n\nAssistant:", " a\n\nHuman: R\n\nAssistant: b", " c\n\nHuman: S\n\nAssistant: d")),
    ("parting in a human's turn", "\n\nHuman: Q\n\nAssistant: a\n\nHuman: R\n\nAssistant: b", "\n\nHuman: Q\n\nAssistant: a\n\nHuman: S\n\nAssistant: b",
     ("\n\nHuman: Q\n\nAssistant:", " a\n\nHuman: R\n\nAssistant: b", " a\n\nHuman: S\n\nAssistant: b")),
    ("one a prefix of the other", "\n\nHuman: Q\n\nAssistant: a", "\n\nHuman: Q\n\nAssistant: a\n\nHuman: R\n\nAssistant: b",
     ("\n\nHuman: Q\n\nAssistant:", " a", " a\n\nHuman: R\n\nAssistant: b")),
    ("a later turn empty in one", "\n\nHuman: Q\n\nAssistant: a\n\nHuman: R\n\nAssistant:", "\n\nHuman: Q\n\nAssistant: a\n\nHuman: R\n\nAssistant: b",
     ("\n\nHuman: Q\n\nAssistant: a\n\nHuman: R\n\nAssistant:", "", " b")),
    ("no turns", "one text", "one more", ("", "one text", "one more")),
    ("empty", "", "a", ("", "", "a")),
], ids=lambda x: x if isinstance(x, str) and "\n" not in x else "")
def test_two_dialogues_are_split_at_the_last_turn_both_share(turns, chosen, rejected, expected):
    context, first, second = split_dialogues(chosen, rejected)
    assert (context, first, second) == expected
    assert (context + first, context + second) == (chosen, rejected)


@pytest.mark.parametrize("suffix, pack", [("", bytes), (".gz", gzip.compress), (".xz", lzma.compress), (".bz2", bz2.compress)])
def test_every_compression_reads_the_same(tmp_path, suffix, pack):
    records = list(make_comparisons(20))
    path = tmp_path / f"file.jsonl{suffix}"
    path.write_bytes(pack("\n".join(json.dumps(r) for r in records).encode()))
    data = load_comparisons([path], BYTES, quiet=True)
    assert [texts(data, i) for i in range(len(data))] == [(r["context"], r["completions"], r["scores"]) for r in records]
    assert data.where(6) == f"{path}:7"


def test_files_of_several_forms_are_one_data_set(tmp_path):
    a = write_jsonl(tmp_path / "a.jsonl", [{"context": "C ✓", "completions": ["x", "", "z"], "scores": [0.5, -1, 3]}])
    b = tmp_path / "b.jsonl"
    b.write_text('\n{"chosen": "\\n\\nHuman: Q\\n\\nAssistant: y", "rejected": "\\n\\nHuman: Q\\n\\nAssistant: n"}\n\n'
                 '{"prompt": "", "chosen": "1", "rejected": "2"}')
    data = load_comparisons([a, b], BYTES, quiet=True)
    assert [texts(data, i) for i in range(3)] == [
        ("C ✓", ["x", "", "z"], [0.5, -1, 3]), ("\n\nHuman: Q\n\nAssistant:", [" y", " n"], [1, 0]), ("", ["1", "2"], [1, 0])]
    assert [data.where(i) for i in range(3)] == [f"{a}:1", f"{b}:2", f"{b}:4"]
    assert [data.lengths(i).tolist() for i in range(3)] == [[5, 1, 0, 1], [len("\n\nHuman: Q\n\nAssistant:"), 2, 2], [0, 1, 1]]
    assert data.chars[:4].tolist() == [3, 1, 0, 1]  # characters, not bytes
    assert data.differ().tolist() == [True] * 3


def test_empty_equal_and_repeated_are_counted_printed_and_kept(tmp_path, capsys):
    path = write_jsonl(tmp_path / "file.jsonl", [
        {"context": "A", "completions": ["x", "y"], "scores": [1, 0]},
        {"context": "A", "completions": ["x", "y"], "scores": [1, 0]},
        {"context": "A", "completions": ["x", "y"], "scores": [0, 1]},  # the same texts, ranked otherwise: not repeated
        {"context": "B", "completions": ["", "", "z"], "scores": [1, 0, 0]},
        {"context": "D", "completions": [" ", " \n"], "scores": [1, 0]},
        {"context": "C", "completions": ["same", "same"], "scores": [1, 1]},
        {"context": "A", "completions": ["x", "y"], "scores": [1, 0], "group": "other"}])
    data = load_comparisons([path], BYTES)
    assert data.counts == {"comparisons": 7, "completions": 15, "groups": 5, "empty": 4, "identical": 2, "duplicate": 2}
    out = capsys.readouterr().out
    for words in ("7 comparisons", "15 completions", "5 groups", "4 empty completions", "2 comparisons with equal completions",
                  "2 repeated comparisons"):
        assert words in out
    assert len(data) == 7 and data.differ().tolist() == [True, True, True, True, True, False, True]
    load_comparisons([path], BYTES)
    assert capsys.readouterr().out == out  # from the cache too
    load_comparisons([path], BYTES, quiet=True)
    assert capsys.readouterr().out == ""


def test_only_empty_texts(tmp_path):
    data = load(tmp_path, [{"context": "", "completions": ["", ""], "scores": [1, 0]}])
    assert [part.tolist() for part in data.segments(0)] == [[], [], []]


# ---------------------------------------------------------------------------------------------------------------------
# The cache


def test_the_second_time_comes_from_the_cache(tmp_path, cache, monkeypatch):
    records = list(make_comparisons(20))
    first = load(tmp_path, records)
    monkeypatch.setattr(type(BYTES), "encode_many", lambda *_: pytest.fail("tokenised again"))
    again = load(tmp_path, records)
    elsewhere = load(tmp_path, records, "copy.jsonl")  # the content counts, not the place
    for data in (again, elsewhere):
        assert [texts(data, i) for i in range(20)] == [texts(first, i) for i in range(20)]
    assert elsewhere.where(0) == f"{tmp_path / 'copy.jsonl'}:1"


def test_other_content_and_other_tokenizers_have_other_caches(tmp_path):
    other = get_tokenizer("bytes")
    other.key = "another"
    path = write_jsonl(tmp_path / "file.jsonl", make_comparisons(3))
    assert len(load_comparisons([path], BYTES, quiet=True)) == len(load_comparisons([path], other, quiet=True)) == 3
    write_jsonl(path, make_comparisons(4))
    assert len(load_comparisons([path], BYTES, quiet=True)) == 4
    assert len(list((tmp_path / "cache").glob("comparisons-*/counts"))) == 3


def test_a_bad_line_leaves_no_cache(tmp_path, cache):
    path = write_jsonl(tmp_path / "file.jsonl", [*make_comparisons(30), {"context": "C"}])
    with pytest.raises(InputError, match=f"{path}:31: no \"chosen\""):
        load_comparisons([path], BYTES)
    assert not [p for p in cache.glob("comparisons-*") if p.is_dir()]


# ---------------------------------------------------------------------------------------------------------------------
# Splits


def held_out_contexts(data, fraction):
    return {texts(data, i)[0] for i in np.flatnonzero(data.held_out(fraction))}


def test_a_split_goes_by_group_and_never_by_pair(tmp_path):
    data = load(tmp_path, make_comparisons(300))
    held = data.held_out(0.3)
    sides = {}
    for record, side in zip(make_comparisons(300), held):
        sides.setdefault(record["group"], set()).add(bool(side))
    assert all(len(side) == 1 for side in sides.values()) and len(sides) == data.counts["groups"]
    assert 0.15 < np.mean([True in side for side in sides.values()]) < 0.45
    assert not data.held_out(0.0).any() and data.held_out(1.0).all()


def test_a_group_keeps_its_side_in_every_order_and_file(tmp_path):
    records = [{"context": f"question {i % 150}", "completions": [f"a{i}", "b"], "scores": [1, 0]} for i in range(300)]
    whole = held_out_contexts(load(tmp_path, records), 0.3)
    random.Random(1).shuffle(records)
    assert held_out_contexts(load(tmp_path, records, "shuffled.jsonl"), 0.3) == whole
    part = records[:100]
    contexts = {r["context"] for r in part}
    assert held_out_contexts(load(tmp_path, part, "part.jsonl"), 0.3) == whole & contexts


def test_a_smaller_fraction_holds_out_part_of_a_larger_ones(tmp_path):
    data = load(tmp_path, make_comparisons(300))
    sides = [data.held_out(f) for f in (0.05, 0.1, 0.5, 0.9)]
    for small, large in zip(sides, sides[1:]):
        assert (large | ~small).all() and large.sum() > small.sum()


# ---------------------------------------------------------------------------------------------------------------------
# Published data


def test_human_comparisons_are_split_by_the_text_both_share():
    path = DATA / "hh-rlhf" / "harmless-base" / "test.jsonl.gz"
    if not path.exists():
        pytest.skip("no HH-RLHF here")
    data = load_comparisons([path], BYTES, quiet=True)
    with gzip.open(path, "rt") as file:
        records = [json.loads(line) for line in file]
    assert len(data) == len(records) == data.counts["comparisons"]
    for i, record in enumerate(records):
        context, completions, scores = texts(data, i)
        assert [context + c for c in completions] == [record["chosen"], record["rejected"]] and scores == [1, 0]
        assert context.endswith("\n\nAssistant:")
    assert data.counts["empty"] > 0 and data.counts["completions"] == 2 * len(records)
