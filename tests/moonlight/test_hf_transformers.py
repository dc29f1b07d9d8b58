"""What transformers computes from a directory of ours, we compute: logits, loss, every gradient.

The only file that imports transformers and torch, which takes seconds.
"""

import base64
import copy
import dataclasses
import json
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from flax import nnx
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from examples.moonlight.data.tokenized import END_OF_TEXT
from examples.moonlight.generation.decoding import Generator
from examples.moonlight.generation.sampling import Sampling, likeliest
from examples.moonlight.hf_export import export_pretrained
from examples.moonlight.huggingface import config as hf_config
from examples.moonlight.huggingface import names as hf_names
from examples.moonlight.huggingface import pretrained as hf_import
from examples.moonlight.huggingface.fetching import fetch
from examples.moonlight.huggingface.pretrained import load_pretrained
from examples.moonlight.model.config import MoonlightConfig
from examples.moonlight.model.execution.options import Execution
from examples.moonlight.model.language_model import next_token_loss
from tests.moonlight import hf_toy

pytestmark = pytest.mark.one_stack

TOKENS = np.random.default_rng(3).integers(0, 62, (2, 14))

# Largest difference of logits, which reach 5; measured 4.7e-6.
LOGITS_TOLERANCE = 2e-5
LOSS_TOLERANCE = 2e-6
# Largest difference of a gradient's entries, over its largest entry; measured 1.7e-6.
GRADIENT_TOLERANCE = 2e-5
# Every known mistake moves some logit by this; measured 2.2 (scale of the logits) to 9.1.
MISTAKE_SHOWS = 0.5


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    """At toy size a second thread of torch only waits for the first."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Case(NamedTuple):
    """One family: an exported directory, and its model on both sides."""

    config: Any
    folder: Any
    theirs: Any
    ours: nnx.Module
    logits: np.ndarray
    loss: float
    grads: nnx.State


@pytest.fixture(name="case", scope="module", params=hf_toy.FAMILIES)
def _case(request, tmp_path_factory) -> Case:
    config = hf_toy.FAMILIES[request.param]
    root = tmp_path_factory.mktemp(request.param)
    source = hf_toy.write_model(root / "source", config, hf_toy.hard_tensors(config))
    pretrained = load_pretrained(source)
    export_pretrained(root / "hf", *pretrained, dtype="float32", max_shard_size=50_000)
    theirs, info = transformers.AutoModelForCausalLM.from_pretrained(
        root / "hf", output_loading_info=True
    )
    assert not any(info.values()), info
    assert {p.dtype for p in theirs.parameters()} == {torch.float32}

    graphdef, _, _ = hf_import.abstract_model(config, Execution())

    def run(params, bias, tokens):
        model = nnx.merge(graphdef, params, bias)
        return next_token_loss(model, tokens)[0], model(tokens[:, :-1])[0]

    # Unoptimized, because it runs once.
    options = {"xla_backend_optimization_level": 0}
    run = jax.jit(jax.value_and_grad(run, has_aux=True), compiler_options=options)
    (loss, logits), grads = run(pretrained.params, pretrained.bias, jnp.asarray(TOKENS))
    ours = nnx.merge(graphdef, pretrained.params, pretrained.bias)
    return Case(config, root / "hf", theirs, ours, np.asarray(logits), float(loss), grads)


def their_logits(model) -> np.ndarray:
    with torch.no_grad():
        return model(input_ids=torch.tensor(TOKENS)).logits[:, :-1].numpy()


def test_logits_loss_and_every_gradient_agree(case):
    case.theirs.zero_grad()
    out = case.theirs(input_ids=torch.tensor(TOKENS), labels=torch.tensor(TOKENS))
    out.loss.backward()
    np.testing.assert_allclose(
        case.logits, out.logits[:, :-1].detach(), rtol=0, atol=LOGITS_TOLERANCE
    )
    assert abs(case.loss - out.loss.item()) < LOSS_TOLERANCE

    theirs = dict(case.theirs.named_parameters())
    found, _ = jax.tree_util.tree_flatten_with_path(case.grads)
    ours = {hf_import.path_names(path): leaf for path, leaf in found}
    compared = set()
    for row in hf_names.table(case.config, fused=True):
        if row.path[-2:] == ("router", "bias"):
            assert row.name not in theirs  # a buffer there, no nnx.Param here
            continue
        gradient = theirs[row.name].grad.numpy()
        if row.rows:
            gradient = gradient[:, row.first : row.first + row.rows]
        largest = np.abs(gradient).max()
        assert largest > 0, row.name
        difference = np.abs(fetch(row, ours[row.path]) - gradient).max()
        assert difference < GRADIENT_TOLERANCE * largest, (row.name, difference / largest)
        compared.add(row.name)
    assert compared == theirs.keys()


# --- mistakes -------------------------------------------------------------------------------------


def each(model, kind, change):
    """Changes every submodule whose class's name ends so."""
    found = [module for module in model.modules() if type(module).__name__.endswith(kind)]
    assert found
    for module in found:
        change(module)


def set_all(kind, name, value):
    return lambda model, _: each(model, kind, lambda module: setattr(module, name, value))


def scale_by_value_width(model, _):
    each(model, "Attention", lambda module: setattr(module, "scaling", module.v_head_dim**-0.5))


def latent_eps(model, _):
    for layer in model.model.layers:
        layer.self_attn.kv_a_layernorm.variance_epsilon = 1e-5


def no_bias(kind, name):
    return lambda model, _: each(model, kind, lambda module: getattr(module, name).zero_())


def bias_in_weights(model, _):
    def route(self, hidden):
        logits = torch.nn.functional.linear(hidden.view(-1, hidden.shape[-1]), self.weight)
        scores = logits.sigmoid() + self.e_score_correction_bias
        weights, indices = torch.topk(scores, self.top_k)
        return logits, weights / weights.sum(-1, keepdim=True) * self.routed_scaling_factor, indices

    each(model, "TopkRouter", lambda module: setattr(module, "forward", route.__get__(module)))


def gate_and_up_exchanged(model, _):
    each(model, "Experts", lambda m: m.gate_up_proj.copy_(m.gate_up_proj.roll(20, dims=1)))


def shared_scaled(model, _):
    each(model, "MoE", lambda m: m.shared_experts.down_proj.weight.mul_(1.7))


def value_first(model, _):
    def roll(attention):
        heads = attention.kv_b_proj.weight.view(4, 18, 24)
        heads.copy_(heads.roll(10, dims=1))

    each(model, "Attention", roll)


def other_rope(interleaved):
    """Replaces the family's own convention by the other one."""

    def rotate(q, k, cos, sin, *_, **__):
        cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
        half = cos.shape[-1] // 2

        def one(x):
            a, b = x[..., 0::2], x[..., 1::2]
            c, s = cos[..., :half], sin[..., :half]
            return torch.stack([a * c - b * s, b * c + a * s], -1).flatten(-2)

        return one(q), one(k)

    def apply(model, monkeypatch):
        if interleaved:
            module = type(model).__module__
            monkeypatch.setattr(f"{module}.apply_rotary_pos_emb", rotate)
        else:
            monkeypatch.setattr(model.config, "rope_interleave", False)

    return apply


def heads_in_turn(model, monkeypatch):
    """Query head h reads key head h mod kv heads."""

    def repeat(x, n):
        return x.repeat(1, n, 1, 1)

    monkeypatch.setattr(f"{type(model).__module__}.repeat_kv", repeat)
    model.set_attn_implementation("eager")


def other_theta(model, _):
    rotary = model.model.rotary_emb
    rotary.inv_freq = 10_000.0 ** (
        -torch.arange(len(rotary.inv_freq), dtype=torch.float32) / len(rotary.inv_freq)
    )


def no_qkv_bias(model, _):
    each(model, "Attention", lambda m: [p.bias.zero_() for p in (m.q_proj, m.k_proj, m.v_proj)])


MISTAKES = {
    "deepseek_v3": {
        "rope in halves": other_rope(interleaved=False),
        "latent norm with the model's eps": latent_eps,
        "logits scaled by the value width": scale_by_value_width,
        "bias left out of the choice": no_bias("TopkRouter", "e_score_correction_bias"),
        "bias in the weights": bias_in_weights,
        "weights not normalised": set_all("TopkRouter", "norm_topk_prob", False),
        "no gate scale": set_all("TopkRouter", "routed_scaling_factor", 1.0),
        "gate scale on the shared experts too": shared_scaled,
        "gate and up exchanged": gate_and_up_exchanged,
        "kv_b split as [v | k]": value_first,
        "theta of another model": other_theta,
    },
    "qwen2": {
        "rope interleaved": other_rope(interleaved=True),
        "no bias": no_qkv_bias,
        "key heads in turn": heads_in_turn,
        "theta of another model": other_theta,
    },
    "llama": {
        "rope interleaved": other_rope(interleaved=True),
        "key heads in turn": heads_in_turn,
        "theta of another model": other_theta,
    },
}


def test_known_mistakes_would_be_seen(case, monkeypatch):
    assert np.abs(their_logits(case.theirs) - case.logits).max() < LOGITS_TOLERANCE
    for name, mistake in MISTAKES[case.theirs.config.model_type].items():
        wrong = copy.deepcopy(case.theirs)
        with monkeypatch.context() as patch, torch.no_grad():
            mistake(wrong, patch)
            shift = np.abs(their_logits(wrong) - case.logits).max()
            assert shift > MISTAKE_SHOWS, (name, shift)


# --- other forms of the family --------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [{"n_shared_experts": 0}, {"first_k_dense_replace": 3}],
    ids=str,
)
@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_forms_that_transformers_writes_are_read_and_written(changes, tmp_path):
    """Its own defaults besides, of which one says that there is a layer beside the model."""
    fields = hf_config.config_fields(hf_toy.MOONLIGHT, dtype="float32") | changes
    del fields["num_nextn_predict_layers"], fields["model_type"], fields["architectures"]
    theirs = transformers.AutoModelForCausalLM.from_config(
        transformers.AutoConfig.for_model("deepseek_v3", **fields)
    )
    rng = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for tensor in theirs.parameters():
            if tensor.ndim > 1:
                tensor.normal_(std=0.2, generator=rng)
    theirs.save_pretrained(tmp_path / "theirs")
    written = json.loads((tmp_path / "theirs" / "config.json").read_text())
    assert written["num_nextn_predict_layers"] == 1
    config, params, bias = load_pretrained(tmp_path / "theirs")
    assert config == dataclasses.replace(hf_toy.MOONLIGHT, **changes)
    graphdef, _, _ = hf_import.abstract_model(config, Execution())
    run = jax.jit(
        lambda params, bias, tokens: nnx.merge(graphdef, params, bias)(tokens),
        compiler_options={"xla_backend_optimization_level": 0},
    )
    logits, stats = run(params, bias, jnp.asarray(TOKENS))
    expected = their_logits(theirs)
    np.testing.assert_allclose(logits[:, :-1], expected, rtol=0, atol=LOGITS_TOLERANCE)
    assert np.abs(expected).max() > 2
    assert (stats.load_le is None) == (not config.has_experts) == (not jax.tree.leaves(bias))

    export_pretrained(tmp_path / "ours", config, params, bias, dtype="float32")
    again, info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "ours", output_loading_info=True
    )
    assert not any(info.values()), info
    np.testing.assert_array_equal(their_logits(again), expected)


# --- directories ----------------------------------------------------------------------------------


def test_what_transformers_writes_is_read(case, tmp_path):
    """Its keys, its names and its shards; also what it wrote of half the model's precision."""
    case.theirs.save_pretrained(tmp_path / "v5", max_shard_size="50KB")
    assert len(list((tmp_path / "v5").glob("*.safetensors"))) > 1
    fields = json.loads((tmp_path / "v5" / "config.json").read_text())
    assert "rope_parameters" in fields and "rope_theta" not in fields
    config, params, bias = load_pretrained(tmp_path / "v5")
    assert config == case.config
    _, expected_params, expected_bias = nnx.split(case.ours, nnx.Param, hf_import.RouterBias)
    for found, expected in zip(
        jax.tree.leaves((params, bias)),
        jax.tree.leaves((expected_params, expected_bias)),
        strict=True,
    ):
        np.testing.assert_array_equal(found, expected)


# Bookkeeping, token ids (the tokenizer's business), options of transformers' own loops, and what
# counts only with a sliding window, which is refused. Weights say their dtype themselves.
IGNORED = frozenset(
    {
        *("architectures", "bos_token_id", "chunk_size_feed_forward", "dtype", "eos_token_id"),
        *("id2label", "is_encoder_decoder", "label2id", "max_window_layers", "output_attentions"),
        *("output_hidden_states", "output_router_logits", "pad_token_id", "problem_type"),
        *("pretraining_tp", "return_dict", "sliding_window", "transformers_version", "use_cache"),
    }
)


def test_no_field_that_transformers_knows_is_overlooked(case):
    """Each is read, or checked against the one value that our model has, or changes nothing."""
    family = hf_config.FAMILIES[case.theirs.config.model_type]
    handled = {field.name for field in dataclasses.fields(family.config)} | family.fixed.keys()
    handled |= {"num_key_value_heads", "head_dim", "qk_head_dim", "layer_types", "rope_parameters"}
    handled |= {*hf_config._AHEAD}
    known = {
        field.name
        for field in dataclasses.fields(type(case.theirs.config))
        if not field.name.startswith("_")
    }
    assert known - handled - IGNORED == set()


def test_the_published_model_has_the_names_and_shapes_of_transformers(tmp_path):
    """All 27 layers, on torch's meta device: names only."""
    config = MoonlightConfig.preset("moonlight-16b-a3b")
    fields = hf_config.config_fields(config, dtype="bfloat16")
    (tmp_path / "config.json").write_text(json.dumps(fields))
    theirs_config = transformers.AutoConfig.from_pretrained(tmp_path)
    with torch.device("meta"):
        theirs = transformers.AutoModelForCausalLM.from_config(theirs_config)
    shapes = {name: tuple(value.shape) for name, value in theirs.state_dict().items()}
    assert hf_names.shapes(hf_names.table(config, fused=True)) == shapes
    per_expert = {name for name in shapes if ".mlp.experts." not in name} | {
        f"model.layers.{layer}.mlp.experts.{expert}.{name}.weight"
        for layer in range(1, 27)
        for expert in range(64)
        for name in ("gate_proj", "up_proj", "down_proj")
    }
    assert per_expert == hf_names.shapes(hf_names.table(config)).keys()
    assert len(per_expert) == 5_317


@pytest.mark.parametrize("case", ["deepseek_v3"], indirect=True)
def test_the_tokenizer_comes_along(case, tmp_path):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())[:50]
    trainer = trainers.BpeTrainer(
        vocab_size=62, special_tokens=[END_OF_TEXT], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(["line holds line"], trainer)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    _, params, bias = nnx.split(case.ours, nnx.Param, hf_import.RouterBias)
    export_pretrained(
        tmp_path / "one", case.config, params, bias, tokenizer=tmp_path / "tokenizer.json"
    )
    # From one folder to the next.
    export_pretrained(tmp_path / "hf", case.config, params, bias, tokenizer=tmp_path / "one")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    text = "line holds" + END_OF_TEXT
    assert theirs(text)["input_ids"] == tokenizer.encode(text).ids
    assert theirs.decode(theirs(text)["input_ids"]) == text
    assert theirs.eos_token_id == tokenizer.token_to_id(END_OF_TEXT) == 0
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    assert model.dtype == torch.bfloat16
    assert model.generation_config.eos_token_id == 0
    assert model.model.layers[1].mlp.gate.e_score_correction_bias.dtype == torch.float32
    small = dataclasses.replace(case.config, vocab_size=10)
    with pytest.raises(ValueError, match=r"tokens, and the model's vocab_size is 10"):
        export_pretrained(tmp_path / "x", small, params, bias, tokenizer=tmp_path / "one")


def test_a_tiktoken_file_becomes_a_tokenizer_that_transformers_loads(tmp_path):
    """As Moonlight's folder: its class is remote code, and an answer ends otherwise than a text."""
    source = tmp_path / "source"
    source.mkdir()
    tokens = [bytes([byte]) for byte in range(256)] + [b"li", b"ne", b"line"]
    lines = (b"%s %d\n" % (base64.b64encode(token), i) for i, token in enumerate(tokens))
    (source / "tiktoken.model").write_bytes(b"".join(lines))
    special = {str(259 + i): {"content": name} for i, name in enumerate(("[EOS]", "<|im_end|>"))}
    remote = {"AutoTokenizer": ["tokenization_moonshot.TikTokenTokenizer", None]}
    for name, fields in {
        "tokenizer_config.json": {
            "added_tokens_decoder": special,
            "auto_map": remote,
            "chat_template": "{{ messages[0]['content'] }}<|im_end|>",
            "eos_token": "[EOS]",
            "tokenizer_class": "TikTokenTokenizer",
        },
        "config.json": {"eos_token_id": 259},
        "generation_config.json": {"eos_token_id": 260, "max_length": 99},
    }.items():
        (source / name).write_text(json.dumps(fields))
    config = dataclasses.replace(hf_toy.LLAMA, vocab_size=261)
    folder = hf_toy.write_model(tmp_path / "hf", config, hf_toy.hard_tensors(config))
    export_pretrained(tmp_path / "out", *load_pretrained(folder), tokenizer=source)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer("line é<|im_end|>")["input_ids"] == [258, 32, 0xC3, 0xA9, 260]
    assert tokenizer.eos_token_id == 259
    chat = [{"role": "user", "content": "line"}]
    assert tokenizer.apply_chat_template(chat, tokenize=False) == "line<|im_end|>"
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.config.eos_token_id == 259
    assert model.generation_config.eos_token_id == 260 and model.generation_config.max_length == 99


# --- generation -----------------------------------------------------------------------------------


def test_greedy_texts_are_those_of_transformers(case):
    prompts = [TOKENS[0, :3].tolist(), TOKENS[1, :7].tolist(), TOKENS[0, 3:5].tolist()]
    split = nnx.split(case.ours, nnx.Param, hf_import.RouterBias)
    generator = Generator(*split, batch=3, length=16, chunk=4, sampling=Sampling(temperature=0))
    rows = list(zip(*generator.stream(prompts, max_new_tokens=9), strict=True))
    for prompt, row in zip(prompts, rows, strict=True):
        ids = torch.tensor([prompt])
        theirs = case.theirs.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=9, do_sample=False
        )
        assert [*prompt, *row] == theirs[0].tolist()
    assert len(set(rows)) == 3 and len({token for row in rows for token in row}) > 6


def test_filters_keep_what_those_of_transformers_keep():
    logits = 3 * np.random.default_rng(0).standard_normal((20, 300)).astype(np.float32)
    for sampling in (
        Sampling(0.7, top_p=0.9),
        Sampling(0.8, top_k=50, top_p=0.6),
        Sampling(1.0, top_p=1e-4),
    ):
        warpers = transformers.LogitsProcessorList([TemperatureLogitsWarper(sampling.temperature)])
        if sampling.top_k is not None:
            warpers.append(TopKLogitsWarper(sampling.top_k))
        warpers.append(TopPLogitsWarper(sampling.top_p))
        theirs = warpers(torch.LongTensor(), torch.tensor(logits)).numpy()
        kept, ids = likeliest(jnp.asarray(logits), sampling)
        ours = np.full_like(logits, -np.inf)
        np.put_along_axis(ours, np.asarray(ids), np.asarray(kept), axis=1)
        np.testing.assert_array_equal(np.isfinite(ours), np.isfinite(theirs))
        np.testing.assert_allclose(ours, theirs, rtol=1e-6)
