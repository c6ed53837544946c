"""Train a preference model, or the imitation baseline, on comparisons (Sections 3 and 4 of the paper).

  python train_pm.py --init out/lm --out out/pm                          the toy world's comparisons
  python train_pm.py --init out/lm --data hh-rlhf/harmless-base/test.jsonl.gz --out out/pm
  python train_pm.py --init out/lm --data FILE --objective imitation --out out/imitation
  python train_pm.py --init out/lm --stage pmp --binarise --data stackexchange.jsonl reddit.jsonl --out out/pm
  torchrun --nproc_per_node 8 train_pm.py --size 1b --out out/pm-1b

Preference-model pre-training (PMP, Section 4) is --stage pmp on large public data, then --stage finetune
--init out/pmp on the little human data there is.

Objectives:
  ranked     L = log(1 + exp(r_worse - r_better)) over the pairs of completions with different scores
  binary     each completion by itself: it is good if its score is above 0;
             L = log(1 + exp(-r)) if good, log(1 + exp(r)) if not
  imitation  cross-entropy of the best completion; no value head; scored by mean log-prob per token

--binarise (Section 4) turns each ranked pair A > B into two independent pairs, GOOD:A > BAD:A and
BAD:B > GOOD:B. GOOD and BAD are control texts, set before the completion. A pair compares the two control
texts of one completion, so the model learns which of them suits it. It learns to rank completions only when
it is finetuned on ranked pairs without control texts. Before that, its rewards for completions without a
control text mean nothing. The LM loss that pmp adds is that of " GOOD:" and the best completion
behind it.
"""
import argparse
import math

import numpy as np
import torch
import torch.nn.functional as F

import checkpoint
import plan
import trainer
from data import selection, toy
from data.comparisons import load_comparisons
from data.errors import InputError, Parser, run_main
from data.files import content_key
from data.packing import RowFormat, make_row, pack, pack_for_rank, packed_lengths, spread, step_examples
from data.tokenizer import get_tokenizer
from evals import pm
from model import SIZES
from ranks import pick_dtype, start

# For each stage: the learning rate as a multiple of the language model's, the comparisons in a step, the weight
# of the LM loss. As in Section 4 of the paper, which gives neither batch nor weight for pmp: these are ours.
STAGES = {"pmp": (0.1, 512, 1.0), "finetune": (0.01, 32, 0.0)}
CONTROL = (" GOOD:", " BAD:")  # as text, so that any tokenizer has them
EVAL_COMPARISONS = 4096  # an evaluation during training reads at most so many; evaluate.py reads all
MEAN_OVER = {  # what the loss and the metrics of each objective are means over, and the metrics' names
    "ranked": ("comparisons", ("accuracy",)), "binarised": ("comparisons", ("accuracy",)),
    "binary": ("completions", ("label_accuracy",)), "imitation": ("tokens", ())}


def parse_args():
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--data", nargs="+", default=["toy"],
        help="comparison files or folders, toy, or toy:SEED for another toy world (default: toy)")
    add("--init",
        help="model to start from: a checkpoint folder (language model or preference model), a Hugging Face "
        "folder or a .gguf file of the Llama family")
    add("--size", choices=SIZES, help="size of a fresh model, without --init (default: 0.8m)")
    add("--tokenizer",
        help="tokenizer of a fresh model: bytes (a token is a byte), gpt2, a .tiktoken file or, for toy "
        "data, bpe:N (N tokens, learned from its texts; default: bytes)")
    add("--ctx", type=plan.positive(int),
        help="the most tokens that a context and one completion may take; longer contexts are cut on the left "
        "(default: 1024, or what --init has if that is less)")
    add("--objective", choices=("ranked", "binary", "imitation"), default="ranked",
        help="see above (default: ranked)")
    add("--stage", choices=STAGES, default="finetune",
        help="decides the learning rate (as a multiple of the language model's), the batch and the weight of "
        "the LM loss: pmp 0.1, 512 and 1; finetune 0.01, 32 and 0 (the rates and the 32 are the paper's, the "
        "512 and the 1 are ours; default: finetune)")
    add("--binarise", action="store_true",
        help="turn ranked pairs into independent ones with control texts, see above")
    add("--chat", action="store_true",
        help="write Human/Assistant dialogues by the chat template of --init (default: as they stand)")
    add("--no_eoc", action="store_true",
        help="write no <eoc> (end of context) behind completions, and read the reward at a completion's own "
        "last token")
    add("--lm_weight", type=plan.between(float, 0, math.inf),
        help="weight of the LM loss on the best completion, which is added to the preference loss (default: "
        "the stage's)")
    selection.add_flags(parser)
    plan.add_training_flags(
        parser, batch=None, batch_unit="comparisons", schedule="constant", warmup=0.0,
        batch_default="the stage's, or less: a hundredth of the training comparisons, but at least 8, so "
        "that an epoch has enough steps",
        lr_default="the stage's multiple of the rate of the language model that --init comes from; below "
        "100M parameters 0.1 times that rate in both stages")
    return plan.fill_fresh(parser.parse_args(), size="0.8m", tokenizer="bytes")


def main():
    args = parse_args()
    check_flags(args)
    ranks = start(args.device)
    toy_name = "binary.jsonl" if args.objective == "binary" else "ranked.jsonl"
    sources = [toy.find_data([path], toy_name) for path in args.data]
    files = list(dict.fromkeys(file for source in sources for file in source))
    wants_head = args.objective != "imitation"
    resumed = trainer.resumed(args, ranks, "pm" if wants_head else "lm", files)
    model, tokenizer, earlier_meta = resumed or build_model(args, wants_head)
    plan.fit_shard(args, ranks, model)  # turns --shard auto into a number, and refuses what cannot fit
    if args.chat:
        tokenizer.use_chat()
    model.dtype = pick_dtype(args.dtype, ranks.device)
    paper_rate, paper_batch, paper_lm_weight = STAGES[args.stage]
    lm_weight = paper_lm_weight if args.lm_weight is None else args.lm_weight
    if not wants_head:
        lm_weight = 0.0  # the LM loss is all there is, so it is not added to another
    elif not lm_weight and not model.config.tied:
        model.lm_head.requires_grad_(False)  # nothing trains it

    data = load_comparisons(files, tokenizer, quiet=not ranks.main())
    control = tuple(map(tokenizer.encode, CONTROL)) if args.binarise else None
    row_format = RowFormat(model.config.ctx, tokenizer, eoc=not args.no_eoc, control=control)
    train, held_out, notes = selection.choose(args, data, sources, row_format.comparison_room)
    for note in notes:  # what is left out, and how many contexts are cut
        ranks.say(note)
    held_out_sample = held_out[spread(len(held_out), EVAL_COMPARISONS)]

    batch = args.batch or min(paper_batch, max(8, len(train) // 100))
    lm_lr = (earlier_meta or {}).get("lm_lr") or plan.lm_rate(model.config.d_model)
    lr = args.lr or plan.stage_rate(model, lm_lr, paper_rate)
    steps_per_epoch = math.ceil(len(train) / batch)
    n_steps = args.steps or math.ceil(args.epochs * steps_per_epoch)
    micro_tokens = plan.micro_tokens(args, model, ranks)
    objective = "binarised" if args.binarise else args.objective
    unit, metric_names = MEAN_OVER[objective]
    predict = "best" if lm_weight or not wants_head else None

    def training_row(examples, kept):
        row = make_row(data, examples, row_format, kept, predict)
        if lm_weight:
            row.token_weight = lm_token_weights(row, objective)
        return row

    def micro_batches(step, rank=ranks.rank):
        epoch, numbers = step_examples(len(train), batch, args.seed, step)
        examples = train[numbers]
        kept = [selection.completions_to_keep(data.scores(i), args, epoch, i) for i in examples]
        lengths = packed_lengths(data, examples, row_format, kept)
        # Each row is a list of places in `examples` and `kept`. Ranks may have different numbers of rows;
        # trainer.py lets those with fewer repeat one.
        rows = pack_for_rank(lengths, micro_tokens, rank, ranks.world)
        return [training_row(examples[row], [kept[i] for i in row]) for row in rows]

    def loss(model, row):
        return comparison_loss(model, row, objective, lm_weight)

    def evaluate(model):
        return held_out_figures(model, data, held_out_sample, objective, row_format, micro_tokens, ranks)

    def where(row):
        return ", ".join(data.where(i) for i in row.examples)

    mean_length, longest, longest_kept, longest_length = selection.measure_rows(args, data, train, row_format)
    # A comparison that is longer than a micro-batch has a row to itself. trainer.py tries it before step 1.
    largest = training_row([longest], [longest_kept]) if longest_length > micro_tokens else None
    plan.print_plan(args, ranks, model, n_steps, lr, micro_tokens, [
        f"data: {len(train):,} training comparisons, {len(held_out):,} held out, {len(held_out_sample):,} "
        f"of them scored at every evaluation; a step: {batch} comparisons, about {batch * mean_length:,.0f} "
        f"tokens; an epoch: {steps_per_epoch:,} steps",
        f"longest comparison: {longest_length:,} tokens, {data.where(longest)}; a comparison cannot be "
        "split, so it has to fit in memory (--max_completions makes it shorter)"],
        loss, micro_batches(0, rank=0), largest)
    trainer.train(
        args, ranks, model, tokenizer, n_steps=n_steps, lr=lr, micro_batches=micro_batches, loss=loss,
        evaluate=evaluate, where=where, unit=unit, metric_names=metric_names,
        resumed_from=earlier_meta if resumed else None,
        largest=largest,
        meta={"kind": "pm" if wants_head else "lm", "objective": args.objective, "lm_lr": lm_lr,
              "eoc": not args.no_eoc, "binarised": args.binarise, "data": content_key(files),
              "trained_on": trainer.trained_on(earlier_meta, [files], args.held_out)})


def check_flags(args):
    """Raise InputError for flags that do not go together."""
    selection.check_flags(args)
    for name, is_given in (("binarise", args.binarise), ("pairs_per_group", args.pairs_per_group != "all")):
        if args.objective != "ranked" and is_given:
            raise InputError(f"--{name} is for --objective ranked, not {args.objective}")
    if args.objective == "imitation" and (args.no_eoc or args.lm_weight):
        raise InputError("--no_eoc and --lm_weight are for preference models, not --objective imitation")


def build_model(args, wants_head):
    """(model, tokenizer, meta) from --init, or of --size and --tokenizer, without meta."""
    if args.init:
        model, tokenizer, meta = checkpoint.load(args.init, wants_head, args.seed, lazily=True)
        plan.set_ctx(model, args.ctx or min(1024, model.config.ctx))
        return model, tokenizer, meta
    text_for_bpe = toy.find_data(args.data, "lm.jsonl") if toy.is_toy(args.data) else ()
    tokenizer = get_tokenizer(args.tokenizer, text_for_bpe)
    return plan.fresh_model(args, tokenizer, args.ctx or 1024, wants_head), tokenizer, None


# ------------------------------------------------------------------------------------------------------------
# The losses


def ranked_loss(r_better, r_worse):
    """log(1 + exp(r_worse - r_better)) of each pair, in nats: (P,), (P,) -> (P,) (Section 3).

    It is -log P(better > worse), where P(better > worse) = sigmoid(r_better - r_worse).
    """
    return F.softplus(r_worse - r_better)


def binary_loss(rewards, is_good):
    """-log sigmoid(r) of good completions and -log sigmoid(-r) of bad ones, in nats: rewards (K,), is_good
    (K,) -> (K,)."""
    return F.softplus(torch.where(is_good, -rewards, rewards))


def reward_loss(rewards, row, objective):
    """(sum, count, metrics) of a row, from the rewards (K,) of its completions. MEAN_OVER says what is
    counted.

    "ranked" and "binarised" differ only in the pairs that the row brings. The weights of a comparison's pairs
    sum to 1, so each comparison counts once, however many completions it has.
    """
    if objective == "binary":
        is_good = row.scores > 0
        right = (rewards > 0) == is_good
        return binary_loss(rewards, is_good).sum(), len(rewards), {"label_accuracy": right.float().sum()}
    r_better, r_worse = rewards.index_select(0, row.better), rewards.index_select(0, row.worse)
    losses = ranked_loss(r_better, r_worse)
    return (row.pair_weight * losses).sum(), len(row.examples), {"accuracy": pairs_right(rewards, row)}


def pairs_right(scores, row):
    """How many comparisons of a row are ranked right by the scores (K,) of its completions. A tie counts
    half, and a comparison of several pairs counts by the share of them that is right."""
    margin = scores.index_select(0, row.better) - scores.index_select(0, row.worse)
    return (row.pair_weight * ((margin > 0) + 0.5 * (margin == 0))).sum()


def comparison_loss(model, row, objective, lm_weight=0.0):
    """(sum, count, metrics) of a row, in nats. MEAN_OVER says what is counted.

    lm_weight: the factor of the LM loss of each comparison's best completion (a mean over its tokens), which
    is added.
    """
    if objective == "imitation":
        hidden = model(row.tokens, row.layout)
        return predicted_loss(model, hidden, row), len(row.target), {}
    if not lm_weight:
        return reward_loss(model.rewards(model(row.tokens, row.layout, only_ends=True)), row, objective)
    hidden = model(row.tokens, row.layout)
    total, count, metrics = reward_loss(model.rewards(hidden.index_select(0, row.ends)), row, objective)
    return total + lm_weight * predicted_loss(model, hidden, row), count, metrics


def predicted_loss(model, hidden, row):
    """Weighted sum of the cross-entropy of a row's predicted tokens: hidden (T, d_model) of all tokens ->
    scalar.
    """
    return model.token_losses(hidden.index_select(0, row.source), row.tokens.index_select(0, row.target),
                              row.token_weight)[0]


def lm_token_weights(row, objective):
    """(M,) weights of the predicted tokens, those of the best completion of each comparison. The weights of
    one comparison sum to what it adds to the loss's count: to 1, or for the binary objective to its number of
    completions.
    """
    n_tokens = row.predicted.bincount()
    weights = 1 / n_tokens[row.predicted]
    if objective == "binary":
        n_completions = row.owner.bincount()
        weights = weights * n_completions[row.owner[row.predicted]]
    return weights


def held_out_figures(model, data, examples, objective, row_format, micro_tokens, ranks):
    """Loss and accuracy on held-out comparisons. The accuracy is the share of comparisons with different
    scores that are ranked right by the rewards, for imitation by the mean log-prob per token. A binarised
    model ranks the two control texts of each completion.
    """
    sums = np.zeros(4)  # of the loss, of what it counts, of comparisons ranked right, of comparisons to rank
    predict = "best" if objective == "imitation" else None
    rows = pack(packed_lengths(data, examples, row_format), micro_tokens)
    for numbers, is_counted in ranks.share(rows):  # a rank without a row repeats another's, which counts there
        row = make_row(data, examples[numbers], row_format, predict=predict)
        n_ranked = row.pair_weight.sum().item()
        if objective == "imitation":
            all_tokens = row.predicting("all").to(ranks.device)
            row = row.to(ranks.device)
            hidden = model(row.tokens, row.layout)
            loss, count = predicted_loss(model, hidden, row), len(row.target)
            scores = pm.completion_scores(model, hidden, all_tokens, "mean")
        else:
            row = row.to(ranks.device)
            scores = model.rewards(model(row.tokens, row.layout, only_ends=True))
            loss, count, _ = reward_loss(scores, row, objective)
        sums += is_counted * np.array([loss.item(), count, pairs_right(scores, row).item(), n_ranked])
    loss, count, right, n_ranked = ranks.sum(sums.tolist())
    figures = {"loss": loss / count} if count else {}
    if n_ranked:
        figures |= {"accuracy": right / n_ranked, "comparisons": round(n_ranked)}
    return figures


if __name__ == "__main__":
    run_main(main)
