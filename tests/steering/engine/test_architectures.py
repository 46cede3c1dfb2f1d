"""The residual stream is found and edited in each of the forms in which vLLM's models carry it."""

from __future__ import annotations

from pathlib import Path

import pytest

from steering.engine import sites
from steering.engine.control import activate_local
from tests.steering.engine.harness import (
    Request,
    assert_parity,
    build_world,
    engine,
    run,
    standard_policies,
)

pytestmark = pytest.mark.engine


def build(name: str, path: Path, tokenizer_from: Path) -> Path:
    """A random 4-layer checkpoint of another architecture, with the tiny checkpoint's tokenizer."""
    import torch
    from transformers import (
        AutoTokenizer,
        GPT2Config,
        GPT2LMHeadModel,
        Olmo2Config,
        Olmo2ForCausalLM,
        Qwen3Config,
        Qwen3ForCausalLM,
    )

    torch.manual_seed(3)
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_from)
    special = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    sizes = {
        "vocab_size": 300,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 4,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "initializer_range": 0.15,
        **special,
    }
    model = {
        "olmo2": lambda: Olmo2ForCausalLM(Olmo2Config(**sizes)),
        "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(head_dim=32, **sizes)),
        "gpt2": lambda: GPT2LMHeadModel(
            GPT2Config(
                vocab_size=300,
                n_positions=512,
                n_embd=64,
                n_layer=4,
                n_head=2,
                initializer_range=0.15,
                bos_token_id=None,
                **special,
            )
        ),
    }[name]()
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.mark.parametrize(
    ("name", "served_by", "form"),
    [
        ("qwen3", "Qwen3ForCausalLM", ("pair", 2)),
        ("gpt2", "GPT2LMHeadModel", ("stream", 2)),
        ("olmo2", "TransformersForCausalLM", ("stream", 3)),
    ],
)
def test_the_engine_agrees_with_the_reference(
    name, served_by, form, tiny_checkpoint, tmp_path, monkeypatch
) -> None:
    world = build_world(build(name, tmp_path / name, tiny_checkpoint), tmp_path / "store")
    standard_policies(world)
    for module in world.model.modules():
        # vLLM's Transformers backend puts its compilation into the class that the reference shares.
        module.do_not_compile = True
    forms = set()
    original = sites.residual_stream

    def recording(output):
        stream = original(output)
        forms.add(("pair" if isinstance(output, tuple) else "stream", stream.dim()))
        return stream

    monkeypatch.setattr(sites, "residual_stream", recording)
    with engine(world.path, kv_cache_memory_bytes=64 * 2**20) as llm:
        (served,) = llm.apply_model(lambda model: type(model).__name__)
        activate_local(llm, world.plans.values(), world.store)
        prompts = [tuple(world.prompt(f"Wave {n} came from the sea.")) for n in range(4)]
        requests = [Request(p, max_tokens=32) for p in prompts]
        requests += [Request(prompts[0], policy, max_tokens=32) for policy in world.policies]
        answers = run(llm, world, requests)
    assert served == served_by
    assert forms == {form}
    assert_parity(world, answers, name)


def test_a_model_whose_layers_cannot_be_told_is_refused(tiny_world) -> None:
    from torch import nn

    from directions.errors import TrimtabError

    with pytest.raises(TrimtabError, match="configuration says 4") as caught:
        sites.find_decoder_layers(nn.ModuleList([nn.Linear(2, 2)]), 4)
    assert caught.value.code == "E_SITE_LAYERS"


@pytest.mark.parametrize("output", [None, (1, 2), ("a", "b", "c"), {"hidden": 1}])
def test_a_layer_whose_output_has_no_known_form_is_refused(output) -> None:
    with pytest.raises(TypeError, match="E_SITE_FORM"):
        sites.residual_stream(output)
