"""What Erase Concept says of a request beside the erasure itself."""

from __future__ import annotations

import re
from functools import cache
from typing import Any

import comfy.sd1_clip

from ..erasure_core import ConceptSpec
from ..erasure_core.dark import DarkEmbeddings
from ..erasure_core.emojicanvas.concepts import caption_words
from ..erasure_core.emojicanvas.testbed import TESTBED
from ..erasure_core.methods import MethodSpec
from ..erasure_core.port import Family
from .attack_report import plain
from .patching import carried
from .port import BOS, EOS, ComfyPort


def note_for_demo(port: ComfyPort, chosen: MethodSpec, settings: Any) -> str:
    """What the method takes on the demo model, where it runs there with its defaults, which are made for large ones."""
    usual, fits = plain(chosen.settings()), TESTBED.get(chosen.name, {})
    left = {k: v for k, v in fits.items() if plain(settings)[k] == usual[k] != v}
    if port.family.name != "emojicanvas" or not left:
        return ""
    better = ", ".join(f"{k} {v}" for k, v in left.items())
    return f"note: these settings are made for large models. For the demo model set {better}"


@cache
def _tokenizer() -> comfy.sd1_clip.SDTokenizer:
    """The words of every text encoder that this pack works with."""
    return comfy.sd1_clip.SDTokenizer()


def _pieces(word: str) -> int:
    tokens = [token[0] for section in _tokenizer().tokenize_with_weights(word) for token in section]
    return sum(token not in (BOS, EOS) for token in tokens)


def doubted(spec: ConceptSpec, family: Family) -> dict[str, str]:
    """Words to erase of which the text encoder may know nothing, with a note on each: it reads English, and takes what it does
    not know apart. Of the demo model's all words are known."""
    notes = {}
    for word in (word for concept in spec.erase for word in concept.words if "embedding:" not in word):
        if family.name == "emojicanvas":
            if not caption_words().issuperset(word.casefold().split()):
                notes[word] = (
                    f"note: the demo model never learned {word!r}. Its words stand in erasure_core/emojicanvas/concepts.py"
                )
        elif not word.isascii():
            notes[word] = (
                f"note: {word!r} is not in plain letters, and this text encoder reads English: add the English word"
            )
        elif (pieces := _pieces(word)) > 2 * len(re.findall(r"\w+", word)):
            notes[word] = f"note: {word!r} is read in {pieces} pieces, as unknown words are: check the spelling"
    return notes


def check_not_made(model, name: str, spec: ConceptSpec, settings: Any) -> None:
    """Raise where ``model`` carries what would be computed: better now than after a training."""
    for header in carried(model):
        same = all(header.settings.get(k) == v for k, v in plain(settings).items())
        if (header.method, header.spec) == (name, spec) and same:
            raise ValueError(
                f"model: it carries this erasure of {spec.erase[0].name} already. Connect the model from before it, for "
                "example that of the checkpoint loader"
            )


def told_of_dark(dark: DarkEmbeddings | None, spec: ConceptSpec, chosen: MethodSpec) -> str:
    """What the input *dark* added to the request."""
    if dark is None or "dark" in chosen.unread:
        return ""
    count = len(dark.for_request(spec)[0])
    said = f"dark: {count} embeddings that bring {dark.concept} back were erased like further words"
    if not any(spec.erases(word) for concept in dark.header.spec.erase for word in concept.words):
        said += f"\nnote: {dark.concept} is none of the concepts here. If that is a slip, connect others"
    return said
