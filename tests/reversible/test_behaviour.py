"""What users expect of a module in training, against the same network with stored activations."""

import copy
import random

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from reversible.small import (
    MLP,
    Attention,
    Network,
    assert_equal_gradients,
    batch,
    gradients,
    network,
    run_seeded,
    sub_blocks,
    twins,
)
from shoestring.errors import ConfigError, StackError
from shoestring.methods.reversible import ReversibleStack


@pytest.mark.parametrize("double", [False, True], ids=["float32", "float64"])
def test_gradients_equal_those_of_stored_activations_bit_for_bit(double):
    ours, stored = twins(double=double)
    x = batch(double=double).requires_grad_()
    y = x.detach().clone().requires_grad_()
    assert torch.equal(run_seeded(lambda: ours(x)), run_seeded(lambda: stored(y)))
    assert_equal_gradients(ours, stored)
    assert torch.equal(x.grad, y.grad)


def test_float64_streams_agree_with_stored_activations_to_rounding():
    ours, stored = twins(double=True, streams="float64")
    run_seeded(lambda: ours(batch(double=True)))
    run_seeded(lambda: stored(batch(double=True)))
    for name, grad in gradients(ours).items():
        assert (grad - gradients(stored)[name]).norm() < 1e-12 * gradients(stored)[name].norm()


def test_dropout_draws_the_same_masks_in_backward():
    ours, stored = twins(dropout=0.3)
    assert torch.equal(run_seeded(lambda: ours(batch())), run_seeded(lambda: stored(batch())))
    assert_equal_gradients(ours, stored)


def finite_difference(net, x, names_seen=3):
    """(numeric, analytic) directional derivatives of the seeded loss, for a few parameters."""
    torch.manual_seed(11)
    net(x).backward()
    parameters = list(net.named_parameters())
    for name, p in parameters[:: len(parameters) // names_seen]:
        direction = torch.randn(p.shape, generator=torch.Generator().manual_seed(5), dtype=p.dtype)
        losses = []
        for sign in (1, -1):
            with torch.no_grad():
                p += sign * 1e-4 * direction
                torch.manual_seed(11)
                losses.append(float(net(x)))
                p -= sign * 1e-4 * direction
        yield name, (losses[0] - losses[1]) / 2e-4, float((p.grad * direction).sum())


def test_dropout_gradients_match_finite_differences():
    ours = network(dropout=0.3, streams="float64").double()
    for name, numeric, analytic in finite_difference(ours, batch(double=True)):
        assert numeric == pytest.approx(analytic, rel=1e-5, abs=1e-6), name


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_two_forwards_before_a_backward_each_use_their_own_streams(dropout):
    ours, stored = twins(dropout=dropout)
    for net in (ours, stored):
        torch.manual_seed(3)
        (net(batch(seed=1)) * net(batch(seed=2))).backward()
    assert_equal_gradients(ours, stored)


def test_backwards_may_come_in_any_order():
    ours, stored = twins(dropout=0.3)
    order = [2, 0, 3, 1]
    random.Random(0).shuffle(order)
    for net in (ours, stored):
        torch.manual_seed(3)
        losses = [net(batch(seed=i)) for i in range(4)]
        for i in order:
            losses[i].backward()
    assert_equal_gradients(ours, stored)


def test_parameters_get_gradients_when_the_input_needs_none():
    bodies = [ReversibleStack(sub_blocks(4), keep_top=k) for k in (0, 4)]
    bodies[1].load_state_dict(bodies[0].state_dict())
    for body in bodies:
        p, q = body(batch(), batch(seed=8))
        (p * q).sum().backward()
    assert_equal_gradients(*bodies)
    assert all(p.grad is not None for p in bodies[0].parameters())


@pytest.mark.parametrize("frozen", ["attention", "body", "lower half", "all but one bias"])
def test_frozen_parameters_get_nothing_and_the_others_what_they_should(frozen):
    ours, stored = twins()
    for net in (ours, stored):
        for i, block in enumerate(net.body.sub_blocks):
            for name, p in block.named_parameters():
                freeze = {
                    "attention": isinstance(block, Attention),
                    "body": True,
                    "lower half": i < 3,
                    "all but one bias": (i, name) != (3, "up.bias"),
                }[frozen]
                p.requires_grad_(not freeze)
        run_seeded(lambda net=net: net(batch()))
    assert_equal_gradients(ours, stored)


def test_an_unused_parameter_is_left_alone():
    ours, stored = twins()
    for net in (ours, stored):
        net.body.sub_blocks[1].spare = nn.Parameter(torch.ones(3))
        run_seeded(lambda net=net: net(batch()))
        assert net.body.sub_blocks[1].spare.grad is None
    assert_equal_gradients(ours, stored)


def test_autograd_grad_works_and_leaves_grad_attributes_alone():
    ours, stored = twins()
    found = [torch.autograd.grad(net(batch()), list(net.parameters())) for net in (ours, stored)]
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    assert all(p.grad is None for p in ours.parameters())


def test_double_backward_is_right():
    ours, stored = twins(4, double=True, streams="float64")
    penalties = []
    with sdpa_kernel(SDPBackend.MATH):
        for net in (ours, stored):
            x = batch(double=True).requires_grad_()
            (grad,) = torch.autograd.grad(net(x), x, create_graph=True)
            penalty = grad.square().sum()
            penalty.backward()
            penalties.append(penalty.detach())
    assert penalties[0] == pytest.approx(float(penalties[1]), rel=1e-12)
    for name, grad in gradients(ours).items():
        expected = gradients(stored)[name]
        assert (grad is None) == (expected is None), name
        assert grad is None or (grad - expected).norm() <= 1e-11 * expected.norm(), name


def test_backward_twice_with_retain_graph_doubles_the_gradient():
    ours, stored = twins(dropout=0.3)
    for net in (ours, stored):
        torch.manual_seed(3)
        loss = net(batch())
        loss.backward(retain_graph=True)
        loss.backward()
    assert_equal_gradients(ours, stored)


def test_outputs_are_not_changed_by_backward():
    body = ReversibleStack(sub_blocks(4), streams="float32")
    x = batch().requires_grad_()
    p, q = body(x, x)
    before = p.detach().clone(), q.detach().clone()
    (p * q).sum().backward()
    assert torch.equal(p, before[0])
    assert torch.equal(q, before[1])


def test_the_recompute_runs_under_the_autocast_of_forward():
    ours, stored = twins()
    dtypes: list[list[torch.dtype]] = []
    for net in (ours, stored):
        seen: list[torch.dtype] = []
        dtypes.append(seen)
        net.body.sub_blocks[1].up.register_forward_hook(
            lambda m, a, out, s=seen: s.append(out.dtype)
        )
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = net(batch())
        loss.backward()
    assert_equal_gradients(ours, stored)
    assert set(dtypes[0]) == {torch.bfloat16}
    assert len(dtypes[0]) == 1 + len(dtypes[1])


@pytest.mark.parametrize("streams", ["bfloat16", "float16"])
def test_sixteen_bit_streams_are_refused_with_the_way_out(streams):
    with pytest.raises(ConfigError, match=r"expected one of .*int32.*run the blocks in bf16 under"):
        ReversibleStack(sub_blocks(2), streams=streams)


def test_backward_leaves_the_random_state_as_it_was():
    ours = network(dropout=0.3)
    loss = ours(batch())
    before = torch.get_rng_state()
    loss.backward()
    assert torch.equal(torch.get_rng_state(), before)


def test_calibration_leaves_the_random_state_as_it_was():
    states = []
    for scale_bits in ("auto", 20):
        net = network(dropout=0.3, scale_bits=scale_bits)
        torch.manual_seed(5)
        net(batch())
        states.append(torch.get_rng_state())
    assert torch.equal(*states)


class Normed(nn.Module):
    """A sub-block with batch statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(16)
        self.batch_norm = nn.BatchNorm1d(16)
        self.linear = nn.Linear(16, 16)

    def forward(self, x):
        return self.linear(self.batch_norm(self.norm(x).transpose(1, 2)).transpose(1, 2))


def test_batch_norm_statistics_move_once_a_step():
    nets = []
    for stored in (False, True):
        torch.manual_seed(2)
        net = Network([Normed() for _ in range(3)], stored=stored)
        run_seeded(lambda net=net: net(batch()))
        nets.append(net)
    ours, reference = (net.body.sub_blocks[1].batch_norm for net in nets)
    assert ours.num_batches_tracked == 1
    assert torch.equal(ours.running_mean, reference.running_mean)
    assert torch.equal(ours.running_var, reference.running_var)
    assert_equal_gradients(*nets)


def test_a_sub_block_with_changing_state_is_refused():
    class Counting(MLP):
        def __init__(self):
            super().__init__()
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x):
            self.calls += 1
            return super().forward(x) * self.calls

    net = Network([Counting()])
    with pytest.raises(StackError, match=r"changes its buffer '\.calls' in forward"):
        net(batch())


def test_functional_call_sends_gradients_to_the_functional_parameters():
    ours, stored = twins()
    found = []
    for net in (ours, stored):
        values = {n: (1.5 * p.detach()).requires_grad_() for n, p in net.named_parameters()}
        torch.func.functional_call(net, values, (batch(),)).backward()
        found.append({n: p.grad for n, p in values.items()})
        assert all(p.grad is None for p in net.parameters())
    assert len(found[0]) == len(list(ours.parameters()))
    for name, grad in found[0].items():
        assert torch.equal(grad, found[1][name]), name


# Dynamo looks at .grad of its inputs, which warns for those that are not leaves.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_sub_blocks_can_be_compiled_one_by_one():
    ours, stored = twins(2)
    for net in (ours, stored):
        for i, block in enumerate(net.body.sub_blocks):
            net.body.sub_blocks[i].compile(backend="aot_eager")
            assert block._compiled_call_impl is not None
        run_seeded(lambda net=net: net(batch()))
    assert_equal_gradients(ours, stored)


def test_deepcopy_and_state_dict_after_a_step_give_the_same_network():
    ours = network()
    ours(batch()).backward()
    copied = copy.deepcopy(ours)
    fresh = network(seed=9)
    fresh.load_state_dict(ours.state_dict())
    for net in (ours, copied, fresh):
        net.zero_grad()
        net(batch()).backward()
    assert_equal_gradients(ours, copied)
    assert_equal_gradients(ours, fresh)
    assert fresh.body.scale_bits == ours.body.scale_bits


def test_post_accumulate_hooks_fire_once_for_every_parameter():
    ours = network()
    fired = []
    for name, p in ours.named_parameters():
        p.register_post_accumulate_grad_hook(lambda p, name=name: fired.append(name))
    ours(batch()).backward()
    assert sorted(fired) == sorted(n for n, _ in ours.named_parameters())


def test_an_optimizer_may_step_inside_backward():
    ours, stored = twins(dropout=0.2)
    for net in (ours, stored):
        optimizers = {p: torch.optim.AdamW([p], lr=1e-2) for p in net.parameters()}

        def update(p, optimizers=optimizers):
            optimizers[p].step()
            optimizers[p].zero_grad()

        for p in net.parameters():
            p.register_post_accumulate_grad_hook(update)
        for i in range(3):
            run_seeded(lambda net=net, i=i: net(batch(seed=i)), seed=i)
    for (name, p), q in zip(ours.named_parameters(), stored.parameters(), strict=True):
        assert torch.equal(p, q), name


def test_hooks_on_a_sub_block_see_forward_and_its_repeat():
    ours = network(2)
    calls = []
    ours.body.sub_blocks[1].register_forward_hook(lambda m, a, out: calls.append(out.detach()))
    ours.body(batch(), batch())  # calibrates, then runs
    calls.clear()
    ours(batch()).backward()
    assert len(calls) == 2
    assert torch.equal(calls[0], calls[1])


def test_held_outputs_change_nothing_but_memory_and_time():
    ours, stored = twins(dropout=0.2)
    ours.body.hold_outputs = frozenset({1, 3, 5})
    for net in (ours, stored):
        torch.manual_seed(3)
        loss = net(batch())
        loss.backward(retain_graph=True)
        loss.backward()
    assert_equal_gradients(ours, stored)


def test_a_stream_of_another_shape_is_named():
    body = ReversibleStack([nn.Linear(16, 8)])
    with pytest.raises(StackError, match=r"sub-block 0 returned shape \(2, 8, 8\)"):
        body(batch(), batch())


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_a_whole_network_may_be_compiled():
    ours, stored = twins(2, dropout=0.2)
    run_seeded(lambda: stored(batch()))
    torch._dynamo.reset()
    compiled = torch.compile(ours, backend="eager")
    run_seeded(lambda: compiled(batch()))
    assert_equal_gradients(ours, stored)
