"""`shoestring demo`: a deep language model trained on this Python's own source in a small budget.

Nothing is downloaded: the corpus is the standard library, split by file. The demo shows what the
usual schemes would have needed, trains inside the budget, and ends with the held-out score beside
byte n-grams and compressors on exactly the same files, whichever way that falls.
"""

import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from ..errors import ConfigError
from ..training.config import (
    DataConfig,
    EvaluateConfig,
    JobConfig,
    ModelConfig,
    OptimConfig,
    PlanConfig,
    RunConfig,
    ScheduleConfig,
)
from ..units import format_bytes, format_seconds
from .arguments import Common
from .progress import Watcher
from .subjects import plan_of_run
from .terminal import Terminal

_HELD_OUT = 0.005  # about 9 files, 150 kB: scored whole in seconds
_MIN_STEPS = 4
_LEAST_MINUTES = 1.0  # of training, however long the rest took
_AFTERWARDS_MINUTES = 0.75  # scoring twice, sampling, yardsticks


@dataclass(frozen=True, kw_only=True)
class Arguments(Common):
    """A deep language model trained on real text in a few hundred MiB, nothing downloaded."""

    budget: str = "256MiB"
    """Peak bytes of live tensors that training may use."""
    minutes: float = 4.0
    """Minutes for everything: reading, planning, training with what is left, scoring."""
    blocks: int = 32
    """Depth of the model."""
    width: int = 128
    """Width of the model; a head is 32 wide."""
    sequence_length: int = 256
    """Tokens a row."""
    batch_size: int = 16
    """Rows an update."""
    directory: str = "runs/demo"
    """Where the run is kept."""
    seed: int = 0
    """Seed of weights and data order."""

    def __post_init__(self) -> None:
        if not self.minutes > 0:
            raise ConfigError(f"--minutes {self.minutes} cannot be used", expected="more than 0")
        if self.width < 32 or self.width % 32:
            raise ConfigError(f"--width {self.width} cannot be used", expected="a multiple of 32")


class DemoWatcher(Watcher):
    """Shows the plan beside the usual schemes, in the shape of a picture."""

    def _stage(self, kind: str) -> None:
        if kind not in ("start", "data"):  # both were done before, and said
            super()._stage(kind)

    def show_plan(self, plan: Any) -> None:
        """The table of alternatives against the budget."""
        budget = plan.budget_bytes
        table = Table(title=f"one update of the same shape, budget {format_bytes(budget)}")
        for name in ("", "peak", "x budget", "an update", "fits"):
            table.add_column(name, justify="right" if name else "left", no_wrap=True)
        rows = list(plan.table())
        for row in rows:
            is_ours = row is rows[-1]
            table.add_row(
                "reversible, planned" if is_ours else row.name,
                format_bytes(row.peak_bytes),
                f"{row.peak_bytes / budget:.2f}",
                "-" if row.seconds is None else format_seconds(row.seconds),
                "yes" if row.peak_bytes <= budget else "no",
                style="bold green" if is_ours else None,
            )
        self.terminal.note(table, "(predicted, before anything was allocated)")


def run(arguments: Arguments, terminal: Terminal) -> int:
    """Trains, scores, and shows; exit code 0, or 130 when it was interrupted."""
    from ..training.loop import train

    started = time.monotonic()
    config = _prepared(arguments, terminal, started)
    with DemoWatcher(terminal, config.run) as watch:
        done = train(config, progress=watch)
    if done.receipt["status"] == "interrupted":
        terminal.emit({"event": "done", "receipt": done.receipt})
        terminal.say(watch.summary(done.receipt))
        return 130
    with terminal.progress.status("byte n-grams and compressors on the same held-out files"):
        marks = _yardsticks(config)
    terminal.say(*_scores(marks, done.receipt, config))
    if "sample" in watch.last:
        terminal.say(_sample(watch.last["sample"]))
    seconds = time.monotonic() - started
    terminal.say(watch.summary(done.receipt), *_closing(done.receipt, config, seconds))
    terminal.emit(
        {"event": "done", "directory": str(done.directory), "receipt": done.receipt,
         "bits_per_byte": marks, "seconds": seconds}
    )  # fmt: skip
    return 0


def _prepared(arguments: Arguments, terminal: Terminal, started: float) -> RunConfig:
    """The run's settings, once its data is encoded and its plan is made and written.

    Both come before the number of updates, because training gets the time they leave.
    """
    from ..training.distributed import world
    from ..training.prepare import prepare_data

    config = _config(arguments)
    terminal.note("reading the standard library, training a tokenizer, encoding ...")
    with world("auto") as alone:
        prepare_data(config, alone)
    terminal.note("planning: one block at a time is measured ...")
    plan = plan_of_run(config)
    file = Path(arguments.directory) / "plan.json"
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(plan.to_json() + "\n", encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"--directory {arguments.directory}: {error}") from None
    config = replace(config, plan=PlanConfig(file=str(file)))
    seconds = _seconds_of_an_update(config)
    spent = (time.monotonic() - started) / 60
    minutes = max(_LEAST_MINUTES, arguments.minutes - spent - _AFTERWARDS_MINUTES)
    steps = max(_MIN_STEPS, int(60 * minutes / seconds))
    return replace(config, run=replace(config.run, steps=steps, minutes=1.05 * minutes))


def _config(arguments: Arguments) -> RunConfig:
    return RunConfig(
        run=JobConfig(
            directory=arguments.directory, seed=arguments.seed, budget=arguments.budget,
            replace=True,
        ),
        model=ModelConfig(
            rule="feistel", hidden_size=arguments.width, num_hidden_layers=arguments.blocks,
            num_attention_heads=arguments.width // 32,
        ),
        data=DataConfig(
            sequence_length=arguments.sequence_length, batch_size=arguments.batch_size,
            held_out=_HELD_OUT,
        ),
        optim=OptimConfig(lr=3e-3),
        schedule=ScheduleConfig(kind="wsd", warmup_share=0.1, decay_share=0.4, final_share=0.05),
        # all of the held-out rows, so that every yardstick scores the same bytes
        evaluate=EvaluateConfig(batches=10_000, sample_tokens=80),
        # chunked_mlp has nothing to win at this width; leaving it out halves the planning
        plan=PlanConfig(never=("chunked_mlp",)),
    )  # fmt: skip


def _seconds_of_an_update(config: RunConfig) -> float:
    """The quickest of three updates of the same shape.

    The schedule needs to know how many there will be; the clock still ends the run when this was
    too hopeful.
    """
    import torch

    from ..models.gpt import GPT, GPTConfig

    shape: dict[str, Any] = config.model.gpt_fields()
    rows = config.data.batch_size, config.data.sequence_length
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = GPT(GPTConfig(vocab_size=config.data.vocabulary, rule=config.model.rule, **shape))
    model.to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    ids = torch.zeros(*rows, dtype=torch.long, device=device)
    seconds = []
    for _ in range(3):
        begun = time.perf_counter()
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if device == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - begun)
    return min(seconds)


def _yardsticks(config: RunConfig) -> dict[str, float]:
    """Bits a byte of n-grams fitted on the training files, and of compressors."""
    from ..data import measure, open_source

    train, held_out = open_source(config.data.source).split(config.data.held_out)
    return measure(train, held_out)


def _scores(marks: dict[str, float], receipt: dict[str, Any], config: RunConfig) -> list[Any]:
    """The table of bits a byte, and in words what it does and does not show."""
    quality = receipt["quality"]
    model, before = quality["after"]["bits_per_byte"], quality["before"]["bits_per_byte"]
    # a row of T tokens has T - 1 to predict
    seen = receipt["steps"] * config.data.batch_size * (config.data.sequence_length - 1)
    rows = {"this model": model, "this model before training": before, **_named(marks)}
    table = Table(title=f"{quality['after']['bytes']:,} bytes never trained on")
    table.add_column("")
    table.add_column("bits a byte", justify="right")
    for name, bits in sorted(rows.items(), key=lambda row: row[1]):
        table.add_row(name, f"{bits:.3f}", style="bold green" if bits == model else None)
    return [table, _reading(model, before, marks, seen)]


def _named(marks: dict[str, float]) -> dict[str, float]:
    grams = ("unigram", "bigram", "trigram")
    return {f"byte {name}" if name in grams else name: bits for name, bits in marks.items()}


def _reading(model: float, before: float, marks: dict[str, float], seen: int) -> str:
    beaten = [name for name, bits in _named(marks).items() if model < bits]
    ahead = [name for name, bits in _named(marks).items() if model >= bits]
    parts = [f"Better than {', '.join(beaten) or 'none of them'}"]
    parts.append(f"; not better than {', '.join(ahead)}." if ahead else ".")
    parts.append(
        f" Read it with care: the n-grams were fitted on every training file, the compressors saw"
        f" only the held-out bytes, and the tokenizer alone, with an untrained model, gives"
        f" {before:.2f}."
    )
    parts.append(f" The model saw {seen:,} tokens: minutes of training, not a finished model.")
    return "".join(parts)


def _sample(sample: dict[str, Any]) -> Panel:
    prompt = "\n".join(sample["prompt"].splitlines()[-12:])
    text = Text(prompt, style="dim") + Text(sample["text"], style="bold")
    return Panel(text, title="a held-out file (dim), continued by the model (bold)")


def _closing(receipt: dict[str, Any], config: RunConfig, seconds: float) -> list[str]:
    memory = receipt["memory"]
    kept = memory["measured_bytes"] <= memory["budget_bytes"]
    lines = [
        f"{'Within' if kept else 'OVER'} the budget of {format_bytes(memory['budget_bytes'])}. "
        f"The whole demo took {format_seconds(seconds)}.",
        f"Continue any text: shoestring generate {config.run.directory} --prompt 'def main('",
        f"Train it again:    shoestring train {config.run.directory}/config.toml",
    ]
    return lines
