"""The losses: their values against plain formulas, equal results however a step is cut up or shared, and
what a device would have to wait for."""
import functools
import math
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import (BYTES, GENTLE, GENTLE_LM, LM_FLAGS, ROOT, Operators, alone, load, losses,
                      make_comparisons, make_model, metrics, rankable_comparisons, run_ranks, run_well,
                      slow, write_jsonl)

import checkpoint
import train_pm
from data.packing import RowFormat, balance, make_row, pack, packed_lengths
from ranks import Ranks

FORMAT = RowFormat(512, BYTES)
BINARISED = RowFormat(512, BYTES, control=tuple(map(BYTES.encode, train_pm.CONTROL)))

RECORDS = [{"context": "Which?", "completions": ["one", "the second", "3"], "scores": [0, 2, 1]},
           {"context": "", "completions": ["yes", "no"], "scores": [-1, 1]}]
BEST = ["the second", "no"]  # completion of each record
PAIRS = [[(1, 0), (1, 2), (2, 0)], [(1, 0)]]  # (better, worse) completions of each record


def byte_model(**changes):
    return make_model(vocab_size=BYTES.vocab_size, ctx=512, **changes)


def row_of(data, examples=None, row_format=FORMAT):
    """All comparisons of a data set in one row, or those of these numbers."""
    examples = range(len(data)) if examples is None else examples
    return make_row(data, np.asarray(examples), row_format, predict="best")


def rewards_alone(model, mark=""):
    """For each record the rewards of its completions, each by a forward pass of its own. `mark` stands before
    each completion."""
    return [[alone(model, BYTES, record["context"], mark + text)[0] for text in record["completions"]]
            for record in RECORDS]


def log_probs_alone(model):
    """For each record the log-probs of its best completion's tokens and <eoc>, by a pass of its own."""
    return [alone(model, BYTES, record["context"], best)[1] for record, best in zip(RECORDS, BEST)]


def softplus(x):
    return math.log1p(math.exp(x))


# ------------------------------------------------------------------------------------------------------------
# Values


def test_ranked_and_binary_loss_are_the_formulas():
    better, worse = torch.tensor([[0.0, 2.0, -1.0, -1000.0, 1000.0], [0.0, 0.5, 1.0, 1000.0, -1000.0]])
    expected = torch.tensor([math.log(2), softplus(-1.5), softplus(2.0), 2000.0, 0.0])
    assert torch.allclose(train_pm.ranked_loss(better, worse), expected)
    rewards, is_good = torch.tensor([0.0, 3.0, 3.0, -800.0]), torch.tensor([True, True, False, True])
    expected = torch.tensor([math.log(2), softplus(-3), softplus(3), 800.0])
    assert torch.allclose(train_pm.binary_loss(rewards, is_good), expected)


def test_ranked_loss_of_a_row_equals_the_one_by_hand(tmp_path):
    model, row = byte_model(value_head=True), row_of(load(tmp_path, RECORDS))
    total, count, figures = train_pm.comparison_loss(model, row, "ranked")
    (a, b, c), (yes, no) = rewards_alone(model)
    by_hand = (softplus(a - b) + softplus(a - c) + softplus(c - b)) / 3 + softplus(yes - no)
    assert (total.item(), count) == (pytest.approx(by_hand, abs=1e-6), 2)
    assert figures["accuracy"] == pytest.approx(((b > a) + (c > a) + (b > c)) / 3 + (no > yes))


def test_a_tie_counts_half(tmp_path):
    model, row = byte_model(value_head=True), row_of(load(tmp_path, RECORDS))
    torch.nn.init.zeros_(model.score.weight)
    total, count, figures = train_pm.comparison_loss(model, row, "ranked")
    assert (total.item(), count, figures["accuracy"]) == pytest.approx((2 * math.log(2), 2, 1.0))


def test_binary_loss_of_a_row_equals_the_one_by_hand(tmp_path):
    model, row = byte_model(value_head=True), row_of(load(tmp_path, RECORDS))
    total, count, figures = train_pm.comparison_loss(model, row, "binary")
    rewards = [reward for rewards in rewards_alone(model) for reward in rewards]
    is_good = [False, True, True, False, True]
    by_hand = sum(softplus(-reward if good else reward) for reward, good in zip(rewards, is_good))
    assert (total.item(), count) == (pytest.approx(by_hand, abs=1e-6), 5)
    assert figures["label_accuracy"] == sum((reward > 0) == good for reward, good in zip(rewards, is_good))


def test_imitation_is_cross_entropy_of_the_best_completion_and_its_end(tmp_path):
    model, row = byte_model(), row_of(load(tmp_path, RECORDS))
    total, count, figures = train_pm.comparison_loss(model, row, "imitation")
    by_hand = np.concatenate(log_probs_alone(model))
    assert count == len(by_hand) == sum(len(text) + 1 for text in BEST)
    assert total.item() == pytest.approx(-by_hand.sum(), abs=1e-9) and figures == {}


def test_binarised_is_two_pairs_for_each_ranked_one(tmp_path):
    """GOOD:A > BAD:A and BAD:B > GOOD:B, each sequence by a forward pass of its own."""
    model, data = byte_model(value_head=True), load(tmp_path, RECORDS)
    row = row_of(data, row_format=BINARISED)
    assert len(row.tokens) == sum(packed_lengths(data, range(len(data)), BINARISED))
    total, count, figures = train_pm.comparison_loss(model, row, "binarised")
    loss_by_hand = right_by_hand = 0.0
    for good, bad, pairs in zip(*(rewards_alone(model, mark) for mark in train_pm.CONTROL), PAIRS):
        margins = np.array([(good[better] - bad[better], bad[worse] - good[worse])
                            for better, worse in pairs])
        loss_by_hand += np.log1p(np.exp(-margins)).mean()
        right_by_hand += (margins > 0).mean()
    assert count == len(RECORDS) and total.item() == pytest.approx(loss_by_hand, abs=1e-6)
    assert figures["accuracy"].item() == pytest.approx(right_by_hand)


def test_without_eoc_the_reward_is_read_at_the_last_token(tmp_path):
    """Only an empty completion has no such token and keeps its <eoc>."""
    records = [*RECORDS, {"context": "Why?", "completions": ["", "so"], "scores": [0, 1]}]
    model, data = byte_model(value_head=True), load(tmp_path, records)
    row_format = RowFormat(512, BYTES, eoc=False)
    row = row_of(data, row_format=row_format)
    assert len(row.tokens) == sum(packed_lengths(data, range(len(data)), row_format))
    rewards = model.rewards(model(row.tokens, row.layout, only_ends=True))
    texts = [(record["context"], text) for record in records for text in record["completions"]]
    for reward, (context, completion) in zip(rewards.tolist(), texts, strict=True):
        before = BYTES.encode(context).tolist() or [BYTES.eot]
        after = BYTES.encode(completion).tolist() or [BYTES.eoc]
        hidden = model(torch.tensor([before + after]))
        assert reward == pytest.approx(model.rewards(hidden[0, -1]).item(), abs=1e-9)


@pytest.mark.parametrize("objective", ["ranked", "binary"])
def test_the_lm_term_is_the_mean_loss_of_each_best_completion(tmp_path, objective):
    """A binary loss is divided by the number of completions, so a comparison's LM loss counts so many
    times."""
    model, row = byte_model(value_head=True), row_of(load(tmp_path, RECORDS))
    row.token_weight = train_pm.lm_token_weights(row, objective)
    plain, with_lm = (train_pm.comparison_loss(model, row, objective, weight) for weight in (0.0, 0.7))
    times = [3, 2] if objective == "binary" else [1, 1]
    by_hand = -sum(n * np.mean(log_p) for n, log_p in zip(times, log_probs_alone(model)))
    assert (with_lm[0] - plain[0]).item() == pytest.approx(0.7 * by_hand, abs=1e-6)
    assert with_lm[1:] == plain[1:]


# ------------------------------------------------------------------------------------------------------------
# A step is the same however it is cut up


def gradient(model, data, objective, lm_weight, micro_tokens, n_ranks):
    """(loss, gradients) of one step over all of `data`, in micro-batches and by each of n ranks in turn."""
    lengths, total, count = packed_lengths(data, range(len(data)), FORMAT), 0.0, 0
    model.zero_grad()
    for mine in balance(lengths, n_ranks):
        for numbers in pack([lengths[i] for i in mine], micro_tokens):
            row = row_of(data, [mine[j] for j in numbers])
            if lm_weight:
                row.token_weight = train_pm.lm_token_weights(row, objective)
            batch_sum, batch_count, _ = train_pm.comparison_loss(model, row, objective, lm_weight)
            batch_sum.backward()
            total, count = total + batch_sum.item(), count + batch_count
    return total / count, [p.grad / count for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize("objective, lm_weight", [("ranked", 0.0), ("ranked", 0.5), ("binary", 0.0),
                                                  ("imitation", 0.0)])
def test_a_step_in_micro_batches_and_ranks_is_exact_in_fp64(tmp_path, objective, lm_weight):
    model, data = byte_model(value_head=objective != "imitation"), load(tmp_path, make_comparisons(16))
    loss, grads = gradient(model, data, objective, lm_weight, 10**6, 1)
    for micro_tokens, n_ranks in ((1, 1), (500, 1), (10**6, 2), (700, 3), (1, 20)):
        other_loss, other_grads = gradient(model, data, objective, lm_weight, micro_tokens, n_ranks)
        assert other_loss == pytest.approx(loss, rel=1e-12)
        for a, b in zip(grads, other_grads, strict=True):
            assert (a - b).abs().max() < 1e-12 * max(1, a.abs().max())


def assert_same_to_rounding(a, b, init):
    """Two runs' figures agree to fp32's precision, and so do the ways that their weights went from those of
    `init`."""
    for x, y in zip(metrics(a), metrics(b), strict=True):
        assert x.pop("eval", {}) == pytest.approx(y.pop("eval", {}), rel=1e-4)
        assert x == pytest.approx(y, rel=1e-4)
    a, b, init = (dict(checkpoint.load(out)[0].named_parameters()) for out in (a, b, init))
    for name in set(a) & set(init):
        assert (a[name] - b[name]).norm() < 0.02 * (a[name] - init[name]).norm()


OBJECTIVES = {"ranked": (), "one pair and lm": ("--pairs_per_group", 1, "--lm_weight", 0.3),
              "binary": ("--objective", "binary"), "imitation": ("--objective", "imitation")}


@pytest.mark.parametrize("flags", OBJECTIVES.values(), ids=OBJECTIVES)
def test_pm_training_is_the_same_in_micro_batches(lm, comparisons_file, tmp_path, flags):
    for name, micro_tokens in (("whole", 100_000), ("cut", 150)):
        run_well("train_pm.py", "--init", lm, "--data", comparisons_file, *GENTLE, *flags,
                 "--out", tmp_path / name, "--micro_tokens", micro_tokens)
    assert_same_to_rounding(tmp_path / "whole", tmp_path / "cut", lm)


@pytest.fixture(scope="module")
def more_lm(lm, text_file, tmp_path_factory):
    """A run that goes on from `lm` with small steps."""
    out = tmp_path_factory.mktemp("more") / "lm"
    run_well("train_lm.py", "--init", lm, "--data", text_file, *GENTLE_LM, "--out", out)
    return out


def test_lm_training_is_the_same_in_micro_batches(lm, more_lm, text_file, tmp_path):
    run_well("train_lm.py", "--init", lm, "--data", text_file, *GENTLE_LM, "--micro_tokens", 1,
             "--out", tmp_path / "cut")
    assert_same_to_rounding(more_lm, tmp_path / "cut", lm)


@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler on CPUs")
def compile_without_kernels():
    """torch.compile with all that it does but writing C++, which takes twenty seconds."""
    torch.compile = functools.partial(torch.compile, backend="aot_eager")


@pytest.mark.parametrize("before", [compile_without_kernels, pytest.param(None, marks=slow)],
                         ids=["without kernels", "with kernels"])
def test_compiled_training_gives_the_same_losses(lm, comparisons_file, tmp_path, before):
    args = ("--init", lm, "--data", comparisons_file, *GENTLE, "--steps", 2, "--eval_every", 0)
    run_well("train_pm.py", *args, "--out", tmp_path / "plain")
    run_well("train_pm.py", *args, "--out", tmp_path / "compiled", "--compile", before=before)
    assert losses(tmp_path / "compiled") == pytest.approx(losses(tmp_path / "plain"), rel=1e-4)


# ------------------------------------------------------------------------------------------------------------
# Ranks


@pytest.mark.parametrize("batch, epochs, counts", [(4, 2, [4, 4, 1] * 2), (1, 1, [1] * 9)],
                         ids=["one left over", "fewer than ranks"])
def test_two_ranks_train_the_same_pm_as_one(lm, tmp_path, batch, epochs, counts):
    """Nine comparisons. With a batch of 4 an epoch's last step has one, so that a rank has none."""
    data = write_jsonl(tmp_path / "nine.jsonl", rankable_comparisons(9))
    args = ("--init", lm, "--data", data, "--held_out", 0, "--dtype", "fp32", "--lr", 3e-4, "--batch", batch,
            "--epochs", epochs)
    run_well("train_pm.py", *args, "--out", tmp_path / "one")
    assert "2 x cpu" in run_ranks("train_pm.py", *args, "--out", tmp_path / "two")
    assert [record["count"] for record in metrics(tmp_path / "one") if "count" in record] == counts
    assert_same_to_rounding(tmp_path / "one", tmp_path / "two", lm)


@pytest.mark.parametrize("objective", ["ranked", "imitation"])
def test_two_ranks_evaluate_as_one_does(lm, comparisons_file, tmp_path, objective):
    args = ("--init", lm, "--data", comparisons_file, *GENTLE, "--steps", 2, "--objective", objective)
    run_well("train_pm.py", *args, "--out", tmp_path / "one")
    run_ranks("train_pm.py", *args, "--out", tmp_path / "two")
    evaluations = [record["eval"] for record in metrics(tmp_path / "one") if "eval" in record]
    assert [set(figures) for figures in evaluations] == [{"loss", "accuracy", "comparisons"}] * 2
    assert_same_to_rounding(tmp_path / "one", tmp_path / "two", lm)


def test_a_rank_may_have_nothing_to_evaluate(tmp_path):
    """The held-out text is one window for two ranks."""
    data = write_jsonl(tmp_path / "text.jsonl", [{"text": "abcdefgh" * 300}])
    args = ("--data", data, *LM_FLAGS, "--steps", 2)
    run_well("train_lm.py", *args, "--out", tmp_path / "one")
    run_ranks("train_lm.py", *args, "--out", tmp_path / "two")
    one, two = (metrics(tmp_path / name)[-1]["eval"] for name in ("one", "two"))
    assert one == pytest.approx(two, rel=1e-3) and one["tokens"] == 192


def test_torchrun_trains_the_same_lm_as_one_process(lm, more_lm, text_file, tmp_path):
    torchrun = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", 2)
    flags = ("--init", lm, "--data", text_file, *GENTLE_LM, "--out", tmp_path / "two")
    done = subprocess.run(list(map(str, (*torchrun, "train_lm.py", *flags))), cwd=ROOT, capture_output=True,
                          text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    assert_same_to_rounding(more_lm, tmp_path / "two", lm)


def test_a_sum_over_ranks_takes_numbers_and_scalar_tensors():
    ranks = Ranks(0, 1, torch.device("cpu"))
    assert ranks.sum([1, torch.tensor(2.5), True, torch.tensor(4)]) == [1.0, 2.5, 1.0, 4.0]


# ------------------------------------------------------------------------------------------------------------
# What a device would wait for, or does not have


@pytest.mark.parametrize("objective, lm_weight", [("ranked", 0.0), ("ranked", 0.5), ("binary", 0.5),
                                                  ("imitation", 0.0), ("binarised", 0.5)])
def test_nothing_is_searched_for_between_row_and_loss(tmp_path, objective, lm_weight):
    """On a GPU each such operator would make the program wait for the device."""
    model = byte_model(value_head=objective != "imitation").float()
    model.dtype = torch.float32
    row_format = BINARISED if objective == "binarised" else FORMAT
    row = row_of(load(tmp_path, make_comparisons(12)), row_format=row_format)
    if lm_weight:
        row.token_weight = train_pm.lm_token_weights(row, objective)
    with Operators() as operators:
        train_pm.comparison_loss(model, row, objective, lm_weight)[0].backward()
    assert operators.calls and not operators.waiting()


@pytest.mark.parametrize("objective", ["ranked", "binary"])
def test_rows_and_losses_have_no_64_bit_floats(tmp_path, objective):
    """Apple's GPUs have none: a row that is moved there must not hold any, and no operator may make one."""
    model, row = byte_model(value_head=True).float(), row_of(load(tmp_path, make_comparisons(12)))
    model.dtype = torch.float32
    row.token_weight = train_pm.lm_token_weights(row, objective)
    tensors = [value for value in vars(row).values() if isinstance(value, torch.Tensor)]
    assert tensors and not any(tensor.dtype == torch.float64 for tensor in tensors)
    with Operators() as operators:
        train_pm.comparison_loss(model, row, objective, 0.5)[0].backward()
        with torch.no_grad():
            train_pm.pairs_right(model.rewards(model(row.tokens, row.layout, only_ends=True)), row)
    assert operators.calls and not operators.making_float64()
