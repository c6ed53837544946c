"""chat.py: answers are those to the whole text read afresh, nothing is read twice, and stops, commands and
Ctrl-C do what they say."""
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
from conftest import BYTES, Running, run_refused, run_well

import chat
import checkpoint
import sampling
from data.prompts import STOPS
from evals.subject import Subject, samples
from kv_cache import Cache, read
from sampling import TextSample, stream

PROMPT = "Short answers.\n\n-----\n\nHuman: Hi\n\nAssistant: Hello.\n\n-----"


@pytest.fixture(scope="module")
def wild(lm, tmp_path_factory):
    """A checkpoint whose weights are so large that each token depends on all before it."""
    folder = tmp_path_factory.mktemp("wild") / "lm"
    shutil.copytree(lm, folder)
    weights = safetensors.torch.load_file(folder / "model.safetensors")
    generator = torch.Generator().manual_seed(0)
    weights = {name: torch.randn(w.shape, generator=generator) * 0.4 if w.dim() == 2 else w
               for name, w in weights.items()}
    weights["model.embed_tokens.weight"][128:] = 0  # ASCII only
    safetensors.torch.save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def model(wild):
    return checkpoint.load(wild)[0].freeze(torch.float32)


def feed():
    sys.stdin = open(os.environ["CHAT_INPUT"])


def talk(tmp_path, folder, *lines, flags=()):
    """What chat.py prints when these lines are piped into it."""
    path = tmp_path / "input"
    path.write_text("".join(line + "\n" for line in lines))
    return run_well("chat.py", "--model", folder, "--temperature", 0, "--max_new", 12, "--dtype", "fp32",
                    *flags, before=feed, CHAT_INPUT=str(path))


def fresh(model, prompt, turns, max_new=12):
    """The greedy answer to a conversation that is read from its beginning, as far as a chat shows it."""
    ids = [BYTES.eot, *BYTES.encode(prompt).tolist()] if prompt else []
    sample = TextSample(BYTES, STOPS)
    for _ in stream(model, [ids + BYTES.encode(turns).tolist()], [[sample]], max_new, temperature=0,
                    n_vocab=BYTES.n_vocab):
        pass
    return sample.text[:sample.n_settled]


def conversation(model, prompt, questions):
    """(turns, answers) of a chat in which each answer is computed afresh."""
    turns, answers = "", []
    for question in questions:
        turns += f"\n\nHuman: {question}\n\nAssistant:"
        answers.append(fresh(model, prompt, turns))
        turns += answers[-1].rstrip()
    return turns, answers


def printed(answers):
    return "".join(f"Assistant:{answer}\n" for answer in answers)


# ------------------------------------------------------------------------------------------------------------
# The conversation


def test_answers_equal_those_to_the_whole_text_read_afresh(wild, model, tmp_path):
    questions = ["Who are you?", "And why?", "Well"]
    _, answers = conversation(model, "", questions)
    assert len(set(answers)) == 3 and all(len(a) > 5 for a in answers), answers
    assert talk(tmp_path, wild, *questions) == printed(answers)
    (tmp_path / "prompt.txt").write_text(PROMPT.removesuffix("\n\n-----"))
    prompted = conversation(model, PROMPT, questions[:2])[1]
    assert prompted != answers[:2]
    flags = ("--prompt", tmp_path / "prompt.txt")
    assert talk(tmp_path, wild, *questions[:2], flags=flags) == printed(prompted)


class Table:
    """A conversation in this process, which remembers how many tokens the model read at a time."""

    def __init__(self, folder, ctx=192, prompt="", **flags):
        self.model, _, meta = checkpoint.load(folder)
        self.model.freeze(torch.float32).config.ctx = ctx
        ids = [BYTES.eot, *BYTES.encode(prompt)]
        prefix = read(self.model, ids)[0].as_prefix() if prompt else Cache(0)
        self.args = argparse.Namespace(**{"temperature": 0, "top_p": 1, "max_new": 12, "seed": 0, "n": 1,
                                          "prompt": "", **flags})
        self.subject = Subject("", self.model, BYTES, meta, prompt, prefix, micro_tokens=64)
        self.conversation, self.sizes = chat.Conversation(self.subject, self.args), []
        self.model.register_forward_pre_hook(lambda module, inputs: self.sizes.append(inputs[0].shape[1]))

    @property
    def turns(self):
        return self.conversation.turns

    def ask(self, question):
        self.sizes.clear()
        self.conversation.answer(question)


def test_only_what_is_new_is_read(wild):
    table = Table(wild, prompt=PROMPT)
    table.ask("One, " + "or more, " * 6)
    assert table.sizes[0] == 64 and sum(table.sizes) >= len(table.turns[0]) - 1  # in parts, all but the last
    before = len(table.turns[0])
    table.ask("Two?")
    assert sum(table.sizes) <= len("".join(table.turns)) - before + 1
    table.conversation.respond("/reset")
    table.ask("Three?")
    assert table.sizes[0] == len("\n\nHuman: Three?\n\nAssistant:") - 1 and set(table.sizes[1:]) == {1}


def test_answers_are_the_samples_of_an_evaluation(wild):
    """chat.py and evaluate.py read the same tokens behind the same prompt."""
    for prompt in ("", PROMPT):
        table = Table(wild, prompt=prompt, temperature=0.7, top_p=0.9)
        table.ask("Who?")
        [[sample]] = samples(table.subject, ["\n\nHuman: Who?\n\nAssistant:"], table.args)
        assert table.turns[0].endswith(f"Assistant:{sample.rstrip()}") and sample.strip()


def script(monkeypatch, ids):
    """Let the model answer with these tokens, whatever it computes."""
    ids = iter([*ids, BYTES.eot])

    def next_tokens(logits, *given):
        assert logits.shape == (1, BYTES.n_vocab)  # ids beyond it are padding of the table
        return torch.tensor([next(ids)])
    monkeypatch.setattr(sampling, "next_tokens", next_tokens)


@pytest.mark.parametrize("drawn, shown", [
    (b" Yes.\n\nHuman: more", " Yes."),
    (b" Yes.\n\n-----\n\nHuman: more", " Yes."),
    (b"\n\nHuman:", ""),
    (b" a\n\nHumans\n\n---\n", " a\n\nHumans\n\n---"),
    (b" -----\nHuman: \n\n\nHuman:", " -----\nHuman: \n"),
    (" né…😀!".encode(), " né…😀!"),
    (" né…😀".encode()[:-1], " né…"),
    (b" a\xff\xffb\xff", " a\ufffd\ufffdb\ufffd")])
def test_answers_end_at_a_stop_and_hold_whole_characters(lm, monkeypatch, capfd, drawn, shown):
    table = Table(lm, max_new=100)
    script(monkeypatch, drawn)
    table.ask("Q")
    assert capfd.readouterr().out == f"Assistant:{shown}\n"
    assert table.turns == [f"\n\nHuman: Q\n\nAssistant:{shown.rstrip()}"]


def test_a_full_context_forgets_the_oldest_turns_and_keeps_the_prompt(wild, capfd):
    table = Table(wild, prompt=PROMPT, ctx=len(PROMPT) + 100)
    for question in ("First one?", "Second one?"):
        table.ask(question)
    assert "full" not in capfd.readouterr().out
    table.ask("Third?")
    out = capfd.readouterr().out
    assert "the context of 158 tokens is full: the first" in out and len(out.splitlines()) == 2, out
    first = int(out.split("the first ")[1].split()[0])
    opening = "\n\nHuman: Third?\n\nAssistant:"
    expected = fresh(table.model, PROMPT, "".join(table.turns[first:2]) + opening)
    assert len(table.turns) == 3 and table.turns[2].removeprefix(opening) == expected.rstrip()
    table.args.max_new = 1000
    table.ask("Fourth?")
    out = capfd.readouterr().out
    assert "(the context of 158 tokens is full: the answer ends here)" in out
    assert "the first 3 of 3 earlier turns" in out
    assert table.conversation.cache.prefix_tokens + table.conversation.cache.length == 157


def test_nothing_is_forgotten_before_the_last_token_of_the_context_is_needed(wild, capfd):
    for spare, forgets in ((0, False), (-1, True)):
        table = Table(wild, prompt=PROMPT)
        table.ask("First one?")
        text = PROMPT + table.turns[0] + "\n\nHuman: Two?\n\nAssistant:"
        table.model.config.ctx = 1 + len(text) + 12 + spare  # 1 for <eot> before the prompt
        table.ask("Two?")
        assert ("forgotten" in capfd.readouterr().out) == forgets


# ------------------------------------------------------------------------------------------------------------
# Commands, and what is refused


def test_commands(wild, model, tmp_path):
    saved, again, prompt = tmp_path / "saved.txt", tmp_path / "again.txt", tmp_path / "prompt.txt"
    prompt.write_text(PROMPT)
    out = talk(tmp_path, wild, "One?", "Two?", f"/save {saved}", "/reset", "One?", "", f"/prompt {prompt}",
               "/prompt", "One?", "/prompt none", "One?", f"/save {again}", "/quit", "One?")
    turns, answers = conversation(model, "", ["One?", "Two?"])
    _, prompted = conversation(model, PROMPT, ["One?"])
    assert out == (
        printed(answers) + f"(written: {saved})\n(a new conversation, prompt none)\n" + printed(answers[:1])
        + f"(a new conversation, prompt {prompt})\n"
        + f"{PROMPT}\n(prompt {prompt}, {len(PROMPT)} of the context's 192 tokens)\n" + printed(prompted)
        + "(a new conversation, prompt none)\n" + printed(answers[:1]) + f"(written: {again})\n")
    assert saved.read_text() == turns.lstrip() + "\n"
    assert again.read_text() == f"Human: One?\n\nAssistant:{answers[0].rstrip()}\n"


def test_what_cannot_be_done_is_said_and_the_conversation_goes_on(wild, model, tmp_path):
    lines = talk(tmp_path, wild, "One?", "/prompt none.txt", "/save /dev/null/x", "/rest", "a <eot>",
                 "x" * 200, "Two?", "/save")
    answers = printed(conversation(model, "", ["One?", "Two?"])[1]).removesuffix("\n")
    first, second = answers.split("\nAssistant:")
    before, after = lines.split("Assistant:" + second)
    assert before.startswith(first)
    messages = before.removeprefix(first).strip().splitlines()
    assert "none.txt: no such prompt file" in messages[0] and "/dev/null" in messages[1]
    assert "/reset  " in messages[2] and messages[-2].startswith("(the text holds <eot>")
    assert messages[-1].startswith("(too long: ") and "192" in messages[-1]
    assert "/save FILE" in after


def test_the_same_seed_gives_the_same_answers(lm, tmp_path):
    out = [talk(tmp_path, lm, "One?", flags=("--temperature", 1, "--seed", seed)) for seed in (1, 1, 2)]
    assert out[0] == out[1] != out[2]


def test_prompts_are_cut_where_asked_and_too_long_ones_refused(wild, tmp_path):
    long = tmp_path / "long.txt"
    long.write_text("P" + "\n\n-----\n\nHuman: Hi\n\nAssistant: Hello." * 10)
    message = run_refused("chat.py", "--model", wild, "--prompt", long)
    assert message.startswith(f"chat.py: error: {long}: a prompt of ") and "--prompt_tokens 144" in message
    shown = talk(tmp_path, wild, "/prompt", flags=("--prompt", long, "--prompt_tokens", 144))
    assert shown.startswith("P\n\n-----\n\nHuman: Hi") and 90 < len(shown.split("\n(prompt")[0]) <= 144


def test_other_models_missing_prompts_and_wrong_flags_are_refused(pm, lm):
    assert "a language model is needed" in run_refused("chat.py", "--model", pm)
    assert "no.txt: no such prompt file" in run_refused("chat.py", "--model", lm, "--prompt", "no.txt")
    assert "nowhere: no such checkpoint folder" in run_refused("chat.py", "--model", "nowhere")
    assert "--top_p" in run_refused("chat.py", "--model", lm, "--top_p", 2)


# ------------------------------------------------------------------------------------------------------------
# At a terminal


def sit_down():
    """Give the script a terminal of its own, and a model that takes its time."""
    os.setsid()
    # Tests that a shell runs in the background ignore Ctrl-C, and so would the script.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    terminal = os.open(os.environ["CHAT_TERMINAL"], os.O_RDWR)
    ioctl(terminal, termios.TIOCSCTTY, 0)
    for number in (0, 1, 2):
        os.dup2(terminal, number)
    sys.stdin, sys.stdout = open(0, closefd=False), open(1, "w", closefd=False)
    next_tokens = sampling.next_tokens

    def slowly(*given):
        time.sleep(0.02)
        return next_tokens(*given)
    sampling.next_tokens = slowly


def test_ctrl_c_stops_the_answer_and_twice_leaves(wild, model, tmp_path):
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
        """Press Ctrl-C until something is done: Python misses it between printing a prompt and waiting."""
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

    script = Running("chat.py", "--model", wild, "--temperature", 0, "--max_new", 150, "--dtype", "fp32",
                     before=sit_down, CHAT_TERMINAL=os.ttyname(theirs))
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
    whole = fresh(model, "", "\n\nHuman: One?\n\nAssistant:", max_new=150)
    part = Path(saved).read_text().removeprefix("Human: One?\n\nAssistant:").rstrip()
    assert 0 < len(part) < len(whole.rstrip()) and whole.startswith(part)
