"""The sandbox: the programs of hostile.py, run by root and by an ordinary user, get through none of its walls
and leave nothing behind; honest programs pass."""
import marshal
import os
import pickle
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
from conftest import ROOT, run, write_jsonl

from data.errors import InputError
from evals.sandbox import sandbox
from hostile import PRELUDE, WALLS, programs

NOBODY = 65534
MARK = os.getpid() / 1e8  # is part of the time limits here; our processes are found by it

SECONDS = dict.fromkeys(WALLS, 20 + MARK) | {"time": 1 + MARK}


def attack(prelude):
    """{wall: {what it tries: outcome}} of all programs, or why there is no sandbox."""
    try:
        sandbox.pick_mode()
    except InputError as error:
        return str(error)
    outcomes = {}
    for wall, listed in WALLS.items():
        texts = [(prelude + code, "") for code in listed.values()]
        outcomes[wall] = dict(zip(listed, sandbox.run_programs(texts, workers=8, timeout=SECONDS[wall])))
    return outcomes


def as_user(user, function, *args):
    """What `function(*args)` returns when root or an ordinary user calls it. A text skips the test."""
    if user == "root" and os.getuid() != 0:
        pytest.skip("the tests do not run as root")
    result = as_nobody(function, *args) if user != "root" and os.getuid() == 0 else function(*args)
    if isinstance(result, str):
        pytest.skip(result)
    return result


def as_nobody(function, *args):
    """What `function(*args)` returns in a process of a user without any rights, or why there is none."""
    heard, report = os.pipe()
    child = os.fork()
    if child == 0:
        result = "an ordinary user cannot read this folder or Python"
        try:
            os.setgroups([])
            os.setresgid(NOBODY, NOBODY, NOBODY)
            os.setresuid(NOBODY, NOBODY, NOBODY)
            pythons = [path for path in (sys.executable, "/usr/bin/python3") if os.access(path, os.X_OK)]
            if pythons and os.access(sandbox.JAIL, os.R_OK):
                sys.executable = pythons[0]
                result = function(*args)
        finally:
            with open(report, "wb") as file:
                pickle.dump(result, file)
            os._exit(0)
    os.close(report)
    with open(heard, "rb") as file:
        result = pickle.load(file)
    os.waitpid(child, 0)
    return result


def processes():
    """The command lines of all processes."""
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            yield Path(f"/proc/{pid}/cmdline").read_text(errors="replace").replace("\0", " ")
        except OSError:
            pass  # it has ended


@pytest.fixture(scope="module", params=["root", "ordinary user"])
def attacked(request):
    """All programs run by one user: ({wall: {what it tries: outcome}}, what is found afterwards)."""
    folder = Path(tempfile.mkdtemp(prefix="caller-", dir="/tmp"))
    planted = folder / "planted"
    planted.write_text("3")
    planted.chmod(0o666)
    folder.chmod(0o777)
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        prelude = PRELUDE.format(planted=str(planted), caller=os.getpid(), port=port)
        outcomes = as_user(request.param, attack, prelude)
        server.setblocking(False)
        with pytest.raises(BlockingIOError):  # nobody has called
            server.accept()
    ours = [f"jail.py sandbox {seconds} " for seconds in set(SECONDS.values())]
    yield outcomes, {"planted": planted.read_text(), "beside it": os.listdir(folder),
                     "in shared memory": os.path.exists(f"/dev/shm/hostile-{os.getpid()}"),
                     "processes": [line for line in processes() if any(mark in line for mark in ours)]}
    shutil.rmtree(folder)


@pytest.mark.parametrize("wall", WALLS)
def test_every_wall_holds(attacked, wall):
    outcomes, _ = attacked
    reasons = {tried: outcome.reason for tried, outcome in outcomes[wall].items()}
    if wall in ("time", "clean-up"):
        assert set(reasons.values()) == {"timeout" if wall == "time" else "passed"}, reasons
    else:
        through = {tried: reason for tried, reason in reasons.items() if reason in ("passed", "timeout")}
        assert through == {}


def test_hostile_programs_leave_nothing_behind(attacked):
    assert sum(map(len, WALLS.values())) >= 60
    _, found = attacked
    assert found == {"planted": "3", "beside it": ["planted"], "in shared memory": False, "processes": []}


def test_what_hostile_programs_say_harms_no_terminal(attacked):
    outcomes, _ = attacked
    details = [outcome.detail for wall in outcomes.values() for outcome in wall.values()]
    assert all(detail.isprintable() and len(detail) < 2000 for detail in details)
    assert outcomes["output"]["fails with a text that moves a terminal"].detail == (
        r"ValueError: \x1b[2J\x1b]0;title\x07\r\n\u202e")


def test_reasons(attacked):
    outcomes, _ = attacked
    for wall, tried, reason in (("memory", "takes 800 MB in one piece", "memory"),
                                ("output", "fails without memory to say so", "memory"),
                                ("supervisor", "ends in good order before its tests", "killed"),
                                ("supervisor", "breaks the interpreter", "killed"),
                                ("supervisor", "leaves a text open, so that it takes in its tests", "error")):
        assert outcomes[wall][tried].reason == reason


def run_one(program, tests="", **settings):
    """The outcome of one program. Skips the test where there is no sandbox."""
    return run_all([(program, tests)], **settings)[0]


def run_all(texts, **settings):
    try:
        mode = sandbox.pick_mode()
    except InputError as error:
        pytest.skip(str(error))
    return sandbox.run_programs(texts, **{"mode": mode, "timeout": 20, **settings})


def test_a_program_dies_with_its_supervisor():
    run_one("")
    command = [sys.executable, "-S", "-P", sandbox.JAIL, "sandbox", str(60 + MARK), str(2**29)]
    with subprocess.Popen(command, stdin=subprocess.PIPE) as supervisor:
        supervisor.stdin.write(marshal.dumps(("import time\ntime.sleep(100)", "")))
        supervisor.stdin.close()
        ours = f"sandbox {60 + MARK} "
        wait_until(lambda: sum(ours in line for line in processes()) == 2)
        supervisor.kill()
        wait_until(lambda: not any(ours in line for line in processes()))


def wait_until(condition):
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


HONEST = programs("""
# prints
print("hello")
sys.stderr.write("x")
# prints much
for i in range(20000): print("line", i)
# uses the standard library
import bisect, collections, copy, dataclasses, datetime, decimal, enum, fractions, functools, hashlib, heapq
import itertools, json, math, operator, random, re, sqlite3, statistics, string, subprocess, threading, typing
import asyncio, multiprocessing, ssl, unittest, uuid, zoneinfo
assert hashlib.md5(b"").hexdigest()[:4] == "d41d" and math.isclose(1, 1)
# makes a dataclass
from dataclasses import dataclass
from typing import NamedTuple
@dataclass
class P:
    x: int = 1
class N(NamedTuple):
    x: int
assert P() == P(1) and N(1).x == 1
# pickles a class of its own
import pickle
class P: pass
assert isinstance(pickle.loads(pickle.dumps(P())), P)
# has a file of its own
with open("mine.txt", "w") as file: file.write("3")
assert open("mine.txt").read() == "3"
# has a temporary folder
import tempfile
with tempfile.TemporaryDirectory() as folder: open(os.path.join(folder, "x"), "w").close()
# throws output away
print("x", file=open(os.devnull, "w"))
# is deep
def depth(n): return n and 1 + depth(n - 1)
assert depth(900) == 900
# has threads
from concurrent.futures import ThreadPoolExecutor
with ThreadPoolExecutor(4) as pool: assert sum(pool.map(abs, range(9))) == 36
# has an event loop
import asyncio
asyncio.run(asyncio.sleep(0))
# has a main block
if __name__ == "__main__": print("main")
# frees memory
for _ in range(20): x = bytearray(100 * 2**20)
# reads the text of an exception
import traceback
try: 1 / 0
except ZeroDivisionError: assert "division" in traceback.format_exc()
# reads no input
try: input()
except EOFError: pass
# takes a builtin's name
def sum(a, b): return a + b
""")
TESTS = "assert f(2) == 3\n"


@pytest.mark.parametrize("mode", ["sandbox", "unsafe"])
def test_honest_programs_pass(mode):
    texts = [(f"import os, sys\n{code}\ndef f(x): return x + 1\n", TESTS) for code in HONEST.values()]
    outcomes = dict(zip(HONEST, run_all(texts, mode=mode)))
    assert {tried: outcome for tried, outcome in outcomes.items() if not outcome.passed} == {}


def test_tests_see_the_program_but_do_not_change_it():
    program = "def sum(a, b): return a + b\ndef more(x): return sum(x, 1)"
    assert run_one(program, "assert sum(1, 2) == 3\nsum = None\nassert more(1) == 2").passed
    assert run_one(program, "assert sum(1, 2) == 4").reason == "wrong"
    assert not run_one("def f(x):\n    \"\"\"", "assert True\n\"\"\"").passed  # a text that is not closed


def test_outcomes_come_in_order():
    texts = [(f"if {i % 3 == 0}: raise ValueError({i})", "") for i in range(12)]
    outcomes = run_all(texts, progress="running")
    assert [outcome.passed for outcome in outcomes] == [i % 3 != 0 for i in range(12)]
    assert outcomes[3] == (False, "error", "ValueError: 3")


def test_programs_run_alike_every_time():
    source = "assert False, (list({'a', 'b', 'c', 'd', 'e'}), hash('x'))"
    assert len({run_one(source).detail for _ in range(3)}) == 1


def test_any_text_is_only_a_failure():
    texts = ("\0", "\ud800", "(" * 5000, "-" * 3000 + "1", "-" * 100_000 + "1", "def", "\t x",
             "x = '" + "y" * 10**6)
    outcomes = run_all([(text, "") for text in texts])
    assert all(outcome.reason in ("error", "killed", "memory") for outcome in outcomes), outcomes


# ------------------------------------------------------------------------------------------------------------
# Without a sandbox


@pytest.mark.parametrize("user", ["root", "ordinary user"])
def test_cleaning_up_never_fails_without_a_sandbox(user):
    outcomes, left, other = as_user(user, make_messes)
    assert {tried: outcome for tried, outcome in outcomes.items() if not outcome.passed} == {}
    assert left == ["other"] and other == (0o500, ["file"])


def make_messes():
    """Leave everything untidy. Returns (outcomes, what is left where folders are made, another folder)."""
    with tempfile.TemporaryDirectory() as place, pytest.MonkeyPatch.context() as patch:
        patch.setattr(tempfile, "tempdir", place)
        other = Path(place) / "other"
        other.mkdir()
        (other / "file").touch()
        other.chmod(0o500)
        link = f"here = os.getcwd()\nos.rmdir(here)\nos.symlink({str(other)!r}, here)"
        messes = WALLS["clean-up"] | {"its folder is a link": link}
        texts = [("import os\n" + code, "") for code in messes.values()]
        outcomes = dict(zip(messes, sandbox.run_programs(texts, "unsafe", timeout=20)))
        return outcomes, os.listdir(place), (other.stat().st_mode & 0o777, os.listdir(other))


def test_limits_hold_without_a_sandbox():
    texts = {"while True: pass": "timeout", "x = [0] * 10**8": "memory",
             "open('big', 'wb').write(bytes(2**25))": "error",
             "files = [open('x', 'w') for _ in range(99)]": "error"}
    outcomes = sandbox.run_programs([(text, "") for text in texts], "unsafe", timeout=2)
    assert [outcome.reason for outcome in outcomes] == list(texts.values())


def no_namespaces(*args, **settings):
    raise InputError("no sandbox: OSError: [Errno 1] unshare: Operation not permitted")


@pytest.mark.parametrize("unsafe, user, words", [
    (False, 1000, "or run programs without a sandbox: --unsafe"), (True, 0, "--unsafe is not for root"),
    (False, 0, "--unsafe"), (True, 1000, None)])
def test_without_namespaces_the_user_decides(monkeypatch, capsys, unsafe, user, words):
    monkeypatch.setattr(sandbox, "run_program", no_namespaces)
    monkeypatch.setattr(os, "getuid", lambda: user)
    sandbox.pick_mode.cache_clear()
    if words is None:
        assert sandbox.pick_mode(unsafe) == "unsafe"
        assert "nothing stops them from reading" in capsys.readouterr().err
    else:
        with pytest.raises(InputError, match=words) as error:
            sandbox.pick_mode(unsafe)
        assert "needs Linux" in str(error.value) and "unshare: Operation not permitted" in str(error.value)
    sandbox.pick_mode.cache_clear()


def test_walls_that_cannot_be_built_are_no_wrong_answers(monkeypatch, tmp_path):
    monkeypatch.setattr(sandbox, "JAIL", tmp_path / "jail.py")
    sandbox.JAIL.write_text("raise OSError('unshare: No space left on device')")
    with pytest.raises(InputError, match="no sandbox: OSError: unshare: No space left on device"):
        sandbox.run_program("")


def break_sandbox():
    sandbox.run_program = no_namespaces


def test_the_scripts_say_in_one_line_what_is_missing(tmp_path, lm):
    problem = {"task_id": "x/0", "prompt": "def f(x):\n", "entry_point": "f", "test": "",
               "canonical_solution": "    return x\n"}
    raw = write_jsonl(tmp_path / "problems.jsonl", [problem])
    for flags in (("evaluate.py", "humaneval", "--model", lm, "--data", raw, "--n", 1, "--k", 1),
                  ("data/prepare.py", "code-correctness", "--raw", raw, "--out", tmp_path / "out.jsonl")):
        done = run(*flags, before=break_sandbox)
        assert done.returncode == 2 and done.stderr.count("\n") == 1, done
        assert "the sandbox for programs needs Linux" in done.stderr and "--unsafe" in done.stderr


def test_the_documentation_counts_these_programs():
    text = (ROOT / "docs" / "sandbox.md").read_text()
    rows = re.findall(r"^\| ([a-z\- ]+) \| (\d+) \|", text, re.MULTILINE)
    assert dict(rows) == {wall: str(len(listed)) for wall, listed in WALLS.items()}
