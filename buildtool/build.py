"""Makes an artifact that isn't there: export -> compile -> check against eager -> commit."""

import contextlib
import dataclasses
import datetime
import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
from safetensors.torch import save_file

from buildtool import compiler, golden, gpu, gpu_room, lora, segments, tokenizers
from buildtool.checkpoint.configs import vae_scale_factor
from buildtool.plan import Plan
from buildtool.progress import Progress
from buildtool.store import machine, manifest
from buildtool.store.errors import SdxlError
from buildtool.store.manifest import Check, Component, Manifest, PipelineConfig, StoredTensor, Variant
from buildtool.store.store import Store, describe
from exporters import registry, sdxl, trt_room, weights
from exporters.base import ExportError, Request
from exporters.base import StoredTensor as PlannedTensor

GB = 1_000_000_000


@dataclass
class Built:
    """What a build did.

    ``compiled`` counts what the compiler had to make: ``<component>.<variant>``; empty for a hit, and
    for another checkpoint of an architecture whose code is in the store.
    """

    path: Path
    hit: bool
    compiled: list[str] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)


def build(planned: Plan, progress: Progress) -> Built:
    """Builds the artifact of a plan, unless it has appeared meanwhile.

    One builder per key: a second one waits here and takes the first one's result.

    Raises:
        SdxlError: the checkpoint, the machine, the disk or the compiler can't do it, or the result
            is not what fp32 eager computes.
    """
    store = Store(planned.spec.artifacts)
    with store.building(planned.key.digest, progress.say):
        found = store.lookup(planned.key)
        if found and not planned.spec.force:
            return Built(found, hit=True)
        with _one_line(planned):
            return _Build(planned, store, progress).run()


@contextlib.contextmanager
def _one_line(planned: Plan) -> Iterator[None]:
    """An exporter's error as the store's, with the command that repeats it."""
    try:
        yield
    except ExportError as error:
        raise SdxlError(error.message, error.hint or f"To repeat it: {shlex.join(planned.command)}") from error


class _Build:
    """One build, from an empty stage to the commit."""

    def __init__(self, planned: Plan, store: Store, progress: Progress) -> None:
        self.planned, self.store, self.progress = planned, store, progress
        self.source, self.key = planned.source, planned.key
        names = [row.name for row in sdxl.COMPONENTS if row.name in planned.code_keys]
        self.table = {name: sdxl.component(name, planned.key.options) for name in names}
        self.exporter = registry.exporter(planned.spec.backend)
        self.present = planned.target.device == "cpu" or gpu.usable(planned.target)
        self.row = registry.backend(planned.spec.backend)
        self.request = Request(
            width=planned.width,
            height=planned.height,
            batch=planned.spec.batch,
            precision=planned.key.precision,
            device=planned.target.torch_device if self.present else "cpu",
            target=planned.target.name,
            options=planned.key.options,
        )
        self.on_gpu = planned.target.device == "cuda" and self.present and (self.row.tunes or self.row.weighted)
        self.built = Built(Path(), hit=False)
        self.digests: dict[str, str] = {}
        self.golden: dict[str, Any] = {}
        self._locks: dict[str, contextlib.ExitStack] = {}
        self._assembled: dict[str, Future[Component]] = {}
        self._written: dict[Path, str] = {}
        self._stopped = False
        self._waiting: golden.Waiting | None = None
        self._pool: compiler.Pool | None = None

    def run(self) -> Built:
        self.exporter.check_request(self.request)
        if self.on_gpu:  # what asks for no device by its number is to use this one too
            import torch

            torch.cuda.set_device(self.planned.target.index)
        if self.planned.spec.lora:
            lora.check(self.source, self.planned.spec.lora)
        self._check_reference_room()
        with (
            self.store.stage(needs=self._needs()) as stage,
            contextlib.ExitStack() as locks,
            self._assembler(stage) as assemble,
            self._checker() as start_check,
        ):
            jobs = self._missing_code(locks)
            compiled = {job.component for job in jobs}
            room_here = self.exporter.check_room(self.source.parameters, self.request) if jobs else 0
            index = self.planned.target.index if self.on_gpu else None
            with self.store.stage() as scratch, compiler.Pool(self.progress, index) as pool:
                self._pool = pool
                if jobs:
                    pool.prepare(jobs, scratch)  # imports, while this process does
                reference, at_once = self._reference(), self.planned.spec.jobs
                if self.on_gpu and jobs:
                    room = gpu_room.compilers(self.source.parameters, self.request, reference.device != "cpu")
                    at_once = min(at_once or room, room)
                if room_here:
                    at_once = min(at_once or room_here, room_here)
                tensors: dict[str, Mapping[str, Any]] = {}
                if self.row.weighted:
                    tensors = {name: self.source.tensors(row.source) for name, row in self.table.items()}
                    self._golden(tensors, reference)  # first: beside these compilers is no room for it
                    jobs = self._with_weights(jobs, tensors, scratch)
                    tensors = {name: {} for name in self.table}  # the compilers have them, and want the memory
                    gpu_room.release()
                if jobs:
                    pool.start(jobs, at_once)
                if not self.row.weighted:
                    tensors = {name: self.source.tensors(row.source) for name, row in self.table.items()}
                    for name in self.table:
                        if name not in compiled:
                            assemble(name, tensors[name])
                    if not jobs:
                        start_check()  # it is needed soon
                    self._golden(tensors, reference)  # while the compilers run, and weights are written
                    start_check()
                for name in sorted(compiled, key=lambda name: name == "unet"):  # takes longest
                    self._keep_code(name, pool)
                    self._locks.pop(name).close()  # whoever waits for this code can go on
                    if not self.row.weighted:
                        assemble(name, tensors[name])
            locks.close()
            start_check()
            for name in self.table:
                if name not in self._assembled:
                    assemble(name, tensors[name])
            components = {name: self._assembled[name].result() for name in self.table}
            self._texts(stage)
            with self.progress.stage("check against fp32 eager"):
                checked = self._checked(stage, self._manifest(stage, components))
            (stage / manifest.MANIFEST).write_bytes(manifest.encode(checked))
            with self.progress.stage("commit"):
                for path, digest in self._written.items():  # not before: a build that fails leaves none
                    self._link(self.store.add_blob(path, digest), path)
                self.built.path = self.store.commit(stage, self.key)
        self.built.seconds = dict(self.progress.seconds)
        return self.built

    def _reference(self) -> Request:
        """The request with the device that fp32 eager runs on: the GPU, if it has room, else the CPU."""
        if not self.on_gpu or gpu_room.reference_fits(self.source.parameters, self.request):
            return self.request
        self.progress.say("fp32 eager runs on the CPU, which takes minutes: the GPU has no room for it.")
        return dataclasses.replace(self.request, device="cpu")

    def _check_reference_room(self) -> None:
        """Says at once if the golden tensors, which need the whole of a component in fp32, can't be made.

        Only for backends that build without them.
        """
        if not self.row.weighted or not self.planned.spec.golden or self.on_gpu:
            return
        needed, free = gpu_room.reference_bytes(self.source.parameters, self.request), trt_room.free_memory()
        if free and needed > free:
            raise SdxlError(
                f"fp32 eager, which the engines are compared with, takes about {needed / GB:.1f} GB of memory; "
                f"{free / GB:.1f} GB are free here.",
                "Build without anything to compare with: --no-golden",
            )

    def _golden(self, tensors: Mapping[str, Mapping[str, Any]], reference: Request) -> None:
        for name, row in self.table.items() if self.planned.spec.golden else ():
            with self.progress.stage(f"{name}: fp32 eager"):
                made = self._golden_of(row, tensors[name], reference)
                if made is None:
                    gpu_room.release()
                    self.progress.say("fp32 eager runs on the CPU, which takes minutes: the GPU's memory ran out.")
                    reference = dataclasses.replace(reference, device="cpu")
                    made = sdxl.golden(row, self.source.configs, tensors[name], reference)
                self.golden |= made
                gpu_room.release()

    def _golden_of(self, row: sdxl.Component, tensors: Mapping[str, Any], reference: Request) -> dict[str, Any] | None:
        """None if the GPU has no room any more: something else took it since it was asked."""
        import torch

        try:
            return sdxl.golden(row, self.source.configs, tensors, reference)
        except torch.OutOfMemoryError:
            return None

    def _needs(self) -> int:
        """Bytes that the weights will take at most; code is small beside them."""
        width = 4 if self.key.precision == "fp32" else 2
        if self.row.weighted:  # each variant has them, and the compilers a file of them besides
            codes, force = self.planned.code_keys, self.planned.spec.force
            made = [row for name, row in self.table.items() if force or not self.store.code(codes[name].digest)]
            return width * sum(self.source.parameters[row.source] * (len(row.variants) + 1) for row in made)
        return sum(count * width for count in self.source.parameters.values())

    # Code

    def _missing_code(self, locks: contextlib.ExitStack) -> list[compiler.Job]:
        """What has to be compiled, its code keys locked: another builder of the same code is waited for.

        Every builder locks in the table's order, so none waits for one that waits for it.
        """
        jobs = []
        configs = self.planned.compiled_configs
        # A compiler's process sees one GPU, whichever it is here.
        request = dataclasses.replace(self.request, device="cuda:0") if self.on_gpu else self.request
        for name, row in self.table.items():
            digest = self.planned.code_keys[name].digest
            if self.store.code(digest) and not self.planned.spec.force:
                continue
            self._locks[name] = locks.enter_context(contextlib.ExitStack())
            self._locks[name].enter_context(self.store.building(digest, self.progress.say))
            if self.store.code(digest) and not self.planned.spec.force:
                continue
            for variant in row.variants:
                jobs.append(compiler.Job(self.planned.spec.backend, name, variant, configs, request))
        return jobs

    def _with_weights(
        self, jobs: list[compiler.Job], tensors: Mapping[str, Mapping[str, Any]], scratch: Path
    ) -> list[compiler.Job]:
        """The jobs of compilers that need the weights, which are written below ``scratch`` for them."""
        caches = (self.store.root / "caches").absolute()
        for name in {job.component: None for job in jobs}:
            path = scratch / weights.location(name)
            path.parent.mkdir(exist_ok=True)
            with self.progress.stage(f"{name}: weights for the compiler"):
                layout = self.exporter.layout(self.table[name], self.source.configs, self.request)
                weights.write(path, layout, tensors[name], self.progress.update)
        return [
            dataclasses.replace(
                job,
                request=dataclasses.replace(
                    job.request,
                    weights=str((scratch / weights.location(job.component)).absolute()),
                    caches=str(caches),
                ),
            )
            for job in jobs
        ]

    def _keep_code(self, name: str, pool: compiler.Pool) -> None:
        """Commits a component's compiled variants to the store, for every checkpoint of its architecture."""
        row = self.table[name]
        precision = row.precision(self.source.configs, self.request)
        # What is upcast in an fp16 artifact is held to fp16's tolerance: its products may be TF32's.
        tolerance = row.tolerated(self.request.precision)
        check = Check(status="deferred", error={}, tolerance=tolerance, reason="never run so far")
        tensors: dict[str, StoredTensor] = {}
        variants: dict[str, Variant] = {}
        with self.store.stage() as out:
            for variant in row.variants:
                result = pool.result(name, variant)
                stored = msgspec.convert(result.pop("tensors"), dict[str, StoredTensor])
                if any(tensors.get(n, t) != t for n, t in stored.items()):
                    raise RuntimeError(f"the variants of {name} want one tensor laid out in two ways")
                tensors |= stored
                others = result.pop("others")
                form = msgspec.convert({**result, "check": msgspec.to_builtins(check)}, Variant)
                for file in (form.file, *others):
                    shutil.move(pool.file(name, variant, file), out / file)
                if row.whole is None:
                    variants[variant] = form
                else:
                    whole = variant.partition(".")[0]
                    variants[whole] = segments.appended(variants.get(whole), form)
                self.built.compiled.append(f"{name}.{variant}")
            if self.row.weighted:
                self._share(name, [out / form.file for form in variants.values()])
            digest = self.planned.code_keys[name].digest
            described = Component(
                loader=registry.backend(self.planned.spec.backend).loader,
                precision=precision,  # type: ignore[arg-type]
                code_key=digest,
                weights=weights.location(name) if tensors else "",
                tensors=tensors,
                variants=variants,
            )
            self.store.commit_code(out, digest, described)

    def _share(self, name: str, engines: list[Path]) -> None:
        """Stores what the engines have in common with each other, and with those of other artifacts, once."""
        with self.progress.stage(f"{name}: share"):
            known = {} if self.planned.spec.force else self._known_parts(name)
            for engine in engines:
                for digest, part in self.exporter.share(engine, known).items():
                    if self.store.add_blob(part) != digest:
                        raise RuntimeError(f"{part.name} is not what its digest says")
                    known[digest] = self.store.blob(digest)

    def _known_parts(self, name: str) -> dict[str, Path]:
        """Blobs that engines of these source weights share: digest -> file."""
        found: dict[str, Path] = {}
        source, key = self.table[name].source, self.key
        for folder, summary in self.store.summaries():
            if isinstance(summary, SdxlError) or summary.key.weights.get(source) != key.weights[source]:
                continue
            if (summary.key.backend, summary.key.precision) == (key.backend, key.precision):
                with contextlib.suppress(SdxlError, OSError, ValueError):  # one that is damaged has nothing to share
                    for form in manifest.read(folder).components[name].variants.values():
                        digests = self.exporter.shared(name, folder / form.file)
                        found |= {d: self.store.blob(d) for d in digests if self.store.blob(d).is_file()}
        return found

    # Weights

    @contextlib.contextmanager
    def _assembler(self, stage: Path) -> Iterator[Callable[[str, Mapping[str, Any]], None]]:
        """What has a component assembled beside this thread; ``_assembled`` has the results.

        Each has a thread of its own, so that none waits for another's file. Engines with weights of their own may have
        files in common, so those come one after the other.
        """

        def device() -> None:
            if self.on_gpu:  # a thread has its own
                import torch

                torch.cuda.set_device(self.planned.target.index)

        def submit(name: str, tensors: Mapping[str, Any]) -> None:
            self._assembled[name] = threads.submit(self._assemble, name, tensors, stage)
            self._assembled[name].add_done_callback(failed)

        def failed(future: "Future[Component]") -> None:
            error = None if self._stopped or future.cancelled() else future.exception()
            if isinstance(error, Exception) and self._pool is not None:
                self._pool.fail(error)  # not after all compilers have ended

        with ThreadPoolExecutor(1 if self.row.weighted else len(self.table), "assembler", device) as threads:
            try:
                yield submit
            except BaseException:
                self._stopped = True
                threads.shutdown(wait=False, cancel_futures=True)
                raise

    def _wrote(self, done: int, total: int) -> None:
        if self._stopped:
            raise InterruptedError
        self.progress.update(done, total)

    def _assemble(self, name: str, tensors: Mapping[str, Any], stage: Path) -> Component:
        """Links a component's code and weights into the stage."""
        record = self.store.attach_code(self.planned.code_keys[name].digest, stage)
        described = msgspec.convert(record.meta, Component)
        self.digests |= {file: entry.sha256 for file, entry in record.files.items()}
        for form in described.variants.values() if self.row.weighted else ():
            for digest, part in self.exporter.shared(name, stage / form.file).items():
                if not self.store.blob(digest).is_file():
                    raise SdxlError(f"{self.store.blob(digest)} is missing.", "Build it again with --force.")
                if part not in self.digests:
                    self.store.link(self.store.blob(digest), stage / part)
                self.digests[part] = digest
        if described.weights:
            (stage / "weights").mkdir(exist_ok=True)
            self._weights(self.table[name].source, described, tensors, stage)
        return described

    def _weights(self, source: str, described: Component, tensors: Mapping[str, Any], stage: Path) -> None:
        """Links the component's weights blob into the stage, or writes what becomes one, if no artifact has it yet."""
        path = stage / described.weights
        # A forced build writes the weights anew: adding a blob mends one that was damaged in place.
        digest = None if self.planned.spec.force else self._known_blob(source, described)
        if digest is None:
            with self.progress.stage(f"{described.weights.removesuffix('.safetensors')}: write"):
                layout = {
                    n: PlannedTensor(t.shape, t.dtype, t.stride, t.sources, t.recipe)
                    for n, t in described.tensors.items()
                }
                digest = self._written[path] = weights.write(path, layout, tensors, self._wrote)
        else:
            self._link(digest, path)
        self.digests[described.weights] = digest

    def _link(self, digest: str, path: Path) -> None:
        if not self.store.link(self.store.blob(digest), path):
            self.progress.say(f"{path.name} was copied: this file system makes no hard link to the store's blob.")

    def _known_blob(self, source: str, described: Component) -> str | None:
        """The blob of these source weights in this layout, if an artifact in the store has it."""
        for folder, summary in self.store.summaries():
            if isinstance(summary, SdxlError) or summary.key.weights.get(source) != self.key.weights[source]:
                continue
            other = manifest.read(folder)
            for component in other.components.values():
                if component.weights and component.tensors == described.tensors:
                    entry = other.files[component.weights]
                    blob = self.store.blob(entry.sha256)
                    if blob.is_file() and blob.stat().st_size == entry.size:
                        return entry.sha256
        return None

    # The rest of the folder

    def _texts(self, stage: Path) -> None:
        if self.golden:
            save_file(self.golden, stage / "golden.safetensors")
        for name, folder in self.source.tokenizer_folders.items():
            tokenizers.convert(folder, stage / f"{name}.json")
        (stage / "scheduler.json").write_text(json.dumps(self.source.configs["scheduler"], indent=1) + "\n")

    def _manifest(self, stage: Path, components: dict[str, Component]) -> Manifest:
        vae, pipeline = self.source.configs["vae"], self.source.configs["pipeline"]
        spec = self.planned
        return Manifest(
            schema_version=manifest.SCHEMA_VERSION,
            key=self.key,
            key_digest=self.key.digest,
            created=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            command=spec.command,
            built_with=_built_with(spec.target),
            build_seconds=dict(self.progress.seconds),
            pipeline=PipelineConfig(
                force_zeros_for_empty_prompt=bool(pipeline.get("force_zeros_for_empty_prompt", True)),
                latent_channels=int(vae.get("latent_channels", 4)),
                vae_scale_factor=vae_scale_factor(vae),
                scaling_factor=float(vae["scaling_factor"]),
                latents_mean=vae.get("latents_mean"),
                latents_std=vae.get("latents_std"),
                max_prompt_tokens=77,
            ),
            components=components,
            files=describe(stage, self.digests),
            digest="",
        )

    @contextlib.contextmanager
    def _checker(self) -> Iterator[Callable[[], None]]:
        """What starts the check's process, which takes seconds before it needs the artifact."""

        def start() -> None:
            if self._waiting is None and self.planned.spec.golden and self.present:
                self._waiting = golden.Waiting(self.request.device)

        try:
            yield start
        finally:
            if self._waiting is not None:
                self._waiting.close()

    def _checked(self, stage: Path, unchecked: Manifest) -> Manifest:
        """The manifest with every variant's measured error, from a fresh process.

        Raises:
            SdxlError: a variant is further from fp32 eager than its tolerance, or the process died.
        """
        deferred = self._deferred()
        if deferred:
            replace = msgspec.structs.replace
            return self._with_checks(
                unchecked, lambda name, form: replace(form, check=replace(form.check, reason=deferred))
            )
        (stage / manifest.MANIFEST).write_bytes(manifest.encode(unchecked))
        checked = golden.run(stage, self._waiting)
        if checked.problem:
            raise SdxlError(checked.problem, "See what is wrong with the compiler: sdxl-build doctor")
        results = checked.variants
        worst = [(name, result) for name, result in results.items() if not result["passed"]]
        if worst:
            name, result = max(worst, key=lambda item: max(item[1]["error"].values()))
            raise SdxlError(
                f"{name} is off by {max(result['error'].values()):.2e} from fp32 eager; "
                f"{result['tolerance']:.0e} is allowed. Nothing was kept of this artifact.",
                f"To repeat it: {shlex.join(self.planned.command)}",
            )

        def passed(name: str, form: Variant) -> Variant:
            result = results[name]
            check = Check(status="passed", error=result["error"], tolerance=form.check.tolerance, reason="")
            return msgspec.structs.replace(form, check=check, activation_bytes=result["activation_bytes"])

        return self._with_checks(unchecked, passed)

    def _deferred(self) -> str:
        """Why nothing can be checked on this machine; empty if it can."""
        if not self.golden:
            return "built with --no-golden: there are no golden tensors to compare with"
        if not self.present:
            return f"built for {self.planned.target.name} where there is no such GPU; its first run checks it"
        return ""

    def _with_checks(self, unchecked: Manifest, checked: Callable[[str, Variant], Variant]) -> Manifest:
        components = {}
        for name, component in unchecked.components.items():
            variants = {variant: checked(f"{name}.{variant}", form) for variant, form in component.variants.items()}
            components[name] = msgspec.structs.replace(component, variants=variants)
        return msgspec.structs.replace(unchecked, components=components, build_seconds=dict(self.progress.seconds))


def _built_with(target: gpu.Target) -> dict[str, str]:
    """Versions, compiler, driver and GPU of this machine, for the record."""
    found = {"sdxl-build": "unknown", "python": ".".join(map(str, sys.version_info[:3]))}
    found |= machine.versions("sdxl-build", "torch", "triton", "diffusers", "transformers", "tokenizers", "safetensors")
    found["compiler"] = _compiler()
    if target.device == "cuda" and target.gpu_name != "any":
        card = machine.gpus()[target.index]
        found |= {"gpu": card.name, "driver": card.driver}
    else:
        found["cpu"] = _cpu_name()
    return found


def _cpu_name() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _compiler() -> str:
    command = [*shlex.split(os.environ.get("CXX", "g++")), "--version"]
    try:
        told = subprocess.run(command, capture_output=True, text=True, timeout=20).stdout
    except (OSError, subprocess.TimeoutExpired):
        return "none"
    return told.splitlines()[0] if told else "unknown"
