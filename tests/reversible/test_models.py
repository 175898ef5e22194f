"""Hugging Face models made reversible, and plain again."""

import copy
import math

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    Qwen3Config,
    ViTConfig,
    ViTForImageClassification,
)

from shoestring.conversion import ConversionReport
from shoestring.errors import ConfigError, StackError
from shoestring.methods import apply_spans
from shoestring.methods.reversible import conversion_report, is_reversible, restore, reversible
from shoestring.rules import Lattice
from shoestring.stack import Span, Stack

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
CONFIGS = {
    "llama": lambda: LlamaConfig(**SIZES),
    "gpt2": lambda: GPT2Config(
        vocab_size=64,
        n_embd=32,
        n_layer=4,
        n_head=4,
        n_positions=64,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=1,
        eos_token_id=2,
    ),
    "qwen3": lambda: Qwen3Config(**SIZES, head_dim=8),
    "mistral": lambda: MistralConfig(**SIZES, sliding_window=8),
    "gemma2": lambda: Gemma2Config(**SIZES, head_dim=8, query_pre_attn_scalar=8, sliding_window=8),
}
every_family = pytest.mark.parametrize("family", CONFIGS)
every_rule = pytest.mark.parametrize("rule", ["feistel", "bdia", "random_sign"])


def model_of(family: str, *, seed: int = 0, **overrides) -> nn.Module:
    torch.manual_seed(seed)
    config = CONFIGS[family]()
    for name, value in overrides.items():
        setattr(config, name, value)
    return AutoModelForCausalLM.from_config(config).train()


def batch() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(4)
    ids = torch.randint(3, 64, (2, 12), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, 9:] = 0
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def step(model: nn.Module, seed: int = 3) -> Tensor:
    torch.manual_seed(seed)
    loss = model(**batch()).loss
    loss.backward()
    return loss.detach()


def grads(model: nn.Module) -> dict[str, Tensor]:
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


@every_rule
@every_family
def test_a_converted_model_has_the_stored_gradients_and_its_names(family, rule):
    losses, found = [], []
    for keep_top in (0, 4):
        model = model_of(family)
        names = list(model.state_dict())
        reversible(model, rule=rule, keep_top=keep_top)
        assert list(model.state_dict()) == names
        losses.append(step(model))
        found.append(grads(model))
    assert torch.equal(*losses)
    assert found[0].keys() == found[1].keys()
    assert all(torch.equal(grad, found[1][name]) for name, grad in found[0].items())


@every_rule
@every_family
def test_restoring_gives_back_the_plain_model_to_the_bit(family, rule):
    model = model_of(family)
    before = step(model), grads(model)
    model.zero_grad()
    reversible(model, rule=rule)
    assert is_reversible(model)
    assert not torch.equal(step(model), before[0])
    restore(model)
    model.zero_grad()
    assert not is_reversible(model)
    assert not hasattr(model.config, "shoestring")
    assert torch.equal(step(model), before[0])
    assert all(torch.equal(grad, before[1][name]) for name, grad in grads(model).items())


@every_rule
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_saving_and_loading_goes_through_the_plain_format(family, rule, tmp_path):
    model = reversible(model_of(family), rule=rule)
    step(model)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    info = loaded.config.shoestring
    assert info["rule"] == rule
    reversible(loaded.train(), rule=info["rule"], scale_bits=model.config.shoestring["scale_bits"])
    for (name, a), b in zip(model.state_dict().items(), loaded.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    fixed = reversible(restore(model), rule=rule, scale_bits=info["scale_bits"])
    assert torch.equal(step(fixed), step(loaded))


@pytest.mark.parametrize("family", ["llama", "gpt2", "mistral"])
def test_a_drawing_rule_generates_what_the_plain_model_does(family):
    model = model_of(family).eval()
    prompt = batch()["input_ids"][:1, :5]
    settings = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    expected = model.generate(prompt, **settings)
    assert torch.equal(reversible(model, rule="bdia").generate(prompt, **settings), expected)


@pytest.mark.parametrize("family", ["llama", "gpt2", "mistral"])
def test_a_feistel_model_generates_the_same_with_and_without_its_cache(family):
    model = reversible(model_of(family)).eval()
    prompt = batch()["input_ids"][:1, :5]
    settings = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(
        model.generate(prompt, use_cache=True, **settings),
        model.generate(prompt, use_cache=False, **settings),
    )


@every_rule
def test_hidden_states_of_a_reversible_model_are_refused(rule):
    model = reversible(model_of("llama"), rule=rule)
    with pytest.raises(ConfigError, match=r"output_hidden_states is asked.*restore\(model\)"):
        model(**batch(), output_hidden_states=True)
    model.config.output_hidden_states = True
    with pytest.raises(ConfigError, match="output_hidden_states is asked"):
        model(**batch())
    with pytest.raises(ConfigError, match="output_hidden_states is asked"):
        copy.deepcopy(model)(**batch())
    restore(model)
    assert len(model(**batch()).hidden_states) == 5


def test_hidden_states_are_given_where_a_rule_is_served_plain():
    model = model_of("llama").eval()
    expected = model(**batch(), output_hidden_states=True).hidden_states
    found = reversible(model, rule="bdia")(**batch(), output_hidden_states=True).hidden_states
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_what_a_layer_hook_sees_in_a_reversible_model_cannot_be_taken_for_values():
    model = reversible(model_of("llama"))
    seen = []
    model.model.layers[1].register_forward_hook(lambda m, args, out: seen.append(out.detach()))
    model(**batch())
    assert seen[0].isnan().all()


def test_a_copy_of_a_reversible_model_trains_by_itself():
    model = reversible(model_of("llama"))
    copied = copy.deepcopy(model)
    assert torch.equal(step(model), step(copied))
    assert is_reversible(copied)
    assert all(torch.equal(g, grads(copied)[n]) for n, g in grads(model).items())
    restore(model)
    assert is_reversible(copied)


def test_a_plan_sets_how_much_of_the_top_is_kept_and_what_is_held():
    expected = step(reversible(model_of("llama")))
    for config in ({"keep_top": 2}, {"hold_outputs": 4}, {"keep_top": 1, "hold_outputs": 2}):
        model = reversible(model_of("llama"))
        stack = Stack.of(model)
        apply_spans(stack, [Span(0, 4, "reversible", config)])
        assert torch.equal(step(model), expected)
        stack.restore()
        assert is_reversible(model)


def test_a_model_is_made_reversible_only_once():
    model = reversible(model_of("llama"))
    with pytest.raises(StackError, match=r"reversible already.*restore\(model\) first"):
        reversible(model)


def test_a_layer_that_does_not_split_is_named():
    class Gated(nn.Module):
        def __init__(self):
            super().__init__()
            self.mixer, self.gate = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x):
            return x + self.mixer(x) * self.gate(x)

    net = nn.Sequential(*[Gated() for _ in range(3)])
    with pytest.raises(StackError, match=r"Gated with children .* cannot be split"):
        reversible(net)


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_sixteen_bit_weights_use_branches_whose_error_is_no_worse_than_the_layers(family):
    model = model_of(family).to(torch.bfloat16)
    exact = copy.deepcopy(model).double()
    reversible(model, rule="bdia")
    assert model.config.shoestring["branches"]
    assert not reversible(model_of(family), rule="bdia").config.shoestring["branches"]
    # A stream 100 times the update, where layer(x) - x in bf16 cancels.
    x = 30 * torch.randn(1, 8, 32, generator=torch.Generator().manual_seed(0)).double()
    errors = branch_errors(model, exact, x)
    # The layer's own output in bf16 errs by rounding the sum; the branch must do no worse.
    assert errors["branch"] <= errors["layer"]
    assert errors["difference"] > 3 * errors["branch"]


def branch_errors(model: nn.Module, exact: nn.Module, x: Tensor) -> dict[str, float]:
    """Relative to the update's size: of attention's branch, of a layer minus its input, and of
    the layer's output."""
    from shoestring.branches import roles_of

    def branch(m: nn.Module, h: Tensor) -> Tensor:
        layer, roles = m.model.layers[0], roles_of(m.model.layers[0])
        positions = torch.arange(8)[None]
        embedded = m.model.rotary_emb(h, positions)
        for name in roles.attention:
            part = getattr(layer, name)
            h = (
                part(h, position_embeddings=embedded, attention_mask=None)[0]
                if name == roles.attends
                else part(h)
            )
        return h

    with torch.no_grad():
        low = x.to(torch.bfloat16)
        true = branch(exact, low.double())
        update = branch(model, low)
        out = low + update
        scale = true.norm()
        return {
            "branch": float((update.double() - true).norm() / scale),
            "difference": float(((out - low).double() - true).norm() / scale),
            "layer": float((out.double() - low.double() - true).norm() / scale),
        }


@pytest.fixture(scope="module")
def trained() -> nn.Module:
    """A plain model whose layers have learned: without them its loss is log 64 again, where any
    network is at first."""
    model = model_of("llama")
    optimizer = torch.optim.Adam(model.model.layers.parameters(), lr=3e-3)
    for _ in range(40):
        optimizer.zero_grad()
        step(model)
        optimizer.step()
    return model


def lost(report: ConversionReport) -> float:
    """The share of what was learned that the conversion takes away, before any training."""
    return (report.after - report.before) / (math.log(64) - report.before)


@pytest.mark.parametrize("rule", ["bdia", "random_sign"])
def test_the_report_of_a_conversion_says_the_loss_before_after_and_back(rule, trained):
    model = copy.deepcopy(trained)
    state, random = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    report = conversion_report(model, batch(), rule=rule, draws=8)
    with torch.no_grad():
        expected = float(model.eval()(**batch()).loss)
    assert report.before == report.back == expected < math.log(64) - 0.5
    assert 0 < lost(report) < 0.3
    assert report.draws == 8
    assert report.spread > 0
    assert not is_reversible(model)
    assert torch.equal(torch.get_rng_state(), random)
    assert all(
        torch.equal(a, b) for a, b in zip(state.values(), model.state_dict().values(), strict=True)
    )


@pytest.mark.parametrize("factor", [0.0, -1.0])
def test_the_report_shows_a_conversion_that_loses_the_function(factor, trained, monkeypatch):
    own = Lattice.advance

    def wrong(self, step, prev, cur, u):
        return own(self, step, prev, cur, factor * u)

    monkeypatch.setattr(Lattice, "advance", wrong)
    assert lost(conversion_report(trained, batch(), rule="bdia", draws=8)) > 0.9


def test_the_report_leaves_a_model_plain_that_could_not_be_measured():
    model = model_of("llama")
    with pytest.raises(ValueError, match="input_ids"):
        conversion_report(model, {"no_such_input": 1})
    assert not is_reversible(model)
    assert model.training


def test_the_grid_of_a_pretrained_model_holds_its_massive_activations():
    model = model_of("llama")
    with torch.no_grad():
        model.model.embed_tokens.weight[:8] *= 2e5  # a few thousand in one token's stream
    info = reversible(model, rule="bdia").config.shoestring
    assert info["scale_bits"] < 20
    ids = torch.arange(8)[None]
    assert model(input_ids=ids, labels=ids).loss.isfinite()


def test_the_grid_of_a_model_follows_what_training_shows():
    model = reversible(model_of("llama"))
    assert model.config.shoestring["scale_bits"] == 20
    step(model)
    assert model.config.shoestring["scale_bits"] == 20
    with torch.no_grad():
        model.model.embed_tokens.weight *= 5000
    step(model)
    assert model.config.shoestring["scale_bits"] < 20


@pytest.mark.parametrize("plan", ["keep", "recompute"])
def test_a_model_under_a_plan_is_not_made_reversible(plan):
    model = model_of("llama")
    stack = Stack.of(model)
    apply_spans(stack, [Span(2, 4, plan)])
    expected = [type(e) for e in stack.executors]
    with pytest.raises(StackError, match=r"runs under a plan.*plan\.restore\(model\)"):
        reversible(model)
    assert [type(e) for e in stack.executors] == expected
    assert not hasattr(model.config, "shoestring")
    stack.restore()
    assert is_reversible(reversible(model))


def test_a_conversion_that_fails_in_its_trial_leaves_the_model_as_it_was():
    model = model_of("llama")
    # Residuals that are scaled do not split; seen only when the layers are run.
    model.model.layers[1].register_forward_hook(lambda m, args, out: out * 1.5)
    model.model.layers[1].mlp.register_forward_hook(lambda m, args, out: out + 1)
    before, modes = step(model), [m.training for m in model.modules()]
    for layer in model.model.layers:
        layer.forward = _halving(layer)
    standing = [layer.forward for layer in model.model.layers]
    with pytest.raises(StackError, match="do not add up to the layer"):
        reversible(model)
    assert [layer.forward for layer in model.model.layers] == standing
    assert [m.training for m in model.modules()] == modes
    assert not hasattr(model.config, "shoestring")
    assert not is_reversible(model)
    for layer in model.model.layers:
        del layer.forward
    assert torch.equal(step(model), before)


def _halving(layer: nn.Module):
    own = type(layer).forward.__get__(layer)
    return lambda *args, **kwargs: own(*args, **kwargs) * 0.5


def test_a_report_on_a_model_that_is_reversible_already_leaves_it_so():
    model = reversible(model_of("llama"))
    with pytest.raises(StackError, match="reversible already"):
        conversion_report(model, batch())
    assert is_reversible(model)


# The trial of a conversion: a few tokens through the plain model


def test_a_vocabulary_and_positions_smaller_than_the_trial_are_enough():
    assert is_reversible(reversible(model_of("llama", vocab_size=5, pad_token_id=None)))
    assert is_reversible(reversible(model_of("gpt2", n_positions=4)))


def vit() -> nn.Module:
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4,
        image_size=16, patch_size=8, hidden_dropout_prob=0.1,
    )  # fmt: skip
    return ViTForImageClassification(config).train()


@pytest.mark.parametrize("rule", ["bdia", "midpoint"])
def test_a_model_of_images_takes_a_whole_layer_rule(rule):
    found = []
    pixels = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    for keep_top in (0, 3):
        model = reversible(vit(), rule=rule, keep_top=keep_top)
        torch.manual_seed(3)
        model(pixel_values=pixels, labels=torch.tensor([0, 1])).loss.backward()
        found.append(grads(model))
    assert found[0].keys() == found[1].keys()
    assert all(torch.equal(g, found[1][n]) for n, g in found[0].items())


def test_branches_that_cannot_be_tried_are_refused_with_the_way_out():
    class Embeds(nn.Module):
        """Layers that split by their names, in a model that takes no token ids."""

        def __init__(self):
            super().__init__()
            self.layers = model_of("llama").model.layers

    with pytest.raises(StackError, match=r"takes no token ids.*ReversibleStack"):
        reversible(Embeds())


# 16 bits after the conversion


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rule", ["midpoint", "leapfrog", "bdia"])
def test_weights_turned_to_16_bits_after_a_whole_layer_conversion_are_refused(rule, dtype):
    model = reversible(model_of("llama"), rule=rule).to(dtype)
    with pytest.raises(StackError, match=r"weights of torch\.b?float16.*restore\(model\)"):
        model(**batch())
    if rule == "bdia":  # evaluated, it is the plain model
        assert model.eval()(**batch()).loss.isfinite()
    # What the message says to do.
    again = reversible(restore(model), rule=rule).train()
    assert again.config.shoestring["branches"]
    assert step(again).isfinite()


def test_a_hidden_state_of_16_bits_is_refused_where_layers_are_subtracted():
    net = reversible(nn.Sequential(*[nn.Linear(8, 8) for _ in range(3)]), rule="midpoint")
    with (
        torch.autocast("cpu", torch.bfloat16),
        pytest.raises(StackError, match=r"hidden state of torch\.bfloat16.*expected float32"),
    ):
        net(torch.randn(2, 4, 8).bfloat16())


def test_branches_take_16_bits_at_any_time():
    model = reversible(model_of("llama")).to(torch.bfloat16)
    assert step(model).isfinite()


def test_activations_of_thousands_are_no_reason_to_fail_the_first_forward():
    found = []
    for keep_top in (0, 3):
        torch.manual_seed(0)
        net = nn.Sequential(*[nn.Linear(8, 8) for _ in range(3)])
        reversible(net, rule="bdia", keep_top=keep_top)
        x = 5000 * torch.randn(2, 4, 8)
        torch.manual_seed(1)
        net(x).square().mean().backward()
        found.append([p.grad for p in net.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_a_model_converted_in_16_bits_is_the_same_function_when_loaded_in_32(tmp_path):
    model = reversible(model_of("llama").to(torch.bfloat16), rule="midpoint")
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="float32").train()
    info = loaded.config.shoestring
    reversible(loaded, rule=info["rule"], branches=info["branches"])
    assert info["branches"]
    assert step(loaded) == pytest.approx(float(step(model.float())), rel=1e-5)
    by_layers = reversible(restore(loaded), rule=info["rule"])
    assert step(by_layers) != pytest.approx(float(step(model)), rel=1e-3)


def test_feistel_without_branches_is_refused():
    with pytest.raises(ConfigError, match="'feistel' with branches = False"):
        reversible(model_of("llama"), branches=False)
