"""Running model-written Python programs. This is the one place that does; evals/sandbox/jail.py is the process inside.

A program has passed if it and then its tests ran to their end. That is proven by a random token which lies where Python
code does not reach it, so printing, exiting, raising, patching builtins or writing to every open file does not pass.

Each program runs in processes of its own, in the first of these modes that works here:

  namespace  Linux, where a user may make namespaces (or root). No network; no other process can be seen or signalled; a
             file tree of its own with the system's and Python's libraries, read-only, and an empty /tmp in memory. When
             its first process is killed the kernel kills all the others.
  user       root without namespaces (most containers): the program runs as a user id that nobody else has, in a
             temporary folder. Sockets, signals, starting processes and changes outside the folder are closed to Python code by
             sys.addaudithook: no defence against machine code in a corrupted interpreter. What every user may read can be read.
  plain      the rest, macOS included: as "user", but with the rights of the caller's own user, and so able to read its files. On
             macOS memory and the number of threads are not limited.

In all modes: limits on time, memory per process (32 processes at most, as far as the kernel counts them for this user), file
sizes and open files; no environment, no input, output thrown away, the standard library only.

What no mode guarantees: the tests run in the program's interpreter, so a program written against this very file may look
into frames for the values it is compared with, or return objects that are equal to everything. Models that play tricks of
that kind need tests in another process. A flaw of the kernel is a flaw of the sandbox.
"""
import ast
import functools
import marshal
import os
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

JAIL = Path(__file__).with_name("jail.py")
ENVIRONMENT = {"PATH": "/usr/bin:/bin", "LANG": "C.UTF-8", "PYTHONHASHSEED": "0", "PYTHONDONTWRITEBYTECODE": "1"}  # equal runs, equal verdicts
TESTS = re.compile(r"^# tests of (\w*)$", re.MULTILINE)


class Outcome(NamedTuple):
    passed: bool
    reason: str  # passed, wrong (a test failed), error (another exception), memory, timeout, killed (it ended early)
    detail: str = ""  # the exception, as the program tells it


def with_tests(program, tests, entry_point=""):
    """One source text for `run_program`. What follows the last line "# tests of NAME" are tests: they are compiled apart and see
    what the program defined, except names of builtins (other than the entry point's), and builtins and modules of their own."""
    return f"{program}\n\n# tests of {entry_point}\n{tests}\n"


def run_program(source, timeout=5.0, memory=512 * 2**20):
    """Run one program, made by `with_tests` or any text. timeout in seconds of wall time, memory in bytes a process.

    Raises RuntimeError where no program can be run at all.
    """
    return _run(source, timeout, memory, isolation())


def run_programs(sources, workers=os.cpu_count(), progress=None, timeout=5.0, memory=512 * 2**20):
    """Outcomes of many programs, in their order. `progress` names a bar."""
    isolation()
    pool = ThreadPoolExecutor(workers)
    try:
        outcomes = pool.map(lambda source: run_program(source, timeout, memory), sources)
        return list(tqdm(outcomes, total=len(sources), desc=progress, unit="program", disable=None if progress else True, leave=False))
    finally:
        pool.shutdown(cancel_futures=True)


@functools.cache
def isolation():
    """The strongest mode that works here; says so on stderr if it is not the strongest there is."""
    said = []
    for mode in ("namespace", "user", "plain"):
        if mode == "namespace" and sys.platform != "linux" or mode == "user" and os.getuid() != 0:
            continue
        outcome = _run("import collections, hashlib, json, math, random, re", 20, 2**30, mode)
        if outcome.passed:
            if said:
                print(f"programs run in mode {mode}, see evals/sandbox/sandbox.py ({'; '.join(said)})", file=sys.stderr)
            return mode
        said.append(f"{mode}: {outcome.detail or outcome.reason}")
    raise RuntimeError(f"no way to run programs here ({'; '.join(said)})")


def _run(source, timeout, memory, mode):
    *_, last = [None, *TESTS.finditer(source)]
    program, tests, entry_point = (source[:last.start()], source[last.end():], last[1]) if last else (source, "", "")
    job = marshal.dumps((program, tests, entry_point, _imports(tests)))
    folder = "/" if mode == "namespace" else tempfile.mkdtemp(prefix="program-")
    command = [sys.executable, "-s", "-S", "-P", "-X", "utf8", str(JAIL), mode, str(timeout), str(memory), folder]
    try:
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=folder,
                              env={**ENVIRONMENT, "TMPDIR": "/tmp" if mode == "namespace" else folder}, start_new_session=True) as process:
            try:
                said, trouble = process.communicate(job, timeout + 10)
            except subprocess.TimeoutExpired:
                said, trouble = b"timeout\n", b""
            finally:
                process.kill()
    finally:
        if mode != "namespace":
            _remove(folder)
    reason, _, detail = said.decode("utf-8", "replace").partition("\n")
    if reason not in ("passed", "wrong", "error", "memory", "timeout"):
        reason, detail = "killed", detail or "".join(trouble.decode("utf-8", "replace").splitlines()[-1:])[:200]
    return Outcome(reason == "passed", reason, detail)


def _imports(tests):
    """Modules that the tests import."""
    try:
        nodes = list(ast.walk(ast.parse(tests)))
    except SyntaxError:
        return ()  # said when they run
    names = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    return tuple(names + [node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.module])


def _remove(folder):
    """Remove a folder whatever its permissions have been set to and whatever has become of it; links are not followed."""
    if os.path.islink(folder) or os.path.isfile(folder):
        os.unlink(folder)
    elif os.path.exists(folder):
        os.chmod(folder, 0o700)
        for place, folders, _ in os.walk(folder):  # from the top, so that a folder is open before it is walked
            for path in (os.path.join(place, name) for name in folders):
                if not os.path.islink(path):
                    os.chmod(path, 0o700)
        shutil.rmtree(folder)
