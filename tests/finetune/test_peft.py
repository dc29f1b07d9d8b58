"""What transformers and peft compute from our files, we compute; what peft lets pass is refused.

Imports peft, transformers and torch, which takes seconds.
"""

import json
import re
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from examples.finetune.lora.adapters import LoraConfig, add_lora, has_adapters
from examples.finetune.lora.merge import merged
from examples.finetune.lora.peft_files import CONFIG_FILE, WEIGHTS_FILE, read_peft, write_peft
from examples.finetune.lora.peft_names import PREFIX
from examples.moonlight.hf_export import export_pretrained
from examples.moonlight.model.execution.options import Execution
from examples.moonlight.model.execution.sharding import ModelSharding, make_mesh
from examples.moonlight.model.experts import RouterBias
from tests.finetune import lora_toy

torch = pytest.importorskip("torch", reason="torch is part of the test extra")
transformers = pytest.importorskip("transformers", reason="transformers is part of the test extra")
peft = pytest.importorskip("peft", reason="peft is part of the test extra")

pytestmark = [
    pytest.mark.one_stack,
    # peft 0.21 asks transformers 5.24 for what it will lose in version 6.
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated"),
]

TOKENS = np.random.default_rng(3).integers(0, 62, (2, 14)).astype(np.int32)

# Largest difference of logits, which reach 22; measured 2.5e-5.
LOGITS_TOLERANCE = 1e-4
# What an adapter does to some logit, at least; measured 2.7.
ADAPTER_SHOWS = 0.5

ATTENTION = ("q_proj", "kv_a_proj", "kv_b_proj", "o_proj")
CASES = {
    "qwen2": (lora_toy.DENSE, "all-linear"),
    "llama": (lora_toy.LLAMA, ("q_proj", "v_proj", "down_proj")),
    "deepseek_v3": (lora_toy.MOONLIGHT, ATTENTION),
}


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    """At toy size a second thread of torch only waits for the first."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Case(NamedTuple):
    """A model with adapters, and what was written of it."""

    model: Any
    lora: LoraConfig
    logits: np.ndarray
    base: Path
    adapter: Path


def write_base(folder: Path, model: Any) -> Path:
    params, bias = nnx.state(model, nnx.Param), nnx.state(model, RouterBias)
    export_pretrained(folder, model.config, params, bias, dtype="float32")
    return folder


@pytest.fixture(name="case", scope="module", params=CASES)
def _case(request, tmp_path_factory) -> Case:
    config, targets = CASES[request.param]
    root = tmp_path_factory.mktemp(request.param)
    lora = LoraConfig(rank=4, alpha=2.5, dropout=0.0, target_modules=targets)
    model = lora_toy.make(config, lora=lora)
    graphdef = nnx.graphdef(lora_toy.make_plain(config))
    plain = nnx.merge(graphdef, *nnx.split(model, nnx.LoRAParam, ...)[2:])
    base = write_base(root / "base", plain)
    write_peft(root / "adapter", model, lora, base=str(base))
    return Case(model, lora, np.asarray(model(TOKENS)[0]), base, root / "adapter")


def load(folder: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(folder).eval()


def logits(theirs: Any) -> np.ndarray:
    with torch.no_grad():
        return theirs(input_ids=torch.tensor(TOKENS, dtype=torch.long)).logits.numpy()


def assert_logits(theirs: Any, expected: np.ndarray) -> None:
    np.testing.assert_allclose(logits(theirs), expected, rtol=0, atol=LOGITS_TOLERANCE)


def test_peft_and_transformers_compute_what_we_do(case: Case, tmp_path: Path):
    base = load(case.base)
    assert np.abs(logits(base) - case.logits).max() > ADAPTER_SHOWS
    theirs = peft.PeftModel.from_pretrained(base, case.adapter)
    assert_logits(theirs, case.logits)
    assert_logits(theirs.merge_and_unload(), case.logits)
    assert_logits(load(write_base(tmp_path / "merged", merged(case.model))), case.logits)


@pytest.mark.parametrize("mesh", [None, "data=2,fsdp=2,tensor=2"])
def test_what_was_written_is_read(case: Case, mesh: str | None):
    execution = Execution(sharding=ModelSharding(None if mesh is None else make_mesh(mesh)))
    model = lora_toy.make(case.model.config, execution)
    lora = read_peft(case.adapter, model)
    assert (lora.rank, lora.alpha, lora.dropout) == (4, 2.5, 0.0)
    found, written = (nnx.to_flat_state(nnx.state(m, nnx.LoRAParam)) for m in (model, case.model))
    assert found.paths == written.paths
    for path, ours, theirs in zip(found.paths, found.leaves, written.leaves, strict=True):
        np.testing.assert_array_equal(ours[...], theirs[...])
        spec = execution.sharding.param_spec(path, ours.shape)
        assert ours[...].sharding.is_equivalent_to(execution.sharding.place(*spec), ours.ndim)


def test_an_adapter_of_peft_is_read(case: Case, tmp_path: Path):
    names = {"kv_a_proj": "kv_a_proj_with_mqa"}
    targets = case.lora.target_modules
    targets = targets if isinstance(targets, str) else [names.get(t, t) for t in targets]
    config = peft.LoraConfig(r=3, lora_alpha=7, target_modules=targets, task_type="CAUSAL_LM")
    theirs = peft.get_peft_model(load(case.base), config)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in theirs.named_parameters():
        if "lora_B" in name:
            parameter.data = 0.2 * torch.randn(parameter.shape, generator=generator)
    theirs.save_pretrained(tmp_path / "theirs")
    model = lora_toy.make(case.model.config)
    assert read_peft(tmp_path / "theirs", model).scale == 7 / 3
    model.eval()
    assert_logits(theirs, np.asarray(model(TOKENS)[0]))


def changed(case: Case, folder: Path, tensors: Any = None, **fields: Any) -> Path:
    """A copy of the adapter, its tensors and its configuration changed."""
    folder.mkdir()
    config = json.loads((case.adapter / CONFIG_FILE).read_text())
    (folder / CONFIG_FILE).write_text(json.dumps(config | fields))
    content = load_file(case.adapter / WEIGHTS_FILE)
    save_file(content if tensors is None else tensors(content), folder / WEIGHTS_FILE)
    return folder


def without_prefix(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {name.removeprefix(PREFIX): tensor for name, tensor in tensors.items()}


def without_last(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {name: tensors[name] for name in sorted(tensors)[:-1]}


def not_finite(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {
        name: np.where(tensor == tensor.max(), np.nan, tensor) for name, tensor in tensors.items()
    }


@pytest.mark.filterwarnings("ignore:Found missing adapter keys")
@pytest.mark.parametrize(
    ("mistake", "message"),
    [
        ({"tensors": without_prefix}, "the names of an adapter begin with base_model.model."),
        (
            {"target_modules": ["o_proj"]},
            "target_modules in adapter_config.json has not its module, and PEFT would pass it over",
        ),
    ],
    ids=["no prefix", "no target"],
)
def test_what_peft_accepts_in_silence_is_refused(
    case: Case, tmp_path: Path, mistake: dict, message: str
):
    folder = changed(case, tmp_path / "wrong", **mistake)
    # PEFT computes the base, or something between it and the adapted model; of this family alone it
    # understands names without the prefix.
    theirs = logits(peft.PeftModel.from_pretrained(load(case.base), folder))
    if case.model.config is not lora_toy.MOONLIGHT or "tensors" not in mistake:
        assert np.abs(theirs - case.logits).max() > ADAPTER_SHOWS
    model = lora_toy.make_plain(case.model.config)
    with pytest.raises(ValueError, match=re.escape(message)):
        read_peft(folder, model)
    assert not has_adapters(model)


@pytest.mark.parametrize(
    ("mistake", "message"),
    [
        ({"tensors": without_last}, r"lacks base_model.*lora_B.weight, .*; 1 of \d+ tensors are"),
        ({"tensors": not_finite}, r"holds nan at \["),
        ({"r": 5}, r"has the shape \[4, \d+\]; the model and r = 5 ask for \[5, \d+\]"),
        ({"r": 0}, "r must be a positive integer, got 0"),
        ({"lora_alpha": None}, "lora_alpha must be a positive number, got None"),
        ({"use_rslora": True}, "use_rslora is True, which is no plain LoRA"),
        ({"rank_pattern": {"q_proj": 8}}, "rank_pattern is .*, which is no plain LoRA"),
        ({"bias": "all"}, "bias is 'all', which is no plain LoRA"),
        ({"peft_type": "IA3"}, "peft_type is 'IA3'; only LORA can be read"),
        ({"target_modules": ".*proj"}, "target_modules must be a list of names, got '.*proj'"),
        ({"target_modules": ["lm_head"]}, "target_modules names lm_head, which is no matrix"),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(value),
)
@pytest.mark.parametrize("case", ["qwen2"], indirect=True)
def test_what_is_no_adapter_of_the_model_is_refused(
    case: Case, tmp_path: Path, mistake: dict, message: str
):
    folder = changed(case, tmp_path / "wrong", **mistake)
    with pytest.raises(ValueError, match=message):
        read_peft(folder, lora_toy.make_plain(case.model.config))


@pytest.mark.parametrize("case", ["qwen2"], indirect=True)
def test_a_pickle_is_not_opened_and_a_folder_in_use_not_written(case: Case, tmp_path: Path):
    (tmp_path / "adapter_model.bin").write_bytes(b"")
    with pytest.raises(ValueError, match=r"weights as a pickle \(adapter_model.bin\)"):
        read_peft(tmp_path, lora_toy.make_plain(case.model.config))
    with pytest.raises(FileExistsError, match="is in use: choose another folder"):
        write_peft(tmp_path, case.model, case.lora)
    other = LoraConfig(rank=4, alpha=5.0)
    with pytest.raises(ValueError, match=r"has rank 4 and scale 0.625, and config says 4 and 1.25"):
        write_peft(tmp_path / "new", case.model, other)
    with pytest.raises(ValueError, match="the model has no adapters to write"):
        write_peft(tmp_path / "new", merged(case.model), case.lora)


@pytest.mark.parametrize("targets", ["all-linear", "experts", "shared_experts.up_proj"])
def test_what_peft_rewrites_in_moonlight_goes_out_merged(tmp_path: Path, targets: str):
    lora = LoraConfig(rank=2, dropout=0.0, target_modules=targets)

    def build():
        model = lora_toy.make_plain(lora_toy.MOONLIGHT)
        add_lora(model, lora, nnx.Rngs(0))
        return model

    with pytest.raises(ValueError, match=r"PEFT has no adapter for \S*mlp\S* .*Export merged"):
        write_peft(tmp_path / "adapter", nnx.eval_shape(build), lora)
    assert not any(tmp_path.iterdir())


def test_a_stack_in_part_is_named_in_full(tmp_path: Path):
    """`q_proj` of the first layer alone: PEFT would adapt it everywhere by its short name."""
    targets = ("first_layers.0.self_attn.q_proj", "o_proj")
    lora = LoraConfig(rank=2, dropout=0.0, target_modules=targets)
    model = lora_toy.make(lora_toy.MOONLIGHT, lora=lora)
    write_peft(tmp_path / "adapter", model, lora)
    content = json.loads((tmp_path / "adapter" / CONFIG_FILE).read_text())
    assert content["target_modules"] == ["model.layers.0.self_attn.q_proj", "o_proj"]
    other = lora_toy.make(lora_toy.MOONLIGHT)
    read_peft(tmp_path / "adapter", other)
    jax.tree.map(
        np.testing.assert_array_equal, *(nnx.state(m, nnx.LoRAParam) for m in (other, model))
    )
