"""Elo ratings from games between models, fitted jointly by maximum likelihood, ties dropped (the paper, Section 4).

A wins against B with probability 1 / (1 + 10^((Elo_B - Elo_A) / 400)); one unit of preference-model score is 400 / ln 10 =
174 Elo. What the games cannot tell (the rating of a player who won them all, or the distance between players who never met,
not even through others) is settled by a weak prior, Normal(0, PRIOR_SD) on every rating. Where there are games it hardly
counts: of 191 Elo that 15 wins in 20 games mean, it takes 0.8, with a standard error of 90.
"""
import csv
from collections import Counter
from itertools import combinations
from pathlib import Path

import numpy as np

from data.errors import InputError
from data.files import PACKED, read_lines, read_records

UNIT = 400 / np.log(10)  # Elo in one unit of preference-model score: 173.7
PRIOR_SD = 1000  # Elo
COLUMNS = ("model_a", "model_b", "winner")
SIDES = {"model_a": 0, "a": 0, "model_b": 1, "b": 1}
TIES = ("tie", "tie (bothbad)", "draw", "")


# ---------------------------------------------------------------------------------------------------------------------
# Games


def read_games(path):
    """Games of a .csv, .jsonl or .ndjson file, plain or compressed: a list of (model_a, model_b, winner), None for a tie.

    `winner` is one of the two names; or model_a, a, model_b, b; or tie, tie (bothbad), draw or empty, in any case of letters.
    Raises InputError with file and line for anything else, for a model that meets itself, and where nobody ever won.
    """
    games = [_parse(record, f"{path}:{line}") for line, record in _records(Path(path))]
    if all(winner is None for _, _, winner in games):
        raise InputError(f"{path}: {f'all {len(games)} games are ties' if games else 'no games in this file'}; Elo needs games with a winner")
    return games


def _records(path):
    """(line number, record) of a table or of JSON lines."""
    names = {suffix + packed: suffix for suffix in (".csv", ".jsonl", ".ndjson") for packed in PACKED}
    kind = next((names[end] for end in names if path.name.endswith(end)), None)
    if kind is None:
        raise InputError(f"{path}: games are read from .csv, .jsonl or .ndjson files (plain, .gz, .xz, .bz2, .zst)")
    return _csv_records(path) if kind == ".csv" else read_records(path)


def _csv_records(path):
    def texts():
        for number, line in read_lines(path):
            try:
                yield line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise InputError(f"{path}:{number}: not UTF-8 text (at byte {error.start}); is this a table?") from None
    table = csv.DictReader(texts(), strict=True)
    try:
        for record in table:
            if None in record:
                raise InputError(f"{path}:{table.line_num}: more cells than the {len(table.fieldnames)} columns; a comma in a name needs quotes")
            yield table.line_num, {key.strip(): value for key, value in record.items() if value is not None}
    except csv.Error as error:
        raise InputError(f"{path}:{table.reader.line_num}: not a line of a comma-separated table ({error})") from None


def _parse(record, where):
    missing = [name for name in COLUMNS if name not in record]
    if missing:
        raise InputError(f"{where}: no {missing[0]} (expected {', '.join(COLUMNS)}; found {', '.join(map(str, record)) or 'nothing'})")
    if not all(isinstance(record[name], str) for name in COLUMNS):
        raise InputError(f"{where}: {', '.join(COLUMNS)} must be texts")
    a, b, winner = (record[name].strip() for name in COLUMNS)
    if not a or not b or a == b:
        raise InputError(f"{where}: a game is between two models, not {a!r} and {b!r}")
    if winner in (a, b):  # before the words below: a model may be called "a"
        return a, b, winner
    if winner.lower() in TIES:
        return a, b, None
    if winner.lower() not in SIDES:
        raise InputError(f"{where}: the winner {winner[:40]!r} is neither {a!r} nor {b!r}, nor one of {', '.join(SIDES)}, {', '.join(TIES[:-1])}")
    return a, b, (a, b)[SIDES[winner.lower()]]


def judge(scores_a, scores_b, hard=False):
    """What share of each game A wins by the scores of a preference model: P(A > B) = sigmoid(r_A - r_B), or 1, 0 if `hard`.

    scores_a, scores_b: (G,) scores of the two models' replies to the same G contexts. Returns (G,); a half for equal scores.
    A share may stand in place of a game's winner: (model_a, model_b, share of model_a).
    """
    margin = np.asarray(scores_a, float) - np.asarray(scores_b, float)
    return (np.sign(margin) + 1) / 2 if hard else _sigmoid(margin)


def tally(games):
    """(names, outcomes (U, 3), counts (U,), ties): the distinct decisive games, how often each was played, and the number of ties.

    An outcome is (number of model_a, number of model_b, share that model_a won). Names are sorted; they include those of
    players with ties only. Raises InputError where no game is decisive.
    """
    names = sorted({name for a, b, _ in games for name in (a, b)})
    number = {name: i for i, name in enumerate(names)}
    played = Counter((number[a], number[b], float(winner == a) if isinstance(winner, str) else float(winner))
                     for a, b, winner in games if winner is not None)
    if not played:
        raise InputError(f"none of the {len(games)} games has a winner: there is nothing to rate")
    outcomes = sorted(played)  # so that the order of the games does not matter
    counts = np.array([played[outcome] for outcome in outcomes])
    return names, np.array(outcomes), counts, len(games) - int(counts.sum())


def wins_of(outcomes, counts, n):
    """wins[…, i, j]: games (or shares of them) that player i won against player j. outcomes (U, 3), counts (…, U) -> (…, n, n)."""
    a, b, share = outcomes[:, 0].astype(int), outcomes[:, 1].astype(int), outcomes[:, 2]
    each = np.zeros((len(outcomes), n, n))
    np.add.at(each, (np.arange(len(outcomes)), a, b), share)
    np.add.at(each, (np.arange(len(outcomes)), b, a), 1 - share)
    return (counts @ each.reshape(len(outcomes), -1)).reshape(*counts.shape[:-1], n, n)


# ---------------------------------------------------------------------------------------------------------------------
# Ratings


def _sigmoid(x):
    return 1 / (1 + np.exp(-np.clip(x, -500, 500)))


def fit(wins, prior_sd=PRIOR_SD):
    """Elos (…, n) from wins (…, n, n), wins[i, j] being games (or parts of games) that i won against j. Their mean is 0.

    Newton's method, to 1e-9 Elo. A step changes no difference by more than one unit (174 Elo): so far the logistic
    function's curvature grows by less than e, and every such step goes uphill.
    """
    wins = np.asarray(wins, float)
    precision, own = (UNIT / prior_sd) ** 2, np.eye(wins.shape[-1])
    games = wins + wins.swapaxes(-1, -2)
    scores = np.zeros(wins.shape[:-1])  # in units; the mean stays 0, as the likelihood knows differences only
    for _ in range(1000):
        p = _sigmoid(scores[..., :, None] - scores[..., None, :])
        lost_chance = p.swapaxes(-1, -2)  # 1 - p without its rounding, which for those who always win is all there is
        gradient = (wins * lost_chance - wins.swapaxes(-1, -2) * p).sum(-1) - precision * scores
        curvature = games * p * lost_chance
        hessian = own * (curvature.sum(-1) + precision)[..., None] - curvature * (1 - own)
        step = np.linalg.solve(hessian, gradient[..., None])[..., 0]
        step /= np.maximum(1, np.ptp(step, axis=-1, keepdims=True))
        scores += step
        if np.abs(step).max() * UNIT < 1e-9:
            return scores * UNIT
    raise ArithmeticError("Newton's method did not converge")


def bootstrap(games, n=1000, seed=0):
    """(low (P,), high (P,), sd (P,)) of the players' Elos in sorted order of their names: the 2.5 % and 97.5 % quantiles and the
    standard deviation over n resamplings of the decisive games."""
    names, outcomes, counts, _ = tally(games)
    rng, total = np.random.default_rng(seed), counts.sum()
    elos = [fit(wins_of(outcomes, rng.multinomial(total, counts / total, size=len(part)), len(names)))
            for part in np.array_split(np.arange(n), -(-n * len(counts) // 2**24))]  # fewer at once where shares make many outcomes
    elos = np.concatenate(elos)
    return *np.quantile(elos, (0.025, 0.975), axis=0), elos.std(0)


def components(names, wins):
    """What the games leave open, as messages. Ratings are determined by the games alone only among players who are all linked by
    chains of wins: each has beaten someone who has beaten someone … who has beaten each other."""
    messages, groups = [], _classes(_reach(wins + wins.T))
    if len(groups) > 1:
        listed = " | ".join(_list(names, group) for group in groups)
        messages.append(f"{listed}: these never met, not even through others; the differences between them are the prior's")
    reach = _reach(wins)
    linked = _classes(reach & reach.T)
    for group in groups:
        for inner in linked:
            others = np.setdiff1d(group, inner)
            if inner[0] not in group or not len(others):
                continue
            won, lost = wins[np.ix_(inner, others)].any(), wins[np.ix_(others, inner)].any()
            how = "won every game against some others and lost every game against the rest" if won and lost else \
                f"{'won' if won else 'lost'} every game against others"
            messages.append(f"{_list(names, inner)} {how}: only the prior bounds {'its' if len(inner) == 1 else 'their'} Elo")
    return messages


def _reach(edges):
    """(n, n) True where a chain of edges leads from i to j; everybody reaches themselves."""
    reach = (edges > 0) | np.eye(len(edges), dtype=bool)
    for k in range(len(reach)):
        reach |= reach[:, k, None] & reach[k]
    return reach


def _classes(same):
    """The classes of an equivalence (n, n), each an array of numbers, in the order of their first members."""
    return [np.flatnonzero(row) for i, row in enumerate(same) if row.argmax() == i]


def _list(names, numbers):
    return ", ".join(names[i] for i in numbers)


# ---------------------------------------------------------------------------------------------------------------------
# The report


def report(games, seed=0):
    """Rate the players of `games`, a list of (model_a, model_b, winner, None or share of model_a); print a table and return figures
    for JSON: {"players": {name: {"elo", "low", "high", "sd", "games", "wins", "losses"}}, "pairs", "games", "ties_dropped", "messages"}.
    """
    names, outcomes, counts, ties = tally(games)
    wins = wins_of(outcomes, counts, len(names))
    elos, (low, high, sd) = fit(wins), bootstrap(games, seed=seed)
    won, lost, order = wins.sum(1), wins.sum(0), np.argsort(-elos, kind="stable")
    columns = {"elo": elos, "low": low, "high": high, "sd": sd, "games": won + lost, "wins": won, "losses": lost}
    players = {names[i]: {key: float(column[i]) for key, column in columns.items()} for i in order}
    met = [(i, j, wins[i, j] + wins[j, i]) for i, j in combinations(order, 2) if wins[i, j] + wins[j, i] > 0]
    pairs = [{"a": names[i], "b": names[j], "games": float(n), "won": float(wins[i, j] / n),
              "predicted": float(_sigmoid((elos[i] - elos[j]) / UNIT))} for i, j, n in met]
    figures = {"players": players, "pairs": pairs, "games": int(counts.sum()), "ties_dropped": ties, "messages": components(names, wins)}
    print_table(figures)
    return figures


def print_table(figures):
    width = max(map(len, figures["players"]))
    print(f"\n  {figures['games']:,} games, {figures['ties_dropped']:,} ties dropped; Elo around a mean of 0, 95 % intervals by resampling games\n")
    print(f"  {'':<{width}}      Elo   95 % interval         games       wins     losses")
    for name, p in figures["players"].items():
        print(f"  {name:<{width}} {p['elo']:8.1f}   {p['low']:7.1f} … {p['high']:<7.1f} {p['games']:9,.6g} {p['wins']:10,.6g} {p['losses']:10,.6g}")
    print(f"\n  {'first':<{width}}   {'against':<{width}}     games   won %   predicted %")
    for pair in figures["pairs"]:
        print(f"  {pair['a']:<{width}}   {pair['b']:<{width}} {pair['games']:9,.6g} {100 * pair['won']:7.1f} {100 * pair['predicted']:13.1f}")
    for message in figures["messages"]:
        print(f"  note: {message}")
