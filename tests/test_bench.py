"""bench.py runs from end to end, says what it measured, and compares what computes the same. Nothing here
depends on how fast that is."""
import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from conftest import run, run_well, slow, write_jsonl
from torch.utils.flop_counter import FlopCounterMode
from data.comparisons import load_comparisons
from data.tokenizer import get_tokenizer
from model import GPT, Config
from speed import language_models, preference_models
from speed.paper_sizes import step_flops
from speed.race import race, table
from train_lm import window_loss

TINY = ("--size", "test", "--ctx", 256, "--batch", 12, "--lm_batch", 1024, "--prompt_tokens", 300,
        "--rounds", 1)
LAYOUTS = ["naive padded", "packed", "packed + shared prefix"]


def write_comparisons(path):
    """Three completions each, the best in the middle. Padded takes two to three times as many tokens."""
    return write_jsonl(path, [
        {"context": "tell me about it " * (i % 5 + 1), "scores": [0, 2, 1],
         "completions": ["no", "yes, gladly " * (i % 3 + 1), "maybe"]} for i in range(12)])


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_comparisons(tmp_path_factory.mktemp("bench") / "data.jsonl")


@pytest.fixture(scope="module")
def measured(data):
    """(what was printed, the content of --out)."""
    out = data.with_name("out.json")
    printed = run_well("bench.py", *TINY, "--data", data, "--out", out)
    return printed, json.loads(out.read_text())


def check_rows(printed, rows, unit, column, baseline):
    """Every row is in the table, its figures lie within their ranges, and the baseline's ratio is 1."""
    for name, row in rows.items():
        assert name in printed
        assert 0 < row["min"] <= row[f"{unit}_per_second"] <= row["max"], name
        low, high = row[f"range_{column}"]
        assert 0 < low <= row[f"ratio_{column}"] <= high and row["memory_gib"] >= 0, name
    assert [rows[baseline][f"ratio_{column}"], *rows[baseline][f"range_{column}"]] == [1, 1, 1]


def test_training_is_measured_and_written(measured):
    printed, result = measured
    assert json.loads(printed.splitlines()[-1]) == result
    assert {"command", "machine", "model", "pm", "lm", "prompt"} <= set(result)
    assert {"cpu", "cores", "threads", "torch"} <= set(result["machine"])
    pm = {name: row for name, row in result["pm"].items() if "TRL" not in name}
    assert list(pm) == LAYOUTS
    check_rows(printed, pm, "pairs", "x naive", "naive padded")
    shapes = ["ctx 512, vocabulary 320", "ctx 1024, vocabulary 320", "ctx 1024, vocabulary 50304"]
    assert list(result["lm"]) == shapes
    for rows in result["lm"].values():
        assert list(rows) == ["plain loop", "train_lm.py"]
        check_rows(printed, rows, "tokens", "x plain", "plain loop")
    large = result["lm"][shapes[-1]]
    assert large["train_lm.py"]["memory_gib"] < large["plain loop"]["memory_gib"]  # its logits take memory


def test_what_a_prompt_costs_is_measured_and_written(measured):
    printed, result = measured
    prompt = result["prompt"]
    assert prompt["prompt_tokens"] == 300
    distilling = ["making the teacher's cache", "training on the cache", "both, for a single epoch"]
    for part, unit, column, slow, ours in (
            ("scoring", "completions", "x naive", "naive, batch of 8 (8 of 160, scaled)",
             ["prompt once + packed rows"]),
            ("distillation", "sequences", "x naive", "naive (2 of 32, scaled)", distilling),
            ("sampling", "samples", "x alone", "one at a time (1 of 100, scaled)", ["n = 100"])):
        assert list(prompt[part]) == [slow, *ours]
        check_rows(printed, prompt[part], unit, column, slow)
    making, training, both = (prompt["distillation"][name]["sequences_per_second"] for name in distilling)
    assert both < min(making, training)


def test_each_layout_computes_what_its_name_says(measured, data):
    """Tokens of a pair: twice the longest sequence of the batch; both sequences; the context once."""
    records = [json.loads(line) for line in data.read_text().splitlines()]
    context = [len(record["context"]) for record in records]
    worst, best = ([len(record["completions"][i]) + 1 for record in records] for i in (0, 1))  # and <eoc>
    padded, packed, shared = (measured[1]["pm"][name]["tokens"] for name in LAYOUTS)
    assert padded == 2 * max(c + b for c, b in zip(context, best))
    assert packed == (2 * sum(context) + sum(best) + sum(worst)) / len(records)
    assert shared == (sum(context) + sum(best) + sum(worst)) / len(records)


def test_ratios_are_taken_within_a_round(capsys):
    """The machine is slow in the second round, which must not show in the ratio."""
    figures = {"slow": (np.array([10.0, 1.0, 12.0]), 2.0), "fast": (np.array([20.0, 3.0, 24.0]), None)}
    rows = table("Title", "pairs", figures, {"x slow": ["slow"]}, more={"tokens": ("{:,.0f}", {"fast": 7})})
    fast = rows["fast"]
    assert (fast["pairs_per_second"], fast["min"], fast["max"]) == (20, 3, 24)
    assert fast["ratio_x slow"] == 2 and fast["range_x slow"] == [2, 3]
    assert "2.00 (2.00-3.00)" in capsys.readouterr().out
    assert rows["slow"]["tokens"] is None and fast["memory_gib"] is None


def test_a_candidate_that_runs_out_of_memory_drops_out(capsys):
    """It has no row and is no baseline; the others go on."""
    def greedy(r):
        if r == 1:
            torch.empty(2**55)
    work = {"small": (1, lambda r: (0.5, 3)), "greedy": (1, greedy)}
    figures = race(work, rounds=2, device=torch.device("cpu"))
    assert list(figures) == ["small"] and list(figures["small"][0]) == [2, 2] and figures["small"][1] == 3
    assert capsys.readouterr().out.startswith("greedy: out of memory (")
    row = table("Title", "pairs", figures, {"x greedy": ["greedy"], "x both": ["small", "greedy"]})["small"]
    assert "ratio_x greedy" not in row and row["ratio_x both"] == 1
    late = {"late": (1, lambda r: torch.empty(2**55) if r == 2 else (0.5,))}  # where memory is measured
    assert race(late, rounds=1, device=torch.device("cpu"))["late"][1] is None  # not known, and not 0
    with pytest.raises(RuntimeError, match="shape"):  # any other error is one
        race({"broken": (1, lambda r: torch.zeros(2).view(3))}, 1, torch.device("cpu"))


def test_a_padded_row_that_cannot_fit_is_not_begun(data, monkeypatch):
    tokenizer = get_tokenizer("bytes")
    args = SimpleNamespace(ctx=80, batch=12)
    pairs = preference_models.Pairs(args, load_comparisons([data], tokenizer), tokenizer, torch.device("cpu"))
    monkeypatch.setattr(preference_models, "device_memory", lambda device: 2**20)
    with pytest.raises(MemoryError, match=r"[\d,]+ tokens take about \d+ GiB"):
        pairs.padded_loss(GPT(Config(2, 64, 2, 320, 80, value_head=True)), 0)


def test_all_layouts_give_the_same_loss_and_gradient(data):
    tokenizer = get_tokenizer("bytes")
    args = SimpleNamespace(ctx=80, batch=12)  # some contexts are cut
    pairs = preference_models.Pairs(args, load_comparisons([data], tokenizer), tokenizer, torch.device("cpu"))
    model = GPT(Config(2, 64, 2, 320, 80, value_head=True)).init_weights(seed=0).double()
    model.dtype = torch.float64
    found = []
    for loss in (pairs.padded_loss, pairs.packed_loss, pairs.shared_loss):
        model.zero_grad()
        total, count = loss(model, 0)
        total.backward()
        assert count == 12
        found.append(torch.cat([total.detach()[None], *(p.grad.flatten() for p in model.parameters())]))
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=1e-9, atol=1e-9)


def test_the_plain_loop_computes_the_same_loss():
    config = Config(2, 64, 2, 320, 32)
    windows = torch.from_numpy(np.random.default_rng(0).integers(320, size=(3, 33)))
    plain, model = (kind(config).init_weights(seed=0) for kind in (language_models.PlainGPT, GPT))
    expected = window_loss(model, windows)
    torch.testing.assert_close(language_models.dense_loss(plain, windows), expected, rtol=1e-5, atol=0)


@slow
@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="no C++ compiler")
def test_compiled_models_are_timed(data):
    """A step that compiles, and one that is timed."""
    printed = run_well("bench.py", "pm", *TINY, "--data", data, "--compile")
    rows = json.loads(printed.splitlines()[-1])["pm"]
    assert [name for name in rows if "TRL" not in name] == [*LAYOUTS, "packed + shared prefix, compiled"]
    assert rows["packed + shared prefix, compiled"]["tokens"] == rows["packed + shared prefix"]["tokens"]


def test_a_checkpoint_gives_the_sizes(pm):
    printed = run_well("bench.py", "lm", *TINY, "--init", pm)
    result = json.loads(printed.splitlines()[-1])
    assert result["model"]["d_model"] == 64 and result["model"]["vocab_size"] == 320
    assert list(result["lm"]) == ["ctx 256, vocabulary 320"]


@pytest.mark.parametrize("flags, words", [
    (["pm"], "no comparison with a better and a worse completion"),
    (["lm", "--lm_batch", 100], "--lm_batch 100")])
def test_what_cannot_be_measured_is_one_line(tmp_path, flags, words):
    record = {"context": "a", "completions": ["b", "c"], "scores": [1, 1]}
    equal = write_jsonl(tmp_path / "equal.jsonl", [record])
    done = run("bench.py", flags[0], *TINY, "--data", equal, *flags[1:])
    assert done.returncode == 2 and words in done.stderr.splitlines()[-1] and "Traceback" not in done.stderr


def test_sizes_of_the_paper_are_measured_with_their_part_of_the_peak(data):
    printed = run_well("bench.py", "gpu", "--sizes", "test", "--device", "cpu", *TINY, "--data", data)
    result = json.loads(printed.splitlines()[-1])["gpu"]
    for part, unit in (("lm", "tokens"), ("pm", "pairs")):
        row = result["test"][part]["eager"]
        assert 0 < row["MFU"] < 1 and row[f"{unit}_per_second"] > 0


def test_a_step_takes_two_flops_for_each_product_of_two_numbers_and_as_many_again_twice_backward():
    config = Config(1, 8, 2, vocab_size=11, ctx=4, d_ff=16)
    model, tokens = GPT(config).init_weights(0), torch.arange(4)[None]
    model.plain = True
    with FlopCounterMode(display=False) as counter:
        model(tokens).sum().backward()
    # The definition of attention computes all 4 x 4 scores. The first block's input needs a gradient as well.
    assert step_flops(config, 1, n_tokens=4, n_seen=16) == counter.get_total_flops()
