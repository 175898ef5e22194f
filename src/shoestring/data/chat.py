"""Conversations as tokens, and which of the tokens are answers.

The tokenizer's own chat template writes the conversation. Where the template marks its answers
({% generation %}), those marks are used. Otherwise an answer begins where the template's prompt
for an answer ends, and reaches to what the template writes after it (its end of turn), which the
model has to learn too. A template with which this cannot be found is an error, not a guess.
"""

import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from ..errors import DataError
from .documents import Document, Message

_MARKS_ANSWERS = re.compile(r"\{%-?\s*generation\s*-?%\}")

# For tokenizers that are trained here: every turn ends with the end-of-text token, so that
# `generate` stops where an answer stops.
TURN = "<|turn|>"
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '" + TURN + "' + message['role'] + '\\n' }}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + eos_token }}{% endgeneration %}"
    "{% else %}{{ message['content'] + eos_token }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '" + TURN + "assistant\\n' }}{% endif %}"
)


def require_template(tokenizer: Any, where: str) -> None:
    """DataError when conversations are to be encoded without a chat template."""
    if not getattr(tokenizer, "chat_template", None):
        raise DataError(
            f"{where} is a conversation and the tokenizer has no chat template",
            expected="a tokenizer with a chat template",
            hint="Use the tokenizer of an instruction-tuned model, or set its chat_template.",
        )
    if not tokenizer.is_fast:
        raise DataError(
            f"{where} is a conversation and the tokenizer cannot say where its tokens begin",
            expected="a fast tokenizer (tokenizer.json)",
            hint="Convert it, or use another tokenizer.",
        )


def encode_chat(document: Document, tokenizer: Any) -> tuple[np.ndarray, np.ndarray]:
    """(ids (N,) int64, is_answer (N,) bool) of one conversation. DataError names the document."""
    require_template(tokenizer, document.name)
    messages = list(document.messages or ())
    template = tokenizer.chat_template
    if isinstance(template, str) and _MARKS_ANSWERS.search(template):
        ids, answers = _by_marks(messages, tokenizer, document.name)
    else:
        ids, answers = _by_offsets(messages, tokenizer, document.name)
    if not answers.any():
        raise DataError(
            f"{document.name}: no token of the conversation belongs to an answer",
            expected="at least one answer that is not empty",
            hint="Remove the row, or check the chat template.",
        )
    return ids, answers


def _by_marks(
    messages: Sequence[Message], tokenizer: Any, where: str
) -> tuple[np.ndarray, np.ndarray]:
    encoded = _apply(
        messages, tokenizer, where, tokenize=True, return_dict=True,
        return_assistant_tokens_mask=True,
    )  # fmt: skip
    ids = np.asarray(encoded["input_ids"], dtype=np.int64)
    return ids, np.asarray(encoded["assistant_masks"], dtype=bool)


def _by_offsets(
    messages: Sequence[Message], tokenizer: Any, where: str
) -> tuple[np.ndarray, np.ndarray]:
    text = _apply(messages, tokenizer, where, tokenize=False)
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    begins, ends = np.asarray(encoded["offset_mapping"], dtype=np.int64).reshape(-1, 2).T
    answers = np.zeros(len(begins), dtype=bool)
    for start, stop in answer_spans(messages, tokenizer, text, where):
        answers |= (begins >= start) & (begins < stop) & (ends > begins)
    return np.asarray(encoded["input_ids"], dtype=np.int64), answers


def answer_spans(
    messages: Sequence[Message], tokenizer: Any, text: str, where: str
) -> list[tuple[int, int]]:
    """Character ranges of the answers in `text`, the rendered conversation."""
    spans = []
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        content = message.get("content") or ""
        plain = _apply(messages[:i], tokenizer, where, tokenize=False) if i else ""
        prompt = (
            _apply(messages[:i], tokenizer, where, tokenize=False, add_generation_prompt=True)
            if i
            else ""
        )
        start = len(prompt)
        if prompt == plain:  # the template writes no prompt: the answer's text itself begins it
            start = text.find(content.strip(), len(plain))
        stop = _stop(_apply(messages[: i + 1], tokenizer, where, tokenize=False),
                     text, content.strip(), start)  # fmt: skip
        if not text.startswith(prompt) or start < 0 or stop <= start:
            raise DataError(
                f"{where}: message {i + 1} cannot be found in what the chat template writes",
                expected="a template that does not rewrite earlier turns",
                hint="Mark the answers in the template with {% generation %}.",
            )
        spans.append((start, stop))
    return spans


def _stop(through: str, text: str, content: str, start: int) -> int:
    """Where the answer ends in `text`; `through` is the conversation up to and with it."""
    if text.startswith(through):
        return len(through)
    # Some templates write an answer differently once it is not the last one (they drop its
    # thinking): then the end is its text and the same end of turn.
    after = through[through.rfind(content) + len(content) :]
    end = text.find(content, max(start, 0))
    if end < 0 or not text.startswith(after, end + len(content)):
        return -1
    return end + len(content) + len(after)


def _apply(messages: Sequence[Message], tokenizer: Any, where: str, **options: Any) -> Any:
    try:
        return tokenizer.apply_chat_template(list(messages), **options)
    # A template is a program that its author wrote: it may raise anything.
    except Exception as error:
        raise DataError(
            f"{where}: the chat template refuses the conversation ({error})",
            expected="turns in the order the template allows",
            hint="Most templates want user and assistant by turns, the system message first.",
        ) from error
