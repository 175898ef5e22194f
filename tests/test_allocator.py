"""Memory that was freed goes back to the system when asked."""

import json
import os
import subprocess
import sys

from shoestring import allocator

SCRIPT = """
import json, os, re
from shoestring import release

def resident():
    return int(re.search(r"VmRSS:\\s+(\\d+)", open("/proc/self/status").read())[1]) << 10

blocks = [bytearray(100_000) for _ in range(400)]  # below any threshold: on the heap
keeps = blocks[::2]
last = bytearray(100_000)
del blocks
before = resident()
print(json.dumps([release(), before - resident(), all(not any(b) for b in keeps)]))
"""


def test_what_the_heap_holds_of_freed_memory_goes_back() -> None:
    names = {*allocator.SETTINGS, "MALLOC_TOP_PAD_", "PYTHONMALLOC"}
    env = {k: v for k, v in os.environ.items() if k not in names}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], env=env, capture_output=True, text=True, check=True
    )
    had_some, given_back, kept = json.loads(done.stdout)
    assert had_some
    assert given_back > 15_000_000  # half of 400 blocks, but for the pages they share with others
    assert kept


def test_another_allocator_is_left_alone(monkeypatch) -> None:
    monkeypatch.setenv("LD_PRELOAD", "/usr/lib/libjemalloc.so.2")
    assert not allocator.release()
