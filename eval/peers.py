"""The libraries that the speed suite compares with: transfusion-pytorch and transformers (extra `peers`).

Both are imported inside functions. Networks and losses have the libraries' defaults. Each runs with its fastest
settings that compute the same result, as measured on the CPU (one thread, float32, torch 2.13):

    transfusion-pytorch   Attention by its own softmax: it uses FlexAttention on CUDA alone. `modality_processing` at
                          its default "auto", which times its strategies on the first batch (here they are within 2 %
                          of each other). Compiled: attention and feed-forward of each layer by `Module.compile`, 1.11
                          times faster; with the attention over layers compiled too 1.09. It pads samples to the
                          longest; here all are equally long. bfloat16: torch.autocast.
    transformers          Attention by scaled_dot_product_attention. Caches: dynamic, static, and static with compiled
                          steps by `generate`'s own CompileConfig: 6.9 ms a token for the 8 M model, where
                          torch.compile of `forward` takes 7.2 and frozen weights 7.3. bfloat16: the model's dtype.

Progress bars are off, there is no guidance branch, the cache is on. Nothing else is changed.
Shapes: text ids int64 (n,), latents float32 (rows, columns, C).
"""

from __future__ import annotations

import bisect
import contextlib
import copy
import functools
import importlib
import importlib.metadata
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

WAY_OUT = "install the extra: pip install 'omni-flow[peers]'"
MAX_VARIANTS = 64  # of one compiled function: every kind of layer, every shape, dtype and mode
Sample = list[Tensor]  # text ids and latents, in order


def require(package: str) -> str:
    """The version of an installed library. Raises ValueError with the remedy where it is missing."""
    try:
        importlib.import_module(package)
        return importlib.metadata.version(package.replace("_", "-"))
    except ImportError as error:
        raise ValueError(
            f"the speed suite compares with {package}, which cannot be imported ({error}); {WAY_OUT}"
        ) from None


def version_of(package: str) -> str:
    """The version of an installed library, which is not imported. ValueError where it is missing."""
    try:
        return importlib.metadata.version(package)
    except ImportError:
        raise ValueError(f"this task compares with {package}, which is not installed; pip install {package}") from None


def num_parameters(module: nn.Module) -> int:
    """Numbers in all parameters of a module."""
    return sum(p.numel() for p in module.parameters())


# ---- transfusion-pytorch ---------------------------------------------------------------------------------------------


EULER = {"method": "euler"}  # one evaluation a step
MIDPOINT = {"method": "midpoint", "atol": 1e-5, "rtol": 1e-5}  # the library's default: two evaluations a step


def build_transfusion(width: int, depth: int, vocab_size: int, channels: int, grid: tuple[int, int]) -> Any:
    """A Transfusion model with the library's defaults, except for the sizes."""
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

    bisect.bisect_left(range(16, 2048, 8), target, key=size)  # evaluates sizes on both sides of the target
    best = min(sizes, key=lambda width: abs(sizes[width] - target))
    return build_transfusion(best, depth, **options)


def compile_transfusion(model: Any) -> None:
    """torch.compile, as the head of this file describes; compilation happens at the first call."""
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, MAX_VARIANTS)  # type: ignore[attr-defined]
    for _, attention, feed_forward, _ in model.transformer.layers:
        for module in (attention, feed_forward):
            module.compile(dynamic=False)


def transfusion_loss(model: Any, samples: list[Sample]) -> Callable[[], Tensor]:
    """The training loss of the samples, each a list of text ids and latents, as one call."""
    model.train()
    return lambda: model([list(sample) for sample in samples])


def transfusion_draw(
    model: Any, prompt: Tensor, grid: tuple[int, int], steps: int, solver: dict[str, Any], dtype: torch.dtype
) -> dict[str, Callable[[], Any]]:
    """One image block after a text prompt, by each of the library's two samplers, with the cache, without guidance.

    dtype: bfloat16 is by autocast; with bfloat16 weights the library does not run (float32 noise and times)."""
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
        with autocast(dtype):
            model.sample_one(prompt=prompt, cache_kv=True, **options)

    def sample_many() -> None:
        model.odeint_fn = odeint_fn
        with autocast(dtype):
            model.sample_many([prompt], **options)

    return {"sample_one": sample_one, "sample_many": sample_many}


def autocast(dtype: torch.dtype, keep_casts: bool = True) -> Any:
    """A context in which float32 modules compute in `dtype` on the CPU. keep_casts: cast weights once, not at every
    use."""
    return torch.autocast("cpu", dtype, enabled=dtype != torch.float32, cache_enabled=keep_casts)


@contextlib.contextmanager
def inputs_of(module: nn.Module) -> Iterator[list[torch.Size]]:
    """Record the shape of the first argument of each forward call of `module` inside the context."""
    shapes: list[torch.Size] = []
    handle = module.register_forward_pre_hook(lambda _, inputs: shapes.append(inputs[0].shape))
    try:
        yield shapes
    finally:
        handle.remove()


# ---- transformers ----------------------------------------------------------------------------------------------------


def quiet_transformers() -> None:
    """No progress bars and no warnings of transformers."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()


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


def with_compiled_forward(model: Any) -> Any:
    """A model of the same weights with a compiled forward pass, for the prompt too."""
    compiled = copy.copy(model)
    compiled.forward = torch.compile(model.forward, dynamic=False)
    return compiled


def llama_decode(model: Any, prompts: Tensor, num_new: int, cache: str = "dynamic") -> Callable[[], Tensor]:
    """Greedy decoding of exactly `num_new` tokens after each prompt (R, n): transformers' own `generate`.

    cache: "dynamic", "static", or "compiled": static, with compiled steps after the prompt."""
    model.generation_config.eos_token_id = None
    options: dict[str, Any] = {} if cache == "dynamic" else {"cache_implementation": "static"}
    if cache == "compiled":
        from transformers import CompileConfig

        options["compile_config"] = CompileConfig(mode="default")
        options["compile_config"]._compile_all_devices = True  # without it transformers does not compile on the CPU
    mask = torch.ones_like(prompts)

    def run() -> Tensor:
        with torch.inference_mode():
            out = model.generate(
                prompts,
                attention_mask=mask,
                max_new_tokens=num_new,
                do_sample=False,
                use_cache=True,
                pad_token_id=0,
                **options,
            )
        assert out.shape == (len(prompts), prompts.shape[1] + num_new), out.shape
        return out

    return run


def load_gguf(gguf: Path) -> tuple[Any, Any]:
    """(tokenizer, model in float32 and evaluation mode) of a GGUF file, as transformers reads them."""
    require("transformers")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    place = {"gguf_file": gguf.name, "local_files_only": True}
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, **place)
    return tokenizer, AutoModelForCausalLM.from_pretrained(gguf.parent, dtype=torch.float32, **place).eval()


def load_causal(folder: Path, dtype: torch.dtype) -> Any:
    """A causal language model of a folder, in evaluation mode."""
    require("transformers")
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, local_files_only=True).eval()


def load_folder(folder: Path, dtype: torch.dtype) -> tuple[Any, Any]:
    """(tokenizer, model in evaluation mode) of a published folder."""
    require("transformers")
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder, local_files_only=True), load_causal(folder, dtype)


def greedy_replies(
    tokenizer: Any, model: Any, prompts: Sequence[str], num_new: int
) -> list[tuple[list[int], list[int], str]]:
    """(prompt ids, reply ids, reply text), greedily, through the chat template."""
    found = []
    for prompt in prompts:
        turns = [{"role": "user", "content": prompt}]
        ids = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_tensors="pt", return_dict=False)
        with torch.inference_mode():
            new = model.generate(ids, max_new_tokens=num_new, do_sample=False)[0, ids.shape[1] :]
        found.append((ids[0].tolist(), new.tolist(), tokenizer.decode(new, skip_special_tokens=True)))
    return found
