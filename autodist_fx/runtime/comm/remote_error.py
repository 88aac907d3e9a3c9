"""Writes an exception as text, so that all ranks raise what one of them raised: same class, same message, no pickle."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, dataclass

from autodist_fx.errors import CommunicationError, RemoteRankError

_SPEAKER = "rank_that_says_it"
_MOST_TEXT, _MOST_NOTES = 4000, 3  # characters of a message or note, and notes, that cross ranks


def said_by(error: BaseException, rank: int) -> None:
    """Note which rank says an error that several ranks raise, where one stderr is of them all."""
    setattr(error, _SPEAKER, rank)


def speaker(error: BaseException | None) -> int | None:
    """Return the rank that says an error, or the error it was made from; None where each says its own."""
    while error is not None and not hasattr(error, _SPEAKER):
        error = error.__cause__
    return getattr(error, _SPEAKER, None)


@dataclass(frozen=True, slots=True)
class ErrorReport:
    """An exception that `rank` raised in its `call`th call of all ranks: its class by module and name, its arguments
    where they are plain, its text."""

    rank: int
    call: int
    module: str
    name: str
    arguments: tuple[str | int, ...]
    text: str
    notes: tuple[str, ...] = ()

    @classmethod
    def of(cls, rank: int, error: BaseException, call: int = 0) -> ErrorReport:
        """Return the report of an exception."""
        text = str(error)[:_MOST_TEXT]
        plain = all(isinstance(a, (str, int)) and len(str(a)) <= _MOST_TEXT for a in error.args)
        arguments = tuple(error.args) if plain and error.args else (text,)
        notes = tuple(str(note)[:_MOST_TEXT] for note in getattr(error, "__notes__", ())[:_MOST_NOTES])
        return cls(rank, call, type(error).__module__, type(error).__qualname__, arguments, text, notes)

    def to_text(self) -> str:
        """Return the report as JSON of one line."""
        return json.dumps(asdict(self))

    @classmethod
    def from_text(cls, text: str) -> ErrorReport:
        """Invert `to_text`. Raises ValueError, KeyError or TypeError for text that is none."""
        fields = json.loads(text)
        arguments, notes = tuple(fields["arguments"]), tuple(fields["notes"])
        rank, call, module, name = (fields[key] for key in ("rank", "call", "module", "name"))
        return cls(rank, call, module, name, arguments, fields["text"], notes)

    def error(self) -> Exception:
        """Return an exception of the same class and text, with a note that names the rank.

        A class that this process has not imported, that takes other arguments or says something else with them comes
        out as RemoteRankError, whose text begins with the class's name.
        """
        found: Exception | None = None
        kind = self._class()
        if kind is not None:
            try:
                found = kind(*self.arguments)
            except Exception:
                found = None
        if found is None or str(found) != self.text:
            found = RemoteRankError(f"{self.name}: {self.text}" if self.text else self.name)
        for note in self.notes:
            found.add_note(note)
        found.add_note(f"raised on rank {self.rank}")
        said_by(found, self.rank)
        return found

    def _class(self) -> type[Exception] | None:
        found: object = sys.modules.get(self.module)  # looked up, never imported
        for part in self.name.split("."):
            found = getattr(found, part, None)
        return found if isinstance(found, type) and issubclass(found, Exception) else None


class CallBroken(CommunicationError):
    """Ends a wait for other ranks, since one of them reported an error of what all were doing."""

    def __init__(self, report: ErrorReport) -> None:
        super().__init__(f"rank {report.rank} raised {report.name}: {report.text}")
        self.report = report
