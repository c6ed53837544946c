"""Turn published files into comparison JSON lines.

  python -m data.prepare hellaswag --raw hellaswag_val.jsonl --out hellaswag.jsonl
  python -m data.prepare utilitarianism --raw util_train.csv --out utilitarianism.jsonl

Comparison files that are read as they are (HH-RLHF, {"prompt", "chosen", "rejected"}) need no preparing.
"""
import argparse
import csv
import io
import json
from pathlib import Path

from data.errors import InputError, run_main
from data.files import read_lines, read_records, write_file


def hellaswag(path):
    """HellaSwag's JSON lines: four endings of a text, one of them true. Group: the activity, which the published split goes by."""
    for number, record in read_records(path):
        try:
            scores = [int(i == record["label"]) for i in range(len(record["endings"]))]
            yield {"context": record["ctx"], "completions": [" " + ending for ending in record["endings"]], "scores": scores,
                   "group": record["activity_label"]}
        except (KeyError, TypeError) as error:
            raise InputError(f"{path}:{number}: not a HellaSwag record (ctx, endings, label, activity_label): {error!r}") from None


def utilitarianism(path):
    """ETHICS utilitarianism: rows of two scenarios without a header, the more pleasant one first. They have no context.

    A scenario may stand in several rows (rankings of three and more), so the group is all that hangs together by shared
    scenarios, named by its first one.
    """
    text = "\n".join(line.decode("utf-8", "replace") for _, line in read_lines(path))
    pairs = []
    for number, row in enumerate(csv.reader(io.StringIO(text)), 1):
        if len(row) != 2 or not all(cell.strip() for cell in row):
            raise InputError(f"{path}:{number}: expected two scenarios, found {len(row)} columns; is this util_train.csv or util_test.csv?")
        pairs.append([" ".join(cell.split()) for cell in row])
    leader = {}  # scenario -> an earlier scenario of its group, itself if it is the first

    def first_of(scenario):
        while (above := leader.setdefault(scenario, scenario)) != scenario:
            scenario = above
        return scenario

    for better, worse in pairs:
        leader[first_of(worse)] = first_of(better)
    for better, worse in pairs:
        yield {"context": "", "completions": [better, worse], "scores": [1, 0], "group": first_of(better)}


SOURCES = {"hellaswag": hellaswag, "utilitarianism": utilitarianism}


def main():
    parser = argparse.ArgumentParser(prog="python -m data.prepare", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=SOURCES, help="which published data set")
    parser.add_argument("--raw", required=True, type=Path, help="the published file, plain or compressed")
    parser.add_argument("--out", required=True, type=Path, help="comparison file to write (.jsonl)")
    args = parser.parse_args()
    records = [json.dumps(record, ensure_ascii=False) for record in SOURCES[args.name](args.raw)]
    write_file(args.out, "\n".join(records) + "\n")
    print(f"{args.out}: {len(records):,} comparisons")


if __name__ == "__main__":
    run_main(main)
