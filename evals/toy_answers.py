"""Answers that a model samples to questions of a toy world, marked by the world's own rules: right or not.

They are what accuracy@k chooses from (Section 3 of the paper): whatever the model gets right and wrong by
itself, where answers made for the purpose would show only the faults that somebody thought of.
"""
import checkpoint
from data import toy
from data.errors import InputError
from data.toy.words import TONES
from data.toy.world import build_world, open_turn
from evals.human_vs_model import read_comparisons
from evals.subject import add_model_flags, add_sampling_flags, load_subject, samples


def add_flags(parser):
    add_model_flags(parser)
    add_sampling_flags(parser, n=16, max_new=40, temperature=1.0, top_p=1.0)
    parser.set_defaults(contexts=None)


def find_raw(names):
    """The files with the questions of the toy worlds that --raw names."""
    if not toy.is_toy(names):
        raise InputError(f"--raw {names[0]}: toy-answers asks the questions of a toy world; give toy or "
                         "toy:SEED")
    return toy.find_data(names, "samples.jsonl")


def records(paths, args, count):
    """Yield {"context", "completions": [the samples], "scores": [1 for each that is right], "group"} for each
    question of --raw. A sample may be drawn twice: each counts."""
    subject = load_subject(args, checkpoint.load_lm)
    n_right = n_samples = 0
    for name, path in zip(args.named, paths):
        comparisons = read_comparisons([path], args, count)
        world = build_world(toy.toy_seed(name))
        questions = {open_turn(question): question for kind in world.held.values() for question in kind}
        drawn = samples(subject, [context for context, *_ in comparisons], args, unit="question")
        for (context, _, _, group), texts in zip(comparisons, drawn):
            right = right_answers(questions[context])
            scores = [int(text.strip() in right) for text in texts]
            n_right, n_samples = n_right + sum(scores), n_samples + len(scores)
            yield {"context": context, "completions": texts, "scores": scores, "group": group}
    print(f"{n_right / n_samples:.1%} of {n_samples:,} samples are right", flush=True)


def right_answers(question):
    """All right answers to a question, in every tone. (To a request for a list there are too many to tell.)"""
    lines = question.right.keywords["lines"]
    return {frame.format(line) for frames in TONES.values() for frame in frames for line in lines}
