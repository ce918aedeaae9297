"""ComfyUI's node classes that recipes have words for: what they are called, take and give."""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

CONTROL_WORDS = frozenset({"fixed", "increment", "decrement", "randomize"})
"""What the editor keeps behind a seed: how it changes after each run."""

REROUTES = ("Reroute", "Reroute (rgthree)")
_SWITCHES = ("Fast Groups Bypasser", "Fast Groups Muter", "Fast Bypasser", "Fast Muter", "Label", "Bookmark")
SETTERS, GETTERS = ("SetNode", "easy setNode"), ("GetNode", "easy getNode")
BROADCASTERS = (*(f"Anything Everywhere{n}" for n in ("", "?", "3")), "Prompts Everywhere", "Seed Everywhere")
VIRTUAL = frozenset(
    {*REROUTES, *SETTERS, *GETTERS, *BROADCASTERS[:-1], "PrimitiveNode", "Note", "MarkdownNote"}
    | {f"{name} (rgthree)" for name in _SWITCHES}
)
"""Nodes that exist in the editor only, or do their work there."""
NOTES = frozenset({"Note", "MarkdownNote"})

AUTHORS_SAMPLERS = ("flow_unipc", "flow_dpmpp")
"""Samplers of recipes that ComfyUI does not have."""

SAVERS = ("SaveVideo", "SaveAnimatedWEBP", "SaveAnimatedPNG", "SaveWEBM", "VHS_VideoCombine", "SaveImage", "SaveLatent")
PREVIEWS = ("PreviewImage",)
WITHOUT_RESULT = frozenset({"PreviewAny", "PreviewAudio", "SaveAudio", "SaveAudioMP3", "SaveAudioOpus"})
"""Outputs of ComfyUI that no recipe needs: they show or write what is there already."""


@dataclass(frozen=True)
class Input:
    """An input that is linked, or a widget; `has_control` where the editor keeps a control word behind its value."""

    name: str
    type: str
    is_widget: bool
    is_optional: bool = False
    has_control: bool = False
    default: Any = None


@dataclass(frozen=True)
class ComfyClass:
    """A node class; `title` is what the editor calls it."""

    name: str
    title: str
    inputs: tuple[Input, ...]
    outputs: tuple[tuple[str, str], ...]

    @property
    def links(self) -> tuple[Input, ...]:
        """Inputs that are linked."""
        return tuple(item for item in self.inputs if not item.is_widget)

    @property
    def widgets(self) -> tuple[Input, ...]:
        """Inputs that have a widget, in the order of `widgets_values`."""
        return tuple(item for item in self.inputs if item.is_widget)

    def input(self, name: str) -> Input:
        """Return the input of that name."""
        return next(item for item in self.inputs if item.name == name)


# class | title | links (? optional) | widgets (* followed by a control word; =default) | outputs
_ROWS = """
UNETLoader|Load Diffusion Model||unet_name:S weight_dtype:S=default|MODEL
DiffusionModelLoaderKJ|Diffusion Model Loader KJ||model_name:S weight_dtype:S=default|MODEL
UnetLoaderGGUF|Unet Loader (GGUF)||unet_name:S|MODEL
UnetLoaderGGUFAdvanced|Unet Loader (GGUF/Advanced)||unet_name:S|MODEL
GGUFLoaderKJ|GGUF Loader KJ||model_name:S extra_model_name:S=none|MODEL
LoaderGGUF|GGUF Loader||gguf_name:S|MODEL
CLIPLoaderGGUF|CLIPLoader (GGUF)||clip_name:S type:S=wan|CLIP
ClipLoaderGGUF|GGUF CLIP Loader||clip_name:S type:S=wan|CLIP
CLIPLoader|Load CLIP||clip_name:S type:S=wan device:S=default|CLIP
VAELoader|Load VAE||vae_name:S|VAE
VAELoaderKJ|VAELoader KJ||vae_name:S|VAE
AudioEncoderLoader|Load Audio Encoder||audio_encoder_name:S|AUDIO_ENCODER
LoraLoaderModelOnly|LoraLoaderModelOnly|model:MODEL|lora_name:S strength_model:F=1.0|MODEL
LoraLoaderBypassModelOnly|Load LoRA (Bypass, Model Only)|model:MODEL|lora_name:S strength_model:F=1.0|MODEL
LoraLoader|Load LoRA|model:MODEL clip:CLIP|lora_name:S strength_model:F=1.0 strength_clip:F=1.0|MODEL CLIP
Power Lora Loader (rgthree)|Power Lora Loader (rgthree)|model:MODEL clip:CLIP?||MODEL CLIP
ModelSamplingSD3|ModelSamplingSD3|model:MODEL|shift:F=3.0|MODEL
EasyCache|EasyCache|model:MODEL|reuse_threshold:F=0.2 start_percent:F=0.15 \
end_percent:F=0.95 verbose:B=false|MODEL
LoadImage|Load Image||image:S upload:A=image|IMAGE MASK
LoadAudio|Load Audio||audio:S audioUI:A upload:A|AUDIO
LoadVideo|Load Video||file:S upload:A=image|VIDEO
VHS_LoadAudio|Load Audio (Path)||audio_file:S seek_seconds:F=0.0 duration:F=0.0|AUDIO FLOAT
VHS_LoadAudioUpload|Load Audio (Upload)||audio:S start_time:F=0.0 duration:F=0.0|AUDIO FLOAT
VHS_LoadVideo|Load Video (Upload)||video:S force_rate:F=0.0 custom_width:I=0 custom_height:I=0 frame_load_cap:I=0 \
skip_first_frames:I=0 select_every_nth:I=1|IMAGE frame_count:INT audio:AUDIO video_info:VHS_VIDEOINFO
VHS_LoadVideoPath|Load Video (Path)||video:S force_rate:F=0.0 custom_width:I=0 custom_height:I=0 frame_load_cap:I=0 \
skip_first_frames:I=0 select_every_nth:I=1|IMAGE frame_count:INT audio:AUDIO video_info:VHS_VIDEOINFO
VHS_LoadVideoFFmpeg|Load Video FFmpeg (Upload)||video:S force_rate:F=0.0 custom_width:I=0 custom_height:I=0 \
frame_load_cap:I=0 start_time:F=0.0|IMAGE mask:MASK audio:AUDIO video_info:VHS_VIDEOINFO
VHS_LoadVideoFFmpegPath|Load Video FFmpeg (Path)||video:S force_rate:F=0.0 custom_width:I=0 custom_height:I=0 \
frame_load_cap:I=0 start_time:F=0.0|IMAGE mask:MASK audio:AUDIO video_info:VHS_VIDEOINFO
VHS_LoadImagePath|Load Image (Path)||image:S custom_width:I=0 custom_height:I=0|IMAGE mask:MASK
LoadLatent|LoadLatent||latent:S|LATENT
GetVideoComponents|Get Video Components|video:VIDEO||images:IMAGE audio:AUDIO fps:FLOAT
TrimAudioDuration|Trim Audio Duration|audio:AUDIO|start_index:F=0.0 duration:F=60.0|AUDIO
AudioConcat|Audio Concat|audio1:AUDIO audio2:AUDIO|direction:S=after|AUDIO
AudioAdjustVolume|Audio Adjust Volume|audio:AUDIO|volume:I=1|AUDIO
EmptyAudio|Empty Audio||duration:F=60.0 sample_rate:I=44100 channels:I=2|AUDIO
ImageScale|Upscale Image|image:IMAGE|upscale_method:S width:I=512 height:I=512 crop:S=disabled|IMAGE
ImageScaleBy|Upscale Image By|image:IMAGE|upscale_method:S scale_by:F=1.0|IMAGE
ImageScaleToTotalPixels|Scale Image to Total Pixels|image:IMAGE|\
upscale_method:S megapixels:F=1.0 resolution_steps:I=1|IMAGE
ImageScaleToMaxDimension|Scale Image to Max Dimension|image:IMAGE|upscale_method:S largest_size:I=512|IMAGE
ImageResizeKJ|Resize Image (KJ, deprecated)|image:IMAGE get_image_size:IMAGE? width_input:INT? height_input:INT?|\
width:I=512 height:I=512 upscale_method:S=nearest-exact keep_proportion:B=false divisible_by:I=2 \
crop:A=disabled|IMAGE width:INT height:INT
ImageResizeKJv2|Resize Image v2|image:IMAGE mask:MASK?|width:I=512 height:I=512 upscale_method:S=nearest-exact \
keep_proportion:S=stretch pad_color:A crop_position:S=center divisible_by:I=2|IMAGE width:INT height:INT mask:MASK
ResizeImageMaskNode|Resize Image/Mask|input:IMAGE resize_type.match:IMAGE?|\
resize_type:S scale_method:S=area|resized:IMAGE
ResizeImagesByLongerEdge|Resize Images by Longer Edge|images:IMAGE|longer_edge:I=1024|IMAGE
ResizeImagesByShorterEdge|Resize Images by Shorter Edge|images:IMAGE|shorter_edge:I=512|IMAGE
ResizeAndPadImage|Resize And Pad Image|image:IMAGE|target_width:I=512 target_height:I=512 padding_color:A=white \
interpolation:S=area|IMAGE
GetImageSize|Get Image Size|image:IMAGE||width:INT height:INT batch_size:INT
GetImageSizeAndCount|Get Image Size & Count|image:IMAGE||image:IMAGE width:INT height:INT count:INT
ImageBatch|Batch Images|image1:IMAGE image2:IMAGE||IMAGE
ImageBatchMulti|Image Batch Multi|image_1:IMAGE image_2:IMAGE?|inputcount:I=2|images:IMAGE
BatchImagesNode|Batch Images|images.image0:IMAGE images.image1:IMAGE?||IMAGE
RepeatImageBatch|RepeatImageBatch|image:IMAGE|amount:I=1|IMAGE
ImageFromBatch|ImageFromBatch|image:IMAGE|batch_index:I=0 length:I=1|IMAGE
CLIPTextEncode|CLIP Text Encode (Prompt)|clip:CLIP|text:S|CONDITIONING
ConditioningZeroOut|ConditioningZeroOut|conditioning:CONDITIONING||CONDITIONING
AudioEncoderEncode|AudioEncoderEncode|audio_encoder:AUDIO_ENCODER audio:AUDIO||AUDIO_ENCODER_OUTPUT
WanSoundImageToVideo|WanSoundImageToVideo|positive:CONDITIONING negative:CONDITIONING vae:VAE \
audio_encoder_output:AUDIO_ENCODER_OUTPUT? ref_image:IMAGE? control_video:IMAGE? ref_motion:IMAGE?|\
width:I=832 height:I=480 length:I=77 batch_size:I=1|positive:CONDITIONING negative:CONDITIONING latent:LATENT
WanSoundImageToVideoExtend|WanSoundImageToVideoExtend|positive:CONDITIONING negative:CONDITIONING vae:VAE \
video_latent:LATENT audio_encoder_output:AUDIO_ENCODER_OUTPUT? ref_image:IMAGE? control_video:IMAGE?|\
length:I=77|positive:CONDITIONING negative:CONDITIONING latent:LATENT
KSampler|KSampler|model:MODEL positive:CONDITIONING negative:CONDITIONING latent_image:LATENT|\
seed:I* steps:I=20 cfg:F=8.0 sampler_name:S=euler scheduler:S=normal denoise:F=1.0|LATENT
KSamplerAdvanced|KSampler (Advanced)|model:MODEL positive:CONDITIONING negative:CONDITIONING latent_image:LATENT|\
add_noise:S=enable noise_seed:I* steps:I=20 cfg:F=8.0 sampler_name:S=euler scheduler:S=normal start_at_step:I=0 \
end_at_step:I=10000 return_with_leftover_noise:S=disable|LATENT
SamplerCustom|SamplerCustom|model:MODEL positive:CONDITIONING negative:CONDITIONING sampler:SAMPLER sigmas:SIGMAS \
latent_image:LATENT|add_noise:B=true noise_seed:I* cfg:F=8.0|output:LATENT denoised_output:LATENT
SamplerCustomAdvanced|SamplerCustomAdvanced|noise:NOISE guider:GUIDER sampler:SAMPLER sigmas:SIGMAS \
latent_image:LATENT||output:LATENT denoised_output:LATENT
BasicScheduler|BasicScheduler|model:MODEL|scheduler:S=simple steps:I=20 denoise:F=1.0|SIGMAS
KSamplerSelect|KSamplerSelect||sampler_name:S=euler|SAMPLER
RandomNoise|RandomNoise||noise_seed:I*|NOISE
CFGGuider|CFGGuider|model:MODEL positive:CONDITIONING negative:CONDITIONING|cfg:F=8.0|GUIDER
BasicGuider|BasicGuider|model:MODEL conditioning:CONDITIONING||GUIDER
LatentConcat|LatentConcat|samples1:LATENT samples2:LATENT|dim:S=x|LATENT
LatentCut|LatentCut|samples:LATENT|dim:S=x index:I=0 amount:I=1|LATENT
VAEDecode|VAE Decode|samples:LATENT vae:VAE||IMAGE
VAEDecodeTiled|VAE Decode (Tiled)|samples:LATENT vae:VAE|\
tile_size:I=512 overlap:I=64 temporal_size:I=64 temporal_overlap:I=8|IMAGE
CreateVideo|Create Video|images:IMAGE audio:AUDIO?|fps:F=30.0 bit_depth:R=8 color_space:R=sRGB|VIDEO
SaveVideo|Save Video|video:VIDEO|filename_prefix:S=video/ComfyUI format:A=auto codec:A=auto|video:VIDEO
SaveAnimatedWEBP|SaveAnimatedWEBP|images:IMAGE|\
filename_prefix:S=ComfyUI fps:F=6.0 lossless:A=true quality:A=80 method:A=default|
SaveAnimatedPNG|SaveAnimatedPNG|images:IMAGE|filename_prefix:S=ComfyUI fps:F=6.0 compress_level:A=4|
SaveWEBM|SaveWEBM|images:IMAGE|filename_prefix:S=ComfyUI codec:A=vp9 fps:F=24.0 crf:A=32|
VHS_VideoCombine|Video Combine|images:IMAGE audio:AUDIO?|frame_rate:F=8.0 loop_count:A=0 \
filename_prefix:S=AnimateDiff format:A=video/h264-mp4 pingpong:B=false save_output:A=true|FILENAMES
SaveImage|Save Image|images:IMAGE|filename_prefix:S=ComfyUI|
PreviewImage|Preview Image|images:IMAGE||
SaveLatent|SaveLatent|samples:LATENT|filename_prefix:S=latents/ComfyUI|
PrimitiveInt|Int||value:I*|INT
PrimitiveFloat|Float||value:F|FLOAT
INTConstant|INT Constant||value:I|value:INT
FloatConstant|Float Constant||value:F|value:FLOAT
BOOLConstant|BOOL Constant||value:B|value:BOOLEAN
StringConstant|String Constant||string:S|STRING
StringConstantMultiline|String Constant Multiline||string:S strip_newlines:B=true|STRING
easy int|Int||value:I|int:INT
easy float|Float||value:F|float:FLOAT
Seed (rgthree)|Seed (rgthree)||seed:I|SEED:INT
Seed Everywhere|Seed Everywhere||seed:I*|INT
ComfyMathExpression|Math Expression||expression:S=a|FLOAT INT BOOL:BOOLEAN
SimpleCalculatorKJ|Simple Calculator KJ||expression:S|FLOAT INT BOOLEAN
SimpleMath+|Simple Math||value:S|INT FLOAT
MathExpression~pysssss|Math Expression||expression:S|INT FLOAT
ComfyNumberConvert|Number Convert|value:*||FLOAT INT
PrimitiveString|String||value:S|STRING
PrimitiveStringMultiline|String (Multiline)||value:S|STRING
PrimitiveBoolean|Boolean||value:B|BOOLEAN
StringConcatenate|Concatenate||string_a:S string_b:S delimiter:S|STRING
ComfySwitchNode|Switch|on_false:*? on_true:*?|switch:B=true|output:*
Any Switch (rgthree)|Any Switch (rgthree)|any_01:*? any_02:*? any_03:*? any_04:*? any_05:*?||*
"""

IGNORED: Mapping[str, str] = MappingProxyType(
    {
        **dict.fromkeys(
            ("MultiGPU_WorkUnits", "SelectModelDevice", "ModelAttentionBackend", "wanBlockSwap"), "model:MODEL"
        ),
        **dict.fromkeys(("PathchSageAttentionKJ", "ModelPatchTorchSettings", "TorchCompileModel"), "model:MODEL"),
        **dict.fromkeys(("TorchCompileModelWanVideoV2", "TorchCompileModelAdvanced"), "model:MODEL"),
        "LazyCache": "model:MODEL",
        **dict.fromkeys(("SelectCLIPDevice", "OverrideCLIPDevice"), "clip:CLIP"),
        **dict.fromkeys(("SelectVAEDevice", "OverrideVAEDevice"), "vae:VAE"),
        "VRAM_Debug": "any_input:*? image_pass:IMAGE? model_pass:MODEL?",
        **dict.fromkeys(("easy cleanGpuUsed", "LayerUtility: PurgeVRAM V2", "VRAMCleanup", "RAMCleanup"), "anything:*"),
        "PreviewAny": "source:*",
    }
)
"""Nodes that hand on what they take, with their inputs: they choose a device, a kernel, a cache, or show a value."""

BRANCHES: Mapping[str, Mapping[str, tuple[str, ...]]] = MappingProxyType(
    {
        "ResizeImageMaskNode": {
            "scale dimensions": ("width", "height", "crop"),
            "scale by multiplier": ("multiplier",),
            "scale longer dimension": ("longer_size",),
            "scale shorter dimension": ("shorter_size",),
            "scale width": ("width",),
            "scale height": ("height",),
            "scale total pixels": ("megapixels",),
            "match size": ("crop",),
            "scale to multiple": ("multiple",),
        },
        "SaveVideo": {
            **dict.fromkeys(("mp4", "webm", "mkv"), ("codec",)),
            **dict.fromkeys(("h264", "h265", "hevc", "vp9", "av1"), ("encoding",)),
            "re-encode": ("crf",),
        },
    }
)
"""Widgets that a choice brings along (their names begin with the choice's and a dot), by class and choice."""

_TYPES = {"S": "STRING", "I": "INT", "F": "FLOAT", "B": "BOOLEAN", "A": "ANY", "R": "READ"}
"""A widget of type READ is read but not written: older versions of ComfyUI have none of that name."""
_TITLES: Mapping[str, frozenset[str]] = MappingProxyType(
    {
        "CLIPTextEncode": frozenset(
            {"CLIP Text Encode (Positive Prompt)", "CLIP Text Encode (Negative Prompt)", "Positive Prompt"}
        ),
        "LoadImage": frozenset({"Load Image (from Outputs)"}),
        "MarkdownNote": frozenset({"Markdown Note"}),
    }
)


@functools.cache
def classes() -> Mapping[str, ComfyClass]:
    """Return the known classes by name."""
    rows = (row.split("|") for row in _ROWS.strip().splitlines())
    named = ((name.replace("~", "|"), rest) for name, *rest in rows)  # one class has a bar in its name
    ignored = ((name, [name, links, "", links.replace("?", "")]) for name, links in IGNORED.items())
    return MappingProxyType({name: _class(name, *rest) for name, rest in (*named, *ignored)})


def base_class(class_type: str) -> str:
    """Return the class that a node is a copy of: MultiGPU's nodes only choose where a model is kept."""
    plain = re.sub(r"(DisTorch2?)?MultiGPU$", "", class_type)
    return plain if plain in classes() else class_type


def as_type(value: Any, type_: str) -> Any:
    """Return a widget's value as the type that its class asks for; text may hold a number or a truth value.

    Raises:
        ValueError: It is of another type.
    """
    if type_ not in _TYPES.values() or type_ in ("ANY", "READ"):
        return value
    if not isinstance(value, (str, int, float)) or (isinstance(value, bool) and type_ != "BOOLEAN"):
        raise ValueError(value)
    text = str(value).strip()
    if type_ == "STRING":
        return value if isinstance(value, str) else text
    if type_ == "BOOLEAN":
        if text.lower() not in ("true", "false", "1", "0"):
            raise ValueError(value)
        return text.lower() in ("true", "1")
    if type_ == "INT" and re.fullmatch(r"[+-]?[0-9]+", text):
        return int(text)
    number = float(text)
    if not math.isfinite(number) or (type_ == "INT" and isinstance(value, str) and not number.is_integer()):
        raise ValueError(value)
    return int(number) if type_ == "INT" else number


def own_title(class_type: str, node: Mapping[str, Any]) -> str | None:
    """Return the title that a person gave to a node; None for what ComfyUI or its templates call it anyway."""
    title, known = node.get("title"), classes().get(class_type)
    usual = {"", class_type, known.title if known else ""} | _TITLES.get(class_type, frozenset())
    return title if isinstance(title, str) and title not in usual else None


def _class(name: str, title: str, links: str, widgets: str, outputs: str) -> ComfyClass:
    inputs = [_link(text) for text in links.split()] + [_widget(text) for text in widgets.split()]
    ports = [(text.partition(":")[0], text.rpartition(":")[2]) for text in outputs.split()]
    return ComfyClass(name, title, tuple(inputs), tuple(ports))


def _link(text: str) -> Input:
    name, _, type_ = text.partition(":")
    return Input(name, type_.removesuffix("?"), is_widget=False, is_optional=type_.endswith("?"))


def _widget(text: str) -> Input:
    head, _, default = text.partition("=")
    name, _, letter = head.partition(":")
    type_ = _TYPES[letter.removesuffix("*")]
    return Input(name, type_, is_widget=True, has_control=letter.endswith("*"), default=_default(type_, default))


def _default(type_: str, text: str) -> Any:
    if type_ == "INT":
        return int(text or 0)
    if type_ == "FLOAT":
        return float(text or 0)
    return text == "true" if type_ == "BOOLEAN" else text
