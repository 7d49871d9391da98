"""What Save nodes of this pack have written, as Load nodes list and find it."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import folder_paths

from ..erasure_core import FileError


@dataclass(frozen=True)
class Saved:
    """One kind of file. Entries of lists are ``folder/file``, or the bare file where ``bare``."""

    what: str
    """For "no ... saved yet"."""
    node: str
    """What saves it."""
    folders: tuple[str, ...]
    read_header: Callable[[str], object]
    """Reads no tensor; raises FileError where the file is of another kind."""
    bare: bool = False

    @property
    def nothing(self) -> str:
        """The only entry of an empty list."""
        return f"(no {self.what} saved yet)"

    @property
    def places(self) -> str:
        return " or ".join(f"models/{folder}" for folder in self.folders)

    def options(self) -> list[str]:
        """The entries of all files of this kind, newest first."""
        found: list[tuple[float, str]] = []
        for folder in self.folders:
            for name in folder_paths.get_filename_list(folder):
                path = folder_paths.get_full_path(folder, name)
                if path is None or not name.endswith(".safetensors"):
                    continue
                stat = os.stat(path)
                if _is_of_kind(self.read_header, path, stat.st_mtime, stat.st_size):
                    found.append((stat.st_mtime, name if self.bare else f"{folder}/{name}"))
        return [entry for _, entry in sorted(found, reverse=True)] or [self.nothing]

    def path(self, file: str) -> str:
        """Of an entry; only files that ComfyUI itself lists are reachable.

        Raises:
            FileError: it isn't one; says what to do.
        """
        if file == self.nothing:
            raise FileError(
                f"file: nothing is saved yet in {self.places}. Run {self.node}, then press R and choose the file from the list"
            )
        folder, _, name = (self.folders[0], "", file) if self.bare else file.partition("/")
        listed = folder in self.folders and name in folder_paths.get_filename_list(folder)
        path = folder_paths.get_full_path(folder, name) if listed else None
        if path is None:
            raise FileError(
                f"file: {file[:80]!r} is not in {self.places}. Put it there and press R, or choose another "
                "from the list"
            )
        return path

    def check(self, file: str | None) -> bool | str:
        """What a Load node's ``validate_inputs`` answers; None is linked: known only when the graph runs."""
        try:
            if file is not None:
                self.path(file)
        except FileError as error:
            return str(error)
        return True

    def stamp(self, file: str) -> str:
        """Another one after each writing: a Load node's ``fingerprint_inputs``."""
        stat = os.stat(self.path(file))
        return f"{stat.st_mtime_ns}:{stat.st_size}"


@lru_cache(maxsize=8192)
def _is_of_kind(read_header: Callable[[str], object], path: str, modified: float, size: int) -> bool:
    """Read once for each state of a file: there may be thousands of LoRAs."""
    try:
        read_header(path)
    except (FileError, OSError):
        return False
    return True
