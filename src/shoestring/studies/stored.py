"""The result of a study on disk, which it goes on from."""

import json
import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from ..checkpoint import write_text
from ..errors import CheckpointError

RESULT = "result.json"


def begun(directory: Path, fresh: dict[str, Any], keys: Sequence[str]) -> dict[str, Any]:
    """The stored result, or `fresh`. CheckpointError for one that differs in one of the keys, or
    that cannot be read."""
    path = directory / RESULT
    if not path.exists():
        return fresh
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    for key in keys:
        if not isinstance(found, dict) or found.get(key) != fresh[key]:
            raise CheckpointError(
                f"{path} is of another {key}", expected="what this command would write",
                hint="Give another --directory, or remove that one.",
            )  # fmt: skip
    return found


def write(directory: Path, result: Mapping[str, Any]) -> None:
    """The result as it is now."""
    write_text(directory / RESULT, json.dumps(result, indent=1) + "\n")


def versions(packages: Sequence[str]) -> dict[str, str | None]:
    """Of Python and of what takes part; None for what is not installed."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in packages:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found
