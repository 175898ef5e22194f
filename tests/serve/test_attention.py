"""Attention over codes: against attention over everything decoded, and what a mean key changes."""

import importlib.util
import os
import sys

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from serve.forms import graded, plain
from shoestring.ops import row_kernel
from shoestring.serve import coding
from shoestring.serve.attention import BLOCK, attend, attended_ref
from shoestring.serve.layer import CompressedLayer


@pytest.fixture
def by_torch(monkeypatch):
    """As it is where nothing could be compiled."""
    monkeypatch.setattr(row_kernel, "available", lambda: False)


@pytest.fixture(params=["compiled", "torch"])
def either(request, monkeypatch):
    """Both ways of attending."""
    if request.param == "torch":
        monkeypatch.setattr(row_kernel, "available", lambda: False)
    elif not row_kernel.available():
        pytest.skip(coding.in_use())


def layer_of(keys, values, mask=None, chunk=64, newest=1, form=plain, **settings):
    """All tokens in it, the newest ones about to be attended to."""
    layer = CompressedLayer(form(keys.shape[-1], **settings))
    n, start = keys.shape[2], 0
    for stop in [*range(chunk, n - newest, chunk), n - newest, n]:
        layer.update(keys[:, :, start:stop], values[:, :, start:stop])
        if stop < n:
            layer.attended(None if mask is None else mask[:, :, start:stop, :stop])
        start = stop
    return layer


def causal(rows, n, pads=()):
    mask = torch.ones(n, n, dtype=torch.bool).tril().repeat(rows, 1, 1, 1)
    for row, pad in enumerate(pads):
        mask[row, :, :, :pad] = False
    return mask


CASES = {
    "plain": {},
    "two bits": {"key_bits": 2, "value_bits": 2},
    "no window": {"window": 0},
    "all exact": {"window": 900},
    "no sinks": {"sinks": 0},
    "not centred": {"centre": False},
    "graded": {"form": graded},
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("pads", [None, (0, 7, 300)])
def test_attention_over_codes_is_that_over_what_they_stand_for(either, case, groups, pads):
    rows, heads, n, m, width = 3, 2, 700, 5, 24
    keys, values = torch.randn(2, rows, heads, n, width) + 0.5
    mask = None if pads is None else causal(rows, n, pads)
    layer = layer_of(keys, values, mask, newest=m, **CASES[case])
    query = torch.randn(rows, heads * groups, m, width)
    newest = None if mask is None else mask[:, :, -m:]
    found = attend(query, layer, newest, 0.3)
    assert (found - attended_ref(query, layer, newest, 0.3)).abs().max() < 1e-5


def test_an_added_mask_and_one_of_each_head_count_as_well():
    keys, values = torch.randn(2, 2, 2, 600, 16)
    layer, query = layer_of(keys, values), torch.randn(2, 4, 1, 16)
    mask = torch.rand(2, 4, 1, 600) > 0.5
    found = attend(query, layer, mask, 0.25)
    assert (found - attended_ref(query, layer, mask, 0.25)).abs().max() < 1e-5
    added = torch.where(mask, 0.0, torch.finfo(torch.float32).min)
    assert (found - attend(query, layer, added, 0.25)).abs().max() < 1e-6


def test_a_row_that_sees_nothing_gives_zeros():
    keys, values = torch.randn(2, 2, 2, 600, 16)
    mask = torch.ones(2, 1, 1, 600, dtype=torch.bool)
    mask[1] = False
    found = attend(torch.randn(2, 4, 1, 16), layer_of(keys, values), mask, 0.25)
    assert torch.equal(found[1], torch.zeros(4, 1, 16))
    assert found[0].abs().min() > 0


def test_a_constant_added_to_all_keys_changes_nothing_once_centred():
    keys, values = torch.randn(2, 1, 2, 400, 16)
    keys = (keys * 1024).round() / 1024  # so that adding the constant rounds nothing
    moved = keys + torch.randint(-9, 9, (1, 2, 1, 16))
    query = torch.randn(1, 4, 3, 16)
    change = {}
    for centre in (True, False):
        both = [
            attend(query, layer_of(k, values, newest=3, centre=centre), None, 0.25)
            for k in (keys, moved)
        ]
        change[centre] = float((both[0] - both[1]).abs().max())
    assert change[True] < 1e-4
    assert change[False] > 0.02


def test_more_bits_are_nearer_to_exact_attention():
    keys, values = torch.randn(2, 1, 2, 900, 32)
    query, errors = torch.randn(1, 4, 16, 32), []
    exact = attend(query, layer_of(keys, values, newest=16, window=2000), None, 0.2)
    for bits in (2, 3, 4, 6, 8):
        layer = layer_of(keys, values, newest=16, key_bits=bits, value_bits=bits)
        errors.append(float((attend(query, layer, None, 0.2) - exact).norm() / exact.norm()))
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.01
    assert errors[0] > 0.05


class Largest(TorchDispatchMode):
    """The most floating numbers with a token's width that any operator gave."""

    numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        new = isinstance(out, torch.Tensor) and not func.is_view
        if new and out.is_floating_point() and out.shape[-1:] == (16,):
            self.numbers = max(self.numbers, out.numel())
        return out


def test_no_more_than_a_block_is_ever_decoded(by_torch):
    keys, values = torch.randn(2, 1, 2, 5 * BLOCK, 16)
    layer = layer_of(keys, values)
    with Largest() as largest:
        attend(torch.randn(1, 4, 1, 16), layer, None, 0.25)
    assert largest.numbers == 2 * 2 * BLOCK * 16  # keys and values of two heads


def test_sixteen_bit_queries_give_sixteen_bits(either):
    keys, values = torch.randn(2, 1, 2, 300, 16).bfloat16()
    layer, query = layer_of(keys, values, newest=2), torch.randn(1, 4, 2, 16).bfloat16()
    found = attend(query, layer, None, 0.25)
    assert found.dtype == torch.bfloat16
    assert (found - attended_ref(query, layer, None, 0.25)).abs().max() < 0.02


@pytest.mark.parametrize("form", [plain, graded])
def test_rows_are_the_same_however_they_are_coded(monkeypatch, form):
    if not row_kernel.available():
        pytest.skip(coding.in_use())
    keys, values = torch.randn(2, 2, 2, 300, 24)
    compiled = layer_of(keys, values, form=form)
    monkeypatch.setattr(row_kernel, "available", lambda: False)
    for one, other in zip(compiled.parts(), layer_of(keys, values, form=form).parts(), strict=True):
        assert torch.equal(one.rows, other.rows)


def test_what_runs_is_said(monkeypatch):
    monkeypatch.setattr(row_kernel, "available", lambda: False)
    monkeypatch.setattr(coding.native, "reason", lambda: "no C compiler")
    assert coding.in_use() == "torch (no C compiler)"


def test_triton_attends_as_torch_does(monkeypatch):
    if importlib.util.find_spec("triton") is None:
        pytest.skip("Triton is not installed")
    if "triton" in sys.modules and os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("Triton was imported before it could be interpreted")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    from shoestring.serve.attention import _by_triton

    keys, values = torch.randn(2, 2, 2, 90, 24) + 0.5
    mask, query = causal(2, 90, (0, 30)), torch.randn(2, 6, 1, 24)
    for form in (plain, graded):
        layer = layer_of(keys, values, mask, form=form)
        found = _by_triton(query, layer, layer.parts(), 0.3)
        wanted = attended_ref(query, layer, mask[:, :, -1:], 0.3)
        assert (found - wanted).abs().max() < 1e-5
