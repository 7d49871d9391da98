"""What moving models between devices does to them, seen without a second device."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import contextmanager

import comfy.model_management as mm
import torch

from .attacks import Probe, pack


@contextmanager
def giving_new_memory():
    """Every move of a module gives its parameters new memory, as one between a CPU and a GPU does."""
    plain = torch.nn.Module.to

    def move(module, *args, **kwargs):
        if args and isinstance(args[0], str | torch.device):
            return module._apply(torch.clone)
        return plain(module, *args, **kwargs)

    torch.nn.Module.to = move
    try:
        yield
    finally:
        torch.nn.Module.to = plain


def _fails(what: Callable[[], object]) -> str:
    try:
        what()
    except RuntimeError as error:
        return str(error).splitlines()[0]
    return ""


class Moves(Probe):
    """Models of the demo that this pack loads, unloads and asks, each time followed by a stock node's call, by name: the error,
    or nothing."""

    INPUT_TYPES = classmethod(lambda cls: {"required": {}})

    def run(self):
        modes, port, sampling, training = (pack(f"nodes.{x}") for x in ("modes", "port", "sampling", "training"))
        mine, towers, replica = (pack(f"nodes.{x}") for x in ("mine", "towers", "replica"))
        model, clip, vae = pack("nodes.demo").load_demo()
        latents, pictures, how = torch.zeros(1, 4, 16, 16), torch.zeros(1, 128, 128, 3), sampling.Drawing(1, 1.0)
        need = replica.Footprint(0, 0, 0, 0, 0, 0, 0)

        def sample():
            prompt = sampling.encode(clip, "a cat")
            return sampling.sample(model, prompt, prompt, [1], how)

        # of ours, and of the stock node that comes behind it
        def encode():
            return clip.encode_from_tokens(clip.tokenize("a dog"))

        def decode():
            return vae.decode(latents)

        pairs = {
            "text": (lambda: port.ComfyPort(model, clip).text(["a cat"]), encode),
            "pseudo-words": (lambda: towers.pseudo_words(clip, 1), encode),
            "conditioning": (lambda: mine.conditioning_of(clip, torch.zeros(77, 128), "emojicanvas"), encode),
            "preview": (lambda: training.decoder(model, vae)(latents), decode),
            "pictures in": (lambda: mine.latents_of(model, vae, "emojicanvas", pictures), decode),
            "pictures out": (lambda: sampling.decode(vae, latents), decode),
            "sampling": (sample, sample),
            "prediction": (
                lambda: port.ComfyPort(model, clip).predict(latents, torch.tensor([500]), torch.zeros(1, 77, 128)), sample,
            ),
            "room": (lambda: replica._fit(need, False, torch.device("cpu"), "", 2), sample),
        }  # fmt: skip
        found = {}
        with giving_new_memory():
            for name, (ours, stock) in pairs.items():
                mm.unload_all_models()  # in ComfyUI's own mode, which mends what was broken before
                if name == "room":
                    stock()
                with modes.ordinary_tensors():
                    found[name] = _fails(ours)
                found[f"stock after {name}"] = _fails(stock)
            mm.unload_all_models()
        return self.answer(found)


NODES = (Moves,)
