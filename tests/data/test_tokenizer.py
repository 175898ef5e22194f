"""Tokenizers: trained here, loaded from elsewhere, and matched to a model."""

import os
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models
from torch import nn
from transformers import PreTrainedTokenizerFast

from data.conftest import sentences, write_jsonl
from shoestring.data import check_tokenizer, load_tokenizer, open_source, train_tokenizer
from shoestring.data.tokenizer import SMALLEST_VOCABULARY, text_encoder, tokenizer_digest
from shoestring.errors import ConfigError, DataError

TRAIN = """
import sys
from shoestring.data import open_source, train_tokenizer
from shoestring.data.tokenizer import tokenizer_digest
print(tokenizer_digest(train_tokenizer(open_source(sys.argv[1]), 300, cache=sys.argv[2])))
"""


def test_vocabulary_has_the_size_that_was_asked(tokenizer):
    assert len(tokenizer) == 300
    assert sorted(tokenizer.get_vocab().values()) == list(range(300))
    assert tokenizer.eos_token == tokenizer.bos_token == "<|endoftext|>"


def test_training_twice_gives_the_same_tokenizer(tokenizer, texts, tmp_path):
    again = train_tokenizer(open_source(texts), 300, cache=tmp_path)
    assert tokenizer_digest(again) == tokenizer_digest(tokenizer)


@pytest.mark.slow  # imports everything once more, in a process whose sets have another order
def test_two_processes_train_the_same_tokenizer(tokenizer, texts, tmp_path):
    environment = {**os.environ, "PYTHONHASHSEED": "7", "PYTHONPATH": "src"}
    done = subprocess.run(
        [sys.executable, "-c", TRAIN, str(texts), str(tmp_path / "other")],
        capture_output=True, text=True, check=True, env=environment,
    )  # fmt: skip
    assert done.stdout.strip() == tokenizer_digest(tokenizer)


@pytest.fixture(scope="module")
def module_tokenizer(texts, cache):
    return train_tokenizer(open_source(texts), 300, cache=cache)


@given(text=st.text())
def test_every_text_comes_back_exactly(module_tokenizer, text):
    (ids,) = text_encoder(module_tokenizer)([text])
    assert module_tokenizer.decode(ids) == text.encode(errors="replace").decode()


def test_cached_tokenizer_is_taken_and_a_changed_source_makes_another(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": t} for t in sentences(20)])
    first = train_tokenizer(open_source(path), 280, cache=tmp_path)
    entries = list((tmp_path / "tokenizers").iterdir())
    again = train_tokenizer(open_source(path), 280, cache=tmp_path)
    assert tokenizer_digest(first) == tokenizer_digest(again)
    assert list((tmp_path / "tokenizers").iterdir()) == entries
    write_jsonl(path, [{"text": t} for t in sentences(20, seed=1)])
    train_tokenizer(open_source(path), 280, cache=tmp_path)
    assert len(list((tmp_path / "tokenizers").iterdir())) == 2


def test_vocabulary_smaller_than_the_bytes(texts, tmp_path):
    expected = f"vocabulary of 100 is too small; expected {SMALLEST_VOCABULARY} or more"
    with pytest.raises(ConfigError, match=expected):
        train_tokenizer(open_source(texts), 100, cache=tmp_path)


def test_text_that_spells_a_special_token_stays_text(tokenizer):
    (ids,) = text_encoder(tokenizer)(["a<|endoftext|>b"])
    assert tokenizer.eos_token_id not in ids
    assert tokenizer.decode(ids) == "a<|endoftext|>b"


def test_saved_truncation_does_not_cut_documents(tokenizer):
    tokenizer.backend_tokenizer.enable_truncation(4)
    tokenizer.backend_tokenizer.enable_padding(length=50)
    (ids,) = text_encoder(tokenizer)(["the cat sat on the mat " * 5])
    assert tokenizer.decode(ids) == "the cat sat on the mat " * 5
    assert tokenizer.backend_tokenizer.truncation["max_length"] == 4


def test_slow_tokenizer_is_encoded_by_its_own_call():
    class Slow:
        is_fast = False

        def __call__(self, texts, **options):
            assert options["add_special_tokens"] is False
            return {"input_ids": [[len(text)] for text in texts]}

    assert text_encoder(Slow())(["a", "bcd"]) == [[1], [3]]


def test_tokenizer_that_is_not_there(tmp_path):
    with pytest.raises(DataError, match=r"no tokenizer at .*; expected a directory with tokenizer"):
        load_tokenizer(tmp_path / "nothing")


def test_tokenizer_directory_that_holds_none(tmp_path):
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(DataError, match=r"the tokenizer .* cannot be loaded"):
        load_tokenizer(tmp_path)


def test_tokenizer_name_that_cannot_be_reached():
    with pytest.raises(DataError, match="'no-such-owner/no-such-model' cannot be loaded") as caught:
        load_tokenizer("no-such-owner/no-such-model")
    assert "Check the name and the network" in str(caught.value)


class Model(nn.Module):
    def __init__(self, rows):
        super().__init__()
        self.table = nn.Embedding(rows, 2)

    def get_input_embeddings(self):
        return self.table


@pytest.mark.parametrize("model", [299, Model(299)])
def test_tokenizer_with_more_tokens_than_the_model_has_embeddings(tokenizer, model):
    with pytest.raises(DataError, match="ids up to 299 and the model 299 embeddings") as caught:
        check_tokenizer(tokenizer, model)
    assert caught.value.exit_code == 2
    assert "enlarge its embedding to 300 rows" in str(caught.value)


@pytest.mark.parametrize("model", [300, 512, Model(300)])
def test_tokenizer_that_fits_the_embedding(tokenizer, model):
    check_tokenizer(tokenizer, model)


def test_tokenizer_with_a_hole_in_its_ids_is_matched_by_its_highest(tokenizer):
    sparse = Tokenizer(models.WordLevel({"a": 0, "b": 900}, unk_token="a"))
    with pytest.raises(DataError, match="ids up to 900"):
        check_tokenizer(PreTrainedTokenizerFast(tokenizer_object=sparse), 300)
