"""The command `rlhf reward check`: what the composed reward would pay for, before anything is trained on it."""

import json
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape
from rich.table import Table

from flows.cli.console import console, enter_project, handle_interrupt, print_table
from tasks.core.errors import StageError
from tasks.core.paths import Artifacts, stage_dir, state_dir

if TYPE_CHECKING:
    from tasks.evals.statistics import Interval

__all__ = ["app"]

app = typer.Typer(help="The reward of params.yaml.", no_args_is_help=True)


@app.command()
def check(
    prompts: Annotated[int, typer.Option(min=2, help="Prompts of the validation split, at most.")] = 32,
    samples: Annotated[int, typer.Option(min=1, help="SFT's responses to each prompt.")] = 16,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object, hack or best of n → gains.")] = False,
) -> None:
    """Show before training which cheap hacks the reward pays and gold does not, and what the best of n gains."""
    root = enter_project()
    from tasks.config.params import load_params
    from tasks.evals import reward_check
    from tasks.runtime import dvc_stages

    params = load_params(root / "params.yaml")
    stages = reward_check.stages_read(params)
    if stale := [item for item in dvc_stages.stale_stages() if item.stage in stages]:
        why = "; ".join(f"{item.stage}: {item.reasons[0]}" for item in stale)
        names = " ".join(item.stage for item in stale)
        raise StageError(f"the check reads stages that are not up to date ({why}): `rlhf run {names}` first")
    out = state_dir() / "reward-check"
    folders = Artifacts(out=out, **{stage: stage_dir(stage) for stage in stages})
    with handle_interrupt("it begins anew"):
        gains = reward_check.check_reward(params, folders, prompts=prompts, samples=samples)
    if as_json:
        print((out / "gains.json").read_text(encoding="utf-8"), end="")
        return
    title = f"Gains over SFT's mean in standard deviations of SFT's scores, on {gains[0].prompts} prompts"
    vader = [judge for judge in gains[0].gains if judge == "vader"]
    table = Table("", "reward", *gains[0].added, "gold", *vader, title=title, title_justify="left")
    for item in gains:
        added = [f"{value:z.2f}" for value in item.added.values()]
        cells = [_interval(item.gains["proxy"]), *added, *(_interval(item.gains[judge]) for judge in ("gold", *vader))]
        table.add_row(item.name, *cells, style="red" if item.unconfirmed else None)
    print_table(table)
    found = [item for item in gains if item.unconfirmed]
    console.print(f"hacks that gain more than {reward_check.THRESHOLD} by the reward and not by gold: {len(found)}")
    for item in found:
        proxy, gold = _interval(item.gains["proxy"]), _interval(item.gains["gold"])
        console.print(f"[red]{item.name}[/]: reward {proxy}, gold {gold}; {item.paid_by} pays it. The best paid text:")
        console.print(f"  {escape(json.dumps(item.example, ensure_ascii=False))}")
    console.print(f"table, plot and every text: {out}")


def _interval(gain: "Interval") -> str:
    return f"{gain.mean:z.2f} ({gain.low:z.2f} to {gain.high:z.2f})"
