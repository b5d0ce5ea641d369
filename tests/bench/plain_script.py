"""The peer of `job run`: a fine-tuning script as tutorials write it, on plain transformers.Trainer.

python tests/bench/plain_script.py MODEL CSV OUTPUT [--steps N] [--save-steps N] [--resume] [--marker FILE]

After its first optimizer step it touches the marker.
"""

import argparse
from pathlib import Path

from datasets import load_dataset
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)


class Marker(TrainerCallback):
    """Touches a file after every optimizer step."""

    def __init__(self, path: str) -> None:
        self._path = Path(path)

    def on_step_end(self, *_: object, **__: object) -> None:
        self._path.touch()


parser = argparse.ArgumentParser()
parser.add_argument("model")
parser.add_argument("csv")
parser.add_argument("output")
parser.add_argument("--steps", type=int, default=1000)
parser.add_argument("--save-steps", type=int, default=1000)
parser.add_argument("--resume", action="store_true")
parser.add_argument("--marker", default="/dev/null")
asked = parser.parse_args()

tokenizer = AutoTokenizer.from_pretrained(asked.model)
rows = load_dataset("csv", data_files=asked.csv, split="train")
rows = rows.map(lambda batch: tokenizer(batch["text"], truncation=True, max_length=128), batched=True)
rows = rows.map(lambda row: {"labels": int(row["label"] == "positive")}, remove_columns=["text", "label", "id"])
model = AutoModelForSequenceClassification.from_pretrained(asked.model, num_labels=2)
arguments = TrainingArguments(
    asked.output,
    per_device_train_batch_size=32,
    learning_rate=1e-4,
    max_steps=asked.steps,
    save_steps=asked.save_steps,
    report_to=[],
)
collator = DataCollatorWithPadding(tokenizer)
trainer = Trainer(model, arguments, train_dataset=rows, data_collator=collator, processing_class=tokenizer)
trainer.add_callback(Marker(asked.marker))
trainer.train(resume_from_checkpoint=asked.resume)
