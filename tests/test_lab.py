"""The lab: runs under names of their flags, data and code; failures that stay where they are; effects, verdicts, the report."""
import json

import numpy as np
import pytest
from conftest import ROOT, run

from claims import findings
import lab
from claims import runs as runner
from claims.report import picture, write_report
from claims.runs import Run, execute, needed

GAMES = "model_a,model_b,winner\n" + "x,y,a\n" * 12 + "x,y,b\n" * 4 + "y,z,a\n" * 9 + "y,z,b\n" * 3


@pytest.fixture
def games(tmp_path):
    path = tmp_path / "games.csv"
    path.write_text(GAMES)
    return path


def test_a_runs_name_is_its_flags_its_data_and_its_code(tmp_path, games, monkeypatch):
    make = lambda *flags: Run(tmp_path, "evaluate.py", "elo", "--games", *flags)
    first, copy = make(games), tmp_path / "copy.csv"
    copy.write_text(GAMES)
    assert make(copy).key == first.key  # the content counts, not the place
    copy.write_text(GAMES + "x,z,a\n")
    assert len({first.key, make(copy).key, make(games, "--seed", 1).key}) == 3
    trained = Run(tmp_path, "train_pm.py", "--init", first)
    assert trained.key != Run(tmp_path, "train_pm.py", "--init", make(copy)).key and trained.needs == [first]
    monkeypatch.setitem(runner._versions, ROOT / "evaluate.py", "other code")
    assert make(games).key != first.key


def test_what_a_script_imports_is_its_code_but_comments_are_not(tmp_path):
    names = {path.name for path in runner.imported(ROOT / "train_lm.py")}
    assert {"train_lm.py", "model.py", "trainer.py", "tokenizer.py"} <= names and not names & {"evaluate.py", "chat.py", "elo.py"}
    script = tmp_path / "script.py"
    script.write_text('"""One."""\nx = 1  # one\n')
    before = runner._source(script)
    script.write_text('"""Two,\nlonger."""\n\nx = 1\n')
    assert runner._source(script) == before
    script.write_text('"""One."""\nx = 2\n')
    assert runner._source(script) != before


def test_runs_are_done_once_and_a_failure_stays_where_it_is(tmp_path, games):
    bad = tmp_path / "bad.csv"
    bad.write_text("model_a,model_b,winner\nx,x,a\n")
    good, fails = (Run(tmp_path / "runs", "evaluate.py", "elo", "--games", path) for path in (games, bad))
    follows = Run(tmp_path / "runs", "evaluate.py", "elo", "--games", fails)
    assert [r.key for r in needed([follows, good, fails])] == [fails.key, follows.key, good.key]
    failed = execute([follows, good], jobs=2)
    assert set(failed) == {fails.key, follows.key} and "a game is between two models" in failed[fails.key] and "which failed" in failed[follows.key]
    assert good.done and not fails.done and good.figures["games"] == 28 and len(good.items()) == 28
    made = (good.folder / "done.json").stat().st_mtime_ns
    bad.write_text(GAMES)
    mended = Run(tmp_path / "runs", "evaluate.py", "elo", "--games", bad)
    assert mended.key == good.key and execute([mended], jobs=1) == {} and (good.folder / "done.json").stat().st_mtime_ns == made


def test_an_interrupted_training_is_resumed(tmp_path, lm, comparisons_file):
    flags = ("--init", lm, "--data", comparisons_file, "--steps", 3, "--batch", 4)
    make = lambda: Run(tmp_path / "runs", "train_pm.py", *flags)
    begun = make()
    begun.out.mkdir(parents=True)
    (begun.out / "metrics.jsonl").write_text("")  # as a killed run leaves it before its first checkpoint; without --resume it is refused
    assert execute([make()], jobs=1) == {} and begun.figures["comparisons"] > 0 and (begun.out / "model.safetensors").exists()


def test_each_job_has_a_gpu_or_a_share_of_the_cores(monkeypatch):
    monkeypatch.setattr(runner, "cores", lambda: 6)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert [runner.share(slot, 3, 0) for slot in range(2)] == [{"OMP_NUM_THREADS": "2"}] * 2
    assert [runner.share(slot, 3, 2)["CUDA_VISIBLE_DEVICES"] for slot in range(3)] == ["0", "1", "0"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,7")  # those that the lab itself was given
    assert [runner.share(slot, 2, 2)["CUDA_VISIBLE_DEVICES"] for slot in range(2)] == ["5", "7"]


def test_how_scripts_are_launched():
    assert runner.launched(["train_lm.py", "--size", "test"], "torchrun --nproc_per_node 2") == ["torchrun", "--nproc_per_node", "2", "train_lm.py", "--size", "test"]
    shell = runner.launched(["train_lm.py", "--data", "a b"], "srun --gpus 1 {command}")
    assert shell[:2] == ["sh", "-c"] and shell[2].startswith("srun --gpus 1 ") and shell[2].endswith("train_lm.py --data 'a b'")


def test_differences_are_paired_and_their_interval_has_groups_and_seeds():
    rng = np.random.default_rng(0)
    base = [{i: (float(rng.random() < 0.5), str(i // 4)) for i in range(400)} for _ in range(3)]
    better = [{i: (min(1.0, value + (i % 10 == 0)), group) for i, (value, group) in seed.items()} for seed in base]
    effect, low, high = findings.difference({"": base}, {"": better})
    by_hand = 100 * np.mean([[better[s][i][0] - base[s][i][0] for i in base[s]] for s in range(3)])
    assert effect == pytest.approx(by_hand) and low < effect < high and high - low < 12
    wider = findings.difference({"": base}, {"": [better[0], base[1], {i: (0.0, g) for i, (_, g) in base[2].items()}]})
    assert wider[2] - wider[1] > 40  # seeds that disagree
    same = {"a": base, "b": base}
    two = findings.difference(same, {"a": better, "b": base})
    assert two[0] == pytest.approx(by_hand / 2) and (two[2] - two[1]) == pytest.approx((high - low) / 2)  # a mean over sets, one of which adds nothing
    assert [finding.what for finding in findings.compared("gain", same, {"a": better, "b": base})] == ["gain, mean of 2 sets", "gain, a", "gain, b"]


def test_verdicts():
    assert [findings.above("", 2, low, high).verdict for low, high in ((1, 3), (-1, 5), (-4, -1))] == ["holds", "cannot tell", "does not hold"]
    assert [findings.equal("", 0, low, high).verdict for low, high in ((-2, 2), (1, 2), (-4, 1), (1, 5), (-6, -4))] == \
        ["holds", "holds", "cannot tell", "does not hold", "does not hold"]
    assert findings.over_seeds([1.0, 2.0, 3.0]) == pytest.approx((2, 2 - 4.30 / 3**0.5, 2 + 4.30 / 3**0.5))
    assert findings.above("", *findings.over_seeds([1.0, 1.0, 1.0])).verdict == "cannot tell"  # one model for all seeds: no interval


class Scored:
    """A finished `evaluate.py pm` run of 200 comparisons, right on some of them with the context and on half without it."""

    def __init__(self, right):
        self.right, self.figures = right, {"score": "reward", "accuracy": right, "no_context": 0.5, "longer_wins": 0.5}

    def items(self):
        return [{"where": i, "group": str(i), "scores": [1, 0], "reward": [float(i < 200 * self.right), 0.5], "no_context": [float(i % 2), 0.5]} for i in range(200)]


def test_arms_that_learned_nothing_are_not_reported_as_equal():
    class scale:
        size, sizes = "test", ["test"]
    verdicts = lambda right: [finding.verdict for finding in lab.imitation_findings(
        scale, {"imitation": {"test": {"set": [Scored(right)] * 3}}, "preference model": {"test": {"set": [Scored(right)] * 3}}}, "accuracy", findings.equal)[0]]
    assert verdicts(0.9) == ["holds", "holds"] and verdicts(0.5) == ["cannot tell", "cannot tell"]


def test_the_report_is_one_file_and_tells_failures(tmp_path):
    class args:
        scale, seeds, sizes, given = "toy", 3, ["test"], ["--seeds", "3"]
    results = {"it-holds": ("It holds.", [findings.above("b minus a", 5.0, 2.0, 8.0), findings.above("c", *findings.over_seeds([1.0, 1.0]))], picture(findings.bars({"a": {"x": (50, 1)}, "b": {"x": (55, 2)}}, "accuracy, %"))),
               "it-failed": ("It fails.", None, "train_pm.py: exit code 2: no <data>")}
    write_report(tmp_path, args, results)
    page, text = (tmp_path / "report.html").read_text(), (tmp_path / "report.md").read_text()
    assert "data:image/png;base64," in page and "src='it" not in page and "no &lt;data&gt;" in page and "<script" not in page
    assert "| it-holds | +5.0 (+2.0 to +8.0) points | *holds* | It holds. | `python lab.py toy it-holds --seeds 3` |" in text
    assert "- c: +1.0 points (no interval): *cannot tell*" in text
    assert "failed: train_pm.py: exit code 2" in text and (tmp_path / "it-holds.png").read_bytes()[:4] == b"\x89PNG"
    assert json.loads((tmp_path / "results.json").read_text())["claims"]["it-holds"]["findings"][0]["verdict"] == "holds"


def test_unknown_claims_and_scales_are_told_what_there_is(tmp_path):
    done = run("lab.py", "toy", "moon-is-cheese", "--out", tmp_path)
    assert done.returncode == 2 and "no claim 'moon-is-cheese' at this scale; there are prompt-helps" in done.stderr and done.stderr.count("\n") == 1
    done = run("lab.py", "enormous", "--out", tmp_path)
    assert done.returncode == 2 and "'toy'" in done.stderr
    done = run("lab.py", "small", "--out", tmp_path)
    assert done.returncode == 2 and "small needs --data DIR" in done.stderr and done.stderr.count("\n") == 1


def test_every_claim_is_listed_with_its_statement_and_its_runs(tmp_path):
    text = run("lab.py", "-h").stdout
    assert all(name in text and f.__doc__.startswith(("Section", "Appendix")) for name, f in lab.CLAIMS.items())
    listed = run("lab.py", "toy", "prompt-helps", "--dry_run", "--out", tmp_path, "--seeds", 2).stdout
    assert "12 runs, 12 of them still to do" in listed and listed.count("train_lm.py") == 4 and listed.count("--prompt") == 4


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """A folder of the published sets' names and forms, with invented content."""
    folder, rng = tmp_path_factory.mktemp("published"), np.random.default_rng(0)
    words = lambda n: " ".join(rng.choice("the a cat dog sat ran on under big small red blue mat hill today again".split(), n))
    files = {
        "text/pages.jsonl": [{"text": words(60)} for _ in range(60)],
        "hellaswag/hellaswag_val.jsonl": [{"activity_label": f"Activity {i % 40}", "ctx": words(6), "endings": [words(4) for _ in range(4)], "label": int(rng.integers(4))}
                                          for i in range(120)],
        "hh-rlhf/harmless-base/test.jsonl": [{"chosen": f"\n\nHuman: {q}\n\nAssistant: {words(4)} x", "rejected": f"\n\nHuman: {q}\n\nAssistant: {words(4)} y"}
                                             for q in (words(5) + f" {i}" for i in range(80))],
        "alpaca-eval/pairs.jsonl": [{"prompt": words(4) + f" {i}", "chosen": words(5), "rejected": words(3)} for i in range(60)],
        "ukp-convarg/pairs.jsonl": [{"prompt": words(4) + f" {i}", "chosen": words(5), "rejected": words(3)} for i in range(60)]}
    for name, records in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("".join(json.dumps(record) + "\n" for record in records))
    posts = "".join(f'<row Id="{3 * i + 1}" PostTypeId="1" Score="2" Title="Q {i}" Body="&lt;p&gt;{words(4)}&lt;/p&gt;" />'
                    + "".join(f'<row Id="{3 * i + 2 + a}" PostTypeId="2" ParentId="{3 * i + 1}" Score="{5 * a}" Body="&lt;p&gt;{words(5)}&lt;/p&gt;" />' for a in (0, 1))
                    for i in range(60))
    (folder / "stackexchange/site").mkdir(parents=True)
    (folder / "stackexchange/site/Posts.xml").write_text(f"<posts>\n{posts.replace('/><', '/>' + chr(10) + '<')}\n</posts>\n")
    return folder


@pytest.mark.parametrize("scale", ["small", "gpu"])
def test_the_scales_of_published_sets_list_their_runs_and_say_what_is_missing(tmp_path, published, scale):
    listed = run("lab.py", scale, "--data", published, "--dry_run", "--out", tmp_path, "--sizes", "test", "--sets", "hellaswag", "hh").stdout
    assert listed.count("train_lm.py --data") == 1 and "--objective imitation" in listed and "data.prepare stackexchange" in listed
    assert "binary-equals-imitation cannot be tested: the sets that it compares" in listed and f"code-tax cannot be tested: {published}/mbpp" in listed
    assert (listed.count("--binarise") > 3) == (scale == "gpu")  # small: in one claim only


def test_a_claim_on_published_sets_from_the_text_to_the_report(tmp_path, published):
    """With the steps and amounts of a test."""
    script = tmp_path / "tiny.py"
    script.write_text("import sys; sys.path.insert(0, sys.argv.pop(1))\nimport lab, scales\nfrom data.errors import run_main\n"
                      "scales.Small.learn = ('--tokenizer', 'bytes', '--ctx', 256, '--steps', 2, '--batch', 512)\n"
                      "scales.Small.few, scales.Small.much, scales.Small.pmp = 20, ('--steps', 2), ('--batch', 8, '--steps', 2)\nif __name__ == '__main__':\n    run_main(lab.main)\n")
    flags = ("small", "pmp-sample-efficiency", "calibration", "code-tax", "--data", published, "--sets", "hellaswag", "hh", "--sizes", "test", "--seeds", 1, "--out", tmp_path / "lab")
    done = run(script, ROOT, *flags)
    report = (tmp_path / "lab/small/report.md").read_text()
    assert done.returncode == 1 and "| code-tax |  | *failed:" in report and report.count("*failed:") == 1, done.stderr  # there is no MBPP
    assert "test: with minus without pre-training, at 20 comparisons, mean of 2 sets" in report and ", hellaswag:" in report and ", hh:" in report and "mean probability given minus accuracy" in report
    assert {path.name for path in (tmp_path / "lab/small").glob("*.png")} == {"pmp-sample-efficiency.png", "calibration.png"}
