"""Train a language model (Section 2 and Appendix A of the paper).

  python train_lm.py --size 0.8m --out out/lm                     the embedded toy world, minutes on a CPU
  python train_lm.py --data texts/ --tokenizer bpe:8192 --size 5m --out out/lm
  torchrun --nproc_per_node 8 train_lm.py --data texts/ --tokenizer gpt2 --size 197m --ctx 1024 --batch 524288
      --out out/lm

Text is {"text": "…"} JSON lines or .txt files. All documents form one stream, each followed by <eot>. A
training sequence is a window of --ctx tokens of that stream, so no token is padding.
"""
import argparse
import functools
import math

import torch

import checkpoint
import plan
import trainer
from data import toy
from data.errors import InputError, Parser, run_main
from data.files import content_key
from data.packing import spread
from data.text import lm_windows, load_text
from data.tokenizer import get_tokenizer
from model import SIZES
from ranks import pick_dtype, start

EVAL_TOKENS = 2**18  # held-out tokens that an evaluation reads at most
EVAL_COST = 0.2  # all evaluations together cost at most this part of the training


def parse_args():
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--data", nargs="+", default=["toy"],
        help='files or folders of text: {"text"} JSON lines or .txt, plain or compressed (.gz, .xz, .bz2, '
        ".zst); toy, or toy:SEED for another toy world (default: toy)")
    add("--init",
        help="model to start from, which brings its size and tokenizer: a checkpoint folder, a Hugging Face "
        "folder or a .gguf file of the Llama family")
    add("--size", choices=SIZES,
        help="size of a fresh model, by its parameters without embeddings (default: 0.8m)")
    add("--tokenizer",
        help="tokenizer of a fresh model: bytes, gpt2, bpe:N (trained on the data) or a .tiktoken file "
        "(default: bpe:2048)")
    add("--ctx", type=plan.positive(int), help="tokens in a sequence (default: 256, or what --init has)")
    add("--held_out", type=float, default=0.01,
        help="part of the documents that is held out for evaluation, above 0 and below 1 (default: "
        "%(default)s)")
    plan.add_training_flags(
        parser, batch=8192, batch_unit="tokens", batch_default="8192", schedule="cosine", warmup=0.03,
        lr_default="0.003 * sqrt(128 / d_model)")
    return plan.fill_fresh(parser.parse_args(), size="0.8m", tokenizer="bpe:2048")


def main():
    args = parse_args()
    ranks = start(args.device)
    files = toy.find_data(args.data, "lm.jsonl")
    resumed = trainer.resumed(args, ranks, "lm", files)
    if resumed:
        model, tokenizer, meta = resumed
    elif args.init:
        model, tokenizer, meta = checkpoint.load(args.init, value_head=False, lazily=True)
    else:
        tokenizer, meta = get_tokenizer(args.tokenizer, files), None
        model = plan.fresh_model(args, tokenizer, args.ctx or 256)
    plan.fit_shard(args, ranks, model)
    ctx = plan.set_ctx(model, args.ctx or model.config.ctx)
    model.dtype = pick_dtype(args.dtype, ranks.device)
    text, held_out = load_text(files, tokenizer, args.held_out)
    if len(held_out.tokens) < 3:  # a token to begin with, one of text, and <eot>
        raise InputError(f"{files[0]}: the held-out text is shorter than three tokens; give more text or a "
                         "larger --held_out")

    @functools.lru_cache(maxsize=2)  # of this step's epoch and of the next step's, which is made meanwhile
    def epoch_windows(epoch):  # where its windows begin, shuffled; equally many in each epoch
        return lm_windows(text, ctx, args.seed, epoch)

    batch = args.batch // ctx  # windows in a step, over all ranks; an epoch's last step may have fewer
    if batch == 0:
        raise InputError(f"--batch {args.batch} is less than one sequence of --ctx {ctx} tokens; give a "
                         "smaller --ctx or a larger --batch")
    steps_per_epoch = math.ceil(len(epoch_windows(0)) / batch)
    n_steps = args.steps or math.ceil(args.epochs * steps_per_epoch)
    lr = args.lr or plan.lm_rate(model.config.d_model)
    micro_batch = max(1, plan.micro_tokens(args, model, ranks) // ctx)  # windows
    n_evaluations = math.ceil(n_steps / (plan.eval_interval(args, n_steps) or n_steps))
    # A backward pass costs twice as much as a forward pass. So a training token costs three forward passes,
    # and a held-out token one.
    forward_passes = 3 * n_steps * batch * ctx
    eval_tokens = min(EVAL_TOKENS, int(EVAL_COST * forward_passes / n_evaluations))

    def micro_batches(step, rank=ranks.rank):
        epoch, i = divmod(step, steps_per_epoch)
        mine = epoch_windows(epoch)[i * batch:(i + 1) * batch][rank::ranks.world]
        return [windows(text, mine[j:j + micro_batch], ctx) for j in range(0, len(mine), micro_batch)]

    def loss(model, batch):
        return window_loss(model, batch), batch[:, 1:].numel(), {}

    def evaluate(model):
        return held_out_loss(model, held_out, tokenizer, ctx, eval_tokens, micro_batch, ranks)

    def where(batch):
        return f"{len(batch)} windows, the first beginning {tokenizer.decode(batch[0, :12].tolist())!r}"

    plan.print_plan(args, ranks, model, n_steps, lr, micro_batch * ctx, [
        f"data: {len(text.tokens):,} training tokens, {len(held_out.tokens):,} held out, of which an "
        f"evaluation reads at most {eval_tokens:,}; a step: {batch} x {ctx} tokens; an epoch: "
        f"{steps_per_epoch:,} steps"],
        loss, micro_batches(0, rank=0))
    trainer.train(
        args, ranks, model, tokenizer, n_steps=n_steps, lr=lr, micro_batches=micro_batches, loss=loss,
        evaluate=evaluate, where=where, unit="tokens", resumed_from=meta if resumed else None,
        meta={"kind": "lm", "objective": "lm", "lm_lr": lr, "data": content_key(files),
              "trained_on": trainer.trained_on(meta, [files], args.held_out)})


def windows(text, starts, ctx):
    """(len(starts), ctx + 1) token ids: all but the last are inputs, all but the first are targets."""
    return torch.stack([torch.from_numpy(text.tokens[s:s + ctx + 1].astype("int64")) for s in starts])


def window_loss(model, batch):
    """Summed cross-entropy in nats of the windows (n, ctx + 1)."""
    inputs, targets = batch[:, :-1], batch[:, 1:]
    return model.token_losses(model(inputs).flatten(0, 1), targets.flatten())[0]


def held_out_loss(model, text, tokenizer, ctx, eval_tokens, micro_batch, ranks):
    """Mean loss in nats a token and in bits a byte, on windows of ctx tokens that are spread evenly over the
    held-out text. If it has at most `eval_tokens` tokens they cover all of it, but for a last part that is
    shorter than a window."""
    ctx = min(ctx, len(text.tokens) - 1)
    n_windows = (len(text.tokens) - 1) // ctx
    starts = [ctx * i for i in spread(n_windows, max(1, eval_tokens // ctx))]
    total, n_bytes = 0.0, 0
    micro_batches = [starts[i:i + micro_batch] for i in range(0, len(starts), micro_batch)]
    for mine, is_counted in ranks.share(micro_batches):  # not counted: one that another rank counts
        batch = windows(text, mine, ctx)
        batch_loss = window_loss(model, batch.to(ranks.device)).item()
        if is_counted:
            total, n_bytes = total + batch_loss, n_bytes + tokenizer.count_bytes(batch[:, 1:].numpy())
    total, n_bytes = ranks.sum([total, n_bytes])
    n_tokens = len(starts) * ctx
    return {"loss": total / n_tokens, "bits_per_byte": total / math.log(2) / n_bytes, "tokens": n_tokens}


if __name__ == "__main__":
    run_main(main)
