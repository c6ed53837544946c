"""The README's commands run, its code runs, its map is complete, and its figures are those of results/."""
import json
import re
import shlex
from pathlib import Path

import pytest
import torch
from conftest import ROOT, make_comparisons, make_texts, run, write_jsonl

import checkpoint
from data.packing import Layout

README = (ROOT / "README.md").read_text()
COMMANDS = [line.split("  #")[0].strip() for block in re.findall(r"```sh\n(.*?)```", README, re.DOTALL)
            for line in block.splitlines() if line.startswith(("python ", "torchrun "))]

# Flags that make a command tiny. They come last, so they override those of the README.
TINY = {
    "train_lm.py": "--size test --tokenizer bytes --ctx 256 --batch 768 --steps 2 --dtype fp32 "
                   "--held_out 0.001",
    "train_pm.py": "--size test --steps 2 --batch 4 --dtype fp32",
    "distill.py": "--sequences 64 --batch 8 --steps 2 --ctx 48 --prompt_tokens 160 --dtype fp32",
    "lab.py": "prompt-helps --dry_run --seeds 1",
    "chat.py": "--prompt_tokens 160",
}


def test_the_readme_is_short_and_names_the_tests():
    """1,500 words at most, without code."""
    words = re.sub(r"```[\s\S]*?```", "", README).split()
    assert sum(any(map(str.isalnum, word)) for word in words) <= 1500
    assert "./test.sh" in README and "./demo.sh" in README


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with what the README calls the reader's own data, and with people's votes."""
    folder = tmp_path_factory.mktemp("readme")
    write_jsonl(folder / "my_texts.jsonl", make_texts())
    for name in ("my_comparisons.jsonl", "votes.jsonl"):
        write_jsonl(folder / name, make_comparisons())
    (folder / "games.csv").write_text("model_a,model_b,winner\nlm,distilled,lm\nlm,distilled,distilled\n")
    return folder


def tiny(command, folder):
    """(script, flags) of a command on one rank, with its files in `folder`, and few steps."""
    words = shlex.split(command)
    words = words[1:] if words[0] == "python" else words[3:]  # torchrun --nproc_per_node N
    script, *flags = words if words[0] != "-m" else [" ".join(words[:2]), *words[2:]]
    files = {flag: folder / flag for flag in flags if flag.startswith("out/") or flag.endswith((".jsonl", ".csv"))}
    files["my_texts/"] = folder / "my_texts.jsonl"
    flags = [str(files.get(flag, flag)) for flag in flags]
    extra = shlex.split(TINY.get(script, ""))
    for flag in ("--size", "--tokenizer"):
        if "--init" in flags and flag in extra:  # these are for a fresh model
            del extra[extra.index(flag):extra.index(flag) + 2]
    if script == "evaluate.py" and "--prompt" in flags:
        extra += ["--prompt_tokens", "160"]
    return script, flags + extra


@pytest.fixture(scope="module")
def commands_ran(place):
    """The commands that ran, in their order."""
    ran = []
    for command in COMMANDS:
        script, flags = tiny(command, place)
        if "DATA" in command or "$model" in command or script.startswith("-m") or script == "arena.py":
            continue  # published files and models are not at hand; a server does not end
        out = flags[flags.index("--out") + 1] if "--out" in flags else None
        if out and (Path(out) / "meta.json").exists():
            continue  # the same folder again
        done = run(script, *flags, OMP_NUM_THREADS="1")
        assert done.returncode == 0, f"{command}\n{done.stdout[-500:]}\n{done.stderr[-1500:]}"
        ran.append(script)
    return ran


def test_the_commands_run_in_their_order(commands_ran):
    assert len(commands_ran) >= 10
    scripts = {"train_lm.py", "train_pm.py", "distill.py", "evaluate.py", "chat.py", "lab.py"}
    assert scripts <= set(commands_ran)


@pytest.fixture
def snippets(commands_ran, place, monkeypatch):
    """The README's Python, to run where the recipe's out/pm is."""
    monkeypatch.chdir(place)
    return re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def test_the_code_scores_a_comparison(snippets, capsys):
    exec(snippets[0], {})
    assert re.fullmatch(r"P\(the first is better\) = 0\.\d+\n", capsys.readouterr().out)


def test_ten_lines_of_transformers_give_our_rewards(snippets, capsys):
    pytest.importorskip("transformers", minversion="5")
    names = {}
    exec(snippets[1], names)
    theirs = json.loads(capsys.readouterr().out.splitlines()[-1])
    model, tokenizer, _ = checkpoint.load(names["folder"])
    parts = [tokenizer.encode(names["context"]).tolist()]
    parts += [tokenizer.encode(text).tolist() + [tokenizer.eoc] for text in names["completions"]]
    layout = Layout(lengths=[len(part) for part in parts], parents=[0] * len(parts))
    ours = model.rewards(model(torch.tensor(sum(parts, [])), layout, only_ends=True))
    torch.testing.assert_close(torch.tensor(theirs), ours.detach(), rtol=1e-5, atol=1e-5)


def test_each_file_and_folder_is_named():
    names = {path.name for path in ROOT.glob("*.py")}
    folders = [path.name for path in ROOT.iterdir() if path.is_dir() and any(path.rglob("*.py"))]
    names |= {f"{name}/" for name in folders if name != "out" and not name.startswith(".")}
    missing = {name for name in names if f"`{name}`" not in README}
    assert not missing


def test_its_links_lead_somewhere():
    for link in re.findall(r"\]\(((?!http).*?)\)", README):
        assert (ROOT / link.split("#")[0]).exists(), link


def test_its_claims_are_those_of_the_reports():
    """The table of core claims stands in the reports of the two scales with the same effects and verdicts."""
    rows = re.findall(r"^\| `([a-z-]+)` \|.*?\|(.*)\|$", README, re.MULTILINE)
    assert len(rows) == 5
    for folder, place in (("lab-toy", 0), ("lab-small/smollm2-135m", 2)):
        reports = "\n".join(path.read_text() for path in (ROOT / "results" / folder).rglob("report.md"))
        for name, cells in rows:
            effect, verdict = (cell.strip() for cell in cells.split("|")[place:place + 2])
            (line,) = [line for line in reports.splitlines() if line.startswith(f"| {name} |")]
            assert effect in line and verdict in line, name
