"""Where documents come from, and what is said when they cannot be had."""

import sysconfig
from itertools import islice
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data.conftest import sentences, write_jsonl
from shoestring.data import open_source
from shoestring.data import text as text_files
from shoestring.data.text import read_text
from shoestring.errors import ConfigError, DataError


def contents(source):
    return [document.text for document in source]


def message(spec, **options):
    """What reading `spec` complains about."""
    with pytest.raises(DataError) as caught:
        list(open_source(spec, **options))
    assert caught.value.exit_code == 2
    assert caught.value.hint
    return str(caught.value)


@pytest.fixture
def folder(tmp_path):
    """A folder of 40 texts in two levels, with files that are not to be read."""
    (tmp_path / "b").mkdir()
    (tmp_path / ".git").mkdir()
    for i, text in enumerate(sentences(40)):
        (tmp_path / ("b" if i % 2 else "") / f"{i:02}.txt").write_text(text)
    (tmp_path / "picture.png").write_bytes(b"\x89PNG\0")
    (tmp_path / ".git" / "hidden.txt").write_text("hidden")
    (tmp_path / "empty.txt").touch()
    return tmp_path


def test_stdlib_is_the_source_of_this_python_and_nothing_installed():
    root = Path(sysconfig.get_paths()["stdlib"])
    names = [Path(document.name) for document in islice(open_source("stdlib"), 200)]
    assert names == sorted(names, key=lambda p: (p.parent, p.name))
    assert all(name.suffix == ".py" and name.is_relative_to(root) for name in names)
    assert not any({"site-packages", "__pycache__"} & set(name.parts) for name in names)
    assert root / "argparse.py" in [*names, *(Path(d.name) for d in open_source("stdlib"))]


def test_stdlib_held_out_files_are_never_in_train():
    train, held_out = open_source("stdlib").split(0.05)
    seen, kept = {d.key for d in train}, list(held_out)
    assert kept
    assert not seen & {d.key for d in kept}
    assert {d.key for d in open_source("stdlib")} == seen | {d.key for d in kept}


def test_stdlib_that_is_not_there_is_an_error(monkeypatch, tmp_path):
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    assert "source is not at" in message("stdlib")


def test_text_file_is_kept_byte_for_byte(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes("\ufeffeins\r\nzw\u00f6lf\rdrei\n".encode())
    assert "".join(contents(open_source(path))).encode() == path.read_bytes()


def test_text_file_holds_out_its_tail_at_a_line_end(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("".join(sentences(100)))
    train, held_out = ("".join(contents(side)) for side in open_source(path).split(0.1))
    assert train + held_out == path.read_text()
    assert train.endswith("\n")
    assert 0.05 < len(held_out) / len(train + held_out) <= 0.1


def test_text_file_too_short_to_split(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("x")
    with pytest.raises(DataError, match="too short to hold out"):
        list(open_source(path).split(0.5)[0])


@given(st.text(alphabet="a\u00e9\u4e2d\U0001f600\n", min_size=1), st.integers(4, 9))
def test_pieces_join_to_the_file_whatever_the_piece_size(tmp_path_factory, text, piece):
    path = tmp_path_factory.getbasetemp() / "pieces.txt"
    path.write_bytes(text.encode())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(text_files, "PIECE_BYTES", piece)
        pieces = list(read_text(path))
    assert "".join(d.text for d in pieces) == text
    assert [d.ends for d in pieces] == [False] * (len(pieces) - 1) + [True]
    assert len({d.key for d in pieces}) == 1


def test_folder_is_read_in_order_of_path_by_suffix(folder):
    names = [str(Path(d.name).relative_to(folder)) for d in open_source(folder)]
    top = [f"{i:02}.txt" for i in range(0, 40, 2)]
    assert names == top + [str(Path("b", f"{i:02}.txt")) for i in range(1, 40, 2)]


def test_folder_reads_only_the_suffixes_it_is_given(folder):
    (folder / "note.md").write_text("a note")
    (folder / "other.md").write_text("another")
    assert contents(open_source(folder, suffixes=[".md"])) == ["a note", "another"]


def test_folder_of_one_file_is_that_file(tmp_path):
    (tmp_path / "only.txt").write_text("".join(sentences(50)))
    train, held_out = open_source(tmp_path).split(0.2)
    assert contents(train)
    assert contents(held_out)


def test_folder_without_readable_files(tmp_path):
    assert "holds no file with a suffix I read; expected .txt, .text" in message(tmp_path)


def test_folder_of_empty_files(tmp_path):
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).touch()
    assert "holds no text" in message(tmp_path)


@pytest.mark.parametrize("suffixes", ["txt", ("txt",), ()])
def test_suffixes_that_cannot_be_used(tmp_path, suffixes):
    with pytest.raises(ConfigError, match="begin with a dot"):
        open_source(tmp_path, suffixes=suffixes)


def test_split_keeps_whole_documents_and_loses_none(folder):
    train, held_out = open_source(folder).split(0.2)
    assert len(contents(held_out)) == 8
    assert sorted(contents(train) + contents(held_out)) == sorted(contents(open_source(folder)))


def test_split_is_the_same_wherever_the_files_lie(folder, tmp_path_factory):
    rows = tmp_path_factory.mktemp("x") / "rows.jsonl"
    write_jsonl(rows, [{"text": text} for text in contents(open_source(folder))])
    for here, there in zip(open_source(folder).split(), open_source(rows).split(), strict=True):
        assert contents(here) == contents(there)


def test_two_copies_never_fall_on_different_sides(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": t} for t in sentences(30) * 2])
    train, held_out = (set(contents(side)) for side in open_source(path).split(0.3))
    assert not train & held_out


def test_split_of_many_documents_holds_out_about_the_share(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": str(i)} for i in range(4000)])
    train, held_out = (contents(side) for side in open_source(path).split(0.1))
    assert len(train) + len(held_out) == 4000
    assert 300 < len(held_out) < 500


def test_split_of_one_document_is_an_error(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": "one"}] * 3)
    with pytest.raises(DataError, match=r"only one distinct document.*tail"):
        list(open_source(path).split()[1])


@pytest.mark.parametrize("share", [0, 1, -0.1])
def test_split_share_out_of_range(texts, share):
    with pytest.raises(ConfigError, match="between 0 and 1"):
        open_source(texts).split(share)


def test_sample_is_repeatable_about_as_large_as_asked_and_in_order(texts):
    source = open_source(texts)
    sample = contents(source.sample(1000))
    whole = contents(source)
    assert sample == contents(source.sample(1000))
    assert sample != contents(source.sample(1000, seed=1))
    assert 900 < len("".join(sample)) <= 1000
    places = [next(i for i, text in enumerate(whole) if text.startswith(s)) for s in sample]
    assert places == sorted(places)


def test_sample_larger_than_the_source_is_the_source(texts):
    source = open_source(texts)
    assert contents(source.sample(10**9)) == contents(source)


def test_sample_of_nothing(texts):
    with pytest.raises(ConfigError, match="sample of 0 bytes"):
        open_source(texts).sample(0)


def test_digest_changes_with_the_text_only(texts, tmp_path):
    copy = tmp_path / "copy.jsonl"
    copy.write_bytes(texts.read_bytes())
    assert open_source(copy).digest() == open_source(texts).digest()
    copy.write_text(copy.read_text().replace("cat", "cow", 1))
    assert open_source(copy).digest() != open_source(texts).digest()


def test_missing_file_names_the_nearest(tmp_path):
    (tmp_path / "notes.txt").write_text("x")
    text = message(tmp_path / "nots.txt")
    assert "there is no data at" in text
    assert "Did you mean 'notes.txt'?" in text


def test_missing_name_points_to_hugging_face():
    assert "write 'hf:nobody/nothing'" in message("nobody/nothing")


def test_empty_file(tmp_path):
    (tmp_path / "a.txt").touch()
    assert f"{tmp_path / 'a.txt'} is empty; expected UTF-8 text" in message(tmp_path / "a.txt")


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
def test_binary_file_names_the_byte(tmp_path, name):
    (tmp_path / name).write_bytes(b"abc\0def")
    assert f"{name} is binary (a zero byte at byte 3)" in message(tmp_path / name)


def test_binary_beyond_the_first_piece_names_the_byte(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"line\n" * 300_000 + b"\0")
    assert "binary (a zero byte at byte 1500000)" in message(tmp_path / "a.txt")


def test_utf16_is_recognised(tmp_path):
    (tmp_path / "a.txt").write_text("abc", encoding="utf-16")
    text = message(tmp_path / "a.txt")
    assert "is UTF-16" in text
    assert "Save it as UTF-8" in text


@pytest.mark.parametrize("before", [0, 7, 1_500_000])
def test_not_utf8_names_file_and_byte(tmp_path, before):
    (tmp_path / "a.txt").write_bytes(b"line 1\n" * (before // 7) + b"caf\xe9 au lait\n")
    at = before // 7 * 7 + 3
    assert f"a.txt is not UTF-8: byte {at} is 0xe9" in message(tmp_path / "a.txt")


def test_not_utf8_in_json_lines_names_the_byte_of_the_file(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "a"}\n{"text": "\xff"}\n')
    assert "is not UTF-8: byte 24 is 0xff" in message(tmp_path / "a.jsonl")


def test_unreadable_file(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("x")

    def refuse(*_args, **_options):
        raise PermissionError(13, "Permission denied")

    source = open_source(tmp_path / "a.txt")
    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(DataError, match=r"a\.txt cannot be read \(Permission denied\)"):
        list(source)
