import itertools
import json

import numpy as np
import pytest
import torch
from diffusers import EulerDiscreteScheduler

from buildtool.store.errors import SdxlError
from runtimes.euler import EulerDiscrete
from runtimes.noise import randn

SDXL = {
    "_class_name": "EulerDiscreteScheduler",
    "_diffusers_version": "0.19.0.dev0",
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "clip_sample": False,
    "interpolation_type": "linear",
    "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
    "sample_max_value": 1.0,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "timestep_spacing": "leading",
    "trained_betas": None,
    "use_karras_sigmas": False,
}


def pair(**settings):
    config = {**SDXL, **settings}
    return EulerDiscrete.from_config(json.loads(json.dumps(config))), EulerDiscreteScheduler.from_config(config)


def assert_same_schedule(ours, theirs):
    assert torch.equal(ours.timesteps, theirs.timesteps) and ours.timesteps.dtype == theirs.timesteps.dtype
    assert torch.equal(ours.sigmas, theirs.sigmas) and ours.sigmas.dtype == theirs.sigmas.dtype
    assert torch.equal(ours.init_noise_sigma, torch.as_tensor(theirs.init_noise_sigma))


def assert_same_run(ours, theirs, dtype=torch.float32, **step):
    """A whole run with a model that stands in: a fixed function of its input."""
    assert_same_schedule(ours, theirs)
    noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0), dtype=dtype)
    a = b = noise * ours.init_noise_sigma
    seeds = [torch.Generator().manual_seed(3) for _ in range(2)]
    for t in theirs.timesteps:
        model_a = torch.sin(ours.scale_model_input(a, t) + 0.1)
        model_b = torch.sin(theirs.scale_model_input(b, t) + 0.1)
        assert torch.equal(model_a, model_b)
        out_a = ours.step(model_a, t, a, generator=seeds[0], **step)
        out_b = theirs.step(model_b, t, b, generator=seeds[1], **step)
        a, b = out_a[0], out_b.prev_sample
        assert a.dtype == b.dtype == dtype
        assert torch.equal(out_a.pred_original_sample, out_b.pred_original_sample)
        assert torch.equal(a, b)
    assert ours.step_index == theirs.step_index
    assert torch.isfinite(a).all()


@pytest.mark.parametrize("steps", [1, 2, 7, 30])
@pytest.mark.parametrize("sigmas", [{}, {"use_karras_sigmas": True}, {"use_exponential_sigmas": True}])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("spacing", ["linspace", "leading", "trailing"])
def test_every_spacing_prediction_and_sigma_law(spacing, prediction, sigmas, steps):
    ours, theirs = pair(timestep_spacing=spacing, prediction_type=prediction, **sigmas)
    assert_same_schedule(ours, theirs)  # also before set_timesteps
    ours.set_timesteps(steps)
    theirs.set_timesteps(steps)
    assert_same_run(ours, theirs)


@pytest.mark.parametrize(
    ("schedule", "rescale", "last", "interpolation"),
    list(
        itertools.product(
            ["linear", "scaled_linear", "squaredcos_cap_v2"],
            [False, True],
            ["zero", "sigma_min"],
            ["linear", "log_linear"],
        )
    ),
)
@pytest.mark.parametrize("karras", [False, True])
def test_every_beta_schedule_end_and_interpolation(schedule, rescale, last, interpolation, karras):
    ours, theirs = pair(
        beta_schedule=schedule,
        rescale_betas_zero_snr=rescale,
        final_sigmas_type=last,
        interpolation_type=interpolation,
        use_karras_sigmas=karras,
        timestep_spacing="trailing",
    )
    assert torch.equal(ours.alphas_cumprod, theirs.alphas_cumprod)
    ours.set_timesteps(9)
    theirs.set_timesteps(9)
    assert_same_run(ours, theirs)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("extra", [{}, {"use_karras_sigmas": True}, {"sigma_min": 0.002, "sigma_max": 700.0}])
def test_continuous_timesteps_and_own_sigma_range(prediction, extra):
    ours, theirs = pair(timestep_type="continuous", prediction_type=prediction, **extra)
    assert_same_schedule(ours, theirs)
    ours.set_timesteps(12)
    theirs.set_timesteps(12)
    assert_same_run(ours, theirs)


@pytest.mark.parametrize("law", ["use_karras_sigmas", "use_exponential_sigmas"])
def test_a_configured_sigma_range(law):
    ours, theirs = pair(sigma_min=0.03, sigma_max=80.0, **{law: True})
    for scheduler in (ours, theirs):
        scheduler.set_timesteps(12)
        scheduler.set_begin_index(0)  # sigmas beyond the trained ones share a timestep
    assert_same_run(ours, theirs)


def test_every_number_of_steps():
    for spacing in ("linspace", "leading", "trailing"):
        ours, theirs = pair(timestep_spacing=spacing)
        for steps in [*range(1, 60), 100, 333, 999, 1000]:
            ours.set_timesteps(steps)
            theirs.set_timesteps(steps)
            assert_same_schedule(ours, theirs)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_custom_sigmas(prediction):
    ours, theirs = pair(prediction_type=prediction)
    sigmas = [14.615, 6.315, 3.771, 2.181, 1.342, 0.862, 0.555, 0.380, 0.234, 0.113, 0.0]
    ours.set_timesteps(sigmas=sigmas)
    theirs.set_timesteps(sigmas=sigmas)
    assert ours.num_inference_steps == theirs.num_inference_steps == 10
    assert_same_run(ours, theirs)


@pytest.mark.parametrize("interpolation", ["linear", "log_linear"])
def test_custom_timesteps(interpolation):
    ours, theirs = pair(interpolation_type=interpolation)
    timesteps = [999, 845, 730, 587, 443, 310, 193, 116, 53, 13]
    ours.set_timesteps(timesteps=timesteps)
    theirs.set_timesteps(timesteps=timesteps)
    assert_same_run(ours, theirs)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_half_precision_latents(prediction, dtype):
    ours, theirs = pair(prediction_type=prediction)
    ours.set_timesteps(20)
    theirs.set_timesteps(20)
    assert_same_run(ours, theirs, dtype=dtype)


def test_churn_draws_the_same_noise():
    ours, theirs = pair()
    ours.set_timesteps(8)
    theirs.set_timesteps(8)
    assert_same_run(ours, theirs, s_churn=2.0, s_tmin=0.5, s_tmax=10.0, s_noise=1.01)


def test_trained_betas():
    ours, theirs = pair(trained_betas=np.linspace(0.001, 0.02, 1000).tolist())
    ours.set_timesteps(5)
    theirs.set_timesteps(5)
    assert_same_run(ours, theirs)


def test_the_run_can_start_anywhere():
    ours, theirs = pair(timestep_spacing="trailing")
    for begin in (None, 3):
        for scheduler in (ours, theirs):
            scheduler.set_timesteps(10)
            if begin is not None:
                scheduler.set_begin_index(begin)
        assert ours.begin_index == theirs.begin_index == begin
        x = torch.randn(1, 4, 8, 8)
        t = theirs.timesteps[3]
        assert torch.equal(ours.scale_model_input(x, t), theirs.scale_model_input(x, t))
        assert torch.equal(ours.step(x, t, x)[0], theirs.step(x, t, x, return_dict=False)[0])
        assert ours.step_index == theirs.step_index == 4


def test_a_schedule_with_a_timestep_twice_takes_the_second_as_diffusers_does():
    ours, theirs = pair()
    for scheduler in (ours, theirs):
        scheduler.set_timesteps(timesteps=[900, 500, 500, 10])
    assert ours.index_for_timestep(500.0) == theirs.index_for_timestep(500.0) == 2
    with pytest.raises(ValueError, match="not one of"):
        ours.index_for_timestep(499.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_add_noise(dtype):
    ours, theirs = pair()
    clean, noise = torch.randn(2, 2, 4, 8, 8).to(dtype)
    for begin in (None, 4):
        for scheduler in (ours, theirs):
            scheduler.set_timesteps(10)
            if begin is not None:
                scheduler.set_begin_index(begin)
        t = theirs.timesteps[[2, 5]]
        assert torch.equal(ours.add_noise(clean, noise, t), theirs.add_noise(clean, noise, t))
    for scheduler in (ours, theirs):
        scheduler.step(clean, t[0], clean)
    assert torch.equal(ours.add_noise(clean, noise, t), theirs.add_noise(clean, noise, t))


def test_a_step_reads_nothing_back_from_the_device():
    """On the meta device, any read of a tensor's value raises."""
    ours, _ = pair(prediction_type="v_prediction")
    ours.set_timesteps(4, device="meta")
    ours.set_begin_index(0)
    x = torch.empty(1, 4, 8, 8, dtype=torch.float16, device="meta")
    for t in ours.timesteps:
        x = ours.step(ours.scale_model_input(x, t), t, x)[0]
    assert x.device.type == "meta" and x.dtype == torch.float16


def test_integers_are_no_timesteps():
    ours, theirs = pair()
    ours.set_timesteps(4)
    theirs.set_timesteps(4)
    x = torch.randn(1, 4, 8, 8)
    for wrong in (0, torch.tensor(0)):
        for scheduler in (ours, theirs):
            with pytest.raises(ValueError):
                scheduler.step(x, wrong, x)


def test_exactly_one_way_to_set_the_schedule():
    ours, _ = pair()
    for wrong in ({}, {"num_inference_steps": 3, "sigmas": [1.0, 0.0]}, {"timesteps": [1], "sigmas": [1.0, 0.0]}):
        with pytest.raises(ValueError, match="exactly one"):
            ours.set_timesteps(**wrong)


@pytest.mark.parametrize(
    "settings",
    [
        {"use_karras_sigmas": True},
        {"use_exponential_sigmas": True},
        {"timestep_type": "continuous", "prediction_type": "v_prediction"},
    ],
)
def test_custom_timesteps_are_refused_where_sigmas_make_them(settings):
    ours, theirs = pair(**settings)
    with pytest.raises(ValueError):
        theirs.set_timesteps(timesteps=[900, 100])
    with pytest.raises(SdxlError, match="custom timesteps"):
        ours.set_timesteps(timesteps=[900, 100])


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"_class_name": "EulerAncestralDiscreteScheduler"}, "EulerAncestralDiscreteScheduler"),
        ({"use_beta_sigmas": True}, "use_beta_sigmas"),
        ({"use_flow_sigmas": True}, "use_flow_sigmas"),
        ({"prediction_type": "flow_prediction"}, "prediction_type"),
        ({"timestep_spacing": "random"}, "timestep_spacing"),
        ({"beta_schedule": "exp"}, "beta_schedule"),
        ({"steps_offset": "1"}, "steps_offset"),
        ({"never_heard_of": 1}, "never_heard_of"),
        ({"use_karras_sigmas": True, "use_exponential_sigmas": True}, "use_exponential_sigmas"),
    ],
)
def test_what_is_not_served_is_refused_by_name(settings, named):
    with pytest.raises(SdxlError, match=named) as caught:
        EulerDiscrete.from_config({**SDXL, **settings})
    assert "Pipeline(..., scheduler=...)" in caught.value.hint
    assert "\n" not in str(caught.value)


def test_overrides_and_what_a_pipeline_reads():
    ours = EulerDiscrete.from_config(SDXL, timestep_spacing="trailing")
    assert ours.config.timestep_spacing == "trailing"
    assert len(ours) == ours.config.num_train_timesteps == 1000 and ours.order == 1
    assert ours.step_index is None and ours.begin_index is None


def test_noise_is_drawn_as_diffusers_draws_it():
    from diffusers.utils.torch_utils import randn_tensor

    def seeded(*seeds):
        return [torch.Generator().manual_seed(s) for s in seeds]

    for generators in (seeded(1), seeded(1, 2), seeded(1)[0]):
        again = seeded(*[g.initial_seed() for g in generators]) if isinstance(generators, list) else seeded(1)[0]
        shape = (2, 4, 8, 8)
        assert torch.equal(randn(shape, generators, "cpu", torch.float32), randn_tensor(shape, generator=again))
    with pytest.raises(ValueError, match="3 generators"):
        randn((2, 1), seeded(1, 2, 3), "cpu", torch.float32)
