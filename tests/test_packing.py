"""Packing: each example once, full rows, an order that is pure in (seed, epoch), and what exactly a row holds."""
import numpy as np
import pytest
import torch
from conftest import DATA, make_comparisons, write_jsonl

from data.comparisons import load_comparisons
from data.packing import RowFormat, balance, epoch_order, make_row, pack, packed_lengths, spread, step_examples, whole_lengths
from data.tokenizer import get_tokenizer
from evals.pm import score_all
from test_model import make_model

BYTES = get_tokenizer("bytes")
HUNDRED = RowFormat(100, BYTES)


def load(tmp_path, *records):
    """Records given as (context, completions, scores)."""
    records = [dict(zip(("context", "completions", "scores"), r)) for r in records]
    return load_comparisons([write_jsonl(tmp_path / "file.jsonl", records)], BYTES, quiet=True)


def shown(row):
    return BYTES.decode(row.tokens)


# ---------------------------------------------------------------------------------------------------------------------
# Rows of lengths


@pytest.mark.parametrize("seed", range(5))
def test_pack_takes_each_once_and_never_too_much(seed):
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, 400, rng.integers(1, 300)).tolist() + [1500, 1001] * (seed % 2)
    rows = pack(lengths, 1000)
    assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
    loads = [sum(lengths[i] for i in row) for row in rows]
    assert all(load <= 1000 or len(row) == 1 for load, row in zip(loads, rows))
    assert lengths[rows[0][0]] == max(lengths)  # what takes most memory comes first


def test_pack_fits_best():
    assert pack([6, 5, 4, 5], 10) == [[0, 2], [1, 3]]
    assert pack([6, 7, 3, 1], 10) == [[1, 2], [0, 3]]  # 3 goes where just 3 are left, not where 4 are
    assert pack([7, 6, 3, 4, 3], 10) == [[0, 2], [1, 3], [4]]
    assert pack([11, 5, 5], 10) == [[0], [1, 2]]
    assert pack([], 10) == []


def hh():
    files = [DATA / "hh-rlhf" / "harmless-base" / "test.jsonl.gz"]
    vocabulary = DATA / "vocab" / "gpt2.tiktoken"
    if not (files[0].exists() and vocabulary.exists()):
        pytest.skip("no HH-RLHF or GPT-2 vocabulary here")
    return load_comparisons(files, get_tokenizer(str(vocabulary)), quiet=True)


@pytest.mark.parametrize("batch", [512, None], ids=["batches of 512", "whole"])
def test_rows_of_human_comparisons_are_full(batch):
    """At least 97 % of the row, at capacity and ctx 1024: the whole data set at once, and each full batch of 512 (PMP's)."""
    data = hh()
    lengths = np.array(packed_lengths(data, range(len(data)), RowFormat(1024, BYTES)))[data.fits(1024)]
    assert len(lengths) > 1800 and lengths.max() <= 1024 + 600
    for step in range(len(lengths) // batch if batch else 1):
        _, examples = step_examples(len(lengths), batch or len(lengths), 0, step)
        part = lengths[examples]
        part = part[part <= 1024]  # a comparison of two long completions has a row to itself
        rows = pack(part.tolist(), 1024)
        assert sum(part) / (1024 * len(rows)) >= 0.97


# ---------------------------------------------------------------------------------------------------------------------
# Order


def test_order_is_pure_in_seed_and_epoch():
    first = epoch_order(50, 3, 2)
    epoch_order(50, 4, 0), np.random.random(3), torch.rand(2)
    assert (epoch_order(50, 3, 2) == first).all()
    orders = {tuple(epoch_order(50, seed, epoch)) for seed in range(3) for epoch in range(3)}
    assert len(orders) == 9 and all(sorted(o) == list(range(50)) for o in orders)


@pytest.mark.parametrize("n, batch", [(10, 3), (9, 3), (3, 10), (1, 1)])
def test_every_example_comes_once_an_epoch(n, batch):
    per_epoch = -(-n // batch)
    for epoch in range(3):
        steps = [step_examples(n, batch, 7, epoch * per_epoch + i) for i in range(per_epoch)]
        assert {e for e, _ in steps} == {epoch}
        assert np.concatenate([x for _, x in steps]).tolist() == epoch_order(n, 7, epoch).tolist()
        assert all(len(x) == batch for _, x in steps[:-1])


@pytest.mark.parametrize("ranks", [1, 2, 7])
def test_ranks_share_a_batch_evenly(ranks):
    lengths = np.random.default_rng(0).integers(10, 500, 64).tolist()
    shares = balance(lengths, ranks)
    assert sorted(i for share in shares for i in share) == list(range(64))
    loads = [sum(lengths[i] for i in share) for share in shares]
    assert max(loads) - min(loads) <= 100  # of about 2,300 tokens each at 7 ranks


def test_fewer_examples_than_ranks_leaves_some_ranks_without():
    assert balance([5, 9], 4) == [[1], [0], [], []]
    assert balance([], 2) == [[], []]


# ---------------------------------------------------------------------------------------------------------------------
# What a row holds


def test_a_row_is_contexts_and_completions_end_to_end(tmp_path):
    data = load(tmp_path, ("Q1", ["a", "bcd"], [0, 1]), ("Long?", ["x", "", "yz"], [2, 5, 5]))
    row = make_row(data, np.array([1, 0]), HUNDRED)
    assert shown(row) == "Long?x<eoc><eoc>yz<eoc>Q1a<eoc>bcd<eoc>"
    assert row.tokens.dtype == torch.int64
    assert row.examples.tolist() == [1, 0]
    assert row.owner.tolist() == [0, 0, 0, 1, 1]
    assert row.scores.tolist() == [2, 5, 5, 0, 1]
    assert row.best.tolist() == [False, True, False, False, True]  # the first of the highest score
    assert row.starts.tolist() == [5, 7, 8, 13, 15]
    assert row.ends.tolist() == [6, 7, 10, 14, 18]
    assert all(row.tokens[row.ends] == BYTES.eoc)
    assert row.layout.lengths == [5, 2, 1, 3, 2, 2, 4]
    assert row.layout.parents == [0, 0, 0, 0, 4, 4, 4]
    assert row.layout.positions.tolist() == [0, 1, 2, 3, 4, 5, 6, 5, 5, 6, 7, 0, 1, 2, 3, 2, 3, 4, 5]
    assert len(row.tokens) == sum(packed_lengths(data, [1, 0], HUNDRED))


def test_only_the_chosen_completions_are_laid_out(tmp_path):
    data = load(tmp_path, ("Q", ["a", "b", "c"], [1, 3, 2]), ("R", ["d"], [0]))
    row = make_row(data, np.array([0, 1]), HUNDRED, [[0, 2], None])
    assert shown(row) == "Qa<eoc>c<eoc>Rd<eoc>"
    assert (row.scores.tolist(), row.best.tolist()) == ([1, 2, 0], [False, True, True])
    assert packed_lengths(data, [0, 1], HUNDRED, [[0, 2], None]) == [5, 3]


def test_completion_tokens_are_predicted_from_what_stands_before_them(tmp_path):
    """With an empty context that is <eot>, and for a completion after the first the end of the context."""
    data = load(tmp_path, ("", ["ab", "c"], [1, 0]), ("Hi", ["", "d"], [1, 0]))
    row = make_row(data, np.array([0, 1]), HUNDRED)
    assert shown(row) == "<eot>ab<eoc>c<eoc>Hi<eoc>d<eoc>"
    named = lambda row: [(BYTES.decode([row.tokens[s]]), BYTES.decode([row.tokens[t]]), c)
                         for s, t, c in zip(row.source, row.target, row.predicted.tolist())]
    assert named(row.predicting("all")) == [("<eot>", "a", 0), ("a", "b", 0), ("<eot>", "c", 1), ("i", "d", 3)]
    assert named(row.predicting("best")) == [("<eot>", "a", 0), ("a", "b", 0), ("b", "<eoc>", 0), ("i", "<eoc>", 2)]
    assert packed_lengths(data, [0, 1], HUNDRED) == [6, 5]


@pytest.mark.parametrize("how", ["reward", "mean", "sum"])
def test_without_context_each_completion_has_the_score_it_has_behind_eot_and_is_read_once(tmp_path, how):
    records = [("Question", ["a", "bc"], [1, 0]), ("Another", ["bc", "d", "a"], [1, 0, 2]), ("", ["a"], [0])]
    model, read = make_model(value_head=True, vocab=BYTES.vocab_size, ctx=64), []
    forward = model.forward
    model.forward = lambda tokens, *more, **named: read.append(len(tokens)) or forward(tokens, *more, **named)
    score = lambda records, **more: score_all(model, load(tmp_path, *records), np.arange(3), how, RowFormat(64, BYTES), 1000, **more)
    expected = score([("", *rest) for _, *rest in records])
    for ours, plain in zip(score(records, context_ids=[BYTES.eot]), expected, strict=True):
        np.testing.assert_allclose(ours, plain, rtol=1e-12)
    assert read == [1 + 5 + 1 + 7 + 1 + 2, 3 + 4 + 3]  # <eot>s and completions with their <eoc>: of all comparisons, then of a, bc and d


@pytest.mark.parametrize("ctx, context", [(100, "0123456789"), (15, "0123456789"), (14, "123456789"), (6, "9")])
def test_contexts_are_cut_on_the_left_and_completions_never(tmp_path, ctx, context):
    data = load(tmp_path, ("0123456789", ["abcd", "e"], [1, 0]))
    assert data.fits(ctx).all()
    row = make_row(data, np.array([0]), RowFormat(ctx, BYTES))
    assert shown(row) == f"{context}abcd<eoc>e<eoc>"
    assert int(row.layout.positions.max()) < ctx
    assert packed_lengths(data, [0], RowFormat(ctx, BYTES)) == [len(row.tokens)]
    assert shown(make_row(data, np.array([0]), RowFormat(ctx, BYTES), [[1]])) == f"{context}e<eoc>"  # the same context for every choice


def test_what_cannot_fit_is_known(tmp_path):
    data = load(tmp_path, ("Q", ["abcd", "e"], [1, 0]), ("", ["abcde", "e"], [1, 0]), ("Q" * 50, ["a"], [0]))
    assert data.fits(6).tolist() == [True, False, True]
    assert data.fits(7).tolist() == [True, True, True]
    assert data.fits(2).tolist() == [False, False, False]


@pytest.mark.parametrize("capacity", [150, 700, 100_000])
def test_rows_hold_every_comparison_once_whatever_the_capacity(tmp_path, capacity):
    data = load_comparisons([write_jsonl(tmp_path / "file.jsonl", make_comparisons())], BYTES, quiet=True)
    examples, row_format = np.arange(len(data)), RowFormat(120, BYTES)
    lengths = packed_lengths(data, examples, row_format)
    texts = []
    for numbers in pack(lengths, capacity):
        row = make_row(data, examples[numbers], row_format)
        assert len(row.tokens) == sum(lengths[i] for i in numbers)
        for c, example in enumerate(row.examples):
            of = (row.owner == c).nonzero().squeeze(1)
            completions = [BYTES.decode(row.tokens[row.starts[k]:row.ends[k]]) for k in of]
            texts.append((int(example), completions, row.scores[of].tolist()))
    expected = [(i, r["completions"], r["scores"]) for i, r in enumerate(make_comparisons())]
    assert sorted(texts) == expected


@pytest.mark.parametrize("row_format", [RowFormat(120, BYTES), RowFormat(90, BYTES), RowFormat(120, BYTES, eoc=False),
                                        RowFormat(120, BYTES, control=(np.array([1, 2]), np.array([3])))])
def test_lengths_of_all_comparisons_at_once_are_those_of_each(tmp_path, row_format):
    data = load_comparisons([write_jsonl(tmp_path / "file.jsonl", make_comparisons())], BYTES, quiet=True)
    fitting = np.flatnonzero(data.fits(row_format.comparison_room))
    assert len(fitting) > 10
    expected = packed_lengths(data, fitting, row_format)
    assert whole_lengths(data, row_format)[fitting].tolist() == expected == [
        len(make_row(data, [i], row_format).tokens) for i in fitting]


def test_pairs_are_those_of_different_scores_and_weigh_one_a_comparison(tmp_path):
    data = load(tmp_path, *(("Q", ["x"] * len(scores), scores) for scores in ([2, 0, 1], [5, 5], [1, 1, 0, -4.5], [7])))
    row = make_row(data, range(4), HUNDRED)
    found = {(b, w): x for b, w, x in zip(row.better.tolist(), row.worse.tolist(), row.pair_weight.tolist())}
    assert found == pytest.approx({**{pair: 1 / 3 for pair in ((0, 1), (0, 2), (2, 1))},
                                   **{pair: 1 / 5 for pair in ((5, 7), (5, 8), (6, 7), (6, 8), (7, 8))}})
    assert torch.bincount(row.owner[row.better], row.pair_weight, minlength=4).tolist() == pytest.approx([1, 0, 1, 0])


@pytest.mark.parametrize("n, most", [(10, 3), (10, 10), (10, 100), (1, 1), (0, 5), (4097, 4096)])
def test_a_sample_is_spread_evenly(n, most):
    sample = spread(n, most)
    assert len(sample) <= most and (n <= most) == (list(sample) == list(range(n))) and (not n or sample[0] == 0)


def test_contexts_that_are_cut_are_counted(tmp_path):
    data = load(tmp_path, ("0123456789", ["abcd", "e"], [1, 0]), ("", ["abcd"], [0]), ("x" * 30, ["y"], [1]))
    assert data.is_cut(15).tolist() == [False, False, True] and data.is_cut(14).tolist() == [True, False, True]
