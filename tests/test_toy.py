"""The toy world: the same files every time, and rankings that neither length nor a list of words gives
away."""
import hashlib
import itertools
import json
from argparse import Namespace
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from conftest import read_jsonl, run, run_well, write_jsonl

import distill
from data import toy
from data.comparisons import parse
from data.errors import InputError
from data.prompts import load_prompt
from data.toy.comparisons import CONTENT, HHH, TONE
from data.toy.words import WORDS
from evals import human_vs_model

# The first letters of the files' SHA-256: README's figures are of this world.
DIGESTS = {
    "binary.jsonl": "697e4a172f53", "count.txt": "6889e31aaf4d", "dialogue.jsonl": "52d93fd12fe7",
    "hhh.jsonl": "83759ac8fc60", "lambada.jsonl": "968b7deed319", "lm.jsonl": "be6f0afa5e09",
    "manners.jsonl": "37f1759de0c2", "prompt.txt": "725065d9adf7", "ranked.jsonl": "27ae270f9b61",
    "samples.jsonl": "f1a5ec3d3aff",
}


@pytest.fixture(scope="module")
def world():
    """{name: records} of world 0."""
    names = ("lm", "ranked", "binary", "hhh", "manners", "samples", "lambada")
    return {name: read_jsonl(toy.toy_folder() / f"{name}.jsonl") for name in names}


def pairs(records):
    """(better, worse, group) of all pairs of completions with different scores."""
    return [(better, worse, record["group"]) for record in records
            for better, high in zip(record["completions"], record["scores"])
            for worse, low in zip(record["completions"], record["scores"]) if high > low]


def digests(folder):
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest()[:12] for path in folder.iterdir()}


def test_world_0_is_the_same_to_the_last_byte():
    assert digests(toy.toy_folder()) == DIGESTS


def test_the_command_writes_the_world_of_a_seed(tmp_path):
    printed = run_well("data/toy/__main__.py", "--out", tmp_path, "--seed", 3)
    written = digests(tmp_path)
    assert written == digests(toy.toy_folder(3))
    assert [name for name in DIGESTS if written[name] == DIGESTS[name]] == ["count.txt"]
    assert [line.split(":")[0] for line in printed.splitlines()] == [f"{tmp_path}/{name}" for name in DIGESTS]


def facts(seed):
    """The facts of a world about towns and people, each as the sentences that state it."""
    truths = toy.build_world(seed).truths
    return {tuple(fact) for name in WORDS["towns"] + WORDS["people"] for fact in truths[name]}


def test_each_seed_is_a_world_of_its_own(world):
    for a, b in itertools.combinations(range(4), 2):
        assert len(facts(a)) == len(facts(b)) == 128 and len(facts(a) & facts(b)) < 32  # an eighth by chance
    for name in ("ranked", "lm"):
        ours, others = ({json.dumps(record) for record in records}
                        for records in (world[name], read_jsonl(toy.toy_folder(3) / f"{name}.jsonl")))
        assert len(ours & others) < 0.01 * len(ours)


def test_a_source_name_stands_for_a_world(tmp_path):
    own = write_jsonl(tmp_path / "toy.jsonl", [])
    assert toy.find_data(["toy", "toy:3", own], "ranked.jsonl") == [
        toy.toy_folder(0) / "ranked.jsonl", toy.toy_folder(3) / "ranked.jsonl", own]
    assert [toy.toy_seed(name) for name in ("toy", "toy:0", "toy:12", "toys", own)] == [0, 0, 12, None, None]
    assert toy.is_toy(["toy", "toy:3"]) and not toy.is_toy(["toy", own])
    for name in ("toy:", "toy:x", "toy:-1", "toy:1.5"):
        with pytest.raises(InputError, match=f"{name}: a toy world is toy or toy:SEED"):
            toy.find_data([name], "ranked.jsonl")


def test_prompts_dialogues_and_human_texts_are_of_the_world_that_is_named():
    assert load_prompt("toy:3") == toy.careful_prompt(3) != load_prompt("toy") == toy.careful_prompt()
    args = Namespace(data=["toy:3"], dialogue=None, prompt=None)
    assert distill.find_sources(args) == (toy.find_data(["toy:3"], "lm.jsonl"),
                                          toy.find_data(["toy:3"], "dialogue.jsonl"), "toy:3")
    assert human_vs_model.find_raw([Path("toy:3"), Path("file")]) == [
        toy.toy_folder(3) / "ranked.jsonl", Path("file")]


def test_a_preference_model_is_trained_on_another_world(tmp_path):
    printed = run_well("train_pm.py", "--data", "toy:3", "--size", "test", "--steps", 1, "--out", tmp_path)
    assert str(toy.toy_folder(3) / "ranked.jsonl") in printed


def test_the_command_answers_mistakes_in_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    mistakes = [([], "the following arguments are required: --out"), (["moon"], "invalid choice: 'moon'"),
                (["--out", tmp_path, "--seed", "x"], "argument --seed: invalid int value: 'x'"),
                (["sources", "--out", tmp_path / "file"], "toy: error: ")]
    for flags, words in mistakes:
        done = run("data/toy/__main__.py", *flags)
        assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and words in done.stderr


def test_records_are_different_comparisons(world):
    for name in ("ranked", "binary", "hhh", "manners", "samples"):
        records = world[name]
        assert name == "manners" or len({json.dumps(record) for record in records}) == len(records)
        for record in records:
            context, completions, scores, group = parse(record, name)
            assert context.startswith("\n\nHuman: ") and context.endswith("\n\nAssistant:") and group
            assert len(completions) == 16 if name == "samples" else 2 <= len(completions) <= 5
            assert len(set(completions)) == len(completions)
            assert len(set(scores)) >= 2 or name == "samples"
            assert all(text.startswith(" ") and text.strip() for text in completions)
    for name in ("binary", "samples"):
        assert {score for record in world[name] for score in record["scores"]} == {0, 1}
    assert Counter(record["category"] for record in world["hhh"]) == dict.fromkeys(HHH, 200)


@pytest.mark.parametrize("name", ["ranked", "binary"])
def test_every_group_has_about_as_many_comparisons(world, name):
    sizes = Counter(record["group"] for record in world[name]).values()
    assert len(sizes) > 800 and max(sizes) - min(sizes) <= 3


def test_contexts_look_like_the_pages_conversations_and_hhh_questions_are_new(world):
    text = "\n".join(record["text"] for record in world["lm"])
    asked = {record["context"] for name in ("ranked", "binary") for record in world[name]}
    hhh = {record["context"] for record in world["hhh"]}
    assert not hhh & asked and not any(context in text for context in hhh)
    assert np.mean([context in text for context in sorted(asked)[:300]]) > 0.5
    prompt = toy.careful_prompt()
    assert prompt.endswith("\n\n-----") and prompt.count("\n\n-----") == 4
    assert not any(context in prompt for context in hhh)
    assert "\n\n-----\n\nHuman: " in text


@pytest.mark.parametrize("name", ["ranked", "binary", "hhh"])
def test_length_does_not_tell_the_better_answer(world, name):
    longer = np.mean([(len(a) > len(b)) + 0.5 * (len(a) == len(b)) for a, b, _ in pairs(world[name])])
    assert abs(longer - 0.5) < 0.03


@pytest.mark.parametrize("name", ["ranked", "binary"])
def test_a_list_of_words_does_not_tell_the_better_answer(world, name):
    """Logistic regression on differences of word counts is trained on half of the groups and tested on the
    rest."""
    data = pairs(world[name])
    words = {word: i for i, word in enumerate(sorted({word for a, b, _ in data for word in (a + b).split()}))}
    x = np.zeros((len(data), len(words)), np.float32)
    for row, (better, worse, _) in zip(x, data):
        for text, sign in ((better, 1), (worse, -1)):
            for word in text.split():
                row[words[word]] += sign
    groups = sorted({group for *_, group in data})
    is_train = np.isin([group for *_, group in data], groups[::2])
    weights = np.zeros(len(words), np.float32)
    for _ in range(200):
        p = 1 / (1 + np.exp(-x[is_train] @ weights))
        weights += x[is_train].T @ (1 - p) / is_train.sum() - 1e-2 * weights
    margin = x[~is_train] @ weights
    assert np.mean((margin > 0) + 0.5 * (margin == 0)) < 0.53


def test_quality_puts_truth_and_safety_before_tone():
    assert CONTENT["right"] > CONTENT["vague"] > CONTENT["wrong"] > CONTENT["unsafe"]
    assert 4 > TONE["kind"] > TONE["plain"] > TONE["rude"]


def test_the_last_words_are_known_facts(world):
    of_subjects = toy.build_world(0).truths.values()
    truths = {sentence.rstrip(".") for facts in of_subjects for sentences in facts for sentence in sentences}
    for record in world["lambada"]:
        assert len(record["text"]) <= 250 and record["text"].split(". ")[-1] in truths
