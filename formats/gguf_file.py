"""Models in GGUF files, llama.cpp's form: config, weights and tokenizer in one file, usually quantised.

`read` gives what a Hugging Face folder would hold: the content of its config.json, the weights in fp32 under
their names there, and the contents of its tokenizer.json and tokenizer_config.json. It needs the `gguf`
package.
"""

import numpy as np
import torch

from data.errors import InputError
from data.tokenizer_json import byte_level_json, merges_by_score, sentencepiece_json, special_json
from formats.hf_folder import check_finite
from formats.rope_scaling import scaled_frequencies

ARCHITECTURES = ("llama", "qwen2", "qwen3")  # a Mistral model calls itself llama here
NAMES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
NAMES_IN_LAYER = {
    "attn_norm": "input_layernorm", "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj", "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm", "ffn_norm": "post_attention_layernorm", "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj"}
# How a byte-level BPE splits text before it merges, by the name that the file has for it ("pre").
SPLITS = {"smollm": "digits", "gpt-2": "gpt2", "llama-bpe": "llama3", "qwen2": "qwen2"}
CONTROL, USER_DEFINED = 3, 4  # the types of tokens such as <|endoftext|>, and such as <think>


def read(path):
    """(config.json, {name: fp32 tensor}, tokenizer.json, tokenizer_config.json) of a GGUF file; all but the
    weights as they would be read from JSON. Raises InputError with the file."""
    try:
        import gguf
    except ImportError:
        raise InputError(f"{path}: reading GGUF files needs one more package: pip install gguf") from None
    try:
        reader = gguf.GGUFReader(path)
        fields = {name: field.contents() for name, field in reader.fields.items()}
    except Exception as error:  # the package raises a different type for each way a file can be damaged
        why = f"{type(error).__name__}: {str(error)[:100]}"
        raise InputError(f"{path}: not a whole GGUF file ({why}); fetch it again") from None
    if reader.byte_order != "I":  # the package would take its numbers for this machine's
        raise InputError(f"{path}: its bytes are in another order than this machine's; fetch a little-endian "
                         "file")
    try:
        tensors = {tensor.name: tensor for tensor in reader.tensors}
        hf = config_json(fields, tensors, path)
        state = {}
        for name, tensor in tensors.items():
            if name == "rope_freqs.weight":  # is part of the config
                continue
            if tensor.data.size and tensor.data.nbytes < tensor.n_bytes:
                raise ValueError(f"{name} is cut")
            weight = torch.from_numpy(np.array(gguf.dequantize(tensor.data, tensor.tensor_type), np.float32))
            if hf["model_type"] == "llama" and name.split(".")[2:3] in (["attn_q"], ["attn_k"]):
                is_q = "attn_q" in name
                weight = unpermuted(weight, hf["num_attention_heads" if is_q else "num_key_value_heads"])
            check_finite(path, name, weight)
            state[hf_name(name)] = weight
        return hf, state, *tokenizer_json(fields, path)
    except (KeyError, ValueError, IndexError, TypeError, AttributeError, ArithmeticError,
            NotImplementedError) as error:
        why = f"{type(error).__name__}: {str(error)[:100]}"
        raise InputError(f"{path}: not a GGUF file that can be read here ({why})") from None


def hf_name(name):
    """The name in transformers of a tensor, such as blk.0.attn_q.weight; an unknown one stays as it is."""
    *place, kind, suffix = name.split(".")
    if not place:
        return f"{NAMES.get(kind, kind)}.{suffix}"
    return f"model.layers.{place[-1]}.{NAMES_IN_LAYER.get(kind, kind)}.{suffix}"


def unpermuted(weight, n_heads):
    """The rows of q and k in transformers' order. llama.cpp turns the pairs (x_2i, x_2i+1) of a head by their
    position's angle, transformers (x_i, x_i+D/2), and the file has the rows in the former order."""
    return weight.unflatten(0, (n_heads, -1, 2)).transpose(1, 2).flatten(0, 2).contiguous()


def config_json(fields, tensors, path):
    """What a config.json would say. KeyError for a field that is missing."""
    architecture = fields.get("general.architecture")

    def get(name, *default):
        key = f"{architecture}.{name}"
        return fields.get(key, *default) if default else fields[key]

    if architecture not in ARCHITECTURES or get("expert_count", 0):
        is_known = architecture in ARCHITECTURES
        kind = "a mixture of experts" if is_known else f"the architecture {architecture!r}"
        raise InputError(f"{path}: holds {kind}, which cannot be read; the Llama family can be: "
                         f"{', '.join(ARCHITECTURES)} (Mistral is llama there)")
    n_head = get("attention.head_count")
    d_head = get("attention.key_length", get("embedding_length") // n_head)
    if get("rope.dimension_count", d_head) != d_head:
        raise InputError(f"{path}: rotary positions on a part of each head, which cannot be computed here")
    window = get("attention.sliding_window", None)
    factor = get("rope.scaling.factor", get("rope.scale_linear", 1.0)) or 1.0
    scaled = get("rope.scaling.type", "linear") if factor != 1 else "none"
    return {
        "model_type": architecture, "architectures": [], "num_hidden_layers": get("block_count"),
        "hidden_size": get("embedding_length"), "intermediate_size": get("feed_forward_length"),
        "num_attention_heads": n_head, "num_key_value_heads": get("attention.head_count_kv", n_head),
        "head_dim": d_head, "vocab_size": int(tensors["token_embd.weight"].shape[1]),
        "max_position_embeddings": get("context_length"),
        "rms_norm_eps": get("attention.layer_norm_rms_epsilon"),
        "sliding_window": window, "use_sliding_window": window is not None,
        "tie_word_embeddings": "output.weight" not in tensors, "rope_theta": get("rope.freq_base", 10000.0),
        "rope_scaling": rope_scaling(scaled, factor, tensors.get("rope_freqs.weight"),
                                     get("rope.freq_base", 10000.0), path),
        "is_causal": get("attention.causal", True)}


def rope_scaling(kind, factor, divisors, theta, path):
    """rope_scaling as a config.json has it. Llama 3's stands in the file as one divisor for each frequency;
    it is recognised by computing the divisors again from the settings that Llama 3.1 to 3.3 have."""
    if divisors is not None:
        divisors = torch.from_numpy(np.array(divisors.data, np.float32))
        frequencies = theta ** (-torch.arange(len(divisors)) / len(divisors))
        settings = {"rope_type": "llama3", "factor": round(float(divisors.max()), 3), "low_freq_factor": 1.0,
                    "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
        computed = frequencies / scaled_frequencies(frequencies, settings)
        if kind != "none" or not torch.allclose(computed, divisors, rtol=1e-3):
            raise InputError(f"{path}: rotary positions scaled in another way than Llama 3's, which cannot "
                             "be computed here; give the model as a Hugging Face folder")
        return settings
    return None if kind == "none" else {"rope_type": kind, "factor": factor}


def tokenizer_json(fields, path):
    """(tokenizer.json, tokenizer_config.json) from the lists in the file."""
    tokens, kinds = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    specials = {token: i for i, (token, kind) in enumerate(zip(tokens, kinds)) if kind == CONTROL}
    vocab = {token: i for i, token in enumerate(tokens)}
    model, split = fields["tokenizer.ggml.model"], fields.get("tokenizer.ggml.pre")
    if model == "gpt2" and split in SPLITS:
        merges = [merge.split(" ") for merge in fields["tokenizer.ggml.merges"]]
        spec = byte_level_json(vocab, merges, specials, SPLITS[split], ignore_merges=split == "llama-bpe")
        if split == "qwen2":  # the file does not say it
            spec["normalizer"] = {"type": "NFC"}
    elif model == "llama":
        scores = {token: score for token, score, kind in zip(tokens, fields["tokenizer.ggml.scores"], kinds)
                  if kind != CONTROL}
        spec = sentencepiece_json(vocab, merges_by_score(vocab, scores), specials)
    else:
        raise InputError(f"{path}: a tokenizer of the kind {model}, {split}, which cannot be read; give the "
                         "model as a Hugging Face folder")
    spec["added_tokens"] += [{**special_json(token, i), "special": False}
                             for i, (token, kind) in enumerate(zip(tokens, kinds)) if kind == USER_DEFINED]
    spec["added_tokens"].sort(key=lambda token: token["id"])
    settings = {}
    for name in ("bos", "eos"):
        if (number := fields.get(f"tokenizer.ggml.{name}_token_id")) is not None:
            settings[f"{name}_token"] = tokens[number]
    if template := fields.get("tokenizer.chat_template"):
        settings["chat_template"] = template
    return spec, settings
