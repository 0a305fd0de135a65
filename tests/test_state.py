"""Whatever is done with a model: its base's bytes, its adapter's and what it computes stay as they were."""

from __future__ import annotations

import concurrent.futures
import contextlib
import copy
import io
import os
import signal
import time
from collections.abc import Callable

import pytest
import torch
from peft_models import KINDS, WIDTH, lora_layers
from state_models import MODELS, digest, frozen, model_inputs, set_backend
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, Dataset

from peft_fast import accelerate, native, restore

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]

every_model = pytest.mark.parametrize(
    ("method", "kind"), [pytest.param(m, k, id=f"{m}-{k}") for m in MODELS for k in KINDS]
)


def trained(model: nn.Module) -> dict[str, Tensor]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def gradients(model: nn.Module, x: Tensor, seed: int = 5) -> dict[str, Tensor]:
    """Output, dX and every gradient, with dropout masks and a grad_output of one seed."""
    x = x.detach().clone().requires_grad_()
    torch.manual_seed(seed)
    y = model(x)
    leaves = trained(model)
    found = torch.autograd.grad(y, [x, *leaves.values()], torch.randn(y.shape).to(y))
    return {"y": y.detach(), **dict(zip(("dx", *leaves), found, strict=True))}


def observed(model: nn.Module) -> dict[str, object]:
    """What a model is and does, bit for bit."""
    with torch.random.fork_rng(devices=[]):
        modes = {name: module.training for name, module in model.named_modules()}
        return {
            "base": digest(frozen(model)),
            "adapter": digest(trained(model)),
            "modes": modes,
            "computes": digest(gradients(model, fixed_inputs())),
        }


def fixed_inputs(rows: int = 15) -> Tensor:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(9)
        return model_inputs(rows)


def evaluated(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return model(x)


def threads() -> concurrent.futures.ThreadPoolExecutor:
    """Eight of one thread each, as this one is: PyTorch's own GEMM rounds by the number of threads."""
    return concurrent.futures.ThreadPoolExecutor(8, initializer=torch.set_num_threads, initargs=(1,))


# --------------------------------------------------------------------------------- what is done with a model


def alternated(model: nn.Module) -> None:
    """Training and evaluation in turn: each gives the same bits every time."""
    x, seen = fixed_inputs(), []
    for _ in range(4):
        model.eval()
        with torch.inference_mode():
            alone = model(x)
        results = {"eval": evaluated(model, x), "inference": alone.clone(), **gradients(model, x)}
        model.train()
        results |= {f"train {name}": t for name, t in gradients(model, x).items()}
        seen.append(digest(results))
    assert all(results == seen[0] for results in seen)
    assert seen[0]["eval"] == seen[0]["inference"] == seen[0]["y"]


def trained_and_put_back(model: nn.Module) -> None:
    """With an optimizer that is given everything, and weight decay."""
    before = {name: t.detach().clone() for name, t in trained(model).items()}
    floating = [p for p in model.parameters() if p.is_floating_point()]
    optimizer = torch.optim.AdamW(floating, lr=1e-2, weight_decay=0.1)
    for _ in range(3):
        model(fixed_inputs()).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        for name, parameter in trained(model).items():
            assert not torch.equal(parameter, before[name]), name
            parameter.copy_(before[name])


def saved_in_every_state(model: nn.Module) -> None:
    """The bytes of the state dict are the same in all of them."""
    x = fixed_inputs()
    expected = digest(model.state_dict())
    states: list[Callable[[], contextlib.AbstractContextManager]] = [
        contextlib.nullcontext,
        torch.no_grad,
        torch.inference_mode,
        lambda: torch.autocast("cpu", torch.bfloat16),
        torch.autograd.graph.save_on_cpu,
        lambda: torch.random.fork_rng(devices=[]),
    ]
    for training in (True, False):
        model.train(training)
        for state in states:
            with state():
                assert digest(model.state_dict()) == expected
                y = model(x)
                assert digest(model.state_dict()) == expected
            if y.requires_grad:
                y.sum().backward()  # with the graph of that state
                model.zero_grad()
    model.train()


def written_and_read(model: nn.Module) -> None:
    """A file of a state dict, read back into what is trained."""
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    stored = torch.load(file, weights_only=True)
    with torch.no_grad():
        for name, parameter in trained(model).items():
            parameter.zero_()
            parameter.copy_(stored[name])


def copied(model: nn.Module) -> None:
    """A copy computes the same bits, and training it is nothing to the original."""
    before = observed(model)
    twin = copy.deepcopy(model)
    assert observed(twin) == before
    ours = {t.data_ptr() for t in (*frozen(model).values(), *trained(model).values()) if t.numel()}
    theirs = {t.data_ptr() for t in (*frozen(twin).values(), *trained(twin).values()) if t.numel()}
    assert not ours & theirs
    optimizer = torch.optim.SGD(trained(twin).values(), lr=0.1)
    twin(fixed_inputs()).square().mean().backward()
    optimizer.step()
    assert observed(twin)["adapter"] != before["adapter"]
    assert observed(twin)["base"] == before["base"]


def in_autocast(model: nn.Module) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        model(fixed_inputs()).float().square().mean().backward()
    model.zero_grad()


def checkpointed(model: nn.Module) -> None:
    for reentrant in (False, True):
        x = fixed_inputs().requires_grad_()
        checkpoint(model, x, use_reentrant=reentrant).square().mean().backward()
    model.zero_grad()


def called_wrongly(model: nn.Module) -> None:
    """Refused calls, in training and evaluation."""
    for training in (True, False):
        model.train(training)
        for x in (torch.randn(3, 5, WIDTH + 1), torch.randn(3, 5, 0), torch.randn(WIDTH, 3)):
            with pytest.raises((RuntimeError, ValueError, TypeError)):
                model(x)
    model.train()


def broken_off(model: nn.Module) -> None:
    """An error inside the backward pass, and a graph that nobody goes back through."""
    x = fixed_inputs().requires_grad_()
    h = x * 1.0

    def fail(_: Tensor) -> None:
        raise KeyboardInterrupt

    h.register_hook(fail)
    with pytest.raises(KeyboardInterrupt):
        model(h).sum().backward()
    model.zero_grad()
    model(fixed_inputs().requires_grad_())


def without_rows(model: nn.Module) -> None:
    if any(hasattr(module, "config") for module in model.modules()):
        return  # a language model has no answer to no tokens
    gradients(model, torch.empty(0, WIDTH))


def moved_about(model: nn.Module) -> None:
    """Moves and casts to where and what everything already is."""
    model.to("cpu").float().to(torch.float32)
    model.apply(lambda module: None)
    model.share_memory()


def swapped_back_and_forth(model: nn.Module) -> None:
    """`restore` gives stock PEFT its layers back; nothing of the weights was touched meanwhile."""
    if not lora_layers(model):
        return
    restore(model)
    for module in model.modules():  # stock bitsandbytes itself may repack in an eval forward
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    evaluated(model, fixed_inputs())
    accelerate(model, strict=True)


def disabled(model: nn.Module) -> None:
    """Through an error, too; what is saved meanwhile is the same."""
    if not hasattr(model, "disable_adapter"):
        return
    expected = digest(model.state_dict())

    def fail() -> None:
        with model.disable_adapter():
            model(fixed_inputs())
            assert digest(model.state_dict()) == expected
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    with model.disable_adapter(), torch.no_grad():
        model.eval()
        model(fixed_inputs())
    model.train()


def eight_threads(model: nn.Module) -> None:
    """Inference and gradients in eight threads at once are those of one after the other."""
    model.eval()
    batches = [fixed_inputs(3 * rows) for rows in (1, 2, 3, 5, 8, 13, 21, 34)]

    def both(x: Tensor) -> dict[str, str]:
        leaves = trained(model)
        x = x.clone().requires_grad_()
        y = model(x)
        found = torch.autograd.grad(y.square().sum(), [x, *leaves.values()])
        return digest({"y": evaluated(model, x), **dict(zip(("dx", *leaves), found, strict=True))})

    expected = [both(x) for x in batches]
    with threads() as pool:
        assert list(pool.map(both, batches * 3)) == expected * 3
    model.train()


ACTIONS: tuple[Callable[[nn.Module], None], ...] = (
    alternated,
    trained_and_put_back,
    saved_in_every_state,
    written_and_read,
    copied,
    in_autocast,
    checkpointed,
    called_wrongly,
    broken_off,
    without_rows,
    moved_about,
    swapped_back_and_forth,
    disabled,
    eight_threads,
)


@every_model
def test_nothing_changes_a_model_that_is_not_trained(method, kind):
    """Every action, one after the other on one model."""
    model = MODELS[method](kind).train()
    before = observed(model)
    assert any(name.endswith("state.state.absmax") for name in before["base"]) == (kind == "nf4")
    for action in ACTIONS:
        action(model)
        model.zero_grad()
        after = observed(model)
        for what in before:
            assert after[what] == before[what], f"{action.__name__}: {what}"


# ---------------------------------------------------------------------------------------- every backend


@pytest.mark.parametrize("backend", [*(f"cpu-{level}" for level in native.levels()), "reference"])
@every_model
def test_eight_threads_on_one_model(backend, method, kind):
    """One after the other or at once: the same bits, at every level."""
    model = set_backend(MODELS[method](kind).eval(), backend)
    base = digest(frozen(model))
    batches = [fixed_inputs(3 * (i + 1)) for i in range(8)]
    expected = digest({str(i): evaluated(model, x) for i, x in enumerate(batches)})
    with threads() as pool:
        outputs = list(pool.map(lambda x: evaluated(model, x), batches * 2))
    got = [digest({str(i % 8): y}) for i, y in enumerate(outputs)]
    assert got == [{name: value} for name, value in expected.items()] * 2
    assert digest(frozen(model)) == base


# ------------------------------------------------------------------------------------------- processes


def in_a_fork(function: Callable[[], bytes], deadline: float = 60.0) -> bytes:
    """What `function` returns in a forked process; an end by signal, an error or a hang is a failure."""
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            os.write(write, function())
            status = 0
        finally:
            os._exit(status)
    os.close(write)
    until = time.monotonic() + deadline
    while not (ended := os.waitpid(pid, os.WNOHANG))[0] and time.monotonic() < until:
        time.sleep(0.01)
    if not ended[0]:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    with os.fdopen(read, "rb") as file:
        result = file.read()
    assert ended[0], "the child hangs"
    assert ended[1] == 0, f"the child ended with status {ended[1]}"
    return result


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", ["peft-dora", "loreft-model", "vera"])
def test_a_forked_process_computes_the_same(method, kind):
    """After this process has used two threads: a child on one, as PyTorch itself needs after a fork."""
    model = MODELS[method](kind).eval()
    x = fixed_inputs(96)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        expected = digest(gradients(model, x))
        base = digest(frozen(model))

        def child() -> bytes:
            torch.set_num_threads(1)
            return repr((digest(gradients(model, x)), digest(frozen(model)))).encode()

        assert in_a_fork(child) == repr((expected, base)).encode()
        assert digest(gradients(model, x)) == expected
    finally:
        torch.set_num_threads(threads)


class Features(Dataset):
    """Examples that a model in the workers makes: it came there by fork."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        x = torch.randn(3, 4, WIDTH, generator=torch.Generator().manual_seed(index))
        return x, evaluated(self.model, x)


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
@pytest.mark.parametrize("method", ["peft-lora", "loreft-linear", "dora"])
def test_workers_of_a_data_loader_beside_a_model(method, kind):
    """It trains here while copies of it run in two workers; they see what it was when they were forked."""
    model = MODELS[method](kind)
    model.eval()
    alone = [Features(model)[i] for i in range(8)]
    model.train()
    base = digest(frozen(model))
    optimizer = torch.optim.SGD(trained(model).values(), lr=1e-2)
    features = Features(copy.deepcopy(model).eval())
    for i, (x, y) in enumerate(DataLoader(features, batch_size=None, num_workers=2)):
        assert digest({"x": x, "y": y}) == digest({"x": alone[i][0], "y": alone[i][1]})
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert digest(frozen(model)) == base
