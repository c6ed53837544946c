"""Reading records and counting what becomes of them: kept, left out on purpose, or broken."""
from collections import Counter

from data.errors import InputError
from data.files import parse_json, read_lines

PLACES = 5  # of so many broken records the place is remembered
ENOUGH = 1000  # after so many records, too large a share of broken ones ends the reading at once


class LeftOut(Exception):
    """Raised where something is left out on purpose; its text is the reason."""


class Count:
    """The counts of one preparation. A source adds 1 to `total` for each record that it reads, and calls
    `drop` for what it leaves out and `bad` for what is broken."""

    def __init__(self, max_bad=0.001, progress=None):
        """max_bad: the largest share of broken records that is accepted, 0 to 1.
        progress: a bar that readers of the raw files move on by the bytes they read, or None."""
        self.max_bad = max_bad
        self.progress = progress
        self.total = self.kept = self.n_bad = 0
        self.dropped = Counter()  # reason: how many
        self.places = []  # the first broken records, each as "file:line: what is wrong"

    def drop(self, reason, n=1):
        """Count n things that are left out on purpose. `reason` names them: "questions with one answer"."""
        self.dropped[reason] += n

    def bad(self, where, problem):
        """Count the record at `where` ("file:line") as broken. Raises InputError once too many are."""
        self.n_bad += 1
        if len(self.places) < PLACES:
            self.places.append(f"{where}: {problem}"[:200])
        if self.total >= ENOUGH:
            self.check()

    def check(self):
        """Raise InputError if too large a share of the records read so far is broken."""
        if self.n_bad <= self.max_bad * max(1, self.total):
            return
        first, *others = self.places[:3]
        also = f", also {'; '.join(others)}" if others else ""
        raise InputError(f"{first} ({self._broken()}{also}); is this the published file? "
                         f"--max_bad {min(1, self.n_bad / max(1, self.total)):.2g} would leave them out")

    def _broken(self):
        total = max(1, self.total, self.n_bad)  # a file that cannot be read at all is no record, and broken
        return f"{self.n_bad:,} of {total:,} records are broken, {self.n_bad / total:.2%}"

    def summary(self):
        """Lines that say what was left out and what was broken."""
        lines = [f"left out: {n:,} {reason}" for reason, n in self.dropped.most_common()]
        if self.n_bad:
            lines.append(f"{self._broken()}; they were left out, the first of them:")
            lines += [f"  {place}" for place in self.places]
        return lines


def json_records(paths, count):
    """Yield ("file:line", dict) for the lines of JSON-lines files. Broken lines are counted."""
    for path in paths:
        for number, line in read_lines(path, count.progress):
            if not line.strip():
                continue
            count.total += 1
            where = f"{path}:{number}"
            try:
                record = parse_json(path, number, line)
            except InputError as error:
                count.bad(where, str(error).removeprefix(f"{where}: "))
            else:
                yield where, record


def converted_records(paths, count, convert):
    """Yield convert(record) for the lines of JSON-lines files. Lines for which it raises an error are counted
    as broken, and lines for which it raises LeftOut as left out."""
    for where, record in json_records(paths, count):
        try:
            result = convert(record)
        except LeftOut as reason:
            count.drop(str(reason))
        except KeyError as error:
            count.bad(where, f"no {error}")
        except IndexError:
            count.bad(where, "a list that is too short")
        except ValueError as error:
            count.bad(where, str(error))
        except (TypeError, AttributeError) as error:
            count.bad(where, f"a value of the wrong type ({error})")
        else:
            yield result
