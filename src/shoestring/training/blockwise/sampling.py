"""What a merged model draws and knows: every noise level is answered by the block that owns it.

Images come by Euler steps from the highest level down a grid even in mass, one block a step;
the last call's D is the image. With guidance g, D = D_none + g (D_class - D_none). Text comes by
unmasking: between two levels of masses m > m' every masked token is drawn with probability
(m - m') / m, from the block's own prediction, and then stays. A class is answered by the chain of
D = softmax(logits) @ table from noise alone. One chain *draws* a class, which is right less often
than the likeliest class is; the mean over several chains comes back to that.

Source: EDM, arXiv 2206.00364; classifier-free guidance, 2207.12598; MD4, 2406.04329, sec. 3.
"""

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from ...errors import ConfigError
from ...models.dit import DiT
from ...models.dit_config import DiTConfig
from ...models.wrapped import Wrapped
from ...objectives import label_denoising
from ...objectives.denoise import Denoise, Draw
from ...objectives.label_denoising import LabelDenoising
from ...objectives.masked_diffusion import MaskedDiffusion, bits_per_token
from ...ops.preconditioning import euler_step
from .encoder import rows_of
from .merging import Merged

# N samples, T tokens, K levels


@torch.no_grad()
def denoised(
    merged: Merged,
    z: Tensor,
    level: float,
    labels_N: Tensor | None = None,
    *,
    guidance: float = 1.0,
) -> Tensor:
    """The clean images that the owner of a level expects behind z (N, C, H, W).

    guidance: 1 = as asked for, 0 = without a class, more = away from the latter.
    """
    objective, net = _images(merged), merged.model.block(_owner(merged, level))
    levels = torch.full((len(z),), level, dtype=torch.float64)
    asked = objective.denoised(net, z, levels, labels_N)
    if labels_N is None or guidance == 1.0:
        return asked
    free = objective.denoised(net, z, levels, torch.full_like(labels_N, objective.classes))
    return free + guidance * (asked - free)


@torch.no_grad()
def sample_images(
    merged: Merged,
    count: int,
    *,
    steps: int | None = None,
    labels: Sequence[int] | None = None,
    guidance: float = 1.0,
    seed: int = 0,
    first: float | None = None,
) -> Tensor:
    """`count` images (N, C, H, W), float32.

    steps: calls of a block (of two with guidance); by default one more than there are blocks, which
    visits each.  labels: a class for each image; None = no class.  first: level to start at, the
    highest if not given.  ConfigError for classes that there are not, or where there are none.
    """
    objective, shape = _images(merged), merged.model.config
    if count < 1:
        raise ConfigError(f"{count} images", expected="1 or more")
    labels_N = _labels(labels, count, shape.classes)
    grid = merged.partition.grid(steps, first=first)
    noise = torch.randn(
        count, shape.channels, shape.tall, shape.size, generator=torch.Generator().manual_seed(seed)
    )
    z = noise.to(_device(merged.model))
    z = objective.start(z) if first is None else _started(objective, z, first)
    if labels_N is not None:
        labels_N = labels_N.to(z.device)
    for level, following in itertools.pairwise(grid):
        clean = denoised(merged, z, level, labels_N, guidance=guidance)
        ends = torch.tensor([[level], [following]], dtype=torch.float64, device=z.device)
        z = euler_step(z, clean, *ends)
    if grid[-1] > 0:  # time 0 of a flow has no noise left
        z = denoised(merged, z, grid[-1], labels_N, guidance=guidance)
    return z


@torch.no_grad()
def sample_text(
    merged: Merged, count: int, *, steps: int = 64, temperature: float = 1.0, seed: int = 0
) -> Tensor:
    """`count` texts (N, T), int64, of a model of masked diffusion, unmasked in `steps` steps."""
    objective, table = _masked(merged), merged.model.table
    assert table is not None
    assert isinstance(merged.model.config, DiTConfig)
    if steps < 1 or not temperature > 0:
        raise ConfigError(
            f"{steps} steps at temperature {temperature}", expected="1 or more, and more than 0"
        )
    generator = torch.Generator().manual_seed(seed)
    shape = (count, merged.model.config.length)
    tokens = torch.zeros(shape, dtype=torch.int64, device=table.device)
    masked = torch.ones(shape, dtype=torch.bool, device=table.device)
    masses = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
    levels = objective.partition.law.level(masses).tolist()
    for level, (mass, following) in zip(levels, itertools.pairwise(masses.tolist()), strict=False):
        net = merged.model.block(_owner(merged, level))
        noise = torch.full((count,), level, device=table.device)
        logits = (net(tokens, masked, noise, table) @ table.T).float().cpu() / temperature
        drawn = torch.multinomial(logits.softmax(-1).flatten(0, 1), 1, generator=generator)
        u = torch.rand(shape, generator=generator, dtype=torch.float64)
        shown = masked & (u < (mass - following) / mass).to(masked.device)
        tokens = torch.where(shown, drawn.view(shape).to(tokens.device), tokens)
        masked = masked & ~shown
    return tokens


@torch.no_grad()
def classify(
    merged: Merged,
    images: Tensor,
    *,
    draws: int = 8,
    steps: int | None = None,
    first: float | None = None,
    seed: int = 0,
) -> Tensor:
    """Probabilities of the classes of images, (N, V) float32: the mean over `draws` chains.

    steps: calls of a block in a chain; by default one more than there are blocks, 1 = block 1's
    answer at the first level.  first: the level to start at, the highest if not given.
    """
    objective, table = _answers(merged), merged.model.table
    assert table is not None
    if draws < 1:
        raise ConfigError(f"{draws} draws", expected="1 or more")
    generator = torch.Generator().manual_seed(seed)
    start = merged.partition.law.high if first is None else first
    grid = [start] if steps == 1 else merged.partition.grid(steps, first=first)
    total = torch.zeros(len(images), len(table), device=table.device)
    read = Read(merged, images)
    for _ in range(draws):
        z = torch.randn(len(images), table.shape[1], generator=generator).to(table.device)
        z = z * (start**2 + 1 / table.shape[1]) ** 0.5
        for level, following in itertools.zip_longest(grid, grid[1:]):
            levels = torch.full((len(images),), level, dtype=torch.float64, device=table.device)
            block = _owner(merged, level)
            logits = objective.logits(merged.model.block(block), z, levels, read.by(block))
            if following is not None:
                to = torch.full_like(levels, following)
                z = euler_step(z, label_denoising.denoised(logits, table), levels, to)
        total += logits.softmax(dim=1)
    return total / draws


class Read:
    """What each block reads of some images, made once for all draws and levels."""

    def __init__(self, merged: Merged, images: Tensor) -> None:
        self._merged, self._last = merged, 1
        self._first = images if merged.encoder is None else rows_of(merged.encoder, images)
        self._rows = self._first

    def by(self, block: int) -> Tensor:
        """The images, the encoder's rows, or those of the block before."""
        config = self._merged.model.config
        if not (isinstance(config, DiTConfig) and config.sequential):
            return self._first
        if block < self._last:
            self._rows, self._last = self._first, 1
        while self._last < block:
            net, objective = self._merged.model.block(self._last), _answers(self._merged)
            self._rows = objective.rows(net, self._rows, config.row)
            self._last += 1
        return self._rows


@torch.no_grad()
def losses_at(
    merged: Merged,
    images: Tensor,
    labels_N: Tensor | None,
    levels_K: Sequence[float],
    seed: int = 0,
) -> list[float]:
    """Mean loss of held-out images at each of some levels, each answered by its owner."""
    objective, shape = _images(merged), merged.model.config
    wanted = (shape.channels, shape.tall, shape.size)
    if tuple(images.shape[1:]) != wanted:
        raise ConfigError(f"images of shape {tuple(images.shape)}", expected=f"(N, *{wanted})")
    classes = [] if labels_N is None else labels_N.tolist()
    strange = [each for each in classes if not 0 <= each <= shape.classes]
    if strange:
        raise ConfigError(
            f"class {strange[0]}",
            expected=f"0 to {shape.classes - 1}, or {shape.classes} for none",
        )
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(seed))
    found = []
    for level in levels_K:
        levels = torch.full((len(images),), level, dtype=torch.float64)
        draw = Draw(levels, noise.to(images.device), labels_N)
        net = merged.model.block(_owner(merged, level))
        found.append(float(objective.losses(net, images, draw).double().mean()))
    return found


def bits_per_character(
    merged: Merged, texts_NT: Tensor, *, draws: int = 8, seed: int = 0
) -> tuple[float, list[float]]:
    """(bits a token of the bound, each block's part of it) of texts; where tokens are bytes, bits a
    character. An upper bound on the true number, estimated with `draws` levels a text and block."""
    objective, table = _masked(merged), merged.model.table
    assert table is not None
    if draws < 1:
        raise ConfigError(f"{draws} draws", expected="1 or more")
    parts = []
    for block in range(1, merged.partition.blocks + 1):
        nats = objective.nelbo(
            merged.model.block(block), block, texts_NT, table,
            torch.Generator().manual_seed(seed + block), draws=draws,
        )  # fmt: skip
        parts.append(bits_per_token(nats, texts_NT.shape[1]))
    return sum(parts), parts


def _owner(merged: Merged, level: float) -> int:
    return int(merged.partition.route(torch.tensor(level, dtype=torch.float64)))


def _images(merged: Merged) -> Denoise:
    if not isinstance(merged.objective, Denoise):
        raise other_kind(merged, "images", "a model of edm or flow")
    return merged.objective


def _masked(merged: Merged) -> MaskedDiffusion:
    if not isinstance(merged.objective, MaskedDiffusion):
        raise other_kind(merged, "a text unmasked or its bound", "a model of masked diffusion")
    return merged.objective


def _answers(merged: Merged) -> LabelDenoising:
    if not isinstance(merged.objective, LabelDenoising):
        raise other_kind(merged, "classes", "a model of labels")
    return merged.objective


def other_kind(merged: Merged, asked: str, expected: str) -> ConfigError:
    """What a model is asked for that it has not, and what it has."""
    kind, hint = merged.facts["objective"]["kind"], {
        "masked": "sample_text draws texts, bits_per_character scores them.",
        "labels": "classify answers with the classes of images.",
        "tokens": "decoding.write_on writes texts. Its chain has no likelihood and no perplexity: "
        "decoding.next_token_bits has that of a block's own next-token predictions.",
    }  # fmt: skip
    images = "sample_images draws images, losses_at scores them at fixed noise levels."
    return ConfigError(
        f"a model of {kind} was asked for {asked}", expected=expected, hint=hint.get(kind, images)
    )


def _started(objective: Denoise, noise: Tensor, first: float) -> Tensor:
    """z at a level below the highest, where the data's own part is not nothing any more."""
    if objective.kind == "flow":
        return noise
    return noise * (first**2 + objective.data_std**2) ** 0.5


def _labels(labels: Sequence[int] | None, count: int, classes: int) -> Tensor | None:
    if labels is None:
        return None
    strange = sorted({each for each in labels if not 0 <= each < classes})
    if len(labels) != count or strange:
        what = f"class {strange[0]}" if strange else f"{len(labels)} classes"
        raise ConfigError(
            f"{what} for {count} images",
            expected=f"{count} of 0 to {classes - 1}" if classes else "none: the model has none",
        )
    return torch.tensor(labels, dtype=torch.int64)


def _device(model: DiT | Wrapped) -> torch.device:
    return next(model.parameters()).device
