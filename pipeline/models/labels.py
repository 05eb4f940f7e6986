"""Names of the classes, in the order of the model's logits: from a checkpoint's config, or from a file of the user's.

ImageNet-1k comes in two orders. Models count the WordNet synsets in ascending order (0 = tench); the development kit of
the challenge counts from 1 in an order of its own (1 = kit fox). Under the latter every label would be wrong.
"""

import hashlib
import json
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from pipeline.small_files import Unreadable, read_small
from pipeline.storage import redact
from schemas.errors import CheckpointError, SpecError

# BEiT leaves out two of the 21,843 classes of Google's ImageNet-21k.
GOOGLE_21K, BEIT_21K = 21_843, 21_841
LEFT_OUT_BY_BEIT = (9205, 15027)
IMAGENET_1K = 1000
KIT_FOX = re.compile(r"\bn02119789\b|\bkit fox\b", re.IGNORECASE)


class LabelFile(NamedTuple):
    """Names in the order of the logits, and the SHA-256 of the file."""

    names: tuple[str, ...]
    digest: str


def read_label_file(url: str, count: int, storage_options: Mapping[str, Any]) -> LabelFile:
    """Names of `count` classes from one label a line, or from JSON: a list, `id2label`, or a config that holds it.

    Raises SpecError if the file cannot be read, names another number of classes, or is in the order of ImageNet's
    development kit.
    """
    where = f"--label-file {redact(url)}"
    try:
        data = read_small(url, storage_options)
        text = data.decode("utf-8-sig")
    except Unreadable as error:
        raise SpecError(f"{where}: cannot be read ({error}); give a list of labels") from error
    except UnicodeDecodeError as error:
        raise SpecError(f"{where}: not UTF-8 text ({error}); convert it") from error
    names = _from_json(text, where) if text.lstrip()[:1] in {"{", "["} else _from_lines(text, where)
    return LabelFile(_checked(names, count, where), hashlib.sha256(data).hexdigest())


def _from_lines(text: str, where: str) -> list[str]:
    lines = [line.strip() for line in text.rstrip().splitlines()]
    blank = next((number for number, line in enumerate(lines, 1) if not line), None)
    if blank is not None:
        raise SpecError(f"{where}: line {blank} is empty; each line is the label of one class")
    return lines


def _from_json(text: str, where: str) -> list[str]:
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise SpecError(f"{where}: begins like JSON, but is not ({error})") from error
    if isinstance(content, dict) and isinstance(content.get("id2label"), dict):
        content = content["id2label"]
    if isinstance(content, dict):
        content = _by_index(content, where)
    odd = next((item for item in content if not isinstance(item, str)), None)
    if odd is not None:
        raise SpecError(f"{where}: {odd!r:.80} is no label; expected text for each class")
    return list(content)


def _by_index(content: Mapping[str, Any], where: str) -> list[Any]:
    if not all(key.isascii() and key.isdigit() for key in content):
        raise SpecError(f"{where}: the keys of id2label are class numbers; found {next(iter(content), '')!r:.80}")
    by_index = {int(key): name for key, name in content.items()}
    if sorted(by_index) == list(range(1, len(by_index) + 1)):
        raise SpecError(f"{where}: counts classes from 1; the classes of a model count from 0")
    if len(by_index) != len(content) or sorted(by_index) != list(range(len(by_index))):
        raise SpecError(f"{where}: the keys are not 0 to {len(content) - 1}, each once")
    return [by_index[index] for index in range(len(by_index))]


def _checked(names: list[str], count: int, where: str) -> tuple[str, ...]:
    if (len(names), count) == (GOOGLE_21K, BEIT_21K):
        names = [name for index, name in enumerate(names) if index not in LEFT_OUT_BY_BEIT]
    if len(names) != count:
        hint = "; take out the first, which stands for background" if len(names) == count + 1 == 1001 else ""
        raise SpecError(f"{where}: {len(names):,} labels, but the model has {count:,} classes{hint}")
    if count == IMAGENET_1K and KIT_FOX.search(names[0]):
        raise SpecError(
            f"{where}: begins with {names[0]!r}: this is the order of ImageNet's development kit (1 = kit fox), in "
            "which every label would be wrong. Models count the synsets in ascending order (0 = n01440764, tench; "
            "278 = n02119789, kit fox): give a list in that order"
        )
    return tuple(names)


def config_labels(config: Mapping[str, Any], count: int, where: str) -> tuple[str, ...]:
    """Names from a config's `id2label` (Hugging Face) or `label_names` (timm), `LABEL_i` where it has none.

    timm writes a list or a map from numbers, beside `pretrained_cfg` or, of a model that it loaded itself, in it.
    Converted BEiT checkpoints number their 21,841 classes as the 21,843 of Google. Raises CheckpointError if the names
    do not belong to the classes.
    """
    names = config.get("id2label")
    in_timm = config.get("label_names")
    if not in_timm and not names:
        # Those of the checkpoint that this one was trained from, which may have had other classes.
        loaded = (config.get("pretrained_cfg") or {}).get("label_names")
        in_timm = loaded if isinstance(loaded, dict) or len(loaded or ()) == count else None
    if isinstance(in_timm, list):
        names = dict(enumerate(in_timm))
    elif isinstance(in_timm, dict):  # by number, so that some may be left out
        names = {str(i): f"LABEL_{i}" for i in range(count)} | in_timm
    if not names or not count:
        return tuple(f"LABEL_{i}" for i in range(count))
    if not isinstance(names, dict) or not all(str(key).isascii() and str(key).isdigit() for key in names):
        raise CheckpointError(f"{where}: what the config has as labels does not map class numbers to names")
    by_index = {int(index): str(label) for index, label in names.items()}
    if count == BEIT_21K and max(by_index) == GOOGLE_21K - 1:
        kept = sorted(set(by_index) - set(LEFT_OUT_BY_BEIT))
        by_index = {place: by_index[index] for place, index in enumerate(kept)}
    if sorted(by_index) != list(range(count)):
        raise CheckpointError(f"{where}: the config names {len(names)} classes, but the classifier has {count}")
    return tuple(by_index[i] for i in range(count))
