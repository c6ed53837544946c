"""A run's state on disk. A checkpoint is a folder that is also a Hugging Face model folder:

    config.json, model.safetensors    for transformers a LlamaForCausalLM, or a LlamaForSequenceClassification
    tokenizer.tiktoken                each token in base64, and its rank; <eot> and <eoc> are the two next ids
    meta.json                         kind, objective, step, flags, metrics, what it was trained on, versions
    train_state.pt                    optimizer state, for --resume

A run writes its files into OUT/partial, and then renames this folder to OUT/step-N. So a crash at any moment
leaves the last good checkpoint. When the run is done, the newest checkpoint's files become OUT's own.
"""
import json
import os
import platform
import re
import shutil
from pathlib import Path

import safetensors
import safetensors.torch
import torch

from data.errors import InputError
from data.files import write_file
from data.tokenizer import Tokenizer
from model import GPT, Config

# meta.json is the last to be copied: a folder that has it is complete
FILES = ("config.json", "model.safetensors", "tokenizer.tiktoken", "train_state.pt", "meta.json")


def hf_config(config, eot):
    """A Config as transformers' LlamaConfig writes it."""
    if config.value_head:
        head = {"architectures": ["LlamaForSequenceClassification"], "num_labels": 1,
                "id2label": {"0": "reward"}, "label2id": {"reward": 0}}
    else:
        head = {"architectures": ["LlamaForCausalLM"]}
    return {
        **head, "model_type": "llama", "hidden_size": config.d_model, "intermediate_size": config.d_ff,
        "num_hidden_layers": config.n_layer, "num_attention_heads": config.n_head,
        "num_key_value_heads": config.n_head, "vocab_size": config.vocab_size,
        "rope_theta": config.rope_theta,
        "max_position_embeddings": config.ctx, "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tied, "hidden_act": "silu", "attention_bias": False, "mlp_bias": False,
        "bos_token_id": None, "eos_token_id": eot, "pad_token_id": eot, "torch_dtype": "float32"}


def read_config(path):
    """The Config in a config.json. Raises InputError for what is not a model of this project."""
    try:
        hf = json.loads(Path(path).read_text())
        config = Config(
            n_layer=hf["num_hidden_layers"], d_model=hf["hidden_size"], n_head=hf["num_attention_heads"],
            vocab_size=hf["vocab_size"], ctx=hf["max_position_embeddings"], tied=hf["tie_word_embeddings"],
            value_head="LlamaForSequenceClassification" in hf["architectures"], rope_theta=hf["rope_theta"],
            norm_eps=hf["rms_norm_eps"])
        sizes = (config.n_layer, config.d_model, config.n_head, config.vocab_size, config.ctx)
        if not all(isinstance(size, int) and size > 0 for size in sizes):
            raise ValueError("its sizes are not all whole numbers above 0")
        if hf["intermediate_size"] != config.d_ff or hf["num_key_value_heads"] != config.n_head:
            raise InputError(f"{path}: not a model of this project (its MLP has width "
                             f"{hf['intermediate_size']}, {hf['num_key_value_heads']} key heads; here "
                             f"{config.d_ff} and {config.n_head})")
        return config
    except (ValueError, KeyError, TypeError) as error:
        why = f"{type(error).__name__}: {error}"
        raise InputError(f"{path}: not a config this project can read ({why})") from None


def find(folder):
    """The folder that holds the newest whole checkpoint of a run: OUT/step-N if there is one, else OUT
    itself."""
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(f"{folder}: no such checkpoint folder")
    steps = sorted((int(m[1]), p) for p in folder.iterdir() if (m := re.fullmatch(r"step-(\d+)", p.name)))
    if steps:
        return steps[-1][1]
    if not (folder / "meta.json").is_file():
        raise InputError(f"{folder}: no checkpoint in this folder (a checkpoint holds {', '.join(FILES)})")
    return folder


def load(folder, value_head=None, seed=0):
    """(model, tokenizer, meta) of a run's newest checkpoint. Nothing but tensors and JSON is read.

    value_head: None takes the model as it is. True adds a head, drawn from `seed`, to a language model. False
    leaves a preference model's head out. Raises InputError with the file for anything missing, damaged or of
    another shape.
    """
    folder = find(folder)
    config = read_config(folder / "config.json")
    tokenizer = Tokenizer.load(folder)
    meta = _read_meta(folder / "meta.json")
    path = folder / "model.safetensors"
    if tokenizer.vocab_size != config.vocab_size:
        raise InputError(f"{folder}: the tokenizer has a table of {tokenizer.vocab_size}, the model of "
                         f"{config.vocab_size}: these two files are not of one model")
    if meta.get("tokenizer") != tokenizer.key:
        raise InputError(f"{folder}/tokenizer.tiktoken: not the tokenizer that this model was trained with")
    try:
        state = safetensors.torch.load_file(path)
    except (safetensors.SafetensorError, FileNotFoundError) as error:
        raise InputError(f"{path}: missing or damaged ({error})") from None
    has_head = config.value_head
    config.value_head = has_head if value_head is None else value_head
    with torch.device("meta"):
        model = GPT(config)
    if config.value_head and not has_head:
        model.score.to_empty(device="cpu")
        state["score.weight"] = model.score.weight.detach().normal_(
            std=(config.d_model + 1) ** -0.5, generator=torch.Generator().manual_seed(seed))
    if has_head and not config.value_head:
        state.pop("score.weight", None)
    try:
        model.load_state_dict(state, assign=True)
    except RuntimeError as error:
        why = str(error).splitlines()[1].strip()[:200]
        raise InputError(f"{path}: does not fit config.json: {why}") from None
    return model, tokenizer, meta


def load_lm(folder):
    """As `load`, for a language model; InputError for a preference model."""
    model, tokenizer, meta = load(folder)
    if meta["kind"] != "lm":
        raise InputError(f"{folder}: a preference model, but a language model is needed here")
    return model, tokenizer, meta


def _read_meta(path):
    try:
        meta = json.loads(path.read_text())
        meta["step"], meta["kind"]
        return meta
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path}: missing or damaged ({type(error).__name__}: {error})") from None


def load_train_state(folder):
    path = find(folder) / "train_state.pt"
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # torch raises a different type for each way a file can be damaged
        why = str(error)[:80]
        raise InputError(f"{path}: missing or damaged, so this run cannot go on ({why})") from None


def save(out, model, tokenizer, meta, train_state):
    """Write OUT/step-N, whole or not at all, and then remove older ones. N is meta["step"]."""
    out = Path(out)
    place, partial = out / f"step-{meta['step']}", out / "partial"
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        write_file(partial / "config.json", json.dumps(hf_config(model.config, tokenizer.eot), indent=1))
        weights = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
        safetensors.torch.save_file(weights, partial / "model.safetensors", metadata={"format": "pt"})
        tokenizer.save(partial)
        _save_train_state(train_state, partial / "train_state.pt")
        versions = {"torch": torch.__version__, "python": platform.python_version()}
        meta = {**meta, "tokenizer": tokenizer.key, "versions": versions}
        write_file(partial / "meta.json", json.dumps(meta, indent=1))
        for path in partial.iterdir():
            with open(path, "rb") as file:
                os.fsync(file.fileno())
        shutil.rmtree(place, ignore_errors=True)
        os.rename(partial, place)
    except (OSError, safetensors.SafetensorError) as error:
        raise InputError(f"{out}: the checkpoint could not be written ({error}); make room and go "
                         "on with --resume: the one before it, if any, is whole") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    for path in out.glob("step-*"):
        if path != place and re.fullmatch(r"step-\d+", path.name):
            _remove(path)


def _save_train_state(state, path):
    try:
        torch.save(state, path)
    except RuntimeError as error:  # torch's words for a full disk tell of its streams
        raise OSError(f"{path.name} could not be written; is the disk full?") from error


def finish(out):
    """Make the newest checkpoint's files OUT's own. Until the last is in place, OUT/step-N remains what
    `find` returns."""
    out = Path(out)
    newest = find(out)
    if newest == out:
        return
    for name in FILES:
        link = out / f"{name}.new"
        link.unlink(missing_ok=True)
        try:
            os.link(newest / name, link)
        except OSError:  # a file system without hard links
            shutil.copyfile(newest / name, link)
        os.replace(link, out / name)
        # If both were links to one file, from an earlier attempt that was cut short, the rename did nothing.
        link.unlink(missing_ok=True)
    _remove(newest)


def _remove(folder):
    """Take a checkpoint out of `find`'s sight with one rename, then delete it."""
    gone = folder.with_name("removed")
    shutil.rmtree(gone, ignore_errors=True)
    os.rename(folder, gone)
    shutil.rmtree(gone, ignore_errors=True)
