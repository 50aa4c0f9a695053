"""The torch backend: ``torch.export`` and AOTInductor, code without weights (``.pt2``)."""

import contextlib
import importlib
import os
import platform
import shutil
import subprocess
import tempfile
import unittest.mock
import warnings
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from exporters import headers, inductor, layout
from exporters.base import Exporter, ExportError, Request, VariantCode
from exporters.sdxl import TENSORS, Component, Configs, example_inputs, spec_of

MARCH = {"avx512": "x86-64-v4", "avx2": "x86-64-v3", "sse4": "x86-64-v2"}

# Which kernel attention is compiled to, best first; the next one takes what the first can't (the VAE's heads of 512).
# On an H100 cuDNN's is a third faster than FlashAttention 2 at SDXL's shapes.
ATTENTION = {
    "sm90": (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH),
    "others": (SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH),
}

# What each compiler imports, sooner or later.
IMPORTS = (
    "torch.export._trace",
    "torch._inductor.compile_fx",
    "torch._inductor.package",
    "torch._inductor.choices",
    "torch._inductor.fx_passes.joint_graph",
    "torch._inductor.fx_passes.post_grad",
    "torch._dynamo.repro.aoti",
    "torch.utils.cpp_extension",
    "torchgen.aoti.fallback_ops",
    "sympy.combinatorics",
)
GPU_IMPORTS = (
    "torch._inductor.codegen.cpp_wrapper_gpu",
    "torch._inductor.codegen.cuda_combined_scheduling",
    "torch._inductor.kernel.conv",
    "torch._inductor.select_algorithm",
    "exporters.geglu_kernel",
    "exporters.group_norm_kernels",
)
MODELS = ("UNet2DConditionModel", "AutoencoderKL")


class TorchExporter(Exporter):
    """Compiles with AOTInductor for the GPU that is present, or for this machine's CPU level."""

    name = "torch"

    def prepare(self, device: str) -> None:
        for name in IMPORTS if device == "cpu" else (*IMPORTS, *GPU_IMPORTS):
            with contextlib.suppress(ImportError):  # parts of torch, some of which another version doesn't have
                importlib.import_module(name)
        for name in MODELS:  # which diffusers imports when they are asked for
            getattr(importlib.import_module("diffusers"), name)
        inductor.compute_keys()

    @torch.no_grad()
    def begin(self, request: Request, out: Path) -> None:
        """Has torch's C++ headers precompiled, which takes seconds that the first compilers to need them would wait."""
        inputs = {"x": torch.zeros(16, device=request.device)}
        with _gpu_settings(request, ""):
            program = torch.export.export(_Double(), (), kwargs=inputs, strict=False)
            _compile(program, out / "begin.pt2", request)

    def check_request(self, request: Request) -> None:
        if request.precision not in TENSORS:
            raise ExportError(
                f"The torch backend has no precision {request.precision!r}.", f"It has: {', '.join(TENSORS)}."
            )
        if request.device == "cpu":
            if request.precision != "fp32":
                raise ExportError(
                    f"The torch backend runs in fp32 on a CPU, not in {request.precision}.", "Use --precision fp32."
                )
            _compiler()
            return
        if not torch.cuda.is_available():
            raise ExportError(
                f"The torch backend compiles for {request.target} on a machine with that GPU, and torch "
                f"{torch.__version__} sees none here.",
                "Run it there, or use --gpu cpu.",
            )
        major, minor = torch.cuda.get_device_capability(request.device)
        if request.target != f"sm{major}{minor}":
            raise ExportError(
                f"The torch backend builds for the GPU that is present: {request.target} was asked for and "
                f"{torch.cuda.get_device_name(request.device)} is sm{major}{minor}.",
                f"Use --gpu sm{major}{minor}.",
            )
        _compiler()

    @torch.no_grad()
    def _export(
        self, component: Component, variant: str, configs: Configs, request: Request, out: Path, stem: str
    ) -> VariantCode:
        dtype = TENSORS[component.precision(configs, request)]
        graph = component.graph_of(variant, configs[component.source], request.device, dtype)
        renamed = layout.pad_small(graph.module)
        inputs = example_inputs(component, configs, request, variant)
        file = out / f"{stem}.pt2"
        with _gpu_settings(request, component.name):
            program = torch.export.export(graph.module, (), kwargs=inputs, strict=False)
            if request.device != "cpu":
                from exporters import geglu, group_norm  # where there is no Triton, torch warns of it

                inductor.join_channels_last(program.graph)
                group_norm.fuse(program.graph)
                if request.target in geglu.TARGETS:
                    geglu.fuse(program.graph)
            used = _constants(program, stem)
            results = [node.meta["val"] for node in program.graph.find_nodes(op="output")[0].args[0]]
            _compile(program, file, request)
        _slim(file)
        names = graph.outputs or component.outputs_of(variant)
        parameters = {name: p for name, p in graph.module.named_parameters() if name in used}
        return VariantCode(
            file=file.name,
            inputs=tuple(spec_of(name, tensor) for name, tensor in inputs.items()),
            outputs=tuple(spec_of(name, tensor) for name, tensor in zip(names, results, strict=True)),
            constants={name: name for name in parameters},
            tensors=layout.plan(parameters, graph.sources, renamed, graph.recipes),
        )


class _Double(nn.Module):
    """The least that there is to compile."""

    def forward(self, x: Tensor) -> Tensor:
        return x + x


@contextlib.contextmanager
def _gpu_settings(request: Request, component: str) -> Iterator[None]:
    """What torch decides by while it traces and compiles for a GPU: attention's kernels, and TF32."""
    if request.device == "cpu":
        yield
        return
    backends = ATTENTION.get(request.target, ATTENTION["others"])
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    matmul.allow_tf32 = cudnn.allow_tf32 = bool(request.options.get("tf32"))
    choices = inductor.choices() if component == "unet" else contextlib.nullcontext()
    with sdpa_kernel(list(backends), set_priority=True), choices, inductor.scratch_for_all():
        yield


def _constants(program: torch.export.ExportedProgram, name: str) -> set[str]:
    """The parameters that the graph reads, without what leads to no output: Inductor drops that too.

    Code that is shared between checkpoints must take every value that could differ from its
    inputs, so a constant that is no parameter is refused.
    """
    signature = program.graph_signature
    others = [*signature.inputs_to_buffers.values(), *signature.inputs_to_lifted_tensor_constants.values()]
    if others:
        raise RuntimeError(f"{name}: the graph holds constants that are no parameters: {others}")
    program.graph.eliminate_dead_code()
    users = {node.name for node in program.graph.nodes if node.users}
    return {fqn for node, fqn in signature.inputs_to_parameters.items() if node in users}


def _compile(program: torch.export.ExportedProgram, file: Path, request: Request) -> None:
    settings: dict[str, Any] = {
        "aot_inductor.package_constants_in_so": False,
        "cpp.dynamic_threads": True,  # else the builder's core count is in the code
        # The wrapper only calls kernels, which are optimized: optimized too, it would just build longer.
        "aot_inductor.compile_wrapper_opt_level": "O0",
    }
    try:
        with _portable(request.target), headers.kept(), inductor.quicker(), warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # torch's, about its own pytrees
            torch._inductor.aoti_compile_and_package(program, package_path=str(file), inductor_configs=settings)
    except (OSError, MemoryError):
        raise
    except Exception as error:
        raise ExportError(f"The compiler failed on {file.stem}: {_telling_line(str(error))}") from error


def _slim(file: Path) -> None:
    """Leaves in a package what is needed to run it, in place: no sources, no symbols, compressed.

    That is a tenth of its bytes, and it loads as fast: the loader unpacks it anyway. Sources are left as empty files:
    the loader of torch 2.11 finds the metadata by their names.
    """
    slim = file.with_suffix(".slim")
    with zipfile.ZipFile(file) as package, zipfile.ZipFile(slim, "w", zipfile.ZIP_DEFLATED) as kept:
        for entry in package.infolist():
            data = b"" if entry.filename.endswith(".cpp") else package.read(entry)
            if entry.filename.endswith(".so"):
                data = _without_symbols(data, file.parent)
            # A fixed date: the same code gives the same bytes.
            kept.writestr(zipfile.ZipInfo(entry.filename), data, zipfile.ZIP_DEFLATED)
    slim.replace(file)


def _without_symbols(library: bytes, folder: Path) -> bytes:
    """A shared library without the symbols that only a debugger reads; as it is, where binutils has no ``strip``."""
    strip = shutil.which("strip")
    if strip is None:
        return library
    with tempfile.NamedTemporaryFile(dir=folder, suffix=".so") as copy:
        copy.write(library)
        copy.flush()
        done = subprocess.run([strip, "--strip-unneeded", copy.name], capture_output=True)
        return Path(copy.name).read_bytes() if done.returncode == 0 else library


def _telling_line(words: str) -> str:
    """The line of a failure that says most: a full disk, the compiler's own error, or any that names one."""
    lines = [line.strip() for line in words.splitlines()]
    for sign in ("No space left on device", " error: ", "error"):
        for line in lines:
            if sign.lower() in line.lower():
                return line
    return words.strip()[:200]


@contextlib.contextmanager
def _portable(target: str) -> Iterator[None]:
    """Compiles host code for the target's instruction set instead of for this very processor.

    Inductor asks g++ for ``-march=native`` and vectorizes for the best unit it finds (AMX): such
    code dies with SIGILL on another machine of the same level.
    """
    from torch._inductor import cpp_builder, cpu_vec_isa

    level = target.removeprefix("cpu-") if target.startswith("cpu-") else "avx2"
    march = MARCH.get(level)
    if platform.machine() not in ("x86_64", "AMD64") or march is None:
        yield  # on other processors the level is in the key as Inductor finds it
        return
    plain = {"avx512": cpu_vec_isa.VecAVX512, "avx2": cpu_vec_isa.VecAVX2}.get(level)
    usable = [plain()] if plain else []
    flags = cpp_builder._get_optimization_cflags

    def portable_flags(*args: Any, **kwargs: Any) -> tuple[list[str], list[str]]:
        cflags, ldflags = flags(*args, **kwargs)
        return [f"march={march}" if flag == "march=native" else flag for flag in cflags], ldflags

    patches: list[contextlib.AbstractContextManager[object]] = [
        unittest.mock.patch.object(cpp_builder, "_get_optimization_cflags", portable_flags),
        unittest.mock.patch.object(cpu_vec_isa, "valid_vec_isa_list", lambda: usable),
    ]
    with contextlib.ExitStack() as stack:
        for patch in patches:
            stack.enter_context(patch)
        yield


def _compiler() -> str:
    """The C++ compiler that Inductor will call.

    Raises:
        ExportError: there is none.
    """
    asked = os.environ.get("CXX", "g++")
    if shutil.which(asked.partition(" ")[0]) is None:
        raise ExportError(
            f"The torch backend compiles with a C++ compiler, and {asked!r} is not on the path.",
            "Install one (apt-get install g++) or set CXX.",
        )
    return asked
