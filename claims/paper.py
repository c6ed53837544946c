"""What the paper's own sizes would take (Appendix A): GPUs, memory, days and commands, by simulated steps.

Nothing here was run on GPUs: memory, operations and bytes are counted in a simulated step, and the speeds of
the machine are assumptions.
"""
import itertools

import torch

import plan
from model import GPT, SIZES, Config
from simulation import PARTS, memory, simulate
from train_lm import window_loss

PAPER = "13m", "42m", "197m", "810m", "2.7b", "13b", "52b"
CTX, VOCABULARY, STEP = 8192, 65536, 2**20  # STEP: tokens in a step of the language model
ROOM = 0.9 * plan.GPU_BYTES  # the rest is for CUDA, NCCL and the gaps between tensors
IN_NODE, BETWEEN = 400e9, 50e9  # bytes a second that a GPU sends inside its node, and to other nodes
MANY = 64  # GPUs in nodes of 8, on which ways to share a model are compared

STAGES = (  # tokens: 400B; 350M; 8.3M pairs of 500 tokens; 40,000 pairs of 300
    ("language model", 400e9, "train_lm.py --data texts/ --tokenizer bpe:65536 --size {size} --ctx 8192 "
     "--batch 1048576 --out out/{size}/lm"),
    ("distillation", 350e6, "distill.py --init out/{size}/lm --prompt hhh --data texts/ --dialogue "
     "stackexchange.jsonl --sequences 170000 --out out/{size}/distilled"),
    ("PMP on the Mix", 8.3e6 * 500, "train_pm.py --init out/{size}/lm --stage pmp --binarise --data "
     "stackexchange.jsonl reddit.jsonl wikipedia.jsonl --out out/{size}/pmp"),
    ("finetuning", 4e4 * 300, "train_pm.py --init out/{size}/pmp --stage finetune --data hh/ "
     "--out out/{size}/pm"))


def print_plan():
    """Print what each stage of the paper would take at its seven sizes; run nothing."""
    speed = plan.rank_flops(torch.device("cuda"))
    print(f"""\
Counted in a simulated step (simulation.py), with flash attention and rows of {CTX:,} tokens. Nothing was run
on GPUs. Layers are extrapolated from the first four, and a token is taken to cost the same in all stages.
Assumed: GPUs of {plan.GPU_BYTES / 1e9:.0f} GB, of which tensors may take {ROOM / 1e9:.0f}; \
{speed / 1e12:.0f} TFLOP/s, {plan.UTILISATION:.0%} of an H100's peak, recomputed operations counted.
With Slurm: COMMAND='train_lm.py …' sbatch --nodes 1 --gpus-per-node 8 docs/slurm.sbatch
""")
    table = []
    for size in PAPER:
        with torch.device("meta"):
            model = GPT(Config(*SIZES[size], VOCABULARY, CTX))
        model.dtype = torch.bfloat16
        n_gpus, recompute, step, misfits = smallest_machine(model)
        flags = f" --shard {n_gpus}" * (n_gpus > 1) + " --recompute" * recompute
        flags += f" --micro_tokens {CTX * micro_batch(model, n_gpus, recompute, step)}"
        each, n_params = step["flop"] / CTX, model.n_params()[1]
        parts = ", ".join(f"{part} {step[part] / 1e9:.1f}" for part in PARTS if step[part])
        print(f"{size}: {n_params / 1e9:.3f}B parameters with embeddings, on {n_gpus} x GPU:{flags}\n"
              f"  GB a GPU for {CTX:,} tokens: {parts}; {memory(step) / 1e9:.1f} in all\n"
              f"  does not fit: {'; '.join(misfits) or '-'}\n"
              f"  {each / 1e9:.3g} GFLOP a token, {speed / each:,.0f} tokens/s a GPU")
        for name, tokens, command in STAGES:
            days = each * tokens / n_gpus / speed / 86400
            command = launch(n_gpus, command.format(size=size) + flags)
            teacher = plan.CAST_BYTES * n_params
            if name == "distillation" and memory(step) + teacher > ROOM:
                command = f"does not fit: each GPU holds the whole teacher as well, {teacher / 1e9:.0f} GB"
            print(f"  {name:<16}{tokens / 1e6:>8,.0f}M tokens {days:>9,.2f} days   {command}")
        table.append(communication(size, model, n_gpus, recompute, speed))
    print(f"""
A step of {STEP:,} tokens on {MANY} GPUs in nodes of 8. Assumed: a GPU sends {IN_NODE / 1e9:.0f} GB/s inside its
node and {BETWEEN / 1e9:.0f} to others. FSDP gathers a block's weights while another is computed, so what takes less
than the computation is hidden. HSDP: groups of --shard GPUs are copies of each other, and add up their
gradients. FSDP: all GPUs share one model.

{"":<7}{"computes":>10}{"HSDP --shard":>14}{"gathers":>11}{"reduces":>11}{"in all":>10}   FSDP --shard {MANY}""")
    print("\n".join(table))


def simulated(model, shard, recompute, n_windows=1):
    """A micro-batch of so many windows of CTX tokens on `shard` GPUs that share the model."""
    batch = torch.zeros(n_windows, CTX + 1, dtype=torch.long)
    return simulate(model, lambda model, batch: [window_loss(model, batch)], batch, recompute, True, shard)


def smallest_machine(model):
    """(GPUs, True for --recompute, the simulated step, what does not fit, in words) of the fewest GPUs that can
    train a model, if all of them share it."""
    misfits = []
    for n_gpus, recompute in itertools.product([2**i for i in range(10)], (False, True)):
        if plan.STATE_BYTES * model.n_params()[1] / n_gpus > ROOM:
            continue
        step = simulated(model, n_gpus, recompute)
        if memory(step) < ROOM:
            return n_gpus, recompute, step, misfits
        misfits.append(f"{n_gpus} x GPU{' --recompute' * recompute} ({memory(step) / 1e9:.0f} GB)")


def micro_batch(model, n_gpus, recompute, step):
    """Windows in a micro-batch: as many as fit, but at most a GPU's part of a step, and 65,536 tokens."""
    each = memory(simulated(model, n_gpus, recompute, 2)) - memory(step)
    return int(min(1 + (ROOM - memory(step)) // each, STEP // n_gpus // CTX, 65536 // CTX))


def launch(n_gpus, command):
    """The shell command that starts a script on so many GPUs, 8 in a node."""
    if n_gpus <= 8:
        return f"torchrun --nproc_per_node {n_gpus} {command}"
    return f"COMMAND='{command}' sbatch --nodes {n_gpus // 8} --gpus-per-node 8 docs/slurm.sbatch"


def communication(size, model, shard, recompute, speed):
    """A line of the table: how long a step on MANY GPUs computes, and how long it communicates if groups of
    `shard` of them share a model, or all do. Micro-batches have one window."""
    step, n_micro = simulated(model, MANY, recompute), STEP // MANY // CTX

    def sends(shard):
        """(bytes that a GPU gathers, bytes that it reduces, seconds of both)."""
        gathers, reduces = (n_micro * step[name] * (shard - 1) / shard for name in ("gathered", "reduced"))
        # Copies add up their parts of the gradients by an all-reduce, which sends them twice: those of whole
        # models after the last micro-batch, the others after each.
        n_copies, n_bytes = MANY // shard, 4 * model.n_params()[1] / shard
        all_reduces = 2 * n_bytes * (n_copies - 1) / n_copies * (n_micro if shard > 1 else 1)
        inside = IN_NODE if shard <= 8 else BETWEEN
        return gathers, reduces + all_reduces, (gathers + reduces) / inside + all_reduces / BETWEEN
    gathers, reduces, seconds = sends(shard)
    return (f"{size:<7}{n_micro * step['flop'] / speed:>8.2f} s{shard:>14}{gathers / 1e9:>8.1f} GB"
            f"{reduces / 1e9:>8.1f} GB{seconds:>8.2f} s   {sends(MANY)[2]:.2f} s")
