"""A context that was read once, kept on disk and taken up again: the same codes, bit for bit.

Codes are stored as they are, or entropy-coded: of each number of bits, the codes of all groups as
one stream of Huffman codes (deflate without its search for repetitions). Levels of a normal law are
not equally likely, which is what that saves. Scales are deflated as bytes.
"""

import hashlib
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..checkpoint import atomic_directory
from ..checkpoint.tensors import write_tensors
from ..errors import CheckpointError, ConfigError
from ..ops.bit_pack import pack, unpack
from ..ops.row_code import GROUP, RowCode
from . import files
from .config import text_config
from .form import LayerForm
from .identity import shape_of, weights_of
from .layer import CompressedLayer

if TYPE_CHECKING:
    from .cache import CompressedCache

FORMAT = 1
_FILES = ("prefix.json", "prefix.safetensors")
_DTYPES = {
    str(x).removeprefix("torch."): x
    for x in (torch.float32, torch.float16, torch.bfloat16, torch.float64)
}


def save(
    cache: "CompressedCache", model: nn.Module, directory: str | Path, *, entropy: bool
) -> None:
    """A directory that appears whole or not, with checksums. ConfigError for a cache that is empty
    or has layers that are not ours, and for a directory that holds something else."""
    files.check_target(directory, _FILES[0])
    layers = _layers(cache)
    if not all(layer.is_initialized for layer in layers):
        raise ConfigError("an empty cache to be saved", expected="one that has read something")
    for layer in layers:
        layer.check_whole()
    first = layers[0]
    facts = {
        "format": FORMAT, "settings": cache.settings, "entropy": entropy,
        "shape": shape_of(text_config(model)), "weights_of": weights_of(model),
        "calibration": cache.calibrated_on, "form": digest_of(cache.forms),
        "rows": len(first.starts), "dtype": str(first.dtype).removeprefix("torch."),
        "layers": [
            {"starts": each.starts, "frozen": each.frozen, "tokens": list(map(len, each.stores))}
            for each in layers
        ],
    }  # fmt: skip
    known: dict[str, str] = {}
    with atomic_directory(directory, known) as temporary:
        (temporary / _FILES[0]).write_text(json.dumps(facts) + "\n")
        tensors = {
            f"{index}.{name}": x
            for index, layer in enumerate(layers)
            for name, x in _tensors(layer, entropy)
        }
        known[_FILES[1]] = write_tensors(temporary / _FILES[1], tensors)


def digest_of(forms: list[LayerForm]) -> str:
    """Hex of which bits mean what."""
    made = hashlib.sha256()
    for form in forms:
        made.update(f"{form.heads} {form.width} {form.sinks} {form.centre}".encode())
        for tier in form.tiers:
            made.update(f" {tier.room}".encode())
            if tier.code is not None:
                made.update(
                    f" {tier.code.scale_bytes} {tier.code.bits.flatten().tolist()}".encode()
                )
    return made.hexdigest()[:32]


class Prefix:
    """What a directory holds, verified and looked through before anything is made of it.

    CheckpointError for what is not there, not whole, or cannot be what `save` wrote.
    """

    def __init__(self, directory: str | Path) -> None:
        self.directory = directory
        self.facts, self.tensors = files.read(directory, _FILES, "prefix", FORMAT)
        kinds = {
            "settings": dict, "entropy": bool, "shape": str, "weights_of": str, "form": str,
            "rows": int, "dtype": str, "layers": list,
        }  # fmt: skip
        for name, kind in kinds.items():
            if not isinstance(self.facts.get(name), kind):
                raise files.unfit(directory, f"{name} is {self.facts.get(name)!r:.50}")
        settings: dict[str, Any] = self.facts["settings"]
        if unknown := set(settings) - _SETTINGS:
            raise files.unfit(directory, f"settings {sorted(map(str, unknown))}")
        if self.facts["dtype"] not in _DTYPES or not 0 < self.facts["rows"] <= _MOST_ROWS:
            raise files.unfit(
                directory, f"{self.facts['rows']} rows of {self.facts['dtype']!r:.20}"
            )

    @property
    def settings(self) -> dict[str, Any]:
        """Keyword arguments of the cache that was saved."""
        found: dict[str, Any] = dict(self.facts["settings"])
        if "dtype" in found:
            if found["dtype"] not in _DTYPES:
                raise files.unfit(self.directory, f"dtype {found['dtype']!r:.20}")
            found["dtype"] = _DTYPES[found["dtype"]]
        return found

    def fill(self, cache: "CompressedCache", device: Any) -> None:
        """Put into a new cache of its settings. CheckpointError where it does not fit."""
        layers = _layers(cache)
        if digest_of(cache.forms) != self.facts["form"] or len(layers) != len(self.facts["layers"]):
            raise files.unfit(self.directory, "its codes are of another form")
        known = [self._checked(index, layer) for index, layer in enumerate(layers)]
        if len({sum(told["tokens"]) for told, _ in known}) > 1:
            raise files.unfit(self.directory, "its layers hold different numbers of tokens")
        dtype, rows = _DTYPES[self.facts["dtype"]], self.facts["rows"]
        for index, (layer, (told, stores)) in enumerate(zip(layers, known, strict=True)):
            form = layer.form
            like = torch.empty(rows, form.heads, 0, form.width, dtype=dtype, device=device)
            layer.lazy_initialization(like, like)
            layer.starts, layer.frozen = list(told["starts"]), list(told["frozen"])
            assert layer.sinks is not None
            layer.sinks.copy_(self.tensors[f"{index}.sinks"])
            if layer.found_mean is not None:
                layer.found_mean.copy_(self.tensors[f"{index}.mean"])
            for store, content in zip(layer.stores, stores, strict=True):
                store.push(content.to(device))

    def _checked(self, index: int, layer: CompressedLayer) -> tuple[dict[str, Any], list[Tensor]]:
        """A layer's facts, and the rows of its tiers."""
        form, told, rows = layer.form, self.facts["layers"][index], self.facts["rows"]
        dtype, numbers = _DTYPES[self.facts["dtype"]], 2 * form.heads * form.width
        if not isinstance(told, dict):
            raise files.unfit(self.directory, f"layer {index} is a {type(told).__name__}")
        starts, frozen, tokens = (told.get(name, []) for name in ("starts", "frozen", "tokens"))
        whole = _counts(tokens, len(form.tiers)) and sum(tokens) <= _MOST_TOKENS
        if not whole or not _counts(starts, rows) or max(starts) > sum(tokens):
            raise files.unfit(self.directory, f"tokens and starts of layer {index}")
        if not isinstance(frozen, list) or [*map(type, frozen)] != [bool] * rows:
            raise files.unfit(self.directory, f"means of layer {index}")
        self._tensor(f"{index}.sinks", (rows, form.sinks, numbers), dtype)
        if form.centre:
            self._tensor(f"{index}.mean", (rows, form.heads, form.width), torch.float32)
        stores = []
        for place, (tier, count) in enumerate(zip(form.tiers, tokens, strict=True)):
            name = f"{index}.{place}"
            if tier.room is not None and count > tier.room:
                raise files.unfit(self.directory, f"{count} tokens in a tier of {tier.room}")
            if tier.code is None:
                stores.append(self._tensor(name, (rows, count, numbers), dtype))
            elif self.facts["entropy"]:
                stores.append(_inflated(self.tensors, name, tier.code, rows, count))
            else:
                shape = (rows, count, tier.code.row_bytes)
                stores.append(self._tensor(name, shape, torch.uint8))
        return told, stores

    def _tensor(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        found = self.tensors.get(name)
        if found is None or found.shape != shape or found.dtype != dtype:
            there = None if found is None else (tuple(found.shape), found.dtype)
            raise files.unfit(self.directory, f"{name} is {there}, not {(shape, dtype)}")
        if found.is_floating_point() and not bool(torch.isfinite(found).all()):
            raise files.unfit(self.directory, f"{name} holds NaN or infinity")
        return found


_SETTINGS = {
    "sinks", "seed", "budget", "context", "dtype", "key_bits", "value_bits", "window", "centre"
}  # fmt: skip
_MOST_ROWS, _MOST_TOKENS = 1 << 20, 1 << 40


def _counts(values: Any, length: int) -> bool:
    return (
        isinstance(values, list)
        and len(values) == length
        and all(type(value) is int and value >= 0 for value in values)
    )


def check_model(facts: dict[str, Any], model: nn.Module) -> None:
    """ConfigError where the prefix is of another model."""
    for name, given in (("shape", shape_of(text_config(model))), ("weights_of", weights_of(model))):
        if facts[name] != given:
            what = "another shape" if name == "shape" else "other weights"
            raise ConfigError(
                f"the prefix is of a model with {what}", expected="the model that read it"
            )


def _layers(cache: "CompressedCache") -> list[CompressedLayer]:
    if len(cache.compressed) != len(cache.layers):
        raise ConfigError(
            "a cache with sliding or linear layers to be saved",
            expected="one whose layers are all of full attention",
        )
    return cache.compressed


def _tensors(layer: CompressedLayer, entropy: bool) -> Iterator[tuple[str, Tensor]]:
    assert layer.sinks is not None
    if layer.fresh is not None:
        raise ConfigError(
            "a cache with tokens that may still be cropped to be saved",
            expected="crop(0), or a cropped cache",
        )
    yield "sinks", layer.sinks
    if layer.found_mean is not None:
        yield "mean", layer.found_mean
    for tier, store in enumerate(layer.stores):
        rows = torch.cat([store.rows[:, :0], *store.segments()], dim=1).cpu()
        code = layer.form.tiers[tier].code
        if entropy and code is not None:
            for name, x in _deflated(rows, code).items():
                yield f"{tier}.{name}", x
        else:
            yield f"{tier}", rows


# ---- entropy coding ----------------------------------------------------------------------------


def _deflated(rows: Tensor, code: RowCode) -> dict[str, Tensor]:
    """Rows (B, n, row bytes) -> streams of bytes: codes of each number of bits, and scales."""
    found = {}
    for bits, _, columns in code.places:
        codes = unpack(rows[:, :, columns.flatten()], bits, len(columns) * GROUP)
        found[f"{bits}"] = _squeezed(codes, zlib.Z_HUFFMAN_ONLY)
    scales = rows[:, :, code.row_bytes - 2 * code.heads * code.scale_bytes :]
    found["scales"] = _squeezed(scales, zlib.Z_DEFAULT_STRATEGY)
    return found


def _inflated(
    stored: dict[str, Tensor], name: str, code: RowCode, batch: int, count: int
) -> Tensor:  # fmt: skip
    """Back again. CheckpointError for streams that are not there or of another length."""
    rows = torch.empty(batch, count, code.row_bytes, dtype=torch.uint8)
    for bits, _, columns in code.places:
        shape = (batch, count, len(columns) * GROUP)
        rows[:, :, columns.flatten()] = pack(_spread(stored, f"{name}.{bits}", shape), bits)
    scales = 2 * code.heads * code.scale_bytes
    found = _spread(stored, f"{name}.scales", (batch, count, scales))
    rows[:, :, code.row_bytes - scales :] = found
    return rows


def _squeezed(values: Tensor, strategy: int) -> Tensor:
    press = zlib.compressobj(9, zlib.DEFLATED, -15, 9, strategy)
    content = values.contiguous().numpy().tobytes()
    return torch.frombuffer(bytearray(press.compress(content) + press.flush()), dtype=torch.uint8)


def _spread(stored: dict[str, Tensor], name: str, shape: tuple[int, int, int]) -> Tensor:
    length, stream = shape[0] * shape[1] * shape[2], stored.get(name)
    if stream is None or stream.dtype != torch.uint8 or stream.dim() != 1:
        raise CheckpointError(f"no stream of codes is called {name}", expected="one, of bytes")
    opened = zlib.decompressobj(-15)
    try:
        content = opened.decompress(stream.numpy().tobytes(), length + 1)
    except zlib.error as error:
        raise CheckpointError(f"a stream of codes cannot be read: {error}") from error
    if len(content) != length:
        raise CheckpointError(
            f"a stream of {len(content)} codes or more", expected=f"{length} codes"
        )
    if not length:
        return torch.empty(shape, dtype=torch.uint8)
    return torch.frombuffer(bytearray(content), dtype=torch.uint8).view(shape)
