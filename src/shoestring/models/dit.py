"""A plain diffusion transformer in B blocks, each a whole denoiser that needs none of the others.

Here a *block* is what block-wise training calls one: a run of `layers / blocks` neighbouring layers
with ends of its own (embedding, noise and class conditioning, final norm, readout). Blocks share
nothing but the frozen table of token embeddings, where there is one, so any of them can be made,
trained and saved alone; with one block it is an ordinary DiT.

Layers are pre-norm (LayerNorm, attention through SDPA, GELU MLP) with AdaLN-zero: the condition
(noise level and class) gives shift, scale and gate of both branches, and gates start at 0, so a
block starts as the identity. Images (N, C, H, W) are cut into patches, which have learned
positions. Tokens (N, T) are rows of the table (V, W), or a learned mask vector, and have rotary
positions; the readout is a projection into the table's space, whose product with the table is the
logits. Rows of length 1 are multiplied by sqrt(W) on both ways: as they are, they make a nearly
flat softmax. A classifier reads patches and one row more, the noised row of the table that stands
for the class, and answers there with logits. It may read rows instead of the image: those that a
frozen encoder or the block before it made of the image. Then the first of them, where the other
network answered, is where it answers.

Source: DiT, arXiv 2212.09748; DiffusionBlocks, arXiv 2506.14202, sections 3 and App. B; rotary
positions, arXiv 2104.09864.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import ConfigError
from .dit_config import DiTConfig
from .dit_layers import Condition, Layer, Turns, turns_of, waves_of

# N samples, T tokens or patches, D width, C width of the condition, W width of the table


class Block(nn.Module):
    """A denoiser of `layers / blocks` layers; what images and tokens share."""

    def __init__(self, config: DiTConfig, into: int, out: int) -> None:
        super().__init__()
        D = config.width
        self.config = config
        self.embed = nn.Linear(into, D)
        self.condition = Condition(config)
        count = config.layers // config.blocks
        self.layers = nn.ModuleList([Layer(config) for _ in range(count)])
        self.norm = nn.LayerNorm(D, elementwise_affine=False, eps=1e-6)
        self.modulation = nn.Linear(config.condition, 2 * D)
        self.head = nn.Linear(D, out)

    def run(self, x: Tensor, noise_N: Tensor, labels_N: Tensor | None) -> Tensor:
        """Embedded rows (N, T, D) to what the head gives, (N, T, out)."""
        condition = self.condition(noise_N, labels_N)
        return self.finish(self.through(x, condition), condition)

    def through(self, x: Tensor, condition: Tensor) -> Tensor:
        """Embedded rows (N, T, D) through the layers."""
        turns = self.turns(x)
        for layer in self.layers:
            x = layer(x, condition, turns)
        return x

    def finish(self, x: Tensor, condition: Tensor) -> Tensor:
        """What the layers gave (N, T, D) to what the head gives, (N, T, out)."""
        shift, scale = self.modulation(condition)[:, None].chunk(2, dim=-1)
        out: Tensor = self.head(self.norm(x) * (1 + scale) + shift)
        return out

    def turns(self, x: Tensor) -> Turns | None:
        """Rotary positions of the rows, where they have any."""
        return None

    @torch.no_grad()
    def reset(self, generator: torch.Generator) -> None:
        """Fresh weights, drawn on the CPU, so that they are the same on every device."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                bound = math.sqrt(6 / sum(module.weight.shape))
                draw = torch.rand(module.weight.shape, generator=generator)
                module.weight.copy_((2 * draw - 1) * bound)
                module.bias.zero_()
            elif isinstance(module, nn.Embedding):
                draw = torch.randn(module.weight.shape, generator=generator)
                module.weight.copy_(0.5 * draw)
        for module in self.modules():
            if isinstance(module, Layer | Block):
                module.modulation.weight.zero_()
        self.head.weight.zero_()


class PatchBlock(Block):
    """What reads images: (N, channels, height, size) as patches with learned positions."""

    def __init__(self, config: DiTConfig, into: int, out: int) -> None:
        super().__init__(config, into, out)
        self.positions = nn.Parameter(torch.empty(config.positions, config.width))

    def cut(self, images: Tensor) -> Tensor:
        """Images as (N, T, values of a patch)."""
        high, wide = self.config.patch_height, self.config.patch
        x = images.unflatten(3, (-1, wide)).unflatten(2, (-1, high))  # N, C, h, p, w, q
        return x.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)

    @torch.no_grad()
    def reset(self, generator: torch.Generator) -> None:
        super().reset(generator)
        D, wide = self.config.width, self.config.size // self.config.patch
        places = torch.arange(self.config.positions)
        rows, columns = places // wide, places % wide
        half = 0 if self.config.tall == 1 else D // 2
        waves = torch.cat((waves_of(rows, half), waves_of(columns, D - half)), dim=1)
        self.positions.copy_(waves)


class ImageBlock(PatchBlock):
    """A denoiser of images."""

    def __init__(self, config: DiTConfig) -> None:
        values = config.channels * config.patch_height * config.patch
        super().__init__(config, values, values)

    def forward(self, z: Tensor, noise_N: Tensor, labels_N: Tensor | None = None) -> Tensor:
        """z (N, channels, height, size), noise (N,), labels (N,) int64 or None -> z's shape.

        A label equal to `classes` stands for no class.
        """
        c = self.config
        x = self.run(self.embed(self.cut(z)) + self.positions, noise_N, labels_N)
        x = x.view(len(z), -1, c.size // c.patch, c.channels, c.patch_height, c.patch)
        return x.permute(0, 3, 1, 4, 2, 5).reshape(z.shape)


class Answering(Block):
    """A denoiser of an image's class."""

    def rows_of(self, z_NW: Tensor, seen: Tensor) -> Tensor:
        """z and what is read, embedded: (N, T + 1, D), the first row is the one that answers."""
        raise NotImplementedError

    def forward(self, z_NW: Tensor, noise_N: Tensor, seen: Tensor) -> Tensor:
        """A noised row of the table (N, W), noise (N,), what is read -> logits (N, answers)."""
        return self.run(self.rows_of(z_NW, seen), noise_N, None)[:, 0]

    def rows(self, z_NW: Tensor, noise_N: Tensor, seen: Tensor) -> Tensor:
        """The rows (N, T + 1, D) that stand behind the last layer."""
        return self.through(self.rows_of(z_NW, seen), self.condition(noise_N, None))


class AnswerBlock(Answering, PatchBlock):
    """One that reads the image, (N, channels, height, size)."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__(config, config.row, config.answers)
        values = config.channels * config.patch_height * config.patch
        self.patches = nn.Linear(values, config.width)

    def rows_of(self, z_NW: Tensor, seen: Tensor) -> Tensor:
        seen = self.patches(self.cut(seen)) + self.positions
        return torch.cat((self.embed(z_NW)[:, None], seen), dim=1)


class RowsBlock(Answering):
    """One that reads rows (N, T + 1, V) of another network. Where V is its own width it begins by
    taking them as they are."""

    def __init__(self, config: DiTConfig, width: int) -> None:
        super().__init__(config, config.row, config.answers)
        self.stem = nn.Linear(width, config.width)

    def rows_of(self, z_NW: Tensor, seen: Tensor) -> Tensor:
        seen = self.stem(seen)
        return torch.cat((seen[:, :1] + self.embed(z_NW)[:, None], seen[:, 1:]), dim=1)

    @torch.no_grad()
    def reset(self, generator: torch.Generator) -> None:
        super().reset(generator)
        if self.stem.in_features == self.stem.out_features:
            self.stem.weight.copy_(torch.eye(self.stem.in_features))


class TokenBlock(Block):
    """A denoiser of masked tokens."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__(config, config.row, config.row)
        self.mask = nn.Parameter(torch.empty(config.width))

    def forward(
        self,
        tokens_NT: Tensor,
        masked_NT: Tensor,
        noise_N: Tensor,
        table_VW: Tensor,
        labels_N: Tensor | None = None,
    ) -> Tensor:
        """Tokens, which of them are masked (boolean), noise (N,) -> (N, T, W), whose product with
        the table's rows is the logits. What stands at a masked place is not looked at."""
        scale = table_VW.shape[1] ** 0.5
        rows = F.embedding(tokens_NT, table_VW) * scale
        x = torch.where(masked_NT[..., None], self.mask, self.embed(rows))
        return self.run(x, noise_N, labels_N) * scale

    def turns(self, x: Tensor) -> Turns:
        return turns_of(x.shape[1], self.config.width // self.config.heads, x.device)

    @torch.no_grad()
    def reset(self, generator: torch.Generator) -> None:
        super().reset(generator)
        self.mask.copy_(torch.randn(self.mask.shape, generator=generator))


class DiT(nn.Module):
    """B blocks and the frozen table; block b of 1..B is `blocks[b - 1]`, the highest noise first.

    A plain constructor leaves the weights to torch's; `make` gives them, of all blocks or of one.
    """

    table: Tensor | None

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.config = config
        self.blocks = nn.ModuleList([self.one(config, b) for b in range(1, config.blocks + 1)])
        self.register_buffer("table", None, persistent=True)

    @staticmethod
    def one(config: DiTConfig, block: int) -> Block:
        """Block 1..B of what the shape is for."""
        reads = config.reads_rows(block)
        if reads is not None:
            return RowsBlock(config, reads[1])
        kind = AnswerBlock if config.answers else ImageBlock if config.size else TokenBlock
        return kind(config)

    @classmethod
    def make(
        cls,
        config: DiTConfig,
        *,
        seed: int,
        only: int | None = None,
        table: Tensor | None = None,
        device: torch.device | str = "cpu",
    ) -> "DiT":
        """A DiT with fresh weights. The weights of a block depend on the seed and its number alone.

        only: make that block's (1..B); the others stay on the meta device and take no memory.
        table: (V, W), for tokens and answers.
        """
        wanted = (config.table_rows, config.row)
        if config.table_rows and (table is None or tuple(table.shape) != wanted):
            raise ConfigError(
                f"a table of shape {None if table is None else tuple(table.shape)}",
                expected=f"{wanted}",
            )
        with torch.device("meta"):
            model = cls(config)
        model.table = None if table is None else table.to(device)
        for block in range(1, config.blocks + 1) if only is None else (only,):
            model.fill(block, seed=seed, device=device)
        return model

    def fill(self, block: int, *, seed: int, device: torch.device | str = "cpu") -> None:
        """Give a block that is on the meta device its fresh weights."""
        part = self.block(block).to_empty(device=device)
        part.reset(torch.Generator().manual_seed(seed * 1_000_003 + block))

    def block(self, block: int) -> Block:
        """Block b of 1..B."""
        if isinstance(block, bool) or block not in range(1, self.config.blocks + 1):
            raise ConfigError(f"block {block}", expected=f"1 to {self.config.blocks}")
        part = self.blocks[block - 1]
        assert isinstance(part, Block)
        return part


def unit_table(rows: int, width: int, *, seed: int) -> Tensor:
    """A frozen target table (V, W) with rows of length 1, float32: orthonormal where V <= W, else
    in random directions. The same on every machine to the last bit of a float32, nearly always;
    what counts is the hash of the one that is used."""
    draw = torch.randn(
        rows, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )
    if rows <= width:
        q, r = torch.linalg.qr(draw.T)
        draw = (q * r.diagonal().sign()).T
    return F.normalize(draw, dim=1).float().contiguous()
