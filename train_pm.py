"""Train a preference model, or the imitation baseline, on comparisons (Sections 3 and 4 of the paper).

  python train_pm.py --init out/lm --out out/pm                                        the toy world's comparisons
  python train_pm.py --init out/lm --data hh-rlhf/harmless-base/train.jsonl.gz --out out/pm
  python train_pm.py --init out/lm --data FILE --objective imitation --out out/imitation
  python train_pm.py --stage pmp --binarise --init out/lm --data stackexchange.jsonl reddit.jsonl --out out/pmp
  torchrun --nproc_per_node 8 train_pm.py --size 1b --out out/pm-1b

Preference-model pre-training (PMP, Section 4) is --stage pmp on large public data, then --stage finetune --init out/pmp on the
little human data there is.

Objectives:
  ranked     L = log(1 + exp(r_worse - r_better)) over the pairs of completions with different scores
  binary     each completion by itself: good if its score is above 0, L = log(1 + exp(-r)) if good, log(1 + exp(r)) if not
  imitation  cross-entropy of the best completion; no value head; scored by mean log-prob per token

--binarise makes of each ranked pair A > B two independent ones, GOOD:A > BAD:A and BAD:B > GOOD:B (Section 4.3).
"""
import argparse
import math

import numpy as np
import torch
import torch.nn.functional as F

import checkpoint
import trainer
from data import toy
from data.comparisons import load_comparisons
from data.errors import InputError, run_main
from data.files import content_key
from data.packing import balance, make_row, pack, step_examples
from data.tokenizer import get_tokenizer
from evals import pm
from model import SIZES

STAGES = {"pmp": (0.1, 512, 1.0), "finetune": (0.01, 32, 0.0)}  # learning rate as a multiple of the LM's; comparisons a step; LM loss (Section 4)
EVAL_COMPARISONS = 4096  # held-out comparisons that an evaluation during training reads at most; evaluate.py reads all
COUNTED = {"ranked": "comparisons", "binarised": "comparisons", "binary": "completions", "imitation": "tokens"}  # what the mean loss is a mean over
CONTROL = (" GOOD:", " BAD:")  # set before a completion by --binarise, as text: any tokenizer has it


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", nargs="+", default=["toy"], help="comparison files or folders, or toy (default: toy)")
    parser.add_argument("--init", help="checkpoint folder to start from: a language model or a preference model")
    parser.add_argument("--size", choices=SIZES, default="0.8m", help="of a fresh model where there is no --init (default: %(default)s)")
    parser.add_argument("--tokenizer", default="bytes", help="of a fresh model: bytes, gpt2 or a .tiktoken file (default: %(default)s)")
    parser.add_argument("--ctx", type=trainer.positive(int), help="tokens a context and one completion may take together; longer contexts are cut on "
                        "the left (default: 1024, or less if --init has less)")
    parser.add_argument("--objective", choices=("ranked", "binary", "imitation"), default="ranked", help="see above (default: %(default)s)")
    parser.add_argument("--stage", choices=STAGES, default="finetune", help="sets the paper's learning rate, as a multiple of the LM's, batch and "
                        "weight of the LM loss: " + "; ".join(f"{k} {lr}, {b}, {w:g}" for k, (lr, b, w) in STAGES.items()) + " (default: %(default)s)")
    parser.add_argument("--binarise", action="store_true", help="turn ranked pairs into independent binary ones with control tokens, for preference-model pre-training")
    parser.add_argument("--no_eoc", action="store_true", help="no end-of-context token: read the reward at a completion's own last token")
    parser.add_argument("--pairs_per_group", choices=("all", "1"), default="all", help="pairs taken from a comparison of several completions: all, weighted so "
                        "that each comparison counts once, or one at random each epoch (default: %(default)s)")
    parser.add_argument("--lm_weight", type=trainer.between(float, 0, math.inf), help="weight of the LM loss on the best completion, added to the preference loss "
                        "(default: the stage's)")
    parser.add_argument("--pairs", type=trainer.positive(int), help="train on this many comparisons, drawn by --seed (default: all)")
    parser.add_argument("--sizes", nargs="+", type=trainer.positive(int), metavar="N", help="mix: training comparisons from each of --data, repeated where it has "
                        "fewer (default: all of each once)")
    parser.add_argument("--weights", nargs="+", type=trainer.positive(float), metavar="W", help="mix: share of each of --data in an epoch of the usual length, instead of --sizes")
    parser.add_argument("--held_out", type=float, default=0.1, help="part of the groups that is held out for evaluation, 0 to 1 (default: %(default)s)")
    trainer.add_training_flags(parser, batch=None, batch_unit="comparisons", lr="the stage's multiple of the rate of the LM that --init comes from",
                               schedule="constant", warmup=0.0)
    return parser.parse_args()


def main():
    args = parse_args()
    if not 0 <= args.held_out < 1:
        raise InputError(f"--held_out {args.held_out}: give a part from 0 up to, not including, 1")
    ranks = trainer.start(args.device)
    check_flags(args)
    sources = [toy.find_data([path], "binary.jsonl" if args.objective == "binary" else "ranked.jsonl") for path in args.data]
    files = list(dict.fromkeys(file for source in sources for file in source))
    wants_head = args.objective != "imitation"
    model, tokenizer, meta, is_resumed = build_model(args, files, wants_head, ranks.device)
    model.dtype = trainer.pick_dtype(args.dtype, ranks.device)
    lr_scale, stage_batch, stage_lm = STAGES[args.stage]
    lm_weight = 0.0 if args.objective == "imitation" else stage_lm if args.lm_weight is None else args.lm_weight
    if not model.config.tied and not (lm_weight or args.objective == "imitation"):
        model.lm_head.requires_grad_(False)  # nothing trains it
    data = load_comparisons(files, tokenizer, quiet=not ranks.main())
    ctx, form = model.config.ctx, {"eoc": not args.no_eoc, "control": tuple(map(tokenizer.encode, CONTROL)) if args.binarise else ()}
    train, held_out, lines = split(args, data, ctx - max(map(len, form["control"]), default=0))
    if args.sizes or args.weights:
        train = mix(args, data, train, sources)
        lines.append("mix: " + ", ".join(f"{n:,} from {path}" for path, n in zip(args.data, np.bincount(source_numbers(data, train, sources)))))
    for line in lines:
        ranks.say(line)
    scored = held_out[::-(-len(held_out) // EVAL_COMPARISONS)] if len(held_out) else held_out

    batch = args.batch or stage_batch
    lm_lr = (meta or {}).get("lm_lr") or trainer.lm_rate(model.config.d_model)
    lr = args.lr or lr_scale * lm_lr
    per_epoch = -(-len(train) // batch)
    n_steps = args.steps or math.ceil(args.epochs * per_epoch)
    at_once = trainer.micro_tokens(args, model, ranks.device)

    objective = "binarised" if args.binarise else args.objective

    def micro_batches(step):
        epoch, numbers = step_examples(len(train), batch, args.seed, step)
        examples = train[numbers]
        chosen = [choose(data.scores(i), args, epoch, i) for i in examples]
        lengths = data.packed_lengths(examples, chosen, ctx, **form)
        mine = balance(lengths, ranks.world)[ranks.rank]
        rows = pack([lengths[j] for j in mine], at_once)
        return [make_row(data, examples[[mine[j] for j in row]], [chosen[mine[j]] for j in row], ctx, tokenizer, **form).to(ranks.device)
                for row in rows]

    def loss(net, row):
        hidden = net(row.tokens, row.layout, only_ends=wants_head and not lm_weight)
        return comparison_loss(model, hidden, row, objective, lm_weight)

    def evaluate(net):
        return held_out_figures(model, data, scored, objective, ctx, tokenizer, form, at_once, ranks)

    def where(row):
        return ", ".join(data.where(i) for i in row.examples)

    tokens = sum(data.packed_lengths(train[:1000], [None] * len(train[:1000]), ctx, **form)) / len(train[:1000])
    trainer.print_plan(args, ranks, model, n_steps, lr, at_once, [
        f"data: {len(train):,} training comparisons, {len(held_out):,} held out, {len(scored):,} of them scored at every evaluation; a step: {batch} comparisons, about "
        f"{batch * tokens:,.0f} tokens; an epoch: {per_epoch:,} steps"])
    trainer.train(args, ranks, model, tokenizer, n_steps=n_steps, lr=lr, micro_batches=micro_batches, loss=loss, evaluate=evaluate,
                  where=where, unit=COUNTED[objective], metric_names=("accuracy",) if wants_head else (), resumed_from=meta if is_resumed else None,
                  meta={"kind": "pm" if wants_head else "lm", "objective": args.objective, "lm_lr": lm_lr, "eoc": not args.no_eoc, "binarised": args.binarise,
                        "data": content_key(files), "trained_on": trainer.trained_on(meta, files, args.held_out)})


def build_model(args, files, wants_head, device):
    """(model, tokenizer, earlier meta, whether resumed)."""
    earlier = trainer.resumed(args, "pm" if wants_head else "lm", files)
    if earlier:
        return *earlier, True
    if args.init:
        model, tokenizer, meta = checkpoint.load(args.init, value_head=wants_head, seed=args.seed)
        model.config.ctx = args.ctx or min(1024, model.config.ctx)
        return model, tokenizer, meta, False
    tokenizer = get_tokenizer(args.tokenizer, toy.find_data(["toy"], "lm.jsonl") if args.data == ["toy"] else ())
    return trainer.fresh_model(args, tokenizer, args.ctx or 1024, device, wants_head), tokenizer, None, False


def check_flags(args):
    """Raise InputError for flags that do not go together."""
    if args.objective != "ranked" and args.binarise:
        raise InputError(f"--binarise is for --objective ranked, not {args.objective}")
    if args.objective == "imitation" and (args.no_eoc or args.lm_weight):
        raise InputError("--no_eoc and --lm_weight are for preference models, not --objective imitation")
    for name in ("sizes", "weights"):
        if getattr(args, name) and len(getattr(args, name)) != len(args.data):
            raise InputError(f"--{name} needs one number for each of the {len(args.data)} --data, found {len(getattr(args, name))}")
    if args.weights and (args.sizes or args.pairs) or args.sizes and args.pairs:
        raise InputError("give one of --sizes, --weights and --pairs")


def split(args, data, ctx):
    """(training comparisons, held-out comparisons, what to tell): numbers of comparisons that fit and have something to learn."""
    fits, held = data.fits(ctx), data.held_out(args.held_out)
    usable = fits & (data.differ() if args.objective == "ranked" else True)
    train, held_out = np.flatnonzero(usable & ~held), np.flatnonzero(usable & held)
    lines = [f"left out: {int((~fits).sum())} comparisons with a completion longer than --ctx {ctx}, "
             f"{int((fits & ~usable).sum())} whose scores are all equal"] if not usable.all() else []
    if args.objective == "binary" and len(train):
        labels = data.segment_scores[np.setdiff1d(np.arange(len(data.segment_scores)), data.first)] > 0
        if labels.all() or not labels.any():
            raise InputError(f"{data.files[0]}: every completion is {'good' if labels.all() else 'bad'} (score above 0 or not); "
                             "--objective binary needs both; --objective ranked goes by the order of scores")
    if args.pairs and args.pairs < len(train):
        train = np.sort(np.random.default_rng([args.seed, 1]).choice(train, args.pairs, replace=False))
    elif args.pairs and args.pairs > len(train):
        raise InputError(f"--pairs {args.pairs}: there are only {len(train)} training comparisons")
    if not len(train):
        raise InputError(f"{data.files[0]}: no comparison to train on is left at --ctx {ctx} and --held_out {args.held_out}")
    return train, held_out, lines


def source_numbers(data, examples, sources):
    """Which --data each example comes from (the first one, where a file stands in several)."""
    number = {str(file): i for i, source in reversed(list(enumerate(sources))) for file in source}
    return np.array([number[file] for file in data.files])[data.lines[examples, 0]]


def mix(args, data, train, sources):
    """The training comparisons in the proportions of --sizes or --weights: whole rounds of a source, then a part of it drawn by --seed."""
    of = source_numbers(data, train, sources)
    sizes = args.sizes or [round(len(train) * w / sum(args.weights)) for w in args.weights]
    mixed = []
    for i, size in enumerate(sizes):
        own = train[of == i]
        if not len(own):
            raise InputError(f"{args.data[i]}: no comparison to train on is left of it")
        rounds, rest = divmod(size, len(own))
        mixed += [own] * rounds + [np.random.default_rng([args.seed, 2, i]).choice(own, rest, replace=False)]
    return np.sort(np.concatenate(mixed))


def choose(scores, args, epoch, example):
    """Which completions of a comparison are laid out: None for all. Pure in (seed, epoch, example)."""
    if args.objective == "imitation":
        return [int(np.argmax(scores))]
    if args.objective == "ranked" and args.pairs_per_group == "1" and len(scores) > 2:
        better, worse = np.nonzero(scores[:, None] > scores)
        pick = np.random.default_rng([args.seed, epoch, int(example)]).integers(len(better))
        return sorted((int(better[pick]), int(worse[pick])))
    return None


# ---------------------------------------------------------------------------------------------------------------------
# The losses


def ranked_loss(r_better, r_worse):
    """log(1 + exp(r_worse - r_better)) of each pair (P,), in nats; P(better > worse) = sigmoid(r_better - r_worse) (Section 2.1)."""
    return F.softplus(r_worse - r_better)


def binary_loss(rewards, good):
    """-log sigmoid(r) of good completions, -log sigmoid(-r) of bad ones: rewards (K,), good (K,) bool -> (K,), in nats."""
    return F.softplus(torch.where(good, -rewards, rewards))


def binarised_loss(rewards, owner, scores):
    """Each ranked pair A > B as GOOD:A > BAD:A and BAD:B > GOOD:B: rewards, owner and scores (2K,), GOOD and BAD of a completion
    in turn. Returns (weighted sum, weighted share of such pairs that are right); a comparison's weights sum to 1."""
    good, bad = rewards[0::2], rewards[1::2]
    better, worse, weight = ranked_pairs(owner[0::2], scores[0::2])
    margins = torch.cat([good[better] - bad[better], bad[worse] - good[worse]])
    weight = torch.cat([weight, weight]) / 2
    right = (margins > 0).float() + 0.5 * (margins == 0)
    return (weight * F.softplus(-margins)).sum(), (weight * right).sum()


def ranked_pairs(owner, scores):
    """All pairs (better, worse, weight), each (P,), of completions of one comparison with different scores; a comparison's weights sum to 1."""
    better, worse = ((owner[:, None] == owner) & (scores[:, None] > scores)).nonzero(as_tuple=True)
    per_comparison = torch.bincount(owner[better], minlength=int(owner.max()) + 1)
    return better, worse, 1.0 / per_comparison[owner[better]]


def comparison_loss(model, hidden, row, objective, lm_weight=0.0):
    """(sum, count, metrics) of one packed row with hidden states (T, d_model); without an LM term those at the completions'
    ends, (K, d_model), do.

    Counts comparisons (ranked, binarised), completions (binary) or tokens (imitation). The LM term, if any, is the mean loss a
    token of a comparison's best completion, once for each thing that is counted.
    """
    if objective == "imitation":
        return best_completion_loss(model, hidden, row)
    rewards = model.rewards(row.at_ends(hidden))
    if objective == "ranked":
        better, worse, weight = ranked_pairs(row.owner, row.scores)
        right = (rewards[better] > rewards[worse]).float() + 0.5 * (rewards[better] == rewards[worse])
        total, count, accuracy = (weight * ranked_loss(rewards[better], rewards[worse])).sum(), len(row.examples), (weight * right).sum()
    elif objective == "binarised":
        (total, accuracy), count = binarised_loss(rewards, row.owner, row.scores), len(row.examples)
    else:
        good = row.scores > 0
        total, count, accuracy = binary_loss(rewards, good).sum(), len(rewards), ((rewards > 0) == good).float().sum()
    if lm_weight:
        counted = row.owner.bincount() if objective == "binary" else torch.ones(len(row.examples), device=rewards.device)
        total = total + lm_weight * best_completion_loss(model, hidden, row, counted)[0]
    return total, count, {"accuracy": accuracy}


def best_completion_loss(model, hidden, row, weight=None):
    """Cross-entropy of each comparison's best completion with its <eoc>, in nats: (sum, count of tokens, {}). With a weight
    (C,) a completion's tokens are averaged first, and the sum is over comparisons, so weighted."""
    source, target, completion = row.completion_tokens()
    keep = row.best[completion]
    source, target, completion = source[keep], target[keep], completion[keep]
    if weight is not None:
        weight = weight[row.owner[completion]] / (row.ends - row.starts + 1)[completion]
    return model.token_losses(hidden[source], row.tokens[target], weight)[0], len(target), {}


def held_out_figures(model, data, examples, objective, ctx, tokenizer, form, at_once, ranks):
    """Loss and accuracy on held-out comparisons: by reward, for imitation by mean log-prob per token, of binarised ones that of
    GOOD against BAD. Ties count half."""
    loss = count = right = ranked = 0.0
    whole = [None] * len(examples)
    for numbers in pack(data.packed_lengths(examples, whole, ctx, **form), at_once)[ranks.rank::ranks.world]:
        row = make_row(data, examples[numbers], whole[:len(numbers)], ctx, tokenizer, **form).to(ranks.device)
        hidden = model(row.tokens, row.layout, only_ends=objective != "imitation")
        row_loss, row_count, row_metrics = comparison_loss(model, hidden, row, objective)
        loss, count = loss + row_loss.item(), count + row_count
        if objective == "binarised":
            right, ranked = right + row_metrics["accuracy"].item(), ranked + row_count
            continue
        scores = pm.completion_scores(model, hidden, row, "mean" if objective == "imitation" else "reward")
        better, worse, weight = ranked_pairs(row.owner, row.scores)
        margin = scores[better] - scores[worse]
        right, ranked = right + (weight * ((margin > 0) + 0.5 * (margin == 0))).sum().item(), ranked + weight.sum().item()
    loss, count, right, ranked = ranks.sum([loss, count, right, ranked])
    return {"loss": loss / count} | ({"accuracy": right / ranked, "comparisons": round(ranked)} if ranked else {}) if count else {}


if __name__ == "__main__":
    run_main(main)
