"""Erasure methods, one file each. See registry.py for how they are found."""

from .registry import MethodSpec, Progress, all_methods, setting, settings_from

__all__ = ["MethodSpec", "Progress", "all_methods", "setting", "settings_from"]
