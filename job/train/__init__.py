"""Training: one rank's process, from tokenized splits to a committed final checkpoint.

`rank.py` is what each rank runs · `methods.py` says which weights are trained, `merge.py` makes the whole model of
them and the base · `engine.py` turns a recipe into TrainingArguments and a DeepSpeed
config · `trainer.py` is transformers.Trainer with our batches, loss and checkpoints · `stream.py`
the rows as they come · `saving.py` what Trainer's saves and loads are replaced by, `snapshot.py` the copy that is
written beside the loop · `checkpoint.py` writes and reads the training state without pickle, of it
`shards.py` the optimizer's, `fragments.py` where each engine keeps that · `preemption.py` lets all
ranks stop at the same step · `selection.py` says which step's model is taken, and when training gets no further ·
`progress.py` shows it · `failures.py` explains what torch raises · `packing.py` rows end to end · `varlen.py` those
without padding, `attention.py` whether a model takes them · `memory.py` what a training will hold, `cost.py` what a
checkpoint costs, `interval.py` how often to save · `versions.py` what transformers 5 calls otherwise.
"""

from job.train.cost import ON_GPUS, ON_PROCESSORS, Saved, estimate_cost
from job.train.engine import decide_precision, decide_zero_stage
from job.train.interval import estimate_step, measure_flops
from job.train.memory import HOST, measure_activations, measure_device
from job.train.merge import merge_run
from job.train.methods import estimate_trained
from job.train.rank import run_rank

__all__ = [
    "HOST", "ON_GPUS", "ON_PROCESSORS", "Saved", "decide_precision", "decide_zero_stage", "estimate_cost",
    "estimate_step", "estimate_trained", "measure_activations", "measure_device", "measure_flops", "merge_run",
    "run_rank",
]  # fmt: skip
