"""The command line: `pyvlm demo | train | eval | chat | moe-report | env`.

A mistake of the user's is one line on stderr and exit code 2. What a command needs is imported when it runs,
so that `pyvlm --help` is quick.
"""

import argparse
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

DEMO_FOLDER = "runs/demo"
GOES_ON = "; the same command goes on from the last checkpoint"


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command and returns the exit code: 0, 2 for a mistake of the user's, 130 where interrupted."""
    options = parse(arguments)
    try:
        options.run(options)
    except ValueError as error:
        print(f"pyvlm: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"\npyvlm: interrupted{options.after_interrupt}", file=sys.stderr)
        return 130
    return 0


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The options of one command line."""
    parser = build_parser()
    options, rest = parser.parse_known_args(arguments)
    # Until Python 3.13 argparse takes a second, optional argument for absent where options stand before it.
    for name, kind in (("question", str), ("data", Path)):
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
    train.add_argument("recipe", metavar="RECIPE", help="a YAML file, or the name of a shipped recipe")
    variant = train.add_mutually_exclusive_group()
    variant.add_argument("--variant", help="an entry of the recipe's variants")
    variant.add_argument(
        "--tiny",
        dest="variant",
        action="store_const",
        const="tiny",
        help="its variant tiny: small random parts, bundled data, minutes on two cores",
    )
    _add_paths(train)
    train.add_argument("--seed", type=_natural, help="in place of the recipe's")
    train.add_argument("--out", type=Path, help="run folder (default runs/ and the recipe's name)")
    train.set_defaults(run=run_train, after_interrupt=GOES_ON)

    recipes = commands.add_parser("recipes", help="the recipes that pyvlm ships, or all of one of them")
    recipes.set_defaults(run=run_recipes)
    show = recipes.add_subparsers(metavar="show").add_parser(
        "show", help="resolved configuration, stages, parameters"
    )
    show.add_argument("recipe", metavar="RECIPE", help="a YAML file, or the name of a shipped recipe")
    show.add_argument("--variant", help="an entry of the recipe's variants, such as tiny")
    _add_paths(show)
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

    moe = commands.add_parser("moe-report", help="how busy each expert is, and the pathways tokens take")
    moe.add_argument("model", metavar="MODEL", type=Path, help="a run folder or a saved model")
    moe.add_argument("data", metavar="DATA", help="conversations as .jsonl, or a recipe: its held-out ones")
    moe.add_argument("--dialogues", type=_positive, default=400, help="at most so many (default 400)")
    moe.add_argument("--top", type=_positive, default=10, help="pathways to show (default 10)")
    moe.add_argument("--json", type=Path, metavar="FILE", help="write all of it as JSON")
    moe.add_argument("--png", type=Path, metavar="FILE", help="write a picture of it")
    moe.set_defaults(run=run_moe_report)

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
    recipe = load_recipe(options.recipe, options.variant, **_paths(options), **overrides)
    out = options.out or Path("runs") / recipe.name
    train(recipe, out)
    print(f"model: {out / 'model'}")


def run_recipes(options: argparse.Namespace) -> None:
    from pyvlm.training.recipe_card import list_recipes

    print(list_recipes())


def run_show(options: argparse.Namespace) -> None:
    from pyvlm.training.recipe import load_recipe
    from pyvlm.training.recipe_card import show_recipe

    print(show_recipe(load_recipe(options.recipe, options.variant, **_paths(options))))


def run_eval(options: argparse.Namespace) -> None:
    from pyvlm.training.chat import load_model

    _check_folders(options.json, options.predictions)
    if options.data is not None and (options.dialogues or options.seed is not None):
        raise ValueError("--dialogues and --seed are of held-out digits: leave them out, or DATA")
    model, processor = load_model(options.model, options.device)
    evaluate = _eval_digits if options.data is None else _eval_file
    results = evaluate(options, model, processor)
    if options.json is not None:
        about = {"model": str(options.model), "data": str(options.data or "held-out digits")}
        options.json.write_text(json.dumps(about | results, indent=2, ensure_ascii=False) + "\n")


def _eval_digits(options: argparse.Namespace, model: Any, processor: Any) -> dict[str, Any]:
    from pyvlm.training.demo import format_table
    from pyvlm.training.digits import DigitDialogues, DigitsConfig
    from pyvlm.training.evaluate import accuracy_table, commonest_answers, evaluate

    if processor.config.image.channels != 1:
        raise ValueError(f"{options.model} was not trained on digits: give DATA, a file of questions")
    data, seed = DigitsConfig(), options.seed or 0
    dialogues = DigitDialogues("test", data, seed).batch(0, range(options.dialogues or 400))
    table = accuracy_table(evaluate(model, processor, dialogues), commonest_answers(data, seed))
    print(format_table(table))
    return {"results": table}


def _eval_file(options: argparse.Namespace, model: Any, processor: Any) -> dict[str, Any]:
    from pyvlm.training.vqa import Skipped, read_questions
    from pyvlm.training.vqa_evaluation import answer_questions, format_rows, keep_predictions, summarize

    skipped = Skipped(_tell, options.strict)
    settings = {name: getattr(options, name) for name in ("batch_size", "max_new_tokens", "instruction")}
    questions = list(islice(read_questions(options.data, skipped), options.limit))
    predictions = answer_questions(model, processor, questions, skipped, **settings)
    kept = keep_predictions(predictions, options.predictions)
    if skipped.counts:
        _tell(skipped.summary())
    rows = summarize(kept)
    print(format_rows(rows))
    return {"settings": settings, "skipped": dict(skipped.counts), "results": rows}


def run_chat(options: argparse.Namespace) -> None:
    from pyvlm.training.chat import Chat, load_model
    from pyvlm.training.chat_session import ChatSession, complete_with_tab
    from pyvlm.training.replies import Sampling

    model, processor = load_model(options.model, options.device)
    sampling = Sampling(options.max_new_tokens, options.temperature, options.top_p, options.seed)
    chat = Chat(model, processor, options.image, _tell, sampling, options.system)
    interactive = options.question is None and sys.stdin.isatty()
    session = ChatSession(chat, input if interactive else lambda _: input(), _write, _tell, interactive)
    if options.question is not None:
        session.answer(options.question)
        return
    if interactive:
        complete_with_tab(session)
        _tell("ask away; /image PATH shows a picture, /help tells the rest, Ctrl-D ends")
    session.run()


def run_moe_report(options: argparse.Namespace) -> None:
    from pyvlm.training.chat import load_model
    from pyvlm.training.moe_chart import write_png
    from pyvlm.training.moe_report import format_report, report_experts, write_json
    from pyvlm.training.samples import read_samples

    _check_folders(options.json, options.png)
    model, processor = load_model(options.model)
    report = report_experts(model, processor, read_samples(options.data, processor, options.dialogues))
    print(format_report(report, options.top))
    if options.json is not None:
        write_json(options.json, report)
    if options.png is not None:
        write_png(options.png, report, options.top)


def run_env(options: argparse.Namespace) -> None:
    from pyvlm._build_info import build_info

    print("\n".join(_outline(build_info())))


def _add_paths(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--lm", metavar="FOLDER", help="of transformers: what the language model starts from")
    parser.add_argument(
        "--vision",
        metavar="[NAME=]FOLDER",
        action="append",
        default=[],
        help="of transformers: what a vision tower starts from; once a tower",
    )
    parser.add_argument(
        "--data",
        metavar="[STAGE=]PATH",
        action="append",
        default=[],
        help="conversations to learn from; once a stage, or for all stages",
    )


def _paths(options: argparse.Namespace) -> dict[str, Any]:
    return {"language": options.lm, "vision": options.vision, "data": options.data}


def _check_folders(*paths: Path | None) -> None:
    """Before the work begins, and not when its results are to be written."""
    for path in paths:
        if path is not None and not path.parent.is_dir():
            raise ValueError(f"{path}: there is no folder {path.parent} to write it into")


def _write(piece: str) -> None:
    print(piece, end="", flush=True)


def _tell(line: str) -> None:
    print(f"pyvlm: {line}", file=sys.stderr)


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


def _at_least(text: str, least: int) -> int:
    number = int(text) if text.isdecimal() else -1
    if number < least:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least {least}, got {text!r}")
    return number


if __name__ == "__main__":
    sys.exit(main())
