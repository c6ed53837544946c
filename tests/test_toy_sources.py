"""The toy world's public sources: the same every time, read by the project's readers without a broken
record, and each with the taste of its crowd."""
import argparse
import functools
import hashlib
import itertools
import random

import numpy as np
import pytest
from conftest import read_jsonl, run_well

from data.comparisons import parse
from data.sources.count import Count
from data.toy import sources
from data.toy.comparisons import draw_completions, quality
from data.toy.words import TONES
from data.toy.world import build_world

NAMES = tuple(sources.READERS)
DIGESTS = {  # the first letters of the files' SHA-256
    "reddit/comments.ndjson": "12e8c9cfd174", "reddit/submissions.ndjson": "26894cc31a5f",
    "stackexchange/toy/Posts.xml": "9100ba9f9231", "wikipedia/history.xml": "999908a17701",
}


@pytest.fixture(scope="module")
def comparisons():
    return {name: read_jsonl(sources.prepared(name)) for name in NAMES}


def pairs(records):
    """(context, better, worse) of all pairs of completions with different scores."""
    return [(record["context"], better, worse) for record in records
            for better, high in zip(record["completions"], record["scores"])
            for worse, low in zip(record["completions"], record["scores"]) if high > low]


def digests(folder):
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()[:12]
            for path in folder.rglob("*") if path.is_file()}


@functools.cache
def questions():
    """{text: question} of the kinds whose right and wrong answers can be told apart."""
    asked = build_world(0).asked
    return {question.text: question for kind in ("fact", "riddle", "sum", "harm") for question in asked[kind]}


def last_question(context):
    return context.split("Human: ")[-1].split("\n\n")[0]


@functools.cache
def bodies(text):
    """(right, wrong) bodies of answers to a question."""
    rng, question = random.Random(0), questions()[text]
    return [{draw(rng) for _ in range(200)} for draw in (question.right, question.wrong)]


def is_right(context, answer):
    """True if an answer's body is right, False if it is wrong or unsafe, None if it is neither or
    unknown."""
    text = last_question(context)
    right, wrong = bodies(text) if text in questions() else ((), ())
    if any(body in answer for body in right):
        return True
    return False if any(body in answer for body in wrong) else None


def tone(answer):
    for name in ("kind", "hasty", "rude"):
        parts = {part.strip() for form in TONES[name] for part in form.split("{}")} - {""}
        if any(part in answer for part in parts):
            return name
    return "plain"


def wins(pairs, good, bad):
    """The share of pairs that `good` wins over `bad`, in pairs (of the better one, of the worse one)."""
    won, lost = pairs.count((good, bad)), pairs.count((bad, good))
    assert won + lost > 100
    return won / (won + lost)


def test_the_sources_are_a_function_of_their_seed(tmp_path):
    assert digests(sources.sources_folder()) == DIGESTS
    printed = run_well("data/toy/__main__.py", "sources", "--out", tmp_path, "--seed", 3)
    other = digests(tmp_path)
    assert set(other) == set(DIGESTS) and not set(other.values()) & set(DIGESTS.values())
    assert len(printed.splitlines()) == 4 and all(file in printed for file in DIGESTS)


@pytest.mark.parametrize("name", NAMES)
def test_the_readers_take_all_of_it(tmp_path, name):
    reader, files, flags = sources.READERS[name]
    parser = argparse.ArgumentParser()
    reader.add_flags(parser)
    count, args = Count(max_bad=0), parser.parse_args(flags)
    args.out = tmp_path / "out.jsonl"
    kept = list(reader.records([sources.sources_folder() / name / file for file in files], args, count))
    assert 3000 <= len(kept) <= 9000 and count.total > 10_000 and not count.n_bad
    # as in real dumps: lone answers, deleted replies, edits that their author took back
    assert sum(count.dropped.values()) > 100
    assert kept == read_jsonl(sources.prepared(name))
    for record in kept:
        parse(record, name)


def test_the_command_for_published_dumps_reads_them(tmp_path):
    folder, out = sources.sources_folder() / "reddit", tmp_path / "reddit.jsonl"
    run_well("data/prepare.py", "reddit", "--raw", folder / "submissions.ndjson", folder / "comments.ndjson",
             "--out", out)
    assert out.read_text() == sources.prepared("reddit").read_text()


def test_questions_are_asked_as_in_the_toy_world_and_none_is_held_out_for_hhh(comparisons):
    world = build_world(0)
    asked, held = ({question.text for questions in kinds.values() for question in questions}
                   for kinds in (world.asked, world.held))
    contexts = [record["context"] for name in ("stackexchange", "reddit") for record in comparisons[name]]
    assert all(last_question(context) in asked for context in contexts)
    is_single = [context.count("\n\n") == 2 for context in contexts]  # one question, as in ranked.jsonl
    assert np.mean(is_single) > 0.7
    assert any(context.count("\n\nHuman: ") == 2 for context in contexts)
    for name in NAMES:
        text = sources.prepared(name).read_text()
        assert not any(question in text for question in held)


def test_answers_have_lost_their_html(comparisons):
    records = comparisons["stackexchange"]
    answers = [(record["context"], text) for record in records for text in record["completions"]]
    assert not any(mark in text for _, text in answers for mark in "<>&\n*")
    assert np.mean([is_right(context, text) is not None for context, text in answers]) > 0.3


def test_stackexchange_prizes_right_answers_whatever_their_tone(comparisons):
    found = pairs(comparisons["stackexchange"])
    truths = [(is_right(context, a), is_right(context, b)) for context, a, b in found]
    assert 0.7 < wins(truths, True, False) < 0.95  # votes are noisy
    tones = [(tone(a), tone(b)) for _, a, b in found]
    assert all(abs(wins(tones, name, "plain") - 0.5) < 0.08 for name in ("kind", "hasty", "rude"))


def test_reddit_prizes_truth_and_some_tones(comparisons):
    found = pairs(comparisons["reddit"])
    tones = [(tone(a), tone(b)) for _, a, b in found]
    assert wins(tones, "hasty", "plain") > 0.55 and wins(tones, "kind", "plain") > 0.55
    assert wins(tones, "rude", "hasty") < 0.45
    truths = [(is_right(context, a), is_right(context, b)) for context, a, b in found]
    assert 0.6 < wins(truths, True, False) < 0.9


@pytest.mark.parametrize("likes, low, high", [(sources.stackexchange_likes, 0.66, 0.75),
                                              (sources.reddit_likes, 0.6, 0.7)])
def test_crowds_agree_with_the_true_quality_in_part(monkeypatch, likes, low, high):
    qualities = {}

    def draw_and_note(rng, world, question, contents, tones, score):
        answers = draw_completions(rng, world, question, contents, tones,
                                   lambda content, tone: (score(content, tone), quality(content, tone)))
        qualities.update({answer.text: answer.score[1] for answer in answers})
        return [answer._replace(score=answer.score[0]) for answer in answers]

    monkeypatch.setattr(sources, "draw_completions", draw_and_note)
    rng, world, agrees = random.Random(0), build_world(0), []
    for _ in range(1500):
        qualities.clear()
        _, answers = sources.draw_voted(rng, world, likes)
        for a, b in itertools.combinations(answers, 2):
            if qualities[a.text] != qualities[b.text] and a.score != b.score:
                agrees.append((qualities[a.text] > qualities[b.text]) == (a.score > b.score))
    assert low < np.mean(agrees) < high


def test_wikipedia_restores_what_is_true(comparisons):
    truths = {way for facts in build_world(0).truths.values() for fact in facts for way in fact}
    pairs = [record["completions"] for record in comparisons["wikipedia"]]
    facts = [(good, bad) for good, bad in pairs if good.count(".") == bad.count(".") == 1]
    named = [(good, bad) for good, bad in facts if not good.strip().startswith("To ")]  # of no work
    assert len(named) > 500 and all(good.strip() in truths for good, _ in named)
    rumours = [bad.strip() not in truths for _, bad in named]
    assert 0.5 < np.mean(rumours) < 1  # the others are true of something else
    remarks = [remark.format("").strip() for remark in TONES["rude"][:4]]
    changes = [(len(good), len(bad)) for good, bad in pairs if any(remark in bad for remark in remarks)]
    assert len(changes) > 200 and all(good < bad for good, bad in changes)


@pytest.mark.parametrize("name", NAMES)
def test_length_does_not_tell_the_better_one(comparisons, name):
    longer = [(len(a) > len(b)) + 0.5 * (len(a) == len(b)) for _, a, b in pairs(comparisons[name])]
    assert abs(np.mean(longer) - 0.5) < 0.03
