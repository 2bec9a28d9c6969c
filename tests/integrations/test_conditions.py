"""Conditions of any nesting are cut by rows: halves, rows taken, joined calls, and IP-Adapters."""

from typing import NamedTuple

import pytest
import torch

import amg
from amg.engine.prepare import form_of
from amg.guidance.predict import Denoiser, Same, joined, predict, replace_captions
from amg.pipelines.denoiser import split_call

diffusers = pytest.importorskip("diffusers")
BATCH = 3
OPEN = {"lambda_min": -1.0, "lambda_max": -1.0, "c1": 2.0, "c2": 20.0, "terms_from": 0.0, "check_at": ()}


class Pair(NamedTuple):
    first: torch.Tensor
    second: object


def rows_of(*shape, rows=2 * BATCH):
    """[rows, *shape]; row i holds i."""
    return torch.arange(rows).float().view(-1, *[1] * len(shape)).expand(rows, *shape).clone()


def call_arguments():
    table = torch.zeros(7, 2)
    return {
        "encoder_hidden_states": rows_of(4, 8),
        "added_cond_kwargs": {
            "image_embeds": [rows_of(1, 8), rows_of(2, 5, 8)],
            "deep": ({"ids": rows_of(2)}, [Pair(rows_of(3), table), "word"]),
            "scale": 0.5,
        },
        "cross_attention_kwargs": {"ip_adapter_masks": [torch.ones(1, 2, 8, 8)], "scale": 0.5},
        "down_intrablock_additional_residuals": [rows_of(8, 4, 4), rows_of(16, 2, 2)],
        "return_dict": False,
    }, table


def tensors_of(value):
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, dict):
        return [tensor for inner in value.values() for tensor in tensors_of(inner)]
    return [t for inner in value for t in tensors_of(inner)] if isinstance(value, (list, tuple)) else []


class Network:
    def __init__(self):
        self.seen = []

    def __call__(self, sample, t, **conditions):
        self.seen.append(conditions)
        rows = [tensor for tensor in tensors_of(conditions) if len(tensor) == len(sample)]
        return sample + sum(tensor.flatten(1).mean(1) for tensor in rows)[:, None, None, None]


def test_halves_rows_and_the_whole_call_again():
    arguments, table = call_arguments()
    conditions, network = split_call(arguments, BATCH, guided=True), Network()
    sample = torch.zeros(BATCH, 1, 1, 1)
    predict(Denoiser(network, lambda x: x), sample, 10, conditions)
    (whole,) = network.seen
    for name, value in whole.items():
        assert type(value) is type(arguments[name])
        for ours, theirs in zip(tensors_of(value), tensors_of(arguments[name]), strict=True):
            assert torch.equal(ours, theirs), name
    pair = whole["added_cond_kwargs"]["deep"][1][0]
    assert isinstance(pair, Pair) and pair.second is table and whole["added_cond_kwargs"]["scale"] == 0.5
    predict(Denoiser(network, lambda x: x), sample[:2], 10, conditions.take(torch.tensor([2, 0])))
    own = network.seen[1]
    for name in ("added_cond_kwargs", "down_intrablock_additional_residuals", "encoder_hidden_states"):
        for tensor in tensors_of(own[name]):
            if len(tensor) != len(table):
                assert tensor.flatten(1)[:, 0].tolist() == [2, 0, 5, 3], name
    assert len(own["cross_attention_kwargs"]["ip_adapter_masks"][0]) == 1
    assert own["added_cond_kwargs"]["deep"][1][1] == "word"


def test_without_guidance_there_is_one_half():
    arguments, _ = call_arguments()
    conditions, network = split_call(arguments, 2 * BATCH, guided=False), Network()
    predict(
        Denoiser(network, lambda x: x), torch.zeros(2, 1, 1, 1), 10, conditions.take(torch.tensor([4, 1]))
    )
    embeds = network.seen[0]["added_cond_kwargs"]["image_embeds"]
    assert [tensor.flatten(1)[:, 0].tolist() for tensor in embeds] == [[4, 1], [4, 1]]


def test_captions_replace_the_text_of_their_rows_alone():
    conditions = split_call(call_arguments()[0], BATCH, guided=True)
    encode = lambda captions: {"encoder_hidden_states": torch.full((len(captions), 4, 8), 9.0).double()}  # noqa: E731
    replaced = replace_captions(
        Denoiser(Network(), lambda x: x, encode_captions=encode), conditions, [None, "a", None]
    )
    states = replaced.cond["encoder_hidden_states"]
    assert states.flatten(1)[:, 0].tolist() == [3, 9, 5] and states.dtype == torch.float32
    assert replaced.cond["added_cond_kwargs"] is conditions.cond["added_cond_kwargs"]


def test_joined_conditions_keep_their_own_nested_rows():
    def conditions(rows, at, same=3):
        embeds = [rows_of(1, 8, rows=rows) + at, rows_of(2, 5, 8, rows=rows) + at]
        return {
            "added_cond_kwargs": {"image_embeds": embeds, "pair": (rows_of(2, rows=rows) + at, Same(same))}
        }

    parts = [conditions(1, 10), conditions(3, 20), conditions(2, 30)]
    assert len({form_of(part) for part in parts}) == 1
    together = joined(parts)["added_cond_kwargs"]
    for at, rows in enumerate((slice(0, 1), slice(1, 4), slice(4, 6))):
        own = parts[at]["added_cond_kwargs"]
        for one, all_of in zip(own["image_embeds"], together["image_embeds"], strict=True):
            assert torch.equal(one, all_of[rows])
        assert torch.equal(own["pair"][0], together["pair"][0][rows]) and together["pair"][1].value == 3
    assert form_of(conditions(1, 10, same=4)) != form_of(parts[0])


def with_ip_adapters(pipe):
    """Two tiny IP-Adapters on a pipeline's U-Net, and image embeddings of its own for every row."""
    from diffusers.models.attention_processor import IPAdapterAttnProcessor2_0
    from diffusers.models.embeddings import ImageProjection, MultiIPAdapterImageProjection

    torch.manual_seed(1)
    unet, processors = pipe.unet, {}
    for name, attention in unet.named_modules():
        if not hasattr(attention, "set_processor"):
            continue
        processor = attention.processor
        if name.endswith("attn2"):
            tokens = {"num_tokens": (2, 2), "scale": [1.0, 1.0]}
            processor = IPAdapterAttnProcessor2_0(
                attention.inner_dim, unet.config.cross_attention_dim, **tokens
            )
        processors[f"{name}.processor"] = processor
    unet.set_attn_processor(processors)
    layers = [ImageProjection(8, unet.config.cross_attention_dim, 2) for _ in range(2)]
    unet.encoder_hid_proj = MultiIPAdapterImageProjection(layers)
    unet.register_to_config(encoder_hid_dim_type="ip_image_proj")
    everybody = [torch.randn(4, 1, 8) * 3, torch.randn(4, 2, 8) * 3]

    def of(rows):
        pipe.prepare_ip_adapter_image_embeds = lambda *_: [
            torch.cat([torch.zeros_like(embeds[rows]), embeds[rows]]) for embeds in everybody
        ]
        return [embeds[rows] for embeds in everybody]

    return of


@pytest.mark.parametrize("gradient", ["frozen", "full"])
def test_rows_keep_their_own_image_embeddings(sd, embedding_index, gradient):
    """Part of a batch of four goes back; each picture is the one it is alone."""
    prompts, embeds_of = ["abc", "cat, red", "z", "no"], with_ip_adapters(sd)

    def draw(rows, threshold, embeds=None):
        more = {"rewind_at": (0.5,), "rewind_threshold": threshold, "max_rewinds": 1, "rewind_guidance": 1.0}
        more["max_evaluations"] = None
        config = amg.AMGConfig.preset("main", **OPEN, **more, gradient=gradient, on_memorized="flag")
        out = amg.protect(sd, embedding_index, config)(
            [prompts[row] for row in rows],
            ip_adapter_image_embeds=embeds_of(embeds or rows),
            generator=[torch.Generator().manual_seed(row) for row in rows],
            num_inference_steps=8,
            output_type="pt",
        )
        amg.unprotect(sd)
        return out

    measured = draw([0, 1, 2, 3], 0.99)
    middle = sorted(one.trace[4].similarity for one in measured.amg)[1:3]
    together_ = draw([0, 1, 2, 3], sum(middle) / 2)
    assert sorted(one.rewinds for one in together_.amg) == [0, 0, 1, 1]
    for row in range(4):
        alone = draw([row], sum(middle) / 2)
        assert alone.amg[0].rewinds == together_.amg[row].rewinds
        assert torch.allclose(alone.images[0], together_.images[row], atol=2e-4)
    with_another_s = draw([3], sum(middle) / 2, embeds=[2])
    assert (with_another_s.images[0] - together_.images[3]).abs().max() > 5e-3
