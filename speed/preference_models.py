"""Steps of preference models on pairs, in three layouts that give the same loss and gradient."""
import functools
from dataclasses import replace

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence

import plan
from data import toy
from data.comparisons import load_comparisons
from data.errors import InputError
from data.packing import RowFormat, epoch_order, make_row
from ranks import device_memory
from speed.race import make_model, race, table, training
from speed.trl_trainer import trl_candidates
from train_pm import comparison_loss, ranked_loss


def measure_pm(args, ranks, config, tokenizer, dtype):
    data = load_comparisons(toy.find_data(args.data, "ranked.jsonl"), tokenizer)
    pairs = Pairs(args, data, tokenizer, ranks.device)
    config = replace(config, value_head=True, tied=True)
    losses = {"naive padded": pairs.padded_loss, "packed": pairs.packed_loss,
              "packed + shared prefix": pairs.shared_loss}
    step = training(make_model(config, dtype, ranks.device))
    candidates = {name: (args.batch, functools.partial(step, loss)) for name, loss in losses.items()}
    layouts = list(candidates)
    if args.compile:
        compiled_step = training(make_model(config, dtype, ranks.device, compiled=True))
        layouts.append("packed + shared prefix, compiled")
        candidates[layouts[-1]] = args.batch, functools.partial(compiled_step, pairs.shared_loss)
    trl = trl_candidates(config, dtype, pairs)
    candidates |= trl
    baselines = {"x naive": ["naive padded"], "x TRL": list(trl)}
    tokens = np.mean([pairs.tokens(r) for r in range(1, args.rounds + 1)], 0)
    figures = race(candidates, args.rounds, ranks.device)
    return table(f"Preference model, {args.batch} pairs a step", "pairs", figures, baselines,
                 more={"tokens": ("{:,.0f}", dict(zip(layouts, tokens.tolist())))})


class Pairs:
    """The best and the worst completion of --batch comparisons a round, and their loss in each layout."""

    def __init__(self, args, data, tokenizer, device):
        self.data, self.batch, self.device = data, args.batch, device
        self.row_format = RowFormat(args.ctx, tokenizer)
        usable = np.flatnonzero(data.fits(args.ctx) & data.differ())
        if not len(usable):
            raise InputError(f"{data.files[0]}: no comparison with a better and a worse completion fits in "
                             f"--ctx {args.ctx}")
        self.order = usable[epoch_order(len(usable), seed=0, epoch=0)]

    def row(self, r, shared):
        """Round r's comparisons, each with its best and its worst completion: both behind one context, or
        each behind a context of its own."""
        numbers = self.order[np.arange(r * self.batch, (r + 1) * self.batch) % len(self.order)]
        kept = [[int(x.argmax()), int(x.argmin())] for x in map(self.data.scores, numbers)]
        if not shared:
            numbers, kept = np.repeat(numbers, 2), [[completion] for pair in kept for completion in pair]
        return make_row(self.data, numbers, self.row_format, kept)

    def sequences(self, r):
        """The tokens of context, completion and <eoc>, of each pair's best and worst in turn."""
        row = self.row(r, shared=False)
        return row.tokens.split(np.diff(row.ends, prepend=-1).tolist())

    def tokens(self, r):
        """Tokens computed for a pair: padded, packed, with shared prefix, and the same compiled."""
        packed, shared = (len(self.row(r, shared).tokens) / self.batch for shared in (False, True))
        return 2 * max(map(len, self.sequences(r))), packed, shared, shared

    def padded_loss(self, model, r):
        sequences = self.sequences(r)
        tokens = pad_sequence(sequences, batch_first=True).to(self.device)  # (2 B, T)
        need = tokens.numel() * plan.token_bytes(model.config, self.device)
        # The system would kill this process.
        if self.device.type == "cpu" and need > device_memory(self.device):
            raise MemoryError(f"{tokens.numel():,} tokens take about {need / 2**30:.0f} GiB")
        hidden = model(tokens)  # (2 B, T, d)
        return pair_loss(model, torch.stack([own[len(ids) - 1] for own, ids in zip(hidden, sequences)]))

    def packed_loss(self, model, r):
        row = self.row(r, shared=False).to(self.device)
        return pair_loss(model, model(row.tokens, row.layout).index_select(0, row.ends))

    def shared_loss(self, model, r):
        return comparison_loss(model, self.row(r, shared=True).to(self.device), "ranked", lm_weight=0.0)[:2]


def pair_loss(model, hidden):
    """(summed loss, pairs): hidden (2 B, d), final states of each pair's best and worst sequence in turn."""
    rewards = model.rewards(hidden)
    return ranked_loss(rewards[::2], rewards[1::2]).sum(), len(rewards) // 2
