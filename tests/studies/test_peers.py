"""The equations of simulated peers, on small tensors and a small model."""

import itertools
import math

import pytest
import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from shoestring.errors import ConfigError
from shoestring.serve import CompressedCache, attach
from shoestring.studies.compressed_context import eviction, peers, simulated, transform
from shoestring.studies.compressed_context.calibration import calibrate
from shoestring.studies.compressed_context.watching import watched


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(3)
    config = LlamaConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=32, vocab_size=64, max_position_embeddings=512,
        bos_token_id=None, eos_token_id=None, pad_token_id=None,
    )  # fmt: skip
    made = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for name, weight in made.named_parameters():
            weight.mul_(6 if weight.ndim == 2 and "embed" not in name else 1)
    return made


@pytest.fixture(scope="module")
def setting(model):
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(64, (4, 60), generator=generator)
    prompt = torch.randint(64, (1, 3), generator=generator)
    return peers.Setting(model, 200, rows, prompt, window=16, sinks=2)


def tokens(count, rows=1):
    return torch.randint(64, (rows, count), generator=torch.Generator().manual_seed(9))


@torch.no_grad()
def said(model, cache, ids, chunk=8):
    parts = ids.split(chunk, 1)
    return torch.cat([model(part, past_key_values=cache).logits for part in parts], 1)


def test_a_cache_that_only_watches_changes_nothing(model):
    ids = tokens(40, 2)
    plain = said(model, DynamicCache(config=model.config), ids)
    with watched(model):
        assert torch.equal(said(model, simulated.WatchingCache(config=model.config), ids), plain)
    assert model.config._attn_implementation == "sdpa"


def test_calibration_has_the_keys_of_the_cache_and_the_squares_of_queries(model, setting):
    found = calibrate(model, setting.rows[:1])
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(setting.rows[:1], past_key_values=cache)
    assert torch.equal(found.keys[1], cache.layers[1].keys[0])
    assert found.query_squares.shape == (2, 2, 32, 32)
    assert torch.allclose(found.query_squares, found.query_squares.mT)
    assert bool((torch.linalg.eigvalsh(found.query_squares.double()) > -1e-6).all())


@pytest.mark.parametrize("bits", [2, 4])
def test_min_max_codes_are_within_half_a_step(bits):
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(1))
    found = simulated.min_max(x, bits, -1)
    step = (x.amax(-1) - x.amin(-1)) / (2**bits - 1)
    assert bool(((found - x).abs() <= 0.51 * step[:, None] + 2e-3).all())
    assert max(len(row.unique()) for row in found) <= 2**bits


def test_kivi_groups_keys_by_tokens_and_values_by_channels(model):
    cache = simulated.KiviCache(model.config, bits=2, window=16)
    x = torch.randn(1, 2, 32, 32, generator=torch.Generator().manual_seed(2))
    x[..., 5] *= 100  # one loud channel
    keys, values = cache.decoded(0, x, x)
    quiet = [i for i in range(32) if i != 5]
    assert (keys - x)[..., quiet].abs().max() < 1.5  # its own step by channel
    assert (values - x)[..., quiet].abs().max() > 1.5  # all share the loud one's
    assert keys[0, 0, :, 7].unique().numel() <= 4


def test_kivi_counts_five_bits_for_four(model):
    cache = simulated.KiviCache(model.config, bits=4, window=16)
    said(model, cache, tokens(112))
    assert cache.coded == 96
    assert cache.nbytes == (112 - 96) * 256 * 2 + 96 * 256 * 5 / 8


def test_a_simulated_cache_codes_once_what_left_the_window(model):
    cache = simulated.KiviCache(model.config, bits=2, window=16)
    plain = DynamicCache(config=model.config)
    ids = tokens(72)
    said(model, cache, ids[:, :64])
    said(model, plain, ids[:, :64])
    before = cache.layers[0].keys[:, :, :32].clone()
    assert not torch.equal(before, plain.layers[0].keys[:, :, :32])
    assert torch.equal(cache.layers[0].keys[:, :, 32:], plain.layers[0].keys[:, :, 32:])
    said(model, cache, ids[:, 64:])
    assert torch.equal(cache.layers[0].keys[:, :, :32], before)


def test_the_rotated_control_is_our_cache_and_the_other_lacks_only_rotation(model):
    ids, exact = tokens(160), {"window": 64, "sinks": 2}
    control = simulated.CodedCache(model.config, key_bits=3, value_bits=3, rotate=True, **exact)
    with watched(model):
        twin = said(model, control, ids)
    with attach(model):
        ours = said(model, CompressedCache(model, key_bits=3, value_bits=3, **exact), ids)
    plain = said(model, DynamicCache(config=model.config), ids)
    assert (twin - ours).square().mean() < 0.05 * (twin - plain).square().mean()
    x = torch.zeros(1, 1, 1, 32)
    x[..., 3] = 5.0  # in its own coordinates one number, spread out by a rotation
    bare = simulated.CodedCache(model.config, key_bits=2, value_bits=2, rotate=False, **exact)
    bare.means[0] = torch.zeros(1, 1, 1, 32)
    _, found = bare.decoded(0, x, x)
    assert int(found.abs().argmax()) == 3
    assert found.norm().item() == pytest.approx(5.0, rel=1e-3)


# ---- OSCAR -------------------------------------------------------------------------------------


def test_oscars_rotation_is_orthogonal_and_spreads_what_matters_evenly():
    generator = torch.Generator().manual_seed(4)
    a = torch.randn(32, 32, generator=generator, dtype=torch.float64) * torch.logspace(-2, 1, 32)
    covariance = a.T @ a
    found = simulated.spectral_rotation(covariance).double()
    assert torch.allclose(found.T @ found, torch.eye(32, dtype=torch.float64), atol=1e-5)
    spread = (found.T @ covariance @ found).diagonal()
    assert torch.allclose(spread, spread.mean().expand(32), rtol=1e-3)


def test_oscars_permutation_deals_eigenvalues_out_by_bit_reversal():
    assert simulated.bit_reversed(8).tolist() == [0, 4, 2, 6, 1, 5, 3, 7]
    with pytest.raises(ConfigError, match="power of two"):
        simulated.spectral_rotation(torch.eye(12))


def test_oscar_clips_at_the_quantile_of_each_vector():
    x = torch.arange(1.0, 65.0)[None]
    found = simulated.clipped(x, 0.5, 8)
    assert found.max().item() == pytest.approx(32.5, rel=1e-2)
    assert torch.allclose(found[0, :32], x[0, :32], atol=0.1)


def test_oscar_weighs_values_by_what_their_keys_attract():
    keys = torch.zeros(1, 1, 2, 4)
    keys[0, 0, 0, 0] = 3.0  # only the first token meets a query
    values = torch.eye(4)[:2].view(1, 1, 2, 4)
    squares = torch.zeros(1, 1, 4, 4)
    squares[0, 0, 0, 0] = 1.0
    given = simulated.Calibration(keys, values, squares, torch.arange(2))
    weights = (keys[0].double() @ squares[0].double() * keys[0]).sum(-1)
    assert weights.tolist() == [[9.0, 0.0]]
    of_keys, of_values = simulated.oscar_rotations(given, 0)
    assert of_keys[0].abs().tolist() == pytest.approx([0.5] * 4)
    assert of_values[0].abs().tolist() == pytest.approx([0.5] * 4)


# ---- KVTC --------------------------------------------------------------------------------------


def test_rotary_embedding_is_undone(model):
    cos, sin = transform.rotary_tables(model, 20)
    x = torch.randn(2, 2, 20, 32, generator=torch.Generator().manual_seed(5))
    assert torch.allclose(transform.unturned(transform.rotary(x, cos, sin), cos, sin), x, atol=1e-5)
    cache = DynamicCache(config=model.config)
    seen = []
    hook = model.model.layers[0].self_attn.k_proj.register_forward_hook(
        lambda _, __, out: seen.append(out)
    )
    with torch.no_grad():
        model(tokens(20), past_key_values=cache)
    hook.remove()
    before = seen[0].view(20, 2, 32).transpose(0, 1)
    assert torch.allclose(transform.unturned(cache.layers[0].keys[0], cos, sin), before, atol=1e-5)


def test_features_of_all_layers_and_heads_come_back_in_place():
    x = torch.arange(2 * 3 * 5 * 4.0).view(2, 3, 5, 4)
    flat = transform.features(x)
    assert flat.shape == (5, 24)
    assert torch.equal(transform.unfeatured(flat, x.shape), x)


def test_components_are_orthogonal_and_the_largest_first():
    generator = torch.Generator().manual_seed(6)
    for count in (200, 10):  # more tokens than features, and fewer
        x = torch.randn(count, 16, generator=generator) * torch.logspace(1, -1, 16) + 3
        mean, basis = transform.principal(x, 6)
        assert torch.allclose(basis.T @ basis, torch.eye(6), atol=1e-4)
        sizes = ((x - mean) @ basis).square().sum(0)
        assert torch.equal(sizes, sizes.sort(descending=True).values)


def test_components_by_layer_stay_within_one():
    x = torch.randn(50, 12, generator=torch.Generator().manual_seed(6)) * torch.arange(1.0, 13)
    mean, basis = transform.principal(x, 12, blocks=3)
    assert torch.allclose(basis.T @ basis, torch.eye(12), atol=1e-4)
    parts = basis.view(3, 4, 12).abs().sum(1)
    assert bool(((parts > 1e-6).sum(0) == 1).all())
    sizes = ((x - mean) @ basis).square().sum(0)
    assert torch.equal(sizes, sizes.sort(descending=True).values)


def test_the_program_finds_the_best_of_all_plans():
    generator = torch.Generator().manual_seed(7)
    errors = {
        (size, bits): torch.rand(4, generator=generator, dtype=torch.float64) * (9 - bits)
        for size, bits in itertools.product((1, 2), (0, 2, 4))
    }
    errors = {k: v if k[0] == 1 else torch.cat([torch.tensor([math.inf]), v[1:]]).double()
              for k, v in errors.items()}  # fmt: skip
    budget = 120

    def best(end, left):
        if end == 0:
            return 0.0
        found = [
            best(end - size, left - cost) + float(error[end - 1])
            for (size, bits), error in errors.items()
            if size <= end and (cost := -(-transform.Group(0, size, bits).cost // 8)) <= left
        ]
        return min(found, default=math.inf)

    program = transform.allocate(errors, budget)
    for bits in (0, 36, 72, 120):
        assert float(program.error[bits // 8]) == pytest.approx(best(4, bits // 8))
        assert sum(group.cost for group in program.groups(bits)) <= bits


def test_more_bits_lose_less_and_no_group_is_without(setting):
    codec = setting.codec()
    flat = codec.samples[1]
    lost = []
    for bits in (200, 600, 1100):
        chosen = codec.transforms(bits)
        assert sum(each.token_bits for each in chosen) <= bits
        assert all(group.bits for each in chosen for group in each.groups)
        lost.append(float((chosen[1].decode(chosen[1].encode(flat)) - flat).square().sum()))
    assert lost == sorted(lost, reverse=True)
    assert lost[-1] < 0.5 * lost[0]


def test_kvtc_takes_the_bytes_it_was_asked_for(model, setting):
    ids = tokens(200)
    for share in (0.25, 0.35):
        transforms = setting.codec().within(setting.coded_bytes(share))
        cache = transform.KvtcCache(
            model.config, setting.codec(), transforms, window=16, sinks=2
        )  # fmt: skip
        said(model, cache, ids)
        assert cache.nbytes / 200 == pytest.approx(share * setting.plain_bytes, rel=0.1)


# ---- eviction ----------------------------------------------------------------------------------


def test_scores_are_the_most_attention_any_query_gives():
    generator = torch.Generator().manual_seed(8)
    query, key = (torch.randn(1, h, t, 8, generator=generator) for h, t in ((4, 3), (2, 9)))
    found = eviction.most_attention(query, key, 6)
    for head in range(2):
        best = torch.zeros(6)
        for group, q in itertools.product(range(2), range(3)):
            seen = key[0, head, : 9 - 3 + q + 1]
            weights = (seen @ query[0, 2 * head + group, q] / math.sqrt(8)).softmax(0)
            best = torch.maximum(best, weights[:6])
        assert torch.allclose(found[0, head], best, atol=1e-6)


def test_the_threshold_is_one_for_all_layers_and_heads():
    scores = torch.arange(12.0).view(1, 2, 2, 3)
    assert eviction.above_threshold(scores, 0.25).flatten().tolist() == [False] * 9 + [True] * 3


def test_keeping_everything_is_the_plain_cache_in_16_bits(model, setting):
    ids = tokens(60)
    scores = eviction.random_scores(model.config, ids, 0)
    kept = eviction.EvictingCache(model.config, scores, keep=1.0, bits=16, window=16, sinks=2)
    with watched(model):
        found = said(model, kept, ids)
    plain = said(model, DynamicCache(config=model.config), ids)
    assert torch.allclose(found, plain, atol=2e-2)
    assert kept.nbytes == 60 * 256 * 2 + 4 * kept.vectors / 2


def test_evicted_pairs_get_no_attention_and_no_bytes(model):
    ids = tokens(60)
    scores = torch.rand(1, 2, 2, 60, generator=torch.Generator().manual_seed(1))
    cache = eviction.EvictingCache(model.config, scores, keep=0.5, bits=16, window=16, sinks=2)
    with watched(model), torch.no_grad():
        said(model, cache, ids[:, :56])
        spoiled = ~cache.stays[:, :, :, : cache.coded]
        for index, layer in enumerate(cache.layers):
            hole = torch.zeros_like(layer.keys[..., 0], dtype=torch.bool)
            hole[:, :, 2 : cache.end] = spoiled[:, index]
            layer.keys[hole] = 1e3
            layer.values[hole] = 1e3
        after = model(ids[:, 56:], past_key_values=cache).logits
    again = eviction.EvictingCache(model.config, scores, keep=0.5, bits=16, window=16, sinks=2)
    with watched(model):
        assert torch.equal(said(model, again, ids)[:, 56:], after)
    kept = int(cache.stays[..., : cache.coded].sum())
    exact = 60 - cache.coded
    assert cache.nbytes == exact * 256 * 2 + kept * 2 * 32 * 2 + 4 * cache.vectors / 2


def test_kvzip_scores_every_pair_of_the_context(model, setting):
    found = eviction.kvzip_scores(model, tokens(30, 2), setting.prompt)
    assert found.shape == (2, 2, 2, 30)
    assert bool(((found > 0) & (found <= 1)).all())


# ---- the list ----------------------------------------------------------------------------------


def test_every_peer_reads_and_counts_or_says_why_not(model, setting):
    ids = tokens(200)
    shares = {}
    for peer in peers.peers(setting, (0,)):
        if peer.kind == "package" and peer.name != "fp8":
            continue  # these are others' code; see below
        if peer.missing:
            assert "exact tokens" in peer.missing
            continue
        with peer.attached():
            cache = peer.make(ids)
            found = said(model, cache, ids)
        assert bool(torch.isfinite(found).all())
        shares[peer.name] = peers.cache_bytes(cache) / 200 / setting.plain_bytes
    assert shares["float32"] == 2.0
    assert shares["KVTC 20.4%"] == pytest.approx(peers.SHARES[1], rel=0.1)
    assert shares["KVzip 20.4%, 4 bits"] == pytest.approx(peers.SHARES[1], rel=0.15)
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("name", ["hqq 4", "turboquant 4"])
def test_installed_packages_read_through_their_own_caches(model, setting, name):
    peer = {each.name: each for each in peers.peers(setting, (0,))}[name]
    if peer.missing:
        pytest.skip(peer.missing)
    ids = tokens(40)
    plain = said(model, DynamicCache(config=model.config), ids)
    with peer.attached():
        cache = peer.make(ids)
        found = said(model, cache, ids)
    assert 0 < (found - plain).square().mean() < 0.1 * plain.square().mean()
    assert peers.cache_bytes(cache) > 40 * setting.plain_bytes / 4


def test_a_missing_package_is_said_not_dropped(monkeypatch, setting):
    monkeypatch.setattr(peers, "_is_there", lambda name: name not in ("hqq", "turboquant"))
    found = {peer.name: peer.missing for peer in peers.peers(setting, (0,))}
    assert found["hqq 4"] == "not installed: hqq"
    assert found["turboquant 2"] == "not installed: turboquant"
    assert found["KIVI 2"] is None


def test_a_budget_below_the_exact_tokens_is_said(model, setting):
    narrow = peers.Setting(model, 60, setting.rows, setting.prompt, window=16, sinks=2)
    found = {peer.name: peer.missing for peer in peers.peers(narrow, (0,))}
    assert "alone take more" in found["KVTC 14.1%"]
