"""Plans and PEFT's adapters: a plan before the model is wrapped, and after."""

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import shoestring
from integrations.trainers import LONGEST, Lines, model, padded
from shoestring.errors import StackError
from shoestring.meter import Meter
from shoestring.planner import Plan
from shoestring.stack import Stack

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings(
    # of transformers 5, which peft reads when it wraps a model
    "ignore:`is_gradient_checkpointing`:FutureWarning",
)
DATA = Lines(equal=True)


def make_optimizer(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=1e-2)


def wrapped(net: nn.Module, *, targets: Any = "all-linear") -> Any:
    torch.manual_seed(2)
    settings = peft.LoraConfig(r=4, target_modules=targets, lora_dropout=0.1, task_type="CAUSAL_LM")
    return peft.get_peft_model(net, settings).train()


def batches(count: int) -> list[dict[str, Tensor]]:
    return [padded([DATA[4 * (i % 15) + k] for k in range(4)]) for i in range(count)]


def train(net: nn.Module, count: int = 20, accumulate: int = 1) -> tuple[Tensor, int]:
    """(losses, measured peak)."""
    torch.manual_seed(3)
    optimizer = make_optimizer([p for p in net.parameters() if p.requires_grad])
    losses, peaks = [], [0]
    for i, batch in enumerate(batches(count)):
        with Meter(net, optimizer) if i < 4 else nullcontext() as meter:
            loss = net(**batch).loss
            (loss / accumulate if accumulate > 1 else loss).backward()
            if (i + 1) % accumulate == 0:
                optimizer.step()
                optimizer.zero_grad()
        losses.append(loss.detach())
        peaks += [meter.peak_bytes] if meter else []
    return torch.stack(losses), max(peaks)


def planned(net: nn.Module, budget: int | str, accumulate: int = 1, **settings: Any) -> Plan:
    settings = {"allow": ["recompute"], "optimizer": make_optimizer, **settings}
    return shoestring.plan(
        net, batches(1)[0], budget=budget, seconds=False, accumulate=accumulate, **settings
    )


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_wrapped_model_is_planned_and_keeps_its_losses(accumulate):
    expected, roomy = train(wrapped(model()), accumulate=accumulate)
    net = wrapped(model())
    budget = roomy * 80 // 100
    chosen = planned(net, budget, accumulate)
    assert any(span.method == "recompute" for span in chosen.spans)
    names = list(net.state_dict())
    chosen.apply(net)
    losses, measured = train(net, accumulate=accumulate)
    assert torch.equal(losses, expected)
    assert measured <= chosen.peak_bytes <= budget
    assert chosen.peak_bytes <= 1.03 * measured
    assert list(net.state_dict()) == names


def test_a_model_that_is_planned_can_be_wrapped_afterwards():
    expected, roomy = train(wrapped(model()))
    net = model()
    names = list(net.state_dict())
    chosen = planned(net, "1GiB")
    chosen = planned(net, chosen.peak_bytes * 80 // 100)
    assert any(span.method == "recompute" for span in chosen.spans)
    chosen.apply(net)
    both = wrapped(net)
    losses, measured = train(both)
    assert torch.equal(losses, expected)
    assert measured < roomy
    merged = both.unload()
    chosen.restore(merged)
    assert list(merged.state_dict()) == names
    assert not any("forward" in vars(m) for m in merged.modules())


def test_saved_adapters_have_the_same_names_and_values(tmp_path: Path):
    from safetensors.torch import load_file

    saved = []
    for name in ("plain", "planned"):
        net = wrapped(model())
        if name == "planned":
            chosen = planned(net, "1GiB")
            planned(net, chosen.peak_bytes * 80 // 100).apply(net)
        train(net, 4)
        net.save_pretrained(tmp_path / name)
        saved.append(load_file(tmp_path / name / "adapter_model.safetensors"))
    assert saved[0].keys() == saved[1].keys()
    assert all(torch.equal(saved[0][k], saved[1][k]) for k in saved[0])
    back = peft.PeftModel.from_pretrained(model(), tmp_path / "planned")
    assert any("lora" in name for name in back.state_dict())


@pytest.mark.parametrize("allow", [["recompute"], ["recompute", "chunked_loss"]])
def test_adapters_are_merged_after_the_plan_is_out(allow):
    net = wrapped(model())
    chosen = planned(net, planned(net, "1GiB").peak_bytes * 80 // 100, allow=allow)
    chosen.apply(net)
    train(net, 4)
    batch = batches(1)[0]
    net.eval()
    with torch.no_grad():
        before = net(input_ids=batch["input_ids"]).logits
    chosen.restore(net)
    merged = net.merge_and_unload()
    assert not any("forward" in vars(m) for m in merged.modules())
    assert not any("lora" in name for name in merged.state_dict())
    with torch.no_grad():
        after = merged(input_ids=batch["input_ids"]).logits
    torch.testing.assert_close(before, after, rtol=1e-4, atol=1e-5)


def test_adapters_can_be_switched_under_a_plan():
    def switching(net: Any) -> list[Tensor]:
        torch.manual_seed(5)
        net.add_adapter("second", peft.LoraConfig(r=4, target_modules="all-linear"))
        net.set_adapter("second")
        second, _ = train(net, 3)
        net.set_adapter("default")
        first, _ = train(net, 3)
        with net.disable_adapter(), torch.no_grad():
            return [second, first, net(**batches(1)[0]).logits]

    expected = switching(wrapped(model()))
    net = wrapped(model())
    chosen = planned(net, "1GiB")
    planned(net, chosen.peak_bytes * 80 // 100).apply(net)
    found = switching(net)
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))
    assert any(Stack.of(net).executors)


def test_a_plan_for_the_bare_model_is_not_for_the_wrapped_one():
    chosen = planned(model(), "1GiB")
    with pytest.raises(StackError, match=r"this plan is for LlamaForCausalLM with .* parameters"):
        chosen.apply(wrapped(model()))


def test_a_wrapped_model_that_is_planned_takes_batches_as_long_as_planned():
    net = wrapped(model())
    chosen = planned(net, "1GiB")
    assert chosen.made_for.batch["input_ids"] == (4, LONGEST)
    assert chosen.made_for.trained < chosen.made_for.parameters
