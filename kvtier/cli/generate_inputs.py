"""What ``kvtier generate`` needs before the first token: a document, a tokenizer, a prompt that fits, a model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from kvtier.cli.engine import transformers_module
from kvtier.cli.tiers import check_budgets
from kvtier.errors import InputError

if TYPE_CHECKING:
    import torch

    from kvtier.cli.output import Screen
    from kvtier.core.policy import Policy

__all__ = ["Loaded", "Request", "check_length", "check_request", "prepare", "read_document"]

_WEIGHTS: Final = ("*.safetensors", "*.safetensors.index.json")
_TOKENIZERS: Final = ("tokenizer.json", "tokenizer.model", "vocab.json", "spiece.model")


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """The words of one command line.

    Parameters
    ----------
    keep, read : int, optional
        Tokens.
    device : int, optional
        Bytes.
    store : dict, optional
        Tiers below the device; None for kvtier's default.
    explain : Path, optional
        Where a page about what was kept and read goes.
    session : Path, optional
        A saved session, in place of a document.
    save_session : Path, optional
        Where the session goes after the answer.
    """

    model: Path
    document: Path | None
    question: str
    policy: str
    keep: int | None
    read: int | None
    device: int | None
    store: dict[str, Any] | None
    tenant: str
    dtype: str
    max_new_tokens: int
    sample: bool
    chat_template: bool
    seed: int
    explain: Path | None = None
    session: Path | None = None
    save_session: Path | None = None


class Loaded(NamedTuple):
    """What a request leads to: ``ids`` [1, T] int64 of ``text``, which follow what a saved session holds.

    They are already within the model's positions.
    """

    model: Any
    tokenizer: Any
    ids: torch.Tensor
    policy: Policy
    text: str


def check_request(request: Request) -> str:
    """What can be checked without importing a model engine.

    Returns
    -------
    str
        The text of the document; empty where a session goes on.

    Raises
    ------
    InputError
        For a document, question, session or directory that cannot work.
    """
    text = "" if request.document is None else read_document(request.document)
    _check_session(request)
    if not request.question.strip():
        raise InputError("--question is empty; ask something")
    _check_model_directory(request.model)
    for option, path in (("--explain", request.explain), ("--save-session", request.save_session)):
        if path is not None:
            _check_page(option, path)
    return text


def prepare(request: Request, text: str, screen: Screen) -> Loaded:
    """Check the rest, what is cheap first; the weights come last.

    Raises
    ------
    InputError
        For a model, length or budget that cannot work.
    PolicyError
        For a policy that does not exist.
    """
    from kvtier.core.compose import policy
    from kvtier.core.policy import Role

    chosen = policy(request.policy)
    if request.save_session is not None and any(Role.PROMPT_FILTER in part.roles for part in chosen.parts):
        raise InputError(f"what {request.policy} leaves out of a prompt is not saved; leave --save-session out")
    config = _load_config(request.model)
    tokenizer = _load_tokenizer(request.model)
    whole, plain = _prompt(tokenizer, text, request)
    ids = _encode(tokenizer, whole, plain=plain)
    check_length(config, ids.shape[1], request.max_new_tokens)
    if request.session is None:
        check_budgets(chosen, request.keep, request.read, ids.shape[1])
    screen.note(f"loading {request.model} for a prompt of {ids.shape[1]} tokens")
    model = _load_model(request.model, config, request.dtype)
    return Loaded(model, tokenizer, ids.to(model.device), _reading(chosen, tokenizer), whole)


def read_document(path: Path) -> str:
    """The text of a UTF-8 file.

    Raises
    ------
    InputError
        When the file is missing, unreadable, not text, or empty.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{path} must be UTF-8 text: byte {error.start} is not; convert the file first") from error
    except OSError as error:
        raise InputError(f"cannot read the document {path}: {error.strerror}") from error
    if not text.strip():
        raise InputError(f"the document {path} is empty; give one with text")
    return text


def _reading(chosen: Policy, tokenizer: Any) -> Policy:
    """A policy whose prompt filter knows the tokenizer."""
    from kvtier.core.compose import Composition
    from kvtier.core.policy import PromptFilterPolicy

    parts = tuple(part.reading(tokenizer) if isinstance(part, PromptFilterPolicy) else part for part in chosen.parts)
    return parts[0] if len(parts) == 1 else Composition(parts=parts)


def _check_session(request: Request) -> None:
    """Refuse anything but a new document or a saved session, and what cannot be told of one.

    Raises
    ------
    InputError
    """
    if (request.document is None) == (request.session is None):
        raise InputError("give --document to begin with one, or --session to go on with what --save-session wrote")
    if request.session is not None and not request.session.is_file():
        raise InputError(f"--session must be a file that --save-session wrote, and {request.session} is none")
    if request.session is not None and request.explain is not None:
        raise InputError("--explain shows a document, and a saved session holds tokens only; leave one of them out")


def _check_model_directory(directory: Path) -> None:
    """Refuse a directory that holds no complete model, naming what is missing.

    Raises
    ------
    InputError
        Nothing is ever downloaded, so all of it must be there.
    """
    if not directory.is_dir():
        raise InputError(f"--model must be a local directory of a transformers model, and {directory} is none")
    if not (directory / "config.json").is_file():
        raise InputError(f"{directory} holds no config.json; give the directory that save_pretrained() wrote")
    if not any(any(directory.glob(pattern)) for pattern in _WEIGHTS):
        raise InputError(f"{directory} holds no weights (*.safetensors); kvtier reads no pickled weights")
    if not any((directory / name).is_file() for name in _TOKENIZERS):
        raise InputError(f"{directory} holds no tokenizer (tokenizer.json); save the tokenizer beside the model")


def _load_config(directory: Path) -> Any:
    """The configuration of a model directory.

    Raises
    ------
    InputError
        When transformers cannot read it.
    """
    transformers = transformers_module()
    try:
        return transformers.AutoConfig.from_pretrained(directory, local_files_only=True)
    except Exception as error:
        raise InputError(f"{directory}/config.json cannot be loaded: {error}") from error


def _load_tokenizer(directory: Path) -> Any:
    """The tokenizer of a model directory.

    Raises
    ------
    InputError
        When transformers cannot read it.
    """
    transformers = transformers_module()
    try:
        return transformers.AutoTokenizer.from_pretrained(directory, local_files_only=True)
    except Exception as error:
        raise InputError(f"the tokenizer in {directory} cannot be loaded: {error}") from error


def _prompt(tokenizer: Any, document: str, request: Request) -> tuple[str, bool]:
    """The document and then the question, in the model's chat form if it has one; whether a text begins here.

    In a saved session the question alone, as one more turn.
    """
    going_on = request.session is not None
    if not request.chat_template or tokenizer.chat_template is None:
        return f"{document}\n\n{request.question}", not going_on
    turns = [{"role": "user", "content": request.question if going_on else f"{document}\n\n{request.question}"}]
    text = str(tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False))
    return text.removeprefix(tokenizer.bos_token or "") if going_on else text, False


def _encode(tokenizer: Any, text: str, *, plain: bool) -> torch.Tensor:
    """Token ids [1, T] int64; a chat form brings its special tokens itself."""
    ids: torch.Tensor = tokenizer(text, add_special_tokens=plain, return_tensors="pt")["input_ids"]
    if ids.shape[1] == 0:
        raise InputError("the document and the question have no token in this tokenizer; give other text")
    return ids


def _check_page(option: str, path: Path) -> None:
    """Refuse a place where no file can be written, before anything runs.

    Raises
    ------
    InputError
    """
    if path.is_dir() or not path.parent.is_dir():
        raise InputError(f"{option} must be a file in a folder that exists, got {path}")


def check_length(config: Any, prompt_tokens: int, new_tokens: int) -> None:
    """Refuse a prompt that runs past the positions the model was made for.

    Raises
    ------
    InputError
        Saying how many tokens of how many.
    """
    positions = getattr(config.get_text_config(), "max_position_embeddings", None)
    if positions is not None and prompt_tokens + new_tokens > positions:
        raise InputError(
            f"the model has {positions} positions, but the prompt is {prompt_tokens} tokens and {new_tokens} are to be "
            f"generated; shorten the document by {prompt_tokens + new_tokens - positions} tokens"
        )


def _load_model(directory: Path, config: Any, dtype: str) -> Any:
    """The causal language model of a directory, on the GPU if there is one, ready to generate.

    Raises
    ------
    InputError
        When transformers cannot build it from these files.
    """
    import torch

    transformers = transformers_module()
    try:
        model = transformers.AutoModelForCausalLM.from_pretrained(
            directory, config=config, dtype=dtype, local_files_only=True, use_safetensors=True
        )
    except Exception as error:
        raise InputError(f"the model in {directory} cannot be loaded: {error}") from error
    return model.eval().to("cuda" if torch.cuda.is_available() else "cpu")
