"""Widgets that marimo lacks: a SQL box that completes, a picture to click, a map to brush."""

from __future__ import annotations

from importlib.resources import files

import anywidget
import traitlets


def script(name: str) -> str:
    """A script of this folder, as it is sent to the browser."""
    return files("actstore.queries.app").joinpath(name).read_text(encoding="utf-8")


class SqlBox(anywidget.AnyWidget):
    """A box for one query; Ctrl-Enter, or the button, sets `asked`.

    Attributes:
        text: what the box holds; set it to put a query into the box.
        asked: the query that was sent.
        times: how often a query was sent.
        words: see asked.words.
    """

    _esm = script("sqlbox.js")
    text = traitlets.Unicode("").tag(sync=True)
    asked = traitlets.Unicode("").tag(sync=True)
    times = traitlets.Int(0).tag(sync=True)
    words = traitlets.Dict().tag(sync=True)


class Picture(anywidget.AnyWidget):
    """A picture whose tokens can be clicked.

    Attributes:
        html: the picture; elements with `data-at` can be clicked.
        at: `data-at` of the element that was clicked last; -1 before.
        shown: the sequence that is drawn.
        of: the sequence that the click was in.
    """

    _esm = script("picture.js")
    html = traitlets.Unicode("").tag(sync=True)
    at = traitlets.Int(-1).tag(sync=True)
    of = traitlets.Int(-1).tag(sync=True)
    shown = traitlets.Int(-1).tag(sync=True)


class Map(anywidget.AnyWidget):
    """Points on a plane; a drawn rectangle sets `brushed`.

    Attributes:
        points: float32 [n, 3], little-endian: x, y and colour, a class or a share in [0, 1].
        classes: names of the classes; empty if the colour is a share.
        ends: the numbers at both ends of the colours.
        colour: name of the colour's column.
        labels: what is shown of each point under the mouse.
        axes: names of both axes.
        key: what tells these points from others.
        brushed: at, indices of the points in the last rectangle, and of, the key of these points.
    """

    _esm = script("map.js")
    points = traitlets.Bytes(b"").tag(sync=True)
    classes: traitlets.List = traitlets.List().tag(sync=True)
    ends: traitlets.List = traitlets.List().tag(sync=True)
    colour = traitlets.Unicode("").tag(sync=True)
    labels: traitlets.List = traitlets.List().tag(sync=True)
    axes: traitlets.List = traitlets.List().tag(sync=True)
    key = traitlets.Int(0).tag(sync=True)
    brushed = traitlets.Dict().tag(sync=True)
