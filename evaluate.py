"""The paper's evaluations, one benchmark a command. Each prints a table and, last, one JSON line with the figures.

  python evaluate.py pm --model out/pm                                a preference model on comparisons
  python evaluate.py hhh --model out/lm --prompt hhh                  helpful, honest, harmless: which answer is better?
  python evaluate.py lambada --model out/lm --data lambada_test.jsonl
  python evaluate.py humaneval --model out/lm --data HumanEval.jsonl.gz --n 100
  python evaluate.py BENCHMARK -h                                     what it measures, and its flags

A prompt is read once and shared by everything that is scored or sampled behind it.
"""
import argparse
import itertools
import json
from pathlib import Path

import numpy as np

import checkpoint
import plan
from data import toy
from data.comparisons import load_comparisons
from data.errors import InputError, run_main
from data.files import check_writable, find_files, write_file
from evals import choices, elo, perplexity, pm, programs, rerank, toxicity
from evals.subject import add_model_flags, add_sampling_flags, load_subject, reward_function, samples

SHOWN = argparse.RawDescriptionHelpFormatter


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=SHOWN)
    benchmarks = parser.add_subparsers(dest="benchmark", metavar="BENCHMARK", required=True)

    def add(name, function, help, data=None, out="one JSON line per item"):
        """A benchmark's parser. data: the help text of --data, "!" first where it must be given."""
        own = benchmarks.add_parser(name, help=help, description=function.__doc__, formatter_class=SHOWN)
        own.set_defaults(run=function)
        if function is not ratings:
            add_model_flags(own)
        if data:
            own.add_argument("--data", nargs="+", required=data.startswith("!"), help=data.lstrip("!"))
        own.add_argument("--out", metavar="FILE.jsonl", help=f"write {out} there")
        return own

    own = add("pm", accuracy, "accuracy and calibration of a preference model on comparisons", "comparison files or folders, or toy (default: toy)")
    own.add_argument("--score", choices=pm.RULES, help="score of a completion: reward (of a preference model), mean log-prob a token, or sum of "
                     "log-probs (default: reward; mean for a language model)")
    own.add_argument("--skip_no_context", action="store_true", help="do not score the completions without their contexts too: a quarter of the time")
    add("hhh", multiple_choice, "which of two answers is the helpful, honest, harmless one?", "BIG-bench's task.json files or their folder, comparison files with "
        "categories, or toy (default: our own items, data/hhh_items.jsonl)")
    add("truthfulqa", multiple_choice, "MC1 and MC2: true answers against common falsehoods", "!TruthfulQA.csv")
    add("hellaswag", multiple_choice, "which of four endings fits?", "!hellaswag_val.jsonl")
    add("choice", multiple_choice, "any comparison file as multiple choice", "!comparison files")
    add("lambada", last_word, "the last word of a text", "!lambada_test.jsonl")
    add("lm", text_loss, "loss on text in nats a token and bits a byte", "text files or folders, or toy (default: toy)")
    for name, help in (("humaneval", "functions from their docstrings"), ("mbpp", "functions from a sentence and an assertion"), ("quixbugs", "functions with a bug to mend")):
        own = add(name, code, f"{help}; pass@k in a sandbox", "!the published file (of QuixBugs its folder)")
        add_sampling_flags(own, n=10, max_new=300, temperature=0.6, top_p=0.95)
        own.add_argument("--k", type=plan.positive(int), nargs="+", default=[1, 10], help="pass@k for these k, each at most --n (default: 1 10)")
        own.add_argument("--format", choices=("plain", "prompt"), help="how a problem is put: the function's beginning as it stands, or the paper's dialogue "
                         "(default: plain; prompt where --prompt is given)")
        own.add_argument("--problems", type=plan.positive(int), help="only the first so many problems (default: all)")
    own = add("toxicity", toxic, "toxicity of continuations", "!prompts: RealToxicityPrompts' JSON lines, comparison files (their contexts), {\"text\"} lines, or "
              ".txt with one a line")
    add_sampling_flags(own, n=25, max_new=20, temperature=1.0, top_p=0.9)
    own.add_argument("--scorer", metavar="DIR", help="a binary preference model of ours, whose P(bad) is the toxicity (default: Detoxify, if installed)")
    own.add_argument("--prompts", type=plan.positive(int), help="only the first so many prompts (default: all)")
    own = add("sample", draw, "continuations of contexts, for elo, re-ranking and people", "comparison files, whose contexts are continued, or toy (default: toy)", "the samples")
    add_sampling_flags(own, n=1, max_new=256, temperature=1.0, top_p=0.95)
    own.add_argument("--contexts", type=plan.positive(int), help="only the first so many (default: all)")
    own = add("rerank", best_of, "accuracy@k: is the best-scored of k samples right?", "!comparison files, a problem's samples scored 1 where right and 0 where wrong")
    own.add_argument("--k", type=plan.positive(int), nargs="+", default=[1, 2, 4, 8, 16, 32, 64, 100], help="accuracy@k for these k, as far as the samples go "
                     "(default: 1 2 4 … 100)")
    for own in (own, benchmarks.choices["pm"]):
        own.add_argument("--split", choices=("auto", "held_out", "all"), default="auto", help="which groups: auto takes the held-out ones of files the model was "
                         "trained on and all of others; held_out and all mean it (default: auto)")
        own.add_argument("--ensemble", nargs="+", default=[], metavar="DIR", help="more preference models: also the mean and the least of all their rewards")
    own = add("elo", ratings, "ratings of models from A/B games, or from a preference model as judge", out="the games")
    own.add_argument("--games", metavar="FILE", help="a table of outcomes, csv or JSON lines: model_a, model_b, winner")
    own.add_argument("--judge", metavar="DIR", help="or: a preference model that judges --samples")
    own.add_argument("--samples", nargs="+", metavar="FILE", help="for --judge: one file of each player, as `evaluate.py sample --out` writes it")
    own.add_argument("--names", nargs="+", help="names of the players, in the order of --samples (default: their files' names)")
    own.add_argument("--seed", type=plan.between(int, 0, 2**32), default=0, help="of the bootstrap (default: %(default)s)")
    plan.add_device_flags(own)
    return parser.parse_args()


def main():
    args = parse_args()
    if args.out:
        check_writable(args.out)  # said now, not after an hour of scoring
    figures, items = args.run(args)
    if args.out:
        write_file(args.out, "".join(json.dumps(item) + "\n" for item in items))
        print(f"\n  each item: {args.out}")
    print(json.dumps(figures))


# ---------------------------------------------------------------------------------------------------------------------
# Benchmarks: each returns (figures for the JSON line, items for --out)


def accuracy(args):
    """pm: accuracy on comparisons (Sections 3 and 4), beside what simple rulers reach: longer wins, shorter wins, and the same
    model without the context; calibration of P(A > B) = sigmoid(r_A - r_B); accuracy by margin."""
    subject = load_subject(args)
    meta = subject.meta
    how = args.score or ("reward" if subject.is_pm else "mean")
    if how == "reward" and not subject.is_pm:
        raise InputError(f"{args.model}: a language model has no rewards; give --score mean or sum, or a preference model")
    if how != "reward" and subject.is_pm:
        print(f"note: {args.model} is a preference model; its log-probs are those of a model trained for rewards")
    if meta.get("binarised"):
        print(f"note: {args.model} was trained on binarised pairs, with control tokens; here it is read without them, as before finetuning")
    files = toy.find_data(args.data or ["toy"], "binary.jsonl" if meta["objective"] == "binary" else "ranked.jsonl")
    data = load_comparisons(files, subject.tokenizer)
    examples = pick_examples(subject, data, files, args.split)
    scores = subject.score(data, examples, how, progress="scoring")
    others = {} if args.skip_no_context else {"no context": subject.score(data, examples, how, context_ids=[subject.tokenizer.eot], progress="without context")}
    if args.ensemble:
        others |= rerank.ensemble(args, files, data, examples, scores, how)
    return report(args, data, examples, scores, others, how)


def multiple_choice(args):
    """hhh, truthfulqa, hellaswag, choice: multiple choice, by mutual information, mean and sum of log-probs, or by reward (Section 2).

    hhh: accuracy per category, two choices each. truthfulqa: MC1 (the best answer against the incorrect ones) and MC2 (the share
    of probability at correct ones). hellaswag and choice: how often the right one has the highest score."""
    subject = load_subject(args)
    if args.benchmark == "hhh":
        paths = toy.find_data(args.data, "hhh.jsonl") if args.data else [choices.HHH_ITEMS]
    else:
        paths = args.data
    return choices.choices(args.benchmark, paths, subject)


def last_word(args):
    """lambada: how often the last word of a text is what greedy decoding says, and the word's log-prob."""
    return choices.last_word(args.data, load_subject(args, checkpoint.load_lm))


def text_loss(args):
    """lm: loss on text in nats a token and bits a byte; of files the model was trained on, on their held-out documents."""
    return perplexity.text_loss(toy.find_data(args.data or ["toy"], "lm.jsonl"), load_subject(args, checkpoint.load_lm))


def code(args):
    """humaneval, mbpp, quixbugs: functions written (of quixbugs: mended) by the model and run with their tests in a sandbox; pass@k.

    n samples a problem, and the unbiased estimator 1 - C(n - c, k) / C(n, k) where c of them pass (Section 2)."""
    if max(args.k) > args.n:
        raise InputError(f"--k {max(args.k)} is more than --n {args.n} samples")
    return programs.pass_rates(args, load_subject(args, checkpoint.load_lm))


def toxic(args):
    """toxicity: n continuations of each prompt, scored by a classifier: mean, share above 0.5, expected maximum of n (Section 2)."""
    score = toxicity.scorer(args)
    return toxicity.toxicity(args, find_files(args.data), load_subject(args, checkpoint.load_lm), score)


def draw(args):
    """sample: n continuations of each context, written as comparisons without scores: for elo, re-ranking and people."""
    subject = load_subject(args, checkpoint.load_lm)
    contexts = dict.fromkeys(record["context"] for path in toy.find_data(args.data or ["toy"], "hhh.jsonl") for record in choices.comparisons(path))
    contexts = list(contexts)[:args.contexts]
    if not contexts:
        raise InputError(f"{args.data[0]}: no context in this file")
    items = [{"context": context, "completions": texts, "scores": [0] * len(texts), "group": context}
             for context, texts in zip(contexts, samples(subject, contexts, args, unit="context"))]
    lengths = [len(text) for item in items for text in item["completions"]]
    print(f"{len(lengths):,} samples for {len(items):,} contexts, {sum(lengths) / len(lengths):.0f} characters on average; the first one:\n"
          f"{items[0]['context']}{items[0]['completions'][0]}")
    return {"benchmark": "sample", "model": args.model, "contexts": len(items), "samples": len(lengths)}, items


def best_of(args):
    """rerank: accuracy@k, how often the best-scored of k samples of a problem is right, by the paper's unbiased estimator
    (Section 3.3), for rewards or a language model's mean log-prob, beside chance and the best possible."""
    return rerank.accuracy_by_k(args, load_subject(args))


def ratings(args):
    """elo: Elo ratings of models by maximum likelihood from A/B games, ties dropped, with bootstrap intervals (Section 2).

    400 / ln 10 = 174 Elo are one unit of a preference model's reward: with --judge a game's outcome is
    P(A wins) = sigmoid(r_A - r_B) for each context that both players continued."""
    if bool(args.games) == bool(args.judge and args.samples):
        raise InputError("give either --games FILE, or --judge DIR with --samples FILE FILE …")
    games = elo.read_games(args.games) if args.games else judged_games(args)
    return {"benchmark": "elo", **elo.report(games, args.seed)}, [{"model_a": a, "model_b": b, "winner": w} for a, b, w in games]


def judged_games(args):
    """Games between all --samples files (players, named by their files), one for each context and number of sample that two have."""
    names = args.names or [Path(path).name.split(".jsonl")[0] for path in args.samples]
    if len(set(names)) < max(2, len(args.samples)):
        raise InputError(f"--samples needs at least two files, each with a name of its own, found {', '.join(names)}")
    rewards, _ = reward_function(args.judge, args)
    texts = [{(r["context"], k): text for r in choices.comparisons(path) for k, text in enumerate(r["completions"])} for path in args.samples]
    asked = [(player, context, text) for player, own in enumerate(texts) for (context, _), text in own.items()]
    scores, start = rewards([context for _, context, _ in asked], [text for *_, text in asked]), 0
    for own in texts:
        for key in own:
            own[key], start = scores[start], start + 1
    games = [(a, b, float(elo.judge(x[key], y[key]))) for (a, x), (b, y) in itertools.combinations(zip(names, texts), 2) for key in x if key in y]
    if not games:
        raise InputError(f"{args.samples[0]}: shares no context with the other files: sample from the same --data")
    return games


def pick_examples(subject, data, files, split):
    """Numbers of the comparisons to score. Says what is left out and why."""
    keep = subject.unseen(data, files, split)
    fits, differ = data.fits(subject.ctx), data.differ()
    if (keep & ~(fits & differ)).any():
        print(f"left out: {int((keep & ~fits).sum())} comparisons with a completion longer than --ctx {subject.ctx}, "
              f"{int((keep & fits & ~differ).sum())} whose scores are all equal")
    examples = np.flatnonzero(keep & fits & differ)
    if not len(examples):
        raise InputError(f"{files[0]}: no comparison is left to score")
    return examples


def report(args, data, examples, scores, others, how):
    """others: {name: other scores of the same completions}."""
    truths = [data.scores(i) for i in examples]
    chars = [np.asarray(data.chars[data.first[i] + 1:data.first[i + 1]], float) for i in examples]
    margin, weight, comparison = pm.margins(truths, scores)
    groups = np.asarray(data.groups)[examples][comparison]
    rulers = {"accuracy": margin, **{name: pm.margins(truths, values)[0] for name, values in others.items()}, "longer wins": pm.margins(truths, chars)[0]}
    rulers["shorter wins"] = -rulers["longer wins"]
    figures = {"benchmark": "pm", "model": args.model, "score": how, "n": len(examples), "pairs": len(margin),
               "groups": len(np.unique(groups)), "ties": int((margin == 0).sum())}

    print(f"\n{len(examples):,} comparisons, {len(margin):,} pairs, {figures['groups']:,} groups, {figures['ties']} ties (a tie counts half)\n")
    for name, values in rulers.items():
        mean, error = pm.mean_and_error(pm.right(values), weight, groups)
        label = name if name != "accuracy" else {"reward": "reward", "mean": "mean log-prob", "sum": "sum log-prob"}[how]
        print(f"  {label:<16} {100 * mean:6.2f} % ± {100 * error:.2f}")
        key = name.replace(" ", "_")
        figures |= pm.figure(key, mean, error)
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
    columns = {how: scores, **{name.replace(" ", "_"): values for name, values in others.items()}}
    return figures, [{"where": data.where(i), "group": f"{data.groups[i]:016x}", "scores": truths[j].tolist(), **{name: values[j].tolist() for name, values in columns.items()}}
                     for j, i in enumerate(examples)]


if __name__ == "__main__":
    run_main(main)
