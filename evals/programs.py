"""Functions written by a language model and run with their tests: HumanEval, MBPP, QuixBugs (Section 2)."""
from collections import Counter

import numpy as np

from data.errors import InputError
from evals import code, pm
from evals.sandbox import sandbox
from evals.subject import samples

READERS = {"humaneval": code.humaneval, "mbpp": code.mbpp, "quixbugs": code.quixbugs}
SECONDS = {"humaneval": 5, "mbpp": 5, "quixbugs": 30}  # a program may take; some correct ones are slow


def pass_rates(args, subject):
    """Sample args.n programs a problem, run them all and print pass@k. Returns (figures for JSON, one
    dictionary per problem)."""
    mode = sandbox.pick_mode(args.unsafe)
    problems = [problem for path in args.data for problem in READERS[args.benchmark](path)][:args.problems]
    if not problems:
        raise InputError(f"{args.data[0]}: no problems in this file")
    format = args.format or ("prompt" if subject.prompt else "plain")
    prompts = [code.format_prompt(problem, format) for problem in problems]
    drawn = samples(subject, prompts, args, [code.STOPS[format]] * len(problems), "problem")
    completions = [[code.cut(text, format) for text in texts] for texts in drawn]
    programs = [code.program(problem, text)
                for problem, texts in zip(problems, completions) for text in texts]
    outcomes = sandbox.run_programs(programs, mode, "running", timeout=SECONDS[args.benchmark])
    rows = [outcomes[i * args.n:(i + 1) * args.n] for i in range(len(problems))]
    passed = np.array([sum(outcome.passed for outcome in row) for row in rows])

    figures = {"benchmark": args.benchmark, "model": subject.name, "format": format,
               "problems": len(problems), "n": args.n}
    print(f"\n{len(problems):,} problems, {args.n} samples each, {format} format; "
          "± standard error by problem\n")
    for k in sorted(set(args.k)):
        rates = code.pass_at_k(args.n, passed, k)
        mean, error = pm.mean_and_error(rates, np.ones(len(rates)), np.arange(len(rates)))
        print(f"  pass@{k:<4} {100 * mean:6.2f} % ± {100 * error:.2f}")
        figures |= pm.figure(f"pass@{k}", mean, error)
    figures["reasons"] = dict(sorted(Counter(outcome.reason for outcome in outcomes).items()))
    print("  programs: " + ", ".join(f"{n:,} {reason}" for reason, n in figures["reasons"].items()))
    return figures, [{"id": problem.id, "passed": int(c), "n": args.n, "completions": texts,
                      "reasons": [outcome.reason for outcome in row]}
                     for problem, c, texts, row in zip(problems, passed, completions, rows)]
