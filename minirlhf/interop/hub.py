"""Models and datasets by their names on the Hugging Face hub, through huggingface_hub and its cache.

    org/name  org/name@revision                   a model, where a checkpoint is imported
    hub:org/name[@revision][:[config/]split]      a dataset, where a source of data is named

Only wanted files are fetched, and none of them is a pickle.  HF_HOME, HF_TOKEN, HF_ENDPOINT and
HF_HUB_OFFLINE mean what they mean to huggingface_hub; without a network, what is in its cache is taken.
"""

from __future__ import annotations

import contextlib
import errno
import glob
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

from minirlhf import UserError
from minirlhf.support.files import sha256_of
from minirlhf.support.text import one_line

PREFIX = "hub:"
REPOSITORY = r"([A-Za-z0-9_][\w.-]*/[A-Za-z0-9_][\w.-]*)"
MODEL = re.compile(rf"(?:{PREFIX})?{REPOSITORY}(?:@([^\s:@]+))?", re.ASCII)
DATASET = re.compile(rf"{PREFIX}{REPOSITORY}(?:@([^\s:@]+))?(?::([^\s:@]+))?", re.ASCII)
LOGIN = "log in with `hf auth login`, or set HF_TOKEN"

DATA = (".parquet", ".jsonl", ".jsonl.gz", ".json")  # where a split is there in several, the first is taken
NOT_DATA = {"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json", "config.json"}
SHARD = re.compile(r"(.+?)[-_.]?\d{5}-of-\d{5}(?:-[0-9a-f]{16})?")  # train-00000-of-00002
NUMBER = re.compile(r"(?:part[-_.]?)?\d+")  # of files in a split's own folder
MOST_NAMES = 20  # of splits in a message


def is_model(source: str) -> bool:
    """Whether `source` may be a model's name on the hub."""
    return MODEL.fullmatch(source) is not None


class Repository:
    """The files of a model or a dataset at one commit.

    `names`: what it holds; without a network, what of it is in the cache.  Everything raises UserError.
    """

    def __init__(self, name: str, kind: str, revision: str | None):
        """kind: "model" or "dataset"; revision: a branch, a tag or a commit; None: main."""
        self.name, self.kind, self.revision = name, kind, revision
        self.hub = _package(self)
        with self._one_line():
            try:
                info = self.hub.HfApi().repo_info(name, repo_type=kind, revision=revision)
                self.commit, self.names = info.sha, sorted(file.rfilename for file in info.siblings or ())
            except self.hub.errors.RevisionNotFoundError:
                raise
            except Exception as error:  # of the hub, or of the library that speaks to it
                folder = self._cached()
                if folder is None:
                    raise
                files = (file.relative_to(folder) for file in folder.rglob("*") if file.is_file())
                self.commit, self.names = folder.name, sorted(file.as_posix() for file in files)
                if not isinstance(error, self.hub.errors.OfflineModeIsEnabled):
                    print(f"{self}: {one_line(error):.100}: commit {self.commit[:12]} in the cache is used")

    def __str__(self) -> str:
        return f"{self.name}@{self.revision}" if self.revision else self.name

    def fetch(self, names: list[str]) -> Path:
        """The folder, inside the cache, in which the files `names` are after this."""
        wanted = [glob.escape(name) for name in names]
        with self._one_line():
            folder = self.hub.snapshot_download(
                self.name, repo_type=self.kind, revision=self.revision, allow_patterns=wanted
            )
        if Path(folder).name != self.commit:
            raise UserError(f"{self}: was changed on the hub while it was read: run this again")
        return Path(folder)

    def _cached(self) -> Path | None:
        find = self.hub.snapshot_download
        try:
            folder = find(
                self.name,
                repo_type=self.kind,
                revision=self.revision,
                local_files_only=True,
                allow_patterns=[],  # none has to be there
            )
        except self.hub.errors.LocalEntryNotFoundError:
            return None
        return Path(folder) if Path(folder).is_dir() else None

    @contextlib.contextmanager
    def _one_line(self) -> Iterator[None]:
        """A UserError for whatever the package raises inside."""
        try:
            yield
        except Exception as error:  # it raises its own exceptions, and those of its HTTP library
            raise UserError(f"{self}: {self._reason(error)}") from error

    def _reason(self, error: Exception) -> str:
        errors, status = self.hub.errors, getattr(getattr(error, "response", None), "status_code", None)
        page = f"{self.hub.constants.ENDPOINT}/{'datasets/' if self.kind == 'dataset' else ''}{self.name}"
        here = "no such folder here, and " if self.kind == "model" else ""
        if isinstance(error, errors.GatedRepoError):
            return f"is gated: ask for access at {page}, then {LOGIN}"
        if isinstance(error, errors.RepositoryNotFoundError):
            return f"{here}no such {self.kind} on the hub, or a private one: correct the name, or {LOGIN}"
        if isinstance(error, errors.RevisionNotFoundError):
            return f"has no revision {self.revision}: name a branch, a tag or a commit of {page}"
        if isinstance(error, errors.OfflineModeIsEnabled) or self.hub.constants.HF_HUB_OFFLINE:
            folder = ", or name a folder that is here" if self.kind == "model" else ""
            offline = "not, or not all of it, in the cache, and HF_HUB_OFFLINE is set"
            return f"{offline}: unset it, or set HF_HOME{folder}"
        if isinstance(error, errors.HFValidationError):
            return f"is no name that the hub has: {one_line(error)}"
        if status in (401, 403):
            return f"the hub refuses access ({status}): {LOGIN}"
        if status is not None:
            return f"the hub answers {status}: try again later, or name a local folder"
        full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT)
        if isinstance(error, OSError) and (full or error.filename is not None):
            return f"the cache cannot be written ({one_line(error)}): make room, or set HF_HOME"
        return (
            f"{here}the hub cannot be reached ({one_line(error):.150}), nor is it in the cache: "
            "correct the name, or go online once"
        )


def _package(repository: Repository) -> ModuleType:
    try:
        import huggingface_hub
        import huggingface_hub.constants
        import huggingface_hub.errors
    except ImportError:
        here = "no such folder here; " if repository.kind == "model" else ""
        raise UserError(
            f"{repository}: {here}reading from the hub needs a package: pip install 'minirlhf[hub]'"
        ) from None
    return huggingface_hub


def open_model(source: str) -> Repository:
    """The repository of `org/name` or `org/name@revision`."""
    return Repository(MODEL.fullmatch(source)[1], "model", MODEL.fullmatch(source)[2])


# ---------------------------------------------------------------- datasets


def dataset_files(source: str) -> tuple[list[Path], list[str]]:
    """The files of a split, in the cache, and what to record of each: commit, name and sha256.

    source: hub:org/name[@revision][:[config/]split]; without a split train, or the only one."""
    found = DATASET.fullmatch(source)
    if found is None:
        raise UserError(f"{source}: expected hub:org/name, hub:org/name:split or hub:org/name@revision:split")
    repository = Repository(found[1], "dataset", found[2])
    try:
        names = choose(repository.names, found[3])
    except UserError as error:
        raise UserError(f"{source}: {error}") from None
    folder = repository.fetch(names)
    files = [folder / name for name in names]
    at = f"{PREFIX}{repository.name}@{repository.commit}"
    recorded = [f"{at}:{name} sha256 {sha256_of(folder / name)}" for name in names]
    return files, recorded


def choose(names: list[str], wanted: str | None) -> list[str]:
    """Those of a dataset's files that hold a split, in order; UserError with the list of all splits.

    wanted: SPLIT, CONFIG/SPLIT or None.  Files are told by the usual layouts, see split_of."""
    found: dict[tuple[str, str], dict[str, list[str]]] = {}
    for name in names:
        suffix = next((suffix for suffix in DATA if name.endswith(suffix)), None)
        hidden = any(part.startswith((".", "_")) for part in name.split("/"))
        if suffix and not hidden and name.rpartition("/")[2] not in NOT_DATA:
            key = split_of(name.removesuffix(suffix))
            found.setdefault(key, {}).setdefault(suffix, []).append(name)
    if not found:
        raise UserError(
            f"holds no {', '.join(DATA)} file: the hub's own conversion may: add @refs/convert/parquet"
        )
    several = len({config for config, _ in found}) > 1
    config, _, split = (wanted or "").rpartition("/")
    fits = [key for key in found if key[0] == config or not config]
    fits = [key for key in fits if key[1] == split or not split]
    if not split and len(fits) > 1:
        fits = [key for key in fits if key[1] == "train"]
    if len(fits) != 1:
        labels = sorted(f"{config}/{split}" if several else split for config, split in found)
        shown = ", ".join(labels[:MOST_NAMES]) + ", ..." * (len(labels) > MOST_NAMES)
        what = f"has no split {wanted}" if wanted and not fits else "has several configs or splits"
        raise UserError(f"{what}: name one as :SPLIT after the dataset's name: {shown}")
    by_suffix = found[fits[0]]
    return sorted(by_suffix[next(suffix for suffix in DATA if suffix in by_suffix)])


def split_of(path: str) -> tuple[str, str]:
    """(config, split) of a data file's path without its suffix; a config without a name is "default".

    train | data/train-00000-of-00002 | main/test-00000-of-00001 | default/train/0000 | data/train/part-1"""
    *folders, file = path.split("/")
    if shard := SHARD.fullmatch(file):
        split = shard[1]
    elif NUMBER.fullmatch(file) and folders:
        split = folders.pop()
    else:
        split = file
    return "/".join(folders[folders[:1] == ["data"] :]) or "default", split
