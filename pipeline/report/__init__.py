"""A run to look at: `write_report` makes one self-contained page."""

from pipeline.report.page import write_report

__all__ = ["write_report"]
