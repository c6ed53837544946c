"""Models as Hugging Face folders hold them: config.json, and weights in safetensors files.

read_config and make_config translate between a config.json and a Config, for the Llama family: llama (also
SmolLM, TinyLlama), mistral, qwen2 and qwen3. The weights need no translation, as GPT names its parameters as
transformers does. What differs from this family is refused with the reason, never read as if it did not.
"""
import json
import math
import os
from pathlib import Path

import safetensors
import safetensors.torch
import torch

from data.errors import InputError
from data.files import read_json, write_file
from model import Config
from ranks import whole

CLASS_NAMES = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3"}
OTHERS = {  # what other architectures have that model.py has not
    "gpt2": "learned positions, LayerNorm and no SwiGLU", "opt": "learned positions and LayerNorm",
    "gpt_neox": "LayerNorm, and attention beside the MLP", "phi": "LayerNorm, and attention beside the MLP",
    "falcon": "LayerNorm, and attention beside the MLP", "bloom": "ALiBi instead of rotary positions",
    "gemma": "a GELU and scaled embeddings", "gemma2": "a GELU, scaled embeddings and capped logits",
    "gemma3": "a GELU, scaled embeddings and more norms", "gemma3_text": "a GELU and more norms",
    "phi3": "q, k and v in one matrix", "olmo": "norms without weights", "olmo2": "norms behind each part",
    "cohere": "LayerNorm, and attention beside the MLP", "granite": "factors before its sums",
    "smollm3": "layers without positions", "mixtral": "a mixture of experts",
    "qwen2_moe": "a mixture of experts", "qwen3_moe": "a mixture of experts",
    "deepseek_v3": "a mixture of experts", "mamba": "no attention",
}
SHARD_BYTES = 5 * 10**9  # a larger model is written in several files


# ------------------------------------------------------------------------------------------------------------
# config.json


def read_config(hf, path):
    """The Config of a config.json's content `hf`. Raises InputError, which begins with `path`, if the model
    is not of the Llama family, or has something that model.py does not compute."""
    family = str(hf.get("model_type"))
    if family not in CLASS_NAMES:
        difference = f", which has {OTHERS[family]}" if family in OTHERS else ""
        raise InputError(f"{path}: an architecture that cannot be read: {family}{difference}; the Llama "
                         f"family can be: {', '.join(CLASS_NAMES)}")
    try:
        refuse_differences(hf, path)
        theta, scaling = rotary_settings(hf, path)
        # A window says how far a token looks back. A context that is no longer than it is computed exactly.
        has_window = family == "mistral" or hf.get("use_sliding_window")
        window = hf.get("sliding_window", 4096) if has_window else None  # 4096 is transformers' default
        config = Config(
            n_layer=hf["num_hidden_layers"], d_model=hf["hidden_size"], n_head=hf["num_attention_heads"],
            vocab_size=hf["vocab_size"], ctx=min(hf["max_position_embeddings"], window or 2**62),
            tied=hf.get("tie_word_embeddings", False), value_head=is_classifier(hf), rope_theta=theta,
            norm_eps=hf["rms_norm_eps"], n_key_head=hf.get("num_key_value_heads"),
            d_head=hf.get("head_dim") or (128 if family == "qwen3" else None), d_ff=hf["intermediate_size"],
            rope_scaling=scaling, family=family, window=window)
        sizes = (config.n_layer, config.d_model, config.n_head, config.vocab_size, config.ctx,
                 config.n_key_head, config.d_head, config.d_ff)
        if not all(type(size) is int and 0 < size < 2**62 for size in (*sizes, window or 1)):
            raise ValueError("its sizes are not all whole numbers above 0")
        if type(config.tied) is not bool:
            raise ValueError("tie_word_embeddings is neither true nor false")
        if config.n_head % config.n_key_head or config.d_head % 2:
            raise ValueError(f"{config.n_head} heads of width {config.d_head} do not go with "
                             f"{config.n_key_head} key heads")
        if not (0 < config.rope_theta < 2**62 and 0 <= config.norm_eps < 1):
            raise ValueError("rope_theta or rms_norm_eps is out of range")
        numbers = [value for name, value in (scaling or {}).items() if name != "rope_type"]
        if not all(0 < value < math.inf for value in numbers):
            raise ValueError("rope_scaling has numbers that are not above 0")
        return config
    except (ValueError, KeyError, TypeError, AttributeError, ZeroDivisionError) as error:
        why = f"{type(error).__name__}: {error}"
        raise InputError(f"{path}: not a config this project can read ({why})") from None


def is_classifier(hf):
    return any(name.endswith("ForSequenceClassification") for name in hf.get("architectures") or ())


def refuse_differences(hf, path):
    """Raise InputError if a model of the family has a setting that model.py does not compute."""
    for name, usual in (("hidden_act", "silu"), ("attention_bias", False), ("mlp_bias", False),
                        ("partial_rotary_factor", 1), ("quantization_config", None), ("is_causal", True)):
        if hf.get(name, usual) not in (usual, None):
            raise InputError(f"{path}: {name} is {str(hf[name])[:60]}, which cannot be computed here; only "
                             f"{usual} can")
    if is_classifier(hf) and len(hf.get("id2label") or [0]) != 1:
        raise InputError(f"{path}: a classifier of {len(hf['id2label'])} classes; a preference model has one")


def rotary_settings(hf, path):
    """(base of the rotary positions' frequencies, their scaling or None) of a config.json. Versions of
    transformers from 5 on keep them together as rope_parameters, and go by rope_scaling where both are there;
    and by the outer one of two original_max_position_embeddings."""
    settings = hf.get("rope_scaling") or hf.get("rope_parameters") or {}
    if original := hf.get("original_max_position_embeddings"):
        settings = settings | {"original_max_position_embeddings": original}
    theta = settings.get("rope_theta", hf.get("rope_theta", 10000.0))
    kind = settings.get("rope_type") or settings.get("type") or "default"
    if kind == "default":
        return theta, None
    needed = {"linear": ["factor"], "llama3": ["factor", "low_freq_factor", "high_freq_factor",
                                               "original_max_position_embeddings"]}
    if kind not in needed:
        raise InputError(f"{path}: rotary positions scaled by {kind!r}, which cannot be computed here; "
                         "linear and llama3 can")
    return theta, {"rope_type": kind, **{name: float(settings[name]) for name in needed[kind]}}


def make_config(config, tokenizer):
    """The content of a config.json: a Config as transformers writes it, in the architecture it came in."""
    name = CLASS_NAMES[config.family]
    if config.value_head:
        head = {"architectures": [f"{name}ForSequenceClassification"], "num_labels": 1,
                "id2label": {"0": "reward"}, "label2id": {"reward": 0}}
    else:
        head = {"architectures": [f"{name}ForCausalLM"]}
    return {
        **head, "model_type": config.family, "hidden_size": config.d_model,
        "intermediate_size": config.d_ff, "num_hidden_layers": config.n_layer,
        "num_attention_heads": config.n_head, "num_key_value_heads": config.n_key_head,
        "head_dim": config.d_head, "vocab_size": config.vocab_size, "rope_theta": config.rope_theta,
        "rope_scaling": config.rope_scaling, "max_position_embeddings": config.ctx,
        "sliding_window": config.window, "use_sliding_window": config.window is not None,
        "rms_norm_eps": config.norm_eps, "tie_word_embeddings": config.tied, "hidden_act": "silu",
        "attention_bias": False, "mlp_bias": False, "bos_token_id": None,
        "eos_token_id": tokenizer.eos if config.value_head else tokenizer.ends,
        "pad_token_id": tokenizer.eot, "eoc_token_id": tokenizer.eoc, "torch_dtype": "float32"}


# ------------------------------------------------------------------------------------------------------------
# Weights


def weight_files(folder):
    """The safetensors files of a model folder: one, or the shards that an index names. Raises InputError
    where there are none."""
    folder = Path(folder)
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.is_file() or not index.is_file():
        if not single.is_file() and (pickled := sorted([*folder.glob("*.bin"), *folder.glob("*.pth")])):
            raise InputError(f"{pickled[0]}: pickled weights are not read, as loading them runs code from "
                             "the file; give the model with safetensors files (save_pretrained writes them)")
        return [single]
    names = read_json(index).get("weight_map")
    if not (isinstance(names, dict) and names and all(isinstance(name, str) for name in names.values())):
        raise InputError(f"{index}: damaged: its weight_map does not name the files of the weights")
    files = [folder / name for name in sorted(set(names.values()))]
    for file in files:
        if not file.is_file():
            raise InputError(f"{file}: missing, but {index.name} names it; fetch it again")
    return files


def read_weights(folder):
    """{name: tensor} of all weights in a model folder, in fp32, bf16 or fp16. They lie in the files: what is
    not looked at is not read. Raises InputError with the file."""
    state = {}
    for path in weight_files(folder):
        try:
            part = safetensors.torch.load_file(path)
        except (safetensors.SafetensorError, OSError) as error:
            raise InputError(f"{path}: missing or damaged ({error})") from None
        for name, tensor in part.items():
            if tensor.dtype not in (torch.float32, torch.bfloat16, torch.float16):
                raise InputError(f"{path}: {name} is of type {tensor.dtype}; fp32, bf16 and fp16 can be read")
            state[name] = tensor
    return state


def check_finite(path, name, tensor):
    """Raise InputError if a tensor of weights holds NaN or infinity, which would make every score wrong."""
    if not tensor.sum().isfinite():  # the sum of finite weights is finite, and takes no memory
        raise InputError(f"{path}: {name} holds numbers that are not finite: the file is damaged, or the "
                         "training that wrote it had diverged")


def write_weights(folder, state, writes=True):
    """Write {name: tensor} in fp32 as model.safetensors; if it is larger than SHARD_BYTES, as several files
    with an index. Tensors are gathered, if they are sharded, and written one after the other, so only one is in
    memory. All ranks of a sharded model call this together, and one of them `writes`."""
    files, sizes = [{}], [0]
    for name, tensor in state.items():
        if sizes[-1] and sizes[-1] + 4 * tensor.numel() > SHARD_BYTES:
            files.append({})
            sizes.append(0)
        files[-1][name] = tensor
        sizes[-1] += 4 * tensor.numel()
    names = ["model.safetensors"]
    if len(files) > 1:
        names = [f"model-{i + 1:05}-of-{len(files):05}.safetensors" for i in range(len(files))]
        places = {name: file for file, tensors in zip(names, files) for name in tensors}
        index = {"metadata": {"total_size": sum(sizes)}, "weight_map": places}
        if writes:
            write_file(Path(folder) / "model.safetensors.index.json", json.dumps(index, indent=1))
    for file, tensors in zip(names, files):
        with open(Path(folder) / file if writes else os.devnull, "wb") as out:
            out.write(safetensors_header(tensors))
            for tensor in tensors.values():
                out.write(whole(tensor).to("cpu", torch.float32).contiguous().numpy())


def safetensors_header(tensors):
    """The bytes before the numbers in a safetensors file of these tensors in fp32: the length of a JSON text,
    and this text, which says where the numbers of each are."""
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for name, tensor in tensors.items():
        begin, end = end, end + 4 * tensor.numel()
        header[name] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-(8 + len(text)) % 64)  # numbers begin where torch begins its own, for BLAS to be as fast
    return len(text).to_bytes(8, "little") + text
