"""Answers from a released bundle, without torch or transformers.

Enters: a release in a store or a folder, and texts. Leaves: one label with its probability for
each text. Files: `inputs.py` texts from lines, JSON and CSV · `bundle.py` which files are needed,
fetched once and verified · `tokens.py` from texts to padded arrays · `session.py` the ONNX Runtime
session, from arrays to labels · `bench.py` how fast that is.
"""

from job.predict.bench import measure_speed
from job.predict.inputs import open_texts, split_pair
from job.predict.session import Predictor, open_predictor

__all__ = ["Predictor", "measure_speed", "open_predictor", "open_texts", "split_pair"]
