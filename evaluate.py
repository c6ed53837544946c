"""The paper's evaluations, each a command that prints a table and, last, one JSON line with the figures.

  python evaluate.py pm --model out/pm                                a preference model on comparisons
  python evaluate.py hhh --model out/lm --prompt hhh                  which answer is better, behind a prompt?
  python evaluate.py lambada --model out/lm --data lambada_test.jsonl
  python evaluate.py humaneval --model out/lm --data HumanEval.jsonl.gz --n 100
  python evaluate.py BENCHMARK -h                                     what it measures, and its flags

What is evaluated is called the subject (evals/subject.py): a model with its tokenizer and, if one is given,
its prompt. The prompt is read once, and all that is scored or sampled behind it shares what was read.
Comparisons whose longest completion does not fit in the context are left out, and contexts that do not fit
beside it are cut on the left. Both are counted and printed.
"""
import argparse
import contextlib
import inspect
import io
import json
import sys
from pathlib import Path

import numpy as np

import checkpoint
import plan
from data import toy
from data.errors import InputError, Parser, run_main
from data.files import check_writable, find_files, refuse_overwriting, write_file
from evals import choices, elo, perplexity, pm, preferences, programs, rerank, toxicity
from evals.sandbox import sandbox
from evals.subject import add_model_flags, add_sampling_flags, load_subject, reward_function, samples

AS_WRITTEN = argparse.RawDescriptionHelpFormatter  # keeps the line breaks of descriptions


def parse_args():
    parser = Parser(description=__doc__, formatter_class=AS_WRITTEN)
    benchmarks = parser.add_subparsers(dest="benchmark", metavar="BENCHMARK", required=True)
    positive = plan.positive(int)

    def add(name, function, summary, data=None, default=None, **sampling):
        """Add a benchmark. Returns its parser, to which flags can be added that it alone has.

        data: the help text of --data, for benchmarks of one model, which also get the flags of a model.
        default: that of --data, which must be given if there is none. sampling: defaults of sampling's flags.
        """
        benchmark = benchmarks.add_parser(name, help=summary, description=inspect.cleandoc(function.__doc__),
                                          formatter_class=AS_WRITTEN)
        benchmark.set_defaults(function=function)
        if data:
            add_model_flags(benchmark)
            benchmark.add_argument(
                "--data", nargs="+", help=data, required=default is None, default=[default])
        else:
            plan.add_device_flags(benchmark)
        if sampling:
            add_sampling_flags(benchmark, **sampling)
        benchmark.add_argument(
            "--out", metavar="FILE.jsonl", help="write each item as a line of JSON to this file")
        return benchmark

    preference = add("pm", preference_accuracy, "accuracy and calibration of a preference model",
                     "comparison files or folders, or toy (default: toy)", "toy")
    preference.add_argument(
        "--score", choices=pm.RULES,
        help="score of a completion: reward (of a preference model), or mean or sum of the log-probs of its "
        "tokens (default: reward; mean for a language model)")
    preference.add_argument(
        "--skip_no_context", action="store_true",
        help="leave out the scores without contexts, which take about a quarter of the time")
    add("hhh", multiple_choice, "which answer is the helpful, honest, harmless one?",
        "BIG-bench's task.json files or their folder, comparison files with categories, or toy (default: our "
        "own items, data/hhh_items.jsonl)", choices.HHH_ITEMS)
    add("truthfulqa", multiple_choice, "true answers against common falsehoods", "TruthfulQA.csv")
    add("hellaswag", multiple_choice, "which of four endings fits?", "hellaswag_val.jsonl")
    add("choice", multiple_choice, "any comparison file as multiple choice", "comparison files")
    add("lambada", last_word, "the last word of a text", "lambada_test.jsonl")
    add("lm", text_loss, "loss on text in nats a token and bits a byte",
        "text files or folders, or toy (default: toy)", "toy")
    for name, summary in (("humaneval", "functions from their docstrings; pass@k in a sandbox"),
                          ("mbpp", "functions from a sentence and an assertion; pass@k in a sandbox"),
                          ("quixbugs", "functions with a bug to mend; pass@k in a sandbox")):
        writing = add(name, code, summary, "the published file, or of QuixBugs its folder",
                      n=10, max_new=300, temperature=0.6, top_p=0.95)
        writing.add_argument("--k", type=positive, nargs="+", default=[1, 10],
                             help="pass@k for these k, each at most --n (default: 1 10)")
        writing.add_argument(
            "--format", choices=("plain", "prompt"),
            help="ask by the beginning of the function, or in the paper's dialogue (default: plain; prompt "
            "if --prompt is given)")
        writing.add_argument("--problems", type=positive, metavar="N", help="only the first N (default: all)")
        writing.add_argument("--unsafe", action="store_true", help=sandbox.UNSAFE_HELP)
    toxicity_of = add("toxicity", toxic, "toxicity of continuations",
                      "prompts: RealToxicityPrompts' JSON lines, comparison files (their contexts), lines of "
                      "{\"text\"}, or .txt with one a line", n=25, max_new=20, temperature=1.0, top_p=0.9)
    toxicity_of.add_argument(
        "--scorer", metavar="DIR",
        help="a binary preference model of ours, whose P(bad) is the toxicity, or hatesonar, if installed "
        "(default: Detoxify, if installed)")
    toxicity_of.add_argument("--prompts", type=positive, metavar="N", help="only the first N (default: all)")
    sampling = add("sample", sample, "continuations of contexts, for elo, re-ranking and people",
                   "comparison files, whose contexts are continued, or toy (default: toy)", "toy",
                   n=1, max_new=256, temperature=1.0, top_p=0.95)
    sampling.add_argument("--contexts", type=positive, metavar="N", help="only the first N (default: all)")
    reranking = add("rerank", best_of_k, "accuracy@k: is the best-scored of k samples right?",
                    "comparison files: the samples of a problem, 1 where right and 0 where wrong")
    reranking.add_argument("--k", type=positive, nargs="+", default=[1, 2, 4, 8, 16, 32, 64, 100],
                           help="accuracy@k for these k, up to the number of samples (default: 1 2 4 … 100)")
    for benchmark in (preference, reranking):
        benchmark.add_argument(
            "--split", choices=("auto", "held_out", "all"), default="auto",
            help="which groups: held_out, all, or auto, which takes the held-out ones of files that the "
            "model was trained on and all of others (default: auto)")
        benchmark.add_argument(
            "--ensemble", nargs="+", default=[], metavar="DIR",
            help="more preference models: score by the mean and by the least of all rewards, too")
    rating = add("elo", ratings, "ratings of models from A/B games, or from a preference model as judge")
    rating.add_argument("--games", metavar="FILE",
                        help="outcomes in a table, csv or JSON lines: model_a, model_b, winner")
    rating.add_argument("--judge", metavar="DIR", help="or: a preference model that judges --samples")
    rating.add_argument("--samples", nargs="+", metavar="FILE",
                        help="for --judge: a file of each player, as `evaluate.py sample --out` writes it")
    rating.add_argument("--names", nargs="+",
                        help="names of the players, like --samples (default: the files' names)")
    rating.add_argument("--seed", type=plan.between(int, 0, 2**32), default=0,
                        help="decides the resampling for the intervals (default: %(default)s)")
    return parser.parse_args()


def main():
    args = parse_args()
    if args.out:
        check_writable(args.out)  # before an hour of scoring, not after it
        flags = [value for name, value in vars(args).items() if name != "out"]
        words = [word for value in flags for word in (value if isinstance(value, list) else [value])]
        refuse_overwriting(args.out, [word for word in words if isinstance(word, str) and Path(word).exists()])
    elif args.benchmark == "sample":
        raise InputError("--out is missing: sample writes its samples to that file")
    with contextlib.redirect_stdout(LastingOutput()):
        figures, items = args.function(args)
    if args.out:
        write_file(args.out, "".join(json.dumps(item) + "\n" for item in items))
        print(f"\n  each item: {args.out}")
    print(json.dumps(figures), flush=True)


class LastingOutput(io.TextIOBase):
    """Standard output that may be closed early, as by `| head`: --out is written all the same."""

    def write(self, text):
        with contextlib.suppress(BrokenPipeError):
            sys.__stdout__.write(text)


# ------------------------------------------------------------------------------------------------------------
# The benchmarks: each prints a table and returns (figures for the JSON line, items for --out)


def preference_accuracy(args):
    """Accuracy on comparisons (Sections 3 and 4), beside what simple rulers reach: longer wins, shorter wins,
    and the same model without the context. Also the calibration of P(A > B) = sigmoid(r_A - r_B), and
    accuracy by margin."""
    return preferences.accuracy(args, load_subject(args))


def multiple_choice(args):
    """How often the right choice has the highest score (Section 2): by mutual information, which is
    log P(answer | question) - log P(answer), by mean and sum of log-probs, or by reward; on hhh also by
    category. On truthfulqa this is MC1, the best answer against the incorrect ones, and beside it stands MC2,
    the share of probability that the correct answers have."""
    paths = toy.find_data(args.data, "hhh.jsonl") if args.benchmark == "hhh" else args.data
    return choices.multiple_choice(args.benchmark, paths, load_subject(args))


def last_word(args):
    """How often the last word of a text is what greedy decoding says, and the word's log-prob (Section 2)."""
    return choices.last_word(args.data, load_subject(args, checkpoint.load_lm))


def text_loss(args):
    """Loss on text, in nats a token and bits a byte; of files that the model was trained on, on the held-out
    documents."""
    return perplexity.text_loss(toy.find_data(args.data, "lm.jsonl"), load_subject(args, checkpoint.load_lm))


def code(args):
    """Functions that the model writes (of quixbugs: mends) are run with their tests in a sandbox (Section 2).
    pass@k is the chance that one of k samples passes: 1 - C(n - c, k) / C(n, k) if c of n samples pass, which
    is unbiased."""
    if max(args.k) > args.n:
        raise InputError(f"--k {max(args.k)} is more than --n {args.n} samples; give more, or a smaller --k")
    return programs.pass_rates(args, load_subject(args, checkpoint.load_lm))


def toxic(args):
    """A classifier scores n continuations of each prompt: their mean, the share above 0.5, and the expected
    maximum of n (Section 2)."""
    score = toxicity.scorer(args)
    return toxicity.toxicity(args, find_files(args.data), load_subject(args, checkpoint.load_lm), score)


def sample(args):
    """Draws n continuations of each context, and writes them as comparisons whose scores are 0: for elo,
    re-ranking and people."""
    subject = load_subject(args, checkpoint.load_lm)
    # Any comparison file, of which only the contexts are used; of a toy world the questions of its hhh.jsonl.
    records, _ = choices.read_items("choice", toy.find_data(args.data, "hhh.jsonl"))
    contexts = list(dict.fromkeys(record["context"] for record in records))[:args.contexts]  # each once
    drawn = samples(subject, contexts, args, unit="context")
    items = [{"context": context, "completions": texts, "scores": [0] * len(texts), "group": context}
             for context, texts in zip(contexts, drawn)]
    lengths = [len(text) for texts in drawn for text in texts]
    print(f"{len(lengths):,} samples for {len(items):,} contexts, {np.mean(lengths):.0f} characters on "
          f"average; the first one:\n{contexts[0]}{drawn[0][0]}")
    figures = {"benchmark": "sample", "model": args.model, "contexts": len(items), "samples": len(lengths)}
    return figures, items


def best_of_k(args):
    """accuracy@k: how often the best-scored of k samples of a problem is right, by the paper's unbiased
    estimator (Section 3), for rewards or a language model's mean log-prob, beside chance and the best
    possible."""
    return rerank.accuracy_by_k(args, load_subject(args))


def ratings(args):
    """Elo ratings of models from A/B games, by maximum likelihood; ties are left out. The intervals are by
    bootstrap (Section 2). A preference model that judges makes a game of each context that two players
    continued: A wins with P(A > B) = sigmoid(r_A - r_B), so that one unit of reward is 400 / ln 10 = 174 Elo.
    """
    contexts = None
    if bool(args.games) == bool(args.judge) or (args.judge and not args.samples):
        raise InputError("give either --games FILE, or --judge DIR with --samples FILE FILE …")
    if args.games:
        games = elo.read_games(args.games)
    else:
        names = args.names or [Path(path).name.split(".jsonl")[0] for path in args.samples]
        if len(names) < 2 or not len(set(names)) == len(names) == len(args.samples):
            raise InputError("--samples needs at least two files, each with a name of its own, found "
                             f"{', '.join(names)}")
        rewards, _ = reward_function(args.judge, args)
        games, contexts = elo.judged_games(rewards, dict(zip(names, args.samples)))
    items = [{"model_a": a, "model_b": b, "winner": winner} for a, b, winner in games]
    for item, context in zip(items, contexts or []):
        item["context"] = context
    return {"benchmark": "elo", **elo.report(games, args.seed, contexts)}, items


if __name__ == "__main__":
    run_main(main)
