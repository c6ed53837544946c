"""Tokenizers: bytes, GPT-2's, any .tiktoken file, or a BPE trained on the given text. All encode through tiktoken."""
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

# GPT-2's split pattern in tiktoken's faster form: words, numbers, signs with the space before them; runs of blanks.
PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"""
FILE = "tokenizer.tiktoken"
BPE_VERSION = 1  # raise it when the training below changes, so that older caches are not taken for its result
BPE_BYTES = 256 * 2**20  # of text for BPE training at most: more changes the merges little, but costs time and memory
GROUP = 2**18  # characters handed to a thread at once: many short texts would cost more to hand over than to encode
ACCEPTED = '"bytes", "gpt2", "bpe:N" (trained on the text given; N from 258 to 1048576), or a .tiktoken file'


class Tokenizer:
    """Byte-level BPE with two special tokens at the end of its ids.

    n_vocab     ids that exist, the specials included
    eot, eoc    n_vocab - 2, which ends a document, and n_vocab - 1, which ends a completion
    vocab_size  n_vocab rounded up to a multiple of 64: rows of a model's table; ids >= n_vocab never occur in data
    dtype       np.uint16 where vocab_size allows, else np.uint32
    key         short hash of the content: equal for equal tokenizers, and part of the names of caches
    """

    def __init__(self, tokens):
        """`tokens`: the bytes of each token in the order of their ranks, the 256 single bytes among them."""
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
        """Ids of `text`, (n,) of self.dtype, no special token added. Half surrogate pairs are read as U+FFFD.

        Raises ValueError if "<eot>" or "<eoc>" stands in the text.
        """
        return self._encode_group([text])[0]

    def encode_many(self, texts):
        """Yield the ids of each of `texts` in order, as `encode` gives them. All cores encode; memory stays flat."""
        workers = min(os.cpu_count() or 1, 16)
        with ThreadPoolExecutor(workers) as pool:  # tiktoken works outside the interpreter's lock
            under_way = collections.deque()
            for group in _groups(texts):
                under_way.append(pool.submit(self._encode_group, group))
                if len(under_way) > 2 * workers:
                    yield from under_way.popleft().result()
            while under_way:
                yield from under_way.popleft().result()

    def _encode_group(self, texts):
        """The ids of each text. One call for all, <eot> between them, as each may wait for the interpreter's lock."""
        joined = EOT.join(texts)
        if joined.count(EOT) >= len(texts) or EOC in joined:
            raise ValueError(f"the text holds {next(filter(None, map(find_special, texts)))}, a special token")
        joined = valid_unicode(joined)
        if len(self._tokens) == 256:  # no merges: looking up is all there is to do
            return [self._byte_ids[np.frombuffer(text.encode(), np.uint8)] for text in joined.split(EOT)]
        try:
            ids = self._tiktoken(joined)
        except ValueError:  # the pattern's stack is too small for a run of about a million blanks
            return [self._encode_blanks(text) for text in joined.split(EOT)]
        ends = np.flatnonzero(ids == self.eot).tolist()
        return [ids[start:end] for start, end in zip([0] + [end + 1 for end in ends], ends + [len(ids)])]

    def _encode_blanks(self, text):
        """Cut long runs of blanks before their last one. The pattern splits there too, so the ids are the same."""
        cuts = [run.end() - 1 for run in re.finditer(r"\s{1000,}", text) if run.end() < len(text)]
        return np.concatenate([self._tiktoken(text[start:end]) for start, end in zip([0] + cuts, cuts + [len(text)])])

    def _tiktoken(self, text):
        return self._encoding.encode_to_numpy(text, allowed_special={EOT}, disallowed_special=()).astype(self.dtype)

    def decode(self, ids):
        """The text of `ids`. Specials show as <eot>, <eoc>; unknown ids and bytes that are not UTF-8 as U+FFFD."""
        missing = "\ufffd".encode()
        return b"".join(self._shown[i] if 0 <= i < self.n_vocab else missing
                        for i in np.asarray(ids).tolist()).decode("utf-8", "replace")

    def token_bytes(self, token):
        """The bytes of one token; those of U+FFFD for an id that does not exist."""
        return self._shown[token] if token < self.n_vocab else "\ufffd".encode()

    def count_bytes(self, ids):
        """UTF-8 bytes of the text of `ids`, specials not counted: what a loss in bits per byte divides by."""
        return int(self._n_bytes[ids].sum())

    def save(self, folder):
        """Write folder/tokenizer.tiktoken: for each token but the specials a line, its bytes in base64 and its rank."""
        write_file(Path(folder) / FILE, _file_content(self._tokens))

    @classmethod
    def load(cls, folder):
        """The tokenizer that `save` wrote to `folder`. Raises InputError with file and line if damaged or missing."""
        return cls(_read_tokens(Path(folder) / FILE))


def get_tokenizer(name, text_files=()):
    """The tokenizer called `name`: "bytes", "gpt2", "PATH.tiktoken" or "bpe:N".

    "bpe:N" is trained on `text_files` (as read_texts takes them) on first use and cached by their content; N counts
    the two specials. Raises InputError for a name that is none of these, and for what cannot be read.
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


def _groups(texts):
    group, size = [], 0
    for text in texts:
        group.append(text)
        size += len(text)
        if size >= GROUP:
            yield group
            group, size = [], 0
    if group:
        yield group


def _file_content(tokens):
    return "".join(f"{base64.b64encode(token).decode()} {rank}\n" for rank, token in enumerate(tokens))


def _read_tokens(path):
    """The tokens of a .tiktoken file in the order of their ranks."""
    if not path.is_file():
        raise InputError(f"{path}: no such file; a .tiktoken file has a base64 token and its rank on each line")
    ranks = {}
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        try:
            token, rank = line.split()
            token, rank = base64.b64decode(token, validate=True), int(rank)
        except (ValueError, binascii.Error):
            raise InputError(f"{path}:{number}: expected a base64 token and its rank, found {line[:40]!r}; "
                             "the file is damaged, fetch or save it again") from None
        if rank != number - 1:
            raise InputError(f"{path}:{number}: rank {number - 1} was due here, found {rank}; the file is damaged or "
                             "not in the order of its ranks")
        if ranks.setdefault(token, rank) != rank:
            raise InputError(f"{path}:{number}: the token {token!r} has rank {ranks[token]} already; "
                             "the file is damaged")
    missing = [byte for byte in range(256) if bytes([byte]) not in ranks]
    if missing:
        raise InputError(f"{path}: no token for the byte {missing[0]}; the file is cut, or not a byte-level BPE")
    return list(ranks)


def _gpt2_tokens():
    from tiktoken_ext.openai_public import gpt2
    try:
        ranks = gpt2()["mergeable_ranks"]  # downloaded on first use, then in tiktoken's own cache
    except (OSError, ValueError) as error:
        raise InputError(f"the gpt2 tokenizer could not be downloaded ({type(error).__name__}); without a network "
                         "give the path of its .tiktoken file: --tokenizer PATH/gpt2.tiktoken") from None
    return sorted(ranks, key=ranks.get)


def _trained(name, files):
    number = name.removeprefix("bpe:")
    if not (number.isascii() and number.isdigit() and 258 <= int(number) <= 2**20):
        raise InputError(f"{name}: N must be a whole number, at least 258 (256 bytes, 2 specials); give {ACCEPTED}")
    if not files:
        raise InputError(f"{name} is trained on text, and none is given: name text files, or give {ACCEPTED}")

    def build(folder):
        start, sample = time.perf_counter(), _Sample(files)
        print(f"{name}: training on {len(files)} files", flush=True)
        tokenizer = Tokenizer(_train(sample, int(number)))
        tokenizer.save(folder)
        print(f"{name}: trained on {sample.n_bytes / 1e6:.1f} MB of text in {time.perf_counter() - start:.0f} s"
              + (f"; {sample.n_cut} files were read in part, as that is enough" if sample.n_cut else "")
              + (f"; the text has no more merges, so there are {tokenizer.n_vocab} ids instead of {number}"
                 if tokenizer.n_vocab < int(number) else ""), flush=True)

    return Tokenizer.load(build_once(f"bpe-{number}-{content_key(files, 'bpe', int(number), BPE_VERSION)}", build))


class _Sample:
    """Texts to train on, BPE_BYTES of them at most. A file may give its part, by size on disk, of what is left of
    these. Small files come first, so that what they do not use is left for the large ones."""

    def __init__(self, files):
        self.files = sorted(files, key=os.path.getsize)
        self.n_bytes = self.n_cut = 0

    def __iter__(self):
        on_disk = sum(map(os.path.getsize, self.files))
        for path in self.files:
            size = os.path.getsize(path)
            end = self.n_bytes + (BPE_BYTES - self.n_bytes) * size / max(on_disk, 1)
            on_disk -= size
            for _, _, text in read_texts([path]):
                if self.n_bytes >= end:
                    self.n_cut += 1
                    break
                self.n_bytes += len(text.encode())
                yield text


def _train(texts, n_vocab):
    """Tokens of a byte-level BPE in the order of their ranks, trained with the `tokenizers` library."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")  # said openly, or a later fork prints a warning about it
    model = tokenizers.Tokenizer(models.BPE())
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # splits by GPT-2's pattern
    model.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=n_vocab - 2, min_frequency=2, show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    return [bytes(_BYTE_OF[char] for char in model.id_to_token(i)) for i in range(model.get_vocab_size())]


# The `tokenizers` library writes a token as one visible character for each byte, by GPT-2's table.
_VISIBLE = [byte for byte in range(256) if chr(byte).isprintable() and chr(byte) != " "]
_HIDDEN = [byte for byte in range(256) if byte not in _VISIBLE]
_BYTE_OF = {chr(byte): byte for byte in _VISIBLE} | {chr(256 + i): byte for i, byte in enumerate(_HIDDEN)}
