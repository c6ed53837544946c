"""Programming problems with tests (Sections 2 and 3 of the paper): HumanEval, MBPP and QuixBugs, the prompts
that ask for their solutions, and the estimators pass@k and accuracy@k."""
import ast
import math
import textwrap
import warnings
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data.errors import InputError
from data.files import decode, fields, load_json, read_lines, read_records
from data.text import refuse_special

NOT_CODE = (SyntaxError, ValueError, RecursionError, MemoryError)  # from ast, the latter two for deep nesting


class Problem(NamedTuple):
    id: str
    prompt: str  # code up to the function's body: what it needs, signature, docstring; ends with a newline
    solution: str  # a correct body, and whatever else the function needs after it
    tests: str  # code that raises unless the function is right
    entry_point: str  # the function's name
    buggy: str = ""  # QuixBugs: the function to be mended


# ------------------------------------------------------------------------------------------------------------
# Published problems


def humaneval(path):
    """Yield the problems of HumanEval's JSON lines. InputError names a line that is none."""
    texts = ("prompt", "canonical_solution", "test", "entry_point")
    for number, record in read_records(path):
        where = f"{path}:{number}"
        number, prompt, solution, tests, name = fields(
            record, where, {"task_id": (int, str)} | dict.fromkeys(texts, str))
        refuse_special(where, prompt)
        tests = f"{tests}\ncheck({name})\n"
        yield Problem(str(number), prompt.rstrip() + "\n", solution, tests, name)


def mbpp(path):
    """Yield the problems of MBPP's JSON lines in HumanEval's form: a signature, and a docstring that holds
    the text and the first test. InputError names a line that is none.

    The prompt begins with what the solution imports, and with its other functions and classes where the tests
    use them.
    """
    kinds = {"task_id": (int, str), "text": str, "code": str, "test_setup_code": str, "test_list": [str]}
    for line, record in read_records(path):
        where = f"{path}:{line}"
        number, text, solution, setup, tests = fields(record, where, kinds)
        try:
            tree = parse(solution.replace("\r\n", "\n"))
            checks = [parse(test) for test in tests]
            name, = _names(checks[0]) & {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
            function, others = _split(tree, name)
            used = _names(*checks, parse(setup), function.args, *function.decorator_list)
            given = [node for node in others if isinstance(node, (ast.Import, ast.ImportFrom))
                     or getattr(node, "name", None) in used]
            after = [node for node in others if node not in given]
            prompt, body = _prompt_and_body(function, f"{text.strip()}\n\n{tests[0].strip()}")
            prompt, body = _source(given) + prompt, f"{body}\n{_source(after)}"
        except (*NOT_CODE, IndexError) as error:
            raise InputError(f"{where}: code and tests do not agree on one function ({error})") from None
        refuse_special(where, prompt)
        tests = "\n".join([setup, *tests]).replace("\r\n", "\n")
        yield Problem(f"MBPP/{number}", prompt, body, tests, name)


# What QuixBugs' own tests do besides comparing results, from its python_testcases/test_NAME.py:
QUIXBUGS_TOLERANCE = {"sqrt": -1}  # which argument is the error that a result may have
QUIXBUGS_SKIPPED = {  # the first argument of the case that takes even the correct program minutes
    "knapsack": 6404180, "levenshtein": "amanaplanacanalpanama"}
# Results are compared as JSON, as in QuixBugs' tester. Floats that differ only in the last places are equal.
QUIXBUGS_TEST = """from math import inf, isclose, nan
from types import GeneratorType


def same(found, expected, tolerance):
    if isinstance(found, (tuple, GeneratorType)):
        found = list(found)
    if isinstance(expected, list):
        return (isinstance(found, list) and len(found) == len(expected)
                and all(same(*pair, tolerance) for pair in zip(found, expected)))
    if isinstance(found, (int, float)) and (tolerance or isinstance(expected, float)):
        return isclose(found, expected, rel_tol=1e-6, abs_tol=tolerance or 1e-9)
    return found == expected


for arguments, expected, tolerance in {cases}:
    assert same({name}(*arguments), expected, tolerance)
"""


def quixbugs(path):
    """Yield the problems of QuixBugs' folder: python_programs/NAME.py, correct_python_programs/NAME.py and
    json_testcases/NAME.json. Programs without such tests (on graphs) are left out; the terminal says so."""
    folder, without_tests = Path(path), []
    sources = sorted(source for source in (folder / "python_programs").glob("*.py")
                     if source.stem != "node" and not source.stem.endswith("_test"))
    if not sources:
        raise InputError(f"{folder}: no python_programs/*.py; give QuixBugs' own folder")
    for source in sources:
        name, tests = source.stem, folder / "json_testcases" / f"{source.stem}.json"
        if not tests.exists():
            without_tests.append(name)
            continue
        text, before, prompt, buggy_body = _quixbugs_program(source, name)
        correct = folder / "correct_python_programs" / source.name
        _, after, _, body = _quixbugs_program(correct, name, text)
        prompt = before + prompt
        refuse_special(source, prompt, buggy_body)
        tests = QUIXBUGS_TEST.format(name=name, cases=_quixbugs_cases(tests, name))
        yield Problem(f"QuixBugs/{name}", prompt, body + after, tests, name, prompt + buggy_body)
    if without_tests:
        print(f"{folder}: {len(without_tests)} of {len(sources)} programs left out, as they have no "
              f"json_testcases: {', '.join(without_tests)}")


def _quixbugs_program(path, name, text=None):
    """Read a file: (its text about the function, or the one given; its other code; the function's signature
    with the text as its docstring; the function's body)."""
    try:
        function, others = _split(parse(path.read_bytes()), name)
        if text is None:
            text = next((node.value.value for node in others if is_text(node)), "").strip()
        return text, _source(node for node in others if not is_text(node)), *_prompt_and_body(function, text)
    except NOT_CODE as error:
        line = getattr(error, "lineno", None) or 1
        raise InputError(f"{path}:{line}: not a Python program with a function {name} ({error})") from None


def _quixbugs_cases(path, name):
    """[(arguments, expected result, tolerance or None)] of a file with one case a line. A lone argument may
    stand without its list."""
    cases = []
    for number, line in read_lines(path):
        if not line.strip():
            continue
        try:
            arguments, expected = load_json(decode(line, f"{path}:{number}"))
        except (ValueError, TypeError) as error:
            raise InputError(f"{path}:{number}: expected [arguments, result] in JSON ({error})") from None
        arguments = arguments if isinstance(arguments, list) else [arguments]
        if name not in QUIXBUGS_SKIPPED or arguments[:1] != [QUIXBUGS_SKIPPED[name]]:
            tolerance = arguments[QUIXBUGS_TOLERANCE[name]] if name in QUIXBUGS_TOLERANCE else None
            cases.append((arguments, expected, tolerance))
    if not cases:
        raise InputError(f"{path}: no tests in this file")
    return cases


def parse(text):
    """ast.parse without the warnings that code of others causes."""
    with warnings.catch_warnings(action="ignore"):
        return ast.parse(text)


def is_text(statement):
    """True of a docstring and of any other statement that is only a text."""
    return (isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)
            and isinstance(statement.value.value, str))


def _names(*nodes):
    return {node.id for root in nodes for node in ast.walk(root) if isinstance(node, ast.Name)}


def _split(tree, name):
    """(the last function of that name in a module, all other statements). ValueError if there is none."""
    *_, function = (node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == name)
    return function, [node for node in tree.body if node is not function]


def _prompt_and_body(function, text):
    """The code of a function with `text` for its docstring, as ast.unparse formats it: (signature and
    docstring, body)."""
    docstring = [ast.Expr(ast.Constant(textwrap.indent(text, "    ").strip() + "\n    "))] if text else []
    body = function.body[1:] if is_text(function.body[0]) else function.body
    prompt = with_body(function, docstring) + "\n"
    whole = with_body(function, docstring + (body or [ast.Pass()]))
    return prompt, whole[len(prompt):] + "\n"


def with_body(function, statements):
    """The code of a function with another body."""
    changed = ast.FunctionDef(**vars(function) | {"body": statements})
    return ast.unparse(ast.fix_missing_locations(changed))


def _source(nodes):
    return "".join(ast.unparse(node) + "\n\n" for node in nodes)


# ------------------------------------------------------------------------------------------------------------
# Prompts and programs

# What begins a line when a function has ended: the rules of HumanEval's paper, and decorators.
ENDS = ("\nclass", "\ndef", "\n#", "\nif", "\nprint", "\n@")
STOPS = {"plain": ENDS, "prompt": ENDS + ("\n```", "\n\nHuman:")}  # by format


def format_prompt(problem, format):
    """The text that a model continues with a newline and the function's body. format: "plain", the code alone;
    "prompt", a new conversation that follows those of a prompt.

    Most tokenizers have tokens of a newline and the spaces after it. A text that ended with the newline would
    leave the spaces alone, which a model of such tokens has hardly ever seen there.
    """
    prompt = problem.prompt.removesuffix("\n")
    if format == "plain":
        if not problem.buggy:
            return prompt
        return (f"# This function has a bug.\n\n{problem.buggy}\n\n"
                f"# The same function without the bug.\n\n{prompt}")
    if format != "prompt":
        raise ValueError(f"the format must be plain or prompt, found {format!r}")
    request = "fix the bug in this" if problem.buggy else "complete the body of this"
    return (f"\n\nHuman: Please {request} Python function:"
            f"\n\n```python\n{(problem.buggy or prompt).strip()}\n```"
            f"\n\nAssistant: Here it is:\n\n```python\n{prompt.lstrip()}")


def cut(completion, format):
    """The function's body in a sampled completion, without the newline before it."""
    text = "\n" + completion.removeprefix("\n")
    ends = [text.find(stop) for stop in STOPS[format] if stop in text]
    return text[1:min(ends, default=len(text))]


def program(problem, completion, before=""):
    """(program, tests) of a problem and a body, as the sandbox takes them. before: code that runs first."""
    return before + problem.prompt + completion, problem.tests


# ------------------------------------------------------------------------------------------------------------
# Estimators


def pass_at_k(n, c, k):
    """The probability that at least one of k samples passes, estimated without bias from n samples of which c
    passed: 1 - C(n-c, k) / C(n, k).

    n, c and k: whole numbers, or arrays of them that broadcast. ValueError unless 0 <= c <= n, 1 <= k <= n.
    """
    n, c, k = np.broadcast_arrays(n, c, k)
    if (k < 1).any() or (k > n).any() or (c < 0).any() or (c > n).any():
        raise ValueError(f"pass@k needs 1 <= k <= n and 0 <= c <= n, found n {n}, c {c}, k {k}")
    rates = [(math.comb(n, k) - math.comb(n - c, k)) / math.comb(n, k)  # of Python's whole numbers, so exact
             for n, c, k in zip(n.ravel().tolist(), c.ravel().tolist(), k.ravel().tolist())]
    return np.array(rates).reshape(n.shape) if n.shape else rates[0]


def accuracy_at_k(scores, correct, k):
    """The probability that the best-scored of k samples, drawn from N without replacement, is correct
    (Section 3): sum over i of C(N-i, k-1) / C(N, k) * c_i with the samples sorted, best first.

    scores and correct (0 or 1): (N,). Among equal scores each is equally often the best one. ValueError
    unless 1 <= k <= N and all scores are numbers.
    """
    scores, correct = np.asarray(scores, float), np.asarray(correct, float)
    fits = scores.ndim == 1 and scores.shape == correct.shape and 1 <= k <= len(scores)
    if not fits or np.isnan(scores).any():
        raise ValueError(f"accuracy@k needs N scores, as many marks and 1 <= k <= N, found {scores.shape}, "
                         f"{correct.shape}, k {k}")
    total, left = 0.0, len(scores)
    for score in np.unique(scores)[::-1]:
        equal = scores == score
        worse = left - int(equal.sum())
        # The best one has this score if all k have it or a worse one, but not all a worse one.
        best = (math.comb(left, k) - math.comb(worse, k)) / math.comb(len(scores), k)
        total += best * correct[equal].mean()
        left = worse
    return float(total)
