"""`rlhf-fdiv …`: the stages of a run, and what the library knows. Heavy imports wait until a command needs them."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

import rlhf_fdiv
from rlhf_fdiv.errors import UserError

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Align language models by minimising an f-divergence.",
)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(rlhf_fdiv.__version__)
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Say the version.")
    ] = False,
) -> None:
    pass


ConfigArgument = Annotated[str | None, typer.Argument(help="A config file (YAML).", show_default=False)]
ConfigOption = Annotated[Path | None, typer.Option("--config", help="The same, as an option.", show_default=False)]
Overrides = Annotated[list[str] | None, typer.Argument(help="a.b=value overrides.", show_default=False)]
PrintConfig = Annotated[bool, typer.Option("--print-config", help="Print the resolved config and stop.")]


def _load(first: str | None, option: Path | None, overrides: list[str] | None, stages: list[str] | None = None) -> Any:
    from rlhf_fdiv import config as configs

    words = [*([first] if first is not None else []), *(overrides or [])]
    if option is None:
        if not words or "=" in words[0]:
            raise UserError("which config? Give a file: rlhf-fdiv run configs/quickstart.yaml [a.b=value …]")
        option = Path(words.pop(0))
    if stages:
        words.append(f"stages=[{stages[0]}]")
    return configs.load(option, words)


def _run(
    first: str | None, option: Path | None, overrides: list[str] | None, print_config: bool, stages: list[str] | None
) -> None:
    from rlhf_fdiv import config as configs

    config = _load(first, option, overrides, stages)
    if print_config:
        typer.echo(configs.dump(config), nl=False)
        return
    from rlhf_fdiv.stages.common import execute

    folder = execute(config, config.stages)
    if (folder.path / "report.md").is_file():
        typer.echo(f"report: {folder.path / 'report.md'}")


def _stage_command(name: str, text: str) -> None:
    def command(
        config: ConfigArgument = None,
        overrides: Overrides = None,
        config_option: ConfigOption = None,
        print_config: PrintConfig = False,
    ) -> None:
        _run(config, config_option, overrides, print_config, None if name == "run" else [name])

    command.__doc__ = text
    app.command(name)(command)


_stage_command("run", "All stages of a config, in order; finished ones are skipped.")
_stage_command("sft", "Supervised fine-tuning, its loss any f with finite f'(∞).")
_stage_command("reward", "A reward model from human preferences.")
_stage_command("policy", "On-policy alignment.")
_stage_command("prefer", "f-DPO: alignment from pairs, offline.")
_stage_command("distil", "Distillation from a teacher, by token, with any f.")


@app.command()
def evaluate(
    config: ConfigArgument = None,
    overrides: Overrides = None,
    config_option: ConfigOption = None,
    print_config: PrintConfig = False,
    lm_eval: Annotated[
        str | None, typer.Option(help="Tasks of lm-eval, before and after: names or local .yaml files, by commas.")
    ] = None,
) -> None:
    """Before and after, on held-out prompts."""
    tasks = [f"evaluate.lm_eval=[{lm_eval}]"] if lm_eval else []
    _run(config, config_option, [*(overrides or []), *tasks], print_config, ["evaluate"])


@app.command()
def plan(
    config: ConfigArgument = None,
    overrides: Overrides = None,
    config_option: ConfigOption = None,
    devices: Annotated[int, typer.Option(help="How many there are.", min=1)] = 8,
    memory: Annotated[float, typer.Option(help="GiB of each.", min=0)] = 80.0,
    prompt_length: Annotated[int, typer.Option(help="Tokens of the longest prompt.", min=2)] = 64,
    as_json: Annotated[bool, typer.Option("--json", help="Only the rows, as a JSON list, in GiB.")] = False,
) -> None:
    """The memory of training, per device and strategy, from configs alone: no weight is loaded, no step taken."""
    from rich.console import Console

    from rlhf_fdiv import plan as planning
    from rlhf_fdiv.stages.common import prepare_process

    prepare_process()
    rows = planning.plan(_load(config, config_option, overrides), devices, memory, prompt_length)
    if as_json:
        typer.echo(json.dumps(rows, indent=1))
    else:
        Console(width=130).print(*planning.tables(rows, devices, memory))


@app.command()
def ablate(
    grid: Annotated[Path, typer.Argument(help="An ablation file (YAML).", show_default=False)],
    overrides: Overrides = None,
    launch: Annotated[
        str | None, typer.Option(help='Run each cell by this launcher, for example "accelerate launch".')
    ] = None,
    jobs: Annotated[
        int | None, typer.Option(help="Cells at a time, each in a process that shares the cores.", min=1)
    ] = None,
    submitit: Annotated[
        list[str] | None, typer.Option(help="Submit each cell by submitit: its options as key=value; may be repeated.")
    ] = None,
    retry: Annotated[bool, typer.Option("--retry", help="Run failed cells again.")] = False,
    print_commands: Annotated[
        bool, typer.Option("--print-commands", help="Print a command for each run that can start now, and stop.")
    ] = False,
) -> None:
    """A grid of runs over any config keys; finished cells are skipped, failed ones named."""
    from rlhf_fdiv import ablation
    from rlhf_fdiv.config.files import with_overrides

    if print_commands:
        typer.echo("".join(f"{line}\n" for line in ablation.commands(grid, overrides or [], launch)), nl=False)
        return
    options = with_overrides({}, submitit) if submitit else None
    how = ablation.How(jobs or (1000 if submitit else 1), launch, retry, options)
    if not ablation.ablate(grid, overrides or [], how):
        raise typer.Exit(1)


@app.command()
def report(
    words: Annotated[
        list[str],
        typer.Argument(
            help="An ablation file whose cells have run, with its overrides; or the folders of runs.",
            metavar="GRID|RUNS…",
        ),
    ],
) -> None:
    """Runs side by side: CSV, LaTeX, figures, and tests of the pairs that an ablation file names."""
    from rlhf_fdiv import ablation

    paths = [Path(word) for word in words]
    out = ablation.report_runs(paths) if paths[0].is_dir() else ablation.report(paths[0], words[1:])
    typer.echo(f"report: {out / 'report.html'}")


@app.command("divergences")
def list_divergences(
    plot: Annotated[
        Path | None, typer.Option("--plot", help="Draw every f and f' into this file (PNG or PDF).")
    ] = None,
) -> None:
    """Every f with formula, direction and limits."""
    from rich.console import Console
    from rich.table import Table

    from rlhf_fdiv import divergences

    table = Table("name", "f(t), t = π/p", "direction", "f'(∞)", "f''(1)")
    for name in divergences.names():
        table.add_row(*divergences.summary(divergences.get(name)))
    Console().print(table)
    if plot is not None:
        from rlhf_fdiv.plots import plot_divergences

        plot_divergences(plot)
        typer.echo(f"plot: {plot}")


@app.command()
def verify(
    divergence: Annotated[
        list[str] | None,
        typer.Option(help="Only this f, by name, as a YAML mapping or as package.module:Class; may be repeated."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Only the rows, as a JSON list.")] = False,
) -> None:
    """The proof of every divergence × objective × target × estimator; exit code 1 where a row fails."""
    import torch

    from rlhf_fdiv import verify as proof
    from rlhf_fdiv.stages.common import prepare_process

    prepare_process()
    torch.set_num_threads(1)  # the tensors are tiny: several threads would only wait for each other
    rows = list[proof.Row]()
    for part in proof.verify(divergence or ()):
        rows += part
        if not as_json:
            typer.echo("\n".join(proof.lines(part)))
    if as_json:
        typer.echo(json.dumps([row._asdict() for row in rows], indent=1, ensure_ascii=False))
    else:
        failed = [row for row in rows if row.status == "fail"]
        typer.echo("\n".join([*proof.lines(failed), f"{len(rows)} rows: {proof.counts(rows)}"]))
    if any(row.status == "fail" for row in rows):
        raise typer.Exit(1)


@app.command("config-schema")
def config_schema() -> None:
    """JSON schema of every config section and choice."""
    from rlhf_fdiv import config as configs

    typer.echo(json.dumps(configs.schema(), indent=2, ensure_ascii=False))


def main() -> None:
    """The console script: a user's mistake ends with its message and exit code 2, never with a traceback."""
    sys.path.insert(0, str(Path.cwd()))  # so that package.module:name finds a user's own file, as python -m does
    try:
        app()
    except UserError as error:
        for problem in error.problems:
            print(f"error: {problem}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
