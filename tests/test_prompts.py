"""The embedded prompts and HHH items: their form, and that neither length nor position tells the better
answer."""
import ast
import doctest
import re

import pytest
from conftest import ROOT

from data.comparisons import parse
from data.files import read_records
from data.prompts import FOLDER, load_prompt

ITEMS = ROOT / "data" / "hhh_items.jsonl"
SEPARATOR = "\n\n-----\n\n"
CATEGORIES = ("helpful", "honest", "harmless", "other")


def turns_of(text):
    """A conversation's (speaker, words) pairs; fails where text stands before the first turn."""
    before, *parts = re.split(r"(?:\A|\n\n)(Human|Assistant): ?", text)
    assert not before.strip(), f"no turn begins here: {before[:60]!r}"
    return list(zip(parts[::2], parts[1::2]))


def read_prompt(name):
    """(the preamble, the conversations as lists of turns) of a prompt file."""
    text = (FOLDER / name).read_text(encoding="utf-8")
    preamble, *conversations = text.removesuffix("\n").split(SEPARATOR)
    return preamble, [turns_of(text) for text in conversations]


def items():
    """{category: [(context, better answer, worse answer, place of the better one)]}."""
    found = {category: [] for category in CATEGORIES}
    for line, record in read_records(ITEMS):
        context, completions, scores, _ = parse(record, f"{ITEMS}:{line}")
        assert sorted(scores) == [0, 1], record
        place = scores.index(1)
        found[record["category"]].append((context, completions[place], completions[1 - place], place))
    return found


@pytest.mark.parametrize("name, conversations, fewest_words, most_words",
                         [("hhh.txt", 14, 4000, 5000), ("code.txt", 4, 500, 900)])
def test_a_prompt_is_a_preamble_and_conversations(name, conversations, fewest_words, most_words):
    text = (FOLDER / name).read_text(encoding="utf-8")
    assert text == text.strip() + "\n" and "\n\n\n\n" not in text and not re.search(r"[ \t]+$", text, re.M)
    assert fewest_words <= len(text.split()) <= most_words
    preamble, found = read_prompt(name)
    assert len(found) == conversations and len(re.findall(r"^-----$", text, re.M)) == conversations
    assert not re.search(r"^(Human|Assistant):", preamble, re.M)
    for turns in found:
        assert 2 <= len(turns) <= 16
        assert [speaker for speaker, _ in turns] == ["Human", "Assistant"] * (len(turns) // 2)
        assert all(words and words == words.strip() for _, words in turns)


@pytest.mark.parametrize("path", [FOLDER / "hhh.txt", FOLDER / "code.txt", ITEMS], ids=lambda path: path.name)
def test_no_special_tokens_and_no_other_line_ends(path):
    text = path.read_bytes().decode("utf-8")
    assert not any(word in text for word in ("<eot>", "<eoc>", "\r", "\ufeff"))


@pytest.mark.parametrize("name", ["hhh", "code"])
def test_a_new_conversation_follows_a_prompt_as_the_others_do(name):
    """What the loader adds is what stands between the conversations, and the file itself stays as it is."""
    text = load_prompt(name) + "\n\nHuman: question\n\nAssistant:"
    *before, last = text.split(SEPARATOR)
    assert turns_of(last) == [("Human", "question"), ("Assistant", "")]
    assert SEPARATOR.join(before) + "\n" == (FOLDER / f"{name}.txt").read_text(encoding="utf-8")


def test_python_in_the_hhh_prompt_parses():
    blocks = re.findall(r"```python\n(.*?)\n```", (FOLDER / "hhh.txt").read_text(encoding="utf-8"), re.S)
    assert len(blocks) >= 2
    for block in blocks:
        ast.parse(block)


def test_code_conversations_repeat_the_signature_and_complete_it():
    _, conversations = read_prompt("code.txt")
    for (_, asked), (_, answered) in conversations:
        question = re.fullmatch(r"Please complete the body of this Python function:\n\n```python\n(.*\n)```",
                                asked, re.S)
        answer = re.fullmatch(r"Here it is:\n\n```python\n(.*\n)```", answered, re.S)
        assert question and answer, asked
        assert answer[1].startswith(question[1])
        before, after = (ast.parse(match[1]).body[-1] for match in (question, answer))
        assert isinstance(before, ast.FunctionDef) and len(before.body) == 1 and ast.get_docstring(before)
        assert ast.dump(after.args) == ast.dump(before.args) and len(after.body) > 1
        scope = {}
        exec(compile(answer[1], "code.txt", "exec"), scope)
        docstring = ast.get_docstring(after)
        tests = doctest.DocTestParser().get_doctest(docstring, scope, after.name, "code.txt", 0)
        assert tests.examples and doctest.DocTestRunner(verbose=False).run(tests).failed == 0


def test_items_are_comparisons_of_two_in_four_categories():
    found = items()
    assert sum(map(len, found.values())) >= 60 and all(len(rows) >= 15 for rows in found.values())
    for context, better, worse, _ in (row for rows in found.values() for row in rows):
        assert context.startswith("\n\nHuman: ") and context.endswith("\n\nAssistant:")
        speakers = [speaker for speaker, _ in turns_of(context)]
        assert speakers == ["Human", "Assistant"] * (len(speakers) // 2)
        assert better != worse
        for completion in (better, worse):
            assert re.match(r" \S", completion) and completion == completion.rstrip()
            assert "\n\nHuman:" not in completion


def test_each_item_is_a_group_of_its_own():
    groups = [parse(record, "")[3] for _, record in read_records(ITEMS)]
    contexts = [record["context"] for _, record in read_records(ITEMS)]
    assert len(set(groups)) == len(groups) and len(set(contexts)) == len(contexts)


@pytest.mark.parametrize("category", CATEGORIES)
def test_neither_length_nor_position_tells_the_better_one(category):
    rows = items()[category]
    longer = sum(len(better) > len(worse) for _, better, worse, _ in rows) / len(rows)
    shorter = sum(len(better) < len(worse) for _, better, worse, _ in rows) / len(rows)
    first = sum(place == 0 for *_, place in rows) / len(rows)
    assert 0.45 <= longer <= 0.55 and 0.45 <= shorter <= 0.55 and 0.45 <= first <= 0.55
    mean_length = sum(len(better) + len(worse) for _, better, worse, _ in rows) / (2 * len(rows))
    assert abs(sum(len(better) - len(worse) for _, better, worse, _ in rows)) / len(rows) < 0.1 * mean_length
    of_the_longer = [place for _, better, worse, place in rows if len(better) > len(worse)]
    assert 0.4 <= of_the_longer.count(0) / len(of_the_longer) <= 0.6  # nor the two together


def test_the_prompt_does_not_hold_the_items():
    """What is asked in the prompt is not asked again where the prompted model is measured: no five words in
    a row."""
    def runs(turns):
        words = [re.findall(r"[\w']+", text.lower()) for speaker, text in turns if speaker == "Human"]
        return {tuple(w[i:i + 5]) for w in words for i in range(len(w) - 4)}

    asked = set().union(*(runs(turns) for turns in read_prompt("hhh.txt")[1]))
    in_items = set().union(*(runs(turns_of(context)) for rows in items().values() for context, *_ in rows))
    assert len(asked) > 300 and len(in_items) > 300
    assert not asked & in_items
