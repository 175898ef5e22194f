"""Integer streams are walked back without loss; what would be lost raises an error."""

import statistics

import pytest
import torch
from torch import nn

from reversible.small import (
    MLP,
    Network,
    assert_equal_gradients,
    batch,
    gradients,
    network,
    run_seeded,
    sub_blocks,
    twins,
)
from shoestring.errors import ReplayMismatch, StackError, StreamOverflow, TrainingDiverged
from shoestring.methods.reversible import ReversibleStack
from shoestring.ops.fixed_point import Grid
from shoestring.streams import RULES, StreamRun

ALL_RULES = tuple(RULES)


@pytest.mark.parametrize("rule", ALL_RULES)
@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_every_rule_and_any_number_of_sub_blocks_gives_the_stored_gradients(rule, count):
    ours, stored = twins(count, rule=rule, dropout=0.2)
    assert torch.equal(run_seeded(lambda: ours(batch())), run_seeded(lambda: stored(batch())))
    assert_equal_gradients(ours, stored)


@pytest.mark.parametrize("rule", ALL_RULES)
@pytest.mark.parametrize("keep_top", [1, 4])
def test_keeping_the_top_changes_no_gradient(rule, keep_top):
    ours, stored = twins(5, rule=rule, keep_top=keep_top)
    for net in (ours, stored):
        run_seeded(lambda net=net: net(batch()))
    assert_equal_gradients(ours, stored)


def inputs_of(run: StreamRun, count: int) -> list[torch.Tensor]:
    """The inputs of all sub-blocks, rebuilt from the last pair."""
    return [run.tape.input_of(k, torch.float32) for k in reversed(range(count))][::-1]


@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "bf16 autocast"])
@pytest.mark.parametrize("scale", [1.0, 4.0])
@pytest.mark.parametrize("rule", ALL_RULES)
@pytest.mark.parametrize("count", [12, 48])
def test_every_rebuilt_input_is_bit_equal_to_the_one_of_forward(rule, count, scale, autocast):
    torch.manual_seed(0)
    blocks = sub_blocks(count, dropout=0.1, width=8)
    with torch.no_grad():
        for block in blocks:
            for p in block.parameters():
                p *= scale if p.dim() == 2 else 1.0
    seen: list[torch.Tensor] = []
    # Leapfrog on random weights grows fast, so that a coarser grid is needed for its range.
    grid = Grid("int32", 8 if rule == "leapfrog" else 14)
    run = StreamRun(RULES[rule], grid, training=True, verify=True)
    x = batch(width=8)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        run.start(x, x)
        for block in blocks:
            handle = block.register_forward_pre_hook(lambda m, a: seen.append(a[0].clone()))
            run.step(block, block, replay=True)
            handle.remove()
        run.finish()
        rebuilt = inputs_of(run, count)
    assert len(seen) == len(rebuilt) == count
    for k, (first, again) in enumerate(zip(seen, rebuilt, strict=True)):
        assert torch.equal(first, again), k


@pytest.mark.parametrize("scale", [1.0, 4.0])
def test_forty_eight_sub_blocks_with_sharp_weights_train_as_if_stored(scale):
    ours, stored = twins(48, scale=scale, dropout=0.1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = [run_seeded(lambda net=net: net(batch())) for net in (ours, stored)]
    assert torch.equal(*losses)
    assert_equal_gradients(ours, stored)


def flat(net: nn.Module) -> torch.Tensor:
    return torch.cat([g.double().flatten() for g in gradients(net).values() if g is not None])


@pytest.mark.parametrize(("scale", "factor"), [(1.0, 1.5), (2.0, 1.5), (4.0, 3.0)])
def test_gradient_error_against_float64_is_that_of_stored_float32(scale, factor):
    """The median over several inputs: with sharp weights one says little. At four times the weights
    streams grow a hundredfold, and a grid fine enough for their first values has no room for their
    last: float32, whose steps grow with the value, is then ahead on so small a network."""
    nets = {
        "exact": network(24, stored=True, streams="float64", scale=scale).double(),
        "stored": network(24, stored=True, streams="float32", scale=scale),
        "ours": network(24, scale=scale),
    }
    ratios = []
    for seed in range(7):
        for name, net in nets.items():
            net.zero_grad()
            net(batch(seed=seed, double=name == "exact")).backward()
        exact = flat(nets["exact"])
        errors = {n: float((flat(net) - exact).norm()) for n, net in nets.items()}
        assert errors["ours"] > 0
        ratios.append(errors["ours"] / errors["stored"])
    assert statistics.median(ratios) <= factor


# Range


class Loud(nn.Module):
    """An update of a given size."""

    def __init__(self, size: float) -> None:
        super().__init__()
        self.size = nn.Parameter(torch.tensor(size))

    def forward(self, x):
        return x * 0 + self.size


def test_an_update_out_of_range_names_the_first_bad_sub_block():
    stack = ReversibleStack([Loud(1.0), Loud(5000.0), Loud(1.0)], scale_bits=20)
    with pytest.raises(
        StreamOverflow,
        match=r"output of sub-block 1 .* reaches 5000; expected less than 1024 with "
        r"scale_bits=20\. Use scale_bits=\d+ or scale_bits='auto'; nothing was updated",
    ):
        stack(batch(), batch())


def test_a_sum_out_of_range_is_seen_though_every_update_fits():
    stack = ReversibleStack([Loud(900.0)] * 3, scale_bits=20)
    with pytest.raises(StreamOverflow, match=r"stream read by sub-block 3 .* reaches 180"):
        stack(batch(), batch())


def test_an_input_out_of_range_is_seen():
    stack = ReversibleStack([Loud(1.0)], scale_bits=20)
    with pytest.raises(StreamOverflow, match=r"sub-block 0 .* reaches"):
        stack(batch() * 1e5, batch() * 1e5)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_and_infinity_are_named_as_such(bad):
    stack = ReversibleStack([Loud(1.0), Loud(bad)], scale_bits=20)
    with pytest.raises(TrainingDiverged, match=r"output of sub-block 1 .* holds (nan|inf)"):
        stack(batch(), batch())


@pytest.mark.parametrize("size", [2.0**k for k in range(6, 40, 3)])
def test_a_result_is_right_or_an_error_and_never_wrapped(size):
    stack = ReversibleStack([Loud(size)] * 4, scale_bits=20)
    try:
        p, q = stack(torch.zeros(1, 1, 2), torch.zeros(1, 1, 2))
    except StreamOverflow:
        return
    assert torch.equal(p, torch.full_like(p, 2 * size))
    assert torch.equal(q, torch.full_like(q, 2 * size))


def test_auto_scale_finds_a_grid_for_large_activations():
    stack = ReversibleStack([Loud(1.0), Loud(30000.0)])
    _, q = stack(batch(), batch())
    assert float(q.detach().max()) == pytest.approx(30000, abs=5)
    assert stack.scale_bits <= 13


def test_auto_scale_follows_activations_that_grow_while_training():
    stack = ReversibleStack([Loud(1.0)])
    bits = []
    for size in (1.0, 10.0, 30.0, 100.0, 300.0):
        with torch.no_grad():
            stack.sub_blocks[0].size.fill_(size)
        stack(batch(), batch())
        bits.append(stack.scale_bits)
    assert bits == sorted(bits, reverse=True)
    assert bits[-1] < bits[0]


def grown(stack: ReversibleStack, size: float) -> ReversibleStack:
    with torch.no_grad():
        stack.sub_blocks[0].size.fill_(size)
    return stack


def test_auto_scale_survives_an_update_that_outgrows_it_at_once():
    stack = ReversibleStack([Loud(1.0), Loud(2.0)])
    stack(batch(), batch())
    before = stack.scale_bits
    for _ in range(2):
        p, q = grown(stack, 1e4)(batch(), batch())
        assert torch.allclose(p, batch() + 1e4, atol=1e-2)
        assert torch.allclose(q, batch() + 2, atol=1e-2)
        assert stack.scale_bits < before


class Growing(MLP):
    """An MLP whose output is scaled: x grows by that factor on the way up."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x):
        return super().forward(x) * self.factor


@pytest.mark.parametrize("rule", ALL_RULES)
@pytest.mark.parametrize("backwards", [1, 2])
def test_gradients_are_exact_where_the_grid_changes_in_the_middle_of_a_pass(rule, backwards):
    found = []
    for keep_top in (0, 2, 6):
        torch.manual_seed(1)
        factors = (1.0, 1e3, 1.0, 1e5, 1.0, 3e6)
        body = ReversibleStack([Growing(f) for f in factors], rule, keep_top=keep_top)
        body.grid, body.calibrated = Grid("int32", 27), True
        body.verify = keep_top == 0
        x = batch().requires_grad_()
        torch.manual_seed(2)
        p, q = body(x, x * 0.5)
        loss = (p * p.detach().sign()).sum() + q.square().mean()
        for _ in range(backwards):
            loss.backward(retain_graph=True)
        assert loss.isfinite()
        found.append((loss.detach(), x.grad, *(w.grad for w in body.parameters())))
        assert body.scale_bits < 12
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


def test_a_changed_grid_holds_two_streams_for_each_change():
    torch.manual_seed(0)
    run = StreamRun(RULES["feistel"], Grid("int32", 27), training=True, watch=True)
    x = batch()
    run.start(x, x)
    for f in (Growing(1.0), Growing(1e4), Growing(1.0), Growing(1e6)):
        run.step(f, f, replay=True)
    run.finish()
    assert list(run.tape.seams) == [1, 3]


def test_inputs_of_any_size_start_on_a_grid_that_fits():
    stack = ReversibleStack([Loud(1.0)])
    stack(batch(), batch())
    x = 1e5 * batch()
    p, _ = stack(x, x)
    assert torch.allclose(p, x, rtol=1e-5)


def test_values_no_grid_holds_are_an_error_in_auto_mode_too():
    stack = ReversibleStack([Loud(1.0), Loud(1e12)])
    with pytest.raises(StreamOverflow, match=r"reaches 1e\+12.*look at what grows.*int64"):
        stack(batch(), batch())


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_auto_scale_names_nan_and_infinity(bad):
    stack = ReversibleStack([Loud(1.0), Loud(bad)])
    with pytest.raises(TrainingDiverged, match=r"output of sub-block 1 .* holds (nan|inf)"):
        stack(batch(), batch())


def test_where_sizes_are_read_late_an_overflow_sets_the_scale_of_the_next_pass():
    run = StreamRun(RULES["feistel"], Grid("int32", 20), training=True)
    told = []
    run.tape.measured = lambda amax, in_range: told.append((amax, in_range)) or 13
    run.start(batch(), batch())
    run.step(Loud(3e4), None, replay=True)
    with pytest.raises(StreamOverflow, match=r"was 'auto' and is now 13: run the step again"):
        run.finish()
    assert told == [(3e4, False)]


def test_an_empty_batch_passes():
    stack = ReversibleStack([Loud(1.0), MLP()])
    x = torch.zeros(0, 4, 16, requires_grad=True)
    p, q = stack(x, x)
    assert p.shape == q.shape == x.shape
    (p.sum() + q.sum()).backward()
    assert not stack.calibrated
    assert x.grad.shape == x.shape


# verify


class PrivateDropout(MLP):
    """Draws from numpy-like state that no framework restores."""

    def __init__(self) -> None:
        super().__init__()
        self.generator = torch.Generator().manual_seed(0)

    def forward(self, x):
        y = super().forward(x)
        return y * (torch.rand(y.shape, generator=self.generator) > 0.2)


class InPlace(MLP):
    """Changes its input, a stream."""

    def forward(self, x):
        y = super().forward(x)
        x.detach().add_(0.5)
        return y + x


def step_of(net: nn.Module, between=lambda: None) -> None:
    loss = net(batch())
    between()
    loss.backward()


def test_verify_passes_an_honest_network():
    net = network(6, verify=True, dropout=0.2)
    step_of(net)


def test_verify_catches_random_numbers_that_are_not_restored():
    net = Network([MLP(), PrivateDropout(), MLP()], verify=True)
    with pytest.raises(ReplayMismatch, match=r"sub-block 1 gave another output"):
        step_of(net)


def test_verify_catches_a_recompute_outside_autocast():
    class Switching(MLP):
        def forward(self, x):
            # As if the recompute lost the autocast state of forward.
            lost = torch._C._current_graph_task_id() != -1
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=not lost):
                return super().forward(x)

    net = Network([MLP(), Switching(), MLP()], verify=True)
    with pytest.raises((ReplayMismatch, torch.utils.checkpoint.CheckpointError)):
        step_of(net)


def test_a_sub_block_that_changes_a_stream_in_place_is_refused():
    net = Network([MLP(), InPlace(), MLP()])
    with pytest.raises(StackError, match="changes its input in place"):
        step_of(net)


def test_verify_catches_a_parameter_changed_between_forward_and_backward():
    net = network(4, verify=True)

    def change():
        with torch.no_grad():
            net.body.sub_blocks[2].out.bias.add_(1e-3)

    with pytest.raises(ReplayMismatch, match=r"sub-block 2 gave another output"):
        step_of(net, change)


def test_verify_catches_a_stream_changed_between_forward_and_backward():
    torch.manual_seed(0)
    run = StreamRun(RULES["feistel"], Grid(), training=True, verify=True)
    x = batch()
    run.start(x, x)
    for block in sub_blocks(4):
        run.step(block, block, replay=True)
    p, q = run.finish()
    run.tape.pair[1][0, 0, 0] += 1
    with pytest.raises(ReplayMismatch, match="sub-block 3"):
        (p + q).sum().backward()


class EvalAttention(nn.Module):
    """nn.MultiheadAttention, whose eval mode takes another path where gradients are off."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(16)
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)

    def forward(self, x):
        y = self.norm(x)
        return self.attention(y, y, y, need_weights=False)[0]


def test_the_fast_path_of_eval_attention_is_the_same_in_forward_and_recompute():
    torch.manual_seed(0)
    net = Network([EvalAttention() for _ in range(4)], verify=True).eval()
    step_of(net)  # forward runs with gradients on, so both take the slow path


def test_verify_catches_a_path_that_differs_when_gradients_are_off():
    class Paths(MLP):
        def forward(self, x):
            return super().forward(x) * (1.0 if torch.is_grad_enabled() else 1.001)

    loss = Network([MLP(), Paths(), MLP(), MLP()], verify=True)(batch())
    loss.backward(retain_graph=True)
    # The second backward first walks up again, without gradients.
    with pytest.raises(ReplayMismatch, match="gave another output"):
        loss.backward()
