"""The command line: `pyvlm demo | train | recipes | eval | chat | export | moe-report | data | budget | …`.

A mistake of the user's is one line on stderr and exit code 2. What a command needs is imported when it runs,
so that `pyvlm --help` is quick.
"""

import argparse
import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from pyvlm._tell import tell
from pyvlm.commands import (
    run_ablate,
    run_budget,
    run_chat,
    run_data_check,
    run_data_show,
    run_demo,
    run_env,
    run_eval,
    run_export,
    run_moe_report,
    run_recipes,
    run_show,
    run_train,
)

DEMO_FOLDER = "runs/demo"
GOES_ON = "; the same command goes on from the last checkpoint"


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command and returns the exit code: 0, 2 for a mistake of the user's, 130 where interrupted."""
    options = parse(arguments)
    try:
        options.run(options)
        sys.stdout.flush()
    except ValueError as error:
        tell(" ".join(str(error).split()))
        return 2
    except BrokenPipeError:  # whoever reads the output, as `head`, has enough of it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except KeyboardInterrupt:
        print(f"\npyvlm: interrupted{options.after_interrupt}", file=sys.stderr)
        return 130
    return 0


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The options of one command line."""
    parser = build_parser()
    options, rest = parser.parse_known_args(arguments)
    # Until Python 3.13 argparse takes a second, optional argument for absent where options stand before it.
    absent = [("question", str), ("data", Path), *([("recipe", str)] if options.run is run_train else [])]
    for name, kind in absent:
        if len(rest) == 1 and not rest[0].startswith("-") and getattr(options, name, "") is None:
            setattr(options, name, kind(rest.pop()))
    if rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    return options


def build_parser() -> argparse.ArgumentParser:
    """The parser; each sub-command puts its function under `run`."""
    parser = argparse.ArgumentParser(prog="pyvlm", description="Fast, exact vision-language models.")
    parser.set_defaults(after_interrupt="")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    demo = commands.add_parser("demo", help="train a small model on digits, evaluate it, write a report")
    demo.add_argument("--quick", action="store_true", help="under a minute: shows the way, not the accuracy")
    demo.add_argument("--seed", type=_natural, default=0, help="of the weights and the dialogues (default 0)")
    demo.add_argument(
        "--out", type=Path, default=Path(DEMO_FOLDER), help=f"run folder (default {DEMO_FOLDER})"
    )
    demo.set_defaults(run=run_demo, after_interrupt=GOES_ON)

    train = commands.add_parser("train", help="train a recipe, from its last checkpoint where there is one")
    _add_recipe(train, optional=True)
    train.add_argument("--out", type=Path, help="run folder (default runs/ and the recipe's name)")
    train.set_defaults(run=run_train, after_interrupt=GOES_ON)

    recipes = commands.add_parser("recipes", help="the recipes that pyvlm ships, or all of one of them")
    recipes.set_defaults(run=run_recipes)
    show = recipes.add_subparsers(metavar="show").add_parser(
        "show", help="resolved configuration, stages, parameters"
    )
    _add_recipe(show)
    show.set_defaults(run=run_show)

    evaluate = commands.add_parser("eval", help="how many questions a model answers right, by their kind")
    evaluate.add_argument("model", metavar="MODEL", type=Path, help="a run folder or a saved model")
    evaluate.add_argument(
        "data",
        metavar="DATA",
        type=Path,
        nargs="?",
        help="a file of VQA records or conversations, .json or .jsonl; left out: held-out digits",
    )
    evaluate.add_argument("--json", type=Path, metavar="FILE", help="write the table as JSON")
    evaluate.add_argument("--dialogues", type=_positive, help="about digits, how many (default 400)")
    evaluate.add_argument("--seed", type=_natural, help="of the dialogues about digits (default 0)")
    file = evaluate.add_argument_group("with DATA")
    file.add_argument("--limit", type=_positive, help="at most so many questions")
    file.add_argument("--batch-size", type=_positive, default=16, help="questions at a time (default 16)")
    file.add_argument("--max-new-tokens", type=_positive, default=64, help="of an answer (default 64)")
    file.add_argument("--instruction", default="", metavar="TEXT", help="a line behind every question")
    file.add_argument("--predictions", type=Path, metavar="FILE", help="write each answer as a line of JSON")
    file.add_argument("--strict", action="store_true", help="stop at the first bad record, do not skip it")
    evaluate.add_argument("--device", default="cpu", help="where to compute, as torch names it (default cpu)")
    evaluate.set_defaults(run=run_eval)

    chat = commands.add_parser("chat", help="ask about pictures on disk, or about none")
    chat.add_argument("model", metavar="MODEL", type=Path, help="a run folder or a saved model")
    chat.add_argument("question", nargs="?", help="left out: several rounds, one question a line; see /help")
    chat.add_argument("--image", action="append", default=[], metavar="FILE", help="give it once a picture")
    chat.add_argument("--system", metavar="TEXT", help="the message that the conversation begins with")
    chat.add_argument("--temperature", type=float, default=0.0, help="0 (default): the likeliest word always")
    chat.add_argument("--top-p", type=float, default=1.0, help="draw among words of this share (default 1)")
    chat.add_argument("--max-new-tokens", type=_positive, default=256, help="of an answer (default 256)")
    chat.add_argument("--seed", type=_natural, default=0, help="of what is drawn (default 0)")
    chat.add_argument("--device", default="cpu", help="where to compute, as torch names it (default cpu)")
    chat.set_defaults(run=run_chat)

    export = commands.add_parser("export", help="write a model as a checkpoint of transformers")
    export.add_argument("model", metavar="MODEL", type=Path, help="a run folder or a saved model")
    export.add_argument("out", metavar="OUT", type=Path, help="a new folder for the checkpoint")
    export.add_argument("--to", choices=["llava"], default="llava", help="LLaVA, or LLaVA-NeXT with tiles")
    export.add_argument(
        "--from",
        dest="checkpoint",
        metavar="CHECKPOINT",
        help="what its training began with: layers that no answer depends on are written as they are there",
    )
    export.add_argument(
        "--dtype", choices=["float32", "bfloat16", "float16"], help="of the weights (default: the model's)"
    )
    export.set_defaults(run=run_export)

    moe = commands.add_parser("moe-report", help="how busy each expert is, and the pathways tokens take")
    moe.add_argument("model", metavar="MODEL", type=Path, help="a run folder or a saved model")
    moe.add_argument("data", metavar="DATA", help="a data file, or a recipe: its held-out ones")
    moe.add_argument("--dialogues", type=_positive, default=400, help="at most so many (default 400)")
    moe.add_argument("--top", type=_positive, default=10, help="pathways to show (default 10)")
    moe.add_argument("--json", type=Path, metavar="FILE", help="write all of it as JSON")
    moe.add_argument("--png", type=Path, metavar="FILE", help="write a picture of it")
    moe.set_defaults(run=run_moe_report)

    _add_data_commands(commands.add_parser("data", help="look at training data: one record, or a whole file"))

    budget = commands.add_parser("budget", help="parameters, FLOPs, memory and hours of a recipe, untrained")
    _add_recipe(budget)
    budget.add_argument(
        "--batch", type=_positive, default=1, help="rows of the forward pass shown (default 1)"
    )
    budget.add_argument("--length", type=_positive, help="tokens a row; given, of the stages' batches too")
    budget.add_argument("--images", type=_natural, help="images a row (default 1); the same holds")
    budget.add_argument(
        "--image-size",
        type=_image_size,
        metavar="HEIGHTxWIDTH",
        help="of a model with tiling, what images are taken to be (default 480x640)",
    )
    budget.add_argument(
        "--flops-per-second", type=_rate, metavar="RATE", help="such as 4e14 (default: measured here)"
    )
    budget.add_argument("--price-per-hour", type=_rate, metavar="PRICE", help="of a machine of that rate")
    budget.add_argument("--json", type=Path, metavar="FILE", help="write all of it as JSON")
    budget.set_defaults(run=run_budget)

    ablate = commands.add_parser("ablate", help="train variants of a recipe at equal compute, several seeds")
    _add_recipe(ablate)
    ablate.add_argument(
        "--vary",
        action="append",
        required=True,
        metavar="KEY=VALUE,VALUE",
        help="connector, mask, tower or a dotted path of the recipe; several: all combinations",
    )
    ablate.add_argument(
        "--budget", type=_rate, metavar="FLOPS", help="of training, a run (default: the recipe's own)"
    )
    ablate.add_argument("--seeds", type=_positive, default=3, help="runs of each variant (default 3)")
    ablate.add_argument("--looks", type=_positive, default=8, help="at held-out accuracy, a run (default 8)")
    ablate.add_argument("--out", type=Path, default=Path("runs/ablate"), help="folder (default runs/ablate)")
    ablate.set_defaults(run=run_ablate)

    env = commands.add_parser("env", help="versions, instruction sets and backends")
    env.set_defaults(run=run_env)
    return parser


def _add_data_commands(data: argparse.ArgumentParser) -> None:
    commands = data.add_subparsers(required=True, metavar="COMMAND")
    show = commands.add_parser("show", help="one record as text, tokens, labels and mask")
    check = commands.add_parser("check", help="counts, lengths, and the records that are bad")
    for parser in (show, check):
        parser.add_argument("data", metavar="DATA", help=".json, .jsonl, .parquet, or a folder of a table")
        whose = parser.add_mutually_exclusive_group()
        whose.add_argument("--model", type=Path, metavar="FOLDER", help="tokens as this model takes them")
        whose.add_argument("--recipe", metavar="RECIPE", help="tokens as the model of this recipe takes them")
        parser.add_argument("--images", metavar="FOLDER", help="that image paths are relative to")
        parser.add_argument("--max-length", type=_positive, metavar="N", help="cut to so many tokens")
        of_recipe = parser.add_argument_group("with --recipe")
        of_recipe.add_argument("--stage", metavar="NAME", help="as this stage has them: form, size of images")
        _add_changes(of_recipe)
        parser.set_defaults(learn_from=[])  # what is looked at is DATA
    show.add_argument("--index", type=_natural, default=0, metavar="N", help="which record (default 0)")
    show.add_argument("--png", type=Path, metavar="FILE", help="write a picture of the mask")
    show.set_defaults(run=run_data_show)
    check.add_argument("--decode", action="store_true", help="decode every image as well")
    check.add_argument("--strict", action="store_true", help="exit with 2 where a record is bad")
    check.set_defaults(run=run_data_check)


def _add_recipe(parser: argparse.ArgumentParser, optional: bool = False) -> None:
    """The recipe that a command is about, and what of it is to be another."""
    parser.add_argument(
        "recipe",
        metavar="RECIPE",
        nargs="?" if optional else None,
        help="a YAML file, or the name of a shipped recipe"
        + ("; with --from: LLaVA's own" if optional else ""),
    )
    parser.add_argument(
        "--data",
        dest="learn_from",
        metavar="[STAGE=]PATH",
        action="append",
        default=[],
        help="conversations to learn from; once a stage, or for all stages",
    )
    _add_changes(parser)


def _add_changes(parser: argparse._ActionsContainer) -> None:
    """What of a recipe is to be another, whatever it learns from."""
    variant = parser.add_mutually_exclusive_group()
    variant.add_argument("--variant", help="an entry of the recipe's variants")
    variant.add_argument(
        "--tiny",
        dest="variant",
        action="store_const",
        const="tiny",
        help="its variant tiny: small random parts, bundled data, seconds on two cores",
    )
    parser.add_argument(
        "--from",
        dest="checkpoint",
        metavar="CHECKPOINT",
        help="a LLaVA of transformers that all parts start from: a folder, or OWNER/NAME of the hub",
    )
    parser.add_argument("--lm", metavar="FOLDER", help="of transformers: what the language model starts from")
    parser.add_argument(
        "--vision",
        metavar="[NAME=]FOLDER",
        action="append",
        default=[],
        help="of transformers: what a vision tower starts from; once a tower",
    )
    parser.add_argument(
        "--set",
        metavar="KEY=VALUE",
        action="append",
        default=[],
        help="any key of the recipe, as in stages.align.batch_size=64",
    )
    parser.add_argument("--seed", type=_natural, help="in place of the recipe's")


def _natural(text: str) -> int:
    return _at_least(text, 0)


def _positive(text: str) -> int:
    return _at_least(text, 1)


def _rate(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"expected a number above 0, got {text!r}")
    return number


def _image_size(text: str) -> tuple[int, int]:
    height, _, width = text.partition("x")
    if not (height.isdecimal() and width.isdecimal() and int(height) and int(width)):
        raise argparse.ArgumentTypeError(f"expected height x width in pixels, such as 480x640, got {text!r}")
    return int(height), int(width)


def _at_least(text: str, least: int) -> int:
    number = int(text) if text.isdecimal() else -1
    if number < least:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least {least}, got {text!r}")
    return number


if __name__ == "__main__":
    sys.exit(main())
