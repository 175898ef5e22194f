"""Models from disk: what a run saved, or any Hugging Face directory or name.

A manifest is verified before anything is read from the files it names. Which rule a model was
trained with is in its config, and is put back in place.
"""

import json
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from ..checkpoint import MANIFEST, newest_complete, verify
from ..checkpoint.manifest import sha256
from ..data import load_tokenizer
from ..data.cache import entry_name
from ..errors import CheckpointError, ConfigError
from ..methods.reversible import reversible
from ..models.gguf import gguf_config, is_gguf, load_gguf
from ..models.gpt import GPT, GPTConfig
from .save import no_progress_bar

_WEIGHTS, _INDEX = "model.safetensors", "model.safetensors.index.json"
_PICKLES = (".bin", ".pt", ".pth", ".pkl", ".ckpt")
_LARGEST_INDEX = 64 << 20


def load(run_or_model_dir: str | Path) -> tuple[PreTrainedModel, Any]:
    """(model, tokenizer) of a run directory, a model directory or a .gguf file; tokenizer None
    without one.

    CheckpointError when a file does not match the manifest or nothing is there.
    """
    if is_gguf(run_or_model_dir):
        return load_model(run_or_model_dir), load_tokenizer(run_or_model_dir)
    directory = model_directory(Path(run_or_model_dir))
    verify(directory)
    if (directory / "model.json").is_file() and not (directory / "config.json").is_file():
        raise ConfigError(
            f"{directory} is a model of merged blocks", expected="a language model",
            hint="shoestring sample draws from it.",
        )  # fmt: skip
    model = load_model(directory)
    if not any((directory / name).exists() for name in ("tokenizer.json", "tokenizer_config.json")):
        return model, None
    from transformers import AutoTokenizer

    return model, AutoTokenizer.from_pretrained(directory, trust_remote_code=False)


def model_directory(path: Path) -> Path:
    """Where the model is: `path` itself, or `model` below a run directory."""
    if not path.is_file():
        for candidate in (newest_complete(path / "model"), newest_complete(path)):
            if (candidate / "config.json").is_file() or (candidate / MANIFEST).is_file():
                _refuse_pickles(candidate)
                return candidate
    _refuse_pickles(path)
    raise CheckpointError(
        f"there is no model in {path}" if path.exists() else f"{path} does not exist",
        expected="a run directory with model/, or a directory with config.json",
        hint="A run writes its model when it ends.",
    )


def _refuse_pickles(path: Path) -> None:
    """A pickle runs whatever code its writer put in, so none is ever opened."""
    if path.is_file():
        with path.open("rb") as opened:
            start = opened.read(4)
        if start[:2] == b"PK" or start[:1] == b"\x80" or path.suffix in _PICKLES:
            raise _pickled(path)
        raise CheckpointError(f"{path} is a file", expected="a run or model directory")
    if not path.is_dir():
        return
    if (path / _WEIGHTS).is_file():
        return  # these are read, whatever lies beside them
    if (path / _INDEX).is_file():
        _check_index(path / _INDEX)
        return
    for file in sorted(path.iterdir()):
        if file.suffix in _PICKLES and file.is_file():
            raise _pickled(file)


def _check_index(path: Path) -> None:
    """transformers opens what an index names by how the name ends, a pickle too."""
    try:
        if path.stat().st_size > _LARGEST_INDEX:
            raise ValueError(f"it has {path.stat().st_size} bytes")
        names = set(json.loads(path.read_text(encoding="utf-8"))["weight_map"].values())
    except (OSError, ValueError, RecursionError, LookupError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{path} cannot be read: {error}", expected="an index of safetensors files"
        ) from error
    for name in names:
        if not isinstance(name, str) or not name.endswith(".safetensors"):
            raise _pickled(path.parent / str(name))


def _pickled(file: Path) -> CheckpointError:
    return CheckpointError(
        f"{file} is a pickle, which is never opened here: it could run any code",
        expected="a directory with safetensors files",
        hint="Where you trust it, load it with torch and save it with save_pretrained.",
    )


def load_model(name: str | Path, *, from_scratch: bool = False) -> PreTrainedModel:
    """A causal language model in float32 from a directory, a .gguf file or a hub name.

    from_scratch: its config with random weights. ConfigError when it cannot be had.
    """
    if is_gguf(name):
        with no_progress_bar():
            return load_gguf(name, from_scratch=from_scratch)
    config = load_config(name)
    if not from_scratch:
        _refuse_pickles(Path(name))  # of a local one; a name on the hub is no directory here
        weights = getattr(config, "transformers_weights", None)
        if weights is not None and not str(weights).endswith(".safetensors"):
            raise _pickled(Path(name) / str(weights))  # a config may name its own file
    return _build(config, name, from_scratch=from_scratch)


def load_config(name: str | Path) -> Any:
    """The config of a model directory, a .gguf file or a hub name; ConfigError when it cannot be
    had."""
    if is_gguf(name):
        return gguf_config(name)
    try:
        # Without the flag transformers asks on the terminal whether to run a model's own code.
        return AutoConfig.from_pretrained(name, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"no model can be had from {str(name)!r}: {str(error).splitlines()[0]}",
            expected="a model directory, or a model's name on the hub that can be reached",
        ) from error


def weights_digest(name: str | Path, config: Any) -> str:
    """Hash of the weight files of a model directory, or of a .gguf file; "none" without any.

    Also "none" for a hub name, whose files need not be here yet, and whose latest commit need not
    have touched them.
    """
    directory = Path(name).expanduser()
    if directory.is_file():
        return entry_name(sha256(directory))
    whole = directory / (getattr(config, "transformers_weights", None) or _WEIGHTS)
    files = [whole] if whole.is_file() else sorted(directory.glob("model-*.safetensors"))
    return entry_name(*map(sha256, files)) if files else "none"


def _build(config: Any, name: str | Path, *, from_scratch: bool) -> PreTrainedModel:
    kind = GPT if isinstance(config, GPTConfig) else AutoModelForCausalLM
    info = getattr(config, "shoestring", None)
    if from_scratch:
        config.dtype = torch.float32
        model = GPT(config) if kind is GPT else _from_config(config)
    else:
        with no_progress_bar():
            model = _from_safetensors(kind, name, config)
    if info and kind is not GPT:
        remember(model, info)
    return model


def _from_config(config: Any) -> Any:
    return AutoModelForCausalLM.from_config(config, trust_remote_code=False)


def _from_safetensors(kind: Any, name: str | Path, config: Any) -> Any:
    try:
        return kind.from_pretrained(
            name, config=config, dtype="float32", use_safetensors=True, trust_remote_code=False
        )
    except OSError as error:
        if isinstance(error, CheckpointError) or "safetensors" not in str(error):
            raise
        raise CheckpointError(
            f"{name} has no safetensors weights; a pickle is refused, as it could run any code",
            expected=f"{_WEIGHTS} or {_INDEX}",
            hint="Where you trust it, load it with torch and save it with save_pretrained.",
        ) from error


def remember(model: PreTrainedModel, info: dict[str, Any]) -> None:
    """Make a loaded model's stack reversible as its config says it was."""
    scale_bits: Any = "auto" if info.get("auto") else info["scale_bits"]
    reversible(model, rule=info["rule"], streams=info["streams"], scale_bits=scale_bits)
    # The runners read the same dict. Branches follow the dtype the model had when it was made
    # reversible, which is not the one it is loaded in.
    for setting in ("scale_bits", "branches", "tuple"):
        model.config.shoestring[setting] = info.get(setting, model.config.shoestring[setting])
