"""`shoestring sample RUN`: pictures or texts that a merged model draws, or goes on with.

A picture goes to a PNG file, a grid of all images; texts go to stdout, one after the other.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from tyro.conf import Positional, arg

from ..errors import ConfigError
from .arguments import Common
from .terminal import Terminal

if TYPE_CHECKING:
    from torch import Tensor

    from ..training.blockwise.merging import Merged


@dataclass(frozen=True, kw_only=True)
class Arguments(Common):
    """Draw pictures or texts from a model whose blocks were merged."""

    model: Annotated[Positional[str], arg(metavar="RUN")]
    """A run directory whose blocks were merged, or the merged model's own directory."""
    count: int = 16
    """How many images or texts."""
    steps: int | None = None
    """Calls of a block for each; None = 64 for texts unmasked, else one more than there are blocks:
    for each image, or for each byte from left to right."""
    labels: tuple[int, ...] = ()
    """Images: classes to draw, in turn; none = no class is asked for."""
    guidance: float = 1.0
    """Images: how much the classes are insisted on; 1 = as trained."""
    temperature: float | None = None
    """Texts: lower = more likely bytes only; None = 1. From left to right it draws from the first
    call's answer, and None leaves that to the starting noise."""
    prompt: str = ""
    """Texts from left to right: what they begin with."""
    length: int | None = None
    """Texts from left to right: bytes with the prompt; None = as many as in training."""
    block: int | None = None
    """Texts from left to right: this block's own next-token predictions in place of the chain."""
    seed: int = 0
    """Seed of the drawing."""
    to: str = ""
    """Images: the PNG file; empty = samples.png in RUN."""
    device: str = "auto"
    """auto (CUDA when there is one, else CPU), cpu, cuda or cuda:N."""

    def __post_init__(self) -> None:
        for name, low in (("count", 1), ("seed", 0), ("guidance", 0)):
            value = getattr(self, name)
            if not value >= low:
                raise ConfigError(f"--{name} {value} cannot be used", expected=f"{low} or more")


def run(arguments: Arguments, terminal: Terminal) -> int:
    """Draws; exit code 0."""
    from ..training.blockwise.merging import load_merged
    from ..training.distributed import pick_device

    merged = load_merged(arguments.model, device=pick_device(arguments.device))
    if merged.model.config.answers:
        raise ConfigError(
            f"{arguments.model} classifies images", expected="a model that draws",
            hint="shoestring.training.blockwise.sampling.classify answers with classes.",
        )  # fmt: skip
    kind = merged.facts["objective"]["kind"]
    _check_fits(arguments, kind)
    drawn = {"masked": _texts, "tokens": _continued}.get(kind, _pictures)
    terminal.emit(drawn(arguments, merged, terminal))
    return 0


KINDS = {"masked": "texts", "tokens": "texts from left to right"}
"""What a model draws, by its objective; all others draw images."""
FLAGS = {
    "images": ("labels", "guidance", "to"),
    "texts": ("temperature",),
    "texts from left to right": ("prompt", "length", "block"),
}


def _check_fits(arguments: Arguments, kind: str) -> None:
    """ConfigError for flags of another kind of model, which would have no effect."""
    drawn = KINDS.get(kind, "images")
    for what, names in FLAGS.items():
        for name in names:
            is_given = getattr(arguments, name) != getattr(Arguments(model=""), name)
            if is_given and not drawn.startswith(what):
                raise ConfigError(
                    f"--{name} is given, and {arguments.model} draws {drawn}",
                    expected=f"it for {what} only",
                )
    if arguments.guidance != 1.0 and not arguments.labels:
        raise ConfigError("--guidance without --labels", expected="the classes it is to insist on")
    if arguments.block is not None and arguments.steps is not None:
        raise ConfigError(
            "--steps with --block", expected="one of the two: a block by itself takes one call"
        )


def _pictures(arguments: Arguments, merged: "Merged", terminal: Terminal) -> dict[str, Any]:
    from ..checkpoint import write_bytes
    from ..training.blockwise.png import check_channels, grid_of, png_of
    from ..training.blockwise.sampling import sample_images

    check_channels(merged.model.config.channels)
    labels = [arguments.labels[n % len(arguments.labels)] for n in range(arguments.count)
              ] if arguments.labels else None  # fmt: skip
    images = sample_images(
        merged, arguments.count, steps=arguments.steps, labels=labels,
        guidance=arguments.guidance, seed=arguments.seed,
    )  # fmt: skip
    place = Path(arguments.to) if arguments.to else Path(arguments.model) / "samples.png"
    write_bytes(place, png_of(grid_of(images)))
    terminal.say(f"{arguments.count} images are in {place}")
    return {"picture": str(place), "count": arguments.count, "seed": arguments.seed}


def _texts(arguments: Arguments, merged: "Merged", terminal: Terminal) -> dict[str, Any]:
    from ..training.blockwise.sampling import sample_text

    tokens = sample_text(
        merged, arguments.count, steps=64 if arguments.steps is None else arguments.steps,
        temperature=1.0 if arguments.temperature is None else arguments.temperature,
        seed=arguments.seed,
    )  # fmt: skip
    return _told(tokens, arguments, terminal)


def _continued(arguments: Arguments, merged: "Merged", terminal: Terminal) -> dict[str, Any]:
    import torch

    from ..training.blockwise.decoding import write_on, write_plainly

    prompt = torch.tensor(list(arguments.prompt.encode()), dtype=torch.int64)
    prompts = prompt.expand(arguments.count, -1).to(next(merged.model.parameters()).device)
    length = merged.facts["model"]["length"] if arguments.length is None else arguments.length
    count = length - len(prompt)
    if arguments.block is not None:
        written = write_plainly(
            merged, prompts, count, block=arguments.block, seed=arguments.seed,
            temperature=1.0 if arguments.temperature is None else arguments.temperature,
        )  # fmt: skip
    else:
        written = write_on(
            merged, prompts, count, steps=arguments.steps, temperature=arguments.temperature,
            seed=arguments.seed,
        )  # fmt: skip
    return _told(torch.cat((prompts, written), dim=1), arguments, terminal)


def _told(tokens: "Tensor", arguments: Arguments, terminal: Terminal) -> dict[str, Any]:
    texts = [bytes(row).decode("utf-8", errors="replace") for row in tokens.tolist()]
    for text in texts:
        terminal.say(text)
    return {"texts": texts, "count": arguments.count, "seed": arguments.seed}
