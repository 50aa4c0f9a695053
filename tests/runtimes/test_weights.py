"""A weights file's bits given back to tensors that were changed in place."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from buildtool.store.errors import SdxlError
from buildtool.store.manifest import StoredTensor
from runtimes import weights
from runtimes.weights import Weights

NAMES = ("a", "b", "c")
ORIGINAL = {name: torch.arange(6.0) + 10 * number for number, name in enumerate(NAMES)}


@pytest.fixture
def manifest(tmp_path: Path) -> Any:
    """A stand-in of one component, whose file has three matrices, transposed."""
    save_file(ORIGINAL, tmp_path / "w")
    stored = StoredTensor(shape=(2, 3), dtype="float32", stride=(1, 2), sources=("x",))
    described = SimpleNamespace(weights="w", tensors=dict.fromkeys(NAMES, stored))
    return SimpleNamespace(components={"unet": described}, files={"w": SimpleNamespace(sha256="0")})


def test_only_what_is_named_is_restored(tmp_path: Path, manifest: Any) -> None:
    ours = Weights(torch.device("cpu"))
    tensors = ours.tensors(tmp_path, manifest, "unet")
    for tensor in tensors.values():
        tensor.zero_()
    ours.restore(tmp_path, manifest, "unet", ["b", "c"])
    for name, tensor in tensors.items():
        wanted = torch.zeros(2, 3) if name == "a" else ORIGINAL[name].view(3, 2).t()
        assert torch.equal(tensor, wanted)


def test_what_was_not_changed_stays_the_files(tmp_path: Path, manifest: Any) -> None:
    """A word table of 32 MB, one row of which was written to, doesn't become this process's own."""
    save_file({"a": torch.ones(8192, 1024)}, tmp_path / "w")
    table = StoredTensor(shape=(8192, 1024), dtype="float32", stride=(1024, 1), sources=("x",))
    manifest.components["unet"].tensors = {"a": table}
    ours = Weights(torch.device("cpu"))
    ours.tensors(tmp_path, manifest, "unet")["a"][8000].zero_()
    before = own_bytes()
    ours.restore(tmp_path, manifest, "unet", ["a"])
    assert ours.tensors(tmp_path, manifest, "unet")["a"].min() == 1
    assert own_bytes() - before < 16 << 20


def own_bytes() -> int:
    """Bytes of main memory that are this process's alone."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon:"))
    return int(line.split()[1]) * 1024


@pytest.fixture
def on_a_gpu(tmp_path: Path, manifest: Any, monkeypatch: pytest.MonkeyPatch) -> Weights:
    """Weights that take themselves for a GPU's, and lie in main memory."""
    ours, here = Weights(torch.device("cuda")), Weights(torch.device("cpu"))
    ours._files["0"] = here._file(tmp_path / "w", "0")
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    return ours


def test_the_parts_that_are_sent_again_are_the_tensors(
    tmp_path: Path, manifest: Any, on_a_gpu: Weights, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent: list[bytes] = []
    data, header = on_a_gpu._files["0"]

    def send_again(path: Path, spans: Any, address: int, index: int) -> None:
        begins = [begin for begin, _ in spans]
        assert [address + begin for begin in begins] == [
            data.data_ptr() + header[name]["data_offsets"][0] for name in ("a", "c")
        ]
        sent.extend(path.read_bytes()[begin:end] for begin, end in spans)

    monkeypatch.setattr(weights, "send_again", send_again)
    on_a_gpu.restore(tmp_path, manifest, "unet", ["c", "a"])
    assert sent == [ORIGINAL[name].numpy().tobytes() for name in ("a", "c")]


def test_a_file_that_is_gone_or_another_is_told(tmp_path: Path, manifest: Any, on_a_gpu: Weights) -> None:
    save_file({name: torch.zeros(7) for name in NAMES}, tmp_path / "w2")
    (tmp_path / "w2").replace(tmp_path / "w")
    with pytest.raises(SdxlError, match="not the file any more that was loaded"):
        on_a_gpu.restore(tmp_path, manifest, "unet", ["a"])
    (tmp_path / "w").unlink()
    with pytest.raises(SdxlError, match="w is missing"):
        on_a_gpu.restore(tmp_path, manifest, "unet", ["a"])
