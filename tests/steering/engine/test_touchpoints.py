"""An upgrade of vLLM that moves something fails with a sentence."""

from __future__ import annotations

from importlib import import_module

import pytest

from directions.errors import TrimtabError
from steering.engine import touchpoints
from steering.engine.touchpoints import Touchpoint, check_touchpoints

pytestmark = pytest.mark.engine


def test_the_installed_vllm_has_every_name_and_parameter() -> None:
    # A worker has imported the runner that it runs; here both are held against the list.
    for touchpoint in touchpoints.TOUCHPOINTS:
        import_module(touchpoint.module)
    check_touchpoints(heavy=True)


@pytest.mark.parametrize(
    "moved",
    [
        Touchpoint("vllm.v1.engine.output_processor", "OutputProcessor.gone", ("self",)),
        Touchpoint("vllm.no_such_module", "Anything", ("self",)),
        Touchpoint(
            "vllm.v1.engine.output_processor", "OutputProcessor.add_request", ("self", "other")
        ),
    ],
    ids=["name", "module", "parameter"],
)
def test_a_name_that_moved_is_named(monkeypatch, moved) -> None:
    monkeypatch.setattr(touchpoints, "TOUCHPOINTS", (moved,))
    with pytest.raises(TrimtabError, match=moved.name) as caught:
        check_touchpoints()
    assert caught.value.code == "E_VLLM_TOUCHPOINT"


def test_an_unchecked_release_needs_a_word(monkeypatch) -> None:
    import vllm

    monkeypatch.setattr(vllm, "__version__", "0.99.1")
    with pytest.raises(TrimtabError, match="--allow-unchecked-vllm") as caught:
        check_touchpoints()
    assert caught.value.code == "E_VLLM_VERSION"
    monkeypatch.setenv("TRIMTAB_ALLOW_UNCHECKED_VLLM", "1")
    check_touchpoints()
    assert touchpoints.check_version() == "0.99.1"
