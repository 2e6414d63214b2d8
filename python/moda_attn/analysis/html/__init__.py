"""A balance as one self-contained HTML page."""

from __future__ import annotations

from .page import ReportPage, SeenImage

__all__ = ["ReportPage", "SeenImage"]
