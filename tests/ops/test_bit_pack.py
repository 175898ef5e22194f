"""Packed codes come back as they were, and take the bits they say."""

import pytest
import torch

from shoestring.errors import ConfigError
from shoestring.ops.bit_pack import pack, pack_ref, row_bytes, unpack


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("n", [0, 1, 5, 64, 80, 129])
@pytest.mark.parametrize("rows", [(), (2, 3), (0,)])
def test_codes_come_back(bits, n, rows):
    codes = torch.randint(0, 2**bits, (*rows, n), dtype=torch.uint8)
    packed = pack(codes, bits)
    assert packed.shape == (*rows, row_bytes(n, bits))
    assert packed.dtype == torch.uint8
    assert torch.equal(unpack(packed, bits, n), codes)


@pytest.mark.parametrize("bits", range(1, 9))
def test_the_layout_is_that_of_the_twin(bits):
    codes = torch.randint(0, 2**bits, (77,), dtype=torch.uint8)
    assert pack(codes, bits).tolist() == pack_ref(codes.tolist(), bits)


def test_three_bits_are_three_bits():
    assert row_bytes(64, 3) == 24
    assert row_bytes(65, 3) == 27


@pytest.mark.parametrize("bits", [0, 9, -1])
def test_other_widths_are_refused(bits):
    with pytest.raises(ConfigError, match="1 to 8"):
        row_bytes(8, bits)
