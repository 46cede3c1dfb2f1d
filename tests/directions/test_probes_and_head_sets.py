"""The store's other two kinds: what comes back, what is damaged, and everything that is refused."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rfc8785
from pydantic import ValidationError
from safetensors.numpy import save as save_safetensors

from directions.card import (
    CardDraft,
    HeadSetCard,
    HeadSetDraft,
    ModelFingerprint,
    ProbeDraft,
    Source,
)
from directions.errors import TrimtabError
from directions.store import ArtefactRef, Direction, HeadSet, Probe, Store

LAYERS, HEADS, WIDTH = 3, 2, 8
FINGERPRINT = ModelFingerprint(
    architecture="LlamaForCausalLM",
    hidden_size=WIDTH,
    num_layers=LAYERS,
    num_heads=HEADS,
    num_kv_heads=1,
    tokenizer_sha256="a" * 64,
)
COMMON: dict[str, Any] = {
    "method": "logistic",
    "model": FINGERPRINT,
    "dtype": "float32",
    "created": "2026-01-02T03:04:05Z",
}
WEIGHTS = np.random.default_rng(1).normal(size=(2, WIDTH)).astype(np.float32)
BIAS = np.array([0.25, -3.0], dtype=np.float32)
PAIRS = ((2, 1), (0, 0), (2, 0))
EVIDENCE = np.array([-0.75, 0.5, 0.0], dtype=np.float32)


def a_probe(**changes: Any) -> ProbeDraft:
    fields = {
        "site": "residual",
        "layer": 1,
        "read_out": "affine",
        "outputs": ("refusal", "harm"),
        **COMMON,
    }
    return ProbeDraft.model_validate({**fields, **changes})


def a_head_set(**changes: Any) -> HeadSetDraft:
    return HeadSetDraft.model_validate({**COMMON, **changes})


def a_direction() -> CardDraft:
    return CardDraft.model_validate({**COMMON, "activation_norms": (1.0, 2.5, None)})


def put_probe(store: Store, name: str = "probe", **changes: Any) -> ArtefactRef:
    return store.put_probe(a_probe(**changes), WEIGHTS, BIAS, name=name)


def put_head_set(store: Store, name: str = "heads") -> ArtefactRef:
    return store.put_head_set(a_head_set(), PAIRS, EVIDENCE, name=name)


def put_direction(store: Store, name: str = "direction") -> ArtefactRef:
    return store.put(a_direction(), np.ones((LAYERS, WIDTH)), [True, False, True], name=name)


PUT = {"direction": put_direction, "probe": put_probe, "head-set": put_head_set}
LOAD: dict[str, Callable[[Store, str], Direction | Probe | HeadSet]] = {
    "direction": Store.load,
    "probe": Store.load_probe,
    "head-set": Store.load_head_set,
}
NEW_KINDS = ["probe", "head-set"]


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path)


def error_of(action: Callable[[], object]) -> TrimtabError:
    with pytest.raises(TrimtabError) as caught:
        action()
    return caught.value


# -- keeping and finding ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("site", "layer"), [("residual", 0), ("residual", 2), ("final_norm", None)]
)
@pytest.mark.parametrize("read_out", ["affine", "cosine"])
def test_a_probe_comes_back_as_it_was_put(
    store: Store, site: str, layer: int | None, read_out: str
) -> None:
    draft = a_probe(
        site=site,
        layer=layer,
        read_out=read_out,
        calibration={"threshold": 0.5, "slope": 2.0},
        description="étrange",
    )
    ref = store.put_probe(draft, WEIGHTS, BIAS, name="refusal")
    loaded = store.load_probe("refusal@1")
    assert loaded.reference == ref.reference == "refusal@1"
    assert loaded.sha256 == ref.sha256
    np.testing.assert_array_equal(loaded.weights, WEIGHTS)
    np.testing.assert_array_equal(loaded.bias, BIAS)
    assert loaded.weights.dtype == loaded.bias.dtype == np.float32
    card = loaded.card
    assert (card.kind, card.site, card.layer, card.read_out) == ("probe", site, layer, read_out)
    assert card.outputs == ("refusal", "harm")
    assert card.calibration == {"threshold": 0.5, "slope": 2.0}
    assert ProbeDraft.model_validate(card.model_dump(exclude={"tensors_sha256"})) == draft


def test_a_head_set_comes_back_in_the_order_it_was_put(store: Store) -> None:
    ref = put_head_set(store)
    loaded = store.load_head_set(f"sha256:{ref.sha256}")
    assert loaded.reference == f"sha256:{ref.sha256}"
    assert (loaded.name, loaded.version) == (None, None)
    assert loaded.heads == PAIRS == loaded.card.heads
    assert all(type(number) is int for pair in loaded.heads for number in pair)
    np.testing.assert_array_equal(loaded.evidence, EVIDENCE)
    assert loaded.evidence.dtype == np.float32
    assert loaded.card.kind == "head-set"


def test_heads_may_be_an_array(store: Store) -> None:
    ref = store.put_head_set(a_head_set(), np.array(PAIRS), EVIDENCE.tolist(), name="heads")
    assert ref == put_head_set(store)


def test_the_order_of_heads_is_part_of_the_identity(store: Store) -> None:
    first = put_head_set(store)
    turned = store.put_head_set(a_head_set(), PAIRS[::-1], EVIDENCE[::-1], name="heads")
    assert turned.version == 2
    assert turned.sha256 != first.sha256


def test_what_was_loaded_cannot_be_changed_in_place(store: Store) -> None:
    put_probe(store)
    put_head_set(store)
    probe, head_set = store.load_probe("probe"), store.load_head_set("heads")
    for tensor in (probe.weights, probe.bias, head_set.evidence):
        with pytest.raises(ValueError, match="read-only"):
            tensor[0] = 1.0


@pytest.mark.parametrize("kind", NEW_KINDS)
def test_the_identity_covers_the_card_and_the_card_covers_the_tensors(
    store: Store, kind: str
) -> None:
    folder = store.artefacts / PUT[kind](store).sha256
    card = (folder / "card.json").read_bytes()
    assert hashlib.sha256(card).hexdigest() == folder.name
    assert rfc8785.dumps(json.loads(card)) == card
    tensors = (folder / "tensors.safetensors").read_bytes()
    assert json.loads(card)["tensors_sha256"] == hashlib.sha256(tensors).hexdigest()


def test_the_same_probe_made_later_is_the_same_version_and_another_the_next(store: Store) -> None:
    first = put_probe(store)
    assert put_probe(store, created="2026-02-02T00:00:00Z") == first
    assert put_probe(store, calibration={"threshold": 0.5}).reference == "probe@2"
    other = store.put_probe(
        a_probe(calibration={"threshold": 0.5}), WEIGHTS, BIAS + 1, name="probe"
    )
    assert other.reference == "probe@3"


def test_a_loaded_card_may_be_stored_again(store: Store) -> None:
    probe, heads = put_probe(store), put_head_set(store)
    loaded = store.load_probe("probe")
    again = store.put_probe(loaded.card, loaded.weights, loaded.bias, name="copy")
    assert again.sha256 == probe.sha256
    head_set = store.load_head_set("heads")
    copied = store.put_head_set(head_set.card, head_set.heads, head_set.evidence, name="copied")
    assert copied.sha256 == heads.sha256


def test_putting_the_same_again_heals_a_damaged_probe(store: Store) -> None:
    ref = put_probe(store)
    (store.artefacts / ref.sha256 / "tensors.safetensors").write_bytes(b"")
    assert error_of(lambda: store.load_probe("probe")).code == "E_ARTEFACT_TRUNCATED"
    assert put_probe(store).sha256 == ref.sha256
    np.testing.assert_array_equal(store.load_probe("probe@1").weights, WEIGHTS)


def test_the_bytes_of_a_direction_never_change(store: Store) -> None:
    """The identities of directions that people have stored and written into policies."""
    draft = CardDraft(
        method="contrast",
        position="last-prompt-token",
        description="étrange",
        model=FINGERPRINT,
        base_model=FINGERPRINT,
        activation_norms=(1.0, 2.5, None),
        sources=(Source(name="x.txt", sha256="b" * 64, rows=4, role="positive", licence="MIT"),),
        settings={"limit": 64, "chat": True},
        quality={"separation.0": 1.5},
        licence="MIT",
        dtype="float32",
        created="2026-01-02T03:04:05Z",
    )
    vectors = np.arange(LAYERS * WIDTH).reshape(LAYERS, WIDTH) / 8
    ref = store.put(draft, vectors, [True, False, True], name="golden")
    assert ref.sha256 == "b79158c11ac9c98404f520fa566c75ea94a714f538c222dd0d2a69a5789e0f15"
    assert store.load("golden").card.tensors_sha256 == (
        "46691fa425fb9ce5357b7b45d74211d94c4bb73d5f0dbc6a14aadc1ba6b16e16"
    )


# -- the wrong kind --------------------------------------------------------------------------------


@pytest.mark.parametrize("wanted", LOAD)
@pytest.mark.parametrize("stored", PUT)
def test_each_way_out_takes_one_kind_and_names_both_where_it_refuses(
    store: Store, stored: str, wanted: str
) -> None:
    PUT[stored](store, "it")
    if stored == wanted:
        assert LOAD[wanted](store, "it@1").card.kind == wanted
        return
    error = error_of(lambda: LOAD[wanted](store, "it@1"))
    assert error.code == "E_ARTEFACT_KIND"
    assert f"is a {stored}, not a {wanted}" in error.message


@pytest.mark.parametrize(("kind", "type_"), [*zip(PUT, (Direction, Probe, HeadSet), strict=True)])
def test_whoever_takes_any_kind_is_told_which(store: Store, kind: str, type_: type) -> None:
    PUT[kind](store, "it")
    found = store.load_any("it")
    assert type(found) is type_
    assert found.card.kind == kind


def test_versions_of_one_name_may_be_of_different_kinds(store: Store) -> None:
    refs = [put(store, "it") for put in PUT.values()]
    assert [ref.reference for ref in refs] == ["it@1", "it@2", "it@3"]
    assert [store.load_any(ref.reference).card.kind for ref in store.list()] == list(PUT)


# -- drafts and tensors that are refused -----------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"layer": None}, "E_ARTEFACT_SITE"),
        ({"layer": -1}, "E_ARTEFACT_SITE"),
        ({"layer": LAYERS}, "E_ARTEFACT_SITE"),
        ({"site": "final_norm", "layer": 1}, "E_ARTEFACT_SITE"),
        ({"site": "final_norm", "layer": LAYERS}, "E_ARTEFACT_SITE"),
        ({"outputs": ()}, "E_ARTEFACT_OUTPUTS"),
        ({"outputs": tuple(f"o{number}" for number in range(65))}, "E_ARTEFACT_OUTPUTS"),
        ({"outputs": ("a", "a")}, "E_ARTEFACT_OUTPUTS"),
        ({"outputs": ("a", "")}, "E_ARTEFACT_OUTPUTS"),
        ({"outputs": ("a", "b c")}, "E_ARTEFACT_OUTPUTS"),
        ({"outputs": ("a", "b\n")}, "E_ARTEFACT_OUTPUTS"),
        ({"outputs": ("a", "b" * 65)}, "E_ARTEFACT_OUTPUTS"),
    ],
)
def test_a_probe_that_reads_no_place_or_has_no_outputs_is_refused(
    changes: dict[str, Any], code: str
) -> None:
    assert error_of(lambda: a_probe(**changes)).code == code


@pytest.mark.parametrize(
    "changes",
    [
        {"site": "attention"},
        {"read_out": "sigmoid"},
        {"layer": 1.5},
        {"layer": True},
        {"kind": "direction"},
        {"calibration": {"threshold": float("nan")}},
        {"calibration": {"threshold": "0.5"}},
        {"outputs": (1, 2)},
        {"activation_norms": (1.0, 2.0, 3.0)},
    ],
    ids=str,
)
def test_a_field_of_another_type_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        a_probe(**changes)


def test_a_probe_may_have_64_outputs(store: Store) -> None:
    names = tuple(f"o{number}" for number in range(64))
    store.put_probe(a_probe(outputs=names), np.eye(64, WIDTH) + 1, np.zeros(64), name="wide")
    assert store.load_probe("wide").weights.shape == (64, WIDTH)


def changed(row: int, value: float, column: slice | int = slice(None)) -> np.ndarray:
    weights = WEIGHTS.astype(np.float64)
    weights[row, column] = value
    return weights


@pytest.mark.parametrize(
    ("weights", "bias", "code"),
    [
        (WEIGHTS[:1], BIAS, "E_ARTEFACT_SHAPE"),
        (WEIGHTS[:, :-1], BIAS, "E_ARTEFACT_SHAPE"),
        (WEIGHTS.T, BIAS, "E_ARTEFACT_SHAPE"),
        (WEIGHTS.ravel(), BIAS, "E_ARTEFACT_SHAPE"),
        (WEIGHTS, BIAS[:1], "E_ARTEFACT_SHAPE"),
        (WEIGHTS, BIAS[:, None], "E_ARTEFACT_SHAPE"),
        (WEIGHTS, 0.0, "E_ARTEFACT_SHAPE"),
        (changed(1, np.nan, 3), BIAS, "E_ARTEFACT_NONFINITE"),
        (changed(1, np.inf, 3), BIAS, "E_ARTEFACT_NONFINITE"),
        (changed(1, 1e39, 3), BIAS, "E_ARTEFACT_NONFINITE"),
        (WEIGHTS, [0.0, np.nan], "E_ARTEFACT_NONFINITE"),
        (WEIGHTS, [0.0, -np.inf], "E_ARTEFACT_NONFINITE"),
        (changed(1, 0.0), BIAS, "E_ARTEFACT_WEIGHTS"),
        (changed(1, 1e-46), BIAS, "E_ARTEFACT_WEIGHTS"),
        (changed(1, 1e-25), BIAS, "E_ARTEFACT_WEIGHTS"),
        (changed(1, 1e20, 3), BIAS, "E_ARTEFACT_WEIGHTS"),
    ],
)
def test_tensors_that_are_no_probe_of_the_model_are_refused(
    store: Store, weights: np.ndarray, bias: object, code: str
) -> None:
    error = error_of(lambda: store.put_probe(a_probe(), weights, bias, name="probe"))  # type: ignore[arg-type]
    assert error.code == code
    assert store.list() == []
    assert store.identities() == []
    if code == "E_ARTEFACT_WEIGHTS":
        assert "'harm'" in error.message


@pytest.mark.parametrize(
    ("heads", "evidence", "code"),
    [
        ([], [], "E_ARTEFACT_HEADS"),
        ([(0, 0), (1, 1), (0, 0)], [1, 2, 3], "E_ARTEFACT_HEADS"),
        ([(0, HEADS)], [1], "E_ARTEFACT_HEADS"),
        ([(LAYERS, 0)], [1], "E_ARTEFACT_HEADS"),
        ([(0, -1)], [1], "E_ARTEFACT_HEADS"),
        ([(-1, 0)], [1], "E_ARTEFACT_HEADS"),
        ([(0,)], [1], "E_ARTEFACT_HEADS"),
        ([(0, 0, 0)], [1], "E_ARTEFACT_HEADS"),
        ([0, 1], [1, 2], "E_ARTEFACT_HEADS"),
        ([(0.0, 1.0)], [1], "E_ARTEFACT_HEADS"),
        ([(False, True)], [1], "E_ARTEFACT_HEADS"),
        (["01"], [1], "E_ARTEFACT_HEADS"),
        ([(0, 0)], [1, 2], "E_ARTEFACT_SHAPE"),
        ([(0, 0)], 1.0, "E_ARTEFACT_SHAPE"),
        ([(0, 0)], [[1]], "E_ARTEFACT_SHAPE"),
        ([(0, 0)], [np.nan], "E_ARTEFACT_NONFINITE"),
        ([(0, 0)], [1e39], "E_ARTEFACT_NONFINITE"),
    ],
    ids=str,
)
def test_what_is_no_head_set_of_the_model_is_refused(
    store: Store, heads: Any, evidence: Any, code: str
) -> None:
    put = error_of(lambda: store.put_head_set(a_head_set(), heads, evidence, name="heads"))
    assert put.code == code
    assert store.list() == []
    assert store.identities() == []


def test_more_heads_than_a_head_set_holds_are_refused() -> None:
    model = FINGERPRINT.model_copy(update={"num_heads": 1 << 16, "num_layers": 2})
    heads = [(layer, head) for layer in (0, 1) for head in range((1 << 15) + layer)]
    fields = {**COMMON, "model": model, "tensors_sha256": "0" * 64}
    assert len(HeadSetCard.model_validate({**fields, "heads": heads[:-1]}).heads) == 1 << 16
    error = error_of(lambda: HeadSetCard.model_validate({**fields, "heads": heads}))
    assert error.code == "E_ARTEFACT_HEADS"


@pytest.mark.parametrize("kind", NEW_KINDS)
def test_a_bad_name_is_refused_before_anything_is_written(store: Store, kind: str) -> None:
    assert error_of(lambda: PUT[kind](store, "../up")).code == "E_ARTEFACT_NAME"
    assert list(store.root.iterdir()) == []


# -- what was damaged, and what a stranger planted -------------------------------------------------


@pytest.mark.parametrize("kind", NEW_KINDS)
@pytest.mark.parametrize(
    ("file", "change", "code"),
    [
        ("card.json", lambda content: content[:-1], "E_ARTEFACT_TRUNCATED"),
        ("card.json", lambda content: content + b" ", "E_ARTEFACT_TAMPERED"),
        (
            "card.json",
            lambda content: content.replace(b'"logistic"', b'"guessing"'),
            "E_ARTEFACT_TAMPERED",
        ),
        ("tensors.safetensors", lambda content: content[:-1], "E_ARTEFACT_TRUNCATED"),
        ("tensors.safetensors", lambda content: content + b" ", "E_ARTEFACT_TAMPERED"),
        (
            "tensors.safetensors",
            lambda content: content[:-1] + bytes([content[-1] ^ 1]),
            "E_ARTEFACT_TAMPERED",
        ),
        ("tensors.safetensors", lambda content: content + b" " * (1 << 17), "E_ARTEFACT_FOREIGN"),
    ],
)
def test_a_damaged_file_is_refused_and_said_to_be_damaged(
    store: Store, kind: str, file: str, change: Callable[[bytes], bytes], code: str
) -> None:
    ref = PUT[kind](store)
    path = store.artefacts / ref.sha256 / file
    content = path.read_bytes()
    assert change(content) != content
    path.write_bytes(change(content))
    assert error_of(lambda: LOAD[kind](store, ref.reference)).code == code


def plant(
    store: Store,
    kind: str,
    card_changes: dict[str, Any] | None = None,
    tensors: dict[str, np.ndarray] | None = None,
) -> str:
    """Put an artefact whose hashes are right and whose content a stranger chose."""
    folder = store.artefacts / PUT[kind](store).sha256
    card = json.loads((folder / "card.json").read_bytes())
    content = (folder / "tensors.safetensors").read_bytes()
    if tensors is not None:
        content = save_safetensors({key: np.ascontiguousarray(v) for key, v in tensors.items()})
    card.update({"tensors_sha256": hashlib.sha256(content).hexdigest(), **(card_changes or {})})
    written = rfc8785.dumps(card)
    sha256 = hashlib.sha256(written).hexdigest()
    (store.artefacts / sha256).mkdir(exist_ok=True)
    (store.artefacts / sha256 / "card.json").write_bytes(written)
    (store.artefacts / sha256 / "tensors.safetensors").write_bytes(content)
    return f"sha256:{sha256}"


@pytest.mark.parametrize("kind", NEW_KINDS)
def test_a_planted_artefact_that_breaks_no_rule_loads(store: Store, kind: str) -> None:
    reference = plant(store, kind, {"description": "planted"})
    assert LOAD[kind](store, reference).card.description == "planted"


@pytest.mark.parametrize(
    ("kind", "card_changes", "tensors", "code"),
    [
        ("probe", {"kind": "direction"}, None, "E_ARTEFACT_FOREIGN"),
        ("probe", {"kind": "head-set"}, None, "E_ARTEFACT_FOREIGN"),
        ("probe", {"kind": "oracle"}, None, "E_ARTEFACT_FOREIGN"),
        ("probe", {"kind": ["probe"]}, None, "E_ARTEFACT_FOREIGN"),
        ("probe", {"kind": None}, None, "E_ARTEFACT_FOREIGN"),
        ("probe", {"surprise": 1}, None, "E_ARTEFACT_FOREIGN"),
        ("probe", {"site": "mlp"}, None, "E_ARTEFACT_FOREIGN"),
        ("probe", {"layer": LAYERS}, None, "E_ARTEFACT_SITE"),
        ("probe", {"site": "final_norm"}, None, "E_ARTEFACT_SITE"),
        ("probe", {"outputs": ["a", "a"]}, None, "E_ARTEFACT_OUTPUTS"),
        ("probe", {"outputs": ["a"]}, None, "E_ARTEFACT_SHAPE"),
        ("probe", None, {"weights": WEIGHTS}, "E_ARTEFACT_FOREIGN"),
        (
            "probe",
            None,
            {"weights": WEIGHTS, "bias": BIAS, "scale": BIAS},
            "E_ARTEFACT_FOREIGN",
        ),
        (
            "probe",
            None,
            {"weights": WEIGHTS.astype(np.float64), "bias": BIAS},
            "E_ARTEFACT_SHAPE",
        ),
        ("probe", None, {"weights": WEIGHTS, "bias": BIAS.astype(np.float16)}, "E_ARTEFACT_SHAPE"),
        ("probe", None, {"weights": WEIGHTS[:, :4], "bias": BIAS}, "E_ARTEFACT_SHAPE"),
        ("probe", None, {"weights": WEIGHTS * 0, "bias": BIAS}, "E_ARTEFACT_WEIGHTS"),
        (
            "probe",
            None,
            {"weights": WEIGHTS * np.float32(np.nan), "bias": BIAS},
            "E_ARTEFACT_NONFINITE",
        ),
        ("head-set", {"heads": [[0, 0], [0, 0], [1, 0]]}, None, "E_ARTEFACT_HEADS"),
        ("head-set", {"heads": [[0, 0], [0, 1], [0, 2]]}, None, "E_ARTEFACT_HEADS"),
        ("head-set", {"heads": [[0, 0], [0, 1], [3, 0]]}, None, "E_ARTEFACT_HEADS"),
        ("head-set", {"heads": [[0, 0], [0, 1]]}, None, "E_ARTEFACT_SHAPE"),
        ("head-set", {"heads": [[0, 0], [0, 1], [True, 0]]}, None, "E_ARTEFACT_FOREIGN"),
        ("head-set", {"heads": [[0, 0], [0, 1], [1]]}, None, "E_ARTEFACT_FOREIGN"),
        ("head-set", {"heads": []}, {"evidence": EVIDENCE[:0]}, "E_ARTEFACT_HEADS"),
        ("head-set", None, {"evidence": EVIDENCE + np.float32(np.inf)}, "E_ARTEFACT_NONFINITE"),
        ("head-set", None, {"evidence": EVIDENCE.astype(np.int32)}, "E_ARTEFACT_SHAPE"),
        ("head-set", None, {"vectors": EVIDENCE}, "E_ARTEFACT_FOREIGN"),
    ],
)
def test_an_artefact_with_right_hashes_and_wrong_content_is_refused(
    store: Store,
    kind: str,
    card_changes: dict[str, Any] | None,
    tensors: dict[str, np.ndarray] | None,
    code: str,
) -> None:
    reference = plant(store, kind, card_changes, tensors)
    error = error_of(lambda: store.load_any(reference))
    assert error.code == code
    assert error.field is not None
    assert reference.removeprefix("sha256:") in error.field
