"""chunked_loss on real architectures: the model's own loss, without its logits."""

import copy
import inspect

import pytest
import torch
import transformers
from torch import nn
from torch._subclasses import FakeTensorMode

from shoestring.errors import ConfigError, StackError
from shoestring.meter import Meter
from shoestring.methods.chunked_loss import ChunkedLoss, ChunkedLossConfig

VOCAB = 331
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GPT2_SIZES = {"vocab_size": VOCAB, "n_embd": 32, "n_layer": 2, "n_head": 4, "bos_token_id": 1,
              "eos_token_id": 2, "loss_type": "ForCausalLM"}  # fmt: skip
CONFIGS = {
    "llama": lambda: transformers.LlamaConfig(**SIZES),
    "gemma2_softcap": lambda: transformers.Gemma2Config(**SIZES, final_logit_softcapping=3.0),
    "granite_scaled": lambda: transformers.GraniteConfig(**SIZES, logits_scaling=4.0),
    "cohere_scaled": lambda: transformers.CohereConfig(**SIZES, logit_scale=0.3),
    "mixtral_router_loss": lambda: transformers.MixtralConfig(
        **SIZES, output_router_logits=True, num_local_experts=4
    ),
    "gpt2_dropout": lambda: transformers.GPT2Config(**GPT2_SIZES),
}


def make(name="llama"):
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(CONFIGS[name]())
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(5)  # fresh weights are too flat to tell errors apart
    return model.train()


def batch(rows=3, tokens=40):
    g = torch.Generator().manual_seed(1)
    ids = torch.randint(3, VOCAB, (rows, tokens), generator=g)
    labels = ids.clone()
    labels[:, :7] = -100
    return {"input_ids": ids, "labels": labels}


def step(model, **extra):
    torch.manual_seed(5)
    model.zero_grad()
    output = model(**batch(), **extra)
    output.loss.backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return output, gradients


def applied(model, **settings):
    method = ChunkedLoss()
    return method.apply(model, method.configure({"chunk_rows": 16, **settings}))


def assert_same_within_promise(got, expected):
    assert got.keys() == expected.keys()
    bound = ChunkedLoss.promises.bound_eps * torch.finfo(torch.float32).eps
    for name in got:
        error = (got[name] - expected[name]).norm() / expected[name].norm()
        assert error <= bound, f"{name}: {error:.2e}"


@pytest.mark.parametrize("name", CONFIGS)
def test_gradients_are_the_models_own_and_undo_is_bitwise(name):
    model = make(name)
    plain, expected = step(model)
    undo = applied(model)
    chunked, got = step(model)
    assert chunked.logits is None
    assert "logits" not in chunked
    torch.testing.assert_close(chunked.loss, plain.loss, rtol=1e-6, atol=0)
    assert_same_within_promise(got, expected)
    undo()
    after, again = step(model)
    assert torch.equal(after.loss, plain.loss)
    assert torch.equal(after.logits, plain.logits)
    assert all(torch.equal(again[n], expected[n]) for n in expected)
    assert all("forward" not in vars(m) for m in model.modules())


@pytest.mark.parametrize("items", [57, torch.tensor(57)])
def test_num_items_in_batch_divides_as_in_the_trainer(items):
    model = make()
    plain, expected = step(model, num_items_in_batch=items)
    applied(model)
    chunked, got = step(model, num_items_in_batch=items)
    torch.testing.assert_close(chunked.loss, plain.loss, rtol=1e-6, atol=0)
    assert_same_within_promise(got, expected)


def test_shifted_labels_are_taken_as_given():
    model = make()
    inputs = batch()
    shifted = nn.functional.pad(inputs["labels"], (0, 1), value=-100)[:, 1:].roll(3, dims=1)
    plain = model(**inputs, shift_labels=shifted).loss
    applied(model)
    torch.testing.assert_close(model(**inputs, shift_labels=shifted).loss, plain)


def test_evaluation_gives_the_loss_without_logits():
    model = make("gpt2_dropout").eval()
    with torch.no_grad():
        plain = model(**batch())
        applied(model)
        chunked = model(**batch())
    torch.testing.assert_close(chunked.loss, plain.loss, rtol=1e-6, atol=0)
    assert chunked.logits is None
    assert model(**batch(), return_dict=False)[1] is None


def test_calls_without_labels_are_untouched():
    model = make().eval()
    ids = batch()["input_ids"]
    logits = model(input_ids=ids).logits
    words = model.generate(ids[:1, :5], max_new_tokens=4, do_sample=False)
    applied(model)
    assert torch.equal(model(input_ids=ids).logits, logits)
    assert torch.equal(model.generate(ids[:1, :5], max_new_tokens=4, do_sample=False), words)


def test_names_signature_and_saving_stay(tmp_path):
    model = make()
    keys, signature = list(model.state_dict()), inspect.signature(model.forward)
    applied(model)
    assert list(model.state_dict()) == keys
    assert inspect.signature(model.forward) == signature
    model.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert all(
        torch.equal(a, b) for a, b in zip(loaded.parameters(), model.parameters(), strict=True)
    )


def test_a_deepcopy_is_patched_and_stands_alone():
    model = make()
    applied(model)
    plain, expected = step(model)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    output, got = step(twin)
    assert output.logits is None
    assert torch.equal(output.loss, plain.loss)
    assert all(torch.equal(got[n], expected[n]) for n in expected)


def test_hooks_on_the_model_see_the_loss_once():
    model = make()
    applied(model)
    seen = []
    model.register_forward_hook(lambda module, args, output: seen.append(output.loss.item()))
    output, _ = step(model)
    assert seen == [output.loss.item()]


def test_checking_leaves_random_state_and_training_flags():
    model = make("gpt2_dropout")
    model.transformer.h[0].eval()
    flags = [m.training for m in model.modules()]
    state = torch.get_rng_state()
    applied(model)
    assert [m.training for m in model.modules()] == flags
    assert torch.equal(torch.get_rng_state(), state)


def test_the_peak_holds_one_chunk_of_logits():
    def peak():
        model.zero_grad()
        with Meter(model) as meter:
            model(input_ids=ids, labels=ids).loss.backward()
        return meter

    model = transformers.AutoModelForCausalLM.from_config(
        transformers.LlamaConfig(**{**SIZES, "vocab_size": 4000})
    )
    ids = torch.randint(3, 4000, (4, 64), generator=torch.Generator().manual_seed(0))
    logits_bytes = 4 * 64 * 4000 * 4
    plain = peak()
    applied(model)
    chunked = peak()
    assert plain.instant == "loss backward"
    assert chunked.peak_bytes < plain.peak_bytes - 1.5 * logits_bytes


def test_a_fake_model_is_patched_without_reading_values():
    model = make()
    mode = FakeTensorMode()
    memo = {id(p): nn.Parameter(mode.from_tensor(p.detach())) for p in model.parameters()}
    memo |= {id(b): mode.from_tensor(b) for b in model.buffers()}
    with mode:
        fake = copy.deepcopy(model, memo)
        applied(fake)
        ids = torch.zeros(2, 16, dtype=torch.int64)
        fake(input_ids=ids, labels=ids).loss.backward()
    assert fake.lm_head.weight.grad.shape == (VOCAB, 32)


# ---- adapters ----------------------------------------------------------------------------------


# peft 0.21 reads a property that transformers 5 has renamed.
FROM_PEFT = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")


def with_adapter(**settings):
    peft = pytest.importorskip("peft")
    return peft.get_peft_model(make(), peft.LoraConfig(r=2, init_lora_weights=False, **settings))


@FROM_PEFT
def test_adapters_in_the_body_train_with_a_frozen_head():
    model = with_adapter(target_modules=["q_proj", "down_proj"])
    _, expected = step(model)
    undo = applied(model)
    output, got = step(model)
    assert output.logits is None
    assert_same_within_promise(got, expected)
    undo()
    assert step(model)[0].logits is not None


@FROM_PEFT
@pytest.mark.parametrize(
    "settings", [{"target_modules": ["lm_head"]}, {"modules_to_save": ["lm_head"]}], ids=str
)
def test_an_adapter_on_the_head_is_refused(settings):
    model = with_adapter(**{"target_modules": ["q_proj"], **settings})
    with pytest.raises(StackError, match=r"lm_head.* not a plain linear layer"):
        applied(model)


# ---- what is refused ---------------------------------------------------------------------------


def smoothed(logits, labels, vocab_size, **_):
    return nn.functional.cross_entropy(
        logits.view(-1, vocab_size), labels.view(-1), label_smoothing=0.1
    )


def entropy_added(logits, labels, vocab_size, **_):
    return torch.softmax(logits, -1).mean()


def biased(logits, labels, vocab_size, **_):
    return nn.functional.cross_entropy((logits + 1.0).view(-1, vocab_size), labels.view(-1))


def half_the_vocabulary(logits, labels, vocab_size, **_):
    half = logits[..., : vocab_size // 2]
    return nn.functional.cross_entropy(half.flatten(0, 1), labels.flatten() % (vocab_size // 2))


@pytest.mark.parametrize(
    ("loss", "named"),
    [
        (smoothed, "cross_entropy with label_smoothing"),
        (entropy_added, "softmax"),
        (biased, "a sum with float"),
        (half_the_vocabulary, "leaves the last dimension whole"),
    ],
)
def test_a_loss_that_needs_more_than_cross_entropy_is_named(loss, named):
    model = make()
    model.loss_function = loss
    before, _ = step(model)
    with pytest.raises(StackError, match=named):
        applied(model)
    assert torch.equal(step(model)[0].loss, before.loss)


class Moody(nn.Module):
    """A language model whose loss is another one on every call."""

    def __init__(self):
        super().__init__()
        self.embedding, self.head = nn.Embedding(VOCAB, 8), nn.Linear(8, VOCAB)
        self.calls = 0

    def get_input_embeddings(self):
        return self.embedding

    def get_output_embeddings(self):
        return self.head

    def forward(self, input_ids, labels=None):
        self.calls += 1
        logits = self.head(self.embedding(input_ids)) * float(self.calls)
        loss = nn.functional.cross_entropy(logits.view(-1, VOCAB), labels.view(-1))
        return transformers.modeling_outputs.CausalLMOutput(loss=loss, logits=logits)


def test_a_model_whose_loss_would_change_is_refused_and_left_as_it_was():
    model = Moody()
    with pytest.raises(StackError, match="would change the loss of this model from"):
        applied(model)
    assert all("forward" not in vars(m) for m in model.modules())


def test_models_without_a_head_or_with_one_patched_twice():
    with pytest.raises(StackError, match="Linear names no output head"):
        applied(nn.Linear(2, 2))
    model = make()
    applied(model)
    with pytest.raises(StackError, match="replaced already"):
        applied(model)


def test_a_head_replaced_after_applying_is_noticed():
    model = make()
    applied(model)
    model.set_output_embeddings(nn.Linear(32, VOCAB))
    with pytest.raises(StackError, match="head was replaced after chunked_loss"):
        model(**batch())


def test_undo_out_of_order_is_refused():
    model = make()
    undo = applied(model)
    model.forward = model.forward.original
    with pytest.raises(StackError, match="forward was replaced after chunked_loss"):
        undo()


@pytest.mark.parametrize("settings", [{"chunk_rows": 0}, {"gradients": "never"}], ids=str)
def test_settings_out_of_range(settings):
    with pytest.raises(ConfigError, match="chunked_loss: "):
        ChunkedLossConfig(**settings)
