"""What every edit means, in plain torch on a Hugging Face model: slow, short and obvious.

The engine is tested against this file, so it shares nothing with what it judges: it starts from the
policy itself, not from a compiled plan, changes activations by ordinary forward hooks, and finds a
token's phase by searching the text for the thinking markers.

**Edits.** With ``h`` one token's activation at one site of one layer, ``s`` the request's strength,
``r`` the layer's stored vector (or that of ``vectorLayer``), ``r̂ = r/‖r‖`` and ``n`` the mean
activation norm that belongs to ``r``::

    ablate        h ← h − s·c·(h·r̂) r̂                          Arditi et al., arXiv 2406.11717
    clamp         h ← h + s·(clip(p, low, high) − p) r̂           p = h·r̂; relative bounds times n
    rotate        h ← h + ρ(cos φ' − cos φ) b1 + ρ(sin φ' − sin φ) b2
                  with (p1, p2) = (h·b1, h·b2), ρ and φ its length and angle,
                  by θ: φ' = φ + s·θ     to θ: φ' = φ + s·wrap(θ − φ)    Vu & Nguyen, arXiv 2510.26243
    add           h ← h + s·d     d = a·r, a·r̂ or a·n·r̂          Turner et al., arXiv 2308.10248
    scale_heads   slice of head i ← slice · (1 + s·Σ(f − 1))       before the output projection

At one site they act in this order, those of one kind in the order of their names, each on what the
one before left. ``renormalise: row`` gives the token's heads their joint length back.

**Scopes.** With ``P`` prompt tokens, a token at absolute position ``p`` is ``prompt`` (p < P − 1),
``prompt_end`` (p = P − 1), or generated and then ``thinking``, ``think_end`` or ``answer``; see
:func:`text_phases`.

**Gates.** A gate reads a probe before the edits of the probe's layer, and is open where
``low < score < high``. An edit that gates name acts where one of them is open; see
:meth:`Steering.is_open`.

A policy is taken as if enforced: its mode, failure rule and strength range belong to the server.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Final, Literal

import torch
from torch import Tensor, nn

from directions.model_sites import block_of, decoder_layers, final_norm, heads_of
from directions.store import Probe, Store
from steering.edits.ablate import Ablate
from steering.edits.scale_heads import ScaleHeads
from steering.edits.scope import First
from steering.gates import Gate
from steering.policy import Edit, Policy
from steering.reference_edits import Change, changes_of, head_factors

_ORDER: Final = ("ablate", "clamp", "rotate", "add")
_NEEDS_TEXT: Final = frozenset({"thinking", "think_end", "answer"})


# -- phases and scopes -----------------------------------------------------------------------------

Phase = Literal["prompt", "prompt_end", "thinking", "think_end", "answer", "generated"]
"""A token's phase; ``generated`` where no markers tell which of the last three it is."""


@dataclass(frozen=True)
class TextPhases:
    """The phases of a text's tokens.

    Attributes:
        phases: one for each token.
        prompt_ended: whether thinking had ended when the prompt did, and nothing but white space
            followed.
    """

    phases: tuple[Phase, ...]
    prompt_ended: bool


def text_phases(
    texts: Sequence[str], num_prompt_tokens: int, thinking: tuple[str, str]
) -> TextPhases:
    """The phase of each token, told from the text that the tokens up to it decode to.

    A search for the start marker, then from where that stood for the end marker, and so on. The
    token in which an end marker is completed is ``think_end``, whatever else it holds, and so are
    tokens directly after it that are white space or empty. A token in which a start marker is
    completed, and all up to the next completed end, is ``thinking``; anything else ``answer``.

    Args:
        texts: what each token decodes to by itself, ``T`` strings.
        num_prompt_tokens: how many of them are the prompt.
        thinking: the start and the end marker.
    """
    states: list[Phase] = []
    text, searched, inside = "", 0, False
    for piece in texts:
        text += piece
        completed = False
        while (found := text.find(thinking[inside], searched)) >= 0:
            searched = found + len(thinking[inside])
            inside = not inside
            completed = True
        if inside:
            states.append("thinking")
        elif completed or (states and states[-1] == "think_end" and not piece.strip()):
            states.append("think_end")
        else:
            states.append("answer")
    last = num_prompt_tokens - 1
    phases: list[Phase] = ["prompt"] * last
    phases += ["prompt_end"]
    return TextPhases(
        (*phases, *states[num_prompt_tokens:]), len(states) > last and states[last] == "think_end"
    )


def in_scope(edit: Edit, position: int, num_prompt_tokens: int, phase: Phase) -> bool:
    """Whether an edit's scope holds the token at an absolute position."""
    generated = position - num_prompt_tokens
    for part in edit.scope:
        if isinstance(part, First):
            holds = 0 <= generated < part.first
        elif part == "prompt":
            holds = generated < 0
        elif part == "generation":
            holds = generated >= 0
        else:
            holds = part in ("all", phase)
        if holds:
            return True
    return False


def token_texts(tokenizer: Any, token_ids: Sequence[int]) -> list[str]:
    """What each token decodes to by itself; special tokens by their names."""
    return [
        tokenizer.decode([token], skip_special_tokens=False, clean_up_tokenization_spaces=False)
        for token in token_ids
    ]


# -- probes and gates ------------------------------------------------------------------------------


def scores_of(probe: Probe, output: int, h: Tensor) -> Tensor:
    """A probe's score of each token.

    ``affine``: ``sigmoid(w·h + b)``. ``cosine``: the cosine between ``h`` and
    ``tanh((w·h/‖w‖²) w)``, its projection on ``w`` squashed (Lee et al., arXiv 2409.05907); 0 where
    either is zero.

    Args:
        probe: the artefact.
        output: which of its outputs.
        h: ``[T, hidden_size]``.

    Returns:
        ``[T] float64``.
    """
    h = h.double()
    w = torch.tensor(probe.weights[output], dtype=torch.float64, device=h.device)
    if probe.card.read_out == "affine":
        return torch.sigmoid(h @ w + float(probe.bias[output]))
    squashed = torch.tanh((h @ w / (w @ w))[:, None] * w)
    lengths = h.norm(dim=-1) * squashed.norm(dim=-1)
    return torch.where(lengths > 0, (h * squashed).sum(-1) / lengths, 0.0)


@contextmanager
def reading(
    model: nn.Module, probe: Probe, output: int, take: Callable[[Tensor], None]
) -> Iterator[None]:
    """``take`` the probe's scores of the tokens of every pass inside the block.

    Hooks of one module run in the order in which they were registered, each on what the one before
    left: a reading opened before the edits sees what they have not yet changed.
    """
    if probe.card.site == "final_norm":
        module = final_norm(model)
    else:
        assert probe.card.layer is not None
        module = decoder_layers(model)[probe.card.layer]

    def hook(module: nn.Module, inputs: object, result: Any) -> None:
        h = _first(result)
        if h.numel() != h.shape[-2] * h.shape[-1]:
            raise ValueError("probes are read from one text at a time, not from a batch")
        take(scores_of(probe, output, h.reshape(-1, h.shape[-1])))

    handle = module.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


@dataclass(frozen=True)
class GateResult:
    """What a gate came to over a text.

    Attributes:
        open: of a ``token`` gate, whether it opened for any token; of the others, whether the
            latest decision opened it.
        position: of a ``token`` gate, the first token for which it opened; of the others, where the
            latest decision was made. None where there is none.
        score: the probe's score there.
        open_tokens: how many decisions opened the gate; of a ``token`` gate, for how many tokens.
    """

    open: bool
    position: int | None
    score: float | None
    open_tokens: int


class Steering:
    """A policy at work on one text: what its gates' probes read, and which edits act where.

    Attributes:
        scores: of each gate's probe, by the gate's name and the absolute position.
    """

    def __init__(
        self,
        policy: Policy | None,
        store: Store,
        num_layers: int,
        num_prompt_tokens: int,
        texts: Sequence[str] | None,
        thinking: tuple[str, str] | None,
    ) -> None:
        self.edits: dict[str, Edit] = {} if policy is None else dict(policy.edits)
        self.gates: dict[str, Gate] = {} if policy is None else dict(policy.gates)
        self.probes = {name: store.load_probe(gate.probe) for name, gate in self.gates.items()}
        self.scores: dict[str, dict[int, float]] = {name: {} for name in self.gates}
        self._num_layers = num_layers
        self._num_prompt_tokens = num_prompt_tokens
        self._texts, self._thinking = texts, thinking
        self._known = TextPhases((), False)
        asks = {part for edit in self.edits.values() for part in edit.scope} & _NEEDS_TEXT
        asks |= {"think_end" for gate in self.gates.values() if gate.at == "think_end"}
        if asks and (texts is None or thinking is None):
            raise ValueError(
                f"{' and '.join(sorted(map(str, asks)))} can only be told with the thinking "
                "markers and the text of each token"
            )

    def _text(self) -> TextPhases:
        assert self._texts is not None
        assert self._thinking is not None
        if len(self._known.phases) != len(self._texts):  # a text that is being made grows
            self._known = text_phases(self._texts, self._num_prompt_tokens, self._thinking)
        return self._known

    def phase(self, position: int) -> Phase:
        """The phase of the token at an absolute position."""
        if position < self._num_prompt_tokens:
            return "prompt_end" if position == self._num_prompt_tokens - 1 else "prompt"
        if self._texts is None or self._thinking is None:
            return "generated"
        return self._text().phases[position]

    def decides(self, gate: Gate, position: int) -> bool:
        """Whether a gate is decided at a position.

        ``token``: at each token in the scope of an edit that it opens. ``prompt_end``: at the last
        prompt token. ``think_end``: at each token of the first end of thinking, which is the last
        prompt token where thinking has ended within the prompt, and the think-end tokens that
        directly follow; later ends of thinking decide nothing.
        """
        if gate.at == "token":
            phase = self.phase(position)
            opens = (self.edits[name] for name in gate.then)
            return any(in_scope(e, position, self._num_prompt_tokens, phase) for e in opens)
        if gate.at == "prompt_end":
            return position == self._num_prompt_tokens - 1
        if not self._ends_thinking(position):
            return False
        first = next(p for p in range(position + 1) if self._ends_thinking(p))
        return all(self._ends_thinking(p) for p in range(first, position))

    def _ends_thinking(self, position: int) -> bool:
        if position == self._num_prompt_tokens - 1:
            return self._text().prompt_ended
        return self.phase(position) == "think_end"

    def opens(self, name: str, position: int) -> bool:
        """What a gate's decision at a position is: ``low < score < high``."""
        gate, score = self.gates[name], self.scores[name][position]
        return (gate.low is None or gate.low < score) and (gate.high is None or score < gate.high)

    def is_open(self, name: str, position: int, layer: int, on_stream: bool) -> bool:
        """Whether a gate is open for the edits of one layer at one token.

        At a token at which it is decided, its own decision counts, for all that comes after the
        gate has read: the layers above the gate's, and the edits of the stream after the gate's own
        layer; for what comes before, the gate is closed. At any other token the latest decision
        counts, for all layers; before the first, the gate is closed.
        """
        gate, site = self.gates[name], self.probes[name].card.layer
        gate_layer = self._num_layers if site is None else site
        if self.decides(gate, position):
            after = layer > gate_layer or (on_stream and layer == gate_layer)
            return after and self.opens(name, position)
        latest = next((p for p in reversed(range(position)) if self.decides(gate, p)), None)
        return latest is not None and self.opens(name, latest)

    def active(self, name: str, position: int, layer: int, on_stream: bool = False) -> bool:
        """Whether an edit acts on one token at one layer: in scope, and not behind closed gates."""
        phase = self.phase(position)
        if not in_scope(self.edits[name], position, self._num_prompt_tokens, phase):
            return False
        gates = [gate for gate, keys in self.gates.items() if name in keys.then]
        return not gates or any(self.is_open(gate, position, layer, on_stream) for gate in gates)

    def latches(self, position: int) -> bool:
        """Whether a gate is decided at a position that later tokens then find open or closed."""
        return any(
            gate.at != "token" and self.decides(gate, position) for gate in self.gates.values()
        )

    def results(self) -> dict[str, GateResult]:
        """What each gate came to over the positions that have been read."""
        found = {}
        for name, gate in self.gates.items():
            decided = [p for p in sorted(self.scores[name]) if self.decides(gate, p)]
            opened = [p for p in decided if self.opens(name, p)]
            shown = opened[:1] if gate.at == "token" else decided[-1:]
            found[name] = GateResult(
                open=bool(shown) and shown[0] in opened,
                position=shown[0] if shown else None,
                score=self.scores[name][shown[0]] if shown else None,
                open_tokens=len(opened),
            )
        return found


# -- hooks -----------------------------------------------------------------------------------------


@contextmanager
def steering(
    model: nn.Module,
    policy: Policy | None,
    store: Store,
    *,
    num_prompt_tokens: int,
    strength: float = 1.0,
    first_position: Callable[[], int] = lambda: 0,
    texts: Sequence[str] | None = None,
    thinking: tuple[str, str] | None = None,
) -> Iterator[Steering]:
    """The policy in force on every forward pass of ``model`` inside the block.

    Passes go forward through one text, each token once. A pass must end with every position at
    which a ``prompt_end`` or ``think_end`` gate is decided: later tokens find it decided at all
    their layers, the first included.

    Args:
        model: a causal language model in float32.
        policy: ``None`` for no steering.
        store: where the policy's artefacts are.
        num_prompt_tokens: ``P``.
        strength: ``s``.
        first_position: the absolute position of the first token of the pass that is running; not 0
            only where a key/value cache holds what came before.
        texts: what each token of the text decodes to by itself; may grow between passes. Needed,
            with ``thinking``, by policies that tell thinking from answering.
        thinking: the markers at which thinking starts and ends.

    Raises:
        ValueError: the model is not in float32, a site of it cannot be told, or markers or texts
            that the policy needs are missing.
    """
    if any(p.dtype != torch.float32 for p in model.parameters() if p.is_floating_point()):
        raise ValueError("the reference runs in float32; load the model with dtype=torch.float32")
    layers = decoder_layers(model)
    now = Steering(policy, store, len(layers), num_prompt_tokens, texts, thinking)
    with ExitStack() as stack:
        for name, gate in now.gates.items():
            stack.enter_context(
                reading(model, now.probes[name], gate.output, _recorder(now, name, first_position))
            )
        for module, hook in _edit_hooks(layers, now, store, strength, first_position):
            stack.callback(module.register_forward_hook(hook).remove)
        for module, before in _head_hooks(model, layers, now, store, strength, first_position):
            stack.callback(module.register_forward_pre_hook(before).remove)
        yield now


def _recorder(
    now: Steering, gate: str, first_position: Callable[[], int]
) -> Callable[[Tensor], None]:
    def record(scores: Tensor) -> None:
        now.scores[gate].update(enumerate(scores.tolist(), start=first_position()))

    return record


def _edit_hooks(
    layers: nn.ModuleList,
    now: Steering,
    store: Store,
    strength: float,
    first_position: Callable[[], int],
) -> Iterator[tuple[nn.Module, Callable[[nn.Module, object, Any], Any]]]:
    """The hook of every site at which residual streams or blocks' outputs are edited."""
    acting: dict[tuple[str, int], list[tuple[str, Change]]] = {}
    ordered = [name for name, edit in now.edits.items() if edit.kind in _ORDER]
    ordered.sort(key=lambda name: (_ORDER.index(now.edits[name].kind), name))
    for name in ordered:
        spec = now.edits[name].spec
        for layer, change in changes_of(now.edits[name], store, len(layers)).items():
            sites: tuple[str, ...] = spec.sites if isinstance(spec, Ablate) else ("residual",)
            for site in sites:
                acting.setdefault((site, layer), []).append((name, change))

    def hook_of(
        layer: int, changes: list[tuple[str, Change]], on_stream: bool
    ) -> Callable[..., Any]:
        def hook(module: nn.Module, inputs: object, output: Any) -> Any:
            changed = _first(output).clone()
            for t in range(changed.shape[-2]):
                for name, change in changes:
                    if now.active(name, first_position() + t, layer, on_stream):
                        changed[..., t, :] = change(changed[..., t, :], strength)
            return (changed, *output[1:]) if isinstance(output, tuple) else changed

        return hook

    for (site, layer), changes in acting.items():
        if site == "residual":
            yield layers[layer], hook_of(layer, changes, on_stream=True)
        else:
            block = block_of(layers[layer], "attention" if site == "attention" else "mlp")
            yield block, hook_of(layer, changes, on_stream=False)


def _head_hooks(
    model: nn.Module,
    layers: nn.ModuleList,
    now: Steering,
    store: Store,
    strength: float,
    first_position: Callable[[], int],
) -> Iterator[tuple[nn.Module, Callable[[nn.Module, tuple[Any, ...]], Any]]]:
    """The hook before the output projection of every layer whose heads are scaled."""
    specs = {
        name: edit.spec for name, edit in now.edits.items() if isinstance(edit.spec, ScaleHeads)
    }
    factors = {name: head_factors(spec, store) for name, spec in specs.items()}

    def hook_of(layer: int, count: int, width: int) -> Callable[..., Any]:
        def hook(module: nn.Module, inputs: tuple[Any, ...]) -> Any:
            a = inputs[0].clone()
            for t in range(a.shape[-2]):
                acting = [
                    name
                    for name in specs
                    if layer in factors[name] and now.active(name, first_position() + t, layer)
                ]
                if not acting:
                    continue
                before = a[..., t, :].clone()
                for head in range(count):
                    named = [name for name in acting if head in factors[name][layer]]
                    total = sum(factors[name][layer][head] - 1.0 for name in named)
                    a[..., t, head * width : (head + 1) * width] *= 1.0 + strength * total
                if any(specs[name].renormalise == "row" for name in acting):
                    old = before.double().norm(dim=-1, keepdim=True)
                    new = a[..., t, :].double().norm(dim=-1, keepdim=True)
                    ratio = torch.where(new > 0, old / new, 1.0)
                    a[..., t, :] = (a[..., t, :].double() * ratio).float()
            return (a, *inputs[1:])

        return hook

    for layer in sorted({layer for by_layer in factors.values() for layer in by_layer}):
        heads = heads_of(model, layers[layer])
        beyond = {h for by_layer in factors.values() for h in by_layer.get(layer, {})}
        if max(beyond) >= heads.count:
            raise ValueError(f"layer {layer} has {heads.count} heads, not a head {max(beyond)}")
        yield heads.projection, hook_of(layer, heads.count, heads.width)


def _first(output: Any) -> Tensor:
    found = output[0] if isinstance(output, tuple) else output
    assert isinstance(found, Tensor)
    return found


# -- whole texts -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Steered:
    """A text under a policy.

    Attributes:
        logprobs: ``[T, vocabulary] float32``; row ``t`` is the distribution of token ``t + 1``.
        gates: what each gate came to, by name.
        probe_scores: the score of each gate's probe at every position, ``[T] float64``, by the
            gate's name.
    """

    logprobs: Tensor
    gates: dict[str, GateResult]
    probe_scores: dict[str, Tensor]


@torch.no_grad()
def steered(
    model: Any,
    policy: Policy | None,
    store: Store,
    token_ids: Sequence[int],
    num_prompt_tokens: int,
    strength: float = 1.0,
    *,
    tokenizer: Any = None,
    texts: Sequence[str] | None = None,
    thinking: tuple[str, str] | None = None,
) -> Steered:
    """A text, teacher-forced under a policy.

    One pass over all of it, unless a gate is decided on the way for all that follows: then a pass
    up to each such token, over the keys and values of those before.

    Args:
        model: a Hugging Face causal language model in float32 and evaluation mode.
        policy: ``None`` for no steering.
        store: where the policy's artefacts are.
        token_ids: prompt and answer, ``T`` tokens.
        num_prompt_tokens: how many of them are the prompt.
        strength: the request's.
        tokenizer: tells ``texts`` where those are not given.
        texts: what each token decodes to by itself.
        thinking: the markers at which thinking starts and ends; needed, with one of the two above,
            by policies that tell thinking from answering.

    Raises:
        ValueError: as for :func:`steering`.
    """
    if texts is None and tokenizer is not None:
        texts = token_texts(tokenizer, token_ids)
    ids = torch.tensor([list(token_ids)], device=model.device)
    done = 0
    rows = []
    with steering(
        model,
        policy,
        store,
        num_prompt_tokens=num_prompt_tokens,
        strength=strength,
        first_position=lambda: done,
        texts=texts,
        thinking=thinking,
    ) as now:
        ends = [p + 1 for p in range(len(token_ids) - 1) if now.latches(p)] + [len(token_ids)]
        cached: dict[str, Any] = {}
        for end in ends:
            output = model(input_ids=ids[:, done:end], use_cache=len(ends) > 1, **cached)
            if len(ends) > 1:
                cached = {"past_key_values": output.past_key_values}
            rows.append(output.logits[0])
            done = end
        return Steered(
            torch.cat(rows).float().log_softmax(-1),
            now.results(),
            {
                name: torch.tensor([read[p] for p in sorted(read)], dtype=torch.float64)
                for name, read in now.scores.items()
            },
        )


def steered_logprobs(
    model: Any,
    policy: Policy | None,
    store: Store,
    token_ids: Sequence[int],
    num_prompt_tokens: int,
    strength: float = 1.0,
    *,
    tokenizer: Any = None,
    texts: Sequence[str] | None = None,
    thinking: tuple[str, str] | None = None,
) -> Tensor:
    """The log-probabilities of :func:`steered`: ``[T, vocabulary] float32``."""
    return steered(
        model,
        policy,
        store,
        token_ids,
        num_prompt_tokens,
        strength,
        tokenizer=tokenizer,
        texts=texts,
        thinking=thinking,
    ).logprobs


def answer_logprobs(
    model: Any,
    policy: Policy | None,
    store: Store,
    prompt_ids: Sequence[int],
    answer_ids: Sequence[int],
    strength: float = 1.0,
    *,
    tokenizer: Any = None,
    thinking: tuple[str, str] | None = None,
) -> Tensor:
    """The log-probability of each token of an answer under a policy: ``[len(answer_ids)]``."""
    text = [*prompt_ids, *answer_ids]
    rows = steered_logprobs(
        model,
        policy,
        store,
        text,
        len(prompt_ids),
        strength,
        tokenizer=tokenizer,
        thinking=thinking,
    )
    predicting = rows[len(prompt_ids) - 1 : -1]
    chosen = torch.tensor(list(answer_ids), device=rows.device)
    return predicting.gather(1, chosen[:, None])[:, 0]


def probe_scores(
    model: Any,
    policy: Policy | None,
    store: Store,
    probe: str,
    token_ids: Sequence[int],
    num_prompt_tokens: int,
    strength: float = 1.0,
    *,
    output: int = 0,
    tokenizer: Any = None,
    texts: Sequence[str] | None = None,
    thinking: tuple[str, str] | None = None,
) -> Tensor:
    """The score of a probe at every position of a text under a policy, which need not name it.

    Args:
        probe: a reference of a stored probe.
        output: which of its outputs.
        model, policy, store, token_ids, num_prompt_tokens, strength, tokenizer, texts, thinking: as
            for :func:`steered`.

    Returns:
        ``[T] float64``, read before the edits of the probe's layer.
    """
    scores: list[Tensor] = []
    with reading(model, store.load_probe(probe), output, scores.append):
        steered(
            model,
            policy,
            store,
            token_ids,
            num_prompt_tokens,
            strength,
            tokenizer=tokenizer,
            texts=texts,
            thinking=thinking,
        )
    return torch.cat(scores)


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
    tokenizer: Any = None,
    thinking: tuple[str, str] | None = None,
) -> Generated:
    """The most likely token, again and again, under a policy.

    Keys and values of earlier tokens are kept, as they depend on nothing that comes later; each
    pass after the first runs over one token, whose absolute position decides its scope.

    Args:
        prompt_ids: the prompt, at least one token.
        max_new_tokens: how many tokens to make at most.
        stop_ids: tokens that end the answer; the one that does is part of it.
        tokenizer, thinking: as for :func:`steered`.
    """
    done = 0
    pending = list(prompt_ids)
    texts = None if tokenizer is None else token_texts(tokenizer, pending)
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
        texts=texts,
        thinking=thinking,
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
            if texts is not None:
                texts += token_texts(tokenizer, pending)
    return Generated(tuple(tokens), tuple(logprobs))
