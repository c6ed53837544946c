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
import json
import os
import shlex
import sys
from dataclasses import replace
from pathlib import Path

import torch

import checkpoint
import plan
from data.errors import Parser, run_main
from data.files import check_writable, write_file
from data.tokenizer import get_tokenizer
from model import SIZES, Config
from ranks import check_compiler, pick_dtype, start
from speed.language_models import measure_lm
from speed.paper_sizes import measure_gpu
from speed.preference_models import measure_pm
from speed.prompts import measure_prompt

GPU_SIZES = ("197m", "810m", "2.7b")


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


if __name__ == "__main__":
    run_main(main)
