"""What the commands do has a public name in Python: the same verbs and arguments, errors by their kind."""

from __future__ import annotations

import inspect

import pytest

import actstore
from actstore import errors
from actstore.errors import ActstoreError
from actstore.reading import worker
from actstore.store import Store

CLASSES = [value for value in vars(errors).values() if inspect.isclass(value) and value.__module__ == errors.__name__]


def test_every_error_is_exported_and_has_a_kind_of_its_own():
    assert {each.__name__ for each in CLASSES} == {
        name for name in actstore.__all__ if inspect.isclass(found := getattr(actstore, name)) and found in CLASSES
    }
    assert all(getattr(actstore, each.__name__) is each for each in CLASSES)
    kinds = [each.kind for each in CLASSES if issubclass(each, ActstoreError)]
    assert len({*kinds}) == len(kinds) == len(CLASSES) - 1  # SeveralRuns is a warning
    for each in CLASSES:
        if issubclass(each, ActstoreError):
            assert "kind" in vars(each)
            again = ActstoreError.of_kind(each.kind, "said")
            assert (type(again), str(again)) == (each, "said")


def test_an_error_comes_back_as_its_class_though_that_is_called_otherwise(demo_path, request):
    """DuckDB hands the error of a function on as text, and the process of a query with limits as JSON."""
    request.addfinalizer(lambda: setattr(errors.NotStored, "__name__", "NotStored"))
    errors.NotStored.__name__ = "Renamed"
    with Store(demo_path) as store, pytest.raises(errors.NotStored, match="no site 'embed_'"):
        store.sql("select act(token_id, 'reproduction', 'embed_') from tokens")
    assert worker._as_sent(errors.NotStored("said"), None) == ("not_stored", "said")
