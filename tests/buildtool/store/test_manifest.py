"""The manifest: what is read is what was sealed, and no name in it leaves the folder."""

from pathlib import Path
from typing import Any

import msgspec
import pytest

from buildtool.store import manifest as manifests
from buildtool.store import summary
from buildtool.store.errors import SdxlError
from buildtool.store.manifest import FileEntry, Manifest, check_relative, decode, encode, read, seal

FILES = {
    "unet.cfg.pt2": FileEntry(size=3, sha256="aa" * 32),
    "weights/unet.safetensors": FileEntry(size=0, sha256="bb" * 32),
}


@pytest.fixture
def example(standin: Any) -> Manifest:
    made: Manifest = standin.example_manifest(standin.example_key(), FILES)
    return made


def refusal(data: bytes) -> str:
    with pytest.raises(SdxlError) as caught:
        decode(data, "here/manifest.json")
    text = str(caught.value)
    assert "\n" not in text and "here/manifest.json" in text
    return text


def tampered(example: Manifest, change: Any) -> bytes:
    """The manifest's bytes after a change to its JSON, sealed again: as a builder could write it."""
    plain = msgspec.to_builtins(example)
    change(plain)
    try:
        return encode(msgspec.convert(plain, Manifest))
    except msgspec.ValidationError:
        return msgspec.json.encode(plain)


def test_round_trip(example: Manifest) -> None:
    data = encode(example)
    assert data.endswith(b"}\n")
    assert decode(data, "x") == seal(example)
    assert encode(decode(data, "x")) == data


def test_a_change_of_any_byte_is_refused(example: Manifest) -> None:
    data = encode(example)
    for position in range(len(data)):
        for flip in (0x01, 0x20, 0x80):
            changed = bytearray(data)
            changed[position] ^= flip
            with pytest.raises(SdxlError):
                decode(bytes(changed), "x")


@pytest.mark.parametrize("cut", [0, 1, 100, -1])
def test_a_cut_or_longer_file_is_refused(example: Manifest, cut: int) -> None:
    refusal(encode(example)[:cut])
    refusal(encode(example) + b"\n")
    refusal(b" " + encode(example))


@pytest.mark.parametrize(
    "name", ["../x", "/etc/passwd", "a/../../x", "a/../b", "", "..", "./a", "a//b", "a/", "a\\b", "a\0b", "a/.."]
)
def test_names_that_leave_the_folder_are_refused(example: Manifest, name: str) -> None:
    with pytest.raises(SdxlError):
        check_relative(name)
    entry = {"size": 1, "sha256": "cc" * 32}
    with pytest.raises(SdxlError):
        decode(tampered(example, lambda plain: plain["files"].update({name: entry})), "x")

    def as_variant(plain: Any) -> None:
        plain["files"][name] = entry
        plain["components"]["unet"]["variants"]["cfg"]["file"] = name

    with pytest.raises(SdxlError):
        decode(tampered(example, as_variant), "x")


@pytest.mark.parametrize("name", ["a", "weights/unet.safetensors", "a..b", "..a", ".hidden", "a b/ä"])
def test_ordinary_names_are_taken(name: str) -> None:
    check_relative(name)


def test_a_file_that_is_used_must_be_listed(example: Manifest) -> None:
    assert "'unet.cfg.pt2'" in refusal(tampered(example, lambda plain: plain["files"].pop("unet.cfg.pt2")))
    assert "unet.safetensors'" in refusal(
        tampered(example, lambda plain: plain["files"].pop("weights/unet.safetensors"))
    )


def test_engines_that_hold_their_weights_name_no_file(example: Manifest) -> None:
    data = tampered(example, lambda plain: plain["components"]["unet"].update(weights="", tensors={}))
    assert decode(data, "x").components["unet"].weights == ""


def test_a_manifest_that_does_not_say_what_a_call_takes_keeps_its_bytes(example: Manifest) -> None:
    assert b"activation_bytes" not in encode(example)
    said = tampered(example, lambda plain: plain["components"]["unet"]["variants"]["cfg"].update(activation_bytes=5))
    assert decode(said, "x").components["unet"].variants["cfg"].activation_bytes == 5
    without = tampered(example, lambda plain: plain["components"]["unet"]["variants"]["cfg"].pop("activation_bytes", 0))
    assert without == encode(example) and decode(without, "x") == seal(example)


def test_another_schema_is_told_even_if_the_rest_is_unknown() -> None:
    assert "schema version 99" in refusal(b'{"schema_version": 99, "surprise": []}')


@pytest.mark.parametrize(
    "change",
    [
        lambda plain: plain.update(surprise=1),
        lambda plain: plain.pop("created"),
        lambda plain: plain["files"]["unet.cfg.pt2"].update(size=-1),
        lambda plain: plain["files"]["unet.cfg.pt2"].update(sha256="AA" * 32),
        lambda plain: plain["files"]["unet.cfg.pt2"].update(sha256="aa"),
        lambda plain: plain["components"]["unet"]["tensors"]["conv.weight"].update(dtype="float64"),
        lambda plain: plain["components"]["unet"]["variants"]["cfg"]["check"].update(status="skipped"),
        lambda plain: plain["key"].pop("vae"),
        lambda plain: plain["key"].update(extra=1),
    ],
)
def test_wrong_types_and_fields_are_refused(example: Manifest, change: Any) -> None:
    assert "not a valid manifest" in refusal(tampered(example, change))


@pytest.mark.parametrize("data", [b"", b"\xff\xfe", b"null", b"[]", b"{}", b'{"schema_version": "1"}', b"x" * 1000])
def test_what_is_no_manifest_at_all(data: bytes) -> None:
    refusal(data)


def test_read_says_what_is_there(tmp_path: Path, example: Manifest) -> None:
    with pytest.raises(SdxlError, match="does not exist"):
        read(tmp_path / "nowhere")
    with pytest.raises(SdxlError, match="no artifact"):
        read(tmp_path)
    (tmp_path / manifests.MANIFEST).write_bytes(encode(example))
    assert read(tmp_path) == read(str(tmp_path)) == seal(example)
    with pytest.raises(SdxlError, match="is a file; an artifact is a folder"):
        read(tmp_path / manifests.MANIFEST)
    (tmp_path / manifests.MANIFEST).unlink()
    (tmp_path / manifests.MANIFEST).mkdir()
    with pytest.raises(SdxlError, match="cannot be read"):
        read(tmp_path)


def test_a_summary_agrees_with_the_whole(tmp_path: Path, example: Manifest) -> None:
    path = tmp_path / manifests.MANIFEST
    path.write_bytes(encode(example))
    found = summary.read(tmp_path)
    whole = read(tmp_path)
    for name in ("schema_version", "key", "key_digest", "created", "command", "built_with", "files"):
        assert getattr(found, name) == getattr(whole, name)
    assert found.components["unet"].code_key == whole.components["unet"].code_key


def test_a_summary_of_a_changed_manifest_is_refused(tmp_path: Path, example: Manifest) -> None:
    path = tmp_path / manifests.MANIFEST
    data = encode(example)
    for position in range(0, len(data), 13):
        changed = bytearray(data)
        changed[position] ^= 1  # makes no white space of white space
        path.write_bytes(changed)
        with pytest.raises(SdxlError):
            summary.read(tmp_path)
