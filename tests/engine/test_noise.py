"""A request's noise is what its pipeline would draw: in order, in dtype, whoever leaves meanwhile."""

import pytest
import torch
from diffusers.utils.torch_utils import randn_tensor

from amg.engine.loop import first_slots
from amg.engine.noise import draw, standard_normal

from . import flying

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
DRAWING = ["ddpm", "ddim-eta-clip", "euler-a", "dpm-sde", "kdpm2-a", "single-sde", "lcm", "tcd"]


def generators(kind: str) -> object:
    if kind == "one":
        return torch.Generator().manual_seed(5)
    return [torch.Generator().manual_seed(seed) for seed in (5, 6)] if kind == "list" else None


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["one", "list", "none"])
def test_a_draw_is_that_of_diffusers(kind: str, dtype: torch.dtype) -> None:
    shape, found = (2, 3, 4, 8), []
    for drawn in (randn_tensor, standard_normal):
        torch.manual_seed(3)
        generator, options = generators(kind), {"device": torch.device("cpu"), "dtype": dtype}
        found.append([drawn(shape, generator, **options) for _ in range(3)])
        assert found[-1][0].dtype == dtype
    assert all(torch.equal(ours, theirs) for theirs, ours in zip(*found, strict=True))


@pytest.mark.parametrize("name", DRAWING)
@pytest.mark.parametrize("kind", ["one", "list", "none"])
def test_over_a_run_each_request_s_draws_are_its_pipeline_s(name: str, kind: str) -> None:
    """Of both images at once, only at the steps that draw, in the dtype that the scheduler asks for."""
    job = flying.job(flying.course(name, 6), 1, 2, generator=generators(kind))
    table, slots = job.course.plan(job.config).table, flying.empty()
    assert any(table.draws)
    slots.join(first_slots(job), job.sample)
    for dtype in (torch.float32, torch.float16):
        torch.manual_seed(3)
        job.generator = generators(kind)
        ours = []
        for slots.tick in range(len(table)):
            ours.append(draw(slots, dtype))
        slots.tick = 0
        torch.manual_seed(3)
        generator = generators(kind)
        for row, found in enumerate(ours):
            wanted = torch.zeros_like(job.sample)
            if table.draws[row]:
                own = table.noise_dtype or dtype
                wanted = randn_tensor(tuple(wanted.shape), generator, torch.device("cpu"), own).float()
            assert torch.equal(found, wanted), row


def test_a_sample_that_went_back_draws_from_its_own_and_the_others_as_before() -> None:
    """Image 0 goes back after two steps: image 1's noise is still the second of each draw of two."""
    job = flying.job(flying.course("ddpm", 6), 1, 2, generator=torch.Generator().manual_seed(9))
    slots = flying.empty()
    slots.join(first_slots(job), job.sample)
    found = []
    for slots.tick in range(4):
        if slots.tick == 2:
            slots.slots[0].first = False
        found.append(draw(slots, torch.float32))
    chance = torch.Generator().manual_seed(9)
    wanted = [torch.randn(2, *flying.SHAPE, generator=chance) for _ in range(4)]
    own = torch.Generator().manual_seed(int(job.flights[0].seed or 0))
    for row in range(4):
        assert torch.equal(found[row][1], wanted[row][1])
        first = wanted[row][0] if row < 2 else torch.randn(1, *flying.SHAPE, generator=own)[0]
        assert torch.equal(found[row][0], first)


def test_requests_beside_one_another_draw_from_their_own() -> None:
    ours = [flying.job(flying.course("ddpm", 6), at, at, generator=generators("one")) for at in (1, 2)]
    slots = flying.empty()
    for job in ours:
        slots.join(first_slots(job), job.sample)
    found, at = draw(slots, torch.float32), 0
    for job in ours:
        wanted = torch.randn(job.sample.shape, generator=generators("one"))  # type: ignore[call-overload]
        assert torch.equal(found[at : at + len(job)], wanted)
        at += len(job)
