"""How Trimtab's panels look: one builder for each form, with what all of them have in common.

A panel says what it shows, in a sentence, and which metrics it is made of; it has a unit, and asks
the data source that is chosen at the top of the board.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from grafana_foundation_sdk.builders import common, dashboard, heatmap, stat, table, timeseries
from grafana_foundation_sdk.builders import prometheus as query
from grafana_foundation_sdk.models import common as common_model
from grafana_foundation_sdk.models import dashboard as model
from grafana_foundation_sdk.models import heatmap as heatmap_model
from grafana_foundation_sdk.models.prometheus import PromQueryFormat

DATASOURCE: Final = model.DataSourceRef(type_val="prometheus", uid="${datasource}")
NO_TRAFFIC: Final = "No traffic"
BLUE: Final = {None: "blue"}
"""The colour of a figure that is neither good nor bad."""


def described(text: str, metrics: tuple[str, ...]) -> str:
    """A panel's description, with the metrics that it is made of at its end."""
    return f"{text} Metric: {', '.join(f'`{name}`' for name in metrics)}"


def _target(expr: str, legend: str, ref: str) -> query.Dataquery:
    return query.Dataquery().datasource(DATASOURCE).expr(expr).legend_format(legend).ref_id(ref)


def tile(
    title: str,
    text: str,
    *metrics: str,
    expr: str,
    unit: str,
    steps: Mapping[float | None, str] = BLUE,
    empty: str = NO_TRAFFIC,
) -> stat.Panel:
    """One figure: how it is now.

    Args:
        expr: gives one sample.
        steps: colours by the value from which they hold; None is minus infinity.
        empty: stands where there is no figure, because nothing is divided by nothing.
    """
    return (
        stat.Panel()
        .title(title)
        .description(described(text, metrics))
        .datasource(DATASOURCE)
        .unit(unit)
        .no_value(empty)
        .mappings(
            [
                model.SpecialValueMap(
                    model.DashboardSpecialValueMapOptions(
                        match=model.SpecialValueMatch.NULL_AND_NAN,
                        result=model.ValueMappingResult(text=empty),
                    )
                )
            ]
        )
        .thresholds(
            dashboard.ThresholdsConfig()
            .mode(model.ThresholdsMode.ABSOLUTE)
            .steps([model.Threshold(value, color) for value, color in steps.items()])
        )
        .color_scheme(dashboard.FieldColor().mode(model.FieldColorModeId.THRESHOLDS))
        .reduce_options(common.ReduceDataOptions().calcs(["lastNotNull"]))
        .graph_mode(common_model.BigValueGraphMode.NONE)
        # A range would show the last figure that there was, however old.
        .with_target(_target(expr, "", "A").instant())
        .height(4)
        .span(3)
    )


def lines(
    title: str,
    text: str,
    *metrics: str,
    exprs: Mapping[str, str],
    unit: str,
    width: int = 12,
    stacked: bool = False,
    ceiling: float | None = None,
    exemplars: bool = False,
) -> timeseries.Panel:
    """Lines over time.

    Args:
        exprs: queries by the legend of their lines.
        stacked: whether the lines add up to something.
        ceiling: the upper end of the axis, unless a line goes beyond it.
        exemplars: whether single observations are drawn as points, with their request's id.
    """
    panel = (
        timeseries.Panel()
        .title(title)
        .description(described(text, metrics))
        .datasource(DATASOURCE)
        .unit(unit)
        .axis_soft_min(0)
        .fill_opacity(25 if stacked else 5)
        .show_points(common_model.VisibilityMode.NEVER)
        .legend(
            common.VizLegendOptions()
            .show_legend(True)
            .display_mode(common_model.LegendDisplayMode.LIST)
            .placement(common_model.LegendPlacement.BOTTOM)
        )
        .tooltip(
            common.VizTooltipOptions()
            .mode(common_model.TooltipDisplayMode.MULTI)
            .sort(common_model.SortOrder.DESCENDING)
        )
        .height(8)
        .span(width)
    )
    if stacked:
        panel.stacking(common.StackingConfig().mode(common_model.StackingMode.NORMAL))
    if ceiling is not None:
        panel.axis_soft_max(ceiling)
    for ref, (legend, expr) in zip("ABCDEFGH", exprs.items(), strict=False):
        target = _target(expr, legend, ref).range()
        panel.with_target(target.exemplar(True) if exemplars else target)
    return panel


def heat_map(title: str, text: str, *metrics: str, expr: str, axis: str) -> heatmap.Panel:
    """How often each bucket of a histogram was hit, over time.

    Args:
        expr: gives the cumulative buckets, with the label ``le``.
        axis: what the buckets measure.
    """
    return (
        heatmap.Panel()
        .title(title)
        .description(described(text, metrics))
        .datasource(DATASOURCE)
        .unit("short")
        # The buckets are the server's; Grafana takes them apart and draws them.
        .calculate(False)
        .rows_frame(heatmap.RowsHeatmapOptions().layout(common_model.HeatmapCellLayout.AUTO))
        .y_axis(heatmap.YAxisConfig().unit("none").axis_label(axis))
        .cell_values(heatmap.CellValues().unit("short"))
        .color(
            heatmap.HeatmapColorOptions()
            .mode(heatmap_model.HeatmapColorMode.SCHEME)
            .scheme("Blues")
            .scale(heatmap_model.HeatmapColorScale.EXPONENTIAL)
            .exponent(0.5)
            .steps(64)
            .reverse(False)
        )
        # Cells that nothing hit are left empty.
        .filter_values(heatmap.FilterValueRange().le(1e-9))
        .tooltip(
            heatmap.HeatmapTooltip()
            .mode(common_model.TooltipDisplayMode.SINGLE)
            .y_histogram(True)
            .show_color_scale(True)
        )
        .show_legend()
        .with_target(_target(expr, "{{le}}", "A").range().format(PromQueryFormat.HEATMAP))
        .height(8)
        .span(12)
    )


def facts(
    title: str, text: str, *metrics: str, expr: str, columns: tuple[str, ...], width: int
) -> table.Panel:
    """A table of labels, of a metric whose value says nothing.

    Args:
        expr: aggregates by exactly ``columns``.
        columns: the labels, in the order of the table.
    """
    return (
        table.Panel()
        .title(title)
        .description(described(text, metrics))
        .datasource(DATASOURCE)
        .unit("none")
        .with_target(_target(expr, "", "A").instant().format(PromQueryFormat.TABLE))
        .with_transformation(
            model.DataTransformerConfig(
                id_val="organize",
                options={
                    "excludeByName": {"Time": True, "Value": True},
                    "indexByName": {name: at for at, name in enumerate(columns)},
                    "renameByName": {},
                },
            )
        )
        .height(7)
        .span(width)
    )
