"""Runs that are stopped, killed, resumed and refused: what is on disk at each moment, and what the user is
told."""
import functools
import itertools
import math
import os
import resource
import shutil
import signal
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import (LM_FLAGS, Running, losses, make_comparisons, metrics, processes, rankable_comparisons,
                      read_meta, run, run_ranks, run_refused, run_well, write_jsonl)

import checkpoint
import trainer
from data.errors import InputError
from data.packing import step_examples
from formats import train_state
from model import GPT

FLAGS = ("--steps", 12, "--batch", 8, "--held_out", 0.3, "--dtype", "fp32", "--lr", 0.003,
         "--schedule", "cosine", "--warmup", 0.2, "--eval_every", 4, "--save_every", 3)


@pytest.fixture(scope="module")
def run_flags(lm, comparisons_file):
    """A run of 12 steps over about two epochs, which saves after each third."""
    return ("--init", lm, "--data", comparisons_file, *FLAGS)


@pytest.fixture(scope="module")
def uninterrupted(run_flags, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "uninterrupted"
    run_well("train_pm.py", *run_flags, "--out", out)
    return out


def names_in(folder):
    return sorted(path.name for path in folder.iterdir())


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def assert_same_run(a, b):
    """Bit for bit: weights, optimizer state and every figure that was logged; and nothing else lies about."""
    assert (a / "model.safetensors").read_bytes() == (b / "model.safetensors").read_bytes()
    assert metrics(a) == metrics(b)
    states = [torch.load(out / "train_state.pt", weights_only=True) for out in (a, b)]
    assert str(states[0]) == str(states[1])
    assert names_in(a) == names_in(b) == sorted([*checkpoint.FILES, "metrics.jsonl"])
    metas = [read_meta(out) for out in (a, b)]
    for meta in metas:
        del meta["flags"]["out"], meta["flags"]["resume"]
    assert metas[0] == metas[1]


# ------------------------------------------------------------------------------------------------------------
# What happens to a run: functions that are called in its process, before the script starts


def before_each_write(action):
    """Call action() before every operation by which files appear, change or go."""
    events = {"os.rename", "os.remove", "os.link", "os.mkdir", "os.rmdir", "os.truncate"}

    def hook(event, args):
        opens_to_write = event == "open" and isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR)
        if event in events or opens_to_write:
            action()
    sys.addaudithook(hook)


def kill_this_process():
    os.kill(os.getpid(), signal.SIGKILL)


def kill_at_write(n):
    """Kill the process before its n-th operation on files."""
    count = itertools.count(1)

    def action():
        if next(count) == n:
            kill_this_process()
    before_each_write(action)


def before_optimizer_step(action):
    """Call action(n) before the n-th optimizer step that the process takes."""
    step, count = torch.optim.AdamW.step, itertools.count(1)

    def changed(*args, **kwargs):
        action(next(count))
        return step(*args, **kwargs)
    torch.optim.AdamW.step = changed


def kill_at_step(n):
    """Kill the process inside the n-th optimizer step that it takes."""
    def action(step):
        if step == n:
            kill_this_process()
    before_optimizer_step(action)


def slow_steps():
    before_optimizer_step(lambda step: time.sleep(0.1))


def hold_locks_long():
    """Whoever asks whether another run is writing takes half a second."""
    lock = trainer.lock_folder

    def slow(out):
        folder = lock(out)
        time.sleep(0.5)
        return folder
    trainer.lock_folder = slow


def give_nan_for_tildes():
    """In training the hidden states of a row with a "~" are NaN."""
    forward = GPT.forward

    def changed(self, tokens, *rest, **named):
        is_bad = self.training and (tokens == ord("~")).any()
        return forward(self, tokens, *rest, **named) * (math.nan if is_bad else 1)
    GPT.forward = changed


def limit_file_size(n_bytes):
    """From the second checkpoint on no file can grow beyond n_bytes. To those who write it looks like a full
    disk."""
    save, count = checkpoint.save, itertools.count(1)

    def changed(*args):
        if next(count) == 2:
            resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, resource.RLIM_INFINITY))
        return save(*args)
    checkpoint.save = changed


def no_room_for_meta():
    """In the second checkpoint there is no room left for meta.json."""
    write, count = checkpoint.write_file, itertools.count(1)

    def changed(path, content):
        if path.name == "meta.json" and next(count) == 2:
            raise OSError(28, "No space left on device")
        write(path, content)
    checkpoint.write_file = changed


# ------------------------------------------------------------------------------------------------------------
# Killed and gone on with


def killed(script, *flags, kill, n):
    """Run a script that is killed at its n-th step or write."""
    done = run(script, *flags, before=functools.partial(kill, n))
    assert done.returncode == -signal.SIGKILL, done


def test_resumed_after_kills_equals_uninterrupted(run_flags, uninterrupted, tmp_path):
    """Killed again and again at some step or some moment of writing, and always gone on with."""
    out, n_kills = tmp_path / "killed", 0
    moments = [(kill_at_write, 1), (kill_at_step, 2), (kill_at_step, 5), (kill_at_write, 7),
               (kill_at_write, 13), (kill_at_write, 20), (kill_at_write, 29), (kill_at_step, 2),
               (kill_at_write, 35), (kill_at_write, 44), (kill_at_write, 62)]
    for kill, n in moments:
        done = run("train_pm.py", *run_flags, "--out", out, "--resume", before=functools.partial(kill, n))
        assert done.returncode in (0, -signal.SIGKILL), done
        n_kills += done.returncode != 0
    run_well("train_pm.py", *run_flags, "--out", out, "--resume")
    assert n_kills >= 9
    assert_same_run(out, uninterrupted)


def test_resume_before_the_first_checkpoint_begins_anew(run_flags, uninterrupted, tmp_path):
    out = tmp_path / "early"
    killed("train_pm.py", *run_flags, "--out", out, kill=kill_at_step, n=2)
    assert names_in(out) == ["metrics.jsonl"] and len(losses(out)) == 1
    run_well("train_pm.py", *run_flags, "--out", out, "--resume")
    assert_same_run(out, uninterrupted)


def test_lm_training_resumes_bit_for_bit(lm, text_file, tmp_path):
    out = tmp_path / "killed"
    args = ("--data", text_file, *LM_FLAGS, "--out", out)
    killed("train_lm.py", *args, kill=kill_at_step, n=8)
    assert names_in(out) == ["metrics.jsonl", "step-6"]
    run_well("train_lm.py", *args, "--resume")
    assert_same_run(out, lm)


def test_two_ranks_resume_where_a_rank_has_nothing_to_do(lm, tmp_path):
    """The first step after going on is an epoch's last, which has one comparison for two ranks."""
    data = write_jsonl(tmp_path / "five.jsonl", rankable_comparisons(5))
    args = ("--init", lm, "--data", data, "--held_out", 0, "--dtype", "fp32", "--batch", 2, "--save_every", 1)
    killed("train_pm.py", *args, "--out", tmp_path / "two", kill=kill_at_step, n=3)
    assert "resumed after step 2" in run_ranks("train_pm.py", *args, "--out", tmp_path / "two", "--resume",
                                                  before=hold_locks_long)
    run_well("train_pm.py", *args, "--out", tmp_path / "one")
    assert losses(tmp_path / "one") == pytest.approx(losses(tmp_path / "two"), rel=1e-4)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_ends_well(run_flags, uninterrupted, tmp_path, number):
    out = tmp_path / "stopped"
    running = Running("train_pm.py", *run_flags, "--out", out, before=slow_steps)
    running.wait_for("step 1/12")
    os.kill(running.process.pid, number)
    done = running.result()
    assert done.returncode == 128 + number and done.stderr == ""
    step = len(losses(out))
    assert step < 12 and f"stopped after step {step} of 12; go on with --resume" in done.stdout
    assert checkpoint.load(out)[2]["step"] == step
    printed = run_well("train_pm.py", *run_flags, "--out", out, "--resume")
    assert f"resumed after step {step}" in printed
    assert_same_run(out, uninterrupted)


def save_two_checkpoints(lm, out, moments):
    """In a process of its own: save two checkpoints of a run and end it. Before each operation on files the
    folder is copied, just as a crash at that moment would leave it, to moments/1, moments/2, …"""
    model, tokenizer, meta = checkpoint.load(lm)
    optimizer = {"optimizer": {"state": {}, "param_groups": []}}
    count, copying = itertools.count(1), []

    def copy_folder():
        if not copying:
            copying.append(True)  # as copying writes files, too
            shutil.copytree(out, moments / str(next(count)))
            copying.clear()
    before_each_write(copy_folder)
    for step in (1, 2):
        with torch.no_grad():
            model.model.norm.weight.fill_(step)
        checkpoint.save(out, model.config, model.state_dict(), tokenizer, meta | {"step": step},
                        optimizer | {"step": step})
    checkpoint.finish(out)


def test_a_crash_at_any_moment_of_saving_leaves_the_last_good_checkpoint(lm, tmp_path):
    out, moments = tmp_path / "out", tmp_path / "moments"
    out.mkdir()
    process = processes.Process(target=save_two_checkpoints, args=(lm, out, moments))
    process.start()
    process.join()
    assert process.exitcode == 0
    steps = []
    for n in range(1, 1 + len(list(moments.iterdir()))):
        left = moments / str(n)
        try:
            model, _, meta = checkpoint.load(left)
        except InputError as error:
            assert "no checkpoint in this folder" in str(error)
            steps.append(0)
        else:
            step = train_state.read(checkpoint.find(left))["step"]
            assert meta["step"] == model.model.norm.weight[0] == step
            steps.append(step)
    assert steps == sorted(steps) and set(steps) == {0, 1, 2} and len(steps) > 40
    assert names_in(out) == sorted(checkpoint.FILES)


# ------------------------------------------------------------------------------------------------------------
# Folders that hold a run already


def test_resume_of_a_run_that_is_done_changes_nothing(run_flags, uninterrupted):
    before = contents(uninterrupted)
    assert "done" in run_well("train_pm.py", *run_flags, "--out", uninterrupted, "--resume")
    assert contents(uninterrupted) == before


@pytest.mark.parametrize("changed, named", [
    (("--lr", 0.01), "--lr 0.003"), (("--batch", 16), "--batch 8"), (("--seed", 1), "--seed 0"),
    (("--steps", 13), "--steps 12"), (("--objective", "imitation"), "kind pm"),
    (("--max_completions", 3), "without --max_completions"), (("--binarise",), "without --binarise")])
def test_resume_with_other_flags_is_refused(run_flags, uninterrupted, changed, named):
    before = contents(uninterrupted)
    line = run_refused("train_pm.py", *run_flags, *changed, "--out", uninterrupted, "--resume")
    assert f"error: {uninterrupted}: --resume goes on as the run began: " in line and named in line
    assert contents(uninterrupted) == before


def test_resume_with_other_data_is_refused(run_flags, uninterrupted, tmp_path):
    other = write_jsonl(tmp_path / "other.jsonl", make_comparisons(seed=1))
    line = run_refused("train_pm.py", *run_flags, "--data", other, "--out", uninterrupted, "--resume")
    assert "--data" in line


def test_a_folder_with_a_run_is_refused_without_resume(run_flags, uninterrupted, text_file):
    before = contents(uninterrupted)
    for args in (("train_pm.py", *run_flags), ("train_lm.py", "--data", text_file)):
        line = run_refused(*args, "--out", uninterrupted)
        assert f"error: {uninterrupted}: holds a run already; give --resume" in line
    assert contents(uninterrupted) == before


def test_a_second_run_on_one_folder_names_the_first(run_flags, uninterrupted, tmp_path):
    """With and without --resume. The first goes on undisturbed."""
    out = tmp_path / "run"
    first = Running("train_pm.py", *run_flags, "--out", out, before=slow_steps)
    first.wait_for("step 1/12")
    os.kill(first.process.pid, signal.SIGSTOP)
    for flags in ((), ("--resume",)):
        line = run_refused("train_pm.py", *run_flags, "--out", out, *flags)
        assert f"{out}: process {first.process.pid} is writing" in line
    os.kill(first.process.pid, signal.SIGCONT)
    assert first.result().returncode == 0
    assert_same_run(out, uninterrupted)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "step-500/shard.distcp"])
def test_a_folder_with_another_programs_model_is_refused_and_left_alone(run_flags, tmp_path, name):
    """It may be the one that --init names."""
    path = tmp_path / "theirs" / name
    path.parent.mkdir(parents=True)
    path.write_text("theirs")
    line = run_refused("train_pm.py", *run_flags, "--out", tmp_path / "theirs")
    assert f"theirs: holds {name.partition('/')[0]}, of a model or a run of another program" in line
    assert path.read_text() == "theirs"


def test_data_files_may_move_before_a_run_goes_on(lm, text_file, tmp_path):
    moved = shutil.copy(text_file, tmp_path / "moved.jsonl")
    flags = ("--init", lm, "--steps", 1, "--batch", 256, "--ctx", 128, "--out", tmp_path / "run")
    run_well("train_lm.py", *flags, "--data", text_file)
    assert "done" in run_well("train_lm.py", *flags, "--data", moved, "--resume")


@pytest.mark.parametrize("kind", ["file", "device", "below a file"])
def test_an_out_that_is_no_folder_is_refused_and_left_alone(run_flags, tmp_path, kind):
    file = tmp_path / "file"
    file.write_text("mine")
    out = {"file": file, "device": "/dev/full", "below a file": file / "run"}[kind]
    assert f"--out {out}" in run_refused("train_pm.py", *run_flags, "--out", out)
    assert file.read_text() == "mine" and not Path("/dev/full").is_file()


# ------------------------------------------------------------------------------------------------------------
# What goes wrong in a run


def test_an_absurd_learning_rate_ends_in_words(run_flags, tmp_path):
    out = tmp_path / "run"
    line = run_refused("train_pm.py", *run_flags, "--lr", 1e30, "--warmup", 0, "--out", out, exit_code=3)
    assert "error: the loss or gradient of step 2 is not finite" in line and "smaller --lr" in line
    assert names_in(out) == ["metrics.jsonl"] and len(losses(out)) == 1


def test_a_comparison_with_a_loss_that_is_not_finite_is_named(lm, tmp_path):
    """The run keeps what it saved before, and nothing of the bad step."""
    records, out = rankable_comparisons(40), tmp_path / "run"
    bad = int(step_examples(len(records), 5, seed=0, step=3)[1][2])  # an example of the fourth step
    records[bad]["context"] += "~"
    data = write_jsonl(tmp_path / "data.jsonl", records)
    line = run_refused(
        "train_pm.py", "--init", lm, "--data", data, "--held_out", 0, "--dtype", "fp32", "--steps", 8,
        "--batch", 5, "--save_every", 1, "--micro_tokens", 100, "--out", out,
        before=give_nan_for_tildes, exit_code=3)
    assert "step 4 is not finite" in line and f"Examples: {data}:{bad + 1}. " in line
    assert names_in(out) == ["metrics.jsonl", "step-3"] and len(losses(out)) == 3
    assert all(p.isfinite().all() for p in checkpoint.load(out)[0].parameters())


@pytest.mark.parametrize("file", ["model.safetensors", "train_state.pt", "meta.json"])
def test_a_full_disk_leaves_the_checkpoint_before(run_flags, uninterrupted, tmp_path, file):
    """`file` is the one that there is no room for. train_state.pt is larger than model.safetensors."""
    size, out = (uninterrupted / "model.safetensors").stat().st_size, tmp_path / "run"
    faults = {"model.safetensors": functools.partial(limit_file_size, size - 1000),
              "train_state.pt": functools.partial(limit_file_size, size + 1000),
              "meta.json": no_room_for_meta}
    line = run_refused("train_pm.py", *run_flags, "--out", out, before=faults[file])
    assert f"error: {out}: the checkpoint could not be written" in line and "the one before it" in line
    assert names_in(out) == ["metrics.jsonl", "step-3"] and checkpoint.load(out)[2]["step"] == 3
    run_well("train_pm.py", *run_flags, "--out", out, "--resume")
    assert_same_run(out, uninterrupted)
