"""What a file is, said from its header alone."""

import json

import pytest
import torch
from adapters import CONVOLUTIONS, edit_config, make_adapter
from click.testing import CliRunner
from images import kohya_pair, save

from lora_squeeze import open_adapter
from lora_squeeze.cli import main
from lora_squeeze.summary import show


def kohya(tmp_path):
    return save(
        tmp_path / "in.safetensors",
        kohya_pair("lora_unet_a", 20, 8, 16, alpha=4.0),
        kohya_pair("lora_unet_b", 20, 4, 16, alpha=4.0, dtype=torch.float16),
        kohya_pair("lora_unet_c", 10, 8, 6, kernel=(3, 3)),
        {"lora_unet_a.dora_scale": torch.ones(20, 1)},
        metadata={"ss_sd_model_name": "model.safetensors", "ss_base_model_version": "sdxl_base_v1-0"},
    )


def test_a_kohya_file(tmp_path):
    source = kohya(tmp_path)
    summary = show(open_adapter(source))
    assert (summary.format, summary.base_model) == ("kohya", "model.safetensors, sdxl_base_v1-0")
    assert summary.layers == {"conv 3×3": 1, "linear": 2}
    assert summary.ranks == {4: 1, 8: 2}
    assert summary.scales == {0.5: 1, 1.0: 2}
    assert summary.dtypes == {"F16": 1, "F32": 2}
    assert summary.parameters == 8 * 36 + 4 * 36 + 8 * 64
    assert summary.nbytes == source.stat().st_size
    assert summary.passes_through == {"lora_unet_a.dora_scale": (20, 1)}
    assert any("DoRA" in note for note in summary.notes)


def test_a_peft_folder(tmp_path):
    folder = make_adapter(tmp_path / "adapter", CONVOLUTIONS)
    edit_config(folder, base_model_name_or_path="some/model")
    summary = show(open_adapter(folder))
    assert (summary.format, summary.base_model) == ("peft", "some/model")
    assert summary.layers == {"conv 1×1": 1, "conv 3": 1, "conv 3×1": 1, "embedding": 1}
    assert summary.passes_through == {}


def test_a_diffusers_file(tmp_path):
    config = json.dumps({"unet.r": 2, "unet.lora_alpha": 4, "unet.base_model_name_or_path": "some/unet"})
    pair = {"unet.q.lora_A.weight": torch.ones(2, 4), "unet.q.lora_B.weight": torch.ones(6, 2)}
    summary = show(open_adapter(save(tmp_path / "in.safetensors", pair, metadata={"lora_adapter_metadata": config})))
    assert (summary.format, summary.base_model, summary.scales) == ("diffusers", "some/unet", {2.0: 1})


def test_command(tmp_path):
    source = str(kohya(tmp_path))
    table = CliRunner().invoke(main, ["show", source])
    assert table.exit_code == 0, table.output
    for words in ("kohya", "sdxl_base_v1-0", "conv 3×3 (1), linear (2)", "4 (1), 8 (2)", "dora_scale", "Note:"):
        assert words in table.output
    record = json.loads(CliRunner().invoke(main, ["show", source, "--json"]).output)
    assert (record["record"], record["format"], record["ranks"]) == ("Summary", "kohya", {"4": 1, "8": 2})


def test_commands_work_on_single_files(tmp_path):
    source, run = str(kohya(tmp_path)), CliRunner()
    for arguments in (
        ["analyze", source],
        ["plan", source, "--policy", "energy=0.9", "-o", str(tmp_path / "plan.json")],
        ["compress", source, str(tmp_path / "a.safetensors"), "--ranks", str(tmp_path / "plan.json")],
        [
            "compress",
            source,
            str(tmp_path / "many"),
            "--policy",
            "energy=0.9",
            "--policy",
            "size=6kB",
            "--min-rank",
            "1",
        ],
        ["compress", source, str(tmp_path / "b.safetensors"), "--rank", "2", "--for", "comfyui"],
        ["check", str(tmp_path / "b.safetensors"), "--for", "comfyui"],
        ["compare", str(save(tmp_path / "d.safetensors", kohya_pair("lora_unet_a", 20, 8, 16)))],
    ):
        result = run.invoke(main, arguments)
        assert result.exit_code == 0, (arguments, result.output)
    assert {path.name for path in (tmp_path / "many").iterdir()} == {"energy=0.9.safetensors", "size=6kB.safetensors"}
    assert (tmp_path / "many" / "size=6kB.safetensors").stat().st_size <= 6000


@pytest.mark.parametrize("runtime", ["peft", "vllm"])
def test_a_runtime_that_does_not_read_the_format_is_refused_as_check_says(tmp_path, runtime):
    source, out, run = str(kohya(tmp_path)), tmp_path / "c.safetensors", CliRunner()
    for arguments in (["compress", source, str(out), "--rank", "2"], ["check", source]):
        refused = run.invoke(main, [*arguments, "--for", runtime])
        assert refused.exit_code == 1
        assert f"{runtime} would not load it" in refused.output
        assert "kohya adapter" in refused.output
    assert not out.exists()
