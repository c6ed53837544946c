"""Measure speed and memory: preference-model training, LM training, and this machine's matrix products to judge them by.

  python bench.py                                                            everything, on the toy world, a few minutes
  python bench.py pm --data hh-rlhf/harmless-base --tokenizer gpt2 --compile --out results/bench.json
  PYTHONPATH=folder-with-trl python bench.py pm …                            times TRL's RewardTrainer as well

pm trains on pairs (the best and the worst completion of each comparison) in several ways that compute the same rewards:
  naive padded             each completion with its context, padded on the right to the longest sequence of the batch
  packed                   each completion with its context, end to end in rows without padding
  packed + shared prefix   what train_pm.py does: each context once
lm trains on full windows of tokens: what train_lm.py does, beside a plain loop in the manner of nanoGPT.

Every timed step is whole: laying out the batch, forward, backward, clipping, AdamW. The candidates take turns, round by
round and on the same examples, so that a slow minute of the machine slows all of them. MFU is the arithmetic of the tokens that
were computed (6 x parameters x tokens, and attention's) against the matrix peak; "useful" counts only what the least
layout, packed with a shared prefix, needs. Prints tables and, last, one JSON line.
"""
import argparse
import copy
import dataclasses
import datetime
import importlib.util
import json
import os
import platform
import resource
import shlex
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

import checkpoint
import trainer
from data import toy
from data.comparisons import load_comparisons
from data.errors import InputError, run_main
from data.files import write_file
from data.packing import epoch_order, make_row, pack
from data.tokenizer import get_tokenizer
from model import GPT, SIZES, Config, Layout
from train_pm import comparison_loss, ranked_loss

TRL_BATCHES = (8, 32)  # pairs a step


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", nargs="?", choices=("all", "pm", "lm"), default="all", help="what to measure (default: %(default)s)")
    parser.add_argument("--data", nargs="+", default=["toy"], help="comparison files or folders, or toy (default: toy)")
    parser.add_argument("--size", choices=SIZES, default="3m", help="of the model (default: %(default)s)")
    parser.add_argument("--tokenizer", default="bytes", help="bytes, gpt2 or a .tiktoken file (default: %(default)s)")
    parser.add_argument("--ctx", type=trainer.positive(int), default=1024, help="tokens a sequence (default: %(default)s)")
    parser.add_argument("--batch", type=trainer.positive(int), default=32, help="pairs in an optimizer step of pm (default: %(default)s)")
    parser.add_argument("--lm_batch", type=trainer.positive(int), default=8192, help="tokens in an optimizer step of lm (default: %(default)s)")
    parser.add_argument("--steps", type=trainer.positive(int), default=2, help="optimizer steps of each candidate in a round (default: %(default)s)")
    parser.add_argument("--rounds", type=trainer.positive(int), default=5, help="timed rounds, after one that is not counted (default: %(default)s)")
    parser.add_argument("--compile", action="store_true", help="time compiled models too; takes minutes to start")
    parser.add_argument("--out", help="file for the JSON line")
    trainer.add_device_flags(parser)
    return parser.parse_args()


def main():
    args = parse_args()
    ranks = trainer.start(args.device)
    if args.compile and ranks.device.type == "cpu" and not (shutil.which("g++") or shutil.which("clang++")):
        raise InputError("--compile needs a C++ compiler on a CPU: install g++, or leave --compile out")
    if args.lm_batch < args.ctx:
        raise InputError(f"--lm_batch {args.lm_batch} is less than one sequence of --ctx {args.ctx} tokens")
    tokenizer = get_tokenizer(args.tokenizer)
    data = load_comparisons(toy.find_data(args.data, "ranked.jsonl"), tokenizer)
    usable = np.flatnonzero(data.fits(args.ctx) & data.differ())
    if not len(usable):
        raise InputError(f"{data.files[0]}: no comparison with a better and a worse completion fits in --ctx {args.ctx}")
    dtype = trainer.pick_dtype(args.dtype, ranks.device)
    result = {"date": datetime.datetime.now().astimezone().isoformat(timespec="seconds"), "command": shlex.join(["python", *sys.argv]),
              "machine": machine(ranks.device), "peak_gflops": {name: matrix_peak(getattr(torch, name), ranks.device) for name in ("bfloat16", "float32")},
              "dtype": str(dtype).removeprefix("torch."), "size": args.size, "vocab_size": tokenizer.vocab_size, "ctx": args.ctx}
    print(", ".join(f"{k} {v}" for k, v in result["machine"].items()))
    print("matrix peak: " + ", ".join(f"{v:,.0f} GFLOP/s {k}" for k, v in result["peak_gflops"].items()), flush=True)
    peak = 1e9 * result["peak_gflops"][result["dtype"]]

    def fresh(value_head):
        config = Config(*SIZES[args.size], tokenizer.vocab_size, args.ctx, value_head=value_head)
        model = GPT(config).init_weights(seed=0).to(ranks.device)
        model.dtype = dtype
        return model

    if args.part in ("all", "pm"):
        result["pm"] = measure_pm(args, ranks, fresh(True), Pairs(data, usable, args, tokenizer), peak)
    if args.part in ("all", "lm"):
        result["lm"] = measure_lm(args, ranks, fresh(False), data.tokens, peak)
    line = json.dumps(result)
    if args.out:
        write_file(args.out, line + "\n")
    print(line)


# ---------------------------------------------------------------------------------------------------------------------
# Measuring


def machine(device):
    names = [line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")] \
        if Path("/proc/cpuinfo").exists() else [platform.processor()]
    gpu = {"gpu": torch.cuda.get_device_name(device)} if device.type == "cuda" else {}
    return {**gpu, "cpu": names[0], "cores": os.cpu_count(), "threads": torch.get_num_threads(), "torch": torch.__version__}


def matrix_peak(dtype, device):
    """The fastest large matrix product found, in GFLOP/s."""
    best = 0.0
    for n in (1024, 2048, 3072) if device.type == "cpu" else (4096, 8192, 16384):
        a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
        for _ in range(6):
            begun = clock(device)
            F.linear(a, b)
            best = max(best, 2 * n**3 / (clock(device) - begun) / 1e9)
    return best


def clock(device):
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def reset_peak_memory(device):
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif os.access("/proc/self/clear_refs", os.W_OK):
        Path("/proc/self/clear_refs").write_text("5")  # Linux: the peak starts again from what is resident now


def peak_memory(device):
    """GiB since the last reset; on a CPU of the whole process, and where the peak cannot be reset, since its start."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    if os.access("/proc/self/clear_refs", os.W_OK):
        return int(next(s for s in Path("/proc/self/status").read_text().splitlines() if s.startswith("VmHWM")).split()[1]) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**30 if sys.platform == "darwin" else 2**20)


def race(candidates, batches_of, args, device):
    """Let all candidates run every round's batches in turn. candidates: {name: run(batches) -> seconds}.

    Returns {name: {"seconds": one figure a round, "peak_memory_gib"}}. Round 0 warms up and is not counted.
    """
    figures = {name: {"seconds": [], "peak_memory_gib": 0.0} for name in candidates}
    for r in range(args.rounds + 1):
        for name, run in candidates.items():
            reset_peak_memory(device)
            seconds = run(batches_of(r))
            if r:
                figures[name]["seconds"].append(seconds)
                figures[name]["peak_memory_gib"] = max(figures[name]["peak_memory_gib"], peak_memory(device))
                print(f"round {r}/{args.rounds} {name}: {seconds:.2f} s", file=sys.stderr, flush=True)
    return figures


def stepper(model, loss, device, ranks, compiled=False):
    """run(batches) -> seconds: an optimizer step for each batch. loss(model, batch) yields (sum, count) a micro-batch."""
    model = copy.deepcopy(model)
    for block in model.model.layers if compiled else ():
        block.compile(dynamic=True)  # as trainer.py does
    parameters = list(model.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=1e-5, betas=(0.9, 0.95), weight_decay=0.1, fused=True)

    def run(batches):
        begun = clock(device)
        for batch in batches:
            count = 0
            for batch_sum, batch_count in loss(model, batch):
                batch_sum.backward()
                count += batch_count
            trainer.scale_and_clip(parameters, count, 1.0, ranks)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return clock(device) - begun
    return run


def training_flops(model, tokens, seen, matrices=0):
    """tokens: computed; seen: pairs of a token and one it attends to; matrices: parameters of the output layer, if used.

    A parameter costs 2 operations a token forward and 4 backward; a pair of tokens 12 d_model in each layer.
    """
    return 6 * (model.n_params()[0] + matrices) * tokens + 12 * model.config.n_layer * model.config.d_model * seen


def report(title, unit, figures, amounts, work, peak, useful=None):
    """Print a table and return its rows. amounts: units a round; work: {name: (tokens, flops)} a round; a candidate that is not in
    `work` has a tokenizer's eye view of its own, so no MFU. useful: the least flops a round."""
    first = statistics.median(next(iter(figures.values()))["seconds"])
    rows = {}
    for name, f in figures.items():
        median = statistics.median(f["seconds"])
        rows[name] = {f"{unit}_per_second": amounts / median, "min": amounts / max(f["seconds"]), "max": amounts / min(f["seconds"]),
                      "ratio": first / median, "peak_memory_gib": f["peak_memory_gib"]}
        if name in work:
            tokens, flops = work[name]
            rows[name] |= {f"tokens_per_{unit[:-1]}": tokens / amounts, "mfu": flops / median / peak, "useful": (useful or flops) / median / peak}
    print(f"\n{title}\n{'':34}{unit + '/s':>10} {'min - max':>19} {'ratio':>7} {'computed':>9} {'MFU':>6} {'useful':>7} {'GiB':>6}")
    for name, row in rows.items():
        extra = f"{row[f'tokens_per_{unit[:-1]}']:9.0f} {row['mfu']:6.1%} {row['useful']:7.1%}" if "mfu" in row else " " * 24
        print(f"{name:34}{row[f'{unit}_per_second']:10,.1f} {row['min']:9,.1f} - {row['max']:7,.1f} {row['ratio']:6.2f}x {extra} {row['peak_memory_gib']:6.2f}")
    print(flush=True)
    return rows


# ---------------------------------------------------------------------------------------------------------------------
# Preference models


class Pairs:
    """The best and the worst completion of each comparison, batch by batch, and three ways to lay them out."""

    def __init__(self, data, usable, args, tokenizer):
        self.data, self.usable, self.args, self.tokenizer = data, usable, args, tokenizer

    def batches(self, r):
        """The comparisons of round r: `steps` arrays of `batch` numbers."""
        start, size = r * self.args.steps * self.args.batch, self.args.steps * self.args.batch
        order = self.usable[epoch_order(len(self.usable), 0, 0)]
        return np.split(order[np.arange(start, start + size) % len(order)], self.args.steps)

    def chosen(self, examples):
        return [[int(s.argmax()), int(s.argmin())] for s in map(self.data.scores, examples)]

    def sequences(self, examples):
        """[context + better + <eoc>, context + worse + <eoc>] of each comparison in turn, contexts cut as make_row cuts them."""
        result = []
        for example, keep in zip(examples, self.chosen(examples)):
            context, *completions = self.data.segments(example)
            context = context[max(0, len(context) + max(map(len, completions)) + 1 - self.args.ctx):]
            context = context if len(context) else [self.tokenizer.eot]
            result += [np.concatenate([context, completions[k], [self.tokenizer.eoc]]).astype(np.int64) for k in keep]
        return result

    def padded(self, examples, at_once, device):
        """Yield (tokens (B, T), None, ends (B,)): ends point into the flattened tokens."""
        sequences = self.sequences(examples)
        tokens = torch.full((len(sequences), max(map(len, sequences))), self.tokenizer.eot)
        for row, sequence in zip(tokens, sequences):
            row[:len(sequence)] = torch.from_numpy(sequence)
        ends = torch.tensor([i * tokens.shape[1] + len(s) - 1 for i, s in enumerate(sequences)])
        yield tokens.to(device), None, ends.to(device)

    def packed(self, examples, at_once, device):
        sequences = self.sequences(examples)
        pairs = list(zip(sequences[::2], sequences[1::2]))
        for numbers in pack([len(a) + len(b) for a, b in pairs], at_once):
            parts = [s for i in numbers for s in pairs[i]]
            layout = Layout([len(s) for s in parts], range(len(parts)))
            yield torch.from_numpy(np.concatenate(parts)).to(device), layout, torch.tensor(layout.starts[1:]).to(device) - 1

    def shared(self, examples, at_once, device):
        chosen = self.chosen(examples)
        for numbers in pack(self.data.packed_lengths(examples, chosen, self.args.ctx), at_once):
            yield make_row(self.data, examples[numbers], [chosen[i] for i in numbers], self.args.ctx, self.tokenizer).to(device)


def measure_pm(args, ranks, model, pairs, peak):
    """{candidate: figures} of preference-model training."""
    device, at_once = ranks.device, trainer.micro_tokens(args, model, ranks.device)

    def shared_loss(model, examples):
        for row in pairs.shared(examples, at_once, device):
            yield comparison_loss(model, model(row.tokens, row.layout), row, "ranked")[:2]

    def plain_loss(build):
        def loss(model, examples):
            for tokens, layout, ends in build(examples, at_once, device):
                rewards = model.rewards(model(tokens, layout).flatten(0, -2)[ends])
                yield ranked_loss(rewards[::2], rewards[1::2]).sum(), len(rewards) // 2
        return loss

    losses = {"naive padded": plain_loss(pairs.padded), "packed": plain_loss(pairs.packed), "packed + shared prefix": shared_loss}
    check_equal(model, losses, pairs.batches(0)[0])
    candidates = {name: stepper(model, loss, device, ranks) for name, loss in losses.items()}
    if args.compile:
        candidates["packed + shared prefix, compiled"] = stepper(model, shared_loss, device, ranks, compiled=True)
    if importlib.util.find_spec("trl"):
        candidates |= {f"TRL RewardTrainer, batch {n}": trl_stepper(model, pairs, n, device) for n in TRL_BATCHES}
    figures = race(candidates, pairs.batches, args, device)

    # The rounds hold the same numbers of pairs but not of tokens: what the candidates computed is the mean over rounds.
    work = {name: np.zeros(2) for name in losses}
    for examples in (b for r in range(1, args.rounds + 1) for b in pairs.batches(r)):
        for name, build in zip(losses, (pairs.padded, pairs.packed, pairs.shared)):
            for batch in build(examples, at_once, "cpu"):
                tokens, layout = (batch.tokens, batch.layout) if name == "packed + shared prefix" else batch[:2]
                seen = (layout.positions + 1).sum().item() if layout is not None else len(tokens) * tokens.shape[1] * (tokens.shape[1] + 1) / 2
                work[name] += np.array([tokens.numel(), training_flops(model, tokens.numel(), seen)]) / args.rounds
    work["packed + shared prefix, compiled"] = work["packed + shared prefix"]
    n = args.steps * args.batch
    title = f"Preference-model training, {args.batch} pairs a step: pairs/s, median of {args.rounds} rounds; ratio to naive padded"
    rows = report(title, "pairs", figures, n, work, peak, useful=work["packed + shared prefix"][1])
    trl = max((row["pairs_per_second"] for name, row in rows.items() if "TRL" in name), default=None)
    for name in rows if trl else ():
        rows[name]["ratio_to_trl"] = rows[name]["pairs_per_second"] / trl
        print(f"{name}: {rows[name]['ratio_to_trl']:.2f} x TRL at its better batch")
    return rows


def check_equal(model, losses, examples):
    """All layouts must compute the same loss and gradient, or their speeds are not comparable."""
    model = copy.deepcopy(model)
    model.dtype = torch.float32
    found = {}
    for name, loss in losses.items():
        model.zero_grad()
        total = sum((s.backward(), s.item())[1] for s, _ in loss(model, examples))
        found[name] = total, model.score.weight.grad.clone(), model.model.layers[0].mlp.up_proj.weight.grad.clone()
    first = found["naive padded"]
    for name, values in found.items():
        for a, b in zip(first, values):
            torch.testing.assert_close(torch.as_tensor(b), torch.as_tensor(a), rtol=1e-3, atol=1e-4, msg=lambda m: f"{name} differs from naive padded: {m}")


def trl_stepper(model, pairs, batch, device):
    """TRL's RewardTrainer on the same shape, weights, tokens and precision, its settings otherwise its defaults, but for what
    would slow it down: no gradient checkpointing, logging or saving."""
    import datasets
    import transformers
    import trl
    transformers.logging.set_verbosity_error()
    datasets.disable_progress_bars()
    eot = pairs.tokenizer.eot
    vocabulary = {f"<{i}>": i for i in range(eot)} | {"<eot>": eot, "<eoc>": eot + 1}
    from tokenizers import Tokenizer, models
    words = transformers.PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(vocabulary, "<eot>")), pad_token="<eot>", eos_token="<eoc>")

    class StepTimes(transformers.TrainerCallback):
        def __init__(self):
            self.times = []

        def on_step_end(self, args, state, control, **kwargs):
            self.times.append(clock(device))

    def run(batches):
        sequences = pairs.sequences(np.concatenate(batches))
        examples = [{"chosen_ids": a.tolist(), "rejected_ids": b.tolist()} for a, b in zip(sequences[::2], sequences[1::2])]
        n_steps = len(examples) // batch
        net = transformers.LlamaForSequenceClassification(transformers.LlamaConfig(**checkpoint.hf_config(model.config, eot)))
        net.load_state_dict(model.state_dict())
        times = StepTimes()
        with tempfile.TemporaryDirectory() as folder:
            config = trl.RewardConfig(
                output_dir=folder, per_device_train_batch_size=batch, max_steps=n_steps + 1, max_length=pairs.args.ctx,
                bf16=model.dtype == torch.bfloat16, use_cpu=device.type == "cpu", gradient_checkpointing=False,
                train_sampling_strategy="sequential", logging_strategy="no", save_strategy="no", report_to="none", disable_tqdm=True)
            # The first step, on a batch that comes twice, warms up.
            trl.RewardTrainer(net, config, train_dataset=datasets.Dataset.from_list(examples[:batch] + examples), processing_class=words,
                              callbacks=[times]).train()
        return (times.times[-1] - times.times[0]) * len(examples) / (n_steps * batch)
    return run


# ---------------------------------------------------------------------------------------------------------------------
# Language models


class PlainGPT(nn.Module):
    """The yardstick: GPT-2 as nanoGPT writes it, without dropout and biases, of the same width, depth and vocabulary."""

    def __init__(self, config):
        super().__init__()
        d = config.d_model
        self.wte, self.wpe = nn.Embedding(config.vocab_size, d), nn.Embedding(config.ctx, d)
        self.blocks = nn.ModuleList(PlainBlock(d, config.n_head) for _ in range(config.n_layer))
        self.norm = nn.LayerNorm(d, bias=False)
        self.head = nn.Linear(d, config.vocab_size, bias=False)
        for p in self.parameters():
            if p.dim() == 2:
                nn.init.normal_(p, std=0.02)
        self.head.weight = self.wte.weight

    def forward(self, inputs, targets):
        x = self.wte(inputs) + self.wpe(torch.arange(inputs.shape[1], device=inputs.device))
        for block in self.blocks:
            x = block(x)
        return F.cross_entropy(self.head(self.norm(x)).flatten(0, 1), targets.flatten())


class PlainBlock(nn.Module):
    def __init__(self, d, n_head):
        super().__init__()
        self.n_head = n_head
        self.norm_1, self.norm_2 = nn.LayerNorm(d, bias=False), nn.LayerNorm(d, bias=False)
        self.qkv, self.proj = nn.Linear(d, 3 * d, bias=False), nn.Linear(d, d, bias=False)
        self.up, self.down = nn.Linear(d, 4 * d, bias=False), nn.Linear(4 * d, d, bias=False)

    def forward(self, x):
        q, k, v = (part.unflatten(-1, (self.n_head, -1)).transpose(1, 2) for part in self.qkv(self.norm_1(x)).chunk(3, -1))
        x = x + self.proj(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(-2))
        return x + self.down(F.gelu(self.up(self.norm_2(x))))


def plain_stepper(config, dtype, at_once, device, compiled=False):
    """run(batches) -> seconds, with autocast and nn.utils.clip_grad_norm_, `at_once` sequences in a micro-batch."""
    model = PlainGPT(config).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    forward = torch.compile(model) if compiled else model

    def run(batches):
        begun = clock(device)
        for batch in batches:
            for part in batch.split(at_once):
                with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                    loss = forward(part[:, :-1], part[:, 1:])
                (loss * (len(part) / len(batch))).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return clock(device) - begun
    return run


def measure_lm(args, ranks, model, stream, peak):
    """{candidate: figures} of LM training on windows of a stream of tokens."""
    device, config = ranks.device, model.config
    n_windows = args.lm_batch // args.ctx
    at_once = max(1, trainer.micro_tokens(args, model, device) // args.ctx)

    def batches(r):
        starts = np.random.default_rng(r).integers(max(1, len(stream) - args.ctx), size=(args.steps, n_windows))
        return [torch.stack([torch.from_numpy(np.resize(stream[s:s + args.ctx + 1], args.ctx + 1).astype(np.int64)) for s in row]).to(device)
                for row in starts]

    def loss(model, batch):
        for part in batch.split(at_once):
            yield model.token_losses(model(part[:, :-1]).flatten(0, 1), part[:, 1:].flatten())[0], part[:, 1:].numel()

    candidates = {"plain loop": plain_stepper(config, model.dtype, at_once, device), "train_lm.py": stepper(model, loss, device, ranks)}
    if args.compile:
        candidates["plain loop, compiled"] = plain_stepper(config, model.dtype, at_once, device, compiled=True)
        candidates["train_lm.py, compiled"] = stepper(model, loss, device, ranks, compiled=True)
    figures = race(candidates, batches, args, device)
    tokens = args.steps * n_windows * args.ctx
    flops = training_flops(model, tokens, tokens * (args.ctx + 1) / 2, matrices=config.d_model * config.vocab_size)
    title = f"LM training, {n_windows} x {args.ctx} tokens a step: tokens/s, median of {args.rounds} rounds; ratio to the plain loop"
    return report(title, "tokens", figures, tokens, {name: (tokens, flops) for name in candidates}, peak)


if __name__ == "__main__":
    run_main(main)
