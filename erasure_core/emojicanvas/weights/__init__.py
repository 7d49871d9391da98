"""The bundled weights."""

from pathlib import Path

BUNDLE = Path(__file__).parent / "emojicanvas.safetensors"
"""Text encoder, UNet and autoencoder of EmojiCanvas, float16."""

JUDGE = Path(__file__).parent / "judge.safetensors"
"""The independent classifier that scores its pictures, float16."""
