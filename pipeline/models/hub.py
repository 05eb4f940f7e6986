"""Models by their hub names, through huggingface_hub and its cache. HF_HUB_OFFLINE is honoured."""

import errno
import os
from contextlib import suppress
from pathlib import Path

from pipeline.models.weights import ADAPTER_CONFIG, SAFETENSORS, TORCH, is_weight_file
from pipeline.storage import redact
from pipeline.store_errors import NO_ROOM
from schemas.errors import CheckpointError

# The last of them says of an adapter which model it belongs to.
SMALL_FILES = ("config.json", "preprocessor_config.json", "processor_config.json", ADAPTER_CONFIG)
TEXT_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.txt", "spiece.model")
# Of a hub model with safetensors. The files of one without are looked at when they are found in its folder.
_PREFERRED = [*SMALL_FILES, *TEXT_FILES, *SAFETENSORS, "model-*-of-*.safetensors"]

# What no network says: it is the disk of the hub's cache that refuses.
_UNKEPT = NO_ROOM | {errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR}


def from_hub(name: str, revision: str | None) -> Path:
    """The model's folder in the hub's cache, fetched if need be; it goes by the name of its commit.

    Raises CheckpointError for an unknown model or revision, or a hub that cannot be reached.
    """
    from huggingface_hub.errors import (  # type: ignore[attr-defined]  # HTTPError is re-exported
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        HTTPError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        return _fetch(name, revision)
    except HFValidationError:
        raise CheckpointError(nowhere(name)) from None
    except GatedRepoError as error:  # one of those below, to huggingface_hub
        raise CheckpointError(
            f"{name}: this model is gated. Accept its terms at https://huggingface.co/{name}, then log in here "
            "(hf auth login)"
        ) from error
    except RepositoryNotFoundError as error:
        raise CheckpointError(
            f"{name}: no such folder here and no such model on the hub. Check the spelling; a private model needs a "
            "token (hf auth login)."
        ) from error
    except RevisionNotFoundError as error:
        raise CheckpointError(f"{name}: the hub has the model, but no revision {revision!r}") from error
    except HfHubHTTPError as error:
        status = error.response.status_code
        if status != 429 and status < 500:
            raise CheckpointError(f"{name}: the hub refuses: {error}") from error
        said = str(error).partition("\n")[0]
        why = f"the hub answers: {said}. Try again later, or fetch it elsewhere"
        return _fetched_before(name, revision, _unreachable(name, why))
    except (HTTPError, OSError):
        why = "the hub cannot be reached. Fetch it where there is a network"
        return _fetched_before(name, revision, _unreachable(name, why))


def nowhere(model: str) -> str:
    """The refusal of what names no model at all."""
    return f"{model}: no such folder; a model is a folder, an object-store prefix or a hub name"


def _fetch(name: str, revision: str | None) -> Path:
    from huggingface_hub import constants, snapshot_download

    commit, wanted = _on_the_hub(name, revision)
    try:
        # By the commit, of which huggingface_hub does not ask again, as it would without a time limit.
        folder = Path(snapshot_download(name, revision=commit, allow_patterns=wanted))
    except RuntimeError as error:  # hf_xet's, of its storage as of the disk
        said = redact(str(error))
        why = f"{said}. Try again later; with HF_HUB_DISABLE_XET=1 it is fetched without hf_xet"
        return _fetched_before(name, revision, f"{name}: cannot be fetched: {why}")
    except OSError as error:
        if error.errno not in _UNKEPT:
            raise
        why = f"{error.strerror}. Make room there and see that it can be written, or name another folder with HF_HOME"
        return _fetched_before(name, revision, f"{name}: cannot be kept in {constants.HF_HUB_CACHE}: {why}")
    if revision != commit:
        _remember(folder, revision or constants.DEFAULT_REVISION)
    return folder


def _remember(folder: Path, branch: str) -> None:
    """Keep the commit of a branch or tag where huggingface_hub does, for a time without a network."""
    ref = folder.parents[1] / "refs" / branch
    if ref.is_file() and ref.read_text() == folder.name:
        return
    with suppress(OSError):  # a cache that is filled but read-only
        ref.parent.mkdir(parents=True, exist_ok=True)
        partial = ref.with_name(f"{ref.name}.{os.getpid()}.partial")
        partial.write_text(folder.name)
        partial.rename(ref)


def _fetched_before(name: str, revision: str | None, otherwise: str) -> Path:
    """The model's folder in the hub's cache. Raises CheckpointError, that says `otherwise`, where files are lacking."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        # Of the whole repository, which huggingface_hub remembers by its list of files, no more was ever fetched.
        return Path(snapshot_download(name, revision=revision, local_files_only=True, allow_patterns=_PREFERRED))
    except LocalEntryNotFoundError as error:
        raise CheckpointError(otherwise) from error


def _on_the_hub(name: str, revision: str | None) -> tuple[str | None, list[str]]:
    """The commit, and the files to fetch: safetensors where the model has them, else `.bin`.

    Raises CheckpointError where it has neither, nor an adapter, which is refused once it is there.
    """
    from huggingface_hub import HfApi, constants

    info = HfApi().model_info(name, revision=revision, timeout=constants.HF_HUB_ETAG_TIMEOUT)
    names = {sibling.rfilename for sibling in info.siblings or []}
    if any(each in names for each in SAFETENSORS):
        return info.sha, _PREFERRED
    if not names & {*TORCH, ADAPTER_CONFIG}:
        raise CheckpointError(_without_weights(name, sorted(names)))
    return info.sha, [*SMALL_FILES, *TEXT_FILES, *TORCH, "pytorch_model-*-of-*.bin"]


def _without_weights(name: str, names: list[str]) -> str:
    others = [each for each in names if is_weight_file(each.rpartition("/")[2])]
    advice = "Name another model"
    if others:
        advice = (
            f"Fetch the one that is meant (hf download {name} {others[0]} --local-dir FOLDER), beside a config.json "
            f"(a .npz needs none), and give FOLDER/{others[0]} as --model"
        )
    found = ", ".join(others[:20]) or "none"
    return f"{name}: has neither {SAFETENSORS[0]} nor {TORCH[0]}. Its weight files: {found}. {advice}"


def _unreachable(name: str, why: str) -> str:
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        why = "HF_HUB_OFFLINE is set. Fetch it where there is a network"
    return (
        f"{name}: no such folder here, not in the hub's cache ({constants.HF_HUB_CACHE}), and {why} "
        f"(hf download {name}) and give its folder as --model."
    )
