"""Are our scores of HellaSwag and LAMBADA those of lm-evaluation-harness? A script, not a test.

  pip install lm-eval transformers accelerate
  python tests/compare_lm_eval.py --model out/lm --data DATA --limit 200

DATA holds hellaswag/hellaswag_val.jsonl and lambada/lambada_test.jsonl (plain or packed). The harness asks by
its own task definitions, hellaswag and lambada_openai, and computes with the checkpoint as transformers loads
it, in fp32; only the tokens are ours. Exits with 1 if a figure (acc, acc_norm, perplexity) or an item's
log-prob in nats differs by more than 1e-3, or if the two do not agree on what greedy decoding says.

A context that is too long for the model is cut differently, as we leave room for an <eoc>.
"""
import argparse
import json
import os
import subprocess
import sys
import tempfile
from itertools import islice
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import checkpoint
from data.errors import InputError, Parser, run_main
from data.files import find_files, read_records

TOLERANCE = 1e-3


def main():
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, type=Path, help="checkpoint folder of a language model")
    parser.add_argument("--data", required=True, type=Path, help="folder with hellaswag/ and lambada/")
    parser.add_argument("--limit", type=int, help="only the first so many items of each (default: all)")
    args = parser.parse_args()
    model, differs = Path(checkpoint.find(args.model)).resolve(), False
    with tempfile.TemporaryDirectory() as folder:
        os.environ |= {"HF_HUB_OFFLINE": "1", "HF_HOME": folder}  # read when these packages are imported
        harness = harness_model(model)
        for benchmark, task, split in (("hellaswag", "hellaswag", "validation"),
                                       ("lambada", "lambada_openai", "test")):
            files = find_files([args.data / benchmark])
            records = list(islice((record for path in files for _, record in read_records(path)), args.limit))
            data = Path(folder, f"{benchmark}.jsonl")
            data.write_text("".join(json.dumps(in_two_parts(record)) + "\n" for record in records))
            ours = our_scores(benchmark, task, model, data)
            differs |= compare(task, *ours, *harness_scores(harness, task, benchmark, split, data))
    sys.exit(differs)


def in_two_parts(record):
    """A HellaSwag record with its context in two parts, as it is published and as the harness expects it."""
    return {"ctx_a": record["ctx"], "ctx_b": ""} | record if "ctx" in record else record


def our_scores(benchmark, task, model, data):
    """(figures by the harness's names, {item: log-probs of its choices}, {item: True if greedy decoding says
    it})."""
    out = data.with_suffix(".ours")
    command = [sys.executable, "evaluate.py", benchmark, "--model", model, "--data", data, "--out", out]
    done = subprocess.run([*command, "--dtype", "fp32"], cwd=ROOT, check=True, text=True,
                          stdout=subprocess.PIPE)
    figures = json.loads(done.stdout.splitlines()[-1])["harness"][task]
    items = [json.loads(line) for line in out.read_text().splitlines()]
    log_probs = {item["item"]: np.atleast_1d(item.get("sum", item.get("log_prob"))) for item in items}
    return figures, log_probs, {item["item"]: item["right"] for item in items if "right" in item}


def harness_model(folder):
    """The checkpoint as the harness's own kind of model; its tokens are those of the folder's tokenizer."""
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
    specials = transformers.PreTrainedTokenizerFast(tokenizer_object=specials, eos_token="<eot>",
                                                    pad_token="<eot>")
    return Harness(str(folder), tokenizer=specials, dtype="float32", device="cpu", batch_size=32)


def harness_scores(model, task, folder, split, data):
    """As our_scores, from the harness: its task with nothing changed but where the data lie."""
    import lm_eval.tasks
    definition = {"task": task, "include": str(Path(lm_eval.tasks.__file__).parent / folder / f"{task}.yaml"),
                  "dataset_path": "json", "dataset_name": None, "training_split": None,
                  "dataset_kwargs": {"data_files": {split: str(data)}}}
    path = data.with_suffix(".yaml")
    path.write_text(json.dumps(definition))
    found = lm_eval.simple_evaluate(model, tasks=[str(path)], bootstrap_iters=0)
    figures = {key.removesuffix(",none"): value for key, value in found["results"][task].items()}
    log_probs, greedy = {}, {}
    for sample in found["samples"][task]:
        answers = [answer for (answer,) in sample["resps"]]
        log_probs[sample["doc_id"]] = np.array([float(log_p) for log_p, _ in answers])
        greedy[sample["doc_id"]] = bool(answers[0][1])
    return figures, log_probs, greedy


def compare(task, our_figures, ours, our_greedy, their_figures, theirs, their_greedy):
    """Print the differences; returns True if any of them matters. Items that we leave out, as they are too
    long, do not count."""
    gaps = {item: np.abs(ours[item] - theirs[item]).max() for item in ours}
    far = [item for item in sorted(gaps, key=gaps.get, reverse=True) if not gaps[item] <= TOLERANCE]
    disagree = [item for item in our_greedy if our_greedy[item] != their_greedy[item]]
    print(f"\n{task}: {len(ours)} of {len(theirs)} items; the largest difference of a log-prob is "
          f"{max(gaps.values()):.2g} nats; {len(far)} items differ by more than {TOLERANCE}; greedy decoding "
          f"differs on {len(disagree)}")
    for item in [*far[:5], *disagree[:5]]:
        print(f"  item {item}: ours {ours[item]}, theirs {theirs[item]}")
    differ = bool(far or disagree)
    for name, figure in our_figures.items():
        print(f"  {name}: ours {figure:.6g}, theirs {their_figures[name]:.6g}")
        differ |= not abs(figure - their_figures[name]) <= TOLERANCE * max(1, figure)
    return differ


if __name__ == "__main__":
    run_main(main)
