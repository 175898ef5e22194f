"""Is training by reversal that of stored activations to the last bit, and would a bit be seen?"""

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from networks import Network
from torch import Tensor

from shoestring.streams import StreamTape

MODES = ("float32", "bf16 autocast")
DROPOUT = 0.1


@contextlib.contextmanager
def one_value_off(by: float = 0.0) -> Iterator[None]:
    """The control: one element of the last pair is too large in backward, by one step of the grid
    or by a value (16-bit floats do not see one step)."""
    seal = StreamTape.seal

    def off(tape: StreamTape, lattice: Any, prev: Tensor, cur: Tensor) -> None:
        cur = cur.clone()
        cur.view(-1)[0] += max(1, round(by * 2**lattice.grid.scale_bits))
        seal(tape, lattice, prev, cur)

    with mock.patch.object(StreamTape, "seal", off):
        yield


class Seen:
    """The inputs of every sub-block, in forward and when it was run again."""

    def __init__(self, net: Network) -> None:
        self.inputs: list[list[Tensor]] = [[] for _ in net.branches]
        for k, branch in enumerate(net.branches):
            branch.register_forward_pre_hook(
                lambda module, args, k=k: self.inputs[k].append(args[0].detach().clone())
            )


def one_step(net: Network, x: Tensor, mode: str) -> list[Tensor]:
    """The loss and every gradient of a seeded step."""
    net.zero_grad()
    torch.manual_seed(3)
    with torch.autocast("cpu", torch.bfloat16, enabled=mode != "float32"):
        loss = net(x, x.flip(0))
    loss.backward()
    return [loss.detach(), *(p.grad for p in net.parameters() if p.grad is not None)]


def compare(x: Tensor, *, L: int, D: int, mode: str, seed: int, control: bool) -> dict[str, int]:
    """How many of the values compared are torch.equal."""
    sizes = {"L": L, "D": D, "seed": seed, "dropout": DROPOUT}
    stored = Network("ours", **sizes, keep_top=2 * L)
    ours = Network("ours", **sizes)
    expected = [one_step(stored, x, mode) for _ in range(2)][-1]  # the first one calibrates
    one_step(ours, x, mode)
    seen = Seen(ours)
    off = one_value_off(0.0 if mode == "float32" else 1 / 16)
    with off if control else contextlib.nullcontext():
        found = one_step(ours, x, mode)
    same = [torch.equal(a, b) for a, b in zip(expected, found, strict=True)]
    rebuilt = [torch.equal(first, again) for first, again in seen.inputs]
    return {
        "loss_equal": int(same[0]),
        "gradients": len(same) - 1,
        "gradients_equal": sum(same[1:]),
        "inputs": len(rebuilt),
        "inputs_equal": sum(rebuilt),
    }


def run(x: Tensor, depths: tuple[int, ...], D: int, seed: int) -> dict[str, Any]:
    """Every depth and mode, and the control of each, which has to differ."""
    rows, controls = {}, {}
    for L in depths:
        for mode in MODES:
            name = f"{L} blocks, {mode}"
            rows[name] = compare(x, L=L, D=D, mode=mode, seed=seed, control=False)
            controls[name] = compare(x, L=L, D=D, mode=mode, seed=seed, control=True)
            print(f"  {name:28} {rows[name]}\n  {'control':28} {controls[name]}", flush=True)
    for name, row in rows.items():
        assert row["loss_equal"], name
        assert row["gradients_equal"] == row["gradients"] > 0, name
        assert row["inputs_equal"] == row["inputs"] > 0, name
        control = controls[name]
        assert control["gradients_equal"] < control["gradients"], f"{name}: blind"
        assert control["inputs_equal"] < control["inputs"], f"{name}: blind"
    return {"rows": rows, "controls": controls, "dropout": DROPOUT}
