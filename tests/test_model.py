"""The model's ways of computing one thing are equal: causal, packed and cached, by attention's definition and by each
faster way; in fp64 to 1e-12, gradients too."""
import importlib
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import attention
import model as model_module
from data.packing import Layout
from model import Cache, Config, GPT, read


def make_model(value_head=False, vocab=101, ctx=2048, tied=True, **shape):
    config = Config(**{"n_layer": 2, "d_model": 32, "n_head": 2, **shape}, vocab_size=vocab, ctx=ctx, value_head=value_head, tied=tied)
    model = GPT(config).init_weights(seed=1).double()
    with torch.no_grad():  # norms away from 1, larger weights: nothing is equal by being trivial
        for p in model.parameters():
            p += 0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel()), dtype=p.dtype)
    model.dtype = torch.float64
    return model


def naive(model, tokens):
    """The transformer written again in the plainest way, as a check: one sequence (T,) -> hidden (T, d)."""
    c = model.config
    x, T = model.model.embed_tokens.weight[tokens], len(tokens)
    half = c.d_head // 2
    angle = torch.arange(T, dtype=x.dtype)[:, None] * c.rope_theta ** (-torch.arange(half, dtype=x.dtype) / half)
    cos, sin = torch.cat([angle.cos()] * 2, -1), torch.cat([angle.sin()] * 2, -1)

    def norm(x, weight):
        return x / (x.pow(2).mean(-1, keepdim=True) + c.norm_eps).sqrt() * weight

    def turn(h):
        return h * cos + torch.cat([-h[:, half:], h[:, :half]], -1) * sin

    for block in model.model.layers:
        h, a, m = norm(x, block.input_layernorm.weight), block.self_attn, block.mlp
        heads = []
        for i in range(c.n_head):
            own = slice(i * c.d_head, (i + 1) * c.d_head)
            j = i // (c.n_head // c.n_key_head)  # the key head that this head of queries uses
            shared = slice(j * c.d_head, (j + 1) * c.d_head)
            q, k = turn(h @ a.q_proj.weight[own].T), turn(h @ a.k_proj.weight[shared].T)
            v = h @ a.v_proj.weight[shared].T
            scores = (q @ k.T / (2 * half) ** 0.5).masked_fill(torch.ones(T, T).triu(1).bool(), -torch.inf)
            heads.append(scores.softmax(-1) @ v)
        x = x + torch.cat(heads, -1) @ a.o_proj.weight.T
        h = norm(x, block.post_attention_layernorm.weight)
        x = x + (F.silu(h @ m.gate_proj.weight.T) * (h @ m.up_proj.weight.T)) @ m.down_proj.weight.T
    return norm(x, model.model.norm.weight)


def random_comparisons(seed, sizes):
    """[(context, [completion, …])] with the given numbers of completions and random lengths."""
    rng = np.random.default_rng(seed)
    draw = lambda n: torch.from_numpy(rng.integers(0, 101, n))
    return [(draw(rng.integers(1, 60)), [draw(rng.integers(1, 40)) for _ in range(n)]) for n in sizes]


def packed(comparisons):
    tokens, lengths, parents = [], [], []
    for context, completions in comparisons:
        parent = len(lengths)
        for part in (context, *completions):
            tokens.append(part)
            lengths.append(len(part))
            parents.append(parent)
    return torch.cat(tokens), Layout(lengths, parents)


LONG = [(torch.arange(700) % 101, [torch.arange(90) % 97, torch.arange(300) % 89, torch.arange(40) % 31, torch.arange(400) % 61])]
CASES = {"two each": random_comparisons(0, [2] * 7), "two to five": random_comparisons(1, [2, 3, 4, 5, 2]), "one": random_comparisons(2, [1]),
         "longer than a tile": LONG, "long between short": random_comparisons(3, [2, 2]) + LONG + random_comparisons(4, [3])}


SHAPES = {"as many key heads": {}, "fewer key heads": {"n_head": 6, "n_key_head": 2, "d_head": 10, "d_ff": 40}}


FEWER = SHAPES["fewer key heads"]


@pytest.fixture(params=SHAPES)
def shape(request):
    """Settings of a model with as many heads of keys as of queries, and of one with fewer."""
    return SHAPES[request.param]


each_case = pytest.mark.parametrize("case, shape", [
    *((case, {}) for case in CASES), ("two to five", FEWER), ("long between short", FEWER)])


def same(a, b):
    assert a.shape == b.shape
    assert (a - b).abs().max() < 1e-12 * max(1, b.abs().max())


@pytest.fixture(params=["plain", "fast"])
def way(request, monkeypatch):
    """Attention by its definition, and by attention.py."""
    monkeypatch.setattr(GPT, "plain", request.param == "plain", raising=False)
    make = GPT.__init__

    def init(self, config):
        make(self, config)
        self.plain = request.param == "plain"
    monkeypatch.setattr(GPT, "__init__", init)
    return request.param


def test_causal_equals_the_naive_transformer(way, shape):
    model, tokens = make_model(**shape), torch.randint(101, (3, 300), generator=torch.Generator().manual_seed(0))
    together = model(tokens)
    alone = torch.stack([naive(model, row) for row in tokens])
    same(together, alone)
    parameters = list(model.parameters())
    weight = torch.randn(together.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for got, expected in zip(torch.autograd.grad((together * weight).sum(), parameters), torch.autograd.grad((alone * weight).sum(), parameters)):
        same(got, expected)


@pytest.mark.parametrize("only_ends", [False, True])
@each_case
def test_packed_rewards_and_gradients_equal_separate_forwards(case, only_ends, way, shape):
    model, comparisons = make_model(value_head=True, **shape), CASES[case]
    tokens, layout = packed(comparisons)
    ends = [layout.starts[i + 1] - 1 for i, p in enumerate(layout.parents) if p != i]
    hidden = model(tokens, layout, only_ends=only_ends)
    together = model.rewards(hidden if only_ends else hidden[ends])
    weight = torch.arange(1.0, len(ends) + 1, dtype=torch.float64)
    gradient = torch.autograd.grad((together * weight).sum(), list(model.parameters()))
    alone = torch.stack([model.rewards(naive(model, torch.cat([context, c]))[-1]) for context, cs in comparisons for c in cs])
    same(together, alone)
    for got, expected in zip(gradient, torch.autograd.grad((alone * weight).sum(), list(model.parameters()))):
        same(got, expected)


def test_without_attention_py_everything_works_by_the_definition():
    """The file may be deleted: model.py imports, computes the same and trains."""
    code = ("import sys; sys.modules['attention'] = None\nimport torch, model\n"
            "net = model.GPT(model.Config(2, 32, 2, 101, 64)).init_weights(0)\nassert net.plain and model.fast_attention is None\n"
            "net(torch.arange(50)[None]).sum().backward()\nprint(net(torch.arange(50)[None]).detach().double().sum().item())")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=model_module.__file__.rsplit("/", 1)[0])
    net = GPT(Config(2, 32, 2, 101, 64)).init_weights(0)
    assert done.returncode == 0, done.stderr
    assert not net.plain and float(done.stdout) == pytest.approx(net(torch.arange(50)[None]).detach().double().sum().item(), abs=1e-3)


def plain_varlen(q, k, v, cu_q, cu_k, max_q, max_k, *, window_size=(-1, -1), return_aux=None,
                 enable_gqa=False):
    """torch's variable-length attention runs on CUDA only. This stand-in with its contract shows what it is given."""
    assert enable_gqa == (k.shape[1] < q.shape[1])
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    assert window_size in ((-1, 0), (-1, -1)) and cu_q.dtype == cu_k.dtype == torch.int32
    out, lse = [], []
    for a, b, c, d in zip(cu_q[:-1], cu_q[1:], cu_k[:-1], cu_k[1:]):
        assert b - a <= max_q and d - c <= max_k
        mask = torch.ones(b - a, d - c, dtype=torch.bool)
        mask = mask.tril(d - c - (b - a)) if window_size == (-1, 0) else mask  # causal is aligned to the last key
        scores = torch.einsum("qhd,khd->hqk", q[a:b], k[c:d]) / q.shape[-1] ** 0.5
        scores = scores.masked_fill(~mask, -torch.inf)
        out.append(torch.einsum("hqk,khd->qhd", scores.softmax(-1), v[c:d]))
        lse.append(scores.logsumexp(-1))
    return (torch.cat(out), torch.cat(lse, 1)) if return_aux else torch.cat(out)


@pytest.fixture
def cuda_way(monkeypatch):
    """The computation of packed rows on CUDA, with a stand-in for its kernel."""
    monkeypatch.setattr(attention, "varlen_attn", plain_varlen)
    monkeypatch.setattr(attention, "CAUSAL", {"window_size": (-1, 0)}, raising=False)
    monkeypatch.setattr(attention, "AuxRequest", dict, raising=False)
    monkeypatch.setattr(attention, "has_varlen", lambda q, k: True)


@pytest.mark.parametrize("only_ends", [False, True])
@each_case
def test_cuda_path_reads_the_same_keys(case, only_ends, cuda_way, shape):
    model = make_model(**shape)
    tokens, layout = packed(CASES[case])
    results = []
    for model.plain in (False, True):
        hidden = model(tokens, layout, only_ends=only_ends)
        weight = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(1), dtype=hidden.dtype)
        results.append([hidden, *torch.autograd.grad((hidden * weight).sum(), list(model.parameters()))])
    for got, expected in zip(*results):
        same(got, expected)


@pytest.mark.parametrize("only_ends", [False, True])
@each_case
def test_cuda_path_behind_a_prompt_merges_two_attentions(case, only_ends, cuda_way, shape):
    model = make_model(**shape)
    tokens, layout = packed(CASES[case])
    prompt = torch.randint(101, (150,), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        prefix = read(model, prompt[90:], read(model, prompt[:90])[0])[0].as_prefix()
        got = model(tokens, layout, prefix, only_ends)
        model.plain = True
        same(got, model(tokens, layout, prefix, only_ends))


@pytest.mark.parametrize("chunks", [(1,) * 30, (7, 1, 13, 9), (30,)])
def test_cache_equals_causal(chunks, way, shape):
    model, tokens = make_model(**shape), torch.randint(101, (1, 30), generator=torch.Generator().manual_seed(0))
    cache = Cache(30)
    with torch.no_grad():
        out = torch.cat([model(part, cache=cache) for part in tokens.split(chunks, 1)], 1)
        same(out, model(tokens))


def test_shared_prefix_equals_whole_sequences(way, shape):
    model, g = make_model(**shape), torch.Generator().manual_seed(0)
    prompt, own = torch.randint(101, (1, 40), generator=g), torch.randint(101, (3, 9), generator=g)
    whole = model(torch.cat([prompt.expand(3, -1), own], 1))[:, 40:]
    with torch.no_grad():
        cache = Cache(40)
        model(prompt, cache=cache)
        cache = cache.fork(3, 9)
        parts = [model(x, cache=cache) for x in own[:, :4].split(1, 1)] + [model(own[:, 4:6], cache=cache)]
        cache.select(torch.tensor([0, 2]))
        parts = [torch.cat(parts, 1)[[0, 2]], model(own[[0, 2], 6:], cache=cache)]
        same(torch.cat(parts, 1), whole[[0, 2]])
        n_key_head, d_head = model.config.n_key_head, model.config.d_head
        assert all(k.shape == (40, n_key_head, d_head) for k, v in cache.prefix[0])  # one copy, whatever n


def test_prefix_can_be_extended_and_forked_again(way):
    model, tokens = make_model(), torch.randint(101, (1, 30), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        cache = Cache(10)
        model(tokens[:, :10], cache=cache)
        cache = cache.fork(1, 12)
        model(tokens[:, 10:22], cache=cache)
        cache = cache.fork(2, 8)
        same(model(tokens[:, 22:].expand(2, -1), cache=cache), model(tokens).expand(2, -1, -1)[:, 22:])


@pytest.mark.parametrize("only_ends", [False, True])
@each_case
def test_packed_behind_a_prompt_equals_whole_sequences(case, only_ends, way, shape):
    model, comparisons = make_model(**shape), CASES[case]
    tokens, layout = packed(comparisons)
    prompt = torch.randint(101, (150,), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        first, _ = read(model, prompt[:90])
        prefix = read(model, prompt[90:], first)[0].as_prefix()
        for _ in range(2):  # reading changes nothing in the cache
            hidden = model(tokens, layout, prefix, only_ends)
        for i, end in enumerate(layout.ends if not only_ends else range(len(layout.ends))):
            context, completion = [(c, x) for c, xs in comparisons for x in xs][i]
            same(hidden[end], naive(model, torch.cat([prompt, context, completion]))[-1])
        assert [len(part[0][0]) for part in prefix.prefix] == [90, 60]
        assert prefix.prefix[0][0][0].data_ptr() == first.stored[0].data_ptr()  # shared, not copied


def test_a_packed_row_behind_an_unforked_cache_is_refused():
    """It would silently be read without the prompt."""
    model, (tokens, layout) = make_model(), packed(CASES["one"])
    cache, _ = read(model, range(20))
    with pytest.raises(ValueError, match="as_prefix"):
        model(tokens, layout, cache)
    with torch.no_grad():
        assert (model(tokens, layout, cache.as_prefix()) - model(tokens, layout)).abs().max() > 1e-3


def test_a_frozen_model_holds_its_matrices_in_the_type_it_computes_in():
    model = GPT(Config(2, 64, 2, 101, 512, value_head=True, tied=False)).init_weights(0)
    tokens, layout = packed(CASES["two each"])
    model.dtype = torch.bfloat16
    with torch.no_grad():
        expected = model.rewards(model(tokens, layout, only_ends=True))
    model.freeze(torch.bfloat16)
    held = {name: p.dtype for name, p in model.named_parameters()}
    assert all((dtype == torch.float32) == ("norm" in name or name == "score.weight") for name, dtype in held.items())
    got = model.rewards(model(tokens, layout, only_ends=True))
    assert not got.requires_grad and got.dtype == torch.float32 and (got - expected).abs().max() < 0.05 * expected.abs().max()
    total, losses = model.token_losses(model(tokens, layout)[:-1], tokens[1:])
    assert losses.dtype == torch.float32


@pytest.mark.parametrize("tied", [True, False])
def test_cross_entropy_equals_the_plain_one(tied):
    model = make_model(tied=tied, vocab=5000)
    tokens = torch.randint(5000, (1, 901), generator=torch.Generator().manual_seed(0))
    weight = torch.rand(900, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    total, losses = model.token_losses(model(tokens[:, :-1])[0], tokens[0, 1:], weight)
    plain = F.cross_entropy(model.logits(model(tokens[:, :-1]))[0], tokens[0, 1:], reduction="none")
    same(losses, plain)
    parameters = list(model.parameters())
    for got, expected in zip(torch.autograd.grad(total * 3, parameters), torch.autograd.grad((plain * weight).sum() * 3, parameters)):
        same(got, expected)


def test_sizes_are_the_papers():
    for name, millions in {"13m": 12.58, "42m": 42.47, "197m": 196.6, "810m": 805.3, "2.7b": 2718, "13b": 12580, "52b": 51540}.items():
        layers, width, heads = model_module.SIZES[name]
        assert abs(12 * layers * width**2 / 1e6 / millions - 1) < 0.001 and width == 128 * layers and width % heads == 0
        with torch.device("meta"):
            blocks, _ = GPT(Config(layers, width, heads, 64, 8)).n_params()
        assert abs(blocks / (12 * layers * width**2) - 1) < 0.03


def test_bf16_is_near_fp32():
    model = GPT(Config(4, 64, 2, 101, 512, value_head=True)).init_weights(0)
    tokens, layout = packed(CASES["two each"])
    exact = model(tokens, layout)
    model.dtype = torch.bfloat16
    assert (model(tokens, layout) - exact).abs().max() < 0.05 * exact.abs().max()
    assert model.rewards(model(tokens, layout)).dtype == torch.float32
