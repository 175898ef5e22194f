"""`shoestring sample` and its PNG files, which another reader opens."""

import struct
import zlib
from pathlib import Path

import pytest
import torch

from shoestring.errors import ConfigError
from shoestring.training.blockwise.every import train_every_block
from shoestring.training.blockwise.merging import load_merged, merge
from shoestring.training.blockwise.png import grid_of, png_of
from shoestring.training.blockwise.sampling import sample_images

from .test_jobs import call


def pixels_of(content):
    """(C, H, W) of a PNG, read by its specification and with every checksum."""
    assert content[:8] == b"\x89PNG\r\n\x1a\n"
    parts, place = {}, 8
    while place < len(content):
        (length,) = struct.unpack(">I", content[place : place + 4])
        body = content[place + 4 : place + 8 + length]
        (check,) = struct.unpack(">I", content[place + 8 + length : place + 12 + length])
        assert check == zlib.crc32(body)
        parts[body[:4]] = body[4:]
        place += 12 + length
    width, height, bits, kind = struct.unpack(">2I2B", parts[b"IHDR"][:10])
    assert bits == 8
    channels = {0: 1, 2: 3}[kind]
    raw = zlib.decompress(parts[b"IDAT"])
    rows = torch.tensor(list(raw), dtype=torch.uint8).view(height, 1 + width * channels)
    assert bool((rows[:, 0] == 0).all())
    return rows[:, 1:].view(height, width, channels).permute(2, 0, 1)


@pytest.mark.parametrize("channels", [1, 3])
def test_a_picture_comes_back_from_its_file(channels):
    draw = torch.Generator().manual_seed(0)
    picture = torch.randint(256, (channels, 7, 11), generator=draw).to(torch.uint8)
    assert torch.equal(pixels_of(png_of(picture)), picture)


def test_a_grid_has_every_image_in_its_place():
    images = torch.linspace(-1, 1, 5).view(5, 1, 1, 1).expand(5, 1, 4, 4)
    grid = grid_of(images, 3)
    assert grid.shape == (1, 10, 16)
    assert [int(grid[0, 0, 6 * n]) for n in range(3)] == [0, 64, 128]
    assert [int(grid[0, 6, 6 * n]) for n in range(3)] == [191, 255, 128]  # the last one is empty
    assert int(grid_of(torch.full((1, 1, 2, 2), 7.0))[0, 0, 0]) == 255


def test_images_that_no_png_holds_are_refused():
    with pytest.raises(ConfigError, match="1 or 3 for a PNG"):
        png_of(torch.zeros(2, 4, 4, dtype=torch.uint8))


def test_pictures_of_a_run_are_drawn_from_the_command_line(images, folder, capsys):
    run = images.run.directory
    train_every_block(images)
    merge([run])
    code, line = call(capsys, "sample", run, "--count", "6", "--labels", "0", "2", "--seed", "3")
    assert code == 0
    assert Path(line["picture"]) == Path(run) / "samples.png"
    drawn = sample_images(load_merged(run), 6, labels=[0, 2] * 3, seed=3)
    assert torch.equal(pixels_of(Path(line["picture"]).read_bytes()), grid_of(drawn))
    other = folder / "other.png"
    code, line = call(capsys, "sample", Path(run) / "model", "--count", "2", "--to", other)
    assert (code, line["picture"]) == (0, str(other))


def test_texts_of_a_run_are_drawn_from_the_command_line(text, capsys):
    train_every_block(text)
    merge([text.run.directory])
    args = ("sample", text.run.directory, "--count", "2", "--steps", "4")
    code, line = call(capsys, *args)
    assert code == 0
    assert len(line["texts"]) == 2
    assert call(capsys, *args)[1] == line
    for flag in (["--labels", "1"], ["--guidance", "2"], ["--to", "x.png"]):
        code, line = call(capsys, *args, *flag)
        assert code == 2
        assert "draws texts; expected it for images only" in line["error"]["message"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--count", "0"], "--count 0 cannot be used"),
        (["--guidance", "-1"], "--guidance -1.0 cannot be used"),
        (["--steps", "1"], "2 or more"),
        (["--labels", "1", "3"], "class 3 for 3 images; expected 3 of 0 to 2"),
        (["--guidance", "2"], "--guidance without --labels"),
        (["--temperature", "0.5"], "draws images; expected it for texts only"),
        (["--to", "{folder}/none/x.png"], "none"),
    ],
)
def test_what_cannot_be_drawn_is_told(images, folder, capsys, flags, message):
    train_every_block(images)
    merge([images.run.directory])
    flags = [each.format(folder=folder) for each in flags]
    code, line = call(capsys, "sample", images.run.directory, "--count", "3", *flags)
    assert code in (1, 2)
    assert message in line["error"]["message"]


def test_a_run_that_was_not_merged_is_not_drawn_from(images, capsys):
    train_every_block(images)
    for place in (images.run.directory, f"{images.run.directory}/block-1"):
        code, line = call(capsys, "sample", place)
        assert code == 2
        assert "have not been merged" in line["error"]["message"]
        assert f"shoestring merge {images.run.directory} " in line["error"]["message"]


def test_other_verbs_say_what_a_run_of_blocks_is(images, folder, capsys):
    train_every_block(images)
    model = merge([images.run.directory])
    for args, message in (
        (("generate", model), "shoestring sample draws from it"),
        (("plan", folder / "blocks.toml"), "is a run of blocks"),
    ):
        code, line = call(capsys, *args)
        assert code == 2
        assert message in line["error"]["message"]
