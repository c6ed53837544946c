"""The model's ways of computing one thing are equal: causal, packed and cached, by attention's definition and
by each faster way; in fp64 to 1e-12, and so are the gradients."""
import importlib
import inspect
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import make_model

import attention
from data.packing import Layout
from kv_cache import Cache, read
from model import GPT, SIZES, Config

# ------------------------------------------------------------------------------------------------------------
# Checks


def random_tokens(*shape, seed=0):
    return torch.randint(101, shape, generator=torch.Generator().manual_seed(seed))


def assert_same(got, expected):
    assert got.shape == expected.shape
    assert (got - expected).abs().max() < 1e-12 * max(1, expected.abs().max())


def gradients(model, value):
    return torch.autograd.grad(value, list(model.parameters()))


def assert_same_with_gradients(model, got, expected):
    """Two tensors are the same, and so are the gradients by all parameters of a weighted sum of each."""
    assert_same(got, expected)
    weight = torch.randn(got.shape, generator=torch.Generator().manual_seed(1), dtype=got.dtype)
    of_got, of_expected = (gradients(model, (x * weight).sum()) for x in (got, expected))
    for got, expected in zip(of_got, of_expected, strict=True):
        assert_same(got, expected)


def naive(model, tokens):
    """The transformer written again in the plainest way: one sequence (T,) -> hidden (T, d_model)."""
    c, T = model.config, len(tokens)
    x = model.model.embed_tokens.weight[tokens]
    half = c.d_head // 2
    frequencies = c.rope_theta ** (-torch.arange(half, dtype=x.dtype) / half)
    angle = torch.arange(T, dtype=x.dtype)[:, None] * frequencies
    cos, sin = torch.cat([angle.cos()] * 2, -1), torch.cat([angle.sin()] * 2, -1)
    future = torch.ones(T, T).triu(1).bool()

    def norm(x, weight):
        return x / (x.pow(2).mean(-1, keepdim=True) + c.norm_eps).sqrt() * weight

    def rotate(x):
        return x * cos + torch.cat([-x[:, half:], x[:, :half]], -1) * sin

    for block in model.model.layers:
        h, a, m = norm(x, block.input_layernorm.weight), block.self_attn, block.mlp
        heads = []
        for i in range(c.n_head):
            j = i // (c.n_head // c.n_key_head)  # the head of keys that this head of queries uses
            of_queries, of_keys = (slice(n * c.d_head, (n + 1) * c.d_head) for n in (i, j))
            q = rotate(h @ a.q_proj.weight[of_queries].T)
            k = rotate(h @ a.k_proj.weight[of_keys].T)
            v = h @ a.v_proj.weight[of_keys].T
            scores = (q @ k.T / c.d_head ** 0.5).masked_fill(future, -torch.inf)
            heads.append(scores.softmax(-1) @ v)
        x = x + torch.cat(heads, -1) @ a.o_proj.weight.T
        h = norm(x, block.post_attention_layernorm.weight)
        x = x + (F.silu(h @ m.gate_proj.weight.T) * (h @ m.up_proj.weight.T)) @ m.down_proj.weight.T
    return norm(x, model.model.norm.weight)


# ------------------------------------------------------------------------------------------------------------
# Cases: rows of comparisons, shapes of models, and ways to compute attention


def random_comparisons(seed, *n_completions):
    """[(context, [completion, …]), …] of random lengths, with these numbers of completions."""
    rng = np.random.default_rng(seed)

    def draw(longest):
        return torch.from_numpy(rng.integers(0, 101, rng.integers(1, longest)))
    return [(draw(60), [draw(40) for _ in range(n)]) for n in n_completions]


def packed(comparisons):
    """(tokens (T,), Layout) of one row."""
    tokens, lengths, parents = [], [], []
    for context, completions in comparisons:
        parent = len(lengths)
        for part in (context, *completions):
            tokens.append(part)
            lengths.append(len(part))
            parents.append(parent)
    return torch.cat(tokens), Layout(lengths, parents)


def sequences_of(comparisons):
    """Each context joined to each of its completions, in the order of the row."""
    return [torch.cat([context, completion])
            for context, completions in comparisons for completion in completions]


LONG = [(torch.arange(300) % 101, [torch.arange(n) % (101 - n % 7) for n in (50, 200, 30, 140)])]
ROWS = {  # on CPUs a tile has 128 queries, or 16 ends of completions
    "one": random_comparisons(2, 1),
    "two each": random_comparisons(0, *[2] * 9),
    "two to five": random_comparisons(1, 2, 3, 4, 5, 2),
    "longer than a tile": LONG,
    "long between short": random_comparisons(3, 2, 2) + LONG + random_comparisons(4, 3)}
FEWER_KEY_HEADS = {"n_head": 6, "n_key_head": 2, "d_head": 10, "d_ff": 40}

each_shape = pytest.mark.parametrize("shape", [{}, FEWER_KEY_HEADS], ids=["", "fewer key heads"])
each_row = pytest.mark.parametrize("row, shape", [
    *(pytest.param(row, {}, id=row) for row in ROWS),
    *(pytest.param(row, FEWER_KEY_HEADS, id=f"{row}, fewer key heads")
      for row in ("two to five", "long between short"))])
all_or_only_ends = pytest.mark.parametrize("only_ends", [False, True], ids=["all", "only ends"])


@pytest.fixture(params=[True, False], ids=["plain", "fast"])
def plain(request):
    """True for attention by its definition in model.py, False for attention.py."""
    return request.param


# ------------------------------------------------------------------------------------------------------------
# Causal and packed


@each_shape
def test_causal_equals_the_naive_transformer(plain, shape):
    model, tokens = make_model(plain=plain, **shape), random_tokens(3, 300)
    separate = torch.stack([naive(model, row) for row in tokens])
    assert_same_with_gradients(model, model(tokens), separate)


@all_or_only_ends
@each_row
def test_packed_rewards_and_gradients_equal_separate_forwards(row, only_ends, plain, shape):
    model = make_model(plain=plain, value_head=True, **shape)
    tokens, layout = packed(ROWS[row])
    hidden = model(tokens, layout, only_ends=only_ends)
    rewards = model.rewards(hidden if only_ends else hidden[layout.ends])
    separate = torch.stack([model.rewards(naive(model, ids)[-1]) for ids in sequences_of(ROWS[row])])
    assert_same_with_gradients(model, rewards, separate)


@all_or_only_ends
@each_row
def test_packed_behind_a_prompt_equals_whole_sequences(row, only_ends, plain, shape):
    model, prompt = make_model(plain=plain, **shape), random_tokens(150)
    tokens, layout = packed(ROWS[row])
    with torch.no_grad():
        first, _ = read(model, prompt[:90])
        prefix = read(model, prompt[90:], first)[0].as_prefix()
        for _ in range(2):  # reading changes nothing in the cache
            hidden = model(tokens, layout, prefix, only_ends)
        at_ends = hidden if only_ends else hidden[layout.ends]
        separate = [naive(model, torch.cat([prompt, ids]))[-1] for ids in sequences_of(ROWS[row])]
    for got, expected in zip(at_ends, separate, strict=True):
        assert_same(got, expected)
    assert [len(part[0][0]) for part in prefix.prefixes] == [90, 60]
    assert prefix.prefixes[0][0][0].data_ptr() == first.stored[0].data_ptr()  # shared, not copied


def test_a_packed_row_behind_an_unforked_cache_is_refused():
    """It would silently be read without the prompt."""
    model, (tokens, layout) = make_model(), packed(ROWS["one"])
    cache, _ = read(model, range(20))
    with pytest.raises(ValueError, match="as_prefix"):
        model(tokens, layout, cache)
    with torch.no_grad():
        assert (model(tokens, layout, cache.as_prefix()) - model(tokens, layout)).abs().max() > 1e-3


def test_without_attention_py_everything_works_by_the_definition(monkeypatch):
    """The file may be deleted: model.py can be imported, computes the same, and trains."""
    monkeypatch.setitem(sys.modules, "attention", None)  # importing it is an ImportError
    monkeypatch.delitem(sys.modules, "model")
    alone, config = importlib.import_module("model"), Config(2, 32, 2, 101, 64)
    plain, fast = (kind(config).init_weights(0).double() for kind in (alone.GPT, GPT))
    assert alone.fast_attention is None and plain.plain and not fast.plain
    plain.dtype = fast.dtype = torch.float64
    hidden = [model(random_tokens(1, 50)) for model in (plain, fast)]
    assert_same(*hidden)
    assert_same(*(gradients(model, x.sum())[0] for model, x in zip((plain, fast), hidden)))
    backends = [model.attention_backend(torch.device("cpu")) for model in (plain, fast)]
    assert backends == ["its definition", "tiles"]


@pytest.mark.parametrize("dtype, packed", [(torch.bfloat16, "varlen_attn"), (torch.float32, "tiles")])
def test_a_run_on_cuda_can_tell_what_computes_attention(dtype, packed, monkeypatch):
    monkeypatch.setattr(attention, "varlen_attn", plain_varlen)
    model = make_model()
    model.dtype = dtype
    assert f"packed rows: {packed}" in model.attention_backend(torch.device("cuda"))
    monkeypatch.setattr(attention, "varlen_attn", None)  # torch 2.9 has none
    assert "packed rows: tiles" in model.attention_backend(torch.device("cuda"))


# ------------------------------------------------------------------------------------------------------------
# The kernel for CUDA


def plain_varlen(q, k, v, cu_q, cu_k, max_q, max_k, *, window_size=(-1, -1), return_aux=None,
                 enable_gqa=False):
    """torch's variable-length attention runs on CUDA only. This stand-in for it checks what it is given."""
    assert enable_gqa == (k.shape[1] < q.shape[1])
    assert window_size in ((-1, 0), (-1, -1)) and cu_q.dtype == cu_k.dtype == torch.int32
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    out, lse = [], []
    for q_start, q_end, k_start, k_end in zip(cu_q[:-1], cu_q[1:], cu_k[:-1], cu_k[1:]):
        n_queries, n_keys = q_end - q_start, k_end - k_start
        assert 0 < n_queries <= max_q and n_keys <= max_k
        mask = torch.ones(n_queries, n_keys, dtype=torch.bool)
        if window_size == (-1, 0):  # causal, where the last query sees all keys
            mask = mask.tril(n_keys - n_queries)
        scores = torch.einsum("qhd,khd->hqk", q[q_start:q_end], k[k_start:k_end]) / q.shape[-1] ** 0.5
        scores = scores.masked_fill(~mask, -torch.inf)
        out.append(torch.einsum("hqk,khd->qhd", scores.softmax(-1), v[k_start:k_end]))
        lse.append(scores.logsumexp(-1))
    return (torch.cat(out), torch.cat(lse, 1)) if return_aux else torch.cat(out)


@pytest.fixture
def cuda_way(monkeypatch):
    """Packed rows are computed as on CUDA, with a stand-in for its kernel."""
    monkeypatch.setattr(attention, "varlen_attn", plain_varlen)
    monkeypatch.setattr(attention, "CAUSAL", {"window_size": (-1, 0)}, raising=False)
    monkeypatch.setattr(attention, "AuxRequest", dict, raising=False)
    flags = inspect.signature(plain_varlen).parameters
    monkeypatch.setattr(attention, "VARLEN_FLAGS", flags, raising=False)
    monkeypatch.setattr(attention, "has_varlen", lambda device, dtype: True)


@all_or_only_ends
@each_row
def test_cuda_path_equals_the_definition(row, only_ends, cuda_way, shape):
    model, (tokens, layout) = make_model(**shape), packed(ROWS[row])
    fast = model(tokens, layout, only_ends=only_ends)
    model.plain = True
    assert_same_with_gradients(model, fast, model(tokens, layout, only_ends=only_ends))


@all_or_only_ends
@each_row
def test_cuda_path_behind_a_prompt_merges_two_attentions(row, only_ends, cuda_way, shape):
    model, (tokens, layout), prompt = make_model(**shape), packed(ROWS[row]), random_tokens(150)
    with torch.no_grad():
        prefix = read(model, prompt[90:], read(model, prompt[:90])[0])[0].as_prefix()
        fast = model(tokens, layout, prefix, only_ends)
        model.plain = True
        assert_same(fast, model(tokens, layout, prefix, only_ends))


# ------------------------------------------------------------------------------------------------------------
# Cached


@each_shape
@pytest.mark.parametrize("chunks", [(1,) * 30, (7, 1, 13, 9), (30,)],
                         ids=["by ones", "by several", "at once"])
def test_cache_equals_causal(chunks, plain, shape):
    model, tokens, cache = make_model(plain=plain, **shape), random_tokens(1, 30), Cache(30)
    with torch.no_grad():
        parts = [model(part, cache=cache) for part in tokens.split(chunks, 1)]
        assert_same(torch.cat(parts, 1), model(tokens))


@each_shape
def test_shared_prefix_equals_whole_sequences(plain, shape):
    """Three sequences of which two are kept, in parts of 1, 1, 1, 1, 2 and 3 tokens."""
    model, prompt, own = make_model(plain=plain, **shape), random_tokens(1, 40), random_tokens(3, 9, seed=1)
    kept = torch.tensor([0, 2])
    with torch.no_grad():
        whole = model(torch.cat([prompt.expand(3, -1), own], 1))[:, 40:]
        cache = Cache(40)
        model(prompt, cache=cache)
        cache = cache.fork(3, 9)
        of_three = [model(part, cache=cache) for part in own[:, :6].split((1, 1, 1, 1, 2), 1)]
        cache.select(kept)
        of_two = model(own[kept, 6:], cache=cache)
    assert_same(torch.cat([torch.cat(of_three, 1)[kept], of_two], 1), whole[kept])
    n_key_head, d_head = model.config.n_key_head, model.config.d_head
    assert all(k.shape == (40, n_key_head, d_head) for k, v in cache.prefixes[0])  # one copy, whatever n


def test_prefix_can_be_extended_and_forked_again(plain):
    model, tokens, cache = make_model(plain=plain), random_tokens(1, 30), Cache(10)
    with torch.no_grad():
        model(tokens[:, :10], cache=cache)
        cache = cache.fork(1, 12)
        model(tokens[:, 10:22], cache=cache)
        cache = cache.fork(2, 8)
        of_both = model(tokens[:, 22:].expand(2, -1), cache=cache)
        assert_same(of_both, model(tokens)[:, 22:].expand(2, -1, -1))


# ------------------------------------------------------------------------------------------------------------
# Losses, precision and sizes


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_cross_entropy_equals_the_plain_one(tied):
    model, vocab_size = make_model(tied=tied, vocab_size=5000), 5000
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(vocab_size, (1, 901), generator=generator)
    inputs, targets = tokens[:, :-1], tokens[0, 1:]
    weight = torch.rand(900, dtype=torch.float64, generator=generator)
    total, losses = model.token_losses(model(inputs)[0], targets, weight)
    expected = F.cross_entropy(model.logits(model(inputs))[0], targets, reduction="none")
    assert_same(losses, expected)
    of_total, of_expected = gradients(model, total * 3), gradients(model, (expected * weight).sum() * 3)
    for got, expected in zip(of_total, of_expected, strict=True):
        assert_same(got, expected)


def test_a_frozen_model_holds_its_matrices_in_the_type_it_computes_in():
    model = GPT(Config(2, 64, 2, 101, 512, value_head=True, tied=False)).init_weights(0)
    tokens, layout = packed(ROWS["two each"])
    model.dtype = torch.bfloat16
    with torch.no_grad():
        expected = model.rewards(model(tokens, layout, only_ends=True))
    model.freeze(torch.bfloat16)
    for name, p in model.named_parameters():
        assert (p.dtype == torch.float32) == ("norm" in name or name == "score.weight"), name
    rewards = model.rewards(model(tokens, layout, only_ends=True))
    assert not rewards.requires_grad and rewards.dtype == torch.float32
    assert (rewards - expected).abs().max() < 0.05 * expected.abs().max()
    _, losses = model.token_losses(model(tokens, layout)[:-1], tokens[1:])
    assert losses.dtype == torch.float32


def test_bf16_is_near_fp32():
    model = GPT(Config(4, 64, 2, 101, 512, value_head=True)).init_weights(0)
    tokens, layout = packed(ROWS["two each"])
    exact = model(tokens, layout)
    model.dtype = torch.bfloat16
    hidden = model(tokens, layout)
    assert (hidden - exact).abs().max() < 0.05 * exact.abs().max()
    assert model.rewards(hidden).dtype == torch.float32


@pytest.mark.parametrize("size, millions", [("13m", 12.58), ("42m", 42.47), ("197m", 196.6), ("810m", 805.3),
                                            ("2.7b", 2718), ("13b", 12580), ("52b", 51540)])
def test_sizes_are_the_papers(size, millions):
    n_layer, d_model, n_head = SIZES[size]
    n_parameters = 12 * n_layer * d_model**2
    assert abs(n_parameters / 1e6 / millions - 1) < 0.001
    assert d_model == 128 * n_layer and d_model % n_head == 0
    with torch.device("meta"):
        blocks, _ = GPT(Config(n_layer, d_model, n_head, 64, 8)).n_params()
    assert abs(blocks / n_parameters - 1) < 0.03
