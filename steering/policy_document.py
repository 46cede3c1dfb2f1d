"""A policy file's text, read as plain data with the line of every value.

YAML has more in it than a policy needs, and some of it is dangerous or surprising. This reader
takes the part that means the same as JSON: mappings with string keys, lists, strings, numbers,
true, false and null, spelled as in the YAML 1.2 core schema. So ``off`` is a string and not
"false", ``1e-3`` is a number, and there are no dates. Anchors, aliases, tags, repeated keys and a
second document are refused, as are texts that are too long or too deep, before any of it is built.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import yaml
from yaml.composer import Composer
from yaml.parser import Parser
from yaml.reader import Reader
from yaml.resolver import BaseResolver
from yaml.scanner import Scanner

from steering.policy_errors import PathParts, PolicyError, PolicyErrors, shown

MAX_BYTES: Final = 256 * 1024
MAX_DEPTH: Final = 16

COMMA_HINT: Final = 'between braces a list with commas needs quotes, as in "3,5,12-20"'
"""What to say of ``{layers: 3,5,12-20}``, in which YAML sees the keys ``5`` and ``12-20``."""

_TAG = "tag:yaml.org,2002:"


class _CoreSchema(BaseResolver):
    """Which unquoted scalars are not strings: the YAML 1.2 core schema, decimal numbers only."""


for _name, _pattern, _first in (
    ("null", r"(?:~|null|Null|NULL|)\Z", ["~", "n", "N", ""]),
    ("bool", r"(?:true|True|TRUE|false|False|FALSE)\Z", list("tTfF")),
    ("int", r"[-+]?[0-9]+\Z", list("-+0123456789")),
    (
        "float",
        r"(?:[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?"
        r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))\Z",
        list("-+.0123456789"),
    ),
):
    _CoreSchema.add_implicit_resolver(_TAG + _name, re.compile(_pattern), _first)


class _RefusedError(Exception):
    def __init__(self, code: str, message: str, mark: yaml.Mark) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.line = mark.line + 1


class _Composer(Reader, Scanner, Parser, Composer, _CoreSchema):
    """Text to a tree of nodes. Nothing is constructed, so no tag can have an effect."""

    def __init__(self, text: str) -> None:
        Reader.__init__(self, text)
        Scanner.__init__(self)
        Parser.__init__(self)
        Composer.__init__(self)
        _CoreSchema.__init__(self)
        self._depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        # Checked on the event, which the parser makes lazily: a bomb is refused before it is read.
        event = self.peek_event()  # type: ignore[no-untyped-call]
        mark = event.start_mark
        if getattr(event, "anchor", None) is not None:  # an alias event has one too
            raise _RefusedError("E_POLICY_YAML", "anchors and aliases are not allowed", mark)
        if getattr(event, "tag", None) is not None:
            raise _RefusedError(
                "E_POLICY_YAML", "tags (words that start with '!') are not allowed", mark
            )
        if self._depth >= MAX_DEPTH:
            raise _RefusedError("E_POLICY_SIZE", f"nested deeper than {MAX_DEPTH} levels", mark)
        self._depth += 1
        try:
            return super().compose_node(parent, index)
        finally:
            self._depth -= 1


@dataclass(frozen=True)
class Document:
    """A document as plain data.

    Attributes:
        data: what a JSON parser could have given: dict, list, str, int, float, bool or None.
        lines: the line, from 1, of every value by its path.
        errors: faults that leave the rest readable, e.g. a repeated key (its first value is kept).
    """

    data: object
    lines: dict[PathParts, int]
    errors: tuple[PolicyError, ...]

    def line(self, path: Sequence[str | int]) -> int | None:
        """The line of the value at ``path``, or of the nearest thing around it."""
        for end in range(len(path), -1, -1):
            found = self.lines.get(tuple(path[:end]))
            if found is not None:
                return found
        return None


def read_document(text: str | bytes) -> Document:
    """Read one YAML (or JSON) document.

    Args:
        text: the document; bytes are UTF-8, with or without a byte order mark.

    Raises:
        PolicyErrors: ``E_POLICY_SIZE`` (over 256 KiB, or nested deeper than 16 levels) or
            ``E_POLICY_YAML`` (not UTF-8, not YAML, more than one document, or a feature of YAML
            that policies do without).
    """
    size = len(text) if isinstance(text, bytes) else len(text.encode("utf-8", "surrogatepass"))
    if size > MAX_BYTES:
        raise PolicyErrors(
            [
                PolicyError(
                    "E_POLICY_SIZE", f"longer than {MAX_BYTES} bytes", expected=f"<= {MAX_BYTES}"
                )
            ]
        )
    try:
        decoded = text.decode("utf-8-sig") if isinstance(text, bytes) else text
        root = _Composer(decoded).get_single_node()
    except UnicodeDecodeError as error:
        message = f"not UTF-8: byte {error.start} is {shown(error.object[error.start])}"
        raise PolicyErrors([PolicyError("E_POLICY_YAML", message)]) from None
    except _RefusedError as error:
        raise PolicyErrors([PolicyError(error.code, error.message, line=error.line)]) from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        said = ", ".join(part for part in (error.context, error.problem) if part)
        raise PolicyErrors(
            [PolicyError("E_POLICY_YAML", said, line=mark.line + 1 if mark else None)]
        ) from None
    except (yaml.YAMLError, ValueError, OverflowError) as error:
        # The reader's complaint about a control character spans lines and names no place well;
        # the scanner lets an impossible \U escape out as one of the other two.
        message = "an escape that stands for no character"
        if isinstance(error, yaml.YAMLError):
            message = " ".join(str(error).split())
        raise PolicyErrors([PolicyError("E_POLICY_YAML", message)]) from None
    builder = _Builder()
    data = builder.value(root, ()) if root is not None else None
    return Document(data, builder.lines, tuple(builder.errors))


class _Builder:
    def __init__(self) -> None:
        self.lines: dict[PathParts, int] = {}
        self.errors: list[PolicyError] = []

    def value(self, node: yaml.Node, path: PathParts) -> object:
        self.lines.setdefault(path, node.start_mark.line + 1)
        if isinstance(node, yaml.MappingNode):
            return self.mapping(node, path)
        if isinstance(node, yaml.SequenceNode):
            return [self.value(item, (*path, i)) for i, item in enumerate(node.value)]
        return self.scalar(node, path)

    def mapping(self, node: yaml.MappingNode, path: PathParts) -> dict[str, object]:
        built: dict[str, object] = {}
        for key, item in node.value:
            line = key.start_mark.line + 1
            if key.tag != _TAG + "str":
                found = key.value if isinstance(key, yaml.ScalarNode) else "a collection"
                message = f"a key must be a string, found {shown(found)}"
                if key.tag == _TAG + "int":
                    message += f"; {COMMA_HINT}"
                self.refuse("E_POLICY_TYPE", message, path, line)
                continue
            inner = (*path, key.value)
            if key.value in built:
                message = f"the key is given twice, first on line {self.lines[inner]}"
                self.refuse("E_POLICY_DUPLICATE_KEY", message, inner, line)
                continue
            # The key's line, not the value's: that is where a person looks first.
            self.lines[inner] = line
            built[key.value] = self.value(item, inner)
        return built

    def scalar(self, node: yaml.Node, path: PathParts) -> object:
        text = node.value
        match node.tag.removeprefix(_TAG):
            case "null":
                return None
            case "bool":
                return text.lower() == "true"
            case "int":
                try:
                    return int(text)
                except ValueError:
                    # Python refuses to convert thousands of digits; no policy means such a number.
                    line = node.start_mark.line + 1
                    self.refuse("E_POLICY_NUMBER", "the number is too long", path, line)
                    return 0
            case "float":
                return float(text.lower().replace(".inf", "inf").replace(".nan", "nan"))
            case _:
                return text

    def refuse(self, code: str, message: str, path: PathParts, line: int) -> None:
        self.errors.append(PolicyError(code, message, path, line=line))
