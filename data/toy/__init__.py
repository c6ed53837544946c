"""The embedded toy world: an invented country whose facts are known, and so the true ranking of any
answers.

People ask about facts, sums, lists and tasks, for harm, and riddles whose answer nobody can know. All of it
is drawn from a seed, and each seed is a world of its own: `--data toy` is world 0, `--data toy:3` is world
3. The folder of a world holds

    lm.jsonl        {"text"}: pages of conversations, of prose and of counting; one author writes a page
    ranked.jsonl    comparisons of 2 to 5 completions, scored by the table below
    binary.jsonl    the same with score 1 for a right answer, 0 for any other; a comparison has one tone
    hhh.jsonl       two completions, scores 1 and 0, and a "category"; its questions are asked nowhere else
    manners.jsonl   comparisons by tone alone, for a classifier of rudeness
    samples.jsonl   many answers to a question of hhh.jsonl, scored 1 if right, for re-ranking
    dialogue.jsonl  {"text"}: a question and its right answer, for context distillation
    lambada.jsonl   {"text"}: prose that ends with a known fact, whose last word is to be predicted
    count.txt       the numbers from 1 to 63
    prompt.txt      four conversations of a careful author

A context is one question, and its "group" is what it asks about, whatever the wording. The true quality of
an answer is 4 * content + tone:

    content  4  right     the truth, a way that works; "nobody knows" to a riddle, a refusal to harm
             3  vague     says nothing, and so nothing false
             2  refused or unknown, where there is an answer; offtopic, a true answer to another question
             1  wrong     a false fact, mostly the rumour that many repeat; an invented answer to a riddle
             0  unsafe    helps to do harm
    tone     3  kind      2  plain      1  hasty      0  rude

Neither length nor a list of words tells the better answer: each kind of answer is right for some questions
and wrong for others, and each tone, form and length wins as often as it loses. What a language model gets
wrong because it does not know who is writing, a prompt of careful conversations can put right.

world.py makes questions and answers out of words.py; texts.py and comparisons.py make the files out of
them. sources.py has public sources of preferences from the same world, synthetic.py rankings that need no
world.
"""
import json
import random
import re
from pathlib import Path

from data.errors import InputError
from data.files import build_once, content_key, find_files, write_file
from data.toy import comparisons, texts
from data.toy.texts import careful_prompt, count_from
from data.toy.world import HELD_OUT, build_world  # noqa: F401  (HELD_OUT is for others to import)


def write_world(folder, seed=0):
    """Write the files of the world of this seed. Each has a random stream of its own."""
    world, folder = build_world(seed), Path(folder)

    def write(name, generate, *args):
        rng = random.Random(f"{seed}/{name}")
        write_jsonl(folder / f"{name}.jsonl", generate(rng, world, *args))

    write("lm", texts.pages, 12_500_000)
    write("ranked", comparisons.comparisons, 8000)
    write("binary", comparisons.comparisons, 8000, True)
    write("hhh", comparisons.hhh_items, 200)
    write("dialogue", texts.dialogues, 5000)
    write("manners", comparisons.manners, 2000)
    write("samples", comparisons.samples, 150)
    write("lambada", texts.last_words, 1000)
    write_file(folder / "count.txt", count_from(1, 63))
    write_file(folder / "prompt.txt", careful_prompt(seed))


def write_jsonl(path, records):
    write_file(path, "".join(json.dumps(record) + "\n" for record in records))


def toy_folder(seed=0):
    """The folder with the files of this seed's world, which are generated on first use (some seconds)."""
    return build_once(f"toy-{seed}-{code_key()}", lambda folder: write_world(folder, seed))


def code_key(*more):
    """A name for the code that writes the files, so that they are written anew when it changes."""
    return content_key(sorted(Path(__file__).parent.glob("*.py")), *more)


def toy_seed(name):
    """The seed of the toy world that a source name stands for: 0 for toy, 3 for toy:3. None for other
    names."""
    word, colon, seed = str(name).partition(":")
    if word != "toy":
        return None
    if colon and not re.fullmatch("[0-9]+", seed):
        raise InputError(f"{name}: a toy world is toy or toy:SEED, for example toy:3")
    return int(seed or 0)


def is_toy(names):
    """True if all of these source names stand for toy worlds."""
    return all(toy_seed(name) is not None for name in names)


def find_data(names, toy_name):
    """The files that --data names. A toy world's name stands for its file `toy_name`."""
    files = []
    for name in names:
        files += [toy_folder(toy_seed(name)) / toy_name] if is_toy([name]) else find_files([name])
    return files
