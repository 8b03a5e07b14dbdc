"""What each command of the command line does; what a command needs is imported when it runs."""

import argparse
import json
import sys
from collections.abc import Iterator, Mapping
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from pyvlm._tell import tell


def run_demo(options: argparse.Namespace) -> None:
    from pyvlm.training import demo
    from pyvlm.training.recipe import load_recipe

    recipe = load_recipe("demo", "quick" if options.quick else None, seed=options.seed)
    demo.run_demo(recipe, options.out)


def run_train(options: argparse.Namespace) -> None:
    from pyvlm.training.trainer import train

    recipe = _recipe(options)
    out = options.out or Path("runs") / recipe.name
    train(recipe, out)
    print(f"model: {out / 'model'}")


def run_recipes(options: argparse.Namespace) -> None:
    from pyvlm.training.recipe_card import list_recipes

    print(list_recipes())


def run_show(options: argparse.Namespace) -> None:
    from pyvlm.training.recipe_card import show_recipe

    print(show_recipe(_recipe(options)))


def run_eval(options: argparse.Namespace) -> None:
    _check_folders(options.json, options.predictions)
    if options.data is not None and (options.dialogues or options.seed is not None):
        raise ValueError("--dialogues and --seed are of held-out digits: leave them out, or DATA")
    results = _eval_digits(options) if options.data is None else _eval_file(options)
    if options.json is not None:
        about = {"model": str(options.model), "data": str(options.data or "held-out digits")}
        options.json.write_text(json.dumps(about | results, indent=2, ensure_ascii=False) + "\n")


def _eval_digits(options: argparse.Namespace) -> dict[str, Any]:
    from pyvlm.training.chat import load_model
    from pyvlm.training.demo import format_table
    from pyvlm.training.digits import DigitDialogues, DigitsConfig
    from pyvlm.training.evaluate import accuracy_table, commonest_answers, evaluate

    model, processor = load_model(options.model, options.device)
    if processor.config.image.channels != 1:
        raise ValueError(f"{options.model} was not trained on digits: give DATA, a file of questions")
    data, seed = DigitsConfig(), options.seed or 0
    dialogues = DigitDialogues("test", data, seed).batch(0, range(options.dialogues or 400))
    table = accuracy_table(evaluate(model, processor, dialogues), commonest_answers(data, seed))
    print(format_table(table))
    return {"results": table}


def _eval_file(options: argparse.Namespace) -> dict[str, Any]:
    from pyvlm.training.chat import load_speaker
    from pyvlm.training.vqa import Skipped, read_questions
    from pyvlm.training.vqa_evaluation import answer_questions, format_rows, keep_predictions, summarize

    speaker = load_speaker(options.model, options.device)
    skipped = Skipped(tell, options.strict)
    settings = {name: getattr(options, name) for name in ("batch_size", "max_new_tokens", "instruction")}
    questions = list(islice(read_questions(options.data, skipped), options.limit))
    predictions = answer_questions(speaker, questions, skipped, **settings)
    kept = keep_predictions(predictions, options.predictions)
    if skipped.counts:
        tell(skipped.summary())
    rows = summarize(kept)
    print(format_rows(rows))
    return {"settings": settings, "skipped": dict(skipped.counts), "results": rows}


def run_chat(options: argparse.Namespace) -> None:
    from pyvlm.models.speaker import Sampling
    from pyvlm.training.chat import Chat, load_speaker
    from pyvlm.training.chat_session import ChatSession, complete_with_tab

    sampling = Sampling(options.max_new_tokens, options.temperature, options.top_p, options.seed)
    speaker = load_speaker(options.model, options.device, sampling)
    chat = Chat(speaker, options.image, tell, options.system)
    interactive = options.question is None and sys.stdin.isatty()
    session = ChatSession(chat, input if interactive else lambda _: input(), _write, tell, interactive)
    if options.question is not None:
        session.answer(options.question)
        return
    if interactive:
        complete_with_tab(session)
        tell("ask away; /image PATH shows a picture, /help tells the rest, Ctrl-D ends")
    session.run()


def run_export(options: argparse.Namespace) -> None:
    import torch

    from pyvlm.integrations.transformers.checkpoints import local_folder
    from pyvlm.integrations.transformers.export import export
    from pyvlm.training.chat import load_model

    model, processor = load_model(options.model)
    dtype = None if options.dtype is None else getattr(torch, options.dtype)
    base = None if options.checkpoint is None else local_folder(options.checkpoint)
    export(model, processor, options.out, dtype, base)
    print(f"checkpoint: {options.out}")


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
        recipe = _recipe(options)
        if options.stage is None:
            return recipe.processor(), recipe.model
        if options.stage not in recipe.stages:
            raise ValueError(
                f"--stage {options.stage}: {recipe.name} has the stages {', '.join(recipe.stages)}"
            )
        form = recipe.stages[options.stage].form
        return recipe.processor(options.stage).changed(form=form), recipe.model_in(options.stage)
    changes = {"--stage": options.stage, "--variant": options.variant, "--lm": options.lm}
    changes |= {"--vision": options.vision, "--from": options.checkpoint}
    changes |= {"--set": options.set, "--seed": options.seed}
    if given := [name for name, value in changes.items() if value not in (None, [])]:
        raise ValueError(f"{', '.join(given)}: of a recipe, and none is named; give it with --recipe")
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

    if options.json is not None and not options.json.parent.is_dir():
        raise ValueError(f"{options.json}: there is no folder {options.json.parent} to write it into")
    budget = make_budget(
        _recipe(options),
        options.batch,
        options.length,
        options.images,
        options.flops_per_second,
        options.price_per_hour,
        options.image_size,
    )
    print(format_budget(budget))
    if options.json is not None:
        write_json(options.json, budget)


def run_ablate(options: argparse.Namespace) -> None:
    from pyvlm.training.ablate import ablate
    from pyvlm.training.ablation_plan import parse_vary

    ablate(
        _recipe(options),
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


def _recipe(options: argparse.Namespace) -> Any:
    """The recipe that the options name and change."""
    from pyvlm.training.recipe import load_recipe

    checkpoint = None
    if options.checkpoint is not None:
        from pyvlm.integrations.transformers.checkpoints import local_folder

        checkpoint = str(local_folder(options.checkpoint))
    if options.recipe is None:
        if checkpoint is None:
            raise ValueError("give a RECIPE to train, or a checkpoint to go on from: --from PATH")
        from pyvlm.training.recipe_paths import fitting_recipe

        options.recipe = fitting_recipe(checkpoint)
    return load_recipe(
        options.recipe,
        options.variant,
        language=options.lm,
        vision=options.vision,
        data=options.learn_from,
        checkpoint=checkpoint,
        settings=options.set,
        **({} if options.seed is None else {"seed": options.seed}),
    )


def _check_folders(*paths: Path | None) -> None:
    """Before the work begins, and not when its results are to be written."""
    for path in paths:
        if path is not None and not path.parent.is_dir():
            raise ValueError(f"{path}: there is no folder {path.parent} to write it into")


def _write(piece: str) -> None:
    print(piece, end="", flush=True)


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
