"""Synthetic comparisons: the order is known, and only the first letter tells it."""
import itertools
from collections import Counter

import pytest
from conftest import metrics, read_jsonl, run_well

from data.comparisons import parse
from data.errors import InputError
from data.toy import synthetic

ORDERS = ("same", "reversed", "shuffled")
SIZES = {"pmp": 16000, "finetune-same": 200, "finetune-reversed": 200, "finetune-shuffled": 200,
         "test-same": 500, "test-reversed": 500, "test-shuffled": 500}


def read(folder):
    return {path.stem: read_jsonl(path) for path in folder.glob("*.jsonl")}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("synthetic")
    synthetic.write(folder, n_pmp=3000, n_finetune=300, n_test=400)
    return read(folder)


def beaten(records):
    """{(better first letter, worse first letter)} of all pairs."""
    ordered = [sorted(zip(record["scores"], record["completions"]), reverse=True) for record in records]
    return {(better[1], worse[1]) for (_, better), (_, worse) in ordered}


def test_files_are_a_function_of_the_seed(tmp_path):
    printed = run_well("data/toy/__main__.py", "synthetic", "--out", tmp_path / "command")
    assert len(printed.splitlines()) == len(SIZES)
    for name, seed in (("again", 0), ("other", 1)):
        synthetic.write(tmp_path / name, seed)
    command, again, other = (read(tmp_path / name) for name in ("command", "again", "other"))
    assert command == again and again["pmp"] != other["pmp"]
    assert {name: len(records) for name, records in command.items()} == SIZES


def test_a_file_has_one_order_of_letters(files):
    assert set(files) == set(SIZES)
    same, reversed_, shuffled = (beaten(files[f"test-{order}"]) for order in ORDERS)
    assert same == beaten(files["pmp"]) == {(a, b) for a, b in itertools.product("abcde", repeat=2) if a > b}
    assert reversed_ == {(b, a) for a, b in same}
    assert len(shuffled) == 10 and len(shuffled & same) == 5
    assert all(beaten(files[f"finetune-{order}"]) == beaten(files[f"test-{order}"]) for order in ORDERS)


def test_no_context_stands_in_two_comparisons(files):
    groups = [record["group"] for records in files.values() for record in records]
    assert len(groups) == len(set(groups))
    assert all(record["group"] in record["context"] for record in files["pmp"])


def test_only_the_first_letter_tells_the_better_one(files):
    for name, records in files.items():
        for record in records:
            parse(record, name)
            a, b = record["completions"]
            assert sorted(a) == sorted(b) == sorted(" abcde")  # neither length nor a list of letters tells
    last = Counter(max(zip(record["scores"], record["completions"]))[1][-1] for record in files["pmp"])
    assert set(last) == set("abcde")  # the other letters stand in any order


def test_a_preference_model_learns_the_order(tmp_path):
    synthetic.write(tmp_path, n_pmp=4000, n_finetune=1, n_test=1)
    run_well("train_pm.py", "--data", tmp_path / "pmp.jsonl", "--size", "test", "--tokenizer", "bytes",
             "--ctx", 64, "--stage", "pmp", "--lm_weight", 0, "--batch", 64, "--lr", 0.003, "--dtype", "fp32",
             "--eval_every", 100, "--out", tmp_path / "pm")
    assert metrics(tmp_path / "pm")[-1]["eval"]["accuracy"] > 0.9


def test_more_comparisons_than_contexts_are_refused(tmp_path):
    with pytest.raises(InputError, match="give smaller numbers"):
        synthetic.write(tmp_path, n_pmp=10**6)
    assert not list(tmp_path.iterdir())
