"""Base families: told by their configuration alone; what one cannot do is said before gigabytes are read."""

import copy
import json
from pathlib import Path

import pytest
import torch
from torch import nn

from imprompt.adapter.ipadapter import IPAdapter
from imprompt.catalog import adapters, bases, bases_for
from imprompt.errors import ModelError, UsageError
from imprompt.generation.families import find_base
from imprompt.generation.pipelines import load
from layouts import PUBLISHED
from tiny import POOLED, random_adapter_state, tiny_sd, tiny_unet


def folder(place: Path, pipeline: str, **unet: int) -> Path:
    (place / "unet").mkdir(parents=True)
    (place / "model_index.json").write_text(json.dumps({"_class_name": pipeline}))
    (place / "unet" / "config.json").write_text(json.dumps(unet))
    return place


@pytest.mark.parametrize(
    ("unet", "family", "adapter", "size"),
    [
        ({"cross_attention_dim": 768}, "sd15", "sd15", 512),
        ({"cross_attention_dim": 1024}, "sd21", None, 768),
        ({"cross_attention_dim": 2048}, "sdxl", "sdxl-vit-h", 1024),
        ({"cross_attention_dim": 2048, "encoder_hid_dim": 4096}, "kolors", "kolors-plus", 1024),
    ],
)
def test_a_folders_family_and_what_it_likes(
    unet: dict[str, int], family: str, adapter: str | None, size: int, tmp_path: Path
) -> None:
    base = find_base(str(folder(tmp_path / "base", "X", **unet)))
    assert (base.family, base.defaults.adapter, base.defaults.size) == (family, adapter, size)


def test_a_folder_with_files_in_half_precision_alone_is_read(tmp_path: Path) -> None:
    pipe = tiny_sd()
    pipe.save_pretrained(tmp_path / "half", variant="fp16")
    assert not (tmp_path / "half" / "unet" / "diffusion_pytorch_model.safetensors").exists()
    loaded = load(find_base(str(tmp_path / "half")), "generate", torch.float32)
    for mine, theirs in zip(loaded.unet.parameters(), pipe.unet.parameters(), strict=True):
        assert torch.equal(mine, theirs)


def test_the_hub_id_of_a_known_base_is_as_good_as_its_alias() -> None:
    for name, row in bases().items():
        if row.repo != "bundled":
            assert find_base(row.repo).family == find_base(name).family == row.family


def test_kolors_does_not_inpaint(tmp_path: Path) -> None:
    place = folder(tmp_path / "base", "KolorsPipeline", cross_attention_dim=2048, encoder_hid_dim=4096)
    with pytest.raises((UsageError, ModelError), match="can generate and edit, not inpaint"):
        load(find_base(str(place)), "inpaint", torch.float32)


def test_text_goes_through_kolors_own_projection_and_the_image_beside_it() -> None:
    plain = tiny_unet("sdxl")
    unet = copy.deepcopy(plain)
    unet.encoder_hid_proj = nn.Linear(24, 64)
    unet.register_to_config(encoder_hid_dim_type="text_proj")
    adapter = IPAdapter.from_state_dict(random_adapter_state(plain))
    sample, text = torch.randn(1, 4, 8, 8), torch.randn(1, 5, 24)
    more = {"text_embeds": torch.randn(1, 32), "time_ids": torch.randn(1, 6)}
    drawn = []
    with torch.no_grad():
        for model, states in ((unet, text), (plain, unet.encoder_hid_proj(text))):
            adapter.attach(model).set_prompt(torch.ones(1, POOLED))
            drawn.append(model(sample, 500, states, added_cond_kwargs=more).sample)
            adapter.detach()
    torch.testing.assert_close(*drawn)


def test_the_catalogue_has_every_published_file_by_its_name() -> None:
    files = {Path(row.file).stem for row in adapters().values()} | {"instantid_ip-adapter"}
    published = {layout.name.removeprefix("kolors_") for layout in PUBLISHED}
    assert published <= files
    for name in bases_for("sdxl"):
        assert bases()[name].family == "sdxl"
    assert bases_for("other") == ()
    without = {name for name, row in adapters().items() if len(row.sha256 or "") != 64}
    listed = {"kolors-faceid-plus", "sd35-instantx", "flux-instantx", "flux-redux"}
    assert without == {"emoji", "emoji-plus"} | listed, "no listing has those hashes"


def test_an_alias_of_a_pickle_says_how_to_make_it_safe() -> None:
    with pytest.raises(ModelError, match=r"imprompt convert sd15-faceid ip-adapter-faceid_sd15\.safetensors"):
        IPAdapter.from_pretrained("sd15-faceid")
