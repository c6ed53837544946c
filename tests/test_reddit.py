"""Reddit's dumps become comparisons: what is compared with what, in which context, and what is left out."""
import json
import random

import pytest
import zstandard
from conftest import convert, run_well, write_jsonl

from data.comparisons import load_comparisons
from data.errors import InputError
from data.sources import buckets, reddit
from data.tokenizer import get_tokenizer

CONTEXT = "\n\nHuman: Which bread?\n\nI like it dark.\n\nAssistant:"


def post(id="p1", **fields):
    return {"id": id, "title": "Which bread?", "selftext": "I like it dark.", "author": "ann", "score": 10,
            "created_utc": 1000, "subreddit": "food", "over_18": False, **fields}


def reply(id, score, body=None, parent="t3_p1", link="t3_p1", **fields):
    return {"id": id, "parent_id": parent, "link_id": link, "body": body or f"Reply {id}.", "author": "bob",
            "score": score, "created_utc": 2000, "subreddit": "food", "stickied": False,
            "distinguished": None, "edited": False, **fields}


THREAD = [post(), reply("c1", 7), reply("c2", 3)]


def read(folder, lines, *flags, max_bad=0.0):
    """(comparisons, Count) of a dump, given as records or as lines of bytes."""
    lines = [line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines]
    path = folder / "dump"
    path.write_bytes(b"\n".join(lines))
    return convert(reddit, [path], *flags, max_bad=max_bad)


def completions(folder, lines, *flags):
    found, _ = read(folder, lines, *flags)
    return found[0]["completions"] if found else None


# ---------------------------------------------------------------------------------------------------------
# What is compared


def test_replies_to_a_post_are_ranked_by_votes(tmp_path):
    found, count = read(tmp_path, [reply("c2", 3), reply("c3", -4), post(), reply("c1", 7)])
    assert found == [{"context": CONTEXT, "completions": [" Reply c1.", " Reply c2.", " Reply c3."],
                      "scores": [7, 3, -4], "group": "p1"}]
    assert count.total == 4 and not count.dropped and not count.n_bad


@pytest.mark.parametrize("text", [
    "[deleted]", "[removed]", "[ Removed by Reddit ]", "[ Removed by moderator ]",
    "[ Removed by Reddit in response to a copyright notice. ]"])
def test_what_stands_in_place_of_a_text_is_none(tmp_path, text):
    """It often keeps the votes of what it replaced."""
    found, count = read(tmp_path, [*THREAD, reply("c3", 50, text)])
    assert found[0]["completions"] == [" Reply c1.", " Reply c2."]
    assert count.dropped == {"replies: deleted or removed": 1}
    for gone in ({"title": "[deleted by user]", "selftext": ""}, {"selftext": text}):
        assert completions(tmp_path, [post(**gone), *THREAD[1:]]) is None


def test_a_score_that_was_not_shown_yet_is_no_score(tmp_path):
    found, count = read(tmp_path, [*THREAD, reply("c3", 1, score_hidden=True)])
    assert found[0]["scores"] == [7, 3] and count.dropped == {"replies: with a hidden score": 1}


def test_a_reply_to_be_judged_is_always_the_assistants_turn(tmp_path):
    chain = [post(), reply("c1", 1, "Turn 1."), reply("c2", 1, "Turn 2.", "t1_c1"),
             reply("c3", 1, "Turn 3.", "t1_c2")]
    pairs = [reply(f"{name}{i}", score, parent=f"t1_c{i}")
             for i in (1, 2, 3) for name, score in (("a", 9), ("b", 5))]
    found, _ = read(tmp_path, chain + pairs)
    contexts = {r["completions"][0]: r["context"] for r in found}
    start = CONTEXT.removesuffix("\n\nAssistant:")
    assert contexts[" Reply a1."] == start + "\n\nTurn 1.\n\nAssistant:"
    assert contexts[" Reply a2."] == start + "\n\nAssistant: Turn 1.\n\nHuman: Turn 2.\n\nAssistant:"
    assert contexts[" Reply a3."] == \
        start + "\n\nTurn 1.\n\nAssistant: Turn 2.\n\nHuman: Turn 3.\n\nAssistant:"
    assert {r["group"] for r in found} == {"p1"}
    shallow, count = read(tmp_path, chain + pairs, "--max_depth", 2)
    assert {r["completions"][0] for r in shallow} == {" Reply a1.", " Reply a2."}
    assert count.dropped["comparisons: deeper than --max_depth"] == 1
    top, count = read(tmp_path, chain + pairs + [reply("d1", 4)], "--max_depth", 0)
    assert [r["context"] for r in top] == [CONTEXT]
    assert count.dropped["comparisons: deeper than --max_depth"] == 3


def test_the_order_of_files_and_lines_changes_nothing(tmp_path):
    rng = random.Random(0)
    lines = []
    for p in range(30):
        lines.append(post(f"p{p}", title=f"Post {p}"))
        parents = [f"t3_p{p}", f"t1_c{p}x0"]
        lines += [reply(f"c{p}x{i}", rng.randint(-5, 50), parent=rng.choice(parents), link=f"t3_p{p}")
                  for i in range(8)]
    first, _ = read(tmp_path, lines)
    assert len(first) > 30
    rng.shuffle(lines)
    paths = [write_jsonl(tmp_path / f"part{i}", lines[i::3]) for i in range(3)]
    again, count = convert(reddit, paths)
    assert again == first and count.total == len(lines)
    assert {p.name for p in tmp_path.iterdir()} == {"dump", "part0", "part1", "part2"}


def test_buckets_larger_than_memory_are_distributed_anew(tmp_path, monkeypatch):
    lines = []
    for p in range(40):
        names = {"parent": f"t3_p{p}", "link": f"t3_p{p}"}
        lines += [post(f"p{p}"), reply(f"a{p}", 1, **names), reply(f"b{p}", 2, **names)]
    expected, _ = read(tmp_path, lines, "--min_score", 1)
    monkeypatch.setattr(buckets, "BUCKET_BYTES", 100)
    monkeypatch.setattr(reddit, "BUCKETS", 4)
    sizes = []

    def gather(*args):
        for bucket in buckets.gather(*args):
            sizes.append(len(bucket))
            yield bucket

    monkeypatch.setattr(reddit, "gather", gather)
    found, _ = read(tmp_path, lines, "--min_score", 1)
    assert sorted(map(str, found)) == sorted(map(str, expected)) and len(expected) == 40
    assert max(sizes) <= 12  # four threads of three records each; without a second distribution about 30


def test_numbers_may_be_strings_and_texts_are_unescaped(tmp_path):
    lines = [post(title="a &lt; b &amp;amp; c", created_utc="1000", selftext=""),
             reply("c1", "7", "x &gt; y\r\n&amp;#x200B;\r\nz ", created_utc="2000"), reply("c2", "-3")]
    found, count = read(tmp_path, lines)
    assert found[0]["context"] == "\n\nHuman: a < b &amp; c\n\nAssistant:"
    assert found[0]["completions"] == [" x > y\n\nz", " Reply c2."]
    assert found[0]["scores"] == [7, -3] and not count.n_bad


@pytest.mark.parametrize("missing", [None, ""])
def test_a_link_post_is_its_title(tmp_path, missing):
    found, _ = read(tmp_path, [post(selftext=missing), *THREAD[1:]])
    assert found[0]["context"] == "\n\nHuman: Which bread?\n\nAssistant:"


# ---------------------------------------------------------------------------------------------------------
# What is left out


@pytest.mark.parametrize("fields", [
    {"body": "[deleted]"}, {"body": "[removed]"}, {"body": " \n"}, {"author": "AutoModerator"},
    {"author": "RemindMeBot"}, {"author": "haiku_bot"}, {"distinguished": "moderator"}, {"stickied": True},
    {"body": "so: <eoc>"}, {"body": "&lt;eot&gt;"}, {"created_utc": 2000 + 25 * 3600}, {"body": "Reply c1."},
], ids=str)
def test_unfit_replies_are_left_out(tmp_path, fields):
    third = reply("c3", 5) | fields
    found, count = read(tmp_path, [*THREAD, third])
    assert found[0]["completions"] == [" Reply c1.", " Reply c2."] and sum(count.dropped.values()) == 1
    found, count = read(tmp_path, [*THREAD[:2], third])
    assert not found and count.dropped["comparisons: fewer than two replies left"] == 1


@pytest.mark.parametrize("fields", [{"selftext": "[removed]"}, {"selftext": "[deleted]"}, {"title": "<eot>"},
                                    {"author": "AutoModerator"}, {"id": "p2"}], ids=str)
def test_replies_to_unfit_posts_are_left_out(tmp_path, fields):
    found, count = read(tmp_path, [post(**fields), *THREAD[1:]])
    assert not found and len(count.dropped) == 1 and "comparisons: a text above is" in str(count.dropped)


def test_replies_below_a_deleted_comment_are_left_out(tmp_path):
    below = [reply("c3", 5, parent="t1_c1"), reply("c4", 2, parent="t1_c1")]
    assert len(read(tmp_path, THREAD + below)[0]) == 2
    found, count = read(tmp_path, [post(), reply("c1", 7, "[deleted]"), *THREAD[2:], *below])
    assert not found and count.dropped["comparisons: a text above is deleted or removed"] == 1


def test_threads_for_adults_are_left_out_unless_asked_for(tmp_path):
    lines = [post(over_18=True), *THREAD[1:]]
    found, count = read(tmp_path, lines)
    assert not found and count.dropped == {"comparisons: for adults (--nsfw keeps them)": 1}
    assert completions(tmp_path, lines, "--nsfw")


def test_scores_must_be_high_enough_and_differ(tmp_path):
    assert completions(tmp_path, THREAD, "--min_score", 7)
    assert not completions(tmp_path, THREAD, "--min_score", 8)
    assert completions(tmp_path, THREAD, "--min_difference", 4)
    assert not completions(tmp_path, THREAD, "--min_difference", 5)
    for flag in ("--min_score", "--min_difference"):
        assert read(tmp_path, THREAD, flag, 99)[1].dropped.total() == 1
    equal = [post(), reply("c1", 5), reply("c2", 5)]
    assert not completions(tmp_path, equal, "--min_difference", 0)  # there is nothing to rank


def test_the_time_between_replies_counts_from_the_first_fit_one(tmp_path):
    lines = [post(), reply("c0", 9, "[deleted]", created_utc=0), reply("c1", 7, created_utc=90_000),
             reply("c2", 3, created_utc=97_200)]
    assert completions(tmp_path, lines, "--max_age_gap", 2) == [" Reply c1.", " Reply c2."]
    assert completions(tmp_path, lines, "--max_age_gap", 1.9) is None


def test_of_many_replies_some_from_best_to_worst_are_kept(tmp_path):
    lines = [post(), *(reply(f"c{i}", i) for i in range(1, 20))]
    found, count = read(tmp_path, lines, "--max_replies", 4)
    assert found[0]["scores"] == [19, 13, 7, 1] and count.dropped == {"replies: more than --max_replies": 15}
    assert read(tmp_path, lines, "--max_replies", 2)[0][0]["scores"] == [19, 1]
    assert len(completions(tmp_path, lines)) == 8


def test_of_a_repeated_record_the_last_counts(tmp_path):
    found, count = read(tmp_path, [*THREAD, reply("c2", 70), post(title="Edited?")])
    assert found[0]["scores"] == [70, 7] and "Edited?" in found[0]["context"]
    assert count.dropped == {"records repeated (the last one counts)": 2}


def test_lone_replies_are_counted(tmp_path):
    found, count = read(tmp_path, [*THREAD, reply("c3", 1, parent="t1_c1")])
    assert len(found) == 1 and count.dropped == {"replies without a sibling": 1}


def test_comments_that_answer_each_other_in_a_circle_end(tmp_path):
    lines = [post(), reply("c1", 3, parent="t1_c2"), reply("c2", 2, parent="t1_c1"),
             reply("c3", 4, parent="t1_c1"), reply("c4", 4, parent="t1_c2")]
    found, count = read(tmp_path, lines)
    assert not found and count.dropped == {"comparisons: deeper than --max_depth": 2}


# ---------------------------------------------------------------------------------------------------------
# Broken records and wrong flags


BROKEN = {  # a line, and words of the answer
    "cut line": (b'{"id": "c9", "bod', "Unterminated string"),
    "no object": (b"[1, 2]", "expected a JSON object"),
    "not UTF-8": (b'{"title": "\xff\xfe"}', "not UTF-8 text"),
    "neither kind": (b'{"id": "x"}', "neither a submission"),
    "deep nesting": (b"[" * 100_000, "nested too deep"),
    "no score": ({k: v for k, v in reply("c9", 1).items() if k != "score"}, "no 'score'"),
    "no id": (b'{"title": "T", "score": 1, "created_utc": 1}', "no 'id'"),
    "score null": (reply("c9", None), '"score" must be a number'),
    "score a word": (reply("c9", "many"), "invalid literal"),
    "score NaN": (reply("c9", float("nan")), "NaN is not a number"),
    "score true": (reply("c9", True), '"score" must be a number'),
    "score absurd": (reply("c9", 10**400), '"score" must be a number'),
    "score beyond parsing": (b'{"title": "T", "id": "x", "score": ' + b"9" * 5000 + b"}", "integer"),
    "time missing": (reply("c9", 1, created_utc=None), '"created_utc" must be a number'),
    "body no text": (reply("c9", 1) | {"body": ["a"]}, '"body" must be a text'),
    "parent a number": (reply("c9", 1, parent=123), '"parent_id" must be a text'),
    "parent of no kind": (reply("c9", 1, parent="c1"), '"parent_id" must be t1_'),
}


@pytest.mark.parametrize("line, words", BROKEN.values(), ids=BROKEN)
def test_a_broken_record_is_counted_with_its_place(tmp_path, line, words):
    found, count = read(tmp_path, [*THREAD[:2], line, b"", *THREAD[2:]], max_bad=1)
    assert found[0]["scores"] == [7, 3] and count.n_bad == 1 and count.total == 4
    assert count.places[0].startswith(f"{tmp_path / 'dump'}:3: ") and words in count.places[0]


def test_half_a_surrogate_pair_is_replaced(tmp_path):
    found, count = read(tmp_path, [post(), reply("c1", 7, "odd \ud800"), reply("c2", 3)])
    assert found[0]["completions"][0] == " odd \ufffd" and not count.n_bad


@pytest.mark.parametrize("flags", [("--max_replies", 1), ("--max_age_gap", 0), ("--max_age_gap", "nan")])
def test_flags_that_admit_no_comparison_are_refused(tmp_path, flags):
    with pytest.raises(InputError, match=f"{flags[0]} {flags[1]}"):
        read(tmp_path, THREAD, *flags)


# ---------------------------------------------------------------------------------------------------------
# The command


def test_the_command_writes_comparisons_that_load(tmp_path):
    lines = [record for p in range(20) for record in (
        post(f"p{p}"), reply(f"a{p}", 9, "Ünïcode 🍞", f"t3_p{p}", f"t3_p{p}"),
        reply(f"b{p}", 2, "no", f"t3_p{p}", f"t3_p{p}"))]
    lines.append(reply("c", 1, parent="t1_a1"))
    raw, out = tmp_path / "RS.ndjson.zst", tmp_path / "out.jsonl"
    raw.write_bytes(zstandard.compress("\n".join(map(json.dumps, lines)).encode()))
    printed = run_well("data/prepare.py", "reddit", "--raw", raw, "--out", out)
    assert "20 comparisons of 61 records read" in printed
    assert "left out: 1 replies without a sibling" in printed
    tokenizer = get_tokenizer("bytes")
    data = load_comparisons([out], tokenizer)
    assert len(data) == 20 and data.counts["groups"] == 20 and data.counts["empty"] == 0
    assert [tokenizer.decode(ids) for ids in data.segments(0)] == [CONTEXT, " Ünïcode 🍞", " no"]
    assert data.scores(0).tolist() == [9, 2]
