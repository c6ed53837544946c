"""Functions written by a language model, run with their tests: HumanEval, MBPP, QuixBugs (Section 2 of the paper)."""
import numpy as np

from data.errors import InputError
from evals import code, pm
from evals.sandbox import sandbox
from evals.subject import samples

READERS = {"humaneval": code.humaneval, "mbpp": code.mbpp, "quixbugs": code.quixbugs}
LIMITS = {"humaneval": {}, "mbpp": {}, "quixbugs": {"timeout": 30.0, "memory": 2**31}}  # some of QuixBugs' right programs are slow and large


def pass_rates(args, subject):
    """Sample args.n programs a problem, run them all, print pass@k; returns (figures for JSON, one dict per problem)."""
    problems = [problem for path in args.data for problem in READERS[args.benchmark](path)][:args.problems]
    if not problems:
        raise InputError(f"{args.data[0]}: no problems in this file")
    how = args.format or ("prompt" if subject.prefix else "plain")
    drawn = samples(subject, [code.format_prompt(problem, how) for problem in problems], args, [code.STOPS[how]] * len(problems), "problem")
    written = [[code.cut(text, how) for text in texts] for texts in drawn]
    sources = [code.program(problem, text) for problem, texts in zip(problems, written) for text in texts]
    outcomes = sandbox.run_programs(sources, progress="running", **LIMITS[args.benchmark])
    rows = [outcomes[i * args.n:(i + 1) * args.n] for i in range(len(problems))]
    passed = np.array([sum(outcome.passed for outcome in row) for row in rows])
    each, ones = np.arange(len(problems)), np.ones(len(problems))
    figures = {"benchmark": args.benchmark, "model": subject.name, "format": how, "problems": len(problems), "n": args.n}
    print(f"\n{len(problems):,} problems, {args.n} samples each, {how} format; ± standard error by problem\n")
    for k in sorted(set(args.k)):
        mean, error = pm.mean_and_error(np.array([code.pass_at_k(args.n, int(c), k) for c in passed]), ones, each)
        print(f"  pass@{k:<4} {100 * mean:6.2f} % ± {100 * error:.2f}")
        figures |= pm.figure(f"pass@{k}", mean, error)
    reasons, counts = np.unique([outcome.reason for row in rows for outcome in row], return_counts=True)
    figures["reasons"] = dict(zip(reasons.tolist(), counts.tolist()))
    print("  programs: " + ", ".join(f"{n:,} {reason}" for reason, n in figures["reasons"].items()))
    return figures, [{"id": problem.id, "passed": int(c), "n": args.n, "completions": texts, "reasons": [o.reason for o in row]}
                     for problem, c, texts, row in zip(problems, passed, written, rows)]
