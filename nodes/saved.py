"""What Save nodes of this pack have written, as Load nodes list and find it."""

from __future__ import annotations

import os
import unicodedata
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import folder_paths

from ..erasure_core import FileError
from ..erasure_core.checked import OtherKindError
from ..erasure_core.formats import check_file_name, opened

_SUFFIX = ".safetensors"
LINKED = "linked"
"""Fingerprint of a file whose name comes over a link: known only when the graph runs."""


@dataclass(frozen=True)
class Saved:
    """One kind of file. Entries of lists are ``folder/file``, or the bare file where ``bare``; always with ``/``."""

    what: str
    """For "no ... saved yet"."""
    node: str
    """What saves it."""
    folders: tuple[str, ...]
    read_header: Callable[[str], object]
    """Reads no tensor; raises OtherKindError where the file is of another kind, FileError where it can't be read."""
    bare: bool = False

    @property
    def nothing(self) -> str:
        """The only entry of an empty list."""
        return f"(no {self.what} saved yet)"

    @property
    def places(self) -> str:
        return " or ".join(f"models/{folder}" for folder in self.folders)

    def _listed(self) -> dict[str, tuple[str, str]]:
        """Folder and path of all entries, of whatever kind, as ComfyUI lists them: nothing else is reachable."""
        found = {}
        for folder in self.folders:
            for name in folder_paths.get_filename_list(folder):
                path = folder_paths.get_full_path(folder, name)
                if path is not None and name.lower().endswith(_SUFFIX):
                    found[portable(name if self.bare else f"{folder}/{name}")] = folder, path
        return found

    def _of_kind(self) -> dict[str, float]:
        """When each file of this kind was written, by its entry."""
        found = {}
        for entry, (folder, path) in self._listed().items():
            stat = os.stat(path)
            if _is_of_kind(self.read_header, path, folder != "loras", stat.st_mtime, stat.st_size):
                found[entry] = stat.st_mtime
        return found

    def options(self) -> list[str]:
        """The entries of all files of this kind, newest first."""
        found = self._of_kind()
        return sorted(found, key=lambda entry: (found[entry], entry), reverse=True) or [self.nothing]

    def path(self, file: str) -> str:
        """Of an entry, or of what :func:`meant` takes for it; only files that ComfyUI itself lists are reachable.

        Raises:
            FileError: it isn't one, or could be several; says what to do.
        """
        if file == self.nothing:
            raise FileError(
                f"file: nothing is saved yet in {self.places}. Run {self.node}, then press R and choose the file from the list"
            )
        listed = self._listed()
        entry = meant(file, listed, self._of_kind)
        if entry is None:
            raise FileError(
                f"file: {file[:80]!r} is not in {self.places}. Put it there and press R, or choose another "
                "from the list"
            )
        return listed[entry][1]

    def check(self, file: str | None) -> bool | str:
        """What a Load node's ``validate_inputs`` answers; None is linked: known only when the graph runs."""
        try:
            if file is not None:
                self.path(file)
        except FileError as error:
            return str(error)
        return True

    def stamp(self, file: str | None) -> str:
        """Another one after each writing: a Load node's ``fingerprint_inputs``."""
        if file is None:
            return LINKED
        stat = os.stat(self.path(file))
        return f"{stat.st_mtime_ns}:{stat.st_size}"


def check_name(name: str | None) -> bool | str:
    """What a Save node's ``validate_inputs`` answers; None is linked."""
    try:
        if name is not None:
            check_file_name(name)
    except FileError as error:
        return str(error)
    return True


def target(folder: str, name: str, overwrite: bool) -> Path:
    """The file that a Save node writes, in the first of ComfyUI's folders called ``folder``, which is made if need be.

    Raises:
        FileError: no file can be called so, or one is and may not be replaced.
    """
    root = Path(folder_paths.get_folder_paths(folder)[0])
    file = root / f"{check_file_name(name)}{_SUFFIX}"
    root.mkdir(parents=True, exist_ok=True)
    if file.exists() and not overwrite:
        raise FileError(f"name: {file.name} is already in {place(root)}. Choose another name or switch overwrite on")
    return file


def portable(name: str) -> str:
    """As entries are written: a workflow from Windows finds its files elsewhere, and the other way round."""
    return name.replace(os.sep, "/")


def meant(file: str, listed: Iterable[str], of_kind: Callable[[], Iterable[str]]) -> str | None:
    """The entry that a workflow from another machine means by ``file``; None: there is none.

    That is ``file`` itself; else the same but for case, Unicode form and kind of slash; else the only file of its kind with
    this name, whatever folder it lies in.

    Raises:
        FileError: several fit.
    """
    if file in listed:
        return file
    wanted = _plain(file)
    found = [entry for entry in listed if _plain(entry) == wanted]
    if not found and (name := _name(wanted)):
        found = [entry for entry in of_kind() if _name(_plain(entry)) == name]
    if len(found) > 1:
        raise FileError(
            f"file: {file[:80]!r} could be {' or '.join(sorted(found)[:5])}. Choose one of them from the list"
        )
    return found[0] if found else None


def _plain(file: str) -> str:
    return unicodedata.normalize("NFC", file.replace("\\", "/")).casefold()


def _name(file: str) -> str:
    return file.rpartition("/")[2]


def place(path: str | Path) -> str:
    """Where a file lies, for people: ``models/...``, or all of its path where extra_model_paths.yaml put it elsewhere."""
    try:
        return f"models/{Path(path).relative_to(folder_paths.models_dir).as_posix()}"
    except ValueError:
        return str(path)


@cache
def _is_of_kind(read_header: Callable[[str], object], path: str, ours: bool, modified: float, size: int) -> bool:
    """Read once for each state of a file: there may be thousands of LoRAs. ``ours``: other programs write none there.

    What is newer than this version or damaged counts too: loading it says what is wrong.
    """
    try:
        read_header(path)
    except OtherKindError:
        return False
    except (FileError, OSError):
        return ours or _opens(path)
    return True


def _opens(path: str) -> bool:
    """Whether it is a whole safetensors file, as thousands of LoRAs beside ours may not be."""
    try:
        with opened(Path(path)):
            return True
    except (FileError, OSError):
        return False
