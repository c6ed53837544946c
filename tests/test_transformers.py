"""A checkpoint is a Hugging Face model folder: transformers loads it and computes the same. Skipped where transformers is absent."""
import pytest
import torch

import checkpoint
from data.tokenizer import get_tokenizer
from model import GPT, Config

transformers = pytest.importorskip("transformers")


def saved(tmp_path, *, value_head, tied):
    """(model, folder) of a run that was saved once and finished; the norms' weights are random too."""
    tokenizer = get_tokenizer("bytes")
    config = Config(n_layer=3, d_model=96, n_head=3, vocab_size=tokenizer.vocab_size, ctx=64, tied=tied, value_head=value_head,
                    rope_theta=5000.0, norm_eps=1e-3)  # not transformers' defaults
    model = GPT(config).init_weights(seed=1)
    generator = torch.Generator().manual_seed(2)
    for p in model.parameters():
        p.data += 0.1 * torch.randn(p.shape, generator=generator)
    meta = {"kind": "pm" if value_head else "lm", "step": 1, "n_steps": 1}
    checkpoint.save(tmp_path / "run", model, tokenizer, meta, {"optimizer": {}, "step": 1})
    checkpoint.finish(tmp_path / "run")
    return model, tmp_path / "run"


def load(kind, folder, may_ignore=()):
    """The model as transformers loads it, with nothing missing or drawn anew, and nothing left over but `may_ignore`."""
    model, info = kind.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    info["unexpected_keys"] -= set(may_ignore)
    assert not any(info.values()), f"transformers reports {info}"
    return model.eval()


@pytest.mark.parametrize("tied", [True, False])
def test_a_language_model_gives_the_same_logits(tmp_path, tied):
    model, folder = saved(tmp_path, value_head=False, tied=tied)
    tokens = torch.randint(model.config.vocab_size, (4, model.config.ctx), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        theirs = load(transformers.LlamaForCausalLM, folder)(tokens).logits
        torch.testing.assert_close(model.logits(model(tokens)), theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("tied", [True, False])
def test_a_preference_model_gives_the_same_rewards(tmp_path, tied):
    model, folder = saved(tmp_path, value_head=True, tied=tied)
    eot = checkpoint.load(folder)[1].eot
    lengths = torch.tensor([64, 40, 7, 1])
    tokens = torch.randint(eot, (4, 64), generator=torch.Generator().manual_seed(4))
    padding = torch.arange(64) >= lengths[:, None]
    tokens[padding] = eot  # transformers reads the reward at the last token that is not the padding token
    with torch.no_grad():
        # An untied PM keeps its output layer for --lm_weight; transformers' classifier has no place for one.
        judge = load(transformers.LlamaForSequenceClassification, folder, may_ignore=() if tied else ["lm_head.weight"])
        theirs = judge(tokens, attention_mask=(~padding).long()).logits
        ours = model.rewards(model(tokens)[torch.arange(4), lengths - 1])
    torch.testing.assert_close(ours, theirs.squeeze(-1), rtol=1e-5, atol=1e-5)
