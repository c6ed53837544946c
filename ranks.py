"""The processes that train together (ranks), the device of each, and the precision that pays there.

With --shard 1 each rank holds the whole model, and DistributedDataParallel adds up the gradients. With --shard
N each holds an N-th of the weights, gradients and optimizer state: FSDP gathers a block's weights when they are
needed, and adds up and scatters its gradients. Groups of N ranks are then copies of each other.
"""
import contextlib
import datetime
import os
import shutil
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn as nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from data.errors import InputError

PATIENCE = datetime.timedelta(minutes=10)  # how long a rank waits for the others, which may be saving


@dataclass
class Ranks:
    """This process's place among those that train together, and its device."""
    rank: int
    world: int
    device: torch.device

    def sum(self, values):
        """Add up a list of numbers over all ranks. Scalar tensors among them are fetched from the device
        together, so a step waits for its device once. Returns floats."""
        tensors = [value for value in values if isinstance(value, torch.Tensor)]
        fetched = iter(torch.stack(tensors).tolist() if tensors else ())
        numbers = [next(fetched) if isinstance(value, torch.Tensor) else float(value) for value in values]
        if self.world == 1:
            return numbers
        total = torch.tensor(numbers, dtype=torch.float64)  # on the CPU: not every device has 64-bit numbers
        dist.all_reduce(total)
        return total.tolist()

    def largest(self, n):
        """The largest of the ranks' whole numbers n."""
        if self.world == 1:
            return n
        number = torch.tensor(n)
        dist.all_reduce(number, dist.ReduceOp.MAX)
        return number.item()

    def smallest(self, n):
        """The smallest of the ranks' whole numbers n."""
        return -self.largest(-n)

    def share(self, items):
        """This rank's part of `items`, a list of (item, True if it counts).

        All ranks get equally many, as they go through a sharded model together. Where there are too few, some
        ranks get one of the others' again, which does not count."""
        places = range(self.rank, self.rank + -(-len(items) // self.world) * self.world, self.world)
        return [(items[place % len(items)], place < len(items)) for place in places]

    def main(self):
        return self.rank == 0

    def agree(self, values):
        """Raise InputError on all ranks if they differ in one of `values`, {what it is: its value}."""
        of_ranks = [None] * self.world
        if self.world == 1:
            return
        dist.all_gather_object(of_ranks, values)
        for rank in range(self.world):
            for name, value in of_ranks[rank].items():
                if value != of_ranks[0][name]:
                    raise InputError(f"{name} is {of_ranks[0][name]} on rank 0, but {value} on rank {rank}; "
                                     "it has to be the same on all ranks")

    def say(self, *words):
        if self.main():
            print(*words, flush=True)


def start(device="auto"):
    """Join the other processes, if torchrun started several, and choose this one's device. Returns Ranks."""
    if device == "auto":
        gpu = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else None
        device = gpu or "cpu"
    world, rank, local_rank = (int(os.environ.get(name, default)) for name, default in
                               (("WORLD_SIZE", 1), ("RANK", 0), ("LOCAL_RANK", 0)))
    try:
        device = torch.device(f"cuda:{local_rank}" if device == "cuda" else device)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"--device {device}: not available here ({str(error).splitlines()[0]})") from None
    # oneDNN keeps a compiled kernel for each shape of matrices, of up to some MB. Packed rows have a new
    # shape at every step and hardly ever meet one again, so its default of 1,024 kernels would only fill the
    # memory.
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "64")
    if world > 1:
        if device.type == "cuda":
            torch.cuda.set_device(device)
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=PATIENCE)
        if device.type == "cpu" and "OMP_NUM_THREADS" not in os.environ:
            processes_here = int(os.environ.get("LOCAL_WORLD_SIZE", world))
            torch.set_num_threads(max(1, os.cpu_count() // processes_here))
    return Ranks(rank, world, device)


# ------------------------------------------------------------------------------------------------------------
# A model on several ranks


class Loss(nn.Module):
    """A model together with its loss, as the one forward pass that DistributedDataParallel has to see."""

    def __init__(self, model, loss):
        super().__init__()
        self.model, self.loss = model, loss

    def forward(self, batch):
        return self.loss(self.model, batch)


class Parallel:
    """A model whose ranks take their steps together. It holds `loss(model, batch) -> (sum, count, metrics)`."""

    def __init__(self, model, loss, ranks, shard=1):
        self.compute = Loss(model, loss)
        self.factor = 1.0
        if ranks.world > 1 and shard == 1:
            self.compute = DistributedDataParallel(self.compute, gradient_as_bucket_view=True)
            self.factor = float(ranks.world)  # it takes the mean over the ranks, and our gradient is a sum

    def backward(self, batch, weight=1.0, is_last=True):
        """Compute the loss of a micro-batch and add `weight` times its gradient to that of the step. Gradients
        of all ranks are added up with the step's last one; those of a sharded model with each, as a rank has no
        room for all of them. Returns (sum, count, metrics)."""
        context = contextlib.nullcontext()
        if isinstance(self.compute, DistributedDataParallel) and not is_last:
            context = self.compute.no_sync()
        with context:
            loss_sum, count, metrics = self.compute(batch)
            (weight * self.factor * loss_sum).backward()
        return loss_sum.detach(), count, metrics


def shard_mesh(ranks, shard):
    """The ranks in groups of `shard` that share a model. Several groups are copies of each other."""
    kind, n_copies = ranks.device.type, ranks.world // shard
    shape, names = ((n_copies, shard), ("replicate", "shard")) if n_copies > 1 else ((shard,), ("shard",))
    return init_device_mesh(kind, shape, mesh_dim_names=names)


def shard_model(model, mesh):
    """Give each rank its part of every tensor of the model. The matrices of a block are gathered together, in
    the precision in which they are applied. Norms are applied in fp32: those of all blocks are gathered
    together, and so is all else, for a whole forward and backward pass."""
    in_fp32 = MixedPrecisionPolicy(cast_forward_inputs=False)
    in_its_dtype = MixedPrecisionPolicy(model.dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    norms = [module for module in model.modules() if isinstance(module, nn.RMSNorm)]
    fully_shard(norms, mesh=mesh, mp_policy=in_fp32, reshard_after_forward=False)
    for block in model.model.layers:
        fully_shard(block, mesh=mesh, mp_policy=in_its_dtype)
    fully_shard(model, mesh=mesh, mp_policy=in_fp32)
    for module in (norms[0], *model.model.layers, model):
        module.set_gradient_divide_factor(1.0)  # our loss is a sum, and is divided by the global count
        module.set_force_sum_reduction_for_comms(True)  # gloo knows no other way to leave the factor out


def place(model, ranks, shard):
    """Bring a model to its device and, if `shard` ranks are to share it, to these ranks. If its tensors have
    no memory yet, each rank takes its part of the weights from model.source."""
    is_empty = model.unembedding.is_meta
    if not is_empty:
        model.to(ranks.device)
    if shard > 1:
        shard_model(model, shard_mesh(ranks, shard))
    if is_empty:
        fill(model, ranks.device)


@torch.no_grad()
def fill(model, device):
    """Give a model whose tensors have no memory yet its weights, one tensor after the other."""
    model.to_empty(device=device)
    for name, p in model.named_parameters():
        local(p).copy_(model.source(name, p))
    model.source = None


def local(tensor):
    """The part of a tensor that is on this rank: a view of a sharded one's, or the tensor itself."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def part_of(tensor, p):
    """What a rank has in the parameter p, of the whole tensor: some rows, as a view, if p is sharded."""
    if not isinstance(p, DTensor):
        return tensor
    mesh, dim = p.device_mesh, p.device_mesh.ndim - 1
    n_rows = -(-len(tensor) // mesh.size(dim))  # torch.chunk divides them so: the last ranks may have less
    return tensor[mesh.get_local_rank(dim) * n_rows:][:n_rows]


def whole(tensor):
    """The whole of a tensor. If it is sharded, all ranks have to ask for it together."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


# ------------------------------------------------------------------------------------------------------------
# Devices


def bf16_pays(device):
    """True if this machine multiplies bf16 matrices in hardware: GPUs from Ampere on; CPUs with AVX512-BF16
    or AMX."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    names = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    tests = [getattr(torch.cpu, name, None) for name in names]  # of newer torch versions only
    return device.type == "cpu" and any(test() for test in tests if test)


def pick_dtype(name, device):
    """The torch type that --dtype names."""
    if name == "auto":
        return torch.bfloat16 if bf16_pays(device) else torch.float32
    return {"fp32": torch.float32, "bf16": torch.bfloat16}[name]


def device_memory(device):
    """Bytes of memory that the device has in all, or this process's share of them where several are on the
    device: ranks of one machine's CPU, or what lab.py has started."""
    if device.type == "cuda":
        memory = torch.cuda.get_device_properties(device).total_memory
    else:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        memory //= int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    return memory // processes_per_device()


def processes_per_device():
    """How many of lab.py's runs (--jobs) share a device with this one, itself included."""
    return int(os.environ.get("HHH_PROCESSES_PER_DEVICE", 1))


def check_compiler(device):
    """Raise InputError if --compile cannot work here."""
    if device.type == "cpu" and not (shutil.which("g++") or shutil.which("clang++")):
        raise InputError("--compile: there is no C++ compiler here; install g++, or leave --compile out")
