"""Training: one rank's process, from tokenized splits to a committed final checkpoint.

`rank.py` is what each rank runs · `methods.py` says which weights are trained, `merge.py` makes the whole model of
them and the base · `engine.py` turns a recipe into TrainingArguments and a DeepSpeed
config · `trainer.py` is transformers.Trainer with our batches, loss and checkpoints · `stream.py`
the rows as they come · `saving.py` what Trainer's saves and loads are replaced by, `snapshot.py` the copy that is
written beside the loop · `checkpoint.py` writes and reads the training state without pickle, of it
`shards.py` the optimizer's, `fragments.py` where each engine keeps that · `preemption.py` lets all
ranks stop at the same step · `selection.py` says which step's model is taken, and when training gets no further ·
`progress.py` shows it · `failures.py` explains what torch raises · `packing.py` rows end to end · `varlen.py` those
without padding, `attention.py` whether a model takes them · `memory.py` what a training will hold, `interval.py` how
often to save · `versions.py` what transformers 5 calls otherwise.
"""

from job.train.interval import GPU_MTBF_H, SNAPSHOT_GB_S, estimate_step, find_interval
from job.train.memory import HOST, measure_activations, measure_device
from job.train.merge import merge_run
from job.train.methods import estimate_trained
from job.train.rank import run_rank

__all__ = [
    "GPU_MTBF_H", "HOST", "SNAPSHOT_GB_S", "estimate_step", "estimate_trained", "find_interval", "measure_activations",
    "measure_device", "merge_run", "run_rank",
]  # fmt: skip
