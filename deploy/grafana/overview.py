"""The board "Trimtab / Overview", built from code: ``python -m deploy.grafana.overview``.

The JSON that Grafana loads is made here and never edited by hand; ``--check`` says whether the file
is what this code makes. Queries stand on the server's own metrics and not on recording rules, so
the board works with any Prometheus that scrapes the server.

Every query is narrowed by the choices at the top of the board, as far as its metric has the labels.
Counters of choices have the label ``engine``, counters of requests do not: a request is counted
by the API process, which may have spread it over several engines.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Final

from grafana_foundation_sdk.builders import dashboard
from grafana_foundation_sdk.builders import prometheus as query
from grafana_foundation_sdk.cog.builder import Builder
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models import dashboard as model

from deploy.grafana.panels import DATASOURCE, facts, heat_map, lines, tile

Panels = list[Builder[model.Panel]]

OUTPUT: Final = Path(__file__).parent / "dashboards" / "trimtab-overview.json"
UID: Final = "trimtab-overview"
SCHEMA_VERSION: Final = 39
"""That of Grafana 10.4, the oldest that the board is for; newer ones bring it up to date."""

SERVER: Final = 'job=~"$job", instance=~"$instance"'
MODEL: Final = f'{SERVER}, model_name=~"$model_name"'
REQUEST: Final = f'{MODEL}, policy=~"$policy"'
ENGINE: Final = f'{MODEL}, engine=~"$engine"'
EDIT: Final = f'{ENGINE}, policy=~"$policy"'
PROBE: Final = f'{EDIT}, probe=~"$probe"'

WINDOW: Final = "[$__rate_interval]"
NOT_STEERED: Final = (
    'outcome="refused", reason=~"E_SLOTS_EXHAUSTED|E_PLAN_NOT_PLACED|E_PLAN_INACTIVE|E_NOT_READY"'
)
"""Refusals that are the server's doing; all others are the client's."""
UNSTEERED: Final = 'mode="enforce", outcome="ok", reason!="", reason!~"strength_zero|no_edits"'
"""Answers that an ``open`` policy should have steered and did not."""


def rate(metric: str, labels: str, by: str = "") -> str:
    """Events per second, added up over what ``by`` does not name."""
    aggregate = f"sum by ({by}) " if by else "sum"
    return f"{aggregate}(rate({metric}{{{labels}}}{WINDOW}))"


def share(part: str, whole: str) -> str:
    """A part of a whole; nothing where the whole is nothing."""
    return f"{part} / ({whole} > 0)"


def share_or_none(part: str, whole: str) -> str:
    """:func:`share` of a part whose series may not exist yet, because it has never occurred."""
    return share(f"({part} or vector(0))", whole)


def quantile(q: float, metric: str, labels: str, by: str = "") -> str:
    """A quantile of a histogram."""
    buckets = rate(f"{metric}_bucket", labels, f"{by}, le" if by else "le")
    return f"histogram_quantile({q}, {buckets})"


def over_half(by: str = "") -> str:
    """The share of cliffs that are greater than 0.5, which is a bucket's bound."""
    within = rate("trimtab_refusal_cliff_bucket", f'{PROBE}, le="0.5"', by)
    return f"1 - {share(within, rate('trimtab_refusal_cliff_count', PROBE, by))}"


def variables() -> list[dashboard.QueryVariable | dashboard.DatasourceVariable]:
    """The choices at the top of the board, each narrowed by those before it."""
    chosen = 'job=~"$job"'
    named = f'{chosen}, model_name=~"$model_name"'
    placed = f'{named}, instance=~"$instance"'
    # Slots and the overhead of steps are there from the start; the others with the first request.
    sources = [
        ("job", "Job", "trimtab_slots, job"),
        ("model_name", "Model", f"trimtab_slots{{{chosen}}}, model_name"),
        ("instance", "Instance", f"trimtab_slots{{{named}}}, instance"),
        ("engine", "Engine", f"trimtab_engine_step_overhead_seconds_count{{{placed}}}, engine"),
        ("policy", "Policy", f"trimtab_requests_total{{{placed}}}, policy"),
        ("probe", "Probe", f"trimtab_probe_tokens_total{{{placed}}}, probe"),
    ]
    everything = model.VariableOption(selected=True, text=["All"], value=["$__all"])
    return [
        dashboard.DatasourceVariable("datasource").label("Data source").type("prometheus"),
        *(
            dashboard.QueryVariable(name)
            .label(label)
            .datasource(DATASOURCE)
            .query({"query": f"label_values({source})", "refId": f"variable-{name}"})
            .definition(f"label_values({source})")
            .refresh(model.VariableRefresh.ON_TIME_RANGE_CHANGED)
            .sort(model.VariableSort.ALPHABETICAL_ASC)
            .multi(True)
            .include_all(True)
            # All is whatever there is, also what appears after the board was loaded.
            .all_value(".*")
            .current(everything)
            for name, label, source in sources
        ),
    ]


def at_a_glance() -> Panels:
    requests = rate("trimtab_requests_total", REQUEST)
    scores = rate("trimtab_probe_tokens_total", PROBE)
    missing = rate("trimtab_probe_tokens_missing_total", PROBE)
    return [
        tile(
            "Unreachable servers",
            "Targets of the chosen jobs that Prometheus cannot scrape.",
            "up",
            expr=f"count(up{{{SERVER}}} == 0) or vector(0)",
            unit="short",
            steps={None: "green", 1: "red"},
        ),
        tile(
            "Requests",
            "Requests that finished, whatever became of them.",
            "trimtab_requests_total",
            expr=requests,
            unit="reqps",
        ),
        tile(
            "Refused for want of steering",
            "Share of requests that were refused because their policy could not be applied.",
            "trimtab_requests_total",
            expr=share_or_none(
                rate("trimtab_requests_total", f"{REQUEST}, {NOT_STEERED}"), requests
            ),
            unit="percentunit",
            steps={None: "green", 0.001: "orange", 0.02: "red"},
        ),
        tile(
            "Answered unsteered",
            "Share of requests that an open policy should have steered and that were answered without it.",
            "trimtab_requests_total",
            expr=share_or_none(rate("trimtab_requests_total", f"{REQUEST}, {UNSTEERED}"), requests),
            unit="percentunit",
            steps={None: "green", 0.001: "orange", 0.01: "red"},
        ),
        tile(
            "Cliffs over 0.5",
            "Share of answers with thinking in which the probe's score fell by more than 0.5 at its end.",
            "trimtab_refusal_cliff",
            expr=over_half(),
            unit="percentunit",
        ),
        tile(
            "Scores missing",
            "Share of scores that finished answers should have and did not get.",
            "trimtab_probe_tokens_missing_total",
            "trimtab_probe_tokens_total",
            expr=share_or_none(missing, f"(({scores} or vector(0)) + ({missing} or vector(0)))"),
            unit="percentunit",
            steps={None: "green", 0.0001: "orange", 0.01: "red"},
        ),
        tile(
            "Step overhead, p99",
            "Host time that Trimtab spends in an engine step; one step in a hundred takes longer.",
            "trimtab_engine_step_overhead_seconds",
            expr=quantile(0.99, "trimtab_engine_step_overhead_seconds", ENGINE),
            unit="s",
            steps={None: "green", 0.002: "orange", 0.005: "red"},
        ),
        tile(
            "Slots in use",
            "Share of the engines' slots that running requests use; when none is free, requests for "
            "other policies are refused.",
            "trimtab_slots",
            expr=share(
                f'sum(trimtab_slots{{{MODEL}, state="in_use"}})', f"sum(trimtab_slots{{{MODEL}}})"
            ),
            unit="percentunit",
            steps={None: "green", 0.7: "orange", 0.95: "red"},
        ),
    ]


def traffic() -> Panels:
    return [
        lines(
            "Requests by policy",
            "Requests that finished, by the policy that they ran under and its mode.",
            "trimtab_requests_total",
            exprs={
                "{{policy}} ({{mode}})": rate("trimtab_requests_total", REQUEST, "policy, mode")
            },
            unit="reqps",
            stacked=True,
        ),
        lines(
            "Requests by outcome",
            "What became of requests: ok, refused, error (vLLM's own) or aborted (the client went away).",
            "trimtab_requests_total",
            exprs={"{{outcome}}": rate("trimtab_requests_total", REQUEST, "outcome")},
            unit="reqps",
            stacked=True,
        ),
        lines(
            "Refusals and errors by reason",
            "Requests that failed, by the code of the refusal or the status of vLLM's error.",
            "trimtab_requests_total",
            exprs={
                "{{policy}}: {{outcome}} {{reason}}": rate(
                    "trimtab_requests_total",
                    f'{REQUEST}, outcome=~"refused|error"',
                    "policy, outcome, reason",
                )
            },
            unit="reqps",
        ),
        lines(
            "Unsteered answers by reason",
            "Requests under an enforce policy that were answered without it, and why.",
            "trimtab_requests_total",
            exprs={
                "{{policy}}: {{reason}}": rate(
                    "trimtab_requests_total",
                    f'{REQUEST}, mode="enforce", outcome="ok", reason!=""',
                    "policy, reason",
                )
            },
            unit="reqps",
        ),
    ]


def scores() -> Panels:
    by_phase = "probe, phase"
    return [
        heat_map(
            "Token scores",
            "Scores of generated tokens; choose one probe at the top, scores of several mean different things.",
            "trimtab_probe_token_score",
            expr=f"sum by (le) (increase(trimtab_probe_token_score_bucket{{{PROBE}}}{WINDOW}))",
            axis="score",
        ),
        lines(
            "Score quantiles by phase",
            "Scores of answers: at the prompt's end, of the thinking's plateau, of its end and of the answer.",
            "trimtab_probe_score",
            exprs={
                f"{{{{probe}}}} {{{{phase}}}} {name}": quantile(
                    q, "trimtab_probe_score", PROBE, by_phase
                )
                for name, q in (("p10", 0.1), ("p50", 0.5), ("p90", 0.9))
            },
            unit="none",
            ceiling=1,
            exemplars=True,
        ),
        lines(
            "Mean score at the prompt's end by policy",
            "The mean that the alerts on drift watch. It moves with the prompts that come in, the "
            "probe and the model.",
            "trimtab_probe_score",
            exprs={
                "{{probe}} {{policy}} ({{variant}})": share(
                    rate(
                        "trimtab_probe_score_sum",
                        f'{PROBE}, phase="prompt_end"',
                        "probe, policy, variant",
                    ),
                    rate(
                        "trimtab_probe_score_count",
                        f'{PROBE}, phase="prompt_end"',
                        "probe, policy, variant",
                    ),
                )
            },
            unit="none",
            ceiling=1,
        ),
        lines(
            "Scores above the card's threshold",
            "Share of scores above the threshold of the probe's card, counted exactly; only probes with one.",
            "trimtab_probe_decisions_total",
            exprs={
                "{{probe}} {{phase}}": share(
                    rate("trimtab_probe_decisions_total", f'{PROBE}, decision="above"', by_phase),
                    rate("trimtab_probe_decisions_total", PROBE, by_phase),
                )
            },
            unit="percentunit",
            ceiling=1,
        ),
    ]


def cliffs() -> Panels:
    return [
        heat_map(
            "Cliffs",
            "How far the score fell from the thinking's plateau to its end, of answers with thinking.",
            "trimtab_refusal_cliff",
            expr=f"sum by (le) (increase(trimtab_refusal_cliff_bucket{{{PROBE}}}{WINDOW}))",
            axis="plateau − final",
        ),
        lines(
            "Share of cliffs over 0.5",
            "Share of answers with thinking whose score fell by more than 0.5, by policy.",
            "trimtab_refusal_cliff",
            exprs={"{{probe}} {{policy}} ({{variant}})": over_half("probe, policy, variant")},
            unit="percentunit",
            ceiling=1,
        ),
    ]


def steering() -> Panels:
    return [
        lines(
            "Gate decisions",
            "What the gates of policies came to, once for each choice and gate.",
            "trimtab_gate_decisions_total",
            exprs={
                "{{policy}} {{gate}}: {{decision}}": rate(
                    "trimtab_gate_decisions_total", EDIT, "policy, gate, decision"
                )
            },
            unit="suffix: choices/s",
            stacked=True,
        ),
        lines(
            "Edited tokens by kind",
            "Tokens that were computed under at least one edit of the kind; project is ablate and clamp.",
            "trimtab_edits_applied_tokens_total",
            exprs={
                "{{edit_kind}}": rate("trimtab_edits_applied_tokens_total", ENGINE, "edit_kind")
            },
            unit="suffix: tokens/s",
        ),
    ]


def engine() -> Panels:
    return [
        lines(
            "Step overhead",
            "Host time that Trimtab spends in an engine step in which somebody is steered or read.",
            "trimtab_engine_step_overhead_seconds",
            exprs={
                f"{{{{instance}}}} engine {{{{engine}}}} {name}": quantile(
                    q, "trimtab_engine_step_overhead_seconds", ENGINE, "instance, engine"
                )
                for name, q in (("p50", 0.5), ("p99", 0.99))
            },
            unit="s",
        ),
        lines(
            "Time spent in Trimtab",
            "Host time that Trimtab spends, as a share of the time on the clock.",
            "trimtab_engine_step_overhead_seconds",
            exprs={
                "{{instance}} engine {{engine}}": rate(
                    "trimtab_engine_step_overhead_seconds_sum", ENGINE, "instance, engine"
                )
            },
            unit="percentunit",
        ),
        lines(
            "Slots",
            "Slots of the engines' tables, in use by running requests or free.",
            "trimtab_slots",
            exprs={"{{state}}": f"sum by (state) (trimtab_slots{{{MODEL}}})"},
            unit="short",
            stacked=True,
        ),
        lines(
            "Scores read and missing",
            "Scores that arrived, and those that finished answers should have and did not get.",
            "trimtab_probe_tokens_total",
            "trimtab_probe_tokens_missing_total",
            exprs={
                "{{probe}} read": rate("trimtab_probe_tokens_total", PROBE, "probe"),
                "{{probe}} missing": rate("trimtab_probe_tokens_missing_total", PROBE, "probe"),
            },
            unit="suffix: scores/s",
        ),
    ]


def served() -> Panels:
    policy = ("policy", "version", "mode", "hash", "model_name", "instance")
    build = ("instance", "version", "vllm_version")
    return [
        facts(
            "Policies",
            "The policies that are served. Servers of one model should show the same hashes.",
            "trimtab_policy_info",
            expr=f"max by ({', '.join(policy)}) (trimtab_policy_info{{{REQUEST}}})",
            columns=policy,
            width=16,
        ),
        facts(
            "Servers",
            "What is running where.",
            "trimtab_build_info",
            expr=f"max by ({', '.join(build)}) (trimtab_build_info{{{SERVER}}})",
            columns=build,
            width=8,
        ),
    ]


ROWS: Final = {
    "At a glance": at_a_glance,
    "Traffic": traffic,
    "Probe scores (needs probes)": scores,
    "Cliffs (needs probes and a model that thinks)": cliffs,
    "Steering": steering,
    "Engine": engine,
    "What is served": served,
}


def build() -> model.Dashboard:
    """The board."""
    board = (
        dashboard.Dashboard("Trimtab / Overview")
        .uid(UID)
        .description("What Trimtab's policies do to the traffic, and what its probes read in it.")
        .tags(["trimtab"])
        .readonly()
        .refresh("30s")
        .time("now-1h", "now")
        .timezone("browser")
        .tooltip(model.DashboardCursorSync.CROSSHAIR)
        .link(
            dashboard.DashboardLink("vLLM")
            .type(model.DashboardLinkType.DASHBOARDS)
            .tags(["vllm"])
            .as_dropdown(True)
            .keep_time(True)
            .include_vars(True)
        )
        .annotation(
            dashboard.AnnotationQuery()
            .name("Policies changed")
            .datasource(DATASOURCE)
            .enable(True)
            .icon_color("blue")
            .title_format("Policies changed")
            .text_format("{{model_name}} on {{instance}}")
            # Grafana marks where the value is greater than 0.
            .target(
                query.Dataquery()
                .datasource(DATASOURCE)
                .expr(
                    "max by (model_name, instance) "
                    f"(changes(trimtab_policy_generation{{{MODEL}}}{WINDOW}))"
                )
                .ref_id("Anno")
            )
        )
    )
    for variable in variables():
        board.with_variable(variable)
    for title, panels in ROWS.items():
        board.with_row(dashboard.Row(title))
        for panel in panels():
            board.with_panel(panel)
    built = board.build()
    built.schema_version = SCHEMA_VERSION
    for shown in (*(built.links or []), *built.annotations.list_val):
        # The SDK's default puts them into a menu, where nobody sees them.
        shown.placement = None
    # Links to a panel go by its id.
    for number, panel in enumerate(built.panels or [], start=1):
        panel.id_val = number
    return built


def text() -> str:
    """The board as the file holds it."""
    document = json.loads(json.dumps(build(), cls=JSONEncoder))
    return json.dumps(document, indent=2, sort_keys=True, ensure_ascii=False) + "\n"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m deploy.grafana.overview", description=__doc__)
    parser.add_argument("--check", action="store_true", help="only say whether the file is right")
    made, check = text(), parser.parse_args(arguments).check
    if not check:
        OUTPUT.write_text(made, encoding="utf-8")
    elif not OUTPUT.exists() or OUTPUT.read_text(encoding="utf-8") != made:
        print(
            f"{OUTPUT.name} is not what deploy/grafana/overview.py makes; run `make dashboards`",
            file=sys.stderr,
        )
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
