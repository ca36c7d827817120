"""Files of a checkpoint changed as somebody would who means it."""

from pathlib import Path


def unlisted(file: Path) -> Path:
    """The file, without the SHA256SUMS beside it that would tell that it was changed."""
    file.with_name("SHA256SUMS").unlink()
    return file
