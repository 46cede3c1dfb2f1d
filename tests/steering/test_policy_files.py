"""A folder of policies is taken whole or not at all, with every fault named."""

from __future__ import annotations

import logging
import os
import re
from pathlib import Path
from typing import Any

import pytest

from directions.card import ModelFingerprint
from directions.store import Store
from steering.policy import KINDS, parse_policy
from steering.policy_document import read_document
from steering.policy_errors import PolicyErrors
from steering.policy_files import (
    compile_policies,
    load_policies,
    read_policy,
    unresolved_artefacts,
)
from tests.steering.conftest import PutDirection, model_fingerprint

GUARD = """\
apiVersion: trimtab/v1
kind: Policy
name: guard
mode: off
edits:
  calm:
    add: {direction: calm@1, layers: "1-2", strength: 0.5}
    scope: generation
"""


def refusal(folder: Path) -> PolicyErrors:
    with pytest.raises(PolicyErrors) as caught:
        load_policies(folder)
    return caught.value


def test_policies_are_found_by_name(tmp_path: Path) -> None:
    (tmp_path / "b.yaml").write_text(GUARD)
    (tmp_path / "a.YML").write_text(GUARD.replace("guard", "other"))
    (tmp_path / "README.md").write_text("not a policy")
    (tmp_path / ".hidden.yaml").write_text("not: [a policy")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "c.yaml").write_text("not: [a policy")

    policies = load_policies(tmp_path)

    assert list(policies) == ["other", "guard"]
    assert policies["guard"].mode == "off"
    assert (
        policies["guard"].edits["calm"].add
        == parse_policy(
            {
                "apiVersion": "trimtab/v1",
                "kind": "Policy",
                "name": "guard",
                "edits": {
                    "calm": {"add": {"direction": "calm@1", "layers": [1, 2], "strength": 0.5}}
                },
            }
        )
        .edits["calm"]
        .add
    )


def test_json_is_a_spelling_of_the_same_policy() -> None:
    policy = read_policy(GUARD)

    assert read_policy(policy.canonical) == policy


def test_a_byte_order_mark_is_no_part_of_the_text() -> None:
    assert read_policy(b"\xef\xbb\xbf" + GUARD.encode()).identity == read_policy(GUARD).identity


def test_an_empty_folder_holds_no_policies(tmp_path: Path) -> None:
    assert load_policies(tmp_path) == {}


@pytest.mark.parametrize("name", ["missing", "file"])
def test_what_is_not_a_folder_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").touch()

    assert refusal(tmp_path / name).code == "E_POLICY_FOLDER"


def test_a_linked_file_is_read_as_mounted_configuration_is(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "guard.yaml").write_text(GUARD)
    (tmp_path / "policies").mkdir()
    (tmp_path / "policies" / "guard.yaml").symlink_to("../data/guard.yaml")

    assert list(load_policies(tmp_path / "policies")) == ["guard"]


def test_what_is_not_a_plain_file_is_refused_and_never_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.yaml")
    (tmp_path / "folder.yaml").mkdir()
    (tmp_path / "gone.yaml").symlink_to("nowhere")

    errors = refusal(tmp_path).errors

    assert [(Path(e.file or "").name, e.code) for e in errors] == [
        ("folder.yaml", "E_POLICY_FILE"),
        ("gone.yaml", "E_POLICY_FILE"),
        ("pipe.yaml", "E_POLICY_FILE"),
    ]


def test_every_fault_of_every_file_is_named_at_once(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(GUARD)
    (tmp_path / "b.yaml").write_text(GUARD.replace("guard", "off").replace("0.5", "much"))
    (tmp_path / "c.yaml").write_text("name: [")
    (tmp_path / "d.yaml").write_text(GUARD.replace("guard", "d") + "mode: shadow\nmodus: off\n")
    (tmp_path / "e.yaml").write_text(GUARD)
    (tmp_path / "f.yaml").write_text("x" * 300_000)

    found = [
        (Path(error.file or "").name, error.line, error.field, error.code)
        for error in refusal(tmp_path).errors
    ]

    assert found == [
        ("b.yaml", 3, "$.name", "E_POLICY_NAME_RESERVED"),
        ("b.yaml", 7, "$.edits.calm.add.strength", "E_POLICY_TYPE"),
        ("c.yaml", 1, "$", "E_POLICY_YAML"),
        ("d.yaml", 9, "$.mode", "E_POLICY_DUPLICATE_KEY"),
        ("d.yaml", 10, "$.modus", "E_POLICY_KEY"),
        ("e.yaml", None, "$.name", "E_POLICY_DUPLICATE_NAME"),
        ("f.yaml", None, "$", "E_POLICY_SIZE"),
    ]


def test_the_message_of_a_refusal_names_files_lines_and_both_owners_of_a_name(
    tmp_path: Path,
) -> None:
    (tmp_path / "a.yaml").write_text(GUARD)
    (tmp_path / "b.yaml").write_text(GUARD.replace("kind: Policy", "kind: Policy\nversion: 2"))
    (tmp_path / "c.yaml").write_text("{}")

    message = str(refusal(tmp_path))

    assert f"{tmp_path}/b.yaml: E_POLICY_DUPLICATE_NAME at $.name" in message
    assert f"{tmp_path}/a.yaml" in message
    assert f"{tmp_path}/c.yaml:1: E_POLICY_MISSING at $.kind" in message


def test_a_repeated_key_alone_is_a_refusal() -> None:
    with pytest.raises(PolicyErrors) as caught:
        read_policy(GUARD + "mode: enforce\n")

    assert (caught.value.code, caught.value.field) == ("E_POLICY_DUPLICATE_KEY", "$.mode")
    assert caught.value.errors[0].policy == "guard"


def test_a_missing_key_has_the_line_of_what_should_hold_it() -> None:
    with pytest.raises(PolicyErrors) as caught:
        read_policy(GUARD.replace(", strength: 0.5", ""))

    assert caught.value.errors[0].line == 7


# -- compiling -------------------------------------------------------------------------------------


def test_policies_are_compiled_whatever_their_mode(
    store: Store, put_direction: PutDirection, served: ModelFingerprint
) -> None:
    put_direction("calm")
    off = read_policy(GUARD)
    enforced = read_policy(GUARD.replace("mode: off", "mode: enforce"))

    plans = compile_policies({"off": off, "enforced": enforced}, store, served)

    assert plans["off"] == plans["enforced"]
    assert not plans["off"].is_identity


def test_every_fault_of_every_policy_is_named_at_once(
    store: Store, put_direction: PutDirection, served: ModelFingerprint
) -> None:
    put_direction("calm")
    texts = {
        "good": GUARD,
        "far": GUARD.replace("1-2", "2-9"),
        "unknown": GUARD.replace("calm@1", "angry@1"),
        "version": GUARD.replace("calm@1", "calm@2"),
    }
    policies = {name: read_policy(t.replace("guard", name)) for name, t in texts.items()}

    with pytest.raises(PolicyErrors) as caught:
        compile_policies(policies, store, served)

    assert [(e.policy, e.field, e.code) for e in caught.value.errors] == [
        ("far", "$.edits.calm.add.layers", "E_LAYER_RANGE"),
        ("unknown", "$.edits.calm.add.direction", "E_ARTEFACT_UNKNOWN"),
        ("version", "$.edits.calm.add.direction", "E_ARTEFACT_VERSION"),
    ]


def test_a_direction_of_other_weights_is_used_and_warned_of(
    store: Store,
    put_direction: PutDirection,
    served: ModelFingerprint,
    caplog: pytest.LogCaptureFixture,
) -> None:
    put_direction("calm", model=model_fingerprint(weights_sha256="d" * 64))

    with caplog.at_level(logging.WARNING, "trimtab.policies"):
        compile_policies({"guard": read_policy(GUARD)}, store, served)

    (record,) = caplog.records
    assert "W_DIRECTION_MODEL at $.edits.calm.add.direction" in record.getMessage()


def test_artefacts_that_do_not_resolve_are_found_without_a_model(
    store: Store, put_direction: PutDirection
) -> None:
    policy = read_policy(GUARD)

    (error,) = unresolved_artefacts(policy, store)
    assert (error.field, error.code) == ("$.edits.calm.add.direction", "E_ARTEFACT_UNKNOWN")

    put_direction("calm")
    assert unresolved_artefacts(policy, store) == ()


def test_the_policies_that_are_shipped_are_valid() -> None:
    folder = Path(__file__).parents[2] / "deploy" / "policies"

    assert set(load_policies(folder)) == {"refuse", "refuse-late"}


# -- the documentation -----------------------------------------------------------------------------

ROOT = Path(__file__).parents[2]


def test_the_documented_policy_is_valid() -> None:
    (example,) = re.findall(r"```yaml\n(.*?)```", (ROOT / "docs/policies.md").read_text(), re.S)

    policy = read_policy(example)
    assert policy.reference == "calm@2"
    assert list(policy.gates) == ["heated"]


@pytest.mark.parametrize("page", ["gates", *(f"edits/{kind.replace('_', '-')}" for kind in KINDS)])
def test_each_kind_and_gates_have_a_page_with_a_valid_example(page: str) -> None:
    text = (ROOT / f"docs/{page}.md").read_text()
    (example,) = re.findall(r"```yaml\n(.*?)```", text, re.S)
    data: dict[str, Any] = {"apiVersion": "trimtab/v1", "kind": "Policy", "name": "example"}
    if page == "gates":
        restore = {"ablate": {"direction": "refusal@1"}}
        data |= {"edits": {"restore": restore}, **read_document(example).data}  # type: ignore[dict-item]
    else:
        data["edits"] = read_document(example).data

    found = parse_policy(data)

    kinds = {edit.kind.replace("_", "-") for edit in found.edits.values()}
    assert found.gates if page == "gates" else kinds == {page.removeprefix("edits/")}


def test_every_code_is_documented() -> None:
    sources = [*ROOT.glob("steering/policy*.py"), *ROOT.glob("steering/edits/*.py")]
    sources += [ROOT / f"steering/{name}.py" for name in ("plan", "rows", "gates", "thinking")]
    raised = {
        code
        for source in sources
        for code in re.findall(r'"([EW]_[A-Z]+_[A-Z_]+)"', source.read_text())
    }
    documented = set(re.findall(r"`([EW]_[A-Z_]+)`", (ROOT / "docs/policies.md").read_text()))

    assert len(raised) > 20
    assert raised == documented
