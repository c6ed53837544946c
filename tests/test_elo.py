"""Elo ratings: they are what the games say, what the games leave open is said, and files without games are
refused."""
import gzip
import itertools
import json
import math
import random
import tracemalloc

import numpy as np
import pytest
from conftest import write_jsonl

from data.errors import InputError
from evals import elo

TRUE = {"careful": 220.0, "kind": 90.0, "plain": 0.0, "rude": -70.0, "vague": -240.0}


def chance(a, b):
    return 1 / (1 + 10 ** ((b - a) / 400))


def simulate(n, seed, elos=TRUE, ties=0.1):
    """n games between random pairs, some of them ties."""
    rng = random.Random(seed)
    games = []
    for _ in range(n):
        a, b = rng.sample(list(elos), 2)
        winner = a if rng.random() < chance(elos[a], elos[b]) else b
        games.append((a, b, None if rng.random() < ties else winner))
    return games


def rated(games):
    return {name: player["elo"] for name, player in elo.report(games)["players"].items()}


# ------------------------------------------------------------------------------------------------------------
# The ratings


def test_known_elos_are_found():
    found = rated(simulate(60_000, 0))
    assert list(found) == list(TRUE)  # best first
    assert found == pytest.approx(TRUE, abs=8)


def test_intervals_cover_the_truth_as_often_as_they_say():
    truth, hits, widths = np.array([TRUE[name] for name in sorted(TRUE)]), [], []
    for seed in range(40):
        low, high, sd = elo.bootstrap(simulate(400, seed), n=300)
        hits.append((low <= truth) & (truth <= high))
        widths.append((high - low) / (2 * 1.96 * sd))
    assert 0.90 < np.mean(hits) < 0.99 and 0.85 <= np.min(np.mean(hits, 0))
    assert np.mean(widths) == pytest.approx(1, abs=0.05)


def test_replies_to_one_context_are_drawn_together():
    """A reply plays against those of all other players, so its games tell less than games of its own would."""
    names, elos, widths = "abcdef", [], []
    for seed in range(40):
        rewards = np.random.default_rng(seed).normal(size=(60, 6))
        games, contexts = [], []
        for i, j in itertools.combinations(range(6), 2):
            shares = elo.judge(rewards[:, i], rewards[:, j])
            games += [(names[i], names[j], float(share)) for share in shares]
            contexts += range(60)
        elos.append(list(rated(games).values()))
        widths.append(elo.bootstrap(games, contexts, n=100)[2])
    assert np.mean(widths) == pytest.approx(np.std(elos), rel=0.1)


def test_the_fit_is_the_maximum_of_the_likelihood():
    wins = np.array([[0, 7, 2.5], [3, 0, 6], [1.5, 4, 0]])
    scores = elo.fit(wins, prior_sd=1e7) / elo.UNIT
    chances = 1 / (1 + np.exp(scores[None] - scores[:, None]))
    # At the maximum everybody wins as often as is to be expected.
    expected = ((wins + wins.T) * chances).sum(1)
    assert expected == pytest.approx(wins.sum(1), rel=1e-9)
    assert scores.sum() == pytest.approx(0, abs=1e-9)


def test_lopsided_games_in_which_whole_newton_steps_would_never_settle():
    wins = np.zeros((5, 5))
    for i, j, n in ((0, 1, 97.3), (0, 4, 1579.2), (2, 0, 1.4), (2, 1, 237.1), (3, 0, 5.3), (3, 4, 0.1),
                    (4, 1, 1796.6), (4, 3, 1.5)):
        wins[i, j] = n
    scores = elo.fit(wins) / elo.UNIT
    chances = 1 / (1 + np.exp(scores[None] - scores[:, None]))
    pull = (wins.sum(1) - ((wins + wins.T) * chances).sum(1)) * (elo.PRIOR_SD / elo.UNIT) ** 2
    assert pull == pytest.approx(scores, rel=1e-4, abs=1e-6)  # where likelihood and prior balance


def test_many_fits_at_once_are_the_fits_one_by_one():
    wins = np.random.default_rng(0).integers(0, 30, (20, 4, 4)) * (1 - np.eye(4))
    assert elo.fit(wins) == pytest.approx(np.stack([elo.fit(w) for w in wins]), abs=1e-8)


def test_the_order_of_games_and_of_their_two_sides_does_not_matter():
    games = simulate(300, 1)
    mixed = [(b, a, winner) for a, b, winner in random.Random(0).sample(games, len(games))]
    assert rated(mixed) == pytest.approx(rated(games), abs=1e-8)
    one, other = elo.report(games), elo.report(random.Random(1).sample(games, len(games)))
    assert one == other  # intervals too


def test_ties_are_dropped_and_counted():
    games = simulate(300, 2)
    decisive = [game for game in games if game[2]]
    with_ties, without = elo.report(games), elo.report(decisive)
    assert with_ties["ties_dropped"] == len(games) - len(decisive) > 0 and without["ties_dropped"] == 0
    assert with_ties["players"] == without["players"]
    assert with_ties["games"] == without["games"] == len(decisive)


def test_wins_losses_and_pairs_are_counted(capsys):
    figures = elo.report([("x", "y", "x"), ("y", "x", "x"), ("x", "y", "y"), ("y", "z", "z"),
                          ("z", "y", None)])
    counted = {name: (p["games"], p["wins"], p["losses"]) for name, p in figures["players"].items()}
    assert counted == {"x": (3, 2, 1), "y": (4, 1, 3), "z": (1, 1, 0)}
    pairs = {frozenset((p["a"], p["b"])): p for p in figures["pairs"]}
    xy = pairs[frozenset("xy")]
    x, y = (figures["players"][name]["elo"] for name in "xy")
    assert (xy["a"], xy["games"], xy["won"]) == ("x", 3, pytest.approx(2 / 3))
    assert xy["predicted"] == pytest.approx(chance(x, y))
    assert len(pairs) == 2 and json.loads(json.dumps(figures, allow_nan=False)) == figures
    printed = capsys.readouterr().out
    assert "5 games" not in printed and "4 games, 1 ties dropped" in printed
    assert "note: z won every game" in printed


def test_more_games_give_narrower_intervals():
    few, many = (elo.bootstrap(simulate(n, 3))[2] for n in (800, 12_800))
    assert few / many == pytest.approx(4, rel=0.15)


# ------------------------------------------------------------------------------------------------------------
# A preference model as the judge


def test_one_unit_of_score_is_174_elo():
    r = np.random.default_rng(0).normal(0, 3, 2000)
    share = elo.judge(r + 1, r)
    difference = -np.diff(elo.fit([[0, share.sum()], [(1 - share).sum(), 0]]))[0]
    assert difference == pytest.approx(400 / math.log(10), abs=0.01) == pytest.approx(173.7178, abs=0.01)
    found = rated([("a", "b", s) for s in share.tolist()])
    assert found["a"] - found["b"] == pytest.approx(difference)


def test_shares_of_a_game_count_on_the_side_they_belong_to():
    found = elo.report([("a", "b", 0.25), ("b", "a", 0.75), ("a", "b", "a"), ("a", "b", None)])["players"]
    assert (found["a"]["wins"], found["b"]["wins"], found["a"]["games"]) == (1.5, 1.5, 3)
    assert found["a"]["elo"] == pytest.approx(found["b"]["elo"], abs=1e-9)


def test_a_judge_may_be_as_sure_as_it_likes():
    assert elo.judge([0, 1000, -1000], [0, -1000, 1000]) == pytest.approx([0.5, 1, 0])


# ------------------------------------------------------------------------------------------------------------
# What the games leave open


def messages(games):
    names, outcomes, counts, _ = elo.tally(games)
    return elo.components(names, elo.wins_of(outcomes, counts, len(names)))


def test_the_prior_is_negligible_where_there_are_games():
    wins = [[0, 15], [5, 0]]
    with_prior, without = elo.fit(wins), elo.fit(wins, prior_sd=1e7)
    difference, error = without[0] - without[1], elo.UNIT / math.sqrt(20 * 0.75 * 0.25)
    assert difference == pytest.approx(400 * math.log10(3), abs=1e-3)
    assert 0 < difference - (with_prior[0] - with_prior[1]) < 0.01 * error


def test_unbeaten_and_winless_players_have_finite_elos_and_are_named():
    games = simulate(200, 4)
    games += [("best", name, "best") for name in TRUE] + [("worst", name, name) for name in TRUE]
    figures = elo.report(games)
    names = list(figures["players"])
    assert names[0] == "best" and names[-1] == "worst"
    assert all(abs(player["elo"]) < 3000 for player in figures["players"].values())
    for beginning in ("best won every game", "worst lost every game",
                      "careful, kind, plain, rude, vague won every game against some others and lost"):
        assert [message for message in figures["messages"] if message.startswith(beginning)]
    assert len(figures["messages"]) == 3
    assert elo.fit([[0, 1e6], [0, 0]])[0] < 3000
    assert elo.fit([[0, 20], [0, 0]])[0] > elo.fit([[0, 2], [0, 0]])[0] > 0


def test_memory_stays_small_whatever_the_number_of_players():
    """Two tables of all players, games times players wide, would take 4.6 GB here."""
    rng, games = random.Random(0), []
    for _ in range(3200):
        a, b = rng.sample(range(300), 2)
        games.append((f"{a:03}", f"{b:03}", f"{min(a, b):03}"))
    tracemalloc.start()
    low, high, _ = elo.bootstrap(games, n=20)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(low) == 300 and (low <= high).all() and peak < 2**29
    assert low[0] > high[-1]


def test_players_who_never_met_are_named():
    one, other = simulate(100, 5, {"a": 0, "b": 50}), simulate(100, 6, {"y": 0, "z": 50})
    assert messages(one) == [] and messages(other) == []
    [message] = messages(one + other)
    assert message.startswith("a, b | y, z: these never met")
    assert messages(one + other + [("a", "y", "a"), ("b", "z", "z")]) == []
    [message] = messages(one + [("a", "q", None)])
    assert message.startswith("a, b | q: these never met")
    found = rated(one + other)
    assert found["a"] + found["b"] == pytest.approx(0, abs=1e-6) == found["y"] + found["z"]


def test_a_circle_of_wins_leaves_nothing_open():
    assert messages([("a", "b", "a"), ("b", "c", "b"), ("c", "d", "c"), ("d", "a", "d")]) == []
    assert len(messages([("a", "b", "a"), ("b", "c", "b"), ("c", "d", "c")])) == 4


# ------------------------------------------------------------------------------------------------------------
# Files


ROWS = {  # as they stand in a file -> the winner
    ("gpt", "hhh, prompted", "gpt"): "gpt",
    ("gpt", "hhh, prompted", "model_b"): "hhh, prompted",
    ("hhh, prompted", "gpt", "A"): "hhh, prompted",
    ("gpt", "a", "b"): "a",
    ("gpt", "b", "b"): "b",
    ("gpt", "a", "a"): "a",
    ("gpt", "hhh, prompted", "tie"): None,
    ("gpt", "a", "Tie (bothbad)"): None,
    ("gpt", "a", "draw"): None,
    ("gpt", "a", ""): None}


def test_tables_and_json_lines_hold_the_same_games(tmp_path):
    table = "model_a,question,model_b,winner\r\n"
    table += "".join(f'"{a}","two\nlines","{b}",{winner}\r\n' for a, b, winner in ROWS)
    (tmp_path / "games.csv").write_bytes(b"\xef\xbb\xbf" + table.encode())
    (tmp_path / "games.csv.gz").write_bytes(gzip.compress(table.encode()))
    records = [{"model_a": a, "model_b": b, "winner": w, "turn": 1} for a, b, w in ROWS]
    for name in ("games.jsonl", "games.ndjson"):
        write_jsonl(tmp_path / name, records)
    for path in tmp_path.iterdir():
        assert elo.read_games(path) == [(a, b, winner) for (a, b, _), winner in ROWS.items()], path


HEAD = "model_a,model_b,winner\n"
BAD = {  # file's name, content, line, words
    "no column": ("g.csv", "model_a,model_b\nx,y\n", 2,
                  'no "winner", which must be a text (found \'model_a\', \'model_b\')'),
    "column twice": ("g.csv", "model_a,model_b,winner, winner\nx,y,x,y\n", 1,
                     "the column 'winner' stands there twice"),
    "short row": ("g.csv", HEAD + "x,y,x\nx,y\n", 3, 'no "winner"'),
    "long row": ("g.csv", HEAD + "x,y,x\nx,y,x,z\n", 3, "more cells than the 3 columns"),
    "third winner": ("g.csv", HEAD + "x,y,x\nx,y,z\n", 3, "the winner 'z' is neither 'x' nor 'y'"),
    "alone": ("g.csv", HEAD + "x,x,x\n", 2, "between two models, not 'x' and 'x'"),
    "no name": ("g.csv", HEAD + "x,,x\n", 2, "between two models, not 'x' and ''"),
    "open quote": ("g.csv", HEAD + 'x,y,x\nx,"y,x\n', 3, "not a line of a comma-separated table"),
    "junk": ("g.csv", b"\x80\x81\n", 1, "not UTF-8"),
    "only ties": ("g.csv", HEAD + "x,y,tie\nx,y,\n", None, "all 2 games are ties"),
    "nothing": ("g.csv", HEAD, None, "no games in this file"),
    "empty": ("g.jsonl", "", None, "no games in this file"),
    "not JSON": ("g.jsonl", '{"model_a": "x"', 1, "not a JSON object"),
    "missing key": ("g.jsonl", '\n{"model_a": "x", "winner": "x"}\n', 2, 'no "model_b"'),
    "null winner": ("g.jsonl", '{"model_a": "x", "model_b": "y", "winner": null}\n', 1,
                    '"winner" must be a text'),
    "cut gz": ("g.csv.gz", gzip.compress((HEAD + "x,y,x\n").encode())[:-9], None, "damaged or cut"),
    "too many players": ("g.csv", HEAD + "".join(f"m{i},m{i + 1},a\n" for i in range(elo.MOST_PLAYERS)), None,
                         "games between 301 models; at most 300 can be rated"),
    "other kind": ("g.parquet", "", None, "games are read from .csv, .jsonl or .ndjson"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_files_are_refused_with_file_and_line(tmp_path, case):
    name, content, line, words = BAD[case]
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(InputError) as refused:
        elo.read_games(path)
    message = str(refused.value)
    assert message.startswith(f"{path}:{line}: " if line else f"{path}:")
    assert words in message and "\n" not in message


def test_games_without_a_winner_are_refused():
    with pytest.raises(InputError, match="none of the 2 games has a winner"):
        elo.report([("a", "b", None), ("b", "c", None)])
