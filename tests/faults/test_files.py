"""Files that changed behind a run's back, and files from somebody else."""

import errno
import hashlib
import json
import os
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

import shoestring
from shoestring.checkpoint import (
    MANIFEST,
    Lock,
    Store,
    directory,
    read_manifest,
    verify,
    write_text,
)
from shoestring.checkpoint.tensors import DTYPES, read_tensors, write_tensors
from shoestring.errors import CheckpointError
from shoestring.models.gpt import GPT, GPTConfig
from shoestring.training.distributed import World
from shoestring.training.load import load_model
from shoestring.training.loop import resume
from shoestring.training.snapshot import restore

OLD = Path(__file__).parent / "old" / "checkpoints"


def saved(directory: Path, *steps: int) -> Store:
    """A store with small checkpoints of these steps."""
    store = Store(directory / "checkpoints", keep=len(steps))
    for step in steps:
        tensors = {"weight": torch.full((7, 3), float(step)), "count": torch.tensor(step)}
        store.save(step, tensors={"a.safetensors": tensors}, texts={"state.json": f"[{step:20}]\n"})
    return store


def files_of(directory: Path) -> list[Path]:
    return sorted(path for path in directory.rglob("*") if path.is_file())


# ---- damage ------------------------------------------------------------------------------------


def test_every_flipped_bit_is_found_and_the_older_one_used(tmp_path):
    store = saved(tmp_path, 1, 2)
    newest = store.directory / "step-2"
    chance = random.Random(0)
    for file in files_of(newest):
        whole = file.read_bytes()
        places = range(8 * len(whole)) if file.name == MANIFEST else range(0, 8 * len(whole), 13)
        for place in chance.sample(places, min(150, len(places))):
            broken = bytearray(whole)
            broken[place // 8] ^= 1 << place % 8
            file.write_bytes(broken)
            found, wrong = store.newest()
            assert found is not None
            assert found.step == 1, f"bit {place} of {file.name}"
            assert len(wrong) == 1
            assert file.name in wrong[0]
        file.write_bytes(whole)
    found, wrong = store.newest()
    assert (found.step, wrong) == (2, [])


@pytest.mark.parametrize("length", [0, 1, 7, 8, -1])
def test_every_shortened_file_is_found(tmp_path, length):
    store = saved(tmp_path, 1, 2)
    for file in files_of(store.directory / "step-2"):
        whole = file.read_bytes()
        file.write_bytes(whole[:length])
        found, wrong = store.newest()
        assert found.step == 1
        assert file.name in wrong[0]
        file.write_bytes(whole + b"\0")
        assert store.newest()[0].step == 1
        file.write_bytes(whole)


def test_a_missing_file_is_named(tmp_path):
    store = saved(tmp_path, 1, 2)
    (store.directory / "step-2" / "a.safetensors").unlink()
    found, wrong = store.newest()
    assert found.step == 1
    assert "a.safetensors is missing" in wrong[0]


def test_a_link_in_place_of_a_file_is_refused(tmp_path):
    store = saved(tmp_path, 1, 2)
    file = store.directory / "step-2" / "state.json"
    file.rename(tmp_path / "elsewhere.json")
    file.symlink_to(tmp_path / "elsewhere.json")
    found, wrong = store.newest()
    assert found.step == 1
    assert "symbolic link" in wrong[0]


def test_what_was_passed_over_is_kept_aside_and_no_rotation_takes_the_good_one(settings, tmp_path):
    from .test_resume import CutError, cut_at, train

    events: list[dict[str, Any]] = []
    with pytest.raises(CutError):
        train(settings(), progress=cut_at(5))
    newest = tmp_path / "run" / "checkpoints" / "step-4"
    content = bytearray((newest / "model.safetensors").read_bytes())
    content[-5] ^= 16
    (newest / "model.safetensors").write_bytes(content)
    run = resume(tmp_path / "run", progress=events.append)
    assert run.receipt["steps"] == 6
    told = [event for event in events if event["event"] == "checkpoint passed over"]
    assert "model.safetensors does not match its checksum" in told[0]["message"]
    names = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert names == ["damaged-step-4", "step-5", "step-6"]


def test_no_good_checkpoint_is_an_error_that_names_every_damage(settings, tmp_path):
    from .test_resume import CutError, cut_at, train

    with pytest.raises(CutError):
        train(settings(), progress=cut_at(4))
    for step in (2, 3):
        (tmp_path / "run" / "checkpoints" / f"step-{step}" / "state.json").unlink()
    with pytest.raises(CheckpointError, match=r"no checkpoint .*step-3.*step-2.*--run.replace"):
        resume(tmp_path / "run")
    assert len(list((tmp_path / "run" / "checkpoints").iterdir())) == 2


# ---- formats -----------------------------------------------------------------------------------


def test_a_checkpoint_of_the_format_before_is_read(tmp_path):
    shutil.copytree(OLD, tmp_path / "checkpoints")
    assert json.loads((OLD / "step-2" / MANIFEST).read_text())["format"] == 1
    found, wrong = Store(tmp_path / "checkpoints").newest()
    assert (found.step, wrong) == (2, [])
    weights = load_file(found.path / "model.safetensors")
    config = GPTConfig(
        vocab_size=weights["model.embed_tokens.weight"].shape[0], hidden_size=8,
        num_hidden_layers=2, num_attention_heads=2, max_position_embeddings=16, rule="feistel",
    )  # fmt: skip
    model = GPT(config)
    groups = [
        {"params": [p for p in model.parameters() if p.ndim >= 2]},
        {"params": [p for p in model.parameters() if p.ndim < 2]},
    ]
    optimizer = torch.optim.AdamW(groups, fused=True)
    facts = restore(found, model, optimizer, World(0, 1, torch.device("cpu")))
    assert facts["step"] == 2
    for name, tensor in model.state_dict().items():
        if name in weights:
            assert torch.equal(tensor, weights[name]), name
    assert len(optimizer.state) == len(list(model.parameters()))


def test_a_newer_format_asks_for_a_newer_version(tmp_path):
    store = saved(tmp_path, 1, 2)
    manifest = store.directory / "step-2" / MANIFEST
    body = manifest.read_text().rpartition("}\n")[0].replace('"format": 2', '"format": 3') + "}\n"
    manifest.write_text(body + hashlib.sha256(body.encode()).hexdigest() + "\n")
    with pytest.raises(CheckpointError, match=r"format 3; expected at most 2.*newer Shoestring"):
        store.newest()  # not passed over: the older one would lose what the newer version did


def test_a_newer_state_asks_for_a_newer_version(settings, tmp_path):
    from shoestring.checkpoint.manifest import write_manifest

    from .test_resume import CutError, cut_at, train

    with pytest.raises(CutError):
        train(settings(), progress=cut_at(2))
    newest = tmp_path / "run" / "checkpoints" / "step-1"
    facts = json.loads((newest / "state.json").read_text())
    (newest / "state.json").write_text(json.dumps({**facts, "format": 99}))
    write_manifest(newest)
    with pytest.raises(CheckpointError, match=r"format 99.*newer Shoestring"):
        resume(tmp_path / "run")


@pytest.mark.parametrize("content", [b"\x80\x02}q\x00.", b"PK\x03\x04 a zip of pickles"])
def test_a_pickle_is_refused_and_never_opened(tmp_path, content):
    (tmp_path / "model.pt").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"pickle.*never"):
        shoestring.load(tmp_path / "model.pt")
    (tmp_path / "pytorch_model.bin").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"pickle.*never"):
        shoestring.load(tmp_path)
    shutil.move(tmp_path / "pytorch_model.bin", tmp_path / "x.bin")
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "pytorch_model.bin").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"pickle.*never"):
        shoestring.load(tmp_path)


def test_no_safetensors_beside_a_pickle_make_it_readable(tmp_path):
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text('{"model_type": "gpt2", "n_layer": 1, "n_embd": 8}')
    (model / "pytorch_model.bin").write_bytes(b"\x80\x02}q\x00.")
    (model / "other.safetensors").write_bytes(b"")
    for read in (shoestring.load, load_model):
        with pytest.raises(CheckpointError, match=r"pytorch_model.bin is a pickle.*never"):
            read(model)
    with pytest.raises(CheckpointError, match=r"pytorch_model.bin is a pickle.*never"):
        shoestring.load(tmp_path)  # what is read is below a run directory
    index = model / "model.safetensors.index.json"
    index.write_text('{"metadata": {}, "weight_map": {"a": "pytorch_model.bin"}}')
    with pytest.raises(CheckpointError, match=r"pytorch_model.bin is a pickle.*never"):
        load_model(model)
    index.write_text("[]")
    with pytest.raises(CheckpointError, match=r"index.json cannot be read"):
        load_model(model)
    index.unlink()
    (model / "pytorch_model.bin").unlink()
    with pytest.raises(CheckpointError, match=r"no safetensors weights; a pickle is refused"):
        load_model(model)


# ---- names that are links, pipes or leftovers ---------------------------------------------------


def test_a_lock_that_is_a_link_is_not_written_through(tmp_path):
    victim = tmp_path / "victim"
    victim.write_text("precious")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".lock").symlink_to(victim)
    with pytest.raises(CheckpointError, match=r"\.lock is a symbolic link"), Lock(tmp_path / "run"):
        pass
    assert victim.read_text() == "precious"


def test_a_text_is_never_written_through_a_link_and_leftovers_go(tmp_path):
    victim = tmp_path / "victim"
    victim.write_text("precious")
    (tmp_path / ".a.json.new").symlink_to(victim)
    (tmp_path / ".a.json.new-stale").write_text("half")
    held = directory._own_file(tmp_path / "a.json")  # another writer, alive
    write_text(tmp_path / "a.json", "whole")
    assert (tmp_path / "a.json").read_text() == "whole"
    assert victim.read_text() == "precious"
    assert sorted(tmp_path.glob(".a.json.new-*")) == [held[1]]
    os.close(held[0])
    with pytest.raises(CheckpointError, match="Cannot write"):
        write_text(tmp_path / "a.json", "\ud800")
    write_text(tmp_path / "a.json", "again")
    assert list(tmp_path.glob(".a.json.new-*")) == []
    assert (tmp_path / "a.json").stat().st_mode & 0o777 == 0o666 & ~directory._umask()


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes on this system")
def test_a_pipe_or_a_directory_for_a_manifest_is_refused_and_not_read(tmp_path):
    os.mkfifo(tmp_path / MANIFEST)
    with pytest.raises(CheckpointError, match="it is no file"):
        read_manifest(tmp_path)
    (tmp_path / MANIFEST).unlink()
    (tmp_path / MANIFEST).mkdir()
    with pytest.raises(CheckpointError, match="it is no file"):
        read_manifest(tmp_path)


def test_every_new_directory_is_flushed_into_its_parent(tmp_path, monkeypatch):
    flushed = []
    real = directory._flush
    monkeypatch.setattr(directory, "_flush", lambda path: (flushed.append(path), real(path)))
    saved(tmp_path / "runs" / "mine", 1)
    assert flushed[:3] == [tmp_path, tmp_path / "runs", tmp_path / "runs" / "mine"]


def test_a_sweep_takes_what_killed_writers_left_and_nothing_else(tmp_path):
    store = saved(tmp_path, 1, 2)
    (store.directory / ".step-3.new-abc").mkdir()
    (store.directory / ".step-3.new-abc" / "half").write_text("")
    (store.directory / ".step-1.old").mkdir()
    store.sweep()
    assert sorted(path.name for path in store.directory.iterdir()) == [
        ".step-1.old", "step-1", "step-2"
    ]  # fmt: skip
    Store(tmp_path / "none").sweep()


def test_a_full_disk_is_told_where_nothing_exists_yet(tmp_path):
    full = OSError(errno.ENOSPC, "No space left on device")
    error = directory.unwritable(tmp_path / "a" / "b" / "c", full)
    assert "No room to write" in str(error)
    assert "free" in str(error)


# ---- manifests from anywhere -------------------------------------------------------------------

NAMES = [
    "../x", "/etc/passwd", "a/../../x", "a/./b", "a//b", "", ".", "..", "a\\..\\b", "C:\\x", "C:x",
    "a\0b", "a\nb", "\u202ex", "x" * 300, "a/" * 600 + "b", "con", "nul.txt", "a/aux", "x.", "x ",
    MANIFEST,
]  # fmt: skip
ENTRIES = [
    None, 3, [], {}, {"bytes": 1}, {"bytes": -1, "sha256": "0" * 64},
    {"bytes": 1 << 60, "sha256": "0" * 64}, {"bytes": True, "sha256": "0" * 64},
    {"bytes": 1.0, "sha256": "0" * 64}, {"bytes": 10**400, "sha256": "0" * 64},
    {"bytes": 1, "sha256": "0" * 63}, {"bytes": 1, "sha256": 0},
    {"bytes": 1, "sha256": "0" * 64, "more": 1},
]  # fmt: skip


def write(directory: Path, content: Any) -> None:
    directory.mkdir(exist_ok=True)
    body = json.dumps(content, indent=1) + "\n"
    text = body + hashlib.sha256(body.encode()).hexdigest() + "\n"
    (directory / MANIFEST).write_text(text)


@pytest.mark.parametrize("name", NAMES, ids=lambda name: repr(name[:12]))
def test_a_name_that_leaves_the_directory_is_refused(tmp_path, name):
    (tmp_path / "x").write_text("outside")
    entry = {"bytes": 7, "sha256": hashlib.sha256(b"outside").hexdigest()}
    write(tmp_path / "run", {"format": 2, "files": {name: entry}})
    with pytest.raises(CheckpointError, match="it names"):
        verify(tmp_path / "run")


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: repr(entry)[:30])
def test_an_absurd_entry_is_refused(tmp_path, entry):
    write(tmp_path, {"format": 2, "files": {"a": entry}})
    with pytest.raises(CheckpointError):
        read_manifest(tmp_path)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=12,
)
FUZZ = settings(
    max_examples=int(os.environ.get("SHOESTRING_FUZZ_EXAMPLES", "300")),
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


@FUZZ
@given(content=st.binary(max_size=200) | JSON.map(lambda value: json.dumps(value).encode()))
def test_any_bytes_for_a_manifest_are_an_entry_list_or_a_checkpoint_error(tmp_path, content):
    (tmp_path / MANIFEST).write_bytes(content)
    try:
        entries = read_manifest(tmp_path)
    except CheckpointError:
        return
    assert all(isinstance(name, str) for name in entries)


@FUZZ
@given(
    files=st.dictionaries(st.sampled_from(NAMES) | st.text(max_size=12), JSON, max_size=3),
    version=st.sampled_from([1, 2, 0, -1, "2", None, True, 2.0]),
)
def test_any_signed_manifest_opens_nothing_outside(tmp_path, files, version):
    write(tmp_path / "run", {"format": version, "files": files})
    try:
        entries = read_manifest(tmp_path / "run")
    except CheckpointError:
        return
    for name in entries:
        inside = (tmp_path / "run" / name).resolve()
        assert inside.is_relative_to((tmp_path / "run").resolve())


@FUZZ
@given(content=st.binary(max_size=64) | st.integers(0, 2**64 - 1).map(
    lambda n: n.to_bytes(8, "little") + b"{}"))  # fmt: skip
def test_any_bytes_for_a_tensor_file_are_tensors_or_a_checkpoint_error(tmp_path, content):
    (tmp_path / "a.safetensors").write_bytes(content)
    try:
        list(read_tensors(tmp_path / "a.safetensors"))
    except CheckpointError:
        pass


# ---- tensors -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype_shape_and_layout_comes_back(tmp_path, dtype):
    generator = torch.Generator().manual_seed(0)
    raw = torch.randint(0, 2, (4, 6), generator=generator)
    base = raw.to(dtype) if dtype is not torch.uint64 else raw.view(torch.uint64)
    tensors = {
        "plain": base, "turned": base.t(), "scalar": base[0, 0], "none": base[:0],
        "part": base[1:3, ::2], "spread": base[:1].expand(3, 6), "ü/|.": base.clone(),
    }  # fmt: skip
    digest = write_tensors(tmp_path / "a.safetensors", tensors)
    assert digest == hashlib.sha256((tmp_path / "a.safetensors").read_bytes()).hexdigest()
    read = load_file(tmp_path / "a.safetensors")
    ours = dict(read_tensors(tmp_path / "a.safetensors"))
    for name, tensor in tensors.items():
        for found in (read[name], ours[name]):
            assert found.dtype == tensor.dtype
            assert found.shape == tensor.shape
            bits = tensor.contiguous().reshape(-1).view(torch.uint8)
            assert torch.equal(found.reshape(-1).view(torch.uint8), bits)


def test_a_tensor_that_no_file_can_hold_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="no file can hold"):
        write_tensors(tmp_path / "a.safetensors", {"x": torch.eye(2).to_sparse()})
