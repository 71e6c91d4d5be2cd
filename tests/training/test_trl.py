"""TRL's trainers with ``peft_config=FGGMConfig(...)``."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from example_deltas import adapter
from models import byte_tokenizer, fggm_layers, mixture, text_model
from peft import get_peft_model
from transformers import GenerationConfig, LlamaConfig, LlamaForSequenceClassification

from fggm_peft import FGGMConfig, select_parameters
from fggm_peft.training import FGGMTrainerMixin, batches
from fggm_peft.training.batches import selection_batch, with_answers

trl = pytest.importorskip("trl")
SDFTConfig = pytest.importorskip("trl.experimental.sdft").SDFTConfig
datasets = pytest.importorskip("datasets")


PAGE = (Path(__file__).parents[2] / "docs" / "integrations.md").read_text()
TRAINERS: dict = {}
exec(re.search(r"## TRL.*?```python\n(.*?)```", PAGE, re.DOTALL)[1], TRAINERS)
SFTTrainer, DPOTrainer, KTOTrainer, GRPOTrainer, SDFTTrainer = (
    TRAINERS[name] for name in ("SFT", "DPO", "KTO", "GRPO", "SDFT")
)


def rows(**columns) -> datasets.Dataset:
    """24 sums; each column is computed from the number."""
    return datasets.Dataset.from_list(
        [{"prompt": f"{n} plus one is", **{name: column(n) for name, column in columns.items()}} for n in range(24)]
    )


def answers() -> datasets.Dataset:
    return rows(completion=lambda n: f" {n + 1}")


def preferences() -> datasets.Dataset:
    return rows(chosen=lambda n: f" {n + 1}", rejected=lambda n: f" {n + 3}, no")


def judgments() -> datasets.Dataset:
    return rows(completion=lambda n: f" {n + n % 2}", label=lambda n: bool(n % 2))


def reward(completions, **_) -> list[float]:
    return [float(len(set(text))) for text in completions]


def config(**options) -> FGGMConfig:
    return FGGMConfig(**{"task_type": "CAUSAL_LM", "density": 0.2, "num_samples": 16, **options})


def arguments(kind: type, folder, **options):
    defaults = {"max_steps": 3, "per_device_train_batch_size": 4, "learning_rate": 1e-2, "logging_steps": 1}
    quiet = {"report_to": [], "use_cpu": True, "save_strategy": "no", "disable_tqdm": True}
    return kind(output_dir=str(folder), bf16=False, **{**defaults, **quiet, **options})


def supports(model) -> dict[str, torch.Tensor]:
    return {name: layer.fggm_indices["default"] for name, layer in fggm_layers(model, "default").items()}


def losses(trainer) -> list[float]:
    return [log["loss"] for log in trainer.state.log_history if "loss" in log]


def sft(folder, model=None, adapter=None, **options) -> SFTTrainer:
    trainer = SFTTrainer(
        model=model or text_model(),
        args=arguments(trl.SFTConfig, folder, **options),
        train_dataset=answers(),
        processing_class=byte_tokenizer(),
        peft_config=adapter or config(),
    )
    trainer.train()
    return trainer


def test_sft_selects_on_its_training_data_and_logs_the_report(tmp_path):
    trainer = sft(tmp_path, gradient_checkpointing=False)
    first = trainer.state.log_history[0]
    report = trainer.selection_report
    assert first["selection/samples"] == report.samples == 16
    assert first["selection/density"] == report.density == pytest.approx(0.2, abs=0.01)
    assert first["selection/regret"] == report.regret and first["selection/seconds"] >= 0
    assert losses(trainer)[-1] < losses(trainer)[0]

    by_hand = get_peft_model(text_model(), config())
    torch.manual_seed(trainer.args.seed)
    select_parameters(by_hand, trainer.get_train_dataloader())
    for name, indices in supports(trainer.model).items():
        assert torch.equal(indices, supports(by_hand)[name]), name


PACKED = {
    "padding free": {"padding_free": True, "max_length": None},
    "packed": {"packing": True, "max_length": 64},
    "wrapped": {"packing": True, "packing_strategy": "wrapped", "max_length": 32},
}


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("kind", PACKED)
def test_sft_with_several_sequences_in_one_row(kind, tmp_path):
    trainer = sft(tmp_path, adapter=config(num_samples=None), **PACKED[kind])
    if kind == "wrapped":  # a wrapped row is a piece of continuous text, which counts as one sample
        assert 0 < trainer.selection_report.samples < 24
        return
    apart = sft(tmp_path, adapter=config(num_samples=None))
    assert trainer.selection_report.samples == apart.selection_report.samples == 24
    for name, indices in supports(trainer.model).items():
        assert torch.equal(indices, supports(apart.model)[name]), name


def test_packed_rows_are_split_into_their_sequences():
    batch = {
        "input_ids": torch.tensor([[5, 6, 7, 8, 9, 10, 11, 0], [12, 13, 14, 15, 16, 17, 0, 0]]),
        "labels": torch.tensor([[-100, 6, 7, -100, 9, -100, 11, -100], [-100, 13, 14, 15, 16, 17, -100, -100]]),
        "position_ids": torch.tensor([[0, 1, 2, 0, 1, 0, 1, 0], [0, 1, 2, 3, 4, 5, 0, 0]]),
        "attention_mask": torch.tensor([[1, 1, 1, 1, 1, 1, 1, 0], [1, 1, 1, 1, 1, 1, 0, 0]]),
    }
    apart = selection_batch(batch)
    expected = [[5, 6, 7], [8, 9], [10, 11], [12, 13, 14, 15, 16, 17]]
    lengths = apart["attention_mask"].sum(1).tolist()
    assert [row[:length].tolist() for row, length in zip(apart["input_ids"], lengths, strict=True)] == expected
    assert apart["labels"][1].tolist() == [-100, 9, -100, -100, -100, -100]
    whole = {key: value[1:] for key, value in batch.items()}
    assert selection_batch(whole) is whole  # rows with one sequence are not changed


def test_dpo_uses_the_base_as_its_reference(tmp_path):
    trainer = DPOTrainer(
        model=text_model(),
        args=arguments(trl.DPOConfig, tmp_path),
        train_dataset=preferences(),
        processing_class=byte_tokenizer(),
        peft_config=config(),
    )
    trainer.train()
    assert trainer.selection_report.samples == 16
    assert losses(trainer)[0] == pytest.approx(0.6931, abs=1e-4)  # policy and reference start equal
    assert losses(trainer)[-1] < losses(trainer)[0]


def trained_adapter() -> torch.nn.Module:
    model = get_peft_model(text_model(), config())
    ids = torch.randint(2, 50, (16, 9))
    select_parameters(model, [{"input_ids": ids, "labels": ids}], None, progress=False)
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.05)
    return model


def test_kto_reads_each_answer_once_without_its_kl_copy(tmp_path):
    trainer = KTOTrainer(
        model=text_model(),
        args=arguments(trl.KTOConfig, tmp_path),
        train_dataset=judgments(),
        processing_class=byte_tokenizer(),
        peft_config=config(num_samples=None),
    )
    batch = next(iter(trainer.get_train_dataloader()))
    assert "KL_input_ids" in batch and set(selection_batch(batch)) == {"input_ids", "attention_mask", "labels"}
    assert torch.equal(selection_batch(batch)["input_ids"], batch["input_ids"])  # these are no pairs
    trainer.train()
    assert trainer.selection_report.samples == 24
    assert losses(trainer)[0] == pytest.approx(0.5, abs=1e-4)  # policy and reference start equal
    assert losses(trainer)[-1] < losses(trainer)[0]


ANSWERS = {"num_generations": 2, "max_completion_length": 8}
REFERENCES = {
    "DPO": (DPOTrainer, trl.DPOConfig, {}, preferences, ("loss", 0.6931)),
    "KTO": (KTOTrainer, trl.KTOConfig, {}, judgments, ("loss", 0.5)),
    "GRPO": (GRPOTrainer, trl.GRPOConfig, {"beta": 0.1, **ANSWERS}, rows, ("kl", 0.0)),
}


@pytest.mark.parametrize("kind", REFERENCES)
def test_a_trained_adapter_is_its_own_reference(kind, tmp_path):
    trainer_class, settings, options, data, (key, equal) = REFERENCES[kind]
    trainer = trainer_class(
        model=trained_adapter(),
        args=arguments(settings, tmp_path, **options),
        train_dataset=data(),
        processing_class=byte_tokenizer(),
        **({"reward_funcs": reward} if kind == "GRPO" else {}),
    )
    trainer.train()
    assert trainer.selection_report is None  # the adapter was already selected
    first = next(log[key] for log in trainer.state.log_history if key in log)
    assert first == pytest.approx(equal, abs=1e-4)  # policy and reference start equal
    layer = next(iter(fggm_layers(trainer.model, "ref").values()))
    assert torch.equal(layer.fggm_indices["ref"], layer.fggm_indices["default"])
    assert not torch.equal(layer.fggm_values["ref"], layer.fggm_values["default"])  # only "default" was trained
    assert not layer.fggm_values["ref"].requires_grad


def test_grpo_selects_on_generated_answers(tmp_path, monkeypatch):
    trainer = GRPOTrainer(
        model=text_model(),
        reward_funcs=reward,
        args=arguments(trl.GRPOConfig, tmp_path, beta=0.1, **ANSWERS),
        train_dataset=rows(),
        processing_class=byte_tokenizer(),
        peft_config=config(num_samples=None),
    )
    asked = prompts_of_the_selection(monkeypatch)
    trainer.train()
    assert trainer.selection_report.samples == 24
    assert sorted(asked) == sorted(rows()["prompt"])  # each prompt once, although TRL repeats prompts for its groups
    logs = [log for log in trainer.state.log_history if "kl" in log]
    assert logs[0]["kl"] == pytest.approx(0, abs=1e-6) and logs[-1]["kl"] > 0


def prompts_of_the_selection(monkeypatch) -> list[str]:
    """The prompts that a selection will answer."""
    asked, generate = [], batches.with_answers
    monkeypatch.setattr(
        batches, "with_answers", lambda trainer, prompts: asked.extend(prompts) or generate(trainer, prompts)
    )
    return asked


@pytest.mark.parametrize("teacher", ["base", "live"])
def test_sdft_selects_on_generated_answers_and_teaches_itself(teacher, tmp_path, monkeypatch):
    trainer = SDFTTrainer(
        model=text_model(),
        args=arguments(SDFTConfig, tmp_path, teacher_model_kind=teacher, max_steps=2, **ANSWERS),
        train_dataset=rows(privileged_context=lambda n: f" {n + 1}"),
        processing_class=byte_tokenizer(),
        peft_config=config(num_samples=None),
    )
    asked = prompts_of_the_selection(monkeypatch)
    trainer.train()
    assert trainer.selection_report.samples == 24 and sorted(asked) == sorted(rows()["prompt"])
    assert len(losses(trainer)) == 2
    assert any(layer.fggm_values["default"].any() for layer in fggm_layers(trainer.model, "default").values())


WEIGHTS = {
    "linear layers and a norm": (text_model, {"modules_to_save": ["model.norm"]}),
    "tied embeddings": (lambda: text_model(tie_word_embeddings=True), {"target_modules": ["embed_tokens", "q_proj"]}),
    "experts": (lambda: mixture("Qwen3Moe"), {"target_parameters": ["experts.gate_up_proj"]}),
}


@pytest.mark.parametrize("case", WEIGHTS)
def test_vllm_gets_the_merged_weights_under_the_names_of_the_base(case):
    """TRL's code for the synchronization, with a stand-in of its client."""
    generation = pytest.importorskip("trl.generation.vllm_generation")
    asynchronous = pytest.importorskip("trl.experimental.async_grpo.async_grpo_trainer")
    received: dict[str, torch.Tensor] = {}

    class Generation(generation.VLLMGeneration):
        def _init_vllm(self):
            self.vllm_client = self

        def update_named_params(self, metadata, parameters):
            received.update((name, tensor.clone()) for name, tensor in parameters)
            assert [name for name, _, _ in metadata] == list(received)
            assert [shape for _, _, shape in metadata] == [list(tensor.shape) for tensor in received.values()]

        def reset_prefix_cache(self): ...

    build, settings = WEIGHTS[case]
    model = adapter("column", base=build(), **settings)
    for name, parameter in model.named_parameters():
        if "modules_to_save.default" in name:
            parameter.data.fill_(0.7)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    Generation(model, Accelerator(cpu=True), None, mode="server").sync_weights()
    merged = dict(copy.deepcopy(model).merge_and_unload().named_parameters())
    assert received.keys() == merged.keys() == {name for name, _ in asynchronous._iter_vllm_named_params(model)}
    assert all(torch.equal(received[name], merged[name]) for name in merged)
    assert any(not torch.equal(received[name], weight) for name, weight in build().named_parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_prompts_without_answers_require_the_mixin():
    with pytest.raises(ValueError, match=r"prompts without answers; use FGGMTrainerMixin"):
        selection_batch([{"prompt": "1 plus one is"}])


def test_generated_answers_end_at_the_first_end_of_sequence_token():
    tokenizer, model = byte_tokenizer(), text_model()
    with torch.no_grad():
        model.lm_head.weight[1] *= 60  # makes the end-of-sequence token likely
    trainer = SimpleNamespace(model=model, processing_class=tokenizer)
    batch = with_answers(trainer, ["a", "bcd"])
    assert batch["input_ids"][0, :3].tolist()[:2] == [0, 0]  # padding on the left
    width = 3
    for ids, labels, mask in zip(batch["input_ids"], batch["labels"], batch["attention_mask"], strict=True):
        assert (labels[:width] == -100).all()
        answer = labels[width:] != -100
        ends = (ids[width:] == 1).nonzero()
        last = int(ends[0]) if len(ends) else len(answer) - 1
        assert answer.tolist() == [position <= last for position in range(len(answer))]
        assert torch.equal(labels[width:][answer], ids[width:][answer])
        assert mask[width:].bool().tolist() == answer.tolist()


def test_generated_answers_use_the_trainers_generation_config():
    model, tokenizer = text_model(), byte_tokenizer()
    settings = GenerationConfig(max_new_tokens=12, eos_token_id=[1, *range(40, 120)], pad_token_id=0)
    trainer = SimpleNamespace(model=model, processing_class=tokenizer, generation_config=settings)
    batch = with_answers(trainer, ["ab", "cd", "ef"])
    width = batch["input_ids"].shape[1]
    assert width <= 2 + 12
    for ids, labels in zip(batch["input_ids"][:, 2:], batch["labels"][:, 2:], strict=True):
        ends = torch.isin(ids, torch.tensor(settings.eos_token_id)).nonzero()
        last = int(ends[0]) if len(ends) else len(ids) - 1
        assert (labels != -100).tolist() == [position <= last for position in range(len(ids))]


def test_chosen_and_rejected_answers_are_interleaved_in_pairs():
    ids = torch.tensor([[1, 2], [3, 4], [5, 6], [7, 8]])  # two chosen, two rejected
    batch = selection_batch(
        {"input_ids": ids, "completion_mask": torch.tensor([[0, 1]] * 4), "ref_chosen_logps": ids[0]}
    )
    assert batch["input_ids"].tolist() == [[1, 2], [5, 6], [3, 4], [7, 8]]
    assert batch["labels"].tolist() == [[-100, 2], [-100, 6], [-100, 4], [-100, 8]]
    assert set(batch) == {"input_ids", "labels"}


def test_a_reward_trainer_selects_with_its_own_likelihood(tmp_path):
    class RewardTrainer(FGGMTrainerMixin, trl.RewardTrainer):
        @staticmethod
        def selection_log_likelihood(model, batch):
            rewards = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, 0]
            chosen, rejected = rewards.chunk(2)
            return torch.nn.functional.logsigmoid(chosen - rejected).repeat_interleave(2) / 2

    torch.manual_seed(0)
    settings = {"num_labels": 1, "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4}
    base = LlamaForSequenceClassification(LlamaConfig(vocab_size=258, num_hidden_layers=2, pad_token_id=0, **settings))
    trainer = RewardTrainer(
        model=base,
        args=arguments(trl.RewardConfig, tmp_path),
        train_dataset=preferences(),
        processing_class=byte_tokenizer(),
        peft_config=config(task_type="SEQ_CLS"),
    )
    trainer.train()
    assert trainer.selection_report.samples == 16


def test_each_active_adapter_is_selected(tmp_path):
    model = get_peft_model(text_model(), config(target_modules=["q_proj"]))
    model.add_adapter("second", config(target_modules=["up_proj"]))
    model.base_model.set_adapter(["default", "second"])
    trainer = SFTTrainer(
        model=model,
        args=arguments(trl.SFTConfig, tmp_path),
        train_dataset=answers(),
        processing_class=byte_tokenizer(),
    )
    trainer.train()
    for name in ("default", "second"):
        layers = fggm_layers(trainer.model, name)
        assert layers and all(layer.fggm_values[name].any() for layer in layers.values())
