"""A simulated step of training: the memory that a rank needs, by part, what it computes and what it sends.

The model, its loss and, where ranks share it, torch's FSDP are the real ones. But their tensors have a shape
and no memory: they are on torch's device "meta". FSDP does not take such tensors, so for it they are torch's
FakeTensors on a CPU, which take four times as long, and its other ranks exist in name only (torch's "fake"
process group). `Meter` sees every operation, but neither the temporary memory inside one nor what the allocator
keeps: docs/results.md compares the two.
"""
import contextlib
import copy
import dataclasses
import weakref
from collections import Counter

import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.flop_counter import flop_registry

import losses
from model import GPT
from ranks import local, shard_model

PARTS = "weights", "gradients", "optimizer", "activations", "logits", "communication"


class NotSimulated(Exception):
    """A loss asked for more of a tensor than its shape, as .item() does."""


def simulate(model, loss, batch, recompute=False, on_gpu=False, shard=1, holds_gradients=True, buckets=False):
    """What a micro-batch takes on each of `shard` ranks: a Counter of the bytes of each of PARTS, at the moment
    when their sum is largest, of "flop", and of the bytes that are "gathered" and "reduced".

    model: its tensors are only asked for their shapes. loss(model, batch): as in trainer.py. on_gpu: with the
    attention and the chunks of logits of a GPU. holds_gradients: those of an earlier micro-batch are there.
    buckets: DistributedDataParallel's are there, in which it sends the gradients once more. Ranks that share a
    model have to ask together; those from `shard` on get an empty answer. Raises NotSimulated.

    All blocks are alike. So at most four layers are simulated, and each further one adds what the last one did.
    """
    n_layer = model.config.n_layer
    with fake_ranks(shard) if shard > 1 else contextlib.nullcontext() as mesh:
        if shard > 1 and mesh is None:
            return Counter()

        def layers(n):
            return one_step(model, n, loss, batch, recompute, on_gpu, mesh, holds_gradients, buckets)
        if n_layer <= 4:
            return layers(n_layer)
        n = 3 if shard == 1 else 4  # FSDP gathers a block ahead of its turn, which takes three to be seen
        few, more = layers(n - 1), layers(n)
    return Counter({key: more[key] + (n_layer - n) * (more[key] - few[key]) for key in more})


def memory(step):
    """Bytes of all PARTS of a simulated step together."""
    return sum(step[part] for part in PARTS)


def one_step(model, n_layer, loss, batch, recompute, on_gpu, mesh, holds_gradients, buckets):
    """`simulate` with n_layer layers. The optimizer's state is there; its update needs no memory besides."""
    with torch.device("meta"):
        small = GPT(dataclasses.replace(model.config, n_layer=n_layer))
    for name, p in small.named_parameters():
        p.requires_grad_(model.get_parameter(name).requires_grad)
    small.dtype, small.plain, small.recompute = model.dtype, model.plain, recompute
    if mesh:
        shard_model(small, mesh)
    meter = Meter(model.config)
    batch = copy.deepcopy(batch)  # a layout keeps tables that it has made
    with contextlib.ExitStack() as stack:
        if mesh:
            stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
            small.to_empty(device="cpu")
        else:
            batch = tree_map(lambda x: x.to("meta") if hasattr(x, "to") else x, batch)
        stack.enter_context(on_device("cuda" if on_gpu else "cpu", small, meter))
        trained = [p for p in small.parameters() if p.requires_grad]
        held = [("weights", p) for p in small.parameters()]
        for part in ("optimizer", "optimizer", *["communication"] * buckets):  # AdamW has two averages
            held += [(part, torch.empty_like(p)) for p in trained]
        for p in trained:
            if holds_gradients:
                p.grad = torch.empty_like(p)
                held.append(("gradients", p.grad))
            p.register_post_accumulate_grad_hook(lambda p: meter.hold("gradients", p.grad))
        for part, tensor in held:
            meter.hold(part, tensor)
        try:
            with meter:
                loss(small, batch)[0].backward()
        except RuntimeError as error:
            raise NotSimulated(error) from error
    return meter.peak + meter.work


class Meter(TorchDispatchMode):
    """Adds up the bytes of all storages that live, by part; `peak` has them at their largest sum. `work` counts
    floating-point operations, and bytes that are gathered and reduced."""

    def __init__(self, config):
        super().__init__()
        is_known = config.vocab_size not in (config.d_model, config.d_ff)  # logits are told by their width
        self.vocab_size, self.work = config.vocab_size if is_known else None, Counter()
        self.storages = {}  # key: (part, bytes) of a storage that lives
        self.buffers = weakref.WeakValueDictionary()  # FSDP's, by key: it frees them by making them empty
        self.live, self.peak = Counter(), Counter()

    def __torch_dispatch__(self, operation, types, arguments=(), named=None):
        named = named or {}
        result = operation(*arguments, **named)
        if operation.overloadpacket in flop_registry:
            self.work["flop"] += flop_registry[operation.overloadpacket](*arguments, **named, out_val=result)
        if operation.namespace in ("fsdp", "c10d"):
            self.communicate(operation, arguments, named)
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and not isinstance(tensor, DTensor):
                is_logits = tensor.dim() > 1 and tensor.shape[-1] == self.vocab_size
                self.hold("logits" if is_logits else "activations", tensor, is_new=True)
        for key, storage in list(self.buffers.items()):
            part, n_bytes = self.storages[key]
            self.live[part] += storage.nbytes() - n_bytes
            self.storages[key] = part, storage.nbytes()
        if self.live.total() > self.peak.total():
            self.peak = self.live.copy()
        return result

    def communicate(self, operation, arguments, named):
        """Note what FSDP gathers and reduces. All tensors of its operations but weights are its buffers."""
        if "_allgather_base_" in str(operation):
            self.work["gathered"] += arguments[0].nbytes
        if "_reduce_scatter_base_" in str(operation):
            self.work["reduced"] += arguments[1].nbytes
        for tensor in tree_leaves((arguments, named)):
            storage = tensor.untyped_storage() if isinstance(tensor, torch.Tensor) else None
            if storage is not None and self.storages.get(storage._cdata, ("",))[0] != "weights":
                self.hold("communication", tensor)
                self.buffers[storage._cdata] = storage
        if "_reduce_scatter_base_" in str(operation):
            self.hold("gradients", arguments[0])

    def hold(self, part, tensor, is_new=False):
        """Count a tensor's storage as this part, from now on; if is_new, only if it is not counted yet."""
        storage = local(tensor).untyped_storage()
        key = storage._cdata
        if key in self.storages:
            if is_new:
                return
            self.drop(key)
        else:
            weakref.finalize(storage, self.drop, key)
        self.storages[key] = part, storage.nbytes()
        self.live[part] += storage.nbytes()

    def drop(self, key):
        part, n_bytes = self.storages.pop(key, (None, 0))
        self.live[part] -= n_bytes


class FlashAttention(torch.autograd.Function):
    """What a GPU's flash attention keeps: q, k, v, its output and, for each query and head, a log-sum-exp in
    fp32. n_pairs: of a query and a key that it sees, in one head."""

    @staticmethod
    def forward(ctx, q, k, v, n_pairs, meter):
        out, lse = torch.empty_like(q), q.new_empty(q.shape[:-1], dtype=torch.float32)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.flop, ctx.meter = 4 * n_pairs * q.shape[-2] * q.shape[-1], meter
        meter.work["flop"] += ctx.flop
        return out

    @staticmethod
    def backward(ctx, d_out):
        ctx.meter.work["flop"] += 2.5 * ctx.flop  # five matrix products, where forward has two
        return *map(torch.empty_like, ctx.saved_tensors[:3]), None, None


@contextlib.contextmanager
def on_device(name, model, meter):
    """Give the loss the chunks of logits of this kind of device, and on a GPU the model its flash attention."""
    def attend(layer, layout, cache, only_ends, q, k, v):
        if layout is None:
            return FlashAttention.apply(q, k, v, q.shape[0] * q.shape[1] * (q.shape[1] + 1) // 2, meter)
        segments = layout.completions if only_ends else range(len(layout.parents))
        n_keys, n_pairs = 0, 0
        for segment in segments:  # as keys it has a copy of its context, and its own tokens
            own, parent = layout.lengths[segment], layout.parents[segment]
            context = layout.lengths[parent] if parent != segment else 0
            n_keys += context + own
            n_pairs += context + own if only_ends else own * context + own * (own + 1) // 2
        places = torch.empty(n_keys, dtype=torch.long, device=q.device)
        return FlashAttention.apply(q, k.index_select(0, places), v.index_select(0, places), n_pairs, meter)
    if name == "cuda":
        model.attend = attend
    rows_at_a_time = losses.rows_at_a_time
    losses.rows_at_a_time = lambda _, vocab_size: rows_at_a_time(torch.device(name), vocab_size)
    try:
        yield
    finally:
        losses.rows_at_a_time = rows_at_a_time


@contextlib.contextmanager
def fake_ranks(n):
    """A mesh of n ranks that send nothing. Where real ranks run, the first n of them get it, others None."""
    import torch.distributed._tools.fake_collectives  # noqa: F401: older versions of torch need it
    from torch.testing._internal.distributed.fake_pg import FakeStore  # its import makes "fake" known to torch
    is_alone = not dist.is_initialized()
    if is_alone:
        dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=n)
    group = dist.new_group(range(n), backend="fake")
    try:
        yield DeviceMesh.from_group(group, "cpu") if dist.get_rank() < n else None
    finally:
        if is_alone:
            dist.destroy_process_group()
