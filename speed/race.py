"""Candidates race: they do the same work in turn, and a table says how fast each was."""
import ctypes
import os
import re
import resource
import sys
import time
from pathlib import Path

import numpy as np
import torch

import trainer
from data.errors import is_out_of_memory
from model import GPT


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
