"""Synthetic comparisons with a known order, for the paper's question (Section 7, appendix) whether ranked or binarised pre-training
of a preference model transfers better: to finetuning by the same order of qualities, the reversed or a shuffled one.

    context      " rank qxzt:"          a task word and some letters; nothing depends on them
    completion   " cbaed"               the letters a to e in any order

The quality of a completion is its first letter, and an order says which is worth how much. Neither its length nor the letters in it
tell its quality: a model has to see which one stands first. Files, no two of which share a context:

    pmp.jsonl                                  pairs in the order a < b < c < d < e
    finetune-ORDER.jsonl, test-ORDER.jsonl     for ORDER same, reversed, and shuffled: half of the pairs of letters the other way

Binarised, a pair says of each letter only whether it won, so at most 80 % of pmp.jsonl's pairs GOOD against BAD can be told.
"""
import argparse
import itertools
import json
import random
from pathlib import Path

from data.errors import InputError, run_main
from data.files import write_file

KEYS, OTHERS = "abcde", "fghijklmnopqrstuvwxyz"


def orders(rng):
    """{name: letters from worst to best}. Shuffled is one of the orders that turn 5 of the 10 pairs round."""
    def turned(order):
        return sum(a > b for a, b in itertools.combinations(order, 2))
    return {"same": KEYS, "reversed": KEYS[::-1],
            "shuffled": "".join(rng.choice([order for order in itertools.permutations(KEYS) if turned(order) == 5]))}


def completion(rng, key):
    others = KEYS.replace(key, "")
    return f" {key}{''.join(rng.sample(others, len(others)))}"


def comparisons(rng, n, order, contexts):
    """Yield n pairs scored by an order. A context is drawn that is not in the set `contexts`, and put there."""
    for _ in range(n):
        while (name := "".join(rng.choices(OTHERS, k=4))) in contexts:
            pass
        contexts.add(name)
        keys = rng.sample(KEYS, 2)
        yield {"context": f" rank {name}:", "completions": [completion(rng, key) for key in keys],
               "scores": [order.index(key) for key in keys], "group": name}


def write(folder, seed=0, n_pmp=16000, n_finetune=200, n_test=500):
    """Write the seven files into a folder: so many pairs for pre-training, and for finetuning and testing each order.

    Raises InputError where there are not as many contexts."""
    if n_pmp + 3 * (n_finetune + n_test) > len(OTHERS) ** 4 // 2:
        raise InputError(f"{n_pmp + 3 * (n_finetune + n_test):,} comparisons: there are contexts for {len(OTHERS) ** 4 // 2:,}; give smaller numbers")
    rng, contexts = random.Random(f"{seed}/synthetic"), set()
    sizes = {"pmp": (n_pmp, KEYS)}
    for name, order in orders(rng).items():
        sizes |= {f"finetune-{name}": (n_finetune, order), f"test-{name}": (n_test, order)}
    for name, (n, order) in sizes.items():
        write_file(Path(folder) / f"{name}.jsonl", "".join(json.dumps(line) + "\n" for line in comparisons(rng, n, order, contexts)))


def main():
    parser = argparse.ArgumentParser(prog="python -m data.synthetic", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to write the seven files to")
    parser.add_argument("--seed", type=int, default=0, help="of all that is drawn (default 0)")
    args = parser.parse_args()
    write(args.out, args.seed)
    for path in sorted(args.out.glob("*.jsonl")):
        print(f"{path}: {path.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    run_main(main)
