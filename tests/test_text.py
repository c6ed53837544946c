"""Text for language modelling: reading it, the cached stream, what is held out, and the order of
windows."""
import bz2
import gzip
import json
import lzma
import subprocess
import sys

import numpy as np
import pytest
from conftest import DATA, ROOT, write_jsonl

from data.errors import InputError
from data.text import Text, lm_windows, load_text, read_texts
from data.tokenizer import get_tokenizer

BYTES = get_tokenizer("bytes")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("HHH_LAB_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def documents(n, seed=0):
    random = np.random.default_rng(seed)
    numbers = [random.integers(1000, size=random.integers(1, 60)) for _ in range(n)]
    return [f"Document {i} of {seed}. " + " ".join(map(str, numbers[i])) for i in range(n)]


def write_texts(path, texts):
    return write_jsonl(path, [{"text": text} for text in texts])


def split_documents(text, tokenizer=BYTES):
    """The documents of a stream, in order."""
    ends = np.flatnonzero(text.tokens == tokenizer.eot)
    return [tokenizer.decode(text.tokens[start:end]) for start, end in zip([0, *(ends + 1)], ends)]


def run_python(code, *args, cache):
    return subprocess.Popen([sys.executable, "-c", code, *map(str, args)], cwd=ROOT, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, env={"HHH_LAB_CACHE": str(cache)})


def test_reading_every_form_of_file(tmp_path):
    texts = ["one\nline", "  zwei ✓\n", ""]
    content = "".join(json.dumps({"text": text, "other": 1}) + "\n\n" for text in texts).encode()
    for name, pack in ((".jsonl", bytes), (".json", bytes), (".ndjson.gz", gzip.compress),
                       (".jsonl.xz", lzma.compress), (".jsonl.bz2", bz2.compress)):
        path = tmp_path / f"file{name}"
        path.write_bytes(pack(content))
        assert list(read_texts([path])) == [(path, 2 * i + 1, text) for i, text in enumerate(texts)]
    plain = tmp_path / "file.txt.gz"
    plain.write_bytes(gzip.compress(b"first\r\n\r\n  second\nthird"))
    assert list(read_texts([plain])) == [(plain, 1, "first\n\n  second\nthird")]


def test_the_stream_is_the_documents_each_followed_by_eot(tmp_path, capsys):
    texts = documents(400)
    path = write_texts(tmp_path / "a.jsonl", texts[:300] + ["", "  \n"] + texts[300:])
    train, held_out = load_text([path], BYTES, held_out=0.05)
    kept = split_documents(train)
    assert kept == [text for text in texts if text in set(kept)]  # in the file's order
    assert sorted(kept + split_documents(held_out)) == sorted(texts)
    assert 5 <= held_out.n_docs <= 40
    for text in (train, held_out):
        docs = split_documents(text)
        assert text.tokens[-1] == BYTES.eot and text.tokens.dtype == BYTES.dtype
        assert (text.n_docs, text.n_bytes) == (len(docs), sum(len(doc.encode()) for doc in docs))
        assert not text.tokens.flags.writeable
    out = capsys.readouterr().out
    n_tokens = len(train.tokens) + len(held_out.tokens)
    assert f"400 documents, {n_tokens:,} tokens" in out and "2 empty documents skipped" in out
    assert f"{held_out.n_docs} documents, {len(held_out.tokens):,} tokens" in out


def test_a_bpe_stream_equals_encoding_document_by_document(tmp_path):
    path = write_texts(tmp_path / "a.jsonl", documents(300))
    tokenizer = get_tokenizer("bpe:500", [path])
    train, held_out = load_text([path], tokenizer, held_out=0.1)
    for text in (train, held_out):
        docs = split_documents(text, tokenizer)
        ids = [[*tokenizer.encode(doc), tokenizer.eot] for doc in docs]
        assert np.array_equal(text.tokens, np.concatenate(ids))


def test_held_out_documents_stay_held_out(tmp_path):
    texts = documents(300)
    _, first = load_text([write_texts(tmp_path / "a.jsonl", texts)], BYTES, held_out=0.1)
    mixed = documents(200, seed=1) + texts[::-1] + texts[:150]  # more, in another order, half of them twice
    train, second = load_text([write_texts(tmp_path / "b.jsonl", mixed)], BYTES, held_out=0.1)
    assert set(split_documents(first)) == set(split_documents(second)) & set(texts)
    assert not set(split_documents(train)) & set(split_documents(second))


@pytest.mark.parametrize("kind", ["jsonl", "txt"])
@pytest.mark.parametrize("held_out", [0.02, 0.98])  # the hash puts the one document on one side or the other
def test_where_no_document_can_be_held_out_the_end_of_the_stream_is(tmp_path, capsys, kind, held_out):
    text = "A long story. " * 1000 + "The end."
    path = tmp_path / f"one.{kind}"
    write_texts(path, [text]) if kind == "jsonl" else path.write_text(text)
    train, held = load_text([path], BYTES, held_out=held_out)
    assert len(train.tokens) + len(held.tokens) == len(text) + 1
    assert len(held.tokens) == round((len(text) + 1) * held_out)
    assert BYTES.decode(train.tokens) + BYTES.decode(held.tokens) == text + "<eot>"
    assert train.n_bytes == len(train.tokens) and held.n_bytes == len(held.tokens) - 1
    assert train.n_docs == held.n_docs == 1
    assert "the end of the text" in capsys.readouterr().out


def test_a_large_txt_file_is_one_document_with_the_tokens_of_the_whole(tmp_path, monkeypatch):
    monkeypatch.setattr("data.text.PIECE", 2000)
    random = np.random.default_rng(0)
    lines = ["".join(random.choice(list("ab  \t'.é1"), random.integers(40))) for _ in range(3000)]
    text = "\n".join(lines) + "\nlast line"
    (tmp_path / "large.txt").write_text(text)
    pieces = [piece for _, _, piece in read_texts([tmp_path / "large.txt"])]
    assert len(pieces) > 10 and "".join(pieces) == text and max(map(len, pieces)) < 3000
    tokenizer = get_tokenizer("bpe:400", [tmp_path / "large.txt"])
    train, held_out = load_text([tmp_path / "large.txt"], tokenizer)
    stream = np.concatenate([train.tokens, held_out.tokens])
    assert np.array_equal(stream, [*tokenizer.encode(text), tokenizer.eot])


def test_a_second_call_reads_the_cache(tmp_path, capsys):
    path = write_texts(tmp_path / "a.jsonl", documents(50))
    first = load_text([path], BYTES, held_out=0.1)
    capsys.readouterr()
    again = load_text([path], BYTES, held_out=0.1)
    assert capsys.readouterr().out == ""
    assert all(np.array_equal(a.tokens, b.tokens) and (a.n_docs, a.n_bytes) == (b.n_docs, b.n_bytes)
               for a, b in zip(first, again))
    load_text([path], get_tokenizer("bpe:300", [path]), held_out=0.1)  # another tokenizer, another cache
    assert "tokenizing" in capsys.readouterr().out
    write_texts(path, documents(51))
    assert sum(text.n_docs for text in load_text([path], BYTES, held_out=0.1)) == 51


LOAD = """
import sys
from data.text import load_text
from data.tokenizer import get_tokenizer
train, held_out = load_text([sys.argv[1]], get_tokenizer("bytes"), held_out=0.1)
print("loaded", train.tokens.sum(), held_out.tokens.sum())
"""


def test_processes_that_start_together_build_once(tmp_path, cache):
    path = write_texts(tmp_path / "a.jsonl", documents(20_000))
    processes = [run_python(LOAD, path, cache=cache) for _ in range(3)]
    outputs = [process.communicate()[0] for process in processes]
    assert sorted(output.count("tokenizing") for output in outputs) == [0, 0, 1]
    assert len({output.splitlines()[-1] for output in outputs}) == 1 and "loaded" in outputs[0]


def test_a_killed_build_is_begun_again(tmp_path, cache):
    path = write_texts(tmp_path / "a.jsonl", documents(200))
    stalls = """
import itertools, time
from data.tokenizer import Tokenizer
encode_many = Tokenizer.encode_many
def stall(self, texts):
    yield from itertools.islice(encode_many(self, texts), 20)
    print("under way", flush=True)
    time.sleep(60)
Tokenizer.encode_many = stall
""" + LOAD
    process = run_python(stalls, path, cache=cache)
    while "under way" not in process.stdout.readline():
        assert process.poll() is None
    process.kill()
    process.communicate()
    assert list(cache.glob("*.partial/*.bin")) and not list(cache.glob("text-*/meta.json"))
    assert sum(text.n_docs for text in load_text([path], BYTES, held_out=0.1)) == 200
    assert not list(cache.glob("*.partial"))


MEMORY = """
import resource, sys
from data.text import load_text
from data.tokenizer import get_tokenizer
tokenizer = get_tokenizer("bytes")
list(tokenizer.encode_many(["warm " * 10_000] * 100))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
train, held_out = load_text(sys.argv[1:], tokenizer)
after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print((after - before) / 1024, len(train.tokens) + len(held_out.tokens))
"""


@pytest.mark.parametrize("kind", ["jsonl", "txt"])
def test_memory_is_flat_in_the_size_of_the_file(tmp_path, cache, kind):
    line = "Some words of text that go on for a while, " * 40
    with open(tmp_path / f"large.{kind}", "w") as file:
        for i in range(25_000):
            file.write(json.dumps({"text": f"{i} {line}"}) + "\n" if kind == "jsonl" else f"{i} {line}\n")
    process = run_python(MEMORY, tmp_path / f"large.{kind}", cache=cache)
    grown, n_tokens = process.communicate()[0].split()[-2:]
    assert int(n_tokens) > 40e6  # 80 MB of ids
    assert float(grown) < 50


def test_damaged_files_are_named_with_their_line(tmp_path, cache):
    good = "".join(json.dumps({"text": text}) + "\n" for text in documents(2000)).encode()
    bad = {
        "cut.jsonl.gz": (gzip.compress(good)[:-2000], r"cut\.jsonl\.gz:\d+: .*fetch it again"),
        "cut.jsonl.xz": (lzma.compress(good)[:-2000], r"cut\.jsonl\.xz:\d+: .*fetch it again"),
        "cut.jsonl.bz2": (bz2.compress(good)[:-2000], r"cut\.jsonl\.bz2:\d+: .*fetch it again"),
        "junk.jsonl.bz2": (b"no bz2 at all", r"junk\.jsonl\.bz2:1: .*fetch it again"),
        "junk.jsonl.gz": (b"no gzip at all", r"junk\.jsonl\.gz:1: .*fetch it again"),
        "junk.jsonl": (np.random.default_rng(0).bytes(5000), r"junk\.jsonl:1: not UTF-8"),
        "junk.txt": (b"fine\n" + np.random.default_rng(0).bytes(5000), r"junk\.txt:\d+: not UTF-8"),
        "line.jsonl": (b'{"text": "a"}\n\n{"text": "b"', r"line\.jsonl:3: not a JSON object"),
        "list.jsonl": (b'["text"]\n', r"list\.jsonl:1: expected a JSON object"),
        "key.jsonl": (b'{"text": "a"}\n{"chosen": "b", "rejected": ""}\n',
                      r'key\.jsonl:2: no "text".*chosen, rej'),
        "type.jsonl": (b'{"text": "a"}\n{"text": ["b"]}\n', r'type\.jsonl:2: "text" must be a string'),
        "null.jsonl": (b'{"text": null}\n', r'null\.jsonl:1: "text" must be a string'),
        "empty.jsonl": (b"", r"empty\.jsonl: no documents"),
        "blank.jsonl": (b"\n\n", r"blank\.jsonl: no documents"),
        "empty.txt": (b"", r"empty\.txt: no documents"),
        "hollow.jsonl": (b'{"text": ""}\n{"text": " "}\n', r"hollow\.jsonl: all 2 documents .* are empty"),
        "special.jsonl": (b'{"text": "a"}\n{"text": "b\\n<eot>"}\n',
                          r"special\.jsonl:2: the text holds <eot>"),
        "special.txt": (b"a\nb\nc <eoc>\n", r"special\.txt:3: the text holds <eoc>.*write it"),
    }
    for name, (content, message) in bad.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(InputError, match=message):
            load_text([tmp_path / name], BYTES)
        assert "\n" not in str(pytest.raises(InputError, load_text, [tmp_path / name], BYTES).value)
    assert not [path for path in cache.glob("text-*") if path.is_dir()]  # nothing half-built stays


def test_the_line_of_a_special_in_a_later_piece(tmp_path, monkeypatch):
    monkeypatch.setattr("data.text.PIECE", 50)
    (tmp_path / "a.txt").write_text("".join(f"line {i} of some\n" for i in range(1, 100)) + "x <eot>\nend\n")
    with pytest.raises(InputError, match=r"a\.txt:100: "):
        list(read_texts([tmp_path / "a.txt"]))


@pytest.mark.parametrize("held_out", [0, 1, -0.1, float("nan")])
def test_a_part_that_cannot_be_held_out(tmp_path, held_out):
    with pytest.raises(InputError, match="between 0 and 1"):
        load_text([write_texts(tmp_path / "a.jsonl", ["a"])], BYTES, held_out)


def stream(n_tokens):
    return Text(np.arange(n_tokens), n_docs=1, n_bytes=n_tokens)


@pytest.mark.parametrize("n_tokens, ctx", [
    (1001, 10), (1000, 10), (1009, 10), (10_007, 64), (11, 10), (12, 10), (25, 10), (2, 1)])
def test_windows_follow_one_another_over_the_stream(n_tokens, ctx):
    offsets = set()
    for epoch in range(50):
        starts = lm_windows(stream(n_tokens), ctx, seed=3, epoch=epoch)
        assert len(starts) == (n_tokens - 1) // ctx  # in every epoch, so that a step alone tells the epoch
        starts = np.sort(starts)
        assert starts[0] >= 0 and starts[-1] + ctx + 1 <= n_tokens
        assert (np.diff(starts)[:-1] == ctx).all() and (np.diff(starts) > 0).all()
        targets = np.unique(np.concatenate([np.arange(s + 1, s + ctx + 1) for s in starts]))
        assert n_tokens - len(targets) <= ctx  # the first token and at most ctx - 1 others are no targets
        offsets.add(int(starts[0]))
    assert max(offsets) < ctx
    assert n_tokens < 5 * ctx or len(offsets) > ctx / 4


def test_windows_are_a_pure_function_of_seed_and_epoch():
    def order(seed, epoch):
        np.random.seed(np.random.randint(1000))  # the global state plays no part
        return lm_windows(stream(5000), 16, seed, epoch).tolist()
    assert order(1, 0) == order(1, 0)
    assert len({tuple(order(seed, epoch)) for seed in range(3) for epoch in range(3)}) == 9
    assert order(1, 0) != sorted(order(1, 0))


def test_a_stream_shorter_than_a_window():
    with pytest.raises(InputError, match=r"10 tokens.*10 \+ 1.*--ctx"):
        lm_windows(stream(10), 10, seed=0, epoch=0)


@pytest.mark.skipif(not (DATA / "text").is_dir(), reason="the real data is not here")
def test_real_text(tmp_path):
    files = [DATA / "text" / "wikitext2_valid.jsonl.xz", DATA / "text" / "dialogues_dev.jsonl.xz"]
    train, held_out = load_text(files, BYTES)
    texts = [text for _, _, text in read_texts(files)]
    assert train.n_bytes + held_out.n_bytes == sum(len(text.encode()) for text in texts)
    assert train.n_docs + held_out.n_docs == len(texts)
