"""What every edit means, in plain torch on a Hugging Face model: slow, short and obvious.

The engine is tested against this file, so it shares nothing with what it judges: it starts from the
policy itself, not from a compiled plan, and changes activations by ordinary forward hooks.

With ``h_l[t]`` the residual stream after decoder layer ``l`` (from 0) at absolute position ``t``,
``P`` the number of prompt tokens, ``s`` the request's strength, and for each edit ``E`` its layers
``L_E``, its scope and its per-layer vector ``d_E,l``::

    h_l[t]  becomes  h_l[t] + s · Σ_E d_E,l      over the edits with l ∈ L_E and t in scope
    t is in the scope  all: always    prompt: t < P    generation: t >= P

A policy is taken as if enforced: its mode, failure rule and strength range belong to the server.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from directions.store import Direction, Store
from steering.edits.add import Add
from steering.policy import Edit, Policy


def decoder_layers(model: nn.Module) -> nn.ModuleList:
    """The model's decoder layers: its longest list of modules that contain attention.

    Where the configuration says how many layers there are, only lists of that length count, so that
    a vision tower with more layers than the language model is not mistaken for it.

    Raises:
        ValueError: there is no such list, or more than one of the same length.
    """
    lists = [
        module
        for module in model.modules()
        if isinstance(module, nn.ModuleList)
        and len(module) > 0
        and all(_contains_attention(child) for child in module)
    ]
    expected = _num_layers(model)
    if expected is not None:
        lists = [found for found in lists if len(found) == expected]
    longest = max((len(found) for found in lists), default=0)
    candidates = [found for found in lists if len(found) == longest]
    if len(candidates) != 1:
        raise ValueError(
            f"{len(candidates)} lists of decoder layers in {type(model).__name__}"
            + (f", whose configuration says {expected} layers" if expected is not None else "")
        )
    return candidates[0]


def _contains_attention(layer: nn.Module) -> bool:
    return any(
        "attention" in type(module).__name__.lower() or name.rpartition(".")[2].endswith("attn")
        for name, module in layer.named_modules()
        if name
    )


def _num_layers(model: nn.Module) -> int | None:
    config: Any = getattr(model, "config", None)
    if config is None:
        return None
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    found = getattr(text, "num_hidden_layers", None)
    return found if isinstance(found, int) else None


def edit_vectors(edit: Edit, store: Store) -> dict[int, Tensor]:
    """``d_E,l`` for each layer of the edit: ``[hidden_size] float32`` by layer."""
    spec = edit.spec
    if isinstance(spec, Add):
        return _add(spec, store.load(spec.direction))
    raise NotImplementedError(f"no meaning is written down for the edit kind {edit.kind}")


def _add(spec: Add, direction: Direction) -> dict[int, Tensor]:
    """``absolute: a·v_l``, ``unit: a·v_l/‖v_l‖``, ``relative: a·n_l·v_l/‖v_l‖``."""
    vectors = {}
    for layer in range(len(direction.vectors)):
        if not direction.present[layer]:
            continue
        if spec.layers != "all" and layer not in spec.layers:
            continue
        v = torch.tensor(direction.vectors[layer], dtype=torch.float64)
        if spec.unit == "absolute":
            d = spec.strength * v
        elif spec.unit == "unit":
            d = spec.strength * v / v.norm()
        else:
            n = direction.card.activation_norms[layer]
            if n is None:
                raise ValueError(f"no activation norm of layer {layer} in {spec.direction}'s card")
            d = spec.strength * n * v / v.norm()
        vectors[layer] = d.float()
    return vectors


def in_scope(edit: Edit, position: int, num_prompt_tokens: int) -> bool:
    """Whether the token at an absolute position is one that the edit touches."""
    is_prompt = position < num_prompt_tokens
    return (
        "all" in edit.scope
        or ("prompt" in edit.scope and is_prompt)
        or ("generation" in edit.scope and not is_prompt)
    )


@contextmanager
def steering(
    model: nn.Module,
    policy: Policy | None,
    store: Store,
    *,
    num_prompt_tokens: int,
    strength: float = 1.0,
    first_position: Callable[[], int] = lambda: 0,
) -> Iterator[None]:
    """The policy in force on every forward pass of ``model`` inside the block.

    Args:
        model: a causal language model in float32.
        policy: ``None`` for no steering.
        store: where the policy's artefacts are.
        num_prompt_tokens: ``P``.
        strength: ``s``.
        first_position: the absolute position of the first token of the pass that is running; not 0
            only where a key/value cache holds what came before.

    Raises:
        ValueError: the model is not in float32, or its decoder layers cannot be told.
    """
    if any(p.dtype != torch.float32 for p in model.parameters() if p.is_floating_point()):
        raise ValueError("the reference runs in float32; load the model with dtype=torch.float32")
    edits = [] if policy is None else list(policy.edits.values())
    vectors = [(edit, edit_vectors(edit, store)) for edit in edits]

    def hook_of(layer: int) -> Callable[[nn.Module, object, Any], Any]:
        def hook(module: nn.Module, inputs: object, output: Any) -> Any:
            h = output[0] if isinstance(output, tuple) else output
            changed = h.clone()
            for t in range(h.shape[-2]):
                position = first_position() + t
                for edit, by_layer in vectors:
                    if layer in by_layer and in_scope(edit, position, num_prompt_tokens):
                        changed[..., t, :] += strength * by_layer[layer].to(h.device)
            return (changed, *output[1:]) if isinstance(output, tuple) else changed

        return hook

    touched = {layer for _, by_layer in vectors for layer in by_layer}
    handles = [
        module.register_forward_hook(hook_of(layer))
        for layer, module in enumerate(decoder_layers(model))
        if layer in touched
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def steered_logprobs(
    model: Any,
    policy: Policy | None,
    store: Store,
    token_ids: Sequence[int],
    num_prompt_tokens: int,
    strength: float = 1.0,
) -> Tensor:
    """Teacher-forced log-probabilities of a text under a policy, from one pass over all of it.

    Args:
        model: a Hugging Face causal language model in float32 and evaluation mode.
        policy: ``None`` for no steering.
        store: where the policy's artefacts are.
        token_ids: prompt and answer, ``T`` tokens.
        num_prompt_tokens: how many of them are the prompt.
        strength: the request's.

    Returns:
        ``[T, vocabulary] float32``; row ``t`` is the distribution of token ``t + 1``.
    """
    ids = torch.tensor([list(token_ids)], device=model.device)
    with steering(model, policy, store, num_prompt_tokens=num_prompt_tokens, strength=strength):
        logits: Tensor = model(input_ids=ids, use_cache=False).logits[0]
    return logits.float().log_softmax(-1)


def answer_logprobs(
    model: Any,
    policy: Policy | None,
    store: Store,
    prompt_ids: Sequence[int],
    answer_ids: Sequence[int],
    strength: float = 1.0,
) -> Tensor:
    """The log-probability of each token of an answer under a policy: ``[len(answer_ids)]``."""
    text = [*prompt_ids, *answer_ids]
    rows = steered_logprobs(model, policy, store, text, len(prompt_ids), strength)
    predicting = rows[len(prompt_ids) - 1 : -1]
    chosen = torch.tensor(list(answer_ids), device=rows.device)
    return predicting.gather(1, chosen[:, None])[:, 0]


@dataclass(frozen=True)
class Generated:
    """A greedy answer.

    Attributes:
        token_ids: the tokens after the prompt.
        logprobs: the log-probability of each, in nats.
    """

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]


@torch.no_grad()
def generate_greedy(
    model: Any,
    policy: Policy | None,
    store: Store,
    prompt_ids: Sequence[int],
    max_new_tokens: int,
    strength: float = 1.0,
    *,
    stop_ids: frozenset[int] = frozenset(),
) -> Generated:
    """The most likely token, again and again, under a policy.

    Keys and values of earlier tokens are kept, as they depend on nothing that comes later; each
    pass after the first runs over one token, whose absolute position decides its scope.

    Args:
        prompt_ids: the prompt, at least one token.
        max_new_tokens: how many tokens to make at most.
        stop_ids: tokens that end the answer; the one that does is part of it.
    """
    done = 0
    pending = list(prompt_ids)
    tokens: list[int] = []
    logprobs: list[float] = []
    cache = None
    with steering(
        model,
        policy,
        store,
        num_prompt_tokens=len(pending),
        strength=strength,
        first_position=lambda: done,
    ):
        while len(tokens) < max_new_tokens:
            output = model(
                input_ids=torch.tensor([pending], device=model.device),
                past_key_values=cache,
                use_cache=True,
            )
            cache = output.past_key_values
            done += len(pending)
            row = output.logits[0, -1].float().log_softmax(-1)
            token = int(row.argmax())
            tokens.append(token)
            logprobs.append(float(row[token]))
            if token in stop_ids:
                break
            pending = [token]
    return Generated(tuple(tokens), tuple(logprobs))
