"""The trained model as a Hugging Face directory: weights, tokenizer, card, receipt, checksums.

Written whole or not at all (`checkpoint.atomic_directory`). Weights are safetensors, never
pickled; whoever has transformers can load a model of an ordinary architecture from it.
"""

import contextlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import Tensor, nn
from transformers.utils import logging

from ..checkpoint import atomic_directory
from ..checkpoint.directory import make_directory, unwritable
from ..checkpoint.tensors import read_tensors, write_tensors
from ..errors import CheckpointError, StackError
from ..objectives.scaffolding import taken_out
from ..units import format_bytes
from .distributed import World
from .sharding import Spread, finish
from .snapshot import writable_weights


def save_model(
    model: Any,
    tokenizer: Any,
    directory: Path,
    receipt: Mapping[str, Any],
    *,
    world: World | None = None,
) -> None:
    """Write `directory`, replacing what is there in one step. CheckpointError when it cannot be.

    model: has `save_pretrained`; tokenizer: likewise, or None; receipt: of the run, which goes in
    as receipt.json and as the model card.  world: all of its processes have to take part; the
    first one writes.
    """
    if world is not None and world.shards:
        with gathered(model, directory.with_name(f".{directory.name}.weights"), world) as weights:
            if weights is not None:
                _save(model, tokenizer, directory, receipt, state_dict=weights)
    elif world is None or world.is_first:
        _save(model, tokenizer, directory, receipt)


@contextlib.contextmanager
def gathered(model: nn.Module, file: Path, world: World) -> Iterator[dict[str, Tensor] | None]:
    """The whole weights of a divided model, on the first process, mapped from a file that is
    removed afterwards: they are never in memory all at once. None on the others."""
    weights, aliases = writable_weights(model)
    try:
        try:
            if world.is_first:
                make_directory(file.parent)
                write_tensors(file, weights)
        except CheckpointError:
            raise
        except OSError as error:
            raise unwritable(file, error) from error
        finally:
            finish([each for each in weights.values() if isinstance(each, Spread)])
        if not world.is_first:
            yield None
            return
        whole = dict(read_tensors(file))
        # In the order of the model's own: the file has its tensors in another.
        yield {name: whole[aliases.get(name, name)] for name in model.state_dict()}
    finally:
        if world.is_first:
            file.unlink(missing_ok=True)


def _save(
    model: Any, tokenizer: Any, directory: Path, receipt: Mapping[str, Any], **settings: Any
) -> None:
    if not hasattr(model, "save_pretrained"):
        raise StackError(
            f"{type(model).__name__} cannot be saved as a Hugging Face directory",
            expected="a transformers.PreTrainedModel, which has save_pretrained",
        )
    with atomic_directory(directory) as temporary, no_progress_bar(), taken_out(model):
        try:
            model.save_pretrained(temporary, **settings)
        except SafetensorError as error:
            # It wraps what the system said: "I/O error: No space left on device (os error 28)".
            raise CheckpointError(
                f"Cannot write {directory}: {error}", hint="Free some space, or check the disk."
            ) from error
        if tokenizer is not None:
            tokenizer.save_pretrained(temporary)
        (temporary / "README.md").write_text(model_card(receipt), encoding="utf-8")
        (temporary / "receipt.json").write_text(receipt_text(receipt), encoding="utf-8")


def receipt_text(receipt: Mapping[str, Any]) -> str:
    """A receipt as it stands in a file."""
    return json.dumps(receipt, indent=1) + "\n"


@contextlib.contextmanager
def no_progress_bar() -> Iterator[None]:
    """transformers draws one while reading and writing, over whatever is on the terminal."""
    was_enabled = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if was_enabled:
            logging.enable_progress_bar()


def model_card(receipt: Mapping[str, Any]) -> str:
    """The README.md of a model, out of its run's receipt."""
    memory, quality = receipt["memory"], receipt["quality"]
    lines = [
        "---",
        "library_name: transformers",
        "pipeline_tag: text-generation",
        "tags: [shoestring]",
        "---",
        f"# {receipt['model']['name']}",
        "",
        f"Trained by Shoestring {receipt['versions']['shoestring']} on {receipt['data']['source']}"
        f" for {receipt['steps']} updates ({receipt['status']}), seed {receipt['seed']}.",
        "",
        "| | |",
        "|---|---|",
        f"| parameters | {receipt['model']['parameters']:,} |",
        f"| stream rule | {receipt['model']['rule']} |",
        f"| budget | {_bytes(memory['budget_bytes'])} |",
        f"| peak promised | {_bytes(memory['promised_bytes'])} |",
        f"| peak measured | {_bytes(memory['measured_bytes'])} |",
        f"| held-out loss before | {_loss(quality['before'])} |",
        f"| held-out loss after | {_loss(quality['after'])} |",
        "",
        "Load it with `shoestring.load(directory)`. `manifest.json` holds a checksum of every"
        " file.",
    ]
    return "\n".join(lines) + "\n"


def _bytes(count: int | None) -> str:
    return "none" if count is None else format_bytes(count)


def _loss(measured: Mapping[str, float] | None) -> str:
    if measured is None:
        return "not measured"
    return f"{measured['nats_per_token']:.4f} nats/token, {measured['bits_per_byte']:.4f} bits/byte"
