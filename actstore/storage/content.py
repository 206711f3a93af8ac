"""Types of what a store's JSON files and catalog rows hold, checked when they are read."""

from __future__ import annotations

import json
import re
from typing import Annotated, Any, TypeVar

import msgspec
from msgspec import Meta

T = TypeVar("T")
Text = Annotated[str, Meta(max_length=1000, pattern=r"^[^\x00\ud800-\udfff]*\Z")]  # a lone surrogate is not Unicode
Hash = Annotated[str, Meta(pattern=r"^[0-9a-f]{32}\Z")]  # xxh3-128, hexadecimal
Size = Annotated[int, Meta(ge=0, lt=2**62)]  # bytes or rows
Count = Annotated[int, Meta(ge=0, lt=2**31)]  # trees, batches or tree ids: the catalog's integer
Positive = Annotated[int, Meta(ge=1, lt=2**31)]
INSIDE = re.compile(r"(?:(?:^|/)(?!\.{1,2}(?:/|\Z))[^/\x00-\x1f\x7f\ud800-\udfff]{1,255})+")  # starts with no slash


def as_a(kind: type[T], value: Any) -> T:
    """Convert a value of dicts, lists, texts and numbers to its type; unknown keys are dropped.

    Args:
        kind: the type, such as a dataclass.

    Raises:
        ValueError: the value has another type: "Expected `int`, got `str` - at `$.bytes`".
    """
    try:
        return msgspec.convert(value, kind)
    except RecursionError as error:
        raise ValueError("it is nested too deep") from error
    except msgspec.ValidationError as error:
        said = str(error)  # with the value, however long
        raise ValueError(said if len(said) < 200 else f"{said[:80]} … {said[-80:]}") from error


def json_object(content: bytes) -> dict[str, Any]:
    """Parse a JSON file that holds an object.

    Raises:
        ValueError: the file does not hold an object.
    """
    try:
        held = json.loads(content)
    except RecursionError as error:
        raise ValueError("it is nested too deep") from error
    if not isinstance(held, dict):
        raise ValueError("it holds no JSON object")
    return held


def check_inside(path: str) -> None:
    """Check that a path stays in the store: relative, with forward slashes and valid names.

    Raises:
        ValueError: the path does not stay in the store, or has another form.
    """
    if len(path) > 1000 or not (path[:1] != "/" and INSIDE.fullmatch(path)):
        raise ValueError(f"it names {path[:80]!r}, which is no path inside the store")
