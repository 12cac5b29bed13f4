"""Texts in the columns of Parquet tables and Arrow streams, a few rows at a time; needs pyarrow."""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from gt_jax.data.files import refuse_other_kinds, text_field
from gt_jax.errors import InputError, one_line

_ROWS = 256  # read at once


def row_groups(path: Path, field: str) -> list[int]:
    """Bytes of each row group of a Parquet table, unpacked.

    Raises:
        InputError: pyarrow is missing, the file is damaged or has no column `field`.
    """
    with _opened(path, field) as table:
        about = table.metadata
        return [about.row_group(i).total_byte_size for i in range(about.num_row_groups)]


def parquet_rows(
    path: Path, start: int, stop: int, field: str, count: Callable[[int], None]
) -> Iterator[tuple[int, Any]]:
    """(row number from 1 on, value in column `field`) of the row groups from start to stop.

    Args:
        count: called with the number of bytes read since the last call.

    Raises:
        InputError: as `row_groups`.
    """
    with _opened(path, field) as table:
        groups = table.metadata.num_row_groups
        row = sum(table.metadata.row_group(i).num_rows for i in range(start))
        for group in range(start, stop):
            batches = table.iter_batches(batch_size=_ROWS, row_groups=[group], columns=[field])
            for batch in batches:
                for value in batch.column(0).to_pylist():
                    row += 1
                    yield row, value
            count(path.stat().st_size // groups)


def arrow_rows(path: Path, field: str, count: Callable[[int], None]) -> Iterator[tuple[int, Any]]:
    """(row number from 1 on, value in column `field`) of an Arrow stream, as Hugging Face's
    `save_to_disk` writes it.

    Args:
        count: called with the number of bytes read since the last call.

    Raises:
        InputError: as `row_groups`.
    """
    pyarrow = _pyarrow(path)
    row = at = 0
    with _failing(path, "Arrow stream"), pyarrow.OSFile(str(path)) as file:
        refuse_other_kinds(file.read(64), str(path))
        file.seek(0)
        stream = pyarrow.ipc.open_stream(file)
        _check_field(path, stream.schema.names, field)
        for batch in stream:
            column = batch.column(batch.schema.get_field_index(field))
            for first in range(0, len(column), _ROWS):
                for value in column.slice(first, _ROWS).to_pylist():
                    row += 1
                    yield row, value
            count(file.tell() - at)
            at = file.tell()


@contextlib.contextmanager
def _opened(path, field):
    pyarrow = _pyarrow(path)
    with _failing(path, "Parquet table"), pyarrow.parquet.ParquetFile(path) as table:
        _check_field(path, table.schema_arrow.names, field)
        yield table


def _check_field(path, names, field):
    if field not in names:
        text_field(str(path), dict.fromkeys(names), field)  # raises, and lists the columns


def _pyarrow(path) -> Any:
    try:
        import pyarrow
        import pyarrow.ipc
        import pyarrow.parquet
    except ImportError as error:
        raise InputError(f"{path} needs `pip install pyarrow`; or convert it to .jsonl") from error
    return pyarrow


@contextlib.contextmanager
def _failing(path, kind):
    """InputError for the many ways in which damaged files fail."""
    try:
        yield
    except (InputError, GeneratorExit):
        raise
    except Exception as error:
        reason = one_line(str(error).strip().partition("\n")[0] or type(error).__name__)
        raise InputError(f"{path} is no {kind}, or damaged ({reason})") from error
