"""Importing timm leaves torch's compiler alone, and it still works when it is asked for."""

import subprocess
import sys

import pytest


def in_new_process(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize("module", ["encoder", "fold"])
def test_the_compiler_is_not_loaded_with_the_model(module: str) -> None:
    """Whichever room of the model is imported first, neither torch's compiler nor what it brings along is loaded."""
    code = f"import sys, wsi_mmm.model.{module}; print(*({{'torch._dynamo', 'sympy', 'triton'}} & set(sys.modules)))"
    assert in_new_process(code) == ""


def test_the_compiler_works_afterwards() -> None:
    """A function that timm keeps from the compiler runs uncompiled before and after the compiler is loaded, and it and
    torchvision's detectors find the compiler's real modules."""
    code = """
import sys, torch
from wsi_mmm.model.lean import without_compiler
with without_compiler():
    import timm, torchvision
    @torch.compiler.disable
    def left_alone(x):
        return x + 1, torch.compiler.is_compiling()
assert torch.compiler.disable.__module__ == "torch.compiler"
assert left_alone(torch.ones(1))[1] is False and "torch._dynamo" not in sys.modules
def around(x):
    y, compiling = left_alone(x * 2)
    return y - 1, compiling, torch.compiler.is_compiling()
found, inner, outer = torch.compile(around, backend="eager")(torch.ones(1))
assert found.item() == 2 and inner is False
found, inner, outer = torch.compile(around, backend="eager")(torch.ones(1))
assert found.item() == 2 and inner is False
assert sys.modules["torch._dynamo.utils"].__file__
from torchvision.ops import roi_align
assert roi_align(torch.ones(1, 1, 4, 4), [torch.tensor([[0.0, 0.0, 2.0, 2.0]])], 1).item() == 1
print("well")
"""
    assert in_new_process(code) == "well"
