"""Runs that are killed (SIGKILL) at random moments and gone on with end as if nothing had happened; a killed
preparation leaves no file that is not whole. The caches are built anew under the kills, too.

    python -m pytest tests/test_kills.py -s --fuzz 5000      a fortieth as many kills of each (default: 2)
"""
import random
import shutil
import signal
import time
from pathlib import Path

import pytest
from conftest import Running, metrics, run_well, write_jsonl
from test_distill import distilled, files, flags  # noqa: F401  fixtures
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
