"""A model whose weights are the weighted mean of several of one shape (model soups, arXiv 2203.05482):

    python -m train.tools.average OUT MODEL=0.7 MODEL=0.3

Configuration, tokenizer, codec and encoder are the first model's. A model without separate latent weights is upcycled
first (see train.upcycling). A later stage forgets a little of earlier ones; a mean with an earlier stage recovers it
without training.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from omni.cli.arguments import exit_code
from omni.model import Omni
from omni.pretrained import from_pretrained
from train.attached import fingerprint
from train.upcycling import with_latent_weights


def average(models: Sequence[tuple[str, float]]) -> Omni:
    """The weighted mean of model directories; shares add up to 1. ValueError where shares or shapes do not fit."""
    total = sum(share for _, share in models)
    if len(models) < 2 or abs(total - 1) > 1e-6 or min(share for _, share in models) <= 0:
        raise ValueError(f"give at least two models with positive shares that add up to 1, got {list(models)}")
    members = [(path, from_pretrained(path), share) for path, share in models]
    result = from_pretrained(models[0][0])
    for path, member, _ in members:
        if (member.config.logit_cap, member.config.flow) != (result.config.logit_cap, result.config.flow):
            raise ValueError(f"{path} has another logit_cap or flow head than {models[0][0]}; average like with like")
        towers = [one.encoder and fingerprint(one.encoder) for one in (member, result)]
        if towers[0] != towers[1]:
            raise ValueError(f"{path} has another encoder than {models[0][0]}; average models with the same")
        kinds = [one.config.transformer.latent_weights for one in (member, result)]
        if kinds[0] not in ("shared", kinds[1]):
            raise ValueError(f"{path} has latent_weights = {kinds[0]!r} and {models[0][0]} {kinds[1]!r}; use the same")
    own = result.state_dict()
    loaded = [(path, with_latent_weights(member.state_dict(), own), share) for path, member, share in members]
    for path, weights, _ in loaded:
        odd = sorted(n for n in own.keys() | weights.keys() if n not in own or n not in weights)
        odd += sorted(n for n in own.keys() & weights.keys() if own[n].shape != weights[n].shape)
        if odd:
            raise ValueError(f"{path} does not fit {models[0][0]} in {odd[0]!r} ({len(odd)} weights)")
    result.load_state_dict({name: sum(share * weights[name] for _, weights, share in loaded) for name in own})
    return result


def main(arguments: Sequence[str]) -> int:
    def work() -> None:
        if len(arguments) < 3:
            raise ValueError("usage: python -m train.tools.average OUT MODEL=SHARE MODEL=SHARE ...")
        models = []
        for text in arguments[1:]:
            path, separator, share = text.rpartition("=")
            if not separator or not share.replace(".", "", 1).isdigit():
                raise ValueError(f"{text!r} is not of the form MODEL=SHARE, such as runs/a/model=0.7")
            models.append((path, float(share)))
        average(models).save_pretrained(Path(arguments[0]))

    return exit_code(work)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
