"""The cache in models and in `generate`: batches, beams, drafts, prefixes, and what is refused."""

import copy

import pytest
import torch
from transformers import (
    DynamicCache,
    Gemma2Config,
    GptOssConfig,
    GptOssForCausalLM,
    LlamaConfig,
    MistralConfig,
    Qwen3NextConfig,
    Qwen3NextForCausalLM,
)
from transformers.cache_utils import DynamicSlidingWindowLayer

from shoestring.errors import ConfigError, StackError
from shoestring.serve import NAME, CompressedCache
from shoestring.serve.layer import CompressedLayer

SHORT = {"window": 8, "sinks": 2, "centre": False}  # codes soon


def ids(rows, n, seed=1):
    return torch.randint(1, 128, (rows, n), generator=torch.Generator().manual_seed(seed))


def greedy(model, prompt, cache, new=30, **settings):
    mask = settings.pop("attention_mask", torch.ones_like(prompt))
    settings = {"max_new_tokens": new, "do_sample": False, **settings}
    return model.generate(prompt, attention_mask=mask, past_key_values=cache, **settings)


@torch.no_grad()
def read(model, prompt, cache, chunk=16):
    pieces = [
        model(prompt[:, a : a + chunk], past_key_values=cache).logits
        for a in range(0, prompt.shape[1], chunk)
    ]
    return torch.cat(pieces, dim=1)


def distance(found, wanted):
    return float((wanted.softmax(-1) - found.softmax(-1)).abs().sum(-1).mean())


def test_only_layers_of_full_attention_are_ours(model):
    kinds = [type(layer) for layer in CompressedCache(model).layers]
    types = getattr(model.config, "layer_types", None) or ["full_attention"] * 3
    assert kinds == [
        CompressedLayer if kind == "full_attention" else DynamicSlidingWindowLayer for kind in types
    ]


def test_until_something_is_coded_nothing_is_lost(model):
    prompt = ids(2, 60)
    wanted = read(model, prompt, DynamicCache(config=model.config))
    assert (read(model, prompt, CompressedCache(model)) - wanted).abs().max() < 1e-4


def test_more_bits_are_nearer_to_the_plain_cache(model):
    prompt = ids(2, 200)
    wanted = read(model, prompt, DynamicCache(config=model.config))
    found = [
        distance(read(model, prompt, CompressedCache(model, key_bits=b, value_bits=b)), wanted)
        for b in (2, 3, 4, 8)
    ]
    assert found == sorted(found, reverse=True)
    assert found[-1] < 0.1 * found[0]


@pytest.mark.parametrize("settings", [SHORT, {"window": 16}], ids=["short", "centred"])
def test_generate_is_the_loop_by_hand(model, settings):
    prompt = ids(1, 40)
    cache, other = (CompressedCache(model, **settings) for _ in range(2))
    found = greedy(model, prompt, cache, new=60)
    text, step = prompt, prompt
    with torch.no_grad():
        for _ in range(60):
            step = model(step, past_key_values=other).logits[:, -1:].argmax(-1)
            text = torch.cat([text, step], dim=1)
    assert torch.equal(found, text)
    assert len(cache.compressed[0].stores[1]) == 99 - cache.forms[0].window


@pytest.mark.parametrize("settings", [SHORT, {"window": 64}], ids=["short", "centred"])
def test_left_padded_rows_are_what_they_are_alone(model, settings):
    prompt, pads = ids(3, 150), (0, 11, 60)
    mask = torch.ones_like(prompt)
    for row, pad in enumerate(pads):
        prompt[row, :pad], mask[row, :pad] = 0, 0
    cache = CompressedCache(model, **settings)
    together = greedy(model, prompt, cache, attention_mask=mask)
    assert cache.compressed[0].starts == list(pads)
    for row, pad in enumerate(pads):
        alone = greedy(model, prompt[row : row + 1, pad:], CompressedCache(model, **settings))
        assert torch.equal(together[row, pad:], alone[0])


def test_inference_mode_is_as_good_as_no_gradients(model):
    prompt, found = ids(2, 60), []
    mask = torch.ones_like(prompt)
    prompt[1, :5], mask[1, :5] = 0, 0
    for scope in (torch.no_grad, torch.inference_mode):
        with scope():
            found.append(
                greedy(model, prompt, CompressedCache(model, **SHORT), attention_mask=mask)
            )
    assert torch.equal(*found)


def test_a_beam_scores_what_its_tokens_do_by_themselves(model):
    prompt, new = ids(2, 40), 30
    cache, other = (CompressedCache(model, **SHORT) for _ in range(2))
    found = greedy(
        model, prompt, cache, num_beams=3, length_penalty=0.0, return_dict_in_generate=True,
        output_scores=True,
    )  # fmt: skip
    text, scores = found.sequences, torch.zeros(2)
    with torch.no_grad():
        logits = model(prompt, past_key_values=other).logits[:, -1]
        for token in text[:, 40:].T:
            scores += logits.log_softmax(-1).gather(1, token[:, None])[:, 0]
            logits = model(token[:, None], past_key_values=other).logits[:, -1]
    assert text.shape == (2, 40 + new)
    assert (found.sequences_scores - scores).abs().max() < 1e-3
    assert len(cache.compressed[0].stores[1]) > 40


def test_drafts_from_the_prompt_change_nothing(model):
    prompt = ids(1, 12).repeat(1, 4)
    cache, drafted = (CompressedCache(model, key_bits=8, value_bits=8, **SHORT) for _ in range(2))
    plain = greedy(model, prompt, cache)
    assert torch.equal(greedy(model, prompt, drafted, prompt_lookup_num_tokens=4), plain)
    assert drafted.get_seq_length() == cache.get_seq_length()


def test_a_prefix_is_read_once_and_used_twice(model):
    prefix, ends = ids(1, 64), (ids(1, 16, seed=5), ids(1, 16, seed=6))
    cache = CompressedCache(model, **SHORT)
    read(model, prefix, cache)
    for end in ends:
        whole = torch.cat([prefix, end], dim=1)
        wanted = read(model, whole, CompressedCache(model, **SHORT))[:, 64:]
        assert torch.equal(read(model, end, copy.deepcopy(cache)), wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("n", [40, 128, 390, 1200])
def test_bytes_are_those_of_the_formula(grouped, dtype, n):
    model, settings = grouped.to(dtype), {"key_bits": 4, "value_bits": 3}
    cache = CompressedCache(model, **settings)
    read(model, ids(2, n), cache, chunk=100)
    assert cache.nbytes == cache.bytes_at(n, batch=2, dtype=dtype)
    assert cache.bytes_per_token() == 3 * 2 * (8 + 2 + 6 + 2)


def test_an_attached_model_is_itself_without_the_cache(model):
    prompt = ids(2, 30)
    with torch.no_grad():
        wanted = model(prompt).logits
        with CompressedCache(model.config).attach(model):
            assert model.config._attn_implementation == NAME
            assert torch.equal(model(prompt).logits, wanted)
            plain = DynamicCache(config=model.config)
            assert torch.equal(model(prompt, past_key_values=plain).logits, wanted)
    assert model.config._attn_implementation == "sdpa"


def test_what_was_there_before_comes_back_after_two_caches(model):
    CompressedCache(model)
    CompressedCache(model)
    assert model.config._attn_implementation == NAME
    CompressedCache(model.config).attach(model).detach()
    assert model.config._attn_implementation == "sdpa"


def test_a_prefix_of_inference_mode_is_continued_outside(model):
    prompt, cache = ids(1, 60), CompressedCache(model, **SHORT)
    with torch.inference_mode():
        model(prompt[:, :40], past_key_values=cache)
    with torch.no_grad():
        found = model(prompt[:, 40:], past_key_values=cache).logits
        other = CompressedCache(model, **SHORT)
        model(prompt[:, :40], past_key_values=other)
        assert torch.equal(found, model(prompt[:, 40:], past_key_values=other).logits)


def test_padding_stays_hidden_when_the_mask_is_given_once(grouped):
    prompt = ids(2, 30)
    mask = torch.ones_like(prompt)
    mask[1, :12] = 0
    places = (mask.cumsum(1) - 1).clamp_min(0)
    for settings in ({"window": 100}, SHORT):
        said = []
        for given in (None, torch.cat([mask, torch.ones(2, 1).long()], dim=1)):
            cache = CompressedCache(grouped, **settings)
            with torch.no_grad():
                grouped(prompt, attention_mask=mask, position_ids=places, past_key_values=cache)
                said.append(
                    grouped(
                        prompt[:, :1], attention_mask=given, position_ids=places[:, -1:] + 1,
                        past_key_values=cache,
                    ).logits
                )  # fmt: skip
        assert (said[0] - said[1]).abs().max() < 1e-4


def test_a_mask_of_another_length_is_refused(grouped):
    cache = CompressedCache(grouped, **SHORT)
    read(grouped, ids(1, 40), cache)
    with torch.no_grad(), pytest.raises(ConfigError, match="mask"):
        grouped(
            ids(1, 1), past_key_values=cache,
            attention_mask=torch.ones(1, 1, 1, 50, dtype=torch.bool),
        )  # fmt: skip
    with pytest.raises(StackError, match="reset"):
        read(grouped, ids(1, 1), cache)


def test_a_model_that_was_not_attached_is_noticed(model):
    cache = CompressedCache(model.config)
    with pytest.raises(StackError, match="attach"):
        read(model, ids(1, 64), cache)
    with cache.attach(model):
        cache.reset()
        read(model, ids(1, 64), cache)


def test_a_crop_that_a_sliding_layer_cannot_do_is_refused_before_any_is_done(model):
    cache = CompressedCache(model, **SHORT)
    read(model, ids(1, 64), cache)
    length = cache.compressed[0].get_seq_length()
    if True in cache.is_sliding:
        with pytest.raises(ConfigError, match="activate_past_recording"):
            cache.crop(-3)
        length += 3
    else:
        cache.crop(-3)
    assert cache.compressed[0].get_seq_length() == length - 3
    with pytest.raises(ConfigError, match="crop"):
        cache.crop(-65)


def test_linear_layers_beside_ours_keep_their_own_state():
    config = Qwen3NextConfig(
        **TINY, intermediate_size=32, num_key_value_heads=1, head_dim=16, vocab_size=128,
        num_experts=2, num_experts_per_tok=1, moe_intermediate_size=16,
        shared_expert_intermediate_size=16, linear_num_key_heads=2, linear_num_value_heads=2,
        linear_key_head_dim=8, linear_value_head_dim=8, pad_token_id=0, eos_token_id=None,
        layer_types=["linear_attention", "full_attention"],
    )  # fmt: skip
    model, prompt = Qwen3NextForCausalLM(config).eval(), ids(2, 40)
    cache = CompressedCache(model, key_bits=8, value_bits=8, **SHORT)
    plain = read(model, prompt, DynamicCache(config=config))
    assert distance(read(model, prompt, cache), plain) < 0.01
    assert len(cache.compressed) == 1
    with pytest.raises(ConfigError, match="a state that holds them all"):
        cache.crop(-3)
    assert cache.compressed[0].get_seq_length() == 40
    ours = sum(x.untyped_storage().nbytes() for x in cache.compressed[0].tensors())
    states = [*cache.layers[0].conv_states.values(), *cache.layers[0].recurrent_states.values()]
    assert cache.nbytes == ours + sum(x.untyped_storage().nbytes() for x in states)


TINY = {"hidden_size": 32, "num_attention_heads": 2, "num_hidden_layers": 2}


@pytest.mark.parametrize(
    ("config", "settings", "what"),
    [
        (LlamaConfig(**TINY), {"key_bits": 0}, "0 bits"),
        (LlamaConfig(**TINY), {"value_bits": 9}, "9 bits"),
        (LlamaConfig(**TINY), {"window": -1}, "window"),
        (LlamaConfig(**TINY), {"sinks": 1.5}, "sinks"),
        (LlamaConfig(**TINY), {"seed": "x"}, "seed"),
        (LlamaConfig(**TINY), {"centre": "no"}, "centre"),
        (LlamaConfig(**TINY), {"key_bits": True}, "True bits"),
        (LlamaConfig(**TINY), {"budget": "6bits", "calibration": "there"}, "Calibration"),
        (LlamaConfig(**TINY), {"window": 8}, "centre=False"),
        (LlamaConfig(**TINY, head_dim=2), {}, "width 2"),
        (Gemma2Config(**TINY), {}, "soft cap"),
        (MistralConfig(**TINY, sliding_window=8), {}, "no layer of full attention"),
        ({"a": 1}, {}, "dict"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused_before_anything_is_allocated(config, settings, what):
    with pytest.raises(ConfigError, match=what):
        CompressedCache(config, **settings)


def test_attention_with_sinks_of_its_own_is_refused():
    config = GptOssConfig(
        **TINY, num_key_value_heads=1, head_dim=16, intermediate_size=32, num_local_experts=2,
        vocab_size=64, layer_types=["full_attention"] * 2,
    )  # fmt: skip
    model = GptOssForCausalLM(config).eval()
    with pytest.raises(ConfigError, match="sinks that are parameters"):
        CompressedCache(model)
    with pytest.raises(StackError, match="Linear"):
        CompressedCache(torch.nn.Linear(2, 2))


def test_dropout_over_codes_is_refused(grouped):
    grouped.config.attention_dropout = 0.5
    for layer in grouped.model.layers:
        layer.self_attn.attention_dropout = 0.5
    cache = CompressedCache(grouped.train())
    with torch.no_grad(), pytest.raises(ConfigError, match="dropout"):
        grouped(ids(1, 4), past_key_values=cache)
