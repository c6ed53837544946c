"""evaluate.py pm: each figure against one computed by hand, and which comparisons are scored."""
import functools
import gzip
import math
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from conftest import (BYTES, PM_FLAGS, alone, evaluate, load, make_comparisons, metrics, read_jsonl, run,
                      run_refused, run_well, write_jsonl)

import checkpoint
from data.comparisons import load_comparisons
from data.packing import RowFormat
from evals import pm as figures

# ------------------------------------------------------------------------------------------------------------
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
    is_right = rng.random(n) < [ease[g] for g in groups]
    return is_right.astype(float), rng.choice([1 / 3, 1 / 2, 1.0], n), groups


def test_standard_error_is_by_group():
    values, weights, groups = clustered(0)
    mean, error = figures.mean_and_error(values, weights, groups)
    total = sum(w for w in weights)
    by_hand = sum(w * v for v, w in zip(values, weights)) / total
    names = sorted(set(groups.tolist()))
    squares = [sum(w * (v - by_hand) for v, w, g in zip(values, weights, groups) if g == name) ** 2
               for name in names]
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
    by_hand = (1.75 * abs(mean_low - right_low) + 3 * abs(mean_high - right_high)) / 4.75
    assert error == pytest.approx(by_hand)


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
    quarters = [(0, 1, 3, pytest.approx(0.5 / 3)), (2, 3, 2, 0.5), (4, 5, 2, 1), (7, 8, 2, 1)]
    assert figures.by_margin(margin, weight) == quarters
    assert figures.by_margin(np.array([2.0, -1.0]), np.ones(2)) == [(1, 1, 1, 0), (2, 2, 1, 1)]


# ------------------------------------------------------------------------------------------------------------
# Which comparisons are scored


evaluate_pm = functools.partial(evaluate, "pm")


def refused(*flags):
    """The one line that `evaluate.py pm` answers with."""
    return run_refused("evaluate.py", "pm", *flags)


def lines_with_something_to_rank(file, held_out=None):
    """The numbers of the lines of a file whose scores differ; if a part is held out, of its groups only."""
    data = load_comparisons([file], BYTES, quiet=True)
    return set(data.lines[data.differ() & data.held_out(held_out or 1.0), 1].tolist())


def scored_lines(path, file):
    """The numbers of the lines of a file that stand in what --out wrote."""
    places = [item["where"].rsplit(":", 1) for item in read_jsonl(path)]
    return {int(line) for name, line in places if name == str(file)}


def test_a_file_trained_on_is_evaluated_on_its_held_out_groups(pm, comparisons_file, tmp_path):
    held_out = lines_with_something_to_rank(comparisons_file, held_out=0.3)
    flags = ("--model", pm, "--data", comparisons_file)
    result, printed = evaluate_pm(*flags, "--out", tmp_path / "a.jsonl")
    assert f"{comparisons_file}: held-out groups only, as {pm} was trained on the others" in printed
    assert scored_lines(tmp_path / "a.jsonl", comparisons_file) == held_out
    assert 0 < result["n"] == len(held_out) < len(lines_with_something_to_rank(comparisons_file))
    last = [r["eval"] for r in metrics(pm) if "eval" in r][-1]
    assert (result["accuracy"], result["n"]) == (pytest.approx(last["accuracy"]), last["comparisons"])
    assert result == evaluate_pm(*flags, "--split", "held_out")[0]


def test_a_copy_of_the_file_is_known_by_its_content(pm, comparisons_file, tmp_path):
    copy = shutil.copy(comparisons_file, tmp_path / "copy.jsonl")
    result, printed = evaluate_pm("--model", pm, "--data", copy)
    assert "held-out groups only" in printed
    assert result["n"] == len(lines_with_something_to_rank(comparisons_file, held_out=0.3))


def test_split_all_means_it(pm, comparisons_file, tmp_path):
    _, printed = evaluate_pm("--model", pm, "--data", comparisons_file, "--split", "all",
                             "--out", tmp_path / "a.jsonl")
    assert f"{comparisons_file}: all groups, though the model was trained on some of them" in printed
    everything = lines_with_something_to_rank(comparisons_file)
    assert scored_lines(tmp_path / "a.jsonl", comparisons_file) == everything


def test_other_files_are_evaluated_whole_beside_those_trained_on(pm, comparisons_file, tmp_path):
    other = write_jsonl(tmp_path / "other.jsonl", make_comparisons(30, seed=1))
    whole = lines_with_something_to_rank(other)
    result, printed = evaluate_pm("--model", pm, "--data", other)
    assert f"{other}: all groups, as no file with this content was trained on\n" in printed
    assert result["n"] == len(whole)
    _, printed = evaluate_pm("--model", pm, "--data", comparisons_file, other, "--out", tmp_path / "a.jsonl")
    assert "held-out groups only" in printed
    assert f"{other}: all groups, as no file with this content was trained on\n" in printed
    held_out = lines_with_something_to_rank(comparisons_file, held_out=0.3)
    assert scored_lines(tmp_path / "a.jsonl", comparisons_file) == held_out
    assert scored_lines(tmp_path / "a.jsonl", other) == whole
    answer = refused("--model", pm, "--data", other, "--split", "held_out")
    assert f"error: {other}: the model was not trained on this file" in answer


def test_nothing_held_out_is_nothing_to_evaluate_on(lm, comparisons_file, tmp_path):
    run_well("train_pm.py", "--init", lm, "--data", comparisons_file, *PM_FLAGS, "--steps", 1,
             "--held_out", 0, "--out", tmp_path / "pm")
    flags = ("--model", tmp_path / "pm", "--data", comparisons_file)
    for more in ((), ("--split", "held_out")):
        assert f"error: {comparisons_file}: the model was trained on all its groups" in refused(*flags, *more)
    assert evaluate_pm(*flags, "--split", "all")[0]["n"] > 40


def test_what_an_ancestor_saw_is_remembered(pm, comparisons_file, tmp_path):
    """A model is trained on one file with 0.3 held out, then on another, then on the first again with 0.5:
    the first 0.3 are what it never saw."""
    other = write_jsonl(tmp_path / "other.jsonl", make_comparisons(40, seed=1))
    flags = (*PM_FLAGS, "--steps", 1)
    run_well("train_pm.py", "--init", pm, "--data", other, *flags, "--out", tmp_path / "second")
    run_well("train_pm.py", "--init", tmp_path / "second", "--data", comparisons_file, *flags,
             "--held_out", 0.5, "--out", tmp_path / "third")
    for model in ("second", "third"):
        for file in (comparisons_file, other):
            result, _ = evaluate_pm("--model", tmp_path / model, "--data", file)
            assert result["n"] == len(lines_with_something_to_rank(file, held_out=0.3))


# ------------------------------------------------------------------------------------------------------------
# Scores


@pytest.fixture(scope="module")
def few(tmp_path_factory):
    """A few comparisons: one without context, one of four completions with an empty one among them, and one
    without anything to rank."""
    return write_jsonl(tmp_path_factory.mktemp("few") / "few.jsonl", [
        {"context": "The cat", "completions": [" sleeps.", " sings by the river."], "scores": [1, 0],
         "group": "a"},
        {"context": "", "completions": ["A dog waits.", "An owl"], "scores": [0, 3], "group": "b"},
        {"context": "Up there", "completions": ["", " it is", " an owl sings", " the miller waits at home"],
         "scores": [2, 1, 1, 0], "group": "a"},
        {"context": "Same", "completions": [" a", " b"], "scores": [1, 1], "group": "c"}])


def accuracy_by_loops(items, key):
    """Accuracy by item[key]; a comparison's pairs are averaged first, and a tie counts half."""
    means = []
    for item in items:
        known = list(zip(item["scores"], item[key]))
        pairs = [(x, y) for a, x in known for b, y in known if a > b]
        means.append(sum((x > y) + 0.5 * (x == y) for x, y in pairs) / len(pairs))
    return sum(means) / len(means)


@pytest.mark.parametrize("name, rule", [("pm", "reward"), ("lm", "mean"), ("lm", "sum")])
def test_scores_equal_those_of_separate_forwards(request, few, tmp_path, name, rule):
    folder = request.getfixturevalue(name)
    model, tokenizer, _ = checkpoint.load(folder)
    flags = () if rule == "reward" else ("--score", rule)
    result, printed = evaluate_pm("--model", folder, "--data", few, *flags, "--out", tmp_path / "a.jsonl")
    records, found = read_jsonl(few), read_jsonl(tmp_path / "a.jsonl")

    def score(context, completion):
        with torch.no_grad():
            reward, log_p = alone(model, tokenizer, context, completion)
        log_p = log_p[:-1]  # an <eoc> is no part of the text
        return {"reward": reward, "sum": sum(log_p), "mean": sum(log_p) / max(1, len(log_p))}[rule]

    assert [item["where"] for item in found] == [f"{few}:{i}" for i in (1, 2, 3)]
    for record, item in zip(records, found):
        completions = record["completions"]
        assert item["scores"] == record["scores"]
        assert item[rule] == pytest.approx([score(record["context"], c) for c in completions], abs=2e-5)
        assert item["no_context"] == pytest.approx([score("", c) for c in completions], abs=2e-5)
        item["length"] = [len(c) for c in completions]
    assert (result["score"], result["n"], result["pairs"], result["groups"]) == (rule, 3, 7, 2)
    assert result["accuracy"] == pytest.approx(accuracy_by_loops(found, rule))
    assert result["no_context"] == pytest.approx(accuracy_by_loops(found, "no_context"))
    assert result["longer_wins"] == pytest.approx(accuracy_by_loops(found, "length"))
    assert result["longer_wins"] == 1 - result["shorter_wins"]
    assert (result["brier"] is not None) if rule == "reward" else ("brier" not in result)
    left_out = "left out: 0 comparisons with a completion longer than --ctx 192, 1 whose scores are all equal"
    assert left_out in printed


def test_scores_without_contexts_can_be_left_out(pm, few, tmp_path):
    flags = ("--model", pm, "--data", few)
    whole, _ = evaluate_pm(*flags, "--out", tmp_path / "whole.jsonl")
    part, printed = evaluate_pm(*flags, "--skip_no_context", "--out", tmp_path / "part.jsonl")
    assert {key: value for key, value in whole.items() if not key.startswith("no_context")} == part
    assert "no context" not in printed
    items = [{key: value for key, value in item.items() if key != "no_context"}
             for item in read_jsonl(tmp_path / "whole.jsonl")]
    assert items == read_jsonl(tmp_path / "part.jsonl")


def test_what_is_read_is_not_overwritten(pm, few, tmp_path):
    data = Path(shutil.copy(few, tmp_path / "data.jsonl"))
    before = data.read_bytes()
    for out, words in ((data, "--out is one of the files that are read"), (pm / "metrics.jsonl", "are read"),
                       (pm / "config.json", "are read")):
        assert words in refused("--model", pm, "--data", data, "--out", out)
    assert "are read" in refused("--model", pm, "--data", tmp_path, "--out", data)
    assert data.read_bytes() == before
    evaluate_pm("--model", pm, "--data", data, "--out", tmp_path / "new.jsonl")
    line = run_refused("evaluate.py", "sample", "--model", pm, "--data", data)
    assert "--out is missing" in line


def interrupt():
    """Press Ctrl-C when scoring begins."""
    def score_all(*_, **__):
        raise KeyboardInterrupt
    figures.score_all = score_all


def test_an_interrupted_evaluation_ends_in_one_line(pm, few, tmp_path):
    line = run_refused("evaluate.py", "pm", "--model", pm, "--data", few, "--out", tmp_path / "out.jsonl",
                       exit_code=130, before=interrupt)
    assert line == "evaluate.py: interrupted\n" and not (tmp_path / "out.jsonl").exists()


def test_ties_count_half_and_are_reported(lm, tmp_path):
    """Empty completions have no log-probs to sum: they tie."""
    data = write_jsonl(tmp_path / "ties.jsonl", [
        {"context": f"Q{i}", "completions": ["", ""], "scores": [1, 0]} for i in range(5)])
    result, printed = evaluate_pm("--model", lm, "--data", data, "--score", "sum")
    assert (result["accuracy"], result["ties"]) == (0.5, 5)
    assert result["longer_wins"] == result["shorter_wins"] == 0.5
    assert "5 ties (a tie counts half)" in printed


def test_a_single_group_has_no_standard_error(pm, tmp_path):
    record = {"context": "Q", "completions": ["a", "b"], "scores": [1, 0]}
    data = write_jsonl(tmp_path / "one.jsonl", [record])
    assert evaluate_pm("--model", pm, "--data", data)[0]["accuracy_se"] is None


def test_what_is_printed_are_the_figures(pm, comparisons_file):
    result, printed = evaluate_pm("--model", pm, "--data", comparisons_file)
    lines = printed.splitlines()
    for label in ("reward", "no context", "longer wins", "shorter wins"):
        key = label.replace(" ", "_") if label != "reward" else "accuracy"
        shown = f"  {label:<16} {100 * result[key]:6.2f} % ± {100 * result[key + '_se']:.2f}"
        assert shown in lines
    assert f"Brier score {result['brier']:.4f}" in printed
    assert f"calibration error {result['ece']:.4f}" in printed
    for table in ("reliability", "by_margin"):
        assert sum(row[2] for row in result[table]) == result["pairs"]
    assert len(result["by_margin"]) == 4 and printed.count("\n") == len(lines)


def test_figures_are_the_same_whatever_the_micro_batch(pm, comparisons_file, tmp_path):
    for name, micro in (("a", 1), ("b", 100_000)):
        evaluate_pm("--model", pm, "--data", comparisons_file, "--split", "all", "--micro_tokens", micro,
                    "--out", tmp_path / f"{name}.jsonl")
    for a, b in zip(read_jsonl(tmp_path / "a.jsonl"), read_jsonl(tmp_path / "b.jsonl"), strict=True):
        assert (a["where"], a["scores"]) == (b["where"], b["scores"])
        assert a["reward"] == pytest.approx(b["reward"], abs=2e-5)
        assert a["no_context"] == pytest.approx(b["no_context"], abs=2e-5)


def test_which_scores_a_model_has(lm, pm, few):
    answer = refused("--model", lm, "--data", few, "--score", "reward")
    assert "a language model has no rewards; give --score mean or sum" in answer
    assert evaluate_pm("--model", lm, "--data", few)[0]["score"] == "mean"
    result, printed = evaluate_pm("--model", pm, "--data", few, "--score", "sum")
    assert result["score"] == "sum" and f"note: {pm} is a preference model" in printed


def test_ctx_cuts_contexts_and_leaves_out_what_cannot_fit(pm, comparisons_file, tmp_path):
    """In tokens of one byte: a completion needs room for itself, an <eoc> and one token of context."""
    longest = {i: max(map(len, r["completions"])) for i, r in enumerate(make_comparisons(), 1)}
    contexts = {i: len(r["context"]) for i, r in enumerate(make_comparisons(), 1)}
    scored = {i for i in lines_with_something_to_rank(comparisons_file) if longest[i] + 2 <= 80}
    n_cut = sum(contexts[i] + longest[i] + 1 > 80 for i in scored)
    result, printed = evaluate_pm("--model", pm, "--data", comparisons_file, "--split", "all", "--ctx", 80,
                                  "--out", tmp_path / "a.jsonl")
    assert scored_lines(tmp_path / "a.jsonl", comparisons_file) == scored
    n_too_long = sum(n + 2 > 80 for n in longest.values())
    assert f"left out: {n_too_long} comparisons with a completion longer than --ctx 80" in printed
    assert 0 < n_cut == result["contexts_cut"]
    assert f"{n_cut} of {len(scored)} contexts are cut on the left to fit in --ctx 80" in printed


def test_compressed_files_can_be_evaluated(pm, few, tmp_path):
    packed = tmp_path / "few.jsonl.gz"
    packed.write_bytes(gzip.compress(few.read_bytes()))
    a, b = (evaluate_pm("--model", pm, "--data", file)[0] for file in (few, packed))
    assert a == b


# ------------------------------------------------------------------------------------------------------------
# What goes wrong


def close_standard_output():
    """As if whoever reads what is printed, such as `head`, had gone already."""
    reader, writer = os.pipe()
    os.close(reader)
    os.dup2(writer, 1)


def test_out_is_written_although_nobody_reads_what_is_printed(pm, few, tmp_path):
    flags = ("--model", pm, "--data", few, "--dtype", "fp32")
    done = run("evaluate.py", "pm", *flags, "--out", tmp_path / "a.jsonl", before=close_standard_output)
    assert done.returncode == 141 and "Traceback" not in done.stderr
    assert len(read_jsonl(tmp_path / "a.jsonl")) == 3


@pytest.mark.parametrize("flags, words", [
    ((), "evaluate.py: error: the following arguments are required: BENCHMARK; evaluate.py -h explains"),
    (("pm",), "evaluate.py pm: error: the following arguments are required: --model; evaluate.py pm -h"),
    (("no",), "evaluate.py: error: argument BENCHMARK: invalid choice: 'no'"),
    (("hellaswag", "--model", "out"), "arguments are required: --data; evaluate.py hellaswag -h explains"),
    (("elo",), "evaluate.py: error: give either --games FILE, or --judge DIR with --samples FILE FILE"),
    (("elo", "--games", "g.csv", "--judge", "out"), "evaluate.py: error: give either --games FILE, or"),
    (("elo", "--seed", "-1"), "evaluate.py elo: error: argument --seed: invalid int from 0")])
def test_wrong_flags_are_answered_in_one_line(flags, words):
    assert words in run_refused("evaluate.py", *flags)


def test_a_comparison_that_is_longer_than_a_micro_batch_is_scored_in_parts(pm, tmp_path):
    """Its memory is bounded, and its scores are the same."""
    model, tokenizer, _ = checkpoint.load(pm)
    records = [{"context": "Now tell:", "completions": [f"{'long ' * 9}{i}" for i in range(40)],
                "scores": list(range(40))}, {"context": "", "completions": ["a", "b"], "scores": [1, 0]}]
    data, row_format = load(tmp_path, records), RowFormat(100, tokenizer)
    sizes, seen = [], []
    model.register_forward_pre_hook(lambda _, inputs: sizes.append(len(inputs[0])))
    for micro_tokens in (10_000, 150):
        for rule in ("reward", "sum"):
            seen.append(figures.score_all(model, data, np.arange(2), rule, row_format, micro_tokens))
    assert max(sizes[:2]) > 1800 and max(sizes[2:]) <= 150
    for whole, parts in zip(seen[:2], seen[2:]):
        for a, b in zip(whole, parts, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-5)


def test_of_few_documents_the_end_of_all_together_is_held_out(text_file, tmp_path):
    """So one of several files has no end of its own that no training has seen."""
    def train(name, *flags):
        run_well("train_lm.py", *flags, "--batch", 256, "--steps", 1, "--out", tmp_path / name)
        return tmp_path / name

    files = [tmp_path / "a.txt", tmp_path / "b.txt"]
    for path in files:
        path.write_text(f"{path.name} tells of a cat that waits by the door. " * 20)
    lm = train("lm", "--size", "test", "--tokenizer", "bytes", "--ctx", 64, "--data", *files)
    for model in (lm, train("later", "--init", lm, "--data", text_file)):
        both = run_well("evaluate.py", "lm", "--model", model, "--data", *files)
        assert "held-out documents only" in both
    for model, data in ((lm, files[:1]), (train("again", "--init", lm, "--data", files[0]), files)):
        line = run_refused("evaluate.py", "lm", "--model", model, "--data", *data)
        assert "the end of all text that the model was trained on was held out" in line


@pytest.mark.parametrize("benchmark", ["pm", "hhh", "lm"])
def test_weights_that_are_no_numbers_are_an_error_and_not_an_accuracy(lm, pm, few, text_file, tmp_path,
                                                                      benchmark):
    model, data = {"pm": (pm, few), "hhh": (lm, few), "lm": (lm, text_file)}[benchmark]
    folder = shutil.copytree(model, tmp_path / "model")
    weights = safetensors.torch.load_file(folder / "model.safetensors")
    weights["model.layers.0.input_layernorm.weight"][3] = 3e38  # whose products are beyond all numbers
    safetensors.torch.save_file(weights, folder / "model.safetensors")
    line = run_refused("evaluate.py", benchmark, "--model", folder, "--data", data)
    assert "not a finite number" in line and (f"{few}:" in line or benchmark == "lm")
