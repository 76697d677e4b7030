"""The snippets of docs/integrations against the names of the projects' own options."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[2] / "docs" / "integrations"

VERSIONS = ("0.6.1", "0.7.0", "0.7.1", "0.8.0", "0.9.1")

# What the configurations of verl's wheels hold of the names that the page uses. Hydra takes a name
# that is not there only behind a `+`, and one that is there only without.
EVERYWHERE = """
    algorithm.adv_estimator data.train_files data.val_files data.train_batch_size data.image_key
    actor_rollout_ref.model.path actor_rollout_ref.rollout.name actor_rollout_ref.rollout.n
    actor_rollout_ref.actor.ppo_mini_batch_size trainer.n_gpus_per_node trainer.nnodes
    custom_reward_function.path custom_reward_function.name reward_model.reward_manager
"""
LOOP = """
    reward_model.reward_loop_source reward_model.reward_loop_module_path
    reward_model.reward_loop_class_name
"""
RENAMED = """
    reward.reward_manager.source reward.reward_manager.name reward.reward_manager.module.path
    reward.custom_reward_function.path reward.custom_reward_function.name
"""
V1 = "trainer.v1.sampler.custom_sampler.path trainer.v1.sampler.custom_sampler.name"
FILTERED = "algorithm.filter_groups.enable algorithm.filter_groups.metric"
OPTIONS = {
    "0.6.1": EVERYWHERE,
    "0.7.0": EVERYWHERE + LOOP,
    # They hold the older names, too, but read some of them wrongly: nothing here may use those.
    **dict.fromkeys(("0.7.1", "0.8.0"), EVERYWHERE + RENAMED),
    "0.9.1": EVERYWHERE + RENAMED + f"{V1} {FILTERED}",
}
OLDER = ("custom_reward_function.", "reward_model.")


def snippets(page):
    """The page's shell snippets, each as its words."""
    text = (DOCS / page).read_text(encoding="utf-8")
    blocks = re.findall(r"^```bash\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    return [(block, shlex.split(block.replace("\\\n", " "), comments=True)) for block in blocks]


def versions(block):
    """The versions that a snippet names in its first comment."""
    first, last = re.search(r"# .*verl ([\d.]+)(?: to ([\d.]+))?\n", block).groups()
    return VERSIONS[VERSIONS.index(first) : VERSIONS.index(last or first) + 1]


@pytest.mark.parametrize("block", [block for block, _ in snippets("verl.md")])
def test_verls_options_are_there_in_the_versions_that_are_named(block):
    words = dict(snippets("verl.md"))[block]
    names = [word.partition("=")[0] for word in words if "=" in word]
    assert names
    for version in versions(block):
        known = OPTIONS[version].split()
        for name in names:
            there = name.lstrip("+") in known
            assert there is not name.startswith("+"), f"{version}: {name}"
            renamed = version not in ("0.6.1", "0.7.0")
            assert not (renamed and name.lstrip("+").startswith(OLDER)), f"{version}: {name}"


def test_openrlhf_is_told_that_prompts_show_images():
    """Its default is text only, whatever the column of images holds."""
    (words,) = [words for _, words in snippets("openrlhf.md") if "--data.image_key" in words]
    assert int(words[words.index("--data.max_images_per_prompt") + 1]) == shown_at_most()


def shown_at_most():
    """The most images of a row that the page's data.py writes."""
    text = (DOCS / "openrlhf.md").read_text(encoding="utf-8")
    script = next(b for b in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if "data.py" in b)
    made = {}
    exec(script.partition("with open")[0], made)
    return max(len(row["images"]) for row in made["rows"])
