"""Classifying by blocks: images and signals, apart and merged; answers from noise alone."""

import pytest
import torch
from safetensors.torch import save_file

from shoestring.errors import ConfigError, DataError
from shoestring.training.blockwise import sampling, task
from shoestring.training.blockwise.every import train_every_block
from shoestring.training.blockwise.merging import load_merged, merge
from shoestring.training.blockwise.sampling import classify, sample_images

from .conftest import bars, changed
from .test_jobs import apart_is_in_turn, call


@pytest.fixture
def labels(images):
    return changed(
        images, blockwise={"objective": "labels", "top_share": 0.3, "sigma_max": 10.0},
        optim={"lr": 3e-3},
    )  # fmt: skip


def test_blocks_of_a_classifier_trained_apart_are_those_trained_in_turn(labels, folder):
    apart_is_in_turn(labels, folder)


def answers_are_right(config):
    merged = load_merged(merge([config.run.directory]))
    images, labels = task.task_of(config).train.batch(torch.arange(90))
    answered = classify(merged, images, draws=4)
    torch.testing.assert_close(answered.sum(dim=1), torch.ones(90))
    assert (answered.argmax(dim=1) == labels).double().mean() > 0.9
    return merged, images


def test_a_classifier_learns_and_answers_from_noise_alone(labels, capsys):
    config = changed(labels, run={"steps": 60}, data={"batch_size": 32})
    done = train_every_block(config)
    first = done[0].receipt["held_out"]
    assert first["accuracy at the top"] > 0.9
    assert first["accuracy with other images"] < 0.9
    merged, images = answers_are_right(config)
    # a draw, the mean of draws, and block 1's own answer
    one = classify(merged, images, draws=1, seed=3)
    assert torch.equal(one, classify(merged, images, draws=1, seed=3))
    assert not torch.equal(one, classify(merged, images, draws=1, seed=4))
    assert classify(merged, images, steps=1, draws=2).shape == (90, 3)
    assert torch.isfinite(classify(merged, images, first=5.0, steps=6)).all()
    # the owner of each level, and no other
    with torch.no_grad():
        for parameter in merged.model.block(2).parameters():
            parameter.fill_(float("nan"))
    assert torch.isfinite(classify(merged, images, steps=1)).all()
    assert classify(merged, images).isnan().any()
    code, line = call(capsys, "sample", config.run.directory)
    assert code == 2
    assert "classifies images" in line["error"]["message"]


def rising(z, denoised, level, following):
    """The sign that is printed in the paper."""
    rise = (level - following) / level
    return (z + rise[:, None] * (z - denoised)).float()


def raw(logits, table):
    return 30 * torch.ones_like(table[:1])


def test_planted_bugs_of_the_chain_are_seen(monkeypatch, labels):
    config = changed(labels, run={"steps": 60}, data={"batch_size": 32})
    train_every_block(config)
    answers_are_right(config)
    bugs = [(sampling, "euler_step", rising), (sampling.label_denoising, "denoised", raw)]
    for owner, name, bug in bugs:
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, bug)
            with pytest.raises(AssertionError):
                answers_are_right(config)


def test_signals_are_images_of_height_one(labels, folder):
    data = bars()
    signals = data["images"][:, :, :1].contiguous()
    save_file({"images": signals, "labels": data["labels"]}, folder / "signals.safetensors")
    config = changed(
        labels, data={"source": str(folder / "signals.safetensors"), "batch_size": 32},
        run={"steps": 200},
    )  # fmt: skip
    assert task.task_of(config).shape.positions == 2
    train_every_block(config)
    answers_are_right(config)
    pictures = changed(config, blockwise={"objective": "edm"}, run={"replace": True, "steps": 3})
    train_every_block(pictures)
    assert sample_images(load_merged(merge([config.run.directory])), 2).shape == (2, 1, 1, 8)


def test_a_classifier_without_classes_or_with_levels_of_no_use_is_refused(labels, folder):
    save_file({"images": bars()["images"]}, folder / "unlabelled.safetensors")
    with pytest.raises(DataError, match="2 classes or more"):
        train_every_block(changed(labels, data={"source": str(folder / "unlabelled.safetensors")}))
    train_every_block(labels)
    merged = load_merged(merge([labels.run.directory]))
    images = torch.zeros(2, 1, 8, 8)
    with pytest.raises(ConfigError, match=r"0\.002 to 10"):
        classify(merged, images, first=20.0)
    with pytest.raises(ConfigError, match="1 or more"):
        classify(merged, images, draws=0)
    with pytest.raises(ConfigError, match="classify answers"):
        sample_images(merged, 2)


def test_a_model_that_draws_is_not_asked_for_classes(images):
    train_every_block(images)
    merged = load_merged(merge([images.run.directory]))
    with pytest.raises(ConfigError, match=r"asked for classes.*a model of labels.*sample_images"):
        classify(merged, torch.zeros(1, 1, 8, 8))
