"""Programming problems, their prompts and estimators (evals/code.py), and programs that are broken on purpose
(evals/mutants.py)."""
import ast
import itertools
import random
from argparse import Namespace

import numpy as np
import pytest

from conftest import DATA, write_jsonl
from data.errors import InputError
from data.sources.count import Count
from evals import code, correctness
from evals.mutants import mutate
from evals.sandbox import sandbox

HUMANEVAL = {
    "task_id": "HumanEval/0", "entry_point": "add",
    "prompt": '\n\ndef helper(x):\n    return x\n\n\ndef add(a, b):\n    """ Sum.\n    """\n',
    "canonical_solution": "    return helper(a) + b\n",
    "test": "\n\ndef check(candidate):\n    assert candidate(1, 2) == 3 == helper(3)\n"}
MBPP = {
    "task_id": 7, "text": "Write a function to add r to the pair's sum, see \\n.",
    "code": "import math\r\nR = 1\r\n"
            "class Pair:\r\n\tdef __init__(self, a, b):\r\n\t\tself.a, self.b = a, b\r\n"
            "def base(p): return p.a + p.b\r\n"
            "def total(p, r=2):\r\n  '''Old.'''\r\n  return base(p) + r * R + math.floor(0.5)",
    "test_setup_code": "one = Pair(1, 1)\r\n", "challenge_test_list": [],
    "test_list": ["assert total(Pair(1, 2)) == 5", "assert total(one, 0) == 2"]}
DEEP, DEEPER = "-" * 3000 + "1", "-" * 100_000 + "1"  # nested deeper than ast can write, and than it can read


def run_all(texts, timeout=20):
    """Outcomes of [(program, tests)], without a sandbox where there is none: these programs are harmless."""
    try:
        mode = sandbox.pick_mode()
    except InputError:
        mode = "unsafe"
    return sandbox.run_programs(texts, mode, timeout=timeout)


def passes(problem, completion):
    return run_all([code.program(problem, completion)])[0].passed


def test_humaneval(tmp_path):
    problem, = code.humaneval(write_jsonl(tmp_path / "problems.jsonl", [HUMANEVAL]))
    assert problem.id == "HumanEval/0" and problem.entry_point == "add"
    assert problem.prompt == HUMANEVAL["prompt"] and passes(problem, problem.solution)
    for wrong in ("    return helper(a) - b\n", "", "    raise SystemExit"):
        assert not passes(problem, wrong)


def test_mbpp_in_humanevals_form(tmp_path):
    problem, = code.mbpp(write_jsonl(tmp_path / "problems.jsonl", [MBPP]))
    assert problem.id == "MBPP/7" and problem.entry_point == "total"
    assert problem.prompt.endswith('''
def total(p, r=2):
    """Write a function to add r to the pair's sum, see \\\\n.

    assert total(Pair(1, 2)) == 5
    """
''')
    assert "class Pair" in problem.prompt and "Old" not in problem.solution
    # Without the imports the solution's own body would not run; a helper of its own the model has to write.
    assert "base" not in problem.prompt and problem.prompt.startswith("import ") and "import" not in problem.solution
    assert passes(problem, problem.solution) and passes(problem, "    return p.a + p.b + r\n")
    assert not passes(problem, "    return 5\n")


@pytest.mark.parametrize("read, record, change, words", [
    (code.humaneval, HUMANEVAL, {"prompt": None}, '"prompt" must be a text'),
    (code.humaneval, HUMANEVAL, {"test": 3}, '"test" must be a text'),
    (code.humaneval, HUMANEVAL, {"prompt": "# <eot>\n" + HUMANEVAL["prompt"]}, "the text holds <eot>"),
    (code.mbpp, MBPP, {"text": "Write <eoc>."}, "the text holds <eoc>"),
    (code.humaneval, HUMANEVAL, {"task_id": None}, '"task_id" must be'),
    (code.mbpp, MBPP, {"text": None}, '"text" must be a text'),
    (code.mbpp, MBPP, {"code": "def f(:"}, "code and tests do not agree"),
    (code.mbpp, MBPP, {"code": f"def total(p):\n    return {DEEP}"}, "code and tests do not agree"),
    (code.mbpp, MBPP, {"code": f"def total(p):\n    return {DEEPER}"}, "code and tests do not agree"),
    (code.mbpp, MBPP, {"test_list": [f"assert total({DEEPER})"]}, "code and tests do not agree"),
    (code.mbpp, MBPP, {"test_list": ["assert f(1)"]}, "do not agree"),
    (code.mbpp, MBPP, {"test_list": []}, "do not agree"),
    (code.mbpp, MBPP, {"test_list": 5}, '"test_list" must be a list')])
def test_bad_records_are_named(tmp_path, read, record, change, words):
    path = write_jsonl(tmp_path / "problems.jsonl", [record, record | change])
    with pytest.raises(InputError, match=f"problems.jsonl:2: .*{words}"):
        list(read(path))


NOTE = '\n"""\nCounting\n\n\nInput:\n    n: how far\n"""\n'
QUIXBUGS = {
    "python_programs/count.py":
        "from itertools import count as up\n\n"
        "def count(n):\n    for i in range(n):\n        yield i\n" + NOTE,
    "correct_python_programs/count.py":
        "import math\ndef count(n):\n    for i in range(n):\n        yield i + math.floor(1)\n" + NOTE,
    "json_testcases/count.json": "[[3], [1, 2, 3]]\n\n[[0], []]\n[2, [1, 2]]\n",
    "python_programs/halves.py": "def halves(xs):\n    return [(x, x // 2) for x in xs]\n",
    "correct_python_programs/halves.py":
        "def halves(xs):\n    return [(x, x / 2) for x in xs]\n\n'''\ndef halves(xs):\n    pass\n'''\n",
    "json_testcases/halves.json": "[[[1, 3]], [[1, 0.50000000001], [3, 1.5000001]]]\n[[[0]], [[0, 0.0]]]\n",
    **dict.fromkeys(("python_programs/path.py", "python_programs/node.py", "python_programs/path_test.py"),
                    "def path(graph): return graph\n")}


def write_quixbugs(folder, **changes):
    """The folder of a small QuixBugs. changes: contents of files, by their paths."""
    for path, content in (QUIXBUGS | changes).items():
        (folder / path).parent.mkdir(exist_ok=True)
        (folder / path).write_text(content)
    return folder


def test_quixbugs(tmp_path, capsys):
    count, halves = code.quixbugs(write_quixbugs(tmp_path))
    assert "1 of 3 programs left out, as they have no json_testcases: path\n" in capsys.readouterr().out
    assert (count.id, count.entry_point) == ("QuixBugs/count", "count")
    assert count.prompt == ("from itertools import count as up\n\ndef count(n):\n"
                            '    """Counting\n\n\n    Input:\n        n: how far\n    """\n')
    assert count.buggy == count.prompt + "    for i in range(n):\n        yield i\n"
    for problem in (count, halves):
        assert passes(problem, problem.solution)
        assert not passes(problem, problem.buggy.removeprefix(problem.prompt))
    assert passes(count, "    return list(range(1, n + 1))\n")
    assert not passes(count, "    return range(1, n + 1)\n")


def test_quixbugs_tolerances_and_skipped_cases(tmp_path, monkeypatch):
    monkeypatch.setattr(code, "QUIXBUGS_TOLERANCE", {"halves": -1})
    monkeypatch.setattr(code, "QUIXBUGS_SKIPPED", {"count": 3})
    count, halves = code.quixbugs(write_quixbugs(tmp_path, **{
        "python_programs/halves.py": "def halves(x, error):\n    return x / 2 + 0.1\n",
        "correct_python_programs/halves.py": "def halves(x, error):\n    return x / 2\n",
        "json_testcases/halves.json": "[[4, 0.3], 2.2]\n[[4, 0.05], 2]\n"}))
    assert passes(halves, halves.solution) and passes(halves, "    return x / 2 + 0.04\n")
    assert not passes(halves, "    return x / 2 + 0.06\n")
    assert passes(count, "    return [[], 1, [1, 2]][n]\n")  # the case of n = 3 is skipped


@pytest.mark.parametrize("path, text, words", [
    ("json_testcases/halves.json", "[[1], 2]\n[[1], 2, 3]\n", "halves.json:2: expected"),
    ("json_testcases/halves.json", "[[1], \n", "halves.json:1: expected"),
    ("json_testcases/halves.json", "[" * 100_000, "halves.json:1: expected"),
    ("json_testcases/halves.json", "\n", "halves.json: no tests"),
    ("python_programs/halves.py", "x = 1\n", "halves.py:1: not a Python program with a function halves"),
    ("python_programs/halves.py", f"def halves(x):\n    return {DEEP}", "halves.py:1: not a Python program"),
    ("correct_python_programs/halves.py", f"x = {DEEPER}", "halves.py:1: not a Python program"),
    ("correct_python_programs/halves.py", "x = 1\ndef halves(:", "halves.py:2: not a Python program")])
def test_bad_quixbugs_files_are_named(tmp_path, path, text, words):
    with pytest.raises(InputError, match=words):
        list(code.quixbugs(write_quixbugs(tmp_path, **{path: text})))


def test_a_folder_that_is_not_quixbugs(tmp_path):
    with pytest.raises(InputError, match="no python_programs"):
        list(code.quixbugs(tmp_path))


# ------------------------------------------------------------------------------------------------------------
# Prompts


def test_formats(tmp_path):
    problem, = code.humaneval(write_jsonl(tmp_path / "problems.jsonl", [HUMANEVAL]))
    shown = HUMANEVAL["prompt"].strip()
    assert code.format_prompt(problem, "plain") + "\n" == problem.prompt  # the model writes the newline itself
    assert code.format_prompt(problem, "prompt") == (
        f"\n\nHuman: Please complete the body of this Python function:\n\n```python\n{shown}\n```"
        f"\n\nAssistant: Here it is:\n\n```python\n{shown}")
    repair = next(code.quixbugs(write_quixbugs(tmp_path)))
    for format in ("plain", "prompt"):
        text = code.format_prompt(repair, format)
        assert repair.buggy.strip() in text and text.endswith(repair.prompt.rstrip()) and "bug" in text
    with pytest.raises(ValueError, match="plain or prompt"):
        code.format_prompt(problem, "other")


BODY = "    x = '#'\n    if x:\n        print(x)  # shown\n    # so\n    def g(): pass\n\n    return g\n"


@pytest.mark.parametrize("after", [
    "\ndef other():", "def other():\n  pass", "class A:", "# A comment", "if __name__ == '__main__':",
    "print(f(1))", "@wraps", "\n\n# x\ndef y"])
def test_a_completion_ends_with_its_function(after):
    for format in ("plain", "prompt"):
        for newline in ("\n", ""):
            assert code.cut(newline + BODY + after, format).rstrip() == BODY.rstrip()
        assert code.cut("\n" + BODY, format) == code.cut(BODY, format) == BODY
        assert code.cut("", format) == code.cut(after.strip(), format) == ""


def test_a_completion_in_a_dialogue_ends_with_its_block():
    for after in ("```\n\nI hope this helps.", "\n\nHuman: Thanks"):
        assert code.cut(BODY + after, "prompt").rstrip() == BODY.rstrip()


# ------------------------------------------------------------------------------------------------------------
# Estimators


def test_pass_at_k_is_the_share_of_subsets_with_a_success():
    for n in range(1, 8):
        for c in range(n + 1):
            for k in range(1, n + 1):
                subsets = list(itertools.combinations([1] * c + [0] * (n - c), k))
                assert code.pass_at_k(n, c, k) == pytest.approx(np.mean([max(s) for s in subsets]), abs=1e-15)
    assert code.pass_at_k(10000, 1, 1) == 1e-4 and code.pass_at_k(10**4, 5000, 5000) == 1.0


def test_pass_at_k_of_arrays():
    found = code.pass_at_k(10, np.array([[0, 1], [5, 10]]), 2)
    assert found.shape == (2, 2) and np.allclose(found, [[0, 0.2], [7 / 9, 1]])


@pytest.mark.parametrize("n, c, k", [(5, 1, 6), (5, 1, 0), (5, 6, 1), (5, -1, 1), (5, np.array([1, 9]), 1)])
def test_pass_at_k_refuses(n, c, k):
    with pytest.raises(ValueError, match="pass@k needs"):
        code.pass_at_k(n, c, k)


def brute_accuracy_at_k(scores, correct, k):
    """Over all subsets of k: the share of correct ones among the best of the subset."""
    subsets = [[(scores[i], correct[i]) for i in subset]
               for subset in itertools.combinations(range(len(scores)), k)]
    return np.mean([np.mean([c for s, c in subset if s == max(subset)[0]]) for subset in subsets])


def test_accuracy_at_k_is_the_expectation_over_subsets():
    rng = random.Random(0)
    for _ in range(60):
        n = rng.randint(1, 8)
        tied = rng.random() < 0.7
        scores = [rng.choice([0.5, 1, 2, 3, 4]) for _ in range(n)] if tied else rng.sample(range(20), n)
        correct = [rng.randint(0, 1) for _ in range(n)]
        for k in range(1, n + 1):
            expected = pytest.approx(brute_accuracy_at_k(scores, correct, k), abs=1e-12)
            assert code.accuracy_at_k(scores, correct, k) == expected


def test_accuracy_at_k_at_its_ends():
    scores, correct = np.arange(100)[::-1], np.arange(100) < 10
    assert code.accuracy_at_k(scores, correct, 1) == pytest.approx(0.1)  # one: the share of correct ones
    assert code.accuracy_at_k(scores, correct, 100) == 1  # all: the best one
    assert code.accuracy_at_k(-scores, correct, 100) == 0
    for bad in ((scores, correct, 0), (scores, correct, 101), (scores, correct[1:], 1),
                ([1, np.nan], [0, 1], 1)):
        with pytest.raises(ValueError, match="accuracy@k needs"):
            code.accuracy_at_k(*bad)


# ------------------------------------------------------------------------------------------------------------
# Broken programs

SOURCE = '''
import math
def area(w, h=2, big=True):
    """Area 1."""
    if w < 0 or not big:
        return 0
    def bottom(n):
        return math.floor(n)
    parts = [w] * h
    total = 0
    for part in parts[1:h]:
        total += part
    while big and total == -1:
        total = total + 1
    return total + bottom(w)
'''


def test_mutants_differ_from_the_program_and_each_other():
    mutants = list(mutate(SOURCE, random.Random(0)))
    original = ast.unparse(ast.parse(SOURCE))
    assert len(mutants) > 40 and len({*mutants, original}) == len(mutants) + 1
    for mutant in mutants:
        assert ast.unparse(ast.parse(mutant)) == mutant and mutant.startswith("import math\n")
        assert '"""Area 1."""' in mutant and "def area(w, h=2, big=True)" in mutant
    for change in ("w <= 0", "w < 1", "w < -1", "w < 0 and", "if not (w < 0 or not big)", "parts[1:h - 1]",
                   "parts[0:h]", "total -= part", "return w\n", "h < 0", "total != -1", "    pass\n"):
        assert any(change in mutant + "\n" for mutant in mutants), change


def test_the_order_of_mutants_depends_on_the_seed_alone():
    first, again, other = (list(mutate(SOURCE, random.Random(seed))) for seed in (0, 0, 1))
    assert first == again != other and sorted(first) == sorted(other)


def test_mutants_are_mostly_wrong():
    tests = ("areas = [area(w, h) for w in range(-1, 4) for h in (1, 2, 3)]\n"
             "assert areas == [0, 0, 0, 0, 0, 0, 1, 2, 3, 2, 4, 6, 3, 6, 9]\n"
             "assert area(5, big=False) == 0\n")
    mutants = list(itertools.islice(mutate(SOURCE, random.Random(0)), 40))
    solution, *outcomes = run_all([(text, tests) for text in [SOURCE, *mutants]], timeout=2)
    assert solution.passed and sum(outcome.passed for outcome in outcomes) < 12


@pytest.mark.parametrize("depth", [100, 200, 230, 240, 250, 300, 320, 330, 400, 3000, 100_000])
def test_code_that_is_nested_deep_is_changed_or_counted(tmp_path, depth):
    record = HUMANEVAL | {"canonical_solution": f"    return {'-' * depth}helper(a) + b\n"}
    count = Count(max_bad=1)
    tasks = list(correctness.read_tasks([write_jsonl(tmp_path / "x.jsonl", [record])], count))
    bodies = [correctness.mutants(task.problem, *task.bodies, Namespace(n=8, seed=0)) for task in tasks]
    assert count.total == len(tasks) + count.n_bad == 1
    assert all(len(texts) > 1 for texts in bodies) if depth < 200 else count.n_bad or bodies
    module = tmp_path / "x.py"
    module.write_text(f"x = {'-' * depth}1\n\n\ndef f():\n    'Text'\n    return x\n")
    if depth >= 3000:
        with pytest.raises(InputError, match="x.py:1: not a Python program"):
            list(correctness.read_problems(module))


# ------------------------------------------------------------------------------------------------------------
# Published problems


def published(name):
    path = DATA / name
    if not path.exists():
        pytest.skip("no published data here")
    return path


def test_published_solutions_pass():
    problems = [*code.humaneval(published("human-eval/HumanEval.jsonl.gz")),
                *list(code.mbpp(published("mbpp/mbpp.jsonl")))[::6]]
    outcomes = run_all([code.program(problem, problem.solution) for problem in problems])
    assert {problem.id: outcome for problem, outcome in zip(problems, outcomes) if not outcome.passed} == {}


def test_all_published_repairs_pass_and_no_published_bug_does():
    problems = list(code.quixbugs(published("quixbugs")))
    assert len(problems) == 31
    correct = run_all([code.program(problem, problem.solution) for problem in problems], timeout=60)
    assert {problem.id: outcome for problem, outcome in zip(problems, correct) if not outcome.passed} == {}
    buggy = run_all([(problem.buggy, problem.tests) for problem in problems], timeout=5)
    assert [problem.id for problem, outcome in zip(problems, buggy) if outcome.passed] == []


def test_published_solutions_are_not_cut():
    problems = list(code.humaneval(published("human-eval/HumanEval.jsonl.gz")))
    for problem in problems:
        solution = problem.solution
        assert all(code.cut("\n" + solution, format) == solution for format in code.STOPS)
