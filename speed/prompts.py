"""What evaluate.py, distill.py and chat.py do behind a long prompt, beside reading it anew for each text."""
import functools
from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence

import distill
from data.comparisons import load_comparisons
from data.packing import RowFormat
from data.prompts import load_prompt
from evals import pm
from evals.choices import HHH_ITEMS
from kv_cache import read
from sampling import generate
from speed.race import make_model, race, table, training

ROOM = 2192  # tokens that there is room for behind the prompt
MICRO_TOKENS = 8192  # tokens in a row of scoring or of the teacher


def measure_prompt(args, ranks, config, tokenizer, dtype):
    items = load_comparisons([HHH_ITEMS], tokenizer)
    prompt = np.resize(tokenizer.encode(load_prompt("hhh")), args.prompt_tokens).astype(np.int64)
    config = replace(config, ctx=len(prompt) + ROOM)
    model = make_model(config, dtype, ranks.device).freeze(dtype)
    return {"prompt_tokens": len(prompt),
            "scoring": measure_scoring(args, ranks, model, items, tokenizer, prompt),
            "distillation": measure_distillation(args, ranks, model, config, items, prompt, dtype),
            "sampling": measure_sampling(args, ranks, model, prompt[:300])}


def measure_scoring(args, ranks, model, items, tokenizer, prompt):
    """Log-probs of all completions of the HHH items, given the prompt and their context."""
    texts = []  # (token ids, how many of them are the completion's)
    for context, *completions in map(items.segments, range(len(items))):
        texts += [(np.concatenate([prompt, context, ids]), len(ids)) for ids in completions]

    def ours(r):
        prefix = read(model, prompt)[0].as_prefix()
        row_format = RowFormat(ROOM, tokenizer)
        pm.score_all(model, items, np.arange(len(items)), "sum", row_format, MICRO_TOKENS, prefix=prefix)

    def naive(r):
        batch = [texts[(8 * r + i) % len(texts)] for i in range(8)]
        tokens = pad_sequence([torch.from_numpy(ids) for ids, _ in batch], batch_first=True).to(ranks.device)
        for hidden, own, (ids, n) in zip(model(tokens), tokens, batch):
            log_p = model.logits(hidden[len(ids) - n - 1:len(ids) - 1]).float().log_softmax(-1)
            log_p.gather(1, own[len(ids) - n:len(ids), None]).sum()

    slow = f"naive, batch of 8 (8 of {len(texts)}, scaled)"
    candidates = {slow: (8, naive), "prompt once + packed rows": (len(texts), ours)}
    figures = race(candidates, args.rounds, ranks.device)
    title = f"Scoring {len(items)} items behind {len(prompt):,} tokens"
    return table(title, "completions", figures, {"x naive": [slow]})


def measure_distillation(args, ranks, teacher, config, items, prompt, dtype):
    """Steps of distillation on 32 sequences of 128 tokens."""
    prefix = read(teacher, prompt)[0].as_prefix()
    text = np.asarray(items.tokens, np.int64)
    stored = {}  # {round: the teacher's distributions}

    def sequences(r):
        starts = np.random.default_rng(r).integers(len(text) - 128, size=32)
        return [text[start:start + 128] for start in starts]

    @torch.no_grad()
    def ask_teacher(r):
        row = distill.SequenceRow(range(32), sequences(r)).to(ranks.device)
        hidden = teacher(row.tokens, row.layout, prefix)
        stored[r] = [distill.top_classes(teacher.logits(part)) for part in hidden.split(1024)]

    def stored_loss(model, r):
        row = distill.SequenceRow(range(32), sequences(r)).to(ranks.device)
        ids, log_p = (torch.cat(parts) for parts in zip(*stored.pop(r)))
        return distill.top_kl(model, model(row.tokens, row.layout), ids, log_p)[0], len(row.tokens)

    def naive_loss(model, r):
        alone = torch.from_numpy(np.stack(sequences(r)[:2])).to(ranks.device)  # (2, 128)
        before = torch.from_numpy(prompt).to(ranks.device).expand(2, -1)
        with torch.no_grad():
            taught = teacher(torch.cat([before, alone], 1))[:, len(prompt):]
            log_p = teacher.logits(taught).float().log_softmax(-1)
        log_q = model.logits(model(alone)).float().log_softmax(-1)
        return F.kl_div(log_q, log_p, reduction="sum", log_target=True), alone.numel()

    naive = "naive (2 of 32, scaled)"
    making, learning = "making the teacher's cache", "training on the cache"
    step = training(make_model(config, dtype, ranks.device))
    figures = race({naive: (2, functools.partial(step, naive_loss)), making: (32, ask_teacher),
                    learning: (32, functools.partial(step, stored_loss))}, args.rounds, ranks.device)
    (speeds, memory), (more_speeds, more_memory) = figures[making], figures[learning]
    more_memory = memory and max(memory, more_memory)
    figures["both, for a single epoch"] = 1 / (1 / speeds + 1 / more_speeds), more_memory
    title = f"Distilling 32 x 128 tokens behind {len(prompt):,}"
    return table(title, "sequences", figures, {"x naive": [naive]})


def measure_sampling(args, ranks, model, prompt):
    """100 samples of 64 tokens, all together or one at a time."""
    def candidate(n):
        def work(r):
            generate(model, [prompt], n, max_new=64)
        return n, work

    alone = "one at a time (1 of 100, scaled)"
    figures = race({alone: candidate(1), "n = 100": candidate(100)}, args.rounds, ranks.device)
    title = f"Sampling 100 x 64 tokens behind {len(prompt)}"
    return table(title, "samples", figures, {"x alone": [alone]})
