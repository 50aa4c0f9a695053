"""Every built-in scheduler but Euler (tests/runtimes/test_euler.py) against diffusers' class, bit for bit."""

import json
from importlib import import_module
from typing import Any

import diffusers
import pytest
import torch

from buildtool.store.errors import SdxlError
from runtimes import schedulers
from runtimes.euler import EulerDiscrete
from runtimes.schedulers.ddim import DDIM
from runtimes.schedulers.dpmpp_2m import DPMSolver2M
from runtimes.schedulers.euler_ancestral import EulerAncestral
from runtimes.schedulers.lcm import LCM
from tests.runtimes.test_euler import SDXL

CLASSES = (EulerAncestral, DPMSolver2M, DDIM, LCM)
PLAIN = {key: value for key, value in SDXL.items() if key[0] != "_"}


def pair(cls: Any, **settings: Any) -> tuple[Any, Any]:
    config = json.loads(json.dumps({**PLAIN, **settings}))
    return cls.from_config(config), getattr(diffusers, cls.name).from_config(config)


def assert_same_schedule(ours: Any, theirs: Any) -> None:
    assert torch.equal(ours.timesteps, theirs.timesteps) and ours.timesteps.dtype == theirs.timesteps.dtype
    assert float(ours.init_noise_sigma) == float(theirs.init_noise_sigma)
    assert ours.num_inference_steps == theirs.num_inference_steps
    if hasattr(theirs, "sigmas"):
        assert torch.equal(ours.sigmas, theirs.sigmas) and ours.sigmas.dtype == theirs.sigmas.dtype


def assert_same_run(ours: Any, theirs: Any, start: int = 0, dtype: torch.dtype = torch.float32, **step: Any) -> None:
    """A run from ``start`` with a model that stands in: a fixed function of its input."""
    assert_same_schedule(ours, theirs)
    noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0)).to(dtype)
    a = b = noise * ours.init_noise_sigma
    # LCM and DDIM in diffusers take a generator; DPM-Solver++ draws nothing.
    draws = not isinstance(ours, DPMSolver2M)
    seeds = [[torch.Generator().manual_seed(i) for i in (3, 4)] for _ in range(2)]
    for t in theirs.timesteps[start:]:
        model_a = torch.sin(ours.scale_model_input(a, t) + 0.1)
        model_b = torch.sin(theirs.scale_model_input(b, t) + 0.1)
        assert torch.equal(model_a, model_b)
        out_a = ours.step(model_a, t, a, **({"generator": seeds[0]} if draws else {}), **step)
        out_b = theirs.step(model_b, t, b, generator=seeds[1], **step, return_dict=False)
        a, b = out_a[0], out_b[0]
        assert a.dtype == b.dtype == dtype
        assert all(torch.equal(x, y) for x, y in zip(out_a, out_b, strict=True))
    assert torch.isfinite(a).all()


@pytest.mark.parametrize("steps", [1, 2, 7, 30])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("spacing", ["linspace", "leading", "trailing"])
@pytest.mark.parametrize("cls", CLASSES)
def test_every_spacing_and_prediction(cls: Any, spacing: str, offset: int, prediction: str, steps: int) -> None:
    ours, theirs = pair(cls, timestep_spacing=spacing, steps_offset=offset, prediction_type=prediction)
    for scheduler in (ours, theirs):
        scheduler.set_timesteps(steps)
    assert_same_run(ours, theirs)


@pytest.mark.parametrize("steps", [1, 2, 14, 15, 30])
@pytest.mark.parametrize("last", ["zero", "sigma_min"])
@pytest.mark.parametrize("solver", ["midpoint", "heun", "bh2"])
@pytest.mark.parametrize("law", [{}, {"use_karras_sigmas": True}, {"use_exponential_sigmas": True}])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_dpm_solvers_ends_and_sigma_laws(
    prediction: str, law: dict[str, bool], solver: str, last: str, steps: int
) -> None:
    if law and solver == "heun" and last == "sigma_min" and steps >= 15:
        pytest.skip("the last two noise levels are equal, and heun divides by their distance, in diffusers too")
    ours, theirs = pair(DPMSolver2M, prediction_type=prediction, solver_type=solver, final_sigmas_type=last, **law)
    for scheduler in (ours, theirs):
        scheduler.set_timesteps(steps)
    assert_same_run(ours, theirs)


@pytest.mark.parametrize(
    "settings",
    [
        {"euler_at_final": True, "final_sigmas_type": "sigma_min"},
        {"lower_order_final": False, "final_sigmas_type": "sigma_min"},
        {"beta_schedule": "squaredcos_cap_v2", "lambda_min_clipped": -5.1},
        {"beta_schedule": "squaredcos_cap_v2", "lambda_min_clipped": -5.1, "use_karras_sigmas": True},
        {"lambda_min_clipped": -1.0, "timestep_spacing": "trailing"},
    ],
)
def test_dpm_solvers_last_steps_and_clipped_ends(settings: dict[str, Any]) -> None:
    ours, theirs = pair(DPMSolver2M, **settings)
    for scheduler in (ours, theirs):
        scheduler.set_timesteps(10)
        scheduler.set_begin_index(0)  # Karras levels can share a timestep
    assert_same_run(ours, theirs)


@pytest.mark.parametrize("schedule", ["linear", "scaled_linear", "squaredcos_cap_v2"])
@pytest.mark.parametrize("rescale", [False, True])
@pytest.mark.parametrize("cls", CLASSES)
def test_every_beta_schedule(cls: Any, rescale: bool, schedule: str) -> None:
    # With no signal at all in the first latents only v-prediction is defined.
    ours, theirs = pair(
        cls,
        beta_schedule=schedule,
        rescale_betas_zero_snr=rescale,
        timestep_spacing="trailing",
        prediction_type="v_prediction",
    )
    assert torch.equal(ours.alphas_cumprod, theirs.alphas_cumprod)
    for scheduler in (ours, theirs):
        scheduler.set_timesteps(6)
    assert_same_run(ours, theirs)


@pytest.mark.parametrize("cls", [DDIM, LCM])
@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("to_one", [False, True])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_clipping_and_the_last_alpha(cls: Any, prediction: str, to_one: bool, clip: bool) -> None:
    settings = {"clip_sample": clip, "clip_sample_range": 0.7, "set_alpha_to_one": to_one}
    ours, theirs = pair(cls, prediction_type=prediction, **settings)
    for scheduler in (ours, theirs):
        scheduler.set_timesteps(8)
    assert_same_run(ours, theirs)


@pytest.mark.parametrize("eta", [0.3, 1.0])
def test_ddim_draws_the_same_noise(eta: float) -> None:
    ours, theirs = pair(DDIM)
    for scheduler in (ours, theirs):
        scheduler.set_timesteps(9)
    assert_same_run(ours, theirs, eta=eta)


@pytest.mark.parametrize("settings", [{"original_inference_steps": 100}, {"timestep_scaling": 1.0}])
def test_lcm_settings(settings: dict[str, Any]) -> None:
    ours, theirs = pair(LCM, **settings)
    for scheduler in (ours, theirs):
        scheduler.set_timesteps(4)
    assert_same_run(ours, theirs)


@pytest.mark.parametrize("cls", [DPMSolver2M, LCM])
def test_custom_timesteps(cls: Any) -> None:
    ours, theirs = pair(cls)
    for scheduler in (ours, theirs):
        scheduler.set_timesteps(timesteps=[999, 759, 499, 259])
    assert_same_run(ours, theirs)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("cls", [EulerAncestral, DPMSolver2M, DDIM])
def test_half_precision_latents(cls: Any, dtype: torch.dtype) -> None:
    ours, theirs = pair(cls)
    for scheduler in (ours, theirs):
        scheduler.set_timesteps(12)
    assert_same_run(ours, theirs, dtype=dtype)


@pytest.mark.parametrize("cls", CLASSES)
def test_the_run_can_start_anywhere_and_noise_is_added_for_it(cls: Any) -> None:
    clean, noise = torch.randn(2, 2, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    for begin in (None, 3):
        ours, theirs = pair(cls)
        for scheduler in (ours, theirs):
            scheduler.set_timesteps(10)
            if begin is not None and hasattr(theirs, "set_begin_index"):
                scheduler.set_begin_index(begin)
        t = theirs.timesteps[3:4].repeat(2)
        assert torch.equal(ours.add_noise(clean, noise, t), theirs.add_noise(clean, noise, t))
        assert_same_run(ours, theirs, start=3)


@pytest.mark.parametrize("cls", CLASSES)
def test_a_second_run_is_the_first(cls: Any) -> None:
    ours, theirs = pair(cls)
    for _ in range(2):
        for scheduler in (ours, theirs):
            scheduler.set_timesteps(5)
        assert_same_run(ours, theirs)


@pytest.mark.parametrize("cls", [DPMSolver2M, DDIM])
def test_a_step_reads_nothing_back_from_the_device(cls: Any) -> None:
    """On the meta device, any read of a tensor's value raises; what draws noise draws on the CPU."""
    ours, _ = pair(cls)
    ours.set_timesteps(4, device="meta")
    ours.set_begin_index(0)
    x = torch.empty(1, 4, 8, 8, dtype=torch.float16, device="meta")
    for t in ours.timesteps:
        x = ours.step(ours.scale_model_input(x, t), t, x)[0]
    assert x.device.type == "meta" and x.dtype == torch.float16


@pytest.mark.parametrize("cls", [EulerAncestral, LCM])
def test_a_step_that_draws_reads_nothing_back_either(cls: Any) -> None:
    ours, _ = pair(cls)
    ours.set_timesteps(4, device="meta")
    ours.set_begin_index(0)
    x = torch.empty(1, 4, 8, 8, dtype=torch.float16, device="meta")
    for t in ours.timesteps:
        x = ours.step(ours.scale_model_input(x, t), t, x, generator=torch.Generator())[0]
    assert x.device.type == "meta"


@pytest.mark.parametrize(
    ("cls", "settings", "named"),
    [
        (DPMSolver2M, {"algorithm_type": "sde-dpmsolver++"}, "algorithm_type"),
        (DPMSolver2M, {"solver_order": 3}, "solver_order"),
        (DPMSolver2M, {"use_lu_lambdas": True}, "use_lu_lambdas"),
        (DPMSolver2M, {"variance_type": "learned"}, "variance_type"),
        (DPMSolver2M, {"use_karras_sigmas": True, "use_exponential_sigmas": True}, "use_exponential_sigmas"),
        (DDIM, {"thresholding": True}, "thresholding"),
        (LCM, {"thresholding": True}, "thresholding"),
        (EulerAncestral, {"prediction_type": "sample"}, "prediction_type"),
        (EulerAncestral, {"_class_name": "DDIMScheduler"}, "DDIMScheduler"),
        (DDIM, {"never_heard_of": 1}, "never_heard_of"),
    ],
)
def test_what_is_not_served_is_refused_by_name(cls: Any, settings: dict[str, Any], named: str) -> None:
    with pytest.raises(SdxlError, match=named) as caught:
        cls.from_config({**PLAIN, **settings})
    assert "Pipeline(..., scheduler=...)" in caught.value.hint and "\n" not in str(caught.value)


@pytest.mark.parametrize(("cls", "steps"), [(DDIM, 1001), (LCM, 51), (LCM, 1001)])
def test_too_many_steps_are_one_line(cls: Any, steps: int) -> None:
    ours, theirs = pair(cls)
    with pytest.raises(ValueError):
        theirs.set_timesteps(steps)
    with pytest.raises(SdxlError, match=f"{steps} steps"):
        ours.set_timesteps(steps)


@pytest.mark.parametrize("name", schedulers.SCHEDULERS)
def test_a_named_scheduler_is_diffusers_class_with_the_models_settings(name: str) -> None:
    row = schedulers.SCHEDULERS[name]
    module, _, cls = row.place.partition(":")
    ours = schedulers.make(SDXL, name)
    assert type(ours) is getattr(import_module(module), cls)
    theirs = getattr(diffusers, row.diffusers).from_config(PLAIN, **row.settings)
    for scheduler in (ours, theirs):
        scheduler.set_timesteps(8)
    assert_same_run(ours, theirs) if name not in ("euler", "euler-trailing") else assert_same_schedule(ours, theirs)


@pytest.mark.parametrize("name", schedulers.SCHEDULERS)
def test_the_models_own_scheduler_is_used_and_named(name: str) -> None:
    row = schedulers.SCHEDULERS[name]
    config = {**SDXL, "_class_name": row.diffusers, **row.settings}
    assert schedulers.name_of(config) == name
    own, named = schedulers.make(config), schedulers.make(config, name)
    assert type(own) is type(named) and own.config == named.config


def test_diffusers_saved_configurations_are_read() -> None:
    """As save_config writes them, with every default spelled out."""
    for row in schedulers.SCHEDULERS.values():
        cls = getattr(diffusers, row.diffusers)
        saved = json.loads(cls.from_config(PLAIN, **row.settings).to_json_string())
        assert schedulers.make(saved).config.timestep_spacing == saved["timestep_spacing"]


def test_a_class_that_is_not_built_in_is_refused_with_what_there_is() -> None:
    config = {**SDXL, "_class_name": "UniPCMultistepScheduler", "solver_type": "bh2", "predict_x0": True}
    for ask in (schedulers.make, schedulers.name_of):
        with pytest.raises(SdxlError, match="UniPCMultistepScheduler") as caught:
            ask(config)
        assert all(name in caught.value.hint for name in schedulers.SCHEDULERS)
    assert isinstance(schedulers.make(config, "euler"), EulerDiscrete)
    with pytest.raises(SdxlError, match="no scheduler 'heun'") as caught:
        schedulers.make(SDXL, "heun")
    assert "dpmpp-2m" in caught.value.hint
