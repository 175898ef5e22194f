"""Bytes and floating-point operations: flat in depth, one more forward."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from reversible.small import Network, batch, network, sub_blocks
from shoestring.errors import ConfigError
from shoestring.meter import Meter
from shoestring.methods.reversible import ReversibleStack


def memory(count: int, **settings) -> tuple[int, int, int]:
    """(retained, peak, left) bytes of one step beyond parameters and gradients."""
    net = network(count, **settings)
    for p in net.parameters():
        p.grad = torch.zeros_like(p)
    net(batch()).backward()
    with Meter(net) as meter:
        loss = net(batch())
        meter.mark("between")
        live = meter.tracker.live_bytes
        loss.backward()
        del loss
    base = meter.baseline_bytes
    return live - base, meter.peak_bytes - base, meter.end_bytes - base


def test_memory_does_not_grow_with_depth_and_none_is_left():
    shallow, deep = memory(12), memory(96)
    assert shallow[2] == deep[2] == 0
    # Four bytes a sub-block are the flags of the range check, joined into one tensor.
    assert deep[0] - shallow[0] <= 2 * 4 * (96 - 12) * 2
    assert abs(deep[1] - shallow[1]) <= 0.05 * shallow[1]


def test_stored_activations_do_grow():
    shallow, deep = memory(12, stored=True), memory(96, stored=True)
    assert deep[0] > 7 * shallow[0]


def test_dropout_adds_one_random_state_a_sub_block():
    state = torch.get_rng_state().numel()
    grown = memory(24, dropout=0.1)[0] - memory(12, dropout=0.1)[0]
    assert 12 * state <= grown <= 12 * (state + 32)


def test_held_outputs_cost_one_stream_each():
    n_bytes = batch().numel() * 4
    assert memory(12, hold_outputs=(1, 3, 5))[0] - memory(12)[0] == 3 * n_bytes


def flops(net: Network) -> int:
    x = batch().repeat(1, 4, 1)
    net(x).backward()  # calibrates
    with FlopCounterMode(display=False) as counter:
        net(x).backward()
    return counter.get_total_flops()


def test_reversal_costs_one_more_forward():
    ratio = flops(network(24)) / flops(network(24, stored=True))
    assert 1.30 <= ratio <= 1.34


@pytest.mark.parametrize("keep_top", [0, 4, 12, 24])
def test_keeping_the_top_saves_its_share(keep_top):
    ratio = flops(network(24, keep_top=keep_top)) / flops(network(24, stored=True))
    # The first sub-block's last product, and the stem, are not run again.
    assert ratio == pytest.approx(1 + (24 - keep_top) / 72, rel=0.012)


def test_holding_the_mlp_outputs_saves_their_last_product():
    saved = flops(network(24)) - flops(network(24, hold_outputs=range(1, 24, 2)))
    assert saved == 12 * 2 * (2 * 32) * (4 * 16) * 16


@pytest.mark.parametrize("keep_top", [-1, 7])
def test_keep_top_outside_the_stack_is_refused(keep_top):
    with pytest.raises(ConfigError, match=r"keep_top = -?\d; expected 0 to 6 sub-blocks"):
        ReversibleStack(sub_blocks(6), keep_top=keep_top)
