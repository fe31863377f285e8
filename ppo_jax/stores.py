"""Addresses in object stores, `gs://BUCKET/PATH` and `s3://BUCKET/PATH`.

This module imports only the standard library, so that it is cheap to import.
"""

import re
from pathlib import Path


def store_url(path: str | Path) -> str | None:
    """Return the address of a folder in an object store, or None for any other path.

    Example:
      >>> store_url(Path("s3://bucket/runs/a")), store_url("runs/a")
      ('s3://bucket/runs/a', None)
    """
    match = re.match(r"(gs|s3):/+(.*)", str(path))  # A Path has only one of the slashes.
    return f"{match[1]}://{match[2].rstrip('/')}" if match else None


def split_url(url: str) -> tuple[str, str, str]:
    """Return the scheme, the bucket and the path of an address that `store_url` returned.

    Raises:
      ValueError: if it names no bucket, or no path in the bucket.

    Example:
      >>> split_url("s3://bucket/runs/a")
      ('s3', 'bucket', 'runs/a')
    """
    scheme, _, rest = url.partition("://")
    bucket, _, path = rest.partition("/")
    if not bucket or not path:
        raise ValueError(f"{url} must be {scheme}://BUCKET/PATH, the address of a folder.")
    return scheme, bucket, path


def check_local(path: str | Path, but: str) -> None:
    """Raise ValueError if a path is in an object store.

    Args:
      path: the path.
      but: what must be local, such as "models are read from local folders".
    """
    if url := store_url(path):
        raise ValueError(f"{url} is in an object store, but {but}; copy it to this machine first.")
