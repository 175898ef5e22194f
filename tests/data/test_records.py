"""Rows of JSON lines, Parquet and Hugging Face data sets."""

import json
import sys

import pyarrow
import pyarrow.parquet
import pytest

from data.conftest import conversation, sentences, write_jsonl
from shoestring.data import open_source
from shoestring.errors import DataError


def message(spec, **options):
    with pytest.raises(DataError) as caught:
        list(open_source(spec, **options))
    assert caught.value.exit_code == 2
    return str(caught.value)


def parquet(path, columns):
    pyarrow.parquet.write_table(pyarrow.table(columns), path)
    return path


def test_jsonl_gives_the_text_of_each_row_and_its_line(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": "one"}, {"text": "two"}])
    documents = list(open_source(path))
    assert [d.text for d in documents] == ["one", "two"]
    assert [d.name for d in documents] == [f"{path}, line 1", f"{path}, line 2"]


def test_jsonl_passes_over_blank_lines_empty_texts_and_a_byte_order_mark(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('\ufeff{"text": "one"}\n\n{"text": ""}\n{"text": "two"}')
    assert [(d.text, d.name[-1]) for d in open_source(path)] == [("one", "1"), ("two", "4")]


def test_a_chosen_field_is_read(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": "no", "body": "yes"}])
    assert [d.text for d in open_source(path, field="body")] == ["yes"]


def test_conversations_are_found_where_there_is_no_text(chats):
    documents = list(open_source(chats))
    assert len(documents) == 20
    assert list(documents[3].messages) == conversation(3)


def test_bad_json_names_the_line(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "one"}\n{"text": "two"\n')
    assert "a.jsonl, line 2 is not JSON (Expecting ',' delimiter at column" in message(path)


def test_json_array_says_how_to_write_it(tmp_path):
    path = tmp_path / "a.json"
    path.write_text(json.dumps([{"text": "one"}]))
    assert "line 1 is a JSON list, not an object" in message(path)
    path.write_text(json.dumps([{"text": "one"}], indent=1))
    assert "one object a line" in message(path)


def test_missing_field_names_the_fields_there_are(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [{"texts": "one", "id": 3}])
    text = message(path)
    assert "line 1 has no field 'text' or 'messages'" in text
    assert "one of the fields it has: 'texts', 'id'" in text
    assert "Did you mean 'texts'?" in text


def test_missing_chosen_field(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": "one"}])
    assert "has no field 'zzz'; expected one of the fields it has: 'text'" in message(
        path, field="zzz"
    )


@pytest.mark.parametrize(("value", "kind"), [(None, "null"), (3, "a int"), (["a"], "a list")])
def test_field_that_is_not_text(tmp_path, value, kind):
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": value}])
    assert f"line 1: the field 'text' is {kind}" in message(path)


@pytest.mark.parametrize(
    "messages", [[], "hello", [{"content": "x"}], [{"role": "assistant", "content": None}]]
)
def test_messages_that_are_no_conversation(tmp_path, messages):
    path = write_jsonl(tmp_path / "a.jsonl", [{"messages": messages}])
    assert "line 1: the field 'messages' is not a conversation" in message(path)


def test_conversation_without_an_answer(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [{"messages": conversation(0)[:1]}])
    assert "line 1: the conversation has no message of the assistant" in message(path)


def test_only_empty_rows(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": ""}])
    assert "holds no text" in message(path)


def test_parquet_gives_the_same_documents_as_json_lines(tmp_path, texts):
    rows = [d.text for d in open_source(texts)]
    path = parquet(tmp_path / "a.parquet", {"id": list(range(len(rows))), "text": rows})
    documents = list(open_source(path))
    assert [d.text for d in documents] == rows
    assert documents[6].name == f"{path}, row 7"
    assert open_source(path).digest() == open_source(texts).digest()


def test_parquet_conversations(tmp_path, chats):
    path = parquet(tmp_path / "a.parquet", {"messages": [conversation(n) for n in range(20)]})
    assert open_source(path).digest() == open_source(chats).digest()


def test_parquet_missing_column(tmp_path):
    path = parquet(tmp_path / "a.parquet", {"content": ["x"], "id": [1]})
    text = message(path)
    assert "a.parquet has no field 'text' or 'messages'" in text
    assert "'content', 'id'" in text


def test_parquet_that_is_none(tmp_path):
    (tmp_path / "a.parquet").write_bytes(b"not parquet at all")
    assert "cannot be read as Parquet" in message(tmp_path / "a.parquet")


def test_parquet_without_pyarrow(tmp_path, monkeypatch):
    path = parquet(tmp_path / "a.parquet", {"text": ["x"]})
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert "pip install 'shoestring[data]'" in message(path)


def test_hub_data_set_by_its_name_and_split(tmp_path, tmp_path_factory, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("hub"))
    for split in ("train", "test"):
        write_jsonl(tmp_path / f"{split}.jsonl", [{"text": f"{split} {i}"} for i in range(3)])
    train = open_source(f"hf:{tmp_path}")
    assert [d.text for d in train] == ["train 0", "train 1", "train 2"]
    test = list(open_source(f"hf:{tmp_path}::test"))
    assert [d.text for d in test] == ["test 0", "test 1", "test 2"]
    assert test[1].name.endswith("::test, row 2")
    assert "has no field 'body'; expected one of the fields it has: 'text'" in message(
        f"hf:{tmp_path}", field="body"
    )


def test_hub_data_set_that_cannot_be_had():
    pytest.importorskip("datasets")
    text = message("hf:no-such-owner/no-such-data:en:validation")
    assert "the data set hf:no-such-owner/no-such-data:en:validation cannot be loaded" in text
    assert "configuration en and split 'validation'" in text
    assert "Check its name and the network" in text


def test_hub_without_datasets(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert "pip install 'shoestring[datasets]'" in message("hf:some/thing")


@pytest.mark.parametrize("spec", ["hf:", "hf:a:b:c:d"])
def test_hub_names_that_are_none(spec):
    assert "expected hf:NAME, hf:NAME:config or hf:NAME:config:split" in message(spec)


def test_folder_reads_rows_and_texts_each_in_its_way(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", [{"text": "row"}])
    (tmp_path / "b.txt").write_text("file")
    parquet(tmp_path / "c.parquet", {"text": sentences(2)})
    assert [d.text for d in open_source(tmp_path)] == ["row", "file", *sentences(2)]
