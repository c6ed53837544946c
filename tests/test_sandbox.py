"""Programs that attack must fail and leave the caller as it was; honest programs must pass."""
import os
import socket
import tempfile

import pytest

from evals.sandbox import sandbox

TIMEOUT = 2 + os.getpid() / 1e8  # it stands in the arguments of every process of the sandbox that this file starts
ASLEEP = str(86000 + os.getpid() / 1e8)  # seconds that the attacks' own processes sleep, to find them by

# Each passes its test (f(2) == 3) only if the attack succeeds. CALLER is the caller's process id, PLANTED a file of the
# caller's in a folder of its own, PORT a server's, ASLEEP see above.
SUCCESS = "\ndef f(x):\n    return 3\n"
REPORT_EVERYWHERE = """
def f(x):
    import os
    for guess in (b"passed\\n", b"passed", b"1", b"True", b"\\0" * 32):
        for fd in range(64):
            try: os.write(fd, guess)
            except OSError: pass
    os._exit(0)
"""
ATTACKS = {
    # using up
    "fork bomb": "import os\nwhile True:\n    try: os.fork()\n    except OSError: pass",
    "a hundred processes": "import os, time\nfor _ in range(100):\n    if os.fork() == 0: time.sleep(9)" + SUCCESS,
    "10 GB": "x = [0] * (10 * 2**30 // 8)" + SUCCESS,
    "endless output": "while True: print('x' * 10000)",
    "endless error output": "import sys\nwhile True: sys.stderr.write('x' * 10000)",
    "endless report": "import os\nwhile True:\n    for fd in range(3, 20):\n        try: os.write(fd, b'x' * 10000)\n        except OSError: pass",
    "infinite loop": "while True: pass",
    "sleep for ever": "import time\ntime.sleep(1e6)",
    "wait for input": "import sys\nif sys.stdin.read() == '': raise EOFError",
    "huge file": "with open('big', 'wb') as file:\n    for _ in range(200): file.write(bytes(2**20))" + SUCCESS,
    "thousand files": "files = [open(str(i), 'w') for i in range(1000)]" + SUCCESS,
    "thousand threads": "import threading, time\nfor _ in range(1000): threading.Thread(target=time.sleep, args=(9,), daemon=True).start()" + SUCCESS,
    "higher limits": "import resource as r\ndef f(x):\n    r.setrlimit(r.RLIMIT_FSIZE, (2**40, 2**40))\n    return 3",
    # crashes
    "deep recursion": "import sys\nsys.setrecursionlimit(10**9)\ndef f(x): return f(x) + 1",
    "crash of the C stack": "import ctypes\nctypes.string_at(0)" + SUCCESS,
    "deep nesting": "eval('(' * 100000)",
    # ending early
    "os._exit": "import os\nos._exit(0)",
    "os._exit in a test": "import os\ndef f(x): os._exit(0)",
    "SystemExit": "raise SystemExit",
    "SystemExit in a test": "def f(x): raise SystemExit(0)",
    "StopIteration": "raise StopIteration",
    "StopIteration in a test": "def f(x): raise StopIteration",
    "exec another program": "import os\nos.execv('/bin/true', ['true'])",
    "killing itself": "import os, signal\nos.kill(os.getpid(), signal.SIGKILL)",
    "unfinished text": 'def f(x):\n    """',
    # other processes
    "ignoring signals": "import signal\nfor s in range(1, 60):\n    try: signal.signal(s, signal.SIG_IGN)\n    except (OSError, ValueError): pass\nwhile True: pass",
    "killing its group": "import os, signal\nos.kill(0, signal.SIGKILL)",
    "killing its parent": "import os, signal\nos.kill(os.getppid(), signal.SIGKILL)" + SUCCESS.replace("3", "2"),
    "killing the caller": "import os, signal\nos.kill(CALLER, signal.SIGKILL)" + SUCCESS,
    "interrupting the supervisor": "import os, signal\nfor s in (2, 15, 19):\n    os.kill(os.getppid(), s)",
    "daemon": "import os, time\nif os.fork() == 0:\n    os.setsid()\n    if os.fork() == 0: os.execv('/bin/sleep', ['sleep', ASLEEP])\n    os._exit(0)\ntime.sleep(0.2)",
    "daemon that holds files": "import os\nif os.fork() == 0:\n    os.setsid()\n    while True: pass\nos._exit(0)",
    "subprocess": "import subprocess\nsubprocess.Popen(['/bin/sleep', ASLEEP], start_new_session=True)",
    "limits of the caller": "import resource\nresource.prlimit(CALLER, resource.RLIMIT_NOFILE, (64, 64))" + SUCCESS,
    "the caller's memory": "import os\nos.stat(f'/proc/{CALLER}/mem')\nopen(f'/proc/{CALLER}/mem', 'r+b')" + SUCCESS,
    "the caller's environment": "def f(x): return int(open(f'/proc/{CALLER}/environ').read().split('HHH_PLANTED=')[1][0])",
    "the parent's environment": "import os\ndef f(x): return int(open(f'/proc/{os.getppid()}/environ').read().split('HHH_PLANTED=')[1][0])",
    "network": "import socket\nsocket.create_connection(('127.0.0.1', PORT)).send(b'hello')" + SUCCESS,
    # files
    "the environment": "import os\ndef f(x): return int(os.environ['HHH_PLANTED'])",
    "writing outside": "open(PLANTED, 'w').write('broken')" + SUCCESS,
    "deleting outside": "import shutil, os\nshutil.rmtree(os.path.dirname(PLANTED), ignore_errors=True)\nos.remove(PLANTED)" + SUCCESS,
    "through a link": "import os\nos.symlink('/', 'root')\nopen('root' + PLANTED, 'w').write('broken')" + SUCCESS,
    "its folder as a link": "import os\nhere = os.getcwd()\nos.rmdir(here)\nos.symlink('/', here)\nos.remove(here + PLANTED)" + SUCCESS,
    "upwards": "import os\nopen('../' * 30 + PLANTED, 'w').write('broken')" + SUCCESS,
    "moving outside": "import os\nopen('mine', 'w').write('broken')\nos.replace('mine', PLANTED)" + SUCCESS,
    "no permissions": "import os\nos.makedirs('a/b/c')\nfor p in ('a/b/c', 'a/b', 'a', '.'): os.chmod(p, 0)",
    "the library": "import os, json\nopen(os.path.join(os.path.dirname(json.__file__), 'planted.py'), 'w').write('x = 1')" + SUCCESS,
    # forging success
    "guesses into every file": REPORT_EVERYWHERE,
    "closing every file": "import os\nos.closerange(0, 1000)" + SUCCESS,
    "printing": "print('passed')\nprint('passed\\n' * 1000)\nraise SystemExit(0)",
    "patching builtins": "import builtins\nbuiltins.abs = lambda x: 0\nfor name in ('all', 'len', 'isinstance', 'exec', 'compile', 'AssertionError', 'BaseException', 'MemoryError'):\n"
                         "    setattr(builtins, name, lambda *a, **k: True)\ndef f(x): return 7",
    "patching open and print": "import builtins\nbuiltins.open = builtins.print = lambda *a, **k: None\ndef f(x): return 7",
    "shadowing": "abs = lambda x: 0\nrange = lambda *a: []\nall = any = lambda *a: True\nf = lambda x: 7",
    "patching unittest": "import unittest\nunittest.TestCase.assertEqual = lambda *a: None\nunittest.TestCase.fail = lambda *a: None\nf = lambda x: 7",
    "patching sys.modules": "import math, sys, types\nmath.isclose = lambda *a: True\nsys.modules['math'] = types.SimpleNamespace(isclose=math.isclose)\nf = lambda x: 7",
    "patching os.write": "import os\nwrite = os.write\nos.write = lambda fd, text: write(fd, b'passed\\n')\nf = lambda x: 7",
    "tracing": "import sys\ndef trace(frame, event, arg):\n    if frame.f_code.co_filename == '<tests>' and event == 'line' and frame.f_lineno < 4:\n"
               "        frame.f_lineno = 4\n    return trace\nsys.settrace(trace)\nf = lambda x: 7",
    "jumping in the test's frame": "import sys\ndef f(x):\n    frame = sys._getframe(1)\n    frame.f_trace = lambda *a: None\n    sys.settrace(lambda *a: None)\n"
                                   "    frame.f_lineno += 1\n    return 7",
    "atexit": "import atexit, os\natexit.register(os._exit, 0)\n" + REPORT_EVERYWHERE.replace("def f(x)", "def report()") + "\natexit.register(report)\nf = lambda x: 7",
    "__del__": REPORT_EVERYWHERE.replace("def f(x)", "def report()") + "\nclass D:\n    def __del__(self): report()\nd = D()\nraise ValueError",
    "frames": """
import os, sys
def f(x):
    seen, todo = set(), [sys._getframe(0)]
    while todo:
        thing = todo.pop()
        if id(thing) in seen or len(seen) > 100000: continue
        seen.add(id(thing))
        if isinstance(thing, bytes) and len(thing) == 32:
            for fd in range(64):
                try: os.write(fd, thing)
                except OSError: pass
        if isinstance(thing, (list, tuple, set, frozenset)): todo += list(thing)
        elif isinstance(thing, dict): todo += [*thing.keys(), *thing.values()]
        elif type(thing).__name__ == 'frame': todo += [thing.f_back, thing.f_locals, thing.f_globals, thing.f_code]
        elif callable(thing) or type(thing).__name__ in ('code', 'cell', 'module'):
            for name in ('__dict__', '__globals__', '__closure__', '__defaults__', 'co_consts', 'cell_contents', '__self__'):
                try: todo.append(getattr(thing, name))
                except Exception: pass
    os._exit(0)
""",
    "gc": """
import gc, os
def f(x):
    for thing in gc.get_objects():
        for token in [thing, *gc.get_referents(thing)]:
            if isinstance(token, bytes) and len(token) == 32:
                for fd in range(64):
                    try: os.write(fd, token)
                    except OSError: pass
    os._exit(0)
""",
    "its own memory": "import os, re\nmemory = open('/proc/self/mem', 'rb')\nopen('/proc/self/maps')" + SUCCESS.replace("3", "7"),
    "reading every file": "import os\nfor fd in range(64):\n    try: token = os.read(fd, 32)\n    except OSError: continue\n    for other in range(64):\n"
                          "        try: os.write(other, token)\n        except OSError: pass\nos._exit(0)",
    "a marker of its own": "f = lambda x: 7\n# tests of f\nraise SystemExit",
    "a thread that reports": "import threading\n" + REPORT_EVERYWHERE.replace("def f(x)", "def report()") + "\nthreading.Thread(target=report).start()\nf = lambda x: 7",
}
TESTS = "assert f(2) == 3\nassert f(2) == 3\npass\n"
HELPED = {"patching unittest": "import unittest\nunittest.TestCase().assertEqual(f(2), 3)", "patching sys.modules": "import math\nassert math.isclose(f(2), 3)",
          "patching builtins": "assert abs(f(2) - 3) == 0\nassert all([f(2) == 3])", "shadowing": "for x in range(2, 3):\n    assert abs(f(x) - 3) == 0"}
# Only where the kernel makes the walls: these would hurt if a closed door turned out to be open.
NAMESPACE_ONLY = {"killing everything": "import os, signal\nos.kill(-1, signal.SIGKILL)" + SUCCESS.replace("3", "2"),
                  "reading outside": "def f(x): return int(open(PLANTED).read())"}


def processes():
    """Command lines of all processes."""
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open(f"/proc/{pid}/cmdline", errors="replace") as file:
                yield file.read().replace("\0", " ")
        except OSError:
            pass


@pytest.fixture(scope="module", params=["namespace", "user", "plain"])
def attacked(request, tmp_path_factory):
    """All attacks in one mode: {name: outcome}, and what is found of them afterwards."""
    mode, place = request.param, tmp_path_factory.mktemp("sandbox")
    if mode != "plain" and sandbox.isolation() != mode and not (mode == "user" and os.getuid() == 0 and sandbox._run("import json", 5, 2**29, mode).passed):
        pytest.skip(f"mode {mode} does not work here")
    planted = place / "caller" / "planted"
    planted.parent.mkdir()
    planted.write_text("3")
    planted.chmod(0o666)
    (place / "tmp").mkdir(mode=0o777)
    attacks = ATTACKS | (NAMESPACE_ONLY if mode == "namespace" else {})
    with pytest.MonkeyPatch.context() as patch, socket.create_server(("127.0.0.1", 0)) as server:
        patch.setattr(sandbox, "isolation", lambda: mode)
        patch.setattr(tempfile, "tempdir", str(place / "tmp"))
        patch.setenv("HHH_PLANTED", "3")
        known = f"CALLER, PLANTED, PORT, ASLEEP = {os.getpid()}, {str(planted)!r}, {server.getsockname()[1]}, {ASLEEP!r}\n"
        sources = [sandbox.with_tests(known + code, HELPED.get(name, TESTS), "f") for name, code in attacks.items()]
        outcomes = dict(zip(attacks, sandbox.run_programs(sources, workers=8, timeout=TIMEOUT)))
        server.setblocking(False)
        try:
            server.accept()
            connected = True
        except BlockingIOError:
            connected = False
    survivors = [line for line in processes() if ASLEEP in line or f"jail.py {mode} {TIMEOUT}" in line]
    yield mode, outcomes, {"connected": connected, "survivors": survivors, "left": os.listdir(place / "tmp"),
                           "planted": planted.read_text() if planted.exists() else None, "beside": os.listdir(planted.parent)}


def test_no_attack_passes(attacked):
    mode, outcomes, _ = attacked
    assert len(outcomes) >= 60
    assert {name: outcome for name, outcome in outcomes.items() if outcome.passed} == {}


def test_attacks_leave_the_caller_unharmed(attacked):
    _, _, found = attacked
    assert found == {"connected": False, "survivors": [], "left": [], "planted": "3", "beside": ["planted"]}


def test_reasons(attacked):
    mode, outcomes, _ = attacked
    reasons = {"10 GB": "memory", "infinite loop": "timeout", "sleep for ever": "timeout", "endless output": "timeout", "os._exit": "killed",
               "SystemExit": "error", "patching open and print": "wrong", "unfinished text": "error"}
    assert {name: outcomes[name].reason for name in reasons} == reasons
    assert outcomes["unfinished text"].detail.startswith("SyntaxError: ")
    assert all(len(outcome.detail) < 400 for outcome in outcomes.values())


HONEST = {
    "prints": "print('hello')\nimport sys\nsys.stderr.write('x')",
    "much output": "for i in range(20000): print('line', i)",
    "standard library": "import bisect, collections, copy, dataclasses, datetime, decimal, enum, fractions, functools, hashlib, heapq, itertools\n"
                        "import json, math, operator, random, re, statistics, string, subprocess, sys, threading, time, typing, unittest\n"
                        "assert hashlib.md5(b'').hexdigest()[:4] == 'd41d' and math.isclose(1, 1)",
    "a dataclass": "from __future__ import annotations\nfrom dataclasses import dataclass\nfrom typing import NamedTuple\n"
                   "@dataclass\nclass P:\n    x: int = 1\nclass N(NamedTuple):\n    x: int\nassert P() == P(1) and N(1).x == 1",
    "a file of its own": "with open('mine.txt', 'w') as file: file.write('3')\nassert open('mine.txt').read() == '3'",
    "a temporary folder": "import os, tempfile\nwith tempfile.TemporaryDirectory() as folder:\n    open(os.path.join(folder, 'x'), 'w').close()",
    "recursion": "def depth(n): return n and 1 + depth(n - 1)\nassert depth(900) == 900",
    "threads": "from concurrent.futures import ThreadPoolExecutor\nwith ThreadPoolExecutor(4) as pool: assert sum(pool.map(abs, range(9))) == 36",
    "a main block": "if __name__ == '__main__':\n    print('main')",
    "memory that is free again": "for _ in range(20): x = bytearray(100 * 2**20)",
    "exceptions and their text": "import traceback\ntry: 1 / 0\nexcept ZeroDivisionError: assert 'division' in traceback.format_exc()",
    "no input": "try: input()\nexcept EOFError: pass",
    "a builtin's name": "def sum(a, b): return a + b",
}


@pytest.mark.parametrize("mode", ["namespace", "plain"])
def test_honest_programs_pass(mode, monkeypatch):
    if mode == "namespace" and sandbox.isolation() != mode:
        pytest.skip("no namespaces here")
    monkeypatch.setattr(sandbox, "isolation", lambda: mode)
    sources = [sandbox.with_tests(code + "\ndef f(x):\n    return x + 1\n", TESTS, "f") for code in HONEST.values()]
    outcomes = dict(zip(HONEST, sandbox.run_programs(sources, workers=4, timeout=20)))
    assert {name: outcome for name, outcome in outcomes.items() if not outcome.passed} == {}


def test_the_tests_see_an_entry_point_that_has_a_builtins_name():
    tests = "assert sum(1, 2) == 3 and max(1, 2) == 2"
    code = "def sum(a, b): return a + b\nmax = 5"
    assert sandbox.run_program(sandbox.with_tests(code, tests, "sum")).passed
    assert not sandbox.run_program(sandbox.with_tests(code, tests, "max")).passed


def test_outcomes_come_in_order_and_a_source_without_tests_passes_at_its_end():
    outcomes = sandbox.run_programs([f"if {i % 3 == 0}: raise ValueError({i})" for i in range(12)], progress="running")
    assert [outcome.passed for outcome in outcomes] == [i % 3 != 0 for i in range(12)]
    assert outcomes[3] == (False, "error", "ValueError: 3")


def test_programs_run_alike_every_time():
    source = "assert False, (list({'a', 'b', 'c', 'd', 'e'}), hash('x'))"
    assert len({sandbox.run_program(source).detail for _ in range(3)}) == 1


def test_any_text_is_only_a_failure():
    for text in ("\0", "\ud800", "(" * 5000, "def", "\t x", "x = '" + "y" * 10**6):
        assert sandbox.run_program(text).reason in ("error", "killed", "memory")
