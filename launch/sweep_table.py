"""The ranking that --sweep prints."""

from __future__ import annotations

from typing import Any

from moejax.aot.estimate import Setup, estimate_time
from moejax.aot.plan import Plan
from moejax.core.memory import GIB
from moejax.core.mesh import AXES

_HEAD = ["", "mesh d f e t", "rows", "parts", "remat", "experts by"]
_HEAD += ["GiB", "bound", "tokens/s", "MFU"]
_FORM = "{:>3} {:<14}{:>6}{:>6}  {:<9}{:<11}{:>7}  {:<8}{:>12}{:>7}"


def row_of(keys: dict[str, Any], setup: Setup, plan: Plan | int) -> dict[str, Any]:
    """One candidate; `plan` is the bytes it takes where it was reckoned only. order: sorts the best
    first.

    Time is that in which what no product overlaps waits its turn.
    """
    compiled = isinstance(plan, Plan)
    if isinstance(plan, Plan):
        line, model_flops, fits = plan.roofline, plan.model_flops, plan.fits
        used = plan.hbm.used if plan.required_bytes is None else plan.required_bytes
    else:
        line, model_flops, fits = estimate_time(setup), 0.0, plan <= setup.chip.hbm_bytes
        used = plan
    rate = mfu = 0.0
    if line is not None:
        rate = setup.batch_size * setup.seq_len / line.in_turn_s
        mfu = model_flops / line.in_turn_s / setup.chip.flops_per_s
    row = {"keys": keys, "compiled": compiled, "used": used, "fits": fits, "tokens_per_s": rate}
    row |= {"mfu": mfu, "bound": line.bound if line is not None else "-"}
    return row | {"order": [not fits, -rate]}


def table(rows: list[dict[str, Any]]) -> str:
    """Compiled candidates by rank, then others by estimate (marked ~)."""
    lines = [_FORM.format(*_HEAD)]
    for rank, row in enumerate(rows, 1):
        keys = row["keys"]
        mesh = " ".join(str(keys[f"mesh.{axis}"]) for axis in AXES)
        about = "" if row["compiled"] else "~"
        lines.append(
            _FORM.format(
                rank if row["compiled"] else "~",
                mesh,
                keys["train.batch_size"],
                keys["train.accumulation"],
                keys["compute.remat"],
                keys["compute.moe_strategy"],
                f"{about}{row['used'] / GIB:.1f}" + ("" if row["fits"] else "!"),
                row["bound"],
                f"{about}{row['tokens_per_s']:,.0f}",
                f"{row['mfu']:.0%}" if row["compiled"] else "-",
            )
        )
    lines.append("! does not fit; ~ reckoned, not compiled. tokens/s and MFU are upper bounds.")
    best = next((row for row in rows if row["fits"] and row["compiled"]), None)
    if best is None and any(row["compiled"] for row in rows):
        lines.append("none of those compiled fits: compile more (--compiles), or take more devices")
    best = best or next((row for row in rows if row["fits"] and not rows[0]["compiled"]), None)
    if best is not None:
        lines.append("best: " + " ".join(f"--config.{k}={v}" for k, v in best["keys"].items()))
    return "\n".join(lines)
