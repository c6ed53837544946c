"""What the arena's page may ask for: pairs of replies, votes on them, and the ratings (arena.py)."""
import json
import random
import re
import threading
from http import HTTPStatus

import checkpoint
from data.errors import InputError
from data.files import content_key, valid_unicode
from data.prompts import SEPARATOR
from data.text import find_special
from evals import elo
from evals.choices import as_dialogue, read_items
from evals.subject import reward_function
from evals.votes import SIDES, TURN, results, turns
from web.replies import Writer
from web.server import Refused
from web.store import now

MODES = ("helpful", "red_team")
ID = re.compile(r"[\w-]{8,64}")
MOST_WAITING, MOST_OF_ONE = 100, 3  # pairs whose replies are being written at one time, and of one rater


class Arena:
    """A method takes the name of a rater and the values of a request, and returns what becomes JSON."""

    def __init__(self, store, subjects, samples, args):
        self.store, self.subjects, self.samples = store, subjects, samples
        self.writer = Writer(subjects, self.store_replies, args.max_new, args.temperature, args.top_p)
        self.rewards = reward_function(args.judge, args)[0] if args.judge else None
        items = read_items("choice", [args.contexts])[0] if args.contexts else []
        self.contexts = list(dict.fromkeys(item["context"] for item in items))
        self.settings = {"temperature": args.temperature, "top_p": args.top_p, "max_new": self.writer.max_new,
                         "judge": model_key(args.judge) if args.judge else None}
        self.player_settings = {
            name: {"model": model_key(subject.name), "prompt": content_key([], subject.prompt)}
            for name, subject in subjects.items()}
        self.check_names()
        self.serving, self.figures_lock, self.latest_figures = threading.Lock(), threading.Lock(), {}
        self.get = {"/setup": self.setup, "/pair": self.show, "/stream": self.stream,
                    "/figures": self.figures}
        self.post = {"/pair": self.serve, "/stop": self.stop, "/vote": self.vote}

    def check_names(self):
        """Raise InputError if the database holds another model, or prompt, by the name of one of today's: their
        votes would be counted together."""
        for row in self.store.read("SELECT DISTINCT left_model, right_model, settings FROM pairs"):
            settings = json.loads(row["settings"])
            for side in SIDES:
                name, stored = row[f"{side}_model"], settings.get(side)
                today = self.player_settings.get(name)
                if stored and today and "model" in stored and version(stored) != version(today):
                    raise InputError(f"{self.store.path}: holds pairs of another {name!r}, with other weights "
                                     "or another prompt, which would be counted together; give another --db")

    def settings_of(self, left, right):
        """What decides the replies of two models today, and who judges them."""
        players = {"left": self.player_settings.get(left), "right": self.player_settings.get(right)}
        return {**self.settings, **players}

    def setup(self, rater, values):
        return {"live": bool(self.subjects), "contexts": len(self.contexts)}

    def find(self, rater, values, key="pair_id"):
        """The pair that a request names, which must be this rater's."""
        pair = self.store.pair(text_of(values, key, ID))
        if not pair or pair["rater"] != rater:
            raise Refused(HTTPStatus.NOT_FOUND, "There is no such pair.")
        return pair

    def show(self, rater, values):
        return view(self.find(rater, values))

    # --- pairs and their replies

    def serve(self, rater, values):
        """Serve a pair: of --samples, or two replies to a message or to one of --contexts."""
        pair_id, mode = text_of(values, "pair_id", ID), values.get("mode")
        if mode not in MODES:
            raise Refused(HTTPStatus.BAD_REQUEST, "The mode is helpful or red_team.")
        with self.serving:
            if self.store.pair(pair_id):
                pass  # the page asks again, as it did not get the answer
            elif self.samples:
                self.serve_sampled(rater, pair_id, mode)
            elif values.get("again"):
                self.serve_again(rater, pair_id, mode)
            else:
                self.serve_live(rater, pair_id, mode, values)
        return self.show(rater, values)

    def serve_sampled(self, rater, pair_id, mode):
        number = self.samples.draw(rater, mode)
        context, texts = self.samples.pairs[number]
        served = self.samples.served[number]
        voted = [pair for other, _, pair in served if other == mode and self.store.pair(pair)["choice"]]
        files = {name: {"file": self.samples.digests[name]} for name in texts}
        self.add_written(rater, pair_id, mode, context, texts, files, seed=0,
                         repeats=voted[0] if voted else None)
        served.append((mode, rater, pair_id))

    def serve_again(self, rater, pair_id, mode):
        """Serve a pair that another rater has voted on, which tells how well they agree."""
        first = self.store.unrepeated(rater, mode)
        if not first:
            raise Refused(HTTPStatus.NOT_FOUND, "No pair of somebody else waits for a second opinion.")
        texts = {first["left_model"]: first["left_text"], first["right_model"]: first["right_text"]}
        settings = json.loads(first["settings"])
        players = {first[f"{side}_model"]: settings.get(side) for side in SIDES}
        self.add_written(rater, pair_id, mode, first["context"], texts, players, first["seed"],
                         repeats=first["pair_id"])

    def add_written(self, rater, pair_id, mode, context, texts, players, seed, repeats):
        """Store a pair of replies that are there, {name: text}, with what is known of their writers, {name:
        settings}; who stands left is drawn anew."""
        left, right = random.sample(list(texts), 2)
        settings = {"judge": self.settings["judge"], "left": players[left], "right": players[right]}
        self.add_pair(rater, pair_id, mode, context, left, right, settings, seed, repeats=repeats,
                      left_text=texts[left], right_text=texts[right], shown_at=now(),
                      judge=self.opinion(context, [texts[left], texts[right]]))

    def serve_live(self, rater, pair_id, mode, values):
        if len(self.writer.under_way) >= MOST_WAITING:
            raise Refused(HTTPStatus.SERVICE_UNAVAILABLE, "Too many are waiting. Try again in a minute.")
        if self.writer.n_under_way(rater) >= MOST_OF_ONE:
            raise Refused(HTTPStatus.TOO_MANY_REQUESTS, "Your other replies are still being written; wait a "
                          "moment.")
        previous = self.find(rater, values, "previous") if values.get("previous") else None
        context = self.context(values, previous)
        left, right = random.sample(list(self.subjects), 2)
        if None in (self.writer.read(left, context), self.writer.read(right, context)):
            raise Refused(HTTPStatus.BAD_REQUEST, "This is too long for the models. Say it shorter.")
        pair = self.add_pair(rater, pair_id, previous["mode"] if previous else mode, context, left, right,
                             self.settings_of(left, right), seed=random.getrandbits(48),
                             previous=previous and previous["pair_id"])
        self.writer.begin(pair)

    def context(self, values, previous):
        """The dialogue up to where the replies to this request begin."""
        if previous and not previous["choice"]:
            raise Refused(HTTPStatus.CONFLICT, "The dialogue goes on after a vote.")
        if values.get("suggest") and self.contexts and not previous:
            return random.choice(self.contexts)
        message = valid_unicode(text_of(values, "text")).strip()
        opening = as_dialogue(message)
        if not message:
            raise Refused(HTTPStatus.BAD_REQUEST, "The message is empty.")
        if SEPARATOR in opening or len(TURN.findall(opening)) != 2:
            raise Refused(HTTPStatus.BAD_REQUEST, "A paragraph begins with Human:, Assistant: or -----, "
                          "which the models would misunderstand. Write it differently.")
        before = previous["context"] + previous[f"{previous['continued']}_text"] if previous else ""
        if special := find_special(before + opening):
            raise Refused(HTTPStatus.BAD_REQUEST, f"The dialogue holds {special}, which means its end to the "
                          "models. Write the message differently, or begin a new dialogue.")
        return before + opening

    def add_pair(self, rater, pair_id, mode, context, left, right, settings, seed, **columns):
        self.store.add_pair(
            pair_id=pair_id, rater=rater, mode=mode, context=context, left_model=left, right_model=right,
            settings=json.dumps(settings), seed=seed, **columns)
        return self.store.pair(pair_id)

    def store_replies(self, pair, texts, is_stopped):
        settings = json.loads(pair["settings"]) | ({"stopped": True} if is_stopped else {})
        opinion = self.opinion(pair["context"], texts)
        self.store.finish_pair(pair["pair_id"], *texts, opinion, json.dumps(settings))

    def opinion(self, context, texts):
        """The judge's probability that the left one of two replies is better; None without a judge."""
        return float(elo.judge(*self.rewards([context, context], texts))) if self.rewards else None

    def stream(self, rater, values):
        """A pair's replies as they come, after what the page has of them: (id, event)."""
        pair = self.find(rater, values)
        today = self.settings_of(pair["left_model"], pair["right_model"])
        if not pair["shown_at"] and json.loads(pair["settings"]) != today:
            raise Refused(HTTPStatus.GONE, "The arena no longer has these models, or has other settings. "
                          "Begin a new dialogue.")
        known = re.fullmatch("([0-9]{1,9})-([0-9]{1,9})", values.get("last_event", "0-0"))
        return self.events(pair, [int(n) for n in known.groups()] if known else [0, 0])

    def events(self, pair, n_known):
        failure = ""
        if not pair["shown_at"]:
            writing = self.writer.begin(pair)
            for (n_left, n_right), event in self.writer.follow(writing, n_known):
                yield f"{n_left}-{n_right}", event
            failure = writing.failure
        yield "0-0", {"error": failure} if failure else view(self.store.pair(pair["pair_id"]))

    def stop(self, rater, values):
        if not self.writer.stop(self.find(rater, values)["pair_id"]):
            raise Refused(HTTPStatus.CONFLICT, "Both replies have to have begun.")
        return {}

    # --- votes

    def vote(self, rater, values):
        """Store a vote. Sent again, it counts once; another one for the same pair is refused."""
        pair, vote_id = self.find(rater, values), text_of(values, "vote_id", ID)
        choice, strength, milliseconds = (values.get(key) for key in ("choice", "strength", "milliseconds"))
        if not pair["shown_at"]:
            raise Refused(HTTPStatus.CONFLICT, "The replies are still being written.")
        if choice not in (*SIDES, "tie", "both bad"):
            raise Refused(HTTPStatus.BAD_REQUEST, "The choice is left, right, tie or both bad.")
        if choice in SIDES and (type(strength) is not int or not 1 <= strength <= 3):
            raise Refused(HTTPStatus.BAD_REQUEST, "The strength is 1, 2 or 3.")
        if type(milliseconds) is not int or not 0 <= milliseconds < 2**53:
            raise Refused(HTTPStatus.BAD_REQUEST, "The time is a number of milliseconds.")
        pair = self.store.add_vote(
            vote_id=vote_id, pair_id=pair["pair_id"], choice=choice, milliseconds=milliseconds,
            strength=strength if choice in SIDES else 0,
            continued=choice if choice in SIDES else random.choice(SIDES))
        if pair["vote_id"] != vote_id:
            raise Refused(HTTPStatus.CONFLICT, "This pair has a vote already, and that one stands.")
        return view(pair)

    def figures(self, rater, values):
        """What /results shows of a mode. It is computed when there are new votes."""
        mode = values.get("mode")
        if mode not in MODES:
            raise Refused(HTTPStatus.BAD_REQUEST, "The mode is helpful or red_team.")
        state = self.store.state()
        with self.figures_lock:
            if self.latest_figures.get(mode, (None,))[0] != state:
                self.latest_figures[mode] = state, results(self.store.votes(), mode)
            return self.latest_figures[mode][1]


def view(pair):
    """What the page shows of a pair. The names and the judge's opinion come with the vote only."""
    shown = {"pair_id": pair["pair_id"], "mode": pair["mode"], "turns": turns(pair["context"]),
             "finished": bool(pair["shown_at"])}
    if pair["shown_at"]:
        shown["texts"] = [pair["left_text"], pair["right_text"]]
    if pair["choice"]:
        shown["vote"] = {key: pair[key] for key in (
            "choice", "strength", "continued", "left_model", "right_model", "judge")}
    return shown


def text_of(values, key, pattern=None):
    """A text in a request, which must match the pattern if there is one."""
    text = values.get(key)
    if not isinstance(text, str) or pattern and not pattern.fullmatch(text):
        raise Refused(HTTPStatus.BAD_REQUEST, f"The request lacks a proper {key}.")
    return text


def model_key(place):
    """A model's place and a hash of its weights."""
    return f"{place} {content_key(checkpoint.content_files(checkpoint.find(place)))}"


def version(player):
    """The hashes of a player's weights and of its prompt, wherever the model lies."""
    return player["model"].rpartition(" ")[2], player["prompt"]
