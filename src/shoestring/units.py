"""Bytes and seconds, read from and written for people. No torch here."""

import re

from .errors import ConfigError

_UNITS = {
    "": 1,
    "b": 1,
    "k": 1000, "kb": 1000, "m": 1000**2, "mb": 1000**2, "g": 1000**3, "gb": 1000**3,
    "t": 1000**4, "tb": 1000**4,
    "kib": 1024, "mib": 1024**2, "gib": 1024**3, "tib": 1024**4,
}  # fmt: skip
_NUMBER = re.compile(r"\s*([0-9]+(?:[._][0-9]+)*(?:\.[0-9]+)?)\s*([a-zA-Z]*)\s*")
EXPECTED_BYTES = "a number of bytes with a unit, such as 300MiB, 6GiB or 1.5 GB"


def parse_bytes(text: str | int) -> int:
    """`"6 GiB"` -> 6442450944. Plain integers are bytes. ConfigError on anything else."""
    if isinstance(text, bool) or not isinstance(text, str | int):
        raise ConfigError(f"{text!r} is not an amount of memory", expected=EXPECTED_BYTES)
    if isinstance(text, int):
        value: float = text
    else:
        match = _NUMBER.fullmatch(text)
        unit = match[2].lower() if match else ""
        if not match or unit not in _UNITS:
            raise ConfigError(f"{text!r} is not an amount of memory", expected=EXPECTED_BYTES)
        try:
            value = float(match[1].replace("_", "")) * _UNITS[unit]
        except ValueError:
            raise ConfigError(
                f"{text!r} is not an amount of memory", expected=EXPECTED_BYTES
            ) from None
    if value <= 0:
        raise ConfigError(f"{text!r} is not a positive amount of memory", expected=EXPECTED_BYTES)
    return int(value)


def format_bytes(count: float) -> str:
    """`314572800` -> "300.0 MiB"."""
    sign, count = ("-", -count) if count < 0 else ("", count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{sign}{count:.0f} B" if unit == "B" else f"{sign}{count:.1f} {unit}"
        count /= 1024
    return f"{sign}{count:.1f} TiB"


def format_seconds(seconds: float) -> str:
    """`75` -> "1 min 15 s"."""
    if seconds < 0.1:
        return f"{seconds * 1000:.1f} ms"
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    hours, minutes = divmod(minutes, 60)
    if hours < 48:
        return f"{hours} h {minutes} min"
    return f"{hours / 24:.1f} days"
