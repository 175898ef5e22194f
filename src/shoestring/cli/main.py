"""`shoestring VERB ...`: finds the verb, reports errors, and sets the exit code.

Torch takes seconds to import, so nothing here and nothing at the top of a verb's file may reach
it: help and mistakes in the arguments are answered at once. A verb's file holds `Arguments`, a
dataclass that tyro turns into flags, and `run(arguments, terminal) -> exit code`.
"""

import importlib
import os
import signal
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..errors import ConfigError, ShoestringError, closest

if TYPE_CHECKING:
    from .terminal import Terminal

VERBS = {
    "plan": "what fits into a byte budget and what it costs, before anything is allocated",
    "train": "train inside the budget, from a TOML file",
    "resume": "go on with a run that ended early, bit for bit",
    "merge": "put blocks that were trained apart together as one model",
    "sample": "draw pictures or texts from merged blocks",
    "report": "one page of a run, or of several over one another",
    "generate": "continue a text with a trained model",
    "calibrate": "which errors of its context a model notices, for small contexts",
    "context": "what a context takes in bytes, by form, and how long it can be",
    "study": "a published claim run again, with the control arm it left out",
    "doctor": "where a training script's memory goes; alone: versions, memory, a self test",
    "demo": "a deep language model trained on real text in a few hundred MiB",
}
EXIT_CODES = {
    0: "done",
    1: "failed",
    2: "bad usage, settings or data",
    3: "does not fit into the budget",
    130: "interrupted; resume goes on",
}
_RESTARTED = "SHOESTRING_RESTARTED"


def usage() -> str:
    """The page that `shoestring --help` prints."""
    verbs = "\n".join(f"  {name:9} {text}" for name, text in VERBS.items())
    codes = "\n".join(f"  {code:<9} {text}" for code, text in EXIT_CODES.items())
    return (
        "usage: shoestring VERB ...\n\nTrain in the memory you have.\n\n"
        f"verbs (shoestring VERB --help says more):\n{verbs}\n\n"
        "every verb takes:\n"
        "  --json    JSON on stdout, one object or one a line; text for people on stderr\n"
        "  --debug   the traceback behind an error\n\n"
        f"exit codes:\n{codes}"
    )


def main(argv: Sequence[str]) -> int:
    """Runs one command and returns its exit code; errors become messages here."""
    if not argv or argv[0] in ("-h", "--help"):
        print(usage(), file=sys.stdout if argv else sys.stderr)
        return 0 if argv else 2
    if argv[0] == "--version":
        print(_version())
        return 0
    from .terminal import Terminal  # rich takes as long to import as all of --help

    argv, script = split_script(argv)
    terminal = Terminal(json="--json" in argv)
    try:
        return _run_verb(argv[0], list(argv[1:]), script, terminal)
    except KeyboardInterrupt as error:
        terminal.error(error if error.args else KeyboardInterrupt("interrupted"), code=130)
        return 130
    except BrokenPipeError:
        raise
    except ShoestringError as error:
        return _report(error, error.exit_code, terminal, debug="--debug" in argv)
    except Exception as error:
        return _report(error, 1, terminal, debug="--debug" in argv)


def split_script(argv: Sequence[str]) -> tuple[Sequence[str], Sequence[str]]:
    """Our own arguments, and what comes after `--script FILE`: those are the script's."""
    if argv[0] != "doctor" or "--script" not in argv:
        return argv, ()
    end = list(argv).index("--script") + 2
    return argv[:end], argv[end:]


def _run_verb(verb: str, rest: list[str], script: Sequence[str], terminal: "Terminal") -> int:
    if verb not in VERBS:
        raise ConfigError(
            f"{verb!r} is not a verb",
            expected=f"one of {', '.join(VERBS)}",
            hint=closest(verb, VERBS),
        )
    from .arguments import parse

    module = importlib.import_module(f".{verb}", __package__)
    defaults = module.defaults(rest) if hasattr(module, "defaults") else None
    kind = module.Arguments if defaults is None else type(defaults)
    arguments = parse(kind, verb, rest, defaults)
    more = {"script_arguments": tuple(script)} if script else {}
    return int(module.run(arguments, terminal, **more))


def _report(error: Exception, code: int, terminal: "Terminal", *, debug: bool) -> int:
    if debug:
        import traceback

        traceback.print_exception(error)
    terminal.error(error, code=code)
    return code


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("shoestring")
    except PackageNotFoundError:  # run from a source tree that was never installed
        return "not installed"


def _restart_with_tuned_allocator(argv: Sequence[str]) -> None:
    """Starts this command again with the allocator's settings in its environment.

    glibc reads them when a process starts, so they cannot be set from inside. Once only: the
    variable `SHOESTRING_RESTARTED` says that it was done. Where the settings do not apply (other
    systems, other allocators) nothing happens, and `doctor` says so.
    """
    from ..allocator import is_tuned, tuned_environment

    if not argv or argv[0] not in VERBS or {"-h", "--help"} & set(argv):
        return
    if argv[0] == "doctor" and {"--script", "--pid"} & set(argv):
        return  # a script is watched in the environment that it is used to
    if os.environ.get(_RESTARTED) or is_tuned() or not (settings := tuned_environment()):
        return
    command = [sys.executable, *sys.orig_argv[1:]]
    os.execve(command[0], command, {**os.environ, **settings, _RESTARTED: "1"})


def entry() -> None:
    """The console command."""
    _restart_with_tuned_allocator(sys.argv[1:])
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C, from the first moment
    try:
        code = main(sys.argv[1:])
        sys.stdout.flush()
    except BrokenPipeError:  # the reader of our output went away, as `| head` does
        # what is left in the buffer would fail again when Python exits
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 1
    if code and os.environ.get("WORLD_SIZE", "1") != "1":
        # What carries tensors between processes may abort while Python ends, where one is gone.
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)
