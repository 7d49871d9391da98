"""How far two sets of pictures lie apart: pair by pair at the same noise, or as distributions of features (METHODS 4.3).

Features come from any named network; only with Inception-V3's pool features, on its own preprocessing, is the Frechet
distance what papers call FID. Name the network beside every figure, and never compare figures of different sizes n.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def pairwise_error(one: Tensor, two: Tensor) -> Tensor:
    """Root mean square difference [N] of pictures [N, 3, H, W] in [0, 1]: 0 where nothing changed."""
    _same(one, two)
    return (one - two).float().square().flatten(1).mean(1).sqrt()


def pairwise_cosine_distance(one: Tensor, two: Tensor) -> Tensor:
    """1 - cosine [N] of features [N, d]."""
    _same(one, two)
    return 1 - F.cosine_similarity(one.float(), two.float(), dim=1)


def perceptual_distance(one: list[Tensor], two: list[Tensor]) -> Tensor:
    """[N], of the feature maps [N, C, h, w] of several layers: unit vectors in C, squared differences, means over places,
    sums over layers. This is LPIPS (arXiv:1801.03924) without its learned weights."""
    total = torch.zeros(len(one[0]))
    for a, b in zip(one, two, strict=True):
        _same(a, b)
        gap = F.normalize(a.float(), dim=1) - F.normalize(b.float(), dim=1)
        total = total + gap.square().sum(1).flatten(1).mean(1).cpu()
    return total


def frechet_distance(one: Tensor, two: Tensor) -> float:
    """||m1 - m2||^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)) of Gaussians fitted to features [N, d] and [M, d] (arXiv:1706.08500).

    The trace of the root is the sum of singular values of A1 A2^T with Ci = Ai^T Ai: no matrix root, no complex parts.

    Raises:
        ValueError: fewer than two rows, or different widths.
    """
    _wide_enough(one, two)
    (m1, a1), (m2, a2) = (_moments(x) for x in (one, two))
    cross = torch.linalg.svdvals(a1 @ a2.T).sum()
    return max(0.0, float((m1 - m2).square().sum() + a1.square().sum() + a2.square().sum() - 2 * cross))


def _moments(x: Tensor) -> tuple[Tensor, Tensor]:
    x = x.double()
    mean = x.mean(0)
    return mean, (x - mean) / (len(x) - 1) ** 0.5


def kernel_distance(one: Tensor, two: Tensor, *, paired: bool = False) -> float:
    """The unbiased squared MMD with the kernel (x.y / d + 1)^3 (KID, arXiv:1801.01401); may be slightly below zero.

    Unlike the Frechet distance its expectation does not depend on the number of pictures.

    Args:
        paired: row i of both is of the same prompt and noise. The two are no independent samples then, so a picture isn't
            compared with its own pair either (Gretton et al., JMLR 2012, section 2.2): equal sets are at exactly 0.

    Raises:
        ValueError: fewer than two rows, different widths, or pairs that have no partner.
    """
    _wide_enough(one, two)
    if paired:
        _same(one, two)
    x, y = one.double(), two.double()
    xx, yy, xy = (_kernel(a, b) for a, b in ((x, x), (y, y), (x, y)))
    within = _off_diagonal(xx) + _off_diagonal(yy)
    return float(within - 2 * (_off_diagonal(xy) if paired else xy.mean()))


def _off_diagonal(matrix: Tensor) -> Tensor:
    n = len(matrix)
    return (matrix.sum() - matrix.diagonal().sum()) / (n * (n - 1))


def _kernel(x: Tensor, y: Tensor) -> Tensor:
    return (x @ y.T / x.shape[1] + 1) ** 3


def clip_score(pictures: Tensor, texts: Tensor) -> Tensor:
    """100 max(cos, 0) [N] of picture and text features [N, d] of one pair of towers (arXiv:2104.08718, times 100 / 2.5)."""
    _same(pictures, texts)
    return 100 * F.cosine_similarity(pictures.float(), texts.float(), dim=1).clamp_min(0)


def _same(one: Tensor, two: Tensor) -> None:
    if one.shape != two.shape:
        raise ValueError(f"distance: {tuple(one.shape)} and {tuple(two.shape)} must be pairs of the same shape")


def _wide_enough(one: Tensor, two: Tensor) -> None:
    if one.ndim != 2 or two.ndim != 2 or one.shape[1] != two.shape[1] or min(len(one), len(two)) < 2:
        raise ValueError(
            f"distance: features {tuple(one.shape)} and {tuple(two.shape)} must be [N, d] and [M, d], at least two rows each"
        )
