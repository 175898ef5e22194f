"""Held-out numbers of a trained model: losses, the bound, what is drawn, and what is read.

Every arm is asked the same: the same images and texts, noise and masks, whoever answers them. The
loss of images is that of `objectives/denoise.py`, over the law (levels even in mass) and at fixed
levels. That of a text is its bound in bits per character, in parts of equal masked share.

*Read* is how much worse an answer gets when the condition is another's: another class for images,
the visible tokens of another text at the same masked places for text. Told for ranges of noise as
the blocks own them.
"""

import base64
import math
import statistics
import time
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...models.dit import TokenBlock
from ...objectives.masked_diffusion import MaskedDiffusion, bits_per_token
from ...ops.noise_levels import MaskTime, Partition, partition
from ...training.blockwise.merging import Merged
from ...training.blockwise.sampling import losses_at, sample_images, sample_text
from ...training.blockwise.task import Task, Texts
from .data import Images
from .distance import Eyes, Seen, frechet, seen
from .size import Size

SIGMAS = (0.05, 0.2, 0.5, 1.0, 2.0, 5.0, 20.0)
EVEN = 8  # levels even in mass
SHARES = 12  # of the masked tokens, in which a bound is told: 2, 3 and 4 divide it
READ = 256  # images that are asked with other classes
SHOWN = 20  # drawn images that are kept


def of_images(merged: Merged, images: Images, size: Size, ranges: Partition) -> dict[str, Any]:
    """Losses, and what is read of the class. ranges: of noise, that the latter is told for."""
    held = images.held[: size.scored]
    labels = None if images.held_labels is None else images.held_labels[: size.scored]
    law = merged.partition.law
    even = (torch.arange(EVEN, dtype=torch.float64) + 0.5) / EVEN
    found: dict[str, Any] = {
        "score": statistics.mean(losses_at(merged, held, labels, law.level(even).tolist())),
        "losses": losses_at(merged, held, labels, SIGMAS),
    }
    if labels is not None:
        found["read"] = [
            _class_read(merged, held[:READ], labels[:READ], ranges, block)
            for block in range(1, ranges.blocks + 1)
        ]
    return found


def _class_read(
    merged: Merged, held: Tensor, labels: Tensor, ranges: Partition, block: int
) -> dict[str, float]:  # fmt: skip
    """Mean loss over four levels of a range, with the right and with other classes."""
    ends = ranges.law.mass(torch.tensor(ranges.range(block), dtype=torch.float64))
    inside = ends[0] + (torch.arange(4, dtype=torch.float64) + 0.5) / 4 * ends.diff()
    levels = ranges.law.level(inside).tolist()
    other = (labels + 1 + torch.arange(len(labels)) % 9) % 10
    return {
        "right": statistics.mean(losses_at(merged, held, labels, levels)),
        "other": statistics.mean(losses_at(merged, held, other, levels)),
    }


def of_drawn(
    merged: Merged, eyes: Eyes, real: Seen, size: Size, seed: int, *, keep: bool
) -> dict[str, Any]:  # fmt: skip
    """Draws digits, the classes in turn: distance to the real ones, and the share that the eyes
    read as the class asked for. keep: with the first of them as bytes."""
    asked = [index % 10 for index in range(size.drawn)]
    started = time.process_time()
    images = sample_images(
        merged, size.drawn, steps=size.calls, labels=asked, guidance=size.guidance, seed=seed
    )
    cpu = time.process_time() - started
    found = seen(eyes, images)
    right = (found.classes == torch.tensor(asked)).double().mean()
    kept = {"picture": packed(images[:SHOWN])} if keep else {}
    return {
        "distance": frechet(found.features, real.features), "agreement": float(right),
        "drawing_cpu_seconds": cpu, **kept,
    }  # fmt: skip


def packed(images: Tensor) -> dict[str, Any]:
    """Images (N, 1, H, W) in [-1, 1] as bytes in base64 and their shape."""
    pixels = ((images.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    text = base64.b64encode(pixels.contiguous().numpy().tobytes()).decode()
    return {"shape": list(images.shape), "bytes": text}


def unpacked(picture: Mapping[str, Any]) -> Tensor:
    """Images in [-1, 1] of what `packed` gave."""
    raw = bytearray(base64.b64decode(picture["bytes"]))
    return torch.frombuffer(raw, dtype=torch.uint8).view(picture["shape"]).float() / 127.5 - 1


# ---- text --------------------------------------------------------------------------------------


def of_text(merged: Merged, task: Task, size: Size, ranges: int, *, keep: bool) -> dict[str, Any]:
    """Bits per character, its parts (all masked first), and what is read of the context."""
    assert isinstance(task, Texts)
    rows = task.held_out.rows(size.length)
    rows = rows[torch.linspace(0, len(rows) - 1, min(size.scored, len(rows)) // 2).long()]
    tokens = task.held_out.batch(rows, size.length)
    bits = bits_by_share(merged, tokens, size.draws)
    even = partition(MaskTime(), ranges)
    found: dict[str, Any] = {
        "score": sum(bits), "parts": bits,
        "read": [_context_read(merged, tokens, even, block) for block in range(1, ranges + 1)],
    }  # fmt: skip
    if keep:
        drawn = sample_text(merged, 3, steps=size.length, seed=0)
        found["drawn"] = [bytes(row.tolist()).decode("ascii", "replace") for row in drawn]
    return found


def bits_by_share(
    merged: Merged, tokens: Tensor, draws: int, *, shares: int = SHARES
) -> list[float]:
    """Bits a character of each of some equal shares of masked tokens, the most masked first; the
    shares are the same for every model, whoever answers them."""
    objective = MaskedDiffusion(partition=partition(MaskTime(), shares))
    table = merged.model.table
    assert table is not None
    bits = []
    for share in range(1, shares + 1):
        middle = torch.tensor(1 - (share - 0.5) / shares, dtype=torch.float64)
        net = merged.model.block(int(merged.partition.route(middle)))
        draw = torch.Generator().manual_seed(share)
        nats = objective.nelbo(net, share, tokens, table, draw, draws=draws)
        bits.append(bits_per_token(nats, tokens.shape[1]))
    return bits


@torch.no_grad()
def _context_read(
    merged: Merged, tokens: Tensor, even: Partition, block: int
) -> dict[str, float]:  # fmt: skip
    """Bits a masked token at the middle of a range, with its own context and another text's."""
    table = merged.model.table
    assert table is not None
    level = torch.tensor(1 - (block - 0.5) / even.blocks, dtype=torch.float64)
    net = merged.model.block(int(merged.partition.route(level)))
    assert isinstance(net, TokenBlock)
    objective = MaskedDiffusion(partition=even)
    levels = level.expand(len(tokens))
    draw = objective.draw_at(levels, tokens, torch.Generator().manual_seed(block))
    found = {}
    for name, seen_ in (("right", tokens), ("other", tokens.roll(1, dims=0))):
        hidden = net(seen_, draw.masked, levels.float(), table)[draw.masked]
        nats = F.cross_entropy(hidden @ table.T, tokens[draw.masked])
        found[name] = float(nats) / math.log(2)
    return found
