"""The part of a manifest that a list needs. Decoding a UNet's 1,700 tensors too takes three times as long."""

import hashlib
from pathlib import Path

import msgspec

from buildtool.store import manifest
from buildtool.store.key import ArtifactKey
from buildtool.store.manifest import MANIFEST, SCHEMA_VERSION, FileEntry

_DIGEST = b'"digest":"'
_HEX = 64


class ComponentSummary(msgspec.Struct, frozen=True):
    code_key: str


class Summary(msgspec.Struct, frozen=True):
    """Some fields of a :class:`~buildtool.store.manifest.Manifest`; the rest is skipped, not validated."""

    schema_version: int
    key: ArtifactKey
    key_digest: str
    created: str
    command: tuple[str, ...]
    built_with: dict[str, str]
    components: dict[str, ComponentSummary]
    files: dict[str, FileEntry]


def read(folder: Path) -> Summary:
    """The summary of an artifact whose manifest says what was sealed.

    Raises:
        SdxlError: what :func:`buildtool.store.manifest.read` says of a damaged one.
    """
    try:
        data = (folder / MANIFEST).read_bytes()
        found = msgspec.json.decode(data, type=Summary)
        if found.schema_version == SCHEMA_VERSION and _is_sealed(data):
            return found
    except (OSError, msgspec.DecodeError, UnicodeDecodeError):
        pass
    whole = manifest.read(folder)
    return msgspec.convert(manifest.as_dict(whole), Summary)


def _is_sealed(data: bytes) -> bool:
    """Whether the manifest's values are those that were sealed; only its white space may differ."""
    compact = memoryview(msgspec.json.format(data, indent=-1))
    end = len(compact) - _HEX - len(b'"}')
    digest = hashlib.sha256(compact[:end])
    digest.update(b'"}')
    ours = digest.hexdigest().encode() + b'"}'
    return compact[end - len(_DIGEST) : end] == _DIGEST and compact[end:] == ours
