"""`get_adapter_model`: every method on a model, what is trained, saved and put back, and what is refused."""

import copy
import dataclasses
import json
import pickle

import pytest
import torch
from adapter_models import (
    OPTIONS,
    SIZES,
    TOKENS,
    adapted,
    assert_unchanged,
    bert,
    logits,
    state_of,
    train,
)
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import BertForSequenceClassification, LlamaConfig, LlamaForCausalLM

from peft_fast import (
    AdapterConfig,
    AdapterLinear,
    AdapterModel,
    LoReFTConfig,
    UnsupportedLayer,
    get_adapter_model,
    quantize,
)
from peft_fast.methods import METHODS

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("quant", [None, "nf4"])
@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains_saves_loads_and_goes(tmp_path, method, quant):
    base = bert(quant)
    expected, modules, keys = logits(base), dict(base.named_modules()), base.state_dict().keys()
    model = get_adapter_model(base, AdapterConfig(method, **OPTIONS.get(method, {})))
    assert model is base
    assert isinstance(model, AdapterModel)
    assert isinstance(model, BertForSequenceClassification)
    torch.testing.assert_close(logits(model), expected)
    assert len(model.adapters) == 13

    frozen = {name: t.clone() for name, t in model.state_dict().items() if ".base_layer." in name}
    before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    train(model)
    assert {"classifier.weight", "classifier.bias"} < before.keys()
    moved = {
        name for name, p in model.named_parameters() if name in before and not torch.equal(p, before[name])
    }
    assert moved == before.keys()
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in frozen.items())

    trained = logits(model)
    model.save_pretrained(tmp_path)
    again = AdapterModel.from_pretrained(bert(quant), tmp_path)
    assert again.adapter_config == model.adapter_config
    assert torch.equal(logits(again), trained)
    assert [n for n, p in again.named_parameters() if p.requires_grad] == list(before)
    assert torch.equal(logits(copy.deepcopy(model)), trained)

    assert model.unload() is base
    assert type(base) is BertForSequenceClassification
    assert base.state_dict().keys() == keys
    assert all(module is modules[name] for name, module in base.named_modules())
    assert torch.equal(logits(base), expected)


def test_layers_share_one_set_of_factors_which_is_saved_once(tmp_path):
    model = train(adapted("s2lora"))
    (shared,) = {layer.shared for layer in model.adapters.values()}
    assert (shared.in_features, shared.out_features) == (64, 64)
    model.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "adapter_model.safetensors")
    assert [name for name in stored if "shared" in name] == [
        "bert.encoder.layer.0.attention.self.query.shared.s2_A",
        "bert.encoder.layer.0.attention.self.query.shared.s2_B",
    ]
    count = sum(tensor.numel() for tensor in stored.values())
    assert model.get_nb_trainable_parameters()[0] == count == 13 * 4 + 2 * 4 * 64 + 66


def test_targets_are_ends_of_names_and_others_are_left(capsys):
    model = adapted("bitfit", target_modules=["query", "output.dense"], exclude_modules=["1.output.dense"])
    names = [name.removeprefix("bert.encoder.layer.") for name in model.adapters]
    assert names == [
        "0.attention.self.query",
        "0.attention.output.dense",
        "0.output.dense",
        "1.attention.self.query",
        "1.attention.output.dense",
    ]
    model.print_trainable_parameters()
    assert capsys.readouterr().out.startswith("trainable params: 226 || all params: ")


def test_without_a_method_modules_are_trained_whole_and_put_back(tmp_path):
    base = bert()
    expected = logits(base)
    blocks = ["bert.encoder.layer.1", "classifier"]
    model = train(get_adapter_model(base, AdapterConfig(None, modules_to_save=["layer.1", "classifier"])))
    moved = {name.rpartition(".")[0] for name, p in model.named_parameters() if p.requires_grad}
    assert all(name.startswith(tuple(blocks)) for name in moved)
    model.save_pretrained(tmp_path)
    again = AdapterModel.from_pretrained(bert(), tmp_path)
    assert not torch.equal(logits(model), expected)
    assert torch.equal(logits(again), logits(model))
    assert torch.equal(logits(model.unload()), expected)


def test_a_loaded_adapter_is_in_the_parameters_that_an_optimizer_has(tmp_path):
    model = train(adapted("kadaptation"))
    model.save_pretrained(tmp_path)
    expected, parameters = logits(model), list(model.parameters())
    train(model)
    model.load_adapter(tmp_path)
    assert all(a is b for a, b in zip(parameters, model.parameters(), strict=True))
    assert torch.equal(logits(model), expected)


def test_a_state_dict_is_saved_in_place_of_the_models_own(tmp_path):
    model = adapted("s2lora")
    state = {name: tensor.clone() for name, tensor in train(copy.deepcopy(model)).state_dict().items()}
    model.save_pretrained(tmp_path, state_dict=state)
    stored = load_file(tmp_path / "adapter_model.safetensors")
    assert all(torch.equal(tensor, state[name]) for name, tensor in stored.items())
    del state["classifier.bias"]
    with pytest.raises(
        ValueError, match=r"state_dict: expected 'classifier\.bias', an adapter's of the model"
    ):
        model.save_pretrained(tmp_path, state_dict=state)


def test_a_model_pickles_and_a_new_one_generates_as_its_base_does():
    torch.manual_seed(0)
    base = LlamaForCausalLM(LlamaConfig(vocab_size=20, initializer_range=0.3, **SIZES)).eval()
    expected = base.generate(TOKENS, max_new_tokens=4, do_sample=False)
    model = get_adapter_model(base, AdapterConfig("ssf"))
    assert not [name for name in model.adapters if "lm_head" in name]
    loaded = pickle.loads(pickle.dumps(model))
    assert isinstance(loaded, AdapterModel)
    for adapted_model in (model, loaded):
        assert torch.equal(adapted_model.generate(TOKENS, max_new_tokens=4, do_sample=False), expected)


def test_a_config_goes_through_json():
    config = AdapterConfig("parallel", r=4, target_modules=["q"], adapter_dtype=torch.bfloat16, act="tanh")
    again = AdapterConfig.from_dict(json.loads(json.dumps(config.to_dict())))
    assert again == config
    assert hash(again) == hash(config)
    assert config.options == {"r": 4, "act": "tanh", "bias": "down", "scaling": 1.0}


@pytest.mark.parametrize(
    "config",
    [
        AdapterConfig("parallel", r=4, target_modules=["q"], adapter_dtype=torch.bfloat16, act="tanh"),
        AdapterConfig(None, modules_to_save=["norm"]),
        LoReFTConfig(r=4, layers=[0, 2]),
    ],
)
def test_a_config_is_copied_and_cannot_be_changed(config):
    values = dataclasses.asdict(config)
    json.dumps({**values, "adapter_dtype": None})
    copies = (copy.copy(config), copy.deepcopy(config), pickle.loads(pickle.dumps(config)))
    for again in (*copies, type(config)(**values), dataclasses.replace(config)):
        assert (type(again), again, hash(again)) == (type(config), config, hash(config))
    if isinstance(config, AdapterConfig):
        for write in (
            lambda: config.options.update(r=0),
            config.options.clear,
            lambda: config.options.__setitem__("r", 0),
            lambda: config.options.pop("r", None),
        ):
            with pytest.raises(TypeError, match=r"options: expected .*, got a write"):
                write()
        copy.deepcopy(config.options)["r"] = 0
        assert dataclasses.asdict(config) == values


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: AdapterConfig("galore"), "method: expected one of"),
        (lambda: AdapterConfig("vera", r=0), "r: expected a positive integer, got 0"),
        (lambda: AdapterConfig("ssf", r=4), "r: expected an option of 'ssf'"),
        (lambda: AdapterConfig(None, r=4), "r: expected no option without a method"),
        (
            lambda: AdapterConfig("ssf", target_modules="q"),
            "target_modules: expected 'all-linear' or names of",
        ),
        (lambda: AdapterConfig("ssf", target_modules=[]), "target_modules: expected at least one name"),
        (lambda: AdapterConfig("ssf", modules_to_save=[3]), "modules_to_save: expected names of modules"),
        (lambda: AdapterConfig("ssf", adapter_dtype="float32"), "adapter_dtype: expected None or one of"),
        (lambda: AdapterConfig("ssf", backend="abacus"), "backend: expected one of"),
        (lambda: AdapterConfig.from_dict({}), "method: expected one, got none"),
        (
            lambda: AdapterConfig.from_dict({"method": "ssf", "adapter_dtype": "int8"}),
            "adapter_dtype: expected",
        ),
    ],
)
def test_bad_configs_are_named(make, message):
    with pytest.raises((ValueError, TypeError)) as error:
        make()
    assert message in str(error.value)


def hooked():
    model = bert()
    model.bert.pooler.dense.register_forward_hook(lambda *_: None)
    return model


def tied():
    model = bert()
    model.bert.encoder.layer[1].attention.self.key.weight = model.bert.encoder.layer[
        0
    ].attention.self.key.weight
    return model


class Attention(nn.Module):
    """Reads the weight of a layer that it does not call."""

    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2)
        self.out = nn.Linear(8, 8)

    def forward(self, x):
        return self.out(self.attention(x, x, x)[0])


@pytest.mark.parametrize(
    ("make", "config", "message"),
    [
        (
            bert,
            AdapterConfig("ssf", target_modules=["no_such"]),
            "target_modules: expected linear layers that end",
        ),
        (
            bert,
            AdapterConfig("ssf", modules_to_save=["no_such"]),
            "modules_to_save: expected the end of a module",
        ),
        (bert, AdapterConfig("kadaptation", n=5), "n: expected a divisor of out_features = 32, got 5"),
        (
            lambda: bert("nf4"),
            AdapterConfig(None, modules_to_save=["layer.1"]),
            "modules that can be trained, got",
        ),
        (bert, AdapterConfig(None, modules_to_save=[]), "model: expected something to train"),
        (
            hooked,
            AdapterConfig("ssf"),
            "bert.pooler.dense: expected a layer that can be adapted, got one where it",
        ),
        (tied, AdapterConfig("ssf"), "its weight has another owner"),
        (Attention, AdapterConfig("ssf", target_modules=["out_proj"]), "uses its .weight without calling it"),
        (
            adapted,
            AdapterConfig("ssf"),
            "model: expected one without adapters, got one that has some; see unload()",
        ),
        (lambda: nn.Linear(8, 8), AdapterConfig("ssf"), "expected a module with layers in it, got a layer"),
        (bert, AdapterConfig("ssf", target_modules=["query", "typo"]), "target_modules: expected the end of"),
        (bert, AdapterConfig("ssf", exclude_modules=["typo"]), "exclude_modules: expected the end of"),
        (
            bert,
            AdapterConfig("ssf", target_modules=["query", "encoder.layer"]),
            "target_modules: expected the end of a linear layer's name, got 'encoder.layer'",
        ),
        (
            bert,
            AdapterConfig("ssf", exclude_modules=["layer.1"]),
            "exclude_modules: expected the end of a linear layer's name, got 'layer.1'",
        ),
        (
            lambda: get_peft_model(bert(), LoraConfig(target_modules=["query"])),
            AdapterConfig("ssf"),
            "model: expected one without adapters",
        ),
    ],
)
def test_a_refused_call_changes_nothing(make, config, message):
    model = make()
    before = state_of(model)
    with pytest.raises(ValueError, match="expected") as error:
        get_adapter_model(model, config)
    assert message in str(error.value)
    assert_unchanged(model, before)


@pytest.mark.parametrize(("method", "part"), [("series", "create"), ("vera", "shared"), ("s2lora", "shared")])
def test_what_does_not_fit_into_memory_changes_nothing(monkeypatch, method, part):
    """The second tensor that is made: a layer's own after the first layer's, or one that all share."""
    made = []

    def create(options, N, K, empty):
        first = empty(1)
        made.append(first)
        there = [tensor for tensor in made if not tensor.is_meta]
        return {"first": first, "second": empty(2**46 if len(there) == 2 or part == "shared" else 1)}

    monkeypatch.setitem(METHODS, method, METHODS[method]._replace(**{part: create}))
    model = bert("nf4")
    before = state_of(model)
    with pytest.raises(MemoryError, match=r"config: expected .* fits into memory, got '\w+' with .*'r': 7, "):
        get_adapter_model(model, AdapterConfig(method, r=7))
    assert_unchanged(model, before)


@pytest.mark.parametrize("r", [10**9, 10**12, 2**70])
def test_a_rank_beyond_all_sense_is_named(r):
    with pytest.raises(ValueError, match=f"^r: expected at most 65536, got {r}$"):
        LoReFTConfig(r=r)
    with pytest.raises(ValueError, match=f"^terms: expected at most 65536, got {r}$"):
        AdapterConfig("kadaptation", terms=r)
    for method in ("parallel", "series", "vera", "s2lora"):
        with pytest.raises(ValueError, match=f"^r: expected at most 65536, got {r}$"):
            AdapterConfig(method, r=r)


@pytest.mark.parametrize("method", ["parallel", "series", "vera", "s2lora", "kadaptation"])
def test_a_file_is_checked_before_what_it_asks_for_is_allocated(tmp_path, monkeypatch, method):
    """Of a file that any program may have written, so that it has no sums."""
    adapted(method).save_pretrained(tmp_path)
    save_file(load_file(tmp_path / "adapter_model.safetensors"), tmp_path / "adapter_model.safetensors")
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    size = "terms" if method == "kadaptation" else "r"
    (tmp_path / "adapter_config.json").write_text(json.dumps({**config, size: 2**16}))
    base = bert()
    before = state_of(base)
    made, empty = [], torch.empty
    monkeypatch.setattr(torch, "empty", lambda *args, **kw: made.append(empty(*args, **kw)) or made[-1])
    with pytest.raises(ValueError, match=r"adapter_model\.safetensors: .*: expected \[.*65536.*, got \["):
        AdapterModel.from_pretrained(base, tmp_path)
    assert_unchanged(base, before)
    assert all(tensor.is_meta for tensor in made)
    assert max(tensor.numel() for tensor in made) >= 2**20


def test_a_weight_that_is_read_directly_is_passed_over():
    model = get_adapter_model(Attention(), AdapterConfig("ssf"))
    assert list(model.adapters) == ["out"]
    assert isinstance(model.out, AdapterLinear)


def test_a_config_is_replaced_and_checked():
    config = dataclasses.replace(AdapterConfig("vera", r=8), backend="reference", target_modules=["query"])
    assert config == AdapterConfig("vera", r=8, backend="reference", target_modules=["query"])
    with pytest.raises(TypeError, match="config: expected an AdapterConfig, got dict"):
        get_adapter_model(bert(), {"method": "ssf"})


def test_unsupported_layers_of_a_listed_name_are_named():
    class Scaled(nn.Linear):
        pass

    net = nn.Sequential(nn.Linear(4, 4), Scaled(4, 4))
    with pytest.raises(UnsupportedLayer, match=r"1: base: expected nn\.Linear"):
        get_adapter_model(net, AdapterConfig("ssf"))
    assert len(get_adapter_model(net, AdapterConfig("ssf", target_modules=["0"])).adapters) == 1


def test_a_packed_module_is_not_trained_whole():
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64, bias=False))
    quantize(model, "int8")
    with pytest.raises(UnsupportedLayer, match=r"modules_to_save: .*'1'.* is int8"):
        get_adapter_model(model, AdapterConfig(None, modules_to_save=["1"]))
    adapted = get_adapter_model(model, AdapterConfig("bitfit", modules_to_save=[]))
    assert adapted.get_nb_trainable_parameters() == (128, 128 + 64 + 2 * 64 * 64)


@pytest.mark.parametrize("method", ["vera", "s2lora", "kadaptation"])
def test_a_replica_has_the_shared_factors(method):
    """As `nn.DataParallel` makes them: without entries in `_parameters`."""
    model = get_adapter_model(nn.Sequential(nn.Linear(8, 8)), AdapterConfig(method))
    layer = model.adapters["0"]
    replica, shared = layer._replicate_for_data_parallel(), layer.shared._replicate_for_data_parallel()
    for module, copied in ((layer, replica), (layer.shared, shared)):
        for name, parameter in module._parameters.items():
            copied._parameters.pop(name, None)
            object.__setattr__(copied, name, parameter)
    replica._modules["shared"] = shared
    x = torch.randn(3, 8)
    assert torch.equal(replica(x), layer(x))
