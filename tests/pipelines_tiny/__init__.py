"""Tiny random pipelines of the families people run, with text where their encoders are small, and the
arguments of a call of each."""

from __future__ import annotations

import torch

from .flux import flux, flux_cfg, flux_img2img, flux_text
from .others import auraflow, ddim, ddpm, dit, pixart, pixart_alpha_text, pixart_text, qwen, sana, zimage
from .parts import IMAGES
from .sd import lcm, sd, sd_controlnet, sd_img2img, sd_inpaint, sd_inpaint_9, sd_ip_adapter, sd_lora
from .sd3 import sd3, sd3_img2img
from .sdxl import sdxl, sdxl_controlnet, sdxl_img2img, sdxl_inpaint, sdxl_refiner

FAMILIES = {
    builder.__name__: builder
    for builder in (
        *(sd, sd_lora, sd_ip_adapter, sd_img2img, sd_inpaint, sd_inpaint_9, sd_controlnet),
        *(sdxl, sdxl_img2img, sdxl_refiner, sdxl_inpaint, sdxl_controlnet),
        *(sd3, sd3_img2img, flux, flux_cfg, flux_img2img, pixart),
        *(auraflow, sana, qwen, zimage, lcm, dit, ddpm, ddim),
    )
}
WITH_TEXT = {builder.__name__: builder for builder in (flux_text, pixart_text, pixart_alpha_text)}


def build(name, batch=2, steps=4):
    """(pipeline, arguments of a call of `batch` pictures of 16x16 in `steps` steps)."""
    torch.manual_seed(0)
    pipe, call = (FAMILIES | WITH_TEXT)[name](batch)
    pipe.set_progress_bar_config(disable=True)
    return pipe, {**call, "num_inference_steps": steps}


def cut(call, row):
    """The arguments of a call of one of its pictures."""
    rows = {
        key: value[row : row + 1] if isinstance(value, (list, torch.Tensor)) and key != IMAGES else value
        for key, value in call.items()
    }
    return {**rows, "batch_size": 1} if "batch_size" in rows else rows
