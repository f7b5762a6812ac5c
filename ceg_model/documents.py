"""Where text comes from: files and folders, Hugging Face data sets, the standard library.

Each source yields documents, as UTF-8 bytes, in an order that depends on nothing but the source.
A document is a file, or a row of a data set; a file above `16 * document_bytes` is cut at ends of
paragraphs into pieces of about `document_bytes`, so that one big text can be split by document.
"""

from __future__ import annotations

import os
import sysconfig
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

TABLE_SUFFIXES = {".parquet": "parquet", ".jsonl": "json", ".json": "json", ".csv": "csv"}
WHOLE_FILE_FACTOR = 16
# Tests differ between builds of Python (Debian leaves them out), and are not prose or programs.
STDLIB_SKIPPED = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test"}


class Skipped(Counter[str]):
    """How many files were left out, by reason."""


def is_table(path: Path) -> bool:
    """Whether `path` is a table of documents (Parquet, JSON, CSV) rather than one text."""
    return path.suffix in TABLE_SUFFIXES


def text_documents(path: Path, document_bytes: int, skipped: Skipped) -> Iterator[bytes]:
    """The documents of one text file, or of all text files under a folder, in sorted order.

    In a folder, hidden files and files that are not UTF-8 text are skipped and counted; a file
    that is named and is not text is an error.
    """
    if path.is_dir():
        for file in _files_under(path):
            yield from _file_documents(file, document_bytes, skipped)
        return
    if not path.exists():
        raise FileNotFoundError(f"source {path} must be a file or a folder, got nothing there")
    own = Skipped()
    yield from _file_documents(path, document_bytes, own)
    if own:
        raise ValueError(f"source {path} must be UTF-8 text, got {next(iter(own))} content")


def stdlib_documents(document_bytes: int, skipped: Skipped) -> Iterator[bytes]:
    """The standard library's own sources: about 10 MB of Python that every machine has."""
    root = Path(sysconfig.get_path("stdlib"))
    for file in _files_under(root, skip=STDLIB_SKIPPED):
        # _sysconfigdata holds the paths of this one build
        if file.suffix == ".py" and not file.name.startswith("_sysconfigdata"):
            yield from _file_documents(file, document_bytes, skipped)


def dataset_documents(
    name: str,
    text_field: str,
    *,
    split: str = "train",
    config: str | None = None,
    data_files: list[str] | None = None,
) -> Iterator[bytes]:
    """The rows of a data set, through Hugging Face's loader.

    `name` is a data set ("user/name", or a folder), or a format ("parquet", "json", "csv") together
    with `data_files`.
    """
    try:
        import datasets
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "data sets and tables need the package 'datasets': pip install datasets"
        ) from error
    label = ", ".join(data_files) if data_files else name
    for file in data_files or []:
        if not Path(file).is_file():
            raise FileNotFoundError(f"source {file} must be a file, got nothing there")
    try:
        rows = datasets.load_dataset(
            name, config, data_files=data_files, split=split, streaming=True
        )
        yield from _row_texts(rows, label, text_field)
    except (ConnectionError, datasets.exceptions.DatasetsError) as error:
        raise ValueError(f"data set {label} could not be read: {error}") from error


def _row_texts(rows: Any, label: str, text_field: str) -> Iterator[bytes]:
    for number, row in enumerate(rows):
        if text_field not in row:
            raise ValueError(
                f"text field of {label} must be one of {', '.join(row)}, got {text_field!r}"
            )
        text = row[text_field]
        if not isinstance(text, str):
            raise ValueError(
                f"{text_field!r} in row {number} of {label} must be a string, "
                f"got {type(text).__name__}"
            )
        yield text.encode("utf-8", errors="replace")


def _files_under(root: Path, skip: set[str] | frozenset[str] = frozenset()) -> Iterator[Path]:
    """All regular files below `root`, sorted, without hidden ones."""
    for folder, names, files in os.walk(root):
        # in place: os.walk goes down into what is left
        names[:] = sorted(n for n in names if not n.startswith(".") and n not in skip)
        for name in sorted(files):
            if not name.startswith(".") and (Path(folder) / name).is_file():
                yield Path(folder) / name


def _file_documents(path: Path, document_bytes: int, skipped: Skipped) -> Iterator[bytes]:
    whole = path.stat().st_size <= WHOLE_FILE_FACTOR * document_bytes
    with path.open("rb") as file:
        rest = b""
        while block := file.read(-1 if whole else document_bytes):
            text = rest + block
            if b"\0" in text:
                skipped["binary"] += 1
                return
            cut = len(text) if whole else _paragraph_end(text)
            text, rest = text[:cut], text[cut:]
            if not _is_utf8(text):
                skipped["non-UTF-8"] += 1
                return
            if text:
                yield text
    if rest and _is_utf8(rest):
        yield rest
    elif rest:
        skipped["non-UTF-8"] += 1


def _paragraph_end(text: bytes) -> int:
    """Where to cut `text`: after its last blank line, else its last line, else a character."""
    for mark in (b"\n\n", b"\n"):
        end = text.rfind(mark, len(text) // 2)
        if end >= 0:
            return end + len(mark)
    end = len(text)
    while end > 0 and text[end - 1] & 0xC0 == 0x80:  # UTF-8 continuation bytes
        end -= 1
    return max(end - 1, 0)


def _is_utf8(text: bytes) -> bool:
    try:
        text.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True
