"""evaluate.py pm: each figure against one computed by hand, and which comparisons are scored."""
import gzip
import json
import math
import shutil

import numpy as np
import pytest
import torch
from conftest import PM_FLAGS, alone, make_comparisons, metrics, run, run_well, write_jsonl

import checkpoint
from data.comparisons import load_comparisons
from data.tokenizer import get_tokenizer
from evals import pm as figures

BYTES = get_tokenizer("bytes")


# ---------------------------------------------------------------------------------------------------------------------
# The figures


def test_margins_are_those_of_all_pairs_with_different_scores():
    truths = [np.array([1.0, 3.0, 2.0]), np.array([0.0, 0.0]), np.array([1.0, 0.0])]
    scores = [np.array([10.0, 40.0, 70.0]), np.array([1.0, 2.0]), np.array([5.0, 5.0])]
    margin, weight, comparison = figures.margins(truths, scores)
    found = sorted(zip(margin.tolist(), weight.tolist(), comparison.tolist()))
    assert found == [(-30.0, 1 / 3, 0), (0.0, 1.0, 2), (30.0, 1 / 3, 0), (60.0, 1 / 3, 0)]
    assert figures.right(np.array([-0.1, 0.0, 2.0])).tolist() == [0, 0.5, 1]
    assert [len(x) for x in figures.margins([], [])] == [0, 0, 0]


def clustered(seed, n=400, n_groups=60):
    """Accuracies that hang together within groups, with unequal weights."""
    rng = np.random.default_rng(seed)
    groups = rng.integers(0, n_groups, n) * 7919
    ease = {g: rng.uniform(0.2, 1) for g in np.unique(groups)}
    return (rng.random(n) < [ease[g] for g in groups]).astype(float), rng.choice([1 / 3, 1 / 2, 1.0], n), groups


def test_standard_error_is_by_group():
    values, weights, groups = clustered(0)
    mean, error = figures.mean_and_error(values, weights, groups)
    total = sum(w for w in weights)
    by_hand = sum(w * v for v, w in zip(values, weights)) / total
    names = sorted(set(groups.tolist()))
    squares = [sum(w * (v - by_hand) for v, w, g in zip(values, weights, groups) if g == name) ** 2 for name in names]
    assert mean == pytest.approx(by_hand)
    assert error == pytest.approx(math.sqrt(len(names) / (len(names) - 1) * sum(squares)) / total)


def test_standard_error_agrees_with_the_bootstrap_over_groups():
    values, weights, groups = clustered(1)
    _, error = figures.mean_and_error(values, weights, groups)
    members = [np.flatnonzero(groups == g) for g in np.unique(groups)]
    rng, means = np.random.default_rng(0), []
    for _ in range(1000):
        drawn = np.concatenate([members[i] for i in rng.integers(0, len(members), len(members))])
        means.append(np.average(values[drawn], weights=weights[drawn]))
    assert error == pytest.approx(np.std(means), rel=0.12)
    ungrouped = figures.mean_and_error(values, weights, np.arange(len(values)))[1]
    assert ungrouped < 0.9 * error  # what taking pairs for independent would claim


def test_standard_error_of_equal_groups_is_the_plain_one_of_their_means():
    values, groups = np.array([1, 1, 0, 1, 0, 0, 1, 0.5]), np.repeat([5, 3, 9, 1], 2)
    mean, error = figures.mean_and_error(values, np.ones(8), groups)
    means = values.reshape(4, 2).mean(1)
    assert (mean, error) == pytest.approx((means.mean(), means.std(ddof=1) / 2))
    assert math.isnan(figures.mean_and_error(values, np.ones(8), np.zeros(8))[1])


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def test_calibration_by_hand():
    margin, weight = np.array([0.1, -0.15, 3.0, -3.2, 0.0, 800.0]), np.array([1, 0.5, 1, 1, 0.25, 1])
    p = [sigmoid(m) for m in margin[:5]] + [1.0]
    brier, error, table = figures.calibration(margin, weight)
    assert brier == pytest.approx(sum(w * (1 - x) ** 2 for w, x in zip(weight, p)) / 4.75)
    # The small ones and the tie lie in the first bin, the others in the last.
    mean_low = (sigmoid(0.1) + 0.5 * sigmoid(0.15) + 0.25 * 0.5) / 1.75
    mean_high = (sigmoid(3.0) + sigmoid(3.2) + 1) / 3
    right_low, right_high = (1 + 0.125) / 1.75, 2 / 3  # a tie is half right
    assert table == [(0.5, 0.55, 3, pytest.approx(mean_low), pytest.approx(right_low)),
                     (0.95, 1.0, 3, pytest.approx(mean_high), pytest.approx(right_high))]
    assert error == pytest.approx((1.75 * abs(mean_low - right_low) + 3 * abs(mean_high - right_high)) / 4.75)


def test_a_calibrated_model_has_no_calibration_error_and_a_sure_one_has():
    rng = np.random.default_rng(0)
    reward = rng.normal(0, 2, 40_000)
    margin = np.where(rng.random(len(reward)) < 1 / (1 + np.exp(-reward)), reward, -reward)
    assert figures.calibration(margin, np.ones(len(margin)))[1] < 0.01
    brier, error, _ = figures.calibration(10 * margin, np.ones(len(margin)))
    assert error > 0.1 and brier > figures.calibration(margin, np.ones(len(margin)))[0]
    assert figures.calibration(np.zeros(10), np.ones(10))[:2] == (0.25, 0)


def test_accuracy_by_margin_goes_from_the_smallest_quarter_to_the_largest():
    margin, weight = np.array([-1.0, 5, 2, -3, 4, 0, 7, 8, -0.5]), np.array([1, 1, 1, 1, 1, 1, 1, 3, 1.0])
    assert figures.by_margin(margin, weight) == [(0, 1, 3, pytest.approx(0.5 / 3)), (2, 3, 2, 0.5), (4, 5, 2, 1), (7, 8, 2, 1)]
    assert figures.by_margin(np.array([2.0, -1.0]), np.ones(2)) == [(1, 1, 1, 0), (2, 2, 1, 1)]


# ---------------------------------------------------------------------------------------------------------------------
# The script


def evaluate(*flags):
    """(figures of the last line, all that was printed)"""
    printed = run_well("evaluate.py", "pm", *flags, "--dtype", "fp32")
    return json.loads(printed.splitlines()[-1], parse_constant=pytest.fail), printed


def held_out_lines(file, fraction):
    """Numbers of the lines of held-out comparisons with something to rank, and of all that have."""
    data = load_comparisons([file], BYTES, quiet=True)
    numbers = [int(line) for line in data.lines[:, 1]]
    return ({n for n, held, differs in zip(numbers, data.held_out(fraction), data.differ()) if held and differs},
            {n for n, differs in zip(numbers, data.differ()) if differs})


def scored(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def lines_of(path):
    return {int(record["where"].rsplit(":", 1)[1]) for record in scored(path)}


def test_a_file_trained_on_is_evaluated_on_its_held_out_groups(pm, comparisons_file, tmp_path):
    held_out, everything = held_out_lines(comparisons_file, 0.3)
    result, printed = evaluate("--model", pm, "--data", comparisons_file, "--out", tmp_path / "a.jsonl")
    assert f"{comparisons_file}: held-out groups only, as {pm} was trained on the others" in printed
    assert lines_of(tmp_path / "a.jsonl") == held_out and 0 < result["n"] == len(held_out) < len(everything)
    last = [r["eval"] for r in metrics(pm) if "eval" in r][-1]
    assert (result["accuracy"], result["n"]) == (pytest.approx(last["accuracy"]), last["comparisons"])
    assert result == evaluate("--model", pm, "--data", comparisons_file, "--split", "held_out")[0]


def test_a_copy_of_the_file_is_known_by_its_content(pm, comparisons_file, tmp_path):
    copy = tmp_path / "copy.jsonl"
    shutil.copy(comparisons_file, copy)
    result, printed = evaluate("--model", pm, "--data", copy)
    assert "held-out groups only" in printed and result["n"] == len(held_out_lines(comparisons_file, 0.3)[0])


def test_split_all_means_it(pm, comparisons_file, tmp_path):
    _, printed = evaluate("--model", pm, "--data", comparisons_file, "--split", "all", "--out", tmp_path / "a.jsonl")
    assert f"{comparisons_file}: all groups (the model was trained on some of them)" in printed
    assert lines_of(tmp_path / "a.jsonl") == held_out_lines(comparisons_file, 0.3)[1]


def test_other_files_are_evaluated_whole_beside_those_trained_on(pm, comparisons_file, tmp_path):
    other = write_jsonl(tmp_path / "other.jsonl", make_comparisons(30, seed=1))
    held_out, whole = held_out_lines(comparisons_file, 0.3)[0], held_out_lines(other, 0.3)[1]
    alone_, printed = evaluate("--model", pm, "--data", other)
    assert f"{other}: all groups\n" in printed and alone_["n"] == len(whole)
    both, printed = evaluate("--model", pm, "--data", comparisons_file, other, "--out", tmp_path / "a.jsonl")
    assert "held-out groups only" in printed and f"{other}: all groups\n" in printed
    assert {tuple(r["where"].rsplit(":", 1)) for r in scored(tmp_path / "a.jsonl")} == {
        *((str(comparisons_file), str(n)) for n in held_out), *((str(other), str(n)) for n in whole)}
    refused = run("evaluate.py", "pm", "--model", pm, "--data", other, "--split", "held_out")
    assert refused.returncode == 2 and f"error: {other}: the model was not trained on this file" in refused.stderr


def test_nothing_held_out_is_nothing_to_evaluate_on(lm, comparisons_file, tmp_path):
    flags = ("--init", lm, "--data", comparisons_file, *PM_FLAGS, "--steps", 1, "--held_out", 0)
    run_well("train_pm.py", *flags, "--out", tmp_path / "pm")
    for more in ((), ("--split", "held_out")):
        refused = run("evaluate.py", "pm", "--model", tmp_path / "pm", "--data", comparisons_file, *more)
        assert refused.returncode == 2 and f"error: {comparisons_file}: the model was trained on all its groups" in refused.stderr
    assert evaluate("--model", tmp_path / "pm", "--data", comparisons_file, "--split", "all")[0]["n"] > 40


def test_what_an_ancestor_saw_is_remembered(pm, comparisons_file, tmp_path):
    """Trained on one file with 0.3 held out, then on another, then on the first again with 0.5: 0.3 is what nobody saw."""
    other = write_jsonl(tmp_path / "other.jsonl", make_comparisons(40, seed=1))
    run_well("train_pm.py", "--init", pm, "--data", other, *PM_FLAGS, "--steps", 1, "--out", tmp_path / "second")
    again = ("--data", comparisons_file, *PM_FLAGS, "--steps", 1, "--held_out", 0.5)
    run_well("train_pm.py", "--init", tmp_path / "second", *again, "--out", tmp_path / "third")
    for model in ("second", "third"):
        assert evaluate("--model", tmp_path / model, "--data", comparisons_file)[0]["n"] == len(held_out_lines(comparisons_file, 0.3)[0])
        assert evaluate("--model", tmp_path / model, "--data", other)[0]["n"] == len(held_out_lines(other, 0.3)[0])


@pytest.fixture(scope="module")
def few(tmp_path_factory):
    """A few comparisons: one without context, one with an empty completion, one of four, one without anything to rank."""
    return write_jsonl(tmp_path_factory.mktemp("few") / "few.jsonl", [
        {"context": "The cat", "completions": [" sleeps.", " sings by the river."], "scores": [1, 0], "group": "a"},
        {"context": "", "completions": ["A dog waits.", "An owl"], "scores": [0, 3], "group": "b"},
        {"context": "Up there", "completions": ["", " it is", " an owl sings", " the miller waits at home"],
         "scores": [2, 1, 1, 0], "group": "a"},
        {"context": "Same", "completions": [" a", " b"], "scores": [1, 1], "group": "c"}])


@pytest.mark.parametrize("name, how", [("pm", "reward"), ("lm", "mean"), ("lm", "sum")])
def test_scores_equal_those_of_separate_forwards(request, few, tmp_path, name, how):
    folder = request.getfixturevalue(name)
    model, tokenizer, _ = checkpoint.load(folder)
    default = how == "reward"
    result, printed = evaluate("--model", folder, "--data", few, *([] if default else ["--score", how]), "--out", tmp_path / "a.jsonl")
    records, found = scored(few), scored(tmp_path / "a.jsonl")

    def score(context, completion):
        with torch.no_grad():
            reward, log_p = alone(model, tokenizer, context, completion)
        log_p = log_p[:-1]  # an <eoc> is no part of the text
        return {"reward": reward, "sum": sum(log_p), "mean": sum(log_p) / max(1, len(log_p))}[how]

    assert [f["where"] for f in found] == [f"{few}:{i}" for i in (1, 2, 3)]
    for record, line in zip(records, found):
        assert line["scores"] == record["scores"]
        assert line[how] == pytest.approx([score(record["context"], c) for c in record["completions"]], abs=2e-5)
        assert line["no_context"] == pytest.approx([score("", c) for c in record["completions"]], abs=2e-5)

    def accuracy(key):
        """By loops: a comparison's pairs are averaged first."""
        means = []
        for line in found:
            known = list(zip(line["scores"], line[key]))
            pairs = [(x, y) for a, x in known for b, y in known if a > b]
            means.append(sum((x > y) + 0.5 * (x == y) for x, y in pairs) / len(pairs))
        return sum(means) / len(means)

    for line, record in zip(found, records):
        line["length"], line["shortness"] = [len(c) for c in record["completions"]], [-len(c) for c in record["completions"]]
    assert (result["score"], result["n"], result["pairs"], result["groups"]) == (how, 3, 7, 2)
    assert result["accuracy"] == pytest.approx(accuracy(how)) and result["no_context"] == pytest.approx(accuracy("no_context"))
    assert result["longer_wins"] == pytest.approx(accuracy("length")) == 1 - result["shorter_wins"]
    assert (result["brier"] is not None) if how == "reward" else ("brier" not in result)
    assert "left out: 0 comparisons with a completion longer than --ctx 192, 1 whose scores are all equal" in printed


def test_scores_without_contexts_can_be_left_out(pm, few, tmp_path):
    whole, _ = evaluate("--model", pm, "--data", few, "--out", tmp_path / "whole")
    part, printed = evaluate("--model", pm, "--data", few, "--skip_no_context", "--out", tmp_path / "part")
    assert {key: value for key, value in whole.items() if not key.startswith("no_context")} == part and "no context" not in printed
    assert [{**line, "no_context": full["no_context"]} for line, full in zip(scored(tmp_path / "part"), scored(tmp_path / "whole"), strict=True)] == scored(tmp_path / "whole")


def test_ties_count_half_and_are_reported(lm, tmp_path):
    """Empty completions have no log-probs to sum: they tie."""
    data = write_jsonl(tmp_path / "ties.jsonl", [{"context": f"Q{i}", "completions": ["", ""], "scores": [1, 0]} for i in range(5)])
    result, printed = evaluate("--model", lm, "--data", data, "--score", "sum")
    assert (result["accuracy"], result["ties"], result["longer_wins"], result["shorter_wins"]) == (0.5, 5, 0.5, 0.5)
    assert "5 ties (a tie counts half)" in printed


def test_a_single_group_has_no_standard_error(pm, tmp_path):
    data = write_jsonl(tmp_path / "one.jsonl", [{"context": "Q", "completions": ["a", "b"], "scores": [1, 0]}])
    assert evaluate("--model", pm, "--data", data)[0]["accuracy_se"] is None


def test_what_is_printed_are_the_figures(pm, comparisons_file):
    result, printed = evaluate("--model", pm, "--data", comparisons_file)
    lines = printed.splitlines()
    for label in ("reward", "no context", "longer wins", "shorter wins"):
        key = label.replace(" ", "_") if label != "reward" else "accuracy"
        shown = f"  {label:<16} {100 * result[key]:6.2f} % ± {100 * result[key + '_se']:.2f}"
        assert shown in lines
    assert f"Brier score {result['brier']:.4f}" in printed and f"calibration error {result['ece']:.4f}" in printed
    assert sum(row[2] for row in result["reliability"]) == result["pairs"] == sum(row[2] for row in result["by_margin"])
    assert len(result["by_margin"]) == 4 and printed.count("\n") == len(lines)


def test_figures_are_the_same_however_much_is_computed_at_once(pm, comparisons_file, tmp_path):
    for name, micro in (("a", 1), ("b", 100_000)):
        evaluate("--model", pm, "--data", comparisons_file, "--split", "all", "--micro_tokens", micro, "--out", tmp_path / name)
    for a, b in zip(scored(tmp_path / "a"), scored(tmp_path / "b"), strict=True):
        assert (a["where"], a["scores"]) == (b["where"], b["scores"])
        assert a["reward"] == pytest.approx(b["reward"], abs=2e-5) and a["no_context"] == pytest.approx(b["no_context"], abs=2e-5)


def test_which_scores_a_model_has(lm, pm, few):
    refused = run("evaluate.py", "pm", "--model", lm, "--data", few, "--score", "reward")
    assert refused.returncode == 2 and "a language model has no rewards; give --score mean or sum" in refused.stderr
    assert evaluate("--model", lm, "--data", few)[0]["score"] == "mean"
    result, printed = evaluate("--model", pm, "--data", few, "--score", "sum")
    assert result["score"] == "sum" and f"note: {pm} is a preference model" in printed


def test_ctx_cuts_contexts_and_leaves_out_what_cannot_fit(pm, comparisons_file, tmp_path):
    _, everything = held_out_lines(comparisons_file, 0.3)
    longest = {i: max(map(len, r["completions"])) for i, r in enumerate(make_comparisons(), 1)}
    result, printed = evaluate("--model", pm, "--data", comparisons_file, "--split", "all", "--ctx", 80, "--out", tmp_path / "a.jsonl")
    assert lines_of(tmp_path / "a.jsonl") == {i for i in everything if longest[i] + 2 <= 80}
    assert f"left out: {sum(n + 2 > 80 for n in longest.values())} comparisons with a completion longer than --ctx 80" in printed


def test_compressed_files_can_be_evaluated(pm, few, tmp_path):
    packed = tmp_path / "few.jsonl.gz"
    packed.write_bytes(gzip.compress(few.read_bytes()))
    a, b = (evaluate("--model", pm, "--data", file)[0] for file in (few, packed))
    assert a == b
