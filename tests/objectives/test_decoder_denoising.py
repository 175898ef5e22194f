"""Denoising by a block of a pretrained decoder: nothing leaks, nothing else moves, and without
noise the decoder is what it was."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GPT2Config,
    LlamaConfig,
    Qwen2Config,
)

from shoestring.errors import ConfigError, StackError
from shoestring.methods import METHODS, apply_spans
from shoestring.objectives import decoder_denoising as denoising
from shoestring.objectives.decoder_denoising import DecoderDenoising, Draw
from shoestring.objectives.scaffolding import NAME, Scaffold, put_scaffolding, taken_out
from shoestring.ops.block_masks import may_look_ref
from shoestring.ops.noise_levels import LogNormal, MaskTime, partition
from shoestring.stack import Span, Stack

WIDTH, LENGTH, DEPTH, BLOCKS = 32, 10, 4, 2
SHAPE: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": WIDTH, "num_hidden_layers": DEPTH, "num_attention_heads": 4,
    "num_key_value_heads": 2, "intermediate_size": 48, "max_position_embeddings": 32,
}  # fmt: skip
KINDS = {
    "llama": lambda: LlamaConfig(**SHAPE, tie_word_embeddings=True),
    "qwen2": lambda: Qwen2Config(**SHAPE),
    "gemma2": lambda: Gemma2Config(**SHAPE, head_dim=8, sliding_window=4),
}
OBJECTIVE = DecoderDenoising(partition=partition(LogNormal(), BLOCKS))


ATTENTION = {"llama": ("sdpa", "eager"), "qwen2": ("sdpa", "eager"), "gemma2": ("eager",)}


def plain(kind: str = "llama", attention: str | None = None) -> Any:
    torch.manual_seed(1)
    attention = attention or ATTENTION[kind][0]
    model = AutoModelForCausalLM.from_config(KINDS[kind](), attn_implementation=attention)
    # random weights say next to nothing: let what rows see count
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(4)
    return model.train()


def prepared(kind: str = "llama", attention: str | None = None, *, moved: bool = True) -> Any:
    """With scaffolds; moved: their modulation is not that of the start."""
    model = plain(kind, attention)
    put_scaffolding(model, BLOCKS, 8)
    torch.manual_seed(2)
    for module in model.modules() if moved else ():
        if isinstance(module, Scaffold):
            nn.init.normal_(module.modulate.weight, std=0.3)
            nn.init.normal_(module.modulate.bias, std=0.1)
    return model


def batch(rows: int = 2) -> dict[str, Tensor]:
    ids = torch.randint(0, 64, (rows, LENGTH), generator=torch.Generator().manual_seed(3))
    return {"input_ids": ids, "labels": ids.clone()}


def draw(block: int = 1, rows: int = 2, seed: int = 4) -> Draw:
    return OBJECTIVE.draw(block, rows, LENGTH, WIDTH, torch.Generator().manual_seed(seed))


def train_only(model: nn.Module, block: int) -> list[nn.Parameter]:
    """The block's parameters; all others frozen."""
    layers = Stack.of(model).blocks[(block - 1) * 2 : block * 2]
    mine = [p for layer in layers for p in layer.parameters()]
    for parameter in model.parameters():
        parameter.requires_grad_(any(parameter is p for p in mine))
    return mine


def logits(model: Any, data: dict[str, Tensor], block: int, drawn: Draw) -> tuple[Tensor, Tensor]:
    """Of the noised rows; and what the block's layers made of the clean ones."""
    seen: list[Tensor] = []
    last = Stack.of(model).blocks[block * 2 - 1]
    inner = type(last).forward.__get__(last)
    found: list[Tensor] = []

    def spy(*args: Any, **kwargs: Any) -> Any:
        output = inner(*args, **kwargs)
        seen.append(denoising.hidden_of(output)[:, :LENGTH].detach().clone())
        return output

    last.__dict__["forward"] = spy
    hook = model.get_output_embeddings().register_forward_hook(lambda m, a, o: found.append(o))
    try:
        with torch.no_grad():
            OBJECTIVE.loss(model, data, block, drawn)
    finally:
        del last.__dict__["forward"]
        hook.remove()
    return found[0].detach(), seen[0]


def changed(before: Tensor, after: Tensor) -> list[int]:
    """Rows of the text that differ at all."""
    return [i for i in range(LENGTH) if not torch.equal(before[:, i], after[:, i])]


# ---- without noise -----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_a_prepared_decoder_gives_the_logits_it_gave_and_is_saved_as_it_was(kind):
    model, ref, data = prepared(kind).eval(), plain(kind).eval(), batch()
    with torch.no_grad():
        assert torch.equal(model(**data).logits, ref(**data).logits)
    assert model.state_dict().keys() > ref.state_dict().keys()
    with taken_out(model):
        assert list(model.state_dict()) == list(ref.state_dict())
    assert sum(isinstance(m, Scaffold) for m in model.modules()) == BLOCKS


def test_nothing_is_left_in_the_layers_after_a_forward_or_an_error():
    model = prepared()
    OBJECTIVE.loss(model, batch(), 2, draw(2))
    assert not any("forward" in vars(layer) for layer in Stack.of(model).blocks)
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(StackError, match="flash_attention_2"):
        OBJECTIVE.loss(model, batch(), 2, draw(2))
    assert not any("forward" in vars(layer) for layer in Stack.of(model).blocks)


def test_scaffolds_begin_as_the_scaled_target_and_no_modulation():
    model = prepared(moved=False)
    scaffold, table = getattr(Stack.of(model).blocks[2], NAME), model.get_input_embeddings().weight
    z = torch.randn(2, LENGTH, WIDTH)
    rows, modulations = scaffold(z, torch.tensor([-1.0, 1.0]))
    torch.testing.assert_close(rows, z * table.std())
    assert all(bool((part == 0).all()) for three in modulations for part in three)
    hidden, call = torch.randn(2, 6, WIDTH), denoising.BlockCall(torch.tanh, (None,), {}, 0, None)
    assert torch.equal(denoising.modulated(call, hidden, 3, modulations[0]), torch.tanh(hidden))


# ---- leaks -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "attention"), [(k, a) for k in KINDS for a in ATTENTION[k]])
@pytest.mark.parametrize("block", [1, 2])
def test_a_noised_row_hears_of_no_later_token_and_of_no_other_noised_row(kind, attention, block):
    model, data = prepared(kind, attention).eval(), batch()
    ids, drawn = data["input_ids"], draw(block)
    high = Draw(torch.full((2,), 80.0, dtype=torch.float64), drawn.noise)  # z carries nothing
    before, clean = logits(model, data, block, high)
    place = 5
    other = ids.clone()
    other[:, place] = (other[:, place] + 7) % 64
    # the same z: the target's own row is noised so that it comes out as before
    z, level = denoising.noised(model, ids, high)
    y_after, _ = denoising.noised(model, other, Draw(high.level, torch.zeros_like(high.noise)))
    same = Draw(high.level, (z - y_after) / level[:, None, None])
    after, clean_after = logits(model, {**data, "input_ids": other}, block, same)
    torch.testing.assert_close(before[:, :place], after[:, :place], rtol=1e-4, atol=1e-4)
    assert (before[:, place] - after[:, place]).abs().max() > 1e-3  # it sees clean row `place`
    assert changed(clean, clean_after)[0] == place

    noise = high.noise.clone()
    noise[:, place] += 1.0
    nudged, clean_nudged = logits(model, data, block, Draw(high.level, noise))
    assert changed(before, nudged) == [place]
    assert torch.equal(clean, clean_nudged)


def test_clean_rows_know_neither_the_noise_nor_its_level():
    model, data = prepared().eval(), batch()
    _, one = logits(model, data, 2, draw(2, seed=5))
    _, other = logits(model, data, 2, draw(2, seed=6))
    assert torch.equal(one, other)
    with torch.no_grad():  # and are what the decoder computes without any
        hidden = model(**data, output_hidden_states=True, use_cache=False).hidden_states
    layer_inputs = hidden[3]
    last = Stack.of(model).blocks[3]
    seen: list[Tensor] = []
    hook = last.register_forward_pre_hook(
        lambda m, args, kwargs: seen.append(args[0] if args else kwargs["hidden_states"]),
        with_kwargs=True,
    )
    with torch.no_grad():
        OBJECTIVE.loss(model, data, 2, draw(2))
    hook.remove()
    torch.testing.assert_close(seen[0][:, :LENGTH], layer_inputs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("own", ["none", "bool", "added"])
def test_the_mask_is_that_of_the_twin(own):
    given = None
    if own != "none":
        given = torch.ones(LENGTH, LENGTH).tril().bool()[None, None].expand(2, 1, -1, -1)
    if own == "added":
        given = torch.where(given, 0.0, torch.finfo(torch.float32).min)
    mask = denoising.two_streams(given, "Layer", LENGTH, torch.device("cpu"))
    allowed = mask[0, 0] if mask.dtype == torch.bool else mask[0, 0] == 0
    ref = [[may_look_ref(i, j, LENGTH, 1, True) for j in range(2 * LENGTH)]
           for i in range(2 * LENGTH)]  # fmt: skip
    assert torch.equal(allowed, torch.tensor(ref))


def test_padding_is_seen_by_neither_stream():
    model, data = prepared().eval(), batch()
    data["attention_mask"] = torch.ones_like(data["input_ids"])
    data["attention_mask"][:, -3:] = 0
    before, _ = logits(model, data, 2, draw(2))
    other = data["input_ids"].clone()
    other[:, -2] = (other[:, -2] + 5) % 64
    after, _ = logits(model, {**data, "input_ids": other}, 2, draw(2))
    assert changed(before, after)[0] == LENGTH - 3  # whose target it is, and not sooner


def test_both_streams_have_the_same_positions():
    model, data = prepared(), batch()
    seen: list[Any] = []
    attention = Stack.of(model).blocks[2].self_attn
    inner = type(attention).forward.__get__(attention)

    def spy(*args: Any, **kwargs: Any) -> Any:
        seen.append(kwargs["position_embeddings"])
        return inner(*args, **kwargs)

    attention.__dict__["forward"] = spy
    OBJECTIVE.loss(model, data, 2, draw(2))
    for part in seen[0]:
        assert part.shape[-2] == 2 * LENGTH
        assert torch.equal(part[..., :LENGTH, :], part[..., LENGTH:, :])


# ---- one block only ----------------------------------------------------------------------------


@pytest.mark.parametrize("block", [1, 2])
def test_only_the_block_runs_with_a_graph_and_what_comes_after_it_not_at_all(block):
    model = prepared()
    mine = train_only(model, block)
    ran: list[tuple[int, bool]] = []
    for place, layer in enumerate(Stack.of(model).blocks):
        layer.self_attn.register_forward_pre_hook(
            lambda m, args, kwargs, place=place: ran.append((place, torch.is_grad_enabled())),
            with_kwargs=True,
        )
    OBJECTIVE.loss(model, batch(), block, draw(block)).backward()
    expected = [(0, True), (1, True)] if block == 1 else [
        (0, False), (1, False), (2, True), (3, True)]  # fmt: skip
    assert ran == expected
    assert {id(p) for p in model.parameters() if p.grad is not None} == {id(p) for p in mine}


def test_the_clean_stream_is_in_the_graph_of_the_block():
    """Keys and values of the context learn."""
    model, seen = prepared(), []
    train_only(model, 2)

    def keep(module: nn.Module, args: Any, kwargs: Any) -> None:
        hidden = args[0] if args else kwargs["hidden_states"]
        hidden.retain_grad()
        seen.append(hidden)

    Stack.of(model).blocks[3].register_forward_pre_hook(keep, with_kwargs=True)
    OBJECTIVE.loss(model, batch(), 2, draw(2)).backward()
    gradients = seen[0].grad.abs().amax(dim=(0, 2))
    assert (gradients[: LENGTH - 1] > 0).all()  # clean rows that a noised row with a target sees
    assert gradients[LENGTH - 1] == 0  # the last rows have none
    assert gradients[-1] == 0


def test_layers_that_are_run_again_give_the_same_gradients_bit_for_bit():
    kept, again = prepared(), prepared()
    apply_spans(Stack.of(again), [Span(0, DEPTH, "recompute")])
    for model in (kept, again):
        train_only(model, 2)
        OBJECTIVE.loss(model, batch(), 2, draw(2)).backward()
    for (name, p), q in zip(kept.named_parameters(), again.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None), name
        assert p.grad is None or torch.equal(p.grad, q.grad), name


def test_a_chunked_loss_is_used_without_being_known():
    one, other = prepared(), prepared()
    how = METHODS["chunked_loss"]
    undo = how.apply(other, how.configure({"chunk_rows": 3}))
    losses = []
    for model in (one, other):
        train_only(model, 2)
        losses.append(OBJECTIVE.loss(model, batch(), 2, draw(2)))
        losses[-1].backward()
    undo()
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-5, atol=1e-5)
    scaffold = [getattr(Stack.of(m).blocks[2], NAME).enter.weight.grad for m in (one, other)]
    torch.testing.assert_close(scaffold[0], scaffold[1], rtol=1e-3, atol=1e-6)


def test_the_next_token_gradient_of_a_block_is_that_of_the_whole_network():
    whole, model, data = plain(), prepared(), batch()
    whole(**data).loss.backward()
    train_only(model, 1)
    model(**data).loss.backward()
    ref = dict(whole.named_parameters())
    for name, p in model.named_parameters():
        if p.grad is not None:
            assert torch.equal(p.grad, ref[name].grad), name


# ---- draws -------------------------------------------------------------------------------------


def test_a_block_draws_its_own_levels_and_one_a_text():
    drawn = OBJECTIVE.draw(1, 400, 2, 3, torch.Generator().manual_seed(0))
    low, high = OBJECTIVE.partition.range(1)
    assert drawn.level.shape == (400,)
    assert drawn.noise.shape == (400, 2, 3)
    assert low <= drawn.level.min()
    assert drawn.level.max() <= high
    assert len(set(drawn.level.tolist())) == 400


def test_what_is_noised_is_the_following_token_at_length_one():
    model, ids = prepared(), batch()["input_ids"]
    nothing = Draw(torch.ones(2, dtype=torch.float64), torch.zeros(2, LENGTH, WIDTH))
    z, _ = denoising.noised(model, ids, nothing)
    rows = model.get_input_embeddings().weight[ids[:, 1:]].double()
    expected = rows / rows.square().sum(-1, keepdim=True).sqrt()
    torch.testing.assert_close(z[:, :-1].double(), expected, rtol=1e-5, atol=1e-6)


def test_a_modulated_layer_is_the_equation():
    torch.manual_seed(7)
    hidden, (shift, scale, gate) = torch.randn(2, 6, WIDTH), torch.randn(3, 2, 1, WIDTH).unbind(0)
    layer = nn.Linear(WIDTH, WIDTH)
    call = denoising.BlockCall(layer, (None,), {}, 0, None)
    out = denoising.modulated(call, hidden, 3, (shift, scale, gate))
    n = hidden[:, 3:].double()
    x = n * (1 + scale.double()) + shift.double()
    branch = layer.double()(x) - x
    torch.testing.assert_close(out[:, 3:].double(), n + (1 + gate.double()) * branch,
                               rtol=1e-4, atol=1e-4)  # fmt: skip
    torch.testing.assert_close(out[:, :3], layer.float()(hidden[:, :3]))


# ---- what cannot be done -----------------------------------------------------------------------


def test_what_cannot_be_placed_is_told():
    torch.manual_seed(0)
    learned = AutoModelForCausalLM.from_config(
        GPT2Config(vocab_size=64, n_embd=WIDTH, n_layer=DEPTH, n_head=4, n_positions=32)
    )
    put_scaffolding(learned, BLOCKS, 8)
    with pytest.raises(StackError, match="position_embeddings"):
        OBJECTIVE.loss(learned, batch(), 1, draw())
    with pytest.raises(ConfigError, match="nearest: 2 or 4"):
        put_scaffolding(plain(), 3, 8)
    model = prepared()
    with pytest.raises(StackError, match="already"):
        put_scaffolding(model, BLOCKS, 8)
    with pytest.raises(StackError, match="has no 'denoising'"):
        OBJECTIVE.loss(plain(), batch(), 1, draw())
    with pytest.raises(ConfigError, match="sigma"):
        DecoderDenoising(partition=partition(MaskTime(), 2))
    with pytest.raises(ConfigError, match="block 3"):
        OBJECTIVE.loss(model, batch(), 3, draw())
