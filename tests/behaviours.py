"""A registry of what PEFT can do around an adapted layer, each a function that goes through it.

A behaviour gets a `Run`: a model, stock or accelerated, and the place to show what came of it. It is the same
code for both, so that whatever it shows of an accelerated model can be compared with what stock PEFT showed,
errors included. At each step it also says what the accelerated layers have to run, and the call counter and
`explain` are held to it.
"""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from peft import PeftModel
from peft_models import (
    adapted_layers,
    dora_net,
    fused_calls,
    inputs,
    lora_config,
    move_vectors,
    rescale,
    stock_net,
    vector_config,
    vector_net,
)
from tolerances import FLOOR, relative_error
from torch import Tensor, nn

from peft_fast import explain
from peft_fast.base_layers import FusedBase
from peft_fast.peft_layers import METHODS, STOCK, fused_kind

LOW_RANK = ("lora", "dora")
VECTORS = ("vera", "ia3")

FUSED = "fused"
"""The adapter is in the fused op."""
BASE = "the base alone"
"""The base alone is: for a 4-bit one in the fused op, for a dense one as PEFT calls it."""
STOCK_LAYER = "accelerate(model) would fuse it"
"""PEFT put the layer there after the swap."""

AGREEMENT = 4.0
"""Two computations agree within this many roundings of the coarsest dtype in them."""


class Behaviour(NamedTuple):
    go: Callable[[Run], None]
    build: Callable[..., nn.Module]
    raises: dict[str, str]
    fails: dict[str, str]
    left: str | None
    methods: tuple[str, ...]

    def of(self, texts: dict[str, str], kind: str, method: str) -> str | None:
        """The text of `raises` or `fails` for one cell of the matrix."""
        return next((texts[key] for key in (f"{kind}-{method}", kind, method) if key in texts), None)


BEHAVIOURS: dict[str, Behaviour] = {}


def behaviour(
    build: Callable[[str, str], nn.Module] | None = None,
    *,
    raises: dict[str, str] | None = None,
    fails: dict[str, str] | None = None,
    left: str | None = None,
    methods: tuple[str, ...] = LOW_RANK,
    **options: Any,
) -> Callable[[Callable[[Run], None]], Callable[[Run], None]]:
    """Registers a behaviour under its function's name.

    Args:
        build: makes the stock model from kind and method; by default `small_net`, with `options`.
        raises: what stock PEFT answers where it refuses, by kind, by method, or by both as "nf4-dora".
        fails: the same where it breaks and an accelerated model does not.
        left: the reason why `accelerate` leaves some layers as they are.
        methods: of `METHODS`, those that can go through it.
    """

    def register(go: Callable[[Run], None]) -> Callable[[Run], None]:
        name = go.__name__.replace("_", "-")
        assert name not in BEHAVIOURS, name
        assert set(methods) <= set(METHODS), name
        BEHAVIOURS[name] = Behaviour(
            go, build or functools.partial(small_net, **options), raises or {}, fails or {}, left, methods
        )
        return go

    return register


def small_net(kind: str, method: str, **options: Any) -> nn.Module:
    if method in VECTORS:
        return vector_net(kind, method, **options)
    return (stock_net if method == "lora" else dora_net)(kind, **options)


class Run:
    """A model on its way through a behaviour, and what it showed there."""

    def __init__(self, model: nn.Module, kind: str, method: str, *, fast: bool) -> None:
        self.model: Any = model
        self.kind, self.method, self.fast = kind, method, fast
        self.shown: dict[str, Any] = {}
        self.rounding = torch.float32
        """The coarsest dtype that is computed in now; what is shown is compared by it."""

    def show(self, name: str, value: Any) -> None:
        """Keeps a value for the comparison: tensors, and lists and dicts of them, as they are now."""
        self.shown[f"{len(self.shown)} {name}"] = (frozen(value), self.rounding)

    def config(self, **options: Any) -> Any:
        """Of another adapter, by the method of the matrix."""
        if self.method in VECTORS:
            return vector_config(self.method, **options)
        return lora_config(**{"r": 3, "lora_alpha": 5, "use_dora": self.method == "dora", **options})

    def add(self, name: str, model: Any = None, **options: Any) -> None:
        """Adds an adapter, with magnitudes that differ from the norms, and vectors from their start."""
        torch.manual_seed(3)
        (model or self.model).add_adapter(name, self.config(**options))
        move_vectors(self.model, name)
        for layer in adapted_layers(self.model):
            if name in getattr(layer, "lora_magnitude_vector", ()):
                rescale(layer, name)

    def refused(self, action: Callable[[], Any]) -> None:
        """An action that stock PEFT refuses; shows how."""
        try:
            action()
        except Exception as error:
            self.show("refused", said(error))
        else:
            raise AssertionError("expected PEFT to refuse")

    def tried(self, action: Callable[[], Any]) -> bool:
        """Whether PEFT does it; shows how it refuses where it does not."""
        try:
            action()
        except Exception as error:
            self.show("refused", said(error))
            return False
        return True

    def step(
        self,
        path: str | tuple[str, ...] = FUSED,
        *,
        call: Callable[[Tensor], Tensor] | None = None,
        x: Tensor | None = None,
        grad: bool = True,
        times: int = 1,
    ) -> None:
        """A forward, and a backward with a gradient that is not uniform; shows y, dX and every gradient.

        Args:
            path: what the adapted layers run, or each of them: FUSED, BASE, or a part of the reason why
                PEFT's own forward does.
            call: computes y [..., WIDTH] from x; the model by default.
            x: [..., WIDTH]; [3, 5, WIDTH] by default.
            grad: whether there is a backward.
            times: how often `call` calls each layer.
        """
        torch.manual_seed(11)
        x = (inputs() if x is None else x).detach().requires_grad_(grad)
        expected = times * self.expect(path)
        before = fused_calls()
        with torch.set_grad_enabled(grad):
            y = (call or self.model)(x)
        calls = fused_calls() - before
        if self.fast and expected and "dora adapter" in explain(self.model):
            assert calls >= expected  # a norm, and with dropout the base once more, are calls of the same op
        elif self.fast:
            assert calls == expected
        self.show("y", y)
        if grad:
            leaves = {"dx": x} | {n: p for n, p in self.model.named_parameters() if p.requires_grad}
            torch.manual_seed(12)
            # Drawn in fp32 and rounded to half, so that every dtype sees the same values.
            dy = torch.randn(y.shape).bfloat16().to(y.dtype)
            grads = torch.autograd.grad(y, list(leaves.values()), dy, allow_unused=True)
            self.show("gradients", dict(zip(leaves, grads, strict=True)))

    def expect(self, path: str | tuple[str, ...]) -> int:
        """How many layers run the fused op at a forward now; checks that `explain` says of each `path`."""
        if not self.fast:
            return 0
        layers = adapted_layers(self.model)
        paths = (path,) * len(layers) if isinstance(path, str) else path
        fused = [m for m in self.model.modules() if isinstance(m, FusedBase)]
        for layer, wanted in zip(layers, paths, strict=True):
            text = explain(layer)
            if wanted == FUSED:
                kind: Any = fused_kind(layer)
                held = getattr(layer, kind.adapters)
                active = [name for name in layer.active_adapters if name in held]
                named = f"adapter {active[0]!r}" if len(active) == 1 else f"adapters {active}"
                assert f"{kind.method(layer, active[0])} {named}" in text, text
            elif wanted == BASE and type(layer) in STOCK:
                assert (BASE if self.kind == "nf4" else "PEFT's own forward") in text, text
            elif wanted != BASE:
                assert "PEFT's own forward" in text, text
                assert wanted in text, text
            if "lora_linear over" in text:
                fused = [m for m in fused if m is not layer.base_layer] + [layer]
        return len(fused)


def go_through(behaviour: Behaviour, run: Run) -> str | None:
    """Runs a behaviour and shows the state it leaves. Returns what it raised, if it did."""
    torch.manual_seed(0)
    try:
        behaviour.go(run)
    except AssertionError:
        raise
    except Exception as error:
        return said(error)
    run.show("state", run.model.state_dict())
    run.show("trained", [name for name, p in run.model.named_parameters() if p.requires_grad])
    run.show("training", [(name, module.training) for name, module in run.model.named_modules()])
    if isinstance(run.model, PeftModel) and adapted_layers(run.model):
        status = [vars(status) for status in run.model.get_layer_status()]
        # The one thing that may tell: an accelerated layer's name.
        run.show("status", [{**s, "module_type": s["module_type"].replace("Fused", "")} for s in status])
        run.show("trained parameters", run.model.get_nb_trainable_parameters()[0])
    return None


def said(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


def frozen(value: Any) -> Any:
    """A copy of what was shown, independent of what the model does later."""
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, dict):
        return {name: frozen(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [frozen(item) for item in value]
    return copy.deepcopy(value)


def assert_same(where: str, got: Any, expected: Any, rounding: torch.dtype = torch.float32) -> None:
    """`got` is `expected`: floats within the roundings of their dtype and of `rounding`, all else exactly."""
    if isinstance(expected, Tensor):
        assert isinstance(got, Tensor), where
        assert (got.shape, got.dtype, got.device) == (expected.shape, expected.dtype, expected.device), where
        if expected.dtype in FLOOR and expected.device.type != "meta":
            finite = expected.isfinite()
            assert torch.equal(got.isfinite(), finite), where
            error = relative_error(got[finite], expected[finite])
            bound = AGREEMENT * max(FLOOR[expected.dtype], FLOOR[rounding])
            assert error <= bound, f"{where}: relative difference {error:.2e}, allowed {bound:.2e}"
        elif expected.device.type != "meta":
            assert torch.equal(got, expected), where
    elif isinstance(expected, dict):
        assert list(got) == list(expected), where
        for name, item in expected.items():
            assert_same(f"{where}: {name}", got[name], item, rounding)
    elif isinstance(expected, list):
        assert len(got) == len(expected), where
        for i, item in enumerate(expected):
            assert_same(f"{where}[{i}]", got[i], item, rounding)
    else:
        assert got == expected, f"{where}: expected {expected}, got {got}"


@contextlib.contextmanager
def each_layer(model: nn.Module, set_up: Callable[[Any], Any]) -> Iterator[None]:
    """`set_up` of every adapted layer, whose handle is removed at the end."""
    handles = [set_up(layer) for layer in adapted_layers(model)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
