"""Figures about pictures; nothing in here knows of erasure methods."""

from .rates import Rate, pooled, rate

__all__ = ["Rate", "pooled", "rate"]
