"""The blocks of one or many directories put together as one model, and such a model read.

A merged model is a directory with a manifest: model.safetensors (the names of `DiT`'s state, the
table included) and model.json (shape, noise levels, objective, what each block was). Weights go
from file to file a tensor at a time. Blocks must agree in format, shape, noise levels, objective,
table and data; they may come from other machines, seeds and numbers of updates.
"""

import itertools
import json
import math
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ...checkpoint import Checkpoint, Store, atomic_directory, verify
from ...checkpoint.tensors import InParts, read_tensors, write_tensors
from ...errors import CheckpointError, ConfigError
from ...models.causal import Causal
from ...models.causal_config import CausalConfig
from ...models.dit import DiT
from ...models.dit_config import DiTConfig
from ...models.wrapped import Wrapped
from ...models.wrapped_config import WrappedConfig
from ...objectives.denoise import Denoise
from ...objectives.label_denoising import LabelDenoising
from ...objectives.masked_diffusion import MaskedDiffusion
from ...objectives.token_denoising import OWN_BITS, TokenDenoising
from ...ops.noise_levels import Partition
from ..snapshot import MODEL, STATE
from .encoder import CONTEXT
from .handed import file_digest, stands_on
from .job import TABLE, differences, newest
from .task import FORMAT, table_digest

Objective = Denoise | MaskedDiffusion | LabelDenoising | TokenDenoising
FACTS, WEIGHTS = "model.json", "model.safetensors"


@dataclass(frozen=True, slots=True)
class Found:
    """A trained block on disk."""

    directory: Path
    saved: Checkpoint
    facts: dict[str, Any]

    @property
    def block(self) -> int:
        """1..B."""
        return int(self.facts["block"])

    def held_out(self) -> dict[str, float] | None:
        """The receipt's held-out numbers of these weights, None where it has none."""
        try:
            text = (self.directory / "receipt.json").read_text(encoding="utf-8")
            receipt = json.loads(text)
            return dict(receipt["held_out"]) if receipt["updates"] == self.facts["step"] else None
        except (OSError, ValueError, KeyError, TypeError):
            return None


class OnDisk(InParts):
    """A tensor of a safetensors file, read when it is written."""

    def __init__(self, path: Path, name: str, like: Tensor) -> None:
        self.path, self.name = path, name
        self.shape, self.dtype, self.layout = like.shape, like.dtype, torch.strided

    def parts(self) -> Iterator[Tensor]:
        """In one part."""
        with safe_open(self.path, framework="pt") as file:
            yield file.get_tensor(self.name)


def merge(directories: Sequence[str | Path], into: str | Path | None = None) -> Path:
    """Put trained blocks together; returns the model's directory.

    directories: of runs (each with block-N folders) or of single blocks.  into: where the model
    goes, `model` in the first directory if not given. ConfigError for a block that is missing,
    there twice, not finished, or not of the others' kind; CheckpointError for damage. Nothing is
    written before all of it was verified.
    """
    paths = [Path(each) for each in directories]
    if not paths:
        raise ConfigError("merge was given no directories", expected="runs, or folders of blocks")
    blocks = _all_blocks(paths)
    first = blocks[0]
    for each in blocks[1:]:
        _check_alike(first, each)
    _check_order(blocks)
    shape = shape_of(first.facts["identity"]["model"])
    _check_complete(blocks, shape.blocks)
    tensors = _tensors(blocks, shape)
    final = Path(into) if into is not None else paths[0] / "model"
    if final.exists() and not (final / FACTS).is_file():
        raise ConfigError(
            f"{final} is there and is no merged model", expected="a directory of its own",
            hint="Give another place with --to.",
        )  # fmt: skip
    facts = {
        **first.facts["identity"],
        "blocks": [
            {
                "block": b.block, "updates": b.facts["step"], "seed": b.facts["seed"],
                "held_out": b.held_out(),
            }
            for b in blocks
        ],
    }  # fmt: skip
    with atomic_directory(final, known := {}) as temporary:
        known[WEIGHTS] = write_tensors(temporary / WEIGHTS, tensors)
        text = json.dumps(facts, indent=1) + "\n"
        (temporary / FACTS).write_text(text, encoding="utf-8", newline="\n")
        if "context" in facts:
            _copy_encoder(first, temporary / CONTEXT, facts["context"])
    return final


def _copy_encoder(found: Found, into: Path, digest: str) -> None:
    place = found.directory / CONTEXT
    if not verify(place) or file_digest(place, WEIGHTS) != digest:
        raise CheckpointError(
            f"{place} is not the encoder that block {found.block} was trained with",
            expected=f"a merged model whose weights have sha256 {digest}",
        )
    shutil.copytree(place, into)


def _all_blocks(paths: Sequence[Path]) -> list[Found]:
    """Every block below the directories, by number."""
    found: dict[int, Found] = {}
    for path in paths:
        folders = _folders(path)
        if not folders:
            raise CheckpointError(
                f"{path} holds no trained block" if path.is_dir() else f"{path} does not exist",
                expected="a run with block-N folders, or the folder of a block",
            )
        for folder in folders:
            each = _read(folder)
            if each.block in found and found[each.block].directory.samefile(folder):
                continue
            if each.block in found:
                raise ConfigError(
                    f"block {each.block} is there twice: in {found[each.block].directory} and in "
                    f"{each.directory}",
                    expected="each block once",
                )
            found[each.block] = each
    return [found[block] for block in sorted(found)]


def _folders(path: Path) -> list[Path]:
    if (path / "checkpoints").is_dir():
        return [path]
    return sorted(p.parent for p in path.glob("block-*/checkpoints") if p.is_dir())


def _read(folder: Path) -> Found:
    saved, wrong = newest(Store(folder / "checkpoints"))
    if saved is None:
        raise CheckpointError(f"{folder} holds no checkpoint", expected="a trained block")
    facts = saved.json(STATE)
    identity = facts.get("identity")
    if not isinstance(identity, dict) or identity.get("format") != FORMAT:
        version = identity.get("format") if isinstance(identity, dict) else None
        raise ConfigError(
            f"{saved.path} has format {version!r}", expected=f"{FORMAT}",
            hint="It was written by another version of Shoestring.",
        )  # fmt: skip
    if facts["step"] < facts["steps"]:
        raise ConfigError(
            f"block {facts['block']} in {folder} has made {facts['step']} of its "
            f"{facts['steps']} updates"
            + "".join(f"; newer, and damaged: {each}" for each in wrong),
            expected="blocks that are finished",
            hint=f"shoestring train {folder / 'config.toml'} --block {facts['block']} goes on.",
        )
    return Found(folder, saved, facts)


def _check_alike(first: Found, other: Found) -> None:
    name, one, two = next(
        differences(first.facts["identity"], other.facts["identity"]), ("", None, None)
    )
    if not name:
        return
    hint = {
        "table": "Blocks speak to each other through the table: train them with the same "
        "blockwise.table, or the same run.seed.",
        "data": "Train the blocks on the same file.",
    }.get(name, "Train one of the two again with the other's settings.")
    raise ConfigError(
        f"{name} is {one!r} for block {first.block} ({first.directory}) and {two!r} for block "
        f"{other.block} ({other.directory})",
        expected="blocks of one network",
        hint=hint,
    )


def _check_order(blocks: Sequence[Found]) -> None:
    """ConfigError for a block that was trained on others than the one before it."""
    for before, each in itertools.pairwise(blocks):
        wanted = each.facts.get("before")
        is_next = each.block == before.block + 1
        mine = stands_on(before.facts.get("before"), file_digest(before.saved.path, MODEL))
        if wanted is not None and is_next and wanted != mine:
            raise ConfigError(
                f"block {each.block} ({each.directory}) was trained on another block "
                f"{before.block} than the one of {before.directory}",
                expected="blocks that were trained one on the other",
                hint=f"Train block {each.block} again.",
            )


def _check_complete(blocks: Sequence[Found], count: int) -> None:
    missing = sorted(set(range(1, count + 1)) - {each.block for each in blocks})
    if missing:
        names = ", ".join(map(str, missing))
        raise ConfigError(
            f"block{'s' if len(missing) > 1 else ''} {names} of {count} "
            f"{'are' if len(missing) > 1 else 'is'} missing",
            expected=f"all blocks, 1 to {count}",
            hint=f"shoestring train RUN.toml --block {missing[0]} trains it.",
        )


def shape_of(model: Mapping[str, Any]) -> DiTConfig | WrappedConfig:
    """The shape that an identity has under "model"."""
    if "architecture" in model:
        return WrappedConfig.from_json(model)
    return (CausalConfig if "prelude" in model else DiTConfig).from_json(model)


def _tensors(
    blocks: Sequence[Found], shape: DiTConfig | WrappedConfig
) -> dict[str, Tensor | InParts]:
    """The whole state, each tensor where it lies; checked against the network's own names."""
    with torch.device("meta"):
        wanted = _kind_of(shape)(shape).state_dict()
    tensors: dict[str, Tensor | InParts] = {}
    for each in blocks:
        path = each.saved.path / MODEL
        for name, value in read_tensors(path):
            tensors[f"blocks.{each.block - 1}.{name}"] = OnDisk(path, name, value)
    for name, like in wanted.items():
        have = tensors.get(name)
        if have is None or (have.shape, have.dtype) != (like.shape, like.dtype):
            raise CheckpointError(f"{name} is missing or of another shape", expected="its weights")
    digest = blocks[0].facts["identity"]["table"]
    if digest is not None:
        tensors["table"] = _table(blocks[0], digest)
    return tensors


def _kind_of(shape: DiTConfig | WrappedConfig) -> Any:
    if isinstance(shape, WrappedConfig):
        return Wrapped
    return Causal if isinstance(shape, CausalConfig) else DiT


def _table(found: Found, digest: str) -> Tensor:
    place = found.directory / "table"
    if not verify(place):
        raise CheckpointError(f"{place} holds no table", expected="the table the block left there")
    table = dict(read_tensors(place / TABLE))["table"]
    if table_digest(table) != digest:
        raise CheckpointError(
            f"the table of {place} is not the one that block {found.block} was trained with",
            expected=f"sha256 {digest}",
        )
    return table


def bound_of(facts: Mapping[str, Any]) -> float | None:
    """Bits per byte of a merged text model: the sum of what its blocks found, each of its own part
    of the bound. None for images, and where a block has no number."""
    if facts["objective"]["kind"] != "masked":
        return None
    parts = [(block["held_out"] or {}).get("bits per byte") for block in facts["blocks"]]
    known = [float(part) for part in parts if part is not None]
    return sum(known) if len(known) == len(parts) else None


def own_bits_of(facts: Mapping[str, Any]) -> float | None:
    """Bits per byte of block 1's own next-token predictions, which are a likelihood of that block
    alone. None for other models, and for blocks that were not trained for it."""
    known = facts["blocks"][0]["held_out"] or {}
    return known.get(OWN_BITS) if facts["objective"]["kind"] == "tokens" else None


# ---- reading -----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Merged:
    """A merged model in evaluation mode, with what it was trained for."""

    model: DiT | Wrapped
    objective: Objective
    facts: Mapping[str, Any]
    encoder: "Merged | None" = None
    """What makes rows of images for the blocks, where they read these."""

    @property
    def partition(self) -> Partition:
        """Which block owns which noise."""
        return self.objective.partition


def load_merged(path: str | Path, *, device: torch.device | str = "cpu") -> Merged:
    """A merged model, or that of a run directory. ConfigError for a run whose blocks were not
    merged yet, CheckpointError for damage."""
    path = Path(path)
    place = path if (path / FACTS).is_file() else path / "model"
    if not (place / FACTS).is_file():
        if _folders(path):
            run = path.parent if (path / "checkpoints").is_dir() else path
            raise ConfigError(
                f"the blocks of {run} have not been merged", expected="one model",
                hint=f"shoestring merge {run} puts them together.",
            )  # fmt: skip
        raise CheckpointError(f"{path} holds no merged model", expected="what merge wrote")
    if not verify(place):
        raise CheckpointError(f"{place} has no manifest", expected="a merged model, whole")
    try:
        facts = json.loads((place / FACTS).read_text(encoding="utf-8"))
        shape = shape_of(facts["model"])
        objective = objective_of(facts, shape)
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{place / FACTS} cannot be read: {error}") from error
    model = _empty(shape)
    try:
        state = dict(read_tensors(place / WEIGHTS))
        model.table = state.pop("table", None)
        if model.table is not None:
            state["table"] = model.table
        model.load_state_dict(state, strict=True, assign=True)
    except (SafetensorError, RuntimeError) as error:
        raise CheckpointError(f"{place / WEIGHTS} does not fit: {error}") from error
    encoder = load_merged(place / CONTEXT, device=device) if "context" in facts else None
    return Merged(model.to(device).eval().requires_grad_(False), objective, facts, encoder)


def _empty(shape: DiTConfig | WrappedConfig) -> DiT | Wrapped:
    if isinstance(shape, WrappedConfig):
        return Wrapped.hollow(shape)
    with torch.device("meta"):
        made: DiT = _kind_of(shape)(shape)
    return made


def objective_of(facts: Mapping[str, Any], shape: DiTConfig | WrappedConfig) -> Objective:
    """The objective that a run's identity names."""
    parts = Partition.from_json(facts["partition"])
    settings = facts["objective"]
    if settings["kind"] == "masked":
        return MaskedDiffusion(partition=parts)
    if settings["kind"] == "labels":
        return LabelDenoising(partition=parts)
    if settings["kind"] == "tokens":
        return TokenDenoising(partition=parts, mixed_every=int(settings["mixed_every"]))
    std = float(settings["data_std"])
    if not math.isfinite(std):
        raise ValueError(f"data_std {std}")
    return Denoise(kind=settings["kind"], partition=parts, data_std=std, classes=shape.classes)
