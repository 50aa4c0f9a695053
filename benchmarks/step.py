"""Milliseconds of one call: a guided UNet step, an unguided one, the VAE, the text encoders; ours and the peers'.

    python benchmarks/step.py "$(sdxl-build torch --model random:sdxl-base)" --peer eager --peer compile
    python benchmarks/step.py DIR --component vae_decoder --component text_encoder_2 --peer eager

Ours is a whole call of the engine, copies of its inputs included. Peers are diffusers' (transformers') modules in the
same precision with the artifact's weights. On a GPU CUDA events stand around each call; elsewhere it is the clock.
Ours and the peers take turns, so that a clock that drifts hits all of them: first ours and those that only load, whose
rows are printed at once; then, for each peer that compiles, which may take minutes, ours once more beside it.
Outputs of calls that were timed are held against the artifact's golden tensors (fp32 eager), so that nothing is faster
by being wrong.
"""

from __future__ import annotations

import argparse
import functools
import os
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import report

DEFAULT = ("unet",)

Inputs = Mapping[str, Any]
Call = Callable[[Inputs], Sequence[Any]]


@dataclass
class Subject:
    """One row to be: how it is called, and what was measured of it.

    Args:
        name: as the table has it.
        start: makes the call; its time is part of the first call's.
        inputs: what it is called with in turn; the last are the golden ones.
        wanted: the golden outputs by name.
        exact: whether its weights are those that the golden tensors were made with.
    """

    name: str
    start: Callable[[], Call]
    inputs: Sequence[Inputs]
    wanted: Mapping[str, Any]
    exact: Callable[[], bool] = lambda: True
    ours: bool = False
    call: Call | None = None
    first_seconds: float = 0.0
    cached: bool = False
    """Whether the compiler found parts of its work done by an earlier process."""
    milliseconds: list[float] = field(default_factory=list)
    wall: list[float] = field(default_factory=list)
    """Milliseconds of the clock a call, one number a round: what the processor adds, if it can't keep up."""
    errors: dict[str, float] = field(default_factory=dict)
    failure: str = ""


@dataclass(frozen=True)
class Row:
    engine: str
    name: str
    ours: bool
    milliseconds: report.Spread | None
    wall_milliseconds: report.Spread | None
    ratio: float | None
    """Its median over that of ours (of the first artifact) in the same turns: how many times as long it takes."""
    first_call_seconds: float
    first_call_cached: bool
    error: dict[str, float]
    failure: str = ""


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    from benchmarks.peers import NAMES

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artifacts", nargs="+", metavar="ARTIFACT", help="artifacts' folders; peers are of the first")
    parser.add_argument(
        "--component", action="append", metavar="NAME", help="unet (default), unet.cfg, vae_decoder, …, or all"
    )
    parser.add_argument("--peer", action="append", default=[], choices=NAMES, help="repeatable")
    parser.add_argument("--calls", type=int, default=60, help="timed calls of each; at least this many")
    parser.add_argument("--rounds", type=int, default=5, help="turns in which they are made")
    parser.add_argument("--warmup", type=int, default=10, help="calls of each before the first round")
    parser.add_argument("--gpu-index", type=int, default=0, metavar="N")
    parser.add_argument("--fresh-cache", action="store_true", help="peers compile with an empty compiler's cache")
    parser.add_argument("--json", metavar="FILE", help="the measurements, to a file")
    options = parser.parse_args(arguments)
    if min(options.calls, options.rounds) < 1 or options.warmup < 0:
        parser.error("--calls and --rounds are at least 1, --warmup at least 0")
    return options


def engines_of(manifest: Any, asked: Sequence[str] | None) -> list[tuple[str, str]]:
    """(component, variant) pairs of an artifact that some names mean: ``unet`` all its variants, ``unet.cfg`` one."""
    there = [(name, variant) for name, c in manifest.components.items() for variant in c.variants]
    chosen: list[tuple[str, str]] = []
    for name in asked or DEFAULT:
        meant = [pair for pair in there if name in ("all", pair[0], ".".join(pair))]
        if not meant:
            raise SystemExit(f"Error: no engine {name}; there are {', '.join('.'.join(pair) for pair in there)}.")
        chosen += [pair for pair in meant if pair not in chosen]
    return chosen


def golden_tensors(folder: Path, prefix: str) -> dict[str, Any]:
    """``input.<name>`` and ``output.<name>`` of one variant, on the CPU."""
    from safetensors import safe_open

    with safe_open(folder / "golden.safetensors", framework="pt") as file:
        return {n.removeprefix(prefix): file.get_tensor(n) for n in file.keys() if n.startswith(prefix)}  # noqa: SIM118


def other_inputs(golden: Mapping[str, Any], seed: int = 1) -> dict[str, Any]:
    """Inputs like the golden ones with other numbers: every second timed call gets them."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    made = {}
    for name, tensor in golden.items():
        if name == "timestep":
            made[name] = tensor * 0.5
        elif name == "time_ids":
            made[name] = tensor.clone()
        elif tensor.is_floating_point():
            made[name] = torch.randn(tensor.shape, generator=generator).to(tensor.dtype)
        else:  # token ids: other words, the same end
            last = int(tensor.max())
            words = torch.randint(0, max(last - 1, 1), tensor.shape, generator=generator, dtype=tensor.dtype)
            made[name] = torch.where(tensor >= last - 1, tensor, words)
    return made


def relative_errors(made: Sequence[Any], wanted: Mapping[str, Any]) -> dict[str, float]:
    """||out - golden|| / ||golden|| of each output, computed in fp64; inf where something isn't finite."""
    import torch

    errors = {}
    for (name, want), out in zip(wanted.items(), made, strict=True):
        out, want = out.detach().double().cpu(), want.double()
        wrong = out.shape != want.shape or not bool(torch.isfinite(out).all())
        errors[name] = float("inf") if wrong else float((out - want).norm() / want.norm())
    return errors


def time_calls(call: Call, inputs: Sequence[Inputs], count: int, device: Any) -> tuple[list[float], float, Any]:
    """Milliseconds of each of ``count`` calls, of the clock a call, and the last call's outputs.

    Nothing waits between calls, as in a loop of steps; inputs take turns.
    """
    import torch

    if device.type != "cuda":
        times = []
        for i in range(count):
            begin = time.perf_counter()
            made = call(inputs[i % len(inputs)])
            times.append((time.perf_counter() - begin) * 1e3)
        return times, sum(times) / count, made
    with torch.cuda.device(device):
        new: Any = functools.partial(torch.cuda.Event, enable_timing=True)
        events = [(new(), new()) for _ in range(count)]
        torch.cuda.synchronize()
        begin = time.perf_counter()
        for i, (before, after) in enumerate(events):
            before.record()
            made = call(inputs[i % len(inputs)])
            after.record()
        torch.cuda.synchronize()
        wall = (time.perf_counter() - begin) * 1e3 / count
        return [before.elapsed_time(after) for before, after in events], wall, made


def first_call(subject: Subject, device: Any) -> None:
    """Loads or compiles; a peer that fails (a compiler out of memory) costs its own row only."""
    import torch

    print(f"{subject.name}: first call …", file=sys.stderr, flush=True)
    hits = cache_hits()
    begin = time.perf_counter()
    try:
        subject.call = subject.start()
        subject.call(subject.inputs[-1])
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    except Exception as error:
        if subject.ours:
            raise
        subject.call, subject.failure = None, f"{type(error).__name__}: {str(error).strip().splitlines()[0][:120]}"
    subject.first_seconds = time.perf_counter() - begin
    subject.cached = cache_hits() > hits
    print(f"{subject.name}: first call took {subject.first_seconds:.2f} s", file=sys.stderr, flush=True)


def cache_hits() -> int:
    dynamo = sys.modules.get("torch._dynamo.utils")
    if dynamo is None:
        return 0
    return int(dynamo.counters["inductor"]["fxgraph_cache_hit"] + dynamo.counters["aot_autograd"]["autograd_cache_hit"])


def measure(subjects: Sequence[Subject], device: Any, *, calls: int, rounds: int, warmup: int) -> None:
    """Fills the subjects: rounds in which each is called in turn, at least ``calls`` times in all."""
    for subject in subjects:
        first_call(subject, device)
    running = [subject for subject in subjects if subject.call is not None]
    for turn in range(rounds):
        for subject in running:
            assert subject.call is not None
            each = -(-calls // rounds)
            each += -each % len(subject.inputs)  # a round ends with the golden inputs
            before = warmup if turn == 0 else min(warmup, 2)
            if before:
                time_calls(subject.call, subject.inputs, before, device)
            times, wall, made = time_calls(subject.call, subject.inputs, each, device)
            subject.milliseconds += times
            subject.wall.append(wall)
            if subject.exact():
                for name, error in relative_errors(made, subject.wanted).items():
                    subject.errors[name] = max(subject.errors.get(name, 0.0), error)
            del made


def rows_of(engine: str, subjects: Sequence[Subject]) -> list[Row]:
    """Table rows; ratios are to the first of ours."""
    ours = next(report.spread(s.milliseconds).median for s in subjects if s.ours)
    made = []
    for subject in subjects:
        times = report.spread(subject.milliseconds) if subject.milliseconds else None
        wall = report.spread(subject.wall) if subject.wall else None
        made.append(
            Row(
                engine,
                subject.name,
                subject.ours,
                times,
                wall,
                times.median / ours if times else None,
                subject.first_seconds,
                subject.cached,
                subject.errors,
                subject.failure,
            )
        )
    return made


HEADERS = ("engine", "by", "ms", "p10 to p90", "min", "clock, ms", "ratio", "first call, s", "rel. error")


def cells(rows: Sequence[Row]) -> list[list[str]]:
    """Rows of the table, by ``HEADERS``."""
    lines = []
    for row in rows:
        first = f"{row.first_call_seconds:.2f}{' (cached)' if row.first_call_cached else ''}"
        if row.milliseconds is None or row.wall_milliseconds is None:
            lines.append([row.engine, row.name, "failed", "", "", "", "", first, row.failure])
            continue
        ms, wall = row.milliseconds, row.wall_milliseconds
        error = f"{max(row.error.values()):.1e}" if row.error else "other weights"
        lines.append(
            [
                row.engine,
                row.name,
                f"{ms.median:.3f}",
                f"{ms.p10:.3f} to {ms.p90:.3f}",
                f"{ms.least:.3f}",
                f"{wall.median:.3f}",
                f"{row.ratio:.2f}",
                first,
                error,
            ]
        )
    return lines


def subjects_of(
    members: Sequence[Any], component: str, variant: str, names: Mapping[int, str], peers: Any, asked: Sequence[str]
) -> list[Subject]:
    """Artifacts, by the names given for them, and peers, which are called with the first artifact's golden inputs."""
    from benchmarks.peers import title

    made = []
    for artifact in members:
        described = artifact.manifest.components[component].variants[variant]
        golden = golden_tensors(artifact.folder, f"{component}.{variant}.")
        given = {spec.name: golden[f"input.{spec.name}"] for spec in described.inputs}
        wanted = {spec.name: golden[f"output.{spec.name}"] for spec in described.outputs}
        inputs = [{n: t.to(artifact.device) for n, t in each.items()} for each in (other_inputs(given), given)]
        start = _starter(artifact, component, variant)
        made.append(Subject(names[id(artifact)], start, inputs, wanted, ours=True))
    first = made[0]
    for name in dict.fromkeys(asked):
        if component.startswith("text_encoder") and name == "eager-nchw":
            continue  # it has no pictures
        start = functools.partial(peers.call, name)
        made.append(Subject(title(name, component), start, first.inputs, first.wanted, lambda: bool(peers.exact)))
    return made


def _starter(artifact: Any, component: str, variant: str) -> Callable[[], Call]:
    def start() -> Call:
        engine = artifact.engine(component, variant)
        return lambda inputs: engine(**inputs)

    return start


def groups(pairs: Sequence[tuple[Any, str, str]]) -> list[tuple[str, str, list[Any]]]:
    """Artifacts whose variant takes the same inputs are timed side by side.

    Args:
        pairs: (artifact, component, variant), in the order asked for.
    """
    found: dict[tuple[Any, ...], tuple[str, str, list[Any]]] = {}
    for artifact, component, variant in pairs:
        inputs = artifact.manifest.components[component].variants[variant].inputs
        outputs = artifact.manifest.components[component].variants[variant].outputs
        found.setdefault((component, variant, inputs, outputs), (component, variant, []))[2].append(artifact)
    return sorted(found.values(), key=lambda group: group[0])  # a component's peers are used up before the next's


def side_by_side(
    grouped: Sequence[tuple[str, str, list[Any]]], peers: Sequence[str]
) -> list[tuple[str, str, list[Any], list[str]]]:
    """What is timed in turns, in order: (component, variant, artifacts, peers).

    First come all artifacts with the peers that only load; then, for each peer that compiles, the first artifact once
    more beside it.
    """
    from benchmarks.peers import COMPILE

    loaded = [(*group, [name for name in peers if name not in COMPILE]) for group in grouped]
    compiled = [
        (component, variant, members[:1], [name])
        for component, variant, members in grouped
        for name in peers
        if name in COMPILE
    ]
    return loaded + compiled


def run(options: argparse.Namespace, artifacts: Sequence[Any], tell: Callable[[Sequence[Row]], None]) -> None:
    """Measures everything; ``tell`` gets rows as soon as they are measured."""
    import torch

    from benchmarks.peers import Peers

    labels = {id(a): f"ours, {a.manifest.key.backend}" for a in artifacts}
    if len(artifacts) > 1:
        labels = {id(a): f"{labels[id(a)]}, {a.folder.resolve().name}" for a in artifacts}
    asked = [(a, *pair) for a in artifacts for pair in engines_of(a.manifest, options.component)]
    peers: Any = None
    last: Any = None
    shown = set()
    for component, variant, members, some in side_by_side(groups(asked), list(dict.fromkeys(options.peer))):
        leader = members[0]
        if last != (id(leader), component):
            peers = None  # the last component's are freed first
            if leader.device.type == "cuda":
                torch.cuda.empty_cache()
            peers, last = Peers(leader.folder, leader.manifest, component, leader.device), (id(leader), component)
        batch = leader.manifest.components[component].variants[variant].inputs[0].shape[0]
        print(f"{component}.{variant}:", file=sys.stderr, flush=True)
        subjects = subjects_of(members, component, variant, labels, peers, some)
        measure(subjects, leader.device, calls=options.calls, rounds=options.rounds, warmup=options.warmup)
        rows = rows_of(f"{component}.{variant}, batch {batch}", subjects)
        group = component, variant, id(leader)
        tell(rows[1:] if group in shown else rows)  # ours has its row already
        shown.add(group)


def main(arguments: Sequence[str] | None = None) -> int:
    words = list(sys.argv[1:] if arguments is None else arguments)
    options = parse(words)
    from buildtool.store import manifest as manifests
    from buildtool.store.errors import SdxlError

    with tempfile.TemporaryDirectory() as scratch:
        if options.fresh_cache:  # read when the compiler is imported
            os.environ["TORCHINDUCTOR_CACHE_DIR"] = scratch
        import torch

        import runtimes

        rows: list[Row] = []
        shown = report.Table(HEADERS)
        try:
            gpu = report.on_gpu(manifests.read(options.artifacts[0]))
            device = f"cuda:{options.gpu_index}" if gpu else None
            artifacts = [runtimes.load(path, device=device).artifacts[0] for path in options.artifacts]
            read = [artifact.manifest for artifact in artifacts]
            where = report.hardware(read[0], options.gpu_index)
            if gpu:
                where["cuDNN"] = str(torch.backends.cudnn.version())  # type: ignore[no-untyped-call]
                flags = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
                where["TF32 of the peers"] = f"products {flags[0]}, convolutions {flags[1]}"
            print(f"{report.footer(read, where, words)}\n", flush=True)

            def write(complete: bool) -> None:
                spreads = [{"milliseconds": r.milliseconds, "wall_milliseconds": r.wall_milliseconds} for r in rows]
                told = [{**asdict(row), **spread} for row, spread in zip(rows, spreads, strict=True)]
                about = {"complete": complete, "hardware": where, "command": report.command_line(words)}
                report.write_json(options.json, {"rows": told, **about})

            def tell(measured: Sequence[Row]) -> None:
                rows.extend(measured)
                shown.add(*cells(measured))
                write(complete=False)

            with torch.no_grad():
                run(options, artifacts, tell)
        except SdxlError as error:
            print(f"Error: {error}", file=sys.stderr)
            return 1
    counts = sorted({row.milliseconds.count for row in rows if row.milliseconds})
    print(
        f"\nMedian of {', '.join(map(str, counts))} calls each, in {options.rounds} rounds, by "
        f"{'CUDA events' if gpu else 'the clock'}; rel. error against fp32 eager; first call: loading, compiling."
    )
    write(complete=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
