"""A pickle of arrays is read; a pickle that would run something is refused before it does."""

from __future__ import annotations

import copyreg
import os
import pickle
import struct
from collections import OrderedDict
from fractions import Fraction
from pathlib import Path

import numpy as np
import official_layouts
import pytest
from wearfleet_cloud.data.plain_pickle import PlainPickle
from wearfleet_protos.errors import DataError

ARRAYS = {
    "double": np.arange(6.0).reshape(3, 2),
    "single": np.linspace(0, 1, 5, dtype=np.float32),
    "big endian": np.arange(4, dtype=">i4"),
    "bytes": np.arange(256, dtype=np.uint8),
}


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL))  # 5 has a reconstruction of its own
def test_what_python_3_writes_is_read_exactly(protocol: int) -> None:
    content = PlainPickle(pickle.dumps({"a": {"b": ARRAYS, "c": [1, None, "x"]}}, protocol), "f")
    for name, array in ARRAYS.items():
        read = content.array("a", "b", name)
        np.testing.assert_array_equal(read, array)
        assert read.dtype == array.dtype
        assert not read.flags.writeable


@pytest.mark.parametrize("protocol", [0, 2])
def test_what_python_2_wrote_is_read_exactly(protocol: int) -> None:
    arrays = {**ARRAYS, "none": np.empty((0, 3))}
    raw = official_layouts.python2_pickle({"a": {"b": arrays}, "n": 3}, protocol)
    reference = pickle.loads(raw, encoding="latin1")  # the emitter itself is right
    for name, array in arrays.items():
        np.testing.assert_array_equal(reference["a"]["b"][name], array)
        np.testing.assert_array_equal(PlainPickle(raw, "f").array("a", "b", name), array)


def test_arrays_by_columns_keep_their_order() -> None:
    array = np.asfortranarray(np.arange(6.0).reshape(2, 3))
    np.testing.assert_array_equal(PlainPickle(pickle.dumps({"a": array}, 2), "f").array("a"), array)


class Runs:
    """Unpickling this would create a folder."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_code_is_refused_and_not_run(tmp_path: Path, protocol: int) -> None:
    raw = pickle.dumps({"a": Runs(tmp_path / "made")}, protocol)
    with pytest.raises(DataError, match=r"f: not a pickle of plain arrays \(it names posix.mkdir\)"):
        PlainPickle(raw, "f")
    assert not (tmp_path / "made").exists()
    pickle.loads(raw)  # it would have
    assert (tmp_path / "made").exists()


@pytest.mark.parametrize(
    "value",
    [
        np.array([Fraction(1, 2)], object),
        np.array(["text"]),
        np.zeros(2, [("a", "f8"), ("b", "i4")]),
        np.float64(1.0),
        Fraction(1, 2),
        OrderedDict(a=1),
        print,
        np.load,
        complex(1, 2),
    ],
)
def test_everything_but_arrays_of_real_numbers_is_refused(value: object) -> None:
    with pytest.raises(DataError, match="not a pickle of plain arrays"):
        PlainPickle(pickle.dumps({"a": value}, 2), "f").array("a")


HEAD = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(I0\ntS'b'\ntR"
DOUBLE = b"cnumpy\ndtype\n(S'f8'\nI0\nI1\ntR(I3\nS'<'\nNNNI-1\nI-1\nI0\ntb"


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"no pickle",
        HEAD + b"(I1\n(I9\nt" + DOUBLE + b"I00\nS'12345678'\ntb.",  # fewer bytes than its shape needs
        HEAD + b"(I1\n(I-1\nt" + DOUBLE + b"I00\nS'12345678'\ntb.",
        HEAD + b"(I1\n(I1\nt" + DOUBLE.replace(b"f8", b"O8") + b"I00\nS'12345678'\ntb.",
        HEAD + b"(I1\n(I1\nt" + DOUBLE.replace(b"S'<'", b"S'?'") + b"I00\nS'12345678'\ntb.",
        HEAD + b"(I1\n(I1\ntS'f8'\nI00\nS'12345678'\ntb.",
        HEAD + b"(I1\ntb.",
        HEAD + b"(dS'value'\nI1\nsb.",
        b"cnumpy\nndarray\n(I0\ntR.",  # the class is not called
        b"cnumpy\ndtype\n(dS'__call__'\nI1\nsb.",  # nor changed
        b"cnumpy.core.multiarray\n_reconstruct\n(N(dS'x'\nI1\nstb.",
        b"c_codecs\nencode\n(S'x'\nS'rot13'\ntR.",
        b"Pidentity\n.",
        b"\x80\x02r\xff\xff\xff\xff.",  # a memo of 4 thousand million places
        b"\x8e" + struct.pack("<Q", 1 << 62) + b".",  # so many bytes are announced
        b"\x82\x01.",  # an extension code
    ],
)
def test_damaged_or_hostile_bytes_are_a_data_error(raw: bytes) -> None:
    with pytest.raises(DataError, match="nothing of it was run"):
        PlainPickle(raw, "f").array("a")


def test_registered_extensions_are_names_like_others() -> None:
    copyreg.add_extension("os", "getcwd", 0xF0)
    try:
        with pytest.raises(DataError, match=r"it names os\.getcwd"):
            PlainPickle(b"\x82\xf0)R.", "f")
    finally:
        copyreg.remove_extension("os", "getcwd", 0xF0)


def test_every_truncation_is_a_data_error() -> None:
    raw = official_layouts.python2_pickle({"a": {"b": ARRAYS["double"]}}, 2)
    for keep in range(len(raw)):
        with pytest.raises(DataError):
            PlainPickle(raw[:keep], "f")


def test_a_path_that_leads_nowhere_is_named() -> None:
    content = PlainPickle(pickle.dumps({"a": {"b": np.zeros(1)}, "c": 3}, 2), "S2.pkl")
    for path in (("x",), ("a",), ("a", "b", "c"), ("c",), ()):
        with pytest.raises(DataError, match=r"S2\.pkl: expected an array under " + " / ".join(path)):
            content.array(*path)


def test_a_pickle_that_contains_itself_harms_nobody() -> None:
    endless: dict[str, object] = {"b": np.zeros(1)}
    endless["a"] = endless
    assert PlainPickle(pickle.dumps(endless, 2), "f").array("a", "a", "a", "b").shape == (1,)
