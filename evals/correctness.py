"""Code correctness (Section 3 of the paper): correct and incorrect bodies of functions that have tests, as comparisons.

The problems are those of MBPP or HumanEval, or functions of any Python modules whose docstrings hold doctest examples; the word
stdlib names the modules of Python's own standard library. The bodies are samples of a code model, as in the paper, or, where no
model is good enough, the function's own solution and small changes of it. All run in the sandbox, and only the tests say which
are correct: a change that passes them is.
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

import checkpoint
import plan
from data.errors import InputError
from data.files import read_records
from evals import code
from evals.sandbox import sandbox
from evals.subject import add_sampling_flags, load_subject, samples

NOT_STDLIB = {"test", "tests", "site-packages", "dist-packages", "idlelib", "lib2to3", "turtledemo"}

# doctest's own runner sets tracing, which the sandbox forbids; what it compares outputs with is used here too.
EXAMPLES = """names = dict(globals())
import contextlib, doctest, io, traceback

for source, expected, raises, flags in {examples}:
    printed, raised = io.StringIO(), None
    try:
        with contextlib.redirect_stdout(printed):
            exec(compile(source, "<example>", "single"), names)
    except Exception as error:
        raised = traceback.format_exception_only(error)[-1]
    assert (raised is None) == (raises is None)
    assert doctest.OutputChecker().check_output(raises or expected, raised or printed.getvalue(), flags)
"""


def add_flags(parser):
    parser.add_argument("--source", choices=("mutate", "model"), default="mutate", help="where bodies come from: small changes of the function's own "
                        "solution, which is among them, or samples of --model (default: mutate)")
    parser.add_argument("--model", metavar="DIR", help="checkpoint of a code model, for --source model")
    parser.add_argument("--prompt", metavar="FILE", help="prompt to set before everything the model reads (default: none)")
    parser.add_argument("--format", choices=tuple(code.STOPS), default="plain", help="context: the function's beginning as it stands, or the paper's dialogue "
                        "(default: plain)")
    parser.add_argument("--timeout", type=plan.positive(float), default=5.0, help="seconds a program may take (default: 5)")
    parser.add_argument("--keep_all", action="store_true", help="keep functions without a pair, blank and repeated samples: all --n as drawn, "
                        "as `evaluate.py rerank` needs them")
    parser.set_defaults(prompt_tokens=None)
    add_sampling_flags(parser, n=8, max_new=300, temperature=0.6, top_p=0.95)
    plan.add_device_flags(parser)


def find_raw(paths):
    """The files that --raw names; the word stdlib stands for the standard library's modules with examples in them."""
    lib = Path(sysconfig.get_path("stdlib"))
    files = (path for path in sorted(lib.rglob("*.py")) if not NOT_STDLIB & set(path.relative_to(lib).parts))
    stdlib = [path for path in files if b">>>" in path.read_bytes()] if any(str(path) == "stdlib" for path in paths) else []
    return [file for path in paths for file in (stdlib if str(path) == "stdlib" else [path])]


def records(paths, args, count):
    """Yield {"context", "completions", "scores", "group"}: a function's beginning, bodies in random order, 1 for those that pass the
    tests and 0 for the others, the problem's name."""
    if (args.source == "model") != bool(args.model):
        raise InputError("--source model needs --model DIR, a code model; --source mutate has no use for one")
    subject = load_subject(args, checkpoint.load_lm) if args.model else None
    problems = []  # (problem, code before it that is not shown, its solution as ast.unparse writes it)
    for path in paths:
        for problem, before in read(path):
            count.total += 1
            try:
                problems.append((problem, before, body(problem.prompt + problem.solution, problem.entry_point)))
            except (SyntaxError, ValueError) as error:
                count.bad(f"{path}: {problem.id}", f"prompt and solution are not a Python function {problem.entry_point} ({error})")
        if count.progress is not None:
            count.progress.update(path.stat().st_size)

    outcomes = run([(problem, before, [solution]) for problem, before, solution in problems], args, "own solutions")
    for own, in outcomes:
        if not own.passed:
            count.drop("functions whose own solution fails their tests")
    problems = [entry for entry, (own,) in zip(problems, outcomes) if own.passed]
    if subject:
        drawn = samples(subject, [code.format_prompt(problem, args.format) for problem, *_ in problems], args, [code.STOPS[args.format]] * len(problems), "function")
        problems = [(problem, before, different(texts, args, count)) for (problem, before, _), texts in zip(problems, drawn)]
    else:
        problems = [(problem, before, mutants(problem, solution, args)) for problem, before, solution in problems]
    outcomes = run(problems, args, "running")
    told = Counter(outcome.reason for row in outcomes for outcome in row[not subject:])
    print(f"{told.total():,} {'samples' if subject else 'changed bodies'} of {len(problems):,} functions, {told['passed'] / max(1, told.total()):.1%} "
          f"passed their tests ({', '.join(f'{n:,} {reason}' for reason, n in told.most_common())})", flush=True)

    for (problem, _, bodies), row in zip(problems, outcomes):
        if not args.keep_all and len({outcome.passed for outcome in row}) < 2:
            count.drop(f"functions with only {'correct' if row and row[0].passed else 'incorrect'} bodies")
            continue
        shuffled = random.Random(f"{args.seed} {problem.id} order").sample(list(zip(bodies, row)), len(row))
        yield {"context": code.format_prompt(problem, args.format), "completions": [text for text, _ in shuffled],
               "scores": [int(outcome.passed) for _, outcome in shuffled], "group": problem.id}


# ---------------------------------------------------------------------------------------------------------------------
# Functions


def read(path):
    """Yield (Problem, code that has to stand before it) of a .py module or of MBPP's or HumanEval's JSON lines."""
    if path.suffix == ".py":
        yield from documented(path)
        return
    _, first = next(read_records(path), (0, {}))
    for problem in (code.humaneval if "canonical_solution" in first else code.mbpp)(path):
        yield problem, ""


def documented(path):
    """The functions and methods of a module whose docstrings hold examples. The module runs as it is, then the function is defined
    anew, so helpers remain and fast versions in C, which some modules end with, do not take its place."""
    try:
        with tokenize.open(path) as file:
            text = file.read()
        tree = ast.parse(text)
    except (SyntaxError, ValueError) as error:
        raise InputError(f"{path}:{getattr(error, 'lineno', None) or 1}: not a Python program ({error})") from None
    lines = text.split("\n")
    before = "\n".join(ast.unparse(node) for node in tree.body if not (isinstance(node, ast.If) and "__main__" in ast.unparse(node.test))) + "\n\n\n"
    owned = [("", node) for node in tree.body] + [(owner.name, node) for owner in tree.body if isinstance(owner, ast.ClassDef) for node in owner.body]
    for owner, node in owned:
        examples = parse_examples(ast.get_docstring(node)) if isinstance(node, ast.FunctionDef) else []
        if not examples or len(node.body) < 2:
            continue
        start, middle = min(part.lineno for part in (node, *node.decorator_list)) - 1, node.body[0].end_lineno
        source = textwrap.dedent("\n".join(lines[start:node.end_lineno])).split("\n")
        prompt, solution = ("\n".join(part) + "\n" for part in (source[:middle - start], source[middle - start:]))
        module = path.stem if path.stem != "__init__" else path.absolute().parent.name
        into_class = f"{owner}.{node.name} = {node.name}\n" if owner else ""
        name = ".".join(filter(None, (module, owner, node.name)))
        yield code.Problem(name, prompt, solution, into_class + EXAMPLES.format(examples=examples), node.name), before


def parse_examples(docstring):
    try:
        found = doctest.DocTestParser().get_examples(docstring or "")
    except ValueError:  # something that only looks like examples
        return []
    return [(e.source, e.want, e.exc_msg, sum(flag for flag, on in e.options.items() if on)) for e in found if not e.options.get(doctest.SKIP)]


# ---------------------------------------------------------------------------------------------------------------------
# Bodies


def body(source, name):
    """A program -> the body of its function `name` and what follows it, as ast.unparse writes it. ValueError without such a function."""
    statements = ast.parse(source).body
    at = max(number for number, node in enumerate(statements) if isinstance(node, ast.FunctionDef) and node.name == name)
    function = statements[at]
    head = ast.unparse(ast.FunctionDef(**vars(function) | {"body": []}))
    function.body = function.body[ast.get_docstring(function) is not None:] or [ast.Pass()]
    return ast.unparse(ast.Module(statements[at:], [])).removeprefix(head).strip("\n")


def mutants(problem, solution, args):
    """At most args.n bodies: the solution first, then different ones with one change each."""
    texts = [solution]
    for changed in code.mutate(problem.prompt + problem.solution, random.Random(f"{args.seed} {problem.id}")):
        if len(texts) == args.n:
            break
        if (text := body(changed, problem.entry_point)) not in texts:  # the change may lie before the body
            texts.append(text)
    return texts


def different(texts, args, count):
    """The bodies that samples begin with: with --keep_all all of them, else those that are neither blank nor repeated."""
    texts = [code.cut(text, args.format).rstrip() for text in texts]
    if args.keep_all:
        return texts
    kept = []
    for text in texts:
        if text and text not in kept:
            kept.append(text)
        else:
            count.drop("samples that are blank or repeat one of the same function")
    return kept


def run(problems, args, progress):
    """[(problem, before, bodies)] -> for each the outcomes of its bodies."""
    sources = [code.program(problem._replace(prompt=before + problem.prompt), text) for problem, before, bodies in problems for text in bodies]
    outcomes = iter(sandbox.run_programs(sources, progress=progress, timeout=args.timeout))
    return [list(itertools.islice(outcomes, len(bodies))) for *_, bodies in problems]
