"""The value of ``VLLM_PLUGINS`` for a steered server.

vLLM loads an endpoint plug-in only if ``VLLM_PLUGINS`` names it. But the variable is an allow-list
for every kind of plug-in: naming Trimtab alone would switch off all others that a plain start
loads. So the list is made of what a plain start loads, and Trimtab.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import entry_points
from typing import Final

VARIABLE: Final = "VLLM_PLUGINS"
NAME: Final = "trimtab"
ENDPOINT_GROUP: Final = "vllm.endpoint_plugins"

_LOADED_BY_DEFAULT: Final = (
    "vllm.general_plugins",
    "vllm.io_processor_plugins",
    "vllm.platform_plugins",
    "vllm.stat_logger_plugins",
)
# Endpoint plug-ins, and this resolver (which fetches adapters that a request names from the hub),
# are on only where somebody names them; a list that is made here must not be what names them.
_OPT_IN: Final = frozenset({"lora_hf_hub_resolver"})


def plugin_list(environment: Mapping[str, str]) -> str:
    """What ``VLLM_PLUGINS`` must be, given what it is.

    A list that the operator set is kept, with Trimtab added.
    """
    given = environment.get(VARIABLE)
    if given is None:
        names = {
            point.name for group in _LOADED_BY_DEFAULT for point in entry_points(group=group)
        } - _OPT_IN
    else:
        names = {name for name in given.split(",") if name}
    return ",".join(sorted(names | {NAME}))
