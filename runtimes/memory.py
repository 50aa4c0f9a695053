"""What is in memory when: the modes of ``--memory``.

Standard library only: modes are refused before torch is imported.
"""

from collections.abc import Iterable

from buildtool.store.errors import SdxlError
from buildtool.store.manifest import Manifest
from runtimes.gpu_upload import LOADERS

RESIDENT, STAGED, MODEL_OFFLOAD = MODES = ("resident", "staged", "model-offload")
"""``resident``: what was loaded stays. ``staged``: a stage's components (encoding, denoising, decoding) take the
place of the last one's. ``model-offload``: the same, and their weights stay in pinned host memory."""

TEXT_ENCODERS = ("text_encoder", "text_encoder_2")


def check(mode: str, manifests: Iterable[Manifest]) -> None:
    """Refuses a mode that artifacts can't run in.

    Raises:
        SdxlError: there is no such mode, or nothing to offload.
    """
    if mode not in MODES:
        raise SdxlError(f"There is no memory mode {mode!r}.", f"There are: {', '.join(MODES)}")
    if mode != MODEL_OFFLOAD:
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
                f"Load them for their turn: --memory {STAGED}. Or build with: sdxl-build torch",
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
    return {RESIDENT: None, STAGED: TEXT_ENCODERS, MODEL_OFFLOAD: ()}[mode]
