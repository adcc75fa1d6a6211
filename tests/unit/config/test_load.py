"""What the command line and the user's files may contain, and the one line that says what is wrong with them."""

from __future__ import annotations

import shlex
import subprocess
from pathlib import Path

import pytest

from kdrl_mcore.config import Config, load_config, override, save_config
from kdrl_mcore.errors import ConfigError

GRPO = "objective=grpo"


def refused(*arguments: str) -> str:
    with pytest.raises(ConfigError) as error:
        load_config([GRPO, *arguments])
    assert "\n" not in str(error.value)
    return str(error.value)


TEXTS = [
    "{prompt}",
    "Q: {prompt}",
    "~/runs/x",
    "a=b",
    "It's {prompt}",
    'say "{prompt}"',
    'ends with \\"',
    "数学 🚀 “π”",
    "[INST] {prompt} [/INST]",
    "<|im_start|>user {prompt}",
    "#1: {prompt}!",
    "a, b and {prompt}",
    "two\nlines\tand {prompt}",
    "(x) -> {prompt}",
]


@pytest.mark.parametrize("text", TEXTS)
def test_a_value_that_does_not_parse_is_named_with_the_word_to_write(text: str) -> None:
    line = refused(f"data.plain_template={text}")
    assert line.startswith("data.plain_template=") and "quote it within the shell's quotes" in line
    advice = line[line.rindex("shell's quotes, ") + len("shell's quotes, ") :].split("; the shell does not")[0]
    word = subprocess.run(["bash", "-c", f"printf %s {advice}"], capture_output=True, text=True, check=True).stdout
    assert load_config([GRPO, word]).data.plain_template == text


@pytest.mark.parametrize("path", ["runs/läufe", "/home/jörg/Наш запуск", "数学_1", "./é/x-1.0@main"])
def test_letters_beyond_ascii_need_no_quotes(path: str) -> None:
    config = load_config([GRPO, f"run.dir={path}", f"+data.train={path}.jsonl"])
    assert (config.run.dir, config.data.train) == (path, f"{path}.jsonl")
    assert "no such objective" in refused("objective=grpö")


OTHERS = ["back\\slash\\", "'quoted {prompt}'", "", "null", "1e-3", "@file", "a,b", "$HOME", "\\", '\\"', "\\'"]


@pytest.mark.parametrize("text", ["2026.10", "1e5", "007", "1_0", "true", "NaN", "-1"])
def test_a_text_that_looks_like_a_number_stays_as_it_is_written(text: str) -> None:
    config = load_config([GRPO, f"run.dir={text}", f"student.path= {text}"])
    assert config.run.dir == config.student.path == text


@pytest.mark.parametrize("text", [*TEXTS, *OTHERS])
def test_override_gives_a_key_any_text(text: str) -> None:
    assert load_config([GRPO, override("cluster.name", text)]).cluster.name == text
    assert shlex.split(shlex.quote(override("cluster.name", text))) == [override("cluster.name", text)]


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("+optimizer.learning_rate=1e-1", "unknown configuration key 'optimizer.learning_rate'; did you mean 'optimizer.lr'?"),
        ("++optimizer.learning_rate=1e-1", "did you mean 'optimizer.lr'?"),
        ("++objective.kd.masks=group", "did you mean 'objective.kd.mask'?"),
        ("+rollout.vllm.tensors=2", "did you mean 'rollout.vllm.tensor'?"),
        ("+lr=1", "did you mean 'optimizer.lr'?"),
        ("optimizer={learning_rate: 1}", "unknown configuration key 'optimizer.learning_rate'"),
        ("objective.kd={masks: group}", "unknown configuration key 'objective.kd.masks'; did you mean 'objective.kd.mask'?"),
        ("reward.terms=[{kind: format, wieght: 1}]", "'wieght'"),
        ("pairs=small", "the folder of a group of your own with --config-dir"),
        ("objective=null", "objective=null: objective needs a choice; there are: cispo, dapo"),
        ("rollout=null", "there are: megatron, replay, vllm"),
        ("reward=", "reward needs a choice"),
        ("objective=grop", "no such objective; there are: cispo, dapo,"),
        ("~objective", "nothing can be left out"),
        ("~optimizer.lr", "nothing can be left out"),
        ("+objective@optimizer=grpo", "unknown configuration key"),
        ("optimizer=adam", "'optimizer' is a section"),
        ("optimizer=null", "'optimizer' is a section"),
        ("run.dir=", "run.dir is empty"),
        ("run.dir=null", "run.dir=null: this key needs a value"),
        ("data.prompt_key=''", "data.prompt_key is empty"),
        ("student.path=", "student.path is empty"),
        ("optimizer.lr=fast", "optimizer.lr=fast: "),
        ("optimizer.lr=1e-3,2e-3", "kdrl-study"),
        ("eval.benchmarks=aime24", "write 'eval.benchmarks=[aime24]'"),
        ("data.plain_template={prompt: x}", "this key takes a string"),
        ("student.path=${nowhere}", "student.path"),
        ("data.plain_template='${{x}} {prompt}'", "write \\${"),
        ("hydra.run.dir=x", "only hydra.searchpath"),
        ("hydra.searchpath=[nowhere]", "hydra.searchpath: nowhere is not a folder"),
        ("--configs=x", "not an option"),
        ("prompt}", "'prompt}' is not an override"),
        ("=4", "'=4' is not an override"),
        ("data={split: 2026.10}", "data={split: 2026.10}: this key takes a text: write it in quotes"),
        ("parallel.virtual_pipeline=2", "needs parallel.pipeline > 1"),
        ("rollout.vllm.servers=[host:99999]", "is not"),
        ("optimizer.schedule=linear optimizer.min_lr=1", "optimizer.min_lr=1, where a linear schedule ends, is above"),
        ("batch.updates_per_step=17", "batch.updates_per_step=17 is more than rollout.prompts_per_step=16"),
        ("reward.threshold=2", "scores of math_verify lie between 0 and 1"),
        ("eval.benchmarks=[[aime24]]", "eval.benchmarks[0]: Cannot convert ['aime24'] to str"),
        ("trainer.profile.ranks=[[1]]", "trainer.profile.ranks[0]: Cannot convert [1] to int"),
        ("model.dtype=bfloat", "did you mean 'bfloat16'?"),
    ],
)
def test_one_line_says_what_is_wrong(word: str, expected: str) -> None:
    words = word.split() if word.startswith("optimizer.schedule") else [word]
    if "servers" in word:
        words += ["rollout=vllm", "rollout.vllm.placement=server"]
    assert expected in refused(*words)


def test_choices_that_may_be_left_out_and_those_of_the_command_line_twice() -> None:
    base = load_config([GRPO])
    assert load_config([GRPO, "prompt=null", "cluster=null", "experiment=null"]) == base
    assert load_config(["objective=sft", GRPO, "+optimizer.lr=1e-6"]) == base  # the last one counts
    assert load_config([GRPO, "prompt=zero_rl", "data={split: dev}"]).data.split == "dev"


def test_a_template_from_a_file_is_taken_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "a prompt.txt").write_text("Q: {prompt}\nuse ${x}, \\boxed{} and \\n\n")
    config = load_config([GRPO, override("data.plain_template", f"@{tmp_path}/a prompt.txt"), 'data.system_prompt="@@you"'])
    assert config.data.plain_template == "Q: {prompt}\nuse ${x}, \\boxed{} and \\n\n" and config.data.system_prompt == "@you"
    save_config(config, tmp_path / "config.yaml")
    (tmp_path / "a prompt.txt").unlink()
    assert load_config(["--config", str(tmp_path / "config.yaml")]) == config
    (tmp_path / "from_windows.txt").write_bytes(b"\xef\xbb\xbfQ: {prompt}\r\n")
    config = load_config([GRPO, f"data.plain_template=@{tmp_path}/from_windows.txt"])
    assert config.data.plain_template == "Q: {prompt}\n"
    assert "nowhere cannot be read (No such file" in refused("data.message_template=@nowhere")


def test_homes_are_found_in_paths(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    config = load_config([GRPO, 'run.dir="~/runs/x"', 'student.path="~/models/a"', 'data.system_prompt="~/x"'])
    assert (config.run.dir, config.student.path, config.data.system_prompt) == ("/home/me/runs/x", "/home/me/models/a", "~/x")


@pytest.mark.parametrize(
    "overrides", [["experiment=tiny_logic"], ["experiment=kdrl_32b", "cluster=h100", "reward.terms=[{kind: format}]"]]
)
def test_a_runs_configuration_gives_the_same_one(overrides: list[str], tmp_path: Path) -> None:
    config = load_config(overrides)
    save_config(config, tmp_path / "config.yaml")
    assert load_config(["--config", str(tmp_path / "config.yaml")]) == config
    changed = load_config([f"--config={tmp_path}/config.yaml", "optimizer.lr=0.5"])
    assert changed.optimizer.lr == 0.5 and changed.rollout == config.rollout


def test_a_choice_over_a_file_leaves_nothing_of_the_one_before(tmp_path: Path) -> None:
    file = str(tmp_path / "config.yaml")
    config = load_config(
        ["experiment=tiny_cpu", "objective=kdrl_annealing", "rollout=vllm", "objective.kd.denominator=unmasked"]
    )
    save_config(config, tmp_path / "config.yaml")
    other = load_config(["--config", file, "objective=kdrl_response_mask"])
    expected = load_config(
        ["experiment=tiny_cpu", "objective=kdrl_response_mask", "rollout=vllm", "objective.kd.denominator=unmasked"]
    )
    assert other == expected
    assert load_config(["--config", file, "rollout=megatron"]).objective.sampler_correction.kind == "none"
    assert "stands for an experiment" in refused("--config", file, "experiment=tiny_cpu")


def test_a_file_of_keys(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"

    def written(text: str, *others: str) -> Config:
        file.write_text(text)
        return load_config(["--config", str(file), *others])

    assert written("optimizer: {lr: 1e-2}\nobjective: {beta: {init: 0}}\n").optimizer.lr == 1e-2
    config = written("defaults: [{experiment: tiny_cpu}, {override /objective: grpo}, _self_]\ntrainer: {steps: 3}\n")
    assert config == load_config(["experiment=tiny_cpu", GRPO, "trainer.steps=3"])
    assert written("experiment: tiny_cpu\nobjective: grpo\ntrainer: {steps: 3}\n") == config
    assert written("objective: sft\n", GRPO).objective == load_config([GRPO]).objective


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("optimizer: {learning_rate: 1}", "unknown configuration key 'optimizer.learning_rate'; did you mean 'optimizer.lr'?"),
        ("optimizer:", "'optimizer' is a section"),
        ("optimizer: {lr: .nan}", "optimizer.lr=nan must be"),
        ("trainer: {steps: 1e400}", "trainer.steps"),
        ("run: {dir: 2026.10}", "mine.yaml: run.dir=2026.1: this key takes a text: write it in quotes"),
        ("- a", "holds no keys"),
        ("a: [", "is not YAML"),
        ("defaults: [{experiments: a}]", "there is no group 'experiments'; did you mean 'experiment'?"),
        ("experiment: tiny", "no such experiment; there are: kdrl_32b"),
    ],
)
def test_a_file_of_keys_with_a_mistake(text: str, expected: str, tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(text)
    assert expected in refused("--config", str(tmp_path / "mine.yaml"))


def test_files_and_folders_that_are_not_there(tmp_path: Path) -> None:
    assert "nowhere.yaml is not a file" in refused("--config", "nowhere.yaml")
    assert "--config needs a file" in refused("--config")
    assert "--config-dir needs a folder" in refused("--config-dir")
    assert "is not a folder" in refused("--config-dir", "nowhere")
    assert "holds no choices" in refused("--config-dir", str(tmp_path))


@pytest.fixture
def own(tmp_path: Path) -> Path:
    """A folder with an experiment, a pair, a reward and a new group, whose name needs quotes."""
    folder = tmp_path / "it's my=own, é"
    files = {
        "experiment/first.yaml": "# @package _global_\ndefaults:\n  - override /objective: grpo\noptimizer: {lr: 7e-4}\n",
        "experiment/wrong.yaml": "# @package _global_\noptimizer: {learning_rate: 1}\n",
        "experiment/range.yaml": "# @package _global_\noptimizer: {lr: -1}\n",
        "experiment/text.yaml": "# @package _global_\noptimizer: {lr: fast}\n",
        "experiment/yaml.yaml": "# @package _global_\noptimizer: {lr: [1}\n",
        "pair/small.yaml": "# @package _global_\nstudent: {path: s}\nteacher: {path: t}\n",
        "pair/headless.yaml": "student: {path: s}\n",
        "reward/mine.yaml": "kind: mine:score\nthreshold: 3\n",
    }
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


def test_choices_of_ones_own_stand_beside_the_packages(own: Path) -> None:
    config = load_config(["--config-dir", str(own), "experiment=first", "pair=small", "reward=mine", "trainer.steps=3"])
    assert (config.optimizer.lr, config.objective.beta.init, config.trainer.steps) == (7e-4, 0.0, 3)
    assert (config.student.path, config.teacher.path, config.reward.kind) == ("s", "t", "mine:score")
    searched = override("hydra.searchpath", f"file://{own}").replace("=", "=[", 1) + "]"
    assert load_config([searched, "experiment=first"]).optimizer.lr == 7e-4


def test_choices_of_ones_own_folder_count_over_a_file_of_keys(own: Path, tmp_path: Path) -> None:
    (tmp_path / "keys.yaml").write_text("student: {path: from_file}\nreward: {threshold: 0.25}\ntrainer: {steps: 3}\n")
    words = ["--config", str(tmp_path / "keys.yaml"), "--config-dir", str(own), "teacher.path=t"]
    alone, chosen = load_config(words), load_config([*words, "pair=small", "reward=mine"])
    plain = load_config(["--config-dir", str(own), "pair=small", "reward=mine"])
    assert alone.student.path == "from_file" and chosen.trainer.steps == 3
    assert (chosen.student.path, chosen.reward.kind) == (plain.student.path, plain.reward.kind)
    assert chosen.reward.kind != alone.reward.kind


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("experiment=frist", "there are: first, range, text, wrong, yaml, kdrl_32b"),
        ("pair=smal", "no such pair; there are: headless, small; did you mean 'small'?"),
        ("optimizer.lr=fast", "optimizer.lr=fast: "),
        ("optimizer.lrr=1", "did you mean 'optimizer.lr'?"),
        ("experiment=wrong", "unknown configuration key 'optimizer.learning_rate'; did you mean 'optimizer.lr'?"),
        ("experiment=range", "optimizer.lr=-1 must be at least 0"),
        ("experiment=text", "optimizer.lr"),
        ("experiment=yaml", "yaml.yaml"),
        ("pair=headless", "begins with the line '# @package _global_'"),
    ],
)
def test_a_mistake_beside_ones_own_folder_is_told_as_without(word: str, expected: str, own: Path) -> None:
    assert expected in refused("--config-dir", str(own), word)


def test_a_name_that_is_taken_is_refused(own: Path) -> None:
    (own / "experiment" / "tiny_cpu.yaml").write_text("# @package _global_\n")
    assert "experiment=tiny_cpu already exists" in refused("--config-dir", str(own))
