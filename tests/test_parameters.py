"""A query's parameters reach its own process as they were given, whatever their type."""

import enum
import json
import math
from datetime import timedelta

import numpy as np
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from actstore.errors import BadInput
from actstore.sql.parameters import from_json, to_json
from actstore.store import Store
from tests.stores import fake

SCALARS = st.one_of(
    *(st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False), st.text(), st.binary(), st.uuids()),
    *(st.dates(), st.datetimes(), st.times(), st.timedeltas(), st.decimals(allow_nan=False)),
)
KEYS = st.text() | st.integers() | st.dates()
VALUES = st.recursive(SCALARS, lambda of: st.lists(of) | st.dictionaries(KEYS, of))


@given(VALUES)
def test_what_goes_in_comes_out(value):
    found = from_json(json.loads(json.dumps(to_json(value))))
    assert found == value
    assert type(found) is type(value)


@given(st.dictionaries(st.sampled_from(["dict", "date", "bytes", "uuid"]), st.text()))
def test_a_dict_passes_for_no_other_type(value):
    assert from_json(to_json(value)) == value


class Colour(enum.IntEnum):
    RED = 3


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        *((np.float32(0.5), 0.5), (np.int64(7), 7), (np.bool_(True), True), (np.arange(3), [0, 1, 2])),
        *((pl.Series([1, None]), [1, None]), ((1, "a"), [1, "a"]), (Colour.RED, 3), (np.datetime64(1, "D"), None)),
    ],
)
def test_numbers_of_other_libraries_are_pythons_own(value, expected):
    found = from_json(json.loads(json.dumps(to_json(value))))
    assert found == (value.tolist() if expected is None else expected)


def test_what_is_no_number_stays_none():
    assert math.isnan(from_json(json.loads(json.dumps(to_json(float("nan"))))))


@pytest.mark.parametrize("value", [{1, 2}, object(), 1j, [lambda: 1]])
def test_what_no_query_takes_is_refused(value):
    with pytest.raises(BadInput, match="cannot be handed to the process of a query with limits"):
        to_json(value)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    root = tmp_path_factory.mktemp("parameters") / "s.act"
    fake().store(root)
    with Store(root) as opened:
        yield opened


def test_a_query_with_limits_gets_the_parameters_that_one_without_gets(store):
    params = {
        "ids": np.array([3, 1]),
        "span": timedelta(days=2, microseconds=5),
        "of": {"a": [1.5, None]},
        "raw": b"\x00x",
    }
    query = "select unnest($ids) as id, $span::varchar as span, $of as of, $raw as raw"
    assert store.sql(query, params, timeout=60).equals(store.sql(query, params))
