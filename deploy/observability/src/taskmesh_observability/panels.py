"""The few kinds of panels that the dashboards consist of, and what all dashboards have in common."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from grafana_foundation_sdk.builders import common, dashboard, prometheus, stat, table, tempo, text, timeseries
from grafana_foundation_sdk.cog.builder import Builder
from grafana_foundation_sdk.models import common as commons
from grafana_foundation_sdk.models import dashboard as model
from grafana_foundation_sdk.models.prometheus import PromQueryFormat
from grafana_foundation_sdk.models.tempo import SearchTableType
from grafana_foundation_sdk.models.text import TextMode

TAG: Final = "taskmesh"
METRICS: Final = model.DataSourceRef(type_val="prometheus", uid="${prometheus}")
TRACES: Final = model.DataSourceRef(type_val="tempo", uid="${tempo}")

PER_SECOND: Final = "cps"
SECONDS: Final = "s"
SHARE: Final = "percentunit"
COUNT: Final = "short"

SERVICE: Final = ("Service ${__field.labels.service}", "/d/taskmesh-service?var-service=${__field.labels.service}")
TYPE: Final = ("Type ${__field.labels.type}", "/d/taskmesh-type?var-type=${__field.labels.type}")

Panel = Builder[model.Panel]


@dataclass(frozen=True, slots=True)
class Query:
    """One expression with the name of its lines.

    Attributes:
        legend: With labels as `{{service}}`.
        exemplars: Points of single tasks are shown with it, and lead to their traces.
    """

    expression: str
    legend: str = ""
    exemplars: bool = False

    def target(self, ref_id: str) -> prometheus.Dataquery:
        """As the panel wants it."""
        query = prometheus.Dataquery().ref_id(ref_id).expr(self.expression).legend_format(self.legend).range()
        return query.exemplar(True) if self.exemplars else query

    def now(self) -> prometheus.Dataquery:
        """Its last value alone, as a table."""
        return prometheus.Dataquery().ref_id("A").expr(self.expression).instant().format(PromQueryFormat.TABLE)


@dataclass(frozen=True, slots=True)
class Row:
    """Panels under a title."""

    title: str
    panels: Sequence[Panel]


def rate(series: str, by: str = "", where: str = "") -> str:
    """Events each second, by labels."""
    return f"sum by ({by}) (rate({series}{{{where}}}[$__rate_interval]))"


def quantile(share: float, histogram: str, by: str = "", where: str = "") -> str:
    """What the given share of a histogram's measurements is below of."""
    labels = f"{by}, le" if by else "le"
    return f"histogram_quantile({share}, {rate(f'{histogram}_bucket', labels, where)})"


def quantiles(histogram: str, where: str = "") -> Sequence[Query]:
    """Median, 95th and 99th percentile; the last one with exemplars."""
    return [
        Query(quantile(0.5, histogram, "", where), "50 %"),
        Query(quantile(0.95, histogram, "", where), "95 %"),
        Query(quantile(0.99, histogram, "", where), "99 %", exemplars=True),
    ]


def graph(
    title: str,
    unit: str,
    description: str,
    *queries: Query,
    stacked: bool = False,
    line_at: float | None = None,
    links: Sequence[tuple[str, str]] = (),
) -> Panel:
    """Lines over time, a third of the width.

    Args:
        description: What it shows, and what to do when it looks bad.
        line_at: Where it begins to look bad.
        links: Title and address of where a click on a line leads.
    """
    panel = timeseries.Panel().title(title).description(description).unit(unit).min(0).datasource(METRICS)
    panel = panel.span(8).height(8).fill_opacity(30 if stacked else 5).show_points(commons.VisibilityMode.NEVER)
    panel = panel.legend(common.VizLegendOptions().show_legend(True).placement(commons.LegendPlacement.BOTTOM))
    panel = panel.tooltip(common.VizTooltipOptions().mode(commons.TooltipDisplayMode.MULTI))
    if stacked:
        panel = panel.stacking(common.StackingConfig().mode(commons.StackingMode.NORMAL).group("A"))
    if line_at is not None:
        panel = panel.thresholds(_red_from(line_at))
        panel = panel.thresholds_style(common.GraphThresholdsStyleConfig().mode(commons.GraphThresholdsStyleMode.LINE))
    if links:
        panel = panel.data_links([_data_link(*link) for link in links])
    for ref_id, query in zip("ABCDEF", queries, strict=False):
        panel = panel.with_target(query.target(ref_id))
    return panel


def number(
    title: str,
    unit: str,
    description: str,
    query: Query,
    *,
    red_from: float | None = None,
    red_below: float | None = None,
) -> Panel:
    """One figure with its history behind it; six of them fill a row."""
    panel = stat.Panel().title(title).description(description).unit(unit).datasource(METRICS).span(4).height(4)
    panel = panel.reduce_options(common.ReduceDataOptions().calcs(["lastNotNull"]))
    panel = panel.graph_mode(commons.BigValueGraphMode.AREA).color_mode(commons.BigValueColorMode.VALUE)
    panel = panel.no_value("none")
    if red_from is not None:
        panel = panel.thresholds(_red_from(red_from))
    if red_below is not None:
        panel = panel.thresholds(_thresholds("red", "green", red_below))
    return panel.with_target(query.target("A"))


def listing(title: str, description: str, query: Query, *, span: int = 12) -> Panel:
    """What there is at the moment, a line for each."""
    panel = table.Panel().title(title).description(description).datasource(METRICS).span(span).height(8)
    panel = panel.align(commons.FieldTextAlignment.AUTO)
    hide = {"excludeByName": {"Time": True, "__name__": True, "instance": True}}
    organize = model.DataTransformerConfig(id_val="organize", options=hide)
    return panel.no_value("none").with_target(query.now()).with_transformation(organize)


def traces(title: str, description: str, traceql: str) -> Panel:
    """Traces that a search finds, the newest first; a click opens one."""
    search = tempo.TempoQuery().ref_id("A").query_type("traceql").query(traceql).limit(20).spss(3)
    search = search.table_type(SearchTableType.TRACES)
    panel = table.Panel().title(title).description(description).datasource(TRACES).span(12).height(8)
    panel = panel.align(commons.FieldTextAlignment.AUTO)
    return panel.no_value("none").with_target(search)


def words(content: str) -> Panel:
    """A paragraph over the whole width."""
    return text.Panel().title("").mode(TextMode.MARKDOWN).content(content).span(24).height(3).transparent(True)


def choice(name: str, label: str, query: str, description: str) -> dashboard.QueryVariable:
    """A variable whose values a query finds."""
    variable = dashboard.QueryVariable(name).label(label).description(description).datasource(METRICS).query(query)
    return variable.refresh(model.VariableRefresh.ON_TIME_RANGE_CHANGED).sort(model.VariableSort.ALPHABETICAL_ASC)


def build(
    uid: str, title: str, description: str, rows: Sequence[Row], *variables: dashboard.QueryVariable
) -> model.Dashboard:
    """A dashboard with the data sources to choose, and links to the others."""
    made = dashboard.Dashboard(title).uid(uid).description(description).tags([TAG]).readonly().timezone("browser")
    made = made.time("now-3h", "now").refresh("30s").tooltip(model.DashboardCursorSync.CROSSHAIR)
    made = made.with_variable(dashboard.DatasourceVariable("prometheus").label("Metrics").type("prometheus"))
    made = made.with_variable(dashboard.DatasourceVariable("tempo").label("Traces").type("tempo"))
    for variable in variables:
        made = made.with_variable(variable)
    made = made.link(
        dashboard.DashboardLink("Taskmesh").type(model.DashboardLinkType.DASHBOARDS).tags([TAG]).icon("external link")
        .include_vars(True).keep_time(True)
    )  # fmt: skip
    for row in rows:
        made = made.with_row(dashboard.Row(row.title))
        for panel in row.panels:
            made = made.with_panel(panel)
    finished = made.build()
    for number_in_order, placed in enumerate(finished.panels or (), start=1):
        placed.id_val = number_in_order
    return finished


def _red_from(value: float) -> dashboard.ThresholdsConfig:
    return _thresholds("green", "red", value)


def _thresholds(below: str, above: str, value: float) -> dashboard.ThresholdsConfig:
    steps = [model.Threshold(value=None, color=below), model.Threshold(value=value, color=above)]
    return dashboard.ThresholdsConfig().mode(model.ThresholdsMode.ABSOLUTE).steps(steps)


def _data_link(title: str, url: str) -> dashboard.DashboardLink:
    return dashboard.DashboardLink(title).url(f"{url}&${{__url_time_range}}")
