"""Policies kept as a folder of YAML files.

One file holds one policy. A folder is taken whole or not at all: every fault of every file is
reported together, and a server does not start on half of its policies. An empty folder is valid and
gives no policies; a request that names one is then refused, so nothing goes unsteered unnoticed.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Final

from directions.card import ModelFingerprint
from directions.errors import TrimtabError
from directions.store import Store
from steering.plan import Plan, compile_policy, fingerprint_warnings
from steering.policy import Policy, parse_policy
from steering.policy_document import MAX_BYTES, read_document
from steering.policy_errors import PolicyError, PolicyErrors

SUFFIXES: Final = frozenset({".yaml", ".yml"})

logger = logging.getLogger("trimtab.policies")


def read_policy(text: str | bytes) -> Policy:
    """The policy that a YAML or JSON document states.

    Raises:
        PolicyErrors: every fault, with its line; see :func:`steering.policy_document.
            read_document` and :func:`steering.policy.parse_policy` for the codes, and
            ``E_POLICY_DUPLICATE_KEY`` for a key given twice.
    """
    document = read_document(text)
    try:
        policy = parse_policy(document.data)
    except PolicyErrors as error:
        found = [replace(fault, line=document.line(fault.path)) for fault in error.errors]
        both = [*document.errors, *found]
        raise PolicyErrors(sorted(both, key=lambda fault: fault.line or 0)) from None
    if document.errors:
        raise PolicyErrors(replace(fault, policy=policy.name) for fault in document.errors)
    return policy


def read_policy_file(path: Path) -> Policy:
    """The policy that the file at ``path`` states.

    Raises:
        PolicyErrors: as :func:`read_policy`, each fault with the file, and ``E_POLICY_FILE`` for
            what is not a file that can be read.
    """
    try:
        # Not everything that can be opened should be: a named pipe would wait for ever.
        if not path.is_file():
            reason = "not a regular file" if path.exists() else "no such file"
            raise PolicyErrors([PolicyError("E_POLICY_FILE", reason, file=str(path))])
        with path.open("rb") as stream:
            text = stream.read(MAX_BYTES + 1)
    except OSError as error:
        reason = f"cannot be read: {error.strerror or error}"
        raise PolicyErrors([PolicyError("E_POLICY_FILE", reason, file=str(path))]) from None
    try:
        return read_policy(text)
    except PolicyErrors as error:
        raise error.located(file=str(path)) from None


def policy_paths(folder: Path) -> list[Path]:
    """The policy files of a folder: ``*.yaml`` and ``*.yml``, not hidden, sorted; no subfolders.

    Raises:
        PolicyErrors: ``E_POLICY_FOLDER`` for what is not a folder that can be read.
    """
    try:
        found = sorted(folder.iterdir())
    except OSError as error:
        reason = f"not a folder of policies: {error.strerror or error}"
        raise PolicyErrors([PolicyError("E_POLICY_FOLDER", reason, file=str(folder))]) from None
    return [p for p in found if p.suffix.lower() in SUFFIXES and not p.name.startswith(".")]


def check_policy_files(
    paths: Iterable[Path],
) -> tuple[dict[Path, Policy], tuple[PolicyError, ...]]:
    """The policies of the files that are valid, in order, and every fault of the others.

    Two files that state a policy of the same name, be the versions equal or not, are a fault of the
    second: ``E_POLICY_DUPLICATE_NAME``.
    """
    policies: dict[Path, Policy] = {}
    first: dict[str, Path] = {}
    errors: list[PolicyError] = []
    for path in paths:
        try:
            policy = read_policy_file(path)
        except PolicyErrors as error:
            errors.extend(error.errors)
            continue
        if policy.name in first:
            message = f"the name {policy.name} is taken by {first[policy.name]}; one file a name"
            errors.append(
                PolicyError(
                    "E_POLICY_DUPLICATE_NAME",
                    message,
                    ("name",),
                    policy=policy.name,
                    file=str(path),
                )
            )
            continue
        first[policy.name] = path
        policies[path] = policy
    return policies, tuple(errors)


def load_policies(folder: Path | str) -> dict[str, Policy]:
    """All policies of a folder, by name, in the order of their files.

    Raises:
        PolicyErrors: every fault of the folder and its files.
    """
    policies, errors = check_policy_files(policy_paths(Path(folder)))
    if errors:
        raise PolicyErrors(errors)
    return {policy.name: policy for policy in policies.values()}


def compile_policies(
    policies: Mapping[str, Policy],
    store: Store,
    model: ModelFingerprint,
    *,
    relative_ceiling: float = 1.0,
    thinking: tuple[str, str] | None = None,
) -> dict[str, Plan]:
    """A plan for each policy, whatever its mode, by the keys of ``policies``.

    What does not forbid serving, e.g. a direction made with other weights, is logged.

    Raises:
        PolicyErrors: every fault of every policy; see :func:`steering.plan.compile_policy`.
    """
    plans: dict[str, Plan] = {}
    errors: list[PolicyError] = []
    for key, policy in policies.items():
        try:
            plans[key] = compile_policy(
                policy, store, model, relative_ceiling=relative_ceiling, thinking=thinking
            )
        except PolicyErrors as error:
            errors.extend(error.errors)
            continue
        for warning in fingerprint_warnings(policy, store, model):
            logger.warning("%s", warning)
    if errors:
        raise PolicyErrors(errors)
    return plans


def unresolved_artefacts(policy: Policy, store: Store) -> tuple[PolicyError, ...]:
    """The artefacts that ``policy`` names and ``store`` cannot load, as faults of the policy."""
    errors: list[PolicyError] = []
    for named in policy.artefacts:
        try:
            named.model(store)
        except TrimtabError as error:
            errors.append(
                PolicyError(
                    error.code, error.message, named.path, error.expected, policy=policy.name
                )
            )
    return tuple(errors)
