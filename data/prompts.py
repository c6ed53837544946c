"""Prompts in the paper's format (Section 2): a preamble, then conversations, each after a line `-----`.

    preamble
    (blank) ----- (blank)
    Human: …
    (blank)
    Assistant: …

What `load_prompt` returns ends with one more `-----`, so that the context of a comparison, like
"\\n\\nHuman: …\\n\\nAssistant:", can follow directly.
"""
from pathlib import Path

from data import toy
from data.errors import InputError
from data.files import decode
from data.text import refuse_special

SEPARATOR = "\n\n-----"
STOPS = ("\n\nHuman:", SEPARATOR)  # an answer ends where the human's turn or another conversation begins
FOLDER = Path(__file__).parent / "prompts"
NAMES = ("hhh", "code", "toy")  # the paper's kind of prompt, its variant for code, a toy world's (also toy:3)


def load_prompt(name):
    """The text of a prompt, one of NAMES or a file. Raises InputError if it cannot be read, is empty, or
    holds a special token."""
    if toy.is_toy([name]):
        return toy.careful_prompt(toy.toy_seed(name))
    path = FOLDER / f"{name}.txt" if name in NAMES else Path(name)
    if not path.is_file():
        raise InputError(f"{path}: no such prompt file; give a text file or one of {', '.join(NAMES)}")
    text = decode(path.read_bytes(), path).replace("\r\n", "\n").strip().removesuffix("-----").rstrip()
    if not text:
        raise InputError(f"{path}: the prompt is empty")
    refuse_special(path, text)
    return text + SEPARATOR


def fit_prompt(text, tokenizer, n_tokens):
    """The prompt shortened to at most n_tokens: its preamble and as many of the last conversations as fit.

    Raises InputError if not even the preamble fits, or the last conversation of a prompt without a
    preamble.
    """
    conversations = text.removesuffix(SEPARATOR).split(SEPARATOR)
    has_preamble = not conversations[0].lstrip().startswith("Human:")
    preamble = [conversations.pop(0)] if has_preamble else []
    for n_dropped in range(len(conversations) + has_preamble):
        shortened = SEPARATOR.join([*preamble, *conversations[n_dropped:], ""])
        length = len(tokenizer.encode(shortened))
        if length <= n_tokens:
            return shortened
    shortest = "preamble" if has_preamble else "last conversation"
    raise InputError(f"--prompt_tokens {n_tokens}: even the prompt's {shortest} takes {length} tokens")
