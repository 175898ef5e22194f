"""Plans in loops written with Accelerate: put in place before and after `prepare`."""

from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import Tensor
from torch.utils.data import DataLoader

from integrations.trainers import LONGEST, Lines, model, padded
from shoestring.errors import ConfigError
from shoestring.integrations import plan_accelerated
from shoestring.integrations.looking import largest_batch
from shoestring.meter import Meter
from shoestring.planner import Plan


@pytest.fixture(autouse=True)
def fresh_state() -> Iterator[None]:
    """Accelerate keeps its settings for the whole process."""
    yield
    AcceleratorState._reset_state(True)


def make_optimizer(parameters: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=1e-3)


def accelerator(**settings: Any) -> Accelerator:
    AcceleratorState._reset_state(True)
    return Accelerator(cpu=True, **settings)


CLIP = 1.0


def run(
    *, budget: int | None, when: str = "before", allow: Any = ("recompute",), clip: bool = True,
    steps: int = 24, **settings: Any,
) -> tuple[Tensor, Plan | None, int]:  # fmt: skip
    """(losses of every batch, the plan, the measured peak of one update)."""
    of = accelerator(**settings)
    net = model().train()
    data = DataLoader(Lines(equal=True), batch_size=4, shuffle=True, collate_fn=padded)
    batch = largest_batch(data)
    torch.manual_seed(3)
    given = {"budget": budget, "allow": list(allow), "seconds": False}
    clipped = {"grad_clip": CLIP if clip else None}
    chosen = None
    if budget is not None and when == "before":
        chosen = plan_accelerated(of, net, batch, optimizer=make_optimizer, **given, **clipped)
        chosen.apply(net)
        net, optimizer, data = of.prepare(net, chosen.optimizer(net), data)
    else:
        net, optimizer, data = of.prepare(net, make_optimizer(list(net.parameters())), data)
        if budget is not None:
            chosen = plan_accelerated(of, net, batch, optimizer=optimizer, **given, **clipped)
            chosen.apply(net)
    losses, peaks = [], [0]
    while len(losses) < steps:
        for batch in data:
            metered = Meter(net, optimizer.optimizer) if len(losses) < 7 else nullcontext()
            with metered as meter, of.accumulate(net):
                loss = net(**batch).loss
                of.backward(loss)
                if of.sync_gradients and clip:
                    of.clip_grad_norm_(net.parameters(), CLIP)
                optimizer.step()
                optimizer.zero_grad()
            losses.append(loss.detach())
            peaks += [meter.peak_bytes] if meter else []
    return torch.stack(losses), chosen, max(peaks)


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize(
    "settings",
    [{}, {"gradient_accumulation_steps": 3}, {"mixed_precision": "bf16"}, {"clip": False}],
    ids=["plain", "accumulated", "bf16", "not clipped"],
)
def test_losses_are_equal_and_the_budget_is_kept(settings, when):
    expected, _, roomy = run(budget=None, **settings)
    budget = roomy * 85 // 100
    losses, chosen, measured = run(budget=budget, when=when, **settings)
    assert any(span.method == "recompute" for span in chosen.spans)
    assert torch.equal(losses, expected)
    assert measured <= chosen.peak_bytes <= budget
    assert chosen.peak_bytes <= 1.03 * measured


def test_an_optimizer_that_keeps_its_states_elsewhere_changes_no_loss():
    expected, _, roomy = run(budget=None)
    losses, chosen, measured = run(budget=roomy // 2, allow=["offload_optimizer", "recompute"])
    assert chosen.patches
    assert torch.equal(losses, expected)
    assert measured <= chosen.peak_bytes <= 1.03 * measured


def test_a_plan_comes_out_of_a_prepared_model():
    of, net = accelerator(mixed_precision="bf16"), model()
    batch = padded([{"input_ids": [1] * LONGEST}] * 4)
    of.prepare(net)
    before = vars(net)["forward"]
    given = {"optimizer": make_optimizer, "seconds": False}
    roomy = plan_accelerated(of, net, batch, budget="1GiB", allow=["keep"], **given).peak_bytes
    chosen = plan_accelerated(
        of, net, batch, budget=roomy * 97 // 100, allow=["chunked_loss"], **given
    )
    assert chosen.patches
    chosen.apply(net)
    net(**batch).loss.backward()
    chosen.restore(net)
    assert vars(net)["forward"] is before
    assert net(**batch).logits is not None


def test_what_does_not_go_together_is_refused():
    batch = padded([{"input_ids": [1] * 8}])
    net = model()
    of = accelerator(gradient_accumulation_steps=2)
    with pytest.raises(ConfigError, match="gradient_accumulation_steps has to be 1"):
        plan_accelerated(of, net, batch, budget="1GiB", allow=["fused_step"])
    of = accelerator()
    with pytest.raises(ConfigError, match="before gradients can be clipped"):
        plan_accelerated(of, net, batch, budget="1GiB", allow=["fused_step"], grad_clip=1.0)
    with pytest.raises(ConfigError, match=r"accelerator\.accumulate add up"):
        plan_accelerated(of, net, batch, budget="1GiB", allow=["microbatch"])
    of = accelerator(dynamo_backend="inductor")
    with pytest.raises(ConfigError, match="Leave dynamo_backend out"):
        plan_accelerated(of, net, batch, budget="1GiB")
    for module in net.modules():
        module.gradient_checkpointing = True
    with pytest.raises(ConfigError, match="gradient_checkpointing_disable"):
        plan_accelerated(accelerator(), net, batch, budget="1GiB")
