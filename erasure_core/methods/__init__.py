"""Erasure methods, one file each. See registry.py for how they are found."""

from .registry import Aids, MethodSpec, Progress, all_methods, setting, settings_from

__all__ = ["Aids", "MethodSpec", "Progress", "all_methods", "setting", "settings_from"]
