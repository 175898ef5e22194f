"""Rows that become documents: JSON lines, Parquet, Hugging Face datasets.

A row is plain text (`text`, or the field that was chosen) or a conversation (`messages`: a list
of {"role", "content"}). Rows are read one at a time; an error names the file and the row.
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from ..errors import DataError, closest
from .documents import Document, Message, Source, content_key
from .text import check_head, decode

TEXT, CHAT = "text", "messages"


def read_jsonl(path: Path, field: str = TEXT) -> Iterator[Document]:
    """One JSON object a line; blank lines are passed over. DataError names the line."""
    check_head(path)
    offset = 0
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            where = f"{path}, line {number}"
            text = decode(line, path, offset)
            offset += len(line)
            if number == 1:
                text = text.removeprefix("\ufeff")  # a byte order mark is not part of the JSON
            if text.strip():
                yield from _document(_parse(text, where), field, where)


def _parse(text: str, where: str) -> Mapping[str, Any]:
    expected = 'one JSON object a line, such as {"text": "..."}'
    try:
        row = json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(
            f"{where} is not JSON ({error.msg} at column {error.colno})",
            expected=expected,
            hint="A JSON array has to be written as one object a line (.jsonl).",
        ) from None
    if not isinstance(row, dict):
        raise DataError(
            f"{where} is a JSON {type(row).__name__}, not an object",
            expected=expected,
            hint="A JSON array has to be written as one object a line (.jsonl).",
        )
    return row


def read_parquet(path: Path, field: str = TEXT) -> Iterator[Document]:
    """Rows of a Parquet file, read in groups. Needs pyarrow (extra `data`)."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise DataError(
            f"{path} is a Parquet file and pyarrow is not installed",
            expected="the extra 'data'",
            hint="pip install 'shoestring[data]'",
        ) from None
    try:
        file = pyarrow.parquet.ParquetFile(path)
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(
            f"{path} cannot be read as Parquet ({error})",
            expected="a complete Parquet file",
            hint="Fetch or write the file again.",
        ) from error
    with file:
        names = file.schema_arrow.names
        column = _choose(names, field, str(path))
        number = 0
        for group in file.iter_batches(columns=[column], batch_size=1024):
            for row in group.to_pylist():
                number += 1
                yield from _document(row, column, f"{path}, row {number}")


def hub_source(spec: str, field: str = TEXT) -> Source:
    """`hf:NAME[:config][:split]`; the split is `train` unless named. Needs the extra `datasets`.

    With one part after the name it is the configuration: `hf:NAME::validation` names a split
    of the default configuration. Downloads unless the data set is in the local cache.
    """
    name, config, split = _hub_parts(spec)

    def read() -> Iterator[Document]:
        data = _load_hub(spec, name, config, split)
        column = _choose(data.column_names, field, spec)
        for number, row in enumerate(data.select_columns([column]), 1):
            yield from _document(row, column, f"{spec}, row {number}")

    return Source(spec, read)


def _hub_parts(spec: str) -> tuple[str, str | None, str]:
    parts = spec.removeprefix("hf:").split(":")
    if not parts[0] or len(parts) > 3:
        raise DataError(
            f"{spec!r} does not name a Hugging Face data set",
            expected="hf:NAME, hf:NAME:config or hf:NAME:config:split",
            hint="For a split of the default configuration write hf:NAME::split.",
        )
    name, config, split = (*parts, "", "")[:3]
    return name, config or None, split or "train"


def _load_hub(spec: str, name: str, config: str | None, split: str) -> Any:
    try:
        import datasets
    except ImportError:
        raise DataError(
            f"{spec} needs the library 'datasets', which is not installed",
            expected="the extra 'datasets'",
            hint="pip install 'shoestring[datasets]'",
        ) from None
    try:
        return datasets.load_dataset(name, config, split=split)
    # What is raised depends on the transport (requests, httpx, a cache on disk): all of it means
    # that this data set cannot be had, and the cause stays chained.
    except Exception as error:
        cause = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(
            f"the data set {spec} cannot be loaded ({type(error).__name__}: {cause})",
            expected=f"a data set with configuration {config or 'default'} and split {split!r}",
            hint="Check its name and the network; offline, it has to be in the local cache.",
        ) from error


def _choose(names: Iterable[str], field: str, where: str) -> str:
    """The field to read: the chosen one; `messages` where the default, `text`, is not there."""
    names = list(names)
    for candidate in (TEXT, CHAT) if field == TEXT else (field,):
        if candidate in names:
            return candidate
    wanted = f"{TEXT!r} or {CHAT!r}" if field == TEXT else repr(field)
    near = closest(field, names)
    raise DataError(
        f"{where} has no field {wanted}",
        expected=f"one of the fields it has: {', '.join(map(repr, names)) or 'none'}",
        hint=near or "Choose one of them by its name.",
    )


def _document(row: Mapping[str, Any], field: str, where: str) -> Iterator[Document]:
    """The row as a document; nothing for an empty text."""
    field = _choose(row, field, where)
    value = row[field]
    if field == CHAT or (isinstance(value, list) and value and isinstance(value[0], dict)):
        document = Document(where, messages=_messages(value, field, where))
    elif isinstance(value, str):
        document = Document(where, value)
    else:
        raise DataError(
            f"{where}: the field {field!r} is {_kind(value)}",
            expected="text, or a list of messages",
            hint="Remove the row or give it text.",
        )
    content = document.content()
    if content:
        yield Document(where, document.text, document.messages, content_key(content))


def _messages(value: Any, field: str, where: str) -> tuple[Message, ...]:
    good = isinstance(value, list) and value and all(map(_is_message, value))
    if not good:
        raise DataError(
            f"{where}: the field {field!r} is not a conversation",
            expected='a list of {"role": ..., "content": ...}',
            hint="Every message needs a role (such as user or assistant) and its content as text.",
        )
    if not any(message["role"] == "assistant" for message in value):
        raise DataError(
            f"{where}: the conversation has no message of the assistant",
            expected="at least one answer, since only answers are learned",
            hint="Remove the row or add the answer.",
        )
    return tuple(value)


def _is_message(message: Any) -> bool:
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        return False
    return isinstance(message.get("content"), str) or bool(message.get("tool_calls"))


def _kind(value: Any) -> str:
    return "null" if value is None else f"a {type(value).__name__}"
