"""Checkpoints of optimizers that keep their states in another way: bit for bit through the disk."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from methods.optimizers import Chain, gpt, put, same_weights, train
from shoestring.checkpoint import Store
from shoestring.meter.outside import is_outside
from shoestring.training.distributed import World
from shoestring.training.snapshot import Snapshot, restore

WORLD = World(0, 1, torch.device("cpu"))
CHAINS: dict[str, Chain] = {
    "fused": [("fused_step", {})],
    "8 bits": [("low_bit_states", {})],
    "4 bits, fused": [("low_bit_states", {"bits": 4}), ("fused_step", {})],
    "bf16": [("bf16_stochastic", {})],
    "offloaded": [("offload_optimizer", {})],
    "turns": [("block_coordinate", {"steps": 2})],
    "8 bits, turns": [("low_bit_states", {}), ("block_coordinate", {"steps": 2})],
    "all": [
        ("bf16_stochastic", {}), ("low_bit_states", {}), ("offload_optimizer", {}),
        ("fused_step", {}),
    ],
}  # fmt: skip


@pytest.mark.parametrize("name", CHAINS)
def test_a_run_goes_on_from_its_checkpoint_bit_for_bit(name: str, tmp_path: Path) -> None:
    whole, first, second = gpt(dropout=0.1), gpt(dropout=0.1), gpt(dropout=0.1)
    losses = train(whole, put(whole, CHAINS[name]), 6)
    stepping = put(first, CHAINS[name])
    begun = train(first, stepping, 3)
    saved = Snapshot.of(first, stepping, WORLD)
    store = Store(tmp_path)
    store.save(3, tensors=saved.tensors, texts=saved.texts())
    again = put(second, CHAINS[name])
    found, _ = store.newest()
    assert found is not None
    restore(found, second, again, WORLD)
    if "offload" in str(CHAINS[name]):  # put away at once, not in the next step
        large = [v for entry in again.state.values() for v in entry.values()
                 if isinstance(v, Tensor) and v.nbytes >= 4096]  # fmt: skip
        assert large
        assert all(is_outside(v.untyped_storage()) for v in large)
    assert begun + train(second, again, 6, start=3) == losses
    assert same_weights(whole, second)
