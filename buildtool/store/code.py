"""Compiled code without weights, shared by every checkpoint of the same architecture: ``code/<codekey>/``."""

import os
from pathlib import Path
from typing import Any

import msgspec

from buildtool.store import files
from buildtool.store.errors import SdxlError
from buildtool.store.key import canonical_json, digest_of
from buildtool.store.manifest import FileEntry, check_relative

CODE = "code.json"


class CodeRecord(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """``code.json``: what a code folder holds, and what its exporter wants to know of it later."""

    key_digest: str
    files: dict[str, FileEntry]
    meta: dict[str, Any]
    digest: str
    """sha256 of this record's canonical JSON with this field empty."""


def write(folder: Path, key_digest: str, meta: object) -> None:
    """Lists the folder's files, which become read-only (artifacts link to them), in ``code.json``."""
    plain = msgspec.to_builtins(meta)
    if not isinstance(plain, dict):
        raise TypeError(f"meta is a {type(meta).__name__}; a dict or a msgspec.Struct is kept")
    files.remove(folder / CODE)
    blank = CodeRecord(key_digest=key_digest, files=files.describe(folder), meta=plain, digest="")
    for name in blank.files:
        os.chmod(folder / name, 0o444)
    record = msgspec.structs.replace(blank, digest=digest_of(blank))
    (folder / CODE).write_bytes(msgspec.json.format(canonical_json(record), indent=1) + b"\n")


def read(folder: Path) -> CodeRecord:
    """The record of a code folder, checked against its own digest.

    Raises:
        SdxlError: not there, not valid, or changed.
    """
    path = folder / CODE
    try:
        record = msgspec.json.decode(path.read_bytes(), type=CodeRecord)
    except (OSError, msgspec.DecodeError, UnicodeDecodeError) as error:
        raise SdxlError(f"{path} cannot be read: {error}.") from None
    if digest_of(msgspec.structs.replace(record, digest="")) != record.digest:
        raise SdxlError(f"{path} was changed after it was built.")
    for name in record.files:
        check_relative(name)
    return record


def problems(folder: Path, key_digest: str) -> list[str]:
    """What is wrong with a code folder; reads every byte, since linking to damaged code would spread it."""
    try:
        record = read(folder)
    except SdxlError as error:
        return [error.message]
    if record.key_digest != key_digest:
        return [f"{folder} holds the code of another key."]
    found = (files.problem_with(folder, name, entry, digest=True) for name, entry in record.files.items())
    return [problem for problem in found if problem]
