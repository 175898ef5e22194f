"""A language of assignments, and a small model that is trained to follow them.

A text is a shuffled list of pairs `a b ;`, links of chains a -> b -> c -> ...: each symbol is
written at most once as a key. Then come questions: a sign for 1, 2 or 4 hops and a symbol; the
answer names the symbols along the chain, one after the other, and ends with `;`. One hop is a
needle. With more, each answered symbol is the key of the next look-up, so that errors add up as
they do when a model reasons in steps.

The model starts with few pairs and gets more as it masters them.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

SYMBOLS = 256
END = SYMBOLS
HOPS = (1, 2, 4)
ASK = {hops: SYMBOLS + 1 + i for i, hops in enumerate(HOPS)}
CHAIN = 6  # symbols of a chain
_IGNORED = -100


@dataclass(frozen=True, slots=True)
class Lesson:
    """How a model is trained. pairs: of each stage; a stage ends when `mastered` of the answers'
    symbols are right in the mean of the last `steady` steps, or after `steps`."""

    pairs: tuple[int, ...] = (5, 10, 20, 40, 80, 160)
    rows: int = 32
    questions: int = 8
    rate: float = 1e-3
    mastered: float = 0.985
    steady: int = 20
    steps: int = 2500
    hidden: int = 128
    layers: int = 2
    heads: int = 4
    width: int = 64
    seed: int = 0


def texts(
    generator: torch.Generator, rows: int, pairs: int, questions: int, hops: tuple[int, ...] = HOPS
) -> tuple[Tensor, Tensor, int]:
    """ids (rows, t), labels (rows, t) that are -100 outside of answers, tokens ahead of the
    questions. Questions go through `hops` in turn."""
    chains = pairs // (CHAIN - 1)
    found, wanted = [], []
    for _ in range(rows):
        chain = torch.randperm(SYMBOLS, generator=generator)[: chains * CHAIN].view(chains, CHAIN)
        links = torch.stack([chain[:, :-1], chain[:, 1:]], -1).flatten(0, 1)
        links = links[torch.randperm(len(links), generator=generator)]
        text = torch.cat([links, torch.full((len(links), 1), END)], 1).flatten()
        parts, labels = [text], [torch.full_like(text, _IGNORED)]
        for index in range(questions):
            count = hops[index % len(hops)]
            row = int(torch.randint(chains, (), generator=generator))
            start = int(torch.randint(CHAIN - count, (), generator=generator))
            answer = torch.cat([chain[row, start + 1 : start + count + 1], torch.tensor([END])])
            asked = torch.tensor([ASK[count], int(chain[row, start])])
            parts += [asked, answer]
            labels += [torch.full_like(asked, _IGNORED), answer]
        found.append(torch.cat(parts))
        wanted.append(torch.cat(labels))
    return torch.stack(found), torch.stack(wanted), 3 * len(links)


def untrained(lesson: Lesson) -> LlamaForCausalLM:
    """The model of a lesson, drawn from its seed."""
    config = LlamaConfig(
        vocab_size=SYMBOLS + 1 + len(HOPS), hidden_size=lesson.hidden,
        intermediate_size=2 * lesson.hidden, num_hidden_layers=lesson.layers,
        num_attention_heads=lesson.heads, num_key_value_heads=lesson.heads // 2,
        head_dim=lesson.width,
        max_position_embeddings=2048, tie_word_embeddings=True, bos_token_id=None,
        eos_token_id=None, pad_token_id=None,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(lesson.seed)
        return LlamaForCausalLM(config)


def train(
    lesson: Lesson, told: Callable[[dict[str, float]], None] = lambda _: None
) -> tuple[LlamaForCausalLM, list[dict[str, float]]]:
    """The trained model, and a record of each stage: pairs, steps, right (share of symbols)."""
    model = untrained(lesson).train()
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=lesson.rate, weight_decay=0.0, betas=(0.9, 0.98)
    )
    generator = torch.Generator().manual_seed(lesson.seed + 1)
    stages: list[dict[str, float]] = []
    done = 0
    for pairs in lesson.pairs:
        right: list[float] = []
        while len(right) < lesson.steps:
            for group in optimizer.param_groups:
                group["lr"] = lesson.rate * min(1.0, (done + 1) / 30)
            right.append(_step(model, optimizer, texts(
                generator, lesson.rows, pairs, lesson.questions,
            )))  # fmt: skip
            done += 1
            if math.fsum(right[-lesson.steady :]) / lesson.steady >= lesson.mastered:
                break
        last = right[-lesson.steady :]
        stages.append({"pairs": pairs, "steps": len(right), "right": sum(last) / len(last)})
        told(stages[-1])
    return model.eval(), stages


def _step(
    model: LlamaForCausalLM, optimizer: torch.optim.Optimizer, drawn: tuple[Tensor, Tensor, int]
) -> float:
    """One update; the share of symbols that were right ahead of it."""
    ids, labels, _ = drawn
    logits, wanted = model(ids, use_cache=False).logits[:, :-1], labels[:, 1:]
    counted = (wanted != _IGNORED) & (wanted != END)
    loss = torch.nn.functional.cross_entropy(logits[counted], wanted[counted])
    ends = wanted == END  # easy, so it must not drown the rest
    loss = loss + 0.1 * torch.nn.functional.cross_entropy(logits[ends], wanted[ends])
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    return float((logits[counted].argmax(-1) == wanted[counted]).float().mean())
