"""Small transformers of diffusers, and what they are given."""

import torch

from shoestring.models.wrapped import wrap
from shoestring.models.wrapped_config import Call
from shoestring.models.wrapped_sources import rows_table
from shoestring.objectives.denoise import Denoise
from shoestring.ops.noise_levels import FlowTime, LogNormal, partition

HEADS = {"num_attention_heads": 2, "attention_head_dim": 8}
TEXTS = {"joint_attention_dim": 12, "pooled_projection_dim": 10}
DIT = {
    "_class_name": "DiTTransformer2DModel", "in_channels": 1, "num_layers": 4, "sample_size": 8,
    "patch_size": 2, "num_embeds_ada_norm": 3, **HEADS,
}  # fmt: skip
SD3 = {
    "_class_name": "SD3Transformer2DModel", "sample_size": 8, "in_channels": 4, "out_channels": 4,
    "num_layers": 4, "caption_projection_dim": 16, "pos_embed_max_size": 8, **HEADS, **TEXTS,
}  # fmt: skip
FLUX = {
    "_class_name": "FluxTransformer2DModel", "in_channels": 16, "num_layers": 2,
    "num_single_layers": 4, "axes_dims_rope": [2, 2, 4], **HEADS, **TEXTS,
}  # fmt: skip
AURA = {
    "_class_name": "AuraFlowTransformer2DModel", "sample_size": 8, "num_mmdit_layers": 2,
    "num_single_dit_layers": 2, "joint_attention_dim": 12, "caption_projection_dim": 16,
    "pos_embed_max_size": 16, **HEADS,
}  # fmt: skip
SANA = {
    "_class_name": "SanaTransformer2DModel", "sample_size": 8, "in_channels": 4, "num_layers": 4,
    "out_channels": 4, "caption_channels": 12, "num_cross_attention_heads": 2,
    "cross_attention_head_dim": 8, "cross_attention_dim": 16, **HEADS,
}  # fmt: skip
PIXART = {
    "_class_name": "PixArtTransformer2DModel", "sample_size": 8, "num_layers": 4,
    "caption_channels": 12, "cross_attention_dim": 16, **HEADS,
}  # fmt: skip
CONFIGS = {"dit": DIT, "sd3": SD3, "flux": FLUX, "aura": AURA, "sana": SANA, "pixart": PIXART}
CHANNELS = {"dit": 1, "sd3": 4, "flux": 4, "aura": 4, "sana": 4, "pixart": 4}
PIXART_CALL = Call(
    lists=("transformer_blocks",), given=("encoder_hidden_states",),
    fixed={"added_cond_kwargs": {"resolution": None, "aspect_ratio": None}},
)  # fmt: skip
CLASSES = 3


def given(kind, seed=0):
    """Embeddings of three texts, and of none at the end."""
    draws = torch.Generator().manual_seed(seed)
    every = {
        "encoder_hidden_states": torch.randn(4, 5, 12, generator=draws),
        "pooled_projections": torch.randn(4, 10, generator=draws),
    }
    return every if kind in ("sd3", "flux") else dict(list(every.items())[:1])


def parts_of(kind, blocks, overlap=0.0):
    law = LogNormal() if kind == "dit" else FlowTime()
    return partition(law, blocks, overlap=overlap)


def objective_of(kind, blocks):
    return Denoise(
        kind="edm" if kind == "dit" else "flow", partition=parts_of(kind, blocks), classes=CLASSES
    )


def wrapped(kind, blocks, network=None, **settings):
    """A small model in blocks, from its config or from a model."""
    if kind == "pixart":  # which is not known
        settings.setdefault("call", PIXART_CALL)
    table, rows = (None, {}) if kind == "dit" else rows_table(given(kind))
    settings = {"classes": CLASSES, "rows": rows, "table": table, "size": 8, **settings}
    return wrap(network or CONFIGS[kind], parts_of(kind, blocks), **settings)


def images(kind, count=6, seed=0):
    """(images (N, C, 8, 8) in [-1, 1], labels): a light bar at one of three places."""
    draws = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % CLASSES
    pixels = 0.2 * torch.randn(count, CHANNELS[kind], 8, 8, generator=draws) - 0.5
    for n, label in enumerate(labels.tolist()):
        pixels[n, :, :, 2 * label : 2 * label + 2] += 1
    return pixels.clamp(-1, 1), labels
