"""The block-wise part of `run.py`: what must be the same bits on a device, and what a job holds."""

import gc
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from shoestring.meter import Meter
from shoestring.models.dit import DiT
from shoestring.models.dit_config import DiTConfig
from shoestring.objectives.denoise import Denoise
from shoestring.ops.noise_levels import LogNormal, partition
from shoestring.training.blockwise.config import (
    BlockDataConfig,
    BlockRunConfig,
    BlocksConfig,
    BlockwiseConfig,
    DenoiserConfig,
)
from shoestring.training.blockwise.every import train_every_block
from shoestring.training.blockwise.job import train_block
from shoestring.training.blockwise.merging import load_merged, merge
from shoestring.training.blockwise.sampling import sample_images

# DiT-L/2, which the paper trains in 3 blocks of 8 layers
LARGE: dict[str, Any] = {"layers": 24, "width": 1024, "heads": 16, "condition": 128, "size": 32,
                         "channels": 4, "patch": 2, "classes": 1000}  # fmt: skip
TINY: dict[str, Any] = {**LARGE, "layers": 6, "width": 48, "heads": 2, "condition": 16, "size": 8}


def exactness(device: str) -> dict[str, bool]:
    """Blocks apart against blocks in turn, bit for bit; and a model of both draws what it drew."""
    found = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        draws = torch.Generator().manual_seed(0)
        images = torch.randint(256, (256, 1, 8, 8), generator=draws, dtype=torch.uint8)
        save_file({"images": images, "labels": torch.arange(256) % 4}, folder / "data.safetensors")
        for objective in ("edm", "flow", "labels", "masked"):
            states = {}
            for way in ("apart", "in turn"):
                config = _config(objective, folder, folder / objective / way, device)
                if way == "apart":
                    for block in (2, 1):
                        train_block(config, block)
                else:
                    train_every_block(config)
                states[way] = load_merged(merge([config.run.directory])).model.state_dict()
            same = all(torch.equal(x, states["in turn"][k]) for k, x in states["apart"].items())
            found[f"blocks of {objective}, apart and in turn"] = same
        merged = load_merged(folder / "edm" / "apart", device=device)
        twice = [sample_images(merged, 4, steps=6, seed=1) for _ in range(2)]
        found["images drawn twice"] = torch.equal(*twice)
    return found


def _config(objective: str, folder: Path, into: Path, device: str) -> BlockwiseConfig:
    (folder / "text.txt").write_text("one and one make two.\n" * 400)
    return BlockwiseConfig(
        run=BlockRunConfig(directory=str(into), steps=8, turn=3, device=device),
        model=DenoiserConfig(
            num_hidden_layers=4, hidden_size=32, num_attention_heads=2, condition_size=16
        ),
        data=BlockDataConfig(
            source=str(folder / ("text.txt" if objective == "masked" else "data.safetensors")),
            sequence_length=16, batch_size=8,
        ),
        blockwise=BlocksConfig(blocks=2, objective=objective),  # type: ignore[arg-type]
    )  # fmt: skip


def jobs(device: str, *, smoke: bool) -> dict[str, dict[str, float]]:
    """Peak bytes and seconds of a step, end to end and of one of B blocks: DiT-L/2, float32 and
    AdamW, the first block, 16 images."""
    shape, images = (TINY, 4) if smoke else (LARGE, 16)
    return {
        "end to end" if blocks == 1 else f"1 of {blocks} blocks": _job(
            DiTConfig(blocks=blocks, **shape), images, device
        )
        for blocks in ((1, 2, 3, 6) if smoke else (1, 2, 3, 4))
    }


def _job(shape: DiTConfig, count: int, device: str) -> dict[str, float]:
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    objective = Denoise(
        kind="edm", partition=partition(LogNormal(), shape.blocks), classes=shape.classes
    )
    model = DiT.make(shape, seed=0, only=1, device=device)
    net = model.block(1)
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-4, fused=True)
    draws = torch.Generator().manual_seed(0)
    images = torch.randn((count, shape.channels, shape.size, shape.size), generator=draws)
    images, labels = images.to(device), torch.zeros(count, dtype=torch.int64, device=device)

    def step() -> None:
        draw = objective.draw(1, images, labels, draws)
        objective.loss(net, images, draw).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if device == "cuda":
            torch.cuda.synchronize()

    seconds = []
    for _ in range(4):
        started = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - started)
    if device == "cuda":
        return {"bytes": torch.cuda.max_memory_allocated(), "seconds": min(seconds)}
    with Meter(model, optimizer) as meter:
        step()
    return {"bytes": meter.peak_bytes, "seconds": min(seconds)}
