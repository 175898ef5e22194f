"""The checkpoints of a run, `checkpoints/step-N`: the newest that verifies wins.

A checkpoint is a directory of safetensors and JSON files under `atomic_directory`'s protocol.
Older ones go only after a new one is complete; one that turns out damaged is passed over, and
what was wrong with it is told.
"""

import json
import logging
import re
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from ..errors import CheckpointError
from .directory import atomic_directory
from .manifest import verify
from .tensors import InParts, read_tensors, write_tensors

log = logging.getLogger(__name__)
_NAME = re.compile(r"step-(\d{1,15})")
_OLD = re.compile(r"\.step-(\d{1,15})\.old")
_UNFINISHED = re.compile(r"\.step-\d{1,15}\.new-.+")
_LARGEST_JSON = 64 << 20


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A verified checkpoint on disk."""

    path: Path
    step: int

    def json(self, name: str) -> Any:
        """The content of one of its JSON files."""
        path = self.path / name
        try:
            if path.stat().st_size > _LARGEST_JSON:
                raise ValueError(f"{path.stat().st_size} bytes")
            return json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise CheckpointError(f"{path} cannot be read: {error}") from error

    def text(self, name: str) -> str:
        """The content of one of its text files."""
        try:
            return (self.path / name).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise CheckpointError(f"{self.path / name} cannot be read: {error}") from error

    def tensors(self, name: str) -> Iterator[tuple[str, Tensor]]:
        """Name and tensor of one of its safetensors files."""
        return read_tensors(self.path / name)


class Store:
    """The checkpoints below a directory. keep: how many to keep."""

    def __init__(self, directory: Path, *, keep: int = 2) -> None:
        assert keep >= 1
        self.directory, self.keep = directory, keep

    def save(
        self,
        step: int,
        *,
        tensors: Mapping[str, Mapping[str, Tensor | InParts]],
        texts: Mapping[str, str],
    ) -> Path:
        """Write the checkpoint of a step, then let older ones go. CheckpointError when it cannot
        be written; what there was is then untouched.

        tensors: file name -> tensors by name.  texts: file name -> content.
        """
        final = self.directory / f"step-{step}"
        known: dict[str, str] = {}
        with atomic_directory(final, known) as temporary:
            for name, text in texts.items():
                (temporary / name).write_text(text, encoding="utf-8", newline="\n")
            for name, content in tensors.items():
                known[name] = write_tensors(temporary / name, content)
        self._rotate(step)
        return final

    def newest(self) -> tuple[Checkpoint | None, list[str]]:
        """(the newest checkpoint that verifies, what was wrong with those passed over)."""
        wrong: list[str] = []
        for step, path in self._found():
            try:
                if verify(path):
                    return Checkpoint(path, step), wrong
                wrong.append(f"{path.name} has no manifest")
            except CheckpointError as error:
                if "newer Shoestring" in (error.hint or ""):
                    raise
                wrong.append(str(error))
        return None, wrong

    def set_aside(self, newer_than: int) -> None:
        """Rename the damaged checkpoints after a step, so that no rotation takes them for good."""
        for step, path in self._found():
            if step > newer_than:
                target = path.with_name(f"damaged-{path.name.lstrip('.')}")
                shutil.rmtree(target, ignore_errors=True)
                try:
                    path.rename(target)
                except OSError as error:
                    log.warning("%s cannot be renamed: %s", path, error)

    def sweep(self) -> None:
        """Remove what killed writers left unfinished. Only for who holds the run's lock: to
        anybody else it could be what a living writer is at."""
        if not self.directory.is_dir():
            return
        for path in self.directory.iterdir():
            if _UNFINISHED.fullmatch(path.name):
                shutil.rmtree(path, ignore_errors=True)

    def _rotate(self, newest: int) -> None:
        found = [(step, path) for step, path in self._found() if step <= newest]
        for _, path in found[self.keep :]:
            shutil.rmtree(path, ignore_errors=True)

    def _found(self) -> list[tuple[int, Path]]:
        """Step and path of all of them, newest first."""
        if not self.directory.is_dir():
            return []
        found = []
        for path in self.directory.iterdir():
            # A crash between the two renames of a replacement leaves the old content aside.
            match = _NAME.fullmatch(path.name) or _OLD.fullmatch(path.name)
            if match and path.is_dir() and not path.is_symlink():
                found.append((int(match[1]), not path.name.startswith("."), path))
        return [(step, path) for step, _, path in sorted(found, reverse=True)]
