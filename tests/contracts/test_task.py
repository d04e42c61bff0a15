"""What every kind of task must hold: a plug-in's kind passes the same suite (see docs/extending.md).

A kind joins by one `Example`: its card and two targets. ``tests/contracts`` is not installed: copy `TaskContract`'s
checks by subclassing it with ``examples`` of your own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import pytest
import torch

from wsi_mmm.errors import ModelError
from wsi_mmm.model.card import TaskCard
from wsi_mmm.model.heads import HeadSpec
from wsi_mmm.tasks import TASK_KINDS, Task, View, make_task
from wsi_mmm.tasks.targets import Boxes, Survival

SIDE = 32  # px of a target image
SPEC = HeadSpec(8, 8, 8, 8)


@dataclass(frozen=True)
class Example:
    """A kind with a card and two ``targets``; ``unknown``: a target of which nothing is known (None: there is none)."""

    kind: str
    head: str
    outputs: int
    classes: tuple[str, ...]
    targets: Sequence[Any]
    unknown: Any = None
    params: dict[str, float] = field(default_factory=dict)

    def card(self, **changes: Any) -> TaskCard:
        facts = {
            "name": "t", "kind": self.kind, "head": self.head, "outputs": self.outputs, "classes": self.classes,
            "colors": [(0, 0, 0)] * len(self.classes), "params": self.params,
        }  # fmt: skip
        return TaskCard.model_validate(facts | changes)


def _labels(*rectangles: tuple[int, int, int, int], fill: int = 0) -> np.ndarray:
    image = np.full((SIDE, SIDE), fill, np.int32)
    for number, (y0, x0, y1, x1) in enumerate(rectangles, 1):
        image[y0:y1, x0:x1] = number
    return image


def _boxes(label: int, *corners: tuple[float, float, float, float]) -> Boxes:
    return Boxes(np.array(corners, np.float32), np.full(len(corners), label, np.int32), SIDE, SIDE)


def _numbers(*values: float) -> np.ndarray:
    return np.array(values, np.float32)


NAN = float("nan")
RECTANGLES = _labels((4, 4, 14, 14), (18, 16, 28, 28))
PICTURES = np.random.default_rng(0).integers(0, 256, (2, SIDE, SIDE, 3), np.uint8)

EXAMPLES = {
    "classify": Example("classify", "vector", 2, ("a", "b"), [0, 1], -1),
    "classify bags": Example("classify", "bag", 2, ("a", "b"), [0, 1], -1),
    "multilabel": Example("multilabel", "vector", 2, ("a", "b"), [_numbers(0, 1), _numbers(1, 0)], _numbers(NAN, NAN)),
    "regress": Example("regress", "vector", 2, ("a", "b"), [_numbers(0, 1), _numbers(2, -1)], _numbers(NAN, NAN)),
    "survive": Example(
        "survive", "bag", 1, ("death",), [Survival(1.0, True), Survival(2.0, False)], Survival(NAN, False)
    ),
    "survive in intervals": Example(
        "survive", "vector", 4, ("death",), [Survival(1.0, True), Survival(7.0, False)], Survival(NAN, False),
        {"bins": 4, "horizon": 8.0},
    ),
    "segment": Example("segment", "map", 3, ("a", "b", "c"), [RECTANGLES, RECTANGLES.T], _labels(fill=-1)),
    "multisegment": Example(
        "multisegment", "map", 2, ("a", "b"), [np.stack([RECTANGLES == 1, RECTANGLES == 2]).astype(np.int8)] * 2,
        np.full((2, SIDE, SIDE), -1, np.int8),
    ),
    "instances": Example("instances", "map", 4, ("cell",), [RECTANGLES, RECTANGLES.T], _labels(fill=-1)),
    "detect": Example(
        "detect", "dense", 6, ("a", "b"), [_boxes(0, (4, 4, 14, 14)), _boxes(1, (16, 18, 28, 28))],
        _boxes(-1, (0, 0, SIDE, SIDE)),
    ),
    "reconstruct": Example("reconstruct", "image", 3, ("image",), list(PICTURES)),
}  # fmt: skip


def _logits(task: Task, count: int, *, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    size = (SIDE // task.stride, SIDE // task.stride) if task.scope == "pixel" else ()
    return torch.randn(count, task.channels, *size, generator=generator)


class TaskContract:
    """The checks; a subclass gives ``examples``."""

    examples: ClassVar[dict[str, Example]] = {}

    @pytest.fixture
    def example(self, request: pytest.FixtureRequest) -> Example:
        return self.examples[request.param]

    @pytest.fixture
    def task(self, example: Example) -> Task:
        return make_task(example.card())

    def test_it_is_what_its_card_says(self, task: Task, example: Example) -> None:
        """Name, kind, classes; a scope of its own kind; the head that its card names."""
        assert (task.info.name, task.info.kind, task.info.classes) == ("t", example.kind, example.classes)
        assert TASK_KINDS[example.kind].heads[task.scope] == example.head
        assert task.channels == example.outputs
        assert task.stride >= 1 and task.halo >= 0
        assert isinstance(task.head(SPEC), torch.nn.Module)

    def test_an_unknown_parameter_a_wrong_head_and_wrong_outputs_are_refused(self, example: Example) -> None:
        """Each in one line that names the task."""
        wrong = ({"params": {"no-such": 1.0}}, {"head": "no-such"}, {"outputs": example.outputs + 1})
        for change in wrong:
            try:
                card = example.card(**change)
            except ValueError:  # the card itself knows better
                continue
            with pytest.raises(ModelError, match=r"^task 't' [^\n]*$"):
                make_task(card)

    def test_targets_stack_and_the_loss_is_a_finite_scalar_with_gradients(self, task: Task, example: Example) -> None:
        """The loss of random logits; its gradient is finite, too."""
        target = torch.stack([task.target(value) for value in example.targets])
        logits = _logits(task, len(target)).requires_grad_()
        loss = task.loss(logits, target)
        assert loss.shape == () and bool(torch.isfinite(loss))
        [gradient] = torch.autograd.grad(loss, logits)
        assert bool(torch.isfinite(gradient).all())

    def test_unknown_targets_cost_nothing(self, task: Task, example: Example) -> None:
        """Zero, with gradients that are zeros and not missing."""
        if example.unknown is None:
            pytest.skip("every target of this kind is known")
        target = torch.stack([task.target(example.unknown)] * 2)
        logits = _logits(task, 2).requires_grad_()
        [gradient] = torch.autograd.grad(task.loss(logits, target), logits)
        assert bool((gradient == 0).all())

    def test_quantised_outputs_are_bytes_or_float32_of_the_same_shape(self, task: Task) -> None:
        """uint8 for pixel tasks; one item does not depend on the others of its batch."""
        logits = _logits(task, 3)
        values = task.quantise(logits)
        assert values.shape == (3, task.channels, *logits.shape[2:])
        assert values.dtype in ((torch.uint8,) if task.scope == "pixel" else (torch.uint8, torch.float32))
        assert torch.equal(task.quantise(logits[1:2])[0], values[1])

    def test_a_window_of_zeros_and_a_table_of_none_are_read(self, task: Task) -> None:
        """Pixel tasks: no objects in a map that no tile covers. Others: columns of no rows; `interpret` refuses."""
        window = np.zeros((task.channels, SIDE // task.stride, SIDE // task.stride), np.uint8)
        view = View(0, 0, (0, 0, SIDE, SIDE), 1.0, 1.0, SIDE, SIDE)
        if task.scope == "pixel":
            objects = task.interpret(window, view)
            assert (len(objects), objects.task) == (0, "t")
            assert task.table(window) == {}
            return
        with pytest.raises(TypeError):
            task.interpret(window, view)
        for count in (0, 2):
            columns = task.table(task.quantise(_logits(task, count)).numpy())
            assert columns and all(name.split(":")[0] == "t" for name in columns)
            for values in columns.values():
                assert len(values) == count and values.dtype in (np.int32, np.float32)

    def test_metrics_are_finite_numbers_by_name(self, task: Task, example: Example) -> None:
        """Of random outputs, and of none at all."""
        outputs = task.quantise(_logits(task, len(example.targets))).numpy()
        found = task.metrics(zip(example.targets, outputs, strict=True))
        assert all(isinstance(name, str) and np.isfinite(value) for name, value in found.items())
        assert all(np.isfinite(value) for value in task.metrics([]).values())

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        if "example" in metafunc.fixturenames:
            metafunc.parametrize("example", sorted(self.examples), indirect=True)


class TestOurKinds(TaskContract):
    """The kinds of the package."""

    examples = EXAMPLES

    def test_every_kind_has_an_example(self) -> None:
        """A kind that is added to the table joins this suite."""
        assert {example.kind for example in EXAMPLES.values()} == set(TASK_KINDS)


def test_an_unknown_kind_names_those_that_are_known() -> None:
    """In one line."""
    card = EXAMPLES["classify"].card(kind="guess")
    with pytest.raises(
        ModelError, match=r"unknown kind 'guess'; known: classify, detect, .*survive; a plug-in must be installed here$"
    ):
        make_task(card)
