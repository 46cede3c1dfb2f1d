"""Policies with plans made by hand: what the HTTP layer needs of them is their names and modes."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any

import pytest

from server.catalogue import Catalogue, Entry
from steering.plan import Plan, Row, Term
from steering.policy import parse_policy

MakeEntry = Callable[..., Entry]


def make_entry(name: str, *, edits: bool = True, **keys: Any) -> Entry:
    """An entry for a policy that adds one direction at layer 1, unless ``edits`` is false."""
    add = {"direction": "north@1", "layers": 1, "strength": 1.0}
    policy = parse_policy(
        {
            "apiVersion": "trimtab/v1",
            "kind": "Policy",
            "name": name,
            "edits": {"turn": {"add": add}} if edits else {},
            **keys,
        }
    )
    # A direction of each policy's own, so that their plans differ.
    direction = hashlib.sha256(name.encode()).hexdigest()
    return Entry(policy, Plan.everywhere(Row((Term(direction, ((1, 1.0),)),) if edits else ())))


@pytest.fixture
def catalogue() -> Catalogue:
    """guard@3 (strength 0 to 2), kind (open), watch (shadow), still (mode off); no default."""
    return Catalogue.of(
        [
            make_entry("guard", version=3, strengthRange=[0.0, 2.0]),
            make_entry("kind", onFailure="open"),
            make_entry("watch", mode="shadow"),
            make_entry("still", mode="off"),
        ]
    )
