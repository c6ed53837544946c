"""Human against model (Section 4 of the paper): the best human completion of each comparison against
samples of a model.

The model is a language model finetuned on the better completions (`train_pm.py --objective imitation`), so
that its samples differ from them in quality rather than in kind. Preference models pre-trained on such pairs
transfer better than those pre-trained on pairs of human texts.
"""
import numpy as np

import checkpoint
import plan
from data import toy
from data.comparisons import parse
from data.errors import InputError
from data.prompts import STOPS
from data.sources.count import json_records
from data.text import find_special
from evals.subject import add_model_flags, add_sampling_flags, load_subject, samples


def add_flags(parser):
    add_model_flags(parser)
    add_sampling_flags(parser, n=1, max_new=256, temperature=1.0, top_p=0.95)
    parser.add_argument("--contexts", type=plan.positive(int),
                        help="take only the first so many comparisons (default: all)")


def find_raw(paths):
    """The files that --raw names; the name of a toy world stands for its ranked comparisons."""
    files = []
    for path in paths:
        files += toy.find_data([path], "ranked.jsonl") if toy.is_toy([path]) else [path]
    return files


def records(paths, args, count):
    """Yield {"context", "completions": [human, sample, …], "scores": [1, 0, …], "group"} for comparisons in
    any of our forms.

    A sample ends at <eot> or <eoc>, after --max_new tokens or, where the context is a dialogue, before the
    next turn. Contexts that do not fit are cut on the left. At the end the lengths of both sides are printed.
    """
    subject = load_subject(args, checkpoint.load_lm)
    comparisons = read_comparisons(paths, args, count)
    contexts = [context for context, *_ in comparisons]
    stops = [STOPS if "\n\nHuman:" in context and "\n\nAssistant:" in context else () for context in contexts]
    drawn = samples(subject, contexts, args, stops, "context")
    lengths, n_cut, n_unfinished = [], 0, 0  # lengths: (human, sample) in characters
    encode = subject.tokenizer.encode
    for (context, completions, scores, group), texts in zip(comparisons, drawn):
        human = completions[int(np.argmax(scores))]
        kept = usable(texts, human, count)
        if not kept:
            count.drop("comparisons left without a sample")
            continue
        n_cut += len(encode(context)) > subject.ctx - args.max_new
        n_unfinished += sum(len(encode(text)) >= args.max_new for text in kept)
        lengths += [(len(human), len(text)) for text in kept]
        yield {"context": context, "completions": [human, *kept], "scores": [1] + [0] * len(kept),
               "group": group}
    if lengths:
        human, model = np.array(lengths).T
        print(f"{len(lengths):,} pairs; characters: human {human.mean():.0f} on average, model "
              f"{model.mean():.0f}; the longer one is human in {(human > model).mean():.0%} (equal: "
              f"{(human == model).mean():.0%}); about {n_unfinished:,} samples reached --max_new, {n_cut:,} "
              "contexts were cut on the left", flush=True)


def read_comparisons(paths, args, count):
    """(context, completions, scores, group) of the first --contexts comparisons; bad ones are counted."""
    found = []
    for where, record in json_records(paths, count):
        try:
            comparison = parse(record, where)
        except InputError as error:
            count.bad(where, str(error).removeprefix(f"{where}: "))
            continue
        if find_special(comparison[0]):
            count.drop("records that hold <eot> or <eoc>, our special tokens")
        else:
            found.append(comparison)
        if len(found) == args.contexts:
            break
    count.check()
    return found


def usable(texts, human, count):
    """The samples that are neither empty nor equal to the human text or to one before; others are counted."""
    kept = []
    for text in texts:
        if not text.strip():
            count.drop("samples that are empty")
        elif text.strip() == human.strip():
            count.drop("samples equal to the human text")
        elif text in kept:
            count.drop("samples drawn before for the same context")
        else:
            kept.append(text)
    return kept
