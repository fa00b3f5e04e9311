"""The command line: `fastgen sample | train | models | doctor`.

torch is imported inside the commands, so that `--help` is instant. A user's mistake is one line
on stderr and exit code 2.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Optional

import typer

app = typer.Typer(
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    no_args_is_help=True,
    help="Image generators in PyTorch on fused kernels: sample, train, and see what runs here.",
)
_BadUsage = typer.BadParameter.__mro__[2]  # click's ClickException, wherever this typer keeps click


def main() -> None:
    """The entry point of the `fastgen` command."""
    from fastgen.errors import UsageError

    try:
        code = app(standalone_mode=False) or 0
        if code == 130:  # what typer makes of Ctrl-C
            _fail("interrupted", code)
        sys.exit(code)
    except (UsageError, _BadUsage) as error:
        message = error.format_message() if isinstance(error, _BadUsage) else str(error)
        _fail(message, 2)
    except typer.Abort:
        _fail("interrupted", 130)
    except KeyboardInterrupt:
        _fail("interrupted", 130)
    except (OSError, FloatingPointError, ImportError) as error:
        _fail(str(error), 1)
    except RuntimeError as error:
        if type(error).__name__ != "BackendError":
            raise
        _fail(str(error), 2)


def _fail(message: str, code: int) -> None:
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(code)


@app.command()
def sample(
    name: Annotated[str, typer.Argument(help="A shipped model (see `fastgen models`) or a checkpoint folder.")],
    n: Annotated[int, typer.Option("-n", "--count", help="How many images.")] = 1,
    output: Annotated[
        Path, typer.Option("-o", "--output", help="The picture to write: a labelled grid if n > 1.")
    ] = Path("samples.png"),
    seed: Annotated[int, typer.Option(help="Image i has the seed SEED + i, and looks the same in any batch.")] = 0,
    labels: Annotated[
        Optional[str],  # noqa: UP045 - typer reads it on Python 3.10
        typer.Option(help="Classes, such as 3,1,4; repeated in turn to fill n. Default: each image's seed draws one."),
    ] = None,
    steps: Annotated[Optional[int], typer.Option(help="Sampling steps. Default: the model's own.")] = None,  # noqa: UP045
    sampler: Annotated[Optional[str], typer.Option(help="ddim or ddpm. Default: the model's own.")] = None,  # noqa: UP045
    guidance: Annotated[
        Optional[float],  # noqa: UP045
        typer.Option(help="Classifier-free guidance; 1 is none. Default: the model's own."),
    ] = None,
    batch_size: Annotated[Optional[int], typer.Option(help="Images at once. Default: 64.")] = None,  # noqa: UP045
    device: Annotated[Optional[str], typer.Option(help="cpu or cuda. Default: cuda where there is one.")] = None,  # noqa: UP045
    backend: Annotated[Optional[str], typer.Option(help="reference, cpp, triton or cuda. Default: the best.")] = None,  # noqa: UP045
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress bar.")] = False,
) -> None:
    """Draw images from a model. Example: fastgen sample ddpm-mnist -n 16 --labels 3,1,4 -o samples.png"""
    from fastgen.errors import UsageError
    from fastgen.sampling import check_output
    from fastgen.sampling import sample as run

    check_output(output)  # before the work, not after
    try:
        made = run(
            name, n, seed=seed, labels=_parse_labels(labels, n), steps=steps, sampler=sampler, guidance=guidance,
            batch_size=batch_size, device=device, backend=backend, progress=not quiet,
        )  # fmt: skip
    except UsageError as error:
        raise UsageError(str(error).replace("batch_size:", "batch-size:")) from None
    made.save(output)
    typer.echo(f"{len(made)} {'image' if len(made) == 1 else 'images'} in {output}")


def _parse_labels(text: str | None, n: int) -> list[int] | None:
    from fastgen.errors import UsageError

    if text is None:
        return None
    try:
        given = [int(part) for part in text.split(",")]
    except ValueError:
        raise UsageError(f"labels: must be whole numbers separated by commas, such as 3,1,4, not {text!r}") from None
    if len(given) > max(n, 1):
        raise UsageError(f"labels: {len(given)} were given for {n} images; give at most {n}, or raise -n")
    return [given[i % len(given)] for i in range(n)]


@app.command()
def train(
    recipe: Annotated[
        str, typer.Argument(help="What to train: ddpm, a class-conditional diffusion model, or classifier.")
    ],
    out: Annotated[Path, typer.Option(help="The folder of the run: checkpoints and log.csv.")],
    data: Annotated[str, typer.Option(help="The data set: mnist-5k (needs the extra 'data').")] = "mnist-5k",
    preset: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="The network. ddpm: mnist (default) or tiny. classifier: digits (default) or digits-tiny."),
    ] = None,
    steps: Annotated[int, typer.Option(help="Optimizer steps in all.")] = 10_000,
    batch_size: Annotated[int, typer.Option(help="Images a step.")] = 128,
    lr: Annotated[float, typer.Option(help="Learning rate of AdamW, after the warm-up.")] = 1e-3,
    cooldown: Annotated[int, typer.Option(help="Steps at the end over which the learning rate falls to 0.")] = 0,
    precision: Annotated[str, typer.Option(help="fp32, or bf16 for autocast.")] = "fp32",
    seed: Annotated[int, typer.Option(help="Of everything random in the run.")] = 0,
    save_every: Annotated[int, typer.Option(help="Steps between checkpoints; the two newest are kept.")] = 1000,
    resume: Annotated[Optional[str], typer.Option(help="'auto' goes on from the newest checkpoint in OUT.")] = None,  # noqa: UP045
    device: Annotated[Optional[str], typer.Option(help="cpu or cuda. Default: cuda where there is one.")] = None,  # noqa: UP045
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress bar.")] = False,
) -> None:
    """Train a model. Example: fastgen train ddpm --data mnist-5k --out runs/digits --steps 5000 --resume auto"""
    import torch

    from fastgen.backends import check_device
    from fastgen.errors import UsageError
    from fastgen.training.classifier import ClassifierRecipe
    from fastgen.training.ddpm import DDPMRecipe
    from fastgen.training.loop import TrainConfig, start_or_resume

    recipes = {"ddpm": (DDPMRecipe, "mnist"), "classifier": (ClassifierRecipe, "digits")}
    if recipe not in recipes:
        raise UsageError(f"recipe: must be {' or '.join(recipes)}, not {recipe!r}")
    kind, standard = recipes[recipe]
    config = TrainConfig(
        data=data, preset=preset or standard, steps=steps, batch_size=batch_size, lr=lr, cooldown=cooldown,
        precision=precision, seed=seed, save_every=save_every,
    )  # fmt: skip
    check_device(device)
    place = device or ("cuda" if torch.cuda.is_available() else "cpu")
    trainer = start_or_resume(kind(config, place), config, out, resume)
    last = trainer.run(progress=False if quiet else None)
    hint = f"; draw from it with: fastgen sample {last} -n 16" if recipe == "ddpm" else f": {last}"
    typer.echo(f"trained to step {trainer.step}{hint}")


@app.command()
def models(as_json: Annotated[bool, typer.Option("--json", help="For scripts.")] = False) -> None:
    """List the models in the package. Example: fastgen models"""
    from fastgen.checkpoint import describe_models

    described = describe_models()
    if as_json:
        typer.echo(json.dumps(described, indent=2))
        return
    for entry in described:
        typer.echo(f"{entry['name']:<16}{entry['summary']}")


@app.command()
def doctor(as_json: Annotated[bool, typer.Option("--json", help="For scripts.")] = False) -> None:
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
