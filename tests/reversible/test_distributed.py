"""Two processes: DDP in three modes and FSDP2, against stored activations in the same mode."""

import json
import sys

import pytest
import torch.multiprocessing

from reversible.workers import MODES, work

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="gloo over a file needs Unix")


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What both processes say about every mode; they are started once."""
    folder = tmp_path_factory.mktemp("workers")
    torch.multiprocessing.spawn(work, (str(folder),), nprocs=2)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize("mode", MODES)
def test_two_processes_train_as_with_stored_activations(found, mode):
    assert [report[mode] for report in found] == ["", ""]
