"""A pruned model comes back from disk as it was; a failed save or a damaged file harms nothing and says what it is."""

import errno
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from models import tiny
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoProcessor

from vlprune_ext.anatomy import describe
from vlprune_ext.apply_plan import apply
from vlprune_ext.checkpoint import load as loading
from vlprune_ext.checkpoint import load_model, load_record
from vlprune_ext.checkpoint import save as saving
from vlprune_ext.checkpoint.load import load_pruned
from vlprune_ext.checkpoint.save import save_pruned
from vlprune_ext.plan import Plan
from vlprune_ext.units.masking import masked
from vlprune_ext.units.rounding import round_plan

CLOSE = {"rtol": 1e-5, "atol": 1e-5}


@pytest.fixture(autouse=True)
def _quiet():
    """transformers reports loading problems at length; the tests look at what is raised."""
    before = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity(transformers.logging.CRITICAL)
    transformers.logging.disable_progress_bar()
    yield
    transformers.logging.set_verbosity(before)
    transformers.logging.enable_progress_bar()


def pruned(name, seed=0, **kwargs):
    model = tiny.build(name)
    return apply(model, tiny.uneven_plan(model, seed), **kwargs)


def uniform_plan(model, **kept):
    """``tower=(heads, neurons, layers)`` that stay in every block; the first of each go."""
    plan = Plan(describe(model).shape())
    for tower, (heads, neurons, layers) in kept.items():
        blocks = plan.shape[tower]
        for layer, units in enumerate(blocks):
            plan.add(tower, "head", layer, list(range(units["head"] - heads)))
            plan.add(tower, "neurons", layer, list(range(units["neurons"] - neurons)))
        for layer in range(len(blocks) - layers):
            plan.add(tower, "layer", layer, [])
    return plan


def content(folder, name="config.json"):
    return json.loads((folder / name).read_text())


def snapshot(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# --- there and back --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("name", tiny.NAMES)
def test_uneven_models_come_back(name, seed, tmp_path):
    model = tiny.build(name)
    values = tiny.inputs(name, model, 4)
    plan = tiny.uneven_plan(model, seed)
    with masked(model, round_plan(plan, 8)):
        expected = tiny.outputs(name, model, values)
    apply(model, plan)
    folder = save_pruned(model, tmp_path / "out")
    again = load_pruned(folder)
    torch.testing.assert_close(tiny.outputs(name, again, values), expected, **CLOSE)
    assert type(again) is type(model)
    assert not again.training
    assert describe(again).shape() == describe(model).shape()
    assert again.vlprune == model.vlprune
    assert {k: v.shape for k, v in again.state_dict().items()} == {k: v.shape for k, v in model.state_dict().items()}
    ties = [
        [len({id(p) for _, p in m.named_parameters(remove_duplicate=keep)}) for keep in (True, False)]
        for m in (model, again)
    ]
    assert ties[0] == ties[1]
    assert content(folder, "pruning.json")["loads_with"] == "vlprune_ext.load_pruned"

    # ... and once more, with a second plan on top.
    second = tiny.uneven_plan(again, 7, layers=False)
    with masked(again, round_plan(second, 8)):
        expected = tiny.outputs(name, again, values)
    apply(again, second)
    save_pruned(again, folder)
    third = load_pruned(folder)
    torch.testing.assert_close(tiny.outputs(name, third, values), expected, **CLOSE)
    assert len(third.vlprune["plans"]) == 2
    assert third.vlprune["shape"] == plan.shape


@pytest.mark.parametrize("name", tiny.NAMES)
def test_saving_leaves_the_model_alone(name, tmp_path):
    model = pruned(name)
    values = tiny.inputs(name, model)
    expected = tiny.outputs(name, model, values)
    config, before = model.config, model.config.to_dict()
    save_pruned(model, tmp_path / "out")
    assert model.config is config
    assert config.to_dict() == before
    torch.testing.assert_close(tiny.outputs(name, model, values), expected, rtol=0, atol=0)


def test_plain_config_never_becomes_heterogeneous(tmp_path):
    again = load_pruned(save_pruned(pruned("clip"), tmp_path / "out"))
    for config in (again.config, again.config.text_config, again.config.vision_config):
        assert "per_layer_config" not in config.to_dict()
        assert not config.is_heterogeneous
    assert again.config.vision_config.num_attention_heads == 4


@pytest.mark.parametrize("name", ["clip", "llama"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_dtype_and_shards(name, dtype, tmp_path):
    model = pruned(name)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    folder = save_pruned(model, tmp_path / "out", max_shard_size="20KB")
    assert len(list(folder.glob("*.safetensors"))) > 1
    again = load_pruned(folder)
    saved = dict(model.named_parameters())
    for key, parameter in again.named_parameters():
        assert parameter.dtype == dtype
        assert torch.equal(parameter, saved[key]), key
    assert {p.dtype for p in load_pruned(folder, dtype=torch.float32).parameters()} == {torch.float32}


def test_generates_after_loading(tmp_path):
    model = pruned("llama")
    values = tiny.inputs("llama", model)
    prompt = {"input_ids": values["input_ids"][:, :4], "attention_mask": values["attention_mask"][:, :4]}
    again = load_pruned(save_pruned(model, tmp_path / "out"))
    settings = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
    assert torch.equal(again.generate(**prompt, **settings), model.generate(**prompt, **settings))


def test_no_dense_weights_on_the_way(tmp_path, monkeypatch):
    """The model is shaped while its weights are still without memory."""
    folder = save_pruned(pruned("clip"), tmp_path / "out")
    seen = []
    shrink = loading.shrink

    def watch(model, structure):
        seen.append({p.device.type for p in model.parameters()})
        shrink(model, structure)

    monkeypatch.setattr(loading, "shrink", watch)
    build = transformers.CLIPModel.__init__
    load_pruned(folder)
    assert seen == [{"meta"}]
    assert transformers.CLIPModel.__init__ is build


# --- what transformers loads by itself -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "kept"),
    [
        ("clip", {"vision": (4, 40, 3), "text": (4, 48, 2)}),
        ("siglip", {"vision": (4, 64, 1), "text": (4, 16, 3)}),
        ("blip_itr", {"vision": (4, 32, 4), "text": (4, 24, 2)}),
        ("blip_vqa", {"vision": (4, 32, 3), "text": (4, 24, 2), "decoder": (4, 24, 2)}),
        ("llava", {"vision": (4, 32, 3), "text": (1, 24, 3)}),
        ("vit", {"vision": (3, 56, 4)}),
        ("vit", {"vision": (1, 64, 2)}),
        ("llama", {"text": (1, 40, 2)}),
    ],
)
def test_uniform_results_load_with_from_pretrained(name, kept, tmp_path):
    model = tiny.build(name)
    values = tiny.inputs(name, model)
    plan = uniform_plan(model, **kept)
    apply(model, plan)
    expected = tiny.outputs(name, model, values)
    folder = save_pruned(model, tmp_path / "out")
    again, info = type(model).from_pretrained(folder, output_loading_info=True)
    assert not any(info.values())
    torch.testing.assert_close(tiny.outputs(name, again.eval(), values), expected, **CLOSE)
    torch.testing.assert_close(tiny.outputs(name, load_pruned(folder), values), expected, **CLOSE)
    assert content(folder, "pruning.json")["loads_with"] == "transformers from_pretrained"
    assert "per_layer_config" not in (folder / "config.json").read_text()
    assert f"{type(model).__name__}.from_pretrained(path)" in (folder / "README.md").read_text()


@pytest.mark.parametrize("name", tiny.NAMES)
def test_masked_results_load_with_from_pretrained(name, tmp_path):
    model = tiny.build(name)
    values = tiny.inputs(name, model)
    apply(model, tiny.uneven_plan(model, 2, layers=not name.startswith("blip")), mode="mask")
    expected = tiny.outputs(name, model, values)
    folder = save_pruned(model, tmp_path / "out")
    again, info = type(model).from_pretrained(folder, output_loading_info=True)
    assert not any(info.values())
    torch.testing.assert_close(tiny.outputs(name, again.eval(), values), expected, **CLOSE)
    assert load_pruned(folder).vlprune["plans"][0]["mode"] == "mask"


@pytest.mark.parametrize("name", ["clip", "siglip", "blip_itr", "llava", "vit", "llama"])
def test_uneven_layers_are_written_in_the_words_of_transformers(name, tmp_path):
    model = pruned(name)
    folder = save_pruned(model, tmp_path / "out")
    config = AutoConfig.from_pretrained(folder)
    for tower in describe(model).towers.values():
        of_tower = getattr(config, tower.paths.config) if tower.paths.config else config
        assert of_tower.num_hidden_layers == len(tower)
        assert of_tower.is_heterogeneous
        for layer, block in enumerate(tower.blocks):
            view = of_tower.per_layer_config[layer]
            assert view.intermediate_size == block.sites["neurons"].units
            head = block.sites["head"]
            grouped = getattr(view, "num_key_value_heads", None)
            assert (grouped or view.num_attention_heads) == head.units
            assert view.num_attention_heads * 8 == head.out.in_features


def test_uneven_models_are_refused_by_from_pretrained(tmp_path):
    """Never a silently wrong model."""
    for name in ("clip", "vit", "llama"):
        folder = save_pruned(pruned(name), tmp_path / name)
        with pytest.raises(RuntimeError, match="mismatched"):
            type(tiny.build(name)).from_pretrained(folder)


def test_heads_that_a_config_cannot_say(tmp_path):
    """CLIP divides its width by the heads; LLaMA refuses heads that do not divide its width."""
    model = tiny.build("clip")
    apply(model, uniform_plan(model, vision=(2, 64, 4), text=(4, 48, 3)))
    folder = save_pruned(model, tmp_path / "clip")
    assert content(folder)["vision_config"]["per_layer_config"]["3"] == {"num_attention_heads": 2}
    assert "per_layer_config" not in content(folder)["text_config"]

    config = transformers.LlamaConfig(**{**tiny._LLAMA, "num_key_value_heads": 4})
    model = transformers.LlamaForCausalLM(config).eval()
    tiny.randomise(model)
    apply(model, uniform_plan(model, text=(3, 40, 4)))
    values = tiny.inputs("llama", model)
    folder = save_pruned(model, tmp_path / "llama")
    written = content(folder)
    assert written["intermediate_size"] == 40
    assert written["num_attention_heads"] == 4
    assert written["per_layer_config"]["0"] == {"num_attention_heads": 3, "num_key_value_heads": 3}
    torch.testing.assert_close(
        tiny.outputs("llama", load_pruned(folder), values), tiny.outputs("llama", model, values), **CLOSE
    )


# --- what the folder holds -------------------------------------------------------------------------------------------


def test_record_and_card(tmp_path):
    model = tiny.build("clip")
    data = tiny.retrieval_data("clip", model)
    plan = tiny.uneven_plan(model, 0)
    plan.method = {"name": "MoPE", "keep_heads": 0.5}
    apply(model, plan, data)
    folder = save_pruned(model, tmp_path / "out", before={"recall@1": 0.92}, after={"recall@1": torch.tensor(0.875)})
    record = content(folder, "pruning.json")
    assert record["method"] == plan.method
    assert record["data"] == {"name": "tiny-clip", "hash": data.hash}
    assert record["measured"] == {"before": {"recall@1": 0.92}, "after": {"recall@1": 0.875}}
    assert record["versions"]["torch"] == torch.__version__
    assert record["versions"]["transformers"] == transformers.__version__
    assert record["structure"] == describe(model).shape()
    assert record["shape"] == plan.shape
    assert Plan.from_dict(record["plans"][0]["plan"]) == round_plan(plan, 8)
    assert sorted(record["files"]) == sorted(os.listdir(folder))
    card = (folder / "README.md").read_text()
    for part in (
        "CLIPModel",
        "MoPE",
        "| recall@1 | 0.92 | 0.875 |",
        "vp.load_pruned(path)",
        data.hash,
        "| text | 2 / 3 |",
    ):
        assert part in card
    assert not list(folder.glob("*.bin"))


def test_method_objects_and_plain_dicts(tmp_path):
    from dataclasses import dataclass

    @dataclass
    class Mine:
        keep: float = 0.5

    model = pruned("vit")
    save_pruned(model, tmp_path / "a", method=Mine(), data={"name": "digits", "hash": "12"})
    record = content(tmp_path / "a", "pruning.json")
    assert record["method"] == {"name": "Mine", "keep": 0.5}
    assert record["data"] == {"name": "digits", "hash": "12"}
    save_pruned(model, tmp_path / "b", method={"name": "by hand"})
    assert content(tmp_path / "b", "pruning.json")["method"] == {"name": "by hand"}


def test_processor_goes_along(tmp_path):
    vocabulary = {f"t{i}": i for i in range(60)} | {"<|startoftext|>": 60, "<|endoftext|>": 61}
    tokenizer = transformers.CLIPTokenizer(vocab=vocabulary, merges=[])
    processor = transformers.CLIPProcessor(transformers.CLIPImageProcessorPil(), tokenizer)
    folder = save_pruned(pruned("clip"), tmp_path / "out", processor=processor)
    again = load_pruned(folder)
    assert type(AutoProcessor.from_pretrained(again.name_or_path)) is transformers.CLIPProcessor
    assert {"tokenizer.json", "processor_config.json"} <= set(content(folder, "pruning.json")["files"])


# --- whole or not at all ---------------------------------------------------------------------------------------------


def no_space(*_, **__):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def rust_no_space(*_, **__):
    raise safetensors_error("Error while serializing: I/O error: No space left on device (os error 28)")


def safetensors_error(text):
    from safetensors import SafetensorError

    return SafetensorError(text)


FAILURES = {
    "fsync": ("os.fsync", no_space),
    "weights": ("transformers.modeling_utils.safe_save_file", rust_no_space),
    "config": ("transformers.PreTrainedConfig.save_pretrained", no_space),
    "rename": ("os.replace", no_space),
}


@pytest.mark.parametrize("failure", FAILURES)
@pytest.mark.parametrize("existing", [False, True])
def test_no_space_left(failure, existing, tmp_path, monkeypatch):
    model = pruned("vit", 0)
    out = tmp_path / "out"
    if existing:
        save_pruned(pruned("vit", 1), out)
        if failure == "rename":
            rename = os.rename
            monkeypatch.setattr(os, "rename", lambda a, b: no_space() if ".earlier" not in f"{a}{b}" else rename(a, b))
    before = snapshot(out) if existing else None
    target, fail = FAILURES[failure]
    config, settings = model.config, model.config.to_dict()
    with monkeypatch.context() as patch:
        patch.setattr(target, fail)
        with pytest.raises(OSError, match="No space left on device") as error:
            save_pruned(model, out)
    assert error.value.errno == errno.ENOSPC
    assert os.listdir(tmp_path) == (["out"] if existing else [])
    if existing:
        assert snapshot(out) == before
        load_pruned(out)
    assert model.config is config
    assert config.to_dict() == settings


def test_interrupted(tmp_path, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(saving, "model_card", interrupt)
    with pytest.raises(KeyboardInterrupt):
        save_pruned(pruned("vit"), tmp_path / "out")
    assert os.listdir(tmp_path) == []


def test_earlier_pruned_model_is_replaced_and_other_files_stay(tmp_path):
    out = tmp_path / "out"
    save_pruned(pruned("clip"), out, max_shard_size="20KB")
    (out / "report.html").write_text("mine")
    (out / "notes").mkdir()
    (out / "notes" / "a.txt").write_text("mine too")
    model = pruned("vit", 1)
    save_pruned(model, out)
    assert (out / "report.html").read_text() == "mine"
    assert (out / "notes" / "a.txt").read_text() == "mine too"
    assert [path.name for path in out.glob("*.safetensors")] == ["model.safetensors"]
    assert type(load_pruned(out)) is type(model)
    assert os.listdir(tmp_path) == ["out"]


def test_other_folders_are_not_replaced(tmp_path):
    model = pruned("vit")
    out = tmp_path / "photos"
    out.mkdir()
    save_pruned(model, out)  # empty: fine
    shutil.rmtree(out)
    out.mkdir()
    (out / "holiday.jpg").write_bytes(b"irreplaceable")
    with pytest.raises(ValueError, match=r"photos: not empty and not an earlier pruned model"):
        save_pruned(model, out)
    assert snapshot(out) == {"holiday.jpg": b"irreplaceable"}
    with pytest.raises(ValueError, match=r"holiday\.jpg: a file, expected a folder"):
        save_pruned(model, out / "holiday.jpg")
    (out / "holiday.jpg").rename(out / "pruning.json")
    with pytest.raises(ValueError, match="not an earlier pruned model"):
        save_pruned(model, out)


def test_unknown_models_are_not_saved(tmp_path):
    config = transformers.BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8)
    with pytest.raises(ValueError, match="BertModel is not known"):
        save_pruned(transformers.BertModel(config), tmp_path / "out")
    assert os.listdir(tmp_path) == []


# --- damaged and wrong folders ---------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    return save_pruned(pruned("vit"), tmp_path / "out")


def test_no_such_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nothing/here: no such folder"):
        load_pruned(tmp_path / "nothing" / "here")
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"file: a file, expected the folder"):
        load_pruned(tmp_path / "file")


def test_hub_is_asked_for_model_ids_only(monkeypatch):
    import huggingface_hub

    asked = []

    def offline(name, **_):
        asked.append(name)
        raise OSError("offline\nsecond line")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    for path in ("./a/b", "a", "/a/b/c", "../a/b"):
        with pytest.raises(FileNotFoundError, match=r"no such folder$"):
            load_pruned(path)
    assert asked == []
    with pytest.raises(FileNotFoundError, match=r"^someone/vit: no such folder, and not found on the hub \(off"):
        load_pruned("someone/vit")
    assert asked == ["someone/vit"]


def test_plain_folders_are_sent_to_from_pretrained(tmp_path):
    tiny.build("vit").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"no pruning\.json, .* loads with from_pretrained"):
        load_pruned(tmp_path)


@pytest.mark.parametrize("left", [0, 4, 100, 0.5, 0.999])
def test_truncated_weights(folder, left):
    file = folder / "model.safetensors"
    raw = file.read_bytes()
    cut = left if isinstance(left, int) else int(left * len(raw))
    file.write_bytes(raw[:cut])
    where = "damaged or truncated in its header" if cut <= 100 else r"truncated: tensor \w"
    with pytest.raises(ValueError, match=where) as error:
        load_pruned(folder)
    assert str(file) in str(error.value)


def test_truncated_shard_is_named(tmp_path):
    folder = save_pruned(pruned("clip"), tmp_path / "out", max_shard_size="20KB")
    shard = sorted(folder.glob("*.safetensors"))[1]
    with safe_open(shard, "pt") as file:
        names = list(file.keys())
    shard.write_bytes(shard.read_bytes()[:-10])
    with pytest.raises(ValueError, match=rf"{shard.name}: truncated: tensor ") as error:
        load_pruned(folder)
    assert str(error.value).split("tensor ")[1].split()[0] in names
    shard.unlink()
    with pytest.raises(ValueError, match=rf"{shard.name}: missing"):
        load_pruned(folder)


def test_damaged_header(folder):
    file = folder / "model.safetensors"
    raw = bytearray(file.read_bytes())
    raw[8:20] = b"\0" * 12
    file.write_bytes(raw)
    with pytest.raises(ValueError, match=r"model\.safetensors: damaged header"):
        load_pruned(folder)
    file.write_bytes(b"PK\3\4" + b"\0" * 4000)
    with pytest.raises(ValueError, match=r"model\.safetensors: damaged"):
        load_pruned(folder)


def test_tensors_must_be_those_promised(folder):
    file = folder / "model.safetensors"
    tensors = load_file(file)
    name = next(key for key in tensors if key.endswith("output.dense.bias") and ".0." in key)
    for change, message in (
        ({name: None}, r"out: its tensors do not fit pruning\.json: layers\.0\.\S+ missing"),
        ({"extra": torch.zeros(2)}, r"extra unexpected"),
        ({name: torch.zeros(31)}, r"layers\.0\.\S+ has shape \[31\], expected \[32\]"),
    ):
        wrong = {key: value for key, value in {**tensors, **change}.items() if value is not None}
        save_file(wrong, file, metadata={"format": "pt"})
        with pytest.raises(ValueError, match=message):
            load_pruned(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r: r.update(kind="plan"), "not written by vlprune_ext"),
        (lambda r: r.update(format=99), "format 99, this version reads 1"),
        (lambda r: r.pop("structure"), "malformed, expected 'shape', 'structure' and 'plans'"),
        (lambda r: r.update(structure={"vision": [{"head": "two"}]}), "malformed"),
        (lambda r: r["structure"]["vision"][0].update(head=9), r"pruning\.json: structure: 9 head in block vision\.0"),
        (lambda r: r["structure"]["vision"][0].update(neurons=0), "0 neurons in block vision.0, expected 1 to 64"),
        (lambda r: r["structure"]["vision"][0].pop("head"), r"block vision\.0 has neurons, the model's has head, neu"),
        (lambda r: r["structure"]["vision"].extend([{}] * 3), "6 blocks of tower 'vision', the config gives 3"),
        (lambda r: r.update(structure={"text": []}), "structure: towers text, the model's are vision"),
    ],
)
def test_malformed_record(folder, change, message):
    record = content(folder, "pruning.json")
    change(record)
    (folder / "pruning.json").write_text(json.dumps(record))
    with pytest.raises(ValueError, match=message):
        load_pruned(folder)
    assert "build_pruned" not in transformers.ViTModel.__init__.__qualname__


def test_malformed_config(folder):
    config = content(folder)
    for change, message in (
        ({"architectures": ["os"]}, r"architectures \['os'\], expected the name of a transformers model"),
        ({"architectures": None}, r"architectures \[None\]"),
        ({"hidden_size": "wide"}, r"config\.json: .*hidden_size"),
    ):
        (folder / "config.json").write_text(json.dumps({**config, **change}))
        with pytest.raises(ValueError, match=message):
            load_pruned(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json: not JSON"):
        load_pruned(folder)
    (folder / "config.json").unlink()
    with pytest.raises(ValueError, match=r"out: no config\.json"):
        load_pruned(folder)


@pytest.mark.parametrize("name", [name for name in tiny.EVERY if name not in tiny.NAMES])
def test_every_family_comes_back_with_uneven_units(name, tmp_path):
    """Also where a config has names of its own: OPT's ffn_dim, T5's num_heads, d_ff and d_kv."""
    model = tiny.build(name)
    apply(model, tiny.uneven_plan(model, 1), round_to=1)
    values = tiny.inputs(name, model)
    again = load_pruned(save_pruned(model, tmp_path / "out"))
    with torch.no_grad():
        torch.testing.assert_close(tiny.outputs(name, again, values), tiny.outputs(name, model, values), rtol=0, atol=0)


@pytest.mark.parametrize(("name", "tower", "key"), [("opt", "text", "ffn_dim"), ("t5", "encoder", "d_ff")])
def test_even_widths_load_in_stock_transformers(name, tower, key, tmp_path):
    model = tiny.build(name)
    plan = Plan(describe(model).shape())
    for each, blocks in plan.shape.items():
        for layer in range(len(blocks)):
            plan.add(each, "neurons", layer, [0, 3])
    apply(model, plan, round_to=1)
    out = save_pruned(model, tmp_path / "out")
    assert content(out, "pruning.json")["loads_with"].startswith("transformers")
    width = describe(model).tower(tower).blocks[0].sites["neurons"].units
    assert content(out, "config.json")[key] == width
    values = tiny.inputs(name, model)
    stock = type(model).from_pretrained(out).eval()
    with torch.no_grad():
        torch.testing.assert_close(tiny.outputs(name, stock, values), tiny.outputs(name, model, values), rtol=0, atol=0)


# ---- folders of the version before, and of the command line ---------------------------------------------------------

SAVED = Path(__file__).parent / "saved_by_0_1_0"  # by `vlprune prune`: uneven heads and neurons, scores, a comparison


def test_a_folder_of_the_version_before_loads():
    model = load_pruned(SAVED)
    text = model.config.text_config
    ids = torch.tensor([[text.bos_token_id, 5, 6, 7, text.eos_token_id]])
    pixels = torch.linspace(-1, 1, 3 * 48 * 48).view(1, 3, 48, 48)
    with torch.no_grad():
        found = model(pixel_values=pixels, input_ids=ids, attention_mask=torch.ones_like(ids))
    image = torch.tensor([-0.08232911676168442, -0.11283522844314575, -0.4430394768714905, 0.24404911696910858])
    words = torch.tensor([0.13401904702186584, 0.1473298966884613, 0.15507438778877258, -0.21016982197761536])
    torch.testing.assert_close(found.image_embeds[0, :4], image, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.text_embeds[0, :4], words, rtol=1e-4, atol=1e-5)
    assert describe(model).shape() == json.loads((SAVED / "pruning.json").read_text())["structure"]


def test_a_record_of_the_version_before_is_read():
    record, comparisons = load_record(SAVED)
    assert record.method["name"] == "mope"
    assert len(record.scores) == 24
    assert comparisons.keys() == {"Random"}
    assert record.plan.neurons["vision"][0]


def test_a_folder_is_replaced_with_its_scores_and_comparisons(tmp_path):
    """What the command line saved with an earlier model is not taken for the new one's."""
    out = tmp_path / "out"
    shutil.copytree(SAVED, out)
    (out / "notes.txt").write_text("mine")
    save_pruned(pruned("clip"), out)
    assert not (out / "scores.json").exists()
    assert not (out / "comparisons.json").exists()
    assert (out / "notes.txt").read_text() == "mine"
    assert load_record(out)[0].scores is None


def test_scores_and_comparisons_appear_with_the_model(tmp_path):
    scores, numbers = load_record(SAVED)[0].scores, {"Random": {"recall@1": 0.25}}
    out = save_pruned(pruned("clip"), tmp_path / "out", scores=scores, comparisons=numbers)
    record, comparisons = load_record(out)
    assert record.scores.modules == scores.modules
    assert comparisons == numbers
    assert {"scores.json", "comparisons.json"} <= set(content(out, "pruning.json")["files"])


def test_a_broken_processor_is_an_error_and_none_is_none(tmp_path):
    broken, bare = tmp_path / "broken", tmp_path / "bare"
    for folder in (broken, bare):
        shutil.copytree(SAVED, folder)
    (broken / "tokenizer.json").write_text('{"truncated')
    with pytest.raises(ValueError, match=r"broken: its processor cannot be read"):
        load_model(str(broken))
    for name in ("processor_config.json", "tokenizer.json", "tokenizer_config.json"):
        (bare / name).unlink()
    assert load_model(str(bare)).processor is None
