"""Directories read onto a mesh, written and read again, and refused where they are broken."""

import contextlib
import dataclasses
import json
import math
import pickle

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from rich.console import Console
from safetensors.numpy import load_file, save_file
from tokenizers import Tokenizer, models

from examples.moonlight import hf_check, hf_export
from examples.moonlight.hf_export import export_pretrained
from examples.moonlight.huggingface import fetching
from examples.moonlight.huggingface import names as hf_names
from examples.moonlight.huggingface import pretrained as hf_import
from examples.moonlight.huggingface.files import TensorFiles
from examples.moonlight.huggingface.pretrained import Pretrained, load_pretrained
from examples.moonlight.model.execution.options import Execution
from examples.moonlight.model.execution.sharding import ModelSharding, make_mesh
from examples.moonlight.run_folder.checkpoint import Checkpoints
from examples.moonlight.run_folder.retention import Retention
from tests.moonlight import hf_toy

pytestmark = pytest.mark.one_stack

TOY = hf_toy.MOONLIGHT
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


@pytest.fixture(scope="module")
def sharded() -> Execution:
    return Execution(sharding=ModelSharding(make_mesh("fsdp=2,expert=2,tensor=2")))


@pytest.fixture(name="tensors", scope="module")
def _tensors():
    return hf_toy.hard_tensors(TOY)


@pytest.fixture
def folder(tmp_path, tensors):
    return hf_toy.write_model(tmp_path / "hf", TOY, tensors, shards=3)


def leaves(model):
    """Parameters and biases by their paths."""
    found, _ = jax.tree_util.tree_flatten_with_path((model.params, model.bias))
    return {hf_import.path_names(path): leaf for path, leaf in found}


def all_tensors(folder):
    return {k: v for file in folder.glob("*.safetensors") for k, v in load_file(file).items()}


def assert_bitwise_equal(found, expected):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].dtype == value.dtype, name
        np.testing.assert_array_equal(found[name], value, err_msg=name)


# --- reading and writing --------------------------------------------------------------------------


@pytest.mark.parametrize("family", hf_toy.FAMILIES)
@pytest.mark.parametrize("fused", [False, True])
def test_the_table_covers_every_parameter_once(family, fused):
    config = hf_toy.FAMILIES[family]
    _, params, bias = hf_import.abstract_model(config, Execution())
    found, _ = jax.tree_util.tree_flatten_with_path((params, bias))
    shapes = {hf_import.path_names(path): leaf.shape for path, leaf in found}
    covered = {path: np.zeros(shape, int) for path, shape in shapes.items()}
    for row in hf_names.table(config, fused=fused):
        assert covered[row.path][row.at].shape == row.param_shape, row.name
        covered[row.path][row.at] += 1
    assert all((count == 1).all() for count in covered.values())


def test_export_after_import_is_the_same_file(tmp_path, tensors, sharded):
    """Bitwise, whatever the layout, the shards and the mesh."""
    source = hf_toy.write_model(tmp_path / "source", TOY, tensors)
    config, params, bias = load_pretrained(source)
    assert config == TOY
    assert {leaf.dtype.name for leaf in jax.tree.leaves((params, bias))} == {"float32"}
    (tmp_path / "one").mkdir()  # empty
    export_pretrained(tmp_path / "one", config, params, bias, dtype="float32")
    assert_bitwise_equal(all_tensors(tmp_path / "one"), tensors)
    assert len({path.stat().st_mode for path in (tmp_path / "one").iterdir()}) == 1

    config, params, bias = load_pretrained(tmp_path / "one", sharded)
    export_pretrained(
        tmp_path / "many", config, params, bias, dtype="float32", max_shard_size=30_000
    )
    assert_bitwise_equal(all_tensors(tmp_path / "many"), tensors)
    index = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(value.nbytes for value in tensors.values())
    for file in set(index["weight_map"].values()):
        names = [name for name, where in index["weight_map"].items() if where == file]
        assert sum(tensors[name].nbytes for name in names) <= 30_000
        assert load_file(tmp_path / "many" / file).keys() == set(names)

    fused = {}
    for name, shape in hf_names.shapes(hf_names.table(TOY, fused=True)).items():
        if name not in tensors:
            layer, which = name.rsplit(".", 1)
            both = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}[which]
            fused[name] = np.stack(
                [
                    np.concatenate([tensors[f"{layer}.{e}.{part}.weight"] for part in both])
                    for e in range(TOY.n_routed_experts)
                ]
            )
            assert fused[name].shape == shape
    fused |= {name: tensors[name] for name in tensors if ".experts." not in name}
    hf_toy.write_model(tmp_path / "fused", TOY, fused, shards=2)
    again = load_pretrained(tmp_path / "fused", sharded)
    assert_bitwise_equal(leaves(again), leaves(Pretrained(config, params, bias)))


def test_bfloat16_files_become_float32_masters_or_stay(tmp_path, tensors):
    half = {
        name: value if name.endswith("bias") else value.astype(ml_dtypes.bfloat16)
        for name, value in tensors.items()
    }
    source = hf_toy.write_model(tmp_path / "hf", TOY, half)
    masters, kept = load_pretrained(source), load_pretrained(source, param_dtype=jnp.bfloat16)
    for name, leaf in leaves(masters).items():
        assert leaf.dtype == jnp.float32
        stays = jnp.float32 if name[-1] == "bias" else jnp.bfloat16
        assert leaves(kept)[name].dtype == stays
        np.testing.assert_array_equal(leaf, np.asarray(leaves(kept)[name], np.float32))
    for i, model in enumerate((masters, kept)):
        export_pretrained(tmp_path / f"{i}", *model, dtype="bfloat16")
        assert_bitwise_equal(all_tensors(tmp_path / f"{i}"), half)


def test_each_device_reads_its_own_part_only(folder, sharded, monkeypatch):
    """Counted in numbers read from files; the largest reading is the largest part of a matrix."""
    read, readings = TensorFiles.read, []

    def counting(self, name, index=()):
        part = read(self, name, index)
        readings.append(part.size)
        return part

    monkeypatch.setattr(TensorFiles, "read", counting)
    parts = []
    original = hf_import.read_part
    monkeypatch.setattr(
        hf_import, "read_part", lambda *args: parts.append(original(*args)) or parts[-1]
    )
    model = load_pretrained(folder, sharded)
    sizes, local = [], 0
    for leaf in leaves(model).values():
        unique = {str(shard.index): shard.data.size for shard in leaf.addressable_shards}
        sizes += unique.values()
        local += leaf.addressable_shards[0].data.size
    # Every number is read once, replicas share; a part on the host is one device's.
    assert sum(readings) == sum(sizes) == sum(leaf.size for leaf in leaves(model).values())
    assert sorted(part.size for part in parts) == sorted(sizes)
    assert max(part.size for part in parts) <= max(leaf.size for leaf in leaves(model).values()) / 4
    assert local < 0.25 * sum(leaf.size for leaf in leaves(model).values())
    experts = leaves(model)["layers", "mlp", "experts", "up_proj"]
    assert experts.addressable_shards[0].data.shape == (2, 2, 24, 10)


# --- writing --------------------------------------------------------------------------------------


def test_shards_are_filled_up_to_their_size():
    rows = hf_names.table(TOY)
    shards = hf_export.plan_shards(rows, np.dtype(np.float32), 20_000)
    assert [row for shard in shards for row in shard] == rows
    sizes = [sum(4 * math.prod(row.shape) for row in shard) for shard in shards]
    assert len(sizes) > 3 and max(sizes) <= 20_000
    alone = hf_export.plan_shards(rows, np.dtype(np.float32), 1)
    assert [len(shard) for shard in alone] == [1] * len(rows)


def test_a_killed_export_leaves_nothing_that_looks_like_a_model(folder, tmp_path, monkeypatch):
    model = load_pretrained(folder)
    written = []

    def killed_at_the_second(tensors, path, metadata):
        if written:
            raise KeyboardInterrupt
        written.append(path)
        save_file(tensors, path, metadata=metadata)

    monkeypatch.setattr(hf_export, "save_file", killed_at_the_second)
    target = tmp_path / "out" / "hf"
    with monkeypatch.context() as patch:
        patch.setattr(hf_export.shutil, "rmtree", lambda *_, **__: None)  # as after kill -9
        with pytest.raises(KeyboardInterrupt):
            export_pretrained(target, *model, max_shard_size=30_000)
    assert not target.exists()
    (left,) = target.parent.iterdir()
    assert left.name.startswith(".hf.") and not (left / "config.json").exists()
    with pytest.raises(FileNotFoundError, match=r"has no config\.json"):
        load_pretrained(left)

    written.clear()
    with pytest.raises(KeyboardInterrupt):
        export_pretrained(target, *model, max_shard_size=30_000)
    assert list(target.parent.iterdir()) == [left]  # an exception cleans up


def test_wrong_arguments_of_an_export_are_refused(folder, tmp_path):
    model = load_pretrained(folder)
    for changes, error, message in (
        ({"dtype": "float16"}, ValueError, "dtype must be one of float32, bfloat16, got 'float16'"),
        ({"max_shard_size": 0}, ValueError, "max_shard_size must be positive, got 0"),
        ({"tokenizer": tmp_path / "no.json"}, FileNotFoundError, "no.json does not exist"),
    ):
        with pytest.raises(error, match=message):
            export_pretrained(tmp_path / "new", *model, **changes)
    with pytest.raises(FileExistsError, match="hf is in use"):
        export_pretrained(folder, *model)
    with pytest.raises(ValueError, match=r"param_dtype must be one of .* got float16"):
        load_pretrained(folder, param_dtype=jnp.float16)


def test_a_run_is_exported_from_its_checkpoint_and_a_directory_anew(folder, tensors, tmp_path):
    config, params, bias = load_pretrained(folder)
    run = tmp_path / "run"
    with contextlib.closing(Checkpoints(run / "checkpoints", Retention(2))) as checkpoints:
        for step, factor in ((3, 1), (4, 2)):
            checkpoints.save(
                step,
                model={"params": jax.tree.map(lambda x: factor * x, params), "router_bias": bias},  # noqa: B023
                optimizer={"count": jnp.zeros(())},
                progress={},
                val_loss=1.0,
            )
    (run / "settings.json").write_text(json.dumps({"config": dataclasses.asdict(config)}))
    Tokenizer(models.BPE({"a": 0, "<|endoftext|>": 1}, [])).save(str(run / "tokenizer.json"))

    hf_export.export(hf_export.Args(run, tmp_path / "a", checkpoint="3", dtype="float32"))
    assert_bitwise_equal(all_tensors(tmp_path / "a"), tensors)
    assert json.loads((tmp_path / "a" / "config.json").read_text())["eos_token_id"] == 1
    hf_export.export(hf_export.Args(run, tmp_path / "b", dtype="float32"))
    norm = "model.norm.weight"
    np.testing.assert_array_equal(all_tensors(tmp_path / "b")[norm], 2 * tensors[norm])
    again = hf_export.Args(tmp_path / "a", tmp_path / "c", dtype="float32", mesh="fsdp=8")
    hf_export.export(again)
    for file in sorted(path.name for path in (tmp_path / "a").iterdir()):
        assert (tmp_path / "c" / file).read_bytes() == (tmp_path / "a" / file).read_bytes(), file


def test_one_matrix_of_a_stack_is_taken_on_its_device(folder):
    """As `fetch` does where a device's memory is not the host's."""
    stack = load_pretrained(folder).params["layers"]["mlp"]["experts"]["up_proj"][...]
    taken = fetching._take(stack, (np.int32(1), np.int32(2)))
    np.testing.assert_array_equal(taken, np.asarray(stack)[1, 2])


# --- broken directories ---------------------------------------------------------------------------


def edit_index(folder, change):
    path = folder / "model.safetensors.index.json"
    weight_map = json.loads(path.read_text())["weight_map"]
    hf_toy.write_index(folder, change(weight_map) or weight_map)


def edit_shard(folder, name, change):
    """Changes the dict of tensors of the shard that holds a tensor."""
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    path = folder / index["weight_map"][name]
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def remove_everywhere(folder, name):
    edit_shard(folder, name, lambda tensors: tensors.pop(name))
    edit_index(folder, lambda weight_map: weight_map.pop(name) and None)


def add_everywhere(folder, name):
    edit_shard(folder, HEAD, lambda tensors: tensors.update({name: tensors[HEAD]}))
    edit_index(folder, lambda weight_map: weight_map.update({name: weight_map[HEAD]}))


def set_tensor(folder, name, value):
    edit_shard(folder, name, lambda tensors: tensors.update({name: value(tensors[name])}))


def point(folder, file):
    edit_index(folder, lambda weight_map: weight_map.update({HEAD: file}))


def truncate(folder, name, size):
    path = folder / name
    path.write_bytes(path.read_bytes()[:size])


def only_pickles(folder):
    for path in folder.glob("*.safetensors*"):
        path.unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps({"x": 1}))


def link_out(folder):
    outside = folder.parent / "outside.safetensors"
    (folder / "part-0.safetensors").rename(outside)
    (folder / "part-0.safetensors").symlink_to(outside)


def no_weights(folder):
    for path in folder.glob("*.safetensors*"):
        path.unlink()


EXPERT = "model.layers.2.mlp.experts.3.up_proj.weight"

BROKEN = {
    "missing": (lambda f: remove_everywhere(f, EXPERT), rf"{EXPERT} is missing; config.json asks"),
    "extra": (
        lambda f: add_everywhere(f, "model.layers.3.x.weight"),
        r"model\.layers\.3\.x\.weight is not part of the model",
    ),
    "shape": (
        lambda f: set_tensor(f, EXPERT, lambda x: np.ascontiguousarray(x.T)),
        rf"{EXPERT} in .* has the shape \[48, 20\]; config.json asks for \[20, 48\]",
    ),
    "dtype": (
        lambda f: set_tensor(f, EXPERT, lambda x: x.astype(np.int8)),
        rf"{EXPERT} in .* has the dtype I8; supported are F32, BF16, F16",
    ),
    "truncated": (lambda f: truncate(f, "part-1.safetensors", -9), r"part-1.* is damaged"),
    "header cut": (lambda f: truncate(f, "part-1.safetensors", 30), r"part-1.* is damaged"),
    "empty": (lambda f: truncate(f, "part-1.safetensors", 0), r"part-1.* is damaged"),
    "parent": (lambda f: point(f, "../x.safetensors"), r"names '\.\./x\.safetensors'; a shard is"),
    "absolute": (lambda f: point(f, "/x.safetensors"), r"names '/x\.safetensors'; a shard is"),
    "pickle in the index": (lambda f: point(f, "x.bin"), r"names 'x\.bin'; a shard is"),
    "link": (link_out, r"part-0\.safetensors is a link to .*outside\.safetensors, out of"),
    "pickle": (only_pickles, r"holds its weights as a pickle \(pytorch_model\.bin\)"),
    "no shard": (lambda f: (f / "part-2.safetensors").unlink(), r"part-2\.safetensors is missing"),
    "no weights": (no_weights, r"has neither model\.safetensors nor"),
    "wrong shard": (
        lambda f: edit_shard(f, EXPERT, lambda tensors: tensors.pop(EXPERT)),
        rf"says that {EXPERT} lies in part-.\.safetensors, where it is not",
    ),
    "twice": (
        lambda f: edit_shard(f, EMBEDDING, lambda ts: ts.update({HEAD: ts[EMBEDDING]})),
        r"lm_head\.weight lies twice, in part-.\.safetensors and in part-.\.safetensors",
    ),
    "unlisted": (
        lambda f: edit_shard(f, HEAD, lambda tensors: tensors.update({"x": tensors[HEAD]})),
        r"holds x, which model\.safetensors\.index\.json does not list",
    ),
    "both": (
        lambda f: (f / "model.safetensors").write_bytes(b""),
        r"holds both model\.safetensors and model\.safetensors\.index\.json",
    ),
    "index": (lambda f: hf_toy.write_index(f, [1]), r"must have a weight_map"),
    "no index": (
        lambda f: (f / "model.safetensors.index.json").write_text("{"),
        r"index\.json, line 1: not valid JSON",
    ),
    "no folder": (lambda f: f.rename(f.with_name("x")), r"hf has no config\.json"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_directory_is_refused_before_anything_is_loaded(case, folder, monkeypatch):
    breaks, message = BROKEN[case]
    breaks(folder)
    monkeypatch.setattr(hf_import, "read_parameter", lambda *_: pytest.fail("something was loaded"))
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        load_pretrained(folder)


def test_what_old_and_foreign_writers_add_is_accepted(tmp_path):
    """Rope's constants; the cache's links; a tied head that equals the embedding, and no other."""
    tied = hf_toy.hard_tensors(hf_toy.QWEN2)
    added = {"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(3, np.float32)}
    source = hf_toy.write_model(tmp_path / "q", hf_toy.QWEN2, tied | added)
    expected = leaves(load_pretrained(source))
    assert ("lm_head", "kernel") not in expected
    added = {HEAD: tied[EMBEDDING]}
    both = hf_toy.write_model(tmp_path / "both", hf_toy.QWEN2, tied | added)
    assert_bitwise_equal(leaves(load_pretrained(both)), expected)
    other = hf_toy.write_model(tmp_path / "o", hf_toy.QWEN2, tied | {HEAD: -tied[EMBEDDING]})
    with pytest.raises(ValueError, match=r"lm_head\.weight in .* differs from model\.embed_tokens"):
        load_pretrained(other)

    snapshot = tmp_path / "models--x" / "snapshots" / "abc"
    snapshot.parent.mkdir(parents=True)
    blobs = tmp_path / "models--x" / "blobs"
    source.rename(snapshot)
    blobs.mkdir()
    (snapshot / "model.safetensors").rename(blobs / "0f")
    (snapshot / "model.safetensors").symlink_to("../../blobs/0f")
    assert_bitwise_equal(leaves(load_pretrained(snapshot)), expected)


def test_layers_that_predict_further_ahead_are_left_out(tmp_path, tensors, capsys):
    """As in transformers, and said; without what makes a layer such a one it is a mistake."""
    last = {k: v for k, v in tensors.items() if k.startswith("model.layers.2.")}
    ahead = {k.replace("layers.2.", "layers.3."): v for k, v in last.items()}
    projection = {"model.layers.3.eh_proj.weight": np.ones((48, 96), np.float32)}
    expected = leaves(load_pretrained(hf_toy.write_model(tmp_path / "plain", TOY, tensors)))
    for name, added, layers in (
        ("ahead", ahead | projection, 1),
        ("unnamed", ahead | projection, 0),
        ("mistake", ahead, 1),
    ):
        folder = hf_toy.write_model(tmp_path / name, TOY, tensors | added)
        config = json.loads((folder / "config.json").read_text())
        config["num_nextn_predict_layers"] = layers
        (folder / "config.json").write_text(json.dumps(config))
        if name != "ahead":
            with pytest.raises(ValueError, match=r"layers\.3\.\S+ and \d+ other .* not part"):
                load_pretrained(folder)
            continue
        words = f"left out, as transformers does: model.layers.3, {len(ahead) + 1} tensors that"
        assert_bitwise_equal(leaves(load_pretrained(folder, console=Console())), expected)
        assert words in capsys.readouterr().out
        hf_check.check(hf_check.Args(folder))
        assert words in capsys.readouterr().out


def test_the_check_prints_what_a_directory_holds(folder, capsys):
    hf_check.check(hf_check.Args(folder))
    out = capsys.readouterr().out
    assert "can be loaded" in out
    assert f"{hf_names.total_size(TOY):,}" in out and "F32 (61)" in out
    assert dataclasses.fields(TOY)[0].name in out
