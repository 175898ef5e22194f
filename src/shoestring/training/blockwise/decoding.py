"""Writing a text with a merged autoregressive model, byte by byte.

The chain: for the token that follows, z starts as noise of the highest level; levels fall as for
images, each answered by the block that owns it, with one noised row that sees the clean rows the
block has kept; D = softmax(logits) @ table between the steps; the last call's likeliest token is
taken. Then every block reads it, so that none reads a token twice: B blocks of L/B layers, L layers
in all, beside (number of calls) L/B for the noised rows. A plain model of L layers has the former
only.

At the end of the chain z is all but the token's own row and what is answered is certain, so a
temperature there does nothing. What is drawn is drawn at the start: by the noise alone, or, with a
temperature, from the first call's answer, whose row then takes the place of D.

Plain: one block that was trained with the mixed objective is an autoregressive model of L/B layers
by itself, and its next-token predictions are a likelihood; the chain has none.

Source: DiffusionBlocks, arXiv 2506.14202, 5.4.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ...errors import ConfigError
from ...models.causal import Causal, CausalBlock, Kept
from ...objectives import token_denoising as ops
from ...objectives.token_denoising import TokenDenoising
from ...ops.preconditioning import euler_step
from .merging import Merged
from .sampling import other_kind

# N texts, T tokens, V vocabulary, W width of the table


@torch.no_grad()
def write_on(
    merged: Merged,
    prompts_NT: Tensor,
    count: int,
    *,
    steps: int | None = None,
    temperature: float | None = None,
    first: float | None = None,
    seed: int = 0,
) -> Tensor:
    """The tokens (N, count), int64, that the chain writes after prompts (N, T), T from 0 on.

    steps: calls of a block for a token; by default one more than there are blocks, 1 = the answer
    at the first level.  temperature: draws the first call's answer, 0 = its likeliest; None = the
    starting noise decides.  first: the level to start at, the highest if not given.  ConfigError
    for a text longer than those of the training, and for a model of another kind.
    """
    chain = Chain.of(merged, steps=steps, first=first)
    _check(chain.model, prompts_NT, count, temperature)
    generator = torch.Generator().manual_seed(seed)
    states = [net.begin(prompts_NT, chain.table)[1] for net in chain.nets]
    written = []
    for place in range(count):
        logits = chain.logits(states, generator, temperature)
        written.append(logits.argmax(dim=1))
        if place < count - 1:
            states = [
                net.extend(kept, written[-1], chain.table)[1]
                for net, kept in zip(chain.nets, states, strict=True)
            ]
    return torch.stack(written, dim=1)


@torch.no_grad()
def write_plainly(
    merged: Merged,
    prompts_NT: Tensor,
    count: int,
    *,
    block: int = 1,
    temperature: float = 1.0,
    seed: int = 0,
) -> Tensor:
    """As `write_on`, by one block's own next-token predictions. temperature 0: the likeliest."""
    _check(_causal(merged)[0], prompts_NT, count, temperature)
    net, table = plain_block(merged, block)
    generator = torch.Generator().manual_seed(seed)
    hidden, kept = net.begin(prompts_NT, table)
    written = []
    for place in range(count):
        written.append(_drawn((hidden @ table.T).float(), temperature, generator))
        if place < count - 1:
            hidden, kept = net.extend(kept, written[-1], table)
    return torch.stack(written, dim=1)


@torch.no_grad()
def next_token_bits(merged: Merged, texts_NT: Tensor, blocks: Sequence[int] = (1,)) -> float:
    """Bits a token of texts under the mean of the next-token predictions of some blocks, each by
    itself: minus a mean log-likelihood, of these blocks and not of the chain, which has none."""
    chances: Tensor | None = None
    for block in blocks:
        net, table = plain_block(merged, block)
        logs = -ops.nats(net.next_tokens(texts_NT, table), texts_NT, table).double()
        chances = logs if chances is None else torch.logaddexp(chances, logs)
    if chances is None:
        raise ConfigError("next-token predictions of no block", expected="one block or more")
    return float(math.log(len(blocks)) - chances.mean()) / math.log(2)


@dataclass(frozen=True, slots=True)
class Chain:
    """Levels from the highest down, who answers each, and the table between them."""

    model: Causal
    nets: list[CausalBlock]
    table: Tensor
    levels: list[float]
    owners: list[int]

    @classmethod
    def of(cls, merged: Merged, *, steps: int | None = None, first: float | None = None) -> "Chain":
        """The chain of a merged model. ConfigError for levels that there are not, and where no
        noised row was trained."""
        model, objective = _causal(merged)
        if objective.mixed_every == 1:
            raise ConfigError(
                "blocks trained on the next byte alone were asked for their chain",
                expected="blockwise.mixed_every of 0, or of 2 or more",
                hint="decoding.write_plainly writes with one of them; sample has --block.",
            )
        parts = merged.partition
        start = parts.law.high if first is None else first
        owners = parts.route(torch.tensor([start], dtype=torch.float64))
        levels = [start]
        if steps != 1:
            levels = parts.grid(parts.blocks + 1 if steps is None else steps, first=start)
            owners = parts.route(torch.tensor(levels, dtype=torch.float64))
        nets = [model.block(block) for block in range(1, parts.blocks + 1)]
        assert model.table is not None
        return cls(model, nets, model.table, levels, [owner - 1 for owner in owners.tolist()])

    def logits(
        self, states: Sequence[Kept], generator: torch.Generator, temperature: float | None
    ) -> Tensor:
        """The last call's logits (N, V) of the token after what each block has kept."""
        count, width = len(states[0].entry), self.table.shape[1]
        noise = torch.randn(count, width, generator=generator).to(self.table.device)
        z = noise * (self.levels[0] ** 2 + 1 / width) ** 0.5
        logits = z
        for place, (level, owner) in enumerate(zip(self.levels, self.owners, strict=True)):
            levels = torch.full((count,), level, dtype=torch.float64, device=z.device)
            logits = answer(self.nets[owner], states[owner], z, levels, self.table)
            if place == 0 and temperature is not None:
                chosen = _drawn(logits, temperature, generator)
                if len(self.levels) == 1:
                    return F.one_hot(chosen, len(self.table)).float()
                clean = self.table[chosen]
            else:
                clean = ops.denoised(logits, self.table)
            if place < len(self.levels) - 1:
                following = torch.full_like(levels, self.levels[place + 1])
                z = euler_step(z, clean, levels, following)
        return logits


def answer(net: CausalBlock, kept: Kept, z_NW: Tensor, level_N: Tensor, table_VW: Tensor) -> Tensor:
    """Logits (N, V) of a block for one noised row after what it has kept."""
    z, noise = ops.scaled(z_NW, level_N)
    return (net.answer(kept, z, noise) @ table_VW.T).float()


def plain_block(merged: Merged, block: int) -> tuple[CausalBlock, Tensor]:
    """(The block, the table), if it was trained to foresee tokens by itself. ConfigError if not."""
    model, objective = _causal(merged)
    if not objective.mixed_every:
        raise ConfigError(
            "blocks of the pure objective were asked for next-token predictions of their own",
            expected="blocks trained with blockwise.mixed_every of 1 or more",
            hint="The chain draws texts; its loss at fixed noise levels is in the receipts.",
        )
    assert model.table is not None
    return model.block(block), model.table


def _causal(merged: Merged) -> tuple[Causal, TokenDenoising]:
    if not isinstance(merged.objective, TokenDenoising) or not isinstance(merged.model, Causal):
        raise other_kind(merged, "the bytes that follow a text", "a model of tokens")
    return merged.model, merged.objective


def _check(model: Causal, prompts: Tensor, count: int, temperature: float | None) -> None:
    length = model.config.length
    if count < 1 or prompts.shape[1] + count > length:
        raise ConfigError(
            f"{count} bytes after a prompt of {prompts.shape[1]}",
            expected=f"1 or more, and {length} with the prompt, as long as a text was in training",
        )
    if temperature is not None and not 0 <= temperature < math.inf:
        raise ConfigError(f"a temperature of {temperature}", expected="0 or more")


def _drawn(logits: Tensor, temperature: float, generator: torch.Generator) -> Tensor:
    """A token of each row, (N,)."""
    if temperature == 0:
        return logits.argmax(dim=1)
    chances = (logits.cpu() / temperature).softmax(dim=1)
    return torch.multinomial(chances, 1, generator=generator)[:, 0].to(logits.device)


# ---- twin --------------------------------------------------------------------------------------


@torch.no_grad()
def logits_ref(
    net: CausalBlock, tokens_NT: Tensor, z_NW: Tensor, level_N: Tensor, table_VW: Tensor
) -> Tensor:
    """Twin of `answer`: (N, V) for the token after tokens (N, T), all rows made anew, as in
    training. What stands at the other noised rows, and after the text, is not seen."""
    padded = torch.cat((tokens_NT, tokens_NT.new_zeros(len(z_NW), 1)), dim=1)
    z = z_NW[:, None].expand(-1, padded.shape[1], -1)
    scaled, noise = ops.scaled(z, level_N)
    hidden: Tensor = net(padded, scaled, noise, table_VW)
    return (hidden[:, -1] @ table_VW.T).float()
