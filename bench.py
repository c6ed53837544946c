"""Measure the speed and memory of what is done here, beside plain ways of doing the same and the machine's matrix peak.

  python bench.py                                                             all three parts, minutes on a CPU
  python bench.py pm --data hh-rlhf/harmless-base --tokenizer gpt2 --compile --out results/bench-pm.json
  pip install trl && python bench.py pm                                       times TRL's RewardTrainer as well
  python bench.py prompt --size 5m                                            scoring, distilling and sampling behind a prompt

pm trains a preference model on pairs, the best and the worst completion of each comparison, laid out in three ways that
give the same loss and gradient:
  naive padded             each completion with its context, padded on the right to the longest sequence of the batch
  packed                   each completion with its context, end to end in a row without padding
  packed + shared prefix   each context once: what train_pm.py does
lm trains on full windows of tokens as train_lm.py does, beside a plain loop in the manner of nanoGPT.
prompt does with one long prompt what evaluate.py, distill.py and chat.py do, beside reading the prompt anew for each text. The
slow side is timed on a few texts and scaled to all, as its rows' names say.

A timed step is a whole one: laying out the batch, forward, backward, clipping, AdamW. The candidates take turns round by
round on the same examples, so a slow minute of the machine slows all of them. Columns: the median of the rounds and their
range; ratios of medians; of training, tokens computed for a pair, MFU, the arithmetic of these tokens (6 x parameters, and
attention's) against the matrix peak, and useful, the same for the arithmetic that the least layout needs; GiB, the peak on
top of what was there before (TRL builds its model anew, so its weights are in it). Prints tables and, last, one JSON line.
"""
import argparse
import contextlib
import copy
import ctypes
import datetime
import importlib.util
import json
import os
import resource
import shlex
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

import checkpoint
import distill
import plan
import trainer
from data import toy
from data.comparisons import load_comparisons
from data.errors import InputError, Parser, run_main
from data.files import write_file
from data.packing import Layout, RowFormat, TensorBatch, epoch_order, make_row, pack, packed_lengths
from data.prompts import load_prompt
from data.tokenizer import get_tokenizer
from evals import pm
from evals.choices import HHH_ITEMS
from model import GPT, SIZES, Config, read
from ranks import check_compiler, pick_dtype, start
from sampling import generate
from train_pm import comparison_loss, ranked_loss

TRL_BATCHES = (8, 32)  # pairs a step
ROOM = 2192  # tokens of context behind the prompt


def parse_args():
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", nargs="?", choices=("all", "pm", "lm", "prompt"), default="all", help="what to measure (default: %(default)s)")
    parser.add_argument("--data", nargs="+", default=["toy"], help="comparison files or folders, or toy, for pm and lm (default: toy)")
    parser.add_argument("--size", choices=SIZES, default="3m", help="of the model (default: %(default)s)")
    parser.add_argument("--tokenizer", default="bytes", help="bytes, gpt2 or a .tiktoken file (default: %(default)s)")
    parser.add_argument("--ctx", type=plan.positive(int), default=1024, help="tokens a sequence at most, of pm and lm (default: %(default)s)")
    parser.add_argument("--batch", type=plan.positive(int), default=32, help="pairs in a step of pm (default: %(default)s)")
    parser.add_argument("--lm_batch", type=plan.positive(int), default=8192, help="tokens in a step of lm (default: %(default)s)")
    parser.add_argument("--steps", type=plan.positive(int), default=2, help="optimizer steps in a round of pm and lm (default: %(default)s)")
    parser.add_argument("--prompt_tokens", type=plan.positive(int), default=6000, help="our HHH prompt is repeated or cut to so many (default: %(default)s)")
    parser.add_argument("--rounds", type=plan.positive(int), default=5, help="timed rounds; one more warms up, one is for memory (default: %(default)s)")
    parser.add_argument("--compile", action="store_true", help="time compiled models too: minutes more at the start")
    parser.add_argument("--out", help="file for the JSON line (default: none)")
    plan.add_device_flags(parser)
    return parser.parse_args()


def main():
    args = parse_args()
    ranks = start(args.device)
    device, dtype = ranks.device, pick_dtype(args.dtype, ranks.device)
    if args.compile:
        check_compiler(device)
    if args.lm_batch < args.ctx:
        raise InputError(f"--lm_batch {args.lm_batch} is less than one sequence of --ctx {args.ctx} tokens")
    tokenizer = get_tokenizer(args.tokenizer)
    measures = {"pm": measure_pm, "lm": measure_lm, "prompt": measure_prompt}
    measures = measures if args.part == "all" else {args.part: measures[args.part]}
    data = {part: load_comparisons([HHH_ITEMS] if part == "prompt" else toy.find_data(args.data, "ranked.jsonl"), tokenizer) for part in measures}
    result = {"date": datetime.datetime.now().astimezone().isoformat(timespec="seconds"), "command": shlex.join(["python", *sys.argv]),
              "machine": machine(device), "peak_gflops": {str(t)[6:]: matrix_peak(t, device) for t in (torch.bfloat16, torch.float32)},
              "model": {**dict(zip(("n_layer", "d_model", "n_head"), SIZES[args.size])), "vocab_size": tokenizer.vocab_size,
                        "ctx": args.ctx, "dtype": str(dtype)[6:]}}
    print(*(f"{k} {v}" for k, v in (result["machine"] | result["model"]).items()), sep=", ")
    print("matrix peak:", ", ".join(f"{v:,.0f} GFLOP/s {k}" for k, v in result["peak_gflops"].items()), flush=True)
    for part, measure in measures.items():
        ctx = args.prompt_tokens + ROOM if part == "prompt" else args.ctx
        model = GPT(Config(*SIZES[args.size], tokenizer.vocab_size, ctx, value_head=part == "pm")).init_weights(seed=0).to(device)
        model.dtype = dtype
        result[part] = measure(args, ranks, model, data[part], tokenizer, 1e9 * result["peak_gflops"][str(dtype)[6:]])
    if args.out:
        write_file(args.out, json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))


# ---------------------------------------------------------------------------------------------------------------------
# Measuring


def machine(device):
    info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    cpu = next((line.split(": ")[1] for line in info.splitlines() if line.startswith("model name")), "unknown")
    gpu = {"gpu": torch.cuda.get_device_name(device)} if device.type == "cuda" else {}
    return {**gpu, "cpu": cpu, "cores": os.cpu_count(), "threads": torch.get_num_threads(), "torch": torch.__version__}


def matrix_peak(dtype, device):
    """The fastest large matrix product, in GFLOP/s: the best of three sizes, tried for a third of a second each."""
    best = 0.0
    for n in (1024, 2048, 3072) if device.type == "cpu" else (4096, 8192, 16384):
        a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
        F.linear(a, b)  # warms up
        end = clock(device) + 0.33
        while clock(device) < end:
            best = max(best, 2e-9 * n**3 / timed(device, lambda: F.linear(a, b)))
    return best


def clock(device):
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def timed(device, work):
    begun = clock(device)
    work()
    return clock(device) - begun


def peak_memory(device, reset=False):
    """The largest memory since the last reset, in GiB; on a CPU the process's. Only Linux lets its peak be reset."""
    if device.type == "cuda":
        if reset:
            torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.max_memory_allocated(device) / 2**30
    if reset and os.access("/proc/self/clear_refs", os.W_OK):
        getattr(ctypes.CDLL(None), "malloc_trim", int)(0)  # glibc: give back what earlier candidates have freed
        Path("/proc/self/clear_refs").write_text("5")
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**30 if sys.platform == "darwin" else 2**20)


def race(candidates, batches, args, device):
    """All candidates in turn, round by round. candidates: {name: run(batches of a round) -> seconds}.

    Returns {name: (seconds of each timed round, GiB)}. The first round warms up; the last one is for memory, as it makes
    freed memory come back at a cost in time.
    """
    seconds, memory = {name: [] for name in candidates}, {}
    for r in range(args.rounds + 2):
        for name, run in candidates.items():
            before = peak_memory(device, reset=True) if r > args.rounds else 0.0
            seconds[name].append(run(batches(r)))
            memory[name] = peak_memory(device) - before
            print(f"round {r} of {args.rounds + 1} (the first warms up), {name}: {seconds[name][-1]:.2f} s", file=sys.stderr, flush=True)
    return {name: (seconds[name][1:-1], memory[name]) for name in candidates}


def stepper(model, losses, device, ranks):
    """run(batches) -> seconds: trains `model`, one optimizer step a batch. losses(model, batch) yields the (sum, count) of
    each micro-batch."""
    optimizer = trainer.make_optimizer(model, lr=1e-5, weight_decay=0.1)

    def step(batch):
        count = 0
        for batch_sum, batch_count in losses(model, batch):
            batch_sum.backward()
            count += batch_count
        trainer.scale_and_clip(optimizer, count, 1.0, ranks)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return lambda batches: sum(timed(device, lambda: step(batch)) for batch in batches)


def blocks_compiled(model):
    """A copy of the model, compiled as trainer.py does it."""
    model = copy.deepcopy(model)
    model.compile_blocks()
    return model


def training_flops(model, tokens, seen, output=0):
    """Forward and backward, for `tokens` computed, `seen` pairs of a token and one it attends to; `output`: parameters of
    the output layer if there is one. A parameter costs 2 operations a token forward and 4 backward."""
    return 6 * (model.n_params()[0] + output) * tokens + 12 * model.config.n_layer * model.config.d_model * seen


def row_work(model, row, only_ends):
    """(tokens, flops) of training a preference model on a row. A token at position p attends to p + 1 tokens. With only_ends
    the last layer gives keys and values for all tokens, and the rest of it is computed at the ends alone."""
    positions = row.layout.positions if row.layout is not None else torch.arange(row.tokens.shape[1]).repeat(len(row.tokens))
    tokens, seen = len(positions), (positions + 1).sum().item()
    flops = training_flops(model, tokens, seen)
    if only_ends:
        c, at_ends = model.config, (positions[row.ends] + 1).sum().item()
        flops -= 6 * (model.n_params()[0] / c.n_layer - 2 * c.d_model**2) * (tokens - len(row.ends)) + 12 * c.d_model * (seen - at_ends)
    return tokens, flops


def report(title, unit, amount, figures, baselines, work=None, least=0.0, peak=1.0):
    """Print a table and return its figures by candidate. amount: units a round; baselines: {column: the candidate that its
    ratios are to}; work: {name: (tokens, flops)} a round, where known; least: the flops that are needed."""
    medians = {name: statistics.median(seconds) for name, (seconds, _) in figures.items()}
    columns = [unit + "/s", "min", "max", *baselines, *(("tokens", "MFU", "useful") if work else ()), "GiB"]
    formats = ["12,.2f"] * 3 + ["12.2f"] * len(baselines) + (["12,.0f", "12.1%", "12.1%"] if work else []) + ["12.2f"]
    print(f"\n{title}\n{'':36}" + "".join(f"{column:>12}" for column in columns))
    rows = {}
    for name, (seconds, memory) in figures.items():
        rows[name] = {f"{unit}_per_second": amount / medians[name], "min": amount / max(seconds), "max": amount / min(seconds),
                      **{f"ratio_{column}": medians[base] / medians[name] for column, base in baselines.items()}}
        if work:
            tokens, flops = work.get(name, (None, None))
            rows[name] |= {"tokens": tokens and tokens / amount, "mfu": flops and flops / medians[name] / peak, "useful": least / medians[name] / peak}
        rows[name]["memory_gib"] = memory
        print(f"{name:36}" + "".join(f"{'-':>12}" if v is None else format(v, f) for f, v in zip(formats, rows[name].values())))
    print(flush=True)
    return rows


# ---------------------------------------------------------------------------------------------------------------------
# Preference models


class Pairs:
    """The best and the worst completion of comparisons, in batches and in each of the layouts (lists of rows)."""

    def __init__(self, args, data, tokenizer, at_once):
        self.args, self.data, self.tokenizer, self.at_once = args, data, tokenizer, at_once
        usable = np.flatnonzero(data.fits(args.ctx) & data.differ())
        if not len(usable):
            raise InputError(f"{data.files[0]}: no comparison with a better and a worse completion fits in --ctx {args.ctx}")
        self.order = usable[epoch_order(len(usable), seed=0, epoch=0)]

    def batches(self, r):
        """The numbers of round r's comparisons: --steps arrays of --batch."""
        size = self.args.steps * self.args.batch
        return np.split(self.order[np.arange(r * size, (r + 1) * size) % len(self.order)], self.args.steps)

    def chosen(self, examples):
        return [[int(scores.argmax()), int(scores.argmin())] for scores in map(self.data.scores, examples)]

    def sequences(self, examples):
        """Each comparison's two sequences in turn, best first: context, cut as make_row cuts it, completion, <eoc>."""
        result = []
        for example, keep in zip(examples, self.chosen(examples)):
            context, *completions = self.data.segments(example)
            cut = max(0, len(context) + max(map(len, completions)) + 1 - self.args.ctx)
            context = context[cut:] if len(context) else [self.tokenizer.eot]
            result += [np.concatenate([context, completions[k], [self.tokenizer.eoc]]).astype(np.int64) for k in keep]
        return result

    def padded(self, examples):
        sequences = self.sequences(examples)
        tokens = pad(sequences)
        return [PlainRow(tokens, None, torch.tensor([i * tokens.shape[1] + len(s) - 1 for i, s in enumerate(sequences)]))]

    def packed(self, examples):
        sequences, rows = self.sequences(examples), []
        for numbers in pack([len(a) + len(b) for a, b in zip(sequences[::2], sequences[1::2])], self.at_once):
            parts = [sequences[j] for i in numbers for j in (2 * i, 2 * i + 1)]
            layout = Layout(map(len, parts), range(len(parts)))
            rows.append(PlainRow(torch.from_numpy(np.concatenate(parts)), layout, torch.tensor(layout.starts[1:]) - 1))
        return rows

    def shared(self, examples):
        chosen, row_format = self.chosen(examples), RowFormat(self.args.ctx, self.tokenizer)
        return [make_row(self.data, examples[numbers], row_format, [chosen[i] for i in numbers])
                for numbers in pack(packed_lengths(self.data, examples, row_format, chosen), self.at_once)]


@dataclass
class PlainRow(TensorBatch):
    """Sequences of pairs, best first. `ends`: where each one's last token lies in the flattened tokens."""
    tokens: torch.Tensor
    layout: Layout | None
    ends: torch.Tensor


def pad(sequences):
    """(B, longest), zeros on the right, of arrays of token ids."""
    return nn.utils.rnn.pad_sequence(list(map(torch.from_numpy, sequences)), batch_first=True)


def measure_pm(args, ranks, model, data, tokenizer, peak):
    """Figures by candidate of preference-model training."""
    device = ranks.device
    pairs = Pairs(args, data, tokenizer, plan.micro_tokens(args, model, device))
    layouts = {"naive padded": pairs.padded, "packed": pairs.packed, "packed + shared prefix": pairs.shared}

    def losses(build):
        def of(model, examples):
            for row in build(examples):
                row = row.to(device)
                if build == pairs.shared:
                    yield comparison_loss(model, row, "ranked", lm_weight=0.0)[:2]
                else:
                    hidden = model(row.tokens, row.layout).flatten(0, -2)
                    rewards = model.rewards(hidden.index_select(0, row.ends))
                    yield ranked_loss(rewards[::2], rewards[1::2]).sum(), len(rewards) // 2
        return of

    check_equal(model, {name: losses(build) for name, build in layouts.items()}, pairs.batches(0)[0])
    candidates = {name: stepper(copy.deepcopy(model), losses(build), device, ranks) for name, build in layouts.items()}
    timed = [examples for r in range(1, args.rounds + 1) for examples in pairs.batches(r)]
    work = {name: np.sum([row_work(model, row, build == pairs.shared) for examples in timed for row in build(examples)], 0) / args.rounds
            for name, build in layouts.items()}
    if args.compile:
        candidates["packed + shared prefix, compiled"] = stepper(blocks_compiled(model), losses(pairs.shared), device, ranks)
        work["packed + shared prefix, compiled"] = work["packed + shared prefix"]
    baselines = {"x naive": "naive padded"}
    if importlib.util.find_spec("trl"):
        candidates |= {f"TRL RewardTrainer, batch {n}": trl_runner(model, pairs, n, device) for n in TRL_BATCHES}
    figures = race(candidates, pairs.batches, args, device)
    if importlib.util.find_spec("trl"):
        baselines["x TRL"] = min((name for name in figures if "TRL" in name), key=lambda name: statistics.median(figures[name][0]))
    return report(f"Preference-model training, {args.batch} pairs a step", "pairs", args.steps * args.batch, figures, baselines,
                  work, least=work["packed + shared prefix"][1], peak=peak)


def check_equal(model, losses, examples):
    """Stop if the layouts do not give the same loss and gradient in fp32: their speeds could not be compared."""
    model, first = copy.deepcopy(model), None
    model.dtype = torch.float32
    for name, of in losses.items():
        model.zero_grad()
        total = sum((loss.backward(), loss.detach())[1] for loss, _ in of(model, examples))
        found = torch.cat([total[None], *(p.grad.flatten() for p in model.model.layers[0].parameters())])
        first = found if first is None else first
        error = ((found - first).norm() / first.norm()).item()
        if not error < 1e-3:
            raise AssertionError(f"{name} does not compute what naive padded does: relative difference {error:.2g}")


def trl_runner(model, pairs, batch, device):
    """run(batches) -> seconds for TRL's RewardTrainer: same shape, weights, tokens and precision, its own defaults otherwise,
    but nothing that would only slow it down (checkpointing of activations, logs, files)."""
    import datasets
    import tokenizers
    import transformers
    import trl
    transformers.logging.set_verbosity_error()
    datasets.disable_progress_bars()
    eot = pairs.tokenizer.eot
    specials = tokenizers.Tokenizer(tokenizers.models.WordLevel({"<eot>": eot, "<eoc>": eot + 1}, "<eot>"))
    specials = transformers.PreTrainedTokenizerFast(tokenizer_object=specials, pad_token="<eot>", eos_token="<eoc>")

    class Clock(transformers.TrainerCallback):
        def on_train_begin(self, *_, **__):
            self.times = []

        def on_step_end(self, *_, **__):
            self.times.append(clock(device))

    def run(batches):
        sequences = pairs.sequences(np.concatenate(batches))
        examples = [{"chosen_ids": a.tolist(), "rejected_ids": b.tolist()} for a, b in zip(sequences[::2], sequences[1::2])]
        size = min(batch, len(examples))
        steps = len(examples) // size
        net = transformers.LlamaForSequenceClassification(transformers.LlamaConfig(**checkpoint.hf_config(model.config, eot)))
        net.load_state_dict(model.state_dict())
        timer = Clock()
        with tempfile.TemporaryDirectory() as folder:
            config = trl.RewardConfig(
                output_dir=folder, per_device_train_batch_size=size, max_steps=steps + 1, max_length=pairs.args.ctx,
                bf16=model.dtype == torch.bfloat16, use_cpu=device.type == "cpu", gradient_checkpointing=False,
                train_sampling_strategy="sequential", logging_strategy="no", save_strategy="no", report_to="none", disable_tqdm=True)
            # One step more than is timed, on examples that come again: it warms up.
            trainer_ = trl.RewardTrainer(net, config, train_dataset=datasets.Dataset.from_list(examples[:size] + examples),
                                         processing_class=specials, callbacks=[timer])
            trainer_.remove_callback(transformers.PrinterCallback)
            trainer_.train()
        return (timer.times[-1] - timer.times[0]) * len(examples) / (steps * size)
    return run


# ---------------------------------------------------------------------------------------------------------------------
# Language models


class PlainGPT(nn.Module):
    """The yardstick: GPT-2 without dropout and biases as nanoGPT writes it, of a config's width, depth and vocabulary."""

    def __init__(self, config):
        super().__init__()
        d = config.d_model
        self.tokens, self.positions = nn.Embedding(config.vocab_size, d), nn.Embedding(config.ctx, d)
        self.blocks = nn.ModuleList(PlainBlock(d, config.n_head) for _ in range(config.n_layer))
        self.norm, self.head = nn.LayerNorm(d, bias=False), nn.Linear(d, config.vocab_size, bias=False)
        self.head.weight = self.tokens.weight
        for p in self.parameters():
            if p.dim() == 2:
                nn.init.normal_(p, std=0.02)

    def forward(self, inputs, targets):
        x = self.tokens(inputs) + self.positions.weight[:inputs.shape[1]]
        for block in self.blocks:
            x = block(x)
        return F.cross_entropy(self.head(self.norm(x)).flatten(0, 1), targets.flatten(), reduction="sum")


class PlainBlock(nn.Module):
    def __init__(self, d, n_head):
        super().__init__()
        self.n_head = n_head
        self.norm_1, self.norm_2 = nn.LayerNorm(d, bias=False), nn.LayerNorm(d, bias=False)
        self.qkv, self.out, self.up, self.down = (nn.Linear(a, b, bias=False) for a, b in ((d, 3 * d), (d, d), (d, 4 * d), (4 * d, d)))

    def forward(self, x):
        q, k, v = (part.unflatten(-1, (self.n_head, -1)).transpose(1, 2) for part in self.qkv(self.norm_1(x)).chunk(3, -1))
        x = x + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(-2))
        return x + self.down(F.gelu(self.up(self.norm_2(x))))


def measure_lm(args, ranks, model, data, tokenizer, peak):
    """Figures by candidate of LM training on windows of the data's tokens."""
    device, config = ranks.device, model.config
    at_once = max(1, plan.micro_tokens(args, model, device) // args.ctx)
    shape = args.steps, args.lm_batch // args.ctx, args.ctx + 1
    windows = torch.from_numpy(np.resize(data.tokens, shape).astype(np.int64)).to(device)

    def ours(model, batch):
        for part in batch.split(at_once):
            yield model.token_losses(model(part[:, :-1]).flatten(0, 1), part[:, 1:].flatten())[0], part[:, 1:].numel()

    def plain(net, batch):
        for part in batch.split(at_once):
            with torch.autocast(device.type, torch.bfloat16, enabled=model.dtype == torch.bfloat16):
                loss = net(part[:, :-1], part[:, 1:])
            yield loss, part[:, 1:].numel()

    torch.manual_seed(0)
    net = PlainGPT(config).to(device)
    candidates = {"plain loop": stepper(net, plain, device, ranks), "train_lm.py": stepper(copy.deepcopy(model), ours, device, ranks)}
    if args.compile:
        compiled = copy.deepcopy(net)
        compiled.compile()
        candidates["plain loop, compiled"] = stepper(compiled, plain, device, ranks)
        candidates["train_lm.py, compiled"] = stepper(blocks_compiled(model), ours, device, ranks)
    figures = race(candidates, lambda r: windows, args, device)
    tokens = windows[..., 1:].numel()
    flops = training_flops(model, tokens, tokens * (args.ctx + 1) / 2, output=config.d_model * config.vocab_size)
    return report(f"LM training, {shape[1]} x {args.ctx} tokens a step", "tokens", tokens, figures, {"x plain": "plain loop"},
                  dict.fromkeys(candidates, (tokens, flops)), least=flops, peak=peak)


# ---------------------------------------------------------------------------------------------------------------------
# Behind a prompt


def measure_prompt(args, ranks, model, data, tokenizer, _):
    """Figures of scoring the items, distilling and sampling behind a prompt."""
    prompt = np.resize(tokenizer.encode(load_prompt("hhh")), args.prompt_tokens).astype(np.int64)
    result = {"prompt_tokens": len(prompt), "ctx": model.config.ctx}
    result["scoring"] = measure_scoring(args, ranks, model, data, tokenizer, prompt)
    with tempfile.TemporaryDirectory() as folder:
        os.environ["HHH_LAB_CACHE"] = folder  # the teacher's cache is made anew in each round, and not kept
        result["distillation"], result["cache_bytes_per_token"] = measure_distillation(args, ranks, model, data, prompt, Path(folder))
    result["sampling"] = measure_sampling(args, ranks, model, tokenizer, prompt[:300])
    return result


def measure_scoring(args, ranks, model, data, tokenizer, prompt):
    """Log-probs of all items' completions: the prompt read once for packed rows, or anew with every completion."""
    device, at_once = ranks.device, plan.micro_tokens(args, model, ranks.device)
    texts = [(np.concatenate([prompt, context, completion]).astype(np.int64), len(completion))
             for context, *completions in map(data.segments, range(len(data))) for completion in completions]

    def ours(examples):
        prefix = read(model, prompt)[0].as_prefix()
        return np.concatenate(pm.score_all(model, data, examples, "sum", RowFormat(ROOM, tokenizer), at_once, prefix=prefix))

    @torch.no_grad()
    def naive(texts):
        tokens = pad([ids for ids, _ in texts]).to(device)
        log_p = [model.logits(h[len(ids) - n - 1:len(ids) - 1]).float().log_softmax(-1).gather(1, own[len(ids) - n:len(ids), None]).sum()
                 for h, own, (ids, n) in zip(model(tokens), tokens, texts)]
        return torch.stack(log_p).cpu().numpy()

    def of_few(batch):  # another batch in each round
        return lambda r: timed(device, lambda: naive([texts[(r * batch + i) % len(texts)] for i in range(batch)])) * len(texts) / batch

    model.dtype, dtype = torch.float32, model.dtype
    if not np.allclose(found := ours(np.arange(1)), expected := naive(texts[:len(found)]), atol=0.01):
        raise AssertionError(f"scoring behind the shared prompt gives {found} where a plain forward gives {expected}")
    model.dtype = dtype
    plain = {batch: f"naive, batch of {batch} ({batch} of {len(texts)}, scaled)" for batch in (1, 8)}
    figures = race({name: of_few(batch) for batch, name in plain.items()} |
                   {"prompt once + packed rows": lambda r: timed(device, lambda: ours(np.arange(len(data))))}, lambda r: r, args, device)
    return report(f"Scoring {len(data)} items behind {len(prompt):,} tokens", "completions", len(texts), figures,
                  {"x naive": min(plain.values(), key=lambda name: statistics.median(figures[name][0]))})


def measure_distillation(args, ranks, model, data, prompt, folder, batch=32, few=2):
    """(figures of steps of distillation on `batch` sequences of 50 to 200 tokens, bytes a token of the teacher's cache)."""
    device, at_once = ranks.device, plan.micro_tokens(args, model, ranks.device)
    teacher, student = copy.deepcopy(model).freeze(model.dtype), copy.deepcopy(model).init_weights(seed=1)
    for name in ("model.safetensors", "config.json"):  # by their content the cache knows the teacher
        (folder / name).write_text("random")
    prefix, text, made = read(teacher, prompt)[0].as_prefix(), np.asarray(data.tokens, np.int64), {"tokens": 0}

    def sequences(r):
        rng = np.random.default_rng(r)
        return [text[start:start + size] for start, size in zip(rng.integers(len(text) - 200, size=batch), rng.integers(50, 201, batch))]

    def store(x):
        with contextlib.redirect_stdout(None):
            made["cache"] = distill.store_teacher(teacher, folder, prefix, "", x, at_once, ranks)
        made["tokens"] += sum(map(len, x))

    def stored_kl(model, x):
        for numbers in pack(list(map(len, x)), at_once):
            row = distill.SequenceRow(numbers, x, made["cache"]).to(device)
            yield distill.top_kl(model, model(row.tokens, row.layout), row.ids, row.log_p)[0], len(row.tokens)

    def plain_kl(model, x):
        with torch.no_grad():
            behind = pad([np.concatenate([prompt, ids]) for ids in x]).to(device)
            log_p = teacher.logits(teacher(behind)[:, len(prompt):]).float().log_softmax(-1)
        log_q = model.logits(model(pad(x).to(device))).float().log_softmax(-1)
        kl = F.kl_div(log_q, log_p, reduction="none", log_target=True)
        yield sum(own[:len(ids)].sum() for own, ids in zip(kl, x)), sum(map(len, x))

    plain, ours = stepper(student, plain_kl, device, ranks), stepper(copy.deepcopy(student), stored_kl, device, ranks)
    slow, storing, training = f"naive ({few} of {batch}, scaled)", "making the teacher's cache", "training on the cache"
    figures = race({slow: lambda x: plain([x[:few]]) * batch / few, storing: lambda x: timed(device, lambda: store(x)),
                    training: lambda x: ours([x])}, sequences, args, device)
    (store_seconds, store_memory), (train_seconds, train_memory) = figures[storing], figures[training]
    figures["both, for a single epoch"] = [a + b for a, b in zip(store_seconds, train_seconds)], max(store_memory, train_memory)
    size = sum(file.stat().st_size for file in folder.glob("teacher-*/*/*"))
    rows = report(f"Context distillation, {batch} sequences a step, {len(prompt):,} tokens of prompt", "sequences", batch, figures, {"x naive": slow})
    print(f"the teacher's cache: {size / made['tokens']:.0f} bytes a token", flush=True)
    return rows, size / made["tokens"]


def measure_sampling(args, ranks, model, tokenizer, prompt, n=100, few=3):
    """n samples of 64 tokens: together, or one after the other."""
    def run(n_at_once, times):
        def work():
            for _ in range(times):
                generate(model, [prompt], n_at_once, max_new=64, n_vocab=tokenizer.n_vocab)
        return lambda _: timed(ranks.device, work) * n / (n_at_once * times)
    alone = f"one at a time ({few} of {n}, scaled)"
    figures = race({alone: run(1, few), f"n = {n}": run(n, 1)}, lambda r: r, args, ranks.device)
    return report(f"Sampling {n} x 64 tokens behind {len(prompt)}", "samples", n, figures, {"x alone": alone})


if __name__ == "__main__":
    run_main(main)
