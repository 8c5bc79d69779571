"""The fastest settings of a kernel, and a process that finds them for many cases."""

from collections.abc import Callable
from typing import Any

from cases import Case, Pass, searched

Settings = dict[str, Any]
Row = dict[str, Any]
RIVALS = ("jax splash", "tokamax splash")


def stages(who: str, case: Case, which: Pass) -> list[list[Settings]]:
    """What is tried: the settings of a first stage, then changes of the best so far, each kept where it is faster.

    Blocks are square: others were never faster. They are larger where a sequence is so long that the half of a block
    on the diagonal, which is done in vain, is little of it.
    """
    edges = (1024, 2048) if case.mask == "causal" and case.length > 4096 else (512, 1024)
    if who == "ours":
        blocks = [{"block_q": edge, "block_k": edge, "strip": 128} for edge in edges]
        return [blocks, [{"strip": 256}, {"strip": 512}]]
    changes: list[Settings] = [{"compute": 256 if which == "forward" else 1024}]
    if who == "tokamax splash" and which == "forward":
        if case.mask == "causal":
            changes.append({"compute": 0, "qk_diag_skip": True, "sv_diag_skip": True})
        if case.heads // case.kv_heads % 2 == 0:
            changes.append({"num_stacked_q_heads": 2})
        changes.append({"use_experimental_scheduler": True})
    if who == "tokamax splash" and which == "backward":
        changes.append({"dq_reduction_steps": 3})
    return [[{"block_q": edge, "block_k": edge, "compute": 512} for edge in edges], changes]


def search(measure: Callable[[Settings], Row], tried: list[list[Settings]]) -> tuple[Row, list[Row]]:
    """The fastest that was measured, and a row for each that was tried, with the reason where it can't be compiled."""
    best: Row = {"settings": {}, "us": float("inf")}
    rows: list[Row] = []
    for number, stage in enumerate(tried):
        for change in stage:
            settings = best["settings"] | change if number else change
            if any(row["settings"] == settings for row in rows):
                continue
            try:
                found = {"settings": settings, **measure(settings)}
            except Exception as error:
                rows.append({"settings": settings, "error": str(error).strip().split("\n")[0][:160]})
                continue
            rows.append({name: found[name] for name in ("settings", "us", "compile_seconds")})
            best = min(best, found, key=lambda row: row["us"])
    if not best["settings"]:
        raise ValueError(f"none of the settings compiles: {rows}")
    return best, rows


def work(connection: Any, wanted: list[tuple[str, Case, Pass, str]], known: dict[Any, Settings]) -> None:
    """Sends a row for each of (chip, case, pass, whose kernel); `known` are settings that were found before."""
    from schedule import Compiler

    compiler = Compiler()
    try:
        from programs import PROGRAMS

        for chip, case, which, who in wanted:

            def measure(settings: Settings, case: Case, chip: str = chip, which: Pass = which, who: str = who) -> Row:
                return compiler.measure(chip, PROGRAMS[who], case, which, settings)

            place: Row = {"chip": chip, "case": case.name, "pass": which, "who": who}
            key, rows = (chip, searched(case).name, which, who), None
            try:
                if who == "ours":
                    found = {"settings": {}, **measure({}, case)}
                elif key in known:
                    found = {"settings": known[key], **measure(known[key], case)}
                else:
                    at = searched(case)
                    found, rows = search(lambda settings: measure(settings, at), stages(who, at, which))  # noqa: B023
                    known[key] = found["settings"]
                    if at != case:
                        found = {"settings": known[key], **measure(known[key], case)}
            except Exception as error:
                found = {"error": f"{type(error).__name__}: {error}"[:300]}
            connection.send(place | found | ({} if rows is None else {"tried": rows}))
    finally:
        compiler.close()
        connection.send(None)
