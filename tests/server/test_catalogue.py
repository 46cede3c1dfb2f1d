from __future__ import annotations

import json

import pytest

from directions.errors import TrimtabError
from server.catalogue import Catalogue
from server.settings import Settings
from tests.server.conftest import make_entry


def test_the_catalogue_survives_the_way_to_another_process(catalogue: Catalogue) -> None:
    described = make_entry("told", description="über\nlines", strengthRange=[-2.0, 4.0])
    original = Catalogue.of([*catalogue.entries.values(), described], default="told")
    copy = Catalogue.from_json(json.loads(json.dumps(original.to_json())))
    assert copy == original
    assert copy.entries["told"].policy.identity == described.policy.identity


def test_a_default_that_is_not_served_is_refused_with_those_that_are() -> None:
    with pytest.raises(TrimtabError) as caught:
        Catalogue.of([make_entry("guard")], default="gaurd")
    assert caught.value.code == "E_POLICY_UNKNOWN"
    assert caught.value.expected == "guard, off"


def test_only_plans_that_requests_can_ask_for_are_sent_to_the_engine(catalogue: Catalogue) -> None:
    entries = catalogue.entries
    assert catalogue.plans == [entries["guard"].plan, entries["kind"].plan]


def test_settings_reach_another_process_by_the_environment(tmp_path) -> None:
    settings = Settings(str(tmp_path), 1024)
    assert Settings.from_environment(settings.to_environment()) == settings
    assert Settings.from_environment({}) is None


def test_the_first_reason_of_a_failed_start_is_the_one_that_is_heard(tmp_path) -> None:
    settings = Settings(str(tmp_path), 1024)
    assert settings.recorded_failure() is None
    settings.record_failure("E_A: first")
    settings.record_failure("E_B: second")
    assert settings.recorded_failure() == "E_A: first"
