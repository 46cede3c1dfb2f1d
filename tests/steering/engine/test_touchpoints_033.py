"""The CUDA release, vLLM 0.33, has every name that the plug-in holds on to.

It cannot be installed next to the CPU build, and needs a GPU to run. Its wheel is fetched once into
pytest's cache, and only its Python sources are unpacked and parsed; nothing of it is imported.
"""

from __future__ import annotations

import ast
import inspect
import subprocess
import sys
import tempfile
import time
import zipfile
from importlib import import_module
from pathlib import Path

import pytest

from steering.engine.touchpoints import CHECKED_VERSIONS, TOUCHPOINTS, Touchpoint
from tests.steering.engine.vllm_source import Source

pytestmark = pytest.mark.engine

VERSION = "0.33.0"


def fetch_sources(folder: Path) -> None:
    """Put the Python sources of the released wheel into ``folder``; skip if it cannot be fetched."""
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as download:
        command = [sys.executable, "-m", "pip", "download", f"vllm=={VERSION}", "--no-deps"]
        # The wheel is for CUDA, whatever this machine has.
        command += ["--only-binary=:all:", "--no-cache-dir", "-q", "-d", download]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"vLLM {VERSION} cannot be fetched: {done.stderr.strip()[-300:]}")
        fetched = time.monotonic()
        wheel = next(Path(download).glob("*.whl"))
        # Renamed when complete, so that an interrupted run leaves nothing that looks whole.
        partial = Path(tempfile.mkdtemp(dir=folder.parent))
        with zipfile.ZipFile(wheel) as archive:
            members = [n for n in archive.namelist() if n.startswith("vllm/") and n.endswith(".py")]
            archive.extractall(partial, members)
        partial.rename(folder)
        print(
            f"\nvLLM {VERSION}: fetched {wheel.stat().st_size / 1e6:.0f} MB in "
            f"{fetched - started:.1f} s, unpacked {len(members)} files in "
            f"{time.monotonic() - fetched:.1f} s"
        )


@pytest.fixture(scope="module")
def released(pytestconfig: pytest.Config) -> Source:
    folder = pytestconfig.cache.mkdir("vllm-source") / VERSION
    if not folder.exists():
        fetch_sources(folder)
    return Source(folder)


def identify(touchpoint: Touchpoint) -> str:
    return f"{touchpoint.module.rpartition('.')[2]}.{touchpoint.name}"


def test_the_release_is_one_that_the_plug_in_accepts() -> None:
    assert VERSION.rpartition(".")[0] in CHECKED_VERSIONS


@pytest.mark.parametrize("touchpoint", TOUCHPOINTS, ids=identify)
def test_the_release_has_the_name_and_its_parameters(released: Source, touchpoint) -> None:
    actual = released.parameters(touchpoint.module, touchpoint.name)
    assert [p for p in actual if p in touchpoint.parameters] == list(touchpoint.parameters), actual


@pytest.mark.parametrize("touchpoint", TOUCHPOINTS, ids=identify)
def test_parsing_says_what_importing_says(touchpoint) -> None:
    import vllm

    found = import_module(touchpoint.module)
    for part in touchpoint.name.split("."):
        found = getattr(found, part)
    installed = Source(Path(vllm.__file__).parents[1])
    parsed = installed.parameters(touchpoint.module, touchpoint.name)
    assert parsed == list(inspect.signature(found).parameters)


def imports_of_vllm() -> list[tuple[str, str]]:
    """Every name that Trimtab imports from vLLM, as module and name."""
    root = Path(__file__).parents[3]
    return sorted(
        {
            (node.module, alias.name)
            for package in ("steering", "server")
            for file in (root / package).rglob("*.py")
            for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("vllm.")
            for alias in node.names
        }
    )


@pytest.mark.parametrize(("module", "name"), imports_of_vllm())
def test_the_release_has_what_the_plug_in_imports(released: Source, module, name) -> None:
    assert released.has(module, name)


def test_what_is_gone_is_not_found(released: Source) -> None:
    for module, name in (
        ("vllm.no_such_module", "Anything"),
        ("vllm.v1.worker.gpu.model_runner", "GPUModelRunner.no_such_method"),
        ("vllm.v1.worker.gpu.model_runner", "NoSuchClass"),
    ):
        with pytest.raises(LookupError):
            released.parameters(module, name)
    assert not released.has("vllm.v1.outputs", "NO_SUCH_CONSTANT")
