"""trl's SFTTrainer on a 4-bit base with fused LoRA layers: `pip install trl`, then `python examples/sft.py`.

Two lines differ from a script without peft-fast: the import and `callbacks`. The model is tiny, random and
made here, so that the script runs anywhere; put `AutoModelForCausalLM.from_pretrained(...)` in its place.
"""

import torch
from datasets import Dataset
from peft import LoraConfig
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer

from peft_fast import PeftFastCallback, quantize

TEXTS = ["the quick brown fox jumps over the lazy dog", "pack my box with five dozen liquor jugs"] * 32


def word_tokenizer() -> PreTrainedTokenizerFast:
    words = sorted({word for text in TEXTS for word in text.split()})
    vocabulary = {word: i for i, word in enumerate(["<unk>", "<pad>", "</s>", *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"unk_token": "<unk>", "pad_token": "<pad>", "eos_token": "</s>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


def main() -> None:
    tokenizer = word_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=128, intermediate_size=256, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=64,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    quantize(model, "nf4")
    callback = PeftFastCallback()
    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(
            output_dir="runs/sft", max_steps=20, learning_rate=1e-2, max_length=32, logging_steps=5,
            per_device_train_batch_size=8, report_to=[], save_strategy="no",
            bf16=torch.cuda.is_available(), use_cpu=not torch.cuda.is_available(),
        ),
        processing_class=tokenizer,
        train_dataset=Dataset.from_dict({"text": TEXTS}),
        peft_config=LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM"),
        callbacks=[callback],
    )  # fmt: skip
    print(callback.report)
    trainer.train()
    trainer.save_model("runs/sft")


if __name__ == "__main__":
    main()
