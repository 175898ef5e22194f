"""A source as one long row of token ids on disk.

    end, document 1, end, document 2, end, ...        (text)
    conversation 1, conversation 2, ...               (chat, with a mark for every answer token)

The ids are raw little-endian integers (2 bytes each up to 65,536 tokens, else 4), mapped into
memory and never loaded whole; the entry's name is the hash of the text and the tokenizer, so a
changed file or tokenizer can never meet old ids. The row begins with an end mark so that every
byte of the text is predicted by something and bits per byte need no correction.
"""

import hashlib
import json
import logging
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from ..errors import DataError
from .cache import default_cache, entry_name, new_entry
from .chat import encode_chat
from .documents import Document, Source
from .tokenizer import Encoder, end_id, text_encoder, tokenizer_digest

FORMAT = "1"
_BATCH_CHARS = 1 << 20  # what is encoded at once: bounds the Python integers that live at a time
_IDS, _ANSWERS, _BOUNDS, _FACTS = "ids.bin", "answers.bin", "bounds.bin", "corpus.json"

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, eq=False)
class Corpus:
    """Encoded documents; see the top of this file."""

    digest: str
    """Hash of the text and the tokenizer."""
    ids: np.ndarray
    """(N,) uint16 or uint32, mapped from disk."""
    answers: np.ndarray | None
    """(N,) uint8, 1 where a token belongs to an answer; None for plain text."""
    bounds: np.ndarray
    """(D + 1,) int64: document d ends before bounds[d + 1]."""
    end: int
    """The id of the end-of-text token."""
    num_bytes: int
    """UTF-8 bytes of the text (of the answers, for chat)."""

    @property
    def is_chat(self) -> bool:
        """Whether only answers are targets."""
        return self.answers is not None

    @property
    def num_documents(self) -> int:
        """How many documents there are."""
        return len(self.bounds) - 1

    @property
    def num_tokens(self) -> int:
        """How many ids there are, end marks included."""
        return len(self.ids)


def encode(
    source: Source,
    tokenizer: Any,
    *,
    cache: str | Path | None = None,
    progress: Callable[[int], None] | None = None,
) -> Corpus:
    """The source in the tokenizer's ids, from the cache where it was encoded before.

    progress: told the UTF-8 bytes encoded so far.  DataError on whatever is wrong with the data.
    """
    digest = entry_name(FORMAT, source.digest(), tokenizer_digest(tokenizer))
    directory = Path(cache or default_cache(), "tokens", digest)
    corpus = _open(directory)
    if corpus is None:
        with new_entry(directory) as temporary:
            _write(source, tokenizer, temporary, progress)
        corpus = _open(directory)
    if corpus is None:
        raise DataError(
            f"the cache entry {directory} does not hold what was just written",
            expected="a disk that keeps files",
            hint="Set the environment variable SHOESTRING_CACHE to a folder on another disk.",
        )
    return corpus


class _Writer:
    """The files of one entry, hashed while they are written."""

    def __init__(self, directory: Path, dtype: np.dtype) -> None:
        self.dtype = dtype
        self.bounds: list[int] = []
        self.num_tokens = self.num_bytes = 0
        self._files: dict[str, tuple[BinaryIO, Any]] = {}
        self._directory = directory

    def add(self, name: str, values: np.ndarray) -> None:
        if name not in self._files:
            self._files[name] = ((self._directory / name).open("wb"), hashlib.blake2b())
        file, digest = self._files[name]
        content = values.tobytes()
        file.write(content)
        digest.update(content)

    def add_ids(self, ids: Any) -> None:
        values = np.asarray(ids, dtype=self.dtype)
        self.num_tokens += len(values)
        self.add(_IDS, values)

    def close(self, **facts: Any) -> None:
        self.add(_BOUNDS, np.asarray(self.bounds, dtype="<i8"))
        facts |= {"dtype": self.dtype.str, "bytes": self.num_bytes, "tokens": self.num_tokens}
        facts["blake2b"] = {name: digest.hexdigest() for name, (_, digest) in self._files.items()}
        (self._directory / _FACTS).write_text(json.dumps(facts, indent=1))
        self.release()

    def release(self) -> None:
        for file, _ in self._files.values():
            file.close()


def _write(
    source: Source, tokenizer: Any, directory: Path, progress: Callable[[int], None] | None
) -> None:
    end = end_id(tokenizer)
    highest = max(tokenizer.get_vocab().values())
    writer = _Writer(directory, np.dtype("<u2" if highest < 1 << 16 else "<u4"))
    try:
        is_chat = next(iter(source)).messages is not None
        encode_texts = text_encoder(tokenizer)
        if not is_chat:
            writer.add_ids([end])
        writer.bounds.append(writer.num_tokens)
        for documents in _batches(source, is_chat):
            if is_chat:
                _write_chats(documents, tokenizer, writer)
            else:
                _write_texts(documents, encode_texts, writer, end)
            if progress:
                progress(writer.num_bytes)
        writer.close(source=source.name, end=end, is_chat=is_chat)
    finally:
        writer.release()


def _batches(source: Source, is_chat: bool) -> Iterator[list[Document]]:
    batch: list[Document] = []
    chars = 0
    for document in source:
        if (document.messages is not None) is not is_chat:
            raise DataError(
                f"{document.name} is {'plain text' if is_chat else 'a conversation'}, unlike the "
                f"documents before it in {source.name}",
                expected="either plain text or conversations",
                hint="Train on them one after the other.",
            )
        batch.append(document)
        chars += len(document.text) if not is_chat else len(document.content())
        if chars >= _BATCH_CHARS:
            yield batch
            batch, chars = [], 0
    if batch:
        yield batch


def _write_texts(
    documents: list[Document], encode_texts: Encoder, writer: _Writer, end: int
) -> None:
    encoded = encode_texts([document.text for document in documents])
    for document, ids in zip(documents, encoded, strict=True):
        writer.add_ids(ids)
        writer.num_bytes += len(document.text.encode())
        if document.ends:
            writer.add_ids([end])
            writer.bounds.append(writer.num_tokens)


def _write_chats(documents: list[Document], tokenizer: Any, writer: _Writer) -> None:
    for document in documents:
        ids, answers = encode_chat(document, tokenizer)
        writer.add_ids(ids)
        writer.add(_ANSWERS, answers.astype(np.uint8))
        writer.num_bytes += len(tokenizer.decode(ids[answers].tolist()).encode())
        writer.bounds.append(writer.num_tokens)


def _open(directory: Path) -> Corpus | None:
    """The entry, or None when there is none; a damaged one is removed, to be made again."""
    if not directory.exists():
        return None
    try:
        facts = json.loads((directory / _FACTS).read_text())
        names = list(facts["blake2b"])
        damaged = [n for n in names if _digest(directory / n) != facts["blake2b"][n]]
        if damaged:
            raise ValueError(f"{damaged[0]} is not what was written")
        return _map(directory, facts)
    except (OSError, ValueError, KeyError, TypeError) as error:
        logger.warning("the cache entry %s is damaged (%s); encoding again", directory, error)
        shutil.rmtree(directory)
        return None


def _map(directory: Path, facts: dict[str, Any]) -> Corpus:
    def load(name: str, dtype: str) -> np.ndarray:
        return np.memmap(directory / name, dtype=dtype, mode="r")

    return Corpus(
        digest=directory.name,
        ids=load(_IDS, facts["dtype"]),
        answers=load(_ANSWERS, "u1") if facts["is_chat"] else None,
        bounds=load(_BOUNDS, "<i8"),
        end=facts["end"],
        num_bytes=facts["bytes"],
    )


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, hashlib.blake2b).hexdigest()
