"""tokenizer.json, the form in which every tokenizer lies on disk: that of the `tokenizers` library, which
transformers and inference servers read.

Here are the ways to make one (from tokens in the order of their ranks, from a GGUF file's lists), what is
changed in somebody else's before it is used here, and the way from it to tiktoken, which encodes faster.
"""
import json
import re

# GPT-2's split pattern in tiktoken's faster form: words, numbers, signs with the space before them; runs of
# blanks. The third splits off single digits first.
GPT2_SPLIT = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"
DIGITS_SPLIT = (r"'(?:[sdmt]|ll|ve|re)|\p{N}| ?\p{L}++| ?[^\s\p{L}\p{N}]++|\s++(?=\p{N})|\s++$|\s+(?!\S)|\s")
LLAMA3_SPLIT = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
                r"|\s*[\r\n]+|\s+(?!\S)|\s+")
QWEN2_SPLIT = LLAMA3_SPLIT.replace(r"\p{N}{1,3}", r"\p{N}")
EOC = "<eoc>"
END_OF_TEXT = ("<eot>", "<|endoftext|>", "<|end_of_text|>", "</s>")  # names of the token that ends a document

# GPT-2's table, by which a byte-level BPE writes each byte as one visible character.
_VISIBLE = [byte for byte in range(256) if chr(byte).isprintable() and chr(byte) != " "]
_HIDDEN = [byte for byte in range(256) if byte not in _VISIBLE]
BYTE_OF = {chr(byte): byte for byte in _VISIBLE} | {chr(256 + i): byte for i, byte in enumerate(_HIDDEN)}
CHAR_OF = {byte: char for char, byte in BYTE_OF.items()}


# ------------------------------------------------------------------------------------------------------------
# Making one


def split_json(name):
    """The pre_tokenizer of a byte-level BPE: "gpt2", "digits", "llama3" or "qwen2"."""
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    if name in ("gpt2", "digits"):
        first = [{"type": "Digits", "individual_digits": True}] * (name == "digits")
        steps = [*first, byte_level | {"use_regex": True}]
    else:
        pattern = {"llama3": LLAMA3_SPLIT, "qwen2": QWEN2_SPLIT}[name]
        steps = [{"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False},
                 byte_level | {"use_regex": False}]
    return steps[0] if len(steps) == 1 else {"type": "Sequence", "pretokenizers": steps}


def byte_level_json(vocab, merges, specials, split="gpt2", ignore_merges=False):
    """A byte-level BPE. vocab: {token in visible characters: id}; merges: pairs of such tokens in the order
    of their ranks; specials: {text: id}."""
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    return _json(vocab, merges, specials, split_json(split), byte_level, ignore_merges=ignore_merges)


def sentencepiece_json(vocab, merges, specials):
    """A BPE of Llama 1, 2 and Mistral: spaces are written as ▁, and what is no token as bytes <0x..>."""
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    decoder = {"type": "Sequence", "decoders": [
        {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}, {"type": "ByteFallback"},
        {"type": "Fuse"}]}
    unknown = next((text for text, i in specials.items() if i == 0), None)
    return _json(vocab, merges, specials, None, decoder, normalizer=replace, unk_token=unknown, fuse_unk=True,
                 byte_fallback=True)


def special_json(text, i):
    """A special token, as tokenizer.json lists it."""
    return {"id": i, "content": text, "single_word": False, "lstrip": False, "rstrip": False,
            "normalized": False, "special": True}


def _json(vocab, merges, specials, split, decoder, normalizer=None, **model):
    added = [special_json(text, specials[text]) for text in sorted(specials, key=specials.get)]
    model = {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
             "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": False,
             "vocab": vocab, "merges": [list(pair) for pair in merges], **model}
    return {"version": "1.0", "truncation": None, "padding": None, "added_tokens": added,
            "normalizer": normalizer, "pre_tokenizer": split, "post_processor": None, "decoder": decoder,
            "model": model}


def from_ranks(tokens):
    """A byte-level BPE with GPT-2's split from the bytes of each token in the order of their ranks, as in a
    .tiktoken file. <eot> and <eoc> are the two next ids."""
    ranks = {token: rank for rank, token in enumerate(tokens)}

    def visible(token):
        return "".join(CHAR_OF[byte] for byte in token)

    merges = []
    for token, rank in ranks.items():
        parts = [bytes([byte]) for byte in token]
        while len(parts) > 2:  # what merges of lower rank make of the token's bytes
            pair_ranks = [ranks.get(a + b, rank) for a, b in zip(parts, parts[1:])]
            first = pair_ranks.index(min(pair_ranks))
            if pair_ranks[first] == rank:
                break
            parts[first:first + 2] = [parts[first] + parts[first + 1]]
        if len(parts) == 2:
            merges.append([visible(part) for part in parts])
    vocab = {visible(token): rank for token, rank in ranks.items()}
    # tiktoken takes a word that is a token as it is, even if no merges lead to it. So does ignore_merges.
    specials = {"<eot>": len(tokens), EOC: len(tokens) + 1}
    return byte_level_json(vocab, merges, specials, ignore_merges=True)


def merges_by_score(vocab, scores):
    """The merges of a SentencePiece BPE, which has a score for each token instead: {token: id}, {token:
    score} -> pairs, the highest score first."""
    found = []
    for token, score in scores.items():
        pairs = [(token[:i], token[i:]) for i in range(1, len(token))]
        pairs = [pair for pair in pairs if pair[0] in vocab and pair[1] in vocab]
        found += [(score, pair) for pair in sorted(pairs, key=lambda pair: (vocab[pair[0]], vocab[pair[1]]))]
    return [pair for _, pair in sorted(found, key=lambda x: x[0], reverse=True)]


# ------------------------------------------------------------------------------------------------------------
# Reading one


def added_tokens(spec):
    """{text: id} of the tokens beside the model's own vocabulary, such as <|endoftext|>."""
    return {token["content"]: token["id"] for token in spec["added_tokens"]}


def adapted(spec):
    """Somebody else's tokenizer.json as it is used here.

    <eoc> is added as the next id, if it is not there. Nothing is set before or behind a text: contexts and
    completions are encoded separately, so a space that is put before every text (SentencePiece's ▁) would
    stand in the middle of a sentence.
    """
    spec = json.loads(json.dumps(spec))
    n = max([*spec["model"]["vocab"].values(), *added_tokens(spec).values()]) + 1
    if EOC not in added_tokens(spec):
        spec["added_tokens"].append(special_json(EOC, n))
    spec["post_processor"] = spec["truncation"] = spec["padding"] = None
    if spec["model"].get("dropout"):  # is for training: it would make each encoding of a text another one
        spec["model"]["dropout"] = None
    for part in ("normalizer", "pre_tokenizer", "decoder"):
        spec[part] = without_prefix(spec.get(part))
    return spec


def without_prefix(step):
    """A normalizer, pre-tokenizer or decoder that neither sets a space before a text nor takes one away;
    None if nothing else is left of it."""
    if step is None or step["type"] in ("Prepend", "Strip"):
        return None
    if step["type"] == "Sequence":
        name = next(key for key in step if key != "type")
        return {"type": "Sequence", name: [kept for part in step[name] if (kept := without_prefix(part))]}
    if step["type"] == "Metaspace":
        return step | {"prepend_scheme": "never"}
    return step | {"add_prefix_space": False} if "add_prefix_space" in step else step


def with_eoc_behind(spec):
    """The same tokenizer, setting <eoc> behind each text or pair of texts, for preference models: their
    reward is read there, and whoever forgets it would get a wrong one."""
    def piece(name):
        return {"Sequence": {"id": name, "type_id": 0}}

    end = {"SpecialToken": {"id": EOC, "type_id": 0}}
    special = {EOC: {"id": EOC, "ids": [added_tokens(spec)[EOC]], "tokens": [EOC]}}
    return spec | {"post_processor": {"type": "TemplateProcessing", "single": [piece("A"), end],
                                      "pair": [piece("A"), piece("B"), end], "special_tokens": special}}


def token_texts(spec):
    """{id: bytes of the token's text}. Raises ValueError for a tokenizer of another kind than BPE."""
    if spec["model"].get("type") != "BPE":
        raise ValueError(f"a tokenizer of the kind {spec['model'].get('type')}; only BPE can be read")
    texts, is_byte_level = {}, "ByteLevel" in json.dumps(spec["decoder"])
    for token, i in spec["model"]["vocab"].items():
        if is_byte_level and all(char in BYTE_OF for char in token):
            texts[i] = bytes(BYTE_OF[char] for char in token)
        elif not is_byte_level and re.fullmatch("<0x[0-9A-F]{2}>", token):
            texts[i] = bytes([int(token[3:5], 16)])
        else:
            texts[i] = token.replace("▁", " ").encode()
    return texts | {i: text.encode() for text, i in added_tokens(spec).items()}


def tiktoken_form(spec):
    """(split pattern, {token's bytes: rank}, id of each rank or -1 for bytes that the vocabulary lacks) of a
    byte-level BPE for tiktoken; None for other kinds of tokenizers.

    tiktoken merges the two neighbours that make the token of the lowest rank, `tokenizers` the pair that
    stands first in a list. That is nearly always the same. Whoever uses this compares the two.
    """
    pattern, model = _pattern(spec.get("pre_tokenizer")), spec["model"]
    if pattern is None or spec.get("normalizer") or model.get("unk_token") or model.get("dropout"):
        return None
    merged = [pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"]]
    tokens = [*BYTE_OF, *dict.fromkeys(a + b for a, b in merged)]
    if model.get("ignore_merges"):  # a word that is a token is taken as it is, even if no merges lead to it
        tokens = list(dict.fromkeys([*tokens, *(t for t in model["vocab"] if all(c in BYTE_OF for c in t))]))
    ranks = {bytes(BYTE_OF[char] for char in token): rank for rank, token in enumerate(tokens)}
    return pattern, ranks, [model["vocab"].get(token, -1) for token in tokens]


def _pattern(step):
    """The split pattern of a byte-level pre-tokenizer, or None if it is of another kind."""
    steps = step["pretokenizers"] if step and step["type"] == "Sequence" else [step]
    kinds = [step and step["type"] for step in steps]
    if kinds[-1] != "ByteLevel" or steps[-1].get("add_prefix_space"):
        return None
    uses_regex = steps[-1].get("use_regex", True)
    if kinds == ["ByteLevel"] and uses_regex:
        return GPT2_SPLIT
    if kinds == ["Digits", "ByteLevel"] and uses_regex and steps[0]["individual_digits"]:
        return DIGITS_SPLIT
    if kinds == ["Split", "ByteLevel"] and not uses_regex and not steps[0]["invert"]:
        pattern = steps[0]["pattern"].get("Regex")
        return pattern if steps[0]["behavior"] == "Isolated" else None
    return None
