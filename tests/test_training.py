"""What a training run is: which comparisons it takes, its flags and plan, the curve that it must not leave,
and what its checkpoint remembers."""
import itertools
import re
from argparse import Namespace

import numpy as np
import pytest
import torch
from conftest import (GENTLE, LM_FLAGS, PM_FLAGS, evaluate, load, losses, make_comparisons, make_texts,
                      metrics, read_meta, run_refused, run_well, write_jsonl)

import checkpoint
import plan
import trainer
from data import selection
from data.errors import InputError
from model import GPT, SIZES, Config

# ------------------------------------------------------------------------------------------------------------
# Which comparisons train


def flags(**changes):
    """The flags of train_pm.py that decide which comparisons train, and which of their completions."""
    return Namespace(**{"objective": "ranked", "held_out": 0.3, "pairs": None, "pairs_per_group": "all",
                        "max_completions": None, "seed": 0, **changes})


def split(data, ctx=512, **changes):
    """(set of training comparisons, set of held-out ones, what is said)."""
    train, held_out, notes = selection.split(flags(**changes), data, ctx)
    return set(train.tolist()), set(held_out.tolist()), " ".join(notes)


def test_training_and_held_out_groups_are_apart(tmp_path):
    data = load(tmp_path, make_comparisons())
    train, held_out, said = split(data)
    assert train | held_out == set(np.flatnonzero(data.differ())) and not train & held_out and held_out
    assert not {data.groups[i] for i in train} & {data.groups[i] for i in held_out}
    assert f"{len(data) - len(train | held_out)} whose scores are all equal" in said
    assert split(data, held_out=0.0)[1] == set()


def test_what_cannot_fit_is_left_out_and_counted(tmp_path):
    # (characters of the first completion, score of the second; the first has 1)
    cases = [(5, 0), (90, 0), (97, 0), (99, 0), (99, 1), (9, 1)]
    data = load(tmp_path, [{"context": f"Q{i}", "completions": ["x" * length, "y"], "scores": [1, score]}
                           for i, (length, score) in enumerate(cases)])
    train, held_out, said = split(data, ctx=100)
    assert train | held_out == {0, 1, 2}
    assert "2 comparisons with a completion longer than --ctx 100, 1 whose scores are all equal" in said
    train, held_out, _ = split(data, ctx=100, objective="imitation")
    assert train | held_out == {0, 1, 2}  # of equal ones none is the best
    train, held_out, _ = split(data, ctx=100, objective="binary")
    assert train | held_out == {0, 1, 2, 5}
    with pytest.raises(InputError, match="no comparison to train on is left at --ctx 2"):
        split(data, ctx=2)


def test_a_single_completion_can_be_imitated(tmp_path):
    data = load(tmp_path, [{"context": f"Q{i}", "completions": ["x"], "scores": [1]} for i in range(9)])
    assert len(split(data, objective="imitation", held_out=0.0)[0]) == 9


def test_pairs_takes_that_many_by_seed(tmp_path):
    data = load(tmp_path, make_comparisons())
    train, held_out, _ = split(data)
    some = split(data, pairs=10)
    assert len(some[0]) == 10 and some[0] < train and some[1] == held_out
    assert some == split(data, pairs=10) != split(data, pairs=10, seed=1)
    with pytest.raises(InputError, match=f"only {len(train)} training"):
        split(data, pairs=len(train) + 1)


def test_binary_needs_both_kinds(tmp_path):
    data = load(tmp_path, [{"context": "C", "completions": ["a", "b"], "scores": [1, 2]}])
    with pytest.raises(InputError, match="every completion is good"):
        split(data, objective="binary", held_out=0.0)


@pytest.mark.parametrize("mix", [(), ("--sizes", 70, 10), ("--weights", 1, 3)],
                         ids=["neither", "sizes", "weights"])
def test_sources_are_mixed_by_size_or_weight(lm, comparisons_file, tmp_path, mix):
    other = write_jsonl(tmp_path / "other.jsonl", make_comparisons(40, seed=9))
    printed = run_well("train_pm.py", "--init", lm, "--data", comparisons_file, other, *mix,
                       "--steps", 1, "--batch", 4, "--out", tmp_path / "out")
    n_training = int(re.search(r"(\d+) training comparisons", printed)[1])
    found = re.search(r"mix: (\d+) from .*, (\d+) from ", printed)
    if not mix:
        assert not found
        return
    first, second = map(int, found.groups())
    assert first + second == n_training
    assert (first, second) == (70, 10) if "--sizes" in mix else abs(second - 3 * first) <= 2


# ------------------------------------------------------------------------------------------------------------
# Which completions are laid out


def test_one_pair_of_a_group_is_drawn_anew_each_epoch_and_always_the_same_way():
    scores = np.array([1.0, 0.0, 1.0, 5.0])

    def draw(example=0, seed=3):
        """The pairs of 60 epochs."""
        args = flags(pairs_per_group="1", seed=seed)
        return [tuple(selection.completions_to_keep(scores, args, epoch, example)) for epoch in range(60)]

    assert draw() == draw()
    assert set(draw()) == {(0, 1), (1, 2), (1, 3), (0, 3), (2, 3)}  # all but the pair of equal scores
    assert draw() != draw(example=1) and draw() != draw(seed=4)


def test_otherwise_all_completions_are_laid_out_and_for_imitation_the_best():
    scores, one_pair = np.array([1.0, 0.0, 1.0, 5.0]), {"pairs_per_group": "1"}
    assert selection.completions_to_keep(scores[:2], flags(**one_pair), 0, 0) is None
    assert selection.completions_to_keep(scores, flags(), 0, 0) is None
    assert selection.completions_to_keep(scores, flags(objective="imitation", **one_pair), 0, 0) == [3]


def test_at_most_so_many_completions_are_laid_out():
    scores, args = np.arange(10.0), flags(max_completions=4, seed=3)
    kept = selection.completions_to_keep(scores, args, 0, 5)
    assert len(set(kept)) == 4 and kept == sorted(kept)
    assert kept == selection.completions_to_keep(scores, args, 7, 5)  # the same in each epoch
    assert kept != selection.completions_to_keep(scores, flags(max_completions=4, seed=4), 0, 5)
    assert selection.completions_to_keep(scores[:4], args, 0, 5) is None
    for equal in (np.ones(10), np.zeros(10)):  # for --objective binary
        assert len(selection.completions_to_keep(equal, flags(max_completions=4, objective="binary"), 0, 5)) == 4
    one_is_better = np.array([0.0] * 50 + [1.0])
    for example in range(20):  # something is left to compare
        kept = selection.completions_to_keep(one_is_better, args, 0, example)
        assert set(one_is_better[kept]) == {0.0, 1.0}


def print_row_lengths():
    """In a script's process: print the length of every row that is computed in training."""
    forward = GPT.forward

    def changed(self, tokens, *rest, **named):
        if self.training and torch.is_grad_enabled():
            print(f"rows: {len(tokens)} ", flush=True)
        return forward(self, tokens, *rest, **named)
    GPT.forward = changed


def test_the_longest_comparison_is_named_and_computed_first(lm, tmp_path):
    """So a run that cannot fit in memory fails at once, and not when the comparison's turn comes."""
    answers = [f"answer {i} " * 8 for i in range(60)]
    long = {"context": "Which?", "completions": answers, "scores": list(range(60)), "group": "many"}
    n_tokens = len("Which?") + sum(len(answer) + 1 for answer in answers)
    data = write_jsonl(tmp_path / "data.jsonl", [*itertools.islice(make_comparisons(), 20), long])

    def train(out, *more):
        return run_well("train_pm.py", "--init", lm, "--data", data, "--held_out", 0, "--steps", 1,
                        "--batch", 2, "--micro_tokens", 600, "--out", tmp_path / out, *more,
                        before=print_row_lengths)

    whole = train("whole")
    assert f"longest comparison: {n_tokens:,} tokens, {data}:21;" in whole
    assert re.findall(r"rows: (\d+) ", whole)[0] == str(n_tokens) and losses(tmp_path / "whole")[0] > 0
    cut = train("cut", "--max_completions", 5)
    assert "1 comparisons have more completions than --max_completions 5" in cut
    assert int(re.search(r"longest comparison: ([\d,]+)", cut)[1].replace(",", "")) < 600
    assert f"rows: {n_tokens} " not in cut


# ------------------------------------------------------------------------------------------------------------
# Rates and defaults


def rates(schedule, warmup, n_steps=100):
    args = Namespace(schedule=schedule, warmup=warmup)
    return [trainer.learning_rate(args, 2.0, step, n_steps) for step in range(n_steps)]


def test_rates_rise_in_the_warm_up_and_then_follow_their_schedule():
    assert rates("constant", 0) == [2.0] * 100
    assert rates("linear", 0) == pytest.approx([2 * (1 - step / 100) for step in range(100)])
    cosine = rates("cosine", 0)
    assert cosine[0] == 2.0 and cosine[50] == pytest.approx(1.1)
    assert cosine[-1] == pytest.approx(0.2, abs=0.001) and cosine == sorted(cosine, reverse=True)
    for schedule in ("constant", "linear", "cosine"):
        warm = rates(schedule, 0.1)
        assert 0 < warm[0] < 0.2 and np.allclose(np.diff(warm[:10]), 2 / 11)
        assert warm[10] == max(warm) == 2.0
    assert rates("linear", 1.0)[-1] < 2.0


def test_rates_and_batches_are_multiples_of_the_language_models(lm, comparisons_file, tmp_path):
    """Small models get 0.1 times that rate in each stage. A small data set gets small batches, so that there
    are enough steps."""
    lm_rate = read_meta(lm)["lm_lr"]
    assert lm_rate == pytest.approx(3e-3 * (128 / SIZES["test"][1]) ** 0.5)
    args = ("--data", comparisons_file, "--steps", 1)
    for stage in ("finetune", "pmp"):
        out = tmp_path / stage
        printed = run_well("train_pm.py", "--init", lm, *args, "--stage", stage, "--out", out)
        assert metrics(out)[0]["lr"] == pytest.approx(0.1 * lm_rate) and "a step: 8 comparisons" in printed
    again = tmp_path / "after pmp"  # the rate goes by the language model that all began with
    run_well("train_pm.py", "--init", tmp_path / "pmp", *args, "--out", again)
    assert metrics(again)[0]["lr"] == pytest.approx(0.1 * lm_rate)


@pytest.mark.parametrize("size, scale, expected", [
    ("13m", 0.01, 0.1), ("42m", 0.05, 0.1), ("197m", 0.01, 0.01), ("810m", 0.05, 0.05), ("52b", 0.1, 0.1)])
def test_large_models_get_the_papers_rates(size, scale, expected):
    with torch.device("meta"):
        model = GPT(Config(*SIZES[size], vocab_size=64, ctx=8))
    assert plan.stage_rate(model, 2.0, scale) == pytest.approx(2.0 * expected)


def test_where_no_data_is_named_it_is_the_toy_world(tmp_path):
    """Each script with its defaults but for size and length."""
    short = ("--steps", 1, "--dtype", "fp32")
    tiny = ("--size", "test", "--tokenizer", "bytes")
    assert "training tokens" in run_well("train_lm.py", *tiny, *short, "--out", tmp_path / "lm")
    printed = run_well("train_pm.py", "--init", tmp_path / "lm", *short, "--out", tmp_path / "pm")
    assert "ranked.jsonl: 8,000 comparisons" in printed and "a step: 32 comparisons" in printed
    figures, _ = evaluate("pm", "--model", tmp_path / "pm")
    assert 400 < figures["n"] < 1600
    assert all(0.4 < figures[ruler] < 0.6 for ruler in ("longer_wins", "shorter_wins"))


@pytest.mark.parametrize("more, words", [
    (("--sizes", "5"), "--sizes needs one number for each of the 2 --data, found 1"),
    (("--sizes", "5", "5", "--pairs", "3"), "give one of --sizes, --weights and --pairs"),
    (("--binarise", "--objective", "imitation"), "--binarise is for --objective ranked"),
    (("--pairs_per_group", "1", "--objective", "binary"), "--pairs_per_group is for --objective ranked"),
    (("--init", "out/lm", "--size", "test"), "--size is for a fresh model, and --init brings its own"),
    (("--init", "out/lm", "--tokenizer", "bytes"), "--tokenizer is for a fresh model"),
    (("--no_eoc", "--objective", "imitation"), "--no_eoc and --lm_weight are for preference models")])
def test_flags_that_do_not_go_together_are_refused(comparisons_file, tmp_path, more, words):
    assert words in run_refused(
        "train_pm.py", "--data", comparisons_file, comparisons_file, "--out", tmp_path / "out", *more)


def test_a_file_of_ties_is_refused_with_the_reason(tmp_path):
    ties = write_jsonl(tmp_path / "ties.jsonl", [
        {"context": f"Q{i}", "completions": ["a", "b"], "scores": [1, 1]} for i in range(5)])
    line = run_refused("train_pm.py", "--data", ties, "--size", "test", "--out", tmp_path / "out")
    assert "no comparison to train on is left" in line and "5 whose scores are all equal" in line


def test_with_nothing_to_go_on_with_a_run_begins_and_says_so(comparisons_file, tmp_path):
    printed = run_well("train_pm.py", "--data", comparisons_file, "--size", "test", "--steps", 1, "--held_out", 0,
                       "--out", tmp_path / "new", "--resume")
    assert f"note: {tmp_path / 'new'} holds no run to go on with, so this one begins" in printed
    assert "held out:" not in printed  # nothing is


# ------------------------------------------------------------------------------------------------------------
# Plan, curve and evaluations


def test_the_plan_comes_first(pm, lm, comparisons_file, tmp_path):
    """It names all flags, but not those that the checkpoint decides."""
    out = tmp_path / "run"
    printed = run_well("train_pm.py", "--init", lm, "--data", comparisons_file, *PM_FLAGS, "--out", out)
    before, _ = printed.split("step 1/8", 1)
    for words in ("--lr 0.003", "model: 2 layers x 64, 2 heads, ctx 192", "8 steps", "training comparisons",
                  "attention by tiles", "GiB a rank", f"output: {out}"):
        assert words in before
    assert re.search(rf"longest comparison: [\d,]+ tokens, {re.escape(str(comparisons_file))}:", before)
    named = re.search("flags: (.*)", before)[1]
    assert "--init" in named and "--size" not in named and "--tokenizer" not in named
    assert losses(out) == losses(pm)


def test_golden_losses_of_the_language_model(lm):
    assert losses(lm) == pytest.approx(GOLDEN_LM, rel=1e-4)


@pytest.mark.parametrize("objective", ["ranked", "binary", "imitation"])
def test_golden_losses_of_the_preference_model(comparisons_file, tmp_path, objective):
    run_well("train_pm.py", "--size", "test", "--data", comparisons_file, "--ctx", 256, *GENTLE,
             "--objective", objective, "--out", tmp_path / "pm")
    assert losses(tmp_path / "pm") == pytest.approx(GOLDEN_PM[objective], rel=1e-4)


# A change that is not about computation leaves the curve as it is. Whoever changes the computation, and means
# to, writes the new numbers here.
GOLDEN_LM = [6.10013, 4.92501, 4.48040, 4.08715, 3.76540, 3.45911, 3.15876, 3.04919, 2.92241, 2.85634]
GOLDEN_PM = {"ranked": [0.661266, 0.648213, 0.590487, 0.579735, 0.416318],
             "binary": [1.37096, 0.637550, 0.417581, 0.609270, 0.581043],
             "imitation": [6.15184, 5.86972, 5.66314, 5.44318, 5.22442]}


def test_training_lowers_the_loss(pm, lm):
    assert losses(lm)[-1] < 0.8 * losses(lm)[0]
    assert np.mean(losses(pm)[-4:]) < 0.9 * losses(pm)[0]


def test_evaluations_of_a_short_run_cost_little(tmp_path):
    """All of a run's evaluations together read at most 0.6 times the tokens that it trains on, each at a
    third of the cost."""
    data = write_jsonl(tmp_path / "text.jsonl", make_texts(400))
    out = tmp_path / "lm"
    run_well("train_lm.py", "--data", data, *LM_FLAGS, "--steps", 20, "--held_out", 0.5, "--out", out)
    evaluations = [record["eval"]["tokens"] for record in metrics(out) if "eval" in record]
    trained_on = sum(record["count"] for record in metrics(out) if "count" in record)
    assert len(evaluations) == 10 and 0 < sum(evaluations) <= 0.6 * trained_on


def test_a_run_without_evaluations_has_no_figures(lm, comparisons_file, tmp_path):
    printed = run_well("train_pm.py", "--init", lm, "--data", comparisons_file, *PM_FLAGS, "--steps", 2,
                       "--eval_every", 0, "--out", tmp_path / "pm")
    assert "held out:" not in printed and read_meta(tmp_path / "pm")["metrics"] == {}


# ------------------------------------------------------------------------------------------------------------
# What a checkpoint remembers


def test_only_a_preference_model_has_a_head(pm, lm, comparisons_file, tmp_path):
    out = tmp_path / "imitation"
    run_well("train_pm.py", "--init", pm, "--data", comparisons_file, "--objective", "imitation", *PM_FLAGS,
             "--out", out)
    expected = {lm: (False, "lm", "lm"), pm: (True, "pm", "ranked"), out: (False, "lm", "imitation")}
    for folder, (has_head, kind, objective) in expected.items():
        model, _, meta = checkpoint.load(folder)
        assert (model.config.value_head, meta["kind"], meta["objective"]) == (has_head, kind, objective)
        assert ("score.weight" in dict(model.named_parameters())) == has_head


def test_a_checkpoint_remembers_all_data_it_saw(pm, text_file, comparisons_file):
    held_out = {entry["file"]: entry["held_out"] for entry in read_meta(pm)["trained_on"]}
    assert held_out == {str(comparisons_file): 0.3, str(text_file): 0.1}


def test_train_state_is_nothing_but_tensors_and_numbers(pm):
    state = torch.load(pm / "train_state.pt", weights_only=True)
    assert set(state) == {"optimizer", "step"} and state["step"] == 8
    n_averages = sum(moments["exp_avg"].numel() for moments in state["optimizer"]["state"].values())
    assert n_averages == sum(p.numel() for p in checkpoint.load(pm)[0].parameters())


def test_finetuning_after_binarised_pre_training_is_evaluated_as_trained(lm, comparisons_file, tmp_path):
    """From the checkpoint an evaluation knows that this model reads its rewards without <eoc>."""
    pmp, pm = tmp_path / "pmp", tmp_path / "pm"
    args = ("--data", comparisons_file, "--steps", 3, "--batch", 8, "--dtype", "fp32")
    run_well("train_pm.py", "--init", lm, *args, "--stage", "pmp", "--binarise", "--out", pmp)
    run_well("train_pm.py", "--init", pmp, *args, "--no_eoc", "--out", pm)
    assert metrics(pmp)[0]["lr"] == metrics(pm)[0]["lr"]
    assert 0 <= read_meta(pmp)["metrics"]["accuracy"] <= 1
    assert (read_meta(pmp)["eoc"], read_meta(pm)["eoc"]) == (True, False)
    figures, _ = evaluate("pm", "--model", pm, "--data", comparisons_file)
    assert figures["accuracy"] == pytest.approx(read_meta(pm)["metrics"]["accuracy"], abs=1e-6)
