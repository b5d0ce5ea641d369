"""Rows end to end without padding: the loss and the gradients of padded ones, for every model that is let in."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from job.data.tokenize import TokenTable
from job.errors import RecipeError
from job.tasks import IGNORED_LABEL, get_task, join_outputs
from job.train.attention import choose_attention, find_layout
from job.train.stream import Collator, SeededBatches, TableRows
from job.train.varlen import Layout

LENGTHS = [20, 3, 9, 14, 1, 7]
ROWS = [0, 1, 2, 3, 4, -1, 5]
ENCODERS = ["bert", "roberta", "distilbert", "xlm-roberta", "camembert"]
DECODERS = ["llama", "qwen2", "qwen3", "mistral", "gpt_neox"]


def make_table(per_token: bool, with_types: bool = False) -> TokenTable:
    rng = np.random.default_rng(0)
    total = sum(LENGTHS)
    labels = rng.integers(0, 2, total if per_token else len(LENGTHS))
    if per_token:
        labels[rng.random(total) < 0.2] = -100
    types = rng.integers(0, 2, total).astype(np.uint8) if with_types else None
    offsets = np.cumsum([0, *LENGTHS], dtype=np.int64)
    tokens = rng.integers(3, 100, total).astype(np.uint16)
    return TokenTable(tokens, types, offsets, labels, np.arange(len(LENGTHS)) + 1, per_token=per_token)


def make_model(kind: str, task: str, **more: Any) -> Any:
    import transformers

    sizes = {"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 2, "intermediate_size": 64}
    if kind in DECODERS:
        sizes["num_key_value_heads"] = 2
    if kind == "distilbert":
        sizes = {"dim": 32, "n_heads": 4, "n_layers": 2, "hidden_dim": 64}
    if kind in ENCODERS:  # else two forward passes would differ
        still = ("dropout", "attention_dropout", "hidden_dropout_prob", "attention_probs_dropout_prob")
        sizes |= dict.fromkeys((*still, "seq_classif_dropout"), 0.0)
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(
        kind, vocab_size=100, max_position_embeddings=64, pad_token_id=1, **(sizes | more)
    )
    return getattr(transformers, get_task(task).auto_class).from_config(config).train()


def compute(model: Any, task: Any, batch: dict[str, torch.Tensor], labels: torch.Tensor) -> tuple[float, torch.Tensor]:
    """Return the mean loss and the gradient of all weights that have one; of a sum fp32 has two digits less."""
    model.zero_grad()
    loss = task.sum_loss(join_outputs(task, model(**batch)), labels, 0.0) / (labels != IGNORED_LABEL).sum()
    loss.backward()
    return loss.item(), torch.cat([w.grad.flatten() for w in model.parameters() if w.grad is not None])


def assert_equal_gradients(model: Any, task: Any, table: TokenTable) -> None:
    rows = find_layout(model, task, table, "fp32")
    padded, flat = Collator(table, 1, with_rows=False)(ROWS), rows.collate(table)(ROWS)
    assert flat["input_ids"].numel() == table.lengths[[*ROWS[:-2], 4, 5]].sum()
    flat.pop("row")
    loss, gradient = compute(model, task, padded, padded.pop("labels"))
    with rows.apart(flat, model.device) as kept:
        same, other = compute(model, task, kept, kept.pop("labels"))
    assert rows.calls
    assert same == pytest.approx(loss, abs=1e-5)
    assert torch.allclose(gradient, other, atol=1e-5)
    again, _ = compute(model, task, padded, Collator(table, 1, with_rows=False)(ROWS)["labels"])
    assert again == pytest.approx(loss, abs=1e-5)


@pytest.mark.parametrize("kind", ENCODERS)
@pytest.mark.parametrize("task", ["text-classification", "token-classification", "masked-lm"])
def test_an_encoder_learns_from_rows_end_to_end_what_it_learns_from_padded_ones(kind: str, task: str) -> None:
    assert_equal_gradients(make_model(kind, task), get_task(task), make_table(get_task(task).per_token))


@pytest.mark.parametrize("kind", DECODERS)
def test_a_decoder_learns_from_rows_end_to_end_what_it_learns_from_padded_ones(kind: str) -> None:
    assert_equal_gradients(make_model(kind, "causal-lm"), get_task("causal-lm"), make_table(True))


def test_segments_of_pairs_and_recomputed_layers_change_nothing() -> None:
    model, task = make_model("bert", "text-classification"), get_task("text-classification")
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    assert_equal_gradients(model, task, make_table(False, with_types=True))


def test_more_tokens_than_the_model_has_positions_lie_in_one_line() -> None:
    model, task, table = make_model("bert", "text-classification"), get_task("text-classification"), make_table(False)
    rows = find_layout(model, task, table, "fp32")
    batch = rows.collate(table)([0, 3] * 4)
    assert batch["input_ids"].shape[1] > model.config.max_position_embeddings
    with rows.apart({name: batch[name] for name in batch if name not in ("row", "labels")}, model.device) as kept:
        assert model(**kept).logits.shape == (8, 2)


@pytest.mark.parametrize(("kind", "task"), [("bert", "text-classification"), ("distilbert", "masked-lm"),
                                            ("llama", "causal-lm")])  # fmt: skip
def test_a_model_is_compiled_for_all_micro_batches_at_once(kind: str, task: str) -> None:
    """torch gives up after eight kinds of a batch: without this each is one."""
    import torch._dynamo

    model, table = make_model(kind, task), make_table(get_task(task).per_token)
    rows, compiled = find_layout(model, get_task(task), table, "fp32"), torch.compile(model, backend="eager")
    torch._dynamo.reset()  # other models' layers count as well
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        for count in range(1, 13):
            batch = rows.collate(table)(([0, 1, 2, 3, 4, 5] * 2)[:count])
            with rows.apart({n: batch[n] for n in batch if n not in ("row", "labels")}, model.device) as kept:
                logits = compiled(**kept).logits
            assert logits.shape[:2] in ((count, 2), batch["input_ids"].shape)


def test_how_a_model_is_asked_is_found_out() -> None:
    table, task = make_table(True), get_task("token-classification")
    found = {
        kind: find_layout(make_model(kind, task.name), task, table, "fp32").layout
        for kind in ("bert", "roberta", "llama")
    }
    assert found == {"bert": Layout(False, 0), "roberta": Layout(False, 2), "llama": Layout(True, 0)}


@pytest.mark.parametrize(
    ("kind", "task", "more"),
    [
        ("deberta-v2", "text-classification", {}),  # attention of its own
        ("mistral", "causal-lm", {"sliding_window": 4}),  # a window that is narrower than the longest row
        ("llama", "text-classification", {}),  # answers at the last token
    ],
)
def test_a_model_that_would_answer_otherwise_is_padded_or_refused(kind: str, task: str, more: dict[str, int]) -> None:
    model, table = make_model(kind, task, **more), make_table(get_task(task).per_token)
    before = Collator(table, 1, with_rows=False)([0, 1, 2])
    del before["labels"]
    answers = model.eval()(**before).logits
    with pytest.raises(RecipeError, match=r"training\.attention.*lie end to end.*use auto or padded"):
        choose_attention("varlen", "fp32", model, get_task(task), table)
    assert torch.equal(model(**before).logits, answers)


def test_auto_pads_without_a_kernel_and_varlen_says_what_it_drops(caplog: pytest.LogCaptureFixture) -> None:
    task, table = get_task("text-classification"), make_table(False)
    model = make_model("bert", task.name, attention_probs_dropout_prob=0.25)
    assert choose_attention("auto", "fp32", model, task, table) is None
    with caplog.at_level("INFO", "job.train"):
        rows = choose_attention("varlen", "fp32", model, task, table)
    assert rows is not None and rows.dropout == 0.25
    assert "padded would drop 0.25" in caplog.text


def test_a_question_needs_its_rows_apart() -> None:
    with pytest.raises(RecipeError, match="not offered for question-answering"):
        choose_attention("varlen", "fp32", None, get_task("question-answering"), make_table(False))


def test_an_epoch_draws_the_same_masks_padded_or_not() -> None:
    """A row is drawn anew by its own generator, wherever it lies in a batch."""
    from job.data.batching import MicroBatch

    table, model = make_table(True), make_model("bert", "masked-lm")
    rows = find_layout(model, get_task("masked-lm"), table, "fp32")

    def redraw(ids: np.ndarray, labels: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        return rng.integers(3, 100, len(ids)), labels + rng.integers(0, 5, len(ids))

    batches = [
        SeededBatches(TableRows(np.arange(len(table))), collate, 5, redraw).__getitems__(MicroBatch(2, 3, ROWS))
        for collate in (Collator(table, 1, with_rows=True), rows.collate(table))
    ]
    mask = batches[0]["attention_mask"].bool()
    assert torch.equal(batches[0]["input_ids"][mask], batches[1]["input_ids"][0])
    assert torch.equal(batches[0]["labels"][mask], batches[1]["labels"][0])
