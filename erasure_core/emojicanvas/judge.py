"""The judge: a small network that names the object and the style of a picture, or says that it shows neither.

It scores what a model draws before and after an erasure, so it must not be kind: broken, blended and blurred
pictures are trained to be "other". It never saw the drawings of ``drawings.HELD_OUT_SET``.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ..metrics.rates import Rate
from .concepts import IMAGE_SIZE, OBJECTS, STYLES
from .weights import JUDGE

OTHER = "other"
_SIDE = 64  # pictures are averaged down to this before the network sees them
_WIDTHS = (32, 64, 128, 192)


_HELD_OUT = 720
"""Pictures of the held-out set, where a file doesn't say: 24 objects, 30 each (docs/emojicanvas.md)."""


class JudgeError(ValueError):
    """A file of judge weights doesn't belong to this version of the concepts."""


@dataclass(frozen=True)
class Verdict:
    """What the judge says of B pictures: probabilities ``objects`` [B, 25] and ``styles`` [B, 6]."""

    objects: Tensor
    styles: Tensor
    object_labels: tuple[str, ...]
    style_labels: tuple[str, ...]
    threshold: float

    def _of(self, name: str) -> tuple[Tensor, int]:
        if name in self.object_labels and name != OTHER:
            return self.objects, self.object_labels.index(name)
        if name in self.style_labels and name != OTHER:
            return self.styles, self.style_labels.index(name)
        raise ValueError(f"judge: {name!r} is neither an object nor a style that it knows")

    def probability(self, name: str) -> Tensor:
        """[B] probability of an object or a style."""
        probabilities, index = self._of(name)
        return probabilities[:, index]

    def shows(self, name: str) -> Tensor:
        """[B] bool: ``name`` is the likeliest label, and its probability reaches the threshold."""
        probabilities, index = self._of(name)
        best, where = probabilities.max(1)
        return (where == index) & (best >= self.threshold)


class _Block(nn.Module):
    """Two convolutions beside a shortcut; halves the sides where ``stride`` is 2."""

    def __init__(self, c_in: int, c_out: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(c_in, c_out, 3, stride, 1, bias=False), nn.BatchNorm2d(c_out)
        self.conv2, self.norm2 = nn.Conv2d(c_out, c_out, 3, 1, 1, bias=False), nn.BatchNorm2d(c_out)
        self.shortcut = (
            nn.Identity() if c_in == c_out and stride == 1 else nn.Conv2d(c_in, c_out, 1, stride, bias=False)
        )

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x)))))
        return F.relu(h + self.shortcut(x))


class Judge(nn.Module):
    """verdict = Judge.load()(pictures); ``forward`` gives logits, calling :meth:`judge` gives a :class:`Verdict`."""

    name = "emojicanvas-judge"
    version = "2"

    def __init__(self, threshold: float = 0.5) -> None:
        super().__init__()
        self.object_labels = (*(o.name for o in OBJECTS), OTHER)
        self.style_labels = (*(s.name for s in STYLES), OTHER)
        self.threshold = threshold
        self.held_out = {"object": Rate(0, 0), "style": Rate(0, 0)}
        """Drawings of a set that it never saw whose object it recognises: its hit rate."""
        self.mistaken = {"object": Rate(0, 0), "style": Rate(0, 0)}
        """Of these, drawings of something else that it takes for one and the same label, on average: its false alarms."""
        self.stem = nn.Conv2d(3, _WIDTHS[0], 5, 2, 2, bias=False)
        self.stem_norm = nn.BatchNorm2d(_WIDTHS[0])
        widths = zip((_WIDTHS[0], *_WIDTHS), _WIDTHS, strict=False)
        self.blocks = nn.Sequential(*(_Block(a, b, 1 if i == 0 else 2) for i, (a, b) in enumerate(widths)))
        self.object_head = nn.Linear(_WIDTHS[-1], len(self.object_labels))
        # Styles are textures: the head also sees the features before they are pooled to 8 x 8 and 4 x 4.
        self.style_head = nn.Linear(_WIDTHS[-1] + _WIDTHS[0] + _WIDTHS[1], len(self.style_labels))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Pictures [B, 3, 64, 64] in [-1, 1] -> logits of objects [B, 25] and styles [B, 6]."""
        x = F.relu(self.stem_norm(self.stem(x)))
        pooled = []
        for block in self.blocks:
            x = block(x)
            pooled.append(x.mean((2, 3)))
        return self.object_head(pooled[-1]), self.style_head(torch.cat([pooled[-1], pooled[0], pooled[1]], 1))

    @torch.no_grad()
    def probabilities(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Pictures as for :meth:`forward` -> probabilities of objects and styles, averaged over the mirror image."""
        objects, styles = self(torch.cat([x, x.flip(3)]))
        return objects.softmax(1).unflatten(0, (2, -1)).mean(0), styles.softmax(1).unflatten(0, (2, -1)).mean(0)

    @torch.no_grad()
    def judge(self, pictures: Tensor, batch: int = 128) -> Verdict:
        """The verdict on pictures [B, 3, 128, 128] in [-1, 1]. The network must be in eval mode."""
        if pictures.ndim != 4 or pictures.shape[1:] != (3, IMAGE_SIZE, IMAGE_SIZE):
            raise ValueError(
                f"judge: expected pictures [B, 3, {IMAGE_SIZE}, {IMAGE_SIZE}], got {tuple(pictures.shape)}"
            )
        objects, styles = [torch.empty(0, len(self.object_labels))], [torch.empty(0, len(self.style_labels))]
        for part in pictures.split(batch):
            o, s = self.probabilities(shrink(part.float().clamp(-1, 1)))
            objects.append(o)
            styles.append(s)
        return Verdict(torch.cat(objects), torch.cat(styles), self.object_labels, self.style_labels, self.threshold)

    def save(self, path: Path = JUDGE, *, notes: dict[str, object] | None = None) -> None:
        """Write fp16 weights; labels, threshold and ``notes`` (how it was trained) go in the header."""
        state = {
            k: v.half().contiguous() for k, v in self.state_dict().items() if not k.endswith("num_batches_tracked")
        }
        metadata = {
            "name": self.name,
            "version": self.version,
            "objects": json.dumps(self.object_labels),
            "styles": json.dumps(self.style_labels),
            "threshold": str(self.threshold),
            "notes": json.dumps(notes or {}),
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(state, path, metadata)

    @classmethod
    def load(cls, path: Path = JUDGE) -> Judge:
        """The judge in eval mode, float32.

        Raises:
            JudgeError: it was trained for other labels than the present lists of concepts.
        """
        with safe_open(path, framework="pt") as f:
            metadata = f.metadata() or {}
            judge = cls(float(metadata.get("threshold", 0.5)))
            _check_labels(path, "objects", metadata, judge.object_labels)
            _check_labels(path, "styles", metadata, judge.style_labels)
            notes = json.loads(metadata.get("notes", "{}"))
            if "objects" in notes:
                n = int(notes.get("pictures", _HELD_OUT))
                shown = {"object": notes["objects_shown"], "style": notes["styles"]}
                judge.held_out = {kind: Rate(round(share * n), n) for kind, share in shown.items()}
                named = {"object": (notes["objects"], len(OBJECTS)), "style": (notes["styles"], len(STYLES))}
                judge.mistaken = {kind: _mistaken(n, right, labels) for kind, (right, labels) in named.items()}
            judge.load_state_dict({k: f.get_tensor(k).float() for k in f.keys()}, strict=False)  # noqa: SIM118
            missing = {k for k in judge.state_dict() if not k.endswith("num_batches_tracked")} - set(f.keys())
        if missing:
            raise JudgeError(f"{path.name}: {len(missing)} weights are missing, first {min(missing)}")
        return judge.eval()


def shrink(pictures: Tensor) -> Tensor:
    """[B, 3, 128, 128] -> [B, 3, 64, 64], the mean of each 2 x 2 square."""
    return F.avg_pool2d(pictures, IMAGE_SIZE // _SIDE)


def _mistaken(n: int, right: float, labels: int) -> Rate:
    """False alarms of one label: the wrong ones of ``n`` drawings, spread over all labels, of the drawings of other things."""
    return Rate(round(n * (1 - right) / labels), n - n // labels)


def _check_labels(path: Path, kind: str, metadata: dict[str, str], expected: Sequence[str]) -> None:
    found = json.loads(metadata.get(kind, "[]"))
    if found != list(expected):
        raise JudgeError(f"{path.name}: trained for other {kind} than concepts.py lists. Run train_judge again")
