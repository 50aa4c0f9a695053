"""The weights file: any safetensors reader reads it, and it lies as compiled code wants it."""

import hashlib
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from exporters import layout, weights
from exporters.base import ExportError, StoredTensor


def test_what_is_written_is_what_the_plan_says(tmp_path: Path) -> None:
    source = {
        "conv": torch.randn(8, 4, 3, 3),
        "q": torch.randn(4, 6),
        "k": torch.randn(4, 6),
        "bias": torch.randn(4, 1),
    }
    last = torch.empty(8, 4, 3, 3).to(memory_format=torch.channels_last).stride()
    plan = {
        "conv": StoredTensor((8, 4, 3, 3), "float16", tuple(last), ("conv",)),
        "qk": StoredTensor((8, 6), "bfloat16", (6, 1), ("q", "k")),
        "padded": StoredTensor((16,), "float32", (1,), ("bias",)),
    }
    path = tmp_path / "w.safetensors"
    weights.write(path, plan, source)
    flat = load_file(path)
    rebuilt = {n: flat[n][: torch.Size(p.shape).numel()].as_strided(p.shape, p.stride) for n, p in plan.items()}
    assert torch.equal(rebuilt["conv"], source["conv"].half())
    assert torch.equal(rebuilt["qk"], torch.cat([source["q"], source["k"]]).bfloat16())
    assert torch.equal(rebuilt["padded"], torch.cat([source["bias"].flatten(), torch.zeros(12)]))


def test_every_tensor_starts_aligned(tmp_path: Path) -> None:
    plan = {str(n): StoredTensor((n,), "float16", (1,), (str(n),)) for n in (1, 3, 17, 129)}
    path = tmp_path / "w.safetensors"
    weights.write(path, plan, {str(n): torch.arange(n) for n in (1, 3, 17, 129)})
    raw = path.read_bytes()
    begin = 8 + int.from_bytes(raw[:8], "little")
    assert begin % 4096 == 0
    assert (len(raw) - begin) == 4 * 256 + 256  # 129 halves need a second block


def test_a_missing_or_misshapen_tensor_is_named(tmp_path: Path) -> None:
    plan = {"a": StoredTensor((4, 2), "float32", (2, 1), ("source",))}
    with pytest.raises(ExportError, match="no tensor 'source'"):
        weights.write(tmp_path / "w", plan, {})
    with pytest.raises(ExportError, match=r"source has shape \(2, 4\); the compiled code reads \(4, 2\)"):
        weights.write(tmp_path / "w", plan, {"source": torch.zeros(2, 4)})


def test_the_files_digest_comes_with_it(tmp_path: Path) -> None:
    """Of tensors that are padded, one that isn't, and an empty one."""
    sizes = {"a": 3, "b": 64, "c": 0, "d": 100_001}
    plan = {name: StoredTensor((size,), "float32", (1,), (name,)) for name, size in sizes.items()}
    path = tmp_path / "w.safetensors"
    source = {name: torch.randn(size) for name, size in sizes.items()}
    told: list[tuple[int, int]] = []
    digest = weights.write(path, plan, source, lambda done, total: told.append((done, total)))
    data = path.read_bytes()
    assert digest == hashlib.sha256(data).hexdigest()
    assert len(data) > 8 + sum(4 * size for size in sizes.values()) and told[-1][0] == told[-1][1]
    assert all(torch.equal(load_file(path)[name][: sizes[name]], source[name]) for name in sizes)


def test_a_disk_that_takes_a_part_at_a_time_gets_all_of_it() -> None:
    """As Linux does with 2 GB."""
    taken: list[bytes] = []

    class Slow:
        """A stand-in for an unbuffered file."""

        def write(self, data: memoryview) -> int:
            taken.append(bytes(data[:7]))
            return len(taken[-1])

    weights._write_all(Slow(), bytes(range(100)))
    assert b"".join(taken) == bytes(range(100)) and len(taken) == 15


@pytest.mark.parametrize("at", [0, 2, 3])
def test_a_full_disk_ends_the_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: int) -> None:
    """At the header, in between, and at the last tensor."""
    written: list[int] = []

    def full(file: Any, data: Any) -> None:
        written.append(len(data))
        if len(written) == at + 1:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(weights, "_write_all", full)
    plan = {name: StoredTensor((64,), "float32", (1,), (name,)) for name in "abc"}
    with pytest.raises(OSError, match="No space left"):
        weights.write(tmp_path / "w", plan, {name: torch.zeros(64) for name in "abc"})
    assert len(written) == at + 1


def test_small_parameters_become_slices_of_longer_ones() -> None:
    module = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 40))
    before = module(torch.ones(1, 3))
    renamed = layout.pad_small(module)
    assert renamed == {
        "0.parametrizations.weight.original": "0.weight",
        "0.parametrizations.bias.original": "0.bias",
    }
    assert {p.numel() for n, p in module.named_parameters() if n in renamed} == {layout.PADDED}
    assert torch.equal(module(torch.ones(1, 3)), before)


def test_only_the_word_table_may_have_more_rows_than_the_checkpoint(tmp_path: Path) -> None:
    source = {"a": torch.arange(6.0).view(3, 2)}
    stored = StoredTensor(shape=(5, 2), dtype="float32", stride=(2, 1), sources=("a",))
    made = weights.physical("text_model.embeddings.token_embedding.weight", stored, source).view(5, 2)
    assert torch.equal(made, torch.cat([source["a"], torch.zeros(2, 2)]))
    with pytest.raises(ExportError, match=r"has shape \(3, 2\); the compiled code reads \(5, 2\)"):
        weights.physical("text_model.embeddings.position_embedding.weight", stored, source)
