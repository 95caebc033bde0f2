"""Repositories of the Hugging Face Hub: `hf://org/repo` or `hf://org/repo@revision`, as folders in its cache.

`huggingface_hub` fetches: the cache, the tokens (HF_TOKEN) and the offline mode (HF_HUB_OFFLINE) are its own. What is
fetched is only what is read here: a config, files of preprocessing and tokenizer, and the weights once, not in each of
the formats that a repository has them in.
"""

import re
from collections.abc import Collection
from pathlib import Path

from clip_jax.errors import UserError
from clip_jax.weights.download import reason_of
from clip_jax.weights.tokenizer_classes import CLASSES

PREFIX = "hf://"
TIMEOUT = 10  # seconds for an answer

# The first pair that a repository has is fetched: files that can run nothing come before those that could.
MODELS = (
    ("open_clip_config.json", "open_clip_model.safetensors"),
    ("config.json", "model.safetensors"),
    ("config.json", "model.safetensors.index.json"),
    ("open_clip_config.json", "open_clip_pytorch_model.bin"),
    ("config.json", "pytorch_model.bin"),
    ("config.json", "pytorch_model.bin.index.json"),
)
PIECES = {"model.safetensors.index.json": "model-*.safetensors", "pytorch_model.bin.index.json": "pytorch_model-*.bin"}
COMPANIONS = (
    *("preprocessor_config.json", "processor_config.json"),
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"),
    *sorted({name for known in CLASSES.values() for name in known.vocab_files}),
)


def fetch(source: str) -> Path:
    """Returns the folder with the files of `hf://org/repo` or `hf://org/repo@revision` that are read here.

    What the cache has is not fetched again. Where the hub does not answer, the cache alone decides.

    Raises:
        UserError: the name is none, the repository is not there, not for everybody or no model, or it cannot be
            fetched; says what to do.
    """
    repo, revision = _parsed(source)
    import huggingface_hub  # here: it takes a while, and most models come from elsewhere

    try:
        info = huggingface_hub.HfApi().model_info(repo, revision=revision, timeout=TIMEOUT)
    except Exception as error:  # its own errors and its transport's have no base in common, in no version the same
        return _cached(source, repo, revision, error)
    wanted = _wanted(source, {sibling.rfilename for sibling in info.siblings or ()})
    try:
        return Path(huggingface_hub.snapshot_download(repo, revision=revision, allow_patterns=wanted))
    except Exception as error:
        raise _explained(source, repo, error) from error


def _parsed(source: str) -> tuple[str, str]:
    """Returns (repository, revision)."""
    found = re.fullmatch(re.escape(PREFIX) + r"([\w.-]+/[\w.-]+)(?:@([^\s@]+))?", source, re.ASCII)
    if not found:
        raise UserError(f"{source!r} should be {PREFIX}ORGANISATION/REPOSITORY, or that and @REVISION")
    return found[1], found[2] or "main"


def _wanted(source: str, names: Collection[str]) -> list[str]:
    """Returns the names, or patterns, of the files to fetch."""
    found = next((pair for pair in MODELS if set(pair) <= set(names)), None)
    if found is None:
        pairs = ", ".join(" with ".join(pair) for pair in MODELS)
        raise UserError(f"{source} is no model that is read here; it should have one of these: {pairs}")
    pieces = [PIECES[found[1]]] if found[1] in PIECES else []
    return [*found, *pieces, *COMPANIONS]


def _cached(source: str, repo: str, revision: str, error: Exception) -> Path:
    """Returns what the cache has of a repository that cannot be asked for; the error is why."""
    import huggingface_hub
    from huggingface_hub.errors import HFValidationError, RevisionNotFoundError

    if isinstance(error, HFValidationError | RevisionNotFoundError):
        raise _explained(source, repo, error) from error
    try:  # with no patterns it would ask for all files of the repository, and we have fetched only some
        folder = huggingface_hub.snapshot_download(repo, revision=revision, local_files_only=True, allow_patterns=[])
    except Exception:
        raise _explained(source, repo, error) from error
    return Path(folder)


def _explained(source: str, repo: str, error: Exception) -> UserError:
    """Returns the error that says what became of a download, and what to do."""
    from huggingface_hub import constants, errors

    page = f"{constants.ENDPOINT}/{repo}"
    log_in = "log in with `hf auth login`, or set HF_TOKEN"
    by_hand = f"or put the files of {page} into a folder by hand, and give its path"
    reason = reason_of(error).strip().partition("\n")[0]
    if isinstance(error, errors.GatedRepoError):
        reason = f"it is not for everybody: ask for access at {page}, then {log_in}"
    elif isinstance(error, errors.RepositoryNotFoundError):
        reason = (
            f"{constants.ENDPOINT} has no such repository, or does not show it to everybody: mend the name, or {log_in}"
        )
    elif isinstance(error, errors.RevisionNotFoundError):
        reason = f"the repository has no such revision: choose one of {page}/commits, or leave it out for the newest"
    elif isinstance(error, errors.OfflineModeIsEnabled):
        reason = f"HF_HUB_OFFLINE is set, and {constants.HF_HUB_CACHE} does not have it: unset that, {by_hand}"
    elif not isinstance(error, errors.HFValidationError):
        reason = f"{reason}; try again with a network that reaches {constants.ENDPOINT}, {by_hand}"
    return UserError(f"cannot fetch {source}: {reason}")
