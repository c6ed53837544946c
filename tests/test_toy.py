"""The toy world: the same each time, with known rankings that neither length nor a list of words gives away."""
import json
from collections import Counter

import numpy as np
import pytest

from data.toy import world as toy
from data.comparisons import parse


@pytest.fixture(scope="module")
def world():
    folder = toy.toy_folder()
    return {name: [json.loads(line) for line in open(folder / f"{name}.jsonl")] for name in ("lm", "ranked", "binary", "hhh", "manners")}


def pairs(records):
    """(better, worse, group) of all completions with different scores."""
    return [(a, b, r["group"]) for r in records for a, s in zip(r["completions"], r["scores"]) for b, t in zip(r["completions"], r["scores"]) if s > t]


def test_a_world_is_a_function_of_its_seed(tmp_path):
    for name in ("one", "again"):
        toy.write_world(tmp_path / name, seed=3)
    for file in ("lm", "ranked", "binary", "hhh", "dialogue", "manners"):
        assert (tmp_path / "one" / f"{file}.jsonl").read_bytes() == (tmp_path / "again" / f"{file}.jsonl").read_bytes()
    assert (tmp_path / "one" / "ranked.jsonl").read_bytes() != (toy.toy_folder() / "ranked.jsonl").read_bytes()
    assert toy.toy_folder() == toy.toy_folder()


def test_records_are_comparisons_without_repeats(world):
    for name in ("ranked", "binary", "hhh", "manners"):
        records = world[name]
        assert len({json.dumps(r) for r in records}) == len(records) or name == "manners"
        for record in records:
            context, completions, scores, group = parse(record, name)
            assert context.startswith("\n\nHuman: ") and context.endswith("\n\nAssistant:") and group
            assert 2 <= len(completions) <= 5 and len(set(completions)) == len(completions) and len(set(scores)) >= 2
            assert all(c.startswith(" ") and c.strip() for c in completions)
    assert {s for r in world["binary"] for s in r["scores"]} == {0, 1}
    assert set(Counter(r["category"] for r in world["hhh"])) == {"helpful", "honest", "harmless", "other"}


@pytest.mark.parametrize("name", ["ranked", "binary"])
def test_every_group_has_about_as_many_comparisons(world, name):
    sizes = Counter(r["group"] for r in world[name]).values()
    assert len(sizes) > 800 and max(sizes) - min(sizes) <= 3


def test_contexts_look_like_the_pages_conversations_and_hhh_questions_are_new(world):
    text = "\n".join(r["text"] for r in world["lm"])
    asked = {r["context"] for name in ("ranked", "binary") for r in world[name]}
    hhh = {r["context"] for r in world["hhh"]}
    assert not hhh & asked and not any(context in text for context in hhh)
    seen = [context in text for context in sorted(asked)[:300]]
    assert np.mean(seen) > 0.5
    prompt = toy.careful_prompt(4)
    assert prompt.endswith("\n\n-----") and prompt.count("\n\n-----") == 4 and not any(context in prompt for context in hhh)
    assert "\n\n-----\n\nHuman: " in text


@pytest.mark.parametrize("name", ["ranked", "binary", "hhh"])
def test_length_does_not_tell_the_better_answer(world, name):
    longer = np.mean([(len(a) > len(b)) + 0.5 * (len(a) == len(b)) for a, b, _ in pairs(world[name])])
    assert abs(longer - 0.5) < 0.03


@pytest.mark.parametrize("name", ["ranked", "binary"])
def test_a_list_of_words_does_not_tell_the_better_answer(world, name):
    """Logistic regression on differences of word counts, trained on half of the groups, tested on the others."""
    data = pairs(world[name])
    words = {w: i for i, w in enumerate(sorted({w for a, b, _ in data for w in (a + b).split()}))}
    x = np.zeros((len(data), len(words)), np.float32)
    for row, (a, b, _) in zip(x, data):
        for text, sign in ((a, 1), (b, -1)):
            for w in text.split():
                row[words[w]] += sign
    groups = sorted({g for *_, g in data})
    train = np.isin([g for *_, g in data], groups[::2])
    weights = np.zeros(len(words), np.float32)
    for _ in range(200):
        p = 1 / (1 + np.exp(-x[train] @ weights))
        weights += x[train].T @ (1 - p) / train.sum() - 1e-2 * weights
    margin = x[~train] @ weights
    assert np.mean((margin > 0) + 0.5 * (margin == 0)) < 0.53


def test_quality_puts_truth_and_safety_before_tone(world):
    assert toy.CONTENT["right"] > toy.CONTENT["vague"] > toy.CONTENT["wrong"] > toy.CONTENT["unsafe"]
    assert 4 > toy.TONE["kind"] > toy.TONE["plain"] > toy.TONE["rude"]
