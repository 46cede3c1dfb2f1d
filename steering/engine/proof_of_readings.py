"""The start-up proof of probes: every score that a request should have comes back, from every engine.

A probe that sits on a path which is not taken, or in compiled code that was made without it, would report
nothing; a server in which that happens does not become ready. That a score is the right one is what the
parity check shows (``trimtab verify``).
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from typing import Any

from directions.errors import TrimtabError
from steering.engine.control import rank_status
from steering.engine.exchange import Exchange, current_exchange
from steering.readings import Reading

_PROMPT = tuple(range(1, 9))
_TOKENS = 3


async def prove_readings(engine: Any, readings: Sequence[Reading]) -> None:
    """Ask every engine for a few tokens and for all of their scores, the prompt's included.

    Args:
        engine: vLLM's ``AsyncLLM``, with the readings activated.
        readings: what is to be read.

    Raises:
        TrimtabError: ``E_PROOF_PROBE``: scores are missing.
    """
    from vllm import SamplingParams

    engines = 1 + max(rank["engine"] for rank in await rank_status(engine))
    for number in range(engines):
        exchange = Exchange("off", "off", "closed", 1.0, None)
        exchange.readings, exchange.trace = tuple(readings), "all"
        token = current_exchange.set(exchange)
        try:
            async for _ in engine.generate(
                {"prompt_token_ids": list(_PROMPT)},
                SamplingParams(temperature=0.0, max_tokens=_TOKENS, ignore_eos=True),
                request_id=f"trimtab-proof-{secrets.token_hex(8)}",
                **({"data_parallel_rank": number} if engines > 1 else {}),
            ):
                pass
        finally:
            current_exchange.reset(token)
        log = exchange.scores_of_choice(0)
        for n, reading in enumerate(readings):
            expected = len(_PROMPT) + _TOKENS - 1
            found = 0 if log is None else len(log.trace(n))
            if found != expected:
                raise TrimtabError(
                    "E_PROOF_PROBE",
                    f"engine {number} gave {found} of {expected} scores of probe {reading.key}; the likely "
                    "cause is compiled code that was made without it; start again with "
                    "VLLM_DISABLE_COMPILE_CACHE=1",
                    field=reading.key,
                )
