"""ResNet-20 for CIFAR-10 (He et al. 2016, section 4.2, option A shortcuts): a network that took no part in
training, guidance or the choice of any constant. Gives class accuracy, FID features and a copy judge.

Reads the state dict of the public repository akamaster/pytorch_resnet_cifar10 as safetensors, with keys
conv1, bn1, layer{1,2,3}.{0,1,2}.{conv,bn}{1,2}, linear.
"""

from __future__ import annotations

from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional

MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of RGB in [0, 1], as it was trained
WIDTHS = (16, 32, 64)


class Block(nn.Module):
    """Two 3x3 convolutions and a shortcut that has no weights: every second pixel, zeros as new channels."""

    def __init__(self, narrow: int, wide: int) -> None:
        super().__init__()
        self.stride = 1 if narrow == wide else 2
        self.conv1 = nn.Conv2d(narrow, wide, 3, self.stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(wide)
        self.conv2 = nn.Conv2d(wide, wide, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(wide)
        self.padding = (wide - narrow) // 2

    def forward(self, hidden: Tensor) -> Tensor:
        shortcut = hidden[:, :, :: self.stride, :: self.stride]
        shortcut = functional.pad(shortcut, (0, 0, 0, 0, self.padding, self.padding))
        hidden = functional.relu(self.bn1(self.conv1(hidden)))
        return functional.relu(self.bn2(self.conv2(hidden)) + shortcut)


class ResNet20(nn.Module):
    """Images float32 [B, 3, 32, 32] in [0, 1] -> logits [B, 10]; `features` [B, 64] for FID, `layout`
    [B, 2048] to tell copies."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, WIDTHS[0], 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(WIDTHS[0])
        stages = [
            nn.Sequential(Block(narrow, wide), Block(wide, wide), Block(wide, wide))
            for narrow, wide in zip((WIDTHS[0], *WIDTHS[:-1]), WIDTHS, strict=True)
        ]
        self.layer1, self.layer2, self.layer3 = stages
        self.linear = nn.Linear(WIDTHS[-1], 10)

    def middle(self, images: Tensor) -> Tensor:
        """The maps after the second stage, float32 [B, 32, 16, 16]."""
        mean, deviation = (images.new_tensor(v).view(1, 3, 1, 1) for v in (MEAN, DEVIATION))
        hidden = functional.relu(self.bn1(self.conv1((images - mean) / deviation)))
        return self.layer2(self.layer1(hidden))

    def layout(self, images: Tensor) -> Tensor:
        """The second stage's maps averaged to 8x8, float32 [B, 2048]: what is where. The pooled features of
        two pictures of a class are alike whatever they show, these are not."""
        return functional.avg_pool2d(self.middle(images), 2).flatten(1)

    def features(self, images: Tensor) -> Tensor:
        """Average-pooled features of the last stage, float32 [B, 64]."""
        return self.layer3(self.middle(images)).mean((2, 3))

    def forward(self, images: Tensor) -> Tensor:
        return self.linear(self.features(images))


def load_resnet20(path: Path) -> ResNet20:
    """The network with the weights of a safetensors file, in evaluation mode, without gradients."""
    if not path.is_file():
        raise FileNotFoundError(f"`--resnet` must be ResNet-20's weights as safetensors, got {path}")
    network = ResNet20()
    network.load_state_dict(load_file(path))
    return network.eval().requires_grad_(False)
