"""What a tuning method trains of a model is what its name says, whatever the model calls its parts; the rest stays."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers

from job.errors import CheckpointMismatch, Diverged, RecipeError
from job.recipe.schema import Training, Tuning
from job.tasks import get_task
from job.train.checkpoint import gather_weights, read_weights, write_weights
from job.train.methods import (
    Anatomy,
    apply_method,
    count_trained,
    estimate_trained,
    find_depths,
    group_weights,
    list_frozen,
    name_moved,
)

SIZES = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 64}
KINDS: dict[str, dict[str, Any]] = {
    "bert": SIZES,
    "distilbert": {"dim": 32, "n_layers": 3, "n_heads": 2, "hidden_dim": 64},
    "roberta": SIZES,
    "deberta-v2": SIZES | {"relative_attention": True, "position_buckets": 8, "pos_att_type": ["p2c", "c2p"]},
    "modernbert": SIZES,
    "llama": SIZES | {"num_key_value_heads": 1},
    "gpt2": {"n_embd": 32, "n_layer": 3, "n_head": 2},
}
HEADS = {
    "bert": {"classifier", "bert.pooler"},
    "distilbert": {"pre_classifier", "classifier"},
    "roberta": {"classifier"},
    "deberta-v2": {"pooler", "classifier"},
    "modernbert": {"head", "classifier"},
    "llama": {"score"},
    "gpt2": {"score"},
}
LAST = {
    "bert": {"bert.encoder.layer.2"},
    "distilbert": {"distilbert.transformer.layer.2"},
    "roberta": {"roberta.encoder.layer.2"},
    "deberta-v2": {"deberta.encoder.layer.2"},
    "modernbert": {"model.layers.2", "model.final_norm"},
    "llama": {"model.layers.2", "model.norm"},
    "gpt2": {"transformer.h.2", "transformer.ln_f"},
}
EMBEDDINGS = {
    "bert": {"bert.embeddings"},
    "distilbert": {"distilbert.embeddings"},
    "roberta": {"roberta.embeddings"},
    "deberta-v2": {"deberta.embeddings"},
    "modernbert": {"model.embeddings"},
    "llama": {"model.embed_tokens"},
    "gpt2": {"transformer.wte", "transformer.wpe"},
}
LINEAR_PER_LAYER = {
    "bert": 6, "distilbert": 6, "roberta": 6, "deberta-v2": 8, "modernbert": 4, "llama": 7, "gpt2": 4,
}  # fmt: skip


def make(kind: str, model_class: str = "AutoModelForSequenceClassification", **changes: Any) -> Any:
    """Return a tiny model with random weights, without anything drawn while it computes but what `changes` says."""
    config = transformers.AutoConfig.for_model(
        kind, vocab_size=64, pad_token_id=0, bos_token_id=1, eos_token_id=2, **{**KINDS[kind], **changes}
    )
    config.reference_compile = False  # ModernBERT would compile itself
    torch.manual_seed(0)
    return getattr(transformers, model_class).from_config(config)


def train(model: Any, steps: int = 2) -> None:
    """Take steps that move, and decay, whatever an optimizer finds."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1, weight_decay=0.5)
    ids = torch.arange(3, 3 + 16).reshape(2, 8)
    for _ in range(steps):
        output = model.train()(input_ids=ids, attention_mask=torch.ones_like(ids))
        output.logits.float().square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def snapshot(model: Any) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def list_changed(model: Any, before: dict[str, torch.Tensor]) -> set[str]:
    return {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}


def list_inside(model: Any, modules: set[str]) -> set[str]:
    """Names of all parameters inside of modules."""
    return {name for name, _ in model.named_parameters() if any(name.startswith(f"{module}.") for module in modules)}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("tuning", "parts"),
    [
        ({"unfreeze": "head"}, (HEADS,)),
        ({"unfreeze": "last-1-layers"}, (HEADS, LAST)),
        ({"unfreeze": "head", "embeddings": "trained"}, (HEADS, EMBEDDINGS)),
    ],
    ids=["head", "last-1-layers", "embeddings"],
)
def test_the_named_parts_are_trained_and_all_else_is_bit_equal_after_training(
    kind: str, tuning: dict[str, str], parts: tuple[dict[str, set[str]], ...]
) -> None:
    model = make(kind)
    apply_method(model, Tuning(method="partial", **tuning), seed=1)  # type: ignore[arg-type]
    expected = list_inside(model, set().union(*(part[kind] for part in parts)))
    assert {name for name, parameter in model.named_parameters() if parameter.requires_grad} == expected
    before = snapshot(model)
    train(model)
    changed = list_changed(model, before)
    assert changed <= expected
    assert len(changed) >= 0.7 * len(expected), "the loss must reach what is trained"


@pytest.mark.parametrize("kind", KINDS)
def test_lora_trains_factors_beside_every_linear_layer_and_the_head_in_full(kind: str) -> None:
    model = make(kind)
    head = list_inside(model, HEADS[kind])
    apply_method(model, Tuning(method="lora", r=2), seed=1)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    factors = {name for name in trained if ".lora_" in name}
    assert trained - factors == head
    assert len(factors) == 2 * 3 * LINEAR_PER_LAYER[kind]
    before = snapshot(model)
    train(model)
    assert list_changed(model, before) == trained


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("extra", [{}, {"rslora": True, "dora": True}], ids=["plain", "rslora and dora"])
def test_what_was_saved_of_lora_gives_the_same_model_again_and_merges_into_it(
    kind: str, extra: dict[str, Any], tmp_path: Path
) -> None:
    tuning, ids = Tuning(method="lora", r=2, **extra), torch.arange(3, 11)[None]
    trained, fresh = make(kind), make(kind)
    apply_method(trained, tuning, seed=1)
    train(trained)
    moved = name_moved(trained, tuning)
    write_weights(trained, gather_weights(trained, None, moved, torch.clone), tmp_path, whole=False)
    tuner = apply_method(fresh, tuning, seed=2)
    read_weights(fresh, tmp_path, moved)
    expected = trained.eval()(input_ids=ids).logits
    assert torch.equal(fresh.eval()(input_ids=ids).logits, expected)
    assert tuner is not None
    torch.testing.assert_close(tuner.merge_and_unload()(input_ids=ids).logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_one_weight_that_is_no_number_makes_a_checkpoint_14(value: float, tmp_path: Path) -> None:
    model = make("bert")
    model.classifier.weight.data[1, 7] = value
    with pytest.raises(Diverged, match=r"classifier\.weight"):
        write_weights(model, gather_weights(model, None, None, torch.clone), tmp_path, whole=True)


def test_weights_whose_sum_is_more_than_fp32_holds_are_saved(tmp_path: Path) -> None:
    model = make("bert")
    model.classifier.weight.data.fill_(3e38)
    write_weights(model, gather_weights(model, None, None, torch.clone), tmp_path, whole=True)
    assert (tmp_path / "model.safetensors").exists()


def test_a_buffer_that_an_engine_keeps_in_16_bits_is_saved_in_fp32_as_all_else(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    config = transformers.BartConfig(
        vocab_size=50, d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=64, decoder_ffn_dim=64,
    )  # fmt: skip
    model = transformers.BartForConditionalGeneration(config)
    model.final_logits_bias = model.final_logits_bias.bfloat16()  # as it is under ZeRO-3 in bf16
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 0)
    weights = gather_weights(model, model, None, torch.clone)
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}
    write_weights(model, weights, tmp_path, whole=True)


def test_a_language_models_head_is_no_new_one_and_lora_leaves_it_as_it_is() -> None:
    for tied in (True, False):
        model = make("llama", "AutoModelForCausalLM", tie_word_embeddings=tied)
        apply_method(model, Tuning(method="lora"), seed=1)
        assert all(".lora_" in name for name, p in model.named_parameters() if p.requires_grad)
        assert not isinstance(model.lm_head, peft.tuners.tuners_utils.BaseTunerLayer)


def test_a_head_that_is_the_embeddings_is_frozen_with_them() -> None:
    tied = make("llama", "AutoModelForCausalLM", tie_word_embeddings=True)
    with pytest.raises(RecipeError, match="has no head of its own") as caught:
        apply_method(tied, Tuning(method="partial"), seed=1)
    assert caught.value.exit_code == 10
    tied = make("llama", "AutoModelForCausalLM", tie_word_embeddings=True)
    apply_method(tied, Tuning(method="partial", unfreeze="last-1-layers"), seed=1)
    assert not tied.lm_head.weight.requires_grad
    untied = make("llama", "AutoModelForCausalLM", tie_word_embeddings=False)
    apply_method(untied, Tuning(method="partial"), seed=1)
    assert name_moved(untied, Tuning(method="partial")) == {"lm_head.weight"}


def test_a_frozen_part_answers_without_dropout_and_a_trained_one_keeps_its_own() -> None:
    model = make("bert")
    tuning = Tuning(method="partial", unfreeze="last-1-layers")
    apply_method(model, tuning, seed=1)
    frozen = list_frozen(model, tuning)
    inside = [module for part in frozen for module in part.modules()]
    dropouts = {name: m for name, m in model.named_modules() if isinstance(m, torch.nn.Dropout)}
    quiet = {name for name, module in dropouts.items() if any(module is other for other in inside)}
    assert quiet == {name for name in dropouts if not name.startswith(("dropout", "bert.encoder.layer.2."))}
    assert list_frozen(model, Tuning()) == []


@pytest.mark.parametrize(
    ("tuning", "rule"),
    [
        ({"method": "partial", "unfreeze": "last-4-layers"}, "has 3 layers"),
        (
            {"method": "lora", "targets": ["query", "q_proj"]},
            "'q_proj' is how no linear layer's name ends.*it has dense",
        ),
    ],
)
def test_a_part_that_the_model_has_not_is_refused_with_what_it_has(tuning: dict[str, Any], rule: str) -> None:
    with pytest.raises(RecipeError, match=rule):
        apply_method(make("bert"), Tuning(**tuning), seed=1)


def test_targets_are_the_ends_of_names() -> None:
    model = make("bert")
    apply_method(model, Tuning(method="lora", targets=["query", "attention.output.dense"]), seed=1)
    wrapped = {name for name, m in model.named_modules() if isinstance(m, peft.tuners.lora.LoraLayer)}
    layers = [f"bert.encoder.layer.{index}.attention" for index in range(3)]
    assert wrapped == {f"{layer}.{part}" for layer in layers for part in ("self.query", "output.dense")}


def test_new_factors_depend_on_the_seed_alone() -> None:
    def draw(seed: int, before: int) -> dict[str, torch.Tensor]:
        model = make("bert")
        torch.manual_seed(before)
        apply_method(model, Tuning(method="lora"), seed)
        return {name: tensor for name, tensor in model.state_dict().items() if "lora_A" in name}

    one, same, other = draw(1, 5), draw(1, 6), draw(2, 5)
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not any(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("change", ["lacks", "adds"])
def test_saved_weights_of_another_method_are_16(change: str, tmp_path: Path) -> None:
    model = make("bert")
    tuning = Tuning(method="partial")
    apply_method(model, tuning, seed=1)
    moved = name_moved(model, tuning) or set()
    weights = gather_weights(model, None, moved, torch.clone)
    if change == "lacks":
        del weights["classifier.weight"]
    else:
        weights["bert.encoder.layer.0.attention.self.query.lora_A.default.weight"] = torch.zeros(2, 32)
    write_weights(model, weights, tmp_path, whole=False)
    with pytest.raises(CheckpointMismatch, match=r"classifier\.weight|lora_A"):
        read_weights(model, tmp_path, moved)


@pytest.mark.parametrize("method", ["partial", "lora"])
@pytest.mark.parametrize("kind", ["bert", "gpt2"])
def test_the_plan_counts_what_will_be_trained(kind: str, method: Any, tmp_path: Path) -> None:
    model, tuning = make(kind, num_labels=3), Tuning(method=method)
    model.config.save_pretrained(tmp_path)
    apply_method(model, tuning, seed=1)
    found = estimate_trained(tmp_path, get_task("text-classification"), ["a", "b", "c"], tuning)
    assert found == count_trained(model) > 0


@pytest.mark.parametrize("kind", KINDS)
def test_depths_grow_from_the_head_to_the_embeddings(kind: str) -> None:
    model = make(kind)
    depths = find_depths(model)
    assert {depths[name] for name in list_inside(model, HEADS[kind])} == {0}
    assert {depths[name] for name in list_inside(model, EMBEDDINGS[kind])} == {4}
    layers = Anatomy.of(model).layers
    assert [{depths[name] for name in list_inside(model, {layer})} for layer in layers] == [{3}, {2}, {1}]


def test_every_layer_learns_slower_than_the_one_behind_it() -> None:
    model = make("bert")
    rates = {}
    for group in group_weights(
        model, Training(learning_rate=1.0, layerwise_lr_decay=0.5, weight_decay=0.1), {"classifier.weight"}
    ):
        rates |= dict.fromkeys(group["params"], (group["lr"], group["weight_decay"]))
    found = {name: rates[parameter] for name, parameter in model.named_parameters()}
    assert found["classifier.weight"] == (1.0, 0.1)
    assert found["bert.encoder.layer.2.output.dense.weight"] == (0.5, 0.0)
    assert found["bert.embeddings.word_embeddings.weight"] == (0.0625, 0.0)
    assert [group["lr"] for group in group_weights(model, Training(learning_rate=1.0), {"classifier.weight"})] == [1, 1]


def test_every_part_is_found_once() -> None:
    for kind in KINDS:
        parts = Anatomy.of(make(kind))
        assert set(parts.head) == HEADS[kind]
        assert set(parts.embeddings) == EMBEDDINGS[kind]
        assert len(parts.layers) == 3
        assert parts.new_head == parts.head
