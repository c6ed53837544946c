"""Samples: of one prompt or several together, they are what each alone would be; texts come out in whole
characters and end before a stop."""
import copy

import numpy as np
import pytest
import torch
from conftest import BYTES, Operators, load, make_comparisons, make_model

from data.packing import RowFormat
from evals import pm
from kv_cache import read
from model import GPT, Config
from sampling import LIKELIEST, TextSample, TokenSample, generate, next_tokens, stream

PROMPTS = [list(range(7)), [9, 8], list(range(30, 53)), [9, 8], [5] * 12]


def draw(model, prompts, seeds, **settings):
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    return generate(model, prompts, generators=generators, **settings)


# ------------------------------------------------------------------------------------------------------------
# Several samples together


def test_samples_behind_a_prefix_equal_those_of_the_whole_prompt():
    model, prompt, settings = make_model(), list(range(30)), dict(seeds=[3], n=3, max_new=8, top_p=0.9)
    prefix, _ = read(model, prompt[:20])
    behind = [draw(model, [prompt[20:]], prefix=prefix, **settings) for _ in range(2)]
    assert behind[0] == behind[1] == draw(model, [prompt], **settings)


@pytest.mark.parametrize("n, before", [(1, []), (3, []), (3, [1, 2, 3, 4])],
                         ids=["one each", "three each", "behind a prefix"])
def test_prompts_sampled_together_give_what_each_gives_alone(n, before):
    model = make_model()
    prefix = read(model, before)[0].as_prefix() if before else None
    settings = dict(n=n, max_new=9, end_ids=range(12), top_p=0.9, n_vocab=90, prefix=prefix)
    together = draw(model, PROMPTS, range(5), **settings)
    assert together == [draw(model, [prompt], [seed], **settings)[0] for seed, prompt in enumerate(PROMPTS)]
    assert together == draw(model, PROMPTS, range(5), **settings)  # the prefix is as it was
    assert together[1] != together[3] and (n == 1 or together[0][0] != together[0][1])  # other random numbers
    assert {len(s) for samples in together for s in samples} > {9} and all(len(s) == n for s in together)


def test_a_caller_may_end_one_sample_or_all():
    model, samples = make_model(), [[TokenSample()] for _ in PROMPTS]
    lengths = {sample: length for length, [sample] in enumerate(samples, 1)}
    for sample, _ in stream(model, PROMPTS, samples, max_new=9):
        sample.ended = len(sample.tokens) == lengths[sample]
    assert [len(sample.tokens) for [sample] in samples] == [1, 2, 3, 4, 5]
    [[sample]] = samples = [[TokenSample()]]
    for _ in stream(model, PROMPTS[:1], samples):
        if len(sample.tokens) == 3:
            break
    assert len(sample.tokens) == 3


def test_each_prompt_has_the_room_that_it_leaves():
    model = make_model(ctx=25)
    lengths = [len(samples[0]) for samples in generate(model, PROMPTS, max_new=20, temperature=0)]
    assert lengths == [18, 20, 2, 20, 13]
    with pytest.raises(ValueError, match="23 tokens leaves no room in a context of 20"):
        generate(make_model(ctx=20), PROMPTS)
    with pytest.raises(ValueError, match="no room"):
        generate(model, [[1], []])


def test_what_ends_is_not_computed_on(monkeypatch):
    """Sequences leave the cache as they end; a single prompt is read once for all its samples."""
    model, sizes = make_model(), []
    forward = model.forward

    def watched(tokens, **more):
        sizes.append(tuple(tokens.shape))
        return forward(tokens, **more)
    monkeypatch.setattr(model, "forward", watched)
    samples = [[TokenSample()] for _ in PROMPTS]
    lengths = {sample: length for length, [sample] in zip([2, 4, 1, 3, 2], samples)}
    for sample, _ in stream(model, PROMPTS, samples, max_new=9):
        sample.ended = len(sample.tokens) == lengths[sample]
    assert sizes == [(5, 2)] + [(m, 1) for m in [5, 5, 4, 3, 3, 3] + 5 * [2] + 10 * [1]]
    sizes.clear()
    generate(model, [PROMPTS[2]], n=4, max_new=2)
    assert sizes == [(1, 23), (4, 1)]


def test_greedy_equals_recomputing_everything():
    model, prompts = make_model(), [[0, 1, 2, 3, 4], [7, 9]]
    for prompt, samples in zip(prompts, generate(model, prompts, n=2, max_new=12, temperature=0)):
        expected = torch.tensor(prompt)
        for _ in range(12):
            expected = torch.cat([expected, model.logits(model(expected[None]))[0, -1].argmax()[None]])
        assert samples == [expected[len(prompt):].tolist()] * 2


# ------------------------------------------------------------------------------------------------------------
# Drawing tokens


def test_each_sample_ends_by_itself_and_follows_the_distribution():
    model, prompts = make_model(), [list(range(5)), [3, 4, 5, 6, 7, 8]]
    together = draw(model, prompts, [0, 1], n=400, max_new=6, end_ids=range(60), n_vocab=90)
    for prompt, samples in zip(prompts, together):
        for s in samples:
            assert all(t >= 60 for t in s[:-1]) and (s[-1] < 60 or len(s) == 6) and max(s) < 90
        expected = model.logits(model(torch.tensor([prompt])))[0, -1, :90].softmax(-1)
        seen = np.bincount([s[0] for s in samples], minlength=90) / 400
        assert np.abs(seen - expected.detach().numpy()).max() < 0.1
        assert all(s[0] >= 60 for s in samples if len(s) > 1)


def test_top_p_and_temperature():
    p = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).expand(2000, -1)
    u = torch.rand(2000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert set(next_tokens(p.log(), 1.0, 0.79, u).tolist()) == {0, 1}
    assert set(next_tokens(p.log(), 1.0, 0.81, u).tolist()) == {0, 1, 2}
    assert next_tokens(p.log(), 0, 1.0, u).unique().tolist() == [0]
    cold = next_tokens(p.log(), 0.5, 1.0, u).bincount(minlength=4) / 2000
    assert torch.allclose(cold, p[0] ** 2 / (p[0] ** 2).sum(), atol=0.05)


def test_top_p_of_a_large_vocabulary():
    """The same tokens as by sorting all of it, for rows that few tokens fill and for flat ones."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(64, 2000, generator=generator) * torch.linspace(0, 8, 64)[:, None]
    u = torch.rand(64, dtype=torch.float64, generator=generator)
    p, order = logits.softmax(-1).sort(-1, descending=True)
    p = p.double()
    nucleus = (p.cumsum(-1) - p) < 0.9
    assert (nucleus.sum(1) > LIKELIEST).any() and (nucleus.sum(1) < LIKELIEST).any()
    place = ((p * nucleus).cumsum(-1) <= u[:, None] * (p * nucleus).sum(-1, keepdim=True)).sum(1)
    assert next_tokens(logits, 1.0, 0.9, u).tolist() == order.gather(1, place[:, None])[:, 0].tolist()


def test_the_largest_random_number_takes_no_impossible_token():
    p = torch.tensor([[0.25, 0.75, 0.0], [0.0, 0.0, 1.0]])
    below_one = torch.full((2,), 1 - 2.0 ** -53, dtype=torch.float64)
    assert next_tokens(p.log(), 1.0, 1.0, below_one).tolist() == [1, 2]
    assert next_tokens(p.log(), 1.0, 1.0, torch.zeros(2, dtype=torch.float64)).tolist() == [0, 2]


# ------------------------------------------------------------------------------------------------------------
# Texts


def grow(text, stops=()):
    """(the TextSample that these bytes, one token each, are added to, the pieces that come out)."""
    sample, pieces = TextSample(BYTES, stops), []
    for byte in text:
        pieces.append(sample.add(byte))
        if sample.ended:
            break
    return sample, pieces


def test_a_text_ends_before_its_stop_whatever_the_tokens():
    sample, pieces = grow("Yes – a dog.\n\nHuman: No".encode(), ("\n\nHuman:", "\n\n-----"))
    assert sample.ended and sample.text == "".join(pieces) == "Yes – a dog."
    assert len(sample.tokens) == len("Yes – a dog.\n\nHuman:".encode())
    sample, pieces = grow(b"ab")
    assert not sample.ended and pieces == ["a", "b"]
    assert sample.add(BYTES.eot) == "" and sample.ended and sample.text == "ab"
    chat_tokenizer = copy.copy(BYTES)
    chat_tokenizer.ends = [ord("!")]  # what ends a turn of a model that was made for chat
    sample = TextSample(chat_tokenizer)
    assert sample.add(ord("a")) == "a" and sample.add(ord("!")) == "" and sample.ended


def test_a_piece_comes_as_soon_as_it_is_certain_and_is_never_taken_back():
    text = " no\n\nHumble-----\n\n\n\n---- ok é\n\n-----\n\nHuman:"
    sample, pieces = grow(text.encode(), ("\n\nHuman:", "\n\n-----"))
    assert "".join(pieces) == sample.text == " no\n\nHumble-----\n\n\n\n---- ok é"
    assert pieces[:10] == [" ", "n", "o", "", "", "", "", "", "\n\nHumb", "l"]  # "\n\nHum" may become a stop
    assert "é" in pieces
    sample, pieces = grow("never – ended\n\nHum".encode(), ("\n\nHuman:",))
    assert "".join(pieces) == "never – ended" == sample.text[:sample.n_settled]
    assert sample.text == "never – ended\n\nHum"


# ------------------------------------------------------------------------------------------------------------
# What a device has to do


@pytest.fixture
def on_meta(monkeypatch):
    """A function that calls another with a model on torch's meta device, which has types and shapes but no
    numbers: whatever is fetched from there is 0. Returns the types of what was computed on the device."""
    for name in ("cpu", "tolist"):
        fetch = getattr(torch.Tensor, name)

        def fetch_zeros(x, fetch=fetch):
            return fetch(torch.zeros(x.shape, dtype=x.dtype) if x.is_meta else x)
        monkeypatch.setattr(torch.Tensor, name, fetch_zeros)

    def run(function):
        with torch.device("meta"):
            model = GPT(Config(2, 32, 2, BYTES.vocab_size, 2048, value_head=True)).freeze(torch.float32)
        with Operators() as operators, torch.no_grad():
            function(model)
        return {x.dtype for _, _, results in operators.calls for x in results if x.is_meta}
    return run


@pytest.mark.parametrize("top_p", [1, 0.9])
def test_sampling_makes_no_64_bit_floats_on_a_device(on_meta, top_p):
    """Apple's GPUs have none."""
    types = on_meta(lambda model: draw(model, PROMPTS, range(5), n=2, max_new=4, n_vocab=90, top_p=top_p))
    assert torch.float32 in types and torch.float64 not in types


@pytest.mark.parametrize("rule", pm.RULES)
def test_scoring_makes_no_64_bit_floats_on_a_device(on_meta, tmp_path, rule):
    data = load(tmp_path, make_comparisons(8))

    def score(model):
        prefix = read(model, list(range(9)))[0].as_prefix()
        pm.score_all(model, data, np.arange(8), rule, RowFormat(512, BYTES), 2048, prefix=prefix)
    types = on_meta(score)
    assert torch.float32 in types and torch.float64 not in types


def test_a_token_reads_each_matrix_once_in_the_type_that_is_computed_in():
    """So a token costs two bytes a parameter, and nothing is cast anew for each."""
    model = GPT(Config(2, 64, 2, BYTES.vocab_size, 64)).init_weights(0).freeze(torch.bfloat16)
    tokens = stream(model, [PROMPTS[0]], [[TokenSample()]])
    next(tokens)
    with Operators() as operators:
        next(tokens)
    matrices = {p.untyped_storage().data_ptr(): p for p in model.parameters() if p.dim() == 2}
    reads = dict.fromkeys(matrices, 0)
    for operator, tensors, results in operators.calls:
        for x in tensors:
            if x.untyped_storage().data_ptr() in reads and not operator.is_view:
                assert x.dtype == torch.bfloat16
                reads[x.untyped_storage().data_ptr()] += 1
    table = model.unembedding.untyped_storage().data_ptr()  # read for the token, and whole for the logits
    assert reads == {place: 1 + (place == table) for place in matrices}
