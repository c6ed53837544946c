"""Several ranks, each with the whole model or with a part of it, train as one does, save what one would, and go
on in other numbers."""
import collections
import json
import os
import signal

import pytest
import torch
import torch.distributed as dist
from conftest import (GENTLE, GENTLE_LM, LM_STEPS, make_texts, metrics, rankable_comparisons, run_ranks,
                      run, run_refused, run_well, slow, start_ranks, write_jsonl)

import checkpoint
import trainer
from ranks import Ranks

SHARDS = [(2, 1), (2, 2), (4, 2)]  # (ranks, --shard): whole models, one model in two parts, two copies of that


@pytest.fixture(scope="module")
def trainings(lm, text_file, comparisons_file, tmp_path_factory):
    """{name: (the words of a training, what one rank makes of it)}."""
    folder = tmp_path_factory.mktemp("one")
    (folder / "prompt.txt").write_text("Friends talk.\n\n-----\n\nHuman: Who waits?\n\nAssistant: the cat.")
    talks = write_jsonl(folder / "talks.jsonl", [{"text": f"Human: Say it.\n\nAssistant: {text['text'][:80]}"}
                                                 for text in make_texts(40, seed=5)])
    pm = ("train_pm.py", "--init", lm, "--data", comparisons_file, *GENTLE, "--micro_tokens", 400)
    found = {
        "lm": ("train_lm.py", "--init", lm, "--data", text_file, *GENTLE_LM, "--micro_tokens", 192),
        "ranked": (*pm, "--lm_weight", 0.3),
        "binarised": (*pm, "--binarise"),
        "distillation": ("distill.py", "--init", lm, "--prompt", folder / "prompt.txt", "--data", text_file,
                         "--dialogue", talks, "--sequences", 64, "--batch", 8, "--steps", 5, "--dtype", "fp32",
                         "--lr", 3e-4, "--micro_tokens", 200)}
    found = {name: (*words, "--eval_every", 2, "--save_every", 5) for name, words in found.items()}
    for name, words in found.items():
        run_well(*words, "--out", folder / name)
    return {name: (words, folder / name) for name, words in found.items()}


def assert_same(one, other, rel=1e-5):
    """Two runs' figures, and weights, are the same to fp32's rounding."""
    for a, b in zip(metrics(one), metrics(other), strict=True):
        assert a.pop("eval", {}) == pytest.approx(b.pop("eval", {}), rel=1e-4)
        assert a == pytest.approx(b, rel=1e-4)
    weights = [checkpoint.load(out)[0].state_dict() for out in (one, other)]
    for name, tensor in weights[0].items():
        torch.testing.assert_close(weights[1][name], tensor, rtol=rel, atol=rel)


@pytest.mark.parametrize("name, n, shard", [
    pytest.param(name, *ranks, marks=[slow] * (ranks == (2, 2) and name != "ranked"))
    for name in ("lm", "ranked", "binarised", "distillation") for ranks in SHARDS])
def test_ranks_train_as_one_does(trainings, tmp_path, name, n, shard):
    words, one = trainings[name]
    run_ranks(*words, "--shard", shard, "--out", tmp_path / "out", n=n)
    assert_same(one, tmp_path / "out")


def test_a_fresh_model_has_the_same_weights_on_any_number_of_ranks(comparisons_file, tmp_path):
    args = ("train_pm.py", "--data", comparisons_file, "--size", "test", "--tokenizer", "bytes", *GENTLE,
            "--eval_every", 0)
    run_well(*args, "--out", tmp_path / "one")
    printed = run_ranks(*args, "--shard", 2, "--out", tmp_path / "two", n=4)
    assert "on 4 x cpu, each model on 2 of them" in printed
    assert_same(tmp_path / "one", tmp_path / "two")


@pytest.mark.parametrize("batch", [1, 4])
def test_a_rank_of_a_sharded_model_may_have_nothing_to_do(lm, tmp_path, batch):
    """Nine comparisons; with a batch of 4 an epoch's last step has one for two ranks."""
    data = write_jsonl(tmp_path / "nine.jsonl", rankable_comparisons(9))
    args = ("train_pm.py", "--init", lm, "--data", data, "--held_out", 0, "--dtype", "fp32", "--lr", 3e-4,
            "--batch", batch)
    run_well(*args, "--out", tmp_path / "one")
    run_ranks(*args, "--shard", 2, "--out", tmp_path / "two")
    assert_same(tmp_path / "one", tmp_path / "two")


def stop_after_three():
    """In a rank's process: ask for a stop when step 3 is done."""
    step = trainer.Log.step

    def changed(self, number, *rest):
        step(self, number, *rest)
        if number == 3:
            os.kill(os.getpid(), signal.SIGTERM)
    trainer.Log.step = changed


def test_a_run_goes_on_with_other_ranks_and_shards(trainings, tmp_path):
    """It is stopped on two ranks that share a model and goes on on one, and the other way round."""
    words, one = trainings["ranked"]
    for name, first, second in (("fewer", (2, 2), None), ("more", None, (4, 2)), ("as before", (2, 2), (2, 2))):
        out = tmp_path / name
        for ranks, more, before in ((first, (), stop_after_three), (second, ("--resume",), None)):
            if ranks is None:
                done = run(*words, "--out", out, *more, before=before)
                assert done.returncode == (128 + signal.SIGTERM if before else 0), done
            else:
                run_ranks(*words, "--shard", ranks[1], "--out", out, *more, n=ranks[0], before=before)
        assert_same(one, out)


def die_at_step_three():
    """In a rank's process: as if the system had killed it."""
    step = trainer.Log.step

    def changed(self, number, *rest):
        if number == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        step(self, number, *rest)
    trainer.Log.step = changed


@pytest.mark.parametrize("shard", [1, 2])
def test_a_rank_that_dies_ends_the_others_in_one_line(trainings, tmp_path, shard):
    words, one = trainings["ranked"]
    flags = (*words, "--shard", shard, "--save_every", 1, "--out", tmp_path / "out")
    survivor, killed = start_ranks(*flags, before=[None, die_at_step_three])
    assert killed.result().returncode == -signal.SIGKILL
    done = survivor.result(seconds=60)
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert "error: another rank has ended, or does not answer" in done.stderr
    run_ranks(*flags, "--resume")
    assert_same(one, tmp_path / "out")


def test_recomputing_blocks_changes_nothing(trainings, tmp_path):
    words, one = trainings["ranked"]
    run_well(*words, "--recompute", "--out", tmp_path / "out")
    assert metrics(one) == metrics(tmp_path / "out")
    run_ranks(*words, "--recompute", "--shard", 2, "--out", tmp_path / "two")
    assert_same(one, tmp_path / "two")


def print_gathered():
    """In a rank's process: at the end, print how many numbers the ranks have gathered, by their type."""
    name = "all_gather_single" if hasattr(dist, "all_gather_single") else "all_gather_into_tensor"  # before 2.13
    gathered, gather, close = collections.Counter(), getattr(dist, name), trainer.Log.close

    def counted(output_tensor, *rest, **more):
        gathered[output_tensor.dtype] += output_tensor.numel()
        return gather(output_tensor, *rest, **more)

    def closed(self):
        print("gathered", json.dumps({str(dtype): n for dtype, n in gathered.items()}))
        close(self)
    setattr(dist, name, counted)
    trainer.Log.close = closed


def test_blocks_are_gathered_in_the_precision_of_their_products(trainings, tmp_path):
    """In bf16 the figures are those of whole models on the same ranks, as all else stays in fp32."""
    words, _ = trainings["ranked"]
    words = (*words, "--dtype", "bf16")
    run_ranks(*words, "--out", tmp_path / "whole")
    printed = run_ranks(*words, "--shard", 2, "--out", tmp_path / "shared", before=print_gathered)
    assert_same(tmp_path / "whole", tmp_path / "shared")
    gathered = json.loads(printed.split("gathered ")[1].splitlines()[0])
    assert gathered["torch.bfloat16"] > gathered["torch.float32"]


def test_a_shard_is_a_part_of_the_ranks(lm, text_file, tmp_path):
    flags = ("train_lm.py", "--init", lm, "--data", text_file, *LM_STEPS, "--shard", 3)
    assert "has to be a multiple of it, and is 1" in run_refused(*flags, "--out", tmp_path / "out")


def test_ranks_share_items_equally():
    of_rank = [Ranks(rank, 3, None).share("abcde") for rank in range(3)]
    assert of_rank == [[("a", True), ("d", True)], [("b", True), ("e", True)], [("c", True), ("a", False)]]
