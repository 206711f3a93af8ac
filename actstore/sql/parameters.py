"""A query's parameters as JSON, for the process of a query with limits: any type of a SQL literal.

JSON itself holds NULL, booleans, whole numbers, text and, in Python's dialect, any float. Any other
value becomes an object whose one key names the value's type. A dict becomes such an object, too, so
that no value can pass for another.
"""

from __future__ import annotations

import base64
from collections.abc import Callable, Mapping
from datetime import date, datetime, time, timedelta
from decimal import Decimal
from typing import Any
from uuid import UUID

from actstore.errors import BadInput

PLAIN = (type(None), bool, int, float, str)
TAGGED: dict[str, tuple[type, Callable[[Any], Any], Callable[[Any], Any]]] = {  # name → type, to JSON's types, and back
    "bytes": (bytes, lambda value: base64.b64encode(value).decode(), base64.b64decode),
    "datetime": (datetime, datetime.isoformat, datetime.fromisoformat),  # before date, of which it is one
    "date": (date, date.isoformat, date.fromisoformat),
    "time": (time, time.isoformat, time.fromisoformat),
    "timedelta": (
        timedelta,
        lambda value: [value.days, value.seconds, value.microseconds],
        lambda parts: timedelta(*parts),
    ),
    "decimal": (Decimal, str, Decimal),
    "uuid": (UUID, str, UUID),
}


def to_json(value: Any) -> Any:
    """Convert a parameter, or a mapping of parameters, to JSON's own types.

    Raises:
        BadInput: the value has a type that no query takes.
    """
    if type(value) in PLAIN:
        return value
    if isinstance(value, Mapping):
        return {"dict": [[to_json(key), to_json(held)] for key, held in value.items()]}
    if isinstance(value, (list, tuple)):
        return [to_json(held) for held in value]
    import numpy as np
    import polars as pl

    if isinstance(value, (np.ndarray, np.generic, pl.Series)):
        return to_json(value.to_list() if isinstance(value, pl.Series) else value.tolist())
    for name, (kind, encode, _) in TAGGED.items():
        if isinstance(value, kind):
            return {name: encode(value)}
    for kind in (int, float, str):  # a subclass, such as an enum
        if isinstance(value, kind):
            return kind(value)
    raise BadInput(
        f"a parameter cannot be handed to the process of a query with limits (it is a {type(value).__name__}); give numbers, "
        "text, dates, or lists and dicts of them"
    )


def from_json(value: Any) -> Any:
    """Convert a parameter back; tuples and arrays become lists, numpy's numbers Python's."""
    if isinstance(value, list):
        return [from_json(held) for held in value]
    if not isinstance(value, dict):
        return value
    [(name, held)] = value.items()
    return {from_json(key): from_json(item) for key, item in held} if name == "dict" else TAGGED[name][2](held)
