"""A model for another tokenizer: all other weights stay, and every text id gets a vector made from the old ids.

    python -m train.tools.retokenize OUT MODEL TOKENIZER [--pictures emoji_world]

An id whose text was one id of the old tokenizer keeps that id's vector; any other gets the mean of the vectors of the
old ids of its text. Control ids keep theirs. The joint-token head is left out: train it again. A short run with the new
tokenizer then trains the new vectors.

With `--pictures`, the id of a name whose picture is known gets a code of that picture too: its principal components.
So the map from code to latents is one function that all names train together; otherwise each name's vector has to learn
its own picture from a few dozen examples.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from omni.cli.arguments import exit_code
from omni.document import Image
from omni.model import Omni
from omni.pretrained import from_pretrained
from omni.rng import Key
from omni.text import Tokenizer, load_tokenizer
from omni.text.tokenizer import decode_bytes

CODE_DEVIATION = 0.08  # of a code's coordinates; a trained embedding's are about 0.09


def retokenize(model: Omni, tokenizer: Tokenizer, pictures: Mapping[str, Tensor] | None = None) -> Omni:
    """A new model with the weights of `model` and a vocabulary for `tokenizer`.

    pictures: uint8 (H, W, 3), all of one size, by name; the code of a name (see `picture_codes`) is added to its ids,
    with and without a space before it. ValueError for a model without a tokenizer.
    """
    old = model.tokenizer
    if old is None:
        raise ValueError("this model has no tokenizer; load it with omni.from_pretrained")
    rows = [_old_ids(old, tokenizer.bytes_of(token)) for token in range(tokenizer.num_text)]
    rows += [[token] for token in range(old.num_text, old.vocab_size)]
    config = model.config.model_copy(update={"vocab_size": tokenizer.vocab_size, "joint": None})
    result = Omni(config)
    own, saved = result.state_dict(), model.state_dict()
    for name, value in own.items():
        of_ids = name.startswith("token.")
        value.copy_(torch.stack([saved[name][ids].mean(0) for ids in rows]) if of_ids else saved[name])
    if pictures:
        codes = dict(zip(pictures, picture_codes(model, list(pictures.values())), strict=True))
        with torch.no_grad():
            for token in range(tokenizer.num_text):
                code = codes.get(decode_bytes(tokenizer.bytes_of(token)).removeprefix(" "))
                if code is not None:
                    result.token.embedding.weight[token] += code
    result.tokenizer, result.codec = tokenizer, model.codec
    result.preparation, result.defaults = model.preparation, model.defaults
    return result


def picture_codes(model: Omni, pictures: Sequence[Tensor]) -> Tensor:
    """(N, width) float32 codes of N uint8 (H, W, 3) pictures: principal components of their latents, in a random basis.

    A component's standard deviation enters by its square root, which keeps small ones visible. At most `width`
    components, and at most one per picture. Coordinates have standard deviation CODE_DEVIATION.
    """
    latents = torch.stack([block for [block] in model.encode_media([Image(pixels) for pixels in pictures])]).flatten(1)
    left, deviations, _ = torch.linalg.svd(latents - latents.mean(0), full_matrices=False)
    width = model.config.transformer.width
    codes = left[:, :width] * deviations[:width].sqrt()
    basis, _ = torch.linalg.qr(Key(0).fold("picture_codes").normal((width, width)))
    codes = codes @ basis[: codes.shape[1]]
    return codes * (CODE_DEVIATION / codes.std())


def emoji_pictures() -> dict[str, Tensor]:
    """Every name of the emoji world and its picture, large, on white."""
    from omni.data.emoji_world import Atlas
    from omni.data.emoji_world.scene import render, single

    atlas = Atlas()
    return {name: render(single(name), atlas) for name in atlas.names}


def _old_ids(old: Tokenizer, data: bytes) -> list[int]:
    """The old ids of `data`: of its text, or of each byte where it is not valid text."""
    text = decode_bytes(data)
    if text.encode("utf-8", "surrogatepass") == data:
        return old.encode(text)
    return [old.byte_id(byte) for byte in data]


def convert(out: str | Path, model: str, tokenizer: str, with_pictures: bool) -> None:
    """`retokenize` of a model directory and a tokenizer directory, to the model directory `out`."""
    pictures = emoji_pictures() if with_pictures else None
    retokenize(from_pretrained(model), load_tokenizer(tokenizer), pictures).save_pretrained(out)


def main(arguments: Sequence[str]) -> int:
    def work() -> None:
        if len(arguments) not in (3, 5) or arguments[3:] not in ([], ["--pictures", "emoji_world"]):
            raise ValueError("usage: python -m train.tools.retokenize OUT MODEL TOKENIZER [--pictures emoji_world]")
        convert(*arguments[:3], with_pictures=bool(arguments[3:]))

    return exit_code(work)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
