"""The snippets of small adapters' pages, and the calls that the trainers make.

The stubs have the signatures of ms-swift 4.6.0, AReaL 1.0.4 and skyrl-gym 0.4.0 (their wheels), of
NVIDIA-NeMo/RL at 0b8a793a0859 and of alibaba/ROLL at ef379504cc84, in as few words as possible.
"""

from __future__ import annotations

import asyncio
import importlib
import json
import pickle
import re
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import NamedTuple

import numpy as np
import pytest
import torch

from tests.client.helpers import png, watched
from tests.fakeserver import Fault
from triward import InvalidRequest, RewardClient, ServerError, ServerUnavailable
from triward.integrations.prompts import prompted, rollouts

DOCS = Path(__file__).parents[2] / "docs" / "integrations"
PLACE = "<|vision_start|><|image_pad|><|vision_end|>"


def chatml(text):
    return f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n"


def user(content):
    return [{"role": "user", "content": content}]


def shown(text="?"):
    return user([{"type": "image"}, {"type": "text", "text": text}])


@pytest.fixture
def calls(server):
    return watched(server)


def asked(calls):
    """The messages, responses and images of each call."""
    return [(json.loads(c.messages), [r.decode() for r in c.responses], c.media) for c in calls]


@pytest.fixture
def stub(monkeypatch):
    """Put a module where imports find it, and forget the adapter that was imported with it."""

    def put(name, adapter=None, **contents):
        parts = name.split(".")
        for depth in range(1, len(parts) + 1):
            path = ".".join(parts[:depth])
            if path not in sys.modules:
                monkeypatch.setitem(sys.modules, path, ModuleType(path))
        for attribute, value in contents.items():
            monkeypatch.setattr(sys.modules[name], attribute, value, raising=False)
        if adapter:
            monkeypatch.delitem(sys.modules, f"triward.integrations.{adapter}", raising=False)
        return sys.modules[name]

    return put


def snippet(page, url, **names):
    """What the page's Python makes, with this server in place of the page's."""
    text = (DOCS / page).read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert code.count("rewards:8001") or page in ("nemo-rl.md", "skyrl.md")
    made = dict(names)
    exec(code.replace("rewards:8001", url), made)
    return made


def expected(server, *conversations):
    with RewardClient(server.url) as client:
        return [client.score(each) for each in conversations]


class TestPrompts:
    def test_places_in_chatml_are_the_images(self):
        many = PLACE.replace("<|image_pad|>", "<|image_pad|>" * 7)
        assert prompted(chatml(f"{PLACE}a{many}b"), [b"1", b"2"]) == user([
            {"type": "image", "image": b"1"}, {"type": "text", "text": "a"},
            {"type": "image", "image": b"2"}, {"type": "text", "text": "b"},
        ])  # fmt: skip

    @pytest.mark.parametrize(
        ("prompt", "images", "message"),
        [
            (chatml(PLACE), [], "shows an image"),
            (chatml(PLACE), [b"1", b"2"], "2 for 1 places"),
            (chatml("none"), [b"1"], "1 for 0 places"),
            (chatml(f"{PLACE}<image>"), [b"1"], "says '<image>' in its text"),
            ("plain", [], "not ChatML"),
            (user("<image>"), [b"1", b"2"], "2 for 1 places"),
        ],
    )
    def test_what_does_not_fit_is_refused(self, prompt, images, message):
        with pytest.raises(InvalidRequest, match=message):
            prompted(prompt, images)

    def test_equal_neighbours_share_their_messages(self):
        rows = [(user("<image>?"), text, [png()]) for text in ("a<|im_end|>", "b")]
        first, second = rollouts(rows)
        assert first[0] is second[0]
        assert [first[-1]["content"], second[-1]["content"]] == ["a", "b"]
        other = list(rollouts([*rows, (user("<image>?"), "c", [png("blue")])]))[-1]
        assert other[0]["content"][0]["image"] == png("blue")


class TestSwift:
    @pytest.fixture
    def reward(self, stub, server):
        orms = {}
        stub("swift.rewards", orms=orms)
        snippet("swift.md", server.url)
        return orms["triward"](args=SimpleNamespace())  # as resolve_reward_funcs makes it

    def test_a_batch(self, reward, server, calls):
        """As score_completions asks."""
        said = [*user("<image>What?")], [*user("And?")]
        texts = ["one", "three", "fifteen"]
        prompts = [said[0], said[0], said[1]]
        messages = [
            [*prompt, {"role": "assistant", "content": text}]
            for prompt, text in zip(prompts, texts, strict=True)
        ]
        images = [[{"bytes": png(), "path": None}], [{"bytes": png(), "path": None}], None]
        columns = {"trainer_state": 1, "prompt_id": ["a", "a", "b"], "solution": ["", "", ""]}
        got = reward(texts, messages=messages, images=images, **columns)
        found = asked(calls)
        assert got == [3.0, 5.0, 7.0]
        assert {tuple(responses): len(media) for _, responses, media in found} == {
            ("one", "three"): 1, ("fifteen",): 0
        }  # fmt: skip
        picture = {"type": "image", "image": png()}
        text = {"type": "text", "text": "What?"}
        whole = [*user([picture, text]), messages[0][-1]]
        assert got[0] == expected(server, whole)[0]
        assert asked(calls)[-1][0] == next(m for m, r, _ in found if len(r) == 2)

    def test_failures(self, reward, server):
        messages = [[*user("?"), {"role": "assistant", "content": "a"}]]
        with pytest.raises(InvalidRequest, match="1 for 0 places"):
            reward(["a"], messages=messages, images=[[png()]])
        with pytest.raises(InvalidRequest, match="need one for each of 1 completions"):
            reward(["a"])
        with pytest.raises(InvalidRequest, match="must be the assistant's"):
            reward(["a"], messages=[user("?")])
        server.fault = lambda call: Fault.NAN
        with pytest.raises(ServerError):
            reward(["a"], messages=messages)


class Workflow:
    """RLVRWorkflow and its AsyncRewardWrapper, which has threads here and no processes."""

    patience = 15.0

    def __init__(self, reward_fn, gconfig, tokenizer):
        self.reward_fn = pickle.loads(pickle.dumps(reward_fn))
        self.async_reward_fn = self._wrapped

    async def _wrapped(self, *arguments, **data):
        for attempt in range(4):
            try:
                waited = asyncio.to_thread(self.reward_fn, *arguments, **data)
                return await asyncio.wait_for(waited, self.patience)
            except TimeoutError:
                if attempt == 3:
                    return 0
            except Exception:
                if attempt == 3:
                    raise
        return 0

    def reward(self, prompt, completion, **data):
        return asyncio.run(self._reward(prompt, completion, data))

    async def _reward(self, prompt, completion, data):
        return await self.async_reward_fn(prompt, completion, [1], [2], **data)


class TestAreal:
    @pytest.fixture(params=["set", "alone"])
    def workflow(self, request, stub, server):
        stub("areal.workflow.rlvr", RLVRWorkflow=Workflow)
        from triward.integrations import prompts

        prompts._async_client.cache_clear()  # of another event loop
        workflow = snippet("areal.md", server.url)["workflow_of"](None, None)
        if request.param == "alone":
            workflow.async_reward_fn = workflow._wrapped
        return workflow

    def test_messages(self, workflow, calls):
        assert workflow.reward("ignored", "four<|im_end|>", messages=user("?"), answer="4") == 4.0
        assert asked(calls) == [(user("?"), ["four"], [])]

    def test_a_vision_dataset(self, workflow, server, calls):
        row = {"messages": chatml(f"{PLACE}?"), "messages_chat": [], "images": [png()]}
        got = workflow.reward(chatml(PLACE), "three<|im_end|>", **row)
        picture = [{"type": "image", "image": png()}, {"type": "text", "text": "?"}]
        said = {"role": "assistant", "content": "three"}
        assert [got] == expected(server, [*user(picture), said]) == [5.0]
        assert asked(calls)[0] == asked(calls)[1] == (shown(), ["three"], calls[0].media)
        assert len(calls[0].media) == 1

    def test_failures(self, workflow, server):
        with pytest.raises(InvalidRequest, match="1 for 0 places"):
            workflow.reward(chatml("?"), "a", images=[png()])
        server.fault = lambda call: Fault.NAN
        with pytest.raises(ServerError):
            workflow.reward(chatml("?"), "a")

    def test_a_slow_server_is_an_error_and_no_zero(self, stub, server):
        from triward.integrations.areal import ArealReward, AsyncArealReward

        server.delay = 60
        workflow = Workflow(ArealReward(server.url, timeout=0.2), None, None)
        with pytest.raises(ServerUnavailable, match="no score in time"):
            workflow.reward(chatml("?"), "a")
        workflow.async_reward_fn = AsyncArealReward(server.url, timeout=0.2)
        with pytest.raises(ServerUnavailable, match="no score in time"):
            workflow.reward(chatml("?"), "a")
        slow = Workflow(ArealReward(server.url, timeout=3), None, None)
        slow.patience = 0.2
        assert slow.reward(chatml("?"), "a") == 0, "what a longer timeout would lead to"

    @pytest.mark.parametrize("timeout", [0, 15, 60])
    def test_its_timeout_is_shorter_than_areals(self, timeout):
        from triward.integrations.areal import ArealReward

        with pytest.raises(InvalidRequest, match=rf"timeout: .* below 15 s.*; got {timeout}$"):
            ArealReward("nowhere:1", timeout)


class Env:
    """skyrl_gym's, of which BaseTextEnv and `make` need no more."""


class BaseTextEnv(Env):
    def __init__(self):
        self.turns = 0
        self.max_turns = 1

    def close(self):
        pass

    def get_metrics(self):
        return {}


class TestSkyrl:
    @pytest.fixture
    def make(self, stub, server):
        registry = {}
        stub("skyrl_gym", register=lambda id, entry_point: registry.update({id: entry_point}))
        stub("skyrl_gym.envs.base_text_env", "skyrl", BaseTextEnv=BaseTextEnv)
        snippet("skyrl.md", server.url)

        def make(name, **arguments):
            module, _, made = registry[name].partition(":")
            env = getattr(importlib.import_module(module), made)(**arguments)
            assert isinstance(env, Env)
            return env

        return make

    @pytest.mark.parametrize("where", ["messages", "extras", "text"])
    def test_an_episode(self, make, server, calls, where):
        extras = {"max_turns": 1, "reward_spec": {}}
        prompt = user("?")
        if where == "messages":
            part = {"type": "image", "image": png()}
            prompt = user([part, {"type": "text", "text": "?"}])
        elif where == "extras":
            prompt, extras = shown(), {**extras, "images": [png()]}
        env = make("triward", env_config={"url": server.url}, extras=extras)
        assert env.init(prompt) == (prompt, {})
        output = env.step("four<|im_end|>")
        assert output == {"observations": [], "reward": 4.0, "done": True, "metadata": {}}
        assert (env.turns, env.get_metrics(), env.close()) == (1, {}, None)
        wire = user("?") if where == "text" else shown()
        assert [call[:2] for call in asked(calls)] == [(wire, ["four"])]
        assert len(calls[0].media) == (where != "text")
        said = {"role": "assistant", "content": "four"}
        if where == "messages":
            assert expected(server, [*prompt, said]) == [output["reward"]]

    def test_failures(self, make, server):
        with pytest.raises(InvalidRequest, match="needs 'url'"):
            make("triward", env_config={}, extras={})
        env = make("triward", env_config={"url": server.url}, extras={"images": [png()]})
        env.init(user("?"))
        with pytest.raises(InvalidRequest, match="1 for 0 places"):
            env.step("a")
        server.fault = lambda call: Fault.NAN
        env = make("triward", env_config={"url": [server.url], "timeout": 9})
        env.init(user("?"))
        with pytest.raises(ServerError):
            env.step("a")


class EnvironmentReturn(NamedTuple):
    observations: list
    metadata: list
    next_stop_strings: list
    rewards: torch.Tensor
    terminateds: torch.Tensor
    answers: list | None = None


class EnvironmentInterface:
    def step(self, message_log_batch, metadata):
        raise NotImplementedError

    def global_post_process_and_metrics(self, batch):
        raise NotImplementedError


class TestNemo:
    @pytest.fixture
    def environment(self, stub, server):
        registered = {}
        stub("ray", remote=lambda made: made)
        stub("nemo_rl.environments.utils", register_env=registered.__setitem__)
        interfaces = {
            "EnvironmentInterface": EnvironmentInterface, "EnvironmentReturn": EnvironmentReturn
        }  # fmt: skip
        stub("nemo_rl.environments.interfaces", "nemo_rl", **interfaces)
        made = snippet("nemo-rl.md", server.url)
        assert registered == {"triward": "environment.Environment"}
        environment = made["Environment"]({"url": server.url, "timeout": 60})
        yield environment
        environment.shutdown()

    def test_a_step(self, environment, server, calls):
        def log(text, response):
            ids = torch.zeros(3)
            return [
                {"role": "user", "content": text, "token_ids": ids},
                {"role": "assistant", "content": response, "token_ids": ids},
            ]

        told = {"messages": user("<image>?"), "images": [png()], "ground_truth": "4"}
        logs = [log("rendered", "a"), log("rendered", "bb"), log(chatml("text"), "ccc")]
        found = environment.step(logs, [told, told, None])
        assert isinstance(found, EnvironmentReturn)
        assert (found.rewards.tolist(), found.rewards.dtype) == ([1, 2, 3], torch.float32)
        assert found.terminateds.tolist() == [1, 1, 1]
        assert [m["role"] for m in found.observations] == ["environment"] * 3
        assert found.metadata == [told, told, None]
        assert {(str(m), *r) for m, r, _ in asked(calls)} == {
            (str(shown()), "a", "bb"), (str(user("text")), "ccc")
        }  # fmt: skip
        picture = [{"type": "image", "image": png()}, {"type": "text", "text": "?"}]
        whole = [*user(picture), {"role": "assistant", "content": "bb"}]
        assert expected(server, whole) == [found.rewards[1]]
        batch = {"rewards": found.rewards}
        same, metrics = environment.global_post_process_and_metrics(batch)
        assert same is batch and metrics == {"mean_reward": 2.0}

    def test_failures(self, environment, server):
        said = {"role": "assistant", "content": "a"}
        with pytest.raises(InvalidRequest, match="not ChatML"):
            environment.step([[*user("plain"), said]], [None])
        with pytest.raises(InvalidRequest, match="shows an image"):
            environment.step([[*user(chatml(PLACE)), said]], [{}])
        with pytest.raises(InvalidRequest, match=r"message_log_batch\[0\]: the last must be"):
            environment.step([user("?")], [None])
        server.fault = lambda call: Fault.NAN
        with pytest.raises(ServerError):
            environment.step([[*user(chatml("?")), said]], [None])


class Worker:
    def __init__(self, worker_config):
        self.rank_info = SimpleNamespace(rank=1, world_size=2)


class TestRoll:
    @pytest.fixture
    def worker(self, stub, server):
        registered = []

        def register(dispatch_mode, clear_cache=True):
            return lambda method: registered.append((method.__name__, dispatch_mode)) or method

        modes = SimpleNamespace(ONE_TO_ALL="all", DP_MP_COMPUTE="dp")
        stub("roll.distributed.scheduler.decorator", Dispatch=modes, register=register)
        proto = SimpleNamespace(from_dict=lambda tensors: SimpleNamespace(batch=tensors))
        stub("roll.distributed.scheduler.protocol", DataProto=proto)
        words = {1: "a", 2: "bb", 3: "ccc"}

        class Tokenizer:
            def batch_decode(self, ids, skip_special_tokens):
                assert skip_special_tokens
                return ["".join(words.get(int(i), "") for i in row) for row in ids]

        stub(
            "roll.models.model_providers", default_tokenizer_provider=lambda model_args: Tokenizer()
        )
        stub("roll.distributed.executor.worker", "roll", Worker=Worker)
        worker = snippet("roll.md", server.url, __name__="my_rewards")["Reward"](
            worker_config=SimpleNamespace(model_args=None)
        )
        assert registered == [("initialize", "all"), ("compute_rewards", "dp")]
        assert worker.initialize(None) is None
        return worker

    @staticmethod
    def data(responses, **fields):
        columns = {}
        for name, values in fields.items():
            columns[name] = np.empty(len(values), dtype=object)
            columns[name][:] = values
        batch = {"responses": torch.tensor(responses)}
        return SimpleNamespace(batch=batch, non_tensor_batch=columns)

    def test_text(self, worker, calls):
        rows = [json.dumps(user("x")), user("x"), json.dumps(user("y"))]
        found = worker.compute_rewards(self.data([[1, 0], [2, 3], [3, 0]], messages=rows)).batch
        assert found["response_level_rewards"].tolist() == found["scores"].tolist() == [1, 5, 3]
        assert found["scores"].dtype == torch.float32
        assert found["token_level_rewards"].tolist() == [[0, 0]] * 3
        assert {(str(m), *r) for m, r, _ in asked(calls)} == {
            (str(user("x")), "a", "bbccc"), (str(user("y")), "ccc")
        }  # fmt: skip

    @pytest.mark.parametrize("where", ["collator", "plain", "dataset", "struct"])
    def test_images(self, worker, server, calls, where):
        held = {"image": [png()]}
        column = {
            "collator": {"multi_modal_data": [{"prompt_token_ids": [1], "multi_modal_data": held}]},
            "plain": {"multi_modal_data": [held]},
            "dataset": {"images": [png()]},
            "struct": {"images": [{"bytes": png(), "path": None}]},
        }[where]
        data = self.data([[2]], prompt=[chatml(f"{PLACE}?")], **column)
        rewards = worker.compute_rewards(data).batch["scores"].tolist()
        picture = [{"type": "image", "image": png()}, {"type": "text", "text": "?"}]
        whole = [*user(picture), {"role": "assistant", "content": "bb"}]
        assert rewards == expected(server, whole) == [2.0]
        assert asked(calls)[0] == asked(calls)[1]

    def test_failures(self, worker, server):
        with pytest.raises(InvalidRequest, match="needs 'messages' or 'prompt'"):
            worker.compute_rewards(self.data([[1]], ground_truth=["x"]))
        with pytest.raises(InvalidRequest, match="shows an image"):
            worker.compute_rewards(self.data([[1]], prompt=[chatml(PLACE)]))
        server.fault = lambda call: Fault.NAN
        with pytest.raises(ServerError):
            worker.compute_rewards(self.data([[1]], prompt=[chatml("?")]))
