"""People compare two language models in the browser. Their votes become comparisons, Elos, and a better
preference model.

  python arena.py --models out/lm out/distilled                       then open http://127.0.0.1:8000
  python arena.py --models out/lm out/lm --prompts "" toy             one model, without and behind a prompt
  python arena.py --samples plain.jsonl prompted.jsonl                rate what was sampled elsewhere
  python arena.py --db out/arena.db --export votes.jsonl --games games.csv
  python arena.py --db out/arena.db --exclude 1f0c9a2b7d3e "never reads the replies"

As in the paper's Section 2, a person writes a message, two models reply, the person says which reply is
better, and the dialogue goes on with it. In the mode "red_team" the person chooses the more harmful reply.
Which model stands where is drawn anew for each pair, and their names are shown after the vote. /results has
the ratings. What is exported is read by `train_pm.py --data` and `evaluate.py elo --games`.
"""
import argparse
import itertools
import random
from dataclasses import replace
from http import HTTPStatus
from pathlib import Path

import checkpoint
import plan
from data.errors import InputError, Parser, run_main
from data.files import file_digest
from evals.choices import read_items
from evals.subject import load_subject, read_prompt
from evals.votes import export
from web.rules import MODES, Arena
from web.server import Refused, Server
from web.store import Store

REPEATS = 0.1  # of the pairs of --samples: how often one is drawn that somebody else has rated


def parse_args():
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--db", default="out/arena.db", help="the database of pairs and votes (default: %(default)s)")
    add("--models", nargs="+", default=["out/lm", "out/distilled"], metavar="DIR",
        help="checkpoint folders, Hugging Face folders or .gguf files that are compared, two or more; one "
        "may be named again with another prompt (default: out/lm out/distilled)")
    add("--prompts", nargs="+", metavar="NAME",
        help='the prompt of each model: hhh, code, toy, a text file, or "" for none (default: none)')
    add("--prompt_tokens", type=plan.positive(int), metavar="N",
        help="keep a prompt's preamble and as many of its last conversations as fit in N tokens")
    add("--chat", action="store_true", help="write dialogues by the models' chat templates")
    add("--temperature", type=plan.between(float, 0, 100), default=1.0,
        help="0 takes the likeliest token (default: %(default)s)")
    add("--top_p", type=plan.between(float, 0, 1), default=0.95,
        help="sample from the likeliest tokens that together have this probability (default: %(default)s)")
    add("--max_new", type=plan.positive(int), default=256,
        help="tokens of a reply at most (default: %(default)s)")
    add("--contexts", metavar="FILE", help="comparisons whose contexts the page offers as a beginning")
    add("--samples", nargs="+", metavar="FILE",
        help="compare what `evaluate.py sample` wrote, a file of each model, and load no model")
    add("--judge", metavar="DIR", help="a preference model, whose opinion is stored with each pair")
    add("--host", default="127.0.0.1", help="address to serve at (default: %(default)s, this machine alone)")
    add("--port", type=plan.between(int, 0, 65535), default=8000, help="(default: %(default)s)")
    add("--password", help="what raters have to give, with the name rater; needed where --host is open to "
        "others")
    add("--export", metavar="FILE.jsonl", help="write the votes as comparisons, and serve nothing")
    add("--games", metavar="FILE.csv", help="write the votes as a table of games, and serve nothing")
    add("--mode", choices=MODES, default="helpful", help="the votes to export (default: %(default)s)")
    add("--exclude", nargs=2, metavar=("ID", "REASON"),
        help="do not count the votes of a rater, or one vote or pair; nothing is deleted")
    plan.add_device_flags(parser)
    return parser.parse_args()


def main():
    args = parse_args()
    if args.exclude:
        n_votes = Store(args.db, create=False).exclude(*args.exclude)
        if not n_votes:
            raise InputError(f"--exclude {args.exclude[0]}: no rater, pair or vote of this name has votes")
        print(f"{n_votes} votes are excluded from now on")
    elif args.export or args.games:
        store = Store(args.db, create=False)
        export(store.votes(), args.mode, args.export, args.games)
        print(f"left out: {store.count_open(args.mode)} pairs without a vote")
    else:
        store = Store(args.db)
        store.serve_alone()
        serve(Server(args.host, args.port, args.password), store, args)


def serve(server, store, args):
    """Answer requests until Ctrl-C. The server has its port already, so that a wrong one is told at once."""
    subjects, samples = ({}, Samples(args.samples, store)) if args.samples else (load_players(args), None)
    arena = Arena(store, subjects, samples, args)
    server.application = arena
    host, port = server.server_address[:2]
    print(f"{', '.join(subjects or samples.names)}: open http://{host}:{port} and for the ratings "
          f"http://{host}:{port}/results; Ctrl-C ends", flush=True)
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        print()
    finally:
        server.server_close()
        arena.writer.close()
        store.close()


# ------------------------------------------------------------------------------------------------------------
# Who is compared


def load_players(args):
    """The models behind their prompts: {name: Subject}. A model that is named twice is loaded once."""
    prompts = args.prompts or [""] * len(args.models)
    if len(prompts) != len(args.models):
        raise InputError(f'--prompts needs one for each of the {len(args.models)} models, "" for none; found '
                         f"{len(prompts)}")
    if len(prompts) < 2 or len(set(zip(args.models, prompts))) < len(prompts):
        raise InputError("--models needs at least two; one may be named again with another prompt")
    loaded, players = {}, {}
    for folder, prompt in zip(args.models, prompts):
        if folder not in loaded:
            flags = argparse.Namespace(**{**vars(args), "model": folder, "prompt": None})
            loaded[folder] = load_subject(flags, checkpoint.load_lm)
        subject = loaded[folder]
        text, prefix = read_prompt(
            subject.model, subject.tokenizer, subject.ctx, prompt or None, args.prompt_tokens)
        short = Path(folder).name
        name = short if [Path(other).name for other in set(args.models)].count(short) == 1 else folder
        players[f"{name} behind {prompt}" if prompt else name] = replace(subject, prompt=text, prefix=prefix)
    return players


class Samples:
    """Pairs of replies that were sampled elsewhere, and to whom each was served."""

    def __init__(self, paths, store):
        self.names = [Path(path).name.split(".jsonl")[0] for path in paths]
        if len(paths) < 2 or len(set(self.names)) < len(paths):
            raise InputError(f"--samples needs at least two files, each with a name of its own, found "
                             f"{', '.join(self.names)}")
        self.digests = {name: file_digest(path).hex() for name, path in zip(self.names, paths)}
        replies = {}  # {(context, number of the reply): {name: text}}
        for name, path in zip(self.names, paths):
            for record in read_items("choice", [path])[0]:
                for n, text in enumerate(record["completions"]):
                    replies.setdefault((record["context"], n), {})[name] = text
        self.pairs, self.groups = [], []  # two texts each; of which replies to a context they are
        for (context, n), texts in replies.items():
            for a, b in itertools.combinations(texts, 2):
                self.pairs.append((context, {a: texts[a], b: texts[b]}))
                self.groups.append((context, n))
        if not self.pairs:
            raise InputError(f"{paths[0]}: shares no context with the other files; sample from the same "
                             "--data")
        self.served = [[] for _ in self.pairs]  # (mode, rater, pair_id)
        numbers = {self.key(*pair): number for number, pair in enumerate(self.pairs)}
        for row in store.read("SELECT * FROM pairs"):  # of earlier days
            texts = {row["left_model"]: row["left_text"], row["right_model"]: row["right_text"]}
            number = numbers.get(self.key(row["context"], texts))
            if number is not None:
                self.served[number].append((row["mode"], row["rater"], row["pair_id"]))

    def key(self, context, texts):
        return context, *sorted(texts.items())

    def draw(self, rater, mode):
        """The number of a pair that this rater has not seen: mostly one that was served least, sometimes one
        that one other person has seen, which tells how well they agree. Of the pairs that three files or more
        make of the same replies a rater sees one, as a vote reveals who wrote them. Raises Refused if there
        is none."""
        times = [sum(served_mode == mode for served_mode, *_ in served) for served in self.served]
        seen = {group for group, served in zip(self.groups, self.served)
                if any(shown[:2] == (mode, rater) for shown in served)}
        new = [number for number, group in enumerate(self.groups) if group not in seen]
        if not new:
            raise Refused(HTTPStatus.NOT_FOUND, "You have rated all there is. Thank you!")
        wanted = 1 if random.random() < REPEATS else min(times[number] for number in new)
        return random.choice([number for number in new if times[number] == wanted] or new)


if __name__ == "__main__":
    run_main(main)
