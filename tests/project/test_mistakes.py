"""Mistakes of users, each of which ends its program with one sentence, before anything compiles."""

import errno
import importlib
import io
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import jax
import pytest
import tyro
from tokenizers import Tokenizer, models

from examples import minimal
from examples.finetune import export, infer, sft
from examples.finetune.study import __main__ as study
from examples.moonlight import generate, hf_check, hf_export, stages, train
from examples.moonlight.common.command_line import CommandLine
from examples.moonlight.common.program import run_program
from examples.moonlight.data.prepare import __main__ as prepare
from examples.scaling_law import __main__ as scaling_law

pytestmark = pytest.mark.one_stack

ROOT = Path(__file__).parents[2]

# Programs by the first word of a command. Those with handlers of signals run without these.
PROGRAMS: dict[str, Callable[[], object]] = {
    "train": lambda: train.COMMAND_LINE.run(train.train),
    "sft": lambda: run_program(lambda: sft.finetune(sft.read())),
    "minimal": lambda: run_program(lambda: tyro.cli(minimal.main)),
    "generate": generate.main,
    "hf_export": hf_export.main,
    "hf_check": hf_check.main,
    "stages": stages.main,
    "prepare": prepare.main,
    "infer": infer.main,
    "export": export.main,
    "study": study.main,
    "scaling_law": scaling_law.main,
}

# What is typed in the folder that `workplace` makes, and the sentence, or how it begins.
MISTAKES = {
    "train --output-dir run": "run is not empty: continue that run with --resume, or choose anoth",
    "train --output-dir some --resume": "--resume: some holds files but no settings.json",
    "train --output-dir new --resume-step 4": "--resume-step: no run was started in new",
    "train --output-dir a.txt": "--output-dir a.txt is a file: choose a folder",
    "train --output-dir new --data nowhere.txt": "--data nowhere.txt: no such file or folder; give",
    "train --output-dir new --data empty": "--data empty: no text in it",
    "train --output-dir new --data bad.jsonl": 'bad.jsonl, line 2: expected an object {"text":',
    "train --output-dir new --data latin.txt": "latin.txt is not UTF-8 text (byte 3): convert it",
    "train --output-dir new --data line.txt": "line.txt has 8 characters: too few to hold some out",
    "train --output-dir new --data a --data b": "--data a: several sources need a name each",
    "train --output-dir new --data a=a.txt --data b=a.txt --mix c=1": "--mix c=1: cannot read 'c=1",
    "train --output-dir new --mesh 2": "--mesh 2: cannot read '2'. Write the size of each axis onc",
    "train --output-dir new --mesh data=3": "--mesh data=3 needs 3 devices, and JAX sees 8: choose",
    "train --output-dir new --mesh data=8 --batch-size 3": "--mesh: data x fsdp x expert = 8 does",
    "train --output-dir new --mesh tensor=8": "--mesh: tensor = 8 does not divide num_attention_he",
    "train --output-dir new --batch-size -8": "--batch-size must be positive, got -8",
    "train --output-dir new --steps 0": "--steps must be positive, got 0",
    "train --output-dir new --learning-rate nan": "--learning-rate must be positive, got nan",
    "train --output-dir new --steps 9 --warmup-steps 20": "--warmup-steps (20) must be fewer than",
    "train --output-dir new --steps 9 --total-tokens 9": "--steps goes with --schedule cosine, and",
    "train --output-dir new --total-tokens 10": "10 tokens are too few for this schedule: one step",
    "train --output-dir new --seed 4294967296": "--seed must be less than 2**32, got 4294967296",
    "train --output-dir new --qk-clip-threshold 50": "--qk-clip-threshold is muonclip's, and --opt",
    "train --output-dir new --muon-heads groups": "--muon-heads groups and --muon-heads-per-group",
    "train --output-dir new --expert-capacity 2": "--expert-capacity 2.0 limits the tokens that ar",
    "train --output-dir new --init-from nowhere": "nowhere has no config.json: give the folder of",
    "train --output-dir new --init-from gpt2": "gpt2/config.json: model_type is 'gpt2'; supported",
    "train --output-dir new --data begun": "begun is unfinished: the command that began it goes on",
    "train --output-dir new --data a=a.txt --data b=begun": "--data a.txt: its texts are no tokens",
    "prepare --output new": "give texts with --input and a tokenizer with --tokenizer, or --check",
    "prepare --output new --input nowhere --tokenizer bpe": "--input nowhere: no such file or fold",
    "prepare --output new --input a.txt --tokenizer some": "some has no tokenizer: neither tokeni",
    "prepare --output some --input a.txt --tokenizer bpe": "--output some is not empty: choose ano",
    "prepare --output new --input a.txt --tokenizer bpe --held-out 1": "--held-out must be between",
    "prepare --output new --input a.txt --tokenizer bpe --jobs 0": "--jobs must be at least 1, got",
    "prepare --output nowhere --check": "--output nowhere: there is no such folder",
    "generate --model nowhere --prompt a": "nowhere: there is no such folder; give a Hugging Face",
    "generate --model some --prompt a": "some is no model: found neither config.json, of a Hugging",
    "generate --model run": "give one of --prompt (or --prompts-file), --message and --chat",
    "generate --model run --prompts-file nowhere": "--prompts-file nowhere: no such file",
    "generate --model run --prompts-file blank.txt": "--prompts-file blank.txt: no prompt in it",
    "generate --model run --prompt a --system b": "--system goes with --message or --chat: a promp",
    "generate --model run --prompt a --temperature -1": "--temperature must be 0 (greedy) or a pos",
    "generate --model run --prompt a --top-p 2": "--top-p must be above 0 and at most 1, which kee",
    "generate --model run --prompt a --top-k 0": "--top-k must be at least 1, got 0; leave it out",
    "generate --model run --prompt a --max-new-tokens 0": "--max-new-tokens must be positive, got",
    "generate --model run --prompt a --prefill-chunk 0": "--prefill-chunk must be positive, got 0",
    "generate --model run --prompt a --mesh 2": "--mesh 2: cannot read '2'. Write the size of each",
    "hf_export --run nowhere --output new": "nowhere: there is no such folder; give a Hugging Face",
    "hf_export --run run --output some": "some is in use: choose another folder, or remove it",
    "hf_export --run run --output new --max-shard-gb 0": "--max-shard-gb must be positive, got 0.0",
    "hf_check --model run": "run has no config.json: give the folder of a Hugging Face model",
    "stages --total-tokens 10": "10 tokens are too few for this schedule: one step of each of its",
    "sft --model nowhere": "--model nowhere: there is no such folder; give the folder of a Hugging",
    "sft": "no --model is given, and the small one that `make train` makes is not in runs/moonligh",
    "sft --model run --lora_rnk 8": "--lora_rnk is no flag of this program: did you mean --lora_ra",
    "sft --model run --learning_rate fast": "--learning_rate: expected a number, got fast",
    "sft --model run --torch_dtype float16": "--torch_dtype: expected one of float32, bfloat16, go",
    "sft --model run --optim_args ns_step=5": "--optim_args: muon has no argument 'ns_step'; it ha",
    "sft --resume_from_checkpoint nowhere": "--resume_from_checkpoint nowhere: there is no such fo",
    "infer": "give --adapters with a checkpoint, such as output/checkpoint-20, or --model with the",
    "infer --adapters run --prompt a": "--adapters run: found no args.json: give a checkpoint of",
    "infer --model run --max_new_tokens 0": "--max_new_tokens must be positive, got 0",
    "infer --model run --prompt a --result_path no/a": "--result_path no/a: there is no folder no",
    "export": "give --adapters with a checkpoint, such as output/checkpoint-20",
    "export --adapters run --max_shard_size big": "--max_shard_size: expected a size such as 5GB o",
    "study --jobs 0": "--jobs must be at least 1, got 0",
    "scaling_law --jobs 0": "--jobs must be at least 1, got 0",
    "scaling_law --preset gpu": "--preset gpu trains up to 49M parameters and JAX finds no GPU or",
    "scaling_law --quick --preset gpu": "--quick is --preset quick, and --preset is gpu: give one",
    "scaling_law --quick --data a.txt": "--data a.txt: 1 different documents are too few to tune o",
    "minimal --steps 0": "--steps, --batch, --length and --width must be positive, --batch a mult",
    "minimal --width 10": "--steps, --batch, --length and --width must be positive, --batch a mult",
}

# Refused by the types of the options, in tyro's own frame, with the code 2 for wrong usage.
MISSPELLED = {
    "train": "--output-dir PATH",
    "train --output-dir new --preset huge": "invalid choice 'huge'",
    "train --output-dir new --learning-rat 1e-3": "--learning-rate FLOAT",
    "train --output-dir new --learning-rate fast": "fast",
    "generate --model run --prompt a --compute-dtype fp8": "invalid choice 'fp8'",
}


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with a run, a folder of something else, and texts of several kinds."""
    for name in ("run", "some", "empty", "gpt2", "begun", "bpe"):
        (tmp_path / name).mkdir()
    (tmp_path / "run/settings.json").write_text("{}")
    (tmp_path / "some/readme.txt").write_text("no model\n")
    (tmp_path / "gpt2/config.json").write_text(json.dumps({"model_type": "gpt2"}))
    (tmp_path / "begun/unfinished.json").write_text("{}")
    bpe = Tokenizer(models.BPE({"<|endoftext|>": 0, "a": 1}, []))
    (tmp_path / "bpe/tokenizer.json").write_text(bpe.to_str())
    (tmp_path / "a.txt").write_text("hello world\n" * 100)
    (tmp_path / "line.txt").write_text("one line")
    (tmp_path / "blank.txt").write_text("\n")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9\n")
    (tmp_path / "bad.jsonl").write_text('{"text": "a"}\n{"txt": "b"}\n')
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def type_in(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], object]:
    """Runs a command in the workplace, and returns its exit code."""
    # Nothing here is to be compiled: what tries to is told apart from a sentence.
    monkeypatch.setattr(jax.stages.Lowered, "compile", lambda *_: pytest.fail("it compiles"))

    def run(command: str) -> object:
        name, *words = shlex.split(command)
        monkeypatch.setattr(sys, "argv", [name, *words])
        with pytest.raises(SystemExit) as ended:
            PROGRAMS[name]()
        return ended.value.code

    return run


@pytest.mark.parametrize("command", MISTAKES)
def test_a_mistake_ends_in_one_sentence(command: str, type_in, workplace: Path, capsys):
    assert type_in(command) == 1
    said = capsys.readouterr().err.replace(f"{workplace}/", "")
    assert said.startswith(f"error: {MISTAKES[command]}") and said.count("\n") == 1
    assert not re.search(r"Traceback|Errno|Error:|None", said)
    assert not (workplace / "new").exists()


@pytest.mark.parametrize("command", MISSPELLED)
def test_a_misspelled_option_is_named(command: str, type_in, capsys):
    assert type_in(command) == 2
    said = capsys.readouterr().err
    assert MISSPELLED[command] in " ".join(said.split()) and "Traceback" not in said


def test_most_programs_have_their_mistakes():
    assert {command.split()[0] for command in MISTAKES} == PROGRAMS.keys()
    assert len(MISTAKES) + len(MISSPELLED) >= 60


# --- endings --------------------------------------------------------------------------------------


def raised_in(folder: str, code: str) -> Callable[[], object]:
    """A program whose error comes from a file of a folder of ours."""
    return lambda: exec(compile(code, str(ROOT / folder / "made_up.py"), "exec"), {})


@pytest.mark.parametrize("folder", ["examples", "benchmarks", "muon_jax"])
def test_what_we_say_is_told_from_what_went_wrong(folder: str, capsys):
    with pytest.raises(SystemExit, match="1"):
        run_program(raised_in(folder, "raise ValueError('--steps must be [red]positive')"))
    assert capsys.readouterr().err == "error: --steps must be [red]positive\n"
    for code in ("1 / 0", "int('x')", "a, b = 1, 2, 3", "raise KeyError('x')", "assert False"):
        with pytest.raises((ArithmeticError, ValueError, KeyError, AssertionError)):
            run_program(raised_in(folder, code))
    with pytest.raises(ValueError, match="theirs"):
        run_program(lambda: exec("raise ValueError('theirs')"))


def test_traceback_shows_all(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys, "argv", ["train", "--traceback", "--steps", "1"])
    with pytest.raises(ValueError, match="words"):
        run_program(raised_in("examples", "raise ValueError('words')"))
    assert sys.argv == ["train", "--steps", "1"]  # as the program reads it


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), 1, "No space left on device; make room"),
        (PermissionError(errno.EACCES, "Permission denied", "a/b"), 1, "a/b: Permission denied; "),
        (jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory\nx"), 1, "out of memory (O"),
        (MemoryError(), 1, "out of memory (on the host): take fewer or shorter texts at a time"),
        (KeyboardInterrupt(), 130, "stopped"),
    ],
    ids=repr,
)
def test_what_the_system_reports_is_a_sentence_too(
    error, code: int, words: str, capsys, monkeypatch
):
    def fail() -> None:
        raise error

    monkeypatch.setattr(os, "_exit", sys.exit)

    with pytest.raises(SystemExit) as ended:
        run_program(fail)
    assert ended.value.code == code
    said = capsys.readouterr().err
    assert said.removeprefix("error: ").startswith(words) and said.count("\n") == 1


def test_a_terminal_shows_the_words_in_a_frame(monkeypatch: pytest.MonkeyPatch):
    class Terminal(io.StringIO):
        encoding = "utf-8"

        def isatty(self) -> bool:
            return True

    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "60")
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    with pytest.raises(SystemExit, match="1"):
        run_program(raised_in("examples", f"raise ValueError('{'words ' * 20}')"))
    lines = re.sub(r"\x1b\[[0-9;]*m", "", terminal.getvalue()).splitlines()
    assert lines[0].startswith("╭─ error ") and "--traceback shows where" in lines[-1]
    assert len(lines) == 5 and all(len(line) == 60 for line in lines)


# --- help -----------------------------------------------------------------------------------------

LINES: list[CommandLine] = [
    importlib.import_module(module).COMMAND_LINE
    for module in (
        *(f"examples.moonlight.{name}" for name in ("train", "generate", "hf_export", "hf_check")),
        *("examples.moonlight.stages", "examples.finetune.sft", "examples.finetune.infer"),
        *("examples.finetune.export", "examples.finetune.study.__main__"),
        *("examples.scaling_law.__main__", "examples.moonlight.data.prepare.__main__"),
    )
]
of_each_program = pytest.mark.parametrize("line", LINES, ids=lambda line: line.module)


@of_each_program
def test_the_help_says_what_to_type(line: CommandLine, capsys, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit, match="0"):
        line.parse(["--help"])
    said = capsys.readouterr().out
    assert said.startswith(f"usage: {line.command} [-h]")
    assert not re.search(r"\(default: None|None[,}]|RECIPES", said) and "--traceback" in said
    code = [text for text in said.splitlines() if text.startswith("    ")]
    assert not [text for text in said.splitlines() if len(text) > 80 and text not in code]


@of_each_program
def test_three_examples_or_more_can_be_typed(line: CommandLine):
    code = str(line.text).replace("\\\n", " ")
    commands = re.findall(rf"^    .*?{re.escape(line.command)}(?=\s)(.*)$", code, re.M)
    assert len(commands) >= 3
    for words in commands:
        argv = shlex.split(re.split(r" {4,}(?=\w)", words)[0], comments=False)
        read = {"sft": sft.read, "infer": infer.read, "export": export.read}
        read.get(line.module.rpartition(".")[2], line.parse)(argv)


def test_the_help_shows_what_each_preset_trains_with(capsys):
    with pytest.raises(SystemExit, match="0"):
        train.COMMAND_LINE.parse(["--help"])
    said = capsys.readouterr().out
    table = said[said.index("what a preset trains with") :]
    for option in ("--learning-rate", "--batch-size", "--total-tokens", "--sequence-length"):
        assert re.search(rf"^ *{option} .*\d", table, re.M)
    assert re.search(r"parameters, at most .* 15\.96B", table)


def test_groups_begin_with_options_that_there_are():
    for line in LINES:
        assert line.groups.keys() <= line.args.__dataclass_fields__.keys()


def test_a_completion_is_of_a_command_that_it_makes(capsys):
    with pytest.raises(SystemExit):
        train.COMMAND_LINE.parse(["--tyro-print-completion", "bash"])
    said = capsys.readouterr().out
    command = f"alias moonlight-train='{sys.executable} -m examples.moonlight.train'"
    assert command in said and re.search(r"^complete .* moonlight-train$", said, re.M)


# What a shell is asked once it has evaluated the script, and what it answers.
ASKED = {
    ("zsh", "-f"): (
        "whence -w moonlight-train; print $_comps[moonlight-train]",
        "moonlight-train: function\n_tyro_moonlight_train",
    ),
    ("fish",): ("complete --do-complete 'moonlight-train --preset '", "small"),
}


@pytest.mark.parametrize("shell", ASKED, ids=lambda shell: shell[0])
def test_other_shells_complete_it_too(shell, capsys):
    with pytest.raises(SystemExit):
        train.COMMAND_LINE.parse(["--tyro-print-completion", shell[0]])
    script = capsys.readouterr().out
    assert '\n_tyro_moonlight_train "$@"' not in script  # else it runs before there is a word
    if shutil.which(shell[0]) is None:
        pytest.skip(f"{shell[0]} is not installed")
    asks, answer = ASKED[shell]
    ran = subprocess.run(
        shell, input=f"{script}\n{asks}\n", capture_output=True, text=True, check=True
    )
    assert not ran.stderr and answer in ran.stdout


def test_a_shell_without_completion_is_refused(capsys):
    with pytest.raises(SystemExit, match="takes bash, fish or zsh, got csh"):
        train.COMMAND_LINE.parse(["--tyro-print-completion", "csh"])
