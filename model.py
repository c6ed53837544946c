"""The transformer, from the table of sizes to the losses' building blocks. Imports torch only.

A decoder in the Llama layout: pre-RMSNorm, rotary positions, SwiGLU, no biases, (by default) tied embeddings. Parameter
names are those of transformers' LlamaForCausalLM / LlamaForSequenceClassification, so a state dict needs no translation.
A preference model (PM) is the same transformer with one more row, the value head `score`.

`GPT.forward` maps tokens to hidden states in three ways that give equal results:
  causal   tokens (B, T)             language modelling: each row is one sequence
  packed   tokens (T,), layout       comparisons laid end to end in one row: [context][completion 1][completion 2]…
  cached   tokens (n, t), cache      continuing n sequences that may share one prefix, which is stored once
"""
import inspect
import math
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F

varlen_attn = None
if torch.backends.cuda.is_built():  # elsewhere it has no use, and importing it takes a second
    try:
        from torch.nn.attention.varlen import varlen_attn  # torch >= 2.10
    except ImportError:
        pass

# name: (n_layer, d_model, n_head). 13m to 52b are the paper's (Appendix A); 12 * n_layer * d_model^2 names the size.
SIZES = {
    "test": (2, 64, 2), "0.8m": (4, 128, 4), "3m": (4, 256, 4), "5m": (7, 256, 4),
    "13m": (4, 512, 8), "42m": (6, 768, 12), "197m": (10, 1280, 20), "810m": (16, 2048, 32), "1b": (17, 2176, 34),
    "2.7b": (24, 3072, 48), "13b": (40, 5120, 40), "52b": (64, 8192, 64),
}


@dataclass
class Config:
    n_layer: int
    d_model: int
    n_head: int
    vocab_size: int
    ctx: int  # the longest sequence, in tokens; positions run from 0 to ctx - 1
    tied: bool = True  # the embedding table is also the output layer
    value_head: bool = False
    rope_theta: float = 10000.0
    norm_eps: float = 1e-5

    @property
    def d_ff(self):  # 8/3 d, so that SwiGLU's three matrices cost what the classic two of width 4 d do
        return max(64, round(self.d_model * 8 / 3 / 64) * 64)


# ---------------------------------------------------------------------------------------------------------------------
# Where comparisons lie in a packed row


class Layout:
    """Where the segments of a packed row lie; a segment is a context or a completion (with its <eoc>).

    lengths: tokens of each segment, in row order. parents: for each segment the index of its context (a context is its
    own parent, and stands directly before its completions). A completion sees its context and itself, never a sibling,
    and its positions go on from the context's end, as if it stood there alone.
    """
    TILE = 128  # queries in an attention tile
    STEP = 64  # tiles' keys are a multiple of it: few different shapes, whose matrix kernels are then made only once

    def __init__(self, lengths, parents):
        self.lengths, self.parents = lengths, parents = list(map(int, lengths)), list(map(int, parents))
        self.starts = [0]
        for length in lengths:
            self.starts.append(self.starts[-1] + length)
        size = torch.tensor(lengths)
        offset = torch.tensor([0 if p == i else lengths[p] for i, p in enumerate(parents)]) - torch.tensor(self.starts[:-1])
        self.positions = torch.arange(self.starts[-1]) + offset.repeat_interleave(size)  # (T,)
        self.segment = torch.arange(len(lengths)).repeat_interleave(size)  # (T,)
        self.parent = torch.tensor(parents).repeat_interleave(size)  # (T,)
        self.completions = [i for i, p in enumerate(parents) if p != i]
        self.ends = torch.tensor([self.starts[i + 1] - 1 for i in self.completions])  # (K,) each completion's last token
        self._prepared = {}

    def tiles(self, dtype, device, only_ends=False):
        """For CPUs: (first query, last query + 1, key ranges, mask), masks (queries, keys) added to the scores. The queries are
        all tokens, or the completions' ends."""
        def build():
            ranges, at = (self._end_ranges(), self.ends) if only_ends else (self._tile_ranges(), torch.arange(self.starts[-1]))
            return [(q0, q1, keys, self._mask(at[q0:q1, None], torch.cat([torch.arange(a, b) for a, b in keys]), dtype).to(device)) for q0, q1, keys in ranges]
        return self._once(("tiles", dtype, device, only_ends), build)

    def is_short(self):
        """Whether blocks waste less than tiles on what is not seen: the comparisons are short."""
        def build():
            _, size, halves = self._comparisons()
            in_blocks = sum(len(half) * int(size[half[-1]]) ** 2 for half in halves)
            in_tiles = sum((q1 - q0) * (b - a) for q0, q1, keys in self._tile_ranges() for a, b in keys)
            return in_blocks < in_tiles
        return self._once("short", build)

    def blocks(self, n_head, dtype, device):
        """For CPUs: comparisons side by side, the shorter half of them and the longer one, each half padded to its longest, L.

        Returns ([(tokens (n L,), mask (n n_head, L, L)) of each half], where each token of the row stands in them (T,)).
        """
        def build():
            begin, size, halves = self._comparisons()
            blocks, place, filled = [], torch.empty(self.starts[-1], dtype=torch.long), 0
            for half in halves:
                offset = torch.arange(int(size[half[-1]]))
                real = offset < size[half, None]  # (n, L)
                tokens = begin[half, None] + offset * real  # the padding repeats the first one
                place[tokens[real]] = filled + torch.arange(real.numel())[real.flatten()]
                filled += real.numel()
                mask = self._mask(tokens[:, :, None], tokens[:, None], dtype).masked_fill_(~real[:, None], -math.inf)
                blocks.append((tokens.flatten().to(device), mask.repeat_interleave(n_head, 0).to(device)))
            return blocks, place.to(device)
        return self._once(("blocks", n_head, dtype, device), build)

    def _comparisons(self):
        """(first token (n,), number of tokens (n,)) of each comparison, a context and its completions; numbers of the shorter half of
        them and of the longer one, each with the longest last."""
        bounds = torch.tensor([self.starts[i] for i, p in enumerate(self.parents) if p == i] + [self.starts[-1]])
        size = bounds.diff()
        return bounds[:-1], size, size.argsort(stable=True).chunk(2)

    def _end_ranges(self):
        """As _tile_ranges, for few queries: the completions' ends, with all keys from the first's context to the last's end."""
        n, step = len(self.completions), 16
        groups = [(a, min(a + step, n)) for a in range(0, n, step)]
        return [(a, b, [(self.starts[self.parents[self.completions[a]]], self.starts[self.completions[b - 1] + 1])]) for a, b in groups]

    def _tile_ranges(self):
        """(first query, last query + 1, key ranges) of each tile; the keys are what the tile's first query sees, and all
        that follows up to its last: a context and a completion's beginning, or one range where little lies between them."""
        ranges, segment, total = [], 0, self.starts[-1]
        for q0 in range(0, total, self.TILE):
            q1 = min(q0 + self.TILE, total)
            while self.starts[segment + 1] <= q0:
                segment += 1
            parent = self.parents[segment]
            begin, context_end, own = self.starts[parent], self.starts[parent + 1], self.starts[segment]
            if own - context_end <= self.STEP:
                begin -= min(begin, -(q1 - begin) % self.STEP)
                ranges.append((q0, q1, [(begin, q1)]))
            else:
                own -= min(own - context_end, -(context_end - begin + q1 - own) % self.STEP)
                ranges.append((q0, q1, [(begin, context_end), (own, q1)]))
        return ranges

    def _mask(self, query, key, dtype):
        """0 where the token `query` sees the token `key`, else -inf, in the shape that the two broadcast to."""
        kin = (self.segment[key] == self.segment[query]) | (self.segment[key] == self.parent[query])
        return torch.zeros(kin.shape, dtype=dtype).masked_fill_(~(kin & (key <= query)), -math.inf)

    def varlen(self, device, only_ends=False):
        """For CUDA: each segment (or completion's end) is one query sequence; its keys are its context's and its own, gathered.

        Returns (cu_seq_q, cu_seq_k, max_q, max_k, key index (K,)).
        """
        def build():
            keys, ends = [], [0]
            segments = self.completions if only_ends else range(len(self.parents))
            for i in segments:
                p = self.parents[i]
                if p != i:
                    keys.append(torch.arange(self.starts[p], self.starts[p + 1]))
                keys.append(torch.arange(self.starts[i], self.starts[i + 1]))
                ends.append(ends[-1] + self.lengths[i] + (self.lengths[p] if p != i else 0))
            starts = range(len(segments) + 1) if only_ends else self.starts
            cu_q, cu_k = (torch.tensor(x, dtype=torch.int32, device=device) for x in (starts, ends))
            longest = max(b - a for a, b in zip(ends, ends[1:]))
            return cu_q, cu_k, 1 if only_ends else max(self.lengths), longest, torch.cat(keys).to(device)
        return self._once(("varlen", device, only_ends), build)

    def _once(self, key, build):
        if key not in self._prepared:
            self._prepared[key] = build()
        return self._prepared[key]


# ---------------------------------------------------------------------------------------------------------------------
# Attention: one function, several equal back ends


def attention(q, k, v, layout, cache, layer):
    """Causal self-attention; q, k, v (B, T, H, D) or (T, H, D) with a layout, where q may hold only the completions' ends
    (K, H, D); returns the shape of q."""
    if layout is not None:
        return packed_attention(q, k, v, layout, cache.parts(layer) if cache is not None else ())
    if cache is not None:
        return cache.attend(layer, q, k, v)
    return causal_attention(q, k, v)


def causal_attention(q, k, v):
    B, T, H, D = q.shape
    if q.device.type != "cpu":
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)
    mask = torch.full((T, T), -math.inf, dtype=q.dtype).triu_(1)
    tile = 128  # best of 128, 256, 512 at T = 256 and 1024
    tiles = [(a, min(a + tile, T), [(0, min(a + tile, T))], mask[a:a + tile, :a + tile]) for a in range(0, T, tile)]
    q, k, v = (x.transpose(1, 2).reshape(B * H, T, D) for x in (q, k, v))
    return TiledAttention.apply(q, k, v, tiles).view(B, H, T, D).transpose(1, 2)


def use_varlen(q):
    return varlen_attn is not None and q.device.type == "cuda" and q.dtype in (torch.bfloat16, torch.float16)


def packed_attention(q, k, v, layout, prefix=()):
    only_ends = len(q) != len(k)
    if prefix:
        return prefixed_attention(q, k, v, layout.tiles(q.dtype, q.device, only_ends), prefix)
    if use_varlen(q):
        cu_q, cu_k, max_q, max_k, index = layout.varlen(q.device, only_ends)
        # Causal is aligned to the last key: query i of a completion sees its whole context and itself up to i.
        causal = {"window_size": (-1, 0)} if "window_size" in inspect.signature(varlen_attn).parameters else {"is_causal": True}
        return varlen_attn(q, k[index], v[index], cu_q, cu_k, max_q, max_k, **causal)
    if layout.is_short() and not only_ends:
        return block_attention(q, k, v, *layout.blocks(q.shape[1], q.dtype, q.device))
    tiles = layout.tiles(q.dtype, q.device, only_ends)
    return TiledAttention.apply(q.transpose(0, 1), k.transpose(0, 1), v.transpose(0, 1), tiles).transpose(0, 1)


def block_attention(q, k, v, blocks, place):
    """Attention within each comparison of a packed row; q, k, v (T, H, D), blocks and place as Layout.blocks gives them."""
    H, D = q.shape[1:]
    out = []
    for tokens, mask in blocks:
        L = mask.shape[-1]
        q_own, k_own, v_own = (x.flatten(1).index_select(0, tokens).view(-1, L, H, D).transpose(1, 2).reshape(-1, L, D) for x in (q, k, v))
        own = TiledAttention.apply(q_own, k_own, v_own, [(0, L, [(0, L)], mask)])
        out.append(own.view(-1, H, L, D).transpose(1, 2).reshape(-1, H * D))
    return torch.cat(out).index_select(0, place).view(-1, H, D)


def prefixed_attention(q, k, v, tiles, prefix):
    """A packed row behind shared prefixes, [(k, v)] of (H, P, D) each, which every token sees. For evaluation: what it keeps
    for a backward pass is as large as all weights."""
    q, k, v, out = q.transpose(0, 1), k.transpose(0, 1), v.transpose(0, 1), torch.empty_like(q)
    for q0, q1, keys, mask in tiles:
        scores = torch.baddbmm(mask.expand(len(q), -1, -1), q[:, q0:q1], _gather(k, keys).transpose(1, 2), alpha=q.shape[-1] ** -0.5)
        weights, from_prefix = attend_prefix(q[:, q0:q1], prefix, scores)
        out[q0:q1] = (weights @ _gather(v, keys) + from_prefix).transpose(0, 1)
    return out


class TiledAttention(torch.autograd.Function):
    """softmax(q k^T / sqrt(D) + mask) v, tile by tile; q, k, v (N, T, D), N heads or heads times sequences.

    Tokens of other comparisons, and on long rows the future, are skipped rather than masked. On CPUs this is also about
    twice as fast as F.scaled_dot_product_attention in bf16, whose backward there is slow (results/LOG.md). A tile is
    (first query, last query + 1, [key ranges], mask); together they cover every query once.
    """

    @staticmethod
    def forward(ctx, q, k, v, tiles):
        out, weights = torch.empty_like(q), []
        for q0, q1, keys, mask in tiles:
            k_tile, v_tile = _gather(k, keys), _gather(v, keys)
            scores = torch.baddbmm(mask.expand(len(q), -1, -1), q[:, q0:q1], k_tile.transpose(1, 2), alpha=q.shape[-1] ** -0.5)
            weights.append(torch.softmax(scores, -1))
            out[:, q0:q1] = torch.bmm(weights[-1], v_tile)
        ctx.save_for_backward(q, k, v, *weights)
        ctx.tiles = tiles
        return out

    @staticmethod
    def backward(ctx, d_out):
        q, k, v, *weights = ctx.saved_tensors
        dq, dk, dv = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        for (q0, q1, keys, _), p in zip(ctx.tiles, weights):
            k_tile, v_tile, d_tile = _gather(k, keys), _gather(v, keys), d_out[:, q0:q1]
            dp = torch.bmm(d_tile, v_tile.transpose(1, 2))
            ds = torch.ops.aten._softmax_backward_data(dp, p, -1, p.dtype)  # p * (dp - sum(dp * p)) in one pass
            dq[:, q0:q1] = torch.bmm(ds, k_tile)
            _scatter_add(dk, keys, torch.bmm(ds.transpose(1, 2), q[:, q0:q1]))
            _scatter_add(dv, keys, torch.bmm(p.transpose(1, 2), d_tile))
        scale = q.shape[-1] ** -0.5
        return dq.mul_(scale), dk.mul_(scale), dv, None


def _gather(x, ranges):
    return x[:, slice(*ranges[0])] if len(ranges) == 1 else torch.cat([x[:, a:b] for a, b in ranges], 1)


def _scatter_add(x, ranges, values):
    for (a, b), part in zip(ranges, values.split([b - a for a, b in ranges], 1)):
        x[:, a:b].add_(part)  # not +=, which would also copy the slice onto itself


class Cache:
    """Keys and values of what has been read: shared prefixes, each stored once, and n continuations of them.

    A new cache is one empty sequence; each forward with it appends. `fork(n, room)` gives a cache of n continuations that
    share all that was read so far, without copying it, and may be called again and again: a prompt is computed once a run.
    A packed row can be read behind a cache, too: `model(tokens, layout, cache)` sees its prefixes and appends nothing.
    """

    def __init__(self, room, n=1, prefix=()):
        self.n, self.room, self.length, self.own = n, room, 0, []  # own: per layer (2, n, H, room, D), keys and values
        self.prefix = list(prefix)  # parts in reading order, each per layer (k, v), (H, P, D)
        self.start = sum(part[0][0].shape[1] for part in self.prefix)  # tokens in all parts

    def fork(self, n, room):
        assert self.n == 1, "only a single sequence can become a shared prefix"
        read = [[x[:, 0, :, :self.length] for x in self.own]] if self.length else []
        return Cache(room, n, [*self.prefix, *read])

    def keep(self, rows):
        """Go on with these continuations only (a tensor of row numbers)."""
        self.own, self.n = [x[:, rows] for x in self.own], len(rows)

    def parts(self, layer):
        return [part[layer] for part in self.prefix]

    def attend(self, layer, q, k, v):  # q, k, v (n, t, H, D)
        n, t, H, D = q.shape
        if len(self.own) <= layer:
            self.own.append(q.new_empty(2, n, H, self.room, D))
        own, end = self.own[layer], self.length + t
        own[0, :, :, self.length:end] = k.transpose(1, 2)
        own[1, :, :, self.length:end] = v.transpose(1, 2)
        if self.start == 0 and self.length == 0:
            return causal_attention(q, k, v)
        scores = q.transpose(1, 2) @ own[0, :, :, :end].transpose(2, 3) * D ** -0.5  # (n, H, t, end)
        scores = scores.masked_fill(torch.ones(t, end, dtype=torch.bool, device=q.device).triu(end - t + 1), -math.inf)
        if not self.prefix:
            return (scores.softmax(-1) @ own[1, :, :, :end]).transpose(1, 2)
        # All continuations query the one prefix as n * t rows of a single product, so its keys are read once.
        rows, scores = q.permute(2, 0, 1, 3).reshape(H, n * t, D), scores.transpose(0, 1).reshape(H, n * t, end)
        weights, out = attend_prefix(rows, self.parts(layer), scores)
        from_own = weights.view(H, n, t, end).transpose(0, 1) @ own[1, :, :, :end]
        return out.view(H, n, t, D).permute(1, 2, 0, 3) + from_own.transpose(1, 2)


def attend_prefix(rows, parts, scores):
    """Softmax over shared prefixes and the queries' own keys together.

    rows (H, R, D) queries, parts [(k, v)] of (H, P, D) each, scores (H, R, K) of the own keys, scaled and masked. Returns
    (weights of the own keys (H, R, K), what the prefixes contribute to the output (H, R, D)).
    """
    all_scores = [rows @ k.transpose(1, 2) * rows.shape[-1] ** -0.5 for k, _ in parts] + [scores]
    *weights, own = torch.cat(all_scores, -1).softmax(-1).split([x.shape[-1] for x in all_scores], -1)
    return own, sum(w @ v for w, (_, v) in zip(weights, parts))


# ---------------------------------------------------------------------------------------------------------------------
# The transformer


class Linear(nn.Linear):
    """A matrix without bias, kept in fp32 and applied in the precision of its input."""

    def __init__(self, d_in, d_out):
        super().__init__(d_in, d_out, bias=False)

    def forward(self, x):
        return F.linear(x, self.weight.to(x.dtype))


class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        d = config.d_model
        self.n_head, self.attend = config.n_head, attention
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (Linear(d, d) for _ in range(4))

    def forward(self, x, cos, sin, layout, cache, layer, at=slice(None)):
        q, k, v = (proj(x).unflatten(-1, (self.n_head, -1)) for x, proj in ((x[at], self.q_proj), (x, self.k_proj), (x, self.v_proj)))
        return self.o_proj(self.attend(rotate(q, cos[at], sin[at]), rotate(k, cos, sin), v, layout, cache, layer).flatten(-2))


def rotate(x, cos, sin):
    """Rotary position embedding; x (…, T, H, D), cos and sin (T, 1, D) as GPT.rotation gives them."""
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin)


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.gate_proj = Linear(config.d_model, config.d_ff)
        self.up_proj = Linear(config.d_model, config.d_ff)
        self.down_proj = Linear(config.d_ff, config.d_model)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.input_layernorm = nn.RMSNorm(config.d_model, eps=config.norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = nn.RMSNorm(config.d_model, eps=config.norm_eps)
        self.mlp = MLP(config)

    def forward(self, x, cos, sin, layout, cache, layer, at=slice(None)):
        # The residual stream x stays in fp32; cos carries the precision in which the matrices are applied. Of a packed row,
        # `at` are the tokens whose output is wanted; the others serve as keys and values only.
        x = x[at] + self.self_attn(self.input_layernorm(x).to(cos.dtype), cos, sin, layout, cache, layer, at)
        return x + self.mlp(self.post_attention_layernorm(x).to(cos.dtype))


class GPT(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.dtype = torch.float32  # of the matrix products; parameters, residual stream and losses are fp32 anyway
        self.model = nn.ModuleDict(dict(
            embed_tokens=nn.Embedding.from_pretrained(torch.empty(config.vocab_size, config.d_model), freeze=False),  # drawn in init_weights
            layers=nn.ModuleList(Block(config) for _ in range(config.n_layer)),
            norm=nn.RMSNorm(config.d_model, eps=config.norm_eps)))
        if not config.tied:
            self.lm_head = Linear(config.d_model, config.vocab_size)
        if config.value_head:
            self.score = Linear(config.d_model, 1)

    def init_weights(self, seed):
        """Normal, std sqrt(2 / (5 d_model)), which is the usual 0.02 at a width of 1,000 and keeps narrow models from starting too small;
        what writes into the residual stream 1/sqrt(2 n_layer) of that; head 1/sqrt(d_model + 1)."""
        generator = torch.Generator(self.unembedding.device).manual_seed(seed)
        for name, p in self.named_parameters():
            if p.dim() == 2:
                std = math.sqrt(2 / (5 * self.config.d_model))
                if name.endswith(("o_proj.weight", "down_proj.weight")):
                    std /= math.sqrt(2 * self.config.n_layer)
                if name == "score.weight":
                    std = 1 / math.sqrt(self.config.d_model + 1)
                nn.init.normal_(p, std=std, generator=generator)
            else:
                nn.init.ones_(p)
        return self

    @property
    def unembedding(self):
        """The output matrix (vocab_size, d_model)."""
        return self.model.embed_tokens.weight if self.config.tied else self.lm_head.weight

    def forward(self, tokens, layout=None, cache=None, only_ends=False):
        """Tokens to final hidden states of width d_model, in the three ways the file's head describes.

        tokens: (B, T) causal, (T,) packed with a layout (behind a cache's prefixes, if one is given), (n, t) appended to a
        cache. Returns tokens.shape + (d_model,); with
        only_ends, of a packed row, (K, d_model): at each completion's last token, which is all that a reward is read from,
        so that most of the last layer is never computed.
        """
        positions = layout.positions if layout is not None else torch.arange(tokens.shape[-1])
        if cache is not None:
            positions = positions + cache.start + (cache.length if layout is None else 0)
        x = self.model.embed_tokens(tokens)
        cos, sin = self.rotation(positions.to(tokens.device))
        for i, block in enumerate(self.model.layers):
            last = i == len(self.model.layers) - 1
            x = block(x, cos, sin, layout, cache, i, *([layout.ends.to(x.device)] if only_ends and last else ()))
        if cache is not None and layout is None:
            cache.length += tokens.shape[1]
        return self.model.norm(x)

    def rotation(self, positions):
        """cos and sin (T, 1, d_head) of the rotary angles, for both halves of a head; the sine is negative in the first."""
        half = self.config.d_model // self.config.n_head // 2
        exact = torch.float64 if self.dtype == torch.float64 else torch.float32
        frequency = self.config.rope_theta ** (-torch.arange(half, device=positions.device, dtype=exact) / half)
        angles = positions.to(exact)[:, None, None] * frequency
        cos, sin = angles.cos().to(self.dtype), angles.sin().to(self.dtype)
        return torch.cat([cos, cos], -1), torch.cat([-sin, sin], -1)

    def rewards(self, hidden):
        """The value head, in fp32: hidden (…, d_model) -> (…)."""
        return self.score(hidden).squeeze(-1)

    def logits(self, hidden):
        """hidden (…, d_model) -> (…, vocab_size)."""
        return F.linear(hidden.to(self.dtype), self.unembedding.to(self.dtype))

    def token_losses(self, hidden, targets, row_weight=None):
        """cross_entropy of the next tokens: hidden (N, d_model), targets (N,) -> (weighted sum, losses (N,)) in nats."""
        return cross_entropy(hidden.to(self.dtype), self.unembedding, targets, row_weight)

    def n_params(self):
        """(parameters without the embedding tables and the value head, all parameters)."""
        blocks = sum(p.numel() for p in self.model.layers.parameters()) + self.config.d_model
        return blocks, sum(p.numel() for p in self.parameters())


@torch.no_grad()
def read(model, tokens, prefix=None):
    """(cache that has read the token ids (P,) after `prefix`, a cache or nothing; the last token's hidden state (1, d_model))."""
    tokens = torch.as_tensor(tokens, dtype=torch.long, device=model.unembedding.device)
    cache = Cache(len(tokens)) if prefix is None else prefix.fork(1, len(tokens))
    return cache, model(tokens[None], cache=cache)[:, -1]


# ---------------------------------------------------------------------------------------------------------------------
# Losses' building blocks


class _LinearLoss(torch.autograd.Function):
    """A loss of hidden @ weight.T, summed over rows, without ever holding all logits.

    The rows are taken in chunks, and a chunk's gradient is made while its logits are at hand. On a CPU in bf16 this is
    several times faster than torch's F.linear_cross_entropy.
    """

    @staticmethod
    def forward(ctx, hidden, weight, row_weight, row_loss):
        w = weight.to(hidden.dtype)
        need = ctx.needs_input_grad[0] or ctx.needs_input_grad[1]
        d_hidden, d_weight = (torch.empty_like(hidden), torch.zeros_like(weight)) if need else (None, None)
        losses = torch.empty(len(hidden), dtype=weight.dtype, device=hidden.device)
        chunk = max(1024, logits_in_cache(hidden.device, len(weight)))
        buffer = torch.empty(min(chunk, len(hidden)), len(weight), dtype=hidden.dtype, device=hidden.device)  # else mapped anew for each chunk
        for i in range(0, len(hidden), chunk):
            h = hidden[i:i + chunk]
            losses[i:i + chunk], d_logits = row_loss(torch.mm(h, w.T, out=buffer[:len(h)]), slice(i, i + chunk), need)
            if need:
                scale = row_weight[i:i + chunk, None].to(h.dtype)
                d_hidden[i:i + chunk] = (d_logits @ w) * scale
                d_weight += d_logits.T @ (h * scale)
        ctx.save_for_backward(d_hidden, d_weight)
        ctx.mark_non_differentiable(losses)
        return (losses * row_weight).sum(), losses

    @staticmethod
    def backward(ctx, d_loss, _):
        d_hidden, d_weight = ctx.saved_tensors
        return d_hidden * d_loss, d_weight * d_loss, None, None


def logits_in_cache(device, vocab_size):
    """Rows whose logits stay in a CPU's cache."""
    return max(1, (2**22 if device.type == "cpu" else 2**27) // vocab_size)


def linear_loss(hidden, unembedding, row_loss, row_weight=None):
    """Any loss of the next tokens' logits. hidden (N, d), unembedding (V, d), row_weight (N,) or None for ones.

    row_loss(logits (n, V), rows, need_gradient) -> (losses (n,), their gradient by the logits (n, V) in the logits' dtype, or
    None): for the slice `rows` of the N rows; it may overwrite the logits. Returns (weighted sum, a differentiable scalar;
    each row's loss (N,), not differentiable), in fp32.
    """
    if not torch.is_grad_enabled():
        hidden, unembedding = hidden.detach(), unembedding.detach()
    if row_weight is None:
        row_weight = torch.ones(len(hidden), dtype=unembedding.dtype, device=hidden.device)
    return _LinearLoss.apply(hidden, unembedding, row_weight, row_loss)


def cross_entropy(hidden, unembedding, targets, row_weight=None):
    """linear_loss with -log p(target), in nats; targets (N,). Softmax reads the logits in their own precision, in one pass; the
    losses, and the gradient at the target (p - 1 = expm1(-loss), where p may be near 1), are taken in that of the weights."""
    exact = unembedding.dtype

    def row_loss(logits, rows, need_gradient):
        t = targets[rows, None]
        parts = logits.split(logits_in_cache(logits.device, logits.shape[1]))
        loss = torch.cat([part.to(exact).logsumexp(-1, keepdim=True) for part in parts]) - logits.gather(1, t)
        if not need_gradient:
            return loss.squeeze(1), None
        return loss.squeeze(1), torch.softmax(logits, -1, out=logits).scatter_(1, t, torch.expm1(-loss).to(logits.dtype))
    return linear_loss(hidden, unembedding, row_loss, row_weight)
