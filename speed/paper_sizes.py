"""Models of the paper's sizes on one GPU, with the part of its peak that their steps reach."""
import functools
import gc

import numpy as np
import torch

import plan
from data import toy
from data.comparisons import load_comparisons
from model import SIZES, Config
from ranks import device_memory
from speed.language_models import GPT2_ROWS
from speed.preference_models import Pairs
from speed.race import clock, make_model, race, table, training
from speed.trl_trainer import trl_candidates
from train_lm import window_loss


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
