"""Blocks of an autoregressive language model as jobs: bytes of a text, each denoised from those
before it. Experimental: see docs/blockwise-text.md for what it can and cannot do."""

import math
from typing import Any

import torch
from torch import Tensor

from ...models.causal import Causal, CausalBlock
from ...models.causal_config import CausalConfig
from ...objectives import token_denoising as ops
from ...objectives.token_denoising import OWN_BITS, TokenDenoising
from ..draws import generator_of
from .config import BlockwiseConfig
from .task import Denoiser, OfBytes


class Tokens(OfBytes):
    """Denoising of the bytes that follow; every `mixed_every`-th update predicts them plainly."""

    shape: CausalConfig

    def __init__(self, config: BlockwiseConfig) -> None:
        super().__init__(config)
        settings, model = config.blockwise, config.model
        self.objective = TokenDenoising(
            partition=self.parts, top_share=settings.top_share, mixed_every=settings.mixed_every
        )
        self.shape = CausalConfig(
            beside=settings.beside, prelude=model.prelude_layers, coda=model.coda_layers,
            **self.text_shape(),
        )  # fmt: skip

    def objective_facts(self) -> dict[str, Any]:
        """Kind, and whether blocks also predict the next token plainly."""
        return {"kind": "tokens", "mixed_every": self.objective.mixed_every}

    def fresh(self, block: int, device: torch.device) -> Causal:
        """A network in which that block has its first weights and no other has any."""
        made = Causal.make(
            self.shape, seed=self.config.run.seed, only=block, table=self.table, device=device
        )
        assert isinstance(made, Causal)
        return made

    def step_loss(self, net: Denoiser, block: int, step: int, part: int) -> Tensor:
        """The loss of microbatch `part` of update `step`, which is of one or of the other kind."""
        generator = generator_of(self.config.run.seed, block, step, part)
        if self.objective.is_ordinary(step):
            assert isinstance(net, CausalBlock)
            return self.objective.ordinary_loss(net, self.batch(generator), self.table)
        return self.loss(net, block, generator)

    def loss(self, net: Denoiser, block: int, generator: torch.Generator) -> Tensor:
        """See `TokenDenoising.loss`."""
        assert isinstance(net, CausalBlock)
        tokens = self.batch(generator)
        draw = self.objective.draw(block, tokens, self.table.shape[1], generator)
        return self.objective.loss(net, tokens, draw, self.table)

    @torch.no_grad()
    def evaluate(self, net: Denoiser, block: int) -> dict[str, float]:
        """Nats a byte over the block's own levels: with the bytes before, with those of other
        texts, and of one who sees z alone. Of block 1 also at the highest level, where z says
        nothing. In bits a byte, what the block foresees by itself, which is a likelihood."""
        assert isinstance(net, CausalBlock)
        plain, found = TokenDenoising(partition=self.parts), dict[str, list[Tensor]]()

        def note(name: str, values: Tensor) -> None:
            found.setdefault(name, []).append(values.flatten().double())

        for number, tokens in enumerate(self.held_out_batches()):
            if self.objective.mixed_every:
                foreseen = ops.nats(net.next_tokens(tokens, self.table), tokens, self.table)
                note(OWN_BITS, foreseen / math.log(2))
            if self.objective.mixed_every == 1:
                continue  # no noised row was ever trained
            generator = generator_of(0, 0, block, number)
            draw = plain.draw(block, tokens, self.table.shape[1], generator)
            for name, values in losses_of(plain, net, tokens, draw, self.table).items():
                note(name, values)
            if block == 1:
                top = ops.Draw(torch.full_like(draw.level, self.parts.law.high), draw.noise)
                note("loss at the top", losses_of(plain, net, tokens, top, self.table)["loss"])
        return {name: float(torch.cat(values).mean()) for name, values in found.items()}


def losses_of(
    objective: TokenDenoising, net: CausalBlock, tokens_NT: Tensor, draw: ops.Draw, table_VW: Tensor
) -> dict[str, Tensor]:
    """Cross-entropies (N, T) of a block at a draw: as trained, with the contexts of other texts of
    the batch (where there are two or more), and of z alone."""
    z = objective.noised(tokens_NT, draw, table_VW)
    level = draw.level.to(z.device)
    found = {"loss": ops.nats(
        objective.answers(net, tokens_NT, z, level, table_VW), tokens_NT, table_VW)}  # fmt: skip
    if len(tokens_NT) > 1:
        other = objective.answers(net, tokens_NT.roll(1, dims=0), z, level, table_VW)
        found["loss with other texts before"] = ops.nats(other, tokens_NT, table_VW)
    alone = ops.of_z_alone_ref(z, level, table_VW)
    found["loss of z alone"] = -alone.gather(2, tokens_NT[..., None])[..., 0]
    return found
