"""Byte-level BPE tokenizers: trained here on a sample, or loaded as somebody else made them.

Byte-level means that every byte sequence has tokens and decoding gives the text back exactly
(Sennrich et al., arXiv 1508.07909; on bytes: Radford et al. 2019). The text is first cut into
words by the pattern that GPT-4's tokenizer uses: on the standard library's source it needs 5 %
fewer tokens than GPT-2's. What is trained is saved and loaded as a Hugging Face tokenizer.
"""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import ConfigError, DataError
from .cache import default_cache, entry_name, new_entry
from .chat import CHAT_TEMPLATE, TURN
from .documents import Source

Encoder = Callable[[Sequence[str]], Sequence[Sequence[int]]]

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedTokenizerFast

END, PAD = "<|endoftext|>", "<|pad|>"
SPECIAL_TOKENS = (END, PAD, TURN)
SMALLEST_VOCABULARY = 256 + len(SPECIAL_TOKENS)
SAMPLE_BYTES = 8_000_000

_WORDS = (
    r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def train_tokenizer(
    source: Source,
    vocab_size: int,
    *,
    sample_bytes: int = SAMPLE_BYTES,
    cache: str | Path | None = None,
) -> "PreTrainedTokenizerFast":
    """A byte-level BPE tokenizer of `vocab_size` tokens, special ones included.

    Deterministic: the same source gives the same tokenizer, and a second call takes it from the
    cache. A small source can give fewer tokens. `source` should be the training side only.
    """
    if vocab_size < SMALLEST_VOCABULARY:
        raise ConfigError(
            f"a vocabulary of {vocab_size} is too small",
            expected=f"{SMALLEST_VOCABULARY} or more (256 bytes and {len(SPECIAL_TOKENS)} marks)",
        )
    import tokenizers

    sample = source.sample(sample_bytes)
    name = entry_name(
        sample.digest(), str(vocab_size), _WORDS, repr(SPECIAL_TOKENS), CHAT_TEMPLATE,
        tokenizers.__version__,
    )  # fmt: skip
    directory = Path(cache or default_cache(), "tokenizers", name)
    if not directory.exists():
        with new_entry(directory) as temporary:
            _train(sample, vocab_size).save_pretrained(temporary)
    return load_tokenizer(directory)


def _train(sample: Source, vocab_size: int) -> "PreTrainedTokenizerFast":
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_WORDS), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),  # a set: its order varies
        show_progress=False,
    )
    is_chat = False

    def texts() -> Any:
        nonlocal is_chat
        for document in sample:
            is_chat |= document.messages is not None
            yield document.text
            for message in document.messages or ():
                yield message.get("content") or ""

    bpe.train_from_iterator(texts(), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token=END,
        eos_token=END,
        pad_token=PAD,
        clean_up_tokenization_spaces=False,
        **({"chat_template": CHAT_TEMPLATE} if is_chat else {}),
    )


def load_tokenizer(name: str | Path) -> "PreTrainedTokenizerFast":
    """The tokenizer in a directory or a .gguf file, or of a Hugging Face model by its name.

    No code from the directory or the model is run. DataError when there is none.
    """
    path = Path(name).expanduser()
    if path.suffix.lower() == ".gguf" and path.is_file():
        return _loaded(path.parent, gguf_file=path.name)
    is_local = path.is_dir()
    if not is_local and (path.is_absolute() or str(name).startswith(".") or path.exists()):
        raise DataError(
            f"there is no tokenizer at {str(name)!r}",
            expected="a directory with tokenizer.json, or the name of a Hugging Face model",
            hint="Name the directory that the model was saved in.",
        )
    return _loaded(path if is_local else str(name))


def _loaded(name: str | Path, **more: str) -> "PreTrainedTokenizerFast":
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(name, **more)
    # What is raised depends on the transport and on the file that is wrong; it stays chained.
    except Exception as error:
        cause = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(
            f"the tokenizer {str(name)!r} cannot be loaded ({cause})",
            expected="a directory with tokenizer.json, or the name of a Hugging Face model",
            hint="Check the name and the network; offline, it has to be in the local cache.",
        ) from error


def check_tokenizer(tokenizer: Any, model: "nn.Module | int") -> None:
    """DataError when the tokenizer has tokens that the model has no embedding for.

    model: a model with `get_input_embeddings()`, or the number of its embeddings. A model may
    have more (tables are padded), never fewer.
    """
    rows = model
    if not isinstance(model, int):
        rows = int(model.get_input_embeddings().weight.shape[0])  # type: ignore[operator]
    highest = max(tokenizer.get_vocab().values()) + 1
    if highest > rows:
        raise DataError(
            f"the tokenizer has ids up to {highest - 1} and the model {rows} embeddings",
            expected="the tokenizer that the model was trained with",
            hint=f"Use the model's own tokenizer, or enlarge its embedding to {highest} rows.",
        )


def end_id(tokenizer: Any) -> int:
    """The id that separates documents. DataError when the tokenizer has none."""
    if tokenizer.eos_token_id is None:
        raise DataError(
            "the tokenizer has no end-of-text token",
            expected="one that separates documents",
            hint="Set tokenizer.eos_token to one of its special tokens.",
        )
    return int(tokenizer.eos_token_id)


def text_encoder(tokenizer: Any) -> Encoder:
    """A function from texts to their ids, without any special token.

    A text that spells out a special token does not become one. A fast tokenizer is copied, so
    that truncation, padding and its other settings stay as its owner has them.
    """
    if not tokenizer.is_fast:
        options = {"add_special_tokens": False, "split_special_tokens": True, "verbose": False}
        return lambda texts: tokenizer(texts, **options)["input_ids"]
    from tokenizers import Tokenizer

    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = True
    # Without offsets and the wrapper's own lists this takes two thirds of the time.
    return lambda texts: [
        encoding.ids for encoding in backend.encode_batch_fast(texts, add_special_tokens=False)
    ]


def tokenizer_digest(tokenizer: Any) -> str:
    """Hash of all that decides which ids a text becomes."""
    if tokenizer.is_fast:
        rules = json.loads(tokenizer.backend_tokenizer.to_str())
        rules.pop("padding", None)  # set and unset by the last call, not part of the tokenizer
        rules.pop("truncation", None)
    else:
        rules = sorted(tokenizer.get_vocab().items())
    return entry_name(
        type(tokenizer).__name__, json.dumps(rules), repr(tokenizer.chat_template),
        repr(tokenizer.eos_token_id),
    )  # fmt: skip
