"""Adapters: what they learn, what they leave, and frozen weights at few bits."""

import copy

import pytest
import torch
from benchmarks.planner.models import llama, llama_batch
from torch import nn

from shoestring.errors import ConfigError, StackError
from shoestring.methods import method
from shoestring.methods.lora import merge
from shoestring.ops.weight_codes import SCALE, encode
from shoestring.planner import planner
from shoestring.planner.ways import allowed

LORA = method("lora")
BATCH = llama_batch(2, 32, 64)
BASES = ["float", "int8", "nf4"]


def model() -> nn.Module:
    torch.manual_seed(0)
    return llama(depth=2, width=64, vocabulary=64).train()


def put(into, **settings):
    return LORA.apply(into, LORA.configure({"rank": 4, **settings}))


def learned(it, steps=20, lr=1e-2):
    optimizer = torch.optim.AdamW([p for p in it.parameters() if p.requires_grad], lr=lr)
    losses = []
    for _ in range(steps):
        loss = it(**BATCH).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses


# peft asks transformers for a name that it is about to lose
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated")
def test_adapters_learn_as_those_that_peft_puts_in_itself():
    from peft import LoraConfig, get_peft_model

    ours, theirs = model(), model()
    put(ours, seed=3)
    with torch.random.fork_rng():
        torch.manual_seed(3)
        config = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear")
        theirs = get_peft_model(theirs, config)
    assert learned(ours) == learned(theirs)
    assert {n for n, p in ours.named_parameters() if p.requires_grad} == {
        n.removeprefix("base_model.model.") for n, p in theirs.named_parameters() if p.requires_grad
    }


@pytest.mark.parametrize("base", BASES)
def test_only_adapters_are_trained_and_they_learn(base):
    it = model()
    put(it, base=base)
    before = {n: p.clone() for n, p in it.named_parameters() if not p.requires_grad}
    losses = learned(it)
    assert losses[-1] < 0.8 * losses[0]
    assert all(torch.equal(p, before[n]) for n, p in it.named_parameters() if n in before)
    assert all(".lora_" in n for n, p in it.named_parameters() if p.requires_grad)


@pytest.mark.parametrize("base", BASES)
def test_what_was_merged_stays_when_they_are_taken_out(base):
    it = model()
    undo = put(it, base=base)
    learned(it)
    it.eval()
    adapted = it(**BATCH).logits
    assert merge(it) == merge(it) == 14
    undo()
    assert [n for n, _ in it.named_parameters()] == [n for n, _ in model().named_parameters()]
    torch.testing.assert_close(it(**BATCH).logits, adapted, rtol=1e-4, atol=1e-4)
    with pytest.raises(StackError, match="no adapters"):
        merge(it)


def test_what_was_not_merged_is_forgotten():
    it = model()
    undo = put(it)
    learned(it)
    undo()
    assert all(
        torch.equal(a, b) for a, b in zip(it.parameters(), model().parameters(), strict=True)
    )
    assert all(p.requires_grad for p in it.parameters())


@pytest.mark.parametrize(("base", "most"), [("int8", 0.01), ("nf4", 0.1)])
def test_a_frozen_weight_is_used_as_it_is_decoded(base, most):
    layer = nn.Linear(96, 64)
    weight = layer.weight.detach().clone()
    codes, scale, form = encode(weight, base)
    decoded = form.decode(codes, scale)
    assert 0 < (decoded - weight).norm() / weight.norm() < most
    it = model()
    put(it, base=base)
    adapted = it.model.layers[0].mlp.up_proj
    reference = nn.functional.linear
    x = torch.randn(3, 64, requires_grad=True)
    y = adapted.base_layer(x)
    layer = adapted.base_layer
    whole = layer.forward.form.decode(layer.weight, getattr(layer, SCALE))
    assert torch.equal(y, reference(x, whole))
    y.square().sum().backward()
    again = x.detach().clone().requires_grad_()
    reference(again, whole).square().sum().backward()
    assert torch.equal(x.grad, again.grad)


@pytest.mark.parametrize("base", BASES)
def test_the_bytes_are_those_of_the_codes(base):
    it = model()
    blocks = sum(p.nbytes for p in it.model.layers.parameters() if p.dim() == 2)
    undo = put(it, base=base)
    kept = sum(p.nbytes for n, p in it.named_parameters() if ".base_layer." in n)
    assert kept == blocks // {"float": 1, "int8": 4, "nf4": 8}[base]
    undo()


def test_plans_use_it_where_it_is_named_and_keep_their_promise():
    assert "lora" not in {m.name for m in allowed("unbiased")}
    assert "lora" not in {m.name for m in allowed("structural")}  # loops would train nothing
    assert "lora" in {m.name for m in allowed("structural", hands_over=["optimizer"])}
    assert "lora" in {m.name for m in allowed(["lora"])}
    it = model()
    whole = planner(it, BATCH, optimizer=adamw, allow=["recompute"], seconds=False)
    plans = planner(it, BATCH, optimizer=adamw, allow=["lora", "quantized_base", "recompute"],
                    seconds=False)  # fmt: skip
    plan = plans(plans.smallest_bytes)
    assert [w.method for w in plan.patches if w.method == "lora"]
    assert plan.peak_bytes < 0.6 * whole.smallest_bytes
    before = copy.deepcopy(it.state_dict())
    plan.apply(it)
    optimizer = plan.optimizer(it)

    def step():
        it(**BATCH).loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    assert plan.verify(step).error == pytest.approx(0, abs=1e-6)
    plan.restore(it)
    assert [*it.state_dict()] == [*before]
    assert all(p.requires_grad for p in it.parameters())
    assert all(p.dtype == torch.float32 for p in it.parameters())
    off = [(v - before[k]).norm() / before[k].norm() for k, v in it.state_dict().items()]
    assert 0 < max(off) < 0.1  # as they were decoded


def test_blocks_with_adapters_are_timed():
    plans = planner(model(), BATCH, optimizer=adamw, allow=["lora"])
    assert plans(1 << 30).step_seconds > 0
    assert [w.method for w in plans(plans.smallest_bytes).patches] == ["lora"]


def adamw(parameters):
    return torch.optim.AdamW(parameters, lr=1e-2, fused=True)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"rank": 0}, "rank = 0"),
        ({"base": "int3"}, "base = 'int3'"),
        ({"targets": "q_proj"}, "a list of names"),
        ({"targets": 5}, "a list of names"),
        ({"alpha": -1}, "alpha = -1"),
        ({"alpha": "much"}, "alpha = 'much'"),
        ({"seed": "x"}, "seed = 'x'"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings, said):
    with pytest.raises(ConfigError, match=said):
        LORA.configure(settings)


def test_a_model_without_such_layers_or_with_adapters_is_refused_and_left_alone():
    it = model()
    with pytest.raises(StackError, match="no linear layers called"):
        put(it, targets=["nothing_of_the_kind"])
    put(it, targets=["q_proj"])
    with pytest.raises(StackError, match="has an adapter already"):
        put(it)
    assert sum(".lora_A" in n for n, _ in it.named_parameters()) == 2


def test_where_putting_them_in_fails_the_model_is_as_it_was(monkeypatch):
    def fails(*arguments):
        raise RuntimeError("no")

    it = model()
    monkeypatch.setattr("shoestring.methods.lora.keep_in_codes", fails)
    with pytest.raises(RuntimeError, match="no"):
        put(it, base="int8")
    assert all(
        torch.equal(a, b) for a, b in zip(it.parameters(), model().parameters(), strict=True)
    )
    assert all(p.requires_grad for p in it.parameters())


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated")
def test_saved_adapters_are_read_by_peft(tmp_path):
    from peft import PeftModel

    it = model()
    put(it)
    learned(it)
    it.eval()
    it.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(model(), tmp_path).eval()
    assert torch.equal(it(**BATCH).logits, again(**BATCH).logits)


def test_what_is_forgotten_is_told_unless_it_was_merged(caplog):
    for merged in (False, True):
        it = model()
        undo = put(it)
        learned(it, steps=2)
        if merged:
            merge(it)
        caplog.clear()
        undo()
        assert ("forgotten" in caplog.text) is not merged


def test_all_structural_methods_train_another_function_only_where_the_given_one_does_not_fit():
    plans = planner(model(), BATCH, optimizer=adamw, allow="structural", seconds=False,
                    hands_over=["optimizer"])  # fmt: skip
    stricter = plans.planner.stricter
    plans.planner.methods = [
        m for m in plans.planner.methods if m.name in ("keep", "recompute", "lora")
    ]
    plans.planner.costs.methods = plans.planner.methods
    stricter.methods = stricter.costs.methods = allowed(["keep", "recompute"])
    assert not plans(1 << 30).patches
    assert not plans(stricter.smallest_bytes).patches
    assert [w.method for w in plans(stricter.smallest_bytes - 1).patches] == ["lora"]


def test_a_model_that_does_not_take_what_was_named_is_told():
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(n_layer=2, n_embd=32, n_head=2, vocab_size=64, n_positions=64,
                        bos_token_id=0, eos_token_id=0)  # fmt: skip
    plans = planner(GPT2LMHeadModel(config), BATCH, allow=["lora"], seconds=False)
    with pytest.raises(StackError, match="allow names 'lora', which this model does not take"):
        plans(1 << 30)


def test_gradients_that_are_there_are_not_lost_in_silence():
    it = model()
    it(**BATCH).loss.backward()
    with pytest.raises(StackError, match="between two steps"):
        put(it)


def test_without_its_packages_it_says_which(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'shoestring\[peft\]'"):
        put(model())
