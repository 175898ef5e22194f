"""Chunked linear cross entropy against its float64 twin, against torch, and in bytes."""

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses import FakeTensorMode

from shoestring.errors import ConfigError, DataError, StackError
from shoestring.meter import Meter
from shoestring.ops.chunked_loss import linear_cross_entropy, linear_cross_entropy_ref

# Relative L2 error of a gradient in multiples of epsilon, promised by methods/chunked_loss.py.
# A sum of k terms in another order errs by about sqrt(k) roundings of a partial sum; the most
# terms here are the vocabulary's. Measured: 3.6 at V = 50,257.
BOUND_EPS = 16
BOTH = pytest.mark.parametrize("gradients", ["forward", "backward"])


def problem(n=37, d=24, v=53, *, seed=0, dtype=torch.float32, bias=False, scale=0.3):
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(n, d, generator=g, dtype=torch.float64).to(dtype).requires_grad_()
    weight = (scale * torch.randn(v, d, generator=g, dtype=torch.float64)).to(dtype)
    targets = torch.randint(0, v, (n,), generator=g)
    targets[::5] = -100
    b = torch.randn(v, generator=g, dtype=torch.float64).to(dtype).requires_grad_()
    return hidden, weight.requires_grad_(), targets, (b if bias else None)


def gradients_of(loss, *tensors):
    return torch.autograd.grad(loss, [t for t in tensors if t is not None])


def assert_within(got, expected, eps_multiple, dtype=None):
    for a, b in zip(got, expected, strict=True):
        eps = torch.finfo(dtype or a.dtype).eps
        error = (a.double() - b.double()).norm() / b.double().norm()
        assert error <= eps_multiple * eps, f"{error / eps:.2f} eps"


CASES = [
    {},
    {"bias": True},
    {"reduction": "sum"},
    {"num_items": 11},
    {"num_items": torch.tensor(11)},
    {"softcap": 2.0, "logit_scale": 1.7},
    {"logit_scale": 0.25, "bias": True},
    {"ignore_index": 3},
]


@BOTH
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("chunk_rows", [1, 8, 37, 1000])
def test_equals_the_float64_reference(case, chunk_rows, gradients):
    case = dict(case)
    h, w, t, b = problem(dtype=torch.float64, bias=case.pop("bias", False))
    if "ignore_index" in case:
        t = t.masked_fill(t == -100, 3)
    got = linear_cross_entropy(h, w, t, bias=b, chunk_rows=chunk_rows, gradients=gradients, **case)
    ref = linear_cross_entropy_ref(h, w, t, bias=b, **case)
    assert got.dtype == torch.float64
    assert_within([got], [ref], BOUND_EPS)
    assert_within(gradients_of(3 * got, h, w, b), gradients_of(3 * ref, h, w, b), BOUND_EPS)


@BOTH
def test_float32_stays_within_the_promised_bound_of_plain(gradients):
    h, w, t, b = problem(n=300, d=64, v=5003, bias=True)
    got = linear_cross_entropy(h, w, t, bias=b, chunk_rows=32, gradients=gradients)
    plain = F.cross_entropy(F.linear(h, w, b).float(), t)
    assert got.dtype == torch.float32
    assert_within([got], [plain], BOUND_EPS)
    assert_within(gradients_of(got, h, w, b), gradients_of(plain, h, w, b), BOUND_EPS)


@BOTH
def test_float32_error_is_no_worse_than_the_plain_loss_has(gradients):
    h, w, t, _ = problem(n=300, d=64, v=2003, scale=1.0)
    true = gradients_of(linear_cross_entropy_ref(h, w, t), h, w)
    plain = gradients_of(F.cross_entropy(F.linear(h, w), t), h, w)
    got = gradients_of(linear_cross_entropy(h, w, t, chunk_rows=16, gradients=gradients), h, w)
    for g, p, r in zip(got, plain, true, strict=True):
        assert (g - r).norm() <= 1.5 * (p - r).norm() + torch.finfo(torch.float32).eps * r.norm()


@BOTH
def test_autocast_multiplies_in_the_autocast_dtype(gradients):
    h, w, t, b = problem(n=200, d=64, v=701, bias=True)
    with torch.autocast("cpu", torch.bfloat16):
        got = linear_cross_entropy(h, w, t, bias=b, chunk_rows=32, gradients=gradients)
        plain = F.cross_entropy(F.linear(h, w, b).float(), t)
    # The same bfloat16 products: the losses agree to float32, not to bfloat16, precision.
    assert_within([got], [plain], BOUND_EPS)
    grads, expected = gradients_of(got, h, w, b), gradients_of(plain, h, w, b)
    assert [g.dtype for g in grads] == [torch.float32] * 3
    assert_within(grads, expected, 1, dtype=torch.bfloat16)


@BOTH
def test_16_bit_weights_get_gradients_in_their_dtype(gradients):
    h, w, t, _ = problem(n=200, d=64, v=701, dtype=torch.bfloat16)
    got = linear_cross_entropy(h, w, t, chunk_rows=16, gradients=gradients)
    plain = F.cross_entropy(F.linear(h, w).float(), t)
    assert_within([got], [plain], BOUND_EPS)
    grads = gradients_of(got, h, w)
    assert [g.dtype for g in grads] == [torch.bfloat16] * 2
    assert_within(grads, gradients_of(plain, h, w), 1)


def test_auto_gradients_follow_the_dtype_of_the_products():
    def kept(dtype, autocast=False):
        h, w, t, _ = problem(n=200, d=64, v=701, dtype=dtype)
        with Meter() as meter:
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                loss = linear_cross_entropy(h, w, t)
            loss.backward()
        return meter.retained_bytes

    assert kept(torch.float32) >= 701 * 64 * 4
    assert kept(torch.bfloat16) < 701 * 64 * 2
    assert kept(torch.float32, autocast=True) < 701 * 64 * 2


def test_frozen_weight_and_hidden_without_grad():
    h, w, t, _ = problem()
    full = gradients_of(linear_cross_entropy(h, w, t, chunk_rows=8), h, w)
    frozen = linear_cross_entropy(h, w.detach(), t, chunk_rows=8)
    assert torch.equal(torch.autograd.grad(frozen, h)[0], full[0])
    raw = linear_cross_entropy(h.detach(), w, t, chunk_rows=8)
    assert torch.equal(torch.autograd.grad(raw, w)[0], full[1])
    assert not linear_cross_entropy(h.detach(), w.detach(), t).requires_grad


def test_no_grad_gives_the_same_loss_and_no_gradient_buffers():
    h, w, t, _ = problem(n=64, d=256, v=1000)
    loss = linear_cross_entropy(h, w, t, chunk_rows=4)
    with torch.no_grad(), Meter() as meter:
        again = linear_cross_entropy(h, w, t, chunk_rows=4)
    assert torch.equal(again, loss)
    assert not again.requires_grad
    assert meter.peak_bytes - meter.baseline_bytes < 4 * 1000 * 4 * 1.25


@BOTH
def test_weight_tied_to_the_embedding(gradients):
    def loss_of(tail):
        embedding = torch.nn.Embedding(53, 24, _weight=w.detach().clone())
        hidden = torch.tanh(embedding(torch.arange(37) % 53))
        tail(hidden, embedding.weight).backward()
        return embedding.weight.grad

    _, w, t, _ = problem()
    got = loss_of(lambda h, e: linear_cross_entropy(h, e, t, chunk_rows=8, gradients=gradients))
    assert_within([got], [loss_of(lambda h, e: F.cross_entropy(h @ e.t(), t))], BOUND_EPS)


@BOTH
def test_backward_twice_with_retain_graph(gradients):
    h, w, t, _ = problem()
    loss = 2 * linear_cross_entropy(h, w, t, chunk_rows=8, gradients=gradients)
    first = torch.autograd.grad(loss, (h, w), retain_graph=True)
    copies = [g.clone() for g in first]
    second = torch.autograd.grad(loss, (h, w))
    assert all(map(torch.equal, copies, second))
    assert all(map(torch.equal, copies, first))


@BOTH
def test_create_graph_is_refused(gradients):
    h, w, t, _ = problem()
    loss = linear_cross_entropy(h, w, t, gradients=gradients)
    with pytest.raises(StackError, match="no second derivative"):
        torch.autograd.grad(loss, h, create_graph=True)


@BOTH
def test_all_targets_ignored_is_nan_with_zero_gradients_as_in_torch(gradients):
    h, w, t, _ = problem()
    t.fill_(-100)
    loss = linear_cross_entropy(h, w, t, gradients=gradients)
    plain = F.cross_entropy(F.linear(h, w), t)
    assert torch.isnan(loss)
    assert torch.isnan(plain)
    for got, expected in zip(gradients_of(loss, h, w), gradients_of(plain, h, w), strict=True):
        assert torch.equal(got, expected)


@BOTH
def test_large_logits_do_not_overflow(gradients):
    h, w, t, _ = problem(scale=1e3)
    loss = linear_cross_entropy(h, w, t, chunk_rows=8, gradients=gradients)
    plain = F.cross_entropy(F.linear(h, w), t)
    assert_within([loss], [plain], BOUND_EPS)
    assert all(torch.isfinite(g).all() for g in gradients_of(loss, h, w))


@BOTH
def test_peak_is_one_chunk_besides_the_gradients(gradients):
    n, d, v, rows = 256, 64, 4000, 16
    h, w, t, _ = problem(n=n, d=d, v=v)
    with Meter() as meter:
        linear_cross_entropy(h, w, t, chunk_rows=rows, gradients=gradients).backward()
    own = meter.peak_bytes - meter.baseline_bytes
    gradients_bytes = (n * d + v * d) * 4
    # One chunk, and a quarter of one for what is as long as the tokens or the chunk's rows.
    assert gradients_bytes < own < gradients_bytes + 1.25 * rows * v * 4


@BOTH
def test_fake_tensors_predict_the_same_peak(gradients):
    def peak(h, w, t):
        with Meter() as meter:
            linear_cross_entropy(h, w, t, chunk_rows=16, gradients=gradients).backward()
        return meter.peak_bytes

    h, w, t, _ = problem(n=128, d=32, v=900)
    mode = FakeTensorMode()
    fake = [mode.from_tensor(x.detach()) for x in (h, w, t)]
    with mode:
        predicted = peak(fake[0].requires_grad_(), fake[1].requires_grad_(), fake[2])
    assert predicted == peak(h, w, t)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"chunk_rows": 0}, "chunk_rows = 0"),
        ({"chunk_rows": True}, "chunk_rows = True"),
        ({"reduction": "none"}, "reduction = 'none'"),
        ({"gradients": "later"}, "gradients = 'later'"),
        ({"softcap": 0.0}, "softcap = 0.0"),
        ({"bias": torch.zeros(3)}, r"bias \(3,\)"),
    ],
)
def test_arguments_that_do_not_fit(change, message):
    h, w, t, _ = problem()
    with pytest.raises(ConfigError, match=message):
        linear_cross_entropy(h, w, t, **change)


def test_shapes_that_do_not_fit():
    h, w, t, _ = problem()
    with pytest.raises(ConfigError, match=r"hidden \(37, 24\), weight \(53, 24\), targets \(36,\)"):
        linear_cross_entropy(h, w, t[1:])
    with pytest.raises(ConfigError, match=r"targets of torch\.float32"):
        linear_cross_entropy(h, w, t.float())


@pytest.mark.parametrize("target", [53, -1])
def test_a_target_outside_the_vocabulary(target):
    h, w, t, _ = problem()
    t[4] = target
    with pytest.raises(DataError, match=f"target {target} is outside the vocabulary.*0 to 52"):
        linear_cross_entropy(h, w, t)
