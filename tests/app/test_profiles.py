"""Layers follow from a folder's UNet or the published ones, and charts show the profile's numbers."""

import json
from functools import cache
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel

from imprompt.adapter.backbones.unet import cross_attentions
from imprompt.app.cli import main
from imprompt.app.profile_charts import charts, layers_of, tables
from imprompt.catalog import bases
from imprompt.errors import UsageError
from imprompt.schema.profiles import PROFILES, layer_weights
from tiny import tiny_unet


@pytest.mark.parametrize("family", ["sd", "sdxl"])
def test_layers_of_a_folder_are_its_unets(family: str, tmp_path: Path) -> None:
    unet = tiny_unet(family)
    unet.save_config(tmp_path / "unet")
    assert layers_of(str(tmp_path)) == cross_attentions(unet)


@pytest.mark.parametrize(
    ("family", "layers", "blocks"),
    [("sd15", 16, 16), ("sd21", 16, 16), ("sdxl", 70, 11), ("kolors", 70, 11)],
)
def test_published_families_have_their_layers(family: str, layers: int, blocks: int) -> None:
    found = layers_of(family)
    assert (len(found), len({layer.block_index for layer in found})) == (layers, blocks)
    if family == "sd15":
        with torch.device("meta"):
            assert found == cross_attentions(UNet2DConditionModel(cross_attention_dim=768))


def test_every_profile_has_a_line_and_bars_follow_its_weights() -> None:
    lines = charts("sd15").splitlines()
    assert {line.split()[0] for line in lines[1:] if line.split()[0] in PROFILES} == set(PROFILES)
    linear = next(line for line in lines if line.startswith("linear"))
    assert linear.count("█") == 16
    style = next(line for line in lines if line.startswith("style "))
    assert style.rstrip().endswith("│███      ".rstrip())


def test_numbers_for_machines_are_the_profiles(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["profiles", "Ease In", "--base", "sdxl", "--json"]) == 0
    (weights,) = (row["weights"] for row in json.loads(capsys.readouterr().out).values())
    layers = layers_of("sdxl")
    expected = dict(
        zip((x.block_index for x in layers), layer_weights("ease-in", layers).weights, strict=True)
    )
    assert weights == [expected[t] for t in range(11)]
    assert tables("sdxl", "style-transfer-precise")["style-transfer-precise"]["negated"] == [3]


def test_weights_of_ones_own_are_drawn_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["profiles", "up_blocks.1:2,mid_block:-1,default:0", "--base", "sd15"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].rstrip().endswith("│-│███")
    assert "a full bar is weight 2" in lines[-1]
    assert next(line for line in lines if "mid_block.a" in line).split()[1] == "-1.00"
    assert charts("sdxl", "style-and-composition:0.5").count("▄") == 2
    assert main(["profiles", "1,2,3", "--base", "sd15"]) == 2
    assert "profile has 3 weights; this base takes 16" in capsys.readouterr().err


@cache
def charted(base: str) -> bool:
    return bool(charts(base, "linear"))


@pytest.mark.parametrize("base", bases())
def test_every_alias_has_charts_or_is_said_to_be_a_transformer(
    base: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code = main(["profiles", "linear", "--base", base])
    said = capsys.readouterr()
    if code:
        listed = said.err.partition("UNets: ")[2].partition(".")[0].split(", ")
        assert "is a transformer" in said.err
        assert base not in listed
        assert all(map(charted, listed))
    else:
        assert f"blocks of {base}" in said.out


def test_a_users_folder_is_read_and_nonsense_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny_unet("sd").save_config(tmp_path / "unet")
    assert "linear" in charts(str(tmp_path))
    assert main(["profiles", "--base", str(tmp_path / "none")]) == 3
    assert "to read its layers from" in capsys.readouterr().err
    with pytest.raises(UsageError, match="did you mean"):
        charts("sd15", "stile")
