"""The Stable Diffusion 1.x UNet in plain torch, with the parameter names of the original checkpoint files.

One file of weights therefore serves this class and ComfyUI's ``UNetModel``. Only what SD 1.x uses is here:
conv-projected spatial transformers, GEGLU feed-forward, sinusoidal time embedding, no class labels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn


@dataclass(frozen=True)
class UNetConfig:
    """``depth`` is the number of transformer blocks behind each residual block of a level (0 = no attention)."""

    model_channels: int = 64
    channel_mult: tuple[int, ...] = (1, 2, 3)
    num_res_blocks: int = 1
    depth: tuple[int, ...] = (0, 1, 1)
    context_dim: int = 128
    num_heads: int = 4
    channels: int = 4

    def comfy(self) -> dict:
        """The same network in the words of ComfyUI's ``unet_config``."""
        down = [d for d in self.depth for _ in range(self.num_res_blocks)]
        up = [d for d in self.depth for _ in range(self.num_res_blocks + 1)]
        return {
            "image_size": 32,
            "in_channels": self.channels,
            "out_channels": self.channels,
            "model_channels": self.model_channels,
            "num_res_blocks": [self.num_res_blocks] * len(self.channel_mult),
            "channel_mult": list(self.channel_mult),
            "transformer_depth": down,
            "transformer_depth_output": up,
            "transformer_depth_middle": 1,
            "context_dim": self.context_dim,
            "use_spatial_transformer": True,
            "use_linear_in_transformer": False,
            "use_checkpoint": False,
            "legacy": False,
            "adm_in_channels": None,
            "use_temporal_attention": False,
            "use_temporal_resblock": False,
        }


def timestep_embedding(t: Tensor, dim: int, max_period: float = 10000.0) -> Tensor:
    """[B] -> [B, dim]: cosines, then sines."""
    half = dim // 2
    frequencies = torch.exp(-math.log(max_period) * torch.arange(half, dtype=torch.float32, device=t.device) / half)
    angles = t[:, None].float() * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


class ResBlock(nn.Module):
    def __init__(self, c_in: int, c_out: int, c_emb: int) -> None:
        super().__init__()
        self.in_layers = nn.Sequential(nn.GroupNorm(32, c_in), nn.SiLU(), nn.Conv2d(c_in, c_out, 3, padding=1))
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(c_emb, c_out))
        self.out_layers = nn.Sequential(
            nn.GroupNorm(32, c_out), nn.SiLU(), nn.Dropout(0.0), nn.Conv2d(c_out, c_out, 3, padding=1)
        )
        self.skip_connection = nn.Identity() if c_in == c_out else nn.Conv2d(c_in, c_out, 1)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        h = self.in_layers(x) + self.emb_layers(emb)[..., None, None]
        return self.skip_connection(x) + self.out_layers(h)


class CrossAttention(nn.Module):
    def __init__(self, dim: int, context_dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(dim, dim, bias=False)
        self.to_k = nn.Linear(context_dim, dim, bias=False)
        self.to_v = nn.Linear(context_dim, dim, bias=False)
        self.to_out = nn.Sequential(nn.Linear(dim, dim), nn.Dropout(0.0))

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        q, k, v = self.to_q(x), self.to_k(context), self.to_v(context)
        q, k, v = (rearrange(y, "b n (h d) -> b h n d", h=self.heads) for y in (q, k, v))
        return self.to_out(rearrange(F.scaled_dot_product_attention(q, k, v), "b h n d -> b n (h d)"))


class GEGLU(nn.Module):
    def __init__(self, dim: int, inner: int) -> None:
        super().__init__()
        self.proj = nn.Linear(dim, 2 * inner)

    def forward(self, x: Tensor) -> Tensor:
        x, gate = self.proj(x).chunk(2, dim=-1)
        return x * F.gelu(gate)


class FeedForward(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.net = nn.Sequential(GEGLU(dim, 4 * dim), nn.Dropout(0.0), nn.Linear(4 * dim, dim))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class TransformerBlock(nn.Module):
    def __init__(self, dim: int, context_dim: int, heads: int) -> None:
        super().__init__()
        self.attn1 = CrossAttention(dim, dim, heads)
        self.ff = FeedForward(dim)
        self.attn2 = CrossAttention(dim, context_dim, heads)
        self.norm1, self.norm2, self.norm3 = nn.LayerNorm(dim), nn.LayerNorm(dim), nn.LayerNorm(dim)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        n = self.norm1(x)
        x = x + self.attn1(n, n)
        x = x + self.attn2(self.norm2(x), context)
        return x + self.ff(self.norm3(x))


class SpatialTransformer(nn.Module):
    def __init__(self, dim: int, context_dim: int, heads: int, depth: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(32, dim, eps=1e-6)
        self.proj_in = nn.Conv2d(dim, dim, 1)
        self.transformer_blocks = nn.ModuleList(TransformerBlock(dim, context_dim, heads) for _ in range(depth))
        self.proj_out = nn.Conv2d(dim, dim, 1)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        h = self.proj_in(self.norm(x))
        tokens = rearrange(h, "b c h w -> b (h w) c")
        for block in self.transformer_blocks:
            tokens = block(tokens, context)
        return x + self.proj_out(rearrange(tokens, "b (h w) c -> b c h w", h=x.shape[2]))


class Downsample(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.op = nn.Conv2d(dim, dim, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.op(x)


class Upsample(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(dim, dim, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class _Stage(nn.Sequential):
    """A list of layers that take what they need of (x, time embedding, context)."""

    def forward(self, x: Tensor, emb: Tensor, context: Tensor) -> Tensor:
        for layer in self:
            if isinstance(layer, ResBlock):
                x = layer(x, emb)
            elif isinstance(layer, SpatialTransformer):
                x = layer(x, context)
            else:
                x = layer(x)
        return x


class UNet(nn.Module):
    """eps = UNet(config)(z, t, context)."""

    def __init__(self, config: UNetConfig | None = None) -> None:
        super().__init__()
        self.config = c = config or UNetConfig()
        c_emb = 4 * c.model_channels
        widths = [m * c.model_channels for m in c.channel_mult]
        self.time_embed = nn.Sequential(nn.Linear(c.model_channels, c_emb), nn.SiLU(), nn.Linear(c_emb, c_emb))

        def attention(dim: int, depth: int) -> Sequence[nn.Module]:
            return [SpatialTransformer(dim, c.context_dim, c.num_heads, depth)] if depth else []

        self.input_blocks = nn.ModuleList([_Stage(nn.Conv2d(c.channels, widths[0], 3, padding=1))])
        skips, ch = [widths[0]], widths[0]
        for level, width in enumerate(widths):
            for _ in range(c.num_res_blocks):
                self.input_blocks.append(_Stage(ResBlock(ch, width, c_emb), *attention(width, c.depth[level])))
                ch = width
                skips.append(ch)
            if level + 1 < len(widths):
                self.input_blocks.append(_Stage(Downsample(ch)))
                skips.append(ch)
        self.middle_block = _Stage(ResBlock(ch, ch, c_emb), *attention(ch, 1), ResBlock(ch, ch, c_emb))
        self.output_blocks = nn.ModuleList()
        for level, width in reversed(list(enumerate(widths))):
            for i in range(c.num_res_blocks + 1):
                layers = [ResBlock(ch + skips.pop(), width, c_emb), *attention(width, c.depth[level])]
                ch = width
                if level and i == c.num_res_blocks:
                    layers.append(Upsample(ch))
                self.output_blocks.append(_Stage(*layers))
        self.out = nn.Sequential(nn.GroupNorm(32, ch), nn.SiLU(), nn.Conv2d(ch, c.channels, 3, padding=1))

    def forward(self, z: Tensor, t: Tensor, context: Tensor) -> Tensor:
        """z [B, C, h, w], t [B] in 0..999, context [B, L, D] -> predicted noise [B, C, h, w]."""
        embedding = timestep_embedding(t, self.config.model_channels).to(z.dtype)
        emb = self.time_embed(embedding)
        skips, h = [], z
        for stage in self.input_blocks:
            h = stage(h, emb, context)
            skips.append(h)
        h = self.middle_block(h, emb, context)
        for stage in self.output_blocks:
            h = stage(torch.cat([h, skips.pop()], dim=1), emb, context)
        return self.out(h)
