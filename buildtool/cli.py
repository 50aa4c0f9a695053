"""``sdxl-build``: options and printing only. Each command imports what it needs when it runs."""

import dataclasses
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import click

from buildtool.plan import DEFAULT_MODEL
from buildtool.store import interpreter
from buildtool.store.errors import SdxlError
from buildtool.store.presets import PRESETS, told

Command = Callable[..., None]

INTERRUPTED = 130


class _Group(click.Group):
    """Turns an error that a user can mend into one line and exit code 1; a bug keeps its traceback."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except SdxlError as error:
            _fail(str(error))
        except KeyboardInterrupt:  # click would say "Aborted!" and exit with 1, as if a build had failed
            click.echo("\nInterrupted; what was unfinished is removed.", err=True)
            sys.exit(INTERRUPTED)
        except BrokenPipeError:  # the reader of our stdout has gone, `| head` for example
            sys.stderr.close()
            sys.exit(1)


def _fail(line: str) -> NoReturn:
    click.echo(f"Error: {line}", err=True)
    sys.exit(1)


class _Resolution(click.ParamType):  # type: ignore[type-arg]  # generic from click 8.4
    name = "WxH"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, int]:
        if isinstance(value, tuple):
            return value
        width, cross, height = str(value).lower().partition("x")
        if not (cross and width.isdigit() and height.isdigit()):
            self.fail(f"{value!r} is no resolution; write WIDTHxHEIGHT in pixels, such as 1024x1024.", param, ctx)
        return int(width), int(height)


artifacts_option = click.option(
    "--artifacts",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path("artifacts"),
    envvar="SDXL_ARTIFACTS",
    show_default="./artifacts, or $SDXL_ARTIFACTS",
    help="Folder of the artifact store.",
)
json_option = click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout instead of text.")


def _preset(context: click.Context, option: click.Parameter, name: str | None) -> None:
    """What nobody gives is the preset's. It isn't passed on: what is built and its key know only of its options."""
    if name is not None:
        wanted = PRESETS[name].build
        lacking = [option for option in wanted if option not in {param.name for param in context.command.params}]
        if lacking:
            one = {option: wanted[option] for option in lacking}
            raise click.BadParameter(f"{name} sets {told(one)}, which this backend lacks. Try: sdxl-build torch")
        context.default_map = dict(wanted)
        context.meta["preset"] = f"--preset {name}: {told(PRESETS[name].build)}, but for what is given beside it"


def _build_options(command: Command) -> Command:
    """The options that every backend's command has, in the order of --help."""
    options = [
        click.option(
            "--model",
            default=DEFAULT_MODEL,
            show_default=True,
            metavar="ID|DIR|FILE",
            help='Hub id, diffusers folder, single .safetensors file, "tiny" (the small model that ships with '
            'sdxl-build) or "random:sdxl-base" (full-size, random weights, for measuring); their refiners: '
            '"tiny-refiner", "random:sdxl-refiner".',
        ),
        click.option(
            "--preset",
            type=click.Choice([name for name, preset in PRESETS.items() if preset.build]),
            is_eager=True,
            expose_value=False,
            callback=_preset,
            help="A set of options, to which others may be added; sdxl-run has presets of the same names.",
        ),
        click.option("--revision", help="Branch, tag or commit of a hub model."),
        click.option("--variant", help='Variant of the weights files, such as "fp16".'),
        click.option(
            "--config",
            type=click.Path(path_type=Path),
            help="Diffusers folder with the configs and tokenizers of a single-file model.",
        ),
        click.option(
            "--gpu", default="auto", show_default=True, metavar="auto|cpu|smNN", help="What the artifact runs on."
        ),
        click.option(
            "--gpu-index",
            type=click.IntRange(min=0),
            metavar="N",
            help="Which of several GPUs builds, as CUDA numbers them.  [default: the first that fits]",
        ),
        click.option(
            "--resolution",
            "resolutions",
            type=_Resolution(),
            multiple=True,
            help="Width and height in pixels; repeatable.  [default: the model's own]",
        ),
        click.option("--batch", type=click.IntRange(min=1), default=1, show_default=True, help="Images per call."),
        click.option(
            "--precision",
            type=click.Choice(["fp32", "fp16", "bf16", "fp8"]),
            help="What to compute in.  [default: fp16 on a GPU, fp32 on the CPU]",
        ),
        click.option(
            "--vae", default="default", show_default=True, metavar="default|fp16-fix|tiny|ID|DIR", help="The VAE."
        ),
        artifacts_option,
        click.option("--dry-run", is_flag=True, help="Say what would be built, why, and what it would take."),
        click.option("--force", is_flag=True, help="Build again even if it is there."),
        click.option(
            "--jobs",
            type=click.IntRange(min=0),
            default=0,
            envvar="SDXL_JOBS",
            help="Compilers at once.  [default: one a core]",
        ),
        json_option,
    ]
    for option in reversed(options):
        command = option(command)
    return command


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="sdxl-build")
def main() -> None:
    """Compiles Stable Diffusion XL once, into artifacts that sdxl-run loads in seconds.

    \b
    sdxl-build torch --model tiny --gpu cpu      the small model that ships with it, on any machine
    sdxl-build torch                             SDXL base, for this machine's GPU
    sdxl-run --engine "$(sdxl-build torch)" --prompt "a lighthouse at dusk"
    """


_encoder_option = click.option(
    "--with-encoder", is_flag=True, help="The VAE's encoder too, for image to image (sdxl-run --image)."
)

_lora_option = click.option(
    "--lora", multiple=True, metavar="FILE[:SCALE]", help="A LoRA to add to the weights; repeatable."
)
_spare_option = click.option(
    "--spare-tokens",
    type=click.IntRange(0),
    default=0,
    metavar="N",
    help="Rows of the word tables for textual inversions (sdxl-run --embedding): one for each of their vectors.",
)
_freeu_option = click.option(
    "--freeu", metavar="S1,S2,B1,B2", help="FreeU inside the UNet, with the values of diffusers' enable_freeu."
)
_deepcache_option = click.option(
    "--deepcache",
    metavar="INTERVAL[:BRANCH]",
    help="DeepCache: the whole UNet every INTERVAL steps, between them only what lies above skip connection BRANCH.  "
    "[default branch: 0, the outermost]",
)


@main.command("torch")
@_build_options
@_encoder_option
@_lora_option
@_spare_option
@_freeu_option
@_deepcache_option
@click.option(
    "--no-negative-prompt",
    is_flag=True,
    help="For guidance without a negative prompt alone, which takes less then: its text is zeros.",
)
@click.option(
    "--segments",
    type=click.IntRange(min=2),
    metavar="N",
    help="The UNet in N parts, compiled side by side: a shorter build on many cores, and for sdxl-run --memory "
    "sequential, where they take turns on a small GPU.  [default: one piece]",
)
@click.option(
    "--vae-tile",
    type=_Resolution(),
    help="Decode in tiles of at most this size, which overlap and are blended: the VAE takes less memory.  "
    "[default: whole pictures]",
)
def torch_command(dry_run: bool, as_json: bool, **options: Any) -> None:
    """Builds AOTInductor packages (torch) for this machine's GPU or CPU.

    Prints the artifact's folder, one line a resolution.
    """
    _build("torch", dry_run, as_json, options)


@main.command("onnx")
@_build_options
@_encoder_option
@_lora_option
@_freeu_option
@_deepcache_option
@click.option(
    "--provider",
    type=click.Choice(["cpu", "cuda", "tensorrt", "nv-tensorrt-rtx"]),
    help="What of ONNX Runtime runs it.  [default: cuda on a GPU, cpu on the CPU]",
)
def onnx_command(dry_run: bool, as_json: bool, **options: Any) -> None:
    """Builds ONNX graphs that ONNX Runtime runs, on a GPU or on the CPU.

    Prints the artifact's folder, one line a resolution.
    """
    _build("onnx", dry_run, as_json, options)


@main.command("trt")
@_build_options
@_lora_option
@_freeu_option
@click.option(
    "--flavor",
    type=click.Choice(["auto", "tensorrt", "rtx"]),
    default="auto",
    show_default=True,
    help="TensorRT proper, for the GPU that is present, or TensorRT-RTX, for any RTX GPU on any machine.",
)
@click.option(
    "--golden/--no-golden",
    default=True,
    help="Whether to compute what the engines are compared with: fp32 eager, minutes on a CPU at full size.",
)
@click.option(
    "--compatibility",
    type=click.Choice(["none", "same", "ampere+"]),
    default="none",
    show_default=True,
    help="GPUs that shall run an engine of TensorRT proper: this one, its compute capability, or any from Ampere.",
)
@click.option(
    "--dynamic",
    metavar="MINxMIN..MAXxMAX",
    help="Engines for every size from one to the other, best at --resolution.  [default: for --resolution alone]",
)
def trt_command(dry_run: bool, as_json: bool, **options: Any) -> None:
    """Builds TensorRT engines, with TensorRT-RTX on a machine with any GPU or none: --gpu sm86,sm89,sm120.

    Prints the artifact's folder, one line a resolution.
    """
    _build("trt", dry_run, as_json, options)


@main.command("onediff")
@_build_options
@click.option(
    "--compiler",
    type=click.Choice(["auto", "nexfort", "oneflow"]),
    default="auto",
    show_default=True,
    help="Which of OneDiff's compilers; auto: the one that is installed there, nexfort first.",
)
@click.option(
    "--mode",
    metavar="NAME[:NAME...]",
    help=f"nexfort's mode, of {', '.join(interpreter.MODES)}.  [default: cudagraphs:max-autotune on a GPU]",
)
@click.option(
    "--python",
    metavar="PATH",
    envvar=interpreter.VARIABLE,
    help=f"The Python that OneDiff is installed in.  [env var: {interpreter.VARIABLE}, which sdxl-run reads too]",
)
def onediff_command(dry_run: bool, as_json: bool, python: str | None, **options: Any) -> None:
    """Builds with OneDiff's compilers, in a Python of their own: docs/onediff.md.

    Prints the artifact's folder, one line a resolution.
    """
    if python:  # the compilers and the check are processes, which read it there
        os.environ[interpreter.VARIABLE] = str(Path(python).absolute()) if os.sep in python else python
    _build("onediff", dry_run, as_json, options)


def _build(backend: str, dry_run: bool, as_json: bool, options: dict[str, Any]) -> None:
    from buildtool import plan
    from buildtool.progress import Progress
    from buildtool.store import machine
    from buildtool.store.store import Store

    preset = click.get_current_context().meta.get("preset")
    if preset and dry_run:
        click.echo(preset, err=True)
    spec = plan.Spec(backend=backend, **{**options, "resolutions": tuple(dict.fromkeys(options["resolutions"]))})
    machine.share_cores()
    with Progress() as progress:
        plans = plan.plan(spec, progress)
        if dry_run:
            _dry_run(plans, as_json)
            return
        rows = []
        for planned in plans:
            path = None if spec.force else Store(spec.artifacts).lookup(planned.key)
            row: dict[str, Any] = {"path": str(path), "hit": True, "compiled": [], "seconds": {}}
            if path is None:
                from buildtool.build import build

                built = build(planned, progress)
                row = {"path": str(built.path), "hit": built.hit, "compiled": built.compiled, "seconds": built.seconds}
            rows.append({**row, "key": planned.key.digest})
    click.echo(json.dumps({"artifacts": rows}) if as_json else "\n".join(row["path"] for row in rows))


def _dry_run(plans: list[Any], as_json: bool) -> None:
    from buildtool import estimate

    told = [estimate.estimate(planned) for planned in plans]
    click.echo(json.dumps({"plans": told}) if as_json else "\n".join(estimate.render(one) for one in told))


@main.command("ls")
@click.option("--stale", is_flag=True, help="Only those built by another torch, driver or GPU than is here now.")
@artifacts_option
@json_option
def ls_command(stale: bool, artifacts: Path, as_json: bool) -> None:
    """Lists the artifacts of a store."""
    from buildtool import listing, listing_text
    from buildtool.store.manifest import as_dict
    from buildtool.store.store import Store

    rows = listing.ls(Store(artifacts), stale=stale)
    if as_json:
        click.echo(json.dumps({"artifacts": as_dict(rows)}))
    else:
        listing_text.write(listing_text.render_stale(rows) if stale else listing_text.render_ls(rows))


@main.command("show")
@click.argument("folder", type=click.Path(path_type=Path))
@json_option
def show_command(folder: Path, as_json: bool) -> None:
    """Shows everything that an artifact's manifest says."""
    from buildtool import listing, listing_text

    shown = listing.show(folder)
    if as_json:
        click.echo(json.dumps(shown))
    else:
        listing_text.write(listing_text.render_show(shown))


@main.command("verify")
@click.argument("folders", type=click.Path(path_type=Path), nargs=-1, required=True)
@click.option("--files-only", is_flag=True, help="Don't run the golden tensors: on a machine without the GPU.")
@json_option
def verify_command(folders: tuple[Path, ...], files_only: bool, as_json: bool) -> None:
    """Checks every byte of artifacts, then runs their golden tensors in a fresh process.

    Exits with 1 if anything is wrong.
    """
    from buildtool import listing, listing_text
    from buildtool.store.manifest import as_dict

    results = [listing.verify(folder, golden=not files_only) for folder in folders]
    if as_json:
        click.echo(json.dumps({"artifacts": as_dict(results)}))
    else:
        for result in results:
            listing_text.write(listing_text.render_verify(result))
    if not all(result.passed for result in results):
        sys.exit(1)


@main.command("prune")
@click.option("--older-than", metavar="AGE", help="Also remove artifacts built longer ago than 12h, 30d, 4w.")
@click.option("--dry-run", is_flag=True, help="Only say what would be removed.")
@artifacts_option
@json_option
def prune_command(older_than: str | None, dry_run: bool, artifacts: Path, as_json: bool) -> None:
    """Removes weights and code that no artifact uses, and what killed builds left."""
    from buildtool import listing, listing_text
    from buildtool.store.store import Store

    pruned = listing.prune(Store(artifacts), older_than=older_than, dry_run=dry_run)
    if as_json:
        click.echo(json.dumps(listing.pruned_as_dict(pruned, dry_run)))
    else:
        listing_text.write(listing_text.render_prune(pruned, dry_run))


@main.command("doctor")
@artifacts_option
@json_option
def doctor_command(artifacts: Path, as_json: bool) -> None:
    """Says what this machine has, and what each backend would need."""
    from buildtool import doctor

    rows = doctor.report(artifacts)
    click.echo(json.dumps({"rows": [dataclasses.asdict(row) for row in rows]}) if as_json else doctor.render(rows))


if __name__ == "__main__":
    main()
