"""Compare the memory that a run's plan says with what the run takes.

  python tests/peaks.py > results/plan_memory.jsonl     a JSON line for each run; half an hour on two idle cores

What is measured is the peak of the process (Linux's VmHWM), less that of the same script with a tiny model,
which is Python, torch with its kernels, and the data. The plan counts tensors that live, and glibc keeps most
blocks that were freed, to use them again. So every run is measured twice: with MALLOC_MMAP_THRESHOLD_ set, which
has blocks of 128 KiB and more go back to the system as they are freed ("returned"), and as it is ("kept").
"""
import functools
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
RETURNED = (("MALLOC_MMAP_THRESHOLD_", "131072"),)
# Runs a script that tells its peak after each step, before anything is gathered to be saved.
DRIVER = """
import os, re, runpy, sys
sys.path.insert(0, os.getcwd())
import trainer
def step(log, *figures):
    peak = re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]
    print("rank", os.environ.get("RANK", "0"), "peak", int(peak) * 1024, flush=True)
    return write(log, *figures)
write, trainer.Log.step = trainer.Log.step, step
del sys.argv[0]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@functools.cache
def run(words, n_ranks=1, env=RETURNED):
    """(GiB that the plan says, GiB of the process's peak on the last rank) of a run of train_lm.py."""
    with tempfile.TemporaryDirectory() as folder:
        driver = Path(folder) / "driver.py"
        driver.write_text(DRIVER)
        # DistributedDataParallel makes its buckets anew after a step, so they are all in use from the third on.
        n_steps = 2 if n_ranks == 1 else 4
        launch = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", n_ranks) * (n_ranks > 1)
        command = [sys.executable, *launch, driver, "train_lm.py", *words, "--steps", n_steps, "--eval_every", 0,
                   "--tokenizer", "bytes", "--out", Path(folder) / "out"]
        done = subprocess.run(list(map(str, command)), cwd=ROOT, capture_output=True, text=True,
                              env={**os.environ, "OMP_NUM_THREADS": "1", **dict(env)})
    if done.returncode:
        raise RuntimeError(done.stdout + done.stderr)
    peaks = re.findall(rf"rank {n_ranks - 1} peak (\d+)", done.stdout)
    return float(re.search(r"memory: about (\S+) GiB", done.stdout)[1]), int(peaks[-1]) / 2**30


def compared(size, ctx, micro_tokens, n_ranks=1, shard=1, recompute=False, env=RETURNED):
    """(GiB that the plan says of a rank, GiB that it takes besides Python, torch and the data), in steps of two
    micro-batches on each rank."""
    def words(size, ctx, micro_tokens):
        return ("--size", size, "--ctx", ctx, "--micro_tokens", micro_tokens, "--shard", shard,
                "--batch", 2 * n_ranks * micro_tokens, *["--recompute"] * recompute)
    planned_tiny, peak_tiny = run(words("test", 64, 64), n_ranks, env)
    planned, peak = run(words(size, ctx, micro_tokens), n_ranks, env)
    return planned, peak - (peak_tiny - planned_tiny)


def main():
    for size, ctx, micro_tokens in (("0.8m", 256, 8192), ("13m", 1024, 4096), ("42m", 1024, 2048)):
        for n_ranks, shard in ((1, 1), (2, 1), (2, 2)):
            for recompute in (False, True):
                setting = {"ctx": ctx, "micro_tokens": micro_tokens, "n_ranks": n_ranks, "shard": shard,
                           "recompute": recompute}
                planned, returned = compared(size, **setting)
                kept = compared(size, **setting, env=())[1]
                figures = {"planned_gib": planned, "returned_gib": round(returned, 3), "kept_gib": round(kept, 3)}
                print(json.dumps({"model": size, **setting, **figures}), flush=True)


if __name__ == "__main__":
    main()
