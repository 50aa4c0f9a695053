"""Random weights: the same everywhere, different for every tensor and seed, and of a size that a model can bear."""

import math

import pytest
import torch

from buildtool.checkpoint import random_weights

NAME = "unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_k.weight"


def test_numbers_are_what_they_were() -> None:
    # Written down once: a digest of the recipe stands for these bytes, so they may change only with VERSION.
    assert random_weights.VERSION == 1
    numbers = random_weights.tensor(NAME, (600, 1000), 0, "float32").view(-1)
    assert [numbers[i].item() for i in (0, 1, 2, -1)] == [
        0.024075649678707123,
        0.03881540521979332,
        0.03951261565089226,
        0.020843883976340294,
    ]


def test_half_precision_is_the_same_numbers_rounded() -> None:
    wide = random_weights.tensor(NAME, (600, 1000), 0, "float32")
    assert torch.equal(random_weights.tensor(NAME, (600, 1000), 0, "float16"), wide.half())


def drawn_by_torch(monkeypatch: pytest.MonkeyPatch, dtype: str, device: str) -> list[torch.Tensor]:
    """Tensors by numpy, then by torch on a device."""
    numbers = [
        random_weights.tensor(NAME, (700, 1100), 5, dtype),
        random_weights.tensor("a.norm.weight", (600000,), 5, dtype),
    ]
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    own = random_weights.on_device
    monkeypatch.setattr(random_weights, "on_device", lambda *args: own(*args[:-1], device))
    return [
        *numbers,
        random_weights.tensor(NAME, (700, 1100), 5, dtype),
        random_weights.tensor("a.norm.weight", (600000,), 5, dtype),
    ]


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_what_a_gpu_computes_gives_the_same_bits(monkeypatch: pytest.MonkeyPatch, dtype: str) -> None:
    """Here on the CPU; on a GPU: tests/gpu/test_random_weights.py."""
    monkeypatch.setattr(random_weights, "_DEVICE_CHUNK", 300_000)
    matrix, norm, *others = drawn_by_torch(monkeypatch, dtype, "cpu")
    assert torch.equal(matrix, others[0]) and torch.equal(norm, others[1])


def test_a_full_gpu_is_not_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> torch.Tensor:
        raise torch.OutOfMemoryError

    wanted = random_weights.tensor(NAME, (700, 1100), 5, "float32")
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(random_weights, "on_device", full)
    assert torch.equal(random_weights.tensor(NAME, (700, 1100), 5, "float32"), wanted)


def test_names_and_seeds_give_other_numbers() -> None:
    one = random_weights.tensor(NAME, (64, 64), 0, "float32")
    for name, seed in ((NAME, 1), (NAME.replace("to_k", "to_v"), 0)):
        other = random_weights.tensor(name, (64, 64), seed, "float32")
        correlation = torch.corrcoef(torch.stack([one.view(-1), other.view(-1)]))[0, 1]
        assert abs(correlation) < 0.06


@pytest.mark.parametrize(
    ("name", "shape", "mean", "deviation"),
    [
        (NAME, (1280, 2048), 0, 1 / math.sqrt(2048)),
        ("vae.decoder.conv_in.weight", (512, 320, 3, 3), 0, 1 / math.sqrt(320 * 9)),
        ("unet.down_blocks.0.resnets.0.conv2.weight", (320, 320, 3, 3), 0, 0.5 / math.sqrt(320 * 9)),
        ("unet.conv_norm_out.weight", (4096,), 1, 0.05),
        ("unet.conv_norm_out.bias", (4096,), 0, 0.02),
        ("text_encoder.embeddings.token_embedding.weight", (1000, 64), 0, 0.3),
    ],
)
def test_mean_and_spread(name: str, shape: tuple[int, ...], mean: float, deviation: float) -> None:
    numbers = random_weights.tensor(name, shape, 3, "float32")
    assert numbers.mean().item() == pytest.approx(mean, abs=0.05 * deviation)
    assert numbers.std().item() == pytest.approx(deviation, rel=0.05)
    # No direction stands out, as it would if the numbers repeated.
    if len(shape) == 2:
        largest = torch.linalg.matrix_norm(numbers[:256, :256], ord=2).item()
        assert largest < 2.2 * deviation * math.sqrt(min(256, shape[0]))
