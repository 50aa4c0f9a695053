"""``sdxl-build`` on the GPU: what it leaves, and that it is right."""

import json
from pathlib import Path
from typing import Any

import pytest

from buildtool.store import manifest as manifests
from tests.gpu.conftest import PRECISIONS, Run
from tests.gpu.helpers import only_line

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("name", [*PRECISIONS, "wide"])
def test_golden_tensors_pass_in_a_fresh_process(artifacts: dict[str, Path], command: Run, name: str) -> None:
    done = command("runtimes.check", str(artifacts[name]), "--json")
    assert done.returncode == 0, done.stdout + done.stderr
    variants = json.loads(done.stdout.strip().splitlines()[-1])["variants"]
    assert len(variants) == 5
    for variant, result in variants.items():
        print(f"{name} {variant}: {result['error']}")
        assert result["error"] and max(result["error"].values()) <= result["tolerance"], variant


@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_manifest_says_what_was_built_and_that_it_passed(artifacts: dict[str, Path], precision: str) -> None:
    manifest = manifests.read(artifacts[precision])
    assert manifest.key.precision == precision and manifest.key.target.startswith("sm")
    dtype = {"fp16": "float16", "bf16": "bfloat16", "fp32": "float32"}[precision]
    for component in manifest.components.values():
        for variant in component.variants.values():
            assert variant.check.status == "passed"
            assert max(variant.check.error.values()) <= variant.check.tolerance
            assert all(spec.dtype == dtype for spec in variant.outputs)


def test_code_is_small_and_holds_no_weights(artifacts: dict[str, Path]) -> None:
    manifest = manifests.read(artifacts["fp16"])
    code = {v.file for c in manifest.components.values() for v in c.variants.values()}
    assert sum(manifest.files[name].size for name in code) < 20e6


def test_a_second_resolution_adds_no_weights_on_the_disk(artifacts: dict[str, Path]) -> None:
    one, two = (manifests.read(artifacts[name]) for name in ("fp16", "wide"))
    assert {c: m.weights for c, m in one.components.items()} == {c: m.weights for c, m in two.components.items()}
    for component in one.components.values():
        first, second = (artifacts[name] / component.weights for name in ("fp16", "wide"))
        assert first.stat().st_ino == second.stat().st_ino


def test_building_again_is_a_hit(artifacts: dict[str, Path], store_root: Path, command: Run) -> None:
    words = ["torch", "--model", "tiny", "--precision", "fp16", "--json", "--artifacts", str(store_root)]
    done = command("buildtool.cli", *words)
    assert done.returncode == 0, done.stderr
    (row,) = json.loads(done.stdout)["artifacts"]
    assert row["hit"] and Path(row["path"]) == artifacts["fp16"]


def test_text_encoders_are_compiled_once_for_all_resolutions(built: dict[str, list[dict[str, Any]]]) -> None:
    second = built["fp16"][1]
    assert second["hit"] or not [name for name in second["compiled"] if name.startswith("text_encoder")]


def test_a_gpu_that_is_not_there(command: Run, tmp_path: Path) -> None:
    words = ["torch", "--model", "tiny", "--gpu-index", "99", "--artifacts", str(tmp_path)]
    assert "99" in only_line(command("buildtool.cli", *words))
