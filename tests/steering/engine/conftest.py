"""Engines run in this process: no second interpreter to start, and nothing between test and engine."""

from __future__ import annotations

import functools
import os
from dataclasses import replace
from pathlib import Path

import pytest

os.environ.update(
    TRIMTAB_ENGINE="1",
    VLLM_ENABLE_V1_MULTIPROCESSING="0",
    # Ranks share the cores; by default each wants some of its own.
    VLLM_CPU_OMP_THREADS_BIND="nobind",
    VLLM_NO_USAGE_STATS="1",
    VLLM_LOGGING_LEVEL="WARNING",
    HF_HUB_OFFLINE="1",
    # For the test that reaches into the engine's process to break it. vLLM remembers its environment
    # from the first engine on, so it is set here and not where it is used.
    VLLM_ALLOW_INSECURE_SERIALIZATION="1",
)
os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="session")
def built_tiny_world(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory):
    """What :func:`tiny_world` gives each module its own policies of."""
    from tests.steering.engine.harness import build_world, every_kind, standard_policies

    world = build_world(tiny_checkpoint, tmp_path_factory.mktemp("tiny-store"), ("t", "e"))
    standard_policies(world)
    every_kind(world)
    return world


@pytest.fixture(scope="module")
def tiny_world(built_tiny_world):
    """The tiny random model with its reference, directions and the standard policies.

    What a module adds to the policies stays there: another's engine may have no slots for them.
    """
    world = built_tiny_world
    return replace(world, plans=dict(world.plans), policies=dict(world.policies))


@pytest.fixture(scope="session")
def demo_world(demo_model: Path, tmp_path_factory: pytest.TempPathFactory):
    """The demonstration model with its reference, directions and the standard policies."""
    from tests.steering.engine.harness import build_world, every_kind, standard_policies

    # Words of plain English, as this model does not think in markers; " the" and "." are told from
    # text, however they are cut into tokens.
    world = build_world(demo_model, tmp_path_factory.mktemp("demo-store"), (" the ", "."))
    standard_policies(world)
    every_kind(world)
    return world


@pytest.fixture(scope="session")
def serve_architecture(tmp_path_factory: pytest.TempPathFactory):
    """An engine for one of the table's architectures by name, started when it is first asked for."""
    from tests.steering.engine.architectures import ARCHITECTURES, serve

    @functools.cache
    def start(name: str):
        return serve(ARCHITECTURES[name], tmp_path_factory.mktemp(name))

    return start
