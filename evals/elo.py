"""Elo ratings from games between models, fitted together by maximum likelihood; ties are dropped (Section 2
of the paper).

A wins against B with probability 1 / (1 + 10^((Elo_B - Elo_A) / 400)), so that a preference model's reward
is an Elo in another unit: 1 / (1 + exp(r_B - r_A)) is the same for rewards r = Elo * ln 10 / 400.

Some things the games cannot tell: the rating of a player who won them all, or the distance between players
who never met, not even through others. There a weak prior decides, Normal(0, PRIOR_SD) on every rating. Where
there are games it hardly counts: 15 wins in 20 games mean 191 Elo with a standard error of 90, and the prior
takes 0.8 from that.
"""
from collections import Counter
from itertools import combinations
from pathlib import Path

import numpy as np
from tqdm import tqdm

from data.errors import InputError
from data.files import PACKED, fields, read_records
from evals.choices import read_items
from evals.tables import csv_records

UNIT = 400 / np.log(10)  # Elo in one unit of a preference model's reward: 173.7
PRIOR_SD = 1000  # Elo
COLUMNS = ("model_a", "model_b", "winner")
SIDES = {"model_a": 0, "a": 0, "model_b": 1, "b": 1}
TIES = ("tie", "tie (bothbad)", "draw", "")
MOST_PLAYERS = 300  # a fit takes the third power of their number, and there are a thousand fits
PART = 2**22  # numbers in an array: the bootstrap fits as many resamplings together as this allows


# ------------------------------------------------------------------------------------------------------------
# Games


def read_games(path):
    """The games in a .csv, .jsonl or .ndjson file, plain or compressed: (model_a, model_b, winner), None for
    a tie.

    `winner` is one of the two names; or model_a, a, model_b, b; or tie, tie (bothbad), draw or empty, in
    upper or lower case. Raises InputError with file and line for anything else, for a model that meets
    itself, and if nobody ever won.
    """
    kinds = [suffix for suffix in Path(path).suffixes if suffix not in PACKED]
    if not kinds or kinds[-1] not in (".csv", ".jsonl", ".ndjson"):
        raise InputError(f"{path}: games are read from .csv, .jsonl or .ndjson files (plain, .gz, .xz, .bz2, "
                         ".zst)")
    records = csv_records(path) if kinds[-1] == ".csv" else read_records(path)
    games = [_parse(record, f"{path}:{line}") for line, record in records]
    if all(winner is None for _, _, winner in games):
        found = f"all {len(games)} games are ties" if games else "no games in this file"
        raise InputError(f"{path}: {found}; Elo needs games with a winner")
    n_players = len({name for a, b, _ in games for name in (a, b)})
    if n_players > MOST_PLAYERS:
        raise InputError(f"{path}: games between {n_players:,} models; at most {MOST_PLAYERS} can be rated")
    return games


def _parse(record, where):
    a, b, winner = map(str.strip, fields(record, where, dict.fromkeys(COLUMNS, str)))
    if not a or not b or a == b:
        raise InputError(f"{where}: a game is between two models, not {a!r} and {b!r}")
    if winner in (a, b):  # before the words below: a model may be called "a"
        return a, b, winner
    if winner.lower() in TIES:
        return a, b, None
    if winner.lower() not in SIDES:
        raise InputError(f"{where}: the winner {winner[:40]!r} is neither {a!r} nor {b!r}, nor one of "
                         f"{', '.join(SIDES)}, {', '.join(TIES[:-1])}")
    return a, b, (a, b)[SIDES[winner.lower()]]


def judge(rewards_a, rewards_b):
    """The share (G,) of each game that A wins by the rewards (G,) of both replies to the same context: P(A >
    B) = sigmoid(r_A - r_B). It stands in place of a winner: (model_a, model_b, share of model_a)."""
    return _sigmoid(np.asarray(rewards_a, float) - np.asarray(rewards_b, float))


def judged_games(rewards, files):
    """Games between all players: a share for each context and number of reply that two of them have. Returns
    (games, for each of them the number of its context).

    rewards: a function (contexts, texts) -> (N,). files: for each player's name its file of samples.
    """
    replies = []  # (player, context, number of the reply, text)
    for player, path in files.items():
        for record in read_items("choice", [path])[0]:
            replies += [(player, record["context"], n, text) for n, text in enumerate(record["completions"])]
    contexts, texts = [context for _, context, *_ in replies], [text for *_, text in replies]
    scores = {player: {} for player in files}
    for (player, context, n, _), reward in zip(replies, rewards(contexts, texts)):
        scores[player][context, n] = reward
    games, of_games, numbers = [], [], {}
    for a, b in combinations(files, 2):
        shared = [reply for reply in scores[a] if reply in scores[b]]
        games += [(a, b, float(judge(scores[a][reply], scores[b][reply]))) for reply in shared]
        of_games += [numbers.setdefault(context, len(numbers)) for context, _ in shared]
    if not games:
        raise InputError(f"{next(iter(files.values()))}: shares no context with the other files; sample from "
                         "the same --data")
    return games, of_games


def tally(games):
    """Count the games that are no ties: (names, outcomes (U, 3), counts (U,), number of ties).

    The names are sorted, and include those of players with ties only. An outcome is (number of model_a,
    number of model_b, share that model_a won), and each different one stands there once. Raises InputError if
    all games are ties.
    """
    names = sorted({name for a, b, _ in games for name in (a, b)})
    number = {name: i for i, name in enumerate(names)}
    played = Counter()
    for a, b, winner in games:
        if winner is not None:
            share = float(winner == a) if isinstance(winner, str) else float(winner)
            played[number[a], number[b], share] += 1
    if not played:
        raise InputError(f"none of the {len(games)} games has a winner: there is nothing to rate")
    outcomes = sorted(played)  # so that the order of the games does not matter
    counts = np.array([played[outcome] for outcome in outcomes])
    return names, np.array(outcomes), counts, len(games) - int(counts.sum())


def wins_of(outcomes, counts, n):
    """The games, or shares of games, that each of n players won against each other one.

    outcomes (U, 3) as `tally` gives them, counts (…, U) -> (…, n, n); at [i, j] what i won against j.
    """
    a, b, share = outcomes[:, 0].astype(int), outcomes[:, 1].astype(int), outcomes[:, 2]
    cells = np.concatenate([a * n + b, b * n + a])
    won = np.concatenate([counts * share, counts * (1 - share)], axis=-1)
    wins = [np.bincount(cells, row, n * n) for row in won.reshape(-1, len(cells))]
    return np.reshape(wins, (*counts.shape[:-1], n, n))


# ------------------------------------------------------------------------------------------------------------
# Ratings


def _sigmoid(x):
    return 1 / (1 + np.exp(-np.clip(x, -500, 500)))


def fit(wins, prior_sd=PRIOR_SD):
    """The Elos (…, n) of the players, given wins (…, n, n) as from `wins_of`. Their mean is 0.

    Newton's method, to 1e-9 Elo. A step changes no difference by more than one unit (174 Elo): so far the
    logistic function's curvature grows by less than e, and every such step goes uphill.
    """
    wins = np.asarray(wins, float)
    precision, diagonal = (UNIT / prior_sd) ** 2, np.eye(wins.shape[-1])
    games = wins + wins.swapaxes(-1, -2)
    scores = np.zeros(wins.shape[:-1])  # in units; the mean stays 0, as the likelihood knows differences only
    for _ in range(1000):
        win = _sigmoid(scores[..., :, None] - scores[..., None, :])
        lose = win.swapaxes(-1, -2)  # not 1 - win, which is rounded to 0 for those who always win
        gradient = (wins * lose - wins.swapaxes(-1, -2) * win).sum(-1) - precision * scores
        curvature = games * win * lose
        hessian = diagonal * (curvature.sum(-1) + precision)[..., None] - curvature * (1 - diagonal)
        step = np.linalg.solve(hessian, gradient[..., None])[..., 0]
        step /= np.maximum(1, np.ptp(step, axis=-1, keepdims=True))
        scores += step
        if np.abs(step).max() * UNIT < 1e-9:
            return scores * UNIT
    raise ArithmeticError("Newton's method did not converge")


def bootstrap(games, contexts=None, n=1000, seed=0):
    """How sure the Elos are, by n resamplings of the games that are no ties: (2.5 % quantile, 97.5 %
    quantile, standard deviation), each (P,) in the sorted order of the players' names.

    contexts: for each game the number of its context. Games of a context are drawn together then, as each of
    its replies plays in several of them.
    """
    names, outcomes, counts, _ = tally(games)
    rng = np.random.default_rng(seed)
    if contexts is None:
        size = PART // max(len(counts), len(names) ** 2)  # resamplings that are fitted together

        def draw(size):
            drawn = rng.multinomial(counts.sum(), counts / counts.sum(), size)
            return wins_of(outcomes, drawn, len(names))
    else:
        wins = wins_by_context(games, contexts)[1]
        size, each = PART // max(len(wins), len(names) ** 2), np.full(len(wins), 1 / len(wins))

        def draw(size):
            return np.tensordot(rng.multinomial(len(wins), each, size), wins, 1)
    elos = []
    for first in tqdm(range(0, n, max(1, size)), desc="resampling", disable=None, leave=False):
        elos.append(fit(draw(min(max(1, size), n - first))))
    elos = np.concatenate(elos)
    return *np.quantile(elos, (0.025, 0.975), axis=0), elos.std(0)


def wins_by_context(games, contexts):
    """(sorted names, wins (contexts, n, n)): as `wins_of` for each context, of games that each have a share for
    a winner, and given the number of each game's context."""
    names = sorted({name for a, b, _ in games for name in (a, b)})
    wins = np.zeros((max(contexts) + 1, len(names), len(names)))
    for (a, b, share), context in zip(games, contexts):
        i, j = names.index(a), names.index(b)
        wins[context, i, j] += share
        wins[context, j, i] += 1 - share
    return names, wins


def components(names, wins):
    """What the games leave open, as messages.

    The games alone decide the ratings only among players who are linked by chains of wins both ways: each
    has beaten someone who has beaten someone … who has beaten each other one.
    """
    messages, met = [], _classes(_reach(wins + wins.T))
    if len(met) > 1:
        listed = " | ".join(", ".join(names[i] for i in group) for group in met)
        messages.append(f"{listed}: these never met, not even through others; the differences between them "
                        "are the prior's")
    reach = _reach(wins)
    for linked in _classes(reach & reach.T):
        others = np.delete(np.arange(len(names)), linked)
        won, lost = wins[np.ix_(linked, others)].any(), wins[np.ix_(others, linked)].any()
        if not won and not lost:
            continue
        result = "won every game against some others and lost every game against the rest"
        if won != lost:
            result = f"{'won' if won else 'lost'} every game against others"
        messages.append(f"{', '.join(names[i] for i in linked)} {result}: only the prior bounds "
                        f"{'its' if len(linked) == 1 else 'their'} Elo")
    return messages


def _reach(edges):
    """(n, n) True if a chain of edges leads from i to j; everyone reaches themselves."""
    reach = (edges > 0) | np.eye(len(edges), dtype=bool)
    for k in range(len(reach)):
        reach |= reach[:, k, None] & reach[k]
    return reach


def _classes(same):
    """The classes of an equivalence (n, n), each an array of numbers, in the order of their first members."""
    return [np.flatnonzero(row) for i, row in enumerate(same) if row.argmax() == i]


# ------------------------------------------------------------------------------------------------------------
# The report


def rate(games, seed=0, contexts=None):
    """Rate the players of `games`, (model_a, model_b, winner, None or share of model_a). contexts: as of
    `bootstrap`.

    Returns the figures for JSON: {"players": {name: {"elo", "low", "high", "sd", "games", "wins", "losses"}},
    "pairs", "games", "ties_dropped", "messages"}.
    """
    names, outcomes, counts, ties = tally(games)
    wins = wins_of(outcomes, counts, len(names))
    elos, (low, high, sd) = fit(wins), bootstrap(games, contexts, seed=seed)
    won, lost, order = wins.sum(1), wins.sum(0), np.argsort(-elos, kind="stable")
    columns = {"elo": elos, "low": low, "high": high, "sd": sd, "games": won + lost, "wins": won,
               "losses": lost}
    players = {names[i]: {key: float(column[i]) for key, column in columns.items()} for i in order}
    pairs = []
    for i, j in combinations(order, 2):
        if n := float(wins[i, j] + wins[j, i]):
            pairs.append({"a": names[i], "b": names[j], "games": n, "won": float(wins[i, j] / n),
                          "predicted": float(_sigmoid((elos[i] - elos[j]) / UNIT))})
    return {"players": players, "pairs": pairs, "games": int(counts.sum()), "ties_dropped": ties,
            "messages": components(names, wins)}


def report(games, seed=0, contexts=None):
    """Rate the players and print a table. Returns the figures of `rate`."""
    figures = rate(games, seed, contexts)
    players, width = figures["players"], max(map(len, figures["players"]))
    print(f"\n  {figures['games']:,} games, {figures['ties_dropped']:,} ties dropped; Elo around a mean of "
          f"0, 95 % intervals by resampling {'games' if contexts is None else 'contexts'}\n\n"
          f"  {'':<{width}}      Elo   95 % interval         games       wins     losses")
    for name, p in players.items():
        print(f"  {name:<{width}} {p['elo']:8.1f}   {p['low']:7.1f} … {p['high']:<7.1f} {p['games']:9,.6g} "
              f"{p['wins']:10,.6g} {p['losses']:10,.6g}")
    print(f"\n  {'first':<{width}}   {'against':<{width}}     games   won %   predicted %")
    for pair in figures["pairs"]:
        print(f"  {pair['a']:<{width}}   {pair['b']:<{width}} {pair['games']:9,.6g} {100 * pair['won']:7.1f} "
              f"{100 * pair['predicted']:13.1f}")
    for message in figures["messages"]:
        print(f"  note: {message}")
    return figures
