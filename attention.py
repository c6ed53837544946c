"""Faster ways to compute what `attention` in model.py defines. Without this file everything works, slowly.

  CPU    Tiles: 128 queries at a time, with only the keys that they see. So most of what a mask would hide,
         other comparisons and the future, is never computed.
  CUDA   Torch's flash attention; for packed rows its variable-length form, where each segment is a sequence.

A shared prefix costs one matrix product for all queries together. Its part and the part of the queries' own
keys are joined in one softmax on CPUs, and by their log-sum-exps on CUDA.

There may be fewer heads of keys, G, than of queries, H. Keys are not copied for each head of queries: the
R = H / G heads that share a key head are rows of one product with its keys.

tests/test_model.py compares every way with the definition, forward and backward, in fp64.
"""
import inspect
import math

import torch
import torch.nn.functional as F

TILE = 128  # queries in a tile: the fastest of 128, 256 and 512, for rows of 256 and of 1,024 tokens
STEP = 64  # keys of a tile come in multiples of it where they can: on CPUs each new matrix shape costs time
END_TILE = 16  # queries in a tile if only the completions' ends are queries

varlen_attn = None  # torch's variable-length attention
if torch.backends.cuda.is_built():  # elsewhere it is of no use, and importing it takes a second
    try:
        from torch.nn.attention.varlen import AuxRequest, varlen_attn  # torch >= 2.10
        VARLEN_FLAGS = inspect.signature(varlen_attn).parameters  # newer versions of torch have more of them
        CAUSAL = {"window_size": (-1, 0)} if "window_size" in VARLEN_FLAGS else {"is_causal": True}
    except ImportError:
        pass


def attention(q, k, v, layout=None, only_ends=False, prefix=()):
    """What model.plain_attention computes, by the fastest way that this device has. Returns the shape of q.

    Without a layout: q (n, t, H, D), k and v (n, T, G, D); causal, where the queries are the last t of the T
    tokens. With a layout (data/packing.py): q (T, H, D), k and v (T, G, D) of a packed row, or with only_ends
    q (K, H, D), the queries at the completions' ends. prefix: pairs of keys and values (P, G, D), which every
    query sees.
    """
    if layout is None:
        if prefix or q.shape[1] < k.shape[1]:
            return continued_attention(q, k, v, prefix)
        return causal_attention(q, k, v)
    if has_varlen(q.device, q.dtype):
        return varlen_attention(q, k, v, layout, only_ends, prefix)
    tiles = layout.table(("tiles", only_ends, q.dtype, q.device), lambda: layout_tiles(layout, only_ends, q))
    if prefix:
        return prefixed_tiles(q, k, v, tiles, prefix)
    out = TiledAttention.apply(by_key_head(q, k), k.transpose(0, 1), v.transpose(0, 1), tiles)
    return by_token(out)


def has_varlen(device, dtype):
    """True if torch's variable-length attention can compute this."""
    return varlen_attn is not None and device.type == "cuda" and dtype in (torch.bfloat16, torch.float16)


def backend(device, dtype):
    """What computes attention on this device, in words, for the printed plan of a run."""
    if device.type == "cpu":
        return "tiles"
    packed = "varlen_attn" if has_varlen(device, dtype) else "tiles"
    return f"scaled_dot_product_attention (packed rows: {packed})"


def by_key_head(q, k):
    """Queries (…, T, H, D), for keys (…, G, D), -> (…, G, R, T, D): those of each key head together."""
    return q.unflatten(-2, (k.shape[-2], -1)).movedim(-4, -2)


def by_token(x):
    """The reverse of by_key_head: (…, G, R, T, D) -> (…, T, H, D)."""
    return x.movedim(-2, -4).flatten(-3, -2)


def causal_attention(q, k, v):
    """Causal attention of whole sequences: q (B, T, H, D), k and v (B, T, G, D)."""
    B, T, H, _ = q.shape
    G = k.shape[2]
    if q.device.type not in ("cpu", "meta"):  # simulation.py computes on "meta" what a CPU does
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=G < H).transpose(1, 2)
    mask = torch.full((T, T), -math.inf, dtype=q.dtype, device=q.device).triu_(1)
    tiles = []
    for start in range(0, T, TILE):
        end = min(start + TILE, T)
        tiles.append((start, end, [(0, end)], mask[start:end, :end]))
    q = by_key_head(q, k).flatten(0, 1)  # (B G, R, T, D)
    k, v = (x.transpose(1, 2).flatten(0, 1) for x in (k, v))  # (B G, T, D)
    return by_token(TiledAttention.apply(q, k, v, tiles).unflatten(0, (B, G)))


# ------------------------------------------------------------------------------------------------------------
# Tiles, for CPUs. A tile is (first query, last query + 1, ranges of keys, mask to add to the scores). Each
# query is in one tile.


class TiledAttention(torch.autograd.Function):
    """softmax(q k^T / sqrt(D) + mask) v, tile by tile: q (N, R, T, D), k and v (N, T, D), where N is key
    heads, or sequences times key heads. Returns the shape of q.

    On CPUs in bf16 this is about twice as fast as F.scaled_dot_product_attention, whose backward pass is slow
    there (results/LOG.md).
    """

    @staticmethod
    def forward(ctx, q, k, v, tiles):
        out, weights = torch.empty_like(q), []
        for start, end, ranges, mask in tiles:
            scores = tile_scores(q[:, :, start:end], gather(k, ranges), mask)
            weights.append(torch.softmax(scores, -1))
            out[:, :, start:end] = torch.bmm(weights[-1], gather(v, ranges)).view(out[:, :, start:end].shape)
        ctx.save_for_backward(q, k, v, *weights)
        ctx.tiles = tiles
        return out

    @staticmethod
    def backward(ctx, d_out):
        q, k, v, *weights = ctx.saved_tensors
        dq, dk, dv = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        for (start, end, ranges, _), p in zip(ctx.tiles, weights):
            q_tile, d_tile = (x[:, :, start:end].flatten(1, 2) for x in (q, d_out))  # (N, R queries, D)
            dp = torch.bmm(d_tile, gather(v, ranges).transpose(1, 2))
            # The gradient of softmax, p * (dp - sum(dp * p)), in one pass, by torch's own operator for it.
            ds = torch.ops.aten._softmax_backward_data(dp, p, -1, p.dtype)
            dq[:, :, start:end] = torch.bmm(ds, gather(k, ranges)).view(dq[:, :, start:end].shape)
            scatter_add(dk, ranges, torch.bmm(ds.transpose(1, 2), q_tile))
            scatter_add(dv, ranges, torch.bmm(p.transpose(1, 2), d_tile))
        scale = q.shape[-1] ** -0.5
        return dq.mul_(scale), dk.mul_(scale), dv, None


def tile_scores(q, k, mask):
    """q k^T / sqrt(D) + mask: q (N, R, queries, D), k (N, keys, D), mask (queries, keys) -> (N, R queries,
    keys)."""
    N, R, _, D = q.shape
    mask = mask.expand(R, -1, -1).flatten(0, 1).expand(N, -1, -1)
    return torch.baddbmm(mask, q.flatten(1, 2), k.transpose(1, 2), alpha=D ** -0.5)


def gather(x, ranges):
    """The parts of x (N, T, D) in these ranges of T, joined."""
    parts = [x[:, begin:end] for begin, end in ranges]
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1)


def scatter_add(x, ranges, values):
    """The reverse of `gather`: add `values` to x (N, T, D) at the ranges of T that they came from."""
    sizes = [end - begin for begin, end in ranges]
    for (begin, end), part in zip(ranges, values.split(sizes, 1)):
        x[:, begin:end].add_(part)  # not +=, which would also copy the slice onto itself


def layout_tiles(layout, only_ends, q):
    """The tiles of a packed row, with masks in q's precision and on its device.

    only_ends: the queries are the completions' last tokens, otherwise all tokens.
    """
    places = layout.ends if only_ends else torch.arange(layout.starts[-1])
    tiles = []
    for start, end, ranges in end_ranges(layout) if only_ends else query_ranges(layout):
        keys = torch.cat([torch.arange(a, b) for a, b in ranges])
        sees = layout.sees(places[start:end, None], keys)
        mask = torch.zeros(sees.shape, dtype=q.dtype).masked_fill_(~sees, -math.inf)
        tiles.append((start, end, ranges, mask.to(q.device)))
    return tiles


def query_ranges(layout):
    """(first query, last query + 1, ranges of keys) of the tiles if all tokens are queries.

    A tile's first query sees its own segment and that segment's context. Whatever else the tile's queries see
    begins later. So the keys are that context, and everything from that segment's start to the tile's end.
    If there is little between the two, they are one range.
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
            extra = keys_to_add(end - context_start)
            tiles.append((start, end, [(max(0, context_start - extra), end)]))
        else:
            extra = keys_to_add(context_end - context_start + end - segment_start)
            segment_start = max(context_end, segment_start - extra)
            tiles.append((start, end, [(context_start, context_end), (segment_start, end)]))
    return tiles


def keys_to_add(n_keys):
    """How many keys, which the mask will hide, bring n_keys to a multiple of STEP."""
    return -n_keys % STEP


def end_ranges(layout):
    """The same as query_ranges if only the completions' ends are queries. A tile's keys are everything from
    its first completion's context to its last completion's end."""
    tiles, n = [], len(layout.completions)
    for start in range(0, n, END_TILE):
        end = min(start + END_TILE, n)
        first, last = layout.completions[start], layout.completions[end - 1]
        tiles.append((start, end, [(layout.starts[layout.parents[first]], layout.starts[last + 1])]))
    return tiles


# ------------------------------------------------------------------------------------------------------------
# Behind a prefix, and token by token. This is for reading: a backward pass would work, but it would keep the
# attention weights of all layers.


def continued_attention(q, k, v, prefix):
    """n sequences go on by t tokens: q (n, t, H, D); k and v (n, T, G, D) of all their tokens since the
    prefix.
    """
    n, t, H, D = q.shape
    T, G = k.shape[1:3]
    q, k, v = by_key_head(q, k), k.transpose(1, 2), v.transpose(1, 2)  # (n, G, …, D)
    scores = q.flatten(2, 3) @ k.transpose(2, 3) * D ** -0.5  # (n, G, R t, T)
    if t > 1:
        future = torch.ones(t, T, dtype=torch.bool, device=q.device).triu(T - t + 1)
        scores = scores.masked_fill(future.repeat(H // G, 1), -math.inf)
    if not prefix:
        return by_token((scores.softmax(-1) @ v).view(q.shape))
    # The queries of all sequences are the rows of one product with the prefix, so its keys are read once.
    rows, scores = (x.transpose(0, 1).reshape(G, -1, x.shape[-1]) for x in (q, scores))
    weights, from_prefix = join_prefix(rows, scores, prefix)
    own, from_prefix = (x.view(G, n, -1, x.shape[-1]).transpose(0, 1) for x in (weights, from_prefix))
    return by_token((own @ v + from_prefix).view(q.shape))


def prefixed_tiles(q, k, v, tiles, prefix):
    """A packed row behind prefixes: q (T, H, D), k and v (T, G, D)."""
    q, k, v = by_key_head(q, k), k.transpose(0, 1), v.transpose(0, 1)
    out = torch.empty_like(q)
    for start, end, ranges, mask in tiles:
        q_tile = q[:, :, start:end]
        scores = tile_scores(q_tile, gather(k, ranges), mask)
        weights, from_prefix = join_prefix(q_tile.flatten(1, 2), scores, prefix)
        out[:, :, start:end] = (weights @ gather(v, ranges) + from_prefix).view(q_tile.shape)
    return by_token(out)


def join_prefix(rows, scores, prefix):
    """One softmax over the keys of the prefixes and the queries' own keys.

    rows (G, Q, D): the queries of each key head. scores (G, Q, K): those of their own keys, scaled and
    masked. prefix: pairs of keys and values (P, G, D). Returns (the weights of their own keys (G, Q, K), what
    the prefixes contribute to the output (G, Q, D)).
    """
    all_scores = [rows @ k.permute(1, 2, 0) * rows.shape[-1] ** -0.5 for k, _ in prefix] + [scores]
    weights = torch.cat(all_scores, -1).softmax(-1).split([x.shape[-1] for x in all_scores], -1)
    return weights[-1], sum(w @ v.transpose(0, 1) for w, (_, v) in zip(weights, prefix))


# ------------------------------------------------------------------------------------------------------------
# Variable lengths, for CUDA


def varlen_attention(q, k, v, layout, only_ends, prefix):
    """A packed row by torch's variable-length attention. Every segment is a sequence of queries; its keys are
    its context's and its own, copied together."""
    table = layout.table(("varlen", only_ends, q.device), lambda: varlen_table(layout, only_ends, q.device))
    places, *lengths = table
    k_own, v_own = k.index_select(0, places), v.index_select(0, places)
    # With more keys than queries, "causal" lets the last query see all keys, the one before it all but one,
    # and so on. So a completion's tokens see the whole context.
    shared = {"enable_gqa": q.shape[1] > k.shape[1]} if "enable_gqa" in VARLEN_FLAGS else {}
    if not prefix:
        return varlen_attn(q, k_own, v_own, *lengths, **CAUSAL, **shared)
    with_lse = {"return_aux": AuxRequest(lse=True), **shared}
    out, lse = varlen_attn(q, k_own, v_own, *lengths, **with_lse, **CAUSAL)
    for prefix_k, prefix_v in prefix:  # one sequence of all queries, which sees all of the prefix
        ends = [torch.tensor([0, len(x)], dtype=torch.int32, device=q.device) for x in (q, prefix_k)]
        more = varlen_attn(q, prefix_k, prefix_v, *ends, len(q), len(prefix_k), **with_lse)
        out, lse = merge(out, lse, *more)
    return out


def merge(out, lse, other_out, other_lse):
    """Attention over two sets of keys, from the attention over each.

    out (T, H, D); lse (H, T), the log of the sum of exp(score) over a set's keys. A set's share of the joint
    softmax is its exp(lse), divided by the sum of both.
    """
    share = torch.sigmoid(lse - other_lse).T.unsqueeze(-1)  # (T, H, 1)
    joined = out * share + other_out * (1 - share)
    return joined.to(out.dtype), torch.logaddexp(lse, other_lse)


def varlen_table(layout, only_ends, device):
    """(place of each key in the row, where sequences of queries end, where their keys end, the longest
    sequence of queries, the longest of keys), as varlen_attn wants them."""
    places, query_ends, key_ends = [], [0], [0]
    for segment in layout.completions if only_ends else range(len(layout.parents)):
        if not (only_ends or layout.lengths[segment]):
            continue  # with fewer key heads, older kernels refuse sequences without a query
        context = layout.parents[segment]
        keys = torch.arange(layout.starts[segment], layout.starts[segment + 1])
        if context != segment:
            keys = torch.cat([torch.arange(layout.starts[context], layout.starts[context + 1]), keys])
        places.append(keys)
        query_ends.append(query_ends[-1] + (1 if only_ends else layout.lengths[segment]))
        key_ends.append(key_ends[-1] + len(keys))
    longest_query, longest_keys = (max(b - a for a, b in zip(ends, ends[1:]))
                                   for ends in (query_ends, key_ends))
    tensors = [torch.cat(places), *(torch.tensor(x, dtype=torch.int32) for x in (query_ends, key_ends))]
    if device.type == "cuda":
        tensors = [x.pin_memory().to(device, non_blocking=True) for x in tensors]
    return *tensors, longest_query, longest_keys
