"""Drawings of plans and schedules as single SVG images, for notebooks and documents; the page's colours."""
