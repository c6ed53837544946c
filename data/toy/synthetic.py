"""Synthetic comparisons with a known order, for a question of the paper (its appendix): which
pre-training of a preference model, ranked or binarised, transfers better to finetuning by the same order of
qualities, by the reversed one, or by a shuffled one?

    context      " rank qxzt:"     a task word and some letters; nothing depends on them
    completion   " cbaed"          the letters a to e in any order

The quality of a completion is its first letter, and an order of the letters says which is worth how much.
Neither the length nor the set of letters tells it: a model has to see which letter stands first. The files
share no context:

    pmp.jsonl                                 pairs in the order a < b < c < d < e
    finetune-ORDER.jsonl, test-ORDER.jsonl    for ORDER same, reversed, and shuffled: there half of the pairs
                                              of letters turn round

Binarised, a pair says of a letter only whether it won, so at most 80 % of pmp.jsonl's pairs GOOD against
BAD can be told.
"""
import itertools
import random
from pathlib import Path

from data.errors import InputError
from data.toy import write_jsonl

LETTERS, OTHERS = "abcde", "fghijklmnopqrstuvwxyz"


def orders(rng):
    """{name: the letters from worst to best}."""
    half_turned = [order for order in itertools.permutations(LETTERS)
                   if sum(a > b for a, b in itertools.combinations(order, 2)) == 5]  # 5 of 10 pairs
    return {"same": LETTERS, "reversed": LETTERS[::-1], "shuffled": "".join(rng.choice(half_turned))}


def completion(rng, letter):
    others = LETTERS.replace(letter, "")
    return f" {letter}{''.join(rng.sample(others, len(others)))}"


def comparisons(rng, n, order, contexts):
    """Yield n pairs scored by an order. Their contexts are not in the set `contexts`, and are added to
    it."""
    for _ in range(n):
        while (name := "".join(rng.choices(OTHERS, k=4))) in contexts:
            pass
        contexts.add(name)
        letters = rng.sample(LETTERS, 2)
        yield {"context": f" rank {name}:", "completions": [completion(rng, letter) for letter in letters],
               "scores": [order.index(letter) for letter in letters], "group": name}


def write(folder, seed=0, n_pmp=16000, n_finetune=200, n_test=500):
    """Write the seven files: n_pmp pairs for pre-training, and for each order n_finetune and n_test pairs.

    Raises InputError if there are not as many contexts.
    """
    n, most = n_pmp + 3 * (n_finetune + n_test), len(OTHERS) ** 4 // 2
    if n > most:
        raise InputError(f"{n:,} comparisons: there are contexts for {most:,}; give smaller numbers")
    rng, contexts, folder = random.Random(f"{seed}/synthetic"), set(), Path(folder)
    order_of = orders(rng)
    write_jsonl(folder / "pmp.jsonl", comparisons(rng, n_pmp, LETTERS, contexts))
    for name, order in order_of.items():
        write_jsonl(folder / f"finetune-{name}.jsonl", comparisons(rng, n_finetune, order, contexts))
        write_jsonl(folder / f"test-{name}.jsonl", comparisons(rng, n_test, order, contexts))
