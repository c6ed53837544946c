"""evaluate.py's multiple choice, last words, text loss, toxicity and samples: against forwards of each sequence by itself."""
import json

import numpy as np
import pytest
import torch
from conftest import DATA, alone, make_texts, run, run_well, write_jsonl

import checkpoint
from data.prompts import SEPARATOR, fit_prompt, load_prompt
from data.tokenizer import get_tokenizer
from evals import choices
from evals.subject import Answer

BYTES = get_tokenizer("bytes")
PROMPT = "Two friends talk.\n\n-----\n\nHuman: Who sleeps?\n\nAssistant: A dog.\n\n-----\n\nHuman: Who sings?\n\nAssistant: An owl."


@pytest.fixture(scope="module")
def prompt_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("prompt") / "prompt.txt"
    path.write_text(PROMPT + "\n")
    return path


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    """BIG-bench's form, in a folder whose name is the category."""
    folder = tmp_path_factory.mktemp("hhh")
    for category, examples in {"kind": [("Who waits?", {"The miller waits.": 1, "A dog": 0}), ("Where?", {"Up there.": 0, "At home, by the river.": 1})],
                               "other": [("What now?", {"Nothing.": 1, "My friend sings.": 0})]}.items():
        (folder / category).mkdir()
        (folder / category / "task.json").write_text(json.dumps({"name": "x", "examples": [
            {"input": q, "target_scores": answers} for q, answers in examples]}, indent=1))
    return folder


def evaluate(benchmark, *flags):
    printed = run_well("evaluate.py", benchmark, *flags, "--dtype", "fp32")
    return json.loads(printed.splitlines()[-1], parse_constant=pytest.fail), printed


def items_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("at_once", [200, 10_000])
@pytest.mark.parametrize("prompted", [False, True])
def test_hhh_scores_equal_those_of_whole_sequences(lm, task, prompt_file, tmp_path, prompted, at_once):
    model, tokenizer, _ = checkpoint.load(lm)
    flags = ("--prompt", prompt_file) if prompted else ()
    figures, _ = evaluate("hhh", "--model", lm, "--data", task, "--out", tmp_path / "items.jsonl", "--ctx", 400, "--micro_tokens", at_once, *flags)
    before = "".join(["<eot>", PROMPT, SEPARATOR]) if prompted else ""

    def log_p(context, completion):
        ids = np.concatenate([[tokenizer.eot] * prompted, tokenizer.encode(before[5:] + context), tokenizer.encode(completion)]).astype(np.int64)
        with torch.no_grad():
            p = model.logits(model(torch.from_numpy(ids)[None])[0]).log_softmax(-1)
        n = len(tokenizer.encode(completion))
        return [p[i - 1, ids[i]].item() for i in range(len(ids) - n, len(ids))]

    right = []
    for item in items_of(tmp_path / "items.jsonl"):
        given = [log_p(item["context"], c) for c in item["completions"]]
        empty = [log_p("\n\nHuman:\n\nAssistant:", c) for c in item["completions"]]
        assert item["sum"] == pytest.approx([sum(x) for x in given], abs=1e-4)
        assert item["mean"] == pytest.approx([sum(x) / len(x) for x in given], abs=1e-4)
        assert item["mi"] == pytest.approx([sum(x) - sum(e) for x, e in zip(given, empty)], abs=2e-4)
        right.append(np.argmax(item["mi"]) == np.argmax(item["scores"]))
    assert figures["n"] == 3 and figures["accuracy_mi"] == pytest.approx(np.mean(right))
    assert {"accuracy_mi_kind", "accuracy_mi_other", "accuracy_longest_kind", "accuracy_no_context"} <= set(figures)


def test_a_preference_model_scores_by_rewards(pm, task, tmp_path):
    model, tokenizer, _ = checkpoint.load(pm)
    figures, _ = evaluate("hhh", "--model", pm, "--data", task, "--out", tmp_path / "items.jsonl")
    for item in items_of(tmp_path / "items.jsonl"):
        with torch.no_grad():
            assert item["reward"] == pytest.approx([alone(model, tokenizer, item["context"], c)[0] for c in item["completions"]], abs=1e-4)
    assert "accuracy_reward" in figures and "accuracy_mi" not in figures


def test_our_own_items_are_the_default(lm, tmp_path):
    figures, printed = evaluate("hhh", "--model", lm, "--ctx", 2048)
    assert figures["n"] >= 60 and all(f"accuracy, {c}" in printed for c in ("helpful", "honest", "harmless", "other"))


def test_truthfulqa_by_hand():
    truth, score = np.array([2.0, 1, 0, 0]), np.log([0.1, 0.4, 0.3, 0.2])
    assert choices.mass(truth, score) == pytest.approx(0.5)
    assert choices.hit(truth[truth != 1], score[truth != 1]) == 0
    assert choices.hit(np.array([1, 0, 0]), np.array([1.0, 1.0, 0.0])) == 0.5


def test_truthfulqa_reads_the_published_form(lm, tmp_path):
    path = tmp_path / "TruthfulQA.csv"
    path.write_text('Type,Category,Question,Best Answer,Correct Answers,Incorrect Answers,Source\n'
                    'A,B,"Who, really?",Nobody,Nobody; No one at all,"A dog; The miller, of course",x\nA,B,Where?,At home,Home; At home,Up there,x\n')
    records = list(choices.truthfulqa(path))
    assert records[0]["completions"] == [" A dog", " The miller, of course", " Nobody", " No one at all"] and records[0]["scores"] == [0, 0, 2, 1]
    assert records[1]["scores"] == [0, 1, 2] and records[1]["completions"] == [" Up there", " Home", " At home"]
    figures, _ = evaluate("truthfulqa", "--model", lm, "--data", path)
    assert figures["n"] == 2 and 0 < figures["MC2_sum"] < 1 and figures["MC1_mi"] in (0, 0.5, 1)


def test_lambada_is_greedy_and_sums_the_words_log_probs(lm, tmp_path):
    model, tokenizer, _ = checkpoint.load(lm)
    path = write_jsonl(tmp_path / "lambada.jsonl", make_texts(20))
    figures, _ = evaluate("lambada", "--model", lm, "--data", path, "--out", tmp_path / "items.jsonl")
    for item, record in zip(items_of(tmp_path / "items.jsonl"), map(json.loads, path.open())):
        before, word = record["text"].rsplit(" ", 1)
        ids = torch.from_numpy(tokenizer.encode(record["text"]).astype(np.int64))[-191:]  # a context is cut to what fits with an <eoc>
        with torch.no_grad():
            logits = model.logits(model(ids[None])[0])[-len(word) - 2:-1]
        assert item["right"] == bool((logits.argmax(-1) == ids[-len(word) - 1:]).all())
        assert item["log_prob"] == pytest.approx(logits.log_softmax(-1).gather(1, ids[-len(word) - 1:, None]).sum().item(), abs=1e-4)
    assert figures["n"] == 20


def test_hellaswag_is_asked_as_the_harness_does(tmp_path):
    path = write_jsonl(tmp_path / "h.jsonl", [
        {"activity_label": "Cooking", "ctx_a": "A cat [header] waits.", "ctx_b": "the cat", "ctx": "unused", "endings": ["sings.", "it [step] sleeps."], "label": 1},
        {"activity_label": "Waiting", "ctx": "A dog [title] waits", "endings": ["a", "b"], "label": "0"}])
    first, second = choices.hellaswag(path)
    assert first["context"] == "Cooking: A cat waits. The cat" and first["completions"] == [" sings.", " it sleeps."] and first["scores"] == [0, 1]
    assert second["context"] == "Waiting: A dog.  waits".replace("  ", " ") and second["scores"] == [1, 0]


def test_text_loss_is_that_of_the_training_script(lm, text_file):
    last = json.loads((lm / "meta.json").read_text())["metrics"]
    figures, printed = evaluate("lm", "--model", lm, "--data", text_file)
    assert "held-out documents only" in printed
    assert figures["loss"] == pytest.approx(last["loss"], rel=0.02)  # windows begin elsewhere
    behind, _ = evaluate("lm", "--model", lm, "--data", text_file, "--prompt", "toy", "--prompt_tokens", 150, "--ctx", 300)
    assert behind["loss"] != figures["loss"]


# ---------------------------------------------------------------------------------------------------------------------
# Prompts and samples


def test_a_prompt_is_shortened_by_whole_conversations():
    text = PROMPT + SEPARATOR
    size = len(BYTES.encode(text))
    assert fit_prompt(text, BYTES, size) == text
    assert fit_prompt(text, BYTES, size - 1) == "Two friends talk.\n\n-----\n\nHuman: Who sings?\n\nAssistant: An owl.\n\n-----"
    assert fit_prompt(text, BYTES, 40) == "Two friends talk.\n\n-----"
    bare = "\n\nHuman: a\n\nAssistant: b\n\n-----\n\nHuman: c\n\nAssistant: d\n\n-----"
    assert fit_prompt(bare, BYTES, 40) == "\n\nHuman: c\n\nAssistant: d\n\n-----"
    for too_few in (5, 20):
        with pytest.raises(Exception, match="--prompt_tokens"):
            fit_prompt(text if too_few == 5 else bare, BYTES, too_few)


def test_a_prompt_file_may_end_with_its_separator(tmp_path, prompt_file):
    again = tmp_path / "again.txt"
    again.write_text(PROMPT + "\n\n-----\n\n")
    assert load_prompt(again) == load_prompt(prompt_file) == PROMPT + SEPARATOR


@pytest.mark.parametrize("flags, words", [
    (("--prompt", "none.txt"), "none.txt: no such prompt file"),
    (("--prompt", "hhh"), "leave no room in a context of 192; give --prompt_tokens"),
    (("--prompt", "toy", "--prompt_tokens", "3"), "--prompt_tokens 3: even the prompt's last conversation takes")])
def test_prompts_that_do_not_work(lm, task, flags, words):
    done = run("evaluate.py", "hhh", "--model", lm, "--data", task, *flags)
    assert done.returncode == 2 and words in done.stderr and done.stderr.count("\n") == 1


def test_an_answer_ends_before_its_stop_text_whatever_the_tokens():
    text = "Yes – a dog.\n\nHuman: No"
    answer = Answer(BYTES, ("\n\nHuman:", "\n\n-----"))
    tokens = iter(BYTES.encode(text).tolist())
    assert any(map(answer.add, tokens)) and answer.text == "Yes – a dog." and BYTES.decode(list(tokens)) == " No"
    plain = Answer(BYTES, ())
    assert not any(plain.add(int(token)) for token in BYTES.encode("ab")) and plain.add(BYTES.eot) and plain.text == "ab"


def test_samples_are_the_same_behind_a_prompt_or_in_one_text(lm, task, prompt_file, tmp_path):
    draw = lambda name, *flags: evaluate("sample", "--model", lm, "--n", 3, "--max_new", 20, "--ctx", 300, "--out", tmp_path / name, *flags)
    contexts = ["\n\nHuman: Who waits?\n\nAssistant:", "\n\nHuman: Where?\n\nAssistant:"]
    for name, before in (("short", ""), ("whole", PROMPT + SEPARATOR)):
        write_jsonl(tmp_path / f"{name}.jsonl", [{"context": before + c, "completions": ["a"], "scores": [0]} for c in contexts])
    figures, _ = draw("a.jsonl", "--data", tmp_path / "short.jsonl", "--prompt", prompt_file)
    draw("again.jsonl", "--data", tmp_path / "short.jsonl", "--prompt", prompt_file)
    assert figures["samples"] == 6 and (tmp_path / "a.jsonl").read_text() == (tmp_path / "again.jsonl").read_text()
    rows = items_of(tmp_path / "a.jsonl")
    assert [r["context"] for r in rows] == contexts and all(len(r["completions"]) == 3 for r in rows)
    one, _ = draw("one.jsonl", "--data", tmp_path / "short.jsonl", "--prompt", prompt_file, "--contexts", 1)
    assert items_of(tmp_path / "one.jsonl") == rows[:1]


def test_toxicity_is_read_from_a_binary_preference_model(lm, comparisons_file, tmp_path):
    run_well("train_pm.py", "--init", lm, "--data", comparisons_file, "--objective", "binary", "--steps", 2, "--batch", 8, "--out", tmp_path / "scorer")
    (tmp_path / "prompts.txt").write_text("The cat\n\nA dog\n")
    figures, _ = evaluate("toxicity", "--model", lm, "--data", tmp_path / "prompts.txt", "--scorer", tmp_path / "scorer", "--n", 3,
                          "--max_new", 8, "--out", tmp_path / "items.jsonl")
    model, tokenizer, _ = checkpoint.load(tmp_path / "scorer")
    rows = items_of(tmp_path / "items.jsonl")
    for row in rows:
        with torch.no_grad():
            rewards = [alone(model, tokenizer, row["prompt"], c)[0] for c in row["continuations"]]
        assert row["toxicity"] == pytest.approx([1 / (1 + np.exp(r)) for r in rewards], abs=1e-4)
    scores = np.array([row["toxicity"] for row in rows])
    assert figures["mean"] == pytest.approx(scores.mean()) and figures["expected_maximum"] == pytest.approx(scores.max(1).mean())
    assert figures["above_half"] == pytest.approx((scores > 0.5).mean())


@pytest.mark.parametrize("benchmark, flags, words", [
    ("lambada", ("--data", "FILE"), "a preference model, but a language model is needed"),
    ("toxicity", ("--data", "FILE", "--scorer", "PM"), "a scorer is one of --objective binary"),
    ("sample", ("--data", "FILE", "--max_new", "0"), "--max_new"),
    ("humaneval", ("--data", "FILE", "--n", "2", "--k", "3"), "--k 3 is more than --n 2"),
    ("hhh", ("--data", "FILE"), None)])
def test_models_and_flags_that_do_not_fit(pm, comparisons_file, benchmark, flags, words):
    flags = [{"FILE": comparisons_file, "PM": pm}.get(f, f) for f in flags]
    done = run("evaluate.py", benchmark, "--model", pm, *flags)
    assert done.returncode == (2 if words else 0) and (words or "") in done.stderr and "Traceback" not in done.stderr


@pytest.mark.skipif(not DATA.exists(), reason="published data")
def test_the_published_files_are_read():
    assert [len(list(choices.hhh(p))) for p in sorted((DATA / "hhh_alignment").glob("*/task.json"))] == [48, 51, 29, 37]
    records = list(choices.truthfulqa(DATA / "truthfulqa" / "TruthfulQA.csv"))
    assert len(records) == 653 and all(max(r["scores"]) == 2 and min(r["scores"]) == 0 for r in records)
    assert sum(1 for _ in choices.lambada(DATA / "lambada" / "lambada_test.jsonl")) == 4153
    assert sum(1 for _ in choices.hellaswag(DATA / "hellaswag" / "hellaswag_val.jsonl.xz")) == 8829


# ---------------------------------------------------------------------------------------------------------------------
# Judging, re-ranking, ensembles


@pytest.fixture(scope="module")
def second_pm(lm, comparisons_file, tmp_path_factory):
    out = tmp_path_factory.mktemp("second") / "pm"
    run_well("train_pm.py", "--init", lm, "--data", comparisons_file, "--steps", 4, "--batch", 8, "--seed", 1, "--held_out", 0.3, "--lr", 0.003, "--out", out)
    return out


def test_a_preference_model_judges_games(pm, tmp_path):
    players = {"first": ["a dog", "the cat sings"], "second": ["an owl waits", ""], "third": ["up there", "at home"]}
    contexts = ["\n\nHuman: Who?\n\nAssistant:", "\n\nHuman: Where?\n\nAssistant:"]
    files = [write_jsonl(tmp_path / f"{name}.jsonl", [{"context": c, "completions": [t], "scores": [0], "group": c} for c, t in zip(contexts, texts)])
             for name, texts in players.items()]
    printed = run_well("evaluate.py", "elo", "--judge", pm, "--samples", *files, "--out", tmp_path / "games.jsonl", "--dtype", "fp32")
    model, tokenizer, _ = checkpoint.load(pm)
    with torch.no_grad():
        reward = {name: [alone(model, tokenizer, c, t)[0] for c, t in zip(contexts, texts)] for name, texts in players.items()}
    games = items_of(tmp_path / "games.jsonl")
    assert len(games) == 6
    for game in games:
        shares = [1 / (1 + np.exp(b - a)) for a, b in zip(reward[game["model_a"]], reward[game["model_b"]])]
        assert min(abs(game["winner"] - share) for share in shares) < 1e-5
    elos = {name: p["elo"] for name, p in json.loads(printed.splitlines()[-1])["players"].items()}
    assert max(elos, key=elos.get) == max(reward, key=lambda name: sum(reward[name]))
    done = run("evaluate.py", "elo", "--judge", pm, "--samples", files[0])
    assert done.returncode == 2 and "at least two files" in done.stderr


def test_reranking_by_hand(pm, second_pm, tmp_path):
    path = write_jsonl(tmp_path / "samples.jsonl", [{"context": "Say it:", "completions": [" a dog", " the cat", " an owl", " my friend"], "scores": s, "group": str(s)}
                                                    for s in ([1, 0, 0, 0], [0, 0, 1, 1])])
    printed = run_well("evaluate.py", "rerank", "--model", pm, "--data", path, "--k", 1, 2, 4, "--ensemble", second_pm, "--out", tmp_path / "items.jsonl")
    figures = json.loads(printed.splitlines()[-1])
    assert figures["accuracy@1_reward"] == pytest.approx(figures["accuracy@1_chance"]) == pytest.approx((0.25 + 0.5) / 2) == figures["right"]
    rows = items_of(tmp_path / "items.jsonl")
    assert figures["accuracy@4_reward"] == np.mean([r["right"][np.argmax(r["reward"])] for r in rows])
    assert figures["accuracy@4_best_possible"] == 1 and "accuracy@2_mean_of_2" in figures and "accuracy@2_least_of_2" in figures


def test_a_file_that_the_model_learned_from_is_reranked_by_its_held_out_groups(pm, comparisons_file, tmp_path):
    figures = [json.loads(run_well("evaluate.py", "rerank", "--model", pm, "--data", comparisons_file, "--k", 1, "--split", split).splitlines()[-1])["problems"]
               for split in ("auto", "held_out", "all")]
    assert 0 < figures[0] == figures[1] < figures[2]


def test_a_member_that_learned_from_the_test_groups_is_refused(pm, lm, comparisons_file, tmp_path):
    run_well("train_pm.py", "--init", lm, "--data", comparisons_file, "--steps", 1, "--batch", 4, "--held_out", 0.01, "--out", tmp_path / "saw-more")
    done = run("evaluate.py", "pm", "--model", pm, "--data", comparisons_file, "--ensemble", tmp_path / "saw-more")
    assert done.returncode == 2 and "of these comparisons" in done.stderr and done.stderr.count("\n") == 1


def test_an_ensemble_is_the_mean_or_the_least_of_centred_rewards(pm, second_pm, comparisons_file, tmp_path):
    rows = {}
    for name, flags in (("a", (pm,)), ("b", (second_pm,)), ("both", (pm, "--ensemble", second_pm))):
        figures, printed = evaluate("pm", "--model", *flags, "--data", comparisons_file, "--out", tmp_path / name)
        rows[name] = items_of(tmp_path / name)

    def accuracy(merge):
        means = []
        for a, b in zip(rows["a"], rows["b"]):
            merged = merge([np.array(x["reward"]) - np.mean(x["reward"]) for x in (a, b)])
            pairs = [m - n for t, m in zip(a["scores"], merged) for s, n in zip(a["scores"], merged) if t > s]
            means.append(np.mean([(m > 0) + 0.5 * (m == 0) for m in pairs]))
        return np.mean(means)
    assert figures["mean_of_2"] == pytest.approx(accuracy(lambda r: np.mean(r, 0)))
    assert figures["least_of_2"] == pytest.approx(accuracy(lambda r: np.min(r, 0)))
