"""``sdxl-run``: prompts in, PNGs out."""

import logging
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import click
import msgspec

from buildtool.store import machine
from buildtool.store import manifest as manifests
from buildtool.store.errors import SdxlError
from buildtool.store.manifest import Manifest
from buildtool.store.presets import PRESETS, told
from runtimes import jobs, timeline
from runtimes.jobs import MAX_SEED, Job
from runtimes.memory import MODES, RESIDENT
from runtimes.names import Names
from runtimes.schedulers import SCHEDULERS

# torch, the pipeline and rich are imported where they are used: --help and wrong options answer at once.

INTERRUPTED = 130


def _digests(context: click.Context, option: click.Parameter, values: tuple[str, ...]) -> tuple[str, ...]:
    digests = tuple(value.lower().removeprefix("sha256:") for value in values)
    for digest in digests:
        if len(digest) != 64 or set(digest) - set("0123456789abcdef"):
            raise click.BadParameter(f"{digest!r} is not a sha256 digest of 64 hexadecimal digits.")
    return digests


def _preset(context: click.Context, option: click.Parameter, name: str | None) -> str | None:
    context.default_map = dict(PRESETS[name].run) if name else None
    return name


@click.command(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.option(
    "--engine",
    "engines",
    multiple=True,
    required=True,
    type=click.Path(),
    metavar="DIR",
    envvar="SDXL_ENGINE",
    help="Artifact that sdxl-build made. Repeat it for several resolutions of one model.",
)
@click.option("--prompt", "prompts", multiple=True, metavar="TEXT", help="What to draw; repeatable.")
@click.option(
    "--prompts",
    "prompts_file",
    metavar="FILE",
    help="One prompt a line, or JSON lines with a prompt and any of negative_prompt, seed, width, height, steps, "
    "guidance, guidance_until, scheduler, image, strength, lora, embedding, refine_at, refine_strength, num_images, "
    'out. "-" reads JSON lines from stdin and answers each with one on stdout.',
)
@click.option("--negative-prompt", metavar="TEXT", help="What to keep out of the picture.")
@click.option(
    "--seed",
    type=click.IntRange(0, MAX_SEED),
    help="Seed of the first picture; the next ones count up.  [default: a random one, which is said]",
)
@click.option(
    "--preset",
    type=click.Choice(list(PRESETS)),
    is_eager=True,
    callback=_preset,
    help="A set of options, to which others may be added; -v says which.",
)
@click.option("--steps", type=click.IntRange(1), default=50, show_default=True, help="Denoising steps.")
@click.option("--guidance", type=click.FloatRange(0), default=5.0, show_default=True, help="Guidance scale.")
@click.option(
    "--guidance-until",
    type=click.FloatRange(0, 1),
    default=1.0,
    show_default=True,
    metavar="FRACTION",
    help="Part of the steps that is guided; the rest runs about twice as fast.",
)
@click.option(
    "--scheduler",
    type=click.Choice(list(SCHEDULERS)),
    help="The sampler.  [default: the one that the model came with]",
)
@click.option(
    "--image", metavar="FILE", help="A picture to start from (image to image); the artifact needs --with-encoder."
)
@click.option(
    "--strength",
    type=click.FloatRange(0, 1),
    default=0.3,
    show_default=True,
    metavar="FRACTION",
    help="With --image: the part of the steps that runs; 1 forgets the picture.",
)
@click.option(
    "--lora",
    multiple=True,
    metavar="FILE[:SCALE]",
    help="A LoRA to add to the weights (torch backend); repeatable. Others: sdxl-build --lora.",
)
@click.option(
    "--embedding",
    multiple=True,
    metavar="FILE[:TOKEN]",
    help="A textual inversion, a word that prompts may have then; repeatable. The artifact needs --spare-tokens.",
)
@click.option(
    "--refiner",
    "refiners",
    multiple=True,
    type=click.Path(),
    metavar="DIR",
    help="Artifact of a refiner, which goes on from the pictures' latents; repeatable for several resolutions.",
)
@click.option(
    "--refine-at",
    type=click.FloatRange(0, 1, min_open=True, max_open=True),
    metavar="FRACTION",
    help="With --refiner: where in the steps it takes over, such as 0.8.  [default: after all of them]",
)
@click.option(
    "--refine-strength",
    type=click.FloatRange(0, 1, min_open=True),
    metavar="FRACTION",
    help="With --refiner and no --refine-at: the part of the steps that it takes on the finished picture.  "
    "[default: 0.3]",
)
@click.option(
    "--num-images", type=click.IntRange(1), default=1, show_default=True, metavar="N", help="Pictures of each prompt."
)
@click.option("--width", type=click.IntRange(1), metavar="PIXELS", help="Choose among the engines' sizes.")
@click.option("--height", type=click.IntRange(1), metavar="PIXELS", help="Choose among the engines' sizes.")
@click.option(
    "--out",
    metavar="PATH",
    envvar="SDXL_OUT",
    help="A .png file, a folder (ending in /), or a pattern with {seed} {index} {prompt} {width} {height} {steps} "
    "{guidance}. Two pictures of a run never get one name: the second fox.png is fox-2.png.  "
    "[default: sdxl-{seed}.png, replacing nothing]",
)
@click.option(
    "--expect-digest",
    "digests",
    multiple=True,
    metavar="HEX",
    callback=_digests,
    help="Refuse an artifact whose manifest has another digest or whose files have changed, before any of its "
    "code is loaded. With several --engine or a --refiner, one for each.",
)
@click.option(
    "--gpu-index",
    type=click.IntRange(0),
    metavar="N",
    help="Which of several GPUs, as CUDA numbers them.  [default: the first]",
)
@click.option(
    "--memory",
    type=click.Choice(MODES),
    default=RESIDENT,
    show_default=True,
    help="What stays loaded: everything; only what a stage (encoding, denoising, decoding) needs; that, and "
    "weights in main memory (GPU only); or besides that the UNet's segments in turns (GPU only).",
)
@click.option("--dry-run", is_flag=True, help="Check everything, load nothing: print the paths that would be written.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout instead of paths.")
@click.option("-q", "--quiet", is_flag=True, help="No progress, seed or times on stderr.")
@click.option("-v", "--verbose", is_flag=True, help="Say on stderr what is being done, and when it was.")
def command(
    engines: tuple[str, ...],
    refiners: tuple[str, ...],
    prompts: tuple[str, ...],
    prompts_file: str | None,
    out: str | None,
    digests: tuple[str, ...],
    gpu_index: int | None,
    preset: str | None,
    memory: str,
    dry_run: bool,
    as_json: bool,
    quiet: bool,
    verbose: bool,
    **settings: Any,
) -> None:
    """Make pictures with a compiled SDXL artifact.

    The pictures' paths go to stdout, one a line; progress, times and peak memory to stderr.

    \b
    sdxl-run --engine "$(sdxl-build torch --model tiny --gpu cpu)" --prompt "a red fox" --seed 1
    """
    if preset and verbose:
        click.echo(f"--preset {preset}: {told(PRESETS[preset].run)}, but for what is given beside it", err=True)
    if bool(prompts) == bool(prompts_file):
        raise click.UsageError("Give either --prompt TEXT (repeatable) or --prompts FILE.")
    if dry_run and prompts_file == "-":
        raise click.UsageError("--dry-run needs prompts that are there: --prompt TEXT or --prompts FILE.")
    try:
        options = Job(
            prompt="", **{**settings, "seed": _random_seed() if settings["seed"] is None else settings["seed"]}
        )
        asked = [Job(prompt=prompt) for prompt in prompts]
        places = Names(out)
    except (ValueError, SdxlError) as error:
        raise click.UsageError(str(error)) from None
    drawn = options.seed if settings["seed"] is None else None
    refining = _folders(refiners, "--refiner") if refiners else []
    run = Run(
        _folders(engines), refining, digests, options, places, drawn, gpu_index, memory, quiet=quiet, verbose=verbose
    )
    with _log_to_stderr(verbose):
        try:
            if prompts_file == "-":
                run.serve()
            else:
                todo = jobs.read(Path(prompts_file)) if prompts_file else asked
                run.show(todo, as_json) if dry_run else run.make(todo, as_json)
        except KeyboardInterrupt:
            count = len(run.saved)
            click.echo(f"\nInterrupted; {count} picture{'s are' if count != 1 else ' is'} saved.", err=True)
            raise click.exceptions.Exit(INTERRUPTED) from None


class Run:
    """What the options ask for. Artifacts are read and checked here, before torch is imported."""

    def __init__(
        self,
        folders: Sequence[Path],
        refiners: Sequence[Path],
        digests: Sequence[str],
        options: Job,
        places: Names,
        drawn: int | None,
        gpu_index: int | None,
        memory: str,
        *,
        quiet: bool,
        verbose: bool,
    ) -> None:
        from runtimes.session import Planner

        self._start = time.perf_counter()
        timeline.add("python", 0.0, timeline.now())
        self._folders, self._refiners = folders, refiners
        self._drawn = drawn
        self._gpu_index, self._memory = gpu_index, memory
        self._quiet, self._verbose = quiet, verbose
        with timeline.span("manifests"):
            found = [manifests.read(folder) for folder in (*folders, *refiners)]
        self._artifacts = list(zip((*folders, *refiners), found, strict=True))
        if digests:
            for folder, manifest in self._artifacts:
                _expect(folder, manifest, digests)
        self._planner = Planner(found[: len(folders)], options, places, memory, found[len(folders) :])
        self.saved: list[Any] = []

    def show(self, asked: Sequence[Job], as_json: bool) -> None:
        """What :meth:`make` would write, without loading anything."""
        pictures = self._planner.plan(asked)
        if as_json:
            told = {"images": [picture.as_dict() for picture in pictures]}
            click.echo(msgspec.json.encode(told).decode())
            return
        for picture in pictures:
            click.echo(picture.path)

    def make(self, asked: Sequence[Job], as_json: bool) -> None:
        """All jobs, then the answer: paths as they come, or one object at the end."""
        pictures = self._planner.plan(asked)
        session = self._load()
        try:
            for picture in session.render(pictures, last=True):
                if not as_json:
                    click.echo(picture.path)
        finally:  # also after Ctrl-C or a full disk: what is saved is answered for
            report = self._report(session)
            if as_json and self.saved:
                click.echo(msgspec.json.encode(report).decode())

    def serve(self) -> None:
        """Answers each JSON line of stdin with one on stdout; a wrong line gets an error and the next one runs."""
        session = self._load()
        for number, line in enumerate(iter(sys.stdin.buffer.readline, b""), 1):
            if not line.strip():
                continue
            answer: dict[str, Any] = {"line": number}
            start = time.perf_counter()
            try:
                pictures = self._planner.plan([jobs.parse_line(line)])
                answer["images"] = [picture.as_dict() for picture in session.render(pictures)]
                answer["seconds"] = round(time.perf_counter() - start, 4)
            except SdxlError as error:
                answer["error"] = str(error)
            click.echo(msgspec.json.encode(answer).decode())
        self._report(session)

    def _load(self) -> Any:
        import runtimes
        from runtimes import gpu_upload, memory
        from runtimes.session import Session

        start = time.perf_counter()
        device = self._device()
        first = memory.ahead(self._memory)
        uploads = gpu_upload.begin(self._artifacts, self._gpu_index or 0, first)  # while torch is being imported
        try:
            with timeline.span("import torch"):
                import torch  # noqa: F401
            with timeline.span("open artifact"):
                pipeline = runtimes.load([*self._folders], device=device, memory=self._memory, uploads=uploads)
                refiner = None
                if self._refiners:
                    refiner = runtimes.load([*self._refiners], memory=self._memory, beside=pipeline)
        except BaseException:
            if uploads is not None:
                uploads.cancel()
            raise
        session = Session(pipeline, self._bar, refiner)
        session.seconds["load"] = time.perf_counter() - start
        self.saved = session.saved
        if self._drawn is not None and not self._quiet:  # after all that can be refused: an error is one line
            click.echo(f"Seed: {self._drawn}", err=True)
        return session

    def _device(self) -> str | None:
        """The device to ask for, if the artifacts are for a GPU: it must be there before anything is begun.

        Raises:
            SdxlError: no such GPU, or a driver that is too old for torch.
        """
        target = self._artifacts[0][1].key.target
        if target.startswith("cpu"):
            if self._gpu_index is not None:
                raise SdxlError(
                    f"{self._folders[0]} was built for {target}; it runs on no GPU.",
                    "Leave --gpu-index out.",
                )
            return None
        if not machine.gpus():
            return None  # torch isn't asked either: opening the artifact says what is missing
        return f"cuda:{machine.require_gpu(self._gpu_index or 0).index}"

    def _report(self, session: Any) -> dict[str, Any]:
        session.seconds["total"] = time.perf_counter() - self._start
        report: dict[str, Any] = {**session.report(), "timeline": timeline.as_dicts()}
        if self._verbose and self.saved:
            click.echo(timeline.render(timeline.spans()), err=True)
        if not self._quiet and self.saved:
            click.echo(_summary(report), err=True)
        return report

    @contextmanager
    def _bar(self, title: str) -> Iterator[Any]:
        """A progress bar on stderr, gone when done; nothing where stderr is no terminal."""
        if self._quiet or not sys.stderr.isatty():
            yield None
            return
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        # stdout stays as it is: rich would send the paths to stderr.
        with Progress(*columns, console=Console(stderr=True), transient=True, redirect_stdout=False) as bar:
            task = bar.add_task(title, total=None)
            yield lambda done, total: bar.update(task, completed=done, total=total)


def _summary(report: dict[str, Any]) -> str:
    from buildtool.store.files import human_size

    parts = []
    for stage, seconds in report["seconds"].items():
        rate = f" ({report['steps_per_second']:.2f} steps/s)" if stage == "denoise" and seconds else ""
        parts.append(f"{stage} {seconds:.2f} s{rate}")
    peak = report["peak_memory_bytes"]
    parts.append(f"peak memory {human_size(peak['process'])}")
    if "cuda" in peak:
        parts.append(f"on the GPU {human_size(peak['cuda'])}")
    return ", ".join(parts)


def _random_seed() -> int:
    import secrets

    return secrets.randbelow(2**32)


def _folders(engines: Sequence[str], option: str = "--engine") -> list[Path]:
    """``sdxl-build`` prints one path a line, so that "$(sdxl-build …)" of two resolutions holds two."""
    lines = [line for engine in engines for line in engine.splitlines() if line.strip()]
    if not lines or not all(engine.strip() for engine in engines):
        raise SdxlError(f"{option} is empty.", "Did the command that should have printed the artifact's path fail?")
    return [Path(line) for line in lines]


def _expect(folder: Path, manifest: Manifest, digests: Sequence[str]) -> None:
    """Refuses an artifact that is not one of those expected; the manifest's digest stands for all files."""
    if manifest.digest not in digests:
        raise SdxlError(
            f"{folder} has the manifest digest {manifest.digest}; expected was {', '.join(digests)}.",
            f"See what it is: sdxl-build show {folder}",
        )
    from buildtool.store.store import verify_files

    problems = verify_files(folder)
    if problems:
        raise SdxlError(
            f"{folder} is not what its manifest says: {problems[0]}", f"See all: sdxl-build verify {folder}"
        )


class _Handler(logging.Handler):
    """Each message once: the same prompt may come a hundred times."""

    def __init__(self) -> None:
        super().__init__()
        self._seen: set[str] = set()

    def emit(self, record: logging.LogRecord) -> None:
        text = record.getMessage()
        if text not in self._seen:
            self._seen.add(text)
            prefix = f"{record.levelname.capitalize()}: " if record.levelno >= logging.WARNING else ""
            click.echo(prefix + text, err=True)  # through sys.stderr, which a progress bar replaces


@contextmanager
def _log_to_stderr(verbose: bool) -> Iterator[None]:
    logger = logging.getLogger("runtimes")
    handler, level = _Handler(), logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG if verbose else logging.WARNING)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)


def main(args: Sequence[str] | None = None) -> NoReturn:
    """Runs the command line and exits: 0, 1 for what a user can mend, 2 for wrong usage, 130 after Ctrl-C."""
    machine.share_cores()
    try:
        code = command.main(args, prog_name="sdxl-run", standalone_mode=False)
    except click.ClickException as error:
        error.show()
        code = error.exit_code
    except SdxlError as error:
        click.echo(f"Error: {error}", err=True)
        code = 1
    except click.Abort as abort:
        if isinstance(abort.__cause__, EOFError):  # click takes it for Ctrl-D; nothing here asks questions
            raise abort.__cause__ from None
        code = INTERRUPTED
    sys.exit(code)


if __name__ == "__main__":
    main()
