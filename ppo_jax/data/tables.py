"""Parquet files, saved data sets and data sets of the Hugging Face hub, read by `datasets`."""

import contextlib
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

PARQUET_ENDINGS = (".parquet",)
# A data set of the hub, OWNER/NAME, and optionally its configuration and split.
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def is_hub_id(text: str) -> bool:
    """Return whether a text can be the name of a data set of the hub.

    Example:
      >>> is_hub_id("openai/gsm8k:main:test"), is_hub_id("../my prompts")
      (True, False)
    """
    return bool(_HUB_ID.fullmatch(text.partition(":")[0]))


def is_saved(name: str) -> bool:
    """Return whether a folder was written by `save_to_disk` of `datasets`."""
    return any((Path(name) / file).exists() for file in ("state.json", "dataset_dict.json"))


def read_table(source: str) -> list[dict[str, Any]]:
    """Read the rows of a Parquet file, of a folder or of a data set of the hub.

    Args:
      source: the name of a `.parquet` file, of a folder that `save_to_disk` wrote, of a folder of
        data files, or of a data set of the hub. The last three may be followed by `:SPLIT` or
        `:CONFIGURATION:SPLIT`, such as `openai/gsm8k:main:test`.

    Returns:
      One dictionary a row.

    Raises:
      ValueError: if the data cannot be read, or has several splits none of which is called `train`
        and none is named.
    """
    name, *parts = source.split(":")
    if len(parts) > 2:
        raise ValueError(f"{source} must be NAME, NAME:SPLIT or NAME:CONFIGURATION:SPLIT.")
    configuration, split = ([None] * 2 + parts)[-2:]
    with _errors(source):
        rows = _split_of(_load(name, configuration), source, split)
        return [dict(row) for row in rows]


def _load(name: str, configuration: str | None) -> Any:
    """Load a data set with all its splits."""
    import datasets  # It takes more than a second to import.

    path = Path(name)
    if path.suffix.lower() in PARQUET_ENDINGS:
        # Streamed, because otherwise a copy of the data would be written to the cache.
        return datasets.load_dataset("parquet", data_files=name, streaming=True)
    if is_saved(name):
        return datasets.load_from_disk(name)
    return datasets.load_dataset(name, configuration, streaming=path.is_dir())


def _split_of(loaded: Any, source: str, split: str | None) -> Iterable[dict[str, Any]]:
    """Return a split: the one that is named, else `train`, else the only one."""
    if not isinstance(loaded, dict):
        if split is not None:
            raise ValueError(f"it has no splits, so leave out :{split}")
        return loaded
    names = ", ".join(loaded)
    split = split or ("train" if "train" in loaded or len(loaded) != 1 else names)
    if split not in loaded:
        raise ValueError(
            f"it has no split {split!r}; its splits are: {names}; append one, such as "
            f"{source.partition(':')[0]}:{next(iter(loaded))}"
        )
    return loaded[split]


@contextlib.contextmanager
def _errors(source: str) -> Iterator[None]:
    """Raise any error as one sentence, and keep `datasets` from logging it as well."""
    import datasets

    before = datasets.logging.get_verbosity()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    try:
        yield
    except Exception as error:  # Errors of many kinds come from the formats below the library.
        what = f"{source} cannot be read"
        if not Path(source.partition(":")[0]).exists():
            unreachable = isinstance(error, ConnectionError)
            what = (
                f"The Hugging Face hub cannot be reached to look for {source}, which is neither a "
                "file nor a folder here"
                if unreachable
                else f"{source} is neither a file nor a folder here, and cannot be read as a data "
                "set of the Hugging Face hub"
            )
        message = " ".join(str(error).split()).rstrip(".")
        raise ValueError(f"{what}: {message}.") from error
    finally:
        datasets.logging.set_verbosity(before)
