"""A small Llama set by hand, not trained, that finds facts in long text by induction: to show and test policies with.

``torch``, ``transformers`` and ``tokenizers`` are imported by the functions that need them, not by this package.
"""

from kvtier.testing.induction.document import Needle, PlantedDocument, plant_needles, question, read_default_document
from kvtier.testing.induction.model import build_model, save
from kvtier.testing.induction.recall import answer_needles, lost_needles
from kvtier.testing.induction.spec import HeadRole, InductionSpec
from kvtier.testing.induction.tokenizer import build_tokenizer

__all__ = [
    "HeadRole",
    "InductionSpec",
    "Needle",
    "PlantedDocument",
    "answer_needles",
    "build_model",
    "build_tokenizer",
    "lost_needles",
    "plant_needles",
    "question",
    "read_default_document",
    "save",
]
