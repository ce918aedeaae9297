"""What `sample` and `extend` are planned as. These kinds stand in plans, not in recipes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from s2v_flow.graph.context import RunContext
from s2v_flow.graph.node import Node, Precision
from s2v_flow.graph.ports import FieldPath
from s2v_flow.nodes.fields import Conditioning, SamplingSettings
from s2v_flow.nodes.shortage import StreamDecoder, encoded

if TYPE_CHECKING:
    from torch import Tensor


MOTION_FRAMES = 73
FRAMES_PER_CALL = 2  # latent frames that are decoded at once
START_FRAMES = 6  # how many of the motion frames the portrait fills with init_first_frame


class Chunk(SamplingSettings, Node):
    """One sampled window of the video."""

    kind: ClassVar[str] = "chunk"
    stage: ClassVar[int] = 1
    outputs: ClassVar = {"latent": "latent"}
    is_stored: ClassVar[bool] = True
    has_numerics: ClassVar[bool] = True

    def identity(self, digests: Mapping[FieldPath, str], precision: Precision) -> dict[str, Any]:
        """Leave out the step cache where it is off: results that are older than it have none."""
        fields = super().identity(digests, precision)
        return {name: value for name, value in fields.items() if self.step_cache != "off" or "step_cache" not in name}

    def run(self, context: RunContext, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """Sample the chunk: {"latent": {samples: float32 [1, 16, F, H, W], raw}}."""
        from s2v_flow.nodes.denoising import Denoiser
        from s2v_flow.nodes.tensors import pack

        latent = Denoiser(self, context, inputs).sample()
        context.record(**inputs["model"].facts)
        return {"latent": pack({"samples": latent})}


class EncodeMotion(Node):
    """The motion in front of the first chunk: from a clip, or from the portrait itself."""

    kind: ClassVar[str] = "encode_motion"
    outputs: ClassVar = {"motion": "latent"}
    is_stored: ClassVar[bool] = True
    has_numerics: ClassVar[bool] = True

    width: int
    height: int
    conditioning: Conditioning

    def run(self, context: RunContext, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """Encode 73 frames, mid-grey where there are none: {"motion": {samples: [1, 16, 19, H, W], raw}}."""
        import torch

        from s2v_flow.nodes.tensors import pack_finite, unpack

        vae = inputs["vae"].get()
        clip = torch.zeros(1, 3, MOTION_FRAMES, self.height, self.width)
        if "motion_video" in inputs:
            frames = inputs["motion_video"]
            start = max(frames.num_frames - MOTION_FRAMES, 0)
            given = scaled_pixels(frames.read(start, MOTION_FRAMES), self.width, self.height, self.conditioning)
            clip[:, :, MOTION_FRAMES - given.shape[2] :] = given
        else:
            clip[:, :, -START_FRAMES:] = unpack(inputs["reference"])["pixels"]
        return {"motion": pack_finite({"samples": encoded(vae, clip, context)})}


class EncodeControl(Node):
    """A chunk's share of the pose video."""

    kind: ClassVar[str] = "encode_control"
    outputs: ClassVar = {"control": "latent"}
    is_stored: ClassVar[bool] = True
    has_numerics: ClassVar[bool] = True

    width: int
    height: int
    offset: int
    warmup_frames: int
    num_latent_frames: int
    conditioning: Conditioning

    def run(self, context: RunContext, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """Encode the chunk's pose frames: {"control": {samples: [1, 16, F, H, W], raw}}.

        official: 4F frames, black past the clip's end, the first doubled and its latent dropped. comfyui: 4F - 3
        frames; latent frames past the clip's end are the latent of zero. During the warm-up the first frame stands.

        Source: Wan2.2, wan/speech2video.py, load_pose_cond.
        """
        import torch

        from s2v_flow.models.vae import denormalise
        from s2v_flow.nodes.tensors import pack_finite

        vae = inputs["vae"].get()
        is_official = self.conditioning == "official"
        count = 4 * self.num_latent_frames - (0 if is_official else 3)
        pixels = self._frames(inputs["control_video"], count)
        if is_official:
            missing = count - pixels.shape[2]
            black = torch.full((1, 3, missing, self.height, self.width), -1.0)
            pixels = torch.cat([pixels, black], dim=2)
            pixels = torch.cat([pixels[:, :, :1], pixels], dim=2)
            latent = encoded(vae, pixels, context).cpu()[:, :, 1:]
        else:
            shape = (1, 16, self.num_latent_frames, self.height // 8, self.width // 8)
            latent = denormalise(torch.zeros(shape))
            usable = (pixels.shape[2] - 1) // 4 * 4 + 1 if pixels.shape[2] else 0
            if usable:
                given = encoded(vae, pixels[:, :, :usable], context).cpu()
                latent[:, :, : given.shape[2]] = given
        return {"control": pack_finite({"samples": latent})}

    def _frames(self, video: Any, count: int) -> Tensor:
        import torch

        start = self.offset - self.warmup_frames
        lead = min(max(-start, 0), count)
        frames = video.read(max(start, 0), max(count - lead, 1))
        pixels = scaled_pixels(frames, self.width, self.height, self.conditioning)
        if lead == 0 or pixels.shape[2] == 0:
            return pixels
        return torch.cat([pixels[:, :, :1].expand(-1, -1, lead, -1, -1), pixels], dim=2)[:, :, :count]


class DecodeChunk(Node):
    """Decode one chunk behind what came before it; encode the next chunk's motion from its pixels, as floats."""

    kind: ClassVar[str] = "decode_chunk"
    stage: ClassVar[int] = 1
    outputs: ClassVar = {"frames": "frames", "motion": "latent", "tail": "frames"}
    is_stored: ClassVar[bool] = True
    has_numerics: ClassVar[bool] = True

    num_latent_frames: int
    drop_frames: int

    def run(self, context: RunContext, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """Decode [before, chunk] and encode the last 73 frames.

        Returns:
            frames: {frames: uint8 [n, 8H, 8W, 3]}; motion: {samples: [1, 16, 19, H, W], raw}; tail: {pixels: the last
            frames that the next chunk's 73 will need beside its own, float32 [1, 3, t, 8H, 8W]}.

        Source: Wan2.2, wan/speech2video.py, WanS2V.generate.
        """
        import torch

        from s2v_flow.nodes.tensors import pack, pack_finite, to_frames, unpack

        vae = inputs["vae"].get()
        context.record(width=context.planned["width"], height=context.planned["height"])
        latent = unpack(inputs["latent"])["samples"].to(context.device)
        before = unpack(inputs["before"])
        motion = before["samples" if "samples" in before else "latent"].to(context.device)
        decoder = StreamDecoder(vae, context.way.get("frames_per_call", FRAMES_PER_CALL), 1, context)
        for _ in decoder.decode(motion):  # its own frames are not wanted
            pass
        groups = [group.float() for group in decoder.decode(latent)]
        pixels = torch.cat(groups, dim=2)[:, :, self.drop_frames :].clamp(-1, 1)
        window = torch.cat([self._tail(inputs, pixels), pixels], dim=2)[:, :, -MOTION_FRAMES:]
        kept = max(MOTION_FRAMES - 4 * self.num_latent_frames, 0)
        tail = window[:, :, MOTION_FRAMES - kept :]
        return {
            "frames": pack({"frames": to_frames(pixels)}),
            "motion": pack_finite({"samples": encoded(vae, window, context)}),
            "tail": pack({"pixels": tail}),
        }

    @staticmethod
    def _tail(inputs: Mapping[str, Any], pixels: Tensor) -> Tensor:
        """Return the pixels before this chunk that may be among the last 73: [1, 3, up to 73, 8H, 8W]."""
        import torch

        from s2v_flow.nodes.tensors import unpack

        if "tail" in inputs:
            return unpack(inputs["tail"])["pixels"].to(pixels.device)
        grey = torch.zeros(1, 3, MOTION_FRAMES, *pixels.shape[3:], device=pixels.device)
        if "reference" in inputs:
            grey[:, :, -START_FRAMES:] = unpack(inputs["reference"])["pixels"].to(pixels.device)
        return grey


def scaled_pixels(frames: Any, width: int, height: int, conditioning: str) -> Tensor:
    """Crop and scale frames, uint8 [n, h, w, 3], to pixels [1, 3, n, height, width] in [-1, 1]."""
    import numpy as np
    import torch

    from s2v_flow.media.image import crop_resize
    from s2v_flow.nodes.tensors import to_pixels

    images = [
        crop_resize(frame.astype(np.float32) / 255, width, height, antialias=conditioning == "official")
        for frame in frames
    ]
    stacked = np.stack(images) if images else np.zeros((0, height, width, 3), np.float32)
    return to_pixels(torch.from_numpy(stacked))
