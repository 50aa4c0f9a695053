"""Hub models: the cache first and without a network, downloads of what is missing, one line for what goes wrong."""

import hashlib
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
import torch
from huggingface_hub import constants, errors

from buildtool import models
from buildtool.checkpoint import digests, hub
from buildtool.store.errors import SdxlError

COMMIT = "462165984030d82259a11f4367a4eed129e94a7b"
REPO = "Someone/Small-XL_1.0"


def put_in_cache(repo: str, root: Path, patterns: tuple[str, ...] = ("**/*",), commit: str = COMMIT) -> Path:
    """Lays files out as the hub's cache does: blobs named by sha256 (LFS) or git's sha1, and links to them."""
    home = Path(constants.HF_HUB_CACHE) / f"models--{repo.replace('/', '--')}"
    (home / "blobs").mkdir(parents=True, exist_ok=True)
    (home / "refs").mkdir(exist_ok=True)
    (home / "refs" / "main").write_text(commit)
    snapshot = home / "snapshots" / commit
    for source in sorted({path for pattern in patterns for path in root.glob(pattern) if path.is_file()}):
        data = source.read_bytes()
        large = source.suffix == ".safetensors"
        blob = home / "blobs" / (hashlib.sha256(data).hexdigest() if large else hashlib.sha1(data).hexdigest())
        blob.write_bytes(data)
        link = snapshot / source.relative_to(root)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.unlink(missing_ok=True)
        link.symlink_to(os.path.relpath(blob, link.parent))
    return snapshot


class StandInHub:
    """Stands in for the hub: lists the files of one folder, and "downloads" into the cache."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.fetched: list[str] = []
        self.error: Exception | None = None

    def model_info(self, repo: str, revision: str | None = None) -> Any:
        if self.error:
            raise self.error
        files = (path.relative_to(self.root) for path in self.root.rglob("*") if path.is_file())
        return SimpleNamespace(siblings=[SimpleNamespace(rfilename=file.as_posix()) for file in files])

    def snapshot_download(self, repo: str, revision: str | None, allow_patterns: list[str]) -> str:
        wanted = tuple(name for name in allow_patterns if (self.root / name).exists())
        self.fetched += [name for name in wanted if name.endswith(".safetensors")]
        return str(put_in_cache(repo, self.root, wanted))


@pytest.fixture
def online(small_model: Path, monkeypatch: pytest.MonkeyPatch) -> StandInHub:
    stand_in = StandInHub(small_model)
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: stand_in)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", stand_in.snapshot_download)
    return stand_in


@pytest.fixture
def no_hashing(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    def refuse(path: Path, progress: object) -> str:
        raise AssertionError(f"{path} was read")

    monkeypatch.setattr(digests, "_hash", refuse)
    yield


def error_of(**options: Any) -> str:
    with pytest.raises(SdxlError) as caught:
        models.resolve(REPO, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.usefixtures("no_hashing")
def test_cached_model_needs_no_network_and_no_hashing(small_model: Path) -> None:
    put_in_cache(REPO, small_model)
    source = models.resolve(REPO)
    assert (source.name, source.revision, source.model) == ("someone--small-xl_1.0", COMMIT, REPO)
    file = small_model / "unet/diffusion_pytorch_model.safetensors"
    assert source.weights["unet"] == hashlib.sha256(file.read_bytes()).hexdigest()
    assert torch.is_tensor(source.tensors("unet")["conv_in.weight"])
    assert models.resolve(REPO, revision=COMMIT).weights == source.weights
    assert models.resolve(REPO, variant="fp16").weights != source.weights


def test_cached_and_local_copies_of_a_model_have_the_same_ingredients(small_model: Path) -> None:
    put_in_cache(REPO, small_model)
    cached, local = models.resolve(REPO), models.resolve(str(small_model))
    assert (cached.weights, cached.tokenizers, cached.configs) == (local.weights, local.tokenizers, local.configs)


def test_cached_model_imports_no_torch(small_model: Path) -> None:
    put_in_cache(REPO, small_model)
    code = (
        "import sys; from buildtool import models; models.resolve(sys.argv[1]);"
        "sys.exit(f'imported torch' if {'torch', 'numpy', 'rich', 'safetensors'} & set(sys.modules) else 0)"
    )
    environment = {**os.environ, "HF_HUB_CACHE": constants.HF_HUB_CACHE, "HF_HUB_OFFLINE": "1"}
    subprocess.run([sys.executable, "-c", code, REPO], check=True, env=environment)


def test_downloads_what_is_needed_and_no_more(online: StandInHub) -> None:
    (online.root / "sdxl_base_1.0.safetensors").write_bytes(b"the same model again, as a single file")
    (online.root / "unet/model.onnx").write_bytes(b"")
    models.resolve(REPO, variant="fp16")
    assert sorted(online.fetched) == [
        "text_encoder/model.fp16.safetensors",
        "text_encoder_2/model.fp16.safetensors",
        "unet/diffusion_pytorch_model.fp16.safetensors",
        "vae/diffusion_pytorch_model.fp16.safetensors",
    ]
    online.fetched.clear()
    models.resolve(REPO, variant="fp16")
    assert online.fetched == []


def test_a_refiner_is_downloaded_without_what_it_lacks(online: StandInHub, small_refiner: Path) -> None:
    assert online.root == small_refiner
    source = models.resolve(REPO, variant="fp16")
    assert sorted(file.partition("/")[0] for file in online.fetched) == ["text_encoder_2", "unet", "vae"]
    online.fetched.clear()
    online.error = errors.OfflineModeIsEnabled("offline")
    assert models.resolve(REPO, variant="fp16").weights == source.weights and online.fetched == []


def test_completes_a_partial_download(online: StandInHub) -> None:
    put_in_cache(REPO, online.root, ("*.json", "[s-v]*/*.json", "*/*.txt", "vae/*", "text_encoder/*"))
    assert models.resolve(REPO).revision == COMMIT
    assert "unet/diffusion_pytorch_model.safetensors" in online.fetched


def test_variant_that_only_some_components_have(online: StandInHub, monkeypatch: pytest.MonkeyPatch) -> None:
    (online.root / "vae/diffusion_pytorch_model.fp16.safetensors").unlink()
    source = models.resolve(REPO, variant="fp16")
    assert "vae/diffusion_pytorch_model.safetensors" in online.fetched
    online.error = errors.OfflineModeIsEnabled("offline")
    assert models.resolve(REPO, variant="fp16").weights == source.weights


def test_not_sdxl_is_told_before_its_weights_are_fetched(online: StandInHub, edit: Callable[..., None]) -> None:
    edit(online.root / "model_index.json", _class_name="StableDiffusionPipeline")
    edit(online.root / "unet/config.json", cross_attention_dim=768)
    assert f"{REPO} is Stable Diffusion 1.x" in error_of()
    assert online.fetched == []
    assert f"{REPO} is Stable Diffusion 1.x" in error_of()  # and again from the cache


def test_what_the_repository_lacks(online: StandInHub) -> None:
    assert "has no files of the variant 'bf16'; it has fp16" in error_of(variant="bf16")
    (online.root / "unet/diffusion_pytorch_model.safetensors").unlink()
    assert "--variant fp16" in error_of()
    for path in (online.root / "unet").glob("*.safetensors"):
        path.rename(path.with_suffix(".bin"))
    assert "no plain safetensors files of its unet" in error_of()
    (online.root / "model_index.json").unlink()
    shutil.rmtree(Path(constants.HF_HUB_CACHE))
    (online.root / "model.safetensors").write_bytes(b"")
    assert f"hf download {REPO} model.safetensors" in error_of()


def test_what_goes_wrong_on_the_hub(online: StandInHub) -> None:
    response: Any = SimpleNamespace(status_code=404, headers={}, request=None)
    online.error = errors.GatedRepoError("gated", response=response)
    assert "is gated" in error_of() and "hf auth login" in error_of()
    online.error = errors.RepositoryNotFoundError("missing", response=response)
    assert "is not on the hub" in error_of()
    online.error = errors.RevisionNotFoundError("missing", response=response)
    assert "has no revision 'v9'" in error_of(revision="v9")
    online.error = ConnectionError("unreachable")
    assert f"hf download {REPO} --revision v9" in error_of(revision="v9")
    online.error = ZeroDivisionError()
    with pytest.raises(ZeroDivisionError):  # a bug keeps its traceback
        models.resolve(REPO)


def test_names_that_no_hub_has() -> None:
    with pytest.raises(SdxlError, match="is not a hub id"):
        models.resolve("owner--x/name")


def test_offline_names_the_command() -> None:
    assert f"hf download {REPO}" in error_of()


def test_single_file_takes_configs_from_the_cache(
    small_model: Path, original: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    from safetensors.torch import save_file

    put_in_cache(hub.BASE, small_model, ("*.json", "*/*.json", "*/*.txt"))
    save_file(original, tmp_path / "m.safetensors")
    assert models.resolve(str(tmp_path / "m.safetensors")).configs == models.resolve(str(small_model)).configs


@pytest.mark.usefixtures("no_hashing")
def test_vae_of_the_hub(small_model: Path) -> None:
    put_in_cache(REPO, small_model)
    put_in_cache("madebyollin/sdxl-vae-fp16-fix", small_model / "vae")
    whole = models.resolve(REPO)
    assert models.resolve(REPO, vae="fp16-fix").weights == whole.weights
    assert models.resolve(REPO, vae="fp16-fix").vae == "fp16-fix"
    assert models.resolve(REPO, vae=REPO).weights == whole.weights  # the vae/ of a whole model
    assert "madebyollin/taesdxl" in error_of(vae="tiny")


def test_vae_is_downloaded(online: StandInHub) -> None:
    models.resolve(str(online.root), vae="someone/vae")
    assert online.fetched == ["vae/diffusion_pytorch_model.safetensors"]


def test_weights_files_of_real_repositories() -> None:
    names = [
        "unet/diffusion_pytorch_model.safetensors",
        "unet/diffusion_pytorch_model.fp16.safetensors",
        "unet/diffusion_flax_model.msgpack",
        "unet/openvino_model.bin",
        "vae/diffusion_pytorch_model.safetensors.index.json",
        "vae/diffusion_pytorch_model-00001-of-00002.safetensors",
        "vae/diffusion_pytorch_model-00002-of-00002.safetensors",
        "vae/diffusion_pytorch_model.safetensors.index.fp16.json",
        "vae/diffusion_pytorch_model.fp16-00001-of-00002.safetensors",
        "vae/diffusion_pytorch_model.fp16-00002-of-00002.safetensors",
        "text_encoder/model.safetensors",
        "text_encoder_2/model.safetensors",
        "vae_1_0/diffusion_pytorch_model.safetensors",
    ]
    assert hub.choose_weights(REPO, names, "") == [names[0], names[5], names[6], names[4], names[10], names[11]]
    assert hub.choose_weights(REPO, names, "fp16")[:4] == [names[1], names[8], names[9], names[7]]
