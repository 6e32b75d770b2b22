"""Result files that appear whole or not at all."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
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
    if path.exists() and not path.is_file():  # renaming would replace a device or pipe by a file
        raise OSError(f"{path} is not a plain file; name another")
    target = path.resolve()  # through a link to the file it stands for
    temporary = target.with_name(f".{target.name}.{os.getpid()}.partial")
    try:
        with (
            # A file name that is no UTF-8 has lone surrogates; their escapes are JSON's as well.
            open(temporary, "w", encoding="utf-8", errors="backslashreplace") if text else open(temporary, "wb")
        ) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise OSError(f"{path}: the disk is full; nothing was written") from None
        if error.filename != str(temporary):
            raise
        if isinstance(error, FileNotFoundError):
            raise OSError(f"{path}: the folder {path.parent} does not exist") from None
        raise OSError(f"{path}: cannot be written ({error.strerror})") from None
    finally:
        with suppress(OSError):
            temporary.unlink()
