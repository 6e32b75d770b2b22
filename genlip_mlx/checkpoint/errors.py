"""What can be wrong with a checkpoint, a disk or the hub. Each message names the file and the remedy."""

from __future__ import annotations

from collections.abc import Sequence


class CheckpointError(ValueError):
    """The content of a checkpoint's files: missing, damaged, of another layout, or contradictory."""


class DiskFullError(OSError):
    """The disk filled up while a model was being written; nothing was changed."""


class HubError(OSError):
    """The hub could not be reached, or refused."""


def listed(names: Sequence[str], limit: int = 10) -> str:
    """Names for a message, at most `limit` of them."""
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
