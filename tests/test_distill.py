"""Context distillation: the losses against autograd in fp64, the script, the sequences, and the teacher's
cache."""
import os
import signal
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import (DATA, losses, make_model, make_texts, metrics, read_jsonl, read_meta, run, run_refused,
                      run_well, write_jsonl)

import checkpoint
import distill
import trainer
from data.text import Text
from data.tokenizer import get_tokenizer
from losses import linear_loss
from ranks import Ranks

# ------------------------------------------------------------------------------------------------------------
# The losses


def make_logits(seed, n=40, scale=3.0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, 300, generator=generator, dtype=torch.float64) * scale


def classes(teacher):
    """The teacher's 50 likeliest tokens (n, 50) and the log-probs of its 51 classes (n, 51), in fp64."""
    log_p = teacher.log_softmax(-1)
    top, ids = log_p.topk(distill.TOP)
    return ids, torch.cat([top, distill.rest_of(log_p, ids)], 1)


def top_kl_by_autograd(student, ids, log_p):
    """KL over the 51 classes, written plainly: (n,)."""
    q = student.softmax(-1)
    top = q.gather(1, ids)
    merged = torch.cat([top, 1 - top.sum(1, keepdim=True)], 1)
    return (log_p.exp() * (log_p - merged.log())).sum(1)


def test_top_kl_and_its_gradient_equal_autograds():
    student, (ids, log_p) = make_logits(0).requires_grad_(), classes(make_logits(1))
    loss, gradient = distill.top_kl_of(student.detach(), ids, log_p)
    expected = top_kl_by_autograd(student, ids, log_p)
    assert (loss - expected).abs().max() < 1e-10
    assert (gradient - torch.autograd.grad(expected.sum(), student)[0]).abs().max() < 1e-10


def test_full_kl_and_its_gradient_equal_autograds():
    student, teacher = make_logits(0).requires_grad_(), make_logits(1)
    loss, gradient = distill.full_kl_of(student.detach(), teacher)
    log_q, log_p = student.log_softmax(-1), teacher.log_softmax(-1)
    expected = F.kl_div(log_q, log_p, log_target=True, reduction="none").sum(1)
    assert (loss - expected).abs().max() < 1e-12
    assert (gradient - torch.autograd.grad(expected.sum(), student)[0]).abs().max() < 1e-12


@pytest.mark.parametrize("scale", [0.5, 2.0, 6.0])
def test_the_gradients_differ_by_at_most_twice_the_rest(scale):
    """In sum over the vocabulary, for each token. And merging classes never makes the loss larger."""
    student, teacher = make_logits(0, scale=scale), make_logits(1, scale=scale)
    ids, log_p = classes(teacher)
    top, top_gradient = distill.top_kl_of(student, ids, log_p)
    full, full_gradient = distill.full_kl_of(student, teacher)
    difference = (top_gradient - full_gradient).abs().sum(1)
    assert (difference <= 2 * log_p[:, -1].exp() + 1e-12).all() and (top <= full + 1e-12).all()
    assert difference.max() > 1e-6


@pytest.mark.parametrize("n_rows", [80, 128])
def test_the_teachers_table_may_have_other_spare_rows(n_rows):
    """Models of one family share a tokenizer, and their tables are padded differently."""
    student, teacher = make_model(), make_model(vocab_size=n_rows)
    hidden = torch.randn(5, student.config.d_model, dtype=torch.float64)
    n = min(n_rows, student.config.vocab_size)
    kl, _ = distill.full_kl(student, hidden, teacher, hidden)
    log_q = student.logits(hidden).log_softmax(-1)
    log_p = teacher.logits(hidden)[:, :n].log_softmax(-1)
    assert kl.item() == pytest.approx((log_p.exp() * (log_p - log_q[:, :n])).sum().item())


def test_the_stored_teachers_ids_are_rows_of_the_student():
    ids, _ = distill.top_classes(distill.fitted(torch.randn(5, 128), 80))
    assert ids.max() < 80
    ids, log_p = distill.top_classes(distill.fitted(torch.randn(5, 60), 80))
    assert ids.max() < 60 and log_p.exp().sum(1).tolist() == pytest.approx([1] * 5)


def test_storing_in_half_precision_changes_the_gradient_little():
    student, teacher = make_logits(0), make_logits(1)
    ids, log_p = distill.top_classes(teacher)
    stored = log_p.half().float().log_softmax(-1).double()
    exact_gradient = distill.top_kl_of(student, *classes(teacher))[1]
    assert (distill.top_kl_of(student, ids, stored)[1] - exact_gradient).abs().sum(1).max() < 4e-3


def test_linear_loss_gives_the_gradients_of_hidden_states_and_table():
    generator = torch.Generator().manual_seed(0)
    hidden, table = (torch.randn(rows, 8, generator=generator, dtype=torch.float64).requires_grad_()
                     for rows in (2500, 300))
    ids, log_p = classes(make_logits(1, n=2500))

    def row_loss(logits, rows, need_gradient):
        return distill.top_kl_of(logits, ids[rows], log_p[rows])

    total, each = linear_loss(hidden, table, row_loss)
    expected = top_kl_by_autograd(hidden @ table.T, ids, log_p)
    assert torch.allclose(each, expected, atol=1e-10)
    found = torch.autograd.grad(total, (hidden, table))
    for got, want in zip(found, torch.autograd.grad(expected.sum(), (hidden, table))):
        assert torch.allclose(got, want, atol=1e-8)


# ------------------------------------------------------------------------------------------------------------
# The script


@pytest.fixture(scope="module")
def files(tmp_path_factory, text_file):
    """Namespace of the files `prompt`, `texts` and `talks`."""
    folder = tmp_path_factory.mktemp("distill")
    prompt = folder / "prompt.txt"
    prompt.write_text("Friends talk.\n\n-----\n\nHuman: Who waits?\n\nAssistant: the cat waits up there.")
    talks = [{"text": f"Human: Say it.\n\nAssistant: {record['text'][:80]}"}
             for record in make_texts(40, seed=5)]
    return Namespace(prompt=prompt, texts=text_file, talks=write_jsonl(folder / "talks.jsonl", talks))


@pytest.fixture(scope="module")
def flags(lm, files):
    return ("--init", lm, "--prompt", files.prompt, "--data", files.texts, "--dialogue", files.talks,
            "--sequences", 96, "--batch", 8, "--epochs", 2, "--dtype", "fp32", "--lr", 0.001)


@pytest.fixture(scope="module")
def distilled(flags, tmp_path_factory):
    """(folder of the run, what it printed)."""
    out = tmp_path_factory.mktemp("distilled") / "out"
    return out, run_well("distill.py", *flags, "--out", out)


def test_the_student_nears_its_prompted_self(distilled):
    out, printed = distilled
    before, after = read_meta(out)["kl_before"], metrics(out)[-1]["eval"]["loss"]
    assert after < 0.8 * before and f"at the start: {before:.4f}" in printed
    assert int(printed.split(" bytes a token")[0].rsplit(" ", 1)[1]) <= 260


def test_online_learns_the_same(distilled, flags, tmp_path):
    out = tmp_path / "online"
    run_well("distill.py", *flags, "--online", "--out", out)
    stored, online = losses(distilled[0]), losses(out)
    assert metrics(out)[-1]["eval"]["loss"] < 0.8 * read_meta(out)["kl_before"]
    assert stored[0] < online[0] < 2 * stored[0]  # merging classes can only hide differences


def stop_after_five():
    """In the script's process: ask for a stop when step 5 is logged."""
    log_step = trainer.Log.step

    def changed(self, step, *rest):
        log_step(self, step, *rest)
        if step == 5:
            os.kill(os.getpid(), signal.SIGTERM)
    trainer.Log.step = changed


def test_resumed_equals_uninterrupted(distilled, flags, tmp_path):
    out = tmp_path / "out"
    assert run("distill.py", *flags, "--out", out, before=stop_after_five).returncode == 128 + signal.SIGTERM
    assert len(losses(out)) < len(losses(distilled[0]))
    run_well("distill.py", *flags, "--out", out, "--resume")
    assert metrics(out)[-1] == metrics(distilled[0])[-1]
    assert (out / "model.safetensors").read_bytes() == (distilled[0] / "model.safetensors").read_bytes()


def test_a_single_dialogue_is_enough(flags, tmp_path):
    record = {"text": "Human: Who sleeps?\n\nAssistant: The cat sleeps at home."}
    dialogue = write_jsonl(tmp_path / "one.jsonl", [record])
    printed = run_well("distill.py", *flags, "--dialogue", dialogue, "--out", tmp_path / "out")
    assert "note: the data has 1 dialogues, so each comes" in printed


def test_bad_input_is_refused(flags, files, lm, pm, tmp_path):
    def assert_refused(words, *changed):
        assert words in run_refused("distill.py", *flags, *changed, "--out", tmp_path / "out")
    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / "special.txt").write_text("a <eot>")
    assert_refused("leave no room in a context of 192", "--prompt", "hhh")
    assert_refused("a preference model, but a language model is needed", "--init", pm)
    assert_refused("no such prompt file", "--prompt", tmp_path / "none.txt")
    assert_refused("the prompt is empty", "--prompt", tmp_path / "empty.txt")
    assert_refused("special.txt: the text holds <eot>", "--prompt", tmp_path / "special.txt")
    line = run_refused("distill.py", "--init", lm, "--data", files.texts, "--out", tmp_path / "out")
    assert "--dialogue is missing" in line


# ------------------------------------------------------------------------------------------------------------
# Sequences and the stored teacher


def prompt_ids(files, tokenizer):
    """The tokens before each sequence: <eot>, the prompt, and the line that ends its last conversation."""
    return [tokenizer.eot, *tokenizer.encode(files.prompt.read_text() + "\n\n-----").tolist()]


def make_sequences(n, texts, talks, tokenizer, ctx):
    ranks = Ranks(0, 1, torch.device("cpu"))
    return distill.make_sequences(Namespace(sequences=n, seed=0), [texts], [talks], tokenizer, ctx, ranks)


@pytest.fixture(scope="module")
def sequences(files, lm):
    """Those of the run `distilled`. The language model has a ctx of 192."""
    tokenizer = checkpoint.load(lm)[1]
    return make_sequences(96, files.texts, files.talks, tokenizer, 192 - len(prompt_ids(files, tokenizer)))


@pytest.fixture(scope="module")
def teachers_cache(distilled):
    """The folder of the stored teacher."""
    return Path(distilled[1].split("teacher's cache: ")[1].split(",")[0])


def test_the_teachers_cache_is_made_once(teachers_cache, flags, tmp_path):
    def times():
        return {path: path.stat().st_mtime_ns for path in teachers_cache.rglob("*") if path.is_file()}
    made = times()
    run_well("distill.py", *flags, "--out", tmp_path / "again", "--steps", 2)
    assert made and times() == made


def test_the_teachers_cache_holds_what_it_says_behind_the_prompt(teachers_cache, files, sequences, lm):
    model, tokenizer, _ = checkpoint.load(lm)
    ids = np.fromfile(teachers_cache / "0" / "ids", np.uint16).reshape(-1, 50)
    log_p = np.fromfile(teachers_cache / "0" / "log_p", np.float16).reshape(-1, 51).astype(float)
    assert np.exp(log_p).sum(1) == pytest.approx(1, abs=3e-3)
    prompt, first = prompt_ids(files, tokenizer), sequences[0]
    with torch.no_grad():
        hidden = model(torch.tensor([[*prompt, *first]]))[0, len(prompt):]
        expected = model.logits(hidden).log_softmax(-1)
    for i in range(len(first)):
        assert log_p[i, :50] == pytest.approx(expected[i, ids[i].astype(int)].tolist(), abs=1e-2)
        assert set(expected[i].topk(10)[1].tolist()) <= set(ids[i].tolist())


def test_half_is_text_after_human_and_half_dialogue(sequences, lm):
    tokenizer = checkpoint.load(lm)[1]
    texts = [tokenizer.decode(ids) for ids in sequences]
    assert len(texts) == 96 and sum(text.startswith("\n\nHuman: Say it.") for text in texts) == 48
    assert all(text.startswith("\n\nHuman: ") and "<eot>" not in text for text in texts)


def test_pieces_begin_where_a_document_or_a_sentence_does(sequences, files, lm):
    tokenizer = checkpoint.load(lm)[1]
    documents = [record["text"] for record in read_jsonl(files.texts)]
    pieces = [tokenizer.decode(ids).removeprefix("\n\nHuman: ") for ids in sequences]
    pieces = [piece for piece in pieces if not piece.startswith("Say it.")]
    for piece in pieces:
        begins_a_document = any(document.startswith(piece) for document in documents)
        assert begins_a_document or any(". " + piece in document for document in documents), piece
    assert len(set(pieces)) > 30


def test_pieces_of_long_and_short_documents_begin_at_every_kind_of_sentence(lm):
    tokenizer = checkpoint.load(lm)[1]
    stream = []
    for document in ("One here. Two there. " * 40, "Three more. " * 3):
        stream += [*tokenizer.encode(document), tokenizer.eot]
    pieces = distill.text_pieces(Text(np.array(stream), 2, 0), tokenizer, 100, seed=0)
    beginnings = {tokenizer.decode(ids)[:15] for ids in pieces}
    assert beginnings == {"\n\nHuman: One he", "\n\nHuman: Two th", "\n\nHuman: Three "}


def test_a_sequence_that_is_trained_on_is_not_evaluated():
    sequences = [np.array([i % 390, 7]) for i in range(400)]  # ten of them come twice
    held_out, train = distill.split(sequences)
    assert held_out.tolist() == [10, 11] and train.tolist() == list(range(12, 400))
    held_out, train = distill.split([np.array([7])] * 64)  # there is nothing else
    assert held_out.tolist() == [0, 1] and len(train) == 62


def test_sequences_have_the_tokens_of_the_whole_string(tmp_path):
    """GPT-2's tokenizer has tokens for a space with a word, and for two line ends. Pieces, joined, would have
    others."""
    vocabulary = DATA / "vocab" / "gpt2.tiktoken"
    if not vocabulary.exists():
        pytest.skip("no GPT-2 vocabulary here")
    tokenizer = get_tokenizer(str(vocabulary))
    texts = write_jsonl(tmp_path / "texts.jsonl", [
        {"text": f"It rained on day {i}. The cat waited by the door, all of it. " * 4} for i in range(50)])
    talks = write_jsonl(tmp_path / "talks.jsonl", [
        {"text": f"Human: Why {i}?\n\nAssistant: Because."} for i in range(50)])
    for ids in make_sequences(64, texts, talks, tokenizer, 40):
        text = tokenizer.decode(ids)
        assert text.startswith("\n\nHuman: ") and ids.tolist() == tokenizer.encode(text).tolist()
