"""Bad input is answered with one line and exit code 2; a traceback is for our own mistakes only."""
import argparse
import os
import sys


class InputError(Exception):
    """Something the user can mend. The message names the file, the line where there is one, and the mend."""


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that answers wrong flags with the one line that matters, and not with all of its usage."""

    def error(self, message):
        self.exit(2, f"{self.prog}: error: {message}; {self.prog} -h explains the flags\n")


def run_main(main):
    """Call `main()` as a script's last line does; turn what the user can mend into one line on stderr and exit code 2.

    OSError is included: an unreadable file, an unwritable folder and a full disk are the user's to mend as well.
    """
    try:
        main()
    except BrokenPipeError:  # whoever read our output, such as head, has gone
        os._exit(141)
    except InputError as error:
        message = str(error)
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        message = f"{where}{error.strerror or error}"
    except (RuntimeError, MemoryError) as error:  # torch's allocators raise RuntimeError
        if not isinstance(error, MemoryError) and not any(w in str(error) for w in ("allocate memory", "out of memory")):
            raise
        message = f"out of memory ({str(error).splitlines()[0][:120]}); give a smaller --micro_tokens, --batch or --size"
    else:
        return
    print(f"{os.path.basename(sys.argv[0])}: error: {message}", file=sys.stderr, flush=True)
    # os._exit skips the orderly shutdown: other ranks may be waiting in a collective that will never complete.
    os._exit(2) if "RANK" in os.environ else sys.exit(2)
