"""Running programs that a model wrote. jail.py is the process inside; docs/sandbox.md says what was tried.

The sandbox protects the machine, not the score: a program runs in the interpreter of its tests, so one that
is written to deceive can always say that it passed. One that only fails, hangs or ends early does not pass.

It needs Linux and nothing else: jail.py asks the kernel for namespaces of its own for mounts, processes,
network and shared memory. A program sees the Python library and an empty folder in memory. It stays a single
process, so that the limits on memory and time hold for all that it does.
"""
import functools
import marshal
import os
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from data.errors import InputError

JAIL = Path(__file__).with_name("jail.py")
# Without the first one the C library reserves 64 MB for each thread, so a few threads meet the limit on memory.
ENVIRONMENT = {"MALLOC_ARENA_MAX": "1", "PYTHONHASHSEED": "0", "PYTHONDONTWRITEBYTECODE": "1",
               "PATH": "/usr/bin:/bin"}
NEEDS = ("the sandbox for programs needs Linux that lets you make namespaces (sysctl "
         "user.max_user_namespaces; Ubuntu: kernel.apparmor_restrict_unprivileged_userns=0; containers: "
         "--privileged)")
WARNING = ("warning: there is no sandbox. The model's programs run as you: nothing stops them from reading, "
           "changing or deleting your files, using the network, or starting processes that stay")
UNSAFE_HELP = ("if the system allows no sandbox, run programs as your own user, with limits on time and "
               "memory only (default: refuse)")


class Outcome(NamedTuple):
    passed: bool
    reason: str  # passed, wrong (a test failed), error (another exception), memory, timeout or killed
    detail: str = ""  # the exception, as the program tells it, without control characters


@functools.cache
def pick_mode(unsafe=False):
    """"sandbox", or "unsafe" if there can be none and the user agrees. InputError if neither may be."""
    try:
        outcome = run_program("import collections, hashlib, json, math, random, re", timeout=20)
        if outcome.passed:
            return "sandbox"
        problem = f"{outcome.reason} {outcome.detail}"
    except InputError as error:
        problem = error
    if not unsafe or os.getuid() == 0:
        mend = "--unsafe is not for root" if unsafe else "or run programs without a sandbox: --unsafe"
        raise InputError(f"{NEEDS}, {mend} ({problem})")
    print(f"{WARNING} ({problem})", file=sys.stderr)
    return "unsafe"


def run_programs(programs, mode="sandbox", progress=None, workers=os.cpu_count(), **limits):
    """The outcomes of [(program, tests)], in their order. `progress` names a bar. See run_program."""
    with ThreadPoolExecutor(workers) as pool:
        outcomes = pool.map(lambda texts: run_program(*texts, mode, **limits), programs)
        return list(tqdm(outcomes, progress, len(programs), leave=False, disable=None if progress else True))


def run_program(program, tests="", mode="sandbox", timeout=5.0, memory=512 * 2**20):
    """Run a program and then its tests, which see the names that it defined and raise unless it is right.

    program, tests: source texts; timeout: in seconds; memory: in bytes. InputError if there can be no walls.
    """
    folder = tempfile.mkdtemp(prefix="program-") if mode == "unsafe" else "/tmp"
    command = [sys.executable, "-s", "-S", "-P", "-X", "utf8", JAIL, mode, str(timeout), str(memory)]
    environment = ENVIRONMENT | {"TMPDIR": folder}
    try:
        done = subprocess.run(command, input=marshal.dumps((program, tests)), capture_output=True, cwd=folder,
                              env=environment, start_new_session=True, timeout=timeout + 60)
    except subprocess.TimeoutExpired:
        return Outcome(False, "timeout")  # the machine is too busy to answer
    finally:
        if mode == "unsafe":  # folders of any depth, name and permission; no link is followed
            find = ["find", folder, "-type", "d", "!", "-perm", "-700", "-exec", "chmod", "700", "{}", ";"]
            for command in (find, ["rm", "-rf", folder]):
                subprocess.run(command, stderr=subprocess.DEVNULL)
    if done.returncode:
        raise InputError("no sandbox: " + done.stderr.decode(errors="replace").strip().rpartition("\n")[2])
    reason, _, detail = done.stdout.decode(errors="replace").partition("\n")
    if reason not in ("passed", "wrong", "error", "memory", "timeout"):
        reason, detail = "killed", ""  # it ended itself, or the kernel ended it
    printable = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in detail)
    return Outcome(reason == "passed", reason, printable)
