"""Figures made of few shapes, drawn as inline SVG that follows the reader's theme, or as PNG; and the page around them."""

from promoe_ds.analysis.drawing.scene import HUES, SERIES, Scene, palette

__all__ = ["HUES", "SERIES", "Scene", "palette"]
