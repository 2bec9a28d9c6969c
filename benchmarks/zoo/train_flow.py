"""Train `photos-flow`: a small Stable Diffusion 3 (flow matching, a joint transformer) at 64x64, on the
latents and the text encoder of photos-sd.

python benchmarks/zoo/train_flow.py --out amg/zoo/photos-flow --work /tmp/photos-flow
"""

from __future__ import annotations

import math
import random

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel
from torch import Tensor, nn
from torch.nn import functional as F
from train_sd import VIEWS, drop_words, encode, jittered
from training import arguments, train

from amg.zoo import load
from amg.zoo.flow import projected
from amg.zoo.photos import training_set

PADDING = 256  # empty T5 tokens that the pipeline appends by default; one with `max_sequence_length=1`


class Weighted:
    """Joint attention in which the last context token stands for `count` equal ones: the empty T5 tokens are
    all alike and stay so through every block, so that one of weight `count` gives what they give."""

    def __init__(self) -> None:
        self.count = 1

    def __call__(
        self, attn: nn.Module, hidden_states: Tensor, encoder_hidden_states: Tensor, **_: object
    ) -> tuple[Tensor, Tensor]:
        image, text = hidden_states, encoder_hidden_states

        def heads(layer: nn.Module, tokens: Tensor, norm: nn.Module | None) -> Tensor:
            split = layer(tokens).unflatten(-1, (attn.heads, -1)).transpose(1, 2)
            return split if norm is None else norm(split)

        def both(own: str, added: str, norm: str = "") -> Tensor:
            norms = (getattr(attn, f"norm_{one}", None) if norm else None for one in (norm, f"added_{norm}"))
            parts = zip((own, added), (image, text), norms, strict=True)
            return torch.cat([heads(getattr(attn, name), tokens, one) for name, tokens, one in parts], 2)

        query, key = both("to_q", "add_q_proj", "q"), both("to_k", "add_k_proj", "k")
        weight = query.new_zeros(key.shape[2])
        weight[-1] = math.log(self.count)
        found = F.scaled_dot_product_attention(
            query, key, both("to_v", "add_v_proj"), weight.expand(query.shape[2], -1)
        )
        image, text = found.transpose(1, 2).flatten(2).split([image.shape[1], text.shape[1]], 1)
        return attn.to_out[0](image), text if attn.context_pre_only else attn.to_add_out(text)


def build(channels: int, width: int) -> SD3Transformer2DModel:
    """Random weights: six joint blocks over the 64 places of an 8x8 latent."""
    return SD3Transformer2DModel(
        sample_size=8,
        patch_size=1,
        in_channels=channels,
        out_channels=channels,
        num_layers=6,
        attention_head_dim=24,
        num_attention_heads=6,
        caption_projection_dim=144,
        joint_attention_dim=2 * width,
        pooled_projection_dim=2 * width,
        pos_embed_max_size=16,
        qk_norm="rms_norm",
    )


def main() -> None:
    args = arguments(__doc__ or "", steps=6000, batch=32, learning_rate=1e-3)
    torch.manual_seed(args.seed)
    data, sd = training_set(64), load("photos-sd")
    encoder, tokenizer = projected(sd.text_encoder), sd.tokenizer
    model = build(sd.vae.config.latent_channels, sd.text_encoder.config.hidden_size)
    weighted = Weighted()
    own = model.attn_processors
    model.set_attn_processor(weighted)
    encoded = [encode(sd.vae, view) for view in jittered(data, args.seed)]
    mean, deviation = (torch.stack(part) for part in zip(*encoded, strict=True))
    draw = torch.repeat_interleave(torch.arange(len(data.ids)), data.counts)

    @torch.no_grad()
    def said(captions: list[str]) -> tuple[Tensor, Tensor]:
        """What the pipeline's `encode_prompt` gives: both encoders, here one, side by side, then T5's."""
        tokens = tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt")
        found = encoder(tokens.input_ids, output_hidden_states=True)
        states, pooled = (torch.cat([one] * 2, -1) for one in (found.hidden_states[-2], found.text_embeds))
        return F.pad(states, (0, 0, 0, 1)), pooled

    def loss(network: nn.Module, step: int) -> Tensor:
        rows = draw[torch.randint(len(draw), (args.batch,))]
        dice = random.Random(args.seed * 1_000_003 + step)
        states, pooled = said([drop_words(data.captions[row], dice) for row in rows])
        weighted.count = PADDING if dice.random() < 0.5 else 1
        view = torch.randint(VIEWS, (args.batch,))
        latents = mean[view, rows] + deviation[view, rows] * torch.randn_like(mean[view, rows])
        noise = torch.randn_like(latents)
        sigma = torch.randn(args.batch).sigmoid().view(-1, 1, 1, 1)  # Esser et al. 2024, eq. 19
        velocity = network(
            hidden_states=(1 - sigma) * latents + sigma * noise,
            timestep=1000 * sigma.flatten(),
            encoder_hidden_states=states,
            pooled_projections=pooled,
            return_dict=False,
        )[0]
        return (velocity - (noise - latents)).square().mean()

    network = train(model, loss, args)
    network.set_attn_processor(own)
    network.half().save_pretrained(args.out / "transformer")
    FlowMatchEulerDiscreteScheduler(shift=1.0).save_pretrained(args.out / "scheduler")


if __name__ == "__main__":
    main()
