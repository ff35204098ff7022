"""The autoencoder classes without the rest of diffusers: equal results to the whole package, no other imports."""

from __future__ import annotations

import json
import logging
import subprocess
import sys

import pytest

pytest.importorskip("diffusers")

COMPARE = """
import sys, json, torch
sys.path.insert(0, "tests")
from omni.codecs import upstream
from omni.codecs.networks import decoded_pictures, encoded_latents, initialise
from omni.rng import Key
import importlib
found = {}
models = json.loads(sys.argv[1])
alone = {name: upstream.diffusers_class(name) for name in models}
left = [m for m in ("diffusers", "transformers", "accelerate", "torch._dynamo", "scipy", "sympy") if m in sys.modules]
whole = {name: upstream.whole_class(name) for name in models}
picture = Key(1).normal((1, 3, 16, 16))
for name, arguments in models.items():
    pair = []
    for family in (alone[name], whole[name]):
        module = family(**arguments).eval()
        initialise(module, Key(0))
        with torch.no_grad():
            latents = encoded_latents(module, picture)
            pair.append((list(module.state_dict()), latents, decoded_pictures(module, latents)))
    a, b = pair
    same = a[0] == b[0] and torch.equal(a[1], b[1]) and torch.equal(a[2], b[2])
    found[name] = [alone[name].__module__.split(".")[0], whole[name].__module__.split(".")[0], same]
print(json.dumps([left, found]))
"""


def test_the_classes_equal_those_of_the_whole_package() -> None:
    from eval.tasks.pretrained.autoencoders import TINY
    from omni.codecs.upstream import MODULES

    models = dict(TINY.values())
    assert models.keys() == MODULES.keys()
    done = subprocess.run(
        [sys.executable, "-c", COMPARE, json.dumps(models)], capture_output=True, text=True, check=True, timeout=300
    )
    left, found = json.loads(done.stdout.splitlines()[-1])
    assert left == [], "dragged in"
    assert found == {name: ["_omni_diffusers", "diffusers", True] for name in models}


def test_an_error_falls_back_to_the_whole_package(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    import diffusers

    from omni.codecs import upstream

    def broken(name: str) -> None:
        raise AttributeError("moved elsewhere")

    monkeypatch.setattr(upstream, "_import_alone", broken)
    monkeypatch.delitem(sys.modules, "diffusers")
    with caplog.at_level(logging.INFO, "omni"):
        found = upstream.diffusers_class("AutoencoderKL")
    assert found.__module__.startswith("diffusers.") and "moved elsewhere" in caplog.text
    monkeypatch.setitem(sys.modules, "diffusers", diffusers)
    assert upstream.diffusers_class("AutoencoderDC") is diffusers.AutoencoderDC  # imported already: its own


def test_a_placeholder_allows_inheritance_and_no_use() -> None:
    from omni.codecs.upstream import _Placeholder

    module = _Placeholder("x.loaders")
    mixin = module.SingleFileMixin
    assert mixin is module.SingleFileMixin and type("Model", (mixin,), {})() is not None
    with pytest.raises(RuntimeError, match=r"x\.loaders\.SingleFileMixin is left out"):
        mixin()


START = """
import sys, torch, omni
model = omni.from_pretrained()
assert model.codec.spec.channels == 64 and model.codec.grid(64, 64)
text = model.generate("hello", max_tokens=4).text
early = [m for m in HEAVY if m in sys.modules]
model.codec.decode(model.codec.encode(torch.zeros(1, 64, 64, 3, dtype=torch.uint8)))
print([early, [m for m in HEAVY if m in sys.modules], type(model.codec.module).__name__])
"""


def test_imports_of_a_reply() -> None:
    """Without a picture nothing of diffusers is imported; with one, only its own files."""
    heavy = ["_omni_diffusers", "diffusers", "transformers", "accelerate", "scipy", "sympy", "torch._dynamo"]
    code = START.replace("HEAVY", repr(heavy))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=300)
    assert done.stdout.splitlines()[-1] == "[[], ['_omni_diffusers'], 'AutoencoderDC']"
