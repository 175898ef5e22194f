"""Two processes: DDP in three modes and FSDP2, against stored activations in the same mode."""

import json
import sys

import pytest
import torch.multiprocessing

from reversible.workers import MODES, work

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="gloo over a file needs Unix")


def test_two_processes_train_as_with_stored_activations_in_every_mode(tmp_path):
    # One start of the processes for all modes: that is what takes time here.
    torch.multiprocessing.spawn(work, (str(tmp_path),), nprocs=2)
    for rank in range(2):
        found = json.loads((tmp_path / f"{rank}.json").read_text())
        assert found == dict.fromkeys(MODES, "")
