"""Files: finding, reading, hashing and writing them, and building a cached folder exactly once."""
import bz2
import codecs
import contextlib
import errno
import fcntl
import hashlib
import io
import json
import lzma
import os
import shutil
import tempfile
import zlib
from pathlib import Path

import zstandard

from data.errors import InputError

SUFFIXES = (".jsonl", ".json", ".ndjson", ".txt")  # of the files that are read where --data names a folder
LINE_LIMIT = 2**27  # bytes: what has a longer line is no file of text, and is not read into memory
DECOMPRESSORS = {  # what decompresses one stream; each has decompress(bytes), eof and unused_data
    ".gz": lambda: zlib.decompressobj(wbits=31),  # 31 means a stream with gzip's header
    ".xz": lambda: lzma.LZMADecompressor(lzma.FORMAT_XZ),
    ".bz2": bz2.BZ2Decompressor,
    ".zst": lambda: zstandard.ZstdDecompressor(max_window_size=2**31).decompressobj(),  # 2**31: as dumps need
}
PACKED = ("", *DECOMPRESSORS)
PADDED = (".gz", ".xz")  # zeros may stand between their streams and after the last one


def cache_dir():
    """The folder for caches: $HHH_LAB_CACHE, or data/cache, which is not under version control."""
    return Path(os.environ.get("HHH_LAB_CACHE") or Path(__file__).parent / "cache")


def find_files(paths, more=()):
    """The files that `paths` name. A path may be a folder, which is searched for text and JSON lines, with
    all the folders in it; its files come in sorted order. `more`: further suffixes to search for.

    Raises InputError for a path that does not exist and for a folder without such files.
    """
    suffixes = tuple(suffix + packed for suffix in (*SUFFIXES, *more) for packed in PACKED)
    found = []
    for path in map(Path, paths):
        if path.is_dir():
            inside = sorted(p for p in path.rglob("*") if p.name.endswith(suffixes) and p.is_file())
            if not inside:
                raise InputError(f"{path}: no {', '.join(SUFFIXES)} files in this folder (plain, .gz, .xz, "
                                 ".bz2, .zst)")
            found += inside
        elif path.is_file():
            found.append(path)
        else:
            raise InputError(f"{path}: no such file or folder")
    return list(dict.fromkeys(found))


def unpack(path, progress=None):
    """Yield the bytes of a file in pieces, decompressed if its name ends in .gz, .xz, .bz2 or .zst.

    A compressed file may consist of several streams. Each must begin and end as it should: the readers of
    Python's libraries stop without an error where damage hides the next stream, or where a .zst file is
    cut. `progress`, a tqdm bar, is moved on by the bytes read from disk. Raises EOFError where a stream is
    cut, and the decompressor's own error where it is damaged.
    """
    suffix = Path(path).suffix
    if suffix not in DECOMPRESSORS:
        yield from _read(path, 2**18, progress)
        return
    stream = DECOMPRESSORS[suffix]()
    # Few bytes at a time: they can become a million times as many for .bz2, 30,000 times for the others.
    for packed in _read(path, 2**7 if suffix == ".bz2" else 2**12, progress):
        while packed:
            if stream.eof and suffix in PADDED and packed.startswith(b"\0"):
                packed = packed.lstrip(b"\0")
                continue
            if stream.eof:
                stream = DECOMPRESSORS[suffix]()
            yield stream.decompress(packed)
            packed = stream.unused_data
    if not stream.eof:
        raise EOFError("it ends within a compressed stream")


def _read(path, size, progress):
    with open(path, "rb") as file:
        while piece := file.read(size):
            if progress is not None:
                progress.update(len(piece))
            yield piece


def split_lines(path, pieces):
    """Yield (line number from 1, line as bytes without its end) of content that is given in pieces of bytes.

    `path` is for the messages of the InputErrors, which are raised where `pieces` raises the error of a
    decompressor, and for a line longer than LINE_LIMIT.
    """
    number, line = 0, bytearray()
    try:
        for piece in pieces:
            for part in io.BytesIO(piece):
                line += part
                if len(line) > LINE_LIMIT:
                    raise InputError(f"{path}:{number + 1}: a line of more than {LINE_LIMIT // 2**20} MB; is "
                                     "this a text file?")
                if part.endswith(b"\n"):
                    number += 1
                    yield number, bytes(line).rstrip(b"\r\n")
                    line.clear()
        if line:
            yield number + 1, bytes(line).rstrip(b"\r\n")
    except (EOFError, OSError, zlib.error, lzma.LZMAError, zstandard.ZstdError) as error:
        if isinstance(error, OSError) and error.errno is not None:  # from the disk; that of bz2 has no number
            raise
        raise InputError(f"{path}:{number + 1}: the compressed file is damaged or cut ({error}); fetch it "
                         "again") from None


def read_lines(path, progress=None):
    """Yield (line number from 1, line as bytes without its end) of a plain or compressed file: see `unpack`.

    Raises InputError with file and line for a damaged or cut compressed file and for a line that is too long.
    """
    return split_lines(path, unpack(path, progress))


def decode(line, where):
    """The text of bytes. Raises InputError, which begins with `where`, if they are not UTF-8."""
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{where}: not UTF-8 text ({error.reason} at byte {error.start}); is this a text "
                         "file?") from None


def valid_unicode(text):
    """The text, with U+FFFD for half surrogate pairs, which JSON can hold and UTF-8 cannot."""
    try:
        text.encode()
        return text
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def load_json(text, **settings):
    """The content of a JSON text, with U+FFFD for half surrogate pairs. Raises ValueError for what is no
    JSON, or nested too deep. Settings are those of json.loads."""
    try:
        content = json.loads(text, **settings)
        if "\\ud" in text or "\\uD" in text:  # it may be half a pair
            content = json.loads(valid_unicode(json.dumps(content, ensure_ascii=False)))
        return content
    except RecursionError:
        raise ValueError("nested too deep") from None


def parse_json(path, number, line):
    """The JSON object in line `number` of a file. Raises InputError with file and line for anything else,
    and for the words NaN and Infinity, which Python reads as numbers although JSON does not have them."""
    def refuse(word):
        raise ValueError(f"{word} is not a number")

    where = f"{path}:{number}"
    if number == 1:
        line = line.removeprefix(codecs.BOM_UTF8)
    try:
        record = load_json(decode(line, where), parse_constant=refuse)
    except ValueError as error:
        raise InputError(f"{where}: not a JSON object on one line ({error})") from None
    if not isinstance(record, dict):
        raise InputError(f"{where}: expected a JSON object like {{…}}, found {str(record)[:40]!r}")
    return record


def read_records(path, progress=None):
    """Yield (line number, dict) for the lines of a JSON-lines file, without blank lines."""
    for number, line in read_lines(path, progress):
        if line.strip():
            yield number, parse_json(path, number, line)


def read_json(path):
    """The JSON object that a file holds. Raises InputError with the file if it is missing or damaged."""
    try:
        content = load_json(Path(path).read_text("utf-8"))
        if not isinstance(content, dict):
            raise ValueError("not a JSON object")
        return content
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: missing or damaged ({type(error).__name__}: {str(error)[:100]})") from None


KINDS = {str: "a text", int: "a whole number", float: "a finite number", bool: "true or false",
         dict: "an object", None: "missing"}


def fields(record, where, kinds):
    """The values of a record's fields, in the order of `kinds`, which says what each must be.

    kinds: {name: kind}. A kind is a type of KINDS, where float admits whole numbers too; [kind] is a list of
    such values, and (kind, kind) either of two. Raises InputError, which begins with `where`, for a field
    that is missing or of another kind.
    """
    for name, kind in kinds.items():
        if name not in record and not _is(None, kind):
            found = ", ".join(map(repr, record))[:80] or "nothing"
            raise InputError(f'{where}: no "{name}", which must be {_in_words(kind)} (found {found})')
        if not _is(record.get(name), kind):
            raise InputError(f'{where}: "{name}" must be {_in_words(kind)}, found '
                             f"{str(record[name])[:40]!r}")
    return [record.get(name) for name in kinds]


def _is(value, kind):
    if isinstance(kind, tuple):
        return any(_is(value, one) for one in kind)
    if isinstance(kind, list):
        return isinstance(value, list) and all(_is(item, kind[0]) for item in value)
    if kind is float:
        return type(value) in (int, float) and abs(value) < 1e300
    return value is None if kind is None else type(value) is kind


def _in_words(kind):
    if isinstance(kind, tuple):
        return " or ".join(map(_in_words, kind))
    return f"a list, each item {_in_words(kind[0])}" if isinstance(kind, list) else KINDS[kind]


def content_key(paths, *settings):
    """A short hash of the content of files and of `settings`, to name a cache by. The files' names and places
    do not matter."""
    digest = hashlib.sha256(repr(settings).encode())
    for path in paths:
        digest.update(file_digest(path))
    return digest.hexdigest()[:20]


def file_digest(path):
    """The SHA-256 of a file. It is remembered by path, size and modification time, because reading a large
    file each time would take long."""
    stat = os.stat(path)
    state = repr((os.path.realpath(path), stat.st_size, stat.st_mtime_ns))
    remembered = cache_dir() / "digests" / hashlib.sha256(state.encode()).hexdigest()[:32]
    if remembered.exists():
        return remembered.read_bytes()
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").digest()
    write_file(remembered, digest)
    return digest


def output_file(path):
    """The place of a file that is to be written: the path without links. Raises InputError if a folder, a
    device or a pipe stands there, which must not be replaced."""
    place = Path(os.path.realpath(path))
    if place.is_dir():
        raise InputError(f"{path}: this is a folder; give the name of a file")
    if place.exists() and not place.is_file():
        raise InputError(f"{path}: this is a device, a pipe or a socket, and not replaced; give the name of "
                         "a file")
    return place


@contextlib.contextmanager
def naming(path):
    """Give an error of a full disk, which names no file, this one's name."""
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            error.filename = str(path)
        raise


def write_file(path, content):
    """Write bytes or text to a file, which appears when it is complete or not at all."""
    path = output_file(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with naming(path), tempfile.NamedTemporaryFile(
            dir=path.parent, prefix=path.name + ".", suffix=".writing", delete=False) as file:
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
    """Raise OSError or InputError if `write_file` could not write to `path`."""
    place = output_file(path)
    place.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=place.parent):
        pass


def refuse_overwriting(out, paths):
    """Raise InputError if the file `out` is one of those that are read. These are `paths`, or what is in a
    folder of them: of a checkpoint all but the .jsonl files that an evaluation has left there."""
    place = output_file(out)
    for path in map(Path, paths):
        inside = [path]
        if (path / "config.json").exists():
            inside = [file for file in path.iterdir()
                      if file.suffix != ".jsonl" or file.name == "metrics.jsonl"]
        elif path.is_dir() and place.exists():
            inside = find_files([path], (".csv",))
        if any(Path(os.path.realpath(file)) == place for file in inside):
            raise InputError(f"{out}: --out is one of the files that are read; give another name")


def lock_folder(out):
    """Hold the folder OUT of a run for this process, until the file descriptor that is returned is closed or
    the process ends. Raises InputError, with the process that holds it, if another run is writing there."""
    try:
        Path(out).mkdir(parents=True, exist_ok=True)
        folder = os.open(out, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as error:
        raise InputError(f"--out {out}: cannot be a run's folder ({error.strerror})") from None
    try:
        fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        number = os.fstat(folder).st_ino
        locks = Path("/proc/locks")  # of Linux: a line for each lock, with its process and the file's number
        lines = locks.read_text().splitlines() if locks.exists() else []
        holders = [line.split()[4] for line in lines if line.split()[-3].endswith(f":{number}")]
        who = f"process {holders[0]}" if holders else "another process"
        raise InputError(f"{out}: {who} is writing to this folder; wait for it, or give another --out"
                         ) from None
    for path in Path(out).glob("*.writing"):  # by a run that was killed, as this is the only one now
        path.unlink()
    return folder


def build_once(name, build):
    """The folder cache_dir()/name. If it is not there yet, build(empty folder) makes its content.

    Of processes that start together one builds and the others wait for it (a file lock). The folder is built
    beside its place and then renamed, so it is complete or absent. A build that was killed is begun again.
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
                with naming(partial):
                    build(partial)
            except BaseException:
                shutil.rmtree(partial, ignore_errors=True)
                raise
            os.rename(partial, folder)
    return folder
