"""The one training loop, its distributed set-up and the flags that all training scripts share.

A script gives `loss(model, batch) -> (sum, count, metrics)`: the summed loss of one micro-batch, what it is a sum over
(tokens, comparisons), and a dict of further sums over the same count. The step's loss is the sum over all micro-batches
and ranks divided by the global count, so a batch of 8, 8 batches of 1 and two ranks are the same step by construction.
"""
import ctypes
import datetime
import json
import math
import os
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from tqdm import tqdm

import checkpoint
from data.errors import InputError
from data.files import content_key, file_digest, write_file
from model import SIZES, Config, GPT

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # glibc's malloc.h


@dataclass
class Ranks:
    """This process's place among those that train together, and its device."""
    rank: int
    world: int
    device: torch.device

    def sum(self, values):
        """Add up a list of numbers over all ranks, in fp64."""
        if self.world == 1:
            return [float(v) for v in values]
        total = torch.stack([torch.as_tensor(v, dtype=torch.float64, device=self.device) for v in values])
        dist.all_reduce(total)
        return total.tolist()

    def main(self):
        return self.rank == 0

    def say(self, *words):
        if self.rank == 0:
            print(*words, flush=True)


def start(device="auto"):
    """Join the other processes where torchrun started this one: nccl on GPUs, gloo on CPUs. Returns Ranks."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    world, rank, local = (int(os.environ.get(k, d)) for k, d in (("WORLD_SIZE", 1), ("RANK", 0), ("LOCAL_RANK", 0)))
    try:
        device = torch.device(f"cuda:{local}" if device == "cuda" else device)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"--device {device}: not available here ({str(error).splitlines()[0]})") from None
    if world > 1:
        if device.type == "cuda":
            torch.cuda.set_device(device)
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=datetime.timedelta(hours=2))
        if device.type == "cpu" and "OMP_NUM_THREADS" not in os.environ:
            torch.set_num_threads(max(1, os.cpu_count() // int(os.environ.get("LOCAL_WORLD_SIZE", world))))
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "64")  # of its 1,024 kernels, one a shape and up to MBs each, packed rows reuse few
    if device.type == "cpu" and sys.platform == "linux":
        # Keep freed memory instead of giving it back and faulting it in again each step: 4 % faster (results/LOG.md).
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # glibc's
        if mallopt:
            mallopt(M_MMAP_MAX, 0)
            mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
    torch.backends.cuda.matmul.allow_tf32 = True
    return Ranks(rank, world, device)


def bf16_pays(device):
    """Whether this machine multiplies bf16 matrices in hardware: GPUs from Ampere on; CPUs with AVX512-BF16 or AMX."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    tests = [getattr(torch.cpu, name, None) for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported")]
    return device.type == "cpu" and any(test() for test in tests if test)


def pick_dtype(name, device):
    if name == "auto":
        return torch.bfloat16 if bf16_pays(device) else torch.float32
    return {"fp32": torch.float32, "bf16": torch.bfloat16}[name]


# ---------------------------------------------------------------------------------------------------------------------
# Flags


def positive(kind):
    def parse(text):
        value = kind(text)
        if not (value > 0 and math.isfinite(value)):
            raise ValueError
        return value
    parse.__name__ = f"positive {kind.__name__}"
    return parse


def between(kind, low, high):
    def parse(text):
        value = kind(text)
        if not low <= value <= high or value == math.inf:
            raise ValueError
        return value
    parse.__name__ = f"{kind.__name__} from {low} to {high}"
    return parse


def add_device_flags(parser):
    parser.add_argument("--device", default="auto", help="cuda, cpu, mps or auto (a GPU if there is one) (default: auto)")
    parser.add_argument("--dtype", choices=("auto", "fp32", "bf16"), default="auto",
                        help="precision of the matrix products; weights, losses and sums are fp32 (default: bf16 where the hardware has it)")
    parser.add_argument("--micro_tokens", type=positive(int), help="tokens computed at once: what fits in memory, never the result "
                        "(default: from the model's size and the memory)")


def add_training_flags(parser, batch, batch_unit, lr, schedule, warmup):
    """The flags of every training script. `lr` is the text that explains the default rate."""
    parser.add_argument("--out", required=True, help="folder of the run: metrics.jsonl, checkpoints, and when done a loadable checkpoint itself")
    parser.add_argument("--batch", type=positive(int), default=batch, help=f"{batch_unit} in an optimizer step, over all ranks (default: %(default)s)")
    parser.add_argument("--steps", type=positive(int), help="optimizer steps (default: what --epochs comes to)")
    parser.add_argument("--epochs", type=positive(float), default=1, help="passes over the training data; ignored where --steps is given (default: %(default)s)")
    parser.add_argument("--lr", type=positive(float), help=f"peak learning rate of AdamW (default: {lr})")
    parser.add_argument("--schedule", choices=("constant", "cosine", "linear"), default=schedule,
                        help="of the learning rate after warm-up: constant, cosine to a tenth, linear to 0 (default: %(default)s)")
    parser.add_argument("--warmup", type=between(float, 0, 1), default=warmup, help="part of the steps in which the rate rises from 0, 0 to 1 (default: %(default)s)")
    parser.add_argument("--weight_decay", type=between(float, 0, math.inf), default=0.1, help="AdamW's, on matrices only (default: %(default)s)")
    parser.add_argument("--clip", type=positive(float), default=1.0, help="largest gradient norm (default: %(default)s)")
    parser.add_argument("--seed", type=between(int, 0, 2**32), default=0, help="of initial weights and data order (default: %(default)s)")
    parser.add_argument("--compile", action="store_true", help="compile the blocks with torch.compile: a minute at the start, faster steps after")
    parser.add_argument("--eval_every", type=between(int, 0, 2**62), help="steps between evaluations, with one at the end; 0 for none at all (default: a tenth of the run)")
    parser.add_argument("--save_every", type=positive(int), help="steps between checkpoints; there is always one at the end (default: a fifth of the run)")
    parser.add_argument("--resume", action="store_true", help="go on from the newest checkpoint in --out, exactly as if never stopped")
    add_device_flags(parser)


RESUME_MAY_CHANGE = {"device", "micro_tokens", "compile", "eval_every", "save_every", "resume", "out", "data"}


def fresh_model(args, tokenizer, ctx, device, value_head=False):
    """A model of --size with weights drawn from --seed. Raises InputError if training it cannot fit in this machine."""
    config = Config(*SIZES[args.size], tokenizer.vocab_size, ctx, value_head=value_head)
    with torch.device("meta"):
        need = 16 * GPT(config).n_params()[1]
    have = device_memory(device)
    if need > have:  # said here, as the system would rather kill this process, or another one
        raise InputError(f"--size {args.size}: weights, gradients and optimizer take {need / 2**30:,.0f} GiB, and this {device.type} has "
                         f"{have / 2**30:,.0f}; give a smaller --size")
    return GPT(config).init_weights(args.seed)


def device_memory(device):
    """Bytes of memory that the device has in all."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def trained_on(earlier, files, held_out):
    """What a checkpoint remembers of its data, that of its ancestors included, so that evaluation can keep away from it:
    a list of {"file", "digest" of the content, "held_out" fraction of its groups}."""
    own = [{"file": str(f), "digest": file_digest(f).hex(), "held_out": held_out} for f in files]
    return own + [e for e in (earlier or {}).get("trained_on", []) if e not in own]


def resumed(args, kind, files):
    """(model, tokenizer, meta) of the run in --out if --resume is given and it has a checkpoint, else None.

    Raises InputError where --out holds a run and --resume is missing, or where flags or the content of the data `files`
    differ from those it began with.
    """
    out = Path(args.out)
    if not (out / "metrics.jsonl").exists() and not (out / "meta.json").exists():
        return None
    if not args.resume:
        raise InputError(f"{out}: holds a run already; give --resume to go on with it, or another --out")
    if not any(out.glob("step-*")) and not (out / "meta.json").exists():
        return None  # stopped before its first checkpoint
    model, tokenizer, meta = checkpoint.load(out)
    flags = vars(args)
    changed = [k for k, v in meta["flags"].items() if k in flags and k not in RESUME_MAY_CHANGE and flags[k] != v]
    if meta["kind"] != kind or changed:
        was = ", ".join([f"kind {meta['kind']}"] * (meta["kind"] != kind) + [f"--{k} {meta['flags'][k]}" for k in changed])
        raise InputError(f"{out}: --resume goes on as the run began: {was}")
    if meta["data"] != content_key(files):
        raise InputError(f"{out}: --resume goes on as the run began: the --data given now has another content")
    return model, tokenizer, meta


def micro_tokens(args, model, device):
    """Tokens computed at once: --micro_tokens, or what a third of the free memory holds (256 to 65,536)."""
    if args.micro_tokens:
        return args.micro_tokens
    free = device_memory(device) - 18 * model.n_params()[1]
    fit = free / 3 / token_bytes(model.config)
    return int(min(max(fit, 256), 8192 if device.type == "cpu" else 65536))


def token_bytes(config):
    """Activations kept for the backward pass, in bytes a token: counted from the block's saved tensors in bf16."""
    return config.n_layer * (28 * config.d_model + 8 * config.d_ff + 4 * config.n_head * min(config.ctx, 512))


def print_plan(args, ranks, model, n_steps, lr, tokens_at_once, lines):
    blocks, total = model.n_params()
    c = model.config
    memory = 16 * total + 2 * blocks + tokens_at_once * token_bytes(c)
    flags = " ".join(f"--{k} {v}" for k, v in vars(args).items() if v is not None and v is not False)
    ranks.say(f"flags: {flags}\n"
              f"model: {c.n_layer} layers x {c.d_model}, {c.n_head} heads, ctx {c.ctx}, vocabulary {c.vocab_size:,}; "
              f"{blocks / 1e6:.2f}M parameters in the blocks, {total / 1e6:.2f}M in all\n" + "\n".join(lines) + "\n"
              f"run: {n_steps:,} steps, peak learning rate {lr:.3g}, on {ranks.world} x {ranks.device.type} in "
              f"{str(model.dtype).removeprefix('torch.')}, {tokens_at_once:,} tokens at once, about {memory / 2**30:.1f} GiB a rank\n"
              f"output: {args.out}")


# ---------------------------------------------------------------------------------------------------------------------
# The loop


def lm_rate(d_model):
    """The default peak rate of a language model of this width; the other stages' rates are multiples of it."""
    return 3e-3 * (128 / d_model) ** 0.5


def learning_rate(args, peak, step, n_steps):
    """The rate of the update that follows `step` updates: linear warm-up, then the schedule."""
    warmup = int(args.warmup * n_steps)
    if step < warmup:
        return peak * (step + 1) / (warmup + 1)
    done = (step - warmup) / max(1, n_steps - warmup)
    return peak * {"constant": 1.0, "linear": 1 - done, "cosine": 0.1 + 0.45 * (1 + math.cos(math.pi * done))}[args.schedule]


def train(args, ranks, model, tokenizer, *, n_steps, lr, micro_batches, loss, evaluate, where, unit, meta, metric_names=(), resumed_from=None):
    """Train `model` in place and leave its checkpoint in --out.

    micro_batches(step) -> this rank's micro-batches of a step, a pure function. loss(model, batch) -> (sum, count,
    metrics). evaluate(model) -> dict of figures, called on all ranks. where(batch) -> its examples in words. unit: of
    count. metric_names: keys of `metrics`, known to ranks without a batch too. meta: what the checkpoint shall remember.
    Returns the last evaluation's figures.
    """
    model.to(ranks.device)
    parameters = [p for p in model.parameters() if p.requires_grad]
    decay = [p for p in parameters if p.dim() >= 2]
    optimizer = torch.optim.AdamW(
        [{"params": decay, "weight_decay": args.weight_decay},
         {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0}], lr=lr, betas=(0.9, 0.95), fused=True)
    step = 0
    if resumed_from:
        step = resumed_from["step"]
        optimizer.load_state_dict(checkpoint.load_train_state(args.out)["optimizer"])
        ranks.say(f"resumed after step {step}")
    if ranks.world > 1:
        for p in model.parameters():
            dist.broadcast(p.data, 0)
    if args.compile:
        for block in model.model.layers:  # but not attention: a packed row has shapes of its own, and the code would be made anew for each
            block.self_attn.attend = torch.compiler.disable(block.self_attn.attend)
            block.compile(dynamic=True)

    log = Log(args, ranks, step, n_steps, unit)
    eval_every = -(-n_steps // 10) if args.eval_every is None else args.eval_every
    save_every = args.save_every or -(-n_steps // 5)
    begun_at, figures = step, resumed_from["metrics"] if resumed_from else {}
    with StopSignal() as stop:
        while True:
            last, fresh = step == n_steps, step > begun_at
            if fresh and eval_every and (last or step % eval_every == 0):
                figures = evaluated(model, evaluate)
                log.evaluation(step, figures)
            if fresh and (last or step % save_every == 0 or stop.signal):
                if ranks.main():
                    checkpoint.save(args.out, model, tokenizer, {**meta, "step": step, "n_steps": n_steps, "metrics": figures,
                                    "flags": vars(args)}, {"optimizer": optimizer.state_dict(), "step": step})
            if last or stop.signal:
                break
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(args, lr, step, n_steps)
            torch.manual_seed(args.seed * 1_000_003 + step)  # nothing here draws; whoever adds dropout resumes exactly too

            batches, sums = micro_batches(step), []
            total, count, metrics = 0.0, 0, {}
            for batch in batches:
                batch_sum, batch_count, batch_metrics = loss(model, batch)
                batch_sum.backward()
                sums.append(batch_sum.detach())
                total, count = total + sums[-1], count + batch_count
                metrics = {k: metrics.get(k, 0) + v for k, v in batch_metrics.items()}
            total, count, interrupted, *metric_sums = ranks.sum([total, count, stop.asked, *(metrics.get(k, 0) for k in metric_names)])
            norm = scale_and_clip(parameters, count, args.clip, ranks)
            if not (math.isfinite(total) and math.isfinite(norm)):
                report_non_finite(step, batches, sums, total, where, args.out)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            step += 1
            stop.signal = bool(interrupted)
            log.step(step, total / count, count, norm, group["lr"], {k: v / count for k, v in zip(metric_names, metric_sums)})
    log.close()
    if ranks.main():
        if step == n_steps:
            checkpoint.finish(args.out)
            print(f"done: {args.out} after {step} steps")
        else:
            print(f"stopped after step {step} of {n_steps}; go on with --resume")
    if ranks.world > 1:
        dist.destroy_process_group()
    return figures


def scale_and_clip(parameters, count, clip, ranks):
    """Turn each rank's gradient of a summed loss into the gradient of the global mean, clipped; returns its norm.

    One all-reduce a step on plain gradients, after the last micro-batch: a rank may have more micro-batches than
    another, or none, which DistributedDataParallel's hooks do not allow.
    """
    grads = []
    for p in parameters:
        if p.grad is None:
            p.grad = torch.zeros_like(p)
        grads.append(p.grad)
    if ranks.world > 1:
        for work in [dist.all_reduce(g, async_op=True) for g in grads]:
            work.wait()
    norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(grads))).item() / count
    torch._foreach_mul_(grads, min(1.0, clip / (norm + 1e-6)) / count)
    return norm


@torch.no_grad()
def evaluated(model, evaluate):
    model.eval()
    figures = evaluate(model)
    model.train()
    return figures


def report_non_finite(step, batches, sums, total, where, out):
    bad = [b for b, s in zip(batches, sums) if not math.isfinite(s)]
    if bad or math.isfinite(total):  # else it is another rank that has them, and says so
        print(f"{os.path.basename(sys.argv[0])}: error: the loss or gradient of step {step + 1} is not finite; nothing of it was saved "
              f"({out} keeps its last checkpoint). Examples: {'; '.join(where(b) for b in bad or batches)}. "
              "Look at them, or give a smaller --lr.", file=sys.stderr, flush=True)
    os._exit(3)  # at once: other ranks may wait in a collective


class StopSignal:
    """Ctrl-C and SIGTERM ask for a stop after the step under way. `asked`: this rank was; `signal`: all ranks agreed."""

    def __enter__(self):
        self.asked = self.signal = False
        self.before = {s: signal.signal(s, self._ask) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def _ask(self, number, frame):
        self.asked = True

    def __exit__(self, *error):
        for number, handler in self.before.items():
            signal.signal(number, handler)


class Log:
    """Progress for people (a bar on a terminal, plain lines elsewhere) and metrics.jsonl for programs; rank 0 only."""

    def __init__(self, args, ranks, step, n_steps, unit):
        self.main, self.unit, self.n_steps, self.first = ranks.main(), unit, n_steps, step
        self.begun = self.spoke = time.perf_counter()
        self.seen = self.seen_before = 0
        if not self.main:
            return
        path = Path(args.out) / "metrics.jsonl"
        kept = [line for line in path.read_text().splitlines() if _step_of(line) <= step] if path.exists() and step else []
        write_file(path, "".join(line + "\n" for line in kept))  # whole or not at all: a run may be killed here too
        self.file = open(path, "a")
        self.bar = tqdm(total=n_steps, initial=step, unit="step", disable=None, dynamic_ncols=True)

    def step(self, step, loss, count, norm, lr, metrics):
        if not self.main:
            return
        self.seen += count
        now = time.perf_counter()
        self._write({"step": step, "loss": loss, "lr": lr, "grad_norm": norm, "count": count, "seconds": now - self.begun, **metrics})
        words = f"loss {loss:.4f}" + "".join(f" {k} {v:.4f}" for k, v in metrics.items())
        speed = (self.seen - self.seen_before) / max(now - self.spoke, 1e-9)
        if not self.bar.disable:
            self.bar.set_postfix_str(f"{words} {self.seen / (now - self.begun):,.0f} {self.unit}/s", refresh=False)
            self.bar.update()
        elif step == self.first + 1 or step == self.n_steps or now - self.spoke > 10:
            left = (now - self.begun) / (step - self.first) * (self.n_steps - step)
            print(f"step {step}/{self.n_steps} {words} lr {lr:.3g} norm {norm:.2f} {speed:,.0f} {self.unit}/s "
                  f"{datetime.timedelta(seconds=round(left))} left", flush=True)
            self.spoke, self.seen_before = now, self.seen

    def evaluation(self, step, figures):
        if self.main:
            self._write({"step": step, "eval": figures})
            words = " ".join(f"{k} {v:.4f}" if isinstance(v, float) else f"{k} {v}" for k, v in figures.items())
            self.bar.write(f"step {step} held out: {words}", file=sys.stdout)
            sys.stdout.flush()

    def _write(self, record):
        self.file.write(json.dumps(record) + "\n")
        self.file.flush()

    def close(self):
        if self.main:
            self.bar.close()
            self.file.close()


def _step_of(line):
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError):  # a line that was being written when the run was killed
        return math.inf
