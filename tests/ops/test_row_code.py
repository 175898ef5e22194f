"""Rows of codes: their bytes, their errors, and what they refuse."""

import pytest
import torch

from shoestring.errors import ConfigError, DataError
from shoestring.ops.codebook import codebook
from shoestring.ops.row_code import RowCode, edges, error, levels, padded, row_ref


def mixed(H=3, d=64, *, scale_bytes=2, weighted=True, seed=0):
    generator = torch.Generator().manual_seed(seed)
    bits = torch.randint(0, 9, (2, H, d // 8), generator=generator, dtype=torch.uint8)
    bits[1, 0] = 0  # a head that only its mean is known of
    weights = torch.rand(2, H, d // 8, generator=generator).double() + 0.1 if weighted else None
    return RowCode(bits, weights, scale_bytes)


@pytest.mark.parametrize("scale_bytes", [1, 2])
@pytest.mark.parametrize("weighted", [True, False])
def test_rows_are_those_of_the_twin(scale_bytes, weighted):
    torch.manual_seed(0)
    code = mixed(scale_bytes=scale_bytes, weighted=weighted)
    z = (
        torch.randn(2, 2, 3, 5, 64, dtype=torch.float64)
        * torch.tensor([0.01, 3.0])[:, None, None, None, None]
    )
    z[0, :, :, 0] = 0
    rows = code.encode(z)
    assert rows.shape == (2, 5, code.row_bytes)
    back = code.decode(rows, torch.float64)
    for row in range(2):
        for token in range(5):
            there, came = row_ref(code, z[row, :, :, token])
            assert rows[row, token].tolist() == there
            assert torch.allclose(back[row, :, :, token], came, rtol=1e-12)


def test_a_row_takes_its_bits_and_its_scales():
    assert RowCode.uniform(3, 64, 4, 2).row_bytes == 3 * (32 + 16) + 6 * 2
    assert RowCode.uniform(2, 20, 3, 3).row_bytes == 2 * 2 * 3 * 3 + 4 * 2
    assert padded(20) == 24


@pytest.mark.parametrize("bits", range(1, 9))
def test_the_polynomial_costs_little_against_lloyd_and_max(bits):
    most = {5: 1.013, 6: 1.035, 7: 1.07, 8: 1.11}.get(bits, 1.003)
    assert 0.9999 < error(bits) / codebook(bits).error < most
    assert torch.all(levels(bits).diff() > 0)
    assert torch.allclose(levels(bits), -levels(bits).flip(0))
    assert len(edges(bits)) == 2**bits - 1


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_the_error_of_normal_vectors_is_that_of_the_levels(bits):
    torch.manual_seed(bits)
    z = torch.randn(1, 2, 2, 2000, 64)
    code = RowCode.uniform(2, 64, bits, bits)
    back = code.decode(code.encode(z))
    # Lengths that are put right cost up to 1 / (1 - error).
    found = float((back - z).square().mean())
    assert error(bits) * 0.9 < found < error(bits) / (1 - error(bits)) * 1.05
    assert torch.allclose(back.norm(dim=-1), z.norm(dim=-1), rtol=1e-3)


def test_a_code_does_not_depend_on_its_company():
    torch.manual_seed(0)
    code, z = mixed(), torch.randn(2, 2, 3, 40, 64, dtype=torch.float64)
    whole = code.encode(z)
    pieces = torch.cat([code.encode(z[:, :, :, at : at + 7]) for at in range(0, 40, 7)], dim=1)
    assert torch.equal(whole, pieces)


def test_what_cannot_be_coded_is_refused():
    code = RowCode.uniform(1, 8, 4, 4)
    z = torch.zeros(1, 2, 1, 1, 8)
    for bad in (float("nan"), float("inf")):
        z[..., 0] = bad
        with pytest.raises(DataError, match="NaN or infinity"):
            code.encode(z)
    z[..., 0] = 1e9
    with pytest.raises(DataError, match="65504"):
        code.encode(z)


def test_codes_that_cannot_be_are_refused():
    with pytest.raises(ConfigError, match="1 to 8"):
        RowCode.uniform(1, 8, 9, 4)
    with pytest.raises(ConfigError, match="0 to 8"):
        RowCode(torch.full((2, 1, 1), 9, dtype=torch.uint8))
    with pytest.raises(ConfigError, match="uint8"):
        RowCode(torch.ones(2, 1, 1))
    with pytest.raises(ConfigError, match="scales of 4 bytes"):
        RowCode(torch.ones(2, 1, 1, dtype=torch.uint8), scale_bytes=4)


def test_one_row_of_an_odd_number_of_bytes_is_read():
    bits = torch.tensor([3, 4], dtype=torch.uint8).view(2, 1, 1)
    code, z = RowCode(bits), torch.randn(1, 2, 1, 1, 8, dtype=torch.float64)
    _, back = row_ref(code, z[0, :, :, 0])
    assert torch.allclose(code.decode(code.encode(z), torch.float64)[0, :, :, 0], back)
