"""Specs to keys: what changes which key, and what is refused before any work."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from buildtool import plan
from buildtool.plan import Plan, Spec
from buildtool.store import interpreter, machine
from buildtool.store.errors import SdxlError
from buildtool.store.key import differences
from tests import standin_interpreter


def one(**changes: Any) -> Plan:
    (planned,) = plan.plan(Spec(**{"backend": "torch", "model": "tiny", "gpu": "cpu", **changes}))
    return planned


def test_the_table_of_components_is_the_exporters() -> None:
    from exporters import sdxl

    assert {c.name: c.source for c in sdxl.COMPONENTS} == plan.COMPONENTS | plan.ENCODER
    assert {c.name for c in sdxl.COMPONENTS if not c.sized} == set(plan.UNSIZED)
    assert {c.name for c in sdxl.COMPONENTS if not c.batched} == set(plan.UNSIZED)


def test_planning_imports_no_torch() -> None:
    script = (
        "import sys; from buildtool import plan; "
        "plan.plan(plan.Spec(backend='torch', model='tiny', gpu='cpu')); "
        "sys.exit(bool({'torch', 'diffusers', 'transformers', 'rich'} & sys.modules.keys()))"
    )
    assert subprocess.run([sys.executable, "-c", script]).returncode == 0


def test_the_same_spec_gives_the_same_key() -> None:
    assert one().key == one().key and one().key.digest == one().key.digest


@pytest.mark.parametrize(
    ("changes", "ingredients"),
    [
        ({"resolutions": ((320, 256),)}, {"width"}),
        ({"resolutions": ((256, 320),)}, {"height"}),
        ({"batch": 2}, {"batch"}),
    ],
)
def test_an_option_changes_its_ingredient(changes: dict[str, Any], ingredients: set[str]) -> None:
    assert differences(one().key, one(**changes).key).keys() == ingredients


def test_an_encoder_is_in_the_key_and_leaves_all_other_code_as_it_is() -> None:
    plain, other = one(), one(with_encoder=True)
    assert differences(plain.key, other.key) == {"options.encoder": (None, True)}
    assert "encoder" not in plain.key.options and "--with-encoder" not in plain.command
    assert other.code_keys.keys() - plain.code_keys.keys() == {"vae_encoder"}
    assert all(other.code_keys[name] == key for name, key in plain.code_keys.items())
    assert "--with-encoder" in other.command


def test_spare_tokens_are_in_the_text_encoders_code_alone() -> None:
    plain, other = one(), one(spare_tokens=4)
    assert differences(plain.key, other.key) == {"options.spare_tokens": (None, 4)}
    changed = {name for name, key in plain.code_keys.items() if other.code_keys[name] != key}
    assert changed == {"text_encoder", "text_encoder_2"}
    assert differences(other.code_keys["text_encoder"], one(spare_tokens=5).code_keys["text_encoder"])
    assert "--spare-tokens" not in plain.command and plain.compiled_configs == plain.source.configs
    grown = {name: config["vocab_size"] for name, config in other.compiled_configs.items() if "vocab_size" in config}
    assert grown == {"text_encoder": 1028, "text_encoder_2": 1028}
    assert other.command[other.command.index("--spare-tokens") + 1] == "4"


def test_a_refiner_shares_all_code_but_the_unets() -> None:
    base, refiner = one(), one(model="tiny-refiner")
    assert refiner.code_keys.keys() == {"text_encoder_2", "unet", "vae_decoder"}
    same = {name for name, key in refiner.code_keys.items() if key == base.code_keys[name]}
    assert same == {"text_encoder_2", "vae_decoder"}
    assert refiner.key.tokenizers.keys() == {"tokenizer_2"} and refiner.key.weights["unet"] != base.key.weights["unet"]


def test_what_a_refiner_would_take_is_told(tmp_path: Path) -> None:
    from buildtool import estimate

    told = [estimate.estimate(one(model=model, artifacts=tmp_path)) for model in ("tiny", "tiny-refiner")]
    assert told[1]["compiles"] == ["text_encoder_2", "unet", "vae_decoder"]
    assert 0 < told[1]["disk_bytes"] < told[0]["disk_bytes"]


def test_a_preset_is_its_options_and_no_ingredient_of_the_key(tmp_path: Path) -> None:
    from click.testing import CliRunner

    from buildtool.cli import main

    def path(*words: str) -> str:
        common = ("torch", "--model", "tiny", "--gpu", "cpu", "--artifacts", str(tmp_path), "--dry-run")
        done = CliRunner().invoke(main, [*common, *words])
        assert done.exit_code == 0, done.output
        return done.stdout.splitlines()[0]

    assert path("--preset", "fastest") == path("--vae", "tiny") != path()
    assert path("--preset", "fastest", "--vae", "default") == path("--preset", "quality") == path()
    assert path("--preset", "vram4") == path("--vae", "tiny", "--segments", "8") != path("--vae", "tiny")


def test_a_preset_is_refused_where_an_option_of_it_is_not() -> None:
    from click.testing import CliRunner

    from buildtool.cli import main

    done = CliRunner().invoke(main, ["onnx", "--model", "tiny", "--gpu", "cpu", "--preset", "vram4", "--dry-run"])
    assert done.exit_code == 2
    assert "vram4 sets --segments 8, which this backend lacks. Try: sdxl-build torch" in done.output


def test_tiles_are_in_the_key_where_pictures_are_larger_and_change_the_decoders_code_alone() -> None:
    plain, tiled = one(), one(vae_tile=(128, 256))
    assert tiled.key.options["vae_tile"] == [128, 256] and "--vae-tile 128x256" in " ".join(tiled.command)
    changed = {name for name in plan.COMPONENTS if plain.code_keys[name].digest != tiled.code_keys[name].digest}
    assert changed == {"vae_decoder"}
    assert tiled.code_keys["vae_decoder"] == one(resolutions=((128, 256),)).code_keys["vae_decoder"]
    assert one(vae_tile=(512, 128)).key.options["vae_tile"] == [256, 128]  # a tile is no larger than the picture
    assert one(vae_tile=(256, 512)).key == plain.key
    with pytest.raises(SdxlError, match=r"--vae-tile 100x128 can't be made: both sides have to be multiples of 8\."):
        one(vae_tile=(100, 128))


def test_another_vae_changes_weights_and_code_of_the_vae_alone() -> None:
    plain, tiny = one(), one(vae="tiny")
    assert plain.key.weights["vae"] != tiny.key.weights["vae"]
    changed = {name for name in plan.COMPONENTS if plain.code_keys[name].digest != tiny.code_keys[name].digest}
    assert changed == {"vae_decoder"}


def test_another_checkpoint_of_the_architecture_shares_all_code() -> None:
    first, second = one(model="random:tiny:1"), one(model="random:tiny:2")
    assert first.key.digest != second.key.digest
    assert first.code_keys == second.code_keys == one().code_keys


def test_text_encoders_share_code_between_resolutions_and_batches() -> None:
    plain, other = one(), one(resolutions=((512, 256),), batch=4)
    changed = {name for name in plan.COMPONENTS if plain.code_keys[name].digest != other.code_keys[name].digest}
    assert changed == {"unet", "vae_decoder"}


def test_the_vae_of_another_factor_changes_the_unets_code() -> None:
    """Latents of another size are other inputs, though the UNet's own config is the same."""
    assert one().code_keys["unet"].config["vae_scale_factor"] == 8


def test_several_resolutions_are_several_plans() -> None:
    planned = plan.plan(Spec(backend="torch", model="tiny", gpu="cpu", resolutions=((256, 256), (320, 192))))
    assert [(p.width, p.height) for p in planned] == [(256, 256), (320, 192)]


def test_the_command_builds_the_same_key() -> None:
    planned = one(resolutions=((320, 192),), batch=2, vae="tiny", spare_tokens=3)
    from buildtool.cli import torch_command

    words = list(planned.command[2:])
    params = torch_command.make_context("torch", words).params
    spec = {k: v for k, v in params.items() if k not in ("dry_run", "as_json", "preset")}
    (again,) = plan.plan(Spec(backend=planned.command[1], **spec))
    assert again.key == planned.key


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"resolutions": ((250, 256),)}, "multiples of 8. Try --resolution 248x256"),
        ({"resolutions": ((0, 256),)}, "multiples of 8"),
        ({"precision": "fp16"}, "runs in fp32, not fp16"),
        ({"batch": 0}, "at least 1"),
        ({"gpu": "sm999"}, "sm999"),
        ({"gpu": "sm86"}, "sm86"),
        ({"model": "no/such/folder"}, "does not exist"),
    ],
)
def test_what_cannot_be_built_is_told_at_once(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(SdxlError, match=words):
        one(**changes)


@pytest.fixture
def present(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Makes a GPU of some target this machine's, with what torch needs for it."""
    versions = machine.versions

    def put(target: str) -> None:
        monkeypatch.setattr(machine, "gpus", lambda: [machine.Gpu(0, f"a {target}", target, 85 * 10**9, "580.159")])
        monkeypatch.setattr(machine, "torch_version", lambda: {"torch": "2.11.0+cu130", "cuda": "13.0"})
        triton = {"triton": "3.6.0"}
        monkeypatch.setattr(
            machine, "versions", lambda *names: versions(*names) | (triton if "triton" in names else {})
        )

    return put


def test_fp8_changes_the_unets_code_alone(present: Callable[[str], None]) -> None:
    present("sm90")
    half, eight = one(gpu="auto"), one(gpu="auto", precision="fp8")
    assert half.key.precision == "fp16" and eight.key.precision == "fp8" and eight.key.options["fp8"]
    assert differences(half.key, eight.key).keys() == {"precision", "options.fp8"}
    changed = {name for name in half.code_keys if half.code_keys[name] != eight.code_keys[name]}
    assert changed == {"unet"} and eight.code_keys["unet"].precision == "fp8"


def test_fp8_is_refused_where_the_gpu_or_the_backend_has_none(present: Callable[[str], None]) -> None:
    present("sm86")
    with pytest.raises(SdxlError, match=r"multiplies in fp8 .*, and sm86 doesn't. Try: fp16"):
        one(gpu="auto", precision="fp8")
    with pytest.raises(SdxlError, match=r"onnx backend has no precision fp8. Try: fp32, fp16, bf16"):
        one(backend="onnx", gpu="auto", precision="fp8")


def test_a_vae_in_a_folder_is_named_by_its_folder_whatever_the_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import shutil

    from buildtool import models

    shutil.copytree(models.TINY / "vae", tmp_path / "my-vae")
    monkeypatch.chdir(tmp_path)
    assert one(vae="my-vae").key == one(vae=str(tmp_path / "my-vae")).key
    assert one(vae="my-vae").key.vae == "my-vae"


def test_onediffs_compiler_and_its_own_packages_are_in_both_keys(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Of a stand-in interpreter: its versions, not its path."""

    def planned(folder: str, **installed: str) -> Plan:
        python = standin_interpreter.write(tmp_path / folder, {**standin_interpreter.INSTALLED, **installed})
        monkeypatch.setenv(interpreter.VARIABLE, str(python))
        return one(backend="onediff", compiler="nexfort")

    plain, same, other = planned("a"), planned("b"), planned("c", nexfort="0.2")
    assert plain.key.options == {"compiler": "nexfort", "mode": "cache-all"}
    assert plain.key == same.key and str(tmp_path) not in str(plain.key)
    changed = {"toolchain.onediff.nexfort": ("0.1.dev330+standin", "0.2")}
    assert differences(plain.key, other.key) == changed
    assert all(differences(key, other.code_keys[name]) == changed for name, key in plain.code_keys.items())
    tuned = one(backend="onediff", mode="benchmark:max-autotune")
    assert tuned.code_keys["unet"].options["mode"] == "benchmark:max-autotune:cache-all"
    assert tuned.command[-4:-2] == ("--mode", "benchmark:max-autotune")
    for mode, words in (("O2:freezing", "'freezing' is none"), ("cudagraphs:O2", "needs a GPU"), ("", "'' is none")):
        with pytest.raises(SdxlError, match=words):
            one(backend="onediff", mode=mode or ":")
    monkeypatch.setenv(
        interpreter.VARIABLE, str(standin_interpreter.write(tmp_path / "d", {"onediff": "1.2.0", "oneflow": "1.0"}))
    )
    graph = one(backend="onediff")
    assert graph.key.options == {"compiler": "oneflow"} == graph.code_keys["unet"].options
    assert graph.command[-4:-2] == ("--compiler", "oneflow")
    with pytest.raises(SdxlError, match="oneflow has no --mode"):
        one(backend="onediff", mode="O2")
