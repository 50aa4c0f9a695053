"""``sdxl-build --lora``: what of the keys it changes, and what is refused before anything is built."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from buildtool import lora, models, plan
from buildtool.plan import Plan, Spec
from buildtool.store.errors import SdxlError
from buildtool.store.key import differences
from tests import lora_files


def one(*loras: str, backend: str = "torch") -> Plan:
    (planned,) = plan.plan(Spec(backend=backend, model="tiny", gpu="cpu", lora=loras))
    return planned


@pytest.fixture(scope="module")
def tensors() -> dict[str, Any]:
    source = models.resolve("tiny")
    return {name: dict(source.tensors(name)) for name in ("unet", "text_encoder")}


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory, tensors: dict[str, Any]) -> Path:
    """For the UNet alone."""
    pairs = lora_files.random_pairs({"unet": tensors["unet"]}, 1, ("attn1.to_q",))
    return lora_files.write(tmp_path_factory.mktemp("lora") / "a.safetensors", pairs, "original", layers=2)


def test_a_lora_of_what_a_refiner_lacks_is_refused(file: Path, tensors: dict[str, Any], tmp_path: Path) -> None:
    texts = lora_files.random_pairs({"text_encoder": tensors["text_encoder"]}, 1, ("q_proj",))
    other = lora_files.write(tmp_path / "b.safetensors", texts, "peft")
    with pytest.raises(SdxlError, match="is for a text_encoder, which tiny-refiner doesn't have"):
        lora.fuse(models.resolve("tiny-refiner"), [str(other)])
    with pytest.raises(SdxlError, match="no low-rank product for a tensor of this model"):  # of the base model's UNet
        lora.check(models.resolve("tiny-refiner"), [str(file)])


def test_weights_change_and_code_does_not(file: Path) -> None:
    plain, fused = one(), one(f"{file}:0.8")
    assert differences(plain.key, fused.key).keys() == {"options.lora", "weights.unet"}
    assert plain.code_keys == fused.code_keys
    assert fused.command[fused.command.index("--lora") + 1] == f"{file}:0.8"
    assert "--lora" not in plain.command and "lora" not in plain.key.options


def test_digest_and_scale_are_in_the_key(file: Path, tensors: dict[str, Any], tmp_path: Path) -> None:
    pairs = lora_files.random_pairs({"unet": tensors["unet"]}, 2, ("attn1.to_q",))
    other = lora_files.write(tmp_path / "a.safetensors", pairs, "original", layers=2)
    copy = tmp_path / "copy.safetensors"
    copy.write_bytes(file.read_bytes())
    keys = [one(text).key.digest for text in (f"{file}", f"{file}:0.5", f"{other}")]
    assert len({one().key.digest, *keys}) == 4
    assert one(str(copy)).key.digest == keys[0]  # where it lies is not
    assert one(str(file), str(other)).key.digest not in keys


def test_engines_that_hold_their_weights_get_another_code_key(file: Path) -> None:
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed")
    plain, fused = (plan.plan(Spec(backend="trt", model="tiny", gpu="sm86", lora=t))[0] for t in ((), (str(file),)))
    changed = {name for name, key in plain.code_keys.items() if key != fused.code_keys[name]}
    assert changed == {"unet"}


def test_planning_imports_no_torch(file: Path) -> None:
    script = (
        "import sys; from buildtool import plan; "
        f"plan.plan(plan.Spec(backend='torch', model='tiny', gpu='cpu', lora=({str(file)!r},))); "
        "sys.exit(bool({'torch', 'diffusers', 'safetensors'} & sys.modules.keys()))"
    )
    assert subprocess.run([sys.executable, "-c", script]).returncode == 0


def test_what_fits_no_tensor_is_refused(file: Path, tensors: dict[str, Any], tmp_path: Path) -> None:
    lora.check(models.resolve("tiny"), [str(file)])
    pairs = {(c, f"nowhere.{n}"): p for (c, n), p in lora_files.random_pairs(tensors, 1, ("q_proj",)).items()}
    wrong = lora_files.write(tmp_path / "b.safetensors", pairs, "kohya")
    with pytest.raises(SdxlError, match="lora_te1_nowhere_text_model_encoder"):
        lora.check(models.resolve("tiny"), [str(wrong)])
    with pytest.raises(SdxlError, match="does not exist"):
        one("none.safetensors:0.5")


def test_a_fused_tensor_is_the_sum(file: Path, tensors: dict[str, Any]) -> None:
    pairs = lora_files.random_pairs({"unet": tensors["unet"]}, 1, ("attn1.to_q",))
    fused = one(f"{file}:0.8").source.tensors("unet")
    assert fused.keys() == tensors["unet"].keys()
    for name, weight in tensors["unet"].items():
        pair = pairs.get(("unet", name))
        wanted = weight if pair is None else lora_files.fused(weight, pair, 0.8)
        assert (fused[name] - wanted).abs().max() <= 1e-6 * wanted.abs().max()
