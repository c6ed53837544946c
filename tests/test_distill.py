"""Context distillation: the losses against autograd in fp64, the teacher's cache, and the script."""
import json
from argparse import Namespace

import numpy as np
import pytest
import torch
from conftest import DATA, losses, make_texts, metrics, run, run_well, write_jsonl

import checkpoint
import distill
from data.text import Text
from data.tokenizer import get_tokenizer
from losses import linear_loss
from ranks import Ranks


def logits(seed, n=40, vocab=300, scale=3.0):
    return torch.randn(n, vocab, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * scale


def classes(teacher):
    log_p = teacher.log_softmax(-1)
    top, ids = log_p.topk(distill.TOP)
    return ids, torch.cat([top, distill.rest_of(log_p, ids)], 1)


def test_top_kl_and_its_gradient_equal_autograds():
    student, (ids, log_p) = logits(0).requires_grad_(), classes(logits(1))
    loss, gradient = distill.top_kl_of(student.detach(), ids, log_p)
    q = student.softmax(-1)
    top = q.gather(1, ids)
    merged = torch.cat([top, 1 - top.sum(1, keepdim=True)], 1)
    expected = (log_p.exp() * (log_p - merged.log())).sum(1)
    assert (loss - expected).abs().max() < 1e-10
    assert (gradient - torch.autograd.grad(expected.sum(), student)[0]).abs().max() < 1e-10


def test_full_kl_and_its_gradient_equal_autograds():
    student, teacher = logits(0).requires_grad_(), logits(1)
    loss, gradient = distill.full_kl_of(student.detach(), teacher)
    expected = torch.nn.functional.kl_div(student.log_softmax(-1), teacher.log_softmax(-1), log_target=True, reduction="none").sum(1)
    assert (loss - expected).abs().max() < 1e-12
    assert (gradient - torch.autograd.grad(expected.sum(), student)[0]).abs().max() < 1e-12


@pytest.mark.parametrize("scale", [0.5, 2.0, 6.0])
def test_the_gradients_differ_by_at_most_twice_the_rest(scale):
    """In sum over the vocabulary, for each token; equal where the 50 have all the probability, and the loss is never larger."""
    student, teacher = logits(0, scale=scale), logits(1, scale=scale)
    ids, log_p = classes(teacher)
    (few, few_gradient), (all_, all_gradient) = distill.top_kl_of(student, ids, log_p), distill.full_kl_of(student, teacher)
    difference = (few_gradient - all_gradient).abs().sum(1)
    assert (difference <= 2 * log_p[:, -1].exp() + 1e-12).all() and (few <= all_ + 1e-12).all()
    assert difference.max() > 1e-6


def test_storing_in_half_precision_changes_the_gradient_little():
    student, teacher = logits(0), logits(1)
    ids, log_p = distill.top_classes(teacher)
    stored = log_p.half().float().log_softmax(-1).double()
    exact_gradient = distill.top_kl_of(student, *classes(teacher))[1]
    assert (distill.top_kl_of(student, ids, stored)[1] - exact_gradient).abs().sum(1).max() < 4e-3


def test_linear_loss_gives_the_gradients_of_hidden_states_and_table():
    g = torch.Generator().manual_seed(0)
    hidden, table = (torch.randn(*shape, generator=g, dtype=torch.float64).requires_grad_() for shape in ((2500, 8), (300, 8)))
    ids, log_p = classes(logits(1, n=2500))
    total, each = linear_loss(hidden, table, lambda x, rows, _: distill.top_kl_of(x, ids[rows], log_p[rows]))
    q = (hidden @ table.T).log_softmax(-1)
    expected = (log_p.exp() * (log_p - torch.cat([q.gather(1, ids), distill.rest_of(q, ids)], 1))).sum(1)
    assert torch.allclose(each, expected, atol=1e-10)
    for got, want in zip(torch.autograd.grad(total, (hidden, table)), torch.autograd.grad(expected.sum(), (hidden, table))):
        assert torch.allclose(got, want, atol=1e-8)


# ---------------------------------------------------------------------------------------------------------------------
# The script


@pytest.fixture(scope="module")
def flags(lm, text_file, tmp_path_factory):
    folder = tmp_path_factory.mktemp("distill")
    talks = write_jsonl(folder / "talks.jsonl", [{"text": f"Human: Say it.\n\nAssistant: {r['text'][:80]}"} for r in make_texts(40, seed=5)])
    (folder / "prompt.txt").write_text("Friends talk.\n\n-----\n\nHuman: Who waits?\n\nAssistant: the cat waits up there.")
    return ("--init", lm, "--prompt", folder / "prompt.txt", "--data", text_file, "--dialogue", talks, "--sequences", 96, "--batch", 8,
            "--epochs", 2, "--dtype", "fp32", "--lr", 0.001)


@pytest.fixture(scope="module")
def distilled(flags, tmp_path_factory):
    out = tmp_path_factory.mktemp("distilled") / "out"
    return out, run_well("distill.py", *flags, "--out", out)


def test_the_student_nears_its_prompted_self(distilled):
    out, printed = distilled
    before, after = json.loads((out / "meta.json").read_text())["kl_before"], metrics(out)[-1]["eval"]["loss"]
    assert after < 0.8 * before and f"at the start: {before:.4f}" in printed
    assert int(printed.split(" bytes a token")[0].rsplit(" ", 1)[1]) <= 260


def test_the_cache_is_made_once_and_is_the_prompted_teachers(distilled, flags, lm, tmp_path):
    _, printed = distilled
    cache = printed.split("teacher's cache: ")[1].split(",")[0]
    from pathlib import Path
    made = {p: p.stat().st_mtime_ns for p in Path(cache).rglob("*") if p.is_file()}
    run_well("distill.py", *flags, "--out", tmp_path / "again", "--steps", 2)
    assert made == {p: p.stat().st_mtime_ns for p in Path(cache).rglob("*") if p.is_file()}
    model, tokenizer, _ = checkpoint.load(lm)
    ids = np.fromfile(f"{cache}/0/ids", np.uint16).reshape(-1, 50)
    log_p = np.fromfile(f"{cache}/0/log_p", np.float16).reshape(-1, 51).astype(float)
    assert np.exp(log_p).sum(1) == pytest.approx(1, abs=3e-3)
    prompt = np.concatenate([[tokenizer.eot], tokenizer.encode(Path(flags[3]).read_text() + "\n\n-----")])
    first = sequences(flags, tokenizer)[0]
    with torch.no_grad():
        p = model.logits(model(torch.from_numpy(np.concatenate([prompt, first]).astype(np.int64))[None])[0, len(prompt):]).log_softmax(-1)
    for i in range(len(first)):
        assert log_p[i, :50] == pytest.approx(p[i, ids[i].astype(int)].tolist(), abs=1e-2)
        assert set(p[i].topk(10)[1].tolist()) <= set(ids[i].tolist())


def sequences(flags, tokenizer):
    size = 192 - len(tokenizer.encode(open(flags[3]).read() + "\n\n-----")) - 1
    return distill.make_sequences(Namespace(sequences=96, seed=0), [flags[5]], [flags[7]], tokenizer, size, Ranks(0, 1, torch.device("cpu")))


def test_half_is_text_after_human_and_half_dialogue(flags, lm):
    tokenizer = checkpoint.load(lm)[1]
    texts = [tokenizer.decode(s) for s in sequences(flags, tokenizer)]
    talks = [t for t in texts if t.startswith("\n\nHuman: Say it.")]
    assert len(talks) == 48 == len(texts) - len(talks)
    assert all(t.startswith("\n\nHuman: ") and "<eot>" not in t for t in texts)


def test_pieces_begin_where_a_document_or_a_sentence_does(flags, lm):
    tokenizer = checkpoint.load(lm)[1]
    documents = [json.loads(line)["text"] for line in open(flags[5])]
    pieces = [tokenizer.decode(s).removeprefix("\n\nHuman: ") for s in sequences(flags, tokenizer)]
    pieces = [piece for piece in pieces if not piece.startswith("Say it.")]
    starts = {"document" if any(d.startswith(piece) for d in documents) else
              "sentence" if any(". " + piece in d for d in documents) else piece for piece in pieces}
    assert starts <= {"document", "sentence"} and len(set(pieces)) > 30
    windows = Text(np.concatenate([np.append(tokenizer.encode(d), tokenizer.eot) for d in ("One here. Two there. " * 40, "Three more. " * 3)]), 2, 0)
    cut = [tokenizer.decode(s) for s in distill.text_pieces(windows, tokenizer, 100, seed=0)]
    assert {c[:15] for c in cut} == {"\n\nHuman: One he", "\n\nHuman: Two th", "\n\nHuman: Three "}


def test_sequences_have_the_tokens_of_the_whole_string(tmp_path):
    """GPT-2's tokenizer has tokens for a space and a word, and for two line ends: pieces, joined, would have others."""
    vocabulary = DATA / "vocab" / "gpt2.tiktoken"
    if not vocabulary.exists():
        pytest.skip("no GPT-2 vocabulary here")
    tokenizer = get_tokenizer(str(vocabulary))
    texts = write_jsonl(tmp_path / "texts.jsonl", [{"text": f"It rained on day {i}. The cat waited by the door, all of it. " * 4} for i in range(50)])
    talks = write_jsonl(tmp_path / "talks.jsonl", [{"text": f"Human: Why {i}?\n\nAssistant: Because."} for i in range(50)])
    args = Namespace(sequences=64, seed=0)
    for ids in distill.make_sequences(args, [texts], [talks], tokenizer, 40, Ranks(0, 1, torch.device("cpu"))):
        text = tokenizer.decode(ids)
        assert text.startswith("\n\nHuman: ") and ids.tolist() == tokenizer.encode(text).tolist()


def test_online_learns_the_same(distilled, flags, tmp_path):
    run_well("distill.py", *flags, "--online", "--out", tmp_path / "online")
    before = json.loads((tmp_path / "online" / "meta.json").read_text())["kl_before"]
    stored, online = losses(distilled[0]), losses(tmp_path / "online")
    assert metrics(tmp_path / "online")[-1]["eval"]["loss"] < 0.8 * before
    assert stored[0] < online[0] < 2 * stored[0]  # merging classes can only hide differences


def test_resumed_equals_uninterrupted(distilled, flags, tmp_path):
    out = tmp_path / "out"
    run_well("distill.py", *flags, "--out", out, before=stop_after_five)
    assert len(losses(out)) < len(losses(distilled[0]))
    run_well("distill.py", *flags, "--out", out, "--resume")
    assert metrics(out)[-1] == metrics(distilled[0])[-1]
    assert (out / "model.safetensors").read_bytes() == (distilled[0] / "model.safetensors").read_bytes()


def stop_after_five():
    import os
    import signal
    import trainer
    whole = trainer.Log.step

    def step(self, step, *rest):
        whole(self, step, *rest)
        if step == 5:
            os.kill(os.getpid(), signal.SIGTERM)
    trainer.Log.step = step


def test_bad_input(flags, lm, pm, tmp_path):
    def refused(words, *changed):
        done = run("distill.py", *flags, *changed, "--out", tmp_path / "out")
        assert done.returncode == 2 and words in done.stderr and done.stderr.count("\n") == 1, done.stderr
    refused("leave no room in a context of 192", "--prompt", "hhh")
    refused("a preference model, but a language model is needed", "--init", pm)
    refused("no such prompt file", "--prompt", tmp_path / "none.txt")
    (tmp_path / "empty.txt").write_text(" \n")
    refused("the prompt is empty", "--prompt", tmp_path / "empty.txt")
    refused("the prompt holds <eot>", "--prompt", write_jsonl(tmp_path / "special.txt", ["a <eot>"]))
    done = run("distill.py", "--init", lm, "--data", flags[5], "--out", tmp_path / "out")
    assert done.returncode == 2 and "--dialogue is missing" in done.stderr
