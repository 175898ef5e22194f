"""Transformers of diffusers in blocks: theirs bit for bit, one alone, nothing of the others."""

import sys

import pytest
import torch
from torch import nn

from shoestring.errors import ConfigError
from shoestring.meter.tracker import Tracker
from shoestring.models import wrapped_cut
from shoestring.models.wrapped import wrap
from shoestring.models.wrapped_config import Call, WrappedConfig
from shoestring.models.wrapped_sources import config_of

from .wrapping import (
    CHANNELS,
    CONFIGS,
    DIT,
    FLUX,
    HEADS,
    SD3,
    given,
    images,
    objective_of,
    parts_of,
)
from .wrapping import wrapped as small

diffusers = pytest.importorskip("diffusers", reason="pip install 'shoestring[diffusion]'")
KINDS = ["dit", "sd3", "flux"]
ALL = list(CONFIGS)


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def plain(kind, seed=0):
    """The library's own model."""
    made = getattr(diffusers, CONFIGS[kind]["_class_name"])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return made.from_config({k: v for k, v in CONFIGS[kind].items() if k[0] != "_"})


def called(kind, model, z, time, labels):
    """The library's model called by hand."""
    if kind == "dit":
        return model(z, timestep=1000 * time, class_labels=labels).sample
    told = {name: rows[labels] for name, rows in given(kind).items()}
    if kind == "pixart":
        told["added_cond_kwargs"] = {"resolution": None, "aspect_ratio": None}
    if kind != "flux":
        return model(z, timestep=(1 if kind == "aura" else 1000) * time, **told).sample[:, :4]
    n, c, h, w = z.shape
    x = z.view(n, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 1, 3, 5).reshape(n, -1, 4 * c)
    ids = diffusers.FluxPipeline._prepare_latent_image_ids(n, h // 2, w // 2, "cpu", z.dtype)
    out = model(x, timestep=time, img_ids=ids, txt_ids=torch.zeros(5, 3), **told).sample
    return diffusers.FluxPipeline._unpack_latents(out, h, w, 1)


def noise_at(kind, time):
    """What the objective tells of the noise whose timestep is 1000 time."""
    if kind != "dit":
        return time
    low, high = (torch.tensor(end).log() / 4 for end in (0.002, 80.0))
    return low + time * (high - low)


# ---- the library's own model -------------------------------------------------------------------


@pytest.mark.parametrize("kind", ALL)
def test_one_block_is_the_model_itself(kind):
    model = plain(kind).eval()
    block = small(kind, 1, model).block(1).eval()
    time = torch.tensor([0.0, 0.25, 1.0])
    z = torch.randn(3, CHANNELS[kind], 8, 8, generator=torch.Generator().manual_seed(1))
    noise, labels = noise_at(kind, time), torch.tensor([2, 0, 3])
    got = block(z, noise, labels)
    torch.testing.assert_close(got, called(kind, model, z, time, labels))
    if kind == "dit":  # its noise went through a logarithm, which rounds the timestep
        c = block.config
        time = (noise - c.low) * (1000 / (c.high - c.low)) / 1000
    assert torch.equal(got, called(kind, model, z, time, labels))
    assert torch.equal(block(z, noise), block(z, noise, torch.full((3,), 3)))


@pytest.mark.parametrize("kind", ALL)
def test_fresh_weights_are_those_of_the_constructor(kind):
    made, wanted = small(kind, 1, seed=0).block(1).net, plain(kind, seed=1)
    assert made.state_dict().keys() == wanted.state_dict().keys()
    assert all(torch.equal(v, wanted.state_dict()[k]) for k, v in made.state_dict().items())
    for name, buffer in wanted.named_buffers():
        assert torch.equal(made.get_buffer(name), buffer)


@pytest.mark.parametrize("kind", ALL)
def test_blocks_of_a_model_have_its_layers_once_and_copies_of_its_ends(kind):
    model = plain(kind)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    wrapped = small(kind, 2, model)
    states = [wrapped.block(b).net.state_dict() for b in (1, 2)]
    lists = tuple(f"{name}." for name in wrapped.config.call.lists)
    for name, value in model.state_dict().items():
        owners = [state for state in states if name in state]
        assert len(owners) == (1 if name.startswith(lists) else 2)
        assert all(torch.equal(state[name], value) for state in owners)
    one = small(kind, 2, model, only=2)
    assert all(p.is_meta for p in one.block(1).parameters())
    assert all(torch.equal(v, states[1][k]) for k, v in one.block(2).net.state_dict().items())
    with torch.no_grad():
        for parameter in wrapped.parameters():
            parameter.zero_()
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_layers_of_two_lists_go_in_order():
    config = small("flux", 3, only=1).config
    assert [config.owned(b) for b in (1, 2, 3)] == [
        [("transformer_blocks", [0, 1]), ("single_transformer_blocks", [])],
        [("transformer_blocks", []), ("single_transformer_blocks", [0, 1])],
        [("transformer_blocks", []), ("single_transformer_blocks", [2, 3])],
    ]
    assert WrappedConfig.from_json(config.to_json()) == config


@pytest.mark.parametrize("kind", KINDS)
def test_a_plain_model_comes_back_by_any_blocks_ends(kind):
    wrapped = small(kind, 2)
    for block in (1, 2):
        model = wrapped.to_diffusers(block)
        assert type(model).__name__ == CONFIGS[kind]["_class_name"]
        own = wrapped.block(block).net.state_dict()
        assert own.keys() < model.state_dict().keys()
        assert all(torch.equal(model.state_dict()[name], value) for name, value in own.items())
    name = "proj_out_2.weight" if kind == "dit" else "proj_out.weight"
    first, second = (wrapped.plain_state(b)[name] for b in (1, 2))
    assert not torch.equal(first, second)


# ---- one block alone ---------------------------------------------------------------------------


def others_are_left_alone(kind):
    """Gradients and updates of one block; the others keep every bit, and are not heard."""
    wrapped, objective = small(kind, 2), objective_of(kind, 2)
    pixels, labels = images(kind)
    draw = objective.draw(2, pixels, labels, torch.Generator().manual_seed(0))
    before = {k: v.clone() for k, v in wrapped.block(1).state_dict().items()}
    optimizer = torch.optim.AdamW(wrapped.parameters(), lr=1e-2, weight_decay=0.1)
    for _ in range(3):
        objective.loss(wrapped.block(2), pixels, draw).backward()
        assert all(p.grad is None for p in wrapped.block(1).parameters())
        assert all(p.grad is not None for p in wrapped.block(2).parameters())
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    after = wrapped.block(1).state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    z = torch.randn(2, CHANNELS[kind], 8, 8)
    out = wrapped.block(2)(z, torch.tensor([0.3, 0.6]))
    with torch.no_grad():
        for parameter in wrapped.block(1).parameters():
            parameter.add_(1.0)
    assert torch.equal(wrapped.block(2)(z, torch.tensor([0.3, 0.6])), out)


@pytest.mark.parametrize("kind", ALL)
def test_others_get_no_gradient_and_are_not_heard(kind):
    others_are_left_alone(kind)


def test_ends_that_blocks_share_are_seen(monkeypatch):
    real = wrapped_cut.made
    kept = []

    def shared(*args):
        kept.append(real(*args))
        for name, child in kept[0].named_children():
            if not isinstance(child, nn.ModuleList):
                setattr(kept[-1], name, child)
        return kept[-1]

    monkeypatch.setattr("shoestring.models.wrapped.made", shared)
    with pytest.raises(AssertionError):
        others_are_left_alone("sd3")


def test_the_last_texts_of_a_block_are_not_read_and_all_else_learns():
    wrapped, objective = small("sd3", 2), objective_of("sd3", 2)
    pixels, labels = images("sd3")
    draw = objective.draw(1, pixels, labels, torch.Generator().manual_seed(0))
    objective.loss(wrapped.block(1), pixels, draw).backward()
    left = {n.split(".")[2:4][0] + "." + n.split(".")[3] for n, p in
            wrapped.block(1).named_parameters() if p.grad is None}  # fmt: skip
    assert left == {"1.attn", "1.ff_context"}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("block", [1, 2])
def test_each_block_learns(kind, block):
    objective = objective_of(kind, 2)
    wrapped = small(kind, 2, only=block)
    net, (pixels, labels) = wrapped.block(block), images(kind, 12)
    optimizer = torch.optim.AdamW(net.parameters(), lr=3e-3)
    draws = torch.Generator().manual_seed(0)
    fixed = objective.draw(block, pixels, labels, torch.Generator().manual_seed(9))

    def loss():
        with torch.no_grad():
            return float(objective.loss(net, pixels, fixed))

    before = loss()
    for _ in range(30):
        objective.loss(net, pixels, objective.draw(block, pixels, labels, draws)).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    assert loss() < 0.8 * before


@pytest.mark.parametrize("kind", ALL)
def test_a_block_hears_its_condition(kind):
    block = small(kind, 2).block(1).eval()
    z = torch.randn(1, CHANNELS[kind], 8, 8, generator=torch.Generator().manual_seed(1))
    outs = [block(z, torch.tensor([0.4]), torch.tensor([label])) for label in (0, 1, 3)]
    later = block(z, torch.tensor([0.5]), torch.tensor([0]))
    assert not any(torch.equal(outs[0], other) for other in (outs[1], outs[2], later))


def classes_are_left_out_by_the_objective_alone():
    block = small("dit", 1).block(1).train()
    z, labels = torch.randn(64, 1, 8, 8), torch.zeros(64, dtype=torch.int64)
    noise = torch.zeros(64)
    torch.manual_seed(0)
    assert torch.equal(block(z, noise, labels), block(z, noise, labels))


def test_classes_are_left_out_by_the_objective_alone():
    classes_are_left_out_by_the_objective_alone()


def test_the_models_own_leaving_out_is_seen(monkeypatch):
    monkeypatch.setattr("shoestring.models.wrapped.WrappedBlock.train", nn.Module.train)
    with pytest.raises(AssertionError):
        classes_are_left_out_by_the_objective_alone()


# ---- nothing of the others is made -------------------------------------------------------------


def bytes_of(module):
    tensors = [*module.parameters(), *module.buffers()]
    return sum(t.numel() * t.element_size() for t in tensors if not t.is_meta)


def only_one_block_has_memory(kind, blocks):
    with Tracker() as tracker:
        wrapped = small(kind, blocks, only=2)
    held = bytes_of(wrapped)
    table = 0 if wrapped.table is None else wrapped.table.nbytes
    assert held == bytes_of(wrapped.block(2)) + table
    whole = bytes_of(plain(kind))
    layers = bytes_of(nn.ModuleList(getattr(plain(kind), n) for n in wrapped.config.call.lists))
    assert held - table < whole - layers * (1 - 1.35 / blocks)
    # At any time; beside weights only what a draw or a table of positions needs on the way.
    largest = max(p.nbytes for p in wrapped.block(2).parameters())
    assert tracker.ledgers["cpu"].peak < held + 2 * table + 4 * largest
    assert all(p.is_meta for p in wrapped.block(1).parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_only_one_block_has_memory_at_any_time(kind):
    only_one_block_has_memory(kind, 2)


def test_making_the_whole_first_is_seen(monkeypatch):
    real = wrapped_cut._around_construction
    monkeypatch.setattr(wrapped_cut, "_around_construction", lambda kinds, enter: real({}, enter))
    with pytest.raises(AssertionError):
        only_one_block_has_memory("dit", 2)


@pytest.mark.parametrize("kind", KINDS)
def test_a_block_made_alone_is_the_one_made_with_the_others(kind):
    every, alone = small(kind, 2, seed=3), small(kind, 2, seed=3, only=2)
    one, two = every.block(2).state_dict(), alone.block(2).state_dict()
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)
    other = small(kind, 2, seed=4, only=2).block(2).state_dict()
    assert not all(torch.equal(one[name], other[name]) for name in one)


def test_making_a_block_leaves_random_states_and_classes_as_they_were():
    kind = diffusers.models.attention.BasicTransformerBlock
    init, state = kind.__init__, torch.get_rng_state()
    small("dit", 2)
    assert kind.__init__ is init
    assert torch.equal(torch.get_rng_state(), state)


# ---- what is refused ---------------------------------------------------------------------------

HUNYUAN = {
    "_class_name": "HunyuanDiT2DModel", "num_layers": 4, "in_channels": 4, "sample_size": 8,
    "hidden_size": 16, "num_attention_heads": 2, "attention_head_dim": 8, "patch_size": 2,
    "cross_attention_dim": 16, "cross_attention_dim_t5": 16, "pooled_projection_dim": 16,
    "text_len": 4, "text_len_t5": 4,
}  # fmt: skip
UNET = {
    "_class_name": "UNet2DModel", "block_out_channels": [32, 32], "layers_per_block": 1,
    "down_block_types": ["DownBlock2D"] * 2, "up_block_types": ["UpBlock2D"] * 2, "sample_size": 8,
}  # fmt: skip
CHROMA = {
    "_class_name": "ChromaTransformer2DModel", "num_layers": 2, "num_single_layers": 2,
    "in_channels": 16, "joint_attention_dim": 12, "approximator_num_channels": 16,
    "approximator_hidden_dim": 16, "approximator_layers": 1, "axes_dims_rope": [2, 2, 4], **HEADS,
}  # fmt: skip
LATTE = {
    "_class_name": "LatteTransformer3DModel", "num_layers": 2, "sample_size": 8, "patch_size": 2,
    "in_channels": 4, "cross_attention_dim": 16, "caption_channels": 16, "video_length": 2, **HEADS,
    "norm_type": "ada_norm_single", "num_embeds_ada_norm": 10,
}  # fmt: skip


@pytest.mark.parametrize(
    ("config", "settings", "message"),
    [
        ({**DIT, "num_layers": 6}, {"blocks": 4}, r"6 layers .* in 4 blocks.*nearest: 3 or 6"),
        (FLUX, {"blocks": 4}, r"6 layers .* in 4 blocks.*nearest: 3 or 6"),
        (HUNYUAN, {}, r"HunyuanDiT2DModel is U-shaped \(layer 0 of blocks takes 'skip'\)"),
        (UNET, {}, r"UNet2DModel is U-shaped \(down_blocks\)"),
        ({"_class_name": "AutoencoderKL"}, {}, "AutoencoderKL is not an architecture"),
        (CHROMA, {}, "ChromaTransformer2DModel gives each layer what belongs to its number"),
        ({"_class_name": "Linear"}, {}, "has no model 'Linear'.*DiTTransformer2DModel"),
        ({}, {}, "has no model ''"),
        (
            LATTE, {},
            r"not an architecture.*temporal_transformer_blocks \(2\).*SD3Transformer2DModel.*call=",
        ),
        (
            DIT, {"call": Call(lists=("blocks",))},
            r"no list of layers blocks; it has transformer_blocks \(4\)",
        ),
        ({**DIT, "norm_type": "layer_norm"}, {}, "cannot be made of its settings"),
        ({**FLUX, "guidance_embeds": True}, {}, "guidance_embeds"),
        (FLUX, {"size": 7}, "images of 7 x 7 for FluxTransformer2DModel.*patch, 2"),
        (DIT, {"classes": 4}, "4 classes, and num_embeds_ada_norm .* is 3"),
        (SD3, {"rows": {}}, "is given no embeddings.*encoder_hidden_states"),
    ],
)  # fmt: skip
def test_what_cannot_be_cut_is_refused_with_the_reason(config, settings, message):
    settings = {"size": 8, "blocks": 2, **settings}
    kind = "dit" if config.get("_class_name") == "DiTTransformer2DModel" else "flux"
    if config is FLUX or "guidance_embeds" in config:
        settings["rows"] = {"encoder_hidden_states": (5, 12), "pooled_projections": (10,)}
    parts = parts_of(kind, settings.pop("blocks"))
    with pytest.raises(ConfigError, match=f"(?s){message}"):
        config_of(config, parts, **settings)


def test_embeddings_of_another_shape_are_refused():
    with pytest.raises(ConfigError, match=r"a table of shape \(3, 70\).*\(4, 70\)"):
        small("sd3", 2, table=torch.zeros(3, 70))


def test_weights_of_another_precision_are_refused():
    with pytest.raises(ConfigError, match=r"weights of torch.bfloat16.*model\.float"):
        small("dit", 2, plain("dit").bfloat16())


def test_lists_in_the_wrong_order_are_noticed_when_they_run():
    call = Call(
        lists=("single_transformer_blocks", "transformer_blocks"),
        given=("encoder_hidden_states", "pooled_projections"), top=1.0, packed=True,
    )  # fmt: skip
    wrapped = small("flux", 1, call=call)
    with pytest.raises(ConfigError, match="one after the other"):
        wrapped.block(1)(torch.zeros(1, 4, 8, 8), torch.zeros(1))


def test_images_that_the_model_does_not_give_back_are_refused():
    wrapped = wrap(DIT, parts_of("dit", 1), size=8, height=4, classes=3)
    with pytest.raises(ConfigError, match=r"gives .* for images \(1, 1, 4, 8\)"):
        wrapped.block(1)(torch.zeros(1, 1, 4, 8), torch.zeros(1))


def test_without_diffusers_it_is_said_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(ConfigError, match=r"pip install 'shoestring\[diffusion\]'"):
        small("dit", 2)
