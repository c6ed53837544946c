"""The lab: runs named by flags, data and code; statistics, premises and verdicts; figures and the report."""
import argparse
import json
import math
import multiprocessing.forkserver
import os
import re
import time
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from conftest import ROOT, make_comparisons, run, run_refused, write_jsonl

import checkpoint
import lab
import plan
from claims import findings, report, runs, scales
from claims.figures import draw_panel, picture
from claims.findings import (
    Estimate, Finding, Outcome, Panel, compared, finding, growing, mean, minus, outcome, over_seeds)
from claims.published import BINARY, RANKED, Small
from claims.report import introduction, verdict_line, write_report
from claims.runs import Run, execute, needed
from evals import pm

GAMES = "model_a,model_b,winner\n" + "x,y,a\n" * 12 + "x,y,b\n" * 4 + "y,z,a\n" * 9 + "y,z,b\n" * 3


# ------------------------------------------------------------------------------------------------------------
# Runs


@pytest.fixture
def games(tmp_path):
    path = tmp_path / "games.csv"
    path.write_text(GAMES)
    return path


def elo(folder, *flags):
    return Run(folder, "evaluate.py", "elo", "--games", *flags, seconds=1)


def test_a_runs_name_is_its_flags_its_data_and_its_code(tmp_path, games, monkeypatch):
    first, copy = elo(tmp_path, games), tmp_path / "copy.csv"
    copy.write_text(GAMES)
    assert elo(tmp_path, copy).key == first.key  # the content counts, not the place
    copy.write_text(GAMES + "x,z,a\n")
    assert len({first.key, elo(tmp_path, copy).key, elo(tmp_path, games, "--seed", 1).key}) == 3
    trained = Run(tmp_path, "train_pm.py", "--init", first, seconds=1)
    other = Run(tmp_path, "train_pm.py", "--init", elo(tmp_path, copy), seconds=1)
    assert trained.key != other.key and trained.needs == [first]
    monkeypatch.setattr(runs, "code_digest", lambda script: "other code")
    assert elo(tmp_path, games).key != first.key


def test_the_code_of_a_script_is_what_it_imports(tmp_path, monkeypatch):
    for name, text in {"script": "import used", "used": "x = 1", "unused": "x = 1"}.items():
        (tmp_path / f"{name}.py").write_text(text + "\n")
    monkeypatch.setattr(runs, "ROOT", tmp_path)

    def digest():
        runs.code_digest.cache_clear()
        return runs.code_digest("script.py")
    before = digest()
    (tmp_path / "unused.py").write_text("x = 2\n")
    assert digest() == before
    (tmp_path / "used.py").write_text("x = 2\n")
    assert digest() != before
    before = digest()
    (tmp_path / "data/prompts").mkdir(parents=True)
    (tmp_path / "data/prompts/hhh.txt").write_text("Be kind.\n")  # --prompt hhh
    assert digest() != before
    monkeypatch.undo()
    runs.code_digest.cache_clear()
    names = [f"-m data.prepare {name}" for name in ("stackexchange", "reddit", "human-vs-model")]
    assert len({*map(runs.code_digest, names)}) == 3  # data.prepare imports its sources by name


def test_a_run_of_code_that_changed_since_the_lab_began_is_not_kept(tmp_path, games, monkeypatch):
    later = elo(tmp_path / "runs", games)
    digest = runs.code_digest
    changed = lambda script: "new code"  # noqa: E731
    changed.cache_clear = digest.cache_clear
    monkeypatch.setattr(runs, "code_digest", changed)
    with pytest.raises(RuntimeError, match="the code was changed after the lab began"):
        later.execute("", {})
    assert not later.done


def test_models_of_100m_parameters_learn_at_the_rate_found_for_them():
    small, large = (float(scales.rate_of(scales.parameters(size), 1024)) for size in ("42m", "197m"))
    assert large == pytest.approx(0.3 * small, rel=0.01)


def test_runs_are_done_once_and_a_failure_stays_where_it_is(tmp_path, games):
    bad = tmp_path / "bad.csv"
    bad.write_text("model_a,model_b,winner\nx,x,a\n")
    good, fails = (elo(tmp_path / "runs", path) for path in (games, bad))
    follows = elo(tmp_path / "runs", fails)
    assert [r.key for r in needed([follows, good, fails])] == [fails.key, follows.key, good.key]
    seen = []
    failed = execute([follows, good], jobs=2, after_each=lambda failed: seen.append((good.done, len(failed))))
    assert set(failed) == {fails.key, follows.key} and seen[-1] == (True, 2)
    assert "a game is between two models" in failed[fails.key] and "which failed" in failed[follows.key]
    assert good.done and not fails.done and good.figures["games"] == 28 and len(good.items()) == 28
    made = (good.folder / "done.json").stat().st_mtime_ns
    bad.write_text(GAMES)
    mended = elo(tmp_path / "runs", bad)
    assert mended.key == good.key and execute([mended], jobs=1) == {}
    assert (good.folder / "done.json").stat().st_mtime_ns == made


def test_an_interrupted_training_is_resumed(tmp_path, lm, comparisons_file):
    begun = Run(tmp_path / "runs", "train_pm.py", "--init", lm, "--data", comparisons_file, "--steps", 3,
                "--batch", 4, seconds=1)
    begun.out.mkdir(parents=True)
    # As a killed run leaves it before its first checkpoint; without --resume it would be refused.
    (begun.out / "metrics.jsonl").write_text("")
    assert execute([begun], jobs=1) == {} and begun.figures["comparisons"] > 0
    assert (begun.out / "model.safetensors").exists() and not (begun.out / "train_state.pt").exists()


def test_exit_codes_are_not_lost_between_jobs(monkeypatch):
    """Python's own code loses one now and then, and more often where reading it takes a while."""
    read = multiprocessing.forkserver.read_signed

    def read_slowly(sentinel):
        time.sleep(0.01)
        return read(sentinel)
    monkeypatch.setattr(multiprocessing.forkserver, "read_signed", read_slowly)
    with ThreadPoolExecutor(4) as pool:
        codes = list(pool.map(lambda i: runs.exit_code(os._exit, i % 5), range(40)))
    assert codes == [i % 5 for i in range(40)]


def test_each_job_has_a_gpu_or_a_share_of_the_cores(monkeypatch):
    monkeypatch.setattr(runs, "cores", lambda: 6)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    of_three = {"OMP_NUM_THREADS": "2", "HHH_PROCESSES_PER_DEVICE": "3"}
    assert [runs.share(slot, 3, 0) for slot in range(2)] == [of_three] * 2
    assert [runs.share(slot, 3, 2)["CUDA_VISIBLE_DEVICES"] for slot in range(3)] == ["0", "1", "0"]
    assert runs.share(0, 3, 2)["HHH_PROCESSES_PER_DEVICE"] == "2"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,7")  # those that the lab itself was given
    assert [runs.share(slot, 2, 2)["CUDA_VISIBLE_DEVICES"] for slot in range(2)] == ["5", "7"]


def test_how_scripts_are_launched():
    words = ["torchrun", "--nproc_per_node", "2", "train_lm.py", "--size", "test"]
    assert runs.launched(["train_lm.py", "--size", "test"], "torchrun --nproc_per_node 2") == words
    shell = runs.launched(["train_lm.py", "--data", "a b"], "srun --gpus 1 {command}")
    assert shell[:2] == ["sh", "-c"] and shell[2].startswith("srun --gpus 1 ")
    assert shell[2].endswith("train_lm.py --data 'a b'")


# ------------------------------------------------------------------------------------------------------------
# Statistics


def coins(seed, n=400, per_group=4):
    """Values of n items, 0 or 1 at random, in groups."""
    rng = np.random.default_rng(seed)
    return {i: (float(rng.random() < 0.5), str(i // per_group)) for i in range(n)}


def test_differences_are_paired_and_their_interval_has_groups_and_seeds():
    base = [coins(seed) for seed in range(3)]
    better = [{i: (min(1.0, value + (i % 10 == 0)), group) for i, (value, group) in seed.items()}
              for seed in base]
    effect, low, high, over, data = mean(minus({"": better}, {"": base}))
    by_hand = 100 * np.mean([[better[s][i][0] - base[s][i][0] for i in base[s]] for s in range(3)])
    assert effect == pytest.approx(by_hand) and low < effect < high and high - low < 12
    assert over == "groups and seeds" and data == "400 items in 100 groups, 3 seeds"
    disagreeing = [better[0], base[1], {i: (0.0, group) for i, (_, group) in base[2].items()}]
    wider = mean(minus({"": disagreeing}, {"": base}))
    assert wider.high - wider.low > 40
    # A mean over two sets, one of which adds nothing.
    first, second = {"a": base, "b": base}, {"a": better, "b": base}
    two = mean(minus(second, first))
    assert two.effect == pytest.approx(by_hand / 2) and two.high - two.low == pytest.approx((high - low) / 2)
    assert [finding.what for finding in compared("y > x", {"x": first, "y": second})] == [
        "y minus x, mean of 2 sets", "y minus x, a", "y minus x, b"]


def test_groups_hang_together():
    """Items that are copies of each other within a group tell no more than one item for each group."""
    single = coins(0, n=100, per_group=1)
    alone = mean({"": [single]})
    copies = mean({"": [{(i, copy): value for i, value in single.items() for copy in range(9)}]})
    assert copies.high - copies.low == pytest.approx(alone.high - alone.low)


def test_few_groups_make_wide_intervals():
    """As few seeds do; and where one of several sets has a single group there is no interval."""
    two = mean({"": [{i: (float(i // 4), str(i // 4)) for i in range(8)}]})
    error = 100 * 0.5  # of the mean of 0 and 1
    assert two.effect == 50 and two.high - two.effect == pytest.approx(12.71 * error)
    hundred = mean({"": [coins(0)]})
    alone = {i: (value, "the only group") for i, (value, _) in coins(0).items()}
    assert math.isinf(mean({"a": [coins(0)], "b": [alone]}).high) and not math.isinf(hundred.high)
    assert [round(findings.student(n), 2) for n in (6, 11, 21, 101, 10**6)] == [2.57, 2.23, 2.09, 1.98, 1.96]


def test_one_model_scored_under_three_seeds_is_one_seed():
    once, thrice = mean({"": [coins(0)]}), mean({"": [coins(0)] * 3})
    assert thrice == once and thrice.over == "groups" and thrice.data.endswith("1 seed")
    other = mean({"": [coins(0), coins(0), coins(1)]})  # two models, so Student's factor is that of two seeds
    assert other.data.endswith("2 seeds") and other.high - other.low > 5 * (once.high - once.low) / 2
    assert finding("", ">", over_seeds([1.0, 1.0, 1.0])).verdict == "cannot tell"  # one model, and no items
    assert math.isinf(over_seeds([1.0, 1.0, 1.0]).low)


def test_seeds_may_have_items_of_their_own():
    found = mean({"": [{f"{seed} {i}": value for i, value in coins(seed).items()} for seed in range(3)]})
    every = [value for seed in range(3) for value, _ in coins(seed).values()]
    assert found.effect == pytest.approx(100 * np.mean(every)) and found.data.endswith("3 seeds")


def test_verdicts_on_one_difference():
    def verdicts(sign, *intervals):
        return [finding("", sign, Estimate(0, *ends)).verdict for ends in intervals]
    assert verdicts(">", (1, 3), (-1, 5), (-4, -1)) == ["holds", "cannot tell", "does not hold"]
    # Up to 3 points count as none, also where the interval has no 0 in it.
    assert verdicts("=", (-2, 2), (1, 2), (-4, 1), (1, 5), (-6, -4), (4, 5)) == [
        "holds", "holds", "cannot tell", "cannot tell", "does not hold", "does not hold"]
    assert verdicts("<=", (-9, 2), (1, 2), (-4, 4), (1, 5), (4, 5)) == [
        "holds", "holds", "cannot tell", "cannot tell", "does not hold"]
    half = 4.30 / 3**0.5  # Student's
    assert over_seeds([1.0, 2.0, 3.0])[:3] == pytest.approx((2, 2 - half, 2 + half))


def scored(skill, n=600, seed=0, temperature=1.0):
    """A finished `evaluate.py pm` run; its rewards are calibrated if the temperature is 1."""
    rng = np.random.default_rng(seed)
    logits = np.abs(rng.normal(0, skill, n))
    right = rng.random(n) < 1 / (1 + np.exp(-logits))
    margin = temperature * logits * np.where(right, 1, -1)
    items = [{"where": i, "group": str(i // 2), "scores": [1, 0], "reward": [m, 0.0],
              "no_context": [float(i % 2), 0.5]} for i, m in enumerate(margin)]
    return FakeRun({"score": "reward", "n": n, "groups": n // 2, "accuracy": float(np.mean(margin > 0)),
                    "accuracy_se": 0.02, "longer_wins": 0.52, "longer_wins_se": 0.02, "shorter_wins": 0.48,
                    "shorter_wins_se": 0.02, "no_context": 0.5,
                    "reliability": pm.calibration(margin, np.ones(n))[2]}, items)


class FakeRun:
    def __init__(self, figures, items):
        self.figures, self.items = figures, lambda: items


@pytest.mark.parametrize("temperature, effect", [
    (1.0, 0.0), (2.0, 75 - 100 / (1 + 3**-0.5)), (0.5, 75 - 90.0)])
def test_calibration_is_how_often_a_model_is_right_where_it_says_75_percent(temperature, effect):
    found = findings.overconfidence({"": [scored(2.0, 6000, seed, temperature) for seed in range(3)]})
    assert found.effect == pytest.approx(effect, abs=2) and found.low - 1 < effect < found.high + 1


def test_calibration_has_an_interval_by_group():
    one = findings.overconfidence({"": [scored(2.0, 600)]})
    many = findings.overconfidence({"": [scored(2.0, 6000)]})
    ratio = (one.high - one.low) / (many.high - many.low)
    assert one.over == "groups" and ratio == pytest.approx(10**0.5, rel=0.3)


def games_of(shares):
    """Games of three players in as many contexts as there are shares that plain wins."""
    return FakeRun({}, [{"model_a": a, "model_b": b, "winner": share, "context": context} for a, b, part in (
        ("plain", "prompted", 0), ("plain", "distilled", 0), ("prompted", "distilled", 0.5))
        for context, share in enumerate(shares if not part else [part] * len(shares))])


def test_elo_resamples_contexts():
    """All games of a context hang together: 40 contexts tell as much however many players meet in them."""
    shares = np.random.default_rng(0).random(40)
    found = findings.elo_difference([games_of(shares)], "prompted", "plain")
    won = 1 - shares.mean()
    assert found.effect == pytest.approx(400 * math.log10(won / (1 - won)), abs=3) and found.over == "groups"
    error = shares.std() / 40**0.5 / (won * (1 - won)) * 400 / math.log(10)
    assert found.high - found.effect == pytest.approx(1.96 * error, rel=0.15)


def test_an_ensemble_is_compared_with_its_members_over_groups():
    members = {"": [coins(seed) for seed in range(3)]}
    found = findings.gain_over_members({"": [coins(3)]}, members)
    each = [mean(minus({"": [coins(3)]}, {"": [member]})).effect for member in members[""]]
    assert found.effect == pytest.approx(np.mean(each)) and found.over == "groups"


# ------------------------------------------------------------------------------------------------------------
# Verdicts on whole claims


def with_verdict(verdict):
    return Finding("a minus b", 1.0, 0.5, 1.5, "groups and seeds", "9 items in 3 groups, 3 seeds", verdict)


@pytest.mark.parametrize("parts, premises, verdict", [
    (["holds", "holds"], [], "holds"), (["holds", "cannot tell"], [], "cannot tell"),
    (["holds", "does not hold"], [], "does not hold"),
    (["cannot tell", "does not hold"], [], "does not hold"),
    (["holds"], ["cannot tell"], "cannot tell"), (["does not hold"], ["does not hold"], "cannot tell"),
    (["holds"], ["holds"], "holds")])
def test_a_claim_holds_if_all_its_parts_and_premises_hold(parts, premises, verdict):
    assert Outcome([*map(with_verdict, parts)], [*map(with_verdict, premises)], [], {}).verdict == verdict


def right_on(share, n=300):
    """Values of three seeds that are right on such a share of n items."""
    return {"": [{i: (float((i * 7 + seed) % n < share * n), str(i)) for i in range(n)} for seed in range(3)]}


def test_growing_claims_test_both_their_parts_and_say_what_one_size_leaves_open():
    found = {"x": {"test": right_on(0.5), "0.8m": right_on(0.5)},
             "y": {"test": right_on(0.6), "0.8m": right_on(0.9)}}
    both = growing(found, {}, "y > x", ["y > chance"])
    assert both.verdict == "holds" and len(both.parts) == 2 and "0.8M" in both.parts[0].what
    shrinking = {name: {"test": by_size["0.8m"], "0.8m": by_size["test"]} for name, by_size in found.items()}
    assert growing(shrinking, {}, "y > x", []).verdict == "does not hold"
    one = growing({name: {"0.8m": by_size["0.8m"]} for name, by_size in found.items()}, {}, "y > x", [])
    assert one.parts[0].verdict == "holds" and one.verdict == "cannot tell" and "one size" in one.untested
    assert report.effect_and_verdict(one)[0].endswith("; 1 of 2 parts hold")


def test_equality_must_hold_on_each_set():
    """Differences that cancel in the mean are differences."""
    few, many = right_on(0.5, 3000)[""], right_on(0.9, 3000)[""]
    found = {"x": {"a": few, "b": many}, "y": {"a": many, "b": few}}
    told = outcome(found, {}, ["x = y"])
    assert told.parts[0].verdict == "holds" and told.verdict == "does not hold"


def test_calibration_must_hold_on_each_set(made_up, monkeypatch):
    monkeypatch.setattr(scales.Toy, "ranked", ("first", "second"))
    assert [part.what.split(", ")[-1] for part in made_up("calibration", draw=undrawn).parts[1:]] == [
        "first", "second"]


def test_a_problem_without_a_right_sample_has_none_to_choose(made_up):
    """A model that always finds a right sample is right where there is one, in 87 of 100 problems, and four in
    ten samples are right."""
    told = made_up("accuracy-at-k", has("imitation", -0.9, 9.0), draw=undrawn)
    assert told.premises[0].effect == pytest.approx(87 - 40, abs=4)


def test_all_language_models_read_the_hhh_items_in_the_same_context(tmp_path):
    class args:
        out, lm, pairs, seeds, many_seeds, sizes = tmp_path, None, None, 1, 1, ["test"]
    claim = lab.CLAIMS["distilled-equals-prompted"](Invented(args))
    flags = {name: runs[""][0].flags for name, runs in next(claim).items()}
    assert "--ctx" not in flags["plain"]
    finetuned = flags["finetuned on it"]
    assert finetuned[finetuned.index("--ctx") + 1] == 256  # it was finetuned in windows of 64


@pytest.fixture
def made_up(tmp_path, monkeypatch):
    """A function that concludes a claim from made-up runs; skill(run) says how good a run is."""
    def conclude(name, skill=lambda run: 1.0, sizes=("test", "0.8m"), seeds=3, draw=picture):
        results = {}
        monkeypatch.setattr(lab, "picture", draw)

        def result(run):
            if run.key not in results:
                results[run.key] = made_up_result(run, skill(run))
            return results[run.key]
        monkeypatch.setattr(Run, "figures", property(lambda run: result(run)[0]))
        monkeypatch.setattr(Run, "items", lambda run: result(run)[1])

        class args:
            out, data, lm, pairs, sets = tmp_path, tmp_path, None, None, RANKED + BINARY
        args.seeds, args.many_seeds, args.sizes = seeds, seeds, list(sizes)
        scale = Published if name in scales.Toy.claims_left_out else Invented
        claim = lab.CLAIMS[name](scale(args))
        next(claim)
        return lab.concluded(claim)
    return conclude


class Invented(scales.Toy):
    """The toy scale without its worlds."""

    def __init__(self, args):
        scales.Scale.__init__(self, args)

    def data(self, name):
        return name

    def kinds(self):
        return {str(group): ("fact", "sum")[group % 2] for group in range(120)}

    def has_contexts(self, name):
        return name != "bare"


class Published(Small):
    """Published sets without files."""

    def data(self, name):
        return name

    def has_contexts(self, name):
        return True


def words(run):
    """All flags of a run and of the models that it needs."""
    return [str(flag) for flag in run.flags if not isinstance(flag, Run)] + [
        word for need in run.needs if need.trains for word in words(need)]


def made_up_result(run, skill, n=240):
    """(figures, items) as a run of its kind leaves them, with a margin of about skill in each item.

    An item is as hard in one run as in another; the noise depends on the flags, without paths."""
    flags = " ".join(word for word in words(run) if "/" not in word)
    rng = np.random.default_rng(zlib.crc32(flags.encode()))
    hardness = np.random.default_rng(0).permutation(np.linspace(-1.5, 1.5, n))
    margin = skill - hardness + rng.normal(0, 0.1, n)
    kind, is_imitation = run.flags[0], "imitation" in words(run)
    place = [{"where": i, "item": i, "group": str(i // 2), "scores": [1, 0]} for i in range(n)]
    rate = float(np.mean(margin > 0))
    if run.trains:
        loss, accuracy = rng.normal(3 - skill, 0.01), rng.normal(0.5 + skill / 10, 0.005)
        return {"loss": loss, "accuracy": accuracy}, []
    if kind == "pm":
        how = "mean" if is_imitation else "reward"
        found = scored(1.0)
        keys = {how: margin, "no_context": margin - skill, "mean_of_3": margin + 0.3, "least_of_3": margin}
        items = [at | {key: [value[i], 0.0] for key, value in keys.items()} for i, at in enumerate(place)]
        return {**found.figures, "score": how, "n": n, "groups": n // 2, "accuracy": rate, "mean_of_3": rate,
                "least_of_3": rate}, items
    if kind in ("hhh", "truthfulqa", "choice"):
        items = [{**at, "category": ("helpful", "honest")[i % 2], "scores": [2, 0], "completions": ["a", "bc"],
                  **dict.fromkeys(("mean", "mi", "sum"), [margin[i], 0.0])} for i, at in enumerate(place)]
        return {"chance": {"MC1": 0.5}}, items
    if kind == "toxicity":
        items = [{"prompt": str(i), "toxicity": [float(m < 0)]} for i, m in enumerate(margin)]
        return {"mean": 1 - rate}, items
    if kind == "lambada":
        items = [at | {"right": bool(m > 0), "log_prob": m - 4} for at, m in zip(place, margin)]
        return {"accuracy": rate, "log_prob": skill - 4}, items
    if kind == "rerank":
        right = rng.random((n, 4)) < 0.4
        how, name = ("mean", "mean_log-prob") if is_imitation else ("reward", "reward")
        items = [at | {"right": marks.astype(int).tolist(), how: (skill * marks + rng.random(4)).tolist()}
                 for at, marks in zip(place, right)]
        keys = [f"accuracy@{k}_{key}" for k in (1, 2) for key in (name, "chance", "best_possible")]
        return dict.fromkeys(keys, 0.5), items
    if kind == "elo":
        items = games_of(np.clip(rng.normal(0.5 - skill / 9, 0.1, 60), 0, 1)).items()
        players = {name: {"elo": rng.normal()} for name in ("plain", "prompted", "distilled")}
        return {"players": players}, items
    if kind == "mbpp":
        return {"pass@1": rate}, [{"id": i, "passed": int(m > 0), "n": 1} for i, m in enumerate(margin)]
    raise AssertionError(f"no made-up result for {run.script} {kind}")


def has(word, more, otherwise=0.5):
    """A skill: `more` for runs with this word among their flags or those of what they need."""
    return lambda run: more if word in words(run) else otherwise


@pytest.mark.parametrize("name", lab.CLAIMS)
def test_every_claim_comes_to_a_verdict_with_premises_and_a_figure(made_up, name):
    told = made_up(name)
    assert not isinstance(told, str), told
    assert told.png[:4] == b"\x89PNG" and told.parts
    assert told.verdict in ("holds", "does not hold", "cannot tell")
    assert told.premises or name == "toxicity-falls"
    if name not in ("ensembles", "scaling"):
        assert not isinstance(made_up(name, sizes=["0.8m"], seeds=1, draw=undrawn), str)


def undrawn(outcome):
    return b""


def badly_binarised(run):
    """Pre-training has learned nothing, and yet the binarised arm is the better one."""
    return -1.0 if run.trains else has("--binarise", 1.0, 0.0)(run)


def test_without_contexts_chance_takes_the_place_of_no_context(made_up, monkeypatch):
    """What a model knows without a context is then all that it knows."""
    monkeypatch.setattr(scales.Toy, "ranked", ("bare",))
    told = made_up("ranked-beats-imitation", has("imitation", 0.0, 1.0), draw=undrawn)
    assert {seed for seeds in told.panels["all kinds"].series["no context"].values() for seed in seeds} == {50}
    assert told.premises[0].verdict == "holds"


@pytest.mark.parametrize("contexts, expected", [(["", ""], False), (["", "Why?"], True)])
def test_whether_a_set_has_contexts_is_read_from_it(tmp_path, contexts, expected):
    path = write_jsonl(tmp_path / "set.jsonl", [
        {"context": context, "completions": ["a", "b"], "scores": [1, 0]} for context in contexts])
    own = scales.Own.__new__(scales.Own)
    own.files = {"own": path}
    assert own.has_contexts("own") == expected


@pytest.mark.parametrize("name, skill, premise", [
    ("prompt-helps", has("--prompt", -0.2, -0.9), "prompted minus chance"),
    ("distilled-equals-prompted", has("--prompt", 0.6, 0.9), "prompted minus plain"),
    ("ranked-beats-imitation", has("imitation", -0.9, -0.2), "no context"),
    ("binary-equals-imitation", lambda run: -0.2, "no context"),
    ("pmp-sample-efficiency", has("--sizes", -0.2, -0.9), "minus chance"),
    ("binary-pmp-transfers-better", badly_binarised, "own held-out"),
    ("human-vs-model-pairs", has("--pairs_per_group", 0.3, 0.9), "minus none"),
    ("accuracy-at-k", has("imitation", -0.9, -0.3), "at random"),
    ("elo-ranks", lambda run: -0.2, "length rulers"),
    ("prior-not-finetuning", has("--ctx", 0.6, 0.9), "prompted minus untouched"),
    ("code-tax", lambda run: -9.0, "0.8M"),
    ("alignment-tax", lambda run: -9.0, "words right"),
    ("truthfulqa-needs-mutual-information", lambda run: -0.2, "chance"),
    ("calibration", lambda run: -0.2, "chance"),
    ("synthetic-transfer", badly_binarised, "own held-out")])
def test_nothing_can_be_told_where_nothing_was_learned_or_a_premise_fails(made_up, name, skill, premise):
    told = made_up(name, skill, draw=undrawn)
    assert told.verdict == "cannot tell"
    assert any(premise in missing.what for missing in told.premises if missing.verdict != "holds")


def test_binary_arms_are_equal_only_if_they_are_on_each_kind_of_question(made_up):
    told = made_up("binary-equals-imitation", draw=undrawn)
    assert [part.what.split(", ")[-1] for part in told.parts[1:]] == ["fact", "sum"]
    ranked = made_up("ranked-beats-imitation", draw=undrawn)
    assert len(ranked.parts) == 2 and any(found.what.endswith(", fact") for found in ranked.beside)


def test_the_alignment_tax_is_the_words_log_prob(made_up):
    """It is paid by the smallest model and not by the largest; accuracies stand beside it."""
    paid = has("--prompt", 0.2, 1.0)
    told = made_up("alignment-tax", lambda run: 1.0 if "0.8m" in words(run) else paid(run), draw=undrawn)
    assert told.verdict == "holds" and {part.unit for part in told.parts} == {"nats"}
    assert made_up("alignment-tax", paid, draw=undrawn).verdict == "does not hold"


def test_a_score_that_does_not_beat_the_longest_answer_says_nothing(made_up):
    """The made-up models are right where their margin is above 0; the longest answer is always wrong."""
    told = made_up("truthfulqa-needs-mutual-information", draw=undrawn)
    assert [premise.verdict for premise in told.premises] == ["holds", "holds"]
    assert [part.what.split(": ")[0] for part in told.parts[1:]] == ["sum log-prob", "mutual information"]
    one = made_up("truthfulqa-needs-mutual-information", sizes=["0.8m"], draw=undrawn)
    assert one.untested and len(one.parts) == 1


def test_each_source_must_help(made_up):
    def skill(run):
        flags = words(run)
        only_wikipedia = "1700" in flags and "7000" not in flags
        return 0.3 if "--sizes" not in flags or only_wikipedia else 1.5
    told = made_up("pmp-by-source", skill, draw=undrawn)
    assert told.parts[0].verdict == "holds" and told.verdict != "holds"
    helping = {part.what: part.verdict for part in told.parts if part.what.endswith("minus none")}
    assert helping == {"stackexchange minus none": "holds", "reddit minus none": "holds",
                       "wikipedia minus none": "cannot tell"}


# ------------------------------------------------------------------------------------------------------------
# Figures and report


def test_figures_show_no_noise_and_no_bar_past_100_percent():
    from matplotlib import pyplot as plt
    figure, (still, high) = plt.subplots(1, 2)
    draw_panel(still, Panel({"a": {"x": [0.0, 0.0], "y": [0.0, 0.04]}}, "passed, %"))
    assert np.ptp(still.get_ylim()) >= 4
    draw_panel(high, Panel({"a": {"x": [92.0, 99.0, 100.0]}}, "right, %", chance=50))
    top = max(segment[:, 1].max() for bars in high.collections for segment in bars.get_segments())
    assert top == 100 and "chance" in high.get_legend_handles_labels()[1]
    plt.close(figure)


def test_sizes_are_named_by_their_parameters():
    assert [scales.size_label(size) for size in ("test", "0.8m", "13m", "2.7b", "52b")] == \
        ["0.1M", "0.8M", "13M", "2.72B", "51.5B"]


def test_the_report_is_one_file_and_tells_failures(tmp_path):
    class args:
        scale, seeds, sizes, given = "toy", 3, ["test"], ["--seeds", "3"]
    panel = Panel({"": {"a": [49, 51], "b": [54, 56]}}, "accuracy, %")
    part = finding("b minus a", ">", Estimate(5.0, 2.0, 8.0, data="9 items in 3 groups, 3 seeds"))
    told = Outcome([part], [], [finding("c", ">", over_seeds([1.0, 1.0]))], {"": panel})
    told.png, told.explanation = picture(told), "Because of the weather."
    results = {"it-holds": ("It holds.", told),
               "it-failed": ("It fails.", "train_pm.py: exit code 2: no <data>")}
    write_report(tmp_path, args, results)
    page, text = (tmp_path / "report.html").read_text(), (tmp_path / "report.md").read_text()
    assert "data:image/png;base64," in page and "src='it" not in page
    assert "no &lt;data&gt;" in page and "<script" not in page and "<em>holds</em>" in page
    row = "| it-holds | +5.0 (+2.0 to +8.0) points | *holds* | It holds. |"
    assert f"{row} `python lab.py toy it-holds --seeds 3` |" in text
    assert "- beside: c: +1.0 points (no interval): *cannot tell*" in text
    assert "Verdict: *holds*." in text and "9 items in 3 groups, 3 seeds" in text
    assert "failed: train_pm.py: exit code 2" in text and (tmp_path / "it-holds.png").read_bytes() == told.png
    claim = json.loads((tmp_path / "results.json").read_text())["claims"]["it-holds"]
    assert claim["verdict"] == claim["findings"][0]["verdict"] == "holds"
    assert claim["findings"][1]["low"] is None
    assert "weather" not in text  # nothing has to be explained where a claim holds
    told.untested = "what <is> left"
    assert verdict_line(told).startswith("Verdict: *cannot tell*. Not tested: what <is> left.")
    told.parts = [finding("b minus a", ">", Estimate(-5.0, -8.0, -2.0))]
    assert verdict_line(told) == (
        "Verdict: *does not hold*. Not tested: what <is> left. Because of the weather.")


def test_the_report_says_how_many_verdicts_chance_makes():
    told = Outcome([with_verdict("holds")] * 2, [], [], {})
    assert "10 verdicts on 20 parts" in introduction(dict.fromkeys(range(10), told))
    assert "about 1.0 of the 20 parts" in introduction(dict.fromkeys(range(10), told))


# ------------------------------------------------------------------------------------------------------------
# The command


def test_unknown_claims_and_scales_are_told_what_there_is(tmp_path):
    for flags, message in (
            (["toy", "moon-is-cheese"], "no claim 'moon-is-cheese' at this scale; there are prompt-helps"),
            (["enormous"], "'toy'"), (["toy", "--seeds", 0], "--seeds"),
            (["small"], "small needs --data DIR")):
        done = run("lab.py", *flags, "--out", tmp_path)
        assert done.returncode == 2 and message in done.stderr and done.stderr.count("\n") == 1


def test_every_claim_is_listed_with_its_statement_and_its_runs(tmp_path):
    text = run("lab.py", "-h").stdout
    for name, claim in lab.CLAIMS.items():
        assert name in text and claim.__doc__.startswith(("Section", "Appendix"))
        assert not lab.explanation(name) or lab.explanation(name) not in text
    listed = run("lab.py", "toy", "prompt-helps", "--dry_run", "--out", tmp_path, "--seeds", 2).stdout
    assert "12 runs, 12 of them still to do" in listed
    assert listed.count("train_lm.py") == 4 and listed.count("--prompt") == 4


def test_the_first_claims_runs_come_first(tmp_path):
    flags = ("--dry_run", "--out", tmp_path, "--sizes", "0.8m", "--seeds", 2)
    listed = run("lab.py", "toy", "prompt-helps", "ranked-beats-imitation", *flags).stdout
    scripts = [line.split("python ")[1].split()[:2] for line in listed.splitlines() if "  python " in line]
    assert [script for script, _ in scripts[:6]].count("train_lm.py") == 2
    assert all(script == "train_lm.py" or benchmark == "hhh" for script, benchmark in scripts[:6])


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """A folder of the published sets' names and forms, with invented content."""
    folder, rng = tmp_path_factory.mktemp("published"), np.random.default_rng(0)
    vocabulary = "the a cat dog sat ran on under big small red blue mat hill today again".split()

    def text(n):
        return " ".join(rng.choice(vocabulary, n))

    def dialogue(question, end):
        return f"\n\nHuman: {question}\n\nAssistant: {text(4)} {end}"
    questions = [f"{text(5)} {i}" for i in range(80)]
    files = {
        "text/pages.jsonl": [{"text": text(60)} for _ in range(60)],
        "hellaswag/hellaswag_val.jsonl": [
            {"activity_label": f"Activity {i % 40}", "ctx": text(6), "endings": [text(4) for _ in range(4)],
             "label": int(rng.integers(4))} for i in range(120)],
        "hh-rlhf/harmless-base/test.jsonl": [
            {"chosen": dialogue(asked, "x"), "rejected": dialogue(asked, "y")} for asked in questions]}
    for name in ("alpaca-eval/pairs.jsonl", "ukp-convarg/pairs.jsonl"):
        files[name] = [{"prompt": f"{text(4)} {i}", "chosen": text(5), "rejected": text(3)}
                       for i in range(60)]
    for name, records in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        write_jsonl(folder / name, records)

    def post(number, flags):
        return f'<row Id="{number}" {flags} Body="&lt;p&gt;{text(5)}&lt;/p&gt;" />'
    posts = ["<posts>"]
    for i in range(1, 180, 3):
        posts.append(post(i, f'PostTypeId="1" Score="2" Title="Q {i}"'))
        posts += [post(i + 1 + a, f'PostTypeId="2" ParentId="{i}" Score="{5 * a}"') for a in (0, 1)]
    (folder / "stackexchange/site").mkdir(parents=True)
    (folder / "stackexchange/site/Posts.xml").write_text("\n".join([*posts, "</posts>"]) + "\n")
    return folder


@pytest.mark.parametrize("scale", ["small", "gpu"])
def test_the_scales_of_published_sets_list_their_runs_and_say_what_is_missing(tmp_path, published, scale):
    listed = run("lab.py", scale, "--data", published, "--dry_run", "--out", tmp_path, "--sizes", "test",
                 "--sets", "hellaswag", "hh").stdout
    assert listed.count("train_lm.py --data") == 1 and "--objective imitation" in listed
    assert "data.prepare stackexchange" in listed
    assert "binary-equals-imitation cannot be tested: the sets that it compares" in listed
    assert f"code-tax cannot be tested: {published}/mbpp" in listed
    assert (listed.count("--binarise") > 3) == (scale == "gpu")  # small: in one claim only


def test_a_given_model_takes_the_place_of_those_that_are_trained(tmp_path, published, lm):
    """Its size is the number of its parameters, and all arms learn at one rate that goes with its width."""
    done = run("lab.py", "small", "ranked-beats-imitation", "--data", published, "--lm", lm, "--sets", "hh",
               "--dry_run", "--out", tmp_path)
    assert done.returncode == 0, done.stderr
    assert "train_lm.py" not in done.stdout
    rates = set(re.findall(r"--lr (\S+)", done.stdout))
    assert rates == {f"{scales.SMALL_RATE * plan.lm_rate(checkpoint.load(lm)[0].config.d_model):.3g}"}
    args = argparse.Namespace(data=published, lm=lm, sets=["hh"], out=tmp_path, seeds=1, many_seeds=1,
                              sizes=["0.8m"], pairs=None)
    given = Small(args)
    assert args.sizes == given.sizes == [scales.count_label(checkpoint.load(lm)[0].n_params()[1])]
    assert scales.size_label(given.size) == given.size


def test_so_many_comparisons_are_learned_from(tmp_path, published, lm):
    common = ("ranked-beats-imitation", "--lm", lm, "--dry_run", "--out", tmp_path, "--seeds", 1)
    published = ("--data", published, "--sets", "hh")
    for scale, flags, found in (("small", (), ["500"]), ("small", ("--pairs", 70), ["70"]), ("gpu", (), []),
                                ("own", ("--pairs", 70), ["70"])):
        data = published if scale != "own" else ("--data", published[1] / "hh-rlhf/harmless-base/test.jsonl")
        done = run("lab.py", scale, *common, *data, *flags)
        assert done.returncode == 0, done.stderr
        trainings = [line for line in done.stdout.splitlines() if "train_pm.py" in line]
        assert len(trainings) == 2
        assert all(re.findall(r"--pairs (\d+)", line) == found for line in trainings), scale


def tiny_lab(folder, *settings):
    """A script like lab.py with other settings of its scales; its first argument is the project's folder."""
    script = folder / "tiny.py"
    script.write_text("\n".join([
        "import sys; sys.path.insert(0, sys.argv.pop(1))", "import lab", "from claims import published, scales",
        "from data.errors import run_main", *settings,
        "if __name__ == '__main__':", "    run_main(lab.main)", ""]))
    return script


def test_the_claims_of_ones_own_data(tmp_path, lm, comparisons_file):
    """The same file serves as public data here."""
    script = tiny_lab(tmp_path, "scales.Own.amounts = (10, 20)")
    done = run(script, ROOT, "own", "--data", comparisons_file, "--init", lm, "--public", comparisons_file,
               "--seeds", 2, "--out", tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    report = (tmp_path / "own/report.md").read_text()
    for name in scales.Own.claims_tested:
        assert f"## {name}\n" in report and (tmp_path / f"own/{name}.png").exists()
    assert "at 10: pre-trained minus without" in report


def test_the_claim_of_the_documentation(tmp_path, lm):
    """The script of docs/claims.md, by the command that stands there."""
    text = (ROOT / "docs/claims.md").read_text()
    (code,), (command, *_) = (re.findall(f"```{kind}\n(.*?)```", text, re.DOTALL) for kind in ("python", "sh"))
    assert sum(map(bool, map(str.strip, code.splitlines()))) <= 20
    script = tmp_path / "my_lab.py"
    script.write_text(f"import sys\nsys.path.insert(0, {str(ROOT)!r})\n{code}")
    mine = write_jsonl(tmp_path / "mine.jsonl", make_comparisons(100))
    flags = command.replace("mine.jsonl", str(mine)).replace("out/lm", str(lm)).split()[2:]
    done = run(script, *flags, "--seeds", 2, "--out", tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "- part: all minus 50: " in (tmp_path / "own/report.md").read_text()


@pytest.mark.parametrize("flags, why", [
    (("own",), "own needs --data FILE"), (("own", "--data", "mine.jsonl"), "--lm MODEL"),
    (("own", "--data", "mine.jsonl", "--lm", "nowhere"), "nowhere: no such checkpoint"),
    (("toy", "--lm", "out/lm"), "toy trains its own"), (("own", "core"), "no claim 'prompt-helps'")])
def test_flags_that_do_not_go_with_a_scale_are_refused(flags, why):
    assert why in run_refused("lab.py", *flags)


def test_a_claim_on_published_sets_from_the_text_to_the_report(tmp_path, published):
    """With the steps and amounts of a test; verdicts are printed as soon as their runs are done."""
    script = tiny_lab(
        tmp_path, "published.Small.finetune_pairs, published.Small.pairs = 20, 20",
        "published.Small.pm_flags = ('--steps', 2)",
        "published.Small.lm_flags = ('--tokenizer', 'bytes', '--ctx', 256, '--steps', 2, '--batch', 512)",
        "published.Small.pmp_flags = ('--batch', 8, '--steps', 2)")
    claims = ("calibration", "pmp-sample-efficiency", "code-tax")
    done = run(script, ROOT, "small", *claims, "--data", published, "--sets", "hellaswag", "hh",
               "--sizes", "test", "--seeds", 1, "--out", tmp_path / "lab")
    report = (tmp_path / "lab/small/report.md").read_text()
    assert done.returncode == 1, done.stderr  # there is no MBPP
    assert "| code-tax |  | *failed:" in report and report.count("*failed:") == 1, done.stderr
    assert "0.1M: pre-trained minus without, mean of 2 sets" in report
    assert ", hellaswag:" in report and ", hh:" in report and "where it says so" in report
    assert {path.name for path in (tmp_path / "lab/small").glob("*.png")} == {
        "pmp-sample-efficiency.png", "calibration.png"}
    lines = done.stdout.splitlines()
    first = next(i for i, line in enumerate(lines) if line.startswith("calibration"))
    assert any("train_pm.py" in line for line in lines[first + 1:])  # the next claim's runs came after it
    assert lines[-1].endswith(f"The report is {tmp_path / 'lab/small/report.html'}")
