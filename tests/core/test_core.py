"""Ground floor: states, packing, files, seeds, distributions."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pliant.core import Disk, UsageError, categorical_nats, generator, mixture_mean, numpy_generator, seeded
from pliant.core.files import clear_parts
from pliant.core.pack import differences, pack, pack_file, unpack, unpack_file
from pliant.core.record import OUTCOMES, Record, merge_records
from pliant.core.roles import Role, check_roles
from pliant.core.run import Run

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.int64, torch.bool, torch.uint8, torch.complex64)


@st.composite
def tensors(draw: st.DrawFn) -> torch.Tensor:
    shape = draw(st.lists(st.integers(0, 3), max_size=3))
    random = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
    tensor = (4 * torch.randn(shape, generator=random)).to(draw(st.sampled_from(DTYPES)))
    return tensor.mT if tensor.ndim >= 2 and draw(st.booleans()) else tensor


plain = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
nested = st.recursive(
    plain | tensors(),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.text(max_size=3) | st.integers(0, 9), inner, max_size=3)
        | st.tuples(inner, inner)
    ),
    max_leaves=8,
)


@given(value=nested)
def test_what_is_packed_is_unpacked_to_the_bit(value: Any) -> None:
    assert differences(value, unpack(*pack(value))) == []


def test_what_cannot_be_packed_is_named() -> None:
    with pytest.raises(TypeError, match="set at /a/1"):
        pack({"a": [1, {2}]})


def test_two_tensors_that_share_memory_are_both_packed() -> None:
    base = torch.arange(6.0)
    value = {"all": base, "part": base[2:4], "again": base}
    assert differences(value, unpack(*pack(value))) == []


def test_differences_are_to_the_bit() -> None:
    assert differences(torch.tensor(0.0), torch.tensor(-0.0)) == [""]
    assert differences(torch.tensor(math.nan), torch.tensor(math.nan)) == []
    assert differences({"a": 1, "b": [2, 3]}, {"a": 1, "b": [2, 4]}) == ["b.1"]
    assert differences({"a": 1}, {"a": 1, "c": 2}) == ["c"]
    assert differences(1, True) == [""]
    assert differences(torch.zeros(2), torch.zeros(2, dtype=torch.float64)) == [""]


def test_a_file_is_replaced_whole(tmp_path: Path) -> None:
    path = tmp_path / "file"
    Disk().replace_file(path, b"one")
    Disk().replace_file(path, b"two")
    assert path.read_bytes() == b"two"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_a_folder_is_replaced_whole_and_leftovers_are_cleared(tmp_path: Path) -> None:
    (tmp_path / ".life.1234.part").mkdir()
    Disk().replace_folder(tmp_path / "life", {"a": b"1"})
    Disk().replace_folder(tmp_path / "life", {"b": b"2"})
    clear_parts(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["life"]
    assert [p.name for p in (tmp_path / "life").iterdir()] == ["b"]


def test_named_generators_are_independent_of_each_other_and_of_order() -> None:
    draws = {(seed, name): float(torch.rand((), generator=generator(seed, name))) for seed in (0, 1) for name in "ab"}
    assert len(set(draws.values())) == 4
    assert draws[0, "a"] == float(torch.rand((), generator=generator(0, "a")))
    assert numpy_generator(0, "a").random() != numpy_generator(1, "a").random()


def test_a_seeded_stretch_leaves_the_global_generator_as_it_was() -> None:
    before = torch.get_rng_state()
    with seeded(0):
        one = torch.rand(3)
    with seeded(0):
        two = torch.rand(3)
    with seeded(0, "other"):
        other = torch.rand(3)
    assert one.equal(two)
    assert not one.equal(other)
    assert torch.get_rng_state().equal(before)


def test_code_lengths_are_wide_under_narrow_logits() -> None:
    assert categorical_nats(torch.zeros(2, 4, dtype=torch.bfloat16), torch.tensor([0, 1])).dtype == torch.float32
    output = torch.tensor([0.0, 0.0, 1.0, 3.0, 0.0, 0.0])
    assert mixture_mean(output).item() == 2


def test_roles_must_name_every_parameter() -> None:
    with seeded(0):
        layer = torch.nn.Linear(2, 2)
    check_roles(layer, {"weight": Role.MATRIX, "bias": Role.BIAS})
    with pytest.raises(ValueError, match="bias"):
        check_roles(layer, {"weight": Role.MATRIX})


def test_records_merge_by_adding_counts_and_keeping_the_worst_outcome() -> None:
    assert merge_records([], 3) == (3, -1, "asked", merge_records([], 3).nats, 0, ())
    one, two = Record(4, 7, "updated", 1.0, 3), Record(4, 8, "non-finite loss", math.inf)
    both = merge_records([one, two], 4)
    assert (both.update, both.time, both.outcome, both.nats, both.learned) == (4, 8, "non-finite loss", 1.0, 3)
    assert both.outcome in OUTCOMES


# The run folder


def test_records_are_cut_to_what_was_saved_and_a_torn_line_swallows_none(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.create("learn test", {"a": 1}, threads=1)
    with run.begin(0):
        run.record({"n": 1}, {"t": 1})
        saved = run.sync()
        run.record({"n": 2}, {"t": 2})
    with open(tmp_path / "timing.jsonl", "ab") as file:
        file.write(b'{"t": 3')
    with run.begin(saved):
        run.record({"n": 3}, {"t": 4})
    assert run.lines("records.jsonl") == [{"n": 1}, {"n": 3}]
    assert run.lines("timing.jsonl") == [{"t": 1}, {"t": 2}, {"t": 4}]
    assert run.lines("nothing.jsonl") == []
    with pytest.raises(UsageError, match="shorter"), run.begin(10_000):
        pass


def test_a_run_knows_where_it_took_place(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.create("learn test", {"a": 1}, threads=2)
    found = run.read("environment.json")
    assert found["threads"] == 2
    assert found["packages"]["torch"] == torch.__version__
    assert found["packages"]["numpy"] == np.__version__
    assert run.config("learn test") == {"a": 1}


# One file


packed = {"a": [1, math.nan, "x"], "b": (torch.arange(5.0), torch.zeros(0)), "c": {3: True, "d": None}}


def test_a_value_in_one_file_is_read_back_to_the_bit() -> None:
    assert differences(packed, unpack_file(pack_file(packed))) == []
    assert differences(unpack_file(pack_file([])), []) == []


def test_a_file_that_is_torn_or_altered_anywhere_is_refused() -> None:
    data = pack_file(packed)
    head = data.index(b"\n")
    for length in (*range(head + 40), *range(head + 40, len(data), 7), len(data) - 1):
        with pytest.raises(ValueError, match=r"not written by pliant|torn|newer"):
            unpack_file(data[:length])
    for place in (*range(head + 40), *range(head + 40, len(data), 7)):
        for sign in (data[place] ^ 1, data[place] ^ 0x80, 0):
            altered = data[:place] + bytes([sign]) + data[place + 1 :]
            if altered == data:
                continue
            with pytest.raises(ValueError, match=r"not written by pliant|torn|newer"):
                unpack_file(altered)
    for text in (
        b"",
        b"\n",
        b"{}\n",
        b"[]\n",
        b"null\nx",
        b"\xff\xfe\n",
        data + b"x",
        b'{"schema": "x", "tree": 1, "sha256": ""}\n',
    ):
        with pytest.raises(ValueError, match=r"not written by pliant|torn"):
            unpack_file(text)


def test_a_file_of_a_newer_schema_is_told_apart() -> None:
    head, _, body = pack_file(packed).partition(b"\n")
    newer = json.dumps(json.loads(head) | {"schema": 2}).encode() + b"\n" + body
    with pytest.raises(ValueError, match="newer"):
        unpack_file(newer)
