"""Reading files: every kind of compression, files of several streams, damage that must not go unnoticed,
long lines."""
import bz2
import gzip
import lzma
import subprocess
import sys

import pytest
import zstandard
from conftest import ROOT

from data import files
from data.errors import InputError
from data.files import read_lines

LINES = [f"line {i} ✓".encode() for i in range(3000)]
CONTENT = b"".join(line + b"\n" for line in LINES)


def zst_with_large_window(content):
    """A stream of unknown size with a window of 2 GiB, as in published dumps."""
    settings = zstandard.ZstdCompressionParameters.from_level(3, window_log=31, enable_ldm=True)
    compressor = zstandard.ZstdCompressor(compression_params=settings).compressobj()
    return compressor.compress(content) + compressor.flush()


COMPRESSORS = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress, ".zst": zstandard.compress}
EACH = pytest.mark.parametrize("suffix, compress", [*COMPRESSORS.items(), (".zst", zst_with_large_window)])


def read(path, content):
    path.write_bytes(content)
    return list(read_lines(path))


def refused(path, content):
    """That reading raises the error of a damaged compressed file, however many lines came before it."""
    with pytest.raises(InputError, match=rf"^{path}:\d+: the compressed file is damaged.*; fetch it again$"):
        read(path, content)


@EACH
def test_a_file_of_one_stream_or_several_is_read_whole(tmp_path, suffix, compress):
    path = tmp_path / f"file{suffix}"
    expected = list(enumerate(LINES, 1))
    assert read(path, compress(CONTENT)) == expected
    parts = [CONTENT[:1000], b"", CONTENT[1000:2000], CONTENT[2000:]]  # cut within a line; one is empty
    assert read(path, b"".join(map(compress, parts))) == expected


@EACH
def test_a_cut_file_is_refused(tmp_path, suffix, compress):
    path = tmp_path / f"file{suffix}"
    whole = compress(CONTENT)
    for cut in (whole[:3], whole[:len(whole) // 2], whole[:-1]):
        refused(path, cut)
        refused(path, whole + cut)
    refused(path, b"")


@EACH
@pytest.mark.parametrize("damage", ["first byte", "first four bytes", "other text", "one byte"])
def test_what_follows_a_stream_and_is_no_stream_is_refused(tmp_path, suffix, compress, damage):
    first, second = compress(CONTENT[:1000]), compress(CONTENT[1000:])
    damaged = {"first byte": b"x" + second[1:], "first four bytes": b"xxxx" + second[4:],
               "other text": CONTENT[:500], "one byte": b"x"}[damage]
    refused(tmp_path / f"file{suffix}", first + damaged)


@pytest.mark.parametrize("suffix", COMPRESSORS)
def test_a_file_that_is_not_compressed_as_its_name_says_is_refused(tmp_path, suffix):
    refused(tmp_path / f"file{suffix}", CONTENT)


@pytest.mark.parametrize("suffix", [".gz", ".xz"])
def test_zeros_may_pad_a_gz_or_xz_file(tmp_path, suffix):
    packed = COMPRESSORS[suffix](CONTENT)
    assert len(read(tmp_path / f"file{suffix}", packed + bytes(10_000) + packed + bytes(8))) == 2 * len(LINES)


def test_lines_end_with_a_line_feed_or_the_file(tmp_path):
    path = tmp_path / "file"
    assert read(path, b"") == []
    assert read(path, b"\n") == [(1, b"")]
    lines = [b"a", b"", b"b\x0b\x85c\rd", b"", b" e "]
    assert read(path, b"a\r\n\r\nb\x0b\x85c\rd\n\n e ") == list(enumerate(lines, 1))


@pytest.mark.parametrize("suffix", ["", *COMPRESSORS])
def test_a_line_longer_than_the_limit_is_refused(tmp_path, monkeypatch, suffix):
    monkeypatch.setattr(files, "LINE_LIMIT", 2**20)
    path = tmp_path / f"file{suffix}"
    compress = COMPRESSORS.get(suffix, bytes)
    assert len(read(path, compress(b"short\n" + b"x" * (2**20 - 1) + b"\nshort"))) == 3
    with pytest.raises(InputError, match=f"^{path}:2: a line of more than 1 MB"):
        read(path, compress(b"short\n" + b"x" * 2**20 + b"\nshort"))


def test_what_a_killed_run_was_writing_goes_when_it_goes_on(tmp_path):
    code = ("import os\nfrom data.files import write_file\n"
            "os.replace = lambda *_: os.kill(os.getpid(), 9)\nwrite_file({!r}, 'text')")
    subprocess.run([sys.executable, "-c", code.format(str(tmp_path / "log"))], cwd=ROOT)
    assert [path.suffix for path in tmp_path.iterdir()] == [".writing"]
    files.lock_folder(tmp_path)
    assert not list(tmp_path.iterdir())


READ = """
import resource, sys
from data.files import read_lines
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
try:
    print(sum(len(line) for _, line in read_lines(sys.argv[1])))
except Exception as error:
    print(type(error).__name__)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""


@pytest.mark.parametrize("suffix", COMPRESSORS)
def test_a_line_of_a_gigabyte_is_refused_in_little_memory(tmp_path, suffix):
    path = tmp_path / f"file{suffix}"
    path.write_bytes(COMPRESSORS[suffix](b"x" * 2**26) * 16)
    done = subprocess.run([sys.executable, "-c", READ, path], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.split()[0] == "InputError", done
    assert int(done.stdout.split()[1]) < 800
