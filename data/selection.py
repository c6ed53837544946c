"""Which comparisons a preference model is trained on, and which of their completions are laid out.

`args` are the flags of train_pm.py, of which `add_flags` adds those that are read here. Everything that is
drawn depends on --seed, and on the epoch where it says so.
"""
import math

import numpy as np

from data.comparisons import pairs
from data.errors import InputError, between, positive
from data.packing import packed_lengths, whole_lengths


def add_flags(parser):
    add = parser.add_argument
    add("--pairs", type=positive(int), metavar="N",
        help="train on N comparisons, drawn by --seed (default: all)")
    add("--sizes", nargs="+", type=positive(int), metavar="N",
        help="mix: so many training comparisons of each of --data, repeated where it has fewer (default: "
        "each once)")
    add("--weights", nargs="+", type=positive(float), metavar="W",
        help="mix: the share of each of --data in an epoch of the usual length, instead of --sizes")
    add("--held_out", type=float, default=0.1,
        help="part of the groups that is held out for evaluation, from 0 to below 1 (default: %(default)s)")
    add("--pairs_per_group", choices=("all", "1"), default="all",
        help="pairs taken from a comparison of several completions: all of them, weighted so that each "
        "comparison counts once, or one at random each epoch (default: all)")
    add("--max_completions", type=between(int, 2, 2**31), metavar="N",
        help="lay out at most N completions of a comparison, drawn by --seed, so that comparisons of very "
        "many completions fit in memory (default: all)")


def check_flags(args):
    """Raise InputError for flags of `add_flags` that do not go together."""
    if not 0 <= args.held_out < 1:
        raise InputError(f"--held_out {args.held_out}: give a part from 0 up to, not including, 1")
    for name in ("sizes", "weights"):
        numbers = getattr(args, name)
        if numbers and len(numbers) != len(args.data):
            raise InputError(f"--{name} needs one number for each of the {len(args.data)} --data, found "
                             f"{len(numbers)}")
    if sum(map(bool, (args.weights, args.sizes, args.pairs))) > 1:
        raise InputError("give one of --sizes, --weights and --pairs")


def choose(args, data, sources, room):
    """The comparisons to train and to evaluate on: `split`, and then `mix` if the flags ask for it. Returns
    what `split` returns. sources: the files of each of --data."""
    train, held_out, notes = split(args, data, room)
    if args.sizes or args.weights:
        train, counts = mix(args, data, train, sources)
        notes.append("mix: " + ", ".join(f"{n:,} from {path}" for path, n in zip(args.data, counts)))
    n_shortened = (np.diff(data.first)[train] - 1 > (args.max_completions or math.inf)).sum()
    if n_shortened:
        notes.append(f"{n_shortened} comparisons have more completions than --max_completions "
                     f"{args.max_completions}; that many of each are used")
    return train, held_out, notes


def split(args, data, room):
    """Choose the comparisons to train and to evaluate on: those that fit in `room` tokens and that teach
    something.

    Returns (numbers of training comparisons, numbers of held-out ones, notes: lines that say what was left
    out, and how many contexts will be cut).
    """
    fits, is_held_out, differs = data.fits(room), data.held_out(args.held_out), data.differ()
    usable = fits
    if args.objective == "ranked":
        usable = fits & differs
    elif args.objective == "imitation":  # a single completion can be imitated; of equal ones none is the best
        usable = fits & (differs | (np.diff(data.first) == 2))
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
                         f"{args.held_out}" + "".join(f"; {note}" for note in notes))
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
        others = order[scores[order] != scores[keep[0]]]
        # If there is nothing to compare, the last one makes room for another.
        if len(others) and len(set(scores[keep])) == 1:
            keep[-1] = others[0]
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
