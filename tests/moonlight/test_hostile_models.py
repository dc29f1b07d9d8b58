"""Model folders that mean harm, or are just broken: refused by name, in bounded time and memory."""

import dataclasses
import json
import math
import os

import ml_dtypes
import numpy as np
import pytest
import transformers
from safetensors.numpy import load_file, save_file
from tokenizers import Tokenizer, models

from examples.moonlight import hf_check
from examples.moonlight.generation.model_folder import copy_companions, open_model, stop_tokens
from examples.moonlight.hf_export import export_pretrained
from examples.moonlight.huggingface import names as hf_names
from examples.moonlight.huggingface import pretrained as hf_import
from examples.moonlight.huggingface.config import FAMILIES, config_fields, parse_config
from examples.moonlight.huggingface.files import TensorFiles, first_not_finite
from examples.moonlight.huggingface.pretrained import check_pretrained, load_pretrained
from examples.moonlight.huggingface.tokenizer import token_ids
from examples.moonlight.model.config import MoonlightConfig
from examples.moonlight.model.dense import DenseConfig
from examples.moonlight.model.execution.options import Execution
from examples.moonlight.model.execution.sharding import ModelSharding, make_mesh
from tests.moonlight import hf_toy
from tests.moonlight.hostile import bounded, edit_json, raw_safetensors, sparse

pytestmark = pytest.mark.one_stack

BIG = 10**9
TENSORS = {name: hf_toy.hard_tensors(config) for name, config in hf_toy.FAMILIES.items()}


def write(folder, family="deepseek_v3", **options):
    return hf_toy.write_model(folder, hf_toy.FAMILIES[family], TENSORS[family], **options)


@pytest.fixture(params=hf_toy.FAMILIES)
def family(request):
    return request.param


@pytest.fixture
def folder(tmp_path):
    folder = write(tmp_path / "hf", shards=2)
    Tokenizer(models.BPE({"a": 0, "<|endoftext|>": 1}, [])).save(str(folder / "tokenizer.json"))
    return folder


# --- the configuration and the tensors ------------------------------------------------------------


@pytest.mark.parametrize("fused", [False, True])
def test_the_extent_of_a_model_is_that_of_its_table(family, fused):
    config = hf_toy.FAMILIES[family]
    changes = [{}, {"num_hidden_layers": 5}]
    if family == "deepseek_v3":
        changes += [
            {"first_k_dense_replace": 0},
            {"first_k_dense_replace": 2, "n_routed_experts": 7},
            {"first_k_dense_replace": 3, "num_hidden_layers": 3},
            {"first_k_dense_replace": 9, "n_shared_experts": 0},
            {"n_shared_experts": 0},
        ]
    for change in changes:
        changed = dataclasses.replace(config, **change)
        shapes = hf_names.shapes(hf_names.table(changed, fused=fused))
        expected = hf_names.Extent(len(shapes), sum(map(math.prod, shapes.values())))
        assert hf_names.extent(changed, fused=fused) == expected


INTEGERS = [
    (name, field.name)
    for name, family in FAMILIES.items()
    for field in dataclasses.fields(family.config)
    if field.type is int
]


@pytest.mark.parametrize(("family", "field"), INTEGERS)
def test_a_number_that_the_files_do_not_bear_out_costs_nothing(family, field, tmp_path):
    """10^6 layers took 4.5 GB, 10^9 all memory that there was."""
    folder = write(tmp_path / "hf", family)
    for value in (10**6, BIG, 2**31, 10**900):
        edit_json(folder / "config.json", **{field: value})
        with bounded(seconds=10, megabytes=100):
            if field == "max_position_embeddings" and value < 2**31:
                # It is no size of anything that is built.
                assert check_pretrained(folder).max_position_embeddings == value
                continue
            with pytest.raises(ValueError, match=r"hf(/config\.json|/model\.safetensors|:)"):
                check_pretrained(folder)


def test_nothing_is_built_of_a_configuration_alone(folder, tmp_path, monkeypatch):
    def built(*_):
        pytest.fail("something was built")

    monkeypatch.setattr(hf_import, "abstract_model", built)
    monkeypatch.setattr("examples.moonlight.generation.model_folder.abstract_model", built)
    edit_json(folder / "config.json", num_hidden_layers=BIG)
    message = (
        r"hf: model\.layers\.3\.\S+ is missing; config\.json asks for 23,\d+,\d+,\d+ tensors, "
    )
    for read in (
        load_pretrained,
        lambda folder: open_model(folder, Execution()),
        lambda folder: hf_check.check(hf_check.Args(folder)),
    ):
        with bounded(), pytest.raises(ValueError, match=message + "and the files hold 61"):
            read(folder)

    run = tmp_path / "run"
    (run / "checkpoints" / "1").mkdir(parents=True)
    (run / "checkpoints" / "1" / "weights").write_bytes(bytes(1000))
    (run / "tokenizer.json").write_bytes((folder / "tokenizer.json").read_bytes())
    config = dataclasses.asdict(hf_toy.MOONLIGHT) | {"num_hidden_layers": BIG}
    edit_json(run / "settings.json", config=config)
    with bounded(), pytest.raises(ValueError, match=r"settings\.json: its config .* 1,000 bytes"):
        open_model(run, Execution())
    edit_json(run / "settings.json", config=[1])
    with pytest.raises(ValueError, match=r"settings\.json: config: expected an object, got \[1\]"):
        open_model(run, Execution())
    edit_json(run / "settings.json", config=config | {"vocab_size": "x"})
    with pytest.raises(ValueError, match=r"settings\.json: its config .*vocab_size must be an int"):
        open_model(run, Execution())


WRONG = [
    "3",
    3.5,
    True,
    None,
    -1,
    0,
    10**400,
    1e308,
    1e-320,
    [],
    {"a": 1},
    [None] * 1000,
    "x" * 5000,
]


@pytest.mark.parametrize("value", WRONG, ids=lambda value: repr(value)[:12])
def test_every_field_has_its_type(family, value):
    """The message names file and field; what is accepted is the value that transformers takes."""
    config = hf_toy.FAMILIES[family]
    fields = config_fields(config, dtype="float32")
    read = {field.name for field in dataclasses.fields(config)} | FAMILIES[family].fixed.keys()
    for name in sorted(read | {"num_key_value_heads", "rope_scaling", "rope_parameters"}):
        if (name, family) == ("attention_bias", "qwen2"):
            continue  # passed over, as transformers does
        try:
            found = parse_config(fields | {name: value}, where="config.json")
        except ValueError as error:
            assert str(error).startswith("config.json: "), name
            assert name in str(error) or "rope" in name, (name, str(error))
            assert len(str(error)) < 500, name
            continue
        harmless = value is None or (value == 0 and name == "first_k_dense_replace")
        mends = isinstance(value, float) and name == "rope_theta"
        assert harmless or mends or getattr(found, name, value) == value, name
        assert type(value) is not bool or name == "tie_word_embeddings" or fields[name] is value


def test_what_json_lets_through_is_refused_with_its_place(folder):
    path = folder / "config.json"
    text = path.read_text()
    nested = "[" * 100_000
    for content, message in (
        (nested, r"config\.json: brackets are nested too deep"),
        ('{"a": ' + nested + "]" * 100_000 + "}", r"config\.json: brackets are nested too deep"),
        ('{"a": ' + "[" * 70 + "]" * 70 + "}", r"config\.json: a: nested more than 64 deep"),
        ('{"x": {"y": NaN}}', r"config\.json: x\.y: nan is no finite number"),
        ('{"x": [1, -Infinity]}', r"config\.json: x: -inf is no finite number"),
        ('{"x": 1e999}', r"config\.json: x: inf is no finite number"),
        ('{\n"x": ' + "9" * 5000 + "}", r"config\.json, line 2: a number of 5,000 digits, 99"),
        (r'{"x": "a\ud800"}', r"config\.json: x: a lone surrogate, '\\ud800'"),
        (r'{"\ud800": 1}', r"config\.json: the key '\\ud800' has a lone surrogate"),
        ("", r"config\.json, line 1: not valid JSON \(Expecting value, column 1\)"),
        (b"\xff\xfe" + "{}".encode("utf-16-le"), r"config\.json is not UTF-8 text \(byte 0\)"),
        (b"\xef\xbb\xbf{\xff}", r"config\.json is not UTF-8 text \(byte 4\)"),
        ('{"model_type": ["deepseek_v3"]}', r"config\.json: model_type is \['deepseek_v3'\]"),
        (text[:-1] + ', "rope_theta": 1}', r"config\.json: 'rope_theta' occurs twice"),
        (text[:-1] + ', "num_local_experts": 9}', r"num_local_experts and n_routed_experts differ"),
    ):
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        with bounded(seconds=5), pytest.raises(ValueError, match=message):
            load_pretrained(folder)
    path.write_bytes(b"\xef\xbb\xbf" + text.encode())
    assert check_pretrained(folder) == hf_toy.MOONLIGHT  # a byte order mark is no text


def test_many_keys_take_no_longer_than_their_number(folder):
    """The search for a repeated one was quadratic: 16 s for 40,000."""
    keys = ", ".join(f'"x{i}": {i}' for i in range(40_000))
    path = folder / "config.json"
    text = path.read_text()[:-1]
    path.write_text(f"{text}, {keys}}}")
    with bounded(seconds=2):
        assert check_pretrained(folder) == hf_toy.MOONLIGHT
    path.write_text(f'{text}, {keys}, "x39998": 0}}')
    with (
        bounded(seconds=2),
        pytest.raises(ValueError, match=r"config\.json: 'x39998' occurs twice"),
    ):
        check_pretrained(folder)


# --- what the file leaves out ---------------------------------------------------------------------


def test_an_absent_field_has_transformers_default_or_is_refused(family):
    """Field by field: `rms_norm_eps` of a deepseek_v3 was read as 1e-5, where it is 1e-6."""
    config = hf_toy.FAMILIES[family]
    whole = config_fields(config, dtype="float32")
    if family != "deepseek_v3":
        # So that a model with transformers' default of 32 heads of keys and values is possible.
        heads = {"num_attention_heads": 64, "num_key_value_heads": 32}
        whole |= heads | {"hidden_size": 256, "head_dim": 4}
    del whole["rope_scaling"], whole["model_type"]
    fixed, compared = FAMILIES[family].fixed, set()
    theirs_whole = transformers.AutoConfig.for_model(family, **whole)
    for name in sorted(theirs_whole.to_dict().keys() & (whole.keys() | fixed.keys())):
        fields = {key: value for key, value in whole.items() if key != name}
        theirs = transformers.AutoConfig.for_model(family, **fields)
        fields["model_type"] = family
        try:
            ours = parse_config(fields)
        except ValueError as error:
            words = str(error)
            assert f"{name} is" in words or name in words, words
            assert f"{name} is missing" in words or "transformers' default" in words, words
            if name in fixed:
                assert getattr(theirs, name) == fixed[name].absent, name
            continue
        compared.add(name)
        if not hasattr(theirs, name):  # what only remote code knows
            continue
        if name in fixed:
            assert getattr(theirs, name) in fixed[name].supported, name
        elif name == "rope_theta":
            assert ours.rope_theta == theirs.rope_parameters["rope_theta"]
        elif hasattr(ours, name):
            assert getattr(ours, name) == getattr(theirs, name), name
    assert {"rms_norm_eps", "initializer_range", "hidden_act"} <= compared
    del whole["rope_theta"]
    theirs = transformers.AutoConfig.for_model(family, **whole).rope_parameters["rope_theta"]
    assert parse_config(whole | {"model_type": family}).rope_theta == theirs == 10_000.0


def test_a_qwen2_without_key_value_heads_has_thirty_two():
    fields = config_fields(hf_toy.QWEN2, dtype="float32")
    del fields["num_key_value_heads"]
    message = (
        r"num_key_value_heads \(32\) must divide .*transformers' default for a file without it"
    )
    with pytest.raises(ValueError, match=message):
        parse_config(fields)
    assert parse_config(fields | {"num_key_value_heads": None}).num_key_value_heads == 4


# --- headers --------------------------------------------------------------------------------------

ENTRY = '{"dtype": "F32", "shape": [1], "data_offsets": [%d, %d]}'
ONE = f'"a": {ENTRY % (0, 4)}'


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (f'{{{ONE}, "a": {ENTRY % (4, 8)}}}', "'a' occurs twice"),
        ('{"a": {"dtype": "F32", "dtype": "F32", "shape": [], "data_offsets": [0, 8]}}', "twice"),
        (f'{{"__metadata__": {{"a": "b", "a": "c"}}, {ONE}}}', "'a' occurs twice"),
        (f"{{{ONE.replace('F32', 'x' * 9999)}}}", "is damaged .*: fetch or export it again$"),
        ("[" * 100_000, "its header is no JSON object"),
        ('{"a": ' + "[" * 100_000, "brackets are nested too deep"),
        ("[]", "its header is no JSON object"),
        ("{}x", "not valid JSON"),
        (b'{"\xff": 1}', "byte 10 of its header is not UTF-8"),
        ('{"a": 3}', "its header says of a: 3"),
        ('{"a": {"dtype": 3, "shape": [], "data_offsets": []}}', "its header says of a"),
        ('{"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 8]}}', "its header says of a"),
        ('{"a": {"dtype": "F32", "shape": [1e9], "data_offsets": [0, 8]}}', "its header says of a"),
        ('{"a": {"dtype": "F32", "shape": [true], "data_offsets": [0, 8]}}', "its header says of"),
        (f'{{"\\ud800": {ENTRY % (0, 8)}}}', "lone surrogate"),
        (f'{{"a": {ENTRY % (0, 10**12)}}}', "damaged or no safetensors file"),
        (f'{{"a": {{"dtype": "F32", "shape": [{10**30}], "data_offsets": [0, 8]}}}}', "damaged"),
        (
            '{"\\u001b[2J": {"dtype": "I8", "shape": [8], "data_offsets": [0, 8]}}',
            "has the dtype I8",
        ),
    ],
    ids=str,
)
def test_a_header_that_lies_is_refused(header, message, folder):
    for path in folder.glob("*.safetensors*"):
        path.unlink()
    raw_safetensors(folder / "model.safetensors", header, bytes(8))
    expected = rf"model\.safetensors.*{message}"
    with bounded(seconds=5), pytest.raises(ValueError, match=expected) as caught:
        load_pretrained(folder)
    assert len(str(caught.value)) < 1000


def test_a_header_is_no_longer_than_its_file(folder, tmp_path):
    for path in folder.glob("*.safetensors*"):
        path.unlink()
    path = folder / "model.safetensors"
    for length in (0, 1, 100, 2**63, 2**64 - 1):
        raw_safetensors(path, "{}", length=length)
        with bounded(), pytest.raises(ValueError, match=r"damaged.* has 10 bytes, and its header"):
            load_pretrained(folder)
    path.write_bytes(b"\x02")
    with pytest.raises(ValueError, match="it has 1 bytes"):
        load_pretrained(folder)
    # The file is 10 GB of holes: the header would be all of it.
    for length in (10**10 - 8, 10**8):
        sparse(path, length.to_bytes(8, "little"))
        with bounded(), pytest.raises(ValueError, match=r"model\.safetensors is damaged"):
            load_pretrained(folder)


def test_a_name_in_two_headers_of_one_file_is_found_in_shards_too(folder):
    """A second tensor of a name, over the first: safetensors' reader takes the last."""
    path = folder / "part-0.safetensors"
    tensors = load_file(path)
    name = next(iter(tensors))
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = content[8 : 8 + length].decode().rstrip()
    entry = json.dumps(json.loads(header)[name])
    raw_safetensors(path, f'{header[:-1]}, "{name}": {entry}}}', content[8 + length :])
    assert load_file(path).keys() == tensors.keys()  # what nothing refused
    with pytest.raises(ValueError, match=rf"part-0\.safetensors: '{name}' occurs twice"):
        load_pretrained(folder)


# --- weights --------------------------------------------------------------------------------------

SHARDED = Execution(sharding=ModelSharding(make_mesh("fsdp=2,expert=2,tensor=2")))


def set_number(folder, name, index, value, dtype=np.float32):
    path = next(file for file in folder.glob("*.safetensors") if name in load_file(file))
    tensors = {key: array.astype(dtype) for key, array in load_file(path).items()}
    tensors[name][index] = value
    save_file(tensors, path)


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("execution", [None, SHARDED], ids=["whole", "sharded"])
def test_weights_that_are_not_finite_are_refused_by_tensor_and_place(dtype, execution, tmp_path):
    expert = "model.layers.2.mlp.experts.3.up_proj.weight"
    bias = "model.layers.1.mlp.gate.e_score_correction_bias"
    cases = [(expert, (19, 47), np.nan), (expert, (11, 1), -np.inf), (bias, (2,), np.inf)]
    for i, (name, index, value) in enumerate(cases):
        folder = write(tmp_path / f"{i}")
        set_number(folder, name, index, value, dtype)
        message = (
            rf"{name} in \S+model\.safetensors holds \S+ at \[{', '.join(map(str, index))}\]: "
        )
        with pytest.raises(ValueError, match=message):
            load_pretrained(folder, execution)


def test_a_float32_beyond_bfloat16_is_refused_there_only(tmp_path):
    folder = write(tmp_path / "hf")
    name, largest = "model.layers.0.mlp.up_proj.weight", np.finfo(np.float32).max
    set_number(folder, name, (0, 0), largest)
    params = load_pretrained(folder).params
    assert params["first_layers"][0]["mlp"]["up_proj"]["kernel"][...][0, 0] == largest
    with pytest.raises(ValueError, match=rf"{name} in .* infinite in bfloat16: load it as float32"):
        load_pretrained(folder, param_dtype=ml_dtypes.bfloat16)


def test_a_tied_head_of_nan_is_named_as_that(tmp_path):
    tensors = hf_toy.hard_tensors(hf_toy.QWEN2)
    tensors["model.embed_tokens.weight"][3, 4] = np.nan
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()
    folder = hf_toy.write_model(tmp_path / "hf", hf_toy.QWEN2, tensors)
    with pytest.raises(ValueError, match=r"lm_head\.weight in .* holds nan at \[3, 4\]"):
        load_pretrained(folder)


def test_the_first_number_that_is_not_finite_is_found_in_any_layout():
    rng = np.random.default_rng(0)
    for dtype in (np.float32, np.float16, ml_dtypes.bfloat16):
        block = rng.standard_normal((300, 500)).astype(dtype)
        block[0, 0] = np.finfo(np.float16).max
        assert first_not_finite(block) is None
        for value in (np.nan, -np.nan, np.inf, -np.inf):
            damaged = block.copy()
            damaged[299, 499] = damaged[170, 31] = value
            assert first_not_finite(damaged) == (170, 31)
            assert first_not_finite(damaged.T) == (31, 170)
    assert first_not_finite(np.float32(np.nan).reshape(())) == ()
    assert first_not_finite(np.zeros((0, 3), np.float32)) is None


# --- the folder -----------------------------------------------------------------------------------

JSON_FILES = ["config.json", "generation_config.json", "tokenizer_config.json"]
FILES = [*JSON_FILES, "tokenizer.json", "model.safetensors.index.json", "part-0.safetensors"]


@pytest.mark.parametrize("name", FILES)
def test_what_is_no_file_of_the_folder_is_refused_by_name(name, folder):
    """A pipe would be waited for, a device never ends, a link publishes what it leads to."""
    path, outside = folder / name, folder.parent / "secret"
    outside.write_text("{}")
    path.unlink(missing_ok=True)

    def refused(message):
        with bounded(seconds=10), pytest.raises(ValueError, match=message):
            open_model(folder, Execution())
        path.rmdir() if path.is_dir() and not path.is_symlink() else path.unlink()

    os.mkfifo(path)
    refused(rf"{name} is a pipe, where a file is expected")
    path.mkdir()
    refused(rf"{name} is a folder, where a file is expected")
    path.symlink_to(outside)
    refused(rf"{name} is a link to \S+secret, out of the folder: copy the file")
    path.symlink_to("/dev/zero")
    refused(rf"{name} is a link to /dev/zero, out of the folder")
    path.symlink_to(path.name)
    refused(rf"{name} is a link to itself")
    sparse(path)
    large = rf"{name} has 10,000,000,000 bytes, and such a file at most"
    refused(r"part-0\.safetensors is damaged" if name.endswith("safetensors") else large)


@pytest.mark.parametrize(
    "file", ["../x.safetensors", "/etc/x.safetensors", "a/b.safetensors", "\0.safetensors",
             "x" * 300 + ".safetensors", "\u202e.safetensors", "..", "", "con\\x.safetensors"],
    ids=ascii,
)  # fmt: skip
def test_an_index_names_files_beside_it_only(file, folder):
    hf_toy.write_index(folder, {"lm_head.weight": file})
    with pytest.raises(ValueError, match=r"index\.json names .*; a shard is a \.safetensors file"):
        TensorFiles(folder)


def test_an_export_takes_no_file_along_through_a_link(folder, tmp_path):
    secret = tmp_path / "secret"
    secret.write_text("secret")
    (folder / "chat_template.jinja").symlink_to(secret)
    model = load_pretrained(folder)
    with pytest.raises(ValueError, match=r"chat_template\.jinja is a link to .*secret, out of"):
        export_pretrained(tmp_path / "out", *model, tokenizer=folder)
    assert not (tmp_path / "out").exists()
    (tmp_path / "run").mkdir()
    with pytest.raises(ValueError, match=r"chat_template\.jinja is a link to .*secret, out of"):
        copy_companions(folder, tmp_path / "run")


@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
@pytest.mark.parametrize("value", ["x", 1.5, True, -2, 2**31, [1, None], [[1]], {"a": 1}], ids=repr)
def test_ids_of_special_tokens_are_ids(name, value, folder):
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    edit_json(folder / name, eos_token_id=value)
    message = rf"{name}: eos_token_id: expected an id or a list of ids, got "
    with pytest.raises(ValueError, match=message):
        stop_tokens(folder, tokenizer)
    with pytest.raises(ValueError, match=message):
        token_ids(folder, hf_toy.MOONLIGHT)


def test_the_families_are_those_of_the_tests():
    assert FAMILIES.keys() == hf_toy.FAMILIES.keys()
    assert {family.config for family in FAMILIES.values()} == {MoonlightConfig, DenseConfig}
