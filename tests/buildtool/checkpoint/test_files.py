"""Headers of safetensors files: read right, and no damage gets past them as anything but one line."""

import random
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from buildtool.checkpoint import files
from buildtool.store.errors import SdxlError


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "weights.safetensors"
    tensors = {"a": torch.zeros(2, 3, dtype=torch.float16), "b": torch.zeros((), dtype=torch.int64)}
    save_file(tensors, path, metadata={"format": "pt"})
    return path


def test_a_header(file: Path) -> None:
    header = files.read_header(file)
    assert header.shapes == {"a": (2, 3), "b": ()}
    assert header.dtypes == {"a": "F16", "b": "I64"}
    assert header.metadata == {"format": "pt"}


def test_any_damage_is_one_line_or_harmless(file: Path) -> None:
    whole = file.read_bytes()
    generator = random.Random(0)
    refused = 0
    for _ in range(2000):
        data = bytearray(whole)
        for _ in range(generator.randrange(1, 4)):
            data[generator.randrange(len(data))] = generator.randrange(256)
        file.write_bytes(data[: generator.randrange(len(data) + 1)] if generator.random() < 0.3 else data)
        try:
            header = files.read_header(file)
        except SdxlError as error:
            refused += 1
            assert "\n" not in str(error)
        else:
            assert all(isinstance(n, int) and n >= 0 for shape in header.shapes.values() for n in shape)
    assert refused > 500


def test_every_truncation_is_refused(file: Path) -> None:
    whole = file.read_bytes()
    for length in range(len(whole)):
        file.write_bytes(whole[:length])
        with pytest.raises(SdxlError):
            files.read_header(file)


def test_variants_and_which_file_is_taken(tmp_path: Path) -> None:
    for name in (
        "diffusion_pytorch_model.safetensors",
        "diffusion_pytorch_model.fp16.safetensors",
        "diffusion_pytorch_model.non_ema.safetensors",
        "model.safetensors.index.bf16.json",
        "model.fp16-00001-of-00002.safetensors",
        "config.json",
        "other.fp8.safetensors",
    ):
        (tmp_path / name).write_text('{"weight_map": {"a": "diffusion_pytorch_model.safetensors"}}')
    assert files.variants(tmp_path) == ["bf16", "fp16", "non_ema"]
    for asked, found in (("", ""), ("fp16", "fp16"), ("bf16", "bf16"), ("fp8", "")):
        weights = files.find_weights(tmp_path, asked)
        assert weights is not None and weights.variant == found
    assert files.find_weights(tmp_path / "nowhere", "") is None
