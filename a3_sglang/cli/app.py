"""The subcommands of ``a3-sglang``; one file each."""

from __future__ import annotations

import typer

from a3_sglang.cli import analyze, bench, calibrate, doctor, evaluate, explain, verify, warm

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="KV reuse at any position for SGLang: check an installation, verify a model, measure gain and answers.",
)
app.command("doctor")(doctor.doctor)
app.command("verify")(verify.verify)
app.command("eval")(evaluate.evaluate)
app.command("calibrate")(calibrate.calibrate)
app.command("explain")(explain.explain)
app.command("analyze")(analyze.analyze_log)
app.command("warm")(warm.warm_documents)
app.add_typer(bench.app, name="bench")
