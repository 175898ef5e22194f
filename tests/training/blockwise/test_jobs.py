"""Blocks as jobs: apart or in turn, killed or not, the same bits; and nothing of the others."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from shoestring.checkpoint import Store
from shoestring.cli.main import main
from shoestring.errors import CheckpointError, ConfigError, DataError, TrainingDiverged
from shoestring.models.dit import DiT
from shoestring.training.blockwise import job, task
from shoestring.training.blockwise.every import train_every_block
from shoestring.training.blockwise.job import train_block
from shoestring.training.blockwise.merging import merge
from shoestring.training.snapshot import MODEL, OPTIMIZER

from .conftest import bars, changed, elsewhere


def state_of(config, block):
    """Weights and optimizer states of a block's newest checkpoint."""
    folder = Path(config.run.directory) / f"block-{block}"
    saved, wrong = Store(folder / "checkpoints").newest()
    assert not wrong
    return {
        **{f"weights {name}": t for name, t in saved.tensors(MODEL)},
        **{f"states {name}": t for name, t in saved.tensors(OPTIMIZER)},
    }


def call(capsys, *args):
    """(exit code, last JSON line) of a command."""
    capsys.readouterr()
    code = main([*map(str, args), "--json"])
    lines = capsys.readouterr().out.splitlines()
    return code, json.loads(lines[-1]) if lines else None


def equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


def apart_is_in_turn(config, folder):
    """Each block alone, last one first, against all in one process, two updates a turn."""
    alone = elsewhere(config, folder / "alone")
    for block in (2, 1):
        train_block(alone, block)
    in_turn = elsewhere(config, folder / "in turn", run={"turn": 2})
    assert [each.status for each in train_every_block(in_turn)] == ["finished"] * 2
    for block in (1, 2):
        assert equal(state_of(alone, block), state_of(in_turn, block))
    assert not equal(state_of(alone, 1), state_of(alone, 2))


def test_blocks_of_images_trained_apart_are_those_trained_in_turn(images, folder):
    apart_is_in_turn(images, folder)


def test_blocks_of_text_trained_apart_are_those_trained_in_turn(text, folder):
    apart_is_in_turn(text, folder)


def test_blocks_of_a_flow_trained_apart_are_those_trained_in_turn(images, folder):
    apart_is_in_turn(changed(images, blockwise={"objective": "flow"}), folder)


def one_generator_for_all(*numbers):
    return SHARED


def weights_by_order_of_making(self, block, *, seed, device="cpu"):
    self.block(block).to_empty(device=device).reset(SHARED)


def forgotten_states(saved, model, optimizer, world):
    RESTORE(saved, model, optimizer, world)
    optimizer.state.clear()


SHARED = torch.Generator()
RESTORE = job.restore


@pytest.mark.parametrize(
    ("owner", "name", "bug"),
    [
        (task, "generator_of", one_generator_for_all),
        (DiT, "fill", weights_by_order_of_making),
        (job, "restore", forgotten_states),
    ],
)
def test_planted_bug_of_isolation_is_seen(monkeypatch, images, folder, owner, name, bug):
    SHARED.manual_seed(0)
    monkeypatch.setattr(owner, name, bug)
    with pytest.raises(AssertionError):
        apart_is_in_turn(images, folder)


def test_a_process_of_its_own_gives_the_same_bits(images, folder):
    alone = elsewhere(images, folder / "process")
    (folder / "alone.toml").write_text(alone.to_toml())
    source = Path(job.__file__).parents[3]
    environment = {**os.environ, "PYTHONPATH": str(source)}
    command = [sys.executable, "-m", "shoestring", "train", str(folder / "alone.toml")]
    done = subprocess.run(
        [*command, "--block", "2", "--json"],
        env=environment, capture_output=True, text=True, check=True,
    )  # fmt: skip
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert lines[-1]["receipt"]["status"] == "finished"
    assert {"begin", "step", "checkpoint", "end", "done"} == {line["event"] for line in lines}
    assert not (folder / "process" / "block-1").exists()
    threads = lines[-1]["receipt"]["hardware"]["threads"]
    if threads != torch.get_num_threads():
        pytest.skip("sums depend on the number of threads")
    train_every_block(images)
    assert equal(state_of(alone, 2), state_of(images, 2))


@pytest.mark.parametrize("at", [1, 3, 5])
def test_a_killed_block_goes_on_bit_for_bit(monkeypatch, images, folder, at):
    whole = elsewhere(images, folder / "whole")
    train_block(whole, 1)
    real = job.Job.update

    def killed(self):
        if self.updates == at:
            raise KeyboardInterrupt
        real(self)

    with monkeypatch.context() as patch:
        patch.setattr(job.Job, "update", killed)
        with pytest.raises(KeyboardInterrupt):
            train_block(images, 1)
    done = train_block(images, 1)
    assert done.status == "finished"
    assert equal(state_of(images, 1), state_of(whole, 1))
    names = [Path(c.run.directory) / "block-1" / "metrics.jsonl" for c in (images, whole)]
    steps = [[json.loads(line)["step"] for line in n.read_text().splitlines()] for n in names]
    assert steps[0] == steps[1] == [1, 2, 3, 4, 5, 6]


def test_an_interrupted_block_saves_and_says_so(monkeypatch, images):
    import signal

    real = job.Job.update

    def update(self):
        real(self)
        if self.updates == 3:
            signal.raise_signal(signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(job.Job, "update", update)
        done = train_block(images, 2)
    assert (done.status, done.updates) == ("interrupted", 3)
    assert train_block(images, 2).status == "finished"


@pytest.mark.parametrize("turn", [0, 2])
@pytest.mark.parametrize("event", ["step", "checkpoint"])
def test_an_interruption_in_the_last_update_of_a_turn_stops_the_run(images, turn, event):
    """Planted: only a signal before the last update was heeded, and the next block began."""
    asked = []

    def interrupt(told):
        if told["event"] == event and told["step"] == (turn or 6) and not asked:
            asked.append(told["block"])
            os.kill(os.getpid(), signal.SIGINT)

    run = changed(images, run={"turn": turn, "save_every": 0})
    done = train_every_block(run, progress=interrupt)
    assert asked == [1]
    assert [(each.block, each.updates) for each in done] == [(1, turn or 6)]
    assert done[0].status == ("interrupted" if turn else "finished")
    assert [each.status for each in train_every_block(run)] == ["finished"] * 2


def test_turns_that_were_made_are_not_made_again(images):
    run, begun = changed(images, run={"turn": 2}), []
    train_every_block(run)
    train_every_block(
        run, progress=lambda told: begun.append(told["block"]) if told["event"] == "begin" else None
    )
    assert begun == [1, 2]


@pytest.mark.parametrize(
    ("section", "values", "name"),
    [
        ("run", {"seed": 9}, "run.seed"),
        ("data", {"batch_size": 3}, "data.batch_size"),
        ("optim", {"lr": 0.5}, "optim.lr"),
        ("schedule", {"warmup_share": 0.5}, "schedule.warmup_share"),
    ],
)
def test_an_unfinished_block_does_not_go_on_with_other_updates(images, section, values, name):
    train_block(images, 1, until=2)
    with pytest.raises(ConfigError, match=name):
        train_block(changed(images, **{section: values}), 1)


def test_fewer_updates_than_were_made_are_refused(images):
    train_block(images, 1)
    with pytest.raises(ConfigError, match="has made 6"):
        train_block(changed(images, run={"steps": 4}), 1)


def test_a_checkpoint_that_was_passed_over_is_told(images, capsys):
    train_block(images, 1)
    newest = Path(images.run.directory) / "block-1" / "checkpoints" / "step-6"
    (newest / "model.safetensors").write_bytes(b"damaged")
    with pytest.raises(ConfigError, match=r"4 of its 6 updates; newer, and damaged: .*step-6"):
        merge([images.run.directory])
    told = []
    train_block(images, 1, progress=told.append)
    assert "step-6" in next(each for each in told if each["event"] == "skipped")["what"]


def test_a_finished_block_is_left_as_it_is_and_replaced_when_asked(images):
    before = train_block(images, 1)
    weights = state_of(images, 1)
    again = train_block(images, 1)
    assert again.receipt["held_out"] == before.receipt["held_out"]
    assert equal(state_of(images, 1), weights)
    other = changed(images, run={"seed": 5, "replace": True})
    assert train_block(other, 1).updates == 6
    assert not equal(state_of(images, 1), weights)


def test_more_updates_are_made_where_steps_were_raised(images):
    train_block(images, 1)
    assert train_block(changed(images, run={"steps": 8}), 1).updates == 8


def test_accumulated_microbatches_are_one_update(images):
    one = train_block(changed(images, optim={"accumulate": 2}), 1)
    assert one.updates == 6
    assert one.status == "finished"


@pytest.mark.parametrize("kind", ["images", "text"])
def test_a_job_holds_no_other_block(kind, request):
    config = request.getfixturevalue(kind)
    made = task.task_of(config)
    model = task.fresh(made, 2, torch.device("cpu"))
    assert all(p.is_meta for p in model.block(1).parameters())
    own = sum(p.numel() * 4 for p in model.block(2).parameters())
    table = 0 if made.table is None else made.table.numel() * 4
    peak = train_block(config, 2).receipt["peak"]["by_category"]
    assert own <= peak["weights"] <= own + table
    assert peak["gradients"] <= own
    assert peak["optimizer"] <= 2 * own + 4 * len(list(model.block(2).parameters()))


def test_a_run_of_another_kind_in_the_same_place_is_not_gone_on_with(images, text):
    train_block(images, 2)
    with pytest.raises(ConfigError, match=r"or give another run\.directory"):
        train_block(text, 2)


def test_numbers_that_are_not_finite_stop_before_the_update(monkeypatch, images):
    monkeypatch.setattr(
        task.Images, "loss", lambda self, net, block, g: net.head.weight.sum() * float("nan")
    )
    with pytest.raises(TrainingDiverged, match="block 1, update 1: loss nan"):
        train_block(images, 1)
    assert not (Path(images.run.directory) / "block-1" / "checkpoints").exists()


# ---- bad input ---------------------------------------------------------------------------------


@pytest.mark.parametrize("block", [0, 3, -1])
def test_a_block_that_there_is_not_is_refused_before_data_are_read(images, block):
    lost = changed(images, data={"source": "nowhere"})
    with pytest.raises(ConfigError, match=r"1 to blockwise\.blocks = 2"):
        train_block(lost, block)


@pytest.mark.parametrize(
    ("section", "values", "name"),
    [
        ("model", {"hidden_size": 16}, "model.width is 16 now, and was 32"),
        ("blockwise", {"overlap": 0.1}, "partition.overlap is 0.1 now, and was 0.05"),
        ("blockwise", {"sigma_max": 40.0}, "partition.law.high is 40.0 now, and was 80.0"),
        ("blockwise", {"data_std": 0.4}, "objective.data_std is 0.4 now"),
    ],
)
def test_a_block_does_not_go_on_with_other_settings(images, section, values, name):
    train_block(images, 1)
    with pytest.raises(ConfigError, match=name):
        train_block(changed(images, **{section: values}), 1)


def test_a_block_whose_checkpoints_are_all_damaged_says_so(images):
    train_block(images, 1)
    folder = Path(images.run.directory) / "block-1" / "checkpoints"
    for file in folder.glob("*/model.safetensors"):
        file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=r"can be used.*run\.replace"):
        train_block(images, 1)


def test_two_jobs_of_one_block_do_not_meet(images):
    with (
        job.Job(images, 1, None, None),
        pytest.raises(CheckpointError, match="in use by another process"),
    ):
        train_block(images, 1)


def written(folder, **tensors):
    from safetensors.torch import save_file

    save_file(tensors, folder / "bad.safetensors")
    return str(folder / "bad.safetensors")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": None}, "a tensor `images`"),
        ({"images": torch.zeros(4, 8, 8)}, r"images \(N, C, H, W\)"),
        ({"images": torch.zeros(1, 1, 8, 8)}, "2 or more images"),
        ({"images": torch.zeros(4, 1, 8, 8).double()}, "bytes or float32"),
        ({"images": torch.full((4, 1, 8, 8), 2.0)}, r"beyond \[-1, 1\]"),
        ({"labels": torch.zeros(3).long()}, "whole numbers from 0 on"),
        ({"labels": torch.full((120,), -1)}, "whole numbers from 0 on"),
    ],
)
def test_images_that_cannot_be_used_are_refused(images, folder, change, message):
    tensors = {k: v for k, v in {**bars(), **change}.items() if v is not None}
    config = changed(images, data={"source": written(folder, **tensors)})
    with pytest.raises(DataError, match=message):
        train_block(config, 1)


def test_data_that_are_not_there_are_told(images, text, folder):
    with pytest.raises(DataError, match="a safetensors file with images"):
        train_block(changed(images, data={"source": str(folder / "none")}), 1)
    (folder / "notes").write_text("no tensors")
    with pytest.raises(DataError, match="a safetensors file"):
        train_block(changed(images, data={"source": str(folder / "notes")}), 1)
    with pytest.raises(DataError, match=r"data\.sequence_length = 9000"):
        train_block(changed(text, data={"sequence_length": 9000}), 1)


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (torch.ones(256, 8), "rows of length 1"),
        (torch.eye(8), r"\(256, W\)"),
        (torch.full((256, 8), float("nan")), "rows of length 1"),
        (None, "cannot be read"),
    ],
)
def test_a_table_that_cannot_be_used_is_refused(text, folder, table, message):
    path = str(folder / "none")
    if table is not None:
        path = written(folder, table=table)
    with pytest.raises(ConfigError, match=message):
        train_block(changed(text, blockwise={"table": path}), 1)


def test_a_table_of_ones_own_is_used(text, folder):
    table = torch.nn.functional.normalize(torch.randn(256, 8), dim=1)
    config = changed(text, blockwise={"table": written(folder, table=table)})
    done = train_block(config, 1)
    assert done.receipt["identity"]["table"] == task.table_digest(table)
    assert done.receipt["identity"]["model"]["table_width"] == 8


def test_images_held_out_are_mixed_where_a_file_has_one_class_after_the_other(folder):
    from safetensors.torch import save_file

    from shoestring.training.blockwise.pictures import read_pictures

    save_file(
        {"images": torch.zeros(900, 1, 8, 8), "labels": torch.arange(900) // 300},
        folder / "sorted.safetensors",
    )
    train, held_out = read_pictures(folder / "sorted.safetensors", 0.1)
    assert (len(train), len(held_out)) == (810, 90)
    _, labels = held_out.batch(torch.arange(20))
    assert len(labels.unique()) == 3
    assert float((labels == labels.roll(1)).double().mean()) < 0.7
