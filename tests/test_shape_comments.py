"""Shape comments are true: each is compared with the arrays of real runs, and each is reached by one of them."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from models import CONFIGS, model
from shapes import Watcher, uncompared

from nanokv import cache, feedback, ops, transformer
from nanokv.feedback import FeedbackTransformer
from nanokv.transformer import Unobserved


class Everything(Unobserved):
    """An observer that wants what there is."""

    def wants(self, site: str) -> bool:
        return True


@pytest.fixture(scope="module")
def watchers() -> list[Watcher]:
    watched = []
    for config, new in [*((config, 4) for config in CONFIGS.values()), (CONFIGS["llama"], 1)]:
        small = model(config, ops="numpy")
        past = 3
        legend = {"T": new, "S": past + new, "L": config.n_layers, "H": config.n_heads, "G": config.n_kv_heads,
                  "hd": config.head_dim, "D": config.d_model, "F": config.d_ff, "V": config.vocab_size}  # fmt: skip
        watcher = Watcher((ops, transformer, cache), legend)
        filled = small.new_cache()
        small.forward(np.arange(past), filled)
        watcher.run(partial(small.forward, np.arange(new), filled, observer=Everything(), last_logits_only=new == 1))
        watched.append(watcher)
        fed, watcher = FeedbackTransformer.of(small), Watcher((feedback,), legend)
        filled = fed.new_cache()
        fed.forward(np.arange(past), filled)
        watcher.run(partial(fed.forward, np.arange(new), filled))
        watched.append(watcher)
    return watched


def test_every_shape_comment_is_true(watchers: list[Watcher]) -> None:
    assert [error for watcher in watchers for error in watcher.errors] == []


def test_every_shape_comment_is_reached_by_a_run(watchers: list[Watcher]) -> None:
    assert uncompared(watchers) == []


def test_a_wrong_shape_comment_is_found(tmp_path: Path) -> None:
    wrong = ModuleType("wrong")
    wrong.__file__ = str(tmp_path / "wrong.py")
    source = "import numpy as np\n\ndef double(x):\n    y = np.concatenate([x, x])  # [T, D]\n    return y\n"
    Path(wrong.__file__).write_text(source)
    exec(compile(source, wrong.__file__, "exec"), wrong.__dict__)
    watcher = Watcher((wrong,), {"T": 3, "D": 2})
    watcher.run(lambda: wrong.double(np.zeros((3, 2))))
    assert len(watcher.errors) == 1 and "y is [6, 2], not [T, D]" in watcher.errors[0]
