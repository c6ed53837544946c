"""Comparisons that need a sandbox or a model: code correctness, and human texts against a model's samples."""
import random
from argparse import Namespace

import pytest
from conftest import convert, load, make_comparisons, read_jsonl, run_refused, run_well, write_jsonl

from data.comparisons import hash64
from data.errors import InputError
from data.sources.count import Count
from data.toy.words import TONES
from data.toy.world import HELD_OUT, answer, build_world, open_turn
from evals import correctness, human_vs_model, toy_answers

# Problems of MBPP and HumanEval
ADD = {"task_id": 1, "text": "Add two numbers.", "test_setup_code": "",
       "test_list": ["assert add(1, 2) == 3", "assert add(0, 0) == 0"],
       "code": "def add(a, b):\n  # a comment\n  total = (a+b)\n  return total"}
WEAKLY_TESTED = {"task_id": 2, "text": "Clip at a limit.", "test_setup_code": "",
                 "test_list": ["assert clip(5, 3) == 3"],
                 "code": "def clip(x, limit):\n    if x > limit:\n        return limit\n    return x"}
WRONG = ADD | {"task_id": 3, "test_list": ["assert add(1, 2) == 4"]}
ALWAYS_RIGHT = ADD | {"task_id": 4, "test_list": ["assert add"]}
HUMANEVAL = {"task_id": "HumanEval/0", "prompt": 'BASE = 1\n\ndef up(x):\n    """ One more. """\n',
             "entry_point": "up", "canonical_solution": "    return x + BASE\n",
             "test": "def check(candidate):\n    assert candidate(1) == 2\n"}
MODULE = '''"""A module."""
import sys


def half(x):
    """
    >>> half(4)
    2.0
    >>> half("a")
    Traceback (most recent call last):
        ...
    TypeError: not a number
    """
    if not isinstance(x, int):
        raise TypeError("not a number")
    return x / divisor()


def divisor():
    return 2


class Counter:
    start = 5

    @classmethod
    def first(cls):
        r"""The first one, of
        >>> Counter.first()  # doctest: +SKIP
        7
        >>> Counter.first()
        5
        """
        return cls.start


try:
    from nowhere import half
except ImportError:
    half = round  # stands for a version in C
if __name__ == "__main__":
    sys.exit(1)
'''


def comparisons_of(source, raw, *flags, **more):
    """(comparisons, Count) of what `source` makes of a raw file, with flags as data.prepare takes them."""
    return convert(source, source.find_raw([raw]), *flags, **more)


def passes(record, tests):
    """For each completion of a record 1 if it passes the tests, else 0. These harmless programs run here."""
    marks = []
    for completion in record["completions"]:
        try:
            exec(record["context"] + completion + "\n" + "\n".join(tests), {})
            marks.append(1)
        except Exception:
            marks.append(0)
    return marks


def completions_of(record, score):
    return [text for text, its_score in zip(record["completions"], record["scores"]) if its_score == score]


def groups(records):
    return [record["group"] for record in records]


# ------------------------------------------------------------------------------------------------------------
# Code correctness


def test_changed_bodies_are_labelled_by_the_tests_alone(tmp_path, capsys):
    raw = write_jsonl(tmp_path / "mbpp.jsonl", [ADD, WEAKLY_TESTED])
    found, count = comparisons_of(correctness, raw, "--n", 9)
    assert groups(found) == ["MBPP/1", "MBPP/2"] and count.total == 2
    for record, problem in zip(found, (ADD, WEAKLY_TESTED)):
        assert record["scores"] == passes(record, problem["test_list"])
        assert 0 < sum(record["scores"]) < len(record["scores"]) == len(set(record["completions"])) <= 9
    assert sum(found[1]["scores"]) > 1  # changes pass a weak test as well
    assert "bodies of 2 functions, " in capsys.readouterr().out


def test_the_solution_is_among_the_bodies_and_looks_like_them(tmp_path):
    raw = write_jsonl(tmp_path / "mbpp.jsonl", [ADD | {"task_id": i} for i in range(4)])
    found, _ = comparisons_of(correctness, raw, "--n", 2)
    solution = "\n    total = a + b\n    return total"
    places = {record["completions"].index(solution) for record in found}
    assert len(places) > 1  # the order is random
    for record in found:
        assert all("#" not in text and text.startswith("\n    ") for text in record["completions"])
    assert found == comparisons_of(correctness, raw, "--n", 2)[0]
    assert found != comparisons_of(correctness, raw, "--n", 2, "--seed", 1)[0]


def test_functions_without_a_pair_are_counted(tmp_path):
    raw = write_jsonl(tmp_path / "mbpp.jsonl", [ALWAYS_RIGHT, WRONG, ADD])
    found, count = comparisons_of(correctness, raw, "--n", 3)
    assert groups(found) == ["MBPP/1"] and count.total == 3
    assert count.dropped == {"functions whose own solution fails their tests": 1,
                             "functions with only correct bodies": 1}
    found, count = comparisons_of(correctness, raw, "--n", 2, "--keep_all")
    assert groups(found) == ["MBPP/4", "MBPP/1"] and found[0]["scores"] == [1, 1]
    assert count.dropped == {"functions whose own solution fails their tests": 1}


def test_humaneval_is_asked_as_code_or_as_the_papers_dialogue(tmp_path):
    raw = write_jsonl(tmp_path / "humaneval.jsonl", [HUMANEVAL])
    (plain,), _ = comparisons_of(correctness, raw, "--n", 3)
    assert plain["context"] + "\n" == HUMANEVAL["prompt"]
    assert "\n    return x + BASE" in plain["completions"] and sum(plain["scores"]) == 1
    (dialogue,), _ = comparisons_of(correctness, raw, "--n", 3, "--format", "prompt")
    assert dialogue.pop("context").startswith("\n\nHuman: Please complete")
    assert dialogue == {name: value for name, value in plain.items() if name != "context"}


def test_functions_of_a_module_are_tested_by_the_examples_in_their_docstrings(tmp_path):
    raw = tmp_path / "tools.py"
    raw.write_text(MODULE)
    (half, first), count = comparisons_of(correctness, raw, "--n", 20)
    assert groups([half, first]) == ["tools.half", "tools.Counter.first"] and not count.dropped
    assert half["context"].startswith('def half(x):\n    """\n    >>> half(4)')
    assert half["context"].endswith('number\n    """')
    assert first["context"].startswith('@classmethod\ndef first(cls):\n    r"""The first')
    assert completions_of(half, score=1) == [
        "\n    if not isinstance(x, int):\n        raise TypeError('not a number')\n    return x / divisor()"]
    assert completions_of(first, score=1) == ["\n    return cls.start"]


def test_stdlib_names_the_standard_library_without_its_tests():
    *library, other = correctness.find_raw(["stdlib", "other.py"])
    by_name = {path.name: path for path in library}
    assert {"statistics.py", "heapq.py", "difflib.py"} <= set(by_name) and other == "other.py"
    assert not any("test" in path.parts for path in library)
    (merge,), _ = comparisons_of(correctness, by_name["heapq.py"], "--n", 4)
    assert merge["group"] == "heapq.merge" and 0 in merge["scores"] and 1 in merge["scores"]


def test_samples_of_a_model_are_labelled_by_the_tests(tmp_path, lm, monkeypatch):
    raw = write_jsonl(tmp_path / "mbpp.jsonl", [ADD, ADD | {"task_id": 5}])
    flags = "--source", "model", "--model", lm, "--n", 4, "--max_new", 6
    found, count = comparisons_of(correctness, raw, *flags, "--keep_all")  # of a model that knows no Python
    assert [record["scores"] for record in found] == [[0] * 4] * 2
    assert any(text.strip() for text in found[0]["completions"])

    asked = []  # the prompts

    def samples(subject, texts, args, stops, unit):
        asked.extend(texts)
        return [["    return"] * 4,
                ["\n    return a + b\n\ndef more(): pass", "    return a + b\n", "    return a - b", "\n"]]
    monkeypatch.setattr(correctness, "samples", samples)
    (record,), count = comparisons_of(correctness, raw, *flags)
    assert asked == [record["context"]] * 2 and record["group"] == "MBPP/5"
    assert completions_of(record, score=1) == ["\n    return a + b"]
    assert completions_of(record, score=0) == ["\n    return a - b"]
    assert count.dropped == {"samples that are blank or repeat one of the same function": 5,
                             "functions with only incorrect bodies": 1}
    found, _ = comparisons_of(correctness, raw, *flags, "--keep_all")
    assert [sorted(record["scores"]) for record in found] == [[0, 0, 0, 0], [0, 0, 1, 1]]


def test_bad_input_to_code_correctness_is_refused(tmp_path, lm, pm):
    raw = write_jsonl(tmp_path / "mbpp.jsonl", [ADD])
    for flags, words in ((["--source", "model"], "needs --model DIR"),
                         (["--model", lm], "--source mutate has no use"),
                         (["--source", "model", "--model", pm], "a language model is needed")):
        with pytest.raises(InputError, match=words):
            comparisons_of(correctness, raw, *flags)
    with pytest.raises(InputError, match="mbpp.jsonl:2: .*do not agree"):
        comparisons_of(correctness, write_jsonl(tmp_path / "mbpp.jsonl", [ADD, ADD | {"test_list": []}]))
    module = 'def f(x):\n    """\n    >>> f("<eot>")\n    1\n    """\n    return 1\n'
    (tmp_path / "special.py").write_text(module)
    assert comparisons_of(correctness, tmp_path / "special.py")[1].dropped == {
        "functions that hold <eot> or <eoc>, our special tokens": 1}
    (tmp_path / "broken.py").write_text("x = 1\ndef f(:\n")
    with pytest.raises(InputError, match="broken.py:2: not a Python program"):
        comparisons_of(correctness, tmp_path / "broken.py")
    broken = HUMANEVAL | {"task_id": "bad", "prompt": "def up(:\n"}
    raw = write_jsonl(tmp_path / "humaneval.jsonl", [HUMANEVAL, broken])
    found, count = comparisons_of(correctness, raw, "--n", 3, max_bad=0.5)
    assert len(found) == 1 and count.n_bad == 1
    assert "humaneval.jsonl: bad: prompt and solution" in count.places[0]


# ------------------------------------------------------------------------------------------------------------
# Human against model


def test_the_best_human_text_is_compared_with_a_models_sample(tmp_path, lm, comparisons_file, capsys):
    asked = read_jsonl(comparisons_file)
    flags = "--model", lm, "--max_new", 12
    found, count = comparisons_of(human_vs_model, comparisons_file, *flags, "--contexts", 6)
    assert len(found) == count.total == 6 and not count.dropped and "6 pairs; " in capsys.readouterr().out
    for record, comparison in zip(found, asked):
        assert record["context"] == comparison["context"] and record["group"] == comparison["group"]
        best, sample = record["completions"]
        assert comparison["scores"][comparison["completions"].index(best)] == max(comparison["scores"])
        assert record["scores"] == [1, 0] and sample and sample not in comparison["completions"]
    assert found == comparisons_of(human_vs_model, comparisons_file, *flags, "--contexts", 6)[0]
    assert len(load(tmp_path, found)) == 6
    twice = write_jsonl(tmp_path / "twice.jsonl", asked[:1] * 2)
    one, other = comparisons_of(human_vs_model, twice, *flags)[0]
    assert one["context"] == other["context"] and one["completions"][1] != other["completions"][1]


def test_useless_samples_are_counted(tmp_path, lm, monkeypatch, capsys):
    dialogue = "\n\nHuman: D\n\nAssistant:"
    drawn = {"A": [" ", " good"], "B": ["good\n", " new"], "C": [" new", " new"], dialogue: [" one", " two"]}
    raw = write_jsonl(tmp_path / "pairs.jsonl", [
        {"prompt": context, "chosen": " good", "rejected": " bad", "group": f"of {context}"}
        for context in drawn])
    stops = {}  # of each context

    def samples(subject, contexts, args, given, unit):
        stops.update(zip(contexts, given))
        return [drawn[context] for context in contexts]
    monkeypatch.setattr(human_vs_model, "samples", samples)
    found, count = comparisons_of(human_vs_model, raw, "--model", lm, "--n", 2, "--max_new", 4)
    assert [(record["group"], record["completions"], record["scores"]) for record in found] == [
        ("of B", [" good", " new"], [1, 0]), ("of C", [" good", " new"], [1, 0]),
        (f"of {dialogue}", [" good", " one", " two"], [1, 0, 0])]
    assert count.dropped == {
        "samples that are empty": 1, "samples equal to the human text": 2,
        "samples drawn before for the same context": 1, "comparisons left without a sample": 1}
    assert [context for context in drawn if stops[context]] == [dialogue]  # its samples end where a turn does
    assert "4 pairs; characters: human 5 on average, model 4" in capsys.readouterr().out


def test_contexts_that_hold_a_special_token_are_left_out(tmp_path, lm):
    records = [{"context": context, "completions": ["a"], "scores": [1]} for context in ("<eot>", "Now:")]
    raw = write_jsonl(tmp_path / "raw.jsonl", records)
    found, count = comparisons_of(human_vs_model, raw, "--model", lm, "--max_new", 5)
    assert [record["context"] for record in found] == ["Now:"]
    assert count.dropped == {"records that hold <eot> or <eoc>, our special tokens": 1}


def test_bad_input_to_human_against_model_is_refused(tmp_path, lm, pm):
    raw = write_jsonl(tmp_path / "some.jsonl", [*make_comparisons(3), {"prompt": "no sides"}])
    for flags, words in ((["--model", pm], "a language model is needed"),
                         (["--model", lm, "--max_new", 4], 'some.jsonl:4: no "chosen"')):
        with pytest.raises(InputError, match=words):
            comparisons_of(human_vs_model, raw, *flags)
    found, count = comparisons_of(human_vs_model, raw, "--model", lm, "--max_new", 4, max_bad=0.5)
    assert len(found) == 3 and count.n_bad == 1


# ------------------------------------------------------------------------------------------------------------
# The script


def test_prepare_writes_both_kinds(tmp_path, lm, comparisons_file):
    code, samples = tmp_path / "code.jsonl", tmp_path / "model.jsonl"
    raw = write_jsonl(tmp_path / "mbpp.jsonl", [ADD])
    printed = run_well("data/prepare.py", "code-correctness", "--raw", raw, "--n", 3, "--out", code)
    assert "code.jsonl: 1 comparisons of 1 records read" in printed
    assert "2 changed bodies of 1 functions" in printed
    args = ("data/prepare.py", "human-vs-model", "--raw", comparisons_file)
    printed = run_well(*args, "--model", lm, "--max_new", 4, "--contexts", 3, "--out", samples)
    assert "model.jsonl: 3 comparisons of 3 records read" in printed
    line = run_refused(*args, "--model", tmp_path / "none", "--out", tmp_path / "none.jsonl")
    assert "no such checkpoint folder" in line
    assert sorted(path.name for path in tmp_path.iterdir()) == ["code.jsonl", "mbpp.jsonl", "model.jsonl"]


# ------------------------------------------------------------------------------------------------------------
# Answers to a toy world's questions


def test_right_answers_are_those_that_the_world_draws_as_right_in_every_tone():
    world, rng = build_world(12), random.Random(0)
    questions = [question for kind in ("fact", "riddle", "harm", "task", "sum") for question in world.held[kind]]
    for question in rng.sample(questions, 200):
        right = toy_answers.right_answers(question)
        for content in ("right", "wrong", "offtopic", "vague"):
            drawn = {answer(rng, world, question, content, tone)[0] for tone in TONES}
            assert drawn <= right if content == "right" else not drawn & right


def test_a_models_answers_are_marked_by_the_world(tmp_path, monkeypatch):
    """The stand-in for sampling answers each question rightly, wrongly, and with nothing."""
    world, rng = build_world(3), random.Random(0)
    asked = {open_turn(question): question for kind in world.held.values() for question in kind}

    def say(subject, contexts, args, **settings):
        return [[" " + answer(rng, world, asked[context], content, "kind")[0]
                 for content in ("right", "wrong")] + [""] for context in contexts]
    monkeypatch.setattr(toy_answers, "samples", say)
    monkeypatch.setattr(toy_answers, "load_subject", lambda *args: None)
    found = list(toy_answers.records(toy_answers.find_raw(["toy:3"]), Namespace(named=["toy:3"], contexts=None),
                                     Count()))
    assert len(found) == 150 and all(record["scores"] == [1, 0, 0] for record in found)
    assert all(hash64(record["group"]) < HELD_OUT * 2**64 for record in found)


def test_prepare_asks_a_model_the_questions_of_a_toy_world(tmp_path, lm):
    args = ("data/prepare.py", "toy-answers", "--model", lm, "--n", 3, "--max_new", 4, "--out", tmp_path / "a.jsonl")
    printed = run_well(*args, "--raw", "toy:3")
    assert "of 450 samples are right" in printed and "150 comparisons of 150 records read" in printed
    assert "asks the questions of a toy world; give toy or toy:SEED" in run_refused(*args, "--raw", "mine.jsonl")
