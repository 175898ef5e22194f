"""One number at a time: bytes, floating-point operations, seconds, gradient error."""

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from shoestring.meter import Meter


def preallocate_gradients(net: nn.Module) -> None:
    for p in net.parameters():
        p.grad = torch.zeros_like(p)


def memory(net: nn.Module, x: Tensor) -> dict[str, float]:
    """Bytes beyond parameters, their gradients and the input, of forward + backward: live when
    forward ends, at the peak, and after the step (MB = 10^6 bytes); and its floating-point
    operations, by torch's registry of formulas."""
    preallocate_gradients(net)
    net(x).backward()  # a first pass: scales are calibrated, buffers exist
    with Meter(net) as meter, Operations() as operations:
        loss = net(x)
        meter.mark("between")
        retained = meter.tracker.live_bytes
        loss.backward()
        del loss
    return {
        "retained_mb": (retained - meter.baseline_bytes) / 1e6,
        "peak_mb": (meter.peak_bytes - meter.baseline_bytes) / 1e6,
        "after_mb": (meter.end_bytes - meter.baseline_bytes) / 1e6,
        "operations": operations.total,
    }


class Operations(TorchDispatchMode):
    """FlopCounterMode's sum without its module hooks, under which some peers do not run."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        formula = flop_registry.get(func.overloadpacket)
        if formula is not None:
            self.total += formula(*args, **(kwargs or {}), out_val=out)
        return out


def step(net: nn.Module, x: Tensor) -> None:
    net(x).backward()


def seconds(
    nets: Mapping[str, nn.Module], x: Tensor, *, rounds: int
) -> dict[str, list[dict[str, float]]]:
    """Wall and processor seconds of forward + backward, every net once a round, in turn; the
    order is reversed in every other round, so that drift of the machine cancels."""
    for net in nets.values():
        preallocate_gradients(net)
        step(net, x)
    taken: dict[str, list[dict[str, float]]] = {name: [] for name in nets}
    for r in range(rounds):
        for name in list(nets) if r % 2 == 0 else reversed(list(nets)):
            wall, processor = time.perf_counter(), time.process_time()
            step(nets[name], x)
            taken[name].append(
                {
                    "wall_s": time.perf_counter() - wall,
                    "processor_s": time.process_time() - processor,
                }
            )
    return taken


def paired(taken: Mapping[str, list[dict[str, float]]], name: str, base: str, key: str) -> float:
    """Median over rounds of name's time over base's in the same round."""
    ratios = [a[key] / b[key] for a, b in zip(taken[name], taken[base], strict=True)]
    return statistics.median(ratios)


def gradients(net: Any, x: Tensor) -> Tensor:
    """The gradients of all sub-blocks' parameters in one float64 vector, in one order."""
    for p in net.parameters():
        p.grad = None
    # The mean of squares after a norm hardly depends on what is below it; this does.
    net(x, x.flip(0)).backward()
    parameters = [p for branch in net.branches for p in branch.parameters()]
    return torch.cat([_grad(p).double().flatten() for p in parameters])


def _grad(p: Tensor) -> Tensor:
    return torch.zeros_like(p) if p.grad is None else p.grad


def relative_error(got: Tensor, exact: Tensor) -> float:
    return float((got - exact).norm() / exact.norm())


def sharpened(make: Callable[[], nn.Module], factor: float) -> nn.Module:
    """The network with every weight matrix multiplied, a stand-in for trained sharpness."""
    net = make()
    with torch.no_grad():
        for p in net.parameters():
            if p.dim() == 2:
                p *= factor
    return net


def rounded(value: Any) -> Any:
    """Numbers to 5 significant digits, for JSON."""
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, dict):
        return {k: rounded(v) for k, v in value.items()}
    if isinstance(value, list):
        return [rounded(v) for v in value]
    return value
