"""One run of ``sdxl-run``: jobs to calls of the pipeline, pictures to files, and what it all took."""

import resource
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import msgspec

from buildtool.store import lora
from buildtool.store.errors import SdxlError
from buildtool.store.manifest import Manifest
from runtimes import deepcache, memory, names, no_negative, refiner, schedulers, sizes, timeline
from runtimes.jobs import Job, Parameters

Size = tuple[int, int]
Progress = Callable[[int, int], None] | None
Bar = Callable[[str], AbstractContextManager[Progress]]


class Picture(msgspec.Struct, frozen=True, kw_only=True):
    """One picture to make."""

    index: int
    """Its number in the run, from 0."""
    path: Path
    parameters: Parameters

    def as_dict(self) -> dict[str, Any]:
        return {"path": str(self.path), "index": self.index, **msgspec.to_builtins(self.parameters)}


Group = Sequence[Picture]
"""Pictures of one call."""

SAVERS = 4
"""Files written at a time: a PNG of 1024x1024 takes a fifth of a second, in which the next picture is begun."""


class Planner:
    """Gives every picture of a run its seed, size and file name.

    Args:
        manifests: of the artifacts that will be loaded, in order; the first gives the default size.
        options: the command line's settings; ``seed`` is the run's.
        names: where pictures go.
        mode: one of ``runtimes.memory.MODES``.
        refiners: of the refiner's artifacts.
    """

    def __init__(
        self,
        manifests: Sequence[Manifest],
        options: Job,
        names: names.Names,
        mode: str = memory.RESIDENT,
        refiners: Sequence[Manifest] = (),
    ) -> None:
        memory.check(mode, [*manifests, *refiners])
        self._mode, self._refiners = mode, refiners
        self._manifests = manifests
        self._options = options
        self._names = names
        self._count = 0

    def plan(self, jobs: Sequence[Job]) -> list[Picture]:
        """The pictures of some jobs. Picture i of the run has the seed ``seed + i``; in a job with
        its own seed, counting starts anew.

        Raises:
            SdxlError: a size that no artifact makes, a model's scheduler that is not built in, a wrong pattern,
                a folder that can't be written to.
        """
        before = self._count
        try:
            pictures = [picture for job in jobs for picture in self._pictures(job)]
            for folder in dict.fromkeys(picture.path.parent for picture in pictures):
                names.check_folder(folder)
        except SdxlError:
            self._count = before  # a line of stdin that is refused takes no seeds from the next ones
            raise
        return pictures

    def _pictures(self, job: Job) -> Iterator[Picture]:
        def first(name: str) -> Any:
            own = getattr(job, name)
            return getattr(self._options, name) if own is None or own is msgspec.UNSET else own

        negative = job.negative_prompt
        if isinstance(negative, msgspec.UnsetType):
            own = self._options.negative_prompt
            negative = None if isinstance(own, msgspec.UnsetType) else own
        if job.width is None and job.height is None:
            width, height = self._size(self._options.width, self._options.height)
        else:
            width, height = self._size(job.width, job.height)
        no_negative.check(self._manifest(width, height), negative)
        image = first("image")
        strength = None if image is None else first("strength")
        embedding = self._embedding(first("embedding") or (), (width, height))
        refined = self._refined(job, self._manifest(width, height), (width, height), strength)
        for i in range(first("num_images")):
            parameters = Parameters(
                prompt=job.prompt,
                negative_prompt=negative,
                seed=first("seed") + self._count if job.seed is None else job.seed + i,
                width=width,
                height=height,
                steps=first("steps"),
                guidance=first("guidance"),
                guidance_until=first("guidance_until"),
                scheduler=first("scheduler") or schedulers.name_of(self._manifests[0].key.configs.get("scheduler", {})),
                image=image,
                strength=strength,
                lora=first("lora") or (),
                embedding=embedding,
                **refined,
            )
            if parameters.lora:
                memory.refuse_loras(self._mode)
                from runtimes import lora_names

                loras = [lora.parse(text) for text in parameters.lora]
                lora_names.check(loras, self._manifest(width, height))
                refiner.check_loras(loras, self._manifests, self._refiners)
            if parameters.guidance > 1:
                deepcache.check(self._manifest(width, height), parameters.guidance_until)
            refiner.require_start(self._manifest(width, height), parameters.image)
            if parameters.image is not None:
                from runtimes import starts

                starts.check(parameters.image, self._manifest(width, height))
            fields = {**msgspec.to_builtins(parameters), "index": self._count}
            path = self._names.path(job.out, fields)
            yield Picture(index=self._count, path=path, parameters=parameters)
            self._count += 1

    def _embedding(self, texts: Sequence[str], size: Size) -> tuple[str, ...]:
        """Textual inversions in one spelling. The refiner reads the same prompt, so it has to know them too."""
        if not texts:
            return ()
        from runtimes import embedding_files

        found = [embedding_files.parse(text) for text in texts]
        manifests = [self._manifest(*size)]
        if self._refiners:
            manifests.append(refiner.find(self._refiners, manifests[0], size))
        for manifest in manifests:
            embedding_files.check(found, manifest)
        return tuple(str(each) for each in found)

    def _refined(self, job: Job, base: Manifest, size: Size, start: float | None) -> dict[str, Any]:
        """What of a picture's parameters says how it is refined.

        Raises:
            SdxlError: there is no refiner for it.
        """
        at, strength = job.refine_at, job.refine_strength
        if at is None and strength is None:
            at, strength = self._options.refine_at, self._options.refine_strength
        if not self._refiners:
            if at is None and strength is None:
                return {}
            raise SdxlError(
                f"--refine-{'strength' if at is None else 'at'} says what a refiner does, and there is none.",
                "Give its artifact: --refiner DIR",
            )
        found = refiner.find(self._refiners, base, size)
        refiner.check_start(at, start)
        guides = (job.guidance if job.guidance is not None else self._options.guidance or 0) > 1
        if guides:
            until = job.guidance_until if job.guidance_until is not None else self._options.guidance_until
            deepcache.check(found, 1.0 if until is None else until)
        if (job.scheduler or self._options.scheduler) is None:
            schedulers.name_of(found.key.configs.get("scheduler", {}))
        if at is None and strength is None:
            strength = refiner.STRENGTH
        return {"refiner": found.key.model, "refine_at": at, "refine_strength": strength}

    def _manifest(self, width: int, height: int) -> Manifest:
        found = sizes.find(self._manifests, (width, height))
        assert found is not None, "no artifact makes the size of a picture that was planned"
        return self._manifests[found]

    def _size(self, width: int | None, height: int | None) -> Size:
        """The first artifact's size that has the given width and height; None fits any."""
        own = [sizes.own(manifest) for manifest in self._manifests]
        for w, h in own:
            if width in (None, w) and height in (None, h):
                return w, h
        for manifest, (w, h) in zip(self._manifests, own, strict=True):
            if sizes.makes(manifest, (width or w, height or h)):
                return width or w, height or h
        there = sizes.described(self._manifests)
        for name, value in (("width", width), ("height", height)):
            if value is not None and value % 8:
                raise SdxlError(
                    f"A {name} of {value} was asked for; sizes are multiples of 8.",
                    f"The artifacts given make {there}.",
                )
        asked = f"{width}x{height}" if width and height else f"a {'width' if width else 'height'} of {width or height}"
        wanted = (width or own[0][0], height or own[0][1])
        raise SdxlError(
            f"No engine makes {asked}; the artifacts given make {there}.",
            f"Build one: {sizes.build_command(self._manifests[0], wanted)}",
        )


class Session:
    """Pictures from a loaded pipeline, and the time they took.

    Args:
        pipeline: what ``runtimes.load`` returned.
        bar: a context manager that shows a call's progress, by its title.
        refiner: the pipeline that pictures with a ``refiner`` go through after that.
    """

    def __init__(self, pipeline: Any, bar: Bar, refiner: Any = None) -> None:
        self._pipeline, self._refiner = pipeline, refiner
        self._bar = bar
        self.saved: list[Picture] = []
        self.seconds: dict[str, float] = {}
        self._loras: tuple[str, ...] | None = ()
        self._embeddings: tuple[str, ...] | None = ()
        self._unet_steps = {"full": 0, "shallow": 0}

    def render(self, pictures: Sequence[Picture], last: bool = False) -> Iterator[Picture]:
        """Makes and saves pictures; each is yielded once its file is there.

        A call makes as many as the artifact's batch holds, so that finished ones are on the disk early; where not all
        components stay in memory, pixels come after the steps of all. With a GPU, files are written while it computes
        the next call, and pictures are yielded after that.

        Args:
            pictures: as planned.
            last: whether nothing will be asked of the pipeline afterwards. A single call then records no CUDA graphs,
                which would take longer than it gains by them.

        Raises:
            SdxlError: a file cannot be written, or what the pipeline raises; what was made before it is saved.
        """
        from runtimes import cuda_graph

        made = self._one_by_one if self._pipeline.memory == memory.RESIDENT else self._by_stages
        groups = [*self._groups(pictures)]
        calls, alone = made(groups), last and len(groups) == 1
        under_way: list[tuple[Picture, Future[float]]] = []
        with ThreadPoolExecutor(SAVERS, "save") as savers:
            try:
                while True:
                    with cuda_graph.postponed() if alone else nullcontext():
                        call = next(calls, None)
                    yield from self._finished(under_way)
                    if call is None:
                        return
                    for picture, image in zip(*call, strict=True):
                        under_way.append((picture, savers.submit(self._save, picture, image)))
                    if self._pipeline.device.type == "cpu":
                        yield from self._finished(under_way)
            except (Exception, KeyboardInterrupt):  # also while files are waited for: they will be there
                yield from self._finished(under_way)
                raise

    def _finished(self, under_way: list[tuple[Picture, Future[float]]]) -> Iterator[Picture]:
        """Waits for files and empties the list; the first that couldn't be written is told after the others."""
        failures = []
        while under_way:
            picture, saving = under_way[0]
            failure = saving.exception()
            del under_way[0]
            if failure is not None:
                failures.append(failure)
                continue
            self._add("save", saving.result())
            self.saved.append(picture)
            yield picture
        if failures:
            raise failures[0]

    def _one_by_one(self, groups: Sequence[Group]) -> Iterator[tuple[Group, list[Any]]]:
        for group in groups:
            first, second = self._calls(group)
            with self._bar(_title(group)) as progress, self._full_gpu_told():
                self._set_loras(group[0].parameters.lora)
                self._set_embeddings(group[0].parameters.embedding)
                output = self._pipeline(**first, progress=progress)
                self._account(self._pipeline, True)
            if second is not None:
                with self._bar(f"{_title(group)}, refiner") as progress, self._full_gpu_told():
                    output = self._refiner(**second, image=output.images, progress=progress)
                    self._account(self._refiner, True)
            yield group, output.images

    def _by_stages(self, groups: Sequence[Group]) -> Iterator[tuple[Group, list[Any]]]:
        from runtimes import stages

        calls = []
        for group in groups:
            first, second = self._calls(group)
            calls.append(stages.Call(_title(group), first, refine=second, embedding=group[0].parameters.embedding))
        run = stages.Stages(self._pipeline, calls, self._bar, self._account, self._refiner, self._set_embeddings)
        with self._full_gpu_told():
            run.prepare()
        for group, call in zip(groups, calls, strict=True):
            with self._full_gpu_told():
                images = run.decode(call)
            yield group, images

    def _groups(self, pictures: Sequence[Picture]) -> Iterator[list[Picture]]:
        group: list[Picture] = []
        for picture in pictures:
            if group and (len(group) == self._batch(group[0]) or not _same_call(group[0], picture)):
                yield group
                group = []
            group.append(picture)
        if group:
            yield group

    def _manifest(self, picture: Picture) -> Manifest:
        manifest: Manifest = self._pipeline.manifest(picture.parameters.width, picture.parameters.height)
        return manifest

    def _batch(self, picture: Picture) -> int:
        return self._manifest(picture).key.batch

    def _calls(self, group: Group) -> tuple[dict[str, Any], dict[str, Any] | None]:
        """The pipeline's arguments for one call, and the refiner's, where it goes on from that one's latents."""
        p, arguments = group[0].parameters, self._arguments(group)
        if p.refiner is None:
            return arguments, None
        first, second = refiner.split(arguments, p.refine_at, p.refine_strength)
        own = self._manifest(group[0]).key.configs.get("scheduler", {})
        if schedulers.is_built_in(own) and p.scheduler == schedulers.name_of(own):
            second["scheduler"] = None  # each model has its own
        return first, second

    def _arguments(self, group: Group) -> dict[str, Any]:
        """The pipeline's, for one call."""
        import torch

        p = group[0].parameters
        start: dict[str, Any] = {}
        if p.image is not None:
            from runtimes import starts

            start = {"image": starts.read(p.image), "strength": p.strength}
        return dict(
            prompt=[picture.parameters.prompt for picture in group],
            negative_prompt=None if p.negative_prompt is None else [p.negative_prompt] * len(group),
            width=p.width,
            height=p.height,
            num_inference_steps=p.steps,
            guidance_scale=p.guidance,
            guidance_until=p.guidance_until,
            scheduler=p.scheduler,
            # On the CPU, so that a seed gives the same picture on every machine.
            generator=[torch.Generator("cpu").manual_seed(picture.parameters.seed) for picture in group],
            **start,
        )

    @contextmanager
    def _full_gpu_told(self) -> Iterator[None]:
        import torch

        try:
            yield
        except torch.OutOfMemoryError as error:
            from runtimes import gpu_upload

            free, total = torch.cuda.mem_get_info(self._pipeline.device)
            raise gpu_upload.out_of_memory("this picture", free, total) from error

    def _account(self, pipeline: Any, stepped: bool) -> None:
        """Adds the times of a pipeline's last call, and its steps if it took any."""
        for name, value in pipeline.timings.items():
            self._add(name, value)
        for kind, count in pipeline.unet_steps.items() if stepped else ():
            self._unet_steps[kind] += count

    def _set_loras(self, texts: Sequence[str]) -> None:
        """Only pictures with LoRAs, and those after them, cost anything."""
        if tuple(texts) != self._loras:
            start = time.perf_counter()
            self._loras = None
            self._pipeline.set_loras([lora.parse(text) for text in texts])
            self._loras = tuple(texts)
            self._add("lora", time.perf_counter() - start)

    def _set_embeddings(self, texts: Sequence[str]) -> None:
        if tuple(texts) != self._embeddings:
            from runtimes import embedding_files

            found = [embedding_files.parse(text) for text in texts]
            self._embeddings = None
            for pipeline in (self._pipeline, self._refiner):
                if pipeline is not None:
                    pipeline.set_embeddings(found)
            self._embeddings = tuple(texts)

    def _save(self, picture: Picture, image: Any) -> float:
        """Seconds that it took."""
        from runtimes import png

        start = time.perf_counter()
        p, refined = picture.parameters, None
        if p.refiner is not None:
            refined = self._refiner.manifest(p.width, p.height)
        with timeline.span("save"):
            names.write(picture.path, png.encode(image, p, self._manifest(picture), refined))
        return time.perf_counter() - start

    def _add(self, stage: str, seconds: float) -> None:
        self.seconds[stage] = self.seconds.get(stage, 0.0) + seconds

    def report(self) -> dict[str, Any]:
        """Pictures, seconds by stage, steps (one call of the UNet's batch each) per second and by what ran in them
        (the whole UNet, or a shallow variant of DeepCache's), peak memory in bytes."""
        denoise = self.seconds.get("denoise", 0.0)
        return {
            "images": [picture.as_dict() for picture in self.saved],
            "seconds": {stage: round(value, 4) for stage, value in self.seconds.items()},
            "steps_per_second": round(sum(self._unet_steps.values()) / denoise, 3) if denoise else None,
            "unet_steps": self._unet_steps,
            "peak_memory_bytes": peak_memory(),
        }


def _title(group: Group) -> str:
    title = f"Picture {group[0].index + 1}"
    return title + (f"-{group[-1].index + 1}" if len(group) > 1 else "")


def _same_call(a: Picture, b: Picture) -> bool:
    """Whether two pictures differ in nothing but prompt and seed."""
    blank = {"prompt": "", "seed": 0}
    return msgspec.structs.replace(a.parameters, **blank) == msgspec.structs.replace(b.parameters, **blank)


def peak_memory() -> dict[str, int]:
    """Bytes that this process held at most: ``process`` in main memory, ``cuda`` on the GPU, weights included."""
    unit = 1 if sys.platform == "darwin" else 1024
    peak = {"process": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit}
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        from runtimes import gpu_upload

        peak["cuda"] = torch.cuda.max_memory_allocated() + gpu_upload.held_bytes()
        tensorrt = sys.modules.get("runtimes.trt_engine")  # whose engines take memory by themselves
        peak["cuda"] += tensorrt.held() if tensorrt is not None else 0
    return peak
