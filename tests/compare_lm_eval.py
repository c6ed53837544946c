"""Are our scores of HellaSwag and LAMBADA those of lm-evaluation-harness? A script, not a test.

  pip install lm-eval transformers accelerate
  python tests/compare_lm_eval.py --model out/lm --data DATA --limit 200

DATA holds hellaswag/hellaswag_val.jsonl and lambada/lambada_test.jsonl (plain or packed). The harness asks by its own task
definitions, hellaswag and lambada_openai, and computes with the checkpoint as transformers loads it, in fp32; only the tokens are
ours. Exits with 1 where log-probs of an item differ by more than 1e-3 nats, or the two do not agree on what greedy decoding says. A context that is too long for the model is cut differently: we leave room for <eoc>.
"""
import argparse
import json
import os
import subprocess
import sys
import tempfile
from itertools import islice
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import checkpoint
from data.errors import InputError, run_main
from data.files import find_files, read_records, write_file

TOLERANCE = 1e-3  # nats


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="checkpoint folder of a language model")
    parser.add_argument("--data", required=True, type=Path, help="folder with hellaswag/ and lambada/")
    parser.add_argument("--limit", type=int, help="only the first so many items of each (default: all)")
    args = parser.parse_args()
    model, differs = checkpoint.find(args.model), False
    with tempfile.TemporaryDirectory() as folder:
        os.environ |= {"HF_HUB_OFFLINE": "1", "HF_HOME": folder}  # read when these packages are imported
        harness = harness_model(model)
        for benchmark, task, split, prepare in (("hellaswag", "hellaswag", "validation", published), ("lambada", "lambada_openai", "test", dict)):
            records = list(islice((r for path in find_files([args.data / benchmark]) for _, r in read_records(path)), args.limit))
            ours = our_scores(benchmark, args.model, write_lines(f"{folder}/{benchmark}.jsonl", records), f"{folder}/scores.jsonl")
            data = write_lines(f"{folder}/{task}.theirs.jsonl", map(prepare, records))
            theirs = harness_scores(harness, task, f"{benchmark}/{task}.yaml", split, data)
            differs |= compare(task, ours, theirs)
    sys.exit(differs)


def published(record):
    """A HellaSwag record with the context in two parts, as it is published and the harness expects it."""
    return {"ctx_a": record["ctx"], "ctx_b": ""} | record


def write_lines(path, records):
    Path(path).write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def our_scores(benchmark, model, data, out):
    """{number of the item: [(log-prob, whether greedy decoding says it, None where we do not ask)] of its choices}."""
    subprocess.run([sys.executable, "evaluate.py", benchmark, "--model", Path(model).resolve(), "--data", data, "--dtype", "fp32", "--out", out],
                   cwd=ROOT, check=True)
    items = [json.loads(line) for line in Path(out).read_text().splitlines()]
    return {item["item"]: [(item["log_prob"], item["right"])] if benchmark == "lambada" else [(x, None) for x in item["sum"]] for item in items}


def harness_model(folder):
    """The checkpoint as the harness's own kind of model. Its texts become tokens by our tokenizer, which the folder holds."""
    try:
        import tokenizers
        import transformers
        from lm_eval.models.huggingface import HFLM
    except ImportError as error:
        raise InputError(f"{error}; pip install lm-eval transformers accelerate") from None
    _, tokenizer, _ = checkpoint.load_lm(folder)

    class Harness(HFLM):
        def tok_encode(self, string, **_):
            return tokenizer.encode(string).tolist()
    specials = tokenizers.Tokenizer(tokenizers.models.WordLevel({"<eot>": tokenizer.eot}, "<eot>"))
    specials = transformers.PreTrainedTokenizerFast(tokenizer_object=specials, eos_token="<eot>", pad_token="<eot>")
    return Harness(str(folder), tokenizer=specials, dtype="float32", device="cpu", batch_size=8)


def harness_scores(model, task, yaml, split, data):
    """As our_scores, from the harness: its task with nothing changed but where the data lie."""
    import lm_eval.tasks
    local = {"include": str(Path(lm_eval.tasks.__file__).parent / yaml), "dataset_path": "json", "dataset_name": None,
             "dataset_kwargs": {"data_files": {split: data}}, "training_split": None}
    write_file(f"{data}.yaml", json.dumps({"task": task} | local))
    found = lm_eval.simple_evaluate(model, tasks=[f"{data}.yaml"], bootstrap_iters=0)
    print(f"the harness: {found['results'][task]}")
    return {sample["doc_id"]: [(float(log_p), bool(greedy)) for ((log_p, greedy),) in sample["resps"]] for sample in found["samples"][task]}


def compare(task, ours, theirs):
    """Print the differences; returns whether there are any that matter. What ours leaves out as too long does not count."""
    log_probs = {i: max(abs(a - b) for (a, _), (b, _) in zip(ours[i], theirs[i], strict=True)) for i in ours}
    said = [i for i in ours if any(a is not None and a != b for (_, a), (_, b) in zip(ours[i], theirs[i]))]
    far = sorted((i for i in ours if not log_probs[i] <= TOLERANCE), key=lambda i: -log_probs[i])
    greedy = sum(said is True for item in ours.values() for _, said in item)
    print(f"\n{task}: {len(ours)} of {len(theirs)} items, {sum(map(len, ours.values()))} log-probs; largest difference {max(log_probs.values()):.2g} nats; "
          f"{len(far)} items differ by more than {TOLERANCE}; greedy decoding says {greedy} by ours, {len(said)} differ")
    for i in [*far[:5], *said[:5]]:
        print(f"  item {i}: ours {ours[i]}, theirs {theirs[i]}")
    return bool(far or said)


if __name__ == "__main__":
    run_main(main)
