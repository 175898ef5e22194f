"""Conversations: only answers are learned, whatever the template."""

import pytest

from data.conftest import conversation
from shoestring.data import Document
from shoestring.data.chat import CHAT_TEMPLATE, encode_chat
from shoestring.errors import DataError

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
# As Llama-2 writes: no prompt for the answer.
NO_PROMPT = (
    "{% for m in messages %}{% if m.role == 'user' %}{{ '[INST] ' + m.content + ' [/INST]' }}"
    "{% else %}{{ ' ' + m.content + '</s>' }}{% endif %}{% endfor %}"
)
# As Qwen3 writes: thinking only in the last answer.
FORGETS = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' }}"
    "{% if m.role == 'assistant' and loop.last %}{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}"
    "{{ m.content + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
STRICT = (
    "{% for m in messages %}{% if m.role == 'system' %}"
    "{{ raise_exception('no system message') }}{% endif %}{{ m.content }}{% endfor %}"
)
REWRITES = "{% for m in messages %}{{ messages|length ~ m.content }}{% endfor %}"


def answers(tokenizer, template, messages=None):
    """(the whole conversation as decoded, its answers as decoded, one string a run)."""
    tokenizer.chat_template = template
    ids, is_answer = encode_chat(
        Document("rows.jsonl, line 1", messages=tuple(messages or conversation(1))), tokenizer
    )
    runs, before = [], False
    for token, answer in zip(ids.tolist(), is_answer, strict=True):
        if answer and not before:
            runs.append([])
        if answer:
            runs[-1].append(token)
        before = answer
    return tokenizer.decode(ids.tolist()), [tokenizer.decode(run) for run in runs]


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (CHAT_TEMPLATE, ["It is 2.<|endoftext|>", "Gladly.<|endoftext|>"]),
        (CHATML, ["It is 2.<|im_end|>\n", "Gladly.<|im_end|>\n"]),
        (NO_PROMPT, ["It is 2.</s>", "Gladly.</s>"]),
        (FORGETS, ["It is 2.<|im_end|>\n", "<think>\n\n</think>\n\nGladly.<|im_end|>\n"]),
    ],
    ids=["marks", "chatml", "no prompt", "forgets"],
)
def test_answers_with_their_end_of_turn_are_learned_and_nothing_else(tokenizer, template, expected):
    whole, found = answers(tokenizer, template)
    assert found == expected
    assert whole == tokenizer.apply_chat_template(conversation(1), tokenize=False)


def test_equal_answers_are_each_found_in_their_place(tokenizer):
    same = [{"role": "user", "content": "Yes."}, {"role": "assistant", "content": "Yes."}] * 3
    for template in (CHAT_TEMPLATE, CHATML, NO_PROMPT, FORGETS):
        whole, found = answers(tokenizer, template, same)
        assert len(found) == 3
        assert all("Yes." in answer for answer in found)
        assert whole.count("Yes.") == 6


def test_conversation_without_a_template(tokenizer):
    with pytest.raises(DataError, match=r"rows\.jsonl, line 1 is a conversation") as caught:
        answers(tokenizer, None)
    assert "has no chat template" in str(caught.value)
    assert "instruction-tuned" in str(caught.value)
    assert caught.value.exit_code == 2


def test_conversation_with_a_slow_tokenizer():
    class Slow:
        chat_template = CHATML
        is_fast = False

    with pytest.raises(DataError, match="cannot say where its tokens begin"):
        encode_chat(Document("x", messages=tuple(conversation(1))), Slow())


def test_template_that_refuses_names_the_row_and_the_reason(tokenizer):
    messages = [{"role": "system", "content": "Be short."}, *conversation(1)]
    with pytest.raises(DataError, match=r"line 1: the chat template refuses .*no system message"):
        answers(tokenizer, STRICT, messages)


def test_template_that_rewrites_earlier_turns(tokenizer):
    with pytest.raises(DataError, match=r"line 1: message 2 cannot be found .*generation"):
        answers(tokenizer, REWRITES)


def test_empty_answers_only(tokenizer):
    messages = [{"role": "user", "content": "x"}, {"role": "assistant", "content": ""}]
    bare = "{% for m in messages %}{{ m.content }}{% endfor %}{% generation %}{% endgeneration %}"
    with pytest.raises(DataError, match="no token of the conversation belongs to an answer"):
        answers(tokenizer, bare, messages)
