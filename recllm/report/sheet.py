"""Panels of plots in one image that an HTML page can carry inside."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Callable, Mapping
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

GRAY = "#7f7f7f"  # readable on white and on black


def sheet(panels: Mapping[str, Callable[[Axes], None]]) -> str:
    """Draw panels side by side, three in a line.

    Args:
        panels: title of a panel -> what draws into its axes.

    Returns:
        A `data:` URI of an SVG with a transparent ground; equal drawings give equal ones.
    """
    columns = min(3, len(panels))
    rows = math.ceil(len(panels) / columns)
    # Equal data must give an equal file: no random ids (and no date, below).
    style: Any = {"font.size": 9, "svg.hashsalt": "recllm", "svg.fonttype": "none"}
    style |= dict.fromkeys(
        ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), GRAY
    )
    with mpl.rc_context(style):
        figure = Figure(figsize=(3.7 * columns, 2.5 * rows), layout="constrained")
        figure.patch.set_alpha(0)
        axes = figure.subplots(rows, columns, squeeze=False).ravel()
        for axis, (title, draw) in zip(axes, panels.items(), strict=False):
            axis.patch.set_alpha(0)
            axis.set_title(title)
            axis.spines[["top", "right"]].set_visible(False)
            draw(axis)
        for axis in axes[len(panels) :]:
            axis.set_axis_off()
        out = io.BytesIO()
        figure.savefig(out, format="svg", metadata={"Date": None})
    return "data:image/svg+xml;base64," + base64.b64encode(out.getvalue()).decode()
