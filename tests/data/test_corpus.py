"""Encoded text on disk: exact, found again, never half there."""

import errno
import logging
import os
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from data.conftest import WORDS, conversation, sentences, write_jsonl
from shoestring.data import cache as caches
from shoestring.data import corpus as corpora
from shoestring.data import default_cache, encode, open_source, train_tokenizer
from shoestring.data import text as text_files
from shoestring.errors import DataError


def documents(corpus, tokenizer):
    """The corpus as texts again."""
    spans = zip(corpus.bounds[:-1], corpus.bounds[1:] - 1, strict=True)
    return [tokenizer.decode(corpus.ids[a:b].tolist()) for a, b in spans]


def test_documents_come_back_and_end_marks_stand_between(texts, tokenizer, tmp_path):
    corpus = encode(open_source(texts), tokenizer, cache=tmp_path)
    written = [d.text for d in open_source(texts)]
    assert documents(corpus, tokenizer) == written
    assert corpus.num_documents == 60
    assert corpus.num_bytes == len("".join(written).encode())
    assert (corpus.ids == tokenizer.eos_token_id).nonzero()[0].tolist() == [
        0, *(corpus.bounds[1:] - 1)
    ]  # fmt: skip


def test_ids_are_mapped_not_loaded_and_two_bytes_each(texts, tokenizer, tmp_path):
    corpus = encode(open_source(texts), tokenizer, cache=tmp_path)
    assert isinstance(corpus.ids, np.memmap)
    (path,) = tmp_path.glob("tokens/*/ids.bin")
    assert path.stat().st_size == 2 * corpus.num_tokens
    assert not corpus.ids.flags.writeable


def test_large_vocabularies_take_four_bytes(texts, tmp_path):
    vocabulary = {word: 70_000 + i for i, word in enumerate([*WORDS, "."])} | {"<end>": 0}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<end>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>")
    corpus = encode(open_source(texts), tokenizer, cache=tmp_path)
    assert corpus.ids.dtype == np.uint32
    first = next(iter(open_source(texts))).text
    decoded = tokenizer.decode(corpus.ids[1 : corpus.bounds[1] - 1].tolist())
    assert decoded.split() == first.replace(".", " .").split()


def test_pieces_of_one_file_are_one_document(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(text_files, "PIECE_BYTES", 1000)
    path = tmp_path / "long.txt"
    path.write_text("".join(sentences(100)))
    assert len(list(open_source(path))) > 5
    corpus = encode(open_source(path), tokenizer, cache=tmp_path)
    assert corpus.num_documents == 1
    assert documents(corpus, tokenizer) == [path.read_text()]


def test_second_time_comes_from_the_cache(texts, tokenizer, tmp_path, monkeypatch):
    first = encode(open_source(texts), tokenizer, cache=tmp_path)
    monkeypatch.setattr(corpora, "_write", None)
    again = encode(open_source(texts), tokenizer, cache=tmp_path)
    assert again.digest == first.digest
    assert np.array_equal(again.ids, first.ids)


def test_other_text_or_other_tokenizer_is_another_entry(texts, tokenizer, tmp_path):
    source = open_source(texts)
    other = train_tokenizer(source, 310, cache=tmp_path)
    shorter = source.sample(500)
    entries = {
        encode(source, tokenizer, cache=tmp_path).digest,
        encode(source, other, cache=tmp_path).digest,
        encode(shorter, tokenizer, cache=tmp_path).digest,
    }
    assert len(entries) == 3


@pytest.mark.parametrize("damage", ["cut", "flip", "facts", "lost"])
def test_damaged_entry_is_noticed_and_made_again(texts, tokenizer, tmp_path, damage, caplog):
    before = encode(open_source(texts), tokenizer, cache=tmp_path).ids.tolist()
    (path,) = tmp_path.glob("tokens/*/ids.bin")
    content = path.read_bytes()
    if damage == "cut":
        path.write_bytes(content[:-2])
    elif damage == "flip":
        path.write_bytes(bytes([content[0] ^ 1]) + content[1:])
    elif damage == "facts":
        (path.parent / "corpus.json").write_text("{")
    else:
        path.unlink()
    with caplog.at_level(logging.WARNING):
        after = encode(open_source(texts), tokenizer, cache=tmp_path)
    assert after.ids.tolist() == before
    assert "is damaged" in caplog.text


def test_failure_in_the_middle_leaves_nothing_behind(tokenizer, tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": t} for t in sentences(10)])
    source = open_source(path)
    digest = source.digest  # the digest reads everything: break the file only after it

    def break_file():
        result = digest()
        path.write_text(path.read_text() + "not json\n")
        return result

    source.digest = break_file
    with pytest.raises(DataError, match="line 11 is not JSON"):
        encode(source, tokenizer, cache=tmp_path / "cache")
    assert list((tmp_path / "cache" / "tokens").iterdir()) == []


def test_two_processes_that_make_one_entry_both_succeed(texts, tokenizer, tmp_path):
    encode(open_source(texts), tokenizer, cache=tmp_path)
    (entry,) = (tmp_path / "tokens").iterdir()
    content = (entry / "ids.bin").read_bytes()
    with caches.new_entry(entry) as late:
        (late / "ids.bin").write_bytes(b"late")
    assert (entry / "ids.bin").read_bytes() == content
    assert list((tmp_path / "tokens").iterdir()) == [entry]


def test_progress_counts_the_bytes(texts, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(corpora, "_BATCH_CHARS", 1000)
    told = []
    corpus = encode(open_source(texts), tokenizer, cache=tmp_path, progress=told.append)
    assert told == sorted(set(told))
    assert told[-1] == corpus.num_bytes
    assert len(told) > 1


def test_only_answers_are_marked_in_chats(chats, tmp_path):
    source = open_source(chats)
    tokenizer = train_tokenizer(source, 300, cache=tmp_path)
    corpus = encode(source, tokenizer, cache=tmp_path)
    assert corpus.is_chat
    learned = tokenizer.decode(corpus.ids[corpus.answers.astype(bool)].tolist())
    wanted = [m["content"] for n in range(20) for m in conversation(n) if m["role"] == "assistant"]
    assert learned == "".join(f"{content}<|endoftext|>" for content in wanted)
    assert corpus.num_bytes == len(learned)


def test_chats_without_a_template(chats, tokenizer, tmp_path):
    with pytest.raises(DataError, match="line 1 is a conversation and the tokenizer has no chat"):
        encode(open_source(chats), tokenizer, cache=tmp_path)


def test_texts_among_chats(tmp_path, tokenizer):
    rows = [{"text": "plain"}, {"messages": conversation(0)}]
    path = write_jsonl(tmp_path / "a.jsonl", rows)
    with pytest.raises(DataError, match="line 2 is a conversation, unlike the documents before"):
        encode(open_source(path), tokenizer, cache=tmp_path)


def test_tokenizer_without_an_end_of_text_token(texts, tokenizer, tmp_path):
    tokenizer.eos_token = None
    with pytest.raises(DataError, match="no end-of-text token"):
        encode(open_source(texts), tokenizer, cache=tmp_path)


def test_cache_that_cannot_be_made(texts, tokenizer, tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(DataError, match=r"cannot be written.*SHOESTRING_CACHE"):
        encode(open_source(texts), tokenizer, cache=tmp_path / "file")


def test_full_disk(texts, tokenizer, tmp_path, monkeypatch):
    def full(_descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(DataError, match="No space left on device"):
        encode(open_source(texts), tokenizer, cache=tmp_path)
    assert list((tmp_path / "tokens").iterdir()) == []


def test_cache_folder_follows_the_environment(monkeypatch):
    monkeypatch.setenv("SHOESTRING_CACHE", "/some/where")
    assert default_cache() == Path("/some/where")
    monkeypatch.delenv("SHOESTRING_CACHE")
    assert default_cache().name == "shoestring"
