"""Keys in pages: the same attention from fewer rows, or gathered keys where a kernel takes none."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

from tests.engine import varlen_kernel
from tests.engine.test_engine import GEOMETRY, batches, build
from tests.features import scores_of
from triward_server.config import ForwardConfig
from triward_server.engine import attention, kernels, packing, pages
from triward_server.engine.arena import Arena
from triward_server.engine.attention import Layout, LogitRules, make_layout, varlen
from triward_server.engine.planning import Cost, price
from triward_server.engine.scoring import Scorer
from triward_server.export.prepared import prepared
from triward_server.export.random_text_checkpoint import KINDS, make_text_checkpoint
from triward_server.schema import Int64Array
from triward_server.testing.oracle import Oracle, fp32_budget

CPU = torch.device("cpu")
EXACT = 1e-12  # of float64
CONFIG = ForwardConfig(dtype="float32", device="cpu")


def take_pages(patch: pytest.MonkeyPatch, page: int = 256) -> None:
    """Give CPU tensors to the varlen kernel's stand-in, which takes pages."""
    patch.setattr("torch.nn.attention.varlen.varlen_attn", varlen_kernel.varlen_attn)
    patch.setattr(attention, "kernel_for", lambda device, dtype: "varlen")
    patch.setattr(attention, "takes_pages", lambda device: True)
    patch.setattr(pages, "PAGE", page)


@pytest.fixture
def paged(monkeypatch: pytest.MonkeyPatch) -> None:
    take_pages(monkeypatch)


@dataclass(frozen=True)
class Tree:
    """Paths of a random tree.

    Attributes:
        rows: of keys, those of cached nodes in front.
        queries: lengths of the sequences.
        seen: for each of them the rows that it sees; its queries are its last ones.
    """

    rows: int
    queries: list[int]
    seen: list[Int64Array]

    def layout(self, **options: Any) -> Layout:
        lengths, key_rows = [len(s) for s in self.seen], np.concatenate(self.seen)
        return make_layout(
            self.queries, True, Arena(CPU), torch.float64, lengths, key_rows, **options
        )

    def tensors(self, heads: int, key_heads: int) -> tuple[Tensor, Tensor, Tensor]:
        random = torch.Generator().manual_seed(self.rows)
        shapes = ((sum(self.queries), heads), (self.rows, key_heads), (self.rows, key_heads))
        q, k, v = (torch.randn(*s, 8, generator=random, dtype=torch.float64) for s in shapes)
        return q, k, v

    def truth(self, q: Tensor, k: Tensor, v: Tensor, rules: LogitRules) -> Tensor:
        """Attention written out, query by query."""
        groups, out, row = q.shape[1] // k.shape[1], torch.empty_like(q), 0
        for count, seen in zip(self.queries, self.seen, strict=True):
            for end in range(len(seen) - count + 1, len(seen) + 1):
                rows = torch.from_numpy(seen[:end][-(rules.window or end) :])
                keys, values = (t[rows].repeat_interleave(groups, 1) for t in (k, v))
                products = (q[row, None] * keys).sum(-1).mul(8**-0.5)
                if rules.softcap:
                    products = rules.softcap * (products / rules.softcap).tanh()
                weights = products.softmax(0)
                out[row] = (weights[..., None] * values).sum(0)
                row += 1
        return out


def grow(seed: int, page: int, nodes: int, ends: bool) -> Tree:
    """Nest nodes as long as a page, one less, one more, or anything; some of them cached.

    `ends`: as the last layer has it, one query a path, of which some may be equal.
    """
    random = np.random.default_rng(seed)
    lengths = [
        int(random.choice([page - 1, page, page + 1, 2 * page, 1, random.integers(1, 2 * page)]))
        for _ in range(nodes)
    ]
    paths: list[Int64Array] = []
    for end, length in zip(np.cumsum(lengths), lengths, strict=True):
        parent = int(random.integers(-1, len(paths)))
        above = paths[parent] if parent >= 0 else np.empty(0, np.int64)
        paths.append(np.concatenate([above, np.arange(end - length, end)]))
    cached = int(random.integers(0, nodes // 2))
    chosen = [*range(cached, nodes)]
    queries = [lengths[node] for node in chosen]
    if ends:
        chosen = sorted(random.integers(cached, nodes, nodes).tolist())
        queries = [1] * len(chosen)
    return Tree(sum(lengths), queries, [paths[node] for node in chosen])


def distance(tree: Tree, layout: Layout, heads: tuple[int, int], rules: LogitRules) -> float:
    q, k, v = tree.tensors(*heads)
    out = varlen(q, k, v, layout, rules)
    return float((out - tree.truth(q, k, v, rules)).abs().max())


HEADS = [(2, 2), (4, 2), (3, 1)]


@pytest.mark.usefixtures("paged")
def test_random_trees_of_small_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pages, "PAGE", 4)
    by_pages = 0
    for seed in range(90):
        tree = grow(seed, 4, 9, ends=seed % 2 == 0)
        layout = tree.layout()
        by_pages += layout.pages is not None
        rules = LogitRules(window=[None, 1, 6][seed // 2 % 3])
        assert distance(tree, layout, HEADS[seed // 6 % 3], rules) < EXACT, seed
    assert by_pages > 45, "few of the trees share a page"


@pytest.mark.usefixtures("paged")
def test_random_trees_of_real_pages() -> None:
    trees = [grow(seed, 256, 9, ends=seed % 2 == 0) for seed in range(20)]
    chosen = [(tree, layout) for tree in trees if (layout := tree.layout()).pages]
    assert len(chosen) > 5
    for index, (tree, layout) in enumerate(chosen[:6]):
        assert layout.pages is not None and layout.pages.rows.shape[1] == 256
        rules = LogitRules(window=[None, 300, 256][index % 3])
        assert distance(tree, layout, HEADS[index // 2], rules) < EXACT, index


def two_turns() -> Tree:
    """A prompt of three pages and a bit, what two responses see of it, and another conversation."""
    prompt = np.arange(800)
    seen = [np.append(prompt, own) for own in (np.arange(800, 1100), np.arange(1100, 1180))]
    return Tree(1500, [300, 80, 320], [*seen, np.arange(1180, 1500)])


@pytest.mark.usefixtures("paged")
def test_what_is_shared_is_there_once() -> None:
    tree = two_turns()
    layout = tree.layout()
    assert layout.pages is not None and layout.key_rows is not None
    assert len(layout.key_rows) == 1100 + 880 + 320
    assert layout.pages.table.tolist() == [[0, 1, 2, 3, 4], [0, 1, 2, 5, 0], [6, 7, 0, 0, 0]]
    assert layout.pages.used.tolist() == [1100, 880, 320]
    assert layout.pages.rows.shape == (8, 256)
    for table, seen in zip(layout.pages.table, tree.seen, strict=True):
        known = layout.pages.rows[table[: -(-len(seen) // 256)]].flatten().numpy()
        np.testing.assert_array_equal(known[: len(seen)], seen)
        # What is behind a sequence's end is its own, too: no other one's NaN gets into it.
        assert set(known) <= set(seen)
    assert distance(tree, layout, (4, 2), LogitRules()) < EXACT


def stale(found: pages.Pages) -> pages.Pages:
    rows = found.rows.clone()
    rows[1] = rows[0]
    return replace(found, rows=rows)


def swapped(found: pages.Pages) -> pages.Pages:
    table = found.table.clone()
    table[1, [2, 3]] = table[1, [3, 2]]
    return replace(found, table=table)


def longer(found: pages.Pages) -> pages.Pages:
    return replace(found, used=found.used + torch.tensor([0, 1, 0], dtype=torch.int32))


def shorter(found: pages.Pages) -> pages.Pages:
    return replace(found, used=found.used - torch.tensor([0, 1, 0], dtype=torch.int32))


@pytest.mark.usefixtures("paged")
@pytest.mark.parametrize("damage", [stale, swapped, longer, shorter])
def test_a_wrong_page_would_be_noticed(damage: Callable[[pages.Pages], pages.Pages]) -> None:
    """The check itself."""
    tree = two_turns()
    layout = tree.layout()
    assert layout.pages is not None
    wrong = replace(layout, pages=damage(layout.pages))
    assert distance(tree, wrong, (4, 2), LogitRules()) > 1e-3


@pytest.mark.usefixtures("paged")
def test_pages_where_they_are_fewer_rows() -> None:
    prompt = np.arange(300)
    few = Tree(
        310, [300, 5, 5], [prompt, *(np.append(prompt, np.arange(a, a + 5)) for a in (300, 305))]
    )
    assert few.layout().pages is None, "910 keys, and 4 pages of 256"
    assert distance(few, few.layout(), (4, 2), LogitRules()) < EXACT
    many = Tree(320, [5] * 4, [np.append(prompt, np.arange(a, a + 5)) for a in range(300, 320, 5)])
    assert many.layout().pages is None, "1,220 keys, and 5 pages"
    longer = Tree(
        540, [5] * 4, [np.append(np.arange(520), np.arange(a, a + 5)) for a in range(520, 540, 5)]
    )
    assert longer.layout().pages is not None, "2,100 keys, and 6 pages"


@pytest.mark.usefixtures("paged")
def test_deterministic_mode_gathers() -> None:
    """A hit must equal a miss bitwise, so no pass may take another way than the next one."""
    tree = two_turns()
    layout = tree.layout(deterministic=True)
    assert layout.pages is None
    assert distance(tree, layout, (4, 2), LogitRules()) < EXACT


@pytest.mark.usefixtures("paged")
def test_capped_products_do_not_see_pages() -> None:
    tree, rules = two_turns(), LogitRules(softcap=1.0)
    assert tree.layout().pages is not None, "asked for here, though no model with a cap does"
    assert distance(tree, tree.layout(), (4, 2), rules) < 1e-5, "weights are made in float32"


@pytest.fixture(scope="module")
def scorer(checkpoint: Path) -> Scorer:
    """One for all batches, so that they meet what the earlier ones have left."""
    return Scorer(checkpoint, CONFIG)


def check(scorer: Scorer, oracle: Oracle, batch: Any) -> None:
    items = build(batch, scorer.geometry.image_token_id)
    for item, result in zip(items, scorer.score(items), strict=True):
        for score, expected in zip(scores_of(result), oracle.score_features(item), strict=True):
            assert abs(score - expected) <= fp32_budget(expected)


@settings(max_examples=30, deadline=None)
@given(batch=batches)
def test_random_batches_by_pages_equal_the_oracle(
    batch: Any, scorer: Scorer, oracle: Oracle
) -> None:
    """The whole model, with what the prefix cache has in front."""
    with pytest.MonkeyPatch.context() as patch:
        take_pages(patch, page=4)
        check(scorer, oracle, batch)


def test_cached_keys_are_in_pages(
    scorer: Scorer, oracle: Oracle, monkeypatch: pytest.MonkeyPatch
) -> None:
    take_pages(monkeypatch, page=4)
    made: list[pages.Pages | None] = []
    lay_out = attention.lay_out
    monkeypatch.setattr(attention, "lay_out", lambda *args: made.append(lay_out(*args)) or made[-1])
    slots: list[int] = []
    pack = packing.pack
    monkeypatch.setattr(
        packing, "pack", lambda *args: slots.append(len((batch := pack(*args)).slots)) or batch
    )
    scorer._prefixes.clear()
    prompt = [(1, 2, 3), ("image", 0), (1, 2)]
    for answers in ([[(1, 1)], [(2, 1)]], [[(3, 3)], [(3, 1, 2)], [(1, 1, 3)]]):
        check(scorer, oracle, [(prompt, answers)])
    assert slots[0] == 0 < slots[-1]
    assert len(made) == 4 and all(made), "two layouts a pass, the last layer's beside the others'"
    assert min(int(each.rows.min()) for each in made[2:] if each) == 0, "a slot of the cache"


@pytest.mark.parametrize("kind", KINDS)
def test_text_models_by_pages(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Norms, windows and caps of all of them; where products are capped, no pages are made."""
    make_text_checkpoint(kind, "tiny", 0, tmp_path / kind)
    with prepared(tmp_path / kind) as whole:
        model = Scorer(whole, replace(CONFIG, prefix_cache_bytes=0))
    capped = model._model.language_model.decoder.softcap is not None
    end = (model.geometry.read_id or 4,)
    items = build([([(1, 2, 3)] * 4, [[*[(1, 2)] * 5, end], [*[(2, 1)] * 9, end], [end]])], 0)
    plain = [scores_of(result) for result in model.score(items)]
    take_pages(monkeypatch, page=4)
    made: list[pages.Pages | None] = []
    lay_out = attention.lay_out
    monkeypatch.setattr(attention, "lay_out", lambda *args: made.append(lay_out(*args)) or made[-1])
    for result, expected in zip(model.score(items), plain, strict=True):
        np.testing.assert_allclose(scores_of(result), expected, rtol=1e-4, atol=1e-4)
    assert made == [] if capped else len(made) == 2 and all(made)


@settings(max_examples=100, deadline=None)
@given(batch=batches)
@pytest.mark.parametrize("deterministic", [False, True])
def test_no_more_rows_than_are_priced(batch: Any, deterministic: bool) -> None:
    """A plan's bytes bound the gathered keys, and pages are fewer rows, or none are used."""
    ordered = packing.sort_batch(
        dict(enumerate(build(batch, GEOMETRY.image_token_id))), GEOMETRY, deterministic
    )
    packed = packing.pack(ordered, range(len(ordered.branches)))
    only_keys = Cost(0, 0, 0, 0, token_bytes=0, key_bytes=1, patch_bytes=0)
    priced = sum(
        price(ordered, index, int(shared), frozenset(), only_keys)[3]
        for index, shared in enumerate(ordered.shared)
    )
    with pytest.MonkeyPatch.context() as patch:
        take_pages(patch, page=4)
        tree = (packed.node_lengths, True, Arena(CPU), torch.float32, packed.key_lengths)
        layout = make_layout(*tree, packed.key_rows, deterministic)
    assert layout.key_rows is not None
    taken = layout.key_rows if layout.pages is None else layout.pages.rows
    assert taken.numel() <= len(packed.key_rows) <= priced
    if layout.pages is not None:
        assert taken.numel() < len(packed.key_rows)


def test_the_probe_of_a_kernel_that_reads_pages() -> None:
    assert kernels.reads_pages(varlen_kernel.varlen_attn, CPU)


def gathering(query: Any, key: Any, value: Any, *rest: Any, window_size: Any = (-1, -1)) -> Any:
    """torch 2.11's parameters."""
    raise AssertionError("nothing is tried")


def unsplit(query: Any, key: Any, value: Any, *rest: Any, enable_gqa: bool, seqused_k: Any = None,
            block_table: Any = None, window_size: Any = (-1, -1)) -> Any:  # fmt: skip
    """Those of a kernel that splits pages as it likes."""
    raise AssertionError("nothing is tried")


@pytest.mark.parametrize(
    ("kernel", "lacks"),
    [(gathering, "block_table, enable_gqa, num_splits, seqused_k"), (unsplit, "num_splits")],
)
def test_a_kernel_without_pages(kernel: Any, lacks: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        assert not kernels.reads_pages(kernel, CPU)
    assert caplog.messages == [f"keys are gathered: the varlen kernel has no {lacks}"]


def test_this_torch_has_the_parameters() -> None:
    from torch.nn.attention.varlen import varlen_attn

    theirs, ours = (
        inspect.signature(kernel).parameters for kernel in (varlen_attn, varlen_kernel.varlen_attn)
    )
    assert [*ours] == [name for name in theirs if name != "return_aux"]
    assert {name: p.default for name, p in ours.items()}.items() <= {
        name: p.default for name, p in theirs.items()
    }.items()
    assert not kernels.takes_pages(CPU), "without a GPU there is nothing to try"


def deaf(change: Callable[[dict[str, Any]], object]) -> Callable[..., Any]:
    """A kernel that hears something else than it is told about pages."""

    def kernel(
        *args: Any, window_size: Any, enable_gqa: bool, num_splits: int, seqused_k: Any = None,
        block_table: Any = None,
    ) -> Any:  # fmt: skip
        told = {"seqused_k": seqused_k, "block_table": block_table, "window_size": window_size}
        if block_table is not None:
            change(told)
        return varlen_kernel.varlen_attn(*args, enable_gqa=True, num_splits=num_splits, **told)

    return kernel


def in_order(told: dict[str, Any]) -> None:
    table = told["block_table"]
    told["block_table"] = torch.arange(table.numel(), dtype=torch.int32).view(table.shape) % 7


def one_less(told: dict[str, Any]) -> None:
    told["seqused_k"] = told["seqused_k"] - 1


def no_window(told: dict[str, Any]) -> None:
    told["window_size"] = (-1, 0)


@pytest.mark.parametrize("change", [in_order, one_less, no_window])
def test_a_probe_that_disagrees_means_gathers(
    change: Any, caplog: pytest.LogCaptureFixture
) -> None:
    assert not kernels.reads_pages(deaf(change), CPU)
    [message] = caplog.messages
    assert message.startswith("keys are gathered: from pages the varlen kernel computes something")


def raising(error: Exception) -> Callable[..., Any]:
    def kernel(
        *args: Any, window_size: Any, enable_gqa: bool, num_splits: int, seqused_k: Any = None,
        block_table: Any = None,
    ) -> Any:  # fmt: skip
        raise error

    return kernel


def test_a_probe_that_is_refused_means_gathers(caplog: pytest.LogCaptureFixture) -> None:
    kernel = raising(RuntimeError("Paged KV cache block size must be divisible by 512"))
    assert not kernels.reads_pages(kernel, CPU)
    assert "refuses pages: Paged KV cache block size" in caplog.text
    caplog.clear()
    assert not kernels.reads_pages(kernel, CPU) and not caplog.text, "it is tried once"


@pytest.mark.parametrize(
    "error",
    [
        torch.AcceleratorError("CUDA error: an illegal memory access was encountered"),
        torch.OutOfMemoryError("CUDA out of memory"),
    ],
)
def test_a_probe_that_faults_is_no_answer(error: Exception) -> None:
    with pytest.raises(type(error)):
        kernels.reads_pages(raising(error), CPU)


def test_a_device_is_asked_before_pages_are_made(monkeypatch: pytest.MonkeyPatch) -> None:
    take_pages(monkeypatch)
    asked: list[torch.device] = []
    monkeypatch.setattr(attention, "takes_pages", lambda device: bool(asked.append(device)))
    assert two_turns().layout().pages is None
    assert asked == [CPU]
    take_pages(monkeypatch)
    monkeypatch.setattr(attention, "kernel_for", lambda device, dtype: "sdpa")
    assert two_turns().layout().pages is None
