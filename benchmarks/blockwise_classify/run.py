"""Does a chain of blocks classify as well as one block's layers trained end to end?

MNIST-1D (4,000 signals to train, 2,400 held out), transformers of width 32 on 10 patches. Trained:
end to end with 6 and with 2 layers (a fixed row in the place of the noised one, cross-entropy), and
in 3 blocks of 2 layers with the rows of a frozen orthonormal table as targets: with the paper's
noise levels (0.002 to 80), and with levels at which the class is not free (0.3 to 10, log-mean 0.7,
deviation 1), 30 % of block 1's draws at the highest. Each makes 20 passes over the data, blocks 20
each. Held-out accuracy of block 1's first answer (mean of 8 draws), of one chain, and of the mean
over 8 chains. One learning rate, three seeds. Writes results/classify.json and results/classify.md.
"""

import argparse
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data import write_signals
from shoestring.models.dit import Block
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
from shoestring.training.blockwise.sampling import classify
from shoestring.training.blockwise.task import fresh, generator_of
from shoestring.training.config import OptimConfig
from shoestring.training.optimizer import clip_, gradient_norm, optimizer_factory, set_learning_rate
from shoestring.training.receipt import environment
from shoestring.training.schedule import learning_rate

RESULTS = Path(__file__).parent / "results"
PASSES, BATCH, TRAINED, SEEDS = 20, 100, 4000, 3
RATE = 3e-3
PAPER: dict[str, Any] = {}
INFORMATIVE = {"sigma_min": 0.3, "sigma_max": 10.0, "sigma_mean": 0.7, "sigma_std": 1.0,
               "top_share": 0.3}  # fmt: skip
# layers, blocks (0 = end to end), settings of the noise
ARMS: dict[str, tuple[int, int, dict[str, Any]]] = {
    "end to end, 6 layers": (6, 0, PAPER),
    "end to end, 2 layers": (2, 0, PAPER),
    "3 blocks, the paper's levels": (6, 3, PAPER),
    "3 blocks, informative levels": (6, 3, INFORMATIVE),
}


def config_of(arm: str, seed: int, steps: int, folder: Path) -> BlockwiseConfig:
    layers, blocks, noise = ARMS[arm]
    return BlockwiseConfig(
        run=BlockRunConfig(
            directory=tempfile.mkdtemp(dir=folder), seed=seed, steps=steps, device="cpu", threads=1
        ),
        model=DenoiserConfig(
            num_hidden_layers=layers, hidden_size=32, num_attention_heads=4, condition_size=32,
            patch_size=4,
        ),
        data=BlockDataConfig(
            source=str(folder / "signals.safetensors"), batch_size=BATCH, held_out=0.375
        ),
        blockwise=BlocksConfig(blocks=max(1, blocks), objective="labels", **noise),
        optim=OptimConfig(lr=RATE),
    )  # fmt: skip


def answered(net: nn.Module, images: Tensor, width: int) -> Tensor:
    """Logits of a network that is given no noise: a fixed row, a fixed level."""
    row = torch.ones(len(images), width)
    logits: Tensor = net(row, torch.zeros(len(images)), images)
    return logits


def end_to_end(config: BlockwiseConfig) -> float:
    """Held-out accuracy of a plain classifier, trained by the optimizer and schedule of a job."""
    task = Answers(config).to(torch.device("cpu"))
    assert isinstance(task, Answers)
    net: Block = fresh(task, 1, torch.device("cpu")).block(1)
    optimizer = optimizer_factory(config.optim, torch.device("cpu"))(list(net.parameters()))
    assert task.table is not None
    width, steps = task.table.shape[1], config.run.steps
    for step in range(1, steps + 1):
        rows = torch.randint(
            len(task.train), (BATCH,), generator=generator_of(config.run.seed, 1, step, 0)
        )
        images, labels = task.train.batch(rows)
        rate = learning_rate(config.schedule, step, peak=config.optim.lr, steps=steps)
        set_learning_rate(optimizer, rate)
        F.cross_entropy(answered(net, images, width), labels).backward()
        parameters = list(net.parameters())
        clip_(parameters, float(gradient_norm(parameters)), config.optim.grad_clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    images, labels = task.held_out.batch(torch.arange(len(task.held_out)))
    with torch.no_grad():
        return float((answered(net, images, width).argmax(1) == labels).double().mean())


def in_blocks(config: BlockwiseConfig) -> dict[str, Any]:
    train_every_block(config)
    merged = load_merged(merge([config.run.directory]))
    held_out = Answers(config).held_out
    images, labels = held_out.batch(torch.arange(len(held_out)))

    def right(**how: Any) -> float:
        return float((classify(merged, images, **how).argmax(1) == labels).double().mean())

    return {
        "first answer": right(steps=1, draws=8),
        "one chain": right(draws=1),
        "score": right(draws=8),
        "one chain of 20": right(draws=1, steps=20),
    }


def table_of(result: dict[str, Any]) -> str:
    names = ("first answer", "one chain", "score", "one chain of 20")
    lines = ["| trained | block 1's answer | one chain | mean of 8 chains | one of 20 steps |",
             "|---|---|---|---|---|"]  # fmt: skip
    for arm, rows in result["arms"].items():
        columns = ([row[name] for row in rows if name in row] for name in names)
        cells = [spread(values) if values else "" for values in columns]
        lines.append(f"| {' | '.join([arm, *cells])} |")
    config, hardware = result["config"], result["hardware"]
    lines += ["", f"{config['steps']:,} updates of {config['batch']}, learning rate "
              f"{config['lr']:g}; {config['seeds']} seeds, mean and deviation; "
              f"{hardware['device']}, {hardware['threads']} thread; torch "
              f"{result['versions']['torch']}."]  # fmt: skip
    return "\n".join(lines) + "\n"


def spread(values: list[float]) -> str:
    more = f" +- {statistics.stdev(values):.3f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.3f}{more}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--smoke", action="store_true", help="a few updates, nothing written")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    steps = 3 if arguments.smoke else PASSES * TRAINED // BATCH
    seeds = 1 if arguments.smoke else SEEDS
    result: dict[str, Any] = {
        "question": " ".join((__doc__ or "").split("\n\n")[0].split()),
        "config": {"steps": steps, "batch": BATCH, "seeds": seeds, "lr": RATE},
        **environment(torch.device("cpu")),
        "arms": {arm: [] for arm in ARMS},
    }
    with tempfile.TemporaryDirectory() as name:
        write_signals(Path(name) / "signals.safetensors")
        for arm in ARMS:
            for seed in range(seeds):
                config = config_of(arm, seed, steps, Path(name))
                row = in_blocks(config) if ARMS[arm][1] else {"score": end_to_end(config)}
                result["arms"][arm].append(row)
                print(arm, seed, json.dumps(row), flush=True)
    if arguments.smoke:
        print(table_of(result))
        return
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "classify.json").write_text(json.dumps(result, indent=1) + "\n")
    (RESULTS / "classify.md").write_text(table_of(result))


if __name__ == "__main__":
    main()
