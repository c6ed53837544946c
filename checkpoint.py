"""A run's state on disk. A checkpoint is a folder that is also a Hugging Face model folder:

    config.json, model.safetensors            a causal language model, or a classifier of one class, in the
                                              architecture of the model that the run began with
    tokenizer.json, tokenizer_config.json     a preference model's tokenizer sets <eoc> behind each text
    meta.json                                 kind, objective, step, flags, metrics, training data, versions
    train_state.pt                            optimizer state, for --resume, or what ranks that share a model
                                              write in its place (formats/train_state.py)

A run writes its files into OUT/partial, and then renames this folder to OUT/step-N. So a crash at any moment
leaves the last good checkpoint. When the run is done, the newest checkpoint's files become OUT's own.

No rank holds the whole of a sharded model. Weights are gathered and written one tensor after the other, and a
rank reads its part of them.

`load` also takes a language model of somebody else: a Hugging Face folder or a .gguf file
(formats/pretrained.py).
"""
import json
import os
import platform
import re
import shutil
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from data.errors import InputError
from data.files import fields, read_json, write_file
from data.text import EOC
from data.tokenizer import Tokenizer
from formats import train_state
from formats.hf_folder import (check_finite, make_config, read_config, read_weights, weight_files,
                               write_weights)
from formats.pretrained import read_pretrained
from model import GPT
from ranks import part_of

META = {  # what meta.json holds of every run
    "kind": str, "objective": str, "step": int, "n_steps": int, "metrics": dict, "flags": dict, "data": str,
    "trained_on": [dict], "lm_lr": (float, None), "chat": (bool, None), "eoc": (bool, None),
    "binarised": (bool, None), "versions": (dict, None)}
# A large model has several weight files and their index in place of model.safetensors.
FILES = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "train_state.pt",
         "meta.json")


def find(place):
    """Where a model lies: the newest whole checkpoint of a run (OUT/step-N if there is one, else OUT
    itself), a Hugging Face folder, or a .gguf file."""
    place = Path(place)
    if place.is_file() and place.suffix == ".gguf":
        return place
    if not place.is_dir():
        raise InputError(f"{place}: no such checkpoint folder, nor a .gguf file")
    steps = sorted((int(m[1]), p) for p in place.iterdir() if (m := re.fullmatch(r"step-(\d+)", p.name)))
    if steps:
        return steps[-1][1]
    if not (place / "meta.json").is_file() and not (place / "config.json").is_file():
        raise InputError(f"{place}: no checkpoint in this folder (a checkpoint holds {', '.join(FILES)}; a "
                         "Hugging Face folder the first four)")
    return place


def content_files(place):
    """The files that decide what the model at this place, which `find` returned, computes."""
    return [place] if place.is_file() else [place / "config.json", *weight_files(place)]


def load(place, value_head=None, seed=0, lazily=False):
    """(model, tokenizer, meta) of a run's newest checkpoint, a Hugging Face folder or a .gguf file. Nothing
    but tensors and JSON is read.

    value_head: None takes the model as it is. True adds a head, drawn from `seed`, to a language model. False
    leaves a preference model's head out. lazily: leave the weights on disk, until ranks.place gives each rank
    its part. Raises InputError with the file for anything missing, damaged or of another shape.
    """
    place = find(place)
    is_ours = place.is_dir() and (place / "meta.json").is_file()
    config, state, tokenizer, meta = read_checkpoint(place) if is_ours else read_pretrained(place)
    path = content_files(place)[-1]
    has_head = config.value_head
    config.value_head = has_head if value_head is None else value_head
    if has_head and not config.value_head:
        state.pop("score.weight", None)
    if config.value_head and not has_head:
        state["score.weight"] = torch.empty(1, config.d_model).normal_(
            std=(config.d_model + 1) ** -0.5, generator=torch.Generator().manual_seed(seed))
    try:
        if config.n_layer > len(state):
            raise RuntimeError(f"it has {len(state)} tensors, too few for {config.n_layer} layers")
        with torch.device("meta"):
            model = GPT(config)
        # Nothing is read yet, but names and shapes are compared.
        model.load_state_dict({name: tensor.to("meta") for name, tensor in state.items()})
    except RuntimeError as error:
        *_, why = str(error).splitlines()[:2]  # the first line of several only says that something is wrong
        raise InputError(f"{path}: does not fit config.json: {why.strip()[:200]}") from None

    def stored(name, p):
        part = part_of(state.pop(name), p).float()
        check_finite(path, name, part)
        return part

    if lazily:
        model.source = stored
    else:
        model.load_state_dict({name: stored(name, p) for name, p in model.named_parameters()}, assign=True)
    return model, tokenizer, meta


def read_checkpoint(folder):
    """(Config, {name: tensor}, tokenizer, meta) of a checkpoint that `save` wrote."""
    config = read_config(read_json(folder / "config.json"), folder / "config.json")
    tokenizer = Tokenizer.load(folder)
    meta = _read_meta(folder / "meta.json", "pm" if config.value_head else "lm")
    if meta.get("chat"):
        try:
            tokenizer.use_chat()
        except InputError as error:
            raise InputError(f"{folder}: {error}") from None
    if not tokenizer.n_vocab <= config.vocab_size <= 1.1 * tokenizer.n_vocab + 64:
        raise InputError(f"{folder}: the tokenizer has a table of {tokenizer.vocab_size}, the model of "
                         f"{config.vocab_size}: these two files are not of one model")
    if meta.get("tokenizer") != tokenizer.key:
        raise InputError(f"{folder}/tokenizer.json: not the tokenizer that this model was trained with")
    return config, read_weights(folder), tokenizer, meta


def load_lm(place, lazily=False):
    """As `load`, for a language model; InputError for a preference model."""
    model, tokenizer, meta = load(place, lazily=lazily)
    if meta["kind"] != "lm":
        raise InputError(f"{place}: a preference model, but a language model is needed here")
    return model, tokenizer, meta


def _read_meta(path, kind):
    """The content of a meta.json. Raises InputError for what it lacks, and if it is not of this kind."""
    meta = read_json(path)
    fields(meta, path, META)
    for entry in meta["trained_on"]:
        fields(entry, f"{path}: trained_on", {"file": str, "digest": str, "held_out": float})
    if meta["kind"] != kind:
        raise InputError(f"{path}: its kind is {meta['kind'][:20]!r}, but that of config.json is {kind!r}")
    if not 0 <= meta["step"] <= meta["n_steps"]:
        raise InputError(f"{path}: step {meta['step']} is none of a run of {meta['n_steps']} steps")
    return meta


def load_optimizer(place, optimizer):
    """Give an optimizer the state that was saved with the newest checkpoint of a run. Raises InputError if it
    is damaged or of other weights."""
    train_state.load(find(place), optimizer)


def save(out, config, weights, tokenizer, meta, state):
    """Write OUT/step-N, whole or not at all, and then remove older ones. N is meta["step"]. weights: the
    model's state dict. state: {"optimizer": its state dict, and numbers}. All ranks call this together if the
    model is sharded, otherwise one."""
    out = Path(out)
    place, partial = out / f"step-{meta['step']}", out / "partial"
    is_sharded = any(isinstance(tensor, DTensor) for tensor in weights.values())
    is_main = not is_sharded or dist.get_rank() == 0
    try:
        if is_main:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
        if is_sharded:
            dist.all_reduce(torch.zeros(1))  # all wait here for the folder
            if not partial.is_dir():
                raise InputError(f"{partial}: rank {dist.get_rank()} does not see what rank 0 writes; --out "
                                 "has to be on a disk that all ranks share")
        write_weights(partial, weights, writes=is_main)
        train_state.save(partial, state, is_sharded)
        if not is_main:
            return
        write_file(partial / "config.json", json.dumps(make_config(config, tokenizer), indent=1))
        reward_at = None if meta["kind"] == "lm" else EOC if meta.get("eoc", True) else ""
        tokenizer.save(partial, reward_at)
        versions = {"torch": torch.__version__, "python": platform.python_version()}
        meta = {**meta, "tokenizer": tokenizer.key, "chat": tokenizer.chat is not None,
                "eoc_token_id": tokenizer.eoc, "versions": versions}
        write_file(partial / "meta.json", json.dumps(meta, indent=1))
        for path in partial.iterdir():
            path.chmod(0o644)
            with open(path, "rb") as file:
                os.fsync(file.fileno())
        shutil.rmtree(place, ignore_errors=True)
        os.rename(partial, place)
    except OSError as error:
        raise InputError(f"{out}: the checkpoint could not be written ({error}); make room and go "
                         "on with --resume: the one before it, if any, is whole") from None
    finally:
        if is_main:
            shutil.rmtree(partial, ignore_errors=True)
    for path in out.glob("step-*"):
        if path != place and re.fullmatch(r"step-\d+", path.name):
            _remove(path)


def finish(out):
    """Make the newest checkpoint's files OUT's own. Until the last is in place, OUT/step-N remains what
    `find` returns."""
    out = Path(out)
    newest = find(out)
    if newest == out:
        shutil.rmtree(out / "removed", ignore_errors=True)  # of a run that was killed right here
        return
    names = [path.name for path in newest.iterdir() if path.name != "meta.json"]
    for name in [*names, "meta.json"]:  # it is the last: a folder that has it is whole
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
