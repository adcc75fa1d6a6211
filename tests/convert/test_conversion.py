"""HF -> Megatron -> HF gives the same bytes; converted models load in any layout, in Megatron and in `transformers`."""

from __future__ import annotations

import errno
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.distributed.checkpoint import FileSystemReader

from kdrl_mcore.convert.convert import export_hf_folder, import_hf
from kdrl_mcore.convert.verify import verify
from tests.reference.dense import load_model
from tests.reference.tiny_models import add_kept_layer, make_model, make_tokenizer
from tests.support import conversion_ranks
from tests.support.hf_folders import all_tensors, assert_same_bytes, quiet
from tests.support.ranks import RankPool


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Qwen2 model in several files, with a tokenizer and a chat template."""
    path = make_model("qwen2", tmp_path_factory.mktemp("source") / "hf", seed=2, max_shard_size="100KB")
    make_tokenizer(path)
    (path / "chat_template.jinja").write_text("{{ messages }}")
    return path


@pytest.fixture(scope="module")
def converted(source: Path) -> Path:
    """`source`, imported."""
    import_hf(source, source.parent / "megatron", None, quiet)
    return source.parent / "megatron"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "family, settings",
    [
        ("qwen2", {"tie_word_embeddings": True}),
        ("qwen3", {}),
        ("llama", {"num_attention_heads": 8, "num_key_value_heads": 1, "vocab_size": 64}),
        ("qwen3_moe", {}),
        ("qwen3_moe", {"mlp_only_layers": [0, 2]}),
        ("glm4_moe", {}),
        ("phi3", {}),
        ("olmo2", {}),
        ("gemma3", {}),
    ],
)
def test_there_and_back_is_the_same_bytes(family: str, settings: dict, dtype: torch.dtype, tmp_path: Path) -> None:
    hf = make_model(family, tmp_path / "hf", seed=1, dtype=dtype, max_shard_size="100KB", **settings)
    if family == "glm4_moe":
        add_kept_layer(hf)
    import_hf(hf, tmp_path / "megatron", None, quiet)
    export_hf_folder(tmp_path / "megatron", tmp_path / "back", quiet, max_shard_bytes=70_000)
    assert_same_bytes(hf, tmp_path / "back")
    assert (tmp_path / "back" / "config.json").read_bytes() == (hf / "config.json").read_bytes()
    found = verify(hf, tmp_path / "megatron", quiet)
    assert found.agrees and set(found.status.values()) == {"equal"} and found.digests[0] == found.digests[1]


@pytest.mark.parametrize("in_kernel", [True, False])
def test_small_blocks_change_nothing(in_kernel: bool, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The blocks are those of a large model: many for each tensor, with edges that are not those of heads. If the kernel cannot
    copy from one file system to another, they are read and written."""
    monkeypatch.setattr("kdrl_mcore.convert.convert.BLOCK_BYTES", 5 * 64 * 4)
    if not in_kernel:

        def refuse(*_: object) -> int:
            raise OSError(errno.EXDEV, "Invalid cross-device link")

        monkeypatch.setattr("os.copy_file_range", refuse)
    import_hf(source, tmp_path / "megatron", None, quiet)
    export_hf_folder(tmp_path / "megatron", tmp_path / "back", quiet)
    assert_same_bytes(source, tmp_path / "back")


def test_a_cast_is_reported_as_one(source: Path, tmp_path: Path) -> None:
    import_hf(source, tmp_path / "megatron", torch.bfloat16, quiet)
    found = verify(source, tmp_path / "megatron", quiet)
    assert found.agrees and set(found.status.values()) == {"cast"} and found.digests[0] != found.digests[1]
    export_hf_folder(tmp_path / "megatron", tmp_path / "back", quiet)
    for name, tensor in all_tensors(source).items():
        assert torch.equal(all_tensors(tmp_path / "back")[name], tensor.bfloat16())
    assert json.loads((tmp_path / "back" / "config.json").read_text())["dtype"] == "bfloat16"


def test_everything_beside_the_weights_comes_along(source: Path, converted: Path, tmp_path: Path) -> None:
    export_hf_folder(converted, tmp_path / "back", quiet)
    for name in ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (converted / name).read_bytes() == (source / name).read_bytes() == (tmp_path / "back" / name).read_bytes()


def test_transformers_loads_the_export(source: Path, converted: Path, tmp_path: Path) -> None:
    export_hf_folder(converted, tmp_path / "back", quiet, max_shard_bytes=100_000)
    assert (tmp_path / "back" / "model.safetensors.index.json").is_file()
    tokens = torch.arange(60)[None]
    original, back = (load_model(path, torch.float32) for path in (source, tmp_path / "back"))
    assert torch.equal(original(tokens).logits, back(tokens).logits)


@pytest.mark.parametrize("family", ["qwen2", "glm4_moe"])
def test_the_keys_and_chunks_are_those_megatron_itself_saves(
    family: str, converted: Path, source: Path, ranks1: RankPool, tmp_path: Path
) -> None:
    """Megatron-Core's `dist_checkpointing.save` writes the same keys, shapes, dtypes and chunks for the same model."""
    if family != "qwen2":
        source, converted = make_model(family, tmp_path / "hf", seed=2), tmp_path / "megatron"
        import_hf(source, converted, None, quiet)
    tmp_path = tmp_path / "theirs"
    tmp_path.mkdir()
    ranks1.run(conversion_ranks.save_with_megatron, str(source), str(tmp_path))
    theirs, ours = (
        FileSystemReader(folder).read_metadata().state_dict_metadata for folder in (tmp_path, converted / "release")
    )
    assert set(theirs) <= set(ours)
    assert all("_extra_state" in key for key in set(ours) - set(theirs))
    for key, stored in theirs.items():
        if "_extra_state" not in key:
            assert (ours[key].size, ours[key].properties.dtype) == (stored.size, stored.properties.dtype)
            assert sorted(ours[key].chunks, key=str) == sorted(stored.chunks, key=str)
    assert (tmp_path / "metadata.json").read_bytes() == (converted / "release" / "metadata.json").read_bytes()


@pytest.mark.parametrize("layout", [{"tensor": 2}, {"pipeline": 2}], ids=["tp2", "pp2"])
def test_megatron_loads_it_in_any_layout(layout: dict, source: Path, converted: Path, ranks2: RankPool) -> None:
    """`dist_checkpointing.load` fills a model with the same values as our loading, padded vocabulary included."""
    assert all(ranks2.run(conversion_ranks.megatron_loads_the_same, str(source), str(converted), layout))


@pytest.mark.parametrize(
    "layout", [{"expert": 2}, {"pipeline": 2}, {"tensor": 2, "sequence_parallel": True}], ids=["ep2", "pp2", "tp2-sp"]
)
def test_megatron_loads_experts_in_any_layout(layout: dict, ranks2: RankPool, tmp_path: Path) -> None:
    hf = make_model("qwen3_moe" if "expert" in layout else "glm4_moe", tmp_path / "hf", seed=4)
    import_hf(hf, tmp_path / "megatron", None, quiet)
    assert all(ranks2.run(conversion_ranks.megatron_loads_the_same, str(hf), str(tmp_path / "megatron"), layout))


def test_a_converted_model_is_a_model(source: Path, converted: Path, ranks2: RankPool) -> None:
    """Everything that accepts a model folder accepts either kind."""
    layout, given = {"tensor": 2}, [[1, 2, 3, 4], [5, 6]]
    first, second = (ranks2.run(conversion_ranks.logits, str(path), layout, given)[0] for path in (source, converted))
    assert np.array_equal(first, second)


@pytest.mark.parametrize(
    "family, layout",
    [
        ("qwen2", {"tensor": 2, "pipeline": 2}),
        ("phi3", {"tensor": 2, "pipeline": 2}),
        ("olmo3", {"tensor": 2, "pipeline": 2}),
        ("gemma3", {"tensor": 2, "sequence_parallel": True, "pipeline": 2}),
        ("glm4_moe", {"pipeline": 2, "expert": 2}),
        ("qwen3_moe", {"tensor": 2, "expert": 4, "sequence_parallel": True}),
    ],
)
def test_a_running_model_exports_the_bytes_it_was_loaded_from(
    family: str, layout: dict, ranks4: RankPool, tmp_path: Path
) -> None:
    """So does the checkpoint that it saves: through a change of layout, with a padded vocabulary."""
    hf = make_model(family, tmp_path / "hf", seed=6)
    if family == "glm4_moe":
        add_kept_layer(hf)
    ranks4.run(conversion_ranks.export_and_save, str(hf), layout, str(tmp_path / "exported"), str(tmp_path / "saved"))
    assert_same_bytes(hf, tmp_path / "exported")
    export_hf_folder(tmp_path / "saved", tmp_path / "back", quiet)
    assert_same_bytes(hf, tmp_path / "back")
    assert verify(hf, tmp_path / "saved", quiet).agrees


def test_a_tied_model_over_a_pipeline_exports_one_embedding(ranks2: RankPool, tmp_path: Path) -> None:
    hf = make_model("qwen2", tmp_path / "hf", seed=6, tie_word_embeddings=True)
    ranks2.run(conversion_ranks.export_and_save, str(hf), {"pipeline": 2}, str(tmp_path / "exported"), str(tmp_path / "saved"))
    assert_same_bytes(hf, tmp_path / "exported")
    export_hf_folder(tmp_path / "saved", tmp_path / "back", quiet)
    assert_same_bytes(hf, tmp_path / "back")
