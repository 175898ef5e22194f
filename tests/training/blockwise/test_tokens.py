"""Autoregressive blocks as jobs, merged, written with, and asked for what they have not."""

import json
from pathlib import Path

import pytest
import torch

from shoestring.errors import ConfigError
from shoestring.models.causal import CausalBlock
from shoestring.objectives import token_denoising as ops
from shoestring.objectives.token_denoising import OWN_BITS, TokenDenoising
from shoestring.ops.preconditioning import euler_step
from shoestring.training.blockwise import decoding, task
from shoestring.training.blockwise.config import BlockwiseConfig
from shoestring.training.blockwise.decoding import (
    Chain,
    logits_ref,
    next_token_bits,
    write_on,
    write_plainly,
)
from shoestring.training.blockwise.every import train_every_block
from shoestring.training.blockwise.job import train_block
from shoestring.training.blockwise.merging import load_merged, merge
from shoestring.training.blockwise.sampling import bits_per_character, sample_images, sample_text

from .conftest import changed, elsewhere
from .test_jobs import apart_is_in_turn, call, equal, state_of
from .test_one_block_only import (
    every_part_of_a_block_learns,
    the_sampler_has_the_table_of_the_training,
)


@pytest.fixture
def tokens(text):
    return changed(text, blockwise={"objective": "tokens", "top_share": 0.3}, optim={"lr": 4e-3})


@pytest.fixture
def recurrent(tokens):
    return changed(
        tokens, blockwise={"blocks": 1}, model={"prelude_layers": 1, "coda_layers": 1}
    )  # fmt: skip


def learned(config, steps=80):
    """A model that has learned a text of few bytes by heart."""
    config = changed(config, run={"steps": steps}, data={"batch_size": 32})
    train_every_block(config)
    return load_merged(merge([config.run.directory])), task.task_of(config)


@pytest.fixture(scope="module")
def merged(tmp_path_factory):
    """Two blocks that know a repeated line, and the task."""
    folder = tmp_path_factory.mktemp("learned")
    (folder / "line.txt").write_text("one two three. " * 600)
    config = changed(
        BlockwiseConfig(),
        run={"directory": str(folder / "run"), "device": "cpu", "threads": 1},
        model={"num_hidden_layers": 4, "hidden_size": 32, "num_attention_heads": 2,
               "condition_size": 16},
        data={"source": str(folder / "line.txt"), "sequence_length": 24},
        blockwise={"blocks": 2, "objective": "tokens", "top_share": 0.3}, optim={"lr": 4e-3},
    )  # fmt: skip
    return learned(config, 150)


def bytes_of(text, count=1):
    return torch.tensor(list(text.encode()), dtype=torch.int64).expand(count, -1)


def text_of(row):
    return bytes(row.tolist()).decode()


def test_blocks_trained_apart_are_those_trained_in_turn(tokens, folder):
    apart_is_in_turn(tokens, folder)


def going_on_is_going_through(config, folder):
    """Stopped after an odd number of updates: which kind comes next is the step's to say."""
    train_block(config, 1)
    stopped = elsewhere(config, folder / "stopped")
    for until in (1, 4, None):
        train_block(stopped, 1, until=until)
    assert equal(state_of(config, 1), state_of(stopped, 1))


def test_a_block_is_gone_on_with_bit_for_bit(tokens, folder):
    going_on_is_going_through(tokens, folder)


def test_kinds_of_updates_counted_by_the_process_are_seen(monkeypatch, tokens, folder):
    counts = {}

    def by_count(self, step):
        counts[id(self)] = counts.get(id(self), 0) + 1
        return counts[id(self)] % 2 == 0

    kept = []  # so that no two have one id
    real = TokenDenoising.__post_init__
    monkeypatch.setattr(
        TokenDenoising, "__post_init__", lambda self: real(self) or kept.append(self)
    )
    monkeypatch.setattr(TokenDenoising, "is_ordinary", by_count)
    with pytest.raises(AssertionError):
        going_on_is_going_through(tokens, folder)


@pytest.mark.parametrize("mixed_every", [0, 1, 2])
def test_kinds_of_updates_are_told_by_what_they_move(tokens, mixed_every):
    """The ordinary loss moves no embedding of noised rows, the other does."""
    config = changed(tokens, blockwise={"mixed_every": mixed_every}, run={"steps": 4})
    train_block(config, 1)
    first = task.fresh(task.task_of(config), 1, torch.device("cpu")).block(1)
    after = state_of(config, 1)
    moved = not torch.equal(after["weights noised.bias"], first.noised.bias)
    assert moved is (mixed_every != 1)
    assert (OWN_BITS in json.loads(
        (Path(config.run.directory) / "block-1" / "receipt.json").read_text())["held_out"]
    ) is (mixed_every > 0)  # fmt: skip


def test_the_peak_of_a_mixed_block_is_that_of_its_larger_kind_of_update(tokens, folder):
    """Would see: the second update measured alone, which is of the ordinary kind and needs less."""
    peaks = {
        every: train_block(
            elsewhere(tokens, folder / f"{every}", blockwise={"mixed_every": every}), 1
        ).receipt["peak"]["bytes"]
        for every in (0, 1, 2)
    }
    assert peaks[1] < 0.95 * peaks[2]
    assert peaks[2] > 0.99 * peaks[0]


def test_plain_blocks_have_no_chain_and_no_losses_of_noised_rows(tokens):
    model, _ = learned(changed(tokens, blockwise={"mixed_every": 1}), 2)
    assert list(model.facts["blocks"][0]["held_out"]) == [OWN_BITS]
    with pytest.raises(ConfigError, match=r"next byte alone.*mixed_every of 0, or of 2.*--block"):
        write_on(model, bytes_of("a"), 1)
    assert write_plainly(model, bytes_of("a"), 2).shape == (1, 2)


def test_every_part_of_a_block_learns(tokens):
    every_part_of_a_block_learns(tokens)


def test_every_part_of_a_recurrent_denoiser_learns(recurrent):
    every_part_of_a_block_learns(recurrent)


def test_the_sampler_has_the_table_of_the_training(tokens):
    the_sampler_has_the_table_of_the_training(tokens)


def the_chain_goes_on_with_what_it_learned(found):
    model, _ = found
    for temperature in (None, 0.0, 0.5):
        for steps in (None, 6):
            written = write_on(
                model, bytes_of("one two ", 2), 12, temperature=temperature, steps=steps
            )
            assert [text_of(row) for row in written] == ["three. one t"] * 2
    assert text_of(write_on(model, bytes_of("two t"), 6, steps=1)[0]) == "hree. "


def test_the_chain_goes_on_with_what_it_learned(merged):
    the_chain_goes_on_with_what_it_learned(merged)
    for block in (1, 2):
        for temperature in (0.0, 0.5):
            written = write_plainly(
                merged[0], bytes_of("one tw"), 9, block=block, temperature=temperature
            )
            assert text_of(written[0]) == "o three. "


def rising(z, denoised, level, following):
    """The sign that is printed in the paper."""
    return (z + ((level - following) / level)[:, None] * (z - denoised)).float()


def raw_rows(logits, table):
    """Another table between the steps than in training."""
    return 8 * logits.softmax(dim=-1) @ table.roll(1, dims=0)


def unread(self, kept, tokens, table):
    """The caches are not extended by what was chosen."""
    return torch.zeros(len(tokens), table.shape[1]), kept


@pytest.mark.parametrize(
    ("owner", "name", "bug"),
    [
        (decoding, "euler_step", rising),
        (decoding.ops, "denoised", raw_rows),
        (CausalBlock, "extend", unread),
    ],
)
def test_planted_bug_of_the_chain_is_seen(monkeypatch, merged, owner, name, bug):
    monkeypatch.setattr(owner, name, bug)
    with pytest.raises((AssertionError, UnicodeDecodeError)):
        the_chain_goes_on_with_what_it_learned(merged)


def test_writing_with_caches_is_writing_with_all_made_anew(merged):
    """Invariant 10 through the whole chain: the same draws, each step from rows made anew."""
    model, _ = merged
    chain, prompt = Chain.of(model, steps=5), bytes_of("e. on", 3)
    generator, wanted = torch.Generator().manual_seed(9), prompt
    width = chain.table.shape[1]
    for _ in range(10):
        z = torch.randn(3, width, generator=generator) * (80.0**2 + 1 / width) ** 0.5
        for place, (level, owner) in enumerate(zip(chain.levels, chain.owners, strict=True)):
            levels = torch.full((3,), level, dtype=torch.float64)
            logits = logits_ref(chain.nets[owner], wanted, z, levels, chain.table)
            if place < 4:
                following = torch.full_like(levels, chain.levels[place + 1])
                z = euler_step(z, ops.denoised(logits, chain.table), levels, following)
        wanted = torch.cat((wanted, logits.argmax(dim=1)[:, None]), dim=1)
    assert torch.equal(write_on(model, prompt, 10, steps=5, seed=9), wanted[:, 5:])


def test_each_level_is_answered_by_its_owner(merged, tokens):
    model, _ = learned(tokens, 2)
    with torch.no_grad():
        for parameter in model.model.block(2).parameters():
            parameter.fill_(float("nan"))
    chain = Chain.of(model)
    assert chain.owners == [0, 1, 1]
    states = [net.begin(bytes_of("a"), chain.table)[1] for net in chain.nets]
    draw = torch.Generator()
    assert chain.logits(states, draw, None).isnan().all()
    assert torch.isfinite(Chain.of(model, steps=1).logits(states, draw, None)).all()
    assert write_on(model, bytes_of(""), 3, first=5.0, steps=1).shape == (1, 3)


def test_what_is_drawn_depends_on_the_seed_and_on_the_temperature(merged):
    model, prompt = merged[0], bytes_of("", 8)
    for temperature in (None, 1.0):
        one = write_on(model, prompt, 4, temperature=temperature, seed=1)
        assert torch.equal(one, write_on(model, prompt, 4, temperature=temperature, seed=1))
        assert not torch.equal(one, write_on(model, prompt, 4, temperature=temperature, seed=2))
        assert len(one.unique(dim=0)) > 1
    # at one step, temperature 0 is block 1's own likeliest byte
    likeliest = write_on(model, prompt, 1, temperature=0.0, steps=1)
    assert torch.equal(likeliest, write_on(model, prompt, 1, steps=1))
    plain = write_plainly(model, prompt, 8, temperature=0.0)
    assert len(plain.unique(dim=0)) == 1


def test_a_blocks_own_predictions_are_a_likelihood_and_its_receipts(merged):
    model, known = merged
    texts = torch.cat(list(known.held_out_batches()))
    for block in (1, 2):
        bits = next_token_bits(model, texts, [block])
        held_out = model.facts["blocks"][block - 1]["held_out"]
        assert bits == pytest.approx(held_out[OWN_BITS], rel=1e-5)
    # of all texts of one more byte it gives 1 in all
    net, table = decoding.plain_block(model, 1)
    chances = (net.next_tokens(texts[:2], table) @ table.T).softmax(dim=2)
    torch.testing.assert_close(chances.sum(dim=2), torch.ones(2, 24))
    both = next_token_bits(model, texts, [1, 2])
    one, other = (next_token_bits(model, texts, [block]) for block in (1, 2))
    assert min(one, other) - 1 < both < (one + other) / 2 + 1e-9


def test_a_receipt_tells_context_from_z(merged):
    held_out = merged[0].facts["blocks"][0]["held_out"]
    assert held_out["loss at the top"] < 0.5  # a first byte cannot be known
    assert held_out["loss with other texts before"] > 2 * held_out["loss"]
    assert held_out["loss of z alone"] > held_out["loss"]


def test_what_a_text_from_left_to_right_has_not_is_told(merged, tokens, images):
    model, _ = merged
    for ask in (lambda: bits_per_character(model, bytes_of("abc")), lambda: sample_text(model, 1)):
        with pytest.raises(ConfigError, match=r"a model of tokens was asked.*no perplexity.*next_"):
            ask()
    with pytest.raises(ConfigError, match="asked for images"):
        sample_images(model, 1)
    with pytest.raises(ConfigError, match="no block"):
        next_token_bits(model, bytes_of("abc"), [])
    pure_directory = Path(tokens.run.directory)
    pure, _ = learned(changed(tokens, blockwise={"mixed_every": 0}), 2)
    for ask in (
        lambda: next_token_bits(pure, bytes_of("abc")),
        lambda: write_plainly(pure, bytes_of("abc"), 1),
    ):
        with pytest.raises(ConfigError, match=r"pure objective.*mixed_every of 1 or more"):
            ask()
    images = elsewhere(images, pure_directory.with_name("images"))
    train_every_block(images)
    other = load_merged(merge([images.run.directory]))
    with pytest.raises(ConfigError, match=r"bytes that follow a text.*a model of tokens"):
        write_on(other, bytes_of("abc"), 1)


def test_blocks_of_the_two_objectives_are_not_merged(tokens, folder):
    pure = elsewhere(tokens, folder / "pure", blockwise={"mixed_every": 0})
    train_block(tokens, 1)
    train_block(pure, 2)
    with pytest.raises(ConfigError, match="mixed_every is 2 for block 1"):
        merge([tokens.run.directory, pure.run.directory])


def test_from_the_command_line(merged, capsys):
    model, known = merged
    run = known.config.run.directory
    code, line = call(capsys, "merge", run)
    assert code == 0
    assert line["bits_per_byte"] is None
    assert line["block_1_bits_per_byte"] == model.facts["blocks"][0]["held_out"][OWN_BITS]
    args = ("sample", run, "--count", "2", "--prompt", "one two ")
    code, line = call(capsys, *args)
    assert (code, line["texts"]) == (0, ["one two three. one two t"] * 2)
    code, line = call(capsys, *args, "--block", "2", "--temperature", "0", "--length", "13")
    assert (code, line["texts"]) == (0, ["one two three"] * 2)
    assert call(capsys, "sample", run, "--count", "1", "--steps", "1")[0] == 0


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--labels", "1"], "draws texts from left to right; expected it for images only"),
        (["--length", "25"], "24 with the prompt, as long as a text was in training"),
        (["--prompt", "a" * 24], "0 bytes after a prompt of 24"),
        (["--block", "3"], "expected 1 to 2"),
        (["--block", "1", "--steps", "4"], "one of the two"),
        (["--temperature", "-1"], "0 or more"),
        (["--steps", "0"], "2 or more"),
    ],
)
def test_what_cannot_be_written_is_told(merged, capsys, flags, message):
    code, line = call(capsys, "sample", merged[1].config.run.directory, *flags)
    assert code == 2
    assert message in line["error"]["message"]


def test_flags_of_a_text_from_left_to_right_are_refused_for_others(text, capsys):
    train_every_block(text)
    merge([text.run.directory])
    code, line = call(capsys, "sample", text.run.directory, "--prompt", "a")
    assert code == 2
    assert "expected it for texts from left to right only" in line["error"]["message"]


def test_a_recurrent_denoiser_is_trained_merged_and_iterated(recurrent):
    model, _ = learned(recurrent, 60)
    assert model.partition.blocks == 1
    for steps in (1, 2, 8):
        assert write_on(model, bytes_of("1 and 1 ma"), 2, steps=steps).shape == (1, 2)
    assert text_of(write_on(model, bytes_of("1 and 1 ma"), 2, steps=8)[0]) == "ke"


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"model": {"prelude_layers": 1}, "blockwise": {"objective": "masked"}}, "tokens"),
        ({"model": {"prelude_layers": 1}}, "recurrent model in 2 blocks"),
        ({"model": {"coda_layers": 1}, "blockwise": {"blocks": 1}}, "1 or more before it"),
        ({"blockwise": {"mixed_every": -1}}, "mixed_every"),
        ({"blockwise": {"blocks": 3}}, "nearest: 2 or 4"),
    ],
)
def test_settings_that_cannot_be_are_refused(tokens, sections, message):
    with pytest.raises(ConfigError, match=message):
        train_block(changed(tokens, **sections), 1)
