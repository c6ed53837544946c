"""Re-ranking: accuracy@k (Section 3 of the paper), and ensembles of preference models (its appendix)."""
import argparse

import numpy as np

from data.comparisons import load_comparisons
from data.errors import InputError
from data.files import find_files
from evals import code, pm
from evals.subject import load_subject


def ensemble(args, files, data, examples, scores, rule):
    """{"mean of n": scores, "least of n": scores} by --model, whose `scores` are given, and the preference
    models that --ensemble names.

    A reward's zero has no meaning, so each model's rewards of a comparison are first centred. The least of
    several rewards is pessimistic: it is high only if every model thinks well of the completion.
    """
    if rule != "reward":
        raise InputError(f"{args.model}: scored by log-probs; an ensemble is of preference models' rewards")
    members = [scores]
    for folder in args.ensemble:
        subject = load_subject(argparse.Namespace(**{**vars(args), "model": folder}))
        if not subject.is_pm:
            raise InputError(f"{folder}: a language model; an ensemble is of preference models")
        tokenised = load_comparisons(files, subject.tokenizer, quiet=True)
        too_long = examples[~tokenised.fits(subject.ctx)[examples]]
        if len(too_long):
            raise InputError(f"{folder}: {len(too_long)} comparisons, the first at "
                             f"{data.where(too_long[0])}, do not fit its context of {subject.ctx}")
        seen = examples[~subject.unseen(tokenised, files, args.split)[examples]]
        if len(seen):
            raise InputError(f"{folder}: was trained on {len(seen)} of these comparisons, the first at "
                             f"{data.where(seen[0])}; train an ensemble's members with the same --held_out, "
                             "or say --split all")
        members.append(subject.score(tokenised, examples, "reward", progress=f"scoring with {folder}"))
    centred = [[rewards - rewards.mean() for rewards in member] for member in members]
    n = len(members)
    return {f"mean of {n}": [np.mean(rewards, 0) for rewards in zip(*centred)],
            f"least of {n}": [np.min(rewards, 0) for rewards in zip(*centred)]}


def accuracy_by_k(args, subject):
    """Print accuracy@k for each k; returns (figures for JSON, one dict per problem)."""
    rule = "reward" if subject.is_pm else "mean"
    files = find_files(args.data)
    data = load_comparisons(files, subject.tokenizer)
    examples = pm.examples_to_score(data, subject.ctx, subject.unseen(data, files, args.split))
    marks = [data.scores(i) > 0 for i in examples]  # which samples are right
    scores = subject.score(data, examples, rule, progress="scoring")
    rankings = {"reward" if rule == "reward" else "mean log-prob": scores}
    if args.ensemble:
        rankings |= ensemble(args, files, data, examples, scores, rule)
    rankings |= {"chance": [0.0 * m for m in marks], "best possible": [1.0 * m for m in marks]}

    fewest = min(map(len, marks))
    figures = {"benchmark": "rerank", "model": subject.name, "score": rule, "problems": len(examples),
               "samples": fewest, "right": float(np.mean([m.mean() for m in marks]))}
    print(f"\n{len(examples):,} problems, at least {fewest} samples each; ± standard error by group\n")
    print("     k" + "".join(f"{name:>20}" for name in rankings))
    groups = np.asarray(data.groups)[examples]
    for k in sorted({k for k in args.k if k <= fewest}):
        line = f"{k:6}"
        for name, ranking in rankings.items():
            rates = np.array([code.accuracy_at_k(s, m, k) for s, m in zip(ranking, marks)])
            mean, error = pm.mean_and_error(rates, np.ones(len(rates)), groups)
            line += f"{100 * mean:13.2f} ±{100 * error:5.2f}"
            figures |= pm.figure(f"accuracy@{k}_{name.replace(' ', '_')}", mean, error)
        print(line)
    return figures, [{"where": data.where(i), "group": f"{data.groups[i]:016x}",
                      "right": m.astype(int).tolist(), rule: s.tolist()}
                     for i, m, s in zip(examples, marks, scores)]
