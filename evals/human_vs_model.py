"""Human against model (Sections 5 and 6 of the paper): the best human completion of each comparison against a model's sample.

The model is a language model finetuned on the good sides (`train_pm.py --objective imitation`), so that its samples differ from
them in quality rather than in kind. Preference models pre-trained on such pairs transfer better than on pairs of human texts.
"""
import numpy as np

import checkpoint
import plan
from data import toy
from data.comparisons import parse
from data.errors import InputError
from data.prompts import STOPS
from data.sources.count import json_records
from evals.subject import add_model_flags, add_sampling_flags, load_subject, samples


def add_flags(parser):
    add_model_flags(parser)
    add_sampling_flags(parser, n=1, max_new=256, temperature=1.0, top_p=0.95)
    parser.add_argument("--contexts", type=plan.positive(int), help="only the first so many comparisons (default: all)")


def find_raw(paths):
    """The files that --raw names; the name of a toy world stands for its ranked comparisons."""
    files = []
    for path in paths:
        files += toy.find_data([path], "ranked.jsonl") if toy.is_toy([path]) else [path]
    return files


def records(paths, args, count):
    """Yield {"context", "completions": [human, sample, …], "scores": [1, 0, …], "group"} for comparisons in any of our forms.

    A sample ends at <eot>, <eoc>, --max_new or, where the context is a dialogue, at the next turn. The longest samples and
    contexts that do not fit the model are cut, which is said at the end, with the lengths of both sides.
    """
    subject = load_subject(args, checkpoint.load_lm)
    room = subject.ctx - args.max_new
    found = []
    for where, record in json_records(paths, count):
        try:
            found.append(parse(record, where))
        except InputError as error:
            count.bad(where, str(error).removeprefix(f"{where}: "))
        if len(found) == args.contexts:
            break
    count.check()

    lengths, cut, unfinished = [], 0, 0  # lengths: (human, sample) in characters
    tokens = lambda text: len(subject.tokenizer.encode(text))
    is_dialogue = ["\n\nHuman:" in context and "\n\nAssistant:" in context for context, *_ in found]
    drawn = samples(subject, [context for context, *_ in found], args, [STOPS if turns else () for turns in is_dialogue], "context")
    for (context, completions, scores, group), texts in zip(found, drawn):
        human, kept = completions[int(np.argmax(scores))], []
        for text in texts:
            if not text.strip():
                count.drop("samples that are empty")
            elif text.strip() == human.strip():
                count.drop("samples equal to the human text")
            elif text in kept:
                count.drop("samples drawn before for the same context")
            else:
                kept.append(text)
        if not kept:
            count.drop("comparisons left without a sample")
            continue
        cut += tokens(context) > room
        unfinished += sum(tokens(text) >= args.max_new for text in kept)
        lengths += [(len(human), len(text)) for text in kept]
        yield {"context": context, "completions": [human, *kept], "scores": [1] + [0] * len(kept), "group": group}
    if lengths:
        human, model = np.array(lengths).T
        print(f"{len(lengths):,} pairs; characters: human {human.mean():.0f} on average, model {model.mean():.0f}; the longer one is human in "
              f"{(human > model).mean():.0%} (equal: {(human == model).mean():.0%}); about {unfinished:,} samples reached --max_new, "
              f"{cut:,} contexts were cut on the left", flush=True)
