"""What the patch does and costs: the report of a run, and the estimate before one."""

from __future__ import annotations

from fierpatch.report.layers import describe
from fierpatch.report.run import estimate, report
from fierpatch.report.table import LayerReport, Report

__all__ = ["LayerReport", "Report", "describe", "estimate", "report"]
