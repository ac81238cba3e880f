"""Train an adapter on a frozen base, with figures that show whether it learns.

``train(config)`` writes ``ip-adapter.safetensors`` in the published layout into the run's folder, with
``run.json`` (the run's identity), ``log.jsonl``, a model card and the newest checkpoints. The training loss
stays flat while an adapter learns. What shows progress is the validation loss on fixed pictures, noise and
timesteps: with the picture, without it, and of the bare base.

accelerate handles devices, processes, number formats and trackers; its configuration and ``accelerate
launch`` work. Nothing waits for the device between two log lines.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from diffusers import DDPMScheduler
from torch import Tensor
from torch.nn import functional
from tqdm import tqdm

from imprompt.data.rows import Dataset
from imprompt.errors import ModelError
from imprompt.io import write_atomic
from imprompt.training import cache
from imprompt.training.card import Card, html, markdown, noted
from imprompt.training.config import TrainConfig
from imprompt.training.cpu_kernels import CPUKernels
from imprompt.training.folder import WEIGHT_NAME, RunFolder
from imprompt.training.graphs import GraphedPass, Pass
from imprompt.training.launch import make_accelerator, on_main
from imprompt.training.learned import Learned
from imprompt.training.meter import BANDS, Meter
from imprompt.training.objective import broadcast, learning_rate, loss_weights, prediction_target
from imprompt.training.prepare import Prepared, prepare
from imprompt.training.preview import Preview, unet_takes_pooled
from imprompt.training.result import check_repository, push, validation_in, write_adapter
from imprompt.training.samples import Forward, Sample, Samples, Shown
from imprompt.training.stopping import Stopper
from imprompt.weights import silence_library_logging

SHEET_SECONDS = 180.0
"""Least time between two sheets of samples that no number of steps is given for."""


def train(
    config: TrainConfig, *, data: Dataset | None = None, on_step: Callable[[int], None] | None = None
) -> Path:
    """Train one adapter and return its file, which was read back as a check.

    With ``data``, rows made in Python, nothing is read from ``config.data``, which then is only the name that
    messages and the model card give them.
    ``on_step`` is called after each step with the number of steps so far, in every process.

    With ``minutes`` the run may end before its last step: the adapter is written as it is then, and
    ``resume`` continues the run. Ctrl-C, SIGTERM and SIGHUP do the same and then raise ``KeyboardInterrupt``.
    Raises :class:`UsageError` when the folder holds another run or the configuration cannot work,
    :class:`InputError` without usable pictures or with a full disk, :class:`ModelError` when the base cannot
    be loaded or steps stop having finite gradients.
    """
    check_repository(config.push_to_hub)
    accelerator = make_accelerator(config)
    folder = RunFolder(config.output, resume=config.resume)
    try:
        on_main(accelerator, folder.open)
        trainer = Trainer(config, accelerator, folder, data)
        trainer.run(on_step)
        return trainer.finish()
    finally:
        folder.close()
        if accelerator.num_processes == 1:
            # accelerate remembers its first settings for the whole process; the next run has its own.
            accelerator.free_memory()
            AcceleratorState._reset_state(reset_partial_state=True)


class Trainer:
    """A run: the frozen base, the adapter in training, validation, samples and checkpoints."""

    def __init__(
        self, config: TrainConfig, accelerator: Accelerator, folder: RunFolder, data: Dataset | None = None
    ) -> None:
        self.accelerator, self.folder, self.device = accelerator, folder, accelerator.device
        self.quiet = config.quiet or not accelerator.is_main_process
        prepared = prepare(config.following(folder.course()), accelerator, data)
        self.config, self.pipe, self.adapter = prepared.config, prepared.pipe, prepared.adapter
        self.data, self.plan, self.about = prepared.data, prepared.plan, prepared.about
        self.accumulate = accelerator.gradient_accumulation_steps
        assert self.config.steps is not None
        self.steps = self.config.steps
        self.unet = self.pipe.unet.eval().requires_grad_(False)
        self.prediction = self.pipe.scheduler.config.get("prediction_type", "epsilon")
        self.alpha_bar = _alphas(self.pipe).to(self.device)
        self.samples = Samples(
            self.config,
            self.data,
            self.plan,
            schedule_length=len(self.alpha_bar),
            takes_pooled=unet_takes_pooled(self.unet),
            process=accelerator.process_index,
            processes=accelerator.num_processes,
        )
        self._place()  # checks what can only be checked on the UNet, so before the run begins
        on_main(accelerator, lambda: self._begin(prepared))
        if accelerator.log_with:
            accelerator.init_trackers("tracker", config={"run": str(self.config.output)})
        self.step = 0
        self.meter = Meter(accelerator, len(self.alpha_bar))
        self.stopper = Stopper(accelerator, self.config.minutes)
        self.terminal = sys.stderr.isatty()
        self.best = math.inf
        self._bare: Tensor | None = None
        self.figures: list[dict[str, Any]] = []
        if config.resume:
            self._restore()
        self.preview = None
        self.next_sheet = 0.0
        if self.config.sample_every != 0 and accelerator.is_main_process:
            self.preview = Preview(self.pipe, self.adapter, self.data, self.plan, config.sample_guidance)

    def _begin(self, prepared: Prepared) -> None:
        """Check that the folder is this run's, clean its cache, and report what it trains on."""
        self.folder.begin(prepared.identity, prepared.config.course())
        removed = cache.clean(self.config, (self.data.latents, self.data.features, self.data.texts))
        rejected = self.data.rejected
        self.folder.write("rejected.txt", "".join(f"{item}\n" for item in rejected))
        plan, config = self.plan, self.config
        held = (
            " (training pictures: too few different ones to hold any out)"
            if plan.validates_on_training_rows
            else ""
        )
        self._say(
            f"{len(plan.training)} training pictures, {len(plan.validation)} for validation{held}, "
            f"{len(self.data.caption_index)} captions; {config.kind} from {self.about['imprompt.start']}, "
            f"{config.steps} steps of {plan.per_step}, lr {config.lr:g}"
            + (f"; {len(rejected)} left out, see rejected.txt ({rejected[0]})" if rejected else "")
        )
        for note in (*prepared.notes, *([removed] if removed else [])):
            self._say(note)

    def _place(self) -> None:
        config, accelerator = self.config, self.accelerator
        self.dtype: torch.dtype = getattr(torch, config.dtype)
        with silence_library_logging():  # diffusers warns of every cast
            self.unet.to(self.device, self.dtype)
        if self.device.type == "cpu":  # convolutions are faster so; on a GPU it was not measured
            self.unet.to(memory_format=torch.channels_last)
        half = self.device.type == "cpu" and self.dtype.itemsize == 2 and not config.compile
        self.kernels = CPUKernels() if half else nullcontext()
        if config.gradient_checkpointing:
            self.unet.enable_gradient_checkpointing()
        self.adapter.to(self.device, torch.float32)
        self.learned = Learned(self.adapter, config, self.unet, self.device)
        self.adapter.attach(self.unet)
        if config.compile:
            self.unet.compile_repeated_blocks()
        self.forward = accelerator.prepare(Forward(self.adapter, self.unet))
        self.optimizer = accelerator.prepare(self.learned.optimizer)
        self.pass_of: Pass = self._pass
        if self._graphs:
            self.pass_of = GraphedPass(self._pass, self.learned.parameters, self._say)

    @property
    def _graphs(self) -> bool:
        """Whether passes are CUDA graphs: on one GPU, where each is a step and is not run in parts, and no
        other thread encodes pictures there meanwhile."""
        config, accelerator = self.config, self.accelerator
        apart = self.accumulate > 1 or accelerator.num_processes > 1 or accelerator.scaler is not None
        parts = config.compile or config.gradient_checkpointing or config.cache_folder is None
        return config.cuda_graphs and self.device.type == "cuda" and not apart and not parts

    # ---- running

    def run(self, on_step: Callable[[int], None] | None = None) -> None:
        """Take all remaining steps, with validation, samples, log lines and checkpoints."""
        if self.step == 0:
            self._validate()
            self._sample()
        elif self.step >= self.steps:
            self._say(
                f"no step is left: the run has taken {self.step} of {self.steps}; --steps asks for more"
            )
        hidden = self.quiet or not self.terminal
        bar = tqdm(total=self.steps, initial=self.step, desc="training", unit="step", disable=hidden)
        self.meter.start()
        with bar, self.stopper.listening(self._say):
            for samples in self._prefetched():
                self.advance(samples)
                self.step += 1
                bar.update()
                if on_step is not None:
                    on_step(self.step)
                last = self.step == self.steps
                last = self.stopper.agree(self.step, last) or last
                self._after_step(last, bar)
                if last:
                    break
        if self.stopper.interrupted:
            self.finish()
            raise KeyboardInterrupt

    def _after_step(self, last: bool, bar: Any) -> None:
        """Do what is due after a step: checks, a log line, validation, a checkpoint, samples."""
        config = self.config

        def due(every: int | None) -> bool:
            return every is not None and (last or self.step % every == 0)

        log, save = due(config.log_every), due(config.checkpoint_every)
        if log or self.device.type == "cpu":  # elsewhere the check would wait for the device
            self._check_streak(last)
        if log or save:
            self._report(bar)
        before = time.monotonic()
        if due(config.validate_every) and (config.keep == "best" or not self.stopper.interrupted):
            self._validate()
        if save:  # a resumed run does not validate the checkpoint's step again
            self._save_checkpoint()
        if self._sheet_due(last):
            self._sample()
        self.meter.pause(time.monotonic() - before)

    def _prefetched(self) -> Iterator[list[Sample]]:
        """The samples of each remaining step; those of the next are made during a step."""
        with ThreadPoolExecutor(1) as pool:
            pending = pool.submit(self._samples, self.step)
            for step in range(self.step + 1, self.steps + 1):
                ready = pending.result()
                if step < self.steps:
                    pending = pool.submit(self._samples, step)
                yield ready

    def _samples(self, step: int) -> list[Sample]:
        return [self.samples.make(step * self.accumulate + part) for part in range(self.accumulate)]

    def advance(self, samples: Sequence[Sample]) -> None:
        """Take one optimizer step. One without a finite gradient changes nothing and is counted."""
        accelerator = self.accelerator
        for group in self.learned.optimizer.param_groups:
            group["lr"] = self._rate(self.step)
        for sample in samples:
            with accelerator.accumulate(self.forward):
                moved = sample.to(self.device)
                self.meter.add(*self.pass_of(moved), moved.steps)
                if accelerator.sync_gradients:
                    self._update()

    def _pass(self, sample: Sample) -> tuple[Tensor, Tensor]:
        """Forward and backward of a sample: each picture's error ``B``, and the loss."""
        try:
            with self.kernels:  # the backward pass as well: checkpointing runs layers again there
                error, alpha_bar = self.error(sample), self.alpha_bar[sample.steps]
                loss = (error * loss_weights(self.prediction, alpha_bar, self.config.min_snr)).mean()
                self.accelerator.backward(loss)
        finally:
            self.accelerator.unwrap_model(self.forward).release()
        return error.detach(), loss.detach()

    def _update(self) -> None:
        learned, limit = self.learned, self.config.clip or math.inf
        norm = self.accelerator.clip_grad_norm_(learned.parameters, limit)
        bad = self.meter.gradient(torch.as_tensor(norm))
        if self.accelerator.scaler is None and learned.fused:
            # The contract of GradScaler: a fused optimizer skips the step on the device, without a sync.
            optimizer: Any = learned.optimizer
            optimizer.grad_scale, optimizer.found_inf = None, bad
        elif self.accelerator.scaler is None and bool(bad):
            self.optimizer.zero_grad()
            return
        self.optimizer.step()
        self.optimizer.zero_grad()
        if learned.average is not None:
            learned.average.step(learned.parameters)

    def error(self, sample: Sample, *, with_adapter: bool = True) -> Tensor:
        """Mean squared error of each picture, ``B``."""
        alpha_bar = self.alpha_bar[sample.steps]
        noisy = broadcast(alpha_bar.sqrt()) * sample.clean + broadcast((1 - alpha_bar).sqrt()) * sample.noise
        extra = {"added_cond_kwargs": sample.extra} if sample.extra else {}
        states = sample.states.to(self.dtype)
        if with_adapter:
            predicted = self.forward(noisy, sample.steps, states, [*sample.features.values()], extra)
        else:
            with self.accelerator.autocast():
                predicted = self.unet(noisy, sample.steps, states, return_dict=False, **extra)[0]
        target = prediction_target(self.prediction, sample.clean, sample.noise, alpha_bar)
        return functional.mse_loss(predicted.float(), target, reduction="none").flatten(1).mean(1)

    def _check_streak(self, last: bool) -> None:
        streak = self.meter.streak
        if streak >= self.config.max_skipped or (last and streak):
            found = self.folder.checkpoints()
            kept = (
                f"the last good checkpoint is '{found[-1].name}'" if found else "there is no checkpoint yet"
            )
            raise ModelError(
                f"the gradient is not finite at step {self.step}, nor in the {streak - 1} steps before "
                f"it (lr {self.config.lr:g}); {kept}. Try a lower learning rate, a longer warm-up or float32."
            )

    # ---- reporting

    def _report(self, bar: Any) -> None:
        values, failed = self.meter.read(self.config.batch)
        rate, loss, pace = self._rate(self.step - 1), values["loss"], values["pictures_per_s"]
        bar.set_postfix(loss=f"{loss:.4f}")
        self._log({"step": self.step, "lr": rate, **values})
        if failed:
            self._say(f"step {self.step}: {failed} forward passes without a finite loss were left out")
        if not self.terminal:  # in a log file, lines instead of a bar
            left = _duration((self.steps - self.step) * self.plan.per_step / max(pace, 1e-9))
            self._say(
                f"step {self.step}/{self.steps} loss {loss:.4f} lr {rate:.2g} {pace:.1f} pictures/s, "
                f"{left} left"
            )

    def _rate(self, step: int) -> float:
        config = self.config
        assert config.lr is not None
        assert config.warmup is not None
        return learning_rate(
            step, peak=config.lr, steps=self.steps, warmup=config.warmup, schedule=config.schedule
        )

    @torch.no_grad()
    def _validate(self) -> None:
        """Measure the loss on fixed pictures, noise and timesteps: with and without the picture, and of
        the bare base."""
        if not self.accelerator.is_main_process:
            return
        with self.learned.averaged():
            shown, hidden = self._validation_loss("picture"), self._validation_loss("negative")
        if self._bare is None:  # the same all through the run
            self._bare = self._validation_loss("bare")
        found = {"with_image": shown, "without_image": hidden, "bare_base": self._bare}
        means = {name: float(losses.mean()) for name, losses in found.items()}
        record: dict[str, Any] = {"step": self.step}
        record |= {f"validation_{name}": mean for name, mean in means.items()}
        record["gap"] = means["without_image"] - means["with_image"]
        record["gap_by_noise"] = (hidden - shown).tolist()
        if not all(math.isfinite(mean) for mean in means.values()):
            raise ModelError(
                f"the validation loss is not finite at step {self.step}: {means}; go on from the last "
                "checkpoint with a smaller lr (--resume --lr)."
            )
        self._log(record)
        self.figures.append(record)
        self._say(
            f"step {self.step}: held-out loss {means['with_image']:.4f} with the picture, "
            f"{means['without_image']:.4f} without, {means['bare_base']:.4f} of the bare base"
        )
        if self.config.keep == "best" and means["with_image"] < self.best:
            self.best = means["with_image"]
            self._write_adapter()

    def _validation_loss(self, kind: Shown) -> Tensor:
        """Mean loss of the held-out pictures at one timestep of each band, ``BANDS``."""
        sums = torch.zeros(BANDS)
        for row in self.plan.validation:
            sample = self.samples.validation(row, kind, BANDS).to(self.device)
            try:
                sums += self.error(sample, with_adapter=kind != "bare").cpu()
            finally:
                self.accelerator.unwrap_model(self.forward).release()
        return sums / len(self.plan.validation)

    def _sheet_due(self, last: bool) -> bool:
        every = self.config.sample_every
        if self.stopper.interrupted:
            return False
        if every is None:
            return last or time.monotonic() >= self.next_sheet
        return bool(every) and (last or self.step % every == 0)

    def _sample(self) -> None:
        """Draw a sheet of samples. By the clock, sheets take a tenth of a run at most."""
        if self.preview is None:
            return
        began = time.monotonic()
        with self.learned.averaged():
            sheet, _ = self.preview.draw()
        path = self.folder.path / "samples" / f"{self.step:08d}.png"
        write_atomic(path, sheet, overwrite=True)
        self._say(f"samples: {path}")
        now = time.monotonic()
        self.next_sheet = now + max(SHEET_SECONDS, 9 * (now - began))

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

    def finish(self) -> Path:
        """Write the adapter and the model card, upload them if asked, and detach the adapter from the
        UNet."""
        path = self.folder.path / WEIGHT_NAME
        if self.accelerator.is_main_process:
            if self.config.keep == "last" or not path.exists():
                self._write_adapter()
            kept = validation_in(path)
            card = Card(self.config, self.about, self.figures, kept)
            self.folder.write("README.md", markdown(card))
            self.folder.write("card.html", html(card))
            self._say(f"wrote {path}" + (f" (step {kept['step']})" if kept else ""))
            if self.config.push_to_hub and not self.stopper.interrupted:
                push(self.config.push_to_hub, self.folder.path)
        self.accelerator.end_training()
        self.adapter.detach()
        return path

    def _write_adapter(self) -> None:
        """Write the averaged weights, which are those that validation measures."""
        about = {**self.about, "imprompt.step": str(self.step), **noted(self.config, self.figures)}
        with self.learned.averaged():
            write_adapter(self.adapter, self.folder.path, about, getattr(torch, self.config.save_dtype))

    def _save_checkpoint(self) -> None:
        """Write all that is needed to resume, if it is finite."""
        if not self.accelerator.is_main_process:
            return
        average, scaler = self.learned.average, self.accelerator.scaler
        about: dict[str, Any] = {
            "variant": self.adapter.checkpoint.variant.name,
            "skipped": self.meter.skipped,
            "averages": 0 if average is None else average.optimization_step,
        }
        if scaler is not None:
            about["scaler"] = scaler.state_dict()
        self.folder.save_checkpoint(self.step, self.learned.tensors(), about, self.config.keep_checkpoints)

    def _restore(self) -> None:
        on_main(self.accelerator, self.folder.load_checkpoint)  # one process reports damage, then each reads
        found = self.folder.load_checkpoint()
        if (
            found is None
        ):  # a new folder, or it was killed before its first checkpoint: all steps are repeated
            on_main(self.accelerator, lambda: self.folder.rewind(-1))
            self._say(
                f"there is no checkpoint in '{self.folder.path}' to resume: the run begins at its start"
            )
            return
        tensors, manifest, damaged = found
        self.learned.load(tensors, manifest["step"])
        if self.learned.average is not None:
            self.learned.average.optimization_step = manifest["averages"]
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(manifest["scaler"])
        self.step, self.meter.skipped = manifest["step"], manifest["skipped"]
        if self.accelerator.is_main_process:
            self.folder.rewind(self.step)
            self.figures = [record for record in self.folder.records() if record.get("gap") is not None]
            kept = validation_in(self.folder.path / WEIGHT_NAME)
            self.best = math.inf if kept is None else kept["validation_with_image"]
        for each in damaged:
            self._say(f"a checkpoint is damaged and not used: {each}")
        self._say(f"resumed at step {self.step}")


def _alphas(pipe: Any) -> Tensor:
    return DDPMScheduler.from_config(pipe.scheduler.config).alphas_cumprod.float()


def _duration(seconds: float) -> str:
    minutes = seconds / 60
    return f"{minutes:.0f} min" if minutes < 90 else f"{minutes / 60:.1f} h"
