from __future__ import annotations

from importlib.metadata import entry_points

from server.plugin_list import ENDPOINT_GROUP, NAME, plugin_list


def test_both_of_trimtabs_plug_ins_are_installed_under_the_name_that_is_listed() -> None:
    for group in ("vllm.general_plugins", ENDPOINT_GROUP):
        assert [point.name for point in entry_points(group=group, name=NAME)] == [NAME]


def test_the_list_is_what_a_plain_start_loads_and_trimtab() -> None:
    names = set(plugin_list({}).split(","))
    general = {point.name for point in entry_points(group="vllm.general_plugins")}
    assert general - {"lora_hf_hub_resolver"} <= names
    assert NAME in names
    assert "lora_hf_hub_resolver" not in names
    only_endpoints = {point.name for point in entry_points(group=ENDPOINT_GROUP)} - general
    assert not names & only_endpoints - {NAME}


def test_an_operators_own_list_is_kept() -> None:
    assert plugin_list({"VLLM_PLUGINS": "b,lora_hf_hub_resolver"}) == (
        "b,lora_hf_hub_resolver,trimtab"
    )
    assert plugin_list({"VLLM_PLUGINS": ""}) == "trimtab"
    assert plugin_list({"VLLM_PLUGINS": "trimtab"}) == "trimtab"
