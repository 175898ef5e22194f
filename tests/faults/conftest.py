"""Runs that are about to go wrong."""

import email
from collections.abc import Callable
from pathlib import Path

import pytest

from shoestring.training.config import RunConfig

from .victims import can_mount, small

TEXT = Path(email.__file__).parent


@pytest.fixture(scope="session")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def settings(tmp_path, cache, monkeypatch) -> Callable[..., RunConfig]:
    """A run of seconds in `tmp_path / "run"`; keywords replace fields of sections."""
    monkeypatch.setenv("SHOESTRING_CACHE", str(cache))
    return lambda directory=tmp_path / "run", **sections: small(directory, TEXT, **sections)


@pytest.fixture(scope="session")
def own_disk() -> None:
    if not can_mount():
        pytest.skip("this system does not let a process mount a disk of its own")
