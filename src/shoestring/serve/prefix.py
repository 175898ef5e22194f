"""A context that was read once, kept on disk and taken up again: the same codes, bit for bit.

Codes are stored as they are, or entropy-coded: of each number of bits, the codes of all groups as
one stream of Huffman codes (deflate without its search for repetitions). Levels of a normal law are
not equally likely, which is what that saves: 5 to 6 % at 2 to 4 bits. Scales are deflated as bytes.
"""

import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..checkpoint import atomic_directory, verify
from ..checkpoint.tensors import read_tensors, write_tensors
from ..errors import CheckpointError, ConfigError
from ..ops.bit_pack import pack, unpack
from ..ops.row_code import GROUP, RowCode
from .config import text_config
from .identity import shape_of, weights_of
from .layer import CompressedLayer

if TYPE_CHECKING:
    from .cache import CompressedCache

FORMAT = 1
_FILES = ("prefix.json", "prefix.safetensors")
_DTYPES = {str(x): x for x in (torch.float32, torch.float16, torch.bfloat16, torch.float64)}


def save(
    cache: "CompressedCache", model: nn.Module, directory: str | Path, *, entropy: bool
) -> None:
    """A directory that appears whole or not, with checksums. ConfigError for a cache that is empty
    or has layers that are not ours."""
    layers = _layers(cache)
    if not all(layer.is_initialized for layer in layers):
        raise ConfigError("an empty cache to be saved", expected="one that has read something")
    first = layers[0]
    facts = {
        "format": FORMAT, "settings": cache.settings, "entropy": entropy,
        "shape": shape_of(text_config(model)), "weights_of": weights_of(model),
        "calibration": cache.calibrated_on, "rows": len(first.starts), "dtype": str(first.dtype),
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


def read_facts(directory: str | Path) -> dict[str, Any]:
    """What is kept, verified. CheckpointError for what is not there, not whole, or not ours."""
    directory = Path(directory)
    if not (directory / _FILES[0]).is_file() or not verify(directory):
        raise CheckpointError(
            f"{directory} holds no prefix", expected="a directory that CompressedCache.save wrote"
        )
    facts: dict[str, Any] = json.loads((directory / _FILES[0]).read_text())
    if facts.get("format") != FORMAT:
        raise CheckpointError(
            f"{directory} is a prefix of format {facts.get('format')}", expected=str(FORMAT)
        )
    return facts


def check_model(facts: dict[str, Any], model: nn.Module) -> None:
    """ConfigError where the prefix is of another model."""
    for name, given in (("shape", shape_of(text_config(model))), ("weights_of", weights_of(model))):
        if facts[name] != given:
            what = "another shape" if name == "shape" else "other weights"
            raise ConfigError(
                f"the prefix is of a model with {what}", expected="the model that read it"
            )


def fill(
    cache: "CompressedCache", facts: dict[str, Any], directory: str | Path, device: Any
) -> None:
    """What is kept, put into a new cache of the form. CheckpointError where it does not fit."""
    layers, dtype = _layers(cache), _DTYPES[facts["dtype"]]
    tensors = dict(read_tensors(Path(directory) / _FILES[1]))
    if len(layers) != len(facts["layers"]):
        raise CheckpointError(
            f"{directory} has {len(facts['layers'])} layers", expected=str(len(layers))
        )
    for index, (layer, told) in enumerate(zip(layers, facts["layers"], strict=True)):
        form = layer.form
        like = torch.empty(
            facts["rows"], form.heads, 0, form.width, dtype=dtype, device=device
        )  # fmt: skip
        layer.lazy_initialization(like, like)
        layer.starts, layer.frozen = told["starts"], told["frozen"]
        assert layer.sinks is not None
        layer.sinks.copy_(tensors[f"{index}.sinks"])
        if layer.found_mean is not None:
            layer.found_mean.copy_(tensors[f"{index}.mean"])
        for tier, (store, count) in enumerate(zip(layer.stores, told["tokens"], strict=True)):
            code = form.tiers[tier].code
            if facts["entropy"] and code is not None:
                stored = {
                    name.rpartition(".")[2]: x
                    for name, x in tensors.items()
                    if name.startswith(f"{index}.{tier}.")
                }
                rows = _inflated(stored, code, facts["rows"], count)
            else:
                rows = tensors[f"{index}.{tier}"]
            store.push(rows.to(device))


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


def _inflated(stored: dict[str, Tensor], code: RowCode, batch: int, count: int) -> Tensor:
    """Back again. CheckpointError for streams of another length."""
    rows = torch.empty(batch, count, code.row_bytes, dtype=torch.uint8)
    for bits, _, columns in code.places:
        codes = _spread(stored[f"{bits}"], (batch, count, len(columns) * GROUP))
        rows[:, :, columns.flatten()] = pack(codes, bits)
    scales = 2 * code.heads * code.scale_bytes
    rows[:, :, code.row_bytes - scales :] = _spread(stored["scales"], (batch, count, scales))
    return rows


def _squeezed(values: Tensor, strategy: int) -> Tensor:
    press = zlib.compressobj(9, zlib.DEFLATED, -15, 9, strategy)
    content = values.contiguous().numpy().tobytes()
    return torch.frombuffer(bytearray(press.compress(content) + press.flush()), dtype=torch.uint8)


def _spread(stored: Tensor, shape: tuple[int, int, int]) -> Tensor:
    length = shape[0] * shape[1] * shape[2]
    opened = zlib.decompressobj(-15)
    try:
        content = opened.decompress(stored.numpy().tobytes(), length + 1)
    except zlib.error as error:
        raise CheckpointError(f"a stream of codes cannot be read: {error}") from error
    if len(content) != length:
        raise CheckpointError(
            f"a stream of {len(content)} codes or more", expected=f"{length} codes"
        )
    if not length:
        return torch.empty(shape, dtype=torch.uint8)
    return torch.frombuffer(bytearray(content), dtype=torch.uint8).view(shape)
