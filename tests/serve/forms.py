"""Forms of one layer, as tests want them."""

import torch

from shoestring.ops.row_code import RowCode
from shoestring.serve.form import LayerForm, Tier, Turn


def plain(width=20, *, heads=2, key_bits=4, value_bits=3, window=20, sinks=3, centre=True):
    """An exact window, then the same bits for all."""
    code = RowCode.uniform(heads, width, key_bits, value_bits)
    tiers = ([Tier(window, None)] if window else []) + [Tier(None, code)]
    centre = centre and window > 0
    return LayerForm(heads, width, Turn.random(heads, width, 1), tuple(tiers), sinks, centre)


def graded(width=24, *, heads=2, rooms=(10, 30), sinks=3, seed=0):
    """No window: tiers with fewer bits from one to the next, a turn and a mean of each head."""
    generator = torch.Generator().manual_seed(seed)
    matrix = torch.randn(2, heads, width, width, generator=generator, dtype=torch.float64)
    matrix = matrix + 12 * torch.eye(width)
    mean = torch.randn(2, heads, width, generator=generator).double()
    shape = (2, heads, width // 8)
    codes = [
        RowCode(
            torch.randint(low, low + 4, shape, generator=generator, dtype=torch.uint8),
            torch.rand(shape, generator=generator).double() + 0.1,
            size,
        )
        for low, size in ((5, 2), (3, 2), (0, 1))
    ]
    tiers = tuple(Tier(room, code) for room, code in zip((*rooms, None), codes, strict=True))
    return LayerForm(
        heads, width, Turn(matrix, matrix.inverse().float().contiguous(), mean), tiers, sinks
    )
