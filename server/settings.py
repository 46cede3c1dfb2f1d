"""What the launcher tells the server processes.

The launcher decides everything before vLLM starts and writes it down once: a private folder with
the catalogue of policies, and one environment variable, ``TRIMTAB_SETTINGS``, that every process
vLLM starts inherits. API processes only read; so several of them cannot disagree, and a policy file
that is edited while the server starts changes nothing.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

VARIABLE: Final = "TRIMTAB_SETTINGS"
DEFAULT_RELATIVE_CEILING: Final = 1.0
DEFAULT_MAX_BODY_BYTES: Final = 32 * 1024 * 1024


@dataclass(frozen=True)
class Settings:
    """One server's settings.

    Attributes:
        folder: private to this server: the catalogue, and the reason of a failed start.
        max_body_bytes: the longest request body that is read.
        thinking: the texts that begin and end the model's thinking, where they are known.
    """

    folder: str
    max_body_bytes: int
    thinking: tuple[str, str] | None = None

    def to_environment(self) -> dict[str, str]:
        """The variables that carry the settings to the processes vLLM starts."""
        return {VARIABLE: json.dumps(asdict(self))}

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> Settings | None:
        """The settings that the launcher left, or None where it did not start this process."""
        text = environment.get(VARIABLE)
        if text is None:
            return None
        data = json.loads(text)
        thinking = data["thinking"]
        return cls(**{**data, "thinking": None if thinking is None else tuple(thinking)})

    @property
    def catalogue_path(self) -> Path:
        """The file with the policies that are served."""
        return Path(self.folder) / "catalogue.json"

    def record_failure(self, sentence: str) -> None:
        """Leave the reason why this process cannot serve, for the launcher to say last.

        The first process to fail is the one that is heard.
        """
        with (
            contextlib.suppress(FileExistsError),
            open(Path(self.folder) / "failure", "x", encoding="utf-8") as file,
        ):
            file.write(sentence)

    def recorded_failure(self) -> str | None:
        """The reason that a process left, if one did."""
        try:
            return (Path(self.folder) / "failure").read_text(encoding="utf-8")
        except FileNotFoundError:
            return None
