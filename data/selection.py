"""Which comparisons a preference model is trained on, and which of their completions are laid out.

`args` are the flags of train_pm.py. Everything that is drawn depends on --seed, and on the epoch where it
says so.
"""
import numpy as np

from data.comparisons import pairs
from data.errors import InputError
from data.packing import packed_lengths, whole_lengths


def split(args, data, room):
    """Choose the comparisons to train and to evaluate on: those that fit in `room` tokens and that teach
    something.

    Returns (numbers of training comparisons, numbers of held-out ones, lines that say what was left out).
    """
    fits, is_held_out, differs = data.fits(room), data.held_out(args.held_out), data.differ()
    usable = fits & differs if args.objective == "ranked" else fits
    train, held_out = np.flatnonzero(usable & ~is_held_out), np.flatnonzero(usable & is_held_out)
    notes = []
    if not usable.all():
        notes.append(f"left out: {(~fits).sum()} comparisons with a completion longer than --ctx {room}, "
                     f"{(fits & ~usable).sum()} whose scores are all equal")
    if n_cut := (usable & data.is_cut(room)).sum():
        notes.append(f"{n_cut} contexts are cut on the left to fit in --ctx {room}")
    if args.objective == "binary" and len(train):
        labels = np.delete(data.segment_scores, data.first[:-1]) > 0  # of all completions
        if labels.all() or not labels.any():
            raise InputError(f"{data.files[0]}: every completion is {'good' if labels.all() else 'bad'} "
                             "(score above 0 or not); --objective binary needs both; --objective ranked "
                             "goes by the order of scores")
    if not len(train):
        raise InputError(f"{data.files[0]}: no comparison to train on is left at --ctx {room} and --held_out "
                         f"{args.held_out}")
    if args.pairs and args.pairs > len(train):
        raise InputError(f"--pairs {args.pairs}: there are only {len(train)} training comparisons")
    if args.pairs and args.pairs < len(train):
        train = np.sort(np.random.default_rng([args.seed, 1]).choice(train, args.pairs, replace=False))
    return train, held_out, notes


def mix(args, data, train, sources):
    """The training comparisons in the proportions of --sizes or --weights: (their numbers, how many of each
    source).

    A source that is smaller than its share comes several times; the rest of its share is drawn by --seed.
    """
    number_of = {}
    for number, source in enumerate(sources):
        for file in source:
            number_of.setdefault(str(file), number)  # a file that two of --data name belongs to the first
    source_of_file = np.array([number_of[file] for file in data.files])
    source_of_example = source_of_file[data.lines[train, 0]]
    sizes = args.sizes or [round(len(train) * weight / sum(args.weights)) for weight in args.weights]
    mixed = []
    for number, size in enumerate(sizes):
        examples = train[source_of_example == number]
        if not len(examples):
            raise InputError(f"{args.data[number]}: no comparison to train on is left of it")
        rounds, rest = divmod(size, len(examples))
        drawn = np.random.default_rng([args.seed, 2, number]).choice(examples, rest, replace=False)
        mixed += [examples] * rounds + [drawn]
    return np.sort(np.concatenate(mixed)), sizes


def completions_to_keep(scores, args, epoch, example):
    """The numbers of the completions of a comparison to lay out, or None for all. Depends on (seed, epoch,
    example)."""
    if args.objective == "imitation":
        return [int(np.argmax(scores))]
    if args.objective == "ranked" and args.pairs_per_group == "1" and len(scores) > 2:
        better, worse = pairs(scores)
        drawn = np.random.default_rng([args.seed, epoch, int(example)]).integers(len(better))
        return sorted((int(better[drawn]), int(worse[drawn])))
    if args.max_completions and len(scores) > args.max_completions:
        order = np.random.default_rng([args.seed, 3, int(example)]).permutation(len(scores))
        keep = order[:args.max_completions]
        if len(set(scores[keep])) == 1:  # nothing to compare: the last one makes room for one that differs
            keep = np.append(keep[:-1], [i for i in order if scores[i] != scores[keep[0]]][:1])
        return sorted(keep.tolist())
    return None


def measure_rows(args, data, train, row_format):
    """(mean tokens of a training comparison, number of the longest one, its completions to keep, its tokens).
    """
    lengths = whole_lengths(data, row_format)[train]
    candidates = train[np.argsort(-lengths, kind="stable")[:1000]]  # a part of the completions may be shorter
    kept = [completions_to_keep(data.scores(i), args, 0, i) for i in candidates]
    laid_out = packed_lengths(data, candidates, row_format, kept)
    longest = int(np.argmax(laid_out))
    return lengths.mean(), candidates[longest], kept[longest], laid_out[longest]
