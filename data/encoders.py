"""From texts to token ids, by the fastest way that gives the ids of the `tokenizers` library: a table of
bytes, tiktoken, or the library itself."""
import json

import numpy as np
import tiktoken
import tokenizers

from data.tokenizer_json import tiktoken_form, token_texts

SEPARATOR = "<eot>"  # no text holds it; tiktoken encodes many texts at once, joined by it
# Texts that two tokenizers encode differently if they split words in different ways.
PROBES = ("It's we'll I'D 12 1234567 3.14 x2 a1b2", "  two \n\n three\t\t \r\n  end  ", "½ ² ٣٤ Ⅷ 5",
          "naïve 日本語 😀👩‍👧 e\u0301", "((a)) --==>> f(x)+=1;//\n\tif", "\x00\x1c\x85\u3000\ufeff",
          " " * 40 + "x" + "\n" * 9)


def make_encoder(spec, dtype):
    """A function: list of texts -> list of their ids, arrays of dtype. spec: the content of a
    tokenizer.json."""
    form = tiktoken_form(spec)
    if form and len(form[1]) == 256 and min(form[2]) >= 0:  # there are no merges, so each byte is a token
        return byte_encoder(*form[1:], dtype)
    by_library = library_encoder(spec, dtype)
    if form is None:
        return by_library
    try:
        by_tiktoken = tiktoken_encoder(*form, dtype, by_library)
        texts = texts_that_tell(spec)
        same = all(map(np.array_equal, by_tiktoken(texts), by_library(texts)))
    except ValueError:  # tiktoken cannot read the pattern
        same = False
    return by_tiktoken if same else by_library


def texts_that_tell(spec):
    """Texts by which two tokenizers of this vocabulary can be told apart: every token by itself, all of them
    joined, so that words meet by chance, and all numbers joined."""
    tokens = [text.decode("utf-8", "ignore") for text in token_texts(spec).values()]
    numbers = "".join(token for token in tokens if token.isdigit())
    return [text.replace(SEPARATOR, "") for text in (*PROBES, numbers, "".join(tokens), *tokens)]


def byte_encoder(ranks, ids, dtype):
    id_of_byte = np.array([ids[ranks[bytes([byte])]] for byte in range(256)], dtype)

    def encode(texts):
        return [id_of_byte[np.frombuffer(text.encode(), np.uint8)] for text in texts]
    return encode


def library_encoder(spec, dtype):
    library = tokenizers.Tokenizer.from_str(json.dumps(spec))
    library.encode_special_tokens = True  # the name of a special token in a text is text

    def encode(texts):
        found = library.encode_batch_fast(texts, add_special_tokens=False)
        return [np.array(encoding.ids, dtype) for encoding in found]
    return encode


def tiktoken_encoder(pattern, ranks, ids, dtype, otherwise):
    """ids: those of the ranks, or -1 for bytes that the vocabulary lacks, which are left out. otherwise: the
    encoder to use if tiktoken gives up, as it does on a run of about a million blanks."""
    encoding = tiktoken.Encoding("", pat_str=pattern, mergeable_ranks=ranks,
                                 special_tokens={SEPARATOR: len(ranks)})
    ids, lacks_bytes = np.array(ids), min(ids) < 0

    def encode(texts):
        try:  # one call for all of them, as each call may have to wait for Python's global lock
            found = encoding.encode_to_numpy(SEPARATOR.join(texts), allowed_special={SEPARATOR},
                                             disallowed_special=())
        except ValueError:
            return otherwise(texts)
        ends = np.flatnonzero(found == len(ranks))
        parts = [ids[found[start:end]] for start, end in zip([0, *(ends + 1)], [*ends, len(found)])]
        return [(part[part >= 0] if lacks_bytes else part).astype(dtype) for part in parts]
    return encode
