"""Text that comes from elsewhere, made safe to encode and to print."""

import html
import re

CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # all but tab and new line


def utf8(text: str) -> str:
    """`text` as UTF-8 can hold it: surrogate pairs are joined, and lone ones become U+FFFD."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def escaped(text: str, keep: str = "") -> str:
    """`text` with every character that does not print, but those in `keep`, as an escape such as \\x1b."""
    return "".join(c if c.isprintable() or c in keep else c.encode("unicode_escape").decode() for c in text)


def visible(text: str) -> str:
    """`text` for a terminal: it keeps its new lines, but cannot move the cursor or change colours."""
    return escaped(text, keep="\n")


def for_html(text: object) -> str:
    """`text` for a page: no markup, and nothing that steers a terminal in which the file is shown."""
    return html.escape(CONTROL.sub(lambda found: escaped(found[0]), str(text)))


def one_line(message: object, longest: int = 200) -> str:
    """The first line of somebody else's message, printable, cut to `longest` characters."""
    first = next(iter(str(message).splitlines()), "")
    return escaped(first if len(first) <= longest else first[: longest - 3] + "...")


def as_message(text: str, longest: int = 2000) -> str:
    """An error as one line for a terminal, whatever it quotes; of a very long one the middle is left out."""
    if len(text) > longest:
        text = f"{text[: longest - 400]} ... {text[-400:]}"
    return escaped(text.replace("\n", " "))
