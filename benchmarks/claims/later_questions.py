"""A10: what was evicted for good is gone when the question comes later; what is only not read is not."""

from __future__ import annotations

from typing import Final

from benchmarks.claims.claim import Claim, Finding
from benchmarks.claims.scene import Scene

__all__ = ["CLAIM"]

_EVICTING: Final = ("snapkv", "pyramidkv", "tova", "h2o", "d2o", "streamingllm", "gemfilter")


def _measure(scene: Scene) -> Finding:
    """Facts found when the question is part of the prompt, and when it comes behind it."""
    policies = {name: f"{name}(keep={scene.budget})" for name in _EVICTING}
    policies["gemfilter"] = f"gemfilter(keep={scene.budget}, pool='max')"
    policies |= {"quest": f"quest(read={scene.budget})", "full": "full"}
    rows: list[dict[str, str | int | float]] = []
    for name, policy in policies.items():
        rows.append(
            {
                "policy": name,
                "what is not kept or read": "is dropped" if name in _EVICTING else "stays" if name == "quest" else "",
                "of": scene.asked,
                "asked at once": scene.found_at_once(policy),
                "asked later": scene.found_later(policy),
            }
        )
    later = {str(row["policy"]): int(row["asked later"]) / scene.asked for row in rows}
    best = max(later[name] for name in _EVICTING)
    return Finding(
        ours=f"asked later: at most {best:.0%} after eviction, {later['quest']:.0%} with retrieval of as many tokens",
        holds=later["quest"] == later["full"] == 1.0 and best <= 0.5,
        rows=rows,
    )


CLAIM: Final = Claim(
    title="Permanent eviction loses the questions that come later, retrieval does not",
    published="passkey found in about 2% with query-agnostic eviction, 100% with Quest",
    source="Quest's poster, Tang et al. 2024, arXiv 2406.10774, as told by a survey",
    layers=4,
    cannot="the constructed model makes it sharp: nothing in the text hints at a needle before the question names it, "
    "so what an eviction keeps by then holds one by chance (one token of eight, in whole neighbourhoods), where a "
    "trained model's attention may already favour what stands out. Nor does it say how answers degrade whose facts "
    "are spread over many tokens.",
    measure=_measure,
)
