"""The shape of a diffusion transformer in blocks; see `models/dit.py`."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from ..errors import ConfigError


@dataclass(frozen=True, kw_only=True, slots=True)
class DiTConfig:
    """Shape of a DiT: images where size is given, tokens where vocabulary is. ConfigError for
    widths that do not divide, and for layers that blocks do not."""

    blocks: int = 1
    layers: int = 12
    width: int = 384
    heads: int = 6
    hidden: int | None = None
    """Width inside the MLP; None = 4 times the width."""
    condition: int = 128
    """Width of the condition."""
    classes: int = 0
    """Classes that can be asked for; 0 = unconditional."""
    answers: int = 0
    """Classes that images have, where the class is what is denoised and the image is only read."""
    size: int = 0
    """Pixels of a side."""
    height: int | None = None
    """Pixels of the other side; None = as many. A signal has a height of 1."""
    channels: int = 1
    patch: int = 4
    """Pixels of a patch's side; its height is at most that of the image."""
    vocabulary: int = 0
    """Tokens, the mask not counted."""
    length: int = 0
    """Tokens of a text."""
    table_width: int | None = None
    """Width of the table's rows; None = the width, or the number of rows where that is less."""
    sequential: bool = False
    """Answers: a block after the first reads the rows of the block before it, not the image."""
    context_rows: int = 0
    """Answers: rows that a frozen encoder makes of an image, which blocks read; 0 = none."""
    context_width: int = 0
    """Width of these rows."""

    def __post_init__(self) -> None:
        self._require(self.blocks >= 1, f"{self.blocks} blocks", "1 or more")
        if self.layers < 1 or self.layers % self.blocks:
            known = [n for n in range(1, self.layers + 1) if self.layers % n == 0]
            below = [n for n in known if n < self.blocks][-1:]
            near = [*below, *[n for n in known if n > self.blocks][:1]]
            raise ConfigError(
                f"{self.layers} layers in {self.blocks} blocks",
                expected="a number of blocks that divides the layers",
                hint=f"The nearest: {' or '.join(map(str, near))}." if near else None,
            )
        self._require(
            self.width % self.heads == 0, f"width {self.width} with {self.heads} heads",
            "a width that the heads divide",
        )  # fmt: skip
        self._require(
            bool(self.size) != bool(self.vocabulary),
            f"images of size {self.size} and a vocabulary of {self.vocabulary}",
            "one of the two",
        )
        if self.size:
            self._require(
                self.size % self.patch == 0 and self.tall % self.patch_height == 0,
                f"images of size {self.size}"
                + ("" if self.height is None else f" and height {self.height}"),
                f"a multiple of the patch, {self.patch}",
            )
            self._require(
                not (self.answers and self.classes),
                f"{self.answers} answers and {self.classes} classes to ask for", "one of the two",
            )  # fmt: skip
        self._require(
            bool(self.answers) or not (self.sequential or self.context_rows),
            "rows of another network without answers", "a classifier",
        )  # fmt: skip
        if not self.size:
            self._require(self.length >= 1, f"texts of {self.length} tokens", "1 or more")
            self._require(
                self.width // self.heads % 2 == 0, f"heads of width {self.width // self.heads}",
                "an even width, which rotary positions pair",
            )  # fmt: skip

    def _require(self, is_fine: bool, what: str, expected: str) -> None:
        if not is_fine:
            raise ConfigError(what, expected=expected)

    @property
    def tall(self) -> int:
        """Pixels of an image's height."""
        return self.size if self.height is None else self.height

    @property
    def patch_height(self) -> int:
        """Pixels of a patch's height."""
        return max(1, min(self.patch, self.tall))

    @property
    def positions(self) -> int:
        """T: patches of an image, or tokens of a text."""
        if not self.size:
            return self.length
        return (self.tall // self.patch_height) * (self.size // self.patch)

    @property
    def table_rows(self) -> int:
        """V: rows of the table; 0 = there is none."""
        return self.vocabulary or self.answers

    @property
    def row(self) -> int:
        """W: width of the table's rows."""
        return self.table_width or min(self.width, self.table_rows)

    def reads_rows(self, block: int) -> tuple[int, int] | None:
        """Rows and their width that a classifying block reads instead of the image's patches."""
        if self.sequential and block > 1:
            return self.positions + 1, self.width
        return (self.context_rows, self.context_width) if self.context_rows else None

    def to_json(self) -> dict[str, Any]:
        """As plain data. What came later is left out where it is not used."""
        later = ("sequential", "context_rows", "context_width")
        return {k: v for k, v in asdict(self).items() if v or k not in later}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "DiTConfig":
        """The config that `to_json` gave. ConfigError for anything else."""
        try:
            return cls(**data)
        except TypeError as error:
            raise ConfigError(f"a DiT that cannot be read ({error})") from None
