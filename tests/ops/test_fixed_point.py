"""Fixed-point numbers against Python integers; ranges; packed bits."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from shoestring.errors import ConfigError
from shoestring.ops.fixed_point import (
    Grid,
    checksum,
    encode_ref,
    largest,
    pack_bits,
    unpack_bits,
)

values = st.lists(st.floats(-500, 500, width=32), min_size=1, max_size=20)


@given(values, st.integers(0, 20))
def test_encoding_is_that_of_exact_arithmetic(numbers, bits):
    x = torch.tensor(numbers)
    assert Grid("int32", bits).encode(x).tolist() == encode_ref(x, bits)


@given(st.lists(st.floats(-500, 500), min_size=1, max_size=20), st.integers(0, 40))
def test_encoding_to_64_bits_is_that_of_exact_arithmetic(numbers, bits):
    x = torch.tensor(numbers, dtype=torch.float64)
    assert Grid("int64", bits).encode(x).tolist() == encode_ref(x, bits)


@given(values, values)
def test_adding_and_taking_away_gives_back_every_bit(stream, update):
    grid = Grid("int32", 20)
    size = min(len(stream), len(update))
    x, u = (grid.encode(torch.tensor(v[:size])) for v in (stream, update))
    assert torch.equal((x + u) - u, x)


@pytest.mark.parametrize("streams", ["int32", "int64", "float32", "float64"])
def test_neither_coding_shares_memory_with_what_it_was_given(streams):
    grid = Grid(streams, 20)
    dtype = torch.float64 if "64" in streams else torch.float32
    x = torch.ones(4, dtype=dtype)
    stream = grid.encode(x)
    assert stream.data_ptr() != x.data_ptr()
    assert grid.decode(stream, dtype).data_ptr() != stream.data_ptr()


def test_decoding_what_was_encoded_errs_by_at_most_half_a_step():
    x = torch.linspace(-100, 100, 1001)
    grid = Grid("int32", 16)
    assert (grid.decode(grid.encode(x), torch.float32) - x).abs().max() <= 0.5 * 2.0**-16


@given(st.floats(1e-3, 1e6), st.sampled_from(["int32", "int64"]))
def test_a_calibrated_grid_holds_its_margin(amax, streams):
    bits = Grid.calibrated(streams, amax, margin=8)
    # 0 bits is the coarsest grid there is; beyond that the range check speaks.
    assert bits == 0 or 8 * amax * 2.0**bits <= 2.0 ** (30 if streams == "int32" else 50)


def test_nothing_within_the_limit_wraps():
    for terms in (2, 4):
        grid = Grid("int32", 20)
        top = torch.tensor([math.nextafter(grid.limit(terms), 0)])
        total = sum(int(grid.encode(top)) for _ in range(terms))
        assert total <= 2**31


def test_the_largest_value_shows_nan_and_infinity():
    assert math.isnan(largest(torch.tensor([1.0, math.nan, 3.0])))
    assert math.isinf(largest(torch.tensor([1.0, -math.inf])))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_the_largest_value_of_any_float_is_a_float32(dtype):
    found = largest(torch.tensor([1.0, -5.0, 3.0], dtype=dtype))
    assert found.dtype == torch.float32
    assert found == 5.0


@given(st.lists(st.integers(0, 1), max_size=70))
def test_packed_bits_come_back_from_an_eighth_of_the_bytes(bits):
    x = torch.tensor(bits, dtype=torch.int32)
    packed = pack_bits(x)
    assert packed.dtype == torch.uint8
    assert packed.numel() == math.ceil(len(bits) / 8)
    assert torch.equal(unpack_bits(packed, x.shape, torch.int32), x)


@given(st.integers(0, 11), st.integers(1, 2**31 - 1))
def test_a_checksum_sees_any_single_change(place, change):
    x = torch.arange(12, dtype=torch.int32).view(3, 4)
    y = x.clone()
    y.view(-1)[place] ^= change
    assert checksum(x) != checksum(y)


def test_a_checksum_sees_swapped_rows():
    x = torch.arange(12, dtype=torch.int32).view(3, 4)
    assert checksum(x) != checksum(x.flip(0))


@pytest.mark.parametrize("bits", [-1, 51])
def test_scale_bits_out_of_range_are_refused(bits):
    with pytest.raises(ConfigError, match=r"scale_bits = -?\d+; expected 0 to 50"):
        Grid("int32", bits)
