"""Budgets: parsed, refused, and what `auto` finds free."""

from pathlib import Path

import pytest
import torch
from torch import nn

from shoestring.errors import ConfigError
from shoestring.planner.budget import (
    CPU_MARGIN_DEFAULT,
    CPU_MARGIN_TUNED,
    automatic,
    budget_bytes,
    cpu_free_bytes,
    resident_bytes,
)

CPU = torch.device("cpu")


def machine(root: Path, *, available_kib: int, groups: dict[str, tuple[str, int, int]]) -> Path:
    """A file system root with /proc/meminfo and version 2 cgroups: limit, usage, droppable."""
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/meminfo").write_text(f"MemTotal: 999 kB\nMemAvailable: {available_kib} kB\n")
    (root / "proc/self/cgroup").write_text("0::/a/b\n")
    for path, (limit, usage, cache) in groups.items():
        folder = root / "sys/fs/cgroup" / path
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "memory.max").write_text(f"{limit}\n")
        (folder / "memory.current").write_text(f"{usage}\n")
        (folder / "memory.stat").write_text(f"anon 5\ninactive_file {cache}\n")
    return root


@pytest.mark.parametrize(
    ("given", "expected"), [(1000, 1000), ("2 KiB", 2048), ("1.5 MB", 1500000)]
)
def test_budgets_are_read(given, expected):
    assert budget_bytes(given, None, CPU) == expected


@pytest.mark.parametrize("given", ["lots", "6 parsecs", -5, 0, True, 1.5])
def test_a_budget_that_cannot_be_read_says_what_could(given):
    with pytest.raises(ConfigError, match=r"budget: .*; expected .*6GiB.*or auto") as error:
        budget_bytes(given, None, CPU)
    assert error.value.exit_code == 2


def test_free_memory_is_what_the_tightest_group_leaves(tmp_path):
    root = machine(
        tmp_path, available_kib=1000,
        groups={"a": ("600000", 200_000, 50_000), "a/b": ("max", 1, 1)},
    )  # fmt: skip
    assert cpu_free_bytes(root) == 450_000


def test_without_group_limits_the_machine_decides(tmp_path):
    root = machine(tmp_path, available_kib=1000, groups={"a/b": ("max", 1, 1)})
    assert cpu_free_bytes(root) == 1000 * 1024


def test_version_1_groups_are_read(tmp_path):
    root = machine(tmp_path, available_kib=1000, groups={})
    (root / "proc/self/cgroup").write_text("4:cpu,memory:/x\n1:name=systemd:/\n")
    folder = root / "sys/fs/cgroup/memory/x"
    folder.mkdir(parents=True)
    (folder / "memory.limit_in_bytes").write_text("70000")
    (folder / "memory.usage_in_bytes").write_text("30000")
    (folder / "memory.stat").write_text("total_inactive_file 1000\n")
    assert cpu_free_bytes(root) == 41_000


def test_a_system_that_tells_nothing_is_an_error(tmp_path):
    with pytest.raises(ConfigError, match="does not tell how much memory is free"):
        cpu_free_bytes(tmp_path)


@pytest.mark.parametrize(("tuned", "margin"), [(True, 0.08), (False, 0.40)])
def test_auto_counts_what_the_model_holds_and_leaves_the_margin(monkeypatch, tuned, margin):
    monkeypatch.setattr("shoestring.planner.budget.is_tuned", lambda: tuned)
    monkeypatch.setattr("shoestring.planner.budget.cpu_free_bytes", lambda: 10_000_000)
    assert {True: CPU_MARGIN_TUNED, False: CPU_MARGIN_DEFAULT}[tuned] == margin
    assert automatic(400_000, CPU) == int(10_400_000 / (1 + margin))


def test_the_margin_goes_by_how_the_process_was_started(monkeypatch):
    """The C library has read its settings long before anything is planned."""
    monkeypatch.setattr("shoestring.planner.budget.cpu_free_bytes", lambda: 10_000_000)
    found = []
    for settings in ({}, {"MALLOC_MMAP_THRESHOLD_": "131072"}):
        for name in ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "MALLOC_TOP_PAD_"):
            monkeypatch.delenv(name, raising=False)
        for name, value in settings.items():
            monkeypatch.setenv(name, value)
        found.append(automatic(0, CPU))
    assert found[0] == found[1]


def test_resident_bytes_count_a_shared_weight_once():
    a, b = nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False)
    b.weight = a.weight
    model = nn.Sequential(a, b)
    model(torch.ones(1, 8)).sum().backward()
    assert resident_bytes(model, CPU) == 2 * 8 * 8 * 4


def test_auto_on_this_machine_is_positive():
    assert budget_bytes("auto", nn.Linear(2, 2), CPU) > 0
