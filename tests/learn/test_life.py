"""A life is exact: forks, files, damage, and faults at every operation of saving."""

import contextlib
import errno
import json
import os
import random
import shutil
import warnings
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

import pytest

from pliant.core import Disk, UsageError
from pliant.core.files import digest
from pliant.learn.life import SCHEMA, saved_lives
from tests.learn.worlds import life, run, small_life


@pytest.mark.parametrize("steps", [0, 1, 20, 62])
def test_a_fork_goes_on_to_the_same_bits_and_touches_nothing(steps: int) -> None:
    this = life()
    run(this, steps)
    twin, other = this.fork(), this.fork()
    assert this.diff(twin) == []
    run(other, 7)
    assert this.diff(twin) == []
    assert this.diff(other) != [] or steps >= 62
    mine, theirs = run(this), run(twin)
    assert repr(mine) == repr(theirs)
    assert this.diff(twin) == []


@pytest.mark.parametrize("steps", [0, 1, 20, 40, 62])
def test_a_loaded_life_goes_on_to_the_same_bits(steps: int, tmp_path: Path) -> None:
    this, loaded = life(), life()
    run(this, steps)
    this.save(tmp_path)
    run(loaded, 5)
    loaded.load(tmp_path)
    assert loaded.diff(this) == []
    assert repr(run(loaded)) == repr(run(this))
    assert loaded.diff(this) == []


def test_saved_at_every_reply_and_resumed_the_records_are_those_of_one_run(tmp_path: Path) -> None:
    expected = run(small_life())
    found = []
    for _ in range(len(expected)):
        this = small_life()
        if saved_lives(tmp_path):
            this.load(tmp_path)
        found += run(this, 1)
        this.save(tmp_path)
    assert repr(found) == repr(expected)


def test_diff_names_what_differs() -> None:
    this, other = small_life(), small_life()
    run(this, 10)
    run(other, 10)
    assert this.diff(other) == []
    other.learner.model.head.linear.bias.data[0] += 1
    other.stream.sent += 1
    assert this.diff(other) == ["learner.model.head.linear.bias", "stream.sent"]


def test_the_newest_lives_are_kept_and_the_newest_is_loaded(tmp_path: Path) -> None:
    this = small_life()
    for _ in range(4):
        run(this, 8)
        newest = this.save(tmp_path)
    assert len(saved_lives(tmp_path)) == 2
    assert small_life().load(tmp_path) == newest
    assert small_life().load(newest) == newest


# Damage


def two_saved(folder: Path) -> tuple[Any, Path]:
    """An older life, and where the newer one is."""
    this = small_life()
    run(this, 10)
    older = this.fork()
    older.save(folder)
    run(this, 10)
    return older, this.save(folder)


FILES = ("tree.json", "tensors.safetensors", "manifest.json")


def flip(path: Path, where: int) -> None:
    data = bytearray(path.read_bytes())
    data[where % len(data)] ^= 1 << (where % 8)
    path.write_bytes(data)


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("harm", ["flip", "truncate", "empty", "remove"])
def test_a_damaged_life_is_noticed_and_the_one_before_is_used(file: str, harm: str, tmp_path: Path) -> None:
    draw = random.Random(f"{file} {harm}")
    for trial in range(8 if harm in ("flip", "truncate") else 1):
        older, newest = two_saved(tmp_path / str(trial))
        path = newest / file
        if harm == "flip":
            flip(path, draw.randrange(path.stat().st_size))
        elif harm == "remove":
            path.unlink()
        else:
            path.write_bytes(path.read_bytes()[: draw.randrange(path.stat().st_size) if harm == "truncate" else 0])
        found = small_life()
        with pytest.warns(UserWarning, match="damaged"):
            found.load(tmp_path / str(trial))
        assert found.diff(older) == []


def test_when_nothing_is_whole_it_says_so_and_changes_nothing(tmp_path: Path) -> None:
    _, newest = two_saved(tmp_path)
    for path in newest.parent.glob("*/tree.json"):
        path.write_bytes(b"")
    this, before = small_life(), small_life()
    with warnings.catch_warnings(action="ignore"), pytest.raises(UsageError, match="no whole life"):
        this.load(tmp_path)
    assert this.diff(before) == []
    with pytest.raises(UsageError, match="no whole life"):
        this.load(tmp_path / "nowhere")


def test_a_newer_schema_is_refused(tmp_path: Path) -> None:
    _, newest = two_saved(tmp_path)
    body = json.loads((newest / "manifest.json").read_text())["body"] | {"schema": SCHEMA + 1}
    (newest / "manifest.json").write_text(json.dumps({"body": body, "sha256": digest(json.dumps(body).encode())}))
    with pytest.raises(UsageError, match="schema"):
        small_life().load(tmp_path)


def test_a_life_of_other_parts_is_refused(tmp_path: Path) -> None:
    small_life().save(tmp_path)
    with pytest.raises(UsageError, match="panel"):
        life().load(tmp_path)


# Faults at every operation of saving


class Crash(BaseException):
    """The process dies here: no handler of ours may count on running."""


class Failing(Disk):
    """Fails at operation number `at`; counts them in `done`. With `crash`, everything after it fails too."""

    def __init__(self, at: int | None = None, *, crash: bool = False, torn: bool = False):
        self.at, self.crash, self.torn, self.done, self.dead = at, crash, torn, 0, False

    def _step(self) -> None:
        if self.dead:
            raise Crash
        self.done += 1
        if self.done - 1 == self.at:
            self.dead = self.crash
            raise Crash if self.crash else OSError(errno.ENOSPC, "No space left on device")

    def _write(self, handle: int, data: bytes) -> None:
        try:
            self._step()
        except BaseException:
            if self.torn:
                super()._write(handle, data[: len(data) // 2])
            raise
        super()._write(handle, data)

    def sync(self, handle: int) -> None:
        self._step()
        super().sync(handle)

    def make_folder(self, folder: Path) -> None:
        self._step()
        super().make_folder(folder)

    def rename(self, old: Path, new: Path) -> None:
        self._step()
        super().rename(old, new)

    def remove(self, path: Path) -> None:
        self._step()
        super().remove(path)


Prepare = Callable[[Path], tuple[list[Any], Any]]
"""folder -> lives that may be found there before, and the life that is about to be saved."""


def nothing_before(folder: Path) -> tuple[list[Any], Any]:
    this = small_life()
    run(this, 10)
    return [], this


def an_older_one(folder: Path) -> tuple[list[Any], Any]:
    _, this = nothing_before(folder)
    this.save(folder)
    older = this.fork()
    run(this, 10)
    return [older], this


def two_older_ones(folder: Path) -> tuple[list[Any], Any]:
    older, this = an_older_one(folder)
    this.save(folder)
    middle = this.fork()
    run(this, 10)
    return [*older, middle], this


def the_same_update_again(folder: Path) -> tuple[list[Any], Any]:
    this = small_life()
    run(this, 1)  # a question, but no answer yet
    this.save(folder)
    older = this.fork()
    run(this, 1)
    assert this.learner.updates == older.learner.updates
    return [older], this


SITUATIONS = (nothing_before, an_older_one, two_older_ones, the_same_update_again)


def as_it_was(root: Path, name: str) -> Path:
    """A folder as `prepare` left it: saving changes no life, so one preparation serves all faults."""
    folder, template = root / name, root / "as it was"
    if template.exists():
        shutil.copytree(template, folder)
    return folder


def check_whole(folder: Path, before: list[Any], new: Any, where: str) -> None:
    """What is found is one of the lives before (the newest of them) or the new one, and saving works again."""
    found = small_life()
    try:
        found.load(folder)
    except UsageError:
        assert not before, f"{where}: neither the old nor the new life is there"
    else:
        allowed = [new, *before[-1:]]
        assert any(found.diff(one) == [] for one in allowed), f"{where}: the life found is neither the old nor the new"
    new.save(folder)
    again = small_life()
    again.load(folder)
    assert again.diff(new) == [], f"{where}: saving afterwards does not work"
    assert not list(folder.glob(".*")), f"{where}: something half-written stayed"


@pytest.mark.parametrize("prepare", SITUATIONS)
@pytest.mark.parametrize("torn", [False, True])
@pytest.mark.parametrize("crash", [False, True])
def test_a_fault_at_any_operation_leaves_the_old_or_the_new_life(
    prepare: Prepare, crash: bool, torn: bool, tmp_path: Path
) -> None:
    before, this = prepare(tmp_path / "as it was")
    for at in count():
        folder = as_it_was(tmp_path, str(at))
        disk = Failing(at, crash=crash, torn=torn)
        with contextlib.suppress(Crash, UsageError):
            this.save(folder, disk=disk)
        if disk.done <= at:
            assert at >= 9  # three writes, their syncs, folders, renames
            break
        check_whole(folder, before, this, f"operation {at}")


class PowerLoss(Failing):
    """A crash after which what was not synced is gone: files are torn, renames are undone."""

    def __init__(self, at: int, seed: int, root: Path):
        super().__init__(at, crash=True)
        self.draw, self.root = random.Random(seed), root
        self.unsynced: set[int] = set()  # by inode, since a file may be renamed before the loss
        self.renamed: list[tuple[Path, Path]] = []

    def _write(self, handle: int, data: bytes) -> None:
        self.unsynced.add(os.fstat(handle).st_ino)
        super()._write(handle, data)

    def sync(self, handle: int) -> None:
        super().sync(handle)
        self.unsynced.discard(os.fstat(handle).st_ino)

    def sync_folder(self, folder: Path) -> None:
        super().sync_folder(folder)
        self.renamed = [pair for pair in self.renamed if pair[1].parent != folder]

    def rename(self, old: Path, new: Path) -> None:
        super().rename(old, new)
        self.renamed.append((old, new))

    def lose(self) -> None:
        for path in self.root.rglob("*"):
            if path.is_file() and path.stat().st_ino in self.unsynced:
                path.write_bytes(path.read_bytes()[: self.draw.randrange(path.stat().st_size + 1)])
        # A journal keeps the order of renames: a suffix of those not synced is undone.
        for old, new in reversed(self.renamed[self.draw.randrange(len(self.renamed) + 1) :]):
            if new.exists() and not old.exists():
                new.rename(old)


@pytest.mark.parametrize("prepare", SITUATIONS)
def test_a_power_loss_at_any_operation_leaves_the_old_or_the_new_life(prepare: Prepare, tmp_path: Path) -> None:
    before, this = prepare(tmp_path / "as it was")
    for at in count():
        ended = False
        for seed in range(2):
            folder = as_it_was(tmp_path, f"{at}-{seed}")
            disk = PowerLoss(at, seed, folder)
            with contextlib.suppress(Crash):
                this.save(folder, disk=disk)
            ended = disk.done <= at
            disk.lose()
            check_whole(folder, before, this, f"operation {at}, seed {seed}")
        if ended:
            break


def test_a_full_disk_leaves_the_old_life_and_is_told_in_a_sentence(tmp_path: Path) -> None:
    class Full(Disk):
        def _write(self, handle: int, data: bytes) -> None:
            super()._write(handle, data[:100])
            raise OSError(errno.ENOSPC, "No space left on device")

    (older,), this = an_older_one(tmp_path)
    before = sorted(path.name for path in tmp_path.iterdir())
    with pytest.raises(UsageError, match="No space left on device"):
        this.save(tmp_path, disk=Full())
    assert sorted(path.name for path in tmp_path.iterdir()) == before
    found = small_life()
    found.load(tmp_path)
    assert found.diff(older) == []
