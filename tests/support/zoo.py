"""Random models and rollouts that many tests use for training."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path

from tests.reference import dense
from tests.reference.tiny_models import make_model, make_qwen2, make_rollouts, make_tokenizer, read_jsonl, write_jsonl

TOKENS = 61  # in the tokenizer; the models have more columns
FAMILIES = ("mistral", "ministral", "seed_oss", "smollm3", "phi3", "granite", "olmo2", "olmo3", "gemma3")

MIXTURES = ("glm4_moe",)


@dataclass(frozen=True)
class Zoo:
    """Random models by name in `folder`, and rollouts on them.

    Students: `untied` (67 columns: an odd number, and not the tokenizer's), `tied` (66), `one_kv_head`, `deep` (8 layers
        instead
    of 4), and `no_tokenizer`, which is `untied` without a tokenizer, so that the smaller model's columns are the vocabulary.
    Teachers: `teacher` (80 columns, another width and depth) and `teacher_no_tokenizer`. Both: one model of each family in the
    dense `FAMILIES`.
    """

    folder: Path

    def model(self, name: str) -> Path:
        return self.folder / name

    def rollouts(self, name: str) -> Path:
        """A rollout file: `uneven` (3 groups of 4, lengths 1 to 17), `exact_mu` (the same, with exact sampler log-probs: those
        of the other files are noisy), `two` (one group of 2), `one`, `long_prompts` (one group of 2, responses of 1 and 2
        tokens after prompts of 40), `all_correct` (every reward and verdict the same, so that GRPO and a response mask leave
        nothing), `privileged` (`uneven`, with longer prompts for the teacher), `given` (6 responses that ended by themselves,
        some of them correct)."""
        return self.folder / f"{name}.jsonl"

    def rows(self, name: str) -> list[dense.Row]:
        return _rows(self.rollouts(name))

    def vocab_size(self, student: str) -> int:
        return 67 if student == "no_tokenizer" else TOKENS

    def reference(
        self, student: str, teacher: str | None, rollouts: str, settings: dense.Settings, given: str | None = None
    ) -> dense.Result:
        """The dense reference's result, computed once; `given` names a file of given responses to add to the sampled ones."""
        teacher_path = None if teacher is None else self.model(teacher)
        given_path = None if given is None else self.rollouts(given)
        return _reference(self.model(student), teacher_path, self.rollouts(rollouts), settings, given_path)


@cache
def _rows(path: Path) -> list[dense.Row]:
    return read_jsonl(path)


@cache
def _reference(
    student: Path, teacher: Path | None, rollouts: Path, settings: dense.Settings, given: Path | None
) -> dense.Result:
    beside = [] if given is None else [{**row, "given": True} for row in _rows(given)]
    return dense.kdrl(student, teacher, [*_rows(rollouts), *beside], settings)


def _longer(row: dense.Row) -> list[int]:
    """A prompt with more information: other tokens before the same ones, a different number of them for each group."""
    return [*range(3, 6 + 4 * row["group_id"]), *row["prompt_token_ids"]]


def make_zoo(folder: Path) -> Zoo:
    """Write all models and rollouts into `folder`."""
    shapes = {
        "untied": {"seed": 1},
        "no_tokenizer": {"seed": 1},
        "tied": {"seed": 3, "tied": True, "vocab_size": 66},
        "one_kv_head": {"seed": 4, "num_kv_heads": 1},
        "deep": {"seed": 6, "num_layers": 8},
        "teacher": {"seed": 2, "vocab_size": 80, "hidden_size": 48, "num_layers": 2},
        "teacher_no_tokenizer": {"seed": 2, "vocab_size": 80, "hidden_size": 48, "num_layers": 2},
    }
    for name, shape in shapes.items():
        make_qwen2(folder / name, **shape)  # type: ignore[arg-type]
        if "no_tokenizer" not in name:
            assert make_tokenizer(folder / name) == TOKENS
    for name in (*FAMILIES, *MIXTURES):
        make_model(name, folder / name, seed=7)
        assert make_tokenizer(folder / name) == TOKENS
    batches: dict[str, dict[str, object]] = {
        "uneven": {},
        "exact_mu": {"noise": 0.0},
        "two": {"num_groups": 1, "group_size": 2},
        "one": {"num_groups": 1, "group_size": 1, "correct": [False], "max_response_tokens": 9},
        "long_prompts": {"num_groups": 1, "group_size": 2, "max_response_tokens": 2, "prompt_tokens": 40},
        "all_correct": {"num_groups": 2, "group_size": 3, "correct": [True] * 6},
        "given": {"num_groups": 3, "group_size": 2},
    }
    for name, shape in batches.items():
        # The noise makes the rollouts off-policy: importance weights are not 1.
        shape = {"noise": 0.2, **shape}
        rows = make_rollouts(folder / "untied", seed=5, vocab_size=TOKENS, **shape)  # type: ignore[arg-type]
        if name == "given":
            rows = [{**row, "finish_reason": "stop"} for row in rows]
        write_jsonl(folder / f"{name}.jsonl", rows)
        if name == "uneven":
            write_jsonl(folder / "privileged.jsonl", [{**row, "teacher_prompts": {"teacher": _longer(row)}} for row in rows])
    return Zoo(folder)
