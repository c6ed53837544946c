"""The processes that train together, the device of each, and the precision that pays there."""
import datetime
import os
import shutil
from dataclasses import dataclass

import torch
import torch.distributed as dist

from data.errors import InputError


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

    def main(self):
        return self.rank == 0

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
        dist.init_process_group(backend, timeout=datetime.timedelta(hours=2))
        if device.type == "cpu" and "OMP_NUM_THREADS" not in os.environ:
            processes_here = int(os.environ.get("LOCAL_WORLD_SIZE", world))
            torch.set_num_threads(max(1, os.cpu_count() // processes_here))
    return Ranks(rank, world, device)


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
    """Bytes of memory that the device has in all."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def check_compiler(device):
    """Raise InputError if --compile cannot work here."""
    if device.type == "cpu" and not (shutil.which("g++") or shutil.which("clang++")):
        raise InputError("--compile: there is no C++ compiler here; install g++, or leave --compile out")
