"""What is in memory when: the modes of ``--memory``.

Standard library only: modes are refused before torch is imported.
"""

import shlex
from collections.abc import Iterable

from buildtool.store.errors import SdxlError
from buildtool.store.manifest import Manifest
from runtimes.gpu_upload import LOADERS

RESIDENT, STAGED, MODEL_OFFLOAD, SEQUENTIAL = MODES = ("resident", "staged", "model-offload", "sequential")
"""``resident``: what was loaded stays. ``staged``: a stage's components (encoding, denoising, decoding) take the
place of the last one's. ``model-offload``: the same, and their weights stay in pinned host memory. ``sequential``: the
same, and the UNet's segments take turns on the GPU."""
OFFLOADING = (MODEL_OFFLOAD, SEQUENTIAL)
"""Those whose weights stay in pinned host memory."""

TEXT_ENCODERS = ("text_encoder", "text_encoder_2")


def text_encoders(manifest: Manifest) -> tuple[str, ...]:
    """The text encoders of an artifact; a refiner has the second alone."""
    return tuple(name for name in TEXT_ENCODERS if name in manifest.key.configs)


def check(mode: str, manifests: Iterable[Manifest]) -> None:
    """Refuses a mode that artifacts can't run in.

    Raises:
        SdxlError: there is no such mode, or nothing to offload.
    """
    if mode not in MODES:
        raise SdxlError(f"There is no memory mode {mode!r}.", f"There are: {', '.join(MODES)}")
    if mode not in OFFLOADING:
        return
    for manifest in manifests:
        if manifest.key.target.startswith("cpu"):
            raise SdxlError(
                f"--memory {mode} keeps weights off the GPU; the artifact was built for {manifest.key.target}.",
                f"Less main memory: --memory {STAGED}",
            )
        holding = sorted({c.loader for c in manifest.components.values() if c.loader not in LOADERS})
        if holding:
            raise SdxlError(
                f"--memory {mode} moves weights, and {', '.join(holding)}'s engines hold theirs.",
                f"Load them for their turn: --memory {STAGED}. Or build with: sdxl-build torch"
                + (" --segments 8" if mode == SEQUENTIAL else ""),
            )
        if mode == SEQUENTIAL and "segments" not in manifest.key.options:
            raise SdxlError(
                f"--memory {mode} needs a UNet in segments; the artifact's is in one piece.",
                f"Build one: {shlex.join(manifest.command)} --segments 8",
            )


def refuse_loras(mode: str) -> None:
    """LoRAs change weights where they lie, which have to stay there.

    Raises:
        SdxlError: the mode is not ``resident``.
    """
    if mode != RESIDENT:
        raise SdxlError(
            f"A LoRA is added to weights that stay in memory; --memory {mode} reads them anew.",
            "Build it in: sdxl-build torch --lora FILE",
        )


def ahead(mode: str) -> tuple[str, ...] | None:
    """The components whose weights are uploaded before anybody asks for them; None for all."""
    return {RESIDENT: None, STAGED: TEXT_ENCODERS, MODEL_OFFLOAD: (), SEQUENTIAL: ()}[mode]
