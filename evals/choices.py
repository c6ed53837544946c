"""Multiple choice (Section 2 of the paper): HHH, TruthfulQA, HellaSwag, LAMBADA and any comparison file.

A language model's score of an answer a to a question q is one of
  mi     log P(a | q) - log P(a), the empirical mutual information (the paper's); P(a) is taken behind the same prompt and an
         empty question, or, where contexts are no dialogues, at a document's beginning
  mean   log P(a | q) per token
  sum    log P(a | q)
and a preference model's its reward. Everything is scored in two passes over packed rows, whatever the number of rules.
"""
import csv
import io
import json
import re
from pathlib import Path

import numpy as np
import torch

from data.comparisons import load_comparisons, parse
from data.errors import InputError
from data.files import build_once, content_key, find_files, read_lines, read_records, write_file
from data.text import find_special
from evals import pm

HHH_ITEMS = Path(__file__).parents[1] / "data" / "hhh_items.jsonl"
RULES = {"mi": "mutual information", "mean": "mean log-prob", "sum": "sum log-prob", "reward": "reward"}


# ---------------------------------------------------------------------------------------------------------------------
# Published files -> comparisons


def question(text):
    return f"\n\nHuman: {text}\n\nAssistant:"


def hhh(path):
    """BIG-bench's task.json {"examples": [{"input", "target_scores": {answer: 0 or 1}}]}, category from its folder's name, or
    comparison lines with a "category", such as our own items."""
    text = b"\n".join(line for _, line in read_lines(path))
    try:
        task = json.loads(text)
    except ValueError:
        task = None
    if not isinstance(task, dict) or "examples" not in task:
        yield from comparisons(path)
        return
    for number, example in enumerate(task["examples"], 1):
        try:
            answers = example["target_scores"]
            yield {"context": question(example["input"]), "completions": [" " + a for a in answers], "scores": [float(s) for s in answers.values()],
                   "group": f"{path}:{number}", "category": Path(path).parent.name}
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise InputError(f"{path}: example {number} is not {{input, target_scores}}: {error!r}") from None


def truthfulqa(path):
    """The published csv. Scores: 2 the best answer, 1 other correct ones, 0 incorrect ones. Group: the question."""
    text = "\n".join(line.decode("utf-8-sig", "replace") for _, line in read_lines(path))
    rows = csv.DictReader(io.StringIO(text), strict=True)
    try:
        numbered = list(enumerate(rows, 2))
    except csv.Error as error:
        raise InputError(f"{path}:{rows.line_num}: not a line of a comma-separated table ({error})") from None
    for number, row in numbered:
        try:
            best, correct, incorrect = (row[name].strip() for name in ("Best Answer", "Correct Answers", "Incorrect Answers"))
            asked = row["Question"]
        except (KeyError, AttributeError, TypeError):
            raise InputError(f"{path}:{number}: not a TruthfulQA row (Question, Best Answer, Correct Answers, Incorrect Answers)") from None
        split = lambda answers: [a.strip() for a in answers.split(";") if a.strip()]
        answers = {a: 0 for a in split(incorrect)} | {a: 1 for a in split(correct)} | {best: 2}
        yield {"context": question(asked), "completions": [" " + a for a in answers], "scores": list(answers.values()), "group": asked}


def hellaswag(path):
    """Asked as lm-evaluation-harness does: the activity, the text with its second part capitalised, bracketed headers out."""
    def clean(text):
        text = re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". "))
        return text.replace("  ", " ")
    for number, record in read_records(path):
        try:
            parts = f"{record['ctx_a']} {record['ctx_b'].capitalize()}" if "ctx_a" in record else record["ctx"]
            yield {"context": clean(f"{record['activity_label']}: {parts}"), "completions": [" " + clean(e) for e in record["endings"]],
                   "scores": [int(i == int(record["label"])) for i in range(len(record["endings"]))], "group": record["activity_label"]}
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise InputError(f"{path}:{number}: not a HellaSwag record (ctx, endings, label, activity_label): {error!r}") from None


def lambada(path):
    """{"text"} lines: the last word is to be told from all before it."""
    for number, record in read_records(path):
        text = record.get("text")
        if not isinstance(text, str) or " " not in text.strip():
            raise InputError(f'{path}:{number}: expected {{"text": "several words"}}')
        before, word = text.strip().rsplit(" ", 1)
        yield {"context": before, "completions": [" " + word], "scores": [1], "group": f"{path}:{number}"}


def comparisons(path):
    for number, record in read_records(path):
        context, completions, scores, group = parse(record, f"{path}:{number}")
        if special := next(filter(None, map(find_special, (context, *completions))), None):
            raise InputError(f"{path}:{number}: the text holds {special}, a special token; write it differently there")
        yield {"context": context, "completions": completions, "scores": scores, "group": group, "category": record.get("category")}


READERS = {"hhh": hhh, "truthfulqa": truthfulqa, "hellaswag": hellaswag, "lambada": lambada, "choice": comparisons}


def load(benchmark, paths, tokenizer, before=""):
    """(records, Comparisons) of a benchmark's published files; `before` is set before every context."""
    files = find_files(paths, (".csv",))

    def convert(folder):
        records = [record for path in files for record in READERS[benchmark](path)]
        if not records:
            raise InputError(f"{files[0]}: nothing to choose from in this file")
        write_file(folder / "items.jsonl", "".join(json.dumps(r | {"context": before + r["context"]}) + "\n" for r in records))
    folder = build_once(f"{benchmark}-{content_key(files, 'choices', before, [str(file) for file in files], Path(__file__).read_text())}", convert)
    path = folder / "items.jsonl"
    return [record for _, record in read_records(path)], load_comparisons([path], tokenizer, quiet=True)


# ---------------------------------------------------------------------------------------------------------------------
# Scoring


def fitting(subject, data):
    """Numbers of the items whose choices fit; says how many do not, and how many contexts are cut."""
    examples = np.flatnonzero(data.fits(subject.ctx))
    cut = sum(data.lengths(i)[0] + data.lengths(i)[1:].max() + 1 > subject.ctx for i in examples)
    if len(examples) < len(data) or cut:
        print(f"of {len(data):,} items {len(data) - len(examples)} are left out, as a choice exceeds the {subject.ctx} tokens there are; {cut} contexts are cut on the left")
    if not len(examples):
        raise InputError(f"{data.files[0]}: no item is left to score")
    return examples


def score(subject, records, data, examples):
    """({rule: [scores of each item's choices]}, {ruler: the same}) of the items numbered `examples`."""
    kinds = {records[i]["context"].endswith("\n\nAssistant:") for i in examples}
    if len(kinds) > 1:
        raise InputError("some contexts end with an Assistant's turn and some do not: their answers' probability by themselves would mean two things; split the file")
    is_dialogue = kinds.pop()
    empty = subject.tokenizer.encode("\n\nHuman:\n\nAssistant:") if is_dialogue else [subject.tokenizer.eot]
    rulers = {"longest": [np.array([len(c) for c in records[i]["completions"]], float) for i in examples]}
    rulers["shortest"] = [-x for x in rulers["longest"]]
    if subject.is_pm:
        return {"reward": subject.score(data, examples, "reward", progress="scoring")}, {
            "no context": subject.score(data, examples, "reward", context_ids=empty, progress="without context")} | rulers
    given, alone = (subject.score(data, examples, "sum", context_ids=context, progress=words) for context, words in ((None, "scoring"), (empty, "without context")))
    tokens = [np.maximum(data.lengths(i)[1:], 1) for i in examples]
    scores = {"mi": [g - a for g, a in zip(given, alone)], "mean": [g / n for g, n in zip(given, tokens)], "sum": given}
    return scores, {"no context": alone} | rulers


def hit(truth, score):
    """Whether the highest score is at a choice of the highest truth: 1, 0, or a share where choices tie."""
    top = score == score.max()
    return (top & (truth == truth.max())).sum() / top.sum()


def first_choice(truth, score):
    """TruthfulQA's MC1: the best answer (2) against the incorrect ones (0), as `hit`."""
    return hit(truth[truth != 1], score[truth != 1])


def mass(truth, score):
    """Softmax of the scores over the choices, summed over the true ones (TruthfulQA's MC2)."""
    p = np.exp(score - score.max())
    return p[truth > 0].sum() / p.sum()


def choices(benchmark, paths, subject):
    """Print a benchmark's table; returns (figures for JSON, one dict per item)."""
    before = "\n\nHuman: " if subject.prefix and benchmark == "hellaswag" else ""  # after a prompt a new conversation begins
    records, data = load(benchmark, paths, subject.tokenizer, before)
    examples = fitting(subject, data)
    scores, rulers = score(subject, records, data, examples)
    truths = [np.asarray(records[i]["scores"], float) for i in examples]
    if benchmark == "truthfulqa":
        parts = {"MC1": first_choice, "MC2": mass}
    else:
        parts = {"accuracy": hit}
    groups = np.array([records[i]["group"] for i in examples])
    categories = np.array([records[i].get("category") or "" for i in examples])
    figures = {"benchmark": benchmark, "model": subject.name, "n": len(examples), "groups": len(set(groups)),
               "chance": {part: float(np.mean([f(t, np.zeros(len(t))) for t in truths])) for part, f in parts.items()}}
    names = [*scores, *rulers]
    values = {(part, name): np.array([f(t, s) for t, s in zip(truths, (scores | rulers)[name])]) for part, f in parts.items() for name in names}
    print(f"\n{len(examples):,} items, {figures['groups']:,} groups; % right ± standard error by group; chance {', '.join(f'{100 * c:.1f}' for c in figures['chance'].values())}\n")
    print(" " * 22 + "".join(f"{RULES.get(name, name):>21}" for name in names))
    for part in parts:
        for category in sorted(set(categories) - {""}) + ["all"]:
            inside = np.ones(len(examples), bool) if category == "all" else categories == category
            cells = {name: pm.mean_and_error(values[part, name][inside], np.ones(inside.sum()), groups[inside]) for name in names}
            label = f"{part}, {category}" if category != "all" or len(set(categories)) > 1 else part
            print(f"  {label:<20}" + "".join(f"{100 * mean:12.2f} ± {100 * error:5.2f} " for mean, error in cells.values()))
            for name, (mean, error) in cells.items():
                key = "_".join([part, name.replace(" ", "_")] + [category] * (category != "all"))
                figures |= pm.figure(key, mean, error)
    ties = sum((s == s.max()).sum() > 1 for s in next(iter(scores.values())))
    print(f"  ({ties} items whose best choices tie, each counting by its share)")
    items = [{"item": int(i), **records[i], **{name: scores[name][j].tolist() for name in scores}} for j, i in enumerate(examples)]
    return figures | {"ties": int(ties)}, items


def last_word(paths, subject):
    """LAMBADA: how often the last word is what greedy decoding says, and its log-prob. Returns as `choices`."""
    before = "\n\nHuman: " if subject.prefix else ""
    records, data = load("lambada", paths, subject.tokenizer, before)
    examples = fitting(subject, data)
    both = subject.score(data, examples, word_scores, progress="scoring")
    log_p, right = np.concatenate(both).T
    each = np.arange(len(examples))
    accuracy, error = pm.mean_and_error(right, np.ones(len(each)), each)
    mean, mean_error = pm.mean_and_error(log_p, np.ones(len(each)), each)
    print(f"\n{len(examples):,} texts\n\n"
          f"  accuracy            {100 * accuracy:6.2f} % ± {100 * error:.2f}\n"
          f"  log-prob of a word  {mean:6.3f} nats ± {mean_error:.3f} (perplexity {np.exp(min(-mean, 700)):.1f})")
    figures = {"benchmark": "lambada", "model": subject.name, "n": len(examples), **pm.figure("accuracy", accuracy, error),
               **pm.figure("log_prob", mean, mean_error)}
    return figures, [{"item": int(i), **records[i], "log_prob": p, "right": bool(r)} for i, p, r in zip(examples, log_p, right)]


def word_scores(model, hidden, row):
    """(sum of the log-probs of a completion's tokens, 1 if each is the likeliest one else 0): (K, 2)."""
    source, target, completion = row.source, row.target, row.predicted
    guess = torch.cat([model.logits(part).argmax(-1) for part in hidden[source].split(1024)])
    wrong = torch.zeros(len(row.ends), device=hidden.device).index_add_(0, completion, (guess != row.tokens[target]).float())
    return torch.stack([pm.completion_scores(model, hidden, row, "sum"), (wrong == 0).float()], 1)
