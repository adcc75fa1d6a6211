"""Metrics survive a crash and a resume, the display never garbles a log file, and each alert fires only on its signature."""

from __future__ import annotations

import io
import json
import math
import random
from pathlib import Path

import pytest
from rich.console import Console

from kdrl_mcore.config import load_config, load_saved, save_config
from kdrl_mcore.errors import DataError
from kdrl_mcore.monitoring import progress as progress_module
from kdrl_mcore.monitoring.alerts import (
    DEFAULT_THRESHOLDS,
    WATCHED,
    Alert,
    AlertThresholds,
    AlertWatch,
    GrowingHistory,
    check_alerts,
)
from kdrl_mcore.monitoring.clock import Clock
from kdrl_mcore.monitoring.drift import alert_thresholds, check_drift
from kdrl_mcore.monitoring.metrics import METRICS_FILE, MetricsLog, read_metrics
from kdrl_mcore.monitoring.progress import Progress, key_numbers
from kdrl_mcore.studies.study import read_config


def lines(run_dir: Path) -> list[str]:
    return (run_dir / METRICS_FILE).read_text().splitlines()


def test_each_write_is_one_json_line_on_disk_at_once(tmp_path: Path) -> None:
    with MetricsLog(tmp_path) as log:
        log.write(1, {"reward": 0.5})
        assert [json.loads(line) for line in lines(tmp_path)] == [{"step": 1, "reward": 0.5}]


def test_nan_and_infinity_keep_the_file_valid_json_and_come_back(tmp_path: Path) -> None:
    with MetricsLog(tmp_path) as log:
        log.write(1, {"loss": math.nan, "kl": math.inf, "reward": -math.inf})

    def refuse(constant: str) -> float:
        raise AssertionError(f"{constant} is not JSON")

    json.loads(lines(tmp_path)[0], parse_constant=refuse)
    (row,) = read_metrics(tmp_path)
    assert math.isnan(row["loss"]) and row["kl"] == math.inf and row["reward"] == -math.inf


def test_lines_of_one_step_are_merged_and_steps_sorted(tmp_path: Path) -> None:
    with MetricsLog(tmp_path) as log:
        log.write(2, {"reward": 0.2})
        log.write(1, {"reward": 0.1})
        log.write(2, {"eval/accuracy": 0.9})
    assert read_metrics(tmp_path) == [{"step": 1, "reward": 0.1}, {"step": 2, "reward": 0.2, "eval/accuracy": 0.9}]


def test_a_resumed_run_has_each_step_once(tmp_path: Path) -> None:
    with MetricsLog(tmp_path) as log:
        for step in (1, 2, 3, 4):
            log.write(step, {"reward": step / 10})
    with (tmp_path / METRICS_FILE).open("a") as file:
        file.write('{"step": 5, "rew')  # the run was killed while it wrote
    with MetricsLog(tmp_path) as log:
        log.truncate_after(2)
        for step in (3, 4):
            log.write(step, {"reward": step / 100})
    assert [(row["step"], row["reward"]) for row in read_metrics(tmp_path)] == [(1, 0.1), (2, 0.2), (3, 0.03), (4, 0.04)]
    assert len(lines(tmp_path)) == 4


def test_a_line_still_being_written_is_left_out(tmp_path: Path) -> None:
    (tmp_path / METRICS_FILE).write_text('{"step": 1, "reward": 1}\n{"step": 2, "re')
    assert read_metrics(tmp_path) == [{"step": 1, "reward": 1}]


@pytest.mark.parametrize(
    "bad", ["not json", '{"reward": 1}', "[1]", '{"step": 1, "reward": "high"}', '{"step": 1, "reward": null}']
)
def test_a_damaged_line_is_named(tmp_path: Path, bad: str) -> None:
    (tmp_path / METRICS_FILE).write_text('{"step": 1, "reward": 1}\n' + bad + "\n")
    with pytest.raises(DataError, match="line 2"):
        read_metrics(tmp_path)


def test_a_run_without_metrics_is_an_error_that_names_it(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=METRICS_FILE):
        read_metrics(tmp_path)
    (tmp_path / METRICS_FILE).touch()
    with pytest.raises(DataError, match="no metrics yet"):
        read_metrics(tmp_path)


STEP = {
    "accuracy": 0.5,
    "reward": 0.5,
    "kl": 0.01,
    "beta": 2e-3,
    "response_length": 41.0,
    "loss": 0.1,
    "tokens": 900,
    "time/step": 0.5,
}


class Terminal(io.StringIO):
    """A stream that claims to be a terminal."""

    def isatty(self) -> bool:
        return True


def show(stream: io.StringIO, steps: int, enabled: bool = True, first_step: int = 0, width: int = 200) -> str:
    console = Console(file=stream, force_terminal=stream.isatty(), width=width, highlight=False)
    progress = Progress(steps, enabled=enabled, console=console)
    progress.start(first_step)
    for step in range(first_step + 1, steps + 1):
        progress.phase("rollout")
        progress.update(step, STEP)
    progress.message("saved [checkpoint]")
    progress.close()
    return stream.getvalue()


def test_a_log_file_gets_plain_lines_with_the_key_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setattr(progress_module, "MIN_SECONDS_BETWEEN_LINES", 0.0)
    text = show(io.StringIO(), steps=3)
    assert "\x1b" not in text and "\r" not in text
    first, second, third, message = text.splitlines()
    assert first.startswith("step 1/3") and second.startswith("step 2/3") and third.startswith("step 3/3")
    for part in ("accuracy 50.0%", "KL 0.0100", "beta 0.002", "length 41.0", "loss 0.1000", "1800 tokens/s", "left"):
        assert part in first
    assert message == "saved [checkpoint]"


def test_nothing_is_cut_off_at_the_width_of_a_terminal_or_a_log_file() -> None:
    assert "1800 tokens/s" in show(Terminal(), steps=2, width=80)
    assert "1800 tokens/s  0 s left" in show(io.StringIO(), steps=2, width=80).splitlines()[-2]


def test_the_clock_tells_each_phase_when_it_begins_and_adds_up_its_time() -> None:
    begun: list[str] = []
    clock = Clock(begun.append)
    for phase in ("rollout", "train", "rollout"):
        with clock(phase):
            assert begun[-1] == phase
    assert begun == ["rollout", "train", "rollout"] and set(clock.seconds) == {"rollout", "train"}
    assert 0 < sum(clock.seconds.values()) <= clock.total


def test_fast_steps_do_not_flood_a_log_file_but_the_last_one_is_shown() -> None:
    shown = [line.split()[1] for line in show(io.StringIO(), steps=500).splitlines() if line.startswith("step")]
    assert shown[0] == "1/500" and shown[-1] == "500/500" and len(shown) < 50


def test_an_evaluation_is_always_shown() -> None:
    stream = io.StringIO()
    progress = Progress(9, console=Console(file=stream, force_terminal=False, width=200))
    progress.start()
    for step in (1, 2, 3):
        progress.update(step, {"eval/accuracy": step / 10})
    shown = [line.split("  ")[:2] for line in stream.getvalue().splitlines()]
    assert shown == [["step 1/9", "held-out 10.0%"], ["step 2/9", "held-out 20.0%"], ["step 3/9", "held-out 30.0%"]]


def test_a_terminal_gets_a_live_display() -> None:
    text = show(Terminal(), steps=3, first_step=1)
    assert "\x1b[" in text and "3/3" in text and "rollout" in text and "KL 0.0100" in text and "saved [checkpoint]" in text


def test_switched_off_only_messages_are_shown() -> None:
    assert show(io.StringIO(), steps=3, enabled=False) == "saved [checkpoint]\n"
    assert "step" not in show(Terminal(), steps=3, enabled=False)


def test_numbers_a_step_does_not_have_are_not_shown() -> None:
    assert key_numbers({"loss": 1.0}) == "loss 1.0000"


def history(late: dict[str, float] | None = None, steps: int = 20) -> list[dict[str, float]]:
    """A healthy run whose second half shows `late` instead."""
    healthy = {
        "reward": 0.5,
        "accuracy": 0.5,
        "response_length": 40.0,
        "truncated": 0.0,
        "entropy": 0.5,
        "kl": 0.05,
        "drift_mean": 1e-6,
        "drift_max": 1e-5,
        "correction_ess": 0.9,
        "kd_importance_ess": 0.9,
        "taught_share": 0.5,
        "mixed_share": 0.5,
        "clip_share": 0.1,
        "signal_share": 0.5,
    }
    return [healthy | ((late or {}) if step >= steps // 2 else {}) for step in range(steps)]


SIGNATURES: dict[str, dict[str, float]] = {
    "reward_collapse": {"reward": 0.1},
    "length_explosion": {"response_length": 70.0, "truncated": 0.4},
    "entropy_collapse": {"entropy": 0.01},
    "kl_blow_up": {"kl": 0.3},
    "sampler_drift": {"drift_mean": 0.2},
    "few_effective_tokens": {"kd_importance_ess": 0.1},
    "nothing_taught": {"taught_share": 0.001},
    "one_sided_mixture": {"mixed_share": 0.995},
    "mostly_clipped": {"clip_share": 0.6},
    "few_signals": {"signal_share": 0.05},
}


@pytest.mark.parametrize("name", SIGNATURES)
def test_each_signature_raises_its_alert_and_no_other(name: str) -> None:
    (alert,) = check_alerts(history(SIGNATURES[name]))
    assert alert.name == name and len(alert.message) > 20 and "\n" not in alert.message


@pytest.mark.parametrize(
    "late",
    [
        {},
        {"reward": 0.9, "accuracy": 0.9},
        {"response_length": 70.0},  # longer, but it finishes
        {"entropy": 0.01, "accuracy": 0.99, "reward": 0.99},  # solved
        {"kl": 0.099},
        {"reward": math.nan, "kl": math.nan, "loss": math.inf},
    ],
)
def test_healthy_runs_raise_nothing(late: dict[str, float]) -> None:
    assert check_alerts(history(late)) == []


def test_one_token_far_off_is_sampler_drift() -> None:
    assert [alert.name for alert in check_alerts(history({"drift_max": 3.0}))] == ["sampler_drift"]


KINDS: dict[str, tuple[list[str], set[str]]] = {
    "kdrl": (["teacher.path=t"], set(SIGNATURES)),
    "grpo": (["objective=grpo"], set(SIGNATURES) - {"kl_blow_up", "nothing_taught", "one_sided_mixture"}),
    "distillation alone": (
        ["objective=kd_rkl", "teacher.path=t"],
        set(SIGNATURES) - {"reward_collapse", "entropy_collapse", "mostly_clipped", "few_signals"},
    ),
    "replayed": (
        ["rollout=replay", "rollout.path=r", "teacher.path=t"],
        {
            *("kl_blow_up", "sampler_drift", "few_effective_tokens", "nothing_taught", "one_sided_mixture"),
            "mostly_clipped",
        },
    ),
    "supervised": (["objective=sft"], set()),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_has_the_alerts_that_can_apply_to_it(kind: str, tmp_path: Path) -> None:
    overrides, expected = KINDS[kind]
    config = load_config([*overrides, "batch.updates_per_step=2"])
    thresholds = alert_thresholds(config)
    assert {alert.name for late in SIGNATURES.values() for alert in check_alerts(history(late), thresholds)} == expected
    save_config(config, tmp_path / "config.yaml")
    saved = read_config(tmp_path)
    assert alert_thresholds(load_saved(saved)) == thresholds
    other = {"model.old_key": 1, "trainer.steps": "many", "eval.every": "${no.such}", "data.sources": [{"x": 1}]}
    assert alert_thresholds(load_saved(saved | other)) == thresholds  # from another version


def test_a_number_too_large_to_add_up_counts_as_infinite(tmp_path: Path) -> None:
    """A user's reward may be such a number. The run continues, and the alerts are those of the other steps."""
    watch = AlertWatch()
    with MetricsLog(tmp_path) as log:
        for step in range(1, 30):
            row = {"reward": 1e308 if step in (12, 13) else 0.5, "kl": -1e200 if step == 4 else 0.01}
            assert watch.observe(row) == []
            log.write(step, row)
    rewards = [row["reward"] for row in read_metrics(tmp_path)]
    assert rewards[11] == rewards[12] == math.inf and rewards[13] == 0.5


def test_what_an_alert_advises_is_there_to_be_changed() -> None:
    grpo = alert_thresholds(load_config(["objective=grpo"]))
    for name in ("reward_collapse", "length_explosion"):
        (alert,) = check_alerts(history(SIGNATURES[name]), grpo)
        assert ("beta" not in alert.message and "optimizer.lr" in alert.message) or "max_response_tokens" in alert.message


@pytest.mark.parametrize("more", [[], ["rollout=vllm"], ["rollout.top_p=0.9"], ["batch.updates_per_step=4"]])
def test_in_bfloat16_the_mean_of_tokens_tells_of_drift_as_in_the_check_of_each_step(more: list[str]) -> None:
    config = load_config(["objective=grpo", "model.dtype=bfloat16", *more])
    far = history({"drift_max": 3.0, "drift_mean": 0.02})
    assert check_alerts(far, alert_thresholds(config)) == []
    check_drift(config, 1, far[-1])
    assert [alert.name for alert in check_alerts(history({"drift_mean": 0.06}), alert_thresholds(config))] == ["sampler_drift"]
    given = load_config(["objective=grpo", "model.dtype=bfloat16", "rollout.max_log_prob_drift=0.3", *more])
    assert check_alerts(far, alert_thresholds(given)) != []  # a user who sets a limit for a token is alerted


def test_too_few_steps_raise_nothing() -> None:
    assert check_alerts(history({"reward": 0.0}, steps=9)) == []
    assert check_alerts([]) == []


def test_thresholds_can_be_set() -> None:
    assert check_alerts(history({"reward": 0.1}), AlertThresholds(reward_ratio=0.1)) == []


def test_a_watch_reports_a_signature_once_until_it_clears() -> None:
    watch = AlertWatch()
    seen: list[Alert] = []
    for metrics in [*history({"reward": 0.0}), *history(), *history({"reward": 0.0})]:
        seen += watch.observe(metrics)
    assert [alert.name for alert in seen] == ["reward_collapse", "reward_collapse"]


def test_a_growing_history_shows_what_the_whole_one_does() -> None:
    generator = random.Random(4)
    rows = [{name: generator.choice([math.nan, 0.01, 0.5, 2.0, 70.0]) for name in WATCHED} for _ in range(60)]
    rows = [{name: value for name, value in row.items() if generator.random() < 0.9} for row in rows]
    rows = [
        {**row, "entropy": 0.9**step, "taught_share": 0.9**step, "signal_share": 0.9**step} for step, row in enumerate(rows)
    ]
    grown = GrowingHistory(DEFAULT_THRESHOLDS.window)
    seen = set[str]()
    for end, row in enumerate(rows, start=1):
        grown.append(row)
        alerts = check_alerts(grown)
        assert alerts == check_alerts(rows[:end]) and len(grown) == end and grown[-1] is row
        seen.update(alert.name for alert in alerts)
    assert seen == set(SIGNATURES)  # the draws are varied enough for all alerts


def test_a_watch_that_goes_on_from_its_state_says_what_it_would_have_said() -> None:
    steps = [*history({"reward": math.nan, "kl": 0.5}), *history({"reward": 0.0}), *history()]
    whole, parts = AlertWatch(), AlertWatch()
    for metrics in steps:
        expected = whole.observe(metrics)
        state = json.loads(json.dumps(parts.state_dict(), allow_nan=False))
        parts = AlertWatch()
        parts.load_state_dict(state)
        assert parts.observe(metrics) == expected
