"""Tables, plots, pages and exports from graphs and schedules."""

from rematerialize.report.table import aligned_table, markdown_table, plan_table

__all__ = ["aligned_table", "markdown_table", "plan_table"]
