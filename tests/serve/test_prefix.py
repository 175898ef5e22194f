"""A context that is kept comes back bit for bit, and only to the model that read it."""

import json

import pytest
import torch

from serve.conftest import gemma, llama
from serve.test_generate import greedy, ids, read
from shoestring.errors import CheckpointError, ConfigError
from shoestring.serve import CompressedCache, calibrate


def calibration_of(model):
    return calibrate(model, ids(2, 150, seed=9))


def caches(model):
    return {
        "plain": CompressedCache(model, key_bits=3, value_bits=2, window=16),
        "exact": CompressedCache(model, window=500),
        "graded": CompressedCache(
            model, budget="6bits", context=1000, calibration=calibration_of(model)
        ),
    }


@pytest.mark.parametrize("entropy", [False, True])
@pytest.mark.parametrize("which", ["plain", "exact", "graded"])
def test_what_was_read_is_taken_up_again(grouped, which, entropy, tmp_path):
    cache = caches(grouped)[which]
    read(grouped, ids(2, 200), cache)
    cache.save(grouped, tmp_path / "kept", entropy=entropy)
    calibration = calibration_of(grouped) if which == "graded" else None
    found = CompressedCache.load(grouped, tmp_path / "kept", calibration=calibration)
    assert found.get_seq_length() == 200
    for one, other in zip(cache.compressed, found.compressed, strict=True):
        for mine, its in zip(one.stores, other.stores, strict=True):
            assert len(mine) == len(its)
            for rows, there in zip(
                torch.cat([mine.rows[:, :0], *mine.segments()], 1).unbind(1),
                torch.cat([its.rows[:, :0], *its.segments()], 1).unbind(1), strict=True,
            ):  # fmt: skip
                assert torch.equal(rows, there)
    end = ids(2, 20, seed=5)
    assert (read(grouped, end, found) - read(grouped, end, cache)).abs().max() < 1e-5


def test_rows_that_begin_with_padding_keep_their_beginnings(grouped, tmp_path):
    prompt = ids(2, 60)
    mask = torch.ones_like(prompt)
    prompt[1, :20], mask[1, :20] = 0, 0
    cache = CompressedCache(grouped, window=16)
    with torch.no_grad():
        grouped(prompt, attention_mask=mask, past_key_values=cache)
    cache.save(grouped, tmp_path / "kept")
    found = CompressedCache.load(grouped, tmp_path / "kept")
    assert found.compressed[0].starts == [0, 20]
    longer = torch.cat([prompt, ids(2, 3, seed=6)], dim=1)
    whole = torch.ones_like(longer)
    whole[1, :20] = 0
    said = [greedy(grouped, longer, each, attention_mask=whole) for each in (cache, found)]
    assert torch.equal(*said)


def test_entropy_coding_saves_what_levels_of_unequal_chance_allow(grouped, tmp_path):
    cache = CompressedCache(grouped, key_bits=4, value_bits=2, window=16)
    read(grouped, ids(1, 1500), cache, chunk=500)
    sizes = []
    for entropy in (False, True):
        cache.save(grouped, tmp_path / "kept", entropy=entropy)
        sizes.append((tmp_path / "kept" / "prefix.safetensors").stat().st_size)
    assert sizes[1] < 0.98 * sizes[0]


def test_another_model_or_calibration_is_noticed(grouped, tmp_path):
    cache = CompressedCache(grouped, window=16)
    read(grouped, ids(1, 100), cache)
    cache.save(grouped, tmp_path / "kept")
    with pytest.raises(ConfigError, match="no calibration"):
        CompressedCache.load(grouped, tmp_path / "kept", calibration=calibration_of(grouped))
    torch.manual_seed(4)
    with pytest.raises(ConfigError, match="other weights"):
        CompressedCache.load(llama(), tmp_path / "kept")
    with pytest.raises(ConfigError, match="another shape"):
        CompressedCache.load(gemma(), tmp_path / "kept")
    graded = caches(grouped)["graded"]
    read(grouped, ids(1, 100), graded)
    graded.save(grouped, tmp_path / "graded")
    for other in (None, calibrate(grouped, ids(2, 150, seed=9), seed=1)):
        with pytest.raises(ConfigError, match="calibration"):
            CompressedCache.load(grouped, tmp_path / "graded", calibration=other)


def test_what_is_damaged_or_not_there_is_refused(grouped, tmp_path):
    with pytest.raises(CheckpointError, match="no prefix"):
        CompressedCache.load(grouped, tmp_path)
    cache = CompressedCache(grouped, window=16)
    read(grouped, ids(1, 100), cache)
    cache.save(grouped, tmp_path / "kept")
    file = tmp_path / "kept" / "prefix.safetensors"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 8
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match="checksum"):
        CompressedCache.load(grouped, tmp_path / "kept")


def test_caches_that_cannot_be_kept_say_why(grouped, tmp_path):
    with pytest.raises(ConfigError, match="empty"):
        CompressedCache(grouped).save(grouped, tmp_path / "kept")
    model = gemma()
    cache = CompressedCache(model, window=16)
    read(model, ids(1, 40), cache)
    with pytest.raises(ConfigError, match="sliding"):
        cache.save(model, tmp_path / "kept")
    cache = CompressedCache(grouped, window=16)
    cache.activate_past_recording()
    read(grouped, ids(1, 40), cache)
    with pytest.raises(ConfigError, match="cropped"):
        cache.save(grouped, tmp_path / "kept")
    assert not list(tmp_path.iterdir())
    assert json.dumps(cache.settings)
