"""Layer-wise pruning against the procedure written out: hook every linear, run the whole model, prune, go on."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from models import tiny
from models.tiny import digest, setting

import vlprune_ext as vp
from vlprune_ext.anatomy import describe
from vlprune_ext.plan import Plan
from vlprune_ext.weights import criteria
from vlprune_ext.weights.layerwise import Selection, prune_layerwise, used_matrices
from vlprune_ext.weights.matrices import matrices

BATCH = 4  # does not divide the data: the last batch is smaller
BLOCKS = {
    "clip": {"vision": "vision_model.encoder.layers", "text": "text_model.encoder.layers"},
    "llava": {"vision": "model.vision_tower.encoder.layers", "text": "model.language_model.layers"},
    "t5": {"encoder": "encoder.block", "decoder": "decoder.block"},
    "blip2_opt": {"vision": "vision_model.encoder.layers", "text": "language_model.model.decoder.layers"},
}
# Those whose text or answers are padded, but for twins of another.
PADDED = ("clip", "blip_itr", "blip_vqa", "llava", "t5", "opt", "blip2_opt", "blip2_t5")


def uneven(chosen) -> dict[str, float]:
    return {matrix.name: 0.3 + 0.05 * (i % 9) for i, matrix in enumerate(chosen)}


def pruned(name: str, data=None, sparsity: float = 0.5, **fields):
    model, anatomy, objective, own = setting(name)
    chosen = used_matrices(anatomy, objective, own)
    shares = {matrix.name: sparsity for matrix in chosen}
    prune_layerwise(anatomy, objective, data or own, shares, Selection(batch_size=BATCH, **fields))
    return model


def zeros(weight) -> int:
    return int((weight == 0).sum())


# --- the procedure ---------------------------------------------------------------------------------------------------


def whole_runs(name, model, data, tower):
    """Run the whole model on the data, batch by batch; yield the mask of the tower's tokens and of what it reads."""
    for start in range(0, len(data), BATCH):
        images = {key: value[start : start + BATCH] for key, value in data.images.items()}
        texts = {key: value[start : start + BATCH] for key, value in data.texts.items()}
        labels = texts.pop("labels", None)
        mask = texts["attention_mask"]
        if name == "t5":
            real = labels != -100
            texts |= {"decoder_input_ids": labels.where(real, tiny.PAD), "decoder_attention_mask": real.long()}
            yield (real, mask) if tower == "decoder" else (mask, None)
        else:
            yield (None if tower == "vision" else mask), None
        model(**images, **texts)


@torch.no_grad()
def naive(name, data, sparsity, criterion, scope):
    """What enters each linear of a block in whole runs of the model as it is by then; prune them; next block."""
    model = tiny.build(name)
    for tower, path in BLOCKS[name].items():
        for place, block in enumerate(model.get_submodule(path)):
            linears = {key: module for key, module in block.named_modules() if isinstance(module, torch.nn.Linear)}
            squares = {key: torch.zeros(module.in_features, dtype=torch.float64) for key, module in linears.items()}
            masks = [None, None]

            def add(key, x, squares=squares, masks=masks):
                mask = masks[key.endswith(("EncDecAttention.k", "EncDecAttention.v"))]
                x = x.flatten(0, -2).double()
                squares[key] += (x if mask is None else x[mask.flatten().bool()]).square().sum(0)

            handles = [
                module.register_forward_pre_hook(lambda _, args, key=key, add=add: add(key, args[0]))
                for key, module in linears.items()
            ]
            for masks[:] in whole_runs(name, model, data, tower) if criterion == "wanda" else ():
                pass
            for handle in handles:
                handle.remove()
            for key, module in linears.items():
                scale = squares[key].sqrt().float() if criterion == "wanda" else 1
                scores = module.weight.abs() * scale
                of_tower = scope or ("matrix" if tower == "vision" and name != "clip" else "row")
                if of_tower == "matrix":
                    scores = scores.view(1, -1)
                count = round(sparsity[f"{path}.{place}.{key}.weight"] * scores.shape[1])
                order = scores.sort(dim=1, stable=True).indices[:, :count]
                gone = torch.zeros_like(scores, dtype=torch.bool).scatter_(1, order, True)
                module.weight.masked_fill_(gone.view(module.weight.shape), 0)
    return model


@pytest.mark.parametrize(
    ("name", "criterion", "scope"),
    [(name, criterion, None) for name in BLOCKS for criterion in ("wanda", "magnitude")]
    + [("clip", "wanda", "matrix"), ("llava", "magnitude", "row")],
)
def test_equals_whole_runs(name, criterion, scope):
    model, anatomy, objective, data = setting(name)
    sparsity = uneven(matrices(anatomy))
    dense = copy.deepcopy(model.state_dict())
    prune_layerwise(anatomy, objective, data, sparsity, Selection(criterion, scope=scope, batch_size=BATCH))
    expected = naive(name, data, sparsity, criterion, scope).state_dict()
    for key, weight in model.state_dict().items():
        assert torch.equal(weight, expected[key]), key
        assert torch.equal(weight[weight != 0], dense[key][weight != 0]), key  # what is kept is as it was
        if key not in sparsity:
            assert torch.equal(weight, dense[key]), key
            continue
        tower = next(tower for tower, path in BLOCKS[name].items() if key.startswith(path))
        if (scope or ("matrix" if tower == "vision" and name != "clip" else "row")) == "row":
            assert ((weight == 0).sum(1) == round(sparsity[key] * weight.shape[1])).all(), key
        else:
            assert zeros(weight) == round(sparsity[key] * weight.numel()), key
            assert len((weight == 0).sum(1).unique()) > 1, key


def test_what_is_pruned_feeds_what_follows():
    """The text model sees pruned images, and block 1 the pruned block 0."""
    _, anatomy, _, data = setting("llava")
    every = {matrix.name: 0.7 for matrix in matrices(anatomy)}

    def text(shares):
        model, anatomy, objective, _ = setting("llava")
        prune_layerwise(anatomy, objective, data, shares, Selection(batch_size=BATCH))
        return model.model.language_model.layers

    together = text(every)
    alone = text({key: share for key, share in every.items() if "language_model" in key})
    assert not torch.equal(together[0].mlp.up_proj.weight, alone[0].mlp.up_proj.weight)
    later = text({key: share for key, share in every.items() if "language_model.layers.1" in key})
    assert not torch.equal(alone[1].mlp.up_proj.weight, later[1].mlp.up_proj.weight)


def test_order_and_progress():
    _, anatomy, objective, data = setting("t5")
    shares = {matrix.name: 0.5 for matrix in matrices(anatomy)}
    heard = []
    backwards = dict(reversed(list(shares.items())))
    prune_layerwise(anatomy, objective, data, backwards, Selection(), progress=lambda *said: heard.append(said))
    assert heard == [(i, 3, f"{tower} blocks") for tower in ("encoder", "decoder") for i in (1, 2, 3)]


def test_training_mode_and_flags_come_back():
    model, anatomy, objective, data = setting("t5")
    model.train()
    model.encoder.eval()
    model.lm_head.requires_grad_(False)
    modes = [module.training for module in model.modules()]
    flags = [parameter.requires_grad for parameter in model.parameters()]
    shares = {matrix.name: 0.5 for matrix in matrices(anatomy)}
    prune_layerwise(anatomy, objective, data, shares, Selection())
    assert [module.training for module in model.modules()] == modes
    assert [parameter.requires_grad for parameter in model.parameters()] == flags
    model.eval()
    assert digest(model) == digest(pruned("t5"))  # dropout had no part in it, nor the size of the batches
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())


@pytest.mark.parametrize(
    ("dtype", "criterion"), [*((torch.bfloat16, name) for name in criteria.CRITERIA), (torch.float16, "wanda")]
)
def test_half_precision(dtype, criterion):
    model = tiny.build("clip").to(dtype)
    data = tiny.retrieval_data("clip", model, 6)
    data.images["pixel_values"] = data.images["pixel_values"].to(dtype)
    vp.prune_weights(model, data, 0.5, criterion=criterion)
    for matrix in matrices(describe(model)):
        assert matrix.weight.dtype == dtype
        assert matrix.weight.isfinite().all()
        assert zeros(matrix.weight) == matrix.weight.numel() // 2


# --- padding ---------------------------------------------------------------------------------------------------------


def other_padding(data):
    """Other tokens where the mask is 0."""
    texts = dict(data.texts)
    padding = texts["attention_mask"] == 0
    assert padding.any()
    words = torch.randint(3, tiny.BOS, padding.shape, generator=torch.Generator().manual_seed(5))
    texts["input_ids"] = words.where(padding, texts["input_ids"])
    if "qformer_input_ids" in texts:
        texts["qformer_input_ids"] = words[:, -texts["qformer_input_ids"].shape[1] :].where(
            texts["qformer_attention_mask"] == 0, texts["qformer_input_ids"]
        )
    return replace(data, texts=texts)


def longer(data):
    """More padding after every text and every answer."""
    fill = {"input_ids": tiny.PAD, "labels": -100}

    def padded(key, value):
        return torch.cat([value, value.new_full((len(value), 5), fill.get(key, 0))], 1)

    together = data.texts["attention_mask"].shape == data.texts.get("labels", torch.empty(0)).shape
    keys = data.texts.keys() if together else {"labels"} & data.texts.keys()
    return replace(data, texts={k: padded(k, v) if k in keys else v for k, v in data.texts.items()})


@pytest.mark.parametrize("name", PADDED)
def test_padding_counts_nowhere(name):
    """Answers of an encoder-decoder are padded where they have no labels."""
    *_, data = setting(name)
    expected = pruned(name, data).state_dict()
    changed = longer(data)
    if name != "blip_vqa":  # transformers' own decoder attends to the padding of the question
        changed = other_padding(changed)
    for key, weight in pruned(name, changed).state_dict().items():
        assert torch.equal(weight, expected[key]), key


@pytest.mark.parametrize("criterion", ["ria", "sparsegpt"])
def test_padding_counts_nowhere_whatever_the_criterion(criterion):
    *_, data = setting("opt")
    expected = pruned("opt", data, criterion=criterion).state_dict()
    for key, weight in pruned("opt", other_padding(data), criterion=criterion).state_dict().items():
        torch.testing.assert_close(weight, expected[key], rtol=1e-3, atol=1e-4)


def test_padding_would_count():
    """The tests above can fail: without a mask the tokens in its place change the outcome."""
    *_, data = setting("llama")
    blind = [
        replace(some, texts={**some.texts, "attention_mask": torch.ones_like(some.texts["attention_mask"])})
        for some in (data, other_padding(data))
    ]
    first, second = (digest(pruned("llama", some)) for some in blind)
    assert first != second


@pytest.mark.parametrize(
    ("name", "blocks"),
    # q, k and v; gate and up; in a decoder the keys and values of the cross attention.
    [("clip", {"vision": 4, "text": 4}), ("llava", {"vision": 4, "text": 4}), ("t5", {"encoder": 4, "decoder": 7})],
)
def test_one_statistic_for_all_that_read_one_tensor(monkeypatch, name, blocks):
    calls = []
    plain = criteria.column_norm_sq_
    monkeypatch.setattr(criteria, "column_norm_sq_", lambda *args: (calls.append(args), plain(*args))[1])
    pruned(name)
    batches = 2
    assert len(calls) == batches * sum(len(describe(tiny.build(name)).tower(t)) * n for t, n in blocks.items())


# --- what does not run -----------------------------------------------------------------------------------------------


def test_cross_attention_that_the_objective_never_calls():
    model, anatomy, objective, data = setting("blip_itr")
    before = copy.deepcopy(model.state_dict())
    chosen = {matrix.name for matrix in used_matrices(anatomy, objective, data)}
    beside = {matrix.name for matrix in matrices(anatomy)} - chosen
    assert beside
    assert all("crossattention" in name for name in beside)
    vp.prune_weights(model, data, 0.5)
    for key, weight in model.state_dict().items():
        assert (zeros(weight) > 0) == (key in chosen)
        assert key in chosen or torch.equal(weight, before[key])
    plan = Plan(anatomy.shape(), sparsity={min(beside): 0.5})
    with pytest.raises(ValueError, match=r"crossattention.*not a prunable matrix that objective 'contrastive' uses"):
        vp.apply(model, plan, data)


def test_some_matrices_only():
    model, anatomy, objective, data = setting("clip")
    before = copy.deepcopy(model.state_dict())
    some = {matrix.name: 0.5 for matrix in matrices(anatomy, ["text"]) if matrix.layer == 1}
    prune_layerwise(anatomy, objective, data, some, Selection())
    changed = {key for key, weight in model.state_dict().items() if not torch.equal(weight, before[key])}
    assert changed == set(some)


def test_a_plan_may_remove_units_too():
    """Sparsities are those of the whole model, so they come first."""
    model, anatomy, _, data = setting("clip")
    plan = Plan(anatomy.shape(), sparsity={matrix.name: 0.5 for matrix in matrices(anatomy)})
    plan.add("vision", "head", 1, [0, 2])
    plan.add("text", "neurons", 0, list(range(8)))
    vp.apply(model, plan, data, round_to=1)
    alone = pruned("clip")
    kept = alone.vision_model.encoder.layers[1].self_attn.q_proj.weight.view(4, 8, -1)[[1, 3]].flatten(0, 1)
    assert torch.equal(model.vision_model.encoder.layers[1].self_attn.q_proj.weight, kept)
    kept = alone.text_model.encoder.layers[0].mlp.fc1.weight[8:]
    assert torch.equal(model.text_model.encoder.layers[0].mlp.fc1.weight, kept)


# --- refusals, with the model as it was ------------------------------------------------------------------------------


def spoil_weight(value):
    def spoil(model, data):
        with torch.no_grad():
            model.text_model.encoder.layers[1].mlp.fc1.weight[3, 5] = value

    return spoil


def spoil_image(model, data):
    data.images["pixel_values"][4, 0, 0, 0] = torch.inf


@pytest.mark.parametrize(
    ("spoil", "fields", "message"),
    [
        (spoil_weight(torch.nan), {}, r"^text_model.encoder.layers.1.mlp.fc1.weight\[3, 5\] is nan; expected finite"),
        (spoil_weight(-torch.inf), {}, r"mlp.fc1.weight\[3, 5\] is -inf"),
        (spoil_weight(torch.nan), {"criterion": "magnitude"}, r"\[3, 5\] is nan"),
        (spoil_image, {}, "^data: the model is not finite on row 4 of tower 'vision' of tiny-clip"),
        (spoil_image, {"criterion": "sparsegpt"}, "not finite on row 4"),
        (None, {"pattern": "2:5"}, "^pattern: 2:5, but vision_model.*_proj.weight has 32 columns, which 5 does not"),
        (None, {"towers": ["audio"]}, "'audio'"),
    ],
)
def test_refusals(spoil, fields, message):
    model, _, _, data = setting("clip")
    if spoil:
        spoil(model, data)
    before = digest(model)
    with pytest.raises(ValueError, match=message):
        vp.prune_weights(model, data, 0.5, **fields)
    assert digest(model) == before
    assert not hasattr(model, "vlprune")


def test_rows_that_are_not_finite_are_named_in_a_language_model():
    model, _, _, data = setting("llava")
    data.images["pixel_values"][5] = torch.nan
    before = digest(model)
    with pytest.raises(ValueError, match="not finite on row 5 of tower 'vision' of tiny-llava"):
        vp.prune_weights(model, data, 0.5)
    assert digest(model) == before


def test_the_pattern_is_looked_at_before_anything_is_pruned():
    """Text blocks are 48 wide, which 32 does not divide, and come last."""
    model, _, _, data = setting("clip")
    before = digest(model)
    with pytest.raises(ValueError, match=r"16:32, but text_model.*fc2.weight has 48 columns"):
        vp.prune_weights(model, data, pattern="16:32")
    assert digest(model) == before


@pytest.mark.parametrize(
    ("sparsity", "selection", "with_data", "message"),
    [
        ({"vision_model.nonsense.weight": 0.5}, {}, True, "vision_model.nonsense.weight: not a prunable matrix"),
        ({"visual_projection.weight": 0.5}, {}, True, "visual_projection.weight: not a prunable matrix"),
        ({"text_model.encoder.layers.0.mlp.fc1.weight": 1.5}, {}, True, "fc1.weight: 1.5, expected"),
        ({"text_model.encoder.layers.0.mlp.fc1.weight": 0.5}, {}, False, "^data: needed"),
        ({"text_model.encoder.layers.0.mlp.fc1.weight": 0.5}, {"criterion": "luck"}, True, "criterion: 'luck'"),
        ({"text_model.encoder.layers.0.mlp.fc1.weight": 0.5}, {"mood": 1}, True, "plan: selection .*mood"),
        ({"text_model.encoder.layers.0.mlp.fc1.weight": 0.5}, {"objective": "x"}, True, "objective: 'x'"),
    ],
)
def test_plans_that_cannot_be_carried_out(sparsity, selection, with_data, message):
    model, anatomy, _, data = setting("clip")
    before = digest(model)
    plan = Plan(anatomy.shape(), sparsity=sparsity, selection=selection)
    with pytest.raises(ValueError, match=message):
        vp.apply(model, plan, data if with_data else None)
    assert digest(model) == before


def test_weights_elsewhere():
    model, _, _, data = setting("clip")
    block = model.text_model.encoder.layers[2]
    weight = block.mlp.fc2.weight
    block.mlp.fc2.weight = torch.nn.Parameter(weight.detach().to("meta"))
    with pytest.raises(ValueError, match=r"layers.2.mlp.fc2: its weights are not in memory"):
        vp.prune_weights(model, data, 0.5)
    block.mlp.fc2.weight = weight
    model.double()
    data.images["pixel_values"] = data.images["pixel_values"].double()
    with pytest.raises(ValueError, match=r"_proj.weight: its weights are torch.float64, expected float32"):
        vp.prune_weights(model, data, 0.5)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"criterion": "best"}, "criterion: 'best', expected one of wanda, magnitude, ria, sparsegpt"),
        ({"scope": "column"}, "scope: 'column', expected one of row, matrix"),
        ({"pattern": "4:2"}, "pattern: '4:2', expected 'unstructured' or 'n:m'"),
        ({"pattern": "0:4"}, "pattern: '0:4'"),
        ({"pattern": "half"}, "pattern: 'half'"),
        ({"damping": 0.0}, "damping: 0.0, expected a share"),
        ({"damping": 1.0}, "damping: 1.0"),
        ({"batch_size": 0}, "batch_size: 0, expected at least 1"),
    ],
)
def test_bad_selections(fields, message):
    with pytest.raises(ValueError, match=message):
        Selection(**fields)
