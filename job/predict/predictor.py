"""Which reader a bundle needs, by the architecture and the problem_type that its config.json names."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

from job.errors import NotFound
from job.predict.bundle import fetch_bundle
from job.predict.filling import Filler
from job.predict.labels import Classifier, MultiLabelClassifier, Regressor
from job.predict.reader import Reader
from job.predict.rewriting import Rewriter
from job.predict.spans import Answerer
from job.predict.tags import Tagger
from job.predict.tokens import Input, read_json
from job.predict.writing import MAX_NEW_TOKENS, Writer
from job.tasks import get_task

_READERS: dict[str, type[Reader]] = {
    "text-classification:multi_label_classification": MultiLabelClassifier,
    "text-classification:regression": Regressor,
    "text-classification": Classifier,
    "token-classification": Tagger,
    "question-answering": Answerer,
    "masked-lm": Filler,
}

_WRITERS: dict[str, type[Writer]] = {"causal-lm": Writer, "seq2seq-lm": Rewriter}


class Predictor(Protocol):
    """An open bundle: `threads` compute its ONNX file `model_path`, `bench_rows` texts tell how fast that is."""

    model_path: Path
    threads: int
    bench_rows: int

    def predict(self, texts: Sequence[Input]) -> list[dict[str, Any]]:
        """Return an answer for each text, in order."""

    def stream(self, texts: Iterable[Input]) -> Iterator[dict[str, Any]]:
        """Yield an answer for each text, reading no more than is needed."""


def open_predictor(
    uri: str,
    cache: Path,
    precision: str = "auto",
    *,
    allow_http: bool = False,
    threads: int = 0,
    max_new_tokens: int = MAX_NEW_TOKENS,
) -> Predictor:
    """Fetch, verify and load the bundle at `uri`; see `fetch_bundle` for its forms, `threads` 0: all processors.

    Raises NotFound (13) for a model of a task that nobody here reads.
    """
    folder = fetch_bundle(uri, cache, precision, allow_http)
    config = read_json(folder / "config.json")
    names = config.get("architectures")
    architecture = str(names[0]) if isinstance(names, list) and names else "none"
    for kind, reader in _READERS.items():
        told = ":" not in kind or config.get("problem_type") == get_task(kind).problem_type
        if told and architecture.endswith(get_task(kind).architectures):
            return reader(folder, precision, threads, get_task(kind))
    for kind, writer in _WRITERS.items():
        if architecture.endswith(get_task(kind).architectures):
            return writer(folder, precision, threads, max_new_tokens)
    endings = dict.fromkeys(get_task(kind).architectures[0] for kind in (*_READERS, *_WRITERS))
    known = ", ".join(f"…{ending}" for ending in endings)
    raise NotFound(
        f"{folder / 'config.json'}: architectures: {architecture}; prediction knows {known}; name the release of such "
        "a model"
    )
