"""Coded vectors: against the paper's algorithms, its errors, and what it says of inner products."""

import math

import pytest
import torch

from shoestring.errors import ConfigError, DataError
from shoestring.ops.codebook import codebook
from shoestring.ops.vector_code import Split, VectorCode, decoded_ref

FORMS = {
    "norm": {},
    "unbiased": {"scale": "unbiased"},
    "plain": {"scale": "plain"},
    "sketch": {"sketch": True},
}
EXACT = {"scale_dtype": torch.float32}


def relative(code, x):
    return float((code.decode(code.encode(x)) - x).square().sum(-1).div(x.square().sum(-1)).mean())


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("rotation", ["hadamard", "dense"])
@pytest.mark.parametrize(("width", "bits"), [(64, 1), (64, 2), (80, 3), (128, 4), (20, 8)])
def test_codes_decode_as_the_algorithms_say(form, rotation, width, bits):
    code = VectorCode(width, bits, rotation=rotation, seed=2, **FORMS[form], **EXACT)
    x = torch.randn(3, 40, width) * torch.rand(3, 40, 1) * 10
    found, wanted = code.decode(code.encode(x)), decoded_ref(code, x)
    # a coordinate within rounding of an edge may fall to either side
    off = (found.double() - wanted).norm(dim=-1) / wanted.norm(dim=-1)
    assert off.median() < 1e-6
    assert (off < 1e-4).double().mean() > 0.98


@pytest.mark.parametrize("width", [64, 128, 1536])
@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_the_error_is_the_codebooks_whatever_the_vectors_are(width, bits):
    torch.manual_seed(1)
    code = VectorCode(width, bits, scale="plain", rotation="dense")
    book = codebook(bits, width).error
    assert relative(code, torch.randn(400_000 // width, width)) == pytest.approx(book, rel=0.02)
    loud = torch.randn(400, width)
    loud[:, :3] *= 40
    assert relative(code, loud) < 1.25 * book + 0.01
    offset = torch.randn(400, width) + 30
    assert relative(code, offset) < 1.3 * book


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_a_transform_without_signs_would_fail_on_a_constant_vector(bits):
    from shoestring.ops.rotation import _walsh_hadamard

    code = VectorCode(128, bits, scale="plain")
    x = torch.ones(1, 128)
    bare = code.decode(code.encode(code.rotate.inverse(_walsh_hadamard(x))))
    lost = float((bare - code.rotate.inverse(_walsh_hadamard(x))).square().sum() / 128)
    assert lost > 0.5
    assert relative(code, x) < 3 * codebook(bits, 128).error


def estimates(form, bits, draws=24, count=1500, width=128):
    """Inner products found and true, over many rotations."""
    found, true = [], []
    for seed in range(draws):
        code = VectorCode(width, bits, rotation="dense", seed=seed, **FORMS[form], **EXACT)
        x = torch.randn(count, width)
        x /= x.norm(dim=-1, keepdim=True)
        other = torch.randn(count, width)
        y = 0.45 * x + 0.893 * torch.nn.functional.normalize(
            other - (other * x).sum(-1, keepdim=True) * x, dim=-1
        )
        found.append((code.decode(code.encode(x)) * y).sum(-1))
        true.append((x * y).sum(-1))
    return torch.cat(found), torch.cat(true)


@pytest.mark.parametrize("form", ["unbiased", "sketch"])
@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_inner_products_are_right_in_the_mean(form, bits):
    found, true = estimates(form, bits)
    slope = float((found * true).sum() / true.square().sum())
    assert slope == pytest.approx(1, abs=0.01)


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_the_plain_code_comes_out_short_by_its_error(bits):
    found, true = estimates("plain", bits, draws=12)
    slope = float((found * true).sum() / true.square().sum())
    assert slope == pytest.approx(1 - codebook(bits, 128).error, abs=0.01)


@pytest.mark.parametrize(("bits", "variance"), [(1, 1.571), (2, 0.571), (3, 0.1845), (4, 0.0543)])
def test_the_sketchs_variance_is_that_of_the_theorem(bits, variance):
    code = VectorCode(128, bits, sketch=True, rotation="dense", **EXACT)
    x = torch.nn.functional.normalize(torch.randn(4000, 128), dim=-1)
    y = torch.nn.functional.normalize(torch.randn(4000, 128), dim=-1)
    y = torch.nn.functional.normalize(y - (y * x).sum(-1, keepdim=True) * x, dim=-1)
    off = (code.decode(code.encode(x)) * y).sum(-1)
    assert 128 * float(off.square().mean()) == pytest.approx(variance, rel=0.1)
    assert 128 * float(off.square().mean()) <= math.sqrt(3) * math.pi**2 * 4.0**-bits


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("bits", [1, 3, 4])
def test_scores_in_the_rotated_space_are_those_of_decoded_vectors(form, bits):
    code = VectorCode(80, bits, **FORMS[form])
    codes = code.encode(torch.randn(2, 3, 50, 80))
    queries = torch.randn(2, 3, 7, 80)
    torch.testing.assert_close(
        code.scores(queries, codes), queries @ code.decode(codes).mT, rtol=1e-5, atol=1e-4
    )


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("bits", range(1, 9))
def test_bytes_are_those_that_are_kept(form, bits):
    code = VectorCode(64, bits, **FORMS[form])
    codes = code.encode(torch.randn(5, 7, 64))
    assert codes.nbytes == 35 * code.vector_bytes
    if form == "norm":
        assert code.vector_bytes == 8 * bits + 2


def test_a_zero_vector_no_vector_and_short_floats_are_coded():
    code = VectorCode(64, 3)
    assert torch.equal(code.decode(code.encode(torch.zeros(2, 64))), torch.zeros(2, 64))
    assert code.decode(code.encode(torch.zeros(0, 64))).shape == (0, 64)
    x = torch.randn(9, 64)
    assert relative(code, x.bfloat16().float()) < 0.05
    assert code.decode(code.encode(x.bfloat16())).dtype == torch.float32


def test_fractional_bits_go_to_the_channels_with_the_energy():
    x = torch.randn(600, 64)
    x[:, [3, 9, 31, 40, 41, 50, 60, 61]] *= 8
    split = Split.by_energy(x, 2, 8)
    assert split.outliers == (3, 9, 31, 40, 41, 50, 60, 61)
    assert split.mean_bits == 2.125
    codes = split.encode(x)
    assert sum(part.nbytes for part in codes) == 600 * split.vector_bytes
    lost = (split.decode(codes) - x).square().sum() / x.square().sum()
    assert lost < 0.6 * relative(VectorCode(64, 2), x)
    half = Split(64, 2, tuple(range(32)))
    assert half.mean_bits == 2.5


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_is_refused(bad):
    x = torch.randn(4, 64)
    x[2, 5] = bad
    with pytest.raises(DataError, match="NaN or infinity"):
        VectorCode(64, 4).encode(x)


def test_a_norm_without_a_scale_is_refused_with_the_dtype_that_holds_it():
    x = torch.full((1, 64), 1e5)
    with pytest.raises(ConfigError, match="bfloat16"):
        VectorCode(64, 4).encode(x)
    assert relative(VectorCode(64, 4, scale_dtype=torch.bfloat16), x) < 0.02


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"bits": 0}, "1 to 8"),
        ({"bits": 9}, "1 to 8"),
        ({"bits": 2, "scale": "best"}, "scale = 'best'"),
        ({"bits": 2, "rotation": "none"}, "rotation"),
        ({"bits": 2, "width": 2}, "3 or more"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings, said):
    with pytest.raises(ConfigError, match=said):
        VectorCode(**{"width": 64, **settings}).encode(torch.zeros(1, settings.get("width", 64)))


def test_outliers_that_are_not_there_are_refused():
    with pytest.raises(ConfigError, match="distinct channels below 64"):
        Split(64, 2, (1, 2, 64))
    with pytest.raises(ConfigError, match="3 or more"):
        Split(64, 2, (1, 2))
