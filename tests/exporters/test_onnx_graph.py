"""The onnx backend's graphs: whole ONNX models without weights, on which every tensor of a checkpoint acts."""

import dataclasses
import shutil
import sys
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import runtimes
from buildtool import gpu, models, plan
from buildtool.store import manifest
from buildtool.store.errors import SdxlError
from exporters import sdxl, weights
from exporters.base import ExportError, Request, StoredTensor, VariantCode
from tests.conftest import Builder
from tests.exporters import perturbation
from tests.exporters.cuda_kernels import without_kernel

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
from exporters import onnx_graph  # noqa: E402

FP32 = perturbation.REQUEST
FP16 = Request(width=64, height=64, batch=1, precision="fp16", device="cpu", target="sm90")
CUDA = {"provider": "CUDAExecutionProvider"}
FREEU = {"freeu": {"s1": 0.9, "s2": 0.2, "b1": 1.3, "b2": 1.4}}
COMPONENTS = [component.name for component in sdxl.COMPONENTS]


def ops(model: Any) -> list[str]:
    return [node.op_type for node in model.graph.node]


def load(path: Path) -> Any:
    return onnx.load(path, load_external_data=False)


@pytest.mark.slow
@pytest.mark.parametrize("component", COMPONENTS)
def test_perturbing_any_single_tensor_gives_eagers_result(
    component: str, micro_encoder_onnx_artifact: Path, micro_model: Path, tmp_path: Path
) -> None:
    from runtimes.onnx_session import OnnxSessionEngine

    shutil.copytree(micro_encoder_onnx_artifact, tmp_path / "artifact")  # hard links are copied
    described = manifest.read(micro_encoder_onnx_artifact).components[component]
    (form,) = list(described.variants.values())[-1:]
    file = tmp_path / "artifact" / described.weights
    file.chmod(0o644)
    places = weights.places(
        {n: StoredTensor(t.shape, t.dtype, t.stride, t.sources) for n, t in described.tensors.items()}
    )

    def attach(engine: Any, constants: Mapping[str, Tensor]) -> Any:
        """A new session on a weights file with these constants."""
        with open(file, "r+b") as changed:
            for name, tensor in constants.items():
                changed.seek(places[form.constants[name]][0])
                changed.write(tensor.numpy().tobytes())
        path = tmp_path / "artifact" / form.file
        return OnnxSessionEngine(path, component, form, "CPUExecutionProvider", torch.device("cpu"))

    perturbation.check(component, micro_encoder_onnx_artifact, micro_model, attach)


@pytest.mark.slow
def test_other_tools_open_the_files_of_an_artifact(micro_onnx_artifact: Path, tmp_path: Path) -> None:
    """The weights' places in the safetensors files are in the graphs: no word of ours is needed."""
    shutil.copytree(micro_onnx_artifact, tmp_path / "copy")  # the onnx package refuses hard links
    artifact = runtimes.load(micro_onnx_artifact).artifacts[0]
    for name, component in artifact.manifest.components.items():
        for variant, form in component.variants.items():
            path = micro_onnx_artifact / form.file
            onnx.checker.check_model(tmp_path / "copy" / form.file, full_check=True)
            session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
            generator = torch.Generator().manual_seed(0)
            inputs = {
                spec.name: torch.full(spec.shape, 7)
                if spec.dtype == "int64"
                else torch.randn(spec.shape, generator=generator)
                for spec in form.inputs
            }
            alone = session.run(None, {n: t.numpy() for n, t in inputs.items()})
            for got, want in zip(artifact.engine(name, variant)(**inputs), alone, strict=True):
                assert torch.allclose(got, torch.from_numpy(want), rtol=1e-4, atol=1e-5)
            described = {i.name: (tuple(i.shape), i.type) for i in session.get_inputs()}
            types = {"float32": "tensor(float)", "int64": "tensor(int64)"}
            assert described == {s.name: (s.shape, types[s.dtype]) for s in form.inputs}
            assert [(o.name, tuple(o.shape)) for o in session.get_outputs()] == [
                (s.name, s.shape) for s in form.outputs
            ]


@pytest.mark.slow
def test_graphs_hold_no_weights_and_variants_share_one_file(micro_onnx_artifact: Path) -> None:
    described = manifest.read(micro_onnx_artifact).components["unet"]
    places = []
    for form in described.variants.values():
        model = load(micro_onnx_artifact / form.file)
        stored = {t.name: t for t in model.graph.initializer if t.data_location == onnx.TensorProto.EXTERNAL}
        assert stored.keys() == described.tensors.keys()
        assert sum(len(t.raw_data) for t in model.graph.initializer if t.name not in stored) < 4096
        places.append({n: {e.key: e.value for e in t.external_data} for n, t in stored.items()})
    assert places[0] == places[1]
    assert {place["location"] for place in places[0].values()} == {"weights/unet.safetensors"}


@pytest.mark.slow
def test_a_second_checkpoint_compiles_nothing(sdxl_build: Builder, micro_onnx_artifact: Path, tmp_path: Path) -> None:
    from tests import micro

    built = sdxl_build(str(micro.write(tmp_path / "second", seed=1)), backend="onnx")
    assert not built["hit"] and built["compiled"] == []
    first, second = manifest.read(micro_onnx_artifact), manifest.read(built["path"])
    assert first.files["unet.cfg.onnx"] == second.files["unet.cfg.onnx"]
    assert first.files["weights/unet.safetensors"] != second.files["weights/unet.safetensors"]
    assert second.key.options == {"provider": "CPUExecutionProvider"}


def exported(
    component: str, micro_model: Path, request: Request, out: Path, **config: Any
) -> tuple[sdxl.Component, VariantCode, Path, dict[str, Any]]:
    """A component's first variant, with ``config`` in place of the model's: row, description, file, configs."""
    row, source = sdxl.component(component, request.options), models.resolve(str(micro_model))
    configs = {**source.configs, row.source: {**source.configs[row.source], **config}}
    code = onnx_graph.OnnxExporter()._export(row, row.variants[0], configs, request, out, component)
    (out / "weights").mkdir()
    weights.write(out / weights.location(component), code.tensors, source.tensors(row.source))
    return row, code, out / code.file, configs


@pytest.mark.slow
def test_graphs_are_clean(micro_model: Path, tmp_path: Path) -> None:
    found = ops(load(exported("unet", micro_model, FP32, tmp_path)[2]))
    assert not {"Cast", "CastLike", "Identity", "Constant", "Shape", "Range", "SplitToSequence"} & set(found)
    assert found.count("Attention") == 8 and "Softmax" not in found
    assert "GroupNormalization" not in found  # ONNX Runtime would compute its variance as E[x²] - E[x]²


@pytest.mark.slow
def test_the_same_request_gives_the_same_bytes_and_no_path_of_this_machine(micro_model: Path, tmp_path: Path) -> None:
    made = []
    for folder in (tmp_path / "a", tmp_path / "b"):
        folder.mkdir()
        made.append(exported("text_encoder", micro_model, FP32, folder)[2].read_bytes())
    assert made[0] == made[1]
    assert b".py" not in made[0]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("component", "options", "config"),
    [
        *((component, CUDA, {}) for component in COMPONENTS if component != "unet"),
        ("unet", CUDA | FREEU, {}),
        ("text_encoder_2", CUDA, {"eos_token_id": 5, "hidden_act": "gelu_new"}),
        ("unet", {}, {}),
    ],
)
@torch.no_grad()
def test_half_precision_graphs_are_valid_and_run(
    component: str, options: dict[str, Any], config: dict[str, Any], micro_model: Path, tmp_path: Path
) -> None:
    """On the CPU; for the CUDA provider, of nodes that it has kernels for, by its own table.

    fp32 sinusoids meet fp16 embeddings in the UNet, which ONNX's Concat refuses unless they are cast.
    """
    request = dataclasses.replace(FP16, options=options)
    row, code, path, configs = exported(component, micro_model, request, tmp_path, **config)
    onnx.checker.check_model(path, full_check=True)
    missing = without_kernel(load(path))
    if options:
        assert not missing
        assert "Softmax" not in ops(load(path))
    else:  # what TensorRT is given; an H100 with onnxruntime-gpu 1.30 named the same three
        assert missing == {"Sin-22(float)", "Cos-22(float)", "InstanceNormalization-22(float16)"}
    inputs = sdxl.example_inputs(row, configs, request, row.variants[0])
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    made = session.run(None, {n: t.numpy() for n, t in inputs.items()})
    exact = {n: t.float() if t.is_floating_point() else t for n, t in inputs.items()}
    tensors = models.resolve(str(micro_model)).tensors(row.source)
    wanted = row.reference(configs[row.source], tensors, "cpu")(**exact)
    for got, want, spec in zip(made, wanted, code.outputs, strict=True):
        assert str(got.dtype) == spec.dtype == "float16"
        assert float((torch.from_numpy(got).float() - want).norm() / want.norm()) < row.tolerance["fp16"]


def test_a_folded_weight_is_refused() -> None:
    big = onnx.helper.make_tensor("big", onnx.TensorProto.FLOAT, (200, 200), [0.0] * 40000)
    info = [onnx.helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, (200, 200)) for n in "xy"]
    graph = onnx.helper.make_graph([onnx.helper.make_node("Add", ["x", "big"], ["y"])], "g", info[:1], info[1:], [big])
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", onnx_graph.OPSET)])
    with pytest.raises(RuntimeError, match=r"a constant big of shape \(200, 200\)"):
        onnx_graph.clean(model)


@pytest.mark.parametrize(
    ("device", "precision", "told"),
    [("cuda:0", "bf16", "fp32 and fp16 on a GPU, not in bf16"), ("cpu", "fp16", "fp32 on a CPU, not in fp16")],
)
def test_what_is_not_built_is_told(device: str, precision: str, told: str) -> None:
    request = Request(width=64, height=64, batch=1, precision=precision, device=device, target="sm90")
    with pytest.raises(ExportError, match=told):
        onnx_graph.OnnxExporter().check_request(request)


def test_without_onnxruntime_nothing_is_begun(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(ExportError, match=r"not installed\. pip install 'sdxl-build\[onnx\]'"):
        onnx_graph.OnnxExporter().check_request(on("CPUExecutionProvider", precision="fp32", device="cpu"))


def on(provider: str, **changes: Any) -> Request:
    return dataclasses.replace(FP16, **{"device": "cuda:0", "options": {"provider": provider}, **changes})


@pytest.mark.parametrize(
    ("provider", "install"),
    [
        ("CUDAExecutionProvider", "pip install onnxruntime-gpu"),
        ("TensorrtExecutionProvider", "pip install onnxruntime-gpu tensorrt"),
        ("NvTensorRTRTXExecutionProvider", "pip install onnxruntime-trt-rtx"),
    ],
)
def test_a_provider_that_the_installed_onnxruntime_lacks_is_told_before_any_work(
    provider: str, install: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a stand-in for the onnxruntime that has only the CPU's."""
    there = types.SimpleNamespace(__version__="1.0", get_available_providers=lambda: ["CPUExecutionProvider"])
    monkeypatch.setitem(sys.modules, "onnxruntime", there)
    with pytest.raises(ExportError, match=rf"^{provider} was asked for, .* 1\.0 here has: CPUEx.*\. {install}$"):
        onnx_graph.OnnxExporter().check_request(on(provider))
    there.get_available_providers = lambda: [provider, "CPUExecutionProvider"]
    onnx_graph.OnnxExporter().check_request(on(provider))


@pytest.mark.parametrize("provider", ["cuda", "tensorrt", "nv-tensorrt-rtx"])
def test_a_provider_of_gpus_is_refused_for_a_cpu_and_the_cpus_for_a_gpu(
    provider: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(SdxlError, match=rf"--provider {provider} runs on a GPU, .*for a CPU.*--gpu auto"):
        planned("cpu", provider)
    monkeypatch.setattr(gpu, "require_present", lambda target, backend: None)  # as if it were here
    with pytest.raises(SdxlError, match=r"--provider cpu runs on a CPU, .*cuda, tensorrt, nv-tensorrt-rtx.*--gpu cpu"):
        planned("sm90", "cpu")


def test_a_provider_is_in_the_keys_and_in_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "require_present", lambda target, backend: None)  # as if it were here
    plain, cuda, rtx = (planned("sm90", name) for name in (None, "cuda", "nv-tensorrt-rtx"))
    assert cuda.key == plain.key and cuda.code_keys == plain.code_keys
    assert rtx.key.options["provider"] == "NvTensorRTRTXExecutionProvider"
    assert rtx.key.digest != planned("sm90", "tensorrt").key.digest != plain.key.digest
    assert all(rtx.code_keys[name].digest != plain.code_keys[name].digest for name in plain.code_keys)
    assert "--provider nv-tensorrt-rtx" in " ".join(rtx.command)
    assert planned("cpu", "cpu").key == planned("cpu", None).key


def planned(target: str, provider: str | None) -> plan.Plan:
    (made,) = plan.plan(plan.Spec(backend="onnx", model="tiny", gpu=target, provider=provider))
    return made
