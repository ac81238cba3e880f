"""Real training of tiny adapters: it learns, resumes bit for bit, and says what is wrong."""

import fcntl
import gc
import json
import math
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from itertools import chain
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
import safetensors.torch
import torch
from diffusers import (
    AutoencoderKL,
    DDPMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from PIL import Image
from safetensors.torch import load_file
from torch.nn.modules.module import register_module_forward_pre_hook
from transformers import CLIPTextModel, CLIPVisionModelWithProjection

import tiny
from compiled import run_killed, run_unchecked
from facemodels import pack
from imprompt.adapter.backbones.unet import cross_attentions
from imprompt.adapter.ipadapter import IPAdapter
from imprompt.app.cli import main
from imprompt.data.read import read_dataset
from imprompt.data.rows import Dataset
from imprompt.errors import InputError, ModelError, UsageError
from imprompt.training import preview
from imprompt.training.cache import fingerprint
from imprompt.training.folder import WEIGHT_NAME, RunFolder
from imprompt.training.launch import make_accelerator
from imprompt.training.objective import (
    drop_features,
    learning_rate,
    loss_weights,
    prediction_target,
    stratified_timesteps,
)
from imprompt.training.samples import Sample
from imprompt.training.trainer import Trainer, train
from single_file import save_single_file


@pytest.fixture
def cache(shared_cache):
    return shared_cache


def log_of(config):
    return [json.loads(line) for line in (config.output / "log.jsonl").read_text().splitlines()]


def opened(config):
    """A trainer that has taken no step yet."""
    folder = RunFolder(config.output, resume=False)
    folder.open()
    return Trainer(config, make_accelerator(config), folder)


def same(first, second):
    """Whether two adapter files hold the very same weights (the order of a file's metadata is free)."""
    one, other = load_file(first), load_file(second)
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_the_loss_with_the_image_falls_and_the_gap_opens(make_config):
    config = make_config(
        steps=30, lr=1e-2, batch=4, validate_every=30, ema=0.0, latent="mean", drop_text=0, drop_both=0,
        drop_image=0,
    )  # fmt: skip
    train(config)
    first, last = (record for record in log_of(config) if "gap" in record)
    assert last["validation_with_image"] < 0.97 * first["validation_with_image"]
    assert last["gap"] > first["gap"] + 0.005


@pytest.mark.parametrize("kind", ["linear", "resampler"])
def test_the_file_is_the_published_layout_and_diffusers_reads_it(make_config, base, kind):
    path = train(make_config(kind=kind))
    keys = load_file(path)
    layers = len([name for name in tiny.tiny_unet().attn_processors if "attn2" in name])
    assert sum(name.endswith("to_k_ip.weight") for name in keys) == layers
    assert all(name.startswith(("image_proj.", "ip_adapter.")) for name in keys)
    assert {tensor.dtype for tensor in keys.values()} == {torch.float16}
    pipe = StableDiffusionPipeline.from_pretrained(base)
    pipe.set_progress_bar_config(disable=True)
    pipe.load_ip_adapter(str(path.parent), subfolder="", weight_name=path.name, image_encoder_folder=None)
    image = pipe("a", ip_adapter_image=tiny.picture(1), num_inference_steps=1, output_type="pt").images
    assert image.isfinite().all()


def stops(number, at=3):
    """Sends this process a signal after step ``at``."""
    return lambda step: os.kill(os.getpid(), number) if step == at else None


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_stopped_run_leaves_a_usable_adapter_and_goes_on_bit_for_bit(make_config, mixed, whole, number):
    config = make_config(**mixed)
    before = signal.getsignal(number)
    with pytest.raises(KeyboardInterrupt):
        train(config, on_step=stops(number))
    assert signal.getsignal(number) is before
    assert IPAdapter.from_pretrained(config.output).checkpoint.metadata["imprompt.step"] == "3"
    if number != signal.SIGTERM:  # what was left does not tell the signals apart
        return
    resumed = train(config.model_copy(update={"resume": True}))
    assert same(resumed, whole)
    losses = [
        [record["loss"] for record in log_of(make_config(output=folder)) if "loss" in record]
        for folder in (whole.parent, config.output)
    ]
    assert losses[0] == losses[1]


KILLED = """
import os, signal, sys
from imprompt.training import TrainConfig, train
train(TrainConfig.read(sys.argv[1]), on_step=lambda step: step < 3 or os.kill(os.getpid(), signal.SIGKILL))
"""


@pytest.mark.xdist_group("compiled")
def test_a_killed_run_goes_on_bit_for_bit_even_from_a_torn_log_and_a_damaged_checkpoint(
    make_config, tmp_path, mixed, whole
):
    config = make_config(output=tmp_path / "killed", checkpoint_every=1, **mixed)
    (tmp_path / "run.json").write_text(config.model_dump_json())
    run_killed(KILLED, tmp_path / "run.json")
    with (config.output / "log.jsonl").open("a") as log:
        log.write('{"step": 3, "lo')
    newest = max(config.output.glob("checkpoint-*.safetensors"))
    content = bytearray(newest.read_bytes())
    content[-5] ^= 3
    newest.write_bytes(content)
    assert same(train(config.model_copy(update={"resume": True})), whole)
    assert [record["step"] for record in log_of(config) if "loss" in record] == [1, 2, 3, 4, 5, 6]


def test_a_run_that_crashed_before_its_first_checkpoint_begins_anew_with_an_empty_log(make_config):
    def crash(step):
        if step == 2:
            raise OSError("the power went")

    with pytest.raises(OSError, match="power"):
        train(make_config(), on_step=crash)
    train(make_config(resume=True))
    assert [record["step"] for record in log_of(make_config()) if "loss" in record] == [1, 2, 3, 4]
    assert [record["step"] for record in log_of(make_config()) if "gap" in record] == [0, 4]


def test_a_run_whose_checkpoints_are_all_damaged_says_so(make_config):
    config = make_config(steps=2, checkpoint_every=1)
    train(config)
    for path in config.output.glob("checkpoint-*.safetensors"):
        path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ModelError, match=r"every checkpoint .* SHA-256"):
        train(make_config(steps=2, checkpoint_every=1, resume=True))


def test_a_run_record_or_a_manifest_that_is_damaged_is_one_line(make_config):
    config = make_config(steps=1)
    train(config)
    (manifest,) = config.output.glob("checkpoint-*.json")
    whole = manifest.read_text()
    for damage in ("[]", "{}", "", json.dumps(json.loads(whole) | {"skipped": None})):
        manifest.write_text(damage)
        with pytest.raises(ModelError, match="every checkpoint"):
            train(config.replace(resume=True))
    manifest.write_text(whole)
    with (config.output / "log.jsonl").open("a") as log:
        log.write('{"step": null}\n')
    train(config.replace(resume=True))
    for damage in ("[]", "{", "\0"):
        (config.output / "run.json").write_text(damage)
        with pytest.raises(ModelError, match=r"run\.json"):
            train(config.replace(resume=True))


def test_the_scale_of_a_float16_runs_loss_is_resumed(make_config):
    """With another scale the first steps overflow and are skipped, or the least gradients are lost."""

    def trainer(resume):
        config = make_config(steps=3, checkpoint_every=1, resume=resume)
        accelerator = make_accelerator(config)
        accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=64.0, growth_interval=2)
        folder = RunFolder(config.output, resume=resume)
        folder.open()
        return Trainer(config, accelerator, folder), folder, accelerator.scaler

    begun, folder, scaler = trainer(False)
    begun.run()
    folder.close()
    assert scaler.get_scale() == 128
    _, folder, resumed = trainer(True)
    folder.close()
    assert resumed.state_dict() == scaler.state_dict()


@pytest.mark.parametrize(
    ("name", "says"), [("tensorbord", "there is no 'tensorbord'; accelerate has .*tensorboard"),
                       ("json", "there is no 'json'"), ("a.b", "there is no 'a.b'"), ("", "there is no ''"),
                       ("all", "there is no 'all'"), ("aim", "not installed: pip install aim")],
)  # fmt: skip
def test_a_tracker_that_is_none_is_refused_not_recommended(make_config, name, says):
    with pytest.raises(UsageError, match=says):
        make_accelerator(make_config(trackers=[name]))


def test_to_resume_what_never_began_is_noted(make_config, capsys):
    train(make_config(steps=1, resume=True, quiet=False))
    assert "there is no checkpoint in" in capsys.readouterr().err


@pytest.mark.slow
def test_two_processes_of_4_learn_what_one_of_8_learns(make_config, tmp_path):
    """The same samples; only sums run in another order. accelerate's launcher alone would start one."""
    one = make_config(output=tmp_path / "one", batch=4, steps=5, save_dtype="float32", log_every=5)
    two = make_config(output=tmp_path / "two", batch=2, steps=5, save_dtype="float32", log_every=5)
    (tmp_path / "two.json").write_text(two.model_dump_json())
    command = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--cpu"]
    command += ["--num_processes", "2", "-m", "imprompt", "train"]
    done = subprocess.run([*command, tmp_path / "two.json"], capture_output=True, check=False, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads((two.output / "run.json").read_text())["samples_per_step"] == 4
    first, second = load_file(train(one)), load_file(two.output / WEIGHT_NAME)
    assert all(torch.allclose(first[name], second[name], atol=2e-5) for name in first)
    with pytest.raises(UsageError, match=r"a step was 4 samples, now .* is 2"):
        train(make_config(output=tmp_path / "two", batch=2, steps=5, save_dtype="float32", resume=True))


def test_rows_of_ones_own_give_the_weights_that_the_same_pictures_in_a_folder_give(
    make_config, pictures, mixed, whole, tmp_path
):
    """Wherever the pictures come from and whatever they are called."""
    rows = read_dataset(pictures).rows
    mine = [
        replace(row, file=Path(f"mine/{number}"), content=row.file.read_bytes)
        for number, row in enumerate(rows)
    ]
    config = make_config(data="my pictures", output=tmp_path / "mine", **mixed)
    assert same(train(config, data=Dataset(mine)), whole)
    assert [record["loss"] for record in log_of(config) if "loss" in record] == [
        record["loss"] for record in log_of(make_config(output=whole.parent)) if "loss" in record
    ]
    with pytest.raises(UsageError, match="there were 7 pictures, now 6"):
        train(config.replace(resume=True), data=Dataset(mine[1:]))


def test_rows_of_ones_own_are_checked_as_those_of_a_folder_are(make_config, pictures):
    rows = read_dataset(pictures).rows
    with pytest.raises(InputError, match="no row of 'my pictures' has the tag 'core'"):
        train(make_config(data="my pictures", only="core"), data=Dataset(rows))
    with pytest.raises(InputError, match="none of the 7 pictures of 'my pictures' has a caption"):
        train(make_config(data="my pictures"), data=Dataset([replace(row, captions={}) for row in rows]))


def test_a_resumed_run_that_is_refused_keeps_the_cache_of_the_run_it_is_not(make_config):
    config = make_config(steps=1, cache=None)
    train(config)
    before = set(config.cache_folder.rglob("*.safetensors"))
    with pytest.raises(UsageError, match="resolution was None, is 16"):
        train(make_config(steps=1, cache=None, resume=True, resolution=16))
    assert before <= set(config.cache_folder.rglob("*.safetensors"))
    train(make_config(steps=1, cache=None, resume=True))
    assert before == set(config.cache_folder.rglob("*.safetensors"))


def test_held_out_pictures_do_not_touch_the_weights(make_config, pictures, plain, tmp_path):
    tiny.picture(99, (40, 32)).save(pictures / "6.png")
    assert same(train(make_config(output=tmp_path / "second")), plain)
    tiny.picture(98, (40, 32)).save(pictures / "5.png")  # a training picture does
    assert not same(train(make_config(output=tmp_path / "third")), plain)


def test_the_base_is_left_as_it_was(make_config, base):
    config = make_config()
    trainer = opened(config)
    trainer.run()
    fresh = StableDiffusionPipeline.from_pretrained(base).unet
    assert fingerprint(trainer.unet) == fingerprint(fresh)
    assert not trainer.unet.training
    trainer.finish()
    assert not trainer.unet._forward_pre_hooks


def test_a_dropped_image_is_a_zero_embedding_so_only_the_bias_learns(make_config):
    config = make_config(
        drop_text=0, drop_image=1, drop_both=0, weight_decay=0, lr=1e-2, ema=0, save_dtype="float32"
    )
    trainer = opened(config)
    before = {name: value.clone() for name, value in trainer.adapter.state_dict()["image_proj"].items()}
    trainer.run()
    after = trainer.adapter.state_dict()["image_proj"]
    assert torch.equal(after["proj.weight"], before["proj.weight"])
    assert not torch.equal(after["proj.bias"], before["proj.bias"])


def test_dropped_rows_become_the_negative_and_the_others_stay():
    features, negative = torch.rand(3, 5, 4), torch.rand(1, 5, 4)
    out = drop_features(features, negative, torch.tensor([False, True, False]))
    assert torch.equal(out[1], negative[0])
    assert torch.equal(out[[0, 2]], features[[0, 2]])


def test_the_negative_of_a_resampler_is_the_encoded_zero_tensor(make_config, base):
    config = make_config(kind="resampler")
    trainer = opened(config)
    encoder = StableDiffusionPipeline.from_pretrained(base).image_encoder
    side = encoder.config.image_size
    with torch.no_grad():
        expected = encoder(torch.zeros(1, 3, side, side), output_hidden_states=True).hidden_states[-2]
    assert torch.allclose(trainer.data.negative["hidden"], expected, atol=1e-6)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_targets_are_what_the_scheduler_says(kind):
    clean, noise = torch.randn(4, 4, 8, 8), torch.randn(4, 4, 8, 8)
    scheduler = DDPMScheduler(beta_schedule="scaled_linear", prediction_type=kind, clip_sample=False)
    steps = torch.tensor([1, 200, 600, 998])
    target = prediction_target(kind, clean, noise, scheduler.alphas_cumprod[steps])
    if kind == "v_prediction":
        assert torch.allclose(target, scheduler.get_velocity(clean, noise, steps), atol=1e-6)
    noisy = scheduler.add_noise(clean, noise, steps)
    for place, step in enumerate(steps):
        result = scheduler.step(target[place : place + 1], int(step), noisy[place : place + 1])
        assert torch.allclose(result.pred_original_sample[0], clean[place], atol=2e-3)


def test_an_unknown_prediction_type_is_an_error():
    with pytest.raises(ModelError, match="flow"):
        prediction_target("flow", torch.zeros(1), torch.zeros(1), torch.ones(1))


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_min_snr_weighs_the_clean_pictures_error_the_same_for_every_prediction(kind):
    """The weight on the model's own error, turned into one on the clean picture's, is min(SNR, γ)."""
    alpha_bar = torch.tensor([0.999, 0.9, 0.5, 0.1, 0.004], dtype=torch.float64)
    snr = alpha_bar / (1 - alpha_bar)
    # One unit of error in the prediction is so much squared error in the clean picture:
    per_error = {"epsilon": 1 / snr, "v_prediction": 1 - alpha_bar, "sample": torch.ones_like(snr)}[kind]
    weights = loss_weights(kind, alpha_bar, 5.0)
    assert torch.allclose(weights / per_error, snr.clamp(max=5.0))
    assert torch.equal(loss_weights(kind, alpha_bar, None), torch.ones_like(alpha_bar))


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_min_snr_is_finite_at_zero_terminal_snr(kind):
    assert loss_weights(kind, torch.tensor([0.0, 0.5]), 5.0).isfinite().all()


def test_a_v_prediction_base_trains_on_v(make_config, base, tmp_path):
    """With the noise taken for the target, the loss of a zero output would be 1 at every timestep."""
    folder = tmp_path / "v-base"
    shutil.copytree(base, folder)
    settings = folder / "scheduler" / "scheduler_config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"prediction_type": "v_prediction"}))
    config = make_config(base=str(folder))
    trainer = opened(config)
    trainer.unet.forward = lambda noisy, *_, **__: (torch.zeros_like(noisy),)
    clean, noise = torch.full((1, 4, 16, 16), 3.0), torch.ones(1, 4, 16, 16)
    sample = Sample(
        clean, noise, torch.tensor([500]), trainer.data.negative, trainer.data.text("states", [""]), {}
    )
    alpha = trainer.alpha_bar[500]
    assert trainer.error(sample).item() == pytest.approx(
        float((alpha.sqrt() - 3 * (1 - alpha).sqrt()) ** 2), rel=1e-4
    )


@pytest.mark.parametrize("kind", ["linear", "plus", "full"])
def test_every_kind_draws_samples_and_a_run_may_start_from_a_run(make_config, tmp_path, kind):
    config = make_config(kind=kind, steps=2, sample_every=2, output=tmp_path / kind)
    train(config)
    assert (config.output / "samples" / "00000002.png").is_file()
    read = IPAdapter.from_pretrained(config.output)
    assert read.checkpoint.metadata["imprompt.image_encoder"].endswith("image_encoder")
    card = (config.output / "README.md").read_text()
    assert "bare base" in card
    assert "trained on 6 pictures" in card  # one of the seven is held out
    assert "samples/00000002.png" in card
    page = (config.output / "card.html").read_text()
    assert page.count("data:image/png;base64,") == 2  # the sheets before and after
    assert page.count("<polyline") == 3
    about = read.checkpoint.metadata
    assert json.loads(about["imprompt.settings"])["steps"] == 2
    assert json.loads(about["imprompt.validation"])["step"] == 2
    again = make_config(init=str(config.output), steps=1, output=tmp_path / "again", lr=1e-9)
    assert again.kind is None
    after = load_file(train(again))
    before = load_file(config.output / WEIGHT_NAME)
    assert all(torch.allclose(after[name], before[name], atol=1e-3) for name in before)


@pytest.mark.parametrize(
    ("kind", "variant", "cache"), [("faceid", "faceid", "none"), ("faceid-plus", "faceid-plusv2", None)]
)
@pytest.mark.usefixtures("face_pictures")
def test_a_face_adapter_trains_on_the_largest_face_with_its_lora(make_config, tmp_path, kind, variant, cache):
    """Pictures without a face are left out; the file is a FaceID file, and its LoRA has learned."""
    config = make_config(
        kind=kind, face_model=str(pack(tmp_path / "pack")), lora_rank=4, steps=2, lr=1e-2, sample_every=2,
        cache=cache,
    )  # fmt: skip
    path = train(config)
    read = IPAdapter.from_pretrained(path)
    assert (read.checkpoint.variant.name, read.checkpoint.tokens) == (variant, 4)
    ups = {name: tensor for name, tensor in load_file(path).items() if "lora.up" in name}
    assert len(ups) == 4 * 2 * len(cross_attentions(tiny.tiny_unet()))
    assert all(tensor.any() for tensor in ups.values())
    (left_out,) = (config.output / "rejected.txt").read_text().splitlines()
    assert "2.png: no face" in left_out
    with pytest.raises(UsageError, match="face_model"):
        train(make_config(kind=kind, output=tmp_path / "b"))


def test_a_run_may_start_from_anothers_checkpoint(make_config, exact):
    first = load_file(exact)
    (checkpoint,) = exact.parent.glob("checkpoint-*.safetensors")
    second = make_config(init=str(checkpoint), steps=1, lr=1e-12, save_dtype="float32")
    after = load_file(train(second))
    assert all(torch.allclose(after[name], first[name], atol=1e-6) for name in first)


def test_a_start_named_as_a_checkpoint_may_be_an_adapter_and_a_damaged_one_is_one_line(
    make_config, exact, tmp_path
):
    """Other programs call their adapters so as well."""
    (folder := tmp_path / "theirs").mkdir()
    shutil.copy(exact, folder / "checkpoint-9.safetensors")
    config = make_config(init=str(folder), steps=1, lr=1e-12, weight_decay=0, save_dtype="float32")
    before, after = load_file(exact), load_file(train(config))
    assert all(torch.allclose(before[name], after[name], atol=1e-6) for name in before)
    for name in ("checkpoint-9.safetensors", "checkpoint-10.bin"):
        (folder / name).write_bytes(exact.read_bytes()[:500])
        with pytest.raises(ModelError, match=name):
            train(make_config(init=str(folder / name), output=tmp_path / "again"))


def test_a_run_folder_is_a_name_and_its_encoder_is_found_on_a_base_without_one(make_config, tmp_path, capsys):
    encoder, processor = tiny.tiny_encoder()
    encoder.save_pretrained(tmp_path / "seeing")
    processor.save_pretrained(tmp_path / "seeing")
    tiny.tiny_sd().save_pretrained(tmp_path / "plain")
    plain = {"base": str(tmp_path / "plain"), "image_encoder": str(tmp_path / "seeing")}
    config = make_config(steps=1, **plain)
    train(config)
    tiny.picture(3).save(tmp_path / "a.png")
    words = ["--image", str(tmp_path / "a.png"), "--base", plain["base"], "--adapter", str(config.output)]
    assert main(["generate", "a", *words, "--steps", "1", "-o", str(tmp_path / "b.png")]) == 0
    assert main(["inspect", str(config.output)]) == 0
    assert "linear" in capsys.readouterr().out


def test_only_the_chosen_layers_are_trained(make_config, tmp_path):
    config = make_config(steps=2, lr=1e-2, save_dtype="float32", layers=["up_blocks"], ema=0)
    trainer = opened(config)
    before = {name: value.detach().clone() for name, value in trainer.adapter.named_parameters()}
    trainer.run()
    changed = {n for n, value in trainer.adapter.named_parameters() if not torch.equal(value, before[n])}
    numbers = {name.split(".")[1] for name in changed if "to_k_ip" in name}
    kept = {layer.index for layer in cross_attentions(trainer.unet) if "up_blocks" in layer.name}
    assert numbers == {str(index) for index in kept}
    assert any(name.startswith("image_proj") for name in changed)
    with pytest.raises(UsageError, match="none has sideways"):
        train(make_config(layers=["sideways"], output=tmp_path / "c"))


@pytest.mark.parametrize("ema", [0, 0.9])
def test_the_file_holds_the_best_step_on_held_out_pictures_as_it_was_validated(make_config, ema):
    config = make_config(steps=4, lr=0.3, ema=ema, keep="best", validate_every=1, save_dtype="float32")
    trainer = opened(config)

    def weights():
        with trainer.learned.averaged():
            return {name: value.detach().clone() for name, value in trainer.adapter.named_parameters()}

    seen = [weights()]
    trainer.run(lambda step: seen.append(weights()))
    kept = load_file(trainer.finish())
    losses = [record["validation_with_image"] for record in log_of(config) if "gap" in record]
    best = losses.index(min(losses))
    assert len(losses) == 5
    assert all(torch.equal(kept[name], seen[best][name]) for name in kept)
    assert f"step {best}, in the file" in (config.output / "README.md").read_text() or best == 0


def losses_of(config):
    """Step → held-out loss, as the log has them."""
    return {record["step"]: record["validation_with_image"] for record in log_of(config) if "gap" in record}


def validation_in_file(config):
    return json.loads(IPAdapter.from_pretrained(config.output).checkpoint.metadata["imprompt.validation"])


def test_a_resumed_run_keeps_the_best_step_of_before_unless_it_beats_it(make_config):
    config = make_config(steps=9, lr=0.03, warmup=0, keep="best", ema=0)
    with pytest.raises(KeyboardInterrupt):
        train(config, on_step=stops(signal.SIGINT))
    train(config.replace(resume=True, steps=4, lr=30.0))
    losses = losses_of(config)
    assert losses[3] < losses[4] < losses[0]
    assert validation_in_file(config)["step"] == 3
    assert f"| step 3, in the file | {losses[3]:.4f}" in (config.output / "README.md").read_text()


def test_the_card_is_right_where_the_file_is_of_a_step_that_a_crash_undid(make_config):
    """The best step was validated and written, its checkpoint was not; and the run goes another way."""

    def crash(step):
        if step == 4:
            raise OSError("the power went")

    config = make_config(steps=9, lr=0.03, warmup=0, keep="best", ema=0, checkpoint_every=2, validate_every=3)
    with pytest.raises(OSError, match="power"):
        train(config, on_step=crash)
    best = losses_of(config)[3]
    train(config.replace(resume=True, steps=3, lr=30.0))
    assert best < losses_of(config)[3] < losses_of(config)[0]
    assert validation_in_file(config)["validation_with_image"] == best
    assert f"| step 3, in the file | {best:.4f}" in (config.output / "README.md").read_text()


KILLED_WHILE_VALIDATING = """
import os, signal, sys
from imprompt.training import TrainConfig, train
from imprompt.training.samples import Samples
def arm(step):
    if step == 2:
        Samples.validation = lambda *a: os.kill(os.getpid(), signal.SIGKILL)
train(TrainConfig.read(sys.argv[1]), on_step=arm)
"""


@pytest.mark.xdist_group("compiled")
def test_a_step_whose_validation_was_cut_off_is_validated_when_the_run_goes_on(make_config, tmp_path):
    config = make_config(steps=3, lr=0.03, warmup=0, keep="best", ema=0, checkpoint_every=1, validate_every=1)
    (tmp_path / "run.json").write_text(config.model_dump_json())
    run_killed(KILLED_WHILE_VALIDATING, tmp_path / "run.json")
    train(config.replace(resume=True))
    assert list(losses_of(config)) == [0, 1, 2, 3]
    best = min(losses_of(config).items(), key=lambda item: item[1])
    assert (validation_in_file(config)["step"], validation_in_file(config)["validation_with_image"]) == best


def test_a_stopped_run_that_keeps_its_last_step_does_not_give_it_the_losses_of_another(make_config):
    config = make_config(steps=8, lr=0.3, validate_every=2)
    with pytest.raises(KeyboardInterrupt):
        train(config, on_step=stops(signal.SIGINT))
    assert list(losses_of(config)) == [0, 2]
    assert IPAdapter.from_pretrained(config.output).checkpoint.metadata["imprompt.step"] == "3"
    assert "in the file" not in (config.output / "README.md").read_text()


def test_a_diverged_run_is_not_kept_and_goes_on_with_a_smaller_rate(make_config):
    config = make_config(lr=1e30, warmup=0, ema=0, keep="best", validate_every=1, checkpoint_every=1)
    with pytest.raises(ModelError, match=r"validation loss is not finite at step 1"):
        train(config)
    assert not list(config.output.glob("checkpoint-*"))
    train(config.replace(resume=True, lr=1e-4))
    assert list(losses_of(config)) == [0, 1, 2, 3, 4]


def test_buckets_keep_proportions_and_a_step_has_one_size(make_config, pictures):
    tiny.picture(60, (32, 64)).save(pictures / "0.png")
    tiny.picture(61, (32, 64)).save(pictures / "3.png")
    trainer = opened(make_config(buckets=True, steps=4))
    trainer.run()
    shapes = {tuple(trainer.samples.make(number).clean.shape[2:]) for number in range(6)}
    assert len(shapes) == 2


def test_a_photo_taken_upright_has_an_upright_bucket(make_config, pictures):
    sideways = tiny.picture(60, (64, 32))
    about = sideways.getexif()
    about[0x112] = 6  # the camera was turned
    for number in range(6):
        sideways.save(pictures / f"{number}.png", exif=about)
    trainer = opened(make_config(buckets=True))
    wide, high = trainer.plan.sizes[0]
    assert high > wide
    height, width = trainer.data.latents.rows("crop", [0])[0, :2].tolist()
    assert (width, height) == (32, 64)


def test_copies_and_small_pictures_are_noted_and_no_copy_is_held_out(make_config, pictures, capsys):
    path = pictures / "metadata.jsonl"
    path.write_text(path.read_text().replace("held_out_pair", "train"))
    for number in range(4):
        tiny.picture(0, (40, 24)).save(pictures / f"{number}.png")
    trainer = opened(make_config(quiet=False))
    assert set(trainer.plan.validation) <= {4, 5, 6}
    said = capsys.readouterr().err
    assert "3 training pictures are copies of others" in said
    assert "4 training pictures are smaller than what is trained, and are enlarged" in said


def test_copies_of_training_pictures_that_are_held_out_are_noted(make_config, pictures, capsys):
    shutil.copy(pictures / "0.png", pictures / "6.png")
    opened(make_config(quiet=False))
    assert "1 held-out pictures are copies of training pictures" in capsys.readouterr().err


def test_many_records_that_are_left_out_stop_the_run_before_it_encodes(make_config, pictures, tmp_path):
    config = make_config(cache=tmp_path / "cache")
    path = pictures / "metadata.jsonl"
    path.write_text(path.read_text() + '{"file_name": "gone.png", "text": "a cat"}\n' * 4)
    with pytest.raises(
        InputError, match=r"4 of 11 pictures .*metadata.jsonl:8: picture 'gone.png' is missing"
    ):
        train(config)
    assert not config.cache_folder.exists()
    with pytest.raises(InputError, match="4 pictures cannot be trained on"):
        train(make_config(on_bad_sample="stop"))


def test_many_bad_pictures_stop_the_run_before_it_begins(make_config, pictures):
    for number in range(4):
        (pictures / f"{number}.png").write_bytes(b"no picture")
    with pytest.raises(InputError, match=r"4 of 7 pictures cannot be trained on, more than 1%.*0.png"):
        train(make_config())
    (pictures / "3.png").write_bytes((pictures / "4.png").read_bytes())
    with pytest.raises(InputError, match="3 pictures cannot be trained on"):
        train(make_config(on_bad_sample="stop"))
    config = make_config(steps=1)
    train(config)
    assert len((config.output / "rejected.txt").read_text().splitlines()) == 3
    for number in range(7):
        (pictures / f"{number}.png").write_bytes(b"no picture")
    with pytest.raises(InputError, match="none of the 7 pictures"):
        train(make_config(output=config.output / "x"))


def test_a_caption_of_ten_thousand_characters_is_cut_not_fatal_and_counted_in_one_line(
    make_config, pictures, capfd
):
    path = pictures / "metadata.jsonl"
    path.write_text(path.read_text().replace('"cat a"', json.dumps("a cat " * 1700)))
    train(make_config(steps=1, quiet=False))
    said = capfd.readouterr().err
    assert "1 captions are longer than the text encoder reads; the end of the first is lost: '" in said
    assert "truncated because" not in said


def test_sdxl_trains_too(make_config, tmp_path):
    encoder, processor = tiny.tiny_encoder()
    parts = tiny.tiny_sdxl().components | {"image_encoder": encoder, "feature_extractor": processor}
    StableDiffusionXLPipeline(**parts, add_watermarker=False).save_pretrained(tmp_path / "xl")
    path = train(make_config(base=str(tmp_path / "xl"), steps=2))
    assert load_file(path)["image_proj.norm.weight"].shape == (2 * tiny.TEXT_WIDTH,)


def test_gradient_checkpointing_gives_the_same_weights(make_config, plain):
    wanted = load_file(plain)
    saving = load_file(train(make_config(gradient_checkpointing=True)))
    assert all(torch.allclose(wanted[name].float(), saving[name].float(), atol=1e-3) for name in wanted)


def test_training_continues_from_an_adapter_file(make_config, exact, tmp_path):
    second = train(
        make_config(output=tmp_path / "b", init=exact, lr=1e-12, weight_decay=0, save_dtype="float32")
    )
    before, after = load_file(exact), load_file(second)
    assert all(torch.allclose(before[name], after[name], atol=1e-6) for name in before)
    with pytest.raises(UsageError, match="reads pooled features; kind 'plus' trains on hidden"):
        train(make_config(output=tmp_path / "c", init=exact, kind="resampler"))


def test_a_launcher_that_started_one_process_for_several_is_told(make_config, monkeypatch):
    for name, value in (("ACCELERATE_USE_CPU", "True"), ("MASTER_PORT", "29500")):
        monkeypatch.setenv(name, value)
    with pytest.raises(UsageError, match="torchrun --nproc-per-node"):
        train(make_config())


def test_a_run_out_of_time_leaves_its_adapter_and_goes_on_when_resumed(make_config, plain):
    config = make_config(minutes=1e-6)
    early = load_file(train(config))
    assert [record["step"] for record in log_of(config) if "loss" in record] == [1]
    again = train(make_config(resume=True))
    assert same(again, plain)
    assert any(not torch.equal(tensor, early[name]) for name, tensor in load_file(again).items())


def test_samples_show_references_and_three_drawings_of_each(make_config):
    config = make_config(steps=2, sample_every=1)
    train(config)
    first, second = (Image.open(config.output / "samples" / f"{step:08d}.png") for step in (1, 2))
    side = 4 * 32  # one held-out picture of 32 pixels, enlarged, in five columns
    assert first.size == second.size == (5 * (side + 8) + 2 * 16, first.height)
    reference = (0, 0, 16 + side, first.height)
    assert first.crop(reference).tobytes() == second.crop(reference).tobytes()


def test_sheets_come_by_the_clock_at_least_first_and_last(make_config):
    config = make_config(steps=3, sample_every=None)
    train(config)
    drawn = sorted(path.stem for path in (config.output / "samples").iterdir())
    assert drawn == ["00000000", "00000003"]


def test_samples_are_the_same_drawn_together_or_one_by_one(make_config, pictures, monkeypatch):
    path = pictures / "metadata.jsonl"
    path.write_text(path.read_text().replace('"train"', '"held_out_pair"', 2))
    trainer = opened(make_config(sample_every=1))
    _, together = trainer.preview.draw()
    monkeypatch.setattr(preview, "PIXELS", 1)
    _, alone = trainer.preview.draw()
    assert len(alone[0]) == 3
    for one, other in zip(chain(*alone), chain(*together), strict=True):
        assert np.abs(np.asarray(one, int) - np.asarray(other, int)).max() <= 2


def test_nothing_is_recorded_before_the_first_image_tokens_nor_for_frozen_weights(make_config):
    """The frozen UNet costs no more than the way back through it."""
    trainer = opened(make_config(latent="mean"))
    first = cross_attentions(trainer.unet)[0].name
    block = trainer.unet.get_submodule(first.partition(".transformer_blocks")[0])
    recorded = {}
    for name, module in (("conv_in", trainer.unet.conv_in), ("to_k", trainer.unet.get_submodule(first).to_k)):
        module.register_forward_hook(lambda _, __, out, name=name: recorded.update({name: out.requires_grad}))
    block.register_forward_pre_hook(lambda _, args: recorded.update(before=args[0].requires_grad))
    block.register_forward_hook(lambda _, __, out: recorded.update(after=out[0].requires_grad))
    trainer.error(trainer.samples.make(0)).mean().backward()
    assert recorded == {"conv_in": False, "to_k": False, "before": False, "after": True}
    assert all(parameter.grad is None for parameter in trainer.unet.parameters())
    assert all(parameter.grad is not None for parameter in trainer.adapter.parameters())


def test_samples_do_not_change_what_is_learned(make_config, plain):
    assert same(train(make_config(sample_every=2)), plain)


def test_timesteps_come_from_every_part_of_the_schedule():
    luck = torch.rand(10, generator=torch.Generator().manual_seed(0))
    drawn = stratified_timesteps(torch.arange(10), luck, 10, 1000)
    assert (drawn // 100).tolist() == list(range(10))
    assert stratified_timesteps(torch.tensor([0]), torch.tensor([0.9999999]), 1, 1000).max() < 1000


def test_another_run_is_never_overwritten(make_config, begun):
    path = begun.output / WEIGHT_NAME
    before = path.read_bytes()
    with pytest.raises(UsageError, match="already holds a run"):
        train(make_config())
    with pytest.raises(UsageError, match=r"ema was 0\.999, is 0\.5"):
        train(make_config(resume=True, ema=0.5))
    assert path.read_bytes() == before


def recaption(folder):
    path = folder / "metadata.jsonl"
    path.write_text(path.read_text().replace("cat b", "cow b"))


def remove_one(folder):
    path = folder / "metadata.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[1:]))


@pytest.mark.parametrize(
    ("change", "says"),
    [(recaption, "captions or groups have changed"), (remove_one, "there were 7 pictures, now 6"),
     (lambda folder: tiny.picture(77, (40, 32)).save(folder / "2.png"), "pictures, captions")],
)  # fmt: skip
def test_other_data_is_another_run(begun, pictures, change, says):
    change(pictures)
    with pytest.raises(UsageError, match=says):
        train(begun.replace(resume=True))


@pytest.mark.usefixtures("begun")
def test_another_base_is_another_run_and_the_same_elsewhere_is_the_same(
    make_config, base, pictures, tmp_path
):
    shutil.copytree(base, tmp_path / "moved base")
    shutil.copytree(pictures, tmp_path / "moved pictures")
    moved = {"base": str(tmp_path / "moved base"), "data": str(tmp_path / "moved pictures"), "steps": 5}
    train(make_config(resume=True, lr=1e-3, **moved))
    pipe = StableDiffusionPipeline.from_pretrained(tmp_path / "moved base")
    with torch.no_grad():
        next(pipe.unet.parameters()).mul_(1.5)
    pipe.unet.save_pretrained(tmp_path / "moved base" / "unet")
    with pytest.raises(UsageError, match="the base's weights have changed"):
        train(make_config(resume=True, **moved))


def test_one_folder_has_one_trainer(make_config):
    config = make_config()
    held = RunFolder(config.output, resume=False)
    held.open()
    with pytest.raises(UsageError, match="another process is training"):
        train(make_config())
    held.close()
    assert not config.output.exists()
    train(config)


FULL = """
import resource, signal, sys
from imprompt.training import TrainConfig, train
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
limit = lambda step: step != 2 or resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
from imprompt.errors import InputError
try:
    train(TrainConfig.read(sys.argv[1]), on_step=limit)
except InputError as error:
    print(error, file=open(sys.argv[2], "w"))
"""


KILLED_WHILE_SAVING = """
import os, signal, sys
from imprompt.training import TrainConfig, train
def kill(descriptor):
    os.kill(os.getpid(), signal.SIGKILL)
def arm(step):
    if step == 3:
        os.fsync = kill
train(TrainConfig.read(sys.argv[1]), on_step=arm)
"""


@pytest.mark.xdist_group("compiled")
def test_what_a_killed_save_left_is_removed_when_the_run_goes_on(make_config, tmp_path):
    config = make_config(checkpoint_every=1, steps=4)
    (tmp_path / "run.json").write_text(config.model_dump_json())
    run_killed(KILLED_WHILE_SAVING, tmp_path / "run.json")
    (left,) = config.output.glob(".*.part.*")
    assert left.name.startswith(".checkpoint-00000003.")
    (config.output / ".notes.part").write_text("mine")
    with pytest.raises(UsageError, match="already holds a run"):
        train(config)
    assert left.exists()
    train(config.model_copy(update={"resume": True}))
    assert [path.name for path in config.output.glob(".*part*")] == [".notes.part"]
    assert [record["step"] for record in log_of(config) if "loss" in record] == [1, 2, 3, 4]


@pytest.mark.xdist_group("compiled")
def test_a_full_disk_is_one_plain_sentence_and_the_last_checkpoint_stays(make_config, tmp_path):
    config = make_config(checkpoint_every=1, steps=4)
    (tmp_path / "run.json").write_text(config.model_dump_json())
    run_unchecked(FULL, tmp_path / "run.json", tmp_path / "said.txt", folder=tmp_path)
    said = (tmp_path / "said.txt").read_text()
    assert "the disk is full; make room and resume" in said
    assert "The last one is 'checkpoint-00000001.safetensors'" in said
    assert len(said.splitlines()) == 1
    assert not [path for path in config.output.iterdir() if "part" in path.name]
    train(config.model_copy(update={"resume": True}))


def test_a_finished_run_that_is_resumed_changes_nothing(begun, plain):
    assert same(train(begun.replace(resume=True)), plain)


def test_only_the_newest_checkpoints_are_kept_and_none_is_half_written(make_config):
    config = make_config(steps=6, checkpoint_every=1, keep_checkpoints=2)
    train(config)
    assert sorted(path.name for path in config.output.glob("checkpoint-*.safetensors")) == [
        "checkpoint-00000005.safetensors",
        "checkpoint-00000006.safetensors",
    ]
    assert not list(config.output.rglob("*.part"))


def test_steps_without_a_finite_gradient_stop_the_run_without_a_result(make_config):
    config = make_config(steps=8, lr=1e30, clip=0)
    with pytest.raises(ModelError, match="not finite"):
        train(config)
    assert not (config.output / WEIGHT_NAME).exists()
    assert not list(config.output.glob("checkpoint-*"))


def test_one_bad_step_is_skipped_and_counted_and_changes_nothing(make_config):
    trainer = opened(make_config(steps=3, latent="mean", ema=0))
    before = {name: value.detach().clone() for name, value in trainer.adapter.named_parameters()}
    whole = trainer.unet.forward
    trainer.unet.forward = lambda *a, **k: (
        whole(*a, **k)[0] * (math.nan if trainer.step == 0 and torch.is_grad_enabled() else 1.0),
    )
    seen = []
    trainer.run(
        lambda step: seen.append({n: v.detach().clone() for n, v in trainer.adapter.named_parameters()})
    )
    assert all(torch.equal(before[name], seen[0][name]) for name in before)
    assert not all(torch.equal(before[name], seen[1][name]) for name in before)
    assert all(value.isfinite().all() for value in seen[2].values())
    assert trainer.meter.skipped == 1


def test_an_inpainting_base_is_refused(make_config, base, tmp_path):
    folder = tmp_path / "nine"
    shutil.copytree(base, folder)
    tiny.tiny_unet(in_channels=9).save_pretrained(folder / "unet")
    with pytest.raises(UsageError, match="inpainting"):
        train(make_config(base=str(folder)))


def test_each_encoder_is_alone_in_memory_while_it_encodes(make_config, tmp_path):
    kinds = (UNet2DConditionModel, AutoencoderKL, CLIPTextModel, CLIPVisionModelWithProjection)

    def alive():
        return {id(each): type(each).__name__ for each in gc.get_objects() if type(each) in kinds}

    before, seen = alive(), set()

    def look(module, _):
        if type(module).__name__ in ("Encoder", "CLIPTextModel", "CLIPVisionModelWithProjection"):
            seen.add(tuple(name for each, name in alive().items() if each not in before))

    hook = register_module_forward_pre_hook(look)
    try:
        train(make_config(steps=1, cache=tmp_path / "cache"))
    finally:
        hook.remove()
    assert seen == {("AutoencoderKL",), ("CLIPTextModel",), ("CLIPVisionModelWithProjection",)}


def test_sdxls_encoders_encode_in_the_runs_bfloat16_without_the_unet_in_memory(
    make_config, tmp_path, monkeypatch
):
    encoder, processor = tiny.tiny_encoder()
    parts = tiny.tiny_sdxl().components | {"image_encoder": encoder, "feature_extractor": processor}
    StableDiffusionXLPipeline(**parts, add_watermarker=False).save_pretrained(tmp_path / "xl")
    del encoder, parts
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    trained = [id(each) for each in gc.get_objects() if type(each) is UNet2DConditionModel]
    seen = set()

    def look(module, _):
        name = type(module).__name__
        if name in (
            "Encoder",
            "CLIPTextModel",
            "CLIPTextModelWithProjection",
            "CLIPVisionModelWithProjection",
        ):
            unets = [each for each in gc.get_objects() if type(each) is UNet2DConditionModel]
            seen.add((name, next(module.parameters()).dtype, any(id(each) not in trained for each in unets)))

    hook = register_module_forward_pre_hook(look)
    try:
        train(make_config(base=str(tmp_path / "xl"), steps=1, dtype="auto"))
    finally:
        hook.remove()
    assert {name for name, _, _ in seen} >= {
        "Encoder",
        "CLIPTextModelWithProjection",
        "CLIPVisionModelWithProjection",
    }
    assert {(dtype, there) for _, dtype, there in seen} == {(torch.bfloat16, False)}


def test_a_base_without_a_unet_is_refused(make_config):
    with pytest.raises(UsageError, match="base 'flux' has no UNet"):
        train(make_config(base="flux"))


def test_a_run_goes_on_only_in_the_number_format_it_began_in(make_config):
    train(make_config(steps=1, dtype="auto"))
    began = json.loads((make_config().output / "run.json").read_text())["config"]["dtype"]
    assert began in ("float32", "bfloat16")
    other = "bf16" if began == "float32" else "no"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACCELERATE_MIXED_PRECISION", other)
        with pytest.raises(UsageError, match=rf"another run \(dtype was {began}, is \w+\)"):
            train(make_config(steps=1, dtype="auto", resume=True))


def test_a_single_file_base_gives_the_same_adapter_and_is_opened_for_each_frozen_model_alone(
    make_config, base, tmp_path, monkeypatch
):
    pipe = StableDiffusionPipeline.from_pretrained(base)
    pipe.image_encoder.save_pretrained(tmp_path / "encoder")
    pipe.feature_extractor.save_pretrained(tmp_path / "encoder")
    file = save_single_file(pipe, tmp_path / "one.safetensors")
    entry = tmp_path / "hub" / "models--stable-diffusion-v1-5--stable-diffusion-v1-5"  # its configuration
    shutil.copytree(base, entry / "snapshots" / ("0" * 40))
    (entry / "refs").mkdir()
    (entry / "refs" / "main").write_text("0" * 40)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    read, opened = safetensors.torch.load_file, []
    monkeypatch.setattr(
        safetensors.torch, "load_file", lambda *a, **k: opened.append(str(a[0])) or read(*a, **k)
    )
    options = {"image_encoder": str(tmp_path / "encoder"), "resolution": 32, "init": "new"}
    whole = train(make_config(output=tmp_path / "a", **options))
    assert same(train(make_config(output=tmp_path / "b", base=str(file), **options)), whole)
    assert opened.count(str(file)) == 3  # VAE; text encoder; UNet and VAE


def test_a_base_that_is_no_model_is_an_error(make_config, tmp_path):
    (tmp_path / "nothing").mkdir()
    with pytest.raises(ModelError, match="nothing"):
        train(make_config(base=str(tmp_path / "nothing")))


@pytest.mark.parametrize(
    ("part", "field"), [("unet", {"sample_size": "wide"}), ("vae", {"block_out_channels": 4})]
)
def test_a_base_whose_size_is_damaged_is_one_line(make_config, base, tmp_path, part, field):
    folder = shutil.copytree(base, tmp_path / "damaged")
    settings = folder / part / "config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | field))
    with pytest.raises(ModelError, match=f"base '.*damaged': .*{next(iter(field))}"):
        train(make_config(base=str(folder)))


def test_a_base_without_an_image_encoder_is_an_error(make_config, tmp_path):
    tiny.tiny_sd().save_pretrained(tmp_path / "plain")
    with pytest.raises(UsageError, match="image_encoder"):
        train(make_config(base=str(tmp_path / "plain")))


def test_a_lock_that_was_removed_before_it_was_taken_holds_nobody(make_config, monkeypatch):
    """The first run ends without having begun while the second has its lock file open."""
    path, lock = make_config().output, fcntl.flock
    first, second, third = (RunFolder(path, resume=False) for _ in range(3))
    first.open()

    def late(*args):
        first.close()
        return lock(*args)

    monkeypatch.setattr(fcntl, "flock", late)
    second.open()
    with pytest.raises(UsageError, match="another process is training"):
        third.open()
    second.close()
    assert not path.exists()


def test_a_run_that_could_not_begin_leaves_its_folder_to_the_corrected_one(make_config, tmp_path):
    with pytest.raises(InputError, match="no data at"):
        train(make_config(data=tmp_path / "picturs"))
    train(make_config())


def test_layers_that_are_none_leave_the_folder_to_the_corrected_run(make_config):
    with pytest.raises(UsageError, match="none has nope"):
        train(make_config(layers=["nope"]))
    assert not make_config().output.exists()
    train(make_config(steps=1))


def test_a_resumed_run_keeps_its_steps_and_its_rate_unless_others_are_stated(make_config, capsys):
    config = make_config(steps=5, lr=3e-4, warmup=0, schedule="cosine")
    with pytest.raises(KeyboardInterrupt):
        train(config, on_step=stops(signal.SIGINT, at=2))
    unstated = {"lr": None, "warmup": None, "schedule": "cosine", "resume": True, "quiet": False}
    train(make_config(steps=None, **unstated))
    taken = {record["step"]: record["lr"] for record in log_of(config) if "lr" in record}
    planned = [learning_rate(step, peak=3e-4, steps=5, warmup=0, schedule="cosine") for step in range(5)]
    assert list(taken) == [1, 2, 3, 4, 5]
    assert list(taken.values()) == pytest.approx(planned)
    assert "no step is left" not in capsys.readouterr().err
    train(make_config(steps=2, **unstated))
    assert "no step is left: the run has taken 5 of 2; --steps asks for more" in capsys.readouterr().err


def test_a_number_of_tokens_that_the_start_does_not_have_is_refused(make_config, tmp_path):
    first = train(make_config(steps=1, tokens=3, output=tmp_path / "a"))
    for tokens in (None, 3):
        train(make_config(steps=1, init=first, tokens=tokens, output=tmp_path / f"{tokens}"))
    with pytest.raises(UsageError, match=r"tokens is 8, but the start .* has 3; .*--init new"):
        train(make_config(init=first, tokens=8, output=tmp_path / "b"))


def test_options_without_an_effect_are_noted(make_config, tmp_path, capsys):
    idle = {
        "lora_rank": 4, "face_model": "nowhere", "augmentation": {"rotate": 50}, "sample_guidance": 9,
        "captions": {"styl": ["full"]},
    }  # fmt: skip
    train(make_config(steps=1, quiet=False, **idle))
    said = capsys.readouterr().err
    assert all(f"{name} has no effect: " in said for name in idle)
    train(make_config(steps=1, quiet=False, output=tmp_path / "b", views=2, augmentation={"rotate": 50}))
    assert "has no effect" not in capsys.readouterr().err


@pytest.mark.usefixtures("face_pictures")
def test_a_face_run_and_its_checkpoint_say_which_variant_they_are(make_config, tmp_path):
    face = {"face_model": str(pack(tmp_path / "pack")), "steps": 1}
    config = make_config(kind="faceid-plus", lora_rank=4, output=tmp_path / "a", **face)
    train(config)
    (checkpoint,) = config.output.glob("checkpoint-*.safetensors")
    for number, start in enumerate((checkpoint, config.output)):
        path = train(make_config(init=str(start), output=tmp_path / f"{number}", **face))
        assert IPAdapter.from_pretrained(path).checkpoint.variant.name == "faceid-plusv2"


def test_a_repository_that_the_hub_does_not_take_is_told_before_the_run(make_config):
    with pytest.raises(UsageError, match=r"push_to_hub 'bad__/name!!': OWNER/NAME is expected") as caught:
        train(make_config(push_to_hub="bad__/name!!"))
    assert not str(caught.value).endswith("..")
    assert not make_config().output.exists()


def test_a_field_is_not_set_as_a_table(pictures, capsys):
    assert main(["train", str(pictures), "--steps", "1", "--set", "steps.x=4"]) == 2
    assert "--set steps.x: steps is '1', not a table" in capsys.readouterr().err


def test_a_run_is_named_after_its_pictures_and_takes_a_folder_in_which_none_began(
    make_config, base, tmp_path, monkeypatch, capsys
):
    (tmp_path / "pictures" / "inside").mkdir()
    monkeypatch.chdir(tmp_path / "pictures" / "inside")
    words = ["--base", str(base), "--steps", "1", "--sample-every", "0", "--device", "cpu", "-q"]
    (Path("runs") / "pictures" / "cache").mkdir(parents=True)  # of a run that was stopped while it encoded
    assert main(["train", "..", *words]) == 0
    assert capsys.readouterr().out.strip() == f"runs/pictures/{WEIGHT_NAME}"
    assert main(["train", "../../pictures", *words]) == 0
    assert capsys.readouterr().out.strip() == f"runs/pictures-2/{WEIGHT_NAME}"
    assert main(["train", "..", "--resume", *words]) == 0
    assert capsys.readouterr().out.strip() == f"runs/pictures-2/{WEIGHT_NAME}"


def test_a_table_of_the_configuration_is_set_field_by_field(pictures, capsys):
    assert main(["train", str(pictures), "--set", "augmentation.colr=0.2"]) == 2
    assert "augmentation: colr: no such field; did you mean 'colour'?" in capsys.readouterr().err
    assert main(["train", str(pictures), "--set", "augmentation.colour=2"]) == 2
    assert "augmentation: colour: input should be less than 1" in capsys.readouterr().err


def test_a_base_may_be_named_by_its_alias(make_config, tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "empty"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ModelError, match="stable-diffusion-v1-5"):  # what the alias stands for, not found
        train(make_config(base="sd15"))
    with pytest.raises(UsageError, match="did you mean sd15"):
        train(make_config(base="sd-15"))


def test_the_rate_warms_up_and_falls_to_zero():
    rates = [learning_rate(step, peak=1.0, steps=110, warmup=10, schedule="cosine") for step in range(111)]
    assert rates[0] == pytest.approx(0.1)
    assert max(rates) == rates[9] == rates[10] == 1.0
    assert rates[60] == pytest.approx(0.5)
    assert rates[110] == pytest.approx(0, abs=1e-12)
    assert learning_rate(60, peak=1.0, steps=110, warmup=10, schedule="linear") == pytest.approx(0.5)


def test_a_prompt_that_the_average_showed_is_projected_again_without_it(make_config):
    trainer = opened(make_config(steps=3, ema=0.9, lr=0.3))
    trainer.run()
    adapter = trainer.adapter
    features = torch.ones(1, adapter.projection.feature_width)
    with trainer.learned.averaged():
        adapter.set_prompt(features)
        averaged = adapter.samples[0][0].tokens
    adapter.set_prompt(features)
    assert not torch.equal(adapter.samples[0][0].tokens, averaged)


def test_weights_are_averaged_over_the_run(make_config, tmp_path):
    last = load_file(train(make_config(output=tmp_path / "a", ema=0, lr=1e-2)))
    mean = load_file(train(make_config(output=tmp_path / "b", ema=0.9, lr=1e-2)))
    assert any(not torch.equal(last[name], mean[name]) for name in last)


@pytest.mark.parametrize(
    "name", ["README.md", "card.html", "checkpoint-00000001.safetensors", "samples/a.png"]
)
@pytest.mark.parametrize("resume", [False, True])
def test_a_folder_of_other_things_is_left_as_it_is(make_config, name: str, resume: bool) -> None:
    config = make_config(steps=1, resume=resume)
    mine = config.output / name
    mine.parent.mkdir(parents=True)
    mine.write_text("mine")
    with pytest.raises(UsageError, match=rf"holds no run, but '{name.partition('/')[0]}'"):
        train(config)
    assert [path for path in config.output.rglob("*") if path.is_file()] == [mine]
    assert mine.read_text() == "mine"
