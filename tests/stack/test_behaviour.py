"""What surrounds a stack: caches, hooks, Hugging Face's own checkpointing, and what is refused."""

import copy
import logging
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import shoestring
import shoestring.stack
from shoestring.errors import ConfigError, StackError
from shoestring.methods import apply_spans, method
from shoestring.stack import Span, Stack
from stack.families import FAMILIES, PlainModel, assert_same, step, tokens


def llama(attention: str = "sdpa") -> nn.Module:
    return FAMILIES["llama"].build(attention)


def planned(model: nn.Module, **settings: Any) -> Stack:
    stack = Stack.of(model)
    apply_spans(stack, [Span(0, len(stack), "recompute", settings)])
    return stack


def encoder_decoder() -> nn.Module:
    import transformers

    torch.manual_seed(1)
    config = transformers.T5Config(
        vocab_size=67, d_model=32, d_kv=8, d_ff=48, num_layers=3, num_heads=4,
        decoder_start_token_id=0,
    )  # fmt: skip
    return transformers.T5ForConditionalGeneration(config).train()


# ---- caches --------------------------------------------------------------------------------


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_the_default_cache_is_dropped_with_a_message(
    attention: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, batch = llama(attention), tokens()
    plain = step(model, batch)
    assert model(**batch).past_key_values.get_seq_length() == 16  # made even in train mode
    monkeypatch.setattr(shoestring.stack, "_cache_dropped", False)
    planned(model)
    with caplog.at_level(logging.INFO, logger="shoestring"):
        output = model(**batch)
        output.loss.backward()
    assert output.past_key_values.get_seq_length() == 0
    assert [r.message for r in caplog.records if "cache is dropped" in r.message]
    assert_same(plain, step(model, batch))


def test_a_cache_with_entries_is_refused_not_forgotten() -> None:
    from transformers import DynamicCache

    model = llama()
    ids = tokens()["input_ids"]
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(input_ids=ids[:, :5], past_key_values=cache)
    planned(model)
    with pytest.raises(
        StackError, match=r"has entries already .*Train such a model without a plan"
    ):
        model(input_ids=ids[:, 5:], past_key_values=cache)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
def test_prefix_tuning_is_refused() -> None:
    peft = pytest.importorskip("peft")
    settings = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    model = peft.get_peft_model(llama(), settings).train()
    stack = planned(model)
    with pytest.raises(StackError, match="prefix tuning"):
        model(**tokens())
    stack.restore()
    assert model(**tokens()).loss.isfinite()


def test_without_gradients_the_cache_is_used() -> None:
    model = llama().eval()
    planned(model)
    with torch.no_grad():
        cache = model(input_ids=tokens()["input_ids"], use_cache=True).past_key_values
    assert cache.get_seq_length() == 16


# ---- Hugging Face's own features -----------------------------------------------------------


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", ["llama", "gpt2", "bert"])
@pytest.mark.filterwarnings(
    # torch, when a reentrant region is run whose input needs no gradient; transformers' own
    # announcement of a rename
    "ignore:None of the inputs have requires_grad",
    "ignore:.*gradient_checkpointing:FutureWarning",
)
def test_gradients_are_equal_inside_transformers_checkpointing(name: str, reentrant: bool) -> None:
    family = FAMILIES[name]
    model, batch = family.build("sdpa"), family.batch()
    plain = step(model, batch)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    for settings in ({}, {"hold": (0, 2)}, {"save": "matmuls"}):
        stack = planned(model, **settings)
        assert_same(plain, step(model, batch))
        stack.restore()


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2", "modernbert"])
def test_hidden_states_and_attentions_can_be_read(name: str) -> None:
    family = FAMILIES[name]
    model, batch = family.build("eager"), family.batch()
    wanted = {"output_hidden_states": True, "output_attentions": True}
    torch.manual_seed(3)
    plain = model(**batch, **wanted)
    yardstick = step(model, batch, **wanted)
    planned(model, hold=(0, 2))
    torch.manual_seed(3)
    again = model(**batch, **wanted)
    for kind in ("hidden_states", "attentions"):
        one, other = getattr(plain, kind), getattr(again, kind)
        assert len(one) == len(other) > 3
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    assert_same(yardstick, step(model, batch, **wanted))


def test_a_loss_on_hidden_states_gives_equal_gradients() -> None:
    model, batch = llama(), tokens()

    def gradients() -> list[Tensor]:
        model.zero_grad()
        torch.manual_seed(3)
        output = model(**batch, output_hidden_states=True)
        (output.loss + sum(h.square().mean() for h in output.hidden_states)).backward()
        return [p.grad for p in model.parameters()]

    plain = gradients()
    planned(model, hold=(0, 2))
    assert all(torch.equal(a, b) for a, b in zip(plain, gradients(), strict=True))


# ---- autograd --------------------------------------------------------------------------------


def test_two_forwards_before_one_backward() -> None:
    model, batch = llama(), tokens()

    def gradients() -> list[Tensor]:
        model.zero_grad()
        torch.manual_seed(3)
        (model(**batch).loss + 2 * model(**batch).loss).backward()
        return [p.grad for p in model.parameters()]

    plain = gradients()
    planned(model, hold=(0, 2))
    assert all(torch.equal(a, b) for a, b in zip(plain, gradients(), strict=True))


def test_autograd_grad_and_a_retained_graph() -> None:
    model, batch = llama(), tokens()
    wanted = list(Stack.of(model).blocks[1].parameters())

    def twice() -> tuple[list[Tensor], list[Tensor]]:
        torch.manual_seed(3)
        loss = model(**batch).loss
        first = torch.autograd.grad(loss, wanted, retain_graph=True)
        return list(first), list(torch.autograd.grad(loss, wanted))

    plain, _ = twice()
    for settings in ({}, {"hold": (0, 2)}):
        stack = planned(model, **settings)
        first, second = twice()
        assert all(torch.equal(a, b) for a, b in zip(plain, first, strict=True))
        assert all(torch.equal(a, b) for a, b in zip(plain, second, strict=True))
        stack.restore()


@pytest.mark.parametrize("name", ["llama", "gpt2", "module_list"])
def test_functional_call_is_replayed_with_its_own_parameters(name: str) -> None:
    family = FAMILIES[name]
    model, batch = family.build(family.attentions[0]), family.batch()
    values = {n: (p.detach() * 1.5).requires_grad_() for n, p in model.named_parameters()}

    def gradients() -> tuple[Tensor | None, ...]:
        torch.manual_seed(3)
        loss = torch.func.functional_call(model, values, kwargs=batch).loss
        return torch.autograd.grad(loss, list(values.values()), allow_unused=True)

    plain = gradients()
    for settings in ({}, {"hold": (0, 2)}):
        stack = planned(model, **settings)
        for one, other in zip(plain, gradients(), strict=True):
            assert torch.equal(one, other) if one is not None else other is None
        stack.restore()
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.filterwarnings("ignore:Using backward\\(\\) with create_graph=True")
def test_double_backward() -> None:
    model, batch = llama("eager"), tokens()
    weight = Stack.of(model).blocks[1].mlp.up_proj.weight

    def second_order() -> Tensor:
        torch.manual_seed(3)
        (first,) = torch.autograd.grad(model(**batch).loss, weight, create_graph=True)
        (second,) = torch.autograd.grad(first.square().sum(), weight)
        return second

    plain = second_order()
    for settings in ({}, {"hold": (0, 2)}):
        stack = planned(model, **settings)
        assert torch.equal(plain, second_order())
        stack.restore()


def test_nothing_of_a_step_stays_alive() -> None:
    import gc

    model, batch = llama(), tokens()
    planned(model, hold=(0, 2))

    def alive() -> int:
        gc.collect()
        return sum(issubclass(type(o), Tensor) for o in gc.get_objects())

    step(model, batch)
    before = alive()
    step(model, batch)
    model(**batch)  # a forward without a backward
    assert alive() <= before


def test_batch_norm_statistics_move_once() -> None:
    torch.manual_seed(1)
    block = lambda: nn.Sequential(nn.BatchNorm1d(8), nn.Linear(8, 8), nn.GELU())  # noqa: E731
    model = nn.Sequential(*[block() for _ in range(4)])
    x = torch.randn(6, 8)
    before = {k: v.clone() for k, v in model.state_dict().items()}

    def run() -> dict[str, Tensor]:
        model.load_state_dict(before)
        model.zero_grad()
        model(x).square().sum().backward()
        return {**model.state_dict(), **{n: p.grad for n, p in model.named_parameters()}}

    plain = {k: v.clone() for k, v in run().items()}
    planned(model, hold=(0, 2))
    assert all(torch.equal(plain[k], v) for k, v in run().items())
    assert model[0][0].num_batches_tracked == 1


# ---- refused -------------------------------------------------------------------------------


def test_an_encoder_decoder_needs_a_path() -> None:
    model, batch = encoder_decoder(), tokens()
    with pytest.raises(StackError, match=r"\['decoder.block', 'encoder.block'\].* path="):
        Stack.of(model)
    plain = step(model, batch)
    for path in ("encoder.block", "decoder.block"):
        stack = Stack.of(model, path=path)
        apply_spans(stack, [Span(0, len(stack), "recompute", {"hold": (0,)})])
    assert_same(plain, step(model, batch))  # both lists planned at once


@pytest.mark.parametrize(
    "model", [nn.Linear(3, 3), nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 3))]
)
def test_a_model_without_layers_is_refused(model: nn.Module) -> None:
    with pytest.raises(StackError, match=r"no stack of blocks found .* expected an nn.ModuleList"):
        Stack.of(model)


@pytest.mark.parametrize(
    ("path", "message"),
    [("encoder.blok", "has nothing at 'encoder.blok'"), ("shared", "'shared' is Embedding")],
)
def test_a_wrong_path_is_refused(path: str, message: str) -> None:
    with pytest.raises(StackError, match=message):
        Stack.of(encoder_decoder(), path=path)


@pytest.mark.parametrize("spans", [[(0, 5)], [(2, 2)], [(-1, 2)], [(0, 3), (2, 4)]])
def test_spans_that_do_not_fit_are_refused_before_anything_changes(
    spans: list[tuple[int, int]],
) -> None:
    stack = Stack.of(PlainModel())
    with pytest.raises(StackError, match="does not fit a stack of 4 blocks"):
        apply_spans(stack, [Span(a, b, "keep") for a, b in spans])
    assert all(e is None for e in stack.executors)


def test_an_unknown_method_is_refused_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"'recomputed' is not a method.*'recompute'"):
        method("recomputed")
    with pytest.raises(ConfigError, match=r"no setting 'holds'.*'hold'"):
        method("recompute").configure({"holds": (0,)})


def test_held_inputs_outside_the_span_are_refused() -> None:
    with pytest.raises(ConfigError, match="hold names block 4 of a span of 4"):
        planned(PlainModel(), hold=(0, 4))


@pytest.mark.parametrize("change", ["hook", "in place", "loop"])
def test_rebuilding_through_a_changed_hidden_state_is_refused(change: str) -> None:
    model, batch = PlainModel(), tokens()
    if change == "hook":
        model.blocks[0].register_forward_hook(lambda m, i, out: out * 1.0)
    elif change == "in place":
        model.blocks[0].register_forward_hook(lambda m, i, out: out.mul_(0.5))
    else:
        model.blocks[1].register_forward_pre_hook(lambda m, args: (args[0] * 1.0,))
    plain = step(model, batch)
    planned(model, hold=(0, 2))
    with pytest.raises(StackError, match=r"changes the hidden state.* hold=None"):
        step(model, batch)
    planned(model)
    assert_same(plain, step(model, batch))


def test_full_backward_hooks_fire_once_and_need_held_inputs() -> None:
    model, batch = llama(), tokens()
    fired: list[int] = []
    for k, block in enumerate(Stack.of(model).blocks):
        block.register_full_backward_hook(lambda *_, k=k: fired.append(k))
    plain = step(model, batch)
    expected = list(fired)
    fired.clear()
    planned(model)
    assert_same(plain, step(model, batch))
    assert fired == expected == [3, 2, 1, 0]
    planned(model, hold=(0, 2))
    with pytest.raises(StackError, match="changes the hidden state"):
        step(model, batch)


class Counting(nn.Module):
    """A block that changes a buffer of its own in forward."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(32, 32)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return x + self.linear(x) * self.calls


def test_a_block_that_changes_its_state_is_refused() -> None:
    model = nn.Sequential(*[Counting() for _ in range(3)])
    planned(model)
    with pytest.raises(StackError, match=r"changes its buffer .*calls.* method 'keep'"):
        model(torch.randn(2, 32))
    apply_spans(Stack.of(model), [Span(0, 3, "keep")])
    model(torch.randn(2, 32)).sum().backward()
    assert model[0].linear.weight.grad is not None


def test_a_block_without_a_hidden_state_is_refused() -> None:
    model = nn.Sequential(nn.Embedding(5, 4), nn.Embedding(5, 4))
    planned(model)
    with pytest.raises(StackError, match="called without a floating-point tensor"):
        model(torch.tensor([1, 2]))


# ---- restore -------------------------------------------------------------------------------


def test_a_plan_replaces_a_plan_and_restore_leaves_nothing() -> None:
    model = PlainModel()
    stack = planned(model)
    first = stack.executors
    apply_spans(stack, [Span(0, 4, "keep")])
    assert not set(map(id, first)) & set(map(id, stack.executors))
    stack.restore()
    assert not any("forward" in vars(m) for m in model.modules())
    stack.restore()  # nothing to undo is no error


def test_a_forward_that_stood_in_the_instance_comes_back() -> None:
    model, batch = PlainModel(), tokens()
    block = model.blocks[1]
    own = type(block).forward.__get__(block)
    calls: list[int] = []

    def patched(x: Tensor) -> Tensor:
        calls.append(1)
        return own(x) * 0.5

    block.forward = patched
    plain = step(model, batch)
    stack = planned(model)
    assert_same(plain, step(model, batch))
    stack.restore()
    assert block.forward is patched
    assert len(calls) == 1 + 2  # the plain step; forward and replay


def names_of(stack: Stack) -> list[str | None]:
    return [type(e).__name__ if e is not None else None for e in stack.executors]


def test_restore_takes_out_what_its_apply_put_in_and_nothing_else() -> None:
    stack = Stack.of(PlainModel())
    apply_spans(stack, [Span(0, 4, "recompute")])
    apply_spans(stack, [Span(0, 2, "keep")])
    stack.restore()
    assert names_of(stack) == [None, None, "RecomputeExecutor", "RecomputeExecutor"]
    stack.restore()
    assert names_of(stack) == [None] * 4


def test_two_stacks_of_one_model_undo_in_any_order() -> None:
    model = PlainModel()
    lower, upper = Stack.of(model), Stack.of(model)
    apply_spans(lower, [Span(0, 2, "recompute")])
    apply_spans(upper, [Span(2, 4, "keep")])
    lower.restore()
    assert names_of(upper) == [None, None, "KeepExecutor", "KeepExecutor"]
    lower.restore()  # it has nothing left in the model
    assert names_of(upper) == [None, None, "KeepExecutor", "KeepExecutor"]


def test_a_stack_that_applied_nothing_takes_out_what_came_last() -> None:
    model = PlainModel()
    apply_spans(Stack.of(model), [Span(0, 2, "recompute")])
    apply_spans(Stack.of(model), [Span(2, 4, "keep")])
    Stack.of(model).restore()
    assert names_of(Stack.of(model)) == ["RecomputeExecutor", "RecomputeExecutor", None, None]
    Stack.of(copy.deepcopy(model)).restore()
    assert names_of(Stack.of(model)) == ["RecomputeExecutor", "RecomputeExecutor", None, None]
    Stack.of(model).restore()
    assert not any("forward" in vars(m) for m in model.modules())


@pytest.mark.parametrize("same_stack", [True, False])
def test_restoring_a_plan_of_some_blocks_leaves_a_reversible_stack_whole(same_stack: bool) -> None:
    model = shoestring.reversible(llama())
    before = step(model, tokens())
    stack = Stack.of(model)
    apply_spans(stack, [Span(0, 2, "keep")])
    assert_same(before, step(model, tokens()))
    (stack if same_stack else Stack.of(model)).restore()
    assert names_of(stack) == ["ReversibleExecutor"] * 4
    assert_same(before, step(model, tokens()))


# ---- torch.compile -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("recompute", {}),
        ("recompute", {"hold": (0, 2)}),
        ("recompute", {"save": "matmuls"}),
        ("reversible", {"keep_top": 1}),
    ],
    ids=["recompute", "inputs rebuilt", "matmuls saved", "reversible"],
)
# Dynamo looks at .grad of its inputs, which warns for those that are not leaves.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_a_planned_model_can_be_compiled(name: str, settings: dict[str, Any]) -> None:
    model: nn.Module = PlainModel()
    if name == "reversible":
        shoestring.reversible(model, rule="bdia", scale_bits=18)

    def gradients(run: nn.Module) -> list[Tensor]:
        model.zero_grad()
        torch.manual_seed(3)
        run(**tokens()).loss.backward()
        return [p.grad for p in model.parameters()]

    plain = gradients(model)
    apply_spans(Stack.of(model), [Span(0, 4, name, settings)])
    torch._dynamo.reset()
    again = gradients(torch.compile(model, backend="eager"))
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))
