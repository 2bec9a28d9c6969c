"""A prompt with a lower magnitude: against brute force and AdamW written out, both in float64."""

import math

import pytest
import torch
from torch import Tensor

import amg
from amg.guidance import lower as lowering
from amg.guidance.flight import Flight, Lowered
from amg.guidance.lower import ITERATIONS, SHARE, TEXT, Start, attributed, later, lower, optimised, shorter
from amg.guidance.ordinary import Ordinary, despecify
from amg.guidance.predict import Conditions, Denoiser

TOKENS, WIDTH, SHAPE = 4, 5, (2, 3, 3)
PROMPT = "one two three four"
CONFIG = amg.AMGConfig.preset("main", rewind_prompt="attribution").for_metric("cosine")
UNBOUNDED = amg.AMGConfig.preset("main", max_evaluations=None).for_metric("cosine")


def embedding(text: str) -> Tensor:
    """[TOKENS, WIDTH] float32: random numbers for each of the first words."""
    rows = torch.zeros(TOKENS, WIDTH)
    for at, word in enumerate(text.split()[:TOKENS]):
        seed = sum(ord(letter) * 7**place for place, letter in enumerate(word)) + 31 * at
        rows[at] = torch.randn(WIDTH, generator=torch.Generator().manual_seed(seed))
    return rows


class Network:
    """Row by row, not linear in its embedding; notes how many rows each call had."""

    def __init__(self, dtype: torch.dtype = torch.float32):
        self.weight = torch.randn(TOKENS * WIDTH, 18, generator=torch.Generator().manual_seed(2)).to(dtype)
        self.calls: list[int] = []

    def __call__(self, sample: Tensor, t: Tensor, **conditions: Tensor) -> Tensor:
        self.calls.append(len(sample))
        said = conditions[TEXT].to(self.weight).flatten(1)
        mixed = torch.tanh(said @ self.weight / 3).view(-1, *SHAPE)
        return mixed * (1 + float(t) / 1000) + 0.1 * sample.to(self.weight)


def encode(texts: list[str]) -> dict[str, Tensor]:
    return {TEXT: torch.stack([embedding(text) for text in texts])}


def start(
    prompt: str = PROMPT, network: Network | None = None, guided: bool = True, plain: int = 60
) -> Start:
    denoiser = Denoiser(network or Network(), lambda x0: x0, encode_captions=encode)
    sample = torch.randn(1, *SHAPE, generator=torch.Generator().manual_seed(9))
    uncond = encode([""]) if guided else None
    return Start(denoiser, sample, torch.tensor(900.0), Conditions(encode([prompt]), uncond, {}), plain)


def magnitude(said: Tensor, network: Network | None = None) -> Tensor:
    """m of one embedding [TOKENS, WIDTH] in float64, by its definition."""
    network, begin = network or Network(torch.float64), start()
    cond, uncond = (
        network(begin.sample.double(), begin.t, **{TEXT: one[None].double()}) for one in (said, embedding(""))
    )
    return (cond - uncond).square().sum().sqrt()


def brute(prompt: str) -> tuple[float, list[tuple[str, float]]]:
    """The prompt's m; and what is left without the words of the largest m, one more at a time."""
    words, left = prompt.split(), []
    alone = {at: magnitude(embedding(word)).item() for at, word in enumerate(words)}
    gone = set[int]()
    while len(gone) < len(words) - 1:
        gone.add(max((at for at in alone if at not in gone), key=lambda at: alone[at]))
        text = " ".join(word for at, word in enumerate(words) if at not in gone)
        left.append((text, magnitude(embedding(text)).item()))
    return magnitude(embedding(prompt)).item(), left


@pytest.mark.parametrize("prompt", [PROMPT, "a b", "the cat the dog the cat", "x  y\tz"])
def test_attribution_is_that_of_brute_force(prompt: str) -> None:
    network = Network()
    found, (whole, left) = attributed(start(prompt, network), prompt.split()), brute(prompt)
    assert math.isclose(found.whole, whole, rel_tol=1e-5)
    assert [text for text, _ in found.texts] == [text for text, _ in left]
    assert all(math.isclose(m, b, rel_tol=1e-5) for (_, m), (_, b) in zip(found.texts, left, strict=True))
    words = len(prompt.split())
    assert sorted(network.calls) == sorted([words + 1, words - 1, 1])  # all words in one call, and all texts


def test_a_long_prompt_is_measured_in_parts_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = attributed(start(), PROMPT.split())
    monkeypatch.setattr(lowering, "TOGETHER", 2)
    network = Network()
    parts = attributed(start(network=network), PROMPT.split())
    assert max(network.calls) == 2 and sum(network.calls) == 2 * 4 + 1
    assert [text for text, _ in parts.texts] == [text for text, _ in whole.texts]
    assert [m for _, m in parts.texts] == pytest.approx([m for _, m in whole.texts], rel=1e-6)


def test_each_try_asks_for_less_and_the_least_is_the_last_resort() -> None:
    texts = (("a b c", 0.9), ("b c", 0.5), ("c", 0.3))
    first = Lowered(1.0, texts=texts)
    assert SHARE == 0.5
    assert shorter(first) == "b c" and shorter(first.again()) == "c" and shorter(first.again().again()) == "c"
    assert shorter(Lowered(1.0, texts=(("a", 2.0), ("b", 3.0)))) == "a"


def adamw(said: Tensor, most: float, lr: float) -> tuple[Tensor, int]:
    """Decoupled weight decay 0.01, betas 0.9 and 0.999 (Loshchilov and Hutter 2019), in float64."""
    said = said.double()
    mean, square = torch.zeros_like(said[1:]), torch.zeros_like(said[1:])
    for step in range(1, ITERATIONS + 1):
        leaf = said.clone().requires_grad_()
        m = magnitude(leaf)
        (slope,) = torch.autograd.grad(m, leaf)
        if m.item() <= most:
            return said, step
        mean = 0.9 * mean + 0.1 * slope[1:]
        square = 0.999 * square + 0.001 * slope[1:] ** 2
        move = (mean / (1 - 0.9**step)) / ((square / (1 - 0.999**step)).sqrt() + 1e-8)
        said = torch.cat([said[:1], said[1:] * (1 - 0.01 * lr) - lr * move])
    return said, ITERATIONS


@pytest.mark.parametrize("share", [SHARE, 0.9, 0.0])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_the_embedding_is_that_of_adamw_written_out(
    share: float, mode: type, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lowering, "SHARE", share)
    whole = magnitude(embedding(PROMPT)).item()
    expected, made = adamw(embedding(PROMPT), share * whole, lowering.LEARNING_RATE)
    with mode():
        found, spent = optimised(start(), None)
    assert spent == made + 1 and (made < ITERATIONS) == (share == 0.9)
    assert math.isclose(found.whole, whole, rel_tol=1e-5)
    torch.testing.assert_close(found.embedding[0].double(), expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(found.embedding[0, 0], embedding(PROMPT)[0])  # the first token is not touched
    assert magnitude(found.embedding[0]).item() < whole
    if share == SHARE:
        again, _ = optimised(start(), found)
        further, _ = adamw(expected, share**2 * whole, lowering.LEARNING_RATE)
        assert again.tries == 2 and again.whole == found.whole
        torch.testing.assert_close(again.embedding[0].double(), further, rtol=1e-3, atol=1e-3)


def flight(prompt: str | None = PROMPT, how: str = "attribution", **more: object) -> Flight:
    return Flight(torch.zeros(*SHAPE), prompt=prompt, to_lower=how, **more)


def test_the_evaluations_are_counted_once() -> None:
    one, network = flight(), Network()
    lower(one, start(network=network), CONFIG)
    assert one.evaluations == sum(network.calls) == 9
    assert one.caption == shorter(attributed(start(), PROMPT.split())) and one.to_lower is None
    first, one.to_lower = one.lowered, "attribution"
    lower(one, start(), CONFIG)
    assert one.evaluations == 9 and one.lowered.tries == 2 and one.lowered.texts is first.texts
    two, network = flight(how="embedding"), Network()
    lower(two, start(network=network), CONFIG)
    assert two.evaluations == sum(network.calls) > 2 and two.caption is None


@pytest.mark.parametrize("how", ["attribution", "embedding"])
def test_what_cannot_be_lowered_or_paid_for_stays(how: str) -> None:
    cost = 9 if how == "attribution" else ITERATIONS + 1
    alone = {"attribution": start("one"), "embedding": start()}[how]
    if how == "embedding":
        alone = Start(alone.denoiser, alone.sample, alone.t, Conditions({}, {}, {}), 60)
    kept = [
        (flight(how=how), start(guided=False), CONFIG),
        (flight("one", how), alone, CONFIG),
        (flight(how=how, evaluations=3 * 60 - 60 - cost + 1), start(), CONFIG),
    ]
    if how == "attribution":
        kept.append((flight(None), start(), CONFIG))
    for one, begin, config in kept:
        spent = one.evaluations
        lower(one, begin, config)
        assert (one.lowered, one.caption, one.evaluations, one.to_lower) == (None, None, spent, None)
    for config, spent in ((CONFIG, 3 * 60 - 60 - cost), (UNBOUNDED, 10_000)):
        one = flight(how=how, evaluations=spent)
        lower(one, start(), config)
        assert one.lowered is not None


def test_later_conditions_rows_by_captions_and_embeddings_alone() -> None:
    given = Conditions(encode(["a", "b", "c"]), encode(["", "", ""]), {})
    lowered = Lowered(1.0, embedding=torch.full((1, TOKENS, WIDTH), 7.0))
    flights = [Flight(torch.zeros(1)), Flight(torch.zeros(1), lowered=lowered)]
    flights.append(Flight(torch.zeros(1), caption="z"))
    told = later(start().denoiser, given, flights)
    expected = torch.stack([embedding("a"), torch.full((TOKENS, WIDTH), 7.0), embedding("z")])
    assert torch.equal(told.cond[TEXT], expected) and told.uncond is given.uncond
    assert torch.equal(given.cond[TEXT], encode(["a", "b", "c"])[TEXT])
    assert later(start().denoiser, given, flights[:1]) is given


class Rows:
    """An index without captions, but for its first row's."""

    metric, captions = "cosine", [None, None]

    def caption_counts(self) -> Tensor:
        return torch.ones(2, dtype=torch.int64)


def test_prompts_are_marked_only_where_no_ordinary_caption_is_known() -> None:
    one, two, bare = Flight(torch.ones(1), prompt="a b"), Flight(torch.ones(1)), start().denoiser
    same = amg.AMGConfig.preset("main")
    despecify(Rows(), bare, Ordinary(), [(one, CONFIG, 0), (two, same, 0)])
    assert (one.to_lower, two.to_lower, one.caption) == ("attribution", None, None)
    one.lowered = Lowered(1.0)
    despecify(Rows(), bare, Ordinary(("c d",)), [(one, CONFIG, -1)])
    assert (one.to_lower, one.lowered, one.caption) == (None, None, "c d")
    despecify(Rows(), bare, Ordinary(), [(one, CONFIG, 0)])
    assert one.to_lower is None and one.caption == "c d"  # it has an ordinary one, and keeps it
    freed = Denoiser(bare.network, bare.decode)
    three = Flight(torch.ones(1))
    embedded = amg.AMGConfig.preset("main", rewind_prompt="embedding")
    despecify(Rows(), freed, Ordinary(), [(three, embedded, 0)])
    assert three.to_lower == "embedding"  # which needs no text encoder


def test_another_word_is_refused() -> None:
    with pytest.raises(ValueError, match=r"`rewind_prompt` must be one of .*'attribution'.*, got 'words'"):
        amg.AMGConfig.preset("main", rewind_prompt="words")
