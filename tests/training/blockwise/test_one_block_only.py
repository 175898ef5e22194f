"""What a job holds and trains is one block: its activations, its schedule, all of its parts."""

import gc
import json
from pathlib import Path

import pytest
import torch

from shoestring.models.dit import DiT, unit_table
from shoestring.models.dit_config import DiTConfig
from shoestring.objectives.denoise import Denoise
from shoestring.objectives.masked_diffusion import MaskedDiffusion
from shoestring.ops.noise_levels import LogNormal, MaskTime, partition
from shoestring.training.blockwise import job, merging, task
from shoestring.training.blockwise.every import train_every_block
from shoestring.training.blockwise.job import train_block
from shoestring.training.blockwise.merging import load_merged, merge
from shoestring.training.schedule import learning_rate

from .conftest import changed, elsewhere
from .test_jobs import state_of

SIZES = {"layers": 12, "width": 32, "heads": 2, "condition": 16}


def saved_by(kind, blocks, network_blocks):
    """Bytes that autograd keeps of one step of block 1, by the hooks of saved tensors."""
    table, draws = None, torch.Generator().manual_seed(0)
    if kind == "images":
        config = DiTConfig(blocks=network_blocks, size=16, patch=2, **SIZES)
    else:
        config = DiTConfig(blocks=network_blocks, vocabulary=32, length=64, **SIZES)
        table = unit_table(32, config.row, seed=0)
    net = DiT.make(config, seed=0, only=1, table=table).block(1)
    weights = {p.untyped_storage().data_ptr() for p in net.parameters()}
    if table is not None:
        weights.add(table.untyped_storage().data_ptr())
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        if kind == "images":
            objective = Denoise(kind="edm", partition=partition(LogNormal(), blocks))
            images = torch.randn(4, 1, 16, 16, generator=draws)
            loss = objective.loss(net, images, objective.draw(1, images, None, draws))
        else:
            masked = MaskedDiffusion(partition=partition(MaskTime(), blocks))
            tokens = torch.randint(32, (4, 64), generator=draws)
            loss = masked.loss(net, tokens, masked.draw(1, tokens, draws), table)
    assert bool(loss.isfinite())
    return sum(kept.values())


def activations_of_a_block_are_its_share(kind, blocks, network_blocks=None):
    whole = saved_by(kind, 1, 1)
    part = saved_by(kind, blocks, network_blocks or blocks)
    assert 1 / blocks - 0.01 < part / whole < 1 / blocks + 0.05


@pytest.mark.parametrize("kind", ["images", "text"])
@pytest.mark.parametrize("blocks", [2, 3, 4])
def test_activations_of_a_block_are_its_share(kind, blocks):
    activations_of_a_block_are_its_share(kind, blocks)


@pytest.mark.parametrize("kind", ["images", "text"])
def test_a_step_through_all_layers_is_seen(kind):
    with pytest.raises(AssertionError):
        activations_of_a_block_are_its_share(kind, 3, network_blocks=1)


def one_block_is_in_memory_at_a_time(config):
    """Of the process that trains all: weights with memory, when any update is made."""
    one = sum(p.numel() for p in task.fresh(task.task_of(config), 1, torch.device("cpu"))
              .block(1).parameters())  # fmt: skip
    gc.collect()
    before = {id(p) for p in gc.get_objects() if type(p) is torch.nn.Parameter}
    held, real = [], job.Job.update

    def update(self):
        real(self)
        ours = [p for p in gc.get_objects() if type(p) is torch.nn.Parameter]
        held.append(sum(p.numel() for p in ours if id(p) not in before and not p.is_meta))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(job.Job, "update", update)
        train_every_block(config)
    assert len(held) == 2 * config.run.steps
    assert set(held) == {one}


def test_one_block_is_in_memory_at_a_time(images):
    one_block_is_in_memory_at_a_time(changed(images, run={"turn": 2, "steps": 4}))


def test_a_process_that_keeps_its_blocks_is_seen(monkeypatch, images):
    kept, real = [], task.fresh
    monkeypatch.setattr(job, "fresh", lambda *args: kept.append(real(*args)) or kept[-1])
    with pytest.raises(AssertionError):
        one_block_is_in_memory_at_a_time(changed(images, run={"turn": 2, "steps": 4}))


def schedule_is_of_the_blocks_own_updates(config):
    train_every_block(changed(config, run={"turn": 3}))
    for block in (1, 2):
        path = Path(config.run.directory) / f"block-{block}" / "metrics.jsonl"
        rates = [json.loads(line)["lr"] for line in path.read_text().splitlines()]
        wanted = [
            learning_rate(config.schedule, step, peak=config.optim.lr, steps=config.run.steps)
            for step in range(1, 7)
        ]
        assert rates == wanted
        assert rates[-1] < 0.5 * max(rates)


def test_schedule_is_of_the_blocks_own_updates(images):
    schedule_is_of_the_blocks_own_updates(images)


def of_all_updates(schedule, step, *, peak, steps):
    return learning_rate(schedule, step, peak=peak, steps=2 * steps)


def rate_of_the_turn(schedule, step, *, peak, steps):
    return learning_rate(schedule, (step - 1) % 3 + 1, peak=peak, steps=steps)


@pytest.mark.parametrize("bug", [of_all_updates, rate_of_the_turn])
def test_one_schedule_for_all_blocks_is_seen(monkeypatch, images, bug):
    monkeypatch.setattr(job, "learning_rate", bug)
    with pytest.raises(AssertionError):
        schedule_is_of_the_blocks_own_updates(images)


def every_part_of_a_block_learns(config):
    """Gates start at 0: where they stay there, a block stays the identity for ever."""
    train_block(config, 1)
    fresh = task.fresh(task.task_of(config), 1, torch.device("cpu")).block(1)
    trained = state_of(config, 1)
    for name, parameter in fresh.named_parameters():
        assert not torch.equal(trained[f"weights {name}"], parameter), name


@pytest.mark.parametrize("kind", ["images", "text"])
def test_every_part_of_a_block_learns(kind, request):
    every_part_of_a_block_learns(request.getfixturevalue(kind))


def test_frozen_gates_are_seen(monkeypatch, images):
    real = job.fresh

    def frozen(*args):
        model = real(*args)
        for layer in model.block(1).layers:
            layer.modulation.requires_grad_(False)
        return model

    monkeypatch.setattr(job, "fresh", frozen)
    with pytest.raises(AssertionError, match="layers"):
        every_part_of_a_block_learns(images)


def the_sampler_has_the_table_of_the_training(config):
    train_every_block(config)
    merged = load_merged(merge([config.run.directory]))
    table = task.task_of(config).table
    assert torch.equal(merged.model.table, table)
    torch.testing.assert_close(table.norm(dim=1), torch.ones(256))
    assert merged.facts["table"] == task.table_digest(table)


def test_the_sampler_has_the_table_of_the_training(text):
    the_sampler_has_the_table_of_the_training(text)


def raw_table(found, digest):
    return 2.5 * REAL_TABLE(found, digest)


def fresh_table(found, digest):
    return unit_table(256, 32, seed=99)


REAL_TABLE = merging._table


@pytest.mark.parametrize("bug", [raw_table, fresh_table])
def test_another_table_in_the_sampler_is_seen(monkeypatch, text, bug):
    monkeypatch.setattr(merging, "_table", bug)
    with pytest.raises(AssertionError):
        the_sampler_has_the_table_of_the_training(text)


def test_all_blocks_are_started_anew_when_asked_and_surplus_ones_go(images, folder):
    train_every_block(changed(images, blockwise={"blocks": 4}))
    with pytest.raises(ValueError, match=r"model\.blocks is 2 now, and was 4"):
        train_every_block(images)
    mine = folder / "run" / "block-4" / "notes.txt"
    mine.write_text("mine")
    done = train_every_block(changed(images, run={"replace": True, "turn": 3}))
    assert [each.updates for each in done] == [6, 6]
    assert load_merged(merge([images.run.directory])).partition.blocks == 2
    assert mine.read_text() == "mine"


def test_nothing_is_lost_to_data_that_cannot_be_read(images):
    train_every_block(images)
    before = state_of(images, 1)
    wrong = changed(images, data={"source": "nowhere"}, run={"replace": True})
    for train in (train_every_block, lambda config: train_block(config, 1)):
        with pytest.raises(ValueError, match="there is no file"):
            train(wrong)
    after = state_of(images, 1)
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_blocks_of_other_seeds_go_together_for_images_and_not_for_text(images, text, folder):
    for config, is_fine in ((images, True), (text, False)):
        config = elsewhere(config, folder / f"one {is_fine}")
        other = elsewhere(config, folder / f"two {is_fine}", run={"seed": 7})
        train_block(config, 1)
        train_block(other, 2)
        both = [config.run.directory, other.run.directory]
        if is_fine:
            merge(both)
        else:
            with pytest.raises(ValueError, match="table is"):
                merge(both)
