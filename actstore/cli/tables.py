"""Rows as a table or as blocks on a terminal, at the terminal's width, in a pager where they are longer."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from actstore.cli import terminal
from actstore.outputs import printable
from actstore.sql.rows import Rows, of_frame

if TYPE_CHECKING:
    import polars as pl
    from rich.console import Console
    from rich.table import Table

ROWS_SHOWN = 60  # rows of a printed table; the other formats give every row
ROWS_PAGED = 2000  # rows of a table in a pager
LINES_SHOWN = 3  # of a text in one of several rows; of a longer one the first line alone
ROWS_WITH_WHOLE_LISTS = 10  # in more, a list that is too long is cut, and stays a cell of one line
ROWS_TOGETHER = 20  # of a table in parts: the other columns of a row come soon after
LEAST_WIDTH = 16  # of a column that is narrowed: an interval, `[99.05, 100.00]`, stays whole
GAP = 3  # between two columns
FOLDED_GAP = 2  # the same in a folded table
MORE = "--csv, --json and --parquet"  # formats that leave nothing out


def print_table(frame: pl.DataFrame | Rows, fold: bool = False) -> None:
    """Print rows as a table, a table in parts, or a block of lines.

    One row that is wider than the terminal becomes a block, a line for each column. In several
    rows, long texts are wrapped; in more than ROWS_WITH_WHOLE_LISTS, long lists are cut short. If
    that does not suffice, the table comes in parts: some of the columns, then the next ones, each
    part after the first column, or after the first ones that no two rows share. Columns without a
    value are only named. Numbers and short texts are always whole. In several rows, a text of more
    than LINES_SHOWN lines, such as a study's query, is its first line and the number of its lines.
    Without a terminal, lines are as long as they need to be. On a terminal, what is longer than the
    screen goes through a pager, see terminal.page.

    Args:
        fold: if the table is too wide, fold the headers and leave out columns that do not fit, the
            first ones first served; a note names the columns that are left out.
    """
    from rich.console import Console

    rows = frame if isinstance(frame, Rows) else of_frame(frame)
    console = Console() if sys.stdout.isatty() else Console(width=10_000, color_system=None)
    pager = terminal.pager()
    head = rows.head(ROWS_PAGED if pager else ROWS_SHOWN)
    if len(rows) > 1:
        head = [tuple(map(_shortened, row)) for row in head]
    shown = Rows(rows.columns, rows.types, rows.kinds, head)
    if not pager:
        _print(console, shown, len(rows), fold)
        return
    with console.capture() as printed:
        _print(console, shown, len(rows), fold)
    terminal.page(printed.get(), pager)


def _shortened(value: Any) -> Any:
    """A value as it stands in one of several rows, see print_table."""
    lines = value.splitlines() if isinstance(value, str) else []
    return f"{lines[0]} … ({len(lines)} lines)" if len(lines) > LINES_SHOWN else value


def _print(console: Console, rows: Rows, n_rows: int, fold: bool) -> None:
    """Print rows, and how many more there are."""
    from rich.measure import Measurement

    table = _table(rows)
    is_wide = Measurement.get(console, console.options.update(width=10_000), table).maximum > console.width
    if is_wide and fold:
        _print_folded(console, rows)
    elif is_wide and (n_rows == 1 or not _narrowed(table, rows, console.width, n_rows)):
        _print_in_parts(console, rows)
    else:
        console.print(table)
    if n_rows > len(rows):
        console.print(f"… {n_rows - len(rows):,} more of {n_rows:,} rows ({MORE} give all)", soft_wrap=True)
    elif not n_rows:
        console.print("(no rows)")


def _print_in_parts(console: Console, rows: Rows) -> None:
    """Print columns that do not fit beside each other as tables, or as a block if that is shorter."""
    from rich.cells import cell_len

    texts = _columns(rows)
    widths = [max(map(cell_len, column)) for column in texts]
    if len(rows) == 1 or widths[0] > console.width // 2:
        for row in rows:
            console.print(_block(rows.columns, row))
            console.print()
        return
    key = _key(texts, widths, console.width // 2)
    empty = [place for place in range(len(texts)) if place not in key and not any(texts[place][1:])]
    most = console.width - sum(widths[place] + GAP for place in key)
    parts, room = [key], most
    for place in range(len(key), len(widths)):
        if place in empty:
            continue
        if len(parts[-1]) > len(key) and widths[place] > room:
            parts.append(key)
            room = most
        parts[-1] = [*parts[-1], place]
        room -= widths[place] + GAP
    for start in range(0, len(rows), ROWS_TOGETHER):
        together = Rows(rows.columns, rows.types, rows.kinds, [*rows][start : start + ROWS_TOGETHER])
        for part in parts:
            table = _table(together, part)
            for place, column in zip(part, table.columns, strict=True):
                column.width, column.overflow = widths[place] if place in key else min(widths[place], most), "fold"
            console.print(table)
            console.print()
    if empty:
        console.print(f"Empty in these rows: {', '.join(texts[place][0] for place in empty)}.")


def _key(texts: list[list[str]], widths: list[int], room: int) -> list[int]:
    """The first columns that no two rows share, if they fit; else the first column."""
    for n in range(1, len(texts)):
        if sum(widths[:n]) + GAP * (n - 1) > room:
            break
        if len({*zip(*texts[:n], strict=True)}) == len(texts[0]):
            return list(range(n))
    return [0]


def _narrowed(table: Table, rows: Rows, width: int, n_rows: int) -> bool:
    """Narrow the columns of long texts and lists until a table fits; False if it cannot fit.

    Args:
        n_rows: rows that there are, of which `rows` are shown.
    """
    from rich.cells import cell_len

    texts = _columns(rows)
    widths = [max(map(cell_len, column)) for column in texts]
    long = [
        place for place, kind in enumerate(rows.kinds) if widths[place] > LEAST_WIDTH and kind not in ("number", "time")
    ]
    room = width - GAP * (len(widths) - 1) - sum(widths) + sum(widths[place] for place in long)
    has_lists = any(rows.kinds[place] == "list" for place in long)
    least = {
        place: LEAST_WIDTH if rows.kinds[place] == "list" else _longest_word(texts[place], width) for place in long
    }
    more, wanted = room - sum(least.values()), sum(widths[place] - least[place] for place in long)
    if more < 0 or not wanted or (has_lists and n_rows <= ROWS_WITH_WHOLE_LISTS):
        return False
    for place in long:  # each gets what its longest word takes, and shares the rest by its length
        column = table.columns[place]
        column.max_width = least[place] + more * (widths[place] - least[place]) // wanted
        column.no_wrap = rows.kinds[place] == "list"
        column.overflow = "ellipsis" if column.no_wrap else "fold"
    return True


def _longest_word(texts: list[str], width: int) -> int:
    """Cells of a column's longest word; LEAST_WIDTH if a line of some width has too many such words."""
    from rich.cells import cell_len

    longest = max((cell_len(word) for text in texts for word in text.split()), default=0)
    return max(longest, LEAST_WIDTH) if longest <= width // 2 else LEAST_WIDTH


def _columns(rows: Rows) -> list[list[str]]:
    """The texts of each column, its name first."""
    texts = [[cell(value) for value in row] for row in rows]
    return [[printable(name), *(row[place] for row in texts)] for place, name in enumerate(rows.columns)]


def _print_folded(console: Console, rows: Rows) -> None:
    """Print the columns that fit, with folded headers, and name the others."""
    room, widths = console.width + FOLDED_GAP, dict[int, int]()
    for place, (name, *texts) in enumerate(_columns(rows)):
        width = max(map(len, [*name.split(), *texts]))
        if width + FOLDED_GAP <= room:
            room -= width + FOLDED_GAP
            widths[place] = width
    table = _table(rows, list(widths))
    table.collapse_padding = True
    for shown, width in zip(table.columns, widths.values(), strict=True):
        shown.width = width
    console.print(table)
    if left := [printable(name) for place, name in enumerate(rows.columns) if place not in widths]:
        console.print(f"Too wide for this terminal: {'; '.join(left)} ({MORE} give all columns).")


def _table(rows: Rows, places: Sequence[int] | None = None) -> Table:
    """A table of the columns at some places; default: all."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    table = Table(box=SIMPLE_HEAD, pad_edge=False, show_edge=False)
    places = range(len(rows.columns)) if places is None else places
    for place in places:
        table.add_column(
            Text(printable(rows.columns[place])), justify="right" if rows.kinds[place] == "number" else "left"
        )
    for row in rows:
        table.add_row(*[Text(cell(row[place])) for place in places])
    return table


def _block(names: Sequence[str], row: Sequence[Any]) -> Table:
    from rich.table import Table
    from rich.text import Text

    block = Table(box=None, pad_edge=False, show_header=False)
    block.add_column(style="bold", no_wrap=True)
    block.add_column(overflow="fold")
    for name, value in zip(names, row, strict=True):
        block.add_row(Text(printable(name)), Text(cell(value)))
    return block


def cell(value: Any) -> str:
    """A value as a table shows it: floats of six digits, the first 16 items of a list."""
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, (str, bytes, Mapping)) or not hasattr(value, "__len__"):
        return printable(str(value))
    items = list(value)  # a list, an array or a Series
    shown = [cell(item) for item in items[:16]]
    return " ".join(shown) + (f" … ({len(items)})" if len(items) > len(shown) else "")
