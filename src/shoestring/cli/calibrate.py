"""`shoestring calibrate MODEL --data SOURCE`: which errors of its context a model notices.

What it writes is for `--calibration` of `generate` and `context`, and for `CompressedCache`.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from tyro.conf import Positional, arg

from ..errors import ConfigError, DataError
from ..units import format_seconds
from .arguments import Common
from .terminal import Terminal


@dataclass(frozen=True, kw_only=True)
class Arguments(Common):
    """Learn from text which errors of keys and values a model notices."""

    model: Annotated[Positional[str], arg(metavar="DIRECTORY")]
    """A Hugging Face model directory, a GGUF file, or a run directory."""
    data: str = "stdlib"
    """Text of the kind the model is going to read, as data.source in a run."""
    output: str = ""
    """Where the calibration goes; empty = calibration-NAME."""
    texts: int = 8
    """Pieces of text that are read."""
    tokens: int = 768
    """Tokens of a piece."""
    seed: int = 0
    """Of what the model is asked to say."""
    device: str = "auto"
    """auto (CUDA when there is one, else CPU), cpu, cuda or cuda:N."""

    def __post_init__(self) -> None:
        for name, low in (("texts", 1), ("tokens", 33), ("seed", 0)):
            if not getattr(self, name) >= low:
                raise ConfigError(f"--{name} {getattr(self, name)}", expected=f"{low} or more")


def run(arguments: Arguments, terminal: Terminal) -> int:
    """Writes the calibration; exit code 0."""
    import time

    from .. import load
    from ..serve import calibrate
    from ..training.distributed import pick_device

    output = Path(arguments.output or f"calibration-{Path(arguments.model).stem}")
    device = pick_device(arguments.device)
    model, tokenizer = load(Path(arguments.model))
    if tokenizer is None:
        raise ConfigError(
            f"{arguments.model} holds no tokenizer", expected="a tokenizer beside the model"
        )
    pieces = _pieces(arguments, tokenizer)
    started = time.monotonic()

    def told(done: int, whole: int) -> None:
        terminal.note(f"{done} of {whole} texts, {format_seconds(time.monotonic() - started)}")

    found = calibrate(model.to(device), pieces, seed=arguments.seed, progress=told)
    found.save(output)
    terminal.emit({
        "calibration": str(output), "model": arguments.model, "tokens": found.tokens,
        "seconds": time.monotonic() - started, "digest": found.digest,
    })  # fmt: skip
    terminal.say(f"{output}: of {found.tokens} tokens; for --calibration, with --cache 3.25bits")
    return 0


def _pieces(arguments: Arguments, tokenizer: Any) -> Any:
    """(texts, tokens) of ids, from a sample of the source."""
    import torch

    from ..data import open_source
    from ..data.chat import encode_chat

    wanted = arguments.texts * arguments.tokens
    ids: list[int] = []
    for document in open_source(arguments.data).sample(_BYTES * wanted, arguments.seed):
        if document.messages is not None:
            ids += encode_chat(document, tokenizer)[0].tolist()
        else:
            ids += tokenizer(document.text, add_special_tokens=False)["input_ids"]
        if len(ids) >= wanted:
            return torch.tensor(ids[:wanted]).view(arguments.texts, arguments.tokens)
    raise DataError(
        f"{arguments.data} gives {len(ids):,} tokens",
        expected=f"{wanted:,}, for {arguments.texts} texts of {arguments.tokens}",
        hint="Give more text, or fewer --texts.",
    )


_BYTES = 8  # of a token, at most, in the mean
