"""Every family: the stack is found, runs exactly the same, and everything around it still works."""

import copy
import pickle
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import nn

from shoestring.methods import apply_spans
from shoestring.stack import Runner, Span, Stack
from stack.families import DEPTH, FAMILIES, Family, assert_same, step

pytestmark = pytest.mark.filterwarnings(
    # peft asks transformers for a name that transformers is about to drop
    "ignore:`is_gradient_checkpointing`:FutureWarning",
    # peft, of GPT-2's Conv1D
    "ignore:fan_in_fan_out is set to False:UserWarning",
)

EACH_INPUT: dict[str, Any] = {}
EVERY_SECOND = {"hold": (0, 2)}
FIRST_ONLY = {"hold": (0,)}

every_family = pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES.keys())
# Masks of two kinds, tuples, experts, a state-space layer, no Hugging Face: one of each.
VARIED = ("gemma3", "gpt2", "mixtral", "jamba", "modernbert", "module_list_of_tuples", "sequential")
varied_families = pytest.mark.parametrize("family", [FAMILIES[n] for n in VARIED], ids=VARIED)
every_attention = pytest.mark.parametrize(
    ("family", "attention"),
    [
        pytest.param(family, attention, id=f"{family.name}-{attention}")
        for family in FAMILIES.values()
        for attention in family.attentions
    ],
)


def recompute(model: nn.Module, settings: Mapping[str, Any] = EACH_INPUT) -> Stack:
    stack = Stack.of(model)
    apply_spans(stack, [Span(0, len(stack), "recompute", settings)])
    return stack


def built(family: Family) -> nn.Module:
    return family.build(family.attentions[0])


def logits(model: nn.Module, family: Family) -> torch.Tensor:
    model.eval()
    with torch.no_grad():
        return model(**family.batch()).logits


@every_family
def test_the_list_of_layers_is_found(family: Family) -> None:
    model = built(family)
    stack = Stack.of(model)
    assert stack.path == family.path
    assert len(stack) == DEPTH
    found = model.get_submodule(family.path)
    assert [b for b in found.children() if b in stack.blocks] == list(stack.blocks)


@every_attention
def test_loss_and_gradients_are_bit_equal(family: Family, attention: str) -> None:
    model, batch = family.build(attention), family.batch()
    plain = step(model, batch)
    assert_same(plain, step(model, batch))  # the yardstick itself is repeatable
    for settings in (EACH_INPUT, EVERY_SECOND, FIRST_ONLY):
        stack = recompute(model, settings)
        assert_same(plain, step(model, batch))
        stack.restore()
    assert_same(plain, step(model, batch))


@varied_families
def test_saving_what_an_operator_made_changes_no_bit(family: Family) -> None:
    model, batch = built(family), family.batch()
    plain = step(model, batch)
    for save in ("attention", "matmuls"):
        stack = recompute(model, {"save": save})
        assert_same(plain, step(model, batch))
        stack.restore()


@varied_families
def test_some_blocks_recomputed_and_the_rest_as_they_are(family: Family) -> None:
    model, batch = built(family), family.batch()
    plain = step(model, batch)
    stack = Stack.of(model)
    apply_spans(stack, [Span(1, 3, "recompute", FIRST_ONLY)])
    assert [e is not None for e in stack.executors] == [False, True, True, False]
    assert_same(plain, step(model, batch))


@varied_families
def test_mixed_precision_is_bit_equal(family: Family) -> None:
    model, batch = built(family), family.batch()
    with torch.autocast("cpu", torch.bfloat16):
        plain = step(model, batch)
        recompute(model, EVERY_SECOND)
        assert_same(plain, step(model, batch))


@varied_families
def test_frozen_lower_blocks_are_bit_equal(family: Family) -> None:
    model, batch = built(family), family.batch()
    stack = Stack.of(model)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for block in stack.blocks[2:]:
        block.requires_grad_(True)
    plain = step(model, batch)
    assert any(g is not None for g in plain.gradients.values())
    for settings in (EACH_INPUT, FIRST_ONLY):
        recompute(model, settings)
        assert_same(plain, step(model, batch))
        stack.restore()


@every_family
def test_names_and_state_dict_are_unchanged(family: Family) -> None:
    model = built(family)
    names = [n for n, _ in model.named_parameters()]
    modules = [(n, type(m)) for n, m in model.named_modules()]
    state = {k: v.clone() for k, v in model.state_dict().items()}
    stack = recompute(model)
    for _ in ("applied", "restored"):
        assert [n for n, _ in model.named_parameters()] == names
        assert [(n, type(m)) for n, m in model.named_modules()] == modules
        assert model.state_dict().keys() == state.keys()
        assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
        assert list(model.get_submodule(family.path).children())
        stack.restore()
    assert not any("forward" in vars(m) for m in model.modules())


@every_family
def test_a_saved_model_loads_plain_and_gives_the_same(family: Family, tmp_path: Any) -> None:
    model = built(family)
    if not hasattr(model, "save_pretrained"):
        expected = logits(model, family)
        recompute(model)
        other = built(family)
        other.load_state_dict(model.state_dict())
        assert torch.equal(expected, logits(other, family))
        return
    expected = logits(model, family)
    recompute(model)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(
        tmp_path, attn_implementation=family.attentions[0], dtype="auto"
    )
    assert all(e is None for e in Stack.of(loaded).executors)
    assert torch.equal(expected, logits(loaded, family))
    assert torch.equal(expected, logits(model, family))


@pytest.mark.parametrize("name", [f.name for f in FAMILIES.values() if f.generates])
def test_generate_gives_the_same_tokens(name: str) -> None:
    family = FAMILIES[name]
    model = built(family).eval()
    prompt = {k: v[:1, :6] for k, v in family.batch().items() if k != "labels"}

    def continuation() -> list[int]:
        torch.manual_seed(0)
        return model.generate(**prompt, max_new_tokens=6, do_sample=True)[0].tolist()

    expected = continuation()
    assert len(expected) > 6
    stack = recompute(model, EVERY_SECOND)
    assert continuation() == expected
    stack.restore()
    assert continuation() == expected


@every_family
def test_hooks_on_layers_see_each_call_once_with_real_tensors(family: Family) -> None:
    model, batch = built(family), family.batch()
    seen: list[tuple[str, int, torch.Tensor]] = []
    stack = Stack.of(model)
    for k, block in enumerate(stack.blocks):
        block.register_forward_pre_hook(
            lambda m, args, kwargs, k=k: seen.append(("in", k, first((*args, *kwargs.values())))),
            with_kwargs=True,
        )
        block.register_forward_hook(lambda m, i, out, k=k: seen.append(("out", k, first([out]))))
    plain = step(model, batch)
    expected, seen = seen, []
    for settings in (EACH_INPUT, EVERY_SECOND):
        recompute(model, settings)
        assert_same(plain, step(model, batch))
        assert [s[:2] for s in seen] == [s[:2] for s in expected]
        assert len(seen) == 2 * DEPTH
        assert all(
            torch.equal(a, b) and b.requires_grad
            for (_, _, a), (_, _, b) in zip(expected, seen, strict=True)
        )
        seen.clear()
        stack.restore()


def first(values: Any) -> torch.Tensor:
    """The first floating tensor in some arguments or in an output."""
    for value in values:
        if isinstance(value, tuple):
            return first(value)
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            return value
    raise AssertionError("no floating tensor")


@varied_families
def test_a_hook_may_replace_a_layers_output(family: Family) -> None:
    model, batch = built(family), family.batch()

    def halve(module: nn.Module, inputs: Any, output: Any) -> Any:
        if isinstance(output, tuple):
            return (output[0] * 0.5, *output[1:])
        return output * 0.5

    Stack.of(model).blocks[1].register_forward_hook(halve)
    plain = step(model, batch)
    recompute(model)
    assert_same(plain, step(model, batch))


@every_family
def test_a_deepcopy_is_planned_too_and_independent(family: Family) -> None:
    model, batch = built(family), family.batch()
    plain = step(model, batch)
    stack = recompute(model, EVERY_SECOND)
    twin = copy.deepcopy(model)
    other = Stack.of(twin)
    for block, twin_block in zip(stack.blocks, other.blocks, strict=True):
        runner, twin_runner = vars(block)["forward"], vars(twin_block)["forward"]
        assert isinstance(twin_runner, Runner)
        assert twin_runner._block() is twin_block
        assert twin_runner.executor is not runner.executor
    assert len({id(e) for e in other.executors}) == 1  # one span, one executor
    assert_same(plain, step(twin, batch))

    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    assert_same(plain, step(model, batch))
    other.restore()
    assert all(e is None for e in other.executors)
    assert all(e is not None for e in stack.executors)


@varied_families
def test_a_model_pickles_planned_and_restored(family: Family) -> None:
    # Before a first step: that leaves transformers' own hooks behind, some of them local functions.
    model, batch = built(family), family.batch()
    stack = recompute(model, EVERY_SECOND)
    planned = pickle.loads(pickle.dumps(model))  # noqa: S301 - our own bytes
    stack.restore()
    restored = pickle.loads(pickle.dumps(model))  # noqa: S301 - our own bytes
    plain = step(model, batch)
    assert all(e is not None for e in Stack.of(planned).executors)
    assert_same(plain, step(planned, batch))
    assert all(e is None for e in Stack.of(restored).executors)
    assert_same(plain, step(restored, batch))


@pytest.mark.parametrize("order", ["before", "after"])
@every_family
def test_lora_may_be_injected_before_or_after(family: Family, order: str) -> None:
    peft = pytest.importorskip("peft")
    model, batch = built(family), family.batch()
    targets = family.lora if isinstance(family.lora, str) else list(family.lora)
    settings = peft.LoraConfig(
        r=2, lora_dropout=0.1, target_modules=targets, init_lora_weights=False
    )
    if order == "after":
        recompute(model, EVERY_SECOND)
    adapted = peft.get_peft_model(model, settings)
    if order == "before":
        recompute(adapted, EVERY_SECOND)
    stack = Stack.of(adapted)
    assert stack.path == f"base_model.model.{family.path}".rstrip(".")
    assert all(e is not None for e in stack.executors)
    names = set(adapted.state_dict())
    planned = step(adapted, batch)
    stack.restore()
    assert set(adapted.state_dict()) == names
    plain = step(adapted, batch)
    assert sum(g is not None for g in plain.gradients.values()) >= 2 * DEPTH
    assert_same(plain, planned)
