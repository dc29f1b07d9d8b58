"""Commands of ms-swift's documentation, with the program's name changed."""

import dataclasses
import shlex
from pathlib import Path

import jax.numpy as jnp
import pytest

from examples.finetune import export, infer, sft
from examples.finetune.args import ALIASES, Args, check
from examples.finetune.command_line import parse
from examples.finetune.foreign_flags import IN_EXPORT, IN_INFERENCE, IN_TRAINING
from examples.finetune.optim_args import parse_optim_args
from examples.finetune.training.keeping import Occasions, TotalLimit, occasions
from examples.finetune.training.place import find_place
from examples.finetune.training.schedule import make_schedule, warmup_of

# examples/train/optimizer/muon.sh of ms-swift 3, but for the hub's names of model and data.
MUON = r"""
    --model Qwen2.5-7B-Instruct \
    --train_type lora \
    --dataset 'alpaca-gpt4-data-zh.jsonl#500' \
              'alpaca-gpt4-data-en.jsonl#500' \
              'self_cognition.jsonl#500' \
    --optimizer muon \
    --torch_dtype bfloat16 \
    --num_train_epochs 1 \
    --per_device_train_batch_size 1 \
    --per_device_eval_batch_size 1 \
    --learning_rate 1e-4 \
    --lora_rank 8 \
    --lora_alpha 32 \
    --target_modules all-linear \
    --gradient_accumulation_steps 16 \
    --eval_steps 50 \
    --save_steps 50 \
    --save_total_limit 5 \
    --logging_steps 5 \
    --max_length 2048 \
    --output_dir output \
    --system 'You are a helpful assistant.' \
    --warmup_ratio 0.05 \
    --dataloader_num_workers 4 \
    --model_author swift \
    --model_name swift-robot
"""


def read(text: str) -> Args:
    argv = shlex.split(text.replace("\\\n", " "))
    return parse(Args, argv, aliases=ALIASES, foreign=IN_TRAINING)


def test_a_command_of_the_documentation_is_read(capsys):
    args = read(MUON)
    assert args == Args(
        model="Qwen2.5-7B-Instruct",
        dataset=(
            "alpaca-gpt4-data-zh.jsonl#500",
            "alpaca-gpt4-data-en.jsonl#500",
            "self_cognition.jsonl#500",
        ),
        torch_dtype="bfloat16",
        num_train_epochs=1.0,
        learning_rate=1e-4,
        eval_steps=50,
        save_steps=50,
        save_total_limit=5,
        system="You are a helpful assistant.",
        model_author=("swift",),
        model_name=("swift-robot",),
    )
    said = capsys.readouterr().err
    assert said.startswith("--dataloader_num_workers is ignored: rows are read in a thread")
    assert said.count("is ignored") == 1


def test_commands_of_the_documentation_for_tuned_models_are_read(capsys):
    argv = "--adapters output/checkpoint-20 --stream true --temperature 0 --max_new_tokens 2048"
    argv += " --infer_backend vllm --vllm_max_model_len 8192 --merge_lora true"
    args = parse(infer.Args, argv.split(), aliases=infer.ALIASES, foreign=IN_INFERENCE)
    assert args == infer.Args(adapters=Path("output/checkpoint-20"), max_new_tokens=2048)
    assert capsys.readouterr().err.count("is ignored") == 3
    argv = "--adapters output/checkpoint-20 --merge_lora true --output_dir merged"
    args = parse(export.Args, argv.split(), aliases=export.ALIASES, foreign=IN_EXPORT)
    assert (args.merge_lora, args.output_dir) == (True, Path("merged"))
    with pytest.raises(ValueError, match="--push_to_hub true means nothing here: nothing is down"):
        parse(export.Args, ["--push_to_hub", "true"], aliases={}, foreign=IN_EXPORT)


def test_the_defaults_are_ms_swifts():
    args = Args()
    assert (args.lora_rank, args.lora_alpha, args.lora_dropout) == (8, 32, 0.05)
    assert (args.weight_decay, args.adam_beta1, args.adam_beta2) == (0.1, 0.9, 0.95)
    assert (args.max_grad_norm, args.seed, args.max_length, args.logging_steps) == (1, 42, 2048, 5)
    assert args.per_device_train_batch_size * args.gradient_accumulation_steps == 16
    assert args.peak_rate == 1e-4
    assert dataclasses.replace(args, tuner_type="full").peak_rate == 1e-5


def test_everything_that_is_wrong_is_said_at_once():
    with pytest.raises(ValueError) as error:
        read("--packing maybe --lora_rnk 8 --use_dora true --seed 1 --seed 2 --lora_alpha x")
    assert str(error.value).split("; ") == [
        "--packing: expected true or false, got maybe",
        "--lora_rnk is no flag of this program: did you mean --lora_rank?",
        "--use_dora true means nothing here: LoRA here is that of Hu et al., scaled by alpha / "
        "rank",
        "--seed is given twice",
        "--lora_alpha: expected a number, got x",
    ]


def test_flags_that_ask_for_what_is_done_anyway_are_ignored(capsys):
    read(
        "--attn_impl flash_attn --deepspeed zero2 --use_dora false --loss_scale default --vllm_tp 2"
    )
    assert capsys.readouterr().err.count("is ignored") == 5


@pytest.mark.parametrize("value", ["last_round", "react"])
def test_another_loss_is_refused(value: str):
    with pytest.raises(ValueError, match=f"--loss_scale {value} means nothing here: the loss is"):
        read(f"--loss_scale {value}")


def test_words_are_read_by_their_types():
    args = read("--packing True --dataset=a.jsonl --max-steps -1 --eval_steps none --dtype float32")
    assert (args.packing, args.dataset, args.max_steps) == (True, ("a.jsonl",), -1)
    assert (args.eval_steps, args.torch_dtype) == (None, "float32")
    for text, message in {
        "loose --seed 1": "'loose' stands before any flag",
        "--dataset": "--dataset: give one or more values",
        "--seed 1 2": "--seed: expected one value, got 1 2",
        "--optimizer sgd": "--optimizer: expected one of muon, muonclip, adamw, got sgd",
        "--max_steps 1.5": "--max_steps: expected an integer, got 1.5",
    }.items():
        with pytest.raises(ValueError, match=message):
            read(text)


def test_the_help_shows_every_flag(capsys):
    with pytest.raises(SystemExit) as ended:
        sft.read(["--help"])
    assert not ended.value.code
    said = capsys.readouterr().out
    assert all(f"--{field.name}" in said for field in dataclasses.fields(Args))


def test_no_flag_is_both_ours_and_foreign():
    ours = {field.name for field in dataclasses.fields(Args)} | ALIASES.keys()
    assert not ours & IN_TRAINING.keys()
    for table in (IN_TRAINING, IN_INFERENCE, IN_EXPORT):
        assert all(entry.why and not entry.why.endswith(".") for entry in table.values())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lora_rank": 0}, "--lora_rank must be positive, got 0"),
        ({"lora_dropout": 1.0}, "--lora_dropout must be below 1"),
        ({"warmup_ratio": 1.5}, "--warmup_ratio must be at most 1"),
        ({"max_steps": 0}, "--max_steps must be positive, or -1"),
        ({"seed": 2**32}, "must be less than"),
        ({"val_dataset": ("a",), "split_dataset_ratio": 0.1}, "both say what to validate on"),
        ({"optimizer": "muonclip"}, "choose muon, or --tuner_type full"),
        ({"model_name": ("a", "b", "c")}, "--model_name: give one name"),
    ],
)
def test_what_no_run_can_have_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        check(dataclasses.replace(Args(), **changes))


def test_arguments_of_the_optimizer_have_types():
    found = parse_optim_args("momentum=0.9, nesterov=false,ns_steps=6,lora_a=adamw", "muon", "lora")
    assert found == {"beta": 0.9, "nesterov": False, "ns_steps": 6, "lora_a": "adamw"}
    # The documentation of ms-swift.
    assert parse_optim_args("qk_clip_tau=100", "muonclip", "full") == {"qk_clip_threshold": 100.0}
    assert parse_optim_args(None, "adamw", "lora") == {}
    for text, optimizer, message in (
        ("ns_step=5", "muon", r"muon has no argument 'ns_step'; it has beta \(a number\), mom"),
        ("qk_clip_tau=100", "muon", "muon has no argument 'qk_clip_tau'"),
        ("beta=1", "adamw", "adamw has no argument 'beta'; it has none: leave it out"),
        ("nesterov=0", "muon", "nesterov must be true or false, got 0"),
        ("beta", "muon", "beta must be a number, got nothing; write beta=VALUE"),
        ("ns_coeffs=fast", "muon", "ns_coeffs must be .* or .*, got fast"),
        ("beta=1,momentum=2", "muon", "momentum is given twice"),
    ):
        with pytest.raises(ValueError, match=message):
            parse_optim_args(text, optimizer, "lora")


def test_the_rate_rises_and_falls():
    warmup = warmup_of(100, warmup_steps=0, warmup_ratio=0.045, kind="cosine")
    assert warmup == 5  # rounded up, as Hugging Face's
    cosine = make_schedule("cosine", peak=2.0, steps=100, warmup=5)
    assert [float(cosine(step)) for step in (0, 4, 5)] == pytest.approx([0.4, 2.0, 2.0])
    assert float(cosine(5 + 95 / 2)) == pytest.approx(1.0)
    assert 0 < float(cosine(99)) < 0.001
    linear = make_schedule("linear", peak=2.0, steps=100, warmup=0)
    assert [float(linear(jnp.int32(step))) for step in (0, 50)] == pytest.approx([2.0, 1.0])
    assert warmup_of(100, warmup_steps=7, warmup_ratio=0.5, kind="constant") == 0
    constant = make_schedule("constant_with_warmup", peak=2.0, steps=100, warmup=7)
    assert float(constant(99)) == 2.0


@pytest.mark.parametrize(
    ("limit", "losses", "kept"),
    [
        (None, {1: 3.0, 2: None}, {1, 2}),
        (2, {1: 3.0, 2: 4.0, 3: 5.0}, {1, 3}),  # the best and the last
        (2, {1: 5.0, 2: 4.0, 3: 3.0}, {2, 3}),
        (2, {1: None, 2: None, 3: None}, {2, 3}),
        (1, {1: 3.0, 2: 4.0}, {1, 2}),
        (3, {1: 1.0, 2: 2.0, 3: 3.0, 4: 4.0}, {1, 3, 4}),
    ],
)
def test_a_limit_keeps_the_last_and_the_best(limit, losses, kept):
    assert TotalLimit(limit).kept(losses) == kept


def test_occasions_are_steps_or_ends_of_epochs():
    assert [n for n in range(1, 11) if Occasions(every=4).includes(n)] == [4, 8]
    assert [n for n in range(1, 11) if Occasions(epoch=2.5).includes(n)] == [3, 5, 8, 10]
    assert not any(Occasions().includes(n) for n in range(1, 11))
    saves, validates = occasions(Args(save_steps=7), 5.0, validates=True)
    assert saves == validates == Occasions(every=7)
    saves, validates = occasions(Args(save_strategy="epoch", eval_steps=2), 5.0, validates=True)
    assert (saves, validates) == (Occasions(epoch=5.0), Occasions(every=2))
    assert occasions(Args(eval_steps=2), 5.0, validates=False)[1] == Occasions()


def test_places(tmp_path: Path):
    run = tmp_path / "output"
    (run / "checkpoint-20").mkdir(parents=True)
    (run / "settings.json").write_text("{}")
    assert find_place(Args(output_dir=run)) == (run, False, None)
    asked = Args(resume_from_checkpoint=run / "checkpoint-20", output_dir=run)
    assert find_place(asked) == (run, True, 20)
    assert find_place(Args(resume_from_checkpoint=run)) == (run, True, None)
    with pytest.raises(ValueError, match=r"that run works in .*output, and --output_dir is"):
        find_place(dataclasses.replace(asked, output_dir=tmp_path / "elsewhere"))
    with pytest.raises(FileNotFoundError, match="keeps those of the steps 20"):
        find_place(Args(resume_from_checkpoint=run / "checkpoint-21"))
    (run / "settings.json").unlink()
    with pytest.raises(FileNotFoundError, match="give the checkpoint in its own output folder"):
        find_place(asked)
    with pytest.raises(FileNotFoundError, match="there is no such folder; leave it out to begin"):
        find_place(Args(resume_from_checkpoint=tmp_path / "nowhere"))
    (run / "v3-20260101-000000").mkdir()
    assert find_place(Args(output_dir=run, add_version=True)).folder.name.startswith("v4-")
