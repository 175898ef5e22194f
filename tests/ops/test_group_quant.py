"""Groups at 8 and 4 bits against their twin; what comes back is right in expectation."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from shoestring.errors import ConfigError
from shoestring.meter import Meter
from shoestring.ops import group_quant
from shoestring.ops.group_quant import (
    PIECE,
    check,
    dequantize,
    digest,
    dither_ref,
    key_of,
    packed_bytes,
    quantize,
    round_trip_ref,
)


def key(number: int = 0, seed: int = 0) -> torch.Tensor:
    return key_of(torch.tensor(12345, dtype=torch.int32), seed, number)


def unpacked(packed: group_quant.Packed) -> list[int]:
    """The codes in order, from the layout that the docstring tells."""
    if packed.bits == 8:
        return packed.codes.tolist()
    codes: list[int] = []
    for start in range(0, packed.numel, packed.group):
        width = min(packed.group, packed.numel - start)
        half = -(-width // 2)
        part = packed.codes[start // 2 : start // 2 + half].tolist()
        codes += [b & 15 for b in part] + [b >> 4 for b in part][: width - half]
    return codes


def test_the_dither_is_that_of_its_twin():
    found = (
        group_quant._dither(key(), 0, 1001).tolist() + group_quant._dither(key(), 1002, 10).tolist()
    )
    number = int(key()) % 2**32
    assert found == [dither_ref(number, k) for k in [*range(1001), *range(1002, 1012)]]


def test_the_dither_is_even_and_neighbours_know_nothing_of_each_other():
    n = 1 << 18
    u = torch.stack([group_quant._dither(key(k), 0, n) for k in range(4)]).double() - 0.5
    assert u.mean(1).abs().max() < 4 / (12 * n) ** 0.5
    assert ((u.square().mean(1) * 12) - 1).abs().max() < 0.01
    correlations = [
        (u[0, :-lag] * u[0, lag:]).mean() * 12 for lag in (1, 2, 3, 16, 255, 256, 512, 4096)
    ] + [(u[a] * u[b]).mean() * 12 for a in range(4) for b in range(a)]  # fmt: skip
    assert max(abs(float(c)) for c in correlations) < 5 / n**0.5


@pytest.mark.parametrize("bits", [8, 4])
@given(
    st.lists(st.floats(-1000, 1000, width=32), min_size=1, max_size=70),
    st.sampled_from([2, 4, 16, 64]), st.integers(0, 99),
)  # fmt: skip
def test_a_round_trip_is_that_of_its_twin(bits, values, group, number):
    x = torch.tensor(values)
    packed = quantize(x, bits, group, key(number))
    codes, expected = round_trip_ref(values, bits, group, int(key(number)) % 2**32)
    found = dequantize(packed)
    assert packed.codes.numel() == packed_bytes(len(values), bits, group)
    steps = packed.step.double().repeat_interleave(group)[: len(values)]
    # Rounding to float32 may tip a value that lies on an edge to the code beside it.
    assert all(abs(a - b) <= 1 for a, b in zip(unpacked(packed), codes, strict=True))
    tolerance = 1e-6 * 2000 + 1e-3 * steps
    same = torch.tensor(unpacked(packed)) == torch.tensor(codes)
    off = (found.double() - torch.tensor(expected, dtype=torch.float64)).abs()
    assert (off[same] <= tolerance[same]).all()
    assert ((found - x).abs().double() <= steps * 0.501 + 1e-4).all()


def test_most_codes_are_those_of_the_twin():
    x = torch.randn(5000)
    for bits in (8, 4):
        packed = quantize(x, bits, 256, key())
        codes, _ = round_trip_ref(x.tolist(), bits, 256, int(key()) % 2**32)
        assert (torch.tensor(unpacked(packed)) == torch.tensor(codes)).float().mean() > 0.999


@pytest.mark.parametrize("bits", [8, 4])
def test_it_is_unbiased_with_the_variance_of_the_equations(bits):
    draws = 400
    x = torch.randn(64 * 256, generator=torch.Generator().manual_seed(1))
    back = [dequantize(quantize(x, bits, 256, key(n))) for n in range(draws)]
    errors = torch.stack(back).double() - x
    step = quantize(x, bits, 256, key()).step.double().repeat_interleave(256)
    uniform = step / 12**0.5
    # The mean of an element's errors is as small as chance allows, for all elements at once.
    assert ((errors.mean(0) / uniform * draws**0.5).square().mean() - 1).abs() < 0.05
    assert (errors.square().mean() / uniform.square().mean() - 1).abs() < 0.01
    # Also at the ends of the range, where rounding could be clipped.
    ends = (x.view(-1, 256) == x.view(-1, 256).amax(1, keepdim=True)).view(-1)
    assert (errors[:, ends] / uniform[ends]).mean().abs() < 4 / (draws * 64) ** 0.5


@pytest.mark.parametrize("bits", [8, 4])
def test_half_the_variance_of_stochastic_rounding(bits):
    x = torch.randn(256 * 256)
    packed = quantize(x, bits, 256, key())
    left = torch.tensor(unpacked(packed)).view(-1, 256) * packed.step[:, None]
    stochastic = (left + packed.lowest[:, None]).view(-1) - x
    ours = dequantize(packed) - x
    assert 0.45 < float(ours.square().mean() / stochastic.square().mean()) < 0.55


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_any_float_comes_back_in_its_dtype(dtype):
    x = torch.randn(1000).to(dtype)
    back = dequantize(quantize(x, 8, 256, key()))
    assert back.dtype is dtype
    assert (back - x).abs().max() < 0.03


def test_equal_values_come_back_exactly_and_nothing_comes_back_as_nothing():
    for x in (torch.full((700,), 3.3), torch.zeros(512), torch.ones(1), torch.ones(0)):
        assert torch.equal(dequantize(quantize(x, 4, 256, key())), x)


def test_what_is_not_finite_is_not_made_finite():
    x = torch.randn(512)
    x[3], x[300] = float("inf"), float("nan")
    back = dequantize(quantize(x, 8, 256, key()))
    assert not back[:256].isfinite().any()
    assert not back[256:].isfinite().any()


def test_pieces_change_nothing(monkeypatch):
    x = torch.randn(70_001)
    whole = [quantize(x, bits, 256, key()) for bits in (8, 4)]
    values = [dequantize(each) for each in whole]
    monkeypatch.setitem(PIECE, "cpu", 2048)
    for bits, expected, value in zip((8, 4), whole, values, strict=True):
        packed = quantize(x, bits, 256, key())
        assert torch.equal(packed.codes, expected.codes)
        assert torch.equal(dequantize(packed), value)


def test_keys_differ_by_content_seed_and_number():
    x = torch.randn(1000)
    keys = {int(key_of(digest(y), seed, n)) for y in (x, x + 1e-7, x * 2) for seed in (0, 1, 2**40)
            for n in range(10)}  # fmt: skip
    assert len(keys) == 90


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_digest_sees_one_bit_and_copies_nothing(dtype):
    x = torch.randn(40_000).to(dtype)
    with Meter() as meter:
        before = digest(x)
    assert meter.peak_bytes - x.nbytes < 100
    x.view(torch.int16)[123] ^= 1
    assert digest(x) != before


@pytest.mark.parametrize("bits", [8, 4])
def test_four_bits_are_four_bits_and_little_else_is_held(bits):
    n = 1 << 20
    x = torch.randn(n)
    with Meter() as meter:
        x.add_(0)
        packed = quantize(x, bits, 256, key())
        kept = meter.tracker.live_bytes - meter.tracker.ledger.existing
    assert packed.codes.nbytes == n * bits // 8
    assert kept == n * bits // 8 + 2 * 4 * n // 256 + 4  # the key
    assert meter.peak_bytes - x.nbytes - kept < 24 * PIECE["cpu"]
    with Meter() as meter:
        back = dequantize(packed)
    assert meter.peak_bytes - kept - back.nbytes < 24 * PIECE["cpu"]


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("n", [1000, 65_536, 200_001])
def test_fake_tensors_hold_what_real_ones_do(bits, n):
    peaks = []
    for mode in (None, FakeTensorMode()):
        with torch.no_grad(), mode or torch.autograd.profiler.record_function(""):
            x, k = torch.zeros(n), torch.zeros((), dtype=torch.int32)
            with Meter() as meter:
                packed = quantize(x, bits, 256, k)
                held = meter.tracker.live_bytes
                dequantize(packed)
            peaks.append((held, meter.peak_bytes))
    assert peaks[0] == peaks[1]


def test_what_cannot_be_is_refused():
    for bits in (3, 16, True, "8", None):
        with pytest.raises(ConfigError, match="bits = "):
            check(bits, 256)
    for group in (0, 1, 3, -2, 2.0, True):
        with pytest.raises(ConfigError, match="group = "):
            check(8, group)
