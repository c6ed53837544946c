"""Writing the replies of pairs: each model has a queue and a thread, and pages follow what is written."""
import re
import threading
import time
import traceback
from concurrent.futures import ThreadPoolExecutor

import torch

from data.prompts import STOPS
from evals.votes import SIDES
from sampling import TextSample, stream


class Writing:
    """A pair whose replies are being written. Whoever changes it, or waits for a change, holds `changed`."""

    def __init__(self, pair):
        self.pair, self.texts, self.changed = pair, ["", ""], threading.Condition()
        self.ended = [False, False]  # the sides whose reply is whole
        self.stopped = self.finished = False
        self.failure = ""  # what to tell the rater
        self.queued = []  # (queue, number in it) of its parts
        self.n_parts = 0  # those that are not done

    def update(self, **values):
        with self.changed:
            vars(self).update(values)
            self.changed.notify_all()

    def add(self, side, piece):
        with self.changed:
            self.texts[side] += piece
            self.changed.notify_all()

    def end(self, side):
        with self.changed:
            self.ended[side] = True
            self.changed.notify_all()

    def shown(self):
        """What a rater may see of both texts: of each as much as there is of the slower one, as the pace of a
        model would tell which one it is."""
        slower = min((len(text) for text, ended in zip(self.texts, self.ended) if not ended), default=None)
        return [text[:slower] for text in self.texts]

    def place(self):
        """How many pairs stand before this one in the longer one of its queues."""
        return max(0, *(number - queue.n_begun for queue, number in self.queued))


class Queue:
    """The queue of one model, which writes for one pair at a time."""

    def __init__(self):
        self.thread, self.n_begun, self.n_queued = ThreadPoolExecutor(1), 0, 0

    def put(self, work, *args):
        """Have work(*args) done when it is its turn. Returns its number in the queue."""
        self.n_queued += 1
        self.thread.submit(self._begin, work, *args)
        return self.n_queued

    def _begin(self, work, *args):
        self.n_begun += 1
        work(*args)


class Writer:
    """Writes pairs by the models `subjects`, {name: Subject}. When both replies are there it calls
    store(pair, texts, True if the rater stopped them), which may fail."""

    def __init__(self, subjects, store, max_new, temperature, top_p):
        self.subjects, self.store, self.temperature, self.top_p = subjects, store, temperature, top_p
        self.max_new = min([max_new, *(subject.ctx // 2 for subject in subjects.values())])
        self.queues = {id(subject.model): Queue() for subject in subjects.values()}
        self.under_way, self.lock = {}, threading.Lock()  # {pair_id: Writing}

    def read(self, name, context):
        """The token ids of a dialogue, without its oldest turns if it would leave this model no room for a
        reply; None if the last turn alone is too long."""
        subject, turns = self.subjects[name], re.split(r"(?=\n\nHuman:)", context)
        for n_forgotten in range(len(turns)):
            ids = subject.tokenizer.encode("".join(turns[n_forgotten:])).tolist() or [subject.tokenizer.eot]
            if len(ids) + self.max_new <= subject.ctx:
                return ids
        return None

    def begin(self, pair):
        """Have the replies of a pair written, unless that is under way. Returns its Writing."""
        with self.lock:
            if pair["pair_id"] in self.under_way:
                return self.under_way[pair["pair_id"]]
            writing = self.under_way[pair["pair_id"]] = Writing(pair)
            parts = {}  # {the queue of a model: the sides for which it writes}
            for side in (0, 1):
                subject = self.subjects[pair[f"{SIDES[side]}_model"]]
                parts.setdefault(self.queues[id(subject.model)], []).append(side)
            writing.n_parts = len(parts)
            writing.queued = [(queue, queue.put(self._write, writing, sides))
                              for queue, sides in parts.items()]
            return writing

    def _write(self, writing, sides):
        """Write the replies that one model gives to a pair; if it gives both, token by token in turn."""
        try:
            replies = {side: self._reply(writing.pair, side) for side in sides}
            while replies and not writing.stopped:
                for side in list(replies):
                    piece = next(replies[side], None)
                    if piece is None:
                        del replies[side]
                        writing.end(side)
                    else:
                        writing.add(side, piece)
        except Exception:
            traceback.print_exc()
            writing.update(failure="A model failed. Try again.")
        with self.lock:
            writing.n_parts -= 1
            if writing.n_parts:
                return
        try:
            if not writing.failure:
                self.store(writing.pair, [text.rstrip() for text in writing.texts], writing.stopped)
        except Exception as error:  # the disk is full, or the preference model that judges fails
            traceback.print_exc()
            writing.update(failure=f"The replies could not be stored ({error}). Try again.")
        with self.lock:
            del self.under_way[writing.pair["pair_id"]]
        writing.update(finished=True)

    def _reply(self, pair, side):
        """Yield the pieces of the reply on one side of a pair. They depend on the pair's seed alone."""
        name, context = pair[f"{SIDES[side]}_model"], pair["context"]
        subject = self.subjects[name]
        yield subject.tokenizer.space_before(context)
        pieces = stream(
            subject.model, [self.read(name, context)], [[TextSample(subject.tokenizer, STOPS)]], self.max_new,
            self.temperature, self.top_p, subject.tokenizer.n_vocab,
            [torch.Generator().manual_seed(2 * pair["seed"] + side)], subject.prefix)
        for _, piece in pieces:
            yield piece

    def follow(self, writing, n_known):
        """Yield what is written of a pair after the characters [left, right] that a page has: ([left, right],
        {"pieces", "place"})."""
        def pieces():
            return [text[n:] for text, n in zip(writing.shown(), n_known)]

        patience = 0  # seconds to wait for something new; the first event comes at once
        while not writing.finished:
            with writing.changed:
                writing.changed.wait_for(lambda: writing.finished or any(pieces()), patience)
                new = pieces()
            n_known = [n + len(piece) for n, piece in zip(n_known, new)]
            yield n_known, {"pieces": new, "place": writing.place()}
            patience = 1
            time.sleep(0.05)  # so that a fast model does not send each token by itself

    def stop(self, pair_id):
        """End the replies of a pair with what has been written. Returns False if one of them has nothing
        yet."""
        with self.lock:
            writing = self.under_way.get(pair_id)
        if writing and not all(text.strip() for text in writing.texts):
            return False
        if writing:
            writing.update(stopped=True)
        return True

    def n_under_way(self, rater):
        """The number of a rater's pairs whose replies are being written."""
        with self.lock:
            return sum(writing.pair["rater"] == rater for writing in self.under_way.values())

    def close(self):
        """End all that is being written, without storing it. It is written again, by the same seed, when its
        rater comes back."""
        for writing in list(self.under_way.values()):
            writing.update(stopped=True, failure="The arena was ended.")
        for queue in self.queues.values():
            queue.thread.shutdown(cancel_futures=True)
