"""Steps of language models on windows of random tokens, beside a plain loop in the manner of nanoGPT."""
import functools
from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F

from data.errors import InputError
from model import GPT
from speed.race import make_model, race, table, training
from train_lm import window_loss

GPT2_ROWS = 50304  # of a table for GPT-2's 50,257 tokens, with room to a multiple of 64
LM_SHAPES = ((512, 320), (1024, 320), (1024, GPT2_ROWS))  # (ctx, rows of the table): bytes, and GPT-2


class PlainGPT(GPT):
    """The same transformer with torch's attention."""

    def attend(self, layer, layout, cache, only_ends, q, k, v):
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        grouped = q.shape[1] != k.shape[1]
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped).transpose(1, 2)


def dense_loss(model, windows):
    """The window_loss of train_lm.py, with all logits in memory."""
    logits = model.logits(model(windows[:, :-1])).flatten(0, 1)
    return F.cross_entropy(logits.float(), windows[:, 1:].flatten(), reduction="sum")


def measure_lm(args, ranks, config, tokenizer, dtype):
    result = {}
    for ctx, vocab_size in ((args.ctx, config.vocab_size),) if args.init else LM_SHAPES:
        if args.lm_batch < ctx:
            raise InputError(f"--lm_batch {args.lm_batch} is less than one window of {ctx} tokens")
        shape = args.lm_batch // ctx, ctx + 1
        windows = torch.from_numpy(np.random.default_rng(0).integers(vocab_size, size=shape)).to(ranks.device)
        n_tokens = windows[:, 1:].numel()

        def candidate(kind, loss, compiled=False):
            sizes = replace(config, ctx=ctx, vocab_size=vocab_size)
            model = make_model(sizes, dtype, ranks.device, kind, compiled)
            step = training(model)
            return n_tokens, functools.partial(step, lambda model, r: (loss(model, windows), n_tokens))

        candidates = {"plain loop": candidate(PlainGPT, dense_loss),
                      "train_lm.py": candidate(GPT, window_loss)}
        if args.compile:
            candidates["plain loop, compiled"] = candidate(PlainGPT, torch.compile(dense_loss))
            candidates["train_lm.py, compiled"] = candidate(GPT, window_loss, compiled=True)
        name = f"ctx {ctx}, vocabulary {vocab_size}"
        figures = race(candidates, args.rounds, ranks.device)
        result[name] = table(f"Language model, {name}", "tokens", figures, {"x plain": ["plain loop"]})
    return result
