"""Whole models against pyreft itself: it loads what we export, and we load what it saves."""

import copy

import pytest
import torch
from reft_models import VOCAB, WIDTH, reft_llama, selected, tiny_llama

from peft_fast.reft import export_pyreft, import_pyreft

CLASSES = {
    "loreft": "LoreftIntervention",
    "noreft": "NoreftIntervention",
    "direft": "DireftIntervention",
    "nodireft": "NodireftIntervention",
    "consreft": "ConsreftIntervention",
    "lobireft": "LobireftIntervention",
}

pytestmark = pytest.mark.usefixtures("one_thread")


def their_logits(theirs, ids, positions, groups):
    """pyreft's forward: a list of columns for each intervention, those of one group in every block first."""
    prompt = list(range(ids.shape[1]))
    columns = [selected(prompt, positions, group) for group in groups for _ in range(2)]
    locations = [[chosen] * len(ids) for chosen in columns]
    _, output = theirs({"input_ids": ids}, unit_locations={"sources->base": (None, locations)})
    return output.logits.detach()


def in_float32(theirs):
    """What pyreft keeps in bfloat16 of it, which would not take float32 states."""
    for intervention in theirs.interventions.values():
        intervention.float()
    return theirs


@pytest.mark.parametrize("share_weights", [True, False])
@pytest.mark.parametrize("variant", ["loreft", "direft", "consreft", "lobireft"])
def test_pyreft_loads_what_we_export(pyreft, tmp_path, variant, share_weights):
    """But for NoReFT and NodiReFT, which it cannot load whoever saved them."""
    model = reft_llama(variant=variant, share_weights=share_weights)
    base = copy.deepcopy(model).unload()
    for edit in model.edits.values():
        edit.basis.rotation.data.normal_(std=0.1)
        for tensor in (edit.source, edit.bias):
            if tensor is not None:
                tensor.data = tensor.data.bfloat16().float()  # what pyreft rounds to on loading
    export_pyreft(model, tmp_path)
    theirs = in_float32(pyreft.reft_model.ReftModel.load(str(tmp_path), base))
    ids = torch.randint(2, VOCAB, (3, 9))
    got = their_logits(theirs, ids, "f2+l2", model.reft_targets.groups)
    expected = model(ids).logits.detach()
    assert not torch.allclose(copy.deepcopy(model).unload()(ids).logits, expected, atol=1e-3)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("share_weights", [True, False])
@pytest.mark.parametrize("component", ["block_output", "model.layers[{}].output"])
@pytest.mark.parametrize("variant", CLASSES)
def test_we_load_what_pyreft_saves(pyreft, tmp_path, variant, component, share_weights):
    base = tiny_llama()
    make = getattr(pyreft.interventions, CLASSES[variant])
    options = {"embed_dim": WIDTH, "low_rank_dimension": 4, "add_bias": False, "dtype": torch.float32}
    groups = ("all",) if share_weights else ("first", "last")
    representations = [
        {
            "layer": i,
            "component": component.format(i),
            "low_rank_dimension": 4,
            "intervention": make(**options),
        }
        for _ in groups
        for i in range(2)
    ]
    config = pyreft.config.ReftConfig(representations=representations)
    theirs = pyreft.reft_model.ReftModel(config, copy.deepcopy(base))
    theirs.save(str(tmp_path))
    model = import_pyreft(base, tmp_path, positions="f2+l2")
    assert model.reft_config.variant == variant
    assert model.reft_targets.groups == groups
    ids = torch.randint(2, VOCAB, (3, 9))
    expected = their_logits(theirs, ids, "f2+l2", groups)
    torch.testing.assert_close(model(ids).logits.detach(), expected, rtol=1e-5, atol=2e-5)
