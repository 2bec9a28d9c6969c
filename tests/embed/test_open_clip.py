"""Our open_clip embedder against open_clip's own preprocessing and `encode_image`; see open_clip_env.sh."""

import hashlib
import importlib.util
import json
import socket

import numpy as np
import pytest
import torch
import torch.nn.functional as F

MODEL = "amg-test-vit"
CONFIG = {
    "embed_dim": 24,
    "vision_cfg": {"image_size": 48, "layers": 2, "width": 64, "head_width": 32, "patch_size": 16},
    "text_cfg": {"context_length": 8, "vocab_size": 100, "width": 32, "heads": 2, "layers": 1},
}


def declare_torchvision_operators():
    """torchvision's registration code needs two schemas that its GPU build alone defines."""
    library = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    return library


@pytest.fixture(scope="module")
def open_clip():
    if importlib.util.find_spec("open_clip") is None:
        pytest.skip("open_clip is not installed; see tests/embed/open_clip_env.sh")
    library = declare_torchvision_operators() if torch.version.cuda is None else None
    try:
        import open_clip
    except (ImportError, RuntimeError) as error:
        pytest.skip(f"open_clip cannot be imported ({error}); see tests/embed/open_clip_env.sh")
    yield open_clip
    del library


@pytest.fixture(scope="module")
def checkpoint(open_clip, tmp_path_factory):
    """A random small ViT known to open_clip by name, and its weights in a local file."""
    folder = tmp_path_factory.mktemp("open_clip")
    (folder / f"{MODEL}.json").write_text(json.dumps(CONFIG))
    open_clip.add_model_config(folder / f"{MODEL}.json")
    torch.manual_seed(0)
    model = open_clip.create_model(MODEL)
    torch.save(model.state_dict(), folder / "weights.pt")
    return folder / "weights.pt"


@pytest.fixture(scope="module")
def theirs(open_clip, checkpoint):
    """open_clip's model and its evaluation transform, from the same file."""
    model, transform = open_clip.create_model_from_pretrained(MODEL, pretrained=str(checkpoint))
    return model.eval(), transform


@pytest.fixture
def embedder(checkpoint, monkeypatch):
    def no_network(*_, **__):
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket.socket, "connect", no_network)
    from amg.embed import load

    return load(f"open_clip:{MODEL}:{checkpoint}")


def picture(height, width, seed=0):
    from PIL import Image

    rng = np.random.default_rng(seed)
    coarse = rng.integers(60, 196, (height // 8 + 2, width // 8 + 2, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def tensor(image):
    return torch.from_numpy(np.asarray(image, dtype=np.float32) / 255).permute(2, 0, 1)[None]


@torch.no_grad()
def test_same_tower_on_images_of_its_own_size(embedder, theirs):
    model, transform = theirs
    images = [picture(48, 48, seed) for seed in range(4)]
    want = model.encode_image(torch.stack([transform(image) for image in images]))
    ours = embedder(torch.cat([tensor(image) for image in images]))
    assert ours.shape == (4, 24) and ours.dtype == torch.float32
    assert (ours - want).abs().max() < 1e-5


@torch.no_grad()
@pytest.mark.parametrize("size", [(200, 150), (150, 201), (33, 64), (512, 512)])
def test_encode_image_after_their_preprocessing(embedder, theirs, size):
    model, transform = theirs
    image = picture(*size)
    want, ours = model.encode_image(transform(image)[None]), embedder(tensor(image))
    assert F.cosine_similarity(want, ours).item() > 0.9999  # theirs rounds to 8 bits twice
    assert (want - ours).norm() / want.norm() < 0.01


@pytest.mark.parametrize("resize_mode", ["shortest", "longest", "squash"])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("target", [56, (40, 64)])
@pytest.mark.parametrize("size", [(120, 200), (201, 90), (30, 31)])
def test_every_resize_mode_is_theirs(open_clip, resize_mode, interpolation, target, size):
    from open_clip.transform import PreprocessCfg, image_transform_v2

    from amg.embed.open_clip import preprocess_of

    config = PreprocessCfg(
        size=target,
        interpolation=interpolation,
        resize_mode=resize_mode,
        fill_color=77,
        mean=(0, 0, 0),
        std=(1, 1, 1),
    )
    image = picture(*size)
    want = image_transform_v2(config, is_train=False)(image)[None]
    ours = preprocess_of(vars(config))(tensor(image))
    assert ours.shape == want.shape
    assert (ours - want).abs().max() * 255 <= 1.3


def test_attributes(embedder, checkpoint):
    from amg.embed import check

    assert (embedder.name, embedder.dimension) == (f"open_clip:{MODEL}", 24)
    assert embedder.sha == hashlib.sha256(checkpoint.read_bytes()).hexdigest()
    assert embedder.preprocessing == (
        "short side, centre crop 48x48; bicubic, antialiased; mean 0.481455 0.457828 0.408211; "
        "std 0.26863 0.261303 0.275777"
    )
    check(embedder)


def test_gradient_equals_the_one_through_their_model(embedder, theirs):
    model, _ = theirs
    images = torch.rand(2, 3, 48, 48, generator=torch.Generator().manual_seed(1)).requires_grad_()
    (ours,) = torch.autograd.grad(embedder(images)[:, 0].sum(), images)
    config = model.visual.preprocess_cfg
    mean, std = (torch.tensor(config[key]).view(3, 1, 1) for key in ("mean", "std"))
    (want,) = torch.autograd.grad(model.encode_image((images - mean) / std)[:, 0].sum(), images)
    assert (ours - want).norm() / want.norm() < 1e-5


def test_safetensors_checkpoints_load_too(embedder, checkpoint, tmp_path):
    from safetensors.torch import save_file

    from amg.embed.open_clip import load_open_clip

    state = {name: value.clone() for name, value in torch.load(checkpoint, weights_only=True).items()}
    save_file(state, tmp_path / "weights.safetensors")
    images = torch.rand(1, 3, 60, 60)
    assert torch.equal(load_open_clip(MODEL, tmp_path / "weights.safetensors")(images), embedder(images))


@pytest.mark.parametrize(
    ("tag", "mean", "quick_gelu"),
    [("openai", 0.48145466, True), ("laion2b_s32b_b82k", 0.5, None), ("laion400m_e32", 0.48145466, None)],
)
def test_published_weights_settle_preprocessing_and_activation(open_clip, tag, mean, quick_gelu):
    from amg.embed.open_clip import published_settings

    settings = published_settings(open_clip, "ViT-L-14", tag)
    assert settings["mean"][0] == mean and settings.get("quick_gelu") == quick_gelu


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("open_clip:ViT-L-14:{file}", r"`tag` must name the weights, as in open_clip:ViT-L-14@TAG:PATH"),
        ("open_clip:ViT-L-14@nobody:{file}", r"`tag` must be one of openai, .* got 'nobody'"),
        (
            "open_clip:no-such-model:{file}",
            r"`model` must be a model that open_clip knows .* got 'no-such-model'",
        ),
        ("open_clip:roberta-ViT-B-32:{file}", r"`model` must not need files from a hub"),
        ("open_clip:amg-test-vit:{torn}", r"`path` must hold weights of amg-test-vit, got"),
        ("open_clip:amg-test-vit:{other}", r"`path` must hold weights of amg-test-vit, got"),
    ],
)
def test_errors(checkpoint, spec, message, tmp_path):
    from amg.embed import load

    (tmp_path / "torn.pt").write_bytes(checkpoint.read_bytes()[:5000])
    torch.save({"w": torch.zeros(1)}, tmp_path / "other.pt")
    with pytest.raises(ValueError, match=message):
        load(spec.format(file=checkpoint, torn=tmp_path / "torn.pt", other=tmp_path / "other.pt"))
