"""The trainer: a frozen base, one adapter, and figures that say whether it learns.

``train(config)`` writes ``ip-adapter.safetensors`` in the published layout into the run's folder, beside
``run.json`` (which run it is), ``log.jsonl``, a model card and the newest checkpoints. The plain loss of a
diffusion model stays flat while an adapter learns; what tells is the validation loss on fixed pictures, noise
and timesteps *with* the picture, against *without* it and against the bare base. All are printed and logged.

Devices, processes, number formats and trackers are accelerate's: its configuration and ``accelerate launch``
work. Nothing waits for the device between two log lines.
"""

from __future__ import annotations

import contextlib
import math
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import broadcast_object_list
from diffusers.training_utils import EMAModel
from torch import Tensor, nn
from torch.nn import functional
from tqdm import tqdm

from imprompt.adapter.ipadapter import IPAdapter
from imprompt.checkpoints.checkpoint import StateDict
from imprompt.data.rows import Rejected, read_dataset
from imprompt.errors import ImpromptError, InputError, ModelError, UsageError
from imprompt.io import write_atomic
from imprompt.training import cache, start
from imprompt.training.card import model_card
from imprompt.training.config import TrainConfig
from imprompt.training.data import Batch, Plan, bucket_size, generator_for
from imprompt.training.folder import WEIGHT_NAME, Identity, RunFolder, data_hash
from imprompt.training.objective import (
    broadcast,
    drop_features,
    learning_rate,
    loss_weights,
    prediction_target,
    stratified_timesteps,
)
from imprompt.training.preview import Preview, unet_takes_pooled

BANDS = 4
"""Equal parts of the schedule: the loss is told for each, and validation tests one timestep of each."""
AGREE_EVERY = 10
"""Steps between two times that several processes ask each other whether to stop."""
BAD_SHARE, BAD_LEAST = 0.01, 3
"""A run does not begin with more unreadable pictures than this share, and more than this number."""
T = TypeVar("T")


def train(
    config: TrainConfig, *, on_step: Callable[[int], None] | None = None, sheets: int | None = None
) -> Path:
    """Train one adapter; returns the file written, reloaded once to prove that it reads.

    ``on_step`` is called with the number of steps taken after each one, in every process. ``sheets`` of
    samples are drawn on the way, in place of one every ``config.sample_every`` steps.

    With ``minutes`` the run may end before its last step: the adapter is written as it is then, and the same
    configuration with ``resume`` goes on from there. Ctrl-C, SIGTERM and SIGHUP do the same and then raise
    ``KeyboardInterrupt``.
    Raises :class:`UsageError` when the folder holds another run or the configuration cannot work,
    :class:`InputError` without usable pictures or with a full disk, :class:`ModelError` when the base cannot
    be loaded or steps stop having finite gradients.
    """
    accelerator = make_accelerator(config)
    folder = RunFolder(config.output, resume=config.resume)
    try:
        _on_main(accelerator, folder.open)
        trainer = Trainer(config, accelerator, folder, sheets=sheets)
        trainer.run(on_step)
        return trainer.finish()
    finally:
        folder.close()
        if accelerator.num_processes == 1:
            # accelerate remembers its first settings for the whole process; the next run has its own.
            accelerator.free_memory()
            AcceleratorState._reset_state(reset_partial_state=True)


def make_accelerator(config: TrainConfig) -> Accelerator:
    """accelerate's view of device, processes and number format. Raises :class:`UsageError` for a device or
    number format that is not there."""
    if config.device not in ("auto", "cpu", "cuda", "mps"):
        raise UsageError(
            f"device '{config.device}': auto, cpu, cuda or mps is expected; choose among several GPUs with "
            "CUDA_VISIBLE_DEVICES or accelerate config."
        )
    there: dict[str, Callable[[], bool]] = {
        "cuda": torch.cuda.is_available,
        "mps": torch.backends.mps.is_available,
    }
    if config.device in there and not there[config.device]():
        raise UsageError(f"device '{config.device}' cannot be used here: torch does not find one.")
    _check_launcher()
    names: list[str] = list(config.trackers) if config.trackers != "auto" else []
    if config.trackers == "auto" and find_spec("tensorboard") is not None:
        names = ["tensorboard"]
    missing = [name for name in names if find_spec(name) is None]
    if missing:
        raise UsageError(f"trackers: {missing[0]} is not installed: pip install {missing[0]}.")
    return Accelerator(
        cpu=config.device == "cpu"
        or (config.device == "auto" and not any(test() for test in there.values())),
        mixed_precision=_precision(config),
        gradient_accumulation_steps=config.accumulate,
        log_with=names or None,
        project_dir=str(config.output),
    )


def _check_launcher() -> None:
    """accelerate starts a single process on the CPU, and only its port tells that several were asked for."""
    several = os.environ.get("ACCELERATE_USE_CPU") == "True" and "MASTER_PORT" in os.environ
    if several and not {"WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE"} & os.environ.keys():
        raise UsageError(
            "accelerate launch --cpu starts one process, whatever --num_processes says; start several with "
            "torchrun --nproc-per-node N -m imprompt train …"
        )


def _precision(config: TrainConfig) -> str | None:
    """accelerate's name of the number format; ``None`` leaves it to accelerate's configuration."""
    on_gpu = config.device in ("auto", "cuda") and torch.cuda.is_available()
    if on_gpu:
        native = torch.cuda.get_device_capability() >= (8, 0)
    else:
        tests = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
        native = config.device != "mps" and any(getattr(torch.cpu, name, bool)() for name in tests)
    if config.dtype == "bfloat16" and not native:
        raise UsageError("dtype bfloat16: this device has no bfloat16 arithmetic; use float32 or auto.")
    if config.dtype == "float16" and not on_gpu:
        raise UsageError("dtype float16: gradients of float16 need a GPU; use bfloat16 or float32.")
    if config.dtype == "auto":
        if "ACCELERATE_MIXED_PRECISION" in os.environ:
            return None
        return "bf16" if native else "no"
    return {"float32": "no", "bfloat16": "bf16", "float16": "fp16"}[config.dtype]


@dataclass(frozen=True)
class Sample:
    """One forward pass's tensors, ready on the CPU."""

    batch: Batch
    clean: Tensor
    noise: Tensor
    steps: Tensor
    features: dict[str, Tensor]
    states: Tensor
    extra: dict[str, Tensor]

    def to(self, device: torch.device) -> Sample:
        """Copy to the device; on a GPU from pinned memory, without waiting."""

        def move(tensor: Tensor) -> Tensor:
            pinned = tensor.pin_memory() if device.type == "cuda" else tensor
            return pinned.to(device, non_blocking=True)

        return Sample(
            self.batch,
            move(self.clean),
            move(self.noise),
            move(self.steps),
            {name: move(tensor) for name, tensor in self.features.items()},
            move(self.states),
            {name: move(tensor) for name, tensor in self.extra.items()},
        )


class _Forward(nn.Module):
    """The adapter's weights and the UNet they act in, as one module that accelerate wraps.

    The UNet is no submodule: it is frozen, and no process has to hear of its weights. The tokens stay in
    place until :meth:`release`: a checkpointed UNet runs again in the backward pass and needs them.
    """

    def __init__(self, adapter: IPAdapter, unet: Any) -> None:
        super().__init__()
        self.weights = adapter.module
        self._outside = (adapter, unet)
        self._held = contextlib.ExitStack()

    def forward(
        self, noisy: Tensor, steps: Tensor, states: Tensor, features: Sequence[Tensor], extra: Any
    ) -> Any:
        """Predicted noise, velocity or picture."""
        adapter, unet = self._outside
        self._held.enter_context(adapter.training_tokens(adapter.projection(*features)))
        return unet(noisy, steps, states, return_dict=False, **extra)[0]

    def release(self) -> None:
        """Take the tokens away."""
        self._held.close()


class Trainer:
    """Owns a run: the frozen base, the adapter, optimizer, averaged weights."""

    def __init__(
        self,
        config: TrainConfig,
        accelerator: Accelerator,
        folder: RunFolder,
        *,
        sheets: int | None = None,
    ) -> None:
        self.accelerator, self.folder, self.device = accelerator, folder, accelerator.device
        self.quiet = config.quiet or not accelerator.is_main_process
        data = read_dataset(config.data, only=config.only)
        base, self.pipe = start.load_base(config.base)
        initial = start.load_start(config, base)
        kind = config.kind or (start.kind_of(initial) if initial is not None else "linear")
        trainable_rows = sum(row.trainable for row in data.rows)
        config = config.resolved(kind, trainable_rows, initial is not None)
        if sheets is not None and config.steps is not None:
            config = config.model_copy(update={"sample_every": max(1, config.steps // sheets)})
        self.config = config
        self.accumulate = accelerator.gradient_accumulation_steps
        self.per_step = config.batch * self.accumulate * accelerator.num_processes
        self.unet = self.pipe.unet.eval().requires_grad_(False)
        self.scheduler_config = self.pipe.scheduler.config
        self.prediction = self.scheduler_config.get("prediction_type", "epsilon")
        self.alpha_bar = _alphas(self.pipe).to(self.device)
        self.notes = list(data.notes)
        self._encode(data.rows, list(data.rejected), initial)
        adapter = initial or start.new_adapter(config, kind, self.unet, self.feature_width)
        self.start_name = config.init if initial is not None else None
        self._begin(adapter, base.name)
        self._prepare()
        self.step, self.skipped, self.interrupted = 0, 0, False
        self.best = math.inf
        self.figures: list[dict[str, Any]] = []
        if config.resume:
            self._restore()
        self.preview = None
        if config.sample_every and accelerator.is_main_process:
            self.preview = Preview(self.pipe, self.adapter, self.data, self.plan, config.sample_guidance)

    # ---- preparing

    def _encode(self, rows: Sequence[Any], rejected: list[Rejected], initial: IPAdapter | None) -> None:
        """Encode everything frozen, with nothing but the encoder at work on the device."""
        config, pipe, accelerator = self.config, self.pipe, self.accelerator
        ranks = cache.Ranks(
            accelerator.process_index, accelerator.num_processes, accelerator.wait_for_everyone
        )
        factor = 2 ** (len(pipe.vae.config.block_out_channels) - 1)
        side = config.resolution or self.unet.config.sample_size * factor
        if side % factor:
            raise UsageError(f"resolution must be a multiple of {factor} for this base, given {side}.")
        keys, _ = cache.picture_keys(rows, config.workers)
        sizes = [(side, side)] * len(rows)
        if config.buckets:
            sizes = [_bucket(row, side, max(factor, 8)) for row in rows]
        pipe.vae.to(self.device)
        latents = cache.encode_latents(rows, pipe.vae, config, sizes, self.device, ranks)
        if config.cache_folder is not None:
            pipe.vae.to("cpu")
        name = start.FEATURES[config.kind or "linear"]
        encoder = start.load_encoder(config, pipe, initial)
        self.encoder_name = config.image_encoder or encoder.name
        reader = cache.ClipFeatures(encoder.to(self.device), name[-1])
        features = cache.encode_features(rows, reader, config, sizes, ranks)
        negative = reader.negative()
        if config.cache_folder is not None:
            encoder.to("cpu")
        bad = latents.rejected | features.rejected
        self._quarantine(rows, bad, rejected)
        self.plan = Plan(rows, config, unusable=set(bad), keys=keys, sizes=sizes, per_step=self.per_step)
        captions = self.plan.captions
        for part in ("text_encoder", "text_encoder_2"):
            if getattr(pipe, part, None) is not None:
                getattr(pipe, part).to(self.device)
        texts = cache.encode_texts(pipe, captions, config, self.device, ranks)
        self.base_hash = cache.fingerprint(
            self.unet, pipe.vae, *(m for m in (pipe.text_encoder, getattr(pipe, "text_encoder_2", None)) if m)
        )
        self.encoder_hash = reader.identity
        pipe.text_encoder = pipe.image_encoder = None  # only UNet, adapter and VAE stay
        if hasattr(pipe, "text_encoder_2"):
            pipe.text_encoder_2 = None
        self.feature_width = int(next(iter(negative.values())).shape[-1])
        index = {caption: number for number, caption in enumerate(captions)}
        self.data = cache.EncodedSet(latents, features, name, negative, texts, index, rejected)
        self.data_hash, self.pictures = data_hash(rows, keys), len(rows)

    def _quarantine(self, rows: Sequence[Any], bad: dict[int, str], rejected: list[Rejected]) -> None:
        """List what cannot be used; stop where it is too much to be an accident."""
        rejected += [Rejected(rows[index].name, why) for index, why in sorted(bad.items())]
        if not bad:
            return
        first = f"the first: {rows[min(bad)].name}: {bad[min(bad)]}"
        if len(bad) == len(rows):
            raise InputError(f"none of the {len(rows)} pictures can be trained on ({first}).")
        if self.config.on_bad_sample == "stop":
            raise InputError(f"{len(bad)} pictures cannot be trained on ({first}).")
        if len(bad) > max(BAD_LEAST, BAD_SHARE * len(rows)):
            raise InputError(
                f"{len(bad)} of {len(rows)} pictures cannot be trained on, more than {BAD_SHARE:.0%} "
                f"({first}). "
                "Repair or remove them."
            )

    def _begin(self, adapter: IPAdapter, base_name: str) -> None:
        """Check that this is the run the folder holds, and say what it trains on."""
        start_hash = cache.fingerprint(adapter.module)
        identity = Identity(
            self.config.identity(),
            self.pictures,
            self.data_hash,
            self.base_hash,
            self.encoder_hash,
            start_hash,
            self.per_step,
        )
        _on_main(self.accelerator, lambda: self.folder.begin(identity))
        self.adapter, self.base_name = adapter, base_name
        if self.accelerator.is_main_process:
            self.folder.write("rejected.txt", "".join(f"{item}\n" for item in self.data.rejected))
        plan, left = self.plan, len(self.data.rejected)
        held = " (training pictures: too few to hold any out)" if plan.validates_on_training_rows else ""
        begun = f"from '{self.start_name}'" if self.start_name else "from new weights"
        self._say(
            f"{len(plan.training)} training pictures, {len(plan.validation)} for validation{held}, "
            f"{len(self.data.caption_index)} captions; {self.config.kind} {begun}, "
            f"{self.config.steps} steps of "
            f"{self.per_step}, lr {self.config.lr:g}"
            + (f"; {left} left out, see rejected.txt" if left else "")
        )
        for note in self.notes:
            self._say(note)

    def _prepare(self) -> None:
        config, accelerator = self.config, self.accelerator
        reduced = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(accelerator.mixed_precision)
        self.dtype = reduced or torch.float32
        self.unet.to(self.device, self.dtype)
        if config.gradient_checkpointing:
            self.unet.enable_gradient_checkpointing()
        self.adapter.to(self.device, torch.float32)
        self.parameters = start.trainable(self.adapter, config, self.unet)
        self.adapter.attach(self.unet)
        if config.compile:
            self.unet.compile_repeated_blocks()
        self.forward = accelerator.prepare(_Forward(self.adapter, self.unet))
        self.fused = self.device.type in ("cpu", "cuda")
        assert config.lr is not None
        plain = torch.optim.AdamW(
            self.parameters, config.lr, config.betas, weight_decay=config.weight_decay, fused=self.fused
        )
        self.plain_optimizer, self.optimizer = plain, accelerator.prepare(plain)
        self.ema = EMAModel(self.parameters, decay=config.ema, foreach=True) if config.ema else None
        if self.ema is not None:
            self.ema.to(self.device)
        if accelerator.log_with:
            accelerator.init_trackers("tracker", config={"run": str(config.output)})

    # ---- running

    def run(self, on_step: Callable[[int], None] | None = None) -> None:
        """All remaining steps, with validation, samples, log lines and checkpoints on the way."""
        config = self.config
        assert config.steps is not None
        self._sums = torch.zeros(2, BANDS + 1, device=self.device)
        self._streak = torch.zeros((), device=self.device)
        end = math.inf if config.minutes is None else time.monotonic() + 60 * config.minutes
        if self.step == 0:
            self._validate()
            self._sample()
        self.terminal = sys.stderr.isatty()
        bar = tqdm(
            total=config.steps,
            initial=self.step,
            desc="training",
            unit="step",
            disable=self.quiet or not self.terminal,
        )
        self._clock, self._since = time.monotonic(), self.step
        with bar, self._catching_signals():
            for samples in self._prefetched():
                self._advance(samples)
                self.step += 1
                bar.update()
                if on_step is not None:
                    on_step(self.step)
                stop = self._agree(self.interrupted or time.monotonic() >= end)
                last = stop or self.step == config.steps
                if last or self.step % config.log_every == 0 or self.device.type == "cpu":
                    self._check_streak(last)
                if last or self.step % config.checkpoint_every == 0 or self.step % config.log_every == 0:
                    self._report(bar)
                if last or self.step % config.checkpoint_every == 0:
                    self._save_checkpoint()
                self._look(last)
                if last:
                    break
        if self.interrupted:
            self.finish()
            raise KeyboardInterrupt

    def _look(self, last: bool) -> None:
        """Validate and draw samples where it is time to; that is not counted as training time."""
        before = time.monotonic()
        if (last and not self.interrupted) or self.step % self.config.validate_every == 0:
            self._validate()
        if self.config.sample_every and (last or self.step % self.config.sample_every == 0):
            self._sample()
        self._clock += time.monotonic() - before

    def _prefetched(self) -> Iterator[list[Sample]]:
        """The forward passes of each remaining step; the next step's are made while one is trained on."""
        assert self.config.steps is not None
        with ThreadPoolExecutor(1) as pool:
            pending = pool.submit(self._samples, self.step) if self.step < self.config.steps else None
            step = self.step
            while pending is not None:
                ready = pending.result()
                step += 1
                pending = pool.submit(self._samples, step) if step < self.config.steps else None
                yield ready

    def _samples(self, step: int) -> list[Sample]:
        return [self._sample_of(step * self.accumulate + part) for part in range(self.accumulate)]

    def _sample_of(self, number: int) -> Sample:
        """What forward pass ``number`` sees; a function of the run's seed and the samples' global indices."""
        config, data, accelerator = self.config, self.data, self.accelerator
        first = (number * accelerator.num_processes + accelerator.process_index) * config.batch
        indices = range(first, first + config.batch)
        batch = self.plan.samples(indices)
        clean = data.latents.rows("mean", batch.targets, batch.flips)
        sources = [generator_for(config.seed, "noise", index) for index in indices]
        luck = torch.stack([torch.rand((), generator=source) for source in sources])
        noise = torch.stack([torch.randn(clean.shape[1:], generator=source) for source in sources])
        if config.latent == "sample":
            spread = torch.stack([torch.randn(clean.shape[1:], generator=source) for source in sources])
            clean = clean + data.latents.rows("std", batch.targets, batch.flips) * spread
        if config.noise_offset:
            shifts = [torch.randn(clean.shape[1], 1, 1, generator=source) for source in sources]
            noise = noise + config.noise_offset * torch.stack(shifts)
        positions = torch.tensor([index % self.per_step for index in indices])
        steps = stratified_timesteps(positions, luck, self.per_step, len(self.alpha_bar))
        features = {
            name: drop_features(
                data.features.rows(name, batch.references, batch.views),
                data.negative[name],
                batch.image_dropped,
            )
            for name in data.feature
        }
        states, extra = self._texts(batch.captions, batch.targets)
        return Sample(batch, clean, noise, steps, features, states, extra)

    def _texts(self, captions: Sequence[str], targets: Sequence[int]) -> tuple[Tensor, dict[str, Tensor]]:
        """Text states and, for SDXL, pooled text and the targets' sizes."""
        states = self.data.text("states", captions)
        if not unet_takes_pooled(self.unet):
            return states, {}
        pooled = self.data.text("pooled", captions)
        return states, {"text_embeds": pooled, "time_ids": self.data.latents.rows("crop", targets)}

    def _advance(self, samples: Sequence[Sample]) -> None:
        """One optimizer step. A step without a finite gradient changes nothing and is counted."""
        config, accelerator = self.config, self.accelerator
        assert config.lr is not None
        assert config.steps is not None
        for group in self.plain_optimizer.param_groups:
            group["lr"] = learning_rate(
                self.step, peak=config.lr, steps=config.steps, warmup=config.warmup, schedule=config.schedule
            )
        for sample in samples:
            with accelerator.accumulate(self.forward):
                moved = sample.to(self.device)
                try:
                    error = self.error(moved)
                    alpha_bar = self.alpha_bar[moved.steps]
                    loss = (error * loss_weights(self.prediction, alpha_bar, config.min_snr)).mean()
                    accelerator.backward(loss)
                finally:
                    accelerator.unwrap_model(self.forward).release()
                self._count(error.detach(), loss.detach(), moved.steps)
                if accelerator.sync_gradients:
                    self._update()

    def _update(self) -> None:
        limit = self.config.clip or math.inf
        norm = torch.as_tensor(self.accelerator.clip_grad_norm_(self.parameters, limit))
        bad = (~norm.isfinite()).float().to(self.device)
        self._streak = (self._streak + bad) * bad
        if self.accelerator.scaler is None and self.fused:
            # The contract of GradScaler: a fused optimizer skips the step on the device, without a sync.
            self.plain_optimizer.grad_scale = None  # type: ignore[attr-defined]
            self.plain_optimizer.found_inf = bad  # type: ignore[attr-defined]
        elif self.accelerator.scaler is None and bool(bad):
            self.optimizer.zero_grad()
            return
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.ema is not None:
            self.ema.step(self.parameters)

    def error(self, sample: Sample) -> Tensor:
        """Mean squared error of each picture, ``B``."""
        alpha_bar = self.alpha_bar[sample.steps]
        noisy = broadcast(alpha_bar.sqrt()) * sample.clean + broadcast((1 - alpha_bar).sqrt()) * sample.noise
        extra = {"added_cond_kwargs": sample.extra} if sample.extra else {}
        features = [sample.features[name] for name in self.data.feature]
        predicted = self.forward(noisy, sample.steps, sample.states.to(self.dtype), features, extra)
        target = prediction_target(self.prediction, sample.clean, sample.noise, alpha_bar)
        return functional.mse_loss(predicted.float(), target, reduction="none").flatten(1).mean(1)

    def _count(self, error: Tensor, loss: Tensor, steps: Tensor) -> None:
        """Add finite errors to the sums: of all, and by band of the schedule."""
        finite = error.isfinite()
        band = steps * BANDS // len(self.alpha_bar)
        self._sums[0].index_add_(0, band, torch.where(finite, error, 0.0))
        self._sums[1].index_add_(0, band, finite.float())
        good = loss.isfinite().float()
        self._sums[0, BANDS] += torch.nan_to_num(loss, 0.0, 0.0, 0.0) * good
        self._sums[1, BANDS] += good

    def _check_streak(self, last: bool) -> None:
        streak = int(self._streak)
        if streak >= self.config.max_skipped or (last and streak):
            found = self.folder.checkpoints()
            kept = (
                f"the last good checkpoint is '{found[-1].name}'" if found else "there is no checkpoint yet"
            )
            raise ModelError(
                f"the gradient is not finite at step {self.step}, nor in the {streak - 1} steps "
                "before it (lr "
                f"{self.config.lr:g}); {kept}. Try a lower learning rate, a longer warm-up or float32."
            )

    # ---- reporting

    def _report(self, bar: Any) -> None:
        config, accelerator = self.config, self.accelerator
        assert config.steps is not None
        total = accelerator.reduce(self._sums.clone(), "sum")
        counts = total[1].clamp(min=1)
        *bands, loss = torch.where(total[1] > 0, total[0] / counts, math.nan).tolist()
        taken = self.step - self._since
        expected = taken * self.accumulate * accelerator.num_processes
        failed = expected - int(total[1, BANDS])
        self.skipped += failed
        pace = taken * self.per_step / max(time.monotonic() - self._clock, 1e-9)
        self._sums.zero_()
        self._clock, self._since = time.monotonic(), self.step
        assert config.lr is not None
        rate = learning_rate(
            self.step - 1, peak=config.lr, steps=config.steps, warmup=config.warmup, schedule=config.schedule
        )
        bar.set_postfix(loss=f"{loss:.4f}")
        self._log(
            {
                "step": self.step,
                "loss": loss,
                "loss_by_band": bands,
                "lr": rate,
                "pictures_per_s": round(pace, 2),
                "skipped": self.skipped,
            }
        )
        left = (config.steps - self.step) * self.per_step / pace
        if failed:
            self._say(f"step {self.step}: {failed} forward passes without a finite loss were left out")
        if not self.terminal:  # a bar in a log file is no use
            self._say(
                f"step {self.step}/{config.steps} loss {loss:.4f} lr {rate:.2g} {pace:.1f} pictures/s, "
                f"{_duration(left)} left"
            )

    @torch.no_grad()
    def _validate(self) -> None:
        """Loss on fixed pictures, noise and timesteps: with the picture, without it, and of the bare base."""
        if not self.accelerator.is_main_process:
            return
        with self._averaged_weights():
            kinds = {"with_image": True, "without_image": False}
            found = {name: self._validation_loss(shown) for name, shown in kinds.items()}
        if not hasattr(self, "_bare"):
            self._bare = self._validation_loss(None)
        found["bare_base"] = self._bare
        means = {name: float(losses.mean()) for name, losses in found.items()}
        record: dict[str, Any] = {"step": self.step}
        record |= {f"validation_{name}": mean for name, mean in means.items()}
        record["gap"] = means["without_image"] - means["with_image"]
        record["gap_by_noise"] = (found["without_image"] - found["with_image"]).tolist()
        self._log(record)
        self.figures.append(record)
        self._say(
            f"step {self.step}: held-out loss {means['with_image']:.4f} with the picture, "
            f"{means['without_image']:.4f} without, {means['bare_base']:.4f} of the bare base"
        )
        if not all(math.isfinite(mean) for mean in means.values()):
            raise ModelError(f"the validation loss is not finite at step {self.step}: {means}.")
        if self.config.keep == "best" and means["with_image"] < self.best:
            self.best = means["with_image"]
            self._write_adapter()

    def _validation_loss(self, shown: bool | None) -> Tensor:
        """Mean loss by band, with the picture, with the negative, or (``None``) without the adapter."""
        data, length = self.data, len(self.alpha_bar)
        sums, rows = torch.zeros(BANDS), self.plan.validation
        inner = self.accelerator.unwrap_model(self.forward)
        for row in rows:
            clean = data.latents.rows("mean", [row], [0]).expand(BANDS, -1, -1, -1)
            noise = torch.randn(clean.shape[1:], generator=generator_for(0, "validation", row))
            features = {}
            for name in data.feature:
                own = data.features.rows(name, [row], [0])
                features[name] = (own if shown else data.negative[name].expand_as(own)).expand(
                    BANDS, *own.shape[1:]
                )
            states, extra = self._texts([self.plan.validation_caption(row)] * BANDS, [row] * BANDS)
            steps = torch.tensor([int((level + 0.5) / BANDS * length) for level in range(BANDS)])
            batch = Batch([row], [row], [0], [""], torch.zeros(1, dtype=torch.bool))
            noises = noise.expand_as(clean)
            sample = Sample(batch, clean, noises, steps, features, states, extra).to(self.device)
            try:
                sums += (self.error(sample) if shown is not None else self._bare_error(sample)).cpu()
            finally:
                inner.release()
        return sums / len(rows)

    def _bare_error(self, sample: Sample) -> Tensor:
        """The base's own error, without the adapter."""
        alpha_bar = self.alpha_bar[sample.steps]
        noisy = broadcast(alpha_bar.sqrt()) * sample.clean + broadcast((1 - alpha_bar).sqrt()) * sample.noise
        extra = {"added_cond_kwargs": sample.extra} if sample.extra else {}
        with self.accelerator.autocast():
            states = sample.states.to(self.dtype)
            predicted = self.unet(noisy, sample.steps, states, return_dict=False, **extra)[0]
        target = prediction_target(self.prediction, sample.clean, sample.noise, alpha_bar)
        return functional.mse_loss(predicted.float(), target, reduction="none").flatten(1).mean(1)

    def _sample(self) -> None:
        """Draw a sheet of samples, and tell by the image encoder how near they are to their pictures."""
        if self.preview is None:
            return
        with self._averaged_weights():
            sheet, _ = self.preview.draw()
        path = self.folder.path / "samples" / f"{self.step:08d}.png"
        write_atomic(path, sheet, overwrite=True)
        self._say(f"samples: {path}")

    def _log(self, record: dict[str, Any]) -> None:
        if not self.accelerator.is_main_process:
            return
        self.folder.log(record)
        values = {k: v for k, v in record.items() if isinstance(v, int | float) and k != "step"}
        bands = record.get("loss_by_band", ())
        values |= {f"loss_by_band/{number}": value for number, value in enumerate(bands)}
        self.accelerator.log(values, step=record["step"])

    def _say(self, line: str) -> None:
        if not self.quiet:
            tqdm.write(line, file=sys.stderr)

    # ---- weights

    @contextlib.contextmanager
    def _averaged_weights(self) -> Iterator[None]:
        if self.ema is None:
            yield
            return
        current = [parameter.detach().clone() for parameter in self.parameters]
        self.ema.copy_to(self.parameters)
        try:
            yield
        finally:
            torch._foreach_copy_([parameter.data for parameter in self.parameters], current)

    def finish(self) -> Path:
        """Write the adapter, the model card and what was asked for elsewhere; take the adapter off the
        UNet."""
        path = self.folder.path / WEIGHT_NAME
        if self.accelerator.is_main_process:
            if self.config.keep == "last" or not path.exists():
                with self._averaged_weights():
                    self._write_adapter()
            kept = self._kept()
            self.folder.write("README.md", model_card(self.config, self._about(), self.figures, kept))
            self._say(f"wrote {path}" + (f" (step {kept['step']})" if kept else ""))
            if self.config.push_to_hub and not self.interrupted:
                _push(self.config.push_to_hub, self.folder.path)
        self.accelerator.end_training()
        self.adapter.detach()
        return path

    def _kept(self) -> dict[str, Any] | None:
        """The validation of the weights in the adapter file."""
        if not self.figures:
            return None
        if self.config.keep == "best":
            return min(self.figures, key=lambda record: float(record["validation_with_image"]))
        return self.figures[-1]

    def _about(self) -> dict[str, str]:
        return {
            "imprompt.base": self.base_name,
            start.ENCODER_KEY: self.encoder_name,
            "imprompt.data": self.data_hash,
            "imprompt.pictures": str(self.pictures),
            "imprompt.step": str(self.step),
            "imprompt.start": self.start_name or "new weights",
        }

    def _write_adapter(self) -> None:
        """Write the weights as they are now in the published layout, and read them back."""
        dtype = getattr(torch, self.config.save_dtype)
        expected: StateDict = {
            section: {name: tensor.detach().to("cpu", dtype) for name, tensor in tensors.items()}
            for section, tensors in self.adapter.state_dict().items()
        }
        path = self.folder.path / WEIGHT_NAME
        made = IPAdapter.from_state_dict(expected, variant=self.adapter.checkpoint.variant.name)
        made.checkpoint = replace(made.checkpoint, metadata=self._about())
        made.save_pretrained(path.parent, WEIGHT_NAME)
        read = IPAdapter.from_pretrained(path).state_dict()
        for section, tensors in expected.items():
            for name, tensor in tensors.items():
                if name not in read[section] or not torch.equal(read[section][name].cpu(), tensor):
                    raise ModelError(f"'{path}' does not read back as written: '{section}.{name}' differs.")

    def _save_checkpoint(self) -> None:
        """Everything needed to go on. Checked finite, hashed, and written whole or not at all."""
        if not self.accelerator.is_main_process:
            return
        tensors: dict[str, Tensor] = {
            f"weights.{name}": tensor for name, tensor in self.adapter.named_parameters()
        }
        for name, parameter in self._trained():
            state = self.plain_optimizer.state[parameter]
            tensors |= {f"{key}.{name}": torch.as_tensor(value) for key, value in state.items()}
        if self.ema is not None:
            averaged = self.ema.shadow_params
            tensors |= {f"averaged.{name}": averaged[n] for n, (name, _) in enumerate(self._trained())}
        about: dict[str, Any] = {
            "best": self.best if math.isfinite(self.best) else None,
            "skipped": self.skipped,
        }
        about["averages"] = self.ema.optimization_step if self.ema is not None else 0
        if self.accelerator.scaler is not None:
            about["scale"] = self.accelerator.scaler.get_scale()
        self.folder.save_checkpoint(self.step, tensors, about, self.config.keep_checkpoints)

    def _trained(self) -> list[tuple[str, nn.Parameter]]:
        return [(name, each) for name, each in self.adapter.named_parameters() if each.requires_grad]

    @torch.no_grad()
    def _restore(self) -> None:
        found = _on_main(self.accelerator, self.folder.load_checkpoint, share=False)
        if self.accelerator.num_processes > 1 and not self.accelerator.is_main_process:
            found = self.folder.load_checkpoint()
        if found is None:
            return
        tensors, manifest, damaged = found
        for name, parameter in self.adapter.named_parameters():
            value = tensors.get(f"weights.{name}")
            if value is None or value.shape != parameter.shape:
                raise ModelError(
                    f"the checkpoint of step {manifest['step']} is of another adapter: '{name}'."
                )
            parameter.copy_(value)
        for number, (name, parameter) in enumerate(self._trained()):
            state = {key: tensors[f"{key}.{name}"] for key in ("step", "exp_avg", "exp_avg_sq")}
            self.plain_optimizer.state[parameter] = {
                key: value.to(self.device) if key != "step" or self.device.type == "cuda" else value
                for key, value in state.items()
            }
            if self.ema is not None:
                self.ema.shadow_params[number] = tensors[f"averaged.{name}"].to(self.device)
        if self.ema is not None:
            self.ema.optimization_step = int(manifest["averages"])
        self.step, self.skipped = int(manifest["step"]), int(manifest["skipped"])
        self.best = math.inf if manifest["best"] is None else float(manifest["best"])
        if self.accelerator.is_main_process:
            self.folder.rewind(self.step)
            self.figures = [record for record in self.folder.records() if "gap" in record]
        for each in damaged:
            self._say(f"a checkpoint is damaged and not used: {each}")
        self._say(f"resumed at step {self.step}")

    # ---- stopping

    def _agree(self, stop: bool) -> bool:
        """Whether any process wants to stop: all end at the same step."""
        if self.accelerator.num_processes == 1:
            return stop
        if self.step % AGREE_EVERY and self.step != self.config.steps:
            return False
        wish = torch.tensor([float(stop), float(self.interrupted)], device=self.device)
        wishes = self.accelerator.reduce(wish, "sum").tolist()
        self.interrupted = wishes[1] > 0
        return wishes[0] > 0

    @contextlib.contextmanager
    def _catching_signals(self) -> Iterator[None]:
        """The first signal ends the run after this step, with a checkpoint; the second ends it at once."""

        def note(number: int, frame: FrameType | None) -> None:
            if self.interrupted:
                raise KeyboardInterrupt
            self.interrupted = True
            self._say("stopping after this step (again to stop at once)")

        before: dict[int, Any] = {}
        for name in ("SIGINT", "SIGTERM", "SIGHUP"):
            number = getattr(signal, name, None)
            with contextlib.suppress(ValueError):  # not the main thread: signals belong to someone else
                if number is not None:
                    before[number] = signal.signal(number, note)
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def _on_main(accelerator: Accelerator, work: Callable[[], T], *, share: bool = True) -> T | None:
    """Do something in the main process alone; what it raises is raised in all of them."""
    found, error = None, None
    if accelerator.is_main_process:
        try:
            found = work()
        except ImpromptError as raised:
            error = raised
    if accelerator.num_processes > 1:
        said: list[Any] = [error]
        broadcast_object_list(said)
        error = said[0]
    if error is not None:
        raise error
    return found


def _alphas(pipe: Any) -> Tensor:
    from diffusers import DDPMScheduler

    return DDPMScheduler.from_config(pipe.scheduler.config).alphas_cumprod.float()


def _bucket(row: Any, side: int, multiple: int) -> tuple[int, int]:
    import io

    from PIL import Image

    try:
        with Image.open(io.BytesIO(row.read())) as image:
            return bucket_size(image.width, image.height, side, multiple)
    except Exception:  # said where it is decoded
        return side, side


def _duration(seconds: float) -> str:
    minutes = seconds / 60
    return f"{minutes:.0f} min" if minutes < 90 else f"{minutes / 60:.1f} h"


def _push(repository: str, folder: Path) -> None:
    """Upload the adapter, its card and the last sheet of samples."""
    from huggingface_hub import HfApi

    try:
        api = HfApi()
        api.create_repo(repository, exist_ok=True)
        api.upload_folder(
            repo_id=repository, folder_path=folder, allow_patterns=[WEIGHT_NAME, "README.md", "samples/*.png"]
        )
    except Exception as error:  # the hub's client raises nearly anything
        raise ModelError(
            f"the adapter is in '{folder}' but was not uploaded to {repository}: {error}."
        ) from error
