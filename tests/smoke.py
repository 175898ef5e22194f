"""A short check of an installed shoestring: run it with the Python that has it, from anywhere.

Not a test module: `.ci/run` runs it against the wheel, away from the source tree.
"""

import json
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

COMMAND = Path(sysconfig.get_path("scripts")) / "shoestring"
RUN = """
[run]
directory = "run"
steps = 2
budget = "200MiB"
[model]
preset = "tiny"
rule = "feistel"
[data]
source = "notes.txt"
vocabulary = 300
sequence_length = 32
batch_size = 2
held_out = 0.2
[evaluate]
batches = 1
"""


def shoestring(*args: str, cwd: Path, code: int = 0) -> list[dict]:
    """The JSON lines that a command prints; it must end with `code`."""
    command = [str(COMMAND), *args, "--json"]
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)
    if done.returncode != code:
        sys.exit(f"{command} ended with {done.returncode}, not {code}:\n{done.stderr}")
    return [json.loads(line) for line in done.stdout.splitlines()]


def main() -> None:
    import shoestring as package

    installed = Path(package.__file__).is_relative_to(sysconfig.get_path("purelib"))
    if not installed:
        sys.exit(f"{package.__file__} is not the installed package")
    with tempfile.TemporaryDirectory() as folder:
        here = Path(folder)
        (here / "notes.txt").write_text("".join(f"line {i} of a text\n" for i in range(2000)))
        (here / "run.toml").write_text(RUN)
        assert shoestring("doctor", cwd=here)[-1]["self_test"]["passed"]
        events = shoestring("train", "run.toml", cwd=here)
        assert events[-1]["event"] == "done", events[-1]
        text = shoestring("generate", "run", "--prompt", "line", "--tokens", "4", cwd=here)
        assert text[-1]["text"]
        shoestring("train", "run.toml", cwd=here, code=2)  # there is a run already
        longer = shoestring("resume", "run", "--steps", "4", cwd=here)
        assert longer[-1]["receipt"]["steps"] == 4
        page = shoestring("report", "run", cwd=here)[-1]["report"]
        assert "</style>" in (here / page).read_text(encoding="utf-8")
        small = ("--run.directory", "other", "--run.budget", "100KiB")
        refused = shoestring("train", "run.toml", *small, cwd=here, code=3)
        assert refused[-1]["error"]["smallest_bytes"] > 100 * 2**10
    print(f"smoke test passed with {package.__file__}")


if __name__ == "__main__":
    main()
