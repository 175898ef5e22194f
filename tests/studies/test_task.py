"""Chains of assignments, the model that follows them, and what is measured through a cache."""

import pytest
import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from shoestring.studies.compressed_context import measure, task


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def test_answers_follow_the_chain_that_the_pairs_say():
    ids, labels, context = task.texts(generator(), 3, 20, 6)
    for row, wanted in zip(ids.tolist(), labels.tolist(), strict=True):
        links = {row[i]: row[i + 1] for i in range(0, context, 3)}
        assert len(links) == context // 3  # no key is written twice
        assert row[2:context:3] == [task.END] * len(links)
        at = context
        for index in range(6):
            hops = task.HOPS[index % 3]
            assert row[at] == task.ASK[hops]
            symbol = row[at + 1]
            for step in range(hops):
                symbol = links[symbol]
                assert row[at + 2 + step] == symbol
            assert wanted[at + 2 : at + 3 + hops] == [*row[at + 2 : at + 2 + hops], task.END]
            at += 3 + hops
        assert at == len(row)
    assert (labels[:, :context] == -100).all()


def test_texts_and_weights_depend_on_their_seed_alone():
    assert torch.equal(task.texts(generator(), 2, 10, 3)[0], task.texts(generator(), 2, 10, 3)[0])
    assert not torch.equal(
        task.texts(generator(), 2, 10, 3)[0], task.texts(generator(1), 2, 10, 3)[0]
    )
    lesson = task.Lesson(hidden=32, heads=2, width=16)
    state = torch.get_rng_state()
    one, two = task.untrained(lesson), task.untrained(lesson)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
    assert torch.equal(torch.get_rng_state(), state)


def test_training_lowers_what_it_is_trained_on():
    lesson = task.Lesson(
        pairs=(5,), rows=8, questions=4, steps=60, steady=20, hidden=32, heads=2, width=16,
        rate=3e-3,
    )  # fmt: skip
    model, stages = task.train(lesson)
    ids, labels, _ = task.texts(generator(5), 8, 5, 4)

    def loss(each):
        with torch.no_grad():
            return float(torch.nn.functional.cross_entropy(
                each(ids).logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
            ))  # fmt: skip

    assert loss(model) < 0.9 * loss(task.untrained(lesson))
    assert stages[0]["steps"] == 60
    assert not model.training


class Follower(torch.nn.Module):
    """A model that answers from the pairs it has read, but forgets what it is told to."""

    def __init__(self, wrong_after):
        super().__init__()
        self.read, self.wrong_after = [], wrong_after

    def forward(self, ids, past_key_values=None):
        self.read.append(ids)
        logits = torch.zeros(*ids.shape, 260)
        text = torch.cat(self.read, 1)
        for row, line in enumerate(text.tolist()):
            links = {line[i]: line[i + 1] for i in range(0, 60, 3) if i + 1 < len(line)}
            asked = max(i for i, x in enumerate(line) if x >= 257) if max(line) > 256 else None
            if asked is not None and len(line) > asked + 1:
                wrong = len(line) - asked - 1 > self.wrong_after
                logits[row, -1, 0 if wrong else links.get(line[-1], 0)] = 1.0
        return type("Out", (), {"logits": logits})


def test_questions_are_answered_greedily_and_the_last_symbol_counts():
    given = measure.chains(4, 20, 2, seed=1)
    right = measure.follow(Follower(9), given, None, lambda _: 480.0, chunk=7)
    assert {key: right[key] for key in ("hops_1", "hops_2", "hops_4")} == {
        "hops_1": 1.0, "hops_2": 1.0, "hops_4": 1.0,
    }  # fmt: skip
    assert right["bytes_per_token"] == 480.0 / 4 / 60
    falls = measure.follow(Follower(3), given, None, lambda _: 1.0, chunk=7)
    assert falls["hops_2"] == 1.0
    assert falls["hops_4"] < 0.5


def test_a_chunk_ends_where_the_text_does():
    assert measure.chunks(70, 100, 32) == [(0, 32), (32, 64), (64, 70), (70, 100)]
    assert measure.chunks(64, 64, 32) == [(0, 32), (32, 64)]


class Letters:
    """A tokenizer with a token for each character."""

    def __call__(self, text, add_special_tokens=True):
        return type("Encoded", (), {"input_ids": [ord(c) % 128 for c in text]})


VOCABULARY = " ".join(f"{a}{b}rest" for a in "bcdfghjklm" for b in "aeiou")


def test_english_knows_where_its_answers_are():
    text, after = torch.arange(10), torch.arange(20, 30)
    given = measure.english(Letters(), text, after, VOCABULARY, seed=3)
    ids = given.ids[0].tolist()
    whole = "".join(chr(i) for i in ids)
    assert ids[:10] == text.tolist()
    assert given.length == 10
    assert whole[given.questions :].startswith("\nThe secret number of")
    assert min(min(places) for places in given.needles) > given.questions
    for places in given.needles:
        number = "".join(chr(ids[i]) for i in places).strip()
        assert whole.count(f"is {number}.") == 2  # the fact, and the question
    copied = "".join(chr(ids[i]) for i in given.words)
    assert whole.count(copied) == 2
    again = measure.english(Letters(), text, after, VOCABULARY, seed=3)
    assert torch.equal(again.ids, given.ids)


@pytest.fixture
def model():
    torch.manual_seed(1)
    return LlamaForCausalLM(LlamaConfig(
        hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, vocab_size=128, bos_token_id=None, eos_token_id=None,
        pad_token_id=None,
    )).eval()  # fmt: skip


def test_reading_in_chunks_is_reading_at_once(model):
    given = measure.english(
        Letters(), torch.arange(40), torch.arange(20, 30), VOCABULARY, seed=3
    )  # fmt: skip
    cache = DynamicCache(config=model.config)
    found = measure.read(model, given, cache, lambda c: 7.0 * c.get_seq_length(), 16)
    with torch.no_grad():
        whole = model(given.ids).logits[0].log_softmax(-1)
    assert torch.allclose(found.said, whole[:40], atol=1e-4)
    assert found.bytes_per_token == 7.0  # taken when the text ended, not later
    hits = [
        all(int(whole[i - 1].argmax()) == int(given.ids[0, i]) for i in places)
        for places in given.needles
    ]
    assert found.needles == sum(hits) / len(hits)
    judged = measure.compared(whole[:40], found.said, given.ids)
    assert judged["kl"] < 1e-6
    assert judged["top1"] == 1.0
    picked = whole[:39].gather(-1, given.ids[0, 1:40, None])
    assert judged["perplexity"] == pytest.approx(float((-picked.mean()).exp()), rel=1e-3)


def test_kl_is_of_the_plain_cache_against_the_other():
    wanted = torch.tensor([[0.5, 0.5], [0.9, 0.1]]).log()
    found = torch.tensor([[0.25, 0.75], [0.9, 0.1]]).log()
    judged = measure.compared(wanted, found, torch.tensor([[0, 1]]))
    by_hand = (0.5 * torch.tensor(2.0).log() + 0.5 * torch.tensor(2 / 3).log()) / 2
    assert judged["kl"] == pytest.approx(float(by_hand), rel=1e-5)
