"""The public names: those of the version before, those of the registry, and what loads when."""

from __future__ import annotations

import subprocess
import sys

import pytest

import vlprune_ext as vp
from vlprune_ext.methods import METHODS, REGISTRY, TOKENS

OF_0_1_0 = [
    "CoMP",
    "Contrastive",
    "Data",
    "DivPrune",
    "DropHead",
    "DropLayer",
    "DropNeurons",
    "ECoFLaP",
    "FastV",
    "GlobalMagnitude",
    "JointSequential",
    "JointSimultaneous",
    "LMLoss",
    "LookM",
    "Magnitude",
    "MoPE",
    "Module",
    "Objective",
    "PLPHP",
    "ParametersOnly",
    "PerturbWeight",
    "Plan",
    "Pruning",
    "PyramidDrop",
    "Random",
    "RandomTokens",
    "Replay",
    "Result",
    "Retrieval",
    "Scores",
    "SparseGPT",
    "Taylor",
    "ToMe",
    "TokensOnly",
    "VisionZip",
    "Wanda",
    "ZeroShot",
    "__version__",
    "apply",
    "describe",
    "distill",
    "evaluate",
    "load_data",
    "load_pruned",
    "masked",
    "measure",
    "ops",
    "plan_cost",
    "prune",
    "prune_tokens",
    "prune_weights",
    "reference",
    "save_pruned",
    "score",
    "to_semi_structured",
    "train",
    "zoo",
]


@pytest.mark.parametrize("name", sorted({*OF_0_1_0, *vp.__all__}))
def test_a_public_name_leads_somewhere(name):
    assert name in vp.__all__
    assert name in dir(vp)
    assert getattr(vp, name) is not None


@pytest.mark.parametrize("entry", REGISTRY, ids=lambda entry: entry.class_name)
def test_a_registered_method_is_a_public_name(entry):
    method = getattr(vp, entry.class_name)
    assert method.__name__ == entry.class_name
    assert method.__module__ == f"vlprune_ext.methods.{entry.module}"
    assert (TOKENS if entry.module.startswith("tokens.") else METHODS)[entry.name] is method
    assert method.__doc__
    assert entry.summary


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="has no attribute 'Prune'"):
        vp.Prune  # noqa: B018


def test_a_family_is_registered_in_a_fresh_process():
    program = (
        "import sys, vlprune_ext as vp; assert 'torch' not in sys.modules;"
        "vp.anatomy.register('MyModel', vp.anatomy.FAMILIES['CLIPModel']); print('MyModel' in vp.anatomy.FAMILIES)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "True\n"
