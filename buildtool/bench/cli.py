"""``sdxl-bench``: Click options only."""

import datetime
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

import click

from buildtool.bench import accuracy
from buildtool.bench.peer import PEERS
from buildtool.store.errors import SdxlError
from buildtool.store.manifest import Manifest

# The kinds of a public comparison of SDXL's optimizations: portrait, interior, macro photograph, rendered scene.
PROMPTS = (
    ("portrait photograph of an old fisherman with a grey beard, soft window light, 85mm", 877866765),
    ("interior of a bright Scandinavian living room with a green sofa, large windows, morning sun", 5567822456),
    ("macro photograph of a dew drop on a red tulip petal, shallow depth of field", 2257899453),
    ("rendered 3D scene of a small robot watering plants on a balcony, pastel colours", 987867834),
)


@click.command(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.option(
    "--engine",
    "engines",
    multiple=True,
    required=True,
    metavar="DIR",
    help="Artifact; repeatable, and may hold several lines, as `sdxl-build` prints them.",
)
@click.option(
    "--with",
    "sets",
    multiple=True,
    metavar='"NAME=VALUE …"',
    help="Options of a run, by the names of its JSON lines, measured with every engine; repeatable.",
)
@click.option(
    "--peer",
    "peers",
    multiple=True,
    type=click.Choice(list(PEERS)),
    help="Also diffusers' own pipeline with the first engine's model: as it is, or made faster; repeatable.",
)
@click.option(
    "--prompts",
    "file",
    metavar="FILE|tiny:N",
    help="A prompt a line, instead of four of its own; or N prompts of the world that the model tiny draws.",
)
@click.option(
    "--runs",
    type=click.IntRange(1),
    default=5,
    show_default=True,
    help="Times that every prompt is drawn, after a warm-up.",
)
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    default=Path("bench"),
    show_default=True,
    metavar="FOLDER",
    help="For report.html, results.json, results.md and the pictures.",
)
def command(
    engines: tuple[str, ...],
    sets: tuple[str, ...],
    peers: tuple[str, ...],
    file: str | None,
    runs: int,
    out: Path,
) -> None:
    """Measure artifacts and options side by side: seconds, memory, and how the pictures differ.

    Every engine runs with every set of options, each in a fresh process, one after the other; the first is what the
    others' pictures are compared with. The page's path goes to stdout.

    \b
    sdxl-bench --engine "$(sdxl-build torch --model tiny --gpu cpu)" \\
      --with steps=20 --with "steps=20 guidance-until=0.5"
    """
    from buildtool.bench import cases, report

    folders = [Path(line) for engine in engines for line in engine.splitlines() if line.strip()]
    options = [cases.parse_options(text) for text in sets] or [{}]
    found = cases.open_cases(folders, options, list(dict.fromkeys(peers)))
    prompts = _prompts(file, found[0].manifest)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SdxlError(f"{out} can't be made: {error.strerror}.", "Choose another folder with --out.") from None
    for case in found:
        cases.check(case, prompts, out)
    results = []
    for case in found:
        click.echo(f"{case.number}/{len(found)}: {case.name}", err=True)
        results.append(cases.measure(case, prompts, runs, out))
    about = _about(runs)
    if why := accuracy.judge(results, prompts):
        click.echo(why, err=True)
        about["prompt accuracy"] = why
    click.echo(report.write(results, prompts, about, out))


def _prompts(file: str | None, manifest: Manifest) -> list[tuple[str, int]]:
    if file is None:
        return list(PROMPTS)
    model, colon, count = file.partition(":")
    if colon and model == accuracy.MODEL and count.isdecimal() and int(count):
        held_out = accuracy.held_out(int(count), manifest.key.width, manifest.key.height)
        return [(prompt, seed) for seed, prompt in enumerate(held_out)]
    try:
        lines = [line.strip() for line in Path(file).read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise SdxlError(
            f"The prompts file {file} cannot be read: {error}.",
            f"Give a file with a prompt a line, or {accuracy.MODEL}:N for N prompts of its world.",
        ) from None
    if not lines:
        raise SdxlError(f"The prompts file {file} holds no prompt.", "Write one prompt a line.")
    return [(line, seed) for seed, line in enumerate(lines)]


def _about(runs: int) -> dict[str, object]:
    from importlib.metadata import version

    from buildtool.store import machine

    gpus = machine.gpus()
    return {
        "command": shlex.join(["sdxl-bench", *sys.argv[1:]]),
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "runs of every prompt": runs,
        "GPU": ", ".join(gpu.name for gpu in gpus) or "none",
        "torch": version("torch"),
        "diffusers": version("diffusers"),
    }


def main(args: Sequence[str] | None = None) -> NoReturn:
    """Runs the command line and exits: 0, 1 for what a user can mend, 2 for wrong usage, 130 after Ctrl-C."""
    try:
        code = command.main(args, prog_name="sdxl-bench", standalone_mode=False)
    except click.ClickException as error:
        error.show()
        code = error.exit_code
    except SdxlError as error:
        click.echo(f"Error: {error}", err=True)
        code = 1
    except click.Abort:
        code = 130
    sys.exit(code)


if __name__ == "__main__":
    main()
