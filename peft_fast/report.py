"""What `accelerate` did to each layer, as a table."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from rich.table import Table


class Row(NamedTuple):
    """One layer: its methods and the backend that runs them, or the reason why it is left as it is."""

    name: str
    method: str | None
    backend: str | None
    reason: str | None

    @property
    def status(self) -> str:
        return "fused" if self.reason is None else "left"

    @property
    def detail(self) -> str:
        return f"{self.method} on {self.backend}" if self.reason is None else self.reason


class Report:
    """What `accelerate` did, a `Row` for each layer. Prints as a table, in colour with rich."""

    def __init__(self, rows: list[Row]) -> None:
        self.rows = rows

    @property
    def fused(self) -> list[Row]:
        return [row for row in self.rows if row.reason is None]

    @property
    def left(self) -> list[Row]:
        return [row for row in self.rows if row.reason is not None]

    @property
    def title(self) -> str:
        return f"{len(self.fused)} layers fused, {len(self.left)} left as they were"

    def __iter__(self) -> Iterator[Row]:
        return iter(self.rows)

    def __str__(self) -> str:
        width = max((len(row.name) for row in self.rows), default=0)
        rows = (f"  {row.name:<{width}}  {row.status:<5}  {row.detail}" for row in self.rows)
        return "\n".join((self.title, *rows))

    def __repr__(self) -> str:
        return f"<Report: {self.title}>"

    def __rich__(self) -> Table:
        from rich.table import Table

        table = Table("layer", "status", "method and backend, or reason", title=self.title)
        for row in self.rows:
            table.add_row(row.name, row.status, row.detail, style=None if row.reason is None else "yellow")
        return table
