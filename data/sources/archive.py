"""Lines of .7z archives, which the dumps of Stack Exchange and Wikipedia are published as."""
import contextlib
import os
import threading
from pathlib import Path
from types import SimpleNamespace

from data import files
from data.errors import InputError


def read_lines(path, progress=None, member=None):
    """As data.files.read_lines; of a .7z archive the lines of all its files, or of the file `member`."""
    if Path(path).suffix != ".7z":
        return files.read_lines(path, progress)
    return files.split_lines(path, _unpack(path, progress, member))


def _unpack(path, progress, member):
    """Yield the content of an archive in pieces of bytes. Raises EOFError where the archive is damaged.

    A thread unpacks into a pipe, because on disk the content would take up to a hundred times as much room.
    """
    try:
        import py7zr
    except ImportError:
        raise InputError(f"{path}: reading .7z needs one more package: pip install py7zr") from None
    reading_end, writing_end = os.pipe()
    failures = []

    def work():
        # The pipe is broken where the reader gives up.
        with contextlib.suppress(BrokenPipeError), contextlib.ExitStack() as stack:
            stack.callback(os.close, writing_end)
            pipe = lambda name: stack.enter_context(open(os.dup(writing_end), "wb"))
            try:
                with py7zr.SevenZipFile(path) as archive:
                    if member and member not in archive.getnames():
                        raise InputError(f"{path}: no {member} in this archive")
                    archive.extract(targets=member and [member], factory=SimpleNamespace(create=pipe))
            except Exception as error:
                failures.append(error)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    with open(reading_end, "rb") as pipe:
        while piece := pipe.read(2**18):
            yield piece
    thread.join()
    for failure in failures:
        raise failure if isinstance(failure, InputError) else EOFError(failure)
    if progress is not None:
        progress.update(os.path.getsize(path))
