"""The command `rlhf plan`: what each stage would need on some hardware, before anything is computed."""

import json
from collections.abc import Collection, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from flows.cli.console import console, enter_project, print_table, print_warning
from tasks.core.paths import project_root, stage_dir

if TYPE_CHECKING:
    from tasks.data.fit import Misfit
    from tasks.models.stage_plans import Hardware, StagePlan

__all__ = ["app", "check_memory"]

app = typer.Typer()

ANY = 1_000_000  # batches are smaller, so a larger one fits whatever it is

PARTS = {
    "weights": "weights", "gradients": "gradients", "optimiser": "Adam", "activations": "activations",
    "logits": "logits", "cache": "keys, values",
}  # fmt: skip
"""Part of the memory → heading."""


@app.command()
def plan(
    gpu: Annotated[str | None, typer.Option(help="h100:8 and the like; default: what this machine has.")] = None,
    nodes: Annotated[int, typer.Option(min=1, help="Equal machines.")] = 1,
    mfu: Annotated[float | None, typer.Option(min=0.01, max=1, help="Share of the peak rate that is reached.")] = None,
    price: Annotated[float | None, typer.Option(min=0, help="Of an hour of one GPU, in any currency.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON list.")] = False,
) -> None:
    """Show each stage's memory, largest batch, tokens, FLOPs and hours, and the setting to change where one does not
    fit."""
    root = enter_project()
    from tasks.config.params import load_params
    from tasks.models.stage_plans import MFU, detect_hardware, known_gpu, memory_misfits, plan_stages

    hardware = known_gpu(gpu, nodes=nodes) if gpu else detect_hardware(nodes=nodes)
    folders = _fresh_folders()
    plans = plan_stages(load_params(root / "params.yaml"), *folders, hardware, mfu=mfu)
    if as_json:
        print(json.dumps([asdict(item) for item in plans], indent=2))
        return
    _print_plans(plans, hardware, price)
    share = mfu or MFU[hardware.on_gpu]
    rate, room = f"{hardware.flops / 1e12:.3g} TFLOP/s", f"{hardware.memory / 1e9:.1f} GB"
    console.print(
        f"{hardware.count} × {hardware.name}, {room} and {rate} each, of which {share:.0%} are assumed (--mfu)"
    )
    if None in folders:
        console.print("Lengths of rows are assumed: `rlhf run prepare`, and they are counted.")
    for item in memory_misfits(plans, {found.stage for found in plans}, hardware, blocks=True):
        print_warning(f"does not fit: {item}")


def check_memory(stages: Collection[str], *, ranks: int, blocks: bool) -> "list[Misfit]":
    """Print in a line what those of the stages need that are planned; the settings that do not fit into memory."""
    if not stages:
        return []
    from tasks.config.params import load_params
    from tasks.models.stage_plans import detect_hardware, memory_misfits, plan_stages

    hardware = detect_hardware()
    shared = 1 if hardware.on_gpu else ranks  # a GPU each, or all in one memory
    hardware = replace(hardware, count=ranks, memory=hardware.memory / shared)
    found = plan_stages(load_params(project_root() / "params.yaml"), *_fresh_folders(), hardware)
    if plans := [item for item in found if item.stage in stages]:
        most = max(plans, key=lambda item: item.memory.total)
        minutes = sum(item.seconds for item in plans) / 60
        needs = f"{most.memory.total / 1e9:.2f} of {hardware.memory / 1e9:.1f} GB ({most.stage})"
        console.print(f"[dim]plan: at most {needs}, about {minutes:.1f} min on {hardware.name} (rlhf plan)[/]")
    return list(memory_misfits(plans, stages, hardware, blocks=blocks))


def _fresh_folders() -> tuple[Path | None, Path | None]:
    """Outputs of the stages that a plan reads; None where they are not up to date."""
    from tasks.data.fit import READS
    from tasks.runtime import dvc_stages

    stale = {item.stage for item in dvc_stages.stale_stages()}
    base_model, prepare = (None if name in stale else stage_dir(name) for name in READS)
    return base_model, prepare


def _print_plans(plans: "Sequence[StagePlan]", hardware: "Hardware", price: float | None) -> None:
    """Print the memory of the stages by part, then their batches and time."""
    table = Table("stage", title="Memory at the worst moment, GB", title_justify="left")
    for heading in (*PARTS.values(), "sum", "fits"):
        table.add_column(heading, justify="right")
    for item in plans:
        sizes = [getattr(item.memory, part) for part in PARTS]
        fits = "yes" if item.fits else "[red]no[/]"
        table.add_row(item.stage, *(f"{size / 1e9:.3g}" for size in (*sizes, sum(sizes))), fits)
    print_table(table)
    table = Table("stage", "setting", title="Largest batch that fits, and time", title_justify="left")
    for heading in ("set", "largest", "trained", "tokens", "TFLOPs", "hours", *(["cost"] if price is not None else [])):
        table.add_column(heading, justify="right")
    for item in plans:
        hours, largest = item.seconds / 3600, f"{item.largest:,}" if item.largest < ANY else "any"
        row = [item.stage, item.key.partition(".")[2], f"{item.value}", largest, f"{item.trained / 1e6:.3g} M"]
        row += [f"{item.tokens:,.0f}", f"{item.flops / 1e12:,.0f}", f"{hours:.3g}"]
        table.add_row(*row, *([f"{hours * hardware.count * price:,.2f}"] if price is not None else []))
    print_table(table)
