"""A group that divides its weights computes what one process does, and saves the same files."""

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.distributed.tensor import DTensor

from shoestring.checkpoint import Store
from shoestring.checkpoint.tensors import InParts, write_tensors
from shoestring.errors import ConfigError
from shoestring.planner import plan, planner
from shoestring.planner.ways import Way
from shoestring.training.distributed import World
from shoestring.training.loop import resume, train
from shoestring.training.planning import refuse_in_group
from shoestring.training.sharding import rehearsed, rows_of_rank
from training.group import Group, run

FULL = {"sharding": "full"}
CONSTANT = {"kind": "constant"}
BOUND = 1.5e-7
"""Between parameters whose gradients were summed in another order: one float32 step at 1."""


def newest(directory: Path) -> dict[str, torch.Tensor]:
    saved, wrong = Store(directory / "checkpoints").newest()
    assert saved is not None
    assert not wrong
    files = ("model", "optimizer")
    return {f"{f} {name}": t for f in files for name, t in saved.tensors(f"{f}.safetensors")}


def largest_difference(one: Path, other: Path) -> float:
    mine, theirs = newest(one), newest(other)
    assert mine.keys() == theirs.keys()
    return max((t.double() - theirs[name].double()).abs().max().item() for name, t in mine.items())


def lines(directory: Path, event: str) -> list[dict]:
    found = map(json.loads, (directory / "metrics.jsonl").read_text().splitlines())
    return [line for line in found if line["event"] == event]


@pytest.mark.parametrize(
    ("rows", "size"), [(1, 4), (5, 4), (8, 4), (7, 2), (0, 2), (9, 4), (33, 2)]
)
def test_rows_are_divided_as_chunk_divides(rows, size):
    whole = torch.arange(rows)
    parts = list(whole.chunk(size)) if rows else []
    for rank in range(size):
        first, stop = rows_of_rank(rows, rank, size)
        expected = parts[rank] if rank < len(parts) else whole[:0]
        assert torch.equal(whole[first:stop], expected)


class Halves(InParts):
    def __init__(self, whole: torch.Tensor) -> None:
        self.whole, self.shape, self.dtype = whole, whole.shape, whole.dtype
        self.layout = torch.strided

    def parts(self) -> Iterator[torch.Tensor]:
        yield from self.whole.chunk(2)


def test_tensor_that_comes_in_parts_is_written_as_the_whole(tmp_path):
    whole = {"a": torch.randn(5, 3), "b": torch.randn(1), "c": torch.randn(4, 2).bfloat16()}
    one = write_tensors(tmp_path / "one", whole)
    other = write_tensors(tmp_path / "other", {n: Halves(t) for n, t in whole.items()})
    assert one == other
    assert (tmp_path / "one").read_bytes() == (tmp_path / "other").read_bytes()


SLOW = pytest.mark.slow  # a group takes seconds


@pytest.mark.parametrize("rule", [pytest.param("residual", marks=SLOW), "feistel"])
def test_two_processes_are_one_that_accumulates_bit_for_bit(settings, tmp_path, rule):
    # 2 x 4 rows in the same order: sums of two do not depend on who adds. Clipping would take the
    # norm of parts, which is summed in another order than that of the whole.
    shared = {"model": {"rule": rule}, "evaluate": {"batches": 3, "sample_tokens": 4}}
    one = {"run": {"directory": str(tmp_path / "one")}, "optim": {"accumulate": 2, "grad_clip": 0}}
    two = {"run": {"directory": str(tmp_path / "two"), **FULL}, "optim": {"grad_clip": 0}}
    alone = train(settings(**one, **shared))
    run("train", settings(**two, **shared), 2, tmp_path / "logs")
    assert largest_difference(tmp_path / "one", tmp_path / "two") == 0
    for event, names in (
        ("step", ("loss", "lr", "tokens")),
        ("evaluation", ("tokens", "bytes")),
        ("sample", ("text",)),
    ):
        mine, theirs = (lines(tmp_path / name, event) for name in ("one", "two"))
        assert [[line[n] for n in names] for line in mine] == [
            [line[n] for n in names] for line in theirs
        ]
    norms = [[x["norm"] for x in lines(tmp_path / name, "step")] for name in ("one", "two")]
    assert norms[1] == pytest.approx(norms[0], rel=1e-6)
    saved = load_file(tmp_path / "two" / "model" / "model.safetensors")
    mine = load_file(tmp_path / "one" / "model" / "model.safetensors")
    assert saved.keys() == mine.keys()
    assert all(torch.equal(saved[name], mine[name]) for name in mine)
    config = json.loads((tmp_path / "two" / "model" / "config.json").read_text())
    assert config["architectures"] == ["GPT"]
    receipt = json.loads((tmp_path / "two" / "receipt.json").read_text())
    assert receipt["model"] == json.loads(json.dumps(alone.receipt["model"]))


@pytest.mark.parametrize("count", [1, pytest.param(2, marks=SLOW), pytest.param(4, marks=SLOW)])
def test_run_of_two_processes_goes_on_with_as_many_or_others(settings, tmp_path, count):
    def at(name: str, steps: int, **sections):
        place = {"directory": str(tmp_path / name), "steps": steps, **FULL}
        return settings(run=place, schedule=CONSTANT, **sections)

    run("train", at("whole", 6), 2, tmp_path / "logs")
    run("train", at("part", 3), 2, tmp_path / "logs")
    # eight rows an update, whoever reads them
    rows = {1: {"optim": {"accumulate": 2}}, 4: {"data": {"batch_size": 2}}}.get(count, {})
    config = at("part", 6, **rows)
    (tmp_path / "part" / "config.toml").write_text(config.to_toml())
    if count == 1:
        resume(tmp_path / "part")
    else:
        run("resume", config, count, tmp_path / "logs")
    off = largest_difference(tmp_path / "whole", tmp_path / "part")
    assert off == 0 if count == 2 else off <= BOUND
    told = lines(tmp_path / "part", "other machine")
    assert ("processes 2 then" in told[0]["message"]) if count != 2 else not told


@pytest.mark.slow
def test_disk_that_is_full_in_a_checkpoint_holds_nobody_up(settings, tmp_path):
    config = settings(run=FULL, checkpoint={"every": 2})
    run("train", config, 2, tmp_path / "logs", "full_disk_once", 2)
    assert [line["step"] for line in lines(tmp_path / "run", "step")] == [1, 2, 3, 4, 5, 6]
    names = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert names == ["step-4", "step-6"]


@pytest.mark.slow
def test_gradient_that_is_not_finite_in_one_part_stops_all(settings, tmp_path):
    group = Group("train", settings(run=FULL), 2, tmp_path / "logs", "infinite_gradient", 1, 3)
    assert group.wait() == [1, 1]
    assert "step 3: the norm of all gradients is inf" in group.said[0]
    assert "step 3: the gradient of model.embed_tokens.weight is not finite" in group.said[1]
    saved, _ = Store(tmp_path / "run" / "checkpoints").newest()
    assert saved.step == 2


def test_copy_for_the_background_is_refused_beside_sharding(settings):
    with pytest.raises(ConfigError, match=r"checkpoint.background is set beside run.sharding"):
        settings(run=FULL, checkpoint={"background": True})


@pytest.mark.parametrize("sharding", ["none", "full"])
@pytest.mark.parametrize(
    ("name", "why"),
    [("stream_weights", "puts the weights"), ("offload_optimizer", "steps as it is"),
     ("fused_step", "steps as it is"), ("low_bit_states", "steps as it is"),
     ("bf16_stochastic", "steps as it is")],
)  # fmt: skip
def test_methods_that_contradict_a_group_are_refused_by_name(
    settings, tmp_path, sharding, name, why
):
    two = World(rank=0, size=2, device=torch.device("cpu"), sharding=sharding)
    setting = "run.sharding = 'full' over 2" if sharding == "full" else "a group of 2 processes"
    asked = settings(run={"sharding": sharding, "allow": "unbiased"}, plan={"only": (name,)})
    with pytest.raises(ConfigError, match=f"plan.only names '{name}'.*{setting}.*{why}"):
        refuse_in_group(asked, two)
    refuse_in_group(asked, World(rank=0, size=1, device=torch.device("cpu")))
    made = plan(
        Net, {"x": torch.ones(2, 8)}, budget="1MiB", seconds=False, allow=["keep"],
        loss=lambda model, batch: model(batch["x"]).sum(),
    )  # fmt: skip
    file = tmp_path / "plan.json"
    file.write_text(dataclasses.replace(made, patches=(Way(name),)).to_json())
    with pytest.raises(ConfigError, match=f"plan.file = .* names '{name}'"):
        refuse_in_group(settings(plan={"file": str(file)}), two)


@pytest.mark.slow
def test_group_is_refused_before_anything_is_there(settings, tmp_path):
    config = settings(run=FULL, plan={"only": ("offload_optimizer",)})
    group = Group("train", config, 2, tmp_path / "logs")
    assert group.wait() == [2, 2]
    assert all("plan.only names 'offload_optimizer'" in said for said in group.said)
    assert not (tmp_path / "run").exists()


def test_single_number_cannot_be_divided():
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
    model.scale = torch.nn.Parameter(torch.ones(()))
    with (
        rehearsed(2, torch.device("cpu")) as division,
        pytest.raises(ConfigError, match="cannot divide scale, which is a single number"),
    ):
        division.divide(model)
    assert not any(isinstance(p, DTensor) for p in model.parameters())


class Block(torch.nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.up, self.down = torch.nn.Linear(width, 3 * width), torch.nn.Linear(3 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(torch.relu(self.up(x)))


class Net(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = torch.nn.Linear(8, 32)
        self.layers = torch.nn.ModuleList(Block(32) for _ in range(4))
        self.head = torch.nn.Linear(32, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("size", [2, 3])
def test_planner_divides_what_is_divided_and_nothing_else(size, accumulate):
    def peaks(rows: int) -> tuple[int, dict[str, int]]:
        with rehearsed(size, torch.device("cpu")) as division:
            plans = planner(
                Net, {"x": torch.ones(rows, 8)}, loss=lambda m, b: m(b["x"]).square().mean(),
                seconds=False, division=division, accumulate=accumulate, allow=["keep"],
            )  # fmt: skip
            made = plans("1GiB")
            assert made.peak_bytes <= plans("1GiB").budget_bytes
        return made.peak_bytes, dict(made.by_category)

    net = Net()
    parts = [-(-p.shape[0] // size) * p[0].numel() * 4 for p in net.parameters()]
    peak, by_category = peaks(rows=64)
    assert by_category["weights"] == sum(parts)
    # AdamW's two states, and its count of steps, of which every process has all
    assert by_category["optimizer"] == 2 * sum(parts) + 4 * len(parts)
    # activations are each process's own: of twice the rows, twice as large
    more, more_by_category = peaks(rows=640)
    for name in ("weights", "optimizer"):
        assert by_category[name] == more_by_category[name]
    assert more > peak + 576 * 4 * (4 * 96 + 4 * 32)


@pytest.mark.slow
@pytest.mark.parametrize(("rule", "budget"), [("residual", "3.8MiB"), ("feistel", "6MiB")])
def test_divided_run_takes_what_was_promised(settings, tmp_path, rule, budget):
    config = settings(
        run={**FULL, "budget": budget, "steps": 3},
        model={"num_hidden_layers": 6, "hidden_size": 64, "rule": rule},
        data={"sequence_length": 32 if rule == "residual" else 64},
    )
    run("train", config, 2, tmp_path / "logs")
    memory = json.loads((tmp_path / "run" / "receipt.json").read_text())["memory"]
    assert 0 <= memory["error"] <= 0.03
    assert memory["measured_bytes"] <= memory["budget_bytes"]
