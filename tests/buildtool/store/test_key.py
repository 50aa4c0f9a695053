"""Both keys: every ingredient counts, and equal ingredients give the same digest everywhere."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest

from buildtool.store.key import ArtifactKey, CodeKey, canonical_json, differences, flatten

ARTIFACT_CHANGES: dict[str, Any] = {
    "key_version": 2,
    "backend": "onnx",
    "model": "tiny2",
    "revision": "main",
    "variant": "fp16",
    "weights": {"unet": "12" * 32, "vae": "22" * 32},
    "configs": {"unet": {"sample_size": 8, "down": {"layers": [1, 3]}}, "scheduler": {"steps_offset": 1}},
    "tokenizers": {"tokenizer": "34" * 32},
    "target": "cpu-avx512",
    "gpu_name": "NVIDIA A10",
    "width": 72,
    "height": 72,
    "batch": 2,
    "precision": "bf16",
    "vae": "tiny",
    "options": {"fuse_qkv": False},
    "toolchain": {"torch": "2.13.1"},
}
CODE_CHANGES: dict[str, Any] = {
    "key_version": 2,
    "backend": "onnx",
    "component": "vae_decoder",
    "config": {"sample_size": 8, "down": {"layers": [1, 3]}},
    "target": "cpu-avx512",
    "gpu_name": "NVIDIA A10",
    "width": 72,
    "height": 72,
    "batch": 2,
    "precision": "bf16",
    "options": {"fuse_qkv": False},
    "toolchain": {"torch": "2.13.1"},
}
FIELDS = [(ArtifactKey, name) for name in ArtifactKey.__struct_fields__]
FIELDS += [(CodeKey, name) for name in CodeKey.__struct_fields__]


def make(standin: Any, kind: type, **changes: Any) -> Any:
    return standin.example_key(**changes) if kind is ArtifactKey else standin.example_code_key(**changes)


@pytest.mark.parametrize(("kind", "field"), FIELDS, ids=lambda value: getattr(value, "__name__", value))
def test_every_field_changes_the_key(standin: Any, kind: type, field: str) -> None:
    # a new field without a change above fails here with a KeyError
    change = (ARTIFACT_CHANGES if kind is ArtifactKey else CODE_CHANGES)[field]
    plain, changed = make(standin, kind), make(standin, kind, **{field: change})
    assert plain.digest != changed.digest
    assert {name.split(".")[0] for name in differences(plain, changed)} == {field}


@pytest.mark.parametrize(("kind", "field"), FIELDS, ids=lambda value: getattr(value, "__name__", value))
def test_every_field_is_required_and_frozen(standin: Any, kind: type, field: str) -> None:
    fields = msgspec.structs.asdict(make(standin, kind))
    with pytest.raises(AttributeError):
        setattr(make(standin, kind), field, fields[field])
    del fields[field]
    with pytest.raises(TypeError, match=field):
        kind(**fields)


@pytest.mark.parametrize(
    "configs",
    [
        {"unet": {"sample_size": 8, "down": {"layers": [2, 1]}}, "scheduler": {"steps_offset": 1}},
        {"unet": {"sample_size": 8, "down": {"layers": [1, 2], "new": None}}, "scheduler": {"steps_offset": 1}},
        {"unet": {"sample_size": 8, "down": {"layers": [1, 2]}}, "scheduler": {"steps_offset": True}},
        {"unet": {"sample_size": 8.5, "down": {"layers": [1, 2]}}, "scheduler": {"steps_offset": 1}},
        {"unet": {"sample_size": "8", "down": {"layers": [1, 2]}}, "scheduler": {"steps_offset": 1}},
        {"unet": {"sample_size": 8, "down": {"layers": [1, 2]}, "steps_offset": 1}, "scheduler": {}},
    ],
)
def test_a_change_deep_in_a_config_changes_the_key(standin: Any, configs: dict[str, Any]) -> None:
    assert standin.example_key(configs=configs).digest != standin.example_key().digest


def test_a_value_in_another_field_changes_the_key(standin: Any) -> None:
    a = standin.example_key(revision="x", variant="")
    assert a.digest != standin.example_key(revision="", variant="x").digest


def test_the_order_of_a_dict_and_the_kind_of_a_sequence_do_not_count(standin: Any) -> None:
    weights = standin.example_key().weights
    backwards = dict(reversed(weights.items()))
    assert list(backwards) != list(weights)
    assert standin.example_key(weights=backwards).digest == standin.example_key().digest
    listed, tupled = {"unet": {"layers": [1, 2]}}, {"unet": {"layers": (1, 2)}}
    assert standin.example_key(configs=listed).digest == standin.example_key(configs=tupled).digest


def test_digests_stay_what_they_are(standin: Any) -> None:
    """Whoever changes these two lines raises KEY_VERSION: every artifact that was built becomes a miss."""
    assert standin.example_key().digest == "c8abbf1cf226ced9998633047ac50a2ae61f536ef49b9fd92c273d592fe6fc6c"
    assert standin.example_code_key().digest == "0b6377883e25d5920c6c746f267deadaa6783d758ab8fd8e7bc5ae23cffabb89"
    assert canonical_json({"b": [1, 2.5, None], "a": "é"}) == '{"a":"é","b":[1,2.5,null]}'.encode()


@pytest.mark.parametrize("seed", ["0", "1", "4711"])
def test_another_process_computes_the_same_digest(standin: Any, standin_script: Path, seed: str) -> None:
    program = f"import sys; sys.path.insert(0, {str(standin_script.parent)!r})\n"
    program += "from standin_exporter import *; print(example_key().digest)"
    paths = os.pathsep.join([str(Path(__file__).parents[3]), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": paths}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == standin.example_key().digest


def test_digest_survives_json(standin: Any) -> None:
    key = standin.example_key()
    again = msgspec.json.decode(msgspec.json.encode(key), type=ArtifactKey)
    assert again.digest == key.digest


def test_folder_names_what_a_person_looks_for(standin: Any) -> None:
    key = standin.example_key(width=1024, height=768, batch=2, precision="fp16", target="sm90", gpu_name="NVIDIA H100")
    assert key.folder == f"tiny/sm90/1024x768-b2-fp16-torch-{key.digest[:8]}"


def test_flatten_names_ingredients_by_their_path() -> None:
    flat = flatten({"a": {"b": {"c": 1}, "d": []}, "e": {}, "f": None})
    assert flat == {"a.b.c": 1, "a.d": [], "e": {}, "f": None}


def test_differences_name_both_values(standin: Any) -> None:
    asked = standin.example_key(batch=2, toolchain={"torch": "2.14.0"}, weights={"unet": "11" * 32})
    assert differences(asked, standin.example_key()) == {
        "batch": (2, 1),
        "toolchain.torch": ("2.14.0", "2.13.0"),
        "weights.vae": (None, "22" * 32),
    }
    assert differences(asked, asked) == {}
