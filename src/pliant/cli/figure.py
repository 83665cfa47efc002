"""Figures that a command is asked to draw to a file."""

from collections.abc import Callable
from pathlib import Path

from pliant.cli.arguments import Misuse


def check_folder(path: Path | None) -> None:
    """Raise `Misuse` unless a file could be made there; for before anything is worked out."""
    if path is not None and not path.parent.is_dir():
        raise Misuse(f"{path} cannot be written: there is no folder {path.parent}")


def draw_to(path: Path | None, svg: Callable[[], str]) -> None:
    """Write what `svg` draws, whole or not at all; nothing is drawn if there is no path.

    Raises:
        UsageError: it cannot be written.
    """
    from pliant.core import Disk, UsageError

    if path is not None:
        try:
            Disk().replace_file(path, svg().encode())
        except OSError as error:
            raise UsageError(f"{path} cannot be written ({error.strerror or error})") from None
