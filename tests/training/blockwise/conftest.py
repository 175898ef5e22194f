"""Small real data: bars that stand where their label says, and a text that repeats itself."""

import dataclasses

import pytest
import torch
from safetensors.torch import save_file

from shoestring.training.blockwise.config import BlockwiseConfig

IMAGES = """
[run]
directory = "{folder}/run"
steps = 6
save_every = 2
device = "cpu"
[model]
num_hidden_layers = 4
hidden_size = 32
num_attention_heads = 2
condition_size = 16
[data]
source = "{folder}/bars.safetensors"
batch_size = 8
[blockwise]
blocks = 2
objective = "edm"
[schedule]
warmup_share = 0.2
"""


def bars(count=120, seed=0):
    """images (N, 1, 8, 8) as bytes, labels (N,): a bar at one of three places, some noise."""
    draws = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % 3
    images = torch.randint(60, (count, 1, 8, 8), generator=draws)
    for n, label in enumerate(labels.tolist()):
        images[n, 0, :, 2 * label : 2 * label + 2] += 180
    return {"images": images.to(torch.uint8), "labels": labels}


@pytest.fixture
def folder(tmp_path):
    save_file(bars(), tmp_path / "bars.safetensors")
    text = "".join(f"{n} and {n} make {2 * n}.\n" for n in range(400))
    (tmp_path / "sums.txt").write_text(text)
    (tmp_path / "blocks.toml").write_text(IMAGES.format(folder=tmp_path))
    return tmp_path


@pytest.fixture
def images(folder):
    return BlockwiseConfig.load(folder / "blocks.toml")


@pytest.fixture
def text(images, folder):
    return changed(
        images,
        data={"source": str(folder / "sums.txt"), "sequence_length": 16},
        blockwise={"objective": "masked"},
    )


def changed(config, **sections):
    """The config with some settings of some sections replaced."""
    parts = {
        name: dataclasses.replace(getattr(config, name), **values)
        for name, values in sections.items()
    }
    return dataclasses.replace(config, **parts)


def elsewhere(config, folder, **sections):
    """The config in another directory."""
    run = {**sections.pop("run", {}), "directory": str(folder)}
    return changed(config, run=run, **sections)
