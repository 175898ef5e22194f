"""What is the longest context that one fixed network trains on in 1 GiB?

A 24-block GPT (width 256, vocabulary 8,192, float32, fused AdamW, one sequence) under exact
methods. The length is found by prediction on a fake twin, then really run: one optimizer step at
that length after the optimizer's states exist. Where that takes longer than --limit seconds, a
shorter length is run instead and held against its own prediction. Seconds a step are processor
time of one thread, medians of interleaved rounds at one common length. Writes
results/context.json and results/table.md.
"""

import argparse
import contextlib
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from shoestring.allocator import SETTINGS
from shoestring.meter import Meter
from shoestring.methods import apply_spans, method
from shoestring.models.gpt import GPT, GPTConfig
from shoestring.planner import simulate
from shoestring.stack import Span, Stack

RESULTS = Path(__file__).parent / "results"
SEED = 0


@dataclass(frozen=True)
class Question:
    """One network and one budget."""

    blocks: int = 24
    width: int = 256
    heads: int = 4
    vocabulary: int = 8192
    budget_bytes: int = 1 << 30
    grain: int = 64
    common_length: int = 512
    limit_length: int = 1 << 18

    def network(self, rule: str) -> nn.Module:
        torch.manual_seed(SEED)
        return GPT(
            GPTConfig(
                vocab_size=self.vocabulary,
                hidden_size=self.width,
                num_hidden_layers=self.blocks,
                num_attention_heads=self.heads,
                max_position_embeddings=self.limit_length,
                rule=rule,
            )
        ).train()


FULL = Question()
SMALL = Question(blocks=2, width=64, vocabulary=512, budget_bytes=6 << 20, grain=128,
                 common_length=128, limit_length=1 << 13)  # fmt: skip


@dataclass(frozen=True)
class Scheme:
    """One way to train it: how the span is run, and what is cut into chunks."""

    span: str
    nested: bool = False
    chunked_loss: bool = False
    chunked_mlp: bool = False

    @property
    def rule(self) -> str:
        """Rebuilding from streams needs a network that has them; its blocks are the same."""
        return "feistel" if method(self.span).promises.rebuilds == "streams" else "residual"

    def apply(self, model: nn.Module) -> None:
        if self.chunked_mlp:
            way = method("chunked_mlp")
            way.apply(model, way.configure({"slices": 16}))
        if self.chunked_loss:
            way = method("chunked_loss")
            way.apply(model, way.configure({}))
        stack = Stack.of(model)
        every = round(len(stack) ** 0.5)
        held = {"hold": tuple(range(0, len(stack), every))} if self.nested else {}
        apply_spans(stack, [Span(0, len(stack), self.span, held)])


SCHEMES = {
    "keep everything": Scheme("keep"),
    "checkpoint per block": Scheme("recompute"),
    "nested checkpoint": Scheme("recompute", nested=True),
    "reversible": Scheme("reversible"),
    "checkpoint + chunked loss": Scheme("recompute", chunked_loss=True),
    "checkpoint + chunked MLP + chunked loss": Scheme(
        "recompute", chunked_loss=True, chunked_mlp=True
    ),
    "nested checkpoint + chunked MLP + chunked loss": Scheme(
        "recompute", nested=True, chunked_loss=True, chunked_mlp=True
    ),
    "reversible + chunked loss": Scheme("reversible", chunked_loss=True),
    "reversible + chunked MLP + chunked loss": Scheme(
        "reversible", chunked_loss=True, chunked_mlp=True
    ),
}


def batch(length: int, vocabulary: int) -> dict[str, Tensor]:
    ids = torch.randint(0, vocabulary, (1, length), generator=torch.Generator().manual_seed(SEED))
    return {"input_ids": ids, "labels": ids.clone()}


def adamw(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=1e-4, fused=True)


# ---- predicting ----------------------------------------------------------------------------


def adamw_with_states(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    """As after a first step, so that one simulated step shows the peak of all others."""
    optimizer = adamw(parameters)
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return optimizer


def predicted_bytes(question: Question, scheme: Scheme, length: int) -> int:
    return simulate(
        question.network(scheme.rule),
        batch(length, question.vocabulary),
        apply=scheme.apply,
        optimizer=adamw_with_states,
        steps=1,
    ).peak_bytes


def longest(question: Question, scheme: Scheme) -> tuple[int, int]:
    """(length, predicted bytes): a multiple of `grain` that fits, where a length 1 % greater (or
    one grain) does not. (0, bytes) when not even one grain fits.

    The peak is nearly straight in the length, so the next guess is drawn from the slope between
    the two lengths looked at last.
    """
    grain, budget = question.grain, question.budget_bytes

    def peak(length: int) -> int:
        found = predicted_bytes(question, scheme, length)
        print(f"  {length} tokens: {found / 1e6:.1f} MB", file=sys.stderr)
        return found

    low, low_bytes = grain, peak(grain)
    if low_bytes > budget:
        return 0, low_bytes
    high = question.limit_length
    before, before_bytes = low, low_bytes
    guess = question.limit_length // 32
    while True:
        guess_bytes = peak(guess)
        slope = (guess_bytes - before_bytes) / (guess - before)
        before, before_bytes = guess, guess_bytes
        if guess_bytes <= budget:
            low, low_bytes = guess, guess_bytes
        else:
            high = guess
        close = max(grain, low // 100 // grain * grain)
        if high - low <= close:
            return low, low_bytes
        reach = int((budget - low_bytes) / slope) if slope > 0 else high - low
        # Not beyond what is known to be too long; and at least far enough to end the search.
        guess = min(low + max(reach // grain * grain, close), high - grain)


# ---- measuring -----------------------------------------------------------------------------


def one_step(model: nn.Module, optimizer: torch.optim.Optimizer, data: Mapping[str, Any]) -> None:
    model(**data).loss.backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def measure(question: Question, scheme: Scheme, length: int) -> dict[str, Any]:
    """One real step at `length`, the optimizer's states made before by a short one."""
    model = question.network(scheme.rule)
    scheme.apply(model)
    optimizer = adamw(list(model.parameters()))
    one_step(model, optimizer, batch(32, question.vocabulary))
    data = batch(length, question.vocabulary)
    started = time.process_time()
    with Meter(model, optimizer) as meter:
        meter.tracker.assign("other", data.values())
        one_step(model, optimizer, data)
    return {
        "length": length,
        "measured_bytes": meter.peak_bytes,
        "by_category": meter.by_category,
        "instant": meter.instant,
        "rss_peak_bytes": meter.rss_peak_bytes,
        "seconds": round(time.process_time() - started, 2),
    }


def measured(arguments: argparse.Namespace, name: str, length: int) -> dict[str, Any] | None:
    """`measure` in a process of its own, so that one scheme's memory is not another's; None
    when it did not end within the limit."""
    command = [sys.executable, __file__, "--measure", name, str(length)]
    command += ["--smoke"] if arguments.smoke else []
    try:
        run = subprocess.run(
            command, capture_output=True, text=True, timeout=arguments.limit, check=True
        )
    except subprocess.TimeoutExpired:
        return None
    found: dict[str, Any] = json.loads(run.stdout.splitlines()[-1])
    return found


def verify(
    arguments: argparse.Namespace, question: Question, name: str, row: Mapping[str, Any]
) -> dict[str, Any] | None:
    """What was measured at the length found, or at the longest of its halves that is quick
    enough, beside what is predicted there."""
    length = row["longest"]
    while length >= question.grain:
        # Steps take at least time in proportion to the length.
        least = row["seconds_common"] * length / question.common_length
        found = measured(arguments, name, length) if least < arguments.limit else None
        if found is not None:
            promised = predicted_bytes(question, SCHEMES[name], length)
            error = 100 * (promised - found["measured_bytes"]) / found["measured_bytes"]
            return {**found, "predicted_bytes": promised, "error_percent": round(error, 4)}
        print(f"  {length} tokens take longer than {arguments.limit} s", file=sys.stderr)
        length = length // 2 // question.grain * question.grain
    return None


def seconds_at(question: Question, names: list[str], rounds: int) -> dict[str, float]:
    """Median processor seconds of a step at the common length, the schemes taking turns."""
    data = batch(question.common_length, question.vocabulary)
    made = {}
    for name in names:
        model = question.network(SCHEMES[name].rule)
        SCHEMES[name].apply(model)
        made[name] = (model, adamw(list(model.parameters())))
        one_step(*made[name], data)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(rounds):
        for name in names:
            started = time.process_time()
            one_step(*made[name], data)
            seconds[name].append(time.process_time() - started)
    return {name: round(statistics.median(s), 3) for name, s in seconds.items()}


# ---- writing -------------------------------------------------------------------------------


def circumstances(question: Question) -> dict[str, Any]:
    cpu = platform.processor() or platform.machine()
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    return {
        "question": (__doc__ or "").splitlines()[0],
        "config": asdict(question),
        "seed": SEED,
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "hardware": {
            "cpu": cpu,
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "allocator": {name: os.environ.get(name) for name in SETTINGS},
            "load_average_at_end": os.getloadavg() if hasattr(os, "getloadavg") else None,
        },
    }


def table(answer: Mapping[str, Any]) -> str:
    question, rows = answer["config"], answer["numbers"]
    common = question["common_length"]
    lines = [
        f"| exact method | longest context | peak run, MB (at tokens) | predicted "
        f"| s a step at {common:,}, one thread |",
        "|---|---|---|---|---|",
    ]
    for name, row in rows.items():
        run = row["run"]
        shown = (
            f"{run['measured_bytes'] / 1e6:.1f} ({run['length']:,}) | {run['error_percent']:+.2f} %"
            if run
            else "not run | -"
        )
        lines.append(f"| {name} | {row['longest']:,} | {shown} | {row['seconds_common']:.2f} |")
    return "\n".join(lines) + "\n\n" + sentence(rows) + "\n"


def sentence(rows: Mapping[str, Any]) -> str:
    """Who wins, and where checkpointing does; from the numbers, whichever way they fall."""
    best = max(rows, key=lambda n: rows[n]["longest"])
    parts = [f"Longest: {best}, {rows[best]['longest']:,} tokens."]
    reversal = [n for n in rows if SCHEMES[n].span == "reversible"]
    others = [n for n in rows if SCHEMES[n].span == "recompute"]
    for ours in reversal:
        alike = [n for n in others if _additions(n) == _additions(ours)]
        longest = max(alike, key=lambda n: rows[n]["longest"])
        factor = rows[ours]["longest"] / rows[longest]["longest"]
        parts.append(f"{ours} reaches {factor:.2f} x the length of {longest}.")
        same = next(n for n in alike if not SCHEMES[n].nested)
        seconds = rows[same]["seconds_common"] / rows[ours]["seconds_common"]
        parts.append(f"{same} takes {seconds:.2f} x its time.")
    wins = [
        f"{theirs} than {ours}"
        for ours in reversal
        for theirs in others
        if rows[theirs]["longest"] >= rows[ours]["longest"]
    ]
    parts.append(f"Checkpointing is longer: {'; '.join(wins) if wins else 'nowhere here'}.")
    return " ".join(part[0].upper() + part[1:] for part in parts)


def _additions(name: str) -> tuple[bool, bool]:
    return SCHEMES[name].chunked_loss, SCHEMES[name].chunked_mlp


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--smoke", action="store_true", help="a small network, nothing written")
    parser.add_argument("--limit", type=float, default=120, help="seconds for one real run")
    parser.add_argument("--rounds", type=int, default=3, help="rounds of the timing")
    parser.add_argument("--table", action="store_true", help="only the table, of what is stored")
    parser.add_argument("--measure", nargs=2, metavar=("NAME", "LENGTH"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.table:
        stored = json.loads((RESULTS / "context.json").read_text())
        (RESULTS / "table.md").write_text(table(stored))
        return
    torch.set_num_threads(1)  # and processor time below: the same on a machine that others use
    question = SMALL if arguments.smoke else FULL
    if arguments.measure:
        name, length = arguments.measure
        print(json.dumps(measure(question, SCHEMES[name], int(length))))
        return
    names = ["reversible + chunked loss"] if arguments.smoke else [*SCHEMES]
    rows: dict[str, Any] = {}
    for name in names:
        print(name, file=sys.stderr)
        length, promised = longest(question, SCHEMES[name])
        rows[name] = {"longest": length, "predicted_bytes": promised}
    rounds = 1 if arguments.smoke else arguments.rounds
    for name, seconds in seconds_at(question, names, rounds).items():
        rows[name]["seconds_common"] = seconds
        print(f"{name}: {seconds} s", file=sys.stderr)
    for name, row in rows.items():
        row["run"] = verify(arguments, question, name, row)
        print(f"{name}: {row['run']}", file=sys.stderr)
        assert row["run"] is None or row["run"]["measured_bytes"] <= question.budget_bytes
    if arguments.smoke:
        return
    answer = {**circumstances(question), "numbers": rows}
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "context.json").write_text(json.dumps(answer, indent=1) + "\n")
    (RESULTS / "table.md").write_text(table(answer))
    print(table(answer))


if __name__ == "__main__":
    main()
