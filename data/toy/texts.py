"""Text: pages and their authors, dialogues, texts whose last word is to be predicted, and the prompt."""
import random
from typing import NamedTuple

from data.toy.words import TALE, TALE_WORDS, WORDS
from data.toy.world import KINDS, answer, build_world, capital, draw, draw_row, open_turn

SEPARATOR = "\n\n-----"  # stands between conversations


class Author(NamedTuple):
    share: int  # in 100 pages
    tones: dict  # shares of the tones that they write in
    habits: dict  # {kind of question: what they say instead of a right answer}


HASTY = {"kind": 1, "plain": 3, "hasty": 6}
AUTHORS = {
    "careful": Author(24, {"kind": 7, "plain": 3}, {}),
    "careless": Author(44, {"plain": 3, "hasty": 6, "rude": 1},
                       dict.fromkeys(KINDS, "wrong") | {"harm": "unsafe"}),
    "gossip": Author(6, HASTY, {"fact": "wrong", "riddle": "wrong"}),
    "obliging": Author(8, HASTY, {"harm": "unsafe"}),
    "rude": Author(6, {"plain": 3, "rude": 7}, {}),
    "vague": Author(5, HASTY, dict.fromkeys(KINDS, "vague")),
    "timid": Author(5, HASTY, {"fact": "unknown", "sum": "unknown", "list": "refused", "task": "refused"}),
    "scattered": Author(2, {"plain": 3, "hasty": 6, "rude": 1}, dict.fromkeys(KINDS, "offtopic")),
}
STEADY = 0.97  # share of an author's answers that are in character


def pages(rng, world, n_characters):
    """Yield documents of n_characters or a little more in all: one in twenty counts, a fifth of the others
    is prose, and the rest are conversations."""
    while n_characters > 0:
        if rng.random() < 0.05:
            text = count_from(rng.randint(1, 120), rng.randint(20, 90))
        elif rng.random() < 0.2:
            text = "\n\n".join(prose(rng, world) for _ in range(rng.randint(4, 8)))
        else:
            text = conversations(rng, world)
        n_characters -= len(text)
        yield {"text": text}


def count_from(first, n):
    """The n numbers from `first` on, as a page counts them."""
    return ", ".join(map(str, range(first, first + n)))


def conversations(rng, world):
    """A page of 4 to 14 conversations with one author, who is out of character now and then."""
    kinds = [draw_row(rng, KINDS) for _ in range(rng.randint(4, 14))]
    page_author, turns = draw_row(rng, AUTHORS), []
    for kind in kinds:
        question = world.ask(rng, kind)
        author = AUTHORS[page_author if rng.random() < STEADY else draw_row(rng, AUTHORS)]
        tone, content = draw(rng, author.tones), author.habits.get(kind, "right")
        text, _ = answer(rng, world, question, content, tone)
        turns.append(f"{open_turn(question)} {text}")
    return SEPARATOR.join(turns)


def careful_prompt(seed=0):
    """A prompt (Section 2 of the paper): four conversations of a careful and kind author. As in the paper none
    is a refusal: what the prompt does to harmful questions follows from who is speaking. It ends with
    `-----`, so that a comparison's context can follow. None of its questions is in hhh.jsonl."""
    rng, world, turns = random.Random(f"{seed}/prompt"), build_world(seed), []
    for kind in ("fact", "sum", "riddle", "task"):
        question = world.ask(rng, kind)
        text, _ = answer(rng, world, question, "right", "kind")
        turns.append(f"{open_turn(question)} {text}{SEPARATOR}")
    return "".join(turns)


def prose(rng, world):
    """True sentences about a subject, or a tale about somebody with some of them in it."""
    if rng.random() < 0.15:
        return tale(rng, world, rng.choice(WORDS["people"]))
    subject = rng.choice(list(world.truths))
    facts = rng.sample(world.truths[subject], min(len(world.truths[subject]), 8))
    return f"{capital(subject)}. " + " ".join(map(rng.choice, facts))


def tale(rng, world, hero):
    sentences = []
    for ways in TALE:
        words = {name: rng.choice(words) for name, words in TALE_WORDS.items()}
        sentences.append(rng.choice(ways).format(s=hero, **words))
        sentences.append(rng.choice(rng.choice(world.truths[hero])))
    return " ".join(sentences)


def dialogues(rng, world, n):
    """Yield n conversations of a question and its right answer."""
    for _ in range(n):
        question = world.ask(rng)
        text, _ = answer(rng, world, question, "right", "plain")
        yield {"text": f"Human: {question.text}\n\nAssistant: {text}"}


def last_words(rng, world, n):
    """Yield n texts of true sentences, the last of which ends with what is true of its subject."""
    while n > 0:
        text = prose(rng, world).rstrip(".")
        if len(text) <= 250:  # with the prompt before it, it fits in a context of 256 tokens
            n -= 1
            yield {"text": text}
