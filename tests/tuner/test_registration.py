"""FGGM is a member of PEFT's enum and mappings like any other method, even after repeated imports."""

from __future__ import annotations

import copy
import json
import multiprocessing
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftConfig, PeftType, get_peft_config
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from torch import nn

from fggm_peft import FGGMConfig, FGGMModel
from fggm_peft.tuner.registration import add_peft_type, register
from fggm_peft.tuner.several.hotswap import swap_in_place

ROOT = Path(__file__).parents[2]
MEMBER = PeftType("FGGM")


# Each scenario runs in a separate process that has imported PEFT but not fggm_peft.
SCENARIOS = {
    "imported twice": """
import importlib, sys
import fggm_peft
member = PeftType.FGGM
for module in (fggm_peft.tuner.registration, fggm_peft.tuner, fggm_peft):
    importlib.reload(module)
assert PeftType.FGGM is member and len(PeftType) == len(list(PeftType))
for name in [name for name in sys.modules if name.partition(".")[0] == "fggm_peft"]:
    del sys.modules[name]
import fggm_peft
assert PeftType("FGGM") is member and [m.name for m in PeftType].count("FGGM") == 1
assert fggm_peft.FGGMConfig().peft_type is member
""",
    "PEFT has an FGGM of its own": """
from peft.tuners.shira import ShiraConfig, ShiraModel
from peft.utils import register_peft_method
member = str.__new__(PeftType, "FGGM")
member._name_ = member._value_ = "FGGM"
PeftType._member_map_["FGGM"] = PeftType._value2member_map_["FGGM"] = member
PeftType._member_names_.append("FGGM")
type.__setattr__(PeftType, "FGGM", member)
class FGGMConfig(ShiraConfig): pass
class FGGMModel(ShiraModel): prefix = "fggm_"
register_peft_method(name="fggm", config_cls=FGGMConfig, model_cls=FGGMModel)

import fggm_peft
assert PeftType.FGGM is member and len(PeftType) == len(list(PeftType))
assert peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING[member] is FGGMConfig
assert peft.mapping.PEFT_TYPE_TO_TUNER_MAPPING[member] is FGGMModel
assert fggm_peft.FGGMConfig().peft_type is member
""",
    "the member is unpickled": f"""
import pickle
assert pickle.loads({pickle.dumps(MEMBER)!r}) is PeftType.FGGM
""",
    "a config is unpickled": f"""
import pickle
config = pickle.loads({pickle.dumps(FGGMConfig(density=0.2))!r})
assert (config.density, config.peft_type) == (0.2, PeftType.FGGM)
""",
}
RUNNER = """
import json, os, sys, tempfile, traceback
import peft
from peft import PeftType
problems = {}
for name, script in json.load(sys.stdin).items():
    with tempfile.TemporaryFile("w+") as report:
        if not (child := os.fork()):
            try:
                exec(script, {"peft": peft, "PeftType": PeftType})
            except BaseException:
                report.write(traceback.format_exc())
                report.flush()
            os._exit(0)
        status = os.waitpid(child, 0)[1]
        report.seek(0)
        problems[name] = report.read() or (f"exit status {status}" if status else "")
print(json.dumps(problems))
"""


@pytest.fixture(scope="module")
def problems():
    """Scenario -> error text, or ""; one interpreter imports PEFT and forks, because the import takes seconds."""
    if not hasattr(os, "fork"):
        pytest.skip("needs os.fork")
    command = [sys.executable, "-c", RUNNER]
    result = subprocess.run(command, cwd=ROOT, input=json.dumps(SCENARIOS), capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])


@pytest.mark.parametrize("name", SCENARIOS)
def test_a_fresh_process_works_when(name, problems):
    assert not problems[name], problems[name]


def test_the_member_exists_once_and_is_found_by_name_and_value():
    assert MEMBER is PeftType.FGGM is PeftType["FGGM"]
    assert MEMBER in PeftType
    assert [member.name for member in PeftType].count("FGGM") == 1
    assert len(list(PeftType)) == len(PeftType) == len(PeftType.__members__)
    assert isinstance(MEMBER, PeftType)
    assert (MEMBER.name, MEMBER.value) == ("FGGM", "FGGM")


def test_the_member_is_a_string_like_other_members():
    lora = PeftType.LORA
    assert MEMBER == "FGGM"
    assert hash(MEMBER) == hash("FGGM")
    for of in (str, repr, "{}".format):
        assert of(MEMBER) == of(lora).replace("LORA", "FGGM")
    assert lora != MEMBER


@pytest.mark.parametrize(
    "copy_member",
    [
        copy.copy,
        copy.deepcopy,
        *[lambda m, p=p: pickle.loads(pickle.dumps(m, p)) for p in range(pickle.HIGHEST_PROTOCOL + 1)],
        lambda member: PeftType(json.loads(json.dumps(member))),
    ],
)
def test_copies_pickle_and_json_return_the_same_member(copy_member):
    assert copy_member(MEMBER) is MEMBER
    assert copy_member(PeftType.LORA) is PeftType.LORA


def test_peft_maps_the_member_to_config_tuner_and_prefix():
    assert PEFT_TYPE_TO_CONFIG_MAPPING[MEMBER] is FGGMConfig
    assert PEFT_TYPE_TO_TUNER_MAPPING[MEMBER] is FGGMModel
    assert PEFT_TYPE_TO_PREFIX_MAPPING[MEMBER] == "fggm_"
    assert FGGMConfig().peft_type is MEMBER
    assert type(get_peft_config({"peft_type": "FGGM", "density": 0.2})) is FGGMConfig


def test_pefts_config_class_loads_an_fggm_folder(tmp_path):
    FGGMConfig(density=0.2, target_modules=["q"]).save_pretrained(tmp_path)
    config = PeftConfig.from_pretrained(tmp_path)
    assert type(config) is FGGMConfig
    assert (config.density, config.target_modules, config.peft_type) == (0.2, {"q"}, MEMBER)


def test_registering_again_changes_nothing():
    before = list(PeftType), dict(PEFT_TYPE_TO_CONFIG_MAPPING), dict(PEFT_TYPE_TO_TUNER_MAPPING)
    assert add_peft_type() is MEMBER
    register(FGGMConfig, FGGMModel, swap_in_place)
    assert (list(PeftType), dict(PEFT_TYPE_TO_CONFIG_MAPPING), dict(PEFT_TYPE_TO_TUNER_MAPPING)) == before


def adapt_in_worker(config: FGGMConfig, member: PeftType) -> tuple:
    """Adapt a model with a config that was sent to a worker process."""
    from peft import get_peft_model

    model = get_peft_model(nn.Sequential(nn.Linear(3, 4)), config)
    indices = model.base_model.model[0].fggm_indices["default"]
    return member, model.peft_config["default"], indices


def test_a_spawned_worker_receives_configs_and_members_and_selects_the_same_support():
    config = FGGMConfig(target_modules=["0"], criterion="random", seed=3, density=0.5)
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        member, returned, indices = pool.apply_async(adapt_in_worker, (config, MEMBER)).get(timeout=120)
    assert member is MEMBER
    assert {
        **returned.to_dict(),
        "base_fingerprint": None,
    } == config.to_dict()  # the worker added the fingerprint of its model
    assert torch.equal(indices, adapt_in_worker(config, MEMBER)[2])
