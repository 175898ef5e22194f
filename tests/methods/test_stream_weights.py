"""Weights that live outside memory and visit: same numbers, fewer bytes."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import shoestring
from shoestring.errors import ConfigError, StackError
from shoestring.meter import Meter, is_outside
from shoestring.methods import apply_spans, method
from shoestring.methods.stream_weights import build_outside
from shoestring.planner import Plan, planner
from shoestring.planner.ways import Way
from shoestring.stack import Span, Stack

DEPTH, WIDTH, VOCABULARY = 6, 64, 32
STREAM = method("stream_weights")
SETTINGS: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": WIDTH, "intermediate_size": 4 * WIDTH,
    "num_hidden_layers": DEPTH, "num_attention_heads": 4, "attention_dropout": 0.1,
}  # fmt: skip


def llama() -> nn.Module:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SETTINGS)).train()


def text(rows: int = 2, tokens: int = 16) -> dict[str, Tensor]:
    ids = torch.randint(0, VOCABULARY, (rows, tokens), generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids, "labels": ids}


def gradients(model: nn.Module) -> list[Tensor | None]:
    torch.manual_seed(2)
    model(**text()).loss.backward()
    found = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    return found


def same(one: list[Tensor | None], other: list[Tensor | None]) -> bool:
    pairs = zip(one, other, strict=True)
    return all((a is None and b is None) or torch.equal(a, b) for a, b in pairs)


def streamed(model: nn.Module, **settings: Any) -> Callable[[], None]:
    return STREAM.apply(model, STREAM.configure(settings))


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.1)


def steps(model: nn.Module, optimizer: torch.optim.Optimizer, count: int = 3) -> list[float]:
    losses = []
    for step in range(count):
        torch.manual_seed(step)
        loss = model(**text()).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(float(loss.detach()))
    return losses


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # PEFT asks for it
@pytest.mark.parametrize("how", ["as it is", "recomputed", "MLP in slices", "adapters"])
def test_gradients_are_bit_equal_however_the_blocks_are_run(how: str) -> None:
    plain = llama()
    if how == "adapters":
        peft = pytest.importorskip("peft")
        plain = peft.get_peft_model(plain, peft.LoraConfig(target_modules=["q_proj", "up_proj"]))
    model = copy.deepcopy(plain)
    if how == "MLP in slices":
        for each in (plain, model):
            method("chunked_mlp").apply(each, method("chunked_mlp").configure())
    streamed(model)
    if how == "recomputed":
        apply_spans(Stack.of(model), [Span(0, DEPTH, "recompute", {"hold": (0, 3)})])
    assert same(gradients(plain), gradients(model))


def test_weights_come_back_and_nothing_is_left_behind() -> None:
    plain, model = llama(), llama()
    before = dict(model.named_parameters())
    undo = streamed(model)
    weight = model.model.layers[0].mlp.up_proj.weight
    assert is_outside(weight.untyped_storage())
    assert isinstance(weight, nn.Parameter)
    undo()
    assert dict(model.named_parameters()) == before
    assert not any(is_outside(p.untyped_storage()) for p in model.parameters())
    assert not any("forward" in vars(m) for m in model.modules())
    assert same(gradients(plain), gradients(model))


def test_training_evaluating_saving_and_copying_see_the_same_weights(tmp_path: Path) -> None:
    plain, model = llama(), llama()
    streamed(model)
    assert steps(plain, sgd(plain.parameters())) == steps(model, sgd(model.parameters()))
    model.save_pretrained(tmp_path)
    loaded, copied = AutoModelForCausalLM.from_pretrained(tmp_path), copy.deepcopy(model)
    for each in (plain, model, loaded, copied):
        each.eval()
    prompt = {"input_ids": text()["input_ids"][:, :4], "max_new_tokens": 4, "do_sample": False}
    expected = plain.generate(**prompt, pad_token_id=0)
    for each in (model, loaded, copied):
        assert torch.equal(each(**text()).logits, plain(**text()).logits)
        assert torch.equal(each.generate(**prompt, pad_token_id=0), expected)
    # A copy is in memory, and stands on its own.
    assert not any(is_outside(p.untyped_storage()) for p in copied.parameters())
    with torch.no_grad():
        copied.model.layers[0].mlp.up_proj.weight.zero_()
    assert model.model.layers[0].mlp.up_proj.weight.any()


def test_only_frozen_weights_leave_when_asked() -> None:
    model = llama()
    model.model.layers[:3].requires_grad_(False)
    streamed(model, what="frozen")
    outside = {n for n, p in model.named_parameters() if is_outside(p.untyped_storage())}
    assert {n.split(".")[2] for n in outside} == {"0", "1", "2"}


def test_blocks_that_are_run_again_leave_no_weights_behind() -> None:
    """What is there besides gradients does not grow with the depth."""
    peaks = []
    for depth in (3, 6):
        torch.manual_seed(0)
        model = LlamaForCausalLM(LlamaConfig(**{**SETTINGS, "num_hidden_layers": depth})).train()
        streamed(model)
        apply_spans(Stack.of(model), [Span(0, depth, "recompute")])
        with Meter(model) as meter, torch.no_grad():
            model(**text(), use_cache=False)
        peaks.append(meter.peak_bytes)
    assert peaks[1] - peaks[0] == 3 * 4 * 2 * WIDTH  # the norms, which stay


def plan_of(*patches: Way) -> Plan:
    return Plan(
        budget_bytes=1, peak_bytes=1, by_category={}, instant="", step_seconds=None,
        spans=(Span(0, DEPTH, "recompute"),), patches=patches, rows=(), blocks=DEPTH, model="",
    )  # fmt: skip


def test_a_plan_with_it_is_taken_out_before_another_goes_in() -> None:
    model = llama()
    expected = gradients(model)
    plan, other = plan_of(Way("stream_weights")), plan_of()
    plan.apply(model)
    with pytest.raises(StackError, match="were moved or changed by the plan"):
        other.apply(model)
    assert same(expected, gradients(model))
    plan.restore(model)
    other.apply(model)
    assert not any(is_outside(p.untyped_storage()) for p in model.parameters())
    assert same(expected, gradients(model))


def test_a_plan_that_fails_to_apply_leaves_the_weights_where_they_were() -> None:
    model = llama()
    wrong = Plan.from_json(plan_of(Way("stream_weights")).to_json().replace("recompute", "nap"))
    with pytest.raises(ConfigError, match="nap"):
        wrong.apply(model)
    assert not any(is_outside(p.untyped_storage()) for p in model.parameters())
    assert not any("forward" in vars(m) for m in model.modules())


def test_a_planned_model_is_planned_as_without() -> None:
    model = llama()
    allow = ["keep", "recompute", "stream_weights"]
    plans = planner(model, text(), seconds=False, allow=allow, optimizer=sgd)
    chosen = plans(plans.smallest_bytes)
    assert [w.method for w in chosen.patches] == ["stream_weights"]
    chosen.apply(model)
    again = planner(model, text(), seconds=False, allow=allow, optimizer=sgd)
    assert again.smallest_bytes == plans.smallest_bytes
    optimizer = chosen.optimizer(model)
    checked = chosen.verify(lambda: steps(model, optimizer, 1))
    assert 0 <= checked.error <= 0.03, checked


def test_a_model_built_outside_is_the_same_and_never_whole_in_memory(tmp_path: Path) -> None:
    plain = llama()
    plain.save_pretrained(tmp_path)
    with Meter() as meter:
        built = build_outside(llama)
    loaded = build_outside(lambda: AutoModelForCausalLM.from_pretrained(tmp_path)).train()
    for model in (built, loaded):
        inside = {n for n, p in model.named_parameters() if not is_outside(p.untyped_storage())}
        assert all("norm" in n or "embed" in n or "lm_head" in n for n in inside)
        streamed(model)
        assert same(gradients(plain), gradients(model))
    whole = sum(p.nbytes for p in plain.parameters())
    assert meter.peak_bytes < 0.5 * whole


def test_it_says_why_it_cannot() -> None:
    with pytest.raises(ConfigError, match="what = 'some'"):
        STREAM.configure({"what": "some"})
    with pytest.raises(StackError, match="it is reversible"):
        streamed(shoestring.reversible(llama()))
    model = llama()
    with pytest.raises(StackError, match="finds nothing to move"):
        streamed(model, what="frozen")
    streamed(model)
    with pytest.raises(StackError, match="streamed already"):
        streamed(model)


def test_shared_and_computed_weights_stay() -> None:
    model = llama()
    layers = model.model.layers
    layers[1].mlp.up_proj.weight = layers[0].mlp.up_proj.weight
    parametrize.register_parametrization(layers[2].mlp.up_proj, "weight", nn.Identity())
    plain = copy.deepcopy(model)
    streamed(model)
    assert not is_outside(layers[0].mlp.up_proj.weight.untyped_storage())
    assert same(gradients(plain), gradients(model))
