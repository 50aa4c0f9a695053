"""Where pictures go: a file, a folder, or a pattern such as ``fox-{seed}.png``."""

import contextlib
import os
import re
import string
import tempfile
import threading
from pathlib import Path
from typing import Any

from buildtool.store.errors import SdxlError

DEFAULT = "sdxl-{seed}.png"
FIELDS = ("seed", "index", "prompt", "width", "height", "steps", "guidance")


class Names:
    """File names of one run's pictures. No two of them are the same: a second ``fox.png`` becomes ``fox-2.png``.

    Only a name that was asked for replaces a file of an earlier run; names made up here
    (no ``--out``, or a folder) do not.

    Args:
        out: a file or pattern that ends in .png, a folder, or None for ``sdxl-{seed}.png`` here.

    Raises:
        SdxlError: ``out`` has an unknown placeholder or another ending.
    """

    def __init__(self, out: str | None) -> None:
        self._given: set[Path] = set()
        """Where they really are: ``a/../fox.png`` and a link to the folder are ways to write one name."""
        self._counts: dict[Path, int] = {}
        self._own = _Pattern(out)

    def path(self, out: str | None, fields: dict[str, Any]) -> Path:
        """The next picture's path.

        Args:
            out: a pattern for this picture alone, or None for the run's.
            fields: values of FIELDS.

        Raises:
            SdxlError: as for the run's.
        """
        pattern = self._own if out is None else _Pattern(out)
        first = path = pattern.fill(fields)
        count = self._counts.get(first, 1)
        while _place(path) in self._given or (pattern.keeps and path.exists()):
            count += 1
            path = first.with_name(f"{first.stem}-{count}{first.suffix}")
        self._counts[first] = count
        self._given.add(_place(path))
        return path


def _place(path: Path) -> Path:
    """A file's folder without links and dots; a link of the file's own name is replaced, not followed."""
    return Path(os.path.realpath(path.parent), path.name)


class _Pattern:
    def __init__(self, out: str | None) -> None:
        self.keeps = out is None
        """Whether files that are already there are left alone."""
        if out == "":
            raise SdxlError("--out is empty.", "Leave it out for ./sdxl-{seed}.png.")
        if out is not None and Path(out).is_dir():
            self.keeps = True
            out = os.path.join(out.replace("{", "{{").replace("}", "}}"), DEFAULT)
        elif out is not None and out.endswith("/"):
            self.keeps = True
            out += DEFAULT
        self._text = DEFAULT if out is None else out
        fields = "Placeholders are " + ", ".join(f"{{{name}}}" for name in FIELDS) + "."
        try:
            named = {name for _, name, _, _ in string.Formatter().parse(self._text) if name is not None}
            if not named <= set(FIELDS):
                raise SdxlError(f"--out has the unknown placeholder {{{min(named - set(FIELDS))}}}.", fields)
            filled = self.fill({"seed": 0, "index": 0, "width": 8, "height": 8, "steps": 1, "guidance": 1.0})
        except ValueError as error:
            raise SdxlError(f"--out {self._text!r} is not a valid pattern: {error}.", fields) from None
        if filled.suffix.lower() != ".png":
            raise SdxlError(f"--out {out!r} does not end in .png.", "For a folder, end it in / instead.")

    def fill(self, fields: dict[str, Any]) -> Path:
        return Path(self._text.format(**{**fields, "prompt": slug(fields.get("prompt", ""))}))


def slug(prompt: str) -> str:
    """A prompt as part of a file name: letters, digits and hyphens, of any script."""
    words = re.sub(r"[\W_]+", "-", prompt.lower()).strip("-")
    short = words.encode()[:80].decode(errors="ignore").strip("-")
    return short or "untitled"


def check_folder(folder: Path) -> None:
    """Makes the folder if need be and writes a byte there, so that an hour's work isn't lost at its end.

    Raises:
        SdxlError: it cannot be made or written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".sdxl-run-") as probe:
            probe.write(b"\0")
            probe.flush()
    except OSError as error:
        raise cannot_write(folder, error) from None


def cannot_write(path: Path, error: OSError) -> SdxlError:
    return SdxlError(f"{path} cannot be written: {error.strerror or error}.", "Name another place with --out PATH.")


def write(path: Path, data: bytes) -> None:
    """Writes a file under another name in its folder and renames it: readers see all of it or nothing.

    Raises:
        SdxlError: the disk is full, or the place cannot be written to.
    """
    part = path.with_name(f".{path.name}.{os.getpid()}-{threading.get_ident()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            part.write_bytes(data)
            os.replace(part, path)
        finally:
            with contextlib.suppress(OSError):
                part.unlink(missing_ok=True)
    except OSError as error:
        raise cannot_write(path, error) from None
