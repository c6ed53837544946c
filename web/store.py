"""The arena's database. It stores each pair of replies when it is asked for and each vote before it is
answered, and deletes nothing: what is not to count is excluded, with a reason and a date.

SQLite in its WAL mode: a vote that was answered is on the disk, whatever happens to the process, and others
may read while the arena writes.
"""
import fcntl
import os
import sqlite3
import threading
from datetime import datetime, timezone
from pathlib import Path

from data.errors import InputError

APPLICATION = 0x48484C41  # "HHLA", which marks a database as an arena's
VERSION = 1  # of its tables

TABLES = """
CREATE TABLE pairs (
    pair_id     TEXT PRIMARY KEY,  -- random, made by the page, so that what is sent twice counts once
    rater       TEXT NOT NULL,     -- a hash of the rater's random cookie
    mode        TEXT NOT NULL CHECK (mode IN ('helpful', 'red_team')),
    previous    TEXT REFERENCES pairs,  -- the pair before it in the same dialogue
    repeats     TEXT REFERENCES pairs,  -- the pair with the same replies that somebody else rated before
    context     TEXT NOT NULL,     -- the dialogue up to where the replies begin
    left_model  TEXT NOT NULL,
    right_model TEXT NOT NULL,
    settings    TEXT NOT NULL,     -- JSON: of sampling, of both models, of the judge; whether they were stopped
    seed        INTEGER NOT NULL,  -- decides both replies; 0 if they were sampled elsewhere
    asked_at    TEXT NOT NULL,     -- this time and the others are UTC
    left_text   TEXT,              -- both texts are NULL until both replies are written
    right_text  TEXT,
    judge       REAL,              -- the probability, by the preference model, that the left reply is better
    shown_at    TEXT
);
CREATE TABLE votes (
    vote_id      TEXT PRIMARY KEY,  -- random, made by the page
    pair_id      TEXT NOT NULL UNIQUE REFERENCES pairs,
    -- the better one, or in the mode "red_team" the more harmful one
    choice       TEXT NOT NULL CHECK (choice IN ('left', 'right', 'tie', 'both bad')),
    -- 1 slightly, 2 clearly, 3 much; 0 without a winner
    strength     INTEGER NOT NULL CHECK (strength BETWEEN 0 AND 3),
    -- the reply that the dialogue goes on with
    continued    TEXT NOT NULL CHECK (continued IN ('left', 'right')),
    given_at     TEXT NOT NULL,
    milliseconds INTEGER NOT NULL   -- from both replies until the vote, by the page's clock
);
CREATE TABLE exclusions (
    subject TEXT NOT NULL,          -- a vote_id, a pair_id or a rater
    reason  TEXT NOT NULL,
    since   TEXT NOT NULL
);
"""
VOTES = """
SELECT *, (SELECT reason FROM exclusions WHERE subject IN (vote_id, pair_id, rater) LIMIT 1) AS excluded
FROM votes JOIN pairs USING (pair_id) ORDER BY given_at, vote_id
"""


def now():
    return datetime.now(timezone.utc).isoformat(timespec="milliseconds")


class Store:
    """The database in a file. Its methods may be called from any thread; each change is one transaction,
    which is on the disk when the method returns. They raise sqlite3.Error if it could not be written."""

    def __init__(self, path, create=True):
        """Open the database, or create it. Raises InputError if the file is something else."""
        self.path, self.lock = Path(path), threading.Lock()
        if not create and not self.path.is_file():
            raise InputError(f"{path}: no such database")
        self.path.parent.mkdir(parents=True, exist_ok=True)
        try:
            self.connection = sqlite3.connect(path, timeout=10, isolation_level=None, check_same_thread=False)
            self.connection.row_factory = sqlite3.Row
            self._prepare()
        except sqlite3.Error as error:
            raise InputError(f"{path}: cannot be used as the arena's database ({error})") from None

    def _prepare(self):
        """Create the tables in an empty database, and check that those of another one are an arena's."""
        execute = self.connection.execute
        application, version = (execute(f"PRAGMA {name}").fetchone()[0]
                                for name in ("application_id", "user_version"))
        if application == version == 0 and not execute("SELECT 1 FROM sqlite_master").fetchone():
            execute("PRAGMA journal_mode = WAL")
            self.connection.executescript(
                f"BEGIN IMMEDIATE; {TABLES} PRAGMA application_id = {APPLICATION};"
                f"PRAGMA user_version = {VERSION}; COMMIT")
        elif application != APPLICATION:
            raise InputError(f"{self.path}: a database of another program; give another --db")
        elif version != VERSION:
            raise InputError(f"{self.path}: a database of version {version}, but this arena reads version "
                             f"{VERSION}; give another --db")
        execute("PRAGMA synchronous = FULL")  # a transaction waits until it is on the disk
        execute("PRAGMA foreign_keys = ON")

    def serve_alone(self):
        """Keep other servers away from this database, as long as this process lives."""
        self.held = os.open(self.path, os.O_RDONLY)  # never closed: that would release SQLite's own locks
        try:
            fcntl.flock(self.held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(f"{self.path}: another arena serves this database; stop it, or give another "
                             "--db") from None

    def close(self):
        """Close the database, so that all of it lies in one file again."""
        with self.lock:
            self.connection.close()

    def read(self, query, *values):
        """All rows of a query."""
        with self.lock:
            return self.connection.execute(query, values).fetchall()

    def _write(self, statement, *values):
        with self.lock:
            self.connection.execute(statement, values)

    def _insert(self, table, row):
        names = ", ".join(row)
        marks = ", ".join("?" * len(row))
        self._write(f"INSERT INTO {table} ({names}) VALUES ({marks})", *row.values())

    def pair(self, pair_id):
        """The pair of this id with its vote, whose columns are NULL if there is none; None if there is no
        such pair."""
        rows = self.read("SELECT * FROM pairs LEFT JOIN votes USING (pair_id) WHERE pair_id = ?", pair_id)
        return rows[0] if rows else None

    def unrepeated(self, rater, mode):
        """A pair that somebody else has voted on and no second rater, and that this one was not shown; None if
        there is none. Votes that are excluded do not count."""
        rows = self.read("SELECT * FROM pairs JOIN votes USING (pair_id) WHERE rater != ? AND mode = ? "
                         "AND repeats IS NULL AND pair_id NOT IN (SELECT repeats FROM pairs LEFT JOIN votes "
                         "USING (pair_id) WHERE repeats IS NOT NULL AND (vote_id IS NOT NULL OR rater = ?)) "
                         "AND NOT EXISTS (SELECT 1 FROM exclusions WHERE subject IN (vote_id, pair_id, rater)) "
                         "ORDER BY random() LIMIT 1", rater, mode, rater)
        return rows[0] if rows else None

    def add_pair(self, **columns):
        """Store a pair. Nothing changes if it is stored already."""
        try:
            self._insert("pairs", {**columns, "asked_at": now()})
        except sqlite3.IntegrityError:
            if not self.pair(columns["pair_id"]):
                raise

    def finish_pair(self, pair_id, left_text, right_text, judge, settings):
        """Store the replies, once."""
        self._write("UPDATE pairs SET left_text = ?, right_text = ?, judge = ?, settings = ?, shown_at = ? "
                    "WHERE pair_id = ? AND shown_at IS NULL",
                    left_text, right_text, judge, settings, now(), pair_id)

    def add_vote(self, **columns):
        """Store a vote. Returns the pair with its vote, which is the first one that was given for it."""
        try:
            self._insert("votes", {**columns, "given_at": now()})
        except sqlite3.IntegrityError:
            pass  # there is a vote for this pair, or this vote has been given for another one
        return self.pair(columns["pair_id"])

    def state(self):
        """Numbers that change with the votes that count."""
        return tuple(self.read("SELECT (SELECT COUNT(*) FROM votes), (SELECT COUNT(*) FROM exclusions)")[0])

    def count_open(self, mode):
        """The number of a mode's pairs that have no vote."""
        return self.read("SELECT COUNT(*) FROM pairs LEFT JOIN votes USING (pair_id) "
                         "WHERE vote_id IS NULL AND mode = ?", mode)[0][0]

    def exclude(self, subject, reason):
        """Exclude a vote, a pair or all of a rater. Returns the number of votes that this concerns."""
        concerned = self.read("SELECT 1 FROM votes JOIN pairs USING (pair_id) "
                              "WHERE ? IN (vote_id, pair_id, rater)", subject)
        if concerned:
            self._insert("exclusions", {"subject": subject, "reason": reason, "since": now()})
        return len(concerned)

    def votes(self):
        """All votes with their pairs, in the order in which they were given; `excluded` has the reason why
        one does not count, or NULL."""
        return self.read(VOTES)
