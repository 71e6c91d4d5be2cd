"""``FGGMConfig``: validation, and saving and loading as PEFT's JSON."""

from __future__ import annotations

import copy
import dataclasses
import functools
import json
import pickle
import shutil
import tempfile
import typing
import warnings
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import llama
from peft import PeftConfig, PeftModel, get_peft_config, get_peft_model
from reference import KINDS
from torch import nn

from fggm_peft import FGGMConfig, FGGMLayer, ScoreMass, TopDensity
from fggm_peft.core.criteria import CRITERIA
from fggm_peft.core.granularity import GRANULARITIES, Columns, Rows
from fggm_peft.core.threshold import POLICIES
from fggm_peft.deltas import SparseDelta
from fggm_peft.tuner.settings.fields import fits
from fggm_peft.tuner.settings.selection import score_bytes
from fggm_peft.tuner.target import find_targets

unit_interval = r"in \(0, 1\]"
BAD = [
    *[({"density": v}, f"density must be {unit_interval}, got {v!r}") for v in (0, -0.5, 1.5)],
    *[({"density": v}, rf"density must be of type Optional\[float\], got {v!r}") for v in (True, "0.3")],
    ({"density": float("nan")}, f"density must be {unit_interval}, got nan"),
    ({"density": float("inf")}, f"density must be {unit_interval}, got inf"),
    ({"density_pattern": {"q": 2.0}}, rf"density_pattern\['q'\] must be {unit_interval}, got 2.0"),
    ({"density_pattern": {"q": None}}, r"density_pattern must be .*dict\[str, float\].*, got {'q': None}"),
    ({"density_pattern": "q_proj"}, r"density_pattern must be .*dict\[str, float\].*, got 'q_proj'"),
    ({"threshold": "top_density"}, "threshold must be .*ThresholdPolicy, dict.*, got 'top_density'"),
    ({"threshold": {"policy": "top_density", "density": 3}}, f"density must be {unit_interval}, got 3"),
    ({"threshold": {"policy": "top_denstiy"}}, "unknown threshold policy 'top_denstiy'.*Did you mean 'top_density'"),
    ({"density": 0.2, "threshold": ScoreMass()}, r"give density \(0.2\) or threshold \(ScoreMass.*, not both"),
    ({"granularity": "rows"}, "unknown granularity 'rows'; known are 'row'.*Did you mean 'row'"),
    ({"granularity": ["row"]}, r"unknown granularity \['row'\]"),
    ({"criterion": "fischer"}, "unknown criterion 'fischer'; known are 'fisher'.*Did you mean 'fisher'"),
    ({"criterion": None}, "criterion must be of type str, got None"),
    ({"bias": "some"}, r"bias must be of type Literal\[.none., .all.\], got 'some'"),
    ({"quantized_merge": True}, "quantized_merge must be .*auto.*requantize.*keep.*, got True"),
    ({"bias": "lora_only"}, "bias must be .*none.*all.*, got 'lora_only'"),
    *[({"seed": v}, rf"seed must be an integer in \[0, 2\*\*63\), got {v!r}") for v in (-1, 2**63)],
    *[({"seed": v}, f"seed must be of type int, got {v!r}") for v in (1.5, True, None)],
    ({"criterion": "gain_per_harm", "reference": 3}, r"reference must be .*list\[str\], str.*, got 3"),
    ({"layers_pattern": "h"}, "`layers_pattern`.*`layers_to_transform` must also"),
    ({"target_modules": ".*q", "layers_to_transform": [0]}, "`layers_to_transform`.*`target_modules` is a str"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD, ids=[str(arguments) for arguments, _ in BAD])
def test_an_invalid_value_raises_an_error_with_the_value_and_the_valid_range(arguments, message):
    with pytest.raises(ValueError, match=message):
        FGGMConfig(**arguments)


@pytest.mark.parametrize("name", ["granularity", "criterion"])
def test_every_registered_name_is_accepted(name):
    for value in {"granularity": GRANULARITIES, "criterion": CRITERIA}[name]:
        more = {}
        if name == "criterion" and CRITERIA[value].weight_dim is not None:
            more = {"granularity": ("row", "column")[CRITERIA[value].weight_dim]}
        accepted = getattr(FGGMConfig(**{name: value}, **more), name)
        assert value == (accepted.name if name == "granularity" else accepted)


def test_every_field_has_help_text_that_lists_the_registered_names():
    fields = {field.name: field for field in dataclasses.fields(FGGMConfig)}
    for field in fields.values():
        assert field.metadata.get("help"), field.name
    for name, registry in (("granularity", GRANULARITIES), ("criterion", CRITERIA)):
        assert all(repr(value) in fields[name].metadata["help"] for value in registry)
    assert all(policy.__name__ in fields["threshold"].metadata["help"] for policy in POLICIES._entries.values())


def test_the_defaults_are_those_of_the_paper():
    config = FGGMConfig()
    assert (config.granularity, config.criterion) == (Rows(), "fisher")
    assert config.policy() == TopDensity(0.3)
    assert config.init_weights


def test_density_means_top_density_and_density_pattern_overrides_it():
    config = FGGMConfig(density=0.2, density_pattern={"q_proj": 0.1, r"layers\.0\..*": 0.7})
    assert config.policy() == config.policy("model.layers.3.k_proj") == TopDensity(0.2)
    assert config.policy("model.layers.3.q_proj") == TopDensity(0.1)
    assert config.policy("model.layers.0.k_proj") == TopDensity(0.7)
    mass = FGGMConfig(threshold=ScoreMass(0.8), density_pattern={"q_proj": 0.1})
    assert mass.policy("k_proj") == ScoreMass(0.8)
    assert mass.policy("q_proj") == TopDensity(0.1)


# JSON --------------------------------------------------------------------------------------------


def round_trip(config, folder: Path):
    config.save_pretrained(folder)
    json.loads((folder / "adapter_config.json").read_text())
    return FGGMConfig.from_pretrained(folder), PeftConfig.from_pretrained(folder)


def assert_comes_back(config, folder):
    saved = dataclasses.asdict(config)
    for loaded in round_trip(config, folder):
        assert type(loaded) is FGGMConfig
        assert dataclasses.asdict(loaded) | {"inference_mode": False} == saved


@pytest.mark.parametrize("scope", ["layer", "global"])
@pytest.mark.parametrize("name", list(POLICIES))
def test_every_threshold_policy_survives_saving(name, scope, tmp_path):
    if scope not in POLICIES[name].scopes:
        with pytest.raises(ValueError, match="scope must be"):
            POLICIES[name](scope=scope)
        return
    config = FGGMConfig(threshold=POLICIES[name](scope=scope))
    assert_comes_back(config, tmp_path)
    loaded, _ = round_trip(config, tmp_path)
    assert loaded.policy() == config.threshold


@pytest.mark.parametrize("name", list(POLICIES))
def test_a_threshold_can_be_given_as_a_dict(name):
    policy = POLICIES[name]()
    assert FGGMConfig(threshold=policy.to_dict()).threshold == policy


@pytest.mark.parametrize("targets", [["q", "v"], {"q", "v"}, "all-linear", r".*\.(q|v)", None])
def test_target_modules_survive_saving_as_list_set_and_string(targets, tmp_path):
    config = FGGMConfig(target_modules=targets, exclude_modules=["lm_head"])
    assert_comes_back(config, tmp_path)
    loaded, _ = round_trip(config, tmp_path)
    assert loaded.target_modules == (set(targets) if isinstance(targets, list) else targets)


@pytest.mark.parametrize("name", KINDS)
def test_all_other_fields_survive_saving(name, tmp_path):
    config = FGGMConfig(
        density=0.15,
        granularity=name,
        criterion="gain_per_harm",
        reference=["self", "history", "first"],
        save_scores=True,
        seed=2**63 - 1,
        init_weights=False,
        target_modules=["q"],
        modules_to_save=["head"],
        layers_to_transform=[0, 2],
        layers_pattern="blocks",
        density_pattern={"q_proj": 0.1},
        quantized_merge="keep",
        task_type="CAUSAL_LM",
        base_model_name_or_path="some/model",
    )
    config.selection = {"samples": 64, "regret": 0.01}
    assert_comes_back(config, tmp_path)


def test_a_manually_edited_file_is_validated_like_an_argument(tmp_path):
    FGGMConfig().save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"granularity": "colum"}))
    with pytest.raises(ValueError, match="Did you mean 'column'"):
        PeftConfig.from_pretrained(tmp_path)


# Damaged files -------------------------------------------------------------------------------------

TYPES = {name: kind for name, kind in typing.get_type_hints(FGGMConfig).items() if name != "check_base"}  # not saved
JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.sampled_from(["", "x", "0", "all-linear", "(", "*", "["]),
    lambda values: st.lists(values, max_size=3) | st.dictionaries(st.text(max_size=2), values, max_size=3),
    max_leaves=4,
)


@functools.cache
def saved_adapter() -> tuple[Path, dict]:
    """The folder of an adapter of two layers, and the contents of its config."""
    folder = Path(tempfile.mkdtemp())
    model = get_peft_model(two_layers(), FGGMConfig(target_modules=["0"], criterion="random", init_weights=False))
    model.save_pretrained(folder)
    return folder, json.loads((folder / "adapter_config.json").read_text())


def two_layers() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4))


def open_config(contents: object) -> None:
    """Read and load an adapter with this config. Only a ``ValueError`` may occur, and it changes nothing."""
    original, _ = saved_adapter()
    with tempfile.TemporaryDirectory() as name, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        folder = Path(name)
        shutil.copy(original / "adapter_model.safetensors", folder)
        (folder / "adapter_config.json").write_text(json.dumps(contents))
        base = two_layers()
        try:
            config = FGGMConfig.from_pretrained(folder)
        except ValueError:
            with pytest.raises(ValueError):
                SparseDelta.read(folder)
            return
        if type(config) is FGGMConfig:
            try:
                PeftModel.from_pretrained(base, folder)
            except ValueError:
                assert not any(isinstance(module, FGGMLayer) for module in base.modules())


@pytest.mark.parametrize("name", TYPES)
def test_a_value_of_a_wrong_type_raises_a_value_error(name):
    """Every field of a saved config, with a value of every type of JSON."""
    folder, contents = saved_adapter()
    values = [None, True, 1, 1.5, "x", [], {}, [1], ["x"], [None], [[]], [{}], {"x": 1}, {"x": []}, {"": {}}]
    for value in values:
        open_config(contents | {name: value})
        if not fits(value, TYPES[name]):
            with pytest.raises(ValueError):
                (folder / "changed").mkdir(exist_ok=True)
                (folder / "changed" / "adapter_config.json").write_text(json.dumps(contents | {name: value}))
                FGGMConfig.from_pretrained(folder / "changed")


@pytest.mark.parametrize("contents", [None, 1, "x", [], [1], {}, {"peft_type": "LORO"}, {"peft_type": ["FGGM"]}])
def test_a_file_that_is_no_config_raises_an_error_that_names_it(contents, tmp_path):
    (tmp_path / "adapter_config.json").write_text(json.dumps(contents))
    if contents == {}:
        return
    with pytest.raises(ValueError, match=r"adapter_config\.json"):
        FGGMConfig.from_pretrained(tmp_path)


@pytest.mark.parametrize("field", ["target_modules", "exclude_modules"])
@pytest.mark.parametrize("pattern", ["(", "*", "[", "a{2,1}", "(?P<x"])
def test_an_invalid_regex_raises_a_value_error(field, pattern):
    for value in (pattern, [pattern]):
        with pytest.raises(ValueError, match=f"{field}: .* is not a valid regex"):
            FGGMConfig(**{field: value})
    for other in ("modules_to_save", "layers_pattern"):
        with pytest.raises(ValueError, match=f"{other}: .* is not a valid regex"):
            FGGMConfig(**{other: [pattern], "layers_to_transform": 0, "target_modules": ["q"]})
    with pytest.raises(ValueError, match=r"density_pattern: .* is not a valid regex"):
        FGGMConfig(density_pattern={pattern: 0.1})


@settings(deadline=None, max_examples=500)
@given(st.data())
def test_a_mutated_config_raises_only_value_errors_and_loads_nothing_by_half(data):
    _, contents = saved_adapter()
    changed = data.draw(st.dictionaries(st.sampled_from(sorted(contents)), JSON, min_size=1, max_size=3))
    open_config(contents | changed)


@pytest.mark.parametrize("threshold", [ScoreMass(0.6), ScoreMass(0.6, scope="global"), TopDensity(0.5)])
def test_a_loaded_adapter_has_the_threshold_and_the_support_of_the_saved_one(threshold, granularity, adapt, tmp_path):
    model = adapt(nn.Linear(7, 5), density=None, threshold=threshold, granularity=granularity)
    x = torch.randn(3, 7)
    expected = model(x)
    model.save_pretrained(tmp_path)
    base = nn.Sequential()
    base.layer = model.unload().layer
    loaded = PeftModel.from_pretrained(base, tmp_path)
    assert loaded.peft_config["default"].threshold == threshold
    assert torch.equal(loaded.train()(x), expected)


@pytest.mark.parametrize(("size", "count"), [(1000, 1000), ("8GiB", 2**33), ("8 gib", 2**33), ("8gb", 8 * 10**9)])
def test_a_size_is_parsed_with_every_spelling_of_its_unit(size, count):
    assert score_bytes(size) == count


# Fields that the library writes --------------------------------------------------------------------

WRITTEN = [field.name for field in dataclasses.fields(FGGMConfig) if not field.init]


def test_the_user_sets_at_most_30_fields():
    own = {field.name for field in dataclasses.fields(FGGMConfig) if field.init}
    assert len(own - {field.name for field in dataclasses.fields(PeftConfig)}) <= 30


@pytest.mark.parametrize("name", WRITTEN)
def test_fields_that_the_library_writes_are_not_keywords(name):
    with pytest.raises(TypeError, match=name):
        FGGMConfig(**{name: None})


def test_every_way_to_read_a_config_restores_the_fields_of_the_library(tmp_path):
    config = FGGMConfig(budget="1%")
    written = {
        "selection": {"samples": 64},
        "support_sizes": {"q": 1},
        "index_bytes": {"q": 1},
        "resolved_budget": 5,
        "base_fingerprint": None,
        "made_with": {"torch": "2"},
        "fggm_format": 1,
    }
    assert written.keys() == set(WRITTEN)
    vars(config).update(written)
    config.save_pretrained(tmp_path)
    saved = FGGMConfig.from_json_file(tmp_path / "adapter_config.json")
    assert saved.items() >= written.items()
    for again in (
        FGGMConfig.from_pretrained(tmp_path),
        PeftConfig.from_pretrained(tmp_path),
        FGGMConfig.from_peft_type(**saved),
        PeftConfig.from_peft_type(**saved),
        get_peft_config(saved),
        copy.deepcopy(config),
        pickle.loads(pickle.dumps(config)),
    ):
        assert {name: getattr(again, name) for name in WRITTEN} == written and again.policy().count == 5


def test_unknown_fields_of_a_saved_config_are_ignored_with_a_warning(tmp_path):
    config = FGGMConfig()
    config.selection = {"samples": 64}
    saved = {**config.to_dict(), "field_of_a_later_version": 1}
    (tmp_path / "adapter_config.json").write_text(json.dumps(saved))
    with pytest.warns(UserWarning, match=r"keyword arguments \['field_of_a_later_version'\]"):
        assert PeftConfig.from_pretrained(tmp_path).selection == {"samples": 64}


def test_a_granularity_is_a_name_an_instance_or_a_dict(tmp_path):
    configs = [FGGMConfig(granularity=value) for value in ("column", Columns(), {"granularity": "column"})]
    assert configs[0].granularity == configs[1].granularity == configs[2].granularity == Columns()
    assert_comes_back(configs[1], tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["granularity"] == "column"


@pytest.mark.parametrize("layers", [2, 4])
def test_layers_to_transform_also_restricts_all_linear_layers(layers):
    """PEFT ignores it for the paths of modules, which "all-linear" stands for in a model with few of them."""
    model = get_peft_model(llama(layers=layers), FGGMConfig(layers_to_transform=[0]))
    assert {path.split(".")[2] for path in find_targets(model, "default")} == {"0"}
    with pytest.raises(ValueError, match=r"layers_to_transform=\[9\]"):
        get_peft_model(llama(layers=layers), FGGMConfig(layers_to_transform=[9]))
