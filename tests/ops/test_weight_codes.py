"""Weights in codes: equal to the equations, with gradients of a linear layer that holds them."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses import FakeTensorMode

from shoestring.errors import ConfigError
from shoestring.ops.weight_codes import (
    BASES,
    SCALE,
    DecodedLinear,
    decode_layer,
    encode,
    is_coded,
    keep_in_codes,
    round_trip_ref,
)

SHAPES = [(8, 64), (96, 80), (48, 160), (3, 32), (5, 13)]
"""Rows that are whole blocks of 64, more and less than one, and of an odd number."""


def weight(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0)).to(dtype)


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("shape", SHAPES)
def test_a_decoded_weight_is_what_the_equations_say(base, shape):
    w = weight(*shape)
    w[1] = 0
    w[2, 3] = 9.0
    codes, scale, form = encode(w, base)
    expected = round_trip_ref(w, base)
    # Two roundings to float32, of a quotient and of a product.
    bound = 2 * torch.finfo(torch.float32).eps * w.abs().max()
    assert (form.decode(codes, scale) - expected).abs().max() <= bound
    assert form.decode(codes, scale)[2, 3] == pytest.approx(9.0, rel=1e-6)


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("shape", SHAPES)
def test_sixteen_bits_come_back_as_sixteen_bits(base, shape):
    w = weight(*shape, dtype=torch.bfloat16)
    codes, scale, form = encode(w, base)
    found = form.decode(codes, scale)
    assert found.dtype == torch.bfloat16
    codes, scale, form = encode(w.float(), base)
    assert ((found.float() - form.decode(codes, scale)).abs() <= 2**-8 * found.abs()).all()


@pytest.mark.parametrize(
    ("base", "bytes_"), [("int8", 96 * 80 + 4 * 96), ("nf4", 96 * 80 * 9 // 16)]
)
def test_fake_codes_take_the_bytes_of_real_ones(base, bytes_):
    w = weight(96, 80)
    real = encode(w, base)[:2]
    with FakeTensorMode() as mode:
        codes, scale, form = encode(mode.from_tensor(w), base)
        assert form.decode(codes, scale).shape == w.shape
    assert [(t.shape, t.dtype) for t in real] == [(t.shape, t.dtype) for t in (codes, scale)]
    assert sum(t.nbytes for t in real) == bytes_


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("base", BASES)
def test_the_gradient_is_that_of_a_linear_layer_with_the_decoded_weight(base, autocast):
    layer = nn.Linear(80, 96)
    layer.weight.data = weight(96, 80)
    keep_in_codes([layer], base)
    plain = nn.Linear(80, 96)
    plain.weight.requires_grad_(False)
    plain.weight.data = vars(layer)["forward"].form.decode(layer.weight, layer.weight_scale)
    plain.bias.data.copy_(layer.bias.data)
    ours, theirs = (weight(2, 7, 80).requires_grad_() for _ in range(2))
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        found, expected = layer(ours), plain(theirs)
    assert torch.equal(found, expected)
    for y in (found, expected):
        y.float().square().sum().backward()
    assert torch.equal(ours.grad, theirs.grad)
    # Rows are added up in another order than autograd's.
    eps = torch.finfo(torch.bfloat16 if autocast else torch.float32).eps
    torch.testing.assert_close(layer.bias.grad, plain.bias.grad, rtol=16 * eps, atol=16 * eps)


def test_gradients_are_those_of_finite_differences():
    codes, scale, form = encode(weight(6, 5).double(), "int8")
    x, bias = weight(3, 5).double().requires_grad_(), weight(6).double().requires_grad_()
    assert torch.autograd.gradcheck(
        lambda x, b: DecodedLinear.apply(x, b, codes, scale, form), (x, bias)
    )


@pytest.mark.parametrize("base", BASES)
def test_only_codes_are_saved_for_backward(base):
    layer = nn.Linear(80, 96)
    keep_in_codes([layer], base)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        layer(weight(4, 80).requires_grad_())
    assert {t.data_ptr() for t in saved} == {layer.weight.data_ptr(), layer.weight_scale.data_ptr()}


@pytest.mark.parametrize("base", BASES)
def test_a_layer_in_codes_can_be_saved_copied_and_decoded(base):
    layer = nn.Linear(80, 96)
    layer.weight.data = weight(96, 80)
    undo = keep_in_codes([layer], base)
    assert is_coded(layer)
    assert SCALE in layer.state_dict()
    assert not layer.weight.requires_grad
    x = weight(4, 80)
    twin = copy.deepcopy(layer)
    assert torch.equal(twin(x), layer(x))
    twin.weight.data.zero_()  # the copy runs with its own codes
    assert not torch.equal(twin(x), layer(x))
    expected = layer(x)
    undo()
    undo()
    assert torch.equal(layer(x), F.linear(x, layer.weight, layer.bias))
    assert torch.equal(layer(x), expected)
    assert not is_coded(layer)
    assert list(layer.state_dict()) == ["weight", "bias"]
    decode_layer(layer)  # nothing to do


def test_without_the_library_it_says_which(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'shoestring\[qlora\]'"):
        encode(weight(4, 64), "nf4")
