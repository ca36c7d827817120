"""What a row of data becomes: a text that follows a prompt, or two of which people preferred one."""

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Response:
    """What follows a prompt, and what people said of it."""

    prompt: str  # "" before plain text
    response: str  # "" after a bare prompt
    rating: float | None = None  # the mean of `ratings`
    ratings: tuple[float, ...] = ()
    scale: tuple[float, float] | None = None  # the lowest and the highest score possible
    genre: str = ""
    label: bool | None = None  # thumbs up or down
    raters: tuple[str, ...] = ()  # who gave `ratings`; left out: their places in it are people
    where: str = field(default="", compare=False, repr=False)  # file:line
    columns: tuple[str, ...] = field(default=(), compare=False, repr=False)  # of the row, that it is made of
    row: Any = field(default=None, compare=False, repr=False)  # an OwnRow, where a reward function reads it

    @property
    def texts(self) -> tuple[str, ...]:
        return (self.response,)


@dataclass(frozen=True)
class Preference:
    """Two responses to a prompt, and which of them people preferred."""

    prompt: str
    chosen: str
    rejected: str
    share: float = 1.0  # of the votes that went to `chosen`: .5 to 1, a tie counts a half
    votes: tuple[float, ...] = ()  # each rater's: 1 for `chosen`, 0 for `rejected`, .5 a tie; (): unknown
    raters: tuple[str, ...] = ()  # who gave `votes`; left out: their places in it are people
    where: str = field(default="", compare=False, repr=False)  # file:line
    columns: tuple[str, ...] = field(default=(), compare=False, repr=False)  # of the row, that it is made of
    row: Any = field(default=None, compare=False, repr=False)  # an OwnRow, where a reward function reads it

    @property
    def texts(self) -> tuple[str, ...]:
        return self.chosen, self.rejected
