"""A balance as one self-contained HTML page."""

from __future__ import annotations

from .page import Answer, ReportPage, SeenImage

__all__ = ["Answer", "ReportPage", "SeenImage"]
