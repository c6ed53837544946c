"""Tokenizers: text to token ids and back. Ours are byte-level BPEs: single bytes, GPT-2's, a .tiktoken
file's, or one that is trained on given text. Those of pretrained models are used as they come, with <eoc>
added. Each is the content of a tokenizer.json (data/tokenizer_json.py).
"""
import base64
import binascii
import collections
import functools
import hashlib
import json
import os
import re
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import tokenizers
from tokenizers import models, pre_tokenizers, trainers

from data.chat_format import PLAIN, ChatFormat, reward_template
from data.encoders import make_encoder
from data.errors import InputError
from data.files import build_once, content_key, read_json, valid_unicode, write_file
from data.text import EOC, find_special, read_texts
from data.tokenizer_json import (BYTE_OF, END_OF_TEXT, GPT2_SPLIT, added_tokens, from_ranks, token_texts,
                                 with_eoc_behind)

FILES = ("tokenizer.json", "tokenizer_config.json")
OLD_FILE = "tokenizer.tiktoken"  # what checkpoints had before; it is still read
BPE_VERSION = 2  # raise it when the training below changes, so that older caches are not taken for its result
BPE_BYTES = 256 * 2**20  # of text for BPE training at most: more takes time and hardly changes a merge
LONGEST_WORD = 1024  # bytes: longer words are cut for BPE training, which takes the square of a word's length
BATCH = 2**18  # characters that a thread encodes at once; handing over each short text would take longer
ACCEPTED = ('"bytes", "gpt2", "bpe:N" (trained on the text given; N from 258 to 1048576), a .tiktoken file, '
            "or a checkpoint's tokenizer.json")


class Tokenizer:
    """A BPE tokenizer.

    n_vocab     ids that exist, special tokens included: one more than the highest
    eot, eoc    the ids that end a document and a completion
    eos         the id that ends an answer by the model's settings: eot, or where made for chat that of a turn
    ends        all ids that end what a model writes: eos, eot, eoc, and that of a turn by its chat template
    vocab_size  n_vocab rounded up to a multiple of 64: rows of a new model's table; no data has ids >= n_vocab
    dtype       np.uint16 if vocab_size allows it, else np.uint32
    key         short hash of the content, equal for equal tokenizers; a part of the names of caches
    template    the model's own chat template, or None
    chat        the ChatFormat of that template, if dialogues are written by it
    """

    def __init__(self, spec, settings=None):
        """spec: the content of a tokenizer.json in which <eoc> is a special token. settings: that of the
        tokenizer_config.json beside it, if there is one. Raises ValueError for other kinds of tokenizers."""
        self.spec, self.settings, self.chat = spec, {}, None
        for name, value in (settings or {}).items():  # a token may be described by a dict
            self.settings[name] = value.get("content", value) if isinstance(value, dict) else value
        # A preference model's folder also has one that sets <eoc> behind a dialogue.
        name = "base_chat_template" if "base_chat_template" in self.settings else "chat_template"
        template = self.settings.get(name)
        if isinstance(template, list):  # several, for different uses
            template = {form.get("name"): form.get("template") for form in template}.get("default")
        self.template = template if isinstance(template, str) else None
        specials, texts = added_tokens(spec), token_texts(spec)
        eos = self.settings.get("eos_token")
        eot = next((name for name in END_OF_TEXT if name in specials), eos)
        if eot not in specials:
            raise ValueError("no end-of-text token is known")
        self.eot, self.eoc, self.eos = specials[eot], specials[EOC], specials.get(eos, specials[eot])
        self.ends = list(dict.fromkeys([self.eos, self.eot, self.eoc]))
        self.n_vocab = max(texts) + 1
        if self.n_vocab > 2**24:
            raise ValueError(f"an id of {max(texts)}, far more than there are tokens")
        self.vocab_size = -(-self.n_vocab // 64) * 64
        self.dtype = np.uint16 if self.vocab_size <= 2**16 else np.uint32
        content = json.dumps({**spec, "post_processor": None}, sort_keys=True)
        self.key = hashlib.sha256(content.encode()).hexdigest()[:16]
        self._texts = [texts.get(i, "\ufffd".encode()) for i in range(self.n_vocab)]  # in bytes
        self._n_bytes = np.array([len(text) for text in self._texts])
        self._n_bytes[[token["id"] for token in spec["added_tokens"] if token["special"]]] = 0
        self._encode_texts = make_encoder(spec, self.dtype)

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
        with ThreadPoolExecutor(n_threads) as pool:  # the libraries run outside Python's global lock
            for batch in _batches(texts):
                under_way.append(pool.submit(self._encode_batch, batch))
                if len(under_way) > 2 * n_threads:
                    yield from under_way.popleft().result()
            while under_way:
                yield from under_way.popleft().result()

    def use_chat(self):
        """From now on, write dialogues by the model's chat template. Raises InputError if it has none."""
        if self.template is None:
            raise InputError("--chat: this model has no chat template; leave out --chat")
        if not self.chat:
            self.chat = ChatFormat(self.template, {"bos_token": self.settings.get("bos_token") or "",
                                                   "eos_token": self.settings.get("eos_token") or ""})
            self.key = hashlib.sha256((self.key + self.template).encode()).hexdigest()[:16]
            specials = set(added_tokens(self.spec).values())
            turn_end = [i for i in self._template_ids(self.chat.end).tolist() if i in specials][:1]
            self.ends = list(dict.fromkeys(self.ends + turn_end))

    def space_before(self, context):
        """What stands between a context and its completion and is not encoded: in a dialogue the space behind
        "Assistant:", if the dialogue is written by a chat template. Otherwise nothing."""
        is_dialogue = self.chat and context.endswith("\n\nAssistant:")
        return self.chat.space_before_answer() if is_dialogue else ""

    def parts(self, context, completions):
        """The texts of a context and its completions, as they are encoded one by one.

        Without a chat template, a dialogue's context ends with "Assistant:" and the answer begins with a space.
        With one, the context ends with a mark such as "<|im_start|>assistant" and a line break, so the answer
        is encoded without that space.
        """
        space = self.space_before(context)
        return [context, *(completion.removeprefix(space) for completion in completions)]

    def _encode_batch(self, texts):
        """The ids of each text."""
        if not self.chat:
            return self._encode_plain(texts)
        texts = [self.chat.pieces(text) for text in texts]
        texts_of_turns = [piece for pieces in texts for piece, is_template in pieces if not is_template]
        turn_ids, found = iter(self._encode_plain(texts_of_turns)), []
        for pieces in texts:
            ids = [np.zeros(0, self.dtype)]
            for piece, is_template in pieces:
                ids.append(self._template_ids(piece) if is_template else next(turn_ids))
            found.append(np.concatenate(ids))
        return found

    @functools.lru_cache(maxsize=16)
    def _template_ids(self, text):
        """The ids of a part of the chat template. Special tokens such as <|im_start|> stand in it by name."""
        specials = added_tokens(self.spec)
        names = sorted(specials, key=len, reverse=True)
        parts = re.split(f"({'|'.join(map(re.escape, names))})", text)
        ids = [[specials[part]] if part in specials else self._encode_plain([part])[0] for part in parts]
        return np.concatenate(ids).astype(self.dtype)

    def _encode_plain(self, texts):
        """The ids of texts, in which the names of special tokens are nothing but text."""
        for text in texts:
            if special := find_special(text):
                raise ValueError(f"the text holds {special}, a special token")
        return self._encode_texts([valid_unicode(text) for text in texts])

    def decode(self, ids):
        """The text of ids. Specials are shown by their names; unknown ids and broken UTF-8 become
        U+FFFD."""
        return b"".join(map(self.token_bytes, np.asarray(ids).tolist())).decode("utf-8", "replace")

    def token_bytes(self, token):
        """The bytes of one token; those of U+FFFD if there is no such id."""
        return self._texts[token] if 0 <= token < self.n_vocab else "\ufffd".encode()

    def count_bytes(self, ids):
        """UTF-8 bytes of the text of ids, without specials: what a loss in bits per byte divides by."""
        return int(self._n_bytes[ids].sum())

    def save(self, folder, reward_at=None):
        """Write tokenizer.json and tokenizer_config.json, which transformers reads too.

        reward_at: for a preference model what stands behind a completion where its reward is read, "<eoc>" or
        nothing (""). Other programs set it there, too, and write dialogues as the model was trained on them.
        """
        spec = with_eoc_behind(self.spec) if reward_at else self.spec
        name_of = {i: name for name, i in added_tokens(spec).items()}
        kept = {"bos_token": self.settings.get("bos_token"), "chat_template": self.template}
        settings = {name: value for name, value in kept.items() if value}
        if reward_at is not None:
            body, end = (self.template, self.chat.end) if self.chat else (PLAIN, "")
            settings |= {"base_chat_template": self.template,
                         "chat_template": reward_template(body, end, reward_at)}
        settings |= {"eos_token": name_of[self.eos], "pad_token": name_of[self.eot],
                     "tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False,
                     "model_input_names": ["input_ids", "attention_mask"]}
        for file, content in zip(FILES, (spec, settings)):
            write_file(Path(folder) / file, json.dumps(content, ensure_ascii=False))

    @classmethod
    def load(cls, folder):
        """The tokenizer that `save` wrote. Raises InputError with the file if it is damaged or missing."""
        folder = Path(folder)
        if (folder / OLD_FILE).is_file() and not (folder / FILES[0]).is_file():
            return cls.from_tiktoken(folder / OLD_FILE)
        spec, settings = (read_json(folder / name) for name in FILES)
        try:
            return cls(spec, settings)
        except Exception as error:  # the `tokenizers` library has no type of its own
            why = f"{type(error).__name__}: {str(error)[:100]}"
            raise InputError(f"{folder / FILES[0]}: not a tokenizer of this project ({why})") from None

    @classmethod
    def from_tiktoken(cls, path):
        """The byte-level BPE of a .tiktoken file: a token in base64 and its rank on each line."""
        tokenizer = cls(from_ranks(_read_tokens(path)))
        tokenizer.key = hashlib.sha256(GPT2_SPLIT.encode() + path.read_bytes()).hexdigest()[:16]
        return tokenizer


def get_tokenizer(name, text_files=()):
    """The tokenizer with this name: "bytes", "gpt2", "bpe:N", "PATH.tiktoken" or "FOLDER/tokenizer.json".

    "bpe:N" is trained on `text_files` (as read_texts takes them) on first use and cached by their content.
    N counts the two specials. Raises InputError for other names, and for what cannot be read.
    """
    if name == "bytes":
        return Tokenizer(from_ranks([bytes([byte]) for byte in range(256)]))
    if name == "gpt2":
        return Tokenizer(from_ranks(_gpt2_tokens()))
    if name.startswith("bpe:"):
        return _trained(name, list(text_files))
    if name.endswith(".tiktoken"):
        return Tokenizer.from_tiktoken(Path(name))
    if name.endswith("tokenizer.json"):
        return Tokenizer.load(Path(name).parent)
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
        tokenizer = Tokenizer(from_ranks(_train(_training_texts(files, counts), n_vocab)))
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
    return [bytes(BYTE_OF[char] for char in model.id_to_token(i)) for i in range(model.get_vocab_size())]


def word_splitter():
    """Splits text into words by GPT-2's pattern, and long runs of letters or blanks into words of
    LONGEST_WORD."""
    return pre_tokenizers.Sequence([pre_tokenizers.ByteLevel(add_prefix_space=False),
                                    pre_tokenizers.FixedLength(LONGEST_WORD)])
