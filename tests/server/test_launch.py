"""What the launcher makes of the flags and the policies, where vLLM is not needed for it."""

from __future__ import annotations

import json

import pytest

from directions.errors import TrimtabError
from server.cli.serve import _engine_settings
from server.launch import needed_sites
from server.settings import Settings
from server.status import SiteStatus, site_status
from steering.engine.settings import SITE_NAMES, EngineSettings
from steering.plan import Plan, PlanGate, Projection, Row, Term

ADD = Row((Term("0" * 64, ((1, 1.0),)),))
SCALE = Row(heads=((1, 0, -1.0),))


def clip(site: str) -> Row:
    layers = ((1, (0.0, None, None)),)
    return Row(projections=(Projection(site, "clip", (("0" * 64, None),), layers),))  # type: ignore[arg-type]


def gated(row: Row) -> Plan:
    gate = PlanGate("g", "1" * 64, 0, "prompt_end", 0.5, None, 1)
    return Plan.of([[Row()] * 5, [row] * 5], gates=[gate])


@pytest.mark.parametrize(
    ("plans", "sites"),
    [
        ([], ("add",)),
        ([Plan.everywhere(ADD)], ("add",)),
        ([Plan.everywhere(SCALE)], ("add", "heads")),
        ([Plan.everywhere(clip("mlp"))], ("add", "mlp")),
        ([Plan.everywhere(clip("residual")), gated(ADD)], ("add", "residual", "gates")),
        (
            [gated(clip("attention")), Plan.everywhere(SCALE)],
            ("add", "heads", "attention", "gates"),
        ),
    ],
)
def test_only_sites_that_policies_need_are_hooked(
    plans: list[Plan], sites: tuple[str, ...]
) -> None:
    assert needed_sites(plans) == sites


def test_sites_are_named_in_the_flag_and_additions_are_always_among_them() -> None:
    assert _engine_settings(None, "all", "auto", None) == EngineSettings()
    assert _engine_settings(None, "all", "all", None).sites == SITE_NAMES
    found = _engine_settings(7, "2-3", "gates, heads", 9)
    assert found == EngineSettings(7, (2, 3), ("add", "gates", "heads"), 9)


@pytest.mark.parametrize(
    ("arguments", "code", "field"),
    [
        (("all", "headz", None), "E_SITES", "--steering-sites"),
        (("all", "heads,,mlp", None), "E_SITES", "--steering-sites"),
        (("all", "auto", 0), "E_PROJECTIONS", "--projections"),
        (("3-1", "auto", None), "E_LAYERS", "--steering-layers"),
    ],
)
def test_what_cannot_be_hooked_is_refused(
    arguments: tuple[str, str, int | None], code: str, field: str
) -> None:
    with pytest.raises(TrimtabError) as caught:
        _engine_settings(None, *arguments)
    assert (caught.value.code, caught.value.field) == (code, field)


def test_markers_reach_the_processes_that_vllm_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = Settings("/x", 1024, ("<a>\n", "</a>"))
    assert Settings.from_environment(settings.to_environment()) == settings
    engine = EngineSettings(sites=("add", "heads"), projections=9)
    for name, value in engine.to_environment().items():
        monkeypatch.setenv(name, value)
    assert EngineSettings.from_environment() == engine


def test_the_status_tells_what_all_ranks_together_hook_and_what_the_model_lacks() -> None:
    ranks = [
        {"hooked": {"add": [0, 1], "heads": [0]}, "unavailable": {}},
        {"hooked": {"add": [2, 3], "gates": [4]}, "unavailable": {"mlp": "E_SITE_BLOCK: why"}},
    ]
    status = site_status(ranks, ("<think>", "</think>"))
    assert json.loads(status.model_dump_json()) == {
        "hooked": {"add": [0, 1, 2, 3], "heads": [0], "gates": [4]},
        "unavailable": {"mlp": "E_SITE_BLOCK: why"},
        "thinking": {"start": "<think>", "end": "</think>"},
    }
    assert site_status(ranks[:1], None) == SiteStatus(
        hooked={"add": [0, 1], "heads": [0]}, unavailable={}, thinking=None
    )
