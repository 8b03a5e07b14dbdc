"""The command line: `pyvlm demo | train | recipes | eval | chat | moe-report | data | budget | ablate | env`.

A mistake of the user's is one line on stderr and exit code 2. What a command needs is imported when it runs,
so that `pyvlm --help` is quick.
"""

import argparse
import json
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
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
    moe.add_argument("data", metavar="DATA", help="a data file, or a recipe: its held-out ones")
    moe.add_argument("--dialogues", type=_positive, default=400, help="at most so many (default 400)")
    moe.add_argument("--top", type=_positive, default=10, help="pathways to show (default 10)")
    moe.add_argument("--json", type=Path, metavar="FILE", help="write all of it as JSON")
    moe.add_argument("--png", type=Path, metavar="FILE", help="write a picture of it")
    moe.set_defaults(run=run_moe_report)

    _add_data_commands(commands.add_parser("data", help="look at training data: one record, or a whole file"))

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
    show.add_argument("--index", type=_natural, default=0, metavar="N", help="which record (default 0)")
    show.add_argument("--png", type=Path, metavar="FILE", help="write a picture of the mask")
    show.set_defaults(run=run_data_show)
    check.add_argument("--decode", action="store_true", help="decode every image as well")
    check.add_argument("--strict", action="store_true", help="exit with 2 where a record is bad")
    check.set_defaults(run=run_data_check)


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


def run_data_show(options: argparse.Namespace) -> None:
    from pyvlm.data import show
    from pyvlm.data.packing import encode
    from pyvlm.data.readers import RecordFile

    chosen = _processor_of(options)
    if chosen is None and (options.max_length or options.png):
        raise ValueError("tokens and masks are a model's: give --model FOLDER or --recipe RECIPE")
    file = RecordFile(options.data, options.images)
    record = file.read(options.index)
    print(show.format_conversation(record))
    if chosen is None:
        print("\ngive --model FOLDER or --recipe RECIPE to see its tokens, labels and mask")
        return
    processor, config = chosen
    sample = encode(processor, record.messages, options.max_length)
    layout = show.sample_layout(sample, config)
    print(f"\n{show.format_sample(sample, layout, config, processor)}")
    if options.png is not None:
        show.save_mask(show.spans_of(layout, config), options.png)


def run_data_check(options: argparse.Namespace) -> None:
    from pyvlm.data.packing import measure
    from pyvlm.data.readers import RecordFile
    from pyvlm.data.scan import scan
    from pyvlm.data.show import count_words, format_scan

    chosen = _processor_of(options)
    if chosen is None and options.max_length:
        raise ValueError("tokens are a model's: give --model FOLDER or --recipe RECIPE")
    file = RecordFile(options.data, options.images)
    length = count_words if chosen is None else partial(measure, chosen[0], max_length=options.max_length)
    found = scan(file, length, decode=options.decode)
    print(format_scan(found, "words" if chosen is None else "tokens"))
    if options.strict and found.report.skipped:
        raise ValueError(f"{options.data}: {found.report.skipped:,} of {len(file):,} records are bad")


def _processor_of(options: argparse.Namespace) -> tuple[Any, Any] | None:
    """The processor and the configuration of --model or --recipe; None without either."""
    if options.recipe is not None:
        from pyvlm.training.recipe import load_recipe

        recipe = load_recipe(options.recipe)
        return recipe.processor(), recipe.model
    if options.model is None:
        return None
    from pyvlm.models.checkpoint import CONFIG, read_config
    from pyvlm.models.config import VLMConfig
    from pyvlm.models.processor import Processor

    finished = options.model / "model"  # of a run folder
    folder = finished if (finished / CONFIG).exists() else options.model
    return Processor.from_pretrained(folder), read_config(folder / CONFIG, VLMConfig)


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
