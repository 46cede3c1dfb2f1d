"""GGUF control vectors: directions as llama.cpp, repeng and others exchange them.

Such a file has ``general.architecture = "controlvector"`` and one float32 tensor
``direction.{k}`` of the model's hidden size for each layer. llama.cpp adds ``direction.k`` to the
residual stream after decoder layer ``k``, counted from 0, and has no place for one after layer 0: it
starts its table at layer 1 and refuses a file with ``direction.0``. So ``k`` is our layer number as
it stands, and a direction that has layer 0 can only be exported without it.

A file says nothing of how large the model's activations are, and only hints at the model.
"""

from __future__ import annotations

import hashlib
import re
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from directions.atomic import flush, temporary_beside
from directions.card import CardDraft, ModelFingerprint
from directions.errors import TrimtabError
from directions.extraction import Extraction
from directions.store import Direction

ARCHITECTURE = "controlvector"
_MODEL_HINT = "controlvector.model_hint"
_LAYER_COUNT = "controlvector.layer_count"
_TENSOR = re.compile(r"direction\.(0|[1-9][0-9]{0,5})")
_MAGIC = b"GGUF"


def export_control_vector(
    direction: Direction, path: Path, *, skip_layer_zero: bool = False
) -> tuple[int, ...]:
    """Write a direction as a GGUF control vector; the file appears whole or not at all.

    Args:
        direction: what to write; only its present layers are.
        path: the file, replaced where there is one.
        skip_layer_zero: leave out layer 0 where the direction has it.

    Returns:
        The layers written.

    Raises:
        TrimtabError: E_GGUF_LAYER_ZERO, E_GGUF_PACKAGE (the ``gguf`` package is missing).
    """
    layers = [int(layer) for layer in np.flatnonzero(direction.present)]
    if layers[0] == 0 and not skip_layer_zero:
        raise TrimtabError(
            "E_GGUF_LAYER_ZERO",
            f"{direction.reference} has a vector after layer 0, and the format has no place for it",
            expected="--skip-layer-zero, to export the other layers",
        )
    layers = [layer for layer in layers if layer > 0]
    if not layers:
        raise TrimtabError("E_GGUF_LAYER_ZERO", f"{direction.reference} has no layer but layer 0")
    gguf = _package()
    temporary = temporary_beside(path)
    try:
        writer = gguf.GGUFWriter(temporary, ARCHITECTURE)
        writer.add_string(_MODEL_HINT, _hint(direction.card.model))
        writer.add_uint32(_LAYER_COUNT, len(layers))
        for layer in layers:
            writer.add_tensor(f"direction.{layer}", np.array(direction.vectors[layer]))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        flush(temporary)
        temporary.rename(path)
    finally:
        temporary.unlink(missing_ok=True)
    return tuple(layers)


def import_control_vector(
    path: Path, model: ModelFingerprint, *, description: str = ""
) -> Extraction:
    """Read a GGUF control vector as a direction of a model.

    The card's activation norms are empty: ``relative`` strengths cannot be used with it until they
    are measured.

    Args:
        path: the file.
        model: the model it is meant for, which the file itself does not say.
        description: a sentence for the card; made up where it is empty.

    Raises:
        TrimtabError: E_GGUF_FOREIGN (no GGUF, or not a control vector), E_GGUF_TRUNCATED,
            E_GGUF_TYPE (not float32), E_GGUF_WIDTH, E_GGUF_LAYER_ZERO, E_GGUF_LAYER_RANGE,
            E_GGUF_NONFINITE, E_GGUF_PACKAGE.
    """
    content_sha256 = _sha256(path)
    fields, tensors = _read(path)
    if fields.get("general.architecture") != ARCHITECTURE:
        raise _refused(
            "E_GGUF_FOREIGN",
            path,
            f"has architecture {fields.get('general.architecture')!r}",
            expected=ARCHITECTURE,
        )
    vectors = np.zeros((model.num_layers, model.hidden_size), dtype=np.float32)
    present = np.zeros(model.num_layers, dtype=bool)
    for name, values in tensors:
        match = _TENSOR.fullmatch(name)
        if match is None:
            raise _refused("E_GGUF_FOREIGN", path, f"has a tensor {name[:80]!r}", "direction.{k}")
        layer = int(match.group(1))
        if values.dtype != np.float32:
            raise _refused("E_GGUF_TYPE", path, f"has {name} in another type", "float32")
        if layer == 0:
            raise _refused("E_GGUF_LAYER_ZERO", path, "has direction.0", "layers from 1")
        if layer >= model.num_layers:
            raise _refused(
                "E_GGUF_LAYER_RANGE",
                path,
                f"has {name}",
                f"layers from 1 to {model.num_layers - 1}",
            )
        if values.shape != (model.hidden_size,):
            raise _refused(
                "E_GGUF_WIDTH", path, f"has {name} of shape {values.shape}", f"{model.hidden_size}"
            )
        if not np.isfinite(values).all():
            raise _refused("E_GGUF_NONFINITE", path, f"has NaN or infinity in {name}", "numbers")
        vectors[layer] = values
        present[layer] = True
    if not present.any():
        raise _refused("E_GGUF_FOREIGN", path, "holds no tensor", "direction.{k}")
    card = CardDraft(
        method="import",
        description=description or f"imported from {path.name}",
        model=model,
        activation_norms=(None,) * model.num_layers,
        settings={
            "file": path.name,
            "file_sha256": content_sha256,
            "model_hint": str(fields.get(_MODEL_HINT, "")),
        },
        dtype="float32",
        created=datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
    )
    return Extraction(card, vectors, present)


def _read(path: Path) -> tuple[dict[str, Any], list[tuple[str, np.ndarray[Any, Any]]]]:
    """The file's fields and its tensors, copied out of it."""
    gguf = _package()
    with path.open("rb") as file:
        magic = file.read(4)
    if magic != _MAGIC:
        short = _MAGIC.startswith(magic)
        code = "E_GGUF_TRUNCATED" if short else "E_GGUF_FOREIGN"
        raise _refused(code, path, "does not begin as a GGUF file does")
    try:
        reader = gguf.GGUFReader(path)
        wanted = ("general.architecture", _MODEL_HINT)
        fields = {key: reader.fields[key].contents() for key in wanted if key in reader.fields}
        tensors = [(tensor.name, np.array(tensor.data)) for tensor in reader.tensors]
        for tensor, (_, values) in zip(reader.tensors, tensors, strict=True):
            if values.nbytes != tensor.n_bytes:
                raise IndexError(f"{tensor.name} has {values.nbytes} of {tensor.n_bytes} bytes")
    except (IndexError, ValueError, KeyError, OverflowError, MemoryError, TypeError) as error:
        # The reader follows the file's own lengths and stumbles where the file ends before them.
        raise _refused(
            "E_GGUF_TRUNCATED", path, f"cannot be read to its end: {type(error).__name__} {error}"
        ) from error
    return fields, tensors


def _hint(model: ModelFingerprint) -> str:
    """The family's name as llama.cpp writes it: ``LlamaForCausalLM`` is ``llama``."""
    return re.sub(r"For[A-Z]\w*$", "", model.architecture).lower()


def _refused(code: str, path: Path, what: str, expected: str | None = None) -> TrimtabError:
    return TrimtabError(code, f"{path} {what}", field=str(path), expected=expected)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _package() -> Any:
    try:
        import gguf
    except ImportError as error:
        raise TrimtabError(
            "E_GGUF_PACKAGE", "reading and writing GGUF needs the gguf package", expected="gguf"
        ) from error
    return gguf
