"""Directories that hold a calibration or a prefix: what may be replaced, and what was read back."""

import json
from pathlib import Path
from typing import Any

from ..checkpoint import verify
from ..checkpoint.tensors import read_tensors
from ..errors import CheckpointError, ConfigError

LARGEST_FACTS = 64 << 20
"""Bytes of a JSON file that is read."""


def check_target(directory: str | Path, own: str) -> None:
    """ConfigError where writing would delete something that is not a former one of ours, which a
    file called `own` tells."""
    path = Path(directory)
    if not path.exists():
        return
    if path.is_dir() and ((path / own).is_file() or not any(path.iterdir())):
        return
    raise ConfigError(
        f"{path} is there, and is not what would be replaced",
        expected="a new or an empty directory, or a former one of the kind",
        hint="Give another directory.",
    )


def read(
    directory: str | Path, names: tuple[str, str], what: str, format_: int
) -> tuple[dict[str, Any], dict[str, Any]]:  # fmt: skip
    """Facts and tensors of a verified directory. CheckpointError for what is not there, not whole,
    or not of the kind."""
    path = Path(directory)
    if not (path / names[0]).is_file() or not verify(path):
        raise CheckpointError(f"{path} holds no {what}", expected=f"a directory with a {what}")
    if (path / names[0]).stat().st_size > LARGEST_FACTS:
        raise CheckpointError(f"{path / names[0]} is too large", expected="at most 64 MiB")
    try:
        facts = json.loads((path / names[0]).read_text())
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path / names[0]} cannot be read: {error}") from error
    if not isinstance(facts, dict) or facts.get("format") != format_:
        told = facts.get("format") if isinstance(facts, dict) else type(facts).__name__
        raise CheckpointError(
            f"{path} is a {what} of format {told}", expected=str(format_), hint="Make it again."
        )
    return facts, dict(read_tensors(path / names[1]))


def unfit(directory: str | Path, what: str) -> CheckpointError:
    """For contents that cannot be what was written."""
    return CheckpointError(
        f"{directory}: {what}", expected="what this version writes", hint="Make it again."
    )
