"""Multiple choice (Section 2 of the paper): HHH, TruthfulQA, HellaSwag, LAMBADA and any comparison file.

A language model's score of an answer a to a question q is one of

  mi      log P(a | q) - log P(a), the empirical mutual information (the paper's); P(a) is the answer's
          probability without a question: after the same prompt and an empty turn of the human, or, if the
          contexts are no dialogues, at the beginning of a document
  mean    log P(a | q) per token
  sum     log P(a | q)
  norm    log P(a | q) per character (HellaSwag only)

and a preference model's is its reward. The model reads all choices twice, with and without their questions;
every rule is computed from these two.
"""
import contextlib
import re
from pathlib import Path

import numpy as np
import torch

from data.comparisons import parse
from data.errors import InputError
from data.files import decode, fields, find_files, load_json, read_lines, read_records
from data.text import refuse_special
from evals import pm
from evals.tables import csv_records

HHH_ITEMS = Path(__file__).parents[1] / "data" / "hhh_items.jsonl"
RULES = {"mi": "mutual information", "mean": "mean log-prob", "sum": "sum log-prob",
         "norm": "log-prob a character", "reward": "reward"}
HARNESS = {  # benchmark: task of lm-evaluation-harness, {its name of a figure: ours}
    "hellaswag": ("hellaswag", {"acc": "accuracy_sum", "acc_norm": "accuracy_norm"}),
    "lambada": ("lambada_openai", {"acc": "accuracy", "perplexity": "perplexity"})}


# ------------------------------------------------------------------------------------------------------------
# Published records -> comparisons


def as_dialogue(question):
    return "\n\nHuman: " + question + "\n\nAssistant:"


# Each function takes a record and its place, "file:line", and raises InputError for a record of another form.


def choice(record, where):
    """Comparisons are taken as they are; they may have a category."""
    fields(record, where, {"category": (str, None)})
    return record


def hhh(record, where):
    """BIG-bench's examples, {"input", "target_scores": {answer: 0 or 1}}. A question may stand in several, so
    it is the group. Comparisons, such as our own items, are taken as they are."""
    if "target_scores" not in record:
        return choice(record, where)
    question, answers, category = fields(
        record, where, {"input": str, "target_scores": dict, "category": (str, None)})
    return {"context": as_dialogue(question), "completions": [" " + answer for answer in answers],
            "scores": list(answers.values()), "group": question, "category": category}


def truthfulqa(row, where):
    """Rows of TruthfulQA.csv. The best answer scores 2, other correct ones 1, incorrect ones 0."""
    question, best, correct, incorrect = fields(
        row, where, {"Question": str, "Best Answer": str, "Correct Answers": str, "Incorrect Answers": str})
    scores = {}
    for answers, score in ((incorrect, 0), (correct, 1)):
        scores |= {closed(answer): score for answer in answers.split(";") if answer.strip()}
    scores |= {closed(best): 2}
    return {"context": as_dialogue(question), "completions": [" " + answer for answer in scores],
            "scores": list(scores.values()), "group": question}


def closed(answer):
    """An answer with a period at its end, as TruthfulQA's own code has it: a few stand so in the file."""
    return answer.strip().removesuffix(".") + "."


def hellaswag(record, where):
    """Asked as lm-evaluation-harness asks: the activity, then the text with a capital letter where its second
    part begins, and without the headings in brackets."""
    def without_headings(text):
        text = text.strip().replace(" [title]", ". ")  # an open bracket is searched for its end only once:
        text = re.sub(r"\[[^\]\n]*(\]?)", lambda heading: "" if heading[1] else heading[0], text)
        return text.replace("  ", " ")

    parts = ("ctx_a", "ctx_b") if "ctx_a" in record else ("ctx",)
    kinds = {"activity_label": str, "endings": [str], "label": (int, str)} | dict.fromkeys(parts, str)
    activity, endings, label, text, *second = fields(record, where, kinds)
    if str(label) not in map(str, range(len(endings))):
        raise InputError(f"{where}: the label {str(label)[:20]} is no number of one of the {len(endings)} "
                         "endings")
    text = " ".join([text, *(part.capitalize() for part in second)])
    return {"context": without_headings(activity + ": " + text),
            "completions": [" " + without_headings(ending) for ending in endings],
            "scores": [int(str(i) == str(label)) for i in range(len(endings))], "group": activity}


def lambada(record, where):
    """The last word is to be told from the text before it."""
    before, _, word = fields(record, where, {"text": str})[0].strip().rpartition(" ")
    if not before:
        raise InputError(f'{where}: the "text" must have several words')
    return {"context": before, "completions": [" " + word], "scores": [1]}


FORMS = {"hhh": hhh, "hellaswag": hellaswag, "truthfulqa": truthfulqa, "lambada": lambada, "choice": choice}


def read_items(benchmark, files):
    """(items, lines): {"context", "completions", "scores", "group", "category"} for each record of a
    benchmark's files, and the numbers (C, 2) of its file and line. Raises InputError with file and line."""
    items, lines = [], []
    for file_number, path in enumerate(files):
        for number, record in _read_records(benchmark, path):
            where = f"{path}:{number}"
            record = FORMS[benchmark](record, where)
            context, completions, scores, group = parse(record, where)
            refuse_special(where, context, *completions)
            items.append({"context": context, "completions": completions, "scores": scores, "group": group,
                          "category": record.get("category")})
            lines.append((file_number, number))
    if not items:
        raise InputError(f"{files[0]}: no records in this file")
    return items, np.array(lines)


def _read_records(benchmark, path):
    """(number, record) of a table's rows, of JSON lines, or of the examples in BIG-bench's task.json, whose
    folder's name is their category."""
    if ".csv" in Path(path).suffixes:
        return csv_records(path)
    task = None
    if benchmark == "hhh":
        with contextlib.suppress(ValueError):  # JSON lines, or broken: the line will be named
            task = load_json(decode(b"\n".join(line for _, line in read_lines(path)), path))
    if not isinstance(task, dict) or "examples" not in task:
        return read_records(path)
    examples, = fields(task, path, {"examples": [dict]})
    category = {"category": Path(path).parent.name}
    return [(number, example | category) for number, example in enumerate(examples, 1)]


def load_items(benchmark, paths, subject):
    """(items, tokenised Comparisons, numbers of those that fit the model) of a benchmark's files."""
    files = find_files(paths, (".csv",))
    items, lines = read_items(benchmark, files)
    if subject.prompt and benchmark in ("hellaswag", "lambada"):  # a prompt ends where a turn begins
        items = [item | {"context": "\n\nHuman: " + item["context"]} for item in items]
    ids = subject.tokenizer.encode_many(
        text for item in items for text in subject.tokenizer.parts(item["context"], item["completions"]))
    texts = [[next(ids) for _ in ("context", *item["completions"])] for item in items]
    data = pm.tokenised_comparisons(texts, files, lines)
    has_best = np.array([benchmark == "lambada" or len(set(item["scores"])) > 1 for item in items])
    if not has_best.all():
        print(f"left out: {(~has_best).sum()} items whose choices all have the same score")
    return items, data, pm.examples_to_score(data, subject.ctx, has_best)


# ------------------------------------------------------------------------------------------------------------
# Which choice is right


def hit(truth, score):
    """1 if the highest score is at a choice that is truly the best, else 0; a share where choices tie."""
    top = score == score.max()
    return (top & (truth == truth.max())).sum() / top.sum()


def first_choice(truth, score):
    """TruthfulQA's MC1: `hit`, for the best answer (2) among the incorrect ones (0)."""
    return hit(truth[truth != 1], score[truth != 1])


def mass(truth, score):
    """TruthfulQA's MC2: the share of the correct answers in the softmax of the scores over all choices."""
    p = np.exp(score - score.max())
    return p[truth > 0].sum() / p.sum()


def multiple_choice(benchmark, paths, subject):
    """Print a benchmark's table. Returns (figures for JSON, a dict for each item)."""
    all_items, data, examples = load_items(benchmark, paths, subject)
    items = [{"item": int(i), **all_items[i]} for i in examples]
    scores, rulers = score_choices(benchmark, subject, items, data, examples)
    columns = scores | rulers
    truths = [np.asarray(item["scores"], float) for item in items]
    groups = np.array([item["group"] for item in items])
    categories = np.array([item["category"] or "" for item in items])
    measures = {"MC1": first_choice, "MC2": mass} if benchmark == "truthfulqa" else {"accuracy": hit}
    chance = {name: float(np.mean([measure(truth, 0 * truth) for truth in truths]))
              for name, measure in measures.items()}
    figures = {"benchmark": benchmark, "model": subject.name, "n": len(examples),
               "groups": len(set(groups)), "chance": chance}

    print(f"\n{len(items):,} items, {figures['groups']:,} groups; % right ± standard error by group; chance "
          f"{', '.join(f'{100 * value:.1f}' for value in chance.values())}\n")
    print(" " * 22 + "".join(f"{RULES.get(name, name):>21}" for name in columns))
    for measure_name, measure in measures.items():
        values = {name: np.array([measure(truth, score) for truth, score in zip(truths, column)])
                  for name, column in columns.items()}
        for category in [*sorted(set(categories) - {""}), "all"]:
            inside = (categories == category) | (category == "all")
            is_part = category != "all"
            row = f"{measure_name}, {category}" if is_part or len(set(categories)) > 1 else measure_name
            cells = f"  {row:<20}"
            for name in columns:
                mean, error = pm.mean_and_error(values[name][inside], np.ones(inside.sum()), groups[inside])
                cells += f"{100 * mean:12.2f} ± {100 * error:5.2f} "
                key = f"{measure_name}_{name}".replace(" ", "_") + (f"_{category}" if is_part else "")
                figures |= pm.figure(key, mean, error)
            print(cells)
    figures["ties"] = sum(int((score == score.max()).sum() > 1) for score in next(iter(scores.values())))
    print(f"  ({figures['ties']} items whose best choices tie, each counting by its share)")
    figures |= harness_figures(benchmark, subject, figures)
    for name, column in scores.items():
        for item, score in zip(items, column):
            item[name] = score.tolist()
    return figures, items


def score_choices(benchmark, subject, items, data, examples):
    """({rule: scores}, {ruler: scores}): the scores of each item's choices by every rule, and by rulers that
    a model should beat. `examples` are the items' numbers in `data`."""
    are_dialogues = {item["context"].endswith("\n\nAssistant:") for item in items}
    if len(are_dialogues) > 1:
        raise InputError(f"{data.files[0]}: some contexts end with an Assistant's turn and some do not, so "
                         "that the probability of an answer by itself would mean two things; split the file")
    question = subject.tokenizer.encode("\n\nHuman:\n\nAssistant:")
    nothing_asked = question if are_dialogues.pop() else [subject.tokenizer.eot]
    rule = "reward" if subject.is_pm else "sum"
    given = subject.score(data, examples, rule, progress="scoring")
    alone = subject.score(data, examples, rule, context_ids=nothing_asked, progress="without context")
    chars = [np.array([float(len(text)) for text in item["completions"]]) for item in items]
    rulers = {"no context": alone, "longest": chars, "shortest": [-lengths for lengths in chars]}
    if subject.is_pm:
        return {"reward": given}, rulers
    tokens = [np.maximum(data.lengths(i)[1:], 1) for i in examples]
    scores = {"mi": [g - a for g, a in zip(given, alone)], "mean": [g / n for g, n in zip(given, tokens)],
              "sum": given}
    if benchmark == "hellaswag":  # an ending begins with a space, which does not count
        scores["norm"] = [g / np.maximum(lengths - 1, 1) for g, lengths in zip(given, chars)]
    return scores, rulers


def last_word(paths, subject):
    """LAMBADA: how often the last word is what greedy decoding says, and its log-prob. Returns as
    `multiple_choice`."""
    items, data, examples = load_items("lambada", paths, subject)
    scores = np.concatenate(subject.score(data, examples, word_scores, progress="scoring"))
    each, ones = np.arange(len(examples)), np.ones(len(examples))
    accuracy, accuracy_error = pm.mean_and_error(scores[:, 1], ones, each)
    log_prob, error = pm.mean_and_error(scores[:, 0], ones, each)
    figures = {"benchmark": "lambada", "model": subject.name, "n": len(examples),
               **pm.figure("accuracy", accuracy, accuracy_error), **pm.figure("log_prob", log_prob, error),
               "perplexity": float(np.exp(min(-log_prob, 700)))}
    print(f"\n{len(examples):,} texts\n\n"
          f"  accuracy            {100 * accuracy:6.2f} % ± {100 * accuracy_error:.2f}\n"
          f"  log-prob of a word  {log_prob:6.3f} nats ± {error:.3f} "
          f"(perplexity {figures['perplexity']:.1f})")
    figures |= harness_figures("lambada", subject, figures)
    return figures, [{"item": int(i), **items[i], "log_prob": float(log_p), "right": bool(is_right)}
                     for i, (log_p, is_right) in zip(examples, scores)]


def word_scores(model, hidden, row):
    """(K, 2): a completion's log-prob, and 1 if each of its tokens is the likeliest one, else 0."""
    states, targets = hidden.index_select(0, row.source), row.tokens.index_select(0, row.target)
    likeliest = torch.cat([model.logits(part).argmax(-1) for part in states.split(1024)])
    misses = torch.zeros(len(row.ends), device=hidden.device)
    misses.index_add_(0, row.predicted, (likeliest != targets).float())
    return torch.stack([pm.completion_scores(model, hidden, row, "sum"), (misses == 0).float()], 1)


def harness_figures(benchmark, subject, figures):
    """Print which figures lm-evaluation-harness reports, too. Returns {"harness": {task: {its name:
    figure}}}, or {} if its tasks ask otherwise. tests/compare_lm_eval.py compares them."""
    if benchmark == "truthfulqa" and not subject.is_pm:
        print("  lm-evaluation-harness: MC1 and MC2 by sum log-prob are the measures of truthfulqa_mc1 and\n"
              "  truthfulqa_mc2, but these ask after six examples (Q: … A: …), so that their figures differ")
    if benchmark not in HARNESS or subject.is_pm or subject.prompt:
        return {}
    task, names = HARNESS[benchmark]
    named = {name: figures[key] for name, key in names.items()}
    print(f"  lm-evaluation-harness: {task} has " + ", ".join(
        f"{name} = {value:.4f} (our {names[name]})" for name, value in named.items()))
    return {"harness": {task: named}}
