"""Runs on real text, small enough for a test: the email package of the standard library."""

import dataclasses
import email
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from shoestring.training.config import (
    DataConfig,
    EvaluateConfig,
    JobConfig,
    ModelConfig,
    RunConfig,
    ScheduleConfig,
)

TEXT = Path(email.__file__).parent
SHAPE = {"preset": "tiny", "num_hidden_layers": 3, "hidden_size": 32}


@pytest.fixture(scope="session")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def settings(tmp_path, cache, monkeypatch) -> Callable[..., RunConfig]:
    """A small run without a budget; keywords replace whole sections or fields of them."""
    monkeypatch.setenv("SHOESTRING_CACHE", str(cache))
    whole = RunConfig(
        run=JobConfig(
            directory=str(tmp_path / "run"),
            steps=6,
            budget="none",
            threads=1,
            device="cpu",
            replace=True,
        ),
        model=ModelConfig(**SHAPE),
        data=DataConfig(
            source=str(TEXT), vocabulary=320, sequence_length=32, batch_size=4, held_out=0.2
        ),
        evaluate=EvaluateConfig(batches=2),
        schedule=ScheduleConfig(warmup_share=0.0),
    )

    def make(**sections: dict[str, Any]) -> RunConfig:
        changed = {
            name: dataclasses.replace(getattr(whole, name), **fields)
            for name, fields in sections.items()
        }
        return dataclasses.replace(whole, **changed)

    return make
