"""The objective's axes: presets load, and values that contradict each other or have no effect are refused in one line that
names them."""

from __future__ import annotations

import pytest

from kdrl_mcore.config import conf_dir, load_config
from kdrl_mcore.config.derived import needs_scores, needs_teacher_scores, uses_reference, uses_teacher
from kdrl_mcore.errors import ConfigError

PRESETS = sorted(path.stem for path in (conf_dir() / "objective").glob("*.yaml"))
COMBINE, KD, GIVEN = "objective.combine", "objective.kd", "rollout.given"
REPLAY = "rollout=replay rollout.path=r"


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_can_be_trained_with(preset: str) -> None:
    config = load_config([f"objective={preset}", "student.path=s", "teacher.path=t"])
    text = (conf_dir() / "objective" / f"{preset}.yaml").read_text()
    assert preset == "sft" or text.startswith("# ")  # says what it is, and how it differs from the paper
    assert uses_teacher(config.objective) or config.objective.beta.init == 0


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        (f"objective=grpo {COMBINE}.kind=gate", "objective.beta is never positive"),
        (f"{COMBINE}.kind=gate {KD}.placement=advantage", "leave objective.kd.placement at loss"),
        (f"{COMBINE}.kind=modulate {KD}.estimator=exact", "set it to k1 or k2"),
        (f"{COMBINE}.kind=ratio {KD}.estimator=top_k", "set it to k1 or k2"),
        (f"{COMBINE}.kind=modulate objective.beta.init=1.5", "between 0 and 1"),
        (f"{COMBINE}.kind=ratio objective.beta.kind=switch objective.beta.steps=3 objective.beta.after=2", "between 0 and 1"),
        (f"{COMBINE}.kind=modulate objective.alpha.init=0", "objective.alpha is never positive"),
        (f"{COMBINE}.kind=modulate logging.gradient_split_every=1", "set it to 0"),
        (f"{COMBINE}.kind=relu objective.alpha.init=0 {KD}.estimator=k3", "to k1 or k2"),
        (f"{COMBINE}.kind=relu", "set objective.alpha.init=0, or combine.signal=advantage"),
        (f"{COMBINE}.kind=relu {COMBINE}.signal=advantage objective.alpha.init=0", "set objective.alpha.init above 0"),
        (f"{COMBINE}.kind=sign {COMBINE}.signal=advantage objective.alpha.init=0", "set objective.alpha.init above 0"),
        (f"{COMBINE}.kind=reference objective.reference_kl.coefficient=0.1", "leave reference_kl.coefficient at 0"),
        (f"{COMBINE}.kind=reference", "objective.reference_kl.estimator=k2"),
        ("objective.reference_kl.coefficient=-0.1", "objective.reference_kl.coefficient=-0.1 must be at least 0"),
        ("objective.policy_loss=cispo objective.dual_clip=3", "leave one out"),
        ("objective.dual_clip=1", "greater than 1"),
        ("objective.clip_against=sampler objective.sampler_correction.kind=mask", "correct for mu again: set it to none"),
        (f"objective.ratio=sequence {COMBINE}.kind=ratio", "leave objective.ratio at token"),
        (f"objective.ratio=product {COMBINE}.kind=ratio", "leave objective.ratio at token"),
        ("objective.sampler_correction.level=sequence", "needs sampler_correction.kind"),
        ("objective.sampler_correction.level=geometric objective.sampler_correction.kind=truncate", "set kind=mask"),
        ("objective.baseline=batch objective.normalize_by_std=false", "belongs to baseline=group"),
        (f"{KD}.importance=truncate", "leave it at full"),
        (f"{KD}.importance_level=sequence", "leave it at token"),
        (f"{REPLAY} {KD}.importance=truncate {KD}.estimator=exact", "weights sampled tokens, which"),
        (f"{REPLAY} {KD}.importance_level=sequence {KD}.placement=advantage", "weights a distillation loss, and there is none"),
        (f"{REPLAY} {KD}.importance=mask {COMBINE}.kind=modulate", "weights a distillation loss, and there is none"),
        (f"{REPLAY} {KD}.importance_level=geometric", "set importance=mask"),
        (f"{KD}.token_weight.normalize=true", "nothing to scale"),
        (f"{KD}.token_weight.over=batch", "nothing to choose"),
        (f"{KD}.token_weight.kind=prefix {KD}.token_weight.over=batch", "leave objective.kd.token_weight.over at response"),
        ("objective.beta.kind=below", "needs either objective.beta.target > 0"),
        ("objective.beta.kind=below objective.beta.target=0.1 objective.beta.drop=0.2", "needs either objective.beta.target"),
        (f"objective=grpo {KD}.token_weight.kind=prefix", "set it to constant"),
        (f"{COMBINE}.kind=ratio {KD}.token_weight.kind=prefix", "set it to constant"),
        (f"{KD}.token_weight.kind=prefix {KD}.placement=reward", "does not reach objective.kd.placement=reward"),
        (f"{KD}.token_weight.kind=prefix {KD}.token_weight.tokens=4 {KD}.token_weight.share=0.2", "leave one out"),
        (f"{KD}.divergence=forward", "set objective.kd.estimator=exact or top_k"),
        (f"{KD}.divergence=jsd", "set objective.kd.estimator=exact or top_k"),
        (f"{KD}.divergence=jsd {KD}.estimator=top_k {KD}.top_k_tail=corrected", "set it to bucket"),
        (f"{KD}.clamp=5 {KD}.estimator=exact", "does not use: set it to null"),
        (f"{KD}.estimator=exact {KD}.divergence=forward {KD}.mix=trust {KD}.placement=reward", "only fits placement=loss"),
        (f"{KD}.placement=advantage {KD}.estimator=exact", "only fits placement=loss"),
        (f"objective=grpo {KD}.control_variate=true", "there is none: set it to false"),
        (f"{KD}.control_variate=true {KD}.estimator=exact", "k1 or k2, not exact"),
        (f"{KD}.control_variate=true {KD}.estimator=k3", "k1 or k2, not k3"),
        (f"{KD}.control_variate=true {KD}.placement=reward", "does not reach objective.kd.placement=reward"),
        (f"{REPLAY} {KD}.control_variate=true {KD}.importance=truncate", "objective.kd.importance=truncate depends"),
        (
            f"{REPLAY} {KD}.control_variate=true {KD}.importance_level=sequence",
            "objective.kd.importance_level=sequence depends",
        ),
        (f"{KD}.control_variate=true {KD}.mask=group", "objective.kd.mask=group depends"),
        (f"{KD}.control_variate=true {KD}.token_weight.kind=magnitude", "objective.kd.token_weight.kind=magnitude depends"),
        (f"{KD}.control_variate=true {KD}.token_weight.kind=trusted_prefix", "token_weight.kind=trusted_prefix depends"),
        (f"{KD}.control_variate=true {COMBINE}.kind=sign", "objective.combine.kind=sign depends"),
        (f"{KD}.jsd_beta=1", "at least 1e-06 and at most"),
        (f"{KD}.entry_clip=0.05 {KD}.estimator=exact", "objective.kd.divergence"),
        (f"{KD}.entry_clip=0.05 {KD}.estimator=top_k {KD}.divergence=forward", "objective.kd.estimator"),
        (f"{KD}.entry_clip=0 {KD}.estimator=exact {KD}.divergence=forward", "entry_clip"),
        (f"{KD}.mix=trust {KD}.estimator=exact", "set objective.kd.divergence=forward"),
        (f"{KD}.divergence=forward {KD}.estimator=top_k {KD}.top_k_tail=corrected", "set it to bucket"),
        (f"{KD}.divergence=forward {KD}.estimator=top_k {KD}.top_k_tail=truncate", "objective.kd.top_k_support=teacher"),
        ("rollout.group_filter.others=teach", "needs rollout.group_filter.rounds above 0"),
        ("rollout.group_filter.rounds=2 rollout=replay rollout.path=r", "this run samples none"),
        ("rollout.group_filter.rounds=2 objective.alpha.init=0", "objective.alpha is never positive"),
        ("objective=grpo rollout.group_filter.rounds=2 rollout.group_filter.others=teach", "needs a teacher"),
        (f"{GIVEN}.share=0.5", "objective.kd.estimator=k2 does"),
        (f"{GIVEN}.share=0.5 {KD}.estimator=top_k_unbiased", "set objective.kd.estimator=exact or top_k"),
        (f"{GIVEN}.share=0.5 {KD}.estimator=exact {KD}.divergence=forward {KD}.mix=trust", "objective.kd.mix=trust does"),
        (f"{GIVEN}.share=0.5 {KD}.estimator=exact {COMBINE}.kind=sign", "set it to add or gate"),
        (f"{GIVEN}.share=0.5 {KD}.estimator=exact {KD}.token_weight.kind=pass_rate", "pass_rate needs"),
        (f"{GIVEN}.share=0.5 {KD}.estimator=exact rollout.top_p=0.9 {KD}.importance=mask", "weights sampled tokens, which"),
        (f"{GIVEN}.share=0.5 {KD}.estimator=exact rollout=replay rollout.path=r", "set rollout.given.path"),
        (f"{GIVEN}.share=1", "less than 1"),
        (f"{GIVEN}.path=r", "needs rollout.given.share above 0"),
        (f"objective=grpo {GIVEN}.share=0.5", "objective.beta is never positive"),
        (f"objective=sft {GIVEN}.share=0.5", "objective=sft trains only on given ones"),
        ("trainer.stop_after=2", "trainer.stop_after depends on evaluations during training: set eval.every"),
        (
            "checkpoint.best=eval/accuracy data.eval=e.jsonl",
            "checkpoint.best depends on evaluations during training: set eval.every",
        ),
        ("checkpoint.best=eval/accuracy data.eval=e.jsonl eval.every=2 checkpoint.every=-1", "leave one out"),
        ("objective.beta.kind=plateau", "objective.beta.kind=plateau watches eval/accuracy"),
    ],
)
def test_what_does_not_go_together_is_refused(settings: str, told: str) -> None:
    with pytest.raises(ConfigError) as raised:
        load_config(["objective=kdrl", "student.path=s", "teacher.path=t", *settings.split()])
    assert told in str(raised.value) and "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("settings", "scores", "teacher_scores", "reference"),
    [
        ("", False, False, False),
        ("objective=gspo", False, False, False),  # the ratio is 1 if the run is strictly on-policy
        ("objective=gspo batch.updates_per_step=2", True, False, False),
        ("objective=gspo objective.ratio=product batch.updates_per_step=2", True, False, False),
        ("objective=tip", True, False, False),
        (f"objective=tip {KD}.estimator=exact", True, True, False),
        ("objective=srpo", False, True, False),
        (f"objective=srpo {KD}.estimator=k2", False, False, False),  # its pass computes entropies anyway
        ("objective=vopd", False, False, False),
        ("objective=prefix_opd", False, False, False),
        ("objective.sampler_correction.kind=mask objective.sampler_correction.level=geometric", True, False, False),
        (f"{REPLAY} {KD}.importance_level=sequence", True, False, False),
        ("objective=gopd", False, False, True),
        ("objective=gopd objective.combine.extrapolation=1", False, False, False),
    ],
)
def test_what_a_setting_needs_follows_from_it(settings: str, scores: bool, teacher_scores: bool, reference: bool) -> None:
    words = settings.split()
    base = [] if any(word.startswith("objective=") for word in words) else ["objective=kdrl"]
    config = load_config([*base, "student.path=s", "teacher.path=t", *words])
    needs = needs_scores(config), needs_teacher_scores(config.objective), uses_reference(config.objective)
    assert needs == (scores, teacher_scores, reference)
