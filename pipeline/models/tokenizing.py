"""From texts to token ids, as the checkpoint's own tokenizer makes them. The kind is told by the file's name:

tokenizer.json   Hugging Face: normalisation, merges and special tokens are in the file
*.txt            BERT's wordpieces, lower case: [CLS] in front, zeros behind
*.model          sentencepiece: `</s>` behind, as often as it takes; for SigLIP the text is cleaned first. Gemma's (of
                 SigLIP 2): `<eos>` behind, then padding; lower case
"""

import hashlib
import string
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from pipeline.models.text_architecture import TextArchitecture
from pipeline.models.weights import read_json
from pipeline.storage import redact
from schemas.errors import CheckpointError, SpecError

if TYPE_CHECKING:
    import numpy as np

NAMES = ("tokenizer.json", "vocab.txt", "spiece.model", "sentencepiece.model")
SUFFIXES = (".json", ".txt", ".model")
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)
Encode = Callable[[str], list[int]]


class Tokenizer(NamedTuple):
    """`encode` gives the ids of a text with what the tower wants in front and behind; `pad` fills up to `length`."""

    encode: Encode
    pad: int
    length: int
    vocabulary: int
    where: Path

    def __call__(self, texts: Sequence[str]) -> "np.ndarray[Any, Any]":
        """Ids, int64 (B, T). Raises CheckpointError where the tower has no embedding for an id."""
        import numpy as np

        ids = np.full((len(texts), self.length), self.pad, np.int64)
        for row, text in enumerate(texts):
            found = self.encode(text)
            ids[row, : len(found)] = found
        if ids.max(initial=0) >= self.vocabulary:
            raise CheckpointError(
                f"{self.where}: has a token {ids.max()}, but the text tower knows {self.vocabulary}; this vocabulary "
                "is of another checkpoint"
            )
        return ids


def find_vocabulary(folder: Path, given: str | None) -> Path:
    """`given`, or what lies beside the checkpoint: a known name, or that of the `.npz` with `.txt` or `.model`.

    Raises SpecError where there is none.
    """
    if given is not None:
        if "://" in given:
            raise SpecError(
                f"--vocabulary {redact(given)}: a vocabulary is read from a disk. Copy it to this machine and give its "
                "path, or put it beside the checkpoint, from where it is taken in a bucket as well"
            )
        path = Path(given).expanduser()
        if not path.is_file() or path.suffix not in SUFFIXES:
            raise SpecError(f"--vocabulary {given}: expected a file tokenizer.json, *.txt (wordpieces) or *.model")
        return path.absolute()
    beside = folder.parent if folder.is_file() else folder
    stems = [folder.stem] if folder.is_file() else [path.stem for path in beside.glob("*.npz")]
    names = [f"{stem}{suffix}" for stem in stems for suffix in (".txt", ".model")]
    for name in (*names, *NAMES):
        if (beside / name).is_file():
            return beside / name
    raise SpecError(
        f"{folder}: a text tower, but no vocabulary beside it (tokenizer.json, vocab.txt or spiece.model); copy the "
        "checkpoint's there, or say with --vocabulary where it is"
    )


def file_digest(path: Path) -> str:
    """SHA-256 of a file: 64 hexadecimal digits."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def load_tokenizer(path: Path, a: TextArchitecture) -> Tokenizer:
    """The tokenizer in `path` for a tower. Raises CheckpointError for a file that is none."""
    encode, pad = {".json": _from_json, ".txt": _wordpieces, ".model": _sentencepieces}[path.suffix](path, a)
    return Tokenizer(encode, pad, a.length, a.vocabulary, path)


def _library(name: str) -> Any:
    from importlib import import_module

    try:
        return import_module(name)
    except ModuleNotFoundError:
        raise SpecError(f"texts need {name}, which is not installed here: pip install {name}") from None


def _from_json(path: Path, a: TextArchitecture) -> tuple[Encode, int]:
    read_json(path)
    tokenizers = _library("tokenizers")
    try:
        tokenizer = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:
        raise CheckpointError(f"{path}: no tokenizer.json that can be read: {error}") from error
    pad = _padding(path, tokenizer) if a.read == "last" else 0
    tokenizer.no_padding()
    tokenizer.enable_truncation(a.length)
    # SigLIP 2 was trained on lower case, which its tokenizer.json leaves to whoever calls it
    # (https://github.com/huggingface/transformers/pull/43101).
    beside = path.with_name("tokenizer_config.json")
    lower = a.sigmoid and beside.is_file() and bool(read_json(beside).get("do_lower_case"))
    return (lambda text: list(tokenizer.encode(text.lower() if lower else text).ids)), pad


def _padding(path: Path, tokenizer: Any) -> int:
    """The id of the padding, which a tower that reads the last token sees: from tokenizer_config.json or the file."""
    beside = path.with_name("tokenizer_config.json")
    name = read_json(beside).get("pad_token") if beside.is_file() else None
    if isinstance(name, dict):
        name = name.get("content")
    found = tokenizer.token_to_id(name) if isinstance(name, str) else (tokenizer.padding or {}).get("pad_id")
    if found is None:
        raise CheckpointError(f"{path}: which token pads a text is not said; tokenizer_config.json with pad_token does")
    return int(found)


def _wordpieces(path: Path, a: TextArchitecture) -> tuple[Encode, int]:
    names = path.read_text("utf-8").split("\n")
    if "[CLS]" not in names or "[UNK]" not in names:
        raise CheckpointError(
            f"{path}: no BERT vocabulary, which is a line for each wordpiece, [CLS] and [UNK] included"
        )
    first = names.index("[CLS]")
    tokenizer = _library("tokenizers").BertWordPieceTokenizer(str(path), lowercase=True)
    return (lambda text: [first, *tokenizer.encode(text, add_special_tokens=False).ids[: a.length - 1]]), 0


def _sentencepieces(path: Path, a: TextArchitecture) -> tuple[Encode, int]:
    library = _library("sentencepiece")
    try:
        pieces = library.SentencePieceProcessor(model_file=str(path))
    except (RuntimeError, OSError) as error:
        raise CheckpointError(f"{path}: no sentencepiece model that can be read: {error}") from error
    clean: Callable[[str], str] = canonical if a.sigmoid else str
    if pieces.piece_to_id("<eos>") == pieces.eos_id() >= 0:  # Gemma's, which SigLIP 2 was trained with
        end, pad, clean = pieces.eos_id(), max(pieces.pad_id(), 0), str.lower
    else:
        end = pad = pieces.piece_to_id("</s>")
    return (lambda text: [*pieces.encode(clean(text))[: a.length - 1], end]), pad


def canonical(text: str) -> str:
    """A text as SigLIP was trained on it: lower case, no punctuation, single spaces."""
    return " ".join(text.lower().translate(_NO_PUNCTUATION).split())
