"""What surgery leaves of single feed-forwards: plain, fitted, and trained alone.

    python benchmarks/surgery.py MODEL --data TEXT --layers 1,3,10 --passes 4 --cuts 0.3,0.5

Each layer reads what the dense model gives it, so the layers do not add up to a model; `convert`
does that. An eighth of the sequences is kept apart, and all figures are of them: the share of the
variance of the dense output that is lost, the mean error of a token relative to its own output, and
the zeros of Combined. Prints Markdown.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import linear

from turbosparse.hf.conversion import HELD_OUT
from turbosparse.hf.ffn_activation import combined
from turbosparse.hf.hub import model_folder
from turbosparse.hf.layerwise import Layerwise
from turbosparse.hf.reconstruct import reconstruct
from turbosparse.hf.surgery import FFN, fit, weights_of
from turbosparse.training.sample import sequences


@torch.no_grad()
def quality(
    wanted: Tensor,
    new: FFN,
    x: Tensor,
    *,
    cut: float = 0.0,
    level: float = 0.0,
    added: Tensor | float = 0.0,
) -> str:
    """Variance lost, relative error of a token, zeros.

    Gates up to `level`, or up to `cut` of their positive mean, are zero (FATReLU).
    """
    gate, up = (linear(x, weight).float() for weight in (new.gate, new.up))
    active = combined(gate, up, "drelu", level or cut * float(gate[gate > 0].mean()))
    error = linear(active.to(x.dtype), new.down).float() + added - wanted
    lost = float(error.square().sum() / (wanted - wanted.mean(0)).square().sum())
    relative = float((error.norm(dim=-1) / wanted.norm(dim=-1)).mean())
    return f"{lost:.3f} | {relative:.3f} | {float((active == 0).float().mean()):.1%}"


def compare(old: FFN, seen: Tensor, unseen: Tensor, args: argparse.Namespace) -> dict[str, str]:
    wanted = old.output(seen, "swiglu")
    fitted = fit(old, seen, wanted, round(args.widen * len(old.gate)))
    made = {"plain": old, "fitted": fitted}
    for passes in map(int, args.passes.split(",")):
        made[f"{passes} passes"] = last = reconstruct(fitted, seen, wanted, passes)
    made = {name: ffn.to(seen.dtype) for name, ffn in made.items()}
    truth, last = old.output(unseen, "swiglu"), last.to(seen.dtype)
    rows = {name: quality(truth, ffn, unseen) for name, ffn in made.items()}
    mean = (wanted - made["fitted"].output(seen, "drelu")).mean(0)
    rows["fitted, a bias"] = quality(truth, made["fitted"], unseen, added=mean)
    for cut in map(float, args.cuts.split(",")):
        rows[f"{passes} passes, gates cut at {cut:g}"] = quality(truth, last, unseen, cut=cut)
        first = fit(old, seen, wanted, len(fitted.gate), cut=cut)
        ffn = reconstruct(first, seen, wanted, passes, cut).to(seen.dtype)
        rows[f"{passes} passes with gates cut at {cut:g}"] = quality(truth, ffn, unseen, level=cut)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("model")
    parser.add_argument("--data", type=Path, required=True, action="append")
    parser.add_argument("--tokens", type=int, default=16_384)
    parser.add_argument("--layers", default="1,3")
    parser.add_argument("--passes", default="4", help="of training alone")
    parser.add_argument("--cuts", default="0.3,0.5", help="shares of the mean positive gate")
    parser.add_argument("--widen", type=float, default=1.0)
    args = parser.parse_args()
    layers = [int(number) for number in args.layers.split(",")]
    model = Layerwise(model_folder(args.model), activation="swiglu")
    ids = sequences(model.checkpoint.folder, model.config, args.data, args.tokens)
    held_out = torch.arange(len(ids)) % HELD_OUT == HELD_OUT - 1
    hidden = model.embed(ids)
    print("| layer | | variance lost | error of a token | zeros |\n|---|---|---|---|---|")
    began = time.process_time()
    for index in range(max(layers) + 1):
        shell = model.layer(index)
        with torch.no_grad():
            model.attend(shell, hidden)
            if index in layers:
                read = torch.cat([model.ffn_input(shell, part) for part in model.chunks(hidden)])
                seen, unseen = (read[which].flatten(0, 1) for which in (~held_out, held_out))
                (old,) = weights_of(shell.layers[0].mlp)
                for name, row in compare(old, seen, unseen, args).items():
                    print(f"| {index} | {name} | {row} |")
            model.feed_forward(shell, hidden)
    print(f"\n{ids.numel()} tokens, {time.process_time() - began:.0f} s of processor time")


if __name__ == "__main__":
    main()
