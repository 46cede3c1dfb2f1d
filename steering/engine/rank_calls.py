"""Calls that the API process makes on every rank: how they are sent, and how a refusal travels.

vLLM's executor reads the ranks' answers one by one and stops at the first error. The answers of the ranks
behind it stay unread, and each is then taken for the answer to that rank's next call, a forward pass
included. So a rank does not raise: it answers with its refusal.

Extension points, checked against vLLM 0.32 and 0.33: ``AsyncMPClient.call_utility_all_async(method,
*args)`` (``v1/engine/core_client.py``), which gives one result for each data parallel engine that the
client reaches, where ``AsyncLLM.collective_rpc`` gives the first engine's alone;
``EngineCore.collective_rpc(method, timeout, args, kwargs)``.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any

from directions.errors import TrimtabError

# A child of vLLM's logger, so that it shows where vLLM's own lines do.
logger = logging.getLogger("vllm.trimtab")

Answer = dict[str, Any]

_REFUSED = "refused"


def answering(method: Callable[..., Answer]) -> Callable[..., Answer]:
    """``method`` of a worker, with an exception turned into an answer that says so."""

    @functools.wraps(method)
    def answer(*args: Any) -> Answer:
        try:
            return method(*args)
        except Exception as error:
            logger.exception("%s was refused", method.__name__)
            return {_REFUSED: f"{type(error).__name__}: {error}"}

    return answer


async def call_ranks(engine: Any, method: str, *args: Any) -> list[Answer]:
    """Call a worker's method on every rank of every engine that this process reaches.

    Args:
        engine: vLLM's ``AsyncLLM``.
        method: its name.
        args: msgpack-native.

    Returns:
        The ranks' answers, engine by engine, each with its place: ``engine`` is what vLLM takes as
        ``data_parallel_rank``, ``rank`` counts within the engine.

    Raises:
        TrimtabError: ``E_PLUGIN_ABSENT`` when the workers do not know the method, ``E_ACTIVATION`` when
            a rank refuses.
    """
    try:
        engines = await engine.engine_core.call_utility_all_async(
            "collective_rpc", method, None, args, None
        )
    except Exception as error:
        raise _failed(error) from error
    answers = [
        {**answer, "engine": n, "rank": rank}
        for n, ranks in enumerate(engines)
        for rank, answer in enumerate(ranks)
    ]
    for answer in answers:
        if _REFUSED in answer:
            raise TrimtabError(
                "E_ACTIVATION", f"{place(answer)} refused: {answer[_REFUSED]}", field="engine"
            )
    return answers


def place(answer: Answer) -> str:
    """The rank that gave an answer, in words."""
    return f"rank {answer['rank']} of engine {answer['engine']}"


def _failed(error: Exception) -> TrimtabError:
    # An executor in this process says the first, one with processes of its own the second.
    unknown = ("is not implemented", "has no attribute 'trimtab_")
    if any(words in str(error) for words in unknown):
        return TrimtabError(
            "E_PLUGIN_ABSENT",
            "the engine's workers do not know Trimtab: its plug-in failed to load there; look for "
            "'Failed to load plugin trimtab' further up",
            field="engine",
        )
    return TrimtabError("E_ACTIVATION", f"the workers could not be asked: {error}", field="engine")
