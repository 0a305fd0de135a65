"""`peft-fast estimate`: its bytes against those of real training steps, and its counts against known ones."""

import dataclasses
import gc
import itertools
import json
import sys
import tempfile
import warnings
from pathlib import Path

import pytest
import torch
from accelerate.utils import convert_outputs_to_fp32
from bitsandbytes.nn import Linear4bit
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.profiler import ProfilerActivity, profile
from transformers import (
    BertConfig,
    BertModel,
    EsmConfig,
    Gemma3Config,
    GPT2Config,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    RobertaConfig,
    T5Config,
)

from peft_fast import accelerate, base_models, cli, fake_models, scratch
from peft_fast.config import METHODS, TrainConfig
from peft_fast.errors import UnsupportedLayer
from peft_fast.estimate import Estimate, estimate, table
from peft_fast.formats import from_linear

BATCH, SEQ = 4, 64
SIZES = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4}
LLAMA = LlamaConfig(vocab_size=1000, num_key_value_heads=2, **SIZES)
BERT = BertConfig(vocab_size=500, max_position_embeddings=128, **{**SIZES, "num_hidden_layers": 1})
TINY = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
PEAK = 0.02  # of a step's allocations: a kernel's own are some kilobytes
RESIDENT = 0.003  # of weights: bitsandbytes shares its 1 KiB table of nested codes between layers

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Tiny models with random weights, by name."""
    root = tmp_path_factory.mktemp("models")
    LlamaForCausalLM(LLAMA).save_pretrained(root / "llama")
    BertModel(BERT).save_pretrained(root / "bert")
    tied = LlamaConfig(**{**LLAMA.to_dict(), "tie_word_embeddings": True})
    LlamaForCausalLM(tied).save_pretrained(root / "tied")
    return root


class Training:
    """A real model that is trained as `train` does, on its own loop."""

    def __init__(self, folder, checkpointing=False, **options):
        self.causal = folder.name != "bert"
        task = "causal-lm" if self.causal else "classification"
        self.job = TrainConfig(task=task, model=str(folder), data="unread", **options)
        labels = None if self.causal else ["no", "yes"]
        adapter = base_models.adapter_config(self.job, "CAUSAL_LM" if self.causal else "SEQ_CLS")
        dense = base_models.trained_whole(adapter)
        base = base_models.load_base(self.job, folder, labels, torch.device("cpu"), dense)
        base.config.use_cache = False
        self.model = base_models.add_adapter(adapter, base).train()
        if self.job.stock:
            base_models.protect_from_repacking(self.model)
        else:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="accelerate: ")  # there may be no layer to swap
                accelerate(self.model)
        if checkpointing:
            self.model.gradient_checkpointing_enable({"use_reentrant": False})
        self.trained = [p for p in self.model.parameters() if p.requires_grad]

    def weights(self):
        """Bytes of every tensor that the model holds."""
        held = [*self.model.parameters(), *self.model.buffers()]
        for module in self.model.modules():
            if isinstance(module, Linear4bit):
                held += [field for field in from_linear(module) if isinstance(field, torch.Tensor)]
        with torch._C.DisableTorchFunctionSubclass():
            storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in held}
        return sum(storages.values())

    def loss(self):
        tokens = torch.randint(5, 500, (BATCH, SEQ))
        inputs = {"input_ids": tokens, "labels": tokens if self.causal else torch.zeros(BATCH).long()}
        if not self.causal:
            inputs["attention_mask"] = torch.ones_like(tokens)
            inputs["attention_mask"][0, -3:] = 0
        dtype = base_models.DTYPES[self.job.dtype]
        if dtype == torch.float32:
            return self.model(**inputs)["loss"]
        with torch.autocast("cpu", dtype):
            outputs = self.model(**inputs)
        return convert_outputs_to_fp32(lambda: outputs)()["loss"]

    def train(self, steps):
        optimizer = torch.optim.AdamW(self.trained, fused=True)
        for _ in range(steps):
            self.loss().backward()
            optimizer.step()
            optimizer.zero_grad()

    def allocations(self):
        """The peak of what steps allocate, optimizer state and kept norms included."""
        gc.collect()
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            self.train(steps=2)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "trace.json"
            profiler.export_chrome_trace(str(path))
            trace = json.loads(path.read_text())["traceEvents"]
        events = sorted((e for e in trace if e["name"] == "[memory]"), key=lambda e: e["ts"])
        return max(itertools.accumulate(e["args"]["Bytes"] for e in events))


def estimated(folder, **options):
    return estimate(folder, batch=BATCH, seq=SEQ, device="cpu", **options)


def check(folder, **options):
    found, real = estimated(folder, **options), Training(folder, **options)
    frozen = found.weights + found.trained
    assert frozen == pytest.approx(real.weights(), rel=RESIDENT)
    allocated = real.allocations()
    assert found.peak - frozen == pytest.approx(allocated, rel=PEAK)
    assert found.trainable_parameters == sum(p.numel() for p in real.trained)
    assert allocated > 2 * found.optimizer  # the step dominates, so that the comparison is of activations
    return found


@pytest.mark.parametrize(("quant", "checkpointing"), [("none", False), ("nf4", True)], ids=str)
@pytest.mark.parametrize("method", ["lora", "dora", "loreft"])
def test_a_language_model_peaks_as_estimated(folders, method, quant, checkpointing):
    check(folders / "llama", method=method, quant=quant, checkpointing=checkpointing)


@pytest.mark.parametrize("method", [m for m in METHODS if m not in ("lora", "dora", "loreft")])
def test_every_other_method_peaks_as_estimated(folders, method):
    check(folders / "llama", method=method, quant="nf4")


@pytest.mark.parametrize(
    "options",
    [
        {"method": "dora", "quant": "nf4", "dropout": 0.1, "dtype": "bf16"},
        {"method": "loreft", "quant": "nf4", "component": "intermediate.dense", "positions": "f3"},
        {"method": "lora", "quant": "fp4", "dropout": 0.1, "stock": True},
        {"method": "prefix", "quant": "nf4", "virtual_tokens": 9},
        {"method": "dora", "quant": "int8"},
        {"method": "adapter-parallel", "quant": "fp8", "dtype": "bf16"},
        {"method": "adapter-series", "quant": "nf4", "act": "tanh", "dtype": "bf16"},
    ],
    ids=lambda options: "-".join(map(str, options.values())),
)
def test_an_encoder_with_a_mask_and_a_head_peaks_as_estimated(folders, options):
    check(folders / "bert", **options)


def test_half_precision_and_tied_embeddings(folders):
    found = check(folders / "tied", method="lora", quant="nf4", dtype="bf16", target_modules="q_proj,v_proj")
    apart = estimated(
        folders / "llama", method="lora", quant="nf4", dtype="bf16", target_modules="q_proj,v_proj"
    )
    assert apart.dense - found.dense == 2 * LLAMA.vocab_size * LLAMA.hidden_size


def test_what_autograd_saves_is_counted(folders):
    real, saved = Training(folders / "llama", method="dora", dropout=0.1), {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    real.train(steps=1)
    owned = {p.untyped_storage().data_ptr() for p in real.model.parameters()}
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = real.loss()
    hooked = sum(size for address, size in saved.items() if address not in owned)
    assert loss.requires_grad
    found = estimated(folders / "llama", method="dora", dropout=0.1)
    assert found.saved_by_forward == pytest.approx(hooked, rel=PEAK)
    assert found.all_gradients == 4 * found.trainable_parameters == found.trained


# ------------------------------------------------------------------------------------------- sizes and parts


@pytest.mark.parametrize(
    ("method", "options", "percent"),
    [
        ("lora", {"r": 32, "target_modules": "q_proj,k_proj,v_proj,up_proj,down_proj"}, 0.826),
        ("dora", {"r": 16, "target_modules": "q_proj,k_proj,v_proj,up_proj,down_proj"}, 0.427),
        ("loreft", {"r": 8}, 0.031),
    ],
)
def test_shares_of_llama_7b_are_those_of_the_survey(method, options, percent):
    job = TrainConfig(task="causal-lm", model="-", data="-", method=method, **options)
    trainable, total = fake_models.build(job, LlamaConfig(), labels=2).get_nb_trainable_parameters()
    assert total - trainable == 6_738_415_616
    assert round(100 * trainable / total, 3) == percent


def test_parts_of_a_quantized_model(folders):
    found = estimated(folders / "llama", method="lora", quant="nf4")
    H, F, layers = SIZES["hidden_size"], SIZES["intermediate_size"], SIZES["num_hidden_layers"]
    shapes = [(H, H), (H // 2, H), (H // 2, H), (H, H), (F, H), (F, H), (H, F)] * layers
    blocks = [N * K // 64 for N, K in shapes]
    assert found.packed == sum(N * K for N, K in shapes) // 2
    assert found.statistics == sum(b + 4 * -(-b // 256) + 4 * (16 + 256 + 1) for b in blocks)
    assert found.trained == 4 * sum(8 * (N + K) for N, K in shapes)
    assert found.optimizer == 2 * found.trained + 4 * 2 * len(shapes)  # AdamW counts the steps of each tensor
    assert estimated(folders / "llama", method="lora", quant="nf4", optimizer="sgd").optimizer == 0
    parts = ("packed", "statistics", "dense", "trained", "optimizer", "kept_norms", "scratch")
    assert found.peak == sum(getattr(found, p) for p in (*parts, "saved", "gradients", "temporary"))


def test_parts_of_packed_layers(folders):
    rows, weights = 6 * 256 + 512, 4 * 256 * 256 + 2 * 256 * 512 + 256 * 256  # and the pooler's
    int8, mxfp4 = (estimated(folders / "bert", method="lora", quant=quant) for quant in ("int8", "mxfp4"))
    assert (int8.packed, int8.statistics) == (weights, 4 * rows)
    tables = 4 * (16 + 256 + 1 + 1)
    assert (mxfp4.packed, mxfp4.statistics) == (weights // 2, weights // 32 + 7 * tables)


def test_a_gpu_adds_the_scratch_and_needs_no_copies(folders, monkeypatch):
    H, F = SIZES["hidden_size"], SIZES["intermediate_size"]
    cpu, cuda = (
        estimate(folders / "llama", batch=1, seq=8, method="dora", device=device)
        for device in ("cpu", "cuda")
    )
    assert (cpu.scratch, cuda.scratch) == (0, 4 * H * F)
    magnitudes = cuda.kept_norms // 3  # fp32 beside norms in fp32 and fp64
    assert cpu.kept_norms - cuda.kept_norms == cuda.trained - magnitudes
    monkeypatch.setattr(scratch, "limit", lambda: 1)
    limited = estimate(folders / "llama", batch=1, seq=8, method="loreft", device="cuda")
    assert limited.scratch == 4 * 128 * F


def test_padding_costs_a_mask(folders):
    without, padded = (estimated(folders / "llama", padding=padding) for padding in (False, True))
    assert padded.saved_by_forward >= without.saved_by_forward + BATCH * SEQ * SEQ


def test_the_ledger_knows_what_was_there_at_the_peak():
    with FakeTensorMode(), fake_models.Ledger() as ledger:
        kept = torch.empty(100, dtype=torch.uint8)
        view, early = kept[10:], torch.empty(30, dtype=torch.uint8)
        numbers = ledger.numbers([kept, view, early])
        assert (len(numbers), ledger.now) == (2, 130)
        del early
        ledger.forget_peak()
        large = torch.empty(1000, dtype=torch.uint8)
        numbers |= ledger.numbers([large])
        del large
        late = torch.empty(500, dtype=torch.uint8)
        numbers |= ledger.numbers([late])
    assert (ledger.now, ledger.peak) == (600, 1100)
    assert (ledger.bytes_of(numbers), ledger.bytes_of(numbers, at_peak=True)) == (1630, 1100)


# --------------------------------------------------------------------------------- bad input, and the command


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch": 0}, "batch: expected a number from 1 to 2147483647, got 0"),
        ({"seq": 129}, "seq: expected at most 128, the positions in .*position_embeddings, got 129"),
        ({"seq": 10**10}, "seq: expected a number from 1 to 2147483647, got 10000000000"),
        ({"seq": 10**6, "batch": 10**4}, "seq: expected at most 2147483647 tokens in a step, got 10000 x"),
        ({"seq": 120, "method": "prompt"}, "seq: expected at most 108, the positions in"),
        ({"method": "vora"}, "method: expected one of lora, dora, loreft, adapter-parallel, .*, got 'vora'"),
        ({"quant": "int4"}, "quant: expected one of nf4, fp4, int8, fp8, mxfp4, none, got 'int4'"),
        ({"quant": "int8", "stock": True}, "stock: expected none with quant 'int8', which is PackedLinear"),
        ({"optimizer": "lion"}, "optimizer: expected one of adamw, sgd, got 'lion'"),
        ({"device": "tpu"}, "device: expected one of cpu, cuda, got 'tpu'"),
        ({"task": "ner"}, "task: expected one of causal-lm, classification, got 'ner'"),
        ({"dtype": "fp16", "device": "cpu"}, "dtype: expected fp32 or bf16 on a CPU"),
        ({"method": "dora", "stock": True}, "stock: expected none for dora on 4-bit weights"),
    ],
)
def test_bad_options_are_named(folders, options, message):
    with pytest.raises(ValueError, match=message):
        estimate(folders / "bert", **{"batch": 1, "seq": 8, **options})


POSITIONS = {
    "roberta": RobertaConfig(vocab_size=99, max_position_embeddings=18, pad_token_id=1, **TINY),
    "opt": OPTConfig(vocab_size=99, max_position_embeddings=16, ffn_dim=64, word_embed_proj_dim=32, **TINY),
    "gpt2": GPT2Config(vocab_size=99, n_positions=16, n_embd=32, n_layer=1, n_head=2),
}


@pytest.mark.parametrize("name", POSITIONS)
def test_as_many_tokens_fit_as_a_table_has_positions(tmp_path, name):
    """RoBERTa's and OPT's tables have two rows that no token reads."""
    POSITIONS[name].save_pretrained(tmp_path)
    options = {"quant": "none", "r": 2, "device": "cpu"}
    options |= {"target_modules": "c_attn"} if name == "gpt2" else {}
    assert estimate(tmp_path, batch=1, seq=16, **options).peak > 0
    with pytest.raises(ValueError, match=r"seq: expected at most 16, the positions in .*, got 17"):
        estimate(tmp_path, batch=1, seq=17, **options)


def test_a_tower_of_images_does_not_limit_texts(tmp_path):
    text = {"vocab_size": 99, "num_key_value_heads": 1, "head_dim": 16, "intermediate_size": 64, **TINY}
    vision = {"image_size": 28, "patch_size": 14, "intermediate_size": 64, **TINY}
    Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4).save_pretrained(tmp_path)
    options = {"target_modules": "q_proj", "quant": "none"}
    assert estimate(tmp_path, batch=1, seq=64, device="cpu", **options).peak > 0


def test_a_table_of_positions_that_is_not_read_does_not_limit_texts(tmp_path):
    EsmConfig(
        vocab_size=33, max_position_embeddings=18, pad_token_id=1, mask_token_id=32, intermediate_size=64,
        position_embedding_type="rotary", **TINY,
    ).save_pretrained(tmp_path)  # fmt: skip
    assert estimate(tmp_path, batch=1, seq=64, device="cpu", quant="none").peak > 0


def test_models_with_and_without_data_are_quantized_by_one_function(folders, monkeypatch):
    settings = base_models.quantization(TrainConfig(), head=True)
    settings.llm_int8_skip_modules = ["classifier", "query"]
    monkeypatch.setattr(base_models, "quantization", lambda *_, **__: settings)
    job = TrainConfig(task="classification", model=str(folders / "bert"), data="unread")
    fake = fake_models.build(job, BertConfig.from_pretrained(folders / "bert"), labels=2).base_model.model
    real = base_models.load_base(job, folders / "bert", ["no", "yes"], torch.device("cpu"))
    for model in (fake, real):
        layers = {
            name.rpartition("attention.")[2] for name, m in model.named_modules() if isinstance(m, Linear4bit)
        }
        assert "self.query" not in layers
        assert any("self.key" in name for name in layers)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "model: expected a config.json or a folder with one, got"),
        ("{", "model: expected a config that transformers can read"),
        ('{"model_type": "nonesuch"}', "model: expected a config that transformers can read"),
        (T5Config().to_json_string(), "model: expected one for causal-lm, got T5Config"),
        (
            json.dumps({**LLAMA.to_dict(), "quantization_config": {"load_in_4bit": True}}),
            "model: expected weights that are not quantized yet",
        ),
    ],
)
def test_bad_configs_are_named(tmp_path, content, message):
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        estimate(tmp_path, batch=1, seq=8)


def test_a_model_that_cannot_run_without_data_is_refused(tmp_path, monkeypatch):
    from transformers.models.llama import modeling_llama

    LLAMA.save_pretrained(tmp_path)
    monkeypatch.setattr(modeling_llama.LlamaRMSNorm, "forward", lambda self, x: x if x.sum() > 0 else -x)
    with pytest.raises(UnsupportedLayer, match="model: expected one that runs without data, got"):
        estimate(tmp_path, batch=1, seq=8)


def call(monkeypatch, capsys, *arguments):
    monkeypatch.setattr(sys, "argv", ["peft-fast", "estimate", *map(str, arguments)])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    return stopped.value.code, *capsys.readouterr()


def test_the_command(monkeypatch, capsys, folders):
    monkeypatch.setenv("COLUMNS", "200")
    arguments = ("--model", folders / "llama", "--batch", 2, "--seq", 8, "--device", "cpu")
    found = estimate(folders / "llama", batch=2, seq=8, device="cpu", method="lora", quant="fp4", r=4)
    options = ("--quant", "fp4", "--r", 4)
    code, out, _ = call(monkeypatch, capsys, *arguments, *options, "--json")
    assert (code, json.loads(out)) == (0, found.as_dict())
    monkeypatch.setattr("peft_fast.estimate.estimate", lambda *_, **__: found)
    code, out, _ = call(monkeypatch, capsys, *arguments)
    assert code == 0
    assert f"{found.packed / 2**20:.2f} MiB" in out
    assert f"{found.peak / 2**20:.2f} MiB" in out
    assert f"{found.trainable_parameters:,} of {found.total_parameters:,} parameters" in out
    assert "scratch" not in out


def test_the_command_says_what_is_wrong_in_a_line(monkeypatch, capsys, folders):
    arguments = ("--model", folders / "llama", "--batch", 2, "--seq", 8)
    code, _, err = call(monkeypatch, capsys, *arguments, "--method", "vora")
    assert code == 2
    assert err.startswith("peft-fast: method: expected one of lora, dora, loreft, adapter-parallel, ")
    assert err.endswith(", got 'vora'\n")


def test_the_table_changes_to_gib():
    found = Estimate(*range(14))
    assert "1.50 GiB" in list(table(dataclasses.replace(found, packed=3 * 2**29), "x").columns[1].cells)
