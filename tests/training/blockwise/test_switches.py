"""Sequential blocks, chains followed, useful edges and rows of an encoder: the same bits however
they are trained, merged models that answer, and errors before anything is lost."""

import json
from pathlib import Path

import pytest
import torch

from shoestring.cli.main import main
from shoestring.errors import CheckpointError, ConfigError
from shoestring.meter.outside import is_outside
from shoestring.objectives import label_denoising
from shoestring.training.blockwise import answers, handed, on_ray, sampling, task
from shoestring.training.blockwise.every import train_every_block
from shoestring.training.blockwise.handed import read_handed
from shoestring.training.blockwise.job import Job, train_block
from shoestring.training.blockwise.merging import load_merged, merge
from shoestring.training.blockwise.sampling import Read, classify

from .conftest import changed, elsewhere
from .test_jobs import equal, state_of

SWITCHES = {
    "useful": {"spacing": "useful"},
    "sequential": {"sequential": True, "top_blocks": "all"},
    "chain": {"chain_steps": 4},
    "both": {"sequential": True, "chain_steps": 4, "top_blocks": "all"},
}


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("SHOESTRING_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def labels(images):
    return changed(
        images, blockwise={"objective": "labels", "top_share": 0.3, "sigma_max": 10.0},
        optim={"lr": 3e-3},
    )  # fmt: skip


def answers_are_right(config, least=0.9):
    merged = load_merged(merge([config.run.directory]))
    images, labels = task.task_of(config).train.batch(torch.arange(90))
    answered = classify(merged, images, draws=4)
    assert (answered.argmax(dim=1) == labels).double().mean() > least
    return merged, images


def folder_of(config, block):
    return Path(config.run.directory) / f"block-{block}"


# ---- the same bits -------------------------------------------------------------------------------


@pytest.mark.parametrize("switches", SWITCHES.values(), ids=SWITCHES)
def test_blocks_on_top_of_each_other_are_the_same_apart_and_in_turn(labels, folder, switches):
    config = changed(labels, blockwise=switches)
    alone = elsewhere(config, folder / "alone")
    for block in (1, 2):
        train_block(alone, block)
    turn = 0 if switches.get("sequential") else 2
    in_turn = elsewhere(config, folder / "in turn", run={"turn": turn})
    assert [each.status for each in train_every_block(in_turn)] == ["finished"] * 2
    assert [each.updates for each in train_every_block(in_turn)] == [config.updates] * 2
    for block in (1, 2):
        assert equal(state_of(alone, block), state_of(in_turn, block))
    plain = elsewhere(labels, folder / "plain")
    train_every_block(plain)
    assert not equal(state_of(alone, 2), state_of(plain, 2))


@pytest.mark.parametrize("at", [3, 6, 8])
def test_a_killed_block_on_top_of_another_goes_on_bit_for_bit(monkeypatch, labels, folder, at):
    config = changed(labels, blockwise=SWITCHES["both"])
    whole = elsewhere(config, folder / "whole")
    train_every_block(whole)
    real = Job.update

    def killed(self):
        if self.block == 2 and self.updates == at:
            raise KeyboardInterrupt
        real(self)

    with monkeypatch.context() as patch:
        patch.setattr(Job, "update", killed)
        with pytest.raises(KeyboardInterrupt):
            train_every_block(config)
    train_every_block(config)
    assert equal(state_of(config, 2), state_of(whole, 2))


def test_what_was_trained_apart_is_kept_until_the_block_before_is_there(labels, folder):
    config = changed(labels, blockwise=SWITCHES["chain"])
    with pytest.raises(ConfigError, match=r"block 2 cannot be trained along the chain: block 1"):
        train_block(config, 2)
    assert (
        json.loads((folder_of(config, 2) / "metrics.jsonl").read_text().splitlines()[-1])["step"]
        == 6
    )
    assert len(state_of(config, 2)) > 0
    train_block(config, 1)
    train_block(config, 2)
    whole = elsewhere(config, folder / "whole")
    train_every_block(whole)
    assert equal(state_of(config, 2), state_of(whole, 2))


def test_jobs_of_ray_wait_for_what_they_stand_on(labels):
    assert on_ray.rounds(labels) == [([1, 2], 6)]
    chained = changed(labels, blockwise=SWITCHES["chain"])
    assert on_ray.rounds(chained) == [([1, 2], 6), ([1], 10), ([2], 10)]
    sequential = changed(labels, blockwise=SWITCHES["both"])
    assert on_ray.rounds(sequential) == [([1], 10), ([2], 10)]


# ---- sequential ----------------------------------------------------------------------------------


def rows_are_those_of_the_network(config):
    """What block 2 was trained on is what the merged model has it read."""
    merged, _ = answers_are_right(config)
    data = task.task_of(config)
    found = read_handed(folder_of(config, 1) / "handed")
    for name, part in (("train", data.train), ("held_out", data.held_out)):
        images, _ = part.batch(torch.arange(len(part)))
        torch.testing.assert_close(found.tensors[name], Read(merged, images).by(2))
    read = Read(merged, images)
    later, first = read.by(2), read.by(1)
    assert torch.equal(first, images)
    assert torch.equal(read.by(2), later)


def rows_of_noise(self, net, seen, width):
    z = torch.randn(len(seen), width)
    return net.rows(z, torch.zeros(len(seen)), seen)


def rows_backwards(self):
    for rows in reversed(torch.arange(self.shape[0]).split(self._batch)):
        yield self._make(rows).float()


def test_a_sequential_block_reads_the_same_rows_in_training_and_after(monkeypatch, labels):
    config = changed(
        labels, blockwise=SWITCHES["sequential"], run={"steps": 60}, data={"batch_size": 32}
    )
    train_every_block(config)
    rows_are_those_of_the_network(config)
    fresh = changed(config, run={"replace": True, "steps": 20})
    bugs = [
        (label_denoising.LabelDenoising, "rows", rows_of_noise),
        (handed.Batches, "parts", rows_backwards),
    ]
    for owner, name, bug in bugs:
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, bug)
            train_every_block(fresh)
            with pytest.raises(AssertionError):
                rows_are_those_of_the_network(fresh)


def test_a_sequential_block_holds_no_other_block_and_no_image(labels):
    config = changed(labels, blockwise=SWITCHES["sequential"])
    train_block(config, 1)
    with Job(config, 2, None, None) as job:
        assert all(p.is_meta for p in job.model.block(1).parameters())
        assert not hasattr(job.net, "patches")
        assert is_outside(job.task._rows["train"].untyped_storage())
        before = job.task._rows["train"][:3].clone()
        job.update()
        seen, labels_of = job.task._seen("train", torch.tensor([5, 2]))
        assert torch.equal(seen, job.task._rows["train"][[5, 2]])
        assert torch.equal(labels_of, job.task.train.labels[[5, 2]])
        assert torch.equal(before, job.task._rows["train"][:3])


def test_a_block_before_that_is_missing_or_another_is_named(labels, folder, capsys):
    config = changed(labels, blockwise=SWITCHES["sequential"])
    with pytest.raises(ConfigError, match=r"block 2 cannot be trained: block 1 is not finished"):
        train_block(config, 2)
    assert not (folder_of(config, 2) / "checkpoints").exists()
    train_block(config, 1, until=3)
    with pytest.raises(ConfigError, match="block 1 is not finished"):
        train_block(config, 2)
    train_every_block(config)
    other = elsewhere(config, folder / "other", run={"seed": 1})
    other = changed(
        other, blockwise={"table": str(folder_of(config, 1) / "table/table.safetensors")}
    )
    train_every_block(other)
    with pytest.raises(ConfigError, match=r"block 2 .* was trained on another block 1"):
        merge([folder_of(config, 1), folder_of(other, 2)], folder / "wrong")
    assert not (folder / "wrong").exists()
    # trained again beneath it
    train_block(changed(config, run={"replace": True, "seed": 3},
                        blockwise={"table": other.blockwise.table}), 1)  # fmt: skip
    with pytest.raises(ConfigError, match="is not the one in"):
        train_block(config, 2)
    (folder / "turn.toml").write_text(config.to_toml().replace("turn = 0", "turn = 2"))
    assert main(["train", str(folder / "turn.toml")]) == 2
    assert "a block is finished before" in capsys.readouterr().err


def test_damage_of_what_was_handed_over_is_seen(labels):
    config = changed(labels, blockwise=SWITCHES["sequential"])
    train_block(config, 1)
    path = folder_of(config, 1) / "handed" / handed.HANDED
    whole = path.read_bytes()
    path.write_bytes(whole[:-4] + b"\0\0\1\0")
    with pytest.raises(CheckpointError, match="handed"):
        train_block(config, 2)


# ---- along the chain -----------------------------------------------------------------------------


def the_chain_goes_on(config):
    """What block 1 left is one step down from noise, toward the sample it is of."""
    merged, _ = answers_are_right(config)
    data = task.task_of(config)
    chain = read_handed(folder_of(config, 1) / "handed").tensors["chain"]
    z = chain.view(answers.CHAINS, len(data.train), -1)
    low = merged.partition.range(1)[0]
    clean = data.table[data.train.labels]
    # noise of the next level around the right row, were block 1's answers all right
    assert (z - clean).square().mean().sqrt() == pytest.approx(low, rel=0.15)
    assert float((z.mean(0) - clean).norm(dim=1).mean()) < 0.75 * low * z.shape[2] ** 0.5
    assert not torch.equal(z[0], z[1])


def level_kept(z, clean, level, following):
    return z


def other_samples(self, block, places, generator):
    return ENTERS(self, block, places.roll(1), generator)


ENTERS = answers.Answers._enters


def test_a_chain_is_left_where_the_next_block_takes_it_up(monkeypatch, labels):
    config = changed(
        labels, blockwise={"chain_steps": 10}, run={"steps": 60}, data={"batch_size": 32}
    )
    train_every_block(config)
    the_chain_goes_on(config)
    with monkeypatch.context() as patch:
        patch.setattr(answers, "euler_step", level_kept)
        fresh = changed(config, run={"replace": True})
        train_every_block(fresh)
        with pytest.raises(AssertionError):
            the_chain_goes_on(fresh)


def calls_of_chain_losses(config, monkeypatch, block=2):
    """(z, level) of the graded call that `chain_losses` makes of a block, and its task."""
    made = []
    with Job(config, block, None, None) as job:
        data = job.task
        data.stands_on(block, chained=True)
        real = data.objective.logits

        def logits(net, z, level, seen):
            if torch.is_grad_enabled():
                made.append((z, level))
            return real(net, z, level, seen)

        with monkeypatch.context() as patch:
            patch.setattr(type(data.objective), "logits", lambda self, *given: logits(*given))
            data.chain_losses(job.net, block, 10, torch.Generator().manual_seed(0))
    return made, data


def test_the_last_block_answers_at_the_levels_that_a_chain_calls_it_at(monkeypatch, labels):
    config = changed(labels, blockwise=SWITCHES["chain"])
    train_every_block(config)
    made, data = calls_of_chain_losses(config, monkeypatch)
    assert len(made) == 1  # the step of its own has no graph
    z, level = made[0]
    low, high = data.parts.range(2)
    assert level.tolist() == [low] * 5 + [high] * 5
    chain = data._chain
    assert all(bool((chain == row).all(dim=1).any()) for row in z[5:])
    assert not any(bool((chain == row).all(dim=1).any()) for row in z[:5])
    made, data = calls_of_chain_losses(config, monkeypatch, block=1)
    assert set(made[0][1].tolist()) == {10.0}


def test_the_rate_of_updates_along_the_chain_starts_anew_and_lower(labels):
    config = changed(
        labels, blockwise={"chain_steps": 10, "chain_rate": 0.1},
        run={"steps": 10}, schedule={"warmup_share": 0.2, "final_share": 0.0},
    )  # fmt: skip
    with Job(config, 1, None, None) as job:
        rates = [job._learning_rate(step) for step in range(1, 21)]
    assert rates[10:] == pytest.approx([rate / 10 for rate in rates[:10]])
    assert max(rates) == rates[1] == config.optim.lr


# ---- useful edges --------------------------------------------------------------------------------


def test_useful_edges_are_those_of_the_data_and_merge(labels, folder):
    config = changed(
        labels, blockwise={"spacing": "useful"}, run={"steps": 60}, data={"batch_size": 32}
    )
    train_every_block(config)
    merged, images = answers_are_right(config)
    edges = merged.partition.edges
    assert edges[0] == pytest.approx(1 / (2 * torch.tensor(3.0).log().item()) ** 0.5, abs=1e-3)
    assert task.task_of(config).parts.edges == edges
    with pytest.raises(ConfigError, match=r"0\.6746 to 10"):
        classify(merged, images, first=0.1)
    plain = elsewhere(changed(config, blockwise={"spacing": "equal"}), folder / "plain")
    train_every_block(changed(plain, run={"steps": 60}))
    with pytest.raises(ConfigError, match="partition"):
        merge([folder_of(config, 1), folder_of(plain, 2)], folder / "wrong")


@pytest.mark.parametrize("objective", ["edm", "flow"])
def test_images_have_useful_edges_too(images, objective):
    config = changed(images, blockwise={"spacing": "useful", "objective": objective})
    train_every_block(config)
    merged = load_merged(merge([config.run.directory]))
    equal_shares = task.task_of(changed(images, blockwise={"objective": objective})).parts
    assert merged.partition.edges[1] != equal_shares.edges[1]
    assert torch.isfinite(sampling.sample_images(merged, 2)).all()


# ---- an encoder's rows ---------------------------------------------------------------------------


@pytest.fixture
def encoder(labels, folder):
    config = elsewhere(
        changed(labels, blockwise={"blocks": 1, "top_share": 1.0}, model={"hidden_size": 16}),
        folder / "encoder", run={"steps": 60},
    )  # fmt: skip
    config = changed(config, data={"batch_size": 32})
    train_every_block(config)
    merge([config.run.directory])
    return config


def test_blocks_read_a_frozen_encoders_rows_and_carry_it_along(labels, encoder, folder):
    config = changed(
        labels, blockwise={"context": encoder.run.directory}, run={"steps": 60},
        data={"batch_size": 32},
    )  # fmt: skip
    alone = elsewhere(config, folder / "alone")
    for block in (2, 1):
        train_block(alone, block)
    entries = list((folder / "cache" / "blockwise").iterdir())
    assert len(entries) == 1
    path = entries[0] / handed.HANDED
    path.write_bytes(path.read_bytes()[:-4] + b"\0\0\1\0")  # damaged: made again
    train_every_block(config)
    for block in (1, 2):
        assert equal(state_of(alone, block), state_of(config, block))
    with Job(config, 2, None, None) as job:
        assert job.net.stem.in_features == 16
        assert sum(p.numel() for p in job.net.parameters()) == sum(
            p.numel() for p in job.model.block(2).parameters()
        )
    merged, images = answers_are_right(config)
    (folder / "encoder").rename(folder / "gone")
    again = load_merged(config.run.directory)
    assert torch.equal(classify(again, images), classify(merged, images))
    with torch.no_grad():
        for parameter in merged.encoder.model.parameters():
            parameter.zero_()
    assert classify(merged, images).argmax(1).unique().numel() == 1


def test_what_is_no_encoder_is_refused(labels, images, encoder, folder):
    two = elsewhere(labels, folder / "two")
    train_every_block(two)
    with pytest.raises(ConfigError, match="have not been merged"):
        task.task_of(changed(labels, blockwise={"context": two.run.directory}))
    merge([two.run.directory])
    with pytest.raises(ConfigError, match=r"2 blocks.*with one block"):
        task.task_of(changed(labels, blockwise={"context": two.run.directory}))
    with pytest.raises(CheckpointError, match="no merged model"):
        task.task_of(changed(labels, blockwise={"context": str(folder / "nothing")}))
    config = changed(labels, blockwise={"context": encoder.run.directory})
    train_every_block(config)
    weights = folder_of(config, 1) / "context" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4] + b"\0\0\1\0")
    with pytest.raises(CheckpointError):
        merge([config.run.directory])


def test_a_quiet_start_lets_less_of_z_in_and_is_the_same_bits_apart(labels, folder):
    config = changed(labels, blockwise={"quiet_start": True})
    made = [task.fresh(task.task_of(c), 2, torch.device("cpu")).block(2) for c in (config, labels)]
    assert torch.equal(made[0].embed.weight, made[1].embed.weight * answers.QUIET)
    assert float(made[0].embed.bias.detach().std()) > 0.5
    assert torch.equal(made[0].patches.weight, made[1].patches.weight)
    alone = elsewhere(config, folder / "alone")
    train_block(alone, 2)
    train_every_block(config)
    assert equal(state_of(alone, 2), state_of(config, 2))


# ---- within a block ------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["images", "text", "labels"])
def test_layers_recomputed_within_a_block_save_memory_and_change_no_bit(request, folder, kind):
    config = changed(
        request.getfixturevalue(kind), model={"num_hidden_layers": 12}, data={"batch_size": 16}
    )
    saved = {}
    for within in ("keep", "recompute", "offload"):
        each = elsewhere(config, folder / within)
        each = changed(each, blockwise={"within": within, "blocks": 2})
        done = train_block(each, 2)
        assert equal(state_of(each, 2), state_of(elsewhere(config, folder / "keep"), 2))
        saved[within] = done.receipt["peak"]["by_category"]["saved"]
    assert saved["recompute"] < saved["keep"] / 3
    merged = elsewhere(config, folder / "offload")
    train_block(changed(merged, blockwise={"within": "recompute"}), 1)
    assert load_merged(merge([merged.run.directory])).model.config.layers == 12


# ---- what there is not ---------------------------------------------------------------------------


@pytest.mark.parametrize("objective", ["edm", "flow", "masked"])
@pytest.mark.parametrize(
    "switch",
    [
        {"sequential": True},
        {"chain_steps": 3},
        {"context": "there"},
        {"top_blocks": "all"},
        {"quiet_start": True},
    ],
)
def test_a_switch_of_classifiers_is_refused_elsewhere(images, objective, switch):
    with pytest.raises(ConfigError, match=rf"{next(iter(switch))}.*objective = 'labels'"):
        changed(images, blockwise={"objective": objective, **switch})


def test_switches_that_exclude_each_other_are_refused(labels):
    with pytest.raises(ConfigError, match="one of them"):
        changed(labels, blockwise={"sequential": True, "context": "there"})
    with pytest.raises(ConfigError, match="'useful' with objective 'masked'"):
        changed(labels, blockwise={"objective": "masked", "spacing": "useful"})
    with pytest.raises(ConfigError, match="chain_steps"):
        changed(labels, blockwise={"chain_steps": -1})
    useless = changed(labels, blockwise={"spacing": "useful", "sigma_max": 0.5})
    with pytest.raises(ConfigError, match="hides no class"):
        task.task_of(useless)
