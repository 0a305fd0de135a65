"""Defects that others had in representation edits, one test each."""

import copy
import itertools

import pytest
import torch
from cases import ReftCase
from reft_models import ragged, reft_llama, same, train_tensors
from safetensors.torch import load_file, save_file
from torch import nn

from peft_fast import LoReFTConfig, LoReFTLinear
from peft_fast.reft import export_pyreft, import_pyreft
from peft_fast.reft.edit import LoReFT

D, R = 24, 4

pytestmark = pytest.mark.usefixtures("one_thread")


def edit_of(**options) -> LoReFT:
    return LoReFT(D, LoReFTConfig(r=R, **options))


def from_identity(rows: torch.Tensor) -> float:
    return (rows @ rows.mT - torch.eye(len(rows))).abs().max().item()


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    """With its default weight decay."""
    return torch.optim.AdamW(train_tensors(model).values(), lr=0.02)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> list[float]:
    torch.manual_seed(steps)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        inputs = ragged()
        loss = model(**inputs, labels=inputs["input_ids"]).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


# ------------------------------------------------------------------------ files, optimizers, dtypes, dropout


def test_training_goes_on_from_a_file_bit_for_bit(tmp_path):
    """pyreft #114, #123: a file did not overwrite the rotation, and training went on from another one."""
    model = reft_llama()
    other, inputs = copy.deepcopy(model), ragged()
    optimizer = adamw(model)
    train(model, optimizer, 3)
    model.save_pretrained(tmp_path)
    other.load_edits(tmp_path)
    assert torch.equal(other(**inputs).logits, model(**inputs).logits)
    resumed = adamw(other)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert train(other, resumed, 10) == train(model, optimizer, 10)
    assert same(train_tensors(other), train_tensors(model))


@pytest.mark.parametrize("decay", [0.01, 0.5])
def test_weight_decay_leaves_the_rows_orthonormal(decay):
    """pyreft: a step with AdamW's default weight decay made R zero."""
    edit, h = edit_of(), torch.randn(5, D)
    optimizer = torch.optim.AdamW(edit.parameters(), lr=0.02, weight_decay=decay)
    for _ in range(3):
        start = edit.rows().detach()
        edit(h).square().mean().backward()
        optimizer.step()
        assert from_identity(edit.rows()) < 1e-6
        assert not torch.equal(edit.rows(), start)


@pytest.mark.parametrize("way", ["state_dict", "file"])
def test_loading_keeps_the_parameters_that_the_optimizer_holds(tmp_path, way):
    """pyreft: load_state_dict replaced the parameter, and the optimizer went on with the old one."""
    model, other = reft_llama(), reft_llama()
    optimizer, before = adamw(model), list(train_tensors(model).values())
    if way == "file":
        other.save_pretrained(tmp_path)
        model.load_edits(tmp_path)
    else:
        model.load_state_dict(other.state_dict())
    assert all(a is b for a, b in zip(before, train_tensors(model).values(), strict=True))
    assert same(train_tensors(model), train_tensors(other))
    train(model, optimizer, 1)
    changed = [not torch.equal(a, b) for a, b in zip(before, train_tensors(other).values(), strict=True)]
    assert all(changed)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_an_edit_can_be_of_half_precision(dtype):
    """pyreft: after `.to(torch.bfloat16)` it raised, for the Householder product has no such kernel."""
    edit, h = edit_of(), torch.randn(5, D)
    expected = edit(h)
    y = edit.to(dtype)(h.to(dtype))
    assert {p.dtype for p in edit.parameters()} == {y.dtype} == {dtype}
    assert from_identity(edit.rows()) < 1e-6
    torch.testing.assert_close(y.float(), expected, rtol=2**-6, atol=2**-6)
    y.float().square().sum().backward()
    assert all(p.grad.isfinite().all() and p.grad.any() for p in edit.parameters())


@pytest.mark.parametrize("wrong", ["missing", "extra"])
def test_keys_that_do_not_match_are_refused(tmp_path, wrong):
    """pyreft: a missing key left the parameter as it was drawn, an extra one was ignored."""
    model = reft_llama()
    model.save_pretrained(tmp_path)
    tensors, state = load_file(tmp_path / "adapter_model.safetensors"), model.edits["0.all"].state_dict()
    for of, name in ((tensors, "0.all.bias"), (state, "bias")):
        if wrong == "missing":
            del of[name]
        else:
            of[f"{name}.more"] = torch.ones(1)
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    with pytest.raises(ValueError, match=r"0\.all\.bias"):
        model.load_edits(tmp_path)
    with pytest.raises(RuntimeError, match="bias"):
        model.edits["0.all"].load_state_dict(state)


def test_rows_that_are_not_orthonormal_are_refused(tmp_path):
    """pyreft: any matrix was loaded as R."""
    model = reft_llama()
    export_pyreft(model, tmp_path)
    file = next(tmp_path.glob("intkey_layer_1_*.bin"))
    state = torch.load(file)
    state["rotate_layer"][:, 0] = state["rotate_layer"][:, 1]
    torch.save(state, file)
    with pytest.raises(ValueError, match=r"rotate_layer: .*orthonormal"):
        import_pyreft(model.unload(), tmp_path, positions="f2+l2")


def test_dropout_leaves_the_state_alone():
    """pyreft: dropout of the edited state made half of the base's hidden state zero."""
    h = torch.randn(50, D)
    dropped = edit_of(dropout=0.5).train()(h) == h
    assert 0.4 < dropped.float().mean() < 0.6
    assert torch.equal(edit_of(dropout=1.0).train()(h), h)


# ------------------------------------------------------------------------ what others had in LoRA, for edits


@pytest.fixture(params=["block", "fold", "project"])
def module(request):
    """An edit of hidden states, and the two ways of one of a linear layer's output."""
    if request.param == "block":
        return edit_of(act_fn="gelu")
    base = nn.Linear(D, D)
    return LoReFTLinear.from_linear(base, LoReFTConfig(r=R), strategy=request.param)


def test_strided_inputs(module):
    """bitsandbytes #1342, #1690, #1995: a non-contiguous input was silently read as contiguous."""
    for view in (torch.randn(6, D)[::2], torch.randn(D, 5).t(), torch.randn(1, D).expand(4, -1)):
        strided, contiguous = view.detach().requires_grad_(), view.contiguous().requires_grad_()
        y, expected = module(strided), module(contiguous)
        torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
        grad = torch.randn(D, len(view)).t()
        y.backward(grad)
        expected.backward(grad.contiguous())
        torch.testing.assert_close(strided.grad, contiguous.grad, rtol=1e-5, atol=1e-5)


def test_backward_twice_and_x_unchanged(module):
    """axolotl #3800: dX was written into the saved X."""
    x = torch.randn(5, D, requires_grad=True)
    before, version = x.detach().clone(), x._version
    leaves = [x, *train_tensors(module).values()]
    y = module(x)
    first = torch.autograd.grad(y.square().sum(), leaves, retain_graph=True)
    second = torch.autograd.grad(y.square().sum(), leaves)
    assert all(map(torch.equal, first, second))
    assert torch.equal(x, before)
    assert x._version == version


def test_each_row_has_its_own_gradient(module):
    """Liger #1298: grad_output was taken for a scalar."""
    x, grad = torch.randn(4, D, requires_grad=True), torch.zeros(4, D)
    grad[2, 5] = 3.0
    module(x).backward(grad)
    alone = x.detach()[2].requires_grad_()
    (3.0 * module(alone)[5]).backward()
    torch.testing.assert_close(x.grad[2], alone.grad, rtol=1e-5, atol=1e-6)
    assert x.grad[[0, 1, 3]].count_nonzero() == 0


def test_every_subset_of_gradients():
    """Liger #1157: what was saved, and whether, depended on the wrong tensor's requires_grad."""
    case = ReftCase.make((7,), D, R, terms=2, act="relu", rows=[5, -1, 0], residual=True)
    full = case.run("auto")
    for wanted in itertools.product((False, True), repeat=len(case.leaves)):
        names = [name for name, needed in zip(case.leaves, wanted, strict=True) if needed]
        leaves = {name: getattr(case, name).clone().requires_grad_() for name in names}
        y = torch.ops.peft_fast.loreft(*case.args(leaves, "auto"))[0]
        assert y.requires_grad == any(wanted)
        grads = torch.autograd.grad(y, list(leaves.values()), case.grad) if names else ()
        for name, grad in zip(names, grads, strict=True):
            torch.testing.assert_close(grad, full[f"d{name}"], rtol=1e-6, atol=1e-6)
