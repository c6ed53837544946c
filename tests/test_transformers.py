"""Every checkpoint is a Hugging Face folder: transformers loads its tokenizer and its model, in the architecture
that the run began with, and computes the same. Skipped where transformers is absent."""
import json
import stat

import pytest
import safetensors.torch
import torch
from conftest import ROOT, alone, run_well
from test_pretrained import CHATML, FAMILY, LLAMA2, make_theirs, write_folder, write_tokenizer

import checkpoint
from data.tokenizer import get_tokenizer
from formats import hf_folder
from model import GPT, Config

transformers = pytest.importorskip("transformers", minversion="5")

TEXTS = ["", "It's 12 o'clock.", "  naïve café 😀\n\n\tx  ", "\n\nHuman: Who are you?\n\nAssistant: I'm 1,234 years old."]


def written(out, model, tokenizer, kind):
    """The folder of a run that was saved once and finished."""
    meta = {"kind": kind, "objective": "any", "step": 1, "n_steps": 1, "metrics": {}, "flags": {}, "data": "",
            "trained_on": []}
    checkpoint.save(out, model.config, model.state_dict(), tokenizer, meta, {"optimizer": {}, "step": 1})
    checkpoint.finish(out)
    return out


def our_model(tied, value_head):
    """A model of this project with settings that are not transformers' defaults; its norms are random too."""
    tokenizer = get_tokenizer("bytes")
    config = Config(n_layer=3, d_model=96, n_head=3, vocab_size=tokenizer.vocab_size, ctx=64, tied=tied,
                    value_head=value_head, rope_theta=5000.0, norm_eps=1e-3)
    model = GPT(config).init_weights(seed=1)
    generator = torch.Generator().manual_seed(2)
    for p in model.parameters():
        p.data += 0.1 * torch.randn(p.shape, generator=generator)
    return model, tokenizer


@pytest.fixture(params=["tied", "untied", *FAMILY])
def start(request, tmp_path):
    """A function: True for a preference model -> (a model, its tokenizer), ours or one of somebody else's."""
    if request.param in FAMILY:
        folder = write_folder(make_theirs(request.param), tmp_path / "theirs")
        return lambda value_head: checkpoint.load(folder, value_head)[:2]
    return lambda value_head: our_model(request.param == "tied", value_head)


def load(kind, folder, may_ignore=()):
    """The model as transformers loads it, with nothing missing, drawn anew or left over but `may_ignore`."""
    model, info = kind.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    info["unexpected_keys"] = set(info["unexpected_keys"]) - set(may_ignore)
    assert not any(info.values()), f"transformers reports {info}"
    return model.eval()


def same(ours, theirs):
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5 * max(1, theirs.abs().max()))


@torch.no_grad()
def test_a_language_model_gives_the_same_logits(tmp_path, start):
    model, tokenizer = start(False)
    folder = written(tmp_path / "run", model, tokenizer, "lm")
    theirs = load(transformers.AutoModelForCausalLM, folder)
    assert theirs.config.model_type == model.config.family
    tokens = torch.randint(tokenizer.n_vocab, (4, 60), generator=torch.Generator().manual_seed(3))
    same(model.logits(model(tokens)), theirs(tokens).logits)
    words = transformers.AutoTokenizer.from_pretrained(folder)
    for text in TEXTS:
        assert words(text).input_ids == tokenizer.encode(text).tolist() and words.decode(words(text).input_ids) == text
    assert (words.eos_token_id, words.pad_token_id) == (tokenizer.eos, tokenizer.eot)
    # An imitation model ends its answers with <eoc>.
    assert set(theirs.generation_config.eos_token_id) == {tokenizer.eos, tokenizer.eot, tokenizer.eoc}


def rewards_by_transformers(folder, context, completions):
    """What docs/serving.md shows."""
    document = (ROOT / "docs" / "serving.md").read_text()
    names = {}
    exec(document.split("```python\n")[1].split("```")[0], names)
    return names["rewards"](folder, context, completions)


@torch.no_grad()
@pytest.mark.parametrize("context", TEXTS)
def test_a_preference_model_gives_the_same_rewards(tmp_path, context):
    """The ten lines of docs/serving.md, with texts as they come."""
    model, tokenizer = our_model(tied=True, value_head=True)
    model.config.ctx = 128
    folder = written(tmp_path / "run", model, tokenizer, "pm")
    ours = [alone(model, tokenizer, context, text)[0] for text in TEXTS]
    same(torch.tensor(ours), rewards_by_transformers(folder, context, TEXTS))


@torch.no_grad()
def test_a_preference_model_of_any_family_gives_the_same_rewards(tmp_path, start):
    model, tokenizer = start(True)
    folder = written(tmp_path / "run", model, tokenizer, "pm")
    # An untied PM keeps its output layer for --lm_weight; transformers' classifier has no place for one.
    judge = load(transformers.AutoModelForSequenceClassification, folder, ["lm_head.weight"])
    assert judge.config.model_type == model.config.family
    words = transformers.AutoTokenizer.from_pretrained(folder)
    batch = words(["ab", "a"], ["1", "cdefg"], padding=True, return_tensors="pt")
    ours = model(batch.input_ids)[torch.arange(2), batch.attention_mask.sum(1) - 1]
    assert (batch.input_ids == tokenizer.eoc).sum(1).tolist() == [1, 1]
    same(model.rewards(ours), judge(**batch).logits.squeeze(-1))
    assert words("ab").input_ids[-1] == tokenizer.eoc  # a single text gets its <eoc> too


PHI = ("{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
       "{% if add_generation_prompt %}<|im_start|>assistant\n{% else %}{{ eos_token }}{% endif %}")
DATED = "{% if strftime_now is defined %}{{ strftime_now('%d %b %Y') }}{% else %}26 Jul 2024{% endif %}\n" + CHATML
TALK = "\n\nHuman: Who are you?\n\nAssistant: I.\n\nHuman: And?\n\nAssistant:"


@torch.no_grad()
@pytest.mark.parametrize("template", [None, CHATML, LLAMA2, PHI, DATED])
def test_dialogues_of_messages_get_the_same_rewards(tmp_path, template):
    """By apply_chat_template, which servers use too: plain dialogues, or trained by the model's own template."""
    folder = write_folder(make_theirs("SmolLM2"), tmp_path / "theirs")
    write_tokenizer(folder, specials=("<|im_start|>", "<|im_end|>", "<s>"), chat_template=template, bos_token="<s>",
                    eos_token="<|endoftext|>" if template is PHI else "<|im_end|>")
    model, tokenizer, _ = checkpoint.load(folder, True)
    if template:
        tokenizer.use_chat()
    written(tmp_path / "run", model, tokenizer, "pm")
    again = checkpoint.load(tmp_path / "run")[1]
    assert (again.template, again.key) == (tokenizer.template, tokenizer.key)
    words = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path / "run")
    judge = load(transformers.AutoModelForSequenceClassification, tmp_path / "run")
    for answer in ("A lamp.", "Go away."):
        context, completion = tokenizer.parts(TALK, [" " + answer])
        messages = [{"role": role, "content": content} for role, content in (
            ("user", "Who are you?"), ("assistant", "I."), ("user", "And?"), ("assistant", answer))]
        batch = words.apply_chat_template(messages, return_dict=True, return_tensors="pt")
        same(torch.tensor(alone(model, tokenizer, context, completion)[0]), judge(**batch).logits.squeeze())
    lm = checkpoint.load(tmp_path / "run", value_head=False)[0]
    written(tmp_path / "lm", lm, tokenizer, "lm")
    assert checkpoint.load(tmp_path / "lm")[1].template == template  # a language model has its own again


@torch.no_grad()
def test_the_ten_lines_read_the_tokenizer_as_it_stands(tmp_path):
    """AutoTokenizer splits a Qwen2 model's digits, whatever its tokenizer.json says."""
    folder = write_folder(make_theirs("Qwen2"), tmp_path / "theirs")
    spec = json.loads((folder / "tokenizer.json").read_text())
    *_, (last, number) = sorted(spec["model"]["vocab"].items(), key=lambda item: item[1])
    del spec["model"]["vocab"][last]
    spec["model"]["vocab"]["12"], spec["model"]["merges"][-1] = number, ["1", "2"]
    (folder / "tokenizer.json").write_text(json.dumps(spec))
    model, tokenizer, _ = checkpoint.load(folder, True)
    assert tokenizer.encode("12").tolist() == [number]
    ours = [alone(model, tokenizer, "How many?", text)[0] for text in (" 12", " 3")]
    written(tmp_path / "run", model, tokenizer, "pm")
    same(torch.tensor(ours), rewards_by_transformers(tmp_path / "run", "How many?", [" 12", " 3"]))


@pytest.mark.parametrize("name", ["SmolLM2", "Qwen2", "Mistral"])
def test_weights_that_were_not_trained_come_back_bit_for_bit(tmp_path, name):
    theirs = make_theirs(name)
    folder = write_folder(theirs, tmp_path / "theirs")
    model, tokenizer, _ = checkpoint.load(folder)
    back = load(transformers.AutoModelForCausalLM, written(tmp_path / "run", model, tokenizer, "lm")).state_dict()
    for name, weight in theirs.state_dict().items():
        assert torch.equal(back[name][:len(weight)], weight), name
    again = checkpoint.load(tmp_path / "run")[0]
    assert vars(again.config) == vars(model.config)
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), model.parameters(), strict=True))


def test_an_output_layer_that_a_preference_model_does_not_use_stays_as_it_was(tmp_path, comparisons_file):
    theirs = make_theirs("Llama 3")
    folder = write_folder(theirs, tmp_path / "theirs")
    run_well("train_pm.py", "--init", folder, "--data", comparisons_file, "--steps", 2, "--batch", 4, "--lr", 0.01,
             "--out", tmp_path / "pm")
    trained = safetensors.torch.load_file(tmp_path / "pm/model.safetensors")
    layer, table = theirs.lm_head.weight, theirs.model.embed_tokens.weight
    assert torch.equal(trained["lm_head.weight"][:len(layer)], layer)
    assert not torch.equal(trained["model.embed_tokens.weight"][:len(table)], table)


def test_a_large_model_is_written_in_shards_that_all_can_read(tmp_path, monkeypatch):
    monkeypatch.setattr(hf_folder, "SHARD_BYTES", 200_000)
    model, tokenizer = our_model(tied=False, value_head=False)
    folder = written(tmp_path / "run", model, tokenizer, "lm")
    shards = sorted(path.name for path in folder.glob("model*"))
    assert len(shards) > 3 and shards[-1] == "model.safetensors.index.json"
    assert shards[0] == f"model-00001-of-{len(shards) - 1:05}.safetensors"
    assert all(stat.S_IMODE(path.stat().st_mode) == 0o644 for path in folder.iterdir())
    load(transformers.AutoModelForCausalLM, folder)
    again = checkpoint.load(folder)[0]
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), model.parameters(), strict=True))


def test_the_ids_of_special_tokens_stand_in_the_files(tmp_path):
    model, tokenizer = our_model(tied=True, value_head=True)
    folder = written(tmp_path / "run", model, tokenizer, "pm")
    assert json.loads((folder / "config.json").read_text())["eoc_token_id"] == tokenizer.eoc == 257
    assert json.loads((folder / "meta.json").read_text())["eoc_token_id"] == 257
