"""How a context cache is written on the command line: `4/2`, `4700B`, `3.25bits`."""

import re
from typing import Any

from ..errors import ConfigError

_PLAIN = re.compile(r"(\d+)/(\d+)")


def check_cache(spec: str, *, calibration: str) -> None:
    """ConfigError for what is no cache, and for a calibration that would go unused."""
    if calibration and (not spec or _PLAIN.fullmatch(spec)):
        raise ConfigError(
            f"--calibration {calibration} without a budget",
            expected="--cache with bytes a token or bits a number, such as 3.25bits",
        )
    if spec and not (_PLAIN.fullmatch(spec) or re.fullmatch(r"[\d.]+ ?(B|kB|bits)", spec)):
        raise ConfigError(
            f"--cache {spec!r}",
            expected="bits of keys/values (4/2), bytes a token (4700B), or bits (3.25bits)",
        )


def settings_of(spec: str, *, calibration: Any, context: int) -> dict[str, Any]:
    """Keyword arguments of `CompressedCache`."""
    if found := _PLAIN.fullmatch(spec):
        return {"key_bits": int(found[1]), "value_bits": int(found[2])}
    return {"budget": spec, "context": context, "calibration": calibration}
