"""Data: a recipe's `data` section in, tokenized splits on disk out.

`sources.py` finds and reads rows (the only user of `datasets`) · `columns.py` turns rows into
checked examples · `splits.py` holds rows out and finds leaks · `tokenize.py` makes token tables,
cached by content · `fetch.py` runs these in order · `prepared.py` finds what it did before ·
`batching.py` deals global batches to ranks · `prompts.py` what a model that writes is rehearsed with ·
`assets.py` fetches the quickstart's model and texts.
"""

from job.data.batching import derive_micro_batch
from job.data.fetch import fetch_sources, load_tokenizer
from job.data.splits import draw_shots
from job.data.tokenize import TokenTable, save_array

__all__ = ["TokenTable", "derive_micro_batch", "draw_shots", "fetch_sources", "load_tokenizer", "save_array"]
