"""The oracle: the reference that tests, the demo and benchmarks judge every score by.

`Oracle` is the model card's published code, with the changes that today's packages force on it
(named below), trl's class among them. It needs the extra `reference`; nothing that serves imports
this module. `reference.py` judges with fewer packages and less memory.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
import torchvision
from qwen_vl_utils import vision_process
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoProcessor,
    AutoTokenizer,
    Qwen2_5_VLForConditionalGeneration,
)
from transformers.utils import cached_file

from ..engine.checkpoint import head_of, load_config
from ..export.reference import (
    Messages,
    Reference,
    card_inputs,
    fp32_budget,
    is_restated,
    text_inputs,
)
from ..schema import Features, Int32Array

__all__ = ["Messages", "Oracle", "TextOracle", "fp32_budget", "read_video"]


class Oracle:
    """Skywork-VL-Reward-7B's model card, as code.

    Changes against the card: the value-head class is imported from where trl keeps it now, and
    dtype, device and attention implementation are arguments. Video files are read by `read_video`
    where qwen-vl-utils has no reader that works.

    Args:
        checkpoint: a folder or a Hugging Face id.
        dtype: of weights and activations; the card uses bfloat16.
        device: where it runs.
        attention: transformers' attention implementation.
    """

    def __init__(
        self,
        checkpoint: str | Path,
        dtype: torch.dtype = torch.float32,
        device: str = "cpu",
        attention: str = "sdpa",
    ) -> None:
        os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
        if not hasattr(torchvision.io, "read_video"):  # what it would fall back on
            vision_process.VIDEO_READER_BACKENDS["torchvision"] = read_video
        from trl.experimental.ppo.modeling_value_head import AutoModelForCausalLMWithValueHead

        checkpoint = str(checkpoint)
        self.device = device
        self.processor = AutoProcessor.from_pretrained(checkpoint)
        backbone = Qwen2_5_VLForConditionalGeneration.from_pretrained(
            checkpoint, dtype=dtype, device_map=device, attn_implementation=attention
        )
        self.model = AutoModelForCausalLMWithValueHead.from_pretrained(backbone)
        value_head = cached_file(checkpoint, "value_head.safetensors")
        with safe_open(value_head, framework="pt", device="cpu") as tensors:
            parameters = {key: tensors.get_tensor(key) for key in tensors.keys()}  # noqa: SIM118
        self.model.load_state_dict(parameters, strict=False)
        self.model.to(device)
        self.model.requires_grad_(False)
        self.model.eval()

    def inputs(self, conversations: Sequence[Messages]) -> Any:
        """Return the processor's padded batch for whole conversations, responses included."""
        return card_inputs(self.processor, conversations).to(self.device)

    def score_inputs(self, inputs: Any) -> list[float]:
        """Return the value head at each row's last token."""
        with torch.inference_mode():
            values = self.model(**inputs, return_dict=True, use_cache=False)[-1]
        last = inputs["attention_mask"].sum(dim=-1, keepdim=True) - 1
        scores: list[float] = values.gather(dim=-1, index=last)[:, 0].float().tolist()
        return scores

    def score(self, messages: Messages) -> float:
        """Return the card's number for one conversation whose last message is the assistant's."""
        return self.score_inputs(self.inputs([messages]))[0]

    def score_features(self, features: Features) -> list[float]:
        """Each conversation of already prepared features by itself, without our tokenization."""
        processor = self.processor
        images = [pixels for pixels in features.media if pixels.ndim == 3]
        videos = [torch.from_numpy(v).movedim(3, 1).float() for v in features.media if v.ndim == 4]
        media: dict[str, Any] = {}
        if images:
            media |= processor.image_processor(images, return_tensors="pt")
        if videos:
            media |= processor.video_processor(videos, return_tensors="pt")
            media["second_per_grid_ts"] = torch.tensor(features.seconds_per_grid)
        media = {key: value.to(self.device) for key, value in media.items()}
        scores = []
        for response in features.response_ids:
            row = np.concatenate([features.prompt_ids, response]).astype(np.int64)
            ids = torch.from_numpy(row)[None].to(self.device)
            inputs = {
                "input_ids": ids,
                "attention_mask": torch.ones_like(ids),
                "mm_token_type_ids": (ids == processor.image_token_id).int()
                + 2 * (ids == processor.video_token_id).int(),
            }
            scores += self.score_inputs(inputs | media)
        return scores


class TextOracle:
    """A text reward model's published code: the head's number at the last token.

    `AutoModelForSequenceClassification(…).logits[0][0]`, as Skywork-Reward's cards have it, or
    trl's value head where a checkpoint carries one. Of a class that is remote code the restatement.

    Args:
        checkpoint: a folder or a Hugging Face id.
        dtype: of weights and activations.
        device: where it runs.
        attention: transformers' attention implementation.
    """

    def __init__(
        self,
        checkpoint: str | Path,
        dtype: torch.dtype = torch.float32,
        device: str = "cpu",
        attention: str = "eager",
    ) -> None:
        self.device = device
        self.tokenizer = AutoTokenizer.from_pretrained(checkpoint)
        head = Path(checkpoint, "value_head.safetensors")
        self.has_value_head = head.is_file()
        self.restated: Reference | None = None
        if _is_restated(Path(checkpoint)):
            self.restated = Reference(Path(checkpoint), torch.device(device), dtype=dtype)
            return
        auto = AutoModelForCausalLM if self.has_value_head else AutoModelForSequenceClassification
        model = auto.from_pretrained(checkpoint, dtype=dtype, attn_implementation=attention)
        if self.has_value_head:
            os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
            from trl.experimental.ppo.modeling_value_head import AutoModelForCausalLMWithValueHead

            model = AutoModelForCausalLMWithValueHead.from_pretrained(model)
            model.load_state_dict(load_file(head), strict=False)
        self.model = model.to(device).requires_grad_(False).eval()

    def inputs(self, conversations: Sequence[Messages]) -> Any:
        """Return the tokenizer's padded batch for whole conversations, responses included."""
        return text_inputs(self.tokenizer, conversations).to(self.device)

    def score_inputs(self, inputs: Any) -> list[float]:
        """Return the head's number for each row."""
        if self.restated is not None:
            rows = zip(inputs["input_ids"], inputs["attention_mask"].bool(), strict=True)
            return [self.restated.score_ids(ids[mask].cpu().numpy()) for ids, mask in rows]
        with torch.inference_mode():
            out = self.model(**inputs, use_cache=False)
        if not self.has_value_head:
            scores: list[float] = out.logits[:, 0].float().tolist()
            return scores
        last = inputs["attention_mask"].sum(dim=-1, keepdim=True) - 1
        return list(out[2].gather(dim=-1, index=last)[:, 0].float().tolist())

    def score_ids(self, ids: Int32Array) -> float:
        """Return the head's number for one conversation's token ids [L]."""
        row = torch.from_numpy(ids.astype(np.int64))[None].to(self.device)
        return self.score_inputs({"input_ids": row, "attention_mask": torch.ones_like(row)})[0]

    def score(self, messages: Messages) -> float:
        """Return the number for one conversation whose last message is the assistant's."""
        return self.score_inputs(self.inputs([messages]))[0]


def _is_restated(checkpoint: Path) -> bool:
    """Return True if transformers has no class that scores as the checkpoint's own does.

    Its classification head has no bias, and would leave one out in silence.
    """
    if not checkpoint.is_dir():
        return False
    config = load_config(checkpoint)
    return is_restated(config) or head_of(checkpoint, config).kind not in ("score", "v_head")


def read_video(ele: dict[str, Any]) -> tuple[torch.Tensor, dict[str, Any], float]:
    """Read a video for qwen-vl-utils as its own torchcodec reader does: all frames, then a choice.

    Args:
        ele: a part of the messages, its `video` a path.

    Returns:
        uint8 [T, 3, H, W], what the reader knows of them, and their rate.
    """
    with av.open(ele["video"]) as container:
        rate = float(container.streams.video[0].average_rate or 0)
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    first, last, total = vision_process.calculate_video_frame_range(ele, len(frames), rate)
    count = vision_process.smart_nframes(ele, total_frames=total, video_fps=rate)
    chosen = torch.linspace(first, last, count).round().long()
    video = torch.from_numpy(np.stack(frames)).permute(0, 3, 1, 2)[chosen]
    metadata = {"fps": rate, "frames_indices": chosen, "total_num_frames": total}
    return video, metadata, count / total * rate
