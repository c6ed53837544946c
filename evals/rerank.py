"""Re-ranking: accuracy@k (Section 3 of the paper), and ensembles of preference models (its appendix)."""
import argparse

import numpy as np

from data.comparisons import load_comparisons
from data.errors import InputError
from data.files import find_files
from evals import code, pm
from evals.subject import load_subject


def ensemble(args, files, data, examples, scores, how):
    """{"mean of n": scores, "least of n": scores} of --model (its `scores` given) and the preference models --ensemble.

    A reward's zero has no meaning, so each model's rewards of a comparison are first centred. The least of several is the
    pessimistic score: no member may think little of a completion.
    """
    if how != "reward":
        raise InputError(f"{args.model}: scored by log-probs; an ensemble is of preference models' rewards")
    members = [scores]
    for folder in args.ensemble:
        subject = load_subject(argparse.Namespace(**{**vars(args), "model": folder}))
        if not subject.is_pm:
            raise InputError(f"{folder}: a language model; an ensemble is of preference models")
        own = load_comparisons(files, subject.tokenizer, quiet=True)
        left_out = np.setdiff1d(examples, np.flatnonzero(own.fits(subject.ctx)))
        if len(left_out):
            raise InputError(f"{folder}: {len(left_out)} comparisons, the first at {data.where(left_out[0])}, do not fit its context of {subject.ctx}")
        seen = examples[~subject.unseen(own, files, args.split)[examples]]
        if len(seen):
            raise InputError(f"{folder}: was trained on {len(seen)} of these comparisons, the first at {data.where(seen[0])}; train an ensemble's members with the same "
                             "--held_out, or say --split all")
        members.append(subject.score(own, examples, "reward", progress=f"scoring with {folder}"))
    centred = [[own - own.mean() for own in member] for member in members]
    return {f"mean of {len(members)}": [np.mean(rows, 0) for rows in zip(*centred)], f"least of {len(members)}": [np.min(rows, 0) for rows in zip(*centred)]}


def accuracy_by_k(args, subject):
    """Print accuracy@k for each k; returns (figures for JSON, one dict per problem)."""
    how = "reward" if subject.is_pm else "mean"
    files = find_files(args.data)
    data = load_comparisons(files, subject.tokenizer)
    marks = [data.scores(i) > 0 for i in range(len(data))]
    unseen = subject.unseen(data, files, args.split)
    examples = np.flatnonzero(unseen & data.fits(subject.ctx))
    if not len(examples):
        raise InputError(f"{files[0]}: no problem whose samples fit the context of {subject.ctx} tokens")
    scores = subject.score(data, examples, how, progress="scoring")
    rankings = {{"reward": "reward", "mean": "mean log-prob"}[how]: scores} | (ensemble(args, files, data, examples, scores, how) if args.ensemble else {})
    rankings |= {"chance": [np.zeros(len(s)) for s in scores], "best possible": [marks[i].astype(float) for i in examples]}
    most = min(len(s) for s in scores)
    figures = {"benchmark": "rerank", "model": subject.name, "score": how, "problems": len(examples), "samples": most,
               "right": float(np.mean([marks[i].mean() for i in examples]))}
    groups = np.asarray(data.groups)[examples]
    print(f"\n{len(examples):,} problems, {unseen.sum() - len(examples)} left out as too long; at least {most} samples each; ± standard error by group\n")
    print("     k" + "".join(f"{name:>20}" for name in rankings))
    for k in sorted({k for k in args.k if k <= most}):
        row = f"{k:6}"
        for name, values in rankings.items():
            rates = np.array([code.accuracy_at_k(s, marks[i], k) for i, s in zip(examples, values)])
            mean, error = pm.mean_and_error(rates, np.ones(len(rates)), groups)
            row += f"{100 * mean:13.2f} ±{100 * error:5.2f}"
            figures |= pm.figure(f"accuracy@{k}_{name.replace(' ', '_')}", mean, error)
        print(row)
    return figures, [{"where": data.where(i), "group": f"{data.groups[i]:016x}", "right": marks[i].astype(int).tolist(), how: s.tolist()} for i, s in zip(examples, scores)]
