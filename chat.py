"""Talk with a language model in the terminal; its answers appear as they are sampled.

  python chat.py --model out/lm --prompt toy
  python chat.py --model DIR --prompt hhh --prompt_tokens 1500        a large prompt cut to fit: its last conversations
  printf 'Who are you?\\n' | python chat.py --model DIR --temperature 0

A prompt (hhh, code, toy or a text file) stands before the conversation; see Section 2 of the paper. Commands:

  /reset          begin a new conversation
  /prompt         show the prompt
  /prompt NAME    take another one (a name, a file, or none) and begin a new conversation
  /save FILE      write the conversation to a file, in the form that --prompt reads
  /help, /quit    this list; leave, as Ctrl-D does

Ctrl-C stops an answer. What it said so far stays said.
"""
import argparse
import contextlib
import sys

import numpy as np
import torch

import checkpoint
import plan
from ranks import pick_dtype, start
from data.errors import InputError, run_main
from data.files import write_file
from data.prompts import STOPS, fit_prompt, load_prompt
from data.text import find_special
from model import Cache
from sampling import sample

TURN = "\n\nHuman: {}\n\nAssistant:"
COMMANDS = __doc__[__doc__.index("  /reset"):].rstrip()


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="language model: a checkpoint folder, a Hugging Face folder or a .gguf file")
    parser.add_argument("--prompt", default="none", help="hhh, code, toy, a text file, or none (default: none)")
    parser.add_argument("--prompt_tokens", type=plan.positive(int), help="keep the prompt's preamble and as many of its last conversations as fit this many tokens "
                        "(default: the whole prompt)")
    parser.add_argument("--temperature", type=plan.between(float, 0, 100), default=0.7, help="0 takes the likeliest token (default: %(default)s)")
    parser.add_argument("--top_p", type=plan.between(float, 0.001, 1), default=0.95, help="sample from the likeliest tokens that together have this probability "
                        "(default: %(default)s)")
    parser.add_argument("--max_new", type=plan.positive(int), default=256, help="tokens of an answer at most (default: %(default)s)")
    parser.add_argument("--seed", type=plan.between(int, 0, 2**63 - 1), help="the same answers each time (default: others each time)")
    plan.add_device_flags(parser)
    return parser.parse_args()


class Reader:
    """A text that grows, or changes at its end, read through one cache: what it shares with the text before is not read again."""

    def __init__(self, model, at_once):
        self.model, self.at_once = model, at_once
        self.ids, self.cache = np.empty(0, np.int64), Cache(model.config.ctx)  # the cache holds the keys and values of `ids`

    @torch.no_grad()
    def logits(self, ids):
        """Logits (1, vocab_size) of the token that follows ids (T,)."""
        n = min(len(self.ids), len(ids) - 1)
        kept = int(np.append(self.ids[:n] == ids[:n], False).argmin())
        self.ids, self.cache.length = ids[:kept], kept
        while len(self.ids) < len(ids):
            piece = torch.as_tensor(ids[len(self.ids):len(self.ids) + self.at_once], device=self.model.unembedding.device)
            hidden = self.model(piece[None], cache=self.cache)
            self.ids = ids[:self.cache.length]
        return self.model.logits(hidden[:, -1])


def settled(text):
    """(what of an answer can be shown, whether it has ended): all before a stop, and nothing that may become a stop or lacks the
    rest of a character."""
    ends = [text.index(stop) for stop in STOPS if stop in text]
    if ends:
        return text[:min(ends)], True
    text = text.rstrip("\ufffd")
    held = max((n for stop in STOPS for n in range(1, len(stop)) if text.endswith(stop[:n])), default=0)
    return text[:len(text) - held], False


def answer(reader, tokenizer, prompt, turns, question, args, generator):
    """Print the answer to `question` as it comes, and add both to `turns`. As the context fills, the oldest turns are left out."""
    ctx, opening, first = reader.model.config.ctx, TURN.format(question), 0
    said, shown, ended, notes = [], "", False, []

    def all_ids():
        return np.concatenate([tokenizer.encode(prompt + "".join(turns[first:]) + opening), said]).astype(np.int64)

    print("Assistant:", end="", flush=True)
    try:
        ids = all_ids()
        while len(said) < args.max_new and not ended:
            while len(ids) >= ctx and first < len(turns):
                first += 1
                ids = all_ids()
            if len(ids) >= ctx:
                notes.append(f"the context of {ctx} tokens is full: the answer ends here")
                break
            token = sample(reader.logits(ids)[:, :tokenizer.n_vocab], args.temperature, args.top_p, torch.rand(1, dtype=torch.float64, generator=generator)).item()
            if token in (tokenizer.eot, tokenizer.eoc):
                break
            said.append(token)
            ids = np.append(ids, token)
            text, ended = settled(tokenizer.decode(said))
            new, shown = text[len(shown):], text
            print(new, end="", flush=True)
    except KeyboardInterrupt:
        notes.append("stopped")
    if first:
        notes.append(f"the context of {ctx} tokens is full: the first {first} of {len(turns)} earlier turns are forgotten")
    turns.append(opening + shown.rstrip())
    print("".join(f"\n({note})" for note in notes), flush=True)


def read_prompt(name, args, tokenizer, ctx):
    """The text of a prompt that leaves room for a conversation; "" for none."""
    if name == "none":
        return ""
    prompt = load_prompt(name)
    if args.prompt_tokens:
        prompt = fit_prompt(prompt, tokenizer, args.prompt_tokens)
    if (n := len(tokenizer.encode(prompt + TURN.format("")))) >= ctx:
        raise InputError(f"{name}: a prompt of {n:,} tokens leaves no room in the model's context of {ctx:,}; give --prompt_tokens {ctx * 3 // 4} to "
                         "keep what fits, or a model with a larger ctx")
    return prompt


def main():
    args = parse_args()
    device = start(args.device).device
    model, tokenizer, meta = checkpoint.load(args.model)
    if meta["kind"] != "lm":
        raise InputError(f"{args.model}: a language model is needed to chat, and this is a preference model")
    model.dtype = pick_dtype(args.dtype, device)
    model.to(device).eval()
    generator = torch.Generator()
    generator.seed() if args.seed is None else generator.manual_seed(args.seed)
    chat(args, tokenizer, Reader(model, plan.micro_tokens(args, model, device)), generator)


def chat(args, tokenizer, reader, generator):
    """Read questions and commands until the input ends."""
    ctx, turns, name = reader.model.config.ctx, [], args.prompt
    prompt, at_terminal, leaving = read_prompt(name, args, tokenizer, ctx), sys.stdin.isatty(), False
    if at_terminal:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  gives input() line editing and a history
        print(f"{args.model}, prompt {name}; /help lists the commands, Ctrl-D leaves")
    for stream in (sys.stdin, sys.stdout):
        stream.reconfigure(errors="replace")
    while True:
        try:
            line = input("\nHuman: " if at_terminal else "").strip()
            leaving = False
            command, _, argument = map(str.strip, line.partition(" "))
            if command == "/quit":
                break
            elif command == "/reset" or command == "/prompt" and argument:
                if command == "/prompt":
                    prompt, name = read_prompt(argument, args, tokenizer, ctx), argument
                turns = []
                print(f"(a new conversation, prompt {name})")
            elif command == "/prompt":
                print(f"{prompt}\n(prompt {name}, {len(tokenizer.encode(prompt)):,} of the context's {ctx:,} tokens)")
            elif command == "/save" and argument:
                write_file(argument, "".join(turns).lstrip() + "\n")
                print(f"(written: {argument})")
            elif line.startswith("/"):
                print(COMMANDS)
            elif special := find_special(line):
                print(f"(the text holds {special}, a special token; write it differently)")
            elif (n := len(tokenizer.encode(prompt + TURN.format(line)))) >= ctx:
                print(f"(too long: with the prompt it takes {n:,} tokens, and the context holds {ctx:,}; say it shorter)")
            elif line:
                answer(reader, tokenizer, prompt, turns, line, args, generator)
        except EOFError:
            break
        except KeyboardInterrupt:
            if leaving:
                break
            leaving = True
            print("\n(Ctrl-C again leaves, as /quit and Ctrl-D do)")
        except (InputError, OSError) as error:  # of a command; the conversation goes on
            print(f"({error})")
    if at_terminal:
        print()


if __name__ == "__main__":
    run_main(main)
