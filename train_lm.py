"""Train a language model (Section 2 and Appendix A of the paper).

  python train_lm.py --size 0.8m --out out/lm                                      the embedded toy world, minutes on a CPU
  python train_lm.py --data texts/ --tokenizer bpe:8192 --size 5m --out out/lm     {"text"} JSON lines or .txt files
  torchrun --nproc_per_node 8 train_lm.py --data texts/ --tokenizer gpt2 --size 197m --ctx 1024 --batch 524288 --out out/lm
"""
import argparse
import math

import torch

import checkpoint
import trainer
from data import toy
from data.errors import InputError, run_main
from data.files import content_key
from data.text import lm_windows, load_text
from data.tokenizer import get_tokenizer
from model import SIZES

EVAL_TOKENS = 2**18  # held-out tokens that an evaluation reads at most


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", nargs="+", default=["toy"], help="files or folders of text: {\"text\"} JSON lines (.gz, .xz, .bz2, .zst) or .txt; or toy (default: toy)")
    parser.add_argument("--init", help="checkpoint folder to start from; it brings its size and tokenizer")
    parser.add_argument("--size", choices=SIZES, default="0.8m", help="of a fresh model, by its non-embedding parameters (default: %(default)s)")
    parser.add_argument("--tokenizer", default="bpe:2048", help="bytes, gpt2, bpe:N (trained on the data) or a .tiktoken file (default: %(default)s)")
    parser.add_argument("--ctx", type=trainer.positive(int), help="tokens a sequence (default: 256, or that of --init)")
    parser.add_argument("--held_out", type=float, default=0.01, help="part of the documents that is held out for the loss, 0 to 1 (default: %(default)s)")
    trainer.add_training_flags(parser, batch=8192, batch_unit="tokens", lr="0.003 * sqrt(128 / d_model)", schedule="cosine", warmup=0.03)
    return parser.parse_args()


def main():
    args = parse_args()
    ranks = trainer.start(args.device)
    files = toy.find_data(args.data, "lm.jsonl")
    earlier = trainer.resumed(args, "lm", files)
    if earlier:
        model, tokenizer, meta = earlier
    elif args.init:
        model, tokenizer, meta = checkpoint.load(args.init, value_head=False)
    else:
        tokenizer, meta = get_tokenizer(args.tokenizer, files), None
        model = trainer.fresh_model(args, tokenizer, args.ctx or 256, ranks.device)
    ctx = model.config.ctx = args.ctx or model.config.ctx
    model.dtype = trainer.pick_dtype(args.dtype, ranks.device)
    text, held_out = load_text(files, tokenizer, args.held_out)
    if len(held_out.tokens) < 2:
        raise InputError(f"{files[0]}: the held-out text has a single token; give more text or a larger --held_out")

    # A step takes `batch` windows of ctx tokens, shared among the ranks; the epoch's last step may be smaller.
    batch = args.batch // ctx
    if batch == 0:
        raise InputError(f"--batch {args.batch} is less than one sequence of --ctx {ctx} tokens")
    per_epoch = -(-len(lm_windows(text, ctx, args.seed, 0)) // batch)
    n_steps = args.steps or math.ceil(args.epochs * per_epoch)
    lr = args.lr or trainer.lm_rate(model.config.d_model)
    at_once = max(1, trainer.micro_tokens(args, model, ranks.device) // ctx)
    epoch_windows = (None, None)  # (epoch, its windows): made once an epoch

    def micro_batches(step):
        nonlocal epoch_windows
        epoch, i = divmod(step, per_epoch)
        if epoch_windows[0] != epoch:
            epoch_windows = epoch, lm_windows(text, ctx, args.seed, epoch)
        mine = epoch_windows[1][i * batch:(i + 1) * batch][ranks.rank::ranks.world]
        return [windows(text, mine[j:j + at_once], ctx, ranks.device) for j in range(0, len(mine), at_once)]

    def loss(net, batch):
        inputs, targets = batch[:, :-1], batch[:, 1:].reshape(-1)
        total, _ = model.token_losses(net(inputs).flatten(0, 1), targets)
        return total, targets.numel(), {}

    def evaluate(net):
        return held_out_loss(net, held_out, tokenizer, min(ctx, len(held_out.tokens) - 1), at_once, ranks)

    def where(batch):
        return f"{len(batch)} windows, the first beginning {tokenizer.decode(batch[0, :12].tolist())!r}"

    trainer.print_plan(args, ranks, model, n_steps, lr, at_once * ctx, [
        f"data: {len(text.tokens):,} training tokens, {len(held_out.tokens):,} held out; a step: {batch} x {ctx} tokens; "
        f"an epoch: {per_epoch:,} steps"])
    trainer.train(args, ranks, model, tokenizer, n_steps=n_steps, lr=lr, micro_batches=micro_batches, loss=loss, evaluate=evaluate,
                  where=where, unit="tokens", resumed_from=meta if earlier else None,
                  meta={"kind": "lm", "objective": "lm", "lm_lr": lr, "data": content_key(files), "trained_on": trainer.trained_on(meta, files, args.held_out)})


def windows(text, starts, ctx, device):
    """(len(starts), ctx + 1) tokens: inputs are all but the last, targets all but the first."""
    return torch.stack([torch.from_numpy(text.tokens[s:s + ctx + 1].astype("int64")) for s in starts.tolist()]).to(device)


def held_out_loss(model, text, tokenizer, ctx, at_once, ranks):
    """Mean loss in nats/token and bits/byte on windows of ctx tokens spread evenly over the held-out stream: all of it where
    it has at most EVAL_TOKENS tokens."""
    starts = range(0, len(text.tokens) - ctx, ctx)
    starts = starts[::-(-len(starts) * ctx // EVAL_TOKENS)]
    mine, total, n_bytes = torch.tensor(starts[ranks.rank::ranks.world], dtype=torch.long), 0.0, 0
    for part in mine.split(at_once) if len(mine) else ():  # a rank may have none
        batch = windows(text, part, ctx, ranks.device)
        targets = batch[:, 1:].reshape(-1)
        total += model.token_losses(model(batch[:, :-1]).flatten(0, 1), targets)[0].item()
        n_bytes += tokenizer.count_bytes(targets.cpu().numpy())
    total, n_bytes = ranks.sum([total, n_bytes])
    n = len(starts) * ctx
    return {"loss": total / n, "bits_per_byte": total / math.log(2) / n_bytes, "tokens": n}


if __name__ == "__main__":
    run_main(main)
