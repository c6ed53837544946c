"""Small published sets as comparisons: HH-RLHF, Learn to Summarize, HellaSwag, ETHICS, and any file of prompted pairs.

Each function reads files of one split, yields comparisons {"context", "completions", "scores", "group"} and counts broken
records. Groups keep near-copies of one text on the same side when a part of the groups is held out.
"""
import csv

from data.comparisons import hash64, parse
from data.errors import InputError
from data.files import parse_json, read_lines

HF, GITHUB = "https://huggingface.co/datasets", "https://raw.githubusercontent.com"
HH = [f"{part}/{split}.jsonl.gz" for split in ("train", "test") for part in
      ("harmless-base", "helpful-base", "helpful-online", "helpful-rejection-sampled")]
SUMMARIES = "https://openaipublic.blob.core.windows.net/summarize-from-feedback/dataset/comparisons"
ARCHIVE = {"ethics.tar": ("https://people.eecs.berkeley.edu/~hendrycks/ethics.tar", None, None)}
URLS = {  # set -> end of a file's path -> (URL, size, SHA-256), None where not known
    "hh": {tail: (f"{HF}/Anthropic/hh-rlhf/resolve/main/{tail}", None, None) for tail in HH},
    "summarize": {f"batch{i}.json": (f"{SUMMARIES}/batch{i}.json", None, None) for i in (*range(3, 21), 22)},
    "hellaswag": {f"hellaswag_{split}.jsonl": (f"{GITHUB}/rowanz/hellaswag/master/data/hellaswag_{split}.jsonl", None, None)
                  for split in ("train", "val")},
    "ethics": ARCHIVE, "utilitarianism": ARCHIVE,
}


def json_records(paths, args, count):
    """Yield ("file:line", dict) for the lines of JSON; broken ones are counted."""
    for path in paths:
        for number, line in read_lines(path, getattr(args, "progress", None)):
            if not line.strip():
                continue
            count.total += 1
            where = f"{path}:{number}"
            try:
                record = parse_json(path, number, line)
            except InputError as error:
                count.bad(where, str(error).removeprefix(f"{where}: "))
                continue
            yield where, record


def hh(paths, args, count):
    """HH-RLHF: two dialogues; what they share up to an Assistant's turn is the context, and the group."""
    return _pairs(paths, args, count, ("chosen", "rejected"))


def pairs(paths, args, count):
    """Any file of {"prompt", "chosen", "rejected"}; the prompt is the group, unless there is a "group"."""
    return _pairs(paths, args, count, ("prompt", "chosen", "rejected"))


def _pairs(paths, args, count, keys):
    for where, record in json_records(paths, args, count):
        if missing := [key for key in keys if not isinstance(record.get(key), str)]:
            count.bad(where, f'no text "{missing[0]}"')
            continue
        group = {"group": record["group"]} if "prompt" in keys and "group" in record else {}
        context, completions, scores, group = parse({**{key: record[key] for key in keys}, **group}, where)
        if completions[0] == completions[1]:
            count.drop("pairs of two equal texts")
            continue
        yield {"context": context, "completions": completions, "scores": scores, "group": group}


def summarize(paths, args, count):
    """Learn to Summarize: two summaries of an article (news) or post (Reddit), and which one people chose.

    Group: the text summarised, by its hash, as each has many comparisons; ids repeat in files from different sources.
    """
    for where, record in json_records(paths, args, count):
        try:
            info, choice = record["info"], record["choice"]
            article = (info.get("article") or info["post"]).strip()
            title = (info.get("title") or "").strip()
            completions = [" " + summary["text"].strip() for summary in record["summaries"]]
            if not article or len(completions) != 2 or type(choice) is not int or choice not in (0, 1):
                raise ValueError(f"{len(completions)} summaries, choice {choice!r:.20}")
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            count.bad(where, f"not a comparison of two summaries (info with article or post, summaries, choice): {error!r:.60}")
            continue
        if completions[0] == completions[1]:
            count.drop("pairs of two equal texts")
            continue
        yield {"context": (title + "\n\n" if title else "") + article + "\n\nTL;DR:", "completions": completions,
               "scores": [int(choice == 0), int(choice == 1)], "group": f"{hash64(article):016x}"}


def hellaswag(paths, args, count):
    """HellaSwag: endings of a text, one of them true. Group: the activity, which the published split goes by."""
    for where, record in json_records(paths, args, count):
        try:
            context, endings, label, group = (record[key] for key in ("ctx", "endings", "label", "activity_label"))
            if not isinstance(context, str) or not isinstance(group, str) or len(endings) < 2 or label not in range(len(endings)):
                raise ValueError(f"label {label!r:.20}")
            completions = [" " + ending for ending in endings]
        except (KeyError, TypeError, ValueError) as error:
            count.bad(where, f"not a HellaSwag record (ctx, endings, label, activity_label): {error!r:.60}")
            continue
        yield {"context": context, "completions": completions, "scores": [int(i == label) for i in range(len(endings))], "group": group}


# ---------------------------------------------------------------------------------------------------------------------
# ETHICS. Four sets have a yes-or-no label, cast as the paper has it (Section 5): for a context C with label A of {A, B}, the
# comparison C:A > C:B. A short question after the scenario makes C, and " Yes" and " No" are the two labels.

QUESTIONS = {"commonsense": "Is what I did wrong?", "deontology": "Is this reasonable?", "justice": "Is this reasonable?",
             "virtue": "Does this show the following trait: {}?"}


def ethics_flags(parser):
    parser.add_argument("--set", required=True, choices=(*QUESTIONS, "utilitarianism"), help="which of the five sets the files belong to")


def ethics(paths, args, count):
    """ETHICS: the set named by args.set."""
    if args.set == "utilitarianism":
        yield from utilitarianism(paths, args, count)
        return
    columns = {"commonsense": ("label", "input"), "deontology": ("label", "scenario", "excuse")}.get(args.set, ("label", "scenario"))
    group = before = ""
    for path in paths:
        rows = csv_rows(path, args, count)
        _, header = next(rows, (None, []))
        if not set(columns) <= set(header):
            raise InputError(f"{path}:1: no columns {', '.join(columns)}; is this a file of {args.set}? (found: {', '.join(header)[:80]})")
        where_in_row = [header.index(column) for column in columns]
        for where, row in rows:
            count.total += 1
            if len(row) != len(header) or row[where_in_row[0]] not in ("0", "1") or not all(row[i].strip() for i in where_in_row):
                count.bad(where, f"expected {', '.join(header)} with a label 0 or 1, found {len(row)} columns: {','.join(row)[:40]!r}")
                continue
            label, scenario, *excuse = (row[i].strip() for i in where_in_row)
            question = QUESTIONS[args.set]
            if args.set == "virtue":  # the rows of one scenario differ in the trait only
                scenario, _, trait = (part.strip() for part in scenario.partition("[SEP]"))
                if not trait:
                    count.bad(where, "expected a scenario, [SEP] and a trait")
                    continue
                group, question = scenario, question.format(trait)
            elif args.set == "deontology":  # the rows of one scenario differ in the excuse only
                group, scenario = scenario, f"{scenario} {excuse[0]}"
            elif not alike(before, scenario):
                # Commonsense and justice: neighbouring rows are a text with some words changed. A group is a run of them,
                # named by its first. Their long texts are alone.
                group = scenario
            before = scenario
            yield {"context": f"{scenario}\n\n{question}", "completions": [" Yes", " No"], "scores": [int(label), 1 - int(label)], "group": group}


def alike(a, b):
    """Whether two texts are one with some words changed: what they share at both ends is at least 0.4 of the shorter one.

    In the published files this share is below 0.3 or above 0.45 for nearly all neighbours.
    """
    a, b = a.lower().split(), b.lower().split()
    shorter = min(len(a), len(b))
    start = next((i for i in range(shorter) if a[i] != b[i]), shorter)
    end = next((i for i in range(shorter - start) if a[-1 - i] != b[-1 - i]), shorter - start)
    return start + end >= max(1, 0.4 * shorter)


def utilitarianism(paths, args, count):
    """ETHICS utilitarianism: rows of two scenarios without a header, the more pleasant one first. They have no context.

    A scenario may stand in several rows (rankings of three and more), so the group is all that hangs together by shared
    scenarios, named by its first one.
    """
    scenarios = []
    for path in paths:
        for where, row in csv_rows(path, args, count):
            count.total += 1
            if len(row) != 2 or not all(cell.strip() for cell in row):
                count.bad(where, f"expected two scenarios, found {len(row)} columns; is this util_train.csv or util_test.csv?")
                continue
            scenarios.append([" ".join(cell.split()) for cell in row])
    leader = {}  # scenario -> an earlier scenario of its group, itself if it is the first

    def first_of(scenario):
        while (above := leader.setdefault(scenario, scenario)) != scenario:
            scenario = above
        return scenario

    for better, worse in scenarios:
        leader[first_of(worse)] = first_of(better)
    for better, worse in scenarios:
        yield {"context": "", "completions": [better, worse], "scores": [1, 0], "group": first_of(better)}


def csv_rows(path, args, count):
    """Yield ("file:line", cells) for the rows of a csv file. A row with bytes that are not UTF-8 is counted as broken."""
    if path.suffix == ".tar":
        raise InputError(f"{path}: this is the whole archive; unpack it (tar xf {path}) and name a split as --raw, like ethics/justice/justice_train.csv")
    lines = (line.decode("utf-8-sig" if number == 1 else "utf-8", "surrogateescape") + "\n"
             for number, line in read_lines(path, getattr(args, "progress", None)))
    rows = csv.reader(lines)
    first = 1
    try:
        for row in rows:
            where, first = f"{path}:{first}", rows.line_num + 1
            if any("\udc80" <= letter <= "\udcff" for cell in row if not cell.isascii() for letter in cell):
                count.total += 1
                count.bad(where, "not UTF-8 text")
            elif row:
                yield where, row
    except csv.Error as error:
        raise InputError(f"{path}:{first}: not a csv file ({error})") from None
