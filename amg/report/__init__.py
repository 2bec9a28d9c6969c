"""Reports people want to look at: one HTML file that opens offline, and its tables for the terminal."""

from amg.report.content import Report, Sample, Section, Table
from amg.report.page import write
from amg.report.terminal import table_text

__all__ = ["Report", "Sample", "Section", "Table", "table_text", "write"]
