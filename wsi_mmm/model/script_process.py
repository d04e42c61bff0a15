"""The process that opens a TorchScript model and runs it, and does nothing else.

It is started with one argument, JSON (see `script_runner.ScriptProcess`). Over each channel, a pair of pipes, tiles
come as the number of them and their side (uint32 each) and uint8[n, s, s, 3]; the answer is a status byte, a length
(uint32) and so many bytes: float32[n, K] probabilities, or UTF-8 words. Nothing is pickled in either direction.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import resource
import struct
import sys
import threading
import warnings
from importlib import import_module
from typing import Any

from wsi_mmm.errors import ModelError, first_line

ASK, ANSWER = struct.Struct("=II"), struct.Struct("=BI")
PROBABILITIES, FAULT, READY = 0, 1, 2
MAX_WORDS = 2_000
_ERROR = re.compile(r"(\w+\.)*\w*(Error|Exception): \S")


class Network:
    """The script and the steps before and after it. ``batch``: tiles that go through it at once, always as many."""

    def __init__(self, facts: dict[str, Any], data: bytes) -> None:
        import torch

        with warnings.catch_warnings():  # torch says that another format is to come
            warnings.simplefilter("ignore")
            module = torch.jit.load(io.BytesIO(data), map_location="cpu")  # type: ignore[no-untyped-call]
        self._module: Any = module.eval()
        self._outputs, self._batch = int(facts["outputs"]), int(facts["batch"])
        self._size, self._filter = facts["transform"]["size"], facts["transform"]["interpolation"]
        self._mean, self._std = (
            torch.tensor(facts["transform"][name], dtype=torch.float32).view(1, 3, 1, 1) for name in ("mean", "std")
        )

    def answer(self, tiles: Any) -> bytes:
        """Tiles uint8[n, s, s, 3] -> float32[n, K] probabilities: softmax over classes, a sigmoid of a single one."""
        import numpy as np
        import torch

        images = [self._resize(tile) for tile in tiles]
        x = torch.zeros((self._batch, 3, *images[0].shape[:2]))
        x[: len(images)] = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)
        x[: len(images)] = x[: len(images)].div_(255).sub_(self._mean).div_(self._std)
        # The optimising executor computes its first batches otherwise than the later ones.
        with torch.no_grad(), torch.jit.optimized_execution(False):  # type: ignore[attr-defined]
            logits = self._module(x)
        if not isinstance(logits, torch.Tensor):
            raise ModelError(f"answers {type(logits).__name__}, not a tensor")
        if tuple(logits.shape) != (self._batch, self._outputs):
            names = f"{self._outputs} class{'es' * (self._outputs > 1)}"
            raise ModelError(f"answers {list(logits.shape)} for {self._batch} tiles, its config.json names {names}")
        chosen = logits[: len(images)].float()
        chances = chosen.softmax(1) if self._outputs > 1 else chosen.sigmoid()
        return bytes(chances.contiguous().numpy().tobytes())

    def _resize(self, tile: Any) -> Any:
        """The tile as torchvision's Resize makes it of a PIL image: a single number is the shorter side."""
        import numpy as np
        from PIL import Image

        if self._size is None:
            return tile
        height, width = self._size if len(self._size) == 2 else self._size * 2  # tiles are square
        filters = {"nearest": Image.Resampling.NEAREST, "bilinear": Image.Resampling.BILINEAR}
        chosen = filters.get(self._filter, Image.Resampling.BICUBIC)
        return np.asarray(Image.fromarray(tile).resize((width, height), chosen))


def read_script(facts: dict[str, Any]) -> bytes:
    """The file of a script, not opened otherwise. ModelError when it is another than the run was begun with."""
    with open(facts["script"], "rb") as file:
        data = file.read()
    if hashlib.sha256(data).hexdigest() != facts["sha256"]:
        raise ModelError("is not the file that the run was begun with")
    return data


def serve_channel(network: Network, source: int, sink: int) -> None:
    """Answer what comes over one channel until it is closed."""
    import numpy as np

    with os.fdopen(source, "rb") as ask, os.fdopen(sink, "wb") as answer:
        while head := ask.read(ASK.size):
            count, side = ASK.unpack(head)
            pixels = np.frombuffer(ask.read(count * side * side * 3), np.uint8).reshape(count, side, side, 3)
            try:
                send(answer, PROBABILITIES, network.answer(pixels))
            except Exception as error:  # noqa: BLE001  (a script raises whatever it likes)
                send(answer, FAULT, words_of(error))


def send(answer: io.BufferedWriter, status: int, data: bytes) -> None:
    """Write one answer."""
    answer.write(ANSWER.pack(status, len(data)) + data)
    answer.flush()


def words_of(error: BaseException) -> bytes:
    """An error as words: of torch's, which come with the source of the script, the line that says what is wrong."""
    if isinstance(error, ModelError):
        return str(error).encode()[:MAX_WORDS]
    named = [line for line in str(error).splitlines() if _ERROR.match(line)]
    words = named[-1] if named else f"{type(error).__name__}: {first_line(error)}"
    return f"raises {words.strip()}".encode()[:MAX_WORDS]


def main(facts: dict[str, Any]) -> None:
    """Bound and confine this process, load the script, say that it is ready, serve; end with the other end."""
    from wsi_mmm.model.confine import confine_process
    from wsi_mmm.model.convert_weights import limit_process

    import_module("PIL.Image")  # these start programs to find their libraries, so before that is prevented
    import_module("torch")
    limit_process(int(facts["memory"]), resource.getrlimit(resource.RLIMIT_CPU)[1], 0)
    first = facts["channels"][0][1]
    with os.fdopen(os.dup(first), "wb") as answer:
        try:
            data = read_script(facts)
            prevented = confine_process()
            network = Network(facts, data)
        except Exception as error:  # noqa: BLE001  (sent as words)
            send(answer, FAULT, words_of(error))
            return
        send(answer, READY, json.dumps(prevented).encode())
    for source, sink in facts["channels"]:
        threading.Thread(target=serve_channel, args=(network, source, sink), daemon=True).start()
    os.read(int(facts["lifeline"]), 1)  # comes back when the process that started this one is gone
    os._exit(0)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
