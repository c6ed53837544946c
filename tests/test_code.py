"""Problems, prompts, estimators and mutants of evals/code.py."""
import ast
import itertools
import random

import numpy as np
import pytest

from conftest import DATA, write_jsonl
from data.errors import InputError
from evals import code
from evals.sandbox import sandbox

HUMANEVAL = {"task_id": "HumanEval/0", "prompt": "\n\ndef helper(x):\n    return x\n\n\ndef add(a, b):\n    \"\"\" Sum.\n    \"\"\"\n", "entry_point": "add",
             "canonical_solution": "    return helper(a) + b\n", "test": "\n\ndef check(candidate):\n    assert candidate(1, 2) == 3 == helper(3)\n"}
MBPP = {"task_id": 7, "text": "Write a function to add r to the pair's sum, see \\n.", "test_setup_code": "one = Pair(1, 1)\r\n",
        "code": "import math\r\nR = 1\r\nclass Pair:\r\n\tdef __init__(self, a, b):\r\n\t\tself.a, self.b = a, b\r\ndef base(p): return p.a + p.b\r\n"
                "def total(p, r=2):\r\n  '''Old.'''\r\n  return base(p) + r * R + math.floor(0.5)",
        "test_list": ["assert total(Pair(1, 2)) == 5", "assert total(one, 0) == 2"], "challenge_test_list": []}


def passes(problem, completion):
    return sandbox.run_program(code.program(problem, completion)).passed


def test_humaneval(tmp_path):
    problem, = code.humaneval(write_jsonl(tmp_path / "problems.jsonl", [HUMANEVAL]))
    assert problem.id == "HumanEval/0" and problem.entry_point == "add" and problem.prompt == HUMANEVAL["prompt"]
    assert passes(problem, problem.solution)
    assert not passes(problem, "    return helper(a) - b\n") and not passes(problem, "") and not passes(problem, "    raise SystemExit")


def test_mbpp_in_humanevals_form(tmp_path):
    problem, = code.mbpp(write_jsonl(tmp_path / "problems.jsonl", [MBPP]))
    assert problem.id == "MBPP/7" and problem.entry_point == "total"
    assert problem.prompt.endswith('''
def total(p, r=2):
    """Write a function to add r to the pair's sum, see \\\\n.

    assert total(Pair(1, 2)) == 5
    """
''')
    assert "class Pair" in problem.prompt and "base" not in problem.prompt and "import" not in problem.prompt and "Old" not in problem.solution
    assert passes(problem, problem.solution) and passes(problem, "    return p.a + p.b + r\n") and not passes(problem, "    return 5\n")


@pytest.mark.parametrize("read, record, change, words", [
    (code.humaneval, HUMANEVAL, {"prompt": None}, 'no text "prompt"'), (code.humaneval, HUMANEVAL, {"test": 3}, 'no text "test"'),
    (code.mbpp, MBPP, {"code": "def f(:"}, "code and tests do not agree"), (code.mbpp, MBPP, {"test_list": ["assert f(1)"]}, "do not agree"),
    (code.mbpp, MBPP, {"test_list": []}, "do not agree"), (code.mbpp, MBPP, {"text": None}, 'no text "text"')])
def test_bad_records_are_named(tmp_path, read, record, change, words):
    path = write_jsonl(tmp_path / "problems.jsonl", [record, record | change])
    with pytest.raises(InputError, match=f"problems.jsonl:2: .*{words}"):
        list(read(path))


@pytest.fixture
def quixbugs(tmp_path):
    def write(folder, name, text):
        (tmp_path / folder).mkdir(exist_ok=True)
        (tmp_path / folder / name).write_text(text)

    note = '\n"""\nCounting\n\n\nInput:\n    n: how far\n"""\n'
    write("python_programs", "count.py", "from itertools import count as up\n\ndef count(n):\n    for i in range(n):\n        yield i\n" + note)
    write("correct_python_programs", "count.py", "import math\ndef count(n):\n    for i in range(n):\n        yield i + math.floor(1)\n" + note)
    write("json_testcases", "count.json", "[[3], [1, 2, 3]]\n\n[[0], []]\n[2, [1, 2]]\n")
    write("python_programs", "halves.py", "def halves(xs):\n    return [(x, x // 2) for x in xs]\n")
    write("correct_python_programs", "halves.py", "def halves(xs):\n    return [(x, x / 2) for x in xs]\n\n'''\ndef halves(xs):\n    pass\n'''\n")
    write("json_testcases", "halves.json", "[[[1, 3]], [[1, 0.50000000001], [3, 1.5000001]]]\n[[[0]], [[0, 0.0]]]\n")
    for name in ("path", "node", "path_test"):
        write("python_programs", f"{name}.py", "def path(graph): return graph\n")
    return tmp_path


def test_quixbugs(quixbugs, capsys):
    count, halves = code.quixbugs(quixbugs)
    assert "1 of 3 programs left out, as they have no json_testcases: path\n" in capsys.readouterr().out
    assert (count.id, count.entry_point) == ("QuixBugs/count", "count")
    assert count.prompt == 'from itertools import count as up\n\ndef count(n):\n    """Counting\n\n\n    Input:\n        n: how far\n    """\n'
    assert count.buggy == count.prompt + "    for i in range(n):\n        yield i\n"
    for problem in (count, halves):
        assert passes(problem, problem.solution)
        assert not passes(problem, problem.buggy.removeprefix(problem.prompt))
    assert passes(count, "    return list(range(1, n + 1))\n") and not passes(count, "    return range(1, n + 1)\n")


@pytest.mark.parametrize("path, text, words", [
    ("json_testcases/halves.json", "[[1], 2]\n[[1], 2, 3]\n", "halves.json:2: expected"), ("json_testcases/halves.json", "[[1], \n", "halves.json:1: expected"),
    ("json_testcases/halves.json", "\n", "halves.json: no tests"), ("python_programs/halves.py", "x = 1\n", "halves.py:1: not a Python program with a function halves"),
    ("correct_python_programs/halves.py", "x = 1\ndef halves(:", "halves.py:2: not a Python program")])
def test_bad_quixbugs_files_are_named(quixbugs, path, text, words):
    (quixbugs / path).write_text(text)
    with pytest.raises(InputError, match=words):
        list(code.quixbugs(quixbugs))


def test_a_folder_that_is_not_quixbugs(tmp_path):
    with pytest.raises(InputError, match="no python_programs"):
        list(code.quixbugs(tmp_path))


# ---------------------------------------------------------------------------------------------------------------------


def test_formats(tmp_path, quixbugs):
    problem, = code.humaneval(write_jsonl(tmp_path / "problems.jsonl", [HUMANEVAL]))
    shown = HUMANEVAL["prompt"].strip()
    assert code.format_prompt(problem, "plain") == problem.prompt
    assert code.format_prompt(problem, "prompt") == (
        f"\n\nHuman: Please complete the body of this Python function:\n\n```python\n{shown}\n```\n\nAssistant: Here it is:\n\n```python\n{shown}\n")
    repair = next(code.quixbugs(quixbugs))
    for how in ("plain", "prompt"):
        text = code.format_prompt(repair, how)
        assert repair.buggy.strip() in text and text.endswith(repair.prompt) and "bug" in text
    with pytest.raises(ValueError, match="plain or prompt"):
        code.format_prompt(problem, "other")


BODY = "    x = '#'\n    if x:\n        print(x)  # shown\n    # so\n    def g(): pass\n\n    return g\n"


@pytest.mark.parametrize("after", ["\ndef other():", "def other():\n  pass", "class A:", "# A comment", "if __name__ == '__main__':", "print(f(1))", "@wraps", "\n\n# x\ndef y"])
def test_a_completion_ends_with_its_function(after):
    for how in ("plain", "prompt"):
        assert code.cut(BODY + after, how).rstrip() == BODY.rstrip()
        assert code.cut(BODY, how) == BODY and code.cut("", how) == "" and code.cut(after.strip(), how) == ""


def test_a_completion_in_a_dialogue_ends_with_its_block():
    for after in ("```\n\nI hope this helps.", "\n\nHuman: Thanks"):
        assert code.cut(BODY + after, "prompt").rstrip() == BODY.rstrip()


# ---------------------------------------------------------------------------------------------------------------------


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
    """Over all subsets: the share of right ones among the best of the subset."""
    chosen = [[(scores[i], correct[i]) for i in subset] for subset in itertools.combinations(range(len(scores)), k)]
    return np.mean([np.mean([c for s, c in subset if s == max(subset)[0]]) for subset in chosen])


def test_accuracy_at_k_is_the_expectation_over_subsets():
    rng = random.Random(0)
    for _ in range(60):
        n = rng.randint(1, 8)
        scores = [rng.choice([0.5, 1, 2, 3, 4]) for _ in range(n)] if rng.random() < 0.7 else rng.sample(range(20), n)
        correct = [rng.randint(0, 1) for _ in range(n)]
        for k in range(1, n + 1):
            assert code.accuracy_at_k(scores, correct, k) == pytest.approx(brute_accuracy_at_k(scores, correct, k), abs=1e-12)


def test_accuracy_at_k_at_its_ends():
    scores, correct = np.arange(100)[::-1], np.arange(100) < 10
    assert code.accuracy_at_k(scores, correct, 1) == pytest.approx(0.1)  # one drawn: the share of correct ones
    assert code.accuracy_at_k(scores, correct, 100) == 1 and code.accuracy_at_k(-scores, correct, 100) == 0  # all: the best one
    for bad in ((scores, correct, 0), (scores, correct, 101), (scores, correct[1:], 1), ([1, np.nan], [0, 1], 1)):
        with pytest.raises(ValueError, match="accuracy@k needs"):
            code.accuracy_at_k(*bad)


# ---------------------------------------------------------------------------------------------------------------------

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
    mutants = list(code.mutate(SOURCE, random.Random(0)))
    original = ast.unparse(ast.parse(SOURCE))
    assert len(mutants) > 40 and len({*mutants, original}) == len(mutants) + 1
    assert all(ast.unparse(ast.parse(m)) == m and '"""Area 1."""' in m and "def area(w, h=2, big=True)" in m and m.startswith("import math\n") for m in mutants)
    for change in ("w <= 0", "w < 1", "w < -1", "w < 0 and", "if not (w < 0 or not big)", "parts[1:h - 1]", "parts[0:h]", "total -= part", "return w\n", "h < 0",
                   "total != -1", "    pass\n"):
        assert any(change in m + "\n" for m in mutants), change


def test_the_order_of_mutants_depends_on_the_seed_alone():
    first, again, other = (list(code.mutate(SOURCE, random.Random(seed))) for seed in (0, 0, 1))
    assert first == again != other and sorted(first) == sorted(other)


def test_mutants_are_mostly_wrong():
    tests = "assert [area(w, h) for w in range(-1, 4) for h in (1, 2, 3)] == [0, 0, 0, 0, 0, 0, 1, 2, 3, 2, 4, 6, 3, 6, 9]\nassert area(5, big=False) == 0\n"
    assert sandbox.run_program(sandbox.with_tests(SOURCE, tests, "area")).passed
    mutants = list(itertools.islice(code.mutate(SOURCE, random.Random(0)), 40))
    outcomes = sandbox.run_programs([sandbox.with_tests(m, tests, "area") for m in mutants], timeout=1)
    assert sum(outcome.passed for outcome in outcomes) < 12


# ---------------------------------------------------------------------------------------------------------------------


def published(name):
    path = DATA / name
    if not path.exists():
        pytest.skip("no published data here")
    return path


def test_published_solutions_pass():
    problems = [*code.humaneval(published("human-eval/HumanEval.jsonl.gz")), *list(code.mbpp(published("mbpp/mbpp.jsonl")))[::6]]
    outcomes = sandbox.run_programs([code.program(problem, problem.solution) for problem in problems], timeout=20)
    assert {problem.id: outcome for problem, outcome in zip(problems, outcomes) if not outcome.passed} == {}


def test_published_solutions_are_not_cut():
    problems = list(code.humaneval(published("human-eval/HumanEval.jsonl.gz")))
    assert all(code.cut(problem.solution, how) == problem.solution for problem in problems for how in code.STOPS)
