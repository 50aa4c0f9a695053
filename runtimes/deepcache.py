"""What an artifact built with ``--deepcache`` asks of a run. Read before torch is imported."""

import shlex

from buildtool.store.errors import SdxlError
from buildtool.store.manifest import Manifest

SHALLOW = "_shallow"
"""What the names of variants end in that take an earlier step's feature."""


def interval(manifest: Manifest) -> int:
    """The whole UNet runs every so many steps; 1 for an artifact without DeepCache."""
    return int(manifest.key.options.get("deepcache", {}).get("interval", 1))


def check(manifest: Manifest, guidance_until: float) -> None:
    """Raises:
    SdxlError: guidance ends within the run: the feature of a guided step is that of another batch.
    """
    if interval(manifest) > 1 and guidance_until < 1:
        raise SdxlError(
            f"--guidance-until {guidance_until:g} can't be had with DeepCache, which the artifact was built with.",
            f"Leave it out, or build without: {without(manifest)}",
        )


def without(manifest: Manifest) -> str:
    """The command that builds the same artifact without DeepCache."""
    words = list(manifest.command)
    if "--deepcache" in words:
        at = words.index("--deepcache")
        del words[at : at + 2]
    return shlex.join(words)
