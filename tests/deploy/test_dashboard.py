"""The board: its JSON is what the code makes, its queries are PromQL, and it keeps to its conventions."""

from __future__ import annotations

import re
from typing import Any

import promql_parser
import pytest

from deploy.grafana import overview
from server.errors import STATUS
from tests.deploy.declared import DECLARED, family
from tests.deploy.queries import (
    Query,
    annotation_queries,
    board,
    in_window,
    panel_queries,
    panels,
    selectors,
    variable_queries,
    with_everything_chosen,
)

QUERIES = panel_queries() + annotation_queries()
CHOICES = ("job", "instance", "model_name", "engine", "policy", "probe")
by_place = pytest.mark.parametrize("query", QUERIES, ids=str)
by_panel = pytest.mark.parametrize("panel", panels(), ids=lambda panel: panel["title"])


# --- the file


def test_the_file_is_what_the_code_makes() -> None:
    assert overview.OUTPUT.read_text(encoding="utf-8") == overview.text()


@pytest.mark.parametrize("found", [None, "{}\n"])
def test_another_file_is_reported_in_a_sentence(
    found: str | None, tmp_path: Any, monkeypatch: Any, capsys: Any
) -> None:
    file = tmp_path / "trimtab-overview.json"
    if found is not None:
        file.write_text(found)
    monkeypatch.setattr(overview, "OUTPUT", file)
    assert overview.main(["--check"]) == 1
    assert "run `make dashboards`" in capsys.readouterr().err
    assert overview.main([]) == 0
    assert overview.main(["--check"]) == 0


# --- the board


def test_the_board_keeps_to_the_conventions() -> None:
    document = board()
    assert document["uid"] == "trimtab-overview"
    assert document["title"] == "Trimtab / Overview"
    assert document["tags"] == ["trimtab"]
    assert document["refresh"] == "30s"
    assert document["time"] == {"from": "now-1h", "to": "now"}
    assert document["graphTooltip"] == 1
    assert document["editable"] is False
    assert document["schemaVersion"] == 39
    (link,) = document["links"]
    assert (link["type"], link["tags"]) == ("dashboards", ["vllm"])
    assert link["keepTime"]
    assert link["includeVars"]
    identities = [panel["id"] for panel in document["panels"]]
    assert len(set(identities)) == len(identities)


def test_the_choices_come_in_order_and_each_is_narrowed_by_those_before() -> None:
    datasource, *chosen = board()["templating"]["list"]
    assert (datasource["name"], datasource["type"]) == ("datasource", "datasource")
    assert datasource["query"] == "prometheus"
    assert [entry["name"] for entry in chosen] == [
        "job",
        "model_name",
        "instance",
        "engine",
        "policy",
        "probe",
    ]
    for entry, query in zip(chosen, variable_queries(), strict=True):
        assert entry["multi"]
        assert entry["includeAll"]
        assert entry["allValue"] == ".*"
        assert entry["datasource"]["uid"] == "${datasource}"
        match = re.fullmatch(r"label_values\((.*), (\w+)\)", query.expr)
        assert match is not None
        (selector,) = selectors(match[1])
        name = family(selector.series)
        assert name is not None
        assert match[2] == entry["name"]
        assert match[2] in (*DECLARED[name].labels, "job", "instance")
        for label, matcher in selector.matchers.items():
            assert matcher == ("=~", f"${label}")


def test_panels_lie_side_by_side_and_fill_their_rows() -> None:
    covered: set[tuple[int, int]] = set()
    for panel in board()["panels"]:
        place = panel["gridPos"]
        cells = {
            (place["x"] + right, place["y"] + down)
            for right in range(place["w"])
            for down in range(place["h"])
        }
        assert max(x for x, _ in cells) < 24
        assert not cells & covered, panel["title"]
        covered |= cells
    height = max(y for _, y in covered) + 1
    assert len(covered) == 24 * height


# --- panels


@by_panel
def test_every_panel_says_what_it_shows_in_which_unit_and_of_which_metric(
    panel: dict[str, Any],
) -> None:
    assert panel["title"]
    match = re.fullmatch(r"([A-Z].*\.) Metric: ((?:`\w+`(?:, )?)+)", panel["description"])
    assert match is not None, panel["description"]
    named = set(re.findall(r"`(\w+)`", match[2]))
    used = {
        family(selector.series) or selector.series
        for target in panel["targets"]
        for selector in selectors(target["expr"])
    }
    assert named == used
    assert panel["fieldConfig"]["defaults"]["unit"]
    assert panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
    for target in panel["targets"]:
        assert target["datasource"] == panel["datasource"]
    letters = [target["refId"] for target in panel["targets"]]
    assert len(set(letters)) == len(letters)


def test_titles_are_unique_because_alerts_name_them() -> None:
    titles = [panel["title"] for panel in panels()]
    assert len(set(titles)) == len(titles)


# --- queries


@by_place
def test_every_query_is_promql(query: Query) -> None:
    promql_parser.parse(with_everything_chosen(query.expr, "5m"))
    assert "$" not in with_everything_chosen(query.expr, "5m")


@by_place
def test_every_window_is_grafanas(query: Query) -> None:
    assert set(re.findall(r"\[([^\]]*)\]", query.expr)) <= {"$__rate_interval"}


@by_place
def test_every_query_follows_the_choices_as_far_as_its_metric_has_the_labels(query: Query) -> None:
    found = selectors(query.expr)
    assert found
    for selector in found:
        if selector.series == "up":
            labels: tuple[str, ...] = ("job", "instance")
        else:
            name = family(selector.series)
            assert name is not None, f"{selector.series} is not declared"
            labels = ("job", "instance", *DECLARED[name].labels)
        for choice in CHOICES:
            expected = ("=~", f"${choice}") if choice in labels else None
            assert selector.matchers.get(choice) == expected, (selector.series, choice)
        for label in selector.matchers:
            assert label in (*labels, "le"), (selector.series, label)


@by_place
def test_counters_are_never_shown_as_they_are(query: Query) -> None:
    """Every counter and every series of a histogram stands in a rate or an increase."""
    counting = [
        s.series
        for s in selectors(query.expr)
        if (name := family(s.series)) and DECLARED[name].kind != "gauge"
    ]
    wrapped = re.findall(r"(?:rate|increase)\((\w+)", query.expr)
    assert sorted(counting) == sorted(wrapped)


def test_the_refusals_that_count_are_those_that_are_the_servers_doing() -> None:
    (listed,) = re.findall(r'reason=~"([^"]*)"', overview.NOT_STEERED)
    assert set(listed.split("|")) == {c for c, status in STATUS.items() if status in (429, 503)}


# --- that the checks above see anything


@pytest.mark.parametrize(
    "broken",
    ["sum(rate(x[5m])", "rate(x)", "histogram_quantile(0.9)", "sum by (le) rate(x[5m])"],
)
def test_what_is_no_promql_is_found(broken: str) -> None:
    with pytest.raises(ValueError):  # noqa: PT011 - the parser has no error of its own
        promql_parser.parse(in_window(broken, "5m"))


def test_a_metric_that_nobody_declared_is_found() -> None:
    assert family("trimtab_probe_score") is None, "a histogram has no series of its own name"
    assert family("trimtab_probe_score_bucket") == "trimtab_probe_score"
    assert family("trimtab_slots_count") is None
    assert family("trimtab_slot") is None
