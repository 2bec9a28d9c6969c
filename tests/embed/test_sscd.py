"""SSCD against an independent construction: transformers' ResNet, GeM from its formula, in float64."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from amg.embed import Embedder, check, load
from amg.embed.resnet import ResNet50, gem_pool
from amg.embed.sscd import SSCD, load_sscd, sscd_preprocess

TRUNK = 23_508_032  # torchvision's resnet50 (25,557,032) without its 2048 × 1000 + 1000 classifier
HEAD = 2048 * 512 + 512


def hugging_face_name(name):
    """`backbone.layerL.B.…` (torchvision) to the name in transformers' ResNetModel."""
    parts = name.removeprefix("backbone.").split(".")
    if parts[0] in ("conv1", "bn1"):
        return f"embedder.embedder.{'convolution' if parts[0] == 'conv1' else 'normalization'}.{parts[1]}"
    stem = f"encoder.stages.{int(parts[0][-1]) - 1}.layers.{parts[1]}"
    if parts[2] == "downsample":
        return f"{stem}.shortcut.{'convolution' if parts[3] == '0' else 'normalization'}.{parts[4]}"
    kind = "convolution" if parts[2].startswith("conv") else "normalization"
    return f"{stem}.layer.{int(parts[2][-1]) - 1}.{kind}.{parts[3]}"


@pytest.fixture(scope="module")
def oracle(official_state):
    """Normalised images to (feature map, unit descriptor) in float64."""
    transformers = pytest.importorskip("transformers")
    config = transformers.ResNetConfig(layer_type="bottleneck", downsample_in_bottleneck=False)
    trunk = transformers.ResNetModel(config).eval()
    body = {hugging_face_name(k): v for k, v in official_state.items() if "fc." not in k}
    trunk.load_state_dict(body)
    trunk.double().requires_grad_(False)
    weight = official_state["backbone.fc.weight"].double()
    bias = official_state["backbone.fc.bias"].double()

    def describe(normalised):
        features = trunk(normalised.double()).last_hidden_state
        pooled = (features.clamp(min=1e-6) ** 3).sum((2, 3)).div(features[0, 0].numel()) ** (1 / 3)
        descriptor = pooled @ weight.T + bias
        return features, descriptor / descriptor.square().sum(1, keepdim=True).sqrt()

    return describe


@pytest.fixture(scope="module")
def network(official_state):
    network = SSCD().eval().requires_grad_(False)
    network.load_state_dict(official_state)
    return network


def test_parameter_count_and_names(official_state):
    parameters = dict(SSCD().named_parameters())
    assert sum(p.numel() for p in parameters.values()) == TRUNK + HEAD == 24_557_120
    assert {k: v.shape for k, v in SSCD().state_dict().items()} == {
        k: v.shape for k, v in official_state.items()
    }


@pytest.mark.parametrize("size", [(64, 64), (97, 130)])
def test_forward_equals_the_independent_construction(network, oracle, size):
    normalised = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(3))
    features, descriptor = oracle(normalised)
    ours = network.backbone.features(normalised)
    assert ours.shape == features.shape == (2, 2048, -(-size[0] // 32), -(-size[1] // 32))
    assert (ours - features).abs().max() / features.abs().max() < 1e-5
    assert (network(normalised) - descriptor).abs().max() < 1e-5


def test_stride_is_in_the_3x3_convolution():
    block = ResNet50(8).get_submodule("layer2.0")
    assert [block.get_submodule(f"conv{n}").stride for n in (1, 2, 3)] == [(1, 1), (2, 2), (1, 1)]
    assert block.get_submodule("downsample.0").stride == (2, 2)


def test_gem_is_its_formula_in_float64():
    features = torch.rand(3, 5, 7, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 4 - 1
    values = np.maximum(features.numpy().reshape(3, 5, -1), 1e-6)
    np.testing.assert_allclose(gem_pool(features).numpy(), np.cbrt((values**3).mean(-1)), rtol=1e-13)
    np.testing.assert_allclose(gem_pool(features, p=1).numpy(), values.mean(-1), rtol=1e-13)
    near_maximum = gem_pool(features, p=400).numpy()
    np.testing.assert_allclose(near_maximum, values.max(-1), rtol=0.01)


def test_gem_gradient_is_autograds_and_finite_at_zero():
    features = torch.zeros(1, 2, 3, 3, dtype=torch.float64)
    features[0, 0] = torch.rand(3, 3, generator=torch.Generator().manual_seed(1)) + 0.5
    features.requires_grad_()
    gem_pool(features).sum().backward()
    pooled = (features[0, 0].detach() ** 3).mean() ** (1 / 3)
    want = features[0, 0].detach() ** 2 / (9 * pooled**2)  # ∂/∂f (mean f³)^(1/3)
    torch.testing.assert_close(features.grad[0, 0], want, rtol=1e-12, atol=0)
    assert torch.isfinite(features.grad).all()


def test_embedder_from_file_equals_the_oracle_with_its_gradient(converted_file, oracle):
    embedder = load_sscd(converted_file)
    images = torch.rand(1, 3, 40, 41, generator=torch.Generator().manual_seed(5)).requires_grad_()
    direction = F.normalize(torch.randn(1, 512, generator=torch.Generator().manual_seed(6)))
    embedding = embedder(images)
    (gradient,) = torch.autograd.grad((embedding * direction).sum(), images)

    exact = images.detach().double().requires_grad_()
    enlarged = F.interpolate(exact, (288, 295), mode="bilinear", align_corners=False, antialias=True)
    mean = torch.tensor([0.485, 0.456, 0.406], dtype=torch.float64).view(3, 1, 1)
    std = torch.tensor([0.229, 0.224, 0.225], dtype=torch.float64).view(3, 1, 1)
    _, descriptor = oracle((enlarged - mean) / std)
    (want,) = torch.autograd.grad((descriptor * direction).sum(), exact)

    assert (embedding - descriptor).abs().max() < 1e-5
    assert embedding.norm(dim=1).sub(1).abs().max() < 1e-6
    assert (gradient - want).norm() / want.norm() < 1e-2  # fp32 flips a few ReLUs; the next test is exact


def test_gradient_in_float64_equals_the_independent_constructions(network, oracle):
    generator = torch.Generator().manual_seed(4)
    normalised = torch.randn(1, 3, 64, 64, generator=generator, dtype=torch.float64).requires_grad_()
    direction = torch.randn(512, generator=generator, dtype=torch.float64)
    (ours,) = torch.autograd.grad((copy.deepcopy(network).double()(normalised) @ direction).sum(), normalised)
    (want,) = torch.autograd.grad((oracle(normalised)[1] @ direction).sum(), normalised)
    assert (ours - want).norm() / want.norm() < 1e-10


def test_attributes_and_protocol(converted_file):
    embedder = load(f"sscd:{converted_file}")
    assert isinstance(embedder, Embedder)
    assert (embedder.name, embedder.dimension) == ("sscd", 512)
    assert embedder.preprocessing == str(sscd_preprocess())
    check(embedder, size=(32, 32))


def test_the_square_recipe_is_another_embedder(converted_file):
    short, square = load(f"sscd:{converted_file}"), load(f"sscd-square320:{converted_file}")
    assert square.name == "sscd-square320" and square.sha == short.sha
    images = torch.rand(1, 3, 320, 320, generator=torch.Generator().manual_seed(2))
    want = square._network[1]((images - square._network[0].mean) / square._network[0].std)
    torch.testing.assert_close(square(images), want, rtol=0, atol=0)
    assert (square(images) * short(images)).sum() < 0.9999


@torch.no_grad()
def test_a_sample_does_not_depend_on_its_batch_nor_on_autocast(converted_file):
    embedder = load_sscd(converted_file)
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(9))
    together = embedder(images)
    alone = torch.cat([embedder(image[None]) for image in images])
    assert (together - alone).abs().max() < 1e-5
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(embedder(images), together)


def test_weights_are_frozen_and_in_evaluation_mode(converted_file):
    network = load_sscd(converted_file)._network
    assert not network.training and not any(p.requires_grad for p in network.parameters())


def test_a_replica_made_in_inference_mode_still_has_gradients(converted_file):
    embedder = load_sscd(converted_file)
    with torch.inference_mode():
        replica = embedder._replica(torch.device("meta"))
    assert {p.device.type for p in replica.parameters()} == {"meta"}
    assert not any(tensor.is_inference() for tensor in (*replica.parameters(), *replica.buffers()))
    assert embedder._replica(torch.device("meta")) is replica
    assert {p.device.type for p in embedder._network.parameters()} == {"cpu"}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@torch.no_grad()
def test_the_gpu_agrees_with_the_cpu(converted_file):
    embedder = load_sscd(converted_file)
    images = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(9))
    on_gpu = embedder(images.cuda())
    assert on_gpu.is_cuda
    assert (on_gpu.cpu() * embedder(images)).sum(1).min() > 0.9999


def test_two_classifier_sizes_share_one_trunk():
    count = sum(p.numel() for p in ResNet50(1000).parameters())
    assert count == 25_557_032  # torchvision's published number for resnet50
