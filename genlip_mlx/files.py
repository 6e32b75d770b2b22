"""Result files that appear whole or not at all."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO


@contextmanager
def atomic_file(path: str | Path, text: bool = False) -> Iterator[IO]:
    """Write a file under a temporary name beside it; renamed into place on success, removed otherwise.

    Raises:
        OSError: naming the file, if the folder is missing, or the disk is full.
    """
    path = Path(path)
    if path.is_dir():
        raise OSError(f"{path} is a folder; name a file to write")
    temporary = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with open(temporary, "w" if text else "wb", encoding="utf-8" if text else None) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except FileNotFoundError as error:
        if error.filename != str(temporary):
            raise
        raise OSError(f"{path}: the folder {path.parent} does not exist") from None
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise OSError(f"{path}: the disk is full; nothing was written") from None
        raise
    finally:
        temporary.unlink(missing_ok=True)
