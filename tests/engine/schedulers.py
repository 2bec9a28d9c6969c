"""The schedulers that tables are tried on: name -> class, config, `set_timesteps` and `step` arguments."""

from dataclasses import dataclass, field
from typing import Any

import diffusers

BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}


@dataclass(frozen=True)
class Case:
    kind: str
    config: dict[str, Any] = field(default_factory=lambda: dict(BETAS))
    times: dict[str, Any] = field(default_factory=dict)
    step: dict[str, Any] = field(default_factory=dict)

    def make(self) -> Any:
        return getattr(diffusers, self.kind)(**self.config)


def case(kind: str, times: dict | None = None, step: dict | None = None, **config: Any) -> Case:
    return Case(kind, {**BETAS, **config}, times or {}, step or {})


MULTISTEP, SINGLESTEP = "DPMSolverMultistepScheduler", "DPMSolverSinglestepScheduler"
UNIPC, DEIS = "UniPCMultistepScheduler", "DEISMultistepScheduler"
ZERO_SNR = {
    "rescale_betas_zero_snr": True,
    "prediction_type": "v_prediction",
    "timestep_spacing": "trailing",
}
CASES = {
    "ddpm": case("DDPMScheduler", clip_sample=False),
    "ddpm-clip": case("DDPMScheduler", clip_sample=True, clip_sample_range=0.8),
    "ddpm-large": case("DDPMScheduler", clip_sample=False, variance_type="fixed_large"),
    "ddpm-sample": case("DDPMScheduler", clip_sample=True, clip_sample_range=0.5, prediction_type="sample"),
    "ddim": case("DDIMScheduler", clip_sample=False),
    "ddim-eta-clip": case("DDIMScheduler", step={"eta": 0.7}, clip_sample=True),
    "ddim-clipped-output": case("DDIMScheduler", step={"use_clipped_model_output": True}, clip_sample=True),
    "ddim-zero-snr": case("DDIMScheduler", clip_sample=False, **ZERO_SNR),
    "ddim-trailing": case("DDIMScheduler", clip_sample=False, timestep_spacing="trailing"),
    "ddim-linspace": case("DDIMScheduler", clip_sample=False, timestep_spacing="linspace"),
    "pndm": case("PNDMScheduler", skip_prk_steps=True),
    "pndm-offset": case("PNDMScheduler", skip_prk_steps=True, steps_offset=1, set_alpha_to_one=True),
    "euler": case("EulerDiscreteScheduler"),
    "euler-v-karras": case("EulerDiscreteScheduler", use_karras_sigmas=True, prediction_type="v_prediction"),
    "euler-exponential": case("EulerDiscreteScheduler", use_exponential_sigmas=True),
    "euler-zero-snr": case("EulerDiscreteScheduler", **ZERO_SNR),
    "euler-a": case("EulerAncestralDiscreteScheduler"),
    "euler-a-trailing": case("EulerAncestralDiscreteScheduler", timestep_spacing="trailing"),
    "dpm2m": case(MULTISTEP),
    "dpm2m-karras": case(MULTISTEP, use_karras_sigmas=True),
    "dpm2m-sigma-min": case(MULTISTEP, final_sigmas_type="sigma_min", solver_type="heun"),
    "dpm2m-euler-at-final": case(MULTISTEP, euler_at_final=True, use_exponential_sigmas=True),
    "dpm3m": case(MULTISTEP, solver_order=3),
    "dpm-sde": case(MULTISTEP, algorithm_type="sde-dpmsolver++"),
    "dpm-sde-karras": case(MULTISTEP, algorithm_type="sde-dpmsolver++", use_karras_sigmas=True),
    "dpm-flow": Case(MULTISTEP, FLOW),
    "single": case(SINGLESTEP, lower_order_final=True),
    "single3": case(SINGLESTEP, solver_order=3, lower_order_final=True),
    "single-sde": case(SINGLESTEP, algorithm_type="sde-dpmsolver++", lower_order_final=True),
    "unipc": case(UNIPC),
    "unipc3": case(UNIPC, solver_order=3),
    "unipc-karras": case(UNIPC, use_karras_sigmas=True, prediction_type="v_prediction"),
    "unipc-flow": Case(UNIPC, FLOW),
    "deis": case(DEIS),
    "deis3": case(DEIS, solver_order=3),
    "lms": case("LMSDiscreteScheduler"),
    "lms-karras": case("LMSDiscreteScheduler", use_karras_sigmas=True),
    "heun": case("HeunDiscreteScheduler"),
    "heun-clip-karras": case("HeunDiscreteScheduler", clip_sample=True, use_karras_sigmas=True),
    "kdpm2": case("KDPM2DiscreteScheduler"),
    "kdpm2-karras": case("KDPM2DiscreteScheduler", use_karras_sigmas=True),
    "kdpm2-a": case("KDPM2AncestralDiscreteScheduler"),
    "kdpm2-a-exponential": case("KDPM2AncestralDiscreteScheduler", use_exponential_sigmas=True),
    "lcm": case("LCMScheduler"),
    "tcd": case("TCDScheduler", step={"eta": 0.3}),
    "flow": Case("FlowMatchEulerDiscreteScheduler", {"shift": 3.0}),
    "flow-mu": Case("FlowMatchEulerDiscreteScheduler", {"use_dynamic_shifting": True}, {"mu": 0.8}),
    "flow-stochastic": Case("FlowMatchEulerDiscreteScheduler", {"stochastic_sampling": True}),
    "flow-heun": Case("FlowMatchHeunDiscreteScheduler", {"shift": 3.0}),
}
