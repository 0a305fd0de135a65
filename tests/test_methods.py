"""AdapterLinear: every method against its equation in plain PyTorch and, where there is one, PEFT's layer."""

import copy

import pytest
import torch
from cases import FORMATS
from method_cases import CASES, DTYPES, K, check, cut, equation, gradients, make_base, moved, trained
from peft import IA3Config, VeraConfig, get_peft_model
from peft_models import HIDDEN, WIDTH, Net, to_kind, unpacked
from tolerances import assert_as_exact
from torch import nn
from torch.nn import functional as F

from peft_fast import AdapterLinear, SharedFactors, formats


@pytest.mark.parametrize(("format", "dtype"), [("dense", torch.float32), ("nf4", torch.bfloat16)], ids=str)
@pytest.mark.parametrize(("method", "options"), CASES, ids=str)
def test_every_backend(backend, format, dtype, method, options):
    check(moved(AdapterLinear.from_linear(make_base(format, dtype), method, **options)), dtype, backend)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("method", "options"), CASES, ids=str)
def test_output_and_gradients_are_those_of_the_equation(format, dtype, bias, method, options):
    check(moved(AdapterLinear.from_linear(make_base(format, dtype, bias), method, **options)), dtype)


@pytest.mark.parametrize("act", ["relu", "gelu", "tanh", "silu"])
@pytest.mark.parametrize("bias", ["none", "down", "both"])
@pytest.mark.parametrize("method", ["parallel", "series"])
def test_every_activation_and_bias_of_the_bottlenecks(method, act, bias):
    check(moved(AdapterLinear.from_linear(make_base("nf4"), method, r=3, act=act, bias=bias)), torch.float32)


@pytest.mark.parametrize(("method", "name"), [("ia3", "ia3_l"), ("ssf", "ssf_scale")])
def test_a_scale_of_zero_keeps_its_gradient(kind, method, name):
    layer = moved(AdapterLinear.from_linear(make_base(kind), method))
    with torch.no_grad():
        getattr(layer, name)[::3] = 0.0
    check(layer, torch.float32)


@pytest.mark.parametrize("method", ["vera", "s2lora", "kadaptation"])
def test_dropout_drops_the_input_of_the_low_rank_branch(method):
    layer = moved(AdapterLinear.from_linear(make_base("nf4"), method, dropout=0.4))
    x = torch.randn(2, 9, K)
    base = F.linear(x, formats.from_linear(layer.base_layer).decode(x.dtype), layer.base_layer.bias)
    torch.manual_seed(3)
    y = layer(x)
    torch.manual_seed(3)
    dropped = F.dropout(x, 0.4)
    # The added part is linear in its input and has no other.
    added = equation(layer, dropped, trained(layer), torch.float32) - F.linear(
        dropped, formats.from_linear(layer.base_layer).decode(x.dtype), layer.base_layer.bias
    )
    torch.testing.assert_close(y, base + added, rtol=1e-4, atol=1e-4)
    layer.eval()
    torch.testing.assert_close(layer(x), equation(layer, x, trained(layer), x.dtype), rtol=1e-4, atol=1e-4)


# ------------------------------------------------------------------------------------------- against PEFT


def ours_on(stock: nn.Module, method: str, options, shared: SharedFactors | None = None) -> nn.Module:
    """`Net` over copies of a PEFT model's base layers."""
    net = copy.deepcopy(stock.base_model.model)
    for name in ("up", "down"):
        base = getattr(net, name).base_layer
        setattr(net, name, AdapterLinear.from_linear(base, method, shared=shared, **options(name)))
    return net


def as_exact_as_peft(stock: nn.Module, ours: nn.Module, method: str, names: dict[str, str], dtype) -> None:
    """Each layer, by itself on the same input: PEFT's is the plain one, the equation in fp64 the truth."""
    for where in ("up", "down"):
        theirs, layer = getattr(stock.base_model.model, where), getattr(ours, where)
        x, grad = torch.randn(2, 9, layer.in_features), torch.randn(2, 9, layer.out_features)
        x, grad = x.to(dtype).requires_grad_(), grad.to(dtype)
        p = {name: getattr(theirs, peft)["default"] for name, peft in names.items()}
        # PEFT's IA3 on a Linear4bit returns float32 for a half x.
        plain = gradients(lambda x, _, theirs=theirs: theirs(x).to(x.dtype), x, p, grad)
        got = gradients(lambda x, _, layer=layer: layer(x), x, {n: getattr(layer, n) for n in names}, grad)
        exact = {name: t.detach().double().requires_grad_() for name, t in p.items()}
        x64 = x.detach().double().requires_grad_()
        truth = gradients(
            lambda x, p, layer=layer: equation(layer, x, p, torch.float64), x64, exact, grad.double()
        )
        for name in truth:
            assert_as_exact(f"{method} {where} {name}", got[name], plain[name], truth[name])


def copy_parameters(stock: nn.Module, ours: nn.Module, names: dict[str, str], noise: float) -> None:
    """Starts equal, as PEFT initialises; then both move by the same noise."""
    for where in ("up", "down"):
        for name, peft in names.items():
            theirs = getattr(getattr(stock.base_model.model, where), peft)["default"]
            mine = getattr(getattr(ours, where), name)
            assert torch.equal(mine, theirs), f"{where}.{name}"
            with torch.no_grad():
                theirs.add_(noise * torch.randn_like(theirs))
                mine.copy_(theirs)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_vera_is_pefts(kind, dtype):
    options = {"r": 6, "d_initial": 0.25, "projection_prng_key": 17}
    config = VeraConfig(target_modules=["up", "down"], vera_dropout=0.0, **options)
    stock = unpacked(get_peft_model(to_kind(Net(), kind, dtype), config, autocast_adapter_dtype=False))
    shared = SharedFactors("vera", HIDDEN, HIDDEN, **options)
    for name in ("vera_A", "vera_B"):
        theirs = getattr(stock.base_model, name)
        assert torch.equal(getattr(shared, name).to(dtype), theirs["default"])
        theirs["default"] = getattr(shared, name)  # PEFT rounds them to the dtype of the model
    ours = ours_on(stock, "vera", lambda _: options, shared)
    names = {"vera_lambda_b": "vera_lambda_b", "vera_lambda_d": "vera_lambda_d"}
    for layer in (stock.base_model.model.up, stock.base_model.model.down):
        layer.requires_grad_(False)
        for name in names:
            getattr(layer, name)["default"].data = getattr(layer, name)["default"].data.float()
            getattr(layer, name)["default"].requires_grad_()
    copy_parameters(stock, ours, names, 0.5)
    as_exact_as_peft(stock, ours, "vera", names, dtype)


def test_vera_draws_pefts_dropout_mask(kind):
    options = {"r": 6, "projection_prng_key": 3}
    config = VeraConfig(target_modules=["up", "down"], vera_dropout=0.3, **options)
    stock = unpacked(get_peft_model(to_kind(Net(), kind), config)).train()
    shared = SharedFactors("vera", HIDDEN, HIDDEN, **options)
    ours = ours_on(stock, "vera", lambda _: {**options, "dropout": 0.3}, shared).train()
    copy_parameters(stock, ours, {"vera_lambda_b": "vera_lambda_b", "vera_lambda_d": "vera_lambda_d"}, 1.0)
    x = torch.randn(3, WIDTH)
    results = []
    for model in (stock, ours):
        torch.manual_seed(5)
        results.append(model(x))
    torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_ia3_is_pefts_on_both_sides(kind, dtype):
    config = IA3Config(target_modules=["up", "down"], feedforward_modules=["down"])
    stock = unpacked(get_peft_model(to_kind(Net(), kind, dtype), config, autocast_adapter_dtype=False))
    ours = ours_on(stock, "ia3", lambda name: {"feedforward": name == "down"})
    for layer in (stock.base_model.model.up, stock.base_model.model.down):
        layer.ia3_l["default"].data = layer.ia3_l["default"].data.float()
    copy_parameters(stock, ours, {"ia3_l": "ia3_l"}, 0.5)
    as_exact_as_peft(stock, ours, "ia3", {"ia3_l": "ia3_l"}, dtype)


# ------------------------------------------------------------------------------------------------ sharing


@pytest.mark.parametrize("method", ["vera", "s2lora", "kadaptation"])
def test_shared_factors_are_one_in_memory_and_in_copies(method):
    shared = SharedFactors(method, HIDDEN, HIDDEN)
    net = nn.Sequential(
        AdapterLinear.from_linear(nn.Linear(WIDTH, HIDDEN), method, shared=shared),
        AdapterLinear.from_linear(nn.Linear(HIDDEN, WIDTH), method, shared=shared),
    )
    for model in (net, copy.deepcopy(net)):
        first, second = (list(layer.shared.state_dict().values()) for layer in model)
        assert [t.data_ptr() for t in first] == [t.data_ptr() for t in second]
    once = {id(p) for p in shared.parameters()}
    assert sum(id(p) in once for p in net.parameters()) == len(once)
    for layer in net:
        moved(layer)
    net.double()
    x = torch.randn(4, WIDTH, requires_grad=True, dtype=torch.float64)
    leaves = [x, *trained(net).values()]
    got = torch.autograd.grad(net(x).square().mean(), leaves)
    y = x
    for layer in net:
        factors = {f"shared.{name}": t for name, t in cut(layer).items()}
        y = equation(layer, y, {**trained(layer), **factors}, torch.float64)
    torch.testing.assert_close(got, torch.autograd.grad(y.square().mean(), leaves))


def test_kadaptations_rules_start_at_the_size_that_keeps_a_vectors():
    """A [terms, n, n] with standard deviation 1/√n, so that A·v is as long as v."""
    torch.manual_seed(0)
    for n in (4, 16):
        rules = SharedFactors("kadaptation", 64, 64, n=n, terms=256).kron_A
        assert abs(rules.std().item() * n**0.5 - 1) < 0.05
        assert abs(rules.mean().item()) < 0.02


def test_s2lora_coefficients_below_the_threshold_are_out():
    layer = moved(AdapterLinear.from_linear(make_base("nf4"), "s2lora", r=4, threshold=0.2))
    with torch.no_grad():
        layer.s2_lambda.copy_(torch.tensor([0.19, -0.19, 1.0, -1.0]))
    layer(torch.randn(3, K)).square().sum().backward()
    assert layer.s2_lambda.grad[:2].eq(0).all()
    assert layer.s2_lambda.grad[2:].ne(0).all()
    assert layer.shared.s2_B.grad[:, :2].eq(0).all()
    assert layer.shared.s2_B.grad[:, 2:].ne(0).any()
