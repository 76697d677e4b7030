"""Which checkpoint is of which family: the one table, and the reading of what it names."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoProcessor, AutoTokenizer

from ..config import PreprocessConfig
from ..errors import CheckpointError, ConfigError
from ..model_configs import kind_of
from .family import Family, parts_chat, text_chat
from .ixc import load_ixc
from .qwen import QwenMedia

# By `kind_of`, for families of which transformers knows no processor.
FAMILIES: dict[str, Callable[[Path, PreprocessConfig, dict[str, Any]], Family]] = {
    "internlmxcomposer2": load_ixc,
}


def load_family(checkpoint: Path, config: PreprocessConfig) -> Family:
    """Read a checkpoint's processor files.

    Raises:
        CheckpointError: a file is missing or damaged.
        ConfigError: an option that the family does not have.
    """
    try:
        written = json.loads((checkpoint / "config.json").read_text())
        kind = kind_of(written)
        if kind in FAMILIES:
            return FAMILIES[kind](checkpoint, config, written)
        # False: transformers does not even ask whether it may run a checkpoint's code.
        model = AutoConfig.from_pretrained(checkpoint, trust_remote_code=False)
        multimodal = getattr(model, "vision_config", None) is not None
        auto: Any = AutoProcessor if multimodal else AutoTokenizer
        processor = auto.from_pretrained(checkpoint, trust_remote_code=False)
    except (CheckpointError, ConfigError):
        raise
    except Exception as error:  # transformers raises many types
        reason = f"{type(error).__name__}: {error}"
        raise CheckpointError(f"{checkpoint}: the processor cannot be loaded: {reason}") from error
    if processor.chat_template is None:
        raise CheckpointError(f"{checkpoint}: the processor has no chat template")
    if config.hd_num:
        raise ConfigError(
            f"hd_num {config.hd_num}: this checkpoint's images are not cut into tiles"
        )
    positions = int(model.get_text_config().max_position_embeddings)
    if not multimodal:
        return Family(processor, positions, text_chat)
    ids = tuple(getattr(processor, f"{kind}_token_id") for kind in ("image", "video"))
    return Family(processor, positions, parts_chat, QwenMedia(processor, config), ids)
