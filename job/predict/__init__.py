"""Answers from a released bundle, without torch or transformers.

Enters: a release in a store or a folder, and texts. Leaves: one label with its probability for
each text. Files: `bundle.py` which files are needed, fetched once and verified · `tokens.py` from
texts to padded arrays · `session.py` the ONNX Runtime session, from arrays to labels.
"""

from job.predict.session import Predictor, open_predictor

__all__ = ["Predictor", "open_predictor"]
