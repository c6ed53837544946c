"""Tokenizers: bytes, GPT-2's, any .tiktoken file, or a BPE trained on given text. All of them encode by
tiktoken."""
import base64
import binascii
import collections
import hashlib
import os
import re
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import tiktoken
import tokenizers
from tokenizers import models, pre_tokenizers, trainers

from data.errors import InputError
from data.files import build_once, content_key, write_file
from data.text import EOC, EOT, find_special, read_texts, valid_unicode

# GPT-2's split pattern in tiktoken's faster form: words, numbers, or signs with the space before them;
# blanks.
PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"""
# A long run of blanks with text after it, as the pattern sees blanks: \x1c to \x1f are none.
BLANKS = re.compile(r"(?<![^\S\x1c-\x1f])[^\S\x1c-\x1f]{1000,}+(?!<eot>|\Z)")
FILE = "tokenizer.tiktoken"
BPE_VERSION = 2  # raise it when the training below changes, so that older caches are not taken for its result
BPE_BYTES = 256 * 2**20  # of text for BPE training at most: more takes time and hardly changes a merge
LONGEST_WORD = 1024  # bytes: longer words are cut for BPE training, which takes the square of a word's length
BATCH = 2**18  # characters that a thread encodes at once; handing over each short text would take longer
ACCEPTED = '"bytes", "gpt2", "bpe:N" (trained on the text given; N from 258 to 1048576), or a .tiktoken file'


class Tokenizer:
    """Byte-level BPE with two special tokens after the others.

    n_vocab     ids that exist, including the specials
    eot, eoc    n_vocab - 2, which ends a document, and n_vocab - 1, which ends a completion
    vocab_size  n_vocab rounded up to a multiple of 64: rows of a model's table. No data has ids >= n_vocab
    dtype       np.uint16 if vocab_size allows it, else np.uint32
    key         short hash of the content, equal for equal tokenizers; it is part of the names of caches
    """

    def __init__(self, tokens):
        """`tokens`: the bytes of each token in the order of their ranks, including all 256 single bytes."""
        self.n_vocab = len(tokens) + 2
        self.eot, self.eoc = len(tokens), len(tokens) + 1
        self.vocab_size = -(-self.n_vocab // 64) * 64
        self.dtype = np.uint16 if self.vocab_size <= 2**16 else np.uint32
        self.key = hashlib.sha256((PATTERN + _file_content(tokens)).encode()).hexdigest()[:16]
        self._tokens = list(tokens)
        self._shown = self._tokens + [EOT.encode(), EOC.encode()]
        self._n_bytes = np.array([len(token) for token in tokens] + [0, 0])
        ranks = {token: rank for rank, token in enumerate(tokens)}
        self._byte_ids = np.array([ranks[bytes([byte])] for byte in range(256)], self.dtype)
        self._encoding = tiktoken.Encoding(self.key, pat_str=PATTERN, mergeable_ranks=ranks,
                                           special_tokens={EOT: self.eot, EOC: self.eoc})

    def encode(self, text):
        """The ids of a text, (n,) of self.dtype, without special tokens. Half surrogate pairs become
        U+FFFD.

        Raises ValueError if the text holds "<eot>" or "<eoc>".
        """
        return self._encode_batch([text])[0]

    def encode_many(self, texts):
        """Yield the ids of each text in order, as `encode` gives them. All cores encode; memory stays
        flat."""
        n_threads = min(os.cpu_count() or 1, 16)
        under_way = collections.deque()
        with ThreadPoolExecutor(n_threads) as pool:  # tiktoken runs outside Python's global lock
            for batch in _batches(texts):
                under_way.append(pool.submit(self._encode_batch, batch))
                if len(under_way) > 2 * n_threads:
                    yield from under_way.popleft().result()
            while under_way:
                yield from under_way.popleft().result()

    def _encode_batch(self, texts):
        """The ids of each text. One call encodes all of them, with <eot> in between: each call may have to
        wait for the global lock."""
        for text in texts:
            if special := find_special(text):
                raise ValueError(f"the text holds {special}, a special token")
        joined = valid_unicode(EOT.join(texts))
        if len(self._tokens) == 256:  # there are no merges, so each byte is a token
            return [self._byte_ids[np.frombuffer(text.encode(), np.uint8)] for text in joined.split(EOT)]
        try:
            ids = self._tiktoken(joined)
        except ValueError:  # tiktoken gives up on a run of about a million blanks
            ids = np.concatenate([self._tiktoken(part) for part in _cut_blanks(joined)])
        ends = np.flatnonzero(ids == self.eot)
        return [ids[start:end] for start, end in zip([0, *(ends + 1)], [*ends, len(ids)])]

    def _tiktoken(self, text):
        ids = self._encoding.encode_to_numpy(text, allowed_special={EOT}, disallowed_special=())
        return ids.astype(self.dtype)

    def decode(self, ids):
        """The text of ids. Specials are shown as <eot> and <eoc>; unknown ids and broken UTF-8 become
        U+FFFD."""
        return b"".join(map(self.token_bytes, np.asarray(ids).tolist())).decode("utf-8", "replace")

    def token_bytes(self, token):
        """The bytes of one token; those of U+FFFD if there is no such id."""
        return self._shown[token] if 0 <= token < self.n_vocab else "\ufffd".encode()

    def count_bytes(self, ids):
        """UTF-8 bytes of the text of ids, without specials: what a loss in bits per byte divides by."""
        return int(self._n_bytes[ids].sum())

    def save(self, folder):
        """Write folder/tokenizer.tiktoken. Each line has a token's bytes in base64 and its rank; specials
        have none.
        """
        write_file(Path(folder) / FILE, _file_content(self._tokens))

    @classmethod
    def load(cls, folder):
        """The tokenizer that `save` wrote. Raises InputError with file and line if it is damaged or
        missing."""
        return cls(_read_tokens(Path(folder) / FILE))


def get_tokenizer(name, text_files=()):
    """The tokenizer with this name: "bytes", "gpt2", "PATH.tiktoken" or "bpe:N".

    "bpe:N" is trained on `text_files` (as read_texts takes them) on first use and cached by their content.
    N counts the two specials. Raises InputError for other names, and for what cannot be read.
    """
    if name == "bytes":
        return Tokenizer([bytes([byte]) for byte in range(256)])
    if name == "gpt2":
        return Tokenizer(_gpt2_tokens())
    if name.startswith("bpe:"):
        return _trained(name, list(text_files))
    if name.endswith(".tiktoken"):
        return Tokenizer(_read_tokens(Path(name)))
    raise InputError(f"unknown tokenizer {name!r}: give {ACCEPTED}")


def _batches(texts):
    """Yield lists of successive texts, each of BATCH characters or a little more in all."""
    batch, size = [], 0
    for text in texts:
        batch.append(text)
        size += len(text)
        if size >= BATCH:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _cut_blanks(text):
    """The text in parts that have the same tokens. PATTERN splits a run of blanks before its last one, so
    it can be cut there."""
    cuts = [run.end() - 1 for run in BLANKS.finditer(text)]
    return [text[start:end] for start, end in zip([0, *cuts], [*cuts, len(text)])]


def _file_content(tokens):
    return "".join(f"{base64.b64encode(token).decode()} {rank}\n" for rank, token in enumerate(tokens))


def _read_tokens(path):
    """The tokens of a .tiktoken file in the order of their ranks."""
    if not path.is_file():
        raise InputError(f"{path}: no such file; a .tiktoken file has a base64 token and its rank on each "
                         "line")
    ranks = {}
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        try:
            token, rank = line.split()
            token, rank = base64.b64decode(token, validate=True), int(rank)
        except (ValueError, binascii.Error):
            raise InputError(f"{path}:{number}: expected a base64 token and its rank, found {line[:40]!r}; "
                             "the file is damaged, fetch or save it again") from None
        if rank != number - 1:
            raise InputError(f"{path}:{number}: rank {number - 1} was due here, found {rank}; the file is "
                             "damaged or not in the order of its ranks")
        if ranks.setdefault(token, rank) != rank:
            raise InputError(f"{path}:{number}: the token {token!r} has rank {ranks[token]} already; "
                             "the file is damaged")
    missing = [byte for byte in range(256) if bytes([byte]) not in ranks]
    if missing:
        raise InputError(f"{path}: no token for the byte {missing[0]}; the file is cut, or not a byte-level "
                         "BPE")
    return list(ranks)


def _gpt2_tokens():
    from tiktoken_ext.openai_public import gpt2
    try:
        ranks = gpt2()["mergeable_ranks"]  # downloaded on first use, and then in tiktoken's own cache
    except (OSError, ValueError) as error:
        raise InputError(f"the gpt2 tokenizer could not be downloaded ({type(error).__name__}); without a "
                         "network give the path of its .tiktoken file: "
                         "--tokenizer PATH/gpt2.tiktoken") from None
    return sorted(ranks, key=ranks.get)


# ------------------------------------------------------------------------------------------------------------
# Training


def _trained(name, files):
    n_vocab = name.removeprefix("bpe:")
    if not (n_vocab.isascii() and n_vocab.isdigit() and 258 <= int(n_vocab) <= 2**20):
        raise InputError(f"{name}: N must be a whole number, at least 258 (256 bytes, 2 specials); "
                         f"give {ACCEPTED}")
    if not files:
        raise InputError(f"{name} is trained on text, and none is given: name text files, or give {ACCEPTED}")
    n_vocab = int(n_vocab)

    def build(folder):
        print(f"{name}: training on {len(files)} files", flush=True)
        start, counts = time.perf_counter(), collections.Counter()
        tokenizer = Tokenizer(_train(_training_texts(files, counts), n_vocab))
        tokenizer.save(folder)
        notes = [f"trained on {counts['bytes'] / 1e6:.1f} MB of text in {time.perf_counter() - start:.0f} s"]
        if counts["cut"]:
            notes.append(f"{counts['cut']} files were read in part, as that is enough")
        if tokenizer.n_vocab < n_vocab:
            notes.append(f"the text has no more merges, so there are {tokenizer.n_vocab} ids instead of "
                         f"{n_vocab}")
        print(f"{name}: {'; '.join(notes)}", flush=True)

    key = content_key(files, "bpe", n_vocab, BPE_VERSION)
    return Tokenizer.load(build_once(f"bpe-{n_vocab}-{key}", build))


def _training_texts(files, counts):
    """Yield texts to train on, at most BPE_BYTES of them. Each file gives up to its share, by size on disk,
    of what is left to give. Small files come first, so that the large ones can give what those have not."""
    files = sorted(files, key=os.path.getsize)
    on_disk = sum(map(os.path.getsize, files))
    for path in files:
        size = os.path.getsize(path)
        limit = counts["bytes"] + (BPE_BYTES - counts["bytes"]) * size / max(on_disk, 1)
        on_disk -= size
        for _, _, text in read_texts([path]):
            if counts["bytes"] >= limit:
                counts["cut"] += 1
                break
            counts["bytes"] += len(text.encode())
            yield text


def _train(texts, n_vocab):
    """Tokens of a byte-level BPE in the order of their ranks, trained by the `tokenizers` library."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")  # if it is not set, a later fork prints a warning
    model = tokenizers.Tokenizer(models.BPE())
    model.pre_tokenizer = word_splitter()
    model.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=n_vocab - 2, min_frequency=2, show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    return [bytes(_BYTE_OF[char] for char in model.id_to_token(i)) for i in range(model.get_vocab_size())]


def word_splitter():
    """Splits text into words by GPT-2's pattern, and long runs of letters or blanks into words of
    LONGEST_WORD."""
    return pre_tokenizers.Sequence([pre_tokenizers.ByteLevel(add_prefix_space=False),
                                    pre_tokenizers.FixedLength(LONGEST_WORD)])


# The `tokenizers` library writes a token as one visible character for each byte, by GPT-2's table.
_VISIBLE = [byte for byte in range(256) if chr(byte).isprintable() and chr(byte) != " "]
_HIDDEN = [byte for byte in range(256) if byte not in _VISIBLE]
_BYTE_OF = {chr(byte): byte for byte in _VISIBLE} | {chr(256 + i): byte for i, byte in enumerate(_HIDDEN)}
