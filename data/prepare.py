"""Turn published files into comparison JSON lines. The name comes first; NAME --help shows the flags of that source.

  python -m data.prepare hellaswag --raw hellaswag_val.jsonl --out hellaswag.jsonl
  python -m data.prepare ethics --set justice --raw justice_train.csv --out justice.jsonl
  python -m data.prepare stackexchange --raw beer/Posts.xml.xz cooking/Posts.xml --out stackexchange.jsonl.zst
  python -m data.prepare human-vs-model --raw stackexchange.jsonl --model out/imitation --out human-vs-model.jsonl
  python -m data.prepare code-correctness --raw mbpp.jsonl --out code.jsonl
  python -m data.prepare stackexchange --raw beer.stackexchange.com.7z --download --out beer.jsonl

A published test split stays a test split: files named test are not mixed with others, each split has its own --out.
"""
import argparse
import contextlib
import gzip
import hashlib
import http.client
import importlib
import json
import lzma
import os
import re
import shutil
import sys
import time
import urllib.error
import urllib.request
from fnmatch import fnmatch
from pathlib import Path

from tqdm import tqdm

from data.sources.count import Count
from data.errors import InputError, run_main
from data.text import find_special, valid_unicode

# name -> module, its function records(paths, args, count), its function for flags where it has one
SOURCES = {
    "hh": ("data.sources.published", "hh", None),
    "summarize": ("data.sources.published", "summarize", None),
    "hellaswag": ("data.sources.published", "hellaswag", None),
    "ethics": ("data.sources.published", "ethics", "ethics_flags"),
    "utilitarianism": ("data.sources.published", "utilitarianism", None),  # ethics --set utilitarianism by its short name
    "pairs": ("data.sources.published", "pairs", None),
    "stackexchange": ("data.sources.stackexchange", "records", "add_flags"),
    "reddit": ("data.sources.reddit", "records", "add_flags"),
    "wikipedia": ("data.sources.wikipedia", "records", "add_flags"),
    "human-vs-model": ("evals.human_vs_model", "records", "add_flags"),  # these two need a model, or programs to be run
    "code-correctness": ("evals.correctness", "records", "add_flags"),
}


class Progress:
    """Bytes read of the raw files: a bar on a terminal, a plain line every ten seconds elsewhere."""

    def __init__(self, total):
        self.total, self.done, self.spoke = total, 0, time.monotonic()
        self.bar = tqdm(total=total, unit="B", unit_scale=True, desc="reading", disable=None, dynamic_ncols=True)

    def update(self, n):
        self.done += n
        self.bar.update(n)
        if self.bar.disable and time.monotonic() - self.spoke > 10:
            print(f"{self.done / max(1, self.total):.0%} of {self.total / 1e6:,.0f} MB", flush=True)
            self.spoke = time.monotonic()


def main():
    args, module, records = parse_args()
    for path in args.raw:
        if args.download and not path.exists():
            fetch(*address(args.name, module, path), path)
        if not path.is_file():
            raise InputError(f"{path}: no such file; name the published file, or give --download to fetch it to this place")
        if path.resolve() == args.out.resolve():
            raise InputError(f"{path}: --out is the same file as --raw")
    test = [bool(re.search(r"(^|[^a-z])test([^a-z]|$)", path.name.lower())) for path in args.raw]
    if any(test) and not all(test):
        raise InputError(f"{args.raw[test.index(True)]}: a test split must not be mixed with other files; give each split its own --out")

    count = Count(args.max_bad)
    args.progress = Progress(sum(path.stat().st_size for path in args.raw))
    print(f"reading {', '.join(map(str, args.raw[:3]))}{f' and {len(args.raw) - 3} more files' if len(args.raw) > 3 else ''}", flush=True)
    with contextlib.closing(args.progress.bar), written_whole(args.out) as file:
        for record in records(args.raw, args, count):
            if any(find_special(text) for text in texts(record)):
                count.drop("records that hold <eot> or <eoc>, our special tokens")
                continue
            line = json.dumps(record, ensure_ascii=False) + "\n"
            file.write(valid_unicode(line).encode())
            count.kept += 1
        count.check()
        if not count.kept:
            raise InputError(f"{args.raw[0]}: nothing came out of {count.total:,} records ({'; '.join(count.summary()) or 'is the file empty?'})")
    what = "texts" if getattr(args, "dialogue", False) else "comparisons"
    print("\n".join([f"{args.out}: {count.kept:,} {what} of {count.total:,} records read", *count.summary()]))


def parse_args():
    """(flags, module, function) of the source named first; only its module is imported."""
    parser = argparse.ArgumentParser(prog="python -m data.prepare", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=SOURCES, help="which published data set")
    parser.add_argument("--raw", required=True, nargs="+", type=Path, metavar="FILE", help="the published files, plain or compressed")
    parser.add_argument("--out", required=True, type=Path, help="file to write: .jsonl, or .jsonl.gz, .xz, .zst")
    parser.add_argument("--download", action="store_true", help="fetch --raw from where it is published if it is not there; goes on where it was cut")
    parser.add_argument("--max_bad", type=float, default=0.001, help="largest share of broken records to leave out instead of giving up (default: 0.001)")
    name = sys.argv[1] if len(sys.argv) > 1 else ""
    if name in ("-h", "--help"):
        parser.parse_args()
    if name not in SOURCES:
        parser.error(f"the name of the data set comes first, found {name!r}; choose from {', '.join(SOURCES)}")
    module, records, flags = SOURCES[name]
    module = importlib.import_module(module)
    if flags and hasattr(module, flags):
        getattr(module, flags)(parser)
    args = parser.parse_args()
    if hasattr(module, "find_raw"):
        args.raw = module.find_raw(args.raw)
    if not 0 <= args.max_bad <= 1:
        parser.error(f"--max_bad {args.max_bad}: a share, from 0 to 1")
    return args, module, getattr(module, records)


def texts(record):
    return [record["text"]] if "text" in record else [record["context"], *record["completions"]]


@contextlib.contextmanager
def written_whole(path):
    """A binary file to write to, compressed by its ending, that appears at `path` whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(f"{path}.partial")  # a killed run leaves it; the next one writes over it
    try:
        with open(partial, "wb") as disk:
            with packer(path, disk) as file:
                yield file
            disk.flush()
            os.fsync(disk.fileno())
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    os.replace(partial, path)


def packer(path, disk):
    """`disk`, or a compressor that writes to it; equal content gives equal bytes, so there is no time in the header."""
    if path.suffix == ".gz":
        return gzip.GzipFile(filename="", fileobj=disk, mode="wb", compresslevel=6, mtime=0)
    if path.suffix == ".xz":
        return lzma.open(disk, "wb", preset=2)
    if path.suffix == ".zst":
        import zstandard
        return zstandard.ZstdCompressor(level=6).stream_writer(disk, closefd=False)
    if path.suffix == ".bz2":
        raise InputError(f"{path}: --out ends in .gz, .xz or .zst, or is not compressed")
    return contextlib.nullcontext(disk)


# ---------------------------------------------------------------------------------------------------------------------
# Fetching


def address(name, module, path):
    """(URL, size in bytes or None, SHA-256 or None) of the published file that `path` names."""
    known = getattr(module, "URLS", {}).get(name, {})
    for tail, (url, size, sha256) in known.items():
        if fnmatch(str(path.absolute()), f"*/{tail}"):
            return url.format(name=path.name), size, sha256
    raise InputError(f"{path}: --download knows no such file of {name} (it knows {', '.join(known) or 'none'}); fetch it by hand, then name it as --raw")


def fetch(url, size, sha256, path):
    """Fetch `url` to `path`, which appears when it is complete. What a cut connection left in path.part is gone on from."""
    part = Path(f"{path}.part")
    part.parent.mkdir(parents=True, exist_ok=True)
    have = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(url, headers={"User-Agent": "hhh-lab", **({"Range": f"bytes={have}-"} if have else {})})
    print(f"fetching {url}" + (f" from byte {have:,}" if have else ""), flush=True)
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            goes_on = answer.status == 206 and answer.headers.get("Content-Range", "").startswith(f"bytes {have}-")
            have = have if goes_on else 0
            total = have + int(answer.headers["Content-Length"]) if "Content-Length" in answer.headers else size
            with open(part, "ab" if goes_on else "wb") as file, \
                    tqdm(total=total, initial=have, unit="B", unit_scale=True, desc="fetching", disable=None) as bar:
                while piece := answer.read(2**20):
                    file.write(piece)
                    bar.update(len(piece))
    except urllib.error.HTTPError as error:
        if error.code != 416:  # "range not satisfiable": all of it is here already
            raise InputError(f"{url}: {error.code} {error.reason}; fetch the file by hand, then name it as --raw") from None
        total = int((error.headers.get("Content-Range") or "").rpartition("/")[2] or have)
    except (urllib.error.URLError, http.client.HTTPException, ConnectionError, TimeoutError) as error:
        raise InputError(f"{url}: cannot be fetched ({getattr(error, 'reason', None) or error or type(error).__name__}); the same command goes on where "
                         f"it was cut; without a connection fetch the file by hand, then name it as --raw {path}") from None
    got = part.stat().st_size
    if total is not None and got < total:
        raise InputError(f"{url}: cut after {got:,} of {total:,} bytes; the same command goes on from there")
    with open(part, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if (size or total or got) != got or sha256 and digest != sha256:
        part.unlink()
        raise InputError(f"{url}: not the file expected: {got:,} bytes, SHA-256 {digest}, instead of {size or total or got:,} bytes, {sha256 or 'any'}; "
                         "removed; give the command again, or fetch the file by hand and name it as --raw")
    shutil.move(part, path)


if __name__ == "__main__":
    run_main(main)
