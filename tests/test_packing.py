"""Packing: each example once, full rows, an order that is pure in (seed, epoch), and what exactly a row
holds."""
import numpy as np
import pytest
import torch
from conftest import BYTES, DATA, load, make_comparisons, make_model

from data.comparisons import load_comparisons
from data.packing import (RowFormat, balance, epoch_order, make_row, pack, packed_lengths, spread,
                          step_examples, whole_lengths)
from data.tokenizer import get_tokenizer
from evals.pm import score_all

HUNDRED = RowFormat(100, BYTES)


def load_tuples(tmp_path, *records):
    """Comparisons, given as (context, completions, scores)."""
    names = ("context", "completions", "scores")
    return load(tmp_path, [dict(zip(names, record)) for record in records])


def text_of(row):
    return BYTES.decode(row.tokens)


# ------------------------------------------------------------------------------------------------------------
# Items of some lengths into rows


@pytest.mark.parametrize("seed", range(5))
def test_pack_takes_each_once_and_never_too_much(seed):
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, 400, rng.integers(1, 300)).tolist() + [1500, 1001] * (seed % 2)
    rows = pack(lengths, 1000)
    assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
    for row in rows:
        assert sum(lengths[i] for i in row) <= 1000 or len(row) == 1
    assert lengths[rows[0][0]] == max(lengths)  # what takes most memory comes first


def test_pack_fits_best():
    assert pack([6, 5, 4, 5], 10) == [[0, 2], [1, 3]]
    assert pack([6, 7, 3, 1], 10) == [[1, 2], [0, 3]]  # 3 goes where just 3 are left, not where 4 are
    assert pack([7, 6, 3, 4, 3], 10) == [[0, 2], [1, 3], [4]]
    assert pack([11, 5, 5], 10) == [[0], [1, 2]]
    assert pack([], 10) == []


@pytest.fixture(scope="module")
def human_comparisons():
    """Those of HH-RLHF, in GPT-2's tokens."""
    file, vocabulary = DATA / "hh-rlhf" / "harmless-base" / "test.jsonl.gz", DATA / "vocab" / "gpt2.tiktoken"
    if not (file.exists() and vocabulary.exists()):
        pytest.skip("no HH-RLHF or GPT-2 vocabulary here")
    return load_comparisons([file], get_tokenizer(str(vocabulary)), quiet=True)


@pytest.mark.parametrize("batch", [512, None], ids=["batches of 512", "whole"])
def test_rows_of_human_comparisons_are_full(human_comparisons, batch):
    """To 97 % at least, at a capacity and a ctx of 1024: each full batch of 512 (PMP's), and all at once."""
    lengths = whole_lengths(human_comparisons, RowFormat(1024, BYTES))[human_comparisons.fits(1024)]
    assert len(lengths) > 1800 and lengths.max() <= 1024 + 600
    for step in range(len(lengths) // batch if batch else 1):
        _, examples = step_examples(len(lengths), batch or len(lengths), 0, step)
        part = lengths[examples]
        part = part[part <= 1024]  # a comparison of two long completions has a row to itself
        rows = pack(part.tolist(), 1024)
        assert sum(part) / (1024 * len(rows)) >= 0.97


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


# ------------------------------------------------------------------------------------------------------------
# Order


def test_order_is_pure_in_seed_and_epoch():
    first = epoch_order(50, 3, 2)
    epoch_order(50, 4, 0), np.random.random(3), torch.rand(2)
    assert (epoch_order(50, 3, 2) == first).all()
    orders = {tuple(epoch_order(50, seed, epoch)) for seed in range(3) for epoch in range(3)}
    assert len(orders) == 9 and all(sorted(order) == list(range(50)) for order in orders)


@pytest.mark.parametrize("n, batch", [(10, 3), (9, 3), (3, 10), (1, 1)])
def test_every_example_comes_once_an_epoch(n, batch):
    steps_per_epoch = -(-n // batch)
    for epoch in range(3):
        steps = [step_examples(n, batch, 7, epoch * steps_per_epoch + i) for i in range(steps_per_epoch)]
        assert {epoch_of_step for epoch_of_step, _ in steps} == {epoch}
        batches = [examples for _, examples in steps]
        assert np.concatenate(batches).tolist() == epoch_order(n, 7, epoch).tolist()
        assert all(len(examples) == batch for examples in batches[:-1])


@pytest.mark.parametrize("n, most", [(10, 3), (10, 10), (10, 100), (1, 1), (0, 5), (4097, 4096)])
def test_a_sample_is_spread_evenly(n, most):
    sample = list(spread(n, most))
    assert len(sample) <= most and (n <= most) == (sample == list(range(n)))
    assert sample[:1] == [0] * min(n, 1)


# ------------------------------------------------------------------------------------------------------------
# What a row holds


def test_a_row_is_contexts_and_completions_end_to_end(tmp_path):
    data = load_tuples(tmp_path, ("Q1", ["a", "bcd"], [0, 1]), ("Long?", ["x", "", "yz"], [2, 5, 5]))
    row = make_row(data, np.array([1, 0]), HUNDRED)
    assert text_of(row) == "Long?x<eoc><eoc>yz<eoc>Q1a<eoc>bcd<eoc>"
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
    data = load_tuples(tmp_path, ("Q", ["a", "b", "c"], [1, 3, 2]), ("R", ["d"], [0]))
    row = make_row(data, np.array([0, 1]), HUNDRED, [[0, 2], None])
    assert text_of(row) == "Qa<eoc>c<eoc>Rd<eoc>"
    assert (row.scores.tolist(), row.best.tolist()) == ([1, 2, 0], [False, True, True])
    assert packed_lengths(data, [0, 1], HUNDRED, [[0, 2], None]) == [5, 3]


def test_completion_tokens_are_predicted_from_what_stands_before_them(tmp_path):
    """For a completion after the first one that is the end of the context, and of an empty context <eot>."""
    data = load_tuples(tmp_path, ("", ["ab", "c"], [1, 0]), ("Hi", ["", "d"], [1, 0]))
    row = make_row(data, np.array([0, 1]), HUNDRED)
    assert text_of(row) == "<eot>ab<eoc>c<eoc>Hi<eoc>d<eoc>"

    def predictions(which):
        """(token that predicts, predicted token, number of the completion)."""
        predicting = row.predicting(which)
        source, target = ([BYTES.decode([token]) for token in row.tokens[places]]
                          for places in (predicting.source, predicting.target))
        return list(zip(source, target, predicting.predicted.tolist()))

    assert predictions("all") == [("<eot>", "a", 0), ("a", "b", 0), ("<eot>", "c", 1), ("i", "d", 3)]
    assert predictions("best") == [("<eot>", "a", 0), ("a", "b", 0), ("b", "<eoc>", 0), ("i", "<eoc>", 2)]
    assert packed_lengths(data, [0, 1], HUNDRED) == [6, 5]


@pytest.mark.parametrize("ctx, context", [
    (100, "0123456789"), (15, "0123456789"), (14, "123456789"), (6, "9")])
def test_contexts_are_cut_on_the_left_and_completions_never(tmp_path, ctx, context):
    data, row_format = load_tuples(tmp_path, ("0123456789", ["abcd", "e"], [1, 0])), RowFormat(ctx, BYTES)
    assert data.fits(ctx).all()
    row = make_row(data, np.array([0]), row_format)
    assert text_of(row) == f"{context}abcd<eoc>e<eoc>"
    assert int(row.layout.positions.max()) < ctx
    assert packed_lengths(data, [0], row_format) == [len(row.tokens)]
    short = make_row(data, np.array([0]), row_format, [[1]])
    assert text_of(short) == f"{context}e<eoc>"  # the same context, whichever completions are laid out


def test_contexts_that_are_cut_are_known(tmp_path):
    data = load_tuples(
        tmp_path, ("0123456789", ["abcd", "e"], [1, 0]), ("", ["abcd"], [0]), ("x" * 30, ["y"], [1]))
    assert data.is_cut(15).tolist() == [False, False, True]
    assert data.is_cut(14).tolist() == [True, False, True]


def test_what_cannot_fit_is_known(tmp_path):
    data = load_tuples(
        tmp_path, ("Q", ["abcd", "e"], [1, 0]), ("", ["abcde", "e"], [1, 0]), ("Q" * 50, ["a"], [0]))
    assert data.fits(6).tolist() == [True, False, True]
    assert data.fits(7).tolist() == [True, True, True]
    assert data.fits(2).tolist() == [False, False, False]


@pytest.mark.parametrize("capacity", [150, 700, 100_000])
def test_rows_hold_every_comparison_once_whatever_the_capacity(tmp_path, capacity):
    data, row_format = load(tmp_path, make_comparisons()), RowFormat(120, BYTES)
    examples = np.arange(len(data))
    lengths = packed_lengths(data, examples, row_format)
    found = []
    for numbers in pack(lengths, capacity):
        row = make_row(data, examples[numbers], row_format)
        assert len(row.tokens) == sum(lengths[i] for i in numbers)
        for c, example in enumerate(row.examples):
            of_comparison = (row.owner == c).nonzero().squeeze(1)
            completions = [BYTES.decode(row.tokens[row.starts[k]:row.ends[k]]) for k in of_comparison]
            found.append((int(example), completions, row.scores[of_comparison].tolist()))
    expected = [(i, record["completions"], record["scores"]) for i, record in enumerate(make_comparisons())]
    assert sorted(found) == expected


@pytest.mark.parametrize("row_format", [
    RowFormat(120, BYTES), RowFormat(90, BYTES), RowFormat(120, BYTES, eoc=False),
    RowFormat(120, BYTES, control=(np.array([1, 2]), np.array([3])))],
    ids=["plain", "cut", "without eoc", "control"])
def test_lengths_of_all_comparisons_at_once_are_those_of_each(tmp_path, row_format):
    data = load(tmp_path, make_comparisons())
    fitting = np.flatnonzero(data.fits(row_format.comparison_room))
    assert len(fitting) > 10
    lengths = [len(make_row(data, [i], row_format).tokens) for i in fitting]
    assert whole_lengths(data, row_format)[fitting].tolist() == lengths
    assert packed_lengths(data, fitting, row_format) == lengths


def test_pairs_are_those_of_different_scores_and_weigh_one_a_comparison(tmp_path):
    all_scores = ([2, 0, 1], [5, 5], [1, 1, 0, -4.5], [7])
    data = load_tuples(tmp_path, *(("Q", ["x"] * len(scores), scores) for scores in all_scores))
    row = make_row(data, range(4), HUNDRED)
    weights = dict(zip(zip(row.better.tolist(), row.worse.tolist()), row.pair_weight.tolist()))
    of_first = dict.fromkeys([(0, 1), (0, 2), (2, 1)], 1 / 3)
    of_third = dict.fromkeys([(5, 7), (5, 8), (6, 7), (6, 8), (7, 8)], 1 / 5)
    assert weights == pytest.approx(of_first | of_third)
    total = torch.bincount(row.owner[row.better], row.pair_weight, minlength=4)
    assert total.tolist() == pytest.approx([1, 0, 1, 0])


@pytest.mark.parametrize("rule", ["reward", "mean", "sum"])
def test_without_context_a_completion_scores_as_behind_eot_and_is_read_once(tmp_path, rule):
    records = [("Question", ["a", "bc"], [1, 0]), ("Another", ["bc", "d", "a"], [1, 0, 2]), ("", ["a"], [0])]
    model = make_model(value_head=True, vocab_size=BYTES.vocab_size, ctx=64)
    forward, read = model.forward, []  # read: tokens of each forward pass

    def counting(tokens, *args, **named):
        read.append(len(tokens))
        return forward(tokens, *args, **named)
    model.forward = counting

    def scores(records, **more):
        data = load_tuples(tmp_path, *records)
        return score_all(model, data, np.arange(3), rule, RowFormat(64, BYTES), 1000, **more)

    expected = scores([("", completions, given) for _, completions, given in records])
    for ours, plain in zip(scores(records, context_ids=[BYTES.eot]), expected, strict=True):
        np.testing.assert_allclose(ours, plain, rtol=1e-12)
    # Each comparison has an <eot>, and an <eoc> behind each completion. Without contexts there are three: one
    # of a, one of bc and one of d.
    assert read == [(1 + 5) + (1 + 7) + (1 + 2), 3 + 4 + 3]
