"""What a model says through a cache, against what it says through the plain one.

English: a text is read, teacher-forced, in chunks; then come facts and a list of words, more text
than any window holds, and questions about the facts and the list, teacher-forced as well. A needle
is found when all its digits are the likeliest tokens; of the list, the share of likeliest tokens
counts.

Chains (`task`): the assignments are read in chunks, then the model answers by itself, greedily.
"""

import random
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import Cache

from .task import ASK, END, HOPS, texts

_PLACES = (
    "Tavira", "Jihlava", "Otaru", "Cusco", "Narvik", "Agadir", "Mackay", "Trujillo", "Bergen",
    "Matsue", "Puebla", "Kazan", "Dover", "Luxor", "Oviedo", "Tampa",
)  # fmt: skip
_COPIED = 40  # words of the list
_GIVEN = 4  # of them are in the question


@dataclass(frozen=True, slots=True)
class English:
    """ids: (1, t) of all that is read. length: tokens of the text proper, over which KL and
    perplexity are; questions: where they begin; needles: of each fact, places in ids of its
    answer's tokens; words: places of the list's tokens that are to be copied."""

    ids: Tensor
    length: int
    questions: int
    needles: tuple[tuple[int, ...], ...]
    words: tuple[int, ...]


def english(tokenizer: Any, text: Tensor, after: Tensor, vocabulary: str, seed: int) -> English:
    """text: (t,) ids of prose; after: (n,) ids, between facts and questions; vocabulary: prose
    that the list's words are drawn from."""
    draw = random.Random(seed)
    numbers = [str(draw.randrange(1000, 10000)) for _ in _PLACES]
    known = sorted({word for word in re.findall(r"[a-z]+", vocabulary) if 4 <= len(word) <= 8})
    words = draw.sample(known, _COPIED)
    facts = "".join(
        f"\nThe secret number of {place} is {number}."
        for place, number in zip(_PLACES, numbers, strict=True)
    )
    ids = [*text.tolist(), *_ids(tokenizer, facts + "\nThe words are: " + " ".join(words) + ".\n")]
    ids += after.tolist()
    questions, needles = len(ids), []
    order = draw.sample(range(len(_PLACES)), len(_PLACES))
    for index in order:
        ids += _ids(tokenizer, f"\nThe secret number of {_PLACES[index]} is")
        answer = _ids(tokenizer, f" {numbers[index]}")
        needles.append(tuple(range(len(ids), len(ids) + len(answer))))
        ids += answer + _ids(tokenizer, ".")
    ids += _ids(tokenizer, "\nThe words are: " + " ".join(words[:_GIVEN]))
    rest = _ids(tokenizer, " " + " ".join(words[_GIVEN:]))
    places = tuple(range(len(ids), len(ids) + len(rest)))
    return English(torch.tensor([ids + rest]), len(text), questions, tuple(needles), places)


def _ids(tokenizer: Any, text: str) -> list[int]:
    found: list[int] = tokenizer(text, add_special_tokens=False).input_ids
    return found


@dataclass(frozen=True, slots=True)
class Reading:
    """Log-probabilities (length, V) of the text, bytes a token when it ended, what was found."""

    said: Tensor
    bytes_per_token: float
    needles: float
    copied: float


@torch.no_grad()
def read(
    model: Any, given: English, cache: Cache, size: Callable[[Cache], float], chunk: int
) -> Reading:  # fmt: skip
    """size: bytes of a cache; chunk: tokens that come at a time."""
    said: list[Tensor] = []
    after: list[Tensor] = []
    held = 0.0
    for start, end in chunks(given.length, given.ids.shape[1], chunk):
        logits = model(given.ids[:, start:end], past_key_values=cache).logits[0]
        if start < given.length:
            said.append(logits.log_softmax(-1))
        if end == given.length:
            held = size(cache) / end
        after.append(logits.argmax(-1))
    likeliest = torch.cat(after)
    right = likeliest[:-1] == given.ids[0, 1:]  # of the token one place on

    def share(places: tuple[int, ...]) -> float:
        return float(right[torch.tensor(places) - 1].float().mean())

    found = [share(each) == 1.0 for each in given.needles]
    return Reading(torch.cat(said), held, sum(found) / len(found), share(given.words))


@torch.no_grad()
def said(model: Any, ids: Tensor, cache: Cache, chunk: int) -> Tensor:
    """ids (1, t), so many at a time -> log-probabilities (t, V) through the cache."""
    pieces = ids.split(chunk, dim=1)
    found = [model(piece, past_key_values=cache).logits[0].log_softmax(-1) for piece in pieces]
    return torch.cat(found)


def chunks(length: int, total: int, chunk: int) -> list[tuple[int, int]]:
    """Pieces of [0, total); one of them ends at `length`."""
    starts = [*range(0, length, chunk), *range(length, total, chunk)]
    return list(zip(starts, [*starts[1:], total], strict=True))


def compared(wanted: Tensor, found: Tensor, ids: Tensor) -> dict[str, float]:
    """(t, V) log-probabilities of the plain cache and of another, ids (1, >= t)."""
    kl = (wanted.exp() * (wanted - found)).sum(-1)
    picked = found[:-1].gather(-1, ids[0, 1 : len(found), None])
    return {
        "kl": float(kl.double().mean()),
        "perplexity": float((-picked.double().mean()).exp()),
        "top1": float((wanted.argmax(-1) == found.argmax(-1)).double().mean()),
    }


@dataclass(frozen=True, slots=True)
class Chains:
    """Texts of assignments (rows, t) and questions: hops, start (rows,), answers (rows, hops)."""

    ids: Tensor
    questions: tuple[tuple[int, Tensor, Tensor], ...]


def chains(rows: int, pairs: int, rounds: int, seed: int) -> Chains:
    """Texts that training has not seen. rounds: questions of each number of hops in a row."""
    generator = torch.Generator().manual_seed(seed)
    ids, _, context = texts(generator, rows, pairs, rounds * len(HOPS))
    questions, at = [], context
    for index in range(rounds * len(HOPS)):
        hops = HOPS[index % len(HOPS)]
        questions.append((hops, ids[:, at + 1], ids[:, at + 2 : at + 2 + hops]))
        at += hops + 3
    return Chains(ids[:, :context], tuple(questions))


@torch.no_grad()
def follow(
    model: Any, given: Chains, cache: Cache, size: Callable[[Cache], float], chunk: int
) -> dict[str, float]:
    """Share of questions whose last symbol is right, by hops ("hops_1", ...), and bytes a token
    of one row."""
    rows, length = given.ids.shape
    for start, end in chunks(length, length, chunk):
        model(given.ids[:, start:end], past_key_values=cache)
    held = size(cache) / rows / length
    right: dict[int, list[float]] = {hops: [] for hops in HOPS}
    for hops, start_at, answer in given.questions:
        asked = torch.stack([torch.full_like(start_at, ASK[hops]), start_at], 1)
        said = model(asked, past_key_values=cache).logits[:, -1].argmax(-1)
        for _ in range(hops - 1):
            said = model(said[:, None], past_key_values=cache).logits[:, -1].argmax(-1)
        right[hops].append(float((said == answer[:, -1]).float().mean()))
        end_of = torch.stack([said, torch.full_like(said, END)], 1)
        model(end_of, past_key_values=cache)
    shares = {f"hops_{hops}": sum(each) / len(each) for hops, each in right.items()}
    return {**shares, "bytes_per_token": held}
