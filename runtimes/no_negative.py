"""Artifacts built with ``--no-negative-prompt``: guided steps without any text but the prompt's."""

import shlex
from collections.abc import Sequence

from buildtool.store.errors import SdxlError
from buildtool.store.manifest import Manifest


def check(manifest: Manifest, negative_prompt: str | Sequence[str] | None) -> None:
    """Raises:
    SdxlError: there is a negative prompt, even an empty one, and the artifact takes none.
    """
    if negative_prompt is not None and manifest.key.options.get("no_negative_prompt"):
        raise refused(manifest)


def refused(manifest: Manifest) -> SdxlError:
    words = [word for word in manifest.command if word != "--no-negative-prompt"]
    return SdxlError(
        "The artifact was built without a negative prompt, and takes none, not even an empty one.",
        f"Leave it out, or build: {shlex.join(words)}",
    )
