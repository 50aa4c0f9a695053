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
from runtimes.weights import HostFile, Weights

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


class StandInCudart:
    """The CUDA functions that lock pages. Read-only ones are refused, or not; what is locked is remembered."""

    def __init__(self, refuses: bool) -> None:
        self.refuses = refuses
        self.asked: list[tuple[int, int, int]] = []
        self.locked: dict[int, int] = {}

    def cudaHostRegister(self, address: int, size: int, flags: int) -> int:
        self.asked.append((address, size, flags))
        if self.refuses and flags & 8:
            return 801
        self.locked[address] = size
        return 0

    def cudaHostUnregister(self, address: int) -> int:
        del self.locked[address]
        return 0


@pytest.mark.parametrize("refuses", [False, True])
def test_a_file_in_host_memory_is_copied_only_where_its_own_pages_cannot_be_locked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refuses: bool
) -> None:
    cudart, path = StandInCudart(refuses), tmp_path / "w"
    path.write_bytes(bytes(range(256)) * 100)
    monkeypatch.setattr(torch.cuda, "cudart", lambda: cudart)
    mapped = torch.empty(0)
    usual = weights._mapped

    def map_it(path: Path, size: int) -> torch.Tensor:
        nonlocal mapped
        mapped = usual(path, size)
        return mapped

    forgotten: list[None] = []
    monkeypatch.setattr(weights, "_mapped", map_it)
    monkeypatch.setattr(weights, "_forget_cuda_error", lambda: forgotten.append(None))
    held = HostFile(path, 25_600, pin=True)
    assert held.data.dtype == torch.uint8 and held.data.numpy().tobytes() == path.read_bytes()
    assert (held.data.data_ptr() == mapped.data_ptr()) != refuses
    assert cudart.locked == {held.data.data_ptr(): 25_600}
    assert [flags for _, _, flags in cudart.asked] == ([9, 1] if refuses else [9])
    assert len(forgotten) == refuses, "or the next launch would fail of it"
    del held
    assert not cudart.locked


def test_a_file_that_cannot_be_locked_at_all_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    cudart, path = StandInCudart(False), tmp_path / "w"
    path.write_bytes(b"weights")
    monkeypatch.setattr(cudart, "cudaHostRegister", lambda address, size, flags: 2)
    monkeypatch.setattr(torch.cuda, "cudart", lambda: cudart)
    monkeypatch.setattr(weights, "_forget_cuda_error", lambda: None)
    with caplog.at_level("INFO", logger="runtimes"):
        held = HostFile(path, 7, pin=True)
    assert held.data.numpy().tobytes() == b"weights" and "CUDA error 2" in caplog.text
    del held  # nothing to unlock
    assert HostFile(path, 7, pin=False).data.numpy().tobytes() == b"weights"


def test_a_file_in_host_memory_takes_none_of_its_own(tmp_path: Path) -> None:
    path = tmp_path / "w"
    path.write_bytes(b"\1" * (32 << 20))
    before = own_bytes()
    held = HostFile(path, 32 << 20, pin=False)
    assert int(held.data.sum()) == 32 << 20
    assert own_bytes() - before < 16 << 20


@pytest.mark.parametrize("told", [8, 6])
def test_a_file_of_another_length_is_no_weights(tmp_path: Path, told: int) -> None:
    (tmp_path / "w").write_bytes(b"weights")
    with pytest.raises(SdxlError, match=r"w became shorter.*sdxl-build verify"):
        HostFile(tmp_path / "w", told, pin=True)
