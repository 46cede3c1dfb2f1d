"""The client's side of a server's HTTP interface, for the commands that ask one.

Two kinds of errors leave this module. A :class:`TrimtabError` says what the caller can put right: a
wrong address, a missing key, a request that the server refuses. A :class:`ServerFailedError` says
that the server or the way to it failed, so that the same request may succeed later.
"""

from __future__ import annotations

import json
import math
import re
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final, NoReturn
from urllib.parse import urlsplit

from directions.errors import TrimtabError
from server.printable import printable, well_formed

if TYPE_CHECKING:
    import httpx

LIVE_PATH: Final = "/v1/steering/live"
MODELS_PATH: Final = "/v1/models"
CHAT_PATH: Final = "/v1/chat/completions"

_URL_EXPECTED: Final = "a server's address, such as http://127.0.0.1:8000"
_KEY_EXPECTED: Final = "the server's key, with --api-key or in TRIMTAB_API_KEY"
_CONNECT_SECONDS: Final = 5.0
# Statuses that a server or a proxy before it gives while it starts, ends or has too much to do.
_PASSING: Final = frozenset({408, 429})
_ERRNO: Final = re.compile(r"^\[[^\]]*\]\s*")


class ServerFailedError(TrimtabError):
    """The server, or the way to it, failed: nothing that the caller typed puts it right."""


def server_url(given: str) -> str:
    """The address of a server as the client uses it: with a scheme, without ``/v1`` at its end.

    Args:
        given: as a person types it: ``127.0.0.1:8000``, ``https://host/v1/``.

    Raises:
        TrimtabError: ``E_URL`` for what is no address, or one with a user name, a query or a
            fragment.
    """
    text = given.strip()
    address = text if "://" in text else f"http://{text}"
    try:
        parts = urlsplit(address)
        usable = bool(parts.hostname) and (parts.port is None or parts.port > 0)
    except ValueError:
        usable = False
    if not usable or printable(text) != text or any(character.isspace() for character in text):
        message = f"{printable(given)!r} is no address"
        raise TrimtabError("E_URL", message, field="URL", expected=_URL_EXPECTED)
    if parts.scheme not in ("http", "https"):
        message = f"the scheme {parts.scheme!r} is not known"
        raise TrimtabError("E_URL", message, field="URL", expected="http:// or https://")
    if "@" in parts.netloc:
        # Not shown again: it may hold a password.
        message = "the address holds a user name"
        raise TrimtabError("E_URL", message, field="URL", expected=_KEY_EXPECTED)
    if parts.query or parts.fragment:
        message = "the address holds a query or a fragment"
        raise TrimtabError("E_URL", message, field="URL", expected=_URL_EXPECTED)
    path = parts.path.rstrip("/").removesuffix("/v1").rstrip("/")
    return f"{parts.scheme}://{parts.netloc}{path}"


def require_httpx() -> None:
    """Make sure that requests can be sent.

    Raises:
        TrimtabError: ``E_DEPENDENCY`` where httpx is not installed.
    """
    try:
        import httpx  # noqa: F401
    except ImportError as error:
        raise TrimtabError(
            "E_DEPENDENCY",
            "asking a server needs httpx, which is not installed",
            expected="pip install httpx; trimtab[cpu] and trimtab[cuda] bring it",
        ) from error


class SteeringClient:
    """A connection to one server; a context manager.

    Args:
        url: the server's address, as :func:`server_url` takes it.
        api_key: the server's key, where it has one.
        wait: how many seconds an answer may take; None for as long as it takes.

    Raises:
        TrimtabError: ``E_URL``, ``E_OPTION`` for a key that no header can hold, ``E_DEPENDENCY``.
    """

    def __init__(self, url: str, api_key: str | None = None, *, wait: float | None = None) -> None:
        require_httpx()
        import httpx

        self.url: str = server_url(url)
        headers = {"accept": "application/json"}
        if api_key:
            if not (api_key.isascii() and api_key.isprintable()) or " " in api_key:
                # The key itself is not repeated: errors end up in logs.
                message = "the key holds a blank, a control character or one that is not ASCII"
                raise TrimtabError("E_OPTION", message, field="--api-key", expected=_KEY_EXPECTED)
            headers["authorization"] = f"Bearer {api_key}"
        self._has_key = bool(api_key)
        self._wait = wait
        try:
            # Redirects are not followed: the key is for the address that was given.
            self._http = httpx.Client(
                base_url=self.url,
                headers=headers,
                timeout=httpx.Timeout(wait, connect=_CONNECT_SECONDS),
            )
        except (httpx.InvalidURL, UnicodeError) as error:
            raise self._no_address(error) from error

    def __enter__(self) -> SteeringClient:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._http.close()

    def live(self) -> dict[str, Any]:
        """The document of ``GET /v1/steering/live``, not yet checked.

        Raises:
            TrimtabError: ``E_UNAUTHORIZED``, ``E_NOT_TRIMTAB``, ``E_URL`` or the server's own code.
            ServerFailedError: ``E_UNREACHABLE``, ``E_SERVER_FAILED`` or the server's own code.
        """
        return self._ask("GET", LIVE_PATH)

    def models(self) -> list[str]:
        """The names in ``GET /v1/models``, in its order.

        Raises:
            TrimtabError, ServerFailedError: as :meth:`live`; ``E_SERVER_ANSWER`` for a document
                without names.
        """
        data = self._ask("GET", MODELS_PATH).get("data")
        cards = data if isinstance(data, list) else []
        names = [card.get("id") for card in cards if isinstance(card, dict)]
        found = [name for name in names if isinstance(name, str)]
        if not found:
            message = f"{self.url}{MODELS_PATH} names no model"
            raise ServerFailedError("E_SERVER_ANSWER", message, field="$.data")
        return found

    def chat(self, body: dict[str, Any]) -> dict[str, Any]:
        """What ``POST /v1/chat/completions`` answers, not yet checked.

        Raises:
            TrimtabError, ServerFailedError: as :meth:`live`; ``E_SERVER_REFUSED`` for a refusal of
                vLLM's own.
        """
        return self._ask("POST", CHAT_PATH, body)

    def _ask(self, method: str, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        import httpx

        try:
            answer = self._http.request(method, path, json=body)
        except (httpx.InvalidURL, UnicodeError) as error:
            # Some names are found impossible only when they are looked up.
            raise self._no_address(error) from error
        except httpx.ConnectTimeout as error:
            raise self._unreachable(f"no connection within {_CONNECT_SECONDS:g} s") from error
        except httpx.TimeoutException as error:
            raise self._unreachable(f"no answer within {self._wait:g} s") from error
        except httpx.RequestError as error:
            # "[Errno 111] Connection refused": the number says nothing that the words do not.
            said = _ERRNO.sub("", str(error)) or type(error).__name__
            raise self._unreachable(printable(said)) from error
        if answer.status_code != 200:
            self._refuse(path, answer)
        try:
            document = _parse(answer.content)
        except (ValueError, RecursionError):
            document = None
        if not isinstance(document, dict):
            raise self._not_trimtab(path, "no JSON object")
        return document

    def _no_address(self, error: Exception) -> TrimtabError:
        message = f"{self.url!r} is no address: {printable(str(error))}"
        return TrimtabError("E_URL", message, field="URL", expected=_URL_EXPECTED)

    def _unreachable(self, reason: str) -> ServerFailedError:
        return ServerFailedError("E_UNREACHABLE", f"cannot reach {self.url}: {reason}")

    def _not_trimtab(self, path: str, found: str) -> TrimtabError:
        return TrimtabError(
            "E_NOT_TRIMTAB",
            f"{self.url}{path} answers with {found}: this is no Trimtab server, or one of a version"
            " that has no such route",
            field="URL",
            expected="the address of a `trimtab serve` that reads probes",
        )

    def _refuse(self, path: str, answer: httpx.Response) -> NoReturn:
        """Raise what an answer other than 200 means."""
        status = answer.status_code
        code, message, field, expected = _error_of(answer.content)
        if code is not None:
            raise _kind(status)(code, message or f"HTTP {status}", field=field, expected=expected)
        if status in (401, 403):
            said = "does not accept the API key" if self._has_key else "asks for an API key"
            raise TrimtabError(
                "E_UNAUTHORIZED",
                f"{self.url} {said} (HTTP {status})",
                field="--api-key",
                expected=_KEY_EXPECTED,
            )
        if answer.is_redirect:
            target = printable(answer.headers.get("location", "nowhere"))
            raise TrimtabError(
                "E_URL",
                f"{self.url}{path} redirects to {target}, and the key is not sent elsewhere",
                field="URL",
                expected="the address of the server itself",
            )
        if status == 404 and (path != CHAT_PATH or message in (None, "Not Found")):
            raise self._not_trimtab(path, "HTTP 404")
        kind = _kind(status)
        raise kind(
            "E_SERVER_FAILED" if kind is ServerFailedError else "E_SERVER_REFUSED",
            f"{self.url} answers with HTTP {status}" + (f": {message}" if message else ""),
            field=field,
        )


def _kind(status: int) -> type[TrimtabError]:
    return ServerFailedError if status >= 500 or status in _PASSING else TrimtabError


def _error_of(content: bytes) -> tuple[str | None, str | None, str | None, str | None]:
    """The code, the message, the field and what was expected, as far as an answer has them.

    The code is Trimtab's own; vLLM's is the HTTP status and says nothing more.
    """
    try:
        document = _parse(content)
    except (ValueError, RecursionError):
        return None, None, None, None
    error = document.get("error") if isinstance(document, dict) else None
    if isinstance(error, str):
        return None, printable(error), None, None
    if not isinstance(error, dict):
        return None, None, None, None

    def text(key: str) -> str | None:
        value = error.get(key)
        return printable(value) if isinstance(value, str) and value else None

    code = text("code")
    if code is not None and not re.fullmatch(r"E_[A-Z0-9_]+", code):
        code = None
    return code, text("message"), text("param") or text("field"), text("expected")


def _parse(content: bytes) -> Any:
    """Parse JSON, of which NaN and infinite numbers are no part.

    Raises:
        ValueError, RecursionError: it is none.
    """
    return well_formed(json.loads(content, parse_float=_finite, parse_constant=_no_number))


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text} is too large")
    return value


def _no_number(text: str) -> NoReturn:
    raise ValueError(f"{text} is not JSON")
