"""ResNet-50 with GeM pooling, with the parameter names of torchvision's `resnet50`, without torchvision."""

import torch.nn.functional as F
from torch import Tensor, nn

STAGES = (
    (64, 3, 1),
    (128, 4, 2),
    (256, 6, 2),
    (512, 3, 2),
)  # (bottleneck width, blocks, stride of the first block)
EXPANSION = 4


def gem_pool(features: Tensor, p: float = 3.0, eps: float = 1e-6) -> Tensor:
    """Generalised mean over space: [B, C, H, W] to [B, C], (mean max(f, eps)^p)^(1/p); p = 1 average, p → ∞
    maximum.

    Source: Radenovic et al. 2019, eq. 2; p = 3 in SSCD (Pizzi et al. 2022).
    """
    return features.clamp(min=eps).pow(p).mean(dim=(2, 3)).pow(1.0 / p)


class Bottleneck(nn.Module):
    """Residual block 1×1, 3×3, 1×1; the stride is in the 3×3 convolution (the "v1.5" form)."""

    def __init__(self, channels: int, width: int, stride: int) -> None:
        super().__init__()
        expanded = width * EXPANSION
        self.conv1 = nn.Conv2d(channels, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, expanded, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(expanded)
        self.downsample: nn.Module = nn.Identity()
        if stride != 1 or channels != expanded:
            shortcut = nn.Conv2d(channels, expanded, 1, stride, bias=False)
            self.downsample = nn.Sequential(shortcut, nn.BatchNorm2d(expanded))

    def forward(self, features: Tensor) -> Tensor:
        branch = F.relu(self.bn1(self.conv1(features)))
        branch = F.relu(self.bn2(self.conv2(branch)))
        return F.relu(self.bn3(self.conv3(branch)) + self.downsample(features))


def stage(channels: int, width: int, blocks: int, stride: int) -> nn.Sequential:
    """One resolution: a strided block, then `blocks - 1` blocks at stride 1."""
    expanded = width * EXPANSION
    later = (Bottleneck(expanded, width, 1) for _ in range(blocks - 1))
    return nn.Sequential(Bottleneck(channels, width, stride), *later)


class ResNet50(nn.Module):
    """ResNet-50, GeM instead of average pooling, then a linear layer: [B, 3, H, W] to [B, dimension].

    Source: He et al. 2016, table 1; the stride placement is torchvision's.
    """

    def __init__(self, dimension: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        inputs = (64, *(width * EXPANSION for width, _, _ in STAGES))
        for number, (channels, layout) in enumerate(zip(inputs, STAGES, strict=False), start=1):
            self.add_module(f"layer{number}", stage(channels, *layout))
        self.fc = nn.Linear(inputs[-1], dimension)

    def features(self, images: Tensor) -> Tensor:
        """Last feature map, [B, 2048, H/32, W/32] (rounded up), non-negative."""
        features = F.max_pool2d(F.relu(self.bn1(self.conv1(images))), 3, stride=2, padding=1)
        for number in range(1, len(STAGES) + 1):
            features = self.get_submodule(f"layer{number}")(features)
        return features

    def forward(self, images: Tensor) -> Tensor:
        return self.fc(gem_pool(self.features(images)))
