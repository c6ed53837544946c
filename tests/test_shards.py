"""Checkpoints of models that are sharded over ranks: what is on disk, who can go on from it, how much memory
writing and reading takes, and what a run says that cannot go on."""
import ctypes
import functools
import itertools
import os
import pickle
import re
import resource
import shutil
import signal
import sys
import threading
import warnings
from pathlib import Path

import pytest
import safetensors.torch
import torch
import torch.distributed.checkpoint as dcp
from conftest import (GENTLE, make_comparisons, metrics, run, run_ranks, run_refused, run_well, slow,
                      stop_in_one_line, write_jsonl)
from test_bad_input import DAMAGE, change_json
from test_ranks import assert_same

import checkpoint
import trainer
from formats import hf_folder, train_state

N_STEPS = 5


@pytest.fixture(scope="module")
def flags(lm, comparisons_file):
    """A run that saves after each step."""
    return ("train_pm.py", "--init", lm, "--data", comparisons_file, *GENTLE, "--steps", N_STEPS,
            "--eval_every", 2, "--save_every", 1)


@pytest.fixture(scope="module")
def uninterrupted(flags, tmp_path_factory):
    """What four ranks make of it, with two copies of the model."""
    out = tmp_path_factory.mktemp("shards") / "run"
    run_ranks(*flags, "--shard", 2, "--out", out, n=4)
    return out


def stop_after(step):
    """In a rank's process: ask for a stop, once the step before this one is done."""
    log = trainer.Log.step

    def changed(self, number, *rest):
        log(self, number, *rest)
        if number == step - 1:
            os.kill(os.getpid(), signal.SIGTERM)
    trainer.Log.step = changed


@pytest.fixture(scope="module")
def stopped(flags, tmp_path_factory):
    """The same run, stopped after three steps."""
    out = tmp_path_factory.mktemp("shards") / "stopped"
    run_ranks(*flags, "--shard", 2, "--out", out, n=4, before=functools.partial(stop_after, 3))
    return out


@pytest.fixture
def copy(stopped, tmp_path):
    """A copy of the stopped run that a test may go on with, or damage."""
    return shutil.copytree(stopped, tmp_path / "copy")


def names_in(folder):
    return sorted(path.name for path in folder.iterdir())


# ------------------------------------------------------------------------------------------------------------
# What is on disk, and who can go on from it


def test_each_rank_writes_its_part_of_the_optimizers_state(stopped, uninterrupted):
    others = {*checkpoint.FILES, ".metadata", "metrics.jsonl"} - {"train_state.pt"}
    for folder in (stopped / "step-3", uninterrupted):
        parts = set(names_in(folder)) - others
        assert all(re.fullmatch(r"__[0-3]_0\.distcp", name) for name in parts)
        sizes = [(folder / name).stat().st_size for name in parts]
        n_bytes = 8 * sum(p.numel() for p in checkpoint.load(folder)[0].parameters())
        # With two ranks for each half, no rank has more than half, and what two have is written once.
        assert n_bytes < sum(sizes) < 1.6 * n_bytes and max(sizes) < 0.8 * n_bytes
    assert names_in(stopped) == ["metrics.jsonl", "step-3"]


def test_a_run_that_was_stopped_goes_on_bit_for_bit(flags, copy, uninterrupted):
    assert "resumed after step 3" in run_ranks(*flags, "--shard", 2, "--out", copy, "--resume", n=4)
    assert metrics(copy) == metrics(uninterrupted)
    assert (copy / "model.safetensors").read_bytes() == (uninterrupted / "model.safetensors").read_bytes()
    states = [read_optimizer(folder) for folder in (copy, uninterrupted)]
    assert all(torch.equal(tensor, states[1][name]) for name, tensor in states[0].items())


def read_optimizer(folder):
    """{name: whole tensor} of a sharded state."""
    contents = train_state.ShardReader(folder).read_metadata().state_dict_metadata
    state = {name: torch.empty(record.size) for name, record in contents.items()}
    with warnings.catch_warnings(action="ignore"):  # torch warns that this is one process
        dcp.load(state, checkpoint_id=folder)
    return state


@pytest.mark.parametrize("n, shard", [
    (1, 1), pytest.param(2, 1, marks=slow), (2, 2), pytest.param(4, 4, marks=slow)])
def test_another_number_of_ranks_or_shards_goes_on(flags, copy, uninterrupted, n, shard):
    flags = (*flags, "--shard", shard, "--out", copy, "--resume")
    printed = run_well(*flags) if n == 1 else run_ranks(*flags, n=n)
    assert "resumed after step 3" in printed
    assert_same(uninterrupted, copy)
    assert (copy / "train_state.pt").is_file() == (shard == 1) != (copy / ".metadata").is_file()


def test_sharded_ranks_go_on_from_one_processs_checkpoint(flags, uninterrupted, tmp_path):
    stopped = run(*flags, "--out", tmp_path / "out", before=functools.partial(stop_after, 2))
    assert stopped.returncode == 128 + signal.SIGTERM
    printed = run_ranks(*flags, "--shard", 4, "--out", tmp_path / "out", "--resume", n=4)
    assert "resumed after step 2" in printed
    assert_same(uninterrupted, tmp_path / "out")


def small_files():
    """In a rank's process: a file of weights holds 100,000 bytes."""
    hf_folder.SHARD_BYTES = 100_000


def test_a_large_sharded_model_is_written_in_several_files(flags, uninterrupted, tmp_path):
    run_ranks(*flags, "--shard", 2, "--out", tmp_path / "out", before=small_files)
    sizes = [path.stat().st_size for path in tmp_path.glob("out/model-*.safetensors")]
    assert len(sizes) > 3 and max(sizes) < 105_000
    assert_same(uninterrupted, tmp_path / "out")


# ------------------------------------------------------------------------------------------------------------
# Memory


def print_memory():
    """In a rank's process: print by how many bytes each of these functions raises the memory in use, which is
    looked at again and again. Pages of files in it do not count, as the system drops them when it likes."""
    libc = ctypes.CDLL(None)

    def in_use():
        return 1024 * int(re.search(r"RssAnon:\s*(\d+)", Path("/proc/self/status").read_text())[1])

    def measured(name, function):
        def changed(*args, **named):
            libc.malloc_trim(0)  # what was freed is given back, as it could be used again without being seen
            begun, seen, is_done = in_use(), [0], threading.Event()

            def look():
                while not is_done.wait(0.001):
                    seen.append(in_use() - begun)
            thread = threading.Thread(target=look)
            thread.start()
            result = function(*args, **named)
            is_done.set()
            thread.join()
            print(f"{name}: {max(seen)} bytes more", flush=True)
            return result
        return changed

    for module, name in ((trainer, "place"), (checkpoint, "load_optimizer"), (checkpoint, "save"),
                         (checkpoint, "finish")):
        setattr(module, name, measured(name, getattr(module, name)))


@slow
@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="measured as Linux and glibc allow it")
def test_no_rank_holds_the_whole_model(text_file, tmp_path):
    """13M parameters on four ranks: drawn and saved, read anew, and trained on from a file in bf16. Rank 0,
    whose output is read here, is the one that writes the weights."""
    flags = ("train_lm.py", "--data", text_file, "--tokenizer", "bytes", "--ctx", 32, "--batch", 128,
             "--held_out", 0.1, "--dtype", "fp32", "--eval_every", 0)
    four, fresh = functools.partial(run_ranks, *flags, "--shard", 4, n=4), tmp_path / "fresh"
    printed = four("--size", "13m", "--steps", 1, "--out", fresh, before=print_memory)
    printed += four("--size", "13m", "--steps", 1, "--out", fresh, "--resume", before=print_memory)
    weights = safetensors.torch.load_file(fresh / "model.safetensors")
    n_bytes = 4 * sum(tensor.numel() for tensor in weights.values())
    halved = {name: tensor.bfloat16() for name, tensor in weights.items()}
    safetensors.torch.save_file(halved, fresh / "model.safetensors")
    printed += four("--init", fresh, "--steps", 1, "--out", tmp_path / "on", before=print_memory)
    raised = {name: max(int(n) for n in re.findall(rf"{name}: (\d+) bytes more", printed))
              for name in ("place", "load_optimizer", "save", "finish")}
    assert n_bytes > 50e6
    assert raised["place"] < 0.5 * n_bytes, raised  # a quarter of it stays
    assert raised["load_optimizer"] < 0.8 * n_bytes, raised  # half of it stays
    assert raised["save"] < 0.6 * n_bytes and raised["finish"] < 0.2 * n_bytes, raised


# ------------------------------------------------------------------------------------------------------------
# What goes wrong. Four ranks, of which the last but one has the fault; then the others must not wait for it.


def one_of_four(fault):
    return [None, None, fault, None]


def test_a_shard_of_three_ranks_does_not_divide_four(flags, tmp_path):
    line = stop_in_one_line(*flags, "--shard", 3, "--out", tmp_path / "out", before=[None] * 4)
    assert "--shard 3: the number of ranks has to be a multiple of it, and is 4" in line


def other_data(path):
    """In a rank's process: --data names this file."""
    sys.argv[sys.argv.index("--data") + 1] = str(path)


def other_torch():
    """In a rank's process: as if torch were of another version."""
    torch.__version__ = "2.9.0"


def test_ranks_with_other_data_or_another_torch_are_refused(flags, tmp_path):
    path = write_jsonl(tmp_path / "other.jsonl", make_comparisons(seed=1))
    for fault, words in ((functools.partial(other_data, path), "the content of --data is "),
                         (other_torch, "the version of torch is ")):
        line = stop_in_one_line(*flags, "--shard", 2, "--out", tmp_path / "out", before=one_of_four(fault))
        assert words in line and "on rank 2; it has to be the same on all ranks" in line
        assert not (tmp_path / "out").exists()


def test_a_checkpoint_of_another_torch_is_gone_on_with_and_named(flags, copy, uninterrupted):
    change_json(copy / "step-3/meta.json", versions={"torch": "2.9.0"})
    printed = run_ranks(*flags, "--shard", 2, "--out", copy, "--resume")
    assert f"note: {copy} was saved by torch 2.9.0; with {torch.__version__} the run goes on" in printed
    assert_same(uninterrupted, copy)


class Villain:
    def __reduce__(self):
        return os.mkdir, ("/tmp/this must not be",)


def without_a_part(folder):
    (folder / "__2_0.distcp").unlink()


def with_a_cut_part(folder):
    path = folder / "__1_0.distcp"
    path.write_bytes(path.read_bytes()[:20_000])


def with_a_villain(folder):
    (folder / ".metadata").write_bytes(pickle.dumps(Villain()))


def with_junk(folder):
    (folder / ".metadata").write_bytes(DAMAGE["junk"](b""))


def with_another_models_parts(folder):
    """A tensor is called as another one was."""
    path = folder / ".metadata"
    path.write_bytes(path.read_bytes().replace(b"1.exp_avg", b"9.exp_avg"))


@pytest.mark.parametrize("damage, words", [
    (without_a_part, "__2_0.distcp"), (with_a_cut_part, ""), (with_a_villain, "posix.mkdir is not expected"),
    (with_junk, ""), (with_another_models_parts, "1.exp_avg")])
def test_a_sharded_state_that_is_damaged_cannot_be_gone_on_with(flags, copy, damage, words):
    """By one process and by four ranks."""
    damage(copy / "step-3")
    before = {path.name: path.read_bytes() for path in (copy / "step-3").iterdir()}
    for line in (run_refused(*flags, "--out", copy, "--resume"),
                 stop_in_one_line(*flags, "--shard", 2, "--out", copy, "--resume", before=[None] * 4)):
        assert f"error: {copy}/step-3" in line and "damaged" in line and words in line
    assert {path.name: path.read_bytes() for path in (copy / "step-3").iterdir()} == before
    assert not Path("/tmp/this must not be").exists()


def full_disk_at_save(n, n_bytes):
    """In a rank's process: when it saves for the n-th time, no file can grow beyond n_bytes."""
    save, count = checkpoint.save, itertools.count(1)

    def changed(*args):
        if next(count) == n:
            resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, resource.RLIM_INFINITY))
        return save(*args)
    checkpoint.save = changed


@pytest.mark.parametrize("rank", [0, pytest.param(2, marks=slow)])
def test_a_full_disk_of_one_rank_leaves_the_checkpoint_before(flags, uninterrupted, tmp_path, rank):
    """The first rank writes the weights, each one its part of the optimizer's state."""
    out, before = tmp_path / "out", [None] * 4
    before[rank] = functools.partial(full_disk_at_save, 3, 50_000)
    line = stop_in_one_line(*flags, "--shard", 4, "--out", out, before=before)
    assert f"error: {out}: the checkpoint could not be written" in line and "the one before it" in line
    assert names_in(out) == ["metrics.jsonl", "step-2"] and checkpoint.load(out)[2]["step"] == 2
    run_ranks(*flags, "--shard", 2, "--out", out, "--resume")
    assert_same(uninterrupted, out)


def kill_in(module, name, n=1):
    """In a rank's process: kill it when it calls this function for the n-th time."""
    module, count = sys.modules[module], itertools.count(1)
    function = getattr(module, name)

    def changed(*args, **named):
        if next(count) == n:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args, **named)
    setattr(module, name, changed)


@pytest.mark.parametrize("rank, moment", [
    pytest.param(0, ("os", "fsync", 30), marks=slow), (2, ("os", "fsync", 4)),
    pytest.param(1, ("formats.hf_folder", "whole", 60), marks=slow)],
                         ids=["rank 0 writing", "rank 2 writing", "rank 1 gathering"])
def test_a_rank_that_is_killed_while_saving_leaves_the_checkpoint_before(
        flags, uninterrupted, tmp_path, rank, moment):
    out, before = tmp_path / "out", [None] * 4
    before[rank] = functools.partial(kill_in, *moment)
    line = stop_in_one_line(*flags, "--shard", 4, "--out", out, before=before)
    assert "error: another rank has ended, or does not answer" in line
    step = checkpoint.load(out)[2]["step"]
    assert 0 < step < N_STEPS
    assert f"resumed after step {step}" in run_ranks(*flags, "--shard", 2, "--out", out, "--resume")
    assert_same(uninterrupted, out)


def test_a_rank_that_is_killed_while_loading_is_not_taken_for_damage(flags, copy):
    fault = functools.partial(kill_in, "torch.distributed.checkpoint", "load")
    line = stop_in_one_line(*flags, "--shard", 2, "--out", copy, "--resume", before=one_of_four(fault))
    assert "error: another rank has ended, or does not answer" in line
