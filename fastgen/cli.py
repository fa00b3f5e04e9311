"""The command line: `fastgen sample | replay | evaluate | train | models | doctor`.

torch is imported inside the commands, so that `--help` is instant. A user's mistake is one line
on stderr and exit code 2.
"""

from __future__ import annotations

import errno
import functools
import inspect
import json
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Optional

import typer

app = typer.Typer(
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    no_args_is_help=True,
    help="Image generators in PyTorch on fused kernels: sample, replay, evaluate, train, and see what runs here.",
)
_BadUsage = typer.BadParameter.__mro__[2]  # click's ClickException, wherever this typer keeps click


def main() -> None:
    """The entry point of the `fastgen` command."""
    from fastgen.errors import OUT_OF_MEMORY, UsageError

    try:
        code = app(standalone_mode=False) or 0
        if code == 130:  # what typer makes of Ctrl-C
            _fail("interrupted", 2)
        sys.exit(code)
    except UsageError as error:
        argument, colon, rest = str(error).partition(":")
        option = argument.isidentifier() and argument.islower()
        _fail(argument.replace("_", "-") + colon + rest if option else str(error), 2)
    except _BadUsage as error:
        _fail(error.format_message(), 2)
    except (typer.Abort, KeyboardInterrupt):
        _fail("interrupted", 2)
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        _fail(f"no room left on the disk: {error}" if full else str(error), 2 if full else 1)
    except (FloatingPointError, ImportError) as error:
        _fail(str(error), 1)
    except (RuntimeError, MemoryError) as error:
        if isinstance(error, MemoryError) or any(words in str(error) for words in OUT_OF_MEMORY):
            _fail("memory ran out; give a smaller --batch-size, or fewer images", 2)
        if type(error).__name__ != "BackendError":
            raise
        _fail(str(error), 2)


def _fail(message: str, code: int) -> None:
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    try:
        sys.stdout.flush()
    except OSError:  # what is left in its buffer cannot be written, and Python would exit with 120 for it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(code)


# The options that several verbs share.
Steps = Annotated[Optional[int], typer.Option(help="Sampling steps. Default: the model's own.")]
SamplerName = Annotated[
    Optional[str],
    typer.Option(
        help="ddim, ddpm, euler, euler_ancestral, heun (two calls of the network a step), dpmpp_2m or dpmpp_2m_sde. "
        "Default: the model's own."
    ),
]
Spacing = Annotated[
    Optional[str],
    typer.Option(
        help="Which steps to visit: trailing, leading, linspace, and, for euler, heun and dpmpp, karras. "
        "Default: karras for heun, trailing for the others."
    ),
]
Eta = Annotated[Optional[float], typer.Option(help="For ddim: its noise, from 0 to 1. Default: 0.")]
Guidance = Annotated[
    Optional[float], typer.Option(help="Classifier-free guidance; 1 is none. Default: the model's own.")
]
BatchSize = Annotated[Optional[int], typer.Option(help="Images at once. Default: 64.")]
Device = Annotated[Optional[str], typer.Option(help="cpu or cuda. Default: cuda where there is one.")]
Backend = Annotated[Optional[str], typer.Option(help="reference, cpp, triton or cuda. Default: the best that runs.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress bar.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, for scripts.")]


@app.command()
def sample(
    name: Annotated[str, typer.Argument(help="A shipped model (see `fastgen models`) or a checkpoint folder.")],
    n: Annotated[
        Optional[int], typer.Option("-n", "--count", help="How many images. Default: 1, or one for each seed.")
    ] = None,
    output: Annotated[
        str,
        typer.Option(
            "-o",
            "--output",
            help="A picture to write: a labelled grid if n > 1. Or a folder, with / at the end: a PNG for each image, "
            "written as it is made; run again, it goes on where it stopped.",
        ),
    ] = "samples.png",
    seed: Annotated[
        str,
        typer.Option(help="Image i has the seed SEED + i, and looks the same in any batch. Or one for each: 3,1,4."),
    ] = "0",
    labels: Annotated[
        Optional[str],
        typer.Option(help="Classes, such as 3,1,4; repeated in turn to fill n. Default: each image's seed draws one."),
    ] = None,
    steps: Steps = None,
    sampler: SamplerName = None,
    spacing: Spacing = None,
    eta: Eta = None,
    guidance: Guidance = None,
    guidance_interval: Annotated[
        Optional[str],
        typer.Option(help="Where guidance applies, such as 0.2,0.8: 0 is the clean image, 1 pure noise. Default: 0,1."),
    ] = None,
    guidance_rescale: Annotated[
        Optional[float], typer.Option(help="Brings guided contrast back, from 0 (not) to 1 (wholly). Default: 0.")
    ] = None,
    image: Annotated[
        Optional[Path], typer.Option(help="A picture to start from instead of noise, of the model's own size.")
    ] = None,
    strength: Annotated[
        Optional[float],
        typer.Option(help="With --image: how much is drawn anew, from 0 (nothing) to 1. Default: 0.8."),
    ] = None,
    batch_size: BatchSize = None,
    device: Device = None,
    backend: Backend = None,
    graph: Annotated[
        Optional[str],
        typer.Option(
            help="How a GPU is given its work, which changes no image: step, every step as one CUDA graph; loop, all "
            "steps as one; off, kernel by kernel. Default: step on a GPU."
        ),
    ] = None,
    compile: Annotated[
        bool, typer.Option("--compile", help="Let torch.compile work on the network first, for a minute or so.")
    ] = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Draw images from a model.

    Example: fastgen sample ddpm-mnist -n 16 --labels 3,1,4 -o samples.png

    Many: fastgen sample ddpm-mnist -n 10000 -o digits/
    """
    from fastgen.images import check_output

    folder = output.endswith(("/", os.sep)) or Path(output).is_dir()
    if not folder:
        check_output(output)  # before the work, not after
    seeds = _numbers(seed, int, "seed", "0, or 3,1,4")
    n = n if n is not None else len(seeds)
    arguments = {
        "seed": seeds[0] if len(seeds) == 1 else seeds, "labels": _parse_labels(labels, n), "steps": steps,
        "guidance": guidance, "guidance_rescale": guidance_rescale, "image": image, "strength": strength,
        "guidance_interval": None if guidance_interval is None else _interval(guidance_interval),
        "sampler": _sampler(name, sampler, spacing=spacing, eta=eta), "batch_size": batch_size, "device": device,
        "backend": backend, "progress": not quiet, "graph": _graph(graph), "compile": compile,
    }  # fmt: skip
    report = _into_folder(output, name, n, arguments) if folder else _into_picture(output, name, n, arguments)
    typer.echo(json.dumps(report) if as_json else report["message"])


def _into_picture(output: str, name: str, n: int, arguments: dict[str, Any]) -> dict[str, Any]:
    from fastgen.sampling import sample as run

    made = run(name, n, **arguments)
    made.save(output)
    message = f"{len(made)} {'image' if len(made) == 1 else 'images'} in {output}"
    labels = None if made.labels is None else made.labels.tolist()
    return {"message": message, "output": output, "made": n, "found": 0, "seeds": made.seeds.tolist(), "labels": labels}


def _into_folder(output: str, name: str, n: int, arguments: dict[str, Any]) -> dict[str, Any]:
    from fastgen.errors import UsageError
    from fastgen.folder import image_name, sample_to_folder

    try:
        written = sample_to_folder(output, name, n, **arguments)
    except KeyboardInterrupt:
        there = sum((Path(output) / image_name(i)).exists() for i in range(n))
        again = "; run the same command again to go on" if there else ""
        raise UsageError(f"interrupted: {there} of {n} images are in {output}{again}") from None
    earlier = f", {written.found} of them from before" if written.found else ""
    message = f"{n} {'image' if n == 1 else 'images'} in {output}{earlier}"
    return {"message": message, "output": output, "made": written.made, "found": written.found}


def _sampler(name: str, sampler: str | None, **options: Any) -> Any:
    """The sampler by its name, or the model's own, with the options that were given."""
    from fastgen.checkpoint import load
    from fastgen.diffusion.samplers import get_sampler

    if all(value is None for value in options.values()):
        return sampler
    if sampler is None:
        network = load(name)
        sampler = network.sampling.sampler if hasattr(network, "sampling") else "ddim"
    return get_sampler(sampler, **options)


def _numbers(text: str, kind: type, argument: str, example: str) -> list[Any]:
    from fastgen.errors import UsageError

    try:
        return [kind(part) for part in text.split(",")]
    except ValueError:
        raise UsageError(f"{argument}: must be numbers separated by commas, such as {example}, not {text!r}") from None


def _graph(text: str | None) -> Any:
    from fastgen.errors import UsageError

    if text not in (None, "step", "loop", "off"):
        raise UsageError(f"graph: must be step, loop or off, not {text!r}")
    return False if text == "off" else text


def _interval(text: str) -> tuple[Any, ...]:
    return tuple(_numbers(text, float, "guidance_interval", "0.2,0.8"))


def _parse_labels(text: str | None, n: int) -> list[int] | None:
    from fastgen.errors import UsageError

    if text is None:
        return None
    given = _numbers(text, int, "labels", "3,1,4")
    if len(given) > max(n, 1):
        raise UsageError(f"labels: {len(given)} were given for {n} images; give at most {n}, or raise -n")
    return [given[i % len(given)] for i in range(n)]


@app.command()
def replay(
    path: Annotated[Path, typer.Argument(help="A PNG that fastgen wrote.")],
    output: Annotated[
        Optional[Path], typer.Option("-o", "--output", help="Write the picture that was made again here.")
    ] = None,
    model: Annotated[
        Optional[str], typer.Option(help="The model, if it is not where the recipe says. Default: the recipe's.")
    ] = None,
    device: Annotated[Optional[str], typer.Option(help="cpu or cuda. Default: the recipe's.")] = None,
    backend: Annotated[
        Optional[str], typer.Option(help="reference, cpp, triton or cuda. Default: the recipe's.")
    ] = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Make an image again from the recipe in its PNG, and say whether it is the same.

    Exit code 0 if every pixel is, 1 if not. Example: fastgen replay samples.png
    """
    from fastgen.images import check_output
    from fastgen.replaying import replay as run

    if output is not None:
        check_output(output)
    found = run(path, model=model, device=device, backend=backend, progress=not quiet)
    if output is not None:
        found.samples.save(output)
    typer.echo(json.dumps(found.as_dict()) if as_json else str(found))
    if not found.exact:
        raise typer.Exit(1)


@app.command()
def evaluate(
    name: Annotated[str, typer.Argument(help="A shipped model or a checkpoint folder that draws the ten digits.")],
    n: Annotated[int, typer.Option("-n", "--count", help="How many images to draw, the ten classes in turn.")] = 1000,
    seed: Annotated[int, typer.Option(help="Image i has the seed SEED + i.")] = 0,
    steps: Steps = None,
    sampler: SamplerName = None,
    spacing: Spacing = None,
    eta: Eta = None,
    guidance: Guidance = None,
    batch_size: BatchSize = None,
    device: Device = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Measure a model's images: label accuracy, Fréchet distance, precision, recall, nearness to the training images.

    Needs the extras metrics and data. A thousand images take minutes on a CPU. Example: fastgen evaluate ddpm-mnist
    """
    from fastgen.metrics import evaluate as run

    found = run(
        name, n, seed=seed, steps=steps, sampler=_sampler(name, sampler, spacing=spacing, eta=eta), guidance=guidance,
        batch_size=batch_size, device=device, progress=not quiet,
    )  # fmt: skip
    typer.echo(json.dumps(found.as_dict(), indent=2) if as_json else str(found))


def _settings(function: Any) -> Any:
    """Gives a verb an option for each setting of TrainConfig, with help and default, as its argument ``settings``."""
    from fastgen.training.config import describe

    options = []
    for name, kind, default, help in describe():
        known = {"int": int, "float": float, "bool": bool}.get(kind.split(" | ")[0], str)
        shown = ",".join(map(str, default)) if isinstance(default, tuple) else default
        if known is bool:
            shown = "yes" if default else "no"
        said = help if "Default: " in help or default is None else f"{help} Default: {shown}."
        annotation = Annotated[Optional[known], typer.Option(help=said)]
        options.append(inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation))
    signature = inspect.signature(function, eval_str=True)
    own = [p for p in signature.parameters.values() if p.name != "settings"]
    names = {p.name for p in options}

    @functools.wraps(function)
    def verb(**arguments: Any) -> Any:
        given = {k: v for k, v in arguments.items() if k in names and v is not None}
        return function(settings=given, **{k: v for k, v in arguments.items() if k not in names})

    first, rest = own[:2], own[2:]
    parameters = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in (*first, *options, *rest)]
    verb.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    verb.__annotations__ = {p.name: p.annotation for p in parameters}
    return verb


@app.command()
@_settings
def train(
    recipe: Annotated[
        Optional[str],
        typer.Argument(help="What to train: ddpm, a diffusion model, or classifier. Default: that of --config."),
    ] = None,
    out: Annotated[Path, typer.Option(help="The folder of the run: checkpoints, log.csv and config.json.")] = ...,
    config: Annotated[
        Optional[Path],
        typer.Option(help="The config.json of a run to make again; options that are given go before it."),
    ] = None,
    resume: Annotated[
        Optional[str], typer.Option(help="'auto' goes on from the newest whole checkpoint in OUT, if there is one.")
    ] = None,
    device: Device = None,
    quiet: Quiet = False,
    settings: Any = None,
) -> None:
    """Train a model. SIGINT (Ctrl-C) and SIGTERM end it after the step, saved: exit codes 130 and 143.

    Example: fastgen train ddpm --data mnist-5k --out runs/digits --steps 5000 --resume auto
    """
    from fastgen.training.stopping import Stopped, StopRequest

    with StopRequest():
        try:
            trainer, last = _train(recipe, out, config, resume, device, quiet, settings)
        except Stopped as stopped:
            kept = "what was saved before stays; --resume auto goes on from there"
            _fail(f"interrupted by {stopped}; {kept}", 128 + stopped.signal)
    if trainer.stopped_by:
        print(f"stopped after step {trainer.step}, saved in {last}; --resume auto goes on", file=sys.stderr)
        raise SystemExit(128 + trainer.stopped_by)
    best = trainer.validation.step
    early = f"no new best for {trainer.validation.waited} validations; " if trainer.over else ""
    found = f"{early}the best validation loss was at step {best}; " if best else ""
    hint = f"draw from it with: fastgen sample {last} -n 16" if hasattr(trainer.recipe.model, "sampling") else f"{last}"
    typer.echo(f"trained to step {trainer.step}; {found}{hint}")


def _train(
    recipe: str | None, out: Path, config: Path | None, resume: str | None, device: str | None, quiet: bool,
    settings: dict[str, Any],
) -> Any:  # fmt: skip
    """The trainer and its last checkpoint."""
    from fastgen.errors import UsageError
    from fastgen.training.config import TrainConfig, read_config

    before, values = read_config(config) if config else (None, {})
    recipe = recipe or before
    if "ema_decay" in settings:
        settings["ema_decay"] = tuple(_numbers(settings["ema_decay"], float, "ema-decay", "0.9995,0.999"))
    made = TrainConfig(**values | settings)

    from fastgen.backends import check_device, default_device  # torch, which takes a second
    from fastgen.training.loop import start_or_resume
    from fastgen.training.registry import RECIPES

    if recipe not in RECIPES:
        raise UsageError(f"recipe: must be {' or '.join(RECIPES)}, not {recipe!r}")
    kind = RECIPES[recipe]
    made = replace(made, preset=made.preset or kind.preset)
    check_device(device)
    trainer = start_or_resume(kind(made, device or default_device()), made, out, resume)
    return trainer, trainer.run(progress=False if quiet else None)


@app.command()
def models(as_json: AsJson = False) -> None:
    """List the models in the package. Example: fastgen models"""
    from fastgen.checkpoint import describe_models

    described = describe_models()
    if as_json:
        typer.echo(json.dumps(described, indent=2))
        return
    for entry in described:
        typer.echo(f"{entry['name']:<20}{entry['summary']}")


@app.command()
def doctor(as_json: AsJson = False) -> None:
    """Show which kernels run here, and why the others do not. Example: fastgen doctor"""
    from fastgen.diagnosis import doctor as examine

    report = examine()
    typer.echo(json.dumps(report.as_dict(), indent=2) if as_json else str(report))


def _version(value: bool) -> None:
    if value:
        from fastgen.version import __version__

        typer.echo(f"fastgen {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    pass
