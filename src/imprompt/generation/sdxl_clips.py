"""SDXL clips with ControlNets, for which diffusers (0.42) has no pipeline.

diffusers' pipeline of SDXL clips is called as it is; a forward pre-hook on its UNet runs the ControlNets with
the frames as rows of a batch and adds their residuals, as diffusers' pipeline of SDXL stills does. As in
diffusers there are no sliding windows for long clips and no start from a video.
"""

from collections.abc import Sequence
from typing import Any

from diffusers import AnimateDiffSDXLPipeline
from diffusers.image_processor import VaeImageProcessor
from diffusers.models.controlnets.multicontrolnet import MultiControlNetModel
from PIL import Image
from torch import Tensor

# Dimensions: B samples in the UNet's batch (two with guidance), F frames, C channels, h and w of latents.


class AnimateDiffSDXLControlNetPipeline(AnimateDiffSDXLPipeline):
    """:class:`diffusers.AnimateDiffSDXLPipeline` with one ControlNet of SDXL, or a list of several."""

    unet: Any
    scheduler: Any
    controlnet: Any
    register_modules: Any
    vae_scale_factor: int
    _execution_device: Any

    def __init__(
        self,
        vae: Any,
        text_encoder: Any,
        text_encoder_2: Any,
        tokenizer: Any,
        tokenizer_2: Any,
        unet: Any,
        motion_adapter: Any,
        controlnet: Any,
        scheduler: Any,
        image_encoder: Any = None,
        feature_extractor: Any = None,
        force_zeros_for_empty_prompt: bool = True,
    ) -> None:
        super().__init__(
            vae, text_encoder, text_encoder_2, tokenizer, tokenizer_2, unet, motion_adapter, scheduler,
            image_encoder, feature_extractor, force_zeros_for_empty_prompt,
        )  # fmt: skip
        several = isinstance(controlnet, list | tuple)
        self.register_modules(controlnet=MultiControlNetModel(controlnet) if several else controlnet)

    def __call__(
        self,
        *,
        conditioning_frames: Sequence[Any],
        controlnet_conditioning_scale: float | Sequence[float] = 1.0,
        control_guidance_start: float | Sequence[float] = 0.0,
        control_guidance_end: float | Sequence[float] = 1.0,
        **call: Any,
    ) -> Any:
        """Draw a clip; ``call`` has the arguments of the pipeline without ControlNets, ``height`` and
        ``width`` among them.

        ``conditioning_frames`` has a map for each frame. With several ControlNets there is a list of maps, a
        scale, a start and an end (fractions of the steps) for each.
        """
        single = not isinstance(self.controlnet, MultiControlNetModel)
        maps = [conditioning_frames] if single else conditioning_frames
        frames = [self._prepared(each, call["height"], call["width"]) for each in maps]
        scales, starts, ends = (
            [value] if isinstance(value, float | int) else list(value)
            for value in (controlnet_conditioning_scale, control_guidance_start, control_guidance_end)
        )
        step = 0

        def add_residuals(_: Any, args: tuple[Any, ...], given: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
            nonlocal step
            sample, steps = args[0], len(self.scheduler.timesteps)
            active = [
                scale * float(start <= step / steps and (step + 1) / steps <= end)
                for scale, start, end in zip(scales, starts, ends, strict=True)
            ]
            step += 1
            count, added = sample.shape[2], given["added_cond_kwargs"]
            rows = sample.transpose(1, 2).flatten(0, 1)  # B C F h w to (B F) C h w
            maps_of_rows = [each.repeat(len(sample), 1, 1, 1) for each in frames]
            down, middle = self.controlnet(
                rows,
                args[1],
                encoder_hidden_states=given["encoder_hidden_states"],
                controlnet_cond=maps_of_rows[0] if single else maps_of_rows,
                conditioning_scale=active[0] if single else active,
                added_cond_kwargs={
                    name: added[name].repeat_interleave(count, 0) for name in ("text_embeds", "time_ids")
                },
                return_dict=False,
            )
            return args, given | {
                "down_block_additional_residuals": down,
                "mid_block_additional_residual": middle,
            }

        # First of all hooks: one that changes the call (image guidance) must see it with the residuals.
        hook = self.unet.register_forward_pre_hook(add_residuals, prepend=True, with_kwargs=True)
        try:
            return super().__call__(**call)  # type: ignore[misc]
        finally:
            hook.remove()

    def _prepared(self, frames: Sequence[Image.Image], height: int, width: int) -> Tensor:
        """Maps as (F, 3, H, W) in [0, 1], as SDXL's pipeline of stills prepares them."""
        processor = VaeImageProcessor(
            vae_scale_factor=self.vae_scale_factor, do_convert_rgb=True, do_normalize=False
        )
        prepared = processor.preprocess(list(frames), height=height, width=width)
        return prepared.to(self._execution_device, self.controlnet.dtype)
