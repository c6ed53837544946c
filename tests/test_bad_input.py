"""Bad input to the real scripts gives one line, which names the file, the line and the mend, and exit code
2; nothing half-written stays."""
import bz2
import fcntl
import gzip
import json
import lzma
import os
import re
import resource
import shutil
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from conftest import (DATA, LM_FLAGS, PM_FLAGS, make_comparisons, make_texts, metrics, run, run_refused,
                      run_well, strict_output, write_jsonl)

import checkpoint
from data.errors import InputError, run_main
from data.tokenizer import Tokenizer
from data.tokenizer_json import from_ranks

COMPARISONS = "".join(json.dumps(r) + "\n" for r in make_comparisons(30)).encode()
TEXTS = "".join(json.dumps(r) + "\n" for r in make_texts(30)).encode()
JUNK = np.random.default_rng(0).bytes(5000)


def refused(script, *flags, names):
    """Run a script that must refuse: its answer is one line, and `names` stand in it."""
    done = run(script, *flags)
    assert done.returncode == 2, done
    assert re.fullmatch(rf"{script}( \w+)?: error: .{{1,600}}\n", done.stderr), done.stderr
    for name in names:
        assert str(name) in done.stderr, done.stderr
    assert "Traceback" not in done.stdout
    cache = Path(os.environ["HHH_LAB_CACHE"])
    assert not [p for p in cache.iterdir() if p.name.endswith(".partial")]


def record(**fields):
    return json.dumps({"context": "C", "completions": ["a", "b"], "scores": [1, 0], **fields}).encode()


# Content of a comparison file, the line that the answer names, and words of the answer
BAD_COMPARISONS = {
    "malformed line": (COMPARISONS + b'{"context": "C", "comple', 31, "not a JSON object"),
    "missing key": (COMPARISONS + b'{"context": "C", "completions": ["a"]}', 31, 'no "scores"'),
    "missing rejected": (b'{"chosen": "a"}', 1, 'no "rejected"'),
    "no known key": (b'\n\n{"question": "a"}', 3, 'no "chosen"'),
    "a list": (COMPARISONS + b"[1, 2]\n" + COMPARISONS, 31, "expected a JSON object"),
    "completions no list": (record(completions="ab"), 1, '"completions" must be a list'),
    "completions no texts": (record(completions=["a", 2]), 1, '"completions" must be a list'),
    "no completions": (record(completions=[], scores=[]), 1, "at least one"),
    "context no text": (record(context=["C"]), 1, "the context must be a text, found list"),
    "chosen no text": (b'{"prompt": "P", "chosen": 1, "rejected": "b"}', 1,
                       '"chosen" and "rejected" must be texts'),
    "prompt no text": (b'{"prompt": 5, "chosen": "a", "rejected": "b"}', 1,
                       "the context must be a text, found int"),
    "score a text": (record(scores=["1", 0]), 1, "a score must be a finite number, found 1"),
    "score true": (record(scores=[True, 0]), 1, "a score must be a finite number, found True"),
    "score null": (record(scores=[None, 0]), 1, "a score must be a finite number, found None"),
    "score NaN": (COMPARISONS + record(scores=[float("nan"), 0]), 31, "NaN is not a number"),
    "score infinite": (record(scores=[float("inf"), 0]), 1, "Infinity is not a number"),
    "score beyond floats": (record(scores=[0, 0]).replace(b"[0, 0]", b"[1e999, 0]"), 1,
                            "a score must be a finite number"),
    "score a huge integer": (record(scores=[10**400, 0]), 1, "a score must be a finite number"),
    "too few scores": (record(scores=[1]), 1, "one number per completion (2)"),
    "too many scores": (record(scores=[1, 2, 3]), 1, "one number per completion (2)"),
    "scores no list": (record(scores=1), 1, "one number per completion (2)"),
    "empty file": (b"", None, "no comparisons in this file"),
    "blank lines": (b"\n\n \n", None, "no comparisons in this file"),
    "binary junk": (JUNK, 1, "not UTF-8 text"),
    "UTF-16": (COMPARISONS.decode().encode("utf-16"), 1, "not UTF-8 text"),
    "special token": (COMPARISONS + record(completions=["a <eoc> b", "c"]), 31, "<eoc>, a special token"),
    "text for language models": (TEXTS, 1, 'no "chosen"'),
}
BAD_TEXTS = {
    "malformed line": (TEXTS + b'{"text": "C', 31, "not a JSON object"),
    "missing key": (TEXTS + b'{"texts": "C"}', 31, 'no "text"'),
    "wrong type": (TEXTS + b'{"text": 1}', 31, '"text" must be a string'),
    "empty file": (b"", None, "no documents in this file"),
    "empty documents": (b'{"text": ""}\n{"text": " "}', None, "all 2 documents"),
    "binary junk": (JUNK, 1, "not UTF-8 text"),
    "special token": (TEXTS + b'{"text": "a<eot>"}', 31, "<eot>, a special token"),
    "comparisons": (COMPARISONS, 1, 'no "text"'),
    "less than a window": (b'{"text": "%s"}' % (b"a" * 150), None, "fewer than one window"),
    "nothing to hold out": (b'{"text": "aaa"}', None, "the held-out text is shorter than three tokens"),
}


def flip_byte(packed):
    return packed[:400] + bytes([packed[400] ^ 255]) + packed[401:]


PACKED = {  # ending, what the file holds, words of the answer
    "truncated gz": (".gz", lambda data: gzip.compress(data)[:-200], "damaged or cut"),
    "truncated xz": (".xz", lambda data: lzma.compress(data)[:-60], "damaged or cut"),
    "truncated bz2": (".bz2", lambda data: bz2.compress(data)[:-200], "damaged"),
    "gz is junk": (".gz", lambda data: JUNK, "damaged or cut"),
    "gz is plain": (".gz", lambda data: data, "damaged or cut"),
    "flipped byte": (".gz", lambda data: flip_byte(gzip.compress(data)), ""),
}


def write(folder, name, content):
    path = folder / name
    path.write_bytes(content)
    return path


@pytest.mark.parametrize("case", BAD_COMPARISONS)
def test_bad_comparison_files(pm, tmp_path, case):
    content, line, words = BAD_COMPARISONS[case]
    path = write(tmp_path, "data.jsonl", content)
    names = (f"error: {path}:{line}: " if line else f"error: {path}: ", words)
    refused("train_pm.py", "--init", pm, "--data", path, "--out", tmp_path / "run", names=names)
    out = tmp_path / "scores.jsonl"
    refused("evaluate.py", "pm", "--model", pm, "--data", path, "--out", out, names=names)
    assert [p.name for p in tmp_path.iterdir()] == ["data.jsonl"]


@pytest.mark.parametrize("case", BAD_TEXTS)
def test_bad_text_files(tmp_path, case):
    content, line, words = BAD_TEXTS[case]
    path = write(tmp_path, "data.jsonl", content)
    names = (f"{path}:{line}: " if line else "", words)
    refused("train_lm.py", *LM_FLAGS, "--data", path, "--out", tmp_path / "run", names=names)
    assert [p.name for p in tmp_path.iterdir()] == ["data.jsonl"]


@pytest.mark.parametrize("case", PACKED)
def test_damaged_compressed_files(pm, tmp_path, case):
    suffix, pack, words = PACKED[case]
    path = write(tmp_path, f"data.jsonl{suffix}", pack(COMPARISONS))
    refused("train_pm.py", "--init", pm, "--data", path, "--out", tmp_path / "run", names=(f"{path}:", words))
    path.write_bytes(pack(TEXTS))
    refused("train_lm.py", *LM_FLAGS, "--data", path, "--out", tmp_path / "run", names=(f"{path}:", words))
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


# ------------------------------------------------------------------------------------------------------------
# Flags


BAD_FLAGS = {  # script (and what else is not as usual), flags that follow good ones, words of the answer
    "unknown size": ("train_lm.py", "--size 7b", "argument --size: invalid choice: '7b'"),
    "unknown tokenizer": ("train_lm.py", "--tokenizer words", "unknown tokenizer 'words': give"),
    "unknown tokenizer of a PM": ("train_pm.py fresh", "--tokenizer words", "unknown tokenizer 'words'"),
    "too small bpe": ("train_lm.py", "--tokenizer bpe:12", "bpe:12: N must be a whole number"),
    "bpe without text": ("train_pm.py fresh", "--tokenizer bpe:400",
                         "bpe:400 is trained on text, and none is given"),
    "no such vocabulary": ("train_lm.py", "--tokenizer no.tiktoken", "no.tiktoken: no such file"),
    "unknown objective": ("train_pm.py", "--objective best", "argument --objective: invalid choice: 'best'"),
    "unknown schedule": ("train_lm.py", "--schedule step", "argument --schedule: invalid choice"),
    "unknown benchmark": ("evaluate.py glue", "", "argument BENCHMARK: invalid choice: 'glue'"),
    "unknown score": ("evaluate.py", "--score f1", "argument --score: invalid choice"),
    "unknown flag": ("train_lm.py", "--learning_rate 3", "unrecognized arguments: --learning_rate 3"),
    "unknown device": ("train_lm.py", "--device abacus", "--device abacus: not available here"),
    "device without numbers": ("train_lm.py", "--device meta", "--device meta: not available here"),
    "ctx of 0": ("train_lm.py", "--ctx 0", "argument --ctx: invalid positive int value: '0'"),
    "ctx too small": ("train_pm.py", "--ctx 2", "no comparison to train on is left at --ctx 2"),
    "ctx too small to score": ("evaluate.py", "--ctx 2", "no comparison is left to score"),
    "batch below ctx": ("train_lm.py", "--batch 191",
                        "--batch 191 is less than one sequence of --ctx 192 tokens"),
    "batch of 0": ("train_pm.py", "--batch 0", "argument --batch: invalid positive int value"),
    "negative batch": ("train_pm.py", "--batch -4", "argument --batch: invalid positive int value"),
    "fractional batch": ("train_pm.py", "--batch 1.5", "argument --batch: invalid positive int value"),
    "negative steps": ("train_lm.py", "--steps -1", "argument --steps: invalid positive int value"),
    "steps without number": ("train_lm.py", f"--steps {10**30}",
                             "argument --steps: invalid positive int value"),
    "epochs without number": ("train_lm.py", "--epochs 1e300",
                              "argument --epochs: invalid positive float value"),
    "ctx without bounds": ("train_pm.py", f"--ctx {10**30}", "argument --ctx: invalid positive int value"),
    "epochs NaN": ("train_lm.py", "--epochs nan", "argument --epochs: invalid positive float value"),
    "epochs infinite": ("train_lm.py", "--epochs inf", "argument --epochs: invalid positive float value"),
    "lr NaN": ("train_lm.py", "--lr nan", "argument --lr: invalid positive float value"),
    "lr negative": ("train_pm.py", "--lr -0.001", "argument --lr: invalid positive float value"),
    "lr 0": ("train_pm.py", "--lr 0", "argument --lr: invalid positive float value"),
    "lr a word": ("train_pm.py", "--lr small", "argument --lr: invalid positive float value"),
    "warm-up negative": ("train_lm.py", "--warmup -0.1",
                         "argument --warmup: invalid float from 0 to 1 value"),
    "warm-up above 1": ("train_lm.py", "--warmup 200", "argument --warmup: invalid float from 0 to 1 value"),
    "warm-up NaN": ("train_lm.py", "--warmup nan", "argument --warmup: invalid float from 0 to 1 value"),
    "weight decay negative": ("train_lm.py", "--weight_decay -1",
                              "argument --weight_decay: invalid float from 0 to inf value"),
    "weight decay infinite": ("train_lm.py", "--weight_decay inf",
                              "argument --weight_decay: invalid float from 0 to inf value"),
    "clip 0": ("train_lm.py", "--clip 0", "argument --clip: invalid positive float value"),
    "seed negative": ("train_lm.py", "--seed -1", "argument --seed: invalid int from 0 to"),
    "lm weight negative": ("train_pm.py", "--lm_weight -1",
                           "argument --lm_weight: invalid float from 0 to inf value"),
    "lm weight NaN": ("train_pm.py", "--lm_weight nan",
                      "argument --lm_weight: invalid float from 0 to inf value"),
    "micro tokens 0": ("train_pm.py", "--micro_tokens 0",
                       "argument --micro_tokens: invalid positive int value"),
    "held out negative": ("train_pm.py", "--held_out -0.1", "--held_out -0.1: give a part"),
    "held out all": ("train_pm.py", "--held_out 1", "--held_out 1.0: give a part"),
    "held out NaN": ("train_pm.py", "--held_out nan", "--held_out nan: give a part"),
    "held out nearly all": ("train_pm.py", "--held_out 0.9999999",
                            "no comparison to train on is left at --ctx 192 and --held_out 0.99"),
    "held-out text of 0": ("train_lm.py", "--held_out 0", "must lie between 0 and 1, found 0.0"),
    "held-out text NaN": ("train_lm.py", "--held_out nan", "must lie between 0 and 1, found nan"),
    "more pairs than there are": ("train_pm.py", "--pairs 1000", "--pairs 1000: there are only"),
    "pairs of 0": ("train_pm.py", "--pairs 0", "argument --pairs: invalid positive int value"),
    "no such data": ("train_lm.py", "--data no/such", "no/such: no such file or folder"),
    "no such data to score": ("evaluate.py", "--data no/such", "no/such: no such file or folder"),
    "no such init": ("train_pm.py", "--init no/such", "no/such: no such checkpoint folder"),
    "no such model": ("evaluate.py", "--model no/such", "no/such: no such checkpoint folder"),
    "binary needs both": ("train_pm.py positive", "--objective binary", "every completion is good"),
}


@pytest.fixture(scope="module")
def positive_file(tmp_path_factory):
    """Comparisons whose scores are all above 0."""
    records = [{**r, "scores": [score + 1 for score in r["scores"]]} for r in make_comparisons(20)]
    return write_jsonl(tmp_path_factory.mktemp("positive") / "positive.jsonl", records)


@pytest.mark.parametrize("case", BAD_FLAGS)
def test_bad_flags(lm, pm, text_file, comparisons_file, positive_file, tmp_path, case):
    script, bad, words = BAD_FLAGS[case]
    script, _, kind = script.partition(" ")
    data = positive_file if kind == "positive" else comparisons_file
    good = {"train_lm.py": ("--data", text_file, *LM_FLAGS),
            "train_pm.py": ("--init", lm, "--data", data, *PM_FLAGS),
            "evaluate.py": (kind or "pm", "--model", pm, "--data", data)}[script]
    if kind == "fresh":
        good = ("--size", "test", "--data", data)
    refused(script, *good, "--out", tmp_path / "out", *bad.split(), names=[words])
    assert not list(tmp_path.iterdir())


def test_a_folder_without_data(lm, comparisons_file, tmp_path):
    (tmp_path / "folder").mkdir()
    write(tmp_path / "folder", "picture.png", JUNK)
    folder, out = tmp_path / "folder", tmp_path / "run"
    refused("train_lm.py", *LM_FLAGS, "--data", folder, "--out", out, names=[f"{folder}: no .jsonl"])
    refused("train_pm.py", "--init", lm, "--data", folder, "--out", out, names=[f"{folder}: no .jsonl"])
    refused("train_pm.py", "--init", folder, "--data", comparisons_file, "--out", out,
            names=[f"{folder}: no checkpoint in this folder"])


def test_an_output_that_cannot_be_written(lm, pm, text_file, comparisons_file, tmp_path):
    occupied = write(tmp_path, "file", b"content")
    flags = {"train_lm.py": ("--data", text_file, *LM_FLAGS),
             "train_pm.py": ("--init", lm, "--data", comparisons_file, *PM_FLAGS),
             "evaluate.py": ("pm", "--model", pm, "--data", comparisons_file)}
    for script in flags:
        refused(script, *flags[script], "--out", occupied / "out", names=[occupied])
    for script in ("train_lm.py", "train_pm.py"):
        refused(script, *flags[script], "--out", occupied, names=[occupied])
    refused("evaluate.py", *flags["evaluate.py"], "--out", tmp_path, names=[tmp_path])
    assert occupied.read_bytes() == b"content" and [p.name for p in tmp_path.iterdir()] == ["file"]


def test_an_output_that_is_a_device_or_a_pipe_is_left_alone(pm, comparisons_file, tmp_path):
    pipe, raw = tmp_path / "pipe", write(tmp_path, "raw.jsonl", b'{"chosen": "a", "rejected": "b"}\n')
    os.mkfifo(pipe)
    for out in (pipe, Path("/dev/full")):
        words = f"error: {out}: this is a device, a pipe or a socket"
        refused("evaluate.py", "pm", "--model", pm, "--data", comparisons_file, "--out", out, names=[words])
        assert words in run_refused("data/prepare.py", "hh", "--raw", raw, "--out", out)
        assert out.exists() and not out.is_file()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["pipe", "raw.jsonl"]


def test_a_run_into_what_is_no_folder_is_refused_before_the_work(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("nowhere")
    for out in (tmp_path / "pipe", tmp_path / "link", Path("/dev/full")):
        answer = run_refused("train_lm.py", "--data", "no such data", "--out", out)
        assert f"--out {out} exists, and is no folder" in answer
    assert sorted(p.name for p in tmp_path.iterdir()) == ["link", "pipe"]


def test_an_output_that_is_a_link_is_written_where_it_leads(pm, comparisons_file, tmp_path):
    link, raw = tmp_path / "link", write(tmp_path, "raw.jsonl", b'{"chosen": "a", "rejected": "b"}\n')
    link.symlink_to("folder/target")
    run_well("evaluate.py", "pm", "--model", pm, "--data", comparisons_file, "--out", link)
    assert link.is_symlink() and len((tmp_path / "folder/target").read_text().splitlines()) > 10
    run_well("data/prepare.py", "hh", "--raw", raw, "--out", link)
    assert link.is_symlink() and len((tmp_path / "folder/target").read_text().splitlines()) == 1
    assert [p.name for p in (tmp_path / "folder").iterdir()] == ["target"]


def test_two_preparations_of_one_file_do_not_mix(tmp_path):
    out, raw = tmp_path / "out.jsonl", write(tmp_path, "raw.jsonl", b'{"chosen": "a", "rejected": "b"}\n')
    with open(f"{out}.partial", "w") as partial:
        fcntl.flock(partial, fcntl.LOCK_EX)
        answer = run_refused("data/prepare.py", "hh", "--raw", raw, "--out", out)
        assert f"error: {out}: another process is writing this file" in answer
        assert not out.exists() and Path(f"{out}.partial").exists()
    run_well("data/prepare.py", "hh", "--raw", raw, "--out", out)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out.jsonl", "raw.jsonl"]


def small_files():
    """As if the disk were full after 20 kB."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))


def test_a_full_disk_names_the_file_and_leaves_nothing(tmp_path, comparisons_file):
    out, raw = tmp_path / "out.jsonl", tmp_path / "raw.jsonl"
    write_jsonl(raw, [{"chosen": f"{i} {'a' * 1000}", "rejected": "b"} for i in range(100)])
    answer = run_refused("data/prepare.py", "hh", "--raw", raw, "--out", out, before=small_files)
    assert f"error: {out}.partial: File too large" in answer
    assert [p.name for p in tmp_path.iterdir()] == ["raw.jsonl"]
    cache = tmp_path / "cache"
    flags = ("--size", "test", "--data", raw, "--out", tmp_path / "run")
    answer = run_refused("train_pm.py", *flags, before=small_files, HHH_LAB_CACHE=str(cache))
    assert f"error: {cache}/comparisons-" in answer and "File too large" in answer
    assert not list(cache.glob("*.partial")) and not (tmp_path / "run").exists()


def test_a_name_that_is_no_text_is_written_out(pm, comparisons_file, tmp_path):
    folder = Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9"))
    folder.mkdir()
    data = Path(shutil.copy(comparisons_file, folder / "data.jsonl"))
    flags = ("pm", "--model", pm, "--data", data, "--out", folder / "out")
    printed = run_well("evaluate.py", *flags, before=strict_output)
    assert r"/caf\udce9/data.jsonl: held-out groups" in printed and (folder / "out").exists()
    answer = run_refused("evaluate.py", "pm", "--model", folder, "--data", data)
    assert r"/caf\udce9: no checkpoint in this folder" in answer


# ------------------------------------------------------------------------------------------------------------
# Checkpoints


@pytest.fixture
def damaged(pm, tmp_path):
    """A copy of a preference model's checkpoint, to be damaged."""
    return Path(shutil.copytree(pm, tmp_path / "model"))


def refused_checkpoint(folder, comparisons_file, *names):
    flags = ("--data", comparisons_file, "--out", folder.parent / "out")
    refused("evaluate.py", "pm", "--model", folder, *flags, names=names)
    refused("train_pm.py", "--init", folder, *flags, names=names)
    assert not (folder.parent / "out").exists()


CHECKPOINT_FILES = sorted({*checkpoint.FILES} - {"train_state.pt"})


@pytest.mark.parametrize("name", CHECKPOINT_FILES)
def test_a_checkpoint_without_a_file(damaged, comparisons_file, name):
    (damaged / name).unlink()
    words = "no checkpoint in this folder" if name == "meta.json" else name
    refused_checkpoint(damaged, comparisons_file, damaged, words)


DAMAGE = {"cut": lambda content: content[:len(content) // 2], "empty": lambda content: b"",
          "junk": lambda content: JUNK}


@pytest.mark.parametrize("name", CHECKPOINT_FILES)
@pytest.mark.parametrize("damage", DAMAGE)
def test_a_checkpoint_with_a_damaged_file(damaged, comparisons_file, name, damage):
    path = damaged / name
    path.write_bytes(DAMAGE[damage](path.read_bytes()))
    refused_checkpoint(damaged, comparisons_file, path)


def change_json(path, **changes):
    content = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in content.items() if v != "remove"}))


@pytest.mark.parametrize("changes, words", [
    ({"num_hidden_layers": 3}, "does not fit config.json"),
    ({"num_hidden_layers": 1}, "does not fit config.json"),
    ({"hidden_size": 128, "intermediate_size": 320}, "does not fit config.json"),
    ({"vocab_size": 640}, "the tokenizer has a table of 320, the model of 640"),
    ({"intermediate_size": 128}, "does not fit config.json"),
    ({"num_key_value_heads": 1}, "does not fit config.json"),
    ({"num_key_value_heads": 3}, "2 heads of width 32 do not go with 3 key heads"),
    ({"hidden_size": "wide"}, "not a config this project can read"),
    ({"num_hidden_layers": "two"}, "not a config this project can read"),
    ({"num_attention_heads": 0}, "not a config this project can read"),
    ({"rms_norm_eps": "remove"}, "not a config this project can read (KeyError: 'rms_norm_eps')"),
    ({"rms_norm_eps": None}, "not a config this project can read"),
    ({"rms_norm_eps": 1e400}, "rope_theta or rms_norm_eps is out of range"),
    ({"rope_theta": None}, "not a config this project can read"),
    ({"rope_theta": 0}, "rope_theta or rms_norm_eps is out of range"),
    ({"rope_theta": float("nan")}, "rope_theta or rms_norm_eps is out of range"),
    ({"rope_scaling": {"rope_type": "linear", "factor": 0}}, "rope_scaling has numbers that are not above 0"),
    ({"hidden_size": 10**30}, "its sizes are not all whole numbers above 0"),
    ({"tie_word_embeddings": "no"}, "tie_word_embeddings is neither true nor false"),
    ({"architectures": ["LlamaForCausalLM"]}, "meta.json: its kind is 'pm', but that of config.json is 'lm'"),
], ids=lambda x: str(x)[:40] if isinstance(x, dict) else "")
def test_a_checkpoint_of_another_shape(damaged, comparisons_file, changes, words):
    change_json(damaged / "config.json", **changes)
    refused_checkpoint(damaged, comparisons_file, damaged, words)


@pytest.mark.parametrize("changes, words", [
    ({"kind": "zebra"}, "its kind is 'zebra', but that of config.json is 'pm'"),
    ({"kind": "lm"}, "its kind is 'lm', but that of config.json is 'pm'"),
    ({"kind": None}, '"kind" must be a text'),
    ({"objective": "remove"}, 'no "objective", which must be a text'),
    ({"flags": "remove"}, 'no "flags", which must be an object'),
    ({"data": 5}, '"data" must be a text'),
    ({"metrics": []}, '"metrics" must be an object'),
    ({"step": 2.5}, '"step" must be a whole number'),
    ({"step": True}, '"step" must be a whole number'),
    ({"step": 9}, "step 9 is none of a run of 8 steps"),
    ({"step": -1}, "step -1 is none of a run of 8 steps"),
    ({"trained_on": [5]}, '"trained_on" must be a list, each item an object'),
    ({"trained_on": [{}]}, 'trained_on: no "file"'),
    ({"eoc": "no"}, '"eoc" must be true or false or missing'),
    ({"lm_lr": "fast"}, '"lm_lr" must be a finite number or missing'),
], ids=str)
def test_a_checkpoint_that_remembers_nonsense(damaged, comparisons_file, changes, words):
    change_json(damaged / "meta.json", **changes)
    refused_checkpoint(damaged, comparisons_file, damaged / "meta.json", words)


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(damaged, comparisons_file, number):
    path = damaged / "model.safetensors"
    state = safetensors.torch.load_file(path)
    state["model.norm.weight"][3] = number
    safetensors.torch.save_file(state, path)
    refused_checkpoint(damaged, comparisons_file, path, "model.norm.weight holds numbers that are not finite")


def test_a_checkpoint_with_another_models_weights(damaged, lm, comparisons_file):
    shutil.copy(lm / "model.safetensors", damaged)
    names = (damaged / "model.safetensors", "does not fit config.json", "score.weight")
    refused("evaluate.py", "pm", "--model", damaged, "--data", comparisons_file, names=names)
    state = safetensors.torch.load_file(lm / "model.safetensors")
    safetensors.torch.save_file({f"module.{k}": v for k, v in state.items()}, damaged / "model.safetensors")
    refused_checkpoint(damaged, comparisons_file, damaged / "model.safetensors", "does not fit config.json")


def test_a_checkpoint_with_another_tokenizer(damaged, comparisons_file):
    tokens = [bytes([byte]) for byte in range(256)]
    Tokenizer(from_ranks(tokens + [b"th"])).save(damaged)  # the table has room for it, so the sizes agree
    refused_checkpoint(damaged, comparisons_file, damaged / "tokenizer.json",
                       "not the tokenizer that this model was trained with")
    Tokenizer(from_ranks(tokens + [b"a%d" % i for i in range(400)])).save(damaged)
    words = "the tokenizer has a table of 704, the model of 320"
    refused_checkpoint(damaged, comparisons_file, damaged, words)


def test_a_vocabulary_file_with_a_bad_line(text_file, tmp_path):
    path = tmp_path / "bad.tiktoken"
    path.write_text("YQ== 0\nnonsense\n")
    refused("train_lm.py", "--data", text_file, *LM_FLAGS, "--tokenizer", path, "--out", tmp_path / "run",
            names=[f"{path}:2: "])


@pytest.mark.parametrize("damage", [*DAMAGE, "missing"])
def test_a_run_whose_state_is_damaged_cannot_be_resumed(damaged, lm, comparisons_file, damage):
    path = damaged / "train_state.pt"
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(DAMAGE[damage](path.read_bytes()))
    before = {p.name: p.read_bytes() for p in damaged.iterdir()}
    flags = ("--init", lm, "--data", comparisons_file, *PM_FLAGS)
    refused("train_pm.py", *flags, "--out", damaged, "--resume", names=[path])
    assert {p.name: p.read_bytes() for p in damaged.iterdir()} == before


def other_shapes(optimizer):
    for state in optimizer["state"].values():
        state["exp_avg"] = state["exp_avg"].flatten()[:1]


@pytest.mark.parametrize("damage, words", [
    (lambda state: [state], 'no "optimizer"'),
    (lambda state: {"optimizer": 5}, '"optimizer" must be an object'),
    (lambda state: {"optimizer": {}}, 'optimizer: no "state"'),
    (lambda state: other_shapes(state["optimizer"]) or state, "is not of the weights beside it"),
    (lambda state: state["optimizer"]["state"].clear() or state, "is not of the weights beside it")])
def test_a_run_whose_state_is_of_another_form_cannot_be_resumed(damaged, lm, comparisons_file, damage, words):
    state = damage(torch.load(damaged / "train_state.pt"))
    torch.save(state, damaged / "train_state.pt")
    change_json(damaged / "meta.json", step=4)
    flags = ("--init", lm, "--data", comparisons_file, *PM_FLAGS, "--out", damaged, "--resume")
    refused("train_pm.py", *flags, names=[damaged / "train_state.pt", words])


def test_a_log_with_nonsense_in_it_is_gone_on_with(damaged, lm, comparisons_file):
    """Lines that are no steps are left out, as is one that was being written when a run was killed."""
    good = b"".join(b'{"step": %d, "loss": 1}\n' % step for step in range(1, 5))
    bad = b'\xff\n[1]\n5\nnull\n{"step": "x"}\n{"step": null}\n{"loss": 1}\n' + b"[" * 100_000 + b"\n"
    (damaged / "metrics.jsonl").write_bytes(good + bad)
    change_json(damaged / "meta.json", step=4)
    flags = ("--init", lm, "--data", comparisons_file, *PM_FLAGS, "--out", damaged, "--resume")
    assert "resumed after step 4" in run_well("train_pm.py", *flags)
    steps = [record["step"] for record in metrics(damaged) if "loss" in record]
    assert steps == list(range(1, 9))


def test_published_comparisons_of_another_form_are_refused(lm, tmp_path):
    path = DATA / "summarize-from-feedback" / "summeval_comparisons.jsonl.xz"
    if not path.exists():
        pytest.skip("no published data here")
    refused("train_pm.py", "--init", lm, "--data", path, "--out", tmp_path / "run",
            names=[f'{path}:1: no "chosen"'])


# ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("script", ["train_lm.py", "train_pm.py", "distill.py", "evaluate.py"])
def test_help_explains_every_flag(script):
    text = " ".join(run_well(script, *["pm"] * (script == "evaluate.py"), "-h", COLUMNS="1000").split())
    for flag in ("--data", "--ctx", "--out", "--device", "--dtype", "--micro_tokens"):
        assert flag in text
    if script != "evaluate.py":
        assert text.count("(default:") >= 18 and " in an optimizer step, over all ranks" in text


@pytest.mark.parametrize("error, words", [
    (MemoryError(), "out of memory (); give a smaller"),
    (RuntimeError("CUDA out of memory\nhere"), "out of memory (CUDA out of memory); give a smaller"),
    (InputError("data.jsonl:3: no text"), "data.jsonl:3: no text"),
    (InputError("data.jsonl:3: not \x1b[2J\nnor \udce9"), r"data.jsonl:3: not \x1b[2J\nnor \udce9"),
    (InputError("a" * 401 + "b" * 5000 + "c" * 150), "a" * 400 + " … " + "c" * 150),
    (OSError(28, "No space left on device", "file"), "file: No space left on device")])
def test_what_the_user_can_mend_gives_one_line(capsys, monkeypatch, error, words):
    def main():
        raise error
    monkeypatch.setattr("sys.argv", ["/folder/script.py"])
    with pytest.raises(SystemExit, match="2"):
        run_main(main)
    assert re.fullmatch(rf"script.py: error: {re.escape(words)}.*\n", capsys.readouterr().err)
    error = TypeError("our own mistake")
    with pytest.raises(TypeError):
        run_main(main)


def test_a_good_run_leaves_only_its_checkpoint(pm):
    assert {p.name for p in pm.iterdir()} == {*checkpoint.FILES, "metrics.jsonl"}
