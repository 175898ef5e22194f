"""models/gpt.py: the same logits however they are asked for, and files that come back."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from shoestring.errors import ConfigError
from shoestring.methods.reversible import is_reversible
from shoestring.models.gpt import GPT, GPTConfig

RULES = ["residual", "feistel", "bdia"]


def tiny(rule: str = "residual", **kwargs: object) -> GPT:
    torch.manual_seed(0)
    shape = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 3}
    return GPT(GPTConfig(**shape, num_attention_heads=4, rule=rule, **kwargs)).eval()


def tokens(batch: int = 2, length: int = 12) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, 64, (batch, length), generator=generator)


@pytest.mark.parametrize("rule", RULES)
def test_logits_with_a_cache_match_those_without(rule: str) -> None:
    model, ids = tiny(rule), tokens()
    with torch.no_grad():
        whole = model(ids, use_cache=False).logits
        first = model(ids[:, :7], use_cache=True)
        rest = model(ids[:, 7:], past_key_values=first.past_key_values, use_cache=True)
    torch.testing.assert_close(torch.cat([first.logits, rest.logits], 1), whole)


@pytest.mark.parametrize("rule", RULES)
def test_left_padding_does_not_change_the_logits_of_real_tokens(rule: str) -> None:
    model, ids = tiny(rule), tokens()
    padded = torch.cat([torch.zeros(2, 3, dtype=torch.long), ids], dim=1)
    mask = torch.cat([torch.zeros(2, 3), torch.ones(2, 12)], dim=1).long()
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        expected = model(ids).logits
        got = model(padded, attention_mask=mask, position_ids=positions).logits[:, 3:]
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("rule", RULES)
def test_generate_with_a_cache_matches_generate_without(rule: str) -> None:
    model, ids = tiny(rule), tokens()
    kwargs = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    mask = torch.ones_like(ids)
    cached = model.generate(ids, attention_mask=mask, use_cache=True, **kwargs)
    plain = model.generate(ids, attention_mask=mask, use_cache=False, **kwargs)
    assert torch.equal(cached, plain)


@pytest.mark.parametrize("rule", RULES)
def test_a_saved_model_comes_back_with_its_rule_and_grid(rule: str, tmp_path: object) -> None:
    model, ids = tiny(rule, dropout=0.1), tokens()
    model.train()
    model(ids, labels=ids).loss.backward()  # moves the grid of a reversible model
    model.eval().save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert is_reversible(again) == (rule != "residual")
    with torch.no_grad():
        assert torch.equal(again(ids).logits, model(ids).logits)
    if rule != "residual":
        assert again.config.shoestring == model.config.shoestring


def test_grouped_query_attention_matches_repeated_heads() -> None:
    grouped, full = tiny(num_key_value_heads=2), tiny()
    grouped.load_state_dict(
        {k: v for k, v in full.state_dict().items() if "qkv" not in k}, strict=False
    )
    for a, b in zip(grouped.model.layers, full.model.layers, strict=True):
        q, k, v = a.attention.qkv_proj.weight.detach().split((32, 16, 16))
        wide = [w.view(2, 8, 32).repeat_interleave(2, 0).reshape(32, 32) for w in (k, v)]
        b.attention.qkv_proj.weight.data.copy_(torch.cat([q, *wide]))
    with torch.no_grad():
        torch.testing.assert_close(grouped(tokens()).logits, full(tokens()).logits)


def test_the_loss_is_that_of_the_next_token() -> None:
    model, ids = tiny(), tokens()
    with torch.no_grad():
        out = model(ids, labels=ids)
        expected = torch.nn.functional.cross_entropy(
            out.logits[:, :-1].reshape(-1, 64).double(), ids[:, 1:].reshape(-1)
        )
    assert abs(float(out.loss) - float(expected)) < 1e-5


def test_shapes_that_do_not_divide_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"num_attention_heads = 3; expected an even width"):
        GPTConfig(hidden_size=32, num_attention_heads=3)
    with pytest.raises(ConfigError, match="a divisor of num_attention_heads = 4"):
        GPTConfig(hidden_size=32, num_attention_heads=4, num_key_value_heads=3)
