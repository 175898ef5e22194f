"""Does a chain of blocks classify as well as one block's layers trained end to end?

MNIST-1D (4,000 signals to train, 2,400 held out), transformers of width 32 on 10 patches, 30 passes
over the data with a rate that climbs for 30 % of the updates and falls to 0. Trained end to end
with 6 and with 2 layers (a fixed row in the place of the noised one); greedily, 2 layers at a time
on the frozen rows of those before, each with a readout of its own and cross-entropy: the rival that
needs no noise; and in 3 blocks of 2 layers with the rows of a frozen orthonormal table as targets:

the paper's levels         0.002 to 80
informative levels         0.3 to 10, log-mean 0.7, deviation 1; 30 % of block 1's draws at 10
along the chain            and a third as many updates, half of each along the chain; for control
                           with no chain in them
quiet start                informative, z a tenth of what it else is in a block's first weights
sequential                 rows of the block before; 30 % of each block's draws at 10
useful edges               informative, at equal areas of what the input tells, from sigma* on
an encoder's rows          informative, of 2 layers trained first as a classifier, and frozen
each at the top            informative, half of each block's draws at 10

Held-out accuracy of block 1's first answer (mean of 8 draws), of one chain, of the mean over 8
chains, of one chain of 20 steps, and of the mean of all blocks' answers at the highest level, where
they were trained there. The peak of a job is the largest of its blocks', by the meter. One learning
rate, three seeds. Goes on where it was stopped. Writes results/classify.json and .md.
"""

import argparse
import json
import os
import re
import shutil
import statistics
import tempfile
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data import write_signals
from shoestring.checkpoint import write_text
from shoestring.meter import Meter
from shoestring.meter.outside import leave_out
from shoestring.models.dit import Answering, DiT
from shoestring.training.blockwise.answers import Answers
from shoestring.training.blockwise.config import (
    BlockDataConfig,
    BlockRunConfig,
    BlocksConfig,
    BlockwiseConfig,
    DenoiserConfig,
)
from shoestring.training.blockwise.every import train_every_block
from shoestring.training.blockwise.merging import load_merged, merge
from shoestring.training.blockwise.sampling import Read, classify
from shoestring.training.config import OptimConfig, ScheduleConfig
from shoestring.training.draws import generator_of
from shoestring.training.optimizer import clip_, gradient_norm, optimizer_factory, set_learning_rate
from shoestring.training.receipt import environment
from shoestring.training.schedule import learning_rate

RESULTS = Path(__file__).parent / "results"
PASSES, BATCH, TRAINED, SEEDS, BLOCKS = 30, 100, 4000, 3, 3
RATE = 3e-3
Settings = dict[str, Any]
INFORMATIVE: Settings = {
    "sigma_min": 0.3, "sigma_max": 10.0, "sigma_mean": 0.7, "sigma_std": 1.0, "top_share": 0.3,
}  # fmt: skip
SEQUENTIAL: Settings = {**INFORMATIVE, "sequential": True, "top_blocks": "all"}
EACH: Settings = {**INFORMATIVE, "top_share": 0.5, "top_blocks": "all"}
CHAIN: Settings = {"chain_steps": 1 / 3}  # a share of the updates
END, SHORT, GREEDY = "end to end, 6 layers", "end to end, 2 layers", "greedy, 2 layers at a time"
LONG = f"{SHORT}, four times as long"  # as 3 blocks with a third more updates each
CONTROL = "informative levels, as many more updates, no chain"
# after: the arm whose finished blocks are gone on with
ARMS: dict[str, Settings] = {
    END: {},
    SHORT: {},
    LONG: {},
    GREEDY: {"sequential": True},
    "the paper's levels": {},
    "informative levels": INFORMATIVE,
    "informative levels, along the chain": {**INFORMATIVE, **CHAIN, "after": "informative levels"},
    CONTROL: {**INFORMATIVE, **CHAIN, "after": "informative levels"},
    "quiet start": {**INFORMATIVE, "quiet_start": True},
    "quiet start, along the chain": {
        **INFORMATIVE, "quiet_start": True, **CHAIN, "after": "quiet start",
    },
    "sequential": SEQUENTIAL,
    "sequential, along the chain": {**SEQUENTIAL, **CHAIN},
    "useful edges": {**INFORMATIVE, "spacing": "useful"},
    "useful edges, along the chain": {
        **INFORMATIVE, "spacing": "useful", **CHAIN, "after": "useful edges",
    },
    "quiet start, useful edges": {**INFORMATIVE, "quiet_start": True, "spacing": "useful"},
    "quiet start, useful edges, along the chain": {
        **INFORMATIVE, "quiet_start": True, "spacing": "useful", **CHAIN,
        "after": "quiet start, useful edges",
    },
    "an encoder's rows": {**INFORMATIVE, "context": "encoder"},
    "an encoder's rows, along the chain": {
        **INFORMATIVE, "context": "encoder", **CHAIN, "after": "an encoder's rows",
    },
    "each at the top": EACH,
    "each at the top, along the chain": {**EACH, **CHAIN, "after": "each at the top"},
}  # fmt: skip
COLUMNS = {
    "first answer": "block 1's answer", "one chain": "one chain", "score": "mean of 8 chains",
    "one chain of 20": "one of 20 steps", "committee": "all blocks at the top",
}  # fmt: skip


def config_of(
    settings: Settings, layers: int, seed: int, steps: int, into: Path
) -> BlockwiseConfig:
    noise = {k: v for k, v in settings.items() if k != "after"}
    noise["chain_steps"] = round(steps * noise.get("chain_steps", 0))
    return BlockwiseConfig(
        run=BlockRunConfig(directory=str(into), seed=seed, steps=steps, device="cpu", threads=1),
        model=DenoiserConfig(
            num_hidden_layers=layers, hidden_size=32, num_attention_heads=4, condition_size=32,
            patch_size=4,
        ),
        data=BlockDataConfig(
            source=str(into.parent / "signals.safetensors"), batch_size=BATCH, held_out=0.375
        ),
        blockwise=BlocksConfig(**{"blocks": BLOCKS, "objective": "labels", **noise}),
        optim=OptimConfig(lr=RATE),
        schedule=ScheduleConfig(warmup_share=0.3, final_share=0.0),
    )  # fmt: skip


# ---- without noise -------------------------------------------------------------------------------


def given(count: int, width: int) -> tuple[Tensor, Tensor]:
    """What a network has that is given no noise: a fixed row, a fixed level."""
    return torch.ones(count, width), torch.zeros(count)


def trained(
    net: nn.Module, seen: Tensor, labels: Tensor, config: BlockwiseConfig, block: int, width: int
) -> int:
    """A plain classifier, by the optimizer and schedule of a job; returns the peak in bytes."""
    optimizer = optimizer_factory(config.optim, torch.device("cpu"))(list(net.parameters()))
    steps, peak = config.run.steps, 0

    def update(step: int) -> None:
        draws = generator_of(config.run.seed, block, step, 0)
        rows = torch.randint(len(seen), (BATCH,), generator=draws)
        rate = learning_rate(config.schedule, step, peak=config.optim.lr, steps=steps)
        set_learning_rate(optimizer, rate)
        F.cross_entropy(net(*given(BATCH, width), seen[rows]), labels[rows]).backward()
        parameters = list(net.parameters())
        clip_(parameters, float(gradient_norm(parameters)), config.optim.grad_clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    for step in range(1, steps + 1):
        if step == 2:
            with Meter(net, optimizer) as meter:
                update(step)
            peak = meter.peak_bytes
        else:
            update(step)
    return peak


def without_noise(config: BlockwiseConfig) -> dict[str, Any]:
    """Block after block, each on the rows of the one before; with one block that is end to end."""
    task = Answers(config)
    width = task.table.shape[1]
    sides = [part.batch(torch.arange(len(part))) for part in (task.train, task.held_out)]
    (seen, labels), (held_out, right) = sides
    assert labels is not None
    assert right is not None
    scores, peaks = [], []
    leave_out([seen])
    for block in range(1, config.blockwise.blocks + 1):
        net = DiT.make(
            task.shape, seed=config.run.seed, only=block, table=task.table
        ).block(block)  # fmt: skip
        assert isinstance(net, Answering)
        peaks.append(trained(net, seen, labels, config, block, width))
        with torch.no_grad():
            answered = net(*given(len(held_out), width), held_out)
            scores.append(float((answered.argmax(1) == right).double().mean()))
            seen, held_out = (net.rows(*given(len(x), width), x) for x in (seen, held_out))
            leave_out([seen])  # they could lie on disk, as those of a job do
    first = {"first answer": scores[0]} if len(scores) > 1 else {}
    return {"score": scores[-1], "scores": scores, "peak": max(peaks), **first}


# ---- in blocks -----------------------------------------------------------------------------------


def in_blocks(config: BlockwiseConfig) -> dict[str, Any]:
    ended = train_every_block(config)
    merged = load_merged(merge([config.run.directory]))
    held_out = Answers(config).held_out
    images, labels = held_out.batch(torch.arange(len(held_out)))

    def right(**how: Any) -> float:
        return float((classify(merged, images, **how).argmax(1) == labels).double().mean())

    found = {
        "first answer": right(steps=1, draws=8),
        "one chain": right(draws=1),
        "score": right(draws=8),
        "one chain of 20": right(draws=1, steps=20),
    }
    if config.blockwise.top_blocks == "all":
        assert labels is not None
        found["committee"] = committee(merged, images, labels)
    peaks = [each.receipt["peak"]["bytes"] for each in ended]
    held = [each.receipt["held_out"] for each in ended]
    edges = list(merged.partition.edges)
    return {**found, "peak": max(peaks), "peaks": peaks, "edges": edges, "held_out": held}


@torch.no_grad()
def committee(merged: Any, images: Tensor, labels: Tensor) -> float:
    """Accuracy of the mean of all blocks' answers to noise at the highest level, 4 draws each."""
    draws, read = torch.Generator().manual_seed(0), Read(merged, images)
    width = merged.model.table.shape[1]
    top = merged.partition.law.high
    level = torch.full((len(images),), top, dtype=torch.float64)
    total = torch.zeros(len(images), len(merged.model.table))
    for block in range(1, BLOCKS + 1):
        for _ in range(4):
            z = torch.randn(len(images), width, generator=draws) * (top**2 + 1 / width) ** 0.5
            net = merged.model.block(block)
            total += merged.objective.logits(net, z, level, read.by(block)).softmax(1)
    return float((total.argmax(1) == labels).double().mean())


def encoder_of(seed: int, steps: int, folder: Path) -> str:
    """2 layers trained as a plain classifier, merged."""
    settings = {**INFORMATIVE, "top_share": 1.0, "blocks": 1}
    config = config_of(settings, 2, seed, steps, folder / f"encoder-{seed}")
    train_every_block(config)
    merge([config.run.directory])
    return config.run.directory


def row_of(arm: str, seed: int, steps: int, folder: Path) -> dict[str, Any]:
    settings = dict(ARMS[arm])
    into = folder_of(arm, seed, folder)
    if arm in (END, SHORT, LONG):
        layers, times = 6 if arm == END else 2, 4 if arm == LONG else 1
        return without_noise(config_of({"blocks": 1}, layers, seed, times * steps, into))
    if arm == GREEDY:
        return without_noise(config_of(settings, 6, seed, steps, into))
    if "after" in settings:
        before = folder_of(settings["after"], seed, folder)
        # else its blocks are trained again, which gives the same
        if before.is_dir() and not into.is_dir():
            shutil.copytree(before, into)
    if "context" in settings:
        settings["context"] = encoder_of(seed, steps, folder)  # once a seed
    config = config_of(settings, 6, seed, steps, into)
    if arm != CONTROL:
        return in_blocks(config)
    with mock.patch.object(Answers, "chain_losses", Answers._losses):
        return in_blocks(config)


def folder_of(arm: str, seed: int, folder: Path) -> Path:
    return folder / f"{re.sub('[^a-z0-9]+', '-', arm)}-{seed}"


# ---- the table -----------------------------------------------------------------------------------


def table_of(result: dict[str, Any]) -> str:
    lines = [f"| trained | seeds | {' | '.join(COLUMNS.values())} | peak of a job, MiB |",
             "|---" * (len(COLUMNS) + 3) + "|"]  # fmt: skip
    for arm, rows in result["arms"].items():
        if not rows:
            continue
        columns = ([row[name] for row in rows.values() if name in row] for name in COLUMNS)
        cells = [spread(values) if values else "" for values in columns]
        peak = max(row["peak"] for row in rows.values()) / 2**20
        name = arm if arm in (END, SHORT, LONG, GREEDY) else f"3 blocks, {arm}"
        lines.append(f"| {' | '.join([name, str(len(rows)), *cells, f'{peak:.1f}'])} |")
    config, hardware = result["config"], result["hardware"]
    lines += ["", f"{config['steps']:,} updates of {config['batch']} (a third more along the "
              f"chain), learning rate {config['lr']:g}; mean and deviation over seeds; "
              f"{hardware['device']}, {hardware['threads']} thread; torch "
              f"{result['versions']['torch']}."]  # fmt: skip
    return "\n".join(lines) + "\n"


def spread(values: list[float]) -> str:
    more = f" +- {statistics.stdev(values):.3f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.3f}{more}"


def begun(steps: int, *, anew: bool) -> dict[str, Any]:
    """What was measured before, where it was with the same settings; else nothing."""
    result: dict[str, Any] = {
        "question": " ".join((__doc__ or "").split("\n\n")[0].split()),
        "config": {"steps": steps, "batch": BATCH, "lr": RATE},
        **environment(torch.device("cpu")),
        "arms": {arm: {} for arm in ARMS},
    }
    path = RESULTS / "classify.json"
    known = json.loads(path.read_text()) if path.is_file() and not anew else {}
    if known.get("config") == result["config"]:
        result["arms"].update({a: rows for a, rows in known["arms"].items() if a in ARMS})
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--smoke", action="store_true", help="a few updates, nothing written")
    parser.add_argument("--folder", help="where blocks are kept, to go on with; else nowhere")
    parser.add_argument(
        "--arm", choices=ARMS, action="append", help="this one, and others so named"
    )
    arguments = parser.parse_args()
    chosen: list[str] = arguments.arm or list(ARMS)
    smoke: bool = arguments.smoke
    given_folder: str | None = arguments.folder
    torch.set_num_threads(1)
    steps = 3 if smoke else PASSES * TRAINED // BATCH
    result = begun(steps, anew=smoke)
    seeds = range(1 if smoke else SEEDS)
    order = [(seed, arm) for seed in seeds for arm in ARMS if arm in chosen]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(given_folder or name).absolute()
        write_signals(folder / "signals.safetensors")
        os.environ["SHOESTRING_CACHE"] = str(folder / "cache")
        for seed, arm in order:
            rows = result["arms"][arm]
            if str(seed) in rows:
                continue
            rows[str(seed)] = row_of(arm, seed, steps, folder)
            brief = {k: v for k, v in rows[str(seed)].items() if isinstance(v, float)}
            print(arm, seed, json.dumps(brief), flush=True)
            if not smoke:
                RESULTS.mkdir(exist_ok=True)
                write_text(RESULTS / "classify.json", json.dumps(result, indent=1) + "\n")
                write_text(RESULTS / "classify.md", table_of(result))
    if smoke:
        print(table_of(result))


if __name__ == "__main__":
    main()
