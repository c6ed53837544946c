"""Measure the speed and memory of training, scoring, distilling and sampling, beside plain ways of the same.

  python bench.py                                         all three parts, minutes on a CPU
  python bench.py pm --data hh-rlhf/harmless-base --tokenizer gpt2 --compile --out results/bench_pm.json
  pip install trl 'datasets<5' && python bench.py pm      times TRL's RewardTrainer as well
  python bench.py prompt --init out/lm                    with this checkpoint's sizes and tokenizer
  python bench.py gpu --compile --tokenizer gpt2          sizes of the paper on one GPU, with MFU

pm trains preference models on pairs: the best and the worst completion of each comparison. Three layouts give
the same loss and gradient:
  naive padded             each completion with its context, padded to the longest sequence of the batch
  packed                   each completion with its context, end to end in a row without padding
  packed + shared prefix   each context once: what train_pm.py does

lm trains language models on windows of random tokens, at three shapes. The plain loop is in the manner of
nanoGPT, with the same transformer: F.scaled_dot_product_attention, and the logits of all tokens in memory.

prompt does what evaluate.py, distill.py and chat.py do behind a long prompt. The naive ways read the prompt
anew for each text, and are timed on a few texts only, as the names of their rows say.

gpu trains language and preference models of several sizes, one after the other. MFU is the part of the measured
peak of matrix products that the model's own arithmetic reaches: 6 FLOPs a weight and token, and 12 a head's
width and key that attention has to look at. What --recompute computes twice, and the last block of preference
models, which is computed at the completions' ends only, do not count.

A training step is a whole one: laying out the batch, forward, backward, clipping, AdamW. The candidates take
turns, round by round, on the same data. Speeds are medians of the rounds, with their range. So are ratios: "x
naive" is how many times as fast as the naive way a candidate is in the same round. GiB is the peak of memory
above what was held before; for TRL it includes the weights. A candidate that runs out of memory has no row. The
last line has all figures as JSON.
"""
import argparse
import ctypes
import functools
import gc
import importlib.util
import json
import multiprocessing
import os
import re
import resource
import shlex
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence

import checkpoint
import distill
import plan
import trainer
from data import toy
from data.comparisons import load_comparisons
from data.errors import InputError, Parser, is_out_of_memory, run_main
from data.files import check_writable, write_file
from data.packing import RowFormat, epoch_order, make_row
from data.prompts import load_prompt
from data.tokenizer import get_tokenizer
from evals import pm
from evals.choices import HHH_ITEMS
from formats.hf_folder import make_config
from kv_cache import read
from model import GPT, SIZES, Config
from ranks import check_compiler, device_memory, pick_dtype, start
from sampling import generate
from train_lm import window_loss
from train_pm import comparison_loss, ranked_loss

GPT2_ROWS = 50304  # of a table for GPT-2's 50,257 tokens, with room to a multiple of 64
LM_SHAPES = ((512, 320), (1024, 320), (1024, GPT2_ROWS))  # (ctx, rows of the table): bytes, and GPT-2
GPU_SIZES = ("197m", "810m", "2.7b")
ROOM = 2192  # tokens that there is room for behind the prompt
TRL_BATCHES = (4, 8, 16)  # pairs
MICRO_TOKENS = 8192  # tokens in a row of scoring or of the teacher


def parse_args():
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("part", nargs="?", choices=("all", "pm", "lm", "prompt", "gpu"), default="all",
        help="what to measure; all is without gpu (default: %(default)s)")
    add("--data", nargs="+", default=["toy"], help="comparisons for pm: files, folders or toy (default: toy)")
    add("--init", help="checkpoint folder that gives the sizes and the tokenizer; lm has a single shape then")
    add("--size", choices=SIZES, default="3m", help="size without --init (default: %(default)s)")
    add("--sizes", nargs="+", choices=SIZES, default=GPU_SIZES, metavar="SIZE",
        help=f"sizes of part gpu (default: {' '.join(GPU_SIZES)})")
    add("--tokenizer", default="bytes",
        help="tokenizer without --init: bytes, gpt2 or a .tiktoken file (default: %(default)s)")
    add("--ctx", type=plan.positive(int), default=1024,
        help="tokens that a context and one completion of pm have room for (default: %(default)s)")
    add("--batch", type=plan.positive(int), default=32, help="pairs in a step of pm (default: %(default)s)")
    add("--lm_batch", type=plan.positive(int), default=8192,
        help="tokens in a step of a language model (default: %(default)s)")
    add("--prompt_tokens", type=plan.positive(int), default=6000,
        help="our HHH prompt is repeated or cut to this length (default: %(default)s)")
    add("--rounds", type=plan.positive(int), default=8,
        help="timed rounds; one before them warms up, one after them is for memory (default: %(default)s)")
    add("--compile", action="store_true", help="time compiled models too: minutes more at the start")
    add("--device", default="auto", help="cuda, cpu, mps or auto (default: auto)")
    add("--dtype", choices=("auto", "fp32", "bf16"), default="auto",
        help="precision of matrix products (default: bf16 where the hardware has it)")
    add("--out", help="file for the JSON line (default: none)")
    return parser.parse_args()


def main():
    args = parse_args()
    if args.out:
        check_writable(args.out)  # before the work, not after it
    ranks = start(args.device)
    if args.compile:
        check_compiler(ranks.device)
    if args.init:
        model, tokenizer, _ = checkpoint.load(args.init)
        config = replace(model.config, ctx=args.ctx, value_head=False)
    else:
        tokenizer = get_tokenizer(args.tokenizer)
        config = Config(*SIZES[args.size], tokenizer.vocab_size, args.ctx)
    dtype = pick_dtype(args.dtype, ranks.device)
    result = {"command": shlex.join(["python", *sys.argv]), "machine": machine(ranks.device),
              "model": {"n_layer": config.n_layer, "d_model": config.d_model, "n_head": config.n_head,
                        "vocab_size": config.vocab_size, "dtype": str(dtype).removeprefix("torch.")}}
    print(*(f"{name} {value}" for name, value in (result["machine"] | result["model"]).items()), sep=", ")
    measures = {"pm": measure_pm, "lm": measure_lm, "prompt": measure_prompt}
    for part in measures if args.part == "all" else [args.part]:
        measure = measures.get(part, measure_gpu)
        result[part] = measure(args, ranks, config, tokenizer, dtype)
    if args.out:
        write_file(args.out, json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))


def machine(device):
    cpuinfo = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    names = [line.split(": ")[1] for line in cpuinfo.splitlines() if line.startswith("model name")]
    gpu = {"gpu": torch.cuda.get_device_name(device)} if device.type == "cuda" else {}
    return {**gpu, "cpu": names[0] if names else "unknown", "cores": os.cpu_count(),
            "threads": torch.get_num_threads(), "torch": torch.__version__}


# ------------------------------------------------------------------------------------------------------------
# Measuring


def race(candidates, rounds, device):
    """Let all candidates work in turn, round by round.

    candidates: {name: (units, work)}. work(r) does so many units (pairs, tokens, …) with round r's data. If
    it returns something, that is the seconds to count, and GiB. Round 0 warms up; the last round is for memory.
    Returns {name: (units a second in each timed round (rounds,), GiB or None)} of the candidates that did not
    run out of memory in these.
    """
    running, speeds, memory = dict(candidates), {name: [] for name in candidates}, dict.fromkeys(candidates)
    for r in range(rounds + 2):
        for name, (units, work) in list(running.items()):
            try:
                if r <= rounds:
                    begun = clock(device)
                    seconds, *peak = work(r) or [clock(device) - begun]
                    memory[name] = max(peak + [memory[name] or 0]) if peak else None
                    speeds[name].append(units / seconds)
                    print(f"round {r} of {rounds}, {name}: {seconds:.2f} s", file=sys.stderr, flush=True)
                elif memory[name] is None:
                    memory[name] = peak_memory(device, work, r)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                print(f"{name}: out of memory ({str(error)[:100]})", flush=True)
                del running[name]
    return {name: (np.array(speeds[name][1:]), memory[name])
            for name in candidates if len(speeds[name]) == rounds + 1}


def clock(device):
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return time.perf_counter()


def peak_memory(device, work, r):
    """GiB that work(r) takes at most, above what is held already. None where the system does not tell."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        work(r)
        return (torch.cuda.max_memory_allocated(device) - before) / 2**30
    if not os.access("/proc/self/clear_refs", os.W_OK):
        return None
    trim_heap()
    Path("/proc/self/clear_refs").write_text("5")  # from here on the peak counts anew
    before = own_peak()
    work(r)
    return (own_peak() - before) / 2**20


def own_peak():
    """KiB that this process has held at most. What getrusage says also counts what the process that started it
    held; but only Linux tells more."""
    status = Path("/proc/self/status")
    if status.exists():
        return int(re.search(r"VmHWM:\s*(\d+) kB", status.read_text())[1])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def trim_heap():
    """Give back to the system what earlier candidates have freed."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):  # glibc
        libc.malloc_trim(0)


def table(title, unit, figures, baselines, more={}):
    """Print what `race` returned as a table, and return it as a dict for the JSON line.

    baselines: {"x naive": names}; the column's ratios are to the fastest of these candidates. more: {column:
    (format, {name: number})}, for the candidates where the number is known, such as the tokens computed for one
    unit.
    """
    baselines = {column: [name for name in names if name in figures] for column, names in baselines.items()}
    baselines = {column: names for column, names in baselines.items() if names}
    lines = [[title, f"{unit}/s", *baselines, *more, "GiB"]]
    rows = {}
    for name, (speeds, memory) in figures.items():
        row = {f"{unit}_per_second": np.median(speeds), "min": speeds.min(), "max": speeds.max()}
        cells = [f"  {name}", spread(speeds, 1)]
        for column, names in baselines.items():
            ratios = speeds / max((figures[base][0] for base in names), key=np.median)
            row |= {f"ratio_{column}": np.median(ratios), f"range_{column}": [ratios.min(), ratios.max()]}
            cells.append(spread(ratios, 2))
        for column, (form, numbers) in more.items():
            row[column] = numbers.get(name)
            cells.append(form.format(numbers[name]) if name in numbers else "-")
        rows[name] = row | {"memory_gib": memory}
        lines.append([*cells, "-" if memory is None else f"{memory:.2f}"])
    widths = [max(map(len, column)) for column in zip(*lines)]
    for name, *cells in lines:
        print(name.ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(cells, widths[1:])), sep="  ")
    print(flush=True)
    return rows


def spread(values, digits):
    return f"{np.median(values):,.{digits}f} ({values.min():,.{digits}f}-{values.max():,.{digits}f})"


def make_model(config, dtype, device, kind=GPT, compiled=False):
    """A model of this config, the same every time, and compiled as the trainer does it if so desired."""
    with torch.device(device):
        model = kind(config).init_weights(seed=0)
    model.dtype = dtype
    if compiled:
        model.compile_blocks()
    return model


def training(model):
    """step(loss, r): a step as the trainer does it, where loss(model, r) -> (sum, count) on round r's data.
    Candidates that differ in their loss alone can share a model and its optimizer."""
    optimizer = trainer.make_optimizer(model, lr=1e-5, weight_decay=0.1)

    def step(loss, r):
        loss_sum, count = loss(model, r)
        loss_sum.backward()
        trainer.scale_and_clip(optimizer, count, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return step


# ------------------------------------------------------------------------------------------------------------
# Preference models


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
        if self.device.type == "cpu" and need > device_memory(self.device):  # the system would kill this process
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


def trl_candidates(config, dtype, pairs):
    """{name: candidate} for `race`, where TRL is installed: its RewardTrainer on a model of this shape and on
    the same tokens, with several batches, as smaller ones pad less and larger ones take fewer steps."""
    if not importlib.util.find_spec("trl"):
        return {}
    tokenizer = pairs.row_format.tokenizer
    common = (make_config(config, tokenizer), tokenizer.eot, tokenizer.eoc, pairs.row_format.ctx,
              pairs.device.type, dtype == torch.bfloat16)

    def work(batch, r):
        ids = [sequence.tolist() for sequence in pairs.sequences(r)]
        examples = [{"chosen_ids": best, "rejected_ids": worst} for best, worst in zip(ids[::2], ids[1::2])]
        examples = examples[:pairs.batch // batch * batch]
        trim_heap()
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process:
            try:
                return process.submit(train_with_trl, examples, batch, *common).result()
            except BrokenProcessPool:
                raise MemoryError("TRL's process was killed") from None
    batches = sorted({min(n, pairs.batch) for n in (*TRL_BATCHES, pairs.batch)})
    return {f"TRL RewardTrainer, batch {n}": (pairs.batch // n * n, functools.partial(work, n)) for n in batches}


def train_with_trl(examples, batch, shape, eot, eoc, ctx, device_type, bf16):
    """(seconds, GiB at most, with the weights) of TRL's steps through the examples, with its own settings, but
    without checkpointing of activations, logs and files, which only take time.

    It has a process of its own, as some of its memory stays taken when it has run out of it. The system then
    kills this process first.
    """
    import datasets
    import tokenizers
    import transformers
    import trl
    oom_score = Path("/proc/self/oom_score_adj")
    if oom_score.exists():
        oom_score.write_text("1000")
    transformers.logging.set_verbosity_error()
    datasets.disable_progress_bars()
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"<eot>": eot, "<eoc>": eoc}, "<eot>"))
    words = transformers.PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<eot>", eos_token="<eoc>")
    device, times = torch.device(device_type), []  # when each step ended

    class Clock(transformers.TrainerCallback):
        def on_step_end(self, *_, **__):
            times.append(clock(device))

    before = own_peak()
    with tempfile.TemporaryDirectory() as folder:
        settings = trl.RewardConfig(
            output_dir=folder, per_device_train_batch_size=batch, max_steps=1 + len(examples) // batch,
            max_length=ctx, bf16=bf16, use_cpu=device_type == "cpu", gradient_checkpointing=False,
            logging_strategy="no", train_sampling_strategy="sequential", save_strategy="no", report_to="none",
            disable_tqdm=True)
        with device:
            model = transformers.AutoModelForSequenceClassification.from_config(
                transformers.AutoConfig.for_model(**shape))
        dataset = datasets.Dataset.from_list(examples[:batch] + examples)  # the first step only warms up
        reward_trainer = trl.RewardTrainer(
            model, settings, train_dataset=dataset, processing_class=words, callbacks=[Clock()])
        reward_trainer.remove_callback(transformers.PrinterCallback)
        reward_trainer.train()
    if device_type == "cuda":
        return times[-1] - times[0], torch.cuda.max_memory_allocated() / 2**30
    return times[-1] - times[0], (own_peak() - before) / 2**20


# ------------------------------------------------------------------------------------------------------------
# Language models


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
            return n_tokens, functools.partial(training(model), lambda model, r: (loss(model, windows), n_tokens))

        candidates = {"plain loop": candidate(PlainGPT, dense_loss),
                      "train_lm.py": candidate(GPT, window_loss)}
        if args.compile:
            candidates["plain loop, compiled"] = candidate(PlainGPT, torch.compile(dense_loss))
            candidates["train_lm.py, compiled"] = candidate(GPT, window_loss, compiled=True)
        name = f"ctx {ctx}, vocabulary {vocab_size}"
        figures = race(candidates, args.rounds, ranks.device)
        result[name] = table(f"Language model, {name}", "tokens", figures, {"x plain": ["plain loop"]})
    return result


# ------------------------------------------------------------------------------------------------------------
# Behind a prompt


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


# ------------------------------------------------------------------------------------------------------------
# Sizes of the paper on one GPU


def measure_gpu(args, ranks, config, tokenizer, dtype):
    """Language and preference models, and TRL's where it is installed, of each size in --sizes."""
    peak = matrix_peak(ranks.device, dtype)
    print(f"large matrix products reach {peak / 1e12:.3g} TFLOP/s\n")
    pairs = Pairs(args, load_comparisons(toy.find_data(args.data, "ranked.jsonl"), tokenizer), tokenizer,
                  ranks.device)
    result = {"peak_flops": peak}
    for size in args.sizes:
        vocab_size = max(GPT2_ROWS, tokenizer.vocab_size)
        lm, pm = (Config(*SIZES[size], vocab_size, args.ctx, value_head=head) for head in (False, True))
        result[size] = {"lm": measure_gpu_part(args, ranks, lm, dtype, f"Language model, {size}", "tokens",
                                               peak, *lm_work(args, lm, ranks.device), trl={}),
                        "pm": measure_gpu_part(args, ranks, pm, dtype, f"Preference model, {size}", "pairs",
                                               peak, args.batch, *pair_work(args, pm, pairs),
                                               trl=trl_candidates(pm, dtype, pairs))}
    return result


def measure_gpu_part(args, ranks, config, dtype, title, unit, peak, units, n_tokens, flops, loss, trl):
    """Time steps of `units` tokens or pairs, n_tokens tokens in all, one candidate after the other, as each of
    them may need the whole memory. loss(model, r) is round r's; flops is a step's arithmetic."""
    figures = {}

    def compete(name, make):
        try:
            figures.update(race({name: make()}, args.rounds, ranks.device))
        except torch.OutOfMemoryError:  # of the model itself
            print(f"{title}, {name}: out of memory")
        gc.collect()
        if ranks.device.type == "cuda":
            torch.cuda.empty_cache()

    def ours(compiled):
        model = make_model(config, dtype, ranks.device, compiled=compiled)
        activations = n_tokens * plan.token_bytes(config, ranks.device)
        model.recompute = plan.state_bytes(model) + activations > 0.85 * device_memory(ranks.device)
        return units, functools.partial(training(model), loss)

    compete("eager", lambda: ours(compiled=False))
    if args.compile:
        compete("compiled", lambda: ours(compiled=True))
    mfu = {name: np.median(speeds) / units * flops / peak for name, (speeds, _) in figures.items()}
    for name, candidate in trl.items():
        compete(name, lambda: candidate)
    baselines = {"x TRL": list(trl)}
    return table(title, unit, figures, baselines, more={"MFU": ("{:.1%}", mfu)}) if figures else {}


def lm_work(args, config, device):
    """(tokens a step, the same, FLOPs a step, loss(model, r)) of windows of random tokens."""
    shape = max(1, args.lm_batch // config.ctx), config.ctx + 1
    windows = torch.from_numpy(np.random.default_rng(0).integers(config.vocab_size, size=shape)).to(device)
    n_tokens = windows[:, 1:].numel()
    flops = step_flops(config, config.n_layer, n_tokens, n_tokens * (config.ctx + 1) / 2)
    flops += 6 * config.vocab_size * config.d_model * n_tokens
    return n_tokens, n_tokens, flops, lambda model, r: (window_loss(model, windows), n_tokens)


def pair_work(args, config, pairs):
    """(tokens a step, FLOPs a step, loss(model, r)) of --batch pairs; the first two are means over rounds."""
    layouts = [pairs.row(r, shared=True).layout for r in range(1, args.rounds + 1)]
    n_tokens = np.mean([len(layout.positions) for layout in layouts])
    n_seen = np.mean([(layout.positions + 1).sum().item() for layout in layouts])
    return n_tokens, step_flops(config, config.n_layer - 1, n_tokens, n_seen), pairs.shared_loss


def step_flops(config, n_layer, n_tokens, n_seen):
    """FLOPs of a training step in n_layer blocks. n_seen: the keys that each token sees, added up over all
    tokens."""
    weights = 4 * config.n_head * config.d_head * config.d_model + 3 * config.d_model * config.d_ff
    return n_layer * (6 * weights * n_tokens + 12 * config.n_head * config.d_head * n_seen)


def matrix_peak(device, dtype, n=8192):
    """FLOPs a second that this device reaches in matrix products."""
    n = n if device.type == "cuda" else 1024
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    seconds = []
    for _ in range(13):
        begun = clock(device)
        a @ b
        seconds.append(clock(device) - begun)
    return 2 * n**3 / np.median(seconds[3:])


if __name__ == "__main__":
    run_main(main)
