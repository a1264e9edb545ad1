"""Where the time of a command went: a line a stage that it made, from the manifests."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path

from recllm import paths
from recllm.console import duration
from recllm.pipeline.manifest import Manifest


def spent(rules: Path) -> list[str]:
    """The lines of a small table: the stages that a command made, in the order in which they were finished.

    Args:
        rules: what Make followed, `artifacts/<dataset>/plans/<digest>.mk`, written when the command began.

    Returns:
        A head, a line a stage with its seconds over all attempts, its share of their sum and its peak memory,
        and the sum; nothing where all was done before.
    """
    root = rules.parent.parent
    text = rules.read_text(encoding="utf-8")
    begun = int(rules.stat().st_mtime)
    made = []
    for path in root.rglob(paths.MANIFEST):
        if f"{path}:" in text:
            manifest = Manifest.read(path.parent)
            if datetime.fromisoformat(manifest.finished).timestamp() >= begun:
                made.append((manifest.finished, str(path.parent.relative_to(root)), manifest))
    if not made:
        return []
    made.sort(key=lambda entry: entry[:2])
    whole = sum(manifest.seconds for _, _, manifest in made)
    width = max(len(folder) for _, folder, _ in made)
    lines = ["where the time went"]
    for _, folder, manifest in made:
        share = manifest.seconds / whole if whole else 0.0
        gpu = f"  {manifest.peak_gpu_memory_gb:.1f} GB of the GPU" if manifest.peak_gpu_memory_gb else ""
        memory = f"{manifest.peak_memory_gb:.1f} GB"
        lines.append(
            f"  {folder:<{width}}  {duration(manifest.seconds):>10}  {share:>4.0%}  {memory:>8}{gpu}"
        )
    most = max(manifest.peak_memory_gb for _, _, manifest in made)
    stages = "1 stage" if len(made) == 1 else f"{len(made)} stages"
    lines.append(f"{stages}, {duration(whole)} one after another, {most:.1f} GB at most")
    return lines
