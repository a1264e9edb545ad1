"""The report: one HTML file that says what was run, what came out, and what is missing."""

from recllm.report.page import write_report

__all__ = ["write_report"]
