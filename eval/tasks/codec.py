"""Quality of the codec: PSNR of held-out scenes through the codec and through its quantised variant (FSQ)."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from pydantic import Field

from eval.metrics.emoji_judge import MAX_SHARP, calibrate
from eval.requests import atlas_of
from eval.task import Context, Measure, Outcome, Panel, TaskOptions, task
from omni.codecs import Codec, FsqCodec, load_codec, psnr
from omni.data.emoji_world import Atlas, Scene, random_scene, render
from omni.data.emoji_world.scene import scene_is_heldout, tone_is_heldout

MAX_PSNR = 100.0  # replaces the infinite PSNR of equal pictures


TRAIN_HINT = "train it with `python -m train train/recipes/bundled/codec_fsq.toml`"


class CodecOptions(TaskOptions):
    """codec: a codec directory (none: the model's own). fsq: the directory of the quantised codec to compare."""

    pictures: int = Field(default=500, ge=1)
    codec: str | None = None
    fsq: str | None = None


def reconstruct(codec: Codec, pictures: torch.Tensor) -> torch.Tensor:
    """uint8 (B, H, W, 3) through the codec and back."""
    return torch.cat([codec.decode(codec.encode(chunk)) for chunk in pictures.split(64)])


ROWS = ("psnr", "psnr_unseen", "psnr_pooled", "psnr_worst_5", "psnr_fsq", "fsq_price", "sharp_threshold")


def is_unseen(scene: Scene, atlas: Atlas) -> bool:
    """Whether training never has the scene: a held-out pair or skin tone. A single emoji is in both splits."""
    return scene_is_heldout(scene) or any(name in atlas.tones and tone_is_heldout(name) for name in scene.names)


@task("codec", CodecOptions, rows=ROWS)
def codec_quality(context: Context, options: CodecOptions) -> Outcome:
    """PSNR of held-out scenes through the codec, and through the same encoder quantised at equal sequence length."""
    atlas, key = atlas_of(context), context.key("codec")
    codec = context.model.codec if options.codec is None else load_codec(options.codec)
    scenes = [random_scene(key.fold(i), atlas, "heldout") for i in range(options.pictures)]
    true = torch.stack([render(scene, atlas) for scene in scenes])
    unseen = torch.tensor([is_unseen(scene, atlas) for scene in scenes])
    back = reconstruct(codec, true)
    values = psnr(true, back).clamp_max(MAX_PSNR)
    pooled = 10 * math.log10(255.0**2 / max(float((true.float() - back.float()).square().mean()), 1e-6))
    rows, columns = codec.grid(*true.shape[1:3])
    notes = [
        f"{codec.spec.name}: {rows} x {columns} positions, {codec.spec.channels} channels; {len(true)} held-out scenes",
        f"psnr: mean over pictures; psnr_unseen: over the {int(unseen.sum())} that training never has; "
        "psnr_pooled: of the mean squared error; psnr_worst_5: 5th percentile of pictures",
    ]
    sharp = max(calibrate(lambda x: reconstruct(codec, x), atlas, key).values())
    measures = [
        Measure("psnr", float(values.mean()), "dB"),
        Measure("psnr_unseen", float(values[unseen].mean()), "dB"),
        Measure("psnr_pooled", pooled, "dB"),
        Measure("psnr_worst_5", float(values.quantile(0.05)), "dB"),
        Measure("sharp_threshold", sharp, f"of {MAX_SHARP:g} levels at most"),
    ]
    answers = [back]
    if options.fsq is not None and Path(options.fsq).is_dir():
        quantised = load_codec(options.fsq)
        assert quantised.grid(*true.shape[1:3]) == (rows, columns), "the quantised codec has another sequence length"
        answers.append(reconstruct(quantised, true))
        other = psnr(true, answers[-1]).clamp_max(MAX_PSNR)
        measures.append(Measure("psnr_fsq", float(other.mean()), "dB"))
        measures.append(Measure("fsq_price", float(values.mean() - other.mean()), "dB"))
        codes = f", {quantised.quantiser.num_codes:,} codes" if isinstance(quantised, FsqCodec) else ""
        notes.append(f"compared with {quantised.spec.name} at the same {rows} x {columns} positions{codes}")
    elif options.fsq is not None:
        notes.append(f"no quantised codec at {options.fsq}; {TRAIN_HINT}")
    order = values.argsort()[:60].tolist()
    names = "answers: " + ", ".join(["codec", "fsq"][: len(answers)])
    panels = [Panel(f"{values[i]:.1f} dB", (true[i],), [a[i] for a in answers], names) for i in order]
    return Outcome(measures, panels, notes=notes)
