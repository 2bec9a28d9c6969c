"""What is sampled from: a bundled model that memorises, and random weights in the shapes of Stable Diffusion.

A model with random weights memorises nothing, so its "memorised" prompts are planted: the index holds what
the plain pipeline draws for these prompts and seeds, among random unit vectors. The gate opens on them,
and a sample that goes back to fresh noise leaves them.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from amg import zoo
from amg.cli import main
from amg.commands.demo import GUIDANCE_SCALES, caption_jobs, open_index, open_pipeline
from amg.config import AMGConfig
from amg.engine.sampler import Sampler
from amg.index.index import Index
from amg.index.store import Manifest
from amg.kernels import encode_rows
from amg.zoo.judge import load_judge
from amg.zoo.photos import PHOTOS, PLACES, VIEWS, training_set

KINDS = ("ordinary", "memorised", "mixed")
DIMENSION = 512
ORDINARY = 320  # ordinary prompts of photos-sd that are looked through
PLANTED = 16
PLANTED_COUNT = 64  # training images behind a planted row


@dataclass(frozen=True)
class Model:
    """A pipeline, its index, prompts with their seeds by kind, the share of copies an independent judge sees,
    and where there are any the files of `amg calibrate` and `amg distill`."""

    name: str
    pipe: Any
    index: Index
    guidance_scale: float
    jobs: dict[str, list[tuple[str, int]]]
    judge: Callable[[Tensor], float] | None = None
    calibration: Path | None = None
    student: Path | None = None

    def prompts(self, kind: str, count: int) -> tuple[list[str], list[int]]:
        """`count` prompts and seeds; "mixed" takes every other one from the memorised."""
        if kind == "mixed":
            both = [self.prompts(one, count) for one in ("memorised", "ordinary")]
            return tuple([both[i % 2][part][i] for i in range(count)] for part in (0, 1))
        jobs = self.jobs[kind]
        chosen = [jobs[i % len(jobs)] for i in range(count)]
        return [text for text, _ in chosen], [seed for _, seed in chosen]


def photos_sd(work: Path, steps: int, device: str) -> Model:
    """The bundled model: the captions of its duplicated photographs, and ordinary ones that no crop has, with
    seeds whose plain picture keeps the promise (another must be changed)."""
    judge, name = load_judge(), "photos-sd"
    jobs = caption_jobs(4 * ORDINARY, 0, training_set(64))
    asked = list(zip(jobs.prompts, jobs.seeds, jobs.kinds, strict=True))
    memorised, ordinary = (
        [(text, seed) for text, seed, kind in asked if kind == wanted] for wanted in ("specific", "ordinary")
    )

    def copies(images: Tensor) -> float:
        return (judge.copy_probability(images.float().cpu()) > 0.5).float().mean().item()

    pipe, index = open_pipeline(name), open_index(name, work / f"{name}.amg")
    pipe.set_progress_bar_config(disable=True)
    scale = GUIDANCE_SCALES[name]
    kept = [
        job for job, bad in zip(ordinary, copied(pipe, index, ordinary, steps, scale), strict=True) if not bad
    ]
    calibration = calibrated(work, steps, scale)
    both = {"memorised": memorised, "ordinary": kept}
    return Model(name, pipe, index, scale, both, copies, calibration, zoo.student_path(name))


def copied(pipe: Any, index: Index, jobs: list[tuple[str, int]], steps: int, scale: float) -> list[bool]:
    """Of each prompt and seed whether the plain picture breaks the promise."""
    sampler, found = Sampler(pipe, index, AMGConfig.preset("off")), []
    for first in tqdm(range(0, len(jobs), 16), desc="plain pictures of ordinary prompts", unit="batch"):
        part = jobs[first : first + 16]
        out = sampler(
            [text for text, _ in part],
            generator=[torch.Generator().manual_seed(seed) for _, seed in part],
            num_inference_steps=steps,
            guidance_scale=scale,
            output_type="pt",
            progress=False,
        )
        found += [verdict.memorized for verdict in out.amg]
    return found


def calibrated(work: Path, steps: int, scale: float) -> Path:
    """The calibration file of photos-sd, made on first use from captions that are nowhere else used."""
    path = work / f"photos-sd-calibration-{steps}.json"
    if not path.exists():
        ordinary, memorised = calibration_captions()
        for name, lines in (("ordinary", ordinary), ("memorised", memorised * 4)):
            (work / f"calibration-{name}.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
        command = ["calibrate", "photos-sd", "--index", str(work / "photos-sd.amg"), "--embedder", "photos"]
        command += ["--ordinary", str(work / "calibration-ordinary.txt"), "--scheduler", "ddim"]
        command += ["--memorized", str(work / "calibration-memorised.txt"), "--steps", str(steps)]
        command += [
            "--guidance-scale",
            str(scale),
            "--seed",
            "5000",
            "--batch-size",
            "32",
            "--out",
            str(path),
        ]
        if main([*command, "--miss-rate", "0.05"]):
            raise RuntimeError("`amg calibrate` failed, see above")
    return path


def calibration_captions(count: int = 800) -> tuple[list[str], list[str]]:
    """Ordinary captions that neither the training set nor the benchmark has, and the memorised ones."""
    data = training_set(64)
    known = {*data.captions, *caption_jobs(256, 0, data).prompts}
    made = [
        f"{view.format(subject)}, {place}"
        for view in VIEWS
        for photo in PHOTOS
        for subject in photo.subjects
        for place in PLACES
    ]
    new = [caption for caption in made if caption not in known]
    random.Random(0).shuffle(new)
    return new[:count], [photo.specific for photo in PHOTOS if photo.specific]


@dataclass(frozen=True)
class Shape:
    """A Stable Diffusion of random weights: its networks' sizes and its index's."""

    sample_size: int
    unet: dict[str, Any]
    vae: dict[str, Any]
    embedder: tuple[int, int]  # input size in pixels, width
    rows: int


_CROSS, _PLAIN = ("CrossAttnDownBlock2D", "DownBlock2D"), ("CrossAttnUpBlock2D", "UpBlock2D")
_SD_BLOCKS = {
    "down_block_types": (_CROSS[0],) * 3 + (_CROSS[1],),
    "up_block_types": (_PLAIN[1],) + (_PLAIN[0],) * 3,
}
# SDXL's U-Net without its added embedding of size and pooled text, less than 0.1 % of its work.
_XL_BLOCKS = {
    "down_block_types": (_CROSS[1], _CROSS[0], _CROSS[0]),
    "up_block_types": (_PLAIN[0], _PLAIN[0], _PLAIN[1]),
    "transformer_layers_per_block": (1, 2, 10),
    "use_linear_projection": True,
}
SHAPES = {
    # widths an eighth of SD 1.5's, latents 16x16
    "sd-proportions": Shape(
        16,
        {
            "block_out_channels": (40, 80, 160, 160),
            "attention_head_dim": 8,
            "cross_attention_dim": 96,
            "norm_num_groups": 8,
            **_SD_BLOCKS,
        },
        {"block_out_channels": (16, 32, 64, 64), "norm_num_groups": 8},
        (64, 16),
        50_000,
    ),
    "sd15": Shape(
        64,
        {
            "block_out_channels": (320, 640, 1280, 1280),
            "attention_head_dim": 8,
            "cross_attention_dim": 768,
            **_SD_BLOCKS,
        },
        {"block_out_channels": (128, 256, 512, 512)},
        (288, 64),
        1_000_000,
    ),
    "sdxl": Shape(
        128,
        {
            "block_out_channels": (320, 640, 1280),
            "attention_head_dim": (5, 10, 20),
            "cross_attention_dim": 2048,
            **_XL_BLOCKS,
        },
        {"block_out_channels": (128, 256, 512, 512)},
        (288, 64),
        1_000_000,
    ),
}


class RandomEmbedder(nn.Module):
    """Images [B, 3, H, W] in [0, 1] -> float32 [B, 512] by random convolutions, less their mean `centre`."""

    name, dimension, sha, preprocessing = "random", DIMENSION, "0" * 64, "antialiased bilinear resize"
    centre: Tensor

    def __init__(self, size: int, width: int):
        super().__init__()
        self.size = size
        layers: list[nn.Module] = [nn.Conv2d(3, width, 4, stride=4), nn.SiLU()]
        for wide in (2 * width, 4 * width):
            layers += [nn.LazyConv2d(wide, 3, stride=2, padding=1), nn.SiLU()]
        self.net = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.LazyLinear(DIMENSION))
        self.register_buffer("centre", torch.zeros(DIMENSION))
        self.net(torch.zeros(1, 3, size, size))

    def forward(self, images: Tensor) -> Tensor:
        size = (self.size, self.size)
        resized = nn.functional.interpolate(images.float(), size, mode="bilinear", antialias=True)
        return self.net(resized - 0.5) - self.centre


def random_model(name: str, work: Path, steps: int, device: str) -> Model:
    """A pipeline of `SHAPES[name]` with random weights, and random unit vectors with `PLANTED` real ones."""
    torch.manual_seed(0)
    shape, scale = SHAPES[name], 7.5
    pipe = random_pipeline(shape, device)
    texts = {
        "memorised": [f"memorised picture {i}" for i in range(PLANTED)],
        "ordinary": [f"ordinary picture {i}" for i in range(4 * PLANTED)],
    }
    first = {"memorised": 0, "ordinary": 1000}
    jobs = {kind: [(text, first[kind] + i) for i, text in enumerate(own)] for kind, own in texts.items()}
    embedder = RandomEmbedder(*shape.embedder).eval().requires_grad_(False).to(device)
    pictures = torch.cat(
        [
            pipe(
                texts["memorised"][first : first + 4],
                num_inference_steps=steps,
                guidance_scale=scale,
                generator=[torch.Generator(device).manual_seed(first + i) for i in range(4)],
                output_type="pt",
            ).images
            for first in range(0, PLANTED, 4)
        ]
    )
    features = embedder(pictures)
    embedder.centre.copy_(features.mean(0))
    index = index_around(features - embedder.centre, texts["memorised"], shape.rows, embedder)
    return Model(name, pipe, index, scale, jobs)


def index_around(planted: Tensor, captions: list[str], count: int, embedder: Any) -> Index:
    """An index in memory: `planted` [P, D] first, then random unit vectors up to `count` rows."""
    rows = torch.randn(count, DIMENSION, device=planted.device, dtype=torch.float16)
    rows[: len(planted)] = planted.half()
    rows = nn.functional.normalize(rows.float(), dim=1).half()
    manifest = Manifest(
        "cosine", DIMENSION, count, count, "float16", None, None, embedder.preprocessing, None, (), {}
    )
    index = Index(Path("in memory"), manifest, rows, encode_rows(rows))
    counts = [PLANTED_COUNT] * len(planted) + [1] * (count - len(planted))
    index.__dict__["_meta"] = {
        "id": [str(row) for row in range(count)],
        "caption": [*captions, *(f"ordinary picture {row}" for row in range(len(planted), count))],
        "count": counts,
        "caption_count": counts,
        "source": [""] * count,
    }
    index.embedder = embedder
    return index


def random_pipeline(shape: Shape, device: str) -> Any:
    """A `StableDiffusionPipeline` of random weights, float16 on a GPU; a text encoder of one layer."""
    import diffusers
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    letters = "abcdefghijklmnopqrstuvwxyz0123456789"
    tokens = ["<|startoftext|>", "<|endoftext|>", *letters, *(letter + "</w>" for letter in letters)]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    length, width = 77, shape.unet["cross_attention_dim"]
    text = CLIPTextConfig(
        vocab_size=len(tokens),
        hidden_size=width,
        intermediate_size=width,
        num_hidden_layers=1,
        num_attention_heads=8,
        max_position_embeddings=length,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )
    blocks = len(shape.vae["block_out_channels"])
    vae = diffusers.AutoencoderKL(
        latent_channels=4,
        layers_per_block=2,
        sample_size=8 * shape.sample_size,
        down_block_types=("DownEncoderBlock2D",) * blocks,
        up_block_types=("UpDecoderBlock2D",) * blocks,
        **shape.vae,
    )
    pipe = diffusers.StableDiffusionPipeline(
        vae=vae.eval().requires_grad_(False),
        text_encoder=CLIPTextModel(text).eval(),
        tokenizer=CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=length),
        unet=diffusers.UNet2DConditionModel(sample_size=shape.sample_size, **shape.unet)
        .eval()
        .requires_grad_(False),
        scheduler=diffusers.DDIMScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            clip_sample=False,
            set_alpha_to_one=False,
            steps_offset=1,
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    return pipe.to(device, torch.float16 if device == "cuda" else torch.float32)


def proportions(pipe: Any) -> tuple[float, float]:
    """GFLOP of one U-Net evaluation and of one decode, counted by torch."""
    unet, device, dtype = pipe.unet, pipe.unet.device, pipe.unet.dtype
    size = unet.config.sample_size
    latents = torch.zeros(1, unet.config.in_channels, size, size, device=device, dtype=dtype)
    words = torch.zeros(1, 77, unet.config.cross_attention_dim, device=device, dtype=dtype)
    calls = (lambda: unet(latents, 1, encoder_hidden_states=words), lambda: pipe.vae.decode(latents))
    counted = []
    for call in calls:
        with FlopCounterMode(display=False) as counter:
            call()
        counted.append(counter.get_total_flops() / 1e9)
    return counted[0], counted[1]


MODELS: dict[str, Callable[[Path, int, str], Model]] = {
    "photos-sd": photos_sd,
    **{name: lambda *rest, name=name: random_model(name, *rest) for name in SHAPES},
}
