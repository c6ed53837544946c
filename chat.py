"""Talk with a language model in the terminal; its answers appear as they are sampled.

  python chat.py --model out/lm --prompt toy
  python chat.py --model DIR --prompt hhh --prompt_tokens 1500        as much of a long prompt as fits
  printf 'Who are you?\\n' | python chat.py --model DIR --temperature 0

A prompt (hhh, code, toy or a text file) stands before the conversation; see Section 2 of the paper. Commands:

  /reset          begin a new conversation
  /prompt         show the prompt
  /prompt NAME    take another one (a name, a file, or none) and begin a new conversation
  /save FILE      write the conversation to a file, in the form that --prompt reads
  /help, /quit    this list; leave, as Ctrl-D does

Ctrl-C stops an answer. What came of it so far remains in the conversation.
"""
import argparse
import contextlib
import sys

import torch

import checkpoint
import plan
from data.errors import InputError, Parser, one_line, run_main
from data.files import write_file
from data.prompts import STOPS
from data.text import find_special
from evals.subject import add_model_flags, load_subject, read_prompt
from sampling import TextSample, stream

TURN = "\n\nHuman: {}\n\nAssistant:"
COMMANDS = __doc__[__doc__.index("  /reset"):].rstrip()


def parse_args():
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_flags(parser)
    add = parser.add_argument
    add("--temperature", type=plan.between(float, 0, 100), default=0.7,
        help="0 takes the likeliest token (default: %(default)s)")
    add("--top_p", type=plan.between(float, 0, 1), default=0.95,
        help="sample from the likeliest tokens that together have this probability (default: %(default)s)")
    add("--max_new", type=plan.positive(int), default=256,
        help="tokens of an answer at most (default: %(default)s)")
    add("--seed", type=plan.between(int, 0, 2**63 - 1),
        help="give the same answers each time (default: others each time)")
    return parser.parse_args()


class Conversation:
    """Turns behind a prompt, and a cache of them, so that the model reads only what is new."""

    def __init__(self, subject, args):
        self.subject, self.args = subject, args
        self.generator = torch.Generator().manual_seed(torch.seed() if args.seed is None else args.seed)
        self.begin(args.prompt or "none")

    def begin(self, prompt_name):
        """Begin behind the subject's prompt, which has this name."""
        self.prompt_name, self.turns = prompt_name, []
        self.cache = self.subject.prefix.fork(1, self.subject.ctx)
        self.ids = []  # tokens of turns; the cache has read the first cache.length of them

    def encode(self, text):
        return self.subject.tokenizer.encode(text).tolist()

    def respond(self, line):
        """Carry out a command, or answer a question. Raises InputError or OSError if that cannot be done."""
        command, _, argument = map(str.strip, line.partition(" "))
        subject, ctx = self.subject, self.subject.model.config.ctx
        if command == "/prompt" and not argument:
            n_tokens = len(self.encode(subject.prompt))
            print(f"{subject.prompt}\n(prompt {self.prompt_name}, {n_tokens:,} of the context's {ctx:,} "
                  "tokens)")
        elif command in ("/reset", "/prompt"):
            if command == "/prompt":
                subject.prompt, subject.prefix = read_prompt(
                    subject.model, subject.tokenizer, ctx, argument, self.args.prompt_tokens)
            self.begin(argument if command == "/prompt" else self.prompt_name)
            print(f"(a new conversation, prompt {self.prompt_name})")
        elif command == "/save" and argument:
            write_file(argument, "".join(self.turns).lstrip() + "\n")
            print(f"(written: {argument})")
        elif line.startswith("/"):
            print(COMMANDS)
        elif special := find_special(line):
            raise InputError(f"the text holds {special}, a special token; write it differently")
        elif (n_tokens := len(self.encode(TURN.format(line)))) >= subject.ctx:
            raise InputError(f"too long: with the prompt it takes {ctx - subject.ctx + n_tokens:,} tokens, "
                             f"and the context holds {ctx:,}; say it shorter")
        elif line:
            self.answer(line)

    def answer(self, question):
        """Print the answer to `question` as it comes, and add both to the turns. As the context fills, the
        oldest turns are left out."""
        opening, reply, n_forgotten = TURN.format(question), TextSample(self.subject.tokenizer, STOPS), 0
        full, notes = f"the context of {self.subject.model.config.ctx} tokens is full", []
        space = self.subject.tokenizer.space_before(opening)
        print("Assistant:" + space, end="", flush=True)
        try:
            while not reply.ended and len(reply.tokens) < self.args.max_new:
                ids = self.encode("".join(self.turns[n_forgotten:]) + opening) + reply.tokens
                if len(ids) < self.subject.ctx:
                    self.go_on(reply, ids)
                elif n_forgotten < len(self.turns):
                    n_forgotten += 1
                else:
                    notes.append(f"{full}: the answer ends here")
                    break
        except KeyboardInterrupt:
            notes.append("stopped")
        if n_forgotten:
            notes.append(f"{full}: the first {n_forgotten} of {len(self.turns)} earlier turns are forgotten")
        self.turns.append(opening + space + reply.text[:reply.n_settled].rstrip())
        print("".join(f"\n({note})" for note in notes), flush=True)

    def go_on(self, reply, ids):
        """Print more of a reply to these token ids, until it ends or the context is full."""
        self.read(ids)
        args, max_new = self.args, self.args.max_new - len(reply.tokens)
        for _, piece in stream(
                self.subject.model, [ids[-1:]], [[reply]], max_new, args.temperature, args.top_p,
                self.subject.tokenizer.n_vocab, [self.generator], cache=self.cache):
            self.ids.append(reply.tokens[-1])
            print(piece, end="", flush=True)

    def read(self, ids):
        """Have the cache hold all but the last of these token ids, without reading again what it holds."""
        n_same, n_old = 0, min(len(ids) - 1, len(self.ids), self.cache.length)
        while n_same < n_old and ids[n_same] == self.ids[n_same]:
            n_same += 1
        self.cache.length, self.ids = n_same, ids
        for part in torch.tensor(ids[n_same:-1], dtype=torch.long).split(self.subject.micro_tokens):
            if len(part):
                self.subject.model(part[None].to(self.subject.device), cache=self.cache)


def main():
    args = parse_args()
    chat(Conversation(load_subject(args, checkpoint.load_lm), args))


def chat(conversation):
    """Read questions and commands until the input ends."""
    at_terminal, leaving = sys.stdin.isatty(), False
    if at_terminal:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  gives input() line editing and a history
        print(f"{conversation.subject.name}, prompt {conversation.prompt_name}; /help lists the commands, "
              "Ctrl-D leaves")
    for file in (sys.stdin, sys.stdout):
        file.reconfigure(errors="replace")
    while True:
        try:
            line = input("\nHuman: " if at_terminal else "").strip()
            leaving = False
            if line.split(" ")[0] == "/quit":
                break
            conversation.respond(line)
        except EOFError:
            break
        except KeyboardInterrupt:
            if leaving:
                break
            leaving = True
            print("\n(Ctrl-C again leaves, as /quit and Ctrl-D do)")
        except (InputError, OSError, ValueError) as error:  # the conversation goes on
            print(f"({one_line(str(error))})")
    if at_terminal:
        print()


if __name__ == "__main__":
    run_main(main)
