"""A tree of dataclasses read from and written as TOML; no torch here.

Reading is strict, because a misspelt key that is ignored trains the wrong network: unknown keys
name the nearest known one, and no type is converted silently except a whole number where a
fraction is wanted. Writing covers what such trees hold (tables, strings, numbers, booleans and
lists of them); a field that is None is left out, and reading gives None back.
"""

import json
import tomllib
import types
import typing
from dataclasses import fields, is_dataclass
from pathlib import Path

from ..errors import ConfigError, closest

T = typing.TypeVar("T")
_WORDS = {str: "a string", int: "a whole number", float: "a number", bool: "true or false"}


def read(path: Path, kind: type[T]) -> T:
    """The TOML file at `path` as `kind`. ConfigError names file, key and what was wanted."""
    try:
        text = path.read_bytes().decode("utf-8")
    except FileNotFoundError:
        raise ConfigError(f"{path} does not exist", expected="a TOML file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read: {error}", expected="a TOML file") from None
    try:
        return from_table(tomllib.loads(text), kind)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path} is not TOML: {error}") from None
    except ConfigError as error:
        raise ConfigError(
            f"{path}: {error.what}", expected=error.expected, hint=error.hint
        ) from None


def refuse(path: Path, table: str, what: str, hint: str) -> None:
    """ConfigError for a file that has this table; one that cannot be read is left to `read`."""
    try:
        has_it = table in tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return
    if has_it:
        raise ConfigError(f"{path} {what}", expected=f"a run without [{table}]", hint=hint)


def from_table(table: dict[str, object], kind: type[T], prefix: str = "") -> T:
    """A dataclass out of a parsed table; `prefix` is the dotted path so far, for messages."""
    hints = typing.get_type_hints(kind)
    values = {}
    for key, value in table.items():
        name = prefix + key
        if key not in hints:
            known = [prefix + other for other in hints]
            # by the key alone, or the shared prefix would make everything look near
            hint = closest(name, known) if closest(key, hints) else None
            raise ConfigError(
                f"unknown setting {name}",
                expected=None if hint else f"one of {', '.join(known)}",
                hint=hint,
            )
        values[key] = _convert(value, hints[key], name)
    return kind(**values)


def _convert(value: object, hint: typing.Any, name: str) -> object:
    if is_dataclass(hint) and isinstance(hint, type):
        if not isinstance(value, dict):
            raise ConfigError(f"{name} = {value!r} is not a table", expected=f"a table [{name}]")
        return from_table(value, hint, f"{name}.")
    origin, choices = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Literal:
        if value in choices and isinstance(value, str):
            return value
        near = closest(value, choices) if isinstance(value, str) else None
        raise _mismatch(name, value, f"one of {', '.join(choices)}", near)
    if origin is types.UnionType:  # the only union here is "X | None", and TOML has no None
        return _convert(value, next(c for c in choices if c is not types.NoneType), name)
    if origin is tuple:
        return _convert_list(value, choices, name)
    if hint is float and type(value) is int:
        return float(value)
    if type(value) is not hint:  # not isinstance: a bool is an int to Python, but not to a reader
        raise _mismatch(name, value, _WORDS[hint])
    return value


def _convert_list(value: object, choices: tuple[typing.Any, ...], name: str) -> tuple[object, ...]:
    word = f"a list of {_WORDS[choices[0]].split(maxsplit=1)[1]}s"
    if not isinstance(value, list):
        raise _mismatch(name, value, word)
    if choices[-1] is not Ellipsis and len(value) != len(choices):
        raise _mismatch(name, value, f"{word}, {len(choices)} long")
    return tuple(_convert(item, choices[0], f"{name}[{i}]") for i, item in enumerate(value))


def _mismatch(name: str, value: object, expected: str, hint: str | None = None) -> ConfigError:
    return ConfigError(f"{name} = {value!r} cannot be used", expected=expected, hint=hint)


def write(settings: object) -> str:
    """The tree as TOML text; `from_table(tomllib.loads(text), type(settings))` gives it back."""
    assert is_dataclass(settings)
    lines: list[str] = []
    for entry in fields(settings):
        value = getattr(settings, entry.name)
        if is_dataclass(value):
            lines += ["", f"[{entry.name}]", write(value).strip()]
        elif value is not None:
            lines.append(f"{entry.name} = {_format(value)}")
    return "\n".join(lines).strip() + "\n"


def _format(value: object) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        # JSON escapes as TOML does, but for DEL, and for pairs of surrogates in its ASCII form
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, tuple):
        return "[" + ", ".join(_format(item) for item in value) + "]"
    return repr(value)  # int, and float as the shortest text that reads back to the same bits
