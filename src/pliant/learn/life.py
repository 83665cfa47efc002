"""A life: everything an exact continuation needs, as one value."""

import copy
import json
import warnings
from pathlib import Path
from typing import Any

from pliant.core import Disk, UsageError
from pliant.core.files import clear_parts, digest
from pliant.core.pack import differences, pack, unpack

SCHEMA = 1
TREE, TENSORS, MANIFEST = "tree.json", "tensors.safetensors", "manifest.json"


class Life:
    """Parts that live together: a learner, its stream, scores, opponents, whatever has a `state_dict`.

        life = Life(learner=learner, stream=stream, scores=scores)
        twin = life.fork()            # shares nothing that moves; both go on to the same bits
        life.save("run/lives")        # writes run/lives/update-<n>
        life.load("run/lives")        # the newest whole one

    A life holds parameters, optimizer, upkeep, memory of the streams, questions that wait for
    answers, position of the stream, scores and random generators. It does not hold global random
    state: nothing in pliant draws from it once a model is made.

    Parts are attributes under the names they were given. `learner` is required; its count of
    updates names the saved life.
    """

    def __init__(self, *, learner: Any, **parts: Any):
        self._parts = {"learner": learner, **parts}

    def __getattr__(self, name: str) -> Any:
        try:
            return self.__dict__["_parts"][name]
        except KeyError:
            raise AttributeError(f"this life has no part {name!r}") from None

    def fork(self) -> "Life":
        """A life of its own that begins here: both continue to the same bits while they get the same."""
        # One call for all parts: what two of them share stays shared.
        return type(self)(**copy.deepcopy(self._parts))

    def state_dict(self) -> dict[str, Any]:
        """Nested plain values and tensors of all parts."""
        return {name: part.state_dict() for name, part in self._parts.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state_dict` was taken, in a life built the same way.

        Raises:
            UsageError: the parts have other names.
        """
        if wrong := state.keys() ^ self._parts.keys():
            raise UsageError(f"Life: the saved life has other parts; differing: {', '.join(sorted(wrong))}")
        for name, part in self._parts.items():
            part.load_state_dict(state[name])

    def diff(self, other: "Life") -> list[str]:
        """Names of everything that differs from `other`, compared to the bit; empty if nothing does."""
        return differences(self.state_dict(), other.state_dict())

    def save(self, folder: str | Path, *, keep: int = 2, disk: Disk | None = None) -> Path:
        """Write `folder/update-<n>`, whole or not at all, and then remove all but the newest `keep`.

        Returns the folder written. Whatever goes wrong at whichever moment, `load` finds the life
        saved before or this one.

        Raises:
            UsageError: the folder cannot be written; what was there stays.
        """
        disk, folder, state = disk or Disk(), Path(folder), self.state_dict()
        tree, tensors = pack(state)
        body = {"schema": SCHEMA, "files": {TREE: digest(tree), TENSORS: digest(tensors)}}
        manifest = {"body": body, "sha256": digest(json.dumps(body).encode())}
        target = folder / f"update-{state['learner']['updates']:012d}"
        try:
            files = {TREE: tree, TENSORS: tensors, MANIFEST: json.dumps(manifest).encode()}
            disk.replace_folder(target, files)
            for old in [path for path in saved_lives(folder) if path != target][max(0, keep - 1) :]:
                disk.remove(old)
        except OSError as error:
            raise UsageError(
                f"Life.save: {target} could not be written ({error}); the life saved before it is untouched"
            ) from error
        return target

    def load(self, folder: str | Path) -> Path:
        """Continue from the newest whole life in `folder` (or from `folder` itself); returns where it was.

        A life that is torn, truncated or altered is passed over with a warning.

        Raises:
            UsageError: there is none, or it was made by a newer version, or by a life built otherwise.
        """
        folder = Path(folder)
        clear_parts(folder)
        for path in [folder] if (folder / MANIFEST).exists() else saved_lives(folder):
            state = read_life(path)
            if state is not None:
                self.load_state_dict(state)
                return path
            warnings.warn(f"the life at {path} is damaged; using the one before it", stacklevel=2)
        raise UsageError(f"Life.load: there is no whole life in {folder}; give the folder that save was given")


def saved_lives(folder: Path) -> list[Path]:
    """Saved lives in `folder`, whole or not, newest first."""

    def age(path: Path) -> tuple[str, bool]:
        # Next to its replacement, "<name>.old" is the older one.
        return path.name.removesuffix(".old"), path.suffix != ".old"

    return sorted(folder.glob("update-*"), key=age, reverse=True)


def read_life(path: Path) -> Any | None:
    """The state at `path`, or None if it is not whole.

    Raises:
        UsageError: it is whole but of a newer schema.
    """
    try:
        manifest = json.loads((path / MANIFEST).read_bytes())
        body = manifest["body"]
        if digest(json.dumps(body).encode()) != manifest["sha256"]:
            return None
        if body["schema"] > SCHEMA:
            raise UsageError(
                f"Life.load: {path} has schema {body['schema']}, this version reads up to {SCHEMA}; update"
            )
        files = {name: (path / name).read_bytes() for name in (TREE, TENSORS)}
    except UsageError:
        raise
    except (OSError, ValueError, KeyError, TypeError):
        return None
    if any(digest(files[name]) != wanted for name, wanted in body["files"].items()):
        return None
    return unpack(files[TREE], files[TENSORS])
