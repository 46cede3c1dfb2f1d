"""vLLM's own ``serve`` command, called as functions.

The ``vllm`` console script is not used: it asks for the version of a distribution named "vllm", and
the CPU build has another name. Everything else is vLLM's: its parser, its checks, its start.

Extension points, checked against vLLM 0.32 and 0.33: ``vllm.entrypoints.cli.serve.ServeSubcommand``
(``subparser_init``, ``validate``, ``cmd``), ``vllm.utils.argparse_utils.FlexibleArgumentParser``,
``vllm.logger.configure_logging_from_args``.
"""

from __future__ import annotations

import contextlib
import difflib
from argparse import Namespace
from collections.abc import Sequence
from typing import Any, NoReturn

from directions.errors import TrimtabError


def parse(arguments: Sequence[str], own_flags: Sequence[str] = ()) -> Namespace:
    """Parse the arguments that are not Trimtab's.

    Args:
        arguments: the model and vLLM's flags, in the order in which they were given.
        own_flags: Trimtab's flags, to suggest one where a flag is misspelt.

    Raises:
        TrimtabError: ``E_OPTION`` for anything that vLLM's parser or its checks refuse; a flag that
            neither side knows is named.
    """
    from vllm.entrypoints.cli.serve import ServeSubcommand
    from vllm.logger import configure_logging_from_args

    parser, serve = _parser()
    known = [*own_flags, *(o for o in serve._option_string_actions if o.startswith("--"))]
    try:
        args: Namespace = parser.parse_args(["serve", *arguments])
        if args.model_tag is None and args.model == serve.get_default("model"):
            raise TrimtabError("E_OPTION", "no model is named", field="MODEL")
        configure_logging_from_args(args)
        ServeSubcommand().validate(args)
    except _ParserError as error:
        raise _refused(str(error), known) from None
    except TrimtabError:
        raise
    # Its own checks raise whatever is nearest: ValueError, KeyError, TypeError, AssertionError.
    except Exception as error:
        raise TrimtabError("E_OPTION", f"vLLM refuses its arguments: {error}") from error
    if args.model_tag is not None:
        args.model = args.model_tag
    return args


def print_help(topic: str) -> None:
    """Print vLLM's help: ``all``, one of its groups, or the flags that hold a word."""
    parser, _ = _parser()
    with contextlib.suppress(SystemExit):
        parser.parse_args(["serve", f"--help={topic}"])


def run(args: Namespace) -> None:
    """Start vLLM and serve until it ends."""
    from vllm.entrypoints.cli.serve import ServeSubcommand

    ServeSubcommand.cmd(args)


class _ParserError(Exception):
    """What argparse would print before it exits."""


def _parser() -> tuple[Any, Any]:
    from vllm.entrypoints.cli.serve import ServeSubcommand
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    class Parser(FlexibleArgumentParser):  # type: ignore[misc]
        def error(self, message: str) -> NoReturn:
            raise _ParserError(message)

    parser = Parser(prog="trimtab")
    subparsers = parser.add_subparsers(required=True, dest="subparser")
    return parser, ServeSubcommand().subparser_init(subparsers)


def _refused(message: str, known: Sequence[str]) -> TrimtabError:
    _, mark, rest = message.partition("unrecognized arguments: ")
    if not mark:
        return TrimtabError("E_OPTION", f"vLLM's parser says: {message}")
    words = rest.splitlines()[0].split()
    flags = [word.partition("=")[0] for word in words if word.startswith("-")] or words
    near = difflib.get_close_matches(flags[0], known, n=1)
    hint = f"; did you mean {near[0]}?" if near else ""
    return TrimtabError(
        "E_OPTION",
        f"neither trimtab serve nor vLLM knows {', '.join(flags)}{hint}",
        field=flags[0],
    )
