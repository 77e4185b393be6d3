"""A8: how well GemFilter filters depends on the layer that votes, with a knee."""

from __future__ import annotations

from typing import Final

from benchmarks.claims.claim import Claim, Finding
from benchmarks.claims.scene import Scene

__all__ = ["CLAIM"]


def _measure(scene: Scene) -> Finding:
    """Facts found, by the layer that votes."""
    rows: list[dict[str, str | int | float]] = []
    for layer in range(scene.spec.num_layers):
        found = scene.found_at_once(f"gemfilter(keep={scene.budget}, layer={layer})")
        what = "retrieves" if layer == scene.spec.match_layer else ""
        rows.append({"layer": layer, "what it does": what, "of": scene.asked, "found": found})
    knee = scene.spec.match_layer
    before, at = (float(rows[layer]["found"]) / scene.asked for layer in (knee - 1, knee))
    return Finding(
        ours=f"recall {before:.2f} (layer {knee - 1} of {scene.spec.num_layers}) to {at:.2f} ({knee})",
        holds=at - before >= 0.5 and all(int(row["found"]) <= scene.asked // 4 for row in rows[:knee]),
        rows=rows,
    )


CLAIM: Final = Claim(
    title="GemFilter's quality rises at once at the layer where the model begins to retrieve",
    published="LongBench 28.03 (layer 12 of 32) to 34.50 (13), then 34.30, 34.12, 33.94 and 30.04 (14, 19, 25, 31)",
    source="GemFilter, Shi et al. 2024, arXiv 2409.17422, Llama 3.1 8B, 1024 tokens kept",
    layers=8,
    cannot="the constructed model retrieves in one layer alone, by design: a filter is blind before it, which is what "
    "the claim says, and blind behind it, too, where trained models go on retrieving. The place of the knee is ours to "
    "choose; that there is one, is not: nothing but that layer's queries points at the needle. The plateau behind the "
    "knee and the decline at the end need a trained model.",
    measure=_measure,
)
