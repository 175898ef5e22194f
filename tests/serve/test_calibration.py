"""What a calibration finds: gradients of each band, bases that make errors count apart."""

import json

import pytest
import torch
from torch.nn import functional

from shoestring.errors import CheckpointError, ConfigError, DataError
from shoestring.ops.row_code import GROUP
from shoestring.serve import Calibration, CompressedCache, calibrate
from shoestring.serve.calibration import BANDS, _banded, _basis, queries_per_token, stretched


def texts(rows=3, n=160, seed=7):
    return torch.randint(1, 128, (rows, n), generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def made(grouped):
    return calibrate(grouped, texts())


def test_bands_together_are_causal_attention_and_share_its_gradient():
    query = torch.randn(1, 4, 150, 16, dtype=torch.float64).float()
    key, value = torch.randn(2, 1, 2, 150, 16)
    leaves = [x.clone().requires_grad_() for x in (key, value)]
    wanted = functional.scaled_dot_product_attention(
        query, *leaves, is_causal=True, scale=0.3, enable_gqa=True
    )
    copies = [x.clone().requires_grad_() for _ in BANDS for x in (key, value)]
    found = _banded(query, 0.3, *copies)
    assert (found - wanted).abs().max() < 1e-5
    weights = torch.randn_like(wanted)
    (wanted * weights).sum().backward()
    (found * weights).sum().backward()
    for side, leaf in enumerate(leaves):
        assert (sum(copy.grad for copy in copies[side::2]) - leaf.grad).abs().max() < 1e-5
    for band, low in enumerate(BANDS):  # the last tokens have not been so old yet
        assert not copies[2 * band + 1].grad[:, :, 150 - low :].any() or low == 0
        if low < 150:
            assert copies[2 * band + 1].grad[:, :, : 150 - low].any(-1).all()


def test_a_basis_makes_vectors_white_and_their_errors_count_apart():
    torch.manual_seed(0)
    x = torch.randn(2, 3, 500, 16, dtype=torch.float64) * torch.linspace(0.1, 3, 16)
    g = torch.randn(2, 3, 500, 16, dtype=torch.float64) @ torch.randn(16, 16).double()
    fisher, covariance = g.mT @ g / 500, x.mT @ x / 500
    turn = _basis(fisher, covariance)
    assert torch.allclose(turn @ covariance @ turn.mT, torch.eye(16).double(), atol=1e-9)
    inverse = torch.linalg.inv(turn)
    costs = inverse.mT @ fisher @ inverse
    diagonal = costs.diagonal(dim1=-2, dim2=-1)
    assert (costs - torch.diag_embed(diagonal)).abs().max() < 1e-8 * diagonal.max()
    assert torch.all(diagonal.diff(dim=-1) <= 1e-9 * diagonal.max())
    # Bits by these weights lose least: no other basis has a smaller product of weights.
    assert torch.allclose(diagonal.log().sum(-1), torch.logdet(fisher) + torch.logdet(covariance))


def test_a_layer_is_described_as_the_model_has_it(made, grouped):
    assert [x.shape for x in made.weights] == [(4, 2, 2, 16 // GROUP)] * 3
    assert made.tokens == 480
    assert made.row == 160
    for weights in made.weights:
        assert bool((weights > 0).all())
        assert torch.all(weights[:, :, :, 0].sum(0) >= weights[:, :, :, 1].sum(0))
    assert not grouped.training
    assert grouped.config._attn_implementation == "sdpa"
    assert all(weight.requires_grad and weight.grad is None for weight in grouped.parameters())


def test_the_same_texts_and_seed_give_the_same_calibration(made, grouped):
    again = calibrate(grouped, texts())
    assert all(map(torch.equal, made.weights, again.weights))
    assert all(map(torch.equal, made.turns, again.turns))
    other = calibrate(grouped, texts(), seed=1)
    assert not torch.equal(made.turns[0], other.turns[0])


def test_layers_that_slide_are_left_out(model):
    found = calibrate(model, texts(rows=1))
    assert len(found.means) == len(CompressedCache(model).compressed)


def test_a_calibration_comes_back_from_its_directory(made, tmp_path):
    made.save(tmp_path / "kept")
    found = Calibration.load(tmp_path / "kept")
    for name in ("means", "turns", "weights"):
        assert all(map(torch.equal, getattr(made, name), getattr(found, name)))
    assert (found.tokens, found.row, found.shape) == (made.tokens, made.row, made.shape)
    assert found.weights_of == made.weights_of


def test_a_damaged_or_foreign_directory_is_refused(made, tmp_path):
    with pytest.raises(CheckpointError, match="no calibration"):
        Calibration.load(tmp_path)
    made.save(tmp_path / "kept")
    file = tmp_path / "kept" / "calibration.safetensors"
    content = bytearray(file.read_bytes())
    content[-5] ^= 1
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match="checksum"):
        Calibration.load(tmp_path / "kept")
    made.save(tmp_path / "kept")
    facts = tmp_path / "kept" / "calibration.json"
    facts.write_text(json.dumps({"format": 2}))
    with pytest.raises(CheckpointError, match="bytes"):
        Calibration.load(tmp_path / "kept")


def test_another_model_is_noticed(made, grouped, model):
    made.check(grouped)
    made.check(grouped.config)
    with torch.no_grad():
        grouped.model.layers[1].self_attn.k_proj.weight[:] += 0.5
    with pytest.raises(ConfigError, match="other weights"):
        CompressedCache(grouped, budget="6bits", calibration=made)
    if model.config.model_type != "llama":
        with pytest.raises(ConfigError, match="another shape"):
            CompressedCache(model, budget="6bits", calibration=made)


def test_texts_that_do_not_do_are_refused(grouped):
    for bad, what in (
        (texts().float(), "float32"), (texts(n=32), "32 tokens"), (texts()[0], "texts"),
        (texts() + 1000, "127"), (texts() - 1000, "127"),
    ):  # fmt: skip
        with pytest.raises(DataError, match=what):
            calibrate(grouped, bad)
    assert grouped.config._attn_implementation == "sdpa"


def test_queries_are_counted_as_they_meet_a_token():
    n, low, high = 60, 7, 20
    wanted = sum(low <= q - k < high for q in range(n) for k in range(n)) / n
    assert queries_per_token(low, high, n) == pytest.approx(wanted)
    assert queries_per_token(0, None, n) == pytest.approx((n + 1) / 2)
    assert queries_per_token(70, None, n) == 0
    weights = torch.rand(4, 2)
    assert torch.equal(stretched(weights, 768, 768), weights)
    longer = stretched(weights, 768, 4096) / weights
    assert torch.all(longer.diff(dim=0) > 0)
    assert torch.equal(stretched(weights, 200, 2048)[3], stretched(weights, 200, 2048)[2])
