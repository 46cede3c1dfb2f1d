"""The queries of the board and of the rules, as the files hold them, and what they are made of."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import promql_parser
import yaml

ROOT = Path(__file__).parents[2]
BOARD = ROOT / "deploy" / "grafana" / "dashboards" / "trimtab-overview.json"
RULES = ROOT / "deploy" / "prometheus" / "rules" / "trimtab.rules.yml"
OPERATORS = {
    "MatchOp.Equal": "=",
    "MatchOp.NotEqual": "!=",
    "MatchOp.Re": "=~",
    "MatchOp.NotRe": "!~",
}


@dataclass(frozen=True)
class Query:
    """A query and where it stands: a panel's title and the target's letter, or a rule's name."""

    where: str
    expr: str

    def __str__(self) -> str:
        return self.where


@dataclass(frozen=True)
class Selector:
    """A choice of series in a query.

    Attributes:
        series: the name.
        matchers: by label, the operator and the value.
    """

    series: str
    matchers: Mapping[str, tuple[str, str]]


def board() -> dict[str, Any]:
    document: dict[str, Any] = json.loads(BOARD.read_text(encoding="utf-8"))
    return document


def panels() -> list[dict[str, Any]]:
    """The board's panels without the rows."""
    return [panel for panel in board()["panels"] if panel["type"] != "row"]


def panel_queries() -> list[Query]:
    return [
        Query(f"{panel['title']} {target['refId']}", target["expr"])
        for panel in panels()
        for target in panel["targets"]
    ]


def annotation_queries() -> list[Query]:
    return [
        Query(f"annotation {entry['name']}", entry["target"]["expr"])
        for entry in board()["annotations"]["list"]
    ]


def variable_queries() -> list[Query]:
    """What the choices at the top list: ``label_values(SELECTOR, LABEL)``."""
    return [
        Query(f"variable {entry['name']}", entry["query"]["query"])
        for entry in board()["templating"]["list"]
        if entry["type"] == "query"
    ]


def rules() -> list[dict[str, Any]]:
    document = yaml.safe_load(RULES.read_text(encoding="utf-8"))
    return [rule for group in document["groups"] for rule in group["rules"]]


def recording_rules() -> list[Query]:
    return [Query(rule["record"], rule["expr"]) for rule in rules() if "record" in rule]


def alerts() -> list[dict[str, Any]]:
    return [rule for rule in rules() if "alert" in rule]


def in_window(expr: str, window: str) -> str:
    """The query with every range of time replaced, Grafana's variable among them."""
    return re.sub(r"\[(\$__rate_interval|\d+[smhdw])\]", f"[{window}]", expr)


def with_everything_chosen(expr: str, window: str) -> str:
    """A panel's query as Grafana sends it when All is chosen everywhere."""
    return re.sub(r'"\$\w+"', '".*"', in_window(expr, window))


def values_of_variable(expr: str) -> str:
    """The query that gives one sample for each value which a choice lists when All is chosen before it."""
    match = re.fullmatch(r"label_values\((.*), (\w+)\)", expr)
    assert match is not None
    return f"group by ({match[2]}) ({with_everything_chosen(match[1], '5m')})"


def selectors(expr: str) -> list[Selector]:
    """The choices of series in a query.

    Raises:
        ValueError: the query is no PromQL.
    """
    found: list[Selector] = []

    def visit(node: promql_parser.Expr) -> None:
        if isinstance(node, promql_parser.VectorSelector):
            matchers = {m.name: (OPERATORS[str(m.op)], m.value) for m in node.matchers.matchers}
            found.append(Selector(node.name or "", matchers))

    promql_parser.walk(promql_parser.parse(in_window(expr, "5m")), visit)
    return found
