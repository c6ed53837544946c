"""Small published sets as comparisons: HH-RLHF, Learn to Summarize, HellaSwag, and any file of prompted
pairs.

Each function reads the files of one split and yields comparisons {"context", "completions", "scores",
"group"}. Broken records are counted. The group keeps near-copies of a text together, so that they are
either all trained on or all held out.
"""
from data.comparisons import hash64, parse
from data.errors import InputError
from data.files import parse_json, read_lines

HH_URL = "https://huggingface.co/datasets/Anthropic/hh-rlhf/resolve/main"
HH_PARTS = ("harmless-base", "helpful-base", "helpful-online", "helpful-rejection-sampled")
SUMMARIZE_URL = "https://openaipublic.blob.core.windows.net/summarize-from-feedback/dataset/comparisons"
HELLASWAG_URL = "https://raw.githubusercontent.com/rowanz/hellaswag/master/data"


def _urls(base, names):
    return {name: f"{base}/{name}" for name in names}


URLS = {  # set: {end of a file's path: where it is published}
    "hh": _urls(HH_URL, [f"{part}/{split}.jsonl.gz" for split in ("train", "test") for part in HH_PARTS]),
    "summarize": _urls(SUMMARIZE_URL, [f"batch{i}.json" for i in (*range(3, 21), 22)]),
    "hellaswag": _urls(HELLASWAG_URL, ["hellaswag_train.jsonl", "hellaswag_val.jsonl"]),
}


def json_records(paths, count):
    """Yield ("file:line", dict) for the lines of JSON-lines files. Broken lines are counted."""
    for path in paths:
        for number, line in read_lines(path, count.progress):
            if not line.strip():
                continue
            count.total += 1
            where = f"{path}:{number}"
            try:
                record = parse_json(path, number, line)
            except InputError as error:
                count.bad(where, str(error).removeprefix(f"{where}: "))
            else:
                yield where, record


def hh(paths, args, count):
    """HH-RLHF: two dialogues. What they share, up to an Assistant's turn, is the context and the group."""
    return _pairs(paths, count, ("chosen", "rejected"))


def pairs(paths, args, count):
    """Any file of {"prompt", "chosen", "rejected"}. The group is the record's "group", or else the prompt."""
    return _pairs(paths, count, ("prompt", "chosen", "rejected"))


def _pairs(paths, count, keys):
    for where, record in json_records(paths, count):
        if missing := [key for key in keys if not isinstance(record.get(key), str)]:
            count.bad(where, f'no text "{missing[0]}"')
            continue
        used = (*keys, "group") if "prompt" in keys else keys
        record = {key: record[key] for key in used if key in record}
        context, completions, scores, group = parse(record, where)
        if completions[0] == completions[1]:
            count.drop("pairs of two equal texts")
        else:
            yield {"context": context, "completions": completions, "scores": scores, "group": group}


def summarize(paths, args, count):
    """Learn to Summarize: two summaries of an article (news) or post (Reddit), and which one people chose.

    The group is a hash of the text that was summarised, because each has many comparisons. Its id will not
    do: ids repeat in files from different sources.
    """
    for where, record in json_records(paths, count):
        try:
            info, choice = record["info"], record["choice"]
            article = (info.get("article") or info["post"]).strip()
            title = (info.get("title") or "").strip()
            completions = [" " + summary["text"].strip() for summary in record["summaries"]]
            if not article or len(completions) != 2 or type(choice) is not int or choice not in (0, 1):
                raise ValueError(f"{len(completions)} summaries, choice {choice!r:.20}")
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            count.bad(where, "not a comparison of two summaries (info with article or post, summaries, "
                             f"choice): {error!r:.60}")
            continue
        if completions[0] == completions[1]:
            count.drop("pairs of two equal texts")
            continue
        text = f"{title}\n\n{article}" if title else article
        yield {"context": f"{text}\n\nTL;DR:", "completions": completions,
               "scores": [int(choice == 0), int(choice == 1)], "group": f"{hash64(article):016x}"}


def hellaswag(paths, args, count):
    """HellaSwag: endings of a text, of which one is true. The group is the activity that the text is about,
    because the published split goes by it."""
    for where, record in json_records(paths, count):
        try:
            context, group = record["ctx"], record["activity_label"]
            endings, label = record["endings"], record["label"]
            if not isinstance(context, str) or not isinstance(group, str) or not isinstance(endings, list):
                raise TypeError("a value of the wrong type")
            if len(endings) < 2 or label not in range(len(endings)):
                raise ValueError(f"label {label!r:.20}")
            completions = [" " + ending for ending in endings]
        except (KeyError, TypeError, ValueError) as error:
            count.bad(where, "not a HellaSwag record (ctx, endings, label, activity_label): "
                             f"{error!r:.60}")
            continue
        yield {"context": context, "completions": completions,
               "scores": [int(i == label) for i in range(len(endings))], "group": group}
