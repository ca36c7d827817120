"""Ctrl-C while a command is being imported, which takes seconds with torch: one line, and exit code 130.

An exception would not do: Python code that is being imported may catch it, and C code may drop it.  Once
everything is imported, cli.run_script lets Ctrl-C raise KeyboardInterrupt again, until main() has returned.
"""

import os
import signal
import sys
from types import FrameType

COMMANDS = ("minirlhf", "train_sft.py", "train_rm.py", "train_ppo.py", "train_dpo.py")
EXIT_CODE = 128 + signal.SIGINT
MESSAGE = "interrupted"


def ends_command() -> None:
    """From here on Ctrl-C ends the process at once, where it runs one of our commands and nobody else handles
    Ctrl-C."""
    if _is_command(sys.orig_argv) and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _end)


def raises() -> None:
    """From here on Ctrl-C raises KeyboardInterrupt, as usual."""
    if signal.getsignal(signal.SIGINT) is _end:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _end(signum: int, frame: FrameType | None) -> None:
    os.write(2, f"{MESSAGE}\n".encode())  # print may be at work, and cannot be entered twice
    os._exit(EXIT_CODE)


def _is_command(argv: list[str]) -> bool:
    """Whether this is `python train_sft.py` or `python -m minirlhf.chat`, not a program that imports us."""
    words = argv[1:]
    while words and words[0].startswith("-"):
        option = words.pop(0)
        if option in ("-m", "-c"):
            return option == "-m" and words[:1] != [] and words[0].split(".")[0] in COMMANDS
        if option in ("-X", "-W"):
            words = words[1:]
    return words[:1] != [] and os.path.basename(words[0]) in COMMANDS
