"""`shoestring sample RUN`: pictures or texts that a merged model draws.

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
    from ..training.blockwise.merging import Merged


@dataclass(frozen=True, kw_only=True)
class Arguments(Common):
    """Draw pictures or texts from a model whose blocks were merged."""

    model: Annotated[Positional[str], arg(metavar="RUN")]
    """A run directory whose blocks were merged, or the merged model's own directory."""
    count: int = 16
    """How many images or texts."""
    steps: int | None = None
    """Calls of a block for each; None = one more than there are blocks for images, 64 for texts."""
    labels: tuple[int, ...] = ()
    """Images: classes to draw, in turn; none = no class is asked for."""
    guidance: float = 1.0
    """Images: how much the classes are insisted on; 1 = as trained."""
    temperature: float = 1.0
    """Texts: lower = more likely bytes only."""
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
    _check_fits(arguments, merged.model.config.size > 0)
    drawn = _pictures if merged.model.config.size else _texts
    terminal.emit(drawn(arguments, merged, terminal))
    return 0


def _check_fits(arguments: Arguments, has_images: bool) -> None:
    """ConfigError for flags of the other kind of model, which would have no effect."""
    strange = ("temperature",) if has_images else ("labels", "guidance", "to")
    for name in strange:
        if getattr(arguments, name) != getattr(Arguments(model=""), name):
            raise ConfigError(
                f"--{name} is given, and {arguments.model} draws "
                f"{'images' if has_images else 'texts'}",
                expected=f"it for {'texts' if has_images else 'images'} only",
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
        temperature=arguments.temperature, seed=arguments.seed,
    )  # fmt: skip
    texts = [bytes(row).decode("utf-8", errors="replace") for row in tokens.tolist()]
    for text in texts:
        terminal.say(text)
    return {"texts": texts, "count": arguments.count, "seed": arguments.seed}
