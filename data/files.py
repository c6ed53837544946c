"""Files in and out: finding, opening and hashing inputs, reading JSON lines, building a cached folder exactly once."""
import bz2
import contextlib
import fcntl
import gzip
import hashlib
import io
import json
import lzma
import os
import shutil
import tempfile
import zlib
from pathlib import Path

from data.errors import InputError

SUFFIXES = (".jsonl", ".json", ".ndjson", ".txt")  # what a folder given as --data is searched for
LONGEST_LINE = 2**30  # bytes: what is longer is no line but a broken or hostile file, and is not read into memory
PACKED = ("", ".gz", ".xz", ".bz2", ".zst")


def cache_dir():
    """Where built caches lie: $HHH_LAB_CACHE, or data/cache beside this file (not under version control)."""
    return Path(os.environ.get("HHH_LAB_CACHE") or Path(__file__).parent / "cache")


def find_files(paths, more=()):
    """Files named by `paths` (files or folders, searched recursively for text and JSON lines), sorted within a folder.
    `more`: further endings to look for in folders.

    Raises InputError for a path that does not exist and for a folder that holds nothing readable.
    """
    found = []
    for path in map(Path, paths):
        if path.is_dir():
            inside = sorted(p for p in path.rglob("*") if p.is_file() and p.name.endswith(
                tuple(s + c for s in (*SUFFIXES, *more) for c in PACKED)))
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
    return unpacker(path, open)(path, "rb")


def unpacker(path, otherwise):
    return {".gz": gzip.open, ".xz": lzma.open, ".bz2": bz2.open, ".zst": _open_zst}.get(Path(path).suffix, otherwise)


def _open_zst(path, mode):
    with contextlib.suppress(ImportError):
        from compression import zstd  # Python 3.14
        return zstd.open(path, mode, options={zstd.DecompressionParameter.window_log_max: 31})
    try:
        import zstandard
    except ImportError:
        raise InputError(f"{getattr(path, 'name', path)}: reading .zst needs one more package: pip install zstandard") from None
    file = path if hasattr(path, "read") else open(path, mode)
    return io.BufferedReader(_ZstFrames(file, zstandard.ZstdDecompressor(max_window_size=2**31)), 2**17)


class _ZstFrames(io.RawIOBase):
    """The frames of a .zst file, one after the other. zstandard's own reader takes a file that was cut for a whole one.

    Published dumps are packed with windows of up to 2^31 bytes, which a decompressor allows only when told so.
    """

    def __init__(self, file, zstd):
        self.file, self.zstd, self.frame, self.packed, self.plain = file, zstd, None, b"", memoryview(b"")

    def readable(self):
        return True

    def readinto(self, buffer):
        while not self.plain:
            packed = self.packed or self.file.read(2**12)  # a little at a time: it may unpack to 30,000 times as much
            if not packed:
                if self.frame:
                    raise EOFError("it ends within a frame")
                return 0
            self.frame = self.frame or self.zstd.decompressobj()
            self.plain, self.packed = memoryview(self.frame.decompress(packed)), b""
            if self.frame.eof:
                self.packed, self.frame = self.frame.unused_data, None
        n = min(len(buffer), len(self.plain))
        buffer[:n], self.plain = self.plain[:n], self.plain[n:]
        return n


def read_lines(path, progress=None):
    """Yield (line number from 1, line as bytes without its end) of a possibly compressed file.

    `progress`, a tqdm bar, is moved on by the bytes read from disk, compressed ones where the file is compressed.
    Raises InputError with file and line where the compressed stream is damaged or cut.
    """
    number = 0
    try:
        with open(path, "rb") as disk, unpacker(path, lambda file, mode: file)(disk, "rb") as file:
            done = unseen = 0
            while line := file.readline(LONGEST_LINE):
                number += 1
                if len(line) == LONGEST_LINE:
                    raise InputError(f"{path}:{number}: a line longer than {LONGEST_LINE // 2**20} MB; is this a text file?")
                unseen += len(line)
                if progress is not None and unseen > 2**18:  # asking for each line would cost as much as reading it
                    progress.update(disk.tell() - done)
                    done, unseen = disk.tell(), 0
                yield number, line.rstrip(b"\r\n")
            if progress is not None:
                progress.update(disk.tell() - done)
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
            os.chmod(file.name, 0o644)
            os.replace(file.name, path)
        except BaseException:
            os.unlink(file.name)
            raise


def check_writable(path):
    """Raise OSError or InputError if write_file(path, …) could not work."""
    path = Path(path)
    if path.is_dir():
        raise InputError(f"{path}: is a folder; give a file's name")
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=path.parent):
        pass


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
