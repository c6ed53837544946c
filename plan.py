"""What every training run shares before its first step: flags, default rates, memory, and the printed plan.
"""
import argparse
import datetime
import math
import os
import shlex

import torch

from data.errors import InputError, between, positive
from model import SIZES, Config, GPT
from ranks import device_memory, part_of, processes_per_device
from simulation import PARTS, NotSimulated, memory, simulate

# ------------------------------------------------------------------------------------------------------------
# Flags


def run_folder(out):
    """An argparse type: the folder of a run, which may be there already."""
    if os.path.lexists(out) and not os.path.isdir(out):
        raise argparse.ArgumentTypeError(f"--out {out} exists, and is no folder")
    return out


def shards(text):
    """An argparse type: a whole number above 0, or auto."""
    return text if text == "auto" else positive(int)(text)


def add_device_flags(parser):
    add = parser.add_argument
    add("--device", default="auto",
        help="cuda, cpu, mps, or auto, which takes a GPU if there is one (default: auto)")
    add("--dtype", choices=("auto", "fp32", "bf16"), default="auto",
        help="precision of matrix products; losses, sums and weights that are trained are fp32 (default: "
        "bf16 where the hardware has it)")
    add("--micro_tokens", type=positive(int),
        help="tokens in a micro-batch: a step is computed in parts of this size, so that it fits in memory; "
        "it does not change the result (default: from the model's size and the memory)")


def add_training_flags(parser, batch, batch_unit, batch_default, lr_default, schedule, warmup):
    """The flags of every training script. batch_default and lr_default are texts that explain the defaults.
    """
    add = parser.add_argument
    add("--out", required=True, type=run_folder,
        help="folder of the run: metrics.jsonl, checkpoints, and when done a checkpoint itself")
    add("--batch", type=positive(int), default=batch,
        help=f"{batch_unit} in an optimizer step, over all ranks (default: {batch_default})")
    add("--steps", type=positive(int), help="optimizer steps (default: as many as --epochs takes)")
    add("--epochs", type=positive(float, most=10**6), default=1,
        help="passes over the training data, unless --steps is given (default: %(default)s)")
    add("--lr", type=positive(float), help=f"peak learning rate of AdamW (default: {lr_default})")
    add("--schedule", choices=("constant", "cosine", "linear"), default=schedule,
        help="how the learning rate goes on after warm-up: constant, cosine to a tenth, linear to 0 "
        "(default: %(default)s)")
    add("--warmup", type=between(float, 0, 1), default=warmup,
        help="part of the steps, 0 to 1, in which the learning rate rises from 0 (default: %(default)s)")
    add("--weight_decay", type=between(float, 0, math.inf), default=0.1,
        help="weight decay of AdamW, on matrices only (default: %(default)s)")
    add("--clip", type=positive(float), default=1.0,
        help="largest norm of the gradient (default: %(default)s)")
    add("--seed", type=between(int, 0, 2**32), default=0,
        help="decides initial weights and the order of the data (default: %(default)s)")
    add("--compile", action="store_true",
        help="compile the model with torch.compile: a minute at the start, faster steps after it")
    add("--eval_every", type=between(int, 0, 2**62),
        help="steps between evaluations, with one at the end; 0 for none at all (default: a tenth of the "
        "run)")
    add("--save_every", type=positive(int),
        help="steps between checkpoints, with one at the end (default: a fifth of the run)")
    add("--recompute", action="store_true",
        help="keep only what goes into each block, and compute the block once more in the backward pass: less "
        "memory, a third more computation")
    add("--shard", type=shards, default=1, metavar="N",
        help="ranks that share one copy of weights, gradients and optimizer state, for models that do not fit "
        "on one: a divisor of the number of ranks, or auto, the smallest that fits (default: %(default)s)")
    add("--resume", action="store_true",
        help="go on from the newest checkpoint in --out, as if never stopped: bit for bit on CPUs; on CUDA "
        "up to the order in which flash attention's backward pass adds")
    add_device_flags(parser)


def eval_interval(args, n_steps):
    """Steps from one evaluation to the next, or 0 for no evaluation at all."""
    return math.ceil(n_steps / 10) if args.eval_every is None else args.eval_every


def set_ctx(model, ctx):
    """Make ctx the model's context, in tokens, and return it. Raises InputError if layers of the model look
    back less far, as Mistral's do: here every layer sees the whole context."""
    window = model.config.window
    if window and ctx > window:
        raise InputError(f"--ctx {ctx}: the model looks back {window} tokens; give a --ctx up to {window}")
    model.config.ctx = ctx
    return ctx


def flag_text(name, value):
    """A flag and its value as one would type them."""
    values = [] if value is True else value if isinstance(value, (list, tuple)) else [value]
    return shlex.join([f"--{name}", *map(str, values)])


# ------------------------------------------------------------------------------------------------------------
# Default learning rates


def lm_rate(d_model):
    """The default peak learning rate of a language model of this width (assumption: the paper states none).
    The rates of the other stages are multiples of it."""
    return 3e-3 * (128 / d_model) ** 0.5


SMALL = 100e6  # parameters in the blocks


def stage_rate(model, lm_lr, paper_scale):
    """The default peak learning rate of a stage after language modelling.

    The paper's is paper_scale times the language model's, which suits its models and the 10,000s of pairs
    they see. At 0.01 times, a few hundred steps teach a model of less than 100M parameters nothing
    (results/LOG.md), so these get 0.1 times (assumption).
    """
    return lm_lr * (max(paper_scale, 0.1) if model.n_params()[0] < SMALL else paper_scale)


# ------------------------------------------------------------------------------------------------------------
# Memory

STATE_BYTES = 16  # a parameter: weight, gradient and AdamW's two averages, in fp32
CAST_BYTES = 2  # a parameter: its copy in bf16
CORE_FLOPS = 1.5e11  # floating-point operations a second that training reaches on one CPU core in bf16
GPU_BYTES, GPU_FLOPS = 80e9, 989e12  # an H100's memory, and its peak a second in bf16
UTILISATION = 0.4  # the part of the peak that training is assumed to reach


def state_bytes(model, shard=1):
    """Bytes of weights, gradients and optimizer state on each of `shard` ranks. Ranks that share a model also
    gather, for a while, the weights and gradients of two blocks and of all outside the blocks.
    """
    blocks, total = model.n_params()
    gathered = total - blocks + 2 * blocks / model.config.n_layer if shard > 1 else 0
    return STATE_BYTES * total / shard + 8 * gathered


def token_bytes(config, device, recompute=False):
    """Activations that are kept for the backward pass, in bytes a token and in bf16: roughly, for a default
    that must be known before there is a batch to simulate.

    A block keeps about 14 vectors of d_model numbers and 4 of d_ff, and on CPUs two times the attention
    weights of a token, over about 512 keys at most. With --recompute all but one keep their input alone.
    """
    weights = 2 * config.n_head * min(config.ctx, 512) if device.type == "cpu" else 0
    block = 2 * (14 * config.d_model + 4 * config.d_ff + weights)
    return config.n_layer * 4 * config.d_model + block if recompute else config.n_layer * block


def micro_tokens(args, model, ranks):
    """Tokens in a micro-batch: --micro_tokens, or what fits in a third of the memory that the model leaves,
    from 256 to 65,536 (to 8,192 on a CPU). It is the same on all ranks, as they share the rows that it makes.
    """
    if args.micro_tokens:
        return args.micro_tokens
    shard, recompute = getattr(args, "shard", 1), getattr(args, "recompute", False)
    device = ranks.device
    taken = state_bytes(model, shard) + CAST_BYTES * model.n_params()[1] / shard
    free = ranks.smallest(device_memory(device)) - taken
    fitting = free / 3 / token_bytes(model.config, device, recompute)
    return int(min(max(fitting, 256), 8192 if device.type == "cpu" else 65536))


def fit_shard(args, ranks, model):
    """Replace --shard auto by the smallest divisor of the number of ranks for which the model fits in memory,
    with a quarter of it free for activations. Raises InputError if --shard does not divide the ranks, or does
    not fit; otherwise the system would kill this process, or another one."""
    have = ranks.smallest(device_memory(ranks.device))  # all ranks have to come to the same answer
    divisors = [n for n in range(1, ranks.world + 1) if ranks.world % n == 0]
    if args.shard == "auto":
        args.shard = next((n for n in divisors if state_bytes(model, n) < 0.75 * have), ranks.world)
    if args.shard not in divisors:
        raise InputError(f"--shard {args.shard}: the number of ranks has to be a multiple of it, and is "
                         f"{ranks.world}")
    need = state_bytes(model, args.shard)
    if need > have:
        jobs = processes_per_device()
        each, fewer = (f" for each of {jobs} runs", "lab.py fewer --jobs, ") if jobs > 1 else ("", "")
        raise InputError(f"weights, gradients and optimizer take {need / 2**30:,.0f} GiB, and a rank on this "
                         f"{ranks.device.type} has {have / 2**30:,.0f}{each}; give {fewer}a smaller --size, or "
                         "more ranks and --shard auto")


def fill_fresh(args, **defaults):
    """Fill in the flags of a fresh model that are not given. Raises InputError for one that is given with
    --init, which brings its own."""
    for name, default in defaults.items():
        if args.init and getattr(args, name):
            raise InputError(f"--{name} is for a fresh model, and --init brings its own; leave one of them out")
        setattr(args, name, getattr(args, name) or default)
    return args


def fresh_model(args, tokenizer, ctx, value_head=False):
    """A model of --size whose tensors have no memory yet. Each rank will draw its part of them from --seed."""
    config = Config(*SIZES[args.size], tokenizer.vocab_size, ctx, value_head=value_head)
    with torch.device("meta"):
        model = GPT(config)
    generator = torch.Generator().manual_seed(args.seed)

    def draw(name, p):
        drawn = torch.empty(p.shape)
        model.init_tensor(name, drawn, generator)
        return part_of(drawn, p)

    model.source = draw
    return model


def print_plan(args, ranks, model, n_steps, lr, micro_tokens, lines, loss, batches, largest=None):
    """Say what is about to happen: flags, model, data (`lines`), steps, memory, time, and where output goes.

    loss(model, batch) is that of trainer.train. batches: a rank's micro-batches of a step, on the CPU. The one
    with most tokens is simulated, and tells the time; it also tells the memory, unless a `largest` one does."""
    if not ranks.main() and args.shard == 1:  # ranks that share a model simulate a step together
        return
    sizes = [batch[:, 1:].numel() if torch.is_tensor(batch) else batch.tokens.numel() for batch in batches]
    most = max(sizes)

    def simulated(batch):
        return simulate(model, loss, batch, args.recompute, ranks.device.type != "cpu", args.shard,
                        holds_gradients=len(batches) > 1, buckets=ranks.world > 1 and args.shard == 1)
    try:
        step = simulated(batches[sizes.index(most)])
        peak, tokens = (simulated(largest), largest.tokens.numel()) if largest else (step, most)
        estimate = ""
        if ranks.main():
            estimate = memory_line(peak, tokens) + time_line(step, most, sum(sizes) * n_steps, ranks)
    except NotSimulated as error:  # a loss of your own may do so, which is no reason to stop
        reason = str(error).strip().partition("\n")[0]
        estimate = f"memory, time: not known, as a step cannot be simulated ({reason})"
    if not ranks.main():
        return
    blocks, total = model.n_params()
    config = model.config
    sharded = f", each model on {args.shard} of them" if args.shard > 1 else ""
    flags = {name: value for name, value in vars(args).items() if value is not None and value is not False}
    if flags.get("init"):  # the checkpoint brings these
        flags = {name: value for name, value in flags.items() if name not in ("size", "tokenizer")}
    flags = " ".join(flag_text(name, value) for name, value in flags.items())
    data = "\n".join(lines)
    ranks.say(f"flags: {flags}\nmodel: {config.n_layer} layers x {config.d_model}, {config.n_head} heads, "
              f"ctx {config.ctx}, vocabulary {config.vocab_size:,}; {blocks / 1e6:.2f}M parameters in the "
              f"blocks, {total / 1e6:.2f}M in all\n{data}\nrun: {n_steps:,} steps, peak learning rate "
              f"{lr:.3g}, on {ranks.world} x {ranks.device.type}{sharded}, in "
              f"{str(model.dtype).removeprefix('torch.')}, attention by "
              f"{model.attention_backend(ranks.device)}, micro-batches of {micro_tokens:,} tokens\n"
              f"{estimate}\n"
              f"output: {args.out}")


def memory_line(step, n_tokens):
    """The memory of a simulated step of so many tokens, in words."""
    parts = ", ".join(f"{part} {step[part] / 2**30:.3g}" for part in PARTS if step[part])
    return (f"memory: about {memory(step) / 2**30:.3g} GiB a rank for {n_tokens:,} tokens, besides Python, "
            f"torch and the data; simulated: {parts}\n")


def time_line(step, n_tokens, in_all, ranks):
    """The work of a simulated step of so many tokens, and the time of a run of `in_all` tokens a rank, in
    words."""
    flop, speed = step["flop"] / n_tokens, rank_flops(ranks.device)
    seconds = datetime.timedelta(seconds=round(flop * in_all / speed))
    return (f"time: {flop / 1e9:.3g} GFLOP a token; at {speed / 1e12:.3g} TFLOP/s a rank (assumption) "
            f"{ranks.world * speed / flop:,.0f} tokens/s and {seconds} in all")


def rank_flops(device):
    """Floating-point operations a second that training is assumed to reach on a rank's device, in bf16."""
    return UTILISATION * GPU_FLOPS if device.type == "cuda" else CORE_FLOPS * torch.get_num_threads()
