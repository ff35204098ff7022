"""The libraries that the speed suite compares with: transfusion-pytorch and transformers (extra `peers`).

Both are imported inside functions. They get their best documented settings for the comparison: no progress bar, no
guidance branch, the cache on, scaled-dot-product attention; and nothing of them is changed beyond that.
Shapes: text ids int64 (n,), latents float32 (rows, columns, C).
"""

from __future__ import annotations

import bisect
import functools
import importlib
import importlib.metadata
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

WAY_OUT = "install the extra: pip install 'omni-flow[peers]'"


def require(package: str) -> str:
    """The version of an installed peer. Raises ValueError with the way out when it is missing."""
    try:
        importlib.import_module(package)
        return importlib.metadata.version(package.replace("_", "-"))
    except ImportError as error:
        raise ValueError(
            f"the speed suite compares with {package}, which cannot be imported ({error}); {WAY_OUT}"
        ) from None


def num_parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


# ---- transfusion-pytorch ---------------------------------------------------------------------------------------------


EULER = {"method": "euler"}  # one evaluation a step
MIDPOINT = {"method": "midpoint", "atol": 1e-5, "rtol": 1e-5}  # the library's default: two evaluations a step


def build_transfusion(width: int, depth: int, vocab_size: int, channels: int, grid: tuple[int, int]) -> Any:
    """A Transfusion model of their defaults but the sizes."""
    require("transfusion_pytorch")
    from transfusion_pytorch import Transfusion, transfusion

    transfusion.logger.disable("transfusion_pytorch")
    transfusion.tqdm = functools.partial(transfusion.tqdm, disable=True)
    return Transfusion(
        num_text_tokens=vocab_size,
        dim_latent=channels,
        modality_default_shape=grid,
        transformer={"dim": width, "depth": depth, "dim_head": 64, "heads": max(1, round(width / 64))},
    )


def transfusion_of_size(target: int, depth: int, **options: Any) -> Any:
    """The Transfusion of this depth whose number of parameters is nearest to `target` (width a multiple of 8)."""
    sizes: dict[int, int] = {}

    def size(width: int) -> int:
        sizes[width] = num_parameters(build_transfusion(width, depth, **options))
        return sizes[width]

    bisect.bisect_left(range(64, 2048, 8), target, key=size)  # its probes close in on the target from both sides
    best = min(sizes, key=lambda width: abs(sizes[width] - target))
    return build_transfusion(best, depth, **options)


def transfusion_train_step(model: Any, samples: list[list[Tensor]]) -> Callable[[], None]:
    """Forward, backward, clip and AdamW on the samples, each a list of text ids and latents."""
    model.train()
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-4)

    def step() -> None:
        model([list(sample) for sample in samples]).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad()

    return step


def transfusion_draw(
    model: Any, prompt: Tensor, grid: tuple[int, int], steps: int, solver: dict[str, Any]
) -> dict[str, Callable[[], Any]]:
    """One image block after a text prompt, by each of its two samplers, with the cache and without guidance."""
    from transfusion_pytorch import transfusion

    model.eval()
    options = {
        "max_length": grid[0] * grid[1] - 1,  # end after the picture
        "force_modality_at_start": (0, grid),
        "modality_steps": steps + 1,  # points in time, one more than evaluations
        "cfg_scale": 1.0,
        "return_unprocessed_modalities": True,
    }
    odeint_fn = functools.partial(transfusion.odeint, **solver)

    def sample_one() -> None:
        model.odeint_fn = odeint_fn
        model.sample_one(prompt=prompt, cache_kv=True, **options)

    def sample_many() -> None:
        model.odeint_fn = odeint_fn
        model.sample_many([prompt], **options)

    return {"sample_one": sample_one, "sample_many": sample_many}


def count_calls(module: nn.Module, run: Callable[[], Any], has_input: Callable[[Tensor], bool]) -> int:
    """How many forward calls of `module` during `run` have a first argument that satisfies `has_input`."""
    calls = 0

    def note(_: nn.Module, inputs: tuple[Any, ...]) -> None:
        nonlocal calls
        calls += has_input(inputs[0])

    handle = module.register_forward_pre_hook(note)
    run()
    handle.remove()
    return calls


# ---- transformers ----------------------------------------------------------------------------------------------------


def build_llama(width: int, depth: int, heads: int, hidden: int, vocab_size: int, positions: int) -> Any:
    """A randomly initialised LlamaForCausalLM in evaluation mode, float32."""
    require("transformers")
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=width,
        intermediate_size=hidden,
        num_hidden_layers=depth,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        vocab_size=vocab_size,
        max_position_embeddings=positions,
        tie_word_embeddings=True,
        attn_implementation="sdpa",  # pyright: ignore[reportCallIssue]
    )
    return LlamaForCausalLM(config).eval()


def llama_decode(model: Any, prompt: Tensor, num_new: int) -> Callable[[], Tensor]:
    """Greedy decoding of exactly `num_new` tokens with the cache: transformers' own `generate`."""
    model.generation_config.eos_token_id = None
    mask = torch.ones_like(prompt)[None]

    def run() -> Tensor:
        with torch.inference_mode():
            out = model.generate(
                prompt[None],
                attention_mask=mask,
                max_new_tokens=num_new,
                do_sample=False,
                use_cache=True,
                pad_token_id=0,
            )
        assert out.shape == (1, len(prompt) + num_new), out.shape
        return out

    return run
