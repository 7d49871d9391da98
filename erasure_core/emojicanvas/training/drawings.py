"""The drawings: emoji sets from npm packages, joined by emojibase labels.

``fetch`` downloads the packages with ``npm pack`` (their licences are listed in docs/CREDITS.md);
nothing of them is committed, only the weights trained on the first five.
"""

from __future__ import annotations

import json
import subprocess
import tarfile
from functools import cache
from pathlib import Path

PAINTED_SETS = ("noto", "twemoji", "fluent-emoji-flat", "emojione", "noto-v1")
"""Sets that the diffusion model learns to draw."""
MONOCHROME_SETS = ("fluent-emoji-high-contrast", "emojione-monotone")
"""Black on white, so of no style that the model knows; for the judge's sense of shapes."""
JUDGE_ONLY_SETS = ("fxemoji", "openmoji", "emojione-v1", "fluent-emoji", "streamline-emojis", *MONOCHROME_SETS)
"""Further sets that only the judge sees (two are CC-BY-SA: nothing of them is shipped)."""
ICON_SETS = ("game-icons", "mdi", "ph", "fa6-solid", "tabler", "icon-park")
"""Icons in one colour or two, known by their own names; for the judge's sense of shapes, too."""
HELD_OUT_SET = "twemoji"
"""The set that the judge never trains on."""

_VERSIONS = {
    "noto": "1.2.9",
    "noto-v1": "1.2.5",
    "twemoji": "1.2.5",
    "fluent-emoji-flat": "1.2.6",
    "emojione": "1.2.3",
    "fxemoji": "1.2.2",
    "openmoji": "1.2.29",
    "emojione-v1": "1.2.3",
    "fluent-emoji": "1.2.7",
    "streamline-emojis": "1.2.4",
    "fluent-emoji-high-contrast": "1.2.6",
    "emojione-monotone": "1.2.1",
    "game-icons": "1.2.4",
    "mdi": "1.2.3",
    "ph": "1.2.2",
    "fa6-solid": "1.2.4",
    "tabler": "1.2.41",
    "icon-park": "1.2.4",
}
_EMOJIBASE = "emojibase-data@17.0.0"


def fetch(folder: Path) -> None:
    """Download and unpack the npm packages into ``folder`` (once; needs npm on the PATH)."""
    folder.mkdir(parents=True, exist_ok=True)
    wanted = {name: f"@iconify-json/{name}@{version}" for name, version in _VERSIONS.items()}
    wanted["emojibase"] = _EMOJIBASE
    for name, package in wanted.items():
        if (folder / name).is_dir():
            continue
        tarball = subprocess.run(
            ["npm", "pack", "--silent", package], cwd=folder, check=True, capture_output=True, text=True
        ).stdout.strip()
        with tarfile.open(folder / tarball) as archive:
            archive.extractall(folder / name, filter="data")
        (folder / tarball).unlink()


@cache
def _labels(folder: Path) -> dict[str, str]:
    entries = json.loads((folder / "emojibase/package/en/data.json").read_text(encoding="utf-8"))
    return {e["label"]: e["hexcode"].lower().replace("-fe0f", "") for e in entries}


@cache
def _set(folder: Path, name: str) -> tuple[dict, dict]:
    package = folder / name / "package"
    chars = package / "chars.json"
    by_code = json.loads(chars.read_text(encoding="utf-8")) if chars.exists() else {}
    return json.loads((package / "icons.json").read_text(encoding="utf-8")), by_code


def labels(folder: Path) -> list[str]:
    """All emojibase labels, in emoji order."""
    return list(_labels(folder))


def svg(folder: Path, set_name: str, label: str) -> str | None:
    """The SVG of one emoji (by its label, or by its name in the set), or None where the set doesn't draw it."""
    icons, by_code = _set(folder, set_name)
    slug = label.replace(" ", "-")
    for key in (by_code.get(_labels(folder).get(label, "")), slug, slug.replace("-", "")):
        while key in icons.get("aliases", {}) and key not in icons["icons"]:
            key = icons["aliases"][key]["parent"]
        if key in icons["icons"]:
            break
    else:
        return None
    icon = icons["icons"][key]
    left, top = icon.get("left", 0), icon.get("top", 0)
    width = icon.get("width", icons.get("width", 16))
    height = icon.get("height", icons.get("height", 16))
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'viewBox="{left} {top} {width} {height}">{icon["body"]}</svg>'
    )
