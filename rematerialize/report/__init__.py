"""Tables from plans and results; plots and pages will live here too."""

from rematerialize.report.table import aligned_table, markdown_table, plan_table

__all__ = ["aligned_table", "markdown_table", "plan_table"]
