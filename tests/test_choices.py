"""evaluate.py's multiple choice, last words, text loss, toxicity, samples, judging and re-ranking: against
forwards of each sequence by itself."""
import argparse
import json
import sys

import numpy as np
import pytest
import torch
from conftest import (BYTES, DATA, Operators, alone, evaluate, make_comparisons, make_texts, read_jsonl,
                      read_meta, run, run_refused, run_well, strict_output, write_jsonl)

import checkpoint
from data.errors import InputError
from data.packing import RowFormat, make_row
from data.prompts import SEPARATOR, fit_prompt, load_prompt
from evals import choices, toxicity
from evals import pm as scoring

PROMPT = ("Two friends talk.\n\n-----\n\nHuman: Who sleeps?\n\nAssistant: A dog."
          "\n\n-----\n\nHuman: Who sings?\n\nAssistant: An owl.")


@pytest.fixture(scope="module")
def prompt_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("prompt") / "prompt.txt"
    path.write_text(PROMPT + "\n")
    return path


TASK = {"kind": [("Who waits?", {"The miller waits.": 1, "A dog": 0}),
                 ("Where?", {"Up there.": 0, "At home, by the river.": 1}),
                 ("Who waits?", {"A dog": 0, "My friend waits.": 1})],
        "other": [("What now?", {"Nothing.": 1, "My friend sings.": 0})]}


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    """BIG-bench's form, each category in a folder of its name."""
    folder = tmp_path_factory.mktemp("hhh")
    for category, examples in TASK.items():
        examples = [{"input": question, "target_scores": answers} for question, answers in examples]
        (folder / category).mkdir()
        task = {"name": "x", "examples": examples}
        (folder / category / "task.json").write_text(json.dumps(task, indent=1))
    return folder


# ------------------------------------------------------------------------------------------------------------
# Multiple choice


@pytest.mark.parametrize("micro_tokens", [200, 10_000])
@pytest.mark.parametrize("prompted", [False, True])
def test_hhh_scores_equal_those_of_whole_sequences(lm, task, prompt_file, tmp_path, prompted, micro_tokens):
    model, tokenizer, _ = checkpoint.load(lm)
    flags = ("--prompt", prompt_file) if prompted else ()
    figures, _ = evaluate("hhh", "--model", lm, "--data", task, "--out", tmp_path / "items.jsonl",
                          "--ctx", 400, "--micro_tokens", micro_tokens, *flags)
    prompt = [tokenizer.eot, *tokenizer.encode(PROMPT + SEPARATOR)] if prompted else []

    def log_p(context, completion):
        completion = tokenizer.encode(completion)
        ids = np.concatenate([prompt, tokenizer.encode(context), completion]).astype(np.int64)
        with torch.no_grad():
            p = model.logits(model(torch.from_numpy(ids)[None])[0]).log_softmax(-1)
        return [p[i - 1, ids[i]].item() for i in range(len(ids) - len(completion), len(ids))]

    right = []
    for item in read_jsonl(tmp_path / "items.jsonl"):
        given = [log_p(item["context"], c) for c in item["completions"]]
        empty = [log_p("\n\nHuman:\n\nAssistant:", c) for c in item["completions"]]
        assert item["sum"] == pytest.approx([sum(x) for x in given], abs=1e-4)
        assert item["mean"] == pytest.approx([sum(x) / len(x) for x in given], abs=1e-4)
        assert item["mi"] == pytest.approx([sum(x) - sum(e) for x, e in zip(given, empty)], abs=2e-4)
        right.append(np.argmax(item["mi"]) == np.argmax(item["scores"]))
    assert figures["n"] == 4 and figures["accuracy_mi"] == pytest.approx(np.mean(right))
    names = {"accuracy_mi_kind", "accuracy_mi_other", "accuracy_longest_kind", "accuracy_no_context"}
    assert names <= set(figures)


def test_groups_of_hhh_are_questions(lm, task):
    """One question may stand in several examples; these are one observation for the standard error."""
    assert evaluate("hhh", "--model", lm, "--data", task)[0]["groups"] == 3


def test_a_preference_model_scores_by_rewards(pm, task, tmp_path):
    model, tokenizer, _ = checkpoint.load(pm)
    figures, _ = evaluate("hhh", "--model", pm, "--data", task, "--out", tmp_path / "items.jsonl")
    for item in read_jsonl(tmp_path / "items.jsonl"):
        with torch.no_grad():
            rewards = [alone(model, tokenizer, item["context"], c)[0] for c in item["completions"]]
        assert item["reward"] == pytest.approx(rewards, abs=1e-4)
    assert "accuracy_reward" in figures and "accuracy_mi" not in figures


def test_choices_of_equal_score_have_no_right_one_and_are_left_out(lm, tmp_path):
    items = [{"context": f"Q{i}", "completions": [" a", " b"], "scores": [1, int(i > 2)]} for i in range(8)]
    figures, printed = evaluate("choice", "--model", lm, "--data", write_jsonl(tmp_path / "equal.jsonl", items))
    assert figures["n"] == 3 and figures["chance"]["accuracy"] == 0.5
    assert "left out: 5 items whose choices all have the same score" in printed


def test_our_own_items_are_the_default(lm):
    figures, printed = evaluate("hhh", "--model", lm, "--ctx", 2048)
    assert figures["n"] >= 60
    assert all(f"accuracy, {category}" in printed for category in ("helpful", "honest", "harmless", "other"))


def test_truthfulqa_by_hand():
    truth, score = np.array([2.0, 1, 0, 0]), np.log([0.1, 0.4, 0.3, 0.2])
    assert choices.mass(truth, score) == pytest.approx(0.5)
    assert choices.hit(truth[truth != 1], score[truth != 1]) == 0
    assert choices.hit(np.array([1, 0, 0]), np.array([1.0, 1.0, 0.0])) == 0.5


def test_truthfulqa_reads_the_published_form(lm, tmp_path):
    path = tmp_path / "TruthfulQA.csv"
    path.write_text('Type,Category,Question,Best Answer,Correct Answers,Incorrect Answers,Source\n'
                    'A,B,"Who, really?",Nobody,Nobody; No one at all,"A dog; The miller, of course",x\n'
                    'A,B,Where?,At home,Home; At home.,Up there,x\n')
    first, second = choices.read_items("truthfulqa", [path])[0]
    # All end with a period, as in TruthfulQA's own code.
    assert first["completions"] == [" A dog.", " The miller, of course.", " Nobody.", " No one at all."]
    assert first["scores"] == [0, 0, 2, 1]
    assert second["scores"] == [0, 1, 2] and second["completions"] == [" Up there.", " Home.", " At home."]
    figures, printed = evaluate("truthfulqa", "--model", lm, "--data", path)
    assert figures["n"] == 2 and 0 < figures["MC2_sum"] < 1 and figures["MC1_mi"] in (0, 0.5, 1)
    assert "truthfulqa_mc1" in printed and "truthfulqa_mc2" in printed and "harness" not in figures


HELLASWAG = [
    {"activity_label": "Cooking", "ctx_a": "A cat [header] waits.", "ctx_b": "the cat", "ctx": "unused",
     "endings": ["sings.", "it [step] sleeps."], "label": 1},
    {"activity_label": "Waiting", "ctx": "A dog [title] waits", "endings": ["a", "b"], "label": "0"}]


def test_hellaswag_is_asked_as_the_harness_does(tmp_path):
    first, second = choices.read_items("hellaswag", [write_jsonl(tmp_path / "h.jsonl", HELLASWAG)])[0]
    assert first["context"] == "Cooking: A cat waits. The cat"
    assert first["completions"] == [" sings.", " it sleeps."] and first["scores"] == [0, 1]
    assert second["context"] == "Waiting: A dog. waits" and second["scores"] == [1, 0]


def test_a_heading_that_never_ends_takes_no_long_time():
    record = HELLASWAG[1] | {"ctx": "[" * 200_000, "activity_label": "[a\n] [b] [[c] [d"}
    item = choices.hellaswag(record, "file:1")
    assert item["context"] == "[a\n]  [d: " + "[" * 200_000


def test_hellaswag_is_scored_per_character_too(lm, tmp_path):
    """acc_norm of lm-evaluation-harness: the log-prob divided by the characters of the ending."""
    path = write_jsonl(tmp_path / "h.jsonl", HELLASWAG)
    figures, printed = evaluate("hellaswag", "--model", lm, "--data", path, "--out", tmp_path / "items.jsonl")
    items = read_jsonl(tmp_path / "items.jsonl")
    for item in items:
        lengths = [len(ending.removeprefix(" ")) for ending in item["completions"]]
        assert item["norm"] == pytest.approx([total / n for total, n in zip(item["sum"], lengths)])
    accuracy = {rule: np.mean([np.argmax(item[rule]) == np.argmax(item["scores"]) for item in items])
                for rule in ("sum", "norm")}
    assert figures["accuracy_norm"] == accuracy["norm"]
    assert figures["harness"] == {"hellaswag": {"acc": accuracy["sum"], "acc_norm": accuracy["norm"]}}
    assert "lm-evaluation-harness: hellaswag has acc =" in printed
    flags = ("--prompt", "toy", "--prompt_tokens", 150, "--ctx", 300)
    assert "harness" not in evaluate("hellaswag", "--model", lm, "--data", path, *flags)[0]


@pytest.mark.parametrize("benchmark, line, words", [
    ("hellaswag", HELLASWAG[1] | {"label": 9}, "the label 9 is no number of"),
    ("hellaswag", HELLASWAG[1] | {"label": -1}, "the label -1 is no number of"),
    ("hellaswag", HELLASWAG[1] | {"label": None}, '"label" must be a whole number or a text'),
    ("hellaswag", HELLASWAG[1] | {"endings": "abcd"}, '"endings" must be a list'),
    ("hellaswag", HELLASWAG[1] | {"endings": ["a", 2]}, '"endings" must be a list, each item a text'),
    ("hellaswag", HELLASWAG[1] | {"activity_label": None}, '"activity_label" must be a text'),
    ("hellaswag", HELLASWAG[1] | {"ctx": "He <eot>"}, "the text holds <eot>"),
    ("lambada", {"text": "word"}, 'the "text" must have several words'),
    ("choice", {"context": "", "completions": ["a"], "scores": [1], "category": 5}, '"category" must be')])
def test_records_that_cannot_be_scored_are_named(lm, tmp_path, benchmark, line, words):
    good = {"hellaswag": HELLASWAG[0], "lambada": {"text": "two words"},
            "choice": {"context": "", "completions": ["a", "b"], "scores": [1, 0]}}[benchmark]
    path = write_jsonl(tmp_path / "data.jsonl", [good, line])
    line = run_refused("evaluate.py", benchmark, "--model", lm, "--data", path)
    assert f"error: {path}:2: " in line and words in line


def test_half_a_surrogate_pair_is_replaced(lm, tmp_path):
    record = {"context": "a\ud800", "completions": ["b", "\udfff"], "scores": [1, 0], "category": "c\ud800"}
    path = write_jsonl(tmp_path / "data.jsonl", [record, record | {"category": "\ud83d\ude00"}])
    (first, second), _ = choices.read_items("choice", [path])
    assert first["context"] == "a\ufffd" and first["completions"] == ["b", "\ufffd"]
    assert first["category"] == "c\ufffd" and second["category"] == "😀"
    assert "c\ufffd" in run_well("evaluate.py", "choice", "--model", lm, "--data", path, before=strict_output)


@pytest.mark.parametrize("text, words", [
    ('{"examples": 5}', 'task.json: "examples" must be a list'),
    ('{"examples": [7]}', 'task.json: "examples" must be a list'),
    ('{"examples": [{"input": 5, "target_scores": {"a": 1}}]}', 'task.json:1: "input" must be a text'),
    ('{"examples": [{"input": "Who?", "target_scores": {"a": "x"}}]}', "task.json:1: a score must be"),
    ('{"examples": [{"input": "Who?"}]}', 'task.json:1: no "chosen"')])
def test_tasks_that_cannot_be_read_are_named(tmp_path, text, words):
    (tmp_path / "task.json").write_text(text)
    with pytest.raises(InputError, match=words):
        choices.read_items("hhh", [tmp_path / "task.json"])


@pytest.mark.skipif(not DATA.exists(), reason="published data")
def test_the_published_files_are_read():
    tasks = sorted((DATA / "hhh_alignment").glob("*/task.json"))
    assert [len(choices.read_items("hhh", [path])[0]) for path in tasks] == [48, 51, 29, 37]
    assert len({item["group"] for item in choices.read_items("hhh", tasks)[0]}) == 80
    items, _ = choices.read_items("truthfulqa", [DATA / "truthfulqa" / "TruthfulQA.csv"])
    assert len(items) == 653
    assert all(max(item["scores"]) == 2 and min(item["scores"]) == 0 for item in items)
    for benchmark, path, n in (("lambada", "lambada/lambada_test.jsonl", 4153),
                               ("hellaswag", "hellaswag/hellaswag_val.jsonl.xz", 8829)):
        assert len(choices.read_items(benchmark, [DATA / path])[0]) == n


# ------------------------------------------------------------------------------------------------------------
# Last words and text


def test_lambada_is_greedy_and_sums_the_words_log_probs(lm, tmp_path):
    model, tokenizer, _ = checkpoint.load(lm)
    path = write_jsonl(tmp_path / "lambada.jsonl", make_texts(20))
    figures, _ = evaluate("lambada", "--model", lm, "--data", path, "--out", tmp_path / "items.jsonl")
    items = read_jsonl(tmp_path / "items.jsonl")
    for item, record in zip(items, read_jsonl(path), strict=True):
        n = len(record["text"].rsplit(" ", 1)[1]) + 1  # tokens of the word and the space before it
        ids = tokenizer.encode(record["text"]).astype(np.int64)
        ids = torch.from_numpy(ids)[-191:]  # a context is cut to what fits with an <eoc>
        with torch.no_grad():
            logits = model.logits(model(ids[None])[0])[-n - 1:-1]
        assert item["right"] == bool((logits.argmax(-1) == ids[-n:]).all())
        log_prob = logits.log_softmax(-1).gather(1, ids[-n:, None]).sum().item()
        assert item["log_prob"] == pytest.approx(log_prob, abs=1e-4)
    perplexity = np.exp(-np.mean([item["log_prob"] for item in items]))
    assert figures["n"] == 20 and figures["perplexity"] == pytest.approx(perplexity)
    theirs = {"acc": figures["accuracy"], "perplexity": figures["perplexity"]}
    assert figures["harness"] == {"lambada_openai": theirs}


def test_text_loss_is_that_of_the_training_script(lm, text_file):
    last = read_meta(lm)["metrics"]
    figures, printed = evaluate("lm", "--model", lm, "--data", text_file)
    assert "held-out documents only" in printed
    assert figures["loss"] == pytest.approx(last["loss"], rel=0.02)  # windows begin elsewhere
    flags = ("--prompt", "toy", "--prompt_tokens", 150, "--ctx", 300)
    assert evaluate("lm", "--model", lm, "--data", text_file, *flags)[0]["loss"] != figures["loss"]


@pytest.mark.parametrize("rule", ["reward", "mean", "sum", "word"])
def test_nothing_is_searched_for_between_row_and_score(pm, rule):
    """Nor is anything computed in 64-bit floats, which Apple's GPUs do not have."""
    model, tokenizer, _ = checkpoint.load(pm)
    texts = [[tokenizer.encode(text) for text in (r["context"], *r["completions"])]
             for r in make_comparisons(6)]
    predict = None if rule == "reward" else "all"
    row = make_row(scoring.tokenised_comparisons(texts), range(6), RowFormat(192, tokenizer), predict=predict)
    with torch.no_grad(), Operators() as operators:
        hidden = model(row.tokens, row.layout, only_ends=rule == "reward")
        if rule == "word":
            choices.word_scores(model, hidden, row)
        else:
            scoring.completion_scores(model, hidden, row, rule)
    assert operators.calls and not operators.waiting() and not operators.making_float64()


# ------------------------------------------------------------------------------------------------------------
# Prompts and samples


def test_a_prompt_is_shortened_by_whole_conversations():
    text = PROMPT + SEPARATOR
    size = len(BYTES.encode(text))
    shorter = "Two friends talk.\n\n-----\n\nHuman: Who sings?\n\nAssistant: An owl.\n\n-----"
    assert fit_prompt(text, BYTES, size) == text
    assert fit_prompt(text, BYTES, size - 1) == shorter
    assert fit_prompt(text, BYTES, 40) == "Two friends talk.\n\n-----"
    bare = "\n\nHuman: a\n\nAssistant: b\n\n-----\n\nHuman: c\n\nAssistant: d\n\n-----"
    assert fit_prompt(bare, BYTES, 40) == "\n\nHuman: c\n\nAssistant: d\n\n-----"
    for prompt, too_few in ((text, 5), (bare, 20)):
        with pytest.raises(InputError, match="--prompt_tokens"):
            fit_prompt(prompt, BYTES, too_few)


def test_a_prompt_file_may_end_with_its_separator(tmp_path, prompt_file):
    again = tmp_path / "again.txt"
    again.write_text(PROMPT + "\n\n-----\n\n")
    assert load_prompt(again) == load_prompt(prompt_file) == PROMPT + SEPARATOR


@pytest.mark.parametrize("flags, words", [
    (("--prompt", "none.txt"), "none.txt: no such prompt file"),
    (("--prompt", "hhh"), "leave no room in a context of 192; give --prompt_tokens"),
    (("--prompt", "toy", "--prompt_tokens", "3"),
     "--prompt_tokens 3: even the prompt's last conversation takes")])
def test_prompts_that_do_not_work(lm, task, flags, words):
    assert words in run_refused("evaluate.py", "hhh", "--model", lm, "--data", task, *flags)


def test_samples_behind_a_prompt_depend_on_the_seed_and_their_place_alone(lm, prompt_file, tmp_path):
    contexts = ["\n\nHuman: Who waits?\n\nAssistant:", "\n\nHuman: Where?\n\nAssistant:"]
    data = write_jsonl(tmp_path / "contexts.jsonl", [
        {"context": context, "completions": ["a"], "scores": [0]} for context in contexts])

    def draw(*flags):
        figures, _ = evaluate("sample", "--model", lm, "--data", data, "--prompt", prompt_file, "--n", 3,
                              "--max_new", 20, "--ctx", 300, "--out", tmp_path / "out.jsonl", *flags)
        items = read_jsonl(tmp_path / "out.jsonl")
        assert figures["contexts"] == len(items) and figures["samples"] == 3 * len(items)
        return items

    items = draw()
    assert [item["context"] for item in items] == contexts
    assert all(len(item["completions"]) == 3 for item in items)
    assert items == draw() and items[:1] == draw("--contexts", 1)


def test_toxicity_is_read_from_a_binary_preference_model(lm, comparisons_file, tmp_path):
    run_well("train_pm.py", "--init", lm, "--data", comparisons_file, "--objective", "binary", "--steps", 2,
             "--batch", 8, "--out", tmp_path / "scorer")
    for line, words in ((b"caf\xe9", "not UTF-8 text"), (b"<eot>", "the text holds <eot>")):
        (tmp_path / "bad.txt").write_bytes(b"The cat\n" + line)
        flags = ("--model", lm, "--scorer", tmp_path / "scorer", "--data", tmp_path / "bad.txt")
        assert f"bad.txt:2: {words}" in run_refused("evaluate.py", "toxicity", *flags)
    (tmp_path / "prompts.txt").write_text("The cat\n\nA dog\n")
    figures, _ = evaluate("toxicity", "--model", lm, "--data", tmp_path / "prompts.txt",
                          "--scorer", tmp_path / "scorer", "--n", 3, "--max_new", 8,
                          "--out", tmp_path / "items.jsonl")
    model, tokenizer, _ = checkpoint.load(tmp_path / "scorer")
    items = read_jsonl(tmp_path / "items.jsonl")
    for item in items:
        with torch.no_grad():
            rewards = [alone(model, tokenizer, item["prompt"], c)[0] for c in item["continuations"]]
        assert item["toxicity"] == pytest.approx([1 / (1 + np.exp(r)) for r in rewards], abs=1e-4)
    scores = np.array([item["toxicity"] for item in items])
    assert figures["mean"] == pytest.approx(scores.mean())
    assert figures["expected_maximum"] == pytest.approx(scores.max(1).mean())
    assert figures["above_half"] == pytest.approx((scores > 0.5).mean())
    assert figures["any_half"] == pytest.approx((scores >= 0.5).any(1).mean())


def test_toxicity_by_hatesonar(monkeypatch):
    """The published classifier where it is installed and starts; by a stand-in of its form, what is made of
    its answers, and a failure of its runtime in one line."""
    class Sonar:
        def ping(self, text):
            confidences = {"hate_speech": 0.2, "offensive_language": 0.3, "neither": 0.5} | (
                {"neither": 0.1} if "hate" in text else {})
            return {"classes": [{"class_name": name, "confidence": c} for name, c in confidences.items()]}

    def broken():
        raise RuntimeError("no locale")
    args = argparse.Namespace(scorer="hatesonar")
    monkeypatch.setitem(sys.modules, "hatesonar", argparse.Namespace(Sonar=Sonar))
    assert toxicity.scorer(args)(["", ""], ["I hate it", "fine"]) == pytest.approx([0.9, 0.5])
    monkeypatch.setitem(sys.modules, "hatesonar", argparse.Namespace(Sonar=broken))
    with pytest.raises(InputError, match="needs the locale en_US.UTF-8 \\(no locale"):
        toxicity.scorer(args)
    monkeypatch.setitem(sys.modules, "hatesonar", None)
    with pytest.raises(InputError, match="pip install hatesonar"):
        toxicity.scorer(args)


def test_the_published_classifier_tells_insults_from_weather():
    pytest.importorskip("hatesonar")
    try:
        score = toxicity.scorer(argparse.Namespace(scorer="hatesonar"))
    except InputError as error:
        pytest.skip(str(error))
    insult, weather = score(["", ""], ["I hate you, you stupid idiot.", "The weather is nice today."])
    assert insult > 0.8 and weather < 0.5


@pytest.mark.parametrize("benchmark, flags, words", [
    ("lambada", ("--data", "FILE"), "a preference model, but a language model is needed"),
    ("toxicity", ("--data", "FILE", "--scorer", "PM"), "a scorer is one of --objective binary"),
    ("sample", ("--data", "FILE", "--max_new", "0"), "--max_new"),
    ("humaneval", ("--data", "FILE", "--n", "2", "--k", "3"), "--k 3 is more than --n 2"),
    ("hhh", ("--data", "FILE"), None)])
def test_models_and_flags_that_do_not_fit(pm, comparisons_file, benchmark, flags, words):
    flags = [{"FILE": comparisons_file, "PM": pm}.get(f, f) for f in flags]
    done = run("evaluate.py", benchmark, "--model", pm, *flags)
    assert done.returncode == (2 if words else 0)
    assert (words or "") in done.stderr and "Traceback" not in done.stderr


# ------------------------------------------------------------------------------------------------------------
# Judging, re-ranking, ensembles


@pytest.fixture(scope="module")
def second_pm(lm, comparisons_file, tmp_path_factory):
    out = tmp_path_factory.mktemp("second") / "pm"
    run_well("train_pm.py", "--init", lm, "--data", comparisons_file, "--steps", 4, "--batch", 8, "--seed", 1,
             "--held_out", 0.3, "--lr", 0.003, "--out", out)
    return out


def test_a_preference_model_judges_games(pm, tmp_path):
    players = {"first": ["a dog", "the cat sings"], "second": ["an owl waits", ""],
               "third": ["up there", "at home"]}
    contexts = ["\n\nHuman: Who?\n\nAssistant:", "\n\nHuman: Where?\n\nAssistant:"]
    files = [write_jsonl(tmp_path / f"{name}.jsonl", [
        {"context": c, "completions": [text], "scores": [0], "group": c} for c, text in zip(contexts, texts)])
        for name, texts in players.items()]
    figures, _ = evaluate("elo", "--judge", pm, "--samples", *files, "--out", tmp_path / "games.jsonl")
    model, tokenizer, _ = checkpoint.load(pm)
    with torch.no_grad():
        reward = {name: [alone(model, tokenizer, c, text)[0] for c, text in zip(contexts, texts)]
                  for name, texts in players.items()}
    games = read_jsonl(tmp_path / "games.jsonl")
    assert len(games) == 6
    for game in games:
        pairs = zip(reward[game["model_a"]], reward[game["model_b"]])
        assert min(abs(game["winner"] - 1 / (1 + np.exp(b - a))) for a, b in pairs) < 1e-5
    elos = {name: player["elo"] for name, player in figures["players"].items()}
    assert max(elos, key=elos.get) == max(reward, key=lambda name: sum(reward[name]))
    assert "at least two files" in run_refused("evaluate.py", "elo", "--judge", pm, "--samples", files[0])


def test_reranking_by_hand(pm, second_pm, tmp_path):
    completions = [" a dog", " the cat", " an owl", " my friend"]
    path = write_jsonl(tmp_path / "samples.jsonl", [
        {"context": "Say it:", "completions": completions, "scores": scores, "group": str(scores)}
        for scores in ([1, 0, 0, 0], [0, 0, 1, 1])])
    figures, _ = evaluate("rerank", "--model", pm, "--data", path, "--k", 1, 2, 4, "--ensemble", second_pm,
                          "--out", tmp_path / "items.jsonl")
    assert figures["right"] == pytest.approx((0.25 + 0.5) / 2)
    assert figures["accuracy@1_reward"] == pytest.approx(figures["right"])
    assert figures["accuracy@1_chance"] == pytest.approx(figures["right"])
    best = [item["right"][np.argmax(item["reward"])] for item in read_jsonl(tmp_path / "items.jsonl")]
    assert figures["accuracy@4_reward"] == np.mean(best) and figures["accuracy@4_best_possible"] == 1
    assert "accuracy@2_mean_of_2" in figures and "accuracy@2_least_of_2" in figures


def test_a_file_that_the_model_learned_from_is_reranked_by_its_held_out_groups(pm, comparisons_file):
    flags = ("--model", pm, "--data", comparisons_file, "--k", 1)
    n_problems = [evaluate("rerank", *flags, "--split", split)[0]["problems"]
                  for split in ("auto", "held_out", "all")]
    assert 0 < n_problems[0] == n_problems[1] < n_problems[2]


def test_a_member_that_learned_from_the_test_groups_is_refused(pm, lm, comparisons_file, tmp_path):
    run_well("train_pm.py", "--init", lm, "--data", comparisons_file, "--steps", 1, "--batch", 4,
             "--held_out", 0.01, "--out", tmp_path / "saw-more")
    assert "of these comparisons" in run_refused(
        "evaluate.py", "pm", "--model", pm, "--data", comparisons_file, "--ensemble", tmp_path / "saw-more")


def test_an_ensemble_is_the_mean_or_the_least_of_centred_rewards(pm, second_pm, comparisons_file, tmp_path):
    items = {}
    for name, flags in (("a", (pm,)), ("b", (second_pm,)), ("both", (pm, "--ensemble", second_pm))):
        figures, _ = evaluate("pm", "--model", *flags, "--data", comparisons_file, "--out", tmp_path / name)
        items[name] = read_jsonl(tmp_path / name)

    def accuracy(merge):
        means = []
        for a, b in zip(items["a"], items["b"]):
            merged = merge([np.array(x["reward"]) - np.mean(x["reward"]) for x in (a, b)])
            scored = list(zip(a["scores"], merged))
            margins = [m - n for t, m in scored for s, n in scored if t > s]
            means.append(np.mean([(m > 0) + 0.5 * (m == 0) for m in margins]))
        return np.mean(means)

    assert figures["mean_of_2"] == pytest.approx(accuracy(lambda rewards: np.mean(rewards, 0)))
    assert figures["least_of_2"] == pytest.approx(accuracy(lambda rewards: np.min(rewards, 0)))
