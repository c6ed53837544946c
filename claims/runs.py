"""Runs that lab.py needs: each is one command of this project, kept under a name made of its flags, its data and its code.

A finished run is reused, an interrupted training is resumed, a failed one fails what depends on it and nothing else.
"""
import ast
import fcntl
import hashlib
import json
import multiprocessing
import os
import re
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

ROOT = Path(__file__).parents[1]
FAR_MORE = 60.0  # seconds that a run is taken to need before any like it has been timed


class Run:
    """One command: a script (or module, "-m data.prepare") and its flags; a flag may be another Run, whose output stands there, or
    a Path (a file, a folder of data or a checkpoint), whose content counts and not its place.

    out: what the run makes, a checkpoint folder for training scripts, a file for the others, passed as --out.
    """

    def __init__(self, folder, script, *flags, seconds=FAR_MORE):
        self.script, self.flags, self.seconds = script, flags, seconds
        self.needs = [flag for flag in flags if isinstance(flag, Run)]
        parts = [flag.key if isinstance(flag, Run) else content_of(flag) if isinstance(flag, Path) else str(flag) for flag in flags]
        self.key = hashlib.sha256(json.dumps([script, parts, code_version(script)]).encode()).hexdigest()[:16]
        self.folder = Path(folder) / self.key
        self.trains = script.startswith(("train_", "distill"))
        self.out = self.folder / ("out" if self.trains else "items.jsonl")

    def command(self):
        """The words after "python", to be run from this project's folder."""
        shown = [str(flag.out) if isinstance(flag, Run) else str(flag) for flag in self.flags]
        return [*self.script.split(), *shown, "--out", str(self.out)]

    @property
    def done(self):
        return (self.folder / "done.json").exists()

    @property
    def figures(self):
        """The last line's JSON of an evaluation; the last held-out figures of a training."""
        return json.loads((self.folder / "done.json").read_text())["figures"]

    def items(self):
        """An evaluation's records, one for each item."""
        return [json.loads(line) for line in self.out.read_text().splitlines()]

    def execute(self, launch, environment):
        """Run it to its end, unless it is done. Raises RuntimeError with the last line it said where it fails."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with open(self.folder / "lock", "w") as lock:  # another lab may be at it
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not self.done:
                self._execute(launch, environment)

    def _execute(self, launch, environment):
        version = code_version(self.script)
        command = self.command() + ["--resume"] * (self.trains and (self.out / "metrics.jsonl").exists())
        start = time.monotonic()
        log = self.folder / "log.txt"
        if launch:
            with open(log, "w") as file:
                code = subprocess.run(launched(command, launch), cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, env={**os.environ, **environment},
                                      stdin=subprocess.DEVNULL).returncode
        else:
            process = processes.Process(target=run_script, args=(command, str(log), environment))
            process.start()
            process.join()
            code = process.exitcode
        said = log.read_text().strip().splitlines() or ["it said nothing"]
        stopped = self.trains and said[-1].startswith("stopped after step")
        if code or stopped:
            raise RuntimeError(f"{' '.join(command)}: {'interrupted' if stopped else f'exit code {code}'}: {said[-1][:300]}")
        _versions.clear()
        if code_version(self.script) != version:
            raise RuntimeError(f"{' '.join(command)}: the code was changed while it ran; start again")
        figures = json.loads((self.out / "meta.json").read_text())["metrics"] if self.trains else json.loads(said[-1]) if said[-1].startswith("{") else None
        write_file(self.folder / "done.json", json.dumps({"figures": figures, "seconds": time.monotonic() - start, "command": command}))


def content_of(path):
    """A digest of a file's content, of a folder's, or of the model in a checkpoint folder."""
    if path.is_file():
        return file_digest(path).hex()
    if (path / "meta.json").is_file():
        return content_key(checkpoint.content_files(path))
    return content_key(sorted(p for p in path.rglob("*") if p.is_file()))


def launched(command, launch):
    """The words to execute for `launch`: a prefix such as "torchrun --nproc_per_node 8", for trainings only, or a template with
    {command}, such as 'srun --gpus 1 {command}', for all."""
    python = [sys.executable, *command]
    if "{command}" in launch:
        return ["sh", "-c", launch.replace("{command}", shlex.join(python))]
    return [*shlex.split(launch), *command] if command[0].startswith(("train_", "distill")) else python


processes = multiprocessing.get_context("forkserver")
PRELOAD = ["torch", "torch._dynamo", "tiktoken", "tokenizers", "train_lm", "train_pm", "distill", "evaluate"]  # what takes long to import


def stop_with_parent():
    """A killed lab must not leave runs behind that write where the next one resumes: they save and stop."""
    multiprocessing.parent_process().join()
    os.kill(os.getpid(), signal.SIGTERM)


def run_script(command, log, environment):
    """Run a script or module in this process as python would from the command line, with its output in the file `log`."""
    threading.Thread(target=stop_with_parent, daemon=True).start()
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    for stream in (1, 2):
        os.dup2(file, stream)
    os.environ.update(environment)
    os.chdir(ROOT)
    if "OMP_NUM_THREADS" in environment:
        torch.set_num_threads(int(environment["OMP_NUM_THREADS"]))
    sys.path.insert(0, str(ROOT))
    name, *flags = command[1:] if command[0] == "-m" else command
    sys.argv = [name, *flags]
    if command[0] == "-m":
        runpy.run_module(name, run_name="__main__", alter_sys=True)
    else:
        runpy.run_path(str(ROOT / name), run_name="__main__")


def code_version(script):
    """A digest of the script's source and of all files of this project that it imports, directly or not."""
    path = ROOT / (script.split()[1].replace(".", "/") + ".py" if script.startswith("-m ") else script)
    if path not in _versions:
        _versions[path] = hashlib.sha256("".join(_source(p) for p in sorted(imported(path))).encode()).hexdigest()
    return _versions[path]


_versions = {}


def imported(path, seen=None):
    """All files of this project that `path` needs, itself among them."""
    seen = set() if seen is None else seen
    if path in seen or not path.exists():
        return seen
    seen.add(path)
    for node in ast.walk(ast.parse(path.read_text())):
        names = [a.name for a in node.names] if isinstance(node, ast.Import) else \
            [node.module] + [f"{node.module}.{a.name}" for a in node.names] if isinstance(node, ast.ImportFrom) and node.module else \
            [node.value] if isinstance(node, ast.Constant) and re.fullmatch(r"(data|evals)(\.\w+)+", str(node.value)) else []  # imported by name
        for name in names:
            imported(ROOT / (name.replace(".", "/") + ".py"), seen)
    return seen


def _source(path):
    """A file's code without its comments and docstrings: a better word in one of them must not repeat a day's runs."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.FunctionDef, ast.ClassDef)) and ast.get_docstring(node) is not None and len(node.body) > 1:
            node.body = node.body[1:]
    return f"{path.name}\n{ast.unparse(tree)}\n"


# ---------------------------------------------------------------------------------------------------------------------
# Executing


def needed(runs):
    """All runs that `runs` need, themselves included, each after what it needs; equal ones once."""
    order = {}

    def visit(run):
        for need in run.needs:
            visit(need)
        order.setdefault(run.key, run)
    for run in runs:
        visit(run)
    return list(order.values())


def execute(runs, jobs, launch="", gpus=0):
    """Execute all runs, `jobs` at a time, each as soon as what it needs is done. Returns {key: why} of those that failed.

    Each job has its share of the cores, or, where there are GPUs, one of them.
    """
    processes.set_forkserver_preload(PRELOAD)  # runs are forked from a process that has these already: it saves each its first seconds
    failed, running, slots = {}, {}, list(range(jobs))  # running: {future: (run, slot, when it began)}
    todo = schedule([run for run in needed(runs) if not run.done])
    total, begun, waiting = sum(run.seconds for run in todo), time.monotonic(), list(todo)

    def minutes_left():
        """By the runs' estimates, and by how true those have been so far."""
        now = time.monotonic()
        left = sum(run.seconds for run in waiting) + sum(max(0, run.seconds - (now - since)) for run, _, since in running.values())
        return left * (now - begun) / max(1, total - left) / 60

    with ThreadPoolExecutor(jobs) as pool, tqdm(total=len(todo), desc="runs", disable=None, bar_format="{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}{postfix}]") as bar:
        while waiting or running:
            for run in list(waiting):
                bad = next((need for need in run.needs if need.key in failed), None)
                if bad:
                    failed[run.key] = f"needs {bad.script} {bad.key}, which failed"
                    waiting.remove(run)
                    bar.update()
                elif slots and all(need.done for need in run.needs):
                    slot = slots.pop(0)
                    running[pool.submit(run.execute, launch, {} if launch else share(slot, jobs, gpus))] = run, slot, time.monotonic()
                    waiting.remove(run)
            if not running:
                continue
            finished, _ = wait(running, timeout=5, return_when=FIRST_COMPLETED)
            bar.set_postfix_str(f"about {minutes_left():.1f} min left")
            for future in finished:
                run, slot, _ = running.pop(future)
                slots.append(slot)
                if future.exception():
                    failed[run.key] = str(future.exception())
                    tqdm.write(f"failed: {future.exception()}", file=sys.stderr)
                bar.update()
                if bar.disable:
                    print(f"{time.monotonic() - begun:6.0f} s, about {minutes_left():.1f} min left: {run.script} {run.key} {'failed' if run.key in failed else 'done'}", flush=True)
    return failed


def share(slot, jobs, gpus):
    """Environment of the job in a slot: its GPU, of those that this process may use, or the threads of its share of the cores."""
    if not gpus:
        return {"OMP_NUM_THREADS": str(max(1, cores() // jobs))}
    devices = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name] or range(gpus)
    return {"CUDA_VISIBLE_DEVICES": str(devices[slot % gpus])}


def cores():
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def schedule(todo):
    """Needs first; among those whose needs are met, the longest chain of work first."""
    users = {run.key: [other for other in todo if any(need.key == run.key for need in other.needs)] for run in todo}
    memo = {}

    def ahead(run):
        if run.key not in memo:
            memo[run.key] = run.seconds + max((ahead(user) for user in users[run.key]), default=0)
        return memo[run.key]
    return sorted(todo, key=lambda run: -ahead(run))

