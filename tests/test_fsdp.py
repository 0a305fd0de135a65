"""FSDP2: two processes with sharded parameters compute what one does, over every kind of base."""

from __future__ import annotations

import functools
import runpy
from pathlib import Path
from typing import Any

import pytest
import torch
from distributed import (
    BASES,
    METHODS,
    WORLD,
    Difference,
    Step,
    batches,
    difference,
    make_base,
    make_model,
    raw_results,
    results,
    rows_of,
    run_cases,
    train,
)
from peft import PeftModel
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    set_model_state_dict,
)
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from peft_fast import ReftModel, accelerate, backends

EXAMPLE = Path(__file__).parent.parent / "examples" / "fsdp2.py"
NESTED = "nf4-nested"
TRAINED_ONLY = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)
BF16 = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)

UNITS = {
    "blocks": lambda model: [],
    "linears": lambda model: [m for name, m in model.named_modules() if name.endswith("_proj")],
    "adapters": lambda model: [
        part
        for module in model.modules()
        for name in ("lora_A", "lora_B", "lora_magnitude_vector", "reft")
        for part in (module._modules.get(name) or nn.ModuleDict()).values()
    ],
}


def shard(model: nn.Module, units: str = "blocks", **options: Any) -> nn.Module:
    """`fully_shard` of the units, then of each block, then of the rest."""
    blocks = next(m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == 2)
    for unit in (*UNITS[units](model), *blocks, model):
        fully_shard(unit, **options)
    assert all(isinstance(p, DTensor) for p in model.parameters())
    return model


def fused_calls() -> int:
    return sum(count for (op, _), count in backends.calls.items() if op in ("lora_linear", "loreft"))


def trained_in_shards(
    method: str,
    kind: str,
    rank: int,
    folder: str,
    *,
    units: str = "blocks",
    fast: bool = True,
    **options: Any,
) -> dict[str, Any]:
    model = shard(make_model(method, kind, fast=fast), units, **options)
    before = fused_calls()
    return {"steps": train(model, rows_of(rank)), "fused": fused_calls() - before}


def checkpointed(method: str, kind: str, rank: int, folder: str) -> dict[str, Any]:
    model = make_model(method, kind)
    model.gradient_checkpointing_enable()
    before = fused_calls()
    return {"steps": train(shard(model), rows_of(rank)), "fused": fused_calls() - before}


def saved(method: str, kind: str, rank: int, folder: str) -> dict[str, Any]:
    """Trained, gathered from shards and saved as an adapter; the logits that were."""
    model = shard(make_model(method, kind))
    before = fused_calls()
    got = {"steps": train(model, rows_of(rank)), "fused": fused_calls() - before}
    state = get_model_state_dict(model, options=TRAINED_ONLY)
    if rank == 0:
        model.save_pretrained(f"{folder}/saved-{method}-{kind}", state_dict=state)
    with torch.no_grad():
        got["logits"] = model(input_ids=next(iter(batches(slice(None))))).logits
    return got


def loaded(method: str, kind: str, rank: int, folder: str) -> dict[str, Any]:
    """Evaluated before and after other values were loaded into the shards: no norm of the first is kept."""
    model = shard(make_model(method, kind).eval())
    ids = next(iter(batches(slice(None))))
    with torch.no_grad():
        before = model(input_ids=ids).logits
        state = get_model_state_dict(model, options=TRAINED_ONLY)
        trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        other = {name: 1.5 * tensor if name in trained else tensor for name, tensor in state.items()}
        options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True, strict=False)
        set_model_state_dict(model, other, options=options)
        after = model(input_ids=ids).logits
    return {"before": before, "after": after}


def accelerated_late(method: str, kind: str, rank: int, folder: str) -> dict[str, Any]:
    model = shard(make_model(method, kind, fast=False))
    report = accelerate(model)
    return {"steps": train(model, rows_of(rank)), "left": [row.reason for row in report.left]}


def cast_storage(policy: torch.dtype, kind: str, rank: int, folder: str) -> None:
    model = shard(make_model("lora", kind), mp_policy=MixedPrecisionPolicy(param_dtype=policy))
    ids = next(iter(batches(rows_of(rank))))
    model(input_ids=ids)


def run_example(rank: int, folder: str) -> list[float]:
    return runpy.run_path(str(EXAMPLE))["train_and_save"](f"{folder}/example", 20, torch.device("cpu"))


def make_cases() -> dict[str, Any]:
    part = functools.partial
    cases: dict[str, Any] = {}
    for method in METHODS:
        for kind in BASES:
            cases[f"blocks-{method}-{kind}"] = part(saved, method, kind)
        for kind in ("dense", NESTED):
            cases[f"adapters-{method}-{kind}"] = part(trained_in_shards, method, kind, units="adapters")
        cases[f"linears-{method}"] = part(trained_in_shards, method, NESTED, units="linears")
        cases[f"gathered-{method}"] = part(trained_in_shards, method, NESTED, reshard_after_forward=False)
        cases[f"checkpointed-{method}"] = part(checkpointed, method, NESTED)
        cases[f"loaded-{method}"] = part(loaded, method, NESTED)
        for kind in ("dense", "nf4-bf16"):
            cases[f"bf16-{method}-{kind}"] = part(trained_in_shards, method, kind, mp_policy=BF16)
            if method != "loreft":
                cases[f"stock-{method}-{kind}"] = part(
                    trained_in_shards, method, kind, fast=False, mp_policy=BF16
                )
    for method in ("lora", "dora"):
        cases[f"late-{method}"] = part(accelerated_late, method, NESTED)
    cases["example"] = run_example
    cases["cast-fp32"] = part(cast_storage, torch.bfloat16, "nf4-fp32")
    cases["cast-bf16"] = part(cast_storage, torch.float16, "nf4-bf16")
    return cases


def run_process(rank: int, folder: str) -> None:
    run_cases(make_cases(), rank, folder)


@functools.cache
def alone(method: str, kind: str) -> list[Step]:
    return train(make_model(method, kind), slice(None))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("fsdp")
    torch.multiprocessing.spawn(run_process, (str(folder),), nprocs=WORLD)
    return folder


def check_as_alone(got: list[dict[str, Any]], method: str, kind: str) -> None:
    expected = alone(method, kind)
    found = difference([result["steps"] for result in got], expected)
    print(found)
    assert found.loss <= 1e-5, found
    assert found.trained <= 1e-5, found
    assert found.grads <= 5e-5, found
    first, last = expected[0].trained, expected[-1].trained
    assert all(not torch.equal(first[name], last[name]) for name in first)


@pytest.mark.parametrize("kind", BASES)
@pytest.mark.parametrize("method", METHODS)
def test_sharded_blocks_train_as_one_process(method, kind, folder):
    got = results(folder, f"blocks-{method}-{kind}")
    check_as_alone(got, method, kind)
    assert all(result["fused"] for result in got)


@pytest.mark.parametrize("kind", BASES)
@pytest.mark.parametrize("method", METHODS)
def test_an_adapter_saved_from_shards_loads_in_one_process(method, kind, folder):
    saved = folder / f"saved-{method}-{kind}"
    load = ReftModel if method == "loreft" else PeftModel
    model = load.from_pretrained(make_base(kind), saved).eval()
    with torch.no_grad():
        logits = model(input_ids=next(iter(batches(slice(None))))).logits
    for result in results(folder, f"blocks-{method}-{kind}"):
        torch.testing.assert_close(result["logits"], logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["dense", NESTED])
@pytest.mark.parametrize("method", METHODS)
def test_adapters_may_be_units(method, kind, folder):
    check_as_alone(results(folder, f"adapters-{method}-{kind}"), method, kind)


@pytest.mark.parametrize("way", ["linears", "gathered", "checkpointed"])
@pytest.mark.parametrize("method", METHODS)
def test_other_units(method, way, folder):
    got = results(folder, f"{way}-{method}")
    check_as_alone(got, method, NESTED)
    assert all(result["fused"] for result in got)


@pytest.mark.parametrize("method", METHODS)
def test_what_is_loaded_into_shards_is_computed_with(method, folder):
    model = make_model(method, NESTED).eval()
    ids = next(iter(batches(slice(None))))
    with torch.no_grad():
        before = model(input_ids=ids).logits
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.mul_(1.5)
        after = model(input_ids=ids).logits
    assert (after - before).abs().max() > 0.1
    for result in results(folder, f"loaded-{method}"):
        torch.testing.assert_close(result["before"], before, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(result["after"], after, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["dense", "nf4-bf16"])
@pytest.mark.parametrize("method", METHODS)
def test_mixed_precision(method, kind, folder):
    """The first step, against fp32: as exact as PEFT's own layers are under the same policy."""
    exact = alone(method, kind)[:1]
    ours, stock = (
        difference([result["steps"][:1] for result in results(folder, f"{which}-{method}-{kind}")], exact)
        if which == "bf16" or method != "loreft"
        else Difference(0.05, 0.05, 0.05)
        for which in ("bf16", "stock")
    )
    print(f"{ours}; stock: {stock}")
    assert 0 < ours.grads <= 2 * stock.grads, (ours, stock)


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_accelerate_after_fully_shard_leaves_the_layers(method, folder):
    got = results(folder, f"late-{method}")
    check_as_alone(got, method, NESTED)
    for result in got:
        assert result["left"]
        assert all("accelerate has to come before fully_shard" in reason for reason in result["left"])


@pytest.mark.parametrize(("stored", "policy"), [("fp32", "bfloat16"), ("bf16", "float16")])
def test_cast_bytes_are_refused(stored, policy, folder):
    for failed in raw_results(folder, f"cast-{stored}"):
        assert failed.kind == "UnsupportedWeight"
        assert f"cast to torch.{policy}" in failed.message


def test_the_example(folder):
    first, second = results(folder, "example")
    assert first == second
    assert first[-1] < first[0] - 0.3
    model = PeftModel.from_pretrained(runpy.run_path(str(EXAMPLE))["make_base"]("cpu"), folder / "example")
    ids = torch.arange(16)[None]
    with torch.no_grad():
        loss = model.eval()(input_ids=ids, labels=ids).loss
    assert loss < first[0] - 0.3
