"""The command line: ``moda-attn doctor | demo | balance | bench``.

Each command imports what it needs when it runs, so that ``--help`` is instant and ``doctor`` works without torch.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence
from pathlib import Path

from . import __version__
from .errors import ModaError


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns the exit status: 0 done, 1 it failed, 2 it was asked wrongly."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments[:1] == ["bench"]:
        # The race has options of its own, --help included; they are passed through untouched.
        return importlib.import_module("moda_attn.bench").main(arguments[1:]) or 0
    options = _parser().parse_args(arguments)
    try:
        return options.run(options)
    except (ModaError, ImportError, OSError) as error:
        print(f"moda-attn {options.command}: {error}", file=sys.stderr)
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="moda-attn", description="MODA attention for multimodal transformers")
    parser.add_argument("--version", action="version", version=f"moda-attn {__version__}")
    commands = parser.add_subparsers(dest="command", required=True)

    doctor = commands.add_parser("doctor", help="what is installed, what this machine can run, and whether it works")
    doctor.set_defaults(run=_doctor)

    demo = commands.add_parser(
        "demo",
        help="train a small LLaVA on real digits with and without MODA; or look at a checkpoint of yours",
        description="Without --model: trains, measures and draws (some minutes). With --model, --image and --prompt:"
        " patches a LLaVA checkpoint and compares its answer and its attention balance before and after, untrained.",
    )
    demo.add_argument(
        "--out", type=Path, default=Path("moda-demo"), help="folder for demo.png, report.html and results.json"
    )
    demo.add_argument("--seed", type=int, default=0)
    demo.add_argument("--steps", type=_positive, default=None, help="training steps of each model")
    demo.add_argument(
        "--unknowable-steps", type=_positive, default=None, help="training steps on the question nobody can answer"
    )
    demo.add_argument(
        "--threads", type=_positive, default=1, help="CPU threads; so small a model gains little from more"
    )
    demo.add_argument("--model", help="a LLaVA checkpoint: a folder or a Hugging Face id")
    demo.add_argument("--image", type=Path)
    demo.add_argument("--prompt")
    demo.add_argument("--max-new-tokens", type=_positive, default=64)
    demo.set_defaults(run=_demo)

    balance = commands.add_parser(
        "balance",
        help="where a model's attention goes, by modality and layer; a report of one model, or of two compared",
        description="Measures a LLaVA checkpoint on --images with --prompt, or on the examples of --data, prints what"
        " it found, and writes it: a page for people (.html), the numbers for programs (.json).",
    )
    balance.add_argument("--model", required=True, help="a LLaVA checkpoint: a folder or a Hugging Face id")
    balance.add_argument(
        "--moda", type=Path, help="folder written by moda_attn.save_pretrained: measure with these weights"
    )
    balance.add_argument(
        "--compare-with",
        metavar="MODEL",
        help="another checkpoint, measured first on the same inputs; with --moda it may be --model itself, unpatched",
    )
    balance.add_argument("--images", "--image", type=Path, metavar="DIR_OR_FILE", help="a picture, or a folder of some")
    balance.add_argument("--prompt", help="what is asked about every picture")
    balance.add_argument(
        "--data",
        type=Path,
        metavar="FILE.jsonl",
        help='instead of both: a line each {"image": path beside the file, "prompt": text, "answer": optional text}',
    )
    balance.add_argument("--limit", type=_positive, metavar="N", help="only the first N inputs")
    balance.add_argument(
        "--out", type=Path, action="append", default=[], help="report.html or report.json; may be given twice"
    )
    balance.add_argument(
        "--shown", type=_positive, default=2, metavar="N", help="pictures on the page: the first N (default 2)"
    )
    balance.add_argument(
        "--max-new-tokens", type=int, default=32, metavar="N", help="of the answers on the page (default 32); 0: none"
    )
    balance.set_defaults(run=_balance)

    commands.add_parser("bench", help="measure speed and memory on this machine (options: moda-attn bench --help)")
    return parser


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return number


def _doctor(options: argparse.Namespace) -> int:
    from .doctor import examine

    return examine()


def _demo(options: argparse.Namespace) -> int:
    given = [name for name in ("model", "image", "prompt") if getattr(options, name) is not None]
    if 0 < len(given) < 3:
        names = " and ".join(f"--{name}" for name in given)
        print(f"moda-attn demo: --model, --image and --prompt belong together; got {names}", file=sys.stderr)
        return 2
    return _demo_checkpoint(options) if given else _demo_digits(options)


def _demo_digits(options: argparse.Namespace) -> int:
    import torch

    from .demo.leak import STEPS
    from .demo.run import run_and_write
    from .demo.summary import summary
    from .demo.train import Recipe

    torch.set_num_threads(options.threads)
    recipe = Recipe(seed=options.seed, steps=options.steps or Recipe.steps)
    run = run_and_write(options.out, recipe, options.unknowable_steps or STEPS)
    print(f"\n{summary(run)}")
    files = {"picture": "demo.png", "attention": "report.html", "numbers": "results.json"}
    print(f"\n{run.seconds:.0f} s; {', '.join(f'{what}: {options.out / name}' for what, name in files.items())}")
    return 0


def _demo_checkpoint(options: argparse.Namespace) -> int:
    from .analysis.report import write_json
    from .demo.checkpoint import look

    seen = look(options.model, options.image, options.prompt, max_new_tokens=options.max_new_tokens)
    print(seen)
    write_json(seen.to_dict(), options.out / "look.json")
    print(f"\nwritten: {options.out / 'look.json'}")
    return 0


def _balance(options: argparse.Namespace) -> int:
    wrong = _wrong_request(options)
    if wrong is not None:
        print(f"moda-attn balance: {wrong}", file=sys.stderr)
        return 2
    from .analysis.command import run

    return run(options)


def _wrong_request(options: argparse.Namespace) -> str | None:
    """What cannot be meant, found before a checkpoint is loaded."""
    if options.data is not None and (options.images is not None or options.prompt is not None):
        return "--data brings its own pictures and prompts; leave out --images and --prompt"
    if options.data is None and (options.images is None or options.prompt is None):
        return "--images together with --prompt wanted, or --data"
    for path in options.out:
        if path.suffix not in (".html", ".json"):
            return f"--out {path}: a name that ends in .html or .json wanted"
    if options.compare_with == options.model and options.moda is None:
        return "--compare-with is the model itself; give --moda, or another model"
    return None
