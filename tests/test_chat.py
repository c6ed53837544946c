"""chat.py: answers are those of the whole text read afresh, nothing is read twice, and stops, commands and Ctrl-C do what they say."""
import argparse
import os
import pty
import select
import shutil
import signal
import sys
import termios
import time
from fcntl import ioctl
from pathlib import Path

import pytest
import safetensors.torch
import torch
from conftest import Running, run, run_well

import chat
import checkpoint
import sampling
from data.tokenizer import get_tokenizer

BYTES = get_tokenizer("bytes")
PROMPT = "Short answers.\n\n-----\n\nHuman: Hi\n\nAssistant: Hello.\n\n-----"


@pytest.fixture(scope="module")
def wild(lm, tmp_path_factory):
    """A checkpoint whose weights are so large that each token depends on all before it."""
    folder = tmp_path_factory.mktemp("wild") / "lm"
    shutil.copytree(lm, folder)
    weights = safetensors.torch.load_file(folder / "model.safetensors")
    generator = torch.Generator().manual_seed(0)
    weights = {k: torch.randn(v.shape, generator=generator) * 0.4 if v.dim() == 2 else v for k, v in weights.items()}
    weights["model.embed_tokens.weight"][128:] = 0  # ASCII only
    safetensors.torch.save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def feed():
    sys.stdin = open(os.environ["CHAT_INPUT"])


def talk(tmp_path, folder, *lines, flags=()):
    """What chat.py prints when these lines are piped into it."""
    path = tmp_path / "input"
    path.write_text("".join(line + "\n" for line in lines))
    return run_well("chat.py", "--model", folder, "--temperature", 0, "--max_new", 12, "--dtype", "fp32", *flags, before=feed, CHAT_INPUT=str(path))


def fresh(model, text, max_new=12):
    """The greedy continuation of a text, computed from its beginning, as far as a chat shows it."""
    [[ids]] = sampling.generate(model, [BYTES.encode(text).tolist()], max_new=max_new, temperature=0, stop=(BYTES.eot, BYTES.eoc), n_vocab=BYTES.n_vocab)
    return chat.settled(BYTES.decode([i for i in ids if i < BYTES.eot]))[0]


def conversation(model, prompt, questions):
    """(whole text, answers) of a chat in which each answer is computed afresh."""
    text, answers = prompt, []
    for question in questions:
        text += f"\n\nHuman: {question}\n\nAssistant:"
        answers.append(fresh(model, text))
        text += answers[-1].rstrip()
    return text, answers


def printed(answers):
    return "".join(f"Assistant:{answer}\n" for answer in answers)


# ---------------------------------------------------------------------------------------------------------------------
# The conversation


def test_answers_equal_those_to_the_whole_text_read_afresh(wild, tmp_path):
    model = checkpoint.load(wild)[0].eval()
    questions = ["Who are you?", "And why?", "Well"]
    text, answers = conversation(model, "", questions)
    assert len(set(answers)) == 3 and all(len(a) > 5 for a in answers), answers
    assert talk(tmp_path, wild, *questions) == printed(answers)
    (tmp_path / "prompt.txt").write_text(PROMPT.removesuffix("\n\n-----"))
    prompted = conversation(model, PROMPT, questions[:2])[1]
    assert prompted != answers[:2]
    assert talk(tmp_path, wild, *questions[:2], flags=("--prompt", tmp_path / "prompt.txt")) == printed(prompted)


class Table:
    """What `chat.answer` needs, around a model in this process; remembers how many tokens were read at a time."""

    def __init__(self, folder, ctx=192, prompt="", **flags):
        self.model = checkpoint.load(folder)[0].eval()
        self.model.config.ctx, self.prompt, self.turns, self.sizes = ctx, prompt, [], []
        self.model.register_forward_pre_hook(lambda module, inputs: self.sizes.append(inputs[0].shape[1]))
        self.reader = chat.Reader(self.model, 64)
        self.args = argparse.Namespace(**{"temperature": 0, "top_p": 1, "max_new": 12, **flags})

    def ask(self, question):
        self.sizes.clear()
        chat.answer(self.reader, BYTES, self.prompt, self.turns, question, self.args, None)


def test_only_what_is_new_is_read(wild):
    table = Table(wild, prompt=PROMPT)
    table.ask("One?")
    assert table.sizes[0] == 64 and sum(table.sizes) >= len(PROMPT)  # in pieces
    before = len(PROMPT + table.turns[0])
    table.ask("Two?")
    new = len(PROMPT + "".join(table.turns)) - before
    assert len(PROMPT) < before and sum(table.sizes) <= new + 1
    table.turns.clear()  # a new conversation after the same prompt
    table.ask("Three?")
    assert sum(table.sizes) < len(table.turns[0]) <= 64


def script(monkeypatch, ids):
    """Let the model `say` these tokens, whatever it computes."""
    ids = iter([*ids, BYTES.eot])

    def say(logits, *given):
        assert logits.shape == (1, BYTES.n_vocab)  # ids beyond it are padding of the table
        return torch.tensor([next(ids)])
    monkeypatch.setattr(chat, "sample", say)


@pytest.mark.parametrize("said, shown", [
    (b" Yes.\n\nHuman: more", " Yes."), (b" Yes.\n\n-----\n\nHuman: more", " Yes."), (b"\n\nHuman:", ""), (b" a\n\nHumans\n\n---\n", " a\n\nHumans\n\n---"),
    (b" -----\nHuman: \n\n\nHuman:", " -----\nHuman: \n"), (" né…😀!".encode(), " né…😀!"), (" né…😀".encode()[:-1], " né…"), (b" a\xff\xffb\xff", " a\ufffd\ufffdb")])
def test_answers_end_at_a_stop_and_hold_whole_characters(lm, monkeypatch, capfd, said, shown):
    table = Table(lm, max_new=100)
    script(monkeypatch, said)
    table.ask("Q")
    assert capfd.readouterr().out == f"Assistant:{shown}\n"
    assert table.turns == [f"\n\nHuman: Q\n\nAssistant:{shown.rstrip()}"]


def test_what_is_shown_is_never_taken_back():
    text = " no\n\nHumble-----\n\n\n\n---- ok é\n\n-----\n\nHuman:".encode()
    parts = [chat.settled(BYTES.decode(list(text[:n]))) for n in range(len(text))]
    for (before, _), (after, _) in zip(parts, parts[1:]):
        assert after.startswith(before)
    assert parts[-1] == (" no\n\nHumble-----\n\n\n\n---- ok é", True)
    assert chat.settled("a\n\n-----\n\nHuman:") == ("a", True)
    assert chat.settled(" so far")[0] == " so far"  # and what cannot become a stop is shown at once


def test_a_full_context_forgets_the_oldest_turns_and_keeps_the_prompt(wild, capfd):
    table = Table(wild, prompt=PROMPT, ctx=len(PROMPT) + 100)
    questions = ["First one?", "Second one?", "Third?"]
    for question in questions[:2]:
        table.ask(question)
    assert "full" not in capfd.readouterr().out
    table.ask(questions[2])
    out = capfd.readouterr().out
    assert "the context of 158 tokens is full: the first" in out and len(out.splitlines()) == 2, out
    first = int(out.split("the first ")[1].split()[0])
    opening = "\n\nHuman: Third?\n\nAssistant:"
    kept = PROMPT + "".join(table.turns[first:2]) + opening
    expected = fresh(table.model, kept)
    assert len(table.turns) == 3 and table.turns[2].removeprefix(opening) == expected.rstrip()
    table.args.max_new = 1000
    table.ask("Fourth?")
    out = capfd.readouterr().out
    assert "(the context of 158 tokens is full: the answer ends here)" in out and "the first 3 of 3 earlier turns" in out
    assert len(table.reader.ids) == 157


def test_nothing_is_forgotten_before_the_last_token_of_the_context_is_needed(wild, capfd):
    for spare, says in ((0, False), (-1, True)):
        table = Table(wild, prompt=PROMPT)
        table.ask("First one?")
        table.model.config.ctx = len(PROMPT + table.turns[0] + "\n\nHuman: Two?\n\nAssistant:") + 12 + spare
        table.ask("Two?")
        assert ("forgotten" in capfd.readouterr().out) == says


# ---------------------------------------------------------------------------------------------------------------------
# Commands, and what is refused


def test_commands(wild, tmp_path):
    model = checkpoint.load(wild)[0].eval()
    saved, again, prompt = tmp_path / "saved.txt", tmp_path / "again.txt", tmp_path / "prompt.txt"
    prompt.write_text(PROMPT)
    out = talk(tmp_path, wild, "One?", "Two?", f"/save {saved}", "/reset", "One?", "", f"/prompt {prompt}", "/prompt", "One?", "/prompt none", "One?",
               f"/save {again}", "/quit", "One?")
    (text, two), (other, prompted) = conversation(model, "", ["One?", "Two?"]), conversation(model, PROMPT, ["One?"])
    assert out == (printed(two) + f"(written: {saved})\n(a new conversation, prompt none)\n" + printed(two[:1]) + f"(a new conversation, prompt {prompt})\n"
                   + f"{PROMPT}\n(prompt {prompt}, {len(PROMPT)} of the context's 192 tokens)\n" + printed(prompted)
                   + "(a new conversation, prompt none)\n" + printed(two[:1]) + f"(written: {again})\n")
    assert saved.read_text() == text.lstrip() + "\n"
    assert again.read_text() == f"Human: One?\n\nAssistant:{two[0].rstrip()}\n"


def test_what_cannot_be_done_is_said_and_the_conversation_goes_on(wild, tmp_path):
    model = checkpoint.load(wild)[0].eval()
    lines = talk(tmp_path, wild, "One?", "/prompt none.txt", "/save /dev/null/x", "/rest", "a <eot>", "x" * 200, "Two?", "/save")
    answers = printed(conversation(model, "", ["One?", "Two?"])[1]).removesuffix("\n")
    first, second = answers.split("\nAssistant:")
    before, after = lines.split("Assistant:" + second)
    assert before.startswith(first)
    said = before.removeprefix(first).strip().splitlines()
    assert "none.txt: no such prompt file" in said[0] and "/dev/null" in said[1] and "/reset  " in said[2]
    assert said[-2].startswith("(the text holds <eot>") and said[-1].startswith("(too long: ") and "192" in said[-1]
    assert "/save FILE" in after


def test_the_same_seed_says_the_same(lm, tmp_path):
    out = [talk(tmp_path, lm, "One?", flags=("--temperature", 1, "--seed", seed)) for seed in (1, 1, 2)]
    assert out[0] == out[1] != out[2]


def test_prompts_are_cut_where_asked_and_too_long_ones_refused(wild, tmp_path):
    long = tmp_path / "long.txt"
    long.write_text("P" + "\n\n-----\n\nHuman: Hi\n\nAssistant: Hello." * 10)
    done = run("chat.py", "--model", wild, "--prompt", long)
    assert done.returncode == 2 and done.stderr.startswith(f"chat.py: error: {long}: a prompt of ") and "--prompt_tokens 144" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    shown = talk(tmp_path, wild, "/prompt", flags=("--prompt", long, "--prompt_tokens", 144))
    assert shown.startswith("P\n\n-----\n\nHuman: Hi") and 90 < len(shown.split("\n(prompt")[0]) <= 144


def test_other_models_and_missing_prompts_are_refused(pm, lm):
    for flags, words in ((("--model", pm), "a language model is needed"), (("--model", lm, "--prompt", "no.txt"), "no.txt: no such prompt file"),
                         (("--model", "nowhere"), "nowhere: no such checkpoint folder")):
        done = run("chat.py", *flags)
        assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and words in done.stderr, done


# ---------------------------------------------------------------------------------------------------------------------
# At a terminal


def sit_down():
    """Give the script a terminal of its own, and a model that takes its time."""
    os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # tests that a shell runs in the background ignore it, and so would the script
    terminal = os.open(os.environ["CHAT_TERMINAL"], os.O_RDWR)
    ioctl(terminal, termios.TIOCSCTTY, 0)
    for number in (0, 1, 2):
        os.dup2(terminal, number)
    sys.stdin, sys.stdout = open(0, closefd=False), open(1, "w", closefd=False)
    sample = sampling.sample

    def slowly(*given):
        time.sleep(0.02)
        return sample(*given)
    sampling.sample = slowly


def test_ctrl_c_stops_the_answer_and_twice_leaves(wild, tmp_path):
    ours, theirs = pty.openpty()
    saved, seen = tmp_path / "saved.txt", ""

    def sees(text, seconds):
        nonlocal seen
        end = time.time() + seconds
        while text not in seen:
            if time.time() > end:
                return False
            if select.select([ours], [], [], 0.1)[0]:
                seen += os.read(ours, 4096).decode(errors="replace")
        seen = seen.split(text, 1)[1]
        return True

    def types(line, answer):
        assert sees("Human: ", 30), seen
        os.write(ours, f"{line}\n".encode())
        assert sees(answer, 30), seen

    def interrupts(done):
        """Python misses a Ctrl-C that comes after the prompt was printed and before it waits: a person would press again, too."""
        for _ in range(5):
            time.sleep(0.2)
            os.write(ours, b"\x03")
            if done():
                return
        pytest.fail(f"Ctrl-C did nothing: {seen}")

    def hint():
        return sees("Ctrl-C again leaves", 4)

    def left():
        script.process.join(4)
        return script.process.exitcode == 0

    script = Running("chat.py", "--model", wild, "--temperature", 0, "--max_new", 150, "--dtype", "fp32", before=sit_down, CHAT_TERMINAL=os.ttyname(theirs))
    try:
        types("One?", "Assistant:")
        interrupts(lambda: sees("(stopped)", 10))
        types(f"/save {saved}", "written")
        for _ in range(2):  # the first hint is forgotten once a line was read
            assert sees("Human: ", 30), seen
            interrupts(hint)
            types("/reset", "new conversation")
        assert sees("Human: ", 30), seen
        interrupts(hint)
        assert sees("Human: ", 30), seen
        interrupts(left)
    finally:
        script.process.kill()
        os.close(ours)
        os.close(theirs)
    whole = fresh(checkpoint.load(wild)[0].eval(), "\n\nHuman: One?\n\nAssistant:", max_new=150)
    said = Path(saved).read_text().removeprefix("Human: One?\n\nAssistant:").rstrip()
    assert 0 < len(said) < len(whole.rstrip()) and whole.startswith(said)
