"""Settings of stable-diffusion-webui that this server has in one way only, in requests and in its options.

Clients send defaults for everything. A value that draws as this server does is accepted, as is what concerns
files, previews and the interface; another one would change the picture, and is refused by its name.
"""

import re
from collections.abc import Mapping
from typing import Any

from imprompt.app.server.problems import Problem, refused

_FIELDS: dict[str, tuple[Any, ...]] = {
    "s_churn": (0,), "s_tmin": (0,), "s_tmax": (0,), "s_noise": (1,), "s_min_uncond": (0,),
    "seed_resize_from_h": (-1, 0), "seed_resize_from_w": (-1, 0), "initial_noise_multiplier": (0, 1),
    "inpainting_fill": (0, 1), "latent_mask": (),
}  # fmt: skip
"""Fields of a request → the values that draw as here, the last of them, or are sent unasked."""
_OPTIONS: dict[str, tuple[Any, ...]] = {
    "CLIP_stop_at_last_layers": (0, 1), "sd_vae": ("automatic", "none"), "sd_unet": ("automatic", "none"),
    "sd_hypernetwork": ("none",), "sd_lora": ("none",), "s_churn": (0,), "s_tmin": (0,), "s_tmax": (0,),
    "s_noise": (1,), "eta_ddim": (0,), "eta_ancestral": (1,), "ddim_discretize": ("uniform",),
    "initial_noise_multiplier": (1,), "uni_pc_variant": ("bh1", "bh2"), "uni_pc_order": (3, 2),
    "uni_pc_skip_type": ("time_uniform",), "uni_pc_lower_order_final": (True,), "enable_emphasis": (True,),
    "emphasis": ("original",), "comma_padding_backtrack": (20,), "sd_vae_decode_method": ("full",),
    "sd_vae_encode_method": ("full",), "inpainting_mask_weight": (1,), "k_sched_type": ("automatic",),
    "sdxl_refiner_low_aesthetic_score": (2.5,), "sdxl_refiner_high_aesthetic_score": (6,),
    "forge_unet_storage_dtype": ("automatic",),
}  # fmt: skip
"""The same of settings that change pictures; those that are not here may be off."""
_ELSEWHERE = re.compile(
    r"(samples|grid|save|do_not|outdir|directories|return|export|send|show|live|progress|notification|print"
    r"|list|memmon|ui|gallery|keyedit|quicksettings|hidden|extra_networks|js|gradio|localization|interrogate"
    r"|deepbooru|training|dataset|add|infotext|hires|hide|api|profiling|textual_inversion|dimensions"
    r"|autolaunch|upscaler|ESRGAN|DAT|SWIN|lightbox|control_net)_.*"
    r"|(enable_pnginfo|jpeg_quality|webp_lossless|img_downscale_threshold|img_max_size_mp|n_rows|font|temp_dir"
    r"|target_side_length|clean_temp_dir_at_startup|use_\w+_in_batch|use_original_name_batch|multiple_tqdm"
    r"|sd_checkpoints?_(hash|cache|limit|keep_in_cpu|dropdown_use_short)|sd_vae_(checkpoint_cache|overrides.*)"
    r"|disable_(weights_auto_swap|mmap.*)|unload_models_when_training|pin_memory|face_restoration\w*"
    r"|code_former_weight|(batch|pad)_cond_uncond(_v0)?|persistent_cond_cache|auto_vae_precision(_bfloat16)?|randn_source"
    r"|cross_attention_optimization|opt_\w+|compact_prompt_box"
    r"|restore_config_state_file|forge_(preset|inference_memory|async_loading|pin_shared_memory))"
)
"""Settings about files, previews, the interface, memory, and what is refused where it is asked for."""
_BASE = "sd_model_checkpoint"


def check_fields(values: Mapping[str, Any]) -> None:
    """Raises :class:`Problem` for fields of a request whose values would draw otherwise than here."""
    for name, same in _FIELDS.items():
        if (value := values.get(name)) not in (None, "", *same):
            raise _refused(name, value, same)


def check_options(values: Mapping[str, Any]) -> None:
    """Raises :class:`Problem` for settings that would draw otherwise than here, and for unknown ones that
    are not off."""
    for name, value in values.items():
        if name == _BASE or _ELSEWHERE.fullmatch(name):
            continue
        same = _OPTIONS.get(name, (0, False, [], {}))
        if (value.lower() if isinstance(value, str) else value) not in (None, "", *same):
            raise _refused(name, value, _OPTIONS.get(name, ()))


def _refused(name: str, value: object, same: tuple[Any, ...]) -> Problem:
    if name == "CLIP_stop_at_last_layers":
        text = "skipping layers is not part of this server"
    elif same:
        text = f"{str(value)[:40]!r} is asked, here it is always {same[-1]}"
    else:
        text = "this is not part of this server"
    return refused(name[:60], f"{text}; leave it out.", "not_supported")
