"""Speech: which key was pressed, heard by a Whisper encoder (`python examples/speech.py`).

Telephone keys are pairs of tones (DTMF, ITU-T Q.23), so the signal is real though it is computed here; noise
and the moment of the key vary. Whisper's feature extractor makes log-mel spectra of the waves. The base
learns the tones as they are, and is adapted to a line that plays them a tenth slower and so deeper.
"""

import torch
from adaptation import Example, main, split
from torch import Tensor, nn
from transformers import WhisperConfig, WhisperFeatureExtractor, WhisperForAudioClassification

RATE, SAMPLES, HOP = 16_000, 6_400, 160
LOW, HIGH = torch.tensor([697.0, 770.0, 852.0, 941.0]), torch.tensor([1209.0, 1336.0, 1477.0, 1633.0])
"""Hertz of the rows and of the columns of the sixteen keys."""


def recordings(count: int, seed: int, speed: float) -> tuple[dict[str, Tensor], Tensor]:
    """Log-mel spectra [count, 80, 40] of 0.4 s each, and which of the sixteen keys sounds for 0.2 s of it."""
    random = torch.Generator().manual_seed(seed)
    keys = torch.randint(16, (count,), generator=random)
    time = torch.arange(SAMPLES) / RATE
    begin = 0.2 * torch.rand(count, 1, generator=random)
    phase = 6.28 * torch.rand(2, count, 1, generator=random)
    waves = sum(
        torch.sin(6.2832 * speed * tone.unsqueeze(1) * time + shift)
        for tone, shift in zip((LOW[keys // 4], HIGH[keys % 4]), phase, strict=True)
    )
    sounding = (time >= begin) & (time < begin + 0.2)
    waves = waves * sounding + 0.1 * torch.randn(count, SAMPLES, generator=random)
    extractor = WhisperFeatureExtractor(feature_size=80, hop_length=HOP, chunk_length=SAMPLES / RATE)
    extractor.n_samples = SAMPLES
    spectra = extractor(list(waves.numpy()), sampling_rate=RATE, return_tensors="pt")
    return {"input_features": spectra["input_features"]}, keys


def whisper() -> nn.Module:
    return WhisperForAudioClassification(
        WhisperConfig(
            num_mel_bins=80, d_model=64, encoder_layers=2, encoder_attention_heads=4, encoder_ffn_dim=128,
            max_source_positions=SAMPLES // HOP // 2, classifier_proj_size=64, num_labels=16,
        )
    )  # fmt: skip


def example() -> Example:
    clear, slow = split(*recordings(1400, 0, 1.0), 300), split(*recordings(1400, 1, 0.9), 300)
    return Example(whisper, clear, slow, 400, without=("loreft",))  # which wants one sequence of tokens


EXAMPLES = {"whisper": example}

if __name__ == "__main__":
    main(EXAMPLES, "Telephone keys, adapted to a slow line.")
