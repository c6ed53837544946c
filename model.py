"""The transformer, from the table of sizes to hidden states, rewards and logits.

A decoder in the Llama layout: RMSNorm before each part, rotary positions, SwiGLU, no biases, and (by default)
one table for input and output. Parameters have the names of transformers' LlamaForCausalLM and
LlamaForSequenceClassification, so a state dict needs no translation. A preference model (PM) is the same
transformer with one more row of weights, the value head `score`. With the last fields of Config it is also
what others have published in this layout: Llama 1 to 3, Mistral, Qwen 2 and 3, SmolLM and more.

`GPT.forward` maps tokens to hidden states in three ways that give equal results:

  causal   tokens (B, T)          language modelling: each row is one sequence
  packed   tokens (T,), layout    comparisons end to end in one row: [context][completion 1][completion 2]…
  cached   tokens (n, t), cache   n sequences go on by t tokens each, behind what a cache (kv_cache.py) read

`attention` below defines what all three compute. attention.py computes the same faster, by tiles on CPUs and
by flash attention on CUDA; the plan that a run prints says which it is. losses.py turns hidden states into
losses of the next tokens without ever holding all of their logits.
"""
import functools
import math
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
import torch.utils.checkpoint

import losses
from formats.rope_scaling import scaled_frequencies

try:
    import attention as fast_attention
except ImportError:  # without that file everything works as well, only slowly
    fast_attention = None

# name: (n_layer, d_model, n_head). The name is about 12 * n_layer * d_model^2, the parameters without the
# embedding table. 13m to 52b are the paper's seven (Appendix A).
SIZES = {
    "test": (2, 64, 2), "0.8m": (4, 128, 4), "3m": (4, 256, 4), "5m": (7, 256, 4),
    "13m": (4, 512, 8), "42m": (6, 768, 12), "197m": (10, 1280, 20), "810m": (16, 2048, 32),
    "1b": (17, 2176, 34), "2.7b": (24, 3072, 48), "13b": (40, 5120, 40), "52b": (64, 8192, 64),
}


@dataclass
class Config:
    n_layer: int
    d_model: int
    n_head: int
    vocab_size: int
    ctx: int  # tokens of the longest sequence; positions run from 0 to ctx - 1
    tied: bool = True  # the embedding table is also the output layer
    value_head: bool = False
    rope_theta: float = 10000.0
    norm_eps: float = 1e-5

    # What published models of the Llama family have besides. None stands for what __post_init__ says.
    n_key_head: int | None = None  # heads of keys and values; n_head / n_key_head heads of queries share each
    d_head: int | None = None  # width of a head
    d_ff: int | None = None  # width of the MLP
    rope_scaling: dict | None = None  # slower rotation for longer contexts (formats/rope_scaling.py)
    family: str = "llama"  # or mistral; qwen2, with biases on q, k and v; qwen3, with norms on q and k
    window: int | None = None  # how far some of Mistral's layers look back; ctx may not exceed it

    def __post_init__(self):
        self.n_key_head = self.n_key_head or self.n_head
        self.d_head = self.d_head or self.d_model // self.n_head
        # About 8/3 d_model: SwiGLU's three matrices cost as much as the two of width 4 d_model in a GPT.
        self.d_ff = self.d_ff or max(64, round(self.d_model * 8 / 3 / 64) * 64)


# ------------------------------------------------------------------------------------------------------------
# Attention


def attention(q, k, v, visible):
    """The definition: softmax(q k^T / sqrt(D)) v over the keys that each query sees.

    q (…, Tq, H, D): H heads of width D for each of Tq queries. k and v (…, Tk, G, D), where G divides H: the
    first H / G heads of q share the first head of k and v, and so on. visible (Tq, Tk) bool. Returns the
    shape of q.
    """
    k, v = (x.repeat_interleave(q.shape[-2] // k.shape[-2], -2) for x in (k, v))  # (…, Tk, H, D)
    q, k, v = (x.transpose(-3, -2) for x in (q, k, v))  # (…, H, T, D)
    scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])  # (…, H, Tq, Tk)
    weights = scores.masked_fill(~visible, -math.inf).softmax(-1)
    return (weights @ v).transpose(-3, -2)


def plain_attention(q, k, v, layout, only_ends, prefix):
    """`attention` of a layer's q, k, v, with all that a query may see written out as keys and one mask.

    With a layout q, k and v are those of a packed row. Without, the queries of each sequence are its last
    tokens. prefix: for each text that was read before, such as a prompt and then a question, a pair of keys
    and values (P, G, D), the earliest first. Every query sees them besides its own sequence.
    """
    if layout is not None:
        visible = layout.visible(only_ends).to(q.device)
    else:  # the last query sees all keys, the one before it all but one, and so on
        n_queries, n_keys = q.shape[-3], k.shape[-3]
        visible = torch.ones(n_queries, n_keys, dtype=torch.bool, device=q.device).tril(n_keys - n_queries)
    for prefix_k, prefix_v in reversed(prefix):
        k = torch.cat([prefix_k.expand(*k.shape[:-3], -1, -1, -1), k], -3)
        v = torch.cat([prefix_v.expand(*v.shape[:-3], -1, -1, -1), v], -3)
        visible = F.pad(visible, (len(prefix_k), 0), value=True)
    return attention(q, k, v, visible)


# ------------------------------------------------------------------------------------------------------------
# The transformer


class Linear(nn.Linear):
    """A matrix, without bias by default, applied in the precision of its input."""

    def __init__(self, d_in, d_out, bias=False):
        super().__init__(d_in, d_out, bias=bias)

    def forward(self, x):
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.linear(x, self.weight.to(x.dtype), bias)


class Attention(nn.Module):
    """The four matrices of self-attention, and Qwen 3's norms of each head of q and k."""

    def __init__(self, config):
        super().__init__()
        d, d_head, has_bias = config.d_model, config.d_head, config.family == "qwen2"
        self.d_head = d_head
        self.q_proj = Linear(d, config.n_head * d_head, has_bias)
        self.k_proj = Linear(d, config.n_key_head * d_head, has_bias)
        self.v_proj = Linear(d, config.n_key_head * d_head, has_bias)
        self.o_proj = Linear(config.n_head * d_head, d)
        has_norms = config.family == "qwen3"
        self.q_norm = nn.RMSNorm(d_head, eps=config.norm_eps) if has_norms else None
        self.k_norm = nn.RMSNorm(d_head, eps=config.norm_eps) if has_norms else None

    def heads(self, x, matrix, norm=None):
        """(…, T, d_model) -> (…, T, H or G, D)."""
        heads = matrix(x).unflatten(-1, (-1, self.d_head))
        return heads if norm is None else norm(heads.to(norm.weight.dtype)).to(x.dtype)


def rotate(x, cos, sin):
    """Rotary position embedding: turn each pair of numbers (a, b) = (x_i, x_{i + D/2}) to
    (a cos - b sin, b cos + a sin), by an angle that is the token's position times the pair's frequency.

    x (…, T, H, D); cos and sin (T, 1, D) from GPT.rotation, where the first half of `sin` has the minus sign.
    """
    swapped = x.roll(x.shape[-1] // 2, -1)  # b at the place of a, and a at that of b
    return torch.addcmul(x * cos, swapped, sin)


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.gate_proj = Linear(config.d_model, config.d_ff)
        self.up_proj = Linear(config.d_model, config.d_ff)
        self.down_proj = Linear(config.d_ff, config.d_model)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    """One layer. The residual stream x stays in fp32. Matrices and attention are computed in GPT.dtype, in
    which cos and sin come."""

    def __init__(self, config):
        super().__init__()
        self.input_layernorm = nn.RMSNorm(config.d_model, eps=config.norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = nn.RMSNorm(config.d_model, eps=config.norm_eps)
        self.mlp = MLP(config)

    def forward(self, x, cos, sin, attend, ends=None):
        """x (…, T, d_model) -> the same shape. attend: attention, a function of q, k and v.

        ends: places (K,) in a packed row; only their output is computed, and the result is (K, d_model). The
        other tokens serve as keys and values only.
        """
        q, k, v = self.before_attention(x, cos, sin, ends)
        if ends is not None:
            x = x.index_select(0, ends)
        return self.after_attention(x, attend(q, k, v))

    def before_attention(self, x, cos, sin, ends=None):
        h, attn = self.input_layernorm(x).to(cos.dtype), self.self_attn
        k = rotate(attn.heads(h, attn.k_proj, attn.k_norm), cos, sin)
        v = attn.heads(h, attn.v_proj)
        if ends is not None:
            h, cos, sin = (part.index_select(0, ends) for part in (h, cos, sin))
        q = rotate(attn.heads(h, attn.q_proj, attn.q_norm), cos, sin)
        return q, k, v

    def after_attention(self, x, attended):
        x = x + self.self_attn.o_proj(attended.flatten(-2))
        return x + self.mlp(self.post_attention_layernorm(x).to(attended.dtype))


class GPT(nn.Module):
    """The transformer. `dtype` is the precision of matrix products; weights, residual stream and losses are
    fp32. With `plain` set, attention is computed by its definition: slowly, for tests and for teaching. With
    `recompute` set, of each block only the input is kept for the backward pass, which computes the rest anew.
    A model that several ranks are to share is made on torch's device "meta", without memory for its weights.
    Only ranks.py uses `source`: the function source(name, parameter) from which it then fills a rank's part.
    """

    def __init__(self, config):
        super().__init__()
        self.config, self.dtype, self.plain = config, torch.float32, fast_attention is None
        self.recompute, self.source = False, None
        self.model = nn.ModuleDict(dict(
            embed_tokens=nn.Embedding(config.vocab_size, config.d_model),
            layers=nn.ModuleList(Block(config) for _ in range(config.n_layer)),
            norm=nn.RMSNorm(config.d_model, eps=config.norm_eps)))
        if not config.tied:
            self.lm_head = Linear(config.d_model, config.vocab_size)
        if config.value_head:
            self.score = Linear(config.d_model, 1)

    def init_weights(self, seed):
        """Draw all weights from `seed`, on the device where they are. Returns the model.

        1. Matrices: normal with std sqrt(2 / (5 d_model)). That is the usual 0.02 at a width of 1,000, and
           larger for narrow models, which otherwise learn slowly at first (assumption; the paper says
           nothing).
        2. Matrices whose output is added to the residual stream: smaller by sqrt(2 n_layer), as in GPT-2.
        3. The value head: std 1 / sqrt(d_model + 1), as in OpenAI's summarize-from-feedback.
        4. Norms: ones. Biases: zeros.
        """
        generator = torch.Generator(self.unembedding.device).manual_seed(seed)
        for name, p in self.named_parameters():
            self.init_tensor(name, p, generator)
        return self

    def init_tensor(self, name, p, generator):
        """Draw the parameter of this name into the tensor p. All share one generator, so their order counts."""
        std = math.sqrt(2 / (5 * self.config.d_model))
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            std /= math.sqrt(2 * self.config.n_layer)
        if name == "score.weight":
            std = 1 / math.sqrt(self.config.d_model + 1)
        if p.dim() == 2:
            nn.init.normal_(p, std=std, generator=generator)
        else:
            nn.init.constant_(p, 0.0 if name.endswith("bias") else 1.0)

    @property
    def unembedding(self):
        """The output matrix (vocab_size, d_model)."""
        return self.model.embed_tokens.weight if self.config.tied else self.lm_head.weight

    def forward(self, tokens, layout=None, cache=None, only_ends=False):
        """Token ids to final hidden states, in the three ways that the head of this file describes.

        tokens: (B, T) causal; (T,) packed, with its layout (data/packing.py), and behind a cache's prefix if
        a cache is given; (n, t) appended to a cache. Returns tokens.shape + (d_model,).

        only_ends, for packed rows: return (K, d_model), the states at the completions' last tokens. A reward
        needs no others, and most of the last layer is then never computed. Raises ValueError for a packed row
        with a cache to which tokens were appended: only a prefix can stand before it, as cache.as_prefix()
        makes one.
        """
        if layout is not None and cache is not None and cache.length:
            raise ValueError("a packed row can be read behind a prefix only: give cache.as_prefix()")
        positions = layout.positions if layout is not None else torch.arange(tokens.shape[-1])
        if cache is not None:
            positions = positions + cache.prefix_tokens + cache.length
        x = losses.at_least_fp32(self.model.embed_tokens(tokens))
        cos, sin = self.rotation(positions.to(tokens.device, non_blocking=True))
        ends = layout.ends.to(tokens.device, non_blocking=True) if only_ends else None
        for i, block in enumerate(self.model.layers):
            at_ends = only_ends and i == len(self.model.layers) - 1
            attend = functools.partial(self.attend, i, layout, cache, at_ends)
            arguments = x, cos, sin, attend, ends if at_ends else None
            if self.recompute and torch.is_grad_enabled():
                x = torch.utils.checkpoint.checkpoint(block, *arguments, use_reentrant=False)
            else:
                x = block(*arguments)
        if cache is not None and layout is None:
            cache.length += tokens.shape[1]  # now that every layer has appended its keys and values
        return self.model.norm(x)

    def attend(self, layer, layout, cache, only_ends, q, k, v):
        """Attention of a layer's q (B, T, H, D), k and v (B, T, G, D); without B for a packed row."""
        prefix = [of_layers[layer] for of_layers in cache.prefixes] if cache is not None else []
        if cache is not None and layout is None:
            k, v = cache.append(layer, k, v)
        compute = plain_attention if self.plain else fast_attention.attention
        return compute(q, k, v, layout, only_ends, prefix)

    def attention_backend(self, device):
        """What computes attention on this device, in words."""
        return "its definition" if self.plain else fast_attention.backend(device, self.dtype)

    def rotation(self, positions):
        """cos and sin (T, 1, D) of the rotary angles at these positions, for `rotate`."""
        half = self.config.d_head // 2
        precise = torch.promote_types(self.dtype, torch.float32)  # fp32, or fp64 if that is dtype
        exponents = torch.arange(half, device=positions.device, dtype=precise) / half
        # theta ** -exponents differs in its last bit from what transformers computes: far positions show it.
        frequencies = scaled_frequencies(1 / self.config.rope_theta ** exponents, self.config.rope_scaling)
        angles = positions.to(precise)[:, None, None] * frequencies  # (T, 1, D / 2)
        cos, sin = angles.cos().to(self.dtype), angles.sin().to(self.dtype)
        return torch.cat([cos, cos], -1), torch.cat([-sin, sin], -1)

    def rewards(self, hidden):
        """The value head, in fp32: hidden (…, d_model) -> (…)."""
        return self.score(hidden).squeeze(-1)

    def logits(self, hidden):
        """hidden (…, d_model) -> (…, vocab_size)."""
        return F.linear(hidden.to(self.dtype), self.unembedding.to(self.dtype))

    def token_losses(self, hidden, targets, weight=None):
        """Cross-entropy of the next tokens, in nats: hidden (N, d_model), targets (N,), weight (N,) or None
        -> (weighted sum, losses (N,))."""
        return losses.cross_entropy(hidden.to(self.dtype), self.unembedding, targets, weight)

    def n_params(self):
        """(parameters without the embedding tables and the value head, all parameters)."""
        layers_and_norm = [*self.model.layers.parameters(), *self.model.norm.parameters()]
        return sum(p.numel() for p in layers_and_norm), sum(p.numel() for p in self.parameters())

    def freeze(self, dtype):
        """Make this a model for reading only: its matrices are held in `dtype`, so no use of them casts them
        again. Returns the model."""
        self.dtype = dtype
        for name, module in self.named_modules():
            if isinstance(module, (Linear, nn.Embedding)) and name != "score":
                module.to(dtype)
        return self.eval().requires_grad_(False)

    def compile_blocks(self):
        """Compile the two halves of every block. Attention, between them, stays as it is: it depends on the
        layout, which differs from row to row, so it would be compiled anew for each."""
        for block in self.model.layers:
            block.before_attention = torch.compile(block.before_attention, dynamic=True)
            block.after_attention = torch.compile(block.after_attention, dynamic=True)
