"""Values from files that anybody may have written: types, sizes and characters are checked before anything is used."""

from __future__ import annotations

import json
import math
from typing import Any

from .concept import clean

MAX_JSON_CHARACTERS = 1 << 20
MAX_FIELDS = 100
MAX_TEXT = 1 << 16
"""Of a setting: a vocabulary of some thousand words."""

OR_NEWER = ". The file is damaged, or newer: update Concept Erasure"
"""Ends what is said of a value that a later version may know."""


class FileError(ValueError):
    """A file can't be read or written as an erasure; the message names the file, the fault, and what to do."""


class OtherKindError(FileError):
    """A whole file, but not one of ours, or of another kind of ours."""


class Checked:
    """Reads parsed JSON for one kind of text; ``where`` is the name that its errors begin with.

    Every method returns the value as what it should be, or raises :class:`FileError` with the name of the field.
    """

    def __init__(self, where: str) -> None:
        self.where = where

    def wrong(self, message: str) -> FileError:
        return FileError(f"{self.where}: {message}")

    def parse(self, text: str, limit: int = MAX_JSON_CHARACTERS) -> dict[str, Any]:
        """The object that ``text`` is the JSON of."""
        if len(text) > limit:
            raise self.wrong(f"{len(text)} characters, at most {limit} are read")
        try:
            raw = json.loads(text)
        except (ValueError, RecursionError) as error:  # ValueError: also numbers of thousands of digits
            raise self.wrong(f"it is not valid JSON ({type(error).__name__})") from None
        return self.fields(raw, "it")

    def text(self, value: Any, what: str, limit: int = 2000) -> str:
        """Without characters that can't be seen; markup stays what it is, text."""
        if not isinstance(value, str) or len(value) > limit:
            raise self.wrong(f"{what} must be text of at most {limit} characters")
        return clean(value)

    def whole(self, value: Any, what: str, low: int, high: int) -> int:
        if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
            raise self.wrong(f"{what} must be a whole number from {low} to {high}")
        return value

    def number(self, value: Any, what: str, low: float, high: float) -> float:
        if not isinstance(value, int | float) or isinstance(value, bool) or not low <= value <= high:  # NaN too
            raise self.wrong(f"{what} must be a number from {low:g} to {high:g}")
        return float(value)

    def flag(self, value: Any, what: str) -> bool:
        if not isinstance(value, bool):
            raise self.wrong(f"{what} is not true or false")
        return value

    def entries(self, value: Any, what: str, limit: int) -> list[Any]:
        if not isinstance(value, list) or len(value) > limit:
            raise self.wrong(f"{what} must be a list of at most {limit} entries")
        return value

    def fields(self, value: Any, what: str) -> dict[str, Any]:
        if not isinstance(value, dict) or len(value) > MAX_FIELDS:
            raise self.wrong(f"{what} must be an object")
        return value

    def plain(self, value: Any, what: str) -> dict[str, Any]:
        """Short plain values by short names, as settings are."""
        values = self.fields(value, what)
        for key, x in values.items():
            plain = isinstance(x, str | bool | int) or (isinstance(x, float) and math.isfinite(x))
            if not plain or len(key) > 100 or not _short(x):
                raise self.wrong(f"{what} must be short plain values")
        return {clean(key): clean(x) if isinstance(x, str) else x for key, x in values.items()}


def _short(value: str | bool | int | float) -> bool:
    return abs(value) < 1 << 64 if isinstance(value, int) else len(str(value)) <= MAX_TEXT
