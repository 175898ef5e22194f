"""Blocks of an autoregressive language model as jobs: bytes of a text, each denoised from those
before it. Experimental: see docs/blockwise-text.md for what it can and cannot do."""

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...models.causal import Causal, CausalBlock
from ...models.causal_config import CausalConfig
from ...models.dit import unit_table
from ...objectives import token_denoising as ops
from ...objectives.token_denoising import OWN_BITS, TokenDenoising
from .config import BlockwiseConfig
from .letters import VOCABULARY, read_letters
from .task import HELD_OUT, Denoiser, Task, generator_of, parts_of, read_table


class Tokens(Task):
    """Denoising of the bytes that follow; every `mixed_every`-th update predicts them plainly."""

    device = torch.device("cpu")
    table: Tensor
    shape: CausalConfig

    def __init__(self, config: BlockwiseConfig) -> None:
        super().__init__(config)
        data, settings, model = config.data, config.blockwise, config.model
        self.train, self.held_out = read_letters(data.source, data.held_out, data.sequence_length)
        self.data_digest = self.train.digest
        self.parts = parts_of(settings)
        self.objective = TokenDenoising(
            partition=self.parts, top_share=settings.top_share, mixed_every=settings.mixed_every
        )
        self.table = (
            read_table(Path(settings.table), VOCABULARY)
            if settings.table
            else unit_table(VOCABULARY, min(VOCABULARY, model.hidden_size), seed=config.run.seed)
        )
        self.shape = CausalConfig(
            blocks=settings.blocks, layers=model.num_hidden_layers, width=model.hidden_size,
            heads=model.num_attention_heads, hidden=model.intermediate_size,
            condition=model.condition_size, vocabulary=VOCABULARY, length=data.sequence_length,
            table_width=self.table.shape[1], beside=settings.beside,
            prelude=model.prelude_layers, coda=model.coda_layers,
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
            return self.objective.ordinary_loss(net, self._batch(generator), self.table)
        return self.loss(net, block, generator)

    def loss(self, net: Denoiser, block: int, generator: torch.Generator) -> Tensor:
        """See `TokenDenoising.loss`."""
        assert isinstance(net, CausalBlock)
        tokens = self._batch(generator)
        draw = self.objective.draw(block, tokens, self.table.shape[1], generator)
        return self.objective.loss(net, tokens, draw, self.table)

    def _batch(self, generator: torch.Generator) -> Tensor:
        length = self.config.data.sequence_length
        starts = self.train.starts(self.config.data.batch_size, length, generator)
        return self.train.batch(starts, length, self.device)

    @torch.no_grad()
    def evaluate(self, net: Denoiser, block: int) -> dict[str, float]:
        """Nats a byte over the block's own levels: with the bytes before, with those of other
        texts, and of one who sees z alone. Of block 1 also at the highest level, where z says
        nothing. In bits a byte, what the block foresees by itself, which is a likelihood."""
        assert isinstance(net, CausalBlock)
        plain, found = TokenDenoising(partition=self.parts), dict[str, list[Tensor]]()

        def note(name: str, values: Tensor) -> None:
            found.setdefault(name, []).append(values.flatten().double())

        for number, tokens in enumerate(self._held_out_texts().split(self.config.data.batch_size)):
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

    def _held_out_texts(self) -> Tensor:
        length = self.config.data.sequence_length
        rows = self.held_out.rows(length)
        rows = rows[torch.linspace(0, len(rows) - 1, min(HELD_OUT, len(rows))).long()]
        return self.held_out.batch(rows, length, self.device)


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
