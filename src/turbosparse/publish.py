"""A model folder goes to the hub, with a card of what was measured of it.

turbosparse publish mistral-sparse --repo me/Mistral-7B-dReLU --control control --dry-run
turbosparse publish mistral-sparse --repo me/Mistral-7B-dReLU --control control
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

from turbosparse import __version__, load
from turbosparse.base.errors import TurboSparseError
from turbosparse.base.folders import COMPANIONS, AnyPath, check_free, local_path, new_file
from turbosparse.base.progress import note
from turbosparse.hf import families
from turbosparse.hf.checkpoint import INDEX, Checkpoint
from turbosparse.hf.hub import is_hub_id
from turbosparse.hf.load import CODE, load_model, quiet
from turbosparse.packed.stats import FILE as STATS_FILE
from turbosparse.predictors.mask import find_predictor
from turbosparse.sharing.card import CARD, CHART, LOG, RECIPE, Known, draw, write_card

_OURS = (CARD, CHART, RECIPE, LOG, STATS_FILE, *CODE)
_FILES = (*_OURS, "config.json", INDEX, "*.safetensors", *COMPANIONS)  # nothing else is uploaded
SAME_LOGITS = 1e-2  # relative RMS: bf16, summed in another order
# loads a model as someone does who has not installed this package
_ALONE = """
import sys
sys.modules["turbosparse"] = None
import torch
from transformers import AutoModelForCausalLM
folder, ids, out = sys.argv[1], [int(i) for i in sys.argv[2].split()], sys.argv[3]
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
with torch.inference_mode():
    torch.save(model(torch.tensor([ids])).logits, out)
"""


@dataclass(frozen=True)
class Published:
    """What `publish` wrote; `url` is None of a dry run."""

    repo: str
    url: str | None
    card: str
    files: list[str]

    def __str__(self) -> str:
        if self.url is None:
            return f"nothing was uploaded; it would be {', '.join(self.files)}"
        return f"{self.url}: {len(self.files)} files"


def publish(
    model: AnyPath,
    *,
    repo: str,
    control: AnyPath | None = None,
    base: str | None = None,
    license: str | None = None,
    private: bool = False,
    update: bool = False,
    dry_run: bool = False,
    out: AnyPath | None = None,
    show: Annotated[Callable[[str], None] | None, Parameter(parse=False)] = None,
) -> Published:
    """Upload a model folder to the hub, with a model card of what was measured of it.

    What was not measured is not in the card. A README.md in the folder is taken in its place: write
    it with --dry-run and the folder as --out, edit it, then publish.

    Parameters
    ----------
    model
        Model folder, or packed folder. It is loaded first: with this package, and, unless it is
        packed, in a process without it, which must give the same logits.
    repo
        New repository of the hub, org/name.
    control
        Folder of the dense control; `analyse` both on the same text before.
    base
        Hub id of the model that this one was made from; by default as config.json or the recipe
        says.
    license
        Of the base, and so of this model, in the hub's words, such as apache-2.0; by default that
        of the base's own card.
    private
        Create the repository as private.
    update
        Upload into a repository that exists.
    dry_run
        Upload nothing; print the card, or write it to --out.
    out
        Folder for the card and its plot, with --dry-run.
    show
        Called with the card of a dry run; the command line prints it.
    """
    for name in filter(None, (repo, base)):
        if not is_hub_id(name):
            raise TurboSparseError(f"{name} is not a name of the hub; give org/name")
    if out and not dry_run:
        raise TurboSparseError("--out is for --dry-run: otherwise the card is uploaded")
    known = Known.of(local_path(model))
    own = known.folder / CARD
    if keep := own.exists() and not dry_run:
        note(f"{own} is taken as it is; remove it to have the card written anew")
        card = own.read_text(encoding="utf-8")
    else:
        card = write_card(
            known,
            repo=repo,
            control=Known.of(local_path(control)) if control else None,
            base=base,
            license=license,
            predictor=_predictor(known),
            alone=_runs_alone(known),
        )
    if dry_run:
        if out:
            check_free(local_path(out) / CARD)
            _write(known, card, local_path(out))
        elif show:
            show(card)
        return Published(repo, None, card, _names(known))
    api = _hub(repo)
    _check_loads(known)
    with tempfile.TemporaryDirectory() as work:
        for path in _files(known.folder):
            (Path(work) / path.name).symlink_to(path.resolve())
        if not keep:
            _write(known, card, Path(work))
        url = _upload(api, Path(work), repo, private=private, update=update)
    return Published(repo, url, card, _names(known))


def _predictor(known: Known) -> str | None:
    if known.packed:
        found = known.packed.header.ffn.predictor
    else:
        found = find_predictor(known.config, Checkpoint(known.folder))
    return str(found) if found else None


def _write(known: Known, card: str, out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    if known.profile:
        draw(known, out / CHART)
    with new_file(out / CARD) as work:
        work.write_text(card, encoding="utf-8")


def _files(folder: Path) -> list[Path]:
    """Those of a model; whatever else lies in its folder is nobody's business."""
    return [path for pattern in _FILES for path in folder.glob(pattern)]


def _names(known: Known) -> list[str]:
    """What is uploaded, the card and its plot included."""
    found = {path.name for path in _files(known.folder)}
    return sorted(found | {CARD} | ({CHART} if known.profile else set()))


# --- the hub --------------------------------------------------------------------------------------


def _hub(repo: str) -> Any:
    """The hub's client, which knows who is asking."""
    from huggingface_hub import HfApi

    api = HfApi(library_name="turbosparse", library_version=__version__)
    with _hub_errors(repo):
        api.whoami()
    return api


def _upload(api: Any, folder: Path, repo: str, *, private: bool, update: bool) -> str:
    with _hub_errors(repo):
        url = api.create_repo(repo, private=private or None, exist_ok=update)
        api.upload_folder(
            repo_id=repo,
            folder_path=folder,
            commit_message=f"Upload with turbosparse {__version__}",
        )
    return str(url)


@contextmanager
def _hub_errors(repo: str) -> Iterator[None]:
    """Turn what the hub's client raises into one line that says what to do."""
    from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError

    try:
        yield
    except LocalTokenNotFoundError:
        raise TurboSparseError(
            "the hub wants a token: run `hf auth login`, or set HF_TOKEN"
        ) from None
    except HfHubHTTPError as error:
        known = {
            401: "the hub does not know this token; run `hf auth login`, or set HF_TOKEN anew",
            403: f"your token may not write to {repo}; give one that may, or another --repo",
            409: f"{repo} exists already; choose another --repo, or add --update",
        }
        status = error.response.status_code
        said = f"{repo}: the hub answered {status} ({error.server_message or error})"
        raise TurboSparseError(known.get(status, said)) from error
    except Exception as error:  # of the network, and of the client's own many types
        raise TurboSparseError(
            f"{repo}: the hub cannot be used ({type(error).__name__}: {error}); check the network "
            f"and try again, with --update if {repo} is there by now"
        ) from error


# --- whether it loads -----------------------------------------------------------------------------


def _check_loads(known: Known) -> None:
    """Raise unless others can load the folder, and get what we get."""
    import torch

    folder, ids = known.folder, [token % known.config.vocab_size for token in range(3, 19)]
    if known.packed:
        known.packed.verify()
        load(folder).score(ids)
        return
    with quiet(), torch.inference_mode():
        ours = load_model(folder).eval()(torch.tensor([ids])).logits.float()
    if not _runs_alone(known):
        return
    theirs = _logits_alone(folder, ids)
    if not float((theirs - ours).norm() / ours.norm()) < SAME_LOGITS:
        raise TurboSparseError(
            f"{folder}: without turbosparse the model gives other logits; its modelling files are "
            "not those of this version: convert or train it again"
        )


def _runs_alone(known: Known) -> bool:
    """Whether transformers runs it without this package: the class is its own, or in the folder."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    own = known.kind.startswith(families.PREFIX)
    return not known.packed and (own or known.kind in CONFIG_MAPPING_NAMES)


def _logits_alone(folder: Path, ids: list[int]) -> Any:
    import torch

    with tempfile.TemporaryDirectory() as work:
        out = Path(work) / "logits.pt"
        words = [str(folder.resolve()), " ".join(map(str, ids)), str(out)]
        done = subprocess.run(
            [sys.executable, "-c", _ALONE, *words],
            cwd=work,
            env=os.environ | {"HF_HOME": work, "HF_HUB_OFFLINE": "1"},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
        )
        if done.returncode:
            last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
            raise TurboSparseError(f"{folder} does not load without turbosparse: {last}")
        return torch.load(out).float()
