"""Code correctness (Section 3 of the paper): correct and incorrect bodies of functions with tests, as
comparisons.

The problems are those of MBPP or HumanEval, or the functions of any Python module whose docstrings hold
examples for doctest; the word stdlib names the modules of Python's own library. The bodies are samples of a
code model, as in the paper, or, where none is good enough, the function's own solution and small changes to
it. All run in the sandbox, and the tests alone say which are correct: a changed body that passes is correct.
"""
import ast
import doctest
import itertools
import random
import sysconfig
import textwrap
import tokenize
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import checkpoint
import plan
from data.errors import InputError
from data.files import read_records
from data.text import find_special
from evals import code
from evals.mutants import mutate
from evals.sandbox import sandbox
from evals.subject import add_sampling_flags, load_subject, samples

NOT_STDLIB = {"test", "tests", "site-packages", "dist-packages", "idlelib", "lib2to3", "turtledemo"}

DOCTESTS = """names = dict(globals())
import doctest
examples = [doctest.Example(*example) for example in {examples}]
test = doctest.DocTest(examples, names, "tests", None, None, None)
assert not doctest.DocTestRunner(verbose=False).run(test).failed
"""


def add_flags(parser):
    parser.add_argument("--source", choices=("mutate", "model"), default="mutate",
                        help="where bodies come from: small changes to the function's own solution, which is "
                        "one of them, or samples of --model (default: mutate)")
    parser.add_argument("--model", metavar="DIR", help="checkpoint of a code model, for --source model")
    parser.add_argument("--prompt", metavar="FILE",
                        help="prompt to set before everything that the model reads (default: none)")
    parser.add_argument("--format", choices=tuple(code.STOPS), default="plain",
                        help="context: the function's beginning as it stands, or the paper's dialogue "
                        "(default: plain)")
    parser.add_argument("--timeout", type=plan.positive(float), default=5.0,
                        help="seconds that a program may take (default: 5)")
    parser.add_argument("--keep_all", action="store_true",
                        help="keep functions without a pair, and blank and repeated samples: all --n as they "
                        "were drawn, as `evaluate.py rerank` needs them")
    parser.add_argument("--unsafe", action="store_true", help=sandbox.UNSAFE_HELP)
    parser.set_defaults(prompt_tokens=None)
    add_sampling_flags(parser, n=8, max_new=300, temperature=0.6, top_p=0.95)
    plan.add_device_flags(parser)


def find_raw(paths):
    """The files that --raw names. The word stdlib stands for the library's modules that have examples."""
    stdlib = []
    if any(str(path) == "stdlib" for path in paths):
        library = Path(sysconfig.get_path("stdlib"))
        stdlib = [path for path in sorted(library.rglob("*.py"))
                  if not NOT_STDLIB & set(path.relative_to(library).parts) and b">>>" in path.read_bytes()]
    return [file for path in paths for file in (stdlib if str(path) == "stdlib" else [path])]


class Task(NamedTuple):
    problem: code.Problem
    before: str  # code that has to run before the problem's own, and is not shown to models
    bodies: list  # texts that complete the function, of which the tests say whether they are correct


def records(paths, args, count):
    """Yield {"context", "completions", "scores", "group"}: a function's beginning, bodies in random order, 1
    for each that passes the tests and 0 for the others, and the problem's name."""
    if (args.source == "model") != bool(args.model):
        raise InputError("--source model needs --model DIR, a code model; --source mutate has no use for one")
    mode = sandbox.pick_mode(args.unsafe)
    subject = load_subject(args, checkpoint.load_lm) if args.model else None

    tasks = list(read_tasks(paths, count))
    outcomes = run(tasks, mode, args.timeout, "own solutions")
    for own, in outcomes:
        if not own.passed:
            count.drop("functions whose own solution fails their tests")
    tasks = [task for task, (own,) in zip(tasks, outcomes) if own.passed]
    if subject:
        tasks = with_samples(tasks, subject, args, count)
    else:
        tasks = [task._replace(bodies=mutants(task.problem, *task.bodies, args)) for task in tasks]
    outcomes = run(tasks, mode, args.timeout, "running")

    what = "samples" if subject else "changed bodies"  # the solution, which comes first, is not one of these
    reasons = Counter(outcome.reason for row in outcomes for outcome in (row if subject else row[1:]))
    listed = ", ".join(f"{n:,} {reason}" for reason, n in reasons.most_common())
    print(f"{reasons.total():,} {what} of {len(tasks):,} functions, "
          f"{reasons['passed'] / max(1, reasons.total()):.1%} passed their tests ({listed})", flush=True)
    for task, row in zip(tasks, outcomes):
        if len({outcome.passed for outcome in row}) < 2 and not args.keep_all:
            count.drop(f"functions with only {'correct' if row and row[0].passed else 'incorrect'} bodies")
            continue
        order = random.Random(f"{args.seed} {task.problem.id} order")
        shuffled = order.sample(list(zip(task.bodies, row)), len(row))
        yield {"context": code.format_prompt(task.problem, args.format),
               "completions": ["\n" + body for body, _ in shuffled],
               "scores": [int(outcome.passed) for _, outcome in shuffled], "group": task.problem.id}


def run(tasks, mode, timeout, progress):
    """For each task the outcomes of its bodies."""
    programs = [code.program(task.problem, body, task.before) for task in tasks for body in task.bodies]
    outcomes = iter(sandbox.run_programs(programs, mode, progress, timeout=timeout))
    return [list(itertools.islice(outcomes, len(task.bodies))) for task in tasks]


# ------------------------------------------------------------------------------------------------------------
# Functions


def read_tasks(paths, count):
    """Yield a task for each problem, with one body: its solution as ast.unparse formats it."""
    for path in paths:
        for problem, before in read_problems(path):
            count.total += 1
            if find_special(problem.prompt):
                count.drop("functions that hold <eot> or <eoc>, our special tokens")
                continue
            try:
                solution = body_of(problem.prompt + problem.solution, problem.entry_point)
            except code.NOT_CODE as error:
                count.bad(f"{path}: {problem.id}",
                          f"prompt and solution are not a Python function {problem.entry_point} ({error})")
                continue
            yield Task(problem, before, [solution])
        if count.progress is not None:
            count.progress.update(path.stat().st_size)


def read_problems(path):
    """Yield (problem, code to run before it) of a .py module, or of MBPP's or HumanEval's JSON lines."""
    if path.suffix == ".py":
        yield from documented_functions(path)
        return
    _, first = next(read_records(path), (0, {}))
    read = code.humaneval if "canonical_solution" in first else code.mbpp
    yield from ((problem, "") for problem in read(path))


def documented_functions(path):
    """Yield (problem, code to run before it) for the functions and methods of a module whose docstrings have
    examples.

    The module runs as it is, then the function is defined anew. So its helpers are there, and it is not
    replaced by a faster version in C, with which some modules end.
    """
    try:
        with tokenize.open(path) as file:
            text = file.read()
        tree = code.parse(text)
        kept = [ast.unparse(node) for node in tree.body
                if not (isinstance(node, ast.If) and "__main__" in ast.unparse(node.test))]
    except code.NOT_CODE as error:
        line = getattr(error, "lineno", None) or 1
        raise InputError(f"{path}:{line}: not a Python program ({error})") from None
    before = "\n".join(kept) + "\n\n\n"
    module = path.stem if path.stem != "__init__" else path.absolute().parent.name
    owned = [("", node) for node in tree.body]
    for owner in (node for node in tree.body if isinstance(node, ast.ClassDef)):
        owned += [(owner.name, node) for node in owner.body]
    for owner, node in owned:
        examples = parse_examples(node) if isinstance(node, ast.FunctionDef) else []
        if examples and len(node.body) > 1:
            prompt, solution = source_parts(node, text.split("\n"))
            tests = DOCTESTS.format(examples=examples)
            if owner:
                tests = f"{owner}.{node.name} = {node.name}\n{tests}"
            name = ".".join(filter(None, (module, owner, node.name)))
            yield code.Problem(name, prompt, solution, tests, node.name), before


def parse_examples(function):
    """What doctest.Example takes, for each example in a function's docstring that is to be run."""
    try:
        examples = doctest.DocTestParser().get_examples(ast.get_docstring(function) or "")
    except ValueError:  # something that only looks like examples
        return []
    return [(example.source, example.want, example.exc_msg, 0, 0, example.options)
            for example in examples if not example.options.get(doctest.SKIP)]


def source_parts(function, lines):
    """The code of a function as it stands in a file's lines: (decorators, signature and docstring; body)."""
    first = min(part.lineno for part in (function, *function.decorator_list)) - 1
    source = textwrap.dedent("\n".join(lines[first:function.end_lineno])).split("\n")
    middle = function.body[0].end_lineno - first
    return "\n".join(source[:middle]) + "\n", "\n".join(source[middle:]) + "\n"


# ------------------------------------------------------------------------------------------------------------
# Bodies


def body_of(source, name):
    """The body of a program's function `name` and all that follows it, as ast.unparse formats them.
    ValueError if there is no such function."""
    statements = code.parse(source).body
    at = max(number for number, node in enumerate(statements)
             if isinstance(node, ast.FunctionDef) and node.name == name)
    function = statements[at]
    head = code.with_body(function, [])
    function.body = function.body[ast.get_docstring(function) is not None:] or [ast.Pass()]
    return ast.unparse(ast.Module(statements[at:], [])).removeprefix(head).strip("\n")


def mutants(problem, solution, args):
    """At most args.n bodies: the solution first, then different ones with one change each."""
    bodies = [solution]
    try:
        for changed in mutate(problem.prompt + problem.solution, random.Random(f"{args.seed} {problem.id}")):
            if len(bodies) == args.n:
                break
            body = body_of(changed, problem.entry_point)
            if body not in bodies:  # the change may lie before the body
                bodies.append(body)
    except RecursionError:
        pass  # nested too deep to be changed
    return bodies


def with_samples(tasks, subject, args, count):
    """The tasks with samples of a model as their bodies."""
    prompts = [code.format_prompt(task.problem, args.format) for task in tasks]
    drawn = samples(subject, prompts, args, [code.STOPS[args.format]] * len(tasks), "function")
    return [task._replace(bodies=distinct_bodies(texts, args, count)) for task, texts in zip(tasks, drawn)]


def distinct_bodies(texts, args, count):
    """The bodies that samples begin with: all of them with --keep_all, else no blank or repeated ones."""
    bodies = [code.cut(text, args.format).rstrip() for text in texts]
    if args.keep_all:
        return bodies
    kept = [body for body in dict.fromkeys(bodies) if body]
    if len(kept) < len(bodies):
        count.drop("samples that are blank or repeat one of the same function", len(bodies) - len(kept))
    return kept
