"""Blocks put together, told apart where they do not belong together, and drawn from."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from shoestring.cli.main import main
from shoestring.errors import CheckpointError, ConfigError
from shoestring.models.dit_layers import Layer
from shoestring.training.blockwise import sampling, task
from shoestring.training.blockwise.config import BlockwiseConfig
from shoestring.training.blockwise.every import train_every_block
from shoestring.training.blockwise.job import train_block
from shoestring.training.blockwise.merging import load_merged, merge
from shoestring.training.blockwise.sampling import (
    bits_per_character,
    denoised,
    losses_at,
    sample_images,
    sample_text,
)

from .conftest import bars, changed, elsewhere
from .test_jobs import call, state_of


@pytest.fixture
def merged(images):
    train_every_block(images)
    return load_merged(merge([images.run.directory]))


@pytest.fixture
def merged_text(text):
    train_every_block(text)
    return load_merged(merge([text.run.directory]))


def blocks_are_in_their_places(images):
    merged = load_merged(merge([images.run.directory]))
    for block in (1, 2):
        trained = state_of(images, block)
        for name, parameter in merged.model.block(block).named_parameters():
            assert torch.equal(parameter, trained[f"weights {name}"])


def test_merged_blocks_are_the_trained_ones_in_their_places(images):
    train_every_block(images)
    blocks_are_in_their_places(images)


def test_blocks_in_reverse_are_seen(monkeypatch, images):
    from shoestring.training.blockwise import merging

    real = merging._tensors

    def reversed_blocks(blocks, shape):
        tensors = real(blocks, shape)
        swap = {"blocks.0.": "blocks.1.", "blocks.1.": "blocks.0."}
        return {swap.get(k[:9], k[:9]) + k[9:]: v for k, v in tensors.items()}

    train_every_block(images)
    monkeypatch.setattr(merging, "_tensors", reversed_blocks)
    with pytest.raises(AssertionError):
        blocks_are_in_their_places(images)


def test_blocks_of_several_machines_are_merged(images, folder, capsys):
    one, two = (elsewhere(images, folder / name) for name in ("pc 1", "pc 2"))
    train_block(one, 1)
    train_block(changed(two, run={"seed": 9, "steps": 8}), 2)
    place = folder / "joined"
    code, line = call(
        capsys, "merge", one.run.directory, Path(two.run.directory) / "block-2", "--to", place
    )
    assert (code, line) == (0, {"model": str(place), "bits_per_byte": None})
    facts = load_merged(place).facts
    assert [(b["block"], b["updates"], b["seed"]) for b in facts["blocks"]] == [
        (1, 6, 0),
        (2, 8, 9),
    ]


def test_a_table_of_the_training_is_the_table_of_the_sampler(text, merged_text):
    made = task.task_of(text)
    assert torch.equal(merged_text.model.table, made.table)
    assert task.table_digest(merged_text.model.table) == merged_text.facts["table"]
    assert merged_text.model.table.requires_grad is False


# ---- what is refused ---------------------------------------------------------------------------


def refused(capsys, *directories):
    code, line = call(capsys, "merge", *directories)
    assert code in (1, 2)
    return line["error"]["message"]


def test_a_missing_block_is_named(images, capsys):
    train_block(images, 2)
    message = refused(capsys, images.run.directory)
    assert "block 1 of 2 is missing" in message
    assert "--block 1" in message


def test_a_doubled_block_is_named_with_both_places(images, folder, capsys):
    train_every_block(images)
    shutil.copytree(Path(images.run.directory) / "block-2", folder / "copy")
    message = refused(capsys, images.run.directory, folder / "copy")
    assert "block 2 is there twice" in message
    assert str(folder / "copy") in message


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"model": {"hidden_size": 16}}, "model.width is 32 for block 1"),
        ({"blockwise": {"sigma_max": 40.0}}, "partition.law.high is 80.0 for block 1"),
        ({"blockwise": {"spacing": "log"}}, "partition.edges is"),
        ({"blockwise": {"objective": "flow"}}, "partition.law.kind is 'sigma' for block 1"),
        ({"blockwise": {"data_std": 0.3}}, "objective.data_std is 0.5 for block 1"),
        ({"data": {"source": "{folder}/other.safetensors"}}, "Train the blocks on the same file"),
        ({"blockwise": {"blocks": 4}}, "model.blocks is 2 for block 1"),
    ],
)
def test_blocks_of_different_runs_are_refused_and_the_difference_named(
    images, folder, capsys, sections, message
):
    from safetensors.torch import save_file

    save_file(bars(seed=1), folder / "other.safetensors")
    if "data" in sections:
        sections = {"data": {"source": f"{folder}/other.safetensors"}}
    other = elsewhere(images, folder / "other", **sections)
    train_block(images, 1)
    train_block(other, 2)
    said = refused(capsys, images.run.directory, other.run.directory)
    assert message in said
    assert not (Path(images.run.directory) / "model").exists()


def test_blocks_with_different_tables_are_refused(text, folder, capsys):
    other = elsewhere(text, folder / "other", run={"seed": 1})
    train_block(text, 1)
    train_block(other, 2)
    said = refused(capsys, text.run.directory, other.run.directory)
    assert "table is" in said
    assert "blockwise.table" in said


def test_a_block_that_is_not_finished_or_of_another_format_is_refused(images, capsys):
    train_block(images, 1)
    train_block(images, 2, until=4)
    assert "has made 4 of its 6 updates" in refused(capsys, images.run.directory)
    train_block(images, 2)
    from shoestring.checkpoint import Store
    from shoestring.checkpoint.manifest import write_manifest

    saved, _ = Store(Path(images.run.directory) / "block-2" / "checkpoints").newest()
    state = saved.json("state.json")
    state["identity"]["format"] = 99
    (saved.path / "state.json").write_text(json.dumps(state))
    write_manifest(saved.path)
    said = refused(capsys, images.run.directory)
    assert "has format 99" in said
    assert "another version" in said


def test_damage_is_found_before_anything_is_written(text, capsys):
    train_every_block(text)
    table = Path(text.run.directory) / "block-1" / "table" / "table.safetensors"
    table.write_bytes(table.read_bytes()[:-1] + b"x")
    said = refused(capsys, text.run.directory)
    assert "table.safetensors" in said
    assert not (Path(text.run.directory) / "model").exists()


def test_places_that_hold_nothing_are_told(images, folder, capsys):
    assert "does not exist" in refused(capsys, folder / "none")
    assert "holds no trained block" in refused(capsys, folder)
    train_every_block(images)
    code, line = call(capsys, "merge", images.run.directory, "--to", folder)
    assert code == 2
    assert "is no merged model" in line["error"]["message"]
    assert (folder / "bars.safetensors").exists()


def test_a_run_that_was_not_merged_is_not_sampled(images, folder):
    train_every_block(images)
    with pytest.raises(ConfigError, match=r"have not been merged.*shoestring merge"):
        load_merged(images.run.directory)
    with pytest.raises(CheckpointError, match="holds no merged model"):
        load_merged(folder)
    place = merge([images.run.directory])
    (place / "model.safetensors").write_bytes(b"0" * 100)
    with pytest.raises(CheckpointError, match="bytes"):
        load_merged(place)


# ---- the command line --------------------------------------------------------------------------


def test_train_and_merge_from_the_command_line(images, folder, capsys):
    file = folder / "blocks.toml"
    assert call(capsys, "train", file, "--block", "1")[0] == 0
    assert call(capsys, "train", file, "--run.turn", "3")[0] == 0
    code, line = call(capsys, "merge", images.run.directory)
    assert code == 0
    assert load_merged(line["model"]).partition.blocks == 2


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--block", "3"], "1 to blockwise.blocks = 2"),
        (["--blockwise.blocks", "3"], "The nearest: 2 or 4"),
        (["--blockwise.overlap", "1.5"], "a share below 1"),
        (["--blockwise.spacing", "log", "--blockwise.objective", "flow"], "equal or uniform"),
        (["--blockwise.table", "x"], "images are their own targets"),
        (["--blockwise.sigma-min", "100"], "0 < low < high"),
        (["--model.patch-size", "3"], "a multiple of the patch"),
    ],
)
def test_settings_that_cannot_be_used_are_bad_usage(images, folder, capsys, args, message):
    code, line = call(capsys, "train", folder / "blocks.toml", *args)
    assert code == 2
    assert message in line["error"]["message"]
    assert not (folder / "run" / "block-1" / "checkpoints").exists()


def test_a_flag_of_blocks_that_is_no_more_than_a_name_leaves_the_file_alone(images, folder, capsys):
    code, line = call(capsys, "train", "--blockwise.quiet-start", folder / "blocks.toml")
    assert code == 2
    assert "quiet_start" in line["error"]["message"]  # of labels only


def test_a_block_that_is_named_twice_is_taken_once(images):
    train_every_block(images)
    assert merge([f"{images.run.directory}/block-1", images.run.directory]).is_dir()


def test_a_block_of_a_run_without_blocks_is_bad_usage(folder, capsys):
    (folder / "plain.toml").write_text("[run]\nsteps = 1\n")
    code, line = call(capsys, "train", folder / "plain.toml", "--block", "1")
    assert code == 2
    assert "has no table [blockwise]" in line["error"]["message"]


def test_help_of_a_file_with_blocks_shows_its_flags(folder, capsys):
    with pytest.raises(SystemExit):
        main(["train", str(folder / "blocks.toml"), "--help"])
    said = capsys.readouterr().out
    assert "--block" in said
    assert "--blockwise.overlap" in said


def test_config_comes_back_from_its_own_toml(images, folder):
    (folder / "again.toml").write_text(images.to_toml())
    assert BlockwiseConfig.load(folder / "again.toml") == images


# ---- drawing -----------------------------------------------------------------------------------


def test_every_step_runs_the_owner_of_its_level_and_no_other(merged):
    ran = []
    for name, module in merged.model.named_modules():
        if isinstance(module, Layer):
            module.register_forward_hook(lambda *_, name=name: ran.append(name.split(".")[1]))
    sample_images(merged, 2)
    assert ran == ["0", "0", "1", "1", "1", "1"]  # two layers a block: block 1, block 2, block 2
    ran.clear()
    denoised(merged, torch.zeros(1, 1, 8, 8), 0.01)
    assert ran == ["1", "1"]


def test_a_router_that_inverts_the_blocks_is_seen(monkeypatch, merged):
    real = sampling._owner
    monkeypatch.setattr(sampling, "_owner", lambda merged, level: 3 - real(merged, level))
    with pytest.raises(AssertionError):
        test_every_step_runs_the_owner_of_its_level_and_no_other(merged)


def test_images_repeat_with_the_seed_and_differ_with_class_and_guidance(merged):
    def some(**more):
        return sample_images(merged, 3, **{"seed": 1, "labels": [0, 1, 2], "steps": 5, **more})

    assert torch.equal(some(), some())
    assert some().shape == (3, 1, 8, 8)
    assert torch.isfinite(some()).all()
    assert not torch.equal(some(), some(seed=2))
    assert not torch.equal(some(), some(labels=[1, 1, 2]))
    assert not torch.equal(some(), some(guidance=2.0))
    torch.testing.assert_close(some(guidance=0.0), some(labels=None), rtol=1e-4, atol=1e-4)
    assert torch.isfinite(some(first=5.0)).all()


@pytest.mark.slow  # trains for a minute
@pytest.mark.parametrize("objective", ["edm", "flow"])
def test_images_that_are_drawn_show_their_class(images, objective):
    config = changed(
        images, run={"steps": 400}, optim={"lr": 3e-3}, data={"batch_size": 32},
        blockwise={"objective": objective},
    )  # fmt: skip
    train_every_block(config)
    merged = load_merged(merge([config.run.directory]))
    labels = [0, 1, 2] * 10
    drawn = sample_images(merged, 30, labels=labels, steps=20, guidance=1.5)
    columns = drawn[:, 0].mean(dim=1)[:, :6].view(30, 3, 2).mean(dim=2)
    assert (columns.argmax(dim=1) == torch.tensor(labels)).double().mean() > 0.9


def test_images_and_classes_that_do_not_fit_are_refused(merged, images):
    shown, labels = task.read_pictures(images.data.source, 0.1)[1].batch(torch.arange(8))
    with pytest.raises(ConfigError, match=r"images of shape \(8, 1, 8, 7\)"):
        losses_at(merged, shown[..., :7], labels, [0.5])
    with pytest.raises(ConfigError, match=r"class 99; expected 0 to 2, or 3 for none"):
        losses_at(merged, shown, labels.clamp(0, 0) + 99, [0.5])
    with pytest.raises(ConfigError, match="0 images"):
        sample_images(merged, 0)


def test_losses_are_of_the_owner_of_each_level(merged, images):
    shown, labels = task.read_pictures(images.data.source, 0.1)[1].batch(torch.arange(8))
    both = losses_at(merged, shown, labels, [0.01, 5.0])
    assert losses_at(merged, shown, labels, [5.0]) == both[1:]
    with torch.no_grad():
        for parameter in merged.model.block(1).parameters():
            parameter.fill_(float("nan"))
    alone = losses_at(merged, shown, labels, [0.01])
    assert alone == both[:1]


def test_bits_of_a_text_are_the_sum_of_its_blocks(text, merged_text):
    made = task.task_of(text)
    texts = made.held_out.batch(made.held_out.rows(16), 16)
    bits, parts = bits_per_character(merged_text, texts)
    assert len(parts) == 2
    assert bits == pytest.approx(sum(parts))
    assert 4 < bits < 9  # a little better than knowing nothing, which is 8
    apart = [made.evaluate(merged_text.model.block(b), b)["bits per byte"] for b in (1, 2)]
    assert bits == pytest.approx(sum(apart), rel=0.1)


def test_merge_tells_the_bits_that_the_blocks_found(text, capsys):
    done = train_every_block(text)
    found = sum(each.receipt["held_out"]["bits per byte"] for each in done)
    assert call(capsys, "merge", text.run.directory)[1]["bits_per_byte"] == pytest.approx(found)
    train_block(changed(text, run={"steps": 8}), 2)
    (Path(text.run.directory) / "block-2" / "receipt.json").unlink()
    assert call(capsys, "merge", text.run.directory)[1]["bits_per_byte"] is None


def test_texts_are_drawn_whole_and_repeat_with_the_seed(merged_text):
    drawn = sample_text(merged_text, 4, steps=8, seed=3)
    assert drawn.shape == (4, 16)
    assert 0 <= int(drawn.min()) <= int(drawn.max()) < 256
    assert torch.equal(drawn, sample_text(merged_text, 4, steps=8, seed=3))
    assert not torch.equal(drawn, sample_text(merged_text, 4, steps=8, seed=4))


def test_a_text_is_drawn_from_the_rows_that_the_blocks_name(merged_text):
    with torch.no_grad():
        for block in (1, 2):
            head = merged_text.model.block(block).head
            head.weight.zero_()
            head.bias.copy_(100 * merged_text.model.table[ord("A")])
    assert sample_text(merged_text, 2, steps=4).unique().tolist() == [ord("A")]


def test_models_are_not_asked_for_what_they_are_not(merged):
    with pytest.raises(ConfigError, match=r"a model of masked diffusion.*losses_at"):
        bits_per_character(merged, torch.zeros(1, 16).long())
    with pytest.raises(ConfigError, match="a model of masked diffusion"):
        sample_text(merged, 1)
    with pytest.raises(ConfigError, match="3 of 0 to 2"):
        sample_images(merged, 3, labels=[0, 1, 3])
    with pytest.raises(ConfigError, match="2 or more"):
        sample_images(merged, 3, steps=1)
    with pytest.raises(ConfigError, match=r"0\.002 to 80"):
        denoised(merged, torch.zeros(1, 1, 8, 8), 90.0)
    with pytest.raises(ConfigError, match=r"0\.002 to 80"):
        sample_images(merged, 1, first=100.0)


def test_text_models_are_not_asked_for_images_or_odd_steps(merged_text):
    with pytest.raises(ConfigError, match="bits_per_character"):
        sample_images(merged_text, 1)
    with pytest.raises(ConfigError, match="1 or more"):
        sample_text(merged_text, 1, steps=0)
