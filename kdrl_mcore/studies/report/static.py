"""The page's tables as plain HTML, for readers without JavaScript."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from typing import Any

STARTS = ("time", "host", "world_size", "resumed_from", "commit", "versions", "command")


def static_tables(data: dict[str, Any]) -> str:
    """The summary, notes, alerts, commands and differences of `page_data`; everything that comes from a run is escaped."""
    names = [group["name"] for group in data["groups"]]
    columns = data["table"]["columns"]
    summary = [
        [name, str(seeds), *("-" if column["cells"][g] is None else column["cells"][g]["text"] for column in columns)]
        for g, (name, seeds) in enumerate(zip(names, data["table"]["seeds"], strict=True))
    ]
    alerts = [[a["run"], a["name"], a["first"], a["last"], a["count"], a["message"]] for a in data["alerts"]]
    starts = [
        [run["run"], run["progress"], *(start[key] for key in STARTS)]
        for run in data["runs"]
        for start in run["starts"] or [dict.fromkeys(STARTS, "")]
    ]
    differing = [[row["key"], *row["values"]] for row in data["differences"]]
    return "".join(
        [
            "<p>Curves and rollouts need JavaScript. These are the numbers without it.</p>",
            *(f"<p>{escape(note)}</p>" for note in data["notes"]),
            _table("Summary", ["configuration", "seeds", *(column["title"] for column in columns)], summary),
            f"<p>{escape(data['intervals'])}</p>",
            _table("Alerts", ["run", "alert", "first step", "last step", "steps", "first message"], alerts),
            _table("Runs and their starts", ["run", "step", *(key.replace("_", " ") for key in STARTS)], starts),
            _table("Where the configurations differ", ["key", *names], differing),
        ]
    )


def _table(title: str, header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    body = "".join(f"<tr>{''.join(f'<td>{escape(str(cell))}</td>' for cell in row)}</tr>" for row in rows)
    head = "".join(f"<th>{escape(name)}</th>" for name in header)
    return f"<section><h2>{title}</h2><div class=scroll><table><tr>{head}</tr>{body}</table></div></section>" if body else ""
