"""The fingerprint of a checkpoint, read from its files without loading the model.

The tokenizer's hash covers what decides how text becomes tokens (vocabulary, merges, added tokens,
normalisation, splitting, post-processing) and leaves out what saving a tokenizer again may change
without changing that: the truncation and padding last in use, and how merges are written. The chat
template's hash is of its text. The weights' hash is over the bytes of every weight file; it takes a
second per few hundred megabytes once, and is then remembered per file, size and modification time.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from pathlib import Path
from typing import Any

from directions.atomic import write_file
from directions.card import ModelFingerprint
from directions.checkpoint import local_checkpoint, read_json
from directions.errors import TrimtabError
from directions.progress import Progress, silent
from directions.store import home

_HASH_BLOCK = 8 << 20
# The same number under the names that different families of models give it.
_HIDDEN_SIZE = ("hidden_size", "n_embd", "d_model")
_NUM_LAYERS = ("num_hidden_layers", "n_layer", "num_layers")
_NUM_HEADS = ("num_attention_heads", "n_head", "num_heads")
_NUM_KV_HEADS = ("num_key_value_heads", "num_kv_heads")


def fingerprint(
    model_path: str | Path, *, weights: bool = True, progress: Progress = silent
) -> ModelFingerprint:
    """Read a checkpoint's fingerprint.

    Args:
        model_path: a checkpoint's folder, or its name on the hub.
        weights: whether to hash the weight files too; without, ``weights_sha256`` is None.
        progress: told of the bytes hashed.

    Raises:
        TrimtabError: E_MODEL_NOT_FOUND, E_MODEL_CONFIG (sizes missing), E_MODEL_TOKENIZER (no
            tokenizer files that are known).
    """
    folder = local_checkpoint(model_path)
    config = read_json(folder / "config.json")
    architectures = config.get("architectures") or [config.get("model_type")]
    # Models that read more than text keep the language model's sizes one level down.
    text = config.get("text_config")
    sizes = {**config, **text} if isinstance(text, dict) else config
    num_heads = _size(sizes, _NUM_HEADS, folder)
    return ModelFingerprint(
        architecture=str(architectures[0]),
        hidden_size=_size(sizes, _HIDDEN_SIZE, folder),
        num_layers=_size(sizes, _NUM_LAYERS, folder),
        num_heads=num_heads,
        num_kv_heads=_size(sizes, _NUM_KV_HEADS, folder, default=num_heads),
        tokenizer_sha256=_tokenizer_sha256(folder),
        chat_template_sha256=_chat_template_sha256(folder),
        weights_sha256=weights_sha256(folder, progress) if weights else None,
    )


def _size(
    config: dict[str, Any], names: tuple[str, ...], folder: Path, default: int | None = None
) -> int:
    for name in names:
        value = config.get(name)
        if isinstance(value, int) and not isinstance(value, bool) and value > 0:
            return value
    if default is not None:
        return default
    raise TrimtabError(
        "E_MODEL_CONFIG", f"{folder / 'config.json'} has no {names[0]}", field=names[0]
    )


def _tokenizer_sha256(folder: Path) -> str:
    fast = folder / "tokenizer.json"
    if fast.is_file():
        document = read_json(fast)
        for incidental in ("truncation", "padding", "version"):
            document.pop(incidental, None)
        model = document.get("model")
        if isinstance(model, dict) and isinstance(model.get("merges"), list):
            model["merges"] = [
                merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"]
            ]
        canonical = json.dumps(document, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
        return hashlib.sha256(canonical.encode("utf-8", "surrogatepass")).hexdigest()
    for names in (("tokenizer.model",), ("vocab.json", "merges.txt"), ("tekken.json",)):
        if all((folder / name).is_file() for name in names):
            return _combined({name: _sha256_of(folder / name) for name in names})
    raise TrimtabError(
        "E_MODEL_TOKENIZER",
        f"{folder} holds no tokenizer",
        expected="tokenizer.json, tokenizer.model, tekken.json, or vocab.json with merges.txt",
    )


def _chat_template_sha256(folder: Path) -> str | None:
    text = chat_template(folder)
    return None if text is None else hashlib.sha256(text.encode()).hexdigest()


def chat_template(folder: Path) -> str | None:
    """The text of a checkpoint's default chat template; None where it has none.

    A file of its own counts before the key in ``tokenizer_config.json``, as it does for those who
    load the tokenizer. Of several named templates, the one named ``default`` counts.
    """
    jinja = folder / "chat_template.jinja"
    if jinja.is_file():
        return jinja.read_text(encoding="utf-8")
    for name in ("chat_template.json", "tokenizer_config.json"):
        path = folder / name
        if not path.is_file():
            continue
        template = read_json(path).get("chat_template")
        if isinstance(template, list):
            named = {entry.get("name"): entry.get("template") for entry in template}
            template = named.get("default")
        if isinstance(template, str):
            return template
    return None


def weights_sha256(folder: Path, progress: Progress = silent) -> str | None:
    """Hash of a checkpoint's weight files; None where it has none.

    It is the sha256 over each file's name and sha256, so files can be hashed, and remembered, one
    by one. Safetensors count before pickled weights, which are hashed but never opened.
    """
    files = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("pytorch_model*.bin"))
    if not files:
        return None
    advance = progress("hash weights (MB)", sum(file.stat().st_size for file in files) >> 20)
    return _combined({file.name: _remembered_sha256(file, advance) for file in files})


def _combined(hashes: dict[str, str]) -> str:
    lines = "".join(f"{value}  {name}\n" for name, value in sorted(hashes.items()))
    return hashlib.sha256(lines.encode()).hexdigest()


def _sha256_of(path: Path, advance: Any = None) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_HASH_BLOCK):
            digest.update(block)
            if advance is not None:
                advance(len(block) >> 20)
    return digest.hexdigest()


def _remembered_sha256(path: Path, advance: Any) -> str:
    """A file's sha256, from memory where the file has not changed since."""
    real = path.resolve()
    status = real.stat()
    state = {"path": str(real), "size": status.st_size, "mtime_ns": status.st_mtime_ns}
    memory = home() / "cache" / "weights" / f"{hashlib.sha256(str(real).encode()).hexdigest()}.json"
    try:
        remembered = json.loads(memory.read_text())
        if {key: remembered[key] for key in state} == state:
            advance(status.st_size >> 20)
            return str(remembered["sha256"])
    except (OSError, ValueError, LookupError, TypeError):
        pass  # nothing remembered, or nothing usable: hash again
    value = _sha256_of(path, advance)
    with contextlib.suppress(OSError):  # a home that cannot be written only costs time
        write_file(memory, json.dumps({**state, "sha256": value}).encode())
    return value
