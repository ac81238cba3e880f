"""What has been published: kinds of adapter, the files themselves, and the base families, as tables.

Facts only (names, widths, byte counts, SHA-256), nothing here opens a file. Byte counts and hashes are those
of public model listings; "bytes" is empty where a listing gives it only rounded.
"""

from dataclasses import dataclass
from typing import Literal

Feature = Literal["pooled", "hidden", "face", "face+hidden"]
ProjectionKind = Literal["linear", "resampler", "patch-mlp", "face-mlp", "face-resampler"]
NegativeRule = Literal["zero_features", "encoded_zeros"]


@dataclass(frozen=True)
class Variant:
    """One way of making tokens: what the projection is, what it reads and what it does without a picture."""

    name: str
    projection: ProjectionKind
    feature: Feature
    """``pooled``: the encoder's projected embedding. ``hidden``: its ``hidden_states[-2]``, all tokens.
    ``face``: a face embedding. ``face+hidden``: that and the hidden states of the aligned face crop."""
    negative: NegativeRule
    """``zero_features``: the projection of zeros, for both its inputs. ``encoded_zeros``: of the encoder's
    features of an all-zero *preprocessed* tensor (FaceID-Plus: with a zero face embedding)."""
    about: str
    embedding: Literal["normed", "raw"] | None = None
    """Whether the face embedding is L2-normalised."""
    shortcut: bool = False
    """FaceID-PlusV2: ``tokens = face tokens + s_scale · resampled``, where Plus has only the second term."""
    crop: Literal["aligned", "square"] = "aligned"
    """The look beside a face embedding: of the upright face, or of the square around its box."""
    uses_text_projection: bool = False
    """Whether tokens are as wide as the text before the UNet's own projection, and go through it."""


VARIANTS = {
    variant.name: variant
    for variant in (
        Variant("linear", "linear", "pooled", "zero_features", "one linear layer on the pooled embedding"),
        Variant("resampler", "resampler", "hidden", "encoded_zeros", "Perceiver resampler on all patches"),
        Variant("full-face", "patch-mlp", "hidden", "encoded_zeros", "an MLP on each patch"),
        Variant(
            "faceid", "face-mlp", "face", "zero_features", "an MLP on a normalised face embedding", "normed"
        ),
        Variant(
            "faceid-raw",
            "resampler",
            "face",
            "zero_features",
            "Perceiver resampler on an unnormalised face embedding",
            "raw",
        ),
        Variant(
            "faceid-plus",
            "face-resampler",
            "face+hidden",
            "encoded_zeros",
            "face tokens query the face crop's patches; tokens = resampled",
            "normed",
        ),
        Variant(
            "faceid-plusv2",
            "face-resampler",
            "face+hidden",
            "encoded_zeros",
            "face tokens query the face crop's patches; tokens = face tokens + s_scale · resampled",
            "normed",
            shortcut=True,
        ),
        Variant(
            "faceid-plus-kolors",
            "face-resampler",
            "face+hidden",
            "zero_features",
            "as faceid-plusv2 from an unnormalised embedding, through the UNet's projection of its text",
            "raw",
            shortcut=True,
            crop="square",
            uses_text_projection=True,
        ),
    )
}

FAMILIES = {(16, 768): "SD1.5", (16, 1024): "SD2", (70, 2048): "SDXL"}
"""(cross-attentions, width of their tokens) → base family. Kolors' UNet is SDXL's: see its row below."""

ENCODERS: dict[tuple[str, int], str] = {
    ("pooled", 1024): "CLIP ViT-H/14",
    ("pooled", 1280): "CLIP ViT-bigG/14",
    ("pooled", 768): "CLIP ViT-L/14",
    ("hidden", 1280): "CLIP ViT-H/14",
    ("hidden", 1664): "CLIP ViT-bigG/14",
    ("hidden", 1024): "CLIP ViT-L/14 (Kolors: at 336)",
}
"""(feature, width) → the published encoder that gives it."""


@dataclass(frozen=True)
class Published:
    """One published file. Rows equal in all but name and hash cannot be told apart by shapes."""

    name: str
    """File name without its ending."""
    variant: str
    family: str
    feature_width: int
    tokens: int
    differs: str
    """What sets it apart from files of the same shapes."""
    bytes: int | None = None
    sha256: str | None = None
    lora_sha256: str | None = None
    """Of the LoRA file that is published beside it."""
    face_pack: str | None = None
    """InsightFace model pack whose embedding it reads."""


_FACE_CROP = "trained on face crops: show it the cropped face"
PUBLISHED = (
    Published("ip-adapter_sd15", "linear", "SD1.5", 1024, 4, "the general one", 44_642_768,
              "289b45f16d043d0bf542e45831f971dcdaabe18b656f11e86d9dfba7e9ee3369"),
    Published("ip-adapter_sd15_light", "linear", "SD1.5", 1024, 4, "trained to leave the text more to say",
              44_642_768, "0747d08db670535bfa286452a77d93cebad5c677b46d038543f9f2de8690bb26"),
    Published("ip-adapter_sd15_light_v11", "linear", "SD1.5", 1024, 4, "light, trained further", 44_642_977,
              "350b63a57847c163e2e984b01090f85ffe60eaae20f32b2b2c9e1ccc7ddd972b"),
    Published("ip-adapter_sd15_vit-G", "linear", "SD1.5", 1280, 4, "reads ViT-bigG/14", 46_215_640,
              "a26f736af07bb341a83dfea23713531d0575760e8ed947c68cb31a4c62d9c90b"),
    Published("ip-adapter-plus_sd15", "resampler", "SD1.5", 1280, 16, "the general one", 98_183_288,
              "a1c250be40455cc61a43da1201ec3f1edaea71214865fb47f57927e06cbe4996"),
    Published("ip-adapter-plus-face_sd15", "resampler", "SD1.5", 1280, 16, _FACE_CROP, 98_183_288,
              "1c9edc21af6f737dc1d6e0e734190e976cfacf802d6b024b77aa3be922f7569b"),
    Published("ip_plus_composition_sd15", "resampler", "SD1.5", 1280, 16, "carries composition only",
              98_183_728, "4a02c9f4d2ade7c0e14db7471377ce5d326a2bfda7777231c79dc861c93f2c12"),
    Published("ip-adapter-full-face_sd15", "full-face", "SD1.5", 1280, 257, _FACE_CROP, 43_592_352,
              "f4a17fb643bf876235a45a0e87a49da2855be6584b28ca04c62a97ab5ff1c6f3"),
    Published("ip-adapter_sdxl", "linear", "SDXL", 1280, 4, "reads ViT-bigG/14", 702_585_376,
              "ba1002529e783604c5f326d49f0122025392d1d20ac8d573b3eeb3e6dea4ebb6"),
    Published("ip-adapter_sdxl_vit-h", "linear", "SDXL", 1024, 4, "reads ViT-H/14", 698_391_064,
              "ebf05d918348aec7abb02a5e9ecef77e0aaea6914a5c4ea13f50d45eb1681831"),
    Published("ip-adapter-plus_sdxl_vit-h", "resampler", "SDXL", 1280, 16, "the general one", 847_517_512,
              "3f5062b8400c94b7159665b21ba5c62acdcd7682262743d7f2aefedef00e6581"),
    Published("ip-adapter-plus-face_sdxl_vit-h", "resampler", "SDXL", 1280, 16, _FACE_CROP, 847_517_512,
              "677ad8860204f7d0bfba12d29e6c31ded9beefdf3e4bbd102518357d31a292c1"),
    Published("ip_plus_composition_sdxl", "resampler", "SDXL", 1280, 16, "carries composition only", None,
              "e92dc36cc273bac3200b2e41807ebdc174076185d95a45238558d4c236b6da74"),
    Published("ip-adapter-faceid_sd15", "faceid", "SD1.5", 512, 4, "with LoRA", 96_740_574,
              "201344e22e6f55849cf07ca7a6e53d8c3b001327c66cb9710d69fd5da48a8da7",
              "70699f0dbfadd47de1f81d263cf4c86bd4b7271d841304af9b340b3a7f38e86a", "buffalo_l"),
    Published("ip-adapter-faceid-plus_sd15", "faceid-plus", "SD1.5", 512, 4, "tokens = resampled",
              156_558_503, "252fb53e0d018489d9e7f9b9e2001a52ff700e491894011ada7cfb471e0fadf2",
              "3f00341d11e5e7b5aadf63cbdead09ef82eb28669156161cf1bfc2105d4ff1cd", "buffalo_l"),
    Published("ip-adapter-faceid-plusv2_sd15", "faceid-plusv2", "SD1.5", 512, 4,
              "tokens = face tokens + s_scale · resampled", 156_558_509,
              "26d0d86a1d60d6cc811d3b8862178b461e1eeb651e6fe2b72ba17aa95411e313",
              "8abff87a15a049f3e0186c2e82c1c8e77783baf2cfb63f34c412656052eb57b0", "buffalo_l"),
    Published("ip-adapter-faceid_sdxl", "faceid", "SDXL", 512, 4, "with LoRA", 1_071_149_741,
              "f455fed24e207c878ec1e0466b34a969d37bab857c5faa4e8d259a0b4ff63d7e",
              "4fcf93d6e8dc8dd18f5f9e51c8306f369486ed0aa0780ade9961308aff7f0d64", "buffalo_l"),
    Published("ip-adapter-faceid-plusv2_sdxl", "faceid-plusv2", "SDXL", 512, 4,
              "tokens = face tokens + s_scale · resampled", 1_487_555_181,
              "c6945d82b543700cc3ccbb98d363b837e9c596281607857c74b713a876daf5fb",
              "f24b4bb2dad6638a09c00f151cde84991baf374409385bcbab53c1871a30cb7b", "buffalo_l"),
    Published("ip-adapter-faceid-portrait_sd15", "faceid", "SD1.5", 512, 16, "for several photos, no LoRA",
              64_586_623, "68570f3c14fe125b00d4abf416af33d8b13bb496f4e55af2eb5d0a6017ee99a4", None,
              "buffalo_l"),
    Published("ip-adapter-faceid-portrait-v11_sd15", "faceid", "SD1.5", 512, 16, "portrait, trained further",
              64_586_623, "a48cb4f89ed18e02c6000f65aa9efec452e87eaed4a1bc9fcf4a460c8d0e3bc6", None,
              "buffalo_l"),
    Published("ip-adapter-faceid-portrait_sdxl", "faceid", "SDXL", 512, 16, "for several photos, no LoRA",
              749_822_515, "5631ce7824cdafd2db37c5e85b985730a95ff59c5b4fc80c2b79b0bee5711512", None,
              "buffalo_l"),
    Published("ip-adapter-faceid-portrait_sdxl_unnorm", "faceid-raw", "SDXL", 512, 16,
              "reads the face pack buffalo_l", 1_009_523_411,
              "220bb86e205393a3d0411631cb473caddbf35fd371be2905ca9008818170db55", None, "buffalo_l"),
    Published("instantid_ip-adapter", "faceid-raw", "SDXL", 512, 16,
              "reads the face pack antelopev2 and goes with a keypoint ControlNet", 1_691_134_141,
              "02b3618e36d803784166660520098089a81388e61a93ef8002aa79a5b1c546e1", None, "antelopev2"),
    Published("kolors_ip_adapter_plus_general", "resampler", "Kolors", 1024, 16, "for Kolors", 1_013_163_359,
              "1983c3f927acb2a2f4285e1e134f302fab8e6d744a3b058e46848aba9957a60f"),
    Published("kolors_ipa-faceid-plus", "faceid-plus-kolors", "Kolors", 512, 6, "for Kolors",
              face_pack="antelopev2"),
)  # fmt: skip

FOREIGN = (
    (r"double_blocks\.\d+\.processor\.ip_adapter|ip_adapter_proj_model\.", "an IP-Adapter for FLUX (XLabs)"),
    (r"(ip_adapter\.)?56\.to_k_ip\.", "an IP-Adapter for FLUX (InstantX)"),
    (r"(ip_adapter\.)?\d+\.norm_(ip|q|k)|(image_proj\.)?time_(proj|embedding)\.", "an IP-Adapter for SD3.5"),
    (r"id_adapter|pulid_|(image_proj\.)?id_embedding_mapping\.|image_proj\.mapping_", "a PuLID adapter"),
    (r"(module\.)?image_proj_model\.",
     "a training script's checkpoint: 'imprompt convert' takes the adapter out of it"),
    (r"lora_|.*\.lora(_[AB]|_up|_down|_linear_layer)?\.|(unet|text_encoder)\..*_lora\.|.*(hada|lokr)_w\d",
     "a LoRA (a FaceID adapter brings its own inside: load that adapter; --lora takes one for the base)"),
    (r"control_model\.|(controlnet_)?(down|mid)_blocks?_(controlnet|zero)|controlnet_|input_hint_block|zero_convs",
     "a ControlNet"),
    (r"(adapter\.)?body\.\d", "a T2I-Adapter"),
    (r".*motion_modules?\.", "a motion module (AnimateDiff)"),
    (r"model\.diffusion_model\.|first_stage_model\.|cond_stage_model\.|conditioner\.",
     "a whole Stable Diffusion checkpoint"),
    (r"(unet\.)?(down_blocks|up_blocks|mid_block)\.", "a UNet"),
    (r"(transformer\.)?(double|single|joint|transformer|single_transformer)_blocks\.",
     "a diffusion transformer"),
    (r"(vae\.)?(encoder|decoder)\.(conv|down|up|mid)", "a VAE"),
    (r"(image_encoder\.)?vision_model\.|visual(_projection)?\.", "an image encoder"),
    (r"(text_encoder\.)?text_model\.", "a text encoder"),
    (r"emb_params$|string_to_param|clip_[lg]$|<.*>$", "a textual inversion embedding"),
)  # fmt: skip
"""(what one of its keys matches from the start, what a file with it is). The first row that matches tells."""
