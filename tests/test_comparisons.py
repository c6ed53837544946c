"""Comparisons: the three forms of a record, what is counted while reading, the cache, and splits by group."""
import bz2
import gzip
import json
import lzma
import random

import numpy as np
import pytest
from conftest import BYTES, DATA, load, make_comparisons, write_jsonl

from data.comparisons import load_comparisons, parse, split_dialogues
from data.errors import InputError
from data.tokenizer import get_tokenizer


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("HHH_LAB_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def texts(data, i):
    """(context, completions, scores) of comparison i, as text again."""
    context, *completions = (BYTES.decode(ids) for ids in data.segments(i))
    return context, completions, data.scores(i).tolist()


def all_texts(data):
    return [texts(data, i) for i in range(len(data))]


def dialogue(*turns):
    """A dialogue in HH-RLHF's form, from its turns: human, assistant, human, …"""
    return "".join(f"\n\n{('Human', 'Assistant')[i % 2]}:{turn}" for i, turn in enumerate(turns))


ASKED = dialogue(" Q", "")  # up to where the assistant's first turn begins


# ------------------------------------------------------------------------------------------------------------
# Reading


def test_records_of_three_forms_are_read():
    record = {"context": "C", "completions": ["a", "b"], "scores": [2, -0.5], "group": "g"}
    assert parse(record, "f:1") == ("C", ["a", "b"], [2, -0.5], "g")
    record = {"prompt": "P", "chosen": " a", "rejected": " b", "model": "m"}
    assert parse(record, "f:1") == ("P", [" a", " b"], [1, 0], "P")
    record = {"chosen": dialogue(" Q", " a"), "rejected": dialogue(" Q", " b")}
    assert parse(record, "f:1") == (ASKED, [" a", " b"], [1, 0], ASKED)


def test_all_turns_of_a_dialogue_are_one_group():
    """HH-RLHF has a record for each of several turns of a dialogue."""
    begun = dialogue(" Q", " yes") + "\n\nHuman: And?\n\nAssistant:"
    later = parse({"chosen": begun + " so", "rejected": begun + " no"}, "f:2")
    assert later[0] == begun and later[3] == ASKED


def test_all_turns_of_a_prompted_dialogue_are_one_group():
    """As of a dialogue that is published as a prompt and two replies."""
    prompts = ASKED, dialogue(" Q", " yes", " And?", "")
    assert {parse({"prompt": prompt, "chosen": " x", "rejected": " y"}, "f:1")[3] for prompt in prompts} == {ASKED}
    assert parse({"prompt": "What is it?", "chosen": " x", "rejected": " y"}, "file:1")[3] == "What is it?"


def test_a_group_may_be_a_number_or_left_out():
    def group(**more):
        return parse({"context": "C", "completions": ["a"], "scores": [1], **more}, "f:1")[3]
    assert group(group=7) == group(group=7) != group(group=8)
    assert group() == group(group=None) == group(group="C")


def test_without_context_and_group_a_comparison_is_a_group_by_itself(tmp_path):
    """Or else a file of such comparisons would be held out whole or not at all."""
    records = [{"chosen": f"good {i}", "rejected": f"bad {i}"} for i in range(200)]
    data = load(tmp_path, records + [{"chosen": "bad 3", "rejected": "good 3"}])
    assert data.counts["groups"] == 200  # the same two texts the other way round are not another
    assert 20 < data.held_out(0.25).sum() < 80


DIALOGUES = {  # two dialogues, their shared context and what follows it in each
    "the last turn": (dialogue(" Q", " yes"), dialogue(" Q", " no"), (ASKED, " yes", " no")),
    "after equal words": (dialogue(" Q", " I do"), dialogue(" Q", " I don't"), (ASKED, " I do", " I don't")),
    "an empty answer": (dialogue(" Q", " yes"), ASKED, (ASKED, " yes", "")),
    "equal": (dialogue(" Q", " a"), dialogue(" Q", " a"), (ASKED, " a", " a")),
    "parting at an earlier turn": (
        dialogue(" Q", " a", " R", " b"), dialogue(" Q", " c", " S", " d"),
        (ASKED, " a" + dialogue(" R", " b"), " c" + dialogue(" S", " d"))),
    "parting in a human's turn": (
        dialogue(" Q", " a", " R", " b"), dialogue(" Q", " a", " S", " b"),
        (ASKED, " a" + dialogue(" R", " b"), " a" + dialogue(" S", " b"))),
    "one a prefix of the other": (
        dialogue(" Q", " a"), dialogue(" Q", " a", " R", " b"), (ASKED, " a", " a" + dialogue(" R", " b"))),
    "a later turn empty in one": (
        dialogue(" Q", " a", " R", ""), dialogue(" Q", " a", " R", " b"),
        (dialogue(" Q", " a", " R", ""), "", " b")),
    "no turns": ("one text", "one more", ("", "one text", "one more")),
    "empty": ("", "a", ("", "", "a")),
}


@pytest.mark.parametrize("chosen, rejected, expected", DIALOGUES.values(), ids=DIALOGUES)
def test_two_dialogues_are_split_at_the_last_turn_both_share(chosen, rejected, expected):
    context, first, second = split_dialogues(chosen, rejected)
    assert (context, first, second) == expected
    assert (context + first, context + second) == (chosen, rejected)


@pytest.mark.parametrize("suffix, compress", [("", bytes), (".gz", gzip.compress), (".xz", lzma.compress),
                                              (".bz2", bz2.compress)])
def test_every_compression_reads_the_same(tmp_path, suffix, compress):
    records, path = list(make_comparisons(20)), tmp_path / f"file.jsonl{suffix}"
    path.write_bytes(compress("\n".join(json.dumps(record) for record in records).encode()))
    data = load_comparisons([path], BYTES, quiet=True)
    assert all_texts(data) == [(r["context"], r["completions"], r["scores"]) for r in records]
    assert data.where(6) == f"{path}:7"


def test_files_of_several_forms_are_one_data_set(tmp_path):
    several = {"context": "C ✓", "completions": ["x", "", "z"], "scores": [0.5, -1, 3]}
    dialogues = {"chosen": dialogue(" Q", " y"), "rejected": dialogue(" Q", " n")}
    pair = {"prompt": "", "chosen": "1", "rejected": "2"}
    a, b = write_jsonl(tmp_path / "a.jsonl", [several]), tmp_path / "b.jsonl"
    b.write_text(f"\n{json.dumps(dialogues)}\n\n{json.dumps(pair)}")  # empty lines, and no last line end
    data = load_comparisons([a, b], BYTES, quiet=True)
    assert all_texts(data) == [
        ("C ✓", ["x", "", "z"], [0.5, -1, 3]), (ASKED, [" y", " n"], [1, 0]), ("", ["1", "2"], [1, 0])]
    assert [data.where(i) for i in range(3)] == [f"{a}:1", f"{b}:2", f"{b}:4"]
    assert [data.lengths(i).tolist() for i in range(3)] == [[5, 1, 0, 1], [len(ASKED), 2, 2], [0, 1, 1]]
    assert data.chars[:4].tolist() == [3, 1, 0, 1]  # characters, not bytes
    assert data.differ().tolist() == [True] * 3


def test_empty_equal_and_repeated_are_counted_printed_and_kept(tmp_path, capsys):
    path = write_jsonl(tmp_path / "file.jsonl", [
        {"context": "A", "completions": ["x", "y"], "scores": [1, 0]},
        {"context": "A", "completions": ["x", "y"], "scores": [1, 0]},
        {"context": "A", "completions": ["x", "y"], "scores": [0, 1]},  # ranked otherwise: not repeated
        {"context": "B", "completions": ["", "", "z"], "scores": [1, 0, 0]},
        {"context": "D", "completions": [" ", " \n"], "scores": [1, 0]},
        {"context": "C", "completions": ["same", "same"], "scores": [1, 1]},
        {"context": "A", "completions": ["x", "y"], "scores": [1, 0], "group": "other"}])
    data = load_comparisons([path], BYTES)
    assert data.counts == {"comparisons": 7, "completions": 15, "groups": 5,
                           "empty": 4, "identical": 2, "duplicate": 2}
    printed = capsys.readouterr().out
    for words in ("7 comparisons", "15 completions", "5 groups", "4 empty completions",
                  "2 comparisons with equal completions", "2 repeated comparisons"):
        assert words in printed
    assert len(data) == 7 and data.differ().tolist() == [True, True, True, True, True, False, True]
    load_comparisons([path], BYTES)
    assert capsys.readouterr().out == printed  # from the cache, too
    load_comparisons([path], BYTES, quiet=True)
    assert capsys.readouterr().out == ""


def test_a_data_set_of_only_empty_texts_can_be_read(tmp_path):
    data = load(tmp_path, [{"context": "", "completions": ["", ""], "scores": [1, 0]}])
    assert [ids.tolist() for ids in data.segments(0)] == [[], [], []]


# ------------------------------------------------------------------------------------------------------------
# The cache


def test_the_second_time_comes_from_the_cache(tmp_path, monkeypatch):
    records = list(make_comparisons(20))
    first = load(tmp_path, records)
    monkeypatch.setattr(type(BYTES), "encode_many", lambda *_: pytest.fail("tokenised again"))
    again = load(tmp_path, records)
    elsewhere = load(tmp_path, records, "copy.jsonl")  # the content counts, not the place
    assert all_texts(again) == all_texts(elsewhere) == all_texts(first)
    assert elsewhere.where(0) == f"{tmp_path / 'copy.jsonl'}:1"


def test_other_content_and_other_tokenizers_have_other_caches(tmp_path, cache):
    other = get_tokenizer("bytes")
    other.key = "another"
    path = write_jsonl(tmp_path / "file.jsonl", make_comparisons(3))
    assert len(load_comparisons([path], BYTES, quiet=True)) == 3
    assert len(load_comparisons([path], other, quiet=True)) == 3
    write_jsonl(path, make_comparisons(4))
    assert len(load_comparisons([path], BYTES, quiet=True)) == 4
    assert len(list(cache.glob("comparisons-*/counts"))) == 3


def test_a_bad_line_leaves_no_cache(tmp_path, cache):
    path = write_jsonl(tmp_path / "file.jsonl", [*make_comparisons(30), {"context": "C"}])
    with pytest.raises(InputError, match=f"{path}:31: no \"chosen\""):
        load_comparisons([path], BYTES)
    assert not [p for p in cache.glob("comparisons-*") if p.is_dir()]


# ------------------------------------------------------------------------------------------------------------
# Splits


def held_out_contexts(data):
    return {texts(data, i)[0] for i in np.flatnonzero(data.held_out(0.3))}


def test_a_split_goes_by_group_and_never_by_pair(tmp_path):
    data = load(tmp_path, make_comparisons(300))
    sides = {}  # of each group
    for record, is_held_out in zip(make_comparisons(300), data.held_out(0.3), strict=True):
        sides.setdefault(record["group"], set()).add(bool(is_held_out))
    assert all(len(side) == 1 for side in sides.values()) and len(sides) == data.counts["groups"]
    assert 0.15 < np.mean([True in side for side in sides.values()]) < 0.45
    assert not data.held_out(0.0).any() and data.held_out(1.0).all()


def test_a_group_keeps_its_side_in_every_order_and_file(tmp_path):
    records = [{"context": f"question {i % 150}", "completions": [f"a{i}", "b"], "scores": [1, 0]}
               for i in range(300)]
    held_out = held_out_contexts(load(tmp_path, records))
    random.Random(1).shuffle(records)
    assert held_out_contexts(load(tmp_path, records, "shuffled.jsonl")) == held_out
    part = records[:100]
    in_part = {record["context"] for record in part}
    assert held_out_contexts(load(tmp_path, part, "part.jsonl")) == held_out & in_part


def test_a_smaller_fraction_holds_out_part_of_a_larger_ones(tmp_path):
    data = load(tmp_path, make_comparisons(300))
    sides = [data.held_out(fraction) for fraction in (0.05, 0.1, 0.5, 0.9)]
    for small, large in zip(sides, sides[1:]):
        assert (large | ~small).all() and large.sum() > small.sum()


# ------------------------------------------------------------------------------------------------------------
# Published data


def test_human_comparisons_are_split_by_the_text_both_share():
    path = DATA / "hh-rlhf" / "harmless-base" / "test.jsonl.gz"
    if not path.exists():
        pytest.skip("no HH-RLHF here")
    data = load_comparisons([path], BYTES, quiet=True)
    with gzip.open(path, "rt") as file:
        records = [json.loads(line) for line in file]
    assert len(data) == len(records) == data.counts["comparisons"]
    for record, (context, completions, scores) in zip(records, all_texts(data)):
        assert [context + text for text in completions] == [record["chosen"], record["rejected"]]
        assert context.endswith("\n\nAssistant:") and scores == [1, 0]
    assert data.counts["empty"] > 0 and data.counts["completions"] == 2 * len(records)
