"""Saved state that is whole or absent, verified, and never unpickled.

directory   a directory that appears in one step, every file in a manifest of checksums
manifest    that manifest: writing, reading with suspicion, verifying
tensors     safetensors files written tensor by tensor, hashed on the way
store       the checkpoints of a run: the newest that verifies wins, old ones go afterwards
lock        one process at a time in a run directory
held        files that one process holds at a time
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .directory import atomic_directory, newest_complete, write_bytes, write_text
from .lock import Lock
from .manifest import MANIFEST, read_manifest, verify

if TYPE_CHECKING:
    from .store import Checkpoint, Store

__all__ = [
    "MANIFEST",
    "Checkpoint",
    "Lock",
    "Store",
    "atomic_directory",
    "newest_complete",
    "read_manifest",
    "verify",
    "write_bytes",
    "write_text",
]


def __getattr__(name: str) -> Any:
    # Tensors need torch, whose import takes seconds; who writes a page does not.
    if name in ("Checkpoint", "Store"):
        return getattr(import_module(".store", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
