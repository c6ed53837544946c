"""Turn published files into comparisons, one JSON object a line.

  python -m data.prepare hellaswag --raw hellaswag_val.jsonl --out hellaswag.jsonl
  python -m data.prepare ethics --set justice --raw justice_train.csv --out justice.jsonl
  python -m data.prepare stackexchange --raw beer/Posts.xml.xz cooking/Posts.xml --out posts.jsonl.zst
  python -m data.prepare human-vs-model --raw posts.jsonl.zst --model out/imitation --out samples.jsonl
  python -m data.prepare code-correctness --raw mbpp.jsonl --out code.jsonl
  python -m data.prepare stackexchange --raw beer.stackexchange.com.7z --download --out beer.jsonl

The name of the data set comes first; NAME --help explains its flags. A published test split stays a test
split: files named test are not read together with others, and each split has an --out of its own.
"""
import argparse
import contextlib
import fcntl
import gzip
import http.client
import importlib
import inspect
import json
import lzma
import os
import re
import sys
import time
import urllib.error
import urllib.request
from fnmatch import fnmatch
from pathlib import Path

import zstandard
from tqdm import tqdm

from data.errors import InputError, Parser, run_main
from data.files import check_writable, naming, output_file, refuse_overwriting, valid_unicode
from data.sources.count import Count
from data.text import find_special

SOURCES = {  # name: (module, its function that yields the records, its function that adds flags)
    "hh": ("data.sources.published", "hh", None),
    "summarize": ("data.sources.published", "summarize", "add_split_flag"),
    "hellaswag": ("data.sources.published", "hellaswag", None),
    "ethics": ("data.sources.ethics", "records", "add_flags"),
    "utilitarianism": ("data.sources.ethics", "utilitarianism", None),  # as ethics --set utilitarianism
    "pairs": ("data.sources.published", "pairs", None),
    "stackexchange": ("data.sources.stackexchange", "records", "add_flags"),
    "reddit": ("data.sources.reddit", "records", "add_flags"),
    "wikipedia": ("data.sources.wikipedia", "records", "add_flags"),
    "human-vs-model": ("evals.human_vs_model", "records", "add_flags"),  # this one runs a model
    "toy-answers": ("evals.toy_answers", "records", "add_flags"),  # so does this one
    "code-correctness": ("evals.correctness", "records", "add_flags"),  # this one runs programs
}
TEST_SPLIT = re.compile("(^|[^a-z])test([^a-z]|$)")


def main():
    args, module, records = parse_args()
    check_writable(args.out)
    for path in args.raw:
        if args.download and not path.exists():
            fetch(address(args.name, module, path), path)
    check_files(args)
    names = ", ".join(map(str, args.raw[:3]))
    more = f" and {len(args.raw) - 3} more files" if len(args.raw) > 3 else ""
    print(f"reading {names}{more}", flush=True)

    progress = Progress(sum(path.stat().st_size for path in args.raw))
    count = Count(args.max_bad, progress)
    with contextlib.closing(progress.bar), open_output(args.out) as file:
        for record in records(args.raw, args, count):
            texts = [record["text"]] if "text" in record else [record["context"], *record["completions"]]
            if any(map(find_special, texts)):
                count.drop("records that hold <eot> or <eoc>, our special tokens")
                continue
            line = json.dumps(record, ensure_ascii=False) + "\n"
            file.write(valid_unicode(line).encode())
            count.kept += 1
        count.check()
        if not count.kept:
            reasons = "; ".join(count.summary()) or "is the file empty?"
            raise InputError(f"{args.raw[0]}: nothing came out of {count.total:,} records ({reasons})")
    kind = "texts" if getattr(args, "dialogue", False) else "comparisons"
    print("\n".join([f"{args.out}: {count.kept:,} {kind} of {count.total:,} records read", *count.summary()]))


def parse_args():
    """(flags, module, function that yields the records) of the source that is named first. Of the sources'
    modules only this one is imported."""
    parser = Parser(prog="python -m data.prepare", description=__doc__,
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("name", choices=SOURCES, help="which published data set")
    add("--raw", required=True, nargs="+", type=Path, metavar="FILE",
        help="the published files, plain or compressed")
    add("--out", required=True, type=Path, help="file to write: .jsonl, or .jsonl.gz, .xz or .zst")
    add("--download", action="store_true",
        help="download the files of --raw that are not there; a download that was cut goes on")
    add("--max_bad", type=float, default=0.001,
        help="largest share of broken records that are left out; more are an error (default: %(default)s)")
    name = sys.argv[1] if len(sys.argv) > 1 else ""
    if name in ("-h", "--help"):
        parser.parse_args()
    if name not in SOURCES:
        parser.error(f"the name of the data set comes first, found {name!r}; choose from "
                     f"{', '.join(SOURCES)}")
    module_name, records, add_flags = SOURCES[name]
    module = importlib.import_module(module_name)
    parser.prog += f" {name}"
    parser.description = inspect.getdoc(getattr(module, records))
    if add_flags:
        getattr(module, add_flags)(parser)
    args = parser.parse_args()
    args.named = args.raw  # a name may stand for a file, such as a toy world's
    if hasattr(module, "find_raw"):
        args.raw = module.find_raw(args.raw)
    if not 0 <= args.max_bad <= 1:
        parser.error(f"--max_bad {args.max_bad}: give a share from 0 to 1")
    return args, module, getattr(module, records)


def check_files(args):
    """Raise InputError for files that are missing or must not be read together."""
    for path in args.raw:
        if path.is_dir():
            raise InputError(f"{path}: this is a folder; name the published files in it")
        if not path.is_file():
            raise InputError(f"{path}: no such file; name the published file, or give --download to fetch it "
                             "to this place")
    refuse_overwriting(args.out, args.raw)
    tests = [path for path in args.raw if TEST_SPLIT.search(path.name.lower())]
    if tests and len(tests) < len(args.raw):
        raise InputError(f"{tests[0]}: a test split must not be mixed with other files; give each split its "
                         "own --out")


class Progress:
    """The bytes read of the raw files: a bar on a terminal, elsewhere a line every ten seconds."""

    def __init__(self, total):
        self.total, self.done, self.last_line = total, 0, time.monotonic()
        self.bar = tqdm(total=total, unit="B", unit_scale=True, desc="reading", disable=None)

    def update(self, n):
        self.done += n
        self.bar.update(n)
        if self.bar.disable and time.monotonic() - self.last_line > 10:
            print(f"{self.done / max(1, self.total):.0%} of {self.total / 1e6:,.0f} MB", flush=True)
            self.last_line = time.monotonic()


@contextlib.contextmanager
def open_output(path):
    """A binary file to write to, compressed as its suffix says. It appears at `path` when it is complete,
    or not at all."""
    place = output_file(path)
    partial = Path(f"{place}.partial")  # a killed run leaves it, and the next run writes over it
    with naming(partial), open(partial, "ab") as disk:
        try:
            fcntl.flock(disk, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not os.path.samestat(os.stat(disk.fileno()), os.stat(partial)):
                raise BlockingIOError  # it has been renamed since it was opened
        except (BlockingIOError, FileNotFoundError):
            raise InputError(f"{path}: another process is writing this file; wait for it, or give another "
                             "--out") from None
        try:
            disk.truncate(0)
            with compressor(path, disk) as file:
                yield file
            disk.flush()
            os.fsync(disk.fileno())
        except BaseException:
            partial.unlink(missing_ok=True)
            raise
        os.replace(partial, place)


def compressor(path, disk):
    """A file that compresses into `disk`, or `disk` itself. Equal content always becomes equal bytes."""
    if path.suffix == ".gz":  # without the name and the time, which gzip would store
        return gzip.GzipFile(filename="", fileobj=disk, mode="wb", compresslevel=6, mtime=0)
    if path.suffix == ".xz":
        return lzma.open(disk, "wb", preset=2)
    if path.suffix == ".zst":
        return zstandard.ZstdCompressor(level=6, write_checksum=True).stream_writer(disk, closefd=False)
    if path.suffix == ".bz2":
        raise InputError(f"{path}: --out ends in .gz, .xz or .zst, or is not compressed")
    return contextlib.nullcontext(disk)


# ---------------------------------------------------------------------------------------------------------
# Downloading


def address(name, module, path):
    """The URL of the published file that `path` names."""
    urls = getattr(module, "URLS", {}).get(name, {})
    for pattern, url in urls.items():
        if fnmatch(str(path.absolute()), f"*/{pattern}"):
            return url.format(name=path.name)
    known = ", ".join(urls) or "none"
    raise InputError(f"{path}: --download knows no such file of {name} (it knows {known}); fetch it by hand, "
                     "then name it as --raw")


def fetch(url, path):
    """Download `url` to `path`, which appears when it is complete. A cut download leaves path.part, and the
    next one goes on from there."""
    part = Path(f"{path}.part")
    part.parent.mkdir(parents=True, exist_ok=True)
    start = part.stat().st_size if part.exists() else 0
    print(f"fetching {url}" + (f" from byte {start:,}" if start else ""), flush=True)
    headers = {"User-Agent": "hhh-lab"}
    if start:
        headers["Range"] = f"bytes={start}-"
    try:
        with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=60) as answer:
            total = save(answer, part, start)
    except (urllib.error.URLError, http.client.HTTPException, ConnectionError, TimeoutError) as error:
        if getattr(error, "code", None) != 416:
            reason = error or type(error).__name__
            raise InputError(f"{url}: cannot be fetched ({reason}); the same command goes on where it was "
                             f"cut; or fetch it by hand, then name it as --raw {path}") from None
        total = int(error.headers.get("Content-Range", "").rpartition("/")[2] or start)  # 416: all is here
    size = part.stat().st_size
    if total is not None and size < total:
        raise InputError(f"{url}: cut after {size:,} of {total:,} bytes; the same command goes on from there")
    if total is not None and size > total:
        part.unlink()
        raise InputError(f"{url}: not the file expected: {size:,} bytes instead of {total:,}; it is removed, "
                         "give the command again")
    os.replace(part, path)


def save(answer, part, start):
    """Write a server's answer to the file `part`, after its first `start` bytes if the server goes on from
    there. Returns the size of the complete file, or None if the server does not say."""
    goes_on = answer.status == 206 and answer.headers.get("Content-Range", "").startswith(f"bytes {start}-")
    start = start if goes_on else 0
    length = answer.headers.get("Content-Length")
    total = start + int(length) if length else None
    with open(part, "ab" if goes_on else "wb") as file, tqdm(
            total=total, initial=start, unit="B", unit_scale=True, desc="fetching", disable=None) as bar:
        while piece := answer.read(2**20):
            file.write(piece)
            bar.update(len(piece))
    return total


if __name__ == "__main__":
    run_main(main)
