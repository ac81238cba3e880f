"""The training loop: a frozen base, one adapter, and a figure that says whether it learns.

``train(config)`` writes ``ip-adapter.safetensors`` in the published layout into the output folder, beside
``run.json`` (what was asked), ``log.jsonl`` (losses) and the newest checkpoints. The plain loss of a
diffusion model stays flat while an adapter learns; what tells is the validation loss on fixed pictures, noise
and timesteps *with* the image against *without* it. Both are printed and logged.

Several processes (``torchrun``, ``accelerate launch``) share the work: each draws its own part of the batch,
gradients are averaged. Nothing here knows how pictures are generated.
"""

from __future__ import annotations

import contextlib
import json
import math
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional
from tqdm import tqdm

from imprompt.adapter.ipadapter import IPAdapter
from imprompt.checkpoints.checkpoint import StateDict
from imprompt.data.rows import Rejected, read_dataset
from imprompt.errors import ImpromptError, ModelError, UsageError
from imprompt.training.cache import EncodedSet, encode_features, encode_latents, encode_texts
from imprompt.training.config import TrainConfig
from imprompt.training.data import Plan, generator_for
from imprompt.training.objective import (
    broadcast,
    drop_features,
    learning_rate,
    loss_weights,
    prediction_target,
    stratified_timesteps,
)
from imprompt.training.samples import Sampler
from imprompt.training.world import World

WEIGHT_NAME = "ip-adapter.safetensors"
RECORD = "run.json"  # what the run is
VALIDATION_LEVELS = 4  # timesteps each validation picture is tested at, spread over the schedule
FEATURE = {"linear": "pooled", "resampler": "hidden"}


def train(config: TrainConfig) -> Path:
    """Train one adapter; returns the file written, reloaded once to prove that it reads.

    With ``minutes`` the run may end before its last step: the adapter is written as it is then, and the same
    configuration with ``resume`` goes on from there.
    Raises :class:`UsageError` when the output folder holds another run or the configuration cannot work,
    :class:`InputError` without usable pictures, :class:`ModelError` when the base cannot be loaded or a loss
    stops being finite. Ctrl-C saves a checkpoint, then raises ``KeyboardInterrupt``.
    """
    world = World(config)
    with world:
        new = world.first and _claim(config)
        world.wait()
        try:
            trainer = _Trainer(config, world)
        except ImpromptError:
            if new:  # nothing is there yet, and the corrected configuration would be another run
                (config.output / RECORD).unlink()
            raise
        trainer.run()
        return trainer.finish()


class _Trainer:
    """Owns the run: the frozen base, the adapter, optimizer, averaged weights, log and checkpoints."""

    def __init__(self, config: TrainConfig, world: World) -> None:
        self.config, self.world, self.device = config, world, world.device
        pipe = _load_base(config)
        self.scheduler_config = pipe.scheduler.config
        self.prediction = self.scheduler_config.get("prediction_type", "epsilon")
        self.alpha_bar = _alphas(pipe).to(self.device)
        self.unet = pipe.unet.eval().requires_grad_(False)
        if self.unet.config.in_channels != self.unet.config.out_channels:
            raise ModelError(
                f"'{config.base}' takes {self.unet.config.in_channels} channels (an inpainting model); train "
                "on the plain base of its family: the adapter fits both"
            )
        encoder = _load_encoder(pipe, config)
        if world.first:
            self.data, self.plan = self._encode(pipe, encoder)
        world.wait()
        if not world.first:
            self.data, self.plan = self._encode(pipe, encoder)
        vae = pipe.vae
        pipe.vae = pipe.text_encoder = pipe.image_encoder = None  # only UNet and adapter stay in memory
        del encoder
        self.unet.to(self.device, self.world.dtype)
        if config.gradient_checkpointing:
            self.unet.enable_gradient_checkpointing()
        self.adapter = self._make_adapter()
        self.adapter.attach(self.unet)
        self.parameters = [parameter for parameter in self.adapter.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=config.lr, betas=config.betas, weight_decay=config.weight_decay, fused=True
        )
        self.averaged = [parameter.detach().clone() for parameter in self.parameters] if config.ema else []
        self.step = 0
        self.interrupted = False
        if config.resume:
            self._restore()
        self.sampler = None
        if config.sample_every and world.first:
            self.sampler = Sampler(
                self.unet, vae, self.adapter, pipe.scheduler, self.data, self.plan, self._extra,
                side=self.side, guidance=config.sample_guidance,
            )  # fmt: skip

    def run(self) -> None:
        """All remaining steps, with validation, samples, log lines and checkpoints on the way."""
        config = self.config
        running, counted, started = torch.zeros((), device=self.device), 0, time.monotonic()
        end = math.inf if config.minutes is None else started + 60 * config.minutes
        if self.step == 0:
            self._validate()
        self.terminal = sys.stderr.isatty()
        bar = tqdm(
            total=config.steps,
            initial=self.step,
            desc="training",
            unit="step",
            disable=config.quiet or not self.world.first or not self.terminal,
        )
        started = time.monotonic()
        with bar, self._catching_interrupts():
            while self.step < config.steps:
                running, counted = running + self._advance(), counted + 1
                self.step += 1
                bar.update()
                last = self.step == config.steps or self.world.agree(time.monotonic() >= end)
                checkpoint = last or self.interrupted or self.step % config.checkpoint_every == 0
                if last or checkpoint or self.step % config.log_every == 0:
                    loss = float(running) / counted
                    pace = counted * config.batch * config.accumulate / (time.monotonic() - started)
                    running, counted, started = torch.zeros_like(running), 0, time.monotonic()
                    self._report_loss(loss, pace, bar)
                if checkpoint:
                    self._save_checkpoint()
                if self.interrupted:
                    raise KeyboardInterrupt
                if last or self.step % config.validate_every == 0:
                    self._validate()
                if self.sampler is not None and (last or self.step % config.sample_every == 0):
                    with self._averaged_weights():
                        self._say(f"samples: {self.sampler.write(config.output, self.step)}")
                if not counted:  # validation and samples do not count as training time
                    started = time.monotonic()
                if last:
                    break

    def finish(self) -> Path:
        """Write the adapter in the published layout and read it back."""
        config = self.config
        path = config.output / WEIGHT_NAME
        if not self.world.first:
            return path
        with self._averaged_weights():
            dtype = getattr(torch, config.save_dtype)
            expected: StateDict = {
                "image_proj": {
                    k: v.to("cpu", dtype) for k, v in self.adapter.state_dict()["image_proj"].items()
                },
                "ip_adapter": {
                    k: v.to("cpu", dtype) for k, v in self.adapter.state_dict()["ip_adapter"].items()
                },
            }
        variant = self.adapter.checkpoint.variant.name
        IPAdapter.from_state_dict(expected, variant=variant).save_pretrained(config.output, WEIGHT_NAME)
        read = IPAdapter.from_pretrained(path).state_dict()
        for part, tensors in expected.items():
            for name, tensor in tensors.items():
                if name not in read[part] or not torch.equal(read[part][name].cpu(), tensor.cpu()):
                    raise ModelError(f"'{path}' does not read back as written: '{part}.{name}' differs")
        self.adapter.detach()
        return path

    def _encode(self, pipe: Any, encoder: Any) -> tuple[EncodedSet, Plan]:
        config = self.config
        found = read_dataset(config.data, only=config.only)
        rows, rejected = found.rows, list(found.rejected)
        factor = 2 ** (len(pipe.vae.config.block_out_channels) - 1)
        side = config.resolution or pipe.unet.config.sample_size * factor
        if side % factor:
            raise UsageError(f"resolution must be a multiple of {factor} for this base, given {side}")
        pipe.to(self.device)
        encoder.to(self.device, torch.float32)
        latents = encode_latents(rows, pipe.vae, config, (side, side), self.device)
        plan = Plan(rows, config, unusable=set(latents.rejected))
        features, negative = encode_features(rows, encoder, FEATURE[config.kind], config, (side, side))
        captions = plan.captions
        texts = encode_texts(pipe, captions, config, self.device)
        rejected += [Rejected(rows[index].name, why) for index, why in sorted(latents.rejected.items())]
        self.side, self.feature_width = side, int(negative.shape[-1])
        data = EncodedSet(
            latents,
            features,
            FEATURE[config.kind],
            negative,
            texts,
            {caption: index for index, caption in enumerate(captions)},
            rejected,
        )
        if self.world.first:
            self._report_data(plan, data)
        return data, plan

    def _make_adapter(self) -> IPAdapter:
        config = self.config
        if config.init is not None:
            adapter = IPAdapter.from_pretrained(config.init)
            if adapter.projection.feature != FEATURE[config.kind]:
                raise UsageError(
                    f"'{config.init}' reads {adapter.projection.feature} features, kind '{config.kind}' "
                    f"trains on {FEATURE[config.kind]}"
                )
        else:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(config.seed)
                adapter = IPAdapter.new(
                    self.unet, kind=config.kind, feature_width=self.feature_width, tokens=config.tokens
                )
        adapter.module.requires_grad_(True).train()
        return adapter.to(self.device, torch.float32)

    def _advance(self) -> Tensor:
        """One optimizer step; returns the mean loss, still on the device."""
        config = self.config
        total = torch.zeros((), device=self.device)
        for part in range(config.accumulate):
            loss = self._loss(self.step * config.accumulate + part) / config.accumulate
            total += loss
        gradients = [parameter.grad for parameter in self.parameters if parameter.grad is not None]
        self.world.average(gradients)
        if config.clip:
            torch.nn.utils.clip_grad_norm_(self.parameters, config.clip)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(config, self.step)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.averaged:
            decay = min(config.ema, (1 + self.step) / (10 + self.step))
            torch._foreach_lerp_(self.averaged, [p.detach() for p in self.parameters], 1 - decay)
        return total

    def _loss(self, number: int) -> Tensor:
        """Loss of forward pass ``number``; its gradients are added to the parameters'."""
        config, data = self.config, self.data
        batch = self.plan.draw(number, process=self.world.number, processes=self.world.count)
        source = generator_for(config.seed, f"noise {self.world.number}", number)
        clean = data.latents.rows("mean", batch.targets)
        if config.latent == "sample":
            clean = clean + data.latents.rows("std", batch.targets) * torch.randn(
                clean.shape, generator=source
            )
        noise = torch.randn(clean.shape, generator=source)
        steps = stratified_timesteps(config.batch, len(self.alpha_bar), source)
        features = data.features.rows(data.feature, batch.references, batch.views)
        features = drop_features(features, data.negative, batch.image_dropped)
        error = self._error(clean, noise, steps, features, batch.captions)
        with error as per_picture:
            alpha_bar = self.alpha_bar[steps.to(self.device)]
            loss = (per_picture * loss_weights(self.prediction, alpha_bar, config.min_snr)).mean()
            # Inside: a checkpointed UNet runs again in the backward pass and needs its tokens.
            (loss / config.accumulate).backward()
        return loss.detach()

    @contextlib.contextmanager
    def _error(
        self, clean: Tensor, noise: Tensor, steps: Tensor, features: Tensor, captions: Sequence[str]
    ) -> Iterator[Tensor]:
        """Mean squared error of each picture ``B``; tokens stay in place until the caller is done with it."""
        device = self.device
        clean, noise, steps = clean.to(device), noise.to(device), steps.to(device)
        alpha_bar = self.alpha_bar[steps]
        noisy = broadcast(alpha_bar.sqrt()) * clean + broadcast((1 - alpha_bar).sqrt()) * noise
        states = self.data.text("states", captions).to(device)
        reduced = self.world.dtype != torch.float32
        with torch.autocast(device.type, self.world.dtype, enabled=reduced):
            tokens = self.adapter.projection(features.to(device))
            with self.adapter.training_tokens(tokens):
                predicted = self.unet(noisy, steps, states, return_dict=False, **self._extra(captions))[0]
                target = prediction_target(self.prediction, clean, noise, alpha_bar)
                with torch.autocast(device.type, enabled=False):
                    error = functional.mse_loss(predicted.float(), target, reduction="none")
                    yield error.flatten(1).mean(1)

    def _extra(self, captions: Sequence[str]) -> dict[str, Any]:
        """What the UNet takes besides the captions' states: SDXL's pooled text and sizes."""
        if self.unet.config.addition_embed_type != "text_time":
            return {}
        sizes = torch.tensor([[self.side, self.side, 0, 0, self.side, self.side]], device=self.device)
        pooled = self.data.text("pooled", captions).to(self.device)
        return {"added_cond_kwargs": {"text_embeds": pooled, "time_ids": sizes.expand(len(captions), -1)}}

    @torch.no_grad()
    def _validate(self) -> None:
        """Loss on fixed pictures, noise and timesteps, with the image and without; logged and printed."""
        if not self.world.first:
            return
        length, rows = len(self.alpha_bar), self.plan.validation
        sums = torch.zeros(2, VALIDATION_LEVELS)
        with self._averaged_weights():
            for start in range(0, len(rows), self.config.batch):
                picked = rows[start : start + self.config.batch]
                clean = self.data.latents.rows("mean", picked)
                noise = torch.stack(
                    [
                        torch.randn(clean.shape[1:], generator=generator_for(0, "validation", row))
                        for row in picked
                    ]
                )
                shown = self.data.features.rows(self.data.feature, picked, [0] * len(picked))
                hidden = self.data.negative.expand_as(shown)
                captions = [self.plan.validation_caption(row) for row in picked]
                for level in range(VALIDATION_LEVELS):
                    at = int((level + 0.5) / VALIDATION_LEVELS * length)
                    steps = torch.full((len(picked),), at)
                    for place, features in enumerate((shown, hidden)):
                        with self._error(clean, noise, steps, features, captions) as per_picture:
                            sums[place, level] += per_picture.sum().cpu()
        with_image, without_image = (sums.mean(1) / len(rows)).tolist()
        record = {
            "step": self.step,
            "validation_with_image": with_image,
            "validation_without_image": without_image,
            "gap": without_image - with_image,
            "gap_by_noise": ((sums[1] - sums[0]) / len(rows)).tolist(),
        }
        self._log(record)
        self._say(
            f"step {self.step}: validation loss {with_image:.4f} with the image, {without_image:.4f} without "
            f"(the image explains {1 - with_image / without_image:.1%})"
        )
        if not math.isfinite(with_image + without_image):
            raise ModelError(f"the validation loss is not finite at step {self.step}: {record}")

    @contextlib.contextmanager
    def _averaged_weights(self) -> Iterator[None]:
        if not self.averaged:
            yield
            return
        current = [parameter.detach().clone() for parameter in self.parameters]
        self._put(self.averaged)
        try:
            yield
        finally:
            self._put(current)

    @torch.no_grad()
    def _put(self, values: Sequence[Tensor]) -> None:
        for parameter, value in zip(self.parameters, values, strict=True):
            parameter.copy_(value)

    def _save_checkpoint(self) -> None:
        """Everything needed to go on, in one file that appears whole or not at all."""
        if not self.world.first:
            return
        tensors = {}
        for index, parameter in enumerate(self.parameters):
            tensors[f"weights.{index}"] = parameter.detach()
            for name, value in self.optimizer.state[parameter].items():
                tensors[f"{name}.{index}"] = value
            if self.averaged:
                tensors[f"averaged.{index}"] = self.averaged[index]
        about = {"step": str(self.step), "identity": json.dumps(self.config.identity())}
        path = self.config.output / f"checkpoint-{self.step:08d}.safetensors"
        part = path.with_suffix(".part")
        save_file({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, part, about)
        part.replace(path)
        for old in _checkpoints(self.config.output)[: -self.config.keep_checkpoints]:
            old.unlink()

    def _restore(self) -> None:
        found = _checkpoints(self.config.output)
        if not found:
            return
        path = found[-1]
        try:
            with safe_open(path, "pt") as file:
                about = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except SafetensorError as error:
            raise ModelError(
                f"checkpoint '{path}' is damaged: {error}; delete it to use the one before"
            ) from error
        for index, parameter in enumerate(self.parameters):
            if tensors.get(f"weights.{index}", torch.empty(0)).shape != parameter.shape:
                raise ModelError(f"checkpoint '{path}' is of another adapter: parameter {index} does not fit")
            names = ("step", "exp_avg", "exp_avg_sq")
            state = {name: tensors[f"{name}.{index}"] for name in names}
            self.optimizer.state[parameter] = {
                name: value if name == "step" else value.to(self.device) for name, value in state.items()
            }
        self._put([tensors[f"weights.{index}"] for index in range(len(self.parameters))])
        self.averaged = [tensors[f"averaged.{index}"].to(self.device) for index in range(len(self.averaged))]
        self.step = int(about["step"])
        if self.world.first:
            _truncate_log(self.config.output / "log.jsonl", self.step)
        self._say(f"resumed at step {self.step} from {path.name}")

    @contextlib.contextmanager
    def _catching_interrupts(self) -> Iterator[None]:
        """The first Ctrl-C ends the run after this step, with a checkpoint; the second ends it at once."""

        def note(number: int, frame: FrameType | None) -> None:
            if self.interrupted:
                raise KeyboardInterrupt
            self.interrupted = True
            self._say("stopping after this step (again to stop at once)")

        try:
            before = signal.signal(signal.SIGINT, note) if self.world.count == 1 else None
        except ValueError:  # not the main thread: interrupts belong to someone else
            before = None
        try:
            yield
        finally:
            if before is not None:
                signal.signal(signal.SIGINT, before)

    def _report_loss(self, loss: float, pace: float, bar: Any) -> None:
        if not math.isfinite(loss):
            found = _checkpoints(self.config.output)
            last = (
                f"the last good checkpoint is '{found[-1].name}'" if found else "there is no checkpoint yet"
            )
            raise ModelError(
                f"the loss is not finite at step {self.step} (lr {self.config.lr:g}); {last}; try a lower "
                "learning rate, a longer warm-up or float32"
            )
        bar.set_postfix(loss=f"{loss:.4f}")
        rate = learning_rate(self.config, self.step - 1)
        self._log({"step": self.step, "loss": loss, "lr": rate, "pictures_per_s": round(pace, 2)})
        if not self.terminal:  # a bar in a log file is no use
            left = (self.config.steps - self.step) * self.config.batch * self.config.accumulate / pace
            self._say(
                f"step {self.step}/{self.config.steps} loss {loss:.4f} lr {rate:.2g} {pace:.1f} pictures/s "
                f"{left / 60:.0f} min left"
            )

    def _report_data(self, plan: Plan, data: EncodedSet) -> None:
        lines = [f"{item}" for item in data.rejected]
        (self.config.output / "rejected.txt").write_text("".join(line + "\n" for line in lines), "utf-8")
        about = (
            f"{len(plan.training)} training pictures, {len(plan.validation)} for validation"
            f"{' (training pictures: none is held out)' if plan.validates_on_training_rows else ''}, "
            f"{len(data.caption_index)} captions, references usable: {plan.usable_modes}"
        )
        self._say(about + (f"; {len(lines)} left out, see rejected.txt" if lines else ""))

    def _log(self, record: dict[str, Any]) -> None:
        if self.world.first:
            with (self.config.output / "log.jsonl").open("a", encoding="utf-8") as handle:
                handle.write(json.dumps(record) + "\n")

    def _say(self, line: str) -> None:
        if self.world.first and not self.config.quiet:
            tqdm.write(line, file=sys.stderr)


def _claim(config: TrainConfig) -> bool:
    """Make the output folder this run's own; whether it is a new one. Raises :class:`UsageError` when it is
    another's."""
    record = config.output / RECORD
    new = not (record.exists() or (config.output / WEIGHT_NAME).exists())
    if not new:
        if not config.resume:
            raise UsageError(f"'{config.output}' already holds a run; resume it or choose another folder")
        if record.exists():
            before = json.loads(record.read_text(encoding="utf-8"))
            now = config.identity()
            changed = sorted(name for name in now if before.get(name) != now[name])
            if changed:
                was = ", ".join(f"{name} was {before.get(name)}, is {now[name]}" for name in changed)
                raise UsageError(
                    f"'{config.output}' holds another run ({was}); use these values or a new folder"
                )
    config.output.mkdir(parents=True, exist_ok=True)
    part = record.with_suffix(".part")
    part.write_text(json.dumps(config.identity(), indent=2) + "\n", encoding="utf-8")
    part.replace(record)
    return new


def _checkpoints(folder: Path) -> list[Path]:
    return sorted(folder.glob("checkpoint-*.safetensors"))


def _truncate_log(path: Path, step: int) -> None:
    """Forget lines of steps that the resumed run takes again."""
    if path.exists():
        lines = [line for line in path.read_text("utf-8").splitlines() if json.loads(line)["step"] <= step]
        path.write_text("".join(line + "\n" for line in lines), "utf-8")


def _alphas(pipe: Any) -> Tensor:
    from diffusers import DDPMScheduler

    return DDPMScheduler.from_config(pipe.scheduler.config).alphas_cumprod.float()


def _load_base(config: TrainConfig) -> Any:
    from diffusers import DiffusionPipeline

    from imprompt.generation.families import find_base
    from imprompt.weights import silence_library_logging

    source = find_base(config.base).source
    try:
        with silence_library_logging():  # no pickles: their weights could run code
            pipe = DiffusionPipeline.from_pretrained(source, torch_dtype=torch.float32, use_safetensors=True)
    except (OSError, ValueError) as error:
        raise ModelError(
            f"base '{config.base}' is no diffusers folder or hub id that can be loaded: {error}"
        ) from error
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _load_encoder(pipe: Any, config: TrainConfig) -> Any:
    from imprompt.encoders.clip import ImageEncoder

    if config.image_encoder is not None:
        return ImageEncoder.from_pretrained(config.image_encoder, torch_dtype=torch.float32)
    if getattr(pipe, "image_encoder", None) is None:
        raise UsageError(f"base '{config.base}' has no image encoder of its own; name one with image_encoder")
    return ImageEncoder(pipe.image_encoder, pipe.feature_extractor)
