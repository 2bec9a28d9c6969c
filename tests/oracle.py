"""Anti-memorization guidance in float64, one sample at a time, from the equations of arXiv 2404.00922.

It imports nothing of the package. Every gradient is autograd's; x_t, eps and x0_hat are [C, H, W], images in
[0, 1] are flattened to [N], sigma is larger = closer. `Look` maps x0_hat to (sigma, neighbour's row).
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

Look = Callable[[Tensor], tuple[Tensor, int]]
Eps = Callable[[Tensor], tuple[Tensor, Tensor]]


def classifier_free(eps_uncond: Tensor, eps_cond: Tensor, s0: float) -> Tensor:
    return eps_uncond + s0 * (eps_cond - eps_uncond)


def predict_x0(x_t: Tensor, eps: Tensor, alpha_bar: float) -> Tensor:
    return (x_t - math.sqrt(1 - alpha_bar) * eps) / math.sqrt(alpha_bar)


def l2(a: Tensor, b: Tensor) -> Tensor:
    return (a - b).square().mean(-1).sqrt()


def cosine(embedding: Tensor, rows: Tensor) -> tuple[Tensor, int]:
    """sigma = E(x0)·E(n0) over unit `rows` [R, D] and an un-normalised `embedding` [D]."""
    every = rows @ (embedding / embedding.norm())
    row = int(every.argmax())
    return every[row], row


def nl2(
    image: Tensor, rows: Tensor, k: int = 50, alpha: float = 0.5, held: bool = True
) -> tuple[Tensor, int]:
    """sigma = -l2(x0, n0) / (alpha·mean of l2 over the k nearest); `held`: the denominator is a constant."""
    distances = l2(image[None], rows)
    nearest = distances.argsort()[:k]
    denominator = alpha * distances[nearest].mean()
    row = int(nearest[0])
    return -distances[row] / (denominator.detach() if held else denominator), row


def scales(sigma: float, s0: float, c1: float, c2: float) -> tuple[float, float]:
    s1 = max(min(c1 * sigma, s0 - 1), 0.0)
    return s1, max(min(c2 * sigma, s0 - s1 - 1), 0.0)


def released_scales(sigma: float, t: float, s0: float) -> tuple[float, float, float]:
    """s1, s2, s3 of the authors' code for Stable Diffusion; with s0 = 7.5 its 6.5 is s0 - 1."""
    s1 = min(max(13 * sigma, 0.0), s0 - 1)
    s2 = min(max((s0 - 1 - s1) / 0.3 * sigma, 0.0), s0 - 1 - s1)
    return s1, s2, 100 * (sigma - 0.3) * math.exp((1000 - t) / 170)


def threshold(schedule: str, low: float, high: float, alpha_bar: float, t: float) -> float:
    if schedule == "parabolic":
        return low + (high - low) * alpha_bar * alpha_bar
    return high if schedule == "constant" else low + (high - low) * math.exp(-0.005 * t)


def similarity_gradient(x_t: Tensor, eps: Callable[[Tensor], Tensor], alpha_bar: float, look: Look) -> Tensor:
    """grad_{x_t} sigma of x0_hat(x_t), through `eps` as far as it depends on x_t."""
    leaf = x_t.detach().clone().requires_grad_()
    with torch.enable_grad():
        sigma, _ = look(predict_x0(leaf, eps(leaf), alpha_bar))
        return torch.autograd.grad(sigma, leaf)[0]


def guided_eps(
    x_t: Tensor,
    denoise: Eps,
    eps_of_row: Callable[[int], Tensor] | None,
    look: Look,
    alpha_bar: float,
    lambda_t: float,
    s0: float,
    c: tuple[float, float, float],
    full: bool = False,
) -> Tensor:
    """Steps 1-6 of the paper. `denoise(x_t)` gives eps_uncond, eps_cond; `full` differentiates through it."""
    eps_uncond, eps_cond = (part.detach() for part in denoise(x_t))
    eps = classifier_free(eps_uncond, eps_cond, s0)
    sigma, row = look(predict_x0(x_t, eps, alpha_bar))
    if not float(sigma) > lambda_t:
        return eps
    s1, s2 = scales(float(sigma), s0, c[0], c[1])
    inner = (lambda x: classifier_free(*denoise(x), s0)) if full else (lambda x: eps)
    gradient = similarity_gradient(x_t, inner, alpha_bar, look)
    guided = eps - s1 * (eps_cond - eps_uncond) + c[2] * math.sqrt(1 - alpha_bar) * gradient
    if eps_of_row is not None:
        guided = guided - s2 * (eps_of_row(row) - eps_uncond)
    return guided


def released_eps(
    x_t: Tensor,
    eps_uncond: Tensor,
    eps_cond: Tensor,
    eps_of_row: Callable[[int], Tensor],
    frequent: Callable[[int], bool],
    look: Look,
    alpha_bar: float,
    t: float,
    s0: float,
) -> Tensor:
    """The authors' order for Stable Diffusion: sigma, G_spe (+ G_dup), sigma again, G_sim above lambda_t."""
    eps = classifier_free(eps_uncond, eps_cond, s0)
    lambda_t = 0.3 + 0.1 * math.exp(-0.005 * t)
    found, row = look(predict_x0(x_t, eps, alpha_bar))
    s1, s2, _ = released_scales(float(found), t, s0)
    eps = eps - s1 * (eps_cond - eps_uncond)
    if float(found) > lambda_t and frequent(row):
        eps = eps - s2 * (eps_of_row(row) - eps_uncond)
    found, _ = look(predict_x0(x_t, eps, alpha_bar))
    if float(found) > lambda_t:
        s3 = released_scales(float(found), t, s0)[2]
        eps = eps + s3 * math.sqrt(1 - alpha_bar) * similarity_gradient(x_t, lambda x: eps, alpha_bar, look)
    return eps


def ddim_step(
    x_t: Tensor, eps: Tensor, noise: Tensor, alpha_bar: float, alpha_bar_previous: float, eta: float
) -> Tensor:
    """Step 7 for DDIM (Song et al. 2021, eq. 12 and 16); eta = 1 is DDPM with the posterior variance."""
    sigma = (
        eta
        * math.sqrt((1 - alpha_bar_previous) / (1 - alpha_bar))
        * math.sqrt(1 - alpha_bar / alpha_bar_previous)
    )
    towards = math.sqrt(1 - alpha_bar_previous - sigma**2) * eps
    return math.sqrt(alpha_bar_previous) * predict_x0(x_t, eps, alpha_bar) + towards + sigma * noise
