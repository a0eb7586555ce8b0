"""One kind of error for everything a user can mend; the command line prints its message and nothing else."""

from __future__ import annotations

import contextlib
import difflib
from collections.abc import Iterable, Iterator


class UserError(ValueError):
    """A mistake in a config, a data file or the state of a run folder; `problems` are whole sentences, all at once."""

    def __init__(self, *problems: str) -> None:
        self.problems = problems
        super().__init__("\n".join(problems))


def one_line(error: BaseException) -> str:
    """What an exception says, on one line, and its kind where that is a word or nothing."""
    said = " ".join(str(error).split())
    return said if " " in said else f"{type(error).__name__}: {said}"


@contextlib.contextmanager
def told_as(problem: str, kinds: tuple[type[BaseException], ...] = (Exception,)) -> Iterator[None]:
    """What is raised inside, of these kinds, becomes a UserError with the problem; one that is a UserError stays."""
    try:
        yield
    except UserError:
        raise
    except kinds as error:
        raise UserError(f"{problem}: {one_line(error)}") from error


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """' — did you mean 'x'?' where something known is near, else the known words."""
    words = list(dict.fromkeys(known))
    if not words:
        return "; none is known here"
    near = difflib.get_close_matches(word, words, n=1, cutoff=0.55)
    return f"; did you mean {near[0]!r}?" if near else f"; known: {', '.join(words)}"
