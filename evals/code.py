"""Programming problems with tests, and what is measured on them (Sections 2 to 4 of the paper): HumanEval, MBPP and QuixBugs;
prompts, pass@k, accuracy@k; small changes that break a program."""
import ast
import copy
import json
import math
import textwrap
import warnings
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data.errors import InputError
from data.files import read_lines, read_records
from evals.sandbox.sandbox import with_tests


class Problem(NamedTuple):
    id: str
    prompt: str  # the code before the function's body: what it needs, signature, docstring; ends with a newline
    solution: str  # a correct body, with what else it needs after it
    tests: str  # code that raises unless the function is right
    entry_point: str  # the function's name
    buggy: str = ""  # QuixBugs: the function to be repaired


# ---------------------------------------------------------------------------------------------------------------------
# Published problems


def humaneval(path):
    """Yield the problems of HumanEval's JSON lines. InputError names the line that is not one."""
    for number, record in read_records(path):
        prompt, solution, tests, name, task = _fields(path, number, record, "prompt", "canonical_solution", "test", "entry_point", "task_id")
        yield Problem(str(task), prompt.rstrip() + "\n", solution, f"{tests}\ncheck({name})\n", name)


def mbpp(path):
    """Yield the problems of MBPP's JSON lines, in HumanEval's form: the signature, and a docstring with the text and the first test.

    Classes and functions that the tests use besides the one asked for are given in the prompt. InputError names a bad line.
    """
    for number, record in read_records(path):
        text, code, setup, tests, task = _fields(path, number, record, "text", "code", "test_setup_code", "test_list", "task_id")
        try:
            tree, checks = _parse(code.replace("\r\n", "\n")), [_parse(test) for test in tests]
            used = _names(*checks, _parse(setup))
            name, = _names(checks[0]) & {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
        except (SyntaxError, ValueError, IndexError, TypeError) as error:
            raise InputError(f"{path}:{number}: code and tests do not agree on one function ({error})") from None
        function, others = _split(tree, name)
        used |= _names(function.args, *function.decorator_list)
        given = [node for node in others if getattr(node, "name", None) in used]
        prompt, solution = _parts(function, f"{text.strip()}\n\n{tests[0].strip()}")
        yield Problem(f"MBPP/{task}", _code(given) + prompt, f"{solution}\n" + _code(node for node in others if node not in given),
                      "\n".join([setup, *tests]).replace("\r\n", "\n"), name)


def quixbugs(path):
    """Yield the problems of QuixBugs' folder: python_programs/NAME.py, correct_python_programs/NAME.py and json_testcases/NAME.json
    with lines [arguments, expected result]. Programs without such tests (on graphs) are left out, and counted on the terminal."""
    folder, without = Path(path), []
    sources = sorted(p for p in (folder / "python_programs").glob("*.py") if p.stem != "node" and not p.stem.endswith("_test"))
    if not sources:
        raise InputError(f"{folder}: no python_programs/*.py; give QuixBugs' own folder")
    for source in sources:
        name, cases = source.stem, folder / "json_testcases" / f"{source.stem}.json"
        if not cases.exists():
            without.append(name)
            continue
        buggy, others = _read(source, name)
        correct, extras = _read(folder / "correct_python_programs" / source.name, name)
        text = next((node.value.value for node in others if _is_text(node)), "")
        prompt, body = _parts(buggy, text.strip())
        prompt = _code(node for node in others if not _is_text(node)) + prompt
        solution = _parts(correct, text.strip())[1] + _code(node for node in extras if not _is_text(node))
        yield Problem(f"QuixBugs/{name}", prompt, solution, QUIXBUGS_TEST.format(name=name, cases=_cases(cases)), name, prompt + body)
    if without:
        print(f"{folder}: {len(without)} of {len(sources)} programs left out, as they have no json_testcases: {', '.join(without)}")


# Results are compared as the benchmark's own tester does, as JSON; floats that differ in the last places are equal.
QUIXBUGS_TEST = """from math import inf, isclose, nan
from types import GeneratorType


def same(found, expected):
    if isinstance(found, (tuple, GeneratorType)):
        found = list(found)
    if isinstance(expected, list):
        return isinstance(found, list) and len(found) == len(expected) and all(map(same, found, expected))
    if isinstance(expected, float) and isinstance(found, (int, float)):
        return isclose(found, expected, rel_tol=1e-6, abs_tol=1e-9)
    return found == expected


for arguments, expected in {cases}:
    assert same({name}(*arguments), expected)
"""


def _fields(path, number, record, *keys):
    for key in keys:
        if key not in record or not isinstance(record[key], str) and key not in ("task_id", "test_list"):
            raise InputError(f"{path}:{number}: no text \"{key}\"; expected {', '.join(keys)}")
    return [record[key] for key in keys]


def _parse(text):
    with warnings.catch_warnings(action="ignore"):  # of code that is not ours
        return ast.parse(text)


def _read(path, name):
    """A QuixBugs program -> (its function, all other statements)."""
    try:
        return _split(_parse(path.read_bytes()), name)
    except (SyntaxError, ValueError) as error:
        raise InputError(f"{path}:{getattr(error, 'lineno', None) or 1}: not a Python program with a function {name} ({error})") from None


def _cases(path):
    """A list of (arguments, expected); a lone argument may stand without its list."""
    cases = []
    for number, line in read_lines(path):
        if line.strip():
            try:
                arguments, expected = json.loads(line)
            except (ValueError, TypeError) as error:
                raise InputError(f"{path}:{number}: expected [arguments, result] in JSON ({error})") from None
            cases.append((arguments if isinstance(arguments, list) else [arguments], expected))
    if not cases:
        raise InputError(f"{path}: no tests in this file")
    return cases


def _names(*nodes):
    return {node.id for root in nodes for node in ast.walk(root) if isinstance(node, ast.Name)}


def _is_text(node):
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)


def _split(tree, name):
    """A module -> (the last function of that name, all other statements)."""
    *_, function = (node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == name)
    return function, [node for node in tree.body if node is not function]


def _parts(function, text):
    """A function with `text` for its docstring -> (signature and docstring, body), as code that has lost its formatting."""
    head, whole = copy.deepcopy(function), copy.deepcopy(function)
    docstring = ast.Expr(ast.Constant(textwrap.indent(text, "    ").strip() + "\n    ")) if text else None
    body = function.body[1:] if _is_text(function.body[0]) else function.body
    head.body = [docstring] if docstring else []
    whole.body = head.body + (body or [ast.Pass()])
    prompt = ast.unparse(ast.fix_missing_locations(head)) + "\n"
    return prompt, ast.unparse(ast.fix_missing_locations(whole))[len(prompt):] + "\n"


def _code(nodes):
    return "".join(ast.unparse(node) + "\n\n" for node in nodes)


# ---------------------------------------------------------------------------------------------------------------------
# Prompts and programs

# What begins a line when a function has ended: the rules of the paper that published HumanEval, and decorators.
ENDS = ("\nclass", "\ndef", "\n#", "\nif", "\nprint", "\n@")
STOPS = {"plain": ENDS, "prompt": ENDS + ("\n```", "\n\nHuman:")}


def format_prompt(problem, how):
    """The text that a model continues with the function's body. how: "plain", code alone; "prompt", a new conversation of a prompt
    of dialogues, which it follows."""
    if how == "plain":
        shown = f"# This function has a bug.\n\n{problem.buggy}\n\n# The same function without the bug.\n\n" if problem.buggy else ""
        return shown + problem.prompt
    if how != "prompt":
        raise ValueError(f"how must be plain or prompt, found {how!r}")
    ask = "fix the bug in this Python function" if problem.buggy else "complete the body of this Python function"
    return (f"\n\nHuman: Please {ask}:\n\n```python\n{(problem.buggy or problem.prompt).strip()}\n```"
            f"\n\nAssistant: Here it is:\n\n```python\n{problem.prompt.lstrip()}")


def cut(completion, how):
    """The part of a sampled completion that belongs to the function's body."""
    text = "\n" + completion
    return text[1:min((at for at in map(text.find, STOPS[how]) if at >= 0), default=len(text))]


def program(problem, completion):
    """A problem and a body -> one text for sandbox.run_program, which passes if the tests do."""
    return with_tests(problem.prompt + completion, problem.tests, problem.entry_point)


# ---------------------------------------------------------------------------------------------------------------------
# Estimators


def pass_at_k(n, c, k):
    """Probability that one of k samples passes, estimated without bias from n samples of which c passed: 1 - C(n-c, k) / C(n, k).

    n, c and k are whole numbers or arrays of them that broadcast. ValueError unless 0 <= c <= n and 1 <= k <= n.
    """
    n, c, k = np.broadcast_arrays(n, c, k)
    if (k < 1).any() or (k > n).any() or (c < 0).any() or (c > n).any():
        raise ValueError(f"pass@k needs 1 <= k <= n and 0 <= c <= n, found n {n}, c {c}, k {k}")
    rates = [(math.comb(n, k) - math.comb(n - c, k)) / math.comb(n, k) for n, c, k in zip(n.ravel().tolist(), c.ravel().tolist(), k.ravel().tolist())]
    return np.array(rates).reshape(n.shape) if n.shape else rates[0]


def accuracy_at_k(scores, correct, k):
    """Probability that the best-scored of k samples, drawn at random from N without replacement, is correct (Section 3 of the paper):
    sum over i of C(N-i, k-1) / C(N, k) * c_i, samples sorted best first. scores and correct (0 or 1): (N,). Among equal scores
    each is the best one equally often. ValueError unless 1 <= k <= N and the scores are numbers."""
    scores, correct = np.asarray(scores, float), np.asarray(correct, float)
    if scores.ndim != 1 or scores.shape != correct.shape or not 1 <= k <= len(scores) or np.isnan(scores).any():
        raise ValueError(f"accuracy@k needs N scores, as many marks and 1 <= k <= N, found {scores.shape}, {correct.shape}, k {k}")
    total, left = 0.0, len(scores)
    for score in np.unique(scores)[::-1]:
        group = scores == score
        fewer = left - int(group.sum())
        # all k among these and worse ones, but not all among worse ones: the best is one of these
        total += (math.comb(left, k) - math.comb(fewer, k)) / math.comb(len(scores), k) * correct[group].mean()
        left = fewer
    return float(total)


# ---------------------------------------------------------------------------------------------------------------------
# Breaking programs

COMPARISONS = {ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
               ast.In: ast.NotIn, ast.NotIn: ast.In, ast.Is: ast.IsNot, ast.IsNot: ast.Is}
OPERATORS = {ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Add, ast.Div: ast.Mult, ast.FloorDiv: ast.Div, ast.Mod: ast.FloorDiv,
             ast.Pow: ast.Mult, ast.BitAnd: ast.BitOr, ast.BitOr: ast.BitAnd, ast.BitXor: ast.BitOr, ast.LShift: ast.RShift,
             ast.RShift: ast.LShift, ast.And: ast.Or, ast.Or: ast.And}


def mutate(source, rng):
    """Yield programs that differ from `source` in one place of a function's body, most of them wrong: in random order, each once,
    and none equal to ast.unparse(ast.parse(source)), the form in which they are written too. rng: a random.Random."""
    tree = _parse(source)
    seen = {ast.unparse(tree)}
    sites = [(number, change) for number, (node, names) in enumerate(_places(tree)) for change in _changes(node, names)]
    rng.shuffle(sites)
    for number, change in sites:
        changed = copy.deepcopy(tree)
        change(_places(changed)[number][0])
        text = ast.unparse(ast.fix_missing_locations(changed))
        if text not in seen:
            seen.add(text)
            yield text


def _places(tree):
    """(node, names of local variables) for all nodes in functions' bodies."""
    places = []
    for function in (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)):
        names = sorted({node.id for node in ast.walk(function) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
                       | {node.arg for node in ast.walk(function) if isinstance(node, ast.arg)})
        places.append((function, names))
        places += [(node, names) for statement in function.body for node in ast.walk(statement) if not _is_text(statement)]
    return places


def _changes(node, names):
    """Functions that change a node in place."""
    def put(field, value, at=None):
        def change(node):
            if at is None:
                setattr(node, field, value)
            else:
                getattr(node, field)[at] = value
        return change

    def drop(field, at):
        """Leave a statement out; `pass` stands for it only where there is no other, as it would tell a changed program."""
        def change(node):
            statements = getattr(node, field)
            statements[at:at + 1] = [] if len(statements) > 1 or field == "orelse" else [ast.Pass()]
        return change

    match node:
        case ast.Compare():
            yield from (put("ops", COMPARISONS[type(op)](), at) for at, op in enumerate(node.ops))
        case ast.BinOp() | ast.AugAssign() | ast.BoolOp():
            if type(node.op) in OPERATORS:
                yield put("op", OPERATORS[type(node.op)]())
        case ast.Constant(value=bool()):
            yield put("value", not node.value)
        case ast.Constant(value=int()):
            yield put("value", node.value + 1)
            yield put("value", node.value - 1)
        case ast.Name(ctx=ast.Load()) if node.id in names:
            yield from (put("id", name) for name in names)
        case ast.UnaryOp(op=ast.USub()):
            yield put("op", ast.UAdd())
        case ast.If() | ast.While() | ast.IfExp():
            yield put("test", ast.UnaryOp(ast.Not(), node.test))
        case ast.Return(value=ast.expr()):
            yield from (put("value", ast.Name(name, ast.Load())) for name in names)
        case ast.Slice():
            for field in ("lower", "upper"):
                if getattr(node, field) is not None:
                    yield from (put(field, ast.BinOp(getattr(node, field), op(), ast.Constant(1))) for op in (ast.Add, ast.Sub))
    if isinstance(node, (ast.FunctionDef, ast.For, ast.While, ast.If, ast.With)):
        for field in ("body", "orelse"):
            statements = getattr(node, field, [])
            yield from (drop(field, at) for at, statement in enumerate(statements) if not _is_text(statement) and not isinstance(statement, ast.Pass))
