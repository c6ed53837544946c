"""Models of the Llama family from Hugging Face folders and GGUF files: they compute what transformers computes,
in every way that a row can be laid out. transformers makes them here, with random weights."""
import copy
import json

import numpy as np
import pytest
import torch
from conftest import DATA

import checkpoint
import gguf_file
from data.packing import Layout
from data.tokenizer_json import CHAR_OF, byte_level_json
from model import Cache, read

transformers = pytest.importorskip("transformers", minversion="5")

SHAPE = {"hidden_size": 48, "intermediate_size": 112, "num_hidden_layers": 3, "num_attention_heads": 6,
         "max_position_embeddings": 256, "vocab_size": 300, "rms_norm_eps": 1e-4, "bos_token_id": None,
         "eos_token_id": 0, "pad_token_id": None}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 32, "rope_theta": 500000.0}
FAMILY = {  # model_type and what differs from SHAPE
    "Llama 1": ("llama", {"num_key_value_heads": 6}),
    "Llama 2, linear scaling": ("llama", {"num_key_value_heads": 6, "rope_parameters": {
        "rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}}),
    "Llama 3": ("llama", {"num_key_value_heads": 2, "rope_parameters": LLAMA3}),
    "TinyLlama": ("llama", {"num_key_value_heads": 1}),
    "SmolLM2": ("llama", {"num_key_value_heads": 2, "tie_word_embeddings": True, "rope_parameters": {
        "rope_type": "default", "rope_theta": 100000.0}}),
    "heads of their own width": ("llama", {"num_key_value_heads": 3, "head_dim": 12}),
    "Mistral": ("mistral", {"num_key_value_heads": 2, "head_dim": 10, "sliding_window": 128}),
    "Qwen2": ("qwen2", {"num_key_value_heads": 2, "tie_word_embeddings": True}),
    "Qwen3": ("qwen3", {"num_key_value_heads": 2, "head_dim": 16}),
}


def make_theirs(name, seed=0):
    """A random model of transformers; norms and biases are random too, so that nothing is equal by chance."""
    kind, settings = FAMILY[name]
    config = transformers.AutoConfig.for_model(kind, **{**SHAPE, **settings})
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.2 * torch.randn(p.shape, generator=generator))
    return model


def write_tokenizer(folder, n=300, **settings):
    """A byte-level BPE of n tokens, of which the first ends a text, as somebody else's folder has it."""
    tokens = ["<|endoftext|>", *CHAR_OF.values()]
    merges = [(a, b) for a in "etaoin" for b in "srhldu"] + [("Ġ", a) for a in "etaoinsrhl"]
    merges = merges[:n - len(tokens)]
    vocab = {token: i for i, token in enumerate(tokens + [a + b for a, b in merges])}
    spec = byte_level_json(vocab, merges, {"<|endoftext|>": 0})
    (folder / "tokenizer.json").write_text(json.dumps(spec))
    settings = {"eos_token": "<|endoftext|>", "tokenizer_class": "PreTrainedTokenizerFast", **settings}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def write_folder(model, folder, **how):
    model.save_pretrained(folder, **how)
    write_tokenizer(folder)
    return folder


def random_tokens(*shape, seed=1):
    return torch.randint(1, 300, shape, generator=torch.Generator().manual_seed(seed))


def same(ours, theirs):
    torch.testing.assert_close(ours[..., :theirs.shape[-1]], theirs, rtol=1e-5, atol=1e-5 * theirs.abs().max())


@torch.no_grad()
def compare_all_ways(ours, theirs):
    """Causal, a packed row, token by token, and a packed row behind a prompt."""
    tokens, prompt = random_tokens(2, 90), random_tokens(30, seed=2)
    same(ours.logits(ours(tokens)), theirs(tokens).logits)

    parts = list(random_tokens(40, seed=3).split([9, 8, 3, 13, 7]))  # a context, 2 completions; the same again
    layout = Layout([len(part) for part in parts], [0, 0, 0, 3, 3])
    hidden = ours(torch.cat(parts), layout)
    prefix = read(ours, prompt)[0].as_prefix()
    behind = ours(torch.cat(parts), layout, prefix)
    for i, parent in ((1, 0), (2, 0), (4, 3)):
        alone = torch.cat([parts[parent], parts[i]])
        place = slice(layout.starts[i], layout.starts[i + 1])
        same(ours.logits(hidden[place]), theirs(alone[None]).logits[0, -len(parts[i]):])
        alone = torch.cat([prompt, alone])
        same(ours.logits(behind[place]), theirs(alone[None]).logits[0, -len(parts[i]):])

    cache, text = Cache(12), random_tokens(1, 12, seed=4)
    step_by_step = torch.cat([ours(text[:, i:i + 1], cache=cache) for i in range(12)], 1)
    same(ours.logits(step_by_step), theirs(text).logits)
    assert cache.stored[0].shape[2] == ours.config.n_key_head  # keys are not copied for each head of queries


@pytest.mark.parametrize("plain", [False, True], ids=["fast", "by definition"])
@pytest.mark.parametrize("name", FAMILY)
def test_logits_equal_those_of_transformers(tmp_path, name, plain):
    theirs = make_theirs(name)
    ours, tokenizer, meta = checkpoint.load(write_folder(theirs, tmp_path / "model"))
    ours.plain = plain
    compare_all_ways(ours, theirs)
    assert meta["kind"] == "lm" and (tokenizer.eot, tokenizer.eoc) == (0, 300)


def test_half_precision_and_shards_are_read(tmp_path):
    theirs = make_theirs("Llama 3")
    for p in theirs.parameters():
        p.data = p.data.bfloat16().float()
    folder = write_folder(copy.deepcopy(theirs).bfloat16(), tmp_path / "model", max_shard_size="100KB")
    assert len(list(folder.glob("model-*.safetensors"))) == 2
    compare_all_ways(checkpoint.load(folder)[0], theirs)


@pytest.mark.parametrize("name, rows", [("SmolLM2", 300), ("Llama 1", 320)])
def test_eoc_gets_a_new_row_or_an_unused_one(tmp_path, monkeypatch, name, rows):
    """It is the mean of the rows before it, in both tables where there are two."""
    monkeypatch.setitem(SHAPE, "vocab_size", rows)
    theirs = make_theirs(name)
    ours, tokenizer, _ = checkpoint.load(write_folder(theirs, tmp_path / "model"))
    assert tokenizer.eoc == 300 and ours.config.vocab_size == (rows if rows > 300 else 320)
    for table, before in ((ours.model.embed_tokens.weight, theirs.get_input_embeddings().weight),
                          (ours.unembedding, theirs.get_output_embeddings().weight)):
        assert torch.equal(table[:300], before[:300])
        torch.testing.assert_close(table[300], before[:300].mean(0))


def test_a_window_bounds_the_context(tmp_path):
    folder = write_folder(make_theirs("Mistral"), tmp_path / "model")
    assert checkpoint.load(folder)[0].config.ctx == 128


# ------------------------------------------------------------------------------------------------------------
# GGUF


def write_gguf(path, theirs, kind="F32", pre="gpt-2", **changes):
    """The file that llama.cpp's converter would write of a model, with its matrices of this kind."""
    gguf = pytest.importorskip("gguf")
    config = theirs.config
    family = "llama" if config.model_type == "mistral" else config.model_type
    writer = gguf.GGUFWriter(path, family)
    rope = config.rope_parameters
    fields = {
        "block_count": config.num_hidden_layers, "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size, "feed_forward_length": config.intermediate_size,
        "head_count": config.num_attention_heads, "head_count_kv": config.num_key_value_heads,
        "rope_freq_base": rope["rope_theta"], "layer_norm_rms_eps": config.rms_norm_eps, **changes}
    for name, value in fields.items():
        getattr(writer, f"add_{name}")(value)
    d_head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_key_length(d_head)
    if rope["rope_type"] == "llama3":
        frequencies = rope["rope_theta"] ** (-torch.arange(d_head // 2) / (d_head // 2))
        writer.add_tensor("rope_freqs.weight", (frequencies / theirs.model.rotary_emb.inv_freq).numpy())
    tokens = ["<|endoftext|>", *CHAR_OF.values(), *(f"Ġ{i}" for i in range(43))]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types([3] + [1] * 299)
    writer.add_token_merges(["Ġ 1", "Ġ 2"])
    writer.add_eos_token_id(0)
    names = {theirs_name: gguf_name for gguf_name, theirs_name in [
        *gguf_file.NAMES.items(), *gguf_file.NAMES_IN_LAYER.items()]}
    for name, weight in theirs.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        short, suffix = name.rsplit(".", 1)
        if short.startswith("model.layers."):
            _, _, layer, short = short.split(".", 3)
            new = f"blk.{layer}.{names[short]}.{suffix}"
        else:
            new = f"{names[short]}.{suffix}"
        if family == "llama" and short.endswith(("q_proj", "k_proj")):  # as llama.cpp's converter permutes
            weight = weight.unflatten(0, (-1, 2, d_head // 2)).transpose(1, 2).flatten(0, 2)
        qtype = gguf.GGMLQuantizationType[kind if weight.dim() == 2 else "F32"]
        writer.add_tensor(new, gguf.quantize(weight.float().numpy(), qtype), raw_dtype=qtype)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("name", ["Llama 1", "Llama 3", "SmolLM2", "Mistral", "Qwen2", "Qwen3"])
def test_a_gguf_file_gives_the_logits_of_the_model_that_it_was_made_from(tmp_path, monkeypatch, name):
    if name == "Llama 3":  # the file has no room for other settings than the published ones
        monkeypatch.setitem(LLAMA3, "original_max_position_embeddings", 8192)
    theirs = make_theirs(name)
    ours, tokenizer, meta = checkpoint.load(write_gguf(tmp_path / "model.gguf", theirs))
    compare_all_ways(ours, theirs)
    assert meta["kind"] == "lm" and (tokenizer.eot, tokenizer.eoc, ours.config.vocab_size) == (0, 300, 320)
    assert tokenizer.decode(tokenizer.encode("It's 12 ½!")) == "It's 12 ½!"


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q8_0", "Q4_0", "Q4_1"])
def test_quantised_weights_are_what_the_gguf_package_makes_of_them(tmp_path, monkeypatch, kind):
    gguf = pytest.importorskip("gguf")
    monkeypatch.setitem(SHAPE, "hidden_size", 96)
    monkeypatch.setitem(SHAPE, "intermediate_size", 128)
    theirs = make_theirs("SmolLM2")
    ours, *_ = checkpoint.load(write_gguf(tmp_path / "model.gguf", theirs, kind))
    qtype = gguf.GGMLQuantizationType[kind]
    for name in ("self_attn.v_proj", "mlp.down_proj"):
        weight = theirs.get_submodule(f"model.layers.1.{name}").weight.detach().numpy()
        expected = torch.from_numpy(gguf.dequantize(gguf.quantize(weight, qtype), qtype))
        got = ours.model.layers[1].get_submodule(name).weight
        assert torch.equal(got, expected) and 0 < (got - torch.from_numpy(weight)).abs().max() < 0.2


@pytest.mark.parametrize("kind, n_bytes", [("Q4_K", 144), ("Q6_K", 210)])
def test_weights_in_blocks_of_256_are_read(tmp_path, kind, n_bytes):
    """The package cannot make these kinds, so the blocks are random bytes, with scales that are numbers."""
    gguf = pytest.importorskip("gguf")
    theirs, rng = make_theirs("SmolLM2"), np.random.default_rng(0)
    blocks = rng.integers(0, 256, (48, n_bytes), np.uint8)
    scale = slice(-2, None) if kind == "Q6_K" else slice(0, 2)
    blocks[:, scale] = np.frombuffer(np.float16(0.01).tobytes(), np.uint8)
    if kind == "Q4_K":
        blocks[:, 2:4] = np.frombuffer(np.float16(0.02).tobytes(), np.uint8)
    qtype, quantize = gguf.GGMLQuantizationType[kind], gguf.quantize
    theirs.config.intermediate_size = 256
    for layer in theirs.model.layers:
        for name, shape in (("gate_proj", (256, 48)), ("up_proj", (256, 48)), ("down_proj", (48, 256))):
            setattr(layer.mlp, name, torch.nn.Linear(*shape[::-1], bias=False))

    def quantized(weight, kind):
        return blocks if weight.shape == (48, 256) else quantize(weight, kind)
    writer = gguf.GGUFWriter.add_tensor

    def add_tensor(self, name, tensor, raw_dtype=None):
        writer(self, name, tensor, raw_dtype=qtype if tensor is blocks else raw_dtype)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gguf, "quantize", quantized)
        patch.setattr(gguf.GGUFWriter, "add_tensor", add_tensor)
        write_gguf(tmp_path / "model.gguf", theirs)
    got = checkpoint.load(tmp_path / "model.gguf")[0].model.layers[0].mlp.down_proj.weight
    assert torch.equal(got, torch.from_numpy(gguf.dequantize(blocks, qtype))) and got.isfinite().all()
