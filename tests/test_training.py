"""Training: the losses' values, equal results however a step is cut up, shared or interrupted, and what is refused."""
import functools
import itertools
import json
import math
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import (LM_FLAGS, PM_FLAGS, ROOT, Operators, Running, alone, losses, make_comparisons, make_texts, metrics,
                      processes, run, run_well, write_jsonl)

import checkpoint
import plan
import train_pm
import trainer
from data.comparisons import load_comparisons
from data.errors import InputError
from data.packing import RowFormat, balance, make_row, pack, packed_lengths
from data.selection import completions_to_keep
from data import selection
from data.tokenizer import get_tokenizer
from model import SIZES, Config, GPT
from ranks import Ranks

BYTES = get_tokenizer("bytes")


# ---------------------------------------------------------------------------------------------------------------------
# The losses


def make_model(value_head=True, seed=1):
    """A tiny model in fp64, its weights larger than fresh ones, so that nothing is equal by being near zero."""
    model = GPT(Config(2, 32, 2, BYTES.vocab_size, 512, value_head=value_head)).init_weights(seed).double()
    model.dtype = torch.float64
    with torch.no_grad():
        for p in model.parameters():
            p += 0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel()), dtype=p.dtype)
    return model


def load(tmp_path, records):
    return load_comparisons([write_jsonl(tmp_path / "file.jsonl", records)], BYTES, quiet=True)


FORMAT = RowFormat(512, BYTES)


def row_of(data, examples=None, predict="best"):
    return make_row(data, np.arange(len(data)) if examples is None else np.asarray(examples), FORMAT, predict=predict)


def softplus(x):
    return math.log1p(math.exp(x))


def test_ranked_and_binary_loss_are_the_formulas():
    got = train_pm.ranked_loss(torch.tensor([0.0, 2.0, -1.0, -1000.0, 1000.0]), torch.tensor([0.0, 0.5, 1.0, 1000.0, -1000.0]))
    assert torch.allclose(got, torch.tensor([math.log(2), softplus(-1.5), softplus(2.0), 2000.0, 0.0]))
    got = train_pm.binary_loss(torch.tensor([0.0, 3.0, 3.0, -800.0]), torch.tensor([True, True, False, True]))
    assert torch.allclose(got, torch.tensor([math.log(2), softplus(-3), softplus(3), 800.0]))


RECORDS = [{"context": "Which?", "completions": ["one", "the second", "3"], "scores": [0, 2, 1]},
           {"context": "", "completions": ["yes", "no"], "scores": [-1, 1]}]


def test_ranked_loss_of_a_row_equals_the_one_by_hand(tmp_path):
    model, row = make_model(), row_of(load(tmp_path, RECORDS))
    total, count, figures = train_pm.comparison_loss(model, row, "ranked")
    (a, b, c), (yes, no) = [[alone(model, BYTES, r["context"], x)[0] for x in r["completions"]] for r in RECORDS]
    by_hand = (softplus(a - b) + softplus(a - c) + softplus(c - b)) / 3 + softplus(yes - no)
    assert (total.item(), count) == (pytest.approx(by_hand, abs=1e-6), 2)
    assert figures["accuracy"] == pytest.approx(((b > a) + (c > a) + (b > c)) / 3 + (no > yes))


def test_a_tie_counts_half(tmp_path):
    model, row = make_model(), row_of(load(tmp_path, RECORDS))
    torch.nn.init.zeros_(model.score.weight)
    total, count, figures = train_pm.comparison_loss(model, row, "ranked")
    assert (total.item(), count, figures["accuracy"]) == pytest.approx((2 * math.log(2), 2, 1.0))


def test_binary_loss_of_a_row_equals_the_one_by_hand(tmp_path):
    model, row = make_model(), row_of(load(tmp_path, RECORDS))
    total, count, figures = train_pm.comparison_loss(model, row, "binary")
    rewards = [alone(model, BYTES, r["context"], x)[0] for r in RECORDS for x in r["completions"]]
    good = [s > 0 for r in RECORDS for s in r["scores"]]
    assert (total.item(), count) == (pytest.approx(sum(softplus(-r if g else r) for r, g in zip(rewards, good)), abs=1e-6), 5)
    assert figures["accuracy"] == sum((r > 0) == g for r, g in zip(rewards, good))


def test_imitation_is_cross_entropy_of_the_best_completion_and_its_end(tmp_path):
    model, row = make_model(value_head=False), row_of(load(tmp_path, RECORDS))
    total, count, figures = train_pm.comparison_loss(model, row, "imitation")
    by_hand = [alone(model, BYTES, r["context"], x)[1] for r, x in zip(RECORDS, ("the second", "no"))]
    assert count == len("the second") + 1 + len("no") + 1 == sum(map(len, by_hand))
    assert total.item() == pytest.approx(-sum(map(sum, by_hand)), abs=1e-9) and figures == {}


def test_binarised_is_two_pairs_for_each_ranked_one(tmp_path):
    """GOOD:A > BAD:A and BAD:B > GOOD:B, each sequence by a forward of its own."""
    model, data = make_model(), load(tmp_path, RECORDS)
    control = tuple(map(BYTES.encode, train_pm.CONTROL))
    row_format = RowFormat(512, BYTES, control=control)
    row = make_row(data, range(len(data)), row_format)
    assert len(row.tokens) == sum(packed_lengths(data, range(len(data)), row_format))
    total, count, figures = train_pm.comparison_loss(model, row, "binarised")
    by_hand = right = 0.0
    for r in RECORDS:
        good, bad = ([alone(model, BYTES, r["context"], mark + x)[0] for x in r["completions"]] for mark in train_pm.CONTROL)
        pairs = [(i, j) for i, a in enumerate(r["scores"]) for j, b in enumerate(r["scores"]) if a > b]
        for i, j in pairs:
            for margin in (good[i] - bad[i], bad[j] - good[j]):
                by_hand += np.log1p(np.exp(-margin)) / len(pairs) / 2
                right += (margin > 0) / len(pairs) / 2
    assert count == len(RECORDS) and total.item() == pytest.approx(by_hand, abs=1e-6) and figures["accuracy"].item() == pytest.approx(right)


def test_without_eoc_the_reward_is_read_at_the_last_token(tmp_path):
    model, data = make_model(), load(tmp_path, RECORDS)
    row_format = RowFormat(512, BYTES, eoc=False)
    row = make_row(data, range(len(data)), row_format)
    assert len(row.tokens) == sum(packed_lengths(data, range(len(data)), row_format))
    rewards = model.rewards(model(row.tokens, row.layout, only_ends=True))
    texts = [(r["context"], x) for r in RECORDS for x in r["completions"]]
    for reward, (context, completion) in zip(rewards.tolist(), texts):
        ids = torch.from_numpy(np.concatenate([BYTES.encode(context) if context else [BYTES.eot], BYTES.encode(completion) if completion else [BYTES.eoc]]).astype(np.int64))
        assert reward == pytest.approx(model.rewards(model(ids[None])[0, -1]).item(), abs=1e-9)


@pytest.mark.parametrize("objective", ["ranked", "binary"])
def test_the_lm_term_is_the_mean_loss_of_each_best_completion(tmp_path, objective):
    model, row = make_model(), row_of(load(tmp_path, RECORDS))
    row.token_weight = train_pm.lm_token_weights(row, objective)
    plain, with_lm = (train_pm.comparison_loss(model, row, objective, weight) for weight in (0.0, 0.7))
    counted = [len(r["completions"]) if objective == "binary" else 1 for r in RECORDS]
    by_hand = -sum(n * np.mean(alone(model, BYTES, r["context"], x)[1]) for n, r, x in zip(counted, RECORDS, ("the second", "no")))
    assert (with_lm[0] - plain[0]).item() == pytest.approx(0.7 * by_hand, abs=1e-6) and with_lm[1:] == plain[1:]


def test_one_pair_of_a_group_is_drawn_anew_each_epoch_and_always_the_same_way():
    args = Namespace(objective="ranked", pairs_per_group="1", seed=3, max_completions=None)
    scores = np.array([1.0, 0.0, 1.0, 5.0])

    def draw(epoch, example=0, seed=3):
        return tuple(completions_to_keep(scores, Namespace(**{**vars(args), "seed": seed}), epoch, example))

    drawn = [draw(epoch) for epoch in range(60)]
    assert drawn == [draw(epoch) for epoch in range(60)]
    assert set(drawn) == {(0, 1), (1, 2), (1, 3), (0, 3), (2, 3)}  # all but the pair of equal scores
    assert drawn != [draw(epoch, example=1) for epoch in range(60)] and drawn != [draw(epoch, seed=4) for epoch in range(60)]
    assert completions_to_keep(np.array([0.0, 1.0]), args, 0, 0) is None
    assert completions_to_keep(scores, Namespace(**{**vars(args), "pairs_per_group": "all"}), 0, 0) is None
    assert completions_to_keep(scores, Namespace(**{**vars(args), "objective": "imitation"}), 0, 0) == [3]


# ---------------------------------------------------------------------------------------------------------------------
# Which comparisons train


def split(data, ctx=512, **flags):
    flags = {"held_out": 0.3, "objective": "ranked", "pairs": None, "seed": 0, **flags}
    train, held_out, lines = selection.split(Namespace(**flags), data, ctx)
    return set(train.tolist()), set(held_out.tolist()), " ".join(lines)


def test_training_and_held_out_groups_are_apart(tmp_path):
    data = load(tmp_path, make_comparisons())
    train, held_out, told = split(data)
    assert train | held_out == set(np.flatnonzero(data.differ())) and not train & held_out and held_out
    assert not {data.groups[i] for i in train} & {data.groups[i] for i in held_out}
    assert f"{len(data) - len(train | held_out)} whose scores are all equal" in told
    assert split(data, held_out=0.0)[1] == set()


def test_what_cannot_fit_is_left_out_and_counted(tmp_path):
    cases = [(5, 0), (90, 0), (97, 0), (99, 0), (99, 1), (9, 1)]  # length of the first completion, score of the second
    data = load(tmp_path, [{"context": f"Q{i}", "completions": ["x" * n, "y"], "scores": [1, s]} for i, (n, s) in enumerate(cases)])
    train, held_out, told = split(data, ctx=100)
    assert train | held_out == {0, 1, 2}
    assert "2 comparisons with a completion longer than --ctx 100, 1 whose scores are all equal" in told
    assert set().union(*split(data, ctx=100, objective="imitation")[:2]) == {0, 1, 2, 5}
    with pytest.raises(InputError, match="no comparison to train on is left at --ctx 2"):
        split(data, ctx=2)


def test_pairs_takes_that_many_by_seed(tmp_path):
    data = load(tmp_path, make_comparisons())
    train, held_out, _ = split(data)
    some = split(data, pairs=10)
    assert len(some[0]) == 10 and some[0] < train and some[1] == held_out
    assert some == split(data, pairs=10) != split(data, pairs=10, seed=1)
    with pytest.raises(InputError, match=f"only {len(train)} training"):
        split(data, pairs=len(train) + 1)


def test_binary_needs_both_kinds(tmp_path):
    with pytest.raises(InputError, match="every completion is good"):
        split(load(tmp_path, [{"context": "C", "completions": ["a", "b"], "scores": [1, 2]}]), objective="binary", held_out=0.0)


# ---------------------------------------------------------------------------------------------------------------------
# A step is the same however it is cut up


def gradient(model, data, objective, lm_weight, micro_tokens, ranks):
    """(loss, gradients) of one step over all of `data`, computed in micro-batches by each of some ranks in turn."""
    lengths, total, count = packed_lengths(data, range(len(data)), FORMAT), 0.0, 0
    model.zero_grad()
    for mine in balance(lengths, ranks):
        for numbers in pack([lengths[i] for i in mine], micro_tokens):
            row = row_of(data, [mine[j] for j in numbers])
            if lm_weight:
                row.token_weight = train_pm.lm_token_weights(row, objective)
            batch_sum, batch_count, _ = train_pm.comparison_loss(model, row, objective, lm_weight)
            batch_sum.backward()
            total, count = total + batch_sum.item(), count + batch_count
    return total / count, [p.grad / count for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize("objective, lm_weight", [("ranked", 0.0), ("ranked", 0.5), ("binary", 0.0), ("imitation", 0.0)])
def test_a_step_in_micro_batches_and_ranks_is_exact_in_fp64(tmp_path, objective, lm_weight):
    model, data = make_model(value_head=objective != "imitation"), load(tmp_path, make_comparisons(16))
    loss, grads = gradient(model, data, objective, lm_weight, 10**6, 1)
    for micro_tokens, ranks in ((1, 1), (500, 1), (10**6, 2), (700, 3), (1, 20)):
        other_loss, other_grads = gradient(model, data, objective, lm_weight, micro_tokens, ranks)
        assert other_loss == pytest.approx(loss, rel=1e-12)
        for a, b in zip(grads, other_grads):
            assert (a - b).abs().max() < 1e-12 * max(1, a.abs().max())


def same_to_rounding(a, b, init):
    """Two runs' figures agree to fp32's precision, and so do the ways that their weights went from those of `init`."""
    one, two = (metrics(out) for out in (a, b))
    assert len(one) == len(two)
    for x, y in zip(one, two):
        assert x.pop("eval", {}) == pytest.approx(y.pop("eval", {}), rel=1e-4)
        assert x == pytest.approx(y, rel=1e-4)
    a, b, init = (dict(checkpoint.load(out)[0].named_parameters()) for out in (a, b, init))
    for name in set(a) & set(init):
        assert (a[name] - b[name]).norm() < 0.02 * (a[name] - init[name]).norm()


GENTLE = (*PM_FLAGS, "--lr", 3e-4, "--steps", 5)  # Adam makes much of rounding, more so the larger its steps
PM_OBJECTIVES = {"ranked": (), "one pair and lm": ("--pairs_per_group", 1, "--lm_weight", 0.3),
                 "binary": ("--objective", "binary"), "imitation": ("--objective", "imitation")}


@pytest.mark.parametrize("more", PM_OBJECTIVES.values(), ids=PM_OBJECTIVES)
def test_pm_training_is_the_same_in_micro_batches(lm, comparisons_file, tmp_path, more):
    args = ("--init", lm, "--data", comparisons_file, *GENTLE, *more)
    for name, micro in (("whole", 100_000), ("cut", 150)):
        run_well("train_pm.py", *args, "--out", tmp_path / name, "--micro_tokens", micro)
    same_to_rounding(tmp_path / "whole", tmp_path / "cut", lm)


GENTLE_LM = (*LM_FLAGS, "--lr", 3e-4, "--steps", 5)


@pytest.fixture(scope="module")
def more_lm(lm, text_file, tmp_path_factory):
    """A run that goes on from `lm` with small steps."""
    out = tmp_path_factory.mktemp("more") / "lm"
    run_well("train_lm.py", "--init", lm, "--data", text_file, *GENTLE_LM, "--out", out)
    return out


def test_lm_training_is_the_same_in_micro_batches(lm, more_lm, text_file, tmp_path):
    run_well("train_lm.py", "--init", lm, "--data", text_file, *GENTLE_LM, "--out", tmp_path / "cut", "--micro_tokens", 1)
    same_to_rounding(more_lm, tmp_path / "cut", lm)


def rankable(n):
    return itertools.islice((r for r in make_comparisons() if len(set(r["scores"])) > 1), n)


def run_ranks(name, *args, n=2):
    """As torchrun does: n processes that train together on this machine."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = str(s.getsockname()[1])
    ranks = [Running(name, *args, RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(n), LOCAL_WORLD_SIZE=str(n),
                     MASTER_ADDR="127.0.0.1", MASTER_PORT=port) for rank in range(n)]
    done = [rank.result() for rank in ranks]
    assert [d.returncode for d in done] == [0] * n, done
    return done[0].stdout


@pytest.mark.parametrize("batch, epochs", [(4, 2), (1, 1)], ids=["one left over", "fewer than ranks"])
def test_two_ranks_train_the_same_pm_as_one(lm, tmp_path, batch, epochs):
    """Nine comparisons: with a batch of 4 an epoch's last step has one, so that a rank has none."""
    data = write_jsonl(tmp_path / "nine.jsonl", rankable(9))
    args = ("--init", lm, "--data", data, "--held_out", 0, "--dtype", "fp32", "--lr", 3e-4, "--batch", batch, "--epochs", epochs)
    run_well("train_pm.py", *args, "--out", tmp_path / "one")
    assert "2 x cpu" in run_ranks("train_pm.py", *args, "--out", tmp_path / "two")
    assert [r["count"] for r in metrics(tmp_path / "one") if "count" in r] == [4, 4, 1, 4, 4, 1] if batch == 4 else [1] * 9
    same_to_rounding(tmp_path / "one", tmp_path / "two", lm)


@pytest.mark.parametrize("objective", ["ranked", "imitation"])
def test_two_ranks_evaluate_as_one_does(lm, comparisons_file, tmp_path, objective):
    args = ("--init", lm, "--data", comparisons_file, *GENTLE, "--steps", 2, "--objective", objective)
    run_well("train_pm.py", *args, "--out", tmp_path / "one")
    run_ranks("train_pm.py", *args, "--out", tmp_path / "two")
    assert [set(r["eval"]) for r in metrics(tmp_path / "one") if "eval" in r] == [{"loss", "accuracy", "comparisons"}] * 2
    same_to_rounding(tmp_path / "one", tmp_path / "two", lm)


def test_a_rank_may_have_nothing_to_evaluate(tmp_path):
    """The held-out text is one window for two ranks."""
    data = write_jsonl(tmp_path / "text.jsonl", [{"text": "abcdefgh" * 300}])
    args = ("--data", data, *LM_FLAGS, "--steps", 2)
    run_well("train_lm.py", *args, "--out", tmp_path / "one")
    run_ranks("train_lm.py", *args, "--out", tmp_path / "two")
    assert metrics(tmp_path / "one")[-1]["eval"] == pytest.approx(metrics(tmp_path / "two")[-1]["eval"], rel=1e-3)
    assert metrics(tmp_path / "one")[-1]["eval"]["tokens"] == 192


def test_torchrun_trains_the_same_lm_as_one_process(lm, more_lm, text_file, tmp_path):
    args = map(str, ("--init", lm, "--data", text_file, *GENTLE_LM, "--out", tmp_path / "two"))
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "train_lm.py", *args],
                          cwd=ROOT, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    same_to_rounding(more_lm, tmp_path / "two", lm)


# ---------------------------------------------------------------------------------------------------------------------
# The curve: a change that is not about computation leaves it as it is. Who changes the computation, and means it,
# writes the new numbers here.


def test_golden_losses_of_the_language_model(lm):
    assert losses(lm) == pytest.approx(GOLDEN_LM, rel=1e-4)


@pytest.mark.parametrize("objective", ["ranked", "binary", "imitation"])
def test_golden_losses_of_the_preference_model(comparisons_file, tmp_path, objective):
    args = ("--size", "test", "--data", comparisons_file, "--ctx", 256, "--objective", objective, *GENTLE)
    run_well("train_pm.py", *args, "--out", tmp_path / "pm")
    assert losses(tmp_path / "pm") == pytest.approx(GOLDEN_PM[objective], rel=1e-4)


GOLDEN_LM = [6.10013, 4.92501, 4.48040, 4.08715, 3.76540, 3.45911, 3.15876, 3.04919, 2.92241, 2.85634]
GOLDEN_PM = {"ranked": [0.661266, 0.648213, 0.590487, 0.579735, 0.416318],
             "binary": [1.37096, 0.637550, 0.417581, 0.609270, 0.581043],
             "imitation": [6.13481, 5.77251, 5.70116, 5.43868, 5.30515]}


# ---------------------------------------------------------------------------------------------------------------------
# Stopping and going on


RUN = ("--steps", 12, "--batch", 8, "--held_out", 0.3, "--dtype", "fp32", "--lr", 0.003, "--schedule", "cosine", "--warmup", 0.2,
       "--eval_every", 4, "--save_every", 3)


@pytest.fixture(scope="module")
def run_flags(lm, comparisons_file):
    """A run of 12 steps over about two epochs, which saves after each third."""
    return ("--init", lm, "--data", comparisons_file, *RUN)


@pytest.fixture(scope="module")
def uninterrupted(run_flags, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "uninterrupted"
    run_well("train_pm.py", *run_flags, "--out", out)
    return out


def same_run(a, b):
    """Bit for bit: weights, optimizer state and every figure that was logged; and nothing else lies about."""
    assert (a / "model.safetensors").read_bytes() == (b / "model.safetensors").read_bytes()
    assert metrics(a) == metrics(b)
    states = [torch.load(out / "train_state.pt", weights_only=True) for out in (a, b)]
    assert str(states[0]) == str(states[1])
    assert {p.name for p in a.iterdir()} == {p.name for p in b.iterdir()} == {*checkpoint.FILES, "metrics.jsonl"}
    metas = [json.loads((out / "meta.json").read_text()) for out in (a, b)]
    for meta in metas:
        meta["flags"] = {k: v for k, v in meta["flags"].items() if k not in ("out", "resume")}
    assert metas[0] == metas[1]


class Writes:
    """Audit hook: counts operations by which files appear, change or go, and kills the process before the n-th."""
    EVENTS = {"os.rename", "os.remove", "os.link", "os.mkdir", "os.rmdir", "os.truncate"}

    def __init__(self, n):
        self.left = n

    def __call__(self, event, args):
        if event in self.EVENTS or event == "open" and isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR):
            self.left -= 1
            if self.left == 0:
                os.kill(os.getpid(), signal.SIGKILL)


def kill_at_write(n):
    sys.addaudithook(Writes(n))


def kill_at_step(n):
    """Kill the process inside the n-th optimizer step that it takes."""
    step, calls = torch.optim.AdamW.step, itertools.count(1)

    def counted(*args, **kwargs):
        if next(calls) == n:
            os.kill(os.getpid(), signal.SIGKILL)
        return step(*args, **kwargs)
    torch.optim.AdamW.step = counted


def test_a_run_without_evaluations_says_none(tmp_path):
    done = run_well("train_pm.py", *PM_FLAGS, "--steps", 2, "--eval_every", 0, "--out", tmp_path / "pm")
    assert "held out:" not in done and json.loads((tmp_path / "pm" / "meta.json").read_text())["metrics"] == {}


def test_resumed_after_kills_equals_uninterrupted(run_flags, uninterrupted, tmp_path):
    """Killed again and again at some step or some moment of writing, always gone on with."""
    out, kills = tmp_path / "killed", 0
    moments = [(kill_at_write, 1), (kill_at_step, 2), (kill_at_step, 5), (kill_at_write, 7), (kill_at_write, 13), (kill_at_write, 20),
               (kill_at_write, 29), (kill_at_step, 2), (kill_at_write, 35), (kill_at_write, 44), (kill_at_write, 62)]
    for kill, n in moments:
        done = run("train_pm.py", *run_flags, "--out", out, "--resume", before=functools.partial(kill, n))
        assert done.returncode in (0, -signal.SIGKILL), done
        kills += done.returncode != 0
    run_well("train_pm.py", *run_flags, "--out", out, "--resume")
    assert kills >= 9
    same_run(out, uninterrupted)


def write_checkpoints(lm, out, n):
    """In a process of its own: two checkpoints of a run and its end; killed before the n-th operation on files."""
    model, tokenizer, _ = checkpoint.load(lm)
    kill_at_write(n)
    for step in (1, 2):
        with torch.no_grad():
            model.model.norm.weight.fill_(step)
        checkpoint.save(out, model, tokenizer, {"kind": "lm", "step": step}, {"step": step})
    checkpoint.finish(out)


def test_a_crash_at_any_moment_of_saving_leaves_the_last_good_checkpoint(lm, tmp_path):
    steps = []
    for n in itertools.count(1):
        out = tmp_path / str(n)
        process = processes.Process(target=write_checkpoints, args=(lm, out, n))
        process.start()
        process.join()
        if process.exitcode == 0:
            break
        assert process.exitcode == -signal.SIGKILL
        try:
            model, _, meta = checkpoint.load(out)
        except InputError as error:
            assert "no such checkpoint folder" in str(error) or "no checkpoint in this folder" in str(error)
            steps.append(0)
            continue
        assert meta["step"] == model.model.norm.weight[0] == checkpoint.load_train_state(out)["step"]
        steps.append(meta["step"])
    assert steps == sorted(steps) and set(steps) == {0, 1, 2} and len(steps) > 40
    assert {p.name for p in out.iterdir()} == set(checkpoint.FILES)


def test_lm_training_resumes_bit_for_bit(lm, text_file, tmp_path):
    out = tmp_path / "killed"
    args = ("--data", text_file, *LM_FLAGS, "--out", out)
    assert run("train_lm.py", *args, before=functools.partial(kill_at_step, 8)).returncode == -signal.SIGKILL
    assert sorted(p.name for p in out.iterdir()) == ["metrics.jsonl", "step-6"]
    run_well("train_lm.py", *args, "--resume")
    same_run(out, lm)


def test_two_ranks_resume_where_a_rank_has_nothing_to_do(lm, tmp_path):
    """The first step after going on is an epoch's last, which has one comparison for two ranks."""
    data = write_jsonl(tmp_path / "five.jsonl", rankable(5))
    args = ("--init", lm, "--data", data, "--held_out", 0, "--dtype", "fp32", "--batch", 2, "--save_every", 1)
    killed = run("train_pm.py", *args, "--out", tmp_path / "two", before=functools.partial(kill_at_step, 3))
    assert killed.returncode == -signal.SIGKILL
    assert "resumed after step 2" in run_ranks("train_pm.py", *args, "--out", tmp_path / "two", "--resume")
    run_well("train_pm.py", *args, "--out", tmp_path / "one")
    assert losses(tmp_path / "one") == pytest.approx(losses(tmp_path / "two"), rel=1e-4)


def slow_steps():
    step = torch.optim.AdamW.step
    torch.optim.AdamW.step = lambda *args, **kwargs: (time.sleep(0.1), step(*args, **kwargs))[1]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_ends_well(run_flags, uninterrupted, tmp_path, number):
    out = tmp_path / "stopped"
    running = Running("train_pm.py", *run_flags, "--out", out, before=slow_steps)
    running.wait_for("step 1/12")
    os.kill(running.process.pid, number)
    done = running.result()
    assert done.returncode == 0 and done.stderr == ""
    step = len(losses(out))
    assert step < 12 and f"stopped after step {step} of 12; go on with --resume" in done.stdout
    assert checkpoint.load(out)[2]["step"] == step
    assert f"resumed after step {step}" in run_well("train_pm.py", *run_flags, "--out", out, "--resume")
    same_run(out, uninterrupted)


def test_resume_before_the_first_checkpoint_begins_anew(run_flags, uninterrupted, tmp_path):
    out = tmp_path / "early"
    assert run("train_pm.py", *run_flags, "--out", out, before=functools.partial(kill_at_step, 2)).returncode == -signal.SIGKILL
    assert [p.name for p in out.iterdir()] == ["metrics.jsonl"] and len(losses(out)) == 1
    run_well("train_pm.py", *run_flags, "--out", out, "--resume")
    same_run(out, uninterrupted)


def test_resume_of_a_run_that_is_done_changes_nothing(run_flags, uninterrupted):
    before = {p.name: p.read_bytes() for p in uninterrupted.iterdir()}
    assert "done" in run_well("train_pm.py", *run_flags, "--out", uninterrupted, "--resume")
    assert {p.name: p.read_bytes() for p in uninterrupted.iterdir()} == before


@pytest.mark.parametrize("changed, named", [(("--lr", 0.01), "--lr 0.003"), (("--batch", 16), "--batch 8"), (("--seed", 1), "--seed 0"),
                                            (("--objective", "imitation"), "kind pm"), (("--steps", 13), "--steps 12"),
                                            (("--max_completions", 3), "without --max_completions"),
                                            (("--binarise",), "without --binarise")])
def test_resume_with_other_flags_is_refused(run_flags, uninterrupted, changed, named):
    before = {p.name: p.read_bytes() for p in uninterrupted.iterdir()}
    done = run("train_pm.py", *run_flags, *changed, "--out", uninterrupted, "--resume")
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert f"error: {uninterrupted}: --resume goes on as the run began: " in done.stderr and named in done.stderr
    assert {p.name: p.read_bytes() for p in uninterrupted.iterdir()} == before


def test_resume_with_other_data_is_refused(run_flags, uninterrupted, tmp_path):
    other = write_jsonl(tmp_path / "other.jsonl", make_comparisons(seed=1))
    done = run("train_pm.py", *run_flags, "--data", other, "--out", uninterrupted, "--resume")
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "--data" in done.stderr


def test_a_second_run_on_one_folder_names_the_first(run_flags, uninterrupted, tmp_path):
    """Both while the first is under way and when it has checkpoints; it goes on undisturbed."""
    out = tmp_path / "run"
    first = Running("train_pm.py", *run_flags, "--out", out)
    first.wait_for("step 1/12")
    os.kill(first.process.pid, signal.SIGSTOP)
    for flags in ((), ("--resume",)):
        second = run("train_pm.py", *run_flags, "--out", out, *flags)
        assert second.returncode == 2 and second.stderr.count("\n") == 1
        assert f"{out}: process {first.process.pid} is writing" in second.stderr
    os.kill(first.process.pid, signal.SIGCONT)
    assert first.result().returncode == 0
    same_run(out, uninterrupted)


@pytest.mark.parametrize("kind", ["file", "device", "below a file"])
def test_an_out_that_is_no_folder_is_refused_and_left_alone(run_flags, tmp_path, kind):
    (tmp_path / "file").write_text("mine")
    out = {"file": tmp_path / "file", "device": "/dev/full", "below a file": tmp_path / "file" / "run"}[kind]
    done = run("train_pm.py", *run_flags, "--out", out)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and f"--out {out}" in done.stderr
    assert (tmp_path / "file").read_text() == "mine" and not Path("/dev/full").is_file()


def test_an_out_folder_with_a_run_is_refused(run_flags, uninterrupted):
    before = {p.name: p.read_bytes() for p in uninterrupted.iterdir()}
    for args in (("train_pm.py", *run_flags), ("train_lm.py",)):
        done = run(*args, "--out", uninterrupted)
        assert done.returncode == 2 and done.stderr.count("\n") == 1
        assert f"error: {uninterrupted}: holds a run already; give --resume" in done.stderr
    assert {p.name: p.read_bytes() for p in uninterrupted.iterdir()} == before


# ---------------------------------------------------------------------------------------------------------------------
# What goes wrong in a run


def test_absurd_learning_rate_ends_in_words(run_flags, tmp_path):
    done = run("train_pm.py", *run_flags, "--lr", 1e30, "--warmup", 0, "--out", tmp_path / "run")
    assert done.returncode == 3 and done.stderr.count("\n") == 1
    assert "error: the loss or gradient of step 2 is not finite" in done.stderr and "smaller --lr" in done.stderr
    assert [p.name for p in (tmp_path / "run").iterdir()] == ["metrics.jsonl"]
    assert len(losses(tmp_path / "run")) == 1


def poison():
    """Hidden states of rows that hold a "~" are NaN in training."""
    forward = GPT.forward

    def poisoned(self, tokens, *rest, **named):
        return forward(self, tokens, *rest, **named) * (math.nan if self.training and (tokens == ord("~")).any() else 1)
    GPT.forward = poisoned


def test_a_comparison_with_a_loss_that_is_not_finite_is_named(lm, tmp_path):
    """The run keeps what it saved before, and nothing of the bad step."""
    records = list(rankable(40))
    args = ("--init", lm, "--held_out", 0, "--dtype", "fp32", "--steps", 8, "--batch", 5, "--save_every", 1, "--micro_tokens", 100)
    order = [i for step in range(4) for i in train_pm.step_examples(len(records), 5, 0, step)[1]]
    bad = int(order[17])  # of the fourth step
    records[bad]["context"] += "~"
    data = write_jsonl(tmp_path / "data.jsonl", records)
    done = run("train_pm.py", "--data", data, *args, "--out", tmp_path / "run", before=poison)
    assert done.returncode == 3 and done.stderr.count("\n") == 1
    assert "step 4 is not finite" in done.stderr and f"Examples: {data}:{bad + 1}. " in done.stderr
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == ["metrics.jsonl", "step-3"]
    assert all(p.isfinite().all() for p in checkpoint.load(tmp_path / "run")[0].parameters())
    assert len(losses(tmp_path / "run")) == 3


def limit_size(n_bytes):
    """From the second checkpoint on no file can grow beyond that: what a full disk looks like to all that write."""
    save, calls = checkpoint.save, itertools.count(1)

    def limited(*args):
        if next(calls) == 2:
            resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, resource.RLIM_INFINITY))
        return save(*args)
    checkpoint.save = limited


def no_room_for_json():
    write, calls = checkpoint.write_file, itertools.count(1)

    def fails(path, content):
        if next(calls) > 3:  # in the second checkpoint, after its config.json
            raise OSError(28, "No space left on device")
        write(path, content)
    checkpoint.write_file = fails


@pytest.mark.parametrize("fault", ["model.safetensors", "train_state.pt", "meta.json"])
def test_a_full_disk_leaves_the_checkpoint_before(run_flags, uninterrupted, tmp_path, fault):
    size = (uninterrupted / "model.safetensors").stat().st_size
    before = {"model.safetensors": functools.partial(limit_size, size - 1000), "meta.json": no_room_for_json,
              "train_state.pt": functools.partial(limit_size, size + 1000)}[fault]
    out = tmp_path / "run"
    done = run("train_pm.py", *run_flags, "--out", out, before=before)
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert f"error: {out}: the checkpoint could not be written" in done.stderr and "the one before it" in done.stderr
    assert sorted(p.name for p in out.iterdir()) == ["metrics.jsonl", "step-3"]
    assert checkpoint.load(out)[2]["step"] == 3
    run_well("train_pm.py", *run_flags, "--out", out, "--resume")
    same_run(out, uninterrupted)


# ---------------------------------------------------------------------------------------------------------------------
# Schedules, defaults and what a checkpoint holds


def rates(schedule, warmup, n=100):
    return [trainer.learning_rate(Namespace(schedule=schedule, warmup=warmup), 2.0, step, n) for step in range(n)]


def test_schedules():
    assert rates("constant", 0) == [2.0] * 100
    assert rates("linear", 0) == pytest.approx([2 * (1 - i / 100) for i in range(100)])
    cosine = rates("cosine", 0)
    assert cosine[0] == 2.0 and cosine[50] == pytest.approx(1.1) and cosine[-1] == pytest.approx(0.2, abs=0.001)
    assert cosine == sorted(cosine, reverse=True)
    for schedule in ("constant", "linear", "cosine"):
        warm = rates(schedule, 0.1)
        assert np.allclose(np.diff(warm[:10]), 2 / 11) and 0 < warm[0] < 0.2 and warm[10] == 2.0 == max(warm)
    assert rates("linear", 1.0)[-1] < 2.0


def test_rates_and_batches_are_multiples_of_the_language_models(lm, comparisons_file, tmp_path):
    """Small models get 0.1 x in each stage. A small data set gets small steps, so that there are enough of them."""
    lm_rate = json.loads((lm / "meta.json").read_text())["lm_lr"]
    assert lm_rate == pytest.approx(3e-3 * (128 / SIZES["test"][1]) ** 0.5)
    for stage in ("finetune", "pmp"):
        out = tmp_path / stage
        printed = run_well("train_pm.py", "--init", lm, "--data", comparisons_file, "--stage", stage, "--steps", 1, "--out", out)
        assert metrics(out)[0]["lr"] == pytest.approx(0.1 * lm_rate) and "a step: 8 comparisons" in printed
    again = tmp_path / "after pmp"  # the rate goes by the language model that all began with
    run_well("train_pm.py", "--init", tmp_path / "pmp", "--data", comparisons_file, "--steps", 1, "--out", again)
    assert metrics(again)[0]["lr"] == pytest.approx(0.1 * lm_rate)


@pytest.mark.parametrize("size, scale, expected", [("13m", 0.01, 0.1), ("42m", 0.05, 0.1), ("197m", 0.01, 0.01), ("810m", 0.05, 0.05), ("52b", 0.1, 0.1)])
def test_large_models_get_the_papers_rates(size, scale, expected):
    with torch.device("meta"):
        model = GPT(Config(*SIZES[size], vocab_size=64, ctx=8))
    assert plan.stage_rate(model, 2.0, scale) == pytest.approx(2.0 * expected)


def test_only_a_preference_model_has_a_head(pm, lm, comparisons_file, tmp_path):
    out = tmp_path / "imitation"
    run_well("train_pm.py", "--init", pm, "--data", comparisons_file, "--objective", "imitation", *PM_FLAGS, "--out", out)
    for folder, head, kind, objective in ((lm, False, "lm", "lm"), (pm, True, "pm", "ranked"), (out, False, "lm", "imitation")):
        model, _, meta = checkpoint.load(folder)
        assert (model.config.value_head, meta["kind"], meta["objective"]) == (head, kind, objective)
        assert ("score.weight" in dict(model.named_parameters())) == head


def test_a_checkpoint_remembers_all_data_it_saw(pm, text_file, comparisons_file):
    files = {e["file"]: e["held_out"] for e in json.loads((pm / "meta.json").read_text())["trained_on"]}
    assert files == {str(comparisons_file): 0.3, str(text_file): 0.1}


def test_train_state_is_nothing_but_tensors_and_numbers(pm):
    state = torch.load(pm / "train_state.pt", weights_only=True)
    assert set(state) == {"optimizer", "step"} and state["step"] == 8
    moments = state["optimizer"]["state"].values()
    assert sum(m["exp_avg"].numel() for m in moments) == sum(p.numel() for p in checkpoint.load(pm)[0].parameters())


def test_the_plan_comes_first(pm, lm, comparisons_file, tmp_path):
    plan = run_well("train_pm.py", "--init", lm, "--data", comparisons_file, *PM_FLAGS, "--out", tmp_path / "run")
    assert f"tokens, {comparisons_file}:" in plan.split("longest comparison: ")[1].splitlines()[0]
    for words in ("flags: ", "--lr 0.003", "model: 2 layers x 64, 2 heads, ctx 192", "8 steps", "training comparisons",
                  "GiB a rank", f"output: {tmp_path / 'run'}"):
        assert words in plan and plan.index(words) < plan.index("step 1/8")
    assert losses(tmp_path / "run") == losses(pm)


def test_the_plan_leaves_out_what_the_checkpoint_decides(lm, comparisons_file, tmp_path):
    plan = run_well("train_pm.py", "--init", lm, "--data", comparisons_file, *PM_FLAGS, "--out", tmp_path / "run")
    flags = plan.split("flags: ")[1].splitlines()[0]
    assert "--init" in flags and "--size" not in flags and "--tokenizer" not in flags


def test_evaluations_of_a_short_run_cost_little(tmp_path):
    """All of a run's evaluations together read at most 0.6 times the tokens that it trains on, each at a third of the cost."""
    data = write_jsonl(tmp_path / "text.jsonl", make_texts(400))
    args = ("--data", data, *LM_FLAGS, "--steps", 20, "--held_out", 0.5, "--out", tmp_path / "lm")
    run_well("train_lm.py", *args)
    records = metrics(tmp_path / "lm")
    evaluations = [r["eval"]["tokens"] for r in records if "eval" in r]
    trained_on = sum(r["count"] for r in records if "count" in r)
    assert len(evaluations) == 10 and 0 < sum(evaluations) <= 0.6 * trained_on


def test_learning_learns(pm, lm):
    assert losses(lm)[-1] < 0.8 * losses(lm)[0]
    assert np.mean(losses(pm)[-4:]) < 0.9 * losses(pm)[0]


def test_where_no_data_is_named_it_is_the_toy_world(tmp_path):
    """Each script with its defaults but for size and length."""
    lm = run_well("train_lm.py", "--size", "test", "--tokenizer", "bytes", "--steps", 1, "--dtype", "fp32", "--out", tmp_path / "lm")
    assert "training tokens" in lm
    pm = run_well("train_pm.py", "--init", tmp_path / "lm", "--steps", 1, "--dtype", "fp32", "--out", tmp_path / "pm")
    assert "ranked.jsonl: 8,000 comparisons" in pm and "a step: 32 comparisons" in pm
    result = json.loads(run_well("evaluate.py", "pm", "--model", tmp_path / "pm", "--dtype", "fp32").splitlines()[-1])
    assert 400 < result["n"] < 1600 and all(0.4 < result[ruler] < 0.6 for ruler in ("longer_wins", "shorter_wins"))


# ---------------------------------------------------------------------------------------------------------------------
# Preference-model pre-training


def test_binarised_pre_training_then_finetuning(lm, comparisons_file, tmp_path):
    small = ("--steps", 3, "--batch", 8, "--dtype", "fp32")
    run_well("train_pm.py", "--init", lm, "--data", comparisons_file, "--stage", "pmp", "--binarise", "--out", tmp_path / "pmp", *small)
    run_well("train_pm.py", "--init", tmp_path / "pmp", "--data", comparisons_file, "--no_eoc", "--out", tmp_path / "pm", *small)
    pmp, finetuned = (json.loads((tmp_path / name / "meta.json").read_text()) for name in ("pmp", "pm"))
    assert metrics(tmp_path / "pmp")[0]["lr"] == metrics(tmp_path / "pm")[0]["lr"]
    assert 0 <= pmp["metrics"]["accuracy"] <= 1 and pmp["eoc"] and not finetuned["eoc"]
    evaluated = run_well("evaluate.py", "pm", "--model", tmp_path / "pm", "--data", comparisons_file, "--dtype", "fp32")
    assert json.loads(evaluated.splitlines()[-1])["accuracy"] == pytest.approx(finetuned["metrics"]["accuracy"], abs=1e-6)


@pytest.mark.parametrize("flags, told", [((), None), (("--sizes", "70", "10"), "mix: 70 from"), (("--weights", "1", "3"), "mix: ")])
def test_sources_are_mixed_by_size_or_weight(lm, comparisons_file, tmp_path, flags, told):
    other = write_jsonl(tmp_path / "other.jsonl", make_comparisons(40, seed=9))
    printed = run_well("train_pm.py", "--init", lm, "--data", comparisons_file, other, "--out", tmp_path / "out", "--steps", 1, "--batch", 4, *flags)
    n = int(printed.split(" training comparisons")[0].rsplit(" ", 1)[1])
    if not told:
        assert "mix:" not in printed
        return
    first, second = (int(part.split()[0]) for part in printed.split("mix: ")[1].split("\n")[0].split(", "))
    assert told in printed and first + second == n
    assert (first, second) == (70, 10) if flags[0] == "--sizes" else abs(second - 3 * first) <= 2


@pytest.mark.parametrize("flags, words", [
    (("--sizes", "5"), "--sizes needs one number for each of the 2 --data, found 1"),
    (("--sizes", "5", "5", "--pairs", "3"), "give one of --sizes, --weights and --pairs"),
    (("--binarise", "--objective", "imitation"), "--binarise is for --objective ranked"),
    (("--no_eoc", "--objective", "imitation"), "--no_eoc and --lm_weight are for preference models")])
def test_flags_that_do_not_go_together(lm, comparisons_file, tmp_path, flags, words):
    other = write_jsonl(tmp_path / "other.jsonl", make_comparisons(40, seed=9))
    done = run("train_pm.py", "--init", lm, "--data", comparisons_file, other, "--out", tmp_path / "out", *flags)
    assert done.returncode == 2 and words in done.stderr and done.stderr.count("\n") == 1


# ---------------------------------------------------------------------------------------------------------------------
# Comparisons of many completions


MANY = {"context": "Which?", "completions": [f"answer {i} " * 8 for i in range(60)], "scores": list(range(60)), "group": "many"}


def test_at_most_so_many_completions_are_laid_out():
    args = Namespace(objective="ranked", pairs_per_group="all", seed=3, max_completions=4)
    scores = np.arange(10.0)
    kept = completions_to_keep(scores, args, 0, 5)
    assert len(set(kept)) == 4 and kept == sorted(kept) == completions_to_keep(scores, args, 7, 5)  # the same each epoch
    assert kept != completions_to_keep(scores, Namespace(**{**vars(args), "seed": 4}), 0, 5)
    assert completions_to_keep(scores[:4], args, 0, 5) is None
    rare = np.array([0.0] * 50 + [1.0])
    for example in range(20):  # something is left to compare
        assert len(set(rare[completions_to_keep(rare, args, 0, example)])) == 2


def test_the_longest_comparison_is_named_and_computed_first(lm, comparisons_file, tmp_path):
    """So a run that cannot fit in memory fails at once, and not when the comparison's turn comes."""
    data = write_jsonl(tmp_path / "data.jsonl", [*itertools.islice((r for r in make_comparisons()), 20), MANY])
    args = ("--init", lm, "--data", data, "--held_out", 0, "--steps", 1, "--batch", 2, "--micro_tokens", 600)
    whole = run_well("train_pm.py", *args, "--out", tmp_path / "whole", before=tell_rows)
    n_tokens = 6 + sum(len(c) + 1 for c in MANY["completions"])
    assert f"longest comparison: {n_tokens:,} tokens, {data}:21;" in whole
    assert f"rows: {n_tokens} " in whole  # the first row of all
    cut = run_well("train_pm.py", *args, "--out", tmp_path / "cut", "--max_completions", 5, before=tell_rows)
    longest = int(cut.split("longest comparison: ")[1].split()[0].replace(",", ""))
    assert longest < 600 and f"rows: {n_tokens} " not in cut and "1 comparisons have more than --max_completions 5" in cut
    assert losses(tmp_path / "whole")[0] > 0


def tell_rows():
    """Print the length of every row that is computed in training."""
    forward = GPT.forward

    def told(self, tokens, *rest, **named):
        if self.training and torch.is_grad_enabled():
            print(f"rows: {len(tokens)} ", flush=True)
        return forward(self, tokens, *rest, **named)
    GPT.forward = told


# ---------------------------------------------------------------------------------------------------------------------
# What a device would wait for


@pytest.mark.parametrize("objective, lm_weight", [("ranked", 0.0), ("ranked", 0.5), ("binary", 0.5), ("imitation", 0.0), ("binarised", 0.5)])
def test_nothing_is_searched_for_between_row_and_loss(tmp_path, objective, lm_weight):
    """On a GPU each of these would make the program wait for the device."""
    model, data = make_model(value_head=objective != "imitation").float(), load(tmp_path, make_comparisons(12))
    model.dtype = torch.float32
    control = tuple(map(BYTES.encode, train_pm.CONTROL)) if objective == "binarised" else ()
    row = make_row(data, range(len(data)), RowFormat(512, BYTES, control=control), predict="best")
    if lm_weight:
        row.token_weight = train_pm.lm_token_weights(row, objective)
    with Operators() as operators:
        train_pm.comparison_loss(model, row, objective, lm_weight)[0].backward()
    assert not operators.names & Operators.WAITING


def test_rows_and_losses_have_no_64_bit_floats(tmp_path):
    """Apple's GPUs have none: a row that is moved there must not hold any, and no operator may make one."""
    model, data = make_model().float(), load(tmp_path, make_comparisons(12))
    model.dtype = torch.float32
    for objective in ("ranked", "binary"):
        row = make_row(data, range(len(data)), FORMAT, predict="best")
        row.token_weight = train_pm.lm_token_weights(row, objective)
        assert not any(v.dtype == torch.float64 for v in vars(row).values() if isinstance(v, torch.Tensor))
        with Operators() as operators:
            train_pm.comparison_loss(model, row, objective, 0.5)[0].backward()
            with torch.no_grad():
                train_pm.pairs_right(model.rewards(model(row.tokens, row.layout, only_ends=True)), row)
        assert not operators.makes_float64


def test_the_ranks_sum_is_taken_on_the_cpu():
    ranks = Ranks(0, 1, torch.device("cpu"))
    assert ranks.sum([1, torch.tensor(2.5), True, torch.tensor(4)]) == [1.0, 2.5, 1.0, 4.0]


@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler on CPUs")
def test_compiled_training_gives_the_same_losses(lm, comparisons_file, tmp_path):
    args = ("--init", lm, "--data", comparisons_file, *GENTLE, "--steps", 2, "--eval_every", 0)
    run_well("train_pm.py", *args, "--out", tmp_path / "plain")
    run_well("train_pm.py", *args, "--out", tmp_path / "compiled", "--compile")
    assert losses(tmp_path / "compiled") == pytest.approx(losses(tmp_path / "plain"), rel=1e-4)
