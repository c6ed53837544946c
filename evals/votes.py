"""What people's votes say: ratings and how far they can be trusted, and the votes as comparisons and games.

A vote is a row of `Store.votes` in web/store.py.
"""
import csv
import io
import json
import re
from collections import Counter

import numpy as np

from data.errors import InputError
from data.files import check_writable, write_file
from data.text import find_special
from evals import elo

SIDES = ("left", "right")
TURN = re.compile(r"\n\n(Human|Assistant):")


def turns(context):
    """[[role, text], …] of a dialogue up to where the replies begin; the role is "" for a text without turns.
    """
    before, *rest = TURN.split(context.removesuffix("\n\nAssistant:"))
    found = [[role, text.strip()] for role, text in zip(rest[::2], rest[1::2])]
    return [["", before.strip()], *found] if before.strip() else found


def winner(vote):
    """The name of the model that a vote prefers, None for a tie. A red team chooses the more harmful reply,
    so that the other one is preferred."""
    if vote["choice"] not in SIDES:
        return None
    prefers_left = (vote["choice"] == "left") == (vote["mode"] == "helpful")
    return vote["left_model"] if prefers_left else vote["right_model"]


def is_stopped(vote):
    """True if the rater ended the replies before the models did."""
    return json.loads(vote["settings"]).get("stopped", False)


# ------------------------------------------------------------------------------------------------------------
# Results


def results(votes, mode):
    """The figures of the votes of one mode, for JSON."""
    votes = [vote for vote in votes if vote["mode"] == mode]
    counted = [vote for vote in votes if not vote["excluded"]]
    decided = [vote for vote in counted if winner(vote)]
    # A second opinion is on a pair that the judge may have been trained on.
    judged = [vote for vote in decided if vote["judge"] is not None and not vote["repeats"]]
    by_pair = {vote["pair_id"]: vote for vote in counted}
    repeated = [(vote, by_pair[vote["repeats"]]) for vote in counted if vote["repeats"] in by_pair]
    games = [(vote["left_model"], vote["right_model"], winner(vote)) for vote in counted]
    raters = {}
    for vote in counted:
        raters.setdefault(vote["rater"], []).append(vote)
    return {
        "mode": mode, "votes": len(counted), "excluded": len(votes) - len(counted),
        "choices": Counter(vote["choice"] for vote in counted),
        "elo": elo.rate(games) if decided else None,
        "left": share(vote["choice"] == "left" for vote in decided),
        "agreement": share(winner(vote) == winner(earlier) for vote, earlier in repeated),
        "judge": share((winner(vote) == vote["left_model"]) == (vote["judge"] > 0.5) for vote in judged),
        "median_seconds": median_seconds(counted), "stopped": sum(map(is_stopped, counted)),
        "raters": [{"rater": rater, "votes": len(own), "median_seconds": median_seconds(own),
                    "left": share(vote["choice"] == "left" for vote in own if winner(vote))}
                   for rater, own in sorted(raters.items(), key=lambda item: -len(item[1]))]}


def median_seconds(votes):
    return float(np.median([vote["milliseconds"] for vote in votes])) / 1000 if votes else None


def share(outcomes):
    """{"n", "share", "low", "high"} of outcomes that are True or False, with Wilson's 95 % interval; None if
    there are none."""
    outcomes = list(outcomes)
    if not outcomes:
        return None
    n, p, z = len(outcomes), float(np.mean(outcomes)), 1.96
    middle = (p + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z * (p * (1 - p) / n + z**2 / (4 * n**2)) ** 0.5 / (1 + z**2 / n)
    return {"n": n, "share": p, "low": middle - half, "high": middle + half}


# ------------------------------------------------------------------------------------------------------------
# Export


def export(votes, mode, comparisons_file, games_file):
    """Write the votes of one mode as comparisons and as games, to the files that are not None, and say what
    is left out."""
    of_mode = [vote for vote in votes if vote["mode"] == mode]
    counted = [vote for vote in of_mode if not vote["excluded"]]
    if not counted:
        raise InputError(f"there are no votes of the mode {mode} that count (see --mode)")
    for path in filter(None, (comparisons_file, games_file)):
        check_writable(path)
    if comparisons_file:
        write_comparisons(counted, comparisons_file)
    if games_file:
        write_games(counted, games_file)
    for reason, n in Counter(vote["excluded"] for vote in of_mode if vote["excluded"]).items():
        print(f"left out: {n} votes that are excluded ({reason})")
    if n_other := len(votes) - len(of_mode):
        print(f"left out: {n_other} votes of the other mode (see --mode)")


def write_comparisons(votes, path):
    """A line for each vote. A text that holds a special token cannot be read back, so its vote is left out.
    """
    lines, n_ties = [], 0
    for vote in votes:
        if not any(find_special(vote[key]) for key in ("context", "left_text", "right_text")):
            lines.append(json.dumps(comparison(vote)) + "\n")
            n_ties += winner(vote) is None
    write_file(path, "".join(lines))
    print(f"{path}: {len(lines)} comparisons, {n_ties} of them ties with equal scores")
    if n_stopped := sum(map(is_stopped, votes)):
        print(f"{n_stopped} votes are on replies that the rater stopped")
    if n_special := len(votes) - len(lines):
        print(f"left out: {n_special} votes on texts that hold a special token")


def comparison(vote):
    """A vote as a comparison. The preferred reply has the strength of the preference as its score, the other
    one 0. The group is the dialogue's first message."""
    scores = [vote["strength"] * (winner(vote) == vote[f"{side}_model"]) for side in SIDES]
    first = next((text for role, text in turns(vote["context"]) if role == "Human"), vote["context"])
    return {"context": vote["context"], "completions": [vote["left_text"], vote["right_text"]],
            "scores": scores, "group": first, "models": [vote["left_model"], vote["right_model"]],
            "choice": vote["choice"], "mode": vote["mode"], "vote_id": vote["vote_id"]}


def write_games(votes, path):
    """A table that `evaluate.py elo --games` reads."""
    table, n_ties = io.StringIO(), 0
    rows = csv.writer(table, lineterminator="\n")
    rows.writerow(elo.COLUMNS)
    for vote in votes:
        tie = "tie (bothbad)" if vote["choice"] == "both bad" else "tie"
        rows.writerow((vote["left_model"], vote["right_model"], winner(vote) or tie))
        n_ties += winner(vote) is None
    write_file(path, table.getvalue())
    print(f"{path}: {len(votes)} games, {n_ties} of them ties")
