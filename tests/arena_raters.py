"""What the arena's tests share: an arena whose models are a script, and raters who use it through HTTP."""
import contextlib
import http.client
import json
import os
import re
import shutil
import sqlite3
import time

import torch
from conftest import Running, write_jsonl

import web.replies


def copies(lm, folder):
    """Flags that name two models, which are copies of one."""
    for name in ("plain", "distilled"):
        shutil.copytree(lm, folder / name)
    return "--models", folder / "plain", folder / "distilled"


def samples_file(folder, name, n=6):
    """A file of n samples for --samples, or of n contexts."""
    return write_jsonl(folder / f"{name}.jsonl", [
        {"context": f"\n\nHuman: Question {i}\n\nAssistant:", "completions": [f" {name} {i}"], "scores": [0]}
        for i in range(n)])


def write_by_script():
    """In the arena's process: replies are the words in $REPLY, one every $PAUSE seconds, and then a number
    that the reply's seed decides."""
    def stream(model, prompts, samples, max_new, temperature, top_p, n_vocab, generators, prefix):
        number = torch.randint(1000, (1,), generator=generators[0]).item()
        for word in [*os.environ["REPLY"].split(), str(number)]:
            time.sleep(float(os.environ["PAUSE"]))
            yield samples[0][0], word + " "
    web.replies.stream = stream


@contextlib.contextmanager
def arena(db, *flags, before=write_by_script, reply="This is a reply", pause=0, **env):
    """A running arena. Its attribute `port` is where it listens."""
    running = Running("arena.py", "--db", db, "--port", 0, "--dtype", "fp32", *flags, before=before,
                      REPLY=reply, PAUSE=str(pause), **env)
    running.wait_for("/results")
    running.port = int(re.search(r":(\d+) ", running.output())[1])
    try:
        yield running
    finally:
        running.process.kill()
        running.process.join()


class Rater:
    """A client with a cookie of its own, and a connection that is kept."""
    n_ids = 0

    def __init__(self, port, **headers):
        self.connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
        self.headers = headers
        status, answer, page = self.send("GET", "/")
        assert status == 200, page
        self.headers["Cookie"] = answer.headers["Set-Cookie"].partition(";")[0]

    def send(self, method, path, body=None, **headers):
        """(status, response, content)."""
        self.connection.request(method, path, body, {**self.headers, **headers})
        response = self.connection.getresponse()
        return response.status, response, response.read()

    def get(self, path, **headers):
        status, _, content = self.send("GET", path, **headers)
        return status, json.loads(content)

    def post(self, path, **values):
        status, _, content = self.send("POST", path, json.dumps(values),
                                       **{"Content-Type": "application/json"})
        return status, json.loads(content)

    @classmethod
    def new_id(cls):
        cls.n_ids += 1
        return f"id-{cls.n_ids:08}"

    def events(self, pair_id, **headers):
        _, _, content = self.send("GET", f"/stream?pair_id={pair_id}", **headers)
        return [json.loads(line[6:]) for line in content.decode().splitlines() if line.startswith("data: ")]

    def pair(self, text="Hello", mode="helpful", **values):
        """A pair as the page sees it when both replies are written."""
        status, pair = self.post("/pair", pair_id=self.new_id(), mode=mode, text=text, **values)
        assert status == 200, pair
        if not pair["finished"]:
            pair = self.events(pair["pair_id"])[-1]
        if not pair.get("finished"):
            raise ConnectionError(f"the stream ended: {pair}")
        return pair

    def vote(self, pair, choice="left", strength=2, milliseconds=1500, vote_id=None):
        """(status, answer)."""
        return self.post("/vote", pair_id=pair["pair_id"], vote_id=vote_id or self.new_id(), choice=choice,
                         strength=strength, milliseconds=milliseconds)


def count_votes(db):
    with contextlib.closing(sqlite3.connect(db)) as connection:
        return connection.execute("SELECT COUNT(*) FROM votes").fetchone()[0]
