"""What newcomers give the planner: what cannot be planned is said in words, what can be is."""

import threading
from dataclasses import dataclass

import pytest
import torch
from benchmarks.planner.models import llama, llama_batch
from torch import nn
from transformers import BertConfig, T5Config, ViTConfig

from shoestring.errors import ConfigError, StackError
from shoestring.meter import Meter
from shoestring.planner import Plan, plan, plan_config

X = {"x": torch.ones(2, 8, 16)}


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 16))

    def forward(self, x):
        return x + self.mlp(x)


class Net(nn.Module):
    def __init__(self, **attributes):
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        for name, value in attributes.items():
            setattr(self, name, value)

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x


def square(model, batch):
    return model(batch["x"]).square().mean()


def planned(model, batch=X, **settings):
    return plan(model, batch, budget="1GiB", **{"loss": square, "seconds": False, **settings})


def refused(match, *args, **settings):
    with pytest.raises(ConfigError, match=match) as caught:
        planned(*args, **settings)
    error = caught.value
    assert error.expected
    assert error.hint
    return error


def test_a_batch_without_labels_has_no_loss():
    ids = {"input_ids": llama_batch(2, 16, 64)["input_ids"]}
    refused(
        "LlamaForCausalLM gave CausalLMOutputWithPast without a loss for a batch of input_ids",
        llama(depth=2, width=32, vocabulary=64), ids, loss=None,
    )  # fmt: skip


def test_a_plain_model_needs_a_loss():
    error = refused("Net gave a tensor without a loss for a batch of x", Net(), loss=None)
    assert "loss=" in error.hint


def test_a_batch_of_other_names_says_which_are_taken():
    refused(r"Net.forward does not take a batch of y.*expected x", Net(), {"y": X["x"]}, loss=None)


def test_a_model_that_fails_on_its_own_fails_as_it_does():
    class Wrong(Net):
        def forward(self, x):
            return len(3)

    with pytest.raises(TypeError, match="has no len"):
        planned(Wrong(), loss=None)


@pytest.mark.parametrize("given", [None, 3.0, torch.ones(4)])
def test_a_loss_that_is_no_scalar_is_refused(given):
    refused(r"loss\(model, batch\) gave .*expected a tensor of one element", Net(),
            loss=lambda model, batch: given)  # fmt: skip


def test_a_loss_that_depends_on_no_weight_is_refused():
    refused("gave a tensor that no weight", Net(), loss=lambda model, batch: torch.ones(()))


def test_what_cannot_be_copied_is_named():
    refused("Net cannot be copied: its 'lock'.*cannot pickle", Net(lock=threading.Lock()))
    model = Net()
    model.blocks[1].lock = threading.Lock()
    refused("Net cannot be copied: blocks.1 'lock'", model)


def test_a_tensor_that_nobody_sees_is_named_without_a_page_of_torchs(caplog):
    @dataclass
    class Box:
        inside: torch.Tensor

    refused("Net cannot be copied: its 'box'", Net(box=Box(torch.ones(3))))
    assert not caplog.records


@pytest.mark.parametrize("seconds", [True, False])
@pytest.mark.parametrize(
    "attribute", [[torch.zeros(3)], {"a": (torch.zeros(2),)}, torch.Generator()]
)
def test_tensors_in_lists_and_generators_are_no_hindrance(attribute, seconds):
    class Reading(Net):
        def forward(self, x):
            held = self.held
            if isinstance(held, torch.Generator):
                return super().forward(x) + torch.rand(x.shape, generator=held)
            return super().forward(x) + (held[0] if isinstance(held, list) else held["a"][0]).sum()

    model = Reading(held=attribute)
    before = attribute.get_state() if isinstance(attribute, torch.Generator) else None
    chosen = planned(model, seconds=seconds)
    assert before is None or torch.equal(before, attribute.get_state())
    chosen.apply(model)
    with Meter(model) as meter:
        square(model, X).backward()
    assert meter.peak_bytes <= chosen.peak_bytes


def small(kind, **changes):
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
             "num_attention_heads": 2}  # fmt: skip
    return kind(**{**sizes, **changes})


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (small(BertConfig, vocab_size=60, architectures=["BertModel"]),
         "BertModel takes no labels, so it gives no loss"),
        (small(ViTConfig, image_size=32, patch_size=8, architectures=["ViTForImageClassification"]),
         "ViTForImageClassification takes pixel_values, .*no token ids"),
    ],
)  # fmt: skip
def test_a_config_of_what_is_no_language_model_is_refused(config, message):
    with pytest.raises(ConfigError, match=message) as caught:
        plan_config(config, batch_size=1, sequence_length=16, budget="1GiB", seconds=False)
    assert "shoestring.plan(model, batch" in caught.value.hint


def test_a_config_of_no_known_class_is_refused():
    with pytest.raises(ConfigError, match="ViTConfig names no model class that is known"):
        plan_config(small(ViTConfig), batch_size=1, sequence_length=16, budget="1GiB")


def test_two_stacks_are_refused_with_what_can_be_done():
    config = T5Config(
        vocab_size=67, d_model=32, d_kv=8, d_ff=48, num_layers=3, num_heads=4,
        decoder_start_token_id=0, architectures=["T5ForConditionalGeneration"],
    )  # fmt: skip
    with pytest.raises(StackError, match="a plan covers one stack") as caught:
        plan_config(config, batch_size=1, sequence_length=16, budget="1GiB", seconds=False)
    assert "decoder.block" in str(caught.value)
    assert "Outside of plans, Stack.of(model, path=...)" in caught.value.hint


@pytest.mark.parametrize(
    ("part", "broken"),
    [
        ("spans", [{"start": 0}]),
        ("spans", [{"start": 0, "stop": "3", "method": "keep"}]),
        ("spans", [3]),
        ("spans", {}),
        ("patches", [{"method": 3}]),
        ("patches", [{"way": "chunked_loss"}]),
        ("rows", [{"name": "x"}]),
        ("rows", None),
        ("by_category", 5),
        ("blocks", "three"),
        ("peak_bytes", None),
    ],
)
def test_a_plan_with_a_broken_part_is_refused(part, broken):
    import json

    value = json.loads(planned(Net()).to_json(history=False))
    with pytest.raises(ConfigError, match=rf"this plan's {part}.*cannot be read.*Plan.to_json"):
        Plan.from_json(json.dumps({**value, part: broken}))
