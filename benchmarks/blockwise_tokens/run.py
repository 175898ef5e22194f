"""What is an autoregressive language model worth that is trained block by block, or as a recurrent
denoiser, against plain next-token training of the same and of a smaller network?

Bytes of the standard library. Networks of 6 layers are trained end to end on the next byte, in 3
blocks that denoise it (mixed: every second update is of the plain next-byte loss; pure: none), and,
as the control with the training memory of a block, with 2 layers end to end. Held out: bits a byte
of the plain predictions; cross-entropy at fixed noise levels with the bytes before, with those of
other texts, of z alone, and of a plain prediction that is shown z by Bayes' rule; how often the
likeliest byte is right, by the chain and directly; seconds and rows of layers to write a byte.

Recurrent depth: a network of 1 + 2 + 1 layers, the last three run again at every level, trained as
one denoiser; the same network with its core run 4 times and trained through all of them; and the
same layers run once. One learning rate for all, the best of three for the 6 layers end to end.
One thread. Each block makes as many updates as a network trained end to end.

Writes results/tokens.json after every arm, goes on from what it holds, and makes tables of it.
"""

import argparse
import json
import math
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from shoestring.models.causal import CausalBlock
from shoestring.objectives import token_denoising as ops
from shoestring.objectives.token_denoising import OWN_BITS, TokenDenoising
from shoestring.ops.preconditioning import euler_step
from shoestring.training.blockwise.config import (
    BlockDataConfig,
    BlockRunConfig,
    BlocksConfig,
    BlockwiseConfig,
    DenoiserConfig,
)
from shoestring.training.blockwise.decoding import Chain, next_token_bits, write_on, write_plainly
from shoestring.training.blockwise.job import train_block
from shoestring.training.blockwise.merging import Merged, load_merged, merge
from shoestring.training.blockwise.task import Denoiser
from shoestring.training.blockwise.tokens import Tokens, losses_of
from shoestring.training.config import OptimConfig
from shoestring.training.draws import generator_of
from shoestring.training.receipt import environment

RESULTS = Path(__file__).parent / "results"
WIDTH, HEADS, BATCH, LENGTH = 96, 4, 16, 64
STEPS, SEEDS = 500, 2
RATES = (1e-3, 2e-3, 4e-3)
SIGMAS = (80.0, 10.0, 2.0, 0.7, 0.4, 0.2, 0.1)
ITERATIONS = (1, 2, 4, 8, 16)
UNROLLED = 4
WHOLE = "end to end, 6 layers"
# layers, blocks, prelude, coda, every how many updates a plain one, share at the top, iterations
ARMS: dict[str, tuple[int, int, int, int, int, float, int]] = {
    WHOLE: (6, 1, 0, 0, 1, 0.0, 0),
    "end to end, 2 layers": (2, 1, 0, 0, 1, 0.0, 0),
    "3 blocks, mixed": (6, 3, 0, 0, 2, 0.3, 0),
    "3 blocks, pure": (6, 3, 0, 0, 0, 0.3, 0),
    "1 + 2 + 1 layers, as one denoiser, pure": (4, 1, 1, 1, 0, 0.3, 0),
    "1 + 2 + 1 layers, as one denoiser, mixed": (4, 1, 1, 1, 2, 0.3, 0),
    f"1 + 2 + 1 layers, core {UNROLLED} times, end to end": (4, 1, 1, 1, 1, 0.0, UNROLLED),
    "1 + 2 + 1 layers, once, end to end": (4, 1, 1, 1, 1, 0.0, 0),
    "3 blocks, mixed, none at the top": (6, 3, 0, 0, 2, 0.0, 0),
    "3 blocks, pure, noised rows alone": (6, 3, 0, 0, 0, 0.3, 0),
}
FIRST_ONLY = ("3 blocks, mixed, none at the top", "3 blocks, pure, noised rows alone")
"""Arms of which block 1 alone is trained: what they change is how a byte begins."""
LN2 = math.log(2)


class Unrolled(Tokens):
    """The same network trained through all its iterations, on the plain next-byte loss."""

    def step_loss(self, net: Denoiser, block: int, step: int, part: int) -> Tensor:
        assert isinstance(net, CausalBlock)
        tokens = self.batch(generator_of(self.config.run.seed, block, step, part))
        hidden = net.unrolled(tokens, self.table, UNROLLED)
        return ops.nats(hidden, tokens, self.table).mean()


def config_of(arm: str, seed: int, steps: int, rate: float) -> BlockwiseConfig:
    layers, blocks, prelude, coda, mixed, top, _ = ARMS[arm]
    return BlockwiseConfig(
        run=BlockRunConfig(
            directory=tempfile.mkdtemp(), seed=seed, steps=steps, device="cpu", threads=1
        ),
        model=DenoiserConfig(
            num_hidden_layers=layers, hidden_size=WIDTH, num_attention_heads=HEADS,
            condition_size=64, prelude_layers=prelude, coda_layers=coda,
        ),
        data=BlockDataConfig(source="stdlib", sequence_length=LENGTH, batch_size=BATCH),
        blockwise=BlocksConfig(
            blocks=blocks, objective="tokens", mixed_every=mixed, top_share=top,
            beside="alone" not in arm,
        ),
        optim=OptimConfig(lr=rate),
    )  # fmt: skip


def trained(arm: str, config: BlockwiseConfig) -> tuple[Merged | None, Tokens, dict[str, Any]]:
    """(The model, or None where not all of it was trained, its task, facts.)"""
    task = (Unrolled if ARMS[arm][-1] else Tokens)(config)
    blocks = range(1, 2 if arm in FIRST_ONLY else config.blockwise.blocks + 1)
    receipts = [train_block(config, block, task=task).receipt for block in blocks]
    facts = {
        "parameters_of_a_job": receipts[0]["parameters"],
        "block 1": receipts[0]["held_out"],
    }
    if arm in FIRST_ONLY:
        return None, task, facts
    return load_merged(merge([config.run.directory])), task, facts


def texts_of(task: Tokens, count: int) -> Tensor:
    rows = task.held_out.rows(LENGTH)
    return task.held_out.batch(rows[torch.linspace(0, len(rows) - 1, count).long()], LENGTH)


def mean_over(texts: Tensor, of: Callable[[Tensor, int], dict[str, Tensor]]) -> dict[str, float]:
    """Means over all tokens of what a function gives of 32 texts."""
    sums: dict[str, float] = {}
    for number, part in enumerate(texts.split(32)):
        for name, value in of(part, number).items():
            sums[name] = sums.get(name, 0.0) + float(value.double().sum())
    return {name: total / texts.numel() for name, total in sums.items()}


@torch.no_grad()
def numbers(merged: Merged, arm: str, texts: Tensor, few: Tensor) -> dict[str, Any]:
    """Held-out numbers of a model, in bits a byte and shares."""
    plain, iterations = ARMS[arm][4], ARMS[arm][-1]
    net, table = merged.model.block(1), merged.model.table
    assert isinstance(net, CausalBlock)
    assert table is not None
    found: dict[str, Any] = {}
    if iterations:
        found["by iterations"] = {
            k: foreseen(partial(net.unrolled, table_VW=table, iterations=k), texts, table)
            for k in ITERATIONS
        }
        return found
    if plain:
        found["next byte"] = foreseen(lambda t: net.next_tokens(t, table), texts, table)
        blocks = range(1, merged.partition.blocks + 1)
        found["next byte by block"] = [next_token_bits(merged, texts, [b]) for b in blocks]
        found["next byte, mean of blocks"] = next_token_bits(merged, texts, list(blocks))
    found["at sigma"] = {f"{sigma:g}": at_sigma(merged, arm, texts, sigma) for sigma in SIGMAS}
    if plain != 1:
        steps = ITERATIONS if merged.partition.blocks == 1 else (1, 4, 16)
        found["chain"] = {k: chained(merged, few, k, 1 if k > 4 else 8) for k in steps}
    return found


def foreseen(of: Callable[[Tensor], Tensor], texts: Tensor, table: Tensor) -> dict[str, float]:
    """Bits a byte of plain predictions, how often the likeliest is right, and a drawn one."""

    def one(tokens: Tensor, number: int) -> dict[str, Tensor]:
        hidden = of(tokens)
        right = (hidden @ table.T).argmax(dim=2) == tokens
        nats = ops.nats(hidden, tokens, table)
        return {"bits": nats / LN2, "right": right, "drawn right": (-nats).exp()}

    return mean_over(texts, one)


def at_sigma(merged: Merged, arm: str, texts: Tensor, sigma: float) -> dict[str, float]:
    """Bits a byte at a level: of its owner, with others' contexts, of z alone; and of block 1's
    plain predictions, if it has any, shown z by Bayes' rule."""
    plain, table = ARMS[arm][4], merged.model.table
    assert table is not None
    assert isinstance(merged.objective, TokenDenoising)
    owner = int(merged.partition.route(torch.tensor(sigma, dtype=torch.float64)))
    net, first = merged.model.block(owner), merged.model.block(1)
    assert isinstance(net, CausalBlock)
    assert isinstance(first, CausalBlock)
    objective = merged.objective

    def one(tokens: Tensor, number: int) -> dict[str, Tensor]:
        level = torch.full((len(tokens),), sigma, dtype=torch.float64)
        noise = torch.randn(*tokens.shape, table.shape[1], generator=generator_of(7, number))
        draw, values = ops.Draw(level, noise), {}
        if plain != 1:
            values = losses_of(objective, net, tokens, draw, table)
        z = objective.noised(tokens, draw, table)
        if plain:
            logits = first.next_tokens(tokens, table) @ table.T
            logs = ops.posterior_ref(logits, z, level, table)
            values["plain, shown z"] = -logs.gather(2, tokens[..., None])
        return {name: value / LN2 for name, value in values.items()}

    return mean_over(texts, one)


def chained(merged: Merged, texts: Tensor, steps: int, draws: int) -> dict[str, float]:
    """How often the chain's byte is the text's, after the true bytes before it: of one chain, and
    of the mean of several; all bytes of a text at once, by the rows of training."""
    chain = Chain.of(merged, steps=steps)
    table, width = chain.table, chain.table.shape[1]

    def one(tokens: Tensor, number: int) -> dict[str, Tensor]:
        total, single = torch.zeros(*tokens.shape, len(table)), None
        for turn in range(draws):
            noise = torch.randn(*tokens.shape, width, generator=generator_of(8, number, turn))
            z = noise * (chain.levels[0] ** 2 + 1 / width) ** 0.5
            for place, (level, owner) in enumerate(zip(chain.levels, chain.owners, strict=True)):
                levels = torch.full((len(tokens),), level, dtype=torch.float64)
                fed, at = ops.scaled(z, levels)
                logits = chain.nets[owner](tokens, fed, at, table) @ table.T
                if place < len(chain.levels) - 1:
                    following = torch.full_like(levels, chain.levels[place + 1])
                    z = euler_step(z, ops.denoised(logits, table), levels, following)
            total += logits.softmax(dim=2)
            single = logits.argmax(dim=2) == tokens if single is None else single
        assert single is not None
        found = {"one": single}
        return {**found, "mean": total.argmax(dim=2) == tokens} if draws > 1 else found

    return mean_over(texts, one)


def written(merged: Merged, arm: str, *, count: int, smoke: bool) -> dict[str, Any]:
    """Seconds to write a byte, for each of `count` texts at once, rows of layers, and texts."""
    layers, blocks = ARMS[arm][:2]
    prompts = torch.tensor(list(b"import ")).expand(count, -1)
    length = 8 if smoke else LENGTH - prompts.shape[1]
    on = partial(write_on, merged, prompts, length)
    plain = partial(write_plainly, merged, prompts, length)
    ways: dict[str, tuple[Callable[[], Tensor], float]] = {}
    if ARMS[arm][4] != 1:
        calls = blocks + 1
        rows = layers + calls * (layers - ARMS[arm][2]) / blocks
        ways["chain"] = (on, rows)
        ways["chain, likeliest first"] = (partial(on, temperature=0.0), rows)
    if ARMS[arm][4]:
        ways["plain"] = (plain, layers / blocks)
        ways["plain, likeliest"] = (partial(plain, temperature=0.0), layers / blocks)
    found: dict[str, Any] = {}
    for name, (way, rows) in ways.items():
        started = time.process_time()
        tokens = way()
        seconds = (time.process_time() - started) / length
        found[name] = {
            "seconds_a_byte": seconds, "layer_rows_a_byte": rows,
            "texts": [bytes(row).decode("utf-8", errors="replace") for row in tokens[:2].tolist()],
        }  # fmt: skip
    return found


def rates(steps: int, texts: int) -> dict[str, float]:
    """Held-out bits of the 6 layers end to end, by learning rate, after short runs."""
    found = {}
    for rate in RATES:
        config = config_of(WHOLE, 100, steps, rate)
        merged, task, _ = trained(WHOLE, config)
        assert merged is not None
        found[f"{rate:g}"] = next_token_bits(merged, texts_of(task, texts))
        print("rate", rate, found[f"{rate:g}"], flush=True)
    return found


def measure(
    *, steps: int, seeds: int, smoke: bool, path: Path | None, arms: list[str]
) -> dict[str, Any]:
    texts, few = (16, 8) if smoke else (256, 64)
    if path is not None and path.is_file():
        result = json.loads(path.read_text())
    else:
        tried = rates(max(1, steps // 4), texts)
        result = {
            "question": " ".join((__doc__ or "").split("\n\n")[0].split()),
            "config": {"width": WIDTH, "heads": HEADS, "batch": BATCH, "bytes": LENGTH,
                       "steps": steps, "seeds": seeds, "held_out_texts": texts,
                       "lr": float(min(tried, key=lambda each: tried[each]))},
            **environment(torch.device("cpu")),
            "rates": tried,
            "arms": {},
        }  # fmt: skip
    for arm in arms:
        rows = result["arms"].setdefault(arm, [])
        for seed in range(seeds):
            if any(row["seed"] == seed for row in rows):
                continue
            config = config_of(arm, seed, steps, result["config"]["lr"])
            merged, task, facts = trained(arm, config)
            held_out = texts_of(task, texts)
            row = {"seed": seed, **facts}
            if merged is not None:
                row |= numbers(merged, arm, held_out, held_out[:few])
            if merged is not None and not ARMS[arm][-1]:
                row["written"] = written(merged, arm, count=16, smoke=smoke)
            rows.append(json.loads(json.dumps(row)))
            print(arm, json.dumps(row), flush=True)
            if path is not None:
                write(path, result)
    return dict(result)


def write(path: Path, result: dict[str, Any]) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")
    for name, text in tables(result).items():
        (path.parent / f"{name}.md").write_text(text)


def spread(rows: list[dict[str, Any]], *keys: str, digits: int = 3) -> str:
    """Mean, and the deviation over seeds, of what lies below these keys; empty where nothing."""
    values = []
    for row in rows:
        found: Any = row
        for key in keys:
            found = found.get(key) if isinstance(found, dict) else None
        if found is None:
            return ""
        values.append(float(found))
    more = f" +- {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{more}"


def lines_of(heads: list[str], rows: list[list[str]]) -> list[str]:
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    return lines + ["| " + " | ".join(row) + " |" for row in rows]


def tables(result: dict[str, Any]) -> dict[str, str]:
    arms = {name: result["arms"][name] for name in ARMS if result["arms"].get(name)}
    config, hardware = result["config"], result["hardware"]
    tried = ", ".join(f"{rate}: {bits:.3f}" for rate, bits in result["rates"].items())
    end = (
        f"Width {config['width']}, batches of {config['batch']} texts of {config['bytes']} bytes, "
        f"{config['steps']} updates of a block; mean and deviation over seeds; "
        f"learning rate {config['lr']:g} (end to end, a quarter of the steps: {tried}). "
        f"{hardware['device']}, {hardware['threads']} thread; torch {result['versions']['torch']}."
    )
    made = {
        "bits": lines_of(*bits_rows(arms)), "levels": lines_of(*level_rows(arms)),
        "first": lines_of(*first_rows(arms)), "writing": lines_of(*writing_rows(arms)),
        "recurrent": lines_of(*recurrent_rows(arms)),
    }  # fmt: skip
    return {name: "\n".join([*lines, "", end]) + "\n" for name, lines in made.items()}


def bits_rows(arms: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    heads = ["trained", "seeds", "parameters in training", "bits a byte, plain, block 1",
             "mean of blocks", "noised row at the top", "right: likeliest, plain", "drawn, plain",
             "one noised row at the top", "one chain of 4 calls", "of 16",
             "mean of 8 of 4"]  # fmt: skip
    rows = []
    for name, found in arms.items():
        if ARMS[name][2] or name in FIRST_ONLY:
            continue
        blocks = ARMS[name][1]
        rows.append([
            name, str(len(found)), f"{found[0]['parameters_of_a_job']:,}",
            spread(found, "next byte", "bits"),
            spread(found, "next byte, mean of blocks") if blocks > 1 else "",
            spread(found, "at sigma", "80", "loss"), spread(found, "next byte", "right"),
            spread(found, "next byte", "drawn right"), spread(found, "chain", "1", "one"),
            spread(found, "chain", "4", "one"), spread(found, "chain", "16", "one"),
            spread(found, "chain", "4", "mean"),
        ])  # fmt: skip
    return heads, rows


def level_rows(arms: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    heads = ["bits a byte at sigma", *(f"{sigma:g}" for sigma in SIGMAS)]
    names = {"loss": "", "loss with other texts before": ", other texts before",
             "plain, shown z": ", plain, shown z"}  # fmt: skip
    rows = []
    for arm, found in arms.items():
        if ARMS[arm][2] or arm in FIRST_ONLY:
            continue
        for key, words in names.items():
            cells = [spread(found, "at sigma", f"{s:g}", key, digits=2) for s in SIGMAS]
            if any(cells):
                rows.append([arm + words, *cells])
    known = arms.get("3 blocks, mixed")
    if known:
        key = "loss of z alone"
        cells = [spread(known, "at sigma", f"{s:g}", key, digits=2) for s in SIGMAS]
        rows.append(["z alone", *cells])
    return heads, rows


def first_rows(arms: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Of block 1, by its receipt."""
    names = {"loss": "nats a byte over its levels", "loss with other texts before": "other texts "
             "before", "loss at the top": "at the top", OWN_BITS: "bits a byte, plain"}  # fmt: skip
    rows = [
        [arm, str(len(found)), *(spread(found, "block 1", key) for key in names)]
        for arm, found in arms.items()
        if ARMS[arm][1] > 1 and "block 1" in found[0]
    ]
    return ["block 1 of", "seeds", *names.values()], rows


def writing_rows(arms: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    rows = []
    for arm, found in arms.items():
        if "written" not in found[0] or ARMS[arm][2]:
            continue
        for way, one in found[0]["written"].items():
            if "likeliest" not in way:
                seconds = spread(found, "written", way, "seconds_a_byte", digits=4)
                rows.append([arm, way, f"{one['layer_rows_a_byte']:g}", seconds])
    return ["trained", "written by", "rows of layers a byte", "seconds a byte, 16 texts"], rows


def recurrent_rows(arms: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    heads = ["trained", "seeds", "what", *(f"K = {k}" for k in ITERATIONS)]
    rows = []
    for arm, found in arms.items():
        if not ARMS[arm][2]:
            continue
        first = [arm, str(len(found))]
        if ARMS[arm][-1]:
            for key, words in (("bits", "bits a byte"), ("right", "right")):
                cells = [spread(found, "by iterations", f"{k}", key) for k in ITERATIONS]
                rows.append([*first, words, *cells])
            continue
        for key, words in (("one", "right, one chain"), ("mean", "right, mean of 8")):
            cells = [spread(found, "chain", f"{k}", key) for k in ITERATIONS]
            if any(cells):
                rows.append([*first, words, *cells])
        if found[0].get("next byte"):
            for key, words in (("bits", "bits a byte, plain"), ("right", "right, plain")):
                rows.append([*first, words, spread(found, "next byte", key), "", "", "", ""])
        top = spread(found, "at sigma", "80", "loss")
        if top:
            rows.append([*first, "bits a byte, noised row at the top", top, "", "", "", ""])
    return heads, rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--smoke", action="store_true", help="a few updates, nothing written")
    parser.add_argument("--tables", action="store_true", help="the tables of what is stored, anew")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--seeds", type=int, default=SEEDS)
    parser.add_argument("--arm", choices=ARMS, action="append", help="these arms only")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    path = RESULTS / "tokens.json"
    if arguments.tables:
        write(path, json.loads(path.read_text()))
    elif arguments.smoke:
        result = measure(steps=2, seeds=1, smoke=True, path=None, arms=list(ARMS))
        print("\n".join(tables(result).values()))
    else:
        wanted = arguments.arm or list(ARMS)
        measure(steps=arguments.steps, seeds=arguments.seeds, smoke=False, path=path, arms=wanted)


if __name__ == "__main__":
    main()
