"""The state of an optimizer on disk, so that a run can go on. Where each rank has the whole of it, it is one
file, train_state.pt. Where ranks share it, each writes its part, as torch.distributed.checkpoint (DCP) does:

    .metadata, __0_0.distcp, __1_0.distcp …

Both can be read by any number of ranks, sharded or not.
"""
import pickle
import warnings

import safetensors
import torch
import torch.distributed.checkpoint as dcp

from data.errors import InputError
from data.files import fields
from formats.hf_folder import weight_files
from ranks import local, part_of

NOT_OF_THESE = "is not of the weights beside it, so this run cannot go on"


def save(folder, state, is_sharded):
    """Write {"optimizer": its state dict, and numbers} into a folder. Raises OSError if that fails. All ranks
    that share a model call this together, and fail together."""
    try:
        if is_sharded:
            dcp.save(_flat(state["optimizer"]["state"]), checkpoint_id=folder)
        else:
            torch.save(state, folder / "train_state.pt")
    except dcp.CheckpointException as error:
        raise OSError(_reason(error)) from error
    except RuntimeError as error:  # torch's words for a full disk tell of its streams
        if is_sharded:  # another rank has ended
            raise
        raise OSError("train_state.pt could not be written; is the disk full?") from error


def load(folder, optimizer):
    """Give AdamW, whose parameters may be sharded, the state that is in this folder. Raises InputError if it
    is damaged or of other weights."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    averages = ("exp_avg", "exp_avg_sq")
    state = {number: {"step": torch.zeros(()), **{name: torch.zeros_like(p) for name in averages}}
             for number, p in enumerate(parameters)}
    if (folder / ".metadata").is_file():
        _read_shards(folder, _flat(state))
    else:
        saved = _flat(read(folder)["optimizer"]["state"])
        for name, tensor in _flat(state).items():
            if name not in saved or saved[name].shape != tensor.shape:
                raise InputError(f"{folder}/train_state.pt: {NOT_OF_THESE}")
            local(tensor).copy_(part_of(saved[name], tensor))
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def read(folder):
    """What `save` wrote as train_state.pt. Raises InputError if it is damaged, or of other weights than those
    beside it."""
    path = folder / "train_state.pt"
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # torch raises a different type for each way a file can be damaged
        why = str(error)[:80]
        raise InputError(f"{path}: missing or damaged, so this run cannot go on ({why})") from None
    optimizer, = fields(state if isinstance(state, dict) else {}, path, {"optimizer": dict})
    states, groups = fields(optimizer, f"{path}: optimizer", {"state": dict, "param_groups": [dict]})
    shapes = {()}  # of the optimizer's counts of steps, and of all weights
    for file in weight_files(folder):
        with safetensors.safe_open(file, "pt") as weights:
            shapes |= {tuple(weights.get_slice(name).get_shape()) for name in weights.keys()}
    numbers = [number for group in groups for number in group.get("params", ())]
    tensors = [tensor for values in states.values() for tensor in values.values()]
    if sorted(states) != sorted(numbers) or not {tuple(tensor.shape) for tensor in tensors} <= shapes:
        raise InputError(f"{path}: {NOT_OF_THESE}")
    return state


def _flat(state):
    """{number of a parameter: {name: tensor}} as {"number.name": tensor}."""
    return {f"{number}.{name}": tensor for number, values in state.items() for name, tensor in values.items()}


class Contents(pickle.Unpickler):
    """Reads .metadata, DCP's table of contents. It is a pickle, which could run code. So nothing is let in but
    the records that the table consists of."""
    MODULES = {"torch", "torch.serialization", "torch.distributed.checkpoint.metadata",
               "torch.distributed.checkpoint.filesystem", "pathlib", "pathlib._local"}
    NAMES = {"Metadata", "MetadataIndex", "StorageMeta", "TensorStorageMetadata", "ChunkStorageMetadata",
             "TensorProperties", "_MEM_FORMAT_ENCODING", "_StorageInfo", "_get_layout", "Size", "float32",
             "PosixPath"}

    def find_class(self, module, name):
        if module not in self.MODULES or name not in self.NAMES:
            raise pickle.UnpicklingError(f"{module}.{name} is not expected in .metadata")
        return super().find_class(module, name)


class ShardReader(dcp.FileSystemReader):
    """Reads what DCP wrote into a folder."""

    def __init__(self, folder):
        super().__init__(folder)
        with open(folder / ".metadata", "rb") as file:
            self.contents = Contents(file).load()

    def read_metadata(self, *args, **named):
        return self.contents


def _read_shards(folder, tensors):
    """Fill {name: tensor}, of sharded ones this rank's part, with what DCP wrote of them."""
    try:
        reader = ShardReader(folder)
    except Exception as error:  # damage to a pickle leads to any
        raise InputError(f"{folder}/.metadata: damaged, so this run cannot go on ({_reason(error)})") from None
    try:
        with warnings.catch_warnings(action="ignore"):  # torch warns where there is only one process
            dcp.load(tensors, storage_reader=reader)
    except dcp.CheckpointException as error:  # any other is that of a rank that has ended
        raise InputError(f"{folder}: the optimizer's state (.metadata and *.distcp) is incomplete, damaged or "
                         f"of other weights, so this run cannot go on ({_reason(error)})") from None


def _reason(error):
    """An error in words. Of several ranks' errors it is the first."""
    if isinstance(error, dcp.CheckpointException):
        rank, (error, _) = next(iter(error.failures.items()))
        return f"rank {rank}: {str(error)[:200]}"
    return str(error)[:200]
