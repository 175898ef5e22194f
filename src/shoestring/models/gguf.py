"""Models from a GGUF file, as llama.cpp and its kin keep them: to be trained, in float32.

transformers reads the file and undoes its quantisation; what comes out is the plain model, and
forgets that it was quantised, so that it can be trained and saved as any other. A GGUF file holds
numbers and strings, no code.
"""

from pathlib import Path
from typing import Any

import torch

from ..errors import CheckpointError, ConfigError

SUFFIX = ".gguf"
_MAGIC = b"GGUF"


def is_gguf(path: str | Path) -> bool:
    """Whether a path names such a file by its suffix."""
    return Path(path).suffix.lower() == SUFFIX


def load_gguf(path: str | Path, *, from_scratch: bool = False) -> Any:
    """A causal language model in float32 from a GGUF file.

    from_scratch: its shape with random weights; no weights are read. ConfigError where there is
    no file or the gguf package is missing; CheckpointError for a file that cannot be read.
    """
    from transformers import AutoModelForCausalLM

    if from_scratch:
        config = gguf_config(path)
        config.dtype = torch.float32
        return AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    file = checked(path)
    try:
        model = AutoModelForCausalLM.from_pretrained(
            file.parent, gguf_file=file.name, dtype=torch.float32, trust_remote_code=False
        )
    # What is raised depends on which part of the file is wrong; it stays chained.
    except Exception as error:
        raise unreadable(file, error) from error
    _forget_quantisation(model)
    return model


def gguf_config(path: str | Path) -> Any:
    """The config of a GGUF file. Raises what `load_gguf` raises."""
    from transformers import AutoConfig

    file = checked(path)
    try:
        return AutoConfig.from_pretrained(file.parent, gguf_file=file.name, trust_remote_code=False)
    except Exception as error:
        raise unreadable(file, error) from error


def _forget_quantisation(model: Any) -> None:
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    for name in ("is_quantized", "quantization_method", "hf_quantizer"):
        vars(model).pop(name, None)


def checked(path: str | Path) -> Path:
    """The file, when it is there and begins as one. ConfigError and CheckpointError if not."""
    file = Path(path).expanduser()
    if not file.is_file():
        raise ConfigError(f"there is no file {file}", expected="a model in a .gguf file")
    with file.open("rb") as opened:
        start = opened.read(len(_MAGIC))
    if start != _MAGIC:
        raise CheckpointError(
            f"{file} does not begin as a GGUF file does ({start!r})", expected=repr(_MAGIC)
        )
    try:
        import gguf  # noqa: F401
    except ImportError:
        raise ConfigError(
            f"{file} cannot be read without the gguf package",
            expected="gguf",
            hint="pip install gguf",
        ) from None
    return file


def unreadable(file: Path, error: Exception) -> CheckpointError:
    """What to say of a file that begins well and then does not hold what it should."""
    cause = str(error).splitlines()[0] if str(error) else type(error).__name__
    return CheckpointError(
        f"{file} cannot be read as a causal language model: {cause}",
        expected="a whole GGUF file of an architecture that transformers knows",
    )
