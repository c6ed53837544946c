"""Fuzzing: valid files of every kind are mutated at random, and only two ends are accepted. Either the file
is read, or there is an InputError of one line that names the file. Any other exception is a defect.

    python -m pytest tests/test_fuzz.py -s --fuzz 5000      mutations of each kind (default: 100)

The mutations are seeded. A file that led to a defect stays in pytest's folder of the test.
"""
import base64
import contextlib
import json
import os
import random
import resource
import shutil
import signal
import traceback
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from conftest import (BYTES, LM_FLAGS, convert, make_comparisons, make_texts, processes, read_jsonl, run)
from test_choices import HELLASWAG, TASK
from test_code import HUMANEVAL, MBPP, QUIXBUGS
from test_files import COMPRESSORS
from test_model_data import MODULE
from test_prepare import ETHICS
from test_reddit import THREAD
from test_stackexchange import GOOD, HEAD, TAIL
from test_wikipedia import HEAD as WIKI_HEAD
from test_wikipedia import REVERTED

import checkpoint
from data.chat_format import ChatFormat
from data.comparisons import load_comparisons, parse
from data.errors import InputError, one_line
from data.files import read_lines
from data.prompts import fit_prompt, load_prompt
from data.sources import ethics, published, reddit, stackexchange, wikipedia
from data.sources.count import Count
from data.text import load_text
from data.tokenizer import get_tokenizer
from evals import choices, code, correctness, elo, human_vs_model, toxicity
from formats import train_state

# ------------------------------------------------------------------------------------------------------------
# Mutations

DEEP = 100_000
RAW = {  # what json.dumps does not write, by the texts that stand for it until the JSON is written
    "RAW 1": "NaN", "RAW 2": "Infinity", "RAW 3": "1e999", "RAW 4": "9" * 5000,
    "RAW 5": "[" * DEEP + "]" * DEEP,
    "RAW 6": "[" * 950 + "]" * 950, "RAW 7": '{"a":' * 900 + "1" + "}" * 900}
VALUES = [None, True, False, 0, -1, 1, 2, 1.5, 10**9, 10**30, 1e308, "", " ", "x", "0", "word " * 2000,
          "<eot>", "a <eoc> b", "\ud800", "\0", "\x1b[2J", "\n\nHuman: a\n\nAssistant:", [], {}, [[]], [None],
          [1, 2], {"a": 1}, {"text": "a"}, *RAW]
BYTES_TO_INSERT = [
    b"\0", b"\xff\xfe", b"\xef\xbb\xbf", b"\n", b"\r\n", b'"', b"'", b",", b"{", b"]", b"<", b"&#0;",
    b"{% for i in range(10**12) %}", b"{{ m.x.y }}", b"{{ 1 // 0 }}", b"&#55555555555;",
    b"<eot>", b"\x1b[2J", b"\\ud800", b"-" * 3000, b"(" * 300, b"[" * DEEP, b"9" * 5000,
    "é😀".encode(), b"\xe2\x80", b"\x80"]


def mutate(content, rng):
    """One to three changes of a file's bytes, of its JSON if it has some."""
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        changed = mutate_json(content, rng) if rng.random() < 0.7 else None
        content = changed or mutate_bytes(content, rng)
    return content


def mutate_bytes(content, rng):
    a, b = sorted((rng.randrange(len(content) + 1), rng.randrange(len(content) + 1)))
    near = min(b, a + rng.randrange(1, 40))
    return rng.choice([
        lambda: content[:a],
        lambda: content[:a] + content[near:],
        lambda: content[:a] + content[b:],
        lambda: content[:b] + content[a:],
        lambda: content[:a] + rng.randbytes(near - a) + content[near:],
        lambda: content[:a] + bytes([content[a] ^ 1 << rng.randrange(8)]) + content[a + 1:] if a < b else b"",
        lambda: content[:a] + rng.choice(BYTES_TO_INSERT) + content[a:],
        lambda: content[:a] + rng.choice(BYTES_TO_INSERT) + content[near:]])()


def mutate_json(content, rng):
    """A change of one value in a JSON file, or in a line of a JSON-lines file. None for other files."""
    try:
        whole, before, after = json.loads(content), b"", b""
    except ValueError:
        lines = content.split(b"\n")
        n = rng.randrange(len(lines))
        try:
            whole = json.loads(lines[n])
        except (ValueError, RecursionError):
            return None
        before, after = (b"".join(line + b"\n" for line in lines[:n]), b"\n" + b"\n".join(lines[n + 1:]))
    except RecursionError:
        return None
    places = [(whole, key) for key in keys(whole)]
    for parent, key in places:
        places += [(parent[key], inner) for inner in keys(parent[key])]
    if not places:
        return None
    parent, key = rng.choice(places)
    if rng.random() < 0.2:
        del parent[key]
    elif rng.random() < 0.2:
        parent[key] = rng.choice([[parent[key]], {"a": parent[key]}, str(parent[key]), {str(key): 1}])
    elif rng.random() < 0.1 and isinstance(parent, list):
        parent *= rng.choice((2, 100))
    else:
        parent[key] = rng.choice(VALUES)
    text = json.dumps(whole, indent=rng.choice((None, None, None, 0)) if not before + after else None)
    for name, raw in RAW.items():
        text = text.replace(f'"{name}"', raw)
    return before + text.encode() + after


def keys(value):
    return list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()


# ------------------------------------------------------------------------------------------------------------
# Kinds of files: what is valid, {path: content}, and how it is read from a folder


def lines(*records):
    return "".join(json.dumps(record) + "\n" for record in records).encode()


def encode_all(texts):
    for _ in BYTES.encode_many(texts):
        pass


def read_comparisons(folder):
    data = load_comparisons([folder / "data.jsonl"], BYTES, quiet=True)
    data.held_out(0.5), data.differ(), data.fits(100)


def read_text(name):
    return lambda folder: load_text([folder / name], BYTES, 0.1)


def read_items(benchmark, name):
    def read(folder):
        items, _ = choices.read_items(benchmark, [folder / name])
        encode_all(text for item in items for text in (item["context"], *item["completions"]))
        json.dumps(items)
    return read


def read_problems(reader, name):
    def read(folder):
        for problem in reader(folder / name):
            encode_all([code.format_prompt(problem, "prompt")])
    return read


def read_module(folder):
    for task in correctness.read_tasks([folder / "module.py"], Count(0.5)):
        correctness.mutants(task.problem, *task.bodies, Namespace(n=4, seed=0))


def read_games(name):
    def read(folder):
        names, outcomes, counts, _ = elo.tally(elo.read_games(folder / name))
        wins = elo.wins_of(outcomes, counts, len(names))
        elo.fit(wins), elo.components(names, wins)
    return read


def read_samples(folder):
    elo.judged_games(lambda contexts, texts: np.zeros(len(texts)),
                     {name: folder / f"{name}.jsonl" for name in "ab"})


def read_source(source, name, *flags):
    """As data.prepare reads a file."""
    def read(folder):
        records, count = convert(source, [folder / name], *flags, max_bad=0.5)
        count.check()
        "".join(json.dumps(record, ensure_ascii=False) for record in records).encode()
    return read


def read_published(function):
    def read(folder):
        count = Count(0.5)
        for record in function([folder / "data.jsonl"], Namespace(split=None), count):
            parse(record, "record")
        count.check()
    return read


def read_human(folder):
    count = Count(0.5)
    found = human_vs_model.read_comparisons([folder / "data.jsonl"], Namespace(contexts=None), count)
    encode_all(context for context, *_ in found)


def read_checkpoint(folder):
    model, tokenizer, meta = checkpoint.load(folder)
    ids = tokenizer.encode("\n\nHuman: a b\n\nAssistant:").astype(np.int64)
    model(torch.from_numpy(ids)[None] % model.config.vocab_size)
    str(meta["kind"] + meta["objective"])


def read_template(folder):
    text = (folder / "template.jinja").read_bytes().decode(errors="replace")
    try:
        ChatFormat(text, {"bos_token": "<s>", "eos_token": ""}).pieces("\n\nHuman: a\n\nAssistant: b\n\nHuman: c")
    except InputError as error:  # whose message names --chat
        raise InputError(f"{folder}: {error}") from None


def read_run(folder):
    read_checkpoint(folder)
    train_state.read(checkpoint.find(folder))


TEMPLATE = (b"{{ bos_token }}{% for m in messages %}{% if loop.first and m.role != 'system' %}Be good.{% endif %}"
            b"<|{{ m['role'] }}|>{{ m.content | trim }}<|end|>\n{% endfor %}"
            b"{% if add_generation_prompt %}<|assistant|>{% endif %}")
CSV = (b'Type,Question,Best Answer,Correct Answers,Incorrect Answers\nA,"Who, really?",Nobody,Nobody; No one,'
       b'"A dog; The miller"\nA,Where?,At home,Home; At home,Up there\n')
GAMES = [{"model_a": "x", "model_b": "y", "winner": winner} for winner in ("x", "y", "tie", "model_a")]
PAIRS = [{"prompt": "P", "chosen": "a", "rejected": "b"}, {"prompt": "Q", "chosen": "c", "rejected": "d"}]
DIALOGUES = [{"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: a\n\nAssistant: c"}] * 3
TWO = [{"text": "a"}, {"text": "b"}]
SUMMARIES = [{"info": {"id": "1", "article": "News."}, "summaries": TWO, "choice": 1},
             {"info": {"post": "Post.", "title": "T"}, "summaries": TWO, "choice": 0}]
PROMPT = (b"Two friends talk.\n\n-----\n\nHuman: Who?\n\nAssistant: A dog.\n\n-----\n\nHuman: a\n\n"
          b"Assistant: b\n")
COMPARISONS, TEXTS = list(make_comparisons(6)), make_texts(8)
TASK_FILE = json.dumps({"examples": [{"input": question, "target_scores": answers}
                                     for question, answers in TASK["kind"]]}).encode()
SAMPLES = [{"context": c, "completions": ["a", "b"], "scores": [0, 0], "group": c} for c in ("q", "r")]
TIKTOKEN = b"".join(b"%s %d\n" % (base64.b64encode(bytes([i])), i) for i in range(256))

FILES = {
    "comparisons": ({"data.jsonl": lines(*COMPARISONS, *PAIRS, *DIALOGUES)}, read_comparisons),
    "text": ({"data.jsonl": lines(*TEXTS)}, read_text("data.jsonl")),
    "plain text": ({"data.txt": "\n\n".join(t["text"] for t in TEXTS).encode()}, read_text("data.txt")),
    "hhh": ({"data/task.json": TASK_FILE}, read_items("hhh", "data/task.json")),
    "truthfulqa": ({"data.csv": CSV}, read_items("truthfulqa", "data.csv")),
    "hellaswag": ({"data.jsonl": lines(*HELLASWAG)}, read_items("hellaswag", "data.jsonl")),
    "lambada": ({"data.jsonl": lines(*TEXTS)}, read_items("lambada", "data.jsonl")),
    "choice": ({"data.jsonl": lines(*COMPARISONS, COMPARISONS[0] | {"category": "a"})},
               read_items("choice", "data.jsonl")),
    "humaneval": ({"data.jsonl": lines(HUMANEVAL, HUMANEVAL)}, read_problems(code.humaneval, "data.jsonl")),
    "mbpp": ({"data.jsonl": lines(MBPP, MBPP)}, read_problems(code.mbpp, "data.jsonl")),
    "quixbugs": ({path: text.encode() for path, text in QUIXBUGS.items()}, read_problems(code.quixbugs, "")),
    "python module": ({"module.py": MODULE.encode()}, read_module),
    "toxicity": ({"data.jsonl": lines({"prompt": {"text": "a"}}, {"prompt": "b"}, *TEXTS, *COMPARISONS)},
                 lambda folder: encode_all(toxicity.read_prompts([folder / "data.jsonl"]))),
    "toxicity, plain": ({"data.txt": b"a\nb c\n"},
                        lambda folder: encode_all(toxicity.read_prompts([folder / "data.txt"]))),
    "games": ({"data.jsonl": lines(*GAMES)}, read_games("data.jsonl")),
    "games, csv": ({"data.csv": b"model_a,model_b,winner\nx,y,x\ny,x,x\nx,z,tie\n"}, read_games("data.csv")),
    "samples": ({"a.jsonl": lines(*SAMPLES), "b.jsonl": lines(*SAMPLES)}, read_samples),
    "hh": ({"data.jsonl": lines(*DIALOGUES)}, read_published(published.hh)),
    "pairs": ({"data.jsonl": lines(*PAIRS)}, read_published(published.pairs)),
    "summarize": ({"data.jsonl": lines(*SUMMARIES)}, read_published(published.summarize)),
    "hellaswag, raw": ({"data.jsonl": lines(*[HELLASWAG[1] | {"label": 1}] * 3)},
                       read_published(published.hellaswag)),
    **{f"ethics {name}": ({"data.csv": ETHICS[name][0].encode()},
                          read_source(ethics, "data.csv", "--set", name)) for name in ETHICS},
    "utilitarianism": ({"data.csv": b'good , ok\nok,"bad, very"\nx,y\n'},
                       read_source(ethics, "data.csv", "--set", "utilitarianism")),
    "stackexchange": ({"s/Posts.xml": (HEAD + GOOD * 2 + TAIL).encode()},
                      read_source(stackexchange, "s/Posts.xml", "--workers", 1)),
    "reddit": ({"dump": lines(*THREAD, *THREAD)}, read_source(reddit, "dump")),
    "wikipedia": ({"history.xml": f"{WIKI_HEAD}{REVERTED}{REVERTED}</mediawiki>\n".encode()},
                  read_source(wikipedia, "history.xml")),
    "human-vs-model": ({"data.jsonl": lines(*COMPARISONS)}, read_human),
    "prompt": ({"prompt.txt": PROMPT},
               lambda folder: fit_prompt(load_prompt(folder / "prompt.txt"), BYTES, 10**6)),
    "chat template": ({"template.jinja": TEMPLATE}, read_template),
    "tiktoken": ({"a.tiktoken": TIKTOKEN},
                 lambda folder: get_tokenizer(str(folder / "a.tiktoken")).encode("ab")),
    **{f"compressed {suffix}": ({f"data{suffix}": compress(lines(*TEXTS) * 20)},
                                lambda folder, suffix=suffix: list(read_lines(folder / f"data{suffix}")))
       for suffix, compress in COMPRESSORS.items()}}


def whole_checkpoint(pm):
    return {path.name: path.read_bytes() for path in pm.iterdir() if path.is_file()}


def foreign_folder(pm):
    """The language model in a preference model's checkpoint, as a Hugging Face folder with an index."""
    whole = whole_checkpoint(pm)
    config = json.loads(whole["config.json"]) | {"architectures": ["LlamaForCausalLM"]}
    del config["eoc_token_id"]
    spec = json.loads(whole["tokenizer.json"]) | {"post_processor": None}
    state = safetensors.torch.load_file(pm / "model.safetensors")
    del state["score.weight"]
    index = {"weight_map": dict.fromkeys(state, "model-1.safetensors")}
    return {"config.json": json.dumps(config).encode(), "tokenizer.json": json.dumps(spec).encode(),
            "tokenizer_config.json": whole["tokenizer_config.json"],
            "model.safetensors.index.json": json.dumps(index).encode(),
            "model-1.safetensors": safetensors.torch.save(state)}


def gguf_file(pm):
    pytest.importorskip("gguf")
    from test_pretrained import make_theirs, write_gguf
    return {"model.gguf": write_gguf(pm.parent / "fuzz.gguf", make_theirs("SmolLM2")).read_bytes()}


CHECKPOINTS = {  # what is mutated: (how the folder is made from a checkpoint, how it is read)
    **{name: (whole_checkpoint, read_run if name == "train_state.pt" else read_checkpoint)
       for name in checkpoint.FILES},
    "Hugging Face folder": (foreign_folder, read_checkpoint),
    "gguf": (gguf_file, lambda folder: read_checkpoint(folder / "model.gguf"))}
# These get so many times fewer mutations:
SLOW = {"tokenizer.json": 10, "gguf": 10, "train_state.pt": 5, "comparisons": 5, "plain text": 5, "reddit": 3,
        "stackexchange": 3}


def valid_files(name, request):
    """({path: content} of a kind's valid files, the paths of those that are to be mutated)."""
    if name in FILES:
        return FILES[name][0], list(FILES[name][0])
    content = CHECKPOINTS[name][0](request.getfixturevalue("pm"))
    return content, [name] if name in content else list(content)


def write_mutated(folder, content, target, rng):
    for path, valid in content.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(mutate(valid, rng) if path == target else valid)
    return folder


# ------------------------------------------------------------------------------------------------------------
# The two tests


class TooSlow(BaseException):
    pass


def attempt(folder, read):
    """How reading a mutated folder ended: "read", "refused", or what was wrong."""
    def ring(*_):
        raise TooSlow
    signal.signal(signal.SIGALRM, ring)
    signal.alarm(20)
    try:
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
            read(folder)
        return "read"
    except (InputError, OSError) as error:
        is_ours = isinstance(error, InputError)
        message = one_line(str(error) if is_ours else f"{error.filename}: {error.strerror}")
        return "refused" if str(folder) in message else f"the file is not named: {message}"
    except BaseException:
        return traceback.format_exc()
    finally:
        signal.alarm(0)


def fuzz(name, content, targets, folder, n):
    """In a process of its own: read a kind's valid files and n mutations of them; write down how each ended.
    """
    torch.set_num_threads(1)
    os.environ["HHH_LAB_CACHE"] = str(folder / "cache")
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + 2**32, used + 2**32))
    read = (FILES | CHECKPOINTS)[name][1]
    for i in range(-1, n):
        rng = random.Random(f"{name} {i}")
        place = write_mutated(folder / str(i), content, rng.choice(targets) if i >= 0 else None, rng)
        end = attempt(place, read)
        with open(folder / "ends.jsonl", "a") as file:
            file.write(json.dumps([i, end]) + "\n")
        if end in ("read", "refused"):
            shutil.rmtree(place)
        shutil.rmtree(folder / "cache", ignore_errors=True)


@pytest.mark.parametrize("name", [*FILES, *CHECKPOINTS])
def test_a_mutated_file_is_read_or_refused_in_one_line(request, tmp_path, name):
    n = request.config.getoption("--fuzz") // SLOW.get(name, 1)
    process = processes.Process(target=fuzz, args=(name, *valid_files(name, request), tmp_path, n))
    process.start()
    process.join()
    (_, first), *ends = read_jsonl(tmp_path / "ends.jsonl")
    assert first == "read", first
    found = [end for _, end in ends]
    print(f"{name}: {found.count('read')} read, {found.count('refused')} refused")
    bad = [f"{tmp_path / str(i)}:\n{end}" for i, end in ends if end not in ("read", "refused")]
    assert not bad, "\n".join(bad[:5])
    assert len(ends) == n, f"the process died at {tmp_path / str(len(ends))}"


PROGRAMS = ("--n", 1, "--k", 1, "--max_new", 2)
TWO_STEPS = ("--out", "FOLDER/out", "--steps", 2)
SCRIPTS = {  # kind: script and flags, in which LM and PM are checkpoints, and FOLDER has the mutated file
    "comparisons": ("train_pm.py", "--init", "LM", "--data", "FOLDER/data.jsonl", *TWO_STEPS),
    "text": ("train_lm.py", "--data", "FOLDER/data.jsonl", *LM_FLAGS, *TWO_STEPS),
    "hhh": ("evaluate.py", "hhh", "--model", "PM", "--data", "FOLDER/data/task.json"),
    "truthfulqa": ("evaluate.py", "truthfulqa", "--model", "LM", "--data", "FOLDER/data.csv"),
    "hellaswag": ("evaluate.py", "hellaswag", "--model", "LM", "--data", "FOLDER/data.jsonl"),
    "humaneval": ("evaluate.py", "humaneval", "--model", "LM", "--data", "FOLDER/data.jsonl", *PROGRAMS),
    "quixbugs": ("evaluate.py", "quixbugs", "--model", "LM", "--data", "FOLDER", *PROGRAMS),
    "games": ("evaluate.py", "elo", "--games", "FOLDER/data.jsonl", "--out", "FOLDER/out"),
    "prompt": ("evaluate.py", "hhh", "--model", "LM", "--prompt", "FOLDER/prompt.txt", "--ctx", 150),
    "hh": ("data/prepare.py", "hh", "--raw", "FOLDER/data.jsonl", "--out", "FOLDER/out"),
    "stackexchange": ("data/prepare.py", "stackexchange", "--raw", "FOLDER/s/Posts.xml", "--workers", 1,
                      "--out", "FOLDER/out"),
    "reddit": ("data/prepare.py", "reddit", "--raw", "FOLDER/dump", "--out", "FOLDER/out"),
    "mbpp": ("data/prepare.py", "code-correctness", "--raw", "FOLDER/data.jsonl", "--out", "FOLDER/out"),
    "meta.json": ("evaluate.py", "choice", "--model", "FOLDER", "--data", "DATA"),
    "config.json": ("evaluate.py", "pm", "--model", "FOLDER", "--data", "DATA"),
    "Hugging Face folder": ("train_pm.py", "--init", "FOLDER", "--data", "DATA", *TWO_STEPS)}


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_answers_a_mutated_file_with_success_or_one_line(request, tmp_path, lm, pm, comparisons_file,
                                                                  name):
    content, targets = valid_files(name, request)
    for i in range(request.config.getoption("--fuzz") // 100):
        rng, folder = random.Random(f"script {name} {i}"), tmp_path / str(i)
        write_mutated(folder, content, rng.choice(targets), rng)
        places = {"LM": lm, "PM": pm, "DATA": comparisons_file}
        flags = [places.get(flag, str(flag).replace("FOLDER", str(folder))) for flag in SCRIPTS[name]]
        done = run(*flags)
        assert done.returncode == 0 or done.returncode == 2 and done.stderr.count("\n") == 1, done
        assert done.returncode == 0 or not (folder / "out").exists()
