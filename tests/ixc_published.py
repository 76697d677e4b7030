"""The recipe of `tests/export/ixc_golden.json`: `golden_cases` scored by IXC-2.5's published code.

    python -m tests.ixc_published FOLDER

FOLDER has build_mlp.py, configuration_internlm_xcomposer2.py, ixc_utils.py, modeling_internlm2.py,
modeling_internlm_xcomposer2.py and tokenization_internlm2.py, of github.com/InternLM/
InternLM-XComposer at 0f70c3e3, InternLM-XComposer-2.5-OmniLive/internlm-xcomposer2d5-ol-7b/base.
That code needs the packages einops and sentencepiece, and is no part of this project.

Its chat class has no reward head. Here its vision part, its decoder and its tokenizer are called as
the reward class calls them, and the head is applied to the last state. What transformers 5 needs:
a stub of decord, a `rope_scaling` that changes nothing, eager attention, weights loaded by
`load_state_dict`, and no level `vision_model` in their names.
"""

from __future__ import annotations

import importlib
import json
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from tempfile import TemporaryDirectory
from types import ModuleType
from typing import Any

import torch
from PIL import ImageFont
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import CLIPVisionConfig, CLIPVisionModel

from tests.conversations import Messages
from tests.fonts import FREE_FONT
from tests.ixc_golden import golden_cases, golden_checkpoint

GOLDEN = Path(__file__).parent / "export" / "ixc_golden.json"
PLACE = "<ImageHere>"


class Published:
    """The published classes with a checkpoint's weights."""

    def __init__(self, code: Path, checkpoint: Path) -> None:
        config = json.loads((checkpoint / "config.json").read_text())
        decord, package = ModuleType("decord"), ModuleType("published")
        decord.VideoReader, decord.__spec__ = None, ModuleSpec("decord", None)  # type: ignore
        package.__path__ = [str(code)]
        sys.modules |= {"decord": decord, "published": package}
        mlp, self.utils = map(
            importlib.import_module, ("published.build_mlp", "published.ixc_utils")
        )
        model = importlib.import_module("published.modeling_internlm_xcomposer2")

        def load_tower(tower: Any) -> None:
            vision = CLIPVisionConfig(**config["vision_config"])
            tower.vision_tower = CLIPVisionModel._from_config(vision, attn_implementation="eager")
            tower.is_loaded = True

        width, merged = config["hidden_size"], 4 * config["vision_config"]["hidden_size"]

        def projector(*_: int) -> nn.Module:
            return nn.Sequential(nn.Linear(merged, width), nn.GELU(), nn.Linear(width, width))

        mlp.CLIPVisionTower.load_model = load_tower
        model.build_vision_projector = projector
        model.get_font = lambda: ImageFont.truetype(str(FREE_FONT), size=40)
        settings = importlib.import_module("published.configuration_internlm_xcomposer2")
        left_out = {"model_type", "architectures", "auto_map", "vision_config", "max_length"}
        settings = settings.InternLMXcomposer2Config(
            **{name: value for name, value in config.items() if name not in left_out}
            | {
                "rope_scaling": {"type": "dynamic", "factor": 1.0},
                "attn_implementation": "eager",
            }
        )
        settings.max_length = config["max_length"]
        self.model = model.InternLMXComposer2ForCausalLM(settings)
        for name in ("plora_glb_GN", "plora_sub_GN"):
            shape = [*getattr(self.model, name).shape[:-1], merged]
            setattr(self.model, name, nn.Parameter(torch.zeros(shape)))
        state: dict[str, Tensor] = {}
        for file in checkpoint.glob("*.safetensors"):
            for name, tensor in load_file(file).items():
                state[name.replace("vision_tower.vision_model.", "vision_tower.")] = tensor.float()
        self.head = state.pop("score.weight")[0]
        missing, unexpected = self.model.load_state_dict(state, strict=False)
        assert not unexpected
        assert {name.split(".")[0] for name in missing} == {"output", "video_mem_proj"}
        self.model.eval()
        tokens = importlib.import_module("published.tokenization_internlm2")
        self.tokenizer = tokens.InternLM2Tokenizer(str(checkpoint / "tokenizer.model"))

    @torch.inference_mode()
    def score(self, messages: Messages) -> tuple[float, int]:
        """The score and the number of tokens."""
        prompt = "".join(
            f"[UNUSED_TOKEN_146]{message['role']}\n{_text(message)}[UNUSED_TOKEN_145]\n"
            for message in messages
        )
        texts = f"{prompt}</s>[UNUSED_TOKEN_130]".split(PLACE)
        media = [part for message in messages for part in _parts(message) if part["type"] != "text"]
        if len(media) == 1 and len(texts) == 1:
            texts = ["", *texts]
        assert len(texts) == len(media) + 1
        embeddings, masks = [], []
        for number, text in enumerate(texts):
            if text or not number:
                ids = self.tokenizer(text, return_tensors="pt", add_special_tokens=not number)
                embeddings.append(self.model.model.tok_embeddings(ids.input_ids.long()))
                masks.append(torch.zeros(embeddings[-1].shape[:2]))
            if number < len(media):
                embeddings.append(self._seen(media[number], len(media) > 1))
                masks.append(torch.ones(embeddings[-1].shape[:2]))
        joined = torch.cat(embeddings, dim=1)
        states = self.model.model(
            inputs_embeds=joined, attention_mask=torch.ones(joined.shape[:2], dtype=torch.long),
            im_mask=torch.cat(masks, dim=1).bool(), return_dict=True, use_cache=False,
        )[0]  # fmt: skip
        return float(states[0, -1].float() @ self.head), joined.shape[1]

    def _seen(self, part: dict[str, Any], several: bool) -> Tensor:
        if part["type"] == "video":
            sheet = self.utils.frame2img(part["video"], self.model.font)
            shown = self.utils.Video_transform(sheet)
        else:
            tiles = 6 if several else part.get("hd_num", 9)
            shown = self.utils.Image_transform(part["image"].convert("RGB"), hd_num=tiles)
        vectors: Tensor = self.model.img2emb(self.model.vis_processor(shown).unsqueeze(0))[0]
        return vectors


def _parts(message: dict[str, Any]) -> list[dict[str, Any]]:
    content = message["content"]
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


def _text(message: dict[str, Any]) -> str:
    return "".join(part["text"] for part in _parts(message) if part["type"] == "text")


def main() -> None:
    with TemporaryDirectory() as folder:
        checkpoint = Path(folder, "checkpoint")
        golden_checkpoint(checkpoint, FREE_FONT)
        published = Published(Path(sys.argv[1]), checkpoint)
        scores = {name: published.score(messages) for name, messages in golden_cases().items()}
    found = {name: {"score": score, "tokens": tokens} for name, (score, tokens) in scores.items()}
    recipe = "python -m tests.ixc_published FOLDER, with the code that its docstring names"
    GOLDEN.write_text(json.dumps({"recipe": recipe, "published": found}, indent=2) + "\n")


if __name__ == "__main__":
    main()
