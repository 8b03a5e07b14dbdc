"""The command line: `pyvlm demo | train | eval | chat | moe-report | budget | ablate | env`.

A mistake of the user's is one line on stderr and exit code 2. What a command needs is imported when it runs,
so that `pyvlm --help` is quick.
"""

import argparse
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

DEMO_FOLDER = "runs/demo"


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command and returns the exit code: 0, 2 for a mistake of the user's, 130 where interrupted."""
    options = parse(arguments)
    try:
        options.run(options)
    except ValueError as error:
        print(f"pyvlm: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\npyvlm: interrupted; the same command goes on from the last checkpoint", file=sys.stderr)
        return 130
    return 0


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The options of one command line."""
    parser = build_parser()
    options, rest = parser.parse_known_args(arguments)
    # Until Python 3.13 argparse takes chat's question for absent where options stand between it and MODEL.
    if len(rest) == 1 and not rest[0].startswith("-") and getattr(options, "question", "") is None:
        options.question = rest.pop()
    if rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    return options


def build_parser() -> argparse.ArgumentParser:
    """The parser; each sub-command puts its function under `run`."""
    parser = argparse.ArgumentParser(prog="pyvlm", description="Fast, exact vision-language models.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    demo = commands.add_parser("demo", help="train a small model on digits, evaluate it, write a report")
    demo.add_argument("--quick", action="store_true", help="under a minute: shows the way, not the accuracy")
    demo.add_argument("--seed", type=_natural, default=0, help="of the weights and the dialogues (default 0)")
    demo.add_argument(
        "--out", type=Path, default=Path(DEMO_FOLDER), help=f"run folder (default {DEMO_FOLDER})"
    )
    demo.set_defaults(run=run_demo)

    train = commands.add_parser("train", help="train a recipe, from its last checkpoint where there is one")
    train.add_argument("recipe", metavar="RECIPE", help="a YAML file, or the name of a shipped recipe")
    train.add_argument("--variant", help="an entry of the recipe's variants")
    train.add_argument("--seed", type=_natural, help="in place of the recipe's")
    train.add_argument("--out", type=Path, help="run folder (default runs/ and the recipe's name)")
    train.set_defaults(run=run_train)

    evaluate = commands.add_parser("eval", help="accuracy on held-out digits by kind of question")
    evaluate.add_argument("model", metavar="MODEL", type=Path, help="a run folder or a saved model")
    evaluate.add_argument("--dialogues", type=_positive, default=400, help="how many (default 400)")
    evaluate.add_argument("--seed", type=_natural, default=0, help="of the dialogues (default 0)")
    evaluate.set_defaults(run=run_eval)

    chat = commands.add_parser("chat", help="ask about pictures on disk")
    chat.add_argument("model", metavar="MODEL", type=Path, help="a run folder or a saved model")
    chat.add_argument("question", nargs="?", help="left out: several rounds, one question a line")
    chat.add_argument("--image", action="append", default=[], metavar="FILE", help="give it once a picture")
    chat.set_defaults(run=run_chat)

    moe = commands.add_parser("moe-report", help="how busy each expert is, and the pathways tokens take")
    moe.add_argument("model", metavar="MODEL", type=Path, help="a run folder or a saved model")
    moe.add_argument("data", metavar="DATA", help="conversations as .jsonl, or a recipe: its held-out ones")
    moe.add_argument("--dialogues", type=_positive, default=400, help="at most so many (default 400)")
    moe.add_argument("--top", type=_positive, default=10, help="pathways to show (default 10)")
    moe.add_argument("--json", type=Path, metavar="FILE", help="write all of it as JSON")
    moe.add_argument("--png", type=Path, metavar="FILE", help="write a picture of it")
    moe.set_defaults(run=run_moe_report)

    budget = commands.add_parser("budget", help="parameters, FLOPs, memory and hours of a recipe, untrained")
    budget.add_argument("recipe", metavar="RECIPE", help="a YAML file, or the name of a shipped recipe")
    budget.add_argument("--variant", help="an entry of the recipe's variants")
    budget.add_argument(
        "--batch", type=_positive, default=1, help="rows of the forward pass shown (default 1)"
    )
    budget.add_argument("--length", type=_positive, help="tokens a row; given, of the stages' batches too")
    budget.add_argument("--images", type=_natural, help="images a row (default 1); the same holds")
    budget.add_argument(
        "--flops-per-second", type=_rate, metavar="RATE", help="such as 4e14 (default: measured here)"
    )
    budget.add_argument("--price-per-hour", type=_rate, metavar="PRICE", help="of a machine of that rate")
    budget.add_argument("--json", type=Path, metavar="FILE", help="write all of it as JSON")
    budget.set_defaults(run=run_budget)

    ablate = commands.add_parser("ablate", help="train variants of a recipe at equal compute, several seeds")
    ablate.add_argument("recipe", metavar="RECIPE", help="a YAML file, or the name of a shipped recipe")
    ablate.add_argument("--variant", help="an entry of the recipe's variants")
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


def run_demo(options: argparse.Namespace) -> None:
    from pyvlm.training import demo
    from pyvlm.training.recipe import load_recipe

    recipe = load_recipe("demo", "quick" if options.quick else None, seed=options.seed)
    demo.run_demo(recipe, options.out)


def run_train(options: argparse.Namespace) -> None:
    from pyvlm.training.recipe import load_recipe
    from pyvlm.training.trainer import train

    overrides = {} if options.seed is None else {"seed": options.seed}
    recipe = load_recipe(options.recipe, options.variant, **overrides)
    out = options.out or Path("runs") / recipe.name
    train(recipe, out)
    print(f"model: {out / 'model'}")


def run_eval(options: argparse.Namespace) -> None:
    from pyvlm.training.chat import load_model
    from pyvlm.training.demo import format_table
    from pyvlm.training.digits import DigitDialogues, DigitsConfig
    from pyvlm.training.evaluate import accuracy_table, commonest_answers, evaluate

    model, processor = load_model(options.model)
    data = DigitsConfig()
    dialogues = DigitDialogues("test", data, options.seed).batch(0, range(options.dialogues))
    table = accuracy_table(evaluate(model, processor, dialogues), commonest_answers(data, options.seed))
    print(format_table(table))


def run_chat(options: argparse.Namespace) -> None:
    from pyvlm.training.chat import Chat, load_model

    if not options.image:
        raise ValueError("chat needs at least one picture: give --image FILE, once a picture")
    model, processor = load_model(options.model)
    chat = Chat(model, processor, options.image, tell=lambda line: print(f"pyvlm: {line}", file=sys.stderr))
    chat.interact([options.question] if options.question else _typed_questions(), say=print)


def run_moe_report(options: argparse.Namespace) -> None:
    from pyvlm.training.chat import load_model
    from pyvlm.training.moe_chart import write_png
    from pyvlm.training.moe_report import format_report, report_experts, write_json
    from pyvlm.training.samples import read_samples

    for path in (options.json, options.png):
        if path is not None and not path.parent.is_dir():
            raise ValueError(f"{path}: there is no folder {path.parent} to write it into")
    model, processor = load_model(options.model)
    report = report_experts(model, processor, read_samples(options.data, processor, options.dialogues))
    print(format_report(report, options.top))
    if options.json is not None:
        write_json(options.json, report)
    if options.png is not None:
        write_png(options.png, report, options.top)


def run_budget(options: argparse.Namespace) -> None:
    from pyvlm.training.budget import make_budget, write_json
    from pyvlm.training.budget_table import format_budget
    from pyvlm.training.recipe import load_recipe

    if options.json is not None and not options.json.parent.is_dir():
        raise ValueError(f"{options.json}: there is no folder {options.json.parent} to write it into")
    budget = make_budget(
        load_recipe(options.recipe, options.variant),
        options.batch,
        options.length,
        options.images,
        options.flops_per_second,
        options.price_per_hour,
    )
    print(format_budget(budget))
    if options.json is not None:
        write_json(options.json, budget)


def run_ablate(options: argparse.Namespace) -> None:
    from pyvlm.training.ablate import ablate
    from pyvlm.training.ablation_plan import parse_vary
    from pyvlm.training.recipe import load_recipe

    ablate(
        load_recipe(options.recipe, options.variant),
        parse_vary(options.vary),
        options.out,
        budget=options.budget,
        seeds=options.seeds,
        looks=options.looks,
    )
    print(f"results: {options.out / 'results.md'}")


def run_env(options: argparse.Namespace) -> None:
    from pyvlm._build_info import build_info

    print("\n".join(_outline(build_info())))


def _typed_questions() -> Iterator[str]:
    """Lines from the terminal, or from whatever is piped in, until its end."""
    prompt = ""
    if sys.stdin.isatty():
        print("Ask about the images; end with Ctrl-D.", file=sys.stderr)
        prompt = "> "
    while True:
        try:
            yield input(prompt)
        except EOFError:
            return


def _outline(content: Mapping[str, Any], depth: int = 0) -> Iterator[str]:
    """Nested facts as indented lines, values in one column."""
    for key, value in content.items():
        indented = "  " * depth + str(key)
        if isinstance(value, Mapping):
            yield indented
            yield from _outline(value, depth + 1)
        else:
            shown = ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else value
            yield f"{indented:<24} {'none' if shown in (None, '') else shown}"


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


def _at_least(text: str, least: int) -> int:
    number = int(text) if text.isdecimal() else -1
    if number < least:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least {least}, got {text!r}")
    return number


if __name__ == "__main__":
    sys.exit(main())
