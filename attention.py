"""Faster ways to compute what `attention` in model.py defines. Without this file everything works, slowly.

  CPU    tiles: some queries at a time, with just the keys that they see. Tokens of other comparisons, and on
  long rows
         the future, are skipped instead of masked.
  CUDA   torch's flash attention; for packed rows its variable-length form, with each segment as a sequence. A
  shared prefix is one matrix product for all queries. Its part and the queries' own part are joined in one
  softmax on CPUs, and by their log-sum-exps on CUDA.

tests/test_model.py compares every way with the definition, forward and backward, in fp64.
"""
import inspect
import math

import torch
import torch.nn.functional as F

TILE = 128  # queries in a tile: the best of 128, 256 and 512 at 256 and 1,024 tokens
STEP = 64  # a tile has a multiple of so many keys where it can: on CPUs every new shape costs time
END_TILE = 16  # queries in a tile where only the completions' ends are queries

varlen_attn = None  # torch's variable-length attention, and the argument that makes it causal
if torch.backends.cuda.is_built():  # elsewhere it is of no use, and importing it takes a second
    try:
        from torch.nn.attention.varlen import AuxRequest, varlen_attn  # torch >= 2.10
        has_window = "window_size" in inspect.signature(varlen_attn).parameters
        CAUSAL = {"window_size": (-1, 0)} if has_window else {"is_causal": True}
    except ImportError:
        pass


def attention(q, k, v, layout=None, only_ends=False, prefix=()):
    """What model.plain_attention computes, by the fastest way that is at hand.

    Without a layout: q (n, t, H, D), k and v (n, T, H, D), causal, the queries being the last t of the T
    tokens. With a layout (data/packing.py): q, k, v (T, H, D) of a packed row; with only_ends q is (K, H, D),
    the queries at the completions' ends. prefix: pairs of keys and values (P, H, D) that every query sees.
    Returns the shape of q.
    """
    if layout is None:
        if prefix or q.shape[1] < k.shape[1]:
            return continued_attention(q, k, v, prefix)
        return causal_attention(q, k, v)
    if has_varlen(q):
        return varlen_attention(q, k, v, layout, only_ends, prefix)
    tiles = layout.table(("tiles", only_ends, q.dtype, q.device), lambda: layout_tiles(layout, only_ends, q))
    if prefix:
        return prefixed_tiles(q, k, v, tiles, prefix)
    q, k, v = (x.transpose(0, 1) for x in (q, k, v))
    return TiledAttention.apply(q, k, v, tiles).transpose(0, 1)


def has_varlen(q):
    """True if torch's variable-length attention can compute this."""
    return varlen_attn is not None and q.device.type == "cuda" and q.dtype in (torch.bfloat16, torch.float16)


def causal_attention(q, k, v):
    """Causal attention of whole sequences, (B, T, H, D) each."""
    B, T, H, D = q.shape
    if q.device.type != "cpu":
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)
    mask = torch.full((T, T), -math.inf, dtype=q.dtype).triu_(1)
    tiles = []
    for start in range(0, T, TILE):
        end = min(start + TILE, T)
        tiles.append((start, end, [(0, end)], mask[start:end, :end]))
    q, k, v = (x.transpose(1, 2).reshape(B * H, T, D) for x in (q, k, v))
    return TiledAttention.apply(q, k, v, tiles).view(B, H, T, D).transpose(1, 2)


# ------------------------------------------------------------------------------------------------------------
# Tiles, for CPUs. A tile is (first query, last query + 1, ranges of keys, mask to add to the scores); all
# tiles together have every query once.


class TiledAttention(torch.autograd.Function):
    """softmax(q k^T / sqrt(D) + mask) v, tile by tile; q, k, v (N, T, D), where N are heads, or sequences
    times heads.

    On CPUs this is about twice as fast as F.scaled_dot_product_attention in bf16, whose backward pass is slow
    there (results/LOG.md).
    """

    @staticmethod
    def forward(ctx, q, k, v, tiles):
        out, weights = torch.empty_like(q), []
        for start, end, ranges, mask in tiles:
            scores = tile_scores(q[:, start:end], gather(k, ranges), mask)
            weights.append(torch.softmax(scores, -1))
            out[:, start:end] = torch.bmm(weights[-1], gather(v, ranges))
        ctx.save_for_backward(q, k, v, *weights)
        ctx.tiles = tiles
        return out

    @staticmethod
    def backward(ctx, d_out):
        q, k, v, *weights = ctx.saved_tensors
        dq, dk, dv = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        for (start, end, ranges, _), p in zip(ctx.tiles, weights):
            d_tile = d_out[:, start:end]
            dp = torch.bmm(d_tile, gather(v, ranges).transpose(1, 2))
            # p * (dp - sum(dp * p)) in one pass; it is the operator that softmax's own backward pass calls
            ds = torch.ops.aten._softmax_backward_data(dp, p, -1, p.dtype)
            dq[:, start:end] = torch.bmm(ds, gather(k, ranges))
            scatter_add(dk, ranges, torch.bmm(ds.transpose(1, 2), q[:, start:end]))
            scatter_add(dv, ranges, torch.bmm(p.transpose(1, 2), d_tile))
        scale = q.shape[-1] ** -0.5
        return dq.mul_(scale), dk.mul_(scale), dv, None


def tile_scores(q, k, mask):
    """q k^T / sqrt(D) + mask: q (N, queries, D), k (N, keys, D), mask (queries, keys)."""
    return torch.baddbmm(mask.expand(len(q), -1, -1), q, k.transpose(1, 2), alpha=q.shape[-1] ** -0.5)


def gather(x, ranges):
    """The parts of x (N, T, D) that lie in these ranges of T, joined."""
    parts = [x[:, begin:end] for begin, end in ranges]
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1)


def scatter_add(x, ranges, values):
    """Add to x (N, T, D), in these ranges of T, what `gather` would take from there."""
    sizes = [end - begin for begin, end in ranges]
    for (begin, end), part in zip(ranges, values.split(sizes, 1)):
        x[:, begin:end].add_(part)  # not +=, which would also copy the slice onto itself


def layout_tiles(layout, only_ends, q):
    """The tiles of a packed row, with masks in q's precision and on its device."""
    places = layout.ends if only_ends else torch.arange(layout.starts[-1])
    tiles = []
    for start, end, ranges in end_ranges(layout) if only_ends else query_ranges(layout):
        keys = torch.cat([torch.arange(a, b) for a, b in ranges])
        sees = layout.sees(places[start:end, None], keys)
        mask = torch.zeros(sees.shape, dtype=q.dtype).masked_fill_(~sees, -math.inf)
        tiles.append((start, end, ranges, mask.to(q.device)))
    return tiles


def query_ranges(layout):
    """(first query, last query + 1, ranges of keys) of tiles that have all tokens as queries.

    A tile's first query sees its own segment and that segment's context. Whatever else the tile's queries see
    begins later. So the keys are that context, and everything from that segment's start to the tile's end.
    Where little lies between the two they are one range.
    """
    tiles, segment, n_tokens = [], 0, layout.starts[-1]
    for start in range(0, n_tokens, TILE):
        end = min(start + TILE, n_tokens)
        while layout.starts[segment + 1] <= start:
            segment += 1
        context = layout.parents[segment]
        context_start, context_end = layout.starts[context], layout.starts[context + 1]
        segment_start = layout.starts[segment]
        if segment_start - context_end <= STEP:
            missing = -(end - context_start) % STEP  # keys that lack to a multiple of STEP; they are masked
            tiles.append((start, end, [(context_start - min(context_start, missing), end)]))
        else:
            missing = -(context_end - context_start + end - segment_start) % STEP
            segment_start -= min(segment_start - context_end, missing)
            tiles.append((start, end, [(context_start, context_end), (segment_start, end)]))
    return tiles


def end_ranges(layout):
    """As query_ranges, where only the completions' ends are queries. The keys of a tile are everything from
    the first one's context to the last one's end."""
    tiles, n = [], len(layout.completions)
    for start in range(0, n, END_TILE):
        end = min(start + END_TILE, n)
        first, last = layout.completions[start], layout.completions[end - 1]
        tiles.append((start, end, [(layout.starts[layout.parents[first]], layout.starts[last + 1])]))
    return tiles


# ------------------------------------------------------------------------------------------------------------
# Behind a prefix, and one token after the other. For reading only: a backward pass would work, but would keep
# the attention weights of all layers.


def continued_attention(q, k, v, prefix):
    """n sequences go on by t tokens: q (n, t, H, D), k and v (n, T, H, D) of all that they have read since
    the prefix."""
    n, t, H, D = q.shape
    T = k.shape[1]
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # (n, H, …, D)
    scores = q @ k.transpose(2, 3) * D ** -0.5  # (n, H, t, T)
    if t > 1:
        future = torch.ones(t, T, dtype=torch.bool, device=q.device).triu(T - t + 1)
        scores = scores.masked_fill(future, -math.inf)
    if not prefix:
        return (scores.softmax(-1) @ v).transpose(1, 2)
    # All sequences query the one prefix as n * t rows of a single product, so that its keys are read once.
    rows, scores = q.transpose(0, 1).reshape(H, n * t, D), scores.transpose(0, 1).reshape(H, n * t, T)
    weights, from_prefix = join_prefix(rows, scores, prefix)
    out = weights.view(H, n, t, T).transpose(0, 1) @ v + from_prefix.view(H, n, t, D).transpose(0, 1)
    return out.transpose(1, 2)


def prefixed_tiles(q, k, v, tiles, prefix):
    """A packed row behind prefixes: q, k, v (T, H, D)."""
    q, k, v = (x.transpose(0, 1) for x in (q, k, v))
    out = torch.empty_like(q)
    for start, end, ranges, mask in tiles:
        scores = tile_scores(q[:, start:end], gather(k, ranges), mask)
        weights, from_prefix = join_prefix(q[:, start:end], scores, prefix)
        out[:, start:end] = weights @ gather(v, ranges) + from_prefix
    return out.transpose(0, 1)


def join_prefix(rows, scores, prefix):
    """One softmax over the keys of prefixes and the queries' own keys.

    rows (H, R, D): queries. scores (H, R, K): of their own keys, scaled and masked. prefix: pairs (P, H, D).
    Returns (the weights of the own keys (H, R, K), what the prefixes contribute to the output (H, R, D)).
    """
    all_scores = [rows @ k.permute(1, 2, 0) * rows.shape[-1] ** -0.5 for k, _ in prefix] + [scores]
    weights = torch.cat(all_scores, -1).softmax(-1).split([x.shape[-1] for x in all_scores], -1)
    return weights[-1], sum(w @ v.transpose(0, 1) for w, (_, v) in zip(weights, prefix))


# ------------------------------------------------------------------------------------------------------------
# Variable lengths, for CUDA


def varlen_attention(q, k, v, layout, only_ends, prefix):
    """A packed row by torch's variable-length attention: every segment is a sequence of queries, and its keys
    are its context's and its own, gathered."""
    table = layout.table(("varlen", only_ends, q.device), lambda: varlen_table(layout, only_ends, q.device))
    places, *lengths = table
    k_own, v_own = k.index_select(0, places), v.index_select(0, places)
    # Causal is aligned to the last key: query i of a completion sees its whole context and itself up to i.
    if not prefix:
        return varlen_attn(q, k_own, v_own, *lengths, **CAUSAL)
    with_lse = AuxRequest(lse=True)
    out, lse = varlen_attn(q, k_own, v_own, *lengths, return_aux=with_lse, **CAUSAL)
    for prefix_k, prefix_v in prefix:  # one sequence of all queries, which sees all of the prefix
        ends = [torch.tensor([0, len(x)], dtype=torch.int32, device=q.device) for x in (q, prefix_k)]
        more = varlen_attn(q, prefix_k, prefix_v, *ends, len(q), len(prefix_k), return_aux=with_lse)
        out, lse = merge(out, lse, *more)
    return out


def merge(out, lse, other_out, other_lse):
    """Attention over two sets of keys from that over each: out (T, H, D), lse (H, T), the log of the sum of
    exp(score).

    A set's share of the whole softmax is exp(lse) of the sum of both.
    """
    share = torch.sigmoid(lse - other_lse).T.unsqueeze(-1)  # (T, H, 1)
    joined = out * share + other_out * (1 - share)
    return joined.to(out.dtype), torch.logaddexp(lse, other_lse)


def varlen_table(layout, only_ends, device):
    """(places of the keys, where each sequence of queries and of keys ends, the longest of each)."""
    places, key_ends = [], [0]
    segments = layout.completions if only_ends else range(len(layout.parents))
    for segment in segments:
        context = layout.parents[segment]
        keys = torch.arange(layout.starts[segment], layout.starts[segment + 1])
        if context != segment:
            keys = torch.cat([torch.arange(layout.starts[context], layout.starts[context + 1]), keys])
        places.append(keys)
        key_ends.append(key_ends[-1] + len(keys))
    query_ends = list(range(len(segments) + 1)) if only_ends else layout.starts
    longest_query = 1 if only_ends else max(layout.lengths)
    longest_keys = max(b - a for a, b in zip(key_ends, key_ends[1:]))
    tensors = [torch.cat(places), *(torch.tensor(x, dtype=torch.int32) for x in (query_ends, key_ends))]
    if device.type == "cuda":
        tensors = [x.pin_memory().to(device, non_blocking=True) for x in tensors]
    return *tensors, longest_query, longest_keys
