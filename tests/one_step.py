"""A batch of five at one step of the toy denoiser, through `Guide` and, row by row, through the oracle."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

import amg
from amg.config import AMGConfig
from amg.guidance.flight import Flight
from amg.guidance.predict import Conditions, predict
from amg.guidance.schedule import Prediction, Step
from amg.protection.guide import Guide, Guided
from amg.similarity import similarity_for

from . import oracle, toy

T, S0 = 400, 7.5
PICTURES = [3, 17, 40, 8, 29]
WEIGHTS = [0.12, 0.09, 0.06, 0.03, 0.01]  # from a copy to hardly alike
KINDS = ["epsilon", "v_prediction", "sample"]
C = (4.0, 3.0, 0.4)


@dataclass
class Case:
    """A batch of five at one step, its network and the outputs of plain prediction."""

    sample: Tensor
    step: Step
    conditions: Conditions
    network: toy.ToyNetwork
    flights: list[Flight]
    kind: str = "epsilon"

    def outputs(self) -> tuple[Tensor | None, Tensor]:
        prediction = Prediction(self.kind, self.step.alpha_bar)
        denoiser = toy.denoiser(self.network)
        both = predict(denoiser, self.sample, self.step.t, self.conditions)
        uncond, cond = (None if eps is None else prediction.from_eps(eps, self.sample) for eps in both)
        assert cond is not None
        return uncond, cond

    def run(self, config: AMGConfig, index: amg.Index, s0: float = S0, **more: Any) -> Guided:
        network = _as_kind(self.network, self.kind, self.step.alpha_bar)
        denoiser = replace(toy.denoiser(self.network, prediction_type=self.kind), network=network)
        guide = Guide(
            config.for_metric(index.metric), index, similarity_for(index, denoiser), denoiser, s0, **more
        )
        uncond, cond = self.outputs()
        self.network.calls.clear()
        return guide(self.step, self.sample, uncond, cond, self.conditions, self.flights)


def _as_kind(network: toy.ToyNetwork, kind: str, alpha_bar: float) -> Callable[..., Tensor]:
    def run(sample: Tensor, t: object, **conditions: Tensor) -> Tensor:
        return Prediction(kind, alpha_bar).from_eps(network(sample, t, **conditions), sample)

    return run


def make_case(
    threshold: float, guided: bool = True, kind: str = "epsilon", weights: list[float] = WEIGHTS, t: int = T
) -> Case:
    """x_t such that x0_hat is (S0·w)·picture + (1 - S0·w)·tanh(conv(x_t)) under guidance: inside [-1, 1]."""
    network, generator = toy.ToyNetwork(), torch.Generator().manual_seed(21)
    alpha_bar = network.alpha_bar(t)
    pictures = toy.training_pictures()[PICTURES].float() / 127.5 - 1
    sample = math.sqrt(alpha_bar) * pictures * 0.5 + math.sqrt(1 - alpha_bar) * torch.randn(
        pictures.shape, generator=generator
    )
    share = weights if guided else [S0 * weight for weight in weights]
    conditions = toy.conditions(PICTURES, share, guided)
    flights = [Flight.from_noise(row) for row in sample]
    return Case(
        sample, Step(4, 10, torch.tensor(t), alpha_bar, threshold), conditions, network, flights, kind
    )


def preset(**options: Any) -> AMGConfig:
    plain: dict[str, Any] = {
        "c1": C[0],
        "c2": C[1],
        "c3": C[2],
        "step_length": "constant",
        "rewind_at": (),
        "check_at": (),
        "terms_from": 0.0,
    }
    return AMGConfig.preset("main", **{**plain, **options})


def look_at(index: amg.Index) -> oracle.Look:
    """x0_hat [C, H, W] float64 -> (sigma, row), the oracle's."""
    rows = index.rows.double()

    def look(x0_hat: Tensor) -> tuple[Tensor, int]:
        image = toy.decode(x0_hat)
        if index.metric == "cosine":
            return oracle.cosine(toy.ToyEmbedder()(image[None])[0], rows)
        return oracle.nl2(image.flatten(), rows / 255)

    return look


def denoise_of(case: Case, row: int) -> oracle.Eps:
    """x_t [C, H, W] float64 -> (eps_uncond, eps_cond) of one sample; unguided, both are the output."""
    network = toy.ToyNetwork(torch.float64)
    mine = case.conditions.take(torch.tensor([row]))

    def denoise(x_t: Tensor) -> tuple[Tensor, Tensor]:
        cond = network(x_t[None], T, **mine.cond)[0]
        return cond if mine.uncond is None else network(x_t[None], T, **mine.uncond)[0], cond

    return denoise


def neighbour_of(case: Case, row: int, index: amg.Index) -> Callable[[int], Tensor]:
    network = toy.ToyNetwork(torch.float64)
    x_t = case.sample[row].double()
    return lambda found: network(x_t[None], T, **toy.encode_captions([index.captions[found]]))[0]


def similarities(case: Case, index: amg.Index) -> list[float]:
    """sigma of plain classifier-free guidance, by the oracle."""
    found = []
    for row in range(5):
        x_t = case.sample[row].double()
        eps = oracle.classifier_free(*denoise_of(case, row)(x_t), S0)
        found.append(float(look_at(index)(oracle.predict_x0(x_t, eps, case.step.alpha_bar))[0]))
    return found


def middle(case: Case, index: amg.Index, opened: int = 3) -> float:
    """A threshold that opens the gates of exactly `opened` samples."""
    ordered = sorted(similarities(case, index), reverse=True)
    assert ordered[opened - 1] - ordered[opened] > 1e-3
    return (ordered[opened - 1] + ordered[opened]) / 2


def at_threshold(case: Case, threshold: float) -> Case:
    return replace(case, step=case.step._replace(threshold=threshold))
