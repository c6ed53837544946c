"""Bad input is answered with one line and exit code 2. A traceback is for our own mistakes only."""
import argparse
import contextlib
import datetime
import math
import os
import re
import sys
from pathlib import Path


# What torch says when it waits for another process in vain.
LOST_RANK = "Connection closed|Connection reset|Connection refused|Broken pipe|[Tt]imed out|NCCL"


class InputError(Exception):
    """Something that the user can mend. The message names the file, the line if there is one, and the
    mend."""


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that answers wrong flags with the one line that matters, instead of all its
    usage."""

    def error(self, message):
        line = f"{self.prog}: error: {message}; {self.prog} -h explains the flags\n"
        self.exit(2, line if is_first_to_fail() else None)


def is_first_to_fail():
    """False if another process that torchrun started has said already why they end: of many ranks with one
    error only one speaks. It leaves word in the store through which they found each other."""
    if "RANK" not in os.environ:
        return True
    from torch.distributed import TCPStore
    try:
        store = TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False,
                         wait_for_workers=False, timeout=datetime.timedelta(seconds=5))
        return store.add(f"failed in attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT')}", 1) == 1
    except (KeyError, RuntimeError):  # whoever kept the store has ended, too
        return True


def positive(kind, most=None):
    """An argparse type: an int or a float above 0, and not too large to count with."""
    most = most or {int: 2**36, float: 1e300}[kind]

    def parse(text):
        value = kind(text)
        if not 0 < value <= most:
            raise ValueError
        return value
    parse.__name__ = f"positive {kind.__name__}"  # argparse says it in its message
    return parse


def between(kind, low, high):
    """An argparse type: an int or a float from low to high."""
    def parse(text):
        value = kind(text)
        if not low <= value <= high or value == math.inf:
            raise ValueError
        return value
    parse.__name__ = f"{kind.__name__} from {low} to {high}"
    return parse


def one_line(text):
    """A message as one line: control characters are written out, and the middle of a long one is left out."""
    line = "".join(char if char.isprintable() else repr(char)[1:-1] for char in text)
    return line if len(line) <= 600 else f"{line[:400]} … {line[-150:]}"


def is_out_of_memory(error):
    """True for a MemoryError, and for the RuntimeErrors of torch's allocators and of oneDNN, which says no more
    than that it could not create a primitive."""
    words = "allocate memory|out of memory|could not create a primitive"
    return isinstance(error, MemoryError) or bool(re.search(words, str(error)))


def script_name():
    script = Path(sys.argv[0])
    return script.parent.name if script.name == "__main__.py" else script.name


def run_main(main):
    """Call `main()`, as a script's last line does. What the user can mend ends in one line on stderr and
    exit code 2. That includes OSError: an unreadable file, an unwritable folder, a full disk. Ctrl-C ends in
    one line and exit code 130.
    """
    for stream in (sys.stdout, sys.stderr):  # a file's name may hold what is no text
        with contextlib.suppress(OSError):  # of a stream that was exchanged
            stream.reconfigure(errors="backslashreplace")
    try:
        main()
        return
    except BrokenPipeError:  # whoever read our output, such as head, has gone
        os._exit(141)
    except InputError as error:
        message = str(error)
    except KeyboardInterrupt:
        if is_first_to_fail():
            print(f"{script_name()}: interrupted", file=sys.stderr, flush=True)
        sys.exit(130)
    except OSError as error:
        from data.files import cache_dir
        where = f"{error.filename}: " if error.filename else ""
        message = f"{where}{error.strerror or error}"
        if where.startswith(str(cache_dir())) and isinstance(error, PermissionError):
            message += "; this is the cache: set HHH_LAB_CACHE to a folder that can be written"
    except (RuntimeError, MemoryError) as error:
        reason = str(error).partition("\n")[0]
        if is_out_of_memory(error):
            message = f"out of memory ({reason[:120]}); give a smaller --micro_tokens, --batch or --size"
        elif "RANK" in os.environ and re.search(LOST_RANK, str(error)):
            reason = re.sub(r"^.*?\[\S+:\d+\] ", "", reason).partition(". ")[0]  # not place and advice
            message = (f"another rank has ended, or does not answer ({reason}); see what it said, then go on "
                       "with --resume")
        else:
            raise
    if is_first_to_fail():
        print(f"{script_name()}: error: {one_line(message)}", file=sys.stderr, flush=True)
    if "RANK" in os.environ:
        os._exit(2)  # without an orderly shutdown, as other ranks may wait in a collective for ever
    sys.exit(2)
