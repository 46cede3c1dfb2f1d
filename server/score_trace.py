"""One answer with a probe's score beside each of its tokens.

Positions are absolute, from the first token of the prompt. With *P* prompt tokens the answer's
tokens stand at *P*, *P* + 1, …; a token's score is what the probe reads at the token's own position,
when the token goes into the model to predict the next one. The last token of an answer never goes
in, so it has none.
"""

from __future__ import annotations

import codecs
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Final

from directions.errors import TrimtabError
from server.printable import printable
from server.steering_answers import PhaseRun, ProbeReport, SteeringReport, Summary, read_answer
from server.steering_client import ServerFailedError

UNIT: Final = (0.0, 1.0)
SIGNED: Final = (-1.0, 1.0)


@dataclass(frozen=True)
class Token:
    """One generated token.

    Attributes:
        text: what it adds to the answer's text; empty for the first part of a character that spans
            several tokens, all of which is the text of the token that completes it.
        position: where it stands.
        phase: ``thinking``, ``think_end`` or ``answer``; None where it was not read.
        score: the probe's score there; None where it was not read.
    """

    text: str
    position: int
    phase: str | None
    score: float | None


@dataclass(frozen=True)
class ScoreTrace:
    """One answer, and what one probe read on the way.

    Attributes:
        model: the name the request was made with.
        report: the ``steering`` object.
        probe: the key of the probe whose scores these are.
        prompt_end: position of the prompt's last token, *P* - 1.
        tokens: the generated tokens; empty where the server gave no texts.
        text: the answer as the API gives it, its thinking first.
        finish_reason: why it ended.
    """

    model: str
    report: SteeringReport
    probe: str
    prompt_end: int
    tokens: tuple[Token, ...]
    text: str
    finish_reason: str | None

    @property
    def summary(self) -> Summary:
        """The probe's figures."""
        return self.report.probes[self.probe]

    @property
    def scores(self) -> list[tuple[int, float]]:
        """Position and score of each token that was read, ascending."""
        return self.report.probes[self.probe].trace

    @property
    def phases(self) -> list[PhaseRun]:
        """Phase, first and last position of each run of tokens that was read."""
        return self.report.phases

    @property
    def span(self) -> tuple[float, float]:
        """The least and the greatest score that there can be."""
        return span_of([score for _, score in self.scores])

    @property
    def title(self) -> str:
        """The model with the policy that the answer reports, ``smollm2@guard@7``."""
        name = self.report.policy.partition("@")[0]
        model = self.model.removesuffix(f"@{self.report.policy}").removesuffix(f"@{name}")
        return f"{model}@{self.report.policy}"


def span_of(scores: Sequence[float]) -> tuple[float, float]:
    """The range that scores are shown on: 0 to 1, or -1 to 1 where one of them is negative.

    An answer does not say which kind of read-out a probe has, and only that of a cosine gives
    negative scores.
    """
    return SIGNED if any(score < 0 for score in scores) else UNIT


def read_trace(answer: Mapping[str, Any], model: str, probe: str | None = None) -> ScoreTrace:
    """The first choice of an answer of ``/v1/chat/completions`` with its scores.

    Args:
        answer: the parsed JSON.
        model: the name the request was made with.
        probe: the key of a probe, or its name without the version; the first if None.

    Raises:
        TrimtabError: ``E_NOT_TRIMTAB`` where nothing is said about steering, ``E_NO_PROBES`` where
            nothing was read, ``E_PROBE_UNKNOWN``.
        ServerFailedError: ``E_SERVER_ANSWER`` where the answer has another form.
    """
    choices = answer.get("choices")
    choice = choices[0] if isinstance(choices, list) and choices else None
    if not isinstance(choice, dict):
        message = "the server's answer has no choice"
        raise ServerFailedError("E_SERVER_ANSWER", message, field="$.choices")
    steering = choice.get("steering")
    if steering is None:
        raise TrimtabError(
            "E_NOT_TRIMTAB",
            "the server answers without a word on steering: it is no Trimtab server",
            field="--url",
            expected="the address of a `trimtab serve` that reads probes",
        )
    if not isinstance(steering, dict):
        message = "'steering' is no object"
        raise ServerFailedError("E_SERVER_ANSWER", message, field="$.choices[0].steering")
    report = read_answer(SteeringReport, steering, "$.choices[0].steering")
    key = _probe_key(report.probes, probe)
    if any(a >= b for (a, _), (b, _) in pairwise(report.probes[key].trace)):
        raise ServerFailedError(
            "E_SERVER_ANSWER",
            "the positions of the scores do not ascend",
            field=f"$.choices[0].steering.probes[{key!r}].trace",
        )
    prompt_end = _prompt_end(report, key, answer.get("usage"))
    texts = token_texts(_logprobs(choice))
    scores = dict(report.probes[key].trace)
    first = prompt_end + 1
    tokens = tuple(
        Token(text, position, _phase_at(report.phases, position), scores.get(position))
        for position, text in enumerate(texts, start=first)
    )
    reason = choice.get("finish_reason")
    return ScoreTrace(
        model=model,
        report=report,
        probe=key,
        prompt_end=prompt_end,
        tokens=tokens,
        text=_message_text(choice.get("message")),
        finish_reason=reason if isinstance(reason, str) else None,
    )


def token_texts(content: Sequence[Mapping[str, Any]]) -> list[str]:
    """What each token adds to the text.

    A character may span several tokens. Its bytes are joined, and it counts for the token that
    completes it. What never becomes a character is shown as one replacement character.

    Args:
        content: ``logprobs.content`` of a choice: ``token``, and ``bytes`` where known.
    """
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    texts = []
    for entry in content:
        data = entry.get("bytes")
        token = entry.get("token")
        if isinstance(data, list) and all(isinstance(b, int) and 0 <= b < 256 for b in data):
            texts.append(decoder.decode(bytes(data)))
        else:
            # An unfinished character before it ends here.
            unfinished = decoder.decode(b"", final=True)
            texts.append(unfinished + (token if isinstance(token, str) else ""))
    unfinished = decoder.decode(b"", final=True)
    if unfinished:
        texts[-1] += unfinished
    return texts


def _probe_key(probes: Mapping[str, ProbeReport], wanted: str | None) -> str:
    if not probes:
        raise TrimtabError(
            "E_NO_PROBES",
            "the server read no probe for this answer",
            field="--url",
            expected="a server that reads probes",
        )
    if wanted is None or wanted in probes:
        return wanted or next(iter(probes))
    # As metrics name it: refusal for refusal@2, harm/odd for harm@1/odd.
    found = [key for key in probes if _without_version(key) == wanted]
    if len(found) == 1:
        return found[0]
    raise TrimtabError(
        "E_PROBE_UNKNOWN",
        f"no probe of this answer is called {wanted!r}",
        field="--probe",
        expected=printable(", ".join(probes)),
    )


def _without_version(key: str) -> str:
    name, _, output = key.partition("/")
    return name.partition("@")[0] + (f"/{output}" if output else "")


def _prompt_end(report: SteeringReport, key: str, usage: object) -> int:
    """Position of the prompt's last token, from the best source that there is."""
    for phase, _, last in report.phases:
        if phase == "prompt_end":
            return last
    prompt_tokens = usage.get("prompt_tokens") if isinstance(usage, dict) else None
    if isinstance(prompt_tokens, int) and prompt_tokens > 0:
        return prompt_tokens - 1
    if report.probes[key].trace:
        return report.probes[key].trace[0][0]
    raise ServerFailedError(
        "E_SERVER_ANSWER",
        "the server's answer does not say where the prompt ends",
        field="$.choices[0].steering.phases",
    )


def _phase_at(phases: Sequence[PhaseRun], position: int) -> str | None:
    return next((phase for phase, first, last in phases if first <= position <= last), None)


def _logprobs(choice: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    logprobs = choice.get("logprobs")
    content = logprobs.get("content") if isinstance(logprobs, dict) else None
    if not isinstance(content, list):
        return []
    return [entry if isinstance(entry, dict) else {} for entry in content]


def _message_text(message: object) -> str:
    if not isinstance(message, dict):
        return ""
    # vLLM has had both names for what a reasoning parser takes out of the content.
    thought = message.get("reasoning") or message.get("reasoning_content")
    parts = [thought, message.get("content")]
    return "\n\n".join(part for part in parts if isinstance(part, str) and part)
