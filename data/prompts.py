"""Prompts in the paper's format (Section 2): a preamble, then conversations, each after a line `-----`.

    preamble
    (blank) ----- (blank)
    Human: …
    (blank)
    Assistant: …

A new conversation starts after one more `-----`, so what `load_prompt` returns ends with it and a context like
"\\n\\nHuman: …\\n\\nAssistant:" follows directly.
"""
from pathlib import Path

from data import toy
from data.errors import InputError
from data.text import find_special

SEPARATOR = "\n\n-----"
STOPS = ("\n\nHuman:", SEPARATOR)  # where an answer ends: a model goes on for the human, or to another conversation
FOLDER = Path(__file__).parent / "prompts"
NAMES = ("hhh", "code", "toy")  # ours: the paper's kind, its code variant, and four careful conversations of the toy world


def load_prompt(name):
    """The text of a prompt: one of NAMES or a file. Raises InputError if it cannot be read, is empty or holds a special token."""
    if name == "toy":
        return toy.careful_prompt()
    path = FOLDER / f"{name}.txt" if name in NAMES else Path(name)
    if not path.is_file():
        raise InputError(f"{path}: no such prompt file; give a text file or one of {', '.join(NAMES)}")
    try:
        text = path.read_text("utf-8").strip().removesuffix("-----").rstrip()
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 text (at byte {error.start}); is this a prompt?") from None
    if not text:
        raise InputError(f"{path}: the prompt is empty")
    if special := find_special(text):
        raise InputError(f"{path}: the prompt holds {special}, a special token; write it differently there")
    return text + SEPARATOR


def fit_prompt(text, tokenizer, n_tokens):
    """The prompt shortened to at most n_tokens: its preamble and the last conversations that fit, whole ones only.

    Raises InputError where not even the preamble fits.
    """
    conversations = text.removesuffix(SEPARATOR).split(SEPARATOR)
    preamble = [] if conversations[0].lstrip().startswith("Human:") else [conversations.pop(0)]
    for first in range(len(conversations) + bool(preamble)):
        shortened = SEPARATOR.join([*preamble, *conversations[first:], ""])
        if (n := len(tokenizer.encode(shortened))) <= n_tokens:
            return shortened
    raise InputError(f"--prompt_tokens {n_tokens}: even the prompt's {'preamble' if preamble else 'last conversation'} takes {n} tokens")
