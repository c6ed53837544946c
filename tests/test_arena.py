"""arena.py: no vote is lost or counted twice, no name is shown before the vote, and what is exported is read
by train_pm.py and evaluate.py. The page in a browser: test_arena_page.py; many raters: stress_arena.py."""
import collections
import contextlib
import http.client
import json
import math
import os
import re
import shutil
import signal
import sqlite3
import threading
import time
from argparse import Namespace

import pytest
import torch
from arena_raters import Rater, arena, copies, count_votes, samples_file, write_by_script
from conftest import BYTES, evaluate, read_jsonl, run_refused, run_well

import checkpoint
import sampling
from data.prompts import STOPS
from data.text import EOC
from evals import votes
from evals.subject import load_subject, reward_function
from web.replies import Writer, Writing
from web.server import BURST
from web.store import Store

# ------------------------------------------------------------------------------------------------------------
# An arena and its raters


@pytest.fixture(scope="module")
def models(lm, tmp_path_factory):
    """Flags that name two models."""
    return copies(lm, tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def scripted(models, tmp_path_factory):
    """An arena whose models are a script."""
    db = tmp_path_factory.mktemp("arena") / "arena.db"
    with arena(db, *models) as running:
        running.db = db
        yield running


@pytest.fixture
def rater(scripted):
    return Rater(scripted.port)


# ------------------------------------------------------------------------------------------------------------
# Pairs and votes


def test_a_dialogue_goes_on_with_the_chosen_reply(scripted, rater):
    context, previous = "", {}
    for turn in range(3):
        pair = rater.pair(f"Message {turn}", **previous)
        status, answer = rater.vote(pair, "right")
        assert status == 200 and answer["vote"]["continued"] == "right"
        stored = Store(scripted.db).pair(pair["pair_id"])
        context += f"\n\nHuman: Message {turn}\n\nAssistant:"
        assert stored["context"] == context and stored["previous"] == previous.get("previous")
        assert {stored["left_model"], stored["right_model"]} == {"plain", "distilled"}
        assert stored["asked_at"] <= stored["shown_at"] <= stored["given_at"]
        context += stored["right_text"]
        previous = {"previous": pair["pair_id"]}


def test_no_name_and_no_opinion_is_shown_before_the_vote(lm, models, pm, tmp_path):
    with arena(tmp_path / "a.db", *models, "--judge", pm) as running:
        rater = Rater(running.port)
        pair_id = rater.new_id()
        seen = [rater.post("/pair", pair_id=pair_id, mode="helpful", text="Hello"), *rater.events(pair_id),
                rater.get(f"/pair?pair_id={pair_id}"), rater.get("/setup")]
        assert not re.search("plain|distilled|judge", json.dumps(seen))
        _, answer = rater.vote({"pair_id": pair_id})
        assert {answer["vote"]["left_model"], answer["vote"]["right_model"]} == {"plain", "distilled"}
        rewards, _ = reward_function(pm, Namespace(device="cpu", dtype="fp32", micro_tokens=None))
        left, right = rewards(["\n\nHuman: Hello\n\nAssistant:"] * 2, answer["texts"])
        assert answer["vote"]["judge"] == pytest.approx(1 / (1 + math.exp(right - left)), abs=1e-6)
        _, figures = rater.get("/figures?mode=helpful")
        assert figures["judge"]["n"] == 1


def test_replies_are_what_the_models_sample_from_the_stored_seed(lm, models, tmp_path):
    """Also behind a prompt, which one model has on both sides of it."""
    (tmp_path / "prompt.txt").write_text("Be brief.")
    flags = ("--models", lm, lm, "--prompts", "", tmp_path / "prompt.txt", "--max_new", 12)
    with arena(tmp_path / "a.db", *flags, before=None) as running:
        pair = Rater(running.port).pair("the cat")
    stored, (model, _, _) = Store(tmp_path / "a.db").pair(pair["pair_id"]), checkpoint.load(lm)
    model.freeze(torch.float32)
    for side, text in enumerate(pair["texts"]):
        name = stored[f"{votes.SIDES[side]}_model"]
        ids = BYTES.encode("\n\nHuman: the cat\n\nAssistant:").tolist()
        if "behind" in name:
            ids = [BYTES.eot, *BYTES.encode("Be brief.\n\n-----").tolist(), *ids]
        sample = sampling.TextSample(BYTES, STOPS)
        for _ in sampling.stream(
                model, [ids], [[sample]], 12, 1.0, 0.95, BYTES.n_vocab,
                [torch.Generator().manual_seed(2 * stored["seed"] + side)]):
            pass
        assert text == sample.text[:sample.n_settled].rstrip()


def test_a_judge_that_fails_ends_the_pair_in_words(lm):
    """The page does not wait for ever, and others get their turn."""
    def store(pair, texts, is_stopped):
        raise RuntimeError("the judge is out of memory")
    flags = Namespace(model=lm, device="cpu", dtype="fp32", micro_tokens=None, prompt=None, prompt_tokens=None)
    writer = Writer({"plain": load_subject(flags)}, store, 4, 1.0, 0.95)
    pair = {"pair_id": "1", "left_model": "plain", "right_model": "plain", "seed": 1,
            "context": "\n\nHuman: Hello\n\nAssistant:"}
    writing = writer.begin(pair)
    assert list(writer.follow(writing, [0, 0])) and writing.finished
    assert "could not be stored (the judge is out of memory)" in writing.failure and not writer.under_way
    writer.close()


def test_what_is_sent_twice_counts_once(scripted, rater):
    """Also what is sent at the same time, as by a double click."""
    pair_id, vote_id, n_before = rater.new_id(), rater.new_id(), count_votes(scripted.db)

    def at_once(path, **values):
        """The answers to the same request, sent eight times at once."""
        answers = []

        def send():
            other = Rater(scripted.port)
            other.headers["Cookie"] = rater.headers["Cookie"]
            answers.append(other.post(path, **values))

        threads = [threading.Thread(target=send) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return answers

    served = at_once("/pair", pair_id=pair_id, mode="helpful", text="Hello")
    assert [status for status, _ in served] == [200] * 8
    rater.events(pair_id)
    answers = at_once("/vote", pair_id=pair_id, vote_id=vote_id, choice="tie", strength=0, milliseconds=5)
    assert len({json.dumps(answer) for answer in answers}) == 1 and answers[0][0] == 200
    different = rater.vote({"pair_id": pair_id}, "left")
    assert different[0] == 409 and "stands" in different[1]["error"]
    assert count_votes(scripted.db) == n_before + 1


def test_a_vote_belongs_to_the_rater_of_its_pair(scripted, rater):
    pair, other = rater.pair(), Rater(scripted.port)
    assert other.vote(pair)[0] == 404
    assert other.get(f"/pair?pair_id={pair['pair_id']}")[0] == 404
    vote_id = rater.new_id()
    assert rater.vote(pair, vote_id=vote_id)[0] == 200
    assert rater.vote(rater.pair(), vote_id=vote_id)[0] == 409  # the same vote for another pair


def test_which_model_stands_left_is_drawn_anew(scripted):
    left = collections.Counter()
    for _ in range(4):
        rater = Rater(scripted.port)  # a new one, as requests are limited
        for _ in range(BURST // 4):
            left[rater.vote(rater.pair())[1]["vote"]["left_model"]] += 1
    assert min(left["plain"], left["distilled"]) >= 5, left  # by chance in one of 10,000 cases


def test_an_unfinished_pair_is_written_again_by_its_seed(models, tmp_path):
    """After the arena was killed the same replies come again, and so after a lost connection."""
    with arena(tmp_path / "a.db", *models, pause=0.1, reply="one two three four five six") as running:
        rater = Rater(running.port)
        pair_id = rater.new_id()
        rater.post("/pair", pair_id=pair_id, mode="helpful", text="Hello")
        os.kill(running.process.pid, signal.SIGKILL)
    with arena(tmp_path / "a.db", *models, pause=0.02, reply="one two three four five six") as running:
        rater.connection.port = running.port
        rater.connection.close()
        status, pair = rater.get(f"/pair?pair_id={pair_id}")
        assert status == 200 and not pair["finished"]
        assert rater.vote({"pair_id": pair_id})[0] == 409  # nothing to vote on yet
        events = rater.events(pair_id, **{"Last-Event-ID": "8-8"})  # the page has "one two " of both
        texts = [("one two " + "".join(event["pieces"][side] for event in events[:-1])).rstrip()
                 for side in (0, 1)]  # a stored reply has no space at its end
        assert min(map(len, texts)) > 8 and all(map(str.startswith, events[-1]["texts"], texts)), texts
        stored = Store(tmp_path / "a.db").pair(pair_id)
        for side, text in enumerate(events[-1]["texts"]):
            generator = torch.Generator().manual_seed(2 * stored["seed"] + side)
            assert text.endswith(f" six {torch.randint(1000, (1,), generator=generator).item()}")


def test_a_pair_is_not_written_by_what_it_was_not_begun_with(models, lm, tmp_path):
    """Neither by other settings nor, under the same name, by other weights."""
    with arena(tmp_path / "a.db", *models, pause=0.2) as running:
        rater = Rater(running.port)
        pair_id = rater.new_id()
        rater.post("/pair", pair_id=pair_id, mode="helpful", text="Hello")
        os.kill(running.process.pid, signal.SIGKILL)
    with arena(tmp_path / "a.db", *models, "--temperature", 0.5) as running:
        rater.connection.port = running.port
        rater.connection.close()
        status, answer = rater.get(f"/stream?pair_id={pair_id}")
        assert status == 410 and "has other settings" in answer["error"]
    other = shutil.copytree(lm, tmp_path / "other/plain")
    meta = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**meta, "rms_norm_eps": 0.5}))
    line = run_refused("arena.py", "--db", tmp_path / "a.db", "--models", other, models[2])
    assert "holds pairs of another 'plain', with other weights or another prompt" in line


def test_the_pace_of_a_model_does_not_show():
    writing = Writing({})
    writing.add(0, "a whole sentence")
    assert writing.shown() == ["", ""]
    writing.add(1, "slow")
    assert writing.shown() == ["a wh", "slow"]
    writing.end(0)
    assert writing.shown() == ["a wh", "slow"]
    writing.end(1)
    assert writing.shown() == ["a whole sentence", "slow"]


def test_of_three_files_a_rater_sees_two_of_the_same_replies(tmp_path):
    """After a vote the names are known, so a third pair with one of these texts would be no blind one."""
    files = [samples_file(tmp_path, name) for name in ("first", "second", "third")]
    with arena(tmp_path / "a.db", "--samples", *files) as running:
        for mode in ("helpful", "red_team"):
            rater = Rater(running.port)
            shown = [rater.pair(mode=mode)["turns"][0][1] for _ in range(6)]
            assert len(set(shown)) == 6
            assert rater.post("/pair", pair_id=rater.new_id(), mode=mode)[0] == 404
    row, = Store(tmp_path / "a.db").read("SELECT * FROM pairs LIMIT 1")
    assert row["seed"] == 0 and json.loads(row["settings"])["left"].keys() == {"file"}


def test_a_page_that_reconnects_gets_the_rest_alone(models, tmp_path):
    with arena(tmp_path / "a.db", *models, pause=0.1, reply="one two three four") as running:
        rater = Rater(running.port)
        pair_id = rater.new_id()
        rater.post("/pair", pair_id=pair_id, mode="helpful", text="Hello")
        time.sleep(0.25)
        events = rater.events(pair_id, **{"Last-Event-ID": "4-0"})
        left, right = ("".join(event["pieces"][side] for event in events[:-1]) for side in (0, 1))
        assert left.startswith("two three") and right.startswith("one two three")


def test_stopped_replies_stand_as_they_are(models, tmp_path):
    with arena(tmp_path / "a.db", *models, pause=0.1, reply=" ".join(["word"] * 200)) as running:
        rater, other = Rater(running.port), Rater(running.port)
        pair_id, waiting = rater.new_id(), other.new_id()
        rater.post("/pair", pair_id=pair_id, mode="helpful", text="Hello")
        other.post("/pair", pair_id=waiting, mode="helpful", text="Hello")
        time.sleep(0.3)
        connection = http.client.HTTPConnection("127.0.0.1", running.port, timeout=30)
        connection.request("GET", f"/stream?pair_id={waiting}", headers=other.headers)
        response = connection.getresponse()
        response.readline()
        assert json.loads(response.readline()[6:])["place"] == 1  # the other rater is the next one
        assert other.post("/stop", pair_id=waiting)[0] == 409  # there would be nothing to compare
        assert rater.post("/stop", pair_id=pair_id)[0] == 200
        pair = rater.events(pair_id)[-1]
        assert all(0 < len(text.split()) < 20 for text in pair["texts"])
        assert rater.vote(pair)[0] == 200
        assert rater.get("/figures?mode=helpful")[1]["stopped"] == 1
    printed = run_well("arena.py", "--db", tmp_path / "a.db", "--export", tmp_path / "votes.jsonl")
    assert "1 votes are on replies that the rater stopped" in printed


# ------------------------------------------------------------------------------------------------------------
# Results and exports


@pytest.fixture(scope="module")
def voted(models, tmp_path_factory):
    """A database of 24 helpful votes of four raters, which prefer the model "distilled" three times of four,
    and 4 of a red team."""
    db, n = tmp_path_factory.mktemp("voted") / "arena.db", 0
    with arena(db, *models) as running:
        for _ in range(4):
            rater = Rater(running.port)
            for _ in range(7):
                n += 1
                mode = "red_team" if n % 7 == 0 else "helpful"
                pair = rater.pair(f"Question {n}", mode)
                left = Store(db).pair(pair["pair_id"])["left_model"]
                wanted = "distilled" if n % 4 else "plain"
                choice = ("left" if left == wanted else "right") if n % 7 < 5 else ("tie", "both bad")[n % 2]
                assert rater.vote(pair, choice, strength=1 + n % 3, milliseconds=1000 * n)[0] == 200
        figures = rater.get("/figures?mode=helpful")[1]
    return db, figures


def test_results_are_those_of_evaluate_elo(voted, tmp_path):
    db, figures = voted
    printed = run_well("arena.py", "--db", db, "--games", tmp_path / "games.csv")
    assert "24 games, 8 of them ties" in printed and "4 votes of the other mode" in printed
    expected, _ = evaluate("elo", "--games", tmp_path / "games.csv")
    assert figures["elo"] == {key: expected[key] for key in figures["elo"]}
    assert list(figures["elo"]["players"]) == ["distilled", "plain"]
    assert figures["votes"] == 24 and len(figures["raters"]) == 4 and figures["left"]["n"] == 16
    assert figures["choices"]["tie"] + figures["choices"]["both bad"] == 8
    assert figures["median_seconds"] == pytest.approx(14, abs=2)


def test_exported_votes_train_a_preference_model(voted, lm, tmp_path):
    db, _ = voted
    printed = run_well("arena.py", "--db", db, "--export", tmp_path / "votes.jsonl")
    records = read_jsonl(tmp_path / "votes.jsonl")
    assert "24 comparisons, 8 of them ties" in printed and len(records) == 24
    for record in records:
        stored = next(vote for vote in Store(db).votes() if vote["vote_id"] == record["vote_id"])
        assert record["completions"] == [stored["left_text"], stored["right_text"]]
        assert record["group"] == re.search("Human: (.*)\n", record["context"])[1]
        expected = {"left": [stored["strength"], 0], "right": [0, stored["strength"]]}
        assert record["scores"] == expected.get(stored["choice"], [0, 0])
    run_well("train_pm.py", "--init", lm, "--data", tmp_path / "votes.jsonl", "--out", tmp_path / "pm",
             "--steps", 2, "--batch", 8, "--held_out", 0.3, "--dtype", "fp32")


def test_a_red_team_prefers_what_it_did_not_choose(voted, tmp_path):
    db, _ = voted
    run_well("arena.py", "--db", db, "--mode", "red_team", "--export", tmp_path / "votes.jsonl")
    records = read_jsonl(tmp_path / "votes.jsonl")
    assert len(records) == 4
    for record in records:
        if record["choice"] in votes.SIDES:
            chosen = votes.SIDES.index(record["choice"])
            assert record["scores"][chosen] == 0 < record["scores"][1 - chosen]


def test_excluded_votes_remain_and_do_not_count(voted, tmp_path):
    shutil.copytree(voted[0].parent, tmp_path / "copy")  # the database and its newest part, the WAL
    db = tmp_path / "copy" / voted[0].name
    rater = Store(db).votes()[0]["rater"]
    assert "7 votes" in run_well("arena.py", "--db", db, "--exclude", rater, "never reads")
    printed = run_well("arena.py", "--db", db, "--export", tmp_path / "votes.jsonl")
    assert "18 comparisons" in printed and "6 votes that are excluded (never reads)" in printed
    figures = votes.results(Store(db).votes(), "helpful")
    assert (figures["votes"], figures["excluded"]) == (18, 6) and count_votes(db) == 28
    assert "no rater" in run_refused("arena.py", "--db", db, "--exclude", "nobody", "why")


def test_texts_with_special_tokens_are_counted_and_left_out(models, tmp_path):
    with arena(tmp_path / "a.db", *models, reply=f"This ends {EOC} here") as running:
        rater = Rater(running.port)
        pair = rater.pair()
        rater.vote(pair)
        status, answer = rater.post("/pair", pair_id=rater.new_id(), mode="helpful", text="Go on",
                                    previous=pair["pair_id"])
        assert status == 400 and "begin a new dialogue" in answer["error"]
    printed = run_well("arena.py", "--db", tmp_path / "a.db", "--export", tmp_path / "votes.jsonl")
    assert "0 comparisons" in printed and "left out: 1 votes on texts that hold a special token" in printed


def test_samples_are_rated_without_a_model(tmp_path):
    """Each rater sees each pair once, and what a second rater says of a pair tells the agreement."""
    files = samples_file(tmp_path, "first"), samples_file(tmp_path, "second")
    with arena(tmp_path / "a.db", "--samples", *files) as running:
        for _ in range(2):
            rater = Rater(running.port)
            for _ in range(6):
                pair = rater.pair()
                rater.vote(pair, "left" if "first" in pair["texts"][0] else "right")
            assert rater.post("/pair", pair_id=rater.new_id(), mode="helpful")[0] == 404
        _, figures = rater.get("/figures?mode=helpful")
    assert figures["agreement"]["n"] == 6 and figures["agreement"]["share"] == 1
    assert figures["elo"]["players"]["first"]["wins"] == 12
    with arena(tmp_path / "a.db", "--samples", *files) as running:  # it remembers what it has served
        rater.connection.close()
        rater.connection.port = running.port
        assert rater.post("/pair", pair_id=rater.new_id(), mode="helpful")[0] == 404


def test_a_second_opinion_tells_the_agreement(models, tmp_path):
    """A pair is shown to one other rater, and the sides are drawn anew."""
    with arena(tmp_path / "a.db", *models) as running:
        rater, other = Rater(running.port), Rater(running.port)
        pairs = [rater.pair(f"Question {n}") for n in range(6)]
        for pair in pairs:
            rater.vote(pair, "left")
        assert rater.post("/pair", pair_id=rater.new_id(), mode="helpful", again=True)[0] == 404
        again = [other.pair(again=True) for _ in pairs]
        assert other.post("/pair", pair_id=other.new_id(), mode="helpful", again=True)[0] == 404
        texts = {pair["turns"][0][1]: pair["texts"] for pair in pairs}
        for n, pair in enumerate(again):
            first = texts.pop(pair["turns"][0][1])
            assert sorted(first) == sorted(pair["texts"])
            choice = votes.SIDES[pair["texts"].index(first[0])]
            other.vote(pair, choice if n < 4 else "tie")
        _, figures = other.get("/figures?mode=helpful")
    row, = Store(tmp_path / "a.db").read("SELECT * FROM pairs WHERE repeats IS NOT NULL LIMIT 1")
    first, settings = Store(tmp_path / "a.db").pair(row["repeats"]), json.loads(row["settings"])
    assert row["seed"] == first["seed"]
    for side in votes.SIDES:  # what is known of each writer goes to the side on which it stands now
        assert settings[side]["model"].split()[0].endswith(row[f"{side}_model"])
    assert not texts and figures["agreement"]["n"] == 6
    assert figures["agreement"]["share"] == pytest.approx(4 / 6)


def test_contexts_are_offered_as_a_beginning(models, tmp_path):
    file = samples_file(tmp_path, "contexts")
    with arena(tmp_path / "a.db", *models, "--contexts", file) as running:
        rater = Rater(running.port)
        assert rater.get("/setup")[1]["contexts"] == 6
        pair = rater.pair(suggest=True)
        assert re.fullmatch("Question [0-5]", pair["turns"][0][1])


# ------------------------------------------------------------------------------------------------------------
# What must not be


BAD_MESSAGES = {
    "empty": {"text": "  "}, "no text": {"text": 5}, "special token": {"text": "a <eot> b"},
    "another turn": {"text": "a\n\nAssistant: b"}, "two turns": {"text": "a\n\nAssistant: b\n\nHuman: c"},
    "separator": {"text": "a\n\n-----"}, "long": {"text": "word " * 1000}, "mode": {"mode": "kind"},
    "id": {"pair_id": "a"}, "id's type": {"pair_id": [1]}, "previous": {"previous": "unknown-pair"}}


@pytest.mark.parametrize("name", BAD_MESSAGES)
def test_bad_messages_get_a_clear_line(rater, name):
    values = {"pair_id": rater.new_id(), "mode": "helpful", "text": "Hello", **BAD_MESSAGES[name]}
    status, answer = rater.post("/pair", **values)
    assert status in (400, 404) and len(answer["error"]) > 20


def test_bad_votes_get_a_clear_line(scripted, rater):
    pair, n_before = rater.pair(), count_votes(scripted.db)
    bad = ({"choice": "up"}, {"choice": None}, {"strength": 0}, {"strength": 4}, {"strength": True},
           {"strength": "2"}, {"milliseconds": -1}, {"milliseconds": 1.5}, {"milliseconds": 10**30},
           {"vote_id": "short"})
    for values in bad:
        status, answer = rater.vote(pair, **values)
        assert status == 400 and len(answer["error"]) > 15, values
    assert rater.vote({"pair_id": "unknown-pair"})[0] == 404
    assert count_votes(scripted.db) == n_before
    assert rater.vote(pair)[0] == 200


def test_bad_requests_get_a_clear_line(scripted, rater):
    kind = {"Content-Type": "application/json"}
    for body, headers, expected in (
            (b"x" * (10 * 2**20), kind, 413), (b'{"text": "\xff\xfe"}', kind, 400), (b"[1]", kind, 400),
            (b"[" * 30000, kind, 400), (b"{}", {}, 415), (b"{}", {**kind, "Origin": "http://evil.test"}, 403),
            (b"{}", {**kind, "Host": "evil.test"}, 403), (b"{}", {**kind, "Cookie": ""}, 403),
            (b"{}", {**kind, "Content-Length": "many"}, 400), (b"{}", kind, 404)):
        path = "/pair" if expected != 404 else "/other"
        status, _, content = rater.send("POST", path, body, **headers)
        assert status == expected and len(json.loads(content)["error"]) > 10, (body[:20], content)
        rater.connection.close()
    assert rater.get("/stream?pair_id=unknown-pair")[0] == 404
    assert rater.get("/figures?mode=other")[0] == 400
    assert rater.vote(rater.pair("\ud800 \U0001f42b"))[0] == 200  # half a character, and a whole camel


def test_requests_are_limited(scripted, rater):
    statuses = {rater.get("/setup")[0] for _ in range(3 * BURST)}
    assert statuses == {200, 429}
    assert Rater(scripted.port).get("/setup")[0] == 200


def test_the_page_allows_its_own_code_alone(rater):
    _, response, page = rater.send("GET", "/results")
    policy = response.headers["Content-Security-Policy"]
    assert "default-src 'none'" in policy and "unsafe" not in policy and "sha256-" in policy
    assert not re.search(rb"https?://(?!www\.w3\.org/2000/svg)|innerHTML| on[a-z]+=\"| style=\"", page)


def test_others_need_a_password(models, tmp_path):
    refused = run_refused("arena.py", "--db", tmp_path / "a.db", *models, "--host", "0.0.0.0", "--port", 0)
    assert "give a --password" in refused
    with arena(tmp_path / "a.db", *models, "--host", "0.0.0.0", "--password", "secret") as running:
        for given, expected in ((None, 401), ("cmF0ZXI6d3Jvbmc=", 401), ("cmF0ZXI6c2VjcmV0", 200)):
            connection = http.client.HTTPConnection("127.0.0.1", running.port, timeout=30)
            connection.request("GET", "/", headers={"Authorization": f"Basic {given}"} if given else {})
            assert connection.getresponse().status == expected
    with arena(tmp_path / "a.db", *models, "--password", "secret") as running:  # behind a proxy with TLS
        given = {"Authorization": "Basic cmF0ZXI6c2VjcmV0", "Host": "arena.example"}
        rater = Rater(running.port, **given)
        assert rater.send("GET", "/setup")[0] == 200
        rater.headers["Origin"] = "https://arena.example"
        assert rater.post("/pair", pair_id=rater.new_id(), mode="helpful", text="Hello")[0] == 200
        rater.headers["Origin"] = "https://other.example"
        assert rater.post("/pair", pair_id=rater.new_id(), mode="helpful", text="Hello")[0] == 403


def test_one_rater_leaves_places_to_others(models, tmp_path):
    with arena(tmp_path / "a.db", *models, pause=0.2) as running:
        rater, other = Rater(running.port), Rater(running.port)
        asked = [rater.post("/pair", pair_id=rater.new_id(), mode="helpful", text="Hello")[0] for _ in range(4)]
        assert asked == [200, 200, 200, 429]
        assert other.post("/pair", pair_id=other.new_id(), mode="helpful", text="Hello")[0] == 200


def test_bad_flags_get_one_line(lm, pm, models, tmp_path):
    other = sqlite3.connect(tmp_path / "other.db")
    other.execute("CREATE TABLE books (title)")
    other.close()
    Store(tmp_path / "newer.db").connection.execute("PRAGMA user_version = 7")
    (tmp_path / "text.db").write_text("This is no database." * 100)
    shutil.copytree(lm, tmp_path / "bare")
    (tmp_path / "bare" / "tokenizer.json").unlink()
    samples = samples_file(tmp_path, "first")
    for flags, expected in (
            (("--models", lm), "at least two"), (("--models", lm, lm), "at least two"),
            (("--models", lm, tmp_path / "none"), "no such checkpoint"),
            (("--models", lm, tmp_path / "bare"), "tokenizer"),
            (("--models", lm, pm), "a language model is needed"),
            ((*models, "--prompts", "hhh"), "one for each of the 2"),
            ((*models, "--judge", lm), "a preference model is needed"),
            (("--samples", samples), "at least two files"),
            ((*models, "--db", tmp_path / "other.db"), "another program"),
            ((*models, "--db", tmp_path / "newer.db"), "version 7"),
            ((*models, "--db", tmp_path / "text.db"), "not a database"),
            ((*models, "--db", tmp_path), "cannot be used"), ((*models, "--port", 70000), "port"),
            (("--export", tmp_path / "v.jsonl", "--db", tmp_path / "none.db"), "no such database"),
            (("--export", tmp_path / "v.jsonl", "--db", tmp_path / "newer.db"), "version 7")):
        assert expected in run_refused("arena.py", "--db", tmp_path / "a.db", *flags), flags


def test_a_port_in_use_and_a_second_server_get_one_line(scripted, models, tmp_path):
    assert "another --port" in run_refused(
        "arena.py", *models, "--db", tmp_path / "a.db", "--port", scripted.port)
    assert "another arena serves" in run_refused("arena.py", *models, "--db", scripted.db, "--port", 0)


def test_a_killed_arena_keeps_every_answered_vote(models, tmp_path):
    """stress_arena.py does this at more moments."""
    answered = []
    with arena(tmp_path / "a.db", *models) as running:
        timer = threading.Timer(0.5, lambda: os.kill(running.process.pid, signal.SIGKILL))
        timer.start()
        with contextlib.suppress(OSError, http.client.HTTPException):
            while True:
                rater = Rater(running.port)
                for _ in range(10):
                    vote_id = rater.new_id()
                    rater.vote(rater.pair(), vote_id=vote_id)
                    answered.append(vote_id)
    stored = {vote["vote_id"] for vote in Store(tmp_path / "a.db").votes()}
    assert len(answered) > 3 and stored >= set(answered)


def test_ctrl_c_ends_the_arena(models, tmp_path):
    """Also while replies are written. The database is one file then."""
    with arena(tmp_path / "a.db", *models, pause=0.1, reply="word " * 300) as running:
        rater = Rater(running.port)
        rater.post("/pair", pair_id=rater.new_id(), mode="helpful", text="Hello")
        os.kill(running.process.pid, signal.SIGINT)
        done = running.result(20)
    assert done.returncode == 0 and not done.stderr, done
    assert [path.name for path in tmp_path.iterdir()] == ["a.db"]


def limit_the_database():
    """In the arena's process: the database may have 12 pages, as on a full disk."""
    write_by_script()
    prepare = Store._prepare

    def small(store):
        prepare(store)
        store.connection.execute("PRAGMA max_page_count = 12")
    Store._prepare = small


def test_on_a_full_disk_a_vote_is_refused_and_can_be_sent_again(models, tmp_path):
    with arena(tmp_path / "a.db", *models) as running:
        rater = Rater(running.port)
        pairs = [rater.pair() for _ in range(9)]
    with arena(tmp_path / "a.db", *models, before=limit_the_database) as running:
        rater.connection.close()
        rater.connection.port = running.port
        status = 200
        while status == 200:
            status, answer = rater.post("/pair", pair_id=rater.new_id(), mode="helpful", text="long " * 8)
        assert status == 507 and "Nothing was stored" in answer["error"]
        answers = [(pair, rater.vote(pair)) for pair in pairs]
        refused = [pair for pair, (status, _) in answers if status == 507]
        assert count_votes(tmp_path / "a.db") == len(pairs) - len(refused)
    with arena(tmp_path / "a.db", *models) as running:
        rater.connection.close()
        rater.connection.port = running.port
        assert all(rater.vote(pair)[0] == 200 for pair in refused)
    assert count_votes(tmp_path / "a.db") == len(pairs)
