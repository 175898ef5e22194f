"""chunked_mlp: which modules are sliced, and that only the order of sums changes."""

import copy
import inspect
import itertools

import pytest
import torch
import transformers
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from shoestring.errors import ConfigError, StackError
from shoestring.meter import Meter
from shoestring.methods.chunked_mlp import ChunkedMlp, ChunkedMlpConfig, slice_blocks, token_wise

WIDTH = 16
SIZES = {
    "vocab_size": 61,
    "hidden_size": WIDTH,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
CONFIGS = {
    "llama": lambda: transformers.LlamaConfig(**SIZES),
    "gpt2": lambda: transformers.GPT2Config(
        vocab_size=61, n_embd=WIDTH, n_layer=2, n_head=2, loss_type="ForCausalLM",
        bos_token_id=1, eos_token_id=2,
    ),
    "falcon": lambda: transformers.FalconConfig(
        vocab_size=61, hidden_size=WIDTH, num_hidden_layers=2, num_attention_heads=2,
        bos_token_id=1, eos_token_id=2,
    ),
    "qwen2_moe": lambda: transformers.Qwen2MoeConfig(
        **SIZES, num_experts=4, experts_implementation="eager"
    ),
    "mixtral": lambda: transformers.MixtralConfig(**SIZES, num_local_experts=4),
}  # fmt: skip


class Mlp(nn.Module):
    """Norm, up, activation, dropout, down: what a block's second half looks like."""

    def __init__(self, *, dropout=0.0, inner=64):
        super().__init__()
        self.norm, self.dropout = nn.LayerNorm(WIDTH), nn.Dropout(dropout)
        self.up, self.down = nn.Linear(WIDTH, inner), nn.Linear(inner, WIDTH)
        self.act = nn.GELU()

    def forward(self, x):
        return self.down(self.dropout(self.act(self.up(self.norm(x)))))


class Attention(nn.Module):
    """One argument, only linear layers inside; but tokens look at each other."""

    def __init__(self):
        super().__init__()
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        q, k, v = self.qkv(x).chunk(3, -1)
        return self.out(nn.functional.scaled_dot_product_attention(q, k, v))


class ShiftsTokens(Mlp):
    """Mixes tokens by indexing alone: no operator here is one of attention's."""

    def forward(self, x):
        return super().forward(torch.cat([x[:, :1], x[:, :-1]], dim=1))


class Block(nn.Module):
    def __init__(self, second=Mlp, **settings):
        super().__init__()
        self.first, self.second = Attention(), second(**settings)

    def forward(self, x):
        x = x + self.first(x)
        return x + self.second(x)


def model_of(name):
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(CONFIGS[name]()).train()


def sliced(module, slices=4):
    slice_blocks([module], ChunkedMlpConfig(slices=slices))
    return module


def stored_twin(module, x, slices):
    """The same slices with everything kept: what running them again has to reproduce."""
    flat = x.reshape(1, -1, WIDTH)
    edges = [flat.shape[1] * k // slices for k in range(slices + 1)]
    parts = [module(flat[:, a:b]) for a, b in itertools.pairwise(edges)]
    return torch.cat(parts, 1).reshape(x.shape)


def data(*shape, dtype=torch.float32, seed=3):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def gradients(output, x, module):
    weights = data(*output.shape, seed=4).to(output.dtype)
    inputs = [t for t in (x, *module.parameters()) if t.requires_grad]
    return torch.autograd.grad((output * weights).sum(), inputs)


def assert_close(got, expected, eps_multiple=ChunkedMlp.promises.bound_eps, dtype=None):
    for a, b in zip(got, expected, strict=True):
        bound = eps_multiple * torch.finfo(dtype or b.dtype).eps
        assert (a - b).norm() <= bound * b.norm(), f"{(a - b).norm() / b.norm():.2e}"


# ---- what is sliced ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "paths"),
    [
        ("llama", ["mlp"]),
        ("gpt2", ["mlp"]),
        ("falcon", ["mlp"]),
        ("qwen2_moe", ["mlp.shared_expert"]),
        ("mixtral", []),
    ],
)
def test_token_wise_modules_are_found_by_structure(name, paths):
    layers = next(m for m in model_of(name).modules() if isinstance(m, nn.ModuleList))
    assert [path for path, _ in token_wise(layers[0])] == paths


def test_attention_that_looks_like_an_mlp_is_left_alone():
    assert [path for path, _ in token_wise(Block())] == ["second"]


def test_a_fake_model_gets_the_same_slices_as_the_real_one():
    with FakeTensorMode():
        assert [path for path, _ in token_wise(Block())] == ["second"]
        assert token_wise(ShiftsTokens()) == []


def test_looking_leaves_random_state_modes_and_gradients_alone():
    block = Block(dropout=0.5)
    block.second.dropout.eval()
    modes, state = [m.training for m in block.modules()], torch.get_rng_state()
    token_wise(block)
    assert [m.training for m in block.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("second", [ShiftsTokens, nn.Identity])
def test_a_stack_without_token_wise_modules_is_refused_with_reasons(second):
    model = nn.Sequential(Block(second), Block(second))
    with pytest.raises(StackError, match=r"no token-wise module.*first may mix tokens"):
        ChunkedMlp().apply(model, ChunkedMlpConfig())
    assert all("forward" not in vars(m) for m in model.modules())


def test_slicing_twice_is_refused():
    model = nn.Sequential(Block(), Block())
    ChunkedMlp().apply(model, ChunkedMlpConfig())
    with pytest.raises(StackError, match="second has been replaced already"):
        ChunkedMlp().apply(model, ChunkedMlpConfig())


@pytest.mark.parametrize("slices", [0, -1, 2.0, True])
def test_settings_out_of_range(slices):
    with pytest.raises(ConfigError, match="chunked_mlp: slices = "):
        ChunkedMlpConfig(slices=slices)


# ---- the same function and gradient ------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_models_keep_their_gradients_and_undo_is_bitwise(name):
    def step():
        model.zero_grad()
        output = model(input_ids=ids, labels=ids)
        output.loss.backward()
        return output.logits, [p.grad.clone() for p in model.parameters() if p.grad is not None]

    model = model_of(name).double()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0  # masks drawn slice by slice are others
    ids = torch.randint(3, 61, (2, 11), generator=torch.Generator().manual_seed(0))
    keys = list(model.state_dict())
    logits, expected = step()
    undo = ChunkedMlp().apply(model, ChunkedMlpConfig(slices=3))
    assert list(model.state_dict()) == keys
    near, got = step()
    assert_close([near, *got], [logits, *expected])
    undo()
    again, after = step()
    assert torch.equal(again, logits)
    assert all(map(torch.equal, after, expected))
    assert all("forward" not in vars(m) for m in model.modules())


@pytest.mark.parametrize("shape", [(3, 7, WIDTH), (1, 2, WIDTH), (5, WIDTH), (2, 3, 4, WIDTH)])
def test_any_number_of_tokens_and_dimensions(shape):
    module = Mlp()
    x = data(*shape).requires_grad_()
    expected = module(x)
    wanted = gradients(expected, x, module)
    got = sliced(module)(x)
    assert got.shape == expected.shape
    assert_close([got, *gradients(got, x, module)], [expected, *wanted])


@pytest.mark.parametrize("autocast", [False, True])
def test_slices_run_again_draw_the_same_masks_in_the_same_dtypes(autocast):
    module = Mlp(dropout=0.3)
    x = data(2, 10, WIDTH).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        torch.manual_seed(1)
        expected = stored_twin(module, x, 4)
        sliced(module)
        torch.manual_seed(1)
        first = module(x)
        second = module(x)  # a second forward before the first one's backward
    state = torch.get_rng_state()
    dx, *weights = gradients(first, x, module)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first, expected)
    assert not torch.equal(second, expected)
    del module.forward
    dx_twin, *weights_twin = gradients(expected, x, module)
    assert torch.equal(dx, dx_twin)
    # Ours are summed in float32, the twin's in the dtype of the products.
    assert_close(weights, weights_twin, 1, dtype=torch.bfloat16 if autocast else None)


def test_gradients_off_or_on_give_the_same_values():
    module = sliced(Mlp())
    x = data(2, 9, WIDTH)
    with torch.no_grad():
        off = module(x)
    assert not off.requires_grad
    assert torch.equal(off, module(x))


def test_inside_a_checkpoint_the_slices_run_once_in_forward_and_once_in_backward():
    block = Block()
    x = data(2, 8, WIDTH).requires_grad_()
    expected = block(x)
    wanted = gradients(expected, x, block)
    slice_blocks([block], ChunkedMlpConfig(slices=4))
    runs = []
    block.second.up.register_forward_hook(lambda *_: runs.append(torch.is_grad_enabled()))
    got = checkpoint(block, x, use_reentrant=False)
    assert_close(gradients(got, x, block), wanted)
    assert runs == [False] * 4 + [True] * 4


def test_double_backward():
    def second_derivatives():
        (dx,) = torch.autograd.grad(module(x).tanh().sum(), x, create_graph=True)
        return torch.autograd.grad(dx.square().sum(), [x, *module.parameters()], allow_unused=True)

    module = Mlp().double()
    x = data(2, 5, WIDTH, dtype=torch.float64).requires_grad_()
    expected = second_derivatives()
    sliced(module, 3)
    got = second_derivatives()
    assert [g is None for g in got] == [g is None for g in expected]
    assert_close([g for g in got if g is not None], [g for g in expected if g is not None], 1024)


def test_backward_twice_with_retain_graph():
    module = sliced(Mlp(dropout=0.2))
    x = data(2, 8, WIDTH).requires_grad_()
    loss = module(x).square().sum()
    inputs = [x, *module.parameters()]
    first = torch.autograd.grad(loss, inputs, retain_graph=True)
    assert all(map(torch.equal, first, torch.autograd.grad(loss, inputs)))


def test_frozen_unused_and_missing_gradients():
    module = Mlp()
    x = data(2, 8, WIDTH).requires_grad_()
    module.up.weight.requires_grad_(False)
    module.act.register_parameter("unused", nn.Parameter(torch.ones(1)))
    for inputs in (x, x.detach()):
        module.zero_grad()
        module(inputs).sum().backward()
        wanted = {n: None if p.grad is None else p.grad.clone() for n, p in named(module)}
        sliced(module)
        module.zero_grad()
        module(inputs).sum().backward()
        del module.forward
        assert [n for n, p in named(module) if p.grad is None] == ["up.weight", "act.unused"]
        pairs = [(p.grad, wanted[n]) for n, p in named(module) if p.grad is not None]
        assert_close(*zip(*pairs, strict=True))


def named(module):
    return list(module.named_parameters())


def test_functional_parameters_get_the_gradients():
    module = sliced(Mlp())
    other = {n: (p.detach() + 1).requires_grad_() for n, p in named(module)}
    x = data(2, 8, WIDTH)
    torch.func.functional_call(module, other, x).sum().backward()
    assert all(p.grad is None for p in module.parameters())
    assert all(p.grad is not None for p in other.values())


def test_changing_the_weights_before_backward_is_noticed():
    module = sliced(Mlp())
    loss = module(data(2, 8, WIDTH)).sum()
    with torch.no_grad():
        module.up.weight.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
def test_adapters_inside_a_sliced_module_train():
    peft = pytest.importorskip("peft")
    settings = peft.LoraConfig(r=2, target_modules=["up_proj", "down_proj"], lora_dropout=0.1,
                               init_lora_weights=False)  # fmt: skip
    model = peft.get_peft_model(model_of("llama"), settings).eval()
    ids = torch.randint(3, 61, (2, 9), generator=torch.Generator().manual_seed(0))
    trained = [p for p in model.parameters() if p.requires_grad]
    expected = torch.autograd.grad(model(input_ids=ids, labels=ids).loss, trained)
    ChunkedMlp().apply(model, ChunkedMlpConfig())
    assert_close(torch.autograd.grad(model(input_ids=ids, labels=ids).loss, trained), expected)


def test_hooks_of_data_parallel_training_fire_once_a_parameter():
    module = sliced(Mlp())
    fired = []
    for name, parameter in named(module):
        parameter.register_post_accumulate_grad_hook(lambda _, name=name: fired.append(name))
    module(data(2, 8, WIDTH)).sum().backward()
    assert sorted(fired) == sorted(name for name, _ in named(module))


def test_a_deepcopy_is_sliced_and_stands_alone():
    module = sliced(Mlp())
    x = data(2, 8, WIDTH)
    expected = module(x)
    twin = copy.deepcopy(module)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.zero_()
    assert torch.equal(twin(x), expected)
    assert inspect.signature(twin.forward) == inspect.signature(Mlp().forward)


# ---- bytes -------------------------------------------------------------------------------------


def measured(function, x):
    with Meter() as meter:
        function(x).sum().backward()
    return meter


def test_the_inside_exists_for_one_slice_at_a_time():
    rows, inner = 512, 256
    module = Mlp(inner=inner)
    x = data(1, rows, WIDTH).requires_grad_()
    plain = measured(module, x)
    cut = measured(sliced(module, 8), x)
    inside = rows * inner * 4
    assert plain.retained_bytes > 2 * inside
    assert cut.retained_bytes < 0.2 * inside
    assert cut.peak_bytes < plain.peak_bytes - 2 * inside


def test_the_peak_falls_inside_a_checkpoint_too():
    block = Block(inner=256)
    x = data(64, 8, WIDTH).requires_grad_()

    def run(x):
        return checkpoint(block, x, use_reentrant=False)

    plain = measured(run, x)
    slice_blocks([block], ChunkedMlpConfig(slices=8))
    assert measured(run, x).peak_bytes < plain.peak_bytes - 2 * 512 * 256 * 4


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_random_state_is_kept_only_where_something_draws(dropout):
    module = sliced(Mlp(dropout=dropout))
    x = data(1, 64, WIDTH).requires_grad_()
    module(x).sum().backward()
    held = module(x).grad_fn
    while not hasattr(held, "call"):
        held = held.next_functions[0][0]
    assert (held.call.random is not None) == (dropout > 0)


def test_fake_tensors_predict_the_same_peak():
    x = data(1, 64, WIDTH)
    real = measured(sliced(Mlp()), x)
    with FakeTensorMode():
        fake = measured(sliced(Mlp()), torch.empty(1, 64, WIDTH))
    assert fake.peak_bytes == real.peak_bytes
