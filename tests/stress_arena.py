"""The arena under stress, and its whole loop on the toy world. A script, not a test: it takes some minutes.

  python tests/stress_arena.py load           50 raters give an hour's votes in a minute
  python tests/stress_arena.py kill           the arena is killed at 20 random moments
  python tests/stress_arena.py disk           the disk is full (a small tmpfs, which needs root)
  python tests/stress_arena.py loop --lm out/lm --distilled out/distilled --judge out/pm

`loop`: a script that knows the toy world's truth rates the plain, the prompted and the distilled model
through HTTP; its votes are exported, rated by evaluate.py, and train a preference model. Exits with 1 where
anything is not as it should be.
"""
import argparse
import contextlib
import http.client
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from arena_raters import Rater, arena, copies, count_votes
from conftest import LM_FLAGS, evaluate, make_texts, run_well, write_jsonl
from data import toy
from data.errors import Parser
from data.toy.comparisons import HHH, quality
from data.toy.world import KINDS, answer, build_world, open_turn
from web.store import Store


def main():
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("what", choices=("load", "kill", "disk", "loop"))
    add("--raters", type=int, default=50, help="of load (default: %(default)s)")
    add("--votes", type=int, help="in all (default: 3000 of load, 300 of loop)")
    add("--seconds", type=int, default=60, help="that load takes (default: %(default)s)")
    add("--lm", type=Path, default=ROOT / "out/lm")
    add("--distilled", type=Path, default=ROOT / "out/distilled")
    add("--judge", type=Path, default=ROOT / "out/pm")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        os.environ.setdefault("HHH_LAB_CACHE", str(folder / "cache"))
        Path(os.environ["HHH_LAB_CACHE"]).mkdir(exist_ok=True)
        {"load": load, "kill": kill, "disk": disk, "loop": loop}[args.what](args, folder)


def check(is_well, text):
    print(f"{'well' if is_well else 'WRONG'}: {text}", flush=True)
    if not is_well:
        sys.exit(1)


def tiny_models(folder):
    texts = write_jsonl(folder / "texts.jsonl", make_texts())
    run_well("train_lm.py", "--data", texts, "--out", folder / "lm", *LM_FLAGS)
    return copies(folder / "lm", folder)


# ------------------------------------------------------------------------------------------------------------
# Load, death and a full disk


def load(args, folder):
    """Each rater votes at random moments, so many in the time that is given."""
    n_votes, db = args.votes or 3000, folder / "arena.db"
    seconds, given, failures = [], [], []

    def rate(running, n):
        rater, rng = Rater(running.port), random.Random()
        begin = time.time()
        for moment in sorted(rng.uniform(0, args.seconds) for _ in range(n)):
            time.sleep(max(0, begin + moment - time.time()))
            try:
                pair, vote_id = rater.pair(), rater.new_id()
                asked = time.perf_counter()
                status, answered = rater.vote(pair, rng.choice(("left", "right", "tie")), vote_id=vote_id)
                seconds.append(time.perf_counter() - asked)
                assert status == 200, answered
                given.append(vote_id)
                if rng.random() < 0.1:  # some pages send again what was answered
                    assert rater.vote(pair, vote_id=vote_id)[0] == 200
            except Exception as error:
                failures.append(repr(error))

    with arena(db, *tiny_models(folder)) as running:
        threads = [threading.Thread(target=rate, args=(running, n_votes // args.raters))
                   for _ in range(args.raters)]
        begin = time.time()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        took = time.time() - begin
    stored = [vote["vote_id"] for vote in Store(db).votes()]
    p50, p95, p99 = np.quantile(seconds, (0.5, 0.95, 0.99)) * 1000
    print(f"{len(given)} votes of {args.raters} raters in {took:.0f} s; a vote took {p50:.0f} ms (median), "
          f"{p95:.0f} ms (95 %), {p99:.0f} ms (99 %), {1000 * max(seconds):.0f} ms (at most)")
    check(not failures, f"{len(failures)} requests failed {failures[:3]}")
    check(sorted(stored) == sorted(given), f"{len(stored)} votes in the database, none lost, none twice")
    check(p95 < 100, "95 % of the votes took less than 100 ms")


def kill(args, folder):
    """Every vote that was answered is in the database, whenever the arena is killed. It is started again on
    the same database."""
    models, db, answered, sent, rng = tiny_models(folder), folder / "arena.db", set(), set(), random.Random()

    def rate(running):
        with contextlib.suppress(OSError, http.client.HTTPException):
            while True:
                rater = Rater(running.port)
                for _ in range(10):
                    pair, vote_id = rater.pair(), rater.new_id()
                    sent.add(vote_id)
                    if rater.vote(pair, vote_id=vote_id)[0] == 200:
                        answered.add(vote_id)

    for _ in range(20):
        with arena(db, *models) as running:
            threads = [threading.Thread(target=rate, args=(running,)) for _ in range(4)]
            for thread in threads:
                thread.start()
            time.sleep(rng.uniform(0.1, 1.5))
            os.kill(running.process.pid, signal.SIGKILL)
            for thread in threads:
                thread.join()
    store = Store(db)
    stored = [vote["vote_id"] for vote in store.votes()]
    check(store.read("PRAGMA integrity_check")[0][0] == "ok", "the database is whole")
    check(answered <= set(stored) <= sent and len(stored) == len(set(stored)),
          f"killed 20 times: {len(answered)} answered votes are all there, and {len(stored) - len(answered)} "
          "that were stored but not answered any more")


def disk(args, folder):
    """On a full disk a vote is refused with a message; when there is room again the same vote is stored."""
    models, place = tiny_models(folder), folder / "small"
    place.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", place], check=True)
    try:
        with arena(place / "arena.db", *models) as running:
            rater = Rater(running.port)
            pairs = [rater.pair() for _ in range(8)]
            filler = open(place / "filler", "wb", buffering=0)
            with contextlib.suppress(OSError):
                while True:
                    filler.write(bytes(512))
            votes = [(pair, rater.new_id()) for pair in pairs]
            answers = [rater.vote(pair, vote_id=vote_id) for pair, vote_id in votes]
            refused = [vote for vote, (status, _) in zip(votes, answers) if status == 507]
            check(refused, f"{len(refused)} of 8 votes are refused: {answers[-1][1].get('error')}")
            check(count_votes(place / "arena.db") == 8 - len(refused), "a vote is stored or refused")
            filler.truncate(0)
            again = [rater.vote(pair, vote_id=vote_id)[0] for pair, vote_id in refused]
            check(set(again) == {200} and count_votes(place / "arena.db") == 8,
                  "with room again, the same votes are stored")
    finally:
        filler.close()
        subprocess.run(["umount", "-l", place], check=True)


# ------------------------------------------------------------------------------------------------------------
# The whole loop


def true_qualities(world, question):
    """{answer: its quality} of all that the world says to a question, well or badly."""
    rng, qualities = random.Random(0), {}
    for content in dict.fromkeys(KINDS[question.kind].contents.split()):
        for tone in ("kind", "plain", "hasty", "rude"):
            for _ in range(300):
                text, _ = answer(rng, world, question, content, tone)
                qualities[text] = max(quality(content, tone), qualities.get(text, -1))
    return qualities


def loop(args, folder):
    n_votes, n_raters, db = args.votes or 300, 6, folder / "arena.db"
    world, rng, unknown = build_world(0), random.Random(0), 0
    kinds = [kind for kinds, _, _ in HHH.values() for kind in kinds.split()]
    models = ("--models", args.lm, args.distilled, args.lm, "--prompts", "", "", "toy")
    with arena(db, *models, "--judge", args.judge, "--max_new", 64, before=None) as running:
        for _ in range(n_raters):
            rater = Rater(running.port)
            for _ in range(n_votes // n_raters):
                question = rng.choice(world.held[rng.choice(kinds)])
                qualities = true_qualities(world, question)
                pair = rater.pair(open_turn(question).split("Human: ")[1].split("\n")[0])
                left, right = (qualities.get(text.strip(), -1) for text in pair["texts"])
                unknown += (left < 0) + (right < 0)
                strength = 3 if abs(left - right) >= 8 else 2 if abs(left - right) >= 4 else 1
                bad = "both bad" if left < 4 else "tie"
                choice = bad if left == right else "left" if left > right else "right"
                status, answered = rater.vote(pair, choice, strength, milliseconds=rng.randint(2000, 9000))
                assert status == 200, answered
                time.sleep(0.2)  # as requests are limited
        _, figures = rater.get("/figures?mode=helpful")
    print(f"{figures['votes']} votes; {unknown} of {2 * n_votes} replies are nothing that the world says")
    votes, games = folder / "votes.jsonl", folder / "games.csv"
    print(run_well("arena.py", "--db", db, "--export", votes, "--games", games))
    expected, printed = evaluate("elo", "--games", games)
    print(printed)
    print(json.dumps({key: figures[key] for key in ("left", "judge", "choices", "median_seconds")}))
    check(figures["elo"]["players"] == expected["players"], "/results has the Elos of evaluate.py")
    plain, prompted, distilled = (figures["elo"]["players"][name] for name in (
        args.lm.name, f"{args.lm.name} behind toy", args.distilled.name))
    check(plain["elo"] < min(prompted["elo"], distilled["elo"]), "plain is the last one")
    check(max(prompted["low"], distilled["low"]) < min(prompted["high"], distilled["high"]),
          "the intervals of prompted and distilled overlap")
    ranked = toy.toy_folder(0) / "ranked.jsonl"
    run_well("train_pm.py", "--init", args.lm, "--data", votes, "--out", folder / "pm", "--lr", 0.0003,
             "--held_out", 0.3, "--epochs", 3)
    for data in (votes, ranked):
        pm, _ = evaluate("pm", "--model", folder / "pm", "--data", data, "--skip_no_context")
        print(json.dumps({"data": data.name, **{key: pm[key] for key in pm if "accuracy" in key}}))


if __name__ == "__main__":
    main()
