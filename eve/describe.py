"""What a recipe's model is: parameters, in all and activated, beside the published numbers; its layers.

    python -m eve.describe                   all recipes in one table
    python -m eve.describe RECIPE [section.key=value ...]      one, with its layers and stages

Nothing is allocated. Exit code 2 and one sentence for a mistake of the user.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from itertools import groupby

from eve.config import RECIPES, FeedForward, Model, Recipe, load_recipe
from eve.errors import UserError
from eve.model import count_parameters

# Millions of parameters of the encoder: (in all, activated, source). EVE publishes none: computed from its
# published layers; MoMo says two fifths of FLAVA's 241M.
PUBLISHED: dict[str, tuple[float | None, float | None, str]] = {
    "eve_base": (475, None, "from its layers"),
    "eve_large": (1330, None, "from its layers"),
    "vlmo_base": (175, None, "published"),
    "vlmo_base_plus": (167, None, "published"),
    "vlmo_large": (562, None, "published"),
    "vl_moe_base_32e": (1900, 180, "published"),
    "momo_base": (96, None, "2/5 of FLAVA's 241M"),
}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m eve.describe",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("recipe", nargs="?", help="name or path; all recipes without it")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    options = parser.parse_intermixed_args(arguments)
    try:
        if options.recipe is None:
            names = sorted(path.stem for path in RECIPES.glob("*.yaml"))
            print("\n".join(table([load_recipe(name) for name in names])))
            return 0
        recipe = load_recipe(options.recipe, options.overrides)
    except UserError as error:
        print(f"eve.describe: {error}", file=sys.stderr)
        return 2
    print("\n".join([*table([recipe]), "", *layers(recipe.model), "", *stages(recipe)]))
    return 0


def table(recipes: Sequence[Recipe]) -> list[str]:
    """One row for each: millions of parameters of the encoder in all, activated and published; those that one
    token multiplies with in the blocks; those of the heads."""
    lines = [
        "| recipe | encoder | activated | per token | heads | published | ours / published |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for recipe in recipes:
        count = count_parameters(recipe.model)
        total, activated, source = PUBLISHED.get(recipe.name, (None, None, ""))
        published = "" if total is None else f"{total:,.0f}"
        ratio = "" if total is None else f"{count.encoder / 1e6 / total:.3f}"
        if activated is not None:
            published += f", {activated:,.0f} activated"
            ratio += f", {count.activated / 1e6 / activated:.3f}"
        published += f" ({source})" if source else ""
        numbers = [count.encoder, count.activated, count.active, count.total - count.encoder]
        cells = [recipe.name, *(f"{number / 1e6:,.1f}" for number in numbers), published, ratio]
        lines.append("| " + " | ".join(cells) + " |")
    return [*lines, "", "Millions; activated: without the experts that no token of a pair chooses."]


def layers(model: Model) -> list[str]:
    """The feed-forward of each run of blocks that have the same."""
    lines = ["| blocks | router | experts | of them a token takes | capacity | auxiliary losses |"]
    lines.append("|---|---|---|---:|---|---|")
    blocks = range(model.depth)
    for feed_forward, run in groupby(blocks, key=model.feed_forward_of):
        numbers = list(run)
        span = f"{numbers[0]}" if len(numbers) == 1 else f"{numbers[0]} to {numbers[-1]}"
        lines.append("| " + " | ".join([span, *_describe(feed_forward)]) + " |")
    return lines


def _describe(feed_forward: FeedForward) -> list[str]:
    router = feed_forward.router
    if router != "topk":
        experts = {"shared": "1 for all", "modality": "image, text", "fusion": "image, text, pairs"}
        return [router, experts[router], "1", "", ""]
    pools = feed_forward.pools
    experts = f"{pools[0]}" if len(pools) == 1 else f"{pools[0]} image, {pools[1]} text"
    if feed_forward.fusion_expert:
        experts += "; pairs: 1 dense"
    factor = feed_forward.capacity_factor
    capacity = f"{factor:g}, {feed_forward.drop_order}" if factor else "all tokens kept"
    weights = {
        "balance": feed_forward.load_balance_weight,
        "z": feed_forward.z_loss_weight,
        "importance": feed_forward.importance_weight,
        "load": feed_forward.load_weight,
    }
    losses = []
    for name, weight in weights.items():
        if isinstance(weight, tuple):
            kinds = zip(("image", "text"), weight, strict=True)
            losses += [f"{name} {value:g} ({kind})" for kind, value in kinds if value]
        elif weight:
            losses.append(f"{name} {weight:g}")
    return [router, experts, f"{feed_forward.k}", capacity, ", ".join(losses)]


def stages(recipe: Recipe) -> list[str]:
    lines = ["| stage | steps | learning rate | gradients | streams (weight, objective, source, batch) |"]
    lines.append("|---|---:|---:|---|---|")
    for stage in recipe.stages:
        streams = [
            f"{stream.weight:g} {stream.objective} of {stream.source} "
            f"({recipe.data.sources[stream.source].batch_size:,})"
            for stream in stage.streams
        ]
        cells = [stage.name, f"{stage.steps:,}", f"{stage.lr:g}", stage.gradients, "; ".join(streams)]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


if __name__ == "__main__":
    sys.exit(main())
