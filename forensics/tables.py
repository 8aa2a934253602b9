"""Records as a table for a spreadsheet or for data frames."""

import csv
import json
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ..files_protoleak import check_writable, write_whole

SUFFIXES = (".csv", ".parquet")
# a sign that begins a formula, also in full width, at the start of a cell or of what may be taken for one
FORMULA = re.compile(r"""((?:^|[,;|\t\r\n])[\s"']*)([=+\-@\uff1d\uff0b\uff0d\uff20])""")


def check_table(path: str | os.PathLike) -> None:
    """
    That a table can be written at `path`, before there is one.

    Raises:
        ValueError: no such kind of table.
        OSError: no file can be written there.
    """
    if Path(path).suffix not in SUFFIXES:
        raise ValueError(f"a table is {' or '.join(SUFFIXES)}, by its suffix; got {path}")
    check_writable(path)


def write_table(records: Iterable[dict[str, Any]], path: str | os.PathLike) -> None:
    """
    Records as a table, CSV or Parquet by the suffix, a row a file: every probability in a column of its own,
    prediction set, what is ruled out, and provenance as text. In CSV a quote stands before every sign with
    which a spreadsheet would begin a formula, at the start of a cell and after what another country's
    spreadsheet takes for the end of one.
    """
    path = Path(path)
    check_table(path)
    rows = [_flat(record) for record in records]
    columns = list(dict.fromkeys(name for row in rows for name in row))

    def write_csv(partial: Path) -> None:
        with partial.open("w", encoding="utf-8", newline="") as stream:
            writer = csv.DictWriter(stream, [_inert(name) for name in columns])
            writer.writeheader()
            writer.writerows({_inert(name): _inert(value) for name, value in row.items()} for row in rows)

    def write_parquet(partial: Path) -> None:
        from datasets import Dataset

        Dataset.from_list([{name: row.get(name) for name in columns} for row in rows]).to_parquet(partial)

    write_whole(path, write_csv if path.suffix == ".csv" else write_parquet)


def _flat(record: dict[str, Any]) -> dict[str, Any]:
    row = {name: value for name, value in record.items() if not isinstance(value, dict | list)}
    row["prediction_set"] = " or ".join(record["prediction_set"] or [])
    row["ruled_out"] = ", ".join(record["ruled_out"] or [])
    row["provenance"] = json.dumps(record["provenance"])
    row["timesteps"] = " ".join(map(str, record["timesteps"]))
    if stability := record.get("stability"):
        row["stability"] = f"{stability['kept']} of {stability['of']}"
    return row | {f"p({a['label']})": a["score"] for a in record["attributions"] or []}


def _inert(value: Any) -> Any:
    """Text that no spreadsheet takes for a formula (OWASP, CSV injection)."""
    return FORMULA.sub(r"\1'\2", value) if isinstance(value, str) else value


__all__ = ["check_table", "write_table"]
