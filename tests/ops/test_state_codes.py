"""Codes of moments against their twins, and rounding by chance against its mean."""

import math

import pytest
import torch
from torch import Tensor

from shoestring.ops.state_codes import Coder, Format, decode_ref, encode_ref

CPU = torch.device("cpu")
FORMATS = [Format(bits, signed) for bits in (8, 4) for signed in (True, False)]
pytestmark = pytest.mark.parametrize("form", FORMATS, ids=lambda f: f"{f.bits}-{f.signed}")


def values(form: Format, n: int, seed: int = 0) -> Tensor:
    """Over many powers of ten, in a block of zeros too; second moments have no sign."""
    generator = torch.Generator().manual_seed(seed)
    found = torch.randn(n, generator=generator)
    found *= 10.0 ** torch.randint(-6, 3, (n,), generator=generator)
    found[: form.block] = 0
    return found if form.signed else found.abs()


def unpacked(codes: Tensor, form: Format) -> Tensor:
    return codes if form.bits == 8 else torch.stack((codes & 15, codes >> 4), 1).view(-1)


@pytest.mark.parametrize("n", [1, 255, 257, 3000])
@pytest.mark.parametrize("stochastic", [False, True])
def test_codes_are_those_of_the_twin(form: Format, n: int, stochastic: bool) -> None:
    x = values(form, n)
    noise = torch.rand(n) if stochastic else None
    coder = Coder(form, CPU, stochastic=stochastic)
    codes, scale = coder.encode(x, noise)
    assert codes.dtype == torch.uint8
    assert len(codes) == form.code_bytes(n)
    wanted, scales = encode_ref(x.tolist(), form, noise.tolist() if noise is not None else None)
    assert scale.tolist() == scales
    # In float32 a value may fall on the other side of an edge that it is within a rounding of.
    found = unpacked(codes, form)[:n].tolist()
    others = [k for k, (a, b) in enumerate(zip(found, wanted, strict=True)) if a != b]
    assert len(others) <= n // 1000
    assert all(abs(found[k] - wanted[k]) == 1 for k in others)
    kept = coder.decode(codes, scale, n)
    assert torch.allclose(
        kept.double(), torch.tensor(decode_ref(found, scales, form), dtype=torch.float64),
        rtol=1e-6, atol=0,
    )  # fmt: skip


def test_entries_are_kept_exactly_and_everything_is_near(form: Format) -> None:
    entries = torch.tensor(form.entries())
    assert len(entries) == (255 if (form.bits, form.signed) == (8, False) else 2**form.bits)
    assert (entries.diff() > 0).all()
    assert entries[-1] == 1
    assert entries[0] == -1 if form.signed else entries[0] > 0
    for stochastic in (False, True):
        coder = Coder(form, CPU, stochastic=stochastic)
        for block in entries.repeat(2).split(form.block - 1):
            x = torch.cat((block, torch.ones(1)))
            codes, scale = coder.encode(x, torch.rand(len(x)) if stochastic else None)
            assert torch.equal(coder.decode(codes, scale, len(x)), x)


def test_no_two_edges_agree_in_the_upper_half_of_their_bits(form: Format) -> None:
    for stochastic in (False, True):
        edges = Coder(form, CPU, stochastic=stochastic)._edges
        upper = edges.view(torch.int32) >> 16
        assert len(upper.unique()) == len(upper)


def test_a_block_of_zeros_stays_zero(form: Format) -> None:
    coder = Coder(form, CPU, stochastic=True)
    codes, scale = coder.encode(torch.zeros(300), torch.rand(300))
    assert not coder.decode(codes, scale, 300).any()


def test_no_second_moment_becomes_zero_beside_a_large_one(form: Format) -> None:
    x = torch.full((form.block,), 1e-20)
    x[3] = 1
    for stochastic in (False, True):
        coder = Coder(form, CPU, stochastic=stochastic)
        noise = torch.rand(len(x)) if stochastic else None
        kept = coder.decode(*coder.encode(x, noise), len(x))
        assert kept[3] == 1
        if not form.signed:
            assert kept.min() > 0


def test_rounding_by_chance_has_the_right_mean(form: Format) -> None:
    draws = 4000
    coder = Coder(form, CPU, stochastic=True)
    x = torch.linspace(form.entries()[0], 1, form.block)
    generator = torch.Generator().manual_seed(0)
    total = torch.zeros(form.block, dtype=torch.float64)
    for _ in range(draws):
        noise = torch.rand(len(x), generator=generator)
        total += coder.decode(*coder.encode(x, noise), len(x))
    entries = torch.tensor(form.entries())
    gap = float(entries.diff().max())
    assert float((total / draws - x).abs().max()) <= 4.5 * gap / 2 / math.sqrt(draws)


def test_nan_is_not_hidden(form: Format) -> None:
    x = values(form, 2 * form.block) + 1
    x[form.block + 5] = math.nan
    for stochastic in (False, True):
        coder = Coder(form, CPU, stochastic=stochastic)
        noise = torch.rand(len(x)) if stochastic else None
        kept = coder.decode(*coder.encode(x, noise), len(x))
        assert kept[: form.block].isfinite().all()
        assert kept[form.block :].isnan().any()
