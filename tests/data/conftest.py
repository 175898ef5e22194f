"""Small sources and tokenizers that several tests of the data side share."""

import json
import random
from pathlib import Path

import pytest

from shoestring.data import load_tokenizer, open_source, train_tokenizer

WORDS = "the cat sat on a mat and dog ran far from old red house by sea while rain fell".split()


def write_jsonl(path: Path, rows: list) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def sentences(count: int, seed: int = 0) -> list[str]:
    draw = random.Random(seed)
    return [" ".join(draw.choices(WORDS, k=draw.randint(5, 30))) + ".\n" for _ in range(count)]


def conversation(number: int) -> list[dict]:
    return [
        {"role": "user", "content": f"What is {number} and one?"},
        {"role": "assistant", "content": f"It is {number + 1}."},
        {"role": "user", "content": "Thank you."},
        {"role": "assistant", "content": "Gladly."},
    ]


@pytest.fixture(scope="session")
def texts(tmp_path_factory):
    """A jsonl file of 60 short texts."""
    path = tmp_path_factory.mktemp("texts") / "texts.jsonl"
    return write_jsonl(path, [{"text": text} for text in sentences(60)])


@pytest.fixture(scope="session")
def chats(tmp_path_factory):
    """A jsonl file of 20 conversations."""
    path = tmp_path_factory.mktemp("chats") / "chats.jsonl"
    return write_jsonl(path, [{"messages": conversation(n)} for n in range(20)])


@pytest.fixture(scope="session")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="session")
def _trained(texts, cache):
    return train_tokenizer(open_source(texts), 300, cache=cache)


@pytest.fixture
def tokenizer(_trained, tmp_path):
    """A tokenizer of 300 tokens, of this test alone."""
    _trained.save_pretrained(tmp_path / "tokenizer")
    return load_tokenizer(tmp_path / "tokenizer")
