"""Which of the two TensorRTs builds: chosen from what was asked for and what is there. Imports nothing heavy."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from exporters.base import ExportError


@dataclass(frozen=True)
class Flavor:
    """One of the two libraries.

    Args:
        title: as errors call it.
        module: its Python module.
        distributions: packages that bring it; one of them has to be installed, and its version is in the key.
        targets: what it builds for on any machine; empty: only for the GPU that is present, and tuned for it.
        install: the pip line.
    """

    title: str
    module: str
    distributions: tuple[str, ...]
    targets: tuple[str, ...]
    install: str


FLAVORS = {
    "rtx": Flavor(
        title="TensorRT-RTX",
        module="tensorrt_rtx",
        distributions=("tensorrt_rtx", "tensorrt_rtx_cu13", "tensorrt_rtx_cu12"),
        targets=("sm75", "sm80", "sm86", "sm89", "sm120", "sm121"),
        install="pip install 'sdxl-build[trt]'",
    ),
    "tensorrt": Flavor(
        title="TensorRT",
        module="tensorrt",
        distributions=("tensorrt", "tensorrt_cu13", "tensorrt_cu12"),
        targets=(),
        install="pip install 'tensorrt>=10.14' 'sdxl-build[onnx]'",
    ),
}


def check_types(flavor: str, targets: Sequence[str], precision: str, upcast: bool) -> None:
    """Refuses types that a target can't multiply in; the builder would say so only after minutes.

    Args:
        upcast: whether the VAE computes in fp32 in an artifact of fp16.

    Raises:
        ExportError: TensorRT-RTX has neither bf16 nor products of fp32 for Turing.
    """
    if flavor != "rtx" or "sm75" not in targets or (precision == "fp16" and not upcast):
        return
    if precision == "fp16":
        raise ExportError(
            "TensorRT-RTX has no fp32 products for sm75, and this model's VAE is upcast to fp32.",
            "Another VAE isn't: --vae fp16-fix or --vae tiny",
        )
    raise ExportError(
        f"TensorRT-RTX multiplies in fp16 alone on sm75; {precision} was asked for.", "Use --precision fp16."
    )


def choose(asked: str, targets: Sequence[str], here: str, installed: Collection[str]) -> str:
    """The flavor that builds for some targets.

    TensorRT proper is preferred for the GPU that is present, if it is installed: it times its kernels there.

    Args:
        asked: ``auto``, ``tensorrt`` or ``rtx``.
        targets: such as ``sm86``, one or several.
        here: the one of them whose GPU is present and usable, else "".
        installed: flavors whose library is installed.

    Raises:
        ExportError: no flavor, or not the one asked for, can build for them on this machine.
    """
    rtx, together = FLAVORS["rtx"], ", ".join(targets)
    unknown = [name for name in targets if name not in rtx.targets]
    if asked == "tensorrt" or (asked == "auto" and len(targets) == 1 and here and (unknown or "tensorrt" in installed)):
        if len(targets) > 1:
            raise ExportError(
                f"TensorRT builds for the one GPU that is present, and {together} were asked for.",
                "One engine for several targets: --flavor rtx"
                if not unknown
                else "Build each on a machine with that GPU.",
            )
        if not here:
            raise ExportError(
                f"TensorRT builds for the GPU that is present: {together} was asked for, and there is none here.",
                "Build it on a machine with that GPU." if unknown else "Without it: --flavor rtx",
            )
        return "tensorrt"
    if unknown:
        what = f"{', '.join(unknown)} was asked for" if len(unknown) == 1 else f"{', '.join(unknown)} were asked for"
        rest = [name for name in targets if name in rtx.targets]
        hint = f"Here: --gpu {','.join(rest)}. " if rest else ""
        raise ExportError(
            f"TensorRT-RTX builds for {', '.join(rtx.targets)}; {what}.",
            f"{hint}For {unknown[0]}, on a machine with that GPU: --gpu {unknown[0]} --flavor tensorrt",
        )
    return "rtx"
