"""Samples: of one prompt or several together, they are what each alone would be."""
import numpy as np
import pytest
import torch

from model import read
from sampling import generate, sample, stream
from test_model import make_model

PROMPTS = [list(range(7)), [9, 8], list(range(30, 53)), [9, 8], [5] * 12]


def test_samples_behind_a_prefix_equal_those_of_the_whole_prompt():
    model, prompt = make_model(), list(range(30))
    draw = lambda prompt, **more: generate(model, [prompt], n=3, seeds=[3], max_new=8, top_p=0.9, **more)
    prefix, _ = read(model, prompt[:20])
    assert draw(prompt[20:], prefix=prefix) == draw(prompt) == draw(prompt[20:], prefix=prefix)


@pytest.mark.parametrize("n, behind", [(1, []), (3, []), (3, [1, 2, 3, 4])], ids=["one each", "three each", "behind a prefix"])
def test_prompts_sampled_together_give_what_each_gives_alone(n, behind):
    model = make_model()
    prefix = read(model, behind)[0].fork(1, 0) if behind else None
    settings = dict(n=n, max_new=9, stop=range(12), top_p=0.9, n_vocab=90, prefix=prefix)
    together = generate(model, PROMPTS, seeds=range(5), **settings)
    alone = [generate(model, [prompt], seeds=[seed], **settings)[0] for seed, prompt in enumerate(PROMPTS)]
    assert together == alone
    assert together == generate(model, PROMPTS, seeds=range(5), **settings)  # the prefix is as it was
    assert together[1] != together[3] and (n == 1 or together[0][0] != together[0][1])  # other random numbers
    assert {len(s) for samples in together for s in samples} > {9} and all(len(samples) == n for samples in together)


def test_a_sample_may_be_ended_from_outside():
    model, seen = make_model(), {}

    def done(rows, tokens):
        for row, token in zip(rows.tolist(), tokens.tolist()):
            seen.setdefault(row, []).append(token)
        return torch.tensor([len(seen[row]) == 1 + row for row in rows.tolist()])
    together = generate(model, PROMPTS, seeds=range(5), max_new=9, done=done)
    assert [samples[0] for samples in together] == [seen[row] for row in range(5)]
    assert [len(seen[row]) for row in range(5)] == [1, 2, 3, 4, 5]


def test_each_prompt_has_the_room_that_it_leaves():
    model = make_model(ctx=25)
    lengths = [len(samples[0]) for samples in generate(model, PROMPTS, max_new=20, temperature=0)]
    assert lengths == [18, 20, 2, 20, 13]
    with pytest.raises(ValueError, match="23 tokens leaves no room in a context of 20"):
        generate(make_model(ctx=20), PROMPTS)
    with pytest.raises(ValueError, match="no room"):
        generate(model, [[1], []])


def test_what_ends_is_not_computed_on(monkeypatch):
    """Rows leave the cache as they end; a prompt of one is read once for all its samples."""
    model, sizes = make_model(), []
    forward = model.forward
    monkeypatch.setattr(model, "forward", lambda tokens, **more: sizes.append(tuple(tokens.shape)) or forward(tokens, **more))
    ends = [2, 4, 1, 3, 2]
    for _ in stream(model, PROMPTS, max_new=9, done=lambda rows, tokens: torch.tensor([countdown(ends, row) for row in rows.tolist()])):
        pass
    assert sizes == [(5, 2)] + [(m, 1) for m in [5, 5, 4, 3, 3, 3] + 5 * [2] + 10 * [1]]
    sizes.clear()
    generate(model, [PROMPTS[2]], n=4, max_new=2)
    assert sizes == [(1, 23), (4, 1)]


def countdown(ends, row):
    ends[row] -= 1
    return ends[row] == 0


def test_greedy_equals_recomputing_everything():
    model, prompts = make_model(), [[0, 1, 2, 3, 4], [7, 9]]
    for prompt, samples in zip(prompts, generate(model, prompts, n=2, max_new=12, temperature=0)):
        expected = torch.tensor(prompt)
        for _ in range(12):
            expected = torch.cat([expected, model.logits(model(expected[None]))[0, -1].argmax()[None]])
        assert samples == [expected[len(prompt):].tolist()] * 2


def test_each_sample_stops_by_itself_and_follows_the_distribution():
    model, prompts = make_model(), [list(range(5)), [3, 4, 5, 6, 7, 8]]
    together = generate(model, prompts, n=400, seeds=[0, 1], max_new=6, stop=range(60), n_vocab=90)
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
    assert set(sample(p.log(), 1.0, 0.79, u).tolist()) == {0, 1}
    assert set(sample(p.log(), 1.0, 0.81, u).tolist()) == {0, 1, 2}
    assert sample(p.log(), 0, 1.0, u).unique().tolist() == [0]
    cold = sample(p.log(), 0.5, 1.0, u).bincount(minlength=4) / 2000
    assert torch.allclose(cold, p[0] ** 2 / (p[0] ** 2).sum(), atol=0.05)


def test_the_largest_random_number_takes_no_impossible_token():
    p = torch.tensor([[0.25, 0.75, 0.0], [0.0, 0.0, 1.0]])
    below_one = torch.full((2,), 1 - 2.0 ** -53, dtype=torch.float64)
    assert sample(p.log(), 1.0, 1.0, below_one).tolist() == [1, 2]
    assert sample(p.log(), 1.0, 1.0, torch.zeros(2, dtype=torch.float64)).tolist() == [0, 2]
