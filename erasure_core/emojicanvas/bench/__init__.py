"""EmojiCanvas, what erasing changes about it and what attacks bring back, measured: ``python -m`` with this package's name."""
