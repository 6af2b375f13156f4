"""Loads preference pairs from a file, a folder or the hub, and refuses rows that cannot be used."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from datasets import Dataset, IterableDataset, load_dataset

BUILDERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet"}
SIDES = ("chosen", "rejected")
SINGLE = "completion"


def load_pairs(
    name: str,
    *,
    split: str,
    config: str | None = None,
    streaming: bool = False,
    unpaired: bool = False,
) -> Dataset | IterableDataset:
    """Return one split of preference pairs; a single file has only the split ``train``.

    With ``unpaired`` the rows may also be single responses: ``completion`` and a boolean ``label``.

    Raises:
        ValueError: a dataset that is empty, lacks a column, or (streamed: in its first row) has a
            row without a usable response.
    """
    path = Path(name)
    if path.suffix in BUILDERS and not path.is_dir():
        if not path.is_file():
            raise ValueError(f"--dataset_name must be a file that exists, got {name!r}")
        if path.stat().st_size == 0:
            raise ValueError(f"the dataset must have at least one row, got the empty file {name!r}")
        if not split.startswith("train"):
            raise ValueError(
                f"a file has only the split 'train' (train[:90%] works), got {split!r}"
            )
        files = {"train": str(path)}
        dataset = load_dataset(
            BUILDERS[path.suffix], data_files=files, split=split, streaming=streaming
        )
    elif path.is_file():
        known = ", ".join(BUILDERS)
        raise ValueError(f"--dataset_name must end in {known} when it is a file, got {name!r}")
    else:
        dataset = load_dataset(name, config, split=split, streaming=streaming)
    check_pairs(dataset, unpaired=unpaired)
    return dataset


def check_pairs(dataset: Dataset | IterableDataset, *, unpaired: bool = False) -> None:
    """Raise ValueError unless every row has usable responses (streamed: the first row)."""
    streamed = isinstance(dataset, IterableDataset)
    first = next(iter(dataset), None)
    if first is None:
        raise ValueError("the dataset must have at least one row, got none")
    single = unpaired and SINGLE in first
    sides = (SINGLE,) if single else SIDES
    needed = (SINGLE, "prompt", "label") if single else SIDES
    missing = [name for name in needed if name not in first]
    if missing:
        wanted = " and ".join(map(repr, missing))
        raise ValueError(f"the dataset must have a column {wanted}, got {sorted(first)}")
    columns = [name for name in ("prompt", *sides) if name in first]
    rows = [first] if streamed else dataset.select_columns(columns)
    for number, row in enumerate(rows):
        kinds = {name: kind_of(row[name]) for name in columns}
        if len(set(kinds.values())) > 1 or None in kinds.values():
            got = ", ".join(f"{name}: {kind or 'neither'}" for name, kind in kinds.items())
            raise ValueError(f"row {number} must be all text or all lists of messages, got {got}")
        if row.get("prompt") == []:
            raise ValueError(f"row {number} must have a prompt of at least one message, got none")
        for side in sides:
            if not _response(row[side]).strip():
                raise ValueError(f"row {number} must have a response in {side!r}, got an empty one")


def texts_of(dataset: Dataset | IterableDataset) -> Iterator[str]:
    """Yield every prompt and response as plain text."""
    for row in dataset:
        for name in ("prompt", *SIDES, SINGLE):
            value = row.get(name, "")
            if isinstance(value, str):
                yield value
            else:
                yield from (message["content"] for message in value if message.get("content"))


def kind_of(value: Any) -> str | None:
    """Return "text", "messages" or, for anything else, None."""
    if isinstance(value, str):
        return "text"
    if isinstance(value, list) and all(_is_message(item) for item in value):
        return "messages"
    return None


def _is_message(item: Any) -> bool:
    # a message that only calls tools has no content
    return (
        isinstance(item, Mapping)
        and isinstance(item.get("role"), str)
        and isinstance(item.get("content"), str | None)
    )


def _response(value: Any) -> str:
    if isinstance(value, str):
        return value
    return (value[-1].get("content") or "") if value else ""
