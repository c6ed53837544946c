"""The paper's evaluations, one benchmark a command. Prints a table and, last, one JSON line with the figures.

  python evaluate.py pm --model out/pm                              the toy comparisons' held-out groups
  python evaluate.py pm --model out/pm --data FILE --out scores.jsonl
  python evaluate.py pm --model out/lm --score sum                  a language model, by its log-probs

pm: accuracy on comparisons (Sections 3 and 4), beside what simple rulers reach: longer wins, shorter wins, and the same
model without the context; calibration of P(A > B) = sigmoid(r_A - r_B); accuracy by margin.
"""
import argparse
import json

import numpy as np

import checkpoint
import trainer
from data import toy
from data.comparisons import load_comparisons
from data.errors import InputError, run_main
from data.files import file_digest, write_file
from evals import pm


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("benchmark", choices=("pm",), help="what to measure")
    parser.add_argument("--model", required=True, help="checkpoint folder")
    parser.add_argument("--data", nargs="+", default=["toy"], help="comparison files or folders, or toy (default: toy)")
    parser.add_argument("--score", choices=pm.SCORES, help="score of a completion: reward (of a preference model), mean log-prob a token, or sum of log-probs "
                        "(default: reward; mean for a language model)")
    parser.add_argument("--split", choices=("auto", "held_out", "all"), default="auto", help="which groups: auto takes the held-out ones of files the model was "
                        "trained on and all of others; held_out and all mean it (default: auto)")
    parser.add_argument("--ctx", type=trainer.positive(int), help="tokens a context and one completion may take; longer contexts are cut on the left (default: the model's)")
    parser.add_argument("--out", metavar="FILE.jsonl", help="write each comparison's scores there")
    trainer.add_device_flags(parser)
    return parser.parse_args()


def main():
    args = parse_args()
    ranks = trainer.start(args.device)
    model, tokenizer, meta = checkpoint.load(args.model)
    model.dtype = trainer.pick_dtype(args.dtype, ranks.device)
    model.to(ranks.device).eval()
    how = args.score or ("reward" if meta["kind"] == "pm" else "mean")
    if how == "reward" and meta["kind"] != "pm":
        raise InputError(f"{args.model}: a language model has no rewards; give --score mean or sum, or a preference model")
    if how != "reward" and meta["kind"] == "pm":
        print(f"note: {args.model} is a preference model; its log-probs are those of a model trained for rewards")
    ctx = args.ctx or model.config.ctx
    files = toy.find_data(args.data, "binary.jsonl" if meta["objective"] == "binary" else "ranked.jsonl")
    data = load_comparisons(files, tokenizer)
    examples = pick_examples(args, data, files, meta, ctx)

    at_once = trainer.micro_tokens(args, model, ranks.device)
    settings = (how, ctx, tokenizer, at_once, ranks.device)
    scores = pm.score_all(model, data, examples, *settings, progress="scoring")
    without = pm.score_all(model, data, examples, *settings, context_free=True, progress="without context")
    report(args, data, examples, scores, without, how, meta)


def pick_examples(args, data, files, meta, ctx):
    """Numbers of the comparisons to score. Says what is left out and why."""
    keep, told = np.ones(len(data), bool), []
    known = {e["digest"]: e["held_out"] for e in sorted(meta["trained_on"], key=lambda e: -e["held_out"])}  # the smallest fraction
    for number, path in enumerate(files):
        fraction = known.get(file_digest(path).hex())
        if args.split == "all" or (args.split == "auto" and fraction is None):
            told.append(f"{path}: all groups" + (" (the model was trained on some of them)" if fraction is not None else ""))
            continue
        if fraction is None:
            raise InputError(f"{path}: the model was not trained on this file, so it has no held-out groups; leave out --split held_out")
        if fraction == 0:
            raise InputError(f"{path}: the model was trained on all its groups; evaluate on another file, or say --split all")
        keep &= data.held_out(fraction) | (data.lines[:, 0] != number)
        told.append(f"{path}: held-out groups only, as the model was trained on the others")
    print("\n".join(told))
    fits, differ = data.fits(ctx), data.differ()
    if (keep & ~(fits & differ)).any():
        print(f"left out: {int((keep & ~fits).sum())} comparisons with a completion longer than --ctx {ctx}, "
              f"{int((keep & fits & ~differ).sum())} whose scores are all equal")
    examples = np.flatnonzero(keep & fits & differ)
    if not len(examples):
        raise InputError(f"{files[0]}: no comparison is left to score")
    return examples


def report(args, data, examples, scores, without, how, meta):
    truths = [data.scores(i) for i in examples]
    chars = [np.asarray(data.chars[data.first[i] + 1:data.first[i + 1]], float) for i in examples]
    margin, weight, comparison = pm.margins(truths, scores)
    groups = np.asarray(data.groups)[examples][comparison]
    rulers = {"accuracy": margin, "no context": pm.margins(truths, without)[0], "longer wins": pm.margins(truths, chars)[0]}
    rulers["shorter wins"] = -rulers["longer wins"]
    figures = {"benchmark": "pm", "model": args.model, "score": how, "n": len(examples), "pairs": len(margin),
               "groups": len(np.unique(groups)), "ties": int((margin == 0).sum())}

    print(f"\n{len(examples):,} comparisons, {len(margin):,} pairs, {figures['groups']:,} groups, {figures['ties']} ties (a tie counts half)\n")
    for name, values in rulers.items():
        mean, error = pm.mean_and_error(pm.right(values), weight, groups)
        label = name if name != "accuracy" else {"reward": "reward", "mean": "mean log-prob", "sum": "sum log-prob"}[how]
        print(f"  {label:<16} {100 * mean:6.2f} % ± {100 * error:.2f}")
        key = name.replace(" ", "_")
        figures |= {key: mean, f"{key}_se": None if np.isnan(error) else error}  # NaN is not JSON
    print("  (± one standard error, by group)")
    if how == "reward":
        brier, error, table = pm.calibration(margin, weight)
        figures |= {"brier": brier, "ece": error, "reliability": table}
        print(f"\n  Brier score {brier:.4f} (0.25: always saying 50 %)   expected calibration error {error:.4f}\n")
        print("  predicted      pairs   mean predicted   accuracy")
        for low, high, n, confidence, accuracy in table:
            print(f"  {low:.2f}-{high:.2f}   {n:8,}   {confidence:14.3f}   {accuracy:8.3f}")
    figures["by_margin"] = pm.by_margin(margin, weight)
    print("\n  |margin|              pairs   accuracy")
    for low, high, n, accuracy in figures["by_margin"]:
        print(f"  {low:8.3f}-{high:<8.3f} {n:9,}   {accuracy:8.3f}")
    if args.out:
        lines = [json.dumps({"where": data.where(i), "scores": truth.tolist(), how: score.tolist(), "no_context": free.tolist()})
                 for i, truth, score, free in zip(examples, truths, scores, without)]
        write_file(args.out, "\n".join(lines) + "\n")
        print(f"\n  each comparison's scores: {args.out}")
    print(json.dumps(figures))


if __name__ == "__main__":
    run_main(main)
