"""Every command that the README gives, run as it stands but with tiny numbers: flags that were renamed, or files that moved, show here."""
import re
import shlex
from pathlib import Path

import pytest
from conftest import ROOT, make_comparisons, make_texts, run, write_jsonl

README = (ROOT / "README.md").read_text()
COMMANDS = [line.split("  #")[0].strip() for block in re.findall(r"```sh\n(.*?)```", README, re.DOTALL) for line in block.splitlines()
            if line.startswith(("python ", "torchrun "))]
TINY = {"train_lm.py": "--size test --tokenizer bytes --ctx 192 --batch 768 --steps 2 --dtype fp32 --held_out 0.001",
        "train_pm.py": "--size test --steps 2 --batch 4 --dtype fp32", "distill.py": "--sequences 64 --batch 8 --steps 2 --ctx 48 --prompt_tokens 140 --dtype fp32",
        "lab.py": "--dry_run --seeds 2", "chat.py": "--prompt_tokens 140"}
BENCHMARKS = {"sample": "--contexts 2 --max_new 8 --ctx 4096", "humaneval": "--problems 1 --n 2 --k 1 --max_new 4", "toxicity": "--prompts 2 --n 2 --max_new 4", "hhh": "--ctx 4096",
              "elo": "", "rerank": ""}
UNDATED = {"mbpp.jsonl", "HumanEval.jsonl.gz", "lambada_test.jsonl", "TruthfulQA.csv", "hellaswag_val.jsonl"}  # published files: not at hand


def test_the_readme_has_commands():
    scripts = {shlex.split(c)[1 if c.startswith("python") else 3] for c in COMMANDS}
    assert {"train_lm.py", "train_pm.py", "distill.py", "evaluate.py", "chat.py", "lab.py"} <= scripts


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with what the README calls the reader's own data."""
    folder = tmp_path_factory.mktemp("readme")
    (folder / "my_texts").mkdir()
    write_jsonl(folder / "my_texts" / "texts.jsonl", make_texts())
    write_jsonl(folder / "my_comparisons.jsonl", make_comparisons())
    return folder


def tiny(command, folder):
    """(script, flags): the command on one rank, its files in `folder`, with few steps; None where it needs published data."""
    words = shlex.split(command)
    words = words[1:] if words[0] == "python" else words[3:]
    if any(Path(word).name in UNDATED or word.startswith("DATA") for word in words):
        return None
    script, *flags = words if words[0] != "-m" else [" ".join(words[:2]), *words[2:]]
    own = {"my_texts/": folder / "my_texts", "texts/": folder / "my_texts", "hh/": folder / "my_comparisons.jsonl", "my_comparisons.jsonl": folder / "my_comparisons.jsonl"}
    flags = [str(own.get(f, folder / f if f.startswith("out/") or f.endswith(".jsonl") else f)) for f in flags]
    extra = TINY.get(script, BENCHMARKS.get(flags[0], "") if script == "evaluate.py" else "").split()
    if "--init" in flags and script == "train_lm.py":
        extra = extra[4:]
    return script, flags + extra


def test_the_commands_of_the_readme_run_in_their_order(place):
    ran = 0
    for command in COMMANDS:
        found = tiny(command, place)
        if found is None or found[0].startswith("-m"):
            continue
        script, flags = found
        out = flags[flags.index("--out") + 1] if "--out" in flags else None
        if out and (Path(out) / "meta.json").exists():
            continue  # the same folder under another flag: scaling out repeats the recipe's names
        done = run(script, *flags, OMP_NUM_THREADS="1")
        assert done.returncode == 0, f"{command}\n{done.stdout[-500:]}\n{done.stderr[-1500:]}"
        ran += 1
    assert ran >= 10


def test_the_map_of_files_is_true():
    """Each row's files exist, no file of the project is missing, and the numbers of lines are nearly right."""
    named, rows = set(), re.findall(r"^\| (`[^|]*) \|[^|]*\| ([\d,]+) \|$", README, re.MULTILINE)
    for files, lines in rows:
        folder, _, names = files.partition(": ")
        paths = [ROOT / f"{folder.strip('`')}{name}.py" for name in names.split(", ")] if names else [ROOT / name.strip("`") for name in files.split()]
        paths = [file for path in paths for file in (path.iterdir() if path.is_dir() else [path]) if file.is_file()]
        named |= set(paths)
        assert sum(len(path.read_text().splitlines()) for path in paths) == pytest.approx(int(lines.replace(",", "")), rel=0.03), files
    assert {path for pattern in ("*.py", "data/*.py", "evals/*.py") for path in ROOT.glob(pattern) if path.name != "__init__.py"} <= named
