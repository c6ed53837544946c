"""Other people's language models of the Llama family, as models of this project: from a Hugging Face folder
or a GGUF file.

What is added is <eoc>, the token at whose place a reward is read. It gets an id behind all others, and a row
in the table of embeddings: an unused one if there is one, else a new one. It starts as the mean of the other
rows.
"""
import torch

from data.errors import InputError
from data.files import decode, read_json
from data.tokenizer import Tokenizer
from data.tokenizer_json import EOC, adapted, added_tokens
from formats import gguf_file
from formats.hf_folder import read_config, read_weights


def read_pretrained(place):
    """(Config, {name: tensor}, tokenizer, meta) of a model folder or a .gguf file. Raises InputError for
    what is no language model of the family, and for files that do not belong together."""
    if place.is_file():
        config_path, (hf, state, spec, settings) = place, gguf_file.read(place)
        config = read_config(hf, place)
    else:
        config_path = place / "config.json"
        hf = read_json(config_path)
        if "eoc_token_id" in hf:
            raise InputError(f"{place}: no checkpoint in this folder that is whole: meta.json, which says what "
                             "it was trained on, is missing; copy it from where this model came from")
        if (place / "adapter_config.json").is_file():
            raise InputError(f"{place}: holds an adapter, adapter_config.json, which is not read; merge it "
                             "into the model first")
        config = read_config(hf, config_path)
        spec, settings = read_json(place / "tokenizer.json"), read_settings(place)
        state = read_weights(place)
    if config.value_head:
        raise InputError(f"{config_path}: another project's classifier. At which token its score is to be "
                         "read is not known; give the language model that it was made from")
    tokenizer = read_tokenizer(spec, settings, hf, place)
    for name in [name for name in state if name.endswith("rotary_emb.inv_freq")]:
        del state[name]  # older versions of transformers wrote it; it follows from the config
    if config.tied and "lm_head.weight" in state:
        if not torch.equal(state.pop("lm_head.weight"), state.get("model.embed_tokens.weight", torch.empty(0))):
            raise InputError(f"{config_path}: says tie_word_embeddings, but the two tables differ")
    if EOC not in added_tokens(spec):
        add_row(config, state, tokenizer.eoc)
    return config, state, tokenizer, {"kind": "lm", "objective": "pretrained", "step": 0, "metrics": {},
                                      "trained_on": []}


def read_settings(folder):
    """The content of tokenizer_config.json, with the chat template, which may be a file of its own."""
    path, template = folder / "tokenizer_config.json", folder / "chat_template.jinja"
    settings = read_json(path) if path.is_file() else {}
    if template.is_file():
        settings["chat_template"] = decode(template.read_bytes(), template)
    return settings


def read_tokenizer(spec, settings, hf, place):
    """The Tokenizer from the contents of tokenizer.json, tokenizer_config.json and config.json."""
    try:
        if not settings.get("eos_token"):
            ids = hf.get("eos_token_id")
            names = {i: text for text, i in added_tokens(spec).items()}
            settings["eos_token"] = names.get(ids[0] if isinstance(ids, list) else ids)
        add_tokens_of(settings, spec)
        tokenizer = Tokenizer(adapted(spec), settings)
        tokenizer.encode("a")
    except Exception as error:  # the `tokenizers` library raises no other type
        why = f"{type(error).__name__}: {str(error)[:150]}"
        raise InputError(f"{place}: its tokenizer cannot be read ({why})") from None
    n_ids, n_rows = tokenizer.n_vocab - (EOC not in added_tokens(spec)), hf["vocab_size"]
    if not n_ids <= n_rows <= 1.1 * n_ids + 64:  # some models have rows to spare
        raise InputError(f"{place}: the tokenizer has {n_ids} ids, the model a table of {n_rows} rows: "
                         "these two are not of one model")
    return tokenizer


def add_tokens_of(settings, spec):
    """Add to a tokenizer.json the tokens that stand in its tokenizer_config.json alone. transformers does so,
    and <eoc> must not get the id of one of them."""
    known = {*spec["model"]["vocab"].values(), *added_tokens(spec).values()}
    described = settings.get("added_tokens_decoder") or {}
    spec["added_tokens"] += [{"id": int(i), **described[i]} for i in sorted(described, key=int)
                             if int(i) not in known]


def add_row(config, state, i):
    """Set row i of the embedding table, and of the output layer, to the mean of the rows before it. If there
    is no such row, the tables grow to the next multiple of 64 rows, which GPUs multiply fastest."""
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        if name in state and state[name].dim() == 2:
            table = state[name].float()
            mean = table[:i].mean(0)
            if i < len(table):
                table[i], state[name] = mean, table
            else:
                state[name] = torch.cat([table, mean.expand(-len(table) % 64 or 64, -1)])
            config.vocab_size = len(state[name])
