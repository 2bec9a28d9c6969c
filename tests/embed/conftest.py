"""Random SSCD weights in the official layouts, and the same network built independently of ours."""

import pytest
import torch


def official_names():
    """Names and shapes in `.torchvision.pt` files, from torchvision's naming scheme, not from our code."""
    shapes = {"conv1.weight": (64, 3, 7, 7), "fc.weight": (512, 2048), "fc.bias": (512,)}
    norms = {"bn1": 64}
    channels = 64
    for layer, (width, blocks) in enumerate([(64, 3), (128, 4), (256, 6), (512, 3)], start=1):
        for block in range(blocks):
            stem = f"layer{layer}.{block}"
            shapes[f"{stem}.conv1.weight"] = (width, channels, 1, 1)
            shapes[f"{stem}.conv2.weight"] = (width, width, 3, 3)
            shapes[f"{stem}.conv3.weight"] = (4 * width, width, 1, 1)
            norms |= {f"{stem}.bn1": width, f"{stem}.bn2": width, f"{stem}.bn3": 4 * width}
            if block == 0:
                shapes[f"{stem}.downsample.0.weight"] = (4 * width, channels, 1, 1)
                norms[f"{stem}.downsample.1"] = 4 * width
            channels = 4 * width
    return {f"backbone.{k}": v for k, v in shapes.items()}, {f"backbone.{k}": v for k, v in norms.items()}


@pytest.fixture(scope="session")
def official_state():
    """Random weights of realistic scale: He convolutions, running statistics and biases not trivial."""
    generator = torch.Generator().manual_seed(7)
    shapes, norms = official_names()
    state = {}
    for name, shape in shapes.items():
        fan_in = torch.Size(shape[1:]).numel() if len(shape) > 1 else 2048
        state[name] = torch.randn(shape, generator=generator) * (2 / fan_in) ** 0.5
    for name, width in norms.items():
        last = name.endswith("bn3")
        state[f"{name}.weight"] = (0.3 if last else 1.0) * (0.5 + torch.rand(width, generator=generator))
        state[f"{name}.bias"] = 0.2 * torch.randn(width, generator=generator)
        state[f"{name}.running_mean"] = 0.2 * torch.randn(width, generator=generator)
        state[f"{name}.running_var"] = 0.5 + torch.rand(width, generator=generator)
        state[f"{name}.num_batches_tracked"] = torch.tensor(1234)
    return state


@pytest.fixture(scope="session")
def official_file(official_state, tmp_path_factory):
    """A `.torchvision.pt` file in the official layout."""
    path = tmp_path_factory.mktemp("official") / "sscd_random.torchvision.pt"
    torch.save(official_state, path)
    yield path
    path.unlink()


@pytest.fixture(scope="session")
def converted_file(official_file, tmp_path_factory):
    """The same weights as safetensors."""
    from amg.embed.convert import convert_sscd

    path = tmp_path_factory.mktemp("converted") / "sscd.safetensors"
    convert_sscd(official_file, path)
    yield path
    path.unlink()
