"""The runs that the claims need. Each is one command of this project, and is kept in a folder that is named
by a digest of its flags, its data and its code.

A finished run is reused, an interrupted training goes on, and a run that fails stops only what depends on it.
"""
import fcntl
import functools
import hashlib
import json
import math
import modulefinder
import multiprocessing.connection
import os
import runpy
import shlex
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from pathlib import Path

import torch
from tqdm import tqdm

import checkpoint
from data.files import content_key, file_digest, write_file
from data.prepare import SOURCES

ROOT = Path(__file__).parents[1]


class Run:
    """One command: a script, or a module such as "-m data.prepare", and its flags. A flag may be another
    Run, whose output stands there, or a Path to a file or folder, of which the content counts and not the
    place.

    out: what the run makes, passed as --out: a checkpoint folder for the training scripts, a file of JSON
    lines for the others. seconds: an estimate of how long it takes."""

    def __init__(self, folder, script, *flags, seconds):
        self.script, self.flags, self.seconds = script, flags, seconds
        self.needs = [flag for flag in flags if isinstance(flag, Run)]
        self.digest = code_digest(script)
        parts = [script, self.digest, *map(content_of, flags)]
        self.key = hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]
        self.folder = Path(folder) / self.key
        self.trains = is_training(script)
        self.out = self.folder / ("out" if self.trains else "items.jsonl")

    def command(self):
        """The words after "python", for a shell in this project's folder."""
        shown = [str(flag.out) if isinstance(flag, Run) else str(flag) for flag in self.flags]
        return [*self.script.split(), *shown, "--out", str(self.out)]

    @property
    def done(self):
        return (self.folder / "done.json").exists()

    @property
    def figures(self):
        """The JSON of an evaluation's last line, or the last held-out figures of a training."""
        return json.loads((self.folder / "done.json").read_text())["figures"]

    def items(self):
        """An evaluation's records, one for each item."""
        return [json.loads(line) for line in self.out.read_text().splitlines()]

    def execute(self, launch, environment):
        """Run the command to its end, unless that is done. If it fails, RuntimeError has its last line."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with open(self.folder / "lock", "w") as lock:  # another lab may be working on the same run
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not self.done:
                self.run_command(launch, environment)

    def run_command(self, launch, environment):
        began = time.monotonic()
        command, log = self.command(), self.folder / "log.txt"
        if self.trains and (self.out / "metrics.jsonl").exists():
            command.append("--resume")
        if launch:
            with open(log, "w") as file:
                code = subprocess.run(launched(command, launch), cwd=ROOT, env=os.environ | environment,
                                      stdin=subprocess.DEVNULL, stdout=file, stderr=file).returncode
        else:
            code = exit_code(run_script, command, str(log), environment)
        last_line = (log.read_text().strip().splitlines() or ["it printed nothing"])[-1]
        why = f"exit code {code}" if code else ""
        if self.trains and last_line.startswith("stopped after step"):
            why = "interrupted"
        code_digest.cache_clear()
        if code_digest(self.script) != self.digest:
            why = "the code was changed after the lab began; start again"
        if why:
            raise RuntimeError(f"{shlex.join(command)}: {why}: {last_line[:300]}")
        if self.trains:
            figures = json.loads((self.out / "meta.json").read_text())["metrics"]
        else:
            figures = json.loads(last_line) if last_line.startswith("{") else None
        record = {"figures": figures, "seconds": time.monotonic() - began, "command": command}
        write_file(self.folder / "done.json", json.dumps(record))
        if self.trains:
            (self.out / "train_state.pt").unlink(missing_ok=True)  # twice the model's size, for resuming only


def is_training(script):
    return script.startswith(("train_", "distill"))


def content_of(flag):
    """What a flag adds to a run's name: a Run its own name; a Path the digest of the file, of the files in
    the folder, or of the model in the checkpoint folder."""
    if isinstance(flag, Run):
        return flag.key
    if not isinstance(flag, Path):
        return str(flag)
    if flag.is_file():
        return file_digest(flag).hex()
    if (flag / "meta.json").is_file():
        return content_key(checkpoint.content_files(flag))
    return content_key(sorted(path for path in flag.rglob("*") if path.is_file()))


@functools.cache
def code_digest(script):
    """A digest of a script, of all files of this project that it imports, directly or not, and of the prompts
    that are named by a word."""
    finder = modulefinder.ModuleFinder(path=[str(ROOT)])
    if script.startswith("-m "):
        finder.import_hook(script.split()[1])
        finder.import_hook(SOURCES[script.split()[2]][0])  # data.prepare imports it by name
    else:
        finder.run_script(str(ROOT / script))
    files = sorted(module.__file__ for module in finder.modules.values() if module.__file__)
    files += sorted((ROOT / "data/prompts").glob("*.txt"))
    return hashlib.sha256(b"".join(Path(file).read_bytes() for file in files)).hexdigest()


# ------------------------------------------------------------------------------------------------------------
# Starting a script


def launched(command, launch):
    """The words to execute for --launch: a prefix such as "torchrun --nproc_per_node 8", which starts
    trainings only, or a template such as "srun --gpus 1 {command}", which starts everything."""
    python = [sys.executable, *command]
    if "{command}" in launch:
        return ["sh", "-c", launch.replace("{command}", shlex.join(python))]
    return [*shlex.split(launch), *command] if is_training(command[0]) else python


# Runs are forked from a process that has imported these: that saves each of them its first seconds.
PRELOAD = ["torch", "torch._dynamo", "tiktoken", "tokenizers", "train_lm", "train_pm", "distill", "evaluate",
           "lab"]
processes = multiprocessing.get_context("forkserver")


process_table = threading.Lock()


def exit_code(function, *args):
    """The exit code of a process of its own in which the function is called.

    Jobs do this in threads. Starting a process also looks after all others, and two threads that read one's
    exit code at the same time would take it from each other: one of them finds 255. So it is read with a lock
    held."""
    process = processes.Process(target=function, args=args)
    with process_table:
        process.start()
    multiprocessing.connection.wait([process.sentinel])
    with process_table:
        process.join()
        return process.exitcode


def run_script(command, log, environment):
    """Run a script or module in this process, as Python would from a command line, with its output in a
    file."""
    threading.Thread(target=stop_with_parent, daemon=True).start()
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    for stream in (1, 2):
        os.dup2(file, stream)
    os.environ.update(environment)
    os.chdir(ROOT)
    if "OMP_NUM_THREADS" in environment:
        torch.set_num_threads(int(environment["OMP_NUM_THREADS"]))
    sys.path.insert(0, str(ROOT))
    if command[0] == "-m":
        sys.argv = command[1:]
        runpy.run_module(command[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = command
        runpy.run_path(str(ROOT / command[0]), run_name="__main__")


def stop_with_parent():
    """When the lab is killed, its runs save and stop: the next lab resumes them."""
    multiprocessing.parent_process().join()
    os.kill(os.getpid(), signal.SIGTERM)


def share(slot, jobs, gpus):
    """The environment of a job: the GPU of its slot, of those that this process may use, or its share of the
    cores; and how many jobs share the memory there."""
    if not gpus:
        return {"OMP_NUM_THREADS": str(max(1, cores() // jobs)), "HHH_PROCESSES_PER_DEVICE": str(jobs)}
    devices = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name] or range(gpus)
    return {"CUDA_VISIBLE_DEVICES": str(devices[slot % gpus]),
            "HHH_PROCESSES_PER_DEVICE": str(math.ceil(jobs / gpus))}


def cores():
    """The number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


# ------------------------------------------------------------------------------------------------------------
# Executing


def needed(runs):
    """All runs that `runs` need, themselves included: each once, and after what it needs."""
    order = {}
    for run in runs:
        for part in (*needed(run.needs), run):
            order.setdefault(part.key, part)
    return list(order.values())


def execute(runs, jobs, launch="", gpus=0, after_each=lambda failed: None):
    """Execute all runs and what they need, `jobs` at a time, those that stand first in `runs` first.

    Returns {key: why} of the runs that failed. after_each is called with it whenever a run has ended.
    """
    processes.set_forkserver_preload(PRELOAD)
    waiting, running, slots = [run for run in needed(runs) if not run.done], {}, list(range(jobs))
    failed, began, done = {}, time.monotonic(), 0
    bar = tqdm(total=sum(run.seconds for run in waiting), desc="runs", disable=None, smoothing=0,
               bar_format="{l_bar}{bar}| {elapsed}, about {remaining} left")

    def ended(run):
        nonlocal done
        done += run.seconds
        bar.update(run.seconds)
        if bar.disable:
            seconds = time.monotonic() - began
            left, word = (bar.total - done) * seconds / done / 60, "failed" if run.key in failed else "done"
            print(f"{seconds:6.0f} s, about {left:.1f} min left: {run.script} {run.key} {word}", flush=True)

    with ThreadPoolExecutor(jobs) as pool, bar:
        while waiting or running:
            for run in list(waiting):
                bad = next((need for need in run.needs if need.key in failed), None)
                if bad:
                    failed[run.key] = f"needs {bad.script} {bad.key}, which failed"
                    waiting.remove(run)
                    ended(run)
                elif slots and all(need.done for need in run.needs):
                    slot = slots.pop(0)
                    environment = {} if launch else share(slot, jobs, gpus)
                    running[pool.submit(run.execute, launch, environment)] = run, slot
                    waiting.remove(run)
            for future in wait(running, timeout=5, return_when=FIRST_COMPLETED).done:
                run, slot = running.pop(future)
                slots.append(slot)
                if future.exception():
                    failed[run.key] = str(future.exception())
                    tqdm.write(f"failed: {future.exception()}", file=sys.stderr)
                ended(run)
            after_each(failed)
            bar.refresh()
    return failed
