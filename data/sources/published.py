"""Small published sets as comparisons: HH-RLHF, Learn to Summarize, HellaSwag, any file of prompted pairs.

Each function reads the files of one split and yields comparisons {"context", "completions", "scores",
"group"}. Broken records are counted. The group keeps near-copies of a text together, so that they are
either all trained on or all held out.
"""
from data.comparisons import hash64, parse
from data.errors import InputError
from data.sources.count import LeftOut, converted_records

TURNS = {"system": "", "user": "\n\nHuman: ", "assistant": "\n\nAssistant: "}
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


def hh(paths, args, count):
    """HH-RLHF: {"chosen", "rejected"}, two dialogues. What they share, up to an Assistant's turn, is the
    context. The group is what stands before the first reply, as the turns of one dialogue are several records.
    """
    def convert(record):
        if "prompt" in record:
            raise ValueError('it has a "prompt", unlike HH-RLHF; data.prepare pairs reads such records')
        return _pair(record, ("chosen", "rejected"))
    return converted_records(paths, count, convert)


def pairs(paths, args, count):
    """Any file of {"prompt", "chosen", "rejected"}. The group is the record's "group", or else the prompt.

    Records whose "score_chosen" is not above their "score_rejected" prefer neither, and are left out.

    All three may be lists of chat messages, {"role", "content"}, and the prompt may be the first ones of both
    lists. Their context ends with the last turn of the user that both have in common, and the group is what
    stands before the first reply."""
    def convert(record):
        scores = [record.get(key) for key in ("score_chosen", "score_rejected")]
        if all(isinstance(score, (int, float)) for score in scores) and scores[0] <= scores[1]:
            raise LeftOut("pairs whose published scores prefer neither")
        if isinstance(record.get("chosen"), list):
            return _pair(_as_dialogues(record), ("chosen", "rejected"), "group")
        return _pair(record, ("prompt", "chosen", "rejected"), "group")
    return converted_records(paths, count, convert)


def _as_dialogues(record):
    """A record whose chosen and rejected are lists of messages, as two whole dialogues."""
    before = record.get("prompt") or []
    if isinstance(before, str):  # beside whole conversations it only repeats their first message
        is_repeated = record["chosen"][0]["role"] != "assistant"
        before = [] if is_repeated else [{"role": "user", "content": before}]
    return record | {key: _dialogue([*before, *record[key]]) for key in ("chosen", "rejected")}


def _dialogue(messages):
    """The text of messages. What the system says stands before the first turn."""
    for number, message in enumerate(messages):
        if message["role"] not in TURNS or (message["role"] == "system" and number):
            raise ValueError(f"a message of {message['role']!r:.20} where a user's or an assistant's may stand")
    return "".join(TURNS[message["role"]] + message["content"] for message in messages)


def _pair(record, keys, *more_keys):
    if missing := [key for key in keys if not isinstance(record.get(key), str)]:
        raise ValueError(f'no text "{missing[0]}"')
    fields = {key: record[key] for key in (*keys, *more_keys) if key in record}
    return _comparison(*parse(fields, "this record"))


def _comparison(context, completions, scores, group):
    if completions[0] == completions[1]:
        raise LeftOut("pairs of two equal texts")
    return {"context": context, "completions": completions, "scores": scores, "group": group}


def summarize(paths, args, count):
    """Learn to Summarize: two summaries of an article (news) or post (Reddit), and which one people chose.

    The group is a hash of the text that was summarised, because each has many comparisons. Its id will not
    do: ids repeat in files from different sources. Raises InputError where records are of several published
    splits, which a field says, and --split does not choose one.
    """
    splits = set()

    def convert(record):
        splits.add(record.get("split"))
        if not args.split and len(splits) > 1:
            raise InputError(f"{paths[0]}: holds the splits {', '.join(sorted(map(str, splits)))}; choose one "
                             "of them by --split")
        if args.split and record.get("split") != args.split:
            raise LeftOut(f"records of other splits than {args.split}")
        return _summaries(record)
    return converted_records(paths, count, convert)


def add_split_flag(parser):
    parser.add_argument("--split", help='of the published batches: read the records with this "split" (train, '
                        "valid1 or valid2)")


def _summaries(record):
    info, choice = record["info"], record["choice"]
    article = (info.get("article") or info["post"]).strip()
    title = (info.get("title") or "").strip()
    completions = [" " + summary["text"].strip() for summary in record["summaries"]]
    if not article or len(completions) != 2 or type(choice) is not int or choice not in (0, 1):
        raise ValueError("not a comparison of two summaries of a text: "
                         f"{len(completions)} summaries, choice {choice!r:.20}")
    context = f"{title}\n\n{article}\n\nTL;DR:" if title else f"{article}\n\nTL;DR:"
    return _comparison(context, completions, [1 - choice, choice], f"{hash64(article):016x}")


def hellaswag(paths, args, count):
    """HellaSwag: endings of a text, of which one is true. The group is the activity that the text is about,
    because the published split goes by it."""
    return converted_records(paths, count, _endings)


def _endings(record):
    context, endings, label, group = (record[key] for key in ("ctx", "endings", "label", "activity_label"))
    if not isinstance(context, str) or not isinstance(group, str) or not isinstance(endings, list):
        raise ValueError("not a HellaSwag record: ctx and activity_label must be texts, endings a list")
    if len(endings) < 2 or label not in range(len(endings)):
        raise ValueError(f"label {label!r:.20} of {len(endings)} endings")
    return {"context": context, "completions": [" " + ending for ending in endings],
            "scores": [int(i == label) for i in range(len(endings))], "group": group}
