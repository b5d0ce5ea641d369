"""Training: one rank's process, from tokenized splits to a committed final checkpoint.

`rank.py` is what each rank runs · `engine.py` turns a recipe into TrainingArguments and a DeepSpeed
config (the only user of deepspeed) · `trainer.py` is transformers.Trainer with our batches, loss
and checkpoints · `checkpoint.py` writes and reads the training state
without pickle · `preemption.py` lets all ranks stop at the same step.
"""

from job.train.rank import run_rank

__all__ = ["run_rank"]
