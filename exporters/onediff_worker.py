"""OneDiff at work, in an interpreter of its own: ``python exporters/onediff_worker.py versions|compile|serve``.

OneDiff's compilers want a torch that the rest of the project is too new for, so this one file runs where they are
installed: Python 3.8 or newer, the standard library, torch, diffusers, transformers, and nothing of ours. ``compile``
makes one variant's file, ``serve`` loads such files and answers calls (docs/onediff.md has the protocol).

What is compiled are diffusers' and transformers' own modules, which OneDiff knows by their classes.
"""

from __future__ import annotations  # Python 3.8 reads this file too

import contextlib
import importlib.metadata
import importlib.util
import json
import os
import re
import struct
import sys
import tempfile
import time
import traceback
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

PACKAGES = ("torch", "triton", "onediff", "nexfort", "oneflow", "diffusers", "transformers")
CODE = "code.json"
CACHES = "caches"
GRAPH = "graph"
EAGER = ("text_encoder", "text_encoder_2")
"""What stays eager: nexfort's graph cache can't hold CLIP's graphs, and a prompt is encoded once."""
GENERATED = (".py", ".cpp", ".so", ".ptx", ".cubin", "entry")
"""How the names of files end that only a compiler writes into the caches."""
TRITON_GROUP = "__grp__"
"""How the names of Triton's lists of a kernel's files begin. Triton 3.0's hold absolute paths."""


class Refused(Exception):
    """What the user can mend: a line, and in the second argument what to do."""


# What is installed


def versions() -> dict[str, str]:
    """What this interpreter has, from metadata: neither torch nor OneDiff is imported."""
    found = {"python": ".".join(map(str, sys.version_info[:3])), "system": sys.platform}
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    # torch's own file has what its metadata lacks: +cu121.
    torch = re.search(r"^__version__ = '([^']+)'", _source("torch", "version.py"), flags=re.MULTILINE)
    if torch:
        found["torch"] = torch.group(1)
    # nexfort refuses every torch but the one that it was compiled with.
    wanted = re.search(r"torch_version == '([^']+)'", _source("nexfort", "check_compiled_env_meta.py"))
    if wanted:
        found["nexfort_wants_torch"] = wanted.group(1)
    return found


def _source(package: str, name: str) -> str:
    spec = importlib.util.find_spec(package)
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        with contextlib.suppress(OSError):
            return (Path(folder) / name).read_text(encoding="utf-8")
    return ""


# Modules


def build(code: dict[str, Any]) -> Any:
    """A component's module, on the meta device."""
    import torch

    component, config = code["component"], dict(code["config"])
    name = config.pop("_class_name", "")
    with torch.device("meta"):
        if component in ("text_encoder", "text_encoder_2"):
            import transformers

            cls = "CLIPTextModelWithProjection" if component == "text_encoder_2" else "CLIPTextModel"
            config.pop("model_type", None)
            module = getattr(transformers, cls)(transformers.CLIPTextConfig(**config))
        else:
            import diffusers

            module = getattr(diffusers, name).from_config(config)
    if component == "vae_decoder":
        module.encoder = module.quant_conv = None
    return module


def compiled(code: dict[str, Any], module: Any, compile: Callable[[Any], Any]) -> Callable[[dict[str, Any]], Any]:
    """The function from inputs by name to outputs that calls ``module``, with its heart compiled by ``compile``."""
    component = code["component"]
    if component == "vae_decoder":
        module.decoder = compile(module.decoder)

        def decode(inputs: dict[str, Any]) -> Any:
            return (module.decode(inputs["latents"], return_dict=False)[0],)

        return decode
    if component == "unet":
        heart = compile(module)

        def denoise(inputs: dict[str, Any]) -> Any:
            conditions = {"text_embeds": inputs["text_embeds"], "time_ids": inputs["time_ids"]}
            return (
                heart(
                    inputs["sample"],
                    inputs["timestep"],
                    inputs["encoder_hidden_states"],
                    added_cond_kwargs=conditions,
                    return_dict=False,
                )[0],
            )

        return denoise

    def encode(inputs: dict[str, Any]) -> Any:
        out = module(inputs["input_ids"], output_hidden_states=True, return_dict=True)
        hidden = out.hidden_states[-2]
        return (hidden, out.text_embeds) if component == "text_encoder_2" else (hidden,)

    return encode


def fill_buffers(module: Any, device: str) -> None:
    """transformers' one buffer that no checkpoint has: 0, 1, 2, …"""
    import torch

    for name, buffer in list(module.named_buffers()):
        parent, _, leaf = name.rpartition(".")
        if leaf != "position_ids":
            raise RuntimeError("the model has an unknown buffer " + name)
        module.get_submodule(parent)._buffers[leaf] = torch.arange(buffer.shape[-1], device=device)[None]


def fill_with_noise(module: Any, device: str, dtype: Any) -> Any:
    """Weights of no meaning: compiled code must hold nothing of one checkpoint."""
    import torch

    torch.nn.Module.to(module, dtype=dtype)
    module.to_empty(device=device)
    if torch.device(device).type == "cuda":
        torch.nn.Module.to(module, memory_format=torch.channels_last)  # type: ignore[call-overload]
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(std=0.02)
    fill_buffers(module, device)
    return module.eval().requires_grad_(False)


def example(specs: list[dict[str, Any]], device: str) -> dict[str, Any]:
    """Inputs to compile with, of the shapes that a run has."""
    import torch

    made = {}
    for spec in specs:
        dtype = getattr(torch, spec["dtype"])
        if dtype.is_floating_point:
            made[spec["name"]] = torch.randn(spec["shape"], device=device).to(dtype)
        else:
            made[spec["name"]] = torch.zeros(spec["shape"], dtype=dtype, device=device)
    return made


# The two compilers


def prepare(compiler: str, device: str, caches: str) -> Any:
    """What has to be set before torch is imported. ``caches``: the one folder that everything compiled goes to."""
    os.environ.update(
        TORCHINDUCTOR_CACHE_DIR=caches,
        TRITON_CACHE_DIR=os.path.join(caches, "triton"),
        TORCHINDUCTOR_FX_GRAPH_CACHE="1",
        NEXFORT_GRAPH_CACHE="1",
    )
    # To keep what tunes nexfort's own Triton kernels takes a licence: its authors tell others to set this.
    os.environ.setdefault("NEXFORT_ENABLE_TRITON_AUTOTUNE_CACHE", "0")
    import torch

    if device.startswith("cuda") and not torch.cuda.is_available():
        raise Refused(
            f"torch {torch.__version__} of {sys.executable} sees no GPU.",
            "Is its CUDA one that the driver knows? See: sdxl-build doctor",
        )
    if device.startswith("cuda"):
        torch.cuda.set_device(device)
    if compiler == "nexfort":
        import torch._dynamo

        # cfg and nocfg share a process, and a second shape would be compiled for all shapes, which no cache has.
        torch._dynamo.config.automatic_dynamic_shapes = False
        torch._dynamo.config.assume_static_by_default = True
    return torch


def compile_function(code: dict[str, Any]) -> Callable[[Any], Any]:
    """``module -> compiled module`` of the compiler that the code names."""
    from onediff import infer_compiler

    if code["compiler"] == "nexfort":
        options = {"mode": code["mode"], "dynamic": False}
        return lambda module: infer_compiler.compile(module, backend="nexfort", options=options)
    return lambda module: infer_compiler.oneflow_compile(module)


def files_below(folder: str) -> set[str]:
    return {str(path.relative_to(folder)) for path in Path(folder).rglob("*") if path.is_file()}


def inductor_misses() -> int:
    import torch._dynamo.utils

    counted = torch._dynamo.utils.counters["inductor"]
    return sum(counted[name] for name in ("fxgraph_cache_miss", "fxgraph_cache_bypass"))


def compile_variant(job: dict[str, Any]) -> dict[str, Any]:
    """Compiles one variant into ``job["file"]``: a zip of its description and the caches, or of its graph."""
    code, device = job["code"], job["device"]
    with tempfile.TemporaryDirectory() as caches:
        torch = prepare(code["compiler"], device, caches)
        module = fill_with_noise(build(code), device, getattr(torch, code["dtype"]))
        weights = dict(module.named_parameters())  # before OneDiff wraps it, which renames them
        hearts: list[Any] = []

        def compile(heart: Any) -> Any:
            hearts.append(compile_function(code)(heart))
            return hearts[-1]

        call = compiled(code, module, compile)
        with torch.no_grad():
            outputs = call(example(code["inputs"], device))
        described = {
            "parameters": [_spec(name, weight) for name, weight in weights.items()],
            "outputs": [_spec(name, out.contiguous()) for name, out in zip(code["outputs"], outputs)],
        }
        with zipfile.ZipFile(job["file"], "w", zipfile.ZIP_DEFLATED) as packed:
            packed.writestr(zipfile.ZipInfo(CODE), json.dumps(code, sort_keys=True))
            if code["component"] in EAGER:
                pass
            elif code["compiler"] == "oneflow":
                graph = os.path.join(caches, GRAPH)
                hearts[0].save_graph(graph)
                packed.write(graph, GRAPH)
            else:
                _pack(packed, caches)
    return described


def _pack(packed: zipfile.ZipFile, caches: str) -> None:
    kept = [name for name in sorted(files_below(caches)) if not name.endswith(".lock")]
    if not any(name.endswith(GENERATED) for name in kept):
        raise Refused("The compiler left nothing in its caches, so there is nothing to keep.", "")
    for name in kept:
        packed.writestr(zipfile.ZipInfo(CACHES + "/" + name), (Path(caches) / name).read_bytes(), zipfile.ZIP_DEFLATED)


def _spec(name: str, tensor: Any) -> dict[str, Any]:
    return {
        "name": name,
        "shape": list(tensor.shape),
        "dtype": str(tensor.dtype).replace("torch.", ""),
        "stride": list(tensor.stride()),
    }


# Serving


class Server:
    """Loaded variants of one or several artifacts on one device."""

    def __init__(self, device: str, caches: str) -> None:
        self.device, self.caches = device, caches
        self.torch: Any = None
        self.calls: dict[str, Any] = {}
        self.files: dict[str, Any] = {}

    def load(self, asked: dict[str, Any]) -> dict[str, Any]:
        """Loads a variant and calls it once. Says what had to be compiled for it, which should be nothing."""
        began = time.time()
        with zipfile.ZipFile(asked["file"]) as packed:
            code = json.loads(packed.read(CODE))
            for name in packed.namelist():
                if name.startswith(CACHES + "/") and not os.path.exists(
                    os.path.join(self.caches, name[len(CACHES) + 1 :])
                ):
                    _unpack(packed, name, os.path.join(self.caches, name[len(CACHES) + 1 :]))
            graph = os.path.join(self.caches, asked["name"] + ".graph")
            if GRAPH in packed.namelist():
                _unpack(packed, GRAPH, graph)
        torch = self.torch = self.torch or prepare(code["compiler"], self.device, self.caches)
        module = build(code)
        self._fill(module, asked["weights"], asked["tensors"])
        before, misses = files_below(self.caches), inductor_misses()
        hearts: list[Any] = []

        def compile(heart: Any) -> Any:
            hearts.append(compile_function(code)(heart))
            return hearts[-1]

        call = compiled(code, module, compile)
        if code["compiler"] == "oneflow" and hearts:
            hearts[0].load_graph(graph, run_warmup=True)
        memory = torch.from_file(asked["memory"], shared=True, size=asked["bytes"], dtype=torch.uint8)
        views = [{s["name"]: _view(torch, memory, s) for s in asked[kind]} for kind in ("inputs", "outputs")]
        with torch.no_grad():
            call(example(asked["inputs"], self.device))
        self.calls[asked["name"]] = (call, views[0], list(views[1].values()))
        made = [n for n in sorted(files_below(self.caches) - before) if n.endswith(GENERATED)]
        return {"compiled": made, "misses": inductor_misses() - misses, "seconds": time.time() - began}

    def call(self, asked: dict[str, Any]) -> dict[str, Any]:
        """Reads the inputs from the shared memory, and leaves the outputs there."""
        call, inputs, outputs = self.calls[asked["name"]]
        with self.torch.no_grad():
            # A copy on the CPU too: the caller may write its next inputs while a lazy library still reads these.
            made = call({name: view.to(self.device, copy=True) for name, view in inputs.items()})
            for view, out in zip(outputs, made):
                view.copy_(out)  # from a GPU it returns when the copy is done
        return {}

    def _fill(self, module: Any, path: str, tensors: list[dict[str, Any]]) -> None:
        """Gives the module its weights: views of the file, which every variant of the component shares."""
        if path not in self.files:
            self.files[path] = _read(self.torch, path, tensors, self.device)
        module.load_state_dict(self.files[path], strict=True, assign=True)
        fill_buffers(module, self.device)
        module.eval().requires_grad_(False)


def _unpack(packed: zipfile.ZipFile, name: str, path: str) -> None:
    folder, data = os.path.dirname(path), packed.read(name)
    os.makedirs(folder, exist_ok=True)
    if os.path.basename(path).startswith(TRITON_GROUP):
        data = json.dumps(
            {"child_paths": {n: os.path.join(folder, n) for n in json.loads(data)["child_paths"]}}
        ).encode()
    with open(path, "wb") as file:
        file.write(data)


def _read(torch: Any, path: str, tensors: list[dict[str, Any]], device: str) -> dict[str, Any]:
    size = os.path.getsize(path)
    with open(path, "rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(length).decode())
    data = torch.from_file(path, shared=False, size=size, dtype=torch.uint8)[8 + length :].to(device)
    made = {}
    for spec in tensors:
        dtype = getattr(torch, spec["dtype"])
        begin, end = header[spec["name"]]["data_offsets"]
        flat = data[begin:end].view(dtype)
        made[spec["name"]] = flat.as_strided(spec["shape"], spec["stride"])
    return made


def _view(torch: Any, memory: Any, spec: dict[str, Any]) -> Any:
    dtype = getattr(torch, spec["dtype"])
    flat = memory[spec["offset"] : spec["offset"] + spec["bytes"]].view(dtype)
    return flat.as_strided(spec["shape"], spec["stride"])


def serve(device: str, caches: str) -> None:
    """Answers messages on stdin until it closes: a length (4 bytes, little-endian), then that many bytes of JSON."""
    server = Server(device, caches)
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # libraries talk on stdout
    while True:
        head = sys.stdin.buffer.read(4)
        if len(head) < 4:
            return
        asked = json.loads(sys.stdin.buffer.read(struct.unpack("<I", head)[0]).decode())
        try:
            answer = {"load": server.load, "call": server.call}[asked["do"]](asked)
        except Exception as error:
            traceback.print_exc()
            answer = refusal(error)
        data = json.dumps(answer).encode()
        answers.write(struct.pack("<I", len(data)) + data)
        answers.flush()


def refusal(error: Exception) -> dict[str, Any]:
    if isinstance(error, Refused):
        return {"error": error.args[0], "hint": error.args[1]}
    lines = [line for line in str(error).splitlines() if line.strip()][:2]  # torch's first line names only the backend
    return {"error": " ".join([type(error).__name__ + ":", *lines]).rstrip("."), "hint": ""}


def main(words: list[str]) -> None:
    folder = os.path.dirname(os.path.abspath(__file__))
    sys.path[:] = [
        place for place in sys.path if os.path.abspath(place or ".") != folder
    ]  # no `import weights` of ours
    if words[0] == "versions":
        print(json.dumps(versions()))
    elif words[0] == "compile":
        job = json.loads(Path(words[1]).read_text(encoding="utf-8"))
        try:
            answer = compile_variant(job)
        except Exception as error:
            traceback.print_exc()
            answer = refusal(error)
        Path(job["result"]).write_text(json.dumps(answer), encoding="utf-8")
    else:
        serve(words[1], words[2])


if __name__ == "__main__":
    main(sys.argv[1:])
