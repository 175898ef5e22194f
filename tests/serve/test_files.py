"""Directories whose checksums are right and whose contents are not: refused before use."""

import json

import pytest
import torch

from serve.test_generate import ids, read
from shoestring.checkpoint import atomic_directory
from shoestring.checkpoint.tensors import read_tensors, write_tensors
from shoestring.errors import CheckpointError, ConfigError
from shoestring.serve import Calibration, CompressedCache, calibrate


def changed(directory, name, change):
    """The directory again, its facts and tensors changed, its manifest as it should be."""
    facts = json.loads((directory / f"{name}.json").read_text())
    tensors = {key: x.clone() for key, x in read_tensors(directory / f"{name}.safetensors")}
    facts = change(facts, tensors) or facts
    with atomic_directory(directory) as temporary:
        (temporary / f"{name}.json").write_text(json.dumps(facts))
        write_tensors(temporary / f"{name}.safetensors", tensors)


def fact(**values):
    return lambda facts, tensors: facts.update(values)


def setting(**values):
    return lambda facts, tensors: facts["settings"].update(values)


def of_layer(**values):
    return lambda facts, tensors: facts["layers"][1].update(values)


def tensor(name, made):
    def change(facts, tensors):
        if made is None:
            del tensors[name]
        else:
            tensors[name] = made(tensors[name])

    return change


PREFIXES = {
    "a list": lambda facts, tensors: [facts],
    "another format": fact(format=7),
    "no settings": lambda facts, tensors: facts.pop("settings") and None,
    "an unknown setting": setting(colour=3),
    "another seed, so another form of codes": setting(key_bits=5),
    "more rows than there can be": fact(rows=10**12),
    "no rows": fact(rows=-1),
    "a dtype that is none": fact(dtype="float3"),
    "fewer layers": lambda facts, tensors: facts["layers"].pop() and None,
    "a layer that is a number": lambda facts, tensors: facts.update(layers=[1, 2, 3]),
    "too many tokens": of_layer(tokens=[16, 10**14]),
    "another number of tokens": of_layer(tokens=[16, 3]),
    "a ring that is too full": of_layer(tokens=[184, 16]),
    "too few tiers": of_layer(tokens=[16]),
    "negative starts": of_layer(starts=[-1, 0]),
    "means that are no truths": of_layer(frozen=[1, 1]),
    "no sinks": tensor("0.sinks", None),
    "sinks of NaN": tensor("0.sinks", lambda x: x * torch.nan),
    "rows of another batch": tensor("0.1", lambda x: x[:1]),
    "rows as numbers": tensor("0.1", lambda x: x.float()),
    "narrow rows": tensor("0.1", lambda x: x[..., 1:]),
}


@pytest.mark.parametrize("case", PREFIXES)
def test_a_prefix_that_cannot_be_is_refused(grouped, case, tmp_path):
    cache = CompressedCache(grouped, window=16)
    read(grouped, ids(2, 200), cache)
    cache.save(grouped, tmp_path / "kept", entropy=False)
    changed(tmp_path / "kept", "prefix", lambda facts, tensors: None)
    CompressedCache.load(grouped, tmp_path / "kept")
    changed(tmp_path / "kept", "prefix", PREFIXES[case])
    with pytest.raises(CheckpointError):
        CompressedCache.load(grouped, tmp_path / "kept")


@pytest.mark.parametrize("stream", [None, lambda x: x[:5], lambda x: x.float(), lambda x: x * 0])
def test_a_stream_that_cannot_be_is_refused(grouped, stream, tmp_path):
    cache = CompressedCache(grouped, window=16)
    read(grouped, ids(2, 200), cache)
    cache.save(grouped, tmp_path / "kept")
    changed(tmp_path / "kept", "prefix", tensor("0.1.4", stream))
    with pytest.raises(CheckpointError):
        CompressedCache.load(grouped, tmp_path / "kept")


CALIBRATIONS = {
    "a list": lambda facts, tensors: [facts],
    "no layers": lambda facts, tensors: facts.pop("layers") and None,
    "more layers": fact(layers=4),
    "fewer layers": fact(layers=1),
    "a row of none": fact(row=0),
    "a row that is a text": fact(row="768"),
    "other bands": fact(bands=[0, 10]),
    "weights of two bands": tensor("weights.1", lambda x: x[:2]),
    "weights below 0": tensor("weights.1", lambda x: -x),
    "weights of NaN": tensor("weights.1", lambda x: x * torch.nan),
    "a turn in 16 bits": tensor("turn.0", lambda x: x.bfloat16()),
    "a turn that cannot be turned back": tensor("turn.0", lambda x: x * 0),
    "no mean": tensor("mean.2", None),
}


@pytest.mark.parametrize("case", CALIBRATIONS)
def test_a_calibration_that_cannot_be_is_refused(grouped, case, tmp_path):
    calibrate(grouped, ids(1, 60)).save(tmp_path / "kept")
    changed(tmp_path / "kept", "calibration", CALIBRATIONS[case])
    with pytest.raises(CheckpointError):
        Calibration.load(tmp_path / "kept")


def test_nothing_of_anybody_elses_is_replaced(grouped, tmp_path):
    cache = CompressedCache(grouped, window=16)
    read(grouped, ids(1, 60), cache)
    calibration = calibrate(grouped, ids(1, 60))
    mine = tmp_path / "mine"
    mine.mkdir()
    kinds = {"prefix": lambda at: cache.save(grouped, at), "calibration": calibration.save}
    (mine / "thesis.txt").write_text("years of work")
    (tmp_path / "file").write_text("more")
    for name, save in kinds.items():
        for at in (mine, tmp_path / "file"):
            with pytest.raises(ConfigError, match="another directory"):
                save(at)
        save(tmp_path / name)
        save(tmp_path / name)  # a former one of the kind
    with pytest.raises(ConfigError, match="another directory"):
        kinds["prefix"](tmp_path / "calibration")
    assert (mine / "thesis.txt").read_text() == "years of work"


def test_a_prefix_is_of_the_model_that_read_it(grouped, tmp_path):
    cache = CompressedCache(grouped, window=16)
    read(grouped, ids(1, 60), cache)
    torch.manual_seed(9)
    other = type(grouped)(grouped.config)
    with pytest.raises(ConfigError, match="another model"):
        cache.save(other, tmp_path / "kept")


def test_a_prefix_by_budget_is_read_in_another_dtype(grouped, tmp_path):
    calibration = calibrate(grouped, ids(1, 60))
    cache = CompressedCache(grouped, budget="6bits", context=800, calibration=calibration)
    read(grouped, ids(1, 300), cache)
    cache.save(grouped, tmp_path / "kept")
    half = grouped.bfloat16()
    found = CompressedCache.load(half, tmp_path / "kept", calibration=calibration)
    assert found.get_seq_length() == 300
    with pytest.raises(ConfigError, match="float32"):
        read(half, ids(1, 5), found)
