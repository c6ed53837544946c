"""Files in and out: finding, opening and hashing inputs, reading JSON lines, building a cached folder exactly once."""
import bz2
import contextlib
import fcntl
import gzip
import hashlib
import json
import lzma
import os
import shutil
import tempfile
import zlib
from pathlib import Path

from data.errors import InputError

SUFFIXES = (".jsonl", ".json", ".ndjson", ".txt")  # what a folder given as --data is searched for
PACKED = ("", ".gz", ".xz", ".bz2", ".zst")


def cache_dir():
    """Where built caches lie: $HHH_LAB_CACHE, or data/cache beside this file (not under version control)."""
    return Path(os.environ.get("HHH_LAB_CACHE") or Path(__file__).parent / "cache")


def find_files(paths):
    """Files named by `paths` (files or folders, searched recursively for text and JSON lines), sorted within a folder.

    Raises InputError for a path that does not exist and for a folder that holds nothing readable.
    """
    found = []
    for path in map(Path, paths):
        if path.is_dir():
            inside = sorted(p for p in path.rglob("*") if p.is_file() and p.name.endswith(
                tuple(s + c for s in SUFFIXES for c in PACKED)))
            if not inside:
                raise InputError(f"{path}: no {', '.join(SUFFIXES)} files in this folder (plain, .gz, .xz, .bz2, .zst)")
            found += inside
        elif path.is_file():
            found.append(path)
        else:
            raise InputError(f"{path}: no such file or folder")
    return list(dict.fromkeys(found))


def open_bytes(path):
    """Open a plain, .gz, .xz, .bz2 or .zst file for reading bytes, decompressed as a stream."""
    return _unpacker(path, open)(path, "rb")


def _unpacker(path, otherwise):
    return {".gz": gzip.open, ".xz": lzma.open, ".bz2": bz2.open, ".zst": _open_zst}.get(Path(path).suffix, otherwise)


def _open_zst(path, mode):
    with contextlib.suppress(ImportError):
        from compression import zstd  # Python 3.14
        return zstd.open(path, mode)
    try:
        import zstandard
    except ImportError:
        raise InputError(f"{getattr(path, 'name', path)}: reading .zst needs one more package: pip install zstandard") from None
    return zstandard.open(path, mode)


def read_lines(path, progress=None):
    """Yield (line number from 1, line as bytes without its end) of a possibly compressed file.

    `progress`, a tqdm bar, is moved on by the bytes read from disk, compressed ones where the file is compressed.
    Raises InputError with file and line where the compressed stream is damaged or cut.
    """
    number = 0
    try:
        with open(path, "rb") as disk, _unpacker(path, lambda file, mode: file)(disk, "rb") as file:
            done = 0
            for number, line in enumerate(file, 1):
                if progress is not None:
                    progress.update(disk.tell() - done)
                    done = disk.tell()
                yield number, line.rstrip(b"\r\n")
    except (EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile) as error:
        raise InputError(f"{path}:{number + 1}: the compressed file is damaged or cut ({error}); fetch it again") from None
    except Exception as error:
        if type(error).__name__ == "ZstdError" or isinstance(error, OSError) and error.errno is None:  # from bz2
            raise InputError(f"{path}:{number + 1}: the compressed file is damaged ({error}); fetch it again") from None
        raise


def parse_json(path, number, line):
    """One JSON object from one line; InputError names the file and the line. NaN and Infinity are refused."""
    def refuse(word):
        raise ValueError(f"{word} is not a number")
    try:
        record = json.loads(line.decode("utf-8"), parse_constant=refuse)
    except UnicodeDecodeError as error:
        raise InputError(f"{path}:{number}: not UTF-8 text ({error.reason} at byte {error.start}); "
                         "is this a text file?") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}:{number}: not a JSON object on one line ({error})") from None
    if not isinstance(record, dict):
        raise InputError(f"{path}:{number}: expected a JSON object like {{…}}, found {str(record)[:40]!r}")
    return record


def read_records(path, progress=None):
    """Yield (line number, dict) for each non-blank line of a JSON-lines file."""
    for number, line in read_lines(path, progress):
        if line.strip():
            yield number, parse_json(path, number, line)


def content_key(paths, *settings):
    """A short name for the content of files plus settings: equal content has one cache wherever it lies.

    The digest of a large file is remembered by (path, size, modification time), so starting again does not read it.
    """
    digest = hashlib.sha256(repr(settings).encode())
    for path in paths:
        digest.update(file_digest(path))
    return digest.hexdigest()[:20]


def file_digest(path):
    stat = os.stat(path)
    name = hashlib.sha256(repr((os.path.realpath(path), stat.st_size, stat.st_mtime_ns)).encode()).hexdigest()[:32]
    memo = cache_dir() / "digests" / name
    if memo.exists():
        return memo.read_bytes()
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").digest()
    write_file(memo, digest)
    return digest


def write_file(path, content):
    """Write bytes or text so that the file appears whole or not at all."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=path.name + ".", delete=False) as file:
        try:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        except BaseException:
            os.unlink(file.name)
            raise
    os.chmod(file.name, 0o644)
    os.replace(file.name, path)


def build_once(name, build):
    """The folder cache_dir()/name, made by `build(empty folder)` if it is not there yet.

    Processes that start together wait for the one that builds (a file lock). The folder is built beside its place and
    renamed, so it is whole or absent, and a build that was killed is begun again.
    """
    folder = cache_dir() / name
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with open(f"{folder}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.is_dir():
            partial = Path(f"{folder}.partial")
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir()
            try:
                build(partial)
            except BaseException:
                shutil.rmtree(partial, ignore_errors=True)
                raise
            os.rename(partial, folder)
    return folder
