"""Bringing together records that belong together but lie anywhere in files larger than memory."""
import contextlib
import os
import pickle
import tempfile
from pathlib import Path

from data.files import naming

BUCKET_BYTES = 2**25  # a bucket up to this size is read into memory, where it takes about four times as much
LEVELS = 3  # a larger bucket is distributed anew, so often at most: by then it holds a few threads only


def gather(items, number, n_buckets, out, after_bucket=None, level=0):
    """Yield lists of items that fit in memory. All items with the same number(item), a whole number, come in
    one list, in the order of `items`.

    The items are first distributed to `n_buckets` temporary files, in $TMPDIR or else beside the file `out`.
    These take about as much room as the unpacked input, and are gone when the process ends, even by a kill.
    `after_bucket` is called when the work on a bucket is done.
    """
    folder = Path(os.environ.get("TMPDIR") or Path(out).parent)
    folder.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        buckets = [stack.enter_context(tempfile.TemporaryFile(dir=folder)) for _ in range(n_buckets)]
        for item in items:
            with naming(folder):
                pickle.dump(item, buckets[number(item) // n_buckets**level % n_buckets])
        for bucket in buckets:
            with naming(folder):
                size = bucket.tell()
                bucket.seek(0)
            if size > BUCKET_BYTES and level + 1 < LEVELS:
                yield from gather(_load(bucket), number, n_buckets, out, level=level + 1)
            else:
                yield list(_load(bucket))
            bucket.close()  # which frees its room on disk
            if after_bucket:
                after_bucket()


def _load(bucket):
    with contextlib.suppress(EOFError):
        while True:
            yield pickle.load(bucket)
