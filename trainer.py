"""The one training loop.

A script gives the loop `loss(model, batch) -> (sum, count, metrics)`: the summed loss of one micro-batch, the
number of tokens or comparisons that it is a sum over, and a dict of further sums over the same ones. A step's
loss is the sum over all micro-batches and ranks, divided by the count over all of them. Therefore a batch of
8, 8 batches of 1 and two ranks take the same step, which a mean of means would not.

With several processes (ranks.py) each has a share of every step. Parallel adds up their gradients, and
ranks.sum their numbers, and at each such point a rank waits for all others. So all have to go through the
model equally often: a rank with fewer micro-batches than another repeats one with weight 0.
"""
import datetime
import json
import math
import os
import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
import torch.distributed as dist
from tqdm import tqdm

import checkpoint
from data.errors import InputError, is_first_to_fail
from data.files import content_key, file_digest, lock_folder, write_file
from plan import eval_interval, flag_text
from ranks import Parallel, check_compiler, local, place, whole

# ------------------------------------------------------------------------------------------------------------
# Going on with a run

RESUME_MAY_CHANGE = {"device", "micro_tokens", "compile", "recompute", "shard", "eval_every", "save_every",
                     "resume", "out", "data", "dialogue"}  # the content of data files is compared instead

# What a run would overwrite or remove in --out, where another program may have written it.
MODEL_FILES = *checkpoint.FILES, "*.safetensors*", "step-[0-9]*"


def trained_on(earlier, sets, held_out):
    """What a checkpoint remembers of the files that it and its ancestors were trained on, so that evaluation
    can keep to the held-out groups: a list of {"file", "digest" of the content, "held_out" fraction of the
    groups, "data" key of all files that were read together}. sets: the files of each set that was read by
    itself.
    """
    entries = []
    for files in sets:
        data = content_key(files)
        entries += [{"file": str(f), "digest": file_digest(f).hex(), "held_out": held_out, "data": data}
                    for f in files]
    return entries + [entry for entry in (earlier or {}).get("trained_on", []) if entry not in entries]


def resumed(args, ranks, kind, files):
    """(model, tokenizer, meta) of the run in --out if --resume is given and there is a checkpoint, else None.

    Raises InputError if --out holds a run and --resume is missing, if it holds a model that is no run's, and
    if the flags or the content of the data files are not those that the run began with.
    """
    out = Path(args.out)
    if not (out / "metrics.jsonl").exists() and not (out / "meta.json").exists():
        if found := [path.name for pattern in MODEL_FILES for path in out.glob(pattern)]:
            raise InputError(f"{out}: holds {found[0]}, of a model or a run of another program, which this run "
                             "would overwrite; give another --out")
        if args.resume:
            ranks.say(f"note: {out} holds no run to go on with, so this one begins")
        return None
    if ranks.main():  # takes the lock and gives it back: this raises InputError if another process writes there
        os.close(lock_folder(out))  # other ranks do not try, as they would meet rank 0's lock
    if not args.resume:
        raise InputError(f"{out}: holds a run already; give --resume to go on with it, or another --out")
    if not any(out.glob("step-*")) and not (out / "meta.json").exists():
        return None  # it was stopped before its first checkpoint
    model, tokenizer, meta = checkpoint.load(out, lazily=True)
    flags = vars(args)
    changed = [f"without --{name}" if value is None or value is False else flag_text(name, value)
               for name, value in meta["flags"].items()
               if name in flags and name not in RESUME_MAY_CHANGE and flags[name] != value]
    if meta["kind"] != kind:
        changed.insert(0, f"kind {meta['kind']}")
    if changed:
        raise InputError(f"{out}: --resume goes on as the run began: {', '.join(changed)}")
    if meta["data"] != content_key(files):
        raise InputError(f"{out}: --resume goes on as the run began, but --data has another content now")
    version = (meta.get("versions") or {}).get("torch")
    if version != torch.__version__:
        ranks.say(f"note: {out} was saved by torch {version}; with {torch.__version__} the run goes on, but "
                  "not bit for bit")
    return model, tokenizer, meta


# ------------------------------------------------------------------------------------------------------------
# The loop


def learning_rate(args, peak, step, n_steps):
    """The learning rate after `step` steps: linear warm-up, then the schedule."""
    warmup = int(args.warmup * n_steps)
    if step < warmup:
        return peak * (step + 1) / (warmup + 1)
    done = (step - warmup) / max(1, n_steps - warmup)
    if args.schedule == "linear":
        return peak * (1 - done)
    if args.schedule == "cosine":
        return peak * (0.1 + 0.45 * (1 + math.cos(math.pi * done)))  # from the peak to a tenth of it
    return peak


def make_optimizer(model, lr, weight_decay):
    """AdamW in torch's fused form, with weight decay on matrices and none on norms."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [{"params": [p for p in parameters if p.dim() >= 2], "weight_decay": weight_decay},
              {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95), fused=True)


def train(args, ranks, model, tokenizer, *, n_steps, lr, micro_batches, loss, evaluate, where, unit, meta,
          metric_names=(), resumed_from=None, largest=None):
    """Train `model` in place and leave its checkpoint in --out. Returns the last evaluation's figures.

    micro_batches(step, rank): a rank's micro-batches of a step, by default this one's, on the CPU, each with
        .to(device) and .pin_memory(). A pure function, called in a thread of its own while the step before is
        computed. If a step has fewer examples than ranks, the first ranks have them.
    loss(model, batch) -> (sum, count, metrics): as the head of this file says.
    evaluate(model) -> dict of figures. It is called on all ranks.
    where(batch): the batch's examples in words, for an error message.
    unit: what `count` counts, for the log. metric_names: the keys of `metrics`, for ranks without a batch.
    meta: what the checkpoint is to remember. resumed_from: the meta of the run to go on with, or None.
    largest: a micro-batch that needs more memory than the usual ones, or None. It is computed once before the
        first step, so that a run that does not fit in memory fails then, and not after hours.
    """
    ranks.agree({"the content of --data": meta["data"], "the version of torch": torch.__version__,
                 "the step to go on from": resumed_from and resumed_from["step"]})
    place(model, ranks, args.shard)
    model.recompute = args.recompute
    if args.compile:
        check_compiler(ranks.device)
        model.compile_blocks()
    parallel_model = Parallel(model, loss, ranks, args.shard)
    optimizer = make_optimizer(model, lr, args.weight_decay)
    step, figures = 0, {}
    if resumed_from:
        step, figures = resumed_from["step"], resumed_from["metrics"]
        checkpoint.load_optimizer(args.out, optimizer)
        ranks.say(f"resumed after step {step}")
    if largest is not None:
        parallel_model.backward(largest.to(ranks.device))
        optimizer.zero_grad(set_to_none=True)

    first_step = step
    eval_every = eval_interval(args, n_steps)
    save_every = args.save_every or math.ceil(n_steps / 5)
    log = Log(args, ranks, step, n_steps, unit)
    with StopSignal() as stop, BatchMaker(micro_batches, n_steps, ranks.device) as maker:
        while True:
            is_last = step == n_steps or stop.agreed
            if step > first_step:
                if eval_every and (step == n_steps or step % eval_every == 0):
                    figures = evaluated(model, evaluate)
                    if figures:  # there are none where nothing is held out
                        log.evaluation(step, figures)
                if is_last or step % save_every == 0:
                    if ranks.main() or args.shard > 1:  # ranks that share a model each write a part
                        checkpoint.save(
                            args.out, model.config, model.state_dict(), tokenizer,
                            {**meta, "step": step, "n_steps": n_steps, "metrics": figures,
                             "flags": vars(args)},
                            {"optimizer": optimizer.state_dict(), "step": step})
            if is_last:
                break

            rate = learning_rate(args, lr, step, n_steps)
            for group in optimizer.param_groups:
                group["lr"] = rate
            torch.manual_seed(args.seed * 1_000_003 + step)  # so resumed runs stay exact if you add dropout
            batches = maker.batches(step)
            n_batches, filler = ranks.largest(len(batches)), None
            if len(batches) < n_batches:  # another rank has more
                filler = batches[-1] if batches else micro_batches(step, rank=0)[0].to(ranks.device)
            sums, count, metrics = compute_gradient(parallel_model, batches, filler, n_batches, metric_names)
            count, interrupted = ranks.sum([count, stop.asked])
            norm = scale_and_clip(optimizer, count, args.clip)
            total, *metric_sums = ranks.sum([sum(sums), *metrics.values()])
            norm = norm.item()
            if not (math.isfinite(total) and math.isfinite(norm)):
                report_non_finite(step, batches, sums, total, where, args.out)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            step += 1
            stop.agreed = interrupted > 0
            means = {name: value / count for name, value in zip(metrics, metric_sums)}
            log.step(step, total / count, count, norm, rate, means)
    log.close()
    if ranks.main() and step == n_steps:
        checkpoint.finish(args.out)
        print(f"done: {args.out} after {step} steps")
    elif ranks.main():
        print(f"stopped after step {step} of {n_steps}; go on with --resume")
    if ranks.world > 1:
        # DistributedDataParallel has to go before its process group. The other way round, the process hangs now
        # and then: it waits for a thread of gloo's, which waits for Python's lock, which the process holds.
        del parallel_model
        dist.destroy_process_group()
    elif step < n_steps:
        # As shells have it, so that what was to follow the whole run does not begin. Under torchrun a rank that
        # fails would end the others, so there a stopped run ends with 0.
        sys.exit(128 + stop.asked)
    return figures


class BatchMaker:
    """Makes the next step's micro-batches in a thread while a step is computed; for a GPU in pinned
    memory."""

    def __init__(self, micro_batches, n_steps, device):
        self.micro_batches, self.n_steps, self.device = micro_batches, n_steps, device
        self.pool, self.next = ThreadPoolExecutor(1), None

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.pool.shutdown(cancel_futures=True)

    def _make(self, step):
        batches = self.micro_batches(step)
        return [batch.pin_memory() for batch in batches] if self.device.type == "cuda" else batches

    def batches(self, step):
        """The micro-batches of this step, on the device. Steps are asked for one after the other."""
        ready = self.next or self.pool.submit(self._make, step)
        self.next = self.pool.submit(self._make, step + 1) if step + 1 < self.n_steps else None
        return [batch.to(self.device, non_blocking=True) for batch in ready.result()]


def compute_gradient(parallel_model, batches, filler, n_batches, metric_names):
    """Add up the gradient of a rank's micro-batches. Returns (the summed loss of each, what they count in all,
    {name: the metric's sum over all}). A rank with fewer than n_batches repeats `filler`, with weight 0."""
    sums, count, metrics = [], 0, dict.fromkeys(metric_names, 0.0)
    for i in range(n_batches):
        is_last = i == n_batches - 1
        if i >= len(batches):
            parallel_model.backward(filler, weight=0.0, is_last=is_last)
            continue
        batch_sum, batch_count, batch_metrics = parallel_model.backward(batches[i], is_last=is_last)
        sums.append(batch_sum)
        count += batch_count
        for name in metric_names:
            metrics[name] = metrics[name] + batch_metrics[name]
    return sums, count, metrics


def scale_and_clip(optimizer, count, clip):
    """Turn the gradient of the loss that is summed over all ranks into that of the global mean, and clip it.
    Returns its norm before clipping, a tensor. Where ranks share a model, `whole` is the norm of all parts, and
    `local` is this rank's part of a gradient."""
    gradients = [p.grad for group in optimizer.param_groups for p in group["params"]]
    norm = torch.nn.utils.get_total_norm(gradients)
    norm = whole(norm) / count
    clip_factor = (clip / (norm + 1e-6)).clamp(max=1)  # 1 leaves a gradient that is short enough as it is
    torch._foreach_mul_([local(gradient) for gradient in gradients], clip_factor / count)
    return norm


@torch.no_grad()
def evaluated(model, evaluate):
    model.eval()
    figures = evaluate(model)
    model.train()
    return figures


def report_non_finite(step, batches, sums, total, where, out):
    """Name the examples whose loss is not finite, and end all ranks with exit code 3."""
    bad = [batch for batch, batch_sum in zip(batches, sums) if not math.isfinite(batch_sum)]
    is_elsewhere = not bad and not math.isfinite(total)  # another rank has the bad examples, and names them
    if not is_elsewhere and is_first_to_fail():
        script = os.path.basename(sys.argv[0])
        print(f"{script}: error: the loss or gradient of step {step + 1} is not finite; nothing of it was "
              f"saved ({out} keeps its last checkpoint). Examples: "
              f"{'; '.join(where(batch) for batch in bad or batches)}. Look at them, or give a smaller --lr.",
              file=sys.stderr, flush=True)
    os._exit(3)  # at once, as other ranks may be waiting in a collective


class StopSignal:
    """Ctrl-C and SIGTERM ask for a stop after the current step.

    asked: the signal that asked this rank to stop, or 0. agreed: all ranks know that some rank was asked, so
    they stop together.
    """

    def __enter__(self):
        self.asked, self.agreed = 0, False
        self.before = {number: signal.signal(number, self._ask) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def _ask(self, number, frame):
        self.asked = number

    def __exit__(self, *error):
        for number, handler in self.before.items():
            signal.signal(number, handler)


class Log:
    """Progress for people (a bar on a terminal, plain lines elsewhere) and metrics.jsonl for programs. Only
    rank 0 writes."""

    def __init__(self, args, ranks, step, n_steps, unit):
        self.main, self.unit, self.n_steps, self.first_step = ranks.main(), unit, n_steps, step
        self.begun = self.last_line = time.perf_counter()
        self.seen = self.seen_at_last_line = 0
        if not self.main:
            return
        self.lock = lock_folder(args.out)
        path = Path(args.out) / "metrics.jsonl"
        kept = []
        if path.exists() and step:  # a resumed run does the steps after its checkpoint again
            kept = [line + b"\n" for line in path.read_bytes().splitlines() if _step_of(line) <= step]
        write_file(path, b"".join(kept))
        self.file = open(path, "a")
        self.bar = tqdm(total=n_steps, initial=step, unit="step", disable=None, dynamic_ncols=True)

    def step(self, step, loss, count, norm, lr, metrics):
        if not self.main:
            return
        self.seen += count
        now = time.perf_counter()
        self._write({"step": step, "loss": loss, "lr": lr, "grad_norm": norm, "count": count,
                     "seconds": now - self.begun, **metrics})
        words = f"loss {loss:.4f}" + "".join(f" {name} {value:.4f}" for name, value in metrics.items())
        if not self.bar.disable:
            speed = self.seen / (now - self.begun)
            self.bar.set_postfix_str(f"{words} {speed:,.0f} {self.unit}/s", refresh=False)
            self.bar.update()
        elif step == self.first_step + 1 or step == self.n_steps or now - self.last_line > 10:
            speed = (self.seen - self.seen_at_last_line) / max(now - self.last_line, 1e-9)
            left = (now - self.begun) / (step - self.first_step) * (self.n_steps - step)
            left = datetime.timedelta(seconds=round(left))
            print(f"step {step}/{self.n_steps} {words} lr {lr:.3g} norm {norm:.2f} {speed:,.0f} "
                  f"{self.unit}/s, {left} left", flush=True)
            self.last_line, self.seen_at_last_line = now, self.seen

    def evaluation(self, step, figures):
        if self.main:
            self._write({"step": step, "eval": figures})
            words = [f"{k} {v:.4f}" if isinstance(v, float) else f"{k} {v}" for k, v in figures.items()]
            self.bar.write(f"step {step} held out: {' '.join(words)}", file=sys.stdout)
            sys.stdout.flush()

    def _write(self, record):
        self.file.write(json.dumps(record) + "\n")
        self.file.flush()

    def close(self):
        if self.main:
            self.bar.close()
            self.file.close()
            os.close(self.lock)


def _step_of(line):
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError, RecursionError):
        # This line was being written when the run was killed.
        return math.inf
