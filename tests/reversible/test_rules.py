"""The two-step rules: what they cost, and what they are in the mean."""

import math

import pytest
import torch

from reversible.small import Attention, Network, batch, network, run_seeded, sub_blocks
from shoestring.errors import ConfigError
from shoestring.meter import Meter
from shoestring.methods.reversible import ReversibleStack
from shoestring.ops.fixed_point import Grid
from shoestring.streams import RULES, StreamRun

DRAWING = ("bdia", "random_sign")


def plain(blocks, x):
    for f in blocks:
        x = x + f(x)
    return x


@pytest.mark.parametrize("rule", DRAWING)
def test_evaluated_a_rule_that_draws_is_the_plain_network(rule):
    stack = ReversibleStack(sub_blocks(6), rule).eval()
    _, q = stack(batch(), batch())
    expected = plain(stack.sub_blocks, batch())
    # Every update is rounded to the grid once.
    assert (q - expected).abs().max() < 6 * 2.0**-stack.scale_bits + 1e-5


@pytest.mark.parametrize("rule", DRAWING)
def test_the_mean_of_many_draws_is_the_residual_step(rule):
    torch.manual_seed(0)
    f = Attention()
    draws, grid = 20_000, Grid("int32", 20)
    x = batch()[:1, :2]
    below, here = x.expand(draws, -1, -1), (0.5 * x + 1).expand(draws, -1, -1)
    with torch.no_grad():
        run = StreamRun(RULES[rule], grid, training=True)
        run.start(below, here)
        run.step(lambda h: f(h[:1]).expand_as(h), None, replay=False)
        _, after = run.finish()
        expected = here[0] + f(here[:1])[0]
        spread = after.std(dim=0) / math.sqrt(draws)
    error = (after.mean(dim=0) - expected).abs()
    assert (error <= 5 * spread + 2.0**-18).all()
    assert spread.max() > 0


@pytest.mark.parametrize("rule", ["midpoint", "leapfrog", "feistel"])
def test_rules_without_draws_follow_their_equation(rule):
    torch.manual_seed(0)
    blocks = sub_blocks(3)
    a, b, c = {"midpoint": (1, 0, 1), "leapfrog": (-1, 2, 1), "feistel": (1, 0, 1)}[rule]
    below, here = batch(seed=1), batch(seed=2)
    stack = ReversibleStack(blocks, rule, scale_bits=22)
    with torch.no_grad():
        p, q = stack(below, here)
        for f in blocks:
            below, here = here, a * below + b * here + c * f(here)
    assert torch.allclose(p, below, atol=1e-5)
    assert torch.allclose(q, here, atol=1e-5)


def test_bdia_follows_its_equation():
    torch.manual_seed(0)
    f = Attention()
    below, here = batch(seed=1), batch(seed=2)
    stack = ReversibleStack([f], "bdia", scale_bits=22)
    torch.manual_seed(5)
    g = (torch.randint(0, 2, (2, 1, 1), dtype=torch.int8) * 2 - 1).float() / 2
    torch.manual_seed(5)
    with torch.no_grad():
        _, q = stack(below, here)
        expected = g * below + (1 - g) * here + (1 + g) * f(here)
    assert len(g.unique()) == 2
    assert torch.allclose(q, expected, atol=1e-5)


@pytest.mark.parametrize("tokens", [7, 8])
def test_bdia_keeps_one_bit_an_element_for_every_step_after_the_first(tokens):
    torch.manual_seed(0)
    run = StreamRun(RULES["bdia"], Grid("int32", 16), training=True)
    x = torch.randn(1, tokens, 9)
    run.start(x, x)
    for f in sub_blocks(4, width=9)[1::2] * 2:
        run.step(f, f, replay=True)
    sizes = [step.bits.numel() if step.bits is not None else 0 for step in run.tape.steps]
    assert sizes == [0] + 3 * [math.ceil(tokens * 9 / 8)]
    assert all(s.bits.dtype == torch.uint8 for s in run.tape.steps[1:])


def retained(rule: str, count: int) -> int:
    net = network(count, rule=rule, scale_bits=14)
    with Meter(net) as meter:
        loss = net(batch())
        meter.mark("between")
        live = meter.tracker.live_bytes
        loss.backward()
        del loss
    assert meter.end_bytes - meter.baseline_bytes == sum(
        p.grad.nbytes for p in net.parameters() if p.grad is not None
    )
    return live - meter.baseline_bytes


def test_bdia_retains_its_bits_and_nothing_else_that_grows():
    n = batch().numel()
    signs = 2 * 4  # one int32 a sample
    slope = (retained("bdia", 12) - retained("bdia", 6)) / 6
    assert slope == math.ceil(n / 8) + signs


def test_random_sign_retains_only_its_signs():
    assert (retained("random_sign", 12) - retained("random_sign", 6)) / 6 == 2 * 4


def test_an_unknown_rule_names_the_nearest():
    with pytest.raises(ConfigError, match=r"'biad'.*Did you mean 'bdia'\?"):
        ReversibleStack(sub_blocks(2), "biad")


@pytest.mark.parametrize("rule", DRAWING)
def test_draws_differ_between_samples_and_follow_the_seed(rule):
    net = Network(sub_blocks(4), rule=rule)
    losses = [float(run_seeded(lambda: net(batch()), seed=s)) for s in (1, 1, 2)]
    assert losses[0] == losses[1] != losses[2]
