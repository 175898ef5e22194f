"""The methods of the optimizer on a GPU: equal steps, states in host memory, predicted peaks."""

import pytest
import torch

from methods.optimizers import Chain, batch, gpt, put

pytestmark = pytest.mark.gpu


def trained(chain: Chain, steps: int = 4) -> tuple[list[float], list[torch.Tensor], object]:
    model = gpt().cuda()
    stepping = put(model, chain)
    losses = []
    for step in range(steps):
        data = {name: value.cuda() for name, value in batch(seed=step).items()}
        loss = model(**data).loss
        loss.backward()
        stepping.step()
        stepping.zero_grad()
        losses.append(float(loss.detach()))
    return losses, [p.detach().clone() for p in model.parameters()], stepping


@pytest.mark.parametrize(
    "chain",
    [
        [("fused_step", {})],
        [("offload_optimizer", {})],
        [("offload_optimizer", {}), ("fused_step", {})],
    ],
)
def test_exact_methods_step_bit_for_bit(chain: Chain) -> None:
    losses, weights, stepping = trained(chain)
    expected, plain, _ = trained([])
    assert losses == expected
    assert all(torch.equal(a, b) for a, b in zip(weights, plain, strict=True))
    if chain[0][0] == "offload_optimizer":
        states = [v for entry in stepping.state.values() for v in entry.values()]  # type: ignore[attr-defined]
        assert all(v.device.type == "cpu" for v in states if v.nbytes >= 4096)


@pytest.mark.parametrize(
    "chain",
    [
        [("low_bit_states", {})],
        [("low_bit_states", {"bits": 4})],
        [("bf16_stochastic", {}), ("low_bit_states", {}), ("fused_step", {})],
    ],
)
def test_approximate_methods_end_near_and_repeat(chain: Chain) -> None:
    losses, weights, _ = trained(chain, 20)
    again, same, _ = trained(chain, 20)
    expected, _, _ = trained([], 20)
    assert losses == again
    assert all(torch.equal(a, b) for a, b in zip(weights, same, strict=True))
    assert abs(losses[-1] - expected[-1]) < 0.05
