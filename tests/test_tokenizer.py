"""Tokenizers: texts come back, special tokens, files, and a BPE trained on text."""
import base64
import itertools
import json
import subprocess
import sys

import numpy as np
import pytest
import tokenizers
from conftest import DATA, ROOT
from tokenizers import models, pre_tokenizers, trainers

from data.errors import InputError
from data.text import read_texts
from data import tokenizer_json
from data.encoders import PROBES
from data.tokenizer import LONGEST_WORD, Tokenizer, get_tokenizer, word_splitter
from data.tokenizer_json import from_ranks

BYTES = [bytes([byte]) for byte in range(256)]

ODD = ["", " ", "Hello there, it's 12 o'clock.", "naïve café 😀👩‍👩‍👧 日本語 العربية",
       "tabs\tand\r\nline ends \n\n\n  x", "\x00\x1c\x85\u3000",
       "a<eot", "eoc>", " " * 50 + "x", "\n" * 50, "he's she'll I'd 'S", "0123456789", "----====....", "<",
       ""]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("HHH_LAB_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def text_file(tmp_path):
    """60 documents of invented words, so that there is something to merge."""
    random = np.random.default_rng(0)
    syllables = ["".join(pair) for pair in itertools.product("bdfklmnprst", "aeiouäé")]
    words = ["".join(random.choice(syllables, random.integers(1, 4))) for _ in range(300)]
    with open(tmp_path / "words.jsonl", "w", encoding="utf-8") as file:
        for _ in range(60):
            chosen = random.choice(words, 200)
            json.dump({"text": " ".join(chosen) + "'s 42 things!\n\n  Done… 😀"}, file, ensure_ascii=False)
            file.write("\n")
    return tmp_path / "words.jsonl"


@pytest.fixture(params=["bytes", "bpe:600"])
def tokenizer(request, text_file):
    return get_tokenizer(request.param, [text_file])


def test_every_text_comes_back(tokenizer):
    for text in ODD:
        ids = tokenizer.encode(text)
        assert ids.dtype == tokenizer.dtype and ids.ndim == 1
        assert tokenizer.decode(ids) == text
        assert tokenizer.count_bytes(ids) == len(text.encode())


def test_half_a_surrogate_pair_becomes_the_replacement_character(tokenizer):
    assert tokenizer.decode(tokenizer.encode("a\ud83db")) == "a\ufffdb"
    assert tokenizer.decode(tokenizer.encode("\ud83d\ude00")) == "😀"  # and a whole pair becomes its character


def test_ids_and_sizes(tokenizer):
    n_vocab = tokenizer.n_vocab
    assert (tokenizer.eot, tokenizer.eoc) == (n_vocab - 2, n_vocab - 1)
    assert tokenizer.vocab_size % 64 == 0 and n_vocab <= tokenizer.vocab_size < n_vocab + 64
    assert max(tokenizer.encode("".join(ODD)), default=0) < tokenizer.eot
    assert tokenizer.decode([*tokenizer.encode("a"), tokenizer.eot, tokenizer.eoc]) == "a<eot><eoc>"
    assert tokenizer.decode([n_vocab, tokenizer.vocab_size, -1]) == "\ufffd" * 3
    accented = tokenizer.encode("é")
    assert tokenizer.decode(accented[:1]) == ("\ufffd" if len(accented) == 2 else "é")
    assert tokenizer.count_bytes([tokenizer.eot, tokenizer.eoc]) == 0


def test_the_sizes_of_the_two_kinds(text_file):
    assert get_tokenizer("bytes").n_vocab == 258 and get_tokenizer("bytes").vocab_size == 320
    assert get_tokenizer("bytes").encode("é").tolist() == list("é".encode())
    assert get_tokenizer("bpe:600", [text_file]).n_vocab == 600
    pairs = [bytes(pair) for pair in itertools.product(range(256), repeat=2)]
    wide = Tokenizer(from_ranks(BYTES + pairs[:65277]))
    assert wide.n_vocab == 65535 and wide.dtype == np.uint16
    assert Tokenizer(from_ranks(BYTES + pairs[:65279])).dtype == np.uint32


@pytest.mark.parametrize("text", ["<eot>", "a<eoc>b", "<eo<eot>", "x<eot>y<eot>z"])
def test_specials_in_text_are_refused(tokenizer, text):
    with pytest.raises(ValueError, match="<eo[tc]>, a special token"):
        tokenizer.encode(text)
    with pytest.raises(ValueError, match="special token"):
        list(tokenizer.encode_many(["fine", text, "fine"]))


def test_encode_many_equals_encode_and_keeps_the_order(tokenizer):
    texts = [odd * (1 + i % 3) for i, odd in enumerate(ODD * 40)]
    texts += ["a word " * 100_000, "a<eot", "<eo", "t>", *ODD]
    for text, ids in zip(texts, tokenizer.encode_many(iter(texts)), strict=True):
        assert np.array_equal(ids, tokenizer.encode(text))


def test_encode_many_reads_little_ahead():
    read = 0

    def texts():
        nonlocal read
        for _ in range(100_000):
            read += 1
            yield "some text " * 1000
    encoded = get_tokenizer("bytes").encode_many(texts())
    next(encoded)
    assert read < 5_000
    encoded.close()


def test_runs_of_blanks_beyond_the_pattern_s_stack():
    """tiktoken refuses a million blanks in a row. Before its last blank a run can be cut, as the pattern
    splits there too. \\x1c is no blank to the pattern, though it is one to Python."""
    tokenizer = Tokenizer(from_ranks(BYTES + [b"  ", b"\n\n", b" \x1c"]))
    for n in (3000, 10**6):
        parts = ["a" + "\n" * (n - 1), "\nb  c" + " " * (n - 1), " d" + " " * (n - 1), " \x1ce" + " " * 2001]
        expected = np.concatenate([tokenizer.encode(part) for part in parts])
        encoded = list(tokenizer.encode_many(["x", "".join(parts), " y"]))
        assert np.array_equal(encoded[1], expected)
        assert [tokenizer.decode(ids) for ids in encoded] == ["x", "".join(parts), " y"]


def test_a_long_run_of_letters_is_encoded():
    """A version of tiktoken that takes the square of a run's length would not come to an end here."""
    tokenizer = Tokenizer(from_ranks(BYTES + [b"aa", b"aaaa"]))
    assert tokenizer.encode("a" * 2_000_000).tolist() == [257] * 500_000


def write_tiktoken(path, tokens):
    """A .tiktoken file: a token in base64 and its rank on each line."""
    lines = [f"{base64.b64encode(token).decode()} {rank}" for rank, token in enumerate(tokens)]
    path.write_text("\n".join(lines) + "\n")


def test_saved_and_loaded_is_equal(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "run")
    for loaded in (Tokenizer.load(tmp_path / "run"), get_tokenizer(str(tmp_path / "run" / "tokenizer.json"))):
        assert (loaded.key, loaded.n_vocab, loaded.eot, loaded.eoc) == (
            tokenizer.key, tokenizer.n_vocab, tokenizer.eot, tokenizer.eoc)
        assert all(np.array_equal(loaded.encode(text), tokenizer.encode(text)) for text in ODD)


def test_the_file_that_older_checkpoints_have_gives_the_same_tokenizer(tokenizer, tmp_path):
    write_tiktoken(tmp_path / "tokenizer.tiktoken", [tokenizer.token_bytes(i) for i in range(tokenizer.eot)])
    old = Tokenizer.load(tmp_path)
    assert (old.n_vocab, old.eot, old.eoc) == (tokenizer.n_vocab, tokenizer.eot, tokenizer.eoc)
    assert all(np.array_equal(old.encode(text), tokenizer.encode(text)) for text in ODD)
    assert get_tokenizer(str(tmp_path / "tokenizer.tiktoken")).key == old.key


def test_keys_tell_tokenizers_apart(text_file):
    keys = {get_tokenizer(name, [text_file]).key for name in ("bytes", "bpe:258", "bpe:300", "bpe:301")}
    assert len(keys) == 4  # bpe:258 has no merges, but its bytes have other ranks


@pytest.mark.parametrize("damage, line", [
    (lambda lines: lines[:10] + ["not base64! 10"] + lines[11:], 11),
    (lambda lines: lines[:10] + ["QQ=="] + lines[11:], 11),
    (lambda lines: lines[:10] + lines[11:], 11),
    (lambda lines: lines[:20] + ["QQ== x"] + lines[21:], 21),
    (lambda lines: lines[:270] + ["QQ== 270"] + lines[271:], 271),
    (lambda lines: lines[:200], None),
    (lambda lines: [], None),
])
def test_a_damaged_file_is_named_with_its_line(text_file, tmp_path, damage, line):
    tokenizer, path = get_tokenizer("bpe:300", [text_file]), tmp_path / "own.tiktoken"
    write_tiktoken(path, [tokenizer.token_bytes(i) for i in range(tokenizer.eot)])
    path.write_text("\n".join(damage(path.read_text().splitlines())))
    with pytest.raises(InputError) as error:
        get_tokenizer(str(path))
    assert str(error.value).startswith(f"{path}:{line}:" if line else f"{path}:")


def test_binary_junk_and_a_missing_file_are_input_errors(tmp_path):
    with pytest.raises(InputError, match="missing.tiktoken"):
        get_tokenizer(str(tmp_path / "missing.tiktoken"))
    with pytest.raises(InputError, match="tokenizer.json"):
        Tokenizer.load(tmp_path)
    (tmp_path / "junk.tiktoken").write_bytes(np.random.default_rng(0).bytes(10_000))
    with pytest.raises(InputError, match="junk.tiktoken:1:"):
        get_tokenizer(str(tmp_path / "junk.tiktoken"))


@pytest.mark.parametrize("name", ["bpe:", "bpe:257", "bpe:-300", "bpe:3e3", "bpe:1048577", "bpe:four",
                                  "bpe:1.5", "bpe:٣٠٠", "GPT2", "", "words"])
def test_unknown_names_list_what_is_accepted(text_file, name):
    with pytest.raises(InputError, match=r"bytes.*gpt2.*bpe:N.*\.tiktoken"):
        get_tokenizer(name, [text_file])


def test_bpe_needs_text():
    with pytest.raises(InputError, match="trained on text"):
        get_tokenizer("bpe:300")


def test_gpt2_without_a_network_names_the_way_out(tmp_path, monkeypatch):
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")  # nobody listens there
    with pytest.raises(InputError, match=r"\.tiktoken file"):
        get_tokenizer("gpt2")


def reference_bpe(files, n_vocab):
    """The `tokenizers` library's own tokenizer, trained the plain way on the same text."""
    model = tokenizers.Tokenizer(models.BPE())
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.train_from_iterator([text for _, _, text in read_texts(files)], trainers.BpeTrainer(
        vocab_size=n_vocab - 2, min_frequency=2, show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    return model


def test_bpe_ids_equal_those_of_the_tokenizers_library(text_file):
    ours, reference = get_tokenizer("bpe:600", [text_file]), reference_bpe([text_file], 600)
    texts = ODD + [text for _, _, text in read_texts([text_file])]
    n_merged = 0
    for text in texts:
        assert ours.encode(text).tolist() == reference.encode(text).ids
        n_merged += len(text.encode()) - len(ours.encode(text))
    assert n_merged > 10_000


@pytest.mark.skipif(not (DATA / "text").is_dir(), reason="the real data is not here")
def test_bpe_ids_equal_those_of_the_tokenizers_library_on_real_text():
    files = [DATA / "text" / "wikitext2_valid.jsonl.xz"]
    ours, reference = get_tokenizer("bpe:2000", files), reference_bpe(files, 2000)
    for _, _, text in itertools.islice(read_texts([DATA / "text" / "squality_stories.jsonl.xz"]), 20):
        assert ours.encode(text).tolist() == reference.encode(text).ids


@pytest.mark.skipif(not (DATA / "vocab").is_dir(), reason="the real data is not here")
def test_gpt2_from_a_file():
    tokenizer = get_tokenizer(str(DATA / "vocab" / "gpt2.tiktoken"))
    assert (tokenizer.eot, tokenizer.eoc, tokenizer.vocab_size) == (50256, 50257, 50304)
    assert tokenizer.encode("hello world").tolist() == [31373, 995]


@pytest.mark.parametrize("text", ["x" + " " * 300_000 + "y", "a" * 300_000, "é\n" * 1000 + "\n" * 300_000])
def test_the_work_of_training_grows_with_the_text_and_not_with_its_square(text):
    """Training a BPE takes the square of a word's length, for each word."""
    lengths = [len(word) for word, _ in word_splitter().pre_tokenize_str(text)]
    assert sum(lengths) == len(text.encode())
    assert sum(n * n for n in lengths) <= LONGEST_WORD * len(text.encode())


def test_ordinary_words_are_not_cut():
    text = " ".join(ODD) + " " + "a" * LONGEST_WORD
    plain = pre_tokenizers.ByteLevel(add_prefix_space=False).pre_tokenize_str(text)
    words = [word for word, _ in plain]
    assert [word for word, _ in word_splitter().pre_tokenize_str(text)] == [*words[:-1], words[-1][:-1], "a"]


def test_training_runs_once_and_is_deterministic(text_file, tmp_path, capsys):
    first = get_tokenizer("bpe:500", [text_file])
    assert "training" in capsys.readouterr().out
    assert get_tokenizer("bpe:500", [text_file]).key == first.key
    assert capsys.readouterr().out == ""
    copy = tmp_path / "copy.jsonl"
    copy.write_bytes(text_file.read_bytes())
    get_tokenizer("bpe:500", [copy])
    assert capsys.readouterr().out == ""  # equal content has one cache
    code = ("import sys; from data.tokenizer import get_tokenizer as get; "
            "print(get('bpe:500', sys.argv[1:]).key)")
    elsewhere = subprocess.run(
        [sys.executable, "-c", code, str(text_file)], cwd=ROOT, text=True, capture_output=True, check=True,
        env={"HHH_LAB_CACHE": str(tmp_path / "elsewhere"), "PYTHONHASHSEED": "7"})
    assert elsewhere.stdout.split()[-1] == first.key


def test_a_text_with_few_merges_gives_fewer_ids_and_says_so(tmp_path, capsys):
    (tmp_path / "few.jsonl").write_text('{"text": "aa bb aa"}\n')
    tokenizer = get_tokenizer("bpe:1000", [tmp_path / "few.jsonl"])
    assert 258 < tokenizer.n_vocab < 270
    assert f"there are {tokenizer.n_vocab} ids instead of 1000" in capsys.readouterr().out


def test_training_reads_no_more_than_its_share_and_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("data.tokenizer.BPE_BYTES", 20_000)
    for name, word in (("a", "apple "), ("b", "banana "), ("c", "cherry ")):
        line = json.dumps({"text": word * 20}) + "\n"
        (tmp_path / f"{name}.jsonl").write_text(line * (2 if name == "a" else 400))
    tokenizer = get_tokenizer("bpe:400", sorted(tmp_path.glob("*.jsonl")))
    for word in (" banana", " cherry"):  # each had its part; the first file's is one document
        assert len(tokenizer.encode(word)) == 1
    out = capsys.readouterr().out
    assert "3 files were read in part" in out and "trained on 0.0 MB" in out


# ------------------------------------------------------------------------------------------------------------
# Other people's tokenizers

POSSESSIVE = (r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+|\s++$"
              r"|\s*[\r\n]|\s+(?!\S)|\s")


def trained_by_others(texts, split):
    """The content of the tokenizer.json of a byte-level BPE with a way to split text, as others publish it:
    its special token comes first, and <eoc> is unknown."""
    model = tokenizers.Tokenizer(models.BPE())
    step = {"type": "Sequence", "pretokenizers": [
        {"type": "Split", "pattern": {"Regex": POSSESSIVE}, "behavior": "Isolated", "invert": False},
        {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}]}
    if split != "possessive":
        step = tokenizer_json.split_json(split)
    spec = json.loads(model.to_str()) | {"pre_tokenizer": step, "decoder": {
        "type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}}
    model = tokenizers.Tokenizer.from_str(json.dumps(spec))
    model.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=2000, min_frequency=2, show_progress=False, special_tokens=["<|endoftext|>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet())[:250]))  # without the byte 0x9f, as in ğ
    return json.loads(model.to_str())


def real_texts(n):
    """n documents of published text, or invented ones where there is none."""
    path = DATA / "text" / "squality_stories.jsonl.xz"
    if path.exists():
        return [text[:20_000] for _, _, text in itertools.islice(read_texts([path]), n)]
    return [f"It's {i} o'clock; {i * 1234567} people (all of them!) say: \"we'll see\".\n\n\tOK?  {i}"
            for i in range(200)]


@pytest.mark.parametrize("split, is_fast", [
    ("gpt2", True), ("digits", True), ("llama3", True), ("qwen2", True), ("possessive", False)])
def test_ids_equal_those_of_the_tokenizers_library_whatever_the_split(split, is_fast):
    """`\\p{N}{1,3}+` takes all digits of a number for the library, and at most three for tiktoken: such a
    tokenizer has to be left to the library."""
    texts = [*real_texts(12), " ".join(str(7919 * i * i) for i in range(3000))]
    spec = trained_by_others(texts, split)
    library = tokenizers.Tokenizer.from_str(json.dumps(spec))
    tokenizer = Tokenizer(tokenizer_json.adapted(spec))
    assert tokenizer._encode_texts.__qualname__.startswith("tiktoken_encoder" if is_fast else "library_encoder")
    for text in [*ODD, *PROBES, *texts, "12345678 1 22 333 4444", "I'LL we'Ve", "\x01\xf7 𐍈 ğ"]:
        assert tokenizer.encode(text).tolist() == library.encode(text).ids
    assert (tokenizer.eot, tokenizer.eoc, tokenizer.n_vocab) == (0, library.get_vocab_size(), tokenizer.eoc + 1)


def test_names_of_special_tokens_are_text_in_a_text():
    spec = trained_by_others(real_texts(2), "gpt2")
    tokenizer = Tokenizer(tokenizer_json.adapted(spec))
    assert tokenizer.eot not in tokenizer.encode("a<|endoftext|>b")
    assert tokenizer.decode(tokenizer.encode("a<|endoftext|>b")) == "a<|endoftext|>b"
    assert tokenizer.decode([0, tokenizer.eoc]) == "<|endoftext|><eoc>"


@pytest.mark.parametrize("form", ["normalizer", "metaspace"])
def test_a_sentencepiece_tokenizer_sets_no_space_before_a_text(form):
    """As Llama 1 and 2, TinyLlama and Mistral have it: contexts and completions are encoded one by one, and a
    space that is set before each would stand in the middle."""
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"<0x{byte:02X}>": 3 + byte for byte in range(256)}
    for token in "▁", "t", "h", "e", "c", "a", "th", "the", "▁the", "ca":
        vocab[token] = len(vocab)
    merges = [("t", "h"), ("th", "e"), ("▁", "the"), ("c", "a")]
    spec = tokenizer_json.sentencepiece_json(vocab, merges, {"<unk>": 0, "<s>": 1, "</s>": 2})
    strip = {"type": "Strip", "content": " ", "start": 1, "stop": 0}
    spec["decoder"]["decoders"].append(strip)
    if form == "normalizer":
        spec["normalizer"] = {"type": "Sequence", "normalizers": [
            {"type": "Prepend", "prepend": "▁"}, spec["normalizer"]]}
    else:
        spec["normalizer"], spec["pre_tokenizer"] = None, {
            "type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": False}
    tokenizer = Tokenizer(tokenizer_json.adapted(spec), {"eos_token": "</s>"})
    assert (tokenizer.eot, tokenizer.eoc) == (2, len(vocab))
    assert tokenizer.decode(tokenizer.encode(" the cat é\n")) == " the cat é\n"
    assert [tokenizer.token_bytes(i) for i in tokenizer.encode("the the")] == [b"the", b" the"]
    assert tokenizer.count_bytes(tokenizer.encode("é")) == 2


def test_merges_by_score_are_those_of_the_list():
    """A GGUF file of a SentencePiece tokenizer has a score for each token in place of merges."""
    vocab = {token: i for i, token in enumerate(["t", "h", "e", "th", "he", "the"])}
    scores = {"t": -9.0, "h": -9.0, "e": -9.0, "th": -1.0, "he": -2.0, "the": -3.0}
    assert tokenizer_json.merges_by_score(vocab, scores) == [("t", "h"), ("h", "e"), ("t", "he"), ("th", "e")]
