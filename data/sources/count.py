"""What became of the records of a raw file: kept, left out on purpose, broken. Nothing disappears without a count."""
from collections import Counter

from data.errors import InputError

SHOWN = 5  # places of broken records that are named
ENOUGH = 1000  # records after which too large a share of broken ones ends the reading at once


class Count:
    """Tallies of one preparation. A source adds 1 to `total` for each record it reads and calls `drop` and `bad`."""

    def __init__(self, max_bad=0.001):
        """max_bad: the largest share of broken records that is put up with, 0 to 1."""
        self.max_bad = max_bad
        self.total = self.kept = self.n_bad = 0
        self.dropped = Counter()  # reason -> how many
        self.places = []  # the first broken records: "file:line: why"

    def drop(self, why, n=1):
        """n things were left out on purpose. `why` names them: "questions with one answer"."""
        self.dropped[why] += n

    def bad(self, where, why):
        """The record at `where` ("file:line") is broken. Raises InputError once their share is too large."""
        self.n_bad += 1
        if len(self.places) < SHOWN:
            self.places.append(f"{where}: {why}"[:200])
        if self.total >= ENOUGH:
            self.check()

    def check(self):
        """Raise InputError if too large a share of the records read so far is broken."""
        if self.n_bad > self.max_bad * max(1, self.total):
            first, *more = self.places[:3]
            raise InputError(f"{first} ({self._share()}{', also ' + '; '.join(more) if more else ''}); is this the published file? "
                             f"--max_bad {min(1, self.n_bad / max(1, self.total)):.2g} would leave them out")

    def _share(self):
        return f"{self.n_bad:,} of {self.total:,} records are broken, {self.n_bad / max(1, self.total):.2%}"

    def summary(self):
        """Lines that say what was left out and what was broken."""
        lines = [f"left out: {n:,} {why}" for why, n in self.dropped.most_common()]
        if self.n_bad:
            lines += [f"{self._share()}; they were left out, the first of them:", *(f"  {place}" for place in self.places)]
        return lines
