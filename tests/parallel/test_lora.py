"""A student trained with LoRA computes what `peft` computes in one dense process, in every kind of layout: loss, log-probs of
every token, and the gradient of every factor. The merged student equals the unmerged one. Frozen weights have neither gradients
nor optimizer state, and adapters add no all-reduce to a pass over the model.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

pytest.importorskip("peft")

from kdrl_mcore.cli import convert
from kdrl_mcore.config import LORA_HEAD, LORA_PARAMETERS
from kdrl_mcore.convert.folders import STATE_FILE
from kdrl_mcore.convert.torch_dist import read_metadata
from tests.reference import adapters, dense
from tests.reference.tiny_models import make_model, make_qwen2, make_rollouts, read_hf_weights, read_jsonl, write_jsonl
from tests.support import lora
from tests.support.agreement import SETTINGS, about, assert_gradients
from tests.support.late_weights import OVERLAPPED
from tests.support.lora import MODULES, Adapted, adapt
from tests.support.newer_core import BESIDE, assert_newer, needs_newer_core
from tests.support.ranks import RankPool
from tests.support.te_ranks import STUBS, play_transformer_engine
from tests.support.training import FAST, PROBE, PROBE_LR, PROMPTS, QUIET, metrics_of, objective_overrides, train_on_rank
from tests.support.zoo import Zoo

SP = "parallel.tensor=2 parallel.sequence_parallel=true"
LAYOUTS = {
    "tp2": (2, "parallel.tensor=2"),
    "tp2 sp": (2, f"{SP} batch.micro_tokens=40"),
    "cp2": (2, "parallel.context=2"),
    "dp2": (2, "batch.micro_tokens=40"),
    "pp2 recomputed": (2, "parallel.pipeline=2 parallel.recompute=full batch.micro_tokens=40"),
    "tp2 pp2": (4, "parallel.tensor=2 parallel.pipeline=2 batch.micro_tokens=40"),
    "tp2 pp2 interleaved sp": (4, f"{SP} parallel.pipeline=2 parallel.virtual_pipeline=2"),
    "tp2 sp, MLP recomputed": (2, f"{SP} parallel.recompute=selective"),
}


@pytest.fixture(scope="module")
def untied(zoo: Zoo, tmp_path_factory: pytest.TempPathFactory) -> Adapted:
    return adapt(tmp_path_factory.mktemp("untied"), *_models(zoo, "untied"))


@pytest.fixture(scope="module")
def with_head(zoo: Zoo, tmp_path_factory: pytest.TempPathFactory) -> Adapted:
    """The output head has an adapter, too. Of 67 tokens two ranks have 68 rows, one of them padding."""
    return adapt(tmp_path_factory.mktemp("with_head"), *_models(zoo, "untied"), (*MODULES, LORA_HEAD))


def _models(zoo: Zoo, student: str) -> tuple[Path, Path, Path]:
    return zoo.model(student), zoo.model("teacher"), zoo.rollouts("uneven")


@pytest.mark.parametrize("ranks, layout", LAYOUTS.values(), ids=list(LAYOUTS))
def test_loss_log_probs_and_gradients_are_those_of_peft(
    ranks: int, layout: str, zoo: Zoo, with_head: Adapted, pools: dict[int, RankPool], tmp_path: Path
) -> None:
    lora.check(with_head, zoo.rows("uneven"), SETTINGS, pools[ranks], layout, tmp_path / "run")


def test_tied_embeddings_are_frozen_on_both_stages(zoo: Zoo, pools: dict[int, RankPool], tmp_path: Path) -> None:
    modules = ("q_proj", "v_proj", "up_proj")  # these are parts of fused layers
    tied = adapt(tmp_path / "adapter", *_models(zoo, "tied"), modules)
    lora.check(tied, zoo.rows("uneven"), SETTINGS, pools[2], "parallel.pipeline=2", tmp_path / "run")


@pytest.fixture(scope="module")
def te_ranks() -> Iterator[RankPool]:
    pool = RankPool(2, import_first=[STUBS], prepare=play_transformer_engine)
    yield pool
    pool.close()


@pytest.mark.parametrize("layout", ["parallel.tensor=2", SP, "parallel.context=2"], ids=["tp2", "tp2 sp", "cp2"])
def test_transformer_engines_layers(layout: str, zoo: Zoo, untied: Adapted, te_ranks: RankPool, tmp_path: Path) -> None:
    te = f"{layout} model.spec=transformer_engine"
    lora.check(untied, zoo.rows("uneven"), SETTINGS, te_ranks, te, tmp_path / "run")


def test_transformer_engines_layer_of_all_experts(te_ranks: RankPool, tmp_path: Path) -> None:
    student = make_model("qwen3_moe", tmp_path / "student", seed=11, vocab_size=64)
    rows, teacher = make_rollouts(student, seed=13), make_qwen2(tmp_path / "teacher", seed=12, vocab_size=64)
    rollouts, parameters = write_jsonl(tmp_path / "rollouts.jsonl", rows), LORA_PARAMETERS
    experts = adapt(tmp_path / "adapter", student, teacher, rollouts, ("q_proj",), parameters)
    layout = "parallel.expert=2 model.spec=transformer_engine"
    lora.check(experts, rows, replace(SETTINGS, vocab_size=64), te_ranks, layout, tmp_path / "run")


@needs_newer_core
def test_the_newer_megatron_core(zoo: Zoo, untied: Adapted, tmp_path: Path) -> None:
    pool = RankPool(2, import_first=[str(BESIDE)])
    try:
        lora.check(untied, zoo.rows("uneven"), SETTINGS, pool, SP, tmp_path / "run")
        assert_newer(pool)
    finally:
        pool.close()


@pytest.mark.parametrize("layout", ["", f"{OVERLAPPED} batch.micro_tokens=40", SP], ids=["dp2", "dp2 overlapped", "tp2 sp"])
def test_two_steps_of_adam_are_those_of_torch(layout: str, zoo: Zoo, untied: Adapted, ranks2: RankPool, tmp_path: Path) -> None:
    lr, decay, betas, epsilon, clip = 0.01, 0.1, (0.9, 0.95), 1e-2, 1.5
    model = adapters.load_adapted(untied.student, untied.adapter)
    teacher = dense.load_model(untied.teacher)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    adam = torch.optim.AdamW(trained, lr=lr, betas=betas, eps=epsilon, weight_decay=decay)
    for _ in range(2):
        dense.kdrl_of_models(model, teacher, zoo.rows("uneven"), SETTINGS)
        torch.nn.utils.clip_grad_norm_(trained, clip)
        adam.step()
    run = tmp_path / "run"
    overrides = [
        f"run.dir={run}",
        *untied.overrides,
        f"objective.beta.init={SETTINGS.beta}",
        *FAST,
        "trainer.steps=2",
        f"optimizer.lr={lr}",
        f"optimizer.weight_decay={decay}",
        f"optimizer.adam_beta1={betas[0]}",
        f"optimizer.adam_beta2={betas[1]}",
        f"optimizer.adam_eps={epsilon}",
        f"optimizer.clip_grad={clip}",
        *layout.split(),
    ]
    outcomes = ranks2.run(train_on_rank, overrides)
    assert [outcome.code for outcome in outcomes] == [0, 0], outcomes[0].stderr
    before, after = adapters.read_factors(untied.adapter), adapters.read_factors(run / "adapter")
    wanted = {name.replace(".default", ""): value for name, value in model.named_parameters() if "lora_" in name}
    assert_gradients(
        {name: after[name].double() - before[name].double() for name in before},
        {name: wanted[name].detach() - before[name].double() for name in before},
    )


def test_the_merged_student_is_the_unmerged_one(
    zoo: Zoo, with_head: Adapted, pools: dict[int, RankPool], tmp_path: Path
) -> None:
    """Factors that are loaded and exported without an update keep their bytes."""
    layout = f"{SP} parallel.pipeline=2"
    overrides = [
        f"run.dir={tmp_path / 'run'}",
        *with_head.overrides,
        "optimizer.lr=0",
        *FAST,
        "trainer.steps=1",
        *layout.split(),
    ]
    outcomes = pools[4].run(train_on_rank, overrides)
    assert [outcome.code for outcome in outcomes] == [0] * 4, outcomes[0].stderr
    before, after = adapters.read_factors(with_head.adapter), adapters.read_factors(tmp_path / "run" / "adapter")
    assert before.keys() == after.keys() and all(before[name].equal(after[name]) for name in before)
    wanted, merged = adapters.merged_weights(with_head.student, with_head.adapter), read_hf_weights(tmp_path / "run" / "hf")
    assert wanted.keys() == merged.keys()
    for name, weight in merged.items():
        torch.testing.assert_close(weight.double(), wanted[name], rtol=2e-7, atol=1e-7)
    with torch.no_grad():
        tokens = torch.arange(1, 9)[None]
        pair = [
            dense.load_model(tmp_path / "run" / "hf")(tokens).logits,
            adapters.load_adapted(with_head.student, tmp_path / "run" / "adapter")(tokens).logits,
        ]
    torch.testing.assert_close(*pair, rtol=1e-6, atol=1e-5)


@pytest.mark.timeout(900)  # saves start processes
def test_a_checkpoint_holds_adapters_alone_and_goes_on_in_another_layout(
    zoo: Zoo, with_head: Adapted, pools: dict[int, RankPool], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = ["optimizer.lr=0.01", "optimizer.adam_eps=0.1", f"objective.beta.init={SETTINGS.beta}", *FAST]

    def train(run: str, steps: int, every: int, ranks: int, layout: str) -> None:
        words = [f"run.dir={tmp_path / run}", f"trainer.steps={steps}", f"checkpoint.every={every}", *layout.split()]
        outcomes = pools[ranks].run(train_on_rank, [*with_head.overrides, *settings, *words])
        assert [outcome.code for outcome in outcomes] == [0] * ranks, outcomes[0].stderr

    train("straight", 4, -1, 2, "parallel.tensor=2")
    train("parted", 2, 0, 4, f"{SP} batch.micro_tokens=40")
    saved = tmp_path / "parted" / "checkpoints" / "step_000002"
    factors = sum(value.numel() for value in adapters.read_factors(with_head.adapter).values())
    names = read_metadata(saved / "weights").state_dict_metadata
    sizes = {name: described.size.numel() for name, described in names.items() if hasattr(described, "size")}
    padding = lora.RANK  # one row of the output head's B
    assert sum(sizes.values()) == 4 * (factors + padding)  # the factors, their main weights and two moments
    assert all(".lora_" in name for name in sizes)
    _export_and_compare(saved, tmp_path, capsys)
    train("parted", 4, -1, 2, "parallel.pipeline=2 parallel.virtual_pipeline=2")
    straight, parted = (metrics_of(tmp_path / run) for run in ("straight", "parted"))
    for name in ("loss", "grad_norm", "kl", "lr"):
        assert [row[name] for row in parted] == pytest.approx([row[name] for row in straight], rel=1e-4), name
    assert len({row["loss"] for row in parted}) == 4


def _export_and_compare(saved: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`kdrl-convert export` writes from a checkpoint what the run wrote at its end, and takes no other base than the run's."""
    run, base = saved.parent.parent, Path(json.loads((saved / STATE_FILE).read_text())["config"]["student"]["path"])

    def export(name: str, *words: str) -> int:
        return convert.main(["export", "--checkpoint", str(saved), "--output", str(folder / name), *words])

    assert export("merged") == export("adapters", "--adapter") == 0
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (folder / "adapters" / name).read_bytes() == (run / "adapter" / name).read_bytes()
    wanted, merged = read_hf_weights(run / "hf"), read_hf_weights(folder / "merged")
    assert wanted.keys() == merged.keys()
    for name, weight in merged.items():
        torch.testing.assert_close(weight, wanted[name], rtol=2e-7, atol=1e-7)
    moved = shutil.copytree(base, folder / "moved")
    assert export("from moved", "--adapter", "--base", str(moved)) == 0
    weights = moved / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"!")
    assert export("from another", "--base", str(moved)) != 0
    assert "holds adapters of another model" in capsys.readouterr().err
    assert export("from nowhere", "--base", str(folder / "gone")) != 0
    assert "does not exist here: name its folder with --base" in capsys.readouterr().err


@pytest.mark.parametrize(
    "layout, estimator",
    [("parallel.tensor=2", "k2"), ("parallel.pipeline=2", "k2"), (SP, "exact")],
    ids=["tp2", "pp2", "exact"],
)
def test_the_base_is_the_reference_and_the_teacher_without_a_copy(
    layout: str, estimator: str, zoo: Zoo, untied: Adapted, ranks2: RankPool, tmp_path: Path
) -> None:
    settings = replace(SETTINGS, reference=0.2, estimator=estimator)
    itself = replace(untied, teacher=None)
    assert lora.check(itself, zoo.rows("uneven"), settings, ranks2, layout, tmp_path / "run", untied.student) == 1


@pytest.mark.parametrize(
    "layout, estimator, other_base",
    [("parallel.tensor=2", "k2", False), (SP, "exact", False), ("parallel.tensor=2 teacher.parallel.tensor=2", "k2", True)],
    ids=["tp2", "exact", "another base"],
)
def test_other_adapters_teach(
    layout: str, estimator: str, other_base: bool, zoo: Zoo, untied: Adapted, ranks2: RankPool, tmp_path: Path
) -> None:
    """Over the student's base they are a second set of adapters, without a second copy; over another they are merged."""
    base = zoo.model("teacher") if other_base else untied.student
    modules = ("q_proj", "o_proj", "up_proj", "down_proj")
    folder = adapters.make_adapter(base, tmp_path / "teacher", seed=9, rank=3, alpha=5.0, modules=modules)
    taught = replace(untied, teacher=base if other_base else None, teacher_adapter=folder)
    settings = replace(SETTINGS, estimator=estimator)
    assert lora.check(taught, zoo.rows("uneven"), settings, ranks2, layout, tmp_path / "run") == 1 + other_base


def test_the_adapters_of_the_start_teach(zoo: Zoo, untied: Adapted, ranks2: RankPool, tmp_path: Path) -> None:
    """Earlier weights are earlier adapters: at the start of the run the teacher is the student, and the gradient is only
    rounding."""
    words = [word for word in untied.overrides if "teacher" not in word]
    settings = ["objective.alpha.init=0", "objective.beta.init=1", "teacher.weights=start", "optimizer.lr=0.01"]
    outcomes = ranks2.run(train_on_rank, [f"run.dir={tmp_path / 'run'}", *words, *settings, "trainer.steps=1", *FAST])
    assert [outcome.code for outcome in outcomes] == [0, 0], outcomes[0].stderr
    (metrics,) = metrics_of(tmp_path / "run")
    assert metrics["grad_norm"] < 1e-2


def test_the_embedded_engine_samples_with_adapters(zoo: Zoo, with_head: Adapted, ranks2: RankPool, tmp_path: Path) -> None:
    """The log-probs that the engine reports for the tokens it sampled are those of `peft`."""
    write_jsonl(tmp_path / "train.jsonl", [{"prompt": prompt, "answer": "5"} for prompt in PROMPTS[:4]])
    own = [word for word in with_head.overrides if "rollout" not in word and "teacher" not in word]
    sampling = ["rollout.prompts_per_step=4", "rollout.responses_per_prompt=2", "rollout.max_response_tokens=12"]
    words = [f"run.dir={tmp_path / 'run'}", *own, f"data.train={tmp_path / 'train.jsonl'}", *sampling, *QUIET]
    outcomes = ranks2.run(
        train_on_rank, [*words, "objective=grpo", "data.template=plain", "trainer.steps=1", "parallel.tensor=2"]
    )
    assert [outcome.code for outcome in outcomes] == [0, 0], outcomes[0].stderr
    model = adapters.load_adapted(with_head.student, with_head.adapter)
    rows = read_jsonl(tmp_path / "run" / "rollouts" / "step_000001.jsonl")
    for row in rows:
        with torch.no_grad():
            logits = dense.response_logits(model, row, zoo.vocab_size("untied"), 1.0)
        wanted = dense.log_prob_of(logits.log_softmax(-1), row)
        torch.testing.assert_close(torch.tensor(row["sampler_log_probs"]).double(), wanted, rtol=1e-4, atol=1e-5)
    assert len(rows) == 8


def test_what_is_frozen_costs_nothing_and_adapters_add_no_all_reduce(
    zoo: Zoo, untied: Adapted, ranks2: RankPool, tmp_path: Path
) -> None:
    """Without sequence parallelism an update has one more all-reduce over the tensor-parallel group: of the gradients of the
    factors that its ranks hold whole."""
    words = [*FAST, "trainer.steps=1", "parallel.tensor=2", "checkpoint.export_hf=false", "batch.micro_tokens=100000"]
    plain = [word for word in untied.overrides if "lora" not in word]
    full, adapted = (
        ranks2.run(lora.all_reduces_on_rank, [f"run.dir={tmp_path / name}", *overrides, *words])
        for name, overrides in (("full", plain), ("adapted", untied.overrides))
    )
    for one, other in zip(full, adapted, strict=True):
        assert one.code == other.code == 0, other.stderr
        kept = other.found
        assert kept["trained"] == kept["main_weights"] and kept["frozen_gradients"] == 0
        assert kept["trained"] <= kept["buffers"] < kept["trained"] + 1024 < one.found["buffers"]  # padding
        shared = sum(value.numel() for name, value in adapters.read_factors(untied.adapter).items() if _is_whole(name))
        assert sorted(kept["sizes"]) == sorted([*one.found["sizes"], shared])


def _is_whole(name: str) -> bool:
    """Whether each tensor-parallel rank holds the whole factor."""
    return ("lora_B" in name) == ("o_proj" in name or "down_proj" in name)


@pytest.mark.parametrize(
    "weights, layout, estimator",
    [("average", "", "k2"), ("refreshed", SP, "exact")],
    ids=["average, dp2", "refreshed, exact, tp2 sp"],
)
def test_earlier_adapters_teach(
    weights: str, layout: str, estimator: str, zoo: Zoo, untied: Adapted, ranks2: RankPool, tmp_path: Path
) -> None:
    steps, lr, decay = 3, 0.01, 0.5
    settings = replace(SETTINGS, estimator=estimator)
    model = adapters.load_adapted(untied.student, untied.adapter)
    teacher = adapters.load_adapted(untied.student, untied.adapter)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    adam = torch.optim.AdamW(trained, lr=lr, betas=(0.9, 0.95), eps=1e-2, weight_decay=0)
    losses = []
    for step in range(1, steps + 1):
        losses.append(dense.kdrl_of_models(model, teacher, zoo.rows("uneven"), settings).loss)
        adam.step()
        share = 1 - decay if weights == "average" else float(step % 2 == 0)
        with torch.no_grad():
            for mine, present in zip(teacher.parameters(), model.parameters(), strict=True):
                mine.lerp_(present, share)
    words = [word for word in untied.overrides if "teacher" not in word]
    extra = f"teacher.decay={decay}" if weights == "average" else "teacher.refresh_every=2"
    optimizer = f"optimizer.lr={lr} optimizer.adam_eps=1e-2 optimizer.adam_beta2=0.95 optimizer.weight_decay=0"
    run = tmp_path / "run"
    overrides = [f"run.dir={run}", *words, f"teacher.weights={weights}", extra, *objective_overrides(settings), *FAST]
    rest = f"optimizer.clip_grad=0 trainer.steps={steps} {optimizer} {layout}"
    outcomes = ranks2.run(train_on_rank, [*overrides, *rest.split()])
    assert [outcome.code for outcome in outcomes] == [0, 0], outcomes[0].stderr
    assert [row["loss"] for row in metrics_of(run)] == [about(loss) for loss in losses]


def test_in_bfloat16_the_gradient_is_that_of_peft_to_rounding(
    zoo: Zoo, untied: Adapted, ranks2: RankPool, tmp_path: Path
) -> None:
    """The reference has the weights that bfloat16 holds, and does not round otherwise. The adapters are small beside the base,
    as trained ones are."""
    factors = {
        name: value * (0.1 if "lora_B" in name else 1.0) for name, value in adapters.read_factors(untied.adapter).items()
    }
    untied = replace(untied, adapter=shutil.copytree(untied.adapter, tmp_path / "small"))
    save_file(factors, untied.adapter / "adapter_model.safetensors")
    model, teacher = adapters.load_adapted(untied.student, untied.adapter), dense.load_model(zoo.model("teacher"))
    with torch.no_grad():
        for parameter in (*model.parameters(), *teacher.parameters()):
            parameter.copy_(parameter.bfloat16())
    result = dense.kdrl_of_models(model, teacher, zoo.rows("uneven"), SETTINGS)
    gradients = {name.replace(".default", ""): each for name, each in result.gradients.items() if "lora_" in name}
    words = [*untied.overrides, *objective_overrides(SETTINGS), *PROBE, *FAST, "model.dtype=bfloat16", *SP.split()]
    outcomes = ranks2.run(train_on_rank, [f"run.dir={tmp_path / 'run'}", *words])
    assert [outcome.code for outcome in outcomes] == [0, 0], outcomes[0].stderr
    before, after = adapters.read_factors(untied.adapter), adapters.read_factors(tmp_path / "run" / "adapter")
    own = {name: (before[name].double() - after[name].double()) / PROBE_LR for name in before}
    apart = {name: float((own[name] - right).norm() / right.norm()) for name, right in gradients.items()}
    assert max(apart.values()) <= 0.15, apart
    both = [torch.cat([of[name].flatten().double() for name in before]) for of in (own, gradients)]
    assert (both[0] - both[1]).norm() <= 20 * 2.0**-9 * both[1].norm()
