"""GGUF control vectors, against files that the ``gguf`` package itself writes and reads."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest

from directions.card import CardDraft, ModelFingerprint
from directions.control_vector import export_control_vector, import_control_vector
from directions.errors import TrimtabError
from directions.store import Direction, Store

NUM_LAYERS, HIDDEN_SIZE = 4, 8
MODEL = ModelFingerprint(
    architecture="LlamaForCausalLM",
    hidden_size=HIDDEN_SIZE,
    num_layers=NUM_LAYERS,
    num_heads=2,
    num_kv_heads=1,
    tokenizer_sha256="a" * 64,
)


def some_vectors() -> np.ndarray:
    return np.random.default_rng(3).normal(size=(NUM_LAYERS, HIDDEN_SIZE)).astype(np.float32)


def written(
    path: Path,
    tensors: dict[str, np.ndarray],
    *,
    architecture: str = "controlvector",
    hint: str | None = "llama",
) -> Path:
    """What another tool would write, by the gguf package alone."""
    writer = gguf.GGUFWriter(path, architecture)
    if hint is not None:
        writer.add_string("controlvector.model_hint", hint)
        writer.add_uint32("controlvector.layer_count", len(tensors))
    for name, values in tensors.items():
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def stored(store: Store, present: list[int]) -> Direction:
    mask = np.isin(np.arange(NUM_LAYERS), present)
    draft = CardDraft(
        method="contrast",
        model=MODEL,
        activation_norms=(1.0,) * NUM_LAYERS,
        dtype="float32",
        created="2026-01-02T03:04:05Z",
    )
    return store.load(store.put(draft, some_vectors(), mask, name="turn").reference)


def code_of_import(path: Path) -> str:
    with pytest.raises(TrimtabError) as caught:
        import_control_vector(path, MODEL)
    return caught.value.code


def test_direction_k_of_a_foreign_file_becomes_layer_k(tmp_path: Path) -> None:
    vectors = some_vectors()
    path = written(tmp_path / "v.gguf", {f"direction.{k}": vectors[k] for k in (1, 3)})
    made = import_control_vector(path, MODEL)
    assert made.present.tolist() == [False, True, False, True]
    np.testing.assert_array_equal(made.vectors[[1, 3]], vectors[[1, 3]])
    assert not made.vectors[[0, 2]].any()
    assert made.card.method == "import"
    assert made.card.activation_norms == (None,) * NUM_LAYERS
    assert made.card.settings["model_hint"] == "llama"
    assert made.card.settings["file"] == "v.gguf"


def test_an_export_is_what_others_expect_to_read(tmp_path: Path) -> None:
    direction = stored(Store(tmp_path / "home"), [1, 2])
    assert export_control_vector(direction, tmp_path / "v.gguf") == (1, 2)
    reader = gguf.GGUFReader(tmp_path / "v.gguf")
    assert reader.fields["general.architecture"].contents() == "controlvector"
    assert reader.fields["controlvector.model_hint"].contents() == "llama"
    assert reader.fields["controlvector.layer_count"].contents() == 2
    assert [tensor.name for tensor in reader.tensors] == ["direction.1", "direction.2"]
    for tensor, layer in zip(reader.tensors, (1, 2), strict=True):
        assert tensor.tensor_type == gguf.GGMLQuantizationType.F32
        assert tensor.shape.tolist() == [HIDDEN_SIZE]
        np.testing.assert_array_equal(tensor.data, direction.vectors[layer])
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == ["v.gguf"]


def test_what_is_exported_and_imported_again_is_the_same(tmp_path: Path) -> None:
    store = Store(tmp_path / "home")
    direction = stored(store, [1, 2, 3])
    export_control_vector(direction, tmp_path / "v.gguf")
    ref = import_control_vector(tmp_path / "v.gguf", MODEL).store(store, "again")
    again = store.load(ref.reference)
    np.testing.assert_array_equal(again.vectors, direction.vectors)
    np.testing.assert_array_equal(again.present, direction.present)


def test_layer_zero_is_only_exported_away_when_asked(tmp_path: Path) -> None:
    store = Store(tmp_path / "home")
    direction = stored(store, [0, 1, 2])
    with pytest.raises(TrimtabError) as caught:
        export_control_vector(direction, tmp_path / "v.gguf")
    assert caught.value.code == "E_GGUF_LAYER_ZERO"
    assert not (tmp_path / "v.gguf").exists()
    layers = export_control_vector(direction, tmp_path / "v.gguf", skip_layer_zero=True)
    assert layers == (1, 2)
    with pytest.raises(TrimtabError) as caught:
        export_control_vector(stored(store, [0]), tmp_path / "w.gguf", skip_layer_zero=True)
    assert caught.value.code == "E_GGUF_LAYER_ZERO"


@pytest.mark.parametrize(
    ("tensors", "code"),
    [
        ({"direction.0": np.zeros(HIDDEN_SIZE, dtype=np.float32)}, "E_GGUF_LAYER_ZERO"),
        ({"direction.4": np.zeros(HIDDEN_SIZE, dtype=np.float32)}, "E_GGUF_LAYER_RANGE"),
        ({"direction.999999": np.zeros(HIDDEN_SIZE, dtype=np.float32)}, "E_GGUF_LAYER_RANGE"),
        ({"direction.1": np.zeros(HIDDEN_SIZE + 1, dtype=np.float32)}, "E_GGUF_WIDTH"),
        ({"direction.1": np.zeros((2, HIDDEN_SIZE), dtype=np.float32)}, "E_GGUF_WIDTH"),
        ({"direction.1": np.zeros(HIDDEN_SIZE, dtype=np.float16)}, "E_GGUF_TYPE"),
        ({"direction.1": np.full(HIDDEN_SIZE, np.nan, dtype=np.float32)}, "E_GGUF_NONFINITE"),
        ({"direction.-1": np.zeros(HIDDEN_SIZE, dtype=np.float32)}, "E_GGUF_FOREIGN"),
        ({"direction.01": np.zeros(HIDDEN_SIZE, dtype=np.float32)}, "E_GGUF_FOREIGN"),
        ({"blk.1.attn_q.weight": np.zeros(HIDDEN_SIZE, dtype=np.float32)}, "E_GGUF_FOREIGN"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else value,
)
def test_tensors_that_are_no_direction_of_the_model_are_refused(
    tmp_path: Path, tensors: dict[str, np.ndarray], code: str
) -> None:
    assert code_of_import(written(tmp_path / "v.gguf", tensors)) == code


def test_a_model_or_an_adapter_is_not_a_control_vector(tmp_path: Path) -> None:
    tensors = {"direction.1": np.zeros(HIDDEN_SIZE, dtype=np.float32)}
    path = written(tmp_path / "v.gguf", tensors, architecture="llama", hint=None)
    assert code_of_import(path) == "E_GGUF_FOREIGN"
    (tmp_path / "text.gguf").write_text("this is no such file at all")
    assert code_of_import(tmp_path / "text.gguf") == "E_GGUF_FOREIGN"


def test_a_file_without_tensors_is_refused(tmp_path: Path) -> None:
    assert code_of_import(written(tmp_path / "v.gguf", {})) == "E_GGUF_FOREIGN"


def test_a_file_cut_off_anywhere_is_refused(tmp_path: Path) -> None:
    vectors = some_vectors()
    whole = written(tmp_path / "v.gguf", {f"direction.{k}": vectors[k] for k in (1, 2, 3)})
    content = whole.read_bytes()
    used = content.rindex(vectors[3].tobytes()) + vectors[3].nbytes
    cut = tmp_path / "cut.gguf"
    for length in range(used):
        cut.write_bytes(content[:length])
        with pytest.raises(TrimtabError) as caught:
            import_control_vector(cut, MODEL)
        assert caught.value.code == "E_GGUF_TRUNCATED", length
    cut.write_bytes(content[:used])
    import_control_vector(cut, MODEL)


def test_random_damage_is_refused_or_harmless_but_never_crashes(tmp_path: Path) -> None:
    vectors = some_vectors()
    whole = written(tmp_path / "v.gguf", {f"direction.{k}": vectors[k] for k in (1, 2)})
    content = whole.read_bytes()
    rng = np.random.default_rng(1)
    codes = []
    for _ in range(300):
        damaged = bytearray(content)
        damaged[rng.integers(4, len(content) - 2 * vectors[1].nbytes)] = rng.integers(256)
        (tmp_path / "damaged.gguf").write_bytes(damaged)
        try:
            made = import_control_vector(tmp_path / "damaged.gguf", MODEL)
        except TrimtabError as error:
            codes.append(error.code)
        else:
            assert np.isfinite(made.vectors).all()
    assert len(codes) > 100
    assert {code[:7] for code in codes} == {"E_GGUF_"}
