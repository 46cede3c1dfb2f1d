"""A checkpoint on disk: finding it and reading its config.

Every offline method and the fingerprint start from a folder in Hugging Face's layout
(``config.json``, tokenizer files, safetensors). A name on the Hugging Face hub is resolved to the
folder in the local hub cache, downloading what is missing as the hub client is configured to.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from directions.errors import TrimtabError

_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


def local_checkpoint(model: str | Path) -> Path:
    """The folder that holds a model.

    Args:
        model: a folder, or ``owner/name`` on the hub.

    Raises:
        TrimtabError: E_MODEL_NOT_FOUND.
    """
    path = Path(model).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise TrimtabError(
                "E_MODEL_NOT_FOUND",
                f"{path} holds no config.json",
                field=str(model),
                expected="a folder in Hugging Face's layout",
            )
        return path
    if not path.exists() and _HUB_NAME.fullmatch(str(model)):
        return _from_hub(str(model))
    raise TrimtabError(
        "E_MODEL_NOT_FOUND",
        f"{model} is not a folder",
        field=str(model),
        expected="a folder in Hugging Face's layout, or owner/name on the hub",
    )


def _from_hub(name: str) -> Path:
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise TrimtabError(
            "E_MODEL_NOT_FOUND",
            f"{name} is not a folder, and huggingface_hub, which could fetch it, is not installed",
            field=name,
        ) from error
    try:
        patterns = ["*.json", "*.safetensors", "*.model", "*.jinja", "*.txt"]
        return Path(snapshot_download(name, allow_patterns=patterns))
    except Exception as error:  # the hub client has a family of errors of its own
        raise TrimtabError(
            "E_MODEL_NOT_FOUND",
            f"{name} is neither a folder nor to be had from the hub: {str(error).splitlines()[0]}",
            field=name,
        ) from error


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object of the checkpoint.

    Raises:
        TrimtabError: E_MODEL_CONFIG where the file is not a JSON object.
    """
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise TrimtabError("E_MODEL_CONFIG", f"{path} is not JSON: {error}") from error
    if not isinstance(document, dict):
        raise TrimtabError("E_MODEL_CONFIG", f"{path} holds no JSON object", field=str(path))
    return document
