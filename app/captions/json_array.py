"""Reads the elements of a JSON array of any length, one at a time."""

import io
import json
from collections.abc import Iterator

MAX_ELEMENT_CHARS = 2**20

_CHUNK = 2**18


class BrokenJsonError(Exception):
    """The file is not JSON, has no array of captions, or is cut off."""


class JsonArrayReader:
    """Yields the elements of an array, and keeps only one of them in memory.

    The array is the outermost value of the file, or the value of the outermost object's key ``annotations``. The values
    of other keys are skipped piece by piece.
    """

    def __init__(self, text: io.TextIOBase) -> None:
        self._text = text
        self._decoder = json.JSONDecoder()
        self._buffer = ""
        self._position = 0

    def elements(self) -> Iterator[object]:
        """Yield the elements.

        Raises:
            BrokenJsonError: the file is not JSON of this form, or is cut off.
        """
        match self._next_character():
            case "[":
                yield from self._array()
            case "{":
                found = False
                for key in self._keys():
                    if key == "annotations" and self._next_character(take=False) == "[":
                        found = True
                        self._next_character()
                        yield from self._array()
                    else:
                        self._skip_value()
                if not found:
                    raise BrokenJsonError("its outermost object has no array 'annotations'")
            case "":
                return
            case _:
                raise BrokenJsonError("it begins with neither an array nor an object")

    def _array(self) -> Iterator[object]:
        """Yield the elements of an array whose opening bracket has been read."""
        if self._next_character(take=False) == "]":
            self._next_character()
            return
        while True:
            yield self._value()
            if self._expect(",]") == "]":
                return

    def _keys(self) -> Iterator[str]:
        """Yield the keys of an object whose opening brace has been read; the caller reads or skips each value."""
        if self._next_character(take=False) == "}":
            self._next_character()
            return
        while True:
            key = self._value()
            self._expect(":")
            yield str(key)
            if self._expect(",}") == "}":
                return

    def _skip_value(self) -> None:
        # One level is enough for the long lists that such files have beside their captions.
        if self._next_character(take=False) == "[":
            self._next_character()
            for _ in self._array():
                pass
        else:
            self._value()

    def _value(self) -> object:
        self._next_character(take=False)
        while True:
            try:
                value, end = self._decoder.raw_decode(self._buffer, self._position)
            except (ValueError, RecursionError) as error:
                if not (len(self._buffer) - self._position <= MAX_ELEMENT_CHARS and self._read_more()):
                    problem = f"an element is not closed, or longer than {MAX_ELEMENT_CHARS} characters"
                    raise BrokenJsonError(problem) from error
                continue
            # A number at the end of the buffer may have more digits in the file.
            if end < len(self._buffer) or not self._read_more():
                self._position = end
                return value

    def _expect(self, characters: str) -> str:
        found = self._next_character()
        if not found or found not in characters:
            what = f"'{found}'" if found else "the end of the file"
            raise BrokenJsonError(f"{what} was found where one of '{characters}' was expected")
        return found

    def _next_character(self, *, take: bool = True) -> str:
        """Return the next character that is not white space, or an empty string at the end of the file."""
        while True:
            while self._position < len(self._buffer) and self._buffer[self._position] in " \t\r\n":
                self._position += 1
            if self._position < len(self._buffer):
                break
            if not self._read_more():
                return ""
        character = self._buffer[self._position]
        self._position += take
        return character

    def _read_more(self) -> bool:
        piece = self._text.read(_CHUNK)
        self._buffer = self._buffer[self._position :] + piece
        self._position = 0
        return bool(piece)
