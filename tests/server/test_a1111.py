"""The webuiapi client, unchanged, against the served bundled model."""

import asyncio
import base64
import io
import json
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
import torch
import webuiapi
from diffusers import DDIMScheduler, DDPMScheduler
from PIL import Image

import tinydit
from imprompt import catalog
from imprompt.app.server.a1111 import TextToImage, guidance_fields
from imprompt.app.server.bases import served
from imprompt.app.server.problems import Problem
from imprompt.app.server.settings import Settings
from imprompt.generation.annotate import annotate
from serving import STEPS, Running, encoded, mask, picture, start

SMALL = {"steps": STEPS, "width": 128, "height": 128, "seed": 9}


@pytest.fixture
def theirs(running: Running) -> webuiapi.WebUIApi:
    return webuiapi.WebUIApi(port=running.settings.port, sampler="Euler a")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    """A server that offers a FLUX and a model of emoji, each in a folder whose name says something else."""
    root = tmp_path_factory.mktemp("bases")
    flux = tinydit.save_base("flux", root / "my-drawings")
    other = root / "flux-like"
    other.symlink_to(catalog.ASSETS, target_is_directory=True)
    bases = {"mine": str(flux), "flux-like": str(other)}
    adapters = {"My-XLabs": str(flux / "adapters")}
    return Settings(root / "served", devices=(), bases=bases, adapters=adapters, download=True)


def opened(content: bytes) -> Image.Image:
    return Image.open(io.BytesIO(content))


def test_txt2img_draws_and_says_how(theirs: webuiapi.WebUIApi) -> None:
    found = theirs.txt2img(prompt="a cat", negative_prompt="blue", batch_size=2, **SMALL)
    assert [image.size for image in found.images] == [(128, 128)] * 2
    assert found.info["all_seeds"] == [9, 10]
    assert "Steps: 3" in found.info["infotexts"][0]
    assert "a cat" in found.image.info["parameters"]


def test_seeds_of_several_pictures_begin_again_after_the_last(client: httpx.Client) -> None:
    last = 2**53 - 1
    sent = {"prompt": "a cat", "seed": last, "steps": 1, "width": 64, "height": 64, "batch_size": 2}
    info = json.loads(client.post("/sdapi/v1/txt2img", json=sent).json()["info"])
    assert info["all_seeds"] == [last, 0]


def test_img2img_starts_from_the_picture(theirs: webuiapi.WebUIApi) -> None:
    source = opened(picture("red"))
    near = theirs.img2img(images=[source], prompt="a star", denoising_strength=0.4, **SMALL)
    far = theirs.img2img(images=[source], prompt="a star", denoising_strength=1.0, **SMALL)

    def distance(image: Image.Image) -> int:
        pairs = zip(image.convert("RGB").tobytes(), source.tobytes(), strict=True)
        return sum(abs(a - b) for a, b in pairs)

    assert distance(near.image) < distance(far.image)


def test_a_mask_is_inpainted_where_it_is_white(theirs: webuiapi.WebUIApi) -> None:
    source = opened(picture("red"))
    options = {"images": [source], "prompt": "a star", "mask_image": mask(), "mask_blur": 0, **SMALL}
    inside = theirs.img2img(**options).image.convert("RGB")
    outside = theirs.img2img(inpainting_mask_invert=1, **options).image.convert("RGB")
    assert inside.crop((0, 0, 128, 30)).tobytes() == source.crop((0, 0, 128, 30)).tobytes()
    assert outside.crop((40, 40, 88, 88)).tobytes() == source.crop((40, 40, 88, 88)).tobytes()


def test_ip_adapter_units_are_image_prompts(theirs: webuiapi.WebUIApi, running: Running) -> None:
    def unit(**options: object) -> webuiapi.ControlNetUnit:
        return webuiapi.ControlNetUnit(
            image=opened(picture("blue")), module="ip-adapter-auto", model="emoji-plus [1234abcd]", **options
        )

    plain = theirs.txt2img(prompt="an owl", **SMALL)
    shown = theirs.txt2img(prompt="an owl", controlnet_units=[unit(weight=0.8)], **SMALL)
    late = theirs.txt2img(prompt="an owl", controlnet_units=[unit(weight=0.8, guidance_start=0.5)], **SMALL)
    assert len({image.image.tobytes() for image in (plain, shown, late)}) == 3
    with running.client() as client:
        request = client.get("/api/v1/history?limit=1").json()["jobs"][0]["request"]
    prompt = request["images"][0]
    assert (prompt["adapter"], prompt["scale"], prompt["start"]) == ("emoji-plus", 0.8, 0.5)


def test_control_units_are_followed(theirs: webuiapi.WebUIApi) -> None:
    pytest.importorskip("cv2")
    unit = webuiapi.ControlNetUnit(image=opened(picture("black")), module="canny", weight=1.0)
    plain = theirs.txt2img(prompt="a star", **SMALL)
    followed = theirs.txt2img(prompt="a star", controlnet_units=[unit], **SMALL)
    assert plain.image.tobytes() != followed.image.tobytes()


@pytest.mark.parametrize(
    ("mode", "favor"),
    [
        ("Balanced", "balanced"), ("My prompt is more important", "prompt"),
        ("ControlNet is more important", "control"), (0, "balanced"), (1, "prompt"), (2, "control"),
    ],
)  # fmt: skip
def test_control_modes_are_what_a_control_favours(running: Running, mode: str | int, favor: str) -> None:
    unit = {"module": "none", "model": "emoji-canny", "image": SHOWN, "control_mode": mode}
    with running.client() as client:
        answer = client.post("/sdapi/v1/txt2img", json={"prompt": "a star", **SMALL, **units(**unit)})
        assert answer.status_code == 200, answer.text
        request = client.get("/api/v1/history?limit=1").json()["jobs"][0]["request"]
    assert [control["favor"] for control in request["controls"]] == [favor]


def test_lists_and_options(theirs: webuiapi.WebUIApi) -> None:
    assert "Euler a" in theirs.util_get_sampler_names()
    assert "karras" in theirs.util_get_scheduler_names()
    assert theirs.util_get_model_names() == ["emoji"]
    assert theirs.util_get_current_model() == "emoji"
    theirs.util_set_model("emoji")
    assert theirs.get_loras() == []
    assert theirs.get_progress()["progress"] == 0
    assert theirs.interrupt() == {}
    assert "emoji-plus" in theirs.controlnet_model_list()
    assert "canny" in theirs.controlnet_module_list()


def test_png_info_reads_what_was_drawn(theirs: webuiapi.WebUIApi) -> None:
    drawn = theirs.txt2img(prompt="a cat", **SMALL).image
    assert "Seed: 9" in theirs.png_info(drawn).info


SHOWN = base64.b64encode(picture()).decode()


def units(**unit: object) -> dict[str, object]:
    return {"alwayson_scripts": {"ControlNet": {"args": [unit]}}}


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"enable_hr": True}, "enable_hr"),
        ({"sampler_name": "DPM fast"}, "sampler_name"),
        ({"seed": "many"}, "seed"),
        ({"override_settings": {"sd_model_checkpoint": "../../etc"}}, "base"),
        (units(module="ip-adapter-auto", ipadapter_input=["gASV"]), "ipadapter_input"),
        (units(module="canny", image="http://x/y.png"), "image"),
        ({"prompt": "a cat <lora:nobody:1>"}, "loras.path"),
        (units(module="ip-adapter_clip_sd15", model="nonexistent", image=SHOWN), "model"),
        (units(module="canny", image=SHOWN, resize_mode="nonsense"), "resize_mode"),
        (units(module="canny", image=SHOWN, control_mode=3), "control_mode"),
        (units(module="canny", image=SHOWN, control_mode="My prompt"), "control_mode"),
        (units(module="canny", image=SHOWN, threshold_a=20), "threshold_a"),
        (units(module="canny", image=SHOWN, processor_res=300), "processor_res"),
        (units(module="canny", image=SHOWN, mask=SHOWN), "mask"),
        (units(weight="much"), "alwayson_scripts.controlnet.args.0.weight"),
        ({"override_settings": {"CLIP_stop_at_last_layers": 2}}, "CLIP_stop_at_last_layers"),
        ({"sampler_name": "DPM++ 2M", "scheduler": "exponential"}, "scheduler"),
        ({"sampler_name": "Euler", "scheduler": "karras"}, "scheduler"),
        ({"scheduler": "nonsense"}, "scheduler"),
        ({"alwayson_scripts": {"x": {"args": {"a": 1}}}}, "alwayson_scripts.x"),
        ({"alwayson_scripts": {"x": {"args": 5}}}, "alwayson_scripts.x"),
        ({"alwayson_scripts": {"controlnet": 5}}, "alwayson_scripts.controlnet"),
        ({"batch_size": -1, "n_iter": -2}, "batch_size"),
        ({"sampler_name": "DDIM", "eta": 0.5}, "eta"),
        ({"s_churn": 5}, "s_churn"),
        ({"s_noise": 0.9}, "s_noise"),
        ({"seed_resize_from_h": 512}, "seed_resize_from_h"),
        ({"override_settings": {"sd_vae": "other.safetensors"}}, "sd_vae"),
        ({"override_settings": {"token_merging_ratio": 0.5}}, "token_merging_ratio"),
        ({"override_settings": {"sd_model_chekpoint": "emoji"}}, "sd_model_chekpoint"),
        ({"override_settings": {"forge_additional_modules": ["ae.safetensors"]}}, "forge_additional_modules"),
    ],
)
def test_what_is_not_here_is_refused(client: httpx.Client, change: dict, field: str) -> None:
    answer = client.post("/sdapi/v1/txt2img", json={"prompt": "a cat", **SMALL, **change})
    assert answer.status_code in (404, 422)
    assert answer.json()["field"] == field


def test_what_their_programs_send_unasked_is_accepted(client: httpx.Client) -> None:
    pytest.importorskip("cv2")
    unit = {"module": "canny", "image": SHOWN, "control_mode": "Balanced", "threshold_a": 100, "mask": None}
    unset = {
        "scheduler": "Automatic",
        "override_settings": {"CLIP_stop_at_last_layers": 1},
        "sampler_name": None,
    }
    for more in (
        unset,
        {"scheduler": "Use same scheduler", "sampler_name": "Euler", "eta": 0.7, "s_churn": 0, "s_noise": 1},
        {
            "override_settings": {
                "sd_vae": "Automatic",
                "samples_format": "jpg",
                "live_previews_enable": True,
                "s_noise": 1.0,
                "token_merging_ratio": 0,
                "forge_additional_modules": [],
                "eta_noise_seed_delta": 0,
            },
            "seed_resize_from_w": -1,
        },
        {
            "scheduler": "Karras",
            "sampler_name": "DPM++ 2M",
            **units(**unit, processor_res=512, threshold_b=64),
        },
    ):
        answer = client.post("/sdapi/v1/txt2img", json={"prompt": "a cat", **SMALL, "steps": 1, **more})
        assert answer.status_code == 200, answer.text


def test_a_picture_of_other_proportions_is_squashed_cropped_or_filled_up(client: httpx.Client) -> None:
    pytest.importorskip("cv2")
    long = base64.b64encode(picture(size=(384, 128))).decode()
    drawn = {}
    for mode in (None, 0, 1, 2):
        body = {"prompt": "a star", "init_images": [long], "resize_mode": mode, **SMALL}
        drawn[mode] = client.post("/sdapi/v1/img2img", json=body).json()["images"][0]
        unit = units(module="canny", image=long, resize_mode=mode)
        body = {"prompt": "a star", **SMALL, **unit}
        drawn["unit", mode] = client.post("/sdapi/v1/txt2img", json=body).json()["images"][0]
    assert drawn[None] == drawn[0]  # theirs
    assert drawn["unit", None] == drawn["unit", 1]
    assert len(set(drawn.values())) == 6
    latent = {"prompt": "a star", "init_images": [long], "resize_mode": 3, **SMALL}
    assert client.post("/sdapi/v1/img2img", json=latent).json()["field"] == "resize_mode"


def test_a_mask_goes_with_its_squashed_picture(client: httpx.Client) -> None:
    long, where = picture("green", (256, 128)), encoded(mask((256, 128)))
    sent = [base64.b64encode(content).decode() for content in (long, where)]
    body = {"prompt": "a star", "init_images": sent[:1], "mask": sent[1], "mask_blur": 0, **SMALL}
    answer = client.post("/sdapi/v1/img2img", json=body)
    drawn = opened(base64.b64decode(answer.json()["images"][0])).convert("RGB")
    source = opened(long).resize((128, 128), Image.Resampling.LANCZOS)
    assert drawn.crop((0, 0, 30, 128)).tobytes() == source.crop((0, 0, 30, 128)).tobytes()


def test_a_wrong_strength_is_told_by_the_name_it_was_sent_under(client: httpx.Client) -> None:
    body = {"prompt": "a star", "init_images": [SHOWN], **SMALL, "steps": 4, "denoising_strength": 0.05}
    answer = client.post("/sdapi/v1/img2img", json=body)
    assert (answer.status_code, answer.json()["field"]) == (400, "denoising_strength")
    assert answer.json()["detail"].startswith("denoising_strength: ")


@pytest.mark.parametrize(
    ("base", "sent", "wanted"),
    [
        ("emoji", {}, {"guidance": 7.0, "negative": "blue"}),
        ("emoji", {"cfg_scale": 1, "distilled_cfg_scale": 3.5}, {"guidance": 1.0}),
        ("flux", {}, {"guidance": None, "true_guidance": None}),
        ("flux", {"cfg_scale": 1, "distilled_cfg_scale": 3.5}, {"guidance": 3.5, "true_guidance": None}),
        ("flux", {"cfg_scale": 2}, {"guidance": None, "true_guidance": 2.0, "negative": "blue"}),
        ("mine", {"cfg_scale": 2}, {"guidance": None, "true_guidance": 2.0, "negative": "blue"}),
        ("flux-like", {}, {"guidance": 7.0, "negative": "blue"}),
    ],
)
def test_flux_is_guided_as_forge_means_it(base: str, sent: dict, wanted: dict, folders: Settings) -> None:
    """A folder by what it says it is, not by its name."""
    body = TextToImage(negative_prompt="blue", **sent)
    assert guidance_fields(body, asyncio.run(served(base, folders))) == wanted


def test_euler_is_a_flow_bases_own_scheduler_and_added_adapters_go_by_their_names(folders: Settings) -> None:
    running = start(folders, ready=False)
    body = {"prompt": "a cat", "sampler_name": "Euler", "cfg_scale": 1, "distilled_cfg_scale": 4}
    headers = {"X-Client-Id": "forge"}
    try:
        with running.client(headers=headers) as client, ThreadPoolExecutor(1) as beside:
            shown = {"model": "My-XLabs", "image": base64.b64encode(picture()).decode()}
            chosen = {"override_settings": {"sd_model_checkpoint": "mine"}, **units(**shown)}
            beside.submit(client.post, "/sdapi/v1/txt2img", json={**body, **chosen})
            end = time.monotonic() + 60
            while not (jobs := running.queue.unfinished("127.0.0.1 forge")) and time.monotonic() < end:
                time.sleep(0.05)
            request = jobs[0].request
            httpx.post(f"{running.url}/sdapi/v1/interrupt", headers=headers)
        assert (request.scheduler, request.guidance, request.true_guidance) == (None, 4, None)
        assert [prompt.adapter for prompt in request.images] == ["My-XLabs"]
    finally:
        running.stop()


def test_a_base_that_cannot_be_read_is_refused_before_a_job_is_made(tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text('{"_class_name": "OtherPipeline"}')
    with pytest.raises(Problem, match="OtherPipeline"):
        asyncio.run(served("odd", Settings(tmp_path, bases={"odd": str(tmp_path)})))


def test_skipping_layers_for_all_pictures_is_refused_as_for_one(client: httpx.Client) -> None:
    answer = client.post("/sdapi/v1/options", json={"CLIP_stop_at_last_layers": 2})
    assert (answer.status_code, answer.json()["field"]) == (422, "CLIP_stop_at_last_layers")
    assert client.post("/sdapi/v1/options", json={"CLIP_stop_at_last_layers": 1}).status_code == 200


@pytest.mark.parametrize(
    ("sampler", "eta", "scheduler"),
    [
        ("DDIM", None, "ddim"), ("DDIM", 0, "ddim"), ("DDIM", 1, "ddpm"), ("Euler a", 1, "euler-a"),
        ("Euler a", 0, "euler"), ("DPM++ 2M", 0.3, "dpm++2m"), ("UniPC", 1, "unipc"),
    ],
)  # fmt: skip
def test_eta_acts_where_a_sampler_has_one(
    client: httpx.Client, sampler: str, eta: float | None, scheduler: str
) -> None:
    body = {"prompt": "a cat", **SMALL, "steps": 2, "sampler_name": sampler, "eta": eta}
    answer = client.post("/sdapi/v1/txt2img", json=body)
    assert answer.status_code == 200, answer.text
    assert json.loads(answer.json()["info"])["sampler_name"] == scheduler


def test_the_noise_that_is_left_out_or_added_is_eta() -> None:
    """DDIM with an eta of 1 and DDPM take equal steps; ancestral steps without noise are Euler's."""
    options = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
    ddim = DDIMScheduler(**options, set_alpha_to_one=False, clip_sample=False)
    ddpm = DDPMScheduler(**options, timestep_spacing="leading", clip_sample=False)
    drawn = []
    for scheduler, more in ((ddim, {"eta": 1.0}), (ddpm, {})):
        scheduler.set_timesteps(10)
        random, latents = torch.Generator().manual_seed(0), torch.ones(1, 4, 8, 8)
        for step in scheduler.timesteps[:-1]:
            latents = scheduler.step(latents * 0.9, step, latents, generator=random, **more).prev_sample
        drawn.append(latents)
    torch.testing.assert_close(*drawn, atol=1e-4, rtol=1e-4)


def test_a_mask_may_be_blurred_in_one_direction(client: httpx.Client) -> None:
    where = encoded(mask((128, 128)))
    body = {"prompt": "a star", "init_images": [SHOWN], "mask": base64.b64encode(where).decode(), **SMALL}

    def drawn(**blur: float) -> str:
        return client.post("/sdapi/v1/img2img", json={**body, **blur}).json()["images"][0]

    both, wide = drawn(mask_blur=9), drawn(mask_blur_x=9, mask_blur_y=0)
    assert len({both, wide, drawn(mask_blur=0)}) == 3
    assert both == drawn(mask_blur_x=9, mask_blur_y=9)
    answer = client.post("/sdapi/v1/img2img", json={**body, "inpainting_fill": 2})
    assert (answer.status_code, answer.json()["field"]) == (422, "inpainting_fill")


def test_what_is_an_option_of_theirs_alone_is_not_set_silently(client: httpx.Client) -> None:
    known = client.get("/sdapi/v1/options").json()
    assert client.post("/sdapi/v1/options", json=known).status_code == 200
    answer = client.post("/sdapi/v1/options", json={"img2img_color_correction": True})
    assert (answer.status_code, answer.json()["field"]) == (422, "img2img_color_correction")


def test_control_types_name_preprocessors_and_models(client: httpx.Client) -> None:
    types = client.get("/controlnet/control_types").json()["control_types"]
    lists = {name: client.get(f"/controlnet/{name}").json()[name] for name in ("module_list", "model_list")}
    assert types["All"] == lists | {"default_option": "none", "default_model": "None"}
    assert types["Canny"]["module_list"] == ["none", "canny"]
    assert "emoji-canny" in types["Canny"]["model_list"]
    assert "emoji-canny" not in types["Depth"]["model_list"]
    assert "emoji-plus" in types["IP-Adapter"]["model_list"]
    for found in types.values():
        assert set(found["module_list"]) <= set(lists["module_list"])
        assert set(found["model_list"]) <= set(lists["model_list"])
        assert found["default_option"] in found["module_list"]


def test_a_map_is_detected_as_a_drawing_follows_it(client: httpx.Client) -> None:
    pytest.importorskip("cv2")
    asked = {"controlnet_module": "canny", "controlnet_input_images": [SHOWN, SHOWN]}
    theirs = {"controlnet_processor_res": 512, "controlnet_threshold_a": 64, "controlnet_threshold_b": 64}
    answer = client.post("/controlnet/detect", json={**asked, **theirs})
    assert answer.status_code == 200, answer.text
    found = [opened(base64.b64decode(image)) for image in answer.json()["images"]]
    expected = annotate("canny", opened(picture()).convert("RGB"))
    assert [image.convert("RGB").tobytes() for image in found] == [expected.convert("RGB").tobytes()] * 2
    for change, field in (
        ({"controlnet_module": "openpose"}, "controlnet_module"),
        ({"controlnet_module": "nonsense"}, "controlnet_module"),
        ({"controlnet_threshold_a": 20}, "controlnet_threshold_a"),
        ({"controlnet_processor_res": 300}, "controlnet_processor_res"),
        ({"controlnet_masks": [SHOWN]}, "controlnet_masks"),
        ({"controlnet_input_images": []}, "controlnet_input_images"),
        ({"controlnet_input_images": ["no picture"]}, "controlnet_input_images"),
    ):
        answer = client.post("/controlnet/detect", json={**asked, **change})
        assert (answer.status_code, answer.json()["field"]) == (422, field)


def test_an_unknown_sampler_is_told_which_there_are(client: httpx.Client) -> None:
    answer = client.post("/sdapi/v1/txt2img", json={"prompt": "a cat", "sampler_name": "DPM fast"})
    known = "sampler_name: 'DPM fast' is not here; known are Euler, Euler a, DDIM"
    assert answer.json()["detail"].startswith(known)
