"""Answers from a released bundle, without torch or transformers.

Enters: a release in a store or a folder, and texts. Leaves: for each text what its model says: labels, entities, an
answer, what a mask hides, or what a language model writes on. Files: `inputs.py` texts from lines, JSON and CSV ·
`bundle.py` which files are needed, fetched once and verified · `tokens.py` from texts to padded arrays ·
`predictor.py` which reader a bundle needs · `reader.py` what those have in common that read: `labels.py`, `tags.py`,
`spans.py`, `filling.py` · `writing.py` decoders, `rewriting.py` those behind an encoder · `runtime.py` the ONNX Runtime
session · `bench.py` how fast that is.
"""

from job.predict.bench import measure_speed
from job.predict.inputs import open_texts, split_pair
from job.predict.predictor import open_predictor

__all__ = ["measure_speed", "open_predictor", "open_texts", "split_pair"]
