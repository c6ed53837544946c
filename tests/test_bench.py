"""bench.py runs from end to end and says what it measured. Nothing here depends on how fast that was."""
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TINY = ("--size", "test", "--ctx", "256", "--batch", "12", "--lm_batch", "512", "--steps", "1", "--rounds", "2", "--prompt_tokens", "300")


def bench(*args, **environment):
    return subprocess.run([sys.executable, "bench.py", *map(str, args)], cwd=ROOT, capture_output=True, text=True, timeout=300,
                          env={**os.environ, **environment})


def write_comparisons(path):
    """Three completions each, the best in the middle; two to three times as many tokens padded as packed."""
    lines = [{"context": "tell me about it " * (i % 5 + 1), "completions": ["no", "yes, gladly " * (i % 3 + 1), "maybe"], "scores": [0, 2, 1]}
             for i in range(12)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """(records, stdout, content of --out)"""
    folder = tmp_path_factory.mktemp("bench")
    data = write_comparisons(folder / "data.jsonl")
    done = bench(*TINY, "--data", data, "--out", folder / "out.json")
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in data.read_text().splitlines()], done.stdout, json.loads((folder / "out.json").read_text())


def test_training_is_measured_and_written(measured):
    _, stdout, result = measured
    assert json.loads(stdout.splitlines()[-1]) == result
    assert {"date", "command", "machine", "peak_gflops", "model", "pm", "lm", "prompt"} <= set(result)
    assert {"cpu", "cores", "threads", "torch"} <= set(result["machine"]) and min(result["peak_gflops"].values()) > 0
    pm, lm = ({name: row for name, row in result[part].items() if "TRL" not in name} for part in ("pm", "lm"))
    assert list(pm) == ["naive padded", "packed", "packed + shared prefix"] and list(lm) == ["plain loop", "train_lm.py"]
    for unit, rows, baseline in (("pairs", pm, "naive"), ("tokens", lm, "plain")):
        base = next(iter(rows.values()))[f"{unit}_per_second"]
        for name, row in rows.items():
            assert name in stdout
            assert 0 < row["min"] <= row[f"{unit}_per_second"] <= row["max"], name
            assert 0 < row["useful"] and 0 < row["mfu"] and row["memory_gib"] >= 0, name
            assert row[f"ratio_x {baseline}"] == pytest.approx(row[f"{unit}_per_second"] / base), name


def test_what_a_prompt_costs_is_measured_and_written(measured):
    _, stdout, result = measured
    prompt = result["prompt"]
    assert prompt["prompt_tokens"] == 300 and prompt["cache_bytes_per_token"] == 50 * 2 + 51 * 2
    distilling = "making the teacher's cache", "training on the cache", "both, for a single epoch"
    parts = (("scoring", "completions", "naive", [f"naive, batch of {n} ({n} of 160, scaled)" for n in (1, 8)], ["prompt once + packed rows"]),
             ("distillation", "sequences", "naive", ["naive (2 of 32, scaled)"], distilling),
             ("sampling", "samples", "alone", ["one at a time (3 of 100, scaled)"], ["n = 100"]))
    for part, unit, baseline, slow, ours in parts:
        rows = prompt[part]
        assert list(rows) == [*slow, *ours]
        base = max(rows[name][f"{unit}_per_second"] for name in slow)  # the ratios are to the better of the plain ways
        for name, row in rows.items():
            assert name in stdout
            assert 0 < row["min"] <= row[f"{unit}_per_second"] <= row["max"] and row["memory_gib"] >= 0, name
            assert row[f"ratio_x {baseline}"] == pytest.approx(row[f"{unit}_per_second"] / base), name
    making, training, both = (prompt["distillation"][name]["sequences_per_second"] for name in distilling)
    assert both < min(making, training)


def test_each_layout_computes_what_its_name_says(measured):
    """Tokens a pair: the batch's longest sequence twice; both sequences; the context once."""
    records, _, result = measured
    context, best, worst = zip(*((len(r["context"]), len(r["completions"][1]) + 1, len(r["completions"][0]) + 1) for r in records))
    assert result["pm"]["naive padded"]["tokens"] == 2 * max(c + b for c, b in zip(context, best))
    assert result["pm"]["packed"]["tokens"] == (2 * sum(context) + sum(best) + sum(worst)) / len(records)
    assert result["pm"]["packed + shared prefix"]["tokens"] == (sum(context) + sum(best) + sum(worst)) / len(records)


def test_what_cannot_be_measured_is_one_line(tmp_path):
    (tmp_path / "equal.jsonl").write_text('{"context": "a", "completions": ["b", "c"], "scores": [1, 1]}\n')
    for args, words in (((*TINY, "--data", tmp_path / "equal.jsonl"), "no comparison with a better and a worse completion"),
                        ((*TINY, "--data", write_comparisons(tmp_path / "d.jsonl"), "--lm_batch", 100), "--lm_batch 100")):
        done = bench(*args)
        assert done.returncode == 2 and words in done.stderr.splitlines()[-1] and "Traceback" not in done.stderr
