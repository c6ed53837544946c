"""Runs that are killed (SIGKILL) at random moments and gone on with end as if nothing had happened; a killed
preparation leaves no file that is not whole. The caches are built anew under the kills, too.

    python -m pytest tests/test_kills.py -s --fuzz 4000      a fortieth as many kills of each (default: 2), and a
                                                             four-hundredth of four ranks (default: none)
"""
import itertools
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import GENTLE, ROOT, Running, metrics, run_ranks, run_well, write_jsonl
from test_distill import distilled, files, flags  # noqa: F401  fixtures
from test_ranks import assert_same
from test_runs import assert_same_run, run_flags, uninterrupted  # noqa: F401  fixtures


def clear(out):
    shutil.rmtree(out) if out.is_dir() else out.unlink(missing_ok=True)


@pytest.fixture
def kill_at_random(request, tmp_path):
    """A function that kills a script at random moments and lets it go on, until it ends well. Then check() is
    called, and all begins anew, until there were enough kills."""
    def kill(check, out, seconds, *command):
        rng, wanted, n_kills = random.Random(0), request.config.getoption("--fuzz") // 40, 0
        cache = tmp_path / "cache"
        cache.mkdir()
        while n_kills < wanted:
            running = Running(*command, "--out", out, HHH_LAB_CACHE=str(cache))
            time.sleep(seconds * rng.random())
            running.process.kill()
            done = running.result()
            assert done.returncode in (0, -signal.SIGKILL), done
            n_kills += done.returncode != 0
            if done.returncode == 0:
                check(out)
                clear(out)
                clear(cache)
                cache.mkdir()
        run_well(*command, "--out", out, HHH_LAB_CACHE=str(cache))
        check(out)
        print(f"{command[0]}: {n_kills} kills")
    return kill


def test_a_preference_model(kill_at_random, run_flags, uninterrupted, tmp_path):  # noqa: F811
    kill_at_random(lambda out: assert_same_run(out, uninterrupted), tmp_path / "out", 1.2,
                   "train_pm.py", *run_flags, "--resume")


def test_a_distillation(kill_at_random, flags, distilled, tmp_path):  # noqa: F811
    def check(out):
        assert metrics(out) == metrics(distilled[0])
        assert (out / "model.safetensors").read_bytes() == (distilled[0] / "model.safetensors").read_bytes()
    kill_at_random(check, tmp_path / "out", 2.0, "distill.py", *flags, "--save_every", 3, "--resume")


def test_a_preparation(kill_at_random, tmp_path):
    raw, whole = tmp_path / "raw.jsonl", tmp_path / "whole.jsonl.gz"
    write_jsonl(raw, [{"chosen": f"a{i}", "rejected": "b"} for i in range(10_000)])
    command = ("data/prepare.py", "hh", "--raw", raw)
    run_well(*command, "--out", whole)

    def check(out):
        assert out.read_bytes() == whole.read_bytes() and not Path(f"{out}.partial").exists()
    kill_at_random(check, tmp_path / "out.jsonl.gz", 0.4, *command)


def torchrun(*command):
    """Start four ranks as a user does. Returns torchrun's process; all that is printed goes to its stdout."""
    return subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "4", *map(str, command)],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"})


def children(process):
    return [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]


def test_one_of_four_ranks(request, lm, comparisons_file, tmp_path):
    """Of two sharded copies of a model that are saved after each step. A fifth of the kills is during the start."""
    wanted, rng, seconds = request.config.getoption("--fuzz") // 400, random.Random(0), []
    n_lines = n_saving = 0
    if not wanted:
        pytest.skip("a minute for each two kills; --fuzz 4000 makes ten")
    flags = ("train_pm.py", "--init", lm, "--data", comparisons_file, *GENTLE, "--steps", 40, "--save_every", 1,
             "--shard", 2)
    run_ranks(*flags, "--out", tmp_path / "uninterrupted", n=4)
    for n in itertools.count():
        if len(seconds) == wanted:
            break
        running, before = torchrun(*flags, "--out", tmp_path / "out", "--resume"), []
        if n % 5:
            for line in running.stdout:
                before.append(line)
                if line.startswith("output: "):
                    break
            time.sleep(4 * rng.random())
        else:
            time.sleep(1 + 6 * rng.random())
        pids = children(running)
        if running.poll() is not None or not pids:
            assert running.wait() == 0, "".join(before) + running.stdout.read()
            shutil.rmtree(tmp_path / "out")
            continue
        n_saving += (tmp_path / "out/partial").exists()
        os.kill(rng.choice(pids), signal.SIGKILL)
        killed = time.monotonic()
        printed = "".join(before) + running.communicate(timeout=60)[0]
        seconds.append(time.monotonic() - killed)
        lines = [line for line in printed.splitlines() if "train_pm.py: error: " in line]
        # Before the first step torchrun may end the others sooner than they notice; its report then stands alone.
        assert len(lines) <= 1 and all("another rank has ended, or does not" in line for line in lines), printed
        n_lines += len(lines)
        assert not any(Path(f"/proc/{pid}").exists() for pid in pids)
    run_ranks(*flags, "--out", tmp_path / "out", "--resume", n=4)
    assert_same(tmp_path / "uninterrupted", tmp_path / "out")
    assert metrics(tmp_path / "uninterrupted") == metrics(tmp_path / "out")
    print(f"{wanted} kills, {n_saving} during a save; all ranks had ended after {max(seconds):.0f} s at most, "
          f"{n_lines} times with a line")
