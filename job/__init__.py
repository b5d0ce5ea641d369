"""finetune-job: one job that fine-tunes, exports, proves and releases a Hugging Face model.

`job.opening` starts a node's ranks, `job.pipeline` tells the story, stage by stage; each
sub-package is one room with one concern and says in its own docstring what enters and what leaves.
Importing `job` imports nothing heavy.
"""

__version__ = "0.1.0"
