"""Accuracy on comparisons, as the benchmark `pm` of evaluate.py prints it (Sections 3 and 4 of the paper)."""
import numpy as np

from data import toy
from data.comparisons import load_comparisons
from data.errors import InputError
from evals import choices, pm, rerank


def accuracy(args, subject):
    """Score the comparisons of --data and print how often the better completion has the higher score. Returns
    (figures for JSON, one dict per comparison)."""
    rule = args.score or ("reward" if subject.is_pm else "mean")
    if rule == "reward" and not subject.is_pm:
        raise InputError(f"{args.model}: a language model has no rewards; give --score mean or sum, or a "
                         "preference model")
    if rule != "reward" and subject.is_pm:
        print(f"note: {args.model} is a preference model, trained for rewards and not for log-probs")
    if subject.meta.get("binarised"):
        print(f"note: {args.model} was trained on binarised pairs, with control texts before completions; "
              "its rewards without them mean nothing until it is finetuned")
    is_binary = subject.meta["objective"] == "binary"
    files = toy.find_data(args.data, "binary.jsonl" if is_binary else "ranked.jsonl")
    data = load_comparisons(files, subject.tokenizer)
    unseen = subject.unseen(data, files, args.split)
    examples = pm.examples_to_score(data, subject.ctx, unseen, to_rank=True)

    scores = {rule: subject.score(data, examples, rule, progress="scoring")}
    if not args.skip_no_context:
        scores["no context"] = subject.score(data, examples, rule, context_ids=[subject.tokenizer.eot],
                                             progress="without context")
    if args.ensemble:
        scores |= rerank.ensemble(args, files, data, examples, scores[rule], rule)
    figures = {"benchmark": "pm", "model": args.model, "score": rule, "n": len(examples),
               "contexts_cut": int(data.is_cut(subject.ctx)[examples].sum())}
    figures |= accuracy_figures(data, examples, scores, rule)
    items = []
    for number, i in enumerate(examples):
        columns = {name.replace(" ", "_"): values[number].tolist() for name, values in scores.items()}
        items.append({"where": data.where(i), "group": f"{data.groups[i]:016x}",
                      "scores": data.scores(i).tolist(), **columns})
    return figures, items


def accuracy_figures(data, examples, scores, rule):
    """Print the tables of `accuracy` and return their figures. scores: {rule: …, name of a ruler: …}, each a
    list of arrays (completions,), one for each example."""
    true_scores = [data.scores(i) for i in examples]
    lengths = [data.chars[data.first[i] + 1:data.first[i + 1]].astype(float) for i in examples]
    rulers = scores | {"longer wins": lengths, "shorter wins": [-chars for chars in lengths]}
    margin, weight, comparison = pm.margins(true_scores, scores[rule])
    groups = data.groups[examples][comparison]
    figures = {"pairs": len(margin), "groups": len(np.unique(groups)), "ties": int((margin == 0).sum())}
    print(f"\n{len(examples):,} comparisons, {len(margin):,} pairs, {figures['groups']:,} groups, "
          f"{figures['ties']} ties (a tie counts half)\n")
    for name, values in rulers.items():
        is_right = pm.right(pm.margins(true_scores, values)[0])
        mean, error = pm.mean_and_error(is_right, weight, groups)
        print(f"  {choices.RULES.get(name, name):<16} {100 * mean:6.2f} % ± {100 * error:.2f}")
        figures |= pm.figure("accuracy" if name == rule else name.replace(" ", "_"), mean, error)
    print("  (± one standard error, by group)")
    if rule == "reward":
        figures["brier"], figures["ece"], figures["reliability"] = pm.calibration(margin, weight)
        print(f"\n  Brier score {figures['brier']:.4f} (0.25: always saying 50 %)   expected calibration "
              f"error {figures['ece']:.4f}\n\n  predicted      pairs   mean predicted   accuracy")
        for low, high, n, confidence, rate in figures["reliability"]:
            print(f"  {low:.2f}-{high:.2f}   {n:8,}   {confidence:14.3f}   {rate:8.3f}")
    figures["by_margin"] = pm.by_margin(margin, weight)
    print("\n  |margin|              pairs   accuracy")
    for low, high, n, rate in figures["by_margin"]:
        print(f"  {low:8.3f}-{high:<8.3f} {n:9,}   {rate:8.3f}")
    return figures
