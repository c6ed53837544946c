"""The toy world's raw sources: the same each time, read by the project's readers without a bad record, each with its crowd's taste."""
import argparse
import functools
import itertools
import json
import random

import numpy as np
import pytest
from conftest import run, run_well

from data.toy import sources as toy_sources, world as toy
from data.comparisons import parse
from data.sources.count import Count

NAMES = tuple(toy_sources.READERS)


@pytest.fixture(scope="module")
def comparisons():
    return {name: [json.loads(line) for line in open(toy_sources.prepared(name))] for name in NAMES}


def pairs(records):
    """(context, better, worse) of all completions with different scores."""
    return [(r["context"], a, b) for r in records for a, s in zip(r["completions"], r["scores"]) for b, t in zip(r["completions"], r["scores"]) if s > t]


@functools.cache
def questions():
    return {question.text: question for kind in ("fact", "riddle", "sum", "harm") for question in toy.build_world(0).asked[kind]}


@functools.cache
def bodies(text):
    """(right, wrong) bodies of answers to a question."""
    rng, question = random.Random(0), questions()[text]
    return [{draw(rng) for _ in range(200)} for draw in (question.right, question.wrong)]


def is_right(context, answer):
    """Whether an answer's body is right (True), wrong or unsafe (False), or neither (None); None for tasks and lists too."""
    text = context.split("Human: ")[-1].split("\n\n")[0]
    if text in questions():
        right, wrong = bodies(text)
        return True if any(body in answer for body in right) else False if any(body in answer for body in wrong) else None


def tone(answer):
    for name in ("kind", "hasty", "rude"):
        if any(part.strip() in answer for form in toy.TONES[name] for part in form.split("{}") if part.strip()):
            return name
    return "plain"


def wins(pairs, good, bad):
    """The share of pairs that `good` wins over `bad`, of pairs of their marks."""
    won, lost = pairs.count((good, bad)), pairs.count((bad, good))
    assert won + lost > 100
    return won / (won + lost)


def test_the_sources_are_a_function_of_their_seed(tmp_path):
    toy_sources.write_sources(tmp_path / "again")
    printed = run_well("data/toy/sources.py", "--out", tmp_path / "other", "--seed", 3)
    files = [path.relative_to(toy_sources.sources_folder()) for path in toy_sources.sources_folder().rglob("*") if path.is_file()]
    assert len(files) == len(printed.splitlines()) == 4
    for file in files:
        assert (toy_sources.sources_folder() / file).read_bytes() == (tmp_path / "again" / file).read_bytes() != (tmp_path / "other" / file).read_bytes()
        assert str(file) in printed


@pytest.mark.parametrize("name", NAMES)
def test_the_readers_take_all_of_it(tmp_path, name):
    reader, files, flags = toy_sources.READERS[name]
    parser = argparse.ArgumentParser()
    reader.add_flags(parser)
    count, args = Count(max_bad=0), parser.parse_args(flags)
    args.out = tmp_path / "out.jsonl"
    kept = list(reader.records([toy_sources.sources_folder() / name / file for file in files], args, count))
    assert 3000 <= len(kept) <= 9000 and count.total > 10_000 and not count.n_bad
    assert sum(count.dropped.values()) > 100  # lone answers, deleted replies, edits that their author took back: as in real dumps
    assert kept == [json.loads(line) for line in open(toy_sources.prepared(name))]
    for record in kept:
        parse(record, name)


def test_the_command_for_published_dumps_reads_them(tmp_path):
    folder = toy_sources.sources_folder() / "reddit"
    run_well("data/prepare.py", "reddit", "--raw", folder / "submissions.ndjson", folder / "comments.ndjson", "--out", tmp_path / "reddit.jsonl")
    assert (tmp_path / "reddit.jsonl").read_text() == toy_sources.prepared("reddit").read_text()


def test_questions_are_asked_as_in_the_toy_world_and_none_is_held_out_for_hhh(comparisons):
    world = toy.build_world(0)
    asked, held = ({q.text for questions in kinds.values() for q in questions} for kinds in (world.asked, world.held))
    contexts = [r["context"] for name in ("stackexchange", "reddit") for r in comparisons[name]]
    assert all(context.split("Human: ")[-1].split("\n\n")[0] in asked for context in contexts)
    assert np.mean([context.count("\n\n") == 2 for context in contexts]) > 0.7  # just one question, as in ranked.jsonl
    assert any(context.count("\n\nHuman: ") == 2 for context in contexts)
    for name in NAMES:
        text = toy_sources.prepared(name).read_text()
        assert not any(question in text for question in held)


def test_answers_have_lost_their_html(comparisons):
    completions = [c for r in comparisons["stackexchange"] for c in r["completions"]]
    assert not any(mark in text for text in completions for mark in "<>&\n*")
    assert np.mean([is_right(r["context"], c) is not None for r in comparisons["stackexchange"] for c in r["completions"]]) > 0.3


def test_stackexchange_prizes_right_answers_whatever_their_tone(comparisons):
    found = pairs(comparisons["stackexchange"])
    assert 0.7 < wins([(is_right(c, a), is_right(c, b)) for c, a, b in found], True, False) < 0.95  # votes are noisy
    tones = [(tone(a), tone(b)) for _, a, b in found]
    assert all(abs(wins(tones, name, "plain") - 0.5) < 0.08 for name in ("kind", "hasty", "rude"))


def test_reddit_prizes_truth_and_some_tones(comparisons):
    found = pairs(comparisons["reddit"])
    tones = [(tone(a), tone(b)) for _, a, b in found]
    assert wins(tones, "hasty", "plain") > 0.55 < wins(tones, "kind", "plain") and wins(tones, "rude", "hasty") < 0.45
    truths = [(is_right(c, a), is_right(c, b)) for c, a, b in found]
    assert 0.6 < wins(truths, True, False) < 0.9


@pytest.mark.parametrize("liked, low, high", [(lambda content, tone: toy_sources.STACKEXCHANGE[content], 0.66, 0.75), (toy_sources.reddit_likes, 0.6, 0.7)])
def test_crowds_agree_with_the_true_quality_in_part(monkeypatch, liked, low, high):
    true = {}

    def completions_of(rng, world, question, contents, tones, score, make=toy.completions_of):
        found = make(rng, world, question, contents, tones, lambda content, tone: (score(content, tone), toy.quality(content, tone)))
        true.update({text: quality for text, _, (_, quality) in found})
        return [(text, marks, votes) for text, marks, (votes, _) in found]
    monkeypatch.setattr(toy, "completions_of", completions_of)
    rng, world, agrees = random.Random(0), toy.build_world(0), []
    for _ in range(1500):
        true.clear()
        _, answers = toy_sources.voted(rng, world, liked)
        agrees += [(true[a] > true[b]) == (votes > other) for (a, _, votes), (b, _, other) in itertools.combinations(answers, 2) if true[a] != true[b] and votes != other]
    assert low < np.mean(agrees) < high


def test_wikipedia_restores_what_is_true(comparisons):
    truths = {way for facts in toy.build_world(0).truths.values() for fact in facts for way in fact}
    facts = [(good, bad) for r in comparisons["wikipedia"] for good, bad in [r["completions"]] if good.count(".") == bad.count(".") == 1]
    named = [(good, bad) for good, bad in facts if not good.strip().startswith("To ")]  # the towns', people's and sums' sentences
    assert len(named) > 500 and all(good.strip() in truths for good, _ in named)
    rumours = [bad.strip() not in truths for _, bad in named]
    assert 0.5 < np.mean(rumours) < 1  # the others are true of something else
    changes = [(len(r["completions"][0]), len(r["completions"][1])) for r in comparisons["wikipedia"] if any(
        remark.format("").strip() in r["completions"][1] for remark in toy.TONES["rude"][:4])]
    assert len(changes) > 200 and all(good < bad for good, bad in changes)


@pytest.mark.parametrize("name", NAMES)
def test_length_does_not_tell_the_better_one(comparisons, name):
    assert abs(np.mean([(len(a) > len(b)) + 0.5 * (len(a) == len(b)) for _, a, b in pairs(comparisons[name])]) - 0.5) < 0.03


def test_a_folder_that_cannot_be_written_is_said_in_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    done = run("data/toy/sources.py", "--out", tmp_path / "file")
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
