"""The store: what it keeps, how it is found again, and everything it refuses."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import rfc8785
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save as save_safetensors

from directions.card import CardDraft, ModelFingerprint
from directions.errors import TrimtabError
from directions.store import ArtefactRef, Store

NUM_LAYERS, HIDDEN_SIZE = 3, 8
FINGERPRINT = ModelFingerprint(
    architecture="LlamaForCausalLM",
    hidden_size=HIDDEN_SIZE,
    num_layers=NUM_LAYERS,
    num_heads=2,
    num_kv_heads=1,
    tokenizer_sha256="a" * 64,
)


def a_draft(created: str = "2026-01-02T03:04:05Z", **changes: object) -> CardDraft:
    fields: dict[str, object] = {
        "method": "contrast",
        "model": FINGERPRINT,
        "activation_norms": (1.0, 2.0, 3.0),
        "dtype": "float32",
        "created": created,
    }
    return CardDraft.model_validate({**fields, **changes})


def some_vectors(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(NUM_LAYERS, HIDDEN_SIZE)).astype(np.float32)


ALL = np.ones(NUM_LAYERS, dtype=bool)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path)


@pytest.fixture
def stored(store: Store) -> ArtefactRef:
    return store.put(a_draft(), some_vectors(), ALL, name="guard")


def code_of(action: Callable[[], object]) -> str:
    with pytest.raises(TrimtabError) as caught:
        action()
    return caught.value.code


# -- keeping and finding ---------------------------------------------------------------------------


def test_a_direction_comes_back_as_it_was_put(store: Store) -> None:
    vectors, present = some_vectors(), np.array([True, False, True])
    ref = store.put(a_draft(description="étrange"), vectors, present, name="guard")
    loaded = store.load("guard")
    assert loaded.reference == ref.reference == "guard@1"
    assert loaded.sha256 == ref.sha256
    np.testing.assert_array_equal(loaded.vectors[[0, 2]], vectors[[0, 2]])
    assert not loaded.vectors[1].any()
    assert loaded.vectors.dtype == np.float32
    assert loaded.present.tolist() == [True, False, True]
    assert loaded.card.layers == (0, 2)
    assert loaded.card.description == "étrange"


def test_what_was_loaded_cannot_be_changed_in_place(store: Store, stored: ArtefactRef) -> None:
    loaded = store.load("guard")
    with pytest.raises(ValueError, match="read-only"):
        loaded.vectors[0, 0] = 1.0


def test_the_identity_is_the_hash_of_the_card_and_the_card_holds_the_hash_of_the_tensors(
    store: Store, stored: ArtefactRef
) -> None:
    folder = store.artefacts / stored.sha256
    card = (folder / "card.json").read_bytes()
    assert hashlib.sha256(card).hexdigest() == stored.sha256
    assert rfc8785.dumps(json.loads(card)) == card
    tensors = (folder / "tensors.safetensors").read_bytes()
    assert json.loads(card)["tensors_sha256"] == hashlib.sha256(tensors).hexdigest()


def test_other_content_gets_the_next_version_and_old_versions_stay(store: Store) -> None:
    first = store.put(a_draft(), some_vectors(1), ALL, name="guard")
    second = store.put(a_draft(), some_vectors(2), ALL, name="guard")
    assert (first.reference, second.reference) == ("guard@1", "guard@2")
    assert store.resolve("guard") == second
    assert store.resolve("guard@1") == first
    np.testing.assert_array_equal(store.load("guard@1").vectors, some_vectors(1))


def test_the_same_content_made_later_is_the_same_version(store: Store) -> None:
    first = store.put(a_draft("2026-01-01T00:00:00Z"), some_vectors(), ALL, name="guard")
    again = store.put(a_draft("2026-02-02T00:00:00Z"), some_vectors(), ALL, name="guard")
    assert again == first
    assert store.list() == [first]


def test_one_artefact_may_have_two_names(store: Store, stored: ArtefactRef) -> None:
    other = store.put(a_draft(), some_vectors(), ALL, name="spare")
    assert other.sha256 == stored.sha256
    assert store.names() == ["guard", "spare"]
    assert [ref.reference for ref in store.list()] == ["guard@1", "spare@1"]


def test_an_artefact_is_found_by_its_hash_and_then_has_no_name(
    store: Store, stored: ArtefactRef
) -> None:
    loaded = store.load(f"sha256:{stored.sha256}")
    assert (loaded.name, loaded.version) == (None, None)
    assert loaded.reference == f"sha256:{stored.sha256}"


def test_versions_are_ordered_as_numbers(store: Store) -> None:
    for seed in range(11):
        store.put(a_draft(), some_vectors(seed), ALL, name="guard")
    assert store.resolve("guard").version == 11
    assert [ref.version for ref in store.list()] == list(range(1, 12))


def test_an_empty_or_missing_folder_is_an_empty_store(tmp_path: Path) -> None:
    store = Store(tmp_path / "nowhere")
    assert store.list() == []
    assert store.names() == []
    assert code_of(lambda: store.load("guard")) == "E_ARTEFACT_UNKNOWN"
    assert not (tmp_path / "nowhere").exists()


def test_the_default_folder_follows_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRIMTAB_HOME", str(tmp_path / "here"))
    assert Store().root == tmp_path / "here"
    monkeypatch.delenv("TRIMTAB_HOME")
    assert Store().root == Path.home() / ".local/share/trimtab"


# -- references that are refused -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("reference", "code"),
    [
        ("", "E_ARTEFACT_NAME"),
        ("..", "E_ARTEFACT_NAME"),
        ("../names/guard", "E_ARTEFACT_NAME"),
        ("/etc/passwd", "E_ARTEFACT_NAME"),
        ("guard/../guard", "E_ARTEFACT_NAME"),
        ("Guard", "E_ARTEFACT_NAME"),
        ("guard\n", "E_ARTEFACT_NAME"),
        ("guard\x00", "E_ARTEFACT_NAME"),
        ("g" * 65, "E_ARTEFACT_NAME"),
        ("@1", "E_ARTEFACT_NAME"),
        ("sha256:", "E_ARTEFACT_NAME"),
        ("sha256:../../names", "E_ARTEFACT_NAME"),
        ("sha256:" + "A" * 64, "E_ARTEFACT_NAME"),
        ("sha256:" + "0" * 64 + "\n", "E_ARTEFACT_NAME"),
        ("sha256:" + "0" * 64, "E_ARTEFACT_UNKNOWN"),
        ("other", "E_ARTEFACT_UNKNOWN"),
        ("other@1", "E_ARTEFACT_UNKNOWN"),
        ("guard@2", "E_ARTEFACT_VERSION"),
        ("guard@0", "E_ARTEFACT_VERSION"),
        ("guard@01", "E_ARTEFACT_VERSION"),
        ("guard@-1", "E_ARTEFACT_VERSION"),
        ("guard@", "E_ARTEFACT_VERSION"),
        ("guard@latest", "E_ARTEFACT_VERSION"),
        ("guard@1@1", "E_ARTEFACT_VERSION"),
        ("guard@" + "9" * 5000, "E_ARTEFACT_VERSION"),
        ("guard@１", "E_ARTEFACT_VERSION"),
        ("guard@1/../../x", "E_ARTEFACT_VERSION"),
    ],
)
def test_a_reference_that_means_nothing_is_refused(
    store: Store, stored: ArtefactRef, reference: str, code: str
) -> None:
    assert code_of(lambda: store.load(reference)) == code


@given(st.text(max_size=80))
@settings(max_examples=200, deadline=None)
def test_no_text_reaches_outside_the_store(text: str) -> None:
    store = Store(Path("/nonexistent/trimtab"))
    assert code_of(lambda: store.load(text)) in {"E_ARTEFACT_NAME", "E_ARTEFACT_UNKNOWN"}


@pytest.mark.parametrize("name", ["", "../up", "a/b", ".hidden", "A", "a b", "a@1", "x" * 65])
def test_a_bad_name_is_refused_before_anything_is_written(store: Store, name: str) -> None:
    assert (
        code_of(lambda: store.put(a_draft(), some_vectors(), ALL, name=name)) == "E_ARTEFACT_NAME"
    )
    assert list(store.root.iterdir()) == []


# -- tensors that are refused ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("vectors", "present", "code"),
    [
        (np.zeros((NUM_LAYERS, HIDDEN_SIZE + 1)), ALL, "E_ARTEFACT_SHAPE"),
        (np.zeros((NUM_LAYERS + 1, HIDDEN_SIZE)), ALL, "E_ARTEFACT_SHAPE"),
        (np.zeros(NUM_LAYERS * HIDDEN_SIZE), ALL, "E_ARTEFACT_SHAPE"),
        (np.zeros((NUM_LAYERS, HIDDEN_SIZE)), np.ones(2, dtype=bool), "E_ARTEFACT_SHAPE"),
        (np.zeros((NUM_LAYERS, HIDDEN_SIZE)), np.zeros(3, dtype=bool), "E_ARTEFACT_SHAPE"),
        (np.full((NUM_LAYERS, HIDDEN_SIZE), np.nan), ALL, "E_ARTEFACT_NONFINITE"),
        (np.full((NUM_LAYERS, HIDDEN_SIZE), np.inf), ALL, "E_ARTEFACT_NONFINITE"),
        (np.full((NUM_LAYERS, HIDDEN_SIZE), 1e39), ALL, "E_ARTEFACT_NONFINITE"),
    ],
    ids=["wide", "deep", "flat", "short-mask", "no-layer", "nan", "inf", "float32-overflow"],
)
def test_tensors_that_are_no_direction_of_the_model_are_refused(
    store: Store, vectors: np.ndarray, present: np.ndarray, code: str
) -> None:
    assert code_of(lambda: store.put(a_draft(), vectors, present, name="guard")) == code
    assert store.list() == []


def plant(store: Store, *, tensors: bytes, card_changes: dict[str, object] | None = None) -> str:
    """Put an artefact whose hashes are right and whose content a stranger chose."""
    good = store.put(a_draft(), some_vectors(), ALL, name="good")
    card = json.loads((store.artefacts / good.sha256 / "card.json").read_bytes())
    card["tensors_sha256"] = hashlib.sha256(tensors).hexdigest()
    card.update(card_changes or {})
    content = rfc8785.dumps(card)
    sha256 = hashlib.sha256(content).hexdigest()
    folder = store.artefacts / sha256
    folder.mkdir()
    (folder / "card.json").write_bytes(content)
    (folder / "tensors.safetensors").write_bytes(tensors)
    return f"sha256:{sha256}"


def a_file(**changes: np.ndarray | None) -> bytes:
    tensors: dict[str, np.ndarray | None] = {
        "vectors": some_vectors(),
        "present": np.ones(NUM_LAYERS, dtype=np.uint8),
        **changes,
    }
    return save_safetensors({name: value for name, value in tensors.items() if value is not None})


@pytest.mark.parametrize(
    ("tensors", "card_changes", "code"),
    [
        (a_file(), {"kind": "probe"}, "E_ARTEFACT_FOREIGN"),
        (a_file(), {"apiVersion": "other/v1"}, "E_ARTEFACT_FOREIGN"),
        (a_file(), {"unknown": 1}, "E_ARTEFACT_FOREIGN"),
        (a_file(), {"layers": [0, 1, 7]}, "E_ARTEFACT_FOREIGN"),
        (b"not safetensors at all, but long enough", None, "E_ARTEFACT_FOREIGN"),
        (a_file(vectors=None), None, "E_ARTEFACT_FOREIGN"),
        (a_file(extra=np.zeros(1, dtype=np.float32)), None, "E_ARTEFACT_FOREIGN"),
        (a_file(vectors=some_vectors()[:, :4].copy()), None, "E_ARTEFACT_SHAPE"),
        (a_file(vectors=some_vectors().astype(np.float64)), None, "E_ARTEFACT_SHAPE"),
        (a_file(present=np.ones(2, dtype=np.uint8)), None, "E_ARTEFACT_SHAPE"),
        (a_file(present=np.array([1, 1, 0], dtype=np.uint8)), None, "E_ARTEFACT_SHAPE"),
        (
            a_file(present=np.array([1, 1, 0], dtype=np.uint8)),
            {"layers": [0, 1]},
            "E_ARTEFACT_SHAPE",
        ),
        (a_file(vectors=some_vectors() * np.float32(np.nan)), None, "E_ARTEFACT_NONFINITE"),
        (a_file(vectors=some_vectors() * np.float32(np.inf)), None, "E_ARTEFACT_NONFINITE"),
    ],
    ids=[
        "other-kind",
        "other-version",
        "unknown-key",
        "layer-beyond",
        "not-safetensors",
        "missing-tensor",
        "extra-tensor",
        "narrow",
        "float64",
        "short-mask",
        "layers-disagree",
        "numbers-in-absent-layer",
        "nan",
        "inf",
    ],
)
def test_an_artefact_with_right_hashes_and_wrong_content_is_refused(
    store: Store, tensors: bytes, card_changes: dict[str, object] | None, code: str
) -> None:
    reference = plant(store, tensors=tensors, card_changes=card_changes)
    assert code_of(lambda: store.load(reference)) == code


def test_a_planted_artefact_that_breaks_no_rule_loads(store: Store) -> None:
    loaded = store.load(plant(store, tensors=a_file(vectors=some_vectors(5))))
    np.testing.assert_array_equal(loaded.vectors, some_vectors(5))


def test_a_card_that_is_not_canonical_is_foreign(store: Store, stored: ArtefactRef) -> None:
    card = json.loads((store.artefacts / stored.sha256 / "card.json").read_bytes())
    content = json.dumps(card, indent=1).encode()
    sha256 = hashlib.sha256(content).hexdigest()
    (store.artefacts / stored.sha256).rename(store.artefacts / sha256)
    (store.artefacts / sha256 / "card.json").write_bytes(content)
    assert code_of(lambda: store.load(f"sha256:{sha256}")) == "E_ARTEFACT_FOREIGN"


# -- files that were damaged after they were stored ------------------------------------------------


def damage(path: Path, how: str) -> None:
    content = path.read_bytes()
    if how == "flip":
        middle = len(content) // 2
        path.write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])
    elif how == "flip-last":
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    elif how == "half":
        path.write_bytes(content[: len(content) // 2])
    elif how == "short-by-one":
        path.write_bytes(content[:-1])
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "gone":
        path.unlink()
    elif how == "longer":
        path.write_bytes(content + b" ")
    elif how == "huge":
        with path.open("r+b") as file:
            file.truncate(1 << 33)
    elif how == "link":
        twin = path.with_suffix(".twin")
        path.rename(twin)
        path.symlink_to(twin)
    elif how == "pipe":
        path.unlink()
        os.mkfifo(path)
    elif how == "folder":
        path.unlink()
        path.mkdir()


@pytest.mark.parametrize(
    ("file", "how", "code"),
    [
        ("card.json", "half", "E_ARTEFACT_TRUNCATED"),
        ("card.json", "short-by-one", "E_ARTEFACT_TRUNCATED"),
        ("card.json", "empty", "E_ARTEFACT_TRUNCATED"),
        ("card.json", "gone", "E_ARTEFACT_TRUNCATED"),
        ("card.json", "longer", "E_ARTEFACT_TAMPERED"),
        ("card.json", "huge", "E_ARTEFACT_FOREIGN"),
        ("card.json", "link", "E_ARTEFACT_FOREIGN"),
        ("card.json", "pipe", "E_ARTEFACT_FOREIGN"),
        ("card.json", "folder", "E_ARTEFACT_FOREIGN"),
        ("tensors.safetensors", "half", "E_ARTEFACT_TRUNCATED"),
        ("tensors.safetensors", "short-by-one", "E_ARTEFACT_TRUNCATED"),
        ("tensors.safetensors", "empty", "E_ARTEFACT_TRUNCATED"),
        ("tensors.safetensors", "gone", "E_ARTEFACT_TRUNCATED"),
        ("tensors.safetensors", "flip-last", "E_ARTEFACT_TAMPERED"),
        ("tensors.safetensors", "longer", "E_ARTEFACT_TAMPERED"),
        ("tensors.safetensors", "huge", "E_ARTEFACT_FOREIGN"),
        ("tensors.safetensors", "link", "E_ARTEFACT_FOREIGN"),
        ("tensors.safetensors", "pipe", "E_ARTEFACT_FOREIGN"),
    ],
)
def test_a_damaged_file_is_refused_and_said_to_be_damaged(
    store: Store, stored: ArtefactRef, file: str, how: str, code: str
) -> None:
    store.load("guard")
    damage(store.artefacts / stored.sha256 / file, how)
    assert code_of(lambda: store.load("guard")) == code


def test_a_card_changed_to_say_something_else_is_refused(store: Store, stored: ArtefactRef) -> None:
    path = store.artefacts / stored.sha256 / "card.json"
    path.write_bytes(path.read_bytes().replace(b'"contrast"', b'"alignment"'))
    assert code_of(lambda: store.load("guard")) == "E_ARTEFACT_TAMPERED"


def test_an_artefact_folder_that_is_a_link_or_gone_is_refused(
    store: Store, stored: ArtefactRef, tmp_path: Path
) -> None:
    folder = store.artefacts / stored.sha256
    folder.rename(tmp_path / "elsewhere")
    assert code_of(lambda: store.load("guard")) == "E_ARTEFACT_UNKNOWN"
    folder.symlink_to(tmp_path / "elsewhere")
    assert code_of(lambda: store.load("guard")) == "E_ARTEFACT_FOREIGN"


@pytest.mark.parametrize(
    ("content", "code"),
    [
        (b"", "E_ARTEFACT_TRUNCATED"),
        (b'{"kind": "na', "E_ARTEFACT_TRUNCATED"),
        (b"[" * 4000, "E_ARTEFACT_TRUNCATED"),
        (b"[]", "E_ARTEFACT_FOREIGN"),
        (b'{"kind":"other"}', "E_ARTEFACT_FOREIGN"),
        (b" " * 5000, "E_ARTEFACT_FOREIGN"),
        (
            b'{"kind":"name","name":"guard","version":2,"sha256":"' + b"0" * 64 + b'"}',
            "E_ARTEFACT_TAMPERED",
        ),
        (
            b'{"kind":"name","name":"guard","version":1,"sha256":"../../../etc"}',
            "E_ARTEFACT_TAMPERED",
        ),
        (
            b'{"kind":"name","name":"guard","version":1,"sha256":"' + b"0" * 64 + b'"}',
            "E_ARTEFACT_UNKNOWN",
        ),
    ],
)
def test_a_broken_index_entry_is_refused(
    store: Store, stored: ArtefactRef, content: bytes, code: str
) -> None:
    (store.index / "guard" / "1.json").write_bytes(content)
    assert code_of(lambda: store.load("guard")) == code


def test_files_in_the_index_that_are_no_versions_are_not_versions(
    store: Store, stored: ArtefactRef
) -> None:
    for name in ("0.json", "x.json", "1.json.bak", ".tmp-2.json-1-abc", "02.json"):
        (store.index / "guard" / name).write_text("{}")
    (store.index / "not-a-name!").mkdir()
    assert store.list() == [stored]


def test_putting_the_same_again_heals_a_damaged_artefact(store: Store, stored: ArtefactRef) -> None:
    damage(store.artefacts / stored.sha256 / "tensors.safetensors", "half")
    healed = store.put(a_draft(), some_vectors(), ALL, name="guard")
    assert healed.sha256 == stored.sha256
    np.testing.assert_array_equal(store.load("guard@1").vectors, some_vectors())


# -- crashes and crowds ----------------------------------------------------------------------------

WRITER = """
import os, sys
import numpy as np
from pathlib import Path
sys.path.insert(0, {tests!r})
from test_store import ALL, a_draft, some_vectors
from directions.store import Store
"""


def python(code: str, *arguments: str) -> subprocess.Popen[str]:
    prelude = WRITER.format(tests=str(Path(__file__).parent))
    return subprocess.Popen(
        [sys.executable, "-c", prelude + code, *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def test_two_processes_writing_one_name_at_once_lose_nothing(store: Store) -> None:
    rounds = 12
    code = f"""
print("ready", flush=True)
for number, _ in enumerate(sys.stdin):
    ref = Store(Path({str(store.root)!r})).put(
        a_draft(), some_vectors(int(sys.argv[1]) * 1000 + number), ALL, name="crowd")
    print(ref.version, ref.sha256, flush=True)
"""
    writers = [python(code, str(number)) for number in (1, 2)]
    for writer in writers:
        assert writer.stdout is not None
        assert writer.stdout.readline() == "ready\n"
    told: set[tuple[int, str]] = set()
    for number in range(rounds):
        for writer in writers:
            assert writer.stdin is not None
            writer.stdin.write("go\n")
            writer.stdin.flush()
        answers = [writer.stdout.readline().split() for writer in writers if writer.stdout]
        told |= {(int(version), sha256) for version, sha256 in answers}
        # Both wrote in this round, so both raced for the same next version.
        assert {int(version) for version, _ in answers} == {2 * number + 1, 2 * number + 2}
    for writer in writers:
        writer.communicate()
        assert writer.returncode == 0
    assert told == {(ref.version, ref.sha256) for ref in store.list()}
    for version, _ in told:
        store.load(f"crowd@{version}")


def test_processes_putting_the_same_content_at_once_agree_on_one_version(store: Store) -> None:
    code = f"""
ref = Store(Path({str(store.root)!r})).put(a_draft(), some_vectors(), ALL, name="same")
print(ref.version, ref.sha256)
"""
    writers = [python(code) for _ in range(3)]
    told = {writer.communicate()[0].strip() for writer in writers}
    assert len(told) == 1
    assert [ref.reference for ref in store.list()] == ["same@1"]


# The file-system steps of a put, in order; the process is killed just before each in turn.
CRASH = """
import directions.atomic as atomic
count = 0
limit = int(sys.argv[1])
def dying(original):
    def step(*args, **kwargs):
        global count
        count += 1
        if count == limit:
            os.kill(os.getpid(), 9)
        return original(*args, **kwargs)
    return step
atomic.os.fsync = dying(os.fsync)
atomic.os.link = dying(os.link)
Path.rename = dying(Path.rename)
Path.mkdir = dying(Path.mkdir)
Path.write_bytes = dying(Path.write_bytes)
Store(Path(sys.argv[2])).put(a_draft(), some_vectors(2), ALL, name="guard")
print(count)
"""


def test_a_writer_killed_at_any_step_leaves_nothing_half_made(store: Store) -> None:
    first = store.put(a_draft(), some_vectors(1), ALL, name="guard")
    prelude = WRITER.format(tests=str(Path(__file__).parent))

    def run(limit: int) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-c", prelude + CRASH, str(limit), str(store.root)],
            capture_output=True,
            text=True,
            check=False,
        )

    # One run too many steps in to be killed tells how many steps there are.
    rehearsal = Store(store.root / "rehearsal")
    rehearsal.put(a_draft(), some_vectors(1), ALL, name="guard")
    whole = subprocess.run(
        [sys.executable, "-c", prelude + CRASH, "-1", str(rehearsal.root)],
        capture_output=True,
        text=True,
        check=True,
    )
    steps = int(whole.stdout)
    assert steps >= 8

    killed = 0
    for limit in range(1, steps + 1):
        result = run(limit)
        killed += result.returncode == -9
        for ref in store.list():
            store.load(ref.reference)
        assert store.resolve("guard@1") == first
        if store.resolve("guard").version == 2:
            break
    assert killed >= 6
    second = store.put(a_draft(), some_vectors(2), ALL, name="guard")
    assert second.reference == "guard@2"
    assert [ref.reference for ref in store.list()] == ["guard@1", "guard@2"]
    np.testing.assert_array_equal(store.load("guard").vectors, some_vectors(2))


def test_what_a_crashed_writer_left_is_swept_once_it_is_old(
    store: Store, stored: ArtefactRef
) -> None:
    old, young = store.artefacts / ".tmp-old-1-a", store.artefacts / ".tmp-young-1-b"
    for folder in (old, young):
        folder.mkdir()
    os.utime(old, (1, 1))
    store.put(a_draft(), some_vectors(9), ALL, name="guard")
    assert not old.exists()
    assert young.exists()
