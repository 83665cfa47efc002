"""File operations that leave the old or the new, never neither.

All writing of lives and runs goes through a `Disk`, so that tests can put a failing one in its
place. The order is always: write beside, sync the file, rename over, sync the folder.
"""

import hashlib
import os
import shutil
import uuid
from collections.abc import Mapping
from pathlib import Path


class Disk:
    """The five file operations that saving needs. Subclass it to inject faults."""

    def write(self, path: Path, data: bytes) -> None:
        """Create `path` with `data` and sync it."""
        with open(path, "xb") as file:
            self._write(file.fileno(), data)
            self.sync(file.fileno())

    def _write(self, handle: int, data: bytes) -> None:
        view = memoryview(data)
        while view:
            view = view[os.write(handle, view) :]

    def sync(self, handle: int) -> None:
        """Force what was written through `handle` to the device."""
        os.fsync(handle)

    def sync_folder(self, folder: Path) -> None:
        """Force the entries of `folder` (names, renames) to the device."""
        handle = os.open(folder, os.O_RDONLY)
        try:
            self.sync(handle)
        finally:
            os.close(handle)

    def make_folder(self, folder: Path) -> None:
        """Create `folder` and its parents."""
        folder.mkdir(parents=True, exist_ok=True)

    def rename(self, old: Path, new: Path) -> None:
        """Rename within one file system; an existing file `new` is replaced."""
        os.replace(old, new)

    def remove(self, path: Path) -> None:
        """Remove a file or a whole folder; nothing happens if it is not there."""
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)

    def replace_file(self, path: Path, data: bytes) -> None:
        """Put `data` at `path`, whole or not at all."""
        beside = _beside(path)
        try:
            self.write(beside, data)
            self.rename(beside, path)
        except OSError:
            self.remove(beside)
            raise
        self.sync_folder(path.parent)

    def replace_folder(self, folder: Path, files: Mapping[str, bytes]) -> None:
        """Put a folder with `files` at `folder`, whole or not at all.

        If `folder` exists it is first renamed to `<folder>.old`, and removed once the new one is
        there, so at every moment one of the two is whole; readers must look at both.
        """
        self.make_folder(folder.parent)
        beside, old = _beside(folder), folder.with_name(folder.name + ".old")
        try:
            self.make_folder(beside)
            for name, data in files.items():
                self.write(beside / name, data)
            self.sync_folder(beside)
            if folder.exists():
                self.remove(old)
                self.rename(folder, old)
            self.rename(beside, folder)
        except OSError:
            self.remove(beside)
            raise
        self.sync_folder(folder.parent)
        self.remove(old)


def _beside(path: Path) -> Path:
    return path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.part")


def clear_parts(folder: Path) -> None:
    """Remove what interrupted writes left in `folder`."""
    for part in folder.glob(".*.part"):
        Disk().remove(part)


def digest(data: bytes) -> str:
    """Checksum used in manifests (sha256, hex)."""
    return hashlib.sha256(data).hexdigest()
