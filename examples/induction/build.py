"""Write the induction model, a document with needles and the questions about them: ``python build.py OUT_DIR``."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from kvtier.errors import InputError, KVTierError
from kvtier.testing.induction import (
    InductionSpec,
    PlantedDocument,
    build_model,
    build_tokenizer,
    plant_needles,
    question,
    read_default_document,
    save,
)


def main(words: list[str] | None = None) -> None:
    """Build what the command line asks for; wrong words end with exit code 2 and the reason."""
    parser = _parser()
    options = parser.parse_args(words)
    try:
        document = _build(options)
    except (KVTierError, OSError) as error:
        parser.error(str(error))
    needle = document.needles[0]
    print(
        f"{options.out_dir}: model, tokenizer, document.txt ({document.context} tokens with a question), questions.json"
    )
    print(f"try: {question(needle)!r} after the document; the answer is {needle.answer!r}")


def _parser() -> argparse.ArgumentParser:
    """The words of the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out_dir", type=Path, metavar="OUT_DIR", help="directory to write")
    parser.add_argument("--document", type=Path, metavar="FILE", help="UTF-8 text (default: Python's own sources)")
    parser.add_argument(
        "--context", type=int, default=16384, metavar="N", help="tokens of a prompt (default: %(default)s)"
    )
    parser.add_argument("--needles", type=int, default=8, metavar="N", help="facts to plant (default: %(default)s)")
    parser.add_argument("--values", type=int, default=3, metavar="N", help="words of an answer (default: %(default)s)")
    parser.add_argument(
        "--seed", type=int, default=0, metavar="N", help="which facts, and where (default: %(default)s)"
    )
    return parser


def _build(options: argparse.Namespace) -> PlantedDocument:
    """Plant, set the weights for the document's words, save."""
    text = read_default_document(options.context) if options.document is None else _read(options.document)
    document = plant_needles(
        text, count=options.needles, context=options.context, seed=options.seed, values=options.values
    )
    spec = InductionSpec(max_positions=max(InductionSpec().max_positions, options.context))
    tokenizer = build_tokenizer(document.text, spec=spec)
    save(options.out_dir, build_model(tokenizer, spec=spec), tokenizer)

    questions = [
        {"question": question(needle), "answer": needle.answer, "depth": needle.depth} for needle in document.needles
    ]
    (options.out_dir / "document.txt").write_text(document.text, encoding="utf-8")
    (options.out_dir / "questions.json").write_text(json.dumps(questions, indent=2) + "\n", encoding="utf-8")
    return document


def _read(path: Path) -> str:
    """Text of the user's own document."""
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"the document must be UTF-8 text, {path} is not ({error}); convert it first") from error


if __name__ == "__main__":
    main()
