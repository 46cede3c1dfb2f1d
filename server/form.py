"""Choosing a policy in a form, which is how audio is sent.

A form's ``model`` may be an alias as a JSON body's may. Its parts are found with the parser that vLLM's
framework reads them with, so both see the same fields, and the alias is cut out of the bytes: the
rest, a recording of any kind, is passed on as it came. A form has no place for the ``steering``
object, and one that carries a field of that name is refused, since ignoring it would be an answer
that was steered differently from what was asked.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from directions.errors import TrimtabError

_FORM: Final = b"multipart/form-data"


@dataclass
class _Part:
    """One part: its name, whether it is a file, and where its content stands in the body."""

    name: bytes = b""
    is_file: bool = False
    start: int = 0
    end: int = 0


@dataclass(frozen=True)
class FormModel:
    """The form's ``model`` field.

    Attributes:
        value: what it says.
        start: where in the body it begins, in bytes.
    """

    value: str
    start: int

    def replace_by_prefix(self, body: bytes, prefix: str) -> bytes:
        """The body with the field cut down to ``prefix``, with which its value begins."""
        kept, whole = len(prefix.encode()), len(self.value.encode())
        return body[: self.start + kept] + body[self.start + whole :]


def is_form(content_type: bytes) -> bool:
    """Whether a body of this type is a form of several parts."""
    return parse_options_header(content_type)[0] == _FORM


def form_model(body: bytes, content_type: bytes) -> FormModel | None:
    """The ``model`` field of a form; None if there is none, or if the form cannot be read.

    A form that cannot be read is left to vLLM, which cannot read it either and says so.

    Raises:
        TrimtabError: ``E_BODY_FORM`` for a ``model`` that is given twice, ``E_STEERING_FIELD`` for a
            ``steering`` field.
    """
    found: FormModel | None = None
    for part in _parts(body, content_type):
        if part.is_file:
            continue
        # SDKs flatten an object into fields such as ``steering[policy]``.
        if part.name.partition(b"[")[0] == b"steering":
            raise TrimtabError(
                "E_STEERING_FIELD",
                "a form has no 'steering' object",
                field="$.steering",
                expected="the model's name NAME@POLICY, or the header X-Trimtab-Policy",
            )
        if part.name != b"model":
            continue
        if found is not None:
            raise TrimtabError("E_BODY_FORM", "the field 'model' is repeated", field="$.model")
        try:
            found = FormModel(body[part.start : part.end].decode(), part.start)
        except UnicodeDecodeError:
            # No served name; vLLM's 404 says which are.
            return None
    return found


def _parts(body: bytes, content_type: bytes) -> Iterator[_Part]:
    boundary = parse_options_header(content_type)[1].get(b"boundary")
    if not boundary:
        return
    parts: list[_Part] = []
    header = [b"", b""]

    def begin() -> None:
        parts.append(_Part())

    def header_field(data: bytes, start: int, end: int) -> None:
        header[0] += data[start:end]

    def header_value(data: bytes, start: int, end: int) -> None:
        header[1] += data[start:end]

    def header_end() -> None:
        if header[0].lower() == b"content-disposition":
            options = parse_options_header(header[1])[1]
            parts[-1].name = options.get(b"name", b"")
            parts[-1].is_file = b"filename" in options
        header[:] = b"", b""

    def part_data(data: bytes, start: int, end: int) -> None:
        # The whole body is one write, so these are places in the body.
        part = parts[-1]
        if part.end == 0:
            part.start = start
        part.end = end

    try:
        parser = MultipartParser(
            boundary,
            {
                "on_part_begin": begin,
                "on_header_field": header_field,
                "on_header_value": header_value,
                "on_header_end": header_end,
                "on_part_data": part_data,
            },
        )
        parser.write(body)
        parser.finalize()
    except FormParserError:
        return
    yield from parts
