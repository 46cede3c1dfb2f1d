"""``trimtab policy validate``: what it prints, and how it ends."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner, Result

from directions.card import CardDraft, ProbeDraft
from directions.store import Store
from server.cli.policy import app

GUARD = """\
apiVersion: trimtab/v1
kind: Policy
name: guard
version: 3
mode: shadow
edits:
  calm:
    add: {direction: calm@1, layers: "1-2", strength: 0.5}
    scope: generation
"""


@pytest.fixture
def guard(tmp_path: Path) -> Path:
    path = tmp_path / "guard.yaml"
    path.write_text(GUARD)
    return path


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TRIMTAB_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def validate(*arguments: object) -> Result:
    return CliRunner().invoke(
        app, ["validate", *map(str, arguments)], env={"COLUMNS": "200", "TERM": "dumb"}
    )


def report(*arguments: object) -> tuple[int, dict[str, Any]]:
    result = validate(*arguments, "--json")
    document = json.loads(result.stdout)
    assert isinstance(document, dict)
    return result.exit_code, document


def put_calm(checkpoint: Path) -> None:
    """Store a direction ``calm`` that was made on the checkpoint."""
    from directions.fingerprint import fingerprint

    model = fingerprint(checkpoint)
    card = CardDraft(
        method="test",
        model=model,
        activation_norms=(1.0,) * model.num_layers,
        dtype="float32",
        created="2026-01-01T00:00:00Z",
    )
    shape = (model.num_layers, model.hidden_size)
    Store().put(card, np.ones(shape), np.ones(shape[0], dtype=bool), name="calm")


def test_a_valid_policy_ends_with_zero_and_a_row_of_the_table(guard: Path) -> None:
    result = validate(guard)

    assert result.exit_code == 0
    for shown in ("guard", "3", "shadow", "calm: add calm@1 (generation)"):
        assert shown in result.stdout


def test_the_json_report_states_the_policy_and_its_identity(guard: Path) -> None:
    code, document = report(guard)

    assert (code, document["valid"], document["errors"]) == (0, True, [])
    (policy,) = document["policies"]
    assert policy == {
        "file": str(guard),
        "name": "guard",
        "version": 3,
        "mode": "shadow",
        "onFailure": "closed",
        "strengthRange": [0.0, 1.0],
        "edits": {"calm": {"kind": "add", "scope": ["generation"], "direction": "calm@1"}},
        "gates": {},
        "identity": policy["identity"],
        "plan": None,
    }
    assert len(policy["identity"]) == 64


def test_faults_end_with_one_and_are_all_listed_beside_what_is_valid(
    guard: Path, tmp_path: Path
) -> None:
    bad = tmp_path / "bad.yaml"
    bad.write_text(GUARD.replace("guard", "bad").replace("0.5", ".nan").replace("shadow", "[/red]"))

    code, document = report(guard, bad)

    assert code == 1
    assert not document["valid"]
    assert [p["name"] for p in document["policies"]] == ["guard"]
    assert [(e["file"], e["line"], e["field"], e["code"]) for e in document["errors"]] == [
        (str(bad), 5, "$.mode", "E_POLICY_VALUE"),
        (str(bad), 8, "$.edits.calm.add.strength", "E_POLICY_NUMBER"),
    ]
    table = validate(guard, bad)
    assert table.exit_code == 1
    for shown in ("bad.yaml:8", "$.edits.calm.add.strength", "E_POLICY_NUMBER", "/red"):
        assert shown in table.stdout


def test_a_folder_stands_for_the_policies_in_it(guard: Path, tmp_path: Path) -> None:
    code, document = report(tmp_path, guard)

    assert code == 0
    assert [p["file"] for p in document["policies"]] == [str(guard)]


def test_a_name_taken_twice_is_a_fault(guard: Path, tmp_path: Path) -> None:
    (tmp_path / "again.yaml").write_text(GUARD)

    code, document = report(tmp_path)

    assert code == 1
    assert [e["code"] for e in document["errors"]] == ["E_POLICY_DUPLICATE_NAME"]


def test_a_path_that_does_not_exist_is_bad_input(tmp_path: Path) -> None:
    code, document = report(tmp_path / "gone.yaml")

    assert code == 2
    assert document["error"]["code"] == "E_POLICY_FILE"


def test_artefacts_are_looked_up_only_when_asked(guard: Path, home: Path) -> None:
    assert report(guard)[0] == 0

    code, document = report(guard, "--artefacts")

    assert code == 1
    (error,) = document["errors"]
    assert (error["code"], error["file"]) == ("E_ARTEFACT_UNKNOWN", str(guard))


def test_with_a_model_the_policy_is_compiled(
    guard: Path, home: Path, tiny_checkpoint: Path
) -> None:
    put_calm(tiny_checkpoint)

    code, document = report(guard, "--model", tiny_checkpoint)

    assert (code, document["errors"], document["warnings"]) == (0, [], [])
    assert len(document["policies"][0]["plan"]) == 64


def test_with_a_model_what_does_not_fit_it_is_a_fault(
    guard: Path, home: Path, tiny_checkpoint: Path
) -> None:
    put_calm(tiny_checkpoint)
    guard.write_text(GUARD.replace("1-2", "2-9"))

    code, document = report(guard, "--model", tiny_checkpoint)

    assert code == 1
    (error,) = document["errors"]
    assert (error["code"], error["field"], error["file"]) == (
        "E_LAYER_RANGE",
        "$.edits.calm.add.layers",
        str(guard),
    )


def test_the_ceiling_can_be_set(guard: Path, home: Path, tiny_checkpoint: Path) -> None:
    put_calm(tiny_checkpoint)
    guard.write_text(GUARD.replace("0.5", "0.5, unit: relative"))

    below, _ = report(guard, "--model", tiny_checkpoint, "--relative-ceiling", 0.5)
    above, document = report(guard, "--model", tiny_checkpoint, "--relative-ceiling", 0.4)

    assert (below, above) == (0, 1)
    assert [e["code"] for e in document["errors"]] == ["E_STRENGTH_CEILING"]


EVERYTHING = """\
apiVersion: trimtab/v1
kind: Policy
name: many
edits:
  calm:
    add: {direction: calm@1, layers: "2", strength: 0.5}
    scope: [prompt_end, {first: 16}]
  turn: {rotate: {plane: [calm@1, cold@1], layers: "3", by: 20}}
  still: {ablate: {direction: calm@1, sites: [mlp]}, scope: answer}
  quiet: {scale_heads: {heads: [[3, 1]], factor: 0}}
gates:
  harm: {probe: harm@1, at: think_end, between: [0.25, 0.75], then: [turn, quiet]}
  odd: {probe: harm@1, output: 1, at: token, above: 0.5, then: [quiet]}
"""


def put_more(checkpoint: Path) -> None:
    """Store what else ``EVERYTHING`` names."""
    from directions.fingerprint import fingerprint

    model = fingerprint(checkpoint)
    keys: dict[str, Any] = {
        "method": "test",
        "model": model,
        "dtype": "float32",
        "created": "2026-01-01T00:00:00Z",
    }
    shape = (model.num_layers, model.hidden_size)
    card = CardDraft(**keys, activation_norms=(1.0,) * model.num_layers)
    cold = np.random.default_rng(1).normal(size=shape)
    Store().put(card, cold, np.ones(shape[0], dtype=bool), name="cold")
    probe = ProbeDraft(
        **keys, site="residual", layer=1, read_out="affine", outputs=("harmful", "odd")
    )
    Store().put_probe(probe, np.ones((2, shape[1])), [0.0, 0.0], name="harm")


@pytest.fixture
def many(tmp_path: Path) -> Path:
    path = tmp_path / "many.yaml"
    path.write_text(EVERYTHING)
    return path


def test_every_kind_of_edit_scope_and_gate_is_shown(many: Path) -> None:
    result = validate(many)
    assert result.exit_code == 0
    for shown in (
        "calm: add calm@1 (prompt_end, first 16)",
        "turn: rotate calm@1, cold@1 (all)",
        "still: ablate calm@1 (answer)",
        "quiet: scale_heads (all)",
        "harm: harm@1[0] between 0.25 and 0.75 at think_end opens quiet, turn",
        "odd: harm@1[1] above 0.5 at token opens quiet",
    ):
        assert shown in result.stdout

    code, document = report(many)

    assert code == 0
    (policy,) = document["policies"]
    assert policy["edits"]["calm"]["scope"] == ["prompt_end", {"first": 16}]
    assert policy["edits"]["turn"] == {
        "kind": "rotate",
        "scope": ["all"],
        "plane[0]": "calm@1",
        "plane[1]": "cold@1",
    }
    assert policy["gates"]["harm"] == {
        "probe": "harm@1",
        "output": 0,
        "at": "think_end",
        "between": [0.25, 0.75],
        "then": ["quiet", "turn"],
    }


def test_a_policy_that_needs_thinking_markers_is_told_of_the_flags(
    many: Path, home: Path, tiny_checkpoint: Path
) -> None:
    put_calm(tiny_checkpoint)
    put_more(tiny_checkpoint)

    code, document = report(many, "--model", tiny_checkpoint)

    assert code == 1
    assert [(e["field"], e["code"]) for e in document["errors"]] == [
        ("$.edits.still.scope", "E_THINKING_MARKERS"),
        ("$.gates.harm.at", "E_THINKING_MARKERS"),
    ]
    assert all("--think-start and --think-end" in e["message"] for e in document["errors"])

    marked = ["--model", tiny_checkpoint, "--think-start", "<a>", "--think-end"]
    code, document = report(many, *marked, "</a>")

    assert (code, document["errors"]) == (0, [])
    _, other = report(many, *marked, "</b>")
    assert document["policies"][0]["plan"] != other["policies"][0]["plan"]


@pytest.mark.parametrize(
    ("flags", "field"),
    [
        (["--think-start", "<a>"], "--think-end"),
        (["--think-end", "</a>"], "--think-start"),
        (["--think-start", "", "--think-end", "</a>"], "--think-start"),
        (["--think-start", "<a>", "--think-end", "x" * 65], "--think-end"),
    ],
)
def test_markers_come_in_pairs(guard: Path, flags: list[str], field: str) -> None:
    code, document = report(guard, *flags)

    assert code == 2
    assert (document["error"]["code"], document["error"]["field"]) == ("E_THINKING_MARKERS", field)
