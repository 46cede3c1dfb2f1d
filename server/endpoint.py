"""Trimtab's end of vLLM's API server: an endpoint plug-in.

vLLM calls it in every API process. ``attach_router`` runs while the app is built, after vLLM's
routes and before vLLM's own middleware, which therefore ends up around Trimtab's: requests that
authentication turns away are never seen here. ``init_state`` runs when the engine answers and
before the HTTP server listens, so a server that cannot steer is never ready.

Extension points, checked against vLLM 0.32 and 0.33: ``vllm.plugins.endpoint_plugins.interface.
EndpointPlugin`` (``name``, ``required_tasks``, ``attach_router``, ``init_state``); ``AsyncLLM``'s
``errored`` and ``shutdown``, which is called whenever a server ends; in the app's state,
``openai_serving_models`` (``base_model_paths``, ``lora_requests``).
"""

from __future__ import annotations

import asyncio
import functools
import json
import logging
from argparse import Namespace
from typing import Any

from fastapi import FastAPI
from starlette.datastructures import State

from directions.errors import TrimtabError
from server.catalogue import Catalogue
from server.middleware import Service, TrimtabMiddleware
from server.settings import Settings

# Below vLLM's logger, whose handlers and format are the server's.
logger = logging.getLogger("vllm.trimtab")


class TrimtabEndpoint:
    """See the module's docstring. Inert in a server that ``trimtab serve`` did not start."""

    name = "trimtab"
    required_tasks: tuple[str, ...] | None = None

    def __init__(self) -> None:
        self._settings = Settings.from_environment()

    def attach_router(self, app: FastAPI) -> None:
        """Add the status route and the layer around all routes."""
        if self._settings is None:
            logger.warning("not started by 'trimtab serve': nothing is steered")
            return
        from server.live import router as live
        from server.status import router as status

        app.include_router(status)
        app.include_router(live)
        app.add_middleware(TrimtabMiddleware)

    async def init_state(self, engine_client: Any, state: State, args: Namespace) -> None:
        """Activate the policies on every worker and prove that steering works.

        Raises:
            TrimtabError: the server cannot steer; the process ends before it listens.
        """
        if self._settings is None:
            return
        try:
            await self._start(self._settings, engine_client, state, args)
        except Exception as error:
            sentence = error if isinstance(error, TrimtabError) else _unexpected(error)
            self._settings.record_failure(str(sentence))
            raise
        _tell_of_death(self._settings, engine_client)

    async def _start(
        self, settings: Settings, engine_client: Any, state: State, args: Namespace
    ) -> None:
        from server.live import LiveView
        from server.metrics import engine_metrics, request_metrics, several_processes
        from server.status import site_status
        from server.versions import installed_versions
        from steering.engine.control import activate, activate_readings, rank_status
        from steering.engine.proof import prove
        from steering.engine.proof_of_readings import prove_readings

        if engine_client is None:
            raise TrimtabError(
                "E_SERVE_UNSUPPORTED", "this server has no engine, so there is nothing to steer"
            )
        catalogue = Catalogue.from_json(json.loads(settings.catalogue_path.read_text()))
        frontend = await activate(engine_client, catalogue.plans)
        state.trimtab_proof = proof = await prove(engine_client)
        logger.info(
            "steering works: %d layers act on %d engines (floor %.2g, least effect %.2g nats)",
            len(proof.layers),
            proof.engines,
            proof.floor,
            proof.least_effect,
        )
        if catalogue.readings:
            await activate_readings(engine_client, catalogue.readings, thinking=settings.thinking)
            await prove_readings(engine_client, catalogue.readings)
        state.trimtab_sites = site_status(await rank_status(engine_client), settings.thinking)
        models = state.openai_serving_models
        metrics, observed = request_metrics(), engine_metrics()
        observed.model_name = models.base_model_paths[0].name
        policies = [entry.policy for entry in catalogue.entries.values()]
        observed.observe_policies(policies, generation=1)
        frontend.observer = state.trimtab_live = LiveView(frontend, observed)
        service = Service(
            catalogue=catalogue,
            ledger=frontend.ledger,
            metrics=metrics,
            model_name=models.base_model_paths[0].name,
            served_names=lambda: (
                {path.name for path in models.base_model_paths} | set(models.lora_requests)
            ),
            max_body_bytes=settings.max_body_bytes,
            policy_label=observed.policy_label,
        )
        versions = installed_versions()
        metrics.observe_build(versions["trimtab"] or "", versions["vllm"] or "")
        if several_processes():
            # Kept in the state: a task that nobody holds may be collected.
            state.trimtab_slots = asyncio.create_task(
                metrics.write_slots(service.model_name, service.ledger.snapshot)
            )
        else:
            metrics.follow_slots(service.model_name, service.ledger.snapshot)
        state.trimtab = service


def _tell_of_death(settings: Settings, engine_client: Any) -> None:
    """Make a server whose engine died end with a reason; vLLM ends it as if it had been asked to.

    Its client is shut down in both cases, more than once, and only in this one has the engine failed
    before the first time.
    """
    shutdown = engine_client.shutdown

    @functools.wraps(shutdown)
    def telling_shutdown(*args: Any, **kwargs: Any) -> Any:
        engine_client.shutdown = shutdown
        if engine_client.errored:
            settings.record_failure("E_ENGINE: the engine's process ended while it was serving")
        return shutdown(*args, **kwargs)

    engine_client.shutdown = telling_shutdown


def _unexpected(error: Exception) -> str:
    return f"E_ENGINE: the start-up check ended with {type(error).__name__}: {error}"
